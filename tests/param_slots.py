"""Calls whose parameters belong to slots, made of parity cases, and what they must return."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import Batch
from histories import assert_same_state
from parity import LOGPROB_TOLERANCE, NUM_SAMPLES, bits, run
from torch import Tensor

from llm_sampling import TokenHistory
from llm_sampling.backends.base import (
    STATUS_NO_CANDIDATE,
    BackendModule,
    ParamSlots,
    PositionOf,
    SampleCall,
)
from llm_sampling.calls import make_call
from llm_sampling.history import HistoryUpdate, apply_update
from llm_sampling.params import BIAS_TENSORS, KERNEL_TENSORS, SEQUENCE_TENSORS
from llm_sampling.results import KINDS, Wanted

#: In place of the number of a case: a row of padding, and one whose slot does not exist.
PADDING, OUTSIDE = -1, -2


@dataclass
class BySlot:
    """A call, and for each of its rows the number of its case, or PADDING or OUTSIDE."""

    call: SampleCall
    cases: Tensor

    def expected(self, of_cases: Tensor, padding: float, outside: float) -> Tensor:
        """Return what ``for_rows`` gives for this call."""
        return for_rows(self.cases, of_cases, padding, outside)


def for_rows(cases: Tensor, of_cases: Tensor, padding: float, outside: float) -> Tensor:
    """Return a value for each row, given its case and the values of the cases.

    ``padding`` and ``outside`` are the values of the rows that have no case.
    """
    values = of_cases[cases.clamp(min=0)].clone()
    values[cases == PADDING] = padding
    values[cases == OUTSIDE] = outside
    return values


def by_slot(batch: Batch, position_of: PositionOf, seed: int) -> BySlot:
    """Put the cases into slots, and name the slots by more rows than there are cases.

    Every case has a row, a quarter of them a second one, and there are rows of padding and rows
    whose slot does not exist, all in random order. What belongs to no row is hostile: unused slots
    have the parameters of some case, the biases of a slot are followed by others that are not its
    own, and rows without a case have NaN and +inf for logits.
    """
    rng = random.Random(seed)
    dense = make_call(
        batch.logits,
        batch.params,
        history=batch.history,
        allowed_mask=batch.allowed_mask,
        positions=batch.positions,
        check=False,
    )
    rows, device, history = len(batch.cases), batch.logits.device, dense.history
    if history is None:
        capacity = rows + 3
        slots = rng.sample(range(capacity), rows)
    else:
        capacity, slots = history.seen.shape[0], history.slots.tolist()
    in_slot = [rng.randrange(rows) for _ in range(capacity)]
    for case, slot in enumerate(slots):
        in_slot[slot] = case

    chosen = [*range(rows), *rng.sample(range(rows), rows // 4), *[PADDING] * 2, *[OUTSIDE] * 3]
    rng.shuffle(chosen)
    not_there = iter((capacity, -2, 2**31 - 1))
    of_rows = [
        slots[case] if case >= 0 else -1 if case == PADDING else next(not_there) for case in chosen
    ]
    cases = torch.tensor(chosen)
    of_rows_tensor = torch.tensor(of_rows, dtype=torch.int32, device=device)
    some = cases.clamp(min=0).to(device)
    logits = batch.logits[some]
    logits[(cases < 0).to(device)] = torch.nan
    logits[(cases < 0).to(device), ::2] = torch.inf

    of_slots = torch.tensor(in_slot, device=device)
    sparse = {"position", *BIAS_TENSORS, *SEQUENCE_TENSORS}
    parameters = {
        name: tensor[of_slots]
        for name in KERNEL_TENSORS
        if name not in sparse and (tensor := getattr(dense.batch, name)) is not None
    }
    if dense.batch.has_rules:
        packed = [batch.params[case].sequences for case in in_slot]
        room = 1 + max(map(len, packed))
        padded = [x for row in packed for x in [*row, *[3] * (room - len(row))]]
        parameters |= {
            "sequence_offsets": torch.arange(0, (capacity + 1) * room, room, device=device),
            "sequences": torch.tensor(padded, device=device).int(),
        }
    biases = [sorted(batch.params[case].bans.items()) for case in in_slot]
    width = 1 + max(map(len, biases))
    entries = [entry for bias in biases for entry in [*bias, *[(0, 100.0)] * (width - len(bias))]]
    assert dense.batch.position is not None
    prompt_lengths = torch.tensor([rng.randrange(5000) for _ in range(capacity)], device=device)
    position = dense.batch.position[of_slots if position_of == "slot" else some]
    if position_of == "text":
        place = of_rows_tensor.clamp(0, capacity - 1).long()
        position = position + prompt_lengths[place] - 1
    call = replace(
        dense,
        logits=logits,
        batch=replace(
            dense.batch,
            **parameters,
            position=position,
            logit_bias_offsets=torch.arange(0, (capacity + 1) * width, width, device=device),
            logit_bias_ids=torch.tensor([i for i, _ in entries], device=device).int(),
            logit_bias_values=torch.tensor([x for _, x in entries], device=device),
        ),
        history=None if history is None else history.clone().with_slots(of_rows_tensor),
        allowed_mask=None if dense.allowed_mask is None else dense.allowed_mask[some],
        param_slots=ParamSlots(
            of_rows_tensor,
            torch.tensor([len(bias) for bias in biases], device=device).int(),
            position_of,
            prompt_lengths if position_of == "text" else None,
            sequence_counts=torch.tensor([len(row) for row in packed], device=device).int()
            if dense.batch.has_rules
            else None,
            max_sequence_ids=room if dense.batch.has_rules else None,
        ),
    )
    return BySlot(call, cases)


def assert_by_slot(
    batches: Iterable[Batch], backend: BackendModule, position_of: PositionOf
) -> None:
    """Check tokens, status, logprobs, filtered logits and the state afterwards."""
    for seed, batch in enumerate(batches):
        made = by_slot(batch, position_of, seed)
        wanted = run(batch, "torch", ("processed", "raw"))
        tokens = made.expected(wanted.tokens, -1, -1)
        status = made.expected(wanted.status, 0, STATUS_NO_CANDIDATE)
        for kind in KINDS:
            call = replace(made.call, num_samples=NUM_SAMPLES, wanted=Wanted((kind,)))
            drawn = backend.sample(call)
            assert torch.equal(drawn.tokens.cpu(), tokens)
            assert torch.equal(drawn.status.cpu(), status)
            logprobs = made.expected(wanted.logprobs[kind], torch.nan, torch.nan)
            assert drawn.logprobs is not None
            torch.testing.assert_close(
                drawn.logprobs.cpu(), logprobs, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True
            )
        filtered = made.expected(wanted.filtered, -torch.inf, -torch.inf)
        assert torch.equal(bits(backend.filter_logits(made.call).cpu()), bits(filtered))
        _assert_advanced(made, backend, tokens[:, 0], status)


def _assert_advanced(made: BySlot, backend: BackendModule, tokens: Tensor, status: Tensor) -> None:
    """Check that exactly the rows whose slot no other row names are recorded."""
    call = made.call
    assert call.param_slots is not None
    assert call.batch.position is not None
    slots = call.param_slots.of_rows.tolist()
    history = None if call.history is None else call.history.clone().to("cpu")
    position = call.batch.position.cpu().clone()
    recorded = []
    for row, (slot, token) in enumerate(zip(slots, tokens.tolist(), strict=True)):
        if token < 0 or slots.count(slot) > 1:
            continue
        if call.param_slots.position_of != "text":
            position[slot if call.param_slots.position_of == "slot" else row] += 1
        recorded.append((slot, token))
    if history is not None:
        append(history, recorded)
    drawn = backend.sample(replace(call, advance=True))
    assert torch.equal(drawn.tokens.cpu(), tokens)
    assert torch.equal(drawn.status.cpu(), status)
    assert torch.equal(call.batch.position.cpu(), position)
    if history is not None:
        assert call.history is not None
        assert_same_state(call.history, history)


def append(history: TokenHistory, recorded: Sequence[tuple[int, int]]) -> None:
    """Record (slot, token) pairs in torch, in a history on the CPU."""
    slots, tokens = torch.tensor(recorded, dtype=torch.int32).view(-1, 2).unbind(1)
    apply_update(HistoryUpdate("append", history, slots, torch.ones_like(slots), tokens[:, None]))
