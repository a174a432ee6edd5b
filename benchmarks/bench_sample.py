"""Time the sampler beside others on the CPU: ``python benchmarks/bench_sample.py``.

Every provider is compared with the reference on the very inputs that it is then timed on; one that
fails prints WRONG instead of a time. A markdown report goes to stdout, progress to stderr.
README.md in this folder has the protocol.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cases import CASES, INPUTS, Case, Inputs, make_buffers, make_inputs
from providers import (
    AMAX,
    HUGGING_FACE,
    PROVIDERS,
    SOFTMAX,
    Contender,
    Task,
    WrongAnswerError,
    fastest_backend,
    overhead_calls,
    sample_of,
    sampler_of,
)
from timing import Protocol, Timing, environment, measure, progress

MIN_VOCAB_SIZE = 256
OVERHEAD_VOCAB_SIZE = 32
OVERHEAD_GOAL_US = 10.0


@dataclass(frozen=True)
class Result:
    """One line of the table: a provider's time, or why there is none."""

    vocab_size: int
    rows: int
    inputs: str
    buffers: int
    case: str
    provider: str
    timing: Timing | None
    note: str = ""
    wrong: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields, with the timing's."""
        return asdict(self) | {"timing": None if self.timing is None else self.timing.to_json()}


@dataclass(frozen=True)
class Goal:
    """A ratio of two providers' times that is to stay on one side of a limit."""

    case: str
    numerator: str
    denominator: str
    rows: tuple[int, ...]
    limit: float
    at_most: bool = True


def goals() -> list[Goal]:
    """What the fastest backend here is held to, with one thread and a vocabulary of 128,256."""
    ours = sampler_of(fastest_backend())
    return [
        Goal("top-k-50", ours, AMAX, (8,), 2.0),
        Goal("top-p-0.9", ours, SOFTMAX, (1, 8), 1.0),
        Goal("top-p-0.9-flat", ours, SOFTMAX, (1, 8), 1.0),
        Goal("full-chain", HUGGING_FACE, ours, (8,), 100.0, at_most=False),
    ]


def run_case(
    case: Case, inputs: Inputs, providers: Sequence[str], protocol: Protocol
) -> list[Result]:
    """Check every provider, then time those that passed, all in turns."""
    task = Task(case, inputs)
    passed: dict[str, tuple[Contender, str]] = {}
    failed: dict[str, tuple[str, bool]] = {}
    for name in providers:
        contender = PROVIDERS[name].build(task)
        if isinstance(contender, str):
            failed[name] = (contender, False)
            continue
        try:
            passed[name] = (contender, contender.check())
        except WrongAnswerError as error:
            failed[name] = (str(error), True)
    calls = {name: contender.call for name, (contender, _) in passed.items()}
    timings = measure(calls, len(inputs.buffers), protocol) if calls else {}
    results = []
    for name in providers:
        note, wrong = failed.get(name, ("", False))
        if name in passed:
            note = passed[name][1]
        results.append(
            Result(
                vocab_size=inputs.vocab_size,
                rows=inputs.rows,
                inputs=inputs.name,
                buffers=len(inputs.buffers),
                case=case.name,
                provider=name,
                timing=timings.get(name),
                note=note,
                wrong=wrong,
            )
        )
    return results


def run_grid(options: argparse.Namespace, providers: Sequence[str]) -> list[Result]:
    """Every case on every input and shape."""
    results = []
    for vocab_size in options.vocab:
        for rows in options.rows:
            for name in INPUTS:
                cases = [
                    CASES[case]
                    for case in options.cases
                    if name in options.inputs and name in (CASES[case].inputs or INPUTS)
                ]
                buffers = make_buffers(name, rows, vocab_size) if cases else []
                for case in cases:
                    progress(f"V = {vocab_size:,}, {rows} rows, {name}, {case.name}")
                    inputs = make_inputs(name, buffers, case)
                    results += run_case(case, inputs, providers, options.protocol)
    return results


# The report


def _median(results: Sequence[Result], provider: str) -> float | None:
    for result in results:
        if result.provider == provider and result.timing is not None:
            return result.timing.median
    return None


def _ratio(numerator: float | None, denominator: float | None) -> str:
    if numerator is None or denominator is None:
        return "-"
    ratio = numerator / denominator
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _time(timing: Timing) -> str:
    digits = 2 if timing.median < 10 else 1 if timing.median < 1000 else 0
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (timing.p10, timing.median, timing.p90)
    )
    return f"{middle} ({low}-{high})"


def print_tables(results: Sequence[Result]) -> None:
    """One table for each shape and input."""
    groups: dict[tuple[int, int, str], dict[str, list[Result]]] = {}
    for result in results:
        key = (result.vocab_size, result.rows, result.inputs)
        groups.setdefault(key, {}).setdefault(result.case, []).append(result)
    for (vocab_size, rows, inputs), cases in groups.items():
        print(f"\n## V = {vocab_size:,}, {rows} row{'s' * (rows != 1)}, {inputs}\n")
        print(
            "| case | provider | µs per call (p10-p90) | ÷ amax | ÷ softmax "
            "| speed-up over Hugging Face | note |"
        )
        print("|---|---|--:|--:|--:|--:|---|")
        for case, lines in cases.items():
            limits = [_median(lines, name) for name in (AMAX, SOFTMAX)]
            others = _median(lines, HUGGING_FACE)
            for line in lines:
                if line.timing is None:
                    cells = ["WRONG" if line.wrong else "-", "-", "-", "-", line.note]
                else:
                    time = line.timing.median
                    ratios = [_ratio(time, limit) for limit in limits]
                    cells = [_time(line.timing), *ratios, _ratio(others, time), line.note]
                print("| " + " | ".join([case, line.provider, *cells]) + " |")


def print_overhead(timings: dict[str, Timing]) -> None:
    """What a call costs where the kernel has next to nothing to do."""
    print(
        f"\n## The call itself: 1 row, V = {OVERHEAD_VOCAB_SIZE}, "
        f"{fastest_backend()} backend, kernel included\n"
    )
    print("| call | µs (p10-p90) |")
    print("|---|--:|")
    for name, timing in timings.items():
        print(f"| {name} | {_time(timing)} |")


def judge_goals(results: Sequence[Result], overhead: dict[str, Timing]) -> list[dict[str, Any]]:
    """Every goal on everything timed that it speaks of."""
    lines: list[dict[str, Any]] = []
    for goal in goals():
        found: dict[tuple[int, int, str], list[Result]] = {}
        for result in results:
            if result.case == goal.case and result.rows in goal.rows:
                key = (result.vocab_size, result.rows, result.inputs)
                found.setdefault(key, []).append(result)
        for (vocab_size, rows, inputs), group in found.items():
            top, bottom = _median(group, goal.numerator), _median(group, goal.denominator)
            if top is None or bottom is None:
                continue
            value = top / bottom
            lines.append(
                {
                    "goal": f"{goal.case}: {goal.numerator} ÷ {goal.denominator}",
                    "on": f"V = {vocab_size:,}, {rows} row{'s' * (rows != 1)}, {inputs}",
                    "value": round(value, 3),
                    "limit": f"{'≤' if goal.at_most else '≥'} {goal.limit:g}",
                    "met": value <= goal.limit if goal.at_most else value >= goal.limit,
                }
            )
    median = overhead["Sampler"].median
    lines.append(
        {
            "goal": "the prepared call, kernel included, µs",
            "on": f"V = {OVERHEAD_VOCAB_SIZE}, 1 row",
            "value": round(median, 3),
            "limit": f"≤ {OVERHEAD_GOAL_US:g}",
            "met": median <= OVERHEAD_GOAL_US,
        }
    )
    return lines


def print_goals(lines: Sequence[dict[str, Any]]) -> None:
    """The verdicts as a table."""
    print("\n## Goals\n")
    print("| goal | on | measured | limit | |")
    print("|---|---|--:|--:|---|")
    for line in lines:
        verdict = "met" if line["met"] else "**missed**"
        print(
            f"| {line['goal']} | {line['on']} | {line['value']:.3g} | {line['limit']} | {verdict} |"
        )


def print_header(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Where and how."""
    print("# Sampler benchmark\n")
    cores = "core" if record["cores"] == 1 else "cores"
    print(
        f"* {record['cpu']}, {record['cores']} {cores}, load {record['load_average'][0]} at the "
        f"start; caches: {', '.join(f'{k} {v}' for k, v in record['caches'].items())}"
    )
    print(
        f"* Python {record['python']}, torch {record['torch']} "
        f"({record['torch_cpu_capability']}), transformers {record['transformers']}, "
        f"llm_sampling {record['llm_sampling']}, commit {record['commit']}"
        f"{' with changes' if record['modified'] else ''}"
    )
    print(
        f"* float32 logits, threads: {record['threads']}; medians of {options.protocol.samples} "
        f"samples in {options.protocol.rounds} rounds; {record['date']}"
    )
    print(f"* `{shlex.join(['python', 'benchmarks/bench_sample.py', *record['argv']])}`")
    if options.quick:
        print("* quick: too few samples to quote")
    for name, reason in record["absent"].items():
        print(f"* {name}: absent, {reason}")


# The command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ``--goals`` and ``--quick`` choose what was not given by hand."""
    parser = argparse.ArgumentParser(description="Time the sampler beside others on the CPU.")
    parser.add_argument("--vocab", type=_positive, nargs="+", default=[128256], metavar="V")
    parser.add_argument("--rows", type=_positive, nargs="+", metavar="N", help="default: 1 8")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        metavar="CASE",
        help=f"default: all of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        choices=list(INPUTS),
        metavar="INPUT",
        help=f"default: all of {', '.join(INPUTS)}",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(PROVIDERS),
        metavar="PROVIDER",
        help=f"default: all but the reference of {', '.join(PROVIDERS)}",
    )
    parser.add_argument("--goals", action="store_true", help="only what the goals speak of")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few samples, two of the inputs: does it run, is it right?",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    if min(options.vocab) < MIN_VOCAB_SIZE:
        parser.error(f"--vocab must be at least {MIN_VOCAB_SIZE}, got {min(options.vocab)}")
    wanted = goals() if options.goals else []
    options.rows = options.rows or [1, 8]
    options.cases = options.cases or [goal.case for goal in wanted] or list(CASES)
    options.inputs = options.inputs or (["normal1", "model"] if options.quick else list(INPUTS))
    if options.providers is None:
        reference = {sampler_of("torch"), sample_of("torch")}
        options.providers = [
            name for name in PROVIDERS if name not in reference or fastest_backend() == "torch"
        ]
        if wanted:
            named = {name for goal in wanted for name in (goal.numerator, goal.denominator)}
            options.providers = [name for name in options.providers if name in named]
    options.protocol = Protocol(rounds=2, per_turn=2, warm_up=1) if options.quick else Protocol()
    return options


def main(argv: Sequence[str]) -> int:
    """Run; 1 if one of our backends gave a wrong answer."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    absent = {name: PROVIDERS[name].why_absent() for name in options.providers}
    record = environment(argv)
    record["absent"] = {name: reason for name, reason in absent.items() if reason is not None}
    providers = [name for name in options.providers if absent[name] is None]

    print_header(record, options)
    progress(f"the call itself, V = {OVERHEAD_VOCAB_SIZE}")
    overhead = measure(overhead_calls(OVERHEAD_VOCAB_SIZE), 1, options.protocol)
    results = run_grid(options, providers)
    print_tables(results)
    print_overhead(overhead)
    verdicts = judge_goals(results, overhead)
    print_goals(verdicts)
    if options.json is not None:
        report = {
            "environment": record,
            "protocol": asdict(options.protocol),
            "results": [result.to_json() for result in results],
            "overhead": {name: timing.to_json() for name, timing in overhead.items()},
            "goals": verdicts,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    wrong = [result for result in results if result.wrong]
    for result in wrong:
        progress(f"WRONG: {result.provider}, {result.case}, {result.inputs}: {result.note}")
    return int(any(":" in result.provider for result in wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
