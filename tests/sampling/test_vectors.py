"""Does every backend give the answers that an independent program computed?

tests/sampling/vectors.json holds them, with four draws for each row. The program that computed them
uses Python integers and numpy float32 only.
"""

from itertools import groupby

import pytest
import torch
import vectors

from llm_sampling import BatchParams, TokenHistory, filter_logits, sample

VECTORS = vectors.load()


def _order(filtered):
    """Return the kept ids of a row in order: larger logit first, equal logits by id."""
    order = torch.sort(filtered, descending=True, stable=True).indices
    return order[: int((filtered > -torch.inf).sum())].tolist()


def test_the_file_is_whole():
    assert len(VECTORS) == 336
    assert sorted({v.vocab_size for v in VECTORS}) == [1, 2, 7, 64, 1000, 4097]
    assert {v.status for v in VECTORS} == {0, 2}
    assert any(v.params.temperature == 0 for v in VECTORS)
    assert any(len(set(v.tokens)) > 1 for v in VECTORS)


def test_the_loaders_random_bits():
    words = [f"{int(word):08x}" for word in vectors.philox(0, 1)[0]]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("case", VECTORS, ids=[v.name for v in VECTORS])
def test_case(backend, case):
    """All results agree with the file, and a call for one draw gives the first of the four."""
    history, options = case.history(), {"positions": [case.position], "check": False}
    output = sample(
        case.logits,
        case.params,
        history=history,
        num_samples=4,
        logprobs="processed",
        backend=backend,
        **options,
    )
    assert output.tokens[0].tolist() == case.tokens
    assert output.status.tolist() == [case.status]
    logprobs = [None if value != value else value for value in output.logprobs[0].tolist()]
    assert [value is None for value in logprobs] == [value is None for value in case.logprobs]
    expected = [value for value in case.logprobs if value is not None]
    assert [value for value in logprobs if value is not None] == pytest.approx(expected, abs=1e-5)

    filtered = filter_logits(case.logits, case.params, history=history, backend=backend)
    order = _order(filtered[0])
    assert len(order) == case.kept
    assert order[:8] == case.first_kept

    one = sample(case.logits, case.params, history=history, backend=backend, **options)
    assert one.tokens.tolist() == case.tokens[:1]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 1000, 4097])
def test_all_rows_in_one_batch(backend, vocab_size):
    """The same rows in one batch, each with its own parameters, history, seed and position."""
    cases = [v for v in VECTORS if v.vocab_size == vocab_size]
    assert len(cases) == 56
    batch = BatchParams.from_list([v.params for v in cases], positions=[v.position for v in cases])
    history = TokenHistory.from_ids(
        [v.prompt for v in cases], [v.output for v in cases], vocab_size
    )
    logits = torch.cat([v.logits for v in cases])
    output = sample(logits, batch, history=history, num_samples=4, backend=backend, check=False)
    assert output.tokens.tolist() == [v.tokens for v in cases]
    assert output.status.tolist() == [v.status for v in cases]
    filtered = filter_logits(logits, batch, history=history, backend=backend)
    assert [_order(row)[:8] for row in filtered] == [v.first_kept for v in cases]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(backend, dtype):
    """The logits of shape "ties" are exact in every dtype, so the answers must be the same."""
    cases = [v for v in VECTORS if "ties" in v.name]
    assert len(cases) == 84
    for vocab_size, group in groupby(cases, key=lambda v: v.vocab_size):
        rows = list(group)
        logits = torch.cat([v.logits for v in rows])
        assert torch.equal(logits.to(dtype).float(), logits)
        output = sample(
            logits.to(dtype),
            [v.params for v in rows],
            history=TokenHistory.from_ids(
                [v.prompt for v in rows], [v.output for v in rows], vocab_size
            ),
            positions=[v.position for v in rows],
            num_samples=4,
            backend=backend,
            check=False,
        )
        assert output.tokens.tolist() == [v.tokens for v in rows]
        assert output.status.tolist() == [v.status for v in rows]
