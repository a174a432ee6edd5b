"""Parameters in the forms that providers take, and substitutes for stages that they lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.providers import Task
from llm_sampling import SamplingParams


def of_rows(tensors: tuple[Tensor, ...], rows: Tensor | None) -> tuple[Tensor, ...]:
    """These rows of each tensor; all rows where None."""
    return tensors if rows is None else tuple(tensor[rows] for tensor in tensors)


def in_place(parts: list[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
    """Put the groups' rows into the order of the batch, in which a single group is already."""
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


class RowTensors:
    """The parameters as tensors with an entry for each row, as batched providers take them.

    A greedy row becomes top-k 1 at temperature 1. Penalties are not included, since a case has the
    same ones in all rows.

    Attributes:
        temperature: ``(rows, 1)``; None where all are 1.
        top_k: int32 ``(rows,)``, the vocabulary's size where it is off.
        top_p, min_p: float32 ``(rows,)``.
    """

    def __init__(self, task: Task) -> None:
        params, inputs = task.params, task.inputs
        greedy = [row.temperature == 0 for row in params]
        pairs = list(zip(params, greedy, strict=True))

        def tensor(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=inputs.device)

        temperatures = [1.0 if is_greedy else row.temperature for row, is_greedy in pairs]
        self.temperature = None
        if any(value != 1 for value in temperatures):
            self.temperature = tensor(temperatures).unsqueeze(1)
        vocab_size = inputs.vocab_size
        top_k = [1 if is_greedy else row.top_k for row, is_greedy in pairs]
        self.top_k = tensor(
            [min(k, vocab_size) if k > 0 else vocab_size for k in top_k], torch.int32
        )
        self.top_p = tensor([row.top_p for row in params])
        self.min_p = tensor([row.min_p for row in params])
        self.all_greedy = all(greedy)
        self.has_top_k = any(k > 0 for k in top_k)
        self.has_top_p = any(row.top_p < 1 for row in params)
        self.has_min_p = any(row.min_p > 0 for row in params)
        added = ["penalties"] if any(row.needs_history for row in params) else []
        added += ["logprobs"] if task.case.logprobs else []
        self.note = f"{' and '.join(added)} added in plain torch" if added else ""
