"""Sampling from a vocabulary that is cut into slices, one on each rank of a process group.

    this rank's logits -+- bias, mask, penalties  -+- few candidates: an all-gather    -+- token
                        |  (backend's kernel)      +- else: threshold, then the draw  -+
    params, history, mask of the whole vocabulary, on every rank

No rank receives another's logits. Masses and counts are integers, so their sums over the ranks are
exact, and every rank returns the token that ``sample`` returns for the whole row, to the bit.

There are two algorithms. The parameters, which are the same on every rank, choose one:

* **Candidates**, if each row is greedy or keeps at most ``MOST_CANDIDATES`` tokens by top-k. A rank
  sends its own best tokens, 64 bits each, and the kernel draws from all ranks' tokens in id order.
* **Threshold**, for all other batches. What steps 11 to 13 keep is a prefix of the order, which a
  threshold describes: the key of the last kept token, and how many tokens with this key are kept. A
  radix search finds it: for each digit of the key, from the highest, the ranks add up how many
  tokens (or how much mass) have each value of the digit. Then the kept mass of every rank tells on
  which rank the draw falls, and that rank sends its token.

The only collectives are all-gather and all-reduce of integers, with MAX and SUM. With
``check=False`` nothing waits for a device. docs/scale.md counts messages and bytes.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from llm_sampling import backends, reference
from llm_sampling.backends.base import (
    STATUS_NAN,
    STATUS_NO_CANDIDATE,
    STATUS_POS_INF,
    BackendModule,
    SampleCall,
    VocabSlice,
    raise_on_status,
)
from llm_sampling.calls import (
    Params,
    check_draws,
    check_history_of,
    check_logits,
    pack,
    position_of,
)
from llm_sampling.checks import integer_at_least
from llm_sampling.fields import FIELDS
from llm_sampling.history import MAX_VOCAB_SIZE, TokenHistory, slice_bits
from llm_sampling.masks import check_mask
from llm_sampling.params import BIAS_TENSORS, DTYPES, RULE_TENSORS, BatchParams, SamplingParams
from llm_sampling.results import KINDS, Kind, SampleOutput, TokenLogprobs, Wanted, kinds_of
from llm_sampling.tensors import is_pretended, is_wrapper

#: The largest number of tokens a row for which the ranks exchange candidates.
MOST_CANDIDATES = 256
#: Bits of each digit of a 32-bit key in the radix search, from the highest. Each costs a message.
DIGITS = (7, 7, 6, 6, 6)

_INF = math.inf
_LOW32 = 2**32 - 1
#: A threshold is the last kept key times this, minus how many tokens with that key are kept. A row
#: has fewer tokens than this.
_COUNTS = 2 * MAX_VOCAB_SIZE


def sample_sharded(
    local_logits: Tensor,
    params: Params,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    history: TokenHistory | None = None,
    allowed_mask: Tensor | None = None,
    positions: Sequence[int] | Tensor | None = None,
    num_samples: int = 1,
    logprobs: Kind | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> SampleOutput:
    """Draw a token from each row of logits whose vocabulary is spread over the ranks of a group.

    Every rank calls it with its own slice and the same other arguments, and every rank gets the
    token that :func:`llm_sampling.sample` would give for the whole row, to the bit. A rank sends at
    most a few KiB a row; see docs/scale.md.

    Args:
        local_logits: ``(rows, local_vocab_size)``, as for ``sample``: this rank's slice, which may
            be of any width, 0 included. Or a ``DTensor`` of the whole ``(rows, vocab_size)``,
            sharded in dimension 1 over one dimension of its mesh and replicated over the others.
        params: as for ``sample``, of the same values on every rank. Rows without a seed get the
            first rank's.
        group: the ranks that hold the vocabulary; of a DTensor its own. Default: all ranks.
        vocab_start: the id of this slice's first token; of a DTensor its own. The slices follow
            each other in the order of the ranks.
        history: of the whole vocabulary, the same on every rank, so that ``history.append(tokens)``
            keeps it so. Only this rank's slice of it is read.
        allowed_mask: int32 ``(rows, ceil(vocab_size / 32))`` of the whole vocabulary.
        positions: as for ``sample``.
        num_samples: as for ``sample``.
        logprobs: None, "processed" or "raw", as for ``sample``.
        backend: the kernel that works on this rank's part, as for ``sample``.
        check: first compare the arguments of all ranks, the tokens of their histories and their
            masks included, and in the end raise for rows with NaN, +inf or no candidate. Default:
            True for logits on the CPU, False elsewhere, because it waits for the device. Without
            it, ranks that disagree fail as the group's backend does, wait until its timeout, or
            return meaningless tokens.

    Returns:
        ``SampleOutput(tokens, logprobs, status)`` as of ``sample``, the same on every rank.

    Raises:
        ValueError: an argument is out of its range; or ``check`` found that the ranks disagree or
            that the slices do not make up a vocabulary, and all ranks raise.
        InvalidLogitsError: ``check`` found bad rows, in any slice; all ranks raise.
        RuntimeError: ``check`` found that another rank refused its arguments; a rank has ended, or
            does not join within the group's timeout; the named backend cannot run here;
            torch.distributed is not initialised.

    Example:
        >>> start, stop = rank * 16032, (rank + 1) * 16032
        >>> logits = hidden @ lm_head[start:stop].T  # this rank's part of 8
        >>> tokens = sample_sharded(logits, params, vocab_start=start).tokens
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("sample_sharded needs torch.distributed.init_process_group first")
    local, group, vocab_start, whole = _unwrapped(local_logits, group, vocab_start)
    ranks = _Ranks(group)
    on_cpu = not isinstance(local, Tensor) or local.device.type == "cpu"
    compare = on_cpu if check is None else bool(check)
    part: _Part | None = None
    refusal: Exception | None = None
    header = [0] * len(_HEADER)
    try:
        part = _checked(
            local, params, vocab_start, history, allowed_mask, positions, num_samples, logprobs,
            backend, check,
        )  # fmt: skip
        if compare:
            header = _header(part, history, whole)
    except Exception as error:
        refusal = error  # raised after the exchange, since the other ranks wait for the header
    if compare:
        device = "cpu" if on_cpu else local.device
        headers = ranks.gather(torch.tensor([header], dtype=torch.int64, device=device))[:, 0]
    if refusal is not None:
        raise refusal
    if compare:
        _check_headers(headers.tolist())
    assert part is not None
    few = 0 < part.batch.kept_at_most <= MOST_CANDIDATES
    output = _by_candidates(part, ranks) if few else _by_threshold(part, ranks)
    if compare:
        raise_on_status(output.status)
    return output


# ------------------------------------------------------ arguments, and what the ranks compare


@dataclass
class _Part:
    """This rank's slice, and the checked arguments, which are of the whole vocabulary."""

    logits: Tensor
    columns: int  # the width of the slice; where it is 0 the logits have one column of -inf
    vocab_start: int
    batch: BatchParams
    history: TokenHistory | None
    allowed_mask: Tensor | None
    num_samples: int
    logprobs: Kind | None
    backend: BackendModule


def _unwrapped(
    logits: Tensor, group: ProcessGroup | None, vocab_start: int | None
) -> tuple[Tensor, ProcessGroup | None, int | None, int]:
    """The local tensor, its group and first id, and the whole width of a DTensor, -1 for others."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor exists
    if dtensor is None or not isinstance(logits, dtensor.DTensor):
        if dist.get_rank(group) < 0:
            raise ValueError("group must be one that this process is a member of")
        return logits, group, vocab_start, -1
    if group is not None or vocab_start is not None:
        raise ValueError("group and vocab_start must be left out with a DTensor, which has its own")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (rows, vocab_size), got {tuple(logits.shape)}")
    sharded = [
        dim for dim, placement in enumerate(logits.placements) if not placement.is_replicate()
    ]
    if len(sharded) != 1 or not logits.placements[sharded[0]].is_shard(1):
        raise ValueError(
            "a DTensor must be sharded in dimension 1 over one dimension of its mesh and "
            f"replicated over the others, got {logits.placements}"
        )
    local, whole = logits.to_local(), logits.shape[1]
    group = logits.device_mesh.get_group(sharded[0])
    width = -(-whole // group.size())  # as torch.chunk divides
    start = min(group.rank() * width, whole)
    if local.shape[1] != min(width, whole - start):
        raise ValueError(
            f"a DTensor must be cut into slices of {width}, and this rank has {local.shape[1]}: "
            "pass local tensors and vocab_start"
        )
    return local, group, start, whole


def _checked(
    logits: Tensor,
    params: Params,
    vocab_start: int | None,
    history: TokenHistory | None,
    allowed_mask: Tensor | None,
    positions: Sequence[int] | Tensor | None,
    num_samples: int,
    logprobs: Kind | None,
    backend: str,
    check: bool | None,
) -> _Part:
    """The arguments after all checks that need no other rank."""
    columns = 1
    if isinstance(logits, Tensor) and logits.dim() == 2:
        columns = logits.shape[1]
        if columns == 0:  # no kernel takes rows without a token
            logits = logits.new_full((logits.shape[0], 1), -_INF)
    logits = check_logits(logits)
    if is_pretended() or is_wrapper(logits):
        raise ValueError(
            "local_logits must be a plain tensor outside of tracers and transforms, since "
            f"the ranks exchange what they find in it, got {type(logits).__name__}"
        )
    rows, device = logits.shape[0], logits.device
    vocab_start = integer_at_least("vocab_start", vocab_start, 0)
    batch = pack(params, rows, device)
    vocab_size = history.vocab_size if isinstance(history, TokenHistory) else 0
    check_history_of(batch, history, vocab_size, device)
    num_samples = check_draws(num_samples, check)
    kinds = kinds_of(logprobs)
    if len(kinds) > 1:
        raise ValueError(f"logprobs must be one kind for sample_sharded, got {logprobs!r}")
    if allowed_mask is not None:
        if not isinstance(allowed_mask, Tensor):
            kind = type(allowed_mask).__name__
            raise ValueError(
                f"allowed_mask must be a tensor, got {kind}: pack_mask makes one of the whole "
                "vocabulary"
            )
        columns_of_a_word = 32 if allowed_mask.dtype == torch.int32 else 1
        width = columns_of_a_word * (allowed_mask.shape[-1] if allowed_mask.dim() else 1)
        allowed_mask = check_mask(allowed_mask, rows, min(max(1, width), MAX_VOCAB_SIZE), device)
    return _Part(
        logits=logits,
        columns=columns,
        vocab_start=vocab_start,
        batch=replace(batch, position=position_of(positions, batch, history)),
        history=history if batch.needs_history else None,
        allowed_mask=allowed_mask,
        num_samples=num_samples,
        logprobs=kinds[0] if kinds else None,
        backend=backends.resolve(backend, device),
    )


#: Header that all ranks exchange first: validation status and shapes. -1 stands for None.
_HEADER = (
    *("accepted", "vocab_start", "columns", "whole", "history", "mask"),
    *("rows", "num_samples", "logprobs", "flags", "params", "tokens", "allowed"),
)
#: The entries that must be equal on all ranks, in the words of the error message.
_SAME = {
    "rows": "the rows of local_logits",
    "num_samples": "num_samples",
    "logprobs": "logprobs (by number)",
    "flags": "what params turn on (as bits)",
    "params": "params and positions (by checksum)",
}
#: The same of entries that are compared once the shapes agree.
_SAME_CONTENTS = {
    "tokens": "the tokens in history (by checksum)",
    "allowed": "allowed_mask (by checksum)",
}


def _header(part: _Part, history: TokenHistory | None, whole: int) -> list[int]:
    """This rank's values of ``_HEADER``."""
    batch = part.batch
    flags = (batch.any_top_k, batch.any_top_p, batch.any_floor, batch.unseeded is not None)
    bits = sum(flag << bit for bit, flag in enumerate(flags)) + (batch.kept_at_most << len(flags))
    if batch.unseeded is not None:  # the seeds of such rows have no meaning and may differ
        batch = replace(batch, seed=batch.seed.masked_fill(batch.unseeded, 0))
    tensors = (getattr(batch, name) for name in DTYPES)
    checksum = 0
    for tensor in tensors:
        if tensor is not None:
            checksum = _checksum(tensor, checksum)
    values = {
        "accepted": 1,
        "vocab_start": part.vocab_start,
        "columns": part.columns,
        "whole": whole,
        "history": -1 if history is None else history.vocab_size,
        "mask": -1 if part.allowed_mask is None else part.allowed_mask.shape[1],
        "rows": part.logits.shape[0],
        "num_samples": part.num_samples,
        "logprobs": -1 if part.logprobs is None else KINDS.index(part.logprobs),
        "flags": bits,
        "params": checksum,
        "tokens": 0 if part.history is None else _checksum_of_history(part.history, batch),
        "allowed": 0 if part.allowed_mask is None else _checksum(part.allowed_mask),
    }
    return [values[name] for name in _HEADER]


def _checksum(tensor: Tensor, start: int = 0) -> int:
    return zlib.crc32(tensor.cpu().numpy().tobytes(), start)


def _checksum_of_history(history: TokenHistory, batch: BatchParams) -> int:
    """A checksum of what is read of the rows: seen tokens, their counts and, for rules, texts."""
    slots = history.slots.to(torch.int64)
    words = history.seen[slots]
    row, word = words.nonzero(as_tuple=True)
    words = words[row, word]
    tokens = word.unsqueeze(1) * 32 + torch.arange(32, device=word.device)
    is_seen = (words.unsqueeze(1) >> torch.arange(32, device=word.device, dtype=torch.int32)) & 1
    tokens = tokens.clamp(max=history.vocab_size - 1)
    counts = history.counts[slots[row].unsqueeze(1), tokens] * is_seen
    read = [row, word, words, counts]
    if batch.has_rules:
        read.append(history.lengths[slots])
        if history.text is not None:
            ids, length = history.text.ids[slots], history.text.lengths[slots]
            is_kept = torch.arange(ids.shape[1], device=ids.device) < length.unsqueeze(1)
            read += [length, torch.where(is_kept, ids, 0)]
    checksum = 0
    for tensor in read:
        checksum = _checksum(tensor, checksum)
    return checksum


def _check_headers(headers: list[list[int]]) -> None:
    """Raise if the ranks disagree. All ranks have the same headers, so all raise the same error."""
    by_rank = {name: [header[i] for header in headers] for i, name in enumerate(_HEADER)}
    refusing = [str(rank) for rank, accepted in enumerate(by_rank["accepted"]) if not accepted]
    if refusing:
        raise RuntimeError(
            f"sample_sharded refused the arguments of rank {', '.join(refusing)} of the group, "
            "where it raised the reason"
        )

    def check_same(names: Mapping[str, str]) -> None:
        for name, known_as in names.items():
            values = by_rank[name]
            if len(set(values)) > 1:
                raise ValueError(f"{known_as} must be the same on every rank, got {values} by rank")

    check_same(_SAME)
    columns = by_rank["columns"]
    if by_rank["vocab_start"] != [sum(columns[:rank]) for rank in range(len(columns))]:
        raise ValueError(
            "the slices must follow each other from id 0 on, got vocab_start "
            f"{by_rank['vocab_start']} and columns {columns} by rank"
        )
    vocab_size = sum(columns)
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the slices must make up a vocab_size in 1 .. 2^20, got {vocab_size}")
    for name, wanted, rule in (
        ("whole", vocab_size, "a DTensor must be as wide as all slices"),
        ("history", vocab_size, "history must have the vocab_size of all slices"),
        ("mask", -(-vocab_size // 32), "allowed_mask must have a bit for each id of all slices"),
    ):
        values = by_rank[name]
        if set(values) not in ({-1}, {wanted}):
            raise ValueError(f"{rule}, {wanted}, or be None everywhere, got {values} by rank")
    check_same(_SAME_CONTENTS)


class _Ranks:
    """The collectives of a group."""

    def __init__(self, group: ProcessGroup | None) -> None:
        group = dist.group.WORLD if group is None else group
        assert group is not None
        self.group = group

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather: every rank's tensor, ``(ranks, *tensor.shape)``."""
        everyone = tensor.new_empty((self.group.size() * tensor.shape[0], *tensor.shape[1:]))
        self._all(_all_gather, everyone, tensor.contiguous())
        return everyone.view(self.group.size(), *tensor.shape)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over the ranks, in place."""
        self._all(dist.all_reduce, tensor, ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce: the maximum over the ranks, in place."""
        self._all(dist.all_reduce, tensor, ReduceOp.MAX)
        return tensor

    def _all(self, collective: Callable[..., object], *args: object) -> None:
        try:
            collective(*args, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"sample_sharded on rank {self.group.rank()} of {self.group.size()}: a message "
                "failed, as it does where a rank has ended or does not come within the group's "
                f"timeout: {error}"
            ) from error


#: torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# ----------------------------------------------------------------------------- this rank's slice


#: The tensors of a batch that steps 2 to 6 and 14 read.
_NOT_FILTERING = {
    *(field.name for field in FIELDS.values() if field.kind in ("penalty", "scope", "seed")),
    *(*BIAS_TENSORS, *RULE_TENSORS, "unseeded", "position"),
}
_OFF_ROW = BatchParams.from_list([SamplingParams()])
#: All other tensors, with the value at which each does nothing: temperature, filters and their
#: floor. Made from the defaults, so that a new filter is among them.
_OFF: dict[str, float] = {
    name: getattr(_OFF_ROW, name).item() for name in DTYPES if name not in _NOT_FILTERING
}


def _call(part: _Part, **changes: Tensor | bool) -> SampleCall:
    """A call of the kernel on this slice: steps 1 to 6, and of the others what ``changes`` has."""
    batch = part.batch
    off: dict[str, Tensor | bool] = {
        name: torch.full_like(getattr(batch, name), value) for name, value in _OFF.items()
    }
    off |= {
        "logit_bias_ids": batch.logit_bias_ids - part.vocab_start,
        "all_greedy": False,
        "any_filter": False,
    }
    start, columns = part.vocab_start, part.columns
    history, mask = part.history, part.allowed_mask
    if not columns:
        history = mask = None
    vocab_slice = None
    if history is not None:
        if batch.has_rules:
            vocab_slice = VocabSlice(start, history.vocab_size)
        history = history.part(start, columns, has_text=batch.has_rules)
    if vocab_slice is None:
        batch = batch.without_rules()
    return SampleCall(
        logits=part.logits,
        batch=replace(batch, **(off | changes)),  # type: ignore[arg-type]
        history=history,
        allowed_mask=None if mask is None else slice_bits(mask, start, columns),
        vocab_slice=vocab_slice,
    )


def _processed(part: _Part, call: SampleCall) -> tuple[Tensor, Tensor]:
    """Steps 1 to 6 of this slice, and the filters of ``call``; and whether a NaN was found.

    Returns:
        float32 ``(rows, columns)``, -inf for what is not kept; and int64 ``(rows,)``, 1 for NaN.
    """
    x = part.backend.filter_logits(call)
    temperature = torch.zeros_like(call.batch.temperature)
    greedy = replace(call.batch, temperature=temperature, all_greedy=True)
    status = part.backend.sample(replace(call, batch=greedy)).status
    # filter_logits shifts a row with +inf by it, so that +inf is 0 and all else is far below
    is_shifted = ((status & STATUS_POS_INF) != 0).unsqueeze(-1)
    x = torch.where(is_shifted & (x == 0), _INF, x)
    return x, (status & STATUS_NAN).to(torch.int64)


def _key(x: Tensor) -> Tensor:
    """An unsigned 32-bit integer, in int64, in the order of the float32 numbers ``x``."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) + 2**31


def _value(key: Tensor) -> Tensor:
    """The float32 number that has this key."""
    bits = (key - 2**31).to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def _seeds(part: _Part, ranks: _Ranks) -> list[Tensor]:
    """New seeds for rows without one, so that the maximum over the ranks is the first rank's.

    The list is empty if all rows have a seed.
    """
    if part.batch.unseeded is None:
        return []
    # Every rank draws, so that the states of their generators remain equal if they were.
    seed = part.batch.seeded().seed
    return [seed if ranks.group.rank() == 0 else torch.full_like(seed, -(2**63))]


# ------------------------------------------------------------------------------------- candidates


def _by_candidates(part: _Part, ranks: _Ranks) -> SampleOutput:
    """Gather every rank's best tokens; the kernel then draws from them on every rank."""
    batch = part.batch
    greedy = batch.temperature == 0
    at_most = torch.where(greedy, 1, batch.top_k)
    floor = torch.where(greedy, 1, batch.min_tokens_to_keep)
    call = _call(part, top_k=at_most, min_tokens_to_keep=floor, any_filter=True)
    x, nan = _processed(part, call)

    # The kernel leaves at most this many tokens and has decided which of equal ones to keep, so
    # the order in which topk returns them does not matter.
    width = batch.kept_at_most
    values, ids = x.topk(min(width, x.shape[1]), sorted=False)
    ids, by_id = ids.sort(-1)
    values = values.gather(-1, by_id)
    missing = (0, width - ids.shape[1])
    values = torch.nn.functional.pad(values, missing, value=-_INF)
    ids = torch.nn.functional.pad(ids, missing)
    # A candidate is one integer: the bits of its value, then its id.
    candidates = (values.view(torch.int32).to(torch.int64) << 32) | (ids + part.vocab_start)
    message = [candidates, nan.unsqueeze(-1)]
    message += [seed.unsqueeze(-1) for seed in _seeds(part, ranks)]
    if part.logprobs == "raw":
        raw = _RawSoftmax.of(part.logits)
        message += [raw.x.gather(-1, ids).view(torch.int64), raw.message()]
    gathered = ranks.gather(torch.cat(message, -1))

    candidates = gathered[..., :width].transpose(0, 1).flatten(1).contiguous()  # in id order
    ids = candidates & _LOW32
    if batch.unseeded is not None:
        batch = _seeded(batch, gathered[..., width + 1].amax(0))
    output = part.backend.sample(
        SampleCall(
            logits=(candidates >> 32).to(torch.int32).view(torch.float32),
            batch=replace(
                batch.without_rules(),
                logit_bias_offsets=torch.zeros_like(batch.logit_bias_offsets),
                logit_bias_ids=batch.logit_bias_ids[:0],
                logit_bias_values=batch.logit_bias_values[:0],
                needs_history=False,
            ),
            history=None,
            allowed_mask=None,
            num_samples=part.num_samples,
            wanted=Wanted(("processed",) if part.logprobs == "processed" else ()),
        )
    )
    drawn = output.tokens.reshape(-1, part.num_samples)
    tokens = ids.gather(-1, drawn.clamp(min=0)).masked_fill(drawn < 0, -1)
    logprobs = output.logprobs
    if part.logprobs == "raw":
        x64 = gathered[..., -2 - width : -2].transpose(0, 1).flatten(1).view(torch.float64)
        logprobs = _RawSoftmax.logprobs(x64.gather(-1, drawn.clamp(min=0)), gathered[..., -2:])
        logprobs = logprobs.masked_fill(drawn < 0, math.nan)
    any_nan = gathered[..., width].amax(0).to(torch.int32)
    return _shaped(part, tokens, logprobs, output.status | any_nan * STATUS_NAN)


def _seeded(batch: BatchParams, drawn: Tensor) -> BatchParams:
    """The batch with the seeds ``drawn`` in the rows that have none."""
    assert batch.unseeded is not None
    return replace(batch, seed=torch.where(batch.unseeded, drawn, batch.seed), unseeded=None)


def _shaped(part: _Part, tokens: Tensor, logprobs: Tensor | None, status: Tensor) -> SampleOutput:
    """The result, with ``(rows, num_samples)`` in the shape that users get."""
    shape = (-1,) if part.num_samples == 1 else (-1, part.num_samples)
    if logprobs is None:
        return SampleOutput(tokens.reshape(shape), None, status)
    logprobs = logprobs.reshape(shape)
    of_kind = {part.logprobs: TokenLogprobs(logprobs)}
    return SampleOutput(
        tokens.reshape(shape), logprobs, status, of_kind.get("processed"), of_kind.get("raw")
    )


# -------------------------------------------------------------------------------------- threshold


@dataclass
class _KeptSet:
    """This rank's part of the kept set, with the depths and masses of steps 9 and 10.

    Attributes:
        x: float32 ``(rows, columns)`` after step 6.
        best: the largest x of all ranks, ``(rows,)``.
        d: depths ``(rows, columns)``.
        w: masses ``(rows, columns)``; 0 for tokens that are not kept.
        tied: bool ``(rows, columns)``, the tokens with the last kept key. Not all need be kept.
        count: how many tied tokens are kept, over all ranks, ``(rows,)``.
        each: the mass of one of them, ``(rows,)``.
    """

    x: Tensor
    best: Tensor
    d: Tensor
    w: Tensor
    tied: Tensor
    count: Tensor
    each: Tensor


def _by_threshold(part: _Part, ranks: _Ranks) -> SampleOutput:
    """Find the threshold of the kept set, then on which rank the draw falls, and its token."""
    batch = part.batch
    call = _call(part)
    x, nan = _processed(part, call)
    message = [_key(x.amax(-1)), nan, *_seeds(part, ranks)]
    maxima = ranks.max(torch.stack(message, -1))
    best, nan = _value(maxima[:, 0]), maxima[:, 1]
    if batch.unseeded is not None:
        batch = _seeded(batch, maxima[:, 2])

    # 9 depth, 10 mass
    d = reference.depth(x, batch.temperature, best)
    w = torch.where(x > -_INF, reference.mass(d), 0)
    zero = torch.zeros_like(nan)
    kept = _KeptSet(x, best, d, w, torch.zeros_like(x, dtype=torch.bool), zero, zero)
    if batch.any_top_k or batch.any_filter:
        _filter(kept, batch, ranks)
    tokens, logprobs = _draw(kept, part, batch, ranks)

    none = (best == -_INF).unsqueeze(-1)
    if logprobs is not None:
        logprobs = logprobs.masked_fill(none, math.nan)
    status = (
        nan * STATUS_NAN + (best == -_INF) * STATUS_NO_CANDIDATE + (best == _INF) * STATUS_POS_INF
    )
    return _shaped(part, tokens.masked_fill(none, -1), logprobs, status.to(torch.int32))


def _draw(
    kept: _KeptSet, part: _Part, batch: BatchParams, ranks: _Ranks
) -> tuple[Tensor, Tensor | None]:
    """Step 14 and the logprobs, each ``(rows, num_samples)``; without meaning in an empty row."""
    w, tied = kept.w, kept.tied
    message = [torch.where(tied, 0, w).sum(-1), tied.sum(-1)]
    if part.logprobs == "raw":
        raw = _RawSoftmax.of(part.logits)
        message += raw.message().unbind(-1)
    gathered = ranks.gather(torch.stack(message, -1))

    # The kept ties are the first ones in id order, so those of the first ranks.
    ties = gathered[..., 1]
    ties_before = ties.cumsum(0) - ties
    kept_ties = torch.minimum((kept.count - ties_before).clamp(min=0), ties)
    kept_mass = gathered[..., 0] + kept_ties * kept.each
    mass_up_to = kept_mass.cumsum(0)
    s = mass_up_to[-1]
    me = ranks.group.rank()
    mine, before = kept_mass[me], mass_up_to[me] - kept_mass[me]
    w = torch.where(tied & (tied.cumsum(-1) > kept_ties[me].unsqueeze(-1)), 0, w)

    # 14 draw: the rank on which it falls contributes its token to the sum, the others 0.
    cumulative = w.cumsum(-1)
    draws = []
    assert batch.position is not None
    for draw in range(part.num_samples):
        words = reference.philox(batch.seed, batch.position, draw)
        r = (reference.scaled(words[0], words[1], s) - before).unsqueeze(-1)
        index = (cumulative <= r).sum(-1, keepdim=True).clamp(max=w.shape[1] - 1)
        message = [index + part.vocab_start]
        if part.logprobs == "processed":
            message.append(w.gather(-1, index))
        elif part.logprobs == "raw":
            message.append(raw.x.gather(-1, index).view(torch.int64))
        here = (r >= 0) & (r < mine.unsqueeze(-1))
        draws.append(torch.where(here, torch.cat(message, -1), 0))
    drawn = ranks.sum(torch.stack(draws, 1))

    logprobs = None
    if part.logprobs == "processed":
        logprobs = (drawn[..., 1].double().log() - s.double().log().unsqueeze(-1)).to(torch.float32)
    elif part.logprobs == "raw":
        x64 = drawn[..., 1].contiguous().view(torch.float64)
        logprobs = _RawSoftmax.logprobs(x64, gathered[..., 2:])
    return drawn[..., 0], logprobs


def _filter(kept: _KeptSet, batch: BatchParams, ranks: _Ranks) -> None:
    """Steps 8 and 11 to 13: zero the mass of what is not kept, and find the tied tokens.

    A threshold is one number: the last kept key, times ``_COUNTS``, minus how many tokens with that
    key are kept. So the smaller one of two thresholds keeps more.
    """
    x, key, best = kept.x, _key(kept.x), kept.best
    candidate = x > -_INF
    threshold = torch.full_like(key[:, 0], -_COUNTS)  # keeps everything

    def end_of(threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its last key, how many tokens with that key are kept, their depth and their mass."""
        last = (threshold + MAX_VOCAB_SIZE) // _COUNTS
        count = last * _COUNTS - threshold
        value = torch.where(count > 0, _value(last.clamp(min=0)), best)
        depth = reference.depth(value.unsqueeze(-1), batch.temperature, best).squeeze(-1)
        return last, count, depth, reference.mass(depth)

    def keeping(number: Tensor) -> Tensor:
        """The threshold that keeps so many tokens, or all candidates if there are fewer."""
        one_each = candidate.to(torch.int32)
        last, left = _search(ranks, key, one_each, lambda total: torch.minimum(number, total))
        return last * _COUNTS - left

    # 8 greedy, 11 top-k
    floor = batch.min_tokens_to_keep.to(torch.int64)
    if batch.any_top_k:
        top_k = batch.top_k.to(torch.int64)
        at_most = torch.where(top_k > 0, torch.maximum(top_k, floor), MAX_VOCAB_SIZE)
        threshold = keeping(torch.where(batch.temperature == 0, 1, at_most))
    at_least = keeping(floor) if batch.any_floor else threshold

    # 12 top-p
    if batch.any_top_p:
        last, count, _, each = end_of(threshold)
        nucleus, left = _search(
            ranks,
            key,
            torch.where(key > last.unsqueeze(-1), kept.w, 0),
            lambda total: reference.target(total, batch.top_p),
            at_last=(last, count * each),
        )
        _, _, _, each = end_of(nucleus * _COUNTS - 1)
        each = each.clamp(min=1)
        nucleus = nucleus * _COUNTS - (left + each - 1) // each
        if batch.any_floor:
            nucleus = torch.minimum(nucleus, at_least)
        threshold = torch.where(batch.top_p < 1, torch.maximum(threshold, nucleus), threshold)

    # 13 min-p: keep tokens down to a depth, and where the floor reaches deeper, down to the floor
    depth_cut = reference.depth_cut(batch)
    near = kept.d <= depth_cut.unsqueeze(-1)
    deeper = torch.zeros_like(threshold, dtype=torch.bool)
    if batch.any_floor:
        deeper = end_of(at_least)[2] > depth_cut
        threshold = torch.where(deeper, torch.maximum(threshold, at_least), threshold)
        near |= deeper.unsqueeze(-1)
    last, count, depth, kept.each = end_of(threshold)
    kept.count = torch.where((depth <= depth_cut) | deeper, count, 0)
    kept.tied = candidate & (key == last.unsqueeze(-1))
    kept.w = torch.where(near & (key >= last.unsqueeze(-1)), kept.w, 0)


def _search(
    ranks: _Ranks,
    key: Tensor,
    weight: Tensor,
    need: Callable[[Tensor], Tensor],
    at_last: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Radix search: the key at which a running sum, from the largest key down, reaches a need.

    The sum is that of the weights of all ranks' tokens.

    Args:
        ranks: the group.
        key: ``(rows, columns)``.
        weight: the integer weight of each token, of the same shape.
        need: gives the need of each row from its sum of all weights ``(rows,)``, which it must not
            exceed.
        at_last: a key of each row and a weight to add to it, both ``(rows,)`` and the same on all
            ranks.

    Returns:
        The key, and the need less the weights above that key; both int64 ``(rows,)``.
    """
    below = 32
    found, above = torch.zeros_like(key[:, 0]), torch.zeros_like(key[:, 0])
    needed: Tensor | None = None
    for bits in DIGITS:
        below -= bits
        digit = (key >> below) & (2**bits - 1)
        histogram = weight.new_zeros(key.shape[0], 2**bits).scatter_add_(-1, digit, weight)
        histogram = ranks.sum(histogram).to(torch.int64)
        if at_last is not None:
            last, more = at_last
            place = ((last >> below) & (2**bits - 1)).unsqueeze(-1)
            histogram.scatter_add_(
                -1, place, torch.where(last >> (below + bits) == found, more, 0).unsqueeze(-1)
            )
        if needed is None:
            needed = need(histogram.sum(-1))
        down = histogram.flip(-1)
        reached = above.unsqueeze(-1) + down.cumsum(-1)
        step = (reached < needed.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=2**bits - 1)
        above = (reached - down).gather(-1, step).squeeze(-1)
        value = 2**bits - 1 - step
        found = (found << bits) | value.squeeze(-1)
        weight = torch.where(digit == value, weight, 0)
    assert needed is not None
    return found, (needed - above).clamp(min=0)


# ---------------------------------------------------------------------------------- raw logprobs


@dataclass
class _RawSoftmax:
    """What the log-softmax of the unprocessed logits needs of this rank.

    Attributes:
        x: float64 ``(rows, columns)``; a NaN counts as -inf.
        top: the largest x, float64 ``(rows,)``.
        total: the sum of ``exp(x - top)``, float64 ``(rows,)``; +inf tokens share the mass.
    """

    x: Tensor
    top: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _RawSoftmax:
        x = logits.to(torch.float64)
        x = torch.where(x.isnan(), -_INF, x)
        top = x.amax(-1, keepdim=True)
        total = torch.where(x == top, 0.0, x - top).exp().sum(-1)
        return cls(x, top.squeeze(-1), total)

    def message(self) -> Tensor:
        """The bits of ``top`` and ``total`` for the other ranks: int64 ``(rows, 2)``."""
        return torch.stack([self.top, self.total], -1).view(torch.int64)

    @staticmethod
    def logprobs(x: Tensor, messages: Tensor) -> Tensor:
        """The logprobs of tokens with logits ``x``: float32 ``(rows, draws)``, the shape of ``x``.

        Args:
            x: float64.
            messages: int64 ``(ranks, rows, 2)``, each rank's :meth:`message`.
        """
        tops, totals = messages.contiguous().view(torch.float64).unbind(-1)
        top = tops.amax(0)
        total = (torch.where(tops == top, 0.0, tops - top).exp() * totals).sum(0)
        top = top.unsqueeze(-1)
        result: Tensor = torch.where(x == top, 0.0, x - top) - total.log().unsqueeze(-1)
        return result.to(torch.float32)
