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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_sampling.backends.base import SampleCall
from llm_sampling.history import TokenHistory
from llm_sampling.masks import pack_mask
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.results import SampleOutput

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


def rows_for(*, all_greedy: bool, any_filter: bool) -> list[int]:
    """The rows for a kernel that draws nothing if all are greedy, and has no filters if none has.

    The last one is not greedy where any row draws.
    """
    found = []
    for number, row in enumerate(data()["rows"]):
        is_greedy = row["temperature"] == 0
        has_filter = any(name in row for name in ("top_k", "top_p", "min_p"))
        if is_greedy or (not all_greedy and (any_filter or not has_filter)):
            found.append(number)
    return found


def places(vocab_size: int) -> Tensor:
    """The ids of the tokens that matter, rising; int64 ``(96,)``."""
    bounds = torch.arange(TOKENS + 1, device="cpu") * vocab_size // TOKENS
    number = torch.arange(TOKENS, device="cpu")
    return bounds[:-1] + number * 7919 % bounds.diff()


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

    def call_like(self, model: SampleCall, rows: Sequence[int]) -> SampleCall:
        """A call that draws these rows and has all that ``model`` has: text, slots, extra ids.

        So a kernel that is compiled for what a call has is the same for both. Its tensors are its
        own, and where ``model`` advances, it advances these. Where ``model`` has rules that look at
        the history, a rule bans some tokens that do not matter, whose logits are +inf.
        """
        count, device, kind = len(rows), self.device, self.kind
        plain = self.call(rows)
        beyond = model.logits.stride(0) - model.logits.shape[1] if len(model.logits) > 1 else 0
        stride = max(self.vocab_size + beyond, 0)
        memory = torch.empty(
            count * stride + self.vocab_size, dtype=self.logits.dtype, device=device
        )
        logits = memory.as_strided((count, self.vocab_size), (stride, 1))
        logits.copy_(plain.logits)
        batch = plain.batch
        if model.has_lists:
            banned = sorted({id_ + 1 for id_ in self.ids[:-1]}.difference(self.ids))
            logits[:, banned] = torch.inf
            batch = BatchParams.from_list(
                [self._params(row, banned) for row in rows], positions=list(rows), device=device
            )
        batch = replace(
            batch,
            all_greedy=model.batch.all_greedy,
            any_filter=model.batch.any_filter,
            any_output_scope=model.batch.any_output_scope,
        )
        extra = model.extra_output if kind.history else None
        history, slots = None, torch.arange(count, dtype=torch.int32, device=device)
        if kind.history:
            history = self._history_like(model, count, 0 if extra is None else extra.shape[1])
        if extra is not None:
            last = [self.ids[i] for i in data()["output"][-extra.shape[1] :]]
            extra = torch.tensor([last] * count, dtype=torch.int32, device=device)
        by_slot = model.param_slots
        if by_slot is not None:
            lengths = None
            if by_slot.position_of == "text":
                lengths = torch.ones(count, dtype=torch.int64, device=device)
            by_slot = replace(
                by_slot,
                of_rows=slots,
                bias_counts=batch.logit_bias_offsets.diff().to(torch.int32),
                prompt_lengths=lengths,
                sequence_counts=None
                if batch.sequence_offsets is None
                else batch.sequence_offsets.diff().to(torch.int32),
                max_sequence_ids=None,
            )
        return replace(
            model,
            logits=logits,
            batch=batch,
            history=history,
            allowed_mask=None if plain.allowed_mask is None else plain.allowed_mask.contiguous(),
            param_slots=by_slot,
            record=None if model.record is None else torch.ones_like(slots, dtype=torch.bool),
            extra_output=extra,
            vocab_slice=None,
        )

    def _history_like(self, model: SampleCall, rows: int, extra: int) -> TokenHistory:
        """A history for each row, without the last ids of the output if they are extra ones."""
        text = None if model.history is None else model.history.text
        prompt, output = ([self.ids[i] for i in data()[name]] for name in ("prompt", "output"))
        return TokenHistory.from_ids(
            [prompt] * rows,
            [output[: len(output) - extra]] * rows,
            self.vocab_size,
            max_length=None if text is None else len(prompt) + len(output) + 1,
            penalty_last_n=None if text is None or text.windows is None else -1,
            device=self.device,
        )

    def _params(self, row: int, banned: Sequence[int] = ()) -> SamplingParams:
        given = dict(data()["rows"][row])
        if banned:
            given |= {"min_tokens": 2**20, "stop_token_ids": banned}
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
