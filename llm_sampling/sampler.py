"""The object of a decode loop: it keeps each row's parameters, seed, position and history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends, checks
from llm_sampling.backends.base import Logprobs, SampleCall, SampleOutput
from llm_sampling.calls import check_draws, check_history, check_logits, check_windows
from llm_sampling.history import (
    Moved,
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
    as_int64,
    checked_position,
    int64_column,
    list_of_params,
    plain,
)
from llm_sampling.tensors import (
    has_memory,
    is_traced,
    is_watched,
    is_wrapper,
    not_of_inference_mode,
    version_of,
)

Step = Callable[[Tensor, Tensor | None], SampleOutput]

#: The entries of a ``state_dict``.
_STATE = frozenset(
    {"vocab_size", "num_samples", "logprobs", "check", "params", "is_kept"}
    | {"seed", "position", "history"}
)


class _KnownSlots:
    """The slots of a history as a Sampler left them, to see whether somebody else changed them."""

    def __init__(self, history: TokenHistory, slots: Tensor) -> None:
        self.slots = slots
        self.version = version_of(slots)
        self.values = slots.clone()
        self.fills = dict(history.fills)


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
            has a penalty, or where ``max_length`` is given.
        max_length: keep the ids of each row in order, so many of prompt and output together, in the
            history that is made here; :meth:`rollback` of rows with a penalty, and
            ``penalty_last_n``, need them.
        num_samples: draws per row; more than 1 only without penalties, since a history follows one
            token per row. Each call advances the positions by one.
        logprobs: None, "processed" or "raw", as for :func:`llm_sampling.sample`.
        backend: as for :func:`llm_sampling.sample`.
        device: the logits' device. Default: the history's, else the CPU.
        check: as for :func:`llm_sampling.sample`. When a call raises InvalidLogitsError no row has
            advanced.

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
        backend: str = "auto",
        device: torch.device | str | None = None,
        check: bool | None = None,
    ) -> None:
        vocab_size = check_vocab_size(vocab_size)
        if device is None:
            device = history.device if isinstance(history, TokenHistory) else "cpu"
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self.vocab_size = vocab_size
        self.num_samples = check_draws(num_samples, logprobs, check)
        self.logprobs = logprobs
        self.check = self.device.type == "cpu" if check is None else check
        self._backend_name = backend
        rows = list_of_params(params, 1)
        self._params = rows
        self._backend = backends.resolve(backend, self.device)
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
        check_history(history, batch, len(rows), vocab_size, self.device)
        check_windows(history, batch)
        if history is not None and history.is_view:
            raise ValueError("history must be one that can be changed, got a read-only view")
        self._refuse_draws(batch.needs_history)
        with not_of_inference_mode():
            if history is None:
                position = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
            else:
                position = history.lengths[history.slots.to(torch.int64)]
            self._batch = replace(batch.seeded(), position=position)
        self._turn = Turn()
        self._history = history
        self._is_kept = [history is not None] * len(rows)
        self._turns = (self._turn, self._turn if history is None else history.turns[0])
        self._slots = None if history is None else _KnownSlots(history, history.slots)
        self._step: Step | None = None
        self._prepared_for: tuple[object, ...] = ()
        self._least_bytes = 0

    def _refuse_draws(self, needs_history: bool) -> None:
        if needs_history and self.num_samples > 1:
            raise ValueError(
                "num_samples must be 1 where a penalty is on, since a history follows one token "
                f"per row, got {self.num_samples}"
            )

    @property
    def turns(self) -> tuple[Turn, Turn]:
        """The turns that a call takes: this Sampler's, and that of the history that it shares."""
        return self._turns

    @property
    def rows(self) -> int:
        """The number of rows that the next call expects."""
        return len(self._params)

    @property
    def params(self) -> tuple[SamplingParams, ...]:
        """The parameters of the rows, in order."""
        return tuple(self._params)

    @property
    def history(self) -> TokenHistory | None:
        """The tokens so far; None while no row has had a penalty and none was given."""
        return self._history

    @property
    def positions(self) -> Tensor:
        """int64 ``(rows,)``, a copy: how many tokens each row has produced."""
        return self._position.clone()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the rows, in [0, 2^64), with those that rows without a seed have got.

        Reading them waits for the device.
        """
        return tuple(seed % 2**64 for seed in self._batch.seed.tolist())

    @property
    def _position(self) -> Tensor:
        assert self._batch.position is not None
        return self._batch.position

    def __call__(self, logits: Tensor, *, allowed_mask: Mask | None = None) -> SampleOutput:
        """Draw one token (or ``num_samples``) per row and advance.

        Args:
            logits: ``(rows, vocab_size)`` on the Sampler's device, as for
                :func:`llm_sampling.sample`.
            allowed_mask: this step's mask, as for :func:`llm_sampling.sample`.

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
            if not self._is_prepared_for(logits):
                logits = self._check(logits)
                if self._step is None:
                    self._prepare(logits)
            if self._slots is not None:
                slots, known = self._history.slots, self._slots  # type: ignore[union-attr]
                if slots is not known.slots or (
                    known.version is not None and slots._version != known.version
                ):
                    self._check_history()
            mask = None
            if allowed_mask is not None:
                mask = check_mask(allowed_mask, self.rows, self.vocab_size, self.device)
            output = self._step(logits, mask)  # type: ignore[misc]
        finally:
            own.is_taken = shared.is_taken = False
        return output

    def _is_prepared_for(self, logits: Tensor) -> bool:
        """Whether the last step's logits were like these, which the kernel can read as they are.

        These are the questions of :meth:`_check`, in the order that costs the least.
        """
        try:
            return (
                self._step is not None
                and type(logits) is Tensor
                and self._prepared_for == (logits.shape, logits.dtype, logits.device)
                and (
                    (
                        logits.is_contiguous()
                        and not logits.storage_offset()
                        and logits.untyped_storage().nbytes() >= self._least_bytes
                    )
                    or (logits.stride(1) == 1 and has_memory(logits))
                )
                and not logits.requires_grad
                and not logits.is_neg()
                and not logits._is_zerotensor()
                and not is_watched()
            )
        except RuntimeError:  # a layout that has no sizes, strides or storage
            return False

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
        shape = (self.rows, self.vocab_size)
        if logits.shape != shape:
            raise ValueError(
                f"logits must have shape (rows, vocab_size) = {shape}, got {tuple(logits.shape)}"
            )
        if self._prepared_for != (logits.shape, logits.dtype, logits.device):
            self._step = None
        return logits

    def _check_history(self) -> None:
        """A ValueError if the history has other rows than the Sampler, or in another order."""
        history, known = self._history, self._slots
        if history is None or known is None:
            return
        check_history(history, self._batch, self.rows, self.vocab_size, self.device)
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
        call = SampleCall(
            logits=logits,
            batch=self._batch,
            history=self._history if self.num_samples == 1 else None,
            allowed_mask=None,
            num_samples=self.num_samples,
            logprobs=self.logprobs,
            check=self.check,
            advance=True,
        )
        self._step = self._backend.prepare(call)
        self._prepared_for = (logits.shape, logits.dtype, logits.device)
        self._least_bytes = logits.numel() * logits.itemsize

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
            valid_ids("prompt_ids", prompt_ids, self.vocab_size)
            position = len(valid_ids("output_ids", output_ids, self.vocab_size))
            self._check_history()
            history = self._history
            if history is None and params.needs_history:
                # the rows so far have no penalty, so what they have produced does not matter
                history = TokenHistory.empty(self.rows, self.vocab_size, device=self.device)
            slots = None
            if history is not None:
                window = _window_of(params, history.text is not None)
                change = self._backend.update_history
                slots = history._slots_with(prompt_ids, output_ids, window, change)
            new = BatchParams.from_list([params], positions=[position], device=self.device).seeded()
            assert new.position is not None
            self._rebuild(
                [*self._params, params],
                [*self._is_kept, history is not None],
                torch.cat([self._batch.seed, new.seed]),
                torch.cat([self._position, new.position]),
                history,
                slots,
            )
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
        self._reorder(list(rows))

    def _reorder(self, rows: list[int]) -> None:
        with not_of_inference_mode():
            index = selection(rows, self.rows).to(self.device)
            self._check_history()
            self._rebuild(
                [self._params[row] for row in rows],
                [self._is_kept[row] for row in rows],
                self._batch.seed[index],
                self._position[index],
                self._history,
                None if self._history is None else self._history.slots[index],
            )

    def _rebuild(
        self,
        params: list[SamplingParams],
        is_kept: list[bool],
        seed: Tensor,
        position: Tensor,
        history: TokenHistory | None,
        slots: Tensor | None,
        moved: Moved | None = None,
    ) -> None:
        """Pack the rows anew; seeds and positions are carried over, not drawn or counted again.

        Everything that can fail comes first. Python handles Ctrl-C after a call, so nothing is
        called between the assignments: rows and history change together or not at all.
        """
        batch = BatchParams.from_list(params, device=self.device)
        batch = replace(batch, seed=seed, position=position, unseeded=None)
        known = None if history is None or slots is None else _KnownSlots(history, slots)
        turns = (self._turn, self._turn if history is None else history.turns[0])
        attributes = {} if history is None else vars(history)  # history.slots cannot be assigned
        windows = None if history is None or history.text is None else history.text.windows
        if moved is not None and history is not None and windows is not None:
            slot, seen, counts = moved.slot, history.seen, history.counts
            windows[slot] = moved.window
            seen[slot] = moved.seen
            counts[slot] = moved.counts
        attributes["slots"] = slots
        self._history, self._turns, self._slots = history, turns, known
        self._params, self._is_kept, self._batch, self._step = params, is_kept, batch, None

    @alone
    def set_params(self, row: int, params: SamplingParams) -> None:
        """Replace a row's parameters, from the next step on; position and history stay.

        With a history that keeps ids in order this waits for the device.

        Args:
            row: the row.
            params: its new parameters. Without a seed the row keeps the seed that it has.

        Raises:
            ValueError: there is no such row; or ``params`` turn a penalty on, and the tokens of the
                row so far were not kept, because no row had a penalty when they came; or they have
                ``penalty_last_n``, and the ids are not kept in order (``max_length``).
        """
        row = checked_row(row, self.rows)
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {params!r}")
        self._refuse_draws(params.needs_history)
        if params.needs_history and not self._is_kept[row]:
            raise ValueError(
                f"params must have no penalty where the row's history was not kept (row {row}): "
                "give the Sampler a history at its start, or remove the row and add it again with "
                "its prompt_ids and output_ids"
            )
        with not_of_inference_mode():
            self._check_history()
            seed = self._batch.seed.clone()
            if params.seed is not None:
                seed[row] = as_int64(params.seed)
            rows = [*self._params]
            rows[row] = params
            history, moved = self._history, None
            if history is not None:
                moved = history.with_window(row, _window_of(params, history.text is not None))
            self._rebuild(
                rows,
                self._is_kept,
                seed,
                self._position,
                history,
                None if history is None else history.slots,
                moved,
            )

    @alone
    def set_position(self, row: int, position: int) -> None:
        """Set how many tokens a row has produced, which chooses its next random numbers.

        Args:
            row: the row.
            position: an integer in [-2^63, 2^64), taken modulo 2^64. The history stays as it is.

        Raises:
            ValueError: there is no such row, or the position is out of its range.
        """
        self._position[checked_row(row, self.rows)] = checked_position("position", position)

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
        if self._history is None or self.num_samples > 1:
            row = checked_row(row, self.rows)
            self._position[row] += len(valid_ids("tokens", tokens, self.vocab_size))
        else:
            self._backend.update_history(self._history.extension(row, tokens, self._position))

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
        if self._history is None or self.num_samples > 1:
            row = checked_row(row, self.rows)
            number = checks.integer_at_least("num_tokens", num_tokens, 0)
            position = int(self._position[row]) % 2**64
            if number > position:
                raise checks.refusal("num_tokens", f"at most {position}, the position", num_tokens)
            self._position[row] -= number
        else:
            self._backend.update_history(self._history.reduction(row, num_tokens, self._position))

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The state between two steps, which :meth:`from_state_dict` makes a Sampler of.

        It consists of tensors, numbers, strings, lists and dicts, so that ``torch.save`` and
        ``torch.load(weights_only=True)`` can store it. All are copies: later steps do not change
        them. A history has ``4 * vocab_size`` bytes for each of its slots.
        """
        self._check_history()
        history = self._history
        return {
            "vocab_size": self.vocab_size,
            "num_samples": self.num_samples,
            "logprobs": self.logprobs,
            "check": self.check,
            "params": [plain(params) for params in self._params],
            "is_kept": [*self._is_kept],
            "seed": self._batch.seed.clone(),
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
    ) -> Sampler:
        """A Sampler that goes on where the one whose ``state_dict`` this is stood.

        Its tokens are the same on every backend and device. It has a history of its own.

        Args:
            state: what :meth:`state_dict` has returned; it is not changed.
            backend: as for :class:`Sampler`.
            device: the logits' device. Default: that of the state's tensors.

        Raises:
            ValueError, TypeError: an entry is missing or is not as :meth:`state_dict` makes it.
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
                logprobs=state["logprobs"],
                backend=backend,
                device=seed.device,
                check=state["check"],
            )
        sampler._params, sampler._is_kept = params, is_kept
        sampler._batch = replace(sampler._batch, seed=seed, position=position)
        return sampler

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.state_dict(), self._backend_name)


def _window_of(params: SamplingParams, keeps_ids: bool) -> int:
    """The window of a row's history; that of a row without a penalty matters once it has one."""
    return params.penalty_last_n if keeps_ids or params.needs_history else -1


def _windows_of(rows: Sequence[SamplingParams], keeps_ids: bool) -> list[int] | None:
    """``penalty_last_n`` of a new history's rows; None if no row has a window."""
    windows = [_window_of(row, keeps_ids) for row in rows]
    return windows if any(window >= 0 for window in windows) else None


def _restored(kind: type[Sampler], state: Mapping[str, Any], backend: str) -> Sampler:
    return kind.from_state_dict(state, backend=backend)
