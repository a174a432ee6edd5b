"""Times one row on one thread and on several: the CPU kernel, and torch's amax and softmax.

``python -m benchmarks.threads`` prints a report in Markdown; ``--json FILE`` also writes the
results to a file.

Whether a second thread helps depends on whether it is awake. So each call is timed on its own,
after

* a model: an operation of torch that writes the same logits on all threads;
* itself: the same call on other logits, on as many threads;
* a pause of 5 ms, in which the threads fall asleep and the caches lose the logits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.inputs import make_buffers, make_inputs
from benchmarks.providers import PROVIDERS, Task, sampler_of
from benchmarks.timing import command_line, environment, progress, write_result

VOCAB_SIZE = 128256
SHOWN = {
    "greedy": (sampler_of("cpu"), "amax"),
    "top-k-50": (sampler_of("cpu"),),
    "top-p-0.9": (sampler_of("cpu"), "softmax"),
    "full-chain": (sampler_of("cpu"),),
}


def measure(
    call: Callable[[int], object],
    before: Callable[[int], object],
    buffers: int,
    threads: int,
    calls: int,
) -> dict[str, float]:
    """Return the median microseconds of a call on one thread and on ``threads``, in turn."""
    times: dict[int, list[int]] = {1: [], threads: []}
    for turn in range(calls):
        for count, taken in times.items():
            buffer = turn % buffers
            torch.set_num_threads(count)
            before(buffer)
            torch.set_num_threads(count)
            start = time.perf_counter_ns()
            call(buffer)
            taken.append(time.perf_counter_ns() - start)
    alone, together = (statistics.median(taken) / 1000 for taken in times.values())
    return {"alone_us": round(alone, 2), "together_us": round(together, 2)}


def befores(
    call: Callable[[int], object], buffers: Sequence[torch.Tensor], threads: int
) -> dict[str, Callable[[int], object]]:
    """Return what runs just before a timed call, by name; each takes the number of a buffer."""

    def model(buffer: int) -> None:
        torch.set_num_threads(threads)
        buffers[buffer].mul_(1.0)

    return {
        "a model": model,
        "itself": lambda buffer: call((buffer + 1) % len(buffers)),
        "a pause": lambda _: time.sleep(0.005),
    }


def run(threads: int, calls: int) -> list[dict[str, Any]]:
    """Return every line of the table."""
    lines = []
    for name in ("model", "flat"):
        buffers = make_buffers(name, 1, VOCAB_SIZE)
        for case, providers in SHOWN.items():
            task = Task(CASES[case], make_inputs(name, buffers, CASES[case]))
            for provider in providers:
                call = PROVIDERS[provider].build(task).call
                for after, before in befores(call, buffers, threads).items():
                    times = measure(call, before, len(buffers), threads, calls)
                    what = {"input": name, "case": case, "provider": provider, "after": after}
                    lines.append(what | times)
                    progress(f"{name}, {case}, {provider}, after {after}")
    return lines


def table(lines: Sequence[dict[str, Any]], threads: int) -> str:
    """Return the report's table in Markdown."""
    text = f"| input | case | who | after | 1 thread, µs | {threads} threads, µs | ratio |\n"
    text += "|---|---|---|---|--:|--:|--:|\n"
    for line in lines:
        alone, together = line["alone_us"], line["together_us"]
        text += f"| {line['input']} | {line['case']} | {line['provider']} | {line['after']} "
        text += f"| {alone:.1f} | {together:.1f} | {together / alone:.2f} |\n"
    return text


def main(argv: Sequence[str]) -> int:
    """Print the report, and write the results to a file on request."""
    parser = argparse.ArgumentParser(description="One row on one thread and on more.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", type=int, default=400, help="timed calls of each kind")
    options = parser.parse_args(argv)
    if options.threads < 2:
        parser.error(f"--threads must be an integer >= 2, got {options.threads}")
    if options.calls < 1:
        parser.error(f"--calls must be an integer >= 1, got {options.calls}")
    record = environment(argv)
    lines = run(options.threads, options.calls)
    command = command_line("threads", argv)
    print(f"`{command}`, {record['cpu']}, {record['date']}, V = {VOCAB_SIZE:,}, one row\n")
    print(table(lines, options.threads))
    record |= {"threads": options.threads}
    write_result(options.json, {"command": command, "environment": record, "lines": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
