"""Rows for which the CPU kernel has a path of its own; each result must equal the reference's.

Penalties on candidates only: rows whose best tokens the penalties push below the bound, and rows
that must not take this path. Top-p: rows that mislead the probe from which it estimates. Masks: a
tile of 512 tokens that is allowed, banned, or both, and what is under the mask.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_sampling import BatchParams, SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.backends import BACKENDS, cpu, native
from llm_sampling.masks import pack_mask

pytestmark = pytest.mark.skipif(
    BACKENDS["cpu"].why_unavailable(torch.device("cpu")) is not None, reason="there is no kernel"
)
VOCAB_SIZES = (513, 1000, 5003, 20000)


def generator():
    return torch.Generator().manual_seed(0)


def assert_equal(logits, params, prompts=None, outputs=None, **options):
    """Tokens, status and kept sets equal the reference's, on one thread and on several.

    Returns the reference's tokens and status.
    """
    rows, vocab_size = logits.shape
    params = [params] * rows if isinstance(params, SamplingParams) else params
    batch = BatchParams.from_list(params, positions=range(rows))

    def history():
        if prompts is None:
            return None
        return TokenHistory.from_ids(prompts, outputs, vocab_size)

    def run(backend):
        output = sample(logits, batch, history=history(), backend=backend, check=False, **options)
        mask = {name: value for name, value in options.items() if name == "allowed_mask"}
        kept = filter_logits(logits, batch, history=history(), backend=backend, **mask)
        return output, kept

    expected, kept = run("torch")
    before = torch.get_num_threads()
    for threads in (1, rows + 1):
        torch.set_num_threads(threads)
        try:
            output, own_kept = run("cpu")
        finally:
            torch.set_num_threads(before)
        assert torch.equal(output.tokens, expected.tokens)
        assert torch.equal(output.status, expected.status)
        assert torch.equal(own_kept > -torch.inf, kept > -torch.inf)
        if expected.logprobs is not None:
            torch.testing.assert_close(output.logprobs, expected.logprobs, equal_nan=True)
    return expected


def best(logits, number):
    return logits.nan_to_num(-torch.inf).topk(number).indices.tolist()


CHAINS = {
    "greedy": {"temperature": 0},
    "top-k of one": {"top_k": 1},
    "top-k": {"top_k": 7},
    "many": {"top_k": 300},
    "nucleus": {"top_k": 50, "top_p": 0.8, "temperature": 0.7},
    "min-p": {"top_k": 50, "min_p": 0.2},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "min_tokens_to_keep": 3, "temperature": 1.3},
    "no top-k": {"top_p": 0.9},
}
PENALTIES = {
    "no effect": {"repetition_penalty": 1.0, "presence_penalty": 1e-30},
    "repetition": {"repetition_penalty": 1.3},
    "large": {"repetition_penalty": 1e30},
    "counts": {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    "every": {"repetition_penalty": 1.7, "frequency_penalty": 1.1, "presence_penalty": 2.0},
    "one raises": {"repetition_penalty": 0.8},
    "counts raise": {"frequency_penalty": -0.5, "repetition_penalty": 1.2},
    "presence raises": {"presence_penalty": -1.5},
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("pushed", [0, 3, 60, 400, "all"])
def test_best_tokens_that_are_penalised(chain, penalty, pushed):
    params = SamplingParams(**CHAINS[chain], **PENALTIES[penalty], seed=5)
    for vocab_size in VOCAB_SIZES:
        logits = 3 * torch.randn(3, vocab_size, generator=generator())
        number = vocab_size if pushed == "all" else min(pushed, vocab_size)
        prompts = best(logits, number)
        outputs = [row[: number // 2] * 2 for row in prompts]
        assert_equal(logits, params, prompts, outputs)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    "raises",
    [{"repetition_penalty": 0.2}, {"frequency_penalty": -1.5}, {"presence_penalty": -2.0}],
    ids=str,
)
def test_tokens_that_rise_to_the_best(chain, raises):
    """Penalties that raise a logit: the logits before the penalties are no upper bound."""
    params = SamplingParams(**CHAINS[chain], **raises, seed=5)
    for vocab_size in VOCAB_SIZES:
        logits = torch.rand(3, vocab_size, generator=generator()) + 1
        middling = [row[vocab_size // 3 : vocab_size // 3 + 20] for row in best(logits, vocab_size)]
        assert_equal(logits, params, middling, [row * 2 for row in middling])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chain", CHAINS)
def test_ties_and_zeros_at_the_bound(chain, dtype):
    params = SamplingParams(**CHAINS[chain], repetition_penalty=2.0, presence_penalty=0.5, seed=1)
    for vocab_size in VOCAB_SIZES:
        logits = torch.randn(6, vocab_size, generator=generator()).round()
        logits[1] = torch.where(torch.arange(vocab_size) % 2 == 0, 0.0, -0.0)
        logits[2] = 1.0
        logits[3] = -3e38
        logits[4] = torch.where(
            torch.arange(vocab_size) % 3 == 0, 4.0, 2.0
        )  # a penalised 4 becomes 1.5
        logits[5, : vocab_size - 5] = -torch.inf
        ids = torch.randint(vocab_size, (6, 300), generator=generator())
        prompts, outputs = ids[:, :200].tolist(), ids[:, 200:].tolist()
        assert_equal(logits.to(dtype), params, prompts, outputs)


@pytest.mark.parametrize("chain", CHAINS)
def test_nan_and_infinity(chain):
    """Among the candidates and elsewhere, penalised and not."""
    params = SamplingParams(**CHAINS[chain], repetition_penalty=1.5, frequency_penalty=0.3, seed=1)
    nan, inf = float("nan"), torch.inf
    for vocab_size in VOCAB_SIZES:
        logits = torch.randn(8, vocab_size, generator=generator())
        at = best(logits, 4)
        seen = [row[:2] for row in at]
        logits[0, at[0][0]] = nan
        logits[1, at[1][3]] = nan
        logits[2, logits[2].argmin()] = nan
        logits[3] = nan
        logits[4, at[4][1]] = inf
        logits[5, [at[5][1], at[5][3]]] = inf
        logits[6] = -inf
        logits[7, at[7]] = torch.tensor([nan, inf, -inf, nan])
        assert_equal(logits, params, seen, seen)


@pytest.mark.parametrize("chain", CHAINS)
def test_with_a_mask(chain):
    params = SamplingParams(**CHAINS[chain], repetition_penalty=1.5, seed=1)
    for vocab_size in VOCAB_SIZES:
        logits = torch.randn(4, vocab_size, generator=generator())
        words = -(-vocab_size // 32)
        mask = torch.randint(-(2**31), 2**31, (4, words), generator=generator()).int()
        mask[1] = -1
        mask[2] = 0
        mask[3] = 1
        prompts = best(logits, 30)
        assert_equal(logits, params, prompts, prompts, allowed_mask=mask)


@pytest.mark.parametrize("logprobs", ["raw", "processed"])
@pytest.mark.parametrize("chain", CHAINS)
def test_with_logprobs(chain, logprobs):
    params = SamplingParams(**CHAINS[chain], repetition_penalty=1.5, frequency_penalty=0.5, seed=1)
    logits = 3 * torch.randn(3, 5003, generator=generator())
    prompts = best(logits, 40)
    assert_equal(logits, params, prompts, prompts, logprobs=logprobs)


def test_a_bias_beside_penalties():
    logits = torch.randn(2, 5003, generator=generator())
    params = SamplingParams(
        repetition_penalty=1.5, top_k=20, logit_bias={5: 9.0, 4999: 8.0, 7: -100.0}, seed=1
    )
    assert_equal(logits, params, best(logits, 10), [[], []])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-38},  # the best quotient is +inf, or -inf
        {"temperature": 3e-38, "top_k": 20},
        {"temperature": 0},  # +inf alone is not finite
        {"temperature": 2.0, "top_p": 0.9},
        {"temperature": 1e-38, "repetition_penalty": 1.5, "top_k": 5},
    ],
    ids=str,
)
def test_filtered_logits_whose_best_quotient_is_not_finite(options, dtype):
    params = SamplingParams(**options, seed=1)
    for vocab_size in VOCAB_SIZES:
        logits = torch.randn(5, vocab_size, generator=generator())
        logits[0, 7] = logits[0, vocab_size - 3] = torch.inf
        logits[1] = -4 - logits[1].abs()
        logits[2] = torch.where(logits[2] > 0, 5.0, logits[2])
        logits[3] = -torch.inf
        logits[4] = 0.0  # 0 / T is finite
        batch = BatchParams.from_list([params] * 5)
        prompts = best(logits, 3)
        results = [
            filter_logits(
                logits.to(dtype),
                batch,
                history=TokenHistory.from_ids(prompts, [[]] * 5, vocab_size),
                backend=backend,
            )
            for backend in ("cpu", "torch")
        ]
        assert torch.equal(*results)
        best_quotients = results[0].amax(-1)
        assert best_quotients[0] == 0
        assert not (results[0] == torch.inf).any()


# ---- Top-p ---------------------------------------------------------------------------------------

TOP_P = (1e-6, 0.01, 0.5, 0.9, 0.99, 0.999, 0.999999)


def mass_outside_the_probe(rows, vocab_size):
    """Tokens with most of the mass share stripes, so that few are the maximum of their stripe."""
    logits = torch.randn(rows, vocab_size, generator=generator())
    tile = torch.arange(vocab_size) // 512 % 3 == 1
    heavy = tile & (torch.arange(vocab_size) % 16 == 3)
    return torch.where(heavy, 8 + 0.1 * logits, logits)


def one_more_than_all_the_rest(rows, vocab_size):
    logits = torch.randn(rows, vocab_size, generator=generator())
    logits[:, vocab_size // 2] = torch.tensor(vocab_size).log() + 0.5
    return logits


def staircase(rows, vocab_size):
    """Groups of equal logits; each group has about the mass of all lower ones."""
    step = (torch.arange(1, vocab_size + 1).float().log2()).floor()
    return (-step * 0.6931).repeat(rows, 1)[:, torch.randperm(vocab_size, generator=generator())]


TRICKS = {
    "hidden": mass_outside_the_probe,
    "one": one_more_than_all_the_rest,
    "staircase": staircase,
    "cauchy": lambda rows, vocab_size: (
        torch.randn(rows, vocab_size, generator=generator())
        / torch.randn(rows, vocab_size, generator=generator()).abs().clamp(min=0.05)
    ),
    "power law": lambda rows, vocab_size: (
        -1.5 * torch.arange(1, vocab_size + 1).float().log()
    ).repeat(rows, 1),
    "two levels": lambda rows, vocab_size: torch.where(
        torch.rand(rows, vocab_size, generator=generator()) < 0.3, 2.0, 1.0
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("top_p", TOP_P)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"min_p": 0.01}], ids=str)
def test_rows_that_mislead_the_probe(trick, top_p, options):
    for vocab_size in (5003, 40000):
        logits = TRICKS[trick](2, vocab_size)
        assert_equal(logits, SamplingParams(top_p=top_p, **options, seed=3))


@pytest.mark.parametrize("at_least", [1, 3, 100, 3000, 4999])
@pytest.mark.parametrize("trick", TRICKS)
def test_min_tokens_to_keep(trick, at_least):
    logits = TRICKS[trick](2, 5003)
    for options in ({"top_p": 0.3}, {"top_p": 0.9, "min_p": 0.3}, {"top_k": 5, "top_p": 0.5}):
        assert_equal(logits, SamplingParams(min_tokens_to_keep=at_least, **options, seed=3))


# ---- Masks ---------------------------------------------------------------------------------------


def some(vocab_size, number, seed=0):
    """So many tokens, anywhere."""
    chosen = torch.zeros(vocab_size, dtype=torch.bool)
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    chosen[order[:number]] = True
    return chosen


#: A mask's name to a function of the vocabulary's ids and their ranks, 0 for the best token.
MASKS = {
    "half": lambda ids, rank: some(len(ids), len(ids) // 2),
    "all": lambda ids, rank: ids >= 0,
    "none": lambda ids, rank: ids < 0,
    "one": lambda ids, rank: some(len(ids), 1),
    "five": lambda ids, rank: some(len(ids), 5),
    "100": lambda ids, rank: some(len(ids), 100),
    "2,000": lambda ids, rank: some(len(ids), 2000),
    "alternating words": lambda ids, rank: ids // 32 % 2 == 1,
    "alternating tiles": lambda ids, rank: ids // 512 % 2 == 1,
    "alternating tokens": lambda ids, rank: ids % 2 == 0,
    "one stripe": lambda ids, rank: ids % 16 == 7,
    "all but a few": lambda ids, rank: ~some(len(ids), 5),
    "the last tile": lambda ids, rank: ids // 512 == ids[-1] // 512,
    "the last token": lambda ids, rank: ids == ids[-1],
    "the lower half": lambda ids, rank: rank >= len(ids) // 2,
    "the lowest": lambda ids, rank: rank >= len(ids) - 3,
    "all but the best": lambda ids, rank: rank > 0,
    "all but the best 50": lambda ids, rank: rank >= 50,
}
#: What a tile's end may lie beside: the end of a word, of a tile, and neither.
MASKED_SIZES = (31, 512, 1000, 5003)
MASKED_CHAINS = CHAINS | {"no filter": {}, "min-p alone": {"min_p": 0.1}}


def make_masks(logits):
    """Every mask for a row of logits: bool ``(len(MASKS), vocab_size)``."""
    ids = torch.arange(len(logits))
    rank = logits.nan_to_num(-torch.inf).argsort(descending=True).argsort()
    return torch.stack([make(ids, rank) for make in MASKS.values()])


def with_random_bits_past_the_end(mask, vocab_size):
    """The mask's words, whose bits past the vocabulary mean nothing, in rows of an odd stride."""
    words = pack_mask(mask, vocab_size)
    noise = torch.randint(-(2**31), 2**31, (len(words), words.shape[1] + 2), generator=generator())
    buffer = noise.int()
    buffer[:, 1:-1] = words
    if vocab_size % 32:
        past = -(1 << vocab_size % 32)
        buffer[:, -2] = (buffer[:, -2] & ~past) | (noise[:, -2].int() & past)
    return buffer[:, 1:-1]


def assert_masks_agree(params, dtype, **history):
    for vocab_size in MASKED_SIZES:
        row = (3 * torch.randn(vocab_size, generator=generator())).to(dtype)
        allowed = make_masks(row)
        words = with_random_bits_past_the_end(allowed, vocab_size)
        clean = row.repeat(len(MASKS), 1)
        hidden = clean.clone()  # NaN and +inf under the mask alone
        hidden[:, ::2] = hidden[:, ::2].masked_fill(~allowed[:, ::2], torch.nan)
        hidden[:, 1::2] = hidden[:, 1::2].masked_fill(~allowed[:, 1::2], torch.inf)
        beside = hidden.clone()  # and a few beside it
        beside[:, 5::97] = torch.nan
        beside[1::2, 7::101] = torch.inf
        options = {"logprobs": "processed", "allowed_mask": words} | history
        expected = assert_equal(clean, params, **options)
        unseen = assert_equal(hidden, params, **options)
        assert torch.equal(unseen.tokens, expected.tokens)
        assert torch.equal(unseen.status, expected.status)
        assert (assert_equal(beside, params, **options).status > 2).any() or vocab_size == 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chain", MASKED_CHAINS)
def test_masks_and_what_is_under_them(chain, dtype):
    assert_masks_agree(SamplingParams(**MASKED_CHAINS[chain], seed=3), dtype)


@pytest.mark.parametrize("chain", MASKED_CHAINS)
def test_masks_with_penalties_and_biases(chain):
    """Among the biases one that bans an allowed token, and one that would raise a banned one."""
    params = SamplingParams(
        **MASKED_CHAINS[chain],
        repetition_penalty=1.5,
        presence_penalty=0.5,
        logit_bias={0: -torch.inf, 1: 20.0, 2: 30.0, 30: -1.0},
        seed=3,
    )
    ids = [list(range(0, 30, 2))] * len(MASKS)
    assert_masks_agree(params, torch.float32, prompts=ids, outputs=ids)


@pytest.mark.parametrize("chain", MASKED_CHAINS)
def test_one_mask_for_all_rows_and_raw_logprobs(chain):
    params = SamplingParams(**MASKED_CHAINS[chain], seed=3)
    logits = 3 * torch.randn(4, 5003, generator=generator())
    for number in (5, 2500):
        mask = pack_mask(some(5003, number), 5003)
        assert_equal(logits, params, allowed_mask=mask, logprobs="raw")
        assert_equal(logits, params, allowed_mask=mask.expand(4, -1), logprobs="raw")


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_masked_logits_at_every_alignment(start):
    """SSE's operands in memory must be aligned, and a row of logits need not be."""
    logits = torch.randn(5 * 5003, generator=generator())[start : start + 4 * 5003].view(4, 5003)
    mask = pack_mask(some(5003, 2500), 5003)
    for chain in MASKED_CHAINS.values():
        assert_equal(logits, SamplingParams(**chain, seed=3), allowed_mask=mask)


@pytest.mark.parametrize("instructions", ["x86-64-v3", "x86-64-v2", "x86-64"])
def test_masks_in_every_instruction_set(instructions, tmp_path, monkeypatch):
    """Those that the machine's own takes the place of where the kernel chooses."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("these are instruction sets of x86-64")
    if instructions == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this machine has no AVX2")
    library = native.Library("cpu")
    library.path = tmp_path / "kernel.so"
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    flags += [f"-march={instructions}", "-DLLM_SAMPLING_CLONES=__attribute__((noinline))"]
    source = Path(__file__).parents[2] / "csrc/cpu/sample.cpp"
    subprocess.run(["c++", *flags, "-o", library.path, source, "-ldl"], check=True)
    monkeypatch.setattr(cpu, "LIBRARY", library)
    for chain in ("greedy", "all", "no top-k", "no filter", "min-p alone"):
        assert_masks_agree(SamplingParams(**MASKED_CHAINS[chain], seed=3), torch.float32)
    for start in range(4):
        test_masked_logits_at_every_alignment(start)
