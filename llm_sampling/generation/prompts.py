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
    """The ids of each prompt, without padding.

    Args:
        prompts: as for :func:`llm_sampling.generation.generate_stream`.
        tokenizer: a Hugging Face tokenizer; needed for prompts that are texts.

    Raises:
        ValueError: ``prompts`` has none of the known forms, has no prompt, or a prompt without
            tokens.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        rows = _ids_of_encoding(prompts)
    elif isinstance(prompts, (Tensor, np.ndarray)):
        rows = _ids_of_tensor(torch.as_tensor(prompts))
    elif not isinstance(prompts, Sequence):
        raise _unknown_form(prompts)
    elif prompts and all(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise ValueError("tokenizer must be given for prompts that are texts")
        rows = tokenizer(list(prompts))["input_ids"]
    else:
        rows = [_ids_of_row(row, prompts) for row in prompts]
    if not rows:
        raise ValueError("prompts must have at least one prompt, got none")
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts must have at least one token each, prompt {index} has none")
    return rows


def _ids_of_encoding(encoding: Mapping[str, Any]) -> list[list[int]]:
    """Of what a tokenizer returns: ``input_ids`` with or without an ``attention_mask``."""
    if "input_ids" not in encoding:
        raise ValueError(f"prompts must have input_ids, got a mapping of {list(encoding)}")
    ids, mask = torch.as_tensor(encoding["input_ids"]), encoding.get("attention_mask")
    if mask is None:
        return _ids_of_tensor(ids)
    mask = torch.as_tensor(mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask must pad on the left, and it masks something else")
    return [row.tolist() for row in unpadded(ids, mask)]


def _ids_of_tensor(ids: Tensor) -> list[list[int]]:
    if ids.dim() != 2:
        raise ValueError(f"prompts must have shape (rows, length), got {tuple(ids.shape)}")
    check_holds_integers("prompts", ids)
    rows: list[list[int]] = ids.tolist()
    return rows


def _ids_of_row(row: object, prompts: Prompts) -> list[int]:
    ids = row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(map(is_integer, ids)):
        raise _unknown_form(prompts)
    return [int(token) for token in ids]


def _unknown_form(prompts: object) -> ValueError:
    return ValueError(f"prompts must be texts, or sequences of integer token ids, got {prompts!r}")


def unpadded(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The ids of each row at which ``mask``, of the shape of ``ids``, is not 0."""
    return [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rows as one tensor, padded on the left with id 0.

    Returns:
        int64 ``(rows, length)``, and the attention mask of the same shape, which is 1 at the ids
        and 0 at the padding; None instead if all rows have the same length.
    """
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    if all(len(row) == length for row in rows):
        return ids, None
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return ids, torch.tensor(mask, device=device)


def check_holds_integers(name: str, ids: Tensor) -> None:
    """A ValueError if the dtype of ``ids`` is not one of the integers."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {ids.dtype}")
