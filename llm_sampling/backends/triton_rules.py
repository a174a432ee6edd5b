"""The kernel in Triton that makes the lists of step 5a, in one launch before the sampling kernel.

One program makes the list of one row. A place is one of a row's text, which is the ids that its
slot keeps in order and those of this call behind them. The places, the words of the bit table and
the ids of a record are taken ``SPAN`` at a time, one or more by each thread.

1. All bits of the row become 0, so that nothing is left of an earlier list. The ids of this call
   that are in the vocabulary are written into a scratch, one after the other.
2. DRY: how many ids follow the last complete breaker. More than ``dry_allowed_length`` and 255 make
   no difference.
3. Every place whose id a rule lowers sets the bit of the id, and so do the records of bad words and
   stop ids. How many ids before a place are the last ids of the text is found by comparing them one
   after the other, until they differ at all places of a span. So far it matters only whether they
   are as many as the rules ask for.
4. A running sum over the words gives every word the number of listed ids before it, and so every
   listed id its rank, which is the place of its amount. All amounts become 0.
5. Step 3 again, now with matches of full length: each lowered id raises the amount at its rank. The
   amounts are not negative, so as integers they have the same order, and infinity is the largest.
   An atomic maximum therefore keeps the right one, whatever the order of the threads is.

Hazards. Threads that change the same word do so by atomics. Between the steps there are barriers,
because each reads or changes what other threads have written in the one before.

The logits may be a slice of the vocabulary. Texts and records then have ids of all of it, and are
compared by these. The list has the ids of the slice alone, counted from its first one.

Nobody has checked what the tensors hold, and somebody may overwrite them meanwhile. Slots, offsets,
lengths and ids are limited where they are loaded, and every loop has an end that does not depend on
what it loads. A row lists at most one id for each place and for each number of its records, of
which no more are looked at than ``capacity`` has room for. What has no bit in step 5 gets no
amount.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_sampling import sequence_rules
from llm_sampling.backends.base import MAX_EXTRA_OUTPUT, VocabSlice
from llm_sampling.backends.triton_kernel import ones

_MAX_EXCESS = tl.constexpr(sequence_rules.MAX_EXCESS)
_MAX_AMOUNT = tl.constexpr(sequence_rules.MAX_AMOUNT)
_MAX_EXTRA = tl.constexpr(MAX_EXTRA_OUTPUT)
_BREAKER_IDS = tl.constexpr(sequence_rules.BREAKER_IDS)
_BREAKER = tl.constexpr(sequence_rules.BREAKER)
_BAD_WORD = tl.constexpr(sequence_rules.BAD_WORD)
_STOP_IDS = tl.constexpr(sequence_rules.STOP_IDS)
_BAN = tl.constexpr(0x7F800000)  # the bits of +infinity
#: The most ids of a slot, and numbers of a row's records: places are int32.
MOST_PLACES = 2**30
_MOST_PLACES = tl.constexpr(MOST_PLACES)
_STEPS = tl.constexpr(6)  # ids that are compared before the threads agree whether to go on


class RuleColumns(NamedTuple):
    """The numbers of the rules of step 5a, each ``(entries,)``, in the units of ``SequenceRules``.

    Attributes:
        dry_multiplier, dry_base: float32.
        dry_allowed_length, dry_penalty_last_n, no_repeat_ngram_size, no_repeat_ngram_window,
            min_tokens: int32.
    """

    dry_multiplier: Tensor
    dry_base: Tensor
    dry_allowed_length: Tensor
    dry_penalty_last_n: Tensor
    no_repeat_ngram_size: Tensor
    no_repeat_ngram_window: Tensor
    min_tokens: Tensor


class RuleSequences(NamedTuple):
    """The token sequences of the rules, as ``sequence_rules.packed_sequences`` makes them.

    Attributes:
        offsets: int64 ``(entries + 1,)``; the records of an entry begin there.
        ids: int32, the records of all entries.
        counts: int32 ``(entries,)``, how many numbers an entry has; None where they end where those
            of the next entry begin.
    """

    offsets: Tensor
    ids: Tensor
    counts: Tensor | None = None


class KeptIds(NamedTuple):
    """The ids of prompt and output in order, by slot.

    Attributes:
        ids: int32 ``(slots, max_length)``, contiguous.
        lengths: int64 ``(slots,)``, how many of them there are.
    """

    ids: Tensor
    lengths: Tensor


class PenaltyLists(NamedTuple):
    """The lists of step 5a, all contiguous.

    The amount of a token whose bit is set is ``amounts[row, before[row, word] + n]``, where n is
    the number of bits that are set below its own in its word.

    Attributes:
        bits: int32 ``(rows, ceil(ids / 32))``; the bit of each listed id is set, of the ids of a
            row's logits, from 0 on.
        before: int32, of the same shape; how many listed ids are in the words before this one.
        counts: int32 ``(rows,)``, how many ids are listed.
        amounts: float32 ``(rows, capacity)``: what is subtracted from the logits; +inf is a ban.
            Nothing is written behind the first ``counts``.
        scratch: int32 ``(rows, MAX_EXTRA_OUTPUT)``, of no meaning after a launch.
    """

    bits: Tensor
    before: Tensor
    counts: Tensor
    amounts: Tensor
    scratch: Tensor


#: A row's text. ids: (a pointer to those that are kept,), of which there are ``kept``. extra: (a
#: pointer to those of this call,). size: how many there are of both.
RowText = namedtuple("RowText", "ids kept extra size")
#: A row's records, of ``size`` numbers.
Records = namedtuple("Records", "words size")
#: A row's list, as pointers. amounts: to their bits. It has ``size`` ids from ``first_id`` on.
RowList = namedtuple("RowList", "bits before count amounts capacity first_id size")
#: DRY in a row: it looks at the places from ``begin`` on and lowers from matches of ``allowed`` ids
#: on, of which ``room`` count. alone: the first and the last number of the records that have the
#: breakers of a single id.
Dry = namedtuple("Dry", "begin allowed room multiplier base alone")
#: The rule of n-grams in a row: an id is banned where ``others`` before it are the last ids.
NGrams = namedtuple("NGrams", "begin others")


# The text and the records


@triton.jit
def _ids_at(text, place, wanted):
    """The ids at the wanted ones of some places from 0 to size - 1; -1 at the others."""
    if len(text.ids) > 0:
        ids = tl.load(text.ids[0] + place, mask=wanted & (place < text.kept), other=-1)
    else:
        ids = tl.where(wanted, -1, -1)
    if len(text.extra) > 0:
        is_extra = wanted & (place >= text.kept)
        added = tl.load(text.extra[0] + (place - text.kept), mask=is_extra, other=-1)
        ids = tl.where(is_extra, added, ids)
    return ids


@triton.jit
def _write_extra(extra_ids, number, vocab_size, scratch):
    """Write those of the call's ids that are in the vocabulary; return how many they are."""
    i = tl.arange(0, _MAX_EXTRA)
    ids = tl.load(extra_ids + i, mask=i < number, other=-1)
    is_id = (ids >= 0) & (ids < vocab_size)
    place = tl.cumsum(is_id.to(tl.int32), axis=0) - 1
    tl.store(scratch + place, ids, mask=is_id)
    return tl.sum(is_id.to(tl.int32), axis=0)


@triton.jit
def _record(records, at):
    """The kind of the record there, its ids, and how many they are."""
    kind = tl.load(records.words + at)
    number = tl.load(records.words + at + 1)
    return kind, records.words + at + 2, tl.minimum(tl.maximum(number, 0), records.size - at - 2)


@triton.jit
def _are_among(ids, sorted_ids, number):
    """Whether each of the ids is one of the sorted ones."""
    low = tl.zeros_like(ids)
    high = low + number
    left = number
    while left > 0:
        middle = (low + high) >> 1
        is_between = low < high
        is_less = tl.load(sorted_ids + middle, mask=is_between, other=0) < ids
        low = tl.where(is_between & is_less, middle + 1, low)
        high = tl.where(is_between & (is_less == 0), middle, high)
        left = left >> 1
    return (low < number) & (tl.load(sorted_ids + low, mask=low < number, other=-1) == ids)


# Matches


@triton.jit
def _matches(text, place, most, wanted):
    """How many ids before each wanted place are the last ids of the text, up to so many each."""
    length = place * 0
    done = tl.zeros((), tl.int32)
    goes_on = wanted & (most > 0)
    while tl.max(goes_on.to(tl.int32), axis=0) != 0:
        for _ in tl.static_range(_STEPS):
            goes_on = goes_on & (done < most)
            ids = _ids_at(text, place - 1 - done, goes_on)
            last = _ids_at(text, text.size - 1 - done, done < text.size)
            goes_on = goes_on & (ids == last)
            length += goes_on.to(tl.int32)
            done += 1
    return length


@triton.jit
def _complete(text, begin, following, ids, number, wanted):
    """Whether ids that may begin at ``begin`` are those before so many others, where wanted."""
    is_end = wanted & (number <= text.size - begin - following)
    done = tl.zeros((), tl.int32)
    while (done < number) & (tl.max(is_end.to(tl.int32), axis=0) != 0):
        there = _ids_at(text, text.size - 1 - following - done, is_end)
        is_end = is_end & (there == tl.load(ids + number - 1 - done))
        done += 1
    return is_end


@triton.jit
def _is_end(text, ids, number, SPAN: tl.constexpr):
    """Whether the text ends with these ids."""
    is_end = (number >= 0) & (number <= text.size)
    if is_end & (number > 0):
        last = _ids_at(text, text.size - 1, text.size > 0)
        is_end = last == tl.load(ids + number - 1)
    done = tl.zeros((), tl.int32)
    while is_end & (done < number):
        i = done + tl.arange(0, SPAN)
        inside = i < number
        there = _ids_at(text, text.size - 1 - i, inside)
        given = tl.load(ids + number - 1 - i, mask=inside, other=-1)
        is_end = tl.min((there == given).to(tl.int32), axis=0) != 0
        done += SPAN
    return is_end


@triton.jit
def _room(text, begin, most, records, SPAN: tl.constexpr):
    """How many ids follow the last complete breaker: ``most`` if it is that or more.

    Returns also the first and the last number of the records that have breakers of a single id.
    """
    room = most
    alone_begin = tl.zeros((), tl.int32) + records.size
    alone_end = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    while first < room:
        following = first + tl.arange(0, SPAN)
        inside = following < room
        ids = _ids_at(text, text.size - 1 - following, inside)
        is_end = following < 0
        at = tl.zeros((), tl.int32)
        while at + 2 <= records.size:
            kind, its_ids, number = _record(records, at)
            if kind == _BREAKER_IDS:
                is_end = is_end | _are_among(ids, its_ids, number)
                alone_begin = tl.minimum(alone_begin, at)
                alone_end = at + 2 + number
            if (kind == _BREAKER) & (number > 0):
                is_end = is_end | _complete(text, begin, following, its_ids, number, inside)
            at += 2 + number
        room = tl.min(tl.where(inside & is_end, following, room), axis=0)
        first += SPAN
    return room, alone_begin, alone_end


@triton.jit
def _are_breakers(ids, wanted, records, alone):
    """Whether each of the ids is a breaker of a single id, where any is wanted."""
    found = ids < -1
    at, end = alone
    at = tl.where(tl.max(wanted.to(tl.int32), axis=0) != 0, at, end)
    while at + 2 <= end:
        kind, its_ids, number = _record(records, at)
        if kind == _BREAKER_IDS:
            found = found | _are_among(ids, its_ids, number)
        at += 2 + number
    return found


# What is lowered


@triton.jit
def _put(out, ids, amounts, wanted, raises):
    """Set the bits of the wanted ids; or raise their amounts, which are given by their bits.

    What is no id of the list is left out: unsigned, what is below the first one is too large.
    """
    ids -= out.first_id
    wanted = wanted & (ids.to(tl.uint32, bitcast=True) < out.size.to(tl.uint32, bitcast=True))
    word = ids >> 5
    bit = ids & 31
    if raises:
        bits = tl.load(out.bits + word, mask=wanted, other=0)
        rank = tl.load(out.before + word, mask=wanted, other=-1) + ones(bits & ((1 << bit) - 1))
        is_listed = wanted & (((bits >> bit) & 1) != 0) & (rank >= 0) & (rank < out.capacity)
        tl.atomic_max(out.amounts + rank, amounts, mask=is_listed, sem="relaxed")
    else:
        tl.atomic_or(out.bits + word, 1 << bit, mask=wanted, sem="relaxed")


@triton.jit
def _amounts(dry, level):
    """The bits of the amounts for matches that are longer than allowed by so many ids."""
    amounts = (level * 0).to(tl.float32) + dry.multiplier
    for number in range(0, tl.max(level, axis=0)):
        amounts = tl.where(number < level, tl.minimum(amounts * dry.base, _MAX_AMOUNT), amounts)
    return amounts.to(tl.int32, bitcast=True)


@triton.jit
def _put_places(out, text, dry, ngrams, records, raises, SPAN: tl.constexpr):
    """List the ids of all places where DRY or the rule of n-grams asks for it."""
    begin = tl.minimum(dry.begin, ngrams.begin)
    of_dry = tl.where(raises, dry.room, dry.allowed)
    most = tl.maximum(tl.where(dry.begin < text.size, of_dry, 0), ngrams.others)
    for first in range(begin, text.size, SPAN):
        place = first + tl.arange(0, SPAN)
        inside = place < text.size
        ids = _ids_at(text, place, inside)
        is_id = ids >= 0
        length = _matches(text, place, tl.minimum(place - begin, most), is_id)
        level = tl.minimum(tl.minimum(length, place - dry.begin), dry.room) - dry.allowed
        is_lowered = is_id & (place > dry.begin) & (level >= 0)
        if len(records) > 0:
            is_lowered = is_lowered & (_are_breakers(ids, is_lowered, records, dry.alone) == 0)
        is_banned = is_id & (tl.minimum(length, place - ngrams.begin) >= ngrams.others)
        is_banned = is_banned & (place >= ngrams.begin)
        amounts = tl.where(is_banned, _BAN, _amounts(dry, tl.where(is_lowered, level, 0)))
        _put(out, ids, amounts, is_lowered | is_banned, raises)


@triton.jit
def _put_records(out, text, is_short, records, raises, SPAN: tl.constexpr):
    """List the last ids of bad words that they would complete, and stop ids while it is short."""
    at = tl.zeros((), tl.int32)
    while at + 2 <= records.size:
        kind, its_ids, number = _record(records, at)
        first = number
        if (kind == _STOP_IDS) & is_short:
            first = tl.zeros((), tl.int32)
        if kind == _BAD_WORD:
            is_end = _is_end(text, its_ids, number - 1, SPAN)
            first = tl.where(is_end, number - 1, number)
        for begin in range(first, number, SPAN):
            i = begin + tl.arange(0, SPAN)
            ids = tl.load(its_ids + i, mask=i < number, other=-1)
            _put(out, ids, tl.zeros_like(ids) + _BAN, i < number, raises)
        at += 2 + number


@triton.jit
def _count(out, SPAN: tl.constexpr):
    """Write how many ids are listed, before each word and at all, and amounts of 0."""
    words = (out.size + 31) // 32
    total = tl.zeros((), tl.int32)
    for first in range(0, words, SPAN):
        word = first + tl.arange(0, SPAN)
        listed = ones(tl.load(out.bits + word, mask=word < words, other=0))
        tl.store(out.before + word, total + tl.cumsum(listed, axis=0) - listed, mask=word < words)
        total += tl.sum(listed, axis=0)
    total = tl.minimum(total, out.capacity)
    for first in range(0, total, SPAN):
        rank = first + tl.arange(0, SPAN)
        tl.store(out.amounts + rank, tl.zeros([SPAN], tl.int32), mask=rank < total)
    tl.store(out.count, total)


# The row


@triton.jit
def _dry(text, multiplier, base, allowed, last_n, records, SPAN: tl.constexpr):
    """DRY in a row; its places begin at the end of the text where it lowers nothing."""
    begin = text.size - tl.minimum(tl.where(last_n < 0, text.size, last_n), text.size)
    allowed = tl.minimum(tl.maximum(allowed, 1), text.size)
    is_on = (multiplier > 0.0) & (allowed < text.size - begin)
    room = tl.where(is_on, tl.minimum(allowed + _MAX_EXCESS, text.size - begin), 0)
    alone_begin, alone_end = text.size * 0, text.size * 0
    if len(records) > 0:
        room, alone_begin, alone_end = _room(text, begin, room, records, SPAN)
    begin = tl.where(room >= allowed, begin, text.size)
    base = tl.where(base >= 1.0, base, 1.0)
    return Dry(begin, allowed, room, multiplier, base, (alone_begin, alone_end))


@triton.jit
def _ngrams(text, size, window):
    """The rule of n-grams in a row, in the same way."""
    begin = text.size - tl.minimum(tl.where(window <= 0, text.size, window), text.size)
    is_on = (size > 0) & (size <= text.size - begin)
    return NGrams(tl.where(is_on, begin, text.size), tl.where(is_on, size - 1, 0))


@triton.jit
def _records(sequences, sequences_size, index, exists, most):
    """The records of a row, of which no more than ``most`` numbers are read; () without any."""
    records = ()
    if len(sequences) > 0:
        offsets, words, counts = sequences
        begin = tl.load(offsets + index, mask=exists, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), sequences_size)
        if len(counts) > 0:
            end = begin + tl.load(counts[0] + index, mask=exists, other=0)
        else:
            end = tl.load(offsets + index + 1, mask=exists, other=0)
        size = tl.minimum(tl.maximum(end, begin), sequences_size) - begin
        records = Records(words + begin, tl.minimum(size, most).to(tl.int32))
    return records


@triton.jit(
    do_not_specialize=[
        *("vocab_size", "first_id", "size", "sequences_size", "num_params", "num_slots"),
        *("max_length", "num_extra", "capacity"),
    ]
)
def list_kernel(
    vocab_size,
    first_id,
    size,
    rules,
    sequences,
    sequences_size,
    param_slots,
    num_params,
    slots,
    num_slots,
    lengths,
    kept_ids,
    max_length,
    extra_ids,
    num_extra,
    lists,
    capacity,
    SPAN: tl.constexpr,
):
    """The list of row ``program_id(0)``: of ``size`` ids of the vocabulary from ``first_id`` on.

    ``rules`` is a RuleColumns and ``lists`` a PenaltyLists, with the amounts as int32.
    ``sequences`` is (offsets, ids, counts), ``kept_ids`` (ids, lengths), ``param_slots`` and
    ``extra_ids`` (a pointer,); each may be (), and so may be the counts, which are (a pointer,).
    """
    row = tl.program_id(0).to(tl.int64)
    bits, before, counts, amounts, scratch = lists
    words = (size + 31) // 32
    out = RowList(
        bits + row * words,
        before + row * words,
        counts + row,
        amounts + row * capacity,
        capacity,
        first_id,
        size,
    )
    index = row
    exists = row >= 0
    if len(param_slots) > 0:
        index = tl.load(param_slots[0] + row).to(tl.int64)
        exists = (index >= 0) & (index < num_params)
    slot = tl.load(slots + row).to(tl.int64)
    slot = tl.minimum(tl.maximum(slot, 0), num_slots - 1)

    for first in range(0, words, SPAN):
        word = first + tl.arange(0, SPAN)
        tl.store(out.bits + word, tl.zeros([SPAN], tl.int32), mask=word < words)
    ids = ()
    kept = tl.zeros((), tl.int32)
    if len(kept_ids) > 0:
        ids = (kept_ids[0] + slot * max_length,)
        kept = tl.minimum(tl.maximum(tl.load(kept_ids[1] + slot), 0), max_length).to(tl.int32)
    extra = ()
    added = tl.zeros((), tl.int32)
    if len(extra_ids) > 0:
        extra = (scratch + row * _MAX_EXTRA,)
        added = _write_extra(extra_ids[0] + row * num_extra, num_extra, vocab_size, extra[0])
    tl.debug_barrier()
    text = RowText(ids, kept, extra, kept + added)

    most = tl.maximum(capacity - max_length - _MAX_EXTRA, 0)
    most = tl.where(capacity >= size, _MOST_PLACES, most)
    records = _records(sequences, sequences_size, index, exists, most)
    dry = _dry(
        text,
        tl.load(rules.dry_multiplier + index, mask=exists, other=0.0),
        tl.load(rules.dry_base + index, mask=exists, other=1.0),
        tl.load(rules.dry_allowed_length + index, mask=exists, other=1),
        tl.load(rules.dry_penalty_last_n + index, mask=exists, other=0),
        records,
        SPAN,
    )
    ngrams = _ngrams(
        text,
        tl.load(rules.no_repeat_ngram_size + index, mask=exists, other=0),
        tl.load(rules.no_repeat_ngram_window + index, mask=exists, other=0),
    )
    min_tokens = tl.load(rules.min_tokens + index, mask=exists, other=0).to(tl.int64)
    is_short = tl.load(lengths + slot) < min_tokens - added

    for turn in range(0, 2):
        if turn == 1:
            tl.debug_barrier()
            _count(out, SPAN)
            tl.debug_barrier()
        _put_places(out, text, dry, ngrams, records, turn == 1, SPAN)
        if len(records) > 0:
            _put_records(out, text, is_short, records, turn == 1, SPAN)


def empty_lists(rows: int, size: int, capacity: int, device: torch.device) -> PenaltyLists:
    """Memory for the lists of so many rows.

    Args:
        rows: how many.
        size: how many logits a row has, 1 .. 2^20.
        capacity: how many ids a row may list, ``SampleCall.list_capacity``. There is room for a
            multiple of 16, so that kernels which read the lists are the same for all capacities.
        device: where.
    """
    words = -(-size // 32)
    room = -(-capacity // 16) * 16

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    return PenaltyLists(
        bits=empty(words),
        before=empty(words),
        counts=empty(),
        amounts=empty(room, dtype=torch.float32),
        scratch=empty(MAX_EXTRA_OUTPUT),
    )


def make_lists(
    rules: RuleColumns,
    slots: Tensor,
    lengths: Tensor,
    lists: PenaltyLists,
    *,
    size: int,
    vocab_slice: VocabSlice,
    sequences: RuleSequences | None = None,
    param_slots: Tensor | None = None,
    kept_ids: KeptIds | None = None,
    extra_output: Tensor | None = None,
) -> None:
    """Make the lists of step 5a, in one launch on the current stream of the slots' device.

    All tensors are on that device and contiguous. What they hold is not checked, and whatever it
    is, nothing is read or written outside of them.

    Args:
        rules: the numbers of the rules.
        slots: int32 ``(rows,)``, the slots of the history.
        lengths: int64 ``(slots,)``, the lengths of the outputs.
        lists: where they are put; :func:`empty_lists` makes the memory.
        size: how many logits a row has.
        vocab_slice: which ids these are of. Ids outside of its vocabulary are padding, wherever
            they are.
        sequences: the token sequences of the rules; None where no row has any.
        param_slots: int32 ``(rows,)``, the entry of each row in ``rules`` and ``sequences``; None
            where row r has entry r. A row whose entry does not exist lists nothing.
        kept_ids: the ids of the slots; None where they are not kept.
        extra_output: int32 ``(rows, up to MAX_EXTRA_OUTPUT)``, ids that come next in the output.

    Raises:
        ValueError: a slot keeps more than ``MOST_PLACES`` ids.
    """
    rows = slots.shape[0]
    max_length = 0 if kept_ids is None else kept_ids.ids.shape[1]
    if max_length > MOST_PLACES:
        raise ValueError(f"a slot must keep at most {MOST_PLACES} ids, got {max_length}")
    if rows == 0:
        return
    packed = ()
    if sequences is not None and sequences.ids.numel() > 0:
        counts = () if sequences.counts is None else (sequences.counts,)
        packed = (sequences.offsets, sequences.ids, counts)
    num_extra = 0 if extra_output is None else extra_output.shape[1]
    with torch.cuda.device_of(slots):
        list_kernel[(rows,)](
            vocab_slice.vocab_size,
            vocab_slice.first_id,
            size,
            rules,
            packed,
            0 if sequences is None else sequences.ids.numel(),
            () if param_slots is None else (param_slots,),
            rules.dry_multiplier.shape[0],
            slots,
            lengths.shape[0],
            lengths,
            () if kept_ids is None else tuple(kept_ids),
            max_length,
            () if num_extra == 0 else (extra_output,),
            num_extra,
            lists._replace(amounts=lists.amounts.view(torch.int32)),
            lists.amounts.shape[1],
            SPAN=512,
            num_warps=8,
            enable_fp_fusion=False,
        )
