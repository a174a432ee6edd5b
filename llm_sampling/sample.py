"""The entry points: check the tensors, resolve the backend, run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling import backends, checks, ops
from llm_sampling.backends.base import Logprobs, SampleCall, SampleOutput
from llm_sampling.history import MAX_VOCAB_SIZE, TokenHistory
from llm_sampling.params import BatchParams, SamplingParams, list_of_params, positions_tensor

Params = SamplingParams | Sequence[SamplingParams] | BatchParams

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample(
    logits: Tensor,
    params: Params,
    *,
    history: TokenHistory | None = None,
    allowed_mask: Tensor | None = None,
    positions: Sequence[int] | Tensor | None = None,
    num_samples: int = 1,
    logprobs: Logprobs | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> SampleOutput:
    """Draw a token from each row of ``logits``: penalties, temperature, top-k, top-p, min-p, draw.

    A token is a function of its row's logits, parameters, history, seed and position, and of
    nothing else: not of the backend, the device, the batch or the number of threads.
    docs/semantics.md gives the rules; :mod:`llm_sampling.reference` is the same in torch.

    Args:
        logits: ``(rows, vocab_size)``, float32, float16 or bfloat16, ``vocab_size`` in 1 .. 2^20,
            any strides (a copy is made where the last is not 1). Never modified.
        params: one for all rows, one per row, or a prepared :class:`BatchParams`.
        history: the tokens so far; needed where a penalty is on. Not modified: append the tokens
            with :meth:`TokenHistory.append`.
        allowed_mask: int32 ``(rows, ceil(vocab_size / 32))``; bit ``t & 31`` of word ``t >> 5`` set
            means that token t may be drawn, as xgrammar and llguidance produce it.
        positions: ``(rows,)`` integers: how many tokens each request has produced so far; every
            position of a seed draws anew. Default: the position in ``params``, else the length of
            the output in ``history``, else 0.
        num_samples: how many tokens to draw from each row, independently; draw 0 is the token of
            ``num_samples=1``.
        logprobs: None; "processed": of the distribution that the token was drawn from; "raw": of
            ``softmax(logits)`` without penalties, temperature or filters. Natural logarithms.
        backend: a name in :data:`llm_sampling.backends.BACKENDS`, which runs or raises, or "auto".
        check: raise for rows with NaN, +inf or no candidate. Default: True for logits on the CPU,
            False where it would wait for the device.

    Returns:
        ``SampleOutput(tokens, logprobs, status)``: tokens int64 and logprobs float32 (or None),
        both ``(rows,)``, or ``(rows, num_samples)`` where ``num_samples`` > 1; status int32
        ``(rows,)``.

    Raises:
        ValueError: an argument is out of its range, or shapes, dtypes or devices disagree; the
            message names the argument, the rule and the value.
        InvalidLogitsError: ``check`` found bad rows; ``.rows`` holds their indices.
        RuntimeError: the named backend cannot run here; the message says why.

    Example:
        >>> params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=1)
        >>> tokens = sample(torch.randn(2, 32000), params).tokens
    """
    call = make_call(
        logits,
        params,
        history=history,
        allowed_mask=allowed_mask,
        positions=positions,
        num_samples=num_samples,
        logprobs=logprobs,
        check=check,
    )
    if torch.compiler.is_compiling():
        return ops.sample(call, backend)
    return backends.resolve(backend, logits.device).sample(call)


def filter_logits(
    logits: Tensor,
    params: Params,
    *,
    history: TokenHistory | None = None,
    allowed_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The logits that :func:`sample` would draw from, for loops that draw themselves.

    Args:
        logits: as for :func:`sample`, and so are the others.
        params: positions and seeds do not matter here.
        history: needed where a penalty is on.
        allowed_mask: the tokens that may be kept.
        backend: a name or "auto".

    Returns:
        float32 ``(rows, vocab_size)``: the processed logits divided by the temperature in the kept
        set, -inf elsewhere. A greedy row keeps its one token's processed logit undivided. A row
        without candidates is all -inf.

    Raises:
        ValueError, RuntimeError: as :func:`sample`.
    """
    call = make_call(logits, params, history=history, allowed_mask=allowed_mask, seeded=False)
    if torch.compiler.is_compiling():
        return ops.filter_logits(call, backend)
    return backends.resolve(backend, logits.device).filter_logits(call)


def check_logits(logits: Tensor) -> Tensor:
    """``logits`` with last stride 1; a ValueError if they cannot be sampled from."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (rows, vocab_size), got {tuple(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if not 1 <= logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"logits must have a vocab_size in 1 .. 2^20, got {logits.shape[1]}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return logits.detach() if logits.requires_grad else logits


def pack(params: Params, rows: int, device: torch.device) -> BatchParams:
    """``params`` in any of its forms as a BatchParams of ``rows`` rows on ``device``."""
    if isinstance(params, BatchParams):
        batch = params.checked()
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
    allowed_mask: Tensor | None = None,
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


def check_draws(num_samples: int, logprobs: str | None, check: bool | None) -> int:
    """``num_samples`` as an int; a ValueError if one of these is out of its range."""
    num_samples = checks.integer_at_least("num_samples", num_samples, 1)
    if logprobs not in (None, "processed", "raw"):
        raise ValueError(f'logprobs must be None, "processed" or "raw", got {logprobs!r}')
    if check is not None and not isinstance(check, bool):
        raise checks.refusal("check", "True, False or None", check)
    return num_samples


def check_mask(mask: Tensor, rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """``mask`` with last stride 1; a ValueError if it does not fit the logits."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"allowed_mask must be an int32 tensor, got {what}")
    shape = (rows, -(-vocab_size // 32))
    if mask.shape != shape:
        raise ValueError(
            f"allowed_mask must have shape (rows, ceil(vocab_size / 32)) = {shape}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"allowed_mask must be on the logits' device {device}, got {mask.device}")
    return mask if mask.stride(1) == 1 else mask.contiguous()
