"""Checks of arguments. Each raises a ValueError that names the argument, the rule and the value.

This module imports nothing else of the package.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def refusal(name: str, rule: str, value: object) -> ValueError:
    """The error for an argument that breaks its rule, to be raised by the caller."""
    return ValueError(f"{name} must be {rule}, got {value!r}")


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of any type, numpy's included, and not a bool."""
    return type(value) is int or (
        isinstance(value, numbers.Integral) and not isinstance(value, bool)
    )


def integer(name: str, value: object, rule: str = "an integer") -> int:
    """``value`` as an int.

    Raises:
        ValueError: it is not an integer, or it is a bool.
    """
    if type(value) is int:
        return value
    if not is_integer(value):
        raise refusal(name, rule, value)
    return int(value)  # type: ignore[call-overload,no-any-return]


def integer_at_least(name: str, value: object, least: int) -> int:
    """``value`` as an int.

    Raises:
        ValueError: it is not an integer, it is a bool, or it is below ``least``.
    """
    rule = f"an integer >= {least}"
    checked = integer(name, value, rule)
    if checked < least:
        raise refusal(name, rule, value)
    return checked


def number(name: str, value: object, rule: str = "a finite number") -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is not a real number, it is a bool, NaN, infinite, or too large for a float.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            checked = float(value)
        except OverflowError:  # an int or a fraction past the largest float
            checked = math.inf
        if -math.inf < checked < math.inf:  # which torch.compile can ask of a symbol
            return checked
    raise refusal(name, rule, value)


def true_or_false(name: str, value: object) -> bool:
    """``value`` itself.

    Raises:
        ValueError: it is not a bool.
    """
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value)
    return value


def token_ids(name: str, ids: object) -> list[int]:
    """``ids`` as a list of ints.

    Raises:
        ValueError: it is not a collection, or holds something that is not an integer.
    """
    if not isinstance(ids, Collection) or isinstance(ids, (str, bytes)):
        raise refusal(name, "a collection of token ids", ids)
    return [integer(name, token, "integers") for token in ids]


def _elements(name: str, value: object, rule: str) -> Iterable[Any]:
    """``value`` itself; a ValueError if it is a string or a mapping, or is not iterable."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal(name, rule, value)
    return value


def token_sequence(name: str, ids: object, rule: str) -> tuple[int, ...]:
    """``ids`` as a tuple of ints in [0, 2^31).

    Raises:
        ValueError: it is a string or not iterable, or holds something else; the message has
            ``rule``.
    """
    checked = tuple(integer(name, token, rule) for token in _elements(name, ids, rule))
    for token in checked:
        if not 0 <= token < 2**31:
            raise refusal(name, rule, token)
    return checked


def token_sequences(name: str, sequences: object, rule: str) -> tuple[tuple[int, ...], ...]:
    """``sequences`` as a tuple of tuples of ints in [0, 2^31), none of them empty.

    Raises:
        ValueError: it is something else; the message names the place.
    """
    checked = []
    for place, ids in enumerate(_elements(name, sequences, rule)):
        sequence = token_sequence(f"{name}[{place}]", ids, "token ids in [0, 2^31)")
        if not sequence:
            raise refusal(f"{name}[{place}]", "token ids, one at least", ids)
        checked.append(sequence)
    return tuple(checked)


def strings(name: str, value: object, *, may_be_one: bool = False) -> list[str]:
    """``value`` as a list of strings, none of them empty.

    Args:
        name: of the argument.
        value: the argument.
        may_be_one: whether a single string may be given as it is.

    Raises:
        ValueError: it is not a collection of strings, or one of them is empty.
    """
    rule = "a string or a collection of strings" if may_be_one else "a collection of strings"
    given = [value] if isinstance(value, str) and may_be_one else value
    if not isinstance(given, Collection) or isinstance(given, (str, bytes, bytearray, memoryview)):
        raise refusal(name, rule, value)
    try:
        held = list(given)
    except TypeError:  # an array of no dimensions
        raise refusal(name, rule, value) from None
    if not all(isinstance(string, str) for string in held):
        raise refusal(name, rule, value)
    if not all(held):
        raise ValueError(f"{name} must have no empty string, got {value!r}")
    return held


def mapping_with(name: str, value: object, keys: Collection[str]) -> Mapping[str, Any]:
    """``value`` itself.

    Raises:
        ValueError: it is not a mapping that has all of the keys.
    """
    if not isinstance(value, Mapping) or not set(keys).issubset(value):
        got = [*value] if isinstance(value, Mapping) else value
        raise refusal(name, f"a mapping with {', '.join(sorted(keys))}", got)
    return value
