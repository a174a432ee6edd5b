"""What is searched: a range or a list of choices for each name, checked before any trial.

    {"temperature": Range(0.1, 2.0)} or "temperature=0.1:2.0" -> checked -> Optuna's distributions

optuna is imported when distributions are made.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from llm_sampling import checks
from llm_sampling.fields import FIELDS
from llm_sampling.params import SamplingParams

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: A value of a parameter that is not a number in a range.
Choice: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, both included; only integers if both are integers.

    For a float field of SamplingParams a range always holds floats: ``Range(1, 2)`` includes 1.5
    for temperature.

    Attributes:
        low: the smallest value.
        high: the largest value.
        log: whether to search on a logarithmic scale; ``low`` must then be positive.
        step: the distance between neighbouring values. None means any value for floats, and 1 for
            integers. It cannot be combined with ``log``.

    Raises:
        ValueError: a bound is not finite, ``low`` is above ``high``, or ``log`` or ``step`` does
            not suit them.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if name != "step" or value is not None:
                checks.number(f"{name} of a Range", value)
        if self.low > self.high:
            raise ValueError(f"low of a Range must be at most high ({self.high}), got {self.low}")
        checks.true_or_false("log of a Range", self.log)
        if self.log and self.low <= 0:
            raise ValueError(f"low of a Range with log must be > 0, got {self.low}")
        if self.step is not None and (self.log or self.step <= 0):
            raise ValueError(f"step of a Range must be > 0 and without log, got {self.step!r}")

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers only."""
        return all(checks.is_integer(x) for x in (self.low, self.high, self.step or 1))


Space: TypeAlias = Mapping[str, "Range | Sequence[Choice]"]
CheckedSpace: TypeAlias = "dict[str, Range | list[Choice]]"


def checked_space(space: object, method: str) -> CheckedSpace:
    """The space, its choices as lists.

    Raises:
        ValueError: a name or its values are of no use to any trial of this method.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"space must map one name at least to its values, got {space!r}")
    checked: CheckedSpace = {}
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
    if name not in FIELDS:
        return values
    # The valid values of every field form an interval, so checking both ends is enough.
    for end in (values.low, values.high):
        check_params({name: end})
    if FIELDS[name].is_integer and not values.is_integer:
        raise ValueError(f"{name} must be a Range of integers, got {values}")
    return values


def _checked_choices(name: str, values: object) -> list[Choice]:
    if isinstance(values, tuple) and len(values) == 2 and all(map(_is_number, values)):
        low, high = values
        raise ValueError(
            f"{name} must be Range({low}, {high}) for all values between two numbers, or "
            f"[{low}, {high}] for these two alone, got the tuple {values!r}"
        )
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not is_list or not values:
        raise ValueError(f"{name} must be a Range or a list of values, got {values!r}")
    choices: list[Choice] = list(values)  # type: ignore[call-overload]
    for choice in choices:
        if name in FIELDS:
            check_params({name: choice})
        is_plain = choice is None or isinstance(choice, (str, bool, int, float))
        if not is_plain or choice != choice:
            raise ValueError(
                f"{name} must have values that are None, a bool, a number or a string, "
                f"got {choice!r}"
            )
    # Compared by ==, as Optuna does: True and 1 are the same choice.
    if any(a == b for i, a in enumerate(choices) for b in choices[:i]):
        raise ValueError(f"{name} must name each value once, got {choices}")
    return choices


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_params(values: Mapping[str, Any]) -> None:
    """Raise SamplingParams' ValueError if a value that is one of its fields breaks its rule."""
    SamplingParams(**{name: value for name, value in values.items() if name in FIELDS})


def space_from_text(entries: Sequence[str]) -> CheckedSpace:
    """The space that a command line describes.

    An entry is ``NAME=LOW:HIGH``, ``NAME=LOW:HIGH:log``, ``NAME=LOW:HIGH:STEP`` or
    ``NAME=VALUE,VALUE,...``. A number without a decimal point is an integer; a value that is not a
    number is a string.

    Raises:
        ValueError: an entry has another form, or a name occurs twice.
    """
    space: CheckedSpace = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals and text) or text[0] in "([{" or ".." in text:
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


def distribution(name: str, values: Range | list[Choice]) -> BaseDistribution:
    """Optuna's distribution of the values of ``name``."""
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution(values)
    is_float_field = name in FIELDS and not FIELDS[name].is_integer
    if values.is_integer and not is_float_field:
        step = 1 if values.step is None else int(values.step)
        return distributions.IntDistribution(
            int(values.low), int(values.high), log=values.log, step=step
        )
    return distributions.FloatDistribution(
        float(values.low), float(values.high), log=values.log, step=values.step
    )
