"""A report of a search: its history, the parameters' importance and values, the Pareto front.

    TuningResult -> Optuna's plots (matplotlib) -> PNG files -> one HTML page that embeds them

Needs the extra ``tune``; optuna and matplotlib are imported when a report is written.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_sampling.tools import files
from llm_sampling.tools.tuning.search import TuningResult

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ccc; }
tr.best { background: #fff3bf; color: #000; }
code { background: #8882; padding: 0.1rem 0.3rem; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } }
"""


def write_report(
    result: TuningResult, folder: str | Path, metrics: Sequence[str], best_line: str = ""
) -> list[Path]:
    """Write the pictures of a search as PNG and one self-contained page, ``report.html``.

    Args:
        result: the result of :func:`llm_sampling.tools.tuning.tune`.
        folder: the folder to write to, created if it does not exist. Existing files of the same
            names are replaced; where one is a symbolic link, the link is, and not its target.
        metrics: a name for each of the objective's numbers, in their order.
        best_line: how to use the best values, shown on the page.

    Returns:
        The files: history.png, importance.png, slice.png, pareto.png and report.html. With several
        metrics the first three are written for each, as ``history-NAME.png`` and so on. Importance
        needs two trials with different values; the Pareto front needs two or three metrics.

    Raises:
        ValueError: the number of names is not that of the objective's numbers.
        OSError: a file cannot be written.
    """
    directions = result.study.directions
    if len(metrics) != len(directions):
        raise ValueError(
            f"metrics must have a name for each of {len(directions)} numbers, got {list(metrics)}"
        )
    folder = Path(folder)
    files.check_folder(folder, report_names(metrics))
    written, sections = [], []
    for name, picture, title in _pictures(result, metrics):
        path = folder / f"{name}.png"
        with files.replacing(path, links=True) as new:
            new.write_bytes(picture)
        written.append(path)
        encoded = base64.b64encode(picture).decode("ascii")
        sections.append(
            f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{encoded}">'
        )
    page = folder / "report.html"
    with files.replacing(page, links=True) as new:
        new.write_text(_page(result, metrics, best_line, sections), encoding="utf-8")
    return [*written, page]


def report_names(metrics: Sequence[str]) -> Iterator[str]:
    """The names of the files that :func:`write_report` may write."""
    for metric in metrics:
        for kind in ("history", "importance", "slice"):
            yield f"{kind}-{metric}.png" if len(metrics) > 1 else f"{kind}.png"
    yield from ("pareto.png", "report.html")


def _pictures(result: TuningResult, metrics: Sequence[str]) -> Iterator[tuple[str, bytes, str]]:
    """Each picture's name, its PNG and its title."""
    from optuna.visualization import matplotlib as plots

    study = result.study
    several = len(metrics) > 1
    for index, metric in enumerate(metrics):
        sign = 1 if study.directions[index].name == "MINIMIZE" else -1

        def value(trial: FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        def cost(trial: FrozenTrial, index: int = index, sign: int = sign) -> float:
            return sign * float(trial.values[index])  # plot_param_importances minimises

        of_value: dict[str, Any] = {"target_name": metric}
        of_cost = dict(of_value)
        if several:
            of_value["target"], of_cost["target"] = value, cost
        ending = f"-{metric}" if several else ""
        with _drawing() as draw:
            title = f"History of {metric}"
            plots.plot_optimization_history(study, **of_value)
            yield f"history{ending}", draw(title), title
        if _importances_exist(result):
            with _drawing() as draw:
                title = f"What {metric} depends on"
                plots.plot_param_importances(study, **of_cost)
                yield f"importance{ending}", draw(title), title
        with _drawing() as draw:
            title = f"{metric} by parameter"
            plots.plot_slice(study, **of_value)
            yield f"slice{ending}", draw(title), title
    if len(metrics) in (2, 3):
        with _drawing() as draw:
            title = "Pareto front"
            plots.plot_pareto_front(study, target_names=list(metrics))
            yield "pareto", draw(title), title


def _importances_exist(result: TuningResult) -> bool:
    """Whether some parameter has different values in two completed trials."""
    params = [trial.params for trial in result.trials if trial.state.name == "COMPLETE"]
    return any(len({one[name] for one in params}) > 1 for name in result.best_params)


@contextlib.contextmanager
def _drawing() -> Iterator[Any]:
    """Gives a function that returns as PNG what was plotted in this block, under a title."""
    import matplotlib
    from matplotlib import pyplot
    from optuna.exceptions import ExperimentalWarning

    def draw(title: str) -> bytes:
        figure = pyplot.gcf()
        if len(figure.axes) == 1:
            figure.axes[0].set_title("", loc="left")  # removes Optuna's own title
            figure.axes[0].set_title(title)
        else:
            figure.suptitle(title)
        written = io.BytesIO()
        # Without matplotlib's version the same search gives the same bytes.
        figure.savefig(
            written, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        )
        return written.getvalue()

    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    try:
        with pyplot.style.context("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)  # about few trials
            yield draw
    finally:
        pyplot.close()  # closes this block's figure, the current one
        pyplot.switch_backend(before)


def _page(
    result: TuningResult, metrics: Sequence[str], best_line: str, sections: Sequence[str]
) -> str:
    goals = [
        f"{metric} ({direction.name.lower()})"
        for metric, direction in zip(metrics, result.study.directions, strict=True)
    ]
    best = _cells(dict(zip(metrics, result.best_values, strict=True)))
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>llm-sampling tune</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>A search for sampling parameters</h1>",
        f"<p>{len(result.trials)} trials for {html.escape(', '.join(goals))}.</p>",
        f"<p>Best: <code>{html.escape(best_line or str(result.best_params))}</code></p>",
        f"<table><tr>{''.join(f'<th>{html.escape(m)}</th>' for m in metrics)}</tr>",
        f"<tr>{best}</tr></table>",
        *sections,
        "<h2>All trials</h2>",
        *_trial_table(result, metrics),
        "</body></html>",
        "",
    ]
    return "\n".join(lines)


def _trial_table(result: TuningResult, metrics: Sequence[str]) -> list[str]:
    names = list(result.best_params)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["trial", *names, *metrics, "state"])
    lines = ["<table>", f"<tr>{head}</tr>"]
    for number, trial in enumerate(result.trials):
        values = trial.values or [None] * len(metrics)
        is_best = trial.params == result.best_params and tuple(values) == result.best_values
        row = {
            "trial": number,
            **{name: trial.params.get(name) for name in names},
            **{f"= {m}": value for m, value in zip(metrics, values, strict=False)},
            "state": trial.state.name.lower(),
        }
        lines.append(f"<tr{' class=best' if is_best else ''}>{_cells(row)}</tr>")
    return [*lines, "</table>"]


def _cells(values: Mapping[str, object]) -> str:
    return "".join(f"<td>{html.escape(short(value))}</td>" for value in values.values())


def short(value: object) -> str:
    """A trial's value with four digits; "" for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
