"""The callback that says before each step which tokens may be drawn, as a grammar does.

Sampler -> MaskStep -> callback -> a mask, forced tokens -> the bitmask of all rows
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.backends.base import Step
from llm_sampling.masks import Mask, check_mask
from llm_sampling.results import SampleOutput
from llm_sampling.tensors import not_of_inference_mode

_CPU = torch.device("cpu")
#: The entries of a state, and those of each of its rows.
_STATE = frozenset({"rows", "asked", "next_id"})
_ROW_STATE = frozenset({"id", "is_new", "start", "tokens", "forced", "has_ended"})


class MaskRow(NamedTuple):
    """A row that a mask callback is asked for.

    Attributes:
        id: the row's number, which stays with it: 0, 1, ... in the order in which the rows came. A
            row that is removed takes its number with it. In a loop, rows are numbered prompt by
            prompt.
        prompt: the index of the prompt that the row continues; in a Sampler, its ``id``.
        is_new: whether the callback has not been asked for this row before.
        start: the place of ``tokens`` in the row's output, in which it has been told those before.
            What it has been told from there on does not hold any more: it was taken away by a
            rollback, or the callback has raised an error and is told again.
        tokens: what the row has got since the callback was last asked for it, in order: the token
            that it drew, those that were forced, and those that were added without a draw. Where
            the row is new, the tokens of its output so far, as far as the loop was given them.
        ends: the tokens that end the row, as far as the loop knows them; empty in a Sampler.
    """

    id: int
    prompt: int
    is_new: bool
    start: int
    tokens: tuple[int, ...]
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MaskStep:
    """What a mask callback is told before a step.

    It has the rows that need a mask, which may be fewer than the batch has: neither rows that have
    ended nor those with forced tokens are among them.

    Attributes:
        rows: a :class:`MaskRow` for each row that a mask is asked for, in the order of the batch.
        ended: the ids of rows that ended or were removed since the last call.
        bitmask: int32 ``(len(rows), ceil(vocab_size / 32))`` in host memory, pinned where the
            logits are on a GPU. All bits are set: every token may be drawn. The callback may clear
            some in place and return it. It is used again in the next step.
        forced: a list for each row, empty at first. Token ids in it come next in the row's output,
            in this step and the following ones, without a choice. The callback is not asked for the
            row again before it has got them all, and then finds them in ``tokens``.
        vocab_size: the width of the logits.
        prompts: how many prompts the loop has; None in a Sampler.
    """

    rows: tuple[MaskRow, ...]
    ended: tuple[int, ...]
    bitmask: Tensor
    forced: tuple[list[int], ...]
    vocab_size: int
    prompts: int | None = None


#: Called before each step. It returns a mask for ``step.rows``, such as ``step.bitmask`` or a list
#: with None for rows that are free; or None, which lets every row draw any token.
MaskCallback = Callable[[MaskStep], Mask | None]


def check_callback(callback: object) -> None:
    """A ValueError if ``callback`` is neither None nor callable."""
    if callback is not None and not callable(callback):
        raise checks.refusal(
            "allowed_mask",
            "None or a callback that takes a MaskStep (a mask is an argument of a Sampler's call)",
            callback,
        )


class _Row(NamedTuple):
    """What is known of a row, and not yet told to the callback."""

    id: int
    is_new: bool = True
    start: int = 0
    tokens: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    has_ended: bool = False

    def drew(self, token: int | None) -> _Row:
        if token is None or token < 0 or self.has_ended:  # bad logits leave a row without a token
            return self
        return self._replace(tokens=(*self.tokens, token), forced=self.forced[1:])

    def got(self, tokens: tuple[int, ...]) -> _Row:
        """The row with tokens that it did not draw; forced ones need not come any more."""
        count = len(tokens)
        forced = self.forced[count:] if self.forced[:count] == tokens else ()
        return self._replace(tokens=self.tokens + tokens, forced=forced)

    def lost(self, number: int) -> _Row:
        """The row without its last tokens."""
        untold = min(number, len(self.tokens))
        kept = self.tokens[: len(self.tokens) - untold]
        return self._replace(start=self.start - (number - untold), tokens=kept, forced=())

    def told(self) -> _Row:
        """The row when the callback knows its tokens."""
        return self._replace(is_new=False, start=self.start + len(self.tokens), tokens=())

    def ended(self) -> _Row:
        return self._replace(has_ended=True)


class StepMasks:
    """The callback of a Sampler, and what it has not been told.

    The state changes in single assignments, so that an error or Ctrl-C leaves all or nothing of a
    change.

    Attributes:
        callback: the callback.
        rows: of each of the Sampler's rows, in order, what has happened to it. The Sampler assigns
            another list where rows change.
        next_id: the id of the next new row.
    """

    def __init__(
        self, callback: MaskCallback, rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self.callback = callback
        self._vocab_size, self._device = vocab_size, device
        self.rows: list[_Row] = [_Row(index) for index in range(rows)]
        self.next_id = rows
        #: The ids of the rows that the callback knows and that have not ended, as far as it knows.
        self._asked: frozenset[int] = frozenset()
        #: The ids of the rows of the last step, and its tokens, which may still be on a device.
        self._drawn: tuple[list[int], Tensor] | None = None
        #: Whether a step has begun whose tokens are not in ``_drawn``.
        self._is_drawing = False
        self._buffer = self._free_rows(rows)

    def around(self, step: Step) -> Step:
        """A prepared step that asks the callback first."""

        def run(
            logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
        ) -> SampleOutput:
            own = self._before()
            if own is not None:
                allowed_mask = own if allowed_mask is None else own & allowed_mask
            ids = [row.id for row in self.rows]
            self._is_drawing = True
            try:
                output = step(logits, allowed_mask, slots)
            except Exception:  # which leaves all rows where they are
                self._is_drawing = False
                raise
            tokens = output.tokens.clone()  # the caller may change the tensor
            self._drawn, self._is_drawing = (ids, tokens), False
            return output

        return run

    def with_row(self, tokens: Sequence[int]) -> tuple[list[_Row], int]:
        """``rows`` with one more, whose output has tokens already, and the ``next_id`` then."""
        return [*self.rows, _Row(self.next_id, tokens=tuple(tokens))], self.next_id + 1

    def selected(self, rows: Sequence[int]) -> tuple[list[_Row], int]:
        """These of the ``rows``, in this order, and the ``next_id``."""
        return [self.rows[row] for row in rows], self.next_id

    def changed(self, places: Collection[int], change: Callable[[_Row], _Row]) -> list[_Row]:
        """``rows`` with a change of those at some places."""
        self._take_drawn()
        return [change(row) if place in places else row for place, row in enumerate(self.rows)]

    @property
    def forced(self) -> list[tuple[int, ...]]:
        """The forced tokens that each row has still to get; waits for the device."""
        self._take_drawn()
        return [() if row.has_ended else row.forced for row in self.rows]

    def state(self) -> dict[str, Any]:
        """The state in plain numbers and lists; waits for the device."""
        self._take_drawn()
        rows = [
            {**row._asdict(), "tokens": list(row.tokens), "forced": list(row.forced)}
            for row in self.rows
        ]
        return {"rows": rows, "asked": sorted(self._asked), "next_id": self.next_id}

    def restore(self, state: object) -> None:
        """Go on from a state.

        Raises:
            ValueError: an entry is missing or is not as :meth:`state` makes it.
        """
        found = checks.mapping_with("masks", state, _STATE)
        if not isinstance(found["rows"], list) or len(found["rows"]) != len(self.rows):
            raise checks.refusal("masks", f"of {len(self.rows)} rows", found["rows"])
        self.rows = [
            _row_of(checks.mapping_with("masks", row, _ROW_STATE)) for row in found["rows"]
        ]
        self._asked = frozenset(checks.token_ids("masks", found["asked"]))
        self.next_id = checks.integer_at_least("masks", found["next_id"], len(self.rows))

    def _take_drawn(self) -> None:
        """Wait for the tokens of the last step, and count them among those of their rows.

        Raises:
            RuntimeError: the last step was interrupted.
        """
        if self._is_drawing:
            raise RuntimeError(
                "the mask callback cannot be told what the interrupted call before this one has "
                "drawn: make a new Sampler, or give this one a callback by set_allowed_mask"
            )
        if self._drawn is None:
            return
        ids, tokens = self._drawn
        of_ids = dict(zip(ids, tokens.tolist(), strict=True))
        rows = [row.drew(of_ids.get(row.id)) for row in self.rows]
        self.rows, self._drawn = rows, None

    def _before(self) -> Tensor | None:
        """The bitmask of the next step ``(rows, words)`` on the device; None if all are free.

        Whatever the callback raises leaves the state as it is. Once it has returned it has been
        told, whatever is wrong with its mask.
        """
        self._take_drawn()
        going = [index for index, row in enumerate(self.rows) if not row.has_ended]
        asked = [index for index in going if not self.rows[index].forced]
        masks = self._ask(asked, going) if asked else None
        is_forced = [index for index in going if self.rows[index].forced]
        if masks is None and not is_forced:
            return None
        if len(asked) < len(self.rows) or is_forced:
            device = _CPU if masks is None else masks.device
            whole = self._free_rows(len(self.rows)).to(device)
            if masks is not None:
                whole[asked] = masks
            for index in is_forced:
                token = self.rows[index].forced[0]
                whole[index] = 0
                whole[index, token >> 5] = _BITS[token & 31]
            masks = whole
        assert masks is not None
        return masks.to(self._device, non_blocking=True)

    def _ask(self, asked: Sequence[int], going: Sequence[int]) -> Tensor | None:
        """Ask the callback for rows; their bitmask ``(len(asked), words)``, None if all are free.

        Tokens that it forces are in the rows then.
        """
        rows = self.rows
        going_ids = {rows[index].id for index in going}
        if len(asked) > len(self._buffer):
            self._buffer = self._free_rows(len(asked))
        bitmask = self._buffer[: len(asked)].fill_(-1)
        step = MaskStep(
            rows=tuple(
                MaskRow(row.id, row.id, row.is_new, row.start, row.tokens)
                for row in map(rows.__getitem__, asked)
            ),
            ended=tuple(sorted(self._asked - going_ids)),
            bitmask=bitmask,
            forced=tuple([] for _ in asked),
            vocab_size=self._vocab_size,
        )
        mask = self.callback(step)
        told = list(rows)
        for index in asked:
            told[index] = rows[index].told()
        known = self._asked & going_ids | {rows[index].id for index in asked}
        self.rows, self._asked = told, known
        packed = self._packed(mask, bitmask, len(asked))
        forced = {
            index: _checked_forced(ids, self._vocab_size)
            for index, ids in zip(asked, step.forced, strict=True)
            if ids
        }
        if forced:
            self.rows = [
                row._replace(forced=forced.get(index, row.forced)) for index, row in enumerate(told)
            ]
        return packed

    def _packed(self, mask: Mask | None, bitmask: Tensor, rows: int) -> Tensor | None:
        """What the callback has returned as a bitmask, in host memory or on the device."""
        if mask is None:
            if not bool((bitmask == -1).all()):
                raise ValueError(
                    "allowed_mask must return the bitmask that it has filled, got None, which "
                    "lets every row draw any token"
                )
            return None
        is_on_device = isinstance(mask, Tensor) and mask.device != _CPU
        return check_mask(mask, rows, self._vocab_size, self._device if is_on_device else _CPU)

    def _free_rows(self, rows: int) -> Tensor:
        """A bitmask with all bits set, in host memory from which a GPU can copy by itself."""
        with not_of_inference_mode():
            return torch.full(
                (rows, -(-self._vocab_size // 32)),
                -1,
                dtype=torch.int32,
                device=_CPU,
                pin_memory=self._device.type == "cuda",
            )


#: int32 words with one bit each.
_BITS = [int(np.uint32(1 << bit).astype(np.int32)) for bit in range(32)]


def _checked_forced(ids: object, vocab_size: int) -> tuple[int, ...]:
    """Forced tokens; a ValueError if one is not in the vocabulary."""
    tokens = tuple(checks.token_ids("forced", ids))
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise checks.refusal("forced", f"token ids in 0 .. {vocab_size - 1}", token)
    return tokens


def _row_of(state: Mapping[str, Any]) -> _Row:
    """A row of its state."""
    return _Row(
        id=checks.integer_at_least("id", state["id"], 0),
        is_new=checks.true_or_false("is_new", state["is_new"]),
        start=checks.integer("start", state["start"]),
        tokens=tuple(checks.token_ids("tokens", state["tokens"])),
        forced=tuple(checks.token_ids("forced", state["forced"])),
        has_ended=checks.true_or_false("has_ended", state["has_ended"]),
    )
