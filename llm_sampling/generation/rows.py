"""What a generation loop has for each of its rows: parameters, history, when it ends, and text.

Shared by :mod:`llm_sampling.generation.loop` and :mod:`llm_sampling.integrations.huggingface`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_sampling.checks import integer_at_least, refusal, token_ids
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.generation.text import TextDecoder
from llm_sampling.history import Ids, TokenHistory
from llm_sampling.masks import Mask
from llm_sampling.params import SamplingParams, as_int64, checked_position, list_of_params
from llm_sampling.reference import philox, raw_logprobs
from llm_sampling.results import KINDS, Kind, SampleOutput, TokenLogprobs, list_length
from llm_sampling.sampler import Sampler
from llm_sampling.step_masks import MaskCallback, MaskStep

FinishReason = Literal["stop", "length", "error"]
#: The stop strings of a text.
Stop = str | Collection[str] | None
Option = TypeVar("Option")

#: The stream of Philox that makes the seeds of a request's sequences.
_SEQUENCE_STREAM = 5


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
    """The parameters of sequence ``index`` of a request for several texts.

    Sequence 0 has the request's seed, and every other one a seed that Philox makes of it, by
    docs/semantics.md, "Random bits". Without a seed the parameters are the request's.
    """
    if params.seed is None or index == 0:
        return params
    key = torch.tensor([as_int64(params.seed)])
    low, high, *_ = philox(key, torch.zeros_like(key), index, _SEQUENCE_STREAM)
    return replace(params, seed=int(low) + (int(high) << 32))


def params_of_sequences(params: Iterable[SamplingParams], n: int) -> list[SamplingParams]:
    """The parameters of ``n`` sequences of each request: all of the first, then of the second."""
    return [seeded(request, index) for request in params for index in range(n)]


# ---- options that may be given for each prompt ----


def for_each_prompt(
    name: str, given: object, prompts: int, check: Callable[[str, Any], Option]
) -> list[Option]:
    """A checked option for each prompt.

    Args:
        name: the argument's name, for messages.
        given: one value for all prompts; or a list, tuple, array or tensor of one a prompt.
        prompts: how many there are.
        check: returns the value to use, or raises a ValueError.
    """
    values = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
    if not isinstance(values, (list, tuple)):
        return [check(name, values)] * prompts
    if len(values) != prompts:
        raise ValueError(f"{name} must have one for each of {prompts} prompts, got {len(values)}")
    return [check(name, value) for value in values]


def counts_of_prompts(name: str, given: object, prompts: int, least: int) -> list[int]:
    """An integer of at least ``least`` for each prompt; see :func:`for_each_prompt`."""
    return for_each_prompt(name, given, prompts, lambda name, n: integer_at_least(name, n, least))


def logprobs_of_prompts(given: object, prompts: int) -> list[Kind | None]:
    """``logprobs`` for each prompt; see :func:`for_each_prompt`."""
    return for_each_prompt("logprobs", given, prompts, _checked_logprobs)


def _checked_logprobs(name: str, kind: object) -> Kind | None:
    if kind not in (None, "processed", "raw"):
        raise refusal(name, 'None, "processed" or "raw"', kind)
    return kind


def top_logprobs_of_prompts(given: object, kinds: Sequence[Kind | None]) -> list[int | None]:
    """``top_logprobs`` for each prompt; see :func:`for_each_prompt`.

    Args:
        given: the argument.
        kinds: the ``logprobs`` of each prompt.
    """
    counts = for_each_prompt("top_logprobs", given, len(kinds), _checked_top_logprobs)
    if any(count is not None and kind is None for kind, count in zip(kinds, counts, strict=True)):
        raise ValueError('top_logprobs needs logprobs, "processed" or "raw", got None')
    return counts


def _checked_top_logprobs(name: str, count: object) -> int | None:
    return None if count is None else list_length(name, count, 0)


def stops_of_prompts(given: object, prompts: int) -> list[Any]:
    """``stop`` for each prompt, which StopStrings checks; see :func:`_is_for_each`."""
    if _is_for_each(given):
        return for_each_prompt("stop", given, prompts, lambda _, stop: stop)
    return [given] * prompts


def stop_ids_of_prompts(given: object, prompts: int) -> list[list[int]]:
    """``stop_token_ids`` for each prompt; see :func:`_is_for_each`."""
    if _is_for_each(given):
        return for_each_prompt("stop_token_ids", given, prompts, _checked_ids)
    return [_checked_ids("stop_token_ids", given)] * prompts


def _is_for_each(given: object) -> bool:
    """Whether a list has an entry for each prompt: None or a collection is among them."""
    return isinstance(given, (list, tuple)) and any(
        one is None or (isinstance(one, Collection) and not isinstance(one, str)) for one in given
    )


def _checked_ids(name: str, ids: object) -> list[int]:
    return [] if ids is None else token_ids(name, ids)


# ---- what the rows of a prompt start from ----


def starts_of_prompts(
    params: Sequence[SamplingParams], position: object, output_ids: object
) -> tuple[list[int], list[list[int]]]:
    """Where the text of each prompt goes on: its position, and the output that it has already.

    Args:
        params: one for each prompt.
        position: None, or as for :func:`for_each_prompt`.
        output_ids: None, or a sequence of token ids for each prompt.

    Raises:
        ValueError: an argument is not as above; or a position is given without ``output_ids``
            where a penalty is for the output.
    """
    prompts = len(params)
    outputs: list[list[int]] = [[] for _ in params]
    if output_ids is not None:
        if not isinstance(output_ids, (list, tuple, np.ndarray, Tensor)):
            raise refusal("output_ids", "a list of token ids for each prompt", output_ids)
        outputs = for_each_prompt("output_ids", output_ids, prompts, token_ids)
    if position is None:
        return [len(ids) for ids in outputs], outputs
    positions = for_each_prompt("position", position, prompts, checked_position)
    for index, (row, start) in enumerate(zip(params, positions, strict=True)):
        if output_ids is None and start != 0 and _needs_output(row):
            raise ValueError(
                "output_ids must be given beside position where frequency_penalty, "
                'presence_penalty or repetition_penalty_scope="output" is on: they are for the '
                f"output alone, got position {start} for prompt {index}"
            )
    return positions, outputs


def _needs_output(params: SamplingParams) -> bool:
    """Whether a penalty distinguishes the output from the prompt."""
    is_for_output = params.repetition_penalty_scope == "output"
    repetition = params.repetition_penalty != 1 and is_for_output
    return bool(params.frequency_penalty or params.presence_penalty or repetition)


def prompt_history(
    params: Iterable[SamplingParams],
    ids: Callable[[], tuple[Ids, Ids | None]],
    vocab_size: int,
    device: torch.device,
    max_new_tokens: int,
) -> TokenHistory | None:
    """The history of the prompts, or None if no row has a penalty.

    Args:
        params: one a row.
        ids: gives the ids of each row's prompt without padding, and those of its output so far. It
            is called only if a row has a penalty or a rule that looks at the history, because it
            may have to wait for the device.
        vocab_size: the width of the logits.
        device: that of the logits.
        max_new_tokens: how many tokens of each row there is room for, where a row needs the ids in
            order; elsewhere there is room for any number.
    """
    rows = list(params)
    if not any(row.needs_history for row in rows):
        return None
    prompts, outputs = ids()
    if not any(row.needs_text for row in rows):
        return TokenHistory.from_ids(prompts, outputs, vocab_size, device=device)
    lengths = list(map(len, prompts))
    if outputs is not None:
        lengths = [length + len(output) for length, output in zip(lengths, outputs, strict=True)]
    return TokenHistory.from_ids(
        prompts,
        outputs,
        vocab_size,
        max_length=max(lengths) + max_new_tokens,
        penalty_last_n=[row.penalty_last_n for row in rows],
        device=device,
    )


def new_sampler(
    params: Sequence[SamplingParams],
    ids: Callable[[], tuple[Ids, Ids | None]],
    positions: Sequence[int],
    *,
    vocab_size: int,
    device: torch.device,
    logprobs: Sequence[Kind] | None,
    backend: str,
    max_new_tokens: int,
    top_logprobs: int | None = None,
    allowed_mask: MaskCallback | None = None,
) -> Sampler:
    """A Sampler of these rows at these positions, with the history of :func:`prompt_history`.

    It does not check the logits: the loops do, which know the rows that have ended.
    """
    sampler = Sampler(
        params,
        vocab_size=vocab_size,
        history=prompt_history(params, ids, vocab_size, device, max_new_tokens),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        backend=backend,
        device=device,
        check=False,
        allowed_mask=allowed_mask,
    )
    if any(positions) or sampler.history is not None:
        for row, position in enumerate(positions):
            sampler.set_position(row, position)
    return sampler


# ---- how a row ends, and what it gives ----


class RowLogprobs:
    """The logprobs of the rows' drawn tokens, each of the kind that its row asks for.

    Args:
        kinds: None, "processed" or "raw" for each row.
        device: the logits' device.
        is_model: whether the logits that the Sampler gets are the model's own, which "raw" is of.
        counts: how many tokens each row lists, None for no list and no rank; only where the logits
            are the model's own.

    Attributes:
        of_sampler: the kinds that the Sampler gives, or None.
        any_raw: whether a row asks for "raw".
        top_logprobs: how many tokens the Sampler lists; None: none, and no ranks.
    """

    def __init__(
        self,
        kinds: Sequence[Kind | None],
        device: torch.device,
        *,
        is_model: bool,
        counts: Sequence[int | None] = (),
    ) -> None:
        self.any_raw = "raw" in kinds
        self._adds_raw = self.any_raw and not is_model
        given = [kind for kind in KINDS if kind in kinds and (is_model or kind == "processed")]
        self.of_sampler: list[Kind] | None = given or None
        self._kinds, self._counts = kinds, counts
        self.top_logprobs = max((n for n in counts if n is not None), default=None)
        self._is_raw = torch.tensor([kind == "raw" for kind in kinds], device=device)
        self._is_none = None
        if any(kinds) and None in kinds:
            self._is_none = torch.tensor([kind is None for kind in kinds], device=device)

    def __call__(self, drawn: SampleOutput, logits: Tensor) -> Tensor | None:
        """Float32 ``(rows,)``, NaN in a row that asks for none; None if no row asks.

        Args:
            drawn: the Sampler's result.
            logits: the model's logits ``(rows, vocab_size)``.
        """
        processed = None if drawn.processed is None else drawn.processed.logprobs
        raw = None if drawn.raw is None else drawn.raw.logprobs
        if self._adds_raw:
            tokens = drawn.tokens
            raw = raw_logprobs(logits).gather(-1, tokens.clamp(min=0)[:, None])[:, 0].float()
            raw = raw.masked_fill(tokens < 0, torch.nan)
        if processed is None or raw is None:
            result = raw if processed is None else processed
        else:
            result = torch.where(self._is_raw, raw, processed)
        if result is None or self._is_none is None:
            return result
        return result.masked_fill(self._is_none, torch.nan)

    def top(self, drawn: SampleOutput) -> list[Listed | None]:
        """The rank of each row's token and its list; None for a row that asks for none.

        ``drawn`` is the result of a Sampler with :attr:`top_logprobs`.
        """
        read = {kind: _read(found) for kind in KINDS if (found := getattr(drawn, kind)) is not None}
        listed: list[Listed | None] = []
        for row, (kind, count) in enumerate(zip(self._kinds, self._counts, strict=True)):
            if kind is None or count is None:
                listed.append(None)
                continue
            rank, ids, logprobs = read[kind][row]
            places = zip(ids[:count], logprobs[:count], strict=True)
            listed.append((rank, {id_: logprob for id_, logprob in places if id_ >= 0}))
        return listed

    def forced(self, token: int, row: int) -> Listed | None:
        """The same for a token that was the only one that a row could draw."""
        count = self._counts[row]
        return None if count is None else (1, dict.fromkeys([token][:count], 0.0))


#: The rank of a row's token, and the first tokens of the order with their logprobs.
Listed = tuple[int, dict[int, float]]


def _read(of_kind: TokenLogprobs) -> list[tuple[int, list[int], list[float]]]:
    """For each row the rank of its token, the ids of its list and their logprobs, on the host."""
    assert of_kind.ranks is not None
    assert of_kind.top_ids is not None
    assert of_kind.top_logprobs is not None
    # float64 holds each of them exactly, and one tensor is waited for once
    parts = (of_kind.ranks[:, None], of_kind.top_ids, of_kind.top_logprobs)
    joined = torch.cat([part.double() for part in parts], dim=1)
    count = of_kind.top_ids.shape[1]
    return [
        (int(values[0]), [int(id_) for id_ in values[1 : 1 + count]], values[1 + count :])
        for values in joined.tolist()
    ]


@dataclass
class Row:
    """One row of a loop: when it ends and why, and its text.

    Attributes:
        ends: each token that ends the row, and the ``stop_reason`` that it gives.
        max_new_tokens: after how many tokens the row ends; None if something else counts them.
        min_new_tokens: so many tokens come before a stop string counts.
        text: None without a tokenizer.
        length: how many tokens it has.
        finish_reason: None while the row goes on.
        stop_reason: the stop string or the token that ended the row, or what was wrong with its
            logits.
    """

    ends: Mapping[int, int | None]
    max_new_tokens: int | None
    min_new_tokens: int
    text: RowText | None
    length: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, token: int) -> str | None:
        """Count the next token; returns the text that is certain now, None without a tokenizer."""
        self.length += 1
        may_stop = self.length > self.min_new_tokens
        if token in self.ends:
            self.finish_reason, self.stop_reason = "stop", self.ends[token]
        elif self.length == self.max_new_tokens:
            self.finish_reason = "length"
        if self.text is None:
            return None
        piece = self.text.feed(token, may_stop=may_stop, is_end=token in self.ends)
        if self.finish_reason is not None:
            piece += self.text.finish(may_stop=may_stop)
        if self.text.stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", self.text.stop_string
        return piece

    def fail(self, reason: str) -> str | None:
        """End the row because of its logits; returns the text that was held back."""
        self.finish_reason, self.stop_reason = "error", reason
        return None if self.text is None else self.text.finish(may_stop=False)


def masks_without_ends(rows: Sequence[Row], sampler: Sampler) -> list[Tensor]:
    """The ``allowed_mask`` of each step in which a row must not end, int32 ``(rows, words)``.

    All bits are set but those of the end tokens of rows that have fewer than ``min_new_tokens``.
    """
    steps = max((row.min_new_tokens for row in rows if row.ends), default=0)
    if steps == 0:
        return []
    words = -(-sampler.vocab_size // 32)
    bits = np.ones((len(rows), words * 32), dtype=np.uint8)
    for row, row_bits in zip(rows, bits, strict=True):
        row_bits[list(row.ends)] = 0
    packed = np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)
    without = torch.from_numpy(packed).to(sampler.device)
    least = torch.tensor([row.min_new_tokens for row in rows], device=sampler.device)
    changes = sorted({0, *(row.min_new_tokens for row in rows)})
    masks: list[Tensor] = []
    for start, stop in itertools.pairwise(changes):
        mask = torch.where((least > start)[:, None], without, -1)
        masks += [mask] * (stop - start)
    return masks


def callback_of_prompts(
    callback: MaskCallback,
    sequences: int,
    outputs: Sequence[Sequence[int]],
    ends: Sequence[Collection[int]],
) -> MaskCallback:
    """A mask callback that is told what a loop knows of its rows.

    Args:
        callback: the user's.
        sequences: how many rows each prompt has.
        outputs: the tokens that each row's text has already.
        ends: the tokens that end each row.
    """
    of_rows = [tuple(sorted(row_ends)) for row_ends in ends]

    def ask(step: MaskStep) -> Mask | None:
        rows = tuple(
            row._replace(
                prompt=row.id // sequences,
                start=0 if row.is_new else row.start + len(outputs[row.id]),
                tokens=(*outputs[row.id], *row.tokens) if row.is_new else row.tokens,
                ends=of_rows[row.id],
            )
            for row in step.rows
        )
        return callback(replace(step, rows=rows, prompts=len(outputs) // sequences))

    return ask


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
