"""Logits for the steps: few rows of benchmarks/inputs.py, each rolled by another number of ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.inputs import MAKERS

#: How many rows of each input are made; the makers are slow.
EACH = 8


@functools.lru_cache(maxsize=8)
def _made(name: str, vocab_size: int) -> Tensor:
    return MAKERS[name](EACH, vocab_size, torch.Generator().manual_seed(vocab_size))


def make_logits(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    names: Sequence[str] = ("model",),
) -> Tensor:
    """Logits ``(rows, vocab_size)``, the rows of these inputs in turn.

    Args:
        rows: how many.
        vocab_size: at least 256.
        dtype: of the logits.
        device: where they are.
        names: of MAKERS.
    """
    made = [_made(name, vocab_size).to(device, dtype) for name in names]
    logits = torch.empty(rows, vocab_size, dtype=dtype, device=device)
    for row in range(rows):
        turn, kind = divmod(row, len(names))
        logits[row] = made[kind][turn % EACH].roll(97 * row)
    return logits
