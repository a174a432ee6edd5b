"""What a user asks for, :class:`SamplingParams`, and the same of a batch, :class:`BatchParams`."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.checks import refusal
from llm_sampling.fields import FIELDS, Field, to_float32

_INT32_MAX = 2**31 - 1

#: The fields whose tensors hold one number per row that is checked and read as it is.
_NUMBERS = tuple(f for f in FIELDS.values() if f.dtype in (torch.float32, torch.int32))
_PENALTIES = tuple(f for f in FIELDS.values() if f.kind == "penalty")
_FILTERS = tuple(f for f in FIELDS.values() if f.kind in ("rank", "mass", "depth"))
#: The filters that ``min_tokens_to_keep`` may hold back; top-k's own number is at least that.
_FLOORED = tuple(f for f in FIELDS.values() if f.kind in ("mass", "depth"))


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
        for name, parameter in FIELDS.items():
            value = getattr(self, name)
            if value is None or parameter.dtype is None:
                checked = parameter.off if value is None else _checked_bias(value)
            else:
                checked = parameter.checked(value)
            object.__setattr__(self, name, checked)
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    @property
    def needs_history(self) -> bool:
        """Whether a penalty is on, so that the tokens so far matter."""
        return any(to_float32(getattr(self, f.name)) != f.off for f in _PENALTIES)


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise refusal("logit_bias", FIELDS["logit_bias"].rule, bias)
    checked = {}
    for token, value in bias.items():
        rule = "a mapping whose token ids are integers in [0, 2^31)"
        token_id = checks.integer("logit_bias", token, rule)
        if not 0 <= token_id <= _INT32_MAX:
            raise refusal("logit_bias", rule, token)
        number = checks.number(f"logit_bias[{token_id}]", value, "in [-100, 100]")
        if not -100 <= number <= 100:
            raise refusal(f"logit_bias[{token_id}]", "in [-100, 100]", value)
        checked[token_id] = number
    return checked


def list_of_params(
    params: object, rows: int, *, rule: str = "a SamplingParams or a sequence of them"
) -> list[SamplingParams]:
    """``params`` as a list: one that stands for ``rows`` rows, or the sequence that it is.

    Raises:
        ValueError: it is neither, or an element is not a SamplingParams. The caller checks the
            length of a sequence.
    """
    if isinstance(params, SamplingParams):
        return [params] * rows
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)):
        raise ValueError(f"params must be {rule}, got {type(params).__name__}")
    for index, row in enumerate(params):
        if not isinstance(row, SamplingParams):
            raise refusal(f"params[{index}]", "a SamplingParams", row)
    return list(params)


def _in_float32(values: Sequence[float]) -> list[float]:
    """Each of them rounded to float32, which none overflows."""
    form = f"{len(values)}f"
    return list(struct.unpack(form, struct.pack(form, *values)))


def _min_p_cuts(min_p: Sequence[float]) -> list[float]:
    """Step 13's depth for each ``min_p`` in float32; inf where min-p is off."""
    return _in_float32([2.0**-18 - math.log2(p) if p > 0 else math.inf for p in min_p])


def _as_int64(value: int) -> int:
    """The signed 64-bit integer with the bits of ``value`` modulo 2^64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


#: Of each tensor of a BatchParams.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{f.name: f.dtype for f in FIELDS.values() if f.dtype is not None},
        "min_p_cut": torch.float32,
        "logit_bias_offsets": torch.int64,
        "logit_bias_ids": torch.int32,
        "logit_bias_values": torch.float32,
        "unseeded": torch.bool,
        "position": torch.int64,
    }
)


#: The tensors that kernels read; the C struct and the ops hold each under the same name.
KERNEL_TENSORS = tuple(name for name in DTYPES if name != "unseeded")


def _flags(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The flags of a BatchParams with these values, one per row, as its tensors hold them."""
    rows = len(columns["temperature"])

    def any_on(parameters: Iterable[Field]) -> bool:
        return any(columns[f.name].count(f.off) < rows for f in parameters)

    kept = [
        1 if temperature == 0 else int(max(k, keep)) if k > 0 else 0
        for temperature, k, keep in zip(
            columns["temperature"], columns["top_k"], columns["min_tokens_to_keep"], strict=True
        )
    ]
    floored = [row for row, keep in enumerate(columns["min_tokens_to_keep"]) if keep > 1]
    return {
        "needs_history": any_on(_PENALTIES),
        "all_greedy": columns["temperature"].count(0) == rows,
        "any_filter": any_on(_FILTERS),
        "kept_at_most": 0 if 0 in kept else max(kept, default=0),
        "any_top_k": any(kept),
        "any_top_p": columns["top_p"].count(FIELDS["top_p"].off) < rows,
        "any_floor": any(columns[f.name][row] != f.off for f in _FLOORED for row in floored),
    }


#: What a flag of a BatchParams must be that was built by hand.
_FLAG_RULES: Mapping[str, str] = MappingProxyType(
    {
        "needs_history": "True where a row has a penalty",
        "all_greedy": "False where a row has a temperature",
        "any_filter": "True where a row has a filter",
        "kept_at_most": "0, or at least what top-k keeps in every row",
        "any_top_k": "True where a row has top_k or is greedy",
        "any_top_p": "True where a row has top_p",
        "any_floor": "True where a row has a floor",
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
        any_floor: whether any row has top-p or min-p and a ``min_tokens_to_keep`` above 1.

    The seven flags are read on the host, to choose a kernel or the messages between ranks. If you
    change tensors in place, under a captured graph for example, update the flags too or set them to
    their conservative values, which are the defaults of the last four.
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
        rows = list_of_params(params, 1)

        def tensor(values: Sequence[object], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        columns: dict[str, list[Any]] = {}
        for parameter in _NUMBERS:
            values = [getattr(row, parameter.name) for row in rows]
            if parameter.is_integer:
                columns[parameter.name] = [min(value, _INT32_MAX) for value in values]
            else:
                columns[parameter.name] = _in_float32(values)
        # in id order, which is that of a pass over the row
        biases = [sorted(row.logit_bias.items()) if row.logit_bias else [] for row in rows]
        offsets = [0]
        for bias in biases:
            offsets.append(offsets[-1] + len(bias))
        unseeded = [row.seed is None for row in rows]
        tensors: dict[str, Any] = {
            name: tensor(column, DTYPES[name]) for name, column in columns.items()
        }
        return cls(
            **tensors,
            seed=tensor([_as_int64(row.seed or 0) for row in rows], torch.int64),
            min_p_cut=tensor(_min_p_cuts(columns["min_p"]), torch.float32),
            logit_bias_offsets=tensor(offsets, torch.int64),
            logit_bias_ids=tensor([i for bias in biases for i, _ in bias], torch.int32),
            logit_bias_values=tensor([x for bias in biases for _, x in bias], torch.float32),
            unseeded=tensor(unseeded, torch.bool) if any(unseeded) else None,
            position=None
            if positions is None
            else positions_tensor(positions, len(rows), tensors["temperature"].device),
            **_flags(columns),
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
        """Itself, after a check that is made once.

        Raises:
            ValueError: a tensor is not what this class says, or holds a value out of its range, or
                a flag promises what the tensors do not keep. Values are looked at on the CPU only.
        """
        if "_is_sound" not in vars(self):
            self._check_tensors()
            if self.device.type == "cpu":
                self._check_values()
            vars(self)["_is_sound"] = True  # no field, so what `replace` makes is checked anew
        return self

    def _check_tensors(self) -> None:
        rows = self.temperature.shape[0] if isinstance(self.temperature, Tensor) else 0
        entries = self.logit_bias_ids.shape[0] if isinstance(self.logit_bias_ids, Tensor) else 0
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name in ("unseeded", "position"):
                continue
            if not isinstance(tensor, Tensor):
                raise refusal(name, "a torch.Tensor", tensor)
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

    def _check_values(self) -> None:
        for parameter in _NUMBERS:
            parameter.check_tensor(getattr(self, parameter.name))
        columns = {f.name: getattr(self, f.name).tolist() for f in _NUMBERS}
        cuts = _min_p_cuts(columns["min_p"])
        if self.min_p_cut.tolist() != cuts:
            raise refusal("min_p_cut", "2^-18 - log2(min_p)", self.min_p_cut.tolist())
        offsets, entries = self.logit_bias_offsets.tolist(), self.logit_bias_ids.shape[0]
        if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != entries:
            raise refusal("logit_bias_offsets", f"ascending from 0 to {entries}", offsets)
        for name, least in _flags(columns).items():
            given = getattr(self, name)
            if name == "kept_at_most":
                is_true = not given or 0 < least <= given
            else:
                is_true = given == least or given == (name != "all_greedy")
            if not is_true:
                raise refusal(name, _FLAG_RULES[name], given)

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
            raise refusal("positions", "integers", dtype)
        if positions.device != device:
            raise ValueError(
                f"positions must be on the logits' device {device}, got {positions.device}"
            )
        tensor = positions.to(torch.int64)
    else:
        if not isinstance(positions, Iterable):
            raise refusal("positions", "integers, one per row", positions)
        values = [checks.integer("positions", value, "integers") for value in positions]
        for value in values:
            if not 0 <= value < 2**64:
                raise refusal("positions", "in [0, 2^64)", value)
        tensor = torch.tensor(
            [_as_int64(value) for value in values], dtype=torch.int64, device=device
        )
    if tensor.shape != (rows,):
        raise refusal("positions", f"of shape ({rows},)", tuple(tensor.shape))
    return tensor.contiguous()
