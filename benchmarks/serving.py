"""Times what Python costs in a step in which requests come and go, on the CPU backend.

``python -m benchmarks.serving`` prints a table in Markdown; ``--json FILE`` also writes the
results to a file.

256 requests with penalties run at V = 32,000. Before each step 4 of them go and 4 come, with
prompts of 256 ids. The time of a step is that of all calls, without the time inside of the kernel's
library, which draws, clears counts and writes ids. A RequestTable and a Sampler do the same.

The step is timed twice: with functions that do nothing in the library's place, and with the library
itself. In between the kernel reads 40 MB, which leaves little of Python in the caches, and Python
takes longer to begin with each thing that it does.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.timing import command_line, environment, write_result
from llm_sampling import RequestTable, Sampler, SamplingParams, TokenHistory, sample
from llm_sampling.backends import cpu
from llm_sampling.backends.c_abi import SampleArgs

VOCAB_SIZE, REQUESTS, CHANGES, PROMPT = 32000, 256, 4, 256
GOAL_US = 100.0


#: A step with the number that it has, and the parameters and prompts of the requests that come.
Step = Callable[[int, list[tuple[SamplingParams, list[int]]]], None]


class Clock:
    """Adds up the nanoseconds that are spent inside of functions."""

    def __init__(self) -> None:
        self.taken = 0

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        """A function that does the same."""

        def run(*args: object) -> None:
            start = time.perf_counter_ns()
            function(*args)
            self.taken += time.perf_counter_ns() - start

        return run


def find_nothing_wrong(args: SampleArgs) -> None:
    """What the entry point leaves behind that the step looks at."""
    ctypes.memset(args.status, 0, 4 * args.rows)


@contextmanager
def clocked_library(runs: bool) -> Iterator[Clock]:
    """A clock of the kernel's library, whose functions run or do nothing."""
    clock, library = Clock(), cpu.LIBRARY
    run, update = find_nothing_wrong, lambda args: None
    if runs:
        run, update = library.run, library.update
    with (
        mock.patch.object(library, "run", clock.timed(run)),
        mock.patch.object(library, "update", clock.timed(update)),
    ):
        yield clock


def some_params(seed: int) -> SamplingParams:
    """Parameters with penalties, of one more request."""
    return SamplingParams(
        temperature=0.8, top_k=50, repetition_penalty=1.1, presence_penalty=0.2, seed=seed
    )


def prompts() -> Callable[[], list[int]]:
    """A function that returns the ids of one more prompt."""
    rng = random.Random(0)
    return lambda: [rng.randrange(VOCAB_SIZE) for _ in range(PROMPT)]


def serve_by_table(logits: torch.Tensor) -> Step:
    """A step of a RequestTable."""
    prompt = prompts()
    table = RequestTable(REQUESTS, vocab_size=VOCAB_SIZE, history=True)
    for slot in range(REQUESTS):
        table.set(slot, some_params(slot), prompt_ids=prompt())
    slots = torch.arange(REQUESTS, dtype=torch.int32)

    def step(number: int, new: list[tuple[SamplingParams, list[int]]]) -> None:
        first = number * CHANGES % REQUESTS
        for slot in range(first, first + CHANGES):
            table.clear(slot)
        for slot, (params, ids) in zip(range(first, first + CHANGES), new, strict=True):
            table.set(slot, params, prompt_ids=ids)
        sample(logits, table, slots, record=True)

    return step


def serve_by_sampler(logits: torch.Tensor) -> Step:
    """A step of a Sampler."""
    prompt = prompts()
    params = [some_params(row) for row in range(REQUESTS)]
    history = TokenHistory.from_ids([prompt() for _ in params], None, VOCAB_SIZE)
    sampler = Sampler(params, vocab_size=VOCAB_SIZE, history=history)

    def step(number: int, new: list[tuple[SamplingParams, list[int]]]) -> None:
        sampler.remove(range(CHANGES))
        for new_params, ids in new:
            sampler.add(new_params, prompt_ids=ids)
        sampler(logits)

    return step


def python_of(make: Callable[[torch.Tensor], Step], runs: bool, steps: int) -> float:
    """The median microseconds of a step, without those inside of the kernel's library.

    Args:
        make: what makes the step.
        runs: whether the library's functions run.
        steps: how many are timed.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(REQUESTS, VOCAB_SIZE, generator=generator)
    prompt, taken = prompts(), []
    with clocked_library(runs) as library:
        step = make(logits)
        for number in range(-5, steps):  # the first ones warm up
            new = [(some_params(change), prompt()) for change in range(CHANGES)]
            before, start = library.taken, time.perf_counter_ns()
            step(number % REQUESTS, new)
            all_of_it = time.perf_counter_ns() - start
            if number >= 0:
                taken.append((all_of_it - (library.taken - before)) / 1000)
    return statistics.median(taken)


def run(steps: int) -> list[dict[str, Any]]:
    """Every line of the table: medians in microseconds."""
    return [
        {
            "by": name,
            "python_us": round(python_of(make, runs=False, steps=steps), 1),
            "beside_the_kernel_us": round(python_of(make, runs=True, steps=steps), 1),
        }
        for name, make in (("RequestTable", serve_by_table), ("Sampler", serve_by_sampler))
    ]


def main(argv: Sequence[str]) -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = run(options.steps)
    print("| by | Python of a step, µs | the same beside the kernel, µs | goal |")
    print("|---|--:|--:|--:|")
    for line in lines:
        goal = f"{GOAL_US:g}" if line["by"] == "RequestTable" else ""
        print(f"| {line['by']} | {line['python_us']} | {line['beside_the_kernel_us']} | {goal} |")
    record = {"command": command_line("serving", argv), "environment": environment(argv)}
    write_result(options.json, {**record, "lines": lines})


if __name__ == "__main__":
    main(sys.argv[1:])
