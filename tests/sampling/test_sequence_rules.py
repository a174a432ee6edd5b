"""The rules that look at the sequence: known rows, and the processors of transformers.

The lists are those of the specification in code, llm_sampling/sequence_rules.py.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from llm_sampling.sequence_rules import SequenceRules, packed_sequences, penalty_list

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
