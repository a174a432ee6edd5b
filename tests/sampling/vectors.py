"""Load vectors.json: rows with parameters and history, and the answers of an independent program.

The file does not hold the logits: :func:`logits_of` makes them from the key of each case. Nothing
here uses the package's own arithmetic.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory

_PATH = Path(__file__).with_name("vectors.json")
_FAMILY = Path(__file__).with_name("vectors_family.json")
_LOW32 = np.uint64(0xFFFFFFFF)


class Vector(NamedTuple):
    """One case.

    ``logits`` is ``(1, vocab_size)``. ``kept`` is the size of the kept set, and ``first_kept`` has
    its first eight ids in order. ``logprobs`` are those of the processed distribution, None where
    the token is -1.
    """

    name: str
    logits: Tensor
    params: SamplingParams
    prompt: list[int]
    output: list[int]
    position: int
    tokens: list[int]
    status: int
    kept: int
    first_kept: list[int]
    logprobs: list[float | None]

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    def history(self) -> TokenHistory:
        return TokenHistory.from_ids([self.prompt], [self.output], self.vocab_size)


def philox(key: int, counters: int) -> np.ndarray:
    """Return Philox4x32-10 of (i, 0, 0, 0) for i < ``counters``: uint64 ``(counters, 4)``."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0 = np.arange(counters, dtype=np.uint64)
    c1, c2, c3 = (np.zeros(counters, dtype=np.uint64) for _ in range(3))
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & _LOW32,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & _LOW32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def logits_of(shape: str, key: int, vocab_size: int) -> Tensor:
    """Make logit j from word j % 4 of counter j // 4. Every value is exact in float32."""
    a = philox(key, -(-vocab_size // 4)).reshape(-1)[:vocab_size].astype(np.int64)
    uniform = ((a & 0xFFFF) - 0x8000) / 2048
    high = a >> 16
    values = {
        "uniform": uniform,
        "ties": ((a & 15) - 8) / 2,
        "peaked": np.where(high & 15 == 0, uniform, uniform - 8),
        "masked": np.where(high & 3 == 0, uniform, -np.inf),
    }[shape]
    return torch.from_numpy(values.astype(np.float32)).unsqueeze(0)


def _vector(index: int, row: dict[str, Any]) -> Vector:
    bias = {int(token): value for token, value in (row["logit_bias"] or {}).items()}
    return Vector(
        name=f"{index}-{row['shape']}-V{row['vocab_size']}",
        logits=logits_of(row["shape"], row["key"], row["vocab_size"]),
        params=SamplingParams(**row["params"], logit_bias=bias or None),
        **{field: row[field] for field in Vector._fields[3:]},
    )


@cache
def load() -> list[Vector]:
    """Return all cases in the order of the file."""
    rows = json.loads(_PATH.read_text(encoding="utf-8"))
    return [_vector(index, row) for index, row in enumerate(rows)]


@cache
def load_family() -> list[dict[str, Any]]:
    """Return the rows in which the order of ids matters, as they are in vectors_family.json."""
    rows: list[dict[str, Any]] = json.loads(_FAMILY.read_text(encoding="utf-8"))
    return rows


def logits_and_history(
    row: dict[str, Any], *, room: int = 0
) -> tuple[Tensor, SamplingParams, TokenHistory]:
    """Return what such a row is drawn from; its history has room for so many more ids."""
    params = SamplingParams(**row["params"])
    history = TokenHistory.from_ids(
        [row["prompt"]],
        [row["output"]],
        row["vocab_size"],
        max_length=len(row["prompt"]) + len(row["output"]) + room,
        penalty_last_n=params.penalty_last_n,
    )
    return logits_of(row["shape"], row["key"], row["vocab_size"]), params, history
