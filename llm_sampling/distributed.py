"""Sampling from a vocabulary that is cut into slices, one on each rank of a process group.

    this rank's logits -+- penalties, mask, bias,  -+- few candidates: an all-gather -+- token
                        |  by the backend's kernel  +- else: cuts, then whose draw  -+
    params, history, mask of the whole vocabulary, on every rank

No rank sees another's logits. Masses and counts are integers, so what the ranks add up is exact,
and every rank returns the token, to the bit, that ``sample`` returns for the whole row.

Two ways lead there; the parameters, which are the same on every rank, say which:

* **Candidates**, where each row is greedy or keeps at most ``MOST_CANDIDATES`` tokens by top-k. A
  rank sends its own best ones, 64 bits each; the kernel draws from those of all, in order of id.
* **Cuts**, everywhere else. What steps 11 to 13 keep is a prefix of the order: down to a last key,
  and so many of that key. A radix search finds the key: for each digit, from the highest, the ranks
  add up how many tokens (or how much mass) have each value of it. Then the kept mass of every rank
  says on which of them the draw falls, and that one tells the others its token.

Only all-gather and all-reduce are used, of integers, with MAX and SUM. With ``check=False`` nothing
waits for a device. docs/scale.md counts messages and bytes.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from llm_sampling import backends, reference
from llm_sampling.backends.base import (
    LOGPROBS_MODES,
    STATUS_NAN,
    STATUS_NO_CANDIDATE,
    STATUS_POS_INF,
    BackendModule,
    Logprobs,
    SampleCall,
    SampleOutput,
    raise_on_status,
)
from llm_sampling.history import MAX_VOCAB_SIZE, TokenHistory, slice_bits
from llm_sampling.params import DTYPES, BatchParams
from llm_sampling.sample import (
    Params,
    check_draws,
    check_history,
    check_logits,
    check_mask,
    pack,
    position_of,
)

#: Up to so many tokens a row, a rank sends its best ones rather than digits.
MOST_CANDIDATES = 256
#: The widths of the radix search's digits of a 32-bit key, from the highest: a message each.
DIGITS = (7, 7, 6, 6, 6)

_INF = math.inf
_LOW32 = 2**32 - 1
#: More than there are tokens in a row, so that a key and a count make one number.
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
    logprobs: Logprobs | None = None,
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
        logprobs: as for ``sample``.
        backend: the kernel that works on this rank's part, as for ``sample``.
        check: have the ranks compare what they were called with, before anything depends on it,
            and raise for rows with NaN, +inf or no candidate. Default: True for logits on the CPU,
            False where it would wait for the device; ranks that disagree then fail as the group's
            backend does, wait until its timeout, or give tokens without meaning.

    Returns:
        ``SampleOutput(tokens, logprobs, status)`` as of ``sample``, the same on every rank.

    Raises:
        ValueError: an argument is out of its range; or ``check`` found that the ranks disagree or
            that the slices do not make up a vocabulary, and all ranks raise.
        InvalidLogitsError: ``check`` found bad rows, in whatever slice; all ranks raise.
        RuntimeError: ``check`` found that another rank refused its arguments; a rank has ended, or
            does not come within the group's timeout; the named backend cannot run here;
            torch.distributed is not ready.

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
    word = [0] * len(_WORD)
    try:
        part = _looked_at(
            local, params, vocab_start, history, allowed_mask, positions, num_samples, logprobs,
            backend, check,
        )  # fmt: skip
        if compare:
            word = _word(part, history, whole)
    except Exception as error:
        refusal = error  # the others wait for this rank's word
    if compare:
        device = "cpu" if on_cpu else local.device
        words = ranks.gather(torch.tensor([word], dtype=torch.int64, device=device))[:, 0]
    if refusal is not None:
        raise refusal
    if compare:
        _compare(words.tolist())
    assert part is not None
    few = 0 < part.batch.kept_at_most <= MOST_CANDIDATES
    output = _by_candidates(part, ranks) if few else _by_cuts(part, ranks)
    if compare:
        raise_on_status(output.status)
    return output


# ---------------------------------------------------------------- what the ranks have, and agree on


@dataclass
class _Part:
    """This rank's slice and what it was called with; all but the logits is of every id."""

    logits: Tensor
    columns: int  # of the slice, of which there may be none; the logits have at least one
    vocab_start: int
    batch: BatchParams
    history: TokenHistory | None
    allowed_mask: Tensor | None
    num_samples: int
    logprobs: Logprobs | None
    backend: BackendModule


def _unwrapped(
    logits: Tensor, group: ProcessGroup | None, vocab_start: int | None
) -> tuple[Tensor, ProcessGroup | None, int | None, int]:
    """The slice, its group and first id, and the width of a whole DTensor; -1 of a plain one."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # there is none before it is imported
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
    width = -(-whole // group.size())  # as torch.chunk cuts
    start = min(group.rank() * width, whole)
    if local.shape[1] != min(width, whole - start):
        raise ValueError(
            f"a DTensor must be cut into slices of {width}, and this rank has {local.shape[1]}: "
            "pass local tensors and vocab_start"
        )
    return local, group, start, whole


def _looked_at(
    logits: Tensor,
    params: Params,
    vocab_start: int | None,
    history: TokenHistory | None,
    allowed_mask: Tensor | None,
    positions: Sequence[int] | Tensor | None,
    num_samples: int,
    logprobs: Logprobs | None,
    backend: str,
    check: bool | None,
) -> _Part:
    """All that can be looked at without the other ranks."""
    columns = 1
    if isinstance(logits, Tensor) and logits.dim() == 2:
        columns = logits.shape[1]
        if columns == 0:  # no kernel takes that
            logits = logits.new_full((logits.shape[0], 1), -_INF)
    logits = check_logits(logits)
    rows, device = logits.shape[0], logits.device
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be an integer >= 0, got {vocab_start!r}")
    batch = pack(params, rows, device)
    vocab_size = history.vocab_size if isinstance(history, TokenHistory) else 0
    check_history(history, batch, rows, vocab_size, device)
    num_samples = check_draws(num_samples, logprobs, check)
    if allowed_mask is not None:
        words = allowed_mask.shape[-1] if isinstance(allowed_mask, Tensor) else 0
        allowed_mask = check_mask(allowed_mask, rows, 32 * words, device)
    return _Part(
        logits=logits,
        columns=columns,
        vocab_start=vocab_start,
        batch=replace(batch, position=position_of(positions, batch, history)),
        history=history if batch.needs_history else None,
        allowed_mask=allowed_mask,
        num_samples=num_samples,
        logprobs=logprobs,
        backend=backends.resolve(backend, device),
    )


#: What each rank tells the others first: whether all was well, and numbers; -1 stands for None.
_WORD = (
    *("accepted", "vocab_start", "columns", "whole", "history", "mask"),
    *("rows", "num_samples", "logprobs", "flags", "params"),
)
#: How a user knows those that must be the same everywhere.
_SAME = {
    "rows": "the rows of local_logits",
    "num_samples": "num_samples",
    "logprobs": "logprobs (by number)",
    "flags": "what params turn on (as bits)",
    "params": "params and positions (by checksum)",
}


def _word(part: _Part, history: TokenHistory | None, whole: int) -> list[int]:
    batch = part.batch
    flags = (batch.any_top_k, batch.any_top_p, batch.any_floor, batch.unseeded is not None)
    bits = sum(flag << bit for bit, flag in enumerate(flags)) + (batch.kept_at_most << len(flags))
    if batch.unseeded is not None:  # where a seed means nothing
        batch = replace(batch, seed=batch.seed.masked_fill(batch.unseeded, 0))
    tensors = (getattr(batch, name) for name in DTYPES)
    checksum = 0
    for tensor in tensors:
        if tensor is not None:
            checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    values = {
        "accepted": 1,
        "vocab_start": part.vocab_start,
        "columns": part.columns,
        "whole": whole,
        "history": -1 if history is None else history.vocab_size,
        "mask": -1 if part.allowed_mask is None else part.allowed_mask.shape[1],
        "rows": part.logits.shape[0],
        "num_samples": part.num_samples,
        "logprobs": LOGPROBS_MODES[part.logprobs],
        "flags": bits,
        "params": checksum,
    }
    return [values[name] for name in _WORD]


def _compare(words: list[list[int]]) -> None:
    """Raise where the ranks disagree: all of them see the same words, and raise the same."""
    told = {name: [word[i] for word in words] for i, name in enumerate(_WORD)}
    refusing = [str(rank) for rank, accepted in enumerate(told["accepted"]) if not accepted]
    if refusing:
        raise RuntimeError(
            f"sample_sharded refused the arguments of rank {', '.join(refusing)} of the group, "
            "where it raised the reason"
        )
    for name, known_as in _SAME.items():
        if len(set(told[name])) > 1:
            raise ValueError(f"{known_as} must be the same on every rank, got {told[name]} by rank")
    columns = told["columns"]
    if told["vocab_start"] != [sum(columns[:rank]) for rank in range(len(columns))]:
        raise ValueError(
            "the slices must follow each other from id 0 on, got vocab_start "
            f"{told['vocab_start']} and columns {columns} by rank"
        )
    vocab_size = sum(columns)
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the slices must make up a vocab_size in 1 .. 2^20, got {vocab_size}")
    for name, wanted, rule in (
        ("whole", vocab_size, "a DTensor must be as wide as all slices"),
        ("history", vocab_size, "history must have the vocab_size of all slices"),
        ("mask", -(-vocab_size // 32), "allowed_mask must have a bit for each id of all slices"),
    ):
        if set(told[name]) not in ({-1}, {wanted}):
            raise ValueError(f"{rule}, {wanted}, or be None everywhere, got {told[name]} by rank")


class _Ranks:
    """The collectives of a group."""

    def __init__(self, group: ProcessGroup | None) -> None:
        group = dist.group.WORLD if group is None else group
        assert group is not None
        self.group = group

    def gather(self, tensor: Tensor) -> Tensor:
        """Of every rank, ``(ranks, *tensor.shape)``."""
        everyone = tensor.new_empty((self.group.size() * tensor.shape[0], *tensor.shape[1:]))
        self._all(_all_gather, everyone, tensor.contiguous())
        return everyone.view(self.group.size(), *tensor.shape)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
        self._all(dist.all_reduce, tensor, ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in place."""
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


#: It has a new name since torch 2.13, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# --------------------------------------------------------------------------------- this rank's part


def _call(part: _Part, **changes: Tensor | bool) -> SampleCall:
    """A call of the kernel on this slice: steps 1 to 6 alone but for what ``changes`` turn on."""
    batch = part.batch
    nothing = torch.zeros_like(batch.temperature)
    off: dict[str, Tensor | bool] = {
        "temperature": nothing + 1,
        "top_k": torch.zeros_like(batch.top_k),
        "top_p": nothing + 1,
        "min_p": nothing,
        "min_p_cut": nothing + _INF,
        "min_tokens_to_keep": torch.ones_like(batch.min_tokens_to_keep),
        "logit_bias_ids": batch.logit_bias_ids - part.vocab_start,
        "all_greedy": False,
        "any_filter": False,
    }
    history, mask = part.history, part.allowed_mask
    if not part.columns:
        history = mask = None
    return SampleCall(
        logits=part.logits,
        batch=replace(batch, **(off | changes)),  # type: ignore[arg-type]
        history=None if history is None else history.part(part.vocab_start, part.columns),
        allowed_mask=None if mask is None else slice_bits(mask, part.vocab_start, part.columns),
    )


def _nan(part: _Part, call: SampleCall) -> Tensor:
    """int64 ``(rows,)``: whether step 6 meets a NaN in this slice, as a greedy call tells."""
    temperature = torch.zeros_like(call.batch.temperature)
    greedy = replace(call.batch, temperature=temperature, all_greedy=True)
    status = part.backend.sample(replace(call, batch=greedy)).status
    return (status & STATUS_NAN).to(torch.int64)


def _key(x: Tensor) -> Tensor:
    """An integer of 32 bits, in int64, that orders float32 as they are ordered."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) + 2**31


def _value(key: Tensor) -> Tensor:
    """The float32 that has this key."""
    bits = (key - 2**31).to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def _seeds(part: _Part, ranks: _Ranks) -> list[Tensor]:
    """The first rank's new seeds, from all others the least number there is; none if not needed."""
    if part.batch.unseeded is None:
        return []
    seed = part.batch.seeded().seed  # every rank draws, so that their generators stay together
    return [seed if ranks.group.rank() == 0 else torch.full_like(seed, -(2**63))]


# --------------------------------------------------------------------------------- few candidates


def _by_candidates(part: _Part, ranks: _Ranks) -> SampleOutput:
    """Every rank's best tokens, from which the kernel draws on every rank."""
    batch = part.batch
    greedy = batch.temperature == 0
    at_most = torch.where(greedy, 1, batch.top_k)
    floor = torch.where(greedy, 1, batch.min_tokens_to_keep)
    call = _call(part, top_k=at_most, min_tokens_to_keep=floor, any_filter=True)
    x = part.backend.filter_logits(call)

    # no slice has more candidates than that, and which among equals the kernel has decided
    width = batch.kept_at_most
    values, ids = x.topk(min(width, x.shape[1]), sorted=False)
    ids, by_id = ids.sort(-1)
    values = values.gather(-1, by_id)
    missing = (0, width - ids.shape[1])
    values = torch.nn.functional.pad(values, missing, value=-_INF)
    ids = torch.nn.functional.pad(ids, missing)
    word = (values.view(torch.int32).to(torch.int64) << 32) | (ids + part.vocab_start)
    told = [word, _nan(part, call).unsqueeze(-1)]
    told += [seed.unsqueeze(-1) for seed in _seeds(part, ranks)]
    if part.logprobs == "raw":
        raw = _Raw.of(part.logits)
        told += [raw.x.gather(-1, ids).view(torch.int64), raw.words()]
    everyone = ranks.gather(torch.cat(told, -1))

    words = everyone[..., :width].transpose(0, 1).flatten(1).contiguous()  # in order of id
    ids = words & _LOW32
    if batch.unseeded is not None:
        batch = _seeded(batch, everyone[..., width + 1].amax(0))
    output = part.backend.sample(
        SampleCall(
            logits=(words >> 32).to(torch.int32).view(torch.float32),
            batch=replace(
                batch,
                logit_bias_offsets=torch.zeros_like(batch.logit_bias_offsets),
                logit_bias_ids=batch.logit_bias_ids[:0],
                logit_bias_values=batch.logit_bias_values[:0],
                needs_history=False,
            ),
            history=None,
            allowed_mask=None,
            num_samples=part.num_samples,
            logprobs="processed" if part.logprobs == "processed" else None,
        )
    )
    drawn = output.tokens.reshape(-1, part.num_samples)
    tokens = ids.gather(-1, drawn.clamp(min=0)).masked_fill(drawn < 0, -1)
    logprobs = output.logprobs
    if part.logprobs == "raw":
        x64 = everyone[..., -2 - width : -2].transpose(0, 1).flatten(1).view(torch.float64)
        logprobs = _Raw.logprobs(x64.gather(-1, drawn.clamp(min=0)), everyone[..., -2:])
        logprobs = logprobs.masked_fill(drawn < 0, math.nan)
    nan = everyone[..., width].amax(0).to(torch.int32)
    return _shaped(part, tokens, logprobs, output.status | nan * STATUS_NAN)


def _seeded(batch: BatchParams, drawn: Tensor) -> BatchParams:
    assert batch.unseeded is not None
    return replace(batch, seed=torch.where(batch.unseeded, drawn, batch.seed), unseeded=None)


def _shaped(part: _Part, tokens: Tensor, logprobs: Tensor | None, status: Tensor) -> SampleOutput:
    """``(rows, num_samples)`` as users get it."""
    shape = (-1,) if part.num_samples == 1 else (-1, part.num_samples)
    return SampleOutput(
        tokens.reshape(shape), None if logprobs is None else logprobs.reshape(shape), status
    )


# ------------------------------------------------------------------------------------------- cuts


@dataclass
class _Weighed:
    """This rank's part of step 10, and what of it is kept.

    Attributes:
        x: float32 ``(rows, columns)`` after step 6.
        key: their order.
        best: the largest x of all ranks, ``(rows,)``.
        d, w: depth and mass; w is 0 where x is -inf.
        tied: whether a token has the last kept key, of which not all may be kept.
        count: of all ranks' tied tokens so many are kept, ``(rows,)``; each has the mass ``each``.
    """

    x: Tensor
    key: Tensor
    best: Tensor
    d: Tensor
    w: Tensor
    tied: Tensor
    count: Tensor
    each: Tensor


def _by_cuts(part: _Part, ranks: _Ranks) -> SampleOutput:
    """The last key of what is kept, the rank that the draw falls on, and from it the token."""
    batch = part.batch
    call = _call(part)
    x = part.backend.filter_logits(call)
    told = [_key(x.amax(-1)), _nan(part, call), *_seeds(part, ranks)]
    first = ranks.max(torch.stack(told, -1))
    best = _value(first[:, 0])
    if batch.unseeded is not None:
        batch = _seeded(batch, first[:, 2])

    # 9 depth, 10 mass
    d = reference.depth(x, batch.temperature, best)
    w = torch.where(x > -_INF, reference.mass(d), 0)
    nothing = torch.zeros_like(first[:, 0])
    weighed = _Weighed(x, x, best, d, w, torch.zeros_like(x, dtype=torch.bool), nothing, nothing)
    if batch.any_top_k or batch.any_filter:
        weighed.key = _key(x)
        _keep(weighed, batch, ranks)
    tied, w = weighed.tied, weighed.w

    # 14 draw: on which rank, and there which token
    told = [torch.where(tied, 0, w).sum(-1), tied.sum(-1)]
    if part.logprobs == "raw":
        raw = _Raw.of(part.logits)
        told += raw.words().unbind(-1)
    everyone = ranks.gather(torch.stack(told, -1))
    ties = everyone[..., 1]
    ties_before = ties.cumsum(0) - ties
    kept_ties = torch.minimum((weighed.count - ties_before).clamp(min=0), ties)
    kept_mass = everyone[..., 0] + kept_ties * weighed.each
    mass_up_to = kept_mass.cumsum(0)
    s = mass_up_to[-1]
    me = ranks.group.rank()
    mine, before = kept_mass[me], mass_up_to[me] - kept_mass[me]
    w = torch.where(tied & (tied.cumsum(-1) > kept_ties[me].unsqueeze(-1)), 0, w)
    cumulative = w.cumsum(-1)
    draws = []
    assert batch.position is not None
    for draw in range(part.num_samples):
        words = reference.philox(batch.seed, batch.position, draw)
        r = (reference.scaled(words[0], words[1], s) - before).unsqueeze(-1)
        index = (cumulative <= r).sum(-1, keepdim=True).clamp(max=x.shape[1] - 1)
        told = [index + part.vocab_start]
        if part.logprobs == "processed":
            told.append(w.gather(-1, index))
        elif part.logprobs == "raw":
            told.append(raw.x.gather(-1, index).view(torch.int64))
        here = (r >= 0) & (r < mine.unsqueeze(-1))
        draws.append(torch.where(here, torch.cat(told, -1), 0))
    drawn = ranks.sum(torch.stack(draws, 1))

    none = best == -_INF
    logprobs = None
    if part.logprobs == "processed":
        logprobs = (drawn[..., 1].double().log() - s.double().log().unsqueeze(-1)).to(torch.float32)
    elif part.logprobs == "raw":
        logprobs = _Raw.logprobs(drawn[..., 1].contiguous().view(torch.float64), everyone[..., 2:])
    if logprobs is not None:
        logprobs = logprobs.masked_fill(none.unsqueeze(-1), math.nan)
    tokens = drawn[..., 0].masked_fill(none.unsqueeze(-1), -1)
    status = first[:, 1] * STATUS_NAN + none * STATUS_NO_CANDIDATE + (best == _INF) * STATUS_POS_INF
    return _shaped(part, tokens, logprobs, status.to(torch.int32))


def _keep(weighed: _Weighed, batch: BatchParams, ranks: _Ranks) -> None:
    """Steps 8 and 11 to 13: clear the mass of what is not kept, and find the last key's ties.

    A cut is one number: the last kept key, times ``_COUNTS``, minus how many of it are kept. So the
    smaller one of two keeps more.
    """
    x, key, best = weighed.x, weighed.key, weighed.best
    candidate = x > -_INF
    cut = torch.full_like(key[:, 0], -_COUNTS)  # keeps everything

    def ending(cut: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its last key, how many of that are kept, and their depth and mass each."""
        last = (cut + MAX_VOCAB_SIZE) // _COUNTS
        count = last * _COUNTS - cut
        value = torch.where(count > 0, _value(last.clamp(min=0)), best)
        depth = reference.depth(value.unsqueeze(-1), batch.temperature, best).squeeze(-1)
        return last, count, depth, reference.mass(depth)

    def first_of_all(number: Tensor) -> Tensor:
        """The cut that keeps so many, or all there are."""
        one_each = candidate.to(torch.int32)
        last, left = _search(ranks, key, one_each, lambda total: torch.minimum(number, total))
        return last * _COUNTS - left

    # 8 greedy, 11 top-k
    floor = batch.min_tokens_to_keep.to(torch.int64)
    if batch.any_top_k:
        top_k = batch.top_k.to(torch.int64)
        at_most = torch.where(top_k > 0, torch.maximum(top_k, floor), MAX_VOCAB_SIZE)
        cut = first_of_all(torch.where(batch.temperature == 0, 1, at_most))
    at_least = first_of_all(floor) if batch.any_floor else cut

    # 12 top-p
    if batch.any_top_p:
        last, count, _, each = ending(cut)
        nucleus, left = _search(
            ranks,
            key,
            torch.where(key > last.unsqueeze(-1), weighed.w, 0),
            lambda total: reference.target(total, batch.top_p),
            at_last=(last, count * each),
        )
        _, _, _, each = ending(nucleus * _COUNTS - 1)
        each = each.clamp(min=1)
        nucleus = nucleus * _COUNTS - (left + each - 1) // each
        if batch.any_floor:
            nucleus = torch.minimum(nucleus, at_least)
        cut = torch.where(batch.top_p < 1, torch.maximum(cut, nucleus), cut)

    # 13 min-p keeps what is near; where the floor goes deeper, what the floor keeps
    depth_cut = reference.depth_cut(batch)
    near = weighed.d <= depth_cut.unsqueeze(-1)
    deeper = torch.zeros_like(cut, dtype=torch.bool)
    if batch.any_floor:
        deeper = ending(at_least)[2] > depth_cut
        cut = torch.where(deeper, torch.maximum(cut, at_least), cut)
        near |= deeper.unsqueeze(-1)
    last, count, depth, weighed.each = ending(cut)
    weighed.count = torch.where((depth <= depth_cut) | deeper, count, 0)
    weighed.tied = candidate & (key == last.unsqueeze(-1))
    weighed.w = torch.where(near & (key >= last.unsqueeze(-1)), weighed.w, 0)


def _search(
    ranks: _Ranks,
    key: Tensor,
    weight: Tensor,
    need: Callable[[Tensor], Tensor],
    at_last: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the sum of weights over all ranks, from the largest key down, first reaches a need.

    Args:
        ranks: who adds up.
        key: ``(rows, columns)``.
        weight: of each token, an integer.
        need: from the sum of all weights ``(rows,)``, at most that much.
        at_last: a key and a weight more at it, known to all ranks.

    Returns:
        The key at which it does, and what of the need the keys above have left.
    """
    below = 32
    found, above = torch.zeros_like(key[:, 0]), torch.zeros_like(key[:, 0])
    needed: Tensor | None = None
    for bits in DIGITS:
        below -= bits
        digit = (key >> below) & (2**bits - 1)
        table = weight.new_zeros(key.shape[0], 2**bits).scatter_add_(-1, digit, weight)
        table = ranks.sum(table).to(torch.int64)
        if at_last is not None:
            last, more = at_last
            place = ((last >> below) & (2**bits - 1)).unsqueeze(-1)
            table.scatter_add_(
                -1, place, torch.where(last >> (below + bits) == found, more, 0).unsqueeze(-1)
            )
        if needed is None:
            needed = need(table.sum(-1))
        down = table.flip(-1)
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
class _Raw:
    """The log-softmax of the logits as they are: a rank's largest, and its sum relative to that.

    Attributes:
        x: float64 ``(rows, columns)``; a NaN counts as -inf.
        top, total: float64 ``(rows,)``. +inf tokens share the mass.
    """

    x: Tensor
    top: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Raw:
        x = logits.to(torch.float64)
        x = torch.where(x.isnan(), -_INF, x)
        top = x.amax(-1, keepdim=True)
        total = torch.where(x == top, 0.0, x - top).exp().sum(-1)
        return cls(x, top.squeeze(-1), total)

    def words(self) -> Tensor:
        """What the others need: the bits of ``top`` and ``total``, ``(rows, 2)``."""
        return torch.stack([self.top, self.total], -1).view(torch.int64)

    @staticmethod
    def logprobs(x: Tensor, words: Tensor) -> Tensor:
        """Of the tokens with logits ``x`` ``(rows, draws)``, from all ranks' ``words``; float32."""
        tops, totals = words.contiguous().view(torch.float64).unbind(-1)
        top = tops.amax(0)
        total = (torch.where(tops == top, 0.0, tops - top).exp() * totals).sum(0)
        top = top.unsqueeze(-1)
        result: Tensor = torch.where(x == top, 0.0, x - top) - total.log().unsqueeze(-1)
        return result.to(torch.float32)
