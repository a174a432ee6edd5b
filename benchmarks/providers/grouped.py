"""For providers that take one set of parameters a call, and for stages that they lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_sampling import SamplingParams


def of_rows(tensors: tuple[Tensor, ...], rows: Tensor | None) -> tuple[Tensor, ...]:
    """The given rows of each; all where None."""
    return tensors if rows is None else tuple(tensor[rows] for tensor in tensors)


def in_place(parts: list[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
    """The groups' rows, each where it belongs; a single group's are there already."""
    if len(parts) == 1:
        return parts[0]
    indices = [index for index in rows if index is not None]
    return torch.cat(parts)[torch.cat(indices).argsort()]


def add_penalties(
    x: Tensor, prompt_ids: Tensor, output_ids: Tensor, params: SamplingParams
) -> Tensor:
    """Steps 3 to 5 in plain torch."""
    if params.repetition_penalty != 1:
        ids = torch.cat([prompt_ids, output_ids], dim=1)
        seen, r = x.gather(1, ids), params.repetition_penalty
        x = x.scatter(1, ids, torch.where(seen > 0, seen / r, seen * r))
    return add_count_penalties(x, output_ids, params)


def add_count_penalties(x: Tensor, output_ids: Tensor, params: SamplingParams) -> Tensor:
    """Steps 4 and 5 in plain torch."""
    if params.frequency_penalty == 0 and params.presence_penalty == 0:
        return x
    ones = torch.ones(output_ids.shape, dtype=x.dtype, device=x.device)
    counts = torch.zeros_like(x).scatter_add_(1, output_ids, ones)
    return x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
