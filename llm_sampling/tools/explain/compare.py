"""Texts that a model generates by each decoding type that a set of parameters is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_sampling import checks, generation
from llm_sampling.generation.models import LanguageModel
from llm_sampling.params import SamplingParams
from llm_sampling.tools.explain.steps import FILTERS, changes, check_ids, is_greedy


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text that the model generated.

    Attributes:
        decoding: the decoding type: "greedy", "temperature", a filter's name or "all".
        params: the parameters it was drawn with.
        text: the text after the prompt.
    """

    decoding: str
    params: SamplingParams
    text: str


def decoding_types(params: SamplingParams) -> dict[str, SamplingParams]:
    """The decoding types that ``params`` is made of, by name.

    Greedy; the temperature alone; the temperature with each filter that is on; and all of
    ``params``, unless it equals one of the others. At temperature 0 no filter has an effect.
    """
    types = {"greedy": SamplingParams(temperature=0)}
    if not is_greedy(params):
        alone = SamplingParams(temperature=params.temperature, seed=params.seed)
        types["temperature"] = alone
        for name in FILTERS:
            if changes(name, params):
                filtered: dict[str, Any] = {name: getattr(params, name)}
                types[name] = replace(
                    alone, min_tokens_to_keep=params.min_tokens_to_keep, **filtered
                )
    is_other = not is_greedy(params) or changes("penalties", params)
    if is_other and params not in types.values():
        types["all"] = params
    return types


def compare(
    language_model: LanguageModel,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    n: int = 4,
    max_new_tokens: int = 40,
    backend: str = "auto",
) -> list[Continuation]:
    """Generate texts by each of :func:`decoding_types`, all in one batch.

    Args:
        language_model: the model.
        prompt_ids: the prompt's token ids, at least one.
        params: the parameters that are compared; with a seed the texts are the same each time.
        n: how many texts of each type except greedy. They have the seeds of n sequences of one
            request, so the i-th texts of all types are drawn with the same random bits.
        max_new_tokens: the largest length of a text, in tokens.
        backend: the backend, as for :class:`~llm_sampling.Sampler`.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the model's logits cannot be sampled from.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
    checks.integer_at_least("n", n, 1)
    check_ids("prompt_ids", prompt_ids, language_model.vocab_size)
    drawn = [
        (name, generation.seeded(of_type, i))
        for name, of_type in decoding_types(params).items()
        for i in range(1 if is_greedy(of_type) else n)
    ]
    done = generation.generate(
        language_model.model,
        [list(prompt_ids)] * len(drawn),
        [one for _, one in drawn],
        tokenizer=language_model.tokenizer,
        vocab_size=language_model.vocab_size,
        max_new_tokens=max_new_tokens,
        eos_token_ids=language_model.eos_token_ids,
        check=True,
        backend=backend,
    )
    return [
        Continuation(name, one, completion.text or "")
        for (name, one), completion in zip(drawn, done, strict=True)
    ]
