"""Sampling's share of a decode step of Hugging Face's generate, theirs and ours, on the CPU.

``python -m benchmarks.generate`` prints a markdown report; ``--json`` writes it to a file.

A step is one turn of ``model.generate``. Its time in the model is that of ``model.forward``; the
rest is sampling and the loop around it. Four ways take turns, on the same prompts:

* huggingface: ``generate``'s own processors, softmax and multinomial;
* processor: our ``FusedLogitsProcessor`` in ``generate``'s loop;
* fused: our loop, ``custom_generate=fused_generate``;
* greedy: ``generate`` with an argmax and nothing else, the least that its loop takes.

Before anything is timed, processor and fused are checked to give the same tokens.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.timing import command_line, environment, progress, write_result
from llm_sampling import SamplingParams
from llm_sampling.generation import models
from llm_sampling.integrations.huggingface import FusedLogitsProcessor, fused_generate

PROMPT = "The history of the lighthouse begins with a storm, a lost ship and a promise: "
CASES = {
    "top-p 0.9": {"top_p": 0.9},
    "repetition 1.1, T 0.8, top-k 50, top-p 0.9": {
        "repetition_penalty": 1.1,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
    },
}
NEUTRAL = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
WAYS = ("huggingface", "processor", "fused", "greedy")


@dataclass(frozen=True)
class Line:
    """A row of the table; milliseconds a step, medians over the rounds."""

    model: str
    vocab_size: int
    rows: int
    case: str
    way: str
    step_ms: float
    rest_ms: float
    rounds: int

    @property
    def share(self) -> float:
        """The share of a step that is spent outside of the model."""
        return self.rest_ms / self.step_ms


class Timed:
    """A model whose calls are timed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seconds = 0.0
        forward = model.forward

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **options)
            self.seconds += time.perf_counter() - start
            return output

        # generate looks at the signature
        timed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        model.forward = timed


def large_vocabulary_model() -> Any:
    """A small random Llama with the vocabulary of Llama 3."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(model: Any, ids: torch.Tensor, way: str, case: dict[str, Any], tokens: int) -> torch.Tensor:
    """One ``generate``."""
    params = [SamplingParams(**case, seed=row) for row in range(len(ids))]
    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    if way == "huggingface":
        options |= NEUTRAL | case | {"do_sample": True}
    elif way == "processor":
        processor = FusedLogitsProcessor(params)
        options |= NEUTRAL | {"do_sample": False, "logits_processor": [processor]}
    elif way == "fused":
        options |= NEUTRAL | {"custom_generate": fused_generate, "params": params}
    else:
        options |= {"do_sample": False}
    found: torch.Tensor = model.generate(ids, **options)
    return found[:, ids.shape[1] :]


def measure(
    name: str, timed: Timed, ids: torch.Tensor, case_name: str, tokens: int, rounds: int
) -> list[Line]:
    """All ways on one case, in turn."""
    case = CASES[case_name]
    first, second = (run(timed.model, ids, way, case, 8) for way in ("processor", "fused"))
    if not torch.equal(first, second):
        raise RuntimeError(f"{name}, {case_name}: the two ways drew other tokens")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        shift = turn % len(WAYS)
        for way in WAYS[shift:] + WAYS[:shift]:
            timed.seconds = 0.0
            start = time.perf_counter()
            run(timed.model, ids, way, case, tokens)
            total = time.perf_counter() - start
            found[way].append((total / tokens * 1e3, (total - timed.seconds) / tokens * 1e3))
            progress(f"{name}, {len(ids)} rows, {case_name}, {way}: {total:.2f} s")
    vocab_size = timed.model.config.vocab_size
    return [
        Line(
            name,
            vocab_size,
            len(ids),
            case_name,
            way,
            round(statistics.median(step for step, _ in times), 3),
            round(statistics.median(rest for _, rest in times), 3),
            rounds,
        )
        for way, times in found.items()
    ]


def table(lines: Sequence[Line]) -> str:
    """The report's table."""
    text = "| model | V | rows | case | way | step, ms | outside of the model, ms | share |\n"
    text += "|---|--:|--:|---|---|--:|--:|--:|\n"
    for line in lines:
        text += f"| {line.model} | {line.vocab_size:,} | {line.rows} | {line.case} | {line.way} "
        text += f"| {line.step_ms:.2f} | {line.rest_ms:.2f} | {line.share:.1%} |\n"
    return text


def main(argv: Sequence[str]) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description="Sampling's share of a decode step.")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    real = models.load(models.default_model_path(), progress)
    prompt = torch.tensor([real.tokenizer(PROMPT)["input_ids"]])
    lines = []
    for name, model in (("SmolLM2-135M", real.model), ("random Llama", large_vocabulary_model())):
        timed = Timed(model)
        for rows in options.rows:
            for case in CASES:
                ids = prompt.expand(rows, -1)
                lines += measure(name, timed, ids, case, options.tokens, options.rounds)
    record = environment(argv)
    command = command_line("generate", argv)
    print(f"`{command}`, {record['cpu']}, {record['threads']} threads, {record['date']}\n")
    print(table(lines))
    found = {"command": command, "environment": record, "lines": [asdict(line) for line in lines]}
    write_result(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
