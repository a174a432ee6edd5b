"""The process of one step: ``python -m benchmarks.on_gpu.step NAME DIR SECONDS [--dry-run]``."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.limited import end_on_sigterm
from benchmarks.on_gpu.results import Results


def main(argv: Sequence[str]) -> None:
    """Run the module of this name; what it raises is the reason why the step failed."""
    started = time.monotonic()
    end_on_sigterm()
    from benchmarks.on_gpu.setting import DRY, GPU, Deadline  # torch takes seconds of the limit

    name, folder, seconds, *more = argv
    setting = DRY if more == ["--dry-run"] else GPU
    step = importlib.import_module(f"benchmarks.on_gpu.{name}")
    step.run(setting, Results(Path(folder, f"{name}.json")), Deadline(started + float(seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
