"""Does every backend equal the reference, to the bit?

Tokens, status and the bits of the filtered logits have no tolerance; logprobs have one of 1e-5.
A failure prints how to build the rows that differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    EVERY_BACKEND,
    HISTORY_NAMES,
    LARGE_VOCABS,
    LAYOUTS,
    MASK_NAMES,
    OCTAVE_TEMPERATURE,
    OTHER_BACKENDS,
    ROW_NAMES,
    SMALL_VOCABS,
    Batch,
    Case,
    build,
    covering_cases,
    device_of,
    every_case,
    filter_mixes,
    make_mask,
    make_row,
    penalty_mixes,
    threads,
)
from parity import (
    LOGPROB_TOLERANCE,
    Result,
    assert_more_than_there_are,
    assert_parity,
    assert_same,
    build_all,
    run,
)
from torch import Tensor

from llm_sampling import (
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    reference,
    sample,
)

every_backend = pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
other_backends = pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
small_vocabs = pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
all_vocabs = pytest.mark.parametrize("vocab_size", SMALL_VOCABS + LARGE_VOCABS, ids="V{}".format)


@functools.lru_cache(maxsize=1)
def every_batch(vocab_size: int, device: str) -> list[Batch]:
    """Return batches of every row with every mix, which are built once for all dtypes."""
    groups = every_case(vocab_size, histories_each=2)
    return list(build_all(groups, vocab_size, torch.float32, device))


@other_backends
@dtypes
@small_vocabs
def test_every_case(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Every row with every mix, also masked; mixes with penalties with two of eight histories."""
    batches = every_batch(vocab_size, device_of(backend))
    assert_parity((replace(b, dtype=dtype, logits=b.logits.to(dtype)) for b in batches), backend)


@other_backends
@dtypes
@all_vocabs
def test_covering_cases(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Every row, mix, history and mask at least once.

    At the largest sizes each dtype has a third of the cases.
    """
    turn = DTYPES.index(dtype)
    if vocab_size > 100_000:
        groups = [group[turn :: len(DTYPES)] for group in covering_cases(vocab_size, vocab_size)]
    else:
        groups = covering_cases(vocab_size, vocab_size + turn)
    assert_parity(build_all(groups, vocab_size, dtype, device_of(backend)), backend)


@pytest.mark.parametrize("vocab_size", [7, 262144], ids="V{}".format)
def test_covering_cases_cover(vocab_size: int) -> None:
    """The covering cases contain every row, mix, history and mask, each with its own seed."""
    cases = [case for group in covering_cases(vocab_size, seed=3) for case in group]
    assert {case.row for case in cases} == set(ROW_NAMES)
    mixes = filter_mixes(vocab_size).keys() | penalty_mixes(vocab_size).keys()
    assert {case.mix for case in cases} == mixes
    assert {case.history for case in cases} == set(HISTORY_NAMES)
    assert {case.mask for case in cases} == set(MASK_NAMES)
    assert len({case.seed for case in cases}) == len(cases)


@pytest.mark.slow
@other_backends
@dtypes
@all_vocabs
def test_every_case_and_every_history(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """The full product of rows, mixes, histories and masks; it takes minutes to an hour."""
    groups = every_case(vocab_size)
    assert_parity(build_all(groups, vocab_size, dtype, device_of(backend)), backend)


@other_backends
@dtypes
@all_vocabs
def test_raw_logprobs(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Both kinds of logprobs agree with the reference, and the tokens do not depend on the kind."""
    seed = vocab_size * 5 + DTYPES.index(dtype)
    rows = 0 if vocab_size <= 1000 else 4
    groups = covering_cases(vocab_size, seed, rows)
    batches = build_all(groups, vocab_size, dtype, device_of(backend))
    assert_parity(batches, backend, ("processed", "raw"))


@functools.lru_cache(maxsize=1)
def layout_batches(vocab_size: int, dtype: torch.dtype, device: str) -> list[tuple[Batch, Result]]:
    """Return batches with the reference's answers, which no layout may change."""
    seed = vocab_size * 7 + DTYPES.index(dtype)
    rows = 0 if vocab_size <= 1000 else 4
    groups = covering_cases(vocab_size, seed, rows)
    batches = [build(group, vocab_size, dtype, device) for group in groups]
    return [(batch, run(batch, "torch", ())) for batch in batches]


@other_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
@all_vocabs
def test_layouts(backend: str, dtype: torch.dtype, vocab_size: int, layout: str) -> None:
    """Row strides, misaligned rows and slices; the memory between the rows holds NaN and +inf."""
    for contiguous, expected in layout_batches(vocab_size, dtype, device_of(backend)):
        batch = replace(contiguous, logits=LAYOUTS[layout](contiguous.logits))
        assert_same(batch, backend, expected, run(batch, backend, ()), layout)


@other_backends
@dtypes
@all_vocabs
def test_expanded_rows(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """One row of logits and one mask row, both with stride 0, for many rows of parameters."""
    seed = vocab_size * 11 + DTYPES.index(dtype)
    mixes = tuple(filter_mixes(vocab_size))
    step = 1 if vocab_size <= 1000 else 8
    row = ROW_NAMES[seed % len(ROW_NAMES)]
    cases = [Case(row, mix, mask="half", seed=seed + i) for i, mix in enumerate(mixes[::step])]
    batch = build(cases, vocab_size, dtype, device_of(backend))
    assert batch.allowed_mask is not None
    batch.logits = batch.logits[:1].expand(len(cases), -1)
    batch.allowed_mask = batch.allowed_mask[:1].expand(len(cases), -1)
    assert batch.logits.stride() == (0, 1)
    actual = run(batch, backend, ())
    assert_same(batch, backend, run(batch, "torch", ()), actual, "expanded from the first row")


def _sliced_words(mask: Tensor) -> Tensor:
    buffer = torch.zeros(mask.shape[0], mask.shape[1] + 5, dtype=torch.int32, device=mask.device)
    buffer[:, 3:-2] = mask
    return buffer[:, 3:-2]


@other_backends
@pytest.mark.parametrize(
    "layout",
    [_sliced_words, lambda mask: mask.t().contiguous().t()],
    ids=["sliced words", "transposed"],
)
@pytest.mark.parametrize("vocab_size", [31, 513, 32000], ids="V{}".format)
def test_mask_layouts(backend: str, vocab_size: int, layout: Callable[[Tensor], Tensor]) -> None:
    """Masks with a row stride or transposed; the words between the rows are 0."""
    cases = covering_cases(vocab_size, seed=vocab_size)[2]
    batch = build(cases, vocab_size, torch.float32, device_of(backend))
    assert batch.allowed_mask is not None
    batch.allowed_mask = layout(batch.allowed_mask)
    assert_same(batch, backend, run(batch, "torch", ()), run(batch, backend, ()))


@other_backends
def test_more_than_there_are(backend: str) -> None:
    assert_more_than_there_are(backend, device_of(backend))


@other_backends
@pytest.mark.parametrize("vocab_size", [33, 513], ids="V{}".format)
def test_counts_past_24_bits(backend: str, vocab_size: int) -> None:
    """A count above 2^24 is rounded to float32 once, before it is multiplied."""
    counts = (2**24 - 1, 2**24 + 1, 2**24 + 3, 2**25 + 2, 2**31 - 1, 2**30 + 33)
    cases = [Case("normal", "frequency up", history="short", seed=s) for s in range(len(counts))]
    batch = build(cases, vocab_size, torch.float32, device_of(backend))
    history = batch.history
    assert history is not None
    for slot, count in zip(history.slots.tolist(), counts, strict=True):
        # every short history holds token 0; a negative penalty times its count raises its logit
        history.counts[slot, 0] = count
    batch.params = [
        SamplingParams(frequency_penalty=f, top_k=3, seed=s)
        for s, f in enumerate((-1e-7, -2.3e-7, 1.1e-7, -0.7e-7, -0.01, 0.3))
    ]
    assert_same(batch, backend, run(batch, "torch", ()), run(batch, backend, ()), f"{counts}")


# Random rows rarely lie next to a boundary; the following rows do, to one unit of mass. They detect
# a target that is not rounded up, a draw that uses < for <=, and a wrong last bit of a mass.


def two_tokens(vocab_size: int, depths: Sequence[float]) -> Tensor:
    """Return rows in which only the first and the last token are not -inf.

    At OCTAVE_TEMPERATURE the last token has the given depth in octaves.
    """
    logits = torch.full((len(depths), vocab_size), -torch.inf)
    logits[:, -1] = -torch.tensor(depths)
    logits[:, 0] = 0.0
    return logits


#: (k, depth of the second token, how many tokens top_p = 1 - k / 2^24 keeps), found by a search.
TARGETS = (
    (8, "0x1.36a3fcp+4", 2),
    (32, "0x1.26a3fap+4", 2),
    (38, "0x1.23ebf6p+4", 2),
    (56, "0x1.1d47f6p+4", 2),
    (4, "0x1.3ad960p+4", 1),
    (15, "0x1.30bb9ap+4", 1),
    (114, "0x1.0fa456p+4", 1),
    (240, "0x1.ffffd2p+3", 1),
)


@every_backend
@pytest.mark.parametrize("vocab_size", [2, 513, 32000], ids="V{}".format)
def test_the_target_of_top_p_is_a_ceiling(backend: str, vocab_size: int) -> None:
    """A target just above the first token's mass is rounded up, so a second token is kept."""
    depths = [float.fromhex(d) for _, d, _ in TARGETS]
    params = [
        SamplingParams(temperature=OCTAVE_TEMPERATURE, top_p=1 - k / 2**24) for k, _, _ in TARGETS
    ]
    for d, p, (k, _, kept) in zip(depths, params, TARGETS, strict=True):
        product = (2**42 + int(reference.mass(torch.tensor(d)))) * (int(p.top_p * 2**31) - 2**11)
        assert 2**73 - 2**31 < product < 2**73 + 2**31, "not next to the boundary"
        assert (product > 2**73) == (kept == 2), k
    logits = two_tokens(vocab_size, depths).to(device_of(backend))
    filtered = filter_logits(logits, params, backend=backend)
    kept = (filtered > -torch.inf).sum(-1).tolist()
    assert kept == [kept for _, _, kept in TARGETS]


#: (seed, depth of the second token, token drawn at position 0), found among 24 million seeds.
DRAWS = (
    (151054, "0x1.559cfcp+4", 1),
    (1279858, "0x1.535e5ep+4", 1),
    (2711413, "0x1.6b238cp+4", 1),
    (4224406, "0x1.47c5aep+4", 1),
    (23466003, "0x1.75a136p+4", 1),
    (2711413, "0x1.6b238ep+4", 0),
    (4554457, "0x1.50d492p+4", 0),
    (5901791, "0x1.48f4a0p+4", 0),
    (18008401, "0x1.66894cp+4", 0),
    (23466003, "0x1.75a13ap+4", 0),
)


@every_backend
@pytest.mark.parametrize("vocab_size", [2, 513, 32000], ids="V{}".format)
def test_a_draw_on_the_boundary_is_the_next_token(backend: str, vocab_size: int) -> None:
    """If r equals the first token's mass the second token is drawn; one less draws the first."""
    depths = [float.fromhex(d) for _, d, _ in DRAWS]
    for d, (seed, _, token) in zip(depths, DRAWS, strict=True):
        words = reference.philox(torch.tensor([seed]), torch.tensor([0]), draw=0)
        random = int(words[0]) | int(words[1]) << 32
        r = (random * (2**42 + int(reference.mass(torch.tensor(d))))) >> 64
        assert r == 2**42 - 1 + token, "not next to the boundary"
    logits = two_tokens(vocab_size, depths).to(device_of(backend))
    params = [SamplingParams(temperature=OCTAVE_TEMPERATURE, seed=seed) for seed, _, _ in DRAWS]
    tokens = sample(logits, params, backend=backend).tokens.tolist()
    assert tokens == [token * (vocab_size - 1) for _, _, token in DRAWS]


@every_backend
@pytest.mark.parametrize("octave", range(10))
def test_masses_to_the_bit(backend: str, octave: int) -> None:
    """Masses in one octave are right, as two neighbouring values of top_p show.

    A row has one best token and 2^octave equal tokens, whose masses add up to about that of the
    best. Of two neighbouring float32 values of top_p, the smaller keeps one token and the larger
    keeps two. That determines the equal tokens' mass to a few units of the last of its 24 bits.
    """
    count, rows = 2**octave, 1000 if octave < 7 else 200
    generator = torch.Generator().manual_seed(octave)
    depths = octave + torch.rand(rows, generator=generator)
    top_p = []
    for mass in reference.mass(depths).tolist():
        largest_share = 2**73 // (2**42 + count * mass)
        below = np.float32((largest_share + 2**11) / 2**31)
        if int(below * np.float64(2**31)) > largest_share + 2**11:
            below = np.nextafter(below, np.float32(0))
        top_p += [float(below), float(np.nextafter(below, np.float32(1)))]
    logits = torch.zeros(rows, count + 1)
    logits[:, :-1] = -depths.unsqueeze(1)
    params = [SamplingParams(temperature=OCTAVE_TEMPERATURE, top_p=p) for p in top_p]
    filtered = filter_logits(
        logits.repeat_interleave(2, 0).to(device_of(backend)), params, backend=backend
    )
    kept = (filtered > -torch.inf).sum(-1).view(rows, 2).cpu()
    wrong = (kept != torch.tensor([1, 2])).any(-1).nonzero().flatten().tolist()
    assert not wrong, [(depths[row].item(), kept[row].tolist()) for row in wrong[:8]]


@other_backends
@dtypes
def test_largest_vocabulary(backend: str, dtype: torch.dtype) -> None:
    """At V = 2^20 the mass of equal logits is 2^62, which still fits into 64 bits."""
    cases = [
        Case("all equal", "plain", seed=1),
        Case("all equal", "p 0.999999", seed=2),
        Case("model-like", "k p", seed=3),
        Case("tiny steps", "T k p min-p", seed=4),
    ]
    assert_parity([build(cases, 2**20, dtype, device_of(backend))], backend)


@other_backends
def test_no_rows(backend: str) -> None:
    """A batch without rows gives empty results of the right shapes."""
    logits = torch.zeros(0, 7, device=device_of(backend))
    output = sample(logits, [], num_samples=3, logprobs="raw", backend=backend)
    assert output.tokens.shape == (0, 3)
    assert output.logprobs is not None
    assert output.logprobs.shape == (0, 3)
    assert output.status.shape == (0,)
    assert filter_logits(logits, [], backend=backend).shape == (0, 7)


@other_backends
@dtypes
@pytest.mark.parametrize("vocab_size", [7, 513, 4099], ids="V{}".format)
def test_steps_of_a_sampler(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Eight prepared steps give the reference's tokens, logprobs, positions and history."""
    device = device_of(backend)
    groups = covering_cases(vocab_size, seed=vocab_size)
    cases = groups[1] + groups[0]

    def sampler(name: str) -> tuple[Sampler, TokenHistory]:
        batch = build(cases, vocab_size, dtype, device)
        history = batch.history
        assert history is not None
        made = Sampler(
            batch.params,
            vocab_size=vocab_size,
            history=history,
            logprobs="processed",
            backend=name,
            check=False,
        )
        return made, history

    (wanted, wanted_history), (got, got_history) = sampler("torch"), sampler(backend)
    for step in range(8):
        rows = [make_row(case.row, vocab_size, case.seed + step) for case in cases]
        logits = torch.stack(rows).to(device, dtype)
        mask = None
        if step % 2:
            words = [make_mask("half", vocab_size, case.seed + step) for case in cases]
            mask = torch.stack(words).to(device)
        layout = list(LAYOUTS.values())[step % len(LAYOUTS)]
        with threads(1):
            expected = wanted(logits, allowed_mask=mask)
        actual = got(layout(logits), allowed_mask=mask)
        for row in (expected.tokens != actual.tokens).nonzero().flatten().tolist()[:3]:
            pytest.fail(
                f"step {step}: {backend} drew {actual.tokens[row]}, "
                f"the reference {expected.tokens[row]}\n{cases[row]} V={vocab_size} {dtype}"
            )
        assert torch.equal(actual.status, expected.status)
        assert expected.logprobs is not None
        assert actual.logprobs is not None
        torch.testing.assert_close(
            actual.logprobs, expected.logprobs, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True
        )
        assert torch.equal(got.positions, wanted.positions)
        for name in ("seen", "counts", "lengths"):
            assert torch.equal(getattr(got_history, name), getattr(wanted_history, name)), name
