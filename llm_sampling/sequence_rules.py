"""Rules that look at the sequence of a row, and the list of tokens that they lower: step 5a.

A rule looks at the ids of prompt and output in order. It gives amounts that are subtracted from the
logits of some tokens; an infinite amount bans the token. :func:`penalty_list` is the specification
of docs/semantics.md, step 5a, in code: slow, obvious, and the judge of what the kernels' own makers
of lists give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a rule lowers a token of a row.

    Attributes:
        rule: the parameter that switches the rule on: "dry_multiplier", "no_repeat_ngram_size",
            "bad_words" or "min_tokens".
        amount: what it subtracts from the token's logit; inf bans the token.
        length: how many of the last ids the rule found: those that the token followed before, or
            the others of a bad word; and for min_tokens, how many ids the output has.
        place: where the token last followed them, as an index of the ids without padding; None for
            a bad word and for min_tokens.
    """

    rule: str
    amount: float
    length: int
    place: int | None = None


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
    reasons = penalty_reasons(rules, ids, output_length, vocab_size)
    return {id_: max(reason.amount for reason in of_id) for id_, of_id in reasons.items()}


def penalty_reasons(
    rules: SequenceRules, ids: Sequence[int], output_length: int, vocab_size: int
) -> dict[int, list[Reason]]:
    """Every reason for each entry of :func:`penalty_list`, with the same arguments.

    The amount of an entry is the largest of its reasons: a ban beats a penalty.
    """
    text = [id_ for id_ in ids if 0 <= id_ < vocab_size]
    found: dict[int, list[Reason]] = {}
    for id_, reason in (*_dry(rules, text), *_banned(rules, text, output_length)):
        of_id = found.setdefault(id_, [])
        if reason not in of_id:
            of_id.append(reason)
    return {id_: found[id_] for id_ in sorted(found) if 0 <= id_ < vocab_size}


def matches(text: Sequence[int]) -> list[int]:
    """For each place of a text, how many ids before it are its last ids, in the same order."""
    return [_match(text, place) for place in range(len(text))]


def breaks(text: Sequence[int], breakers: TokenSequences) -> Iterator[tuple[int, int]]:
    """Where breakers are complete in a text, from its end.

    For each place, how many ids follow it, and how many ids the shortest of its breakers has.
    """
    for following in range(len(text)):
        end = len(text) - following
        lengths = [len(one) for one in breakers if _ends_with(text, end, one)]
        if lengths:
            yield following, min(lengths)


def _dry(rules: SequenceRules, text: list[int]) -> Iterator[tuple[int, Reason]]:
    """DRY: the tokens that would continue a match of the end of the text with an earlier place."""
    if rules.dry_multiplier == 0.0:
        return
    last = rules.dry_penalty_last_n
    begin = 0 if last < 0 else max(len(text) - last, 0)
    seen = text[begin:]
    # how many ids follow the last complete breaker
    room, _ = next(breaks(seen, rules.dry_breakers), (len(seen), 0))
    longest: dict[int, tuple[int, int]] = {}  # length and place
    for place in range(1, len(seen)):
        match = min(_match(seen, place), room)
        if match >= rules.dry_allowed_length:
            id_ = seen[place]
            longest[id_] = max(longest.get(id_, (0, 0)), (match, begin + place))
    alone = {breaker[0] for breaker in rules.dry_breakers if len(breaker) == 1}
    for id_, (match, place) in longest.items():
        if id_ not in alone:
            amount = _amount(rules, min(match - rules.dry_allowed_length, MAX_EXCESS))
            yield id_, Reason("dry_multiplier", amount, match, place)


def _amount(rules: SequenceRules, excess: int) -> float:
    """The amount for a match that is longer than allowed by so many tokens, in float32."""
    base = np.float32(rules.dry_base)
    amount = np.float32(rules.dry_multiplier)
    for _ in range(excess):
        amount = min(amount * base, np.float32(MAX_AMOUNT))
    return float(amount)


def _banned(
    rules: SequenceRules, text: list[int], output_length: int
) -> Iterator[tuple[int, Reason]]:
    size, window = rules.no_repeat_ngram_size, rules.no_repeat_ngram_window
    if size > 0:
        begin = 0 if window == 0 else max(len(text) - window, 0)
        seen = text[begin:]
        last: dict[int, int] = {}
        for place in range(len(seen)):
            if size == 1 or (place > 0 and _match(seen, place) >= size - 1):
                last[seen[place]] = begin + place
        for id_, place in last.items():
            yield id_, Reason("no_repeat_ngram_size", math.inf, size - 1, place)
    for word in rules.bad_words:
        if text[len(text) - len(word) + 1 :] == list(word[:-1]) and len(word) <= len(text) + 1:
            yield word[-1], Reason("bad_words", math.inf, len(word) - 1)
    if output_length < rules.min_tokens:
        for id_ in rules.stop_token_ids:
            yield id_, Reason("min_tokens", math.inf, output_length)


def _match(seen: Sequence[int], place: int) -> int:
    """How many ids before a place are the last ids of the text, in the same order."""
    length = 0
    while length < place and seen[place - 1 - length] == seen[-1 - length]:
        length += 1
    return length


def _ends_with(text: Sequence[int], end: int, sequence: Sequence[int]) -> bool:
    """Whether a sequence is complete at a place of a text."""
    length = len(sequence)
    return 0 < length <= end and list(text[end - length : end]) == list(sequence)
