"""Do the ops work under torch.compile, torch.export and fake tensors, with the eager results?"""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._higher_order_ops.while_loop import while_loop
from torch.utils import _pytree as pytree

from llm_sampling import (
    BatchParams,
    InvalidLogitsError,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    ops,
    sample,
)
from llm_sampling.calls import make_call
from llm_sampling.history import STATE_TENSORS, Text
from llm_sampling.params import KERNEL_TENSORS
from llm_sampling.results import tensors_of

V = 70
PARAMS = [
    SamplingParams(top_k=9, temperature=0.7, seed=3),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, seed=2**64 - 1),
    SamplingParams(temperature=0, logit_bias={3: 2.0, 500: 1.0}),
    SamplingParams(top_p=0.9, min_p=0.02, presence_penalty=0.4, seed=2**64 - 9),
]
BATCH = BatchParams.from_list(PARAMS, positions=[0, 5, 2**40, 2**64 - 1])
MASK = torch.tensor([[-2, -1, 63], [-1, 0, -1], [7, 1, 0], [-1, -1, -1]], dtype=torch.int32)


@pytest.fixture
def logits():
    return torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def history():
    return TokenHistory.from_ids([[1, 2], [3], [], [69]], [[4], [6, 6], [], [64, 1, 2]], V)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def _inputs(logits, params, history=None, mask=None):
    """Return the op's tensor arguments for a call."""
    call = make_call(logits, params, history=history, allowed_mask=mask)
    return ops._inputs(call)


def _assert_equal(got, expected):
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0, equal_nan=True)


# opcheck

INPUTS = {
    "plain": lambda x, h: _inputs(x, SamplingParams(seed=1)),
    "batch": lambda x, h: _inputs(x, BATCH, h),
    "mask": lambda x, h: _inputs(x, BATCH, h, MASK),
    "bfloat16": lambda x, h: _inputs(x.bfloat16(), BATCH, h),
    "float16-sliced": lambda x, h: _inputs(
        torch.nn.functional.pad(x.half(), (1, 2))[:, 1:-2], BATCH, h
    ),
    "expanded": lambda x, h: _inputs(x[:1].expand(4, -1), BATCH, h, MASK[:1].expand(4, -1)),
    "no-rows": lambda x, h: _inputs(x[:0], []),
    "one-token": lambda x, h: _inputs(x[:, :1], SamplingParams(top_k=1, seed=4)),
}


# (num_samples, logprobs), used in turn by the inputs
OPTIONS = [(1, None), (3, "processed"), (1, "raw"), (2, None)]


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck_sample(backend, logits, history, name):
    inputs = INPUTS[name](logits, history)
    options = OPTIONS[list(INPUTS).index(name) % len(OPTIONS)]
    torch.library.opcheck(torch.ops.llm_sampling.sample.default, (*inputs, *options, True, backend))


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck_filter_logits(backend, logits, history, name):
    inputs = INPUTS[name](logits, history)
    torch.library.opcheck(torch.ops.llm_sampling.filter_logits.default, (*inputs, backend))


@pytest.mark.parametrize("logprobs", [None, "processed", "raw"])
def test_opcheck_with_a_gradient(backend, logits, history, logprobs):
    inputs = list(INPUTS["batch"](logits, history))
    inputs[0] = logits.requires_grad_()
    op = torch.ops.llm_sampling.sample.default
    torch.library.opcheck(op, (*inputs, 1, logprobs, True, backend))
    torch.library.opcheck(torch.ops.llm_sampling.filter_logits.default, (*inputs, backend))
    tokens, values, status = op(*inputs, 1, logprobs, True, backend)
    assert not any(x.requires_grad for x in (tokens, values, status))


#: What ``sample_more`` is asked for.
MORE = {
    "top": {"logprobs": ("raw",), "top_logprobs": 4},
    "mask": {"num_samples": 3, "logprobs": ("processed",), "kept": "mask"},
    "ids": {"num_samples": 2, "kept": "ids", "max_kept_ids": 5},
    "all": {
        "logprobs": ("raw", "processed"),
        "top_logprobs": 1,  # the greedy row has one, and opcheck takes no NaN as equal
        "kept": "ends",
        "logprob_token_ids": torch.tensor([[1, 30]], dtype=torch.int32),
    },
}


def _more_inputs(logits, params, backend, history=None, mask=None, **options):
    """Return the arguments of ``sample_more``, with those of results."""
    call = make_call(logits, params, history=history, allowed_mask=mask, check=False, **options)
    return *ops._inputs(call), *ops._options(call, backend)


@pytest.mark.parametrize("name", MORE)
def test_opcheck_sample_more(backend, logits, history, name):
    inputs = _more_inputs(logits.requires_grad_(), BATCH, backend, history, MASK, **MORE[name])
    torch.library.opcheck(torch.ops.llm_sampling.sample_more.default, inputs)


@pytest.mark.parametrize("name", MORE)
def test_the_op_that_returns_more_is_the_function(backend, logits, history, name):
    found = torch.ops.llm_sampling.sample_more(
        *_more_inputs(logits, BATCH, backend, history, MASK, **MORE[name])
    )
    expected = sample(
        logits, BATCH, history=history, allowed_mask=MASK, backend=backend, **MORE[name]
    )
    _assert_equal(found, tensors_of(expected))


@pytest.mark.parametrize("name", MORE)
def test_fake_results(logits, name):
    """Shapes and dtypes on the meta device are those of the results."""
    batch = BatchParams.from_list([SamplingParams(top_p=0.9, seed=1)] * 4, positions=[0] * 4)
    expected = tensors_of(sample(logits, batch, backend="torch", **MORE[name]))
    inputs = [
        x.to("meta") if isinstance(x, torch.Tensor) else x
        for x in _more_inputs(logits, batch, "auto", **MORE[name])
    ]
    found = torch.ops.llm_sampling.sample_more(*inputs)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert all(x.device.type == "meta" for x in found)


def test_the_op_that_returns_more_looks_at_its_options(backend, logits):
    names = [a.name for a in torch.ops.llm_sampling.sample_more.default._schema.arguments]
    inputs = _more_inputs(logits, SamplingParams(seed=1), backend, **MORE["all"])
    for changed, message in (
        ({"logprobs": "raw,other"}, "logprobs must be"),
        ({"top_logprobs": -1}, "top_logprobs must be"),
        ({"kept": "set"}, "kept must be"),
        ({"max_kept_ids": 5}, "max_kept_ids needs"),
        ({"token_ids": torch.zeros(3, 1).int()}, "logprob_token_ids must be"),
    ):
        values = dict(zip(names, inputs, strict=True)) | changed
        with pytest.raises(ValueError, match=message):
            torch.ops.llm_sampling.sample_more(*values.values())


def test_opcheck_pack():
    values = torch.tensor([0.0, 0.05, 1.0, 2.0**-149])
    op = torch.ops.llm_sampling.pack
    torch.library.opcheck(op.default, (values, "min_p"))
    expected = BatchParams.from_list([SamplingParams(min_p=p) for p in values.tolist()]).min_p_cut
    assert torch.equal(op(values, "min_p"), expected)


#: Inputs of the op that do not belong together: what is changed, and the start of the message.
BAD_INPUTS = {
    "fewer rows": ({"logits": torch.zeros(3, V)}, "params must have one entry per row of logits"),
    "no vocabulary": ({"logits": torch.zeros(4, 0)}, "vocab_size must be in 1 .. 2^20, got 0"),
    "float64": ({"logits": torch.zeros(4, V).double()}, "logits must be float32, float16"),
    "temperature": ({"temperature": torch.zeros(3)}, "top_k must have shape"),
    "position": ({"position": torch.zeros(3, dtype=torch.int64)}, "position must have shape"),
    "offsets": (
        {"logit_bias_offsets": torch.tensor([0, 0, 0, 9, 9])},
        "logit_bias_offsets must be ascending",
    ),
    "counts": ({"counts": torch.zeros(4, 3, dtype=torch.int32)}, "counts must have shape"),
    "slots": ({"slots": torch.tensor([0, 1, 2, 9]).int()}, "slots must be in 0 .. 3"),
    "mask": ({"allowed_mask": torch.zeros(4, 1).int()}, "allowed_mask must have at least"),
    "greedy": ({"all_greedy": True}, "all_greedy must be False"),
    "unfiltered": ({"any_filter": False}, "any_filter must be True"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_the_op_looks_at_its_inputs(backend, logits, history, name):
    """It can be called without the functions that check arguments; no kernel checks them all."""
    schema = torch.ops.llm_sampling.sample.default._schema
    names = [argument.name for argument in schema.arguments]
    inputs = (*_inputs(logits, BATCH, history, MASK), 1, None, False, backend)
    changed, message = BAD_INPUTS[name]
    values = dict(zip(names, inputs, strict=True)) | changed
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        torch.ops.llm_sampling.sample(*values.values())


def test_the_op_is_the_function(backend, logits, history):
    for num_samples, logprobs in ((1, None), (4, "processed"), (2, "raw")):
        options = {"num_samples": num_samples, "logprobs": logprobs, "backend": backend}
        expected = sample(logits, BATCH, history=history, allowed_mask=MASK, **options)
        tokens, values, status = torch.ops.llm_sampling.sample(
            *_inputs(logits, BATCH, history, MASK), num_samples, logprobs, False, backend
        )
        _assert_equal((tokens, status), (expected.tokens, expected.status))
        if logprobs is not None:
            _assert_equal([values], [expected.logprobs])
    filtered = torch.ops.llm_sampling.filter_logits(*_inputs(logits, BATCH, history, MASK), backend)
    _assert_equal(
        [filtered],
        [filter_logits(logits, BATCH, history=history, allowed_mask=MASK, backend=backend)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_samples", "logprobs", "shapes"),
    [
        (1, None, [(5,), (0,), (5,)]),
        (1, "raw", [(5,), (5,), (5,)]),
        (3, None, [(5, 3), (0,), (5,)]),
        (3, "processed", [(5, 3), (5, 3), (5,)]),
    ],
    ids=str,
)
def test_fake_shapes(dtype, num_samples, logprobs, shapes):
    batch = BatchParams.from_list([SamplingParams(seed=1)] * 5, positions=[0] * 5, device="meta")
    fields = [getattr(batch, name) for name in KERNEL_TENSORS]
    nothing = [None] * (len(STATE_TENSORS) + len(Text._fields) + 2)
    flags = [True] * len(ops._BATCH_FLAGS)
    inputs = (torch.empty(5, V, dtype=dtype, device="meta"), *fields, *nothing, *flags)
    results = torch.ops.llm_sampling.sample(*inputs, num_samples, logprobs, False, "auto")
    assert [tuple(result.shape) for result in results] == shapes
    assert [result.dtype for result in results] == [torch.int64, torch.float32, torch.int32]
    assert all(result.device.type == "meta" for result in results)
    filtered = torch.ops.llm_sampling.filter_logits(*inputs, "auto")
    assert (tuple(filtered.shape), filtered.dtype) == ((5, V), torch.float32)


# torch.compile


def drawn(*args, **options):
    """Return tokens and status; torch 2.8 cannot slice a named tuple in a graph."""
    output = sample(*args, **options)
    return output.tokens, output.status


FUNCTIONS = {
    "one-params": lambda x, h: drawn(
        x, SamplingParams(top_k=5, temperature=0.8, min_p=0.01, seed=2)
    ),
    "list": lambda x, h: drawn(x, PARAMS, history=h),
    "positions": lambda x, h: drawn(x, PARAMS, history=h, positions=[9, 2**63, 1, 0]),
    "lengths": lambda x, h: drawn(x, PARAMS, history=h, positions=h.lengths + 3),
    "logprobs": lambda x, h: (
        *sample(x, BATCH, history=h, logprobs="processed")[:3],
        *sample(x, BATCH, history=h, num_samples=2, logprobs="raw")[:3],
    ),
    "status": lambda x, h: drawn(
        torch.where(x == x[2].amax(), torch.inf, x), BATCH, history=h, check=False
    ),
    "mask": lambda x, h: (
        sample(x, BATCH, history=h, allowed_mask=MASK, num_samples=3).tokens,
        filter_logits(x, BATCH, history=h, allowed_mask=MASK),
    ),
    "around": lambda x, h: (
        sample((x * 2).half().t().contiguous().t(), BATCH, history=h).tokens * 3 + h.vocab_size,
        filter_logits(x.bfloat16(), BATCH, history=h).exp(),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_is_eager(logits, history, name):
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    seen = []
    for scale in (1.0, -0.5):
        expected = function(logits * scale, history)
        _assert_equal(compiled(logits * scale, history), expected)
        seen.append(expected)
    # the answers differ within a result, and between the two calls
    assert any(len(tensor.unique()) > 1 for tensor in expected)
    assert any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_compiled_is_eager_on_every_backend(backend, logits, history, num_samples):
    def function(logits):
        options = {"history": history, "allowed_mask": MASK, "backend": backend}
        output = sample(logits, BATCH, num_samples=num_samples, logprobs="raw", **options)
        return (*output[:3], filter_logits(logits, BATCH, **options))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _assert_equal(compiled(logits), function(logits))


def test_compiled_by_inductor(logits, history):
    """Inductor, torch.compile's default; only one function, because compiling takes seconds."""

    def step(logits, history):
        output = sample(logits / 2, BATCH, history=history, logprobs="processed")
        return output.tokens, output.logprobs, filter_logits(logits, BATCH, history=history)

    compiled = torch.compile(step, fullgraph=True)
    _assert_equal(compiled(logits, history), step(logits, history))


def test_a_compiled_decode_step(logits, history):
    """One graph samples and appends to the history; it stays right as the history changes."""

    def step(logits, history):
        output = sample(logits, PARAMS, history=history)
        history.append(output.tokens)
        return output.tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    other = history.clone()
    streams = []
    for _ in range(6):
        tokens = step(logits, history)
        _assert_equal([compiled(logits, other)], [tokens])
        streams.append(tuple(tokens.tolist()))
    assert len(set(streams)) > 1
    for name in ("seen", "counts", "lengths", "slots"):
        assert torch.equal(getattr(history, name), getattr(other, name)), name


def test_the_ops_are_in_the_graph(logits, history):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(logits, history):
        tokens = sample(logits, BATCH, history=history).tokens
        return tokens, filter_logits(logits, BATCH, history=history)

    torch.compile(step, fullgraph=True, backend=keep)(logits, history)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("llm_sampling.sample" in target for target in targets) == 1
    assert sum("llm_sampling.filter_logits" in target for target in targets) == 1


def test_manual_seed_governs_compiled_unseeded_rows():
    params = [SamplingParams(), SamplingParams(seed=4), SamplingParams()]

    def step(logits):
        return sample(logits, params).tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    logits = torch.zeros(3, 50_000)

    def draw(function):
        torch.manual_seed(8)
        return [function(logits).tolist() for _ in range(3)]

    first = draw(compiled)
    assert first == draw(compiled) == draw(step)
    assert len({tokens[0] for tokens in first} | {tokens[2] for tokens in first}) == 6
    assert len({tokens[1] for tokens in first}) == 1


def test_another_number_of_rows():
    def step(logits):
        return sample(logits, SamplingParams(top_p=0.9, seed=1)).tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 70), (5, 70), (3, 33)):
        logits = torch.randn(shape, generator=generator)
        assert torch.equal(compiled(logits), step(logits))


# Parameters and rows that change


def compiled_frames(function, calls, backend="aot_eager", **options):
    """Assert that a compiled function gives what it gives in eager mode; count compilations."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    for arguments in calls:
        _assert_equal([compiled(*arguments)], [function(*arguments)])
    return counter.frame_count


FLOATS = [0.5, 0.7, 0.9, 0.31, 0.123456789, 0.77777]


@pytest.mark.parametrize(
    ("backend_of_torch", "dynamic"),
    [
        ("aot_eager", None),
        *(
            pytest.param(name, dynamic, marks=pytest.mark.sweep)
            for name in ("eager", "aot_eager", "inductor")
            for dynamic in (None, True)
            if (name, dynamic) != ("aot_eager", None)
        ),
    ],
)
def test_floats_that_change_recompile_once(logits, backend_of_torch, dynamic):
    calls = [
        (
            logits * f,
            SamplingParams(temperature=f, top_p=1 - f / 3, min_p=f / 9, seed=7),
        )
        for f in FLOATS
    ]
    step = lambda x, p: sample(x, p).tokens  # noqa: E731
    assert compiled_frames(step, calls, backend_of_torch, dynamic=dynamic) <= 2


def test_a_float_argument(logits):
    """The parameters are made inside the graph, of a number that is not known when it is made."""

    def step(x, f):
        return sample(x, SamplingParams(temperature=f, min_p=f / 9, seed=7)).tokens

    assert compiled_frames(step, [(logits, f) for f in FLOATS]) <= 2


def test_penalties_that_change(logits, history):
    def step(x, p):
        return sample(x, p, history=history).tokens

    calls = [
        (
            logits,
            SamplingParams(
                repetition_penalty=1 + f, frequency_penalty=f, presence_penalty=-f, seed=7
            ),
        )
        for f in FLOATS
    ]
    assert compiled_frames(step, calls) <= 2


CHANGING = {
    "top_k": [SamplingParams(top_k=k, seed=1) for k in (1, 3, 5, 9, 2**40)],
    "top_k off": [SamplingParams(top_k=k, seed=1) for k in (3, 0, 5, -1, 7)],
    "min_tokens_to_keep": [
        SamplingParams(top_p=0.1, min_tokens_to_keep=n, seed=1) for n in (1, 2, 5, 9)
    ],
    "seed": [SamplingParams(seed=s) for s in (0, 5, 2**63 - 1, 2**63, 2**63 + 11, 2**64 - 1)],
    "bias": [SamplingParams(logit_bias={3: f, 9: -f}, seed=1) for f in FLOATS],
    "other ids": [SamplingParams(logit_bias={i: 5.0}, seed=1) for i in (3, 4, 5)],
    "bans": [SamplingParams(logit_bias={3: f, 9: -math.inf}, seed=1) for f in FLOATS],
    "greedy": [SamplingParams(temperature=t, seed=1) for t in (1.0, 0.0, 0.5, 0.0, 2.0)],
    "min_p off": [SamplingParams(min_p=p, seed=1) for p in (0.0, 0.3, 0.0, 0.4)],
}


@pytest.mark.parametrize(
    "backend_of_torch", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)]
)
@pytest.mark.parametrize("name", CHANGING)
def test_other_parameters(logits, name, backend_of_torch):
    step = lambda x, p: sample(x, p).tokens  # noqa: E731
    frames = compiled_frames(step, [(logits, p) for p in CHANGING[name]], backend_of_torch)
    assert frames <= len(CHANGING[name])


def test_a_batch_made_in_the_graph(logits):
    def step(x, f):
        rows = [
            SamplingParams(temperature=f, seed=1),
            SamplingParams(top_k=3, seed=2),
            SamplingParams(min_p=0.1, seed=4),
            SamplingParams(temperature=0),
        ]
        return sample(x, BatchParams.from_list(rows)).tokens

    assert compiled_frames(step, [(logits, f) for f in FLOATS]) <= 2


def test_a_batch_as_an_argument(logits, history):
    """Other values of the same flags need one more graph at most, for integers that change."""

    def step(x, batch, history):
        return sample(x, batch, history=history).tokens

    batches = [BatchParams.from_list([replace(p, top_k=k) for p in PARAMS]) for k in (2, 3, 9)]
    assert compiled_frames(step, [(logits, b, history) for b in batches]) <= 2


def test_many_numbers_of_rows():
    params = SamplingParams(top_p=0.9, seed=1, logit_bias={3: 1.0})
    generator = torch.Generator().manual_seed(2)
    calls = [(torch.randn(n, V, generator=generator),) for n in range(1, 13)]
    assert compiled_frames(lambda x: sample(x, params).tokens, calls) <= 3


def test_a_sampler_runs_outside_of_the_graph(backend, logits):
    eager, other = (Sampler(PARAMS[:1] * 4, vocab_size=V, backend=backend) for _ in range(2))
    compiled = torch.compile(lambda x: other(x * 2).tokens + 1, backend="aot_eager")
    for _ in range(4):
        assert torch.equal(compiled(logits), eager(logits * 2).tokens + 1)
    assert torch.equal(other.positions, eager.positions)
    torch._dynamo.reset()
    whole = torch.compile(lambda x: other(x * 2).tokens, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_call_in_eager_mode"):
        whole(logits)
    assert torch.equal(other.positions, eager.positions)


# Errors in a graph


def test_check_raises_in_a_graph(backend, logits):
    def step(logits, params):
        return sample(logits, params, check=True, backend=backend).tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params = SamplingParams(seed=1)
    assert torch.equal(compiled(logits, params), step(logits, params))
    bad = logits.clone()
    bad[1], bad[3, 5] = -torch.inf, torch.nan
    message = "NaN in logits in row 3; no candidate left (every logit is -inf or masked) in row 1"
    with pytest.raises(InvalidLogitsError, match=re.escape(message)) as error:
        compiled(bad, params)
    assert error.value.rows == [1, 3]
    # and the graph still works
    assert torch.equal(compiled(logits, params), step(logits, params))


def test_check_is_on_by_default_in_a_graph(logits):
    compiled = torch.compile(
        lambda x: sample(x, SamplingParams(seed=1)).tokens,
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(InvalidLogitsError, match=r"\+inf in logits in row 0"):
        compiled(torch.full_like(logits, torch.inf)[:1])


def test_check_off_in_a_graph(logits):
    compiled = torch.compile(
        lambda x: sample(x, SamplingParams(seed=1), check=False),
        fullgraph=True,
        backend="aot_eager",
    )
    logits[2] = -torch.inf
    output = compiled(logits)
    assert output.status.tolist() == [0, 0, 2, 0]
    assert output.tokens[2] == -1
    assert output.logprobs is None


def test_unknown_backend_in_a_graph(logits):
    compiled = torch.compile(
        lambda x: sample(x, SamplingParams(seed=1), backend="fpga").tokens,
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fpga'"):
        compiled(logits)


# torch.export


def test_export(backend, logits, history):
    class Head(torch.nn.Module):
        def forward(self, logits):
            output = sample(
                logits, BATCH, history=history, logprobs="processed", check=False, backend=backend
            )
            return output.tokens, output.logprobs, output.status

    exported = torch.export.export(Head(), (logits,))
    for scale in (1.0, 0.1):
        _assert_equal(exported.module()(logits * scale), Head()(logits * scale))


class Exported(torch.nn.Module):
    def forward(self, logits, batch, history):
        output = sample(logits, batch, history=history, logprobs="processed", check=False)
        return (*output[:3], filter_logits(logits, batch, history=history))


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_a_batch_and_a_history(logits, history, strict):
    exported = torch.export.export(Exported(), (logits, BATCH, history), strict=strict)
    other = BatchParams.from_list([replace(p, top_k=3) for p in PARAMS], positions=[9, 8, 7, 6])
    for batch in (BATCH, other):
        for scale in (1.0, 0.1):
            _assert_equal(
                exported.module()(logits * scale, batch, history),
                Exported()(logits * scale, batch, history),
            )


def _with_windows():
    """Return the parameters with windows, and a history whose text has them."""
    windows = [-1, 3, 0, 2]
    params = [replace(p, penalty_last_n=n) for p, n in zip(PARAMS, windows, strict=True)]
    params[1] = replace(params[1], repetition_penalty_scope="output")
    ids = [[1, 2], [3], [], [69]], [[4], [6, 6, 8, 9], [], [64, 1, 2]]
    history = TokenHistory.from_ids(*ids, V, max_length=9, penalty_last_n=windows)
    return BatchParams.from_list(params, positions=[0, 5, 2**40, 2**64 - 1]), history


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_a_history_with_a_text(logits, strict):
    batch, history = _with_windows()
    exported = torch.export.export(Exported(), (logits, batch, history), strict=strict)
    history.append(torch.tensor([5, 6, 7, 8]))
    _assert_equal(exported.module()(logits, batch, history), Exported()(logits, batch, history))


def test_compile_takes_a_history_with_a_text(logits):
    batch, history = _with_windows()
    compiled = torch.compile(Exported(), fullgraph=True, backend="eager")
    for token in (5, 6):
        _assert_equal(compiled(logits, batch, history), Exported()(logits, batch, history))
        history.append(torch.full((4,), token))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_batch_that_is_made_inside(logits, history, strict):
    class Model(torch.nn.Module):
        def forward(self, x, history):
            batch = BatchParams.from_list(PARAMS, positions=[0, 5, 2**40, 2**64 - 1])
            return sample(x, batch, history=history).tokens

    program = torch.export.export(Model(), (logits, history), strict=strict)
    expected = sample(logits, BATCH, history=history).tokens
    assert torch.equal(program.module()(logits, history), expected)


def test_a_loop_inside_of_a_graph(logits):
    """The body of while_loop draws at the position that it counts, with parameters made there."""

    def loop(x):
        def draw(position, total):
            params = SamplingParams(top_k=9, temperature=0.7, seed=3)
            tokens = sample(x, params, positions=position.expand(len(x))).tokens
            return position + 1, total * 100 + tokens

        start = torch.zeros((), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
        return while_loop(lambda position, total: position < 3, draw, start)[1]

    params, expected = SamplingParams(top_k=9, temperature=0.7, seed=3), torch.zeros(4).long()
    for position in range(3):
        tokens = sample(logits, params, positions=[position] * 4).tokens
        expected = expected * 100 + tokens
    assert torch.equal(torch.compile(loop, fullgraph=True, backend="eager")(logits), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_rows_and_vocabulary(logits, strict):
    class Head(torch.nn.Module):
        def forward(self, logits):
            params = SamplingParams(top_p=0.9, min_p=0.02, seed=1, logit_bias={3: 1.0})
            return sample(logits, params, check=False).tokens, filter_logits(logits, params)

    dim = torch.export.Dim
    shapes = {"logits": {0: dim("rows", min=1, max=4096), 1: dim("vocab", min=2, max=2**20)}}
    exported = torch.export.export(Head(), (logits,), dynamic_shapes=shapes, strict=strict)
    generator = torch.Generator().manual_seed(4)
    for shape in ((4, V), (7, 33), (2, 2049), (1, 2)):
        x = torch.randn(shape, generator=generator)
        _assert_equal(exported.module()(x), Head()(x))


def test_pytrees(history):
    batch = replace(BATCH, unseeded=None)
    for tree, names in (
        (batch, [*KERNEL_TENSORS]),
        (history, ["seen", "counts", "lengths", "slots"]),
    ):
        leaves, spec = pytree.tree_flatten(tree)
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(tree)
        for name in names:
            assert getattr(again, name) is getattr(tree, name)
        doubled = pytree.tree_map(lambda x: x if x is None else x + x, tree)
        assert torch.equal(getattr(doubled, names[0]), 2 * getattr(tree, names[0]))
        keys = [str(key) for key, _ in pytree.tree_flatten_with_path(tree)[0]]
        assert any(names[0] in key for key in keys)
    mapped = pytree.tree_map(lambda x: x, batch)
    for flag in ("needs_history", "all_greedy", "any_filter"):
        assert getattr(mapped, flag) == getattr(batch, flag)
    assert mapped.kept_at_most == 0  # the conservative value of what no graph depends on


@pytest.mark.sweep
def test_aot_inductor(logits, tmp_path):
    """A package that AOTInductor has compiled calls the op of this process."""

    class Head(torch.nn.Module):
        def forward(self, logits):
            return sample(logits * 2, SamplingParams(top_k=5, seed=1), check=False).tokens + 1

    exported = torch.export.export(Head(), (logits,))
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "head.pt2")
    )
    loaded = torch._inductor.aoti_load_package(path)
    for scale in (1.0, -1.0):
        assert torch.equal(loaded(logits * scale), Head()(logits * scale))
