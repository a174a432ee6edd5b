"""What the rules that look at the history cost on the CPU: the time that a list takes.

``python -m benchmarks.rules`` prints a table in Markdown; ``--json FILE`` also writes the times to
FILE, and the table beside it with the suffix ``.md``. It takes minutes.

A row of the default model is sampled with rules and without, from the same logits and the same
history: the difference is the list of step 5a and its use. Beside it, in turns, the model takes a
decode step after a short prompt, which is the fastest step that it has.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import TEXT
from benchmarks.providers import Contender
from benchmarks.timing import (
    Protocol,
    Run,
    Timing,
    command_line,
    environment,
    measure,
    progress,
    runner,
    write_result,
)
from llm_sampling import BatchParams, SamplingParams, TokenHistory, sample
from llm_sampling.generation import bad_words_from, dry_breakers_from
from llm_sampling.generation.models import default_model_path, load

LENGTHS = (1024, 8192, 32768)
#: What every row has besides its rules.
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
OFF = "none"
STEP = "a step of the model"


def texts(sentences: Sequence[Sequence[int]], length: int) -> dict[str, list[int]]:
    """Texts of so many ids: as people write, of few ids, and the longest matches there are."""
    draw = random.Random(length)
    spoken: list[int] = []
    while len(spoken) < length:
        spoken += draw.choice(sentences)
    return {
        "sentences in random order": spoken[:length],
        "8 ids in random order": draw.choices(range(100, 108), k=length),
        "one id": [100] * length,
    }


def rules(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The rules whose time is taken, by their names in the table."""
    breakers = dry_breakers_from(tokenizer)
    dry = {"dry_multiplier": 0.8, "dry_breakers": breakers}
    words = bad_words_from(tokenizer, ["do not use", "the word delve", "as an assistant"])
    return {
        OFF: {},
        f"DRY, {len(breakers)} breakers": dry,
        "DRY without breakers": {"dry_multiplier": 0.8},
        "n-grams of 3": {"no_repeat_ngram_size": 3},
        f"DRY, n-grams, {len(words)} bad words": {
            **dry,
            "no_repeat_ngram_size": 8,
            "bad_words": words,
        },
    }


def draws(logits: Tensor, ids: Sequence[int], rule: dict[str, Any]) -> Callable[[int], object]:
    """A call that draws a token from one of several rows of logits."""
    vocab_size = logits.shape[1]
    history = TokenHistory.from_ids([ids], None, vocab_size, max_length=len(ids))
    batch = BatchParams.repeat(SamplingParams(**(FILTERS | rule)), 1)
    return lambda row: sample(
        logits[row : row + 1], batch, history=history, backend="cpu", check=False
    )


def model_steps(model: Any, prompt: Sequence[int]) -> Callable[[int], object]:
    """A decode step after a prompt, and nothing of it is kept."""
    with torch.inference_mode():
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values

    def step(_: int) -> object:
        with torch.inference_mode():
            found = model(torch.tensor([[prompt[-1]]]), past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return found

    return step


def run_of(call: Callable[[int], object]) -> Run:
    """How long this call takes."""
    return runner(Contender(call))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The report's table."""
    text = "| ids of the text | text | rules | list, µs a row | share of a step of the model |\n"
    text += "|--:|---|---|--:|--:|\n"
    for line in lines:
        text += f"| {line['length']:,} | {line['text']} | {line['rules']} "
        text += f"| {line['list_us']:.1f} | {line['share']:.2%} |\n"
    return text


def main(argv: Sequence[str]) -> int:
    """Print the report, and write it to files on request."""
    parser = argparse.ArgumentParser(description="What rules that look at the history cost.")
    parser.add_argument("--json", type=Path, help="write the times here, and the table beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    record = environment(argv)
    language_model = load(default_model_path(), progress)
    model, tokenizer = language_model.model, language_model.tokenizer
    written = TEXT.read_text(encoding="utf-8")
    sentences = [language_model.encode(one) for one in written.splitlines(keepends=True) if one]
    prompt = language_model.encode(written)[:32]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0].float()
    of_rules = rules(tokenizer)
    lines: list[dict[str, Any]] = []
    steps: list[Timing] = []
    for length in LENGTHS:
        for kind, ids in texts(sentences, length).items():
            progress(f"{length} ids, {kind}")
            runs = {name: run_of(draws(logits, ids, rule)) for name, rule in of_rules.items()}
            runs[STEP] = run_of(model_steps(model, prompt))
            times = measure(runs, len(prompt), Protocol())
            step = times.pop(STEP)
            steps.append(step)
            off = times.pop(OFF)
            for name, timing in times.items():
                took = timing.median - off.median
                lines.append(
                    {
                        "length": length,
                        "text": kind,
                        "rules": name,
                        "list_us": round(took, 3),
                        "share": took / step.median,
                        "with_rules": timing.to_json(),
                        "without": off.to_json(),
                        "step": step.to_json(),
                    }
                )
    command = command_line("rules", argv)
    least = min(step.median for step in steps) / 1000
    text = f"`{command}`, {record['cpu']}, {record['threads']} threads, {record['date']}\n\n"
    text += f"SmolLM2-135M, a vocabulary of {logits.shape[1]:,}; a step took {least:.1f} ms.\n\n"
    text += table(lines)
    print(text)
    write_result(options.json, {"command": command, "environment": record, "lines": lines}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
