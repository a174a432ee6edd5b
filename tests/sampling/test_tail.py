"""Are rare tokens drawn as often as they should be, down to one draw in three million?

Single tokens lie 6 to 15 nats below the best one. There are so many draws that each is expected at
least 30 times, and a count more than four standard deviations from its expectation fails. Negative
controls are samplers with a wrong tail, whose counts numpy draws. Only the CPU kernel is tested
here, because test_parity.py shows that the other backends draw exactly the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_sampling import SamplingParams, sample

VOCAB_SIZE = 2**14  # 32 tiles of the CPU kernel; two such rows are enough work for two threads
ROWS = 2
PER_CALL = 2_500_000  # draws of each row; the tokens of a call take 40 MB
DRAWS = 100_000_000
MOST_Z = 4.0

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BEST = 20 * 512
#: The rare tokens: how many nats below the best one, and the id, on both sides of the best token.
#: The fifth is frequent enough only for the slow test.
TAIL: Mapping[float, int] = {6.0: 3_000, 9.0: 15_991, 12.0: 511, 15.0: 12_345, 18.0: 9_216}
TAIL_IDS = list(TAIL.values())
#: The nats by which all other tokens are below the best: 58 octaves, so that they have no mass.
NOTHING = 40.0


def deficits(vocab_size: int = VOCAB_SIZE) -> Floats:
    """Return how far each token is below the best one, in nats, exact in float32."""
    d = np.full(vocab_size, NOTHING)
    d[BEST] = 0.0
    d[TAIL_IDS] = list(TAIL)
    return d


def softmax_of(d: Floats, temperature: float = 1.0) -> Floats:
    p = np.exp(-d / temperature)
    return p / p.sum()


def draw(d: Floats, draws: int, **filters: float) -> Ints:
    """Draw with the CPU kernel and return how often each token came."""
    logits = torch.from_numpy(-d).float().expand(ROWS, -1)
    params = SamplingParams(seed=41, **filters)  # type: ignore[arg-type]
    counts = torch.zeros(len(d), dtype=torch.int64)
    per_call = min(PER_CALL, draws // ROWS)
    for first in range(0, draws // per_call, ROWS):
        tokens = sample(
            logits,
            params,
            positions=range(first, first + ROWS),
            num_samples=per_call,
            backend="cpu",
        ).tokens
        counts += torch.bincount(tokens.flatten(), minlength=len(d))
    assert int(counts.sum()) == draws
    return counts.numpy()


def z_scores(counts: Ints, least_expected: float = 30) -> dict[float, float]:
    """Return by deficit how many standard deviations a rare token's count is off.

    Tokens that are expected less than ``least_expected`` times are left out.
    """
    p, draws = softmax_of(deficits()), int(counts.sum())
    return {
        d: float((counts[token] - draws * p[token]) / np.sqrt(draws * p[token] * (1 - p[token])))
        for d, token in TAIL.items()
        if draws * p[token] >= least_expected
    }


# Without a filter the kernel finds the drawn token by the masses of tiles; with top-k or min-p it
# finds it in a list of candidates.
PATHS: Mapping[str, Mapping[str, float]] = {
    "tiles": {},
    "list of top-k": {"top_k": len(TAIL) + 1},
    "list of min-p": {"min_p": 1e-9},
}


@pytest.mark.parametrize("filters", PATHS.values(), ids=PATHS.keys())
def test_rare_tokens_are_drawn_as_often_as_they_should_be(filters: Mapping[str, float]) -> None:
    counts = draw(deficits(), DRAWS, **filters)
    assert counts[[BEST, *TAIL_IDS]].sum() == DRAWS, "a token without mass was drawn"
    z = z_scores(counts)
    assert set(z) >= {6.0, 9.0, 12.0, 15.0}
    assert max(abs(value) for value in z.values()) <= MOST_Z, z


@pytest.mark.slow
def test_rarer_tokens_are_too() -> None:
    """Down to 18 nats, in a minute: ``pytest -m slow tests/sampling/test_tail.py``."""
    counts = draw(deficits(), 2_200_000_000, top_k=len(TAIL) + 1)
    z = z_scores(counts)
    assert set(z) == set(TAIL)
    assert max(abs(value) for value in z.values()) <= MOST_Z, z


# ---- Negative controls ---------------------------------------------------------------------------


def of_uniforms(p: Floats, bits: int) -> Floats:
    """Return what a sampler draws whose uniform numbers are k / 2^bits: too coarse for the tail.

    It draws the first token whose cumulative probability is above the uniform number.
    """
    below = np.ceil(np.cumsum(p) * 2.0**bits)  # how many uniform numbers are below each sum
    below[-1] = 2.0**bits
    return np.diff(below, prepend=0.0) / 2.0**bits


def cut_below(p: Floats, least: float) -> Floats:
    p = np.where(p / p.max() < least, 0.0, p)
    return p / p.sum()


def too_often(p: Floats, token: int, times: int) -> Floats:
    p = p.copy()
    p[BEST] -= (times - 1) * p[token]
    p[token] *= times
    return p


P = softmax_of(deficits())

#: Broken samplers: the distribution that each draws from, and the deficits at which it must fail.
BROKEN: Mapping[str, tuple[Floats, set[float]]] = {
    "uniforms of 16 bits": (of_uniforms(P, 16), {12.0, 15.0}),
    "uniforms of 20 bits": (of_uniforms(P, 20), {15.0}),
    "nothing below e^-14": (cut_below(P, np.exp(-14)), {15.0}),
    "nothing below e^-11": (cut_below(P, np.exp(-11)), {12.0, 15.0}),
    "temperature 0.99": (softmax_of(deficits(), 0.99), {6.0, 9.0}),
    "temperature 1.01": (softmax_of(deficits(), 1.01), {6.0, 9.0}),
    **{f"twice at {d:.0f}": (too_often(P, TAIL[d], 2), {d}) for d in (6.0, 9.0, 12.0)},
    "three times at 15": (too_often(P, TAIL[15.0], 3), {15.0}),
}


@pytest.mark.parametrize(("p", "refused_at"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_samplers_are_refused(p: Floats, refused_at: set[float]) -> None:
    """Negative control: each broken sampler fails the test with each of 20 seeds."""
    for seed in range(20):
        z = z_scores(np.random.default_rng(seed).multinomial(DRAWS, p))
        assert {d for d, value in z.items() if abs(value) > MOST_Z} >= refused_at, z


def test_an_exact_sampler_is_accepted() -> None:
    """At most 3 of 1,000 seeds fail: a count of about 30 is rarely four deviations off."""
    seeds = range(1000)
    scores = [z_scores(np.random.default_rng(seed).multinomial(DRAWS, P)) for seed in seeds]
    assert sum(max(abs(value) for value in z.values()) > MOST_Z for z in scores) <= 3


# ---- A long tail of tokens that a sum in float32 loses -------------------------------------------

LONG = 2**17
LONG_DRAWS = 2_000_000


def long_tail() -> Floats:
    """Return the deficits of a row in which all tokens but token 0 are 18 nats below it.

    The probability of each is too small to change a float32 sum that is near 1.
    """
    d = np.full(LONG, 18.0)
    d[0] = 0.0
    return d


def long_z_scores(counts: Ints) -> Floats:
    """Return the z scores of eight parts of the tail, with 16,384 tokens each."""
    p = softmax_of(long_tail())
    expected = counts.sum() * np.append(0.0, p[1:]).reshape(8, -1).sum(1)
    observed = np.append(0, counts[1:]).reshape(8, -1).sum(1)
    assert expected.min() >= 30
    return np.asarray((observed - expected) / np.sqrt(expected))


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": LONG - 1}, {"min_p": 1e-8}],
    ids=["no filter", "top-k", "min-p"],
)
def test_a_long_tail_is_not_lost(filters: Mapping[str, float]) -> None:
    counts = draw(long_tail(), LONG_DRAWS, **filters)
    assert np.abs(long_z_scores(counts)).max() <= MOST_Z


def test_a_sum_in_float32_is_refused() -> None:
    """Negative control: a cumulative sum in float32 loses the whole tail."""
    cumulative = np.cumsum(softmax_of(long_tail()).astype(np.float32), dtype=np.float32)
    broken = np.diff(cumulative.astype(np.float64), prepend=0.0)
    counts = np.random.default_rng(7).multinomial(LONG_DRAWS, broken / broken.sum())
    assert np.abs(long_z_scores(counts)).min() > MOST_Z
