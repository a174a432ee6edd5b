"""Does a RequestTable stay right under any order of calls?

Hypothesis generates valid and invalid calls, as engines make them: requests come and go, are
preempted and resumed from their ids, get tokens late, are drafted, extended, rolled back, saved and
restored. A model in plain Python follows them, and after each call the state is compared with the
model's. A refused call must change nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ON_THE_CPU, threads
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from plain_model import (
    Request,
    as_int64,
    assert_history,
    ids,
    inside,
    other_runs,
    params,
    roll_back,
    room_of,
    some_ids,
    some_runs,
    vocab_sizes,
)
from torch import Tensor

from llm_sampling import (
    InvalidLogitsError,
    RequestTable,
    SampleOutput,
    SamplingParams,
    TokenHistory,
    backends,
    filter_logits,
    sample,
)
from llm_sampling.backends import base
from llm_sampling.backends.base import ParamSlots, SampleCall
from llm_sampling.history import HistoryUpdate

#: A run of a table takes longer than one of a history or a Sampler.
fewer_runs = settings(some_runs, max_examples=60)

CAPACITY = 4
#: Padding, and slots that do not exist.
NO_SLOTS = (-1, CAPACITY, -7)
counts = st.integers(0, 3)
#: No text, or one that is soon full: a request comes with 12 ids at most.
lengths = st.sampled_from((None, None, 12, 14))

#: Invalid calls by name, each with a pattern of its error message.
REFUSED: dict[str, tuple[Callable[[RequestTable], object], str]] = {
    "no such slot": (lambda t: t.set(CAPACITY, SamplingParams()), "slot must be an integer in 0"),
    "a free slot": (
        lambda t: t.set_params(CAPACITY - 1, SamplingParams()),
        "slot must be one with",
    ),
    "a dict": (lambda t: t.set(0, {"top_k": 5}), "params must be a SamplingParams"),  # type: ignore[arg-type]
    "many biases": (
        lambda t: t.set(0, SamplingParams(logit_bias=dict.fromkeys(range(99), 1.0))),
        "logit_bias and bad_words of a single id must have at most max_logit_bias = 80",
    ),
    "half a token": (lambda t: t.set(0, SamplingParams(), output_ids=[0.5]), "output_ids must"),  # type: ignore[list-item]
    "a slot twice": (
        lambda t: t.append(torch.zeros(2, 1, dtype=torch.int64), slots=[0, 0]),
        "slots must be named at most once",
    ),
    "float tokens": (lambda t: t.append(torch.zeros(1, 1), slots=[0]), "tokens must be int32 or"),
    "too many": (
        lambda t: t.append(torch.zeros(1, 1, dtype=torch.int64), [2], slots=[0]),
        "counts must be at most 1",
    ),
    "fewer than none": (
        lambda t: t.append(torch.zeros(1, 1, dtype=torch.int64), [-1], slots=[0]),
        "counts must be integers >= 0",
    ),
    "other lengths": (
        lambda t: t.fill([0], torch.zeros(1, 1, dtype=torch.int64), [1, 1], [0]),
        "lengths must have shape",
    ),
    "no ids in order": (lambda t: t.rollback([0], [-1]), "num_tokens must be|rollback needs"),
    "wide logits": (
        lambda t: sample(torch.zeros(1, t.vocab_size + 1), t, [0]),
        "logits must have the RequestTable's vocab_size",
    ),
}


class Serving(RuleBasedStateMachine):
    """Calls of a RequestTable; each row must get what the reference gives it alone for its past."""

    backend = "torch"

    @initialize(
        v=vocab_sizes,
        max_length=lengths,
        first=st.lists(params, max_size=CAPACITY - 1),
        prompt=ids,
    )
    def begin(
        self, v: int, max_length: int | None, first: list[SamplingParams], prompt: list[int]
    ) -> None:
        self.v, self.max_length = v, max_length
        self.table = RequestTable(
            CAPACITY,
            vocab_size=v,
            history=True,
            max_length=max_length,
            max_logit_bias=80,
            backend=self.backend,
        )
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []
        for slot, p in enumerate(first):
            self.come(slot, p, prompt, prompt[:2], None, slot)

    def some_slots(self, data: st.DataObject, most: int) -> list[int]:
        """Slots with requests, some of them twice, among rows of padding and wrong slots."""
        slots = [*self.requests, *self.requests, *NO_SLOTS]
        drawn: list[int] = data.draw(st.lists(st.sampled_from(slots), max_size=most))
        return drawn

    def can_hold(self, p: SamplingParams) -> bool:
        return not (p.needs_history and p.has_window and self.max_length is None)

    def room(self, request: Request) -> int:
        return room_of(request, self.v, self.max_length)

    @contextmanager
    def refusing(self, is_refused: bool, message: str) -> Iterator[None]:
        if not is_refused:
            yield
            return
        with pytest.raises(ValueError, match=message):
            yield

    # Requests come, go, are preempted and resumed

    @rule(
        slot=st.integers(0, CAPACITY - 1),
        p=params,
        prompt=st.none() | ids,
        output=ids,
        position=st.none() | st.sampled_from((0, 9, 2**64 - 1)),
        torch_seed=st.integers(0, 2**16),
    )
    def come(
        self,
        slot: int,
        p: SamplingParams,
        prompt: list[int] | None,
        output: list[int],
        position: int | None,
        torch_seed: int,
    ) -> None:
        torch.manual_seed(torch_seed)
        with self.refusing(not self.can_hold(p), "params must have no penalty_last_n, "):
            self.table.set(slot, p, prompt_ids=prompt, output_ids=output, position=position)
            self.requests[slot] = self.request(slot, p, prompt, output, position)

    def request(
        self,
        slot: int,
        p: SamplingParams,
        prompt: list[int] | None,
        output: list[int],
        position: int | None,
    ) -> Request:
        held = self.table.params(slot)
        assert held is not None
        assert held.seed is not None
        assert held == replace(p, seed=held.seed)
        assert p.seed in (None, held.seed)
        at = len(inside(output, self.v)) if position is None else position
        is_kept = prompt is not None or p.needs_history
        window = -1 if self.max_length is None else p.penalty_last_n
        return Request(prompt or [], output, 0, held, held.seed, at, is_kept, window)

    @rule(slot=st.integers(0, CAPACITY - 1), is_preempted=st.booleans())
    def go(self, slot: int, is_preempted: bool) -> None:
        """Clear a slot, which may be free; a request that is preempted comes back later."""
        self.table.clear(slot)
        request = self.requests.pop(slot, None)
        if is_preempted and request is not None and request.is_kept:
            self.waiting.append(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), dtype=st.sampled_from((torch.int32, torch.int64)))
    def resume(self, data: st.DataObject, dtype: torch.dtype) -> None:
        """Set the parameters again, and fill the histories from a table of ids."""
        free = [slot for slot in range(CAPACITY) if slot not in self.requests]
        chosen = data.draw(st.permutations(free)) if free else []
        back = [*zip(chosen, self.waiting, strict=False)]
        self.waiting = self.waiting[len(back) :]
        rows = [[*request.prompt, *request.output] for _, request in back]
        width = max(map(len, rows), default=0) + 2
        table = torch.tensor([[*row, *[1] * (width - len(row))] for row in rows], dtype=dtype)
        for slot, request in back:
            self.table.set(slot, request.params, prompt_length=len(request.prompt))
        self.table.fill(
            [slot for slot, _ in back],
            table.view(len(rows), width),
            [len(row) for row in rows],
            [len(request.prompt) for _, request in back],
        )
        for slot, request in back:
            request.position = len(inside(request.output, self.v))
            self.requests[slot] = request

    # Tokens that were not drawn here, and tokens that are taken away

    @rule(data=st.data(), dtype=st.sampled_from((32, 64)))
    def append(self, data: st.DataObject, dtype: int) -> None:
        slots = [*dict.fromkeys(self.some_slots(data, 4))]
        of_rows = st.lists(
            st.lists(st.sampled_from((-1, 0, 1, 31, 32, 69)), min_size=3, max_size=3)
        )
        rows = data.draw(of_rows.map(lambda rows: (rows + [[0, 0, 0]] * 4)[: len(slots)]))
        number = data.draw(st.lists(counts, min_size=len(slots), max_size=len(slots)))
        added = {
            slot: inside(row[:n], self.v)
            for slot, row, n in zip(slots, rows, number, strict=True)
            if slot in self.requests
        }
        is_full = any(len(more) > self.room(self.requests[slot]) for slot, more in added.items())
        tokens = torch.tensor(rows, dtype=torch.int32 if dtype == 32 else torch.int64).view(-1, 3)
        with self.refusing(is_full, "there must be at most max_length"):
            self.table.append(tokens, number, slots=torch.tensor(slots, dtype=torch.int64))
            for slot, more in added.items():
                self.requests[slot].output = [*self.requests[slot].output, *more]
                self.requests[slot].position += len(more)

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        slots = [*dict.fromkeys(self.some_slots(data, 3))]
        number = data.draw(st.lists(st.integers(0, 5), min_size=len(slots), max_size=len(slots)))
        with self.refusing(self.max_length is None, "rollback needs the ids in order"):
            self.table.rollback(slots, number)
            for slot, n in zip(slots, number, strict=True):
                if slot in self.requests:
                    request = self.requests[slot]
                    taken = min(n, len(inside(request.output, self.v)))
                    roll_back(request, taken, self.v)
                    request.position -= taken

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), p=params)
    def set_params(self, data: st.DataObject, p: SamplingParams) -> None:
        slot = data.draw(st.sampled_from(sorted(self.requests)))
        request = self.requests[slot]
        is_unknown = p.needs_history and not request.is_kept
        message = "params must have no penalty"
        with self.refusing(is_unknown or not self.can_hold(p), message):
            self.table.set_params(slot, p)
            seed = request.seed if p.seed is None else p.seed
            request.params, request.seed = replace(p, seed=seed), seed
            if self.max_length is not None:
                request.window = p.penalty_last_n

    # Steps

    @rule(
        data=st.data(),
        seeds=st.lists(st.integers(0, 2**16), min_size=1, max_size=4),
        check=st.booleans(),
        mode=st.sampled_from(("all", "all", "some", "none", "positions")),
        bad=st.sampled_from((0.0, 0.0, 0.0, math.nan, -math.inf)),
    )
    def steps(
        self, data: st.DataObject, seeds: list[int], check: bool, mode: str, bad: float
    ) -> None:
        """Take one to four steps, of which the first may have a bad row."""
        for seed in seeds:
            self.step(data, seed, check, mode, bad)
            bad = 0.0

    def step(
        self,
        data: st.DataObject,
        seed: int,
        check: bool,
        mode: str,
        bad: float,
    ) -> None:
        """Draw a token for some rows, and record those that are to be recorded."""
        slots = self.some_slots(data, 6)
        logits = self.logits(seed, slots)
        if bad != 0 and slots:
            logits[seed % len(slots)] = bad
        record = [mode != "none"] * len(slots)
        if mode == "some":
            record = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        positions = [(seed + row) % 2**64 for row in range(len(slots))]
        given: dict[str, Any] = {"positions": positions} if mode == "positions" else {}
        if mode == "positions" and seed % 2:
            given = {"text_positions": torch.tensor(positions, dtype=torch.int64)}
            positions = [
                place + 1 - len(self.requests[slot].prompt) if slot in self.requests else 0
                for place, slot in zip(positions, slots, strict=True)
            ]
        alone = [
            self.alone(slot, logits[row], positions[row] if given else None, record[row])
            for row, slot in enumerate(slots)
        ]
        call = {
            "record": record if mode == "some" else mode != "none",
            "backend": self.backend,
            **given,
        }
        if check and any(int(one.status) for one in alone):
            with pytest.raises(InvalidLogitsError):
                sample(logits, self.table, slots, **call)
            return
        got = sample(logits, self.table, slots, check=False, **call)
        self.assert_output(got, alone)
        for row, slot in enumerate(slots):
            token = int(alone[row].tokens)
            if record[row] and token >= 0 and slots.count(slot) == 1:
                request = self.requests[slot]
                request.output = [*request.output, token]
                request.position += 0 if given else 1

    def logits(self, seed: int, slots: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(slots), self.v, generator=generator) * 2

    @rule(
        data=st.data(),
        seed=st.integers(0, 2**16),
        draft=st.lists(some_ids, min_size=1, max_size=6),
        rows_each=st.integers(1, 3),
    )
    def draft(self, data: st.DataObject, seed: int, draft: list[int], rows_each: int) -> None:
        """Verify drafts: row i of a slot has the first i tokens of its draft as extra history."""
        named = self.some_slots(data, 3)
        slots = [slot for slot in named for _ in range(rows_each)]
        extra = [
            [*draft[place:], *draft[:place]][:depth]
            for place, _ in enumerate(named)
            for depth in range(rows_each)
        ]
        logits = self.logits(seed, slots)
        positions = [
            (self.requests[slot].position + depth % rows_each) % 2**64
            if slot in self.requests
            else 0
            for depth, slot in enumerate(slots)
        ]
        alone = [
            self.alone(slot, logits[row], positions[row], False, extra[row])
            for row, slot in enumerate(slots)
        ]
        given: dict[str, Any] = {"extra_output_ids": extra, "backend": self.backend}
        got = sample(logits, self.table, slots, positions=positions, check=False, **given)
        self.assert_output(got, alone)
        filtered = filter_logits(logits, self.table, slots, **given)
        for row, slot in enumerate(slots):
            if slot in self.requests:
                request = self.requests[slot]
                kept = filter_logits(
                    logits[row : row + 1],
                    request.params,
                    history=self.history_of(request, extra[row]),
                    backend="torch",
                )
                assert torch.equal(filtered[row : row + 1], kept)

    def assert_output(self, got: SampleOutput, alone: list[SampleOutput]) -> None:
        assert got.tokens.tolist() == [int(one.tokens) for one in alone]
        assert got.status.tolist() == [int(one.status) for one in alone]

    def history_of(self, request: Request, extra: list[int]) -> TokenHistory:
        return TokenHistory.from_ids(
            [request.prompt],
            [[*request.output, *extra]],
            self.v,
            max_length=10**3,
            penalty_last_n=request.params.penalty_last_n,
        )

    def alone(
        self,
        slot: int,
        logits: Tensor,
        position: int | None,
        record: bool,
        extra: list[int] | None = None,
    ) -> SampleOutput:
        """Return what a row gets alone."""
        request = self.requests.get(slot)
        nothing = torch.full((1,), -1)
        if request is None:
            return SampleOutput(nothing, None, torch.tensor([0 if slot == -1 else 2]))
        if record and self.room(request) <= 0:
            return SampleOutput(nothing, None, torch.tensor([8]))
        return sample(
            logits[None],
            request.params,
            history=self.history_of(request, extra or []),
            positions=[(request.position if position is None else position) % 2**64],
            backend="torch",
            check=False,
        )

    # What does not change anything

    @rule(how=st.sampled_from(("state", "copy", "other backend")))
    def restore(self, how: str) -> None:
        if how == "copy":
            self.table = copy.deepcopy(self.table)
            return
        state = self.table.state_dict()
        if how == "other backend":
            state = RequestTable.from_state_dict(state, backend=ON_THE_CPU[0]).state_dict()
        self.table = RequestTable.from_state_dict(state, backend=self.backend)

    @rule(what=st.sampled_from(sorted(REFUSED)))
    def refused(self, what: str) -> None:
        call, message = REFUSED[what]
        if what == "a free slot" and CAPACITY - 1 in self.requests:
            return
        if what == "no ids in order" and 0 not in self.requests:
            return
        with pytest.raises(ValueError, match=message):
            call(self.table)

    @invariant()
    def is_the_model(self) -> None:
        positions = self.table.positions.tolist()
        for slot in range(CAPACITY):
            request = self.requests.get(slot)
            assert self.table.params(slot) == (None if request is None else request.params)
            if request is not None:
                assert positions[slot] == as_int64(request.position)
        slots = sorted(self.requests)
        history = self.table.history_of(torch.tensor(slots, dtype=torch.int32))
        assert history is not None
        assert_history(history, [self.requests[slot] for slot in slots])


def run(backend: str, how: settings) -> None:
    """Run on one thread, because small operations are slow on several when cores are busy."""
    machine = type("Serving", (Serving,), {"backend": backend})
    with threads(1):
        run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "torch" else name
        for name in ON_THE_CPU
    ],
    indirect=True,
)
def test_a_table_is_its_requests(backend: str) -> None:
    run(backend, fewer_runs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_THE_CPU, indirect=True)
def test_a_table_under_other_calls(backend: str) -> None:
    """New calls every time: ``pytest -m slow tests/sampling/test_table_stateful.py``."""
    run(backend, other_runs)


# ---- Negative controls: the same runs must detect each of these faults ---------------------------

TORCH = backends.BACKENDS["torch"].load()
RIGHT_UPDATE, RIGHT_SAMPLE, RIGHT_SET = TORCH.update_history, TORCH.sample, RequestTable.set


def without_prompts(update: HistoryUpdate) -> None:
    """Broken: what is filled in counts as output, the prompt too."""
    RIGHT_UPDATE(replace(update, prompt_lengths=None))


def without_positions(update: HistoryUpdate) -> None:
    """Broken: the table's own positions stay where they are."""
    RIGHT_UPDATE(replace(update, position=None))


def first_token_only(update: HistoryUpdate) -> None:
    """Broken: of several tokens that are appended at once, the first one is recorded."""
    numbers = update.numbers
    if update.kind == "append":
        numbers = numbers.clamp(max=1)
    RIGHT_UPDATE(replace(update, numbers=numbers))


def record_everything(call: SampleCall) -> SampleOutput:
    """Broken: rows that are not to be recorded are recorded too."""
    return RIGHT_SAMPLE(replace(call, record=None))


def forget_the_draft(call: SampleCall) -> SampleOutput:
    """Broken: the ids that come next for one call do not count."""
    return RIGHT_SAMPLE(replace(call, extra_output=None))


def named_once(self: ParamSlots, history: TokenHistory | None) -> Tensor:
    """Broken: rows that share a slot are recorded."""
    return self.exist()


def full_is_not_seen(call: SampleCall, output: SampleOutput) -> SampleOutput:
    """Broken: a row whose text is full draws a token, which is lost."""
    return output


def set_without_a_position(self: RequestTable, *given: Any, **more: Any) -> None:
    """Broken: the position that is given with a request is ignored."""
    RIGHT_SET(self, *given, **{**more, "position": None})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (TORCH, "update_history", without_prompts),
        (TORCH, "update_history", without_positions),
        (TORCH, "update_history", first_token_only),
        (TORCH, "sample", record_everything),
        (TORCH, "sample", forget_the_draft),
        (TORCH, "without_full_rows", full_is_not_seen),
        (base.ParamSlots, "are_named_once", named_once),
        (RequestTable, "set", set_without_a_position),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_one_is_seen(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, wrong: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    without_shrinking = settings(some_runs, max_examples=2000, phases=[Phase.generate])
    # or an unexpected refusal, or none where one was expected
    with pytest.raises((AssertionError, ValueError, RuntimeError, pytest.fail.Exception)):
        run("torch", without_shrinking)
