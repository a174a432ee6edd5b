"""A backend answers known rows before it is used on a device, and a wrong one is not used."""

import re
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from llm_sampling import Sampler, SamplingParams, backend_info, sample
from llm_sampling import backends as table
from llm_sampling.backends import BACKENDS, first_use, known_rows
from llm_sampling.backends.base import SOME_SIZES

CPU = torch.device("cpu")
TORCH = BACKENDS["torch"].load()
LOGITS = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
PARAMS = SamplingParams(top_k=50, seed=1)


@pytest.fixture
def add(monkeypatch):
    """A function that puts a tested backend before all others; it counts its calls."""
    monkeypatch.setattr(first_use, "_results", {})
    monkeypatch.delenv(first_use.VARIABLE, raising=False)
    table._warn.cache_clear()

    def add(name, change=lambda output, call: output, sizes=SOME_SIZES[:3]):
        calls = []

        def judged(call):
            calls.append(call)
            return change(TORCH.sample(call), call)

        module = SimpleNamespace(
            DEVICE_TYPES=frozenset({"cpu"}),
            why_unavailable=lambda: None,
            sample=judged,
            prepare=TORCH.prepare,
            known_sizes=lambda device: sizes,
            calls=calls,
        )
        monkeypatch.setitem(sys.modules, f"first_use_{name}", module)
        row = table.Backend(name, f"first_use_{name}", is_tested=True)
        monkeypatch.setattr(table, "BACKENDS", {name: row, **table.BACKENDS})
        return module

    return add


def one_wrong(output, call):
    tokens = output.tokens.clone()
    tokens.view(-1)[-1] += 1
    return output._replace(tokens=tokens)


def fails(output, call):
    raise RuntimeError("no kernel image is available")


def test_a_right_backend_is_tested_once_and_used(add):
    module = add("right")
    first = sample(LOGITS, PARAMS, backend="right").tokens
    tested = len(module.calls) - 1
    assert tested == 2 * 3 * 8, "two kinds, three sizes of one row"
    assert torch.equal(sample(LOGITS, PARAMS).tokens, first)
    assert len(module.calls) == tested + 2
    assert backend_info()[0].tests == (first_use.SelfTest("right", "cpu", 3, tested),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_wrong, r"it gave token \d+ for known row \d+ \(plain, vocab_size 513\), expected \d+"),
        (fails, "it failed on known rows: RuntimeError: no kernel image is available"),
        (
            lambda output, call: output._replace(status=output.status | 1),
            r"it gave status 1 for known row \d+ \(plain, vocab_size 513\), expected 0",
        ),
    ],
)
def test_a_wrong_backend_is_not_used(add, change, reason):
    module = add("wrong", change)
    full = f"its self-test failed: {reason}; please report it"
    with pytest.warns(RuntimeWarning, match=rf"^backend 'wrong' is not used on cpu: {full}$"):
        tokens = sample(LOGITS, PARAMS).tokens
    assert torch.equal(tokens, sample(LOGITS, PARAMS, backend="torch").tokens)
    asked = len(module.calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(LOGITS, PARAMS)  # it warns once
    with pytest.raises(RuntimeError, match=rf"^backend 'wrong' is unavailable: {full}$"):
        sample(LOGITS, PARAMS, backend="wrong")
    with pytest.raises(RuntimeError, match="unavailable"):
        Sampler([PARAMS] * 3, vocab_size=100, backend="wrong")
    assert len(module.calls) == asked, "it is asked once"


def test_sizes_that_cannot_be_asked_for_are_a_failure(add):
    module = add("broken")

    def known_sizes(device):
        raise RuntimeError("the driver is too old")

    module.known_sizes = known_sizes
    with pytest.raises(RuntimeError, match="it failed: RuntimeError: the driver is too old"):
        sample(LOGITS, PARAMS, backend="broken")


def test_a_wrong_answer_of_the_last_size_is_seen(add):
    def change(output, call):
        return one_wrong(output, call) if call.logits.shape == (24, 5003) else output

    add("late", change, sizes=SOME_SIZES)
    with pytest.raises(RuntimeError, match=re.escape("vocab_size 5003), expected")):
        sample(LOGITS, PARAMS, backend="late")


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable_leaves_the_test_out(add, monkeypatch, value):
    module = add("wrong", one_wrong)
    monkeypatch.setenv(first_use.VARIABLE, value)
    if value == "0":
        sample(LOGITS, PARAMS, backend="wrong")
        assert len(module.calls) == 1
    else:
        with pytest.raises(RuntimeError, match="self-test failed"):
            sample(LOGITS, PARAMS, backend="wrong")


def test_another_value_of_the_variable_is_refused(add, monkeypatch):
    add("right")
    monkeypatch.setenv(first_use.VARIABLE, "off")
    with pytest.raises(RuntimeError, match=r"^LLM_SAMPLING_SELF_TEST must be 0 or 1, got 'off'$"):
        sample(LOGITS, PARAMS, backend="right")


def test_while_a_graph_is_captured_the_backend_is_used_untested(add, monkeypatch):
    """It is tested at the next use after that."""
    module = add("wrong", one_wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(module, "DEVICE_TYPES", frozenset({"cuda"}))
    cuda = torch.device("cuda", 0)
    assert table.choose("wrong", cuda).name == "wrong"
    assert backend_info()[0].tests == ()
    assert module.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(first_use, "KnownRows", on_the_cpu)
    with pytest.raises(RuntimeError, match="self-test failed"):
        table.choose("wrong", cuda)


def on_the_cpu(kind, vocab_size, dtype, device):
    return known_rows.KnownRows(kind, vocab_size, dtype, CPU)


def test_no_memory_tells_nothing(add):
    def change(output, call):
        if len(module.calls) == 1:
            raise torch.OutOfMemoryError
        return output

    module = add("right", change)
    assert table.choose("right", CPU).name == "right"
    assert backend_info()[0].tests == ()
    assert table.choose("right", CPU).name == "right"
    assert backend_info()[0].tests[0].difference is None


def test_a_compiler_that_traces_gets_an_untested_backend(add):
    module = add("right")
    with torch._subclasses.FakeTensorMode():
        assert table.choose("right", CPU).name == "right"
    assert module.calls == []


def test_threads_test_once(add):
    module = add("right")
    start = threading.Barrier(4)

    def use():
        start.wait()
        table.choose("right", CPU)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(module.calls) == 48


def test_the_test_can_be_run_at_any_time(add):
    add("wrong", one_wrong)
    by_name = {test.backend: test for test in table.self_test("cpu")}
    assert list(by_name) == ["wrong", *BACKENDS]
    assert "it gave token" in by_name["wrong"].difference
    for name in ("cpu", "torch"):
        test = by_name[name]
        assert (test.shapes, test.rows, test.difference, test.skipped) == (9, 336, None, None)
    assert by_name["cuda"].skipped is not None
    assert by_name["cuda"].rows == 0
    again = {test.backend: test for test in table.self_test("cpu")}
    assert again["wrong"].difference is not None, "it is asked again, not passed over"


def test_global_settings_do_not_matter(add):
    add("right")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            assert table.self_test("cpu")[0].difference is None
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
