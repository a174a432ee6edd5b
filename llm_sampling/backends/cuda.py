"""The CUDA kernels, csrc/cuda/sample.cu and history.cu: NVIDIA GPUs from compute capability 8.0."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling.backends import native
from llm_sampling.backends.base import SampleCall, SampleOutput, Step, settle, with_slots
from llm_sampling.backends.c_abi import HistoryUpdateArgs, SampleArgs
from llm_sampling.history import HistoryUpdate

DEVICE_TYPES = frozenset({"cuda"})

LIBRARY = native.Library("cuda", ctypes.c_void_p)


def why_unavailable() -> str | None:
    """None if the library loads, and a device and its driver can run it. No context is made."""
    reason = LIBRARY.why_unavailable()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "it is for NVIDIA's GPUs, and torch was built for AMD's"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _why_unusable()


@functools.cache
def _why_unusable() -> str | None:
    """None if the driver can run the library on a device of this machine, else its reason."""
    code = LIBRARY.load().llm_sampling_cuda_usable()
    return None if code == 0 else LIBRARY.error(code)


def _run_on(device: torch.device) -> native.Run:
    """One launch, on the current stream of the device."""

    def run(args: SampleArgs) -> None:
        with torch.cuda.device(device):
            LIBRARY.run(args, torch.cuda.current_stream(device).cuda_stream)

    return run


def _unchecked(call: SampleCall) -> SampleCall:
    """The call as the kernel runs it: a block sees one row and cannot check all of them."""
    return replace(call, check=False, advance=call.advance and not call.check)


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens in one launch."""
    return settle(call, native.sample(_unchecked(call), _run_on(call.logits.device)))


def filter_logits(call: SampleCall) -> Tensor:
    """Filter in one launch."""
    return native.filter_logits(call, _run_on(call.logits.device))


def prepare(call: SampleCall) -> Step:
    """Keep what the kernel is called with between steps."""
    launch = native.prepare(_unchecked(call), _run_on(call.logits.device))

    def step(
        logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
    ) -> SampleOutput:
        nonlocal call
        call = with_slots(call, slots)
        return settle(call, launch(logits, allowed_mask, slots))

    return step


def update_history(update: HistoryUpdate) -> None:
    """Change histories in one launch, on the current stream of their device."""
    prepare_update(update)()


def prepare_update(update: HistoryUpdate) -> Callable[[], None]:
    """Keep what the kernel is called with."""
    device = update.history.device

    def run(args: HistoryUpdateArgs) -> None:
        with torch.cuda.device(device):
            LIBRARY.update(args, torch.cuda.current_stream(device).cuda_stream)

    return native.prepare_update(update, run)
