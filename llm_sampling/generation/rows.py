"""What a generation loop has for each of its rows: parameters, history, end tokens and text.

Shared by :mod:`llm_sampling.generation.loop` and :mod:`llm_sampling.integrations.huggingface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from llm_sampling.backends.base import Logprobs
from llm_sampling.checks import refusal
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.generation.text import TextDecoder
from llm_sampling.history import Ids, TokenHistory
from llm_sampling.params import SamplingParams, list_of_params
from llm_sampling.sampler import Sampler


def params_of_prompts(params: object, prompts: int) -> list[SamplingParams]:
    """``params`` as a list: one SamplingParams repeated ``prompts`` times, or the given sequence.

    Raises:
        ValueError: it is neither a SamplingParams nor a sequence of them. The caller checks the
            length of a sequence.
    """
    try:
        return list_of_params(params, prompts)
    except ValueError:
        # Unlike the core, the loops show the whole value.
        raise refusal("params", "a SamplingParams or a sequence of them", params) from None


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sequence ``index`` of a request: its seed + ``index``, modulo 2^64."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index) % 2**64)


def params_of_sequences(params: Iterable[SamplingParams], n: int) -> list[SamplingParams]:
    """The parameters of ``n`` sequences of each request: all of the first, then of the second."""
    return [seeded(request, index) for request in params for index in range(n)]


def prompt_history(
    params: Iterable[SamplingParams],
    prompts: Callable[[], Ids],
    vocab_size: int,
    device: torch.device,
    max_new_tokens: int,
) -> TokenHistory | None:
    """The history of the prompts, or None if no row has a penalty.

    Args:
        params: one a row.
        prompts: gives the ids of each row without padding. It is called only if a row has a
            penalty, because it may have to wait for the device.
        vocab_size: the width of the logits.
        device: that of the logits.
        max_new_tokens: how many tokens of each row there is room for, where a row has
            ``penalty_last_n``; elsewhere there is room for any number.
    """
    rows = list(params)
    if not any(row.needs_history for row in rows):
        return None
    ids = prompts()
    if not any(row.needs_history and row.has_window for row in rows):
        return TokenHistory.from_ids(ids, None, vocab_size, device=device)
    return TokenHistory.from_ids(
        ids,
        None,
        vocab_size,
        max_length=max(map(len, ids)) + max_new_tokens,
        penalty_last_n=[row.penalty_last_n for row in rows],
        device=device,
    )


def new_sampler(
    params: Sequence[SamplingParams],
    prompts: Callable[[], Ids],
    *,
    vocab_size: int,
    device: torch.device,
    logprobs: Logprobs | None,
    backend: str,
    max_new_tokens: int,
) -> Sampler:
    """A Sampler of these rows, with the history of their prompts; see :func:`prompt_history`."""
    return Sampler(
        params,
        vocab_size=vocab_size,
        history=prompt_history(params, prompts, vocab_size, device, max_new_tokens),
        logprobs=logprobs,
        backend=backend,
        device=device,
    )


def declared_ids(declared: int | Iterable[int] | None) -> list[int]:
    """The ids of a config's ``eos_token_id``, which may be None, an id or several."""
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


class RowText:
    """The text of one row, which its tokens continue until a stop string ends it.

    Stop strings are searched in the text of the tokens with special tokens spelt out, so a special
    token between two pieces of text separates them. The text that is returned has no special
    tokens, except those in a stop string that is included.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the ids that the text continues; their own text is not searched or returned.
        stop: the row's stop strings; no other row may share the object.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: StopStrings) -> None:
        self._decoder = TextDecoder(tokenizer, prompt_ids)
        self._stop = stop

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stop.found

    def feed(self, token: int, *, may_stop: bool = True, is_end: bool = False) -> str:
        """The text that became certain with ``token``.

        Args:
            token: the row's next token.
            may_stop: whether a stop string that this token completes counts.
            is_end: whether the token ends the row. Like that of a special token, its text is
                searched and not returned.
        """
        if not self._stop.is_on:
            return "" if is_end else self._decoder.decode(token)
        special = self._decoder.special_text(token)
        if not special and not is_end:
            return self._stop.feed(self._decoder.decode(token), may_stop=may_stop)
        text = self._stop.feed(self._decoder.finish(), may_stop=may_stop) if is_end else ""
        unshown = special or self._decoder.decode(token)
        return text + self._stop.feed(unshown, may_stop=may_stop, is_shown=False)

    def finish(self, *, may_stop: bool = True) -> str:
        """The text that was held back, for a row whose tokens have ended; empty after a stop."""
        if self._stop.found is not None:
            return ""
        return self._stop.feed(self._decoder.finish(), may_stop=may_stop) + self._stop.finish()
