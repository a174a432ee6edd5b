"""Hugging Face: the kernel inside ``model.generate``, in three ways.

    model.generate(**inputs, custom_generate=fused_generate, params=params)
    model.generate(**inputs, logits_processor=[FusedLogitsProcessor(params)])
    model.generate(**inputs, logits_processor=[FusedLogitsWarper(params)], do_sample=True, top_k=0)

:func:`fused_generate` is the whole loop, :class:`FusedLogitsProcessor` draws the tokens and
:class:`FusedLogitsWarper` only filters. They keep track of padding, of where the prompt ends and of
which rows belong to which prompt, which ``generate`` does not tell a processor. The first two give
the tokens of :func:`llm_sampling.generation.generate`.

``params`` replace the temperature, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` of
the generation config in all three. Where a processor cannot keep ``generate`` from applying them
too, it raises an error that names the field. Other processors run before the kernel, on the logits
of the model, as ``generate`` orders them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils.generic import ModelOutput

from llm_sampling.backends import check_name
from llm_sampling.backends.base import raise_on_status, status_reasons
from llm_sampling.checks import integer, refusal, true_or_false
from llm_sampling.generation.config import (
    AS_PROCESSORS,
    AS_RULES,
    NOT_SUPPORTED,
    REPLACED,
    params_of_config,
    refuse_fields,
    rules_of_config,
)
from llm_sampling.generation.prompts import unpadded
from llm_sampling.generation.rows import (
    FinishReason,
    Row,
    RowLogprobs,
    RowText,
    Stop,
    callback_of_prompts,
    counts_of_prompts,
    logprobs_of_prompts,
    masks_without_ends,
    new_sampler,
    params_of_prompts,
    params_of_sequences,
    prompt_history,
    starts_of_prompts,
    stop_ids_of_prompts,
    stops_of_prompts,
)
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.history import STATE_TENSORS, Ids, TokenHistory
from llm_sampling.integrations.generate_call import (
    GenerateCall,
    calling_list,
    generate_call,
    prompt_mask,
    refuse_other_loops,
    unfinished_rows,
)
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.results import Kind
from llm_sampling.sample import filter_logits
from llm_sampling.sampler import Sampler
from llm_sampling.step_masks import MaskCallback, check_callback

#: How many new tokens of a row with ``penalty_last_n`` there is room for at first. A processor is
#: not told how many will come, so that the room is doubled whenever it is used up.
_FIRST_ROOM = 256


class _Rows(NamedTuple):
    """The rows of a call of ``generate``: of each prompt its sequences, one after the other.

    Attributes:
        params: one a row.
        positions: how many tokens each row has produced before.
        outputs: those tokens.
        prompts: how many prompts there are.
        sequences: how many rows each of them has.
    """

    params: list[SamplingParams]
    positions: list[int]
    outputs: list[list[int]]
    prompts: int
    sequences: int

    def of_each(self, of_prompts: Sequence[Any]) -> list[Any]:
        """What each row has, of what each prompt has."""
        return [one for one in of_prompts for _ in range(self.sequences)]


class _Prompts:
    """The prompts of a call of ``generate``: their parameters, and which ids are padding.

    Args:
        params: one for all prompts, or one a prompt.
        attention_mask: that of the prompts, 0 where they are padded.
        pad_token_id: the id of padding on the left, where there is no mask.
        position: as for :func:`llm_sampling.generation.generate_stream`.
        output_ids: the last ids of each prompt, which are output.
        backend: checked here so that an unknown name is refused before ``generate`` starts.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        position: int | Sequence[int] | None,
        output_ids: Sequence[Sequence[int]] | None,
        backend: str,
    ) -> None:
        check_name(backend)
        self._is_one = isinstance(params, SamplingParams)
        self._params = params_of_prompts(params, 1)
        if not self._params:
            raise ValueError("params must have at least one, got none")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
        ):
            raise ValueError(
                f"attention_mask must have shape (rows, length), got {attention_mask!r}"
            )
        if attention_mask is not None and pad_token_id is not None:
            raise ValueError("pad_token_id must not be given beside an attention_mask")
        self._mask = attention_mask
        self._pad = None if pad_token_id is None else integer("pad_token_id", pad_token_id)
        self._position = position
        self._output_ids = output_ids

    def rows(self, rows: int, call: GenerateCall | None) -> _Rows:
        """What each of ``rows`` rows has.

        A call of ``generate`` says how many sequences a prompt has. Without one a list of
        parameters says how many prompts there are, or else the mask.
        """
        if call is not None:
            prompts = rows // (call.config.num_return_sequences or 1)
        elif not self._is_one:
            prompts = len(self._params)
        else:
            prompts = rows if self._mask is None else self._mask.shape[0]
        if len(self._params) == rows:
            prompts = rows
        if rows % prompts != 0 or (not self._is_one and len(self._params) != prompts):
            raise ValueError(
                f"params must have one for each prompt, got {len(self._params)} for {rows} rows"
                + ("" if call is None else f" of {prompts} prompts")
            )
        params = self._params * prompts if self._is_one else self._params
        positions, outputs = starts_of_prompts(params, self._position, self._output_ids)
        of_prompts = _Rows([], [], [], prompts, rows // prompts)
        return of_prompts._replace(
            params=params_of_sequences(params, of_prompts.sequences),
            positions=of_prompts.of_each(positions),
            outputs=of_prompts.of_each(outputs),
        )

    def sampler(
        self,
        input_ids: Tensor,
        logits: Tensor,
        rows: _Rows,
        call: GenerateCall | None,
        logprobs: Sequence[Kind] | None,
        backend: str,
        allowed_mask: MaskCallback | None = None,
    ) -> Sampler:
        """A new Sampler for the prompts ``input_ids``."""
        return new_sampler(
            rows.params,
            lambda: self.ids(input_ids, rows, call),
            rows.positions,
            vocab_size=logits.shape[1],
            device=logits.device,
            logprobs=logprobs,
            backend=backend,
            max_new_tokens=_FIRST_ROOM,
            allowed_mask=allowed_mask,
        )

    def ids(
        self, input_ids: Tensor, rows: _Rows, call: GenerateCall | None
    ) -> tuple[Ids, Ids | None]:
        """The ids of each row without padding: the prompt's, and those that are output."""
        ids = self.unpadded(input_ids, None if call is None else call.mask)
        if not any(rows.outputs):
            return ids, None
        for index, (row, output) in enumerate(zip(ids, rows.outputs, strict=True)):
            last = row[max(0, len(row) - len(output)) :].tolist()
            if last != output:
                raise ValueError(
                    f"output_ids must be the last ids of each prompt, got {output} where row "
                    f"{index} ends in {last}"
                )
        prompts = [row[: len(row) - len(out)] for row, out in zip(ids, rows.outputs, strict=True)]
        return prompts, rows.outputs

    def unpadded(self, input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The ids of each row without padding, on the host.

        Args:
            input_ids: the prompts.
            mask: that of ``generate``, which counts if the user has not said where padding is.
        """
        ids = input_ids.cpu()
        if self._mask is not None:
            mask = self._mask
        elif self._pad is not None:
            # A pad token after the first other token is a token like any other.
            mask = (ids != self._pad).cumsum(-1)
        if mask is None or ids.shape[1] == 0:
            return list(ids)
        if ids.shape[0] % mask.shape[0] != 0 or ids.shape[1] != mask.shape[1]:
            raise ValueError(
                f"attention_mask must have the shape of the prompts, got {tuple(mask.shape)} "
                f"where they are {tuple(ids.shape)}"
            )
        mask = mask.cpu().bool().repeat_interleave(ids.shape[0] // mask.shape[0], dim=0)
        return unpadded(ids, mask)


def _history_with_room(history: TokenHistory, length: int) -> TokenHistory:
    """``history``, or one that takes its place if its text has no room for ``length`` ids."""
    text = history.text
    if text is None or length <= text.max_length:
        return history
    parts = {name: getattr(history, name) for name in STATE_TENSORS}
    text = text._replace(ids=_twice_as_wide(text.ids))
    return TokenHistory.of_parts(**parts, vocab_size=history.vocab_size, text=text)


def _with_room(sampler: Sampler, length: int, backend: str) -> Sampler:
    """``sampler``, or one that goes on in its place if its text has no room for ``length`` ids."""
    text = None if sampler.history is None else sampler.history.text
    if text is None or length <= text.max_length:
        return sampler
    state = sampler.state_dict()
    state["history"]["text"]["ids"] = _twice_as_wide(text.ids)
    return Sampler.from_state_dict(state, backend=backend, allowed_mask=sampler.allowed_mask)


def _twice_as_wide(ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, ids.shape[1]))


class _Steps:
    """Tells the first call of a ``generate`` from the next ones."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._list: LogitsProcessorList | None = None

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._last = None

    def is_first(self, input_ids: Tensor, processors: LogitsProcessorList | None) -> bool:
        """Whether a ``generate`` begins with this call.

        Each ``generate`` has a list of processors of its own. Outside of it a call goes on if its
        ids are those of the last call and one more for each row.

        Raises:
            ValueError: ``generate`` searches beams or has an assistant, so that a row of the batch
                is not one text.
        """
        last, self._last = self._last, input_ids
        is_same_list, self._list = processors is self._list, processors
        goes_on = (
            last is not None
            and is_same_list
            and input_ids.shape == (last.shape[0], last.shape[1] + 1)
            and input_ids.device == last.device
            and torch.equal(input_ids[:, :-1], last)
        )
        if not goes_on:
            refuse_other_loops()
        return not goes_on


def _refuse_replaced(processors: Sequence[Any], own: object) -> None:
    """A ValueError if the user gave a processor that ``params`` replace, or another one of ours."""
    for processor in processors:
        name = type(processor).__name__
        if name in REPLACED:
            raise ValueError(
                f"logits_processor must not have a {name} beside params: set "
                f"{REPLACED[name][0]} there"
            )
        if isinstance(processor, (FusedLogitsProcessor, FusedLogitsWarper)) and (
            processor is not own
        ):
            raise ValueError(
                f"logits_processor must not have a {name} beside params that are applied already"
            )


def _check_neighbours(
    own: LogitsProcessor,
    processors: LogitsProcessorList,
    call: GenerateCall | None,
    logprobs: Collection[Kind | None],
) -> None:
    """A ValueError if another processor of the list would lose its meaning, or ours would.

    Args:
        own: ours.
        processors: the list that calls it.
        call: the call of ``generate`` that has made the list.
        logprobs: the kinds that are asked for.
    """
    name = type(own).__name__
    place = next(place for place, one in enumerate(processors) if one is own)
    _refuse_replaced(processors if call is None else call.processors, own)
    draws = isinstance(own, FusedLogitsProcessor)
    if call is not None and draws:
        refuse_fields(call.config, NOT_SUPPORTED)
    for other_place, other in enumerate(processors):
        other_name = type(other).__name__
        if other_name in REPLACED:
            if not draws or other_place < place:
                field, off = REPLACED[other_name]
                raise ValueError(
                    f"{field} of the generation config would be applied beside the params of "
                    f"{name}: set it in params, and give generate {field}={off}"
                )
        elif draws and other_place > place:
            raise ValueError(
                f"logits_processor must have no {other_name} after {name}, which has drawn the "
                "token then: put it before"
            )
    if "raw" in logprobs and place > 0:
        raise ValueError(
            'logprobs must not be "raw" where another processor runs before, which changes the '
            f"model's logits ({type(processors[0]).__name__})"
        )


class FusedLogitsProcessor(LogitsProcessor):
    """Draws each row's token in one call of the kernel, inside ``model.generate``.

    It returns 0.0 at the token that was drawn and -inf elsewhere, so that ``generate`` takes this
    token with ``do_sample`` on or off. Every row has its own parameters and its own seed, and no
    row depends on another one. Frequency and presence penalties count the output only, temperature
    0 is greedy, and padding is not penalised.

    ``params`` replace the temperature, ``top_k``, ``top_p`` and ``min_p`` of the generation config,
    whose warpers run after this processor and change nothing: ``top_k=0`` and ``top_p=1.0`` save
    the time that they take. Other processors run before it, and one that would run after it, such
    as a watermark, is refused by name. So is a ``repetition_penalty`` of the generation config,
    which runs before.

    One object serves one call of ``generate`` after the other. In a loop of your own, call
    :meth:`reset` before prompts that are exactly what the last call returned: they look like a next
    step of that one.

    Args:
        params: one for all prompts, or one a prompt, in the order of ``input_ids``. Row i of a
            prompt with several sequences has the parameters ``seeded(params, i)`` of
            :mod:`llm_sampling.generation`. Or one a row.
        attention_mask: ``(prompts, length)``, 0 where prompts are padded. Default: the mask that
            ``generate`` has; outside of it, no padding.
        pad_token_id: the token that prompts are padded with on the left, instead of the mask.
        logprobs: None, "processed" or "raw", as for :func:`llm_sampling.sample`, for all prompts or
            for each: :attr:`logprobs` then has those of the drawn tokens.
        position: how many tokens each prompt's text has already, for all prompts or for each.
            Default: the number of ``output_ids``.
        output_ids: the tokens that each prompt's text has already, which are the last ids of the
            prompt: a list of ids for each. They are needed where ``position`` is not 0 and a
            penalty is for the output alone.
        backend: as for :func:`llm_sampling.sample`.

    Raises:
        ValueError: an argument is out of its range; ``generate`` searches beams or has an
            assistant; another processor would lose its meaning; the number of rows does not fit
            that of ``params``.
        InvalidLogitsError: the scores leave a row that goes on without a token, or hold NaN or
            +inf.

    Example:
        >>> params = [SamplingParams(top_p=0.9, seed=1), SamplingParams(temperature=0)]
        >>> processor = FusedLogitsProcessor(params)
        >>> model.generate(**inputs, logits_processor=[processor], top_k=0, top_p=1.0)
    """

    supports_continuous_batching = False

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        logprobs: Kind | Sequence[Kind | None] | None = None,
        position: int | Sequence[int] | None = None,
        output_ids: Sequence[Sequence[int]] | None = None,
        backend: str = "auto",
    ) -> None:
        self._prompts = _Prompts(
            params, attention_mask, pad_token_id, position, output_ids, backend
        )
        self._steps = _Steps()
        logprobs_of_prompts(logprobs, len(logprobs) if isinstance(logprobs, (list, tuple)) else 1)
        self._logprobs = logprobs
        self._backend = backend
        self._sampler: Sampler | None = None
        self._row_logprobs: RowLogprobs | None = None
        self._step_logprobs: list[Tensor] = []

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._steps.reset()

    @property
    def logprobs(self) -> Tensor | None:
        """float32 ``(rows, steps)`` of the last ``generate``; None if not asked for.

        They go on in a row that has ended.
        """
        return torch.stack(self._step_logprobs, dim=1) if self._step_logprobs else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float32 ``(rows, vocab_size)``, a new tensor: 0.0 at the drawn tokens, -inf elsewhere."""
        _check_step(input_ids, scores)
        processors = calling_list(self)
        if self._steps.is_first(input_ids, processors) or self._sampler is None:
            self._begin(input_ids, scores, processors)
        assert self._sampler is not None
        assert self._row_logprobs is not None
        self._sampler = _with_room(self._sampler, input_ids.shape[1] + 1, self._backend)
        drawn = self._sampler(scores)
        if any(drawn.status.tolist()):
            going = unfinished_rows()
            raise_on_status(drawn.status if going is None else drawn.status * going)
        logprobs = self._row_logprobs(drawn, scores)
        if logprobs is not None:
            self._step_logprobs.append(logprobs)
        chosen = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        # A row that has ended may have no token; generate needs one, and does not use it.
        return chosen.scatter_(1, drawn.tokens.clamp(min=0)[:, None], 0.0)

    def _begin(
        self, input_ids: Tensor, scores: Tensor, processors: LogitsProcessorList | None
    ) -> None:
        call = generate_call()
        rows = self._prompts.rows(scores.shape[0], call)
        kinds = logprobs_of_prompts(self._logprobs, rows.prompts)
        if processors is not None:
            _check_neighbours(self, processors, call, kinds)
        self._row_logprobs = RowLogprobs(rows.of_each(kinds), scores.device, is_model=True)
        self._sampler = self._prompts.sampler(
            input_ids, scores, rows, call, self._row_logprobs.of_sampler, self._backend
        )
        self._step_logprobs = []


def _check_step(input_ids: object, scores: Tensor) -> None:
    """A ValueError if these are not the ids and scores of the same rows."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise refusal("input_ids", "a tensor (rows, length)", input_ids)
    if scores.dim() != 2 or scores.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"scores must have shape (rows, vocab_size) with {input_ids.shape[0]} rows, got "
            f"{tuple(scores.shape)}"
        )


class FusedLogitsWarper(LogitsProcessor):
    """Penalises, divides by the temperature and filters in one call of the kernel.

    It returns :func:`llm_sampling.filter_logits` of the scores. ``generate`` draws, with
    ``do_sample`` on from torch's generator, so seeds have no effect.

    Give ``generate`` ``top_k=0``, and whatever else turns the generation config's temperature,
    ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` off: they would be applied too, and
    are refused by name.

    Its arguments, and what it raises, are those of :class:`FusedLogitsProcessor`. Outside of
    ``generate``, ``input_ids`` may be None where no penalty is on.

    Example:
        >>> warper = FusedLogitsWarper(SamplingParams(temperature=0.7, top_p=0.9))
        >>> model.generate(**inputs, logits_processor=[warper], do_sample=True, top_k=0)
    """

    supports_continuous_batching = False

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        output_ids: Sequence[Sequence[int]] | None = None,
        backend: str = "auto",
    ) -> None:
        self._prompts = _Prompts(params, attention_mask, pad_token_id, None, output_ids, backend)
        self._steps = _Steps()
        self._backend = backend
        self._history: TokenHistory | None = None
        self._params: BatchParams | None = None

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._steps.reset()

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """float32 ``(rows, vocab_size)``, a new tensor; see the class."""
        if input_ids is None:
            params = self._prompts.rows(scores.shape[0], None).params
            if any(row.needs_history for row in params):
                raise ValueError(
                    "input_ids must be given where params look at the history, got None"
                )
            batch = BatchParams.from_list(params, device=scores.device)
            return filter_logits(scores, batch, backend=self._backend)
        _check_step(input_ids, scores)
        processors = calling_list(self)
        if self._steps.is_first(input_ids, processors) or self._params is None:
            self._begin(input_ids, scores, processors)
        elif self._history is not None:
            self._history = _history_with_room(self._history, input_ids.shape[1])
            self._history.append(input_ids[:, -1])
        assert self._params is not None
        return filter_logits(scores, self._params, history=self._history, backend=self._backend)

    def _begin(
        self, input_ids: Tensor, scores: Tensor, processors: LogitsProcessorList | None
    ) -> None:
        call = generate_call()
        rows = self._prompts.rows(scores.shape[0], call)
        if processors is not None:
            _check_neighbours(self, processors, call, ())
        self._params = BatchParams.from_list(rows.params, device=scores.device)
        self._history = prompt_history(
            rows.params,
            lambda: self._prompts.ids(input_ids, rows, call),
            scores.shape[1],
            scores.device,
            _FIRST_ROOM,
        )


# ---- parameters from a config ----


def params_from_generation_config(
    config: GenerationConfig, *, seed: int | None = None
) -> SamplingParams:
    """The parameters that ``generate`` would sample with, given this config.

    A field that is None has ``generate``'s default: ``do_sample`` is off, which is greedy, and
    where it is on ``top_k`` is 50. ``no_repeat_ngram_size``, ``bad_words_ids`` and, with the end
    tokens, ``min_new_tokens`` become the rules of the same meaning. Other fields about lengths are
    ignored, since they are no parameters of sampling; give them to ``generate``.

    Args:
        config: a ``transformers.GenerationConfig``, such as ``model.generation_config``.
        seed: of the parameters; a config has none.

    Raises:
        ValueError: ``config`` is no GenerationConfig, or has a value out of its range, or sets a
            field that :class:`~llm_sampling.SamplingParams` cannot express; the message names it.
    """
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"config must be a GenerationConfig, got {type(config).__name__}")
    others = {name: off for name, off in AS_PROCESSORS.items() if name not in AS_RULES}
    refuse_fields(config, {**others, **NOT_SUPPORTED})
    return replace(params_of_config(config, seed, top_k=50), **rules_of_config(config))


# ---- the whole loop ----


@dataclass
class FusedGenerateOutput(ModelOutput):
    """What :func:`fused_generate` returns with ``return_dict_in_generate``.

    Attributes:
        sequences: int64 ``(rows, length)``, prompts included, as ``generate`` returns them.
        logprobs: float32 ``(rows, steps)`` of the drawn tokens, NaN where a row has ended or asks
            for none; None if not asked for.
        logits: of each step ``(rows, vocab_size)``, with ``output_logits``.
        finish_reasons: of each row "stop" after an end token, a stop string or a stopping
            criterion; "length" after the largest number of tokens; "error" where the logits of the
            row hold NaN or +inf, or leave it without a token.
        stop_reasons: of each row the stop string or the id of ``stop_token_ids`` that ended it, or
            what was wrong with its logits; None otherwise.
    """

    sequences: Tensor | None = None
    logprobs: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    finish_reasons: tuple[FinishReason, ...] | None = None
    stop_reasons: tuple[str | int | None, ...] | None = None


def _other_processors(
    processors: LogitsProcessorList, call: GenerateCall | None
) -> LogitsProcessorList:
    """The processors that ``params`` do not replace; a ValueError if the user gave one of those."""
    _refuse_replaced(processors if call is None else call.processors, None)
    return LogitsProcessorList([one for one in processors if type(one).__name__ not in REPLACED])


def fused_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    logprobs: Kind | Sequence[Kind | None] | None = None,
    stop: Stop | Sequence[Stop] = None,
    stop_limit: int = 1,
    stop_tokenizer: Any = None,
    stop_token_ids: Collection[int] | Sequence[Collection[int] | None] = (),
    max_tokens: int | Sequence[int] | None = None,
    min_tokens: int | Sequence[int] = 0,
    position: int | Sequence[int] | None = None,
    output_ids: Sequence[Sequence[int]] | None = None,
    check: bool = False,
    backend: str = "auto",
    allowed_mask: MaskCallback | None = None,
    **model_kwargs: Any,
) -> Tensor | FusedGenerateOutput:
    """The loop of ``model.generate``, with one fused call a step.

    ``generate`` calls it after preparing everything as for its own loop: prompts, cache, padding,
    ``num_return_sequences``, a streamer, stopping criteria and logits processors. Processors that
    ``params`` do not replace are called on a float32 copy of the logits, before the penalties.

    ``logprobs``, ``stop``, ``stop_token_ids``, ``max_tokens``, ``min_tokens`` and ``position`` are
    for all prompts, or a list with one for each.

    Args:
        model: given by ``generate``, as are the next five.
        input_ids: int64 ``(rows, length)``.
        logits_processor: the processors that ``generate`` has made, and the user's.
        stopping_criteria: the criteria that ``generate`` has made, and the user's.
        generation_config: the config of this call.
        synced_gpus: not supported.
        params: one for all prompts, or one a prompt. They replace the temperature, top_k, top_p,
            min_p, repetition_penalty and do_sample of the generation config. Row i of a prompt with
            ``num_return_sequences`` has the parameters ``seeded(params, i)`` of
            :mod:`llm_sampling.generation`; ``generate`` itself asks for ``do_sample=True`` beside
            it. Or one a row. Default: those of the config.
        logprobs: "processed" or "raw": the output then has those of the drawn tokens; needs
            ``return_dict_in_generate``. "raw" are of the model's logits, before any processor.
        stop: strings that end a row, searched in the generated text; its tokens stay in the
            sequence. ``generate``'s own ``stop_strings`` does not work with a custom loop.
        stop_limit: a row ends at this occurrence, counted over all of ``stop``.
        stop_tokenizer: the tokenizer that ``stop`` needs. It has a name of its own because
            ``generate`` does not pass on an argument called ``tokenizer``.
        stop_token_ids: tokens that end a row, beside the config's end tokens.
        max_tokens: after how many new tokens a row ends; at most ``max_new_tokens`` of
            ``generate``, which is one number for all rows.
        min_tokens: until a row has this many tokens, no end token is drawn and no stop string
            counts.
        position: how many tokens each prompt's text has already, which chooses its random numbers.
            Default: the number of ``output_ids``.
        output_ids: the tokens that each prompt's text has already, which are the last ids of the
            prompt: a list of ids for each. They are needed where ``position`` is not 0 and a
            penalty is for the output alone.
        check: whether a row whose logits hold NaN or +inf, or leave it without a token, raises an
            error. By default it ends, the others go on, and its finish reason is "error"; without
            ``return_dict_in_generate`` a RuntimeWarning names it.
        backend: as for :func:`llm_sampling.sample`.
        allowed_mask: a callback that is asked before each step which tokens may be drawn, as for
            :func:`llm_sampling.generation.generate_stream`. Forced tokens come one in each step.
        **model_kwargs: given by ``generate``, for the model.

    Returns:
        int64 ``(rows, length)``, or with ``return_dict_in_generate`` a
        :class:`FusedGenerateOutput`.

    Raises:
        ValueError: an argument is out of its range, or asks for what is not supported.
        InvalidLogitsError: with ``check``, at such a row.

    Example:
        >>> params = [SamplingParams(top_p=0.9, seed=1), SamplingParams(temperature=0)]
        >>> model.generate(**inputs, custom_generate=fused_generate, params=params)
    """
    if generation_config is None:
        raise ValueError("fused_generate must be called by generate, as its custom_generate")
    config: Any = generation_config
    call = generate_call()
    _refuse_unsupported(config, synced_gpus, call)
    true_or_false("check", check)
    check_callback(allowed_mask)
    processors = _other_processors(logits_processor or LogitsProcessorList(), call)
    prompts = _Prompts(
        # generate has filled in its defaults, so that None is off here
        params_of_config(config, None, top_k=0) if params is None else params,
        prompt_mask(model, model_kwargs),
        None,
        position,
        output_ids,
        backend,
    )
    rows = prompts.rows(input_ids.shape[0], call)
    kinds = logprobs_of_prompts(logprobs, rows.prompts)
    if any(kinds) and not config.return_dict_in_generate:
        raise ValueError("logprobs needs return_dict_in_generate=True")
    row_logprobs = RowLogprobs(rows.of_each(kinds), input_ids.device, is_model=not processors)
    ends = _Ends(
        config,
        rows,
        stop,
        stop_limit,
        stop_tokenizer,
        stop_token_ids,
        max_tokens,
        min_tokens,
        lambda: prompts.unpadded(input_ids, None),
        input_ids.shape[1],
    )
    if allowed_mask is not None:
        allowed_mask = callback_of_prompts(
            allowed_mask, rows.sequences, rows.outputs, rows.of_each(ends.tokens)
        )
    criteria = stopping_criteria or StoppingCriteriaList()
    rows_may_end = ends.rows or any(hasattr(one, "eos_token_id") for one in criteria)
    pad = config._pad_token_tensor if rows_may_end else None
    streamer = None if call is None else call.streamer

    # Which rows go on, on the device and on the host.
    going = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    is_going = [True] * input_ids.shape[0]
    sampler: Sampler | None = None
    masks: list[Tensor] = []
    failed: dict[int, str] = {}
    kept_logits: list[Tensor] = []
    kept_logprobs: list[Tensor] = []
    steps = _ModelSteps(model, input_ids, config, model_kwargs)
    prompt_length = input_ids.shape[1]
    with steps.optimised():
        while any(is_going):
            logits = steps(input_ids)
            if config.return_dict_in_generate and config.output_logits:
                kept_logits.append(logits.float().clone())
            scores = logits
            if processors:
                scores = processors(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
            if sampler is None:
                of_sampler = row_logprobs.of_sampler
                sampler = prompts.sampler(
                    input_ids, scores, rows, None, of_sampler, backend, allowed_mask
                )
                masks = masks_without_ends(ends.rows, sampler)
            sampler = _with_room(sampler, input_ids.shape[1] + 1, backend)
            step = input_ids.shape[1] - prompt_length
            drawn = sampler(scores, allowed_mask=masks[step] if step < len(masks) else None)
            step_logprobs = row_logprobs(drawn, logits)
            if step_logprobs is not None:
                kept_logprobs.append(step_logprobs.masked_fill(~going, torch.nan))
            tokens = drawn.tokens.clamp(min=0)  # stopping criteria look at it, also after an error
            if pad is not None:
                tokens = torch.where(going, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            going = going & ~criteria(input_ids, None)
            # The only wait for the device in a step.
            statuses, goes_on, ids = torch.stack([drawn.status, going, tokens]).tolist()
            bad = [row for row, status in enumerate(statuses) if status and is_going[row]]
            if bad:
                if check:
                    was_going = torch.tensor(is_going, device=drawn.status.device)
                    raise_on_status(drawn.status * was_going)
                failed |= {row: status_reasons(statuses[row]) for row in bad}
                pad = _pad_of(config, pad, tokens)
                input_ids[bad, -1] = tokens[bad] = pad
                if kept_logprobs:
                    kept_logprobs[-1][bad] = torch.nan
            if streamer is not None:
                streamer.put(tokens.cpu())
            ended = {*bad, *ends.reached(ids, failed)}
            is_going = [row not in ended and bool(more) for row, more in enumerate(goes_on)]
            if ended:
                going = torch.tensor(is_going, device=going.device)
            if allowed_mask is not None:
                sampler.end([row for row, goes in enumerate(is_going) if not goes])
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        if failed:
            found = "; ".join(f"row {row}: {reason}" for row, reason in sorted(failed.items()))
            warnings.warn(f"rows have ended in an error: {found}", RuntimeWarning, stacklevel=2)
        return input_ids
    reasons = ends.reasons(input_ids[:, prompt_length:], failed)
    return FusedGenerateOutput(
        sequences=input_ids,
        logprobs=torch.stack(kept_logprobs, dim=1) if kept_logprobs else None,
        logits=tuple(kept_logits) if kept_logits else None,
        finish_reasons=tuple(reason for reason, _ in reasons),
        stop_reasons=tuple(stop_reason for _, stop_reason in reasons),
    )


def _pad_of(config: Any, pad: Tensor | None, tokens: Tensor) -> Tensor:
    """The id that stands for a token in a row that has ended."""
    for found in (pad, config._pad_token_tensor):
        if found is not None:
            return found.to(tokens.device)
    return tokens.new_zeros(())


class _Ends:
    """Where the rows end, besides at the stopping criteria of ``generate``.

    Attributes:
        rows: of each row; empty if nothing besides can end one.
        tokens: the tokens that end the rows of each prompt.
    """

    def __init__(
        self,
        config: Any,
        rows: _Rows,
        stop: Stop | Sequence[Stop],
        stop_limit: int,
        tokenizer: Any,
        stop_token_ids: Collection[int] | Sequence[Collection[int] | None],
        max_tokens: int | Sequence[int] | None,
        min_tokens: int | Sequence[int],
        prompts: Callable[[], Sequence[Tensor]],
        prompt_length: int,
    ) -> None:
        eos = config._eos_token_tensor
        self._eos: list[int] = [] if eos is None else eos.reshape(-1).tolist()
        self._longest = config.max_length - prompt_length
        stops = [
            StopStrings(one, stop_limit=stop_limit)
            for one in rows.of_each(stops_of_prompts(stop, rows.prompts))
        ]
        has_stop = any(one.is_on for one in stops)
        if has_stop and tokenizer is None:
            raise ValueError("stop_tokenizer must be given for stop")
        ids = stop_ids_of_prompts(stop_token_ids, rows.prompts)
        self.tokens = [{*self._eos, *own} for own in ids]
        most: list[int | None] = [None] * rows.prompts
        if max_tokens is not None:
            counts = counts_of_prompts("max_tokens", max_tokens, rows.prompts, 1)
            if max(counts) > self._longest:
                raise ValueError(
                    f"max_tokens must be at most {self._longest}, the max_new_tokens of generate, "
                    f"got {max(counts)}"
                )
            most = [*counts]
        least = counts_of_prompts("min_tokens", min_tokens, rows.prompts, 0)
        for low, high in zip(least, most, strict=True):
            if low > (self._longest if high is None else high):
                raise ValueError(
                    "min_tokens must be at most max_tokens and the max_new_tokens of generate, "
                    f"got {low}"
                )
        self.rows: list[Row] = []
        if not has_stop and not any(ids) and max_tokens is None and not any(least):
            return
        texts: list[RowText | None] = [None] * len(stops)
        if has_stop:
            texts = [
                RowText(tokenizer, prompt.tolist(), one)
                for prompt, one in zip(prompts(), stops, strict=True)
            ]
        self.rows = [
            Row({**dict(zip(own, own, strict=True)), **dict.fromkeys(self._eos)}, high, low, text)
            for own, high, low, text in zip(
                rows.of_each(ids), rows.of_each(most), rows.of_each(least), texts, strict=True
            )
        ]

    def reached(self, tokens: Sequence[int], failed: Collection[int]) -> Iterator[int]:
        """The rows that have ended with their new token or before, of those without an error."""
        for index, (row, token) in enumerate(zip(self.rows, tokens, strict=False)):
            if row.finish_reason is None and index not in failed:
                row.add(token)
            if row.finish_reason is not None:
                yield index

    def reasons(
        self, generated: Tensor, failed: Mapping[int, str]
    ) -> list[tuple[FinishReason, str | int | None]]:
        """The finish reason and the stop reason of each row.

        Args:
            generated: the new tokens ``(rows, steps)``.
            failed: what was wrong with the logits of rows that have ended for it.
        """
        found: list[tuple[FinishReason, str | int | None]] = []
        for index, tokens in enumerate(generated.tolist()):
            row = self.rows[index] if self.rows else None
            if index in failed:
                found.append(("error", failed[index]))
            elif row is not None and row.finish_reason is not None:
                found.append((row.finish_reason, row.stop_reason))
            elif len(tokens) < self._longest or not set(self._eos).isdisjoint(tokens):
                found.append(("stop", None))
            else:
                found.append(("length", None))
        return found


def _refuse_unsupported(config: Any, synced_gpus: bool, call: GenerateCall | None) -> None:
    """A ValueError for what ``generate`` was asked for and :func:`fused_generate` cannot do."""
    outputs = ("output_scores", "output_attentions", "output_hidden_states")
    refuse_fields(config, {**NOT_SUPPORTED, **dict.fromkeys(outputs, (False,))})
    if synced_gpus or (call is not None and call.synced_gpus):
        raise ValueError("synced_gpus cannot be honoured")
    if call is not None and call.assistant_model is not None:
        raise ValueError("assistant_model cannot be honoured")


class _ModelSteps:
    """Calls the model as ``generate``'s own loop does, in transformers 4.57 and 5."""

    def __init__(
        self, model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        self._config = config
        self._kwargs = model_kwargs
        self._forward: Any = None
        self._has_prefill = hasattr(model, "_prefill")
        if not self._has_prefill:
            if getattr(config, "prefill_chunk_size", None) is not None:
                raise ValueError("prefill_chunk_size cannot be honoured with this transformers")
            length = input_ids.shape[1]
            self._kwargs = model._get_initial_cache_position(length, input_ids.device, model_kwargs)

    def optimised(self) -> Any:
        """The context in which the loop runs: that of ``generate``, where this version has one."""
        optimise = getattr(self._model, "_optimize_model_for_decode", nullcontext)
        return optimise()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The last logits of each row: ``(rows, vocab_size)``, in the model's dtype."""
        model = self._model
        outputs = self._prefill(input_ids) if self._forward is None else self._decode(input_ids)
        self._kwargs = model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits.to(input_ids.device)

    def _prefill(self, input_ids: Tensor) -> Any:
        """The first call, of the whole prompt; chooses what the next ones run."""
        model = self._model
        if self._has_prefill:
            outputs = model._prefill(input_ids, self._config, self._kwargs)
        else:
            inputs = model.prepare_inputs_for_generation(input_ids, **self._kwargs)
            outputs = model(**inputs, return_dict=True)
        self._forward = model
        if model._valid_auto_compile_criteria(self._kwargs, self._config):
            self._forward = model.get_compiled_call(self._config.compile_config)
        return outputs

    def _decode(self, input_ids: Tensor) -> Any:
        """A later call, of one token for each row."""
        options = {}
        if self._has_prefill:
            options["next_sequence_length"] = 1 if self._kwargs["use_cache"] else None
        inputs = self._model.prepare_inputs_for_generation(input_ids, **options, **self._kwargs)
        return self._forward(**inputs, return_dict=True)
