"""The table of the steps, and their run: one after the other, each in a process with a limit.

This process imports no torch and asks nothing of the GPU, so that no step can take it along.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.limited import GRACE_S, run_limited
from benchmarks.on_gpu.report import markdown
from benchmarks.on_gpu.results import read_json, write_json

#: Seconds for all steps together.
BUDGET_S = 480.0


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: of its module here, and of its files.
        limit_s: the seconds that it may take; see ``share``.
        command: what runs instead of its module; it gets no arguments.
    """

    name: str
    limit_s: float
    command: tuple[str, ...] = ()

    def argv(self, out: Path, limit_s: float, dry_run: bool) -> list[str]:
        """The command line of its process."""
        if self.command:
            return list(self.command)
        # faulthandler: a crash in compiled code leaves the Python lines that led to it
        argv = [sys.executable, "-u", "-X", "faulthandler", "-m", "benchmarks.on_gpu.step"]
        argv += [self.name, str(out), f"{limit_s:.1f}"]
        return [*argv, "--dry-run"] if dry_run else argv


STEPS = (
    Step("device", 30),
    Step("self_test", 50),
    Step("parity", 110),
    Step("threads", 40),
    Step("sanitizers", 80),
    Step("times", 140),
    Step("predicted", 20),
)
assert sum(step.limit_s for step in STEPS) < BUDGET_S


def share(step: Step, following: Sequence[Step], left_s: float) -> float:
    """The seconds that a step may take: its share of what is left for it and those that follow.

    So a step that ends early leaves time to all that follow, up to twice their limits, and where
    time is short they all get less. The time that it takes to end a step that hangs is kept back.
    """
    left_s -= GRACE_S * (1 + len(following))
    together_s = step.limit_s + sum(other.limit_s for other in following)
    return min(2 * step.limit_s, left_s * step.limit_s / together_s)


def run_steps(
    steps: Sequence[Step],
    out: Path,
    argv: Sequence[str],
    *,
    budget_s: float = BUDGET_S,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run the steps, and write ``on-gpu.json`` and ``on-gpu.md`` after each.

    Args:
        steps: in this order.
        out: the folder of all files; what earlier runs of these steps left there is deleted.
        argv: the arguments of the command, for the record.
        budget_s: seconds for all steps together.
        dry_run: whether the steps run without a GPU.
        clock: of the budget, in seconds.

    Returns:
        What ``on-gpu.json`` holds.
    """
    started = clock()
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "argv": list(argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": dry_run,
        "budget_s": budget_s,
        "steps": [],
    }
    for step in steps:
        for suffix in (".json", ".out", ".err"):
            (out / f"{step.name}{suffix}").unlink(missing_ok=True)
    for place, step in enumerate(steps):
        limit_s = share(step, steps[place + 1 :], budget_s - (clock() - started))
        line = {"name": step.name, "limit_s": round(max(limit_s, 0.0), 1), "seconds": 0.0}
        line |= {"ended": "not started", "reason": "no time was left", "result": None}
        record["steps"].append(line)
        if limit_s > 0:
            print(f"{step.name}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
            line |= {"ended": "interrupted", "reason": ""}
            try:
                command = step.argv(out, limit_s, dry_run)
                files = out / f"{step.name}.out", out / f"{step.name}.err"
                how, seconds, reason = run_limited(command, limit_s, *files)
                line |= {"ended": how, "seconds": seconds, "reason": reason}
            finally:  # also where this process is told to end
                line["result"] = read_json(out / f"{step.name}.json")
                _write(out, record)
    _write(out, record)  # those that were not started, too
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    write_json(out / "on-gpu.json", record)
    try:
        text = markdown(record)
    except Exception:  # what is left of a step may be incomplete; the other steps still run
        text = f"# The report failed; on-gpu.json has its content\n\n{traceback.format_exc()}"
    (out / "on-gpu.md").write_text(text, encoding="utf-8")
