"""A search for good values: random, grid or Bayesian, by Optuna, resumable and the same every time.

    space -> distributions (checked) -> Optuna's study -> objective(values) -> TuningResult

Nothing here knows what is tuned: the decoding of a model
(:mod:`llm_sampling.tools.tuning.objectives`), its training (examples/tune_training.py) or anything
else that comes to a number. Needs the extra ``tune``; optuna is imported when a search begins.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import numbers
import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from llm_sampling.fields import OFF_VALUES
from llm_sampling.params import SamplingParams

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Method = Literal["random", "grid", "bayesian", "gp"]
Direction = Literal["minimize", "maximize"]
Choice: TypeAlias = "str | int | float | bool | None"
Values: TypeAlias = "float | Sequence[float]"
#: A function of the trial's values; or of them a generator of what is known so far.
Objective: TypeAlias = "Callable[[dict[str, Any]], Values | Generator[float, None, float | None]]"

METHODS: tuple[Method, ...] = ("random", "grid", "bayesian", "gp")
DIRECTIONS: tuple[Direction, ...] = ("minimize", "maximize")

#: The fields of SamplingParams that hold integers; those with None besides.
_INTEGER_FIELDS = ("top_k", "min_tokens_to_keep", "seed")

_INSTALL = "pip install 'llm-sampling[tune]'"


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, both included; integers if both are.

    A field of SamplingParams that is a float stays one: ``Range(1, 2)`` holds 1.5 for temperature.

    Attributes:
        low: the smallest.
        high: the largest.
        log: whether to search by orders of magnitude; ``low`` must then be positive.
        step: the distance of neighbours; None is none for floats and 1 for integers. Not with
            ``log``.

    Raises:
        ValueError: a bound is not finite, they are in the wrong order, or ``log`` and ``step`` do
            not go with them.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if name == "step" and value is None:
                continue
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise ValueError(f"{name} of a Range must be a finite number, got {value!r}")
        if self.low > self.high:
            raise ValueError(f"low of a Range must be at most high ({self.high}), got {self.low}")
        if not isinstance(self.log, bool):
            raise ValueError(f"log of a Range must be True or False, got {self.log!r}")
        if self.log and self.low <= 0:
            raise ValueError(f"low of a Range with log must be > 0, got {self.low}")
        if self.step is not None and (self.log or self.step <= 0):
            raise ValueError(f"step of a Range must be > 0 and without log, got {self.step!r}")

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers only."""
        parts = [x for x in (self.low, self.high, self.step) if x is not None]
        return all(isinstance(x, numbers.Integral) for x in parts)


Space: TypeAlias = Mapping[str, "Range | Sequence[Choice]"]


@dataclass(frozen=True)
class TuningResult:
    """What a search found.

    Attributes:
        best_params: the values of the best trial; with several objectives of the trial on the
            Pareto front that is nearest to the point that has the best of each, every objective
            scaled to 0 .. 1 on the front.
        best_values: what the objective returned for them, one number per direction.
        trials: the trials, in order, as Optuna's FrozenTrial: ``params``, ``values``, ``state``
            (COMPLETE, PRUNED, or FAIL where the objective returned NaN). Not those that were
            broken off: they were run again.
        study: Optuna's study, for all of its tools.
    """

    best_params: dict[str, Any]
    best_values: tuple[float, ...]
    trials: list[FrozenTrial]
    study: optuna.Study

    @property
    def pareto_front(self) -> list[FrozenTrial]:
        """The trials that no other is better than in every objective."""
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
    """Search ``space`` for the values that ``objective`` likes best.

    With the same seed and ``n_jobs=1`` a search tries the same values, also when it is broken off
    and goes on from its storage: each trial's random numbers follow from the seed and its index.

    Args:
        objective: called with a dict of a value for each name of the space; returns a number, or
            with ``directions`` as many. Where it is a generator function, each number that it
            yields is a value so far, after which ``pruner`` may end the trial; its return value
            counts, or the last number if that is None. NaN marks a trial as failed. An exception
            ends the search.
        space: by name, a :class:`Range` or a list of choices, each None, a bool, a number or a
            string. A name that is a field of SamplingParams is held to its rules; others are free.
        method: "random"; "grid", all combinations, for which every name has a list; "bayesian",
            Optuna's tree-structured Parzen estimator; "gp", a Gaussian process, which needs scipy.
        n_trials: stop when so many trials are finished, those in the storage included. None: no
            limit but ``timeout``, or for "grid" the whole grid.
        seed: an integer >= 0. None: a new one, or that of the study in the storage.
        storage: a URL such as "sqlite:///tuning.db"; None keeps the study in memory. A study that
            is found there goes on: its finished trials count, and one that was broken off is run
            again. One process at a time may use an SQLite file.
        study_name: the study's name in the storage.
        timeout: seconds, after which no new trial starts.
        n_jobs: threads that run trials side by side. With more than one, what the Bayesian methods
            try depends on which trial is done first.
        direction: "minimize" or "maximize".
        directions: one for each number that the objective returns; instead of ``direction``.
        pruner: one of ``optuna.pruners``; the default compares with the median of the others.
        show_progress: whether to draw a progress bar on stderr.
        callback: called with each trial when it is finished.

    Raises:
        ValueError: an argument is out of its range, a value of the space breaks a rule of
            SamplingParams, or the storage holds another search under this name. Before any trial.
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

    distributions = {name: _distribution(name, values) for name, values in checked.items()}
    grid_size = math.prod(len(values) for values in checked.values() if isinstance(values, list))
    if method == "grid":
        n_trials = grid_size if n_trials is None else min(n_trials, grid_size)

    with _alone(storage), _quiet():
        study = optuna.create_study(
            storage=storage,
            study_name=study_name,
            directions=list(wanted),
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if pruner is None else pruner,
        )
        seed = _same_search(study, checked, method, wanted, seed)
        _run_again_what_was_broken_off(study)
        study.sampler = _by_index(_sampler_maker(method, checked, seed))
        done = len(_finished(study))
        if n_trials is None or done < n_trials:
            study.optimize(
                _optuna_objective(objective, distributions, len(wanted)),
                n_trials=None if n_trials is None else n_trials - done,
                timeout=timeout,
                n_jobs=n_jobs,
                callbacks=[] if callback is None else [lambda study, trial: callback(trial)],
                show_progress_bar=show_progress,
            )
        trials = _finished(study)
        best = _best(study)
    if best is None:
        raise RuntimeError(f"no trial of {len(trials)} gave a number")
    return TuningResult(dict(best.params), tuple(best.values), trials, study)


# ---- what is asked for ---------------------------------------------------------------------------


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
) -> dict[str, Range | list[Choice]]:
    """Refuse what :func:`tune` would refuse, before something slow is made ready for it.

    Args and Raises: those of :func:`tune`.

    Returns:
        The space, its choices as lists.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value, least, may_be_none in (
        ("n_trials", n_trials, 1, True),
        ("seed", seed, 0, True),
        ("n_jobs", n_jobs, 1, False),
    ):
        if value is None and may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if timeout is not None:
        is_number = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
        if not is_number or not float(timeout) > 0:
            raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}")
    if storage is not None and (not isinstance(storage, str) or "://" not in storage):
        raise ValueError(
            f"storage must be a URL such as 'sqlite:///tuning.db' or None, got {storage!r}"
        )
    file = _sqlite_file(storage)
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"storage must lie in a folder that is there, got {storage!r}")
    if not isinstance(study_name, str) or not study_name:
        raise ValueError(f"study_name must be a string that is not empty, got {study_name!r}")
    checked = _checked_space(space, method)
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


def _checked_space(space: object, method: str) -> dict[str, Range | list[Choice]]:
    """The space as ranges and lists; a ValueError before any trial for what no trial could take."""
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"space must map one name at least to its values, got {space!r}")
    checked: dict[str, Range | list[Choice]] = {}
    for name, values in space.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"space must have names that are strings, got {name!r}")
        if isinstance(values, Range):
            if method == "grid":
                raise ValueError(f"{name} must be a list of values where method is 'grid'")
            checked[name] = _checked_range(name, values)
        else:
            checked[name] = _checked_choices(name, values)
    return checked


def _checked_range(name: str, values: Range) -> Range:
    if name not in OFF_VALUES:
        return values
    # every rule of SamplingParams is an interval, so its ends answer for all between them
    for end in (values.low, values.high):
        _as_params({name: end})
    if name in _INTEGER_FIELDS and not values.is_integer:
        raise ValueError(f"{name} must be a Range of integers, got {values}")
    return values


def _checked_choices(name: str, values: object) -> list[Choice]:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not is_list or not values:
        raise ValueError(f"{name} must be a Range or a list of values, got {values!r}")
    choices: list[Choice] = list(values)  # type: ignore[call-overload]
    for choice in choices:
        if name in OFF_VALUES:
            _as_params({name: choice})
        is_plain = choice is None or isinstance(choice, (str, bool, int, float))
        if not is_plain or choice != choice:
            raise ValueError(
                f"{name} must have values that are None, a bool, a number or a string, "
                f"got {choice!r}"
            )
    if any(a == b for i, a in enumerate(choices) for b in choices[:i]):  # and True is 1
        raise ValueError(f"{name} must name each value once, got {choices}")
    return choices


def _as_params(values: Mapping[str, Any]) -> SamplingParams:
    """Those of the values that are its fields; a ValueError in SamplingParams' own words."""
    return SamplingParams(**{name: value for name, value in values.items() if name in OFF_VALUES})


def _must_be_installed(package: str, message: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(message, name=package)


def space_from_text(entries: Sequence[str]) -> dict[str, Range | list[Choice]]:
    """``NAME=LOW:HIGH``, ``NAME=LOW:HIGH:log``, ``NAME=LOW:HIGH:STEP`` or ``NAME=VALUE,VALUE,...``.

    A number without a point is an integer; a value that is no number is a string.

    Raises:
        ValueError: an entry has another form, or a name comes twice.
    """
    space: dict[str, Range | list[Choice]] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals and text):
            raise ValueError(
                f"space must have entries NAME=LOW:HIGH or NAME=VALUE,..., got {entry!r}"
            )
        if name in space:
            raise ValueError(f"space must name {name} once, got {entry!r} too")
        space[name] = _range_from_text(entry, text) if ":" in text else _list_from_text(text)
    return space


def _range_from_text(entry: str, text: str) -> Range:
    low, high, *more = (_value_from_text(part) for part in text.split(":"))
    is_log = more == ["log"]
    if len(more) > 1 or any(isinstance(x, str) for x in [low, high, *([] if is_log else more)]):
        raise ValueError(
            f"space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP, got {entry!r}"
        )
    step = None if is_log or not more else more[0]
    return Range(low, high, log=is_log, step=step)  # type: ignore[arg-type]


def _list_from_text(text: str) -> list[Choice]:
    return [_value_from_text(part) for part in text.split(",")]


def _value_from_text(text: str) -> int | float | str:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


# ---- Optuna --------------------------------------------------------------------------------------


def _distribution(name: str, values: Range | list[Choice]) -> BaseDistribution:
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution(values)
    is_float_field = name in OFF_VALUES and name not in _INTEGER_FIELDS
    if values.is_integer and not is_float_field:
        step = 1 if values.step is None else int(values.step)
        return distributions.IntDistribution(
            int(values.low), int(values.high), log=values.log, step=step
        )
    return distributions.FloatDistribution(
        float(values.low), float(values.high), log=values.log, step=values.step
    )


def _sampler_maker(
    method: Method, space: Mapping[str, Range | list[Choice]], seed: int
) -> Callable[[int], optuna.samplers.BaseSampler]:
    """A function of a trial's index: the sampler that chooses its values."""
    from optuna import samplers

    def of_index(index: int) -> int:
        return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])

    if method == "grid":
        # its seed is the grid's order, which is one for all trials
        grid = {name: list(values) for name, values in space.items() if isinstance(values, list)}
        order = of_index(0)
        return lambda index: samplers.GridSampler(grid, seed=order)
    if method == "random":
        return lambda index: samplers.RandomSampler(seed=of_index(index))
    if method == "bayesian":
        return lambda index: samplers.TPESampler(seed=of_index(index))
    return lambda index: samplers.GPSampler(seed=of_index(index))


def _by_index(
    make: Callable[[int], optuna.samplers.BaseSampler],
) -> optuna.samplers.BaseSampler:
    """A sampler that makes a new one for each trial, so that no trial's values depend on a restart.

    Optuna's own go on from the state of their generator, which a process that is killed takes with
    it; and a trial that is run again has a number of its own.
    """
    import optuna

    class ByIndex(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._of_trial: dict[int, optuna.samplers.BaseSampler] = {}
            self._lock = threading.Lock()

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            with self._lock:
                index = trial.user_attrs.get(_INDEX)
                if index is None:
                    others = study.get_trials(deepcopy=False)
                    index = 1 + max(other.user_attrs.get(_INDEX, -1) for other in others)
                    study._storage.set_trial_user_attr(trial._trial_id, _INDEX, index)
                sampler = self._of_trial[trial.number] = make(index)
            as_if_none_was_broken_off = copy.copy(trial)
            as_if_none_was_broken_off.number = index
            sampler.before_trial(study, as_if_none_was_broken_off)

        def infer_relative_search_space(
            self, study: optuna.Study, trial: FrozenTrial
        ) -> dict[str, BaseDistribution]:
            return self._of_trial[trial.number].infer_relative_search_space(study, trial)

        def sample_relative(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            search_space: dict[str, BaseDistribution],
        ) -> dict[str, Any]:
            return self._of_trial[trial.number].sample_relative(study, trial, search_space)

        def sample_independent(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            param_name: str,
            param_distribution: BaseDistribution,
        ) -> Any:
            return self._of_trial[trial.number].sample_independent(
                study, trial, param_name, param_distribution
            )

        def after_trial(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            state: optuna.trial.TrialState,
            values: Sequence[float] | None,
        ) -> None:
            with self._lock:
                sampler = self._of_trial.pop(trial.number)
            sampler.after_trial(study, trial, state, values)

    return ByIndex()


#: What a trial's user_attrs say: which one it is, where a second run of one counts as the same;
#: that it was broken off, by an exception or with its process.
_INDEX, _BROKEN_OFF = "index", "broken_off"


def _run_again_what_was_broken_off(study: optuna.Study) -> None:
    """Put what an exception or a killed process left before all that is to come, as it was."""
    import optuna

    state = optuna.trial.TrialState
    trials = study.get_trials()
    latest = {trial.user_attrs.get(_INDEX): trial.number for trial in trials}
    for trial in trials:
        if trial.state != state.RUNNING and _BROKEN_OFF not in trial.user_attrs:
            continue
        if trial.state == state.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, _BROKEN_OFF, True)
        index = trial.user_attrs.get(_INDEX)
        if index is not None and latest[index] == trial.number:
            study.add_trial(
                optuna.trial.create_trial(
                    state=state.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={_INDEX: index},
                    system_attrs=trial.system_attrs,  # of a grid, which point it is
                )
            )
        if trial.state == state.RUNNING:  # last, so that this too can be broken off
            study.tell(trial.number, state=state.FAIL)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """All but those that were broken off."""
    return [
        trial
        for trial in study.get_trials()
        if trial.state.is_finished() and _BROKEN_OFF not in trial.user_attrs
    ]


def _optuna_objective(
    objective: Objective, distributions: dict[str, BaseDistribution], directions: int
) -> Callable[[optuna.Trial], Values]:
    import optuna

    def run(trial: optuna.Trial) -> Values:
        try:
            values = {name: _suggest(trial, name, d) for name, d in distributions.items()}
            _as_params(values)
            value = objective(values)
            if isinstance(value, Generator):
                if directions > 1:
                    raise ValueError("objective must not be a generator with several directions")
                value = _reported(trial, value)
            return _checked_values(value, directions)
        except optuna.TrialPruned:
            raise
        except BaseException:
            trial.set_user_attr(_BROKEN_OFF, True)
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
    """The generator's last number, each reported; TrialPruned if it is not worth going on."""
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


def _same_search(
    study: optuna.Study,
    space: Mapping[str, Range | list[Choice]],
    method: str,
    directions: Sequence[str],
    seed: int | None,
) -> int:
    """The study's seed; a ValueError if what the storage holds is the study of something else."""
    known = study.user_attrs
    if seed is None:
        seed = known.get("seed", secrets.randbits(32))
    asked = {
        "space": {name: repr(values) for name, values in space.items()},
        "method": method,
        "directions": list(directions),
        "seed": seed,
    }
    for name, value in asked.items():
        if known.get(name, value) != value:
            raise ValueError(
                f"storage must hold a study of the same {name} under the name "
                f"{study.study_name!r}, got {value!r} for {known[name]!r}; "
                "another study_name begins anew"
            )
    for name, value in asked.items():
        study.set_user_attr(name, value)
    return seed


def _best(study: optuna.Study) -> FrozenTrial | None:
    """The best trial; of a front the one that is nearest to the best of each objective."""
    front = study.best_trials
    if not front:
        return None
    values = np.array([trial.values for trial in front], dtype=np.float64)
    is_less_better = [direction.name == "MINIMIZE" for direction in study.directions]
    cost = np.where(is_less_better, values, -values)
    with np.errstate(invalid="ignore"):  # inf - inf
        spread = cost.max(axis=0) - cost.min(axis=0)
        scaled = (cost - cost.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return front[int(np.argmin(np.nan_to_num(np.linalg.norm(scaled, axis=1), nan=np.inf)))]


@contextlib.contextmanager
def _alone(storage: str | None) -> Iterator[None]:
    """Hold a lock beside an SQLite file, which ends with the process, however that ends."""
    path = _sqlite_file(storage)
    if path is None:
        yield
        return
    import fcntl

    with Path(f"{path}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"storage {storage!r} is in use by another process") from None
        yield


def _sqlite_file(storage: str | None) -> Path | None:
    """Where the URL of an SQLite storage has it."""
    prefix = "sqlite:///"
    if storage is None or not storage.startswith(prefix) or storage == prefix:
        return None
    return Path(storage.removeprefix(prefix))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of Optuna's log for each trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
