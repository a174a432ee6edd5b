"""Step 5: compute-sanitizer's racecheck and memcheck over the kinds of launch of launches.py.

https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer/ describes the tools and their summaries.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.limited import AT_ITS_LIMIT, BY_ITSELF, GRACE_S, run_limited
from benchmarks.on_gpu.results import Results
from benchmarks.on_gpu.setting import Deadline, Setting

TOOLS = ("racecheck", "memcheck")
#: The exit code that compute-sanitizer is told to end with where it has found something.
FOUND = 86


def summary_of(output: str) -> str:
    """The last line of a tool's output that sums up, without its marks; "" where there is none."""
    lines = re.findall(r"^=+ ((?:\w+ )?SUMMARY: .*)$", output, re.MULTILINE)
    return lines[-1].strip() if lines else ""


def is_clean(summary: str) -> bool:
    """Whether a summary counts nothing at all."""
    counts = re.findall(r"\d+", summary)
    return bool(counts) and all(int(count) == 0 for count in counts)


def run(setting: Setting, results: Results, deadline: Deadline) -> None:
    """Write a line for each tool and backend; the tools' output is in files beside this step's.

    Args:
        setting: the program and the backends.
        results: gets ``lines`` and ``verdict``.
        deadline: the runs share the time until then.
    """
    assert results.path is not None
    absent = setting.absent()
    program = shutil.which(setting.sanitizer) if setting.sanitizer else None
    results.put(absent=absent, sanitizer=program, lines=[])
    if setting.sanitizer and program is None:
        results.put(verdict="not installed")
        return
    backends = [name for name in setting.backends if name not in absent]
    planned = [(backend, tool) for backend in backends for tool in TOOLS]
    for place, (backend, tool) in enumerate(planned):
        left_s = deadline.at - deadline.clock() - 2 * GRACE_S
        if left_s <= 0:
            break
        limit_s = left_s / (len(planned) - place)
        path = results.path.with_name(f"sanitizers-{backend}-{tool}.out")
        results.add("lines", _line(backend, tool, program, limit_s, path))
    results.put(verdict=_verdict(results.record["lines"], len(planned), program is not None))


def _verdict(lines: Sequence[Mapping[str, Any]], planned: int, is_watched: bool) -> str:
    unclean = [line for line in lines if not line["clean"]]
    if any(line["how"] != AT_ITS_LIMIT for line in unclean):
        return "ERRORS"
    if planned == 0:
        return "nothing ran"
    if unclean or len(lines) < planned:
        return "unfinished"
    return "no errors" if is_watched else "no sanitizer was asked for"


def _line(
    backend: str, tool: str, program: str | None, limit_s: float, stdout: Path
) -> dict[str, Any]:
    """Run the launches under a tool; without a program as a dry run, in which no tool watches."""
    command = [sys.executable, "-m", "benchmarks.on_gpu.launches", backend]
    if program is None:
        command.append("--dry-run")
    else:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *command]
    # an allocation for each tensor, so that an access beyond a tensor's ends is seen
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = run_limited(command, limit_s, stdout, stdout.with_suffix(".err"), environment)
    summary = summary_of(stdout.read_text(encoding="utf-8", errors="replace"))
    return {
        "backend": backend,
        "tool": tool,
        **ended._asdict(),
        "summary": summary,
        "clean": ended.how == BY_ITSELF and (program is None or is_clean(summary)),
    }
