"""Texts of a real model under random JSON schemas and regular expressions, with both engines.

Every text that ends conforms, most end, the tokens are the same on the backends cpu and torch, and
rows without a grammar in the same batch draw what they draw alone.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampling import SamplingParams
from llm_sampling.generation import Completion, generate
from llm_sampling.integrations import grammar

for package in ("xgrammar", "llguidance", "jsonschema"):
    pytest.importorskip(package, reason="needs the extra 'grammar' and jsonschema")

import jsonschema  # noqa: E402

ENGINES = {"xgrammar": grammar.xgrammar, "llguidance": grammar.llguidance}
#: The rows of a batch, and which of them have no grammar.
ROWS, FREE = 16, (0, 7, 15)
#: The limits of tokens of rows with a grammar, and of those without.
LONGEST, FREE_LONGEST = 100, 24
PROMPT = "Some data about a town, and the year: "

WORDS = ["name", "age", "city", "tags", "unit", "price", "kind", "size", "date", "owner"]
VALUES: list[Any] = ["red", "green", "deep blue", 'a "quote"', "é", 0, 17, -3, 2.5, True, None]
PATTERNS = ["^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3}$", "^(north|south)( east)?$", "^[0-9a-f]{6}$"]


def random_schema(random: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema whose values are bounded, so that a text can end."""
    kinds = ["enum", "integer", "number", "boolean", "null", "string", "pattern", "union"]
    if depth < 2:
        kinds += ["array", "object"]
    kind = "object" if depth == 0 else random.choice(kinds)
    if kind == "enum":
        return {"enum": random.sample(VALUES, random.randint(1, 4))}
    if kind in ("integer", "number"):
        low = random.randint(-1000, 1000)
        return {"type": kind, "minimum": low, "maximum": low + random.randint(0, 5000)}
    if kind == "string":
        return {"type": "string", "maxLength": random.randint(1, 12)}
    if kind == "pattern":
        return {"type": "string", "pattern": random.choice(PATTERNS)}
    if kind == "union":
        return {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}]}
    if kind == "array":
        least = random.randint(0, 2)
        most = least + random.randint(0, 2)
        items = random_schema(random, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}
    if kind == "object":
        names = random.sample(WORDS, random.randint(1, 4 if depth == 0 else 2))
        return {
            "type": "object",
            "properties": {name: random_schema(random, depth + 1) for name in names},
            "required": [name for name in names if random.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


PIECES = ["[a-z]", "[0-9]", "[A-F0-9]", "(ab|cd|é)", "x", "( and )", r"\.", "(yes|no)", "[^a-z\\n]"]
TIMES = ["", "", "?", "{2}", "{1,3}", "{0,4}"]


def random_regex(random: random.Random) -> str:
    """Return a regular expression that matches short texts alone."""
    pieces = [random.choice(PIECES) + random.choice(TIMES) for _ in range(random.randint(2, 6))]
    if random.random() < 0.3:
        pieces.insert(random.randrange(len(pieces)), f"({'|'.join(pieces[:2])}|z)")
    return "".join(pieces)


class Recording:
    """A model as a callable, which keeps what it is given and what it returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.steps = model, list[tuple[Tensor, Tensor]]()
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"

    def __call__(self, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        options = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        output = self.model(input_ids=input_ids, **options)
        logits = output.logits[:, -1].clone()
        self.steps.append((input_ids, logits))
        return logits, getattr(output, self.cache_name)


class Replay:
    """Some rows of a recording again; they must be given the same tokens while they go on."""

    def __init__(self, recording: Recording, rows: list[int], lengths: list[int]) -> None:
        self.recording, self.rows, self.lengths = recording, rows, lengths

    def __call__(self, input_ids: Tensor, step: int | None) -> tuple[Tensor, int]:
        step = 0 if step is None else step
        ids, logits = self.recording.steps[step]
        for row, given, length in zip(self.rows, input_ids, self.lengths, strict=True):
            assert step >= length or torch.equal(ids[row], given)
        return logits[self.rows], step + 1


def conforms(kind: str, source: Any, text: str) -> bool:
    if kind == "regex":
        return re.fullmatch(source, text) is not None
    try:
        jsonschema.validate(json.loads(text), source)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def run_batch(
    language_model: Any, engine: str, kind: str, sources: list[Any], seed: int
) -> list[tuple[Any, Completion]]:
    """Check a batch of some grammars and some free rows; return the texts of the grammars."""
    rest = iter(sources)
    of_rows = [None if row in FREE else next(rest, None) for row in range(ROWS)]
    prompt = language_model.tokenizer(PROMPT)["input_ids"]
    params = [SamplingParams(seed=seed + row, top_p=0.95) for row in range(ROWS)]
    longest = [FREE_LONGEST if source is None else LONGEST for source in of_rows]

    def texts(model: Any, rows: list[int], masks: Any, backend: str) -> list[Completion]:
        return generate(
            model,
            [prompt] * len(rows),
            [params[row] for row in rows],
            tokenizer=language_model.tokenizer,
            vocab_size=language_model.vocab_size,
            eos_token_ids=language_model.eos_token_ids,
            max_new_tokens=[longest[row] for row in rows],
            allowed_mask=masks,
            backend=backend,
        )

    masks = ENGINES[engine](language_model.tokenizer, **{kind: of_rows})
    recording, rows = Recording(language_model.model), list(range(ROWS))
    done = texts(recording, rows, masks, "cpu")
    lengths = [len(one.token_ids) for one in done]
    assert texts(Replay(recording, rows, lengths), rows, masks, "torch") == done
    free = [row for row in rows if of_rows[row] is None]
    alone = texts(Replay(recording, free, [lengths[row] for row in free]), free, None, "cpu")
    assert alone == [done[row] for row in free]
    return [(source, one) for source, one in zip(of_rows, done, strict=True) if source is not None]


@pytest.mark.model
@pytest.mark.parametrize(
    ("schemas", "regexes"), [(13, 13), pytest.param(200, 50, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_texts_of_a_model(engine: str, schemas: int, regexes: int, smollm: Any) -> None:
    generator = random.Random(1)
    sources = {
        "json_schema": [random_schema(generator) for _ in range(schemas)],
        "regex": [random_regex(generator) for _ in range(regexes)],
    }
    size = ROWS - len(FREE)
    for kind, of_kind in sources.items():
        found: list[tuple[Any, Completion]] = []
        for start in range(0, len(of_kind), size):
            found += run_batch(smollm, engine, kind, of_kind[start : start + size], 1000 + start)
        ended = [(source, one) for source, one in found if one.finish_reason == "stop"]
        wrong = [
            (source, one.text) for source, one in ended if not conforms(kind, source, one.text)
        ]
        tokens = sum(len(one.token_ids) for _, one in found)
        print(  # noqa: T201 - shown by pytest -s
            f"\n{engine}, {kind}: {len(ended)} of {len(found)} texts end within {LONGEST} tokens, "
            f"{len(ended) - len(wrong)} of them conform; {tokens} tokens",
            flush=True,
        )
        assert wrong == []
        assert all(one.finish_reason in ("stop", "length") for _, one in found)
        assert len(ended) >= 0.9 * len(of_kind)
        assert len(found) == len(of_kind)
