"""The Triton kernel's internals: how often a row is read, every path at small sizes, the division.

Needs Triton's interpreter; test_triton.py starts a process that has it.
"""

import functools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
import unchecked
from cases import DTYPES, LAYOUTS, Case, build, covering_cases, make_row
from parity import assert_parity, build_all

from llm_sampling import (
    BatchParams,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    reference,
    sample,
)
from llm_sampling.backends import triton as backend
from llm_sampling.backends import triton_kernel as kernel
from llm_sampling.backends.base import SampleCall

pytestmark = pytest.mark.usefixtures("triton_alone")


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


# Reads


@pytest.fixture
def reads(monkeypatch):
    """A function that returns how often a call loads a row, in rows."""
    loaded = []
    processed = kernel._processed_and_flags
    raw = kernel._raw_log_sum

    def count(row, first, ids, inside, *rest):
        loaded.append(int(inside.handle.data.sum()))
        return processed(row, first, ids, inside, *rest)

    def count_raw(row, *rest):
        loaded.append(int(row.vocab_size.handle.data.item()))
        return raw(row, *rest)

    monkeypatch.setattr(kernel, "_processed_and_flags", count)
    monkeypatch.setattr(kernel, "_raw_log_sum", count_raw)

    def reads_of(logits, params, call=sample, **options):
        loaded.clear()
        call(logits, params, backend="triton", **options)
        return sum(loaded) / logits.numel()

    return reads_of


V = 128256


@functools.cache
def row(name):
    return make_row(name, V, seed=1).unsqueeze(0)


@pytest.mark.parametrize("name", ["model-like", "normal", "normal x3"])
def test_reads_of_ordinary_rows(reads, name):
    """Greedy 1, unfiltered 2, top-k at most 2 and near 1 for a small k."""
    x = row(name)
    assert reads(x, SamplingParams(temperature=0)) == 1
    # a draw looks at the pieces of one tile again
    assert 2 < reads(x, SamplingParams(seed=1)) <= 2 + 4096 / V
    assert 1 < reads(x, SamplingParams(top_k=50, seed=1)) < 1.03
    assert reads(x, SamplingParams(top_k=50, top_p=0.9, min_p=0.01, seed=1)) < 1.03
    assert reads(x, SamplingParams(top_k=1024, seed=1)) < 1.4
    assert reads(x, SamplingParams(top_k=1024, top_p=0.8, min_tokens_to_keep=9, seed=1)) < 1.4
    assert reads(x, SamplingParams(min_p=0.2, seed=1)) < 1.2


def test_reads_of_top_p_while_the_nucleus_fits(reads):
    x = row("model-like")
    kept = int((filter_logits(x, SamplingParams(top_p=0.9)) > -torch.inf).sum())
    assert 2 < kept < 512
    assert reads(x, SamplingParams(top_p=0.9, seed=1)) == 2
    assert reads(x, SamplingParams(top_p=0.9, min_p=0.05, min_tokens_to_keep=3, seed=1)) == 2


@pytest.mark.parametrize(
    ("name", "params", "most"),
    [
        ("normal", {"top_p": 0.9}, 6.1),
        ("normal x3", {"top_p": 0.9}, 5.1),
        ("all equal", {"top_p": 0.9}, 6.1),
        ("normal", {"top_k": 3000}, 4.1),
        ("all equal", {"top_k": 50}, 4.1),
        # a search for each
        ("normal", {"top_k": 20000, "top_p": 0.9}, 7.1),
    ],
)
def test_reads_where_the_candidates_do_not_fit(reads, name, params, most):
    """The reads of the search, one that collects candidates, one that weighs the kept set."""
    assert 3 < reads(row(name), SamplingParams(**params, seed=1)) <= most


def test_other_reads(reads):
    """Raw logprobs take one read more, and so do filtered logits.

    Their tiles have half the size, so that the columns that are read again are a larger part of
    the row.
    """
    x = row("model-like")
    k = SamplingParams(top_k=50, seed=1)
    once = reads(x, k)
    assert once + 1 < reads(x, k, logprobs="raw") < 2.03
    assert reads(x, k, logprobs="processed") == once
    assert once + 1 < reads(x, k, filter_logits) < 2.03
    assert reads(x, SamplingParams(seed=1), filter_logits) == 2


def test_a_row_is_read_as_often_in_a_batch_as_alone(reads):
    """Greedy, top-k, top-p and unfiltered rows in one launch."""
    x = row("model-like")
    each = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=50, seed=1),
        SamplingParams(top_p=0.9, seed=2),
        SamplingParams(seed=3),
    ]
    alone = [reads(x, params) for params in each]
    assert reads(x.expand(4, -1), each) == pytest.approx(sum(alone) / 4)


# Every path at small sizes


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles, candidates and a nucleus so small that a few hundred tokens are many of them."""
    launch = backend.Launch(tile=128, candidates=64, nucleus=16, num_warps=1, num_stages=2)
    monkeypatch.setattr(backend, "choose_launch", lambda *args, **options: launch)


# In aligned rows, the last 9 of 601 logits and the last 2 of 450 are the tail.


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float32, "aligned rows"),
        (torch.float16, "contiguous"),
        (torch.bfloat16, "aligned rows"),
    ],
    ids=str,
)
def test_small_tiles(small_tiles, dtype, layout):
    """Searches, and draws by tile."""
    groups = covering_cases(601, seed=17)
    groups = [group[DTYPES.index(dtype) :: len(DTYPES)] for group in groups]
    batches = list(build_all(groups, 601, dtype, "cpu"))
    for batch in batches:
        batch.logits = LAYOUTS[layout](batch.logits)
    kinds = ("processed", "raw") if dtype == torch.float32 else ("processed",)
    assert_parity(batches, "triton", kinds)


@pytest.mark.parametrize("layout", ["contiguous", "aligned rows"])
@pytest.mark.parametrize("mix", ["k 1", "k V-1", "p 0.5", "p 0.99", "all keep 100"])
def test_small_tiles_on_hard_rows(small_tiles, mix, layout):
    """Ties across tiles, a search among equal logits, masses of 1."""
    rows = ["all equal", "plateau", "octaves", "deep tail", "huge"]
    cases = [Case(name, mix, seed=i) for i, name in enumerate(rows)]
    batch = build(cases, 450, torch.float32)
    batch.logits = LAYOUTS[layout](batch.logits)
    assert_parity([batch], "triton")


# Bans, filtered logits that are shifted


@pytest.mark.parametrize("layout", ["contiguous", "aligned rows"])
def test_bans(layout):
    """A ban hides NaN and +inf, alone and beside other bans and biases."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    x[:, 40], x[:, 41], x[:, 299] = torch.nan, torch.inf, 9.0
    x = LAYOUTS[layout](x)
    banned = {40: -torch.inf, 41: -torch.inf}
    biases = [banned, {**banned, 42: 5.0, 299: -torch.inf}, {41: -torch.inf}, {40: 3.0}]
    params = [SamplingParams(logit_bias=bias, top_k=9, seed=1) for bias in biases]
    wanted, got = (
        sample(x, params, num_samples=8, backend=name, check=False) for name in ("torch", "triton")
    )
    assert got.status.tolist() == [0, 0, 1, 5]
    assert torch.equal(got.status, wanted.status)
    assert torch.equal(got.tokens, wanted.tokens)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_filtered_logits_without_a_finite_quotient(filters):
    x, params = unchecked.rows_without_a_finite_quotient(filters)
    wanted = filter_logits(x, params, backend="torch")
    got = filter_logits(x, params, backend="triton")
    assert torch.equal(unchecked.bits(got), unchecked.bits(wanted))


# Values that nothing has checked, logits that change


@pytest.fixture
def most_steps(monkeypatch):
    """Ends a row with an error once it seems to be in a loop without an end."""
    steps = []
    narrowed, loaded, start = kernel._narrowed, kernel._loaded, kernel._row

    def count(function):
        def counted(*args):
            steps.append(1)
            assert len(steps) < 5000, "a loop does not end"
            return function(*args)

        return counted

    def start_counted(*args):
        steps.clear()
        return start(*args)

    monkeypatch.setattr(kernel, "_narrowed", count(narrowed))
    monkeypatch.setattr(kernel, "_loaded", count(loaded))
    monkeypatch.setattr(kernel, "_row", start_counted)


@pytest.fixture
def guard(monkeypatch):
    """A function that puts the memory that the wrapper allocates into guards."""
    make_results, workspace = backend.make_results, backend._workspace

    def guard(guards):
        monkeypatch.setattr(
            backend, "make_results", lambda call: guards.put_results(make_results(call))
        )
        monkeypatch.setattr(backend, "_workspace", lambda *args: guards.put(workspace(*args)))

    return guard


@pytest.mark.parametrize("seed", range(12))
def test_hostile_values(small_tiles, most_steps, guard, seed):
    unchecked.assert_hostile_values_do_no_harm(
        backend, 450, rows=8, seed=seed, dtype=DTYPES[seed % 3], guard=guard
    )


@pytest.mark.parametrize("seed", range(6))
def test_hostile_updates(seed):
    unchecked.assert_hostile_updates_do_no_harm(backend, 450, seed)


def test_a_bad_temperature_counts_as_1():
    wanted = backend.sample(unchecked.call_at((1.0,) * len(unchecked.BAD_TEMPERATURES)))
    got = backend.sample(unchecked.call_at(unchecked.BAD_TEMPERATURES))
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.status, wanted.status)


def test_greedy_kernels_draw_at_any_temperature():
    """A kernel that was compiled for greedy rows writes a token of every row."""
    batch = BatchParams.from_list([SamplingParams(temperature=0)] * 2, positions=[0, 0])
    batch.temperature[0] = 0.7
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    output = backend.sample(SampleCall(x, batch, None, None))
    assert output.tokens.tolist() == x.argmax(-1).tolist()


#: At which of a row's loads its logits change: in every pass, and in a search.
LOADS = (1, 3, 5, 6, 8, 10, 11, 14, 16, 20, 23, 27, 36, 49)


@pytest.fixture
def change_at(monkeypatch, most_steps):
    """A function after which the logits of row r change at its load with the number at[r].

    With ``often`` they are what they were at every second load after that one.
    """
    loads = []
    loaded, start = kernel._loaded, kernel._row

    def change_at(change, at, often):
        left = iter(at)

        def start_next(*args):
            loads[:] = [next(left), 0]
            return start(*args)

        def load(*args):
            x = loaded(*args)
            loads[1] += 1
            after = loads[1] - loads[0]
            if after >= 0 and not (often and after % 2):
                old = torch.from_numpy(x.handle.data)
                new = change(old) if len(old) else old
                # what is not inside stays at -inf
                x.handle.data = torch.where(old == -torch.inf, old, new).numpy()
            return x

        monkeypatch.setattr(kernel, "_row", start_next)
        monkeypatch.setattr(kernel, "_loaded", load)

    return change_at


@pytest.mark.parametrize("often", [False, True], ids=["once", "often"])
@pytest.mark.parametrize("change", unchecked.CHANGES)
def test_logits_that_change(small_tiles, change_at, guard, change, often):
    """The kernel ends, and a token is one of the row or -1, which the status says."""
    guards = unchecked.Guards(torch.nan)
    guard(guards)
    turn = list(unchecked.CHANGES).index(change) + often
    call, at = unchecked.changing_call(450, LOADS[turn % 5 :: 5], torch.float32)
    change_at(unchecked.CHANGES[change], at, often)
    output = backend.sample(call)
    unchecked.assert_defined(output, 450)
    unchecked.assert_advanced(call, output)
    change_at(unchecked.CHANGES[change], at, often)
    filtered = backend.filter_logits(unchecked.to_filter(call))
    assert not filtered.isnan().any()
    guards.assert_whole()


# The quotient of the repetition penalty


@triton.jit
def _quotients(x, r, out, count, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    inside = place < count
    a = tl.load(x + place, mask=inside, other=1.0)
    b = tl.load(r + place, mask=inside, other=1.0)
    tl.store(out + place, kernel._quotient(a, b, tl.div_rn(1.0, b)), mask=inside)


def test_the_quotient_is_correctly_rounded():
    """Random mantissas and those at both ends; the exponents for which the kernel uses it."""
    generator = torch.Generator().manual_seed(5)
    count = 2**18
    ends = torch.tensor([1.0, 1 + 2**-23, 2 - 2**-23, 2 - 2**-22, 1.5, 1.1, 1.3])

    def numbers():
        mantissa = 1 + torch.randint(2**23, (count,), generator=generator) * 2.0**-23
        some = torch.randint(4, (count,), generator=generator) == 0
        mantissa[some] = ends[torch.randint(7, (int(some.sum()),), generator=generator)]
        return mantissa * 2.0 ** torch.randint(-40, 40, (count,), generator=generator)

    x, r = numbers(), numbers()
    out = torch.empty(count)
    _quotients[(1,)](x, r, out, count, SIZE=count)
    assert torch.equal(out, x / r)
    once = x * (1 / r)
    assert not torch.equal(once, x / r), (
        "multiplying by the inverse must be wrong for some operands"
    )


@pytest.mark.parametrize("penalty", [1e-45, 1e-38, 2.0**-41, 1.1, 3.7, 2.0**41, 3e38])
@pytest.mark.parametrize("exponent", [-149, -126, -60, -41, -40, -39, 0, 39, 40, 41, 100, 127])
def test_far_logits_are_divided_exactly(exponent, penalty):
    """One logit far from 1 among ordinary ones: subnormal and infinite quotients too."""
    generator = torch.Generator().manual_seed(exponent)
    x = torch.randn(1, 300, generator=generator)
    x[0, 7] = 2.0**exponent * 1.2345 if exponent < 127 else 3e38
    history = TokenHistory.from_ids([[*range(0, 300, 2), 7]], vocab_size=300)
    params = SamplingParams(repetition_penalty=penalty, seed=1)
    got = filter_logits(x, params, history=history, backend="triton")
    wanted = filter_logits(x, params, history=history, backend="torch")
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


# Masses and random bits


@triton.jit
def _masses(x, out, m, scale, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, kernel._mass(tl.load(x + place), tl.load(m), tl.load(scale)))


@pytest.mark.parametrize("octave", [0, 1, 10, 30, 41, 42, 43, 62, 63, 100])
def test_masses(octave):
    """Depths of one octave and both of its ends, at a scale of 1."""
    count = 2**14
    fractions = torch.arange(count) / count
    depths = torch.cat([octave + fractions, (octave + fractions).nextafter(torch.tensor(0.0))])
    out = torch.empty(2 * count, dtype=torch.int64)
    one = torch.ones(1)
    _masses[(1,)](-depths, out, torch.zeros(1), one, SIZE=2 * count)
    assert torch.equal(out, reference.mass(depths.abs()))


@triton.jit
def _bits_of(seed, position, draws, out):
    for draw in range(0, draws):
        bits = kernel._random_bits(tl.load(seed), tl.load(position), draw)
        tl.store(out + draw, bits.to(tl.int64, bitcast=True))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, -(2**63), 0x299F31D0A4093822])
@pytest.mark.parametrize("position", [0, 5, 2**32, 2**63 - 1, -1])
def test_random_bits(seed, position):
    out = torch.empty(3, dtype=torch.int64)
    seed, position = torch.tensor([seed]), torch.tensor([position])
    _bits_of[(1,)](seed, position, 3, out)
    for draw in range(3):
        words = reference.philox(seed, position, draw)
        assert out[draw] == (words[0] | words[1] << 32).item()


# A decode loop


def test_the_sampler_owns_its_workspace(monkeypatch):
    """No step allocates anything but its results."""
    made = []
    monkeypatch.setattr(
        backend,
        "_workspace",
        lambda *args, make=backend._workspace: made.append(1) or make(*args),
    )
    sampler = Sampler([SamplingParams(top_k=5, seed=1)] * 2, vocab_size=100, backend="triton")
    mask = torch.full((2, 4), -1, dtype=torch.int32)
    for step in range(4):
        sampler(torch.randn(2, 100), allowed_mask=mask if step % 2 else None)
    assert len(made) == 2, "one for steps with a mask, one for those without"


@pytest.mark.parametrize("check", [True, False])
def test_bad_rows_advance_only_where_nothing_raises(check):
    history = TokenHistory.from_ids([[1], [2]], vocab_size=50)
    params = [SamplingParams(repetition_penalty=1.2, seed=s) for s in (1, 2)]
    sampler = Sampler(params, vocab_size=50, history=history, backend="triton", check=check)
    logits = torch.randn(2, 50)
    logits[1] = -torch.inf
    if check:
        with pytest.raises(ValueError, match="no candidate left"):
            sampler(logits)
        assert sampler.positions.tolist() == [0, 0]
        assert history.lengths.tolist() == [0, 0]
    else:
        assert sampler(logits).tokens[1] == -1
        assert sampler.positions.tolist() == [1, 0]
        assert history.lengths.tolist() == [1, 0]
    assert sampler(torch.randn(2, 50)).status.tolist() == [0, 0]
    assert sampler.positions.tolist() == ([1, 1] if check else [2, 1])


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_the_shorter_kernels_give_the_same_tokens(temperature):
    """A batch's flags choose which code is compiled, and do not change a token."""
    batch = BatchParams.from_list([SamplingParams(temperature=temperature, seed=3)] * 2)
    assert (batch.all_greedy, batch.any_filter) == (temperature == 0, False)
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1))
    short = sample(x, batch, backend="triton", num_samples=4).tokens
    full = replace(batch, all_greedy=False, any_filter=True)
    assert torch.equal(sample(x, full, backend="triton", num_samples=4).tokens, short)
    assert torch.equal(sample(x, batch, backend="torch", num_samples=4).tokens, short)
