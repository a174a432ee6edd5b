"""The fused Triton kernel, triton_kernel.py beside this: NVIDIA and AMD GPUs, without a toolchain.

Where rules look at the history, triton_rules.py makes the lists of step 5a in a launch before it.

The first call of a shape's kind compiles for some seconds, once: Triton keeps what it compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llm_sampling.backends import first_use
from llm_sampling.backends.base import (
    POSITION_MODES,
    SOME_SIZES,
    ParamSlots,
    SampleCall,
    Size,
    Step,
    check_state,
    described,
    make_results,
    settle,
    with_slots,
)
from llm_sampling.history import UPDATE_KINDS, HistoryUpdate, TokenHistory
from llm_sampling.results import SampleOutput, TokenLogprobs

if TYPE_CHECKING:
    from llm_sampling.backends.triton_rules import PenaltyLists

#: The oldest Triton that the kernel is for.
OLDEST = (3, 4)


class _Loaded(NamedTuple):
    """The modules of the three kernels, or the reason why there are none.

    Attributes:
        is_interpreted: whether Triton's interpreter runs kernels on the CPU, as TRITON_INTERPRET=1
            asks for.
    """

    kernel: ModuleType | None
    history_kernel: ModuleType | None
    rules: ModuleType | None
    is_interpreted: bool
    reason: str | None


@functools.cache
def _load() -> _Loaded:
    """Asked once, remembered for good."""
    try:
        import triton

        version = re.match(r"(\d+)\.(\d+)", triton.__version__)
        if version is not None and tuple(map(int, version.groups())) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return _Loaded(
                *(None,) * 3, False, f"triton {triton.__version__} is older than {oldest}"
            )
        from llm_sampling.backends import triton_history, triton_kernel, triton_rules

        is_interpreted = bool(triton.knobs.runtime.interpret)
        return _Loaded(triton_kernel, triton_history, triton_rules, is_interpreted, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken one may raise anything, SystemExit too
        return _Loaded(*(None,) * 3, False, f"triton does not import: {described(error)}")


#: Where tensors may be. "cuda" is what torch calls AMD's GPUs too.
DEVICE_TYPES = frozenset({"cuda", "cpu"}) if _load().is_interpreted else frozenset({"cuda"})


def why_unavailable() -> str | None:
    """None if Triton imports and there is a device, or its interpreter."""
    *_, is_interpreted, reason = _load()
    if reason is not None or is_interpreted or torch.cuda.is_available():
        return reason
    return "there is no CUDA device"


class _Batch(NamedTuple):
    """What the kernel reads of a BatchParams. The order costs AMD's GPUs the fewest registers."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p_cut: Tensor
    min_tokens_to_keep: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    seed: Tensor
    position: Tensor
    logit_bias_offsets: Tensor
    logit_bias_ids: Tensor
    logit_bias_values: Tensor
    repetition_penalty_scope: Tensor


class _Config(NamedTuple):
    """What is known when the kernel is compiled.

    Attributes:
        tile, candidates, nucleus, parts, most_wanted: those of :class:`Launch`; ``stages`` is its
            ``num_stages``.
        part_words: how many int32 words of the workspace each program of a row has for itself.
        header: the place of a part's header among them.
        max_tiles: the tiles of a row, rounded up to a power of two.
        max_stored: how many columns may be stored while all tokens are weighed.
        align: a load's mask is the same for all logits from one multiple of it to the next.
        has_bias, any_random, any_filter: whether any row has a bias, draws, or has a filter.
        processed, raw: whether logprobs of this kind are asked for.
        lists: whether ranks and the first tokens of the order are asked for.
        has_ids: whether the caller has named ids.
        kept: a value of KEPT_FORMS, or 0.
        position_of: a value of POSITION_MODES.
        any_output_scope: whether step 3 is for the tokens of the output alone in any row.
        has_windows: whether slots of the history have windows.
        overrides: how many tokens of a row may have another bit or count than the history's; a
            power of two, or 0.
        advance: whether positions and histories are advanced.
        records_text: whether that writes texts.
    """

    tile: int
    max_tiles: int
    candidates: int
    nucleus: int
    parts: int
    most_wanted: int
    part_words: int
    header: int
    max_stored: int
    align: int
    stages: int
    has_bias: bool
    any_random: bool
    any_filter: bool
    processed: bool
    raw: bool
    lists: bool
    has_ids: bool
    kept: int
    position_of: int
    any_output_scope: bool
    has_windows: bool
    overrides: int
    advance: bool
    records_text: bool


@dataclass(frozen=True)
class Launch:
    """How a launch divides its rows; triton_kernel.py begins by saying what these are.

    Attributes:
        tile: tokens of a tile; a power of two.
        candidates: how many candidates there may be; a power of two.
        nucleus: how many of the first tokens of the order become candidates for top-p.
        num_warps: warps of a program.
        num_stages: tiles that are loaded while one is processed, and that one.
        parts: programs of a row; a power of two.
    """

    tile: int
    candidates: int
    nucleus: int
    num_warps: int
    num_stages: int
    parts: int = 1

    def most_wanted(self) -> int:
        """So many tokens may be wanted of each part of a split row, for their lists to fit.

        A list may have an eighth and 16 tokens more than are wanted.
        """
        return (self.candidates // self.parts - 16) * 8 // 9

    def max_stored(self) -> int:
        """How many columns may be stored while all tokens are weighed."""
        return self.nucleus + self.nucleus // 4

    def list_words(self) -> int:
        """The int32 words that a list needs: chosen columns, candidates."""
        return self.tile + 2 * self.candidates

    def workspace(self, vocab_size: int) -> int:
        """The int32 words that a row needs: those of a list, stored columns."""
        tiles = -(-vocab_size // self.tile)
        return self.list_words() + self.max_stored() * tiles


def choose_launch(
    vocab_size: int,
    rows: int,
    dtype: torch.dtype,
    *,
    extras: bool = False,
    splits: bool = False,
    processors: int = 132,
) -> Launch:
    """The launch for ``rows`` rows of ``vocab_size`` logits.

    Args:
        vocab_size: 1 .. 2^20.
        rows: how many.
        dtype: of the logits.
        extras: whether there is a history, a mask or a bias, or filtered logits, raw logprobs,
            lists or a kept set are asked for: their code needs registers, so that a program has
            half as many threads.
        splits: whether rows may be split over several programs. They are where there are at least
            4 processors for each row and at least 16 tiles: into 4 to 16 parts of 2 tiles or more.
            With more parts, lists for a common top-k would not fit the candidates; where there is
            less to divide, the parts are not expected to save what merging them costs.
        processors: how many multiprocessors the device has. While there is one for each row, it has
            more tiles on their way, since nothing else hides the memory's latency.
    """
    tile, num_warps = (2048, 8) if extras else (4096, 16)
    while tile >= 2 * vocab_size and tile > 128:
        tile //= 2
        num_warps = max(1, num_warps // 2)
    being_loaded = (65536 if rows <= processors else 32768) // (tile * dtype.itemsize)
    tiles = -(-vocab_size // tile)
    parts = 1
    if splits and tiles >= 16 and processors >= 4 * rows:
        parts = 1 << (min(processors // max(rows, 1), tiles // 2, 16).bit_length() - 1)
    return Launch(
        tile=tile,
        candidates=2048,
        nucleus=512,
        num_warps=num_warps,
        num_stages=1 + min(being_loaded, 2, tiles),  # with more, registers are spilled on sm_90
        parts=parts,
    )


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


#: The forms of the kept set -> their numbers in the kernel.
KEPT_FORMS = {"mask": 1, "ids": 2, "ends": 3}


def _has_extras(call: SampleCall, *, filter_only: bool) -> bool:
    has_more = call.history is not None or call.allowed_mask is not None or call.has_bias
    wanted = call.wanted
    return has_more or "raw" in wanted.logprobs or wanted.is_more or filter_only


def _splits(call: SampleCall, *, filter_only: bool) -> bool:
    """Whether a row of the call may be split, as far as the host knows.

    A row's filter may be top-k or min-p, for which it is split, or top-p. Raw logprobs and filtered
    logits take a pass over all tokens, which one program does.
    """
    may_be = call.batch.all_greedy or call.batch.any_filter
    return may_be and "raw" not in call.wanted.logprobs and not filter_only


def _launch_for(call: SampleCall, *, filter_only: bool = False) -> Launch:
    rows, vocab_size = call.logits.shape
    processors = _processors(call.logits.device.index) if call.logits.is_cuda else rows
    return choose_launch(
        vocab_size,
        rows,
        call.logits.dtype,
        extras=_has_extras(call, filter_only=filter_only),
        splits=_splits(call, filter_only=filter_only),
        processors=processors,
    )


class _Memory(NamedTuple):
    """What launches with the same parameters and number of rows may share, one after another."""

    workspace: Tensor
    counters: Tensor | None
    lists: PenaltyLists | None


def _has_windows(call: SampleCall) -> bool:
    text = None if call.history is None else call.history.text
    return text is not None and text.windows is not None


def _overrides(call: SampleCall) -> int:
    """As many as the extra ids, and as many again that these push out of a window."""
    extra = call.extra_output
    if call.history is None or extra is None or extra.shape[1] == 0:
        return 0
    return max(16, 1 << (2 * extra.shape[1] - 1).bit_length())


def _part_words(call: SampleCall, launch: Launch) -> tuple[int, int]:
    """The int32 words that a program has for itself, and where the header of its part begins.

    They are for extra ids and, where rows are split, for the columns and the list of the part.
    """
    words = 2 * _overrides(call)
    if launch.parts == 1:
        return words, words
    if call.batch.any_filter:
        words += launch.list_words()
    return words + 16, words  # a multiple of 16, as all else is


def _workspace(call: SampleCall, launch: Launch) -> Tensor:
    """Only filters, lists, extra ids and parts need any."""
    rows, vocab_size = call.logits.shape
    words = launch.list_words() if call.wanted.is_more else 0
    if call.batch.any_filter:
        words = launch.workspace(vocab_size)
    words += launch.parts * _part_words(call, launch)[0]
    return torch.empty(rows, words, dtype=torch.int32, device=call.logits.device)


def _counters(call: SampleCall, launch: Launch) -> Tensor | None:
    """A 0 for each row, where rows are split. Every launch leaves zeros for the next one.

    Like a workspace, they are for one launch at a time.
    """
    if launch.parts == 1:
        return None
    return torch.zeros(call.logits.shape[0], dtype=torch.int32, device=call.logits.device)


def _lists(call: SampleCall) -> PenaltyLists | None:
    """Memory for the lists of step 5a, where a row may have one."""
    rules = _load().rules
    assert rules is not None
    if not call.has_lists:
        return None
    rows, vocab_size = call.logits.shape
    lists: PenaltyLists = rules.empty_lists(
        rows, vocab_size, call.list_capacity, call.logits.device
    )
    return lists


def _memory(call: SampleCall, launch: Launch) -> _Memory:
    return _Memory(_workspace(call, launch), _counters(call, launch), _lists(call))


def _make_lists(call: SampleCall, lists: PenaltyLists) -> None:
    """One launch, which puts the lists of the rows there."""
    rules, batch, history, slots = _load().rules, call.batch, call.history, call.param_slots
    assert rules is not None
    assert history is not None
    text = history.text
    rules.make_lists(
        rules.RuleColumns(*(getattr(batch, name) for name in rules.RuleColumns._fields)),
        history.slots,
        history.lengths,
        lists,
        size=call.logits.shape[1],
        vocab_slice=call.ids,
        sequences=rules.RuleSequences(
            batch.sequence_offsets,
            batch.sequences,
            None if slots is None else slots.sequence_counts,
        ),
        param_slots=None if slots is None else slots.of_rows,
        kept_ids=None if text is None else rules.KeptIds(text.ids, text.lengths),
        extra_output=call.extra_output,
    )


def _rule_lists(lists: PenaltyLists | None) -> tuple[Any, ...]:
    """What the sampling kernel reads of them."""
    kernel = _load().kernel
    assert kernel is not None
    if lists is None:
        return ()
    bits, before, counts, amounts, _ = lists
    argument: tuple[Any, ...] = kernel.RuleLists(bits, before, counts, amounts, amounts.shape[1])
    return argument


def _histories(history: TokenHistory, extra: Tensor | None) -> tuple[Any, ...]:
    kernel = _load().kernel
    assert kernel is not None
    seen, counts = history.seen, history.counts
    histories: tuple[Any, ...] = kernel.Histories(
        seen,
        seen.stride(0),
        counts,
        counts.stride(0),
        history.lengths,
        history.slots,
        _text(history),
        () if extra is None else (extra, extra.shape[1]),
    )
    return histories


def _text(history: TokenHistory) -> tuple[Any, ...]:
    kernel, text = _load().kernel, history.text
    assert kernel is not None
    if text is None:
        return ()
    windows = () if text.windows is None else (text.windows,)
    argument: tuple[Any, ...] = kernel.Text(
        text.ids, text.max_length, text.lengths, text.prompt_lengths, windows
    )
    return argument


def _by_slot(slots: ParamSlots) -> tuple[Any, ...]:
    kernel = _load().kernel
    assert kernel is not None
    lengths = () if slots.prompt_lengths is None else (slots.prompt_lengths,)
    capacity = slots.bias_counts.shape[0]
    by_slot: tuple[Any, ...] = kernel.BySlot(slots.of_rows, capacity, slots.bias_counts, lengths)
    return by_slot


def _results(output: SampleOutput | None) -> tuple[Any, ...]:
    """What a launch writes of its draws."""
    if output is None:
        return ()
    kinds = (None if kind is None else kind.logprobs for kind in (output.processed, output.raw))
    masses = None if output.kept is None else output.kept.masses
    found = (output.tokens, *kinds, masses, output.status)
    return tuple(() if x is None else x for x in found)


def _lengths(call: SampleCall) -> tuple[int, int, int, int]:
    """How many first tokens, named ids and kept ids a row has, and the stride of the named ids."""
    wanted, ids = call.wanted, call.wanted.token_ids
    number = 0 if ids is None else ids.shape[1]
    stride = 0 if ids is None or ids.shape[0] == 1 else number
    return wanted.top_logprobs or 0, number, wanted.max_kept_ids, stride


def _more(call: SampleCall, config: _Config, output: SampleOutput | None) -> tuple[Any, ...]:
    """What else a launch writes."""
    kernel, wanted = _load().kernel, call.wanted
    assert kernel is not None
    if output is None or not (config.lists or config.has_ids or config.kept):
        return ()

    def all_of(*tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(() if x is None else x for x in tensors)

    def lists(of: TokenLogprobs | None) -> tuple[Any, ...]:
        if of is None:
            return ()
        found: tuple[Any, ...] = kernel.Lists(*all_of(*of[1:]))
        return found

    kept, ids = output.kept, wanted.token_ids
    *lengths, stride = _lengths(call)
    kept_set: tuple[Any, ...] = ()
    if kept is not None:
        forms = {"mask": (kept.mask,), "ids": (kept.ids,), "ends": kept[-4:]}
        assert wanted.kept is not None
        form = all_of(*forms[wanted.kept])
        kept_set = kernel.Kept(kept.counts, kept.total, *all_of(kept.id_masses), form)
    more: tuple[Any, ...] = kernel.More(
        lists(output.processed),
        lists(output.raw),
        kept_set,
        () if ids is None else (ids, stride),
        *lengths,
    )
    return more


def _advances(call: SampleCall) -> bool:
    """Whether the kernel itself advances positions and histories."""
    return call.advance and not call.check


def _logits_stride(logits: Tensor) -> int:
    return logits.stride(0) if len(logits) > 1 else 0  # one row is aligned whatever its stride


def _config(call: SampleCall, launch: Launch, *, filter_only: bool) -> _Config:
    batch, history, slots, wanted = call.batch, call.history, call.param_slots, call.wanted
    vocab_size, advance = call.logits.shape[1], _advances(call)
    tiles = -(-vocab_size // launch.tile)
    part_words, header = _part_words(call, launch)
    return _Config(
        tile=launch.tile,
        max_tiles=1 << (tiles - 1).bit_length(),
        candidates=launch.candidates,
        nucleus=launch.nucleus,
        parts=launch.parts,
        most_wanted=launch.most_wanted(),
        part_words=part_words,
        header=header,
        max_stored=launch.max_stored(),
        align=16 if vocab_size % 16 > 0 and _logits_stride(call.logits) % 16 == 0 else 1,
        stages=launch.num_stages,
        has_bias=call.has_bias,
        any_random=not batch.all_greedy,
        any_filter=batch.any_filter,
        processed=not filter_only and "processed" in wanted.logprobs,
        raw=not filter_only and "raw" in wanted.logprobs,
        lists=not filter_only and wanted.top_logprobs is not None,
        has_ids=not filter_only and wanted.token_ids is not None,
        kept=0 if filter_only or wanted.kept is None else KEPT_FORMS[wanted.kept],
        position_of=0 if slots is None else POSITION_MODES[slots.position_of],
        any_output_scope=batch.any_output_scope and history is not None,
        has_windows=_has_windows(call),
        overrides=_overrides(call),
        advance=advance,
        records_text=advance and history is not None and history.text is not None,
    )


#: The kernels that have answered known rows, by device and by what Triton compiles them for.
_checked: set[tuple[Any, ...]] = set()


def _check(call: SampleCall, launch: Launch, config: _Config, *, filter_only: bool) -> None:
    """Let the kernel for this call answer known rows when it is first used.

    Raises:
        SelfTestError: an answer is wrong; the call has not been run.
    """
    logits = call.logits
    has = [x is None for x in (call.history, call.allowed_mask, call.param_slots, call.record)]
    has.append(call.has_lists)
    of_numbers: tuple[object, ...] = (
        logits.shape[1] % 16,
        _logits_stride(logits) % 16,
        call.num_samples == 1,
        *((number == 1, number % 16) for number in _lengths(call)),
    )
    key = (logits.device, logits.dtype, config, launch.num_warps, filter_only, *has, *of_numbers)
    if key in _checked or not first_use.is_wanted() or not first_use.is_possible(logits.device):
        return

    def run(known: SampleCall) -> SampleOutput | Tensor:
        memory = _memory(known, launch)
        if filter_only:
            filtered = torch.empty_like(known.logits, dtype=torch.float32)
            _start(known, launch, config, memory, None, filtered)
            return filtered
        output = make_results(known)
        _start(known, launch, config, memory, output, None)
        return output

    try:
        first_use.check_kernel("triton", call, run)
    except torch.OutOfMemoryError:
        return  # the call itself may need less; it is tried again
    _checked.add(key)


def _run(
    call: SampleCall,
    launch: Launch,
    memory: _Memory,
    output: SampleOutput | None,
    filtered: Tensor | None,
) -> None:
    """One launch, on the current stream of the logits' device, and one before it for lists."""
    if len(call.logits) == 0:
        return
    filter_only = output is None
    config = _config(call, launch, filter_only=filter_only)
    if not _load().is_interpreted:
        _check(call, launch, config, filter_only=filter_only)
    _start(call, launch, config, memory, output, filtered)


def _start(
    call: SampleCall,
    launch: Launch,
    config: _Config,
    memory: _Memory,
    output: SampleOutput | None,
    filtered: Tensor | None,
) -> None:
    kernel = _load().kernel
    assert kernel is not None
    logits, batch, history, mask = call.logits, call.batch, call.history, call.allowed_mask
    slots, (rows, vocab_size) = call.param_slots, logits.shape
    workspace, counters, lists = memory
    if lists is not None:
        _make_lists(call, lists)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        kernel.sample_kernel[(rows, launch.parts)](
            logits,
            _logits_stride(logits),
            vocab_size,
            -(-vocab_size // launch.tile),
            _Batch(*(getattr(batch, name) for name in _Batch._fields)),
            batch.logit_bias_ids.numel(),
            () if slots is None else _by_slot(slots),
            () if mask is None else (mask, mask.stride(0)),
            ()
            if history is None
            else _histories(history, call.extra_output if config.overrides else None),
            0 if history is None else history.seen.shape[0],
            _rule_lists(lists),
            # as bytes: a pointer to bool is not the same thing in every version of Triton
            () if call.record is None or not _advances(call) else (call.record.view(torch.uint8),),
            workspace,
            workspace.stride(0),
            () if counters is None else counters,
            _results(output),
            _more(call, config, output),
            filtered,
            0 if filtered is None else filtered.stride(0),
            call.num_samples,
            CONFIG=config,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def _sample(call: SampleCall, launch: Launch, memory: _Memory) -> SampleOutput:
    output = make_results(call)
    _run(call, launch, memory, output, None)
    return settle(call, output)


def sample(call: SampleCall) -> SampleOutput:
    """Draw tokens in one launch; where rules look at the history, one before it makes lists."""
    launch = _launch_for(call)
    return _sample(call, launch, _memory(call, launch))


def filter_logits(call: SampleCall) -> Tensor:
    """Filter in one launch; where rules look at the history, one before it makes lists."""
    launch = _launch_for(call, filter_only=True)
    filtered = torch.empty(call.logits.shape, dtype=torch.float32, device=call.logits.device)
    _run(call, launch, _memory(call, launch), None, filtered)
    return filtered


class _UpdateConfig(NamedTuple):
    """What is known when the kernel of triton_history.py is compiled.

    Attributes:
        span: how many ids are taken at a time; a power of two.
        kind: a value of UPDATE_KINDS.
        has_text: whether the history keeps ids in order.
        position_of_slot: whether entries of ``position`` belong to slots, and not to rows.
    """

    span: int
    kind: int
    has_text: bool
    position_of_slot: bool


def update_history(update: HistoryUpdate) -> None:
    """Change histories in one launch."""
    history = update.history
    history.check_changeable(update.position)
    kernel = _load().history_kernel
    assert kernel is not None
    rows = update.slots.shape[0]
    if rows == 0:
        return
    ids, prompt_lengths, position = update.ids, update.prompt_lengths, update.position
    config = _UpdateConfig(
        span=1024,
        kind=UPDATE_KINDS[update.kind],
        has_text=history.text is not None,
        position_of_slot=update.position_of == "slot",
    )
    with torch.cuda.device_of(history.seen):  # type: ignore[no-untyped-call]
        kernel.update_kernel[(rows,)](
            history.vocab_size,
            update.slots,
            update.numbers,
            () if ids is None else (ids,),
            0 if ids is None else ids.stride(0),
            0 if ids is None else ids.shape[1],
            () if prompt_lengths is None else (prompt_lengths,),
            () if position is None else (position,),
            _histories(history, None),
            history.seen.shape[0],
            CONFIG=config,
            num_warps=8,
        )


def prepare_update(update: HistoryUpdate) -> Callable[[], None]:
    """Each update is a launch of its own."""
    return functools.partial(update_history, update)


def prepare(call: SampleCall) -> Step:
    """Keep workspace, counters and lists between steps; a step's results are new tensors.

    Two steps, or two replays of a graph that has one, may not run at the same time.
    """
    rows = call.logits.shape[0]
    launches: dict[bool, tuple[Launch, _Memory]] = {}

    def step(
        logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
    ) -> SampleOutput:
        nonlocal call, rows
        call = with_slots(call, slots)
        check_state(call)
        this = replace(call, logits=logits, allowed_mask=allowed_mask)
        if rows != logits.shape[0]:
            rows = logits.shape[0]
            launches.clear()
        has_mask = allowed_mask is not None
        if has_mask not in launches:
            launch = _launch_for(this)
            launches[has_mask] = launch, _memory(this, launch)
        return _sample(this, *launches[has_mask])

    return step


def known_sizes(device: torch.device) -> Sequence[Size]:
    """Some, since nothing but the loops' lengths depends on the size."""
    return SOME_SIZES
