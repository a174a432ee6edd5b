"""The tokens of each request's prompt and output: the state that the penalties need.

One bit per token says whether prompt or output hold it, one count per token how often the output
does. A kernel reads a count only where the bit is set, so the cost of a step grows with the length
of the history and not with the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    Any,
    Concatenate,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
)

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.tensors import (
    check_changeable,
    is_readable_as_it_is,
    is_traced,
    is_wrapper,
    not_of_inference_mode,
    readable,
    writable,
)

Ids = Sequence[Sequence[int] | Tensor] | Tensor

MAX_VOCAB_SIZE = 2**20

#: The tensors of every history.
STATE_TENSORS = ("seen", "counts", "lengths", "slots")


class Text(NamedTuple):
    """The ids of each slot's prompt and output, in order and without padding.

    Attributes:
        ids: int32 ``(capacity, max_length)``.
        lengths: int64 ``(capacity,)``; how many ids a slot has, at most ``max_length``.
        prompt_lengths: int64 ``(capacity,)``; how many of them, the first ones, are the prompt's.
        windows: int32 ``(capacity,)``, or None; bits and counts are those of the last so many ids,
            of all ids where it is negative.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    windows: Tensor | None = None

    @property
    def max_length(self) -> int:
        """How many ids there is room for in a slot."""
        return self.ids.shape[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The text of changed tensors."""
        ids, lengths, prompt_lengths, windows = self
        of_slots = change(lengths), change(prompt_lengths)
        return Text(change(ids), *of_slots, None if windows is None else change(windows))

    def window_begin(self, slot: Tensor, length: Tensor) -> Tensor:
        """The first place that counts in texts of these lengths; ``slot`` and ``length`` int64."""
        if self.windows is None:
            return torch.zeros_like(length)
        return _window_begin(self.windows[slot].to(torch.int64), length)


def _window_begin(window: Tensor, length: Tensor) -> Tensor:
    """The first place that counts in a text of this length; a negative window is all of it."""
    return torch.where(window < 0, 0, (length - window).clamp(min=0))


class Moved(NamedTuple):
    """A slot's window, and the bits and counts that follow from it.

    Attributes:
        slot: int64 ``(1,)``.
        window: its new window.
        seen, counts: its new bits and counts, with one row.
    """

    slot: Tensor
    window: int
    seen: Tensor
    counts: Tensor


UpdateKind = Literal["append", "fill", "rollback"]

#: The kinds of an update -> their number in every kernel.
UPDATE_KINDS: dict[UpdateKind, int] = {"append": 0, "fill": 1, "rollback": 2}


@dataclass(frozen=True, slots=True)
class HistoryUpdate:
    """A change of histories by ids that were not drawn, one slot for each row.

    An id outside the vocabulary is padding and is left out; so are ids for which a text has no
    room. A row whose slot does not exist changes nothing. No two rows have the same slot.

    Attributes:
        kind: "append": the ids come next in the slot's output. "fill": prompt and output become the
            ids. "rollback": the last ids of the output are taken away, which needs a text.
        history: whose slots are changed; its own ``slots`` do not matter.
        slots: int32 ``(rows,)``.
        numbers: int32 ``(rows,)``, how many ids of each row, its first ones, are added, or how many
            are taken away.
        ids: int32 or int64 ``(rows, max_ids)``, last stride 1; None for "rollback".
        prompt_lengths: int32 ``(rows,)``, for "fill": how many of a row's first ids are the prompt;
            None for 0.
        position: int64; grows by the number of ids that are appended, falls by that of the ids
            taken away, and becomes the length of the output that is filled in. None if there is
            none.
        position_of: whether an entry of ``position`` belongs to a row or to a slot.
    """

    kind: UpdateKind
    history: TokenHistory
    slots: Tensor
    numbers: Tensor
    ids: Tensor | None = None
    prompt_lengths: Tensor | None = None
    position: Tensor | None = None
    position_of: Literal["row", "slot"] = "row"


class Turn:
    """Whether a call is changing an object's state; another call must not come in between.

    It may come from another thread, from a signal handler, or through another object that shares
    the state. A call takes its turn by assignments after a comparison: CPython neither switches
    threads nor handles a signal between these.
    """

    __slots__ = ("is_taken",)

    def __init__(self) -> None:
        self.is_taken = False

    def __reduce__(self) -> tuple[object, ...]:
        return Turn, ()  # nobody is changing a copy


def refuse_turn(name: str) -> NoReturn:
    """Raise the error for a call that comes while another one changes the same state."""
    raise RuntimeError(
        f"this {name} is being changed by another call, from another thread, a signal handler or "
        "another object that shares its state; wait for that call to return"
    )


class _HasTurns(Protocol):
    @property
    def turns(self) -> tuple[Turn, Turn]:
        """The turns of the object and of the state that it shares, which may be the same."""


_Self = TypeVar("_Self", bound=_HasTurns)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def alone(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """Make a method that changes an object take its turns."""

    @functools.wraps(method)
    def run(self: _Self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        own, shared = self.turns
        if own.is_taken or shared.is_taken:
            refuse_turn(type(self).__name__)
        own.is_taken = shared.is_taken = True
        try:
            result = method(self, *args, **kwargs)
        finally:
            own.is_taken = shared.is_taken = False
        return result

    return run  # type: ignore[return-value]  # its first argument cannot be given by name


class TokenHistory:
    """Token history of ``rows`` requests over a vocabulary of ``vocab_size`` tokens.

    Requests live in slots; ``slots[row]`` is the slot of a row, so that rows can be reordered,
    added and removed without moving their state. Build one with :meth:`from_ids`. One call at a
    time may change a history; a second one raises a RuntimeError and changes nothing.

    Attributes cannot be assigned.

    Attributes:
        vocab_size: ids outside ``0 .. vocab_size - 1`` are padding and are ignored everywhere.
        seen: int32 ``(capacity, ceil(vocab_size / 32))``; bit ``t & 31`` of word ``t >> 5`` is set
            when token t occurred in the prompt or the output.
        counts: int32 ``(capacity, vocab_size)``; how often the output holds each token.
        lengths: int64 ``(capacity,)``; how many tokens the output holds.
        slots: int32 ``(rows,)``, in ``0 .. capacity - 1``; no two rows share a slot, but for rows
            without a penalty in what :meth:`among` returns.
        text: the ids in order, which :meth:`rollback` needs; None if they are not kept.
        can_grow: whether the memory is this history's own.

    The constructor makes a history over tensors that belong to the caller, such as those of an
    engine. They stay where they are: the history reads them, changes them in place, and raises a
    ValueError where :meth:`add` finds no free slot. Rows of ``seen`` and ``counts`` may be any
    distance apart. Both may be uint32, and ``lengths`` None, in which case they start at 0. The
    kernels look at a token's count only where its bit is set, so whoever writes a count that is
    not 0 sets the bit of that token too.

    Raises:
        ValueError: a tensor is not as above, its memory is not contiguous where it must be, or it
            is on another device than the others; what slots hold is looked at on the CPU only,
            since elsewhere it would wait.
    """

    seen: Tensor
    counts: Tensor
    lengths: Tensor
    slots: Tensor
    vocab_size: int
    text: Text | None
    #: Slot -> how many requests :meth:`add` has put into it. A slot that is not named has had none.
    fills: dict[int, int]
    _turn: Turn | None  # None for a view, which is read-only
    can_grow: bool

    def __init__(
        self,
        seen: Tensor,
        counts: Tensor,
        lengths: Tensor | None,
        slots: Tensor,
        vocab_size: int,
        text: Text | None = None,
    ) -> None:
        vocab_size = check_vocab_size(vocab_size)
        if text is not None and not isinstance(text, Text):
            raise checks.refusal("text", "a Text or None", text)
        seen, counts = _as_int32("seen", seen), _as_int32("counts", counts)
        if lengths is None:
            with not_of_inference_mode():
                lengths = torch.zeros(seen.shape[:1], dtype=torch.int64, device=seen.device)
        parts = self.of_parts(seen, counts, lengths, slots, vocab_size=vocab_size, text=text)
        vars(self).update(vars(parts), can_grow=False)
        self.check_state()
        self.check_slots(named_once=True)

    def _set(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __setattr__(self, name: str, value: object) -> None:
        if value is not vars(self).get(name):  # as after `history.lengths += 1`, done in place
            self.__delattr__(name)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name} of a TokenHistory cannot be assigned: append, add and select change a history"
        )

    def check_state(self) -> None:
        """A ValueError if a tensor is not as this class says; their values are not looked at.

        A tensor may have been given other memory or another shape since it was last checked.
        """
        if torch.compiler.is_compiling():
            return  # the op looks at them when the graph runs
        seen, vocab_size = self.seen, self.vocab_size
        words = -(-vocab_size // 32)
        _check_state("seen", seen, seen, "(capacity, ceil(vocab_size / 32))", (None, words))
        capacity = seen.shape[0]
        shape = (capacity, vocab_size)
        _check_state("counts", self.counts, seen, "(capacity, vocab_size)", shape)
        _check_state("lengths", self.lengths, seen, "(capacity,)", (capacity,), torch.int64)
        _check_state("slots", self.slots, seen, "(rows,)", (None,))
        if self.text is None:
            return
        ids, lengths, prompt_lengths, windows = self.text
        _check_state("text.ids", ids, seen, "(capacity, max_length)", (capacity, None))
        if not ids.is_contiguous() or ids.shape[1] == 0:
            raise checks.refusal("text.ids", "contiguous and not empty", tuple(ids.shape))
        _check_state("text.lengths", lengths, seen, "(capacity,)", (capacity,), torch.int64)
        of_prompts = "text.prompt_lengths"
        _check_state(of_prompts, prompt_lengths, seen, "(capacity,)", (capacity,), torch.int64)
        if windows is not None:
            _check_state("text.windows", windows, seen, "(capacity,)", (capacity,))

    def check_slots(self, *, named_once: bool) -> None:
        """A ValueError if a slot does not exist, or is named twice; on the CPU only.

        Args:
            named_once: whether a slot that is named twice is an error, as it is where rows record.
        """
        if self.device.type != "cpu" or is_traced() or is_wrapper(self.slots):
            return
        values, capacity = self.slots.tolist(), self.seen.shape[0]
        if values and not 0 <= min(values) <= max(values) < capacity:
            raise ValueError(f"slots must be in 0 .. {capacity - 1}, got {values}")
        if named_once and len(set(values)) != len(values):
            raise ValueError(f"slots must name each slot at most once, got {values}")

    @classmethod
    def from_ids(
        cls,
        prompt_ids: Ids,
        output_ids: Ids | None = None,
        vocab_size: int | None = None,
        *,
        max_length: int | None = None,
        penalty_last_n: int | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenHistory:
        """Build the history of a batch from lists of token ids of unequal length.

        Args:
            prompt_ids: one sequence of ids per row, or an integer tensor ``(rows, length)``.
            output_ids: the tokens produced so far, in the same form; None when there are none.
            vocab_size: the width of the logits.
            max_length: keep the ids of each row in order too, so many of prompt and output
                together; :meth:`rollback` and ``penalty_last_n`` need them. They take 4 bytes each.
                Default: they are not kept.
            penalty_last_n: the ``penalty_last_n`` of the rows' parameters: one for all, or one for
                each row.
            device: where the state lives; the logits' device.

        Raises:
            ValueError: ``vocab_size`` is not in 1 .. 2^20, the two lists differ in length, an id is
                not an integer, or a row has more than ``max_length`` ids.
        """
        vocab_size = check_vocab_size(vocab_size)
        rows = _row_count("prompt_ids", prompt_ids)
        if output_ids is not None and _row_count("output_ids", output_ids) != rows:
            raise ValueError(
                f"output_ids must have one sequence per row of prompt_ids ({rows}), "
                f"got {len(output_ids)}"
            )
        prompts = [valid_ids("prompt_ids", prompt_ids[row], vocab_size) for row in range(rows)]
        outputs = [prompt[:0] for prompt in prompts]
        if output_ids is not None:
            outputs = [valid_ids("output_ids", output_ids[row], vocab_size) for row in range(rows)]
        with not_of_inference_mode():
            history = cls.empty(
                rows, vocab_size, max_length=max_length, penalty_last_n=penalty_last_n
            )
            history._fill(range(rows), prompts, outputs)
            return history.to(device)

    @classmethod
    def empty(
        cls,
        rows: int,
        vocab_size: int,
        *,
        max_length: int | None = None,
        penalty_last_n: int | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenHistory:
        """The history of rows that have no ids yet, each with a slot of its own.

        Args:
            rows: how many.
            vocab_size: the width of the logits.
            max_length: keep the ids of each row in order, so many of prompt and output together.
            penalty_last_n: the ``penalty_last_n`` of the rows' parameters: one for all, or one for
                each row.
            device: where the state lives.

        Raises:
            ValueError: an argument is out of its range.
        """
        rows = checks.integer_at_least("rows", rows, 0)
        words = -(-check_vocab_size(vocab_size) // 32)
        text = None
        if penalty_last_n is not None and max_length is None:
            raise ValueError(
                "max_length must be given where penalty_last_n is, since the ids that leave the "
                "window must be known"
            )
        with not_of_inference_mode():
            if max_length is not None:
                max_length = checks.integer_at_least("max_length", max_length, 1)
                text = Text(
                    ids=torch.zeros(rows, max_length, dtype=torch.int32, device=device),
                    lengths=torch.zeros(rows, dtype=torch.int64, device=device),
                    prompt_lengths=torch.zeros(rows, dtype=torch.int64, device=device),
                    windows=_windows(penalty_last_n, rows, device),
                )
            return cls.of_parts(
                seen=torch.zeros(rows, words, dtype=torch.int32, device=device),
                counts=torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
                lengths=torch.zeros(rows, dtype=torch.int64, device=device),
                slots=torch.arange(rows, dtype=torch.int32, device=device),
                vocab_size=vocab_size,
                text=text,
            )

    def _fill(
        self,
        slots: Sequence[int],
        prompts: Sequence[npt.NDArray[np.int64]],
        outputs: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        """Write the ids of requests, all valid, into slots, whatever these held before."""
        lengths = [len(x) + len(y) for x, y in zip(prompts, outputs, strict=True)]
        self.check_room(max(lengths, default=0))
        ids = np.full((len(slots), max(lengths, default=0)), -1)
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            ids[row, : len(prompt)] = prompt
            ids[row, len(prompt) : lengths[row]] = output

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cpu").to(self.device)

        numbers, of_prompts = column(lengths), column([len(prompt) for prompt in prompts])
        given = torch.from_numpy(ids).to(self.device)
        apply_update(HistoryUpdate("fill", self, column(slots), numbers, given, of_prompts))

    def check_room(self, length: int) -> None:
        """A ValueError if no slot's text has room for so many ids."""
        if self.text is not None and length > self.text.max_length:
            raise ValueError(
                f"prompt_ids and output_ids must have at most max_length = {self.text.max_length} "
                f"ids together, got {length}"
            )

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.slots.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.seen.device

    def to(self, device: torch.device | str) -> TokenHistory:
        """This history on ``device``; itself if it is there already."""
        if torch.empty(0, device=device).device == self.device:  # "cuda" is "cuda:0"
            return self
        return self._map(lambda tensor: tensor.to(device))

    def clone(self) -> TokenHistory:
        """An independent copy."""
        return self._map(Tensor.clone)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenHistory:
        text = self.text
        with not_of_inference_mode():
            return TokenHistory.of_parts(
                *(change(getattr(self, name)) for name in STATE_TENSORS),
                vocab_size=self.vocab_size,
                text=None if text is None else text.map(change),
            )

    def part(self, start: int, width: int, *, has_text: bool = False) -> TokenHistory:
        """A read-only view of the same rows over ids ``start`` up to ``start + width - 1``.

        Counts and lengths are this history's own memory, and so is the text of all ids, which the
        view has with ``has_text``. Append to this history, not to the view.
        """
        seen = slice_bits(self.seen, start, width)
        counts = self.counts[:, start : start + width]  # with gaps between their rows
        return self._view(seen, counts, self.slots, width, self.text if has_text else None)

    def among(self, rows: Sequence[int | None]) -> TokenHistory:
        """A read-only view whose row i is row ``rows[i]`` of this history.

        None stands for a row without a penalty, whose tokens do not matter: it shares a slot with
        another. The view shares this history's memory until a row is added. Append to this history,
        not to the view.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        named = [row for row in rows if row is not None]
        slots = self.slots.new_zeros(len(rows))
        places = [i for i, row in enumerate(rows) if row is not None]
        slots[places] = self.slots[selection(named, self.rows).to(self.device)]
        # rows without a penalty share the first slot
        return self.with_slots(slots)

    def with_slots(self, slots: Tensor) -> TokenHistory:
        """A read-only view whose rows have these slots, int32 ``(rows,)``, unchecked."""
        return self._view(self.seen, self.counts, slots, self.vocab_size, self.text)

    def _view(
        self, seen: Tensor, counts: Tensor, slots: Tensor, vocab_size: int, text: Text | None
    ) -> TokenHistory:
        """A read-only history, whose rows may share slots."""
        view = TokenHistory.of_parts(
            seen, counts, self.lengths, slots, vocab_size=vocab_size, text=text
        )
        view._set(_turn=None)
        return view

    @classmethod
    def of_parts(
        cls,
        seen: Tensor,
        counts: Tensor,
        lengths: Tensor,
        slots: Tensor,
        *,
        vocab_size: int,
        text: Text | None = None,
    ) -> TokenHistory:
        """A history of these parts as they are: for callers that have checked them."""
        history = object.__new__(cls)
        history._set(
            seen=seen,
            counts=counts,
            lengths=lengths,
            slots=slots,
            vocab_size=vocab_size,
            text=text,
            fills={},
            _turn=Turn(),
            can_grow=True,
        )
        return history

    @property
    def turns(self) -> tuple[Turn, Turn]:
        """The turn of a call that changes the state, twice; a ValueError for a view."""
        if self._turn is None:
            raise ValueError("a view of a TokenHistory is read-only: change the history itself")
        return self._turn, self._turn

    @property
    def is_view(self) -> bool:
        """Whether this is a read-only view of another history, as :meth:`among` returns."""
        return self._turn is None

    @alone
    def append(self, tokens: Tensor) -> None:
        """Record the token that each row produced. Never waits for the device.

        Args:
            tokens: integers ``(rows,)`` on the history's device; an id outside the vocabulary, such
                as -1, leaves its row as it is.

        Raises:
            ValueError: wrong shape, dtype or device, or this is a view; or a row has ``max_length``
                ids already, which is looked at on the CPU only. Elsewhere its token is left out.
        """
        tokens = readable("tokens", tokens)
        if tokens.shape != (self.rows,):
            raise ValueError(
                f"tokens must have shape ({self.rows},), one per row, got {tuple(tokens.shape)}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.device != self.device:
            raise ValueError(f"tokens must be on {self.device}, got {tokens.device}")
        self.check_slots(named_once=True)
        if self.text is not None and self.device.type == "cpu" and not is_traced():
            is_full = self.text.lengths[self.slots.to(torch.int64)] >= self.text.max_length
            is_id = (tokens >= 0) & (tokens < self.vocab_size)
            full = (is_full & is_id).nonzero()[:, 0].tolist()
            if full:
                raise ValueError(
                    f"there must be at most max_length = {self.text.max_length} ids in a row, got "
                    f"one more in row {full[0]}"
                )
        self.record(tokens)

    def record(
        self, tokens: Tensor, position: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        """What :meth:`append` does after its checks; adds 1 to ``position`` where a token is one.

        Args:
            tokens: integers ``(rows,)`` on the history's device.
            position: int64, changed in place.
            places: int64 ``(rows,)``, which entry of ``position`` is that of each row; None: the
                row's own.

        Raises:
            ValueError: the state was made in inference mode, which alone can change it.
        """
        text = self.text
        if not torch.compiler.is_compiling():
            self.check_changeable(position)
        tokens = tokens.to(torch.int64)
        valid = (tokens >= 0) & (tokens < self.vocab_size)
        slot = self.slots.to(torch.int64)
        if text is not None:
            place = text.lengths[slot]
            valid &= place < text.max_length
            place.clamp_(max=text.max_length - 1)
            kept = torch.where(valid, tokens, text.ids[slot, place]).to(torch.int32)
        token = torch.where(valid, tokens, 0)
        word = token >> 5
        count, length = valid.to(torch.int32), valid.to(torch.int64)
        bit = torch.bitwise_left_shift(count, (token & 31).to(torch.int32))
        moves = text is not None and text.windows is not None
        if text is not None and moves:
            ids = text.ids[slot].index_put(
                (torch.arange(len(slot), device=slot.device), place), kept
            )
            after = text.lengths[slot] + length
            begin = text.window_begin(slot, after)
            words, times = self._of_text(ids, begin, after, text.prompt_lengths[slot])
        # Python handles Ctrl-C after a call, so no function is called between the updates
        if text is not None:
            text.ids[slot, place] = kept
            text.lengths[slot] += length
        if moves:
            self.seen[slot] = words
            self.counts[slot] = times
        else:
            self.seen[slot, word] |= bit
            self.counts[slot, token] += count
        self.lengths[slot] += length
        if position is not None and places is None:
            position += length
        elif position is not None:
            position[places] += length

    def _of_text(
        self, ids: Tensor, begin: Tensor, end: Tensor, of_prompt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bits and counts of rows in whose texts the ids at the places ``begin`` to ``end`` count.

        Args:
            ids: int32 ``(rows, max_length)``, the texts.
            begin: int64 ``(rows,)``.
            end: int64 ``(rows,)``, the first place that does not count.
            of_prompt: int64 ``(rows,)``, how many of the first ids are the prompt.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        is_counted = (place >= begin[:, None]) & (place < end[:, None])
        is_output = is_counted & (place >= of_prompt[:, None])
        return bits_and_counts(ids, is_counted, is_output, self.vocab_size)

    def check_changeable(self, position: Tensor | None) -> None:
        """A ValueError if the state was made in inference mode, which alone can change it."""
        parts = (self.seen, self.counts, self.lengths, position, *(self.text or ()))
        check_changeable("a history", parts)

    @alone
    def extend(self, row: int, tokens: Sequence[int] | Tensor) -> None:
        """Record several tokens of one row, in order, as the next ones of its output.

        Args:
            row: the row.
            tokens: ids; those outside the vocabulary are padding and are left out.

        Raises:
            ValueError: there is no such row, an id is not an integer, or this is a view.
        """
        apply_update(self.extension(row, tokens))

    @alone
    def rollback(self, row: int, num_tokens: int) -> None:
        """Take the last tokens of one row's output away, as if they had never been recorded.

        Args:
            row: the row.
            num_tokens: how many, at most as many as its output has. Waits for the device to look.

        Raises:
            ValueError: there is no such row, its output is shorter, the ids are not kept in order,
                or this is a view.
        """
        apply_update(self.reduction(row, num_tokens))

    def extension(
        self, row: int, tokens: Sequence[int] | Tensor, position: Tensor | None = None
    ) -> HistoryUpdate:
        """The checked update of :meth:`extend`.

        Args:
            row: the row.
            tokens: ids in order.
            position: int64 ``(capacity,)``, of slots, to grow by the number of ids.

        Raises:
            ValueError: as :meth:`extend`.
        """
        row = checked_row(row, self.rows)
        ids = valid_ids("tokens", tokens, self.vocab_size)
        if self.text is not None:
            room = self.text.max_length - int(self.text.lengths[int(self.slots[row])])
            if len(ids) > room:
                rule = f"at most {room} ids, for which there is room"
                raise checks.refusal("tokens", rule, len(ids))
        given = torch.from_numpy(ids)[None].to(self.device)
        return self._update_of_row("append", row, len(ids), given, position)

    def reduction(self, row: int, num_tokens: int, position: Tensor | None = None) -> HistoryUpdate:
        """The checked update of :meth:`rollback`.

        Args:
            row: the row.
            num_tokens: how many tokens are taken away.
            position: int64 ``(capacity,)``, of slots, to fall by that number.

        Raises:
            ValueError: as :meth:`rollback`.
        """
        row = checked_row(row, self.rows)
        number = checks.integer_at_least("num_tokens", num_tokens, 0)
        if self.text is None:
            raise ValueError(
                "rollback needs the ids in order: make the history with max_length, which keeps "
                "them"
            )
        slot = int(self.slots[row])
        output = int(self.text.lengths[slot] - self.text.prompt_lengths[slot])
        if number > output:
            rule = f"at most {output}, the length of the row's output"
            raise checks.refusal("num_tokens", rule, num_tokens)
        return self._update_of_row("rollback", row, number, None, position)

    def _update_of_row(
        self,
        kind: UpdateKind,
        row: int,
        number: int,
        ids: Tensor | None,
        position: Tensor | None,
    ) -> HistoryUpdate:
        self.check_slots(named_once=True)
        slot = self.slots[row : row + 1]
        numbers = torch.tensor([number], dtype=torch.int32, device=self.device)
        return HistoryUpdate(kind, self, slot, numbers, ids, None, position, "slot")

    @alone
    def add(
        self,
        prompt_ids: Sequence[int] | Tensor,
        output_ids: Sequence[int] | Tensor = (),
        *,
        penalty_last_n: int = -1,
    ) -> int:
        """Add a request as the last row, in a free slot if there is one.

        Args:
            prompt_ids: its prompt.
            output_ids: the tokens that it has produced so far.
            penalty_last_n: that of its parameters.

        Returns:
            The new row's index.

        Raises:
            ValueError: an id is not an integer, there are more than ``max_length``, the ids are not
                kept in order where ``penalty_last_n`` needs it, or no slot is free in memory that
                belongs to the caller.
        """
        window = min(checks.integer_at_least("penalty_last_n", penalty_last_n, -1), 2**31 - 1)
        prompt = valid_ids("prompt_ids", prompt_ids, self.vocab_size)
        output = valid_ids("output_ids", output_ids, self.vocab_size)
        free = sorted(set(range(self.seen.shape[0])) - set(self.slots.tolist()))
        with not_of_inference_mode():
            if not free:
                free = [self.seen.shape[0]]
                self.grow()
            self.set_window(free[0], window)
            self._fill(free[:1], [prompt], [output])
            self.fills[free[0]] = self.fills.get(free[0], 0) + 1
            self._set(slots=torch.cat([self.slots, self.slots.new_tensor(free[:1])]))
        return self.rows - 1

    def set_window(self, slot: int, window: int) -> None:
        """Let the last so many ids count in a slot that is filled next."""
        if window >= 0:
            self.make_windows()
        if self.text is not None and self.text.windows is not None:
            self.text.windows[slot] = window

    def with_window(self, row: int, window: int) -> Moved | None:
        """What moves a row's window; None if it is the row's window already.

        Raises:
            ValueError: the row is to have a window, and the ids are not kept in order.
        """
        if window >= 0:
            self.make_windows()
        text = self.text
        if text is None or text.windows is None:
            return None
        slot = self.slots[row : row + 1].to(torch.int64)
        if max(int(text.windows[slot]), -1) == window:
            return None
        length = text.lengths[slot]
        begin = _window_begin(torch.full_like(length, window), length)
        words, times = self._of_text(text.ids[slot], begin, length, text.prompt_lengths[slot])
        return Moved(slot, window, words, times)

    def make_windows(self) -> None:
        """Have a window for each slot; a ValueError if the ids are not kept in order."""
        if self.text is None:
            raise ValueError(
                "penalty_last_n needs the ids in order: make the history with max_length, which "
                "keeps them"
            )
        if self.text.windows is None:
            windows = torch.full_like(self.text.lengths, -1, dtype=torch.int32)
            self._set(text=self.text._replace(windows=windows))

    def grow(self) -> None:
        """Make room for as many slots again, or for one."""
        if not self.can_grow:
            raise ValueError(
                "there must be a free slot for one more row, since these tensors belong to the "
                f"caller, got {self.rows} rows in {self.seen.shape[0]} slots"
            )
        text = self.text
        more = TokenHistory.empty(
            max(1, self.seen.shape[0]),
            self.vocab_size,
            max_length=None if text is None else text.max_length,
            device=self.device,
        )
        grown = {
            name: torch.cat([getattr(self, name), getattr(more, name)])
            for name in ("seen", "counts", "lengths")
        }
        if text is not None and more.text is not None:
            windows = text.windows
            if windows is not None:
                windows = torch.cat([windows, torch.full_like(more.slots, -1)])
            text = Text(
                ids=torch.cat([text.ids, more.text.ids]),
                lengths=torch.cat([text.lengths, more.text.lengths]),
                prompt_lengths=torch.cat([text.prompt_lengths, more.text.prompt_lengths]),
                windows=windows,
            )
        self._set(**grown, text=text)

    @alone
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; the others' slots become free.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        with not_of_inference_mode():
            self._set(slots=self.slots[selection(rows, self.rows).to(self.device)])


def state_of(history: TokenHistory) -> dict[str, Any]:
    """Copies of the tensors of a history, by name."""
    text = None if history.text is None else history.text.map(Tensor.clone)._asdict()
    return {**{name: getattr(history, name).clone() for name in STATE_TENSORS}, "text": text}


def history_from_state(
    state: Mapping[str, Any], vocab_size: int, device: torch.device
) -> TokenHistory:
    """A history with copies of these tensors; a ValueError if they are none of a history."""

    def copies(name: str, parts: object, names: Sequence[str]) -> Any:
        given = checks.mapping_with(name, parts, names)
        return {
            part: None if (x := given[part]) is None else readable(part, x).to(device, copy=True)
            for part in names
        }

    tensors, text = copies("history", state, STATE_TENSORS), state.get("text")
    found = None if text is None else Text(*copies("text", text, Text._fields).values())
    # the constructor checks the tensors, and takes them for the caller's; the clone owns its own
    return TokenHistory(**tensors, vocab_size=vocab_size, text=found).clone()


def apply_update(update: HistoryUpdate) -> None:
    """Change histories in torch: what every kernel that changes them must do.

    Raises:
        ValueError: the state was made in inference mode, which alone can change it.
    """
    history, kind, position = update.history, update.kind, update.position
    history.check_changeable(position)
    text, vocab_size = history.text, history.vocab_size
    rows = ((update.slots >= 0) & (update.slots < history.seen.shape[0])).nonzero()[:, 0]
    slot = update.slots[rows].to(torch.int64)
    number = update.numbers[rows].to(torch.int64).clamp(min=0)
    before = torch.zeros_like(slot)
    if text is not None and kind != "fill":
        before = text.lengths[slot].clamp(0, text.max_length)
    if update.ids is None:
        assert text is not None
        of_prompt = text.prompt_lengths[slot]
        after = torch.maximum(before - number, torch.minimum(of_prompt, before))
        ids, grown = text.ids[slot], after - before
    else:
        added = update.ids[rows].to(torch.int64)
        index = torch.arange(added.shape[1], device=added.device)
        is_id = (index < number[:, None]) & (added >= 0) & (added < vocab_size)
        is_output = is_id
        if kind == "fill" and update.prompt_lengths is not None:
            is_output = is_id & (index >= update.prompt_lengths[rows][:, None])
        if text is not None:
            place = before[:, None] + is_id.cumsum(1) - 1
            is_id = is_id & (place < text.max_length)
            is_output = is_output & is_id
            place = torch.where(is_id, place, text.max_length)
            room = torch.nn.functional.pad(text.ids[slot], (0, 1))
            ids = room.scatter(1, place, added.to(torch.int32))[:, :-1]
            after = before + is_id.sum(1)
            of_prompt = text.prompt_lengths[slot]
            if kind == "fill":
                of_prompt = (is_id & ~is_output).sum(1)
        grown = is_output.sum(1)
    if text is not None:
        words, times = history._of_text(ids, text.window_begin(slot, after), after, of_prompt)
    else:
        words, times = bits_and_counts(added, is_id, is_output, vocab_size)
        if kind == "append":
            words, times = words | history.seen[slot], times + history.counts[slot]
    length = grown if kind == "fill" else history.lengths[slot] + grown
    if position is not None:
        places = rows if update.position_of == "row" else slot
        moved = grown if kind == "fill" else position[places] + grown
    # Python handles Ctrl-C after a call, so no function is called between the updates
    if text is not None:
        text.ids[slot] = ids
        text.lengths[slot] = after
        text.prompt_lengths[slot] = of_prompt
    history.seen[slot] = words
    history.counts[slot] = times
    history.lengths[slot] = length
    if position is not None:
        position[places] = moved


def bits_and_counts(
    ids: Tensor, is_id: Tensor, is_output: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Which tokens ids have, as int32 words of bits, and how often those of the output have them.

    Args:
        ids: integers ``(rows, length)``.
        is_id: bool of that shape; the others do not count.
        is_output: bool of that shape; which of the ids are of the output.
        vocab_size: the number of tokens.

    Returns:
        ``(rows, ceil(vocab_size / 32))`` and int32 ``(rows, vocab_size)``.
    """
    token = torch.where(is_id, ids.to(torch.int64), vocab_size)
    shape = (len(ids), vocab_size)
    counts = torch.zeros(shape, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(1, token.clamp(max=vocab_size - 1), is_output.to(torch.int32))
    # each token once, so that a sum of bits is their union
    token = token.sort(1).values
    is_first = token < vocab_size
    is_first[:, 1:] &= token[:, 1:] != token[:, :-1]
    bit = torch.where(is_first, torch.bitwise_left_shift(torch.ones_like(token), token & 31), 0)
    words = torch.zeros(len(ids), -(-vocab_size // 32), dtype=torch.int64, device=ids.device)
    words.scatter_add_(1, token.clamp(max=vocab_size - 1) >> 5, bit)
    return words.to(torch.int32), counts


def slice_bits(words: Tensor, start: int, width: int) -> Tensor:
    """Bits ``start`` up to ``start + width - 1`` of each row of int32 words, in words of their own.

    Bits past ``width`` are clear.
    """
    count = -(-width // 32)
    first, shift = divmod(start, 32)
    sliced = words[:, first : first + count]
    if shift:
        above = words[:, first + 1 : first + 1 + count] & ((1 << shift) - 1)
        sliced = (sliced >> shift) & ((1 << (32 - shift)) - 1)  # the shift copies the sign
        sliced[:, : above.shape[1]] |= above << (32 - shift)
    else:
        sliced = sliced.clone()
    if width % 32:
        sliced[:, -1] &= (1 << (width % 32)) - 1
    return sliced


def check_vocab_size(vocab_size: object) -> int:
    """``vocab_size`` as an int; a ValueError if it is not in 1 .. 2^20."""
    checked = checks.integer("vocab_size", vocab_size)
    if not 1 <= checked <= MAX_VOCAB_SIZE:
        raise checks.refusal("vocab_size", "in 1 .. 2^20", vocab_size)
    return checked


def _check_state(
    name: str,
    tensor: object,
    like: Tensor,
    dimensions: str,
    shape: tuple[int | None, ...],
    dtype: torch.dtype = torch.int32,
) -> None:
    """A ValueError if a tensor of the state is not as it must be; None in ``shape`` is any size."""
    if (
        type(tensor) is Tensor
        and tensor.dim() == len(shape)
        and all(width in (None, size) for size, width in zip(tensor.shape, shape, strict=True))
        and is_readable_as_it_is(tensor, tensor.shape, dtype, like.device)
        and tensor.is_contiguous()
    ):
        return
    tensor = writable(name, tensor)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(w not in (None, size) for size, w in sizes):
        known = "" if shape == (None,) else f" = {shape}".replace("None", "any")
        raise ValueError(f"{name} must have shape {dimensions}{known}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as seen is, got {tensor.device}")
    is_right = tensor.is_contiguous()
    if tensor.dim() == 2 and tensor.numel() > 0:  # what is written must not overlap
        is_right = is_right or (tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1])
    if not is_right:
        raise ValueError(
            f"{name} must be contiguous, or have contiguous rows, got strides {tensor.stride()}"
        )


def _windows(
    penalty_last_n: int | Sequence[int] | None, rows: int, device: torch.device | str
) -> Tensor | None:
    """``penalty_last_n`` as int32 ``(rows,)``; None if it is not given."""
    if penalty_last_n is None:
        return None
    many = isinstance(penalty_last_n, Sequence)
    values = list(penalty_last_n) if isinstance(penalty_last_n, Sequence) else [penalty_last_n]
    checked = [checks.integer_at_least("penalty_last_n", value, -1) for value in values]
    if many and len(checked) != rows:
        raise ValueError(f"penalty_last_n must have one entry per row ({rows}), got {len(checked)}")
    limited = [min(value, 2**31 - 1) for value in checked]
    return torch.tensor(limited if many else limited * rows, dtype=torch.int32, device=device)


def _as_int32(name: str, tensor: object) -> Tensor:
    """A uint32 tensor as the int32 one with the same memory; another tensor as it is."""
    tensor = writable(name, tensor)
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def selection(rows: Iterable[int], available: int) -> Tensor:
    """``rows`` as an int64 index, each row at most once and in ``0 .. available - 1``."""
    index = list(rows)
    for row in index:
        if not checks.is_integer(row) or not 0 <= row < available:
            raise checks.refusal("rows", f"integers in 0 .. {available - 1}", row)
    if len(set(index)) != len(index):
        raise ValueError(f"rows must name each row at most once, got {index}")
    return torch.tensor(index, dtype=torch.int64, device="cpu")


def checked_row(row: object, available: int, name: str = "row") -> int:
    """``row`` as an int; a ValueError if it is not in ``0 .. available - 1``."""
    rule = f"an integer in 0 .. {available - 1}"
    checked = checks.integer(name, row, rule)
    if not 0 <= checked < available:
        raise checks.refusal(name, rule, row)
    return checked


def _row_count(name: str, ids: Ids) -> int:
    try:
        return len(ids)
    except TypeError as error:  # also of a tensor without dimensions
        raise ValueError(f"{name} must have one sequence of ids per row, got {ids!r}") from error


def valid_ids(name: str, ids: Sequence[int] | Tensor, vocab_size: int) -> npt.NDArray[np.int64]:
    """The ids inside the vocabulary, in order."""
    rule = f"{name} must hold one sequence of integer ids per row"
    try:
        array = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or nothing that numpy holds
        raise ValueError(f"{rule}, got {ids!r}") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{rule}, got {array.dtype} of shape {array.shape}")
    valid: npt.NDArray[np.int64] = array[(array >= 0) & (array < vocab_size)].astype(np.int64)
    return valid
