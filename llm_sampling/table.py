"""Requests in slots: their parameters, seeds, positions and histories, at fixed addresses.

SamplingParams, ids -> RequestTable.set -> the host's numbers -> a copy to the device
logits, RequestTable, the rows' slots -> sample()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.backends.base import ParamSlots, PositionOf, SampleCall, SampleOutput
from llm_sampling.history import (
    TokenHistory,
    Turn,
    alone,
    check_vocab_size,
    checked_row,
    valid_ids,
)
from llm_sampling.params import (
    BatchParams,
    SamplingParams,
    as_int64,
    checked_position,
    column_values,
    fresh_seeds,
    kernel_flags,
)
from llm_sampling.tensors import not_of_inference_mode

#: What a slot without a request has: no kernel does more than it must for such a slot.
_EMPTY = SamplingParams(temperature=0)


class RequestTable:
    """Parameters, seeds, positions and histories of up to ``capacity`` requests, each in a slot.

    An engine makes one table, puts each request into a slot when it comes, and tells
    :func:`llm_sampling.sample` which slot each row of the logits has. The tensors on the device
    keep their addresses, so that a captured CUDA graph sees the requests that come later.

    One call at a time may change a table; a second one raises a RuntimeError and changes nothing.
    A call of :meth:`set` that Ctrl-C ends leaves its slot to be set again.

    Args:
        capacity: how many slots there are, at least 1.
        vocab_size: the width of the logits, 1 .. 2^20.
        history: whether to keep histories, which requests with penalties need. Their counts take
            ``capacity * vocab_size * 4`` bytes: 131 MB for 256 slots of 128,256 tokens.
        max_logit_bias: how many biases a request may have; each takes 8 bytes of every slot.
        device: the logits' device.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> table = RequestTable(256, vocab_size=32000)
        >>> table.set(7, SamplingParams(top_k=50, seed=1))
        >>> tokens = sample(torch.randn(1, 32000), table, slots=[7]).tokens
    """

    def __init__(
        self,
        capacity: int,
        *,
        vocab_size: int,
        history: bool = False,
        max_logit_bias: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = checks.integer_at_least("capacity", capacity, 1)
        self.vocab_size = check_vocab_size(vocab_size)
        self.max_logit_bias = checks.integer_at_least("max_logit_bias", max_logit_bias, 0)
        checks.true_or_false("history", history)
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self._turn = Turn()
        self._params: list[SamplingParams | None] = [None] * self.capacity
        with not_of_inference_mode():
            self._history = (
                TokenHistory.from_ids([[]] * capacity, None, self.vocab_size, device=self.device)
                if history
                else None
            )
            self._make_tensors()

    def _make_tensors(self) -> None:
        like = BatchParams.from_list([_EMPTY])
        columns = column_values(_EMPTY)
        dtypes = {name: getattr(like, name).dtype for name in columns}
        dtypes |= {"seed": torch.int64, "prompt_length": torch.int64, "bias_count": torch.int32}
        self._numbers = _Mirrored(dtypes, self.capacity, self.device)
        entries = self.capacity * self.max_logit_bias
        self._biases = _Mirrored({"id": torch.int32, "value": torch.float32}, entries, self.device)
        self._position = torch.zeros(self.capacity, dtype=torch.int64, device=self.device)
        slots = torch.arange(self.capacity + 1, dtype=torch.int64, device=self.device)
        of_columns: dict[str, Any] = {name: self._numbers.on_device[name] for name in columns}
        self._batch = replace(
            like,
            **of_columns,
            seed=self._numbers.on_device["seed"],
            position=self._position,
            logit_bias_offsets=slots * self.max_logit_bias,
            logit_bias_ids=self._biases.on_device["id"],
            logit_bias_values=self._biases.on_device["value"],
        )
        for name, value in columns.items():
            self._numbers.on_host[name][:] = value
        self._numbers.send()
        self._update_flags()

    @property
    def turns(self) -> tuple[Turn, Turn]:
        """The turn of a call that changes the table, twice."""
        return self._turn, self._turn

    @property
    def history(self) -> TokenHistory | None:
        """A read-only view of the histories, whose row s is slot s; None if none are kept."""
        return None if self._history is None else self._history.with_slots(self._history.slots)

    def history_of(self, slots: Tensor) -> TokenHistory | None:
        """A read-only view of rows with these slots, int32 ``(rows,)``; None if none are kept."""
        return None if self._history is None else self._history.with_slots(slots)

    @property
    def positions(self) -> Tensor:
        """int64 ``(capacity,)``, a copy: how many tokens the request of each slot has produced."""
        return self._position.clone()

    def params(self, slot: int) -> SamplingParams | None:
        """The parameters of the request in a slot, with the seed that it got; None if it is free.

        Raises:
            ValueError: there is no such slot.
        """
        return self._params[checked_row(slot, self.capacity, "slot")]

    @alone
    def set(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | Tensor = (),
        output_ids: Sequence[int] | Tensor = (),
        prompt_length: int | None = None,
        position: int | None = None,
    ) -> None:
        """Put a request into a slot, whatever the slot held before.

        Its numbers go to the device in one copy, from pinned memory and on the current stream, and
        its biases in two more.

        Args:
            slot: 0 .. ``capacity - 1``.
            params: the request's parameters. Without a seed it gets one from torch's default
                generator, here.
            prompt_ids: its prompt, which matters where a penalty is on.
            output_ids: the tokens that it has produced so far.
            prompt_length: the length of its prompt, for ``text_positions``. Default: the number of
                ``prompt_ids``.
            position: how many tokens it has produced. Default: the number of ``output_ids``.

        Raises:
            ValueError: there is no such slot, an argument is out of its range, there are more than
                ``max_logit_bias`` biases, or a penalty is on and the table keeps no histories.
        """
        slot = checked_row(slot, self.capacity, "slot")
        if not isinstance(params, SamplingParams):
            raise checks.refusal("params", "a SamplingParams", params)
        bias = params.logit_bias or {}
        if len(bias) > self.max_logit_bias:
            raise ValueError(
                f"logit_bias must have at most max_logit_bias = {self.max_logit_bias} tokens, "
                f"got {len(bias)}"
            )
        if params.needs_history and self._history is None:
            raise ValueError(
                "params must have no penalty where no histories are kept: make the RequestTable "
                f"with history=True, got {params}"
            )
        prompt = valid_ids("prompt_ids", prompt_ids, self.vocab_size)
        output = valid_ids("output_ids", output_ids, self.vocab_size)
        if prompt_length is None:
            prompt_length = len(prompt_ids)
        prompt_length = checks.integer_at_least("prompt_length", prompt_length, 0)
        position = checked_position("position", len(output) if position is None else position)
        if params.seed is None:
            params = replace(params, seed=int(fresh_seeds(1)) % 2**64)
        assert params.seed is not None

        if self._history is not None:
            self._history._fill(slot, prompt, output)
        self._position[slot] = position
        start, stop = slot * self.max_logit_bias, slot * self.max_logit_bias + len(bias)
        self._biases.on_host["id"][start:stop] = [*bias]
        self._biases.on_host["value"][start:stop] = [*bias.values()]
        self._biases.send(start, stop)
        numbers = {"seed": as_int64(params.seed), "prompt_length": prompt_length}
        self._write(slot, params, {**numbers, "bias_count": len(bias)})

    @alone
    def clear(self, slot: int) -> None:
        """Make a slot free.

        Raises:
            ValueError: there is no such slot.
        """
        slot = checked_row(slot, self.capacity, "slot")
        self._write(slot, None, {"seed": 0, "prompt_length": 0, "bias_count": 0})

    def _write(
        self, slot: int, params: SamplingParams | None, numbers: Mapping[str, float]
    ) -> None:
        columns = column_values(_EMPTY if params is None else params)
        for name, value in {**columns, **numbers}.items():
            self._numbers.on_host[name][slot] = value
        self._params[slot] = params
        self._update_flags()
        self._numbers.send()

    def _update_flags(self) -> None:
        self._any_bias = bool(self._numbers.on_host["bias_count"].any())
        flags: dict[str, Any] = kernel_flags(self._numbers.on_host)
        if any(getattr(self._batch, name) != value for name, value in flags.items()):
            self._batch = replace(self._batch, **flags)

    def batch_of(
        self, slots: Tensor, position: Tensor | None, position_of: PositionOf
    ) -> tuple[BatchParams, ParamSlots]:
        """What a kernel reads for rows with these slots.

        Args:
            slots: int32 ``(rows,)``.
            position: int64 ``(rows,)``; None where ``position_of`` is "slot".
            position_of: see :class:`ParamSlots`.
        """
        batch = self._batch if position is None else replace(self._batch, position=position)
        numbers = self._numbers.on_device
        lengths = numbers["prompt_length"] if position_of == "text" else None
        by_slot = ParamSlots(slots, numbers["bias_count"], position_of, lengths, self._any_bias)
        return batch, by_slot

    @alone
    def record(self, run: Callable[[SampleCall], SampleOutput], call: SampleCall) -> SampleOutput:
        """The result of a call that records its tokens in this table."""
        return run(call)

    def check_slots(self, slots: Tensor) -> None:
        """A ValueError if a row names a free slot; on the CPU only, elsewhere it would wait."""
        if slots.device.type != "cpu":
            return
        for row, slot in enumerate(slots.tolist()):
            if 0 <= slot < self.capacity and self._params[slot] is None:
                raise ValueError(f"slots must name slots with a request, got {slot} in row {row}")


class _Mirrored:
    """Arrays that the host writes, and their copy at a fixed address on a device.

    On the CPU both are the same memory.

    Attributes:
        on_host: name -> the array.
        on_device: name -> the tensor.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype], size: int, device: torch.device) -> None:
        # The largest elements come first, so that every array is aligned.
        names = sorted(dtypes, key=lambda name: -dtypes[name].itemsize)
        sizes = [dtypes[name].itemsize * size for name in names]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
        self._device = self._host
        self._staging: _Staging | None = None
        if device.type != "cpu":
            self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
            self._staging = _Staging()

        def parts(memory: Tensor) -> dict[str, Tensor]:
            each = zip(names, torch.split(memory, sizes), strict=True)
            return {name: part.view(dtypes[name]) for name, part in each}

        self.on_host = {name: part.numpy() for name, part in parts(self._host).items()}
        self.on_device = parts(self._device)

    def send(self, start: int = 0, stop: int | None = None) -> None:
        """Copy what the host has written to the device, without waiting.

        All arrays go in one copy; the elements from ``start`` up to ``stop - 1`` of each in a copy
        of their own.
        """
        if self._staging is None:
            return
        if stop is None:
            self._staging.copy(self._host, self._device)
        elif stop > start:
            for name, array in self.on_host.items():
                to = self.on_device[name][start:stop]
                self._staging.copy(torch.from_numpy(array[start:stop]), to)


class _Staging:
    """Pinned memory from which copies to a device leave.

    Memory is used again only after the copy that it was last used for.
    """

    def __init__(self) -> None:
        self._used: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor of the CPU to one on a device, on its current stream."""
        size = source.nbytes
        pinned, event = None, None
        if self._used and self._used[0][1].query():  # type: ignore[no-untyped-call]
            pinned, event = self._used.popleft()
        if pinned is None or event is None or pinned.numel() < size:
            pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        part = pinned[:size].view(source.dtype)
        part.copy_(source)
        target.copy_(part, non_blocking=True)
        event.record(torch.cuda.current_stream(target.device))
        self._used.append((pinned, event))
