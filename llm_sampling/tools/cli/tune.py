"""``llm-sampling tune``: search for the sampling parameters that suit a language model best.

options -> TuneRequest (checked) -> Running.load -> tuning.tune -> report, best options
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_sampling import SamplingParams
from llm_sampling.tools import files, tuning
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.options import (
    INTEGER,
    NUMBER,
    check_texts,
    request_of,
    running,
    running_options,
    text,
)
from llm_sampling.tools.cli.running import Running
from llm_sampling.tools.tuning.report import report_names, short
from llm_sampling.tools.tuning.resume import check_storage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.console import Console
    from rich.table import Table

    from llm_sampling.tools.cli.options import Commands

#: The number of trials if neither it nor a timeout is given and the method is not "grid".
DEFAULT_TRIALS = 40
#: How many trials the table on the terminal shows, the last ones.
SHOWN_TRIALS = 12


@dataclass(frozen=True)
class TuneRequest:
    """The options of ``tune``, checked without loading the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    space: tuning.Space
    metrics: tuple[str, ...]
    method: Any
    n_trials: int | None
    timeout: float | None
    texts: int
    max_new_tokens: int
    seed: int
    storage: str | None
    study_name: str
    out: Path
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        tuning.check_search(
            self.space,
            self.method,
            n_trials=self.n_trials,
            seed=self.seed,
            storage=self.storage,
            study_name=self.study_name,
            timeout=self.timeout,
        )
        SamplingParams(seed=self.seed)
        check_texts("texts", self.texts)
        tuning.check_objective(self.metrics, self.space, self.texts, self.max_new_tokens)
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise ValueError(f"out must be a directory, got {str(self.out)!r}")


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "tune",
        help="Search for the sampling parameters that suit a language model best.",
        description="Search for the sampling parameters that suit a language model best.",
        parents=[running_options()],
    )
    add = parser.add_argument
    add("more_space", nargs="*", type=text, metavar="NAME=VALUES", help="More of --space.")
    add(
        "--space",
        action="append",
        type=text,
        default=[],
        metavar="NAME=VALUES",
        help="What is searched: LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP or VALUE,VALUE,...",
    )
    add(
        "--objective",
        action="append",
        default=[],
        metavar="NAME",
        help=f"What is tuned for, of {', '.join(tuning.METRICS)}; several give a Pareto front. "
        "Default: distance.",
    )
    add(
        "--method",
        default="bayesian",
        metavar="NAME",
        help=f"The method: {', '.join(tuning.METHODS)}; grid takes only lists.",
    )
    add("--trials", **INTEGER, help=f"How many trials. Default: {DEFAULT_TRIALS}; with grid all.")
    add("--timeout", **NUMBER, help="Begin no trial after this many seconds.")
    add("--texts", **INTEGER, default=8, help="How many texts in each trial.")
    add("--max-new-tokens", **INTEGER, default=64, help="The length of each text, in tokens.")
    add("--seed", **INTEGER, default=0, help="The same seed gives the same search.")
    add(
        "--storage",
        metavar="URL",
        help="Keep the search there, as sqlite:///tuning.db, and go on with it.",
    )
    add(
        "--study-name",
        type=text,
        default="decoding",
        metavar="NAME",
        help="The search's name in the storage.",
    )
    add(
        "--out",
        type=Path,
        default=Path("tuning"),
        metavar="DIR",
        help="Where the pictures and report.html go.",
    )
    parser.set_defaults(make_request=make_request, run=run)


def make_request(options: argparse.Namespace) -> TuneRequest:
    """The command's options, checked."""
    console.require("tune", console.TUNE_PACKAGES)
    n_trials = options.trials
    if n_trials is None and options.method != "grid" and options.timeout is None:
        n_trials = DEFAULT_TRIALS
    return request_of(
        TuneRequest,
        options,
        space=tuning.space_from_text([*options.space, *options.more_space]),
        metrics=tuple(options.objective or ["distance"]),
        n_trials=n_trials,
        on=running(options),
    )


def run(request: TuneRequest) -> int:
    """Search, write the report and print the best values as options; the exit code."""
    # Before the search, which takes long.
    with console.writing_files(console.EXIT_BAD_VALUE):
        files.check_folder(request.out, report_names(request.metrics))
    if request.storage is not None:
        try:
            check_storage(request.storage)
        except ValueError as error:
            raise console.CommandError(str(error), console.EXIT_BAD_VALUE) from error
        except RuntimeError as error:
            raise console.CommandError(str(error), console.EXIT_FAILED) from error
    messages = console.messages()
    language_model = request.on.load(messages)
    try:
        objective = tuning.ModelObjective(
            language_model,
            request.metrics,
            texts=request.texts,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            backend=request.on.backend,
        )
        with _trials_shown(request, messages) as show:
            result = tuning.tune(
                objective,
                request.space,
                request.method,
                n_trials=request.n_trials,
                seed=request.seed,
                storage=request.storage,
                study_name=request.study_name,
                timeout=request.timeout,
                directions=objective.directions,
                show_progress=False,
                callback=show,
            )
    except KeyboardInterrupt:
        if request.storage is not None:
            messages.print(f"the same command goes on from {request.storage}", markup=False)
        raise
    except ValueError as error:
        raise console.CommandError(str(error), console.EXIT_BAD_VALUE) from error
    except RuntimeError as error:
        raise console.CommandError(str(error), console.EXIT_FAILED) from error
    best_line = _as_options(result.best_params)
    usage = f"llm-sampling generate {best_line}"
    with console.writing_files(console.EXIT_FAILED):
        written = tuning.write_report(result, request.out, request.metrics, usage)
    found = dict(zip(request.metrics, result.best_values, strict=True))
    messages.print(f"best of {len(result.trials)} trials: {_named(found)}", markup=False)
    messages.print(f"{len(written)} files in {request.out}", markup=False, soft_wrap=True)
    console.write(f"{best_line}\n")
    return 0


def _as_options(values: Mapping[str, Any]) -> str:
    """The values as options of ``generate``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


@contextmanager
def _trials_shown(
    request: TuneRequest, messages: Console
) -> Iterator[Callable[[FrozenTrial], None]]:
    """Give a function that shows a trial: in a table on a terminal, else as a plain line."""
    from rich.live import Live

    trials: list[FrozenTrial] = []
    if not messages.is_terminal:

        def write(trial: FrozenTrial) -> None:
            trials.append(trial)
            values = dict(zip(request.metrics, trial.values or (), strict=False))
            line = f"trial {len(trials)}: {_named(trial.params)}: {_named(values) or 'failed'}"
            messages.print(line, markup=False, soft_wrap=True)

        yield write
        return
    live = Live(_trial_table(request, trials), console=messages, auto_refresh=False)

    def draw(trial: FrozenTrial) -> None:
        trials.append(trial)
        live.update(_trial_table(request, trials), refresh=True)

    with console.shown(live):
        live.refresh()
        yield draw


def _trial_table(request: TuneRequest, trials: Sequence[FrozenTrial]) -> Table:
    """The last trials; the best value of each metric so far is bold and green."""
    from rich.table import Table

    wanted = "" if request.n_trials is None else f" of {request.n_trials}"
    table = Table(title=f"{len(trials)}{wanted} trials", title_justify="left", box=None)
    for name in ("trial", *request.space, *request.metrics):
        table.add_column(name, justify="right")
    best = _best_by_metric(request, trials)
    first = max(0, len(trials) - SHOWN_TRIALS)
    for number, trial in enumerate(trials[first:], first + 1):
        values = [short(value) for value in trial.values or ()]
        marked = [
            f"[bold green]{value}[/]" if trial is best[column] else value
            for column, value in enumerate(values)
        ]
        params = [short(trial.params[name]) for name in request.space]
        table.add_row(str(number), *params, *(marked or ["failed"]))
    return table


def _best_by_metric(
    request: TuneRequest, trials: Sequence[FrozenTrial]
) -> list[FrozenTrial | None]:
    """For each metric the trial that has its best value so far."""
    done = [trial for trial in trials if trial.values]
    best: list[FrozenTrial | None] = []
    for column, name in enumerate(request.metrics):
        sign = 1 if tuning.METRICS[name].direction == "minimize" else -1
        best.append(
            min(done, key=lambda t, c=column, s=sign: s * t.values[c], default=None)  # type: ignore[misc]
        )
    return best
