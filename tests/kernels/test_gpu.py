"""What only a GPU shows: a captured graph, no wait for the device, streams.

The parity tests run there too: ``pytest -m gpu``.
"""

import threading

import pytest
import torch
from ranks import Ranks

from llm_sampling import (
    BatchParams,
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    sample,
    sample_sharded,
)
from llm_sampling.backends import BACKENDS, backend_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GPU_BACKENDS = [
    name
    for name, backend in BACKENDS.items()
    if backend.device_types is not None and "cuda" in backend.device_types
]
V = 32000


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request):
    reason = BACKENDS[request.param].why_unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


EACH = [
    SamplingParams(temperature=0),
    SamplingParams(top_k=50, top_p=0.9, seed=1),
    SamplingParams(top_p=0.9, repetition_penalty=1.2, seed=2),
    SamplingParams(seed=3),
]
#: The same, and a request with a rule that looks at the history.
WITH_RULES = [*EACH, SamplingParams(temperature=0, no_repeat_ngram_size=1)]


def make_sampler(backend, device):
    texts = [[1, 2, 3]] * len(WITH_RULES)
    history = TokenHistory.from_ids(texts, vocab_size=V, max_length=64, device=device)
    return Sampler(WITH_RULES, vocab_size=V, history=history, backend=backend, check=False)


def test_a_captured_graph_goes_on_as_the_loop_would(gpu_backend):
    """Each replay reads new logits, records its tokens and advances."""
    steps = torch.randn(8, len(WITH_RULES), V, device="cuda")
    logits = torch.empty(len(WITH_RULES), V, device="cuda")
    sampler = make_sampler(gpu_backend, "cuda")
    reference = make_sampler("torch", "cuda")
    logits.copy_(steps[0])
    warm = sampler(logits).tokens  # compiles
    assert torch.equal(warm, reference(steps[0]).tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sampler(logits)
    for step in steps[1:]:
        logits.copy_(step)
        graph.replay()
        assert torch.equal(output.tokens, reference(step).tokens)
    assert torch.equal(sampler.positions, reference.positions)
    assert torch.equal(sampler.history.counts, reference.history.counts)


def test_no_step_waits_for_the_device(gpu_backend):
    logits = torch.randn(len(WITH_RULES), V, device="cuda")
    sampler = make_sampler(gpu_backend, "cuda")
    sampler(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sampler(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


#: A request that turns on whatever a captured graph must be ready for: its kernel is compiled then.
EVERYTHING = SamplingParams(
    top_k=50,
    top_p=0.9,
    repetition_penalty=1.2,
    repetition_penalty_scope="output",
    logit_bias={5: 1.0},
    no_repeat_ngram_size=3,
    seed=1,
)


def make_tables(backend):
    """Return the same table on the GPU and on the CPU, each with a request in every slot."""
    options = {"vocab_size": V, "history": True, "max_length": 64}
    tables = (
        RequestTable(4, backend=backend, device="cuda", **options),
        RequestTable(4, backend="torch", **options),
    )
    for table in tables:
        for slot in range(4):
            table.set(slot, EVERYTHING, prompt_ids=[1, 2, slot])
    return tables


def serve(table, step):
    """Let requests come, go, and change, by every method of a table."""
    device = table.device
    slot, other = step % 4, (step + 1) % 4
    table.clear(slot)
    table.set(slot, WITH_RULES[step % len(WITH_RULES)], prompt_ids=[step, 7])
    table.set(other, SamplingParams(temperature=0.9, presence_penalty=0.3, seed=step))
    ids = torch.arange(5, device=device)[None]
    table.fill([other], ids, [5], torch.full((1,), 3, device=device))
    changed = SamplingParams(
        frequency_penalty=0.5,
        penalty_last_n=4,
        dry_multiplier=2.0,
        dry_allowed_length=1,
        dry_breakers=[[step]],
        seed=step,
    )
    table.set_params(other, changed)
    table.append(ids[:, :2], torch.full((1,), 2, device=device), slots=[other])
    table.rollback([other], [1])


def test_a_captured_graph_while_requests_change(gpu_backend):
    """A graph that was captured once draws for requests that came later."""
    table, judge = make_tables(gpu_backend)
    logits = torch.randn(4, V, device="cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    record = torch.ones(4, dtype=torch.bool, device="cuda")
    sample(logits, table, slots, record=record, backend=gpu_backend, check=False)  # compiles
    sample(logits.cpu(), judge, [0, 1, 2, 3], record=True, check=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sample(logits, table, slots, record=record, backend=gpu_backend, check=False)
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        serve(table, step)
        serve(judge, step)
        named = [[0, 1, 2, 3], [3, -1, 3, 0], [2, 1, -1, -1]][step % 3]
        recorded = [True, step % 2 == 0, True, True]
        slots.copy_(torch.tensor(named))
        record.copy_(torch.tensor(recorded))
        logits.copy_(torch.randn(4, V, generator=generator))
        graph.replay()
        wanted = sample(logits.cpu(), judge, named, record=recorded, check=False)
        assert output.tokens.tolist() == wanted.tokens.tolist()
        assert output.status.tolist() == wanted.status.tolist()
        assert torch.equal(table.positions.cpu(), judge.positions)
        for name in ("seen", "counts", "lengths"):
            found, expected = getattr(table.history, name), getattr(judge.history, name)
            assert torch.equal(found.cpu(), expected), name


def test_no_method_of_a_table_waits_for_the_device(gpu_backend):
    table, _ = make_tables(gpu_backend)
    logits = torch.randn(4, V, device="cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    options = {"record": True, "backend": gpu_backend, "check": False}
    serve(table, 0)
    sample(logits, table, slots, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            serve(table, step)
            sample(logits, table, [0, 1, -1, 3], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_control_that_waits_is_seen():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream(gpu_backend):
    logits = torch.randn(len(EACH), V, device="cuda")
    params = [SamplingParams(top_p=0.8, seed=s) for s in range(len(EACH))]
    expected = sample(logits, params, backend=gpu_backend).tokens
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tokens = sample(logits, params, backend=gpu_backend).tokens
    stream.synchronize()
    assert torch.equal(tokens, expected)


def test_auto_takes_a_kernel_of_its_own():
    available = [row.name for row in backend_info() if row.available and row.name in GPU_BACKENDS]
    assert available, "the reference is not what a GPU should run"


def test_compiled(gpu_backend):
    batch = BatchParams.from_list(EACH[:2], positions=[0, 0], device="cuda")
    logits = torch.randn(2, V, device="cuda")

    def call(x):
        return sample(x, batch, backend=gpu_backend, check=False).tokens

    assert torch.equal(torch.compile(call, fullgraph=True)(logits), call(logits))


def test_the_self_test_passes():
    """In every launch shape that the device can choose."""
    for test in backends.self_test("cuda"):
        assert test.difference is None
        if test.backend == "cuda" and test.skipped is None:
            assert test.shapes >= 3


@pytest.mark.parametrize("first", ["graph", "call"])
def test_a_backend_that_is_first_used_in_a_graph_is_tested_later(monkeypatch, first):
    reason = BACKENDS["cuda"].why_unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    monkeypatch.setattr(backends.first_use, "_results", {})
    logits = torch.randn(2, V, device="cuda")
    params = BatchParams.from_list(EACH[:1] * 2, positions=[0, 0], device="cuda")
    options = {"backend": "cuda", "check": False}
    if first == "call":
        sample(logits, params, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sample(logits, params, **options)
    assert len(backends.first_use.results("cuda")) == (first == "call")
    graph.replay()
    assert torch.equal(output.tokens, sample(logits, params, **options).tokens)
    assert len(backends.first_use.results("cuda")) == 1


def test_threads_with_other_shapes(gpu_backend):
    """Each has a stream of its own."""
    shapes = {1: 128256, 64: V, 140: 1000}
    failures = []

    def hammer(rows, vocab_size):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                logits = torch.randn(rows, vocab_size, device="cuda")
                params = [EACH[1]] * rows
                sampler = Sampler(
                    params, vocab_size=vocab_size, device="cuda", backend=gpu_backend, check=False
                )
                drawn = torch.stack([sampler(logits).tokens for _ in range(200)])
                reference = Sampler(
                    params, vocab_size=vocab_size, device="cuda", backend="torch", check=False
                )
                assert torch.equal(drawn[0], reference(logits).tokens)
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=shape) for shape in shapes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def draw_sharded(rank, size, rows, backend):
    """On this rank's GPU, without waiting for it."""
    start, stop = V * rank // size, V * (rank + 1) // size
    logits = torch.randn(len(EACH), V, generator=torch.Generator().manual_seed(1))
    local = logits[:, start:stop].cuda()
    params = BatchParams.from_list(rows, device=local.device)
    history = TokenHistory.from_ids([[1, 2, 3]] * len(rows), vocab_size=V, device=local.device)
    options = {"vocab_start": start, "history": history, "num_samples": 2, "logprobs": "raw"}
    sample_sharded(local, params, backend=backend, **options)  # compiles, and opens the group
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = sample_sharded(local, params, backend=backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return output.tokens.tolist(), output.status.tolist()


@pytest.mark.parametrize(
    "rows", [EACH, [SamplingParams(top_k=50, seed=4)] * 4], ids=["cuts", "few"]
)
def test_nccl_ranks_give_the_unsharded_tokens(gpu_backend, rows):
    """As many ranks as there are GPUs; one is a group too."""
    size = torch.cuda.device_count()
    ranks = Ranks(size, backend="nccl")
    try:
        answers = ranks(draw_sharded, size, rows, gpu_backend)
    finally:
        ranks.close()
    logits = torch.randn(len(EACH), V, generator=torch.Generator().manual_seed(1))
    history = TokenHistory.from_ids([[1, 2, 3]] * len(rows), vocab_size=V)
    expected = sample(logits, rows, history=history, num_samples=2)
    assert answers == [(expected.tokens.tolist(), expected.status.tolist())] * size
