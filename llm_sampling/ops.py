"""The same calls as ops of torch.library, for torch.compile and export. Eager calls bypass them.

An op takes the batch and the history field by field, because a schema has tensors and numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends.base import Logprobs, SampleCall, SampleOutput
from llm_sampling.history import TokenHistory
from llm_sampling.params import KERNEL_TENSORS, BatchParams

_BATCH_FLAGS = ("all_greedy", "any_filter")
HISTORY_FIELDS = ("seen", "counts", "lengths", "slots")

_INPUTS = ", ".join(
    [
        "Tensor logits",
        *(f"Tensor {name}" for name in KERNEL_TENSORS),
        *(f"Tensor? {name}" for name in HISTORY_FIELDS),
        "Tensor? allowed_mask",
        *(f"bool {name}" for name in _BATCH_FLAGS),
    ]
)
_LIBRARY = torch.library.Library("llm_sampling", "DEF")
_LIBRARY.define(
    f"sample({_INPUTS}, int num_samples, str? logprobs, bool check, str backend) "
    "-> (Tensor tokens, Tensor logprobs, Tensor status)"
)
_LIBRARY.define(f"filter_logits({_INPUTS}, str backend) -> Tensor")


def _inputs(call: SampleCall) -> tuple[Tensor | bool | None, ...]:
    history = [
        None if call.history is None else getattr(call.history, name) for name in HISTORY_FIELDS
    ]
    batch = [getattr(call.batch, name) for name in KERNEL_TENSORS]
    flags = [getattr(call.batch, name) for name in _BATCH_FLAGS]
    return (call.logits, *batch, *history, call.allowed_mask, *flags)


def _call(
    inputs: Sequence[Any],
    num_samples: int = 1,
    logprobs: Logprobs | None = None,
    check: bool = False,
) -> SampleCall:
    """The inverse of ``_inputs``."""
    logits, *rest, allowed_mask, all_greedy, any_filter = inputs
    batch = dict(zip(KERNEL_TENSORS, rest, strict=False))
    state = dict(zip(HISTORY_FIELDS, rest[len(KERNEL_TENSORS) :], strict=True))
    has_history = state["seen"] is not None
    params = BatchParams(
        **batch,
        unseeded=None,
        needs_history=has_history,
        all_greedy=all_greedy,
        any_filter=any_filter,
    )
    return SampleCall(
        logits=logits,
        batch=params.checked(),
        history=TokenHistory(**state, vocab_size=logits.shape[1]) if has_history else None,
        allowed_mask=allowed_mask,
        num_samples=num_samples,
        logprobs=logprobs,
        check=check,
    )


def _sample(*args):  # type: ignore[no-untyped-def]
    *inputs, num_samples, logprobs, check, backend = args
    call = _call(inputs, num_samples, logprobs, check)
    output = backends.resolve(backend, call.logits.device).sample(call)
    no_logprobs = call.logits.new_empty(0, dtype=torch.float32)
    return output.tokens, no_logprobs if output.logprobs is None else output.logprobs, output.status


def _sample_fake(*args):  # type: ignore[no-untyped-def]
    logits, num_samples, logprobs = args[0], args[-4], args[-3]
    rows = logits.shape[0]
    shape = (rows,) if num_samples == 1 else (rows, num_samples)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty((0,) if logprobs is None else shape, dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.int32),
    )


def _filter_logits(*args):  # type: ignore[no-untyped-def]
    *inputs, backend = args
    call = _call(inputs)
    return backends.resolve(backend, call.logits.device).filter_logits(call)


def _filter_logits_fake(*args):  # type: ignore[no-untyped-def]
    return args[0].new_empty(args[0].shape, dtype=torch.float32)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("sample", _sample, _key)
    _LIBRARY.impl("filter_logits", _filter_logits, _key)
torch.library.register_fake("llm_sampling::sample", _sample_fake, lib=_LIBRARY)
torch.library.register_fake("llm_sampling::filter_logits", _filter_logits_fake, lib=_LIBRARY)


def sample(call: SampleCall, backend: str) -> SampleOutput:
    """``sample`` as one op of a graph."""
    tokens, logprobs, status = torch.ops.llm_sampling.sample(
        *_inputs(call), call.num_samples, call.logprobs, call.check, backend
    )
    return SampleOutput(tokens, None if call.logprobs is None else logprobs, status)


def filter_logits(call: SampleCall, backend: str) -> Tensor:
    """``filter_logits`` as one op of a graph."""
    result: Tensor = torch.ops.llm_sampling.filter_logits(*_inputs(call), backend)
    return result
