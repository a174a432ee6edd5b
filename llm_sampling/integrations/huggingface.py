"""Hugging Face: the kernel inside ``model.generate``, in three ways.

    model.generate(**inputs, custom_generate=fused_generate, params=params)
    model.generate(**inputs, logits_processor=[FusedLogitsProcessor(params)])
    model.generate(**inputs, logits_processor=[FusedLogitsWarper(params)], do_sample=True)

:func:`fused_generate` is the whole loop, :class:`FusedLogitsProcessor` draws the tokens and
:class:`FusedLogitsWarper` only filters. They keep track of padding, of where the prompt ends and of
which rows belong to which prompt, which ``generate`` does not tell a processor. The first two give
the tokens of :func:`llm_sampling.generation.generate`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils.generic import ModelOutput

from llm_sampling.backends import check_name
from llm_sampling.backends.base import Logprobs, raise_on_status
from llm_sampling.calls import check_draws
from llm_sampling.checks import integer
from llm_sampling.generation.prompts import unpadded
from llm_sampling.generation.rows import (
    RowText,
    new_sampler,
    params_of_prompts,
    params_of_sequences,
    prompt_history,
)
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.history import STATE_TENSORS, TokenHistory
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sample import filter_logits
from llm_sampling.sampler import Sampler

#: How many new tokens of a row with ``penalty_last_n`` there is room for at first. A processor is
#: not told how many will come, so that the room is doubled whenever it is used up.
_FIRST_ROOM = 256


class _Prompts:
    """The prompts of a call of ``generate``: their parameters, and which ids are padding.

    Args:
        params: one for all prompts, or one a prompt.
        attention_mask: that of the prompts, 0 where they are padded.
        pad_token_id: the id of padding on the left, where there is no mask.
        backend: checked here so that an unknown name is refused before ``generate`` starts.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        backend: str,
    ) -> None:
        check_name(backend)
        self.params = params_of_prompts(params, 1)
        if not self.params:
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

    def params_of_rows(self, rows: int) -> list[SamplingParams]:
        """One a row: ``num_return_sequences`` rows of a prompt have its seed, + 1, + 2, ..."""
        if rows % len(self.params) != 0:
            raise ValueError(
                f"params must have one for each prompt, got {len(self.params)} for {rows} rows"
            )
        return params_of_sequences(self.params, rows // len(self.params))

    def sampler(
        self, input_ids: Tensor, logits: Tensor, logprobs: Logprobs | None, backend: str
    ) -> Sampler:
        """A new Sampler for the prompts ``input_ids``."""
        return new_sampler(
            self.params_of_rows(input_ids.shape[0]),
            lambda: self.unpadded(input_ids),
            vocab_size=logits.shape[1],
            device=logits.device,
            logprobs=logprobs,
            backend=backend,
            max_new_tokens=_FIRST_ROOM,
        )

    def unpadded(self, input_ids: Tensor) -> list[Tensor]:
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
                return unpadded(ids, mask)
        if self._pad is not None:
            # A pad token after the first other token is a token like any other.
            return unpadded(ids, (ids != self._pad).cumsum(-1))
        return list(ids)


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
    return Sampler.from_state_dict(state, backend=backend)


def _twice_as_wide(ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, ids.shape[1]))


class _StepTracker:
    """Tells the first call of a ``generate`` from the next ones, by the ids of the call before."""

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._last = None

    def is_first(self, input_ids: Tensor) -> bool:
        """Whether a ``generate`` begins with this call.

        It does unless the ids are those of the last call and one more for each row.

        Raises:
            ValueError: ``generate`` searches beams or has an assistant, so that a row of the batch
                is not one text.
        """
        last, self._last = self._last, input_ids
        goes_on = (
            last is not None
            and input_ids.shape == (last.shape[0], last.shape[1] + 1)
            and input_ids.device == last.device
            and torch.equal(input_ids[:, :-1], last)
        )
        if not goes_on:
            _refuse_other_loops()
        return not goes_on


def _callers() -> Iterator[FrameType]:
    """The stack frames of transformers' generation code, the innermost first.

    There is no plainer way: a logits processor is not told which loop calls it, and ``generate``
    does not pass ``streamer``, ``synced_gpus`` and ``assistant_model`` to a custom loop (see its
    ``_extract_generation_mode_kwargs``).
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers.generation."):
            yield frame
        frame = frame.f_back


def _refuse_other_loops() -> None:
    """A ValueError inside of beam search or assisted decoding."""
    for name in (frame.f_code.co_name for frame in _callers()):
        if name.startswith("_") and name.endswith(("_search", "_decoding")):
            raise ValueError(
                "a fused processor must draw one text a row (num_beams=1, no assistant_model, no "
                f"prompt lookup), and transformers called it in {name}"
            )


def _argument_of_generate(name: str) -> Any:
    """The argument that ``generate`` was called with; None if it is not among the callers."""
    calls = (frame.f_locals for frame in _callers() if frame.f_code.co_name == "generate")
    return next(calls, {}).get(name)


class FusedLogitsProcessor(LogitsProcessor):
    """Draws each row's token in one call of the kernel, inside ``model.generate``.

    It returns 0.0 at the token that was drawn and -inf elsewhere, so that ``generate`` takes this
    token with ``do_sample`` on or off and whatever warpers follow. Every row has its own parameters
    and its own seed, and no row depends on another one. Frequency and presence penalties count the
    output only, temperature 0 is greedy, and padding is not penalised.

    Set ``top_k=0`` and ``top_p=1.0`` in ``generate``: its own warpers run after this processor,
    which takes time and changes nothing.

    One object serves one call of ``generate`` after the other. Call :meth:`reset` before a call
    whose prompts are exactly what the last call returned: it looks like a next step of that one.

    Args:
        params: one for all prompts, or one a prompt, in the order of ``input_ids``. With
            ``num_return_sequences`` row i of a prompt has the prompt's seed + i.
        attention_mask: ``(prompts, length)``, the mask that ``generate`` gets. It is needed where
            prompts are padded and a repetition penalty is on, unless ``pad_token_id`` is given.
        pad_token_id: the token that prompts are padded with on the left, instead of the mask.
        logprobs: None, "processed" or "raw", as for :func:`llm_sampling.sample`: :attr:`logprobs`
            then has those of the drawn tokens.
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
        self._prompts = _Prompts(params, attention_mask, pad_token_id, backend)
        self._steps = _StepTracker()
        check_draws(1, logprobs, None)
        self._logprobs: Logprobs | None = logprobs
        self._backend = backend
        self._sampler: Sampler | None = None
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
        is_first = self._steps.is_first(input_ids)
        if is_first or self._sampler is None:
            self._sampler = self._prompts.sampler(input_ids, scores, self._logprobs, self._backend)
            self._step_logprobs = []
        self._sampler = _with_room(self._sampler, input_ids.shape[1] + 1, self._backend)
        drawn = self._sampler(scores)
        if drawn.logprobs is not None:
            self._step_logprobs.append(drawn.logprobs)
        tokens = drawn.tokens[:, None]
        chosen = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        # A row without a candidate has token -1, and remains all -inf.
        return chosen.scatter_(1, tokens.clamp(min=0), torch.where(tokens < 0, -torch.inf, 0.0))


class FusedLogitsWarper(LogitsProcessor):
    """Penalises, divides by the temperature and filters in one call of the kernel.

    It returns :func:`llm_sampling.filter_logits` of the scores. ``generate`` draws, with
    ``do_sample`` on from torch's generator, so seeds have no effect.

    Its arguments, and what it raises, are those of :class:`FusedLogitsProcessor`.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._prompts = _Prompts(params, attention_mask, pad_token_id, backend)
        self._steps = _StepTracker()
        self._backend = backend
        self._history: TokenHistory | None = None
        self._params: BatchParams | None = None

    def reset(self) -> None:
        """Take the next call for the first one of a ``generate``."""
        self._steps.reset()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float32 ``(rows, vocab_size)``, a new tensor; see the class."""
        if self._steps.is_first(input_ids):
            params = self._prompts.params_of_rows(input_ids.shape[0])
            self._params = BatchParams.from_list(params, device=scores.device)
            self._history = prompt_history(
                params,
                lambda: self._prompts.unpadded(input_ids),
                scores.shape[1],
                scores.device,
                _FIRST_ROOM,
            )
        elif self._history is not None:
            self._history = _history_with_room(self._history, input_ids.shape[1])
            self._history.append(input_ids[:, -1])
        assert self._params is not None
        return filter_logits(scores, self._params, history=self._history, backend=self._backend)


# ---- parameters from a config ----

#: Fields of a GenerationConfig that change which tokens are drawn, and the values besides None at
#: which each is off. ``generate`` makes logits processors of the first, and :func:`fused_generate`
#: calls those. What the second ask for is not supported.
_AS_PROCESSORS: dict[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0, 1),
}
_NOT_DONE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "use_mtp": (False,),
    "speculation_type": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "renormalize_logits": (False,),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
}


def params_from_generation_config(
    config: GenerationConfig, *, seed: int | None = None
) -> SamplingParams:
    """The parameters that ``generate`` would sample with, given this config.

    A field that is None has ``generate``'s default: ``do_sample`` is off, which is greedy, and
    where it is on ``top_k`` is 50. Fields about lengths and end tokens are ignored, since they are
    no parameters of sampling; give them to ``generate``.

    Args:
        config: a ``transformers.GenerationConfig``, such as ``model.generation_config``.
        seed: of the parameters; a config has none.

    Raises:
        ValueError: ``config`` is no GenerationConfig, or has a value out of its range, or sets a
            field that :class:`~llm_sampling.SamplingParams` cannot express; the message names it.
    """
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"config must be a GenerationConfig, got {type(config).__name__}")
    _refuse_fields(config, _AS_PROCESSORS | _NOT_DONE)
    return _params_of(config, seed)


def _refuse_fields(config: GenerationConfig, fields: dict[str, tuple[object, ...]]) -> None:
    for name, off in fields.items():
        value = getattr(config, name, None)
        if value is not None and value not in off:
            raise ValueError(f"{name} of the generation config cannot be honoured, got {value!r}")


def _params_of(config: GenerationConfig, seed: int | None) -> SamplingParams:
    def value(name: str, default: Any) -> Any:
        found = getattr(config, name, None)
        return default if found is None else found

    penalty = value("repetition_penalty", 1.0)
    if not config.do_sample:  # generate then builds none of the filters
        return SamplingParams(temperature=0.0, repetition_penalty=penalty, seed=seed)
    return SamplingParams(
        temperature=value("temperature", 1.0),
        top_k=value("top_k", 50),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        repetition_penalty=penalty,
        seed=seed,
    )


# ---- the whole loop ----


@dataclass
class FusedGenerateOutput(ModelOutput):
    """What :func:`fused_generate` returns with ``return_dict_in_generate``.

    Attributes:
        sequences: int64 ``(rows, length)``, prompts included, as ``generate`` returns them.
        logprobs: float32 ``(rows, steps)`` of the drawn tokens, NaN where a row has ended; None if
            not asked for.
        logits: of each step ``(rows, vocab_size)``, with ``output_logits``.
    """

    sequences: Tensor | None = None
    logprobs: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None


#: The logits processors that ``params`` replace, by their class. Each has the field of the
#: generation config that ``generate`` makes it from, and the values besides None for which it makes
#: none.
_REPLACED = {
    "TemperatureLogitsWarper": ("temperature", (1.0,)),
    "TopKLogitsWarper": ("top_k", (0,)),
    "TopPLogitsWarper": ("top_p", (1.0,)),
    "MinPLogitsWarper": ("min_p", ()),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", (1.0,)),
}


def _other_processors(
    processors: LogitsProcessorList, config: GenerationConfig
) -> list[LogitsProcessor]:
    """The processors that ``params`` do not replace.

    Raises:
        ValueError: the user gave one of a replaced class, beside what ``generate`` made itself.
    """
    kept = []
    from_config = {
        name
        for name, (field, off) in _REPLACED.items()
        if getattr(config, field, None) not in (None, *off)
        and (config.do_sample or name == "RepetitionPenaltyLogitsProcessor")
    }
    for processor in processors:
        name = type(processor).__name__
        if name not in _REPLACED:
            kept.append(processor)
        elif name in from_config:
            from_config.remove(name)  # a second one of this class is the user's
        else:
            raise ValueError(
                f"logits_processor must not have a {name} beside params: set "
                f"{_REPLACED[name][0]} there"
            )
    return kept


def fused_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    logprobs: Logprobs | None = None,
    stop: str | Sequence[str] = (),
    stop_limit: int = 1,
    stop_tokenizer: Any = None,
    backend: str = "auto",
    **model_kwargs: Any,
) -> Tensor | FusedGenerateOutput:
    """The loop of ``model.generate``, with one fused call a step.

    ``generate`` calls it after preparing everything as for its own loop: prompts, cache, padding,
    ``num_return_sequences``, a streamer, stopping criteria and logits processors. Processors that
    ``params`` do not replace are called on a float32 copy of the logits.

    Args:
        model: given by ``generate``, as are the next five.
        input_ids: int64 ``(rows, length)``.
        logits_processor: the processors that ``generate`` has made, and the user's.
        stopping_criteria: the criteria that ``generate`` has made, and the user's.
        generation_config: the config of this call.
        synced_gpus: not supported.
        params: one for all prompts, or one a prompt; with ``num_return_sequences`` row i of a
            prompt has the prompt's seed + i. They replace the temperature, top_k, top_p, min_p,
            repetition_penalty and do_sample of the generation config. Default: those of the config.
        logprobs: "processed" or "raw": the output then has those of the drawn tokens; needs
            ``return_dict_in_generate``.
        stop: strings that end a row, searched in the generated text; its tokens stay in the
            sequence. ``generate``'s own ``stop_strings`` does not work with a custom loop.
        stop_limit: a row ends at this occurrence, counted over all of ``stop``.
        stop_tokenizer: the tokenizer that ``stop`` needs. It has a name of its own because
            ``generate`` does not pass on an argument called ``tokenizer``.
        backend: as for :func:`llm_sampling.sample`.
        **model_kwargs: given by ``generate``, for the model.

    Returns:
        int64 ``(rows, length)``, or with ``return_dict_in_generate`` a
        :class:`FusedGenerateOutput`.

    Raises:
        ValueError: an argument is out of its range, or asks for what is not supported.
        InvalidLogitsError: the logits leave a row without a token, or hold NaN or +inf.

    Example:
        >>> params = [SamplingParams(top_p=0.9, seed=1), SamplingParams(temperature=0)]
        >>> model.generate(**inputs, custom_generate=fused_generate, params=params)
    """
    if generation_config is None:
        raise ValueError("fused_generate must be called by generate, as its custom_generate")
    config: Any = generation_config
    _refuse_unsupported(config, synced_gpus, logprobs)
    has_stop = StopStrings(stop, stop_limit=stop_limit).is_on
    if has_stop and stop_tokenizer is None:
        raise ValueError("stop_tokenizer must be given for stop")
    processors = _other_processors(logits_processor or LogitsProcessorList(), config)
    mask = None if model.config.is_encoder_decoder else model_kwargs.get("attention_mask")
    prompts = _Prompts(_params_of(config, None) if params is None else params, mask, None, backend)
    texts = [
        RowText(stop_tokenizer, prompt.tolist(), StopStrings(stop, stop_limit=stop_limit))
        for prompt in (prompts.unpadded(input_ids) if has_stop else ())
    ]
    criteria = stopping_criteria or StoppingCriteriaList()
    rows_may_end = has_stop or any(hasattr(one, "eos_token_id") for one in criteria)
    pad = config._pad_token_tensor if rows_may_end else None
    streamer = _argument_of_generate("streamer")

    going = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    is_going = True
    sampler: Sampler | None = None
    kept_logits: list[Tensor] = []
    kept_logprobs: list[Tensor] = []
    steps = _ModelSteps(model, input_ids, config, model_kwargs)
    with steps.optimised():
        while is_going:
            logits = steps(input_ids)
            if config.return_dict_in_generate and config.output_logits:
                kept_logits.append(logits.float().clone())
            scores = _processed(logits, input_ids, processors)
            if sampler is None:
                sampler = prompts.sampler(input_ids, scores, logprobs, backend)
            sampler = _with_room(sampler, input_ids.shape[1] + 1, backend)
            drawn = sampler(scores)
            if drawn.logprobs is not None:
                kept_logprobs.append(drawn.logprobs.masked_fill(~going, torch.nan))
            tokens = drawn.tokens
            if pad is not None:
                tokens = torch.where(going, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            going = going & ~criteria(input_ids, None)
            # The only wait for the device in a step.
            is_invalid, is_going = torch.stack([(drawn.tokens < 0).any(), going.any()]).tolist()
            if is_invalid:
                raise_on_status(drawn.status)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if texts:
                going = going & ~_stopped(texts, tokens.tolist()).to(going.device)
                is_going = bool(going.any())
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return FusedGenerateOutput(
        sequences=input_ids,
        logprobs=torch.stack(kept_logprobs, dim=1) if kept_logprobs else None,
        logits=tuple(kept_logits) if kept_logits else None,
    )


def _refuse_unsupported(config: Any, synced_gpus: bool, logprobs: Logprobs | None) -> None:
    """A ValueError for what ``generate`` was asked for and :func:`fused_generate` cannot do."""
    outputs = ("output_scores", "output_attentions", "output_hidden_states")
    _refuse_fields(config, _NOT_DONE | dict.fromkeys(outputs, (False,)))
    if synced_gpus or _argument_of_generate("synced_gpus"):
        raise ValueError("synced_gpus cannot be honoured")
    if _argument_of_generate("assistant_model") is not None:
        raise ValueError("assistant_model cannot be honoured")
    if logprobs is not None and not config.return_dict_in_generate:
        raise ValueError("logprobs needs return_dict_in_generate=True")


def _processed(logits: Tensor, input_ids: Tensor, processors: Sequence[LogitsProcessor]) -> Tensor:
    """What the processors make of a float32 copy; the logits themselves if there are none."""
    if not processors:
        return logits
    scores = logits.to(torch.float32, copy=True)
    for processor in processors:
        scores = processor(input_ids, scores)
    return scores


def _stopped(texts: Sequence[RowText], tokens: Sequence[int]) -> Tensor:
    """Whether each row has reached its stop string with its new token: bool ``(rows,)``."""
    for text, token in zip(texts, tokens, strict=True):
        text.feed(token)
    return torch.tensor([text.stop_string is not None for text in texts])


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
