"""Objectives for tuning a model's sampling parameters.

    values -> SamplingParams -> generation.generate -> one number for each metric

The model continues passages of Alice's Adventures in Wonderland, and its texts are compared with
the book's own continuations; or it answers forty questions with short answers. Both are files in
llm_sampling/tools/data. With the same seed every metric but tokens per second is the same each
time.
"""

from __future__ import annotations

import functools
import math
import re
import string
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

from llm_sampling import checks, generation
from llm_sampling.fields import FIELDS
from llm_sampling.generation.models import LanguageModel
from llm_sampling.params import SamplingParams
from llm_sampling.tools.tuning.search import Direction

#: The lengths of the n-grams that :func:`distance` counts.
NGRAMS = (1, 2, 3, 4)
#: The length of each prompt of "distance", "perplexity" and "tokens_per_second".
PROMPT_TOKENS = 32
#: The largest length of an answer; no answer in questions.tsv is longer.
ANSWER_TOKENS = 8

#: The beginning of each question's prompt, which shows a base model how to answer.
EXAMPLES = """\
Question: What is the capital of Italy?
Answer: Rome

Question: How many wheels does a car have?
Answer: four

Question: What color is coal?
Answer: black

"""


@dataclass(frozen=True)
class Metric:
    """A number that describes what a model generates.

    Attributes:
        direction: whether a smaller or a larger number is better.
        meaning: a description.
        of_texts: whether it measures the texts, or else the answers to the questions.
    """

    direction: Direction
    meaning: str
    of_texts: bool = True


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "distance": Metric(
            "minimize",
            "how far the texts are from a human's in n-gram diversity and repetition, 0 .. 1",
        ),
        "perplexity": Metric(
            "minimize", "of the model itself on the tokens that it drew, unprocessed logits"
        ),
        "exact_match": Metric(
            "maximize", "the share of the questions that are answered right", of_texts=False
        ),
        "tokens_per_second": Metric("maximize", "all texts together, the prompts' time included"),
    }
)


class ModelObjective:
    """An objective for :func:`llm_sampling.tools.tuning.tune` that measures a model.

    It is called with values of fields of SamplingParams and of ``max_new_tokens``. A call
    generates the texts once for all metrics of texts.

    Attributes:
        metrics: the metrics' names, in the order of the numbers that a call returns.
        directions: the argument of that name for :func:`~llm_sampling.tools.tuning.tune`.

    Args:
        model: from :func:`llm_sampling.generation.models.load`.
        metrics: names from :data:`METRICS`.
        fixed: values that are the same in every trial.
        texts: how many passages are continued, all in one batch.
        max_new_tokens: the length of each continuation. End tokens do not end it, because measures
            of diversity depend on the length.
        seed: the seed of the first row; row i has that of sequence i of one request.
        backend: the backend, as for :class:`~llm_sampling.Sampler`.

    Raises:
        ValueError: an argument is out of its range, or the texts are too long for the model's
            context.

    Example:
        >>> objective = ModelObjective(model, ["distance", "perplexity"])
        >>> space = {"temperature": Range(0.1, 2.0), "top_p": Range(0.5, 1.0)}
        >>> tune(objective, space, n_trials=40, directions=objective.directions)
    """

    def __init__(
        self,
        model: LanguageModel,
        metrics: Sequence[str] = ("distance",),
        *,
        fixed: Mapping[str, Any] | None = None,
        texts: int = 8,
        max_new_tokens: int = 64,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        check_objective(metrics, fixed or {}, texts, max_new_tokens)
        self.metrics = tuple(metrics)
        self.directions: tuple[Direction, ...] = tuple(METRICS[name].direction for name in metrics)
        self._model = model
        self._fixed = dict(fixed or {})
        self._texts = texts
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._backend = backend
        self._passages = functools.cache(self._cut_passages)
        _, length = self._params({})  # so that wrong values of `fixed` raise here
        self._passages(length)

    def __call__(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        """The metrics of what the model generates with these values, in the order of ``metrics``.

        Raises:
            ValueError: a value is out of its range, or its name is unknown.
        """
        params, max_new_tokens = self._params(values)
        measured: dict[str, float] = {}
        if any(METRICS[name].of_texts for name in self.metrics):
            measured |= self._measure_texts(params, max_new_tokens)
        if "exact_match" in self.metrics:
            measured["exact_match"] = self._exact_match(params)
        return tuple(measured[name] for name in self.metrics)

    def _params(self, values: Mapping[str, Any]) -> tuple[SamplingParams, int]:
        _check_names(values)
        given: dict[str, Any] = {"seed": self._seed, "max_new_tokens": self._max_new_tokens}
        given |= {**self._fixed, **values}
        max_new_tokens = given.pop("max_new_tokens")
        return SamplingParams(**given), max_new_tokens

    def _generate(
        self, prompts: list[list[int]], params: SamplingParams, **options: Any
    ) -> list[generation.Completion]:
        return generation.generate(
            self._model.model,
            prompts,
            [generation.seeded(params, row) for row in range(len(prompts))],
            vocab_size=self._model.vocab_size,
            check=True,
            backend=self._backend,
            **options,
        )

    def _measure_texts(self, params: SamplingParams, max_new_tokens: int) -> dict[str, float]:
        passages = self._passages(max_new_tokens)
        start = time.perf_counter()
        done = self._generate(
            [prompt for prompt, _ in passages],
            params,
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
            logprobs="raw",
        )
        seconds = time.perf_counter() - start
        texts = [text.token_ids for text in done]
        logprobs = [value for text in done for value in text.logprobs or []]
        return {
            "distance": distance(texts, [human for _, human in passages]),
            "perplexity": math.exp(-math.fsum(logprobs) / len(logprobs)),
            "tokens_per_second": sum(map(len, texts)) / seconds,
        }

    def _exact_match(self, params: SamplingParams) -> float:
        asked = questions()
        encode = self._model.encode
        done = self._generate(
            [encode(f"{EXAMPLES}Question: {question}\nAnswer:") for question, _ in asked],
            params,
            tokenizer=self._model.tokenizer,
            eos_token_ids=self._model.eos_token_ids,
            max_new_tokens=ANSWER_TOKENS,
            stop="\n",
        )
        right = [
            normalised(answer.text or "") in {normalised(one) for one in answers}
            for answer, (_, answers) in zip(done, asked, strict=True)
        ]
        return sum(right) / len(right)

    def _cut_passages(self, max_new_tokens: int) -> list[tuple[list[int], list[int]]]:
        """Prompts and the book's own continuations, from paragraphs spread evenly over the book."""
        _check_length(self.metrics, max_new_tokens)
        wanted = PROMPT_TOKENS + max_new_tokens
        context = self._model.context_length
        if context is not None and wanted > context:
            raise ValueError(
                f"max_new_tokens must leave the prompt's {PROMPT_TOKENS} tokens room in the "
                f"model's context of {context}, got {max_new_tokens}"
            )
        book = human_text()
        starts = [0, *(match.end() for match in re.finditer("\n\n", book))]
        passages = []
        for index in range(self._texts):
            rest = book[starts[index * len(starts) // self._texts] :]
            length = 8 * wanted  # characters; a token has about four
            ids = self._model.encode(rest[:length])
            # One token more than wanted: the last may end where the text was cut off.
            while len(ids) <= wanted and length < len(rest):
                length *= 2
                ids = self._model.encode(rest[:length])
            if len(ids) < wanted:
                raise ValueError(
                    f"texts must have {wanted} tokens each, the last of {self._texts} "
                    f"has {len(ids)}"
                )
            passages.append((ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:wanted]))
        return passages


def check_objective(
    metrics: Sequence[str], names: Iterable[str], texts: int, max_new_tokens: int
) -> None:
    """Raise what :class:`ModelObjective` would raise, before a model is loaded for it.

    Args:
        metrics: as for :class:`ModelObjective`.
        names: the names of the values that it will be called with.
        texts: as for :class:`ModelObjective`.
        max_new_tokens: as for :class:`ModelObjective`.

    Raises:
        ValueError: an argument is out of its range, or a name is unknown.
    """
    if isinstance(metrics, str) or not metrics or len(set(metrics)) != len(metrics):
        raise ValueError(f"metrics must be a list of different names, got {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {name!r}")
    checks.integer_at_least("texts", texts, 1)
    _check_length(metrics, max_new_tokens)
    _check_names(names)


def _check_length(metrics: Sequence[str], max_new_tokens: object) -> None:
    least = max(NGRAMS) if "distance" in metrics else 1
    checks.integer_at_least("max_new_tokens", max_new_tokens, least)


def _check_names(names: Iterable[str]) -> None:
    known = [*FIELDS, "max_new_tokens"]
    for name in names:
        if name not in known:
            raise ValueError(f"values must be of {', '.join(known)}, got {name!r}")


# ---- measures ------------------------------------------------------------------------------------


def distance(texts: Sequence[Sequence[int]], humans: Sequence[Sequence[int]]) -> float:
    """How much two sets of token sequences differ in diversity and repetition, from 0 to 1.

    The mean absolute difference of eight shares, two for each n-gram length from 1 to 4: the share
    of distinct n-grams among all n-grams of a set (distinct-n, Li et al. 2016, arXiv:1510.03055),
    and the share of n-grams that occurred before in their text, averaged over the texts (seq-rep-n,
    Welleck et al. 2020, arXiv:1908.04319).

    Raises:
        ValueError: a text has fewer than four tokens.
    """
    ours, theirs = _shares(texts), _shares(humans)
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _shares(texts: Sequence[Sequence[int]]) -> list[float]:
    shares = []
    for n in NGRAMS:
        per_text = [ngrams_of(text, n) for text in texts]
        if not per_text or not all(per_text):
            raise ValueError(f"texts must have {max(NGRAMS)} tokens or more each")
        pooled = [ngram for ngrams in per_text for ngram in ngrams]
        again = [repeated(ngrams) for ngrams in per_text]
        shares += [len(set(pooled)) / len(pooled), sum(again) / len(again)]
    return shares


def ngrams_of(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The n-grams of a text, in order."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def repeated(ngrams: Sequence[tuple[int, ...]]) -> float:
    """The share of a text's n-grams that occurred before in it; 0 where there are none."""
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def normalised(answer: str) -> str:
    """The answer in lower case, without punctuation, articles and surplus spaces.

    This is SQuAD's normalisation (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def human_text() -> str:
    """Alice's Adventures in Wonderland, by Lewis Carroll, 1865; in the public domain."""
    return _data("alice.txt")


def questions() -> list[tuple[str, list[str]]]:
    """Each question with its right answers."""
    lines = _data("questions.tsv").splitlines()
    pairs = [line.split("\t") for line in lines]
    return [(question, answers.split("|")) for question, answers in pairs]


def _data(name: str) -> str:
    return (resources.files("llm_sampling.tools") / "data" / name).read_text(encoding="utf-8")
