"""What every backend shares: the call that it is given, what it returns, and how a call fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llm_sampling.history import HistoryUpdate, TokenHistory
from llm_sampling.params import BatchParams
from llm_sampling.results import NOTHING, SampleOutput, Wanted, output_of, without_rows

PositionOf = Literal["row", "slot", "text"]

#: The values of ``ParamSlots.position_of`` -> their number in every kernel.
POSITION_MODES = {"row": 0, "slot": 1, "text": 2}

#: Status bits, a set of which is written for every row.
STATUS_NAN, STATUS_NO_CANDIDATE, STATUS_POS_INF, STATUS_TEXT_FULL = 1, 2, 4, 8

#: How many ids of extra history a row may have.
MAX_EXTRA_OUTPUT = 64


#: The process that imported the package; one with another id was forked from it.
IMPORTED_BY = os.getpid()


@dataclass(frozen=True, slots=True)
class ParamSlots:
    """The slots of a call whose batch has an entry for each slot and not for each row.

    Rows may have the same slot. A row whose slot is -1 is padding: its logits are not read, its
    token is -1 and its status 0. Any other slot that does not exist leaves no candidate.

    Attributes:
        of_rows: int32 ``(rows,)``, the slot of each row.
        bias_counts: int32 ``(slots,)``; slot s owns ``bias_counts[s]`` entries of the batch's
            biases, from ``logit_bias_offsets[s]`` on.
        position_of: what the entries of the batch's ``position`` belong to. "text": to rows, as the
            place in the whole text of the token whose logits these are; the row's position is
            ``position[row] + 1 - prompt_lengths[slot]``, and is not advanced.
        prompt_lengths: int64 ``(slots,)``, or None where ``position_of`` is not "text".
        any_bias: whether any slot has a bias.
        sequence_counts: int32 ``(slots,)``; slot s owns ``sequence_counts[s]`` elements of the
            batch's ``sequences``, from ``sequence_offsets[s]`` on. None where the batch has none.
        max_sequence_ids: how many elements a slot owns of these at most; None: it may be all.
    """

    of_rows: Tensor
    bias_counts: Tensor
    position_of: PositionOf = "row"
    prompt_lengths: Tensor | None = None
    any_bias: bool = True
    sequence_counts: Tensor | None = None
    max_sequence_ids: int | None = None

    def exist(self) -> Tensor:
        """Whether each row's slot is one that there is; bool ``(rows,)``."""
        return (self.of_rows >= 0) & (self.of_rows < self.bias_counts.shape[0])

    def are_named_once(self, history: TokenHistory | None) -> Tensor:
        """Whether each row is the only one with its slots, and has parameters; bool ``(rows,)``.

        Only such rows are advanced.
        """
        alone = self.exist()
        for slots in (self.of_rows,) if history is None else (self.of_rows, history.slots):
            alone = alone & ((slots[:, None] == slots).sum(-1) == 1)
        return alone


class VocabSlice(NamedTuple):
    """Which ids of a vocabulary a call has logits of: those from one on, as many as its logits.

    Attributes:
        first_id: the id of the first logit.
        vocab_size: how many ids the vocabulary has.
    """

    first_id: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class SampleCall:
    """Everything that a backend needs, checked by :mod:`llm_sampling.sample`.

    Attributes:
        logits: ``(rows, vocab_size)`` float32, float16 or bfloat16, last stride 1.
        batch: the parameters; every row has a seed, and ``position`` is set.
        history: penalty state of the same rows, or None.
        allowed_mask: int32 ``(rows, ceil(vocab_size / 32))``, last stride 1, or None.
        num_samples: draws per row.
        wanted: what is returned besides tokens and status.
        check: raise :class:`InvalidLogitsError` if any status is not 0.
        advance: after the draw add each row's token to the history and 1 to its position, in place,
            unless ``check`` raises. Rows of ``param_slots`` that share a slot are left out.
        param_slots: where ``batch`` has an entry for each slot: the slots of the rows; else None.
        record: bool ``(rows,)``, False for rows that ``advance`` leaves out; None: it leaves out
            none.
        extra_output: int32 ``(rows, n)``, n <= MAX_EXTRA_OUTPUT, contiguous: ids that come next in
            the output of the rows' histories, for this call alone. Those outside the vocabulary are
            padding. None: there are none.
        vocab_slice: what the logits are a part of, for the rules that look at the history: its
            text and the batch's token sequences have ids of the whole vocabulary. None: the logits
            are those of the whole vocabulary.
    """

    logits: Tensor
    batch: BatchParams
    history: TokenHistory | None
    allowed_mask: Tensor | None
    num_samples: int = 1
    wanted: Wanted = NOTHING
    check: bool = False
    advance: bool = False
    param_slots: ParamSlots | None = None
    record: Tensor | None = None
    extra_output: Tensor | None = None
    vocab_slice: VocabSlice | None = None

    @property
    def ids(self) -> VocabSlice:
        """``vocab_slice``, also where there is none."""
        return self.vocab_slice or VocabSlice(0, self.logits.shape[1])

    @property
    def has_lists(self) -> bool:
        """Whether step 5a may lower tokens of a row."""
        return self.history is not None and self.batch.has_rules

    @property
    def list_capacity(self) -> int:
        """How many tokens step 5a lowers in a row at most, as far as the host knows.

        Each is one of the text, of this call's ``extra_output``, or of the row's token sequences.
        """
        if not self.has_lists:
            return 0
        assert self.history is not None
        assert self.batch.sequences is not None
        text, slots = self.history.text, self.param_slots
        most = self.batch.sequences.numel()
        if slots is not None and slots.max_sequence_ids is not None:
            most = min(most, slots.max_sequence_ids)
        kept = 0 if text is None else text.max_length
        return min(self.logits.shape[1], kept + MAX_EXTRA_OUTPUT + most)

    def without_logits(self) -> SampleCall:
        """The same call for ``prepare``, which keeps no memory of these logits and their mask."""
        like = self.logits.new_empty(1, 1).expand(self.logits.shape)
        return replace(self, logits=like, allowed_mask=None)

    @property
    def has_bias(self) -> bool:
        """Whether a row may have a bias."""
        slots = self.param_slots
        return self.batch.logit_bias_ids.numel() > 0 and (slots is None or slots.any_bias)


class Step(Protocol):
    """A call again and again, as ``prepare`` makes it.

    Each time it has new logits of the same width, dtype and device, and a mask or None. A call with
    ``param_slots`` may get the slots of other rows too, any number of them, int32 ``(rows,)``; they
    hold from this step on.
    """

    def __call__(
        self, logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
    ) -> SampleOutput:
        """Draw tokens."""


class Size(NamedTuple):
    """The size of a call."""

    rows: int
    vocab_size: int
    dtype: torch.dtype


#: Sizes of calls for backends whose kernels are the same for all sizes.
SOME_SIZES = tuple(
    Size(rows, vocab_size, dtype)
    for rows, vocab_size in ((1, 513), (24, 1000), (24, 5003))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
)


class BackendModule(Protocol):
    """The functions that a backend's module defines.

    Attributes:
        DEVICE_TYPES: the types of device whose tensors it takes; None for all of torch's.
    """

    DEVICE_TYPES: frozenset[str] | None

    def why_unavailable(self) -> str | None:
        """None if the backend works here, else the reason."""

    def sample(self, call: SampleCall) -> SampleOutput:
        """Draw tokens."""

    def filter_logits(self, call: SampleCall) -> Tensor:
        """Processed logits over temperature, -inf outside the kept set; float32."""

    def prepare(self, call: SampleCall) -> Step:
        """``sample`` of such a call again and again. The call's own logits are not read."""

    def update_history(self, update: HistoryUpdate) -> None:
        """Change histories by ids that were not drawn."""

    def prepare_update(self, update: HistoryUpdate) -> Callable[[], None]:
        """``update_history`` of this update again and again; what its tensors hold may change."""

    def known_sizes(self, device: torch.device) -> Sequence[Size]:
        """Sizes of calls that together use all that depends on the size, for the self-test."""


def described(error: BaseException) -> str:
    """Why something did not load, for a reason: an ImportError's message says it all."""
    text = str(error)
    if isinstance(error, ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def with_slots(call: SampleCall, slots: Tensor | None) -> SampleCall:
    """A prepared call as it is from a step with these slots on; itself where there are none."""
    if slots is None:
        return call
    assert call.param_slots is not None
    history = call.history
    if history is not None and history.is_view:  # otherwise its owner has given it these slots
        history = history.with_slots(slots)
    return replace(call, param_slots=replace(call.param_slots, of_rows=slots), history=history)


def make_results(call: SampleCall, rows: int | None = None) -> SampleOutput:
    """Memory for the results of a call, or of one with another number of rows."""
    rows = call.logits.shape[0] if rows is None else rows

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.logits.device)

    return output_of(call.wanted, rows, call.num_samples, call.logits.shape[1], take)


def check_state(call: SampleCall) -> None:
    """A ValueError if the history of a prepared call no longer fits it."""
    if call.history is None:
        return
    rows = (call.logits if call.param_slots is None else call.param_slots.of_rows).shape[0]
    if call.history.rows != rows:
        raise ValueError(
            f"history must have one row per row of logits ({rows}), got {call.history.rows}"
        )
    call.history.check_state()


def is_text_full(call: SampleCall) -> Tensor | None:
    """Whether each row is to be recorded and its text has no room; bool ``(rows,)``.

    None where there is no text. Such a row draws nothing.
    """
    history = call.history
    if not call.advance or history is None or history.text is None:
        return None
    text = history.text
    slot = history.slots.to(torch.int64).clamp(0, len(text.lengths) - 1)
    is_full = text.lengths[slot] >= text.max_length
    if call.param_slots is not None:
        is_full = is_full & call.param_slots.exist()
    return is_full if call.record is None else is_full & call.record


def without_full_rows(call: SampleCall, output: SampleOutput) -> SampleOutput:
    """The results of a kernel that has not looked whether there is room for what it draws."""
    is_full = is_text_full(call)
    if is_full is None:
        return output
    output = without_rows(output, is_full)
    return output._replace(status=torch.where(is_full, STATUS_TEXT_FULL, output.status))


def advance(call: SampleCall, output: SampleOutput) -> None:
    """Record the tokens and advance the positions in torch, for kernels that have not done it."""
    history, position, slots = call.history, call.batch.position, call.param_slots
    assert position is not None
    tokens = output.tokens if output.tokens.dim() == 1 else output.tokens[:, 0]
    if call.record is not None:
        tokens = torch.where(call.record, tokens, -1)
    if slots is not None:
        _advance_by_slot(call, slots, tokens)
    elif history is not None:
        history.record(tokens, position)
    else:
        position.add_(tokens >= 0)


def _advance_by_slot(call: SampleCall, slots: ParamSlots, tokens: Tensor) -> None:
    rows = slots.are_named_once(call.history).nonzero()[:, 0]
    tokens, position = tokens[rows], call.batch.position
    assert position is not None
    places = slots.of_rows[rows].to(torch.int64) if slots.position_of == "slot" else rows
    if call.history is not None:
        part = call.history.with_slots(call.history.slots[rows])
        part.record(tokens, None if slots.position_of == "text" else position, places)
    elif slots.position_of != "text":
        position[places] += (tokens >= 0).to(torch.int64)


def settle(call: SampleCall, output: SampleOutput) -> SampleOutput:
    """For kernels that cannot see every row's status: raise on bad rows, then advance.

    Without ``check`` the kernel has advanced the rows and nothing is left to do. With ``check``
    this waits for the device.
    """
    if call.check:
        output = without_full_rows(call, output)
        raise_on_status(output.status)
        if call.advance:
            advance(call, output)
    return output


class InvalidLogitsError(ValueError):
    """Rows whose logits hold NaN or +inf, or leave no candidate.

    Attributes:
        rows: the indices of those rows.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rows)  # by default only the message is pickled


#: What each bit of a row's status says about it.
_REASONS = (
    (STATUS_NAN, "NaN in logits"),
    (STATUS_NO_CANDIDATE, "no candidate left (every logit is -inf or masked)"),
    (STATUS_POS_INF, "+inf in logits"),
    (STATUS_TEXT_FULL, "no room for another id in the text (max_length)"),
)


def status_reasons(status: int) -> str:
    """What is wrong with a row of this status, in words; empty for 0."""
    return "; ".join(reason for bit, reason in _REASONS if status & bit)


def raise_on_status(status: Tensor) -> None:
    """Raise :class:`InvalidLogitsError` naming the rows whose status is not 0."""
    values = status.tolist()
    if not any(values):
        return
    parts = []
    for bit, reason in _REASONS:
        rows = [row for row, value in enumerate(values) if value & bit]
        if rows:
            parts.append(f"{reason} in {'row' if len(rows) == 1 else 'rows'} {_enumerate(rows)}")
    raise InvalidLogitsError("; ".join(parts), [row for row, value in enumerate(values) if value])


def _enumerate(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more"
