"""Times what results and masks add to a call of the CPU kernel; cpu_cost.py counts instructions.

``python -m benchmarks.additions`` prints two tables in Markdown: what top logprobs, kept sets and
their like add to a call for tokens, and how long rows with masks take beside rows without;
``--json FILE`` also writes the results to FILE, and the tables beside it with the suffix ``.md``.
It takes four minutes.

One row of 128,256 tokens on one thread. The calls that are compared with each other take turns, as
README.md says under "Method", but ten times as often, and the numbers are medians. The goals are
for the counts: a time also has what Python does with a mask, and with each tensor that is returned.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_cost import (
    VOCAB_SIZE,
    compare_masks,
    compare_results,
    masked_parts,
    masked_table,
    result_parts,
    results_table,
)
from benchmarks.providers import Contender
from benchmarks.timing import (
    Protocol,
    command_line,
    environment,
    measure,
    progress,
    runner,
    write_result,
)

#: The names by which the calls that are compared with each other differ.
VARIANTS = {"result", "mask", "how"}
Part = tuple[dict[str, str], Callable[[int], object], int]


def run(parts: Iterable[Part], protocol: Protocol) -> list[dict[str, Any]]:
    """Return the names of every part with ``total``, the median microseconds of a call."""

    def subject(part: Part) -> list[str]:
        return [value for name, value in part[0].items() if name not in VARIANTS]

    lines = []
    for names, group in itertools.groupby(parts, subject):
        compared = list(group)
        progress(", ".join(names))
        runs = {str(i): runner(Contender(call)) for i, (_, call, _) in enumerate(compared)}
        timings = measure(runs, compared[0][2], protocol)
        for (part, _, _), timing in zip(compared, timings.values(), strict=True):
            lines.append(part | {"total": round(timing.median, 2)})
    return lines


def main(argv: Sequence[str]) -> int:
    """Print the report, and write it to files on request."""
    parser = argparse.ArgumentParser(description="What results and masks add to a call, in time.")
    parser.add_argument("--json", type=Path, help="write the results here, and tables beside it")
    parser.add_argument("--rounds", type=int, default=100, help="turns of each call")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be an integer >= 1, got {options.rounds}")
    torch.set_num_threads(1)
    record = environment(argv)
    protocol = Protocol(rounds=options.rounds, budget_s=10.0)
    results = compare_results(run(result_parts(None), protocol))
    masks = compare_masks(run(masked_parts(None), protocol))
    command = command_line("additions", argv)
    text = f"`{command}`, {record['cpu']}, {record['date']}, V = {VOCAB_SIZE:,}, one row, "
    text += f"one thread\n\n{results_table(results, 'time', 'µs')}\n"
    text += masked_table(masks, "time", "µs")
    print(text)
    report = {"command": command, "environment": record, "unit": "µs per call"}
    write_result(options.json, report | {"results": results, "masks": masks}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
