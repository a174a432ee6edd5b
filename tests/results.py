"""Results of calls that ask for more than tokens: the requests, and what two backends differ in.

Ids, ranks, masks, counts and masses of every backend equal the reference's; logprobs have a
tolerance of 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from cases import Batch
from parity import LOGPROB_TOLERANCE, bits
from torch import Tensor

from llm_sampling import BatchParams, sample
from llm_sampling.results import SampleOutput

#: Every form of every result at least once.
REQUESTS: dict[str, dict[str, Any]] = {
    "processed": {"logprobs": "processed", "top_logprobs": 20, "kept": "mask"},
    "raw": {"logprobs": "raw", "top_logprobs": 7, "kept": "ends"},
    "both": {"logprobs": ("raw", "processed"), "top_logprobs": 3, "kept": "ids"},
    "few": {"logprobs": "processed", "top_logprobs": 0, "kept": "ids", "max_kept_ids": 2},
    "ids": {"logprobs": ("processed", "raw")},
    "long": {
        "logprobs": ("processed", "raw"),
        "top_logprobs": 1024,
        "kept": "ids",
        "max_kept_ids": 1024,
    },
}
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
    """Return what a backend gives for a batch."""
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
