"""Does a row's token depend on nothing but the row?

A row is drawn alone, and again in a batch of 64, in another slot, on another number of threads, in
another layout or dtype, or with more draws. Token and status must be the same each time.
"""

from __future__ import annotations

import random

import pytest
import torch
from cases import (
    HISTORY_NAMES,
    LAYOUTS,
    MASK_NAMES,
    ROW_NAMES,
    Batch,
    Case,
    build,
    device_of,
    filter_mixes,
    make_row,
    penalty_mixes,
    threads,
)
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample

vocabs = pytest.mark.parametrize("vocab_size", [513, 5000], ids="V{}".format)
# only long rows are split over threads; the sizes are few because the reference is slow
long_vocabs = pytest.mark.parametrize("vocab_size", [513, 32000, 128256], ids="V{}".format)


def some_cases(seed: int, count: int) -> list[Case]:
    """Return cases of different rows and mixes; 2 of 3 have penalties and 1 of 3 has a mask."""
    rng = random.Random(seed)
    filters, penalties = tuple(filter_mixes(513)), tuple(penalty_mixes(513))
    return [
        Case(
            ROW_NAMES[(seed + i) % len(ROW_NAMES)],
            rng.choice(penalties if i % 3 else filters),
            history=rng.choice(HISTORY_NAMES) if i % 3 else "none",
            mask=rng.choice(MASK_NAMES) if i % 3 == 1 else "none",
            seed=rng.randrange(1, 2**31),
        )
        for i in range(count)
    ]


def draw(batch: Batch, backend: str, num_samples: int = 1) -> tuple[Tensor, Tensor]:
    """Return the tokens ``(rows, num_samples)`` and the status."""
    output = sample(
        batch.logits,
        batch.params,
        history=batch.history,
        allowed_mask=batch.allowed_mask,
        positions=batch.positions,
        num_samples=num_samples,
        backend=backend,
        check=False,
    )
    return output.tokens.view(-1, num_samples), output.status


def draw_alone(case: Case, vocab_size: int, backend: str) -> tuple[int, int]:
    """Return the token and the status of a case in a batch of its own."""
    tokens, status = draw(build([case], vocab_size, device=device_of(backend)), backend)
    return tokens.item(), status.item()  # type: ignore[return-value]


def assert_equal_rows(
    got: list[tuple[int, int]], wanted: list[tuple[int, int]], batch: Batch
) -> None:
    """Assert that (token, status) of every row are equal."""
    for row, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert mine == theirs, f"(token, status) {mine}, alone {theirs}\n{batch.describe(row)}"


@vocabs
def test_alone_or_in_a_batch_of_64(backend: str, vocab_size: int) -> None:
    cases = some_cases(1, 64)
    batch = build(cases, vocab_size, device=device_of(backend))
    tokens, status = draw(batch, backend)
    got = list(zip(tokens[:, 0].tolist(), status.tolist(), strict=True))
    wanted = [draw_alone(case, vocab_size, backend) for case in cases]
    assert_equal_rows(got, wanted, batch)
    assert len({token for token, _ in got}) > 10  # the rows do differ


@vocabs
def test_in_every_slot(backend: str, vocab_size: int) -> None:
    """In shuffled batches a row keeps its token, whatever its index and its history slot."""
    cases = some_cases(2, 64)
    first = build(cases, vocab_size, device=device_of(backend), slots_seed=None)
    tokens, status = draw(first, backend)
    for turn in range(4):
        order = list(range(64))
        random.Random(turn).shuffle(order)
        moved = build(
            [cases[row] for row in order], vocab_size, device=device_of(backend), slots_seed=turn
        )
        moved_tokens, moved_status = draw(moved, backend)
        assert torch.equal(moved_tokens, tokens[order])
        assert torch.equal(moved_status, status[order])


@vocabs
def test_neighbours_do_not_matter(backend: str, vocab_size: int) -> None:
    """A row in the middle of a batch of unrelated rows has the token that it has alone."""
    for seed, case in enumerate(some_cases(3, 16)):
        alone = draw_alone(case, vocab_size, backend)
        others = some_cases(100 + seed, 8)
        batch = build([*others[:5], case, *others[5:]], vocab_size, device=device_of(backend))
        tokens, status = draw(batch, backend)
        assert (tokens[5, 0].item(), status[5].item()) == alone, batch.describe(5)


@pytest.mark.parametrize("rows", [1, 3, 64])
@long_vocabs
def test_one_or_two_threads(backend: str, vocab_size: int, rows: int) -> None:
    """Threads share the rows of a batch, or the parts of one long row; the tokens are the same."""
    if vocab_size > 32000:
        rows = min(rows, 6)  # enough for long rows, which test the split of a row
    for start in range(0, 32, 8) if rows == 1 else (4,):
        batch = build(some_cases(start, rows), vocab_size, device=device_of(backend))
        with threads(1):
            tokens, status = draw(batch, backend, num_samples=2)
        for count in (2, 3):
            with threads(count):
                again, status_again = draw(batch, backend, num_samples=2)
            assert torch.equal(again, tokens), batch.describe(0)
            assert torch.equal(status_again, status), batch.describe(0)


@long_vocabs
def test_filtered_logits_on_one_or_two_threads(backend: str, vocab_size: int) -> None:
    rows = 32 if vocab_size == 513 else 3
    for cases in (some_cases(6, rows), some_cases(7, 1), some_cases(12, 1)):
        batch = build(cases, vocab_size, device=device_of(backend))
        filtered = []
        for count in (1, 2):
            with threads(count):
                filtered.append(
                    filter_logits(
                        batch.logits,
                        batch.params,
                        history=batch.history,
                        allowed_mask=batch.allowed_mask,
                        backend=backend,
                    )
                )
        assert torch.equal(filtered[0].view(torch.int32), filtered[1].view(torch.int32))


@vocabs
@pytest.mark.parametrize("num_samples", [2, 8, 100])
def test_more_draws_keep_the_earlier_ones(backend: str, vocab_size: int, num_samples: int) -> None:
    batch = build(some_cases(4, 64), vocab_size, device=device_of(backend))
    tokens, status = draw(batch, backend)
    more, more_status = draw(batch, backend, num_samples)
    assert torch.equal(more[:, :1], tokens)
    assert torch.equal(more_status, status)
    assert (more != tokens).any()  # the draws do differ


@vocabs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_float32_holds_the_same_values(backend: str, vocab_size: int, dtype: torch.dtype) -> None:
    """Rows in half precision give the same tokens as the same numbers in float32."""
    batch = build(some_cases(5, 64), vocab_size, dtype, device_of(backend))
    tokens, status = draw(batch, backend)
    batch.logits = batch.logits.to(torch.float32)
    widened, widened_status = draw(batch, backend)
    assert torch.equal(widened, tokens)
    assert torch.equal(widened_status, status)


@vocabs
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strides_do_not_matter(backend: str, vocab_size: int, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = build(some_cases(8, 48), vocab_size, dtype, device_of(backend))
        tokens, status = draw(batch, backend)
        batch.logits = LAYOUTS[layout](batch.logits)
        strided, strided_status = draw(batch, backend)
        assert torch.equal(strided, tokens)
        assert torch.equal(strided_status, status)


@vocabs
def test_a_mask_of_everything_is_no_mask(backend: str, vocab_size: int) -> None:
    batch = build(
        [Case(c.row, c.mix, c.history, seed=c.seed) for c in some_cases(9, 48)],
        vocab_size,
        device=device_of(backend),
    )
    tokens, status = draw(batch, backend)
    words = -(-vocab_size // 32)
    batch.allowed_mask = torch.full((48, words), -1, dtype=torch.int32, device=device_of(backend))
    masked, masked_status = draw(batch, backend)
    assert torch.equal(masked, tokens)
    assert torch.equal(masked_status, status)


@vocabs
def test_a_history_without_penalties_is_no_history(backend: str, vocab_size: int) -> None:
    """Rows without penalties ignore a history that the batch has for another row's penalties."""
    mixes = tuple(filter_mixes(vocab_size))
    cases = [Case(r, mixes[i % len(mixes)], seed=i) for i, r in enumerate(ROW_NAMES)]
    batch = build(cases, vocab_size, device=device_of(backend))
    assert batch.history is None
    tokens, status = draw(batch, backend)
    with_history = [Case(c.row, c.mix, history="short", seed=c.seed) for c in cases]
    penalised = Case("normal", "penalties up", history="short", seed=5)
    beside = build([*with_history, penalised], vocab_size, device=device_of(backend))
    beside_tokens, beside_status = draw(beside, backend)
    assert torch.equal(beside_tokens[:-1], tokens)
    assert torch.equal(beside_status[:-1], status)


@vocabs
def test_the_order_and_split_of_a_history_do_not_matter(backend: str, vocab_size: int) -> None:
    """Shuffled output ids and repeated prompt ids are the same history: only counts matter."""
    params = SamplingParams(
        repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2, top_p=0.95, seed=6
    )
    rng = random.Random(0)
    prompt = [rng.randrange(vocab_size) for _ in range(60)]
    output = [rng.randrange(40) for _ in range(300)]
    shuffled = rng.sample(output, len(output))
    logits = make_row("model-like", vocab_size, 3).to(device_of(backend)).expand(2, -1)
    history = TokenHistory.from_ids(
        [prompt, prompt[::-1] * 2], [output, shuffled], vocab_size, device=device_of(backend)
    )
    tokens = sample(
        logits, params, history=history, positions=[3, 3], num_samples=32, backend=backend
    ).tokens
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("vocab_size", [513], ids="V{}".format)
def test_the_five_things_do_matter(backend: str, vocab_size: int) -> None:
    """Control: another seed, position, logit, parameter or history gives other tokens."""
    case = Case("normal", "penalties up", history="short", seed=3)
    many = 64
    base = build([case] * many, vocab_size, device=device_of(backend))
    tokens, _ = draw(base, backend)
    assert len(set(tokens[:, 0].tolist())) == 1

    other = build([case] * many, vocab_size, device=device_of(backend))
    other.positions = list(range(many))
    assert len(set(draw(other, backend)[0][:, 0].tolist())) > many // 3

    other = build([case] * many, vocab_size, device=device_of(backend))
    other.params = [SamplingParams(seed=s) for s in range(many)]
    assert len(set(draw(other, backend)[0][:, 0].tolist())) > many // 3

    other = build([case], vocab_size, device=device_of(backend))
    other.params = [SamplingParams(temperature=0)]
    first = draw(other, backend)[0].item()
    other.logits = -other.logits
    assert draw(other, backend)[0].item() != first

    penalised = SamplingParams(temperature=0, presence_penalty=2.0)
    plain = build([Case("one lower", history="output only")], vocab_size, device=device_of(backend))
    plain.params = [penalised]
    assert plain.history is not None
    plain.logits[0, 0] = 2.0  # token 0 leads by less than the penalty that the output gives it
    assert bool(plain.history.counts[plain.history.slots.long(), 0] > 0)
    assert draw(plain, backend)[0].item() != 0
    plain.history = TokenHistory.from_ids([[]], [[]], vocab_size, device=device_of(backend))
    assert draw(plain, backend)[0].item() == 0
