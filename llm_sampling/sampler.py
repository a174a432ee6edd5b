"""The object of a decode loop: it keeps each row's parameters, seed, position and history."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.backends.base import SampleCall, Step
from llm_sampling.calls import (
    check_draws,
    check_history,
    check_history_of,
    check_logits,
)
from llm_sampling.growing_table import GrowingTable
from llm_sampling.history import (
    TokenHistory,
    Turn,
    alone,
    check_vocab_size,
    checked_row,
    history_from_state,
    refuse_turn,
    selection,
    state_of,
    valid_ids,
)
from llm_sampling.masks import Mask, check_mask
from llm_sampling.params import (
    BatchParams,
    SamplingParams,
    checked_position,
    int64_column,
    list_of_params,
    plain,
    seeds_of,
)
from llm_sampling.results import KeptForm, Logprobs, SampleOutput, wanted
from llm_sampling.step_masks import MaskCallback, StepMasks, check_callback
from llm_sampling.table import array_of
from llm_sampling.tensors import (
    is_readable_as_it_is,
    is_traced,
    is_watched,
    is_wrapper,
    not_of_inference_mode,
    to_device,
    version_of,
)

#: The entries of a ``state_dict``.
_STATE = frozenset(
    {"vocab_size", "num_samples", "results", "check", "params", "is_kept"}
    | {"seed", "position", "history"}
)


class _KnownSlots:
    """The rows' slots as a Sampler left them, to see whether somebody else changed them.

    Attributes:
        history: the history that has them too, if there is one.
        slots: int32 ``(rows,)``; the history's own tensor.
        version: how often torch had changed that tensor in place.
        values: a copy that nobody else has.
        fills: those of the history.
    """

    def __init__(self, history: TokenHistory | None, slots: Tensor) -> None:
        self.history, self.slots = history, slots
        self.version = version_of(slots)
        self.values = slots.clone()
        self.fills = {} if history is None else {**history.fills}


class Sampler:
    """Draws the next token of every row, step after step.

    Each call draws from new logits, records the tokens in the history and advances the positions of
    the rows that got one, all in the backend's one launch. Rows can be added, removed and reordered
    between steps; a row's tokens depend on nothing but its own logits, parameters, history, seed
    and position, so the others' streams go on undisturbed.

    One call at a time may change a Sampler, or the history that it shares: a call from another
    thread or a signal handler that comes in between raises a RuntimeError and changes nothing. A
    call that raises, or that Ctrl-C ends, has changed all of the state or nothing. A Sampler keeps
    state outside of a graph, so ``torch.compile`` runs its calls in eager mode, and tracers refuse
    them; :func:`llm_sampling.sample` with positions can be a part of a graph.

    A Sampler can be copied by ``copy.deepcopy`` and pickled between steps, and :meth:`state_dict`
    is its state in plain tensors and numbers; what is made of either goes on with the same tokens.

    Args:
        params: one per row. A row without a seed gets one from torch's default generator, here.
        vocab_size: the width of the logits, 1 .. 2^20.
        history: the tokens so far, one row per row of ``params``; the Sampler goes on using and
            updating this very object. Its tokens may also be appended elsewhere, but its rows are
            the Sampler's: add, remove and reorder them here. Default: empty, kept only while a row
            has a penalty or a rule that looks at the history, or where ``max_length`` is given.
        max_length: keep the ids of each row in order, so many of prompt and output together, in the
            history that is made here; :meth:`rollback` of rows with a penalty, ``penalty_last_n``
            and the rules that look at the ids in order need them.
        num_samples: draws per row; more than 1 only without penalties and rules that look at the
            history, since a history follows one token per row. Each call advances the positions by
            one.
        logprobs: as for :func:`llm_sampling.sample`, and so are ``top_logprobs``, ``kept`` and
            ``max_kept_ids``.
        logprob_token_ids: token ids whose logprobs every step returns for each row: a list, or a
            tensor ``(n,)``.
        backend: as for :func:`llm_sampling.sample`.
        device: the logits' device. Default: the history's, else the CPU.
        check: as for :func:`llm_sampling.sample`. When a call raises InvalidLogitsError no row has
            advanced.
        allowed_mask: a callback that says before each step which tokens may be drawn. It takes a
            :class:`MaskStep` and returns a mask for the rows that it names, or None. What it raises
            leaves the Sampler as it was. Each call then waits for the tokens of the one before.
            Where Ctrl-C ends a call while it draws, nobody knows its tokens, and the next call is a
            RuntimeError.

    Raises:
        ValueError: an argument is out of its range, or shapes disagree.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> sampler = Sampler([SamplingParams(top_k=50, seed=1)], vocab_size=32000)
        >>> tokens = sampler(torch.randn(1, 32000)).tokens
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        vocab_size: int,
        history: TokenHistory | None = None,
        max_length: int | None = None,
        num_samples: int = 1,
        logprobs: Logprobs | None = None,
        top_logprobs: int | None = None,
        logprob_token_ids: Sequence[int] | Tensor | None = None,
        kept: KeptForm | None = None,
        max_kept_ids: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        check: bool | None = None,
        allowed_mask: MaskCallback | None = None,
    ) -> None:
        vocab_size = check_vocab_size(vocab_size)
        if device is None:
            device = history.device if isinstance(history, TokenHistory) else "cpu"
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self.vocab_size = vocab_size
        self.num_samples = check_draws(num_samples, check)
        self._results: dict[str, Any] = {
            "logprobs": logprobs,
            "top_logprobs": top_logprobs,
            "logprob_token_ids": _list_for_all_rows(logprob_token_ids),
            "kept": kept,
            "max_kept_ids": max_kept_ids,
        }
        wanted(0, self.device, **self._results)
        self.check = self.device.type == "cpu" if check is None else check
        self._backend_name = backend
        rows = list_of_params(params, 1)
        batch = BatchParams.from_list(rows, device=self.device)
        if history is None and (batch.needs_history or max_length is not None):
            history = TokenHistory.empty(
                len(rows),
                vocab_size,
                max_length=max_length,
                penalty_last_n=_windows_of(rows, max_length is not None),
                device=self.device,
            )
        elif max_length is not None:
            raise ValueError(f"max_length must be None where history is given, got {max_length}")
        check_history_of(batch, history, vocab_size, self.device)
        if history is not None and history.is_view:
            raise ValueError("history must be one that can be changed, got a read-only view")
        self._refuse_draws(batch.needs_history)
        self._masks = self._masks_of(allowed_mask, len(rows))
        slots = list(range(len(rows))) if history is None else history.slots.tolist()
        table = GrowingTable(
            vocab_size=vocab_size, history=history, backend=backend, device=self.device
        )
        position = None if history is None else history.lengths[slots]
        is_kept = [history is not None] * len(rows)
        table.put_rows(slots, rows, seeds_of(rows), is_kept, position)
        self._table = table
        #: The slot of each row.
        self._places = slots
        self._turn = Turn()
        self._turns = (self._turn, self._turn if history is None else history.turns[0])
        with not_of_inference_mode():
            of_rows = self._slots_of(slots) if history is None else history.slots
            self._slots = _KnownSlots(history, of_rows)
        self._step: Step | None = None
        self._step_batch: BatchParams | None = None
        #: The slots of the rows, if they have changed since the last step.
        self._new_slots: Tensor | None = None
        self._shape = len(rows), vocab_size
        self._dtype = torch.float32

    def _refuse_draws(self, needs_history: bool) -> None:
        if needs_history and self.num_samples > 1:
            raise ValueError(
                "num_samples must be 1 where a penalty or a rule is on that looks at the history, "
                f"which follows one token per row, got {self.num_samples}"
            )

    def _masks_of(self, callback: MaskCallback | None, rows: int) -> StepMasks | None:
        check_callback(callback)
        if callback is None:
            return None
        if self.num_samples > 1:
            raise ValueError(
                "num_samples must be 1 where allowed_mask is a callback, which follows one token "
                f"per row, got {self.num_samples}"
            )
        return StepMasks(callback, rows, self.vocab_size, self.device)

    @property
    def turns(self) -> tuple[Turn, Turn]:
        """The turns that a call takes: this Sampler's, and that of the history that it shares."""
        return self._turns

    @property
    def rows(self) -> int:
        """The number of rows that the next call expects."""
        return len(self._places)

    @property
    def params(self) -> tuple[SamplingParams, ...]:
        """The parameters of the rows, in order."""
        return tuple(map(self._table.request, self._places))

    @property
    def history(self) -> TokenHistory | None:
        """The tokens so far; None while no row has had a penalty and none was given."""
        return self._slots.history

    @property
    def positions(self) -> Tensor:
        """int64 ``(rows,)``, a copy: how many tokens each row has produced."""
        return self._table.positions_of_slots[self._slots.values.to(torch.int64)]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the rows, in [0, 2^64), with those that rows without a seed have got."""
        return tuple(self._table.seed(slot) % 2**64 for slot in self._places)

    @property
    def allowed_mask(self) -> MaskCallback | None:
        """The callback that is asked before each step, or None."""
        return None if self._masks is None else self._masks.callback

    @property
    def row_ids(self) -> tuple[int, ...]:
        """The ids by which the mask callback knows the rows.

        Raises:
            ValueError: the Sampler has no callback.
        """
        return tuple(row.id for row in self._with_callback("row_ids").rows)

    @property
    def forced(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that the mask callback has forced and that each row has still to get.

        Without :meth:`extend` they come one in each call. Waits for the device.

        Raises:
            ValueError: the Sampler has no callback.
        """
        return tuple(self._with_callback("forced").forced)

    def _with_callback(self, name: str) -> StepMasks:
        if self._masks is None:
            raise ValueError(f"{name} needs a Sampler with a callback, allowed_mask")
        return self._masks

    def __call__(self, logits: Tensor, *, allowed_mask: Mask | None = None) -> SampleOutput:
        """Draw one token (or ``num_samples``) per row and advance.

        Args:
            logits: ``(rows, vocab_size)`` on the Sampler's device, as for
                :func:`llm_sampling.sample`.
            allowed_mask: this step's mask, as for :func:`llm_sampling.sample`. Beside a callback, a
                token must be allowed by both.

        Raises:
            ValueError: another shape, dtype or device, or a tensor that is traced or wrapped; or
                the history's rows were changed by somebody else.
            InvalidLogitsError: ``check`` found bad rows; nothing has advanced.
            RuntimeError: another call is changing the Sampler or its history.
        """
        if torch.compiler.is_compiling():
            return self._call_in_eager_mode(logits, allowed_mask)
        own, shared = self._turns
        if own.is_taken or shared.is_taken:
            refuse_turn("Sampler")
        own.is_taken = shared.is_taken = True
        try:
            known = self._slots
            history = known.history
            if history is not None:
                slots = history.slots
                if slots is not known.slots or (
                    known.version is not None and slots._version != known.version
                ):
                    self._check_history()
            if (
                self._step is None
                or self._step_batch is not self._table.batch
                or not is_readable_as_it_is(logits, self._shape, self._dtype, self.device)
                or is_watched()
            ):
                logits = self._check(logits)
                self._prepare(logits)
            mask = None
            if allowed_mask is not None:
                mask = check_mask(allowed_mask, self.rows, self.vocab_size, self.device)
            output = self._step(logits, mask, self._new_slots)  # type: ignore[misc]
            self._new_slots = None
        finally:
            own.is_taken = shared.is_taken = False
        return output

    # torch.compiler.disable would import the compiler, which few need
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _call_in_eager_mode(self, logits: Tensor, allowed_mask: Mask | None) -> SampleOutput:
        return self(logits, allowed_mask=allowed_mask)

    def _check(self, logits: Tensor) -> Tensor:
        logits = check_logits(logits)
        if logits.device != self.device:
            raise ValueError(f"logits must be on {self.device}, got {logits.device}")
        if is_traced() or is_wrapper(logits):
            raise ValueError(
                "logits must be a plain tensor outside of tracers, modes and transforms, since a "
                f"Sampler keeps state outside of a graph, got {type(logits).__name__}; sample() "
                "with positions can be a part of a graph"
            )
        if logits.shape != self._shape:
            raise ValueError(
                f"logits must have shape (rows, vocab_size) = {self._shape}, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def _check_history(self) -> None:
        """A ValueError if the history has other rows than the Sampler, or in another order."""
        known = self._slots
        history = known.history
        if history is None:
            return
        check_history(history, False, *self._shape, self.device)
        if not torch.equal(history.slots, known.values):
            raise ValueError(
                "history must have the Sampler's rows in their order, but its slots were changed "
                f"from {known.values.tolist()} to {history.slots.tolist()}: add, remove and "
                "reorder rows by the Sampler's methods"
            )
        if history.fills != known.fills:
            for row, slot in enumerate(history.slots.tolist()):
                if history.fills.get(slot) != known.fills.get(slot):
                    raise ValueError(
                        f"history must have the Sampler's rows, but its row {row} is another "
                        "request that was added in the same slot: add, remove and reorder rows by "
                        "the Sampler's methods"
                    )
        self._slots = _KnownSlots(history, history.slots)

    def _prepare(self, logits: Tensor) -> None:
        """Prepare the next steps, unless they are as those before."""
        is_prepared = self._step is not None and self._step_batch is self._table.batch
        if is_prepared and logits.dtype == self._dtype:
            return
        history = self._slots.history
        batch, param_slots = self._table.batch_of(self._slots.values, None, "slot")
        call = SampleCall(
            logits=logits,
            batch=batch,
            history=history if self.num_samples == 1 else None,
            allowed_mask=None,
            num_samples=self.num_samples,
            wanted=wanted(logits.shape[0], self.device, **self._results),
            check=self.check,
            advance=True,
            param_slots=param_slots,
        )
        step = self._table.module.prepare(call.without_logits())
        self._step = step if self._masks is None else self._masks.around(step)
        self._step_batch, self._dtype = batch, logits.dtype
        self._new_slots = None

    @alone
    def add(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | Tensor = (),
        output_ids: Sequence[int] | Tensor = (),
    ) -> int:
        """Add a request as the last row.

        Args:
            params: the request's parameters.
            prompt_ids: its prompt, which matters where a penalty is on.
            output_ids: the tokens that it has produced so far; their number is its position.

        Returns:
            The new row's index.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {params!r}")
        with not_of_inference_mode():
            self._refuse_draws(params.needs_history)
            prompt = array_of("prompt_ids", prompt_ids)
            output = array_of("output_ids", output_ids)
            self._check_history()
            history = self._slots.history
            _refuse_order(params, history)
            if history is None and params.needs_history:
                # for the rows so far what they have produced does not matter
                history = TokenHistory.empty(
                    self._table.capacity, self.vocab_size, device=self.device
                )
            window = -1
            if history is not None:
                self._table.check_room(history, prompt + output)
                window = _window_of(params, history.text is not None)
            masks = None
            if self._masks is not None:
                ids = valid_ids("output_ids", output, self.vocab_size)
                masks = self._masks.with_row(ids.tolist())
            slot = self._table.free_slot(history, self._places)
            self._table.put(slot, params, prompt, output, history, window)
            self._arrange([*self._places, slot], history, masks)
        return self.rows - 1

    @alone
    def remove(self, rows: Sequence[int]) -> None:
        """Remove rows; the others move up and keep their order.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        gone = set(selection(rows, self.rows).tolist())
        self._reorder([row for row in range(self.rows) if row not in gone])

    @alone
    def reorder(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        rows = list(rows)
        selection(rows, self.rows)
        self._reorder(rows)

    def _reorder(self, rows: list[int]) -> None:
        with not_of_inference_mode():
            self._check_history()
            places = [self._places[row] for row in rows]
            gone = set(self._places).difference(places)
            masks = None if self._masks is None else self._masks.selected(rows)
            self._arrange(places, self._slots.history, masks)
            self._table.leave(gone)

    def _slots_of(self, places: list[int]) -> Tensor:
        if not places:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        return to_device(torch.frombuffer(array("i", places), dtype=torch.int32), self.device)

    def _arrange(
        self,
        places: list[int],
        history: TokenHistory | None,
        masks: tuple[list[Any], int] | None,
    ) -> None:
        """Let the rows have these slots and this history, and the StepMasks these rows and next id.

        Everything that can fail comes first. Python handles Ctrl-C after a call, so nothing is
        called between the assignments: rows and history change together or not at all.
        """
        slots = self._slots_of(places)
        known = _KnownSlots(history, slots)
        turns = (self._turn, self._turn if history is None else history.turns[0])
        shape = len(places), self.vocab_size
        step = self._step if history is self._slots.history else None
        attributes = {} if history is None else vars(history)  # history.slots cannot be assigned
        of_table = vars(self._table)
        of_masks = {} if self._masks is None else vars(self._masks)
        of_callback, next_id = ([], 0) if masks is None else masks
        attributes["slots"] = slots
        of_table["_history"] = history
        of_masks["rows"], of_masks["next_id"] = of_callback, next_id
        self._places, self._slots, self._turns = places, known, turns
        self._new_slots, self._shape, self._step = known.values, shape, step

    @alone
    def set_params(self, row: int, params: SamplingParams) -> None:
        """Replace a row's parameters, from the next step on; position and history stay.

        With a history that keeps ids in order this waits for the device.

        Args:
            row: the row.
            params: its new parameters. Without a seed the row keeps the seed that it has.

        Raises:
            ValueError: there is no such row; or ``params`` turn a penalty or a rule on, and the
                tokens of the row so far were not kept, because no row had either when they came; or
                they look at the ids in order, which are not kept (``max_length``).
        """
        row = checked_row(row, self.rows)
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {params!r}")
        self._refuse_draws(params.needs_history)
        slot = self._places[row]
        if params.needs_history and not self._table.is_kept(slot):
            raise ValueError(
                "params must have no penalty, and no rule that needs it, where the row's history "
                f"was not kept (row {row}): give the Sampler a history at its start, or remove the "
                "row and add it again with its prompt_ids and output_ids"
            )
        with not_of_inference_mode():
            self._check_history()
            history, moved = self._slots.history, None
            _refuse_order(params, history)
            if history is not None:
                moved = history.with_window(row, _window_of(params, history.text is not None))
            self._table.replace_params(slot, params, moved)

    @alone
    def set_position(self, row: int, position: int) -> None:
        """Set how many tokens a row has produced, which chooses its next random numbers.

        Args:
            row: the row.
            position: an integer in [-2^63, 2^64), taken modulo 2^64. The history stays as it is.

        Raises:
            ValueError: there is no such row, or the position is out of its range.
        """
        slot = self._places[checked_row(row, self.rows)]
        self._table.positions_of_slots[slot] = checked_position("position", position)

    @alone
    def extend(self, row: int, tokens: Sequence[int] | Tensor) -> None:
        """Record tokens that a row has got without a draw: they come next in its output.

        A grammar that jumps forward and a forced end of thinking give such tokens. The row's
        position grows by their number, as if they had been drawn, so that its later draws are those
        of a request that is added with the same output.

        Args:
            row: the row.
            tokens: ids in order; those outside the vocabulary are padding and are left out.

        Raises:
            ValueError: there is no such row, or an id is not an integer.
        """
        self._check_history()
        position, history = self._table.positions_of_slots, self._slots.history
        told: list[Any] = []
        if self._masks is not None:
            ids = valid_ids("tokens", tokens, self.vocab_size).tolist()
            place = checked_row(row, self.rows)
            told = self._masks.changed({place}, lambda known: known.got(tuple(ids)))
        if history is None or self.num_samples > 1:
            slot = self._places[checked_row(row, self.rows)]
            position[slot] += len(valid_ids("tokens", tokens, self.vocab_size))
        else:
            self._table.module.update_history(history.extension(row, tokens, position))
        if self._masks is not None:
            self._masks.rows = told

    @alone
    def rollback(self, row: int, num_tokens: int) -> None:
        """Take the last tokens of a row's output away, as if they had never been drawn.

        The row's position falls by their number, so that the next draws are those that followed the
        first time. Waits for the device.

        Args:
            row: the row.
            num_tokens: how many, an integer >= 0, at most as many as the row has produced.

        Raises:
            ValueError: there is no such row, it has produced fewer tokens, or the Sampler has a
                history that does not keep ids in order (``max_length``).
        """
        self._check_history()
        position, history = self._table.positions_of_slots, self._slots.history
        told: list[Any] = []
        if self._masks is not None:
            number = checks.integer_at_least("num_tokens", num_tokens, 0)
            place = checked_row(row, self.rows)
            told = self._masks.changed({place}, lambda known: known.lost(number))
        if history is None or self.num_samples > 1:
            slot = self._places[checked_row(row, self.rows)]
            number = checks.integer_at_least("num_tokens", num_tokens, 0)
            produced = int(position[slot]) % 2**64
            if number > produced:
                raise checks.refusal("num_tokens", f"at most {produced}, the position", num_tokens)
            position[slot] -= number
        else:
            self._table.module.update_history(history.reduction(row, num_tokens, position))
        if self._masks is not None:
            self._masks.rows = told

    @alone
    def set_allowed_mask(self, callback: MaskCallback | None) -> None:
        """Replace the mask callback from the next step on; None for none.

        The rows are new to it, are numbered from 0, and what they have got so far it is not told.

        Raises:
            ValueError: ``callback`` is not callable, or ``num_samples`` is not 1.
        """
        self._masks, self._step = self._masks_of(callback, self.rows), None

    @alone
    def end(self, rows: Sequence[int]) -> None:
        """Do not ask the mask callback for rows any more: they have ended, and stay in the batch.

        They go on drawing, from all tokens, until they are removed. Rows that have ended before may
        be among them. Waits for the device.

        Raises:
            ValueError: a row does not exist or is named twice, or the Sampler has no callback.
        """
        masks = self._with_callback("end")
        places = set(selection(rows, self.rows).tolist())
        masks.rows = masks.changed(places, lambda known: known.ended())

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The state between two steps, which :meth:`from_state_dict` makes a Sampler of.

        It consists of tensors, numbers, strings, lists and dicts, so that ``torch.save`` and
        ``torch.load(weights_only=True)`` can store it. All are copies: later steps do not change
        them. A history has ``4 * vocab_size`` bytes for each of its slots. What a mask callback has
        not been told yet is in it, and not the callback's own state.
        """
        self._check_history()
        history, table, places = self._slots.history, self._table, self._places
        return {
            "vocab_size": self.vocab_size,
            "num_samples": self.num_samples,
            "results": dict(self._results),
            "check": self.check,
            "params": [*map(plain, self.params)],
            "is_kept": [*map(table.is_kept, places)],
            "seed": torch.tensor([*map(table.seed, places)], dtype=torch.int64, device=self.device),
            "position": self.positions,
            "history": None if history is None else state_of(history),
            "masks": None if self._masks is None else self._masks.state(),
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        allowed_mask: MaskCallback | None = None,
    ) -> Sampler:
        """A Sampler that goes on where the one whose ``state_dict`` this is stood.

        Its tokens are the same on every backend and device. It has a history of its own.

        Args:
            state: what :meth:`state_dict` has returned; it is not changed.
            backend: as for :class:`Sampler`.
            device: the logits' device. Default: that of the state's tensors.
            allowed_mask: as for :class:`Sampler`. Where the Sampler had a callback, this one must
                know all that that one was told.

        Raises:
            ValueError, TypeError: an entry is missing or is not as :meth:`state_dict` makes it; or
                the Sampler had a callback, and none is given.
            RuntimeError: the named backend cannot run here.
        """
        checks.mapping_with("state", state, _STATE)
        vocab_size, history = state["vocab_size"], None
        params = [SamplingParams(**fields) for fields in state["params"]]
        is_kept = [checks.true_or_false("is_kept", kept) for kept in state["is_kept"]]
        if len(is_kept) != len(params):
            raise checks.refusal("is_kept", f"of {len(params)} rows", is_kept)
        with not_of_inference_mode():
            seed = int64_column("seed", state["seed"], len(params), device)
            position = int64_column("position", state["position"], len(params), device)
            if state["history"] is not None:
                history = history_from_state(state["history"], vocab_size, seed.device)
            sampler = cls(
                [replace(row, seed=row.seed or 0) for row in params],  # draws no seed
                vocab_size=vocab_size,
                history=history,
                num_samples=state["num_samples"],
                **checks.mapping_with("results", state["results"], ()),
                backend=backend,
                device=seed.device,
                check=state["check"],
                allowed_mask=allowed_mask,
            )
        if state.get("masks") is not None:
            sampler._with_callback("a state with masks").restore(state["masks"])
        sampler._table.put_rows(sampler._places, params, seed.tolist(), is_kept, position)
        return sampler

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.state_dict(), self._backend_name, self.allowed_mask)


def _list_for_all_rows(ids: object) -> list[int] | None:
    """``logprob_token_ids`` of a Sampler, whose rows come and go."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return None if ids is None else checks.token_ids("logprob_token_ids", ids)


def _refuse_order(params: SamplingParams, history: TokenHistory | None) -> None:
    """A ValueError if the parameters need the ids in order, which the history does not keep."""
    if params.needs_text and (history is None or history.text is None):
        raise ValueError(
            "params must have no penalty_last_n, dry_multiplier, no_repeat_ngram_size or bad_words "
            "where the ids are not kept in order: give the Sampler a max_length, or a history that "
            f"has one, got {params}"
        )


def _window_of(params: SamplingParams, keeps_ids: bool) -> int:
    """The window of a row's history; that of a row without a penalty matters once it has one."""
    return params.penalty_last_n if keeps_ids or params.needs_history else -1


def _windows_of(rows: Sequence[SamplingParams], keeps_ids: bool) -> list[int] | None:
    """``penalty_last_n`` of a new history's rows; None if no row has a window."""
    windows = [_window_of(row, keeps_ids) for row in rows]
    return windows if any(window >= 0 for window in windows) else None


def _restored(
    kind: type[Sampler], state: Mapping[str, Any], backend: str, callback: MaskCallback | None
) -> Sampler:
    return kind.from_state_dict(state, backend=backend, allowed_mask=callback)
