"""Calls whose values no check has seen, for the kernels that must stay inside of their memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import BatchParams, SamplingParams, TokenHistory
from llm_sampling.backends.base import (
    MAX_EXTRA_OUTPUT,
    STATUS_NO_CANDIDATE,
    STATUS_TEXT_FULL,
    BackendModule,
    ParamSlots,
    SampleCall,
    SampleOutput,
)
from llm_sampling.history import HistoryUpdate, Text, UpdateKind
from llm_sampling.params import KERNEL_TENSORS, RULE_TENSORS
from llm_sampling.results import NOTHING, Wanted

NAN, INF = math.nan, math.inf
LEAST, MOST = -(2**31), 2**31 - 1

#: What a row's parameters may be besides valid numbers.
HOSTILE = {
    "temperature": (NAN, -1.0, INF, -INF, 1e-45, 3e38, 0.0, -0.0),
    "top_k": (LEAST, -7, 5, MOST),
    "top_p": (NAN, 7.0, -1.0, INF, -INF, 0.0, 0.9),
    "min_p_cut": (NAN, -1.0, -INF, 0.0, 3.0),
    "min_tokens_to_keep": (LEAST, -1, 0, 9, MOST),
    "repetition_penalty": (NAN, -1.0, 0.0, INF, 1e-45, 1.2),
    "repetition_penalty_scope": (LEAST, 1, 7),
    "frequency_penalty": (NAN, INF, -INF, 3e38),
    "presence_penalty": (NAN, INF, -INF, 3e38),
    "seed": (-(2**63), -1),
    "position": (-(2**63), -1, 2**63 - 1),
}
#: Each counts as a temperature of 1.
BAD_TEMPERATURES = (NAN, INF, -INF, -1.0, -1e-45) * 4
#: The first rows of a call have these; the others have three of HOSTILE by chance.
FIRST_ROWS: tuple[dict[str, float], ...] = (
    {"temperature": NAN},
    {"top_p": -INF},
    {"top_p": 0.9, "min_tokens_to_keep": MOST},
    {},
)
HOSTILE_OFFSETS = (-(2**63), -1, 0, 3, 5, 8, 2**31, 2**32 + 3, 2**63 - 1)
HOSTILE_IDS = (LEAST, -1, 0, 7, 33, MOST)
HOSTILE_BIASES = (NAN, INF, -INF, 3e38, 1.0)
HOSTILE_COUNTS = (LEAST, -1, 0, 3, MOST)
MAX_LENGTH = 12
HOSTILE_LENGTHS = (-(2**63), -1, 0, 5, MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 2**63 - 1)
HOSTILE_WINDOWS = (LEAST, -1, 0, 1, 4, MAX_LENGTH, MOST)


class Guards:
    """Puts tensors into larger ones, so that what is written around them is seen."""

    AROUND = 64  # elements before, and after; rows stay aligned as they were

    def __init__(self, fill: float):
        self.fill = fill
        self.held: list[tuple[Tensor, Tensor]] = []

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor, with ``fill`` around it; the lowest integer for NaN."""
        fill = self.fill
        if not tensor.dtype.is_floating_point:
            fill = torch.iinfo(tensor.dtype).min if math.isnan(fill) else int(fill)
        memory = torch.full((tensor.numel() + 2 * self.AROUND,), fill, dtype=tensor.dtype)
        inside = memory[self.AROUND : -self.AROUND].view(tensor.shape)
        inside.copy_(tensor)
        self.held.append((memory, memory.clone()))
        return inside

    def put_results(self, results: Any) -> Any:
        """The results of a call, or a part of them, with each tensor in a guard of its own."""
        placed: dict[int, Tensor] = {}  # some tensors are results by two names

        def put(value: Any) -> Any:
            if value is None:
                return None
            if not isinstance(value, Tensor):
                return type(value)(*map(put, value))
            if id(value) not in placed:
                placed[id(value)] = self.put(value)
            return placed[id(value)]

        return put(results)

    def assert_whole(self) -> None:
        """No element around any of the tensors has changed."""
        for now, before in self.held:
            for edge in (slice(self.AROUND), slice(-self.AROUND, None)):
                assert torch.equal(bits(now[edge]), bits(before[edge]))


def bits(tensor: Tensor) -> Tensor:
    """A tensor's elements as integers, so that NaN equals itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def hostile_history(
    guards: Guards, vocab_size: int, num_slots: int, chance: random.Random, *, has_text: bool
) -> SimpleNamespace:
    """The state of a history whose text has lengths, windows and ids that cannot be."""
    history = TokenHistory.from_ids([[0, 7]] * num_slots, [[9, 9, 3]] * num_slots, vocab_size)
    text = None
    if has_text:
        possible = (*HOSTILE_IDS, vocab_size - 1, vocab_size)
        ids = [[chance.choice(possible) for _ in range(MAX_LENGTH)] for _ in range(num_slots)]
        lengths, prompts = (
            torch.tensor([chance.choice(HOSTILE_LENGTHS) for _ in range(num_slots)]) for _ in "lp"
        )
        windows = [chance.choice(HOSTILE_WINDOWS) for _ in range(num_slots)]
        # what leaves the window of the first slot with its next id is not an id
        ids[0], lengths[0], windows[0] = [MOST] * MAX_LENGTH, MAX_LENGTH - 1, 4
        text = Text(
            guards.put(torch.tensor(ids, dtype=torch.int32)),
            guards.put(lengths),
            guards.put(prompts),
            guards.put(torch.tensor(windows, dtype=torch.int32)),
        )
    return SimpleNamespace(
        seen=guards.put(history.seen),
        counts=guards.put(history.counts),
        lengths=guards.put(history.lengths),
        slots=guards.put(history.slots),
        text=text,
        vocab_size=vocab_size,
        check_changeable=lambda position: None,
    )


def hostile_call(
    guards: Guards, vocab_size: int, rows: int, seed: int, dtype: torch.dtype
) -> SampleCall:
    """A call whose parameters, slots, bias offsets, ids and values are mixed from HOSTILE.

    With an odd seed the parameters belong to slots. A third of the seeds has no text, and half of
    them have no extra output.
    """
    chance = random.Random(seed)
    batch = BatchParams.from_list(
        [SamplingParams(seed=s, logit_bias={1: 1.0, 5: -2.0}) for s in range(rows)],
        positions=[0] * rows,
    )
    names = [name for name in KERNEL_TENSORS if name not in RULE_TENSORS]
    tensors = {name: getattr(batch, name).clone() for name in names}
    for row in range(rows):
        values = {name: chance.choice(HOSTILE[name]) for name in chance.sample(list(HOSTILE), 3)}
        for name, value in (FIRST_ROWS[row] if row < len(FIRST_ROWS) else values).items():
            tensors[name][row] = value

    def some(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor([chance.choice(values) for _ in like], dtype=like.dtype)

    for name, possible in (
        ("logit_bias_offsets", HOSTILE_OFFSETS),
        ("logit_bias_ids", (*HOSTILE_IDS, vocab_size - 1, vocab_size)),
        ("logit_bias_values", HOSTILE_BIASES),
    ):
        tensors[name] = some(possible, tensors[name])
    # The row after the last of FIRST_ROWS has all biases; a binary search for 200 among 48 of them
    # finds one that the lowest integer follows.
    place = len(FIRST_ROWS)
    tensors["logit_bias_offsets"][place : place + 2] = torch.tensor([0, 2 * rows])
    tensors["logit_bias_ids"][:8] = torch.tensor([1, 1, 1, 1, 1, 1, 200, LEAST])
    tensors["logit_bias_ids"][12::12] = MOST
    num_slots = 3
    slots = torch.zeros(rows, dtype=torch.int32)
    held = hostile_history(guards, vocab_size, num_slots, chance, has_text=seed % 3 < 2)
    held.slots = guards.put(some((LEAST, -1, 0, 2, num_slots, MOST), slots))
    extra = None
    if seed % 4 in (1, 2):
        ids = [[chance.choice((*HOSTILE_IDS, vocab_size)) for _ in range(5)] for _ in range(rows)]
        extra = guards.put(torch.tensor(ids, dtype=torch.int32))
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    flags = {"all_greedy": False, "any_filter": True, "any_output_scope": True}
    flags |= {"has_rules": False, **dict.fromkeys(RULE_TENSORS)}  # type: ignore[dict-item]
    guarded = {name: guards.put(tensor) for name, tensor in tensors.items()}
    param_slots = None
    if seed % 2:
        possible = (LEAST, -2, -1, *range(len(FIRST_ROWS) + 2), rows, MOST)
        param_slots = ParamSlots(
            guards.put(some(possible, slots)),
            guards.put(some(HOSTILE_COUNTS, slots)),
            ("row", "slot", "text")[seed // 2 % 3],  # type: ignore[arg-type]
            guards.put(some(HOSTILE["position"], torch.zeros(rows, dtype=torch.int64))),
        )
    return SampleCall(
        guards.put(logits.to(dtype)),
        SimpleNamespace(**guarded, **flags, rows=rows),  # type: ignore[arg-type]
        held,  # type: ignore[arg-type]
        None,
        num_samples=1,
        wanted=Wanted(("processed",)),
        advance=True,
        param_slots=param_slots,
        record=guards.put(some((0, 1, 1), slots).to(torch.uint8)).view(torch.bool),
        extra_output=extra,
    )


def call_at(temperatures: tuple[float, ...]) -> SampleCall:
    """A call of one row of many tokens for each temperature, with seeds of their own."""
    rows = len(temperatures)
    batch = BatchParams.from_list(
        [SamplingParams(top_p=0.95, seed=s) for s in range(rows)], positions=[0] * rows
    )
    batch.temperature.copy_(torch.tensor(temperatures))
    logits = torch.randn(rows, 300, generator=torch.Generator().manual_seed(1)) * 3
    return SampleCall(logits, batch, None, None)


def to_filter(call: SampleCall) -> SampleCall:
    """The same call for filter_logits."""
    return replace(call, wanted=NOTHING, advance=False, record=None)


def assert_defined(
    output: SampleOutput, vocab_size: int, param_slots: ParamSlots | None = None
) -> None:
    """Every token was written and is -1 or one of the row; the status says why one is -1.

    Rows of padding are -1, and their status is 0.
    """
    tokens, status = output.tokens, output.status
    assert ((tokens >= -1) & (tokens < vocab_size)).all(), tokens
    is_full = status == STATUS_TEXT_FULL
    assert ((status >= 0) & (status < 8) | is_full).all(), status
    failed = (tokens.view(len(status), -1) < 0).any(-1)
    if param_slots is not None:
        is_padding = param_slots.of_rows == -1
        assert failed[is_padding].all(), tokens
        failed &= ~is_padding
    assert torch.equal(is_full | ((status & STATUS_NO_CANDIDATE) != 0), failed), (tokens, status)


def assert_hostile_values_do_no_harm(
    backend: BackendModule,
    vocab_size: int,
    rows: int,
    seed: int,
    dtype: torch.dtype,
    guard: Callable[[Guards], None] = lambda guards: None,
) -> None:
    """Whatever a call points to, tokens are of the row, and what lies around does not matter."""
    seen = []
    for fill in (NAN, 0.0):
        guards = Guards(fill)
        call = hostile_call(guards, vocab_size, rows, seed, dtype)
        guard(guards)
        output = backend.sample(call)
        assert_defined(output, vocab_size, call.param_slots)
        filtered = backend.filter_logits(to_filter(call))
        assert not filtered.isnan().any()
        guards.assert_whole()
        seen.append((output.tokens, output.status, bits(filtered)))
    assert all(map(torch.equal, *seen))


def assert_hostile_texts_do_no_harm(backend: BackendModule, vocab_size: int, seed: int) -> None:
    """Whatever texts, windows and ids for one call hold, what lies around does not matter.

    Parameters and slots are valid, so that a backend that checks them accepts the call.
    """
    rows = num_slots = 7
    states = []
    for fill in (NAN, 0.0):
        guards, chance = Guards(fill), random.Random(seed)
        batch = BatchParams.from_list(
            [
                SamplingParams(
                    presence_penalty=chance.choice([0.0, 0.5]),
                    repetition_penalty=chance.choice([1.0, 1.5]),
                    repetition_penalty_scope=chance.choice(["all", "output"]),
                    top_k=chance.choice([0, 4]),
                    seed=row,
                )
                for row in range(rows)
            ],
            positions=[0] * rows,
        )
        history = hostile_history(guards, vocab_size, num_slots, chance, has_text=seed % 3 < 2)
        possible = (*HOSTILE_IDS, vocab_size - 1, vocab_size)
        ids = [[chance.choice(possible) for _ in range(MAX_EXTRA_OUTPUT)] for _ in range(rows)]
        logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
        record = torch.tensor([chance.random() < 0.8 for _ in range(rows)])
        call = SampleCall(
            guards.put(logits),
            batch,
            history,  # type: ignore[arg-type]
            None,
            wanted=Wanted(("processed",)),
            advance=True,
            record=guards.put(record.to(torch.uint8)).view(torch.bool),
            extra_output=guards.put(torch.tensor(ids, dtype=torch.int32)),
        )
        filtered = backend.filter_logits(to_filter(call))
        assert not filtered.isnan().any()
        for _ in range(3):
            output = backend.sample(call)
            assert_defined(output, vocab_size)
        guards.assert_whole()
        insides = [held[Guards.AROUND : -Guards.AROUND].clone() for held, _ in guards.held]
        states.append([output.tokens, output.status, bits(filtered), *map(bits, insides)])
    assert all(map(torch.equal, *states))


def assert_hostile_updates_do_no_harm(backend: BackendModule, vocab_size: int, seed: int) -> None:
    """Whatever an update points to, nothing around what it changes is read or written."""
    states = []
    for fill in (NAN, 0.0):
        guards, chance = Guards(fill), random.Random(seed)
        kind: UpdateKind = ("append", "fill", "rollback")[seed % 3]  # type: ignore[assignment]
        num_slots, width = 5, 9
        has_text = kind == "rollback" or chance.random() < 0.8
        history = hostile_history(guards, vocab_size, num_slots, chance, has_text=has_text)
        # each slot at most once, as in every update
        slots = [*range(num_slots), LEAST, -1, num_slots, MOST]
        chance.shuffle(slots)
        possible = (*HOSTILE_IDS, vocab_size - 1, vocab_size)
        dtype = chance.choice([torch.int32, torch.int64])
        ids = [[chance.choice(possible) for _ in range(width)] for _ in slots]

        def column(values: tuple[int, ...], rows: int = len(slots)) -> Tensor:
            some = [chance.choice(values) for _ in range(rows)]  # noqa: B023
            return guards.put(torch.tensor(some, dtype=torch.int32))  # noqa: B023

        backend.update_history(
            HistoryUpdate(
                kind,
                history,  # type: ignore[arg-type]
                guards.put(torch.tensor(slots, dtype=torch.int32)),
                column((LEAST, -1, 0, 3, width, width + 1, MOST)),
                None if kind == "rollback" else guards.put(torch.tensor(ids, dtype=dtype)),
                column((LEAST, -1, 0, 3, MOST)) if kind == "fill" else None,
                guards.put(torch.zeros(len(slots), dtype=torch.int64)),
                chance.choice(["row", "slot"]),  # type: ignore[arg-type]
            )
        )
        guards.assert_whole()
        states.append([held[Guards.AROUND : -Guards.AROUND] for held, _ in guards.held])
    assert all(map(torch.equal, *states))


def paths(vocab_size: int) -> list[SamplingParams]:
    """Parameters whose rows take every path of a kernel."""
    most = vocab_size * 3 // 5
    return [
        SamplingParams(presence_penalty=0.5, seed=seed, **filters)  # type: ignore[arg-type]
        for seed, filters in enumerate(
            (
                {"temperature": 0.0},
                {},
                {"top_k": 20},
                {"top_k": most},
                {"top_p": 0.9},
                {"min_p": 0.05},
                {"top_k": most, "top_p": 0.95, "min_p": 0.001, "min_tokens_to_keep": 5},
                {"top_p": 0.2, "min_tokens_to_keep": most},
            )
        )
    ]


#: What logits become while a kernel reads them.
CHANGES = {
    "nothing is left": lambda x: torch.full_like(x, -INF),
    "far below": lambda x: x - 200,
    "far above": lambda x: x + 200,
    "infinite": lambda x: torch.full_like(x, INF),
    "NaN": lambda x: torch.full_like(x, NAN),
    "upside down": lambda x: -x,
    "one": lambda x: torch.where(x == x.amax(-1, keepdim=True), -INF, x),
}


def changing_call(
    vocab_size: int, moments: tuple[int, ...], dtype: torch.dtype
) -> tuple[SampleCall, list[int]]:
    """A call with a row for each of the paths and each moment, and the rows' moments."""
    each = paths(vocab_size)
    params = [path for path in each for _ in moments]
    rows = len(params)
    x = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(1))
    call = SampleCall(
        x.to(dtype),
        BatchParams.from_list(params, positions=[0] * rows),
        TokenHistory.from_ids([[]] * rows, [[]] * rows, vocab_size),
        None,
        num_samples=1,
        wanted=Wanted(("raw",)),
        advance=True,
    )
    return call, list(moments) * len(each)


def assert_advanced(call: SampleCall, output: SampleOutput) -> None:
    """Positions and the histories, which were empty, have the drawn tokens and nothing else."""
    drawn = output.tokens >= 0
    assert call.history is not None
    assert call.batch.position is not None
    assert torch.equal(call.batch.position, drawn.to(torch.int64))
    assert torch.equal(call.history.lengths, drawn.to(torch.int64))
    places = call.history.counts.nonzero()
    assert torch.equal(places[:, 0], drawn.nonzero().flatten())
    assert torch.equal(places[:, 1], output.tokens[drawn])


def rows_without_a_finite_quotient(
    filters: dict[str, float],
) -> tuple[Tensor, list[SamplingParams]]:
    """Rows with +inf, with large logits, and with ordinary ones, at temperatures from 1e-45 on."""
    temperatures = (1e-45, 1e-38, 1e-3, 0.5, 1.0, 0.0)
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    x[0, 7] = x[0, 90] = INF
    x[1] *= 1e38
    x[2] *= -1e-3
    x[3, 5] = x[3, 6] = 4.0
    params = [
        SamplingParams(temperature=t, seed=1, **filters)  # type: ignore[arg-type]
        for t in temperatures
        for _ in x
    ]
    return x.repeat(len(temperatures), 1), params
