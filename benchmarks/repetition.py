"""How much of a text repeats itself, with DRY and without it, on the default model.

``python -m benchmarks.repetition`` prints a table in Markdown; ``--json FILE`` also writes the
texts to FILE, and the table beside it with the suffix ``.md``. It takes minutes.

The number is the share of 4-grams that occurred before in their text, averaged over the texts
(seq-rep-4, Welleck et al. 2020, arXiv:1908.04319).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import command_line, environment, progress, write_result
from llm_sampling import SamplingParams
from llm_sampling.generation import generate
from llm_sampling.generation.models import default_model_path, load
from llm_sampling.tools.tuning.objectives import ngrams_of, repeated

PROMPTS = (
    "The meaning of life is",
    "My favourite colours are",
    "The best way to learn a language is",
    "In the year 2050 people will",
    "A short poem about the sea:",
    "The capital of France is",
)
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 0.7": {"temperature": 0.7},
}
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "dry_multiplier 0.8": {"dry_multiplier": 0.8},
    "no_repeat_ngram_size 4": {"no_repeat_ngram_size": 4},
}


def main(argv: Sequence[str]) -> int:
    """Print the report, and write it to files on request."""
    parser = argparse.ArgumentParser(description="How much of a text repeats itself.")
    parser.add_argument("--json", type=Path, help="write the texts here, and the table beside it")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="the length of each text")
    options = parser.parse_args(argv)
    if options.max_new_tokens < 4:
        parser.error(f"--max-new-tokens must be an integer >= 4, got {options.max_new_tokens}")
    record = environment(argv)
    language_model = load(default_model_path(), progress)
    prompts = [language_model.encode(prompt) for prompt in PROMPTS]
    lines: list[dict[str, Any]] = []
    for decoding, chosen in DECODING.items():
        for rule, of_rule in RULES.items():
            progress(f"{decoding}, {rule}")
            params = [SamplingParams(seed=i, **chosen, **of_rule) for i in range(len(prompts))]
            done = generate(
                language_model.model,
                prompts,
                params,
                max_new_tokens=options.max_new_tokens,
                ignore_eos=True,
            )
            shares = [repeated(ngrams_of(row.token_ids, 4)) for row in done]
            texts = [language_model.tokenizer.decode(row.token_ids) for row in done]
            lines.append(
                {
                    "decoding": decoding,
                    "rule": rule,
                    "repeated": sum(shares) / len(shares),
                    "texts": texts,
                }
            )
    command = command_line("repetition", argv)
    text = f"`{command}`, {len(PROMPTS)} texts of {options.max_new_tokens} tokens each\n\n"
    text += "| decoding | rule | repeated 4-grams |\n|---|---|--:|\n"
    for line in lines:
        text += f"| {line['decoding']} | {line['rule']} | {100 * line['repeated']:.1f} % |\n"
    print(text)
    write_result(options.json, {"command": command, "environment": record, "results": lines}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
