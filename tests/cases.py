"""The parity cases: tables of rows of logits, parameter mixes, histories, masks and layouts.

Every entry of a table is a named builder whose result depends only on its name, the vocabulary
size and a seed, so a printed :class:`Case` is enough to reproduce a failure. The rows contain what
kernels get wrong: ties, infinities, NaN, subnormals, and values exactly at a threshold.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory
from llm_sampling.backends import BACKENDS

INF = math.inf
NAN = math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_VOCABS = (1, 2, 7, 31, 33, 511, 512, 513, 1000)
LARGE_VOCABS = (32000, 49152, 128256, 262144)

# With this temperature the factor in step 9 of docs/semantics.md is exactly 1, so that depths are
# differences of logits.
OCTAVE_TEMPERATURE = float.fromhex("0x1.715476p+0")
# With this top_p the share in step 12 is exactly one half of the mass.
EXACT_HALF = 0.5 + 2.0**-20


def device_of(backend: str) -> str:
    """Return the device type on which a backend is tested."""
    types = BACKENDS[backend].device_types
    return "cpu" if not types or "cpu" in types else min(types)


#: The backends whose kernels run in Triton's interpreter in this process, as TRITON_INTERPRET=1
#: requests.
INTERPRETED = tuple(
    name for name in ("triton",) if "cpu" in (BACKENDS[name].device_types or frozenset())
)
ON_THE_CPU = tuple(name for name in BACKENDS if device_of(name) == "cpu")
#: All backends, for parametrize(..., indirect=True). Those that need a GPU have the marker gpu.
EVERY_BACKEND = tuple(
    name if name in ON_THE_CPU else pytest.param(name, marks=pytest.mark.gpu) for name in BACKENDS
)
OTHER_BACKENDS = tuple(
    param for name, param in zip(BACKENDS, EVERY_BACKEND, strict=True) if name != "torch"
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and with it every backend on the CPU, use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- rows


def _normal(scale: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda v, g: torch.randn(v, generator=g) * scale


def _model_like(v: int, g: torch.Generator) -> Tensor:
    """Return a few dominant tokens over a long tail that falls with the rank, as in a model."""
    rank = torch.arange(1, v + 1, dtype=torch.float32)
    x = 4.0 - 1.6 * rank.log() + 0.7 * torch.randn(v, generator=g)
    return x[torch.randperm(v, generator=g)]


def _some(v: int, g: torch.Generator, count: int) -> Tensor:
    return torch.randperm(v, generator=g)[:count]


def _with(x: Tensor, g: torch.Generator, *values: float, each: int = 1) -> Tensor:
    """Return ``x`` with each of ``values`` at ``each`` random places."""
    places = _some(len(x), g, each * len(values))
    x[places] = torch.tensor(values * each)[: len(places)]
    return x


def _mostly_minus_inf(v: int, g: torch.Generator) -> Tensor:
    x = torch.randn(v, generator=g) * 3
    return torch.where(torch.rand(v, generator=g) < 0.99, -INF, x)


def _huge(v: int, g: torch.Generator) -> Tensor:
    values = torch.tensor([3e38, -3e38, 3.4028235e38, -3.4028235e38, 1e38, 0.0])
    return values[torch.randint(6, (v,), generator=g)]


def _signed_zeros(v: int, g: torch.Generator) -> Tensor:
    return torch.tensor([0.0, -0.0])[torch.randint(2, (v,), generator=g)]


def _tiny_steps(v: int, g: torch.Generator) -> Tensor:
    """Return neighbouring float32 values; a later cast to a smaller dtype makes ties of them."""
    return 1.0 + torch.randint(64, (v,), generator=g) * 2.0**-23


def _octaves(v: int, g: torch.Generator) -> Tensor:
    """Return 1, 2, 4 ... tokens at 0, -1, -2 ...: groups of equal mass at OCTAVE_TEMPERATURE."""
    x = -torch.arange(1, v + 1, dtype=torch.float64).log2().floor().float()
    return x[torch.randperm(v, generator=g)]


def _plateau(v: int, g: torch.Generator) -> Tensor:
    """Return a row in which 3/4 of the tokens share the maximum: the nucleus ends among ties."""
    x = torch.where(torch.arange(v) < max(1, 3 * v // 4), 2.0, -1.0)
    return x[torch.randperm(v, generator=g)]


def _min_p_edge(v: int, g: torch.Generator) -> Tensor:
    """Return logits whose depths at OCTAVE_TEMPERATURE are at and next to the limit of min_p 0.5.

    That limit is 1 + 2^-18 octaves.
    """
    depth = 1 + 2.0**-18 + torch.randint(-3, 4, (v,), generator=g) * 2.0**-23
    depth[_some(v, g, 1)] = 0.0
    return -depth


def _clustered(v: int, g: torch.Generator) -> Tensor:
    """Return a row whose large logits are all next to each other."""
    x = torch.randn(v, generator=g) - 6
    start = int(torch.randint(v, (1,), generator=g))
    x[start : start + 600] += 9
    return x


def _one_peak_per_tile(v: int, g: torch.Generator) -> Tensor:
    """Return a row with the same peak in every tile of 512 tokens: first, last or in between."""
    x = torch.randn(v, generator=g).clamp(max=2)
    starts = torch.arange(0, v, 512)
    within = torch.tensor([0, 511, 17, 256])[torch.arange(len(starts)) % 4]
    x[(starts + within).clamp(max=v - 1)] = 5.0
    return x


def _random_bits(v: int, g: torch.Generator) -> Tensor:
    """Return finite floats of every magnitude."""
    bits = torch.randint(-(2**31), 2**31, (v,), generator=g).to(torch.int32)
    x = bits.view(torch.float32).clone()
    return torch.where(x.isfinite(), x, 0.0)


def _deep_tail(v: int, g: torch.Generator) -> Tensor:
    """Return one dominant token and a tail whose masses are the smallest integers, 0 to 4."""
    x = -(39.5 + 5 * torch.rand(v, generator=g)) * math.log(2)
    x[_some(v, g, 1)] = 0.0
    return x


def _nan_payloads(v: int, g: torch.Generator) -> Tensor:
    """Return a row with NaN of both signs and several payloads, quiet and signalling."""
    payloads = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1])
    x = torch.randn(v, generator=g)
    places = _some(v, g, max(1, v // 3))
    x.view(torch.int32)[places] = payloads.to(torch.int32)[torch.arange(len(places)) % 6]
    return x


#: name -> a function that builds a float32 row from the vocabulary size and a generator
_ROWS: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": _normal(1.0),
    "normal x3": _normal(3.0),
    "model-like": _model_like,
    "all equal": lambda v, g: torch.full((v,), 1.25),
    "ascending": lambda v, g: torch.linspace(-8, 8, v),
    "descending": lambda v, g: torch.linspace(8, -8, v),
    "two values": lambda v, g: torch.tensor([-1.0, 2.0])[torch.randint(2, (v,), generator=g)],
    "one-hot": lambda v, g: _with(torch.zeros(v), g, 100.0),
    "near one-hot": lambda v, g: _with(torch.zeros(v), g, 15.0),
    "one finite": lambda v, g: _with(torch.full((v,), -INF), g, -3.0),
    "99 % -inf": _mostly_minus_inf,
    "huge": _huge,
    "tiny": _normal(1e-30),
    "subnormal": lambda v, g: torch.randint(-20, 21, (v,), generator=g) * 2.0**-149,
    "signed zeros": _signed_zeros,
    "one +inf": lambda v, g: _with(torch.randn(v, generator=g), g, INF),
    "several +inf": lambda v, g: _with(torch.randn(v, generator=g), g, INF, each=5),
    "some NaN": lambda v, g: _with(torch.randn(v, generator=g), g, NAN, each=3),
    "NaN payloads": _nan_payloads,
    "NaN and infinities": lambda v, g: _with(
        torch.randn(v, generator=g), g, NAN, INF, -INF, each=3
    ),
    "all NaN": lambda v, g: torch.full((v,), NAN),
    "all -inf": lambda v, g: torch.full((v,), -INF),
    "eighths": lambda v, g: (torch.randn(v, generator=g) * 24).round() / 8,
    "one lower": lambda v, g: _with(torch.full((v,), 0.5), g, 0.25),
    "tiny steps": _tiny_steps,
    "octaves": _octaves,
    "plateau": _plateau,
    "min-p edge": _min_p_edge,
    "clustered": _clustered,
    "one peak per tile": _one_peak_per_tile,
    "random bits": _random_bits,
    "deep tail": _deep_tail,
}
ROW_NAMES = tuple(_ROWS)


def make_row(name: str, vocab_size: int, seed: int) -> Tensor:
    """Return the float32 row of this name."""
    row = _ROWS[name](vocab_size, torch.Generator().manual_seed(seed)).to(torch.float32)
    assert row.shape == (vocab_size,)
    return row


# ------------------------------------------------------------------------------------- parameters


@functools.cache
def filter_mixes(v: int) -> dict[str, dict[str, Any]]:
    """Return the parameter mixes that need no history, by name."""
    mixes: dict[str, dict[str, Any]] = {
        "plain": {},
        "greedy": {"temperature": 0},
        "greedy with filters": {"temperature": 0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        "greedy keep 3": {"temperature": 0, "min_tokens_to_keep": 3},
    }
    for t in (1e-45, 1e-40, 0.01, 0.3, 0.8, OCTAVE_TEMPERATURE, 2.5, 3e38):
        mixes[f"T {t:.3g}"] = {"temperature": t}
    for k in (1, 2, 50, 1024):
        mixes[f"k {k}"] = {"top_k": k}
    mixes["k V-1"] = {"top_k": v - 1}
    mixes["k V"] = {"top_k": v}
    mixes["k above V"] = {"top_k": v + 5}
    mixes["k largest"] = {"top_k": 2**31 - 1}
    for p in (1e-300, 1e-6, 0.1, 0.5, EXACT_HALF, 0.9, 0.99, 0.999999, 1 - 1e-9):
        mixes[f"p {p:.10g}"] = {"top_p": p}
    for p in (1e-300, 1e-9, 0.05, 0.3, 1.0):
        mixes[f"min-p {p:g}"] = {"min_p": p}
    for keep in (3, 100):
        mixes[f"k 2 keep {keep}"] = {"top_k": 2, "min_tokens_to_keep": keep}
        mixes[f"p 0.1 keep {keep}"] = {"top_p": 0.1, "min_tokens_to_keep": keep}
        mixes[f"min-p 0.9 keep {keep}"] = {"min_p": 0.9, "min_tokens_to_keep": keep}
        mixes[f"all keep {keep}"] = {
            "top_k": 2,
            "top_p": 0.1,
            "min_p": 0.9,
            "min_tokens_to_keep": keep,
        }
    mixes["octaves p half"] = {"temperature": OCTAVE_TEMPERATURE, "top_p": EXACT_HALF}
    mixes["octaves min-p half"] = {"temperature": OCTAVE_TEMPERATURE, "min_p": 0.5}
    mixes["k p"] = {"top_k": 50, "top_p": 0.9}
    mixes["k p large"] = {"top_k": 1024, "top_p": 0.95}
    mixes["k min-p"] = {"top_k": 20, "min_p": 0.1}
    mixes["p min-p"] = {"top_p": 0.95, "min_p": 0.02}
    mixes["T p"] = {"temperature": 0.7, "top_p": 0.9}
    mixes["hot T p"] = {"temperature": 50.0, "top_p": 0.97}
    mixes["T min-p"] = {"temperature": 1.5, "min_p": 0.1}
    mixes["T k"] = {"temperature": 1e-40, "top_k": 40}
    mixes["T k p min-p"] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
    mixes["bias"] = {"logit_bias": {0: 5.0, v - 1: -100, v // 2: 100, v: 7.0, v + 40: 9.0}}
    mixes["bias down"] = {"logit_bias": {t * t % v: -100 for t in range(300)}, "top_k": 50}
    mixes["bias many"] = {
        "logit_bias": {t: (t % 17 - 8) / 4 for t in range(0, v, max(1, v // 300))},
        "top_p": 0.9,
    }
    mixes["bias bans"] = {"logit_bias": {t: -INF if t % 3 else 2.5 for t in range(0, v, 2)}}
    mixes["bias bans k"] = {"top_k": 9, "logit_bias": {t * 7 % v: -INF for t in range(40)}}
    mixes["bias greedy"] = {"temperature": 0, "logit_bias": {v // 2: 3.5, v // 3: 3.25}}
    return mixes


@functools.cache
def penalty_mixes(v: int) -> dict[str, dict[str, Any]]:
    """Return the parameter mixes that need a history, by name."""
    # These penalties use all 24 bits of a float32, so that a count times a penalty is rounded.
    up = {"repetition_penalty": 1.3, "frequency_penalty": 0.4142136, "presence_penalty": 0.4}
    down = {"repetition_penalty": 0.7, "frequency_penalty": -0.5772157, "presence_penalty": -0.4}
    of_output = {"repetition_penalty_scope": "output"}
    chain = {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    # The bias applies to penalised tokens too: the longer histories contain 0, V // 2 and V - 1.
    bias = {0: 1.7, v // 2: -2.3, v - 1: -100, v // 3: 0.6, v // 5: -INF}
    return {
        "repetition up": {"repetition_penalty": 1.1},
        "repetition down": {"repetition_penalty": 0.8},
        "repetition smallest": {"repetition_penalty": 1e-45},
        "repetition largest": {"repetition_penalty": 3e38},
        "repetition of output": {**of_output, "repetition_penalty": 1.4, "top_k": 9},
        "penalties of output": {**up, **of_output, "top_p": 0.9},
        "penalties of the last 5": {**up, "penalty_last_n": 5, "top_k": 40},
        "penalties of the last output": {**down, **of_output, "penalty_last_n": 3},
        "frequency up": {"frequency_penalty": 0.3141593},
        "frequency down": {"frequency_penalty": -1.7320508},
        "presence up": {"presence_penalty": 2.0},
        "presence down": {"presence_penalty": -0.7},
        "penalties up": up,
        "penalties down": {**down, "top_p": 0.9},
        "penalties greedy": {**up, "temperature": 0},
        "penalties greedy down": {**down, "temperature": 0},
        "penalties bias": {**up, "logit_bias": bias, "min_p": 0.01},
        "penalties bias greedy": {**down, "logit_bias": bias, "temperature": 0},
        "penalties k": {**up, "top_k": 7},
        "penalties T keep": {**down, "temperature": 0.4, "top_p": 0.2, "min_tokens_to_keep": 4},
        "chain": chain,
        "chain all": {**chain, **up, "min_p": 0.02, "logit_bias": bias},
    }


# --------------------------------------------------------------------------- histories and masks


def _ids(v: int, rng: random.Random, count: int) -> list[int]:
    """Return random token ids, half of them from a distribution that repeats a few ids often."""
    return [min(int(rng.paretovariate(0.3)) - 1, v - 1) for _ in range(count // 2)] + [
        rng.randrange(v) for _ in range(count - count // 2)
    ]


def _short(v: int, rng: random.Random) -> tuple[list[int], list[int]]:
    return [0, v - 1, *_ids(v, rng, 5)], [v // 2, v // 2, 0, *_ids(v, rng, 6)]


def _long(v: int, rng: random.Random) -> tuple[list[int], list[int]]:
    return [0, *_ids(v, rng, 2047)], [v // 2, v - 1, *_ids(v, rng, 2046)]


def _third(v: int, rng: random.Random) -> tuple[list[int], list[int]]:
    ids = [t for t in range(v) if rng.random() < 0.3]
    rng.shuffle(ids)
    return [0, v // 2, *ids[::3]], [v - 1, *ids[1::3], *ids[2::3], *ids[1::3]]


def _padded(v: int, rng: random.Random) -> tuple[list[int], list[int]]:
    pads = [-1, v, v + 1, -(2**31), 2**31 - 1, v + 31, -32]
    prompt, output = _short(v, rng)
    prompt += pads
    output += pads
    rng.shuffle(prompt)
    rng.shuffle(output)
    return prompt, output


_HISTORIES: Mapping[str, Callable[[int, random.Random], tuple[list[int], list[int]]]] = {
    "none": lambda v, rng: ([], []),
    "prompt only": lambda v, rng: (_short(v, rng)[0], []),
    "output only": lambda v, rng: ([], _short(v, rng)[1]),
    "short": _short,
    "4096 tokens": _long,
    "30 % of the vocabulary": _third,
    "pads": _padded,
    "only pads": lambda v, rng: ([-1, v], [v + 3, -1, -1]),
}
HISTORY_NAMES = tuple(_HISTORIES)

_MASKS: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "none": lambda v, g: torch.ones(v, dtype=torch.bool),
    "half": lambda v, g: torch.rand(v, generator=g) < 0.5,
    "one token": lambda v, g: torch.zeros(v, dtype=torch.bool).index_fill(0, _some(v, g, 1), True),
    "last token": lambda v, g: torch.arange(v) == v - 1,
    "1 %": lambda v, g: torch.rand(v, generator=g) < 0.01,
    "nothing": lambda v, g: torch.zeros(v, dtype=torch.bool),
}
MASK_NAMES = tuple(_MASKS)


def make_history(name: str, vocab_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the output of the history of this name."""
    return _HISTORIES[name](vocab_size, random.Random(seed))


def make_mask(name: str, vocab_size: int, seed: int) -> Tensor:
    """Return a row of a token bitmask. Bits past the vocabulary are random: they mean nothing."""
    g = torch.Generator().manual_seed(seed)
    words = -(-vocab_size // 32)
    bits = torch.randint(2, (words * 32,), generator=g)
    bits[:vocab_size] = _MASKS[name](vocab_size, g)
    packed = (bits.view(words, 32) << torch.arange(32)).sum(-1)
    return packed.to(torch.int32)


# ------------------------------------------------------------------------------------------ cases

_SEEDS = (0, 1, 2**32, 2**32 - 1, 2**63 - 1, 2**63 + 11, 2**64 - 1, 2**64 - 1, 2**63)
_POSITIONS = (0, 0, 1, 7, 4096, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Case:
    """One row of a batch, described by names of the tables.

    ``seed`` determines the data, the seed of the parameters and the position.
    """

    row: str
    mix: str = "plain"
    history: str = "none"
    mask: str = "none"
    seed: int = 0

    def params(self, vocab_size: int) -> SamplingParams:
        """Return the parameters, with a seed that is derived from the seed of this case."""
        mixes = {**filter_mixes(vocab_size), **penalty_mixes(vocab_size)}
        seed = random.Random(self.seed).choice([*_SEEDS, self.seed * 0x9E3779B97F4A7C15 % 2**64])
        return SamplingParams(**mixes[self.mix], seed=seed)

    def position(self) -> int:
        """Return the position, which is derived from the seed of this case."""
        return random.Random(self.seed + 1).choice([*_POSITIONS, self.seed])


@dataclass
class Batch:
    """Cases and the arguments of ``sample`` that are built from them."""

    cases: Sequence[Case]
    vocab_size: int
    dtype: torch.dtype
    logits: Tensor
    params: list[SamplingParams]
    positions: list[int]
    history: TokenHistory | None
    allowed_mask: Tensor | None

    def describe(self, row: int) -> str:
        """Return a text with all that is needed to build one row again."""
        return (
            f"row {row} of {len(self.cases)}: {self.cases[row]}\n"
            f"  replay: build([{self.cases[row]}], {self.vocab_size}, {self.dtype})\n"
            f"  {self.params[row]} position={self.positions[row]}"
        )


def build(
    cases: Sequence[Case],
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    slots_seed: int | None = 0,
    rules: Sequence[Mapping[str, Any]] = (),
) -> Batch:
    """Build the batch of ``cases``.

    The rows take ``rules``, parameters that look at the history in order, in turn.

    The rows use history slots in random order, with unused slots between them, or slots
    0, 1, 2 ... for ``slots_seed=None``.
    """
    logits = torch.stack([make_row(c.row, vocab_size, c.seed) for c in cases]).to(dtype)
    history = None
    if rules or any(c.history != "none" or c.mix in penalty_mixes(vocab_size) for c in cases):
        ids = [make_history(c.history, vocab_size, c.seed) for c in cases]
        slots = list(range(len(cases)))
        if slots_seed is not None:
            slots = random.Random(slots_seed).sample(range(len(cases) + 3), len(cases))
        prompts: list[list[int]] = [[0]] * (max(slots) + 1)
        outputs: list[list[int]] = [[vocab_size - 1]] * (max(slots) + 1)
        for slot, (prompt, output) in zip(slots, ids, strict=True):
            prompts[slot], outputs[slot] = prompt, output
        windows = [-1] * len(prompts)
        for slot, case in zip(slots, cases, strict=True):
            windows[slot] = case.params(vocab_size).penalty_last_n
        text: dict[str, Any] = {}
        if rules or max(windows) >= 0:
            longest = max(len(x) + len(y) for x, y in zip(prompts, outputs, strict=True))
            text = {"max_length": longest + 1, "penalty_last_n": windows}
        history = TokenHistory.from_ids(prompts, outputs, vocab_size, device=device, **text)
        history.select(slots)
    mask = None
    if any(c.mask != "none" for c in cases):
        mask = torch.stack([make_mask(c.mask, vocab_size, c.seed) for c in cases]).to(device)
    return Batch(
        cases=cases,
        vocab_size=vocab_size,
        dtype=dtype,
        logits=logits.to(device),
        params=[
            replace(case.params(vocab_size), **rule)
            for case, rule in zip(cases, itertools.cycle(rules or [{}]), strict=False)
        ],
        positions=[c.position() for c in cases],
        history=history,
        allowed_mask=mask,
    )


def every_case(vocab_size: int, histories_each: int = len(HISTORY_NAMES)) -> list[list[Case]]:
    """Return combinations of all rows with all mixes, in groups that go into one call each.

    The four groups have neither history nor mask, a history, a mask, and both. Every row is
    combined with every mix of penalties and ``histories_each`` of the histories; which of them
    depends on the vocabulary size.
    """
    seeds = itertools.count(1)
    filters, penalties = filter_mixes(vocab_size), penalty_mixes(vocab_size)
    turns = range(0, len(HISTORY_NAMES), len(HISTORY_NAMES) // histories_each)
    masked = ("plain", "greedy", "k 50", "p 0.9", "min-p 0.05", "T k p min-p", "bias")
    return [
        [Case(r, m, seed=next(seeds)) for r in ROW_NAMES for m in filters],
        [
            Case(
                r,
                m,
                history=HISTORY_NAMES[(vocab_size + i + turn) % len(HISTORY_NAMES)],
                seed=next(seeds),
            )
            for r in ROW_NAMES
            for i, m in enumerate(penalties)
            for turn in turns
        ],
        [
            Case(r, m, mask=k, seed=next(seeds))
            for r in ROW_NAMES
            for m in masked
            for k in MASK_NAMES[1:]
        ],
        [
            Case(r, m, history=h, mask=k, seed=next(seeds))
            for r in ROW_NAMES
            for m, h, k in zip(
                ("chain all", "penalties up", "penalties bias", "penalties greedy", "plain"),
                HISTORY_NAMES[3:],
                MASK_NAMES[1:],
                strict=True,
            )
        ],
    ]


def covering_cases(vocab_size: int, seed: int, rows: int = 0) -> list[list[Case]]:
    """Return groups as :func:`every_case` does, but with far fewer cases.

    Every row, mix, history and mask of the tables occurs at least once; how they are combined
    depends on ``seed``. With ``rows`` > 0 only the first ``rows`` cases of each group are kept.
    """
    rng = random.Random(seed)

    def deal(names: Sequence[str], count: int) -> list[str]:
        dealt = []
        while len(dealt) < count:
            dealt += rng.sample(names, len(names))
        return dealt[:count]

    def group(mixes: Sequence[str], histories: Sequence[str], masks: Sequence[str]) -> list[Case]:
        count = max(len(mixes), len(histories), len(masks))
        columns = (deal(ROW_NAMES, count), deal(mixes, count))
        columns += (deal(histories, count), deal(masks, count))
        cases = [Case(*names, seed=rng.randrange(1, 2**31)) for names in zip(*columns, strict=True)]
        return cases[:rows] if rows else cases

    filters, penalties = tuple(filter_mixes(vocab_size)), tuple(penalty_mixes(vocab_size))
    assert len(filters) >= len(ROW_NAMES)  # so that the first group alone covers the rows
    none = ("none",)
    return [
        group(filters, none, none),
        group(penalties, HISTORY_NAMES, none),
        group(("plain", "k 50", "p 0.9", "T k p min-p"), none, MASK_NAMES),
        group(("chain all", "penalties up"), HISTORY_NAMES[1:], MASK_NAMES[1:]),
    ]


# ---------------------------------------------------------------------------------------- layouts


def _poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return alternating NaN and +inf, so that reading past the end of a row changes its status."""
    flat = torch.empty(math.prod(shape), dtype=like.dtype, device=like.device)
    flat[0::2] = NAN
    flat[1::2] = INF
    return flat.view(shape)


def _padded_rows(x: Tensor) -> Tensor:
    rows, v = x.shape
    buffer = _poison((rows, v + 13), x)
    buffer[:, :v] = x
    return buffer[:, :v]


def _aligned_rows(x: Tensor) -> Tensor:
    """Return rows that begin at multiples of 16 elements, whatever V is."""
    rows, v = x.shape
    buffer = _poison((rows, v + 16 - v % 16), x)
    buffer[:, :v] = x
    return buffer[:, :v]


def _odd_offset(x: Tensor) -> Tensor:
    """Return rows at odd offsets of the allocation, aligned to no more than one element."""
    rows, v = x.shape
    stride = v + 1 + v % 2
    buffer = _poison((1 + rows * stride,), x)
    view = buffer.as_strided((rows, v), (stride, 1), 1)
    view.copy_(x)
    return view


def _sliced_columns(x: Tensor) -> Tensor:
    rows, v = x.shape
    buffer = _poison((rows, v + 64), x)
    buffer[:, 17 : 17 + v] = x
    return buffer[:, 17 : 17 + v]


def _every_other_row(x: Tensor) -> Tensor:
    rows, v = x.shape
    buffer = _poison((2 * rows, v), x)
    buffer[1::2] = x
    return buffer[1::2]


def _every_other_column(x: Tensor) -> Tensor:
    rows, v = x.shape
    buffer = _poison((rows, 2 * v), x)
    buffer[:, ::2] = x
    return buffer[:, ::2]


#: name -> a function that returns the same values with other strides or another alignment
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "padded rows": _padded_rows,
    "aligned rows": _aligned_rows,
    "odd offset": _odd_offset,
    "sliced columns": _sliced_columns,
    "every other row": _every_other_row,
    "every other column": _every_other_column,
    "transposed": lambda x: x.t().contiguous().t(),
}
