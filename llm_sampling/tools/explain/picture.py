"""The steps of one row as bar charts, drawn by matplotlib, which is imported when it is needed.

Explanation -> rows -> a panel of bars for each step -> .png or .svg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_sampling.tools.explain.steps import (
    STAGES,
    Explanation,
    Row,
    changes,
    check_text,
    check_texts,
    cut_label,
    list_label,
    rows,
    stage_label,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The file types that :func:`picture` can write.
PICTURES = (".png", ".svg")

# Okabe and Ito's palette, whose colours the colour-blind can tell apart. Cut bars are also hatched.
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
    """Draw a panel of bars for each step that is on. The same input gives the same bytes.

    Args:
        explanation: the row.
        texts: the text of each token, ``vocab_size`` of them.
        path: the file to write; its suffix, .png or .svg, chooses the type.
        top: how many tokens to show, as in :func:`~llm_sampling.tools.explain.rows`.
        title: the title, such as the prompt.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = check_suffix("path", path)
    check_text("title", title)
    check_texts(texts, explanation.vocab_size)
    lines = rows(explanation, top)
    stages = [stage for stage in STAGES if changes(stage, explanation.params)]
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a picture needs matplotlib: pip install matplotlib") from error
    with style.context(["default", _STYLE]):  # ignores the user's own style
        size = (
            max(7.4, 1.7 + 2.2 * len(stages)),
            1.7 + 0.225 * (len(lines) + 1),
        )  # + 1: the legend
        figure = Figure(figsize=size, layout="constrained")
        _draw(figure, explanation, texts, lines, stages, title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def check_suffix(name: str, path: Path) -> str:
    """The suffix in lower case; a ValueError unless :func:`picture` can write such a file."""
    suffix = path.suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(f"{name} must end in {' or '.join(PICTURES)}, got {str(path)!r}")
    return suffix


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
    panels[0].set_xlim(0, longest * 1.45)  # leaves room for the label beside the longest bar
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
    """Draw the bars after one step; a token that it cuts has a hatched bar of its former length."""
    kept, kept_before = explanation.kept_after[stage], explanation.kept_after[before]
    for y, line in enumerate(lines):
        p, own = line.probabilities[stage], line.probabilities["raw"]
        if kept[line.token]:
            panel.barh(y, p, 0.7, color=_KEPT)
            words, color = _percent(p), _INK
            if stage == "penalties" and line.reasons:
                words = f"{words}, {list_label(line.reasons)}"
        elif kept_before[line.token]:
            p = line.probabilities[before]
            panel.barh(y, p, 0.7, linewidth=0.6, **_CUT_BAR)
            words, color = f"cut by {cut_label(line.cut_by or '')}", _CUT
            if stage == "penalties" and line.reasons:
                words = list_label(line.reasons)
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
    """The text, at most ``longest`` characters; those that the font lacks are escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    has = get_font(findfont(FontProperties())).get_char_index
    text = "".join(c if has(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
