"""The arguments of a call: each is checked, then all are put into one :class:`SampleCall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.backends.base import Logprobs, SampleCall
from llm_sampling.history import MAX_VOCAB_SIZE, TokenHistory
from llm_sampling.masks import Mask, check_mask
from llm_sampling.params import BatchParams, SamplingParams, list_of_params, positions_tensor
from llm_sampling.tensors import readable

Params = SamplingParams | Sequence[SamplingParams] | BatchParams

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
    logprobs: Logprobs | None = None,
    check: bool | None = None,
    seeded: bool = True,
) -> SampleCall:
    """Check everything that a user passes to :func:`sample` and put it into one object."""
    logits = check_logits(logits)
    rows, vocab_size = logits.shape
    device = logits.device
    batch = pack(params, rows, device)
    check_history(history, batch, rows, vocab_size, device)
    num_samples = check_draws(num_samples, logprobs, check)
    batch = batch.seeded() if seeded else batch
    return SampleCall(
        logits=logits,
        batch=replace(batch, position=position_of(positions, batch, history)),
        history=history if batch.needs_history else None,
        allowed_mask=None
        if allowed_mask is None
        else check_mask(allowed_mask, rows, vocab_size, device),
        num_samples=num_samples,
        logprobs=logprobs,
        check=device.type == "cpu" if check is None else check,
    )


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
    batch: BatchParams,
    rows: int,
    vocab_size: int,
    device: torch.device,
) -> None:
    """A ValueError if ``history`` does not fit, or is missing where a penalty needs it."""
    if history is None:
        if batch.needs_history:
            raise ValueError(
                "history must be given where repetition_penalty, frequency_penalty or "
                "presence_penalty is on; TokenHistory.from_ids builds one"
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


def check_draws(num_samples: int, logprobs: str | None, check: bool | None) -> int:
    """``num_samples`` as an int; a ValueError if one of these is out of its range."""
    num_samples = checks.integer_at_least("num_samples", num_samples, 1)
    if logprobs not in (None, "processed", "raw"):
        raise ValueError(f'logprobs must be None, "processed" or "raw", got {logprobs!r}')
    if check is not None and not isinstance(check, bool):
        raise checks.refusal("check", "True, False or None", check)
    return num_samples
