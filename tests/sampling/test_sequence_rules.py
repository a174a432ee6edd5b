"""The rules that look at the sequence: known rows, and the processors of transformers.

The lists are those of the specification in code, llm_sampling/sequence_rules.py.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from sequence_lists import random_case

from llm_sampling.sequence_rules import (
    SequenceRules,
    breaks,
    matches,
    packed_sequences,
    penalty_list,
    penalty_reasons,
)

ALL = math.inf
#: How many random histories each rule of transformers gets.
HISTORIES = 3000


@pytest.mark.parametrize(
    ("rules", "ids", "expected"),
    [
        ({"no_repeat_ngram_size": 2}, [1, 3, 0, 1, 3], {0: ALL}),
        ({"no_repeat_ngram_size": 1}, [1, 3, 0, 1, 3], {0: ALL, 1: ALL, 3: ALL}),
        ({"no_repeat_ngram_size": 1, "no_repeat_ngram_window": 2}, [0, 1, 3], {1: ALL, 3: ALL}),
        ({"no_repeat_ngram_size": 3, "no_repeat_ngram_window": 5}, [1, 2, 0, 4, 1, 2], {}),
        ({"no_repeat_ngram_size": 6}, [1, 2], {}),
        ({"bad_words": [[4], [1, 3]]}, [1, 3, 0, 1, 3], {4: ALL}),
        ({"bad_words": [[4], [1, 3]]}, [1, 3, 0, 1], {3: ALL, 4: ALL}),
        ({"bad_words": [[1, 3, 5]]}, [3], {}),
        ({"bad_words": [[9], [-1]]}, [3], {}),
        ({"min_tokens": 9, "stop_token_ids": [3]}, [1, 3, 0, 1, 3], {3: ALL}),
        ({"min_tokens": 5, "stop_token_ids": [3]}, [1, 3, 0, 1, 3], {}),
        ({"dry_multiplier": 1.0}, [1, 2, 3, 1, 2], {3: 1.0}),
        ({"dry_multiplier": 1.0}, [5, 1, 2, 3, 5, 1, 2], {3: 1.75}),
        ({"dry_multiplier": 1.0, "dry_allowed_length": 3}, [1, 2, 3, 1, 2], {}),
        ({"dry_multiplier": 1.0, "dry_penalty_last_n": 4}, [1, 2, 3, 1, 2], {}),
        ({"dry_multiplier": 1.0, "dry_penalty_last_n": 0}, [1, 2, 3, 1, 2], {}),
        ({"dry_multiplier": 1.0, "dry_breakers": [[2]]}, [1, 2, 3, 1, 2], {}),
        ({"dry_multiplier": 1.0, "dry_breakers": [[0]]}, [4, 0, 1, 2, 3, 4, 0, 1, 2], {3: 1.0}),
        ({"dry_multiplier": 1.0, "dry_breakers": [[3]]}, [1, 2, 3, 1, 2], {}),
        ({"dry_multiplier": 1.0, "dry_breakers": [[4, 0]]}, [4, 0, 1, 2, 3, 4, 0, 1, 2], {3: 1.0}),
        ({"dry_multiplier": 1.0, "no_repeat_ngram_size": 3}, [1, 2, 3, 1, 2], {3: ALL}),
        ({"dry_multiplier": 1.0}, [1, -1, 2, 3, 1, 99, 2], {3: 1.0}),
        ({}, [1, 2, 3, 1, 2], {}),
    ],
)
def test_known_lists(rules: dict[str, Any], ids: list[int], expected: dict[int, float]) -> None:
    output = sum(0 <= id_ < 6 for id_ in ids)
    assert penalty_list(SequenceRules(**rules), ids, output, 6) == expected


#: The parameters of each rule, by the one that switches it on.
OF_RULE = {
    "dry_multiplier": [name for name in SequenceRules.__slots__ if name.startswith("dry_")],
    "no_repeat_ngram_size": ["no_repeat_ngram_size", "no_repeat_ngram_window"],
    "bad_words": ["bad_words"],
    "min_tokens": ["min_tokens", "stop_token_ids"],
}


def test_each_reason_is_that_of_its_rule_alone() -> None:
    """The list of one rule has the amounts of its reasons, and the facts of a reason are true."""
    draw = random.Random(5)
    counts = dict.fromkeys(OF_RULE, 0)
    several = 0
    for _ in range(HISTORIES // 5):
        rules, text, extra, output_length, vocab_size = random_case(draw, draw.choice((3, 6, 500)))
        ids = [id_ for id_ in text + extra if 0 <= id_ < vocab_size]
        reasons = penalty_reasons(rules, text + extra, output_length, vocab_size)
        several += any(len({reason.rule for reason in of_id}) > 1 for of_id in reasons.values())
        assert penalty_list(rules, text + extra, output_length, vocab_size) == {
            id_: max(reason.amount for reason in of_id) for id_, of_id in reasons.items()
        }
        for rule, names in OF_RULE.items():
            alone = SequenceRules(**{name: getattr(rules, name) for name in names})
            assert penalty_list(alone, text + extra, output_length, vocab_size) == {
                id_: max(reason.amount for reason in of_id if reason.rule == rule)
                for id_, of_id in reasons.items()
                if any(reason.rule == rule for reason in of_id)
            }
        for id_, of_id in reasons.items():
            for reason in of_id:
                counts[reason.rule] += 1
                end = ids[len(ids) - reason.length :]
                if reason.rule == "min_tokens":
                    assert reason.length == output_length < rules.min_tokens
                    assert id_ in rules.stop_token_ids
                elif reason.rule == "bad_words":
                    assert [*end, id_] in rules.bad_words
                else:
                    assert reason.place is not None
                    assert ids[reason.place] == id_
                    assert ids[reason.place - reason.length : reason.place] == end
    assert min(counts.values()) > 50, counts
    assert several > 50


def test_a_ban_beats_a_penalty_and_every_rule_gives_its_reason() -> None:
    rules = SequenceRules(
        dry_multiplier=0.5,
        no_repeat_ngram_size=2,
        bad_words=[[2, 3], [3], [2, 3]],
        min_tokens=6,
        stop_token_ids=[3, 3],
    )
    (reasons,) = penalty_reasons(rules, [1, 2, 3, 9, 1, 2], 5, 6).values()
    assert [(one.rule, one.amount, one.length, one.place) for one in reasons] == [
        ("dry_multiplier", 0.5, 2, 2),
        ("no_repeat_ngram_size", ALL, 1, 2),
        ("bad_words", ALL, 1, None),
        ("bad_words", ALL, 0, None),
        ("min_tokens", ALL, 5, None),
    ]


def test_the_length_of_a_reason_is_not_cut() -> None:
    text = [1] * 400
    ((reason,),) = penalty_reasons(SequenceRules(dry_multiplier=1e-3), text, 0, 6).values()
    assert (reason.length, reason.place) == (399, 399)
    assert reason.amount == 2.0**100


def test_matches_and_breaks() -> None:
    assert matches([]) == []
    assert matches([1, 3, 0, 1, 3]) == [0, 0, 2, 0, 0]
    assert matches([2, 2, 2]) == [0, 1, 2]
    text = [4, 0, 1, 4, 0, 5]
    assert list(breaks(text, [[4, 0], [5, 5], [4, 0, 5], [0]])) == [(0, 3), (1, 1), (4, 1)]
    assert list(breaks(text, [[], [9]])) == []
    assert list(breaks([], [[1]])) == []


def random_ids(draw: random.Random, vocab_size: int) -> list[int]:
    """A text of at least one id, about half of them texts that repeat themselves."""
    length = draw.randint(1, 40)
    period = draw.choice((length, draw.randint(1, 8)))
    some = draw.choices(range(vocab_size), k=period)
    return [
        some[i % period] if draw.random() < 0.9 else draw.randrange(vocab_size)
        for i in range(length)
    ]


def banned(rules: SequenceRules, ids: list[int], output_length: int, vocab_size: int) -> set[int]:
    found = penalty_list(rules, ids, output_length, vocab_size)
    assert set(found.values()) <= {ALL}
    return set(found)


def assert_banned_alike(
    processor: Any, rules: SequenceRules, ids: list[int], output_length: int, vocab_size: int
) -> bool:
    """Assert that rules ban what a processor of transformers bans; return whether they ban any."""
    ours = banned(rules, ids, output_length, vocab_size)
    assert ours == banned_by(processor, ids, vocab_size), (rules, ids)
    return bool(ours)


def banned_by(processor: Any, ids: list[int], vocab_size: int) -> set[int]:
    scores = processor(torch.tensor([ids]), torch.zeros(1, vocab_size))
    return set((scores[0] == -ALL).nonzero()[:, 0].tolist())


def test_ngrams_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    draw = random.Random(0)
    number = 0
    for _ in range(HISTORIES):
        vocab_size, size = draw.choice((2, 5, 30)), draw.randint(1, 5)
        ids = random_ids(draw, vocab_size)
        rules = SequenceRules(no_repeat_ngram_size=size)
        processor = transformers.NoRepeatNGramLogitsProcessor(size)
        number += assert_banned_alike(processor, rules, ids, 0, vocab_size)
    assert number > HISTORIES / 2


def test_bad_words_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    draw = random.Random(1)
    number = 0
    for _ in range(HISTORIES):
        vocab_size = draw.choice((2, 5, 30))
        ids = random_ids(draw, vocab_size)
        words = [
            draw.choices(range(vocab_size), k=draw.randint(1, 3)) for _ in range(draw.randint(1, 5))
        ]
        if draw.random() < 0.5:
            words.append([*ids[-draw.randint(1, 6) :], draw.randrange(vocab_size)])
        rules = SequenceRules(bad_words=words)
        processor = transformers.NoBadWordsLogitsProcessor(words)
        number += assert_banned_alike(processor, rules, ids, 0, vocab_size)
    assert number > HISTORIES / 2


def test_the_shortest_output_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    draw = random.Random(2)
    number = 0
    for _ in range(HISTORIES):
        vocab_size, least = draw.choice((2, 5, 30)), draw.randint(1, 12)
        ids = random_ids(draw, vocab_size)
        prompt = draw.randint(0, len(ids))
        stop = sorted({*draw.choices(range(vocab_size), k=draw.randint(1, 3))})
        rules = SequenceRules(min_tokens=least, stop_token_ids=stop)
        processor = transformers.MinNewTokensLengthLogitsProcessor(prompt, least, stop)
        number += assert_banned_alike(processor, rules, ids, len(ids) - prompt, vocab_size)
    assert HISTORIES / 5 < number < HISTORIES * 4 / 5


def packed(rules: SequenceRules) -> list[int]:
    return packed_sequences(rules.dry_breakers, rules.bad_words, rules.stop_token_ids)


def test_records_of_sequences() -> None:
    rules = SequenceRules(
        dry_breakers=[[9], [4, 2], [3], [9]], bad_words=[[7], [1, 2]], stop_token_ids=[5, 6]
    )
    records = [[0, 2, 3, 9], [1, 2, 4, 2], [2, 1, 7], [2, 2, 1, 2], [3, 2, 5, 6]]
    assert packed(rules) == [number for record in records for number in record]
    assert packed(SequenceRules()) == []
