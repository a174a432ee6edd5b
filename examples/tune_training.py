"""Tune the training of a small transformer on a book, and see which models under- and overfit.

    book -> Setup.trial: new_model, train -> curves, weights   (tune: what gives the best model?)
         -> the best model's texts                             (tune: what decodes it best?)
         -> table, curves.png, trials.png, samples.md, report.html

``python examples/tune_training.py`` takes some minutes on a CPU; examples/README.md says what to
look at. Needs the extra ``tune``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, StepLR

from llm_sampling import SamplingParams
from llm_sampling.generation import generate
from llm_sampling.tools.tuning import METHODS, Range, Space, tune
from llm_sampling.tools.tuning.report import write_report

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

HEAD_SIZE = 16
WIDTHS = (32, 64, 96, 128)
SCHEDULES = ("time", "step", "exponential")
STEP_EPOCHS = 4

#: By how much of itself a validation loss must change to count in a verdict.
TOLERANCE = 0.02

NGRAM = 4
DECODING_SPACE: Space = {"temperature": Range(0.3, 1.5), "top_p": Range(0.5, 1.0)}
#: Texts for each trial of the decoding; one alone is a matter of luck.
DECODING_ROWS = 4
COLUMN = 38


# ---- the text ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A book whose tokens are its characters.

    Attributes:
        vocabulary: all characters, sorted; a token is an index into it.
        train: int64 ``(characters,)``, the book's beginning.
        validation: int64 ``(characters,)``, its last tenth.
    """

    vocabulary: str
    train: Tensor
    validation: Tensor

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; ValueError for a character that the book does not have."""
        return [self.vocabulary.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(self.vocabulary[token] for token in tokens)


def read_book() -> str:
    """Alice's Adventures in Wonderland, which the package ships."""
    return (resources.files("llm_sampling.tools") / "data" / "alice.txt").read_text(
        encoding="utf-8"
    )


def split(book: str, characters: int) -> Text:
    """The first ``characters`` to learn from, nine tenths at most, and the last one to validate."""
    vocabulary = "".join(sorted(set(book)))
    tokens = torch.tensor([vocabulary.index(character) for character in book])
    held_out = len(book) - len(book) // 10
    return Text(vocabulary, tokens[:held_out][:characters], tokens[held_out:])


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``(windows, context)``: a target is the token after its input."""
    count = (len(tokens) - 1) // context
    inputs, targets = tokens[: count * context], tokens[1 : count * context + 1]
    return inputs.view(count, context), targets.view(count, context)


# ---- the model -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(rows, length, 3, -1, HEAD_SIZE)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (rows, heads, length, HEAD_SIZE)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class Transformer(nn.Module):
    """A decoder-only transformer that learns characters within seconds on a CPU.

    Args:
        vocab_size: how many tokens there are.
        context: tokens of a row in training; it should not be shown more.
        layers: how many blocks.
        width: what a token's vector holds; a multiple of HEAD_SIZE.
    """

    def __init__(self, vocab_size: int, context: int, layers: int, width: int) -> None:
        super().__init__()
        self.context = context
        self.heads = width // HEAD_SIZE
        self.tokens = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(rows, length, vocab_size)`` of input_ids ``(rows, length)``."""
        mask = causal_mask(self.heads, input_ids.shape[1])
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def causal_mask(heads: int, length: int) -> Tensor:
    """What is added to the attention scores, ``(heads, length, length)``: -inf for later tokens.

    For earlier ones, minus their distance times 1/2, 1/4, ... by head (ALiBi): the only thing that
    tells positions apart. With learned positions a training needs about four times the epochs.
    """
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    slopes = 0.5 ** torch.arange(1, heads + 1)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)


def new_model(
    vocab_size: int, context: int, values: Mapping[str, Any], generator: torch.Generator
) -> Transformer:
    """An untrained model of the trial's ``layers`` and ``width``, drawn with ``generator``."""
    # torch's own initialisation would draw from the global generator, and on "meta" it cannot
    with torch.device("meta"):
        model = Transformer(vocab_size, context, values["layers"], values["width"])
    model.to_empty(device="cpu")
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)  # a norm's
        else:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    return model


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Losses after each epoch, in nats a character."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The one with the smallest validation loss; the first has number 1."""
        return 1 + self.validation.index(min(self.validation))

    @property
    def rise(self) -> float:
        """How much of its smallest validation loss the last one lies above it."""
        return self.validation[-1] / min(self.validation) - 1


def schedule(name: str, optimizer: torch.optim.Optimizer, rate: float) -> LRScheduler:
    """The learning rate of each epoch e = 0, 1, ..., from the optimizer's first one, lr.

    All fall by the share ``rate`` an epoch at first, so that one range of rates suits them all:

    * time: lr / (1 + rate e)
    * step: lr exp(-rate s), with s the last multiple of STEP_EPOCHS up to e
    * exponential: lr exp(-rate e)

    Raises:
        ValueError: there is no schedule of that name.
    """
    if name == "time":
        return LambdaLR(optimizer, lambda epoch: 1 / (1 + rate * epoch))
    if name == "step":
        return StepLR(optimizer, STEP_EPOCHS, math.exp(-rate * STEP_EPOCHS))
    if name == "exponential":
        return ExponentialLR(optimizer, math.exp(-rate))
    raise ValueError(f"name must be one of {', '.join(SCHEDULES)}, got {name!r}")


def train(
    model: Transformer,
    text: Text,
    values: Mapping[str, Any],
    generator: torch.Generator,
    curves: Curves,
) -> Iterator[float]:
    """Train ``model``; adds each epoch's losses to ``curves`` and yields the validation loss.

    Args:
        model: changed in place.
        text: its parts longer than two of the model's contexts.
        values: the trial's ``epochs``, ``learning_rate``, ``decay`` (a schedule's name),
            ``decay_rate`` and ``batch_size`` (windows).
        generator: draws where the windows begin and their order. Nothing else is drawn.
        curves: where the losses go.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=values["learning_rate"])
    decay = schedule(values["decay"], optimizer, values["decay_rate"])
    # as much of the text as there is to validate on: the two losses are equally exact
    seen = text.train[: len(text.validation)]
    for _ in range(values["epochs"]):
        begin = int(torch.randint(model.context, (), generator=generator))
        inputs, targets = windows(text.train[begin:], model.context)
        order = torch.randperm(len(inputs), generator=generator)
        for batch in order.split(values["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]).flatten(0, 1), targets[batch].flatten()).backward()
            # without it the largest learning rates diverge
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        decay.step()
        curves.train.append(loss_on(model, seen))
        curves.validation.append(loss_on(model, text.validation))
        yield curves.validation[-1]


@torch.no_grad()
def loss_on(model: Transformer, tokens: Tensor) -> float:
    """The mean loss of tokens in nats, in windows that do not overlap."""
    inputs, targets = windows(tokens, model.context)
    total = 0.0
    for some, wanted in zip(inputs.split(64), targets.split(64), strict=True):
        logits = model(some).flatten(0, 1)
        total += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
    return total / targets.numel()


def verdict(curves: Curves, best: Curves) -> str:
    """What went wrong in a training, if anything, by its last losses and those of the best trial.

    * overfits: it knows the text that it learnt from better than the best trial does, and the one
      that it has not seen worse. Or the latter's loss has risen again since its smallest.
    * underfits: it knows both texts worse: too small a model, too slow a training or too short a
      one. Or the validation loss was still falling in the last epoch, as it is in the first.
    * fits: neither.

    A validation loss is worse, rising or falling if it is so by more than TOLERANCE of itself.
    """
    before, last = [math.inf, *curves.validation][-2:]
    is_worse = last > best.validation[-1] * (1 + TOLERANCE)
    has_learnt_more = curves.train[-1] < best.train[-1]
    if curves.rise > TOLERANCE or (is_worse and has_learnt_more):
        return "overfits"
    if last < before * (1 - TOLERANCE) or is_worse:
        return "underfits"
    return "fits"


# ---- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What all trials share, and where what they leave lies.

    Attributes:
        text: what they learn.
        context: tokens that a model can look at.
        seed: all models begin with it, so that only the trial's values make a difference.
        out: a directory.
    """

    text: Text
    context: int
    seed: int
    out: Path

    @property
    def name(self) -> str:
        """Another for each setup whose trials cannot be compared with this one's."""
        return f"{len(self.text.train)} characters, context {self.context}, seed {self.seed}"

    def file(self, values: Mapping[str, Any], kind: str) -> Path:
        """Where a trial's curves ("json") or weights ("pt") lie: the same in a resumed search."""
        key = json.dumps([self.name, dict(values)], sort_keys=True)
        return self.out / "trials" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{kind}"

    def trial(self, values: dict[str, Any]) -> Generator[float, None, None]:
        """Train a model: yields each epoch's validation loss, writes curves and last weights."""
        generator = torch.Generator().manual_seed(self.seed)
        model = new_model(len(self.text.vocabulary), self.context, values, generator)
        size = sum(weight.numel() for weight in model.parameters())
        curves = Curves()
        record = self.file(values, "json")
        record.parent.mkdir(parents=True, exist_ok=True)
        for loss in train(model, self.text, values, generator, curves):
            # in each epoch: a trial that is pruned does not come to the end
            content = {"values": values, "parameters": size, **asdict(curves)}
            record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            yield loss
        torch.save(model.state_dict(), self.file(values, "pt"))

    def model(self, values: Mapping[str, Any]) -> Transformer:
        """The model that a trial left."""
        size = len(self.text.vocabulary), self.context
        model = new_model(*size, values, torch.Generator())
        model.load_state_dict(torch.load(self.file(values, "pt"), weights_only=True))
        return model


def search_space(options: argparse.Namespace) -> Space:
    """What is searched: ranges and lists, for a grid short lists."""
    widths = [width for width in WIDTHS if width <= options.max_width]
    if options.method == "grid":
        return {
            "layers": sorted({1, options.max_layers}),
            "width": sorted({widths[0], widths[-1]}),
            "epochs": [options.max_epochs],
            "learning_rate": [1e-3, 5e-3],
            "decay": SCHEDULES,
            "decay_rate": [0.1],
            "batch_size": [16],
        }
    return {
        "layers": Range(1, options.max_layers),
        "width": widths,
        "epochs": Range(1, options.max_epochs),
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "decay": SCHEDULES,
        "decay_rate": Range(0.01, 0.5, log=True),
        "batch_size": [8, 16, 32],
    }


@dataclass(frozen=True)
class Tried:
    """A trial that is done.

    Attributes:
        number: Optuna's.
        state: "complete", "pruned" or "fail".
        values: what it was given.
        parameters: weights of the model.
        curves: up to where it was pruned.
    """

    number: int
    state: str
    values: dict[str, Any]
    parameters: int
    curves: Curves

    @property
    def loss(self) -> float:
        """The last epoch's validation loss, which the search made small."""
        return self.curves.validation[-1]

    @property
    def gap(self) -> float:
        """How much better the model knows the text that it learnt from."""
        return self.loss - self.curves.train[-1]


def read_trials(setup: Setup, trials: Sequence[FrozenTrial]) -> list[Tried]:
    """The trials with what they left, in order.

    Raises:
        FileNotFoundError: a trial of the storage has left nothing in this directory.
    """
    tried = []
    for trial in trials:
        record = setup.file(trial.params, "json")
        if not record.exists():
            raise FileNotFoundError(
                f"--out must hold what the trials in --storage left: no {record}"
            )
        content = json.loads(record.read_text(encoding="utf-8"))
        curves = Curves(content["train"], content["validation"])
        size, state = content["parameters"], trial.state.name.lower()
        tried.append(Tried(trial.number, state, trial.params, size, curves))
    return tried


def best_first(tried: Sequence[Tried]) -> list[Tried]:
    """Those that were not pruned, by their validation loss."""
    return sorted((x for x in tried if x.state == "complete"), key=lambda x: x.loss)


def verdicts(tried: Sequence[Tried]) -> list[str]:
    """A :func:`verdict` for each; for one that was not completed, its state."""
    best = best_first(tried)[0].curves
    return [verdict(x.curves, best) if x.state == "complete" else x.state for x in tried]


def keep_best(setup: Setup, tried: Sequence[Tried], keep: int) -> list[Tried]:
    """The best trials, best first; the weights of all others are removed."""
    # an earlier run on the same storage may have kept fewer
    left = [x for x in best_first(tried) if setup.file(x.values, "pt").exists()]
    kept = left[:keep]
    for file in {setup.file(x.values, "pt") for x in left} - {
        setup.file(x.values, "pt") for x in kept
    }:
        file.unlink()
    return kept


# ---- decoding ------------------------------------------------------------------------------------


def windowed(model: Transformer) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    """The model as ``generate`` calls it, on the last ``context`` tokens; they are its "cache"."""

    def forward(input_ids: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        ids = input_ids if cache is None else torch.cat([cache, input_ids], dim=1)
        ids = ids[:, -model.context :]
        return model(ids)[:, -1], ids

    return forward


def sample_texts(
    model: Transformer, text: Text, prompt: str, params: SamplingParams, length: int, n: int = 1
) -> list[str]:
    """``n`` texts of ``length`` characters that follow the prompt."""
    done = generate(
        windowed(model),
        [text.encode(prompt)],
        params,
        vocab_size=len(text.vocabulary),
        max_new_tokens=length,
        n=n,
    )
    return [text.decode(completion.token_ids) for completion in done]


def distinct_share(text: str) -> float:
    """Of all runs of NGRAM characters, the share that is left when each counts once."""
    runs = [text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)]
    return len(set(runs)) / len(runs)


def mean_distinct_share(texts: Sequence[str]) -> float:
    """Of texts of one length, since a longer text repeats more."""
    return sum(map(distinct_share, texts)) / len(texts)


def tune_decoding(
    model: Transformer, text: Text, prompt: str, *, length: int, trials: int, seed: int
) -> tuple[SamplingParams, float, float]:
    """The parameters whose texts repeat themselves as much as the author does.

    Low temperatures go round in circles, high ones make up words: the share of distinct runs of
    characters is below the author's or above it.

    Returns:
        The parameters, the share of the texts drawn with them, and the author's.
    """
    book = text.decode(text.validation.tolist())
    author = mean_distinct_share(
        [book[i : i + length] for i in range(0, len(book) - length + 1, length)]
    )

    def share(values: Mapping[str, Any]) -> float:
        params = SamplingParams(**values, seed=seed)
        return mean_distinct_share(
            sample_texts(model, text, prompt, params, length, n=DECODING_ROWS)
        )

    result = tune(
        lambda values: abs(share(values) - author),
        DECODING_SPACE,
        n_trials=trials,
        seed=seed,
        show_progress=False,
    )
    params = SamplingParams(**result.best_params, seed=seed)
    return params, share(result.best_params), author


# ---- what is reported ----------------------------------------------------------------------------


def table(tried: Sequence[Tried]) -> str:
    """A line for each trial, with losses in nats a character."""
    lines = [
        "trial  layers  width  weights  epochs       lr        decay   rate  batch"
        "  train  validation    gap  verdict"
    ]
    for x, judged in zip(tried, verdicts(tried), strict=True):
        v = x.values
        epochs = f"{len(x.curves.train)}/{v['epochs']}"
        lines.append(
            f"{x.number:5}  {v['layers']:6}  {v['width']:5}  {x.parameters:7}  {epochs:>6}"
            f"  {v['learning_rate']:.5f}  {v['decay']:>11}  {v['decay_rate']:.3f}"
            f"  {v['batch_size']:5}  {x.curves.train[-1]:.3f}  {x.loss:10.3f}"
            f"  {x.gap:+.2f}  {judged}"
        )
    return "\n".join(lines)


def selected(tried: Sequence[Tried]) -> dict[str, Tried]:
    """By title, the trials to look at: the best, and the worst of those that under- and overfit."""
    judged = list(zip(tried, verdicts(tried), strict=True))
    found = {"best": best_first(tried)[0]}
    underfitted = [x for x, name in judged if name == "underfits"]
    if underfitted:
        found["most underfitted"] = max(underfitted, key=lambda x: x.curves.train[-1])
    overfitted = [x for x, name in judged if name == "overfits"]
    if overfitted:
        found["most overfitted"] = max(overfitted, key=lambda x: x.gap)
    return found


def draw(tried: Sequence[Tried], out: Path) -> list[Path]:
    """Draw curves.png and trials.png; the files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    chosen = selected(tried)
    figure = Figure(figsize=(4 * len(chosen), 3.4), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (title, x) in zip(panels, chosen.items(), strict=True):
        epochs = range(1, len(x.curves.train) + 1)
        axes.plot(epochs, x.curves.train, ".-", label="train")
        axes.plot(epochs, x.curves.validation, ".-", label="validation")
        axes.axvline(x.curves.best_epoch, color="grey", linestyle=":", label="smallest validation")
        axes.set_title(f"{title}: trial {x.number}, {x.parameters:,} weights", fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("loss, nats a character")
    panels[0].legend(fontsize=8)
    curves = out / "curves.png"
    figure.savefig(curves, dpi=120)

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for color, name in enumerate(SCHEDULES):
        for state, face in (("complete", f"C{color}"), ("pruned", "none")):
            some = [x for x in tried if x.values["decay"] == name and x.state == state]
            if some:
                axes.scatter(
                    [x.curves.train[-1] for x in some],
                    [x.loss for x in some],
                    [8 + x.parameters / 4000 for x in some],
                    facecolors=face,
                    edgecolors=f"C{color}",
                    alpha=0.7,
                    label=name if state == "complete" else f"{name}, pruned",
                )
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], ":", color="grey", label="no gap")
    axes.set_xlabel("train loss, nats a character")
    axes.set_ylabel("validation loss")
    axes.set_title(
        "underfitting: far right; overfitting: far above the line; area: weights", fontsize=9
    )
    axes.legend(fontsize=8, loc="lower right")
    trials = out / "trials.png"
    figure.savefig(trials, dpi=120)
    return [curves, trials]


def side_by_side(headers: Sequence[str], texts: Sequence[str]) -> str:
    """The texts in columns, wrapped at words."""
    columns = [
        [header, "-" * COLUMN]
        + [line for part in text.split("\n") for line in textwrap.wrap(part, COLUMN) or [""]]
        for header, text in zip(headers, texts, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{x:{COLUMN}}" for x in row).rstrip() for row in rows)


def compare(
    setup: Setup, kept: Sequence[Tried], prompt: str, tuned: SamplingParams, length: int
) -> str:
    """The models' texts side by side, greedy and tuned, as Markdown."""
    headers = [f"trial {x.number}: validation {x.loss:.3f}" for x in kept]
    parts = []
    for title, params in (
        ("Greedy", SamplingParams(temperature=0)),
        (f"Tuned: temperature {tuned.temperature:.3f}, top-p {tuned.top_p:.3f}", tuned),
    ):
        texts = [
            prompt + sample_texts(setup.model(x.values), setup.text, prompt, params, length)[0]
            for x in kept
        ]
        parts.append(f"## {title}\n\n```text\n{side_by_side(headers, texts)}\n```\n")
    return "\n".join(parts)


# ---- the command ---------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None, book: str) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description="Tune the training of a small transformer.")
    parser.add_argument("--method", choices=METHODS, default="bayesian")
    parser.add_argument("--trials", type=int, help="default: 20, or all of a grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tune_training"), metavar="DIR")
    parser.add_argument("--storage", help="such as sqlite:///training.db: a killed run goes on")
    parser.add_argument("--characters", type=int, default=20_000, help="of the book, to learn from")
    parser.add_argument("--context", type=int, default=64, help="characters a model can look at")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--max-layers", type=int, default=4)
    parser.add_argument("--max-width", type=int, default=WIDTHS[-1])
    parser.add_argument(
        "--pruning",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end trials early that do worse than the median",
    )
    parser.add_argument("--keep", type=int, default=3, help="best models to keep and compare")
    parser.add_argument("--prompt", default="Alice was ")
    parser.add_argument("--length", type=int, default=300, help="characters of a sample")
    parser.add_argument("--decoding-trials", type=int, default=10)
    options = parser.parse_args(argv)
    held_out = len(book) // 10
    for name, least, most in (
        ("context", 1, held_out // 2),
        ("characters", 2 * options.context + 1, len(book) - held_out),
        ("max_epochs", 1, math.inf),
        ("max_layers", 1, math.inf),
        ("max_width", WIDTHS[0], WIDTHS[-1]),
        ("keep", 1, math.inf),
        ("length", NGRAM, held_out),
        ("decoding_trials", 1, math.inf),
    ):
        value = getattr(options, name)
        if not least <= value <= most:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be in {least} .. {most}, got {value}")
    unknown = "".join(sorted(set(options.prompt) - set(book)))
    if unknown or not options.prompt:
        parser.error(f"--prompt must have characters of the book, got {unknown!r}")
    if options.trials is None and options.method != "grid":
        options.trials = 20
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Search, then report what the trials and their models are like."""
    book = read_book()
    options = parse(argv, book)
    text = split(book, options.characters)
    setup = Setup(text, options.context, options.seed, options.out)
    pruner = None
    if not options.pruning:
        import optuna

        pruner = optuna.pruners.NopPruner()
    result = tune(
        setup.trial,
        search_space(options),
        options.method,
        n_trials=options.trials,
        seed=options.seed,
        storage=options.storage,
        study_name=f"tune_training, {setup.name}",
        pruner=pruner,
        show_progress=False,
        callback=lambda trial: print(
            f"trial {trial.number}: {trial.state.name.lower()}, "
            f"validation loss {trial.value or math.nan:.3f}",
            file=sys.stderr,
        ),
    )
    tried = read_trials(setup, result.trials)
    print(table(tried))

    kept = keep_best(setup, tried, options.keep)
    tuned, share, author = tune_decoding(
        setup.model(kept[0].values),
        text,
        options.prompt,
        length=options.length,
        trials=options.decoding_trials,
        seed=options.seed,
    )
    samples = (
        f"# Samples of the best {len(kept)} models\n\n"
        f"Of {options.length} characters' runs of {NGRAM}, {share:.1%} are distinct in texts of "
        f"trial {kept[0].number} with tuned decoding, and {author:.1%} in the author's.\n\n"
        + compare(setup, kept, options.prompt, tuned, options.length)
    )
    (options.out / "samples.md").write_text(samples, encoding="utf-8")
    print(f"\n{samples}")
    try:
        files = draw(tried, options.out)
        files += write_report(result, options.out, ["validation loss"])
    except ModuleNotFoundError:
        files = []
        print("no pictures: pip install matplotlib", file=sys.stderr)
    for file in [options.out / "samples.md", *files]:
        print(file)


if __name__ == "__main__":
    main()
