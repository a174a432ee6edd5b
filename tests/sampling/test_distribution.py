"""Is the draw unbiased under every filter, and would the test notice if it were not?

A chi-squared test compares counts with probabilities that are computed here in float64, from
docs/semantics.md and without the package: for every filter, every pair of filters, and all filters
at once. Filters cut far from any token's boundary, so that rounding cannot move a cut. As negative
controls, the same test must reject a slightly wrong version of every filter of every case, and
steps in the wrong order. The torch reference is left out because it is slow; test_parity.py shows
that it draws the same tokens. test_tail.py tests rare tokens, test_independence.py dependence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import INTERPRETED, OTHER_BACKENDS, device_of, make_row
from scipy import stats

from llm_sampling import SamplingParams, TokenHistory, reference, sample
from llm_sampling.fields import FIELDS
from llm_sampling.generation import models

VOCAB_SIZE = 1000
DRAWS = 1_000_000
ROWS = 50  # the draws are spread over this many positions
LEAST_P = 1e-6

# Without interpreted Triton kernels, for which a million draws take hours.
kernels = pytest.mark.parametrize(
    "backend", [name for name in OTHER_BACKENDS if name not in INTERPRETED], indirect=True
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
#: The options of a call: fields of SamplingParams, and "allowed_mask".
Asked = Mapping[str, Any]
Step = Callable[[Floats, Asked], Floats]

# ---- Inputs of the filters -----------------------------------------------------------------------

PROMPT = range(0, VOCAB_SIZE, 3)
OUTPUT = [token for token in range(0, VOCAB_SIZE, 4) for _ in range(1 + token % 3)]
COUNTS = np.bincount(OUTPUT, minlength=VOCAB_SIZE)
IN_PROMPT = np.isin(np.arange(VOCAB_SIZE), PROMPT)
IN_OUTPUT = COUNTS > 0
BIAS = {token: (token // 10 % 7 - 3) / 2 for token in range(5, VOCAB_SIZE, 10)}
ALLOWED = np.arange(VOCAB_SIZE) % 9 != 0  # excludes the two best tokens of the row "normal"


def row(name: str, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return make_row(name, vocab_size, seed=7)


def draw(backend: str, logits: torch.Tensor, asked: Asked, seed: int) -> Ints:
    """Draw from the row ``logits`` at all positions; return how often each token came."""
    device = device_of(backend) if backend != "auto" else "cpu"
    fields = {name: value for name, value in asked.items() if name != "allowed_mask"}
    params = SamplingParams(seed=seed, **fields)
    history = mask = None
    if params.needs_history:
        history = TokenHistory.from_ids(
            [list(PROMPT)] * ROWS, [OUTPUT] * ROWS, VOCAB_SIZE, device=device
        )
    if "allowed_mask" in asked:
        bits = np.packbits(np.pad(asked["allowed_mask"], (0, -len(logits) % 32)), bitorder="little")
        mask = torch.from_numpy(bits.view("<i4").astype(np.int32)).expand(ROWS, -1).to(device)
    tokens = sample(
        logits.expand(ROWS, -1).to(device),
        params,
        history=history,
        allowed_mask=mask,
        positions=range(ROWS),
        num_samples=DRAWS // ROWS,
        backend=backend,
    ).tokens
    counts = torch.bincount(tokens.flatten(), minlength=len(logits)).cpu().numpy()
    assert counts.sum() == DRAWS
    return counts.astype(np.int64)


# ---- The probabilities by definition, in float64 -------------------------------------------------


def softmax(x: Floats) -> Floats:
    p = np.exp(x - x.max())
    return p / p.sum()


def keep_first(x: Floats, number: int) -> Floats:
    """Keep the first ``number`` tokens of the order and set the others to -inf.

    The logits on both sides of the cut must differ clearly.
    """
    order = np.argsort(-x, kind="stable")
    if number < np.isfinite(x).sum():
        assert x[order[number - 1]] - x[order[number]] > 1e-5, "rounding may move this cut"
    kept = np.full(len(x), -np.inf)
    kept[order[:number]] = x[order[:number]]
    return kept


def at_least(number: int, asked: Asked) -> int:
    return max(number, asked.get("min_tokens_to_keep", 1))


def add_bias(x: Floats, asked: Asked, factor: float = 1.0) -> Floats:
    x = x.copy()
    for token, bias in asked["logit_bias"].items():
        x[token] += factor * bias
    return x


def allow(x: Floats, asked: Asked) -> Floats:
    return np.where(asked["allowed_mask"], x, -np.inf)


def penalise(x: Floats, asked: Asked, where: npt.NDArray[np.bool_]) -> Floats:
    r = asked["repetition_penalty"]
    return np.where(where, np.where(x > 0, x / r, x * r), x)


def number_of_top_p(x: Floats, asked: Asked) -> int:
    reached = np.cumsum(np.sort(softmax(x))[::-1])
    assert np.abs(reached - asked["top_p"]).min() > 1e-5, "rounding may move this cut"
    return int(np.searchsorted(reached, asked["top_p"])) + 1


def number_of_min_p(x: Floats, min_p: float) -> int:
    return int((x >= x.max() + np.log(min_p)).sum())


#: The steps in the order in which they apply. min_tokens_to_keep is a part of the last three.
STEPS: Mapping[str, Step] = {
    "logit_bias": add_bias,
    "allowed_mask": allow,
    "repetition_penalty": lambda x, asked: penalise(x, asked, IN_PROMPT | IN_OUTPUT),
    "frequency_penalty": lambda x, asked: x - asked["frequency_penalty"] * COUNTS,
    "presence_penalty": lambda x, asked: x - asked["presence_penalty"] * IN_OUTPUT,
    "temperature": lambda x, asked: x / asked["temperature"],
    "top_k": lambda x, asked: keep_first(x, at_least(asked["top_k"], asked)),
    "top_p": lambda x, asked: keep_first(x, at_least(number_of_top_p(x, asked), asked)),
    "min_p": lambda x, asked: keep_first(x, at_least(number_of_min_p(x, asked["min_p"]), asked)),
}

#: Negative controls: the same steps, each slightly wrong in the way that its comment says.
OFF: Mapping[str, Step] = {
    # the bias is 5 % too large
    "logit_bias": lambda x, asked: add_bias(x, asked, 1.05),
    # the sign bit of each mask word is lost
    "allowed_mask": lambda x, asked: np.where(
        np.arange(len(x)) % 32 == 31, -np.inf, allow(x, asked)
    ),
    # applied twice to tokens that occur in both the prompt and the output
    "repetition_penalty": lambda x, asked: penalise(
        penalise(x, asked, IN_PROMPT), asked, IN_OUTPUT
    ),
    # subtracted once, however often the token occurs
    "frequency_penalty": lambda x, asked: x - asked["frequency_penalty"] * IN_OUTPUT,
    # subtracted from tokens of the prompt too
    "presence_penalty": lambda x, asked: x - asked["presence_penalty"] * (IN_OUTPUT | IN_PROMPT),
    # the temperature is 2 % too high
    "temperature": lambda x, asked: x / (1.02 * asked["temperature"]),
    # one token too many is kept
    "top_k": lambda x, asked: keep_first(x, at_least(asked["top_k"], asked) + 1),
    # the token that crosses the target is dropped
    "top_p": lambda x, asked: keep_first(x, at_least(number_of_top_p(x, asked) - 1, asked)),
    # min_p is a tenth too low
    "min_p": lambda x, asked: keep_first(
        x, at_least(number_of_min_p(x, 0.9 * asked["min_p"]), asked)
    ),
}


def oracle(
    logits: torch.Tensor,
    asked: Asked,
    order: Iterable[str] = STEPS,
    changed: Mapping[str, Step] | None = None,
) -> Floats:
    """Return the distribution by definition, or with the steps in another order or changed."""
    steps = {**STEPS, **(changed or {})}
    x = logits.double().numpy()
    for name in order:
        if name in asked:
            x = steps[name](x, asked)
    return softmax(x)


def slightly_off(logits: torch.Tensor, asked: Asked, name: str) -> Floats:
    """Return the distribution that would be drawn if the filter ``name`` were slightly wrong."""
    if name != "min_tokens_to_keep":
        return oracle(logits, asked, changed={name: OFF[name]})
    number = asked[name]
    if CUTS & set(asked):
        return oracle(logits, {**asked, name: number - 1})
    return oracle(logits, {**asked, "top_k": number})  # as if it were a filter itself


# ---- The test ------------------------------------------------------------------------------------


def p_value(counts: Ints, p: Floats) -> float:
    """Return the chi-squared p-value, or 0 if a token of probability 0 was drawn.

    Tokens that are expected less than 5 times share a bin.
    """
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    rare = expected < 5
    observed = counts[~rare].astype(float)
    expected_bins = expected[~rare]
    if expected[rare].sum() >= 5:
        observed = np.append(observed, counts[rare].sum())
        expected_bins = np.append(expected_bins, expected[rare].sum())
    else:  # the rare tokens are expected too seldom for a bin of their own
        smallest = expected_bins.argmin()
        observed[smallest] += counts[rare].sum()
        expected_bins[smallest] += expected[rare].sum()
    assert len(observed) > 1
    value = float(stats.chisquare(observed, expected_bins).pvalue)
    assert not np.isnan(value)
    return value


def drawn_from(p: Floats) -> Ints:
    """Return the counts of ``DRAWS`` draws that numpy makes."""
    return np.random.default_rng(5).multinomial(DRAWS, p)


#: The value of every filter, alone and in pairs.
FILTERS: Asked = {
    "temperature": 0.7,
    "top_k": 80,
    "top_p": 0.5,
    "min_p": 0.1,
    "min_tokens_to_keep": 200,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.5,
    "logit_bias": BIAS,
    "allowed_mask": ALLOWED,
}
#: Values that keep more tokens, so that the other filter of a pair decides.
MILD: Asked = {"top_k": 400, "top_p": 0.999, "min_p": 0.02}
#: Values that keep more tokens than min_tokens_to_keep, but none that is too rare to be tested.
WIDE: Asked = {**MILD, "top_p": 0.9}
CUTS = set(MILD)

#: By name: the options, and the filters that decide the result, whose faults the case must detect.
CASES: dict[str, tuple[Asked, tuple[str, ...]]] = {"plain": ({}, ())}
CASES |= {name: ({name: value}, (name,)) for name, value in FILTERS.items()}
for a, b in itertools.combinations(FILTERS, 2):
    both = {a: FILTERS[a], b: FILTERS[b]}
    if a in CUTS and b == "min_tokens_to_keep":
        CASES[f"{a}, {b}"] = (both, (b,))
        CASES[f"wide {a}, {b}"] = ({**both, a: WIDE[a]}, (a,))
    elif {a, b} <= CUTS:  # the filter that keeps fewer tokens decides
        CASES[f"{a}, mild {b}"] = ({**both, b: MILD[b]}, (a,))
        CASES[f"mild {a}, {b}"] = ({**both, a: MILD[a]}, (b,))
    else:
        CASES[f"{a}, {b}"] = (both, (a, b))
CASES["high temperature"] = ({"temperature": 1.7}, ())
CASES["every cut"] = ({"top_k": 200, "top_p": 0.93, "min_p": 0.004}, ("top_p",))
CASES["negative penalties"] = (
    {"repetition_penalty": 0.8, "frequency_penalty": -0.4, "presence_penalty": -0.3, "top_p": 0.8},
    ("repetition_penalty", "frequency_penalty", "presence_penalty", "top_p"),
)
CASES["all"] = (
    {**FILTERS, "temperature": 1.3, "top_k": 400, "top_p": 0.85, "min_tokens_to_keep": 2},
    tuple(name for name in FILTERS if name not in CUTS | {"min_tokens_to_keep"}),
)
#: The cases that keep more than a few tokens even of a row with large logits.
PEAKED = (
    "plain",
    "top_k, mild top_p",
    "top_k, mild min_p",
    "negative penalties",
    *(name for name in FILTERS if name not in CUTS),
)


def test_every_filter_and_every_pair_is_there() -> None:
    """Each filter decides a case alone and a case together with each other filter.

    A scope decides nothing alone. Rules that look at the history lower logits, as penalties do, but
    not for every backend.
    """
    others = {f.name for f in FIELDS.values() if f.kind in ("scope", "rule", "sequences")}
    fields = set(SamplingParams.__dataclass_fields__) - {"seed", *others}
    assert set(FILTERS) == fields | {"allowed_mask"}
    for names in [{a} for a in FILTERS] + [{a, b} for a in FILTERS for b in FILTERS if a != b]:
        decided = {name for asked, by in CASES.values() if set(asked) == names for name in by}
        assert decided == names


@kernels
@pytest.mark.parametrize(
    ("name", "case"),
    [("normal", case) for case in CASES] + [("normal x3", case) for case in PEAKED],
)
def test_frequencies_are_the_softmax(backend: str, name: str, case: str) -> None:
    asked, _ = CASES[case]
    counts = draw(backend, row(name), asked, seed=11)
    assert p_value(counts, oracle(row(name), asked)) >= LEAST_P


@pytest.mark.parametrize(
    ("case", "off"), [(case, name) for case, (_, names) in CASES.items() for name in names]
)
def test_a_filter_that_is_slightly_off_is_refused(case: str, off: str) -> None:
    """Negative control: every filter of every case, wrong in the way that OFF describes."""
    asked, _ = CASES[case]
    counts = drawn_from(slightly_off(row("normal"), asked, off))
    assert p_value(counts, oracle(row("normal"), asked)) < LEAST_P


#: The pairs of steps whose order does not matter. The order of every other pair does.
EITHER_WAY = {
    ("logit_bias", "allowed_mask"),
    ("logit_bias", "frequency_penalty"),
    ("logit_bias", "presence_penalty"),
    ("allowed_mask", "repetition_penalty"),
    ("allowed_mask", "frequency_penalty"),
    ("allowed_mask", "presence_penalty"),
    ("allowed_mask", "temperature"),
    ("repetition_penalty", "temperature"),
    ("frequency_penalty", "presence_penalty"),
    ("temperature", "top_k"),
    ("top_k", "min_p"),
}


@pytest.mark.parametrize("pair", [*itertools.combinations(STEPS, 2)], ids=" after ".join)
def test_two_steps_in_the_wrong_order_are_refused(pair: tuple[str, str]) -> None:
    """Negative control: exchanging two steps is detected in at least one case of the pair."""
    logits = row("normal")
    order = [dict(zip(pair, reversed(pair), strict=True)).get(name, name) for name in STEPS]
    values = []
    for asked in (asked for asked, _ in CASES.values() if set(asked) == set(pair)):
        expected, swapped = oracle(logits, asked), oracle(logits, asked, order)
        if pair in EITHER_WAY:
            np.testing.assert_allclose(swapped, expected, rtol=1e-12)
        values.append(p_value(drawn_from(swapped), expected))
    assert (min(values) < LEAST_P) != (pair in EITHER_WAY)


@kernels
def test_a_large_row_in_tiles(backend: str) -> None:
    """With V = 4,096 a kernel draws by the masses of tiles, not from a list of candidates."""
    logits = row("normal", 4096)
    counts = draw(backend, logits, {}, seed=21)
    assert p_value(counts, oracle(logits, {})) >= LEAST_P


def biased(p: Floats) -> Floats:
    """Broken: even ids are drawn 5 % too often."""
    p = p * np.where(np.arange(len(p)) % 2 == 0, 1.05, 1.0)
    return p / p.sum()


BROKEN: Mapping[str, Asked | None] = {
    "temperature x 0.95": {"temperature": 0.95},
    "a silent top_p 0.95": {"top_p": 0.95},
    "even ids + 5 %": None,
}


@pytest.mark.parametrize("asked", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("vocab_size", [1000, 4096])
def test_broken_samplers_are_refused(vocab_size: int, asked: Asked | None) -> None:
    """Negative controls: distributions that are close to a plain draw at temperature 1."""
    logits = row("normal", vocab_size)
    expected = oracle(logits, {})
    counts = drawn_from(biased(expected)) if asked is None else draw("auto", logits, asked, seed=31)
    assert p_value(counts, expected) < LEAST_P


def test_the_test_accepts_an_exact_sampler() -> None:
    """The test accepts numpy's draws, and its p-values are uniform."""
    expected = oracle(row("normal"), {})
    generator = np.random.default_rng(6)
    values = [p_value(generator.multinomial(DRAWS, expected), expected) for _ in range(200)]
    assert min(values) >= LEAST_P
    assert stats.kstest(values, "uniform").pvalue >= 1e-3


# ---- The integer masses --------------------------------------------------------------------------


def total_variation(logits: torch.Tensor, temperature: float = 1.0) -> float:
    """Return the largest distance, over rows, of the integer masses from the float64 softmax."""
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
    """Negative control: a temperature that is wrong by a part in 10^5."""
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
