"""How a call is timed, by the protocol of README.md; the record of the machine; results files."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

import llm_sampling
from benchmarks.providers import Contender

ROOT = Path(__file__).resolve().parent.parent

#: A sample is as many calls in a row as take about this long, so that the clock costs nothing.
SAMPLE_NS = 300_000


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over all samples."""

    median: float
    p10: float
    p90: float
    samples: int
    calls_per_sample: int

    def to_json(self) -> dict[str, Any]:
        """The numbers, rounded to nanoseconds."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Protocol:
    """How many samples are taken: ``rounds`` turns of ``per_turn`` samples for each call.

    A call that would take more than ``budget_s`` seconds for that gets fewer, at least ``least``.
    """

    rounds: int = 10
    per_turn: int = 4
    warm_up: int = 2
    budget_s: float = 0.7
    least: int = 3

    def samples(self, sample_ns: float) -> int:
        """How many samples of this length a call gets."""
        wanted = self.rounds * self.per_turn
        return max(min(self.least, wanted), min(wanted, int(self.budget_s * 1e9 / sample_ns)))


#: Runs the calls of these buffers one after another and says how many nanoseconds they took.
Run = Callable[[Sequence[int]], int]


def runner(contender: Contender, clock: str = "wall") -> Run:
    """What times a provider in this process.

    Args:
        contender: the provider, ready.
        clock: "wall"; on a GPU "events" for the time on the device, "host" for the time until the
            call returns, which is what Python and the launch cost.
    """

    def run(order: Sequence[int]) -> int:
        threads = torch.get_num_threads()
        if contender.threads is not None:
            torch.set_num_threads(contender.threads)
        try:
            if contender.restore is None:
                return _time(lambda: [contender.call(buffer) for buffer in order], clock)
            total = 0
            for buffer in order:
                contender.restore(buffer)
                total += _time(functools.partial(contender.call, buffer), clock)
            return total
        finally:
            torch.set_num_threads(threads)

    return run


def _time(work: Callable[[], object], clock: str) -> int:
    if clock == "wall":
        start = perf_counter_ns()
        work()
        return perf_counter_ns() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = perf_counter_ns()
    first.record()
    work()
    last.record()
    host = perf_counter_ns() - start
    torch.cuda.synchronize()
    return host if clock == "host" else int(first.elapsed_time(last) * 1e6)


def measure(runs: Mapping[str, Run], buffers: int, protocol: Protocol) -> dict[str, Timing]:
    """Time every run. They take turns, in another order each round.

    Args:
        runs: each takes indices of input buffers, 0 .. ``buffers`` - 1.
        buffers: every call goes through them in turn, so that no input stays in the nearest cache.
        protocol: how many samples.
    """
    names = list(runs)
    repeats: dict[str, int] = {}
    wanted: dict[str, int] = {}
    steps = {name: count() for name in names}

    def run(name: str, times: int) -> int:
        return runs[name]([next(steps[name]) % buffers for _ in range(times)])

    samples: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            fastest = min(run(name, 1) for _ in range(protocol.warm_up))
            if fastest * 4 < SAMPLE_NS:  # one call says little about many short ones
                times = max(4, SAMPLE_NS // (4 * max(fastest, 1)))
                fastest = run(name, times) // times
            repeats[name] = max(1, SAMPLE_NS // max(fastest, 1))
            wanted[name] = protocol.samples(fastest * repeats[name])
        for turn in range(protocol.rounds):
            # another order each time, since a run finds in the caches what the one before left
            for name in random.Random(turn).sample(names, len(names)):
                # spread each run's samples evenly over the rounds
                number = wanted[name] * (turn + 1) // protocol.rounds - len(samples[name])
                if number == 0:
                    continue
                if number > 1:
                    run(name, 1)  # brings its code and tables back into the caches
                for _ in range(number):
                    samples[name].append(run(name, repeats[name]) / repeats[name] / 1000)
            gc.collect()
    finally:
        if collects:
            gc.enable()
    return {name: summary(samples[name], repeats[name]) for name in names}


def summary(values: Sequence[float], calls_per_sample: int) -> Timing:
    """The median and deciles of at least two samples, in microseconds per call."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), deciles[0], deciles[-1], len(values), calls_per_sample)


def command_line(module: str, argv: Sequence[str]) -> str:
    """The command that was run: ``python -m benchmarks.MODULE`` and its arguments."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *argv])


def write_result(path: Path | None, record: Mapping[str, Any], report: str | None = None) -> None:
    """Write a results file as JSON, and beside it a report as markdown.

    Args:
        path: of the JSON; None writes nothing, as where ``--json`` was not given.
        record: what the file holds.
        report: the markdown, for ``path`` with the suffix .md; None writes only the JSON.
    """
    if path is None:
        return
    text = json.dumps(record, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    if report is not None:
        path.with_suffix(".md").write_text(report, encoding="utf-8")


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions, commit, arguments and threads."""
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": _caches(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "llm_sampling": llm_sampling.__version__,
        "backends": {info.name: info.reason or "available" for info in llm_sampling.backend_info()},
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "argv": list(argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = [line.split(":", 1) for line in lines if ":" in line]
    known = {key.strip(): value.strip() for key, value in reversed(fields)}
    return known.get("model name") or platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each cache of the first core, e.g. ``{"L1 Data": "32K", "L2 Unified": "512K"}``."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        caches[f"L{level} {kind}"] = size
    return caches


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def progress(message: str) -> None:
    """One line to stderr, so that stdout stays a report."""
    print(message, file=sys.stderr, flush=True)
