"""The fused C++ kernel, csrc/cpu/sample.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm_sampling.backends import native
from llm_sampling.backends.base import SOME_SIZES, SampleCall, Size, Step
from llm_sampling.history import HistoryUpdate
from llm_sampling.results import SampleOutput

DEVICE_TYPES = frozenset({"cpu"})

LIBRARY = native.Library("cpu", after_fork="llm_sampling_cpu_forked")


def why_unavailable() -> str | None:
    """None if the library is there and loads."""
    return LIBRARY.why_unavailable()


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens in one call of the kernel."""
    return native.sample(call, LIBRARY.run)


def filter_logits(call: SampleCall) -> Tensor:
    """Filter in one call of the kernel."""
    return native.filter_logits(call, LIBRARY.run)


def prepare(call: SampleCall) -> Step:
    """Keep what the kernel is called with between steps."""
    return native.prepare(call, LIBRARY.run)


def update_history(update: HistoryUpdate) -> None:
    """Change histories in one call."""
    prepare_update(update)()


def prepare_update(update: HistoryUpdate) -> Callable[[], None]:
    """Keep what the kernel is called with."""
    return native.prepare_update(update, LIBRARY.update)


def known_sizes(device: torch.device) -> Sequence[Size]:
    """Some, since nothing but the loops' lengths depends on the size."""
    return SOME_SIZES
