"""Requests in slots: their parameters, seeds, positions and histories, at fixed addresses.

SamplingParams, ids -> RequestTable.set -> the host's numbers -> a copy to the device
ids on the device -> RequestTable.append, fill, rollback -> a kernel that changes histories
logits, RequestTable, the rows' slots -> sample()
"""

from __future__ import annotations

import collections
import itertools
import operator
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_sampling import backends, checks
from llm_sampling.backends.base import BackendModule, ParamSlots, PositionOf, SampleCall, Step
from llm_sampling.history import (
    HistoryUpdate,
    Text,
    TokenHistory,
    Turn,
    UpdateKind,
    alone,
    check_vocab_size,
    checked_row,
    history_from_state,
    refuse_turn,
    state_of,
    valid_ids,
)
from llm_sampling.masks import Mask, check_mask
from llm_sampling.params import (
    COLUMNS,
    CONSERVATIVE_FLAGS,
    RULE_COLUMNS,
    SWITCHES,
    BatchParams,
    SamplingParams,
    as_int64,
    checked_position,
    fresh_seeds,
    int64_column,
    kernel_flags,
    plain,
)
from llm_sampling.results import SampleOutput
from llm_sampling.tensors import (
    is_readable_as_it_is,
    is_watched,
    not_of_inference_mode,
    readable,
    to_device,
)

#: The entries of a ``state_dict``.
_STATE = frozenset(
    {"capacity", "vocab_size", "max_logit_bias", "max_sequence_ids", "params", "is_kept"}
    | {"prompt_lengths", "position", "history"}
)

#: What is filled in where a request has no ids; memory must not be empty.
_NO_IDS = array("q", [-1])

#: How many prepared steps a table keeps.
_MOST_STEPS = 8

#: A container, a key, and the value that it is to have there.
Assignment = tuple[Any, Any, Any]

#: What a slot without a request has: no kernel does more than it must for such a slot.
EMPTY = SamplingParams(temperature=0, seed=0)


class RequestTable:
    """Parameters, seeds, positions and histories of up to ``capacity`` requests, each in a slot.

    An engine makes one table, puts each request into a slot when it comes, and tells
    :func:`llm_sampling.sample` which slot each row of the logits has. The tensors on the device
    keep their addresses, so that a captured CUDA graph sees the requests that come later. No method
    waits for the device, unless it says so; methods with ``slots`` take a sequence or a tensor of
    integers ``(rows,)``, and a row whose slot does not exist, such as -1, changes nothing.

    One call at a time may change a table; a second one raises a RuntimeError and changes nothing.
    A call of :meth:`set` or :meth:`set_params` that Ctrl-C ends leaves its slot to be set again.
    A table can be copied by ``copy.deepcopy`` and pickled between steps; :meth:`state_dict` is its
    state in plain tensors and numbers.

    Args:
        capacity: how many slots there are, at least 1.
        vocab_size: the width of the logits, 1 .. 2^20.
        history: whether to keep histories, which requests with penalties need. Their counts take
            ``capacity * vocab_size * 4`` bytes: 131 MB for 256 slots of 128,256 tokens. Or a
            :class:`TokenHistory` over tensors of an engine, whose slot s is that of this table.
            Then the engine sees to what a slot holds when a request comes: :meth:`set` without ids
            leaves it as it is.
        max_length: keep the ids of prompt and output in order too, so many of both together in each
            slot, 4 bytes each; :meth:`rollback`, ``penalty_last_n`` and the rules that look at the
            ids in order need them.
        max_logit_bias: how many biases a request may have, bad words of a single id among them;
            each takes 8 bytes of every slot.
        max_sequence_ids: how many ids the token sequences of a request may have together, where
            histories are kept: ``dry_breakers``, ``bad_words`` and ``stop_token_ids``. Each takes 4
            bytes of every slot, and so do two numbers for each sequence, which count too. Breakers
            of a single id are one sequence.
        backend: which one changes the histories; as for :func:`llm_sampling.sample`.
        device: the logits' device.

    Raises:
        ValueError: an argument is out of its range, or ``history`` does not fit the others.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> table = RequestTable(256, vocab_size=32000)
        >>> table.set(7, SamplingParams(top_k=50, seed=1))
        >>> tokens = sample(torch.randn(1, 32000), table, slots=[7]).tokens
    """

    capacity: int
    _numbers: _Mirrored
    _position: Tensor
    #: What kernels read; another object where a prepared step must be prepared anew.
    batch: BatchParams
    _params: list[SamplingParams | None]
    _free: set[int]
    #: The tensors of the batch by which kernels know rules that look at the history.
    _rules: dict[str, Any]
    _is_kept: list[bool]
    #: Which switches each slot turns on, how many slots have each such set, and what is on in any.
    _on: list[frozenset[str]]
    _times_on: dict[frozenset[str], int]
    _switches: frozenset[str]
    #: What is written for a slot: the arrays of the host's numbers, the three lists, and the dict,
    #: in which a number falls and another grows.
    _written: tuple[Any, ...]
    #: The prepared steps, which hold the batch.
    _steps: list[_PreparedStep]
    _fill_on_cpu: _FillOnCPU | None

    def __init__(
        self,
        capacity: int,
        *,
        vocab_size: int,
        history: bool | TokenHistory = False,
        max_length: int | None = None,
        max_logit_bias: int = 1024,
        max_sequence_ids: int = 8192,
        backend: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = checks.integer_at_least("capacity", capacity, 1)
        self.vocab_size = check_vocab_size(vocab_size)
        self.max_logit_bias = checks.integer_at_least("max_logit_bias", max_logit_bias, 0)
        self.max_sequence_ids = checks.integer_at_least("max_sequence_ids", max_sequence_ids, 0)
        self._has_sequences = history is not False
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self._device_type = self.device.type
        if not isinstance(history, TokenHistory):
            checks.true_or_false("history", history)
            if max_length is not None and not history:
                raise ValueError(
                    f"max_length must be None where history is False, got {max_length}"
                )
        self._backend_name = backend
        self._backend = backends.resolve(backend, self.device)
        self._turn = Turn()
        with not_of_inference_mode():
            vars(self).update(self._state_of(self.capacity))
            self._history = self._make_history(history, max_length)
        self._is_callers = isinstance(history, TokenHistory) and not history.can_grow

    def _state_of(self, capacity: int) -> dict[str, Any]:
        """The attributes of a table whose slots are all free, but for the histories."""
        dtypes = {column.name: column.dtype for _, column in COLUMNS}
        dtypes |= {"seed": torch.int64, "prompt_length": torch.int64}
        dtypes |= {"bias_count": torch.int32, "sequence_count": torch.int32}
        numbers = _Mirrored(dtypes, capacity, self.device)
        columns = [numbers.on_host[name] for name in dtypes]
        for column, number in zip(columns, EMPTY.packed.numbers, strict=False):
            column[:] = number
        numbers.send()
        position = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        of_columns: dict[str, Any] = {c.name: numbers.on_device[c.name] for _, c in COLUMNS}
        rules = {column.name: of_columns.pop(column.name) for column in RULE_COLUMNS}
        batch = replace(
            BatchParams.from_list([EMPTY]),
            **of_columns,
            **self._biases_of(capacity),
            seed=numbers.on_device["seed"],
            position=position,
        )
        empty = EMPTY.packed.on
        of_slots: dict[str, Any] = {
            "_params": [None] * capacity,
            "_is_kept": [False] * capacity,
            "_on": [empty] * capacity,
        }
        times_on = {empty: capacity}
        return {
            "capacity": capacity,
            "_numbers": numbers,
            "_position": position,
            "_free": set(range(capacity)),
            **of_slots,
            "_times_on": times_on,
            "_written": (*columns, *of_slots.values(), times_on, times_on),
            "_switches": empty,
            "_rules": {**rules, **self._sequences_of(capacity)},
            "batch": replace(batch, **{**CONSERVATIVE_FLAGS, **flags_of(empty)}),
            "_steps": [],
            "_fill_on_cpu": None,
        }

    def _biases_of(self, capacity: int) -> dict[str, Any]:
        """Empty biases, with the same number of places for each slot."""
        entries = capacity * self.max_logit_bias
        self._biases = _Mirrored({"id": torch.int32, "value": torch.float32}, entries, self.device)
        slots = torch.arange(capacity + 1, dtype=torch.int64, device=self.device)
        return {
            "logit_bias_offsets": slots * self.max_logit_bias,
            "logit_bias_ids": self._biases.on_device["id"],
            "logit_bias_values": self._biases.on_device["value"],
        }

    def _sequences_of(self, capacity: int) -> dict[str, Any]:
        """No token sequences, with the same number of places for each slot."""
        most = self.max_sequence_ids if self._has_sequences else 0
        self._sequences = _Mirrored({"id": torch.int32}, capacity * most, self.device)
        slots = torch.arange(capacity + 1, dtype=torch.int64, device=self.device)
        return {"sequence_offsets": slots * most, "sequences": self._sequences.on_device["id"]}

    def _make_history(
        self, history: bool | TokenHistory, max_length: int | None
    ) -> TokenHistory | None:
        """The histories, whose windows are the table's own column."""
        if not isinstance(history, TokenHistory):
            if not history:
                return None
            history = TokenHistory.empty(
                self.capacity, self.vocab_size, max_length=max_length, device=self.device
            )
        elif max_length is not None:
            raise ValueError(
                f"max_length must be None where history is a TokenHistory, got {max_length}"
            )
        found = history.seen.shape[0], history.vocab_size, history.device
        if history.is_view or found != (self.capacity, self.vocab_size, self.device):
            raise ValueError(
                "history must be one that can be changed, of capacity, vocab_size and device "
                f"{(self.capacity, self.vocab_size, str(self.device))}, got {found}"
            )
        text: Text | None = history.text
        if text is not None:
            text = text._replace(windows=self._numbers.on_device["penalty_last_n"])
        return TokenHistory.of_parts(
            history.seen,
            history.counts,
            history.lengths,
            torch.arange(self.capacity, dtype=torch.int32, device=self.device),
            vocab_size=self.vocab_size,
            text=text,
        )

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
        slot = checked_row(slot, self.capacity, "slot")
        params = self._params[slot]
        if params is None or params.seed is not None:
            return params
        return replace(params, seed=int(self._numbers.on_host["seed"][slot]) % 2**64)

    @alone
    def set(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | Tensor | None = None,
        output_ids: Sequence[int] | Tensor | None = None,
        prompt_length: int | None = None,
        position: int | None = None,
    ) -> None:
        """Put a request into a slot, whatever the slot held before.

        Its numbers go to the device in one copy, from pinned memory and on the current stream, its
        biases in two more, and its ids in one. Ids on the device are brought to the host, which
        waits; :meth:`fill` takes them as they are.

        Args:
            slot: 0 .. ``capacity - 1``.
            params: the request's parameters. Without a seed it gets one from torch's default
                generator, here.
            prompt_ids: its prompt, which matters where a penalty or a rule is on.
            output_ids: the tokens that it has produced so far.
            prompt_length: the length of its prompt, for ``text_positions``. Default: the number of
                ``prompt_ids``.
            position: how many tokens it has produced. Default: the number of ``output_ids``.

        Raises:
            ValueError: there is no such slot, an argument is out of its range, there are more than
                ``max_logit_bias`` biases, ``max_sequence_ids`` ids of sequences or ``max_length``
                ids, or the table does not keep what a penalty or a rule needs.
        """
        slot = checked_row(slot, self.capacity, "slot")
        self._check_params(params)
        prompt = array_of("prompt_ids", prompt_ids)
        ids = prompt if output_ids is None else prompt + array_of("output_ids", output_ids)
        if self._history is not None:
            self.check_room(self._history, ids)
        if prompt_length is None:
            prompt_length = 0 if prompt_ids is None else len(prompt_ids)
        else:
            prompt_length = checks.integer_at_least("prompt_length", prompt_length, 0)
        if position is not None:
            position = checked_position("position", position)

        has_ids = prompt_ids is not None or output_ids is not None
        is_left = self._history is None or (self._is_callers and not has_ids)
        is_kept = self._is_callers or prompt_ids is not None or params.needs_history
        self._write(slot, params, None, prompt_length, is_kept)
        self._numbers.send()
        if not is_left:
            self._fill(self._history, slot, ids, len(prompt))
        elif position is None:
            position = self._number_of_ids(ids[len(prompt) :])
        if position is not None:
            self._position[slot] = position

    def check_room(self, history: TokenHistory, ids: array[int]) -> None:
        """A ValueError if no slot has room for these ids; padding needs none."""
        if history.text is not None and len(ids) > history.text.max_length:
            history.check_room(self._number_of_ids(ids))

    def _number_of_ids(self, ids: array[int]) -> int:
        """How many of them are not padding."""
        return sum(0 <= token < self.vocab_size for token in ids)

    def _fill(
        self, history: TokenHistory | None, slot: int, ids: array[int], prompt_length: int
    ) -> None:
        """Make ids the history of a slot, and the length of their output its position."""
        assert history is not None
        if self._device_type == "cpu":
            fill = self._fill_on_cpu
            if fill is None or fill.update.history is not history or fill.room < len(ids):
                fill = _FillOnCPU(self._backend, history, self._position, len(ids))
                self._fill_on_cpu = fill
            fill(slot, ids, prompt_length)
            return
        row = torch.tensor([slot, len(ids), prompt_length], dtype=torch.int32, device="cpu")
        given = torch.frombuffer(ids or _NO_IDS, dtype=torch.int64)[None]
        self._backend.update_history(
            _fill_of(
                history,
                to_device(row, self.device),
                to_device(given, self.device),
                self._position,
            )
        )

    def _check_params(self, params: SamplingParams) -> None:
        """A ValueError if no slot can hold these parameters."""
        if not isinstance(params, SamplingParams):
            raise checks.refusal("params", "a SamplingParams", params)
        on = params.packed.on
        if "bias" in on:
            self._check_bias(params.bans)
        if not params.needs_history:
            return
        if self._history is None:
            raise ValueError(
                "params must have no penalty, and no rule that looks at the history, where no "
                f"histories are kept: make the RequestTable with history=True, got {params}"
            )
        if params.needs_text and self._history.text is None:
            raise ValueError(
                "params must have no penalty_last_n, dry_multiplier, no_repeat_ngram_size or "
                "bad_words where the ids are not kept in order: make the RequestTable with "
                f"max_length, got {params}"
            )
        if "rules" in on:
            self._check_sequences(params.sequences)

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        if len(bias) > self.max_logit_bias:
            raise ValueError(
                "logit_bias and bad_words of a single id must have at most max_logit_bias = "
                f"{self.max_logit_bias} tokens, got {len(bias)}"
            )

    def _check_sequences(self, sequences: Sequence[int]) -> None:
        if len(sequences) > self.max_sequence_ids:
            raise ValueError(
                "dry_breakers, bad_words and stop_token_ids must have at most max_sequence_ids = "
                f"{self.max_sequence_ids} ids, with two more for each sequence, got "
                f"{len(sequences)}"
            )

    @alone
    def set_params(self, slot: int, params: SamplingParams) -> None:
        """Replace the parameters of the request in a slot; its history and position stay.

        Args:
            slot: a slot with a request.
            params: the new parameters. Without a seed the request keeps the one that it has.

        Raises:
            ValueError: there is no request in this slot, the table cannot hold the parameters, or
                they turn a penalty or a rule on and the request's ids are not known, since it was
                set without either and without ``prompt_ids``.
        """
        old = self.params(slot)
        if old is None:
            raise checks.refusal("slot", "one with a request", slot)
        self._check_params(params)
        if params.needs_history and not self._is_kept[slot]:
            raise ValueError(
                "params must have no penalty, and no rule that needs it, where the history was not "
                f"kept (slot {slot}): set the request with its prompt_ids, or fill its slot"
            )
        self._replace_params(slot, params)
        text = None if self._history is None else self._history.text
        if (
            self._history is not None
            and text is not None
            and old.penalty_last_n != params.penalty_last_n
        ):
            one = slice(slot, slot + 1)
            self._backend.update_history(
                HistoryUpdate(
                    "fill",
                    self._history,
                    self._history.slots[one],
                    text.lengths[one].to(torch.int32),
                    text.ids[one].clone(),
                    text.prompt_lengths[one].to(torch.int32),
                )
            )

    def _replace_params(
        self, slot: int, params: SamplingParams, more: Iterable[Assignment] = ()
    ) -> None:
        """Give the request in a slot other parameters; without a seed it keeps its own."""
        of_slot = self._numbers.on_host
        seed = int(of_slot["seed"][slot]) if params.seed is None else None
        length = int(of_slot["prompt_length"][slot])
        self._write(slot, params, seed, length, self._is_kept[slot], more)
        self._numbers.send()

    @alone
    def clear(self, slot: int) -> None:
        """Make a slot free.

        Raises:
            ValueError: there is no such slot.
        """
        self._write(checked_row(slot, self.capacity, "slot"), None, 0, 0, False)
        self._numbers.send()

    def _write(
        self,
        slot: int,
        params: SamplingParams | None,
        seed: int | None,
        prompt_length: int,
        is_kept: bool,
        more: Iterable[Assignment] = (),
    ) -> None:
        """Write what a slot holds, and make ``more`` assignments: all of them or none.

        Args:
            slot: the slot.
            params: of its request; None if there is none.
            seed: the request's seed, as a signed integer. None: that of ``params``, which without
                one draws one.
            prompt_length: the length of its prompt.
            is_kept: whether its history has all of its ids.
            more: other assignments.
        """
        given = EMPTY if params is None else params
        (numbers, on), bias, sequences = given.packed, given.bans, given.sequences
        if seed is None:
            assert params is not None
            seed = int(fresh_seeds(1)) if params.seed is None else as_int64(params.seed)
        old, times = self._on[slot], self._times_on
        of_old, of_new = times[old], times.get(on, 0)
        if on != old:
            of_old, of_new = of_old - 1, of_new + 1
        targets = self._written
        keys = (*itertools.repeat(slot, len(targets) - 2), old, on)
        counts = len(bias), len(sequences)
        values = (*numbers, seed, prompt_length, *counts, params, is_kept, on, of_old, of_new)
        others = [*more]
        if bias or "bias" in old:
            others += self._write_bias(slot, bias)
        if sequences or "rules" in old:
            others += self._write_sequences(slot, sequences)
        if on != old and ((old and of_old == 0) or (on and of_new == 1)):
            others += self._changes_of_flags({**times, old: of_old, on: of_new})
        if not self._numbers.is_one:
            others.append((vars(self._numbers), "is_sent", False))
        if others:
            more_targets, more_keys, more_values = zip(*others, strict=True)
            targets, keys = (*targets, *more_targets), (*keys, *more_keys)
            values = (*values, *more_values)
        # one call, since Python handles Ctrl-C between calls
        collections.deque(map(operator.setitem, targets, keys, values), maxlen=0)
        if params is None:
            self._free.add(slot)
        else:
            self._free.discard(slot)

    def _write_bias(self, slot: int, bias: Mapping[int, float]) -> list[Assignment]:
        """Write a slot's biases. Returns what else is to be assigned."""
        start, stop = slot * self.max_logit_bias, slot * self.max_logit_bias + len(bias)
        self._biases.on_host["id"][start:stop] = [*bias]
        self._biases.on_host["value"][start:stop] = [*bias.values()]
        self._biases.send(start, stop)
        return []

    def _write_sequences(self, slot: int, sequences: Sequence[int]) -> list[Assignment]:
        """Write a slot's token sequences. Returns what else is to be assigned."""
        start, stop = slot * self.max_sequence_ids, slot * self.max_sequence_ids + len(sequences)
        self._sequences.on_host["id"][start:stop] = sequences
        self._sequences.send(start, stop)
        return []

    def _most_sequence_ids(self) -> int:
        """How many numbers the token sequences of a slot have at most."""
        return self.max_sequence_ids

    def _rules_if(self, is_on: bool) -> dict[str, Any]:
        """The tensors of a batch in which a slot has a rule that looks at the history, or none."""
        return self._rules if is_on else dict.fromkeys(self._rules)

    def _changes_of_flags(self, times_on: Mapping[frozenset[str], int]) -> list[Assignment]:
        """What is to be assigned where so many slots turn on each set of switches."""
        switches = frozenset().union(*(on for on, times in times_on.items() if times))
        if switches == self._switches:
            return []
        batch = replace(self.batch, **flags_of(switches), **self._rules_if("rules" in switches))
        changed = {"_switches": switches, "batch": batch, "_steps": []}
        return [(vars(self), name, value) for name, value in changed.items()]

    @alone
    def append(
        self,
        tokens: Tensor,
        counts: Sequence[int] | Tensor | None = None,
        *,
        slots: Sequence[int] | Tensor,
    ) -> None:
        """Record tokens that were not drawn here as the next ones of their slots' outputs.

        So an engine records what a verified draft or another device has drawn. One launch; the
        table's own positions grow by the numbers of recorded tokens.

        Args:
            tokens: int32 or int64 ``(rows,)`` or ``(rows, k)`` on the table's device. Ids outside
                the vocabulary, such as -1, are left out.
            counts: how many of each row's tokens, its first ones, are recorded; integers
                ``(rows,)``. Default: all.
            slots: the slots, each at most once.

        Raises:
            ValueError: the table keeps no histories, or an argument is not as above. Slots that are
                named twice, and tokens for which ``max_length`` leaves no room, are looked for on
                the CPU only; elsewhere such tokens are left out, and the next row that is to be
                recorded in the slot gets the status 8.
        """
        ids = self._ids("tokens", tokens[:, None] if tokens.dim() == 1 else tokens)
        if counts is None:
            counts = [ids.shape[1]] * ids.shape[0]
        self._update("append", slots, "counts", counts, ids)

    @alone
    def fill(
        self,
        slots: Sequence[int] | Tensor,
        ids: Tensor,
        lengths: Sequence[int] | Tensor,
        prompt_lengths: Sequence[int] | Tensor,
    ) -> None:
        """Make ids on the device the prompts and outputs of slots, as :meth:`set` does with lists.

        One launch. The table's own positions become the lengths of the outputs. A request is set
        first, and its slot is filled then.

        Args:
            slots: the slots, each at most once. The host does not read a tensor: :meth:`set_params`
                still refuses to turn a penalty on in its slots unless :meth:`set` got the
                ``prompt_ids`` or a penalty.
            ids: int32 or int64 ``(rows, length)`` on the table's device: prompt, then output.
            lengths: how many ids each row has, of prompt and output; integers ``(rows,)``.
            prompt_lengths: how many of them are the prompt; integers ``(rows,)``.

        Raises:
            ValueError: as :meth:`append`.
        """
        given = self._ids("ids", ids)
        rows = given.shape[0]
        of_prompts = _int32("prompt_lengths", prompt_lengths, rows, self.device)
        self._update("fill", slots, "lengths", lengths, given, of_prompts)
        if not isinstance(slots, Tensor):
            for slot in slots:
                if 0 <= slot < self.capacity:
                    self._is_kept[slot] = True

    @alone
    def rollback(self, slots: Sequence[int] | Tensor, num_tokens: Sequence[int] | Tensor) -> None:
        """Take the last tokens of outputs away, as if they had never been recorded.

        One launch; the table's own positions fall by the numbers of tokens that are taken away.

        Args:
            slots: the slots, each at most once.
            num_tokens: how many; integers ``(rows,)``. No more than the output has are taken away.

        Raises:
            ValueError: the table does not keep ids in order, or an argument is not as above.
        """
        if self._history is not None and self._history.text is None:
            raise ValueError(
                "rollback needs the ids in order: make the RequestTable with max_length"
            )
        self._update("rollback", slots, "num_tokens", num_tokens, None)

    def _ids(self, name: str, ids: object) -> Tensor:
        tensor = readable(name, ids)
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 2:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be int32 or int64 (rows, length), got {got}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        return tensor if tensor.stride(1) == 1 else tensor.contiguous()

    def _update(
        self,
        kind: UpdateKind,
        slots: Sequence[int] | Tensor,
        name: str,
        numbers: Sequence[int] | Tensor,
        ids: Tensor | None,
        prompt_lengths: Tensor | None = None,
    ) -> None:
        if self._history is None:
            raise ValueError(f"{kind} needs histories: make the RequestTable with history=True")
        rows = len(slots) if ids is None else ids.shape[0]
        update = HistoryUpdate(
            kind,
            self._history,
            slots_tensor(slots, rows, self.device),
            _int32(name, numbers, rows, self.device),
            ids,
            prompt_lengths,
            self._position,
            "slot",
        )
        if self._sees_values():
            self._check_values(update, name)
        self._backend.update_history(update)

    def _check_values(self, update: HistoryUpdate, name: str) -> None:
        """A ValueError where slots are named twice, or a text has no room; on the CPU only."""
        slots, numbers = update.slots.numpy(), update.numbers.numpy()
        exist = (slots >= 0) & (slots < self.capacity)
        there = slots[exist]
        if len(np.unique(there)) != len(there):
            raise checks.refusal("slots", "named at most once", slots.tolist())
        if numbers.size and numbers.min() < 0:
            raise checks.refusal(name, "integers >= 0", numbers.tolist())
        if update.ids is None:
            return
        if numbers.size and numbers.max() > update.ids.shape[1]:
            raise checks.refusal(name, f"at most {update.ids.shape[1]}", numbers.tolist())
        text = update.history.text
        if text is None:
            return
        ids = update.ids.numpy()
        is_id = (np.arange(ids.shape[1]) < numbers[:, None]) & (ids >= 0) & (ids < self.vocab_size)
        length = is_id.sum(1)[exist]
        if update.kind == "append":
            length = length + text.lengths.numpy()[there]
        if length.size and length.max() > text.max_length:
            row = int(np.flatnonzero(exist)[length.argmax()])
            rule = f"at most max_length = {text.max_length} ids in a slot"
            raise ValueError(f"there must be {rule}, got {length.max()} in row {row}")

    def batch_of(
        self, slots: Tensor, position: Tensor | None, position_of: PositionOf
    ) -> tuple[BatchParams, ParamSlots]:
        """What a kernel reads for rows with these slots.

        While a CUDA graph is captured the flags are right for any requests that may come.

        Args:
            slots: int32 ``(rows,)``.
            position: int64 ``(rows,)``; None where ``position_of`` is "slot".
            position_of: see :class:`ParamSlots`.
        """
        if not self._numbers.is_sent:  # Ctrl-C came before it was
            self._numbers.send()
        batch, any_bias = self.batch, "bias" in self._switches
        if self._is_captured():
            has_history = self._history is not None
            flags = {**CONSERVATIVE_FLAGS, "needs_history": has_history}
            batch = replace(batch, **flags, **self._rules_if(has_history))
            any_bias |= self.max_logit_bias > 0
        if position is not None:
            batch = replace(batch, position=position)
        numbers = self._numbers.on_device
        lengths = numbers["prompt_length"] if position_of == "text" else None
        by_slot = ParamSlots(
            *(slots, numbers["bias_count"], position_of, lengths, any_bias),
            numbers["sequence_count"] if batch.has_rules else None,
            self._most_sequence_ids(),
        )
        return batch, by_slot

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The state between two steps, which :meth:`from_state_dict` makes a table of.

        It consists of tensors, numbers, strings, lists and dicts, so that ``torch.save`` and
        ``torch.load(weights_only=True)`` can store it. All are copies.
        """
        history = self._history
        lengths = self._numbers.on_host["prompt_length"]
        return {
            "capacity": self.capacity,
            "vocab_size": self.vocab_size,
            "max_logit_bias": self.max_logit_bias,
            "max_sequence_ids": self.max_sequence_ids,
            "params": [
                None if (row := self.params(slot)) is None else plain(row)
                for slot in range(self.capacity)
            ],
            "is_kept": [*self._is_kept],
            "prompt_lengths": lengths.tolist(),
            "position": self._position.clone(),
            "history": None if history is None else state_of(history),
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> RequestTable:
        """A table that goes on where the one whose ``state_dict`` this is stood.

        Its tokens are the same on every backend and device.

        Args:
            state: what :meth:`state_dict` has returned; it is not changed.
            backend: as for :class:`RequestTable`.
            device: the logits' device. Default: that of the state's tensors.

        Raises:
            ValueError, TypeError: an entry is missing or is not as :meth:`state_dict` makes it.
            RuntimeError: the named backend cannot run here.
        """
        checks.mapping_with("state", state, _STATE)
        capacity = checks.integer_at_least("capacity", state["capacity"], 1)
        for name in ("params", "is_kept", "prompt_lengths"):
            if len(state[name]) != capacity:
                raise checks.refusal(name, f"of {capacity} slots", state[name])
        with not_of_inference_mode():
            position = int64_column("position", state["position"], capacity, device)
            history: bool | TokenHistory = False
            if state["history"] is not None:
                history = history_from_state(state["history"], state["vocab_size"], position.device)
            table = cls(
                capacity,
                vocab_size=state["vocab_size"],
                history=history,
                max_logit_bias=state["max_logit_bias"],
                max_sequence_ids=state["max_sequence_ids"],
                backend=backend,
                device=position.device,
            )
        for slot, fields in enumerate(state["params"]):
            is_kept = checks.true_or_false("is_kept", state["is_kept"][slot])
            if fields is not None:
                params = SamplingParams(**fields)
                table._check_params(params)
                length = checks.integer_at_least("prompt_lengths", state["prompt_lengths"][slot], 0)
                table._write(slot, params, as_int64(params.seed or 0), length, is_kept)
        table._numbers.send()
        table._position.copy_(position)
        return table

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.state_dict(), self._backend_name)

    def run(
        self, backend: BackendModule, call: SampleCall, asked: tuple[object, ...] | None
    ) -> SampleOutput:
        """The result of a checked call of rows of this table.

        Args:
            backend: which one draws.
            call: the call.
            asked: what the user asked for, if other calls that ask for it may have the same step.
        """
        slots = call.param_slots
        assert slots is not None
        if asked is not None and call.batch is self.batch:  # it is not while a graph is captured
            step = self._step_of(asked)
            if step is None:
                run = backend.prepare(call.without_logits())
                step = _PreparedStep(asked, call.advance, run, Turn())
                self._steps[_MOST_STEPS - 1 :] = []
                self._steps.insert(0, step)
            output = self._run_step(step, call.logits, call.allowed_mask, slots.of_rows)
            if output is not None:
                return output
        return self._run_alone(backend, call) if call.advance else backend.sample(call)

    def _step_of(self, asked: tuple[object, ...]) -> _PreparedStep | None:
        """The step that was prepared for a call that was given these very objects."""
        for step in self._steps:
            if all(map(operator.is_, step.asked, asked)):
                return step
        return None

    @alone
    def _run_alone(self, backend: BackendModule, call: SampleCall) -> SampleOutput:
        return backend.sample(call)

    def _run_step(
        self, step: _PreparedStep, logits: Tensor, allowed_mask: Tensor | None, slots: Tensor
    ) -> SampleOutput | None:
        """The result of a step; None if it records nothing and another call is running it."""
        turn = self._turn if step.records else step.turn
        if turn.is_taken:
            return refuse_turn("RequestTable") if step.records else None
        turn.is_taken = True
        try:
            output = step.run(logits, allowed_mask, slots)
        finally:
            turn.is_taken = False
        return output

    def run_prepared(
        self, asked: tuple[object, ...], logits: Tensor, slots: object, allowed_mask: Mask | None
    ) -> SampleOutput | None:
        """The result of a call that is prepared; None if its arguments must be checked in full."""
        step = self._step_of(asked)
        if step is None or type(slots) is not Tensor or slots.dim() != 1:
            return None
        rows = slots.shape[0]
        if (
            not is_readable_as_it_is(logits, (rows, self.vocab_size), logits.dtype, self.device)
            or not is_readable_as_it_is(slots, (rows,), torch.int32, self.device)
            or is_watched()
            or self._is_captured()
        ):
            return None
        self.check_slots(slots)
        mask = None
        if allowed_mask is not None:
            mask = check_mask(allowed_mask, rows, self.vocab_size, self.device)
        return self._run_step(step, logits, mask, slots)

    def check_slots(self, slots: Tensor) -> None:
        """A ValueError if a row names a free slot; on the CPU only, elsewhere it would wait."""
        if not self._free or not self._sees_values():
            return
        named = slots.tolist()
        if not self._free.isdisjoint(named):
            row = next(row for row, slot in enumerate(named) if slot in self._free)
            raise ValueError(f"slots must name slots with a request, got {named[row]} in row {row}")

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is captured, which other requests will use too."""
        return self._device_type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _sees_values(self) -> bool:
        """Whether the values of tensors can be looked at without waiting, and nobody watches."""
        return self._device_type == "cpu" and not is_watched()


def flags_of(switches: Collection[str]) -> dict[str, Any]:
    """The flags that choose a kernel where these switches are on in any slot."""
    return kernel_flags({switch: switch in switches for switch in (*SWITCHES, "rules")})


def _fill_of(history: TokenHistory, row: Tensor, ids: Tensor, position: Tensor) -> HistoryUpdate:
    """The update that fills one slot; ``row`` has it, the number of ids and that of the prompt."""
    return HistoryUpdate("fill", history, row[:1], row[1:2], ids, row[2:], position, "slot")


class _FillOnCPU:
    """Fills slots with ids; its tensors are kept between calls.

    Attributes:
        update: what is called again and again.
        room: how many ids there may be.
    """

    def __init__(
        self, backend: BackendModule, history: TokenHistory, position: Tensor, room: int
    ) -> None:
        self._row = np.zeros(3, dtype=np.int32)
        self._ids = np.zeros(max(1, room), dtype=np.int64)
        self.room = len(self._ids)
        row, ids = torch.from_numpy(self._row), torch.from_numpy(self._ids)[None]
        self.update = _fill_of(history, row, ids, position)
        self._run = backend.prepare_update(self.update)

    def __call__(self, slot: int, ids: array[int], prompt_length: int) -> None:
        self._row[:] = slot, len(ids), prompt_length
        self._ids[: len(ids)] = ids
        self._run()


def _restored(kind: type[RequestTable], state: Mapping[str, Any], backend: str) -> RequestTable:
    return kind.from_state_dict(state, backend=backend)


def array_of(name: str, ids: Sequence[int] | Tensor | None) -> array[int]:
    """Ids as an array of int64, padding included; None as no ids."""
    if ids is None:
        return array("q")
    if type(ids) is list and (not ids or type(ids[0]) is int):
        try:
            return array("q", array("Q", ids).tobytes())  # takes half the time of array("q", ids)
        except (TypeError, OverflowError):
            pass  # numpy says what is wrong with them, or makes padding of what is negative
    return array("q", valid_ids(name, ids, 2**63 - 1).tobytes())


def slots_tensor(slots: object, rows: int, device: torch.device) -> Tensor:
    """``slots`` as a contiguous int32 ``(rows,)`` tensor on ``device``."""
    if not isinstance(slots, (Tensor, Sequence)):
        raise checks.refusal("slots", "given where params is a RequestTable: integers", slots)
    return _int32("slots", slots, rows, device)


def _int32(name: str, given: object, rows: int, device: torch.device) -> Tensor:
    """Integers as a contiguous int32 ``(rows,)`` tensor on ``device``.

    A number that no int32 holds becomes one at the end of its range, which names no slot either.
    """
    if isinstance(given, Tensor):
        tensor = readable(name, given)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device {device}, got {tensor.device}")
        if tensor.dtype == torch.int64:
            tensor = tensor.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    else:
        if not isinstance(given, Sequence):
            raise checks.refusal(name, "integers", given)
        values = [checks.integer(name, value, "integers") for value in given]
        limited = [min(max(value, -(2**31)), 2**31 - 1) for value in values]
        tensor = to_device(torch.tensor(limited, dtype=torch.int32, device="cpu"), device)
    if tensor.shape != (rows,):
        raise ValueError(
            f"{name} must have shape ({rows},), one for each row, got {tuple(tensor.shape)}"
        )
    return tensor.contiguous()


class _PreparedStep(NamedTuple):
    """A step that a backend has prepared.

    Attributes:
        asked: the logits' dtype, and what :func:`llm_sampling.sample` was called with.
        records: whether the step records its tokens, in the table's turn.
        run: the step, which one call at a time may run.
        turn: that of a call that records nothing.
    """

    asked: tuple[object, ...]
    records: bool
    run: Step
    turn: Turn


class _Mirrored:
    """Arrays that the host writes, and their copy at a fixed address on a device.

    On the CPU both are the same memory.

    Attributes:
        on_host: name -> the array.
        on_device: name -> the tensor.
        is_sent: whether the device has what the host wrote.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype], size: int, device: torch.device) -> None:
        # The largest elements come first, so that every array is aligned.
        names = sorted(dtypes, key=lambda name: -dtypes[name].itemsize)
        sizes = [dtypes[name].itemsize * size for name in names]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
        self._device = self._host
        if device.type != "cpu":
            self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)

        def parts(memory: Tensor) -> dict[str, Tensor]:
            each = zip(names, torch.split(memory, sizes), strict=True)
            return {name: part.view(dtypes[name]) for name, part in each}

        self.is_sent = True
        self.on_host = {name: part.numpy() for name, part in parts(self._host).items()}
        self.on_device = parts(self._device)

    @property
    def is_one(self) -> bool:
        """Whether both are the same memory."""
        return self._device is self._host

    def send(self, start: int = 0, stop: int | None = None) -> None:
        """Copy what the host has written to the device, without waiting.

        All arrays go in one copy; the elements from ``start`` up to ``stop - 1`` of each in a copy
        of their own.
        """
        if self.is_one:
            return
        if stop is None:
            self._device.copy_(to_device(self._host, self._device.device))
            self.is_sent = True
            return
        for name, column in self.on_host.items():
            written = torch.from_numpy(column[start:stop])
            self.on_device[name][start:stop] = to_device(written, self._device.device)
