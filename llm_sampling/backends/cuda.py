"""The CUDA kernels, whose files csrc/cuda/sample.cu names: NVIDIA GPUs from capability 8.0."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling.backends import native
from llm_sampling.backends.base import SampleCall, Size, Step, settle, with_slots
from llm_sampling.backends.c_abi import (
    DTYPES,
    HistoryUpdateArgs,
    SampleArgs,
    list_memory,
    set_lists,
)
from llm_sampling.history import HistoryUpdate
from llm_sampling.results import SampleOutput

DEVICE_TYPES = frozenset({"cuda"})

LIBRARY = native.Library("cuda", ctypes.c_void_p)


def why_unavailable(device: torch.device | None = None) -> str | None:
    """None if the library loads, and the driver can run it on the device, or on any device.

    No context is made.
    """
    reason = LIBRARY.why_unavailable()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "it is for NVIDIA's GPUs, and torch was built for AMD's"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _why_unusable(index)
    reasons = [_why_unusable(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def _why_unusable(index: int) -> str | None:
    """None if the driver can run the library on a device, else its reason."""
    code = LIBRARY.load().llm_sampling_cuda_usable(index)
    return None if code == 0 else LIBRARY.error(code)


def _run_on(device: torch.device) -> native.Run:
    """One launch, and one before it that makes the lists of a call with rules.

    They are on the current stream of the device. A workspace and the memory of lists belong to
    launches of one size on one stream, and are kept: a captured graph may have their addresses.
    """
    workspaces: dict[tuple[int, int], Tensor | None] = {}
    lists: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def run(args: SampleArgs) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            key = args.rows, stream
            if key not in workspaces:
                workspaces[key] = _make_workspace(args, device)
            workspace = workspaces[key]
            if workspace is not None:
                args.workspace = workspace.data_ptr()
                args.workspace_bytes = workspace.nbytes
            elif args.workspace:
                args.workspace = None
            if args.dry_multiplier:
                if key not in lists:
                    lists[key] = list_memory(args, device)
                set_lists(args, lists[key])
            LIBRARY.run(args, stream)

    return run


def known_sizes(device: torch.device) -> Sequence[Size]:
    """One size for each kind of launch that the device can choose, with few rows and with many."""
    sizes: dict[tuple[object, ...], Size] = {}
    shape = (ctypes.c_int32 * 3)()
    with torch.cuda.device(device):
        for dtype, code in DTYPES.items():
            for vocab_size in (1000, 8000, 32000, 128256, 262144, 2**20):
                for rows in (1, 4, 24, 64, 160, 320):
                    of_size = ctypes.c_int64(rows), ctypes.c_int64(vocab_size)
                    LIBRARY.ask("llm_sampling_cuda_shape", *of_size, code, shape)
                    sizes.setdefault((dtype, *shape, rows > 1), Size(rows, vocab_size, dtype))
    return tuple(sizes.values())


def _make_workspace(args: SampleArgs, device: torch.device) -> Tensor | None:
    """Memory with which few rows are divided among more blocks, or None where it is of no use."""
    if args.filtered or args.raw.logprobs:
        return None  # for these, all tokens of a row are looked at once more
    size = ctypes.c_int64()
    rows, vocab_size = ctypes.c_int64(args.rows), ctypes.c_int64(args.vocab_size)
    name = "llm_sampling_cuda_workspace"
    LIBRARY.ask(name, rows, vocab_size, args.dtype, ctypes.byref(size))
    if size.value == 0:
        return None
    workspace = torch.empty(size.value // 8, dtype=torch.int64, device=device)
    workspace[: args.rows].zero_()
    return workspace


def _unchecked(call: SampleCall) -> SampleCall:
    """The call as the kernel runs it: a block sees one row and cannot check all of them."""
    return replace(call, check=False, advance=call.advance and not call.check)


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens in one launch; with rules there is one more."""
    return settle(call, native.sample(_unchecked(call), _run_on(call.logits.device)))


def filter_logits(call: SampleCall) -> Tensor:
    """Filter in one launch; with rules there is one more."""
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
