"""The arguments of a call: each is checked, then all are put into one :class:`SampleCall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.backends.base import MAX_EXTRA_OUTPUT, ParamSlots, SampleCall
from llm_sampling.history import MAX_VOCAB_SIZE, TokenHistory
from llm_sampling.masks import Mask, check_mask
from llm_sampling.params import BatchParams, SamplingParams, list_of_params, positions_tensor
from llm_sampling.results import wanted
from llm_sampling.table import RequestTable, slots_tensor
from llm_sampling.tensors import (
    is_pretended,
    is_traced,
    is_wrapper,
    readable,
    to_device,
    token_ids,
)

Params = SamplingParams | Sequence[SamplingParams] | BatchParams | RequestTable
ExtraIds = Sequence[Sequence[int]] | Tensor

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_logits(logits: Tensor) -> Tensor:
    """``logits`` with last stride 1; a ValueError if they cannot be sampled from."""
    logits = readable("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (rows, vocab_size), got {tuple(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if not 1 <= logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"logits must have a vocab_size in 1 .. 2^20, got {logits.shape[1]}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def pack(params: Params, rows: int, device: torch.device) -> BatchParams:
    """``params`` in any of its forms as a BatchParams of ``rows`` rows on ``device``."""
    if isinstance(params, BatchParams):
        batch = params.checked()
    elif isinstance(params, SamplingParams):
        batch = BatchParams.repeat(params, rows, device=device)
    else:
        rule = "a SamplingParams, a sequence of them or a BatchParams"
        batch = BatchParams.from_list(list_of_params(params, rows, rule=rule), device=device)
    if batch.rows != rows:
        raise ValueError(f"params must have one entry per row of logits ({rows}), got {batch.rows}")
    if batch.device != device:
        raise ValueError(f"params must be on the logits' device {device}, got {batch.device}")
    return batch


def make_call(
    logits: Tensor,
    params: Params,
    *,
    history: TokenHistory | None,
    allowed_mask: Mask | None = None,
    positions: Sequence[int] | Tensor | None = None,
    num_samples: int = 1,
    check: bool | None = None,
    seeded: bool = True,
    slots: Sequence[int] | Tensor | None = None,
    text_positions: Sequence[int] | Tensor | None = None,
    record: bool | Sequence[bool] | Tensor = False,
    extra_output_ids: ExtraIds | None = None,
    **results: Any,
) -> SampleCall:
    """Check everything that a user passes to :func:`sample` and put it into one object.

    ``results`` are the arguments of :func:`llm_sampling.results.wanted`.
    """
    logits = check_logits(logits)
    rows, vocab_size = logits.shape
    device = logits.device
    num_samples = check_draws(num_samples, check)
    param_slots, of_rows_to_record = None, None
    if not isinstance(record, bool):
        of_rows_to_record = _record_tensor(record, rows, device)
    records = record is not False
    if isinstance(params, RequestTable):
        if history is not None:
            raise ValueError("history must be None, since a RequestTable keeps the histories")
        if records and num_samples > 1:
            raise ValueError(f"num_samples must be 1 where record is True, got {num_samples}")
        _check_table(params, logits)
        of_rows = slots_tensor(slots, rows, device)
        params.check_slots(of_rows)
        batch, param_slots = _batch_of_table(params, of_rows, positions, text_positions, records)
        if batch.needs_history or records:
            history = params.history_of(of_rows)
    else:
        given = {
            "slots": slots,
            "text_positions": text_positions,
            "record": record if records else None,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} can be given where params is a RequestTable, got {value}")
        batch = pack(params, rows, device)
        check_history_of(batch, history, vocab_size, device)
        batch = batch.seeded() if seeded else batch
        batch = replace(batch, position=position_of(positions, batch, history))
        history = history if batch.needs_history else None
    return SampleCall(
        logits=logits,
        batch=batch,
        history=history,
        allowed_mask=None
        if allowed_mask is None
        else check_mask(allowed_mask, rows, vocab_size, device),
        num_samples=num_samples,
        wanted=wanted(rows, device, **results),
        check=device.type == "cpu" if check is None else check,
        advance=records,
        param_slots=param_slots,
        record=of_rows_to_record,
        extra_output=None
        if extra_output_ids is None
        else _extra_output(extra_output_ids, batch, history, rows, device),
    )


def _record_tensor(record: object, rows: int, device: torch.device) -> Tensor:
    """``record`` as a contiguous bool ``(rows,)`` tensor on ``device``."""
    rule = f"True or False, or bools ({rows},), one for each row"
    if not isinstance(record, Tensor):
        if not isinstance(record, Sequence):
            raise checks.refusal("record", rule, record)
        values = [checks.true_or_false("record", value) for value in record]
        record = to_device(torch.tensor(values, dtype=torch.bool, device="cpu"), device)
    tensor = readable("record", record)
    if tensor.dtype != torch.bool or tensor.shape != (rows,):
        raise ValueError(f"record must be {rule}, got {tensor.dtype} of {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"record must be on the logits' device {device}, got {tensor.device}")
    return tensor.contiguous()


def _extra_output(
    given: ExtraIds,
    batch: BatchParams,
    history: TokenHistory | None,
    rows: int,
    device: torch.device,
) -> Tensor | None:
    """``extra_output_ids`` as contiguous int32 ``(rows, n)``; None where nothing needs them."""
    rule = f"integers, at most {MAX_EXTRA_OUTPUT} for each of the {rows} rows"
    name = "extra_output_ids"
    ids = token_ids(name, given, rule, device)
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] > MAX_EXTRA_OUTPUT:
        raise ValueError(f"{name} must be {rule}, got shape {tuple(ids.shape)}")
    if not batch.needs_history or history is None or ids.shape[1] == 0:
        return None
    return ids


def _check_table(table: RequestTable, logits: Tensor) -> None:
    """A ValueError if the logits do not fit the table."""
    if is_pretended() or is_wrapper(logits):
        raise ValueError(
            "logits must be a plain tensor outside of tracers and transforms, since a RequestTable "
            f"keeps state outside of a graph, got {type(logits).__name__}"
        )
    if logits.shape[1] != table.vocab_size:
        raise ValueError(
            f"logits must have the RequestTable's vocab_size {table.vocab_size}, "
            f"got {logits.shape[1]}"
        )
    if logits.device != table.device:
        raise ValueError(f"logits must be on {table.device}, got {logits.device}")


def _batch_of_table(
    table: RequestTable,
    slots: Tensor,
    positions: Sequence[int] | Tensor | None,
    text_positions: Sequence[int] | Tensor | None,
    record: bool,
) -> tuple[BatchParams, ParamSlots]:
    rows, device = slots.shape[0], slots.device
    if positions is not None and text_positions is not None:
        raise ValueError("positions and text_positions must not both be given")
    if text_positions is not None:
        places = positions_tensor(text_positions, rows, device, name="text_positions")
        return table.batch_of(slots, places, "text")
    if positions is None:
        return table.batch_of(slots, None, "slot")
    position = positions_tensor(positions, rows, device)
    # a kernel that records adds 1 to the positions that it reads, and these are the caller's
    return table.batch_of(slots, position.clone() if record else position, "row")


def position_of(
    positions: Sequence[int] | Tensor | None, batch: BatchParams, history: TokenHistory | None
) -> Tensor:
    """int64 ``(rows,)``: what was given, else what ``batch`` or ``history`` has, else zeros."""
    if positions is not None:
        return positions_tensor(positions, batch.rows, batch.device)
    if batch.position is not None:
        return batch.position
    if history is not None:
        return history.lengths[history.slots.to(torch.int64)]
    return torch.zeros(batch.rows, dtype=torch.int64, device=batch.device)


def check_history(
    history: TokenHistory | None,
    is_needed: bool,
    rows: int,
    vocab_size: int,
    device: torch.device,
) -> None:
    """A ValueError if ``history`` does not fit, or is missing where it is needed."""
    if history is None:
        if is_needed:
            raise ValueError(
                "history must be given where repetition_penalty, frequency_penalty, "
                "presence_penalty, dry_multiplier, no_repeat_ngram_size, bad_words or min_tokens "
                "is on; TokenHistory.from_ids builds one"
            )
        return
    if not isinstance(history, TokenHistory):
        raise ValueError(f"history must be a TokenHistory, got {type(history).__name__}")
    if history.rows != rows:
        raise ValueError(
            f"history must have one row per row of logits ({rows}), got {history.rows}"
        )
    if history.vocab_size != vocab_size:
        raise ValueError(
            f"history must have the logits' vocab_size {vocab_size}, got {history.vocab_size}"
        )
    if history.device != device:
        raise ValueError(f"history must be on the logits' device {device}, got {history.device}")
    history.check_state()
    history.check_slots(named_once=False)  # rows that record nothing may share a slot


def check_history_of(
    batch: BatchParams, history: TokenHistory | None, vocab_size: int, device: torch.device
) -> None:
    """A ValueError if a history is not one that a batch of as many rows can be drawn with."""
    check_history(history, batch.needs_history, batch.rows, vocab_size, device)
    _check_windows(history, batch)
    _check_order(history, batch)


def _check_windows(history: TokenHistory | None, batch: BatchParams) -> None:
    """A ValueError if rows with a penalty have another window in ``batch`` than in ``history``.

    What the tensors hold is looked at on the CPU only, since elsewhere it would wait.
    """
    if history is None:
        return
    windows = None if history.text is None else history.text.windows
    if not batch.needs_history or (windows is None and not batch.any_window):
        return
    if windows is None:
        raise ValueError(
            "history must have windows where penalty_last_n is on: make it with max_length and "
            "penalty_last_n"
        )
    if history.device.type != "cpu" or is_traced() or is_wrapper(windows):
        return
    of_rows = zip(
        batch.penalty_last_n.tolist(),
        windows[history.slots.to(torch.int64)].tolist(),
        batch.rows_with_penalties(),
        strict=True,
    )
    for row, (asked, kept, has_penalty) in enumerate(of_rows):
        if has_penalty and max(asked, -1) != max(kept, -1):
            raise ValueError(
                f"history must have the penalty_last_n of the parameters, {asked} in row {row}, "
                f"got one of {kept}"
            )


def _check_order(history: TokenHistory | None, batch: BatchParams) -> None:
    """A ValueError if a rule looks at the ids in order, which ``history`` does not keep."""
    if history is None or not batch.has_rules or not batch.any_ordered_rule:
        return
    if history.text is None:
        raise ValueError(
            "history must keep the ids in order where dry_multiplier, no_repeat_ngram_size or "
            "bad_words is on: make it with max_length"
        )


def check_draws(num_samples: int, check: bool | None) -> int:
    """``num_samples`` as an int; a ValueError if one of these is out of its range."""
    num_samples = checks.integer_at_least("num_samples", num_samples, 1)
    if check is not None and not isinstance(check, bool):
        raise checks.refusal("check", "True, False or None", check)
    return num_samples
