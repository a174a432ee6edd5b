"""The reference as a backend: it runs on every device of torch, at the reference's speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling import reference
from llm_sampling.backends.base import (
    SOME_SIZES,
    SampleCall,
    Size,
    Step,
    advance,
    check_state,
    raise_on_status,
    with_slots,
    without_full_rows,
)
from llm_sampling.history import HistoryUpdate, apply_update
from llm_sampling.results import SampleOutput, without_draws

DEVICE_TYPES = None


def why_unavailable() -> str | None:
    """It always runs."""
    return None


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens by the reference."""
    output = without_full_rows(call, reference.sample(call))
    if call.check:
        raise_on_status(output.status)
    if call.num_samples == 1:
        output = without_draws(output)
    if call.advance:
        advance(call, output)
    return output


def filter_logits(call: SampleCall) -> Tensor:
    """Filter by the reference."""
    return reference.filter_logits(call)


def update_history(update: HistoryUpdate) -> None:
    """Change histories in torch."""
    apply_update(update)


def prepare_update(update: HistoryUpdate) -> Callable[[], None]:
    """The reference has nothing to prepare."""
    return functools.partial(update_history, update)


def prepare(call: SampleCall) -> Step:
    """The reference has nothing to prepare."""

    def step(
        logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
    ) -> SampleOutput:
        nonlocal call
        call = with_slots(call, slots)
        check_state(call)
        return sample(replace(call, logits=logits, allowed_mask=allowed_mask))

    return step


def known_sizes(device: torch.device) -> Sequence[Size]:
    """Some, since nothing but the loops' lengths depends on the size."""
    return SOME_SIZES
