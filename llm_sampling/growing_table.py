"""The table under a Sampler: a RequestTable that takes as much as comes."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling.backends.base import BackendModule, ParamSlots, PositionOf
from llm_sampling.history import Moved, TokenHistory
from llm_sampling.params import BIAS_TENSORS, SEQUENCE_TENSORS, BatchParams, SamplingParams
from llm_sampling.table import EMPTY, Assignment, RequestTable, flags_of
from llm_sampling.tensors import not_of_inference_mode


class GrowingTable(RequestTable):
    """The table of a Sampler, which takes as many requests, biases and sequences as come.

    Its tensors have other addresses after it has grown. Its history is the Sampler's, which others
    may share, and has windows of its own. The Sampler checks arguments and takes turns.

    Args:
        vocab_size: the width of the logits.
        history: the Sampler's, if it has one.
        backend: which one changes the histories.
        device: the logits' device.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        history: TokenHistory | None,
        backend: str,
        device: torch.device,
    ) -> None:
        capacity = 0 if history is None else history.seen.shape[0]
        super().__init__(
            max(1, capacity),
            vocab_size=vocab_size,
            max_logit_bias=0,
            max_sequence_ids=0,
            backend=backend,
            device=device,
        )
        self._history = history
        self._is_packed = True
        self._longest_sequences = 0

    @property
    def module(self) -> BackendModule:
        """The backend."""
        return self._backend

    @property
    def positions_of_slots(self) -> Tensor:
        """int64 ``(capacity,)``, how many tokens each request has produced; to be changed."""
        return self._position

    def request(self, slot: int) -> SamplingParams:
        """The parameters of a request, as they were given."""
        params = self._params[slot]
        assert params is not None
        return params

    def is_kept(self, slot: int) -> bool:
        """Whether the history of a request has all of its ids."""
        return self._is_kept[slot]

    def seed(self, slot: int) -> int:
        """The seed of a request, as a signed integer."""
        return int(self._numbers.on_host["seed"][slot])

    def put_rows(
        self,
        slots: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        is_kept: Sequence[bool],
        position: Tensor | None,
    ) -> None:
        """Put requests with these seeds and positions into slots; histories stay as they are."""
        with not_of_inference_mode():
            self._grow_to(max(slots, default=0) + 1)
            rows = zip(slots, params, seeds, is_kept, strict=True)
            for slot, of_slot, seed, kept in rows:
                self._write(slot, of_slot, seed, 0, kept)
            self._numbers.send()
            if position is not None:
                self._position[slots] = position

    def put(
        self,
        slot: int,
        params: SamplingParams,
        prompt: array[int],
        output: array[int],
        history: TokenHistory | None,
        window: int,
    ) -> None:
        """Put a request into a slot, and its ids into this history, which the table may get."""
        if history is not None:
            history.set_window(slot, window)
        self._write(slot, params, None, len(prompt), history is not None)
        self._numbers.send()
        if history is None:
            self._position[slot] = self._number_of_ids(output)
        else:
            self._fill(history, slot, prompt + output, len(prompt))
            history.fills[slot] = history.fills.get(slot, 0) + 1

    def replace_params(self, slot: int, params: SamplingParams, moved: Moved | None) -> None:
        """Give a request other parameters, and its history the window that belongs to them."""
        more: list[Assignment] = []
        history = self._history
        if moved is not None and history is not None and history.text is not None:
            targets = history.text.windows, history.seen, history.counts
            values = moved.window, moved.seen, moved.counts
            more = list(zip(targets, itertools.repeat(moved.slot), values, strict=False))
        self._replace_params(slot, params, more)

    def leave(self, slots: Iterable[int]) -> None:
        """Make slots free."""
        for slot in slots:
            self._write(slot, None, 0, 0, False)
        self._numbers.send()

    def free_slot(self, history: TokenHistory | None, used: Sequence[int]) -> int:
        """A slot that no row uses, of the table and the history; both grow if there is none.

        Raises:
            ValueError: there is none, and the history's memory is its caller's.
        """
        if history is not None:
            self._grow_to(history.seen.shape[0])
        capacity = self.capacity if history is None else history.seen.shape[0]
        free = self._free
        if not free or min(free) >= capacity:
            # slots that no row has, because Ctrl-C ended a call before it made them free
            free = set(range(capacity)).difference(used)
        if free:
            return min(free)
        if history is not None:
            history.grow()
        self._grow_to(2 * capacity if history is None else history.seen.shape[0])
        return capacity

    def _grow_to(self, capacity: int) -> None:
        """Have at least so many slots."""
        old = self.capacity
        if capacity <= old:
            return
        state = self._state_of(capacity)
        for name, column in self._numbers.on_host.items():
            state["_numbers"].on_host[name][:old] = column
        state["_numbers"].send()
        state["_position"][:old] = self._position
        for name in ("_params", "_is_kept", "_on"):
            state[name][:old] = getattr(self, name)
        state["_free"] = self._free.union(range(old, capacity))
        state["_times_on"][EMPTY.packed.on] -= old
        for on, times in self._times_on.items():
            state["_times_on"][on] = state["_times_on"].get(on, 0) + times
        state["_switches"] = self._switches
        state["batch"] = replace(state["batch"], **flags_of(self._switches))
        vars(self).update(state, _is_packed=False)

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        """There may be any number of them."""

    def _check_sequences(self, sequences: Sequence[int]) -> None:
        """There may be any number of them."""

    def _write_bias(self, slot: int, bias: Mapping[int, float]) -> list[Assignment]:
        return self._to_be_packed()

    def _write_sequences(self, slot: int, sequences: Sequence[int]) -> list[Assignment]:
        return self._to_be_packed()

    def _most_sequence_ids(self) -> int:
        return self._longest_sequences

    def _to_be_packed(self) -> list[Assignment]:
        # flags that change too are in another batch, which is assigned after this one
        changed = {"_is_packed": False, "batch": replace(self.batch)}
        return [(vars(self), name, value) for name, value in changed.items()]

    def batch_of(
        self, slots: Tensor, position: Tensor | None, position_of: PositionOf
    ) -> tuple[BatchParams, ParamSlots]:
        """What a kernel reads for rows with these slots."""
        if not self._is_packed:
            params = [EMPTY if of_slot is None else of_slot for of_slot in self._params]
            packed = BatchParams.from_list(params, device=self.device)
            biases = {name: getattr(packed, name) for name in BIAS_TENSORS}
            sequences = {name: getattr(packed, name) for name in SEQUENCE_TENSORS}
            self._longest_sequences = max(len(of_slot.sequences) for of_slot in params)
            if packed.has_rules:
                self._rules = {**self._rules, **sequences}
            rules = self._rules_if(packed.has_rules)
            self.batch = replace(self.batch, **biases, **rules)
            self._is_packed = True
        return super().batch_of(slots, position, position_of)
