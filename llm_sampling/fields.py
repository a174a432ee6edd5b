"""The table of the parameters. Whatever is said of a parameter in several places is said here once.

The checks of :class:`~llm_sampling.SamplingParams` and :class:`~llm_sampling.BatchParams`, the
values at which parameters are off, the options of the commands, the page of ``explain`` and the
tables of the documentation are made from :data:`FIELDS`.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.checks import refusal

#: The least number that is infinite as a float32, and the largest one that is 0.
_ROUNDED_TO_INF, _ROUNDED_TO_0 = 2.0**128 - 2.0**103, 2.0**-150

#: What a parameter does to a row. "rank", "mass" and "depth" are the filters: the three ways to cut
#: the order of the tokens. "floor" is the number of tokens that no filter goes below. "scope" says
#: which ids a penalty is for. "rule" and "sequences" are those of the rules that look at the ids in
#: order: numbers, and token sequences.
Kind = Literal[
    "bias",
    "penalty",
    "scope",
    "rule",
    "sequences",
    "scale",
    "rank",
    "mass",
    "depth",
    "floor",
    "seed",
]

#: What token sequences must be, in words.
SEQUENCES = "a sequence of token sequences, each with an id in [0, 2^31) at least"

#: The values of ``repetition_penalty_scope`` -> their number in every kernel.
SCOPES = {"all": 0, "output": 1}


@dataclass(frozen=True)
class Column:
    """How a batch and the kernels hold a parameter: a tensor with a number for each row.

    Attributes:
        name: of the tensor in :class:`BatchParams`, in the C struct and in the ops.
        dtype: of the tensor.
        off: the number at which the parameter does nothing.
        rule: what a number must be, in words; a message reads "NAME must be RULE, got VALUE".
        holds: whether numbers keep the rule, for a number or a tensor of them.
        pack: the number for a parameter's value, a float already rounded to float32.
    """

    name: str
    dtype: torch.dtype
    off: float
    rule: str
    holds: Callable[[Any], Any]
    pack: Callable[[Any], Any] = lambda value: value

    def check(self, tensor: Tensor) -> None:
        """Check every row's number.

        Raises:
            ValueError: a number breaks the rule; the message names the first such place.
        """
        good = self.holds(tensor)
        if not bool(good.all()):
            place = int((~good).nonzero()[0])
            raise refusal(f"{self.name}[{place}]", self.rule, tensor[place].item())


@dataclass(frozen=True)
class Field:
    """Everything that is said of one parameter in more than one place.

    Attributes:
        name: of the field of :class:`SamplingParams`.
        kind: what it does.
        off: the value at which it does nothing.
        rule: what a value must be, in words; a message reads "NAME must be RULE, got VALUE".
        holds: whether a value keeps the rule; not for ``logit_bias`` and token sequences.
        holds_in_column: the same for a tensor of values that were rounded to float32, where
            rounding makes a difference.
        dtype: of the column; None for ``logit_bias``, ``seed`` and token sequences, which have
            none.
        packed: the column where it does not hold the parameter's own value.
        choices: the strings that it may be; none where it is a number.
        range: the values that it may have, as the tables of the documentation print them.
        off_text: the same of the values at which it is off.
        step: the numbers of its steps in docs/semantics.md.
        meaning: what it does, as README's table says it.
        help: the same for the command line.
    """

    name: str
    kind: Kind
    off: Any
    rule: str
    holds: Callable[[Any], Any]
    dtype: torch.dtype | None
    range: str
    off_text: str
    step: str
    meaning: str
    help: str
    holds_in_column: Callable[[Any], Any] | None = None
    packed: Column | None = None
    choices: tuple[str, ...] = ()

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.off, int) or self.kind == "seed"

    @functools.cached_property
    def column(self) -> Column | None:
        """Its column of a batch, or None if it has none."""
        if self.packed is not None or self.dtype is None:
            return self.packed
        holds = self.holds_in_column or self.holds
        return Column(self.name, self.dtype, self.off, self.rule, holds)

    def checked(self, value: object) -> Any:
        """``value`` as an int, a float or one of the choices.

        Raises:
            ValueError: it breaks the rule.
        """
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise refusal(self.name, self.rule, value)
            return value
        number: Any
        if self.is_integer:
            number = checks.integer(self.name, value, self.rule)
        else:
            number = checks.number(self.name, value, self.rule)
        if not self.holds(number):
            raise refusal(self.name, self.rule, value)
        return number


#: The parameters, in the order of the fields of :class:`SamplingParams`.
FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        field.name: field
        for field in (
            Field(
                "temperature",
                kind="scale",
                off=1.0,
                rule="finite and >= 0 in float32",
                holds=lambda t: (t >= 0) & (t < _ROUNDED_TO_INF),
                dtype=torch.float32,
                range="finite, >= 0",
                off_text="1; greedy at 0",
                step="8, 9",
                meaning="divides the logits; 0 is greedy",
                help="Divide the logits by this; 0 takes the best token.",
            ),
            Field(
                "top_k",
                kind="rank",
                off=0,
                rule="an integer >= -1",
                holds=lambda k: k >= -1,
                dtype=torch.int32,
                range="integer >= -1",
                off_text="0 and -1",
                step="11",
                meaning="keep exactly this many, ties cut by token id",
                help="Keep this many of the best tokens; 0 is off.",
            ),
            Field(
                "top_p",
                kind="mass",
                off=1.0,
                rule="in (0, 1]",
                holds=lambda p: (p > 0) & (p <= 1),
                holds_in_column=lambda p: (p >= 0) & (p <= 1),  # a tiny one is rounded to 0
                dtype=torch.float32,
                range="(0, 1]",
                off_text="1",
                step="12",
                meaning="keep the shortest prefix of that mass, crossing token included",
                help="Keep the best tokens that hold this share of the mass; 1 is off.",
            ),
            Field(
                "min_p",
                kind="depth",
                off=0.0,
                rule="in [0, 1]",
                holds=lambda p: (p >= 0) & (p <= 1),
                dtype=torch.float32,
                packed=Column(
                    "min_p_cut",
                    dtype=torch.float32,
                    off=math.inf,
                    rule="2^-18 - log2(min_p), or inf where min-p is off",
                    holds=lambda cut: cut >= 0,
                    pack=lambda p: 2.0**-18 - math.log2(p) if p > 0 else math.inf,
                ),
                range="[0, 1]",
                off_text="0",
                step="13",
                meaning="keep what is at least so likely relative to the best token",
                help="Keep tokens at least this likely, relative to the best; 0 is off.",
            ),
            Field(
                "repetition_penalty",
                kind="penalty",
                off=1.0,
                rule="finite and > 0 in float32",
                holds=lambda r: (r > _ROUNDED_TO_0) & (r < _ROUNDED_TO_INF),
                dtype=torch.float32,
                range="finite, > 0",
                off_text="1",
                step="3",
                meaning="for every token of prompt and output",
                help="Scale down the tokens of prompt and text; 1 is off.",
            ),
            Field(
                "frequency_penalty",
                kind="penalty",
                off=0.0,
                rule="in [-2, 2]",
                holds=lambda a: (a >= -2) & (a <= 2),
                dtype=torch.float32,
                range="[-2, 2]",
                off_text="0",
                step="4",
                meaning="times how often the output holds the token",
                help="Subtract this for each time the text has the token; 0 is off.",
            ),
            Field(
                "presence_penalty",
                kind="penalty",
                off=0.0,
                rule="in [-2, 2]",
                holds=lambda b: (b >= -2) & (b <= 2),
                dtype=torch.float32,
                range="[-2, 2]",
                off_text="0",
                step="5",
                meaning="once for every token of the output",
                help="Subtract this once if the text has the token; 0 is off.",
            ),
            Field(
                "min_tokens_to_keep",
                kind="floor",
                off=1,
                rule="an integer >= 1",
                holds=lambda n: n >= 1,
                dtype=torch.int32,
                range="integer >= 1",
                off_text="1",
                step="11, 12, 13",
                meaning="no filter leaves fewer",
                help="No filter leaves fewer tokens than this.",
            ),
            Field(
                "logit_bias",
                kind="bias",
                off=None,
                rule="a mapping of token id to bias",
                holds=lambda bias: True,  # _checked_bias looks at every entry
                dtype=None,
                range="token id to a bias in [-100, 100], or -inf",
                off_text="None",
                step="2",
                meaning="added before the penalties",
                help="Add BIAS to the logit of token ID; repeatable.",
            ),
            Field(
                "seed",
                kind="seed",
                off=None,
                rule="an integer in [0, 2^64), or None for a new one each time",
                holds=lambda seed: 0 <= seed < 2**64,
                dtype=None,
                range="integer in [0, 2^64)",
                off_text="None: a fresh one is drawn",
                step="14",
                meaning="None draws one from torch's default generator",
                help="The same seed gives the same text. Default: a new one each time.",
            ),
            Field(
                "repetition_penalty_scope",
                kind="scope",
                off="all",
                rule='"all" or "output"',
                holds=lambda scope: True,  # it is one of the choices
                dtype=torch.int32,
                packed=Column(
                    "repetition_penalty_scope",
                    dtype=torch.int32,
                    off=SCOPES["all"],
                    rule="0 (all) or 1 (output)",
                    holds=lambda scope: (scope == 0) | (scope == 1),
                    pack=SCOPES.__getitem__,
                ),
                choices=tuple(SCOPES),
                range='"all", "output"',
                off_text='"all"',
                step="3",
                meaning="whether the repetition penalty is for prompt and output or output alone",
                help="Which tokens the repetition penalty is for: all, or those of the text.",
            ),
            Field(
                "penalty_last_n",
                kind="scope",
                off=-1,
                rule="an integer >= -1",
                holds=lambda n: n >= -1,
                dtype=torch.int32,
                range="integer >= -1",
                off_text="-1",
                step="3, 4, 5",
                meaning="the penalties are for the last so many ids of prompt and output",
                help="The penalties are for the last so many tokens; -1 is all.",
            ),
            Field(
                "dry_multiplier",
                kind="rule",
                off=0.0,
                rule="in [0, 100]",
                holds=lambda m: (m >= 0) & (m <= 100),
                dtype=torch.float32,
                range="[0, 100]",
                off_text="0",
                step="5a",
                meaning="DRY: subtracted from tokens that would repeat an earlier sequence",
                help="Subtract this, and more, from what would repeat a sequence; 0 is off.",
            ),
            Field(
                "dry_base",
                kind="rule",
                off=1.75,
                rule="in [1, 100]",
                holds=lambda base: (base >= 1) & (base <= 100),
                dtype=torch.float32,
                range="[1, 100]",
                off_text="1.75",
                step="5a",
                meaning="DRY: each further token of the repeated sequence multiplies it by this",
                help="Multiply it by this for each further token of the repeated sequence.",
            ),
            Field(
                "dry_allowed_length",
                kind="rule",
                off=2,
                rule="an integer >= 1",
                holds=lambda length: length >= 1,
                dtype=torch.int32,
                range="integer >= 1",
                off_text="2",
                step="5a",
                meaning="DRY: shorter sequences may be repeated",
                help="Shorter sequences than this many tokens may be repeated.",
            ),
            Field(
                "dry_penalty_last_n",
                kind="rule",
                off=-1,
                rule="an integer >= -1",
                holds=lambda n: n >= -1,
                dtype=torch.int32,
                range="integer >= -1",
                off_text="-1",
                step="5a",
                meaning="DRY: looks at the last so many ids of prompt and output",
                help="DRY looks at the last so many tokens; -1 is all.",
            ),
            Field(
                "dry_breakers",
                kind="sequences",
                off=None,
                rule=SEQUENCES,
                holds=lambda sequences: True,  # checks.token_sequences looks at every id
                dtype=None,
                range="token sequences",
                off_text="None",
                step="5a",
                meaning="DRY: no repeated sequence goes across one of these",
                help="Token ids ID,ID,... that no repeated sequence goes across; repeatable.",
            ),
            Field(
                "no_repeat_ngram_size",
                kind="rule",
                off=0,
                rule="an integer >= 0",
                holds=lambda size: size >= 0,
                dtype=torch.int32,
                range="integer >= 0",
                off_text="0",
                step="5a",
                meaning="no sequence of so many ids comes twice",
                help="No sequence of so many tokens comes twice; 0 is off.",
            ),
            Field(
                "no_repeat_ngram_window",
                kind="rule",
                off=0,
                rule="an integer >= 0",
                holds=lambda window: window >= 0,
                dtype=torch.int32,
                range="integer >= 0",
                off_text="0",
                step="5a",
                meaning="that rule looks at the last so many ids of prompt and output",
                help="That rule looks at the last so many tokens; 0 is all.",
            ),
            Field(
                "bad_words",
                kind="sequences",
                off=None,
                rule=SEQUENCES,
                holds=lambda sequences: True,
                dtype=None,
                range="token sequences",
                off_text="None",
                step="5a",
                meaning="none of these sequences is completed",
                help="Token ids ID,ID,... that are never completed; repeatable.",
            ),
            Field(
                "min_tokens",
                kind="rule",
                off=0,
                rule="an integer >= 0",
                holds=lambda n: n >= 0,
                dtype=torch.int32,
                range="integer >= 0",
                off_text="0",
                step="5a",
                meaning="`stop_token_ids` are banned until the output has so many ids",
                help="Ban --stop-token-ids until the text has so many tokens; 0 is off.",
            ),
            Field(
                "stop_token_ids",
                kind="sequences",
                off=None,
                rule="a sequence of token ids in [0, 2^31)",
                holds=lambda ids: True,
                dtype=None,
                range="token ids",
                off_text="None",
                step="5a",
                meaning="what `min_tokens` bans; `generate` ends a text there",
                help="Token ids ID,ID,... that end the text, and that --min-tokens bans.",
            ),
        )
    }
)

#: The values of ``logit_bias``: one number for each token id with a bias, and not for each row.
BIAS_VALUES = Column(
    "logit_bias_values",
    dtype=torch.float32,
    off=0.0,
    rule="in [-100, 100], or -inf to ban the token",
    holds=lambda bias: (bias >= -100) & (bias <= 100) | (bias == -math.inf),
)

#: The value at which each parameter does nothing. ``None`` stands for it everywhere, and so does
#: ``top_k=-1``, as in Hugging Face and vLLM. ``temperature`` 1 divides by one; 0 is greedy.
OFF_VALUES: Mapping[str, Any] = MappingProxyType({f.name: f.off for f in FIELDS.values()})


def to_float32(value: float) -> float:
    """The float32 nearest to ``value``, as the kernels read it; inf where it overflows."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
