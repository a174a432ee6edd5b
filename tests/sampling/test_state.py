"""Is the state, after a call that could not be honoured, the one before or the one after?

The calls come from a second thread, from a signal handler, through a second Sampler on the same
history, from another mode of torch, or after somebody else has changed what a Sampler had prepared.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from intruder import intruding
from torch import Tensor

from llm_sampling import (
    BatchParams,
    InvalidLogitsError,
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    sample,
)
from llm_sampling.backends import BACKENDS
from llm_sampling.backends.first_use import SelfTestError
from llm_sampling.generation.models import ModelError, NotInstalledError
from llm_sampling.params import DTYPES
from llm_sampling.tools.cli.console import CommandError

V = 1000
PARAMS = [
    SamplingParams(seed=1, frequency_penalty=0.3),
    SamplingParams(seed=2, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(seed=3, top_k=20, presence_penalty=0.5),
]


def steps(count: int, rows: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, V, generator=generator) * 2 for _ in range(count)]


def state(history: TokenHistory) -> list[list[Any]]:
    slots = history.slots.long()
    parts = (history.seen, history.counts, history.lengths)
    return [part[slots].tolist() for part in parts]


def prepared(backend: str) -> tuple[Sampler, TokenHistory]:
    history = TokenHistory.from_ids([[1], [2, 2], []], [[3], [], [4]], V)
    sampler = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    sampler(steps(1)[0])
    return sampler, history


# ---- One call at a time --------------------------------------------------------------------------

#: Calls that change a Sampler or the history that it shares.
CHANGES: dict[str, Callable[[Sampler, TokenHistory], object]] = {
    "step": lambda s, h: s(torch.zeros(3, V)),
    "add": lambda s, h: s.add(PARAMS[0]),
    "remove": lambda s, h: s.remove([0]),
    "reorder": lambda s, h: s.reorder([2, 1, 0]),
    "append": lambda s, h: h.append(torch.tensor([1, 2, 3])),
    "history's add": lambda s, h: h.add([1]),
    "select": lambda s, h: h.select([0, 1, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["thread", "same thread"])
def test_a_second_call_raises_and_the_first_goes_on(backend: str, change: str, place: str) -> None:
    """The second call comes from within the first, as from a signal handler or another thread."""
    sampler, history = prepared(backend)
    other, _ = prepared(backend)
    logits = steps(2)[1]
    errors: list[str] = []

    def call() -> None:
        before = state(history), sampler.positions.tolist(), sampler.rows, history.slots.tolist()
        try:
            CHANGES[change](sampler, history)
        except RuntimeError as error:
            errors.append(str(error))
        after = state(history), sampler.positions.tolist(), sampler.rows, history.slots.tolist()
        assert after == before

    def intrude() -> None:
        if place == "same thread":
            return call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return None

    x = intruding(logits, intrude)
    tokens = sampler(x).tokens
    kind = "TokenHistory" if change in ("append", "history's add", "select") else "Sampler"
    assert errors
    assert all(f"this {kind} is being changed by another call" in error for error in errors)
    assert torch.equal(tokens, other(logits).tokens)
    assert torch.equal(sampler(logits).tokens, other(logits).tokens)


def test_a_second_sampler_on_the_history_waits_for_its_turn(backend: str) -> None:
    sampler, history = prepared(backend)
    second = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    alone, _ = prepared(backend)
    logits = steps(2)[1]
    errors: list[str] = []

    def intrude() -> None:
        try:
            second(logits)
        except RuntimeError as error:
            errors.append(str(error))

    x = intruding(logits, intrude)
    assert torch.equal(sampler(x).tokens, alone(logits).tokens)
    assert errors
    assert second.positions.tolist() == [2, 1, 2]  # those of the history when it was made
    second(logits)
    assert second.positions.tolist() == [3, 2, 3]


def test_threads_that_race_for_a_sampler(backend: str) -> None:
    """Each call draws the next token of every row, or raises; none is drawn twice or lost."""
    logits = steps(1, rows=1)[0]
    params = SamplingParams(seed=5, frequency_penalty=0.01)
    alone = Sampler(params, vocab_size=V, backend=backend)
    sampler = Sampler(params, vocab_size=V, backend=backend)
    drawn: list[tuple[int, int]] = []
    refused = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(150):
            try:
                drawn.append((0, int(sampler(logits).tokens)))
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int(sampler.positions) == len(drawn)
    assert all("is being changed by another call" in message for message in refused)
    expected = sorted(int(alone(logits).tokens) for _ in drawn)
    assert sorted(token for _, token in drawn) == expected
    assert sampler.history is not None
    assert int(sampler.history.lengths) == len(drawn)


def test_a_signal_handler_that_steps(backend: str) -> None:
    """Its own call raises if it comes within a step, and draws the next token if it does not."""
    logits = steps(1, rows=1)[0]
    params = SamplingParams(seed=5, presence_penalty=0.01)
    alone = Sampler(params, vocab_size=V, backend=backend)
    sampler = Sampler(params, vocab_size=V, backend=backend)
    drawn: list[int] = []
    refused: list[str] = []

    def handle(*_: object) -> None:
        try:
            drawn.append(int(sampler(logits).tokens))
        except RuntimeError as error:
            refused.append(str(error))

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(400):
            drawn.append(int(sampler(logits).tokens))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all("is being changed by another call" in message for message in refused)
    assert sorted(drawn) == sorted(int(alone(logits).tokens) for _ in drawn)
    assert int(sampler.positions) == len(drawn)


# ---- Memory that moves under a prepared step -----------------------------------------------------


@pytest.mark.parametrize("name", ["seen", "counts", "lengths", "slots"])
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.share_memory_(),
        lambda x: x.set_(x.clone()),
        lambda x: setattr(x, "data", x.clone()),
    ],
    ids=["share_memory_", "set_", "data"],
)
def test_state_that_moves_is_followed(
    backend: str, name: str, move: Callable[[Tensor], object]
) -> None:
    sampler, history = prepared(backend)
    other, theirs = prepared(backend)
    for logits in steps(4):
        move(getattr(history, name))
        garbage = [torch.full_like(history.counts, 7) for _ in range(4)]  # reuses freed memory
        assert torch.equal(sampler(logits).tokens, other(logits).tokens)
        assert state(history) == state(theirs)
        del garbage


@pytest.mark.parametrize("name", ["seen", "counts", "lengths", "slots"])
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: x.untyped_storage().resize_(0), "must have memory"),
        (lambda x: setattr(x, "data", x[:1].clone()), "must have"),
        (lambda x: x.set_(x.clone().repeat_interleave(2, -1)[..., ::2]), "must be contiguous"),
    ],
    ids=["freed", "shorter", "strided"],
)
def test_state_that_no_longer_fits_is_refused(
    backend: str, name: str, change: Callable[[Tensor], object], rule: str
) -> None:
    sampler, history = prepared(backend)
    positions = sampler.positions
    change(getattr(history, name))
    with pytest.raises(ValueError, match=rf"^(history|seen|counts|lengths|slots) {rule}"):
        sampler(steps(1)[0])
    assert torch.equal(sampler.positions, positions)


@pytest.mark.parametrize("name", ["seen", "counts", "lengths", "slots"])
def test_a_history_that_no_longer_fits_is_refused_by_a_plain_call(backend: str, name: str) -> None:
    history = TokenHistory.from_ids([[1], [2, 2], []], [[3], [], [4]], V)
    part = getattr(history, name)
    part.data = part[:1].clone()
    for call in (sample, filter_logits):
        with pytest.raises(ValueError, match=r"^(history|seen|counts|lengths|slots) must have"):
            call(steps(1)[0], PARAMS, history=history, backend=backend)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["seen", "counts", "lengths", "slots", "vocab_size"])
def test_a_history_s_parts_cannot_be_assigned(name: str) -> None:
    history = TokenHistory.from_ids([[1], [2]], None, V)
    value = getattr(history, name)
    setattr(history, name, value)  # what `history.lengths += 1` does at its end
    message = f"{name} of a TokenHistory cannot be assigned"
    with pytest.raises(AttributeError, match=message):
        setattr(history, name, copy.copy(value) if name != "vocab_size" else V + 1)
    with pytest.raises(AttributeError, match=message):
        delattr(history, name)
    assert getattr(history, name) is value


@pytest.mark.parametrize("slots", [[0, 1, 9], [0, -1, 2]])
def test_slots_out_of_range_in_a_plain_call(backend: str, slots: list[int]) -> None:
    history = TokenHistory.from_ids([[1], [2, 2], []], None, V)
    history.slots.copy_(torch.tensor(slots))
    for call in (sample, filter_logits):
        with pytest.raises(
            ValueError, match=rf"^slots must be in 0 \.\. 2, got {re.escape(str(slots))}"
        ):
            call(steps(1)[0], PARAMS, history=history, backend=backend)  # type: ignore[operator]


@pytest.mark.parametrize("slots", [[0, 0, 1], [0, 1, 3], [0, 1, -1]])
def test_slots_that_were_changed_in_place(backend: str, slots: list[int]) -> None:
    """Two rows of one slot would both be recorded there; no memory belongs to other slots."""
    sampler, history = prepared(backend)
    before = history.counts.clone()
    history.slots.copy_(torch.tensor(slots))
    for call in (
        lambda: history.append(torch.tensor([5, 6, 7])),
        lambda: sampler(steps(1)[0]),
    ):
        with pytest.raises(ValueError, match="slots"):
            call()
    assert torch.equal(history.counts, before)


# ---- Modes of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["history", "sampler", "step", "rows"])
def test_what_is_made_in_inference_mode_goes_on_outside(backend: str, made: str) -> None:
    other, _ = prepared(backend)
    logits = steps(3)

    def history() -> TokenHistory:
        return TokenHistory.from_ids([[1], [2, 2], []], [[3], [], [4]], V)

    with torch.inference_mode(made == "history"):
        mine = history()
    with torch.inference_mode(made == "sampler"):
        sampler = Sampler(PARAMS, vocab_size=V, history=mine, backend=backend)
    with torch.inference_mode(made == "step"):
        sampler(steps(1)[0])
    for x in logits:
        assert torch.equal(sampler(x).tokens, other(x).tokens)
    with torch.inference_mode(made == "rows"):
        sampler.add(PARAMS[0], prompt_ids=[5])
        sampler.reorder([3, 1, 0, 2])
        mine.append(torch.tensor([1, 2, 3, 4]))
    x = steps(1, rows=4)[0]
    sampler(x)
    mine.append(torch.tensor([1, 2, 3, 4]))
    assert sampler.positions.tolist() == [1, 5, 6, 6]


def test_a_history_of_inference_tensors_is_refused_whole(backend: str) -> None:
    """Torch refuses to change such a tensor outside the mode: before anything else has changed."""
    with torch.inference_mode():
        seen = torch.zeros(2, 32, dtype=torch.int32)
        lengths = torch.zeros(2, dtype=torch.int64)
    counts = torch.zeros(2, V, dtype=torch.int32)
    history = TokenHistory(seen, counts, lengths, torch.arange(2, dtype=torch.int32), V)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode must be changed in that"):
        history.append(torch.tensor([1, 2]))
    assert not counts.any()
    sampler = Sampler(PARAMS[:2], vocab_size=V, history=history, backend=backend)
    if backend == "cpu":
        return  # the kernel writes it, wherever it was made
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode must be changed in that"):
        sampler(torch.zeros(2, V))
    assert not counts.any()
    assert sampler.positions.tolist() == [0, 0]


def test_a_request_in_a_history_of_inference_tensors_is_refused(backend: str) -> None:
    """Also where a request was put into a slot before, in that mode."""
    with torch.inference_mode():
        seen = torch.zeros(2, 32, dtype=torch.int32)
        counts = torch.zeros(2, V, dtype=torch.int32)
    history = TokenHistory(seen, counts, None, torch.arange(2, dtype=torch.int32), V)
    table = RequestTable(2, vocab_size=V, history=history, backend=backend)
    with torch.inference_mode():
        table.set(0, PARAMS[0], prompt_ids=[1], output_ids=[2])
    before = counts.clone()
    assert before.sum() == 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"made in torch\.inference_mode must be changed in"):
            table.set(1, PARAMS[0], prompt_ids=[1], output_ids=[3])
    assert torch.equal(counts, before)


# ---- Packed parameters that change ---------------------------------------------------------------


def test_parameters_changed_in_place_are_followed(backend: str) -> None:
    """What is derived from them, the flags, follows too, and no value is kept from before."""
    logits = steps(1)[0]
    history = TokenHistory.from_ids([[1, 2, 3]] * 3, [[5, 6, 7]] * 3, V)
    plain = [SamplingParams(seed=i) for i in range(3)]
    batch = BatchParams.from_list(plain)
    changes: list[tuple[str, float, dict[str, float]]] = [
        ("top_k", 5, {"top_k": 5}),
        ("temperature", 0.5, {"temperature": 0.5}),
        ("top_p", 0.5, {"top_p": 0.5}),
        ("min_tokens_to_keep", 7, {"min_tokens_to_keep": 7}),
        ("frequency_penalty", 1.5, {"frequency_penalty": 1.5}),
        ("temperature", 0.0, {"temperature": 0.0}),
        ("temperature", 1.0, {"temperature": 1.0}),
        ("top_k", 0, {"top_k": 0}),
    ]
    asked: dict[str, Any] = {}
    for name, value, field in changes:
        sample(logits, batch, history=history, backend=backend)
        getattr(batch, name).fill_(value)
        asked |= field
        expected = [SamplingParams(seed=i, **asked) for i in range(3)]
        options: dict[str, Any] = {"history": history, "backend": backend}
        got = sample(logits, batch, **options)
        assert torch.equal(got.tokens, sample(logits, expected, **options).tokens)
        assert torch.equal(
            filter_logits(logits, batch, **options), filter_logits(logits, expected, **options)
        )
        assert batch.checked().needs_history is ("frequency_penalty" in asked)
        assert batch.checked().any_filter is any(
            asked.get(f, off) != off for f, off in (("top_k", 0), ("top_p", 1.0))
        )


@pytest.mark.parametrize("name", DTYPES)
def test_parameters_whose_memory_is_exchanged(backend: str, name: str) -> None:
    """Memory that no longer fits is refused after the first use too, whatever its values are."""
    params = [
        SamplingParams(logit_bias={1: 1.0, 2: 1.0}),
        SamplingParams(dry_multiplier=1, dry_breakers=[[1], [2, 3]], bad_words=[[4, 5]]),
        PARAMS[2],
    ]
    batch = BatchParams.from_list(params, positions=[4, 4, 4])
    history = TokenHistory.from_ids([[1], [2, 2], []], None, V, max_length=9)
    tensor: Tensor = getattr(batch, name)
    whole = tensor.clone()
    options: dict[str, Any] = {"history": history, "backend": backend}
    sample(steps(1)[0], batch, **options)
    for wrong in (whole[:1].clone(), whole.repeat_interleave(2)[::2]):
        tensor.data = wrong
        for call in (sample, filter_logits):
            with pytest.raises(ValueError, match=r"^\w+ must (have shape|be (contiguous|asc))"):
                call(steps(1)[0], batch, **options)  # type: ignore[operator]
    tensor.data = whole
    sample(steps(1)[0], batch, **options)


def test_parameters_changed_behind_torch_s_back(backend: str) -> None:
    """Numpy shares a tensor's memory, and torch's version counters do not see its writes."""
    logits = steps(1)[0]
    batch = BatchParams.from_list([SamplingParams(seed=i) for i in range(3)])
    sample(logits, batch, backend=backend)
    batch.top_k.numpy()[:] = 3
    assert int((filter_logits(logits, batch, backend=backend) > -torch.inf).sum()) == 9
    batch.repetition_penalty.numpy()[1] = 1.5
    with pytest.raises(ValueError, match=r"^history must be given where"):
        sample(logits, batch, backend=backend)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("logit_bias_offsets", 1, 10**12, "logit_bias_offsets must be ascending from 0 to 2"),
        ("logit_bias_offsets", 3, 3, "logit_bias_offsets must be ascending from 0 to 2"),
        ("logit_bias_offsets", 0, -1, "logit_bias_offsets must be ascending from 0 to 2"),
        ("logit_bias_values", 0, float("nan"), r"logit_bias_values\[0\] must be in"),
        ("logit_bias_ids", 1, 4, "logit_bias_ids must be strictly ascending"),
        ("temperature", 2, -1.0, r"temperature\[2\] must be finite and >= 0"),
        ("min_p_cut", 0, float("nan"), r"min_p_cut\[0\] must be"),
        ("min_tokens_to_keep", 1, 0, r"min_tokens_to_keep\[1\] must be an integer >= 1"),
    ],
)
def test_a_bad_value_after_the_first_use(
    backend: str, name: str, place: int, value: float, message: str
) -> None:
    logits = steps(1)[0]
    rows = [SamplingParams(seed=i) for i in range(3)]
    rows[1] = SamplingParams(logit_bias={4: 1.0, 9: 2.0}, seed=4)
    batch = BatchParams.from_list(rows)
    good = sample(logits, batch, backend=backend).tokens
    before = getattr(batch, name)[place].clone()
    getattr(batch, name)[place] = value
    for call in (sample, filter_logits):
        with pytest.raises(ValueError, match=message):
            call(logits, batch, backend=backend)  # type: ignore[operator]
    getattr(batch, name)[place] = before
    assert torch.equal(sample(logits, batch, backend=backend).tokens, good)


# ---- Processes -----------------------------------------------------------------------------------

ERRORS = [
    InvalidLogitsError("NaN in logits in row 3", [3]),
    NotInstalledError("install it"),
    ModelError("there is no model"),
    CommandError("the model cannot be read", 2),
    SelfTestError("it gave token 3"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_exception_pickles(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_there_is_no_other_exception() -> None:
    """A new class of exceptions belongs into the list above."""
    import importlib
    import pkgutil

    import llm_sampling

    known = {type(error) for error in ERRORS}
    for module in pkgutil.walk_packages(llm_sampling.__path__, "llm_sampling."):
        if "vllm" in module.name or module.name.endswith("__main__"):
            continue
        try:
            names = vars(importlib.import_module(module.name))
        except ImportError:
            continue
        for value in names.values():
            is_ours = isinstance(value, type) and value.__module__.startswith("llm_sampling")
            if is_ours and issubclass(value, BaseException):
                assert value in known, value


def draw_bad(row: int) -> None:
    logits = torch.zeros(4, 10)
    logits[row] = torch.nan
    sample(logits, SamplingParams(seed=1))


def test_an_error_in_a_worker_reaches_its_parent() -> None:
    """An exception that does not unpickle leaves a multiprocessing.Pool waiting for ever."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(draw_bad, (2,))
        with pytest.raises(InvalidLogitsError, match="NaN in logits in row 2") as error:
            result.get(timeout=120)
    assert error.value.rows == [2]


def test_the_first_reason_comes_first() -> None:
    """Where a backend cannot run at all, the device of the logits is not what is wrong."""
    logits = torch.zeros(1, 10)
    for name, row in BACKENDS.items():
        reason = row.why_unavailable()
        if reason is not None:
            message = f"backend {name!r} is unavailable: {reason}"
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                sample(logits, SamplingParams(), backend=name)
