"""The kernel in Triton that changes histories by ids that were not drawn.

One program changes the slot of one row, and no two rows have the same slot. The ids of a row, or
the places of a text, are taken ``CONFIG.span`` at a time, one or more by each thread.

1. "fill" clears the slot's bits and counts; its text begins anew.
2. "append" and "fill" leave out what is no id of the vocabulary, and ids for which the text has no
   room: a running sum gives every other id its place. Without a text the ids are counted here.
3. With a text, the ids at places that were in the window and no longer are leave: their bits are
   cleared, and their counts fall. "rollback" begins here.
4. The ids of the places that have come into the window are counted. If any have left, the bits of
   the whole window are set again: an id that has left at one place may be at another.

Hazards. Threads that change the same word do so by atomics. What one step writes the next one
reads or changes, so a barrier stands between. Lengths are read at the beginning and written at the
end, by one thread.

Nobody has checked what the tensors hold. Slots, numbers, lengths and ids are limited where they are
loaded, and every loop has an end that is known before it begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llm_sampling.backends.triton_kernel import text_length, text_of, window_begin

APPEND = tl.constexpr(0)
FILL = tl.constexpr(1)
ROLLBACK = tl.constexpr(2)


@triton.jit
def _clear(words, number, SPAN: tl.constexpr):
    """Write 0 to so many words."""
    nothing = tl.zeros([SPAN], tl.int32)
    for first in range(0, number, SPAN):
        place = first + tl.arange(0, SPAN)
        tl.store(words + place, nothing, mask=place < number)


@triton.jit
def _set_bits(seen, ids, wanted):
    """Set the bits of the wanted ids."""
    tl.atomic_or(seen + (ids >> 5), 1 << (ids & 31), mask=wanted, sem="relaxed")


@triton.jit
def _add(counts, ids, number, wanted):
    """Add a number to the counts of the wanted ids, as often as they are there."""
    numbers = tl.zeros_like(ids) + number
    tl.atomic_add(counts + ids, numbers, mask=wanted, sem="relaxed")


@triton.jit
def _move_window(seen, counts, vocab_size, text, of_prompt, old, new, SPAN: tl.constexpr):
    """Make the ids at the places ``new`` count instead of those at ``old``: (begin, end) each.

    One of the two begins and ends no later than the other. ``of_prompt`` is how many places are the
    prompt's.
    """
    old_begin, old_end = old
    new_begin, new_end = new
    is_later = new_end >= old_end
    # what leaves is at the beginning of the old places, or at their end
    first_left = tl.where(is_later, old_begin, tl.maximum(old_begin, new_end))
    end_left = tl.where(is_later, tl.minimum(old_end, new_begin), old_end)
    any_left = first_left < end_left
    for first in range(first_left, end_left, SPAN):
        place = first + tl.arange(0, SPAN)
        ids = tl.load(text.ids + place, mask=place < end_left, other=-1)
        is_id = (ids >= 0) & (ids < vocab_size)
        tl.atomic_and(seen + (ids >> 5), ~(1 << (ids & 31)), mask=is_id, sem="relaxed")
        _add(counts, ids, -1, is_id & (place >= of_prompt))
    tl.debug_barrier()
    first_new = tl.where(is_later, tl.maximum(new_begin, old_end), new_begin)
    end_new = tl.where(is_later, new_end, tl.minimum(new_end, old_begin))
    first_set = tl.where(any_left, new_begin, first_new)
    end_set = tl.where(any_left, new_end, end_new)
    for first in range(first_set, end_set, SPAN):
        place = first + tl.arange(0, SPAN)
        ids = tl.load(text.ids + place, mask=place < end_set, other=-1)
        is_id = (ids >= 0) & (ids < vocab_size)
        _set_bits(seen, ids, is_id)
        is_new = (place >= first_new) & (place < end_new)
        _add(counts, ids, 1, is_id & is_new & (place >= of_prompt))


@triton.jit
def _add_ids(seen, counts, vocab_size, text, before, ids, number, of_prompt, SPAN: tl.constexpr):
    """Write ids to the text from place ``before`` on; or count them, where ``text`` is ().

    The first ``of_prompt`` of them are the prompt's. Returns how many have been added, and how many
    of these to the output.
    """
    added = tl.zeros((), tl.int64)
    output = tl.zeros((), tl.int64)
    for first in range(0, number, SPAN):
        i = first + tl.arange(0, SPAN)
        id = tl.load(ids + i, mask=i < number, other=-1)
        is_id = (id >= 0) & (id < vocab_size)
        id = tl.where(is_id, id, 0).to(tl.int32)
        if len(text) > 0:
            place = before + added + tl.cumsum(is_id.to(tl.int64), axis=0) - 1
            is_id = is_id & (place < text.max_length)
            tl.store(text.ids + place, id, mask=is_id)
        is_output = is_id & (i >= of_prompt)
        if len(text) == 0:
            _set_bits(seen, id, is_id)
            _add(counts, id, 1, is_output)
        added += tl.sum(is_id.to(tl.int64), axis=0)
        output += tl.sum(is_output.to(tl.int64), axis=0)
    return added, output


@triton.jit
def _change(row, slot, vocab_size, history, number, ids, of_prompt, position, CONFIG: tl.constexpr):
    """The change of one slot. ``ids`` is (a pointer to the row's, how many there are) or ()."""
    KIND: tl.constexpr = CONFIG.kind
    SPAN: tl.constexpr = CONFIG.span
    seen = history.seen + slot * history.seen_stride
    counts = history.counts + slot * history.counts_stride
    lengths = history.lengths + slot
    text = ()
    before = tl.zeros((), tl.int64)
    prompt_length = tl.zeros((), tl.int64)
    if CONFIG.has_text:
        text = text_of(history.text, slot)
        if KIND != FILL:
            before = text_length(text)
            prompt_length = tl.load(text.prompt_lengths)
    if KIND == FILL:
        _clear(seen, (vocab_size + 31) // 32, SPAN)
        _clear(counts, vocab_size, SPAN)
        tl.debug_barrier()
    if KIND == ROLLBACK:
        output = before - tl.minimum(tl.maximum(prompt_length, 0), before)
        grown = -tl.minimum(tl.maximum(number, 0), output)
        after = before + grown
    else:
        row_ids, most = ids
        number = tl.minimum(tl.maximum(number, 0), most)
        added, grown = _add_ids(
            seen, counts, vocab_size, text, before, row_ids, number, of_prompt, SPAN
        )
        after = before + added
        if KIND == FILL:
            prompt_length = added - grown
    # the text has been written, and its lengths have been read
    tl.debug_barrier()
    if CONFIG.has_text:
        old = (window_begin(text, before), before)
        new = (window_begin(text, after), after)
        _move_window(seen, counts, vocab_size, text, prompt_length, old, new, SPAN)
        tl.store(text.lengths, after)
        if KIND == FILL:
            tl.store(text.prompt_lengths, prompt_length)
    if KIND == FILL:
        tl.store(lengths, grown)
        if len(position) > 0:
            tl.store(position[0], grown)
    else:
        tl.store(lengths, tl.load(lengths) + grown)
        if len(position) > 0:
            tl.store(position[0], tl.load(position[0]) + grown)


@triton.jit(do_not_specialize=["num_slots", "max_ids", "ids_stride"])  # they change between calls
def update_kernel(
    vocab_size,
    slots,
    numbers,
    ids,
    ids_stride,
    max_ids,
    prompt_lengths,
    position,
    history,
    num_slots,
    CONFIG: tl.constexpr,
):
    """Row ``program_id(0)`` of an update.

    ``ids``, ``prompt_lengths`` and ``position`` are (a pointer,) or (); ``history`` is a Histories
    of triton_kernel.py. A row whose slot does not exist changes nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        number = tl.load(numbers + row).to(tl.int64)
        row_ids = ()
        if len(ids) > 0:
            row_ids = (ids[0] + row * ids_stride, max_ids)
        of_prompt = tl.zeros((), tl.int64)
        if len(prompt_lengths) > 0:
            of_prompt = tl.load(prompt_lengths[0] + row).to(tl.int64)
        place = ()
        if len(position) > 0:
            place = (position[0] + (slot if CONFIG.position_of_slot else row),)
        _change(row, slot, vocab_size, history, number, row_ids, of_prompt, place, CONFIG)
