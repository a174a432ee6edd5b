"""Which tokens may be drawn: token bitmasks, and the other forms that a user has them in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.history import check_vocab_size
from llm_sampling.tensors import is_readable_as_it_is, readable

#: The forms of an ``allowed_mask``.
Mask = Tensor | npt.NDArray[np.bool_] | npt.NDArray[np.int32] | Sequence[Collection[int] | None]

_FORMS = (
    "an int32 tensor (a bitmask), a bool tensor, or a list with a list of token ids or None for "
    "each row"
)


def pack_mask(
    allowed: Mask, vocab_size: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Pack which tokens may be drawn into a token bitmask, 32 tokens to a word.

    Pack once what holds for many steps: ``allowed_mask`` takes the same forms, and packs them in
    every call.

    Args:
        allowed: bool ``(rows, vocab_size)`` or ``(vocab_size,)``, a tensor or a numpy array, True
            where a token may be drawn; or a list with one element for each row: the ids of the
            tokens that may be drawn, or None for all of them. A bitmask is taken as it is.
        vocab_size: the width of the logits, 1 .. 2^20. Columns and bits past it are dropped, and so
            are ids past it, since padded vocabularies differ in length.
        device: where the bitmask goes. Default: that of a tensor, else the CPU.

    Returns:
        int32 ``(rows, ceil(vocab_size / 32))``, or one row for one row: bit ``t & 31`` of word
        ``t >> 5`` is set where token t may be drawn.

    Raises:
        ValueError: another form, fewer columns than ``vocab_size``, or an id that is no integer or
            negative.

    Example:
        >>> mask = pack_mask([[1, 5], None], vocab_size=32000)  # the second row is free
        >>> tokens = sample(torch.randn(2, 32000), params, allowed_mask=mask).tokens
    """
    return _packed("allowed", allowed, check_vocab_size(vocab_size), device)


def unpack_mask(mask: Tensor, vocab_size: int) -> Tensor:
    """The bits of a token bitmask, such as ``kept.mask`` of a result, as bools.

    Args:
        mask: int32 ``(rows, words)``, with at least ``ceil(vocab_size / 32)`` words.
        vocab_size: the number of tokens.

    Returns:
        bool ``(rows, vocab_size)`` on the mask's device.

    Raises:
        ValueError: another dtype, another number of dimensions, or fewer words.

    Example:
        >>> kept = unpack_mask(sample(logits, params, kept="mask").kept.mask, logits.shape[1])
    """
    mask, vocab_size = readable("mask", mask), check_vocab_size(vocab_size)
    words = -(-vocab_size // 32)
    if mask.dtype != torch.int32 or mask.dim() != 2 or mask.shape[1] < words:
        raise ValueError(
            f"mask must be int32 of shape (rows, words) with words >= {words}, "
            f"got {mask.dtype} of {tuple(mask.shape)}"
        )
    return unpacked(mask, vocab_size)


def unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """The same for a bitmask that has been checked."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab_size].bool()


def _packed(
    name: str, allowed: object, vocab_size: int, device: torch.device | str | None
) -> Tensor:
    words = -(-vocab_size // 32)
    if isinstance(allowed, np.ndarray):
        # a compiler takes arrays for tensors, whose dtype is looked at below
        if not torch.compiler.is_compiling() and allowed.dtype not in (np.bool_, np.int32):
            raise ValueError(f"{name} must be {_FORMS}, got an array of {allowed.dtype}")
        # a copy, since torch takes no negative strides
        allowed = torch.as_tensor(allowed.copy(), device="cpu")
    if isinstance(allowed, Tensor):
        tensor = readable(name, allowed)
        if tensor.dtype not in (torch.bool, torch.int32) or tensor.dim() not in (1, 2):
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} must be {_FORMS}, got {tensor.dtype} of shape {shape}")
        if tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        is_bits = tensor.dtype == torch.int32
        if is_bits and tensor.shape[1] == vocab_size > words:
            raise ValueError(
                f"{name} must be bool where it has a column for each token ({vocab_size}): int32 "
                f"is a bitmask of {words} columns"
            )
        least, width = (words, "ceil(vocab_size / 32)") if is_bits else (vocab_size, "vocab_size")
        if tensor.shape[-1] < least:
            raise ValueError(
                f"{name} must have at least {width} = {least} columns, got {tensor.shape[-1]}: "
                "make it as wide as the logits, and say of the tokens past the mask whether they "
                "may be drawn"
            )
        tensor = tensor[:, :least]
        if not is_bits:
            tensor = pack_bits(tensor, words)
        return tensor if device is None else tensor.to(device)
    if not isinstance(allowed, Sequence) or isinstance(allowed, (str, bytes)):
        raise ValueError(f"{name} must be {_FORMS}, got {type(allowed).__name__}")
    free, places, bits = [], [], []
    for row, ids in enumerate(allowed):
        if ids is None:
            free.append(row)
            continue
        tokens = set(checks.token_ids(f"{name}[{row}]", ids))
        if tokens and min(tokens) < 0:
            raise checks.refusal(f"{name}[{row}]", "token ids >= 0, or None", min(tokens))
        tokens = {token for token in tokens if token < vocab_size}
        places += [row * words + (token >> 5) for token in tokens]
        bits += [1 << (token & 31) for token in tokens]
    place, bit, whole = (
        torch.tensor(x, dtype=torch.int64, device="cpu") for x in (places, bits, free)
    )
    packed = torch.zeros(len(allowed) * words, dtype=torch.int64, device="cpu")
    packed = packed.index_add(0, place, bit).view(len(allowed), words).index_fill(0, whole, -1)
    return packed.to(torch.int32).to("cpu" if device is None else device)


def pack_bits(allowed: Tensor, words: int) -> Tensor:
    """Bool ``(rows, vocab_size)`` as int32 ``(rows, words)``."""
    padded = torch.nn.functional.pad(allowed, (0, 32 * words - allowed.shape[1]))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=allowed.device)
    octets = (padded.view(-1, words, 4, 8) * weights).sum(-1, dtype=torch.uint8)
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=allowed.device)
    # a view as int32 would do as well, but torch.jit.trace cannot follow it
    return (octets.to(torch.int64) << shifts).sum(-1).to(torch.int32)


def check_mask(mask: object, rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """An ``allowed_mask`` in any form as a bitmask of ``rows`` rows, with last stride 1.

    Raises:
        ValueError: it has another form, too few columns, another number of rows or another device.
    """
    words = rows, -(-vocab_size // 32)
    if not torch.compiler.is_compiling() and is_readable_as_it_is(mask, words, torch.int32, device):
        return mask  # type: ignore[return-value]
    if isinstance(mask, Tensor) and mask.device != device:
        raise ValueError(f"allowed_mask must be on the logits' device {device}, got {mask.device}")
    packed = _packed("allowed_mask", mask, vocab_size, device)
    if packed.shape[0] == 1 and isinstance(mask, (Tensor, np.ndarray)):
        packed = packed.expand(rows, -1)  # one row for all
    if packed.shape[0] != rows:
        if isinstance(mask, (Tensor, np.ndarray)):
            rule = f"one row for each row of the logits ({rows}), or one for all"
        else:
            rule = f"one element for each row of the logits ({rows})"
        raise ValueError(f"allowed_mask must have {rule}, got {packed.shape[0]}")
    return packed if packed.stride(1) == 1 else packed.contiguous()
