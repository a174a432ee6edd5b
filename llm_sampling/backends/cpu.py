"""The fused C++ kernel, csrc/cpu/sample.cpp, loaded by ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm_sampling.backends import SampleCall, SampleOutput, raise_on_status
from llm_sampling.backends.args import (
    ABI_VERSION,
    SampleArgs,
    make_args,
    make_results,
    set_history,
    set_logits,
    set_results,
)

DEVICE_TYPES = frozenset({"cpu"})

_PATH = Path(__file__).parent.parent / "lib" / "libllm_sampling_cpu.so"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none; asked once, remembered for good."""
    path = _PATH
    if not path.exists():
        failure = path.with_suffix(".failure.txt")
        if failure.exists():
            return None, f"it was not built when the package was installed: {failure.read_text()}"
        return None, f"{path} does not exist; build it by installing the package"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} does not load: {error}"
    library.llm_sampling_cpu.argtypes = [ctypes.POINTER(SampleArgs)]
    library.llm_sampling_cpu.restype = ctypes.c_int32
    library.llm_sampling_error.argtypes = [ctypes.c_int32]
    library.llm_sampling_error.restype = ctypes.c_char_p
    library.llm_sampling_abi_version.restype = ctypes.c_uint32
    library.llm_sampling_args_size.restype = ctypes.c_uint32
    built = (library.llm_sampling_abi_version(), library.llm_sampling_args_size())
    if built != (ABI_VERSION, ctypes.sizeof(SampleArgs)):
        return None, f"{path} is of another version of this package; install the package again"
    return library, None


def why_unavailable() -> str | None:
    """None if the library is there and loads."""
    return _load()[1]


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return library


def _run(library: ctypes.CDLL, args: SampleArgs) -> None:
    code = library.llm_sampling_cpu(args)
    if code != 0:
        raise RuntimeError(f"llm_sampling_cpu: {library.llm_sampling_error(code).decode()}")


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens in one call of the kernel."""
    args = make_args(call)
    output = make_results(call)
    set_results(args, output)
    _run(_library(), args)
    if call.check:
        raise_on_status(output.status)
    return output


def filter_logits(call: SampleCall) -> Tensor:
    """Filter in one call of the kernel."""
    args = make_args(call)
    filtered = torch.empty(call.logits.shape, dtype=torch.float32)
    args.filtered = filtered.data_ptr()
    args.filtered_stride = filtered.shape[1]
    _run(_library(), args)
    return filtered


def prepare(call: SampleCall) -> Callable[[Tensor, Tensor | None], SampleOutput]:
    """Keep the args struct between steps, so that a step costs a few microseconds of Python."""
    library = _library()
    args = make_args(call)
    held = _state(call)
    like = make_results(call)

    def step(logits: Tensor, allowed_mask: Tensor | None) -> SampleOutput:
        nonlocal held
        args.num_threads = torch.get_num_threads()
        set_logits(args, logits, allowed_mask)
        if held:
            state = _state(call)
            if any(mine is not theirs for mine, theirs in zip(held, state, strict=True)):
                set_history(args, call)
                held = state
        # new memory for every step; its likes are cheaper to make than it is from a shape
        tokens, status = torch.empty_like(like.tokens), torch.empty_like(like.status)
        logprobs = None if like.logprobs is None else torch.empty_like(like.logprobs)
        output = SampleOutput(tokens, logprobs, status)
        set_results(args, output)
        _run(library, args)
        if call.check:
            raise_on_status(status)
        return output

    return step


def _state(call: SampleCall) -> tuple[Tensor, ...]:
    """The history's tensors. The struct points into them: they are held, and compared each step."""
    history = call.history
    if history is None:
        return ()
    if history.rows != call.batch.rows:
        raise ValueError(
            f"history must have one row per row of logits ({call.batch.rows}), got {history.rows}"
        )
    return history.seen, history.counts, history.lengths, history.slots
