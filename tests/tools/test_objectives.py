"""Tests of the metrics: values computed by hand, and metrics of texts that a model generates."""

from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampling import InvalidLogitsError, SamplingParams, generation
from llm_sampling.generation import models
from llm_sampling.tools.tuning import objectives
from llm_sampling.tools.tuning.objectives import (
    METRICS,
    ModelObjective,
    distance,
    normalised,
    questions,
)

transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")

from toy_tokenizers import byte_tokenizer  # noqa: E402


def language_model(model: Any, tokenizer: Any, context_length: int | None = None) -> Any:
    return models.LanguageModel(
        name="tiny",
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=frozenset([tokenizer.eos_token_id]),
        vocab_size=len(tokenizer),
        context_length=context_length,
    )


@pytest.fixture(scope="module")
def tiny(tiny_llama: Any) -> Any:
    tokenizer = byte_tokenizer()
    return language_model(tiny_llama(len(tokenizer)), tokenizer, 2048)


# ---- measures ------------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    # The shares of distinct and of repeated n-grams of 1 1 1 1 are 1/4 and 3/4 for n = 1, 1/3 and
    # 2/3 for n = 2, 1/2 and 1/2 for n = 3, 1 and 0 for n = 4. Those of 1 2 3 4 are 1 and 0.
    expected = (2 * 3 / 4 + 2 * 2 / 3 + 2 * 1 / 2) / 8
    assert distance([[1, 1, 1, 1]], [[1, 2, 3, 4]]) == pytest.approx(expected, abs=1e-15)
    # An n-gram that two texts share makes the set less diverse, but is no repetition in a text.
    assert distance([[1, 2, 3, 4]] * 2, [[1, 2, 3, 4], [5, 6, 7, 8]]) == pytest.approx(4 / 2 / 8)


def test_distance_is_zero_for_equals_and_symmetric() -> None:
    draw = random.Random(0)
    first, second = ([[draw.randrange(9) for _ in range(30)] for _ in range(4)] for _ in range(2))
    assert distance(first, first) == 0
    assert distance(first, second) == distance(second, first) > 0
    renamed = [[token + 100 for token in text] for text in first]
    assert distance(first, renamed) == 0  # only repetition counts, not the token ids


@pytest.mark.parametrize("texts", [[], [[1, 2, 3]], [[1, 2, 3, 4], []]])
def test_texts_without_four_tokens(texts: Any) -> None:
    with pytest.raises(ValueError, match=r"^texts must have 4 tokens or more each$"):
        distance(texts, [[1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("answer", "plain"),
    [(" Paris.", "paris"), ("The  Pacific\tOcean", "pacific ocean"), ("a dog!", "dog"), ("", "")],
)
def test_normalised(answer: str, plain: str) -> None:
    assert normalised(answer) == plain


def test_questions_are_forty_and_not_among_the_examples() -> None:
    asked = questions()
    assert len({question for question, _ in asked}) == len(asked) == 40
    for question, answers in asked:
        assert question not in objectives.EXAMPLES
        assert all(normalised(answer) for answer in answers)
        assert len(set(answers)) == len(answers)


# ---- a model -------------------------------------------------------------------------------------

VALUES = {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.2}
OF_TEXTS = ["perplexity", "distance"]  # without the speed, which varies from run to run


def test_a_seed_is_a_number(tiny: Any) -> None:
    options: dict[str, Any] = {"texts": 3, "max_new_tokens": 20}
    first = ModelObjective(tiny, OF_TEXTS, seed=1, **options)
    values = first(VALUES)
    assert first(VALUES) == values == ModelObjective(tiny, OF_TEXTS, seed=1, **options)(VALUES)
    assert ModelObjective(tiny, OF_TEXTS, seed=2, **options)(VALUES) != values
    assert first({**VALUES, "temperature": 1.4}) != values
    for name, value in (("repetition_penalty_scope", "output"), ("penalty_last_n", 0)):
        assert first({**VALUES, name: value}) != values
    assert ModelObjective(tiny, list(METRICS)).directions == (
        "minimize",
        "minimize",
        "maximize",
        "maximize",
    )


def test_metrics_come_in_their_order(tiny: Any) -> None:
    options: dict[str, Any] = {"texts": 2, "max_new_tokens": 8}
    one_by_one = {name: ModelObjective(tiny, [name], **options)(VALUES)[0] for name in OF_TEXTS}
    one_by_one["exact_match"] = ModelObjective(tiny, ["exact_match"], **options)(VALUES)[0]
    for names in (["exact_match", *OF_TEXTS], [*OF_TEXTS[::-1], "exact_match"]):
        assert ModelObjective(tiny, names, **options)(VALUES) == tuple(
            one_by_one[name] for name in names
        )
    (speed,) = ModelObjective(tiny, ["tokens_per_second"], **options)(VALUES)
    assert 0 < speed < math.inf


def test_fixed_values_hold_unless_the_trial_has_its_own(tiny: Any) -> None:
    options: dict[str, Any] = {"texts": 2, "max_new_tokens": 8}
    free = ModelObjective(tiny, OF_TEXTS, **options)
    fixed = ModelObjective(tiny, OF_TEXTS, fixed={"temperature": 0.0, "top_k": 3}, **options)
    assert fixed({}) == free({"temperature": 0.0, "top_k": 3}) != free({})
    assert fixed({"temperature": 1.0}) == free({"temperature": 1.0, "top_k": 3})
    longer = ModelObjective(tiny, OF_TEXTS, texts=2, max_new_tokens=12)
    assert free({"max_new_tokens": 12}) == longer({}) != free({})


def test_texts_continue_the_book_and_are_measured_against_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has its own seed, and perplexity equals that of one forward pass over each text."""
    called: list[Any] = []
    right = generation.generate

    def recorded(model: Any, prompts: Any, params: Any, **options: Any) -> Any:
        done = right(model, prompts, params, **options)
        called.append((prompts, params, done))
        return done

    monkeypatch.setattr(generation, "generate", recorded)
    measured: list[Any] = []
    monkeypatch.setattr(objectives, "distance", lambda *texts: measured.extend(texts) or 0.5)
    objective = ModelObjective(tiny, ["distance", "perplexity"], texts=3, max_new_tokens=20, seed=7)
    far, perplexity = objective(VALUES)
    assert far == 0.5
    ((prompts, params, done),) = called  # one call for both metrics
    request = SamplingParams(**VALUES, seed=7)
    assert params == [generation.seeded(request, row) for row in range(3)]
    ours, human = measured
    assert ours == [text.token_ids for text in done]
    book = objectives.human_text()
    starts = []
    for prompt, continuation in zip(prompts, human, strict=True):
        passage = tiny.tokenizer.decode(prompt + continuation)
        assert len(prompt) == 32
        assert len(continuation) == 20
        assert passage in book
        starts.append(book.index(passage))
    assert starts[0] == 0
    assert len(book) * 0.2 < starts[1] < starts[2] < len(book) * 0.8
    total, count = 0.0, 0
    for prompt, text in zip(prompts, ours, strict=True):
        with torch.no_grad():
            logits = tiny.model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        total += float(logprobs.gather(-1, torch.tensor(text)[:, None]).sum())
        count += len(text)
    assert perplexity == pytest.approx(math.exp(-total / count), rel=1e-4)


class Pupil(torch.nn.Module):
    """A model that writes the known answer to a question letter by letter, then a newline.

    It answers "none" to any other question.
    """

    def __init__(self, tokenizer: Any, known: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer, self.known = tokenizer, known
        self.config = transformers.LlamaConfig(vocab_size=len(tokenizer))

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        attention_mask: Any = None,
    ) -> SimpleNamespace:
        texts = past_key_values or [""] * len(input_ids)
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        texts = [
            text + self.tokenizer.decode(ids) for text, ids in zip(texts, input_ids, strict=True)
        ]
        for row, text in enumerate(texts):
            question, _, begun = text.rpartition("Question: ")[2].partition("\nAnswer:")
            answer = f" {self.known.get(question, 'none')}\n"
            (token,) = self.tokenizer(answer[len(begun) :][:1] or "\n")["input_ids"]
            logits[row, 0, token] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=texts)


@pytest.mark.parametrize("right", [0, 3, 40])
def test_exact_match_is_the_share_of_right_answers(
    right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A token is one byte here, so that an answer takes more tokens than usual.
    monkeypatch.setattr(objectives, "ANSWER_TOKENS", 40)
    tokenizer = byte_tokenizer()
    known = {question: f"The {answers[-1].upper()}." for question, answers in questions()[:right]}
    known |= {question: f"{answers[0]}x" for question, answers in questions()[right:]}
    objective = ModelObjective(language_model(Pupil(tokenizer, known), tokenizer), ["exact_match"])
    assert objective({"temperature": 0.5}) == (right / 40,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "metric": (
        {"metrics": ["quality"]},
        f"metrics must be of {', '.join(METRICS)}, got 'quality'",
    ),
    "twice": (
        {"metrics": ["distance", "distance"]},
        r"metrics must be a list of different names, got \['distance', 'distance'\]",
    ),
    "text": (
        {"metrics": "distance"},
        "metrics must be a list of different names, got 'distance'",
    ),
    "none": ({"metrics": []}, r"metrics must be a list of different names, got \[\]"),
    "texts": ({"texts": 0}, "texts must be an integer >= 1, got 0"),
    "length": ({"max_new_tokens": True}, "max_new_tokens must be an integer >= 4, got True"),
    "short": ({"max_new_tokens": 3}, "max_new_tokens must be an integer >= 4, got 3"),
    "fixed": (
        {"fixed": {"beams": 3}},
        "values must be of temperature, .*, seed, .*, max_new_tokens, got 'beams'",
    ),
    "fixed value": ({"fixed": {"top_p": 2}}, r"top_p must be in \(0, 1\], got 2"),
    "fixed length": (
        {"fixed": {"max_new_tokens": 2}},
        "max_new_tokens must be an integer >= 4, got 2",
    ),
    "context": (
        {"max_new_tokens": 2017},
        "max_new_tokens must leave the prompt's 32 tokens room in the model's context of 2048, "
        "got 2017",
    ),
    "book": (
        {"texts": 1500},
        "texts must have 96 tokens each, the last of 1500 has 8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused(name: str, tiny: Any) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        ModelObjective(tiny, **options)


def test_a_model_without_tokens_is_not_measured(tiny: Any) -> None:
    broken = copy.deepcopy(tiny)
    broken.model.lm_head.weight.data.fill_(math.nan)
    for metric in ("distance", "exact_match"):
        with pytest.raises(InvalidLogitsError, match="NaN in logits"):
            ModelObjective(broken, [metric], texts=2, max_new_tokens=4)(VALUES)


def test_a_value_of_another_name_is_refused(tiny: Any) -> None:
    objective = ModelObjective(tiny, texts=1)
    with pytest.raises(ValueError, match=r"^values must be of .*, got 'learning_rate'$"):
        objective({"learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"^top_k must be an integer >= -1, got -2$"):
        objective({"top_k": -2})


@pytest.mark.model
def test_a_real_model_answers_and_repeats_itself(
    smollm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy decoding gives the best answers and the texts that are least like human ones."""
    some = questions()[::4]
    monkeypatch.setattr(objectives, "questions", lambda: some)
    objective = ModelObjective(smollm, ["exact_match", "distance"], texts=3, max_new_tokens=48)
    greedy, hot = objective({"temperature": 0.0}), objective({"temperature": 1.3})
    assert greedy[0] > 0.5 > hot[0]
    assert greedy[1] > 2 * hot[1]
