"""llama.cpp's DRY sampler, through llama-cpp-python's C functions, and the file of its answers.

``.peers/llama-cpp/bin/python tests/sampling/dry_of_llama_cpp.py`` writes dry_of_llama_cpp.json
anew: the token sequences of some strings, and histories with the amounts that the sampler
subtracts. CONTRIBUTING.md says how the environment is made. The vocabulary is SmolLM2's.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import random
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llm_sampling.generation import models

PATH = Path(__file__).with_suffix(".json")
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

Breakers = list[list[int]]
#: The rules of a sampler, the strings that are its breakers, a history, and the amounts by id.
Case = dict[str, Any]

#: The tokens that histories are made of; each text is one token.
WORDS = (" the", " cat", " dog", "User", ":", "\n", "\n\n", ' "', "*", "a")
#: The strings that are breakers. The first four are llama.cpp's default.
STRINGS = (
    *("\n", ":", '"', "*"),
    *(" cat", " the cat", " the cat the", " dog dog", "User:", "\n\nUser", "User:\n"),
)
MULTIPLIERS = (0.1, 0.8, 1.0, 5.0, 100.0)
BASES = (1.0, 1.0000005, 1.1, 1.75, 2.0, 4.0, 100.0)
ALLOWED = (1, 1, 2, 2, 3, 5, 10)
LAST_N = (-1, -1, 1, 5, 20, 64, 150)
#: A window that holds every history here, in the place of -1, which llama.cpp takes for 0.
ALL = 1 << 17


class LlamaCpp:
    """A vocabulary that llama.cpp has read from a GGUF file."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import llama_cpp as lib

        self.lib: Any = lib
        self._silence = lib.llama_log_callback(lambda *_: None)  # kept as long as it may be called
        lib.llama_log_set(self._silence, None)
        params = lib.llama_model_default_params()
        params.vocab_only = True
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert model, path
        self.vocab = lib.llama_model_get_vocab(model)
        self.size: int = lib.llama_vocab_n_tokens(self.vocab)

    @functools.cached_property
    def texts(self) -> list[bytes]:
        """The text of each token; a special one has the text that it is spelt with."""
        buffer = ctypes.create_string_buffer(512)
        texts = []
        for token in range(self.size):
            ids = (self.lib.llama_token * 1)(token)
            length = self.lib.llama_detokenize(self.vocab, ids, 1, buffer, 512, False, True)
            assert length >= 0
            texts.append(buffer.raw[:length])
        return texts

    def tokens(self, text: bytes) -> list[int]:
        """The tokens of a text; special ones are not read."""
        ids = (self.lib.llama_token * 64)()
        number = self.lib.llama_tokenize(self.vocab, text, len(text), ids, 64, False, False)
        assert number >= 0
        return list(ids[:number])

    def words(self) -> list[int]:
        """The ids of WORDS."""
        return [token for (token,) in (self.tokens(word.encode()) for word in WORDS)]

    def breakers(self, string: str) -> Breakers:
        """The sequences that ``get_overlapping_token_sequences`` of llama.cpp finds for a string.

        llama.cpp has no function that returns them, so they are put together here as there.
        """
        sought = string.encode()
        found: set[tuple[int, ...]] = set()
        for token, text in enumerate(self.texts):
            if sought in text:
                found.add((token,))
                continue
            for length in range(1, len(sought)):
                if text.endswith(sought[:length]):
                    found.add((token, *self.tokens(sought[length:])[:20]))
        return [list(one) for one in sorted(found, key=lambda one: (len(one) > 1, one))]


class Dry:
    """A DRY sampler of llama.cpp.

    Args:
        llama: the vocabulary.
        rules: the parameters by their names in SequenceRules.
        strings: the breakers.
    """

    def __init__(self, llama: LlamaCpp, rules: dict[str, Any], strings: Sequence[str]) -> None:
        self._lib, self._size = llama.lib, llama.size
        last = rules["dry_penalty_last_n"]
        self._sampler = self._lib.llama_sampler_init_dry(
            llama.vocab,
            rules["dry_multiplier"],
            rules["dry_base"],
            rules["dry_allowed_length"],
            ALL if last == -1 else last,
            (ctypes.c_char_p * len(strings))(*(string.encode() for string in strings)),
            len(strings),
        )

    def __del__(self) -> None:
        self._lib.llama_sampler_free(self._sampler)

    def amounts(self, ids: Sequence[int], of: Sequence[int] | None = None) -> dict[int, float]:
        """What is subtracted from logits of 0 after a history, by id.

        Args:
            ids: the history.
            of: the candidates; None is all tokens.
        """
        assert len(ids) <= ALL
        self._lib.llama_sampler_reset(self._sampler)
        for token in ids:
            self._lib.llama_sampler_accept(self._sampler, token)
        candidates = np.zeros(self._size if of is None else len(of), CANDIDATE)
        candidates["id"] = np.arange(self._size) if of is None else of
        pointer = candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        array = self._lib.llama_token_data_array(pointer, len(candidates), -1, False)
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return {int(one["id"]): -float(one["logit"]) for one in candidates[candidates["logit"] < 0]}


def random_ids(
    draw: random.Random, words: Sequence[int], written: Breakers, most: int
) -> list[int]:
    """A history of few tokens, most of them in the same order again, and breakers between them."""
    some = draw.sample(words, draw.randint(1, 5))
    length = draw.randint(0, most)
    period = draw.choices(some, k=draw.randint(1, max(1, length // 2)))
    noise, broken = draw.choice((0.0, 0.02, 0.2, 1.0)), draw.choice((0.0, 0.02, 0.2))
    ids: list[int] = []
    while len(ids) < length:
        if written and draw.random() < broken:
            ids += draw.choice(written)
        ids.append(draw.choice(some) if draw.random() < noise else period[len(ids) % len(period)])
    return ids[:length]


def random_cases(
    llama: LlamaCpp, known: dict[str, Breakers], samplers: int, histories: int, most: int
) -> Iterator[Case]:
    """Cases with so many samplers, and histories of at most so many tokens for each of them."""
    draw = random.Random(0)
    words = llama.words()
    for number in range(samplers):
        rules = {
            "dry_multiplier": draw.choice(MULTIPLIERS),
            "dry_base": draw.choice(BASES),
            "dry_allowed_length": draw.choice(ALLOWED),
            "dry_penalty_last_n": draw.choice(LAST_N),
        }
        strings = draw.sample(STRINGS, draw.randint(1, 4)) if number % 3 else []
        breakers = [one for string in strings for one in known[string]]
        written = [one for one in breakers if set(one) <= set(words)]
        sampler = Dry(llama, rules, strings)
        for _ in range(histories):
            ids = random_ids(draw, words, written, most)
            amounts = sampler.amounts(ids)
            yield {"rules": rules, "strings": strings, "ids": ids, "amounts": amounts}


def differing_cases(llama: LlamaCpp) -> Iterator[tuple[str, Case]]:
    """Cases that differ on purpose from llm_sampling's, by what differs."""
    the, cat, dog = llama.words()[:3]
    plain = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_penalty_last_n": -1}
    inner = [" the cat the", " cat"]
    for name, base, strings, ids in (
        ("a breaker within a breaker", 2.0, inner, [the, dog, the, cat, the]),
        ("a long match", 1.01, [], [dog] * 600),
        ("a large amount", 3.0, [], [dog] * 100),
    ):
        rules = {**plain, "dry_base": base}
        amounts = Dry(llama, rules, strings).amounts(ids)
        yield name, {"rules": rules, "strings": strings, "ids": ids, "amounts": amounts}


def answers() -> dict[str, Any]:
    """What the file holds."""
    llama = LlamaCpp(models.default_model_path())
    known = {string: llama.breakers(string) for string in STRINGS}
    cases = random_cases(llama, known, 80, 2, 60)
    return {
        "version": f"llama-cpp-python {version('llama-cpp-python')}",
        "breakers": known,
        # JSON has no infinity
        "cases": [case for case in cases if math.inf not in case["amounts"].values()],
        "differences": dict(differing_cases(llama)),
    }


def as_json(found: dict[str, Any]) -> str:
    """JSON with a line for each string and case."""
    lines = [f'"version": {json.dumps(found["version"])}']
    for name in ("breakers", "differences"):
        rows = (f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in found[name].items())
        lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n}")
    cases = (f"  {json.dumps(case)}" for case in found["cases"])
    lines.append('"cases": [\n' + ",\n".join(cases) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(as_json(answers()), encoding="utf-8")
