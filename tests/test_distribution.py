"""Is the draw unbiased, and would the test notice if it were not?

Chi-squared against the float64 softmax, whose kept set is worked out here in float64, on rows whose
filters cut far from any token's boundary. The torch reference is left out: it is slow, and its
tokens are those of the others, one by one, in test_parity.py. Broken samplers are kept as negative
controls: the very same test must refuse them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import make_row
from scipy import stats

from llm_sampling import SamplingParams, TokenHistory, models, reference, sample
from llm_sampling.backends import BACKENDS

DRAWS = 1_000_000
PER_CALL = 2_000  # draws of a row at one position
LEAST_P = 1e-4

kernels = pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"torch"}), indirect=True)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def draw(
    backend: str,
    logits: torch.Tensor,
    params: SamplingParams,
    history: TokenHistory | None = None,
) -> Ints:
    """How often each token of the row ``logits`` was drawn, over positions and draws."""
    counts = np.zeros(logits.shape[-1], dtype=np.int64)
    rows = 50
    many = None
    if history is not None:
        prompts = [np.flatnonzero(history_bits(history))] * rows
        outputs = [np.repeat(np.arange(logits.shape[-1]), history.counts[0])] * rows
        many = TokenHistory.from_ids(prompts, outputs, logits.shape[-1])
    for first in range(0, DRAWS // PER_CALL, rows):
        tokens = sample(
            logits.expand(rows, -1),
            params,
            history=many,
            positions=range(first, first + rows),
            num_samples=PER_CALL,
            backend=backend,
        ).tokens
        counts += np.bincount(tokens.flatten().numpy(), minlength=len(counts))
    assert counts.sum() == DRAWS
    return counts


def history_bits(history: TokenHistory) -> npt.NDArray[np.uint8]:
    words = history.seen[0].numpy().astype("<u4").view(np.uint8)
    return np.unpackbits(words, bitorder="little")[: history.vocab_size]


def softmax(x: Floats) -> Floats:
    p = np.exp(x - x.max())
    return p / p.sum()


def oracle(
    logits: torch.Tensor, params: SamplingParams, history: TokenHistory | None = None
) -> Floats:
    """The distribution by definition, in float64; asserts that no filter cuts near a token."""
    x = logits.double().numpy().copy()
    if history is not None:
        seen, count = history_bits(history).astype(bool), history.counts[0].numpy()
        x[seen] = np.where(
            x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty
        )
        x -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    x /= params.temperature
    order = np.argsort(-x, kind="stable")
    keep = len(x)
    if params.top_k > 0:
        keep = min(keep, params.top_k)
        assert x[order[keep - 1]] - x[order[keep]] > 1e-5
    if params.top_p < 1:
        reached = np.cumsum(softmax(x[order[:keep]]))
        assert np.abs(reached - params.top_p).min() > 1e-5
        keep = int(np.searchsorted(reached, params.top_p)) + 1
    if params.min_p > 0:
        share = np.exp(x - x.max())
        assert np.abs(share / params.min_p - 1).min() > 1e-5
        keep = min(keep, int((share >= params.min_p).sum()))
    p = np.zeros(len(x))
    p[order[:keep]] = softmax(x[order[:keep]])
    return p


def p_value(counts: Ints, p: Floats) -> float:
    """Chi-squared; tokens that are expected less than 5 times share a bin."""
    assert counts[p == 0].sum() == 0, "a token was drawn that the filters cut"
    expected = p * counts.sum()
    rare = expected < 5
    observed = counts[~rare].astype(float)
    expected_bins = expected[~rare]
    if expected[rare].sum() >= 5:
        observed = np.append(observed, counts[rare].sum())
        expected_bins = np.append(expected_bins, expected[rare].sum())
    else:  # too few for a bin of their own
        smallest = expected_bins.argmin()
        observed[smallest] += counts[rare].sum()
        expected_bins[smallest] += expected[rare].sum()
    assert len(observed) > 1
    value = float(stats.chisquare(observed, expected_bins).pvalue)
    assert not np.isnan(value)
    return value


def row(name: str, vocab_size: int) -> torch.Tensor:
    return make_row(name, vocab_size, seed=7)[None]


HISTORY = TokenHistory.from_ids([list(range(0, 1000, 3))], [[5, 5, 6, 700, 700, 700, 9]], 1000)

CASES = {
    "plain": (SamplingParams(seed=11), None),
    "temperature low": (SamplingParams(temperature=0.6, seed=12), None),
    "temperature high": (SamplingParams(temperature=1.7, seed=13), None),
    "top-k": (SamplingParams(top_k=40, seed=14), None),
    "top-p": (SamplingParams(top_p=0.9, seed=15), None),
    "min-p": (SamplingParams(min_p=0.03, seed=16), None),
    "top-k, top-p, min-p": (
        SamplingParams(temperature=0.9, top_k=200, top_p=0.93, min_p=0.004, seed=17),
        None,
    ),
    "penalties": (
        SamplingParams(
            repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3, seed=18
        ),
        HISTORY,
    ),
    "penalties, top-p": (
        SamplingParams(
            repetition_penalty=0.8, frequency_penalty=-0.4, presence_penalty=0.3, top_p=0.8, seed=19
        ),
        HISTORY,
    ),
}


@kernels
@pytest.mark.parametrize(("params", "history"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", ["normal", "normal x3"])
def test_frequencies_are_the_softmax(
    backend: str, name: str, params: SamplingParams, history: TokenHistory | None
) -> None:
    logits = row(name, 1000)
    counts = draw(backend, logits, params, history)
    assert p_value(counts, oracle(logits[0], params, history)) >= LEAST_P


@kernels
def test_a_large_row_in_tiles(backend: str) -> None:
    """V = 4,096 goes by the masses of tiles, not by a list."""
    logits = row("normal", 4096)
    counts = draw(backend, logits, SamplingParams(seed=21))
    assert p_value(counts, oracle(logits[0], SamplingParams())) >= LEAST_P


def biased(p: Floats) -> Floats:
    """Even ids are drawn 5 % too often."""
    p = p * np.where(np.arange(len(p)) % 2 == 0, 1.05, 1.0)
    return p / p.sum()


BROKEN = {
    "temperature x 0.95": SamplingParams(temperature=0.95, seed=31),
    "a silent top_p 0.95": SamplingParams(top_p=0.95, seed=32),
    "even ids + 5 %": None,
}


@pytest.mark.parametrize("params", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("vocab_size", [1000, 4096])
def test_broken_samplers_are_refused(vocab_size: int, params: SamplingParams | None) -> None:
    """Negative controls: what is asked for is a plain draw at temperature 1."""
    logits = row("normal", vocab_size)
    asked = oracle(logits[0], SamplingParams())
    if params is None:
        counts = np.random.default_rng(5).multinomial(DRAWS, biased(asked))
    else:
        counts = draw("auto", logits, params)
    assert p_value(counts, asked) < LEAST_P


def test_the_test_accepts_an_exact_sampler() -> None:
    """And it does not refuse numpy's draws, 20 times of 20."""
    asked = oracle(row("normal", 1000)[0], SamplingParams())
    generator = np.random.default_rng(6)
    values = [p_value(generator.multinomial(DRAWS, asked), asked) for _ in range(20)]
    assert min(values) >= LEAST_P


def pairs_p_value(first: Ints, second: Ints, p: Floats) -> float:
    """Chi-squared of independence of two series of tokens, four classes of equal mass each."""
    classes = np.minimum((np.cumsum(p) - p / 2) * 4, 3).astype(int)
    table = np.zeros((4, 4))
    np.add.at(table, (classes[first], classes[second]), 1)
    return float(stats.chi2_contingency(table).pvalue)


def tokens_at(seeds: list[int], positions: list[int], num_samples: int = 1) -> Ints:
    logits = row("normal", 257).expand(len(seeds), -1)
    params = [SamplingParams(seed=seed) for seed in seeds]
    tokens = sample(logits, params, positions=positions, num_samples=num_samples).tokens
    return tokens.numpy().astype(np.int64)


COUNT = 20_000

NEIGHBOURS = {
    "consecutive positions": ([9] * COUNT, range(COUNT), [9] * COUNT, range(1, COUNT + 1)),
    "neighbouring seeds": (range(COUNT), [0] * COUNT, range(1, COUNT + 1), [0] * COUNT),
    "next seed, position before": (range(COUNT), [1] * COUNT, range(1, COUNT + 1), [0] * COUNT),
    "seeds 2^32 apart": (range(COUNT), [0] * COUNT, range(2**32, 2**32 + COUNT), [0] * COUNT),
    "positions 2^32 apart": ([3] * COUNT, range(COUNT), [3] * COUNT, range(2**32, 2**32 + COUNT)),
}


@pytest.mark.parametrize("neighbours", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_are_independent(neighbours: tuple[object, ...]) -> None:
    seeds, positions, other_seeds, other_positions = map(list, neighbours)  # type: ignore[call-overload]
    first, second = tokens_at(seeds, positions), tokens_at(other_seeds, other_positions)
    p = oracle(row("normal", 257)[0], SamplingParams())
    assert pairs_p_value(first, second, p) >= LEAST_P


def test_draws_of_a_row_are_independent() -> None:
    tokens = tokens_at(list(range(COUNT // 2)), [0] * (COUNT // 2), num_samples=2)
    p = oracle(row("normal", 257)[0], SamplingParams())
    assert pairs_p_value(tokens[:, 0], tokens[:, 1], p) >= LEAST_P


def test_dependent_draws_are_refused() -> None:
    """A negative control: one draw in twenty is that of the position before."""
    first = tokens_at([9] * COUNT, list(range(COUNT)))
    second = tokens_at([9] * COUNT, list(range(1, COUNT + 1)))
    second[::20] = first[::20]
    p = oracle(row("normal", 257)[0], SamplingParams())
    assert pairs_p_value(first, second, p) < LEAST_P


def total_variation(logits: torch.Tensor, temperature: float = 1.0) -> float:
    """The largest, over rows, between the integer masses and the float64 softmax."""
    t = torch.full((len(logits),), temperature)
    w = reference.mass(reference.depth(logits, t)).double()
    exact = (logits.double() / temperature).softmax(-1)
    return float(((w / w.sum(-1, keepdim=True)) - exact).abs().sum(-1).max() / 2)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", ["model-like", "normal", "normal x3"])
def test_masses_are_the_softmax(name: str, temperature: float) -> None:
    rows = torch.stack([make_row(name, 32_000, seed=seed) for seed in range(4)])
    assert total_variation(rows, temperature) < 1e-6


def test_a_wrong_mass_is_refused() -> None:
    """A negative control: the logits of another temperature, off by a part in 10^5."""
    logits = make_row("normal x3", 32_000, seed=1)[None]
    w = reference.mass(reference.depth(logits * (1 + 1e-5), torch.ones(1))).double()
    exact = logits.double().softmax(-1)
    assert float((w / w.sum() - exact).abs().sum() / 2) > 1e-6


@pytest.mark.model
def test_masses_are_the_softmax_on_real_logits(smollm: models.LanguageModel) -> None:
    ids = torch.tensor([smollm.encode("The capital of France is Paris. Once upon a time")])
    with torch.inference_mode():
        logits = smollm.model(input_ids=ids).logits[0].float()
    assert logits.shape == (ids.shape[1], smollm.vocab_size)
    assert total_variation(logits.clone()) < 1e-6
