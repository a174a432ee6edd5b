"""What each step does to one row of logits: the probabilities after it, and which tokens it cuts.

    model -> record -> logits, history -> explain -> Explanation -> rows, picture
                                       -> page: a file whose sliders do the same in a browser
    model -> compare -> texts, by decoding type

Every number is :mod:`llm_sampling.reference`'s; the page has a copy of its rules in JavaScript.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm_sampling import generation, reference
from llm_sampling.backends.base import SampleCall, raise_on_status
from llm_sampling.fields import OFF_VALUES
from llm_sampling.generation.models import LanguageModel
from llm_sampling.history import TokenHistory
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sample import make_call

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: After which there is a distribution, in order: the model's own, steps 2 to 6, 9 and 10, then one
#: filter each.
STAGES = ("raw", "penalties", "temperature", "top_k", "top_p", "min_p")

#: What cuts a token in a stage: it was at -inf, or the row is greedy, or a filter did.
CUTS = {
    "penalties": "-inf",
    "temperature": "greedy",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}

#: What :func:`picture` writes.
PICTURES = (".png", ".svg")

#: What the page has a slider for.
SETTINGS = tuple(name for name in OFF_VALUES if name not in ("logit_bias", "seed"))

_TEMPLATE = Path(__file__).parent.parent / "data" / "explain.html"
_DATA_MARK = "{{data}}"


@dataclass(frozen=True, eq=False)
class Explanation:
    """One row after each step. Tensors are ``(vocab_size,)`` in id order, on the logits' device.

    Attributes:
        params: what was asked for.
        logits: float64, the model's own.
        processed: float64, after bias and penalties, steps 2 to 6.
        order: int64, the ids from the best to the worst, step 7.
        probabilities: stage to float64. "raw" is the softmax of ``logits``; the others are step
            10's masses over their sum in what is kept so far, those of "penalties" at temperature
            1. Those of "min_p" are what :func:`~llm_sampling.sample` draws from.
        kept_after: stage to bool. A kept token may have probability 0: it is never drawn.
        cut_by: for each token a value of :data:`CUTS`, or None where it is kept to the end.
    """

    params: SamplingParams
    logits: Tensor
    processed: Tensor
    order: Tensor
    probabilities: Mapping[str, Tensor]
    kept_after: Mapping[str, Tensor]
    cut_by: tuple[str | None, ...]

    @property
    def kept(self) -> Tensor:
        """What is left after the last step."""
        return self.kept_after[STAGES[-1]]

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.logits.shape[0]


def explain(
    logits: Tensor, params: SamplingParams, *, history: TokenHistory | None = None
) -> Explanation:
    """What each step does to one row.

    Args:
        logits: ``(vocab_size,)``, float32, float16 or bfloat16.
        params: the row's parameters; the seed does not matter.
        history: of one row; needed where a penalty is on.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the row holds NaN or +inf, or leaves no candidate.

    Example:
        >>> explanation = explain(torch.tensor([2.0, 1.0, 0.0]), SamplingParams(top_k=2))
        >>> explanation.cut_by
        (None, None, 'top_k')
    """
    call = _checked(logits, params, history)
    x, _ = reference.processed_logits(call)
    own = call.logits[0].double()
    probabilities = {"raw": own.softmax(-1)}
    kept_after = {"raw": own > -torch.inf}
    # each stage is what the reference makes of the row while the later filters are off
    for position, stage in enumerate(STAGES[1:], 2):
        later: dict[str, Any] = {name: OFF_VALUES[name] for name in STAGES[position:]}
        so_far = BatchParams.from_list([replace(params, **later)], device=x.device)
        keep, mass = reference.kept_set(x, so_far)
        mass = torch.where(keep, mass, 0)[0]
        probabilities[stage] = mass.double() / mass.sum().double()
        kept_after[stage] = keep[0]
    return Explanation(
        params=params,
        logits=own,
        processed=x[0].double(),
        order=torch.sort(x[0], descending=True, stable=True).indices,
        probabilities=probabilities,
        kept_after=kept_after,
        cut_by=_cut_by(kept_after),
    )


def _checked(logits: Tensor, params: SamplingParams, history: TokenHistory | None) -> SampleCall:
    """The row as a call of one row; refused as :func:`~llm_sampling.sample` refuses it."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dim() != 1:
        raise ValueError(f"logits must have shape (vocab_size,), got {tuple(logits.shape)}")
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
    # not seeded: what would draw a seed changes the caller's generator
    call = make_call(logits[None], params, history=history, seeded=False)
    raise_on_status(reference.sample(call).status)
    return call


def _cut_by(kept_after: Mapping[str, Tensor]) -> tuple[str | None, ...]:
    names = (None, *CUTS.values())
    code = torch.zeros_like(kept_after["raw"], dtype=torch.int64)
    # the last that is written is the first that cut it
    for stage, name in reversed(CUTS.items()):
        code = torch.where(kept_after[stage], code, names.index(name))
    return tuple(names[i] for i in code.tolist())


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        token: its id.
        logit: the model's own.
        processed: the logit after bias and penalties.
        probabilities: stage to probability; 0 once it is cut.
        kept: whether it is left after the last step.
        cut_by: a value of :data:`CUTS`, or None where it is kept.
    """

    token: int
    logit: float
    processed: float
    probabilities: Mapping[str, float]
    kept: bool
    cut_by: str | None


def rows(explanation: Explanation, top: int = 20) -> list[Row]:
    """The ``top`` first tokens of the model's order and those of the order after the penalties.

    So there are at most ``2 * top``; they come in the order after the penalties, in which what
    is kept comes first.

    Raises:
        ValueError: ``top`` is not an integer >= 1.
    """
    _at_least_one("top", top)
    own = torch.sort(explanation.logits, descending=True, stable=True).indices[:top]
    shown = {*own.tolist(), *explanation.order[:top].tolist()}
    # a row's worst may be its model's best, so all of the order is looked through
    ids = [token for token in explanation.order.tolist() if token in shown]
    numbers = {stage: p[ids].tolist() for stage, p in explanation.probabilities.items()}
    return [
        Row(
            token=token,
            logit=logit,
            processed=processed,
            probabilities={stage: numbers[stage][line] for stage in STAGES},
            kept=explanation.cut_by[token] is None,
            cut_by=explanation.cut_by[token],
        )
        for line, (token, logit, processed) in enumerate(
            zip(
                ids,
                explanation.logits[ids].tolist(),
                explanation.processed[ids].tolist(),
                strict=True,
            )
        )
    ]


def record(
    language_model: LanguageModel, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
) -> tuple[Tensor, TokenHistory]:
    """The model's logits for the next token, and the history that the penalties look at.

    Args:
        language_model: the model; it is called once.
        prompt_ids: the prompt's token ids, at least one.
        output_ids: what has been generated since, which alone frequency and presence penalty count.

    Returns:
        float32 ``(vocab_size,)`` on the CPU, and a history of one row.

    Raises:
        ValueError: the ids are not ids of the model's vocabulary.
    """
    _check_ids("prompt_ids", prompt_ids, language_model.vocab_size)
    if len(output_ids) > 0:
        _check_ids("output_ids", output_ids, language_model.vocab_size)
    ids = [*prompt_ids, *output_ids]
    model = language_model.model
    options: dict[str, Any] = {"use_cache": False}
    # else a long prompt's logits take its length times the vocabulary
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids], device=model.device), **options)
    logits = output.logits[0, -1].to("cpu", torch.float32)
    return logits, TokenHistory.from_ids([list(prompt_ids)], [list(output_ids)], logits.shape[0])


def token_texts(language_model: LanguageModel) -> list[str]:
    """The text of every token of the vocabulary, with the space that it may begin with.

    What is no whole character is U+FFFD; an id without a token has no text.
    """
    tokenizer = language_model.tokenizer
    # A tokenizer may drop a space at the start of a text, so each token comes after a letter.
    letter: int = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode([letter], **options))
    pairs = [[letter, token] for token in range(language_model.vocab_size)]
    return [text[before:] for text in tokenizer.batch_decode(pairs, **options)]


def visible(text: str) -> str:
    """A token's text on one line: a space is ␣, what has no shape is escaped as in Python."""
    return "".join(
        "\N{OPEN BOX}"
        if c == " "
        else c
        if c.isprintable()
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def stage_label(stage: str, params: SamplingParams) -> str:
    """A stage in words, such as "top-p 0.9"."""
    if stage == "raw":
        return "model"
    if stage == "penalties":
        return "penalties" if params.logit_bias is None else "bias and penalties"
    if stage == "temperature" and is_greedy(params):
        return "greedy"
    value = getattr(params, stage)
    return f"{cut_label(stage)} {value if stage == 'top_k' else format(value, 'g')}"


def is_greedy(params: SamplingParams) -> bool:
    """Whether the temperature is 0 in float32."""
    return BatchParams.from_list([params]).all_greedy


def cut_label(cut_by: str) -> str:
    """A value of :data:`CUTS` in words."""
    return cut_by.replace("_", "-")


def changes(stage: str, params: SamplingParams) -> bool:
    """Whether a stage may change anything: what is off does not, nor a filter of a greedy row."""
    if stage == "raw":
        return True
    if stage == "penalties":
        return params.needs_history or bool(params.logit_bias)
    if stage != "temperature" and is_greedy(params):
        return False
    return bool(getattr(params, stage) != OFF_VALUES[stage])


# ---- the picture ---------------------------------------------------------------------------------

# of the palette of Okabe and Ito, which the colour-blind can tell apart; the cut are hatched too
_KEPT, _CUT, _OTHERS = "#0072B2", "#D55E00", "#86B9DA"
_INK, _FAINT, _LINE = "#222222", "#6f6f6f", "#bbbbbb"

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "llm_sampling",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "grid.color": "#ebebeb",
    "hatch.linewidth": 0.8,
    "xtick.color": _FAINT,
    "xtick.labelsize": 8,
    "xtick.bottom": False,
    "ytick.color": _FAINT,
    "ytick.left": False,
}
_CUT_BAR: dict[str, Any] = {"facecolor": "#f6f6f6", "edgecolor": _CUT, "hatch": "/////"}


def picture(
    explanation: Explanation,
    texts: Sequence[str],
    path: str | Path,
    top: int = 20,
    *,
    title: str = "",
) -> None:
    """Draw a panel of bars for each step that is on, the same bytes for the same input.

    Args:
        explanation: the row.
        texts: each token's text, ``vocab_size`` of them.
        path: where to; the suffix says what, .png or .svg.
        top: which tokens, as for :func:`rows`.
        title: such as the prompt.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(f"path must end in {' or '.join(PICTURES)}, got {str(path)!r}")
    _check_text("title", title)
    _check_texts(texts, explanation.vocab_size)
    lines = rows(explanation, top)
    stages = [stage for stage in STAGES if changes(stage, explanation.params)]
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a picture needs matplotlib: pip install matplotlib") from error
    with style.context(["default", _STYLE]):  # nobody's own style
        size = (max(7.4, 1.7 + 2.2 * len(stages)), 1.7 + 0.225 * (len(lines) + 1))  # the legend's
        figure = Figure(figsize=size, layout="constrained")
        _draw(figure, explanation, texts, lines, stages, title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def _draw(
    figure: Figure,
    explanation: Explanation,
    texts: Sequence[str],
    lines: list[Row],
    stages: list[str],
    title: str,
) -> None:
    panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    for panel, stage, before in zip(panels, stages, ["raw", *stages], strict=False):
        _draw_panel(panel, explanation, lines, stage, before)
    longest = max(panel.dataLim.x1 for panel in panels)
    panels[0].set_xlim(0, longest * 1.45)  # room for the words beside the longest bar
    ticks = [p for p in panels[0].get_xticks() if 0 <= p <= longest * 1.001]
    panels[0].set_xticks(ticks, [f"{100 * p:.3g}%" for p in ticks])
    names = [_label(visible(texts[line.token]), 18) or f"token {line.token}" for line in lines]
    left_out = explanation.vocab_size - len(lines)
    if left_out:
        names.append(f"{left_out:,} other{'' if left_out == 1 else 's'}")
    panels[0].set_yticks(range(len(names)), names, parse_math=False)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for tick, line in zip(panels[0].get_yticklabels(), lines, strict=False):
        if line.kept:
            tick.set_color(_INK)
    if title:
        shown = _label(" ".join(map(visible, title.split(" "))), 26 * len(stages))
        figure.suptitle(shown, x=0.01, ha="left", size=11, parse_math=False)
    _draw_legend(figure, has_steps=len(stages) > 1)


def _draw_panel(
    panel: Axes, explanation: Explanation, lines: list[Row], stage: str, before: str
) -> None:
    """The bars after one step; hatched what it cut, as long as it was before."""
    kept, kept_before = explanation.kept_after[stage], explanation.kept_after[before]
    for y, line in enumerate(lines):
        p, own = line.probabilities[stage], line.probabilities["raw"]
        if kept[line.token]:
            panel.barh(y, p, 0.7, color=_KEPT)
            words, color = _percent(p), _INK
        elif kept_before[line.token]:
            p = line.probabilities[before]
            panel.barh(y, p, 0.7, linewidth=0.6, **_CUT_BAR)
            words, color = f"cut by {cut_label(line.cut_by or '')}", _CUT
        else:
            continue
        if stage != "raw":
            panel.plot([own, own], [y - 0.4, y + 0.4], color=_INK, linewidth=0.9)
        _write(panel, max(p, own), y, words, color)
    count = int(kept.sum())
    if count > sum(bool(kept[line.token]) for line in lines):
        p = max(0.0, 1 - sum(line.probabilities[stage] for line in lines))
        panel.barh(len(lines), p, 0.7, color=_OTHERS)
        _write(panel, p, len(lines), _percent(p), _INK)
    if len(lines) < explanation.vocab_size:
        panel.axhline(len(lines) - 0.5, color=_LINE, linewidth=0.8)
    panel.set_title(stage_label(stage, explanation.params), loc="left", weight="bold", pad=16)
    label = f"{count:,} token{'' if count == 1 else 's'}"
    panel.text(0, 1, label, transform=panel.transAxes, va="bottom", size=8, color=_FAINT)


def _write(panel: Axes, x: float, y: float, words: str, color: str) -> None:
    panel.annotate(
        words, (x, y), (3, 0), textcoords="offset points", va="center", size=7, color=color
    )


def _draw_legend(figure: Figure, has_steps: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=_KEPT, label="probability after the step")]
    if has_steps:
        handles += [
            Patch(label="cut by the step, as it was before", linewidth=0.6, **_CUT_BAR),
            Line2D([], [], color=_INK, marker="|", linestyle="none", markersize=9),
        ]
        handles[-1].set_label("the model's own probability")
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8
    )


def _percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.0005 else "< 0.1%"


def _label(text: str, longest: int) -> str:
    """A text as far as there is room, what the font has no shape for escaped as in Python."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    has = get_font(findfont(FontProperties())).get_char_index
    text = "".join(c if has(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# ---- the page ------------------------------------------------------------------------------------


def page(
    logits: Tensor,
    texts: Sequence[str],
    params: SamplingParams,
    history: TokenHistory | None = None,
    prompt: str = "",
) -> str:
    """One HTML file, complete in itself, whose sliders recompute the row in the browser.

    It holds the row's float32 logits and follows docs/semantics.md to the bit, so what it keeps is
    what :func:`~llm_sampling.sample` keeps.

    Args:
        logits: as for :func:`explain`.
        texts: each token's text, ``vocab_size`` of them.
        params: where the sliders stand at first; its bias applies to all they say.
        history: of one row, for the penalties; without one they change nothing.
        prompt: shown above.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the row cannot be sampled from.
    """
    call = _checked(logits, params, history)
    _check_texts(texts, call.logits.shape[1])
    _check_text("prompt", prompt)
    batch = call.batch
    bias = zip(batch.logit_bias_ids.tolist(), batch.logit_bias_values.tolist(), strict=True)
    seen, counts = _history_of_one(history)
    data = {
        "prompt": prompt,
        "logits": base64.b64encode(
            call.logits[0].to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
        ).decode("ascii"),
        "texts": [visible(text) for text in texts],
        "settings": {name: getattr(params, name) for name in SETTINGS},
        # inf where min-p is off, which JSON does not have
        "min_p_cut": None if batch.min_p_cut.isinf().item() else batch.min_p_cut.item(),
        "bias": [[token, value] for token, value in bias if token < len(texts)],
        "seen": seen,
        "counts": counts,
    }
    # ASCII without these three: nothing in it can end the script, start a comment or a line
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for c in "<>&":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return _TEMPLATE.read_text(encoding="utf-8").replace(_DATA_MARK, text, 1)


def _history_of_one(history: TokenHistory | None) -> tuple[list[int], list[list[int]]]:
    """The ids seen in prompt or output, and the output's ids with how often."""
    if history is None:
        return [], []
    slot = int(history.slots[0])
    words = history.seen[slot].cpu().numpy().astype("<i4")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    count = history.counts[slot].cpu()
    produced = count.nonzero()[:, 0]
    return bits.nonzero()[0].tolist(), torch.stack([produced, count[produced]], -1).tolist()


# ---- decoding types ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text that the model went on with.

    Attributes:
        decoding: "greedy", "temperature", "top_k", "top_p", "min_p" or "all".
        params: what it was drawn with.
        text: what follows the prompt.
    """

    decoding: str
    params: SamplingParams
    text: str


def decoding_types(params: SamplingParams) -> dict[str, SamplingParams]:
    """Greedy; the temperature alone; with it each filter that is on, alone; and all of ``params``.

    The last is left out where it is one of the others. At temperature 0 a filter does nothing.
    """
    types = {"greedy": SamplingParams(temperature=0)}
    if not is_greedy(params):
        alone = SamplingParams(temperature=params.temperature, seed=params.seed)
        types["temperature"] = alone
        for name in ("top_k", "top_p", "min_p"):
            if changes(name, params):
                filtered: dict[str, Any] = {name: getattr(params, name)}
                types[name] = replace(
                    alone, min_tokens_to_keep=params.min_tokens_to_keep, **filtered
                )
    is_other = not is_greedy(params) or changes("penalties", params)
    if is_other and params not in types.values():
        types["all"] = params
    return types


def compare(
    language_model: LanguageModel,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    n: int = 4,
    max_new_tokens: int = 40,
    backend: str = "auto",
) -> list[Continuation]:
    """What the model goes on with by each of :func:`decoding_types`, all in one batch.

    Args:
        language_model: the model.
        prompt_ids: at least one id.
        params: the decoding types are made of these; with a seed the texts are the same each time.
        n: so many texts of each type but greedy, from seed, seed + 1, ...: texts of one seed are
            drawn by the same random bits in all types.
        max_new_tokens: the length at which a text that does not end is cut off.
        backend: what draws the tokens, as for :class:`~llm_sampling.Sampler`.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the model's logits cannot be sampled from.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
    _at_least_one("n", n)
    _check_ids("prompt_ids", prompt_ids, language_model.vocab_size)
    drawn = [
        (name, generation.seeded(of_type, i))
        for name, of_type in decoding_types(params).items()
        for i in range(1 if is_greedy(of_type) else n)
    ]
    done = generation.generate(
        language_model.model,
        [list(prompt_ids)] * len(drawn),
        [one for _, one in drawn],
        tokenizer=language_model.tokenizer,
        vocab_size=language_model.vocab_size,
        max_new_tokens=max_new_tokens,
        eos_token_ids=language_model.eos_token_ids,
        backend=backend,
    )
    return [
        Continuation(name, one, completion.text or "")
        for (name, one), completion in zip(drawn, done, strict=True)
    ]


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_ids(name: str, ids: object, vocab_size: int) -> None:
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or not ids:
        raise ValueError(f"{name} must be a sequence of at least one token id, got {ids!r}")
    for token in ids:
        is_integer = isinstance(token, int) and not isinstance(token, bool)
        if not is_integer or not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold integers in 0 .. {vocab_size - 1}, got {token!r}")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r}")


def _check_texts(texts: object, vocab_size: int) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, (str, bytes)):
        raise ValueError(f"texts must be a sequence of texts, got {type(texts).__name__}")
    if len(texts) != vocab_size:
        raise ValueError(f"texts must have one for each of {vocab_size} tokens, got {len(texts)}")
    for token, text in enumerate(texts):
        _check_text(f"texts[{token}]", text)
