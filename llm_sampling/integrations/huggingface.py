"""Hugging Face: the kernel inside ``model.generate``.

    model.generate(**inputs, logits_processor=[FusedLogitsProcessor(params)])
    model.generate(**inputs, logits_processor=[FusedLogitsWarper(params)], do_sample=True)

The first draws, the second only filters.

Both know what ``generate`` hides: where padding is, where the prompt ends, which row is whose, and
when a new call of ``generate`` begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llm_sampling.backends import Logprobs
from llm_sampling.generation import seeded
from llm_sampling.history import TokenHistory
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sample import filter_logits
from llm_sampling.sampler import Sampler


class _Rows:
    """What both processors know of a call of ``generate``: its prompts, and the tokens since.

    Args:
        params: one for all rows, or one a prompt.
        attention_mask: that of the prompts, 0 where they are padded.
        pad_token_id: of padding on the left, where there is no mask.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        attention_mask: Tensor | None,
        pad_token_id: int | None,
    ) -> None:
        if isinstance(params, SamplingParams):
            params = [params]
        elif not isinstance(params, Sequence) or not all(
            isinstance(row, SamplingParams) for row in params
        ):
            raise ValueError(
                f"params must be a SamplingParams or a sequence of them, got {params!r}"
            )
        if not params:
            raise ValueError("params must have at least one, got none")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
        ):
            raise ValueError(
                f"attention_mask must have shape (rows, length), got {attention_mask!r}"
            )
        if attention_mask is not None and pad_token_id is not None:
            raise ValueError("pad_token_id must not be given beside an attention_mask")
        self.params = list(params)
        self._mask = attention_mask
        self._pad = pad_token_id
        self._ids: Tensor | None = None  # of the last call

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._ids = None

    def begins(self, input_ids: Tensor) -> bool:
        """Whether this call is the first of a ``generate``; it remembers the ids.

        It is, unless the ids are those of the last call and one more for each row.
        """
        last, self._ids = self._ids, input_ids
        goes_on = (
            last is not None
            and input_ids.shape == (last.shape[0], last.shape[1] + 1)
            and input_ids.device == last.device
            and torch.equal(input_ids[:, :-1], last)
        )
        if not goes_on:
            _refuse_other_loops()
        return not goes_on

    def expanded(self, rows: int) -> list[SamplingParams]:
        """One a row: ``num_return_sequences`` rows of a prompt have its seed, + 1, + 2, ..."""
        if len(self.params) == 1 and self.params[0].seed is None:
            return self.params * rows
        if rows % len(self.params) != 0:
            raise ValueError(
                f"params must have one for each prompt, got {len(self.params)} for {rows} rows"
            )
        each = rows // len(self.params)
        return [seeded(row, i) for row in self.params for i in range(each)]

    def prompts(self, input_ids: Tensor) -> list[Tensor]:
        """The ids of each row without padding, on the host."""
        ids = input_ids.cpu()
        if self._mask is not None:
            mask = self._mask.cpu().bool()
            if ids.shape[0] % mask.shape[0] != 0 or ids.shape[1] not in (mask.shape[1], 0):
                raise ValueError(
                    f"attention_mask must have the shape of the prompts, got {tuple(mask.shape)} "
                    f"where they are {tuple(ids.shape)}"
                )
            if ids.shape[1] > 0:
                mask = mask.repeat_interleave(ids.shape[0] // mask.shape[0], dim=0)
                return [row[keep] for row, keep in zip(ids, mask, strict=True)]
        if self._pad is not None:
            # a pad token behind the first other one is a token like any other
            return [row[(row != self._pad).cumsum(0) > 0] for row in ids]
        return list(ids)


def _refuse_other_loops() -> None:
    """A ValueError inside beam search or assisted decoding, whose rows are no texts."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        is_theirs = frame.f_globals.get("__name__", "").startswith("transformers.generation.")
        if is_theirs and name.startswith("_") and name.endswith(("_search", "_decoding")):
            raise ValueError(
                "a fused processor must draw one text a row (num_beams=1, no assistant_model, no "
                f"prompt lookup), and transformers called it in {name}"
            )
        frame = frame.f_back


class FusedLogitsProcessor(LogitsProcessor):
    """Draws each row's token in one call of the kernel, inside ``model.generate``.

    What it returns is 0.0 at the token that was drawn and -inf elsewhere, so that ``generate``
    takes this token with ``do_sample`` on or off and whatever warpers follow. Every row has its own
    parameters and its own seed, which no other row can change; frequency and presence penalties
    count the output only, temperature 0 is greedy, and padding is penalised nowhere.

    Set ``top_k=0`` and ``top_p=1.0`` in ``generate``: its own warpers run after this one and can
    change nothing but the time that they take.

    One object serves one call of ``generate`` after the other. Only where a call goes on with
    exactly what the last one returned, :meth:`reset` must be called between them: it looks like the
    next step of the last call.

    Args:
        params: one for all prompts, or one a prompt, in the order of ``input_ids``. With
            ``num_return_sequences`` row i of a prompt has the prompt's seed + i.
        attention_mask: ``(prompts, length)``, the mask that ``generate`` gets; needed where prompts
            are padded and a repetition penalty is on, unless ``pad_token_id`` tells it.
        pad_token_id: the token that prompts are padded with on the left, instead of the mask.
        logprobs: None, "processed" or "raw", as for :func:`llm_sampling.sample`: those of the drawn
            tokens are then in :attr:`logprobs`.
        backend: as for :func:`llm_sampling.sample`.

    Raises:
        ValueError: an argument is out of its range; ``generate`` searches beams or has an
            assistant; the number of rows is no multiple of that of ``params``.
        InvalidLogitsError: on the CPU, the scores leave a row without a token, or hold NaN or +inf.

    Example:
        >>> params = [SamplingParams(top_p=0.9, seed=1), SamplingParams(temperature=0)]
        >>> processor = FusedLogitsProcessor(params, attention_mask=inputs["attention_mask"])
        >>> model.generate(**inputs, logits_processor=[processor], top_k=0, top_p=1.0)
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        logprobs: Logprobs | None = None,
        backend: str = "auto",
    ) -> None:
        self._rows = _Rows(params, attention_mask, pad_token_id)
        self._logprobs: Logprobs | None = logprobs
        self._backend = backend
        self._sampler: Sampler | None = None
        self._drawn: list[Tensor] = []

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._rows.reset()

    @property
    def logprobs(self) -> Tensor | None:
        """float32 ``(rows, steps)`` of this ``generate``, in a row that has ended too; or None."""
        return torch.stack(self._drawn, dim=1) if self._drawn else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(rows, vocab_size)`` float32, new; see the class."""
        begins = self._rows.begins(input_ids)
        if begins or self._sampler is None:
            self._sampler = self._new_sampler(input_ids, scores)
            self._drawn = []
        drawn = self._sampler(scores)
        if drawn.logprobs is not None:
            self._drawn.append(drawn.logprobs)
        tokens = drawn.tokens[:, None]
        chosen = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        # a row without a candidate has token -1, and stays without one
        return chosen.scatter_(1, tokens.clamp(min=0), torch.where(tokens < 0, -torch.inf, 0.0))

    def _new_sampler(self, input_ids: Tensor, scores: Tensor) -> Sampler:
        params = self._rows.expanded(input_ids.shape[0])
        vocab_size = scores.shape[1]
        history = None
        if any(row.needs_history for row in params):
            prompts = self._rows.prompts(input_ids)
            history = TokenHistory.from_ids(prompts, None, vocab_size, device=scores.device)
        return Sampler(
            params,
            vocab_size=vocab_size,
            history=history,
            logprobs=self._logprobs,
            backend=self._backend,
            device=scores.device,
        )


class FusedLogitsWarper(LogitsProcessor):
    """Penalises, divides by the temperature and filters in one call of the kernel.

    What it returns is :func:`llm_sampling.filter_logits` of the scores. ``generate`` draws, from
    torch's generator with ``do_sample`` on: seeds do not matter here.

    Arguments, and what is said about them, are those of :class:`FusedLogitsProcessor`.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._rows = _Rows(params, attention_mask, pad_token_id)
        self._backend = backend
        self._history: TokenHistory | None = None
        self._params: BatchParams | None = None

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._rows.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(rows, vocab_size)`` float32, new; see the class."""
        if self._rows.begins(input_ids):
            rows = self._rows.expanded(input_ids.shape[0])
            self._params = BatchParams.from_list(rows, device=scores.device)
            self._history = None
            if self._params.needs_history:
                prompts = self._rows.prompts(input_ids)
                self._history = TokenHistory.from_ids(
                    prompts, None, scores.shape[1], device=scores.device
                )
        elif self._history is not None:
            self._history.append(input_ids[:, -1])
        assert self._params is not None
        return filter_logits(scores, self._params, history=self._history, backend=self._backend)
