"""Lists of step 5a: random rows, and calls of several rows for the kernels that make them.

``penalty_list`` judges them, row by row.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import unchecked
from torch import Tensor

from llm_sampling.backends.base import MAX_EXTRA_OUTPUT, VocabSlice
from llm_sampling.params import RULE_COLUMNS
from llm_sampling.sequence_rules import SequenceRules, packed_sequences, penalty_list

#: The rules of a row, the ids that its slot keeps, those of the call, the length of its output
#: without the latter, and vocab_size.
Case = tuple[SequenceRules, list[int], list[int], int, int]

#: The numbers of the rules.
NUMBERS = tuple(column.name for column in RULE_COLUMNS)
MAX_LENGTH = 60
INT32_MAX = 2**31 - 1


def random_case(draw: random.Random, vocab_size: int) -> Case:
    """A row with short texts of few different ids, in which rules find something to lower."""
    length = draw.choice((0, 1, 2, 5, 12, 30, MAX_LENGTH))
    ids = [*range(vocab_size)]
    if vocab_size > 5:
        ids = [0, vocab_size - 1, *draw.sample(ids, draw.randint(1, 4))]
    text = draw.choices(ids, k=length)
    if draw.random() < 0.5 and length > 4:  # a text that repeats itself
        period = draw.randint(1, 5)
        text = [text[i % period] if draw.random() < 0.95 else text[i] for i in range(length)]
    outside = [-1, vocab_size]
    extra = draw.choices([*ids, *outside], k=draw.choice((0, 0, 1, 4, MAX_EXTRA_OUTPUT)))

    def sequences(longest: int) -> list[list[int]]:
        return [
            draw.choices([*ids, *ids, *outside], k=draw.randint(1, longest))
            for _ in range(draw.randint(0, 4))
        ]

    rules = SequenceRules(
        dry_multiplier=draw.choice((0.0, 0.8, 2.0, 100.0)),
        dry_base=draw.choice((1.0, 1.1, 1.75, 100.0)),
        dry_allowed_length=draw.choice((1, 2, 3, 20, INT32_MAX)),
        dry_penalty_last_n=draw.choice((-1, 0, 1, 3, 8, 100)),
        dry_breakers=draw.choice(((), sequences(1), sequences(3))),
        no_repeat_ngram_size=draw.choice((0, 1, 2, 3, 5, INT32_MAX)),
        no_repeat_ngram_window=draw.choice((0, 1, 4, 9, 100)),
        bad_words=draw.choice(((), sequences(4))),
        min_tokens=draw.choice((0, 3, 40)),
        stop_token_ids=draw.choices([*ids, *outside], k=draw.randint(0, 2)),
    )
    return rules, text, extra, draw.randint(0, length), vocab_size


def expected(case: Case) -> dict[int, float]:
    """What the row lists."""
    rules, text, extra, output_length, vocab_size = case
    real = [id_ for id_ in extra if 0 <= id_ < vocab_size]
    return penalty_list(rules, text + real, output_length + len(real), vocab_size)


def packed(rules: SequenceRules) -> list[int]:
    """The records of a row."""
    return packed_sequences(rules.dry_breakers, rules.bad_words, rules.stop_token_ids)


@dataclass(frozen=True)
class ListCall:
    """What the lists of some rows are made of, with the names of the C struct.

    Attributes:
        rules: the columns, by their names.
        max_sequence_ids: how many numbers the records of a row have at most.
    """

    vocab_size: int
    rules: dict[str, Tensor]
    slots: Tensor
    lengths: Tensor
    text: Tensor | None
    text_lengths: Tensor | None
    param_slots: Tensor | None
    sequence_offsets: Tensor
    sequence_counts: Tensor | None
    sequences: Tensor
    extra_output: Tensor | None
    max_sequence_ids: int

    def capacity(self) -> int:
        """How many ids a row may list."""
        max_length = 0 if self.text is None else self.text.shape[1]
        return min(self.vocab_size, max_length + MAX_EXTRA_OUTPUT + self.max_sequence_ids)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        values = (*self.rules.values(), *(getattr(self, field.name) for field in fields(self)))
        return [value for value in values if isinstance(value, Tensor)]


class Lists(NamedTuple):
    """The memory for the lists of a call."""

    bits: Tensor
    before: Tensor
    counts: Tensor
    amounts: Tensor

    def ids_of(self, row: int) -> list[int]:
        """The listed ids of a row, rising, as its bits say."""
        is_set = (self.bits[row][:, None] >> torch.arange(32)) & 1
        ids: list[int] = is_set.flatten().nonzero().flatten().tolist()
        return ids


#: Makes the lists of a call, in the given memory.
Maker = Callable[[ListCall, Lists], None]


def memory_for(call: ListCall) -> Lists:
    """Memory in which something else was before."""
    rows, words, capacity = len(call.slots), -(-call.vocab_size // 32), call.capacity()
    return Lists(
        torch.full((rows, words), -1, dtype=torch.int32),
        torch.full((rows, words), INT32_MAX, dtype=torch.int32),
        torch.full((rows,), INT32_MAX, dtype=torch.int32),
        torch.full((rows, capacity), math.inf),
    )


def int32(values: Sequence[object]) -> Tensor:
    """A tensor of int32."""
    return torch.tensor(values, dtype=torch.int32)


def columns(rules: Sequence[SequenceRules]) -> dict[str, Tensor]:
    """The numbers of the rules, by their names."""
    floats = ("dry_multiplier", "dry_base")
    return {
        name: torch.tensor(
            [getattr(one, name) for one in rules],
            dtype=torch.float32 if name in floats else torch.int32,
        )
        for name in NUMBERS
    }


def call_of(
    cases: Sequence[Case],
    draw: random.Random,
    *,
    by_slot: bool = False,
    max_length: int = MAX_LENGTH,
) -> tuple[ListCall, list[dict[int, float]]]:
    """A call whose rows are these cases, and what its rows list.

    Slots are in any order, and some belong to no row. With ``by_slot`` so do the parameters, and
    two more rows have none.
    """
    rows, vocab_size = len(cases), cases[0][-1]
    slots = draw.sample(range(rows + 2), rows)
    text = [draw.choices(range(vocab_size), k=max_length) for _ in range(rows + 2)]
    text_lengths, lengths = [max_length] * (rows + 2), [0] * (rows + 2)
    for slot, (_, ids, _, output_length, _) in zip(slots, cases, strict=True):
        text[slot][: len(ids)] = ids
        text_lengths[slot], lengths[slot] = len(ids), output_length
    lists = [expected(case) for case in cases]
    extra = [list(case[2]) for case in cases]
    rules = [case[0] for case in cases]
    param_slots = None
    if by_slot:
        entries = draw.sample(range(rows + 1), rows)
        of_entry = dict(zip(entries, rules, strict=True))
        other = SequenceRules(no_repeat_ngram_size=1, bad_words=[[0]])
        rules = [of_entry.get(entry, other) for entry in range(rows + 1)]
        param_slots = int32([*entries, -1, rows + 1])
        slots += slots[:1] * 2
        extra += [[0], [0]]
        lists += [{}, {}]
    records = [packed(one) for one in rules]
    most = max(map(len, records))
    counts = None
    if by_slot:  # each entry has as much room, and in what it does not need are other records
        counts = int32([len(one) for one in records])
        most += 3
        records = [[*one, *([2, 1, 0] * most)[: most - len(one)]] for one in records]
    offsets = [0]
    for one in records:
        offsets.append(offsets[-1] + len(one))
    width = max(map(len, extra))
    padding = (-1, vocab_size, INT32_MAX, -(2**31))
    extra = [[*one, *draw.choices(padding, k=width - len(one))] for one in extra]
    call = ListCall(
        vocab_size=vocab_size,
        rules=columns(rules),
        slots=int32(slots),
        lengths=torch.tensor(lengths),
        text=int32(text),
        text_lengths=torch.tensor(text_lengths),
        param_slots=param_slots,
        sequence_offsets=torch.tensor(offsets),
        sequence_counts=counts,
        sequences=int32([number for one in records for number in one]),
        extra_output=int32(extra) if width else None,
        max_sequence_ids=most,
    )
    return call, lists


def random_call(vocab_size: int, rows: int, seed: int) -> tuple[ListCall, list[dict[int, float]]]:
    """A call of random cases; with an odd seed parameters belong to slots."""
    draw = random.Random(seed)
    cases = [random_case(draw, vocab_size) for _ in range(rows)]
    return call_of(cases, draw, by_slot=seed % 2 == 1)


def without_text(vocab_size: int, rows: int, seed: int) -> tuple[ListCall, list[dict[int, float]]]:
    """The same where no slot keeps its ids: the text of a row is the call's ids."""
    draw = random.Random(seed)
    cases = [
        (rules, [], extra, output_length, vocab_size)
        for rules, _, extra, output_length, _ in (
            random_case(draw, vocab_size) for _ in range(rows)
        )
    ]
    call, lists = call_of(cases, draw, by_slot=seed % 2 == 1)
    return replace(call, text=None, text_lengths=None), lists


def assert_consistent(lists: Lists, vocab_size: int) -> None:
    """Counts and numbers of ids before each word are those of the bits."""
    places = torch.arange(32)
    for row, (bits, before, count, amounts) in enumerate(zip(*lists, strict=True)):
        ids = lists.ids_of(row)
        assert len(ids) == count <= len(amounts)
        assert all(id_ < vocab_size for id_ in ids)
        ones = ((bits[:, None] >> places) & 1).sum(1)
        assert torch.equal(before, (ones.cumsum(0) - ones).int())
        assert (amounts[: int(count)] >= 0).all()


def changing_call(
    guards: unchecked.Guards, seed: int, rows: int, *, is_hostile: bool
) -> tuple[ListCall, Lists]:
    """A call whose tensors will change, and lists whose amounts any write would raise."""
    if is_hostile:
        call = hostile_call(guards, 1000, seed)
    else:
        call, _ = random_call(33, rows, seed)
        tensors = {id(tensor): guards.put(tensor) for tensor in call.tensors()}
        call = mapped(call, lambda tensor: tensors[id(tensor)])
    memory = memory_for(call)
    memory.amounts.fill_(-1.0)
    return call, Lists(*map(guards.put, memory))


def assert_nothing_behind(lists: Lists) -> None:
    """No amount is behind those of the listed ids; ``changing_call`` has made the memory."""
    count, capacity = lists.counts[:, None], lists.amounts.shape[1]
    assert ((count >= 0) & (count <= capacity)).all()
    behind = torch.arange(capacity) >= count
    assert (lists.amounts[behind] == -1.0).all()


def assert_lists(make: Maker, call: ListCall, wanted: Sequence[dict[int, float]]) -> None:
    """The lists of a call are these, and nothing that it reads has changed."""
    before = [tensor.clone() for tensor in call.tensors()]
    lists = memory_for(call)
    make(call, lists)
    assert_consistent(lists, call.vocab_size)
    for row, of_row in enumerate(wanted):
        amounts = lists.amounts[row, : int(lists.counts[row])].tolist()
        assert dict(zip(lists.ids_of(row), amounts, strict=True)) == of_row, row
    assert all(map(torch.equal, before, call.tensors()))


def assert_slices(make: Callable[..., None], seed: int) -> None:
    """Lists of slices, which begin anywhere, are together the list of the whole vocabulary."""
    vocab_size = (7, 33, 1000)[seed % 3]
    call, wanted = random_call(vocab_size, 8, seed)
    chance = random.Random(seed)
    cuts = sorted({0, vocab_size, *chance.choices(range(vocab_size), k=3)})
    found: list[dict[int, float]] = [{} for _ in wanted]
    for first, end in itertools.pairwise(cuts):
        part = replace(call, vocab_size=end - first)
        lists = memory_for(part)
        make(part, lists, vocab_slice=VocabSlice(first, vocab_size))
        assert_consistent(lists, end - first)
        for row, of_row in enumerate(found):
            amounts = lists.amounts[row, : int(lists.counts[row])].tolist()
            ids = [first + id_ for id_ in lists.ids_of(row)]
            of_row.update(zip(ids, amounts, strict=True))
    assert found == wanted


def corner_rows() -> list[Case]:
    """What random rows hardly show: matches and breakers across the beginning of a window."""
    one = [1, 2, 3, 4, 9, 1, 2, 3, 4]
    two = [1, 2, 3, 4, 8, *one]
    dry = SequenceRules(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1)
    return [
        # two of the four ids that match are in the window of DRY, and all in that of n-grams
        (replace(dry, dry_penalty_last_n=7, no_repeat_ngram_size=6), one, [], 0, 33),
        # the same of the first of two matches, while all ids of the second are in both windows
        (replace(dry, dry_penalty_last_n=12, no_repeat_ngram_size=6), two, [], 0, 33),
        (replace(dry, no_repeat_ngram_size=3, no_repeat_ngram_window=6), one, [], 0, 33),
        (replace(dry, no_repeat_ngram_size=3, no_repeat_ngram_window=7), one, [], 0, 33),
        # a breaker that begins before the window is none
        *(
            (
                replace(dry, dry_penalty_last_n=last, dry_breakers=[[9, 1, 2, 1]]),
                [9, 1, 2, 1, 2, 1, 2],
                [],
                0,
                33,
            )
            for last in (6, 7)
        ),
        # matches as long as what follows a breaker, and longer ones
        *((replace(dry, dry_breakers=[[id_]]), one, [], 0, 33) for id_ in (1, 2, 3, 4, 9)),
    ]


# Rows that a span or a round of threads does not hold


def long_matches() -> list[Case]:
    """Amounts grow with the match, up to 255 ids more than allowed and up to 2^100."""
    cases: list[Case] = []
    for base in (1.0, 1.1, 1.75):
        for more in (0, 254, 255, 256, 400):
            same = list(range(1, 3 + more))
            cases.append((SequenceRules(0.8, base), [*same, 9000, 0, *same], [], 0, 10000))
    return cases


def long_rows() -> list[Case]:
    """Texts, breakers, words, stop ids and lists that are longer than what is taken at once."""
    draw = random.Random(3)
    two = draw.choices((7, 39999), k=1500)
    many = draw.sample(range(10, 39999), 1200)
    periodic = [many[i % 700] for i in range(1500)]
    return [
        (SequenceRules(dry_multiplier=1.0, dry_base=1.01, dry_allowed_length=3), two, [], 0, 40000),
        (SequenceRules(no_repeat_ngram_size=5, no_repeat_ngram_window=900), two, [7], 0, 40000),
        (SequenceRules(no_repeat_ngram_size=600), periodic, [many[100], -1], 0, 40000),
        (
            SequenceRules(bad_words=[[*two[-700:], 5], [*two[-701:-1], 6], [8, *two[-700:], 9]]),
            two,
            [],
            0,
            40000,
        ),
        (SequenceRules(min_tokens=9, stop_token_ids=many), [], [], 8, 40000),
        (SequenceRules(no_repeat_ngram_size=1), many, [], 0, 40000),
        (
            SequenceRules(
                dry_multiplier=2.0,
                dry_base=1.0,
                dry_allowed_length=650,
                dry_breakers=[[many[10], many[11], many[12]]],
            ),
            [*periodic, *periodic[100:700]],
            [],
            0,
            40000,
        ),
        (
            SequenceRules(
                dry_multiplier=2.0, dry_allowed_length=1, dry_breakers=[[x] for x in many]
            ),
            [*two, 3, 4, 3, 4, 3, many[5], 3, 4, 3],
            [],
            0,
            40000,
        ),
    ]


def huge_rows() -> list[Case]:
    """More ids of a text, and more numbers of records, than a block of CUDA keeps for itself."""
    draw = random.Random(4)
    some = draw.sample(range(10, 39999), 700)
    text = [3, 4, 5, *draw.choices(some, k=9100), 3, 4, 6, 3, 4]
    words = [[draw.choice(some), draw.choice((3, 4)), place] for place in range(900)]
    return [
        (SequenceRules(dry_multiplier=1.0, dry_allowed_length=1), text, [], 0, 40000),
        (SequenceRules(no_repeat_ngram_size=3), text, [5, 3, 4], 0, 40000),
        (SequenceRules(no_repeat_ngram_size=1), text, [8], 0, 40000),
        (
            SequenceRules(
                dry_multiplier=1.0,
                dry_allowed_length=1,
                dry_breakers=[[6], [4, 6], *words],
                bad_words=[*words, [3, 4, 7], [*text[:9000], 8], [*text[20:], 9]],
                min_tokens=3,
                stop_token_ids=some[:5],
            ),
            text,
            [-1],
            2,
            40000,
        ),
    ]


# Values that nothing has checked

_FLOATS = (math.nan, -1.0, math.inf, -math.inf, 3e38, 1e-45, 1.5)
_INTEGERS = (-(2**31), -1, 0, 1, 2, 9, INT32_MAX)
_OFFSETS = (-(2**63), -1, 0, 3, 17, 39, 2**31, 2**63 - 1)
_LENGTHS = (-(2**63), -1, 0, 5, 11, 12, 13, 2**63 - 1)


def hostile_call(guards: unchecked.Guards, vocab_size: int, seed: int) -> ListCall:
    """A call of tensors that hold what they must not, each in a guard of its own.

    What the records of a row claim to have is more than ``max_sequence_ids``.
    """
    chance = random.Random(seed)
    rows, num_slots, max_length, size = 9, 5, 12, 300

    def some(values: Sequence[float], *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        flat = [chance.choice(values) for _ in range(math.prod(shape))]
        return guards.put(torch.tensor(flat, dtype=dtype).view(shape))

    entries = 4 if seed % 2 else rows
    few = [0, 1, vocab_size - 1]
    ids = [*few * 3, -1, vocab_size, -(2**31), INT32_MAX]
    # records that begin here have more ids than a list has room for
    sequences = torch.arange(size, dtype=torch.int32)
    sequences[:40] = some([0, 1, 2, 3, 1, 2, 3, *ids], 40)
    rules = {}
    for name in NUMBERS:
        is_float = name in ("dry_multiplier", "dry_base")
        # most rows have rules that act
        usual = [1.5] * 5 if is_float else [1, 2] * 3
        values = [*usual, *(_FLOATS if is_float else _INTEGERS)]
        rules[name] = some(values, entries, dtype=torch.float32 if is_float else torch.int32)
    offsets = some([0, 3, 17, *_OFFSETS], entries + 1, dtype=torch.int64)
    return ListCall(
        vocab_size=vocab_size,
        rules=rules,
        slots=some([*range(num_slots), -(2**31), -1, num_slots, INT32_MAX], rows),
        lengths=some(_LENGTHS, num_slots, dtype=torch.int64),
        text=some(ids, num_slots, max_length) if seed % 5 else None,
        text_lengths=some([12, 11, *_LENGTHS], num_slots, dtype=torch.int64) if seed % 5 else None,
        param_slots=some([*range(entries), -(2**31), -2, -1, entries, INT32_MAX], rows)
        if seed % 2
        else None,
        sequence_offsets=offsets,
        sequence_counts=some((-(2**31), -1, 0, 8, 30, 99, INT32_MAX), entries)
        if seed % 2
        else None,
        sequences=guards.put(sequences),
        extra_output=some(ids, rows, 7) if seed % 3 else None,
        max_sequence_ids=size if vocab_size < 100 else 10,
    )


def assert_hostile_values_do_no_harm(make: Maker, vocab_size: int, seed: int) -> None:
    """Whatever a call points to, lists are consistent and what lies around does not matter."""
    seen = []
    for fill in (math.nan, 0.0):
        guards = unchecked.Guards(fill)
        call = hostile_call(guards, vocab_size, seed)
        lists = Lists(*map(guards.put, memory_for(call)))
        make(call, lists)
        guards.assert_whole()
        assert_consistent(lists, vocab_size)
        listed = torch.arange(call.capacity()) < lists.counts[:, None]
        seen.append([*lists[:3], lists.amounts[listed]])
    assert all(map(torch.equal, *seen))


def mapped(call: ListCall, function: Callable[[Tensor], Tensor]) -> ListCall:
    """The call with what a function makes of each of its tensors."""
    values = {field.name: getattr(call, field.name) for field in fields(call)}
    changed = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
    rules = {name: function(x) for name, x in call.rules.items()}
    return replace(call, rules=rules, **changed)


def overwrite(call: ListCall, chance: random.Random) -> None:
    """Put other values into everything that a call reads, in place."""
    other = hostile_call(unchecked.Guards(0), call.vocab_size, chance.randrange(10**6))
    for tensor in call.tensors():
        source = chance.choice([x for x in other.tensors() if x.dtype == tensor.dtype]).flatten()
        tensor.view(-1)[:] = source[torch.arange(tensor.numel()) % len(source)]
