"""The command ``python -m benchmarks.on_gpu``; the package's docstring says what it is for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.limited import end_on_sigterm
from benchmarks.on_gpu.report import failed
from benchmarks.on_gpu.steps import BUDGET_S, STEPS, run_steps


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text}")
    return value


def main(argv: Sequence[str]) -> int:
    """Run the steps and print the report; 1 where a step failed or found something wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu",
        description="Check and time the GPU kernels, in minutes and without a network.",
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all files")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: does it all run?")
    parser.add_argument(
        "--budget", type=_seconds, default=BUDGET_S, metavar="SECONDS", help="default: %(default)g"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    options = parser.parse_args(argv)
    steps = [step for step in STEPS if options.steps is None or step.name in options.steps]
    end_on_sigterm()
    out = options.out.resolve()  # the steps run in another folder
    record = run_steps(steps, out, argv, budget_s=options.budget, dry_run=options.dry_run)
    print((out / "on-gpu.md").read_text(encoding="utf-8"))
    return int(failed(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
