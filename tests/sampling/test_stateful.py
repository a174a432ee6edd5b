"""Do a TokenHistory and a Sampler stay right under any order of calls?

Hypothesis generates valid and invalid calls. A model in plain Python, lists of ids per request,
follows them, and after each call the state is compared with the model's. A refused call must change
nothing.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
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
from intruder import intruding
from plain_model import (
    Request,
    as_int64,
    assert_history,
    ids,
    inside,
    lengths,
    other_runs,
    params,
    roll_back,
    room_of,
    some_ids,
    some_runs,
    vocab_sizes,
    windows,
)
from torch import Tensor

from llm_sampling import (
    BatchParams,
    InvalidLogitsError,
    SampleOutput,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    sample,
)
from llm_sampling.backends import base
from llm_sampling.backends.base import SampleCall
from llm_sampling.growing_table import GrowingTable
from llm_sampling.history import HistoryUpdate, selection
from llm_sampling.results import Kind

# ---- A history -----------------------------------------------------------------------------------


def append_by_the_owner(
    history: TokenHistory,
    requests: list[Request],
    tokens: list[int],
    dtype: torch.dtype = torch.int64,
) -> None:
    """Append a token to each row; one for which there is no room makes the call raise."""
    max_length = None if history.text is None else history.text.max_length
    given = torch.tensor(tokens, dtype=dtype)
    if any(
        inside([token], history.vocab_size)
        and room_of(request, history.vocab_size, max_length) <= 0
        for request, token in zip(requests, tokens, strict=True)
    ):
        with pytest.raises(ValueError, match="there must be at most max_length"):
            history.append(given)
        return
    history.append(given)
    for request, token in zip(requests, tokens, strict=True):
        request.output = [*request.output, token]


#: Invalid calls by name, each with a pattern of its error message.
REFUSED_BY_A_HISTORY: dict[str, tuple[Callable[[TokenHistory], object], str]] = {
    "floats": (lambda h: h.append(torch.zeros(h.rows)), "tokens must be int64 or int32"),
    "more tokens": (
        lambda h: h.append(torch.zeros(h.rows + 1, dtype=torch.int64)),
        "tokens must have shape",
    ),
    "no such row": (lambda h: h.select([*range(h.rows), h.rows]), "rows must be integers in 0"),
    "a row twice": (
        lambda h: h.select([*range(h.rows), 0]),
        "rows must (name each row at most once|be integers in 0)",
    ),
    "a fraction": (lambda h: h.add([1], [0.5]), "output_ids must hold"),  # type: ignore[list-item]
    "nested": (lambda h: h.add([[1]], [1]), "prompt_ids must hold"),  # type: ignore[list-item]
}


class Histories(RuleBasedStateMachine):
    """Calls of a TokenHistory's methods, followed by a model."""

    @initialize(
        v=vocab_sizes, given=st.lists(st.tuples(ids, ids, windows), max_size=4), max_length=lengths
    )
    def begin(
        self, v: int, given: list[tuple[list[int], list[int], int]], max_length: int | None
    ) -> None:
        self.v, self.max_length = v, max_length
        self.requests = [
            Request(prompt, output, window=-1 if max_length is None else window)
            for prompt, output, window in given
        ]
        self.history = TokenHistory.from_ids(
            [prompt for prompt, _, _ in given],
            [output for _, output, _ in given],
            v,
            max_length=max_length,
            penalty_last_n=None if max_length is None else [r.window for r in self.requests],
        )

    @rule(prompt=ids, output=ids, window=windows, as_tensor=st.booleans())
    def add(self, prompt: list[int], output: list[int], window: int, as_tensor: bool) -> None:
        given = torch.tensor(prompt, dtype=torch.int64) if as_tensor else prompt
        if window >= 0 and self.max_length is None:
            with pytest.raises(ValueError, match="penalty_last_n needs the ids in order"):
                self.history.add(given, output, penalty_last_n=window)
            return
        assert self.history.add(given, output, penalty_last_n=window) == len(self.requests)
        self.requests.append(Request(prompt, output, window=window))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.requests))))
        order = order[: data.draw(st.integers(0, len(order)))]
        self.history.select(order)
        self.requests = [self.requests[row] for row in order]

    @rule(data=st.data(), dtype=st.sampled_from((torch.int64, torch.int32)))
    def append(self, data: st.DataObject, dtype: torch.dtype) -> None:
        rows = len(self.requests)
        tokens = data.draw(st.lists(some_ids, min_size=rows, max_size=rows))
        append_by_the_owner(self.history, self.requests, tokens, dtype)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=ids)
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        row = data.draw(st.integers(0, len(self.requests) - 1))
        request = self.requests[row]
        if len(inside(tokens, self.v)) > room_of(request, self.v, self.max_length):
            with pytest.raises(ValueError, match="tokens must be at most"):
                self.history.extend(row, tokens)
            return
        self.history.extend(row, tokens)
        request.output = [*request.output, *tokens]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), number=st.integers(0, 5))
    def rollback(self, data: st.DataObject, number: int) -> None:
        row = data.draw(st.integers(0, len(self.requests) - 1))
        request = self.requests[row]
        if self.max_length is None or number > len(inside(request.output, self.v)):
            with pytest.raises(ValueError, match=r"rollback needs|num_tokens must be at most"):
                self.history.rollback(row, number)
            return
        self.history.rollback(row, number)
        roll_back(request, number, self.v)

    @rule(keep=st.booleans())
    def clone(self, keep: bool) -> None:
        """Go on with the original or the clone; changes of the other must not show."""
        other = self.history.clone()
        if keep:
            self.history, other = other, self.history
        for row in range(other.rows):
            if room_of(self.requests[row], self.v, self.max_length) > 0:
                other.extend(row, [0])
        other.select([*range(other.rows)][1:])
        other.add([0], [0])

    @rule(what=st.sampled_from(sorted(REFUSED_BY_A_HISTORY)))
    def refused(self, what: str) -> None:
        call, message = REFUSED_BY_A_HISTORY[what]
        with pytest.raises(ValueError, match=message):
            call(self.history)

    @invariant()
    def is_the_model(self) -> None:
        assert_history(self.history, self.requests)


# ---- A Sampler -----------------------------------------------------------------------------------


def without_penalties(some: SamplingParams) -> SamplingParams:
    return replace(some, repetition_penalty=1, frequency_penalty=0, presence_penalty=0)


def without_window(some: SamplingParams) -> SamplingParams:
    return replace(some, penalty_last_n=-1)


#: Memory layouts of the logits.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 2), value=math.nan)[:, 3:-2],
}

REFUSED_BY_A_SAMPLER: dict[str, tuple[Callable[[Sampler], object], str]] = {
    "more rows": (lambda s: s(torch.zeros(s.rows + 1, s.vocab_size)), "logits must have shape"),
    "more tokens": (lambda s: s(torch.zeros(s.rows, s.vocab_size + 1)), "logits must have shape"),
    "integers": (
        lambda s: s(torch.zeros(s.rows, s.vocab_size, dtype=torch.int32)),
        "logits must be float32, float16 or bfloat16",
    ),
    "another mask": (
        lambda s: s(
            torch.zeros(s.rows, s.vocab_size),
            allowed_mask=torch.zeros(s.rows + 2, 9, dtype=torch.int32),
        ),
        "allowed_mask must have one row for each row",
    ),
    "remove no such row": (lambda s: s.remove([s.rows]), "rows must be integers in 0"),
    "a row twice": (
        lambda s: s.reorder([*range(s.rows), 0]),
        "rows must (name each row at most once|be integers in 0)",
    ),
    "a fraction": (
        lambda s: s.add(SamplingParams(), output_ids=[0.5]),  # type: ignore[list-item]
        "output_ids must hold",
    ),
    "a dict": (lambda s: s.add({"top_k": 5}), "params must be a SamplingParams"),  # type: ignore[arg-type]
    "extend no such row": (lambda s: s.extend(s.rows, [1]), "row must be an integer in 0"),
    "half a token": (lambda s: s.extend(0, [0.5]), "row must be an integer|tokens must hold"),  # type: ignore[list-item]
    "params of no such row": (
        lambda s: s.set_params(-1, SamplingParams()),
        "row must be an integer in 0",
    ),
    "roll back no such row": (lambda s: s.rollback(s.rows, 0), "row must be an integer in 0"),
    "roll back a fraction": (
        lambda s: s.rollback(0, 0.5),  # type: ignore[arg-type]
        "row must be an integer|num_tokens must be an integer",
    ),
    "a large position": (lambda s: s.set_position(0, 2**64), "row must be an|position must be in"),
}


#: Changes of a Sampler that may be interrupted, or that may come within another call.
CHANGES: dict[str, Callable[[Sampler, Tensor], object]] = {
    "step": lambda s, logits: s(logits),
    "add": lambda s, logits: s.add(CHANGE_PARAMS),
    "reorder": lambda s, logits: s.reorder(range(s.rows)[::-1]),
    "extend": lambda s, logits: s.extend(0, CHANGE_IDS),
    "rollback": lambda s, logits: s.rollback(0, 1),
    "set_params": lambda s, logits: s.set_params(0, CHANGE_PARAMS),
    "state_dict": lambda s, logits: s.state_dict(),
}
CHANGE_PARAMS = SamplingParams(top_k=3)
CHANGE_IDS = [0, 31, 0, 99]
#: The changes that need a row.
NEED_A_ROW = ("extend", "rollback", "set_params")


def interrupt(at: int, call: Callable[[], object]) -> None:
    """Make a call, and raise KeyboardInterrupt in it as the function of this number returns.

    CPython handles Ctrl-C after calls.
    """
    events = itertools.count()

    def look(frame: Any, event: str, argument: object) -> None:
        if event in ("return", "c_return") and next(events) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    try:
        sys.setprofile(look)
        call()
    except (KeyboardInterrupt, ValueError):  # or what the call itself refuses
        pass
    finally:
        sys.setprofile(None)


class Decoding(RuleBasedStateMachine):
    """Calls of a Sampler; each row must get what the reference gives it alone for its past."""

    backend = "torch"

    @initialize(
        v=vocab_sizes,
        first=st.lists(params, max_size=4),
        given=st.booleans(),
        before=st.sampled_from((0, 2**32 - 3, 2**63 - 3, 2**64 - 3)),
        num_samples=st.sampled_from((1, 1, 1, 3)),
        logprobs=st.sampled_from((None, "processed", "raw")),
        check=st.booleans(),
        torch_seed=st.integers(0, 2**16),
        max_length=lengths,
        data=st.data(),
    )
    def begin(
        self,
        v: int,
        first: list[SamplingParams],
        given: bool,
        before: int,
        num_samples: int,
        logprobs: Kind | None,
        check: bool,
        torch_seed: int,
        max_length: int | None,
        data: st.DataObject,
    ) -> None:
        self.v, self.num_samples, self.logprobs, self.check = v, num_samples, logprobs, check
        self.max_length = max_length
        if num_samples > 1:
            first = [*map(without_penalties, first)]
        if max_length is None:
            first = [*map(without_window, first)]
        seeds = self.seeds(first, torch_seed)
        is_kept = given or max_length is not None or any(p.needs_history for p in first)
        self.requests = [
            Request(params=p, seed=s, is_kept=is_kept, window=p.penalty_last_n)
            for p, s in zip(first, seeds, strict=True)
        ]
        history = None
        if given:
            for request in self.requests:
                request.prompt, request.output = data.draw(ids), data.draw(ids)
                request.before = before
                request.position = before + len(inside(request.output, v))
            history = TokenHistory.from_ids(
                [r.prompt for r in self.requests],
                [r.output for r in self.requests],
                v,
                max_length=max_length,
                penalty_last_n=None if max_length is None else [r.window for r in self.requests],
            )
            history.lengths += as_int64(before)
        torch.default_generator.manual_seed(torch_seed)
        self.sampler = Sampler(
            first,
            vocab_size=v,
            history=history,
            max_length=None if given else max_length,
            num_samples=num_samples,
            logprobs=logprobs,
            backend=self.backend,
            check=check,
        )

    def can_hold(self, p: SamplingParams) -> bool:
        """Whether the Sampler can have a row with these parameters."""
        return not (p.needs_history and p.has_window and self.max_length is None)

    def seeds(self, some: list[SamplingParams], torch_seed: int) -> list[int]:
        """Return the seeds that rows get at this generator seed, and set the generator to it."""
        torch.default_generator.manual_seed(torch_seed)
        seeds: list[int] = BatchParams.from_list(some).seeded().seed.tolist()
        torch.default_generator.manual_seed(torch_seed)
        return seeds

    @rule(p=params, prompt=ids, output=ids, torch_seed=st.integers(0, 2**16))
    def add(self, p: SamplingParams, prompt: list[int], output: list[int], torch_seed: int) -> None:
        given: dict[str, Any] = {"prompt_ids": prompt, "output_ids": output}
        if self.num_samples > 1 and p.needs_history:
            with pytest.raises(ValueError, match="num_samples must be 1 where a penalty"):
                self.sampler.add(p, **given)
            return
        if not self.can_hold(p):
            with pytest.raises(ValueError, match="params must have no penalty_last_n, "):
                self.sampler.add(p, **given)
            return
        if self.sampler.history is None and p.needs_history:
            for request in self.requests:  # the Sampler kept no ids, as no row had a penalty
                request.prompt, request.output, request.is_kept = [], [], False
        (seed,) = self.seeds([p], torch_seed)
        assert self.sampler.add(p, **given) == len(self.requests)
        position, is_kept = len(inside(output, self.v)), self.sampler.history is not None
        window = -1 if self.max_length is None else p.penalty_last_n
        self.requests.append(Request(prompt, output, 0, p, seed, position, is_kept, window))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        rows = range(len(self.requests))
        gone = data.draw(st.sets(st.sampled_from(rows), max_size=2)) if rows else set()
        self.sampler.remove(sorted(gone))
        self.requests = [r for row, r in enumerate(self.requests) if row not in gone]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.requests))))
        self.sampler.reorder(order)
        self.requests = [self.requests[row] for row in order]

    def some_request(self, data: st.DataObject) -> tuple[int, Request]:
        row = data.draw(st.integers(0, len(self.requests) - 1))
        return row, self.requests[row]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=ids)
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        row, request = self.some_request(data)
        if len(inside(tokens, self.v)) > self.room(request):
            with pytest.raises(ValueError, match="tokens must be at most"):
                self.sampler.extend(row, tokens)
            return
        self.sampler.extend(row, tokens)
        self.extended(request, tokens)

    def room(self, request: Request) -> int:
        """Return how many more tokens of a row the Sampler can record."""
        return room_of(request, self.v, self.max_length if self.num_samples == 1 else None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), number=st.integers(0, 4))
    def rollback(self, data: st.DataObject, number: int) -> None:
        row, request = self.some_request(data)
        if number > self.most_to_roll_back(request):
            with pytest.raises(ValueError, match=r"rollback needs|num_tokens must be at most"):
                self.sampler.rollback(row, number)
            return
        self.sampler.rollback(row, number)
        self.rolled_back(request, number)

    def most_to_roll_back(self, request: Request) -> int:
        """Return how many tokens of a row can be taken away; -1 if the Sampler does not know."""
        if self.sampler.history is None or self.num_samples > 1:
            return request.position % 2**64
        return -1 if self.max_length is None else len(inside(request.output, self.v))

    def rolled_back(self, request: Request, number: int) -> None:
        request.position -= number
        if self.sampler.history is not None and self.num_samples == 1:
            roll_back(request, number, self.v)

    def extended(self, request: Request, tokens: list[int]) -> None:
        request.position += len(inside(tokens, self.v))
        if self.num_samples == 1:
            request.output = [*request.output, *tokens]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), position=st.sampled_from((0, 7, 2**63 - 1, 2**63, 2**64 - 1, -5)))
    def set_position(self, data: st.DataObject, position: int) -> None:
        row, request = self.some_request(data)
        self.sampler.set_position(row, position)
        request.position = position

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), p=params)
    def set_params(self, data: st.DataObject, p: SamplingParams) -> None:
        row, request = self.some_request(data)
        if p.needs_history and (self.num_samples > 1 or not request.is_kept):
            with pytest.raises(ValueError, match=r"num_samples must be 1|history was not kept"):
                self.sampler.set_params(row, p)
            return
        if not self.can_hold(p):
            with pytest.raises(ValueError, match="params must have no penalty_last_n, "):
                self.sampler.set_params(row, p)
            return
        self.sampler.set_params(row, p)
        request.params = p
        if self.max_length is not None:
            request.window = p.penalty_last_n
        if p.seed is not None:
            request.seed = as_int64(p.seed)

    @rule(seed=st.integers(0, 2**16), backend=st.sampled_from(ON_THE_CPU))
    def restore(self, seed: int, backend: str) -> None:
        """Go on with a Sampler of the same state; one on any backend takes the next step too."""
        state, rows = self.sampler.state_dict(), len(self.requests)
        other = Sampler.from_state_dict(state, backend=backend)
        logits = torch.randn(rows, self.v, generator=torch.Generator().manual_seed(seed))
        alone = [self.alone(row, logits, None) for row in range(rows)]
        wanted = [one.tokens.squeeze(0).tolist() for one in alone]
        if not (self.check and any(int(one.status) for one in alone)):
            assert other(logits).tokens.tolist() == wanted
        self.sampler = Sampler.from_state_dict(state, backend=self.backend)

    @rule(
        seeds=st.lists(st.integers(0, 2**16), min_size=1, max_size=4),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        masked=st.booleans(),
        layout=st.sampled_from(sorted(LAYOUTS)),
        bad=st.sampled_from((0.0, 0.0, 0.0, math.nan, math.inf, -math.inf)),
    )
    def steps(
        self, seeds: list[int], dtype: torch.dtype, masked: bool, layout: str, bad: float
    ) -> None:
        """Take one to four steps, of which the first may have a bad row."""
        for seed in seeds:
            self.step(seed, dtype, masked, layout, bad)
            bad = 0.0

    @rule(
        seed=st.integers(0, 2**16), at=st.integers(0, 60), change=st.sampled_from(sorted(CHANGES))
    )
    def interrupted(self, seed: int, at: int, change: str) -> None:
        """Ctrl-C comes as a function is called or returns; the change is done as a whole or not."""
        rows = len(self.requests)
        if change in NEED_A_ROW and not rows:
            return
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, self.v, generator=generator)
        positions = self.sampler.positions.tolist()

        def rows_of_now() -> tuple[list[int], list[int]]:
            return self.sampler._places, [*map(id, self.sampler.params)]

        before = rows_of_now()
        seeds = self.seeds([CHANGE_PARAMS], seed)
        interrupt(at, lambda: CHANGES[change](self.sampler, logits))
        if change == "step" and self.sampler.positions.tolist() != positions:
            self.record([self.alone(row, logits, None) for row in range(rows)])
        elif change == "extend" and self.sampler.positions.tolist() != positions:
            self.extended(self.requests[0], CHANGE_IDS)
        elif change == "rollback" and self.sampler.positions.tolist() != positions:
            self.rolled_back(self.requests[0], 1)
        elif rows_of_now() != before:
            if change == "add":
                is_kept = self.sampler.history is not None
                added = Request(params=CHANGE_PARAMS, seed=seeds[0], is_kept=is_kept)
                self.requests.append(added)
            elif change == "set_params":
                self.requests[0].params = CHANGE_PARAMS
                self.requests[0].window = -1
            else:
                self.requests.reverse()

    @rule(seed=st.integers(0, 2**16))
    def a_second_call(self, seed: int) -> None:
        """A call that comes within another one raises; the first one goes on."""
        refused = []

        def intrude() -> None:
            for change in CHANGES.values():
                with pytest.raises(RuntimeError, match="is being changed by another call"):
                    change(self.sampler, torch.zeros(len(self.requests), self.v))
                refused.append(change)

        def wrap(logits: Tensor) -> Tensor:
            return intruding(logits, intrude)

        self.step(seed, torch.float32, False, "contiguous", 0.0, wrap)
        assert refused == [*CHANGES.values()]

    def step(
        self,
        seed: int,
        dtype: torch.dtype,
        masked: bool,
        layout: str,
        bad: float,
        wrap: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        rows = len(self.requests)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, self.v, generator=generator)
        if bad != 0 and rows:
            # the mask always allows token 0, so its value is reported
            logits[seed % rows, slice(None) if bad == -math.inf else 0] = bad
        logits, mask = LAYOUTS[layout](logits.to(dtype)), None
        if masked:
            words = torch.randint(-(2**31), 2**31, (rows, -(-self.v // 32)), generator=generator)
            mask = (words | 1).to(torch.int32)
        wanted = [self.alone(row, logits, mask) for row in range(rows)]
        statuses = [int(one.status) for one in wanted]
        if self.check and any(statuses):  # the call raises and no row advances
            with pytest.raises(InvalidLogitsError) as error:
                self.sampler(wrap(logits), allowed_mask=mask)
            assert error.value.rows == [row for row, status in enumerate(statuses) if status]
            return
        got = self.sampler(wrap(logits), allowed_mask=mask)
        assert got.status.tolist() == statuses
        assert got.tokens.tolist() == [one.tokens.squeeze(0).tolist() for one in wanted]
        if self.logprobs is None:
            assert got.logprobs is None
        elif rows:
            logprobs = torch.stack(
                [one.logprobs.squeeze(0) for one in wanted if one.logprobs is not None]
            )
            torch.testing.assert_close(got.logprobs, logprobs, rtol=0, atol=1e-5, equal_nan=True)
        self.record(wanted)

    def record(self, wanted: list[SampleOutput]) -> None:
        """Note what every row has drawn."""
        for request, one in zip(self.requests, wanted, strict=True):
            token = int(one.tokens.flatten()[0])
            request.position += token != -1
            if self.num_samples == 1:
                request.output = [*request.output, token]

    def alone(self, row: int, logits: Tensor, mask: Tensor | None) -> SampleOutput:
        request = self.requests[row]
        if self.sampler.history is not None and self.room(request) <= 0:
            return SampleOutput(
                torch.full((1,), -1), torch.full((1,), math.nan), torch.tensor([8]).int()
            )
        return sample(
            logits[row : row + 1],
            replace(request.params, seed=request.seed % 2**64),
            history=TokenHistory.from_ids(
                [request.prompt],
                [request.output],
                self.v,
                max_length=10**3,
                penalty_last_n=request.params.penalty_last_n,
            ),
            allowed_mask=None if mask is None else mask[row : row + 1],
            positions=[request.position % 2**64],
            num_samples=self.num_samples,
            logprobs=self.logprobs,
            backend="torch",
            check=False,
        )

    @rule(what=st.sampled_from(sorted(REFUSED_BY_A_SAMPLER)))
    def refused(self, what: str) -> None:
        call, message = REFUSED_BY_A_SAMPLER[what]
        with pytest.raises(ValueError, match=message):
            call(self.sampler)

    # The user changes the history that the Sampler uses

    @precondition(lambda self: self.sampler.history is not None)
    @rule(data=st.data())
    def the_owner_appends(self, data: st.DataObject) -> None:
        assert self.sampler.history is not None
        rows = len(self.requests)
        tokens = data.draw(st.lists(some_ids, min_size=rows, max_size=rows))
        append_by_the_owner(self.sampler.history, self.requests, tokens)

    @precondition(lambda self: self.sampler.history is not None)
    @rule(data=st.data())
    def the_owner_reorders(self, data: st.DataObject) -> None:
        """In another order every call raises, until the rows are in the Sampler's order again."""
        assert self.sampler.history is not None
        history, rows = self.sampler.history, len(self.requests)
        order = data.draw(st.permutations(range(rows)))
        history.select(order)
        for call in (
            lambda: self.sampler(torch.zeros(rows, self.v)),
            lambda: self.sampler.reorder(range(rows)),
            lambda: self.sampler.add(SamplingParams(seed=1)),
        ):
            if order == [*range(rows)]:
                break
            with pytest.raises(ValueError, match="history must have the Sampler's rows in their"):
                call()
        history.select(sorted(range(rows), key=order.__getitem__))

    @precondition(lambda self: self.sampler.history is not None)
    @rule(prompt=ids, output=ids)
    def the_owner_adds(self, prompt: list[int], output: list[int]) -> None:
        """An extra row makes every call raise until it is removed; the memory may then be new."""
        assert self.sampler.history is not None
        rows = range(len(self.requests))
        self.sampler.history.add(prompt, output)
        for call in (
            lambda: self.sampler(torch.zeros(len(rows), self.v)),
            lambda: self.sampler.reorder(rows),
            lambda: self.sampler.remove([]),
            lambda: self.sampler.add(SamplingParams(seed=1)),
        ):
            with pytest.raises(ValueError, match="history must have one row per row of logits"):
                call()
        self.sampler.history.select(rows)

    @invariant()
    def is_the_model(self) -> None:
        assert self.sampler.rows == len(self.requests)
        assert self.sampler.params == tuple(r.params for r in self.requests)
        assert self.sampler.positions.tolist() == [as_int64(r.position) for r in self.requests]
        assert self.sampler.seeds == tuple(r.seed % 2**64 for r in self.requests)
        if self.sampler.history is not None:
            assert_history(self.sampler.history, self.requests)


def run(machine: type[RuleBasedStateMachine], how: settings) -> None:
    """Run on one thread, because small operations are slow on several when cores are busy."""
    with threads(1):
        run_state_machine_as_test(machine, settings=how)


def decoding(backend: str) -> type[Decoding]:
    return type("Decoding", (Decoding,), {"backend": backend})


def test_a_history_is_its_ids() -> None:
    run(Histories, some_runs)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "torch" else name
        for name in ON_THE_CPU
    ],
    indirect=True,
)
def test_a_sampler_is_its_requests(backend: str) -> None:
    run(decoding(backend), some_runs)


@pytest.mark.slow
def test_a_history_under_other_calls() -> None:
    """New calls every time: ``pytest -m slow tests/sampling/test_stateful.py``."""
    run(Histories, other_runs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_THE_CPU, indirect=True)
def test_a_sampler_under_other_calls(backend: str) -> None:
    run(decoding(backend), other_runs)


# ---- Negative controls: the same runs must detect each of these faults ---------------------------

TORCH = backends.BACKENDS["torch"].load()
RIGHT_RECORD = TokenHistory.record
RIGHT_EXTENSION, RIGHT_REDUCTION = TokenHistory.extension, TokenHistory.reduction
RIGHT_SET_PARAMS = Sampler.set_params
RIGHT_APPEND, RIGHT_FILL, RIGHT_GROW = TokenHistory.append, TokenHistory._fill, TokenHistory.grow
RIGHT_ADD, RIGHT_ARRANGE = Sampler.add, Sampler._arrange
RIGHT_FILL_SLOT, RIGHT_GROW_TO = GrowingTable._fill, GrowingTable._grow_to
RIGHT_SAMPLE, RIGHT_PREPARE = TORCH.sample, TORCH.prepare


def append_by_row(self: TokenHistory, tokens: Tensor) -> None:
    """Broken: ``append`` takes row i's slot to be i and ignores the slot mapping."""
    slots = self.slots
    self._set(slots=torch.arange(self.rows, dtype=torch.int32))
    RIGHT_APPEND(self, tokens)
    self._set(slots=slots)


def record_by_row(self: TokenHistory, tokens: Tensor, *positions: Any) -> None:
    """Broken: a Sampler's step takes row i's slot to be i."""
    slots = self.slots
    self._set(slots=torch.arange(self.rows, dtype=torch.int32))
    RIGHT_RECORD(self, tokens, *positions)
    self._set(slots=slots)


def append_padding(self: TokenHistory, tokens: Tensor) -> None:
    """Broken: ``append`` counts -1, which is padding, as token 0."""
    RIGHT_APPEND(self, tokens.clamp(min=0))


def extend_once(self: TokenHistory, row: int, tokens: Any, *position: Any) -> HistoryUpdate:
    """Broken: of several tokens that are recorded at once, equal ones count once."""
    return RIGHT_EXTENSION(self, row, np.unique(tokens), *position)


def roll_back_another_row(self: TokenHistory, row: int, *given: Any) -> HistoryUpdate:
    """Broken: what is taken away is taken from the last row."""
    return RIGHT_REDUCTION(self, self.rows - 1, *given)


def roll_back_one_less(self: TokenHistory, row: int, number: int) -> HistoryUpdate:
    """Broken: one token less is taken away than was asked for."""
    return RIGHT_REDUCTION(self, row, max(number - 1, 0))


def move_no_window(self: TokenHistory, row: int, window: int) -> None:
    """Broken: a row with other parameters keeps the window that it had."""


def set_params_in_the_first_row(self: Sampler, row: int, params: SamplingParams) -> None:
    """Broken: the first row gets the new parameters, whichever row they are for."""
    RIGHT_SET_PARAMS(self, 0, params)


def select_sorted(self: TokenHistory, rows: list[int]) -> None:
    """Broken: ``select`` keeps the rows in their old order."""
    self._set(slots=self.slots[selection(rows, self.rows).sort().values])


def fill_over_old_bits(self: TokenHistory, slots: Any, *given: Any) -> None:
    """Broken: a slot that is used again keeps the seen bits of its last request."""
    slots = [*slots]
    old = self.seen[slots].clone()
    RIGHT_FILL(self, slots, *given)
    self.seen[slots] |= old


def grow_without_lengths(self: TokenHistory) -> None:
    """Broken: growing a history resets all lengths to 0."""
    RIGHT_GROW(self)
    self.lengths.zero_()


def same_tensors(self: TokenHistory) -> TokenHistory:
    """Broken: a clone shares its tensors with the original."""
    return self._map(lambda tensor: tensor)


def add_without_a_position(self: Sampler, params: SamplingParams, **given: Any) -> int:
    """Broken: an added row starts at position 0, whatever its output."""
    row = RIGHT_ADD(self, params, **given)
    self._table.positions_of_slots[self._places[-1]] = 0
    return row


def arrange_with_sorted_seeds(self: Sampler, places: list[int], *history: Any) -> None:
    """Broken: a change of rows sorts the seeds, so that rows get each other's."""
    RIGHT_ARRANGE(self, places, *history)
    seeds = self._table._numbers.on_host["seed"]
    seeds[places] = np.sort(seeds[places])


def arrange_without_the_step(self: Sampler, *given: Any) -> None:
    """Broken: after a change of rows the prepared step reads the parameters of the old ones."""
    RIGHT_ARRANGE(self, *given)
    self._new_slots = None


def arrange_in_old_order(self: Sampler, places: list[int], *history: Any) -> None:
    """Broken: rows that are reordered keep the slots that they had."""
    is_same = sorted(places) == sorted(self._places)
    RIGHT_ARRANGE(self, self._places if is_same else places, *history)


def fill_slot_over_old_bits(self: GrowingTable, history: Any, slot: int, *given: Any) -> None:
    """Broken: a slot that is used again keeps the seen bits of its last request."""
    old = history.seen[slot].clone()
    RIGHT_FILL_SLOT(self, history, slot, *given)
    history.seen[slot] |= old


def grow_without_positions(self: GrowingTable, capacity: int) -> None:
    """Broken: growing a table resets all positions to 0."""
    old = self.capacity
    RIGHT_GROW_TO(self, capacity)
    if self.capacity > old:
        self.positions_of_slots.zero_()


def forget_biases(self: GrowingTable, *given: Any) -> list[Any]:
    """Broken: the biases stay those of the first step."""
    return []


def sample_then_check(call: SampleCall) -> SampleOutput:
    """Broken: the rows advance before the check raises."""
    output = RIGHT_SAMPLE(replace(call, check=False))
    if call.check:
        base.raise_on_status(output.status)
    return output


def prepare_for_good(call: SampleCall) -> Callable[[Tensor, Tensor | None], SampleOutput]:
    """Broken: a prepared step does not notice that the history has new tensors."""
    history = None if call.history is None else same_tensors(call.history)
    return RIGHT_PREPARE(replace(call, history=history))


def advance_every_row(call: SampleCall, output: SampleOutput) -> None:
    """Broken: the position of a row without a candidate advances too."""
    assert call.batch.position is not None
    call.batch.position.add_(1)
    if call.history is not None:
        call.history.record(output.tokens)


@pytest.mark.parametrize(
    ("machine", "owner", "name", "wrong"),
    [
        (Histories, TokenHistory, "append", append_by_row),
        (Histories, TokenHistory, "append", append_padding),
        (Histories, TokenHistory, "select", select_sorted),
        (Histories, TokenHistory, "extension", extend_once),
        (Histories, TokenHistory, "reduction", roll_back_one_less),
        (Decoding, TokenHistory, "reduction", roll_back_another_row),
        (Decoding, TokenHistory, "with_window", move_no_window),
        (Histories, TokenHistory, "_fill", fill_over_old_bits),
        (Histories, TokenHistory, "grow", grow_without_lengths),
        (Histories, TokenHistory, "clone", same_tensors),
        (Decoding, TokenHistory, "record", record_by_row),
        (Decoding, TokenHistory, "select", select_sorted),
        (Decoding, GrowingTable, "_fill", fill_slot_over_old_bits),
        (Decoding, TokenHistory, "grow", grow_without_lengths),
        (Decoding, Sampler, "add", add_without_a_position),
        (Decoding, Sampler, "set_params", set_params_in_the_first_row),
        (Decoding, Sampler, "_arrange", arrange_with_sorted_seeds),
        (Decoding, Sampler, "_arrange", arrange_without_the_step),
        (Decoding, Sampler, "_arrange", arrange_in_old_order),
        (Decoding, GrowingTable, "_grow_to", grow_without_positions),
        (Decoding, GrowingTable, "_write_bias", forget_biases),
        (Decoding, TORCH, "sample", sample_then_check),
        pytest.param(Decoding, TORCH, "prepare", prepare_for_good, marks=pytest.mark.slow),
        (Decoding, TORCH, "advance", advance_every_row),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_one_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    machine: type[RuleBasedStateMachine],
    owner: object,
    name: str,
    wrong: Callable[..., object],
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    without_shrinking = settings(some_runs, max_examples=2000, phases=[Phase.generate])
    # or an unexpected refusal, or none where one was expected
    with pytest.raises(
        (AssertionError, ValueError, RuntimeError, IndexError, pytest.fail.Exception)
    ):
        run(machine, without_shrinking)
