"""Tune the training of a small transformer on a book, and show which models under- and overfit.

    book -> Setup.trial: new_model, train -> curves, weights   (first search: training)
         -> the best model's texts                             (second search: decoding)
         -> table, curves.png, trials.png, samples.md, report.html

``python examples/tune_training.py`` takes some minutes on a CPU; examples/README.md explains the
results. Needs the extra ``tune``.
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

#: The relative change of a validation loss from which on it counts in a verdict.
TOLERANCE = 0.02

NGRAM = 4
DECODING_SPACE: Space = {"temperature": Range(0.3, 1.5), "top_p": Range(0.5, 1.0)}
#: Texts in each trial of the search for decoding parameters; a single text varies too much.
DECODING_ROWS = 4
COLUMN = 38


# ---- the text ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A book whose tokens are its characters.

    Attributes:
        vocabulary: all characters, sorted; a token is an index into it.
        train: int64 ``(characters,)``, the beginning of the book.
        validation: int64 ``(characters,)``, the last tenth of the book.
    """

    vocabulary: str
    train: Tensor
    validation: Tensor

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; a ValueError if a character does not occur in the book."""
        return [self.vocabulary.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(self.vocabulary[token] for token in tokens)


def read_book() -> str:
    """Alice's Adventures in Wonderland, which is part of the package."""
    return (resources.files("llm_sampling.tools") / "data" / "alice.txt").read_text(
        encoding="utf-8"
    )


def split(book: str, characters: int) -> Text:
    """The first ``characters``, at most nine tenths of the book, and the last tenth to validate."""
    vocabulary = "".join(sorted(set(book)))
    tokens = torch.tensor([vocabulary.index(character) for character in book])
    held_out = len(book) - len(book) // 10
    return Text(vocabulary, tokens[:held_out][:characters], tokens[held_out:])


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, ``(windows, context)``; each target is the token after its input."""
    count = (len(tokens) - 1) // context
    inputs, targets = tokens[: count * context], tokens[1 : count * context + 1]
    return inputs.view(count, context), targets.view(count, context)


# ---- the model -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a norm before and a residual."""

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
        vocab_size: the number of tokens.
        context: the number of tokens in a row of training data; longer inputs work badly.
        layers: the number of blocks.
        width: the size of a token's vector, a multiple of HEAD_SIZE.
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
    """The bias of the attention scores, ``(heads, length, length)``; -inf for later tokens.

    For earlier tokens it is minus their distance times 1/2, 1/4, ... by head (ALiBi, Press et al.
    2022, arXiv:2108.12409). There is no other encoding of positions: learned positions need about
    four times as many epochs.
    """
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    slopes = 0.5 ** torch.arange(1, heads + 1)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)


def new_model(
    vocab_size: int, context: int, values: Mapping[str, Any], generator: torch.Generator
) -> Transformer:
    """An untrained model of the trial's ``layers`` and ``width``, drawn with ``generator``."""
    # On "meta" torch does not initialise the weights, which would use the global generator.
    with torch.device("meta"):
        model = Transformer(vocab_size, context, values["layers"], values["width"])
    model.to_empty(device="cpu")
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)  # the weight of a norm
        else:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    return model


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Losses after each epoch, in nats per character."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The epoch with the smallest validation loss, counted from 1."""
        return 1 + self.validation.index(min(self.validation))

    @property
    def rise(self) -> float:
        """By what share the last validation loss is above the smallest."""
        return self.validation[-1] / min(self.validation) - 1


def schedule(name: str, optimizer: torch.optim.Optimizer, rate: float) -> LRScheduler:
    """A schedule of the learning rate over epochs e = 0, 1, ..., where lr is the optimizer's own.

    All begin by falling by the share ``rate`` per epoch, so that one range of rates suits them all:

    * time: lr / (1 + rate e)
    * step: lr exp(-rate s), where s is the largest multiple of STEP_EPOCHS that is <= e
    * exponential: lr exp(-rate e)

    Raises:
        ValueError: the name is unknown.
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
    """Train ``model``; after each epoch, add its losses to ``curves``, yield the validation loss.

    Args:
        model: the model, which is changed in place.
        text: what to train on; both parts must be longer than two of the model's contexts.
        values: the trial's ``epochs``, ``learning_rate``, ``decay`` (a schedule's name),
            ``decay_rate`` and ``batch_size`` (windows).
        generator: draws where the windows begin and their order, which is all that is random.
        curves: receives the losses.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=values["learning_rate"])
    decay = schedule(values["decay"], optimizer, values["decay_rate"])
    # As many characters as there are to validate on, so both losses are equally precise.
    seen = text.train[: len(text.validation)]
    for _ in range(values["epochs"]):
        begin = int(torch.randint(model.context, (), generator=generator))
        inputs, targets = windows(text.train[begin:], model.context)
        order = torch.randperm(len(inputs), generator=generator)
        for batch in order.split(values["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]).flatten(0, 1), targets[batch].flatten()).backward()
            # Without clipping, training diverges at the largest learning rates.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        decay.step()
        curves.train.append(loss_on(model, seen))
        curves.validation.append(loss_on(model, text.validation))
        yield curves.validation[-1]


@torch.no_grad()
def loss_on(model: Transformer, tokens: Tensor) -> float:
    """The mean loss of the tokens in nats, over windows that do not overlap."""
    inputs, targets = windows(tokens, model.context)
    total = 0.0
    for some, wanted in zip(inputs.split(64), targets.split(64), strict=True):
        logits = model(some).flatten(0, 1)
        total += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
    return total / targets.numel()


def verdict(curves: Curves, best: Curves) -> str:
    """Whether a training over- or underfits, by comparison with the best trial.

    * overfits: the last training loss is below the best trial's, but the last validation loss is
      above it; or the validation loss has risen again since its minimum.
    * underfits: both losses are above the best trial's, because the model is too small or the
      training too slow or too short; or the validation loss still fell in the last epoch.
    * fits: neither.

    Differences of validation losses below TOLERANCE of them do not count.
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
    """What all trials share, and the directory of their files.

    Attributes:
        text: the text to train on.
        context: the number of tokens that a model can look at.
        seed: the seed of every training, so that only the trial's values make a difference.
        out: the directory that the trials' files are in.
    """

    text: Text
    context: int
    seed: int
    out: Path

    @property
    def name(self) -> str:
        """A name that differs for setups whose trials cannot be compared."""
        return f"{len(self.text.train)} characters, context {self.context}, seed {self.seed}"

    def file(self, values: Mapping[str, Any], kind: str) -> Path:
        """The file of a trial's curves ("json") or weights ("pt"), the same in a resumed search."""
        key = json.dumps([self.name, dict(values)], sort_keys=True)
        return self.out / "trials" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.{kind}"

    def trial(self, values: dict[str, Any]) -> Generator[float, None, None]:
        """Train a model, yield each epoch's validation loss, write the curves and last weights."""
        generator = torch.Generator().manual_seed(self.seed)
        model = new_model(len(self.text.vocabulary), self.context, values, generator)
        size = sum(weight.numel() for weight in model.parameters())
        curves = Curves()
        record = self.file(values, "json")
        record.parent.mkdir(parents=True, exist_ok=True)
        for loss in train(model, self.text, values, generator, curves):
            # Written after each epoch, because a pruned trial does not reach the end.
            content = {"values": values, "parameters": size, **asdict(curves)}
            record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            yield loss
        torch.save(model.state_dict(), self.file(values, "pt"))

    def model(self, values: Mapping[str, Any]) -> Transformer:
        """The model that a trial saved."""
        size = len(self.text.vocabulary), self.context
        model = new_model(*size, values, torch.Generator())
        model.load_state_dict(torch.load(self.file(values, "pt"), weights_only=True))
        return model


def search_space(options: argparse.Namespace) -> Space:
    """The space of the search: ranges and lists, or short lists for a grid."""
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
    """A finished trial.

    Attributes:
        number: Optuna's number of the trial.
        state: "complete", "pruned" or "fail".
        values: the values that it was called with.
        parameters: the number of the model's weights.
        curves: the losses, up to the epoch in which it was pruned.
    """

    number: int
    state: str
    values: dict[str, Any]
    parameters: int
    curves: Curves

    @property
    def loss(self) -> float:
        """The last epoch's validation loss, which the search minimises."""
        return self.curves.validation[-1]

    @property
    def gap(self) -> float:
        """The generalisation gap: the last validation loss minus the last training loss."""
        return self.loss - self.curves.train[-1]


def read_trials(setup: Setup, trials: Sequence[FrozenTrial]) -> list[Tried]:
    """The trials with the curves that they wrote, in order.

    Raises:
        FileNotFoundError: a trial of the storage has no file in this directory.
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
    """The completed trials, sorted by validation loss."""
    return sorted((x for x in tried if x.state == "complete"), key=lambda x: x.loss)


def verdicts(tried: Sequence[Tried]) -> list[str]:
    """The :func:`verdict` of each completed trial; the state of any other."""
    best = best_first(tried)[0].curves
    return [verdict(x.curves, best) if x.state == "complete" else x.state for x in tried]


def keep_best(setup: Setup, tried: Sequence[Tried], keep: int) -> list[Tried]:
    """The ``keep`` best trials, best first. The weights of all others are deleted."""
    # An earlier run on the same storage may have kept fewer weights.
    left = [x for x in best_first(tried) if setup.file(x.values, "pt").exists()]
    kept = left[:keep]
    for file in {setup.file(x.values, "pt") for x in left} - {
        setup.file(x.values, "pt") for x in kept
    }:
        file.unlink()
    return kept


# ---- decoding ------------------------------------------------------------------------------------


def windowed(model: Transformer) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    """The model as a callable for ``generate``; its "cache" is the last ``context`` tokens."""

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
    """The share of distinct n-grams among all n-grams of NGRAM characters."""
    runs = [text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)]
    return len(set(runs)) / len(runs)


def mean_distinct_share(texts: Sequence[str]) -> float:
    """The mean of texts that must have the same length, because longer texts repeat more."""
    return sum(map(distinct_share, texts)) / len(texts)


def tune_decoding(
    model: Transformer, text: Text, prompt: str, *, length: int, trials: int, seed: int
) -> tuple[SamplingParams, float, float]:
    """Search for the parameters whose texts are as repetitive as the author's.

    Low temperatures give loops and high ones invented words: the share of distinct n-grams is
    below or above the author's.

    Returns:
        The parameters, the share in the texts drawn with them, and the author's share.
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
    """A line for each trial, with losses in nats per character."""
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
    """The best trial, the most underfitted and the most overfitted one, by title."""
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
    """Draw curves.png and trials.png, and return their paths.

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
    """The texts in columns, wrapped between words."""
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
    """The models' texts side by side as Markdown, with greedy and with tuned decoding."""
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
    """The options of the command line, checked."""
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
    """Run both searches and write the reports."""
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
