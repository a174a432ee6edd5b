"""Generation loops on a causal language model, and their tokens as text while they come.

    prompts -> model -> logits -> Sampler -> Step -> RowText -> Chunk

:func:`generate` and :func:`generate_stream` do all of it, :func:`stream` goes up to the Step.
They work with any Hugging Face causal LM, or any callable, and import neither transformers nor a
tokenizer.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_sampling.backends.base import InvalidLogitsError, raise_on_status, status_reasons
from llm_sampling.checks import integer_at_least, token_ids, true_or_false
from llm_sampling.generation.config import check_config, declared_ids, with_rules_of_config
from llm_sampling.generation.prompts import Prompts, check_holds_integers, padded, prompt_ids
from llm_sampling.generation.rows import (
    FinishReason,
    Listed,
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
    starts_of_prompts,
    stop_ids_of_prompts,
    stops_of_prompts,
    top_logprobs_of_prompts,
)
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.history import check_vocab_size
from llm_sampling.params import SamplingParams
from llm_sampling.results import Kind, SampleOutput
from llm_sampling.sampler import Sampler
from llm_sampling.step_masks import MaskCallback, check_callback

#: What a :class:`Step` reports for a row that has ended.
NO_TOKEN = -1
#: The rank where there is no token.
NO_RANK = -1

#: Token ids and a cache in, logits ``(rows, vocab_size)`` and the new cache out.
Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step gave one row.

    Attributes:
        index: the row.
        token: the token that it drew, an end token included; -1 where the row ends in an error.
        text: the text that became certain; None without a tokenizer.
        logprob: natural logarithm of the token's probability; None if not asked for.
        rank: the token's place in the order, from 1, as in
            :class:`~llm_sampling.results.TokenLogprobs`; -1 where there is no token; None if
            ``top_logprobs`` was not given.
        top_logprobs: the first tokens of the order, from the best on, with their logprobs; fewer
            than asked for where no more have one; None if not asked for.
        finish_reason: None while the row goes on; "stop" after an end token or a stop string;
            "length" after ``max_new_tokens``; "error" where the model's logits for the row hold NaN
            or +inf, or leave it without a token.
        stop_reason: the stop string or the id of ``stop_token_ids`` that ended the row; None after
            the model's own end token; what was wrong with the logits after an error.
        step: 1 for the first tokens.
        model_seconds: time that this step of all rows spent in the model.
        sampler_seconds: time that it spent drawing the tokens, the wait for them on the host
            included.
    """

    index: int
    token: int
    text: str | None
    logprob: float | None
    rank: int | None
    top_logprobs: dict[int, float] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    step: int
    model_seconds: float
    sampler_seconds: float


@dataclass(frozen=True, slots=True)
class Completion:
    """What one row gave.

    Attributes:
        text: the generated text without special tokens, and without the stop string that ended it
            unless ``include_stop_str_in_output``; None without a tokenizer.
        token_ids: all tokens that were drawn here, including the end token or those of the stop
            string.
        logprobs: of each token; None if not asked for.
        finish_reason: as that of :class:`Chunk`, and so is ``stop_reason``.
        ranks: of each token; None if ``top_logprobs`` was not given.
        top_logprobs: what the :class:`Chunk` of each token lists; None if not asked for.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    ranks: list[int] | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of :func:`stream` gave.

    Attributes:
        tokens: the token of each row, an end token included; -1 in a row that ended in an earlier
            step, or that could not draw one.
        ended: for each row, whether it has drawn an end token, in this step or before, or could not
            draw any.
        model_seconds: time spent in the model.
        sampler_seconds: time spent drawing the tokens, the wait for them on the host included.
    """

    tokens: list[int]
    ended: list[bool]
    model_seconds: float
    sampler_seconds: float


# ---- public functions ----


def generate(
    model: torch.nn.Module | Callable[..., Any],
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams],
    **options: Any,
) -> list[Completion]:
    """Generate a text for each prompt.

    All arguments are those of :func:`generate_stream`, and so is what it raises.

    Returns:
        One :class:`Completion` a row: ``n`` for the first prompt, then those of the second, ...

    Example:
        >>> params = SamplingParams(temperature=0.8, top_p=0.9, seed=1)
        >>> done = generate(model, ["Once", "Twice"], params, tokenizer=tokenizer, stop=".")
        >>> print(done[0].text, done[0].finish_reason)
    """
    return completions(generate_stream(model, prompts, params, **options))


def completions(chunks: Iterable[Chunk]) -> list[Completion]:
    """Join the chunks of :func:`generate_stream` to one :class:`Completion` a row, in order."""
    rows: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        rows.setdefault(chunk.index, []).append(chunk)
    return [_completion(rows[index]) for index in sorted(rows)]


def generate_stream(
    model: torch.nn.Module | Callable[..., Any],
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams],
    *,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    n: int = 1,
    max_new_tokens: int | Sequence[int] = 128,
    min_new_tokens: int | Sequence[int] = 0,
    stop: Stop | Sequence[Stop] = None,
    stop_limit: int = 1,
    include_stop_str_in_output: bool = False,
    stop_token_ids: Collection[int] | Sequence[Collection[int] | None] = (),
    eos_token_ids: Collection[int] | None = None,
    ignore_eos: bool = False,
    logprobs: Kind | Sequence[Kind | None] | None = None,
    top_logprobs: int | Sequence[int | None] | None = None,
    position: int | Sequence[int] | None = None,
    output_ids: Sequence[Sequence[int]] | None = None,
    check: bool = False,
    backend: str = "auto",
    allowed_mask: MaskCallback | None = None,
) -> Iterator[Chunk]:
    """Generate a text for each prompt, and give its pieces as they come.

    Each step is one call of the model and one of the kernel, for all rows. A row's tokens depend on
    nothing but its logits, parameters, history, seed and position; but the model's own arithmetic
    may give a row other logits beside other rows, by its batch or its padding.

    ``max_new_tokens``, ``min_new_tokens``, ``stop``, ``stop_token_ids``, ``logprobs``,
    ``top_logprobs`` and ``position`` may be given for each prompt: a list of as many as there are
    prompts.

    A generation config of the model contributes its end tokens, and ``no_repeat_ngram_size``,
    ``bad_words_ids``, ``min_new_tokens`` and ``min_length`` for the rows whose ``params`` leave
    that rule off. Its fields for temperature, ``top_k``, ``top_p``, ``min_p``,
    ``repetition_penalty`` and the longest text are not used, since ``params`` and the arguments say
    them; one that changes the tokens in another way is refused.

    Args:
        model: a Hugging Face causal LM, or any callable ``model(input_ids, cache)`` that returns
            logits ``(rows, vocab_size)``, or a tuple of those and the cache for its next call.
            input_ids are int64: first all prompts ``(rows, length)`` and None, then the last tokens
            ``(rows, 1)``, or several where ``allowed_mask`` has forced some in all rows.
        prompts: texts, for which ``tokenizer`` is needed; or lists of ids; or int64 ``(rows,
            length)``; or what a tokenizer returns, ``input_ids`` with an ``attention_mask``, padded
            on the left. Those of unequal length are padded here; a callable gets equal ones only.
        params: one for all prompts, or one a prompt. A row's tokens do not depend on its place:
            prompts with the same seed draw with the same random numbers.
        tokenizer: a Hugging Face tokenizer; without one there is no text.
        vocab_size: the width of the logits. Default: that of the model's config.
        n: rows for each prompt; row i of a prompt has the parameters ``seeded(params, i)``.
        max_new_tokens: at least 1.
        min_new_tokens: until a row has this many tokens, no end token is drawn and no stop string
            counts.
        stop: a string that ends a text, or several. Only the text that is generated here is
            searched for them. For each prompt: a list with None or a collection of strings for
            each.
        stop_limit: the text ends at this occurrence, counted over all of ``stop``.
        include_stop_str_in_output: whether the text includes the stop string that ended it.
        stop_token_ids: tokens that end a row, besides those of its parameters. For each prompt: a
            list of collections.
        eos_token_ids: tokens that end a row without a ``stop_reason``. Default: those of the
            model's generation config.
        ignore_eos: whether ``eos_token_ids`` are tokens like any other.
        logprobs: "processed", "raw" or None, as for :func:`~llm_sampling.sample`.
        top_logprobs: how many of the best tokens each step lists with their logprobs, besides the
            rank of the token; they are of the kind that ``logprobs`` says. At most 1,024; 0 gives
            ranks alone, None nothing.
        position: how many tokens each prompt's text has already, which chooses its random numbers:
            a text of 10 tokens is one of 5, and 5 more from position 5. Default: the number of
            ``output_ids``.
        output_ids: the tokens that each prompt's text has already, a list of ids for each prompt.
            They come after the prompt, and for the penalties they are output. They are needed where
            ``position`` is not 0 and a penalty is for the output alone.
        check: whether a row whose logits hold NaN or +inf, or leave it without a token, raises an
            error. By default it ends, with the ``finish_reason`` "error", and the others go on.
        backend: as for :class:`~llm_sampling.Sampler`.
        allowed_mask: a callback that is asked before each step which tokens may be drawn, as for
            :class:`~llm_sampling.Sampler`; rows that have ended it is not asked for. Tokens that it
            forces in all rows that go on are given to the model in one call, unless "raw" logprobs
            are asked for; other forced tokens come one in each step.

    Yields:
        A :class:`Chunk` for each row that goes on, in each step; the last of a row has a
        ``finish_reason``.

    Raises:
        ValueError: an argument is out of its range, or is missing for another; or the model's
            generation config has a field that cannot be honoured.
        InvalidLogitsError: with ``check``, at such a row.
    """
    # This function checks, and _chunks is the generator: a generator's own code does not run
    # before its first value is asked for.
    if not callable(model):
        raise ValueError(f"model must be a callable, got {type(model).__name__}")
    n = integer_at_least("n", n, 1)
    true_or_false("include_stop_str_in_output", include_stop_str_in_output)
    true_or_false("ignore_eos", ignore_eos)
    true_or_false("check", check)
    requests = prompt_ids(prompts, tokenizer)
    params = params_of_prompts(params, len(requests))
    if len(params) != len(requests):
        raise ValueError(
            f"params must have one for each of {len(requests)} prompts, got {len(params)}"
        )
    most = counts_of_prompts("max_new_tokens", max_new_tokens, len(requests), 1)
    least = counts_of_prompts("min_new_tokens", min_new_tokens, len(requests), 0)
    for low, high in zip(least, most, strict=True):
        if low > high:
            raise ValueError(
                f"min_new_tokens must be at most {high}, which is max_new_tokens, got {low}"
            )
    kinds = logprobs_of_prompts(logprobs, len(requests))
    counts = top_logprobs_of_prompts(top_logprobs, kinds)
    positions, outputs = starts_of_prompts(params, position, output_ids)
    language_model = _language_model(model)
    vocab_size = _vocab_size(language_model, vocab_size)
    _check_prompts("prompts", requests, vocab_size)
    _check_prompts("output_ids", outputs, vocab_size)
    check_callback(allowed_mask)
    stops = stops_of_prompts(stop, len(requests))
    config = getattr(language_model, "generation_config", None)
    check_config(config, takes_stop_strings=stop is not None)
    if eos_token_ids is None:
        eos_token_ids = _declared_eos(language_model)
    given = stop_ids_of_prompts(stop_token_ids, len(requests))
    stop_ids = [[*ids, *(row.stop_token_ids or ())] for ids, row in zip(given, params, strict=True)]
    ends = [_end_tokens(eos_token_ids, ignore_eos, ids, vocab_size) for ids in stop_ids]
    # After the ends: what the config bans for a while does not end a text by that.
    params = [
        with_rules_of_config(
            row,
            config,
            end_ids=() if ignore_eos else eos_token_ids,
            prompt_length=len(ids),
            has_least=low > 0,
        )
        for row, ids, low in zip(params, requests, least, strict=True)
    ]

    places = [place for place in range(len(requests)) for _ in range(n)]
    row_stops = [
        StopStrings(stops[place], stop_limit=stop_limit, include=include_stop_str_in_output)
        for place in places
    ]
    if tokenizer is None and any(one.is_on for one in row_stops):
        raise ValueError("tokenizer must be given for stop")
    texts = [requests[place] + outputs[place] for place in places]
    rows = [
        Row(
            ends[place],
            most[place],
            least[place],
            None if tokenizer is None else RowText(tokenizer, text, row_stop),
        )
        for place, text, row_stop in zip(places, texts, row_stops, strict=True)
    ]
    device = getattr(model, "device", torch.device("cpu"))
    input_ids, attention_mask = padded(texts, device)
    if attention_mask is not None and language_model is None:
        lengths = sorted({len(text) for text in texts})
        raise ValueError(f"prompts must be of one length for a callable, got {lengths}")
    row_logprobs = RowLogprobs(
        [kinds[place] for place in places],
        device,
        is_model=True,
        counts=[counts[place] for place in places],
    )
    if allowed_mask is not None:
        written = [outputs[place] for place in places]
        allowed_mask = callback_of_prompts(allowed_mask, n, written, [row.ends for row in rows])
    sampler = new_sampler(
        params_of_sequences(params, n),
        lambda: ([requests[place] for place in places], [outputs[place] for place in places]),
        [positions[place] for place in places],
        vocab_size=vocab_size,
        device=device,
        logprobs=row_logprobs.of_sampler,
        top_logprobs=row_logprobs.top_logprobs,
        backend=backend,
        max_new_tokens=max(most),
        allowed_mask=allowed_mask,
    )
    forward = (
        _callable_forward(model)
        if language_model is None
        else _module_forward(language_model, attention_mask)
    )
    masks = masks_without_ends(rows, sampler)
    draws = _draws(forward, input_ids, sampler, max(most), masks, row_logprobs)
    has_logprobs = [kinds[place] is not None for place in places]
    return _chunks(draws, rows, has_logprobs, check)


def stream(
    model: torch.nn.Module,
    input_ids: Tensor,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    allowed_mask: MaskCallback | None = None,
) -> Iterator[Step]:
    """Generate tokens step by step: the whole prompt once, then one token per row on the KV cache.

    Ends when every row has drawn an end token, or after ``max_new_tokens`` steps. A row that has
    ended stays in the batch until then; what it draws is not reported.

    Args:
        model: a Hugging Face causal LM, or any module with its call: ``input_ids``,
            ``past_key_values`` and ``use_cache`` in, ``logits`` and ``past_key_values`` out.
        input_ids: int64 ``(rows, length)`` on the model's device; prompts of one length, unpadded.
        sampler: a :class:`~llm_sampling.Sampler` of as many rows with ``num_samples=1``, fresh for
            these prompts: where a penalty is on, its history holds their ids.
        max_new_tokens: at least 1.
        eos_token_ids: the tokens that end a row.
        allowed_mask: as for :func:`generate_stream`. The Sampler gets it, and must not have a
            callback of its own beside it.

    Raises:
        ValueError: an argument is out of its range, or the model keeps no KV cache.
        InvalidLogitsError: the Sampler checks, and the logits of a row that goes on leave it
            without a token, or hold NaN or +inf.

    On a device that works ahead of the host, the wait for the model counts as ``sampler_seconds``.

    Example:
        >>> sampler = Sampler(SamplingParams(top_k=50, seed=1), vocab_size=model.config.vocab_size)
        >>> for step in stream(model, input_ids, sampler, max_new_tokens=20):
        ...     print(step.tokens)
    """
    # As in generate_stream, _steps is the generator.
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a torch.Tensor, got {type(input_ids).__name__}")
    check_holds_integers("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids must have shape (rows, length) with length >= 1, "
            f"got {tuple(input_ids.shape)}"
        )
    max_new_tokens = integer_at_least("max_new_tokens", max_new_tokens, 1)
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a Sampler, got {type(sampler).__name__}")
    if sampler.num_samples != 1:
        raise ValueError(f"sampler must have num_samples 1, got {sampler.num_samples}")
    if sampler.rows != input_ids.shape[0]:
        raise ValueError(
            f"sampler must have one row per row of input_ids ({input_ids.shape[0]}), "
            f"got {sampler.rows}"
        )
    ends = frozenset(token_ids("eos_token_ids", eos_token_ids))
    check_callback(allowed_mask)
    if allowed_mask is not None:
        if sampler.allowed_mask is not None:
            raise ValueError("allowed_mask must be None where the sampler has a callback")
        rows = sampler.rows
        sampler.set_allowed_mask(callback_of_prompts(allowed_mask, 1, [()] * rows, [ends] * rows))
    draws = _draws(_module_forward(model, None), input_ids, sampler, max_new_tokens)
    return _steps(draws, input_ids.shape[0], ends)


# ---- arguments, and the call of the model ----


def _language_model(model: object) -> Any:
    """``model`` if it is a module with a config, as Hugging Face's are; None for a callable."""
    return model if isinstance(model, torch.nn.Module) and hasattr(model, "config") else None


def _vocab_size(language_model: Any, vocab_size: int | None) -> int:
    if vocab_size is None:
        if language_model is None:
            raise ValueError("vocab_size must be given where the model has no config")
        vocab_size = language_model.config.get_text_config().vocab_size
    return check_vocab_size(vocab_size)


def _check_prompts(name: str, rows: list[list[int]], vocab_size: int) -> None:
    for row in filter(None, rows):
        for token in (min(row), max(row)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} must hold ids in 0 .. {vocab_size - 1}, got {token}")


def _declared_eos(language_model: Any) -> list[int]:
    """The end tokens of the model's generation config; of its config if it has none."""
    if language_model is None:
        return []
    config = getattr(language_model, "generation_config", None) or language_model.config
    return declared_ids(getattr(config, "eos_token_id", None))


def _end_tokens(
    eos_token_ids: Collection[int],
    ignore_eos: bool,
    stop_token_ids: list[int],
    vocab_size: int,
) -> dict[int, int | None]:
    """Each token that ends a row, and the ``stop_reason`` that it gives: None for an eos token."""
    eos = token_ids("eos_token_ids", eos_token_ids)
    ends: dict[int, int | None] = {token: token for token in stop_token_ids}
    if not ignore_eos:
        ends |= dict.fromkeys(eos)
    for token in ends:
        if not 0 <= token < vocab_size:
            raise ValueError(f"end tokens must be in 0 .. {vocab_size - 1}, got {token}")
    return ends


def _module_forward(model: torch.nn.Module, attention_mask: Tensor | None) -> Forward:
    """The call of a Hugging Face model, with position ids if prompts are padded on the left."""
    options: dict[str, Any] = {"use_cache": True}
    known = inspect.signature(model.forward).parameters
    # Only the last position's logits are needed; those of a long prompt take much memory.
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    # Since transformers 5.24 the argument has another name.
    cache_name = "cache" if "cache" in known else "past_key_values"
    mask = attention_mask

    def forward(input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        nonlocal mask
        if mask is not None:
            if cache is not None:
                mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
            options["attention_mask"] = mask
            if "position_ids" in known:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                options["position_ids"] = positions[:, -input_ids.shape[1] :]
        output = model(input_ids=input_ids, **{cache_name: cache}, **options)
        cache = getattr(output, cache_name)
        if cache is None:
            raise ValueError(f"model must return a KV cache, {type(model).__name__} returned none")
        return output.logits[:, -1], cache

    return forward


def _callable_forward(model: Callable[..., Any]) -> Forward:
    """The call of any other model, ``model(input_ids, cache)``."""

    def forward(input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids, cache)
        logits, cache = output if isinstance(output, tuple) else (output, cache)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            raise ValueError(
                "model must return logits of shape (rows, vocab_size) or (rows, length, "
                f"vocab_size), or a tuple of them and a cache, got {output!r}"
            )
        return (logits if logits.dim() == 2 else logits[:, -1]), cache

    return forward


# ---- the loop ----


@dataclass(frozen=True, slots=True)
class _Draw:
    """One token of each row, what is wrong with it, its logprobs, and where the time went."""

    tokens: list[int]
    status: list[int]
    logprobs: list[float] | None
    listed: list[Listed | None] | None
    model_seconds: float
    sampler_seconds: float


def _draws(
    forward: Forward,
    input_ids: Tensor,
    sampler: Sampler,
    max_new_tokens: int,
    masks: Sequence[Tensor] = (),
    row_logprobs: RowLogprobs | None = None,
) -> Generator[_Draw, Sequence[bool] | None, None]:
    """A token of each row, step after step; the caller sends which rows have ended.

    Args:
        forward: the call of the model.
        input_ids: the prompts.
        sampler: what draws.
        max_new_tokens: how many steps there are.
        masks: the ``allowed_mask`` of the first steps.
        row_logprobs: makes the logprobs and lists.
    """
    cache: Any = None
    ended: Sequence[bool] | None = None
    has_callback = sampler.allowed_mask is not None
    may_jump = has_callback and not (row_logprobs is not None and row_logprobs.any_raw)
    step = 0
    while step < max_new_tokens:
        start = time.perf_counter()
        # Entered for each call: around the yield it would also hold for the caller's code.
        with torch.inference_mode():
            logits, cache = forward(input_ids, cache)
        model_done = time.perf_counter()
        if has_callback and ended is not None:
            sampler.end([row for row, done in enumerate(ended) if done])
        drawn = _drawn(sampler, logits, masks[step] if step < len(masks) else None, ended)
        tokens, status = torch.stack([drawn.tokens, drawn.status]).tolist()
        logprobs = listed = None
        if row_logprobs is not None and (found := row_logprobs(drawn, logits)) is not None:
            logprobs = found.tolist()
            if row_logprobs.top_logprobs is not None:
                listed = row_logprobs.top(drawn)
        sampler_done = time.perf_counter()
        times = (model_done - start, sampler_done - model_done)
        ended = yield _Draw(tokens, status, logprobs, listed, *times)
        step += 1
        # The model gets some token for a row that has none, whose logits are not looked at again.
        input_ids = drawn.tokens.clamp(min=0).unsqueeze(-1)
        if may_jump and ended is not None and step >= len(masks):
            forced = _jump(sampler, ended, max_new_tokens - step)
            certain = None if logprobs is None else [0.0] * len(tokens)
            for tokens in forced:
                if row_logprobs is not None and listed is not None:
                    listed = [row_logprobs.forced(token, row) for row, token in enumerate(tokens)]
                ended = yield _Draw(tokens, [0] * len(tokens), certain, listed, 0.0, 0.0)
            step += len(forced)
            if forced:
                input_ids = torch.cat([input_ids, input_ids.new_tensor(forced).T], dim=1)


def _jump(sampler: Sampler, ended: Sequence[bool], most: int) -> list[list[int]]:
    """Append the forced tokens that all rows that go on have, at most so many, without a draw.

    All rows of a model's call have the same number of tokens.

    Returns:
        For each such step the tokens of the rows; those of a row that has ended are 0.
    """
    of_rows = sampler.forced
    going = [row for row, done in enumerate(ended) if not done]
    count = min([most, *(len(of_rows[row]) for row in going)]) if going else 0
    if count > 0:
        for row in going:
            sampler.extend(row, of_rows[row][:count])
    return [
        [0 if done else forced[step] for forced, done in zip(of_rows, ended, strict=True)]
        for step in range(count)
    ]


def _drawn(
    sampler: Sampler, logits: Tensor, mask: Tensor | None, ended: Sequence[bool] | None
) -> SampleOutput:
    """A step of the sampler, to which the logits of rows that have ended do not matter."""
    options = {} if mask is None else {"allowed_mask": mask}
    try:
        return sampler(logits, **options)
    except InvalidLogitsError as error:  # from a sampler that checks; no row has advanced
        if ended is None or not all(ended[row] for row in error.rows):
            raise
        logits = logits.clone()
        logits[error.rows] = 0
        return sampler(logits, **options)


def _steps(
    draws: Generator[_Draw, Sequence[bool] | None, None], rows: int, ends: Collection[int]
) -> Iterator[Step]:
    """The steps of :func:`stream`, until all rows have ended."""
    ended = [False] * rows
    draw = next(draws)
    while True:
        drawn = list(zip(ended, draw.tokens, strict=True))
        reported = [NO_TOKEN if done else token for done, token in drawn]
        ended = [done or token in ends or token < 0 for done, token in drawn]
        yield Step(reported, list(ended), draw.model_seconds, draw.sampler_seconds)
        if all(ended):
            return
        try:
            draw = draws.send(ended)
        except StopIteration:
            return


def _chunks(
    draws: Generator[_Draw, Sequence[bool] | None, None],
    rows: Sequence[Row],
    has_logprobs: Sequence[bool],
    check: bool,
) -> Iterator[Chunk]:
    """The chunks of :func:`generate_stream`, until all rows have ended."""
    going = list(range(len(rows)))
    draw = next(draws)
    for step in itertools.count(1):
        if check and any(draw.status[index] for index in going):
            statuses = [bits if index in going else 0 for index, bits in enumerate(draw.status)]
            raise_on_status(torch.tensor(statuses))
        for index in list(going):
            row, token, status = rows[index], draw.tokens[index], draw.status[index]
            logprob = None
            if draw.logprobs is not None and has_logprobs[index]:
                logprob = draw.logprobs[index]
            listed = None if draw.listed is None else draw.listed[index]
            if status == 0:
                text = row.add(token)
            else:
                token, text = NO_TOKEN, row.fail(status_reasons(status))
                logprob = None if logprob is None else math.nan
                listed = None if listed is None else (NO_RANK, {})
            rank, top = (None, None) if listed is None else listed
            if row.finish_reason is not None:
                going.remove(index)
            yield Chunk(
                index=index,
                token=token,
                text=text,
                logprob=logprob,
                rank=rank,
                top_logprobs=top,
                finish_reason=row.finish_reason,
                stop_reason=row.stop_reason,
                step=step,
                model_seconds=draw.model_seconds,
                sampler_seconds=draw.sampler_seconds,
            )
        if not going:
            return
        draw = draws.send([row.finish_reason is not None for row in rows])


def _completion(chunks: list[Chunk]) -> Completion:
    """One row's chunks, joined."""
    last = chunks[-1]
    assert last.finish_reason is not None
    texts = [chunk.text for chunk in chunks if chunk.text is not None]
    drawn = [chunk for chunk in chunks if chunk.token != NO_TOKEN]
    logprobs = [chunk.logprob for chunk in drawn if chunk.logprob is not None]
    ranks = [chunk.rank for chunk in drawn if chunk.rank is not None]
    top = [chunk.top_logprobs for chunk in drawn if chunk.top_logprobs is not None]
    return Completion(
        text=None if last.text is None else "".join(texts),
        token_ids=[chunk.token for chunk in drawn],
        logprobs=None if last.logprob is None else logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        ranks=None if last.rank is None else ranks,
        top_logprobs=None if last.top_logprobs is None else top,
    )
