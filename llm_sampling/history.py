"""The tokens of each request's prompt and output: the state that the penalties need.

One bit per token says whether prompt or output hold it, one count per token how often the output
does. A kernel reads a count only where the bit is set, so the cost of a step grows with the length
of the history and not with the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.tensors import (
    check_changeable,
    is_traced,
    is_wrapper,
    not_of_inference_mode,
    readable,
    writable,
)

Ids = Sequence[Sequence[int] | Tensor] | Tensor

MAX_VOCAB_SIZE = 2**20

#: The tensors of a history.
STATE_TENSORS = ("seen", "counts", "lengths", "slots")


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

    Raises:
        ValueError: a tensor is not as above, not contiguous, or on another device than the others;
            what slots hold is looked at on the CPU only, since elsewhere it would wait.
    """

    seen: Tensor
    counts: Tensor
    lengths: Tensor
    slots: Tensor
    vocab_size: int
    #: Slot -> how many requests :meth:`add` has put into it. A slot that is not named has had none.
    fills: dict[int, int]
    _turn: Turn | None  # None for a view, which is read-only

    def __init__(
        self, seen: Tensor, counts: Tensor, lengths: Tensor, slots: Tensor, vocab_size: int
    ) -> None:
        vocab_size = check_vocab_size(vocab_size)
        vars(self).update(vars(self.of_parts(seen, counts, lengths, slots, vocab_size=vocab_size)))
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
        _check_state(
            "counts", self.counts, seen, "(capacity, vocab_size)", shape, is_view=self.is_view
        )
        _check_state("lengths", self.lengths, seen, "(capacity,)", (capacity,), torch.int64)
        _check_state("slots", self.slots, seen, "(rows,)", (None,))

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
        device: torch.device | str = "cpu",
    ) -> TokenHistory:
        """Build the history of a batch from lists of token ids of unequal length.

        Args:
            prompt_ids: one sequence of ids per row, or an integer tensor ``(rows, length)``.
            output_ids: the tokens produced so far, in the same form; None when there are none.
            vocab_size: the width of the logits.
            device: where the state lives; the logits' device.

        Raises:
            ValueError: ``vocab_size`` is not in 1 .. 2^20, the two lists differ in length, or an id
                is not an integer.
        """
        vocab_size = check_vocab_size(vocab_size)
        rows = _row_count("prompt_ids", prompt_ids)
        if output_ids is not None and _row_count("output_ids", output_ids) != rows:
            raise ValueError(
                f"output_ids must have one sequence per row of prompt_ids ({rows}), "
                f"got {len(output_ids)}"
            )
        with not_of_inference_mode():
            history = cls._empty(rows, vocab_size, torch.device("cpu"))
            for row in range(rows):
                prompt = valid_ids("prompt_ids", prompt_ids[row], vocab_size)
                output = (
                    prompt[:0]
                    if output_ids is None
                    else valid_ids("output_ids", output_ids[row], vocab_size)
                )
                history._fill(row, prompt, output)
            return history.to(device)

    @classmethod
    def _empty(cls, rows: int, vocab_size: int, device: torch.device) -> TokenHistory:
        words = -(-vocab_size // 32)
        return cls(
            seen=torch.zeros(rows, words, dtype=torch.int32, device=device),
            counts=torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            slots=torch.arange(rows, dtype=torch.int32, device=device),
            vocab_size=vocab_size,
        )

    def _fill(
        self, slot: int, prompt: npt.NDArray[np.int64], output: npt.NDArray[np.int64]
    ) -> None:
        """Write one request's ids, all valid, into a slot, whatever the slot held before."""
        bits = np.zeros(self.seen.shape[1] * 32, dtype=np.uint8)
        bits[prompt] = 1
        bits[output] = 1
        words = np.packbits(bits, bitorder="little").view("<i4")
        tokens, counts = np.unique(output, return_counts=True)
        self.seen[slot] = torch.from_numpy(words.astype(np.int32))
        self.counts[slot] = 0
        self.counts[slot, torch.from_numpy(tokens).to(self.device)] = torch.from_numpy(
            counts.astype(np.int32)
        ).to(self.device)
        self.lengths[slot] = len(output)

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
        with not_of_inference_mode():
            return TokenHistory(
                change(self.seen),
                change(self.counts),
                change(self.lengths),
                change(self.slots),
                self.vocab_size,
            )

    def part(self, start: int, width: int) -> TokenHistory:
        """A read-only view of the same rows over ids ``start`` up to ``start + width - 1``.

        Counts and lengths are this history's own memory. Append to this history, not to the view.
        """
        seen = slice_bits(self.seen, start, width)
        counts = self.counts[:, start : start + width]  # with gaps between their rows
        return self._view(seen, counts, self.slots, width)

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
        return self._view(self.seen, self.counts, slots, self.vocab_size)

    def _view(self, seen: Tensor, counts: Tensor, slots: Tensor, vocab_size: int) -> TokenHistory:
        """A read-only history, whose tensors need not be contiguous or name each slot once."""
        view = TokenHistory.of_parts(seen, counts, self.lengths, slots, vocab_size=vocab_size)
        view._set(_turn=None)
        return view

    @classmethod
    def of_parts(
        cls, seen: Tensor, counts: Tensor, lengths: Tensor, slots: Tensor, *, vocab_size: int
    ) -> TokenHistory:
        """A history of these parts as they are: for callers that have checked them."""
        history = object.__new__(cls)
        history._set(
            seen=seen,
            counts=counts,
            lengths=lengths,
            slots=slots,
            vocab_size=vocab_size,
            fills={},
            _turn=Turn(),
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
            ValueError: wrong shape, dtype or device, or this is a view.
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
        if not torch.compiler.is_compiling():
            check_changeable("a history", (self.seen, self.counts, self.lengths, position))
        tokens = tokens.to(torch.int64)
        valid = (tokens >= 0) & (tokens < self.vocab_size)
        token = torch.where(valid, tokens, 0)
        slot = self.slots.to(torch.int64)
        word = token >> 5
        count, length = valid.to(torch.int32), valid.to(torch.int64)
        bit = torch.bitwise_left_shift(count, (token & 31).to(torch.int32))
        # Python handles Ctrl-C after a call, so no function is called between the updates
        self.seen[slot, word] |= bit
        self.counts[slot, token] += count
        self.lengths[slot] += length
        if position is not None and places is None:
            position += length
        elif position is not None:
            position[places] += length

    @alone
    def extend(self, row: int, tokens: Sequence[int] | Tensor) -> None:
        """Record several tokens of one row, in order, as the next ones of its output.

        Args:
            row: the row.
            tokens: ids; those outside the vocabulary are padding and are left out.

        Raises:
            ValueError: there is no such row, an id is not an integer, or this is a view.
        """
        row = checked_row(row, self.rows)
        ids = valid_ids("tokens", tokens, self.vocab_size)
        self.check_slots(named_once=True)
        self.record_ids(row, ids)

    def record_ids(
        self, row: int, ids: npt.NDArray[np.int64], position: Tensor | None = None
    ) -> None:
        """What :meth:`extend` does after its checks; adds the number of ids to the position.

        Args:
            row: the row.
            ids: all of them inside the vocabulary.
            position: int64 ``(rows,)``, changed in place.

        Raises:
            ValueError: the state was made in inference mode, which alone can change it.
        """
        check_changeable("a history", (self.seen, self.counts, self.lengths, position))
        tokens, times = np.unique(ids, return_counts=True)
        words, places = np.unique(tokens >> 5, return_inverse=True)
        bits = np.zeros(len(words), dtype=np.uint32)
        np.bitwise_or.at(bits, places, np.uint32(1) << (tokens & 31).astype(np.uint32))
        slot, length = self.slots[row].to(torch.int64), len(ids)
        word, bit, token, count = (
            torch.from_numpy(array).to(self.device)
            for array in (words, bits.view(np.int32), tokens, times.astype(np.int32))
        )
        # Python handles Ctrl-C after a call, so no function is called between the updates
        self.seen[slot, word] |= bit
        self.counts[slot, token] += count
        self.lengths[slot] += length
        if position is not None:
            position[row] += length

    @alone
    def add(
        self, prompt_ids: Sequence[int] | Tensor, output_ids: Sequence[int] | Tensor = ()
    ) -> int:
        """Add a request as the last row, in a free slot if there is one.

        Returns:
            The new row's index.
        """
        self._set(slots=self._slots_with(prompt_ids, output_ids))
        return self.rows - 1

    def _slots_with(
        self, prompt_ids: Sequence[int] | Tensor, output_ids: Sequence[int] | Tensor
    ) -> Tensor:
        """``slots`` with one more: a free slot, into which the ids have been written."""
        prompt = valid_ids("prompt_ids", prompt_ids, self.vocab_size)
        output = valid_ids("output_ids", output_ids, self.vocab_size)
        free = sorted(set(range(self.seen.shape[0])) - set(self.slots.tolist()))
        with not_of_inference_mode():
            if not free:
                free = [self.seen.shape[0]]
                self._grow()
            self.fills[free[0]] = self.fills.get(free[0], 0) + 1
            self._fill(free[0], prompt, output)
            return torch.cat([self.slots, self.slots.new_tensor(free[:1])])

    def _grow(self) -> None:
        more = TokenHistory._empty(max(1, self.seen.shape[0]), self.vocab_size, self.device)
        seen = torch.cat([self.seen, more.seen])
        counts = torch.cat([self.counts, more.counts])
        lengths = torch.cat([self.lengths, more.lengths])
        self._set(seen=seen, counts=counts, lengths=lengths)

    @alone
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; the others' slots become free.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        with not_of_inference_mode():
            self._set(slots=self.slots[selection(rows, self.rows).to(self.device)])


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
    *,
    is_view: bool = False,
) -> None:
    """A ValueError if a tensor of the state is not as it must be; None in ``shape`` is any size."""
    tensor = writable(name, tensor)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(w not in (None, size) for size, w in sizes):
        known = "" if shape == (None,) else f" = {shape}".replace("None", "any")
        raise ValueError(f"{name} must have shape {dimensions}{known}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as seen is, got {tensor.device}")
    if not (is_view or tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


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
