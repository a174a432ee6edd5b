"""What a user may ask for, :class:`SamplingParams`, checked once, and its tensors, `BatchParams`.

This module imports nothing else of the package. It is the only place where user values are checked.
"""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

#: The value at which each parameter does nothing. ``None`` stands for it everywhere, and so does
#: ``top_k=-1``, as in Hugging Face and vLLM. ``temperature`` 1 divides by one; 0 is greedy.
OFF_VALUES: Mapping[str, Any] = MappingProxyType(
    {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "min_tokens_to_keep": 1,
        "logit_bias": None,
        "seed": None,
    }
)

#: What each parameter must be, in words.
_RULES: Mapping[str, str] = MappingProxyType(
    {
        "temperature": "finite and >= 0 in float32",
        "top_k": "an integer >= -1",
        "top_p": "in (0, 1]",
        "min_p": "in [0, 1]",
        "repetition_penalty": "finite and > 0 in float32",
        "frequency_penalty": "in [-2, 2]",
        "presence_penalty": "in [-2, 2]",
        "min_tokens_to_keep": "an integer >= 1",
        "seed": "an integer in [-2^63, 2^64)",
    }
)

_INT32_MAX = 2**31 - 1


def _float32(value: float) -> float:
    """The float32 nearest to ``value``, as the kernels read it; inf where it overflows."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _refuse(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {rule}, got {value!r}")


def _number(name: str, rule: str, value: object) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int or a fraction past the largest float
            number = math.inf
        if math.isfinite(number):
            return number
    raise _refuse(name, rule, value)


def _integer(name: str, rule: str, value: object) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise _refuse(name, rule, value)


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token from one row of logits. Frozen; every value is checked on construction.

    The steps apply in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, the draw.
    ``None`` means "off" for every field, ``-1`` for ``top_k``; ints pass where floats are meant.

    Attributes:
        temperature: Divides the logits; finite and >= 0. 0 is greedy: the largest logit after the
            penalties, the smallest id among equals. Off at 1.
        top_k: Keep exactly this many of the largest logits, ties cut by token id; an integer >= -1.
            Off at 0 and -1, and where it reaches the vocabulary's size.
        top_p: Keep the shortest prefix of the order whose share of the mass that top-k left reaches
            ``top_p``, the crossing token included; in (0, 1]. Off at 1. (arXiv:1904.09751)
        min_p: Keep tokens whose probability is at least ``min_p`` times the best one's; in [0, 1].
            Off at 0. (arXiv:2407.01082)
        repetition_penalty: Positive logits of tokens seen in prompt or output are divided by it,
            the others multiplied; finite and > 0. Off at 1. (arXiv:1909.05858)
        frequency_penalty: Subtracted for every time that the output holds the token; in [-2, 2].
            Off at 0.
        presence_penalty: Subtracted once if the output holds the token; in [-2, 2]. Off at 0.
        min_tokens_to_keep: No filter leaves fewer tokens than this; an integer >= 1.
        logit_bias: Token id to a bias added to its logit before the penalties; ids are integers in
            [0, 2^31), biases in [-100, 100]. An id past the vocabulary is ignored.
        seed: An integer in [-2^63, 2^64); seeds that are equal modulo 2^64 are the same seed.
            ``None`` draws one from torch's default generator, which ``torch.manual_seed`` governs.

    Raises:
        ValueError: a value is out of its range, NaN, infinite, a bool or not a number. The message
            names the field, the rule and the value.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens_to_keep: int = 1
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, off in OFF_VALUES.items():
            if getattr(self, name) is None:
                self._set(name, off)

        self._check("temperature", _number, lambda x: x >= 0 and _float32(x) < math.inf)
        self._check("top_k", _integer, lambda k: k >= -1)
        self._set("top_k", max(self.top_k, 0))
        self._check("top_p", _number, lambda p: 0 < p <= 1)
        self._check("min_p", _number, lambda p: 0 <= p <= 1)
        self._check("repetition_penalty", _number, lambda r: 0 < _float32(r) < math.inf)
        self._check("frequency_penalty", _number, lambda a: -2 <= a <= 2)
        self._check("presence_penalty", _number, lambda b: -2 <= b <= 2)
        self._check("min_tokens_to_keep", _integer, lambda n: n >= 1)
        if self.logit_bias is not None:
            self._set("logit_bias", _checked_bias(self.logit_bias))
        if self.seed is not None:
            self._check("seed", _integer, lambda seed: -(2**63) <= seed < 2**64)

    def _check(
        self,
        name: str,
        read: Callable[[str, str, object], Any],
        holds: Callable[[Any], bool],
    ) -> None:
        """Put a value into its type; a ValueError if it breaks its rule."""
        given = getattr(self, name)
        value = read(name, _RULES[name], given)
        if not holds(value):
            raise _refuse(name, _RULES[name], given)
        self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def has_filter(self) -> bool:
        """Whether top-k, top-p or min-p is on."""
        return self.top_k > 0 or _float32(self.top_p) < 1 or _float32(self.min_p) > 0

    @property
    def kept_at_most(self) -> int:
        """How many tokens greedy or top-k leave at most; 0 where neither is on."""
        if _float32(self.temperature) == 0:
            return 1
        return max(self.top_k, self.min_tokens_to_keep) if self.top_k > 0 else 0

    @property
    def has_floor(self) -> bool:
        """Whether top-p or min-p may have to keep more than one token."""
        return self.min_tokens_to_keep > 1 and (
            _float32(self.top_p) < 1 or _float32(self.min_p) > 0
        )

    @property
    def needs_history(self) -> bool:
        """Whether a penalty is on, so that the tokens so far matter."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise _refuse("logit_bias", "a mapping of token id to bias", bias)
    checked = {}
    for token, value in bias.items():
        rule = "a mapping whose token ids are integers in [0, 2^31)"
        token_id = _integer("logit_bias", rule, token)
        if not 0 <= token_id <= _INT32_MAX:
            raise _refuse("logit_bias", rule, token)
        number = _number(f"logit_bias[{token_id}]", "in [-100, 100]", value)
        if not -100 <= number <= 100:
            raise _refuse(f"logit_bias[{token_id}]", "in [-100, 100]", value)
        checked[token_id] = number
    return checked


def _min_p_cut(min_p: float) -> float:
    """Step 13's cut in octaves below the best token; inf where min-p is off."""
    rounded = _float32(min_p)
    return math.inf if rounded == 0 else 2.0**-18 - math.log2(rounded)


def _as_int64(value: int) -> int:
    """The signed 64-bit integer with the bits of ``value`` modulo 2^64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


#: Of each tensor of a BatchParams.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "temperature": torch.float32,
        "top_k": torch.int32,
        "top_p": torch.float32,
        "min_p": torch.float32,
        "repetition_penalty": torch.float32,
        "frequency_penalty": torch.float32,
        "presence_penalty": torch.float32,
        "min_tokens_to_keep": torch.int32,
        "seed": torch.int64,
        "min_p_cut": torch.float32,
        "logit_bias_offsets": torch.int64,
        "logit_bias_ids": torch.int32,
        "logit_bias_values": torch.float32,
        "unseeded": torch.bool,
        "position": torch.int64,
    }
)


@dataclass(frozen=True, eq=False)
class BatchParams:
    """The parameters of a batch: a tensor per field of :class:`SamplingParams`, an entry per row.

    Build it with :meth:`from_list`, which checks every value. All tensors are contiguous, on one
    device, and of shape ``(rows,)`` unless said otherwise. One that was built by hand is looked at
    when it is first used, its values on the CPU only, since elsewhere that would wait.

    Attributes:
        temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: float32.
        top_k, min_tokens_to_keep: int32.
        seed: int64, the seed's 64 bits; of no meaning where ``unseeded``.
        min_p_cut: float32, ``2^-18 - log2(min_p)`` in octaves, worked out once so that no backend's
            logarithm can disagree; inf where min-p is off.
        logit_bias_offsets: int64 ``(rows + 1,)``; row r owns entries ``offsets[r]`` up to
            ``offsets[r + 1] - 1``.
        logit_bias_ids, logit_bias_values: int32 and float32 ``(entries,)``.
        unseeded: bool, True where the row has no seed; None if every row has one.
        position: int64, how many tokens each request has produced so far; None if not given.
        needs_history: whether any row has a penalty.
        all_greedy: whether every row has temperature 0.
        any_filter: whether any row has top-k, top-p or min-p.
        kept_at_most: no row's step 11 keeps more tokens than this; 0 if one may keep any number.
        any_top_k: whether any row has top-k or is greedy.
        any_top_p: whether any row has top-p.
        any_floor: whether any row has top-p or min-p and a ``min_tokens_to_keep`` above 1. The last
            seven are read on the host, to choose a kernel or the messages between ranks: who
            changes tensors in place, under a captured graph for example, keeps them true, or has
            them say that everything may occur, as the last four do unless they are given.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    min_tokens_to_keep: Tensor
    seed: Tensor
    min_p_cut: Tensor
    logit_bias_offsets: Tensor
    logit_bias_ids: Tensor
    logit_bias_values: Tensor
    unseeded: Tensor | None
    position: Tensor | None
    needs_history: bool
    all_greedy: bool
    any_filter: bool
    kept_at_most: int = 0
    any_top_k: bool = True
    any_top_p: bool = True
    any_floor: bool = True

    @classmethod
    def from_list(
        cls,
        params: Sequence[SamplingParams],
        *,
        positions: Sequence[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> BatchParams:
        """Pack one :class:`SamplingParams` per row into tensors on ``device``.

        Args:
            params: one for each row; rows may differ in every field.
            positions: ``(rows,)`` integers, the tokens that each request has produced so far.
            device: where the tensors go; the logits' device.

        Raises:
            ValueError: an element is not a SamplingParams, or ``positions`` has another length.
        """
        for index, row in enumerate(params):
            if not isinstance(row, SamplingParams):
                raise _refuse(f"params[{index}]", "a SamplingParams", row)

        def floats(name: str) -> Tensor:
            values = [getattr(row, name) for row in params]
            return torch.tensor(values, dtype=torch.float32, device=device)

        def ints(name: str) -> Tensor:
            values = [min(getattr(row, name), _INT32_MAX) for row in params]
            return torch.tensor(values, dtype=torch.int32, device=device)

        temperature = floats("temperature")
        # in id order, which is that of a pass over the row
        biases = [dict(sorted((row.logit_bias or {}).items())) for row in params]
        offsets = [0]
        for bias in biases:
            offsets.append(offsets[-1] + len(bias))
        unseeded = [row.seed is None for row in params]
        seeds = [0 if row.seed is None else _as_int64(row.seed) for row in params]
        cuts = [_min_p_cut(row.min_p) for row in params]
        kept = [row.kept_at_most for row in params]
        return cls(
            temperature=temperature,
            top_k=ints("top_k"),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            repetition_penalty=floats("repetition_penalty"),
            frequency_penalty=floats("frequency_penalty"),
            presence_penalty=floats("presence_penalty"),
            min_tokens_to_keep=ints("min_tokens_to_keep"),
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
            min_p_cut=torch.tensor(cuts, dtype=torch.float32, device=device),
            logit_bias_offsets=torch.tensor(offsets, dtype=torch.int64, device=device),
            logit_bias_ids=torch.tensor(
                [token for bias in biases for token in bias], dtype=torch.int32, device=device
            ),
            logit_bias_values=torch.tensor(
                [value for bias in biases for value in bias.values()],
                dtype=torch.float32,
                device=device,
            ),
            unseeded=torch.tensor(unseeded, device=device) if any(unseeded) else None,
            position=None
            if positions is None
            else positions_tensor(positions, len(params), temperature.device),
            needs_history=any(row.needs_history for row in params),
            all_greedy=all(_float32(row.temperature) == 0 for row in params),
            any_filter=any(row.has_filter for row in params),
            kept_at_most=0 if 0 in kept else min(max(kept, default=0), _INT32_MAX),
            any_top_k=any(kept),
            any_top_p=any(_float32(row.top_p) < 1 for row in params),
            any_floor=any(row.has_floor for row in params),
        )

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.temperature.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.temperature.device

    def checked(self) -> BatchParams:
        """Itself, after a look at it, which is taken once.

        Raises:
            ValueError: a tensor is not what this class says, or holds what it must not.
        """
        if "_is_sound" not in vars(self):
            self._check_tensors()
            vars(self)["_is_sound"] = True  # no field, so what `replace` makes is looked at anew
        return self

    def _check_tensors(self) -> None:
        rows = self.temperature.shape[0] if isinstance(self.temperature, Tensor) else 0
        entries = self.logit_bias_ids.shape[0] if isinstance(self.logit_bias_ids, Tensor) else 0
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name in ("unseeded", "position"):
                continue
            if not isinstance(tensor, Tensor):
                raise _refuse(name, "a torch.Tensor", tensor)
            shape = (rows,)
            if name.startswith("logit_bias"):
                shape = (rows + 1,) if name == "logit_bias_offsets" else (entries,)
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(
                    f"{name} must be on {self.device}, as temperature is, got {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if self.device.type == "cpu":
            self._check_values(entries)

    def _check_values(self, entries: int) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        holds = {
            "temperature": (temperature >= 0) & (temperature < math.inf),
            "top_k": self.top_k >= -1,
            "top_p": (top_p >= 0) & (top_p <= 1),  # one that is tiny has become 0
            "min_p": (min_p >= 0) & (min_p <= 1),
            "repetition_penalty": (self.repetition_penalty > 0)
            & (self.repetition_penalty < math.inf),
            "frequency_penalty": self.frequency_penalty.abs() <= 2,
            "presence_penalty": self.presence_penalty.abs() <= 2,
            "min_tokens_to_keep": self.min_tokens_to_keep >= 1,
        }
        for name, good in holds.items():
            if not bool(good.all()):
                row = int((~good).nonzero()[0])
                raise _refuse(f"{name}[{row}]", _RULES[name], getattr(self, name)[row].item())
        cuts = [_float32(_min_p_cut(value)) for value in min_p.tolist()]
        if self.min_p_cut.tolist() != cuts:
            raise _refuse("min_p_cut", "2^-18 - log2(min_p)", self.min_p_cut.tolist())
        offsets = self.logit_bias_offsets.tolist()
        if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != entries:
            raise _refuse("logit_bias_offsets", f"ascending from 0 to {entries}", offsets)
        penalised = (self.repetition_penalty != 1) | (self.frequency_penalty != 0)
        penalised |= self.presence_penalty != 0
        filtered = (self.top_k > 0) | (top_p < 1) | (min_p > 0)
        if not self.needs_history and bool(penalised.any()):
            raise _refuse("needs_history", "True where a row has a penalty", self.needs_history)
        if self.all_greedy and bool((temperature != 0).any()):
            raise _refuse("all_greedy", "False where a row has a temperature", self.all_greedy)
        if not self.any_filter and bool(filtered.any()):
            raise _refuse("any_filter", "True where a row has a filter", self.any_filter)
        kept = torch.where(self.top_k > 0, torch.maximum(self.top_k, self.min_tokens_to_keep), 0)
        kept = torch.where(temperature == 0, 1, kept)
        if self.kept_at_most and not bool(((kept > 0) & (kept <= self.kept_at_most)).all()):
            rule = "0, or at least what top-k keeps in every row"
            raise _refuse("kept_at_most", rule, self.kept_at_most)
        floor = (self.min_tokens_to_keep > 1) & ((top_p < 1) | (min_p > 0))
        if not self.any_top_k and bool(kept.any()):
            raise _refuse("any_top_k", "True where a row has top_k or is greedy", self.any_top_k)
        if not self.any_top_p and bool((top_p < 1).any()):
            raise _refuse("any_top_p", "True where a row has top_p", self.any_top_p)
        if not self.any_floor and bool(floor.any()):
            raise _refuse("any_floor", "True where a row has a floor", self.any_floor)

    def to(self, device: torch.device | str) -> BatchParams:
        """The same parameters on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def seeded(self) -> BatchParams:
        """Give every row without a seed a fresh one from torch's default generator."""
        if self.unseeded is None:
            return self
        fresh = torch.randint(-(2**63), 2**63 - 1, (self.rows,), dtype=torch.int64)
        seed = torch.where(self.unseeded, fresh.to(self.device, non_blocking=True), self.seed)
        return replace(self, seed=seed, unseeded=None)


def positions_tensor(positions: Sequence[int] | Tensor, rows: int, device: torch.device) -> Tensor:
    """``positions`` as a contiguous int64 ``(rows,)`` tensor on ``device``.

    Raises:
        ValueError: it has another length, another device, or is not made of integers.
    """
    if isinstance(positions, Tensor):
        dtype = positions.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise _refuse("positions", "integers", dtype)
        if positions.device != device:
            raise ValueError(
                f"positions must be on the logits' device {device}, got {positions.device}"
            )
        tensor = positions.to(torch.int64)
    else:
        if not isinstance(positions, Iterable):
            raise _refuse("positions", "integers, one per row", positions)
        values = [_integer("positions", "integers", value) for value in positions]
        for value in values:
            if not 0 <= value < 2**64:
                raise _refuse("positions", "in [0, 2^64)", value)
        tensor = torch.tensor(
            [_as_int64(value) for value in values], dtype=torch.int64, device=device
        )
    if tensor.shape != (rows,):
        raise _refuse("positions", f"of shape ({rows},)", tuple(tensor.shape))
    return tensor.contiguous()
