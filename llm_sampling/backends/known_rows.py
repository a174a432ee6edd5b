"""Rows whose tokens are known, for vocabularies of any size from 96 tokens on.

known_rows.json has the answers, which ``python tests/sampling/make_known_rows.py`` works out with
the reference. All rows have the same logits and the same history. Of the tokens, 96 matter, which
are spread over the vocabulary: their logits are 0 to 6, in steps of 1/16, which every dtype has.
All others are finite, and so far below that their mass is 0. So the answer, as a number of these 96
tokens, is the same for every vocabulary and every dtype.

The rows are chosen so that faults show: a kept set that is one token longer or shorter gives
another token, and where top-p cuts, a mass that is rounded otherwise gives another kept set.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_sampling.backends.base import SampleCall, SampleOutput
from llm_sampling.history import TokenHistory
from llm_sampling.masks import pack_mask
from llm_sampling.params import BatchParams, SamplingParams

#: How many tokens matter, and so the smallest vocabulary.
TOKENS = 96

#: The parameters that need a history.
PENALTIES = frozenset({"repetition_penalty", "frequency_penalty", "presence_penalty"})


class Kind(NamedTuple):
    """What the rows have besides logits and parameters."""

    history: bool
    mask: bool
    bias: bool

    @property
    def name(self) -> str:
        """The name of its answers."""
        return "+".join(name for name, has in self._asdict().items() if has) or "plain"


#: Every kind.
KINDS = tuple(
    Kind(history, mask, bias)
    for history in (False, True)
    for mask in (False, True)
    for bias in (False, True)
)


class Answer(NamedTuple):
    """The right answer of a row.

    Attributes:
        token: an id in the vocabulary.
        kept: how many tokens the kept set has; None where it is the whole vocabulary.
    """

    token: int
    kept: int | None


@functools.cache
def data() -> dict[str, Any]:
    """What known_rows.json holds."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return found


def count() -> int:
    """How many rows there are."""
    return len(data()["rows"])


def places(vocab_size: int) -> Tensor:
    """The ids of the tokens that matter, rising; int64 ``(96,)``."""
    stride = vocab_size // TOKENS
    number = torch.arange(TOKENS, device="cpu")
    return number * stride + number * 7919 % stride


def row_of_logits(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """The logits of every row, ``(vocab_size,)`` on the CPU."""
    row = torch.arange(vocab_size, device="cpu") * 40503 % 64 * -0.25 - 48.0
    row[places(vocab_size)] = torch.tensor(data()["sixteenths"], device="cpu") / 16.0
    return row.to(dtype)


def row_of_mask(vocab_size: int) -> Tensor:
    """Which tokens the mask of a row allows, bool ``(vocab_size,)`` on the CPU."""
    allowed = torch.ones(vocab_size, dtype=torch.bool, device="cpu")
    allowed[places(vocab_size)[data()["banned"]]] = False
    return allowed


class KnownRows:
    """Known rows of one kind, of one vocabulary, on one device.

    Args:
        kind: what they have.
        vocab_size: 96 .. 2^20.
        dtype: of the logits.
        device: of all tensors.
    """

    def __init__(
        self, kind: Kind, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind, self.vocab_size, self.device = kind, vocab_size, device
        self.ids = places(vocab_size).tolist()
        self.logits = row_of_logits(vocab_size, dtype).to(device)
        self.mask: Tensor | None = None
        if kind.mask:
            self.mask = pack_mask(row_of_mask(vocab_size), vocab_size).to(device)
        self.history: TokenHistory | None = None
        if kind.history:
            prompt, output = ([self.ids[i] for i in data()[name]] for name in ("prompt", "output"))
            self.history = TokenHistory.from_ids([prompt], [output], vocab_size, device=device)

    def call(self, rows: Sequence[int]) -> SampleCall:
        """A call that draws these rows and changes nothing; they share memory where they can."""
        count = len(rows)
        slots = torch.zeros(count, dtype=torch.int32, device=self.device)
        return SampleCall(
            logits=self.logits.expand(count, self.vocab_size),
            batch=BatchParams.from_list(
                [self._params(row) for row in rows], positions=list(rows), device=self.device
            ),
            history=None if self.history is None else self.history.with_slots(slots),
            allowed_mask=None if self.mask is None else self.mask.expand(count, -1),
        )

    def _params(self, row: int) -> SamplingParams:
        given = dict(data()["rows"][row])
        if self.kind.bias:
            bias = data()["bias"].items()
            given["logit_bias"] = {self.ids[int(token)]: value for token, value in bias}
        if not self.kind.history:
            given = {name: value for name, value in given.items() if name not in PENALTIES}
        return SamplingParams(**given)

    def answers(self, rows: Sequence[int]) -> list[Answer]:
        """The right answers of these rows."""
        of_kind = data()["answers"][self.kind.name]
        return [Answer(self.ids[of_kind["tokens"][row]], of_kind["kept"][row]) for row in rows]

    def difference(self, output: SampleOutput, rows: Sequence[int]) -> str | None:
        """What is wrong first with the results of these rows; None if all are right."""
        tokens = output.tokens.view(len(rows), -1)[:, 0].tolist()
        found = zip(rows, self.answers(rows), tokens, output.status.tolist(), strict=True)
        for row, answer, token, status in found:
            if token != answer.token:
                return f"it gave token {token} for {self._name(row)}, expected {answer.token}"
            if status != 0:
                return f"it gave status {status} for {self._name(row)}, expected 0"
        return None

    def filtered_difference(self, filtered: Tensor, rows: Sequence[int]) -> str | None:
        """What is wrong first with the filtered logits of these rows; None if all are right."""
        kept = (filtered > -torch.inf).sum(1).tolist()
        for row, answer, number in zip(rows, self.answers(rows), kept, strict=True):
            if answer.kept is not None and number != answer.kept:
                return f"it kept {number} tokens of {self._name(row)}, expected {answer.kept}"
        return None

    def _name(self, row: int) -> str:
        return f"known row {row} ({self.kind.name}, vocab_size {self.vocab_size})"
