"""Choose the rows of llm_sampling/backends/known_rows.json and work out their answers.

``python tests/sampling/make_known_rows.py`` writes the file anew, always the same one. The answers
are those of the reference. Seeds and values of top-p are searched for until a fault would show:

* the kept set has one token more, or one less, and another token is drawn;
* masses are worked out with fused multiply-adds, and top-p keeps another number of tokens;
* the frequency penalty is a fused multiply-add, and a greedy row has another best token.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_sampling import reference
from llm_sampling.backends import known_rows
from llm_sampling.backends.base import SampleCall
from llm_sampling.backends.known_rows import KINDS, TOKENS, Kind, KnownRows

PATH = Path(known_rows.__file__).with_suffix(".json")
SEEDS = 20000
PLAIN = Kind(False, False, False)
CPU = torch.device("cpu")

#: The rows without seeds. "boundary": after so many tokens top-p shall cut, at
#: this temperature or a higher one.
ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7, "presence_penalty": 0.6},
    {"temperature": 0.0, "frequency_penalty": "fused"},
    {"temperature": 1.0},
    {"temperature": 0.7, "repetition_penalty": 1.2},
    {"temperature": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    {"temperature": 0.9, "repetition_penalty": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.1, "top_k": 2, "presence_penalty": 0.9},
    {"temperature": 0.8, "top_k": 7, "repetition_penalty": 1.1},
    {"temperature": 1.2, "top_k": 20},
    {"temperature": 1.2, "top_k": 50, "frequency_penalty": 0.2},
    {"temperature": 1.2, "top_k": 64, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 50, "boundary": 11},
    {"temperature": 1.1, "top_k": 30, "boundary": 17, "repetition_penalty": 1.3},
    {"temperature": 0.6, "top_k": 20, "boundary": 6, "min_p": 0.001},
    {"temperature": 1.0, "boundary": 5},
    {"temperature": 1.0, "boundary": 12},
    {"temperature": 1.2, "boundary": 23, "repetition_penalty": 1.2},
    {"temperature": 0.7, "boundary": 8, "frequency_penalty": 0.1},
    {"temperature": 0.9, "boundary": 31},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.2, "min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 0.5, "top_p": 0.3, "min_tokens_to_keep": 9},
]
#: Of every row with a bias: it moves tokens across each other.
BIAS = {"3": 1.5, "40": -2.25, "41": 0.75, "77": -100.0, "90": 4.0}
PROMPT = [0, 5, 11, 17, 40, 41, 63, 64, 80, 95]
BANNED = [2, 9, 30, 31, 32, 55, 78, 88]


def fused_mass(d: Tensor) -> Tensor:
    """Step 10 with fused multiply-adds, which round once."""
    d = d.clamp(max=63.0)
    e = d.floor()
    f = (d - e).double()
    p = torch.full_like(f, reference._POLYNOMIAL[0])
    for c in reference._POLYNOMIAL[1:]:
        p = (p * f + c).float().double()
    m = (p * 2.0**24).to(torch.int64)
    return (m << 18) >> e.to(torch.int64)


class Row:
    """A row up to the draw, in the vocabulary of TOKENS tokens."""

    def __init__(self, call: SampleCall) -> None:
        self.call = call
        self.x, _ = reference.processed_logits(call)
        self.order = torch.sort(self.x, dim=-1, descending=True, stable=True).indices[0]
        self.keep, self.mass = reference.kept_set(self.x, call.batch)

    @property
    def length(self) -> int:
        return int(self.keep.sum())

    def tokens(self, length: int, seeds: Tensor) -> Tensor:
        """The token for each seed if the kept set has this length."""
        keep = torch.zeros(TOKENS, dtype=torch.bool)
        keep[self.order[:length]] = True
        cumulative = torch.where(keep, self.mass[0], 0).cumsum(0)
        assert self.call.batch.position is not None
        position = self.call.batch.position.expand(len(seeds))
        words = reference.philox(seeds, position, 0)
        r = reference.scaled(words[0], words[1], cumulative[-1].expand(len(seeds)))
        return (cumulative[None] <= r[:, None]).sum(1)


def make_row(row: int, kind: Kind, params: dict[str, Any]) -> Row:
    known_rows.data()["rows"][row] = params
    return Row(KnownRows(kind, TOKENS, torch.float32, CPU).call([row]))


def fused_length(row: int, params: dict[str, Any]) -> int:
    """How many tokens the plain row keeps if its masses are fused."""
    exact = reference.mass
    reference.mass = fused_mass
    try:
        return make_row(row, PLAIN, params).length
    finally:
        reference.mass = exact


def find_top_p(row: int, params: dict[str, Any], boundary: int) -> float | None:
    """A float32 with which fused masses change the plain row at this boundary, or None."""
    low, high = np.float32(0), np.float32(1)
    while np.nextafter(low, np.float32(1)) < high:  # keeps at most, and more than, that many
        middle = np.float32((low + high) / 2)
        length = make_row(row, PLAIN, {**params, "top_p": float(middle)}).length
        low, high = (middle, high) if length <= boundary else (low, middle)
    tried = low
    for _ in range(8):
        tried = np.nextafter(tried, np.float32(0))
    for _ in range(16):
        given = {**params, "top_p": float(tried)}
        if make_row(row, PLAIN, given).length != fused_length(row, given):
            return float(tried)
        tried = np.nextafter(tried, np.float32(1))
    return None


def find_frequency(row: int) -> float:
    """A penalty with which a fused multiply-add changes the best token of the greedy row."""
    output = known_rows.data()["output"]
    times = torch.bincount(torch.tensor(output), minlength=TOKENS).float()
    logits = known_rows.row_of_logits(TOKENS, torch.float32)
    for one, other in itertools.permutations(range(TOKENS), 2):
        times_more, above = times[one] - times[other], logits[one] - logits[other]
        if times_more <= 0 or not 0 < abs(above / times_more) <= 2:
            continue
        value = np.float32(above / times_more)  # with it the two are about as good
        for _ in range(4):
            exact = torch.where(times > 0, logits - float(value) * times, logits)
            product = times.double() * float(value)
            fused = torch.where(times > 0, (logits.double() - product).float(), logits)
            if exact.argmax() != fused.argmax():
                return float(value)
            value = np.nextafter(value, np.float32(0))
    raise ValueError(f"no frequency penalty of row {row} shows a fused multiply-add")


def find_seed(row: int, params: dict[str, Any]) -> int:
    """The seed with which most kinds show a kept set of another length."""
    seeds = torch.arange(SEEDS) + row * SEEDS
    shown = torch.zeros(SEEDS, dtype=torch.int64)
    for kind in KINDS:
        made = make_row(row, kind, {**params, "seed": 0})
        right = made.tokens(made.length, seeds)
        for other in (made.length - 1, made.length + 1):
            if 1 <= other < TOKENS:
                shown += made.tokens(other, seeds) != right
    return int(seeds[shown.argmax()])


def make() -> dict[str, Any]:
    """What the file holds."""
    generator = torch.Generator().manual_seed(24)
    sixteenths = torch.randint(0, 97, (TOKENS,), generator=generator).tolist()
    output = torch.randint(0, TOKENS, (60,), generator=generator).tolist()
    best = torch.tensor(sixteenths).argsort(descending=True, stable=True)[:24]
    times = 1 + torch.arange(24) // 4  # so that a negative penalty makes others the best
    data = {
        "sixteenths": sixteenths,
        "prompt": PROMPT,
        "output": [*output, *best.repeat_interleave(times).tolist()],
        "banned": BANNED,
        "bias": BIAS,
        "rows": [{} for _ in ROWS],
        "answers": {},
    }
    known_rows.data.cache_clear()
    known_rows.data = lambda: data  # type: ignore[assignment]
    for row, asked in enumerate(ROWS):
        params = dict(asked)
        if params.get("frequency_penalty") == "fused":
            params["frequency_penalty"] = find_frequency(row)
        boundary = params.pop("boundary", None)
        if boundary is not None:
            for warmer in range(64):
                params["temperature"] = asked["temperature"] + warmer / 64
                params["top_p"] = find_top_p(row, params, boundary)
                if params["top_p"] is not None:
                    break
        params["seed"] = find_seed(row, params) if params["temperature"] > 0 else 0
        data["rows"][row] = params
    for kind in KINDS:
        made = [make_row(row, kind, data["rows"][row]) for row in range(len(ROWS))]
        data["answers"][kind.name] = {
            "tokens": [int(reference.sample(row.call).tokens) for row in made],
            "kept": [row.length if has_filter(row.call) else None for row in made],
        }
    return data


def has_filter(call: SampleCall) -> bool:
    """Whether the kept set leaves out the tokens that do not matter."""
    return call.batch.all_greedy or call.batch.any_filter


def text_of(data: dict[str, Any]) -> str:
    """The file, with a line for each row and each list."""
    parts = []
    for name, value in data.items():
        if name == "rows":
            rows = ",\n    ".join(json.dumps(row) for row in value)
            parts.append(f'  "rows": [\n    {rows}\n  ]')
        elif name == "answers":
            kinds = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f'  "answers": {{\n{kinds}\n  }}')
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(text_of(make()), "utf-8")
