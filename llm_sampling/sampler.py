"""The object of a decode loop: it keeps each row's parameters, seed, position and history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends.base import Logprobs, SampleCall, SampleOutput
from llm_sampling.history import TokenHistory, check_vocab_size, selection, valid_ids
from llm_sampling.params import BatchParams, SamplingParams, list_of_params
from llm_sampling.sample import check_draws, check_history, check_logits, check_mask

Step = Callable[[Tensor, Tensor | None], SampleOutput]


class Sampler:
    """Draws the next token of every row, step after step.

    Each call draws from new logits, records the tokens in the history and advances the positions of
    the rows that got one, all in the backend's one launch. Rows can be added, removed and reordered
    between steps; a row's tokens depend on nothing but its own logits, parameters, history, seed
    and position, so the others' streams go on undisturbed. Not thread-safe: a Sampler a thread.

    Args:
        params: one per row. A row without a seed gets one from torch's default generator, here.
        vocab_size: the width of the logits, 1 .. 2^20.
        history: the tokens so far, one row per row of ``params``; the Sampler goes on using and
            updating this very object. Default: empty, kept only while a row has a penalty.
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
        rows = list_of_params(params, 1)
        self._params = rows
        self._backend = backends.resolve(backend, self.device)
        batch = BatchParams.from_list(rows, device=self.device)
        if history is None and batch.needs_history:
            history = TokenHistory.from_ids([[]] * len(rows), None, vocab_size, device=self.device)
        check_history(history, batch, len(rows), vocab_size, self.device)
        self._refuse_draws(batch.needs_history)
        self._history = history
        self._slots = None if history is None else history.slots
        if history is None:
            position = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        else:
            position = history.lengths[history.slots.to(torch.int64)]
        self._batch = replace(batch.seeded(), position=position)
        self._step: Step | None = None
        self._prepared_for: tuple[object, ...] = ()

    def _refuse_draws(self, needs_history: bool) -> None:
        if needs_history and self.num_samples > 1:
            raise ValueError(
                "num_samples must be 1 where a penalty is on, since a history follows one token "
                f"per row, got {self.num_samples}"
            )

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
        assert self._batch.position is not None
        return self._batch.position.clone()

    def __call__(self, logits: Tensor, *, allowed_mask: Tensor | None = None) -> SampleOutput:
        """Draw one token (or ``num_samples``) per row and advance.

        Args:
            logits: ``(rows, vocab_size)`` on the Sampler's device, as for
                :func:`llm_sampling.sample`.
            allowed_mask: this step's bitmask, as for :func:`llm_sampling.sample`.

        Raises:
            ValueError: another shape, dtype or device.
            InvalidLogitsError: ``check`` found bad rows; nothing has advanced.
        """
        step = self._step
        if (
            step is None
            or not isinstance(logits, Tensor)
            or self._prepared_for != (logits.shape, logits.dtype, logits.device)
            or not (logits.is_contiguous() or logits.stride(1) == 1)  # the first is cheaper
            or logits.requires_grad
        ):
            logits = self._check(logits)
            step = self._step or self._prepare(logits)
        if self._history is not None and self._history.slots is not self._slots:
            self._check_history()
        if allowed_mask is not None:
            allowed_mask = check_mask(allowed_mask, self.rows, self.vocab_size, self.device)
        return step(logits, allowed_mask)

    def _check(self, logits: Tensor) -> Tensor:
        logits = check_logits(logits)
        shape = (self.rows, self.vocab_size)
        if logits.shape != shape:
            raise ValueError(
                f"logits must have shape (rows, vocab_size) = {shape}, got {tuple(logits.shape)}"
            )
        if logits.device != self.device:
            raise ValueError(f"logits must be on {self.device}, got {logits.device}")
        if self._prepared_for != (logits.shape, logits.dtype, logits.device):
            self._step = None
        return logits

    def _check_history(self) -> None:
        """A ValueError if the user gave the shared history other rows than the Sampler has."""
        if self._history is not None:
            check_history(self._history, self._batch, self.rows, self.vocab_size, self.device)
            self._slots = self._history.slots

    def _prepare(self, logits: Tensor) -> Step:
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
        return self._step

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
        self._refuse_draws(params.needs_history)
        valid_ids("prompt_ids", prompt_ids, self.vocab_size)
        position = len(valid_ids("output_ids", output_ids, self.vocab_size))
        self._check_history()
        history = self._history
        if history is None and params.needs_history:
            # the rows so far have no penalty, so what they have produced does not matter
            history = TokenHistory.from_ids(
                [[]] * self.rows, None, self.vocab_size, device=self.device
            )
        slots = None if history is None else history._slots_with(prompt_ids, output_ids)
        old = self._batch
        assert old.position is not None
        new = BatchParams.from_list([params], positions=[position], device=self.device).seeded()
        assert new.position is not None
        self._rebuild(
            [*self._params, params],
            torch.cat([old.seed, new.seed]),
            torch.cat([old.position, new.position]),
            history,
            slots,
        )
        return self.rows - 1

    def remove(self, rows: Sequence[int]) -> None:
        """Remove rows; the others move up and keep their order.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        gone = set(selection(rows, self.rows).tolist())
        self.reorder([row for row in range(self.rows) if row not in gone])

    def reorder(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order.

        Raises:
            ValueError: a row does not exist or is named twice.
        """
        rows = list(rows)
        index = selection(rows, self.rows).to(self.device)
        self._check_history()
        assert self._batch.position is not None
        self._rebuild(
            [self._params[row] for row in rows],
            self._batch.seed[index],
            self._batch.position[index],
            self._history,
            None if self._history is None else self._history.slots[index],
        )

    def _rebuild(
        self,
        params: list[SamplingParams],
        seed: Tensor,
        position: Tensor,
        history: TokenHistory | None,
        slots: Tensor | None,
    ) -> None:
        """Pack the rows anew; seeds and positions are carried over, not drawn or counted again.

        Everything that can fail comes first. Python handles Ctrl-C after a call, so nothing is
        called between the assignments: rows and history change together or not at all.
        """
        batch = BatchParams.from_list(params, device=self.device)
        batch = replace(batch, seed=seed, position=position, unseeded=None)
        if history is not None:
            assert slots is not None
            history.slots = slots
        self._history, self._slots = history, slots
        self._params, self._batch, self._step = params, batch, None
