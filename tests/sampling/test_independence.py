"""Are a row's draws independent of each other, of its other positions and of other seeds?

That no two draws use the same random bits needs no statistics: inverting the generator gives back
seed, position, draw and stream, and the reference and C++ generate the same words. That draws of
neighbouring counters look independent is tested by statistics: a pairs test (chi-squared of the
joint table of two tokens) and a serial test (autocorrelation of a series at lags 1 to 12). For
every pair and every series there is a broken sampler that the same test must reject.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import make_row
from scipy import stats

from llm_sampling import BatchParams, SamplingParams, reference, sample
from llm_sampling.generation import seeded

ROOT = Path(__file__).parents[2]
LOW32 = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
ZERO, ONE = np.uint64(0), np.uint64(1)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
#: uint64 arrays seed, position, draw and stream, of the same shape.
Tuples = tuple[Words, Words, Words, Words]

# ---- No two draws share their random bits --------------------------------------------------------

M0, M1 = 0xD2511F53, 0xCD9E8D57  # Philox's multipliers; odd, so they have inverses modulo 2^32
W0, W1 = 0x9E3779B9, 0xBB67AE85  # what Philox adds to its key after each round


def keys(seed: Words, rounds: int) -> list[tuple[Words, Words]]:
    return [
        (seed + np.uint64(i * W0) & LOW32, (seed >> HALF) + np.uint64(i * W1) & LOW32)
        for i in range(rounds)
    ]


def philox(at: Tuples, rounds: int = 10) -> Words:
    """Return the four output words ``(4, ...)``, computed as docs/semantics.md says."""
    seed, position, c2, c3 = at
    c0, c1 = position & LOW32, position >> HALF
    for k0, k1 in keys(seed, rounds):
        first, second = c0 * np.uint64(M0), c2 * np.uint64(M1)
        c0, c1 = second >> HALF ^ c1 ^ k0, second & LOW32
        c2, c3 = first >> HALF ^ c3 ^ k1, first & LOW32
    return np.stack([c0, c1, c2, c3])


def undone(seed: Words, words: Words) -> Tuples:
    """Invert :func:`philox`: return its input, from the seed and the words, round by round."""
    c0, c1, c2, c3 = words
    for k0, k1 in reversed(keys(seed, 10)):
        # the lower half of a product determines the factor, and the factor the upper half
        of_first = c3 * np.uint64(pow(M0, -1, 2**32)) & LOW32
        of_second = c1 * np.uint64(pow(M1, -1, 2**32)) & LOW32
        c1 = of_second * np.uint64(M1) >> HALF ^ c0 ^ k0
        c3 = of_first * np.uint64(M0) >> HALF ^ c2 ^ k1
        c0, c2 = of_first, of_second
    return seed, c0 | c1 << HALF, c2, c3


def random_words(generator: np.random.Generator, bits: int, size: int) -> Words:
    """Return integers of which half are random and half are at or near powers of 2^32."""
    at_random = generator.integers(0, 2**bits, size, dtype=np.uint64, endpoint=False)
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    if bits == 64:
        edges += [2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 1]
    at_an_edge = generator.choice(np.array(edges, dtype=np.uint64), size)
    return np.where(generator.random(size) < 0.5, at_random, at_an_edge)


def random_tuples(size: int, seed: int = 1) -> Tuples:
    generator = np.random.default_rng(seed)
    seeds, positions = (random_words(generator, 64, size) for _ in range(2))
    draws, streams = (random_words(generator, 32, size) for _ in range(2))
    return seeds, positions, draws, streams


def grid(seeds: Words, positions: Words, draws: int) -> Tuples:
    """Return the generator's inputs for ``draws`` draws of rows, each ``(rows, draws)``."""
    shape = (len(seeds), draws)
    draw = np.broadcast_to(np.arange(draws, dtype=np.uint64), shape)
    return (
        np.broadcast_to(seeds[:, None], shape),
        np.broadcast_to(positions[:, None], shape),
        draw,
        draw * ZERO,
    )


def of_the_reference(at: Tuples) -> Words:
    """Return the words of llm_sampling.reference, which takes one draw and one stream per call."""
    seeds, positions, draws, streams = at
    words = np.empty((4, len(seeds)), dtype=np.uint64)
    pairs, which = np.unique(np.stack([draws, streams]), axis=1, return_inverse=True)
    for i, (draw, stream) in enumerate(pairs.T.tolist()):
        rows = which.reshape(-1) == i
        seed, position = (torch.from_numpy(a[rows].view(np.int64)) for a in (seeds, positions))
        got = reference.philox(seed, position, draw, stream)
        words[:, rows] = np.stack([word.numpy() for word in got]).astype(np.uint64)
    return words


def of_c(at: Tuples, folder: Path) -> Words:
    """Return words 0 and 1 of csrc/semantics.h, which all C++ kernels use to draw."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = folder / "words.cpp", folder / "words"
    source.write_text(
        f'#include "{ROOT / "csrc/semantics.h"}"\n'
        "#include <stdio.h>\n"
        "int main() {\n"
        "  uint64_t at[4];\n"
        "  while (fread(at, 8, 4, stdin) == 4) {\n"
        "    const uint64_t random = llm_sampling::random_bits(\n"
        "        at[0], at[1], static_cast<uint32_t>(at[2]), static_cast<uint32_t>(at[3]));\n"
        "    fwrite(&random, 8, 1, stdout);\n"
        "  }\n"
        "}\n"
    )
    subprocess.run([compiler, "-std=c++17", "-O1", "-o", program, source], check=True)
    done = subprocess.run(
        [program], input=np.stack(at, axis=-1).tobytes(), capture_output=True, check=True
    )
    random = np.frombuffer(done.stdout, dtype=np.uint64)
    return np.stack([random & LOW32, random >> HALF])


#: Random123's known answers: (seed, position, draw, stream) and the output words. In the last, all
#: words of key and counter differ from each other.
KNOWN = (
    ((0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (2**64 - 1, 2**64 - 1, 2**32 - 1, 2**32 - 1),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
KNOWN_TUPLES: Any = tuple(np.array([at for at, _ in KNOWN], dtype=np.uint64).T)
KNOWN_WORDS = np.array([words for _, words in KNOWN], dtype=np.uint64).T


def test_known_answers(tmp_path: Path) -> None:
    """All three implementations give Random123's known answers."""
    assert np.array_equal(philox(KNOWN_TUPLES), KNOWN_WORDS)
    assert np.array_equal(of_the_reference(KNOWN_TUPLES), KNOWN_WORDS)
    assert np.array_equal(of_c(KNOWN_TUPLES, tmp_path), KNOWN_WORDS[:2])


def test_for_a_seed_no_two_counters_give_the_same_words() -> None:
    """The generator has an inverse on both sides, so it is one to one."""
    at = random_tuples(200_000)
    assert np.array_equal(undone(at[0], philox(at)), at)
    generator = np.random.default_rng(2)
    words = np.stack([random_words(generator, 32, 200_000) for _ in range(4)])
    assert np.array_equal(philox(undone(at[0], words)), words)


def test_the_reference_can_be_undone() -> None:
    """The reference's words determine seed, position, draw and stream."""
    seeds, positions, _, _ = random_tuples(20_000)
    few = random_tuples(200)  # draws and streams, few because the reference takes one pair per call
    at = (seeds, positions, np.tile(few[2], 100), np.tile(few[3], 100))
    assert np.array_equal(undone(seeds, of_the_reference(at)), at)


def test_c_makes_the_same_words(tmp_path: Path) -> None:
    at = random_tuples(200_000)
    assert np.array_equal(of_c(at, tmp_path), philox(at)[:2])


def test_the_seeds_of_sequences() -> None:
    """Those of docs/semantics.md, and others, are Philox's words for stream 5."""
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    known = re.findall(r"^\| `(\d+)` \| (\d+) \| (\d+) \|$", text, re.M)
    assert len(known) == 2
    for seed, *sequences in known:
        for i, want in enumerate(sequences, 1):
            assert seeded(SamplingParams(seed=int(seed)), i).seed == int(want)
    for seed in (0, 7, 8, 2**32, 2**63, 2**64 - 1):
        for i in (1, 2, 255):
            at = tuple(np.array([value], dtype=np.uint64) for value in (seed, 0, i, 5))
            low, high = (int(words[0]) for words in philox(at)[:2])
            assert seeded(SamplingParams(seed=seed), i).seed == low + (high << 32)
        assert seeded(SamplingParams(seed=seed), 0).seed == seed


MIXED_UP: Mapping[str, Callable[[Words, Words, Words, Words], Tuples]] = {
    "seed and position added": lambda s, p, d, t: (s * ZERO, s + p, d, t),
    "position taken from the seed": lambda s, p, d, t: (s - p, p * ZERO, d, t),
    "the seed's high word": lambda s, p, d, t: (s & LOW32, p, d, t),
    "the position's high word": lambda s, p, d, t: (s, p & LOW32, d, t),
    "the position's words exchanged": lambda s, p, d, t: (s, p >> HALF | p << HALF, d, t),
    "position and draw added": lambda s, p, d, t: (s, p + d, d * ZERO, t),
    "no draw": lambda s, p, d, t: (s, p, d * ZERO, t),
    "no stream": lambda s, p, d, t: (s, p, d, t * ZERO),
    "draw and stream exchanged": lambda s, p, d, t: (s, p, t, d),
}


@pytest.mark.parametrize("mixed_up", MIXED_UP.values(), ids=MIXED_UP.keys())
def test_a_counter_that_is_mixed_up_is_seen(
    mixed_up: Callable[[Words, Words, Words, Words], Tuples],
) -> None:
    """Negative control: the round trip fails if an input is mixed up before the generator."""
    at = random_tuples(1000)
    assert not np.array_equal(undone(at[0], philox(mixed_up(*at))), at)


def test_a_million_neighbours_have_different_bits() -> None:
    """A million neighbouring inputs give different 64-bit numbers.

    The probability that two are equal by chance is 1 in 3 * 10^7.
    """
    near = np.arange(2**20, dtype=np.uint64)
    at = (near & np.uint64(63), near >> np.uint64(6) & np.uint64(127), near >> np.uint64(13))
    words = philox((*at, near * ZERO))
    assert len(np.unique(words[0] | words[1] << HALF)) == len(near)
    words = philox(MIXED_UP["seed and position added"](*at, near * ZERO))
    assert len(np.unique(words[0] | words[1] << HALF)) < len(near)


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_a_token_is_the_highest_of_the_bits(backend: str) -> None:
    """With 2^16 equal tokens the drawn id is the highest 16 random bits.

    So the tokens show which seed, position and draw a backend gives to the generator.
    """
    seeds, positions, _, _ = random_tuples(30, seed=3)
    seeds[0] = positions[0] = 0
    draws = 40
    tokens = sample(
        torch.zeros(1, 2**16).expand(len(seeds), -1),
        [SamplingParams(seed=seed) for seed in seeds.tolist()],
        positions=positions.tolist(),
        num_samples=draws,
        backend=backend,
    ).tokens.numpy()
    at = grid(seeds, positions, draws)
    assert tokens[0, 0] == 0xE169  # the highest bits of the first known answer
    assert np.array_equal(tokens, philox(at)[1] >> np.uint64(16))
    for name, mixed_up in MIXED_UP.items():
        is_same = np.array_equal(tokens, philox(mixed_up(*at))[1] >> np.uint64(16))
        assert is_same == (name == "no stream"), name  # the stream of token draws is 0


# ---- Two statistical tests -----------------------------------------------------------------------

VOCAB_SIZE = 257
COUNT = 2**15  # the number of pairs, or of tokens in a series
CLASSES = 16
LAGS = range(1, 13)
LEAST_P = 1e-6

LOGITS = make_row("normal", VOCAB_SIZE, seed=7)
P = LOGITS.double().softmax(-1).numpy()
#: An estimate of the uniform number that drew each token: the middle of the token's interval.
MIDDLE = np.cumsum(P) - P / 2
CLASS = (MIDDLE * CLASSES).astype(int)

#: A function of seeds and positions ``(rows,)`` and a number of draws: tokens ``(rows, draws)``.
Sampler = Callable[[Words, Words, int], Ints]


@functools.cache
def parameters(rows: int) -> BatchParams:
    return BatchParams.from_list([SamplingParams(seed=0)] * rows)


def kernel(seeds: Words, positions: Words, draws: int) -> Ints:
    batch = replace(
        parameters(len(seeds)),
        seed=torch.from_numpy(seeds.view(np.int64)),
        position=torch.from_numpy(positions.view(np.int64)),
    )
    logits = LOGITS.expand(len(seeds), -1)
    tokens = sample(logits, batch, num_samples=draws, backend="cpu").tokens
    return tokens.numpy().reshape(len(seeds), draws)


def pairs_p_value(first: Ints, second: Ints) -> float:
    """Return the chi-squared p-value of the joint table of two tokens under independence."""
    table = np.zeros((CLASSES, CLASSES))
    np.add.at(table, (CLASS[first], CLASS[second]), 1)
    p = np.bincount(CLASS, P, CLASSES)
    expected = len(first) * np.outer(p, p)
    assert expected.min() >= 5
    return float(stats.chisquare(table.ravel(), expected.ravel()).pvalue)


def serial_p_value(series: Ints) -> float:
    """Return the p-value of a series' autocorrelations, whose squares add to a chi-squared."""
    mean = (P * MIDDLE).sum()
    variance = (P * (MIDDLE - mean) ** 2).sum()
    x = MIDDLE[series] - mean
    r = [(x[:-lag] * x[lag:]).sum() / variance / np.sqrt(len(x) - lag) for lag in LAGS]
    return float(stats.chi2.sf(np.square(r).sum(), len(LAGS)))


UP = np.arange(COUNT, dtype=np.uint64)
EVEN, ODD = UP * np.uint64(2), UP * np.uint64(2) + ONE
ZEROS, ONES = UP * ZERO, UP * ZERO + ONE
FIRST = ZEROS[:1]


def of(seeds: Words, positions: Words) -> Callable[[Sampler], Ints]:
    return lambda sampler: sampler(seeds, positions, 1)[:, 0]


#: Pairs of token series. No combination of seed, position and draw occurs twice in a pair.
PAIRS: Mapping[str, tuple[Callable[[Sampler], Ints], Callable[[Sampler], Ints]]] = {
    "position and the next": (of(ZEROS, EVEN), of(ZEROS, ODD)),
    "seed and the next": (of(EVEN, ZEROS), of(ODD, ZEROS)),
    "seed up, position down": (of(EVEN, ONES), of(ODD, ZEROS)),
    "seed up, position up": (of(EVEN, ZEROS), of(ODD, ONES)),
    "seed and position exchanged": (of(EVEN, ODD), of(ODD, EVEN)),
    "seed + 2^32": (of(UP, ZEROS), of(UP + np.uint64(2**32), ZEROS)),
    "seed + 2^63": (of(UP, ZEROS), of(UP + np.uint64(2**63), ZEROS)),
    "position + 2^32": (of(ZEROS, UP), of(ZEROS, UP + np.uint64(2**32))),
    "position + 2^63": (of(ZEROS, UP), of(ZEROS, UP + np.uint64(2**63))),
    "draw and the next, of many seeds": (
        lambda sampler: sampler(UP, ZEROS, 2)[:, 0],
        lambda sampler: sampler(UP, ZEROS, 2)[:, 1],
    ),
    "draw and the next, of a row": (
        lambda sampler: sampler(FIRST, FIRST, 2 * COUNT)[0, 0::2],
        lambda sampler: sampler(FIRST, FIRST, 2 * COUNT)[0, 1::2],
    ),
    "draw up, position down": (
        lambda sampler: sampler(ZEROS, EVEN, 2)[:, 1],
        lambda sampler: sampler(ZEROS, ODD, 2)[:, 0],
    ),
}

SERIES: Mapping[str, Callable[[Sampler], Ints]] = {
    "positions": of(ZEROS + np.uint64(9), UP),
    "seeds": of(UP, ZEROS),
    "seeds and positions up": of(UP, UP),
    "seeds up, positions down": of(UP, UP[::-1].copy()),
    "seeds, steps of 2^32": of(UP << HALF, ZEROS),
    "positions, steps of 2^32": of(ZEROS + np.uint64(3), UP << HALF),
    "draws": lambda sampler: sampler(FIRST + np.uint64(5), FIRST, COUNT)[0],
    "draws, row by row": lambda sampler: sampler(UP[: COUNT // 8], ZEROS[: COUNT // 8], 8).ravel(),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_are_independent(pair: tuple[Callable[[Sampler], Ints], ...]) -> None:
    first, second = pair
    assert pairs_p_value(first(kernel), second(kernel)) >= LEAST_P


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES.keys())
def test_series_are_independent(series: Callable[[Sampler], Ints]) -> None:
    """Both tests accept each series: neighbours as pairs, and autocorrelation at all lags."""
    tokens = series(kernel)
    assert pairs_p_value(tokens[0::2], tokens[1::2]) >= LEAST_P
    assert serial_p_value(tokens) >= LEAST_P


# ---- Negative controls ---------------------------------------------------------------------------


def tokens_of(uniform: Floats) -> Ints:
    return np.minimum(np.searchsorted(np.cumsum(P), uniform, side="right"), VOCAB_SIZE - 1)


def mixed(name: str | None = None, rounds: int = 10) -> Sampler:
    """Return a sampler whose generator has mixed-up inputs or fewer rounds."""

    def sampler(seeds: Words, positions: Words, draws: int) -> Ints:
        at = grid(seeds, positions, draws)
        words = philox(at if name is None else MIXED_UP[name](*at), rounds)
        return tokens_of((words[0] / 2**32 + words[1]) / 2**32)

    return sampler


def lcg(multiplier: int, bits: slice) -> Sampler:
    """Return a sampler whose uniform number is some bits of a linear congruential generator.

    Its modulus is 2^32. It starts from the seed and advances by position + draw steps.
    """

    def sampler(seeds: Words, positions: Words, draws: int) -> Ints:
        seed, position, draw, _ = grid(seeds, positions, draws)
        steps = (position + draw).astype(np.int64)
        a = np.full(int(steps.max()) + 1, multiplier, dtype=np.uint64)
        a[0] = 1
        a = np.multiply.accumulate(a)  # powers of the multiplier; c has their sums, modulo 2^64
        c = np.concatenate([[np.uint64(0)], np.add.accumulate(a)[:-1]])
        state = a[steps] * (seed + np.uint64(12345)) + c[steps] * np.uint64(12345) & LOW32
        width = bits.stop - bits.start
        part = state >> np.uint64(bits.start) & np.uint64(2**width - 1)
        return tokens_of(part / 2**width)

    return sampler


def copying(lag: int, share: int) -> Sampler:
    """Return a sampler that replaces one token in ``share`` by the token ``lag`` places before."""

    def sampler(seeds: Words, positions: Words, draws: int) -> Ints:
        tokens = kernel(seeds, positions, draws)
        series = tokens.ravel().copy()
        series[lag::share] = tokens.ravel()[:-lag:share]
        return series.reshape(tokens.shape)

    return sampler


#: Broken samplers, each with the pairs and series at which it must be rejected.
BROKEN: Mapping[str, tuple[Sampler, tuple[str, ...]]] = {
    "seed and position added": (
        mixed("seed and position added"),
        ("seed up, position down", "seed and position exchanged", "seeds up, positions down"),
    ),
    "position taken from the seed": (
        mixed("position taken from the seed"),
        ("seed up, position up", "seeds and positions up"),
    ),
    "the seed's high word": (
        mixed("the seed's high word"),
        ("seed + 2^32", "seed + 2^63", "seeds, steps of 2^32"),
    ),
    "the position's high word": (
        mixed("the position's high word"),
        ("position + 2^32", "position + 2^63", "positions, steps of 2^32"),
    ),
    "no draw": (
        mixed("no draw"),
        (
            "draw and the next, of many seeds",
            "draw and the next, of a row",
            "draws",
            "draws, row by row",
        ),
    ),
    "position and draw added": (mixed("position and draw added"), ("draw up, position down",)),
    "the low bits of a congruential generator": (
        lcg(1103515245, slice(0, 8)),
        ("position and the next", "seed and the next", "positions", "seeds", "draws"),
    ),
    "all bits of another, of neighbouring seeds": (
        lcg(1664525, slice(0, 32)),
        ("seed and the next", "draw up, position down", "seeds", "draws, row by row"),
    ),
    "3 rounds of 10": (
        mixed(rounds=3),
        ("seed and the next", "draw and the next, of many seeds", "seeds", "draws"),
    ),
    "4 rounds of 10": (mixed(rounds=4), ("position and the next", "positions")),
    "5 rounds of 10": (mixed(rounds=5), ("position + 2^32", "positions, steps of 2^32")),
    "one in twenty is the one before": (copying(1, 20), ("positions", "seeds", "draws")),
}


@pytest.mark.parametrize(
    ("broken", "where"),
    [(broken, where) for broken, (_, names) in BROKEN.items() for where in names],
)
def test_dependent_draws_are_refused(broken: str, where: str) -> None:
    """Negative control: the pairs test rejects a pair, and both tests reject a series."""
    sampler, _ = BROKEN[broken]
    if where in PAIRS:
        first, second = PAIRS[where]
        assert pairs_p_value(first(sampler), second(sampler)) < LEAST_P
    else:
        tokens = SERIES[where](sampler)
        assert pairs_p_value(tokens[0::2], tokens[1::2]) < LEAST_P
        assert serial_p_value(tokens) < LEAST_P


def test_every_pair_and_every_series_refuses_a_sampler() -> None:
    assert {name for _, names in BROKEN.values() for name in names} == PAIRS.keys() | SERIES.keys()


@pytest.mark.parametrize("lag", [2, 5, 12])
def test_dependence_at_a_distance_is_refused(lag: int) -> None:
    """The serial test rejects a dependence at a lag above 1, which the pairs test cannot see."""
    tokens = SERIES["positions"](copying(lag, 15))
    assert serial_p_value(tokens) < LEAST_P
    assert pairs_p_value(tokens[0::2], tokens[1::2]) >= LEAST_P


def test_what_is_broken_is_the_sampler() -> None:
    """The sampler that the negative controls change draws the kernel's tokens when unchanged."""
    for draws in (1, 3):
        assert np.array_equal(
            mixed()(UP, UP[::-1].copy(), draws), kernel(UP, UP[::-1].copy(), draws)
        )


def test_the_tests_accept_independent_draws() -> None:
    """Both tests accept numpy's draws, and their p-values are uniform."""
    generator = np.random.default_rng(8)
    series = [tokens_of(generator.random(COUNT)) for _ in range(200)]
    pairs = [pairs_p_value(tokens[0::2], tokens[1::2]) for tokens in series]
    serial = [serial_p_value(tokens) for tokens in series]
    for values in (pairs, serial):
        assert min(values) >= LEAST_P
        assert stats.kstest(values, "uniform").pvalue >= 1e-3
