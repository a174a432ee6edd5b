"""Rules that look at the sequence of a row, and the list of tokens that they lower: step 5a.

A rule looks at the ids of prompt and output in order. It gives amounts that are subtracted from the
logits of some tokens; an infinite amount bans the token. :func:`penalty_list` is the specification
of docs/semantics.md, step 5a, in code: slow, obvious, and the judge of what the kernels' own makers
of lists give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Matches longer than ``dry_allowed_length`` by more than this count as longer by this.
MAX_EXCESS = 255
#: The largest amount that is no ban.
MAX_AMOUNT = 2.0**100

TokenSequences = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """The rules of one row, with values in their ranges.

    Attributes:
        dry_multiplier: the amount for a match of ``dry_allowed_length`` tokens; 0 is off.
        dry_base: how many times that amount each further token of the match makes it.
        dry_allowed_length: shorter matches cost nothing; at least 1.
        dry_penalty_last_n: DRY looks at the last so many ids; -1 is all.
        dry_breakers: token sequences that no match goes across.
        no_repeat_ngram_size: no sequence of so many ids comes twice; 0 is off.
        no_repeat_ngram_window: that rule looks at the last so many ids; 0 is all.
        bad_words: token sequences that are never completed.
        min_tokens: until the output has so many ids, ``stop_token_ids`` are banned.
        stop_token_ids: see ``min_tokens``.
    """

    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: TokenSequences = ()
    no_repeat_ngram_size: int = 0
    no_repeat_ngram_window: int = 0
    bad_words: TokenSequences = ()
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()


#: What a record of token sequences is for, as the kernels number it.
BREAKER_IDS, BREAKER, BAD_WORD, STOP_IDS = range(4)


def packed_sequences(
    breakers: TokenSequences, bad_words: TokenSequences, stop_token_ids: Sequence[int]
) -> list[int]:
    """The token sequences of a row as the kernels read them.

    Records, one after the other: a kind, the number of ids, and the ids. Breakers of a single token
    are one record, by rising id.
    """
    alone = sorted({breaker[0] for breaker in breakers if len(breaker) == 1})
    records = [
        (BREAKER_IDS, alone),
        *((BREAKER, breaker) for breaker in breakers if len(breaker) > 1),
        *((BAD_WORD, word) for word in bad_words),
        (STOP_IDS, stop_token_ids),
    ]
    return [number for kind, ids in records if ids for number in (kind, len(ids), *ids)]


def records_of(packed: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The records of :func:`packed_sequences`: a kind and ids each."""
    place = 0
    while len(packed) - place >= 2:
        kind, count = packed[place], max(packed[place + 1], 0)
        yield kind, list(packed[place + 2 : place + 2 + count])
        place += 2 + count


def rules_of(numbers: Mapping[str, float], packed: Sequence[int]) -> SequenceRules:
    """The rules of a row, from its numbers by name and its packed token sequences."""
    breakers: list[list[int]] = []
    words: list[list[int]] = []
    stop_ids: list[int] = []
    for kind, ids in records_of(packed):
        if kind == BREAKER_IDS:
            breakers += [[token] for token in ids]
        elif kind == BREAKER:
            breakers.append(ids)
        elif kind == BAD_WORD:
            words.append(ids)
        elif kind == STOP_IDS:
            stop_ids += ids
    values: dict[str, Any] = dict(numbers)
    return SequenceRules(**values, dry_breakers=breakers, bad_words=words, stop_token_ids=stop_ids)


def penalty_list(
    rules: SequenceRules, ids: Sequence[int], output_length: int, vocab_size: int
) -> dict[int, float]:
    """The amounts that are subtracted from a row's logits, by rising token id; inf is a ban.

    Args:
        rules: of the row.
        ids: prompt and output in order; those outside of the vocabulary are padding.
        output_length: how many ids, without padding, are the output's.
        vocab_size: ids of rules outside of ``0 .. vocab_size - 1`` are left out.
    """
    text = [id_ for id_ in ids if 0 <= id_ < vocab_size]
    amounts = _dry(rules, text)
    amounts |= dict.fromkeys(_banned(rules, text, output_length), math.inf)
    return {id_: amounts[id_] for id_ in sorted(amounts) if 0 <= id_ < vocab_size}


def _dry(rules: SequenceRules, text: list[int]) -> dict[int, float]:
    """DRY: the tokens that would continue a match of the end of the text with an earlier place."""
    if rules.dry_multiplier == 0.0:
        return {}
    last = rules.dry_penalty_last_n
    seen = text if last < 0 else text[len(text) - min(last, len(text)) :]
    allowed = rules.dry_allowed_length
    # how many ids follow the last complete breaker
    room = next((n for n in range(len(seen)) if _ends_with(seen, n, rules.dry_breakers)), len(seen))
    longest: dict[int, int] = {}
    for place in range(1, len(seen)):
        match = min(_match(seen, place), room, allowed + MAX_EXCESS)
        if match >= allowed:
            longest[seen[place]] = max(longest.get(seen[place], 0), match)
    alone = {breaker[0] for breaker in rules.dry_breakers if len(breaker) == 1}
    return {
        id_: _amount(rules, match - allowed) for id_, match in longest.items() if id_ not in alone
    }


def _amount(rules: SequenceRules, excess: int) -> float:
    """The amount for a match that is longer than allowed by so many tokens, in float32."""
    base = np.float32(rules.dry_base)
    amount = np.float32(rules.dry_multiplier)
    for _ in range(excess):
        amount = min(amount * base, np.float32(MAX_AMOUNT))
    return float(amount)


def _banned(rules: SequenceRules, text: list[int], output_length: int) -> Iterable[int]:
    size, window = rules.no_repeat_ngram_size, rules.no_repeat_ngram_window
    if size > 0:
        seen = text if window == 0 else text[-window:]
        for place in range(len(seen)):
            if size == 1 or (place > 0 and _match(seen, place) >= size - 1):
                yield seen[place]
    for word in rules.bad_words:
        if text[len(text) - len(word) + 1 :] == list(word[:-1]) and len(word) <= len(text) + 1:
            yield word[-1]
    if output_length < rules.min_tokens:
        yield from rules.stop_token_ids


def _match(seen: list[int], place: int) -> int:
    """How many ids before a place are the last ids of the text, in the same order."""
    length = 0
    while length < place and seen[place - 1 - length] == seen[-1 - length]:
        length += 1
    return length


def _ends_with(seen: list[int], following: int, sequences: TokenSequences) -> bool:
    """Whether one of the sequences is complete where so many ids follow it."""
    end = len(seen) - following
    return any(0 < len(one) <= end and seen[end - len(one) : end] == list(one) for one in sequences)
