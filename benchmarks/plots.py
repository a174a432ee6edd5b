"""The pictures of a results file, each as PNG and SVG; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, COMPARED, RUNS
from benchmarks.inputs import AbsentError
from benchmarks.providers import PROVIDERS, TWO_THREADS
from benchmarks.report import ours
from benchmarks.suite import Result

#: What a sweep has on its horizontal axis, from a result.
AXES: dict[str, tuple[str, Callable[[Result], float]]] = {
    "vocab_size": ("vocabulary", lambda result: result.vocab_size),
    "rows": ("rows", lambda result: result.rows),
    "k": ("k", lambda result: CASES[result.case].params[0].top_k),
    "p": ("p", lambda result: CASES[result.case].params[0].top_p),
    "history_length": ("tokens of history", lambda result: CASES[result.case].history_length),
}
FORMATS = ("png", "svg")


def draw(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw every picture that the results suffice for; returns the files.

    Args:
        record: a results file's content.
        stem: what the files' names begin with.

    Raises:
        AbsentError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise AbsentError("pip install matplotlib draws the pictures") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "llm_sampling",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 9,
    }
    results = [
        result
        for result in map(Result.from_json, record["results"])
        if result.timing is not None and result.provider != TWO_THREADS
    ]
    files = []
    for name, figure in (
        ("sweeps", _sweeps(results)),
        ("speedups", _bars(results, limits=False)),
        ("limits", _bars(results, limits=True)),
    ):
        if figure is None:
            continue
        for kind in FORMATS:
            file = stem.with_name(f"{stem.name}-{name}.{kind}")
            figure.savefig(file, dpi=120, metadata={"Date": None} if kind == "svg" else None)
            files.append(file)
    return files


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    provider = PROVIDERS[name]
    if provider.module == "ours":
        return {"color": "black", "linewidth": 2.5, "marker": "o", "markersize": 3}
    limits = [other for other in names if PROVIDERS[other].is_limit]
    peers = [
        other
        for other in names
        if not PROVIDERS[other].is_limit and PROVIDERS[other].module != "ours"
    ]
    if provider.is_limit:
        return {"color": "grey", "linestyle": ("--", ":", "-.")[limits.index(name) % 3]}
    return {"color": f"C{peers.index(name) % 10}", "marker": "o", "markersize": 3}


def _sweeps(results: Sequence[Result]) -> Any:
    """Time over each swept parameter: a panel for each run and input, or run and case."""
    import matplotlib.pyplot as plt

    panels = []
    for run in RUNS.values():
        if not run.swept:
            continue
        moves_case = run.swept in ("k", "p", "history_length")
        for one in run.inputs if moves_case else run.cases:
            chosen = [
                result
                for result in results
                if (result.inputs == one if moves_case else result.case == one)
                and result.inputs in run.inputs
                and result.case in run.cases
                and result.rows in run.rows
                and result.vocab_size in run.vocab_sizes
            ]
            _, place = AXES[run.swept]
            if len({place(result) for result in chosen}) > 1:
                panels.append((run.swept, one, chosen))
    if not panels:
        return None
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 3.1 * lines + 0.7), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    names = list(dict.fromkeys(result.provider for result in results))
    handles = {}
    for axis, (swept, title, chosen) in zip(axes.flat, panels, strict=False):
        label, place = AXES[swept]
        for name in names:
            points = sorted(
                (place(result), result.timing.median)
                for result in chosen
                if result.provider == name and result.timing is not None
            )
            if points:
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True), label=name, **_style(name, names)
                )
        first = chosen[0]
        fixed = [] if swept == "vocab_size" else [f"V = {first.vocab_size:,}"]
        fixed += [] if swept == "rows" else [f"{first.rows} rows"]
        axis.set_title(f"{title}, {', '.join(fixed)}", fontsize=9)
        axis.set_xlabel(label)
        axis.set_yscale("log")
        if swept == "history_length":
            axis.set_xscale("symlog", linthresh=256)
            axis.set_xlim(left=0)
        elif swept != "p":
            axis.set_xscale("log", base=2)
    for line in axes:
        line[0].set_ylabel("µs per call")
    figure.legend(handles.values(), handles, loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.7 / (3.1 * lines + 0.7), 1, 1))
    return figure


def _chosen(results: Sequence[Result]) -> list[tuple[tuple[str, int, int], list[Result]]]:
    """The complete comparisons of 8 rows."""
    found = []
    for where in dict.fromkeys(result.where for result in results):
        group = [result for result in results if result.where == where and result.case in COMPARED]
        if where[2] == 8 and len({result.case for result in group}) == len(COMPARED):
            found.append((where, group))
    return found


def _bars(results: Sequence[Result], limits: bool) -> Any:
    """For each case, the peers' times as multiples of ours, or ours as multiples of the limits'."""
    import matplotlib.pyplot as plt

    chosen = _chosen(results)
    if not chosen:
        return None
    names = list(dict.fromkeys(result.provider for result in results))
    shown = [
        name
        for name in names
        if PROVIDERS[name].is_limit == limits and PROVIDERS[name].module != "ours"
    ]
    base = ours(results)
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(4.6 * len(chosen) + 1.5, 6.5), sharey=True, squeeze=False
    )
    height = 0.8 / len(shown)
    for axis, ((inputs, vocab_size, rows), group) in zip(axes.flat, chosen, strict=True):
        time = {
            (result.case, result.provider): result.timing.median
            for result in group
            if result.timing is not None
        }
        for index, name in enumerate(shown):
            at, values = [], []
            for line, case in enumerate(COMPARED):
                if (case, name) in time and (case, base) in time:
                    quotient = time[case, name] / time[case, base]
                    at.append(line + (index - (len(shown) - 1) / 2) * height)
                    values.append(1 / quotient if limits else quotient)
            style = _style(name, names)
            color = f"C{index}" if limits else style["color"]
            axis.barh(at, values, height, label=name, color=color)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{inputs}, V = {vocab_size:,}, {rows} rows", fontsize=9)
        axis.set_xscale("log")
    axes[0, 0].set_yticks(range(len(COMPARED)), COMPARED)
    axes[0, 0].invert_yaxis()
    what = f"time of {base} ÷ time of the limit" if limits else f"time ÷ time of {base}"
    figure.supxlabel(what, fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure
