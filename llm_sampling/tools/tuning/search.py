"""A random, grid or Bayesian search by Optuna that is resumable and reproducible.

    space -> checked -> Optuna's study -> objective(values) -> TuningResult

The objective may be anything that gives a number: a model's decoding
(:mod:`llm_sampling.tools.tuning.objectives`), its training (examples/tune_training.py) or a plain
function. Needs the extra ``tune``; optuna is imported when a search begins.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import numbers
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from llm_sampling import checks
from llm_sampling.tools.tuning.resume import (
    INTERRUPTED,
    finished_trials,
    locked,
    match_search,
    requeue_interrupted,
    sampler_by_index,
    sqlite_file,
)
from llm_sampling.tools.tuning.space import (
    CheckedSpace,
    Space,
    check_params,
    checked_space,
    distribution,
)

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

#: How the next trial is chosen: see ``method`` of :func:`tune`.
Method = Literal["random", "grid", "bayesian", "gp"]
#: What is better.
Direction = Literal["minimize", "maximize"]
Values: TypeAlias = "float | Sequence[float]"
#: A function of a trial's values, or a generator function that yields intermediate results.
Objective: TypeAlias = "Callable[[dict[str, Any]], Values | Generator[float, None, float | None]]"

METHODS: tuple[Method, ...] = ("random", "grid", "bayesian", "gp")
DIRECTIONS: tuple[Direction, ...] = ("minimize", "maximize")

_INSTALL = "pip install 'llm-sampling[tune]'"


@dataclass(frozen=True)
class TuningResult:
    """The result of a search.

    Attributes:
        best_params: the values of the best trial. With several objectives, that of the Pareto
            front that is nearest to the ideal point, which has the best value of each objective;
            every objective is scaled to 0 .. 1 on the front.
        best_values: what the objective returned for them, one number per direction.
        trials: the trials, in order, as Optuna's FrozenTrial: ``params``, ``values``, ``state``
            (COMPLETE, PRUNED, or FAIL if the objective returned NaN). Interrupted trials are not
            among them: they were run again.
        study: Optuna's study.
    """

    best_params: dict[str, Any]
    best_values: tuple[float, ...]
    trials: list[FrozenTrial]
    study: optuna.Study

    @property
    def pareto_front(self) -> list[FrozenTrial]:
        """The trials that no other trial dominates."""
        return list(self.study.best_trials)


def tune(
    objective: Objective,
    space: Space,
    method: Method = "bayesian",
    *,
    n_trials: int | None = None,
    seed: int | None = None,
    storage: str | None = None,
    study_name: str = "llm_sampling",
    timeout: float | None = None,
    n_jobs: int = 1,
    direction: Direction = "minimize",
    directions: Sequence[Direction] | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    show_progress: bool = True,
    callback: Callable[[FrozenTrial], None] | None = None,
) -> TuningResult:
    """Search ``space`` for the values at which ``objective`` is best.

    With the same seed and ``n_jobs=1`` a search always tries the same values, even if it is
    interrupted and resumed from its storage: each trial's random numbers follow from the seed and
    the trial's index.

    Args:
        objective: called with a dict that has a value for each name of the space. It returns one
            number, or one for each of ``directions``. If it is a generator function, each number
            that it yields is an intermediate result, after which ``pruner`` may end the trial; its
            return value counts, or the last number if that is None. NaN marks a trial as failed.
            An exception ends the search.
        space: by name, a :class:`Range` or a list of choices, each None, a bool, a number or a
            string. Values of a field of SamplingParams must be valid for it; other names are free.
        method: "random"; "grid", all combinations, for which every name needs a list; "bayesian",
            Optuna's tree-structured Parzen estimator; "gp", a Gaussian process, which needs scipy.
        n_trials: stop when this many trials are finished, including those in the storage. None: no
            limit except ``timeout``, or for "grid" the whole grid.
        seed: an integer >= 0. None: a new one, or that of the study in the storage.
        storage: a URL such as "sqlite:///tuning.db"; None keeps the study in memory. A stored
            study is resumed: its finished trials count, and interrupted ones are run again. Only
            one process at a time may use an SQLite file.
        study_name: the study's name in the storage.
        timeout: seconds, after which no new trial starts.
        n_jobs: how many threads run trials in parallel. With more than one, what the Bayesian
            methods try depends on which trial finishes first.
        direction: "minimize" or "maximize".
        directions: one for each number that the objective returns; instead of ``direction``.
        pruner: one of ``optuna.pruners``; the default is the median pruner.
        show_progress: whether to draw a progress bar on stderr.
        callback: called with each trial when it is finished.

    Raises:
        ValueError: before any trial, if an argument is out of its range, a value of the space
            breaks a rule of SamplingParams, or the storage holds another search of this name.
        ModuleNotFoundError: optuna, or scipy for "gp", is not installed.
        RuntimeError: another process uses the storage, or no trial gave a number.

    Example:
        >>> result = tune(lambda values: (values["x"] - 2) ** 2, {"x": Range(0.0, 9.0)}, n_trials=9)
        >>> result.best_params
    """
    wanted = _directions(direction, directions)
    checked = check_search(
        space,
        method,
        n_trials=n_trials,
        seed=seed,
        storage=storage,
        study_name=study_name,
        timeout=timeout,
        n_jobs=n_jobs,
    )
    import optuna

    distributions = {name: distribution(name, values) for name, values in checked.items()}
    grid_size = math.prod(len(values) for values in checked.values() if isinstance(values, list))
    if method == "grid":
        n_trials = grid_size if n_trials is None else min(n_trials, grid_size)

    with locked(storage), _quiet():
        study = optuna.create_study(
            storage=storage,
            study_name=study_name,
            directions=list(wanted),
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if pruner is None else pruner,
        )
        seed = match_search(study, checked, method, wanted, seed)
        requeue_interrupted(study)
        study.sampler = sampler_by_index(_sampler_maker(method, checked, seed))
        done = len(finished_trials(study))
        if n_trials is None or done < n_trials:
            study.optimize(
                _optuna_objective(objective, distributions, len(wanted)),
                n_trials=None if n_trials is None else n_trials - done,
                timeout=timeout,
                n_jobs=n_jobs,
                callbacks=[] if callback is None else [lambda study, trial: callback(trial)],
                show_progress_bar=show_progress,
            )
        trials = finished_trials(study)
        best = _best(study)
    if best is None:
        raise RuntimeError(f"no trial of {len(trials)} gave a number")
    return TuningResult(dict(best.params), tuple(best.values), trials, study)


def check_search(
    space: Space,
    method: Method = "bayesian",
    *,
    n_trials: int | None = None,
    seed: int | None = None,
    storage: str | None = None,
    study_name: str = "llm_sampling",
    timeout: float | None = None,
    n_jobs: int = 1,
) -> CheckedSpace:
    """Raise what :func:`tune` would raise for these arguments, before slow preparations for it.

    Args and Raises: those of :func:`tune`.

    Returns:
        The space, its choices as lists.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if n_trials is not None:
        checks.integer_at_least("n_trials", n_trials, 1)
    if seed is not None:
        checks.integer_at_least("seed", seed, 0)
    checks.integer_at_least("n_jobs", n_jobs, 1)
    if timeout is not None:
        is_number = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
        if not is_number or not float(timeout) > 0:
            raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}")
    if storage is not None and (not isinstance(storage, str) or "://" not in storage):
        raise ValueError(
            f"storage must be a URL such as 'sqlite:///tuning.db' or None, got {storage!r}"
        )
    file = sqlite_file(storage)
    if file is not None and not os.path.isdir(file.parent):
        raise ValueError(f"storage must lie in a folder that is there, got {storage!r}")
    if not isinstance(study_name, str) or not study_name:
        raise ValueError(f"study_name must be a string that is not empty, got {study_name!r}")
    checked = checked_space(space, method)
    if n_trials is None and timeout is None and method != "grid":
        raise ValueError("n_trials or timeout must be given where method is not 'grid'")
    _must_be_installed("optuna", f"tuning needs the package optuna: {_INSTALL}")
    if method == "gp":
        _must_be_installed("scipy", "method 'gp' needs the package scipy: pip install scipy")
    return checked


def _directions(direction: object, directions: object) -> tuple[Direction, ...]:
    if directions is None:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be 'minimize' or 'maximize', got {direction!r}")
        return (direction,)
    if (
        not isinstance(directions, Sequence)
        or isinstance(directions, str)
        or not directions
        or any(one not in DIRECTIONS for one in directions)
    ):
        raise ValueError(
            f"directions must be a sequence of 'minimize' and 'maximize', got {directions!r}"
        )
    return tuple(directions)


def _must_be_installed(package: str, message: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(message, name=package)


def _sampler_maker(
    method: Method, space: CheckedSpace, seed: int
) -> Callable[[int], optuna.samplers.BaseSampler]:
    """A function that makes the sampler for the trial of an index."""
    from optuna import samplers

    def of_index(index: int) -> int:
        return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])

    if method == "grid":
        # The seed is that of the grid's order, which must be the same for all trials.
        grid = {name: list(values) for name, values in space.items() if isinstance(values, list)}
        order = of_index(0)
        return lambda index: samplers.GridSampler(grid, seed=order)
    if method == "random":
        return lambda index: samplers.RandomSampler(seed=of_index(index))
    if method == "bayesian":
        return lambda index: samplers.TPESampler(seed=of_index(index))
    return lambda index: samplers.GPSampler(seed=of_index(index))


def _optuna_objective(
    objective: Objective, distributions: dict[str, BaseDistribution], directions: int
) -> Callable[[optuna.Trial], Values]:
    import optuna

    def run(trial: optuna.Trial) -> Values:
        try:
            values = {name: _suggest(trial, name, d) for name, d in distributions.items()}
            check_params(values)
            value = objective(values)
            if isinstance(value, Generator):
                if directions > 1:
                    raise ValueError("objective must not be a generator with several directions")
                value = _reported(trial, value)
            return _checked_values(value, directions)
        except optuna.TrialPruned:
            raise
        except BaseException:
            trial.set_user_attr(INTERRUPTED, True)
            raise

    return run


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    from optuna import distributions as d

    if isinstance(distribution, d.CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, d.IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, d.FloatDistribution)
    return trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _reported(trial: optuna.Trial, generator: Generator[float, None, float | None]) -> float:
    """Report each number that the generator yields; its result, or TrialPruned by the pruner."""
    import optuna

    last: float | None = None
    step = 0
    while True:
        try:
            last = next(generator)
        except StopIteration as stop:
            last = last if stop.value is None else stop.value
            if last is None:
                raise ValueError("objective must yield or return a number, got none") from None
            return last
        trial.report(last, step)
        step += 1
        if trial.should_prune():
            generator.close()
            raise optuna.TrialPruned


def _checked_values(value: Any, directions: int) -> Values:
    values = list(value) if isinstance(value, Sequence) else [value]
    if isinstance(value, str) or len(values) != directions:
        raise ValueError(
            f"objective must return as many numbers as directions ({directions}), got {value!r}"
        )
    for number in values:
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise ValueError(f"objective must return numbers, got {number!r}")
    return [float(number) for number in values]


def _best(study: optuna.Study) -> FrozenTrial | None:
    """The best trial; with several objectives, the one on the front nearest to the ideal point."""
    front = study.best_trials
    if not front:
        return None
    values = np.array([trial.values for trial in front], dtype=np.float64)
    is_less_better = [direction.name == "MINIMIZE" for direction in study.directions]
    cost = np.where(is_less_better, values, -values)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which counts as farthest
        spread = cost.max(axis=0) - cost.min(axis=0)
        scaled = (cost - cost.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return front[int(np.argmin(np.nan_to_num(np.linalg.norm(scaled, axis=1), nan=np.inf)))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from logging a line for each trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
