"""Loads a library of csrc/ by ctypes and calls it, for the backends in C++ and CUDA."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, get_num_threads

from llm_sampling.backends.base import (
    IMPORTED_BY,
    SampleCall,
    Step,
    check_state,
    make_results,
    raise_on_status,
    with_slots,
)
from llm_sampling.backends.c_abi import (
    ABI_VERSION,
    HistoryUpdateArgs,
    SampleArgs,
    make_args,
    make_update_args,
    result_places,
    set_history,
    set_logits,
    set_results,
    words_of,
)
from llm_sampling.history import HistoryUpdate, Text, TokenHistory
from llm_sampling.results import SampleOutput, outputs_of, tensors_of


class Library:
    """``libllm_sampling_NAME.so``, loaded when it is first asked for.

    Args:
        name: of the backend, and of the entry point after ``llm_sampling_``.
        more: ctypes types of the entry point's arguments after the struct.
        after_fork: the function to call when a forked child loads the library and its parent did
            not.
    """

    def __init__(self, name: str, *more: type, after_fork: str | None = None) -> None:
        self.name = name
        self.entry = f"llm_sampling_{name}"
        self.path = Path(__file__).parent.parent / "lib" / f"libllm_sampling_{name}.so"
        self._more = more
        self._after_fork = after_fork

    @functools.cached_property
    def _loaded(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The library, or the reason why there is none; looked for once per process."""
        path = self.path
        if not path.exists():
            failure = path.with_suffix(".failure.txt")
            if failure.exists():
                return (
                    None,
                    f"it was not built when the package was installed: {failure.read_text()}",
                )
            return None, f"{path} does not exist; build it by installing the package"
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return None, f"{path} does not load: {error}"
        entry = getattr(library, self.entry)
        entry.argtypes = [ctypes.POINTER(SampleArgs), *self._more]
        entry.restype = ctypes.c_int32
        update = getattr(library, f"{self.entry}_update")
        update.argtypes = [ctypes.POINTER(HistoryUpdateArgs), *self._more]
        update.restype = ctypes.c_int32
        library.llm_sampling_error.argtypes = [ctypes.c_int32]
        library.llm_sampling_error.restype = ctypes.c_char_p
        library.llm_sampling_abi_version.restype = ctypes.c_uint32
        sizes = [library.llm_sampling_args_size, library.llm_sampling_update_size]
        for size in sizes:
            size.restype = ctypes.c_uint32
        built = (library.llm_sampling_abi_version(), *(size() for size in sizes))
        structs = SampleArgs, HistoryUpdateArgs
        if built != (ABI_VERSION, *map(ctypes.sizeof, structs)):
            return None, f"{path} is of another version of this package; install the package again"
        if self._after_fork is not None and os.getpid() != IMPORTED_BY:
            getattr(library, self._after_fork)()
        return library, None

    def why_unavailable(self) -> str | None:
        """None if the library is there and loads."""
        return self._loaded[1]

    def load(self) -> ctypes.CDLL:
        """The library.

        Raises:
            RuntimeError: there is none; the message says why.
        """
        library, reason = self._loaded
        if library is None:
            raise RuntimeError(f"backend {self.name!r} is unavailable: {reason}")
        return library

    @functools.cached_property
    def _function(self) -> Callable[..., int]:
        function: Callable[..., int] = getattr(self.load(), self.entry)
        return function

    @functools.cached_property
    def _update_function(self) -> Callable[..., int]:
        function: Callable[..., int] = getattr(self.load(), f"{self.entry}_update")
        return function

    def error(self, code: int) -> str:
        """What a return code means."""
        return str(self.load().llm_sampling_error(code).decode())

    def run(self, args: SampleArgs, *more: object) -> None:
        """Call the entry point.

        Raises:
            RuntimeError: it returned a code, which the message has in words.
        """
        code = self._function(args, *more)
        if code:
            raise RuntimeError(f"{self.entry}: {self.error(code)}")

    def ask(self, name: str, *args: object) -> None:
        """Call an entry point of another name, which answers through pointers.

        Raises:
            RuntimeError: it returned a code, which the message has in words.
        """
        code = getattr(self.load(), name)(*args)
        if code:
            raise RuntimeError(f"{name}: {self.error(code)}")

    def update(self, args: HistoryUpdateArgs, *more: object) -> None:
        """Call the entry point that changes histories.

        Raises:
            RuntimeError: it returned a code, which the message has in words.
        """
        code = self._update_function(args, *more)
        if code:
            raise RuntimeError(f"{self.entry}_update: {self.error(code)}")


#: Calls a library's entry point for tensors on one device.
Run = Callable[[SampleArgs], None]


def sample(call: SampleCall, run: Run) -> SampleOutput:
    """Draw tokens in one call of the kernel, which advances the rows only if ``check`` lets it."""
    args = make_args(call)
    output = make_results(call)
    set_results(args, output)
    run(args)
    if call.check:
        raise_on_status(output.status)
    return output


def filter_logits(call: SampleCall, run: Run) -> Tensor:
    """Filter in one call of the kernel."""
    args = make_args(call)
    filtered = torch.empty(call.logits.shape, dtype=torch.float32, device=call.logits.device)
    args.filtered = filtered.data_ptr()
    args.filtered_stride = filtered.shape[1]
    run(args)
    return filtered


def prepare(call: SampleCall, run: Run) -> Step:
    """Keep the args struct between steps, so that a step costs a few microseconds of Python."""
    args = make_args(call)
    check_state(call)
    held = None if call.history is None else _Held(call.history)
    check, rows = call.check, call.logits.shape[0]
    of_rows: Tensor | None = None
    is_on_host = call.logits.device.type == "cpu"
    results: list[tuple[SampleOutput, Sequence[Tensor]]] = []  # with their tensors
    words, places = words_of(args), result_places(make_results(call, 0))
    steps = 0  # with this number of rows

    def step(
        logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
    ) -> SampleOutput:
        nonlocal held, of_rows, rows, steps
        args.num_threads = get_num_threads()
        set_logits(args, logits, allowed_mask)
        if held is not None and not held.is_right():
            check_state(with_slots(call, of_rows if slots is None else slots))
            held = _Held(held.history)
            set_history(args, held.history)
            args.slots = held.history.slots.data_ptr()
        if slots is not None:
            of_rows = slots  # held, so that its memory stays
            args.param_slots = slots.data_ptr()
            if held is not None:
                args.slots = args.param_slots
            if rows != slots.shape[0]:
                rows = args.rows = slots.shape[0]
                results.clear()
                steps = 0
        if not results:
            is_first, steps = steps == 0, steps + 1  # another number may follow
            results.extend(_make_many(call, rows, most=1 if is_first else 256))
        output, tensors = results.pop()
        for place, tensor in zip(places, tensors, strict=True):
            words[place] = tensor.data_ptr()
        run(args)
        if check and not (rows >= 64 and is_on_host and _is_zero(args.status, 4 * rows)):
            raise_on_status(output.status)
        return output

    return step


def prepare_update(
    update: HistoryUpdate, run: Callable[[HistoryUpdateArgs], None]
) -> Callable[[], None]:
    """Keep the args struct between updates."""
    args, held = make_update_args(update), _Held(update.history)
    update.history.check_changeable(update.position)
    needs_inference_mode = torch.is_inference_mode_enabled()

    def again() -> None:
        nonlocal held, needs_inference_mode
        if needs_inference_mode and not torch.is_inference_mode_enabled():
            update.history.check_changeable(update.position)
            needs_inference_mode = False
        if not held.is_right():
            update.history.check_changeable(update.position)
            held = _Held(update.history)
            set_history(args, update.history)
        run(args)

    return again


def _is_zero(address: int | None, size: int) -> bool:
    """Whether all bytes of this memory are 0; for a long status it costs less than a list."""
    return ctypes.string_at(address or 0, size) == bytes(size)


def _make_many(
    call: SampleCall, rows: int, most: int
) -> list[tuple[SampleOutput, Sequence[Tensor]]]:
    """Make result tensors for one step, or on the CPU for ``most`` or fewer.

    On the CPU those of many steps are allocated together, which takes a third of the time.
    Elsewhere each step has an allocation of its own, because a captured graph must own its memory.
    """
    first = make_results(call, rows)
    like = tensors_of(first)
    if call.logits.device.type != "cpu" or most == 1:
        return [(first, like)]
    steps = max(1, min(most, 2**16 // max(1, max(tensor.numel() for tensor in like))))
    with torch.inference_mode(False):  # a later step may run outside of inference mode
        # "Unsafe" parts are independent for autograd: one that a graph has saved stays valid when
        # another is changed in place.
        parts = list(
            zip(
                *(
                    x.new_empty(steps * len(x), *x.shape[1:]).unsafe_split_with_sizes(
                        [len(x)] * steps
                    )
                    for x in like
                ),
                strict=True,
            )
        )
    return list(zip(outputs_of(call.wanted, parts), parts, strict=True))


class _Held:
    """The history's tensors and their addresses as the struct has them.

    A tensor keeps its memory alive only while it is held, and may be given other memory meanwhile,
    as by ``share_memory_``.
    """

    def __init__(self, history: TokenHistory) -> None:
        self.history = history
        self.tensors = history.seen, history.counts, history.lengths, history.slots
        self.addresses = tuple(tensor.data_ptr() for tensor in self.tensors)
        self.text = history.text
        self.text_addresses = _addresses(history.text)

    def is_right(self) -> bool:
        """Whether the history still has these tensors, at these addresses."""
        history = self.history
        seen, counts, lengths, slots = self.tensors
        return (
            history.seen is seen
            and history.counts is counts
            and history.lengths is lengths
            and history.slots is slots
            and self.addresses
            == (seen.data_ptr(), counts.data_ptr(), lengths.data_ptr(), slots.data_ptr())
            and history.text is self.text
            and (self.text is None or self.text_addresses == _addresses(self.text))
        )


def _addresses(text: Text | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in text or ()]
