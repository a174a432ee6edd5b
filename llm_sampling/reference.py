"""The specification in plain torch: slow, obvious, and the judge of every other backend.

The steps carry the numbers of docs/semantics.md. Floats are float32 and each operation is rounded
once; mass and random bits are integers, so sums are exact in any order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling.backends.base import (
    STATUS_NAN,
    STATUS_NO_CANDIDATE,
    STATUS_POS_INF,
    ParamSlots,
    SampleCall,
)
from llm_sampling.fields import SCOPES
from llm_sampling.history import TokenHistory, bits_and_counts
from llm_sampling.masks import pack_bits, unpacked
from llm_sampling.params import (
    BIAS_TENSORS,
    KERNEL_TENSORS,
    RULE_COLUMNS,
    SEQUENCE_TENSORS,
    BatchParams,
)
from llm_sampling.results import (
    KeptSet,
    SampleOutput,
    TokenLogprobs,
    Wanted,
    without_rows,
)
from llm_sampling.sequence_rules import penalty_list, rules_of

_INF = float("inf")
_LOW32 = 0xFFFFFFFF
_POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in (
        "-0x1.eca6f0p-11",
        "0x1.2d4322p-7",
        "-0x1.c4eb2cp-5",
        "0x1.ebe206p-3",
        "-0x1.62e3b2p-1",
        "0x1.000000p+0",
    )
)
_LOG2_E = float.fromhex("0x1.715476p+0")


def seen_and_counts(history: TokenHistory, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens the histories of rows hold, and how often their output does.

    Args:
        history: of the rows.
        extra: None, or ids that come next in each row's output, ``(rows, n)``, with padding.

    Returns:
        bool and int32 ``(rows, vocab_size)``.
    """
    slots, vocab_size, text = history.slots.to(torch.int64), history.vocab_size, history.text
    count = history.counts[slots]
    seen = unpacked(history.seen[slots], vocab_size)
    if extra is None:
        return seen, count
    is_id = (extra >= 0) & (extra < vocab_size)
    if text is None or text.windows is None:
        words, more = bits_and_counts(extra, is_id, is_id, vocab_size)
        return seen | unpacked(words, vocab_size), count + more
    # The ids move the window: what counts is the end of text and ids together.
    length = text.lengths[slots].unsqueeze(1)
    begin = text.window_begin(slots, (length + is_id.sum(1, keepdim=True)).squeeze(1)).unsqueeze(1)
    place = torch.arange(text.max_length, device=begin.device)
    in_text = (place >= begin) & (place < length)
    in_extra = is_id & (length + is_id.cumsum(1) - 1 >= begin)
    is_output = in_text & (place >= text.prompt_lengths[slots].unsqueeze(1))
    words, count = bits_and_counts(
        torch.cat([text.ids[slots], extra], 1),
        torch.cat([in_text, in_extra], 1),
        torch.cat([is_output, in_extra], 1),
        vocab_size,
    )
    return unpacked(words, vocab_size), count


def penalty_lists(call: SampleCall) -> list[dict[int, float]]:
    """Step 5a: for each row, what is subtracted from which logits; inf is a ban.

    Empty where no row has a rule that looks at the history.
    """
    batch, history = call.batch, call.history
    if history is None or not batch.has_rules:
        return []
    rows, size = call.logits.shape
    first_id, vocab_size = call.ids
    numbers = {column.name: getattr(batch, column.name).tolist() for column in RULE_COLUMNS}
    assert batch.sequence_offsets is not None
    assert batch.sequences is not None
    offsets, sequences = batch.sequence_offsets.tolist(), batch.sequences.tolist()
    slots, text = history.slots.tolist(), history.text
    produced = history.lengths.tolist()
    lists = []
    for row in range(rows):
        slot = slots[row]
        extra = [] if call.extra_output is None else call.extra_output[row].tolist()
        extra = [token for token in extra if 0 <= token < vocab_size]
        ids = [] if text is None else text.ids[slot, : text.lengths[slot]].tolist()
        rules = rules_of(
            {name: values[row] for name, values in numbers.items()},
            sequences[offsets[row] : offsets[row + 1]],
        )
        length = produced[slot] + len(extra)
        amounts = penalty_list(rules, [*ids, *extra], length, vocab_size)
        lists.append(
            {id_ - first_id: v for id_, v in amounts.items() if 0 <= id_ - first_id < size}
        )
    return lists


def processed_logits(call: SampleCall) -> tuple[Tensor, Tensor]:
    """Steps 1 to 6: float32 ``(rows, V)`` without NaN or -0.0; and, per row, was a NaN seen."""
    batch, history = call.batch, call.history
    rows, vocab_size = call.logits.shape

    # 1 widen
    x = call.logits.to(torch.float32)

    # 2 bias, mask
    row = torch.arange(rows, device=x.device).repeat_interleave(batch.logit_bias_offsets.diff())
    token = batch.logit_bias_ids.to(torch.int64)
    inside = (token >= 0) & (token < vocab_size)
    place, bias = (row[inside], token[inside]), batch.logit_bias_values[inside]
    x = x.index_put(place, bias, accumulate=True)
    banned = bias == -_INF
    x = x.index_put((place[0][banned], place[1][banned]), bias[banned])
    if call.allowed_mask is not None:
        x = torch.where(unpacked(call.allowed_mask, vocab_size), x, -_INF)

    if history is not None:
        seen, count = seen_and_counts(history, call.extra_output)
        produced = count > 0
        # 3 repetition penalty: prompt and output, or output
        r = batch.repetition_penalty.unsqueeze(1)
        of_output = (batch.repetition_penalty_scope == SCOPES["output"]).unsqueeze(1)
        penalised = torch.where(of_output, produced, seen)
        x = torch.where(penalised, torch.where(x > 0, x / r, x * r), x)
        # 4 frequency penalty: output
        a = batch.frequency_penalty.unsqueeze(1)
        x = torch.where(produced, x - a * count.to(torch.float32), x)
        # 5 presence penalty: output
        b = batch.presence_penalty.unsqueeze(1)
        x = torch.where(produced, x - b, x)

        # 5a what the rules that look at the sequence lower
        for i, amounts in enumerate(penalty_lists(call)):
            for id_, amount in amounts.items():
                x[i, id_] = -_INF if amount == _INF else x[i, id_] - amount

    # 6 canonical
    nan = x.isnan()
    return torch.where(nan, -_INF, x + 0.0), nan.any(-1)


def depth(x: Tensor, temperature: Tensor, best: Tensor | None = None) -> Tensor:
    """Step 9: octaves below the row's best token, which is looked for in ``x`` unless it is given.

    ``temperature`` and ``best`` are ``(rows,)``.
    """
    m = (x.amax(-1) if best is None else best).unsqueeze(1)
    s = (torch.full_like(temperature, _LOG2_E) / temperature).unsqueeze(1)
    return torch.where(x == m, 0.0, (m - x) * s)


def mass(d: Tensor) -> Tensor:
    """Step 10: the integer mass 0 .. 2^42 of depth ``d`` >= 0 (float32), about ``2^(42 - d)``."""
    d = d.clamp(max=63.0)
    e = d.floor()
    f = d - e
    p = torch.full_like(f, _POLYNOMIAL[0])
    for c in _POLYNOMIAL[1:]:
        p = p * f
        p = p + c
    m = (p * 2.0**24).to(torch.int64)
    return (m << 18) >> e.to(torch.int64)


def target(z: Tensor, top_p: Tensor) -> Tensor:
    """Step 12: how much of the mass ``z`` the nucleus must have."""
    share = ((top_p.double() * 2.0**31).floor().to(torch.int64) - 2**11).clamp(min=0)
    z_high, z_low = z >> 31, z & (2**31 - 1)  # z * P takes up to 94 bits
    return (z_high * share + ((z_low * share + (2**31 - 1)) >> 31)).clamp(min=1)


def depth_cut(batch: BatchParams) -> Tensor:
    """Step 13: the depth down to which filters by depth keep tokens; inf where none is on.

    One more filter by depth is one more term of a minimum here. Returns float32 ``(rows,)``.
    """
    return batch.min_p_cut


def kept_set(x: Tensor, batch: BatchParams) -> tuple[Tensor, Tensor]:
    """Steps 7 to 13: bool ``(rows, V)``, True in the kept set, and the int64 mass ``(rows, V)``."""
    vocab_size = x.shape[1]
    keep_at_least = batch.min_tokens_to_keep.to(torch.int64)

    # 7 order: larger x first, equal x by smaller id. Everything below is a length of a prefix of it
    sorted_x, order = torch.sort(x, dim=-1, descending=True, stable=True)
    length = (x > -_INF).sum(-1)

    # 9 depth, 10 mass
    d = depth(x, batch.temperature)
    w = torch.where(x > -_INF, mass(d), 0)
    cumulative = w.gather(-1, order).cumsum(-1)

    # 11 top-k
    top_k = batch.top_k.to(torch.int64)
    at_most = torch.where(top_k > 0, torch.maximum(top_k, keep_at_least), vocab_size)
    length = torch.minimum(length, at_most)

    # 12 top-p: the shortest prefix whose mass reaches the target
    z = cumulative.gather(-1, (length - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    reaching = (cumulative < target(z, batch.top_p).unsqueeze(-1)).sum(-1) + 1
    shortest = torch.where(batch.top_p < 1, torch.maximum(reaching, keep_at_least), vocab_size)
    length = torch.minimum(length, shortest)

    # 13 min-p
    sorted_d = d.gather(-1, order)
    cut = depth_cut(batch)
    near = ((sorted_d <= cut.unsqueeze(-1)) & (sorted_x > -_INF)).sum(-1)
    near = torch.where(cut < _INF, torch.maximum(near, keep_at_least), vocab_size)
    length = torch.minimum(length, near)

    # 8 greedy: the first of the order alone
    length = torch.where(batch.temperature == 0, length.clamp(max=1), length)

    rank = torch.arange(vocab_size, device=x.device)
    keep = torch.zeros_like(x, dtype=torch.bool)
    keep.scatter_(-1, order, rank < length.unsqueeze(-1))
    return keep, w


def philox(seed: Tensor, position: Tensor, draw: int, stream: int = 0) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, each in an int64 ``(rows,)``.

    Key: ``seed``; counter: ``position``, ``draw``, ``stream``. The sampler uses stream 0.
    """
    key = [seed & _LOW32, (seed >> 32) & _LOW32]
    counter = [
        position & _LOW32,
        (position >> 32) & _LOW32,
        torch.full_like(seed, draw),
        torch.full_like(seed, stream),
    ]
    for _ in range(10):
        # 32 x 32 bits wrap in int64, but the 64 bits are the right ones
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((second >> 32) & _LOW32) ^ counter[1] ^ key[0],
            second & _LOW32,
            ((first >> 32) & _LOW32) ^ counter[3] ^ key[1],
            first & _LOW32,
        ]
        key = [(key[0] + 0x9E3779B9) & _LOW32, (key[1] + 0xBB67AE85) & _LOW32]
    return counter


def scaled(r_low: Tensor, r_high: Tensor, s: Tensor) -> Tensor:
    """``(R * s) >> 64`` for R of 64 bits in two halves and 0 <= s < 2^63."""
    s_low, s_high = s & _LOW32, s >> 32
    low, cross = r_low * s_low, r_high * s_low
    middle = ((low >> 32) & _LOW32) + (cross & _LOW32)
    other = r_low * s_high
    middle = middle + (other & _LOW32)
    return r_high * s_high + ((cross >> 32) & _LOW32) + (other >> 32) + (middle >> 32)


def sample(call: SampleCall) -> SampleOutput:
    """All steps. What there is for each draw has the shape ``(rows, num_samples)``."""
    if call.param_slots is not None:
        return _sample_by_slot(call, call.param_slots)
    batch = call.batch
    assert batch.position is not None
    x, nan = processed_logits(call)
    keep, w = kept_set(x, batch)
    w = torch.where(keep, w, 0)

    # 14 draw
    cumulative = w.cumsum(-1)
    s = cumulative[:, -1]
    draws = []
    for draw in range(call.num_samples):
        words = philox(batch.seed, batch.position, draw)
        r = scaled(words[0], words[1], s)
        draws.append((cumulative <= r.unsqueeze(-1)).sum(-1))
    no_candidate = ~keep.any(-1)
    tokens = torch.stack(draws, -1).masked_fill(no_candidate.unsqueeze(-1), -1)

    status = (
        nan.to(torch.int32) * STATUS_NAN
        + no_candidate.to(torch.int32) * STATUS_NO_CANDIDATE
        + (x == _INF).any(-1).to(torch.int32) * STATUS_POS_INF
    )
    kinds = {
        "processed": lambda: _processed(call.wanted, tokens, x, keep, w),
        "raw": lambda: _raw(call.wanted, tokens, call.logits),
    }
    found = {kind: kinds[kind]() for kind in call.wanted.logprobs}
    output = SampleOutput(
        tokens,
        found[call.wanted.logprobs[0]].logprobs if found else None,
        status,
        found.get("processed"),
        found.get("raw"),
        None if call.wanted.kept is None else _kept_results(call.wanted, tokens, x, keep, w),
    )
    return without_rows(output, no_candidate)


def _sample_by_slot(call: SampleCall, slots: ParamSlots) -> SampleOutput:
    dense, exists = _by_row(call, slots)
    output = without_rows(sample(dense), ~exists)
    nothing = torch.where(slots.of_rows == -1, 0, STATUS_NO_CANDIDATE)
    return output._replace(status=torch.where(exists, output.status, nothing).int())


def _by_row(call: SampleCall, slots: ParamSlots) -> tuple[SampleCall, Tensor]:
    """The same call with an entry for each row, and whether each row has parameters.

    Rows that have none get those of slot 0, and logits of 0.
    """
    batch, history, capacity = call.batch, call.history, call.batch.rows
    assert batch.position is not None
    exists = (slots.of_rows >= 0) & (slots.of_rows < capacity)
    slot = torch.where(exists, slots.of_rows, 0).to(torch.int64)
    position = batch.position
    if slots.position_of == "slot":
        position = position[slot]
    elif slots.prompt_lengths is not None:
        position = position + 1 - slots.prompt_lengths[slot]

    by_slot = {*KERNEL_TENSORS} - {"position", *BIAS_TENSORS, *SEQUENCE_TENSORS}
    columns = {
        name: tensor[slot] for name in by_slot if (tensor := getattr(batch, name)) is not None
    }
    offsets, entry = _parts_of(batch.logit_bias_offsets, slots.bias_counts, slot)
    if batch.has_rules:
        assert batch.sequence_offsets is not None
        assert batch.sequences is not None
        assert slots.sequence_counts is not None
        of_rows, place = _parts_of(batch.sequence_offsets, slots.sequence_counts, slot)
        columns |= {"sequence_offsets": of_rows, "sequences": batch.sequences[place]}
    if history is not None:
        history = history.with_slots(torch.where(exists, history.slots, 0))
    dense = replace(
        batch,
        **columns,
        logit_bias_offsets=offsets,
        logit_bias_ids=batch.logit_bias_ids[entry],
        logit_bias_values=batch.logit_bias_values[entry],
        position=position,
    )
    logits = torch.where(exists.unsqueeze(-1), call.logits, 0)
    return (
        replace(call, logits=logits, batch=dense, history=history, param_slots=None),
        exists,
    )


def _parts_of(offsets: Tensor, counts: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of slots in an array, one after the other.

    Returns:
        where each slot's part begins now, int64 ``(slots + 1,)``, and which elements they are.
    """
    counts = counts[slot].to(torch.int64)
    ends = counts.cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends])
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    place = torch.arange(len(row), device=counts.device) - begins[row]
    return begins, place + offsets[slot][row]


def _first_ids(x: Tensor, keep: Tensor, count: int) -> Tensor:
    """The first ids of the order of step 7 among those that are kept, int64 ``(rows, count)``.

    Where there are fewer, -1.
    """
    order = torch.sort(torch.where(keep, x, -_INF), dim=-1, descending=True, stable=True).indices
    order = torch.nn.functional.pad(order[:, :count], (0, max(0, count - order.shape[1])))
    place = torch.arange(count, device=x.device)
    return torch.where(place < keep.sum(-1, keepdim=True), order, -1)


def _given_ids(wanted: Wanted, x: Tensor) -> Tensor | None:
    """The ids whose logprobs are asked for, int64 ``(rows, n)``."""
    ids = wanted.token_ids
    return None if ids is None else ids.to(torch.int64).expand(x.shape[0], -1)


def _token_logprobs(
    wanted: Wanted, tokens: Tensor, x: Tensor, listed: Tensor, logprobs: Tensor
) -> TokenLogprobs:
    """The logprobs of one kind.

    Args:
        wanted: what the call asks for.
        tokens: the drawn ones, ``(rows, num_samples)``.
        x: float32 ``(rows, V)``, the logits that give the order.
        listed: bool ``(rows, V)``, the tokens that have a rank.
        logprobs: float64 ``(rows, V)``.
    """
    vocab_size = x.shape[1]

    def of(ids: Tensor) -> Tensor:
        inside = (ids >= 0) & (ids < vocab_size)
        found = logprobs.gather(-1, torch.where(inside, ids, 0))
        return torch.where(inside, found, torch.nan).to(torch.float32)

    ids = _given_ids(wanted, x)
    result = TokenLogprobs(of(tokens), id_logprobs=None if ids is None else of(ids))
    if wanted.top_logprobs is None:
        return result

    rank_of = torch.full((*x.shape[:-1], vocab_size + 1), -1, dtype=torch.int32, device=x.device)
    order = _first_ids(x, listed, vocab_size)
    rank = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=x.device).expand_as(order)
    # What has no rank is scattered into the column behind the vocabulary, which no id reads.
    rank_of.scatter_(-1, torch.where(order < 0, vocab_size, order), rank)

    def ranks(ids: Tensor) -> Tensor:
        inside = (ids >= 0) & (ids < vocab_size)
        return torch.where(inside, rank_of.gather(-1, torch.where(inside, ids, 0)), -1)

    top = _first_ids(x, listed, wanted.top_logprobs)
    return result._replace(
        ranks=ranks(tokens),
        top_ids=top.to(torch.int32),
        top_logprobs=of(top),
        id_ranks=None if ids is None else ranks(ids),
    )


def _processed(wanted: Wanted, tokens: Tensor, x: Tensor, keep: Tensor, w: Tensor) -> TokenLogprobs:
    """Logprobs of the distribution that the tokens were drawn from; ``w`` is 0 where not kept."""
    logprobs = w.double().log() - w.sum(-1, keepdim=True).double().log()
    return _token_logprobs(wanted, tokens, x, keep, logprobs)


def _raw(wanted: Wanted, tokens: Tensor, logits: Tensor) -> TokenLogprobs:
    """Logprobs of the softmax of the logits of step 1, in whose order a NaN counts as -inf."""
    x = logits.to(torch.float32)
    x = torch.where(x.isnan(), -_INF, x + 0.0)
    return _token_logprobs(wanted, tokens, x, x > -_INF, raw_logprobs(logits))


def _kept_results(wanted: Wanted, tokens: Tensor, x: Tensor, keep: Tensor, w: Tensor) -> KeptSet:
    """The kept set in the form that is asked for; ``w`` is 0 where a token is not kept."""
    vocab_size = x.shape[1]

    def masses(ids: Tensor) -> Tensor:
        inside = (ids >= 0) & (ids < vocab_size)
        return torch.where(inside, w.gather(-1, torch.where(inside, ids, 0)), 0)

    count, ids = keep.sum(-1), _given_ids(wanted, x)
    kept = KeptSet(
        counts=count.to(torch.int32),
        total=w.sum(-1),
        masses=masses(tokens),
        id_masses=None if ids is None else masses(ids),
    )
    if wanted.kept == "mask":
        return kept._replace(mask=pack_bits(keep, -(-vocab_size // 32)))
    if wanted.kept == "ids":
        ids = _first_ids(x, keep, wanted.max_kept_ids)
        fits = (count <= wanted.max_kept_ids).unsqueeze(-1)
        return kept._replace(ids=torch.where(fits, ids, -1).to(torch.int32))
    order = _first_ids(x, keep, vocab_size)
    first, last = order[:, :1], order.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1))

    def logit(ids: Tensor) -> Tensor:
        return x.gather(-1, ids.clamp(min=0)).squeeze(-1)

    return kept._replace(
        first_id=first.squeeze(-1).to(torch.int32),
        first_logit=logit(first),
        last_id=last.squeeze(-1).to(torch.int32),
        last_logit=logit(last),
    )


def raw_logprobs(logits: Tensor) -> Tensor:
    """The log-softmax of the logits of step 1, float64; a NaN counts as -inf."""
    x = logits.to(torch.float64)
    x = torch.where(x.isnan(), -_INF, x)
    # the mass is shared by the +inf tokens, as in step 9
    top = x.amax(-1, keepdim=True)
    x = torch.where(top == _INF, torch.where(x == _INF, 0.0, -_INF), x)
    return x.log_softmax(-1)


def filter_logits(call: SampleCall) -> Tensor:
    """Steps 1 to 13: ``x / T`` in the kept set, -inf elsewhere; float32 ``(rows, V)``.

    T is 1 in a greedy row. Where the best token's quotient is not finite, the row is shifted by it.
    What is kept is finite.
    """
    if call.param_slots is not None:
        dense, exists = _by_row(call, call.param_slots)
        return torch.where(exists.unsqueeze(-1), filter_logits(dense), -_INF)
    x, _ = processed_logits(call)
    keep, _ = kept_set(x, call.batch)
    t = call.batch.temperature.unsqueeze(-1)
    t = torch.where(t == 0, 1.0, t)
    m = x.amax(-1, keepdim=True)
    shifted = torch.where(x == m, 0.0, (x - m) / t)
    divided = torch.where((m / t).isfinite(), x / t, shifted)
    return torch.where(keep, divided.clamp(min=torch.finfo(torch.float32).min), -_INF)
