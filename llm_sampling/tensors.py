"""The gate for tensors: which of them a kernel may read, or write, by their addresses.

An address says nothing of a tensor's layout, of the bits that torch resolves when it reads it, of
wrappers around it, or of a tracer that watches. Every tensor of a call comes through here first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from llm_sampling import checks

# Bound here, because a prepared call asks them in every step.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_jit_tracing = torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack


def is_watched() -> bool:
    """Whether ``torch.jit.trace``, a dispatch mode or a transform of ``torch.func`` is active.

    ``make_fx`` and fake tensors have dispatch modes.
    """
    return _dispatch_modes() > 0 or _is_jit_tracing() or _transform() is not None


def is_traced() -> bool:
    """Whether something besides eager execution sees the operations: they must be torch's ops then.

    That is a compiler, an exporter, or what :func:`is_watched` names.
    """
    return torch.compiler.is_compiling() or is_watched()


def is_pretended() -> bool:
    """Whether operations are recorded for later or work without data, and not only observed."""
    modes = torch._C._TorchDispatchModeKey
    return (
        torch.compiler.is_compiling()
        or _is_jit_tracing()
        or _transform() is not None
        or any(
            torch._C._get_dispatch_mode(key) is not None
            for key in (modes.PROXY, modes.FAKE, modes.FUNCTIONAL)
        )
    )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether operations on ``tensor`` are not simply done on memory of its own.

    So it is for meta tensors, for classes with a ``__torch_dispatch__``, such as fake tensors, and
    inside the transforms of ``torch.func``.
    """
    if type(tensor) is not Tensor and torch._C._dispatch_keys(tensor).has(DispatchKey.Python):
        return True
    return (
        tensor.is_meta
        or torch._is_functional_tensor(tensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def readable(name: str, tensor: object) -> Tensor:
    """``tensor``, or the same numbers as a plain tensor, detached; wrappers stay as they are.

    Args:
        name: of the argument, for the message.
        tensor: what was given.

    Raises:
        ValueError: it is not a tensor, or one without strides, without memory or of several ranks.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if isinstance(tensor, UninitializedTensorMixin):
        raise ValueError(f"{name} must be initialized, got {type(tensor).__name__}")
    dtensor = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor exists
    if dtensor is not None and isinstance(tensor, dtensor.DTensor):
        raise ValueError(
            f"{name} must not be a DTensor: sample_sharded takes one, or pass its full_tensor()"
        )
    if tensor.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got a nested one")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if torch.compiler.is_compiling() or is_wrapper(tensor):
        return tensor
    if type(tensor) is not Tensor:  # a subclass around the same memory, such as a Parameter
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.detach().as_subclass(Tensor)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_neg() or tensor.is_conj():
        return tensor.resolve_neg().resolve_conj()
    if not has_memory(tensor):
        raise ValueError(f"{name} must have memory, got a tensor whose storage was freed")
    return tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for the device.

    torch uses pinned memory again only after the copies from it.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def token_ids(name: str, given: object, rule: str, device: torch.device) -> Tensor:
    """Token ids of rows as contiguous int32, as the kernels read them.

    A number that no int32 holds becomes one that is no token's id either.

    Args:
        name: of the argument, for messages.
        given: int32 or int64 on ``device``; a list of ids, or a list of ids for each row, which are
            padded with -1 to the same length.
        rule: what the argument must be, for messages.
        device: of the result.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(given, Tensor):
        ids = readable(name, given)
        if ids.dtype not in (torch.int32, torch.int64):
            raise checks.refusal(name, rule, ids.dtype)
        if ids.device != device:
            raise ValueError(f"{name} must be on the logits' device {device}, got {ids.device}")
    else:
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise checks.refusal(name, rule, given)
        if given and all(map(checks.is_integer, given)):
            ids = torch.tensor(checks.token_ids(name, given), dtype=torch.int64, device="cpu")
        else:
            lists = [checks.token_ids(f"{name}[{row}]", of_row) for row, of_row in enumerate(given)]
            width = max(map(len, lists), default=0)
            padded = [[*of_row, *[-1] * (width - len(of_row))] for of_row in lists]
            ids = torch.tensor(padded, dtype=torch.int64, device="cpu").view(len(lists), width)
        ids = to_device(ids, device)
    if ids.dtype == torch.int64:
        ids = ids.clamp(-1, 2**31 - 1).to(torch.int32)
    return ids.contiguous()


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a strided tensor reaches as far as its sizes and strides do."""
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def is_readable_as_it_is(
    tensor: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``tensor`` is a plain one like this, so that :func:`readable` would return it.

    Its last stride is 1. These are the questions of :func:`readable`, in the order that costs the
    least.
    """
    try:
        return (
            type(tensor) is Tensor
            and tensor.shape == shape
            and tensor.dtype is dtype
            and tensor.device == device
            and (
                (
                    tensor.is_contiguous()
                    and not tensor.storage_offset()
                    and tensor.untyped_storage().nbytes() >= tensor.nbytes
                )
                or (tensor.stride(-1) == 1 and has_memory(tensor))
            )
            and not tensor.requires_grad
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
        )
    except RuntimeError:  # a layout that has no sizes, strides or storage
        return False


def writable(name: str, tensor: object) -> Tensor:
    """``tensor`` itself, which a kernel may read and write.

    Raises:
        ValueError: as :func:`readable`, or it is not a plain tensor with memory of its own.
    """
    plain = readable(name, tensor)
    if plain is not tensor:
        raise ValueError(f"{name} must be a plain torch.Tensor, got {type(tensor).__name__}")
    return plain


def version_of(tensor: Tensor) -> int | None:
    """How often torch has changed ``tensor`` in place; None if it was made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def check_changeable(name: str, tensors: Iterable[Tensor | None]) -> None:
    """A ValueError if torch refuses to change one of the tensors in place."""
    if not torch.is_inference_mode_enabled() and any(
        t is not None and t.is_inference() for t in tensors
    ):
        raise ValueError(
            f"{name} that was made in torch.inference_mode must be changed in that mode; a clone "
            "made outside can be changed anywhere"
        )


def not_of_inference_mode() -> AbstractContextManager[object]:
    """A context for making tensors that can be changed outside of inference mode too."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)
