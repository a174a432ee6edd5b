"""A Triton kernel answers known rows when it is first compiled, and a broken one is not used.

Needs Triton's interpreter; test_triton.py starts a process that has it. The interpreter compiles
nothing, so the tests ask for the check themselves.
"""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from histories import with_text

from llm_sampling import BatchParams, Sampler, SamplingParams, TokenHistory, sample
from llm_sampling import backends as table
from llm_sampling.backends import first_use, known_rows
from llm_sampling.backends import triton as backend
from llm_sampling.backends import triton_kernel as kernel
from llm_sampling.backends.base import ParamSlots, SampleCall
from llm_sampling.results import Wanted

pytestmark = pytest.mark.usefixtures("triton_alone")
ROWS, V = 2, 150


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(backend, "_checked", set())
    monkeypatch.setattr(first_use, "_results", {})
    monkeypatch.delenv(first_use.VARIABLE, raising=False)
    table._warn.cache_clear()


@pytest.fixture
def started(monkeypatch):
    """The calls and configurations that are launched from now on."""
    calls, start = [], backend._start

    def record(call, launch, config, *rest):
        calls.append((call, config))
        start(call, launch, config, *rest)

    monkeypatch.setattr(backend, "_start", record)
    return calls


def make_call(vocab_size=V, rows=ROWS, dtype=torch.float32, filters=True, greedy=False, **more):
    filters = {"top_k": 5, "top_p": 0.9} if filters else {}
    params = SamplingParams(temperature=0.0 if greedy else 1.0, seed=1, **filters)
    batch = BatchParams.from_list([params] * rows, positions=[0] * rows)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    call = SampleCall(logits=logits, batch=batch, history=None, allowed_mask=None)
    return replace(call, **more)


def history_of(vocab_size=V, rows=ROWS, windows=False):
    history = TokenHistory.from_ids([[1, 2]] * rows, [[3]] * rows, vocab_size, max_length=8)
    if not windows:
        return history
    return with_text(
        history, history.text._replace(windows=torch.full((rows,), 3, dtype=torch.int32))
    )


def by_slot(position_of):
    return ParamSlots(
        of_rows=torch.tensor([1, 0], dtype=torch.int32),
        bias_counts=torch.zeros(ROWS, dtype=torch.int32),
        position_of=position_of,
        prompt_lengths=torch.ones(ROWS, dtype=torch.int64) if position_of == "text" else None,
    )


def with_rules(call):
    """Return the call with rules that list nothing."""
    params = [SamplingParams(seed=1, no_repeat_ngram_size=9, top_k=5)] * len(call.logits)
    call = replace(call, batch=BatchParams.from_list(params, positions=[0] * len(params)))
    assert call.has_lists
    return call


WORDS = torch.full((ROWS, -(-V // 32)), -1, dtype=torch.int32)
CALLS = {
    "plain": lambda: make_call(),
    "greedy": lambda: make_call(greedy=True),
    "no filter": lambda: make_call(filters=False),
    "one row": lambda: make_call(rows=1),
    "a small vocabulary": lambda: make_call(vocab_size=37),
    "a vocabulary of one": lambda: make_call(vocab_size=1),
    "bfloat16": lambda: make_call(dtype=torch.bfloat16),
    "mask": lambda: make_call(allowed_mask=WORDS),
    "logprobs": lambda: make_call(wanted=Wanted(("raw",))),
    "lists": lambda: make_call(
        wanted=Wanted(("processed", "raw"), 3, torch.tensor([[4, 149]] * ROWS).int(), "ends")
    ),
    "ids of one row": lambda: make_call(
        rows=1, wanted=Wanted(("raw",), 1, torch.tensor([[4]]).int(), "ids", 16)
    ),
    "kept mask": lambda: make_call(greedy=True, wanted=Wanted(kept="mask")),
    "many draws": lambda: make_call(num_samples=3),
    "history": lambda: make_call(history=history_of(), advance=True),
    "window": lambda: make_call(history=history_of(windows=True), advance=True),
    "extra ids": lambda: make_call(
        history=history_of(), extra_output=torch.tensor([[4, 5], [6, -1]], dtype=torch.int32)
    ),
    "slots": lambda: make_call(param_slots=by_slot("slot"), advance=True),
    "text positions": lambda: make_call(param_slots=by_slot("text")),
    "record": lambda: make_call(
        history=history_of(), advance=True, record=torch.tensor([True, False])
    ),
    "rules": lambda: with_rules(make_call(history=history_of(), advance=True)),
    "rules and a mask": lambda: with_rules(make_call(history=history_of(), allowed_mask=WORDS)),
    "rules of slots": lambda: with_rules(
        make_call(
            history=history_of(),
            param_slots=replace(
                by_slot("slot"), sequence_counts=torch.zeros(ROWS, dtype=torch.int32)
            ),
        )
    ),
    "rules in a small vocabulary": lambda: with_rules(
        make_call(vocab_size=4, history=history_of(vocab_size=4))
    ),
    "wide rows": lambda: replace(make_call(), logits=torch.zeros(ROWS, V + 10)[:, :V]),
}


def check(call, filter_only=False):
    launch = backend._launch_for(call, filter_only=filter_only)
    config = backend._config(call, launch, filter_only=filter_only)
    backend._check(call, launch, config, filter_only=filter_only)
    return config


@pytest.mark.parametrize("name", CALLS)
def test_the_same_kernel_answers_known_rows(started, name):
    """What Triton compiles a kernel for is the same in the user's call and in the known rows'."""
    call = CALLS[name]()
    state = None if call.history is None else call.history.clone()
    config = check(call)
    assert len(started) > 0
    launch = backend._launch_for(call)
    for known, used in started:
        assert used == config
        assert backend._config(known, launch, filter_only=False) == config
        for tensor in ("history", "allowed_mask", "param_slots", "record", "extra_output"):
            assert (getattr(known, tensor) is None) == (getattr(call, tensor) is None)
        assert backend._logits_stride(known.logits) % 16 == backend._logits_stride(call.logits) % 16
    answered = sum(len(known.logits) for known, _ in started)
    (result,) = first_use.results("triton")
    assert (result.difference, result.shapes) == (None, 1)
    assert answered >= result.rows == len(known_rows.rows_for(**flags(call)))
    if state is not None:
        assert torch.equal(state.counts, call.history.counts), "the user's state is as it was"
    check(call)
    assert len(started) * len(started[0][0].logits) >= answered, "it is asked once"
    assert first_use.results("triton")[0].shapes == 1


def flags(call):
    return {"all_greedy": call.batch.all_greedy, "any_filter": call.batch.any_filter}


def test_filtered_logits_are_checked_too(started):
    check(make_call(), filter_only=True)
    assert first_use.results("triton")[0].difference is None
    assert len(started) > 0


def wrong_threshold(monkeypatch):
    target = kernel._top_p_target
    monkeypatch.setattr(kernel, "_top_p_target", lambda z, p: target(z, p) // 2)


def fused(monkeypatch):
    """Another last bit of a coefficient: what rounding once instead of twice may amount to."""
    monkeypatch.setattr(kernel, "_C1", tl.constexpr(float.fromhex("-0x1.62e3b4p-1")))


def lost_tile(monkeypatch):
    start = backend._start

    def start_without(call, *rest):
        logits = call.logits.clone()
        logits[:, 128:] = -torch.inf
        start(replace(call, logits=logits), *rest)

    monkeypatch.setattr(backend, "_start", start_without)


def test_a_kernel_that_does_not_look_at_its_lists_is_refused(monkeypatch):
    monkeypatch.setattr(kernel, "_lowered", lambda x, *rest: x)
    check(make_call(history=history_of(), advance=True))
    with pytest.raises(first_use.SelfTestError, match="self-test failed: it gave token"):
        check(CALLS["rules"]())


@pytest.mark.parametrize("break_it", [wrong_threshold, fused, lost_tile], ids=lambda f: f.__name__)
def test_a_broken_kernel_is_refused(monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(first_use.SelfTestError, match="self-test failed: it gave token"):
        check(make_call())
    message = r"^backend 'triton' is unavailable: its self-test failed: it gave token"
    with pytest.raises(RuntimeError, match=message):
        sample(torch.zeros(1, V), SamplingParams(seed=1), backend="triton")


@pytest.fixture
def as_compiled(monkeypatch):
    """Calls check their kernel as where it is compiled, and "auto" has Triton before all others."""
    loaded = backend._load()
    monkeypatch.setattr(backend, "_load", lambda: loaded._replace(is_interpreted=False))
    monkeypatch.setattr(backend, "why_unavailable", lambda: None)
    rows = {name: table.BACKENDS[name] for name in ("triton", "torch")}
    monkeypatch.setattr(table, "BACKENDS", rows)


LOGITS = torch.randn(3, V, generator=torch.Generator().manual_seed(5))
PARAMS = [SamplingParams(top_k=20, top_p=0.8, seed=seed) for seed in range(3)]


def test_auto_goes_on_with_the_next_backend(monkeypatch, as_compiled, started):
    wanted = sample(LOGITS, PARAMS, backend="torch").tokens
    sampler = Sampler(PARAMS, vocab_size=V)
    assert torch.equal(sampler(LOGITS).tokens, wanted)
    assert len(started) > 1, "Triton has drawn"
    before = len(started)
    wrong_threshold(monkeypatch)
    backend._checked.clear()
    reference = Sampler(PARAMS, vocab_size=V, backend="torch")
    reference(LOGITS)
    with pytest.warns(RuntimeWarning, match="backend 'triton' is not used on cpu: its self-test"):
        assert torch.equal(sample(LOGITS, PARAMS).tokens, wanted)
    assert len(started) > before
    assert torch.equal(sampler(LOGITS).tokens, reference(LOGITS).tokens), "a prepared call goes on"
    assert table.choose("auto", torch.device("cpu")).name == "torch"


def test_a_prepared_call_is_checked_before_its_first_step(monkeypatch, as_compiled):
    wrong_threshold(monkeypatch)
    sampler = Sampler(PARAMS, vocab_size=V, backend="triton")
    with pytest.raises(first_use.SelfTestError):
        sampler(LOGITS)
    assert sampler.positions.tolist() == [0, 0, 0]


def test_the_variable_leaves_the_check_out(monkeypatch, as_compiled, started):
    monkeypatch.setenv(first_use.VARIABLE, "0")
    sample(LOGITS, PARAMS)
    assert len(started) == 1


def test_no_memory_tells_nothing(monkeypatch, as_compiled, started):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(first_use, "KnownRows", full)
    sample(LOGITS, PARAMS)
    assert len(started) == 1
    assert first_use.results("triton") == ()
