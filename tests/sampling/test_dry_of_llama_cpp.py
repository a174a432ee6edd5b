"""DRY beside llama.cpp's: the same tokens, and amounts that differ by rounding alone.

dry_of_llama_cpp.json has answers of llama.cpp, with which every run compares. ``pytest -m
llama_cpp`` asks llama.cpp itself, where llama-cpp-python is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dry_of_llama_cpp import (
    PATH,
    STRINGS,
    Breakers,
    Case,
    Dry,
    LlamaCpp,
    answers,
    as_json,
    differing_cases,
    random_cases,
)

from llm_sampling.generation import dry_breakers_from, models
from llm_sampling.sequence_rules import MAX_AMOUNT, MAX_EXCESS, SequenceRules, penalty_list

#: llama.cpp's bound of the logarithm of a power: that of the largest float32.
MAX_LOG = np.float32(88.7228391)
#: The size of SmolLM2's vocabulary.
VOCAB_SIZE = 49152
#: How many random samplers and histories for each of them are compared with llama.cpp itself.
SAMPLERS, HISTORIES = 100, 30


def rules_of(case: Case, known: dict[str, Breakers]) -> SequenceRules:
    """The rules of a case; breakers with ids that the history does not have are left out."""
    ids = {*case["ids"], *case["amounts"]}
    breakers = [one for string in case["strings"] for one in known[string] if ids.issuperset(one)]
    return SequenceRules(**case["rules"], dry_breakers=breakers)


def list_of(rules: SequenceRules, ids: Sequence[int]) -> dict[int, float]:
    return penalty_list(rules, ids, 0, VOCAB_SIZE)


def their_amount(rules: SequenceRules, excess: int) -> float:
    """A power in float64, times the multiplier, rounded to float32.

    The exponent is bounded so that the power is about the largest float32 at most, unless the base
    is 1 or nearly so.
    """
    multiplier, base = np.float32(rules.dry_multiplier), np.float32(rules.dry_base)
    if base > np.float32(1.000001):
        excess = min(excess, int(MAX_LOG / np.log(base)))
    with np.errstate(over="ignore"):
        return float(np.float32(float(multiplier) * math.pow(float(base), excess)))


@functools.cache
def amounts_of(multiplier: float, base: float) -> list[tuple[float, float]]:
    """Our amount and llama.cpp's for matches that are longer than allowed by 0, 1, 2, ... tokens.

    Ours is rounded to float32 after each product, llama.cpp's once. So they differ by at most 2^-24
    for each time, relatively, up to the largest amount that there is here.
    """
    rules = SequenceRules(dry_multiplier=multiplier, dry_base=base)
    pairs: list[tuple[float, float]] = []
    ours = np.float32(multiplier)
    for excess in range(MAX_EXCESS + 1):
        theirs, most = their_amount(rules, excess), (excess + 1) * 2.0**-24
        if ours < MAX_AMOUNT:
            assert abs(float(ours) - theirs) <= most * theirs
        else:
            assert theirs >= MAX_AMOUNT * (1 - most)
        pairs.append((float(ours), theirs))
        ours = min(ours * np.float32(base), np.float32(MAX_AMOUNT))
    return pairs


def are_equal(rules: SequenceRules, ours: dict[int, float], theirs: dict[int, float]) -> bool:
    """Whether the ids are the same, and both amounts of each those of one length, to the bit."""
    pairs = amounts_of(rules.dry_multiplier, rules.dry_base)
    return set(ours) == set(theirs) and all((ours[id_], theirs[id_]) in pairs for id_ in ours)


def as_the_nearest_head_breaks(rules: SequenceRules, ids: Sequence[int]) -> SequenceRules:
    """The rules with the one breaker that llama.cpp uses: that with the last first token.

    Of several with the same first token it is the longest. Single tokens remain, since they get no
    amount; the last of them is no later than the first token of the one.
    """
    last = rules.dry_penalty_last_n
    seen = list(ids) if last < 0 else list(ids)[max(0, len(ids) - last) :]
    alone = [one for one in rules.dry_breakers if len(one) == 1]
    for place in reversed(range(len(seen))):
        here = [one for one in rules.dry_breakers if seen[place : place + len(one)] == list(one)]
        if here:
            return replace(rules, dry_breakers=[*alone, max(here, key=len)])
    return replace(rules, dry_breakers=alone)


def unequal(case: Case, known: dict[str, Breakers]) -> str | None:
    """What differs between the list of a case and llama.cpp's amounts; None if nothing does."""
    rules = rules_of(case, known)
    if are_equal(rules, list_of(rules, case["ids"]), case["amounts"]):
        return None
    nearest = as_the_nearest_head_breaks(rules, case["ids"])
    if are_equal(nearest, list_of(nearest, case["ids"]), case["amounts"]):
        return "a breaker within a breaker"
    return "unknown"


# ---- the file


def with_ids(case: Case) -> Case:
    return case | {"amounts": {int(token): amount for token, amount in case["amounts"].items()}}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found = json.loads(PATH.read_text(encoding="utf-8"))
    found["cases"] = [with_ids(case) for case in found["cases"]]
    found["differences"] = {name: with_ids(case) for name, case in found["differences"].items()}
    return found


def test_recorded_amounts(recorded: dict[str, Any]) -> None:
    found = [unequal(case, recorded["breakers"]) for case in recorded["cases"]]
    assert {*found} <= {None, "a breaker within a breaker"}
    assert found.count(None) >= 150
    assert sum(len(case["amounts"]) for case in recorded["cases"]) > 120
    assert {string for case in recorded["cases"] for string in case["strings"]} == {*STRINGS}


@pytest.mark.parametrize("change", ["multiplier", "base", "allowed_length", "penalty_last_n"])
def test_a_wrong_parameter_is_seen(recorded: dict[str, Any], change: str) -> None:
    wrong = 0
    for case in recorded["cases"]:
        name = f"dry_{change}"
        rules = case["rules"] | {name: case["rules"][name] + 1}
        wrong += unequal(case | {"rules": rules}, recorded["breakers"]) == "unknown"
    assert wrong > 5


def test_breakers_that_are_left_out_are_seen(recorded: dict[str, Any]) -> None:
    cases = [case | {"strings": []} for case in recorded["cases"] if case["strings"]]
    assert sum(unequal(case, {}) == "unknown" for case in cases) > 20


def test_a_breaker_within_a_breaker(recorded: dict[str, Any]) -> None:
    """R is how many ids follow the last complete breaker, here " the cat the": none.

    llama.cpp looks for the last first token of a breaker. It finds " cat", which one id follows.
    """
    case = recorded["differences"]["a breaker within a breaker"]
    assert unequal(case, recorded["breakers"]) == "a breaker within a breaker"
    the, dog, _, cat, _ = case["ids"]
    assert {(the, cat, the), (cat,)} <= {
        tuple(b) for b in rules_of(case, recorded["breakers"]).dry_breakers
    }
    assert list_of(rules_of(case, recorded["breakers"]), case["ids"]) == {}
    assert case["amounts"] == {dog: case["rules"]["dry_multiplier"]}


def test_a_long_match(recorded: dict[str, Any]) -> None:
    """A match counts up to 255 tokens more than are allowed; llama.cpp has no such bound."""
    case = recorded["differences"]["a long match"]
    rules, length = rules_of(case, {}), len(case["ids"]) - 1
    (token,) = {*case["ids"]}
    assert list_of(rules, case["ids"]) == {token: amounts_of(1.0, rules.dry_base)[255][0]}
    assert length - rules.dry_allowed_length > 255
    assert case["amounts"] == {token: their_amount(rules, length - rules.dry_allowed_length)}


def test_a_large_amount(recorded: dict[str, Any]) -> None:
    """An amount is at most 2^100; llama.cpp bounds the exponent, by the largest float32."""
    case = recorded["differences"]["a large amount"]
    rules, excess = rules_of(case, {}), len(case["ids"]) - 2
    (token,) = {*case["ids"]}
    assert list_of(rules, case["ids"]) == {token: 2.0**100}
    assert rules.dry_base**excess > 2.0**128 > case["amounts"][token] > 2.0**126
    assert case["amounts"] == {token: their_amount(rules, excess)}


@pytest.mark.model
def test_recorded_breakers(recorded: dict[str, Any], smollm: Any) -> None:
    def of(strings: Sequence[str]) -> set[tuple[int, ...]]:
        return {tuple(one) for string in strings for one in recorded["breakers"][string]}

    assert {*dry_breakers_from(smollm.tokenizer)} == of(STRINGS[:4])
    assert {*dry_breakers_from(smollm.tokenizer, STRINGS)} == of(STRINGS)


# ---- llama.cpp itself


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.fail("needs llama-cpp-python, CONTRIBUTING.md says how to install it")
    return LlamaCpp(models.default_model_path())


@pytest.fixture(scope="module")
def known(llama: LlamaCpp) -> dict[str, Breakers]:
    return {string: llama.breakers(string) for string in STRINGS}


@pytest.mark.llama_cpp
def test_the_file_is_what_llama_cpp_gives(llama: LlamaCpp) -> None:
    recorded, found = PATH.read_text(encoding="utf-8"), as_json(answers())
    # another version shall give the same
    assert recorded.splitlines()[2:] == found.splitlines()[2:]


@pytest.mark.llama_cpp
def test_random_histories(llama: LlamaCpp, known: dict[str, Breakers]) -> None:
    assert llama.size == VOCAB_SIZE
    cases = list(random_cases(llama, known, SAMPLERS, HISTORIES, 200))
    found = [unequal(case, known) for case in cases]
    assert len(found) == SAMPLERS * HISTORIES == 3000
    assert {*found} == {None, "a breaker within a breaker"}
    assert found.count(None) > 2900
    assert sum(bool(case["amounts"]) for case in cases) > 1000
    assert (
        sum(MAX_AMOUNT in list_of(rules_of(case, known), case["ids"]).values() for case in cases)
        > 20
    )


@pytest.mark.llama_cpp
def test_what_differs(llama: LlamaCpp, recorded: dict[str, Any]) -> None:
    assert dict(differing_cases(llama)) == recorded["differences"]


@pytest.mark.llama_cpp
def test_a_window_below_zero_is_off(llama: LlamaCpp) -> None:
    """Here -1 is all ids; llama.cpp takes whatever is below 0 for 0."""
    rules = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1}
    below = Dry(llama, rules | {"dry_penalty_last_n": -2}, [])  # Dry replaces -1
    assert below.amounts([5, 5, 5]) == {}
    assert list_of(SequenceRules(**rules, dry_penalty_last_n=-1), [5, 5, 5]) == {5: 2.0}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("strings", [list(STRINGS[:4]), *([string] for string in STRINGS[4:])])
def test_single_tokens(llama: LlamaCpp, known: dict[str, Breakers], strings: list[str]) -> None:
    """After a text in which each token of the vocabulary follows "a", all but breakers get one."""
    before = llama.tokens(b"a")[0]
    others = [token for token in range(llama.size) if token != before]
    ids = [before, *(one for token in others for one in (token, before))]
    rules = {"dry_multiplier": 1.0, "dry_base": 1.75, "dry_allowed_length": 1}
    amounts = Dry(llama, rules | {"dry_penalty_last_n": -1}, strings).amounts(ids)
    alone = {one[0] for string in strings for one in known[string] if len(one) == 1}
    assert {*amounts} == {*others} - alone
    assert {*amounts.values()} == {1.0}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("string", [string for string in STRINGS[4:] if string != " cat"])
def test_first_tokens(llama: LlamaCpp, known: dict[str, Breakers], string: str) -> None:
    """Tokens before the rest of a breaker: no match goes across one that begins a breaker."""
    rules = {"dry_multiplier": 1.0, "dry_base": 1.75, "dry_allowed_length": 1}
    rules["dry_penalty_last_n"] = -1
    sampler = Dry(llama, rules, [string])
    draw = random.Random(0)
    (after,), (next_,) = llama.tokens(b"a"), llama.tokens(b"b")
    number = 0
    for rest in sorted({tuple(one[1:]) for one in known[string]}):
        heads = {one[0] for one in known[string] if tuple(one[1:]) == rest}
        for token in {*heads, *draw.sample(range(llama.size), 2000)}:
            ids = [token, *rest, after, next_, token, *rest, after]
            amounts = sampler.amounts(ids, [next_])
            case = {"rules": rules, "strings": [string], "ids": ids, "amounts": amounts}
            own = rules_of(case, known)
            assert are_equal(own, {next_: list_of(own, ids)[next_]}, amounts), (token, rest)
            number += amounts == {next_: 1.0}
    assert number >= len(known[string])
