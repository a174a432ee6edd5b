"""Does hostile input give an exact error or a defined answer, and are arguments never changed?"""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm_sampling import (
    BatchParams,
    InvalidLogitsError,
    SamplingParams,
    TokenHistory,
    backend_info,
    filter_logits,
    sample,
)
from llm_sampling import backends as table
from llm_sampling.backends import BACKENDS
from llm_sampling.results import tensors_of

INF, NAN = float("inf"), float("nan")
V = 40
PLAIN = SamplingParams(seed=1)
PENALTY = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, seed=1)
MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(top_k=5, temperature=0.6, seed=2),
    SamplingParams(top_p=0.8, repetition_penalty=1.3, seed=3),
    SamplingParams(min_p=0.1, presence_penalty=0.5, logit_bias={1: 2.0, V - 1: 3.0}, seed=4),
    SamplingParams(top_k=9, top_p=0.9, min_p=0.02, frequency_penalty=-0.5, seed=5),
]
ROWS = len(MIXED)


def _logits(rows=ROWS, vocab_size=V):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 2


def _history(rows=ROWS, vocab_size=V):
    prompts = [[(7 * row + i) % vocab_size for i in range(3)] for row in range(rows)]
    return TokenHistory.from_ids(prompts, [[1, 1, 2]] * rows, vocab_size)


def _everything(logits, params, backend, **options):
    """Return the tokens, the status and the filtered logits of one call, as lists."""
    output = sample(
        logits, params, num_samples=3, logprobs="processed", backend=backend, check=False, **options
    )
    filtered = filter_logits(logits, params, backend=backend, **options)
    return output.tokens.tolist(), output.status.tolist(), filtered.tolist()


def test_uninitialised_memory_is_poisoned():
    """conftest.py fills new memory, so that a result that is never written cannot look right."""
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3, dtype=torch.int64).tolist() == [2**63 - 1] * 3


# Refused arguments, with the exact message

LOGITS_REFUSED = [
    ([[0.0]], "logits must be a torch.Tensor, got list"),
    (None, "logits must be a torch.Tensor, got NoneType"),
    (torch.zeros(V), f"logits must have shape (rows, vocab_size), got ({V},)"),
    (torch.zeros(2, 3, V), f"logits must have shape (rows, vocab_size), got (2, 3, {V})"),
    (torch.tensor(0.0), "logits must have shape (rows, vocab_size), got ()"),
    (torch.zeros(2, 0), "logits must have a vocab_size in 1 .. 2^20, got 0"),
    (torch.zeros(0, 0), "logits must have a vocab_size in 1 .. 2^20, got 0"),
    (
        torch.zeros(1).expand(2, 2**20 + 1),
        "logits must have a vocab_size in 1 .. 2^20, got 1048577",
    ),
    *[
        (
            torch.zeros(2, V, dtype=dtype),
            f"logits must be float32, float16 or bfloat16, got {dtype}",
        )
        for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8)
    ],
    (
        torch.zeros(2, V).to(torch.float8_e4m3fn),
        "logits must be float32, float16 or bfloat16, got torch.float8_e4m3fn",
    ),
]

TWO_ROWS = TokenHistory.from_ids([[1], [2]], None, V)

MASK_FORMS = (
    "allowed_mask must be an int32 tensor (a bitmask), a bool tensor, or a list with a list of "
    "token ids or None for each row"
)

# (keywords of sample(), message), for logits of two rows
SAMPLE_REFUSED = [
    ({"params": [PLAIN]}, "params must have one entry per row of logits (2), got 1"),
    ({"params": []}, "params must have one entry per row of logits (2), got 0"),
    ({"params": (PLAIN,) * 3}, "params must have one entry per row of logits (2), got 3"),
    (
        {"params": BatchParams.from_list([PLAIN] * 3)},
        "params must have one entry per row of logits (2), got 3",
    ),
    (
        {"params": BatchParams.from_list([PLAIN] * 2, device="meta")},
        "params must be on the logits' device cpu, got meta",
    ),
    (
        {"params": None},
        "params must be a SamplingParams, a sequence of them or a BatchParams, got NoneType",
    ),
    (
        {"params": {"top_k": 1}},
        "params must be a SamplingParams, a sequence of them or a BatchParams, got dict",
    ),
    (
        {"params": "ab"},
        "params must be a SamplingParams, a sequence of them or a BatchParams, got str",
    ),
    ({"params": [PLAIN, 1.0]}, "params[1] must be a SamplingParams, got 1.0"),
    (
        {"params": PENALTY},
        "history must be given where repetition_penalty, frequency_penalty, presence_penalty, "
        "dry_multiplier, no_repeat_ngram_size, bad_words or min_tokens "
        "is on; TokenHistory.from_ids builds one",
    ),
    (
        {"params": [PLAIN, PENALTY]},
        "history must be given where repetition_penalty, frequency_penalty, presence_penalty, "
        "dry_multiplier, no_repeat_ngram_size, bad_words or min_tokens "
        "is on; TokenHistory.from_ids builds one",
    ),
    ({"history": [[1], [2]]}, "history must be a TokenHistory, got list"),
    (
        {"history": TokenHistory.from_ids([[1]], None, V)},
        "history must have one row per row of logits (2), got 1",
    ),
    (
        {"history": TokenHistory.from_ids([[1]] * 3, None, V)},
        "history must have one row per row of logits (2), got 3",
    ),
    (
        {"history": TokenHistory.from_ids([[1]] * 2, None, V + 1)},
        f"history must have the logits' vocab_size {V}, got {V + 1}",
    ),
    (
        {"history": TWO_ROWS.to("meta")},
        "history must be on the logits' device cpu, got meta",
    ),
    *[
        ({"allowed_mask": mask}, f"{MASK_FORMS}, got {got}")
        for mask, got in (
            (torch.ones(2, 2, dtype=torch.int64), "torch.int64 of shape (2, 2)"),
            (torch.ones(2, V), "torch.float32 of shape (2, 40)"),
            (torch.ones(2, 2, 1, dtype=torch.int32), "torch.int32 of shape (2, 2, 1)"),
            (torch.tensor(True), "torch.bool of shape ()"),
            (np.ones((2, V), dtype=np.int64), "an array of int64"),
            ({0: [1], 1: [2]}, "dict"),
            ("ab", "str"),
            (5, "int"),
        )
    ],
    *[
        (
            {"allowed_mask": mask},
            f"allowed_mask must have at least {least} columns, got {mask.shape[-1]}: make it as "
            "wide as the logits, and say of the tokens past the mask whether they may be drawn",
        )
        for mask, least in (
            (torch.ones(2, 1, dtype=torch.int32), "ceil(vocab_size / 32) = 2"),
            (torch.ones(1, dtype=torch.int32), "ceil(vocab_size / 32) = 2"),
            (torch.ones(2, V - 1, dtype=torch.bool), f"vocab_size = {V}"),
            (np.ones(V - 1, dtype=np.bool_), f"vocab_size = {V}"),
        )
    ],
    *[
        (
            {"allowed_mask": mask},
            "allowed_mask must have one row for each row of the logits (2), or one for all, "
            f"got {len(mask)}",
        )
        for mask in (
            torch.ones(3, 2, dtype=torch.int32),
            torch.ones(0, 2, dtype=torch.int32),
            np.ones((3, V), dtype=np.bool_),
        )
    ],
    *[
        (
            {"allowed_mask": mask},
            f"allowed_mask must have one element for each row of the logits (2), got {len(mask)}",
        )
        for mask in ([[1]], [], [None] * 3)
    ],
    (
        {"allowed_mask": torch.ones(2, V, dtype=torch.int32)},
        f"allowed_mask must be bool where it has a column for each token ({V}): int32 is a bitmask "
        "of 2 columns",
    ),
    ({"allowed_mask": [[1], [-1]]}, "allowed_mask[1] must be token ids >= 0, or None, got -1"),
    ({"allowed_mask": [[True], None]}, "allowed_mask[0] must be integers, got True"),
    ({"allowed_mask": [None, 5]}, "allowed_mask[1] must be a collection of token ids, got 5"),
    ({"allowed_mask": [[1, 1.5], None]}, "allowed_mask[0] must be integers, got 1.5"),
    (
        {"allowed_mask": torch.ones(2, 2, dtype=torch.int32, device="meta")},
        "allowed_mask must be on the logits' device cpu, got meta",
    ),
    *[
        ({"num_samples": value}, f"num_samples must be an integer >= 1, got {value!r}")
        for value in (0, -1, True, False, 1.0, None, "1")
    ],
    *[
        (
            {"logprobs": value},
            'logprobs must be None, "processed", "raw", or both of them in a sequence, '
            f"got {value!r}",
        )
        for value in ("x", "", True, 1)
    ],
    *[
        ({"check": value}, f"check must be True, False or None, got {value!r}")
        for value in (1, 0, "yes")
    ],
    ({"positions": [0]}, "positions must be of shape (2,), got (1,)"),
    ({"positions": [0, 1, 2]}, "positions must be of shape (2,), got (3,)"),
    ({"positions": [0, 2**64]}, f"positions must be in [-2^63, 2^64), got {2**64}"),
    (
        {"positions": [0, -(2**63) - 1]},
        f"positions must be in [-2^63, 2^64), got {-(2**63) - 1}",
    ),
    ({"positions": [0, 0.5]}, "positions must be integers, got 0.5"),
    ({"positions": torch.zeros(2)}, "positions must be integers, got torch.float32"),
    ({"positions": torch.zeros(2, 1).long()}, "positions must be of shape (2,), got (2, 1)"),
    (
        {"positions": torch.zeros(2, dtype=torch.int64, device="meta")},
        "positions must be on the logits' device cpu, got meta",
    ),
    *[
        (
            {"backend": name},
            f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {name!r}",
        )
        for name in ("numpy", "", "Torch", None, 1)
    ],
]


def _message(value):
    return re.sub(r"[^\w.]+", "-", value)[-60:] if isinstance(value, str) else "logits"


@pytest.mark.parametrize(("logits", "message"), LOGITS_REFUSED, ids=_message)
def test_logits_refused(backend, logits, message):
    for call in (sample, filter_logits):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(logits, PLAIN, backend=backend)


def _keywords(case):
    ((name, value),) = case[0].items()
    return f"{name}={re.sub(r'[^-.0-9a-zA-Z]+', '_', str(value))[:30]}"


@pytest.mark.parametrize(
    ("options", "message"), SAMPLE_REFUSED, ids=[_keywords(case) for case in SAMPLE_REFUSED]
)
def test_sample_refused(backend, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample(torch.zeros(2, V), **{"params": PLAIN, "backend": backend, **options})


FILTER_REFUSED = [
    case
    for case in SAMPLE_REFUSED
    if not case[0].keys() & {"num_samples", "logprobs", "check", "positions"}
]


@pytest.mark.parametrize(
    ("options", "message"), FILTER_REFUSED, ids=[_keywords(case) for case in FILTER_REFUSED]
)
def test_filter_logits_refused(backend, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        filter_logits(torch.zeros(2, V), **{"params": PLAIN, "backend": backend, **options})


# Backends that cannot run


def test_an_unavailable_backend_says_why(monkeypatch):
    """A backend that is named raises with its reason; "auto" takes the next one instead."""
    modules = {
        "broken": {"DEVICE_TYPES": None, "why_unavailable": lambda: "the disk is on fire"},
        "gpu": {"DEVICE_TYPES": frozenset({"cuda"}), "why_unavailable": lambda: None},
    }
    for name, attributes in modules.items():
        monkeypatch.setitem(sys.modules, f"test_edges_{name}", SimpleNamespace(**attributes))
    added = {name: table.Backend(name, f"test_edges_{name}") for name in modules}
    monkeypatch.setattr(table, "BACKENDS", {**added, **BACKENDS})
    logits = torch.zeros(1, V)
    for call in (sample, filter_logits):
        with pytest.raises(
            RuntimeError, match=r"^backend 'broken' is unavailable: the disk is on fire$"
        ):
            call(logits, PLAIN, backend="broken")
        message = "backend 'gpu' is unavailable: it runs on cuda tensors, and the logits are on cpu"
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            call(logits, PLAIN, backend="gpu")
    expected = sample(logits, PLAIN, backend="torch").tokens
    assert torch.equal(sample(logits, PLAIN, backend="auto").tokens, expected)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no such wheel')", "{} does not import: no such wheel"),
        ("raise OSError('bad ELF')", "{} does not import: OSError: bad ELF"),
        ("raise SystemExit", "{} does not import: SystemExit"),
        ("DEVICE_TYPES = None\ndef why_unavailable(): raise OSError('gone')", "OSError: gone"),
    ],
)
def test_a_backend_that_fails_to_load_breaks_no_other(monkeypatch, tmp_path, source, reason):
    """It is listed with its reason, which is that of a call that names it; "auto" passes it."""
    name = f"edges_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    added = {"new": table.Backend("new", name)}
    monkeypatch.setattr(table, "BACKENDS", {**added, **BACKENDS})
    reason = reason.format(name)
    infos = backend_info()
    assert [info.name for info in infos] == ["new", *BACKENDS]
    assert (infos[0].available, infos[0].reason) == (False, reason)
    logits = torch.zeros(1, V)
    with pytest.raises(RuntimeError, match=f"^backend 'new' is unavailable: {re.escape(reason)}$"):
        sample(logits, PLAIN, backend="new")
    expected = sample(logits, PLAIN, backend="torch").tokens
    assert torch.equal(sample(logits, PLAIN, backend="auto").tokens, expected)


@pytest.mark.parametrize(
    ("device", "missing", "chosen"),
    [
        ("cpu", (), "cpu"),
        ("cpu", ("cpu",), "torch"),
        ("cuda", (), "cuda"),
        ("cuda", ("cuda",), "triton"),
        ("cuda", ("cuda", "triton"), "torch"),
        ("meta", (), "torch"),
    ],
)
def test_what_auto_prefers(monkeypatch, device, missing, chosen):
    """The backend "auto" is the first of the table that runs on the device and is available."""
    monkeypatch.setenv("LLM_SAMPLING_SELF_TEST", "0")
    monkeypatch.setattr(BACKENDS["triton"].load(), "DEVICE_TYPES", frozenset({"cuda"}))
    for name, backend in BACKENDS.items():
        reason = "it is missing" if name in missing else None
        monkeypatch.setattr(backend.load(), "why_unavailable", lambda reason=reason: reason)
    assert table.choose("auto", torch.device(device)) is BACKENDS[chosen]


def test_a_row_imports_its_module_once(monkeypatch):
    """Each ``Backend`` keeps the module it loaded; another one of the same name imports again."""
    row, other = (table.Backend("twice", "test_edges_twice") for _ in range(2))
    first, second = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setitem(sys.modules, "test_edges_twice", first)
    assert row.load() is first
    monkeypatch.setitem(sys.modules, "test_edges_twice", second)
    assert row.load() is first
    assert other.load() is second


def test_backend_info():
    infos = backend_info()
    assert [info.name for info in infos] == list(BACKENDS)
    assert infos[-1][:4] == ("torch", True, None, None)
    for info in infos:
        assert info.available is (info.reason is None)
    assert {info.name: info.device_types for info in infos}["cpu"] == ("cpu",)


# Rows that cannot be drawn from

BAD_ROWS = {
    # name: (values by token or one for the whole row, status, tokens that may be drawn or None)
    "fine": ({}, 0, None),
    "nan": ({3: NAN}, 1, None),
    "nan-first": ({0: NAN}, 1, None),
    "all-nan": (NAN, 3, {-1}),
    "inf": ({7: INF}, 4, {7}),
    "two-inf": ({7: INF, 30: INF}, 4, {7, 30}),
    "all-inf": (INF, 4, None),
    "minus-inf": ({5: -INF}, 0, None),
    "all-minus-inf": (-INF, 2, {-1}),
    "nan-and-inf": ({3: NAN, 7: INF}, 5, {7}),
    "nan-and-minus-inf": ({i: NAN if i == 9 else -INF for i in range(V)}, 3, {-1}),
    "one-finite": ({i: -INF for i in range(V) if i != 11}, 0, {11}),
    "one-finite-beside-nan": ({i: NAN for i in range(V) if i != 11}, 1, {11}),
    "lowest": ({i: -INF if i != 11 else -1e37 for i in range(V)}, 0, {11}),
}


def _bad_rows(names=BAD_ROWS):
    logits = _logits(len(names))
    for row, name in enumerate(names):
        values = BAD_ROWS[name][0]
        if isinstance(values, dict):
            for token, value in values.items():
                logits[row, token] = value
        else:
            logits[row] = values
    return logits


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.3, seed=2),
        SamplingParams(top_k=4, seed=3),
        SamplingParams(top_p=0.7, seed=4),
        SamplingParams(min_p=0.2, seed=5),
        SamplingParams(top_k=V, top_p=0.99, min_p=0.001, min_tokens_to_keep=3, seed=6),
        SamplingParams(logit_bias={3: 1.0, 7: -2.0}, seed=7),
        SamplingParams(
            repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.2, seed=8
        ),
    ],
    ids=["plain", "greedy", "T", "top-k", "top-p", "min-p", "all", "bias", "penalties"],
)
def test_status_bits(backend, params):
    logits = _bad_rows()
    history = _history(len(logits))
    output = sample(
        logits,
        params,
        history=history,
        num_samples=8,
        logprobs="processed",
        backend=backend,
        check=False,
    )
    assert output.status.dtype == torch.int32
    assert output.status.tolist() == [status for _, status, _ in BAD_ROWS.values()]
    filtered = filter_logits(logits, params, history=history, backend=backend)
    assert not filtered.isnan().any()
    for row, (name, (_, status, expected)) in enumerate(BAD_ROWS.items()):
        tokens = set(output.tokens[row].tolist())
        if expected is not None:
            assert tokens <= expected, name
        # no token at -inf or NaN is ever drawn
        assert all(token == -1 or logits[row, token] > -INF for token in tokens), name
        assert (tokens == {-1}) is bool(status & 2), name
        assert output.logprobs[row].isnan().all().item() is bool(status & 2), name
        assert output.logprobs[row].isnan().any().item() is bool(status & 2), name
        assert (filtered[row] == -INF).all().item() is bool(status & 2), name
        # a NaN counts as -inf
        assert (filtered[row][logits[row].isnan()] == -INF).all(), name


def test_positive_infinity_shares_the_mass(backend):
    """Two +inf tokens have a probability of one half each, in both kinds of logprobs."""
    logits = _bad_rows(["two-inf"])
    for kind in ("processed", "raw"):
        output = sample(logits, PLAIN, num_samples=64, logprobs=kind, backend=backend, check=False)
        assert set(output.tokens[0].tolist()) == {7, 30}
        half = torch.full((64,), 0.5).log()
        torch.testing.assert_close(output.logprobs[0], half, atol=1e-5, rtol=0)


def test_raw_logprobs_beside_nan(backend):
    logits = torch.full((1, V), NAN)
    logits[0, 4], logits[0, 5] = 1.0, 1.0
    output = sample(logits, PLAIN, num_samples=16, logprobs="raw", backend=backend, check=False)
    assert set(output.tokens[0].tolist()) == {4, 5}
    torch.testing.assert_close(output.logprobs[0], torch.full((16,), 0.5).log(), atol=1e-5, rtol=0)


CHECKED = [
    (["nan"], "NaN in logits in row 0", [0]),
    (["inf"], "+inf in logits in row 0", [0]),
    (
        ["all-minus-inf"],
        "no candidate left (every logit is -inf or masked) in row 0",
        [0],
    ),
    (["fine", "nan", "fine", "nan-first"], "NaN in logits in rows 1, 3", [1, 3]),
    (
        ["inf", "all-nan", "fine", "all-minus-inf"],
        "NaN in logits in row 1; no candidate left (every logit is -inf or masked) in rows 1, 3; "
        "+inf in logits in row 0",
        [0, 1, 3],
    ),
    (
        ["nan"] * 11,
        "NaN in logits in rows 0, 1, 2, 3, 4, 5, 6, 7 and 3 more",
        list(range(11)),
    ),
]


@pytest.mark.parametrize(("names", "message", "rows"), CHECKED, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("check", [True, None], ids=["check", "default"])
def test_check_names_the_rows(backend, names, message, rows, check):
    with pytest.raises(InvalidLogitsError, match=f"^{re.escape(message)}$") as error:
        sample(_bad_rows(names), PLAIN, backend=backend, check=check)
    assert error.value.rows == rows
    assert isinstance(error.value, ValueError)


def test_check_passes_good_rows(backend):
    names = ["fine", "minus-inf", "one-finite", "lowest"]
    output = sample(_bad_rows(names), PLAIN, backend=backend, check=True)
    assert output.status.tolist() == [0, 0, 0, 0]


def test_a_mask_of_nothing(backend):
    mask = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(InvalidLogitsError, match="no candidate left"):
        sample(torch.zeros(1, V), PLAIN, allowed_mask=mask, backend=backend)
    # bits past the vocabulary allow nothing
    mask[0, 1] = -1 << (V - 32)
    output = sample(torch.zeros(1, V), PLAIN, allowed_mask=mask, backend=backend, check=False)
    assert (output.tokens.tolist(), output.status.tolist()) == ([-1], [2])


def test_what_the_mask_clears_is_not_seen(backend):
    logits = _bad_rows(["nan", "inf"])
    mask = torch.full((2, 2), -1, dtype=torch.int32)
    mask[0, 0], mask[1, 0] = ~(1 << 3), ~(1 << 7)
    output = sample(logits, PLAIN, allowed_mask=mask, backend=backend)
    assert output.status.tolist() == [0, 0]


@pytest.mark.parametrize("token", range(0, V, 13))
def test_a_mask_of_one(backend, token):
    mask = torch.zeros(1, 2, dtype=torch.int32)
    mask[0, token // 32] = 1 << token % 32 if token % 32 < 31 else -(2**31)
    logits = torch.zeros(1, V)
    for params in (PLAIN, MIXED[1], MIXED[2]):
        assert sample(logits, params, allowed_mask=mask, backend=backend).tokens.item() == token


# Shapes


def test_no_rows(backend):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(0, V, dtype=dtype)
        for params in (PLAIN, [], BatchParams.from_list([])):
            output = sample(logits, params, backend=backend, logprobs="raw")
            assert [tuple(t.shape) for t in output[:3]] == [(0,), (0,), (0,)]
            output = sample(logits, params, backend=backend, logprobs="processed", num_samples=3)
            assert [tuple(t.shape) for t in output[:3]] == [(0, 3), (0, 3), (0,)]
            assert filter_logits(logits, params, backend=backend).shape == (0, V)
        empty = TokenHistory.from_ids([], [], V)
        mask = torch.zeros(0, 2, dtype=torch.int32)
        output = sample(
            logits, PENALTY, history=empty, allowed_mask=mask, positions=[], backend=backend
        )
        assert output.tokens.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_their_dtypes_and_shapes(backend, dtype):
    logits = _logits().to(dtype)
    for num_samples, shape in ((1, (ROWS,)), (2, (ROWS, 2)), (5, (ROWS, 5))):
        for kind in (None, "processed", "raw"):
            output = sample(
                logits,
                MIXED,
                history=_history(),
                num_samples=num_samples,
                logprobs=kind,
                backend=backend,
            )
            assert (output.tokens.dtype, tuple(output.tokens.shape)) == (torch.int64, shape)
            assert (output.status.dtype, tuple(output.status.shape)) == (torch.int32, (ROWS,))
            if kind is None:
                assert output.logprobs is None
            else:
                assert output.logprobs.dtype == torch.float32
                assert tuple(output.logprobs.shape) == shape
    filtered = filter_logits(logits, MIXED, history=_history(), backend=backend)
    assert (filtered.dtype, tuple(filtered.shape)) == (torch.float32, (ROWS, V))


def test_one_token_vocabulary(backend):
    logits = torch.tensor([[3.0], [-3e38], [0.0]])
    output = sample(
        logits,
        SamplingParams(top_k=1, top_p=0.1, min_p=1, seed=2),
        num_samples=4,
        logprobs="processed",
        backend=backend,
    )
    assert output.tokens.tolist() == [[0] * 4] * 3
    assert output.logprobs.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": V + 1},
        {"top_k": 2**31 - 1},
        {"top_k": 2**62},
        {"min_tokens_to_keep": V + 1, "top_k": 1, "top_p": 0.01, "min_p": 1},
        {"min_tokens_to_keep": 2**62, "top_k": 1, "top_p": 0.01, "min_p": 1},
        {"top_p": 1 - 2.0**-40},
        {"min_p": 1e-60},
    ],
    ids=str,
)
def test_filters_beyond_the_row_keep_all(backend, params):
    logits = _logits()
    got = _everything(logits, SamplingParams(**params, seed=6), backend)
    assert got == _everything(logits, SamplingParams(seed=6), backend)
    assert got[2] == logits.tolist()


def test_the_smallest_top_p_keeps_one(backend):
    filtered = filter_logits(_logits(), SamplingParams(top_p=1e-300), backend=backend)
    kept = (filtered > -INF).nonzero()
    assert kept.tolist() == [
        [row, token] for row, token in enumerate(_logits().argmax(-1).tolist())
    ]


def test_num_samples_of_many(backend):
    output = sample(torch.zeros(2, V), PLAIN, num_samples=500, backend=backend)
    assert output.tokens.shape == (2, 500)
    assert torch.equal(output.tokens[0], output.tokens[1])
    assert len(output.tokens.unique()) == V
    first = sample(torch.zeros(2, V), PLAIN, backend=backend)
    assert torch.equal(first.tokens, output.tokens[:, 0])


# Layouts: the same values in another memory layout give the same answers

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every-second-column": lambda x: torch.stack([x, -x], -1).flatten(1)[:, ::2],
    "every-second-row": lambda x: torch.cat([x, torch.full_like(x, INF)], 1).view(-1, V)[::2],
    "wide-rows": lambda x: torch.nn.functional.pad(x, (0, 9), value=INF)[:, :V],
    "odd-stride": lambda x: torch.nn.functional.pad(x, (0, 1), value=INF)[:, :V],
    "misaligned-by-1": lambda x: torch.nn.functional.pad(x, (1, 6), value=INF)[:, 1 : V + 1],
    "misaligned-by-3": lambda x: torch.nn.functional.pad(x, (3, 10), value=INF)[:, 3 : V + 3],
    "from-3-d": lambda x: torch.stack([x * 3, x], 1)[:, -1],
    "inference": lambda x: _inference(x),
    "parameter": lambda x: torch.nn.Parameter(x),
    "subclass": lambda x: x.as_subclass(_Tensor),
}


class _Tensor(torch.Tensor):
    pass


def _inference(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype):
    plain = _logits().to(dtype)
    logits = LAYOUTS[layout](plain)
    assert torch.equal(logits.detach(), plain)
    before = logits.detach().clone()
    got = _everything(logits, MIXED, backend, history=_history())
    assert got == _everything(plain, MIXED, backend, history=_history())
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_rows(backend, dtype):
    """One row in memory, expanded with stride 0 and drawn from with many rows of parameters."""
    row = _logits(1).to(dtype)
    logits = row.expand(ROWS, -1)
    assert logits.stride(0) == 0
    got = _everything(logits, MIXED, backend, history=_history())
    assert got == _everything(logits.contiguous(), MIXED, backend, history=_history())
    assert torch.equal(row, _logits(1).to(dtype))


def test_expanded_columns(backend):
    logits = torch.tensor([[1.5], [2.5]]).expand(2, V)
    assert logits.stride(1) == 0
    expected = _everything(logits.contiguous(), PLAIN, backend)
    assert _everything(logits, PLAIN, backend) == expected


@pytest.mark.parametrize(
    "layout",
    [
        lambda m: m.t().contiguous().t(),
        lambda m: torch.nn.functional.pad(m, (1, 2), value=-1)[:, 1:3],
        lambda m: m[:1].expand(ROWS, -1),
        lambda m: torch.stack([m, ~m], -1)[..., 0],
    ],
    ids=["transposed", "sliced", "expanded", "every-second"],
)
def test_mask_layouts(backend, layout):
    generator = torch.Generator().manual_seed(9)
    mask = torch.randint(-(2**31), 2**31, (ROWS, 2), generator=generator).to(torch.int32)
    view = layout(mask)
    before = view.clone()
    options = {"history": _history(), "allowed_mask": view}
    got = _everything(_logits(), MIXED, backend, **options)
    options["allowed_mask"] = view.contiguous().clone()
    assert got == _everything(_logits(), MIXED, backend, **options)
    assert got != _everything(_logits(), MIXED, backend, history=_history())
    assert torch.equal(view, before)


def test_logits_with_a_gradient(backend):
    logits = _logits().requires_grad_()
    for kind in (None, "processed", "raw"):
        output = sample(logits, MIXED, history=_history(), logprobs=kind, backend=backend)
        assert not any(t.requires_grad for t in tensors_of(output))
    assert not filter_logits(logits, MIXED, history=_history(), backend=backend).requires_grad
    assert logits.requires_grad
    assert logits.grad is None
    doubled = logits * 2
    got = _everything(doubled, MIXED, backend, history=_history())
    assert got == _everything(doubled.detach(), MIXED, backend, history=_history())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_that_is_given_changes(backend, dtype):
    logits, history = _logits().to(dtype), _history()
    batch = BatchParams.from_list(MIXED)
    positions = torch.arange(ROWS)
    mask = torch.full((ROWS, 2), -2, dtype=torch.int32)
    given = [
        logits,
        positions,
        mask,
        *(getattr(history, name) for name in ("seen", "counts", "lengths", "slots")),
        *(value for value in vars(batch).values() if isinstance(value, torch.Tensor)),
    ]
    before = [tensor.clone() for tensor in given]
    versions = [tensor._version for tensor in given]
    for num_samples, kind in ((1, None), (3, "processed"), (2, "raw")):
        sample(
            logits,
            batch,
            history=history,
            allowed_mask=mask,
            positions=positions,
            num_samples=num_samples,
            logprobs=kind,
            backend=backend,
        )
        filter_logits(logits, batch, history=history, allowed_mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert [tensor._version for tensor in given] == versions


def test_filter_logits_leaves_the_generator_alone(backend):
    before = torch.get_rng_state()
    filter_logits(_logits(), SamplingParams(top_k=3), backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_filtered_logits_are_new_memory(backend):
    logits = _logits()
    filtered = filter_logits(logits, PLAIN, backend=backend)
    assert torch.equal(filtered, logits)
    filtered.zero_()
    assert torch.equal(logits, _logits())


# Ids outside the vocabulary


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, V])
def test_ids_outside_the_vocabulary_are_padding(backend, vocab_size):
    logits = _logits(2, vocab_size)
    outside = [-1, -(2**31), vocab_size, vocab_size + 1, vocab_size + 31, 2**31 - 1, 2**40]
    outside_bias = {token: 50.0 for token in outside if 0 <= token < 2**31}
    inside = [0, vocab_size - 1]
    params = {"repetition_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": -0.3}
    padded = _everything(
        logits,
        SamplingParams(**params, logit_bias={0: 1.0, **outside_bias}, seed=3),
        backend,
        history=TokenHistory.from_ids(
            [outside + inside, outside], [inside + outside, outside], vocab_size
        ),
        allowed_mask=torch.full((2, -(-vocab_size // 32)), -1, dtype=torch.int32),
    )
    assert padded == _everything(
        logits,
        SamplingParams(**params, logit_bias={0: 1.0}, seed=3),
        backend,
        history=TokenHistory.from_ids([inside, []], [inside, []], vocab_size),
    )


def test_a_bias_of_only_outside_ids(backend):
    params = SamplingParams(logit_bias={V: 100.0, 2**31 - 1: -100.0}, seed=1)
    assert _everything(_logits(), params, backend) == _everything(_logits(), PLAIN, backend)


# Which position is used


def test_the_position_comes_from_the_argument_the_params_or_the_history(backend):
    logits = torch.zeros(2, 100_000)
    history = TokenHistory.from_ids([[5], []], [[1, 2, -1, 3], [7]], 100_000)

    def tokens(params, **options):
        return sample(logits, params, backend=backend, **options).tokens.tolist()

    at = {
        position: sample(logits[:1], PLAIN, positions=[position], backend=backend).tokens.item()
        for position in (0, 1, 3, 8, 9, 2**40, 2**63 + 5)
    }
    assert len(set(at.values())) == len(at)
    assert tokens(PLAIN) == [at[0], at[0]]
    assert tokens(PLAIN, history=history) == [at[3], at[1]]
    prepared = BatchParams.from_list([PLAIN, PLAIN], positions=[8, 2**40])
    assert tokens(prepared, history=history) == [at[8], at[2**40]]
    assert tokens(prepared, history=history, positions=[9, 2**63 + 5]) == [at[9], at[2**63 + 5]]
    history.select([1, 0])
    assert tokens(PLAIN, history=history) == [at[1], at[3]]


def test_a_history_without_a_penalty_changes_no_logit(backend):
    history = _history()
    got = filter_logits(_logits(), PLAIN, history=history, backend=backend)
    assert torch.equal(got, _logits())


def test_a_history_whose_rows_moved(backend):
    """Kernels find a row's state by its slot after ``select`` and ``add`` have moved rows."""
    history = TokenHistory.from_ids([[9]] * (ROWS + 1), [[8]] * (ROWS + 1), V)
    mine = _history()
    history.select([3])
    for row in range(1, ROWS):
        history.add([(7 * row + i) % V for i in range(3)], [1, 1, 2])
    history.add([i % V for i in range(3)], [1, 1, 2])
    history.select([ROWS, *range(1, ROWS)])
    assert history.slots.tolist() != list(range(ROWS))
    assert _everything(_logits(), MIXED, backend, history=history) == _everything(
        _logits(), MIXED, backend, history=mine
    )


# Extreme numbers


@pytest.mark.parametrize("backend_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-45},
        {"temperature": 1e-38},
        {"temperature": 3e38},
        {"repetition_penalty": 1e-45},
        {"repetition_penalty": 3e38},
        {"logit_bias": {0: 100, 1: -100}},
        {"frequency_penalty": 2, "presence_penalty": 2},
        {"frequency_penalty": -2, "presence_penalty": -2},
    ],
    ids=str,
)
def test_extremes_are_those_of_the_reference(backend, params, backend_dtype):
    info = torch.finfo(backend_dtype)
    values = [info.min, info.max, info.tiny, -info.tiny, 0.0, -0.0, 1.0, info.smallest_normal / 4]
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (32, V), generator=generator)
    logits = torch.tensor(values, dtype=torch.float64)[index].to(backend_dtype)
    history = _history(32)
    params = [SamplingParams(**params, seed=row) for row in range(32)]
    got = _everything(logits, params, backend, history=history)
    assert got == _everything(logits, params, "torch", history=history)
    # the draws of the rows differ, so the comparison is not trivial
    assert len({token for row in got[0] for token in row}) > 5


def test_a_part_of_a_history(backend):
    """In a part of a history the rows of counts lie apart, with other tokens' counts between."""
    ids = [[3, 40, 41, 60, 79], [45, 45, 46, 5, 80], [39, 74, 75, 70, 70]]
    whole = TokenHistory.from_ids(ids, [row[::-1] for row in ids], 2 * V + 1)
    start, width = 40, 35
    shifted = [[token - start for token in row] for row in ids]
    alone = TokenHistory.from_ids(shifted, [row[::-1] for row in shifted], width)
    params = [MIXED[3], MIXED[4], MIXED[5]]
    logits, positions = _logits(3, width), [5, 6, 7]
    for options in ({"num_samples": 1}, {"num_samples": 3}):
        outputs = [
            sample(
                logits, params, history=history, positions=positions, backend=backend, **options
            ).tokens.tolist()
            for history in (whole.part(start, width), alone)
        ]
        assert outputs[0] == outputs[1]
    assert torch.equal(
        filter_logits(logits, params, history=whole.part(start, width), backend=backend),
        filter_logits(logits, params, history=alone, backend="torch"),
    )
