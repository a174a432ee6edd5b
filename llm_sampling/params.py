"""What a user asks for, :class:`SamplingParams`, and the same of a batch, :class:`BatchParams`."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.checks import refusal
from llm_sampling.fields import BIAS_VALUES, FIELDS, Column, Field, to_float32
from llm_sampling.sequence_rules import (
    BAD_WORD,
    BREAKER_IDS,
    STOP_IDS,
    packed_sequences,
    records_of,
)
from llm_sampling.tensors import (
    is_traced,
    is_wrapper,
    not_of_inference_mode,
    readable,
    to_device,
    version_of,
    writable,
)

_INT32_MAX = 2**31 - 1

#: Each parameter that has a column, with that column.
COLUMNS = tuple((f, f.column) for f in FIELDS.values() if f.column is not None)
_PENALTIES = tuple(column for f, column in COLUMNS if f.kind == "penalty")
#: The largest number whose nearest float32 is 0. A comparison with it can be compiled, also where a
#: graph does not know the number.
_ROUNDS_TO_ZERO = 2.0**-150
_SCOPE, _WINDOW = (column for f, column in COLUMNS if f.kind == "scope")
_FILTERS = tuple(column for f, column in COLUMNS if f.kind in ("rank", "mass", "depth"))
#: The filters that ``min_tokens_to_keep`` may hold back; top-k's own number is at least that.
_FLOORED = tuple(column for f, column in COLUMNS if f.kind in ("mass", "depth"))
#: Those of the rules that look at the history.
RULE_COLUMNS = tuple(column for f, column in COLUMNS if f.kind == "rule")


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token from one row of logits. Frozen; every value is checked on construction.

    The steps apply in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty``, the rules that look at the history (``dry_*``, ``no_repeat_ngram_*``,
    ``bad_words``, ``min_tokens``), ``temperature``, ``top_k``, ``top_p``, ``min_p``, the draw.
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
            [0, 2^31), or strings of their digits as JSON has them, and biases are in [-100, 100].
            A bias of -inf bans the token, whatever its logit is. An id past the vocabulary is
            ignored. Kept as a mapping that cannot be changed.
        seed: An integer in [0, 2^64). ``None`` draws one from torch's default generator, which
            ``torch.manual_seed`` governs.
        repetition_penalty_scope: "all": ``repetition_penalty`` is for the tokens of prompt and
            output. "output": for those of the output alone.
        penalty_last_n: All penalties are for the last so many ids of prompt and output together; an
            integer >= -1. At 0 they are for none. Off at -1, where they are for all. The history
            must keep its ids in order and have the same window.
        dry_multiplier: DRY ("don't repeat yourself"). Where the last ids of prompt and output have
            come before, the token that followed them then would repeat a sequence. Its logit is
            lowered by ``dry_multiplier * dry_base ** (length - dry_allowed_length)``, where
            ``length`` is that of the longest such sequence, at least ``dry_allowed_length``; in
            [0, 100]. Off at 0. (github.com/oobabooga/text-generation-webui/pull/5677)
        dry_base: In [1, 100].
        dry_allowed_length: Sequences that are shorter may be repeated; an integer >= 1.
        dry_penalty_last_n: DRY looks at the last so many ids of prompt and output together; an
            integer >= -1. At -1 it looks at all.
        dry_breakers: Token sequences, such as a new line, that no repeated sequence goes across.
            The token of a breaker with a single token is not lowered.
            :func:`llm_sampling.generation.dry_breakers_from` makes them of strings.
        no_repeat_ngram_size: No sequence of so many ids comes twice in prompt and output; an
            integer >= 0. Off at 0.
        no_repeat_ngram_window: That rule looks at the last so many ids; an integer >= 0. At 0 it
            looks at all.
        bad_words: Token sequences. The last id of one is banned where its other ids are the end of
            prompt and output; that of a sequence with a single id is always banned.
            :func:`llm_sampling.generation.bad_words_from` makes them of strings.
        min_tokens: While the output has fewer ids, ``stop_token_ids`` are banned; an integer >= 0.
            Off at 0.
        stop_token_ids: Token ids that ``min_tokens`` bans. :func:`llm_sampling.sample` ends no
            text; :func:`llm_sampling.generation.generate` ends one after such an id.

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
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    repetition_penalty_scope: Literal["all", "output"] = "all"
    penalty_last_n: int = -1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: Sequence[Sequence[int]] | None = None
    no_repeat_ngram_size: int = 0
    no_repeat_ngram_window: int = 0
    bad_words: Sequence[Sequence[int]] | None = None
    min_tokens: int = 0
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, parameter in FIELDS.items():
            value = getattr(self, name)
            if value is None:
                checked = parameter.off
            elif parameter.kind == "bias":
                checked = _checked_bias(value)
            elif parameter.kind == "sequences":
                checked = _checked_sequences(parameter, value)
            else:
                checked = parameter.checked(value)
            object.__setattr__(self, name, checked)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        # made here, where torch.compile has not yet turned the seed into a symbol of 64 bits
        object.__setattr__(self, "_signed_seed", as_int64(self.seed or 0))
        words = self.bad_words or ()
        alone = [word[0] for word in words if len(word) == 1]
        bans = self.logit_bias or {}
        if alone:
            bans = dict(sorted({**bans, **dict.fromkeys(alone, -math.inf)}.items()))
        object.__setattr__(self, "_bans", bans)
        sequences = packed_sequences(
            (self._has_dry() and self.dry_breakers) or (),
            [word for word in words if len(word) > 1],
            (self._looks_at_length() and self.stop_token_ids) or (),
        )
        object.__setattr__(self, "_sequences", sequences)
        if not torch.compiler.is_compiling():
            self.packed  # noqa: B018  # worked out where the request comes, and not in a step

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # what is derived from the fields may differ in another version of this package
        SamplingParams.__init__(self, **state)

    @property
    def needs_history(self) -> bool:
        """Whether a penalty or a rule is on for which the tokens so far matter."""
        return self.has_penalty or self.has_rules

    @property
    def needs_text(self) -> bool:
        """Whether the history must keep the ids in order, as it does where it has a max_length."""
        return self._needs("order") or (self.has_window and self.has_penalty)

    @property
    def has_window(self) -> bool:
        """Whether penalties are for the last ids only."""
        return self.penalty_last_n != _WINDOW.off

    @property
    def has_penalty(self) -> bool:
        """Whether a penalty is on."""
        return self._needs("penalties")

    @property
    def has_rules(self) -> bool:
        """Whether a rule is on that looks at the history."""
        return self._needs("rules")

    def _needs(self, switch: str) -> bool:
        """Whether one of the switches is on for which the tokens so far matter."""
        if not torch.compiler.is_compiling():
            return switch in self.packed.on
        if switch == "penalties":
            return any(to_float32(getattr(self, c.name)) != c.off for c in _PENALTIES)
        return self._looks_at_order() or (switch == "rules" and self._looks_at_length())

    def _has_dry(self) -> bool:
        return self.dry_multiplier > _ROUNDS_TO_ZERO

    def _looks_at_order(self) -> bool:
        return (
            self._has_dry()
            or self.no_repeat_ngram_size > 0
            or any(len(word) > 1 for word in self.bad_words or ())
        )

    def _looks_at_length(self) -> bool:
        return self.min_tokens > 0 and bool(self.stop_token_ids)

    @property
    def bans(self) -> Mapping[int, float]:
        """``logit_bias`` by rising id, with a ban of every bad word that has a single id."""
        bans: Mapping[int, float] = self._bans  # type: ignore[attr-defined]
        return bans

    @property
    def sequences(self) -> Sequence[int]:
        """The token sequences of the rules that are on, as kernels read them."""
        sequences: Sequence[int] = self._sequences  # type: ignore[attr-defined]
        return sequences

    @functools.cached_property
    def packed(self) -> PackedRow:
        """The numbers that kernels read for these parameters."""
        values = list(_VALUES_OF(self))
        for place, parameter, column in _CONVERTED:
            values[place] = number_of(parameter, column, values[place])
        row = _ROW.unpack(_ROW.pack(*values))
        on = set(itertools.compress(_SWITCH_NAMES, map(operator.ne, _SWITCHED(row), _SWITCHED_OFF)))
        if self.bans:
            on.add("bias")
        if self._looks_at_order():
            on |= {"order", "rules"}
        if self._looks_at_length():
            on.add("rules")
        return PackedRow(row, frozenset(on))


class PackedRow(NamedTuple):
    """What a batch or a table holds for one :class:`SamplingParams`.

    Attributes:
        numbers: one for each of COLUMNS, in their order, rounded as the column rounds it.
        on: which of SWITCHES it turns on, "bias" where it has one, "rules" where it has a rule that
            looks at the history, and "order" where such a rule looks at the ids in order.
    """

    numbers: tuple[float, ...]
    on: frozenset[str]


class LogitBias(dict[int, float]):
    """A mapping of token id to bias that cannot be changed, so that it has a hash."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "logit_bias cannot be changed; dataclasses.replace makes a SamplingParams with another"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[object, ...]:
        return LogitBias, (dict(self),)  # by default items are pickled to be set one by one


def _checked_bias(bias: object) -> LogitBias:
    if not isinstance(bias, Mapping):
        raise refusal("logit_bias", FIELDS["logit_bias"].rule, bias)
    checked: dict[int, float] = {}
    for key, value in bias.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        rule = "a mapping whose token ids are integers in [0, 2^31)"
        token_id = checks.integer("logit_bias", int(key) if is_digits else key, rule)
        if not 0 <= token_id <= _INT32_MAX:
            raise refusal("logit_bias", rule, key)
        if token_id in checked:
            raise refusal("logit_bias", "a mapping that names each token id once", bias)
        name, rule = f"logit_bias[{token_id}]", BIAS_VALUES.rule
        is_ban = isinstance(value, numbers.Real) and value == -math.inf
        number = -math.inf if is_ban else checks.number(name, value, rule)
        if not BIAS_VALUES.holds(number):
            raise refusal(name, rule, value)
        checked[token_id] = number
    return LogitBias(sorted(checked.items()))  # in the order of a pass over the row


def _checked_sequences(parameter: Field, value: object) -> tuple[Any, ...] | None:
    """Token sequences or ids as tuples; None where there are none."""
    name, rule = parameter.name, parameter.rule
    if name == "stop_token_ids":
        return checks.token_sequence(name, value, rule) or None
    return checks.token_sequences(name, value, rule) or None


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


def as_int64(value: int) -> int:
    """The signed 64-bit integer that has the bits of ``value``, which is in [-2^63, 2^64)."""
    return value - 2**64 if value >= 2**63 else value


#: Of each tensor of a BatchParams.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{column.name: column.dtype for _, column in COLUMNS},
        "seed": torch.int64,
        "logit_bias_offsets": torch.int64,
        "logit_bias_ids": torch.int32,
        BIAS_VALUES.name: BIAS_VALUES.dtype,
        "sequence_offsets": torch.int64,
        "sequences": torch.int32,
        "unseeded": torch.bool,
        "position": torch.int64,
    }
)


#: Each row has a part of any length in these tensors; the first of each says where parts begin.
BIAS_TENSORS = ("logit_bias_offsets", "logit_bias_ids", BIAS_VALUES.name)
SEQUENCE_TENSORS = ("sequence_offsets", "sequences")

#: The tensors of the rules that look at the history: a BatchParams has all of them or none.
RULE_TENSORS = (*(column.name for column in RULE_COLUMNS), *SEQUENCE_TENSORS)

#: The tensors that a BatchParams may be without.
_OPTIONAL = frozenset(("unseeded", "position", *RULE_TENSORS))

#: The tensors that kernels read; the C struct and the ops hold each under the same name. Windows
#: are those of the history.
KERNEL_TENSORS = tuple(name for name in DTYPES if name not in ("unseeded", _WINDOW.name))


def number_of(parameter: Field, column: Column, value: Any) -> Any:
    """The number of a column for one value, which the column itself rounds."""
    if value == parameter.off:
        return column.off
    if parameter.choices:
        return column.pack(value)
    if parameter.is_integer:
        return value if value < _INT32_MAX else _INT32_MAX
    return value if parameter.packed is None else column.pack(to_float32(value))


def _all_are(values: Sequence[float], value: float) -> bool:
    if torch.compiler.is_dynamo_compiling():
        for other in values:  # noqa: SIM110  # torch 2.8 does not know how to compile count or all
            if other != value:
                return False
        return True
    return values.count(value) == len(values)


#: What chooses a kernel -> columns, each with its number where it is off. A row turns it on where
#: one of its columns is not off.
SWITCHES: Mapping[str, tuple[tuple[str, float], ...]] = MappingProxyType(
    {
        "penalties": tuple((column.name, column.off) for column in _PENALTIES),
        "output_scope": ((_SCOPE.name, _SCOPE.off),),
        "random": (("temperature", 0.0),),
        "filters": tuple((column.name, column.off) for column in _FILTERS),
    }
)


#: How :attr:`SamplingParams.packed` reads the values, converts those that do not stay as they are,
#: rounds all as the columns do, and looks for those that turn a switch on.
_VALUES_OF = operator.attrgetter(*(parameter.name for parameter, _ in COLUMNS))
_CONVERTED = [
    (place, parameter, column)
    for place, (parameter, column) in enumerate(COLUMNS)
    if parameter.is_integer or parameter.packed is not None
]
_ROW = struct.Struct(
    "=" + "".join("f" if column.dtype == torch.float32 else "i" for _, column in COLUMNS)
)
_PLACES = {column.name: place for place, (_, column) in enumerate(COLUMNS)}
_SWITCHED = operator.itemgetter(*(_PLACES[c] for pairs in SWITCHES.values() for c, _ in pairs))
_SWITCHED_OFF = [off for pairs in SWITCHES.values() for _, off in pairs]
_SWITCH_NAMES = [switch for switch, pairs in SWITCHES.items() for _ in pairs]


def kernel_flags(is_on: Mapping[str, bool]) -> dict[str, bool]:
    """The flags of a BatchParams that choose a kernel, by which switches are on in any row."""
    return {
        "needs_history": is_on["penalties"] or is_on["rules"],
        "any_output_scope": is_on["output_scope"],
        "all_greedy": not is_on["random"],
        "any_filter": is_on["filters"],
    }


def _flags(columns: Mapping[str, Sequence[float]], sequences: Sequence[int]) -> dict[str, Any]:
    """The flags of a BatchParams.

    Args:
        columns: each with a number for each row.
        sequences: the packed token sequences of all rows; none where there are no rules.
    """
    windows = columns[_WINDOW.name]
    is_on = {
        switch: False in [_all_are(columns[name], off) for name, off in pairs]
        for switch, pairs in SWITCHES.items()
    }
    has_rules = RULE_COLUMNS[0].name in columns
    flags = kernel_flags({**is_on, "rules": has_rules})
    flags["any_ordered_rule"] = has_rules and (
        not _all_are(columns["dry_multiplier"], 0.0)
        or not _all_are(columns["no_repeat_ngram_size"], 0)
        or any(kind == BAD_WORD for kind, _ in records_of(sequences))
    )
    flags["any_window"] = any(
        columns[penalty.name][row] != penalty.off
        for row, window in enumerate(windows)
        if window != _WINDOW.off
        for penalty in _PENALTIES
    )
    if torch.compiler.is_dynamo_compiling():  # no graph needs the others, which it would depend on
        return {**CONSERVATIVE_FLAGS, **flags}
    kept = [
        1 if temperature == 0 else int(max(k, keep)) if k > 0 else 0
        for temperature, k, keep in zip(
            columns["temperature"], columns["top_k"], columns["min_tokens_to_keep"], strict=True
        )
    ]
    floored = [row for row, keep in enumerate(columns["min_tokens_to_keep"]) if keep > 1]
    return {
        **flags,
        "kept_at_most": 0 if 0 in kept else max(kept, default=0),
        "any_top_k": any(kept),
        "any_top_p": not _all_are(columns["top_p"], FIELDS["top_p"].off),
        "any_floor": any(columns[c.name][row] != c.off for c in _FLOORED for row in floored),
    }


#: Flags that are right for any values of the tensors.
CONSERVATIVE_FLAGS: Mapping[str, Any] = MappingProxyType(
    {
        "needs_history": True,
        "all_greedy": False,
        "any_filter": True,
        "kept_at_most": 0,
        "any_output_scope": True,
        "any_window": True,
        "any_ordered_rule": True,
        "any_top_k": True,
        "any_top_p": True,
        "any_floor": True,
    }
)

#: What a flag of a BatchParams must be that was built by hand.
_FLAG_RULES: Mapping[str, str] = MappingProxyType(
    {
        "needs_history": "True where a row has a penalty or a rule",
        "all_greedy": "False where a row has a temperature",
        "any_filter": "True where a row has a filter",
        "any_output_scope": 'True where a row has repetition_penalty_scope "output"',
        "any_window": "True where a row with a penalty has penalty_last_n",
        "any_ordered_rule": "True where a row has a rule that looks at the ids in order",
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
        temperature, top_p, repetition_penalty, frequency_penalty, presence_penalty: float32.
        top_k, min_tokens_to_keep: int32.
        repetition_penalty_scope: int32, 0 for "all" and 1 for "output".
        penalty_last_n: int32; kernels find it in the history.
        min_p_cut: float32, in place of ``min_p``: step 13's depth ``2^-18 - log2(min_p)`` in
            octaves, worked out once so that no backend's logarithm can disagree; inf where min-p is
            off.
        seed: int64, the seed's 64 bits; of no meaning where ``unseeded``.
        logit_bias_offsets: int64 ``(rows + 1,)``; row r owns entries ``offsets[r]`` up to
            ``offsets[r + 1] - 1``.
        logit_bias_ids, logit_bias_values: int32 and float32 ``(entries,)``; bad words of a single
            id are among them, as bans.
        dry_multiplier, dry_base: float32; these and the following are None where no row has a rule
            that looks at the history.
        dry_allowed_length, dry_penalty_last_n, no_repeat_ngram_size, no_repeat_ngram_window,
            min_tokens: int32.
        sequence_offsets: int64 ``(rows + 1,)``; row r owns elements ``offsets[r]`` up to
            ``offsets[r + 1] - 1`` of ``sequences``.
        sequences: int32, the token sequences of the rules: records of a kind, the number of ids and
            the ids, as :func:`llm_sampling.sequence_rules.packed_sequences` makes them.
        unseeded: bool, True where the row has no seed; None if every row has one.
        position: int64, how many tokens each request has produced so far; None if not given.
        needs_history: whether any row has a penalty or a rule that looks at the history.
        all_greedy: whether every row has temperature 0.
        any_filter: whether any row has top-k, top-p or min-p.
        kept_at_most: no row's step 11 keeps more tokens than this; 0 if one may keep any number.
        any_top_k: whether any row has top-k or is greedy.
        any_top_p: whether any row has top-p.
        any_floor: whether any row has top-p or min-p and a ``min_tokens_to_keep`` above 1.
        any_output_scope: whether any row has the ``repetition_penalty_scope`` "output".
        any_window: whether any row with a penalty has ``penalty_last_n``.
        any_ordered_rule: whether any row has a rule that looks at the ids in order.

    The ten flags are read on the host, to choose a kernel or the messages between ranks. Tensors
    may be changed in place, except under the replay of a captured graph, which reads no flag: build
    it with conservative flags then, which are the defaults of the last seven,
    ``needs_history=True``, ``all_greedy=False`` and ``any_filter=True``.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p_cut: Tensor
    repetition_penalty: Tensor
    repetition_penalty_scope: Tensor
    penalty_last_n: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    min_tokens_to_keep: Tensor
    seed: Tensor
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
    any_output_scope: bool = True
    any_window: bool = True
    any_ordered_rule: bool = True
    dry_multiplier: Tensor | None = None
    dry_base: Tensor | None = None
    dry_allowed_length: Tensor | None = None
    dry_penalty_last_n: Tensor | None = None
    no_repeat_ngram_size: Tensor | None = None
    no_repeat_ngram_window: Tensor | None = None
    min_tokens: Tensor | None = None
    sequence_offsets: Tensor | None = None
    sequences: Tensor | None = None

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
        batch = _pack(rows, None, torch.device(device))
        if positions is None:
            return batch
        return replace(batch, position=positions_tensor(positions, len(rows), batch.device))

    @classmethod
    def repeat(
        cls, params: SamplingParams, rows: int, *, device: torch.device | str = "cpu"
    ) -> BatchParams:
        """Pack one :class:`SamplingParams` for ``rows`` rows into tensors on ``device``.

        Inside ``torch.compile`` and ``torch.export`` the number of rows may be dynamic.
        """
        return _pack([params], rows, torch.device(device))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.temperature.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.temperature.device

    @property
    def has_rules(self) -> bool:
        """Whether it has the tensors of the rules that look at the history."""
        return self.dry_multiplier is not None

    def without_rules(self) -> BatchParams:
        """The same rows without the rules that look at the history."""
        if not self.has_rules:
            return self
        none: dict[str, Any] = dict.fromkeys(RULE_TENSORS)
        return replace(self, any_ordered_rule=False, **none)

    @property
    def columns(self) -> list[Column]:
        """The columns that it has."""
        return [column for _, column in COLUMNS if getattr(self, column.name) is not None]

    def rows_with_penalties(self) -> list[bool]:
        """Whether each row has a penalty. Waits for the device."""
        columns = [getattr(self, c.name) != c.off for c in _PENALTIES]
        is_on: list[bool] = torch.stack(columns).any(0).tolist()
        return is_on

    def checked(self) -> BatchParams:
        """Itself, or the same tensors with other flags where a tensor was changed in place.

        The first use checks everything. Later ones check again what has changed since: on the CPU
        by its values, elsewhere by torch's version counters, after which the flags are the
        conservative ones; everywhere by its memory, which assigning ``.data`` exchanges.

        Raises:
            ValueError: a tensor is not what this class says, or holds a value out of its range, or
                a flag promises what the tensors do not keep. Values are looked at on the CPU only.
        """
        if torch.compiler.is_compiling():
            return self  # the op checks the tensors when the graph runs
        known: tuple[Any, BatchParams] | None = vars(self).get("_known")
        if known is None or is_traced():
            if not self._check_tensors() or is_traced():
                return self
            if self.device.type == "cpu":
                self._check_flags(*self._check_values())
            known = self._state(), self
        elif known[0] != (state := self._state()):
            self._check_tensors()
            if self.device.type == "cpu":
                flags = _flags(*self._check_values())
            else:
                flags = dict(CONSERVATIVE_FLAGS)
                names = [column.name for column in _PENALTIES]
                if all(state[name] == known[0][name] for name in names):
                    flags["needs_history"] = self.needs_history
                if state[_WINDOW.name] == known[0][_WINDOW.name]:
                    flags["any_window"] = self.any_window
            known = state, replace(self, **flags)
        vars(self)["_known"] = known  # no field, so what `replace` makes is checked anew
        return known[1]

    def _state(self) -> dict[str, Any]:
        """What tells whether a tensor has other memory, or other values from which flags follow."""
        on_cpu, state = self.device.type == "cpu", {}
        for name in DTYPES:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            values: object = None
            if name not in ("seed", "unseeded", "position"):  # no flag follows from them
                values = tensor.numpy().tobytes() if on_cpu else version_of(tensor)
            state[name] = (values, tensor.data_ptr(), tensor.shape, tensor.stride())
        return state

    def _check_tensors(self) -> bool:
        """Check everything but values. Returns whether the tensors' memory can be looked at."""
        is_plain = True
        rows = self.temperature.shape[0] if isinstance(self.temperature, Tensor) else 0
        entries = self.logit_bias_ids.shape[0] if isinstance(self.logit_bias_ids, Tensor) else 0
        if len({getattr(self, name) is None for name in RULE_TENSORS}) > 1:
            given = [name for name in RULE_TENSORS if getattr(self, name) is not None]
            raise ValueError(
                f"{', '.join(RULE_TENSORS)} must be given together or not at all, got {given}"
            )
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name in _OPTIONAL:
                continue
            is_plain &= not is_wrapper(writable(name, tensor))
            shape = (rows,)
            if name in ("logit_bias_offsets", "sequence_offsets"):
                shape = (rows + 1,)
            elif name.startswith("logit_bias"):
                shape = (entries,)
            elif name == "sequences":
                shape = (tensor.numel(),)
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
        return is_plain

    def _check_values(self) -> tuple[dict[str, list[float]], list[int]]:
        """Check the numbers, which are on the CPU. Returns the columns and the sequences."""
        for column in self.columns:
            column.check(getattr(self, column.name))
        BIAS_VALUES.check(self.logit_bias_values)
        columns = {c.name: getattr(self, c.name).tolist() for c in self.columns}
        entries = self.logit_bias_ids.shape[0]
        offsets = _checked_offsets("logit_bias_offsets", self.logit_bias_offsets, entries)
        sequences: list[int] = []
        if self.sequences is not None:
            sequences = self.sequences.tolist()
            ends = _checked_offsets("sequence_offsets", self.sequence_offsets, len(sequences))
            for begin, end in itertools.pairwise(ends):
                _check_records(sequences[begin:end])
        ids = self.logit_bias_ids
        is_rising = ids[1:] > ids[:-1]
        is_rising[[end - 1 for end in offsets if 0 < end < entries]] = True  # another row's begin
        if not bool(is_rising.all()):
            raise refusal("logit_bias_ids", "strictly ascending within each row", ids.tolist())
        return columns, sequences

    def _check_flags(
        self, columns: Mapping[str, Sequence[float]], sequences: Sequence[int]
    ) -> None:
        for name, least in _flags(columns, sequences).items():
            given = getattr(self, name)
            if name == "kept_at_most":
                is_true = not given or 0 < least <= given
            else:
                is_true = given in (least, CONSERVATIVE_FLAGS[name])
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
        with not_of_inference_mode():
            fresh = fresh_seeds(self.rows).to(self.device, non_blocking=True)
            seed = torch.where(self.unseeded, fresh, self.seed)
            return replace(self, seed=seed, unseeded=None)


def seeds_of(params: Sequence[SamplingParams]) -> list[int]:
    """The seed of each row as a signed integer; those without one get a fresh one."""
    seeds = [row._signed_seed for row in params]  # type: ignore[attr-defined]
    if all(row.seed is not None for row in params):
        return seeds
    fresh = fresh_seeds(len(seeds)).tolist()
    zipped = zip(params, seeds, fresh, strict=True)
    return [new if row.seed is None else seed for row, seed, new in zipped]


def fresh_seeds(rows: int) -> Tensor:
    """Seeds from torch's default generator, int64 ``(rows,)`` on the CPU."""
    return torch.randint(-(2**63), 2**63 - 1, (rows,), dtype=torch.int64, device="cpu")


def _pack(
    params: Sequence[SamplingParams], repeats: int | None, device: torch.device
) -> BatchParams:
    """Pack one row for each of ``params``, or ``repeats`` rows for the only one of them."""

    def floats(values: Sequence[Any], device: torch.device = device) -> Tensor:
        if not (values and torch.compiler.is_dynamo_compiling()):
            return torch.tensor(values, dtype=torch.float32, device=device)
        # A symbol stays one in a graph where it is added to a tensor; elsewhere it becomes a
        # constant, and the graph is compiled anew for every other number.
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return torch.stack([zero + value for value in values])

    def tensor(values: Sequence[Any], dtype: torch.dtype, device: torch.device = device) -> Tensor:
        if dtype == torch.float32 and torch.compiler.is_dynamo_compiling():
            packed = floats(values, device)
            return packed if repeats is None else packed.expand(repeats).contiguous()
        if repeats is None:
            return torch.tensor(values, dtype=dtype, device=device)
        return torch.full((repeats,), values[0], dtype=dtype, device=device)

    with not_of_inference_mode():
        columns: dict[str, Sequence[Any]] = {}
        tensors: dict[str, Any] = {}
        rows = None if torch.compiler.is_dynamo_compiling() else [row.packed for row in params]
        has_rules = any(row.has_rules for row in params)
        for place, (parameter, column) in enumerate(COLUMNS):
            if parameter.kind == "rule" and not has_rules:
                continue
            if rows is not None:
                values = [row.numbers[place] for row in rows]
            else:
                values = [getattr(row, parameter.name) for row in params]
                is_exact = parameter.is_integer or bool(parameter.choices)
                if is_exact:
                    values = [number_of(parameter, column, value) for value in values]
                elif parameter.packed is not None:
                    # the values may be symbols, which have no logarithm
                    raw = tensor(values, torch.float32, torch.device("cpu"))
                    op = torch.ops.llm_sampling.pack
                    tensors[column.name] = op(raw, parameter.name).to(device)
                    values = [column.off if value == parameter.off else value for value in values]
            columns[column.name] = values
            if column.name not in tensors:
                tensors[column.name] = tensor(values, column.dtype)
        entries = [entry for row in params for entry in row.bans.items()]
        ids = torch.tensor([i for i, _ in entries], dtype=torch.int32, device=device)
        bias = floats([x for _, x in entries])
        offsets = _offsets([len(row.bans) for row in params], repeats, device)
        packed: list[int] = []
        if has_rules:
            packed = [number for row in params for number in row.sequences]
            lengths = [len(row.sequences) for row in params]
            sequences = torch.tensor(packed, dtype=torch.int32, device=device)
            tensors["sequence_offsets"] = _offsets(lengths, repeats, device)
            tensors["sequences"] = sequences if repeats is None else sequences.repeat(repeats)
        if repeats is not None:
            ids, bias = ids.repeat(repeats), bias.repeat(repeats)
        unseeded = [int(row.seed is None) for row in params]
        return BatchParams(
            **tensors,
            seed=tensor([row._signed_seed for row in params], torch.int64),  # type: ignore[attr-defined]
            logit_bias_offsets=offsets,
            logit_bias_ids=ids,
            logit_bias_values=bias,
            unseeded=tensor(unseeded, torch.bool) if any(unseeded) else None,
            position=None,
            **_flags(columns, packed),
        )


def _offsets(lengths: Sequence[int], repeats: int | None, device: torch.device) -> Tensor:
    """Where each row's part begins, and where the last one ends.

    Args:
        lengths: of the parts.
        repeats: how many rows have the only part; None where each row has its own.
        device: of the result.
    """
    if repeats is not None:
        return torch.arange(repeats + 1, dtype=torch.int64, device=device) * lengths[0]
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int64, device=device)


def _checked_offsets(name: str, offsets: Tensor | None, size: int) -> list[int]:
    """The offsets as ints; a ValueError if they do not rise from 0 to ``size``."""
    assert offsets is not None
    values: list[int] = offsets.tolist()
    if values != sorted(values) or values[0] != 0 or values[-1] != size:
        raise refusal(name, f"ascending from 0 to {size}", values)
    return values


def _check_records(packed: Sequence[int]) -> None:
    """A ValueError if a row's part of ``sequences`` is not as ``packed_sequences`` makes it."""
    rule = "records of a kind, the number of ids (1 at least), and the ids"
    place = 0
    while place < len(packed):
        kind, count = [*packed[place : place + 2], -1][:2]
        end = place + 2 + count
        ids = packed[place + 2 : end]
        if not (0 <= kind <= STOP_IDS and count >= 1 and end <= len(packed) and min(ids) >= 0):
            raise refusal("sequences", rule, packed[place:end])
        if kind == BREAKER_IDS and [*ids] != sorted(set(ids)):
            raise refusal("sequences", "breakers of a single id strictly ascending", ids)
        place = end


def int64_column(name: str, tensor: object, rows: int, device: torch.device | str | None) -> Tensor:
    """A copy of an int64 tensor ``(rows,)`` on the device; a ValueError if it is another one."""
    tensor = readable(name, tensor)
    if tensor.dtype != torch.int64 or tensor.shape != (rows,):
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be torch.int64 of shape ({rows},), got {got}")
    return tensor.to(tensor.device if device is None else device, copy=True)


def plain(params: SamplingParams) -> dict[str, Any]:
    """The parameters as a dict of numbers, of which ``SamplingParams(**...)`` makes the same."""
    bias = params.logit_bias
    return {**asdict(params), "logit_bias": None if bias is None else dict(bias)}


def checked_position(name: str, position: object) -> int:
    """``position`` as the int64 that has its bits; a ValueError if it is not in [-2^63, 2^64)."""
    value = checks.integer(name, position, "integers")
    if not -(2**63) <= value < 2**64:
        raise refusal(name, "in [-2^63, 2^64)", position)
    return as_int64(value)


def positions_tensor(
    positions: Sequence[int] | Tensor, rows: int, device: torch.device, name: str = "positions"
) -> Tensor:
    """``positions`` as a contiguous int64 ``(rows,)`` tensor on ``device``.

    Raises:
        ValueError: it has another length, another device, or is not made of integers.
    """
    if isinstance(positions, Tensor):
        positions = readable(name, positions)
        dtype = positions.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise refusal(name, "integers", dtype)
        if positions.device != device:
            raise ValueError(
                f"{name} must be on the logits' device {device}, got {positions.device}"
            )
        tensor = positions.to(torch.int64)
    else:
        if not isinstance(positions, Iterable):
            raise refusal(name, "integers, one per row", positions)
        values = [checked_position(name, value) for value in positions]
        tensor = to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
    if tensor.shape != (rows,):
        raise refusal(name, f"of shape ({rows},)", tuple(tensor.shape))
    return tensor.contiguous()
