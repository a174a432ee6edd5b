"""What a call returns besides tokens: logprobs with lists and ranks, and the kept set.

Ids, ranks, masks, counts and masses of every backend equal the reference's; logprobs have a
tolerance of 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    LARGE_VOCABS,
    OTHER_BACKENDS,
    SMALL_VOCABS,
    Batch,
    covering_cases,
    device_of,
)
from parity import LOGPROB_TOLERANCE, bits, build_all
from torch import Tensor

from llm_sampling import BatchParams, sample
from llm_sampling.results import SampleOutput

other_backends = pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
all_vocabs = pytest.mark.parametrize("vocab_size", SMALL_VOCABS + LARGE_VOCABS, ids="V{}".format)

#: Every form of every result at least once.
REQUESTS: dict[str, dict[str, Any]] = {
    "processed": {"logprobs": "processed", "top_logprobs": 20, "kept": "mask"},
    "raw": {"logprobs": "raw", "top_logprobs": 7, "kept": "ends"},
    "both": {"logprobs": ("raw", "processed"), "top_logprobs": 3, "kept": "ids"},
    "few": {"logprobs": "processed", "top_logprobs": 0, "kept": "ids", "max_kept_ids": 2},
    "ids": {"logprobs": ("processed", "raw")},
    "long": {"logprobs": ("processed", "raw"), "top_logprobs": 1024, "max_kept_ids": 1024},
}
REQUESTS["long"]["kept"] = "ids"
WITH_IDS = ("both", "few", "ids")


def named_tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an output with the names that lead to them."""
    for name, value in zip(output._fields, output, strict=True):
        if isinstance(value, Tensor):
            yield prefix + name, value.cpu()
        elif value is not None:
            yield from named_tensors(value, f"{prefix}{name}.")


def is_same(name: str, expected: Tensor, actual: Tensor) -> Tensor:
    """Return for each element whether it is what it must be."""
    if not expected.is_floating_point():
        return expected == actual
    if name.endswith("_logit"):
        return (bits(expected) == bits(actual)) | (expected.isnan() & actual.isnan())
    return torch.isclose(expected, actual, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True)


def differences(expected: Any, actual: Any) -> dict[str, list[int]]:
    """Return the rows in which two outputs differ, by the name of what differs."""
    wanted, got = dict(named_tensors(expected)), dict(named_tensors(actual))
    assert list(wanted) == list(got)
    found = {}
    for name, tensor in wanted.items():
        assert (tensor.shape, tensor.dtype) == (got[name].shape, got[name].dtype), name
        wrong = ~is_same(name, tensor, got[name])
        rows = wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
        if rows.any():
            found[name] = rows.nonzero().flatten().tolist()
    return found


def ids_for(batch: Batch) -> Tensor:
    """Return ids of which some are no token's, int64 ``(rows, 5)``."""
    generator = torch.Generator().manual_seed(batch.vocab_size)
    shape = (len(batch.cases), 5)
    ids = torch.randint(-1, batch.vocab_size + 1, shape, generator=generator)
    ids[:, 0] = batch.logits.float().nan_to_num(-torch.inf).argmax(-1)
    return ids.to(batch.logits.device)


def drawn(batch: Batch, backend: str, **options: Any) -> SampleOutput:
    params = BatchParams.from_list(
        batch.params, positions=batch.positions, device=batch.logits.device
    )
    return sample(
        batch.logits,
        params,
        history=batch.history,
        allowed_mask=batch.allowed_mask,
        backend=backend,
        check=False,
        **options,
    )


@other_backends
@dtypes
@all_vocabs
@pytest.mark.parametrize("request_name", REQUESTS)
def test_covering_cases(
    backend: str, dtype: torch.dtype, vocab_size: int, request_name: str
) -> None:
    """Every row, mix, history and mask of the parity table, with every form of every result."""
    options = REQUESTS[request_name]
    number = [*REQUESTS].index(request_name)
    turn = DTYPES.index(dtype)
    groups = covering_cases(vocab_size, vocab_size + turn + number)
    if vocab_size > 10_000:
        groups = [group[turn + number :: 3 * len(REQUESTS)] for group in groups]
    for batch in build_all([g for g in groups if g], vocab_size, dtype, device_of(backend)):
        if request_name in WITH_IDS:
            options = {**options, "logprob_token_ids": ids_for(batch)}
        num_samples = 3 if number % 2 else 1
        expected, actual = (
            drawn(batch, name, num_samples=num_samples, **options) for name in ("torch", backend)
        )
        found = differences(expected, actual)
        rows = sorted({row for rows in found.values() for row in rows})
        assert not found, (found, [batch.describe(row) for row in rows[:3]])
