"""What only a GPU shows: a captured graph, no wait for the device, streams, and a time.

The parity tests run there too: ``pytest -m gpu``.
"""

import pytest
import torch
from ranks import Ranks

from llm_sampling import BatchParams, Sampler, SamplingParams, TokenHistory, sample, sample_sharded
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


def make_sampler(backend, device):
    history = TokenHistory.from_ids([[1, 2, 3]] * len(EACH), vocab_size=V, device=device)
    return Sampler(EACH, vocab_size=V, history=history, backend=backend, check=False)


def test_a_captured_graph_goes_on_as_the_loop_would(gpu_backend):
    """Each replay reads new logits, records its tokens and advances."""
    steps = torch.randn(8, len(EACH), V, device="cuda")
    logits = torch.empty(len(EACH), V, device="cuda")
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
    logits = torch.randn(len(EACH), V, device="cuda")
    sampler = make_sampler(gpu_backend, "cuda")
    sampler(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sampler(logits)
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


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", ["greedy", "plain", "top-k 50, top-p 0.9", "top-p 0.9"])
def test_time(gpu_backend, benchmark, name, rows):
    """A step of a Sampler at V = 128,256 in bfloat16; ``--benchmark-json`` keeps the numbers."""
    params = {
        "greedy": SamplingParams(temperature=0),
        "plain": SamplingParams(seed=1),
        "top-k 50, top-p 0.9": SamplingParams(top_k=50, top_p=0.9, seed=1),
        "top-p 0.9": SamplingParams(top_p=0.9, seed=1),
    }[name]
    vocab_size = 128256
    sampler = Sampler(
        [params] * rows, vocab_size=vocab_size, backend=gpu_backend, device="cuda", check=False
    )
    # logits like a model's: few dominant tokens
    rank = torch.arange(1, vocab_size + 1, device="cuda")
    logits = 4 - 1.6 * rank.log() + 0.7 * torch.randn(rows, vocab_size, device="cuda")
    logits = logits[:, torch.randperm(vocab_size, device="cuda")].to(torch.bfloat16)

    def step():
        sampler(logits)
        torch.cuda.synchronize()

    step()
    benchmark(step)


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
