"""Time the sampler and its peers: ``python -m benchmarks``. README.md has the protocol."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, REAL, RUNS, Run
from benchmarks.goals import judge, time_calls
from benchmarks.inputs import MAKERS, AbsentError
from benchmarks.plots import draw
from benchmarks.providers import PROVIDERS, TWO_THREADS
from benchmarks.report import markdown
from benchmarks.suite import Suite, open_suite
from benchmarks.timing import Protocol, environment, progress, write_result

RESULTS = Path(__file__).with_name("results")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK = Protocol(rounds=2, per_turn=2, warm_up=1)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time the sampler and its peers."
    )

    def names(option: str, choices: Sequence[str], what: str) -> None:
        parser.add_argument(option, nargs="+", choices=choices, metavar="NAME", help=what)

    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the logits; default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--threads", type=_positive, default=1, metavar="N")
    names("--runs", list(RUNS), f"of {', '.join(RUNS)}; default: all but quick and full")
    names("--inputs", [*MAKERS, *REAL], f"a run of your own, on: {', '.join([*MAKERS, *REAL])}")
    parser.add_argument("--vocab", type=_positive, nargs="+", metavar="V", help="default: 128256")
    parser.add_argument("--rows", type=_positive, nargs="+", metavar="N", help="default: 8")
    names("--cases", list(CASES), f"of {', '.join(CASES)}")
    names("--providers", list(PROVIDERS), f"of {', '.join(PROVIDERS)}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the run quick: everything is checked, and timed too briefly to quote",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="STEM",
        help="write STEM.json, STEM.md and the pictures; default: results/DEVICE where nothing "
        "chooses what is run, else none",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="run nothing: print, write and draw this results file anew",
    )
    options = parser.parse_args(argv)
    own = [options.inputs, options.vocab, options.rows, options.cases]
    if any(own) and (options.runs or options.quick):
        parser.error("--runs and --quick choose inputs, vocabulary sizes, rows and cases")
    if options.quick and options.runs:
        parser.error("--quick is a run: it goes without --runs")
    if options.vocab and min(options.vocab) < 256:
        parser.error(f"--vocab must be at least 256, got {min(options.vocab)}")
    options.workloads = _workloads(options)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    complete = not (any(own) or options.runs or options.quick or options.providers)
    if options.out is None and complete:
        options.out = RESULTS / options.device
    if options.providers is None:
        options.providers = [
            name
            for name, provider in PROVIDERS.items()
            if provider.by_default and options.device in provider.devices
        ]
        if options.device == "cpu" and not options.quick:
            options.providers.append(TWO_THREADS)
    return options


def _workloads(options: argparse.Namespace) -> list[Run]:
    if options.quick:
        return [RUNS["quick"]]
    if options.inputs or options.vocab or options.rows or options.cases:
        own = Run(
            tuple(options.inputs or MAKERS),
            tuple(options.vocab or [128256]),
            tuple(options.rows or [8]),
            tuple(options.cases or RUNS["quick"].cases),
            variants=True,
        )
        return [own]
    return [
        run
        for name, run in RUNS.items()
        if (name in options.runs if options.runs else run.by_default)
    ]


def main(argv: Sequence[str]) -> int:
    """Run and report; 1 if one of our backends gave a wrong answer."""
    options = parse(argv)
    if options.report is not None:
        record = json.loads(options.report.read_text(encoding="utf-8"))
        _write_report(record, options.report.with_suffix(""))
        return 0
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = environment(argv)
    protocol = QUICK if options.quick else Protocol()
    with open_suite(options.providers, options.device, DTYPES[options.dtype], protocol) as suite:
        for name, reason in suite.absent.items():
            progress(f"absent: {name}: {reason}")
        record = _record(suite, options, machine, protocol)
    if options.out is None:
        print(markdown(record))
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_result(options.out.with_suffix(".json"), record)
        _write_report(record, options.out)
    return int(
        any(
            line["wrong"]
            for line in record["results"]
            if PROVIDERS[line["provider"]].module == "ours"
        )
    )


def _record(
    suite: Suite, options: argparse.Namespace, machine: dict[str, Any], protocol: Protocol
) -> dict[str, Any]:
    """A results file's content."""
    calls = time_calls(protocol) if options.device == "cpu" else {}
    results = [result for workload in options.workloads for result in suite.run(workload)]
    return {
        "environment": machine,
        "protocol": asdict(protocol),
        "dtype": options.dtype,
        "quick": options.quick,
        "versions": suite.versions,
        "absent": suite.absent,
        "calls": {name: timing.to_json() for name, timing in calls.items()},
        "goals": [] if options.quick else judge(results, calls),
        "results": [result.to_json() for result in results],
    }


def _write_report(record: dict[str, Any], stem: Path) -> None:
    """Print the report of a results file; write it and the pictures beside that file."""
    print(markdown(record))
    stem.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    try:
        for file in draw(record, stem):
            progress(f"wrote {file}")
    except AbsentError as error:
        progress(f"no pictures: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
