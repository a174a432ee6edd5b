"""Tests of the callback that a Sampler asks before each step which tokens may be drawn."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_sampling import (
    InvalidLogitsError,
    MaskStep,
    Sampler,
    SamplingParams,
    TokenHistory,
    pack_mask,
)

V = 70
PARAMS = [SamplingParams(seed=seed, top_p=0.95) for seed in range(4)]


def logits_of(step: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(step)) * 3


class Recorder:
    """A callback that lets some rows draw certain tokens only, and keeps what it was told."""

    def __init__(self, allowed: dict[int, list[int]] | None = None) -> None:
        self.allowed = {} if allowed is None else allowed
        #: Of each call, for each row its id, whether it is new, its tokens, and how many of those
        #: that were told before do not hold any more.
        self.told: list[list[tuple[int, bool, tuple[int, ...], int]]] = []
        self.outputs: dict[int, list[int]] = {}
        self.ended: list[tuple[int, ...]] = []

    def __call__(self, step: MaskStep) -> Tensor:
        told = []
        for row in step.rows:
            output = self.outputs.setdefault(row.id, [])
            told.append((row.id, row.is_new, row.tokens, len(output) - row.start))
            output[row.start :] = row.tokens
        self.told.append(told)
        self.ended.append(step.ended)
        assert step.bitmask.shape == (len(step.rows), -(-V // 32))
        assert (step.bitmask == -1).all()
        assert step.vocab_size == V
        for place, row in enumerate(step.rows):
            if row.id in self.allowed:
                step.bitmask[place] = pack_mask([self.allowed[row.id]], V)
        return step.bitmask


def fresh_state(sampler: Sampler) -> dict[str, Any]:
    """Return a Sampler's state without what its callback has been told."""
    return {name: value for name, value in sampler.state_dict().items() if name != "masks"}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_free_rows_draw_what_they_draw_alone(backend: str) -> None:
    callback = Recorder({1: [3, 69], 3: [64]})
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, backend=backend)
    alone = Sampler(PARAMS, vocab_size=V, backend=backend)
    drawn: list[list[int]] = []
    for step in range(6):
        tokens = sampler(logits_of(step)).tokens.tolist()
        expected = alone(logits_of(step)).tokens.tolist()
        assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
        assert tokens[1] in (3, 69)
        assert tokens[3] == 64
        drawn.append(tokens)
    assert callback.told[0] == [(row, True, (), 0) for row in range(4)]
    for step in range(1, 6):
        assert callback.told[step] == [(row, False, (drawn[step - 1][row],), 0) for row in range(4)]
    assert callback.ended == [()] * 6


def in_place(step: MaskStep, allowed: Tensor) -> Tensor:
    step.bitmask.copy_(pack_mask(allowed, V))
    return step.bitmask


#: How a callback may say which tokens are allowed.
FORMS: dict[str, Callable[[MaskStep, Tensor], Any]] = {
    "in place": in_place,
    "bool": lambda step, allowed: allowed,
    "array": lambda step, allowed: allowed.numpy(),
    "bitmask": lambda step, allowed: pack_mask(allowed, V),
    "words": lambda step, allowed: pack_mask(allowed, V).numpy(),
    "ids": lambda step, allowed: [row.nonzero()[:, 0].tolist() for row in allowed],
    "wider": lambda step, allowed: torch.nn.functional.pad(allowed, (0, 58), value=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask(backend: str, form: str) -> None:
    allowed = torch.rand(4, V, generator=torch.Generator().manual_seed(7)) < 0.2
    asked = Sampler(
        PARAMS, vocab_size=V, backend=backend, allowed_mask=lambda s: FORMS[form](s, allowed)
    )
    given = Sampler(PARAMS, vocab_size=V, backend=backend)
    for step in range(3):
        expected = given(logits_of(step), allowed_mask=allowed).tokens
        assert torch.equal(asked(logits_of(step)).tokens, expected)


@pytest.mark.parametrize("free", [lambda step: None, lambda step: [None] * len(step.rows)])
def test_no_mask(backend: str, free: Callable[[MaskStep], Any]) -> None:
    asked = Sampler(PARAMS, vocab_size=V, backend=backend, allowed_mask=free)
    plain = Sampler(PARAMS, vocab_size=V, backend=backend)
    for step in range(3):
        assert torch.equal(asked(logits_of(step)).tokens, plain(logits_of(step)).tokens)


def test_a_mask_of_the_call_counts_too(backend: str) -> None:
    sampler = Sampler(PARAMS, vocab_size=V, backend=backend, allowed_mask=lambda s: [[1, 2]] * 4)
    assert sampler(logits_of(0), allowed_mask=[[2, 3]] * 4).tokens.tolist() == [2] * 4
    assert sampler(logits_of(1), allowed_mask=[[1], None, [2], [1]]).tokens[[0, 2, 3]].tolist() == [
        1,
        2,
        1,
    ]


def test_rows_keep_their_ids(backend: str) -> None:
    callback = Recorder()
    sampler = Sampler(PARAMS, vocab_size=V, backend=backend, allowed_mask=callback)
    first = sampler(logits_of(0)).tokens.tolist()
    sampler.reorder([3, 0, 2])
    assert sampler.row_ids == (3, 0, 2)
    second = sampler(logits_of(1, 3)).tokens.tolist()
    assert callback.told[-1] == [(row, False, (first[row],), 0) for row in (3, 0, 2)]
    assert callback.ended[-1] == (1,)
    sampler.remove([1])
    assert sampler.add(SamplingParams(seed=9), output_ids=[5, V, 6]) == 2
    assert sampler.row_ids == (3, 2, 4)
    sampler(logits_of(2, 3))
    assert callback.told[-1] == [
        (3, False, (second[0],), 0),
        (2, False, (second[2],), 0),
        (4, True, (5, 6), 0),
    ]
    assert callback.ended[-1] == (0,)


def test_rows_that_have_ended_are_not_asked_for(backend: str) -> None:
    callback = Recorder({row: [row] for row in range(4)})
    sampler = Sampler(PARAMS, vocab_size=V, backend=backend, allowed_mask=callback)
    free = Sampler(PARAMS, vocab_size=V, backend=backend)
    assert sampler(logits_of(0)).tokens.tolist() == [0, 1, 2, 3]
    free(logits_of(0))
    sampler.end([1, 3])
    sampler.end([1])
    tokens = sampler(logits_of(1)).tokens.tolist()
    expected = free(logits_of(1)).tokens.tolist()
    assert tokens == [0, expected[1], 2, expected[3]]
    assert callback.told[-1] == [(0, False, (0,), 0), (2, False, (2,), 0)]
    assert callback.ended[-1] == (1, 3)
    sampler.end([0, 2])
    sampler(logits_of(2))
    assert len(callback.told) == 2  # no row is left that needs a mask


@pytest.mark.parametrize("max_length", [None, 50])
def test_changes_are_told(backend: str, max_length: int | None) -> None:
    callback = Recorder()
    history = None
    if max_length is not None:
        history = TokenHistory.empty(4, V, max_length=max_length)
    sampler = Sampler(PARAMS, vocab_size=V, history=history, allowed_mask=callback, backend=backend)
    sampler(logits_of(0))
    second = sampler(logits_of(1)).tokens.tolist()
    sampler.extend(0, [7, V + 1, 8])  # an id outside of the vocabulary is padding
    sampler.rollback(1, 1)
    sampler.rollback(2, 2)
    sampler.extend(2, [9])
    sampler.extend(3, [5, 6])
    sampler.rollback(3, 3)
    sampler(logits_of(2))
    assert callback.told[-1] == [
        (0, False, (second[0], 7, 8), 0),
        (1, False, (), 0),
        (2, False, (9,), 1),  # of the two that it has lost, one was told
        (3, False, (), 0),
    ]
    assert sampler.positions.tolist() == [5, 2, 2, 2]


def test_a_rollback_that_is_refused_changes_nothing(backend: str) -> None:
    callback = Recorder()
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, backend=backend)
    drawn = sampler(logits_of(0)).tokens.tolist()
    with pytest.raises(ValueError, match="num_tokens must be at most 1"):
        sampler.rollback(0, 2)
    with pytest.raises(ValueError, match="tokens must hold one sequence"):
        sampler.extend(1, [0.5])  # type: ignore[list-item]
    sampler(logits_of(1))
    assert callback.told[-1] == [(row, False, (drawn[row],), 0) for row in range(4)]


# ---- forced tokens -------------------------------------------------------------------------------


class Forcing(Recorder):
    """Forces tokens in some rows the first time that it is asked for them."""

    def __init__(self, forced: dict[int, list[int]]) -> None:
        super().__init__()
        self.forced = forced

    def __call__(self, step: MaskStep) -> Tensor:
        bitmask = super().__call__(step)
        for place, row in enumerate(step.rows):
            if row.is_new:
                step.forced[place].extend(self.forced.get(row.id, []))
        return bitmask


def test_forced_tokens_come_one_in_each_step(backend: str) -> None:
    """Each counts as a token of the output: position, history and the draws of other rows."""
    callback = Forcing({1: [7, 8, 9], 3: [5]})
    history = TokenHistory.empty(4, V)
    sampler = Sampler(PARAMS, vocab_size=V, history=history, allowed_mask=callback, backend=backend)
    alone = Sampler(PARAMS, vocab_size=V, backend=backend)
    draws = [sampler(logits_of(step)).tokens.tolist() for step in range(5)]
    expected = [alone(logits_of(step)).tokens.tolist() for step in range(5)]
    assert [row[1] for row in draws[:3]] == [7, 8, 9]
    assert draws[0][3] == 5
    for step, (drawn, other) in enumerate(zip(draws, expected, strict=True)):
        assert [drawn[0], drawn[2]] == [other[0], other[2]]
        assert step < 3 or drawn[1] == other[1]  # the position is what it would have been
        assert step < 1 or drawn[3] == other[3]
    assert [[row[0] for row in told] for told in callback.told] == [
        [0, 1, 2, 3],
        [0, 2, 3],
        [0, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert callback.told[3][1] == (1, False, (7, 8, 9), 0)
    assert history.counts[1, [7, 8, 9]].tolist() == [1, 1, 1]
    assert history.lengths.tolist() == [5] * 4


def test_forced_tokens_may_be_appended_instead(backend: str) -> None:
    callback = Forcing({0: [7, 8, 9], 1: [1, 2, 3]})
    sampler = Sampler(PARAMS[:2], vocab_size=V, allowed_mask=callback, backend=backend)
    assert sampler(logits_of(0, 2)).tokens.tolist() == [7, 1]
    assert sampler.forced == ((8, 9), (2, 3))
    sampler.extend(0, [8, 9])
    sampler.extend(1, [2, 5])  # others: what was forced does not hold any more
    assert sampler.forced == ((), ())
    sampler(logits_of(1, 2))
    assert callback.told[-1] == [(0, False, (7, 8, 9), 0), (1, False, (1, 2, 5), 0)]
    assert sampler.positions.tolist() == [4, 4]


def test_a_rollback_forgets_what_was_forced(backend: str) -> None:
    callback = Forcing({0: [7, 8, 9]})
    sampler = Sampler(PARAMS[:1], vocab_size=V, allowed_mask=callback, backend=backend)
    sampler(logits_of(0, 1))
    sampler.rollback(0, 1)
    assert sampler.forced == ((),)
    sampler(logits_of(1, 1))
    assert callback.told[-1] == [(0, False, (), 0)]


def test_all_rows_are_forced(backend: str) -> None:
    """Then there is no row to ask for."""
    callback = Forcing({row: [1, 2] for row in range(4)})
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, backend=backend)
    assert sampler(logits_of(0)).tokens.tolist() == [1] * 4
    assert sampler(logits_of(1)).tokens.tolist() == [2] * 4
    assert len(callback.told) == 1


# ---- what is refused, and what an error leaves ---------------------------------------------------


@pytest.mark.parametrize("wrong", [[[1]], torch.ones(4, V, dtype=torch.bool), 5, "x"], ids=repr)
def test_what_is_no_callback(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^allowed_mask must be None or a callback that takes"):
        Sampler(PARAMS, vocab_size=V, allowed_mask=wrong)


def test_several_draws_have_no_callback() -> None:
    with pytest.raises(ValueError, match=r"^num_samples must be 1 where allowed_mask is"):
        Sampler(PARAMS, vocab_size=V, num_samples=2, allowed_mask=Recorder())


@pytest.mark.parametrize("name", ["row_ids", "forced"])
def test_what_needs_a_callback(name: str) -> None:
    sampler = Sampler(PARAMS, vocab_size=V)
    assert sampler.allowed_mask is None
    with pytest.raises(ValueError, match=rf"^{name} needs a Sampler with a callback"):
        getattr(sampler, name)
    with pytest.raises(ValueError, match=r"^end needs a Sampler with a callback"):
        sampler.end([0])


def fill_and_return_none(step: MaskStep) -> None:
    step.bitmask[0, 0] = 0


#: callback -> the beginning of the message
WRONG: dict[str, tuple[Callable[[MaskStep], Any], str]] = {
    "filled and not returned": (
        fill_and_return_none,
        "allowed_mask must return the bitmask that it has filled, got None",
    ),
    "a number": (lambda step: 5, "allowed_mask must be an int32 tensor (a bitmask)"),
    "a text": (lambda step: "abcd", "allowed_mask must be an int32 tensor (a bitmask)"),
    "rows": (
        lambda step: step.bitmask[:3],
        "allowed_mask must have one row for each row of the logits (4), or one for all, got 3",
    ),
    "elements": (
        lambda step: [None] * 5,
        "allowed_mask must have one element for each row of the logits (4), got 5",
    ),
    "columns": (
        lambda step: step.bitmask[:, :2],
        "allowed_mask must have at least ceil(vocab_size / 32) = 3 columns, got 2",
    ),
    "dtype": (lambda step: step.bitmask.float(), "allowed_mask must be an int32 tensor"),
    "array": (lambda step: np.ones((4, V)), "allowed_mask must be an int32 tensor"),
    "ids": (lambda step: [[-1]] * 4, "allowed_mask[0] must be token ids >= 0, or None, got -1"),
    "a forced id": (
        lambda step: step.forced[2].append(V),
        f"forced must be token ids in 0 .. {V - 1}, got {V}",
    ),
    "a forced text": (lambda step: step.forced[2].append("x"), "forced must be integers, got 'x'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers(backend: str, name: str) -> None:
    answer, message = WRONG[name]
    is_wrong = True

    def callback(step: MaskStep) -> Any:
        return answer(step) if is_wrong else None

    history = TokenHistory.from_ids([[1]] * 4, vocab_size=V)
    sampler = Sampler(PARAMS, vocab_size=V, history=history, allowed_mask=callback, backend=backend)
    plain = Sampler(PARAMS, vocab_size=V, backend=backend)
    before = fresh_state(sampler)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        sampler(logits_of(0))
    assert_equal(fresh_state(sampler), before)
    is_wrong = False
    assert torch.equal(sampler(logits_of(0)).tokens, plain(logits_of(0)).tokens)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_a_callback_that_raises(backend: str, error: type[BaseException]) -> None:
    """The Sampler is as it was, and the callback is told the same again."""
    recorder = Recorder({0: [4]})
    fails, steps = False, []

    def callback(step: MaskStep) -> Tensor:
        steps.append(step.rows)
        result = recorder(step)
        if fails:
            raise error("not now")
        return result

    history = TokenHistory.from_ids([[1]] * 4, vocab_size=V)
    sampler = Sampler(PARAMS, vocab_size=V, history=history, allowed_mask=callback, backend=backend)
    expected = Sampler(PARAMS, vocab_size=V, allowed_mask=Recorder({0: [4]}), backend=backend)
    assert torch.equal(sampler(logits_of(0)).tokens, expected(logits_of(0)).tokens)
    before, fails = sampler.state_dict(), True
    for _ in range(2):
        with pytest.raises(error, match="not now"):
            sampler(logits_of(1))
    assert_equal(sampler.state_dict(), before)
    fails = False
    assert torch.equal(sampler(logits_of(1)).tokens, expected(logits_of(1)).tokens)
    assert steps[1] == steps[2] == steps[3]


def test_bad_logits_are_not_told_as_tokens(backend: str) -> None:
    callback = Recorder()
    bad = logits_of(1)
    bad[2] = -torch.inf
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, check=True, backend=backend)
    drawn = sampler(logits_of(0)).tokens.tolist()
    with pytest.raises(InvalidLogitsError):
        sampler(bad)
    assert callback.told[1] == [(row, False, (drawn[row],), 0) for row in range(4)]
    sampler(logits_of(1))
    assert callback.told[2] == [(row, False, (), 0) for row in range(4)]  # they were told

    callback = Recorder()
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, check=False, backend=backend)
    drawn = sampler(bad).tokens.tolist()
    assert drawn[2] == -1
    sampler(logits_of(1))
    assert callback.told[1] == [
        (row, False, () if row == 2 else (drawn[row],), 0) for row in range(4)
    ]


def test_the_sampler_is_not_changed_by_its_callback() -> None:
    """A callback runs inside of a call, and another call must not come in between."""

    def callback(step: MaskStep) -> None:
        sampler.extend(0, [1])

    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback)
    with pytest.raises(RuntimeError, match="is being changed by another call"):
        sampler(logits_of(0))
    assert sampler.positions.tolist() == [0] * 4


def test_the_caller_may_change_the_tokens(backend: str) -> None:
    callback = Recorder({0: [4]})
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, backend=backend)
    sampler(logits_of(0)).tokens.zero_()
    sampler(logits_of(1))
    assert callback.told[1][0] == (0, False, (4,), 0)


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(backend: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=Recorder({0: [4]}), backend=backend)
    for mode in (False, True, False):
        with torch.inference_mode(mode):
            assert int(sampler(logits_of(0)).tokens[0]) == 4


# ---- copies --------------------------------------------------------------------------------------


def free(step: MaskStep) -> None:
    """Let all rows draw any token; a function of a module can be pickled."""


def restored(sampler: Sampler, callback: Any) -> Sampler:
    return Sampler.from_state_dict(sampler.state_dict(), allowed_mask=callback)


def test_a_state_has_what_was_not_told(backend: str) -> None:
    callback = Forcing({1: [7, 8, 9]})
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=callback, backend=backend)
    sampler.remove([2])
    drawn = sampler(logits_of(0, 3)).tokens.tolist()
    other = Recorder()
    other.outputs = {row: list(output) for row, output in callback.outputs.items()}
    copied = restored(sampler, other)
    assert copied.row_ids == (0, 1, 3)
    assert torch.equal(copied(logits_of(1, 3)).tokens, sampler(logits_of(1, 3)).tokens)
    assert other.told == [[(0, False, (drawn[0],), 0), (3, False, (drawn[2],), 0)]]
    assert copied.add(PARAMS[0]) == 3
    assert copied.row_ids == (0, 1, 3, 4)


def test_a_state_needs_a_callback() -> None:
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=free)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=r"^a state with masks needs a Sampler with a callback"):
        Sampler.from_state_dict(state)
    for wrong in ({}, {**state["masks"], "rows": []}, {**state["masks"], "rows": [{}] * 4}, 5):
        with pytest.raises(ValueError, match=r"^masks must be"):
            Sampler.from_state_dict({**state, "masks": wrong}, allowed_mask=free)


def test_a_state_without_a_callback_may_get_one() -> None:
    callback = Recorder()
    sampler = Sampler(PARAMS, vocab_size=V)
    sampler(logits_of(0))
    restored(sampler, callback)(logits_of(1))
    assert callback.told == [[(row, True, (), 0) for row in range(4)]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_have_the_callback(copied: Callable[[Sampler], Sampler]) -> None:
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=free)
    sampler(logits_of(0))
    other = copied(sampler)
    assert other.allowed_mask is free
    assert torch.equal(other(logits_of(1)).tokens, sampler(logits_of(1)).tokens)


def test_the_callback_is_replaced(backend: str) -> None:
    first, second = Recorder({0: [1]}), Recorder({0: [2]})
    sampler = Sampler(PARAMS, vocab_size=V, allowed_mask=first, backend=backend)
    assert int(sampler(logits_of(0)).tokens[0]) == 1
    sampler.set_allowed_mask(second)
    assert int(sampler(logits_of(1)).tokens[0]) == 2
    assert second.told == [[(row, True, (), 0) for row in range(4)]]
    sampler.set_allowed_mask(None)
    plain = Sampler(PARAMS, vocab_size=V, backend=backend)
    plain(logits_of(0))
    plain(logits_of(1))
    assert torch.equal(sampler(logits_of(2)).tokens, plain(logits_of(2)).tokens)
    assert len(first.told) == len(second.told) == 1
