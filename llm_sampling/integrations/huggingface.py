"""Hugging Face: the kernel inside ``model.generate``.

    model.generate(**inputs, custom_generate=fused_generate, params=params)
    model.generate(**inputs, logits_processor=[FusedLogitsProcessor(params)])
    model.generate(**inputs, logits_processor=[FusedLogitsWarper(params)], do_sample=True)

The first is the whole loop, the second the draw, the third the filters. They know what ``generate``
hides: where padding is, where the prompt ends, which row is whose. The first two give the tokens of
:func:`llm_sampling.generation.generate`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from llm_sampling.generation import TextDecoder, seeded
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.history import TokenHistory
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sample import check_draws, filter_logits
from llm_sampling.sampler import Sampler


class _Rows:
    """What both processors know of a call of ``generate``: its prompts, and the tokens since.

    Args:
        params: one for all rows, or one a prompt.
        attention_mask: that of the prompts, 0 where they are padded.
        pad_token_id: of padding on the left, where there is no mask.
        backend: what will run, so that a name that there is not is refused at once.
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        backend: str,
    ) -> None:
        check_name(backend)
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
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, (int, type(None))):
            raise ValueError(f"pad_token_id must be an integer, got {pad_token_id!r}")
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

    def sampler(
        self, input_ids: Tensor, logits: Tensor, logprobs: Logprobs | None, backend: str
    ) -> Sampler:
        """A new one, for these prompts."""
        params = self.expanded(input_ids.shape[0])
        vocab_size = logits.shape[1]
        history = None
        if any(row.needs_history for row in params):
            prompts = self.prompts(input_ids)
            history = TokenHistory.from_ids(prompts, None, vocab_size, device=logits.device)
        return Sampler(
            params,
            vocab_size=vocab_size,
            history=history,
            logprobs=logprobs,
            backend=backend,
            device=logits.device,
        )

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
        self._rows = _Rows(params, attention_mask, pad_token_id, backend)
        check_draws(1, logprobs, None)
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
            self._sampler = self._rows.sampler(input_ids, scores, self._logprobs, self._backend)
            self._drawn = []
        drawn = self._sampler(scores)
        if drawn.logprobs is not None:
            self._drawn.append(drawn.logprobs)
        tokens = drawn.tokens[:, None]
        chosen = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        # a row without a candidate has token -1, and stays without one
        return chosen.scatter_(1, tokens.clamp(min=0), torch.where(tokens < 0, -torch.inf, 0.0))


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
        self._rows = _Rows(params, attention_mask, pad_token_id, backend)
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


# ---- parameters from a config ----

#: Fields of a GenerationConfig that change which tokens are drawn, and what each is when it is off,
#: beside None. Of the first ``generate`` builds processors, which :func:`fused_generate` calls;
#: nobody does the others.
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

    A field that is None means what it means to ``generate``: ``do_sample`` off, which is greedy,
    and with it on a ``top_k`` of 50. What is about lengths and end tokens is no parameter of
    sampling; give it to ``generate``.

    Args:
        config: a ``transformers.GenerationConfig``, such as ``model.generation_config``.
        seed: of the parameters; a config has none.

    Raises:
        ValueError: the config asks for what :class:`~llm_sampling.SamplingParams` have not, by the
            field's name, or has a value out of its range.
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
    if not config.do_sample:  # none of the filters is built then
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
        logprobs: float32 ``(rows, steps)`` of the drawn tokens, where asked for; NaN where a row
            has ended.
        logits: of each step ``(rows, vocab_size)``, with ``output_logits``.
    """

    sequences: Tensor | None = None
    logprobs: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None


#: By class: what :func:`_params_of` does instead.
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
    """Those that ``params`` do not stand for; a ValueError for what the user gave beside them."""
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
            from_config.remove(name)  # another one is the user's
        else:
            raise ValueError(
                f"logits_processor must not have a {name} beside params: set "
                f"{_REPLACED[name][0]} there"
            )
    return kept


def _argument_of_generate(name: str) -> Any:
    """One of ``generate``'s that it does not hand on to a custom loop; None outside of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_theirs = frame.f_globals.get("__name__") == "transformers.generation.utils"
        if is_theirs and frame.f_code.co_name == "generate":
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


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

    It is called by ``generate``, which prepares everything as for its own loop: prompts, cache,
    padding, ``num_return_sequences``, a streamer, stopping criteria, what other processors there
    are. These are called on a float32 copy of the logits, if there are any.

    Args:
        model: and the next five: what ``generate`` gives.
        input_ids: see there.
        logits_processor: see there.
        stopping_criteria: see there.
        generation_config: see there.
        synced_gpus: not done.
        params: one for all prompts, or one a prompt; with ``num_return_sequences`` row i of a
            prompt has the prompt's seed + i. They replace the temperature, top_k, top_p, min_p,
            repetition_penalty and do_sample of the generation config. Default: those of the config.
        logprobs: "processed" or "raw": the output then has those of the drawn tokens; needs
            ``return_dict_in_generate``.
        stop: strings that end a row, searched in the generated text; its tokens stay in the
            sequence. ``generate``'s own ``stop_strings`` does not work with a custom loop.
        stop_limit: at which occurrence.
        stop_tokenizer: the tokenizer that ``stop`` needs; ``generate`` hands on none called
            ``tokenizer``.
        backend: as for :func:`llm_sampling.sample`.
        **model_kwargs: what ``generate`` gives.

    Returns:
        int64 ``(rows, length)``, or with ``return_dict_in_generate`` a
        :class:`FusedGenerateOutput`.

    Raises:
        ValueError: an argument is out of its range, or cannot be honoured.
        InvalidLogitsError: the logits leave a row without a token, or hold NaN or +inf.

    Example:
        >>> params = [SamplingParams(top_p=0.9, seed=1), SamplingParams(temperature=0)]
        >>> model.generate(**inputs, custom_generate=fused_generate, params=params)
    """
    streamer = _argument_of_generate("streamer")
    config: Any = generation_config
    if config is None:
        raise ValueError("fused_generate must be called by generate, as its custom_generate")
    outputs = ("output_scores", "output_attentions", "output_hidden_states")
    _refuse_fields(config, _NOT_DONE | dict.fromkeys(outputs, (False,)))
    if synced_gpus or _argument_of_generate("synced_gpus"):
        raise ValueError("synced_gpus cannot be honoured")
    if _argument_of_generate("assistant_model") is not None:
        raise ValueError("assistant_model cannot be honoured")
    if logprobs is not None and not config.return_dict_in_generate:
        raise ValueError("logprobs needs return_dict_in_generate=True")
    watch = StopStrings(stop, stop_limit=stop_limit)
    if watch.is_on and stop_tokenizer is None:
        raise ValueError("stop_tokenizer must be given for stop")
    processors = _other_processors(logits_processor or LogitsProcessorList(), config)
    mask = None if model.config.is_encoder_decoder else model_kwargs.get("attention_mask")
    rows = _Rows(_params_of(config, None) if params is None else params, mask, None, backend)
    criteria = stopping_criteria or StoppingCriteriaList()
    has_end = any(hasattr(one, "eos_token_id") for one in criteria)
    pad = config._pad_token_tensor
    ends = [
        (TextDecoder(stop_tokenizer, prompt.tolist()), StopStrings(stop, stop_limit=stop_limit))
        for prompt in (rows.prompts(input_ids) if watch.is_on else ())
    ]
    going = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    sampler: Sampler | None = None
    kept_logits: list[Tensor] = []
    kept_logprobs: list[Tensor] = []
    steps = _ModelSteps(model, input_ids, config, model_kwargs)
    with steps.optimised():
        while True:
            logits = steps(input_ids)
            if config.return_dict_in_generate and config.output_logits:
                kept_logits.append(logits.float().clone())
            scores = logits
            if processors:
                scores = logits.to(torch.float32, copy=True)
                for processor in processors:
                    scores = processor(input_ids, scores)
            if sampler is None:
                sampler = rows.sampler(input_ids, scores, logprobs, backend)
            drawn = sampler(scores)
            tokens = drawn.tokens
            if drawn.logprobs is not None:
                kept_logprobs.append(drawn.logprobs.masked_fill(~going, torch.nan))
            if (has_end or ends) and pad is not None:
                tokens = torch.where(going, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            going = going & ~criteria(input_ids, None)
            # the step's one wait for the device
            is_invalid, is_going = torch.stack([(drawn.tokens < 0).any(), going.any()]).tolist()
            if is_invalid:
                raise_on_status(drawn.status)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if ends:
                going = going & ~_stopped(ends, tokens.tolist()).to(going.device)
                is_going = bool(going.any())
            if not is_going:
                break
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return FusedGenerateOutput(
        sequences=input_ids,
        logprobs=torch.stack(kept_logprobs, dim=1) if kept_logprobs else None,
        logits=tuple(kept_logits) if kept_logits else None,
    )


def _stopped(ends: list[tuple[TextDecoder, StopStrings]], tokens: list[int]) -> Tensor:
    """Which rows have met their stop string, with these tokens."""
    for (decoder, watch), token in zip(ends, tokens, strict=True):
        watch.feed(decoder.decode(token))
    return torch.tensor([watch.found is not None for _, watch in ends])


class _ModelSteps:
    """The model's calls as ``generate`` makes them, in transformers 4.57 and 5."""

    def __init__(
        self, model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        self._config = config
        self._kwargs = model_kwargs
        self._outputs: Any = None
        self._forward: Any = None
        self._has_prefill = hasattr(model, "_prefill")
        if not self._has_prefill:
            if getattr(config, "prefill_chunk_size", None) is not None:
                raise ValueError("prefill_chunk_size cannot be honoured with this transformers")
            length = input_ids.shape[1]
            self._kwargs = model._get_initial_cache_position(length, input_ids.device, model_kwargs)

    def optimised(self) -> Any:
        """Around the loop."""
        optimise = getattr(self._model, "_optimize_model_for_decode", nullcontext)
        return optimise()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The last logits of each row: ``(rows, vocab_size)``, in the model's dtype."""
        model, options = self._model, {}
        if self._forward is None:
            if self._has_prefill:
                outputs = model._prefill(input_ids, self._config, self._kwargs)
            else:
                inputs = model.prepare_inputs_for_generation(input_ids, **self._kwargs)
                outputs = model(**inputs, return_dict=True)
            compiles = model._valid_auto_compile_criteria(self._kwargs, self._config)
            self._forward = model
            if compiles:
                self._forward = model.get_compiled_call(self._config.compile_config)
        else:
            if self._has_prefill:
                options["next_sequence_length"] = 1 if self._kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, **options, **self._kwargs)
            outputs = self._forward(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits.to(input_ids.device)
