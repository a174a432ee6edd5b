"""The struct of csrc/llm_sampling.h for ctypes, and the functions that fill it from a call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_sampling.backends.base import POSITION_MODES, ParamSlots, SampleCall
from llm_sampling.history import UPDATE_KINDS, HistoryUpdate, TokenHistory
from llm_sampling.params import KERNEL_TENSORS
from llm_sampling.results import KeptSet, SampleOutput, TokenLogprobs

ABI_VERSION = 3

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NEVER, _ALWAYS, _IF_ALL_VALID = 0, 1, 2


class LogprobsArgs(ctypes.Structure):
    """``LlmSamplingLogprobs``: the addresses of a :class:`TokenLogprobs`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in TokenLogprobs._fields)


class KeptArgs(ctypes.Structure):
    """``LlmSamplingKept``: the addresses of a :class:`KeptSet`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in KeptSet._fields),
        ("max_ids", ctypes.c_int64),
    )


class SampleArgs(ctypes.Structure):
    """``LlmSamplingArgs``, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("num_samples", ctypes.c_int32),
        ("num_top_logprobs", ctypes.c_int32),
        ("advance", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("position_of", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p_cut", ctypes.c_void_p),
        ("repetition_penalty", ctypes.c_void_p),
        ("frequency_penalty", ctypes.c_void_p),
        ("presence_penalty", ctypes.c_void_p),
        ("min_tokens_to_keep", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("logit_bias_offsets", ctypes.c_void_p),
        ("logit_bias_ids", ctypes.c_void_p),
        ("logit_bias_values", ctypes.c_void_p),
        ("logit_bias_size", ctypes.c_int64),
        ("allowed_mask", ctypes.c_void_p),
        ("allowed_mask_stride", ctypes.c_int64),
        ("seen", ctypes.c_void_p),
        ("seen_stride", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("counts_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("filtered", ctypes.c_void_p),
        ("filtered_stride", ctypes.c_int64),
        ("processed", LogprobsArgs),
        ("raw", LogprobsArgs),
        ("kept", KeptArgs),
        ("token_ids", ctypes.c_void_p),
        ("token_ids_stride", ctypes.c_int64),
        ("num_token_ids", ctypes.c_int64),
        ("param_slots", ctypes.c_void_p),
        ("num_param_slots", ctypes.c_int64),
        ("logit_bias_counts", ctypes.c_void_p),
        ("prompt_lengths", ctypes.c_void_p),
        ("text", ctypes.c_void_p),
        ("max_text_length", ctypes.c_int64),
        ("text_lengths", ctypes.c_void_p),
        ("text_prompt_lengths", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("repetition_penalty_scope", ctypes.c_void_p),
        ("extra_output", ctypes.c_void_p),
        ("num_extra_output", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("dry_multiplier", ctypes.c_void_p),
        ("dry_base", ctypes.c_void_p),
        ("dry_allowed_length", ctypes.c_void_p),
        ("dry_penalty_last_n", ctypes.c_void_p),
        ("no_repeat_ngram_size", ctypes.c_void_p),
        ("no_repeat_ngram_window", ctypes.c_void_p),
        ("min_tokens", ctypes.c_void_p),
        ("sequence_offsets", ctypes.c_void_p),
        ("sequence_counts", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("sequences_size", ctypes.c_int64),
        ("first_id", ctypes.c_int64),
        ("whole_vocab_size", ctypes.c_int64),
        ("list_bits", ctypes.c_void_p),
        ("list_before", ctypes.c_void_p),
        ("list_counts", ctypes.c_void_p),
        ("list_amounts", ctypes.c_void_p),
        ("list_capacity", ctypes.c_int64),
    )


class HistoryUpdateArgs(ctypes.Structure):
    """``LlmSamplingUpdate``, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("id_bytes", ctypes.c_int32),
        ("slots", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("ids_stride", ctypes.c_int64),
        ("max_ids", ctypes.c_int64),
        ("prompt_lengths", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("position_of", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("seen", ctypes.c_void_p),
        ("seen_stride", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("counts_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("text", ctypes.c_void_p),
        ("max_text_length", ctypes.c_int64),
        ("text_lengths", ctypes.c_void_p),
        ("text_prompt_lengths", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
    )


def make_args(call: SampleCall) -> SampleArgs:
    """The struct of a call, without results. It holds addresses, so the call must outlive it."""
    args = SampleArgs(
        struct_size=ctypes.sizeof(SampleArgs),
        version=ABI_VERSION,
        rows=call.logits.shape[0],
        vocab_size=call.logits.shape[1],
        dtype=DTYPES[call.logits.dtype],
        num_samples=call.num_samples,
        num_top_logprobs=call.wanted.top_logprobs or 0,
        advance=_NEVER if not call.advance else _IF_ALL_VALID if call.check else _ALWAYS,
        num_threads=torch.get_num_threads(),
    )
    for name in KERNEL_TENSORS:
        tensor = getattr(call.batch, name)
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())
    if call.batch.sequences is not None:
        args.sequences_size = call.batch.sequences.numel()
    args.list_capacity = call.list_capacity
    if call.vocab_slice is not None:
        args.first_id, args.whole_vocab_size = call.vocab_slice
    args.logit_bias_size = call.batch.logit_bias_ids.numel()
    if not call.has_bias:
        args.logit_bias_offsets = None
    if not call.batch.any_output_scope:
        args.repetition_penalty_scope = None
    if call.param_slots is not None:
        _set_param_slots(args, call.param_slots)
    set_logits(args, call.logits, call.allowed_mask)
    if call.history is not None:
        set_history(args, call.history)
        args.slots = call.history.slots.data_ptr()
    if call.record is not None:
        args.record = call.record.data_ptr()
    if call.wanted.token_ids is not None:
        args.token_ids = call.wanted.token_ids.data_ptr()
        of_rows, args.num_token_ids = call.wanted.token_ids.shape
        args.token_ids_stride = args.num_token_ids if of_rows > 1 else 0
    args.kept.max_ids = call.wanted.max_kept_ids
    if call.extra_output is not None:
        args.extra_output = call.extra_output.data_ptr()
        args.num_extra_output = call.extra_output.shape[1]
    return args


def make_update_args(update: HistoryUpdate) -> HistoryUpdateArgs:
    """The struct of an update. It holds addresses, so the update must outlive it."""
    args = HistoryUpdateArgs(
        struct_size=ctypes.sizeof(HistoryUpdateArgs),
        version=ABI_VERSION,
        rows=update.slots.shape[0],
        vocab_size=update.history.vocab_size,
        kind=UPDATE_KINDS[update.kind],
        slots=update.slots.data_ptr(),
        numbers=update.numbers.data_ptr(),
        position_of=POSITION_MODES[update.position_of],
    )
    if update.ids is not None:
        args.id_bytes = update.ids.itemsize
        args.ids = update.ids.data_ptr()
        args.ids_stride, args.max_ids = update.ids.stride(0), update.ids.shape[1]
    if update.prompt_lengths is not None:
        args.prompt_lengths = update.prompt_lengths.data_ptr()
    if update.position is not None:
        args.position = update.position.data_ptr()
    set_history(args, update.history)
    return args


def _set_param_slots(args: SampleArgs, slots: ParamSlots) -> None:
    args.param_slots = slots.of_rows.data_ptr()
    args.num_param_slots = slots.bias_counts.shape[0]
    args.logit_bias_counts = slots.bias_counts.data_ptr()
    if slots.sequence_counts is not None:
        args.sequence_counts = slots.sequence_counts.data_ptr()
    args.position_of = POSITION_MODES[slots.position_of]
    if slots.prompt_lengths is not None:
        args.prompt_lengths = slots.prompt_lengths.data_ptr()


def set_logits(args: SampleArgs, logits: Tensor, allowed_mask: Tensor | None) -> None:
    """Point the struct at one step's logits and mask."""
    args.logits = logits.data_ptr()
    args.logits_stride = logits.stride()[0]  # stride(0) takes twice as long
    if allowed_mask is not None:
        args.allowed_mask = allowed_mask.data_ptr()
        args.allowed_mask_stride = allowed_mask.stride(0)
    elif args.allowed_mask:
        args.allowed_mask = None


def set_history(args: SampleArgs | HistoryUpdateArgs, history: TokenHistory) -> None:
    """Point the struct at the history's tensors, which are new ones when rows come and go."""
    args.seen = history.seen.data_ptr()
    args.seen_stride = history.seen.stride(0)
    args.counts = history.counts.data_ptr()
    args.counts_stride = history.counts.stride(0)
    args.lengths = history.lengths.data_ptr()
    args.num_slots = history.seen.shape[0]
    text = history.text
    if text is not None:
        args.text = text.ids.data_ptr()
        args.max_text_length = text.max_length
        args.text_lengths = text.lengths.data_ptr()
        args.text_prompt_lengths = text.prompt_lengths.data_ptr()
        args.windows = None if text.windows is None else text.windows.data_ptr()


def set_results(args: SampleArgs, output: SampleOutput) -> None:
    """Point the struct at the results' memory."""
    args.tokens = output.tokens.data_ptr()
    args.status = output.status.data_ptr()
    if output.processed is not None:
        _set_addresses(args.processed, output.processed)
    if output.raw is not None:
        _set_addresses(args.raw, output.raw)
    if output.kept is not None:
        _set_addresses(args.kept, output.kept)


def list_memory(args: SampleArgs, device: torch.device) -> tuple[Tensor, ...]:
    """Memory for the lists of a call with rules."""
    words = -(-args.vocab_size // 32)

    def take(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(args.rows, width, dtype=dtype, device=device)

    return take(words), take(words), take(1), take(args.list_capacity, torch.float32)


def set_lists(args: SampleArgs, lists: Sequence[Tensor]) -> None:
    """Point the struct at what ``list_memory`` has made for a call of this size."""
    places = (tensor.data_ptr() for tensor in lists)
    args.list_bits, args.list_before, args.list_counts, args.list_amounts = places


def words_of(args: SampleArgs) -> ctypes.Array[ctypes.c_uint64]:
    """The struct's memory as words, in which a step of a decode loop changes addresses."""
    return (ctypes.c_uint64 * (ctypes.sizeof(SampleArgs) // 8)).from_buffer(args)


def result_places(output: SampleOutput) -> list[int]:
    """Which words of the struct hold the addresses of an output's tensors, by ``tensors_of``."""
    bytes_before = [SampleArgs.tokens.offset, SampleArgs.status.offset]
    for name, kind in (("processed", LogprobsArgs), ("raw", LogprobsArgs), ("kept", KeptArgs)):
        part = getattr(output, name)
        before = getattr(SampleArgs, name).offset
        bytes_before += [
            before + getattr(kind, field).offset
            for field, tensor in zip(part._fields if part else (), part or (), strict=True)
            if tensor is not None
        ]
    return [offset // 8 for offset in bytes_before]


def _set_addresses(args: ctypes.Structure, results: TokenLogprobs | KeptSet) -> None:
    """Point a part of the struct at the results with the same names."""
    for name, tensor in zip(results._fields, results, strict=True):
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())
