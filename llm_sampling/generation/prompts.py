"""Prompts in every form that a user may give them, as rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_sampling.checks import is_integer

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


def prompt_ids(prompts: Prompts, tokenizer: Any) -> list[list[int]]:
    """The ids of each prompt, without padding."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise ValueError(f"prompts must have input_ids, got a mapping of {list(prompts)}")
        ids = torch.as_tensor(prompts["input_ids"])
        mask = prompts.get("attention_mask")
        if mask is None:
            return prompt_ids(ids, tokenizer)
        mask = torch.as_tensor(mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("attention_mask must pad on the left, and it masks something else")
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    elif isinstance(prompts, (Tensor, np.ndarray)):
        prompts = torch.as_tensor(prompts)
        if prompts.dim() != 2:
            raise ValueError(f"prompts must have shape (rows, length), got {tuple(prompts.shape)}")
        must_hold_integers("prompts", prompts)
        rows = prompts.tolist()
    elif not isinstance(prompts, Sequence):
        raise ValueError(_what_prompts_are(prompts))
    elif prompts and all(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise ValueError("tokenizer must be given for prompts that are texts")
        rows = tokenizer(list(prompts))["input_ids"]
    else:
        rows = [_row_ids(row, prompts) for row in prompts]
    if not rows:
        raise ValueError("prompts must have at least one prompt, got none")
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts must have at least one token each, prompt {index} has none")
    return rows


def _row_ids(row: object, prompts: Prompts) -> list[int]:
    ids = row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(map(is_integer, ids)):
        raise ValueError(_what_prompts_are(prompts))
    return [int(token) for token in ids]


def _what_prompts_are(prompts: object) -> str:
    return f"prompts must be texts, or sequences of integer token ids, got {prompts!r}"


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The prompts as one tensor, padded on the left with id 0, and the mask that tells where."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    if all(len(row) == length for row in rows):
        return ids, None
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return ids, torch.tensor(mask, device=device)


def must_hold_integers(name: str, ids: Tensor) -> None:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {ids.dtype}")
