"""Tests of the search: which values it tries, what it finds, how it resumes after interruption."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import math
import os
import re
import signal
import statistics
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna", reason="needs the extra 'tune'")

from llm_sampling import SamplingParams  # noqa: E402
from llm_sampling.fields import OFF_VALUES  # noqa: E402
from llm_sampling.tools import tuning  # noqa: E402
from llm_sampling.tools.tuning import METHODS, Range, space_from_text, tune  # noqa: E402
from llm_sampling.tools.tuning import search as module  # noqa: E402

SPACE = {"x": Range(0.0, 9.0), "k": Range(1, 10), "rule": ["a", "b", "c"]}
GRID = {"x": [1.0, 2.0, 3.0, 4.0], "rule": ["a", "b", "c"]}
POINTS = [{"x": x, "rule": rule} for x, rule in itertools.product(GRID["x"], GRID["rule"])]


def bowl(values: dict[str, Any]) -> float:
    return (values["x"] - 2) ** 2 + values.get("k", 1) / 10 + "bac".index(values["rule"])


def search(
    objective: Any = bowl, space: Any = SPACE, method: Any = "random", **options: Any
) -> Any:
    options = {"n_trials": 8, "seed": 1, "show_progress": False, **options}
    return tune(objective, space, method, **options)


def tried(result: tuning.TuningResult) -> list[dict[str, Any]]:
    return [trial.params for trial in result.trials]


def says(message: str) -> str:
    """Return a pattern that matches exactly this message."""
    return f"^{re.escape(message)}$"


def space_of(method: str) -> Any:
    return GRID if method == "grid" else SPACE


@contextlib.contextmanager
def no_trial() -> Iterator[Callable[[dict[str, Any]], float]]:
    """Yield an objective, and check that it is not called in the block."""
    calls: list[object] = []
    yield lambda values: calls.append(values) or 0.0
    assert calls == []


# ---- what is tried -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_is_a_search(method: str) -> None:
    first, again, other = (search(method=method, space=space_of(method), seed=s) for s in (1, 1, 2))
    assert tried(first) == tried(again) != tried(other)
    assert len(first.trials) == 8
    assert first.best_params == again.best_params
    assert first.best_values == (min(bowl(params) for params in tried(first)),)
    assert bowl(first.best_params) == first.best_values[0]


def test_without_a_seed_it_is_another_one() -> None:
    first, second = search(seed=None), search(seed=None)
    assert tried(first) != tried(second)
    assert tried(search(seed=first.study.user_attrs["seed"])) == tried(first)


@pytest.mark.parametrize(
    ("method", "sampler"),
    [("random", "RandomSampler"), ("bayesian", "TPESampler"), ("gp", "GPSampler")],
)
def test_values_come_from_the_method(
    method: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "gp":
        pytest.importorskip("scipy")
    made = []
    right = getattr(optuna.samplers, sampler)
    monkeypatch.setattr(
        optuna.samplers, sampler, lambda seed=None: made.append(seed) or right(seed=seed)
    )
    search(method=method)
    seeds = [seed for seed in made if seed is not None]  # a study first makes an unseeded sampler
    assert len(seeds) == len(set(seeds)) == 8


def test_a_range_holds_all_between_its_ends() -> None:
    space = {
        "x": Range(-1.5, 2.0),
        "log": Range(1e-4, 1e2, log=True),
        "step": Range(0.0, 1.0, step=0.25),
        "k": Range(-3, 3),
        "even": Range(2, 8, step=2),
        "choice": [None, True, "a", 0.5],
        "temperature": Range(1, 2),
        "top_k": Range(1, 3),
    }
    values = tried(search(lambda values: 0.0, space, n_trials=400))
    of = {name: [params[name] for params in values] for name in space}
    assert all(-1.5 <= x <= 2 for x in of["x"])
    assert min(of["x"]) < -1.4
    assert max(of["x"]) > 1.9
    # Two of the range's six orders of magnitude are below 1e-2, so about 133 of 400 values.
    assert 180 > sum(x < 1e-2 for x in of["log"]) > 90
    assert set(of["step"]) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert set(of["k"]) == set(range(-3, 4))
    assert set(of["even"]) == {2, 4, 6, 8}
    assert set(of["choice"]) == {None, True, "a", 0.5}
    assert {type(value) for value in of["k"] + of["even"] + of["top_k"]} == {int}
    assert len(set(of["temperature"])) > 300  # a float, although its ends are integers


def test_a_grid_is_tried_once_each() -> None:
    whole = search(method="grid", space=GRID, n_trials=None)
    assert sorted(tried(whole), key=str) == sorted(POINTS, key=str)
    assert whole.best_params == {"x": 2.0, "rule": "b"}
    more = search(method="grid", space=GRID, n_trials=100)
    assert tried(more) == tried(whole)
    assert tried(search(method="grid", space=GRID, n_trials=5)) == tried(whole)[:5]


def test_bayesian_methods_find_more_than_chance() -> None:
    """The median over seeds of the best of 40 trials is less than a third of random search's.

    The negative control is random search with other seeds, which does not reach that.
    """
    space = {"x": Range(0.0, 9.0), "y": Range(-5.0, 5.0)}

    def far(values: dict[str, Any]) -> float:
        return (values["x"] - 7.3) ** 2 + (values["y"] + 1.1) ** 2

    def median_of(method: str, seeds: range) -> float:
        found = [search(far, space, method, n_trials=40, seed=s).best_values[0] for s in seeds]
        return statistics.median(found)

    chance = median_of("random", range(9))
    assert median_of("bayesian", range(9)) < chance / 3
    assert median_of("random", range(9, 18)) > chance / 3


def test_several_threads_finish_all_trials() -> None:
    result = search(n_trials=24, n_jobs=4)
    assert len(result.trials) == 24
    one = search(n_trials=24)
    # Threads finish in any order, and values of a random search do not depend on other trials.
    assert sorted(map(str, tried(result))) == sorted(map(str, tried(one)))


def test_timeout_ends_a_search() -> None:
    result = search(n_trials=None, timeout=0.5)
    assert len(result.trials) >= 1


def test_every_trial_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    before = optuna.logging.get_verbosity()
    search(n_trials=3, callback=lambda trial: told.append(trial.number))
    assert told == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    search(n_trials=3, show_progress=True)
    written = capsys.readouterr()
    assert written.out == ""
    assert "3/3" in written.err
    assert optuna.logging.get_verbosity() == before


def test_maximize() -> None:
    best = search(lambda values: -bowl(values), direction="maximize")
    assert best.best_params == search().best_params


# ---- several objectives, pruning, failures -------------------------------------------------------


def test_a_pareto_front_is_what_nothing_is_better_than() -> None:
    def two(values: dict[str, Any]) -> tuple[float, float]:
        return values["x"], (values["x"] - 4) ** 2 + values["k"]

    result = search(two, n_trials=40, directions=["maximize", "minimize"])
    values = [(-trial.values[0], trial.values[1]) for trial in result.trials]
    front = {
        trial.number
        for trial, mine in zip(result.trials, values, strict=True)
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in values
        )
    }
    assert {trial.number for trial in result.pareto_front} == front
    assert len(front) > 2
    assert result.best_values in {tuple(trial.values) for trial in result.pareto_front}
    # The best trial is the one nearest to the ideal point on the front, scaled to the unit square.
    costs = [values[number] for number in sorted(front)]
    low = [min(column) for column in zip(*costs, strict=True)]
    high = [max(column) for column in zip(*costs, strict=True)]
    nearest = min(
        costs,
        key=lambda cost: math.dist(
            [(c - a) / (b - a) for c, a, b in zip(cost, low, high, strict=True)], [0, 0]
        ),
    )
    assert result.best_values == (-nearest[0], nearest[1])


def test_a_generator_is_pruned_where_it_is_hopeless() -> None:
    steps: list[int] = []
    closed = []

    def falling(values: dict[str, Any]) -> Iterator[float]:
        steps.append(0)
        try:
            for step in range(10):
                steps[-1] += 1
                yield bowl(values) + 10 - step
        finally:
            closed.append(True)

    result = search(falling, n_trials=30)
    states = [trial.state.name for trial in result.trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert len(closed) == 30
    for trial, count in zip(result.trials, steps, strict=True):
        assert (count == 10) == (trial.state.name == "COMPLETE")
        assert len(trial.intermediate_values) == count
    # A trial's value is the last number that it yields, and the best trial was not pruned.
    assert result.best_values == (min(bowl(params) + 10 - 9 for params in tried(result)),)
    never = search(falling, n_trials=30, pruner=optuna.pruners.NopPruner())
    assert {trial.state.name for trial in never.trials} == {"COMPLETE"}


def test_what_a_generator_returns_counts() -> None:
    def returning(values: dict[str, Any]) -> Iterator[float]:
        yield 100.0
        return bowl(values)  # type: ignore[return-value]

    assert search(returning).best_values == search().best_values


def test_nan_is_a_failed_trial() -> None:
    def sometimes(values: dict[str, Any]) -> float:
        return math.nan if values["rule"] == "b" else bowl(values)

    result = search(sometimes, n_trials=20)
    assert len(result.trials) == 20
    for trial in result.trials:
        assert (trial.state.name == "FAIL") == (trial.params["rule"] == "b")
    assert result.best_params["rule"] != "b"
    with pytest.raises(RuntimeError, match=r"^no trial of 3 gave a number$"):
        search(lambda values: math.nan, n_trials=3)


WRONG_OBJECTIVES = {
    "text": (
        lambda values: "1",
        "objective must return as many numbers as directions (1), got '1'",
    ),
    "too many": (
        lambda values: (1.0, 2.0),
        "objective must return as many numbers as directions (1), got (1.0, 2.0)",
    ),
    "none": (lambda values: None, "objective must return numbers, got None"),
    "bool": (lambda values: True, "objective must return numbers, got True"),
    "empty generator": (
        lambda values: (x for x in ()),
        "objective must yield or return a number, got none",
    ),
}


@pytest.mark.parametrize("name", WRONG_OBJECTIVES)
def test_an_objective_that_gives_no_number(name: str) -> None:
    objective, message = WRONG_OBJECTIVES[name]
    with pytest.raises(ValueError, match=says(message)):
        search(objective)


def test_a_generator_has_one_direction() -> None:
    with pytest.raises(ValueError, match="must not be a generator with several directions"):
        search(lambda values: (x for x in (1.0,)), directions=["minimize", "minimize"])


# ---- what is refused before a trial --------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "best"}, "method must be one of random, grid, bayesian, gp, got 'best'"),
    "n_trials": ({"n_trials": 0}, "n_trials must be an integer >= 1, got 0"),
    "bool": ({"n_trials": True}, "n_trials must be an integer >= 1, got True"),
    "seed": ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    "n_jobs": ({"n_jobs": None}, "n_jobs must be an integer >= 1, got None"),
    "timeout": ({"timeout": 0}, "timeout must be a number of seconds > 0, got 0"),
    "nan timeout": ({"timeout": math.nan}, "timeout must be a number of seconds > 0, got nan"),
    "endless": (
        {"n_trials": None},
        "n_trials or timeout must be given where method is not 'grid'",
    ),
    "storage": (
        {"storage": "tuning.db"},
        "storage must be a URL such as 'sqlite:///tuning.db' or None, got 'tuning.db'",
    ),
    "folder": (
        {"storage": "sqlite:///nowhere/tuning.db"},
        "storage must lie in a folder that is there, got 'sqlite:///nowhere/tuning.db'",
    ),
    "study": ({"study_name": ""}, "study_name must be a string that is not empty, got ''"),
    "direction": ({"direction": "up"}, "direction must be 'minimize' or 'maximize', got 'up'"),
    "directions": (
        {"directions": ["up"]},
        "directions must be a sequence of 'minimize' and 'maximize', got ['up']",
    ),
    "no directions": (
        {"directions": []},
        "directions must be a sequence of 'minimize' and 'maximize', got []",
    ),
    "directions in words": (
        {"directions": "minimize"},
        "directions must be a sequence of 'minimize' and 'maximize', got 'minimize'",
    ),
    "no space": ({"space": {}}, "space must map one name at least to its values, got {}"),
    "list": ({"space": [1]}, "space must map one name at least to its values, got [1]"),
    "name": ({"space": {1: [1]}}, "space must have names that are strings, got 1"),
    "value": ({"space": {"x": 1}}, "x must be a Range or a list of values, got 1"),
    "text": ({"space": {"x": "ab"}}, "x must be a Range or a list of values, got 'ab'"),
    "empty": ({"space": {"x": []}}, "x must be a Range or a list of values, got []"),
    "twice": ({"space": {"x": [1, 2, 1.0]}}, "x must name each value once, got [1, 2, 1.0]"),
    "two numbers": (
        {"space": {"temperature": (0.1, 2.0)}},
        "temperature must be Range(0.1, 2.0) for all values between two numbers, or [0.1, 2.0] for "
        "these two alone, got the tuple (0.1, 2.0)",
    ),
    "two numbers of any name": (
        {"space": {"x": (1, 5)}},
        "x must be Range(1, 5) for all values between two numbers, or [1, 5] for these two alone, "
        "got the tuple (1, 5)",
    ),
    "mapping": (
        {"space": {"x": [{}]}},
        "x must have values that are None, a bool, a number or a string, got {}",
    ),
    "nan": (
        {"space": {"x": [math.nan]}},
        "x must have values that are None, a bool, a number or a string, got nan",
    ),
    "range in a grid": (
        {"method": "grid", "space": {"x": Range(0, 1)}},
        "x must be a list of values where method is 'grid'",
    ),
    "floats for integers": (
        {"space": {"top_k": Range(1, 5, step=0.5)}},
        "top_k must be a Range of integers, got Range(low=1, high=5, log=False, step=0.5)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_before_a_trial(name: str) -> None:
    options, message = REFUSED[name]
    with no_trial() as objective, pytest.raises(ValueError, match=says(message)):
        search(objective, **options)


#: field -> the ends of a range, one of which SamplingParams refuses
OUT_OF_RANGE = {
    "temperature": (-0.1, 1.0),
    "top_k": (-2, 5),
    "top_p": (0.5, 1.1),
    "min_p": (-0.1, 0.5),
    "repetition_penalty": (0.0, 2.0),
    "frequency_penalty": (-2.0, 2.5),
    "presence_penalty": (-2.5, 2.0),
    "min_tokens_to_keep": (0, 3),
    "seed": (-1, 3),
    "penalty_last_n": (-2, 3),
    "dry_multiplier": (0.0, 100.5),
    "dry_base": (0.5, 2.0),
    "dry_allowed_length": (0, 3),
    "dry_penalty_last_n": (-2, 3),
    "no_repeat_ngram_size": (-1, 3),
    "no_repeat_ngram_window": (-1, 3),
    "min_tokens": (-1, 3),
}
#: The fields whose values are mappings or sequences.
OBJECTS = {"logit_bias", "dry_breakers", "bad_words", "stop_token_ids"}
#: The fields whose values are strings.
WORDS = {name for name, off in OFF_VALUES.items() if isinstance(off, str)}


@pytest.mark.parametrize("field", sorted(set(OFF_VALUES) - OBJECTS - WORDS))
@pytest.mark.parametrize("form", [lambda ends: Range(*ends), list], ids=["range", "list"])
def test_fields_are_refused_in_the_words_of_sampling_params(
    field: str, form: Callable[[Any], Any]
) -> None:
    words = []
    for value in OUT_OF_RANGE[field]:
        try:
            SamplingParams(**{field: value})
        except ValueError as error:
            words.append(str(error))
    assert len(words) == 1
    with no_trial() as objective, pytest.raises(ValueError, match=says(words[0])):
        search(objective, {field: form(OUT_OF_RANGE[field])})


@pytest.mark.parametrize(
    ("values", "got"), [(Range(0, 1), 0), (["all", "prompt"], "'prompt'"), ([None, 1], 1)]
)
def test_a_word_that_is_none_of_the_choices_is_refused(values: Any, got: object) -> None:
    assert {"repetition_penalty_scope"} == WORDS
    told = says(f'repetition_penalty_scope must be "all" or "output", got {got}')
    with no_trial() as objective, pytest.raises(ValueError, match=told):
        search(objective, {"repetition_penalty_scope": values})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0), "low of a Range must be at most high (0), got 1"),
        ((0, math.inf), "high of a Range must be a finite number, got inf"),
        ((math.nan, 1), "low of a Range must be a finite number, got nan"),
        (("0", 1), "low of a Range must be a finite number, got '0'"),
        ((False, 1), "low of a Range must be a finite number, got False"),
        ((0, 1, True), "low of a Range with log must be > 0, got 0"),
        ((1, 2, "log"), "log of a Range must be True or False, got 'log'"),
        ((1, 2, True, 1), "step of a Range must be > 0 and without log, got 1"),
        ((1, 2, False, 0), "step of a Range must be > 0 and without log, got 0"),
    ],
)
def test_ranges_that_are_none(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        Range(*arguments)


@pytest.mark.parametrize(
    ("options", "package", "message"),
    [
        ({}, "optuna", "tuning needs the package optuna: pip install 'llm-sampling[tune]'"),
        (
            {"method": "gp"},
            "scipy",
            "method 'gp' needs the package scipy: pip install scipy",
        ),
    ],
)
def test_a_package_that_is_missing_is_named(
    options: Any, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with no_trial() as objective, pytest.raises(ModuleNotFoundError, match=says(message)):
        search(objective, **options)


def test_a_space_in_words() -> None:
    entries = ["temperature=0.1:2.0", "top_k=1:100", "lr=1e-4:1:log", "w=8:64:8", "rule=a,2,0.5"]
    assert space_from_text(entries) == {
        "temperature": Range(0.1, 2.0),
        "top_k": Range(1, 100),
        "lr": Range(1e-4, 1, log=True),
        "w": Range(8, 64, step=8),
        "rule": ["a", 2, 0.5],
    }
    assert space_from_text(["x=1"]) == {"x": [1]}


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ("x", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("=1", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("x=", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("x=(0.1,2.0)", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("x=[0.1,2.0]", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("x=0.1..2.0", "space must have entries NAME=LOW:HIGH or NAME=VALUE,..."),
        ("x=a:2", "space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP"),
        ("x=1:", "space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP"),
        ("x=1:2:lin", "space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP"),
        ("x=1:2:3:4", "space must have ranges LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP"),
    ],
)
def test_words_that_are_no_space(entry: str, rule: str) -> None:
    with pytest.raises(ValueError, match=says(f"{rule}, got {entry!r}")):
        space_from_text([entry])


def test_a_name_comes_once() -> None:
    with pytest.raises(ValueError, match=r"^space must name x once, got 'x=2' too$"):
        space_from_text(["x=1", "x=2"])


# ---- broken off, and on again --------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuning.db"


def in_a_child(work: Callable[[], object]) -> int:
    """Do the work in a forked process and return its status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_search_goes_on(method: str, storage: str, tmp_path: Path) -> None:
    """A search killed in trials 3 and 5 tries the same values as one that was not killed."""
    if method == "gp":
        pytest.importorskip("scipy")
    calls = tmp_path / "calls"

    def recorded(values: dict[str, Any]) -> float:
        with calls.open("a") as file:
            file.write(f"{sorted(values.items())}\n")
        # Call 3 is trial 3. The resumed search repeats it as call 4, so call 6 is trial 5.
        if len(calls.read_text().splitlines()) in (3, 6):
            os.kill(os.getpid(), signal.SIGKILL)
        return bowl(values)

    def run() -> Any:
        return search(recorded, space_of(method), method, n_trials=12, storage=storage)

    assert [in_a_child(run) for _ in range(2)] == [signal.SIGKILL] * 2
    result = run()
    expected = search(bowl, space_of(method), method, n_trials=12)
    assert tried(result) == tried(expected)
    assert result.best_params == expected.best_params
    lines = calls.read_text().splitlines()
    assert len(lines) == 12 + 2
    assert lines[2] == lines[3]
    assert lines[5] == lines[6]
    again = run()
    assert tried(again) == tried(result)
    assert calls.read_text().splitlines() == lines  # no trial was left, so none was called


def test_optunas_own_sampler_would_begin_anew(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: one sampler for all trials, as Optuna uses it, loses its state.

    After the search is resumed, it repeats its first values.
    """
    monkeypatch.setattr(module, "sampler_by_index", lambda make: make(0))
    search(n_trials=4, storage=storage)
    values = tried(search(n_trials=8, storage=storage))
    assert values[4:] == values[:4]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_search_that_an_exception_ended_goes_on(error: type[BaseException], storage: str) -> None:
    calls: list[dict[str, Any]] = []

    def interrupted(values: dict[str, Any]) -> float:
        calls.append(values)
        if len(calls) in (3, 4):
            raise error
        return bowl(values)

    for _ in range(2):
        with pytest.raises(error):
            search(interrupted, storage=storage)
    result = search(interrupted, storage=storage)
    assert tried(result) == tried(search())
    assert calls[2] == calls[3] == calls[4]
    assert len(calls) == 8 + 2


def test_a_finished_search_takes_more_trials(storage: str) -> None:
    search(n_trials=5, storage=storage)
    more = search(n_trials=8, storage=storage, seed=None)  # the seed of the stored study
    assert tried(more) == tried(search(n_trials=8))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"space": {"x": Range(0.0, 1.0), "rule": ["a"]}}, "space"),
        ({"method": "bayesian"}, "method"),
        ({"seed": 2}, "seed"),
        ({"directions": ["maximize"]}, "directions"),
    ],
)
def test_another_search_is_not_taken_for_this_one(options: Any, what: str, storage: str) -> None:
    search(storage=storage)
    message = f"^storage must hold a study of the same {what} under the name 'llm_sampling', got "
    with no_trial() as objective, pytest.raises(ValueError, match=message):
        search(objective, storage=storage, **options)
    other = search(storage=storage, study_name="other", **options)
    assert len(other.trials) == 8
    assert tried(search(storage=storage)) == tried(search())  # the first search is unchanged


def test_one_process_at_a_time(storage: str, tmp_path: Path) -> None:
    with (tmp_path / "tuning.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with no_trial() as objective, pytest.raises(RuntimeError, match=r"by another process$"):
            search(objective, storage=storage)
    assert len(search(storage=storage).trials) == 8
