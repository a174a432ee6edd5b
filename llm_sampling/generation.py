"""A generation loop on a causal language model, and its tokens as text while they come.

    input_ids -> model -> logits -> Sampler -> Step -> TextDecoder -> text

The loop works with any Hugging Face causal LM and imports neither transformers nor a tokenizer.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_sampling.backends import raise_on_status
from llm_sampling.sampler import Sampler

NO_TOKEN = -1

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of :func:`stream` gave.

    Attributes:
        tokens: the token of each row, an end token included; -1 in a row that ended in an earlier
            step.
        ended: for each row, whether it has drawn an end token, in this step or before.
        model_seconds: time spent in the model.
        sampler_seconds: time spent drawing the tokens, the wait for them on the host included.
    """

    tokens: list[int]
    ended: list[bool]
    model_seconds: float
    sampler_seconds: float


def stream(
    model: torch.nn.Module,
    input_ids: Tensor,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
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

    Raises:
        ValueError: an argument is out of its range, or the model keeps no KV cache.
        InvalidLogitsError: the model's logits leave a row without a token, or hold NaN or +inf.

    On a device that works ahead of the host, the wait for the model counts as ``sampler_seconds``.

    Example:
        >>> sampler = Sampler(SamplingParams(top_k=50, seed=1), vocab_size=model.config.vocab_size)
        >>> for step in stream(model, input_ids, sampler, max_new_tokens=20):
        ...     print(step.tokens)
    """
    # Checked here, since a generator's code does not run before its first value is asked for.
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids must have shape (rows, length) with length >= 1, "
            f"got {tuple(input_ids.shape)}"
        )
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if sampler.num_samples != 1:
        raise ValueError(f"sampler must have num_samples 1, got {sampler.num_samples}")
    if sampler.rows != input_ids.shape[0]:
        raise ValueError(
            f"sampler must have one row per row of input_ids ({input_ids.shape[0]}), "
            f"got {sampler.rows}"
        )
    return _steps(model, input_ids, sampler, max_new_tokens, frozenset(eos_token_ids))


def _steps(
    model: torch.nn.Module,
    input_ids: Tensor,
    sampler: Sampler,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
) -> Iterator[Step]:
    options: dict[str, Any] = {"use_cache": True}
    # A long prompt's logits would take its length times the vocabulary; only the last row counts.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    cache: Any = None
    ended = [False] * input_ids.shape[0]
    for _ in range(max_new_tokens):
        start = time.perf_counter()
        # Entered for each call: around the yield it would also hold for the caller's code.
        with torch.inference_mode():
            output = model(input_ids=input_ids, past_key_values=cache, **options)
            logits = output.logits[:, -1]
        cache = output.past_key_values
        if cache is None:
            raise ValueError(f"model must return a KV cache, {type(model).__name__} returned none")
        model_done = time.perf_counter()

        drawn = sampler(logits)
        tokens = drawn.tokens.tolist()
        if min(tokens) < 0:
            raise_on_status(drawn.status)
        sampler_done = time.perf_counter()

        reported = [NO_TOKEN if done else token for done, token in zip(ended, tokens, strict=True)]
        ended = [done or token in eos_token_ids for done, token in zip(ended, tokens, strict=True)]
        yield Step(reported, list(ended), model_done - start, sampler_done - model_done)
        if all(ended):
            return
        input_ids = drawn.tokens.unsqueeze(-1)


class TextDecoder:
    """Turns one row's tokens into text, piece by piece, as they come.

    A token need not be a whole character, and a tokenizer may drop a space at the start of what it
    decodes. So each piece is the difference of two decodings that begin with the same older tokens,
    and it is held back while it ends inside a character. Together the pieces are the decoding of
    prompt and tokens less that of the prompt, without special tokens and without a last character
    that never became whole.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the tokens that the text continues; their own text is not emitted.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids)
        self._emitted_tokens = len(self._window)
        self._emitted_text = self._text(self._window)

    def decode(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty."""
        self._window.append(token)
        text = self._text(self._window)
        if len(text) <= len(self._emitted_text) or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        piece = text[len(self._emitted_text) :]
        # The next window starts at tokens whose text is out, so its length stays bounded.
        self._window = self._window[self._emitted_tokens :]
        self._emitted_tokens = len(self._window)
        self._emitted_text = self._text(self._window)
        return piece

    def finish(self) -> str:
        """The text held back so far, less a trailing incomplete character; for the end, once."""
        held = self._text(self._window)[len(self._emitted_text) :]
        return held.rstrip(REPLACEMENT_CHARACTER)

    def _text(self, tokens: list[int]) -> str:
        # The clean-up rewrites spaces that are out already.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
