"""Counts the instructions of the CPU kernel, by function, with Valgrind's callgrind.

``python -m benchmarks.cpu_cost --json FILE`` writes FILE, and beside it a table with the suffix
``.md``. It needs ``valgrind`` (3.19 is known to work) and takes two minutes. A build gives the same
counts on every run; another compiler, or other flags of Python's own build, give others.

Valgrind does not support AVX-512, so these are the AVX2 loops with 8 floats a vector, and counts
are given per 8 tokens of the row. A count is not a time, but it bounds the time from below: a core
retires four to six instructions a cycle, and half of those that compute a mass can run on only two
or three of its ports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.inputs import make_buffers, make_inputs
from benchmarks.providers import AMAX, PROVIDERS, SOFTMAX, Task, sampler_of
from benchmarks.timing import ROOT, command_line, environment, write_result

VOCAB_SIZE = 128256
LANES = 8
CALLS = 4
INPUTS = ("model", "flat")
SHOWN = {
    AMAX: ("greedy",),
    SOFTMAX: ("temperature-0.8",),
    sampler_of("cpu"): (
        "greedy",
        "temperature-0.8",
        "top-k-20",
        "top-k-50",
        "top-k-1024",
        "top-p-0.5",
        "top-p-0.9",
        "top-p-0.99",
        "full-chain",
    ),
}
OBJECTS = {"libllm_sampling_cpu.so", "libtorch_cpu.so", "libsleef.so"}
#: A function of the C library that nothing else calls; callgrind writes a file before each call.
MARK = "getpgid"


def mark() -> None:
    """End a part of the counts: callgrind writes the counts since the last mark into a file."""
    os.getpgid(0)


def parts() -> Iterator[tuple[dict[str, str], Callable[[int], object], int]]:
    """Yield the names of each part, its call, and the number of buffers to call it on."""
    for name in INPUTS:
        buffers = make_buffers(name, 1, VOCAB_SIZE)[:CALLS]
        for provider, cases in SHOWN.items():
            for case in cases:
                task = Task(CASES[case], make_inputs(name, buffers, CASES[case]))
                names = {"input": name, "case": case, "provider": provider}
                yield names, PROVIDERS[provider].build(task).call, len(buffers)


def count() -> None:
    """Make the calls of every part between two marks. This runs under callgrind."""
    torch.set_num_threads(1)
    for names, call, buffers in parts():
        for buffer in range(buffers):  # a first call may prepare something
            call(buffer)
        mark()
        for buffer in range(buffers):
            call(buffer)
        mark()
        print(json.dumps(names | {"calls": buffers}), flush=True)


def functions(profile: str) -> Counter[str]:
    """Return the instructions of each function of OBJECTS, from the text of a callgrind file."""
    names: dict[tuple[str, str], str] = {}
    found: Counter[str] = Counter()
    place = {"ob": "", "fn": ""}
    inclusive = False
    for line in profile.splitlines():
        if match := re.match(r"(c?)(ob|fn)=(\(\d+\))(?: (.*))?$", line):
            called, kind, number, text = match.groups()
            name = names.setdefault((kind, number), text or "")
            if not called:
                place[kind] = name
        elif line.startswith("calls="):
            inclusive = True  # the next line counts the callee, which has lines of its own
        elif re.match(r"[+*\d-]", line):
            if not inclusive and Path(place["ob"]).name in OBJECTS:
                found[_short(place["fn"])] += int(line.split()[-1])
            inclusive = False
    return found


def _short(name: str) -> str:
    """Return a function's name without namespaces, classes, arguments and clones."""
    name = re.sub(r"\(anonymous namespace\)::|\[clone [^]]*\]", "", name)
    while name != (name := re.sub(r"<[^<>]*>", "", name)):  # innermost first
        pass
    return name.split("(")[0].rpartition("::")[2].strip()


def run() -> list[dict[str, Any]]:
    """Return every part with its instructions per LANES tokens."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise SystemExit("cpu_cost needs valgrind: apt install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        done = subprocess.run(
            [
                *(valgrind, "--tool=callgrind", f"--callgrind-out-file={profile}"),
                *(f"--dump-before={MARK}", sys.executable, "-m", "benchmarks.cpu_cost", "--count"),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for number, line in enumerate(lines):
            # A part has two marks, and the file of its first one counts its preparation.
            text = Path(f"{profile}.{2 * number + 2}").read_text(encoding="utf-8")
            per = LANES / (VOCAB_SIZE * line.pop("calls"))
            counts = {name: per * ir for name, ir in functions(text).most_common()}
            line["total"] = round(sum(counts.values()), 2)
            line["functions"] = {name: round(n, 2) for name, n in counts.items() if n >= 0.05}
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the report's table in Markdown."""
    text = (
        f"| input | case | who | instructions per {LANES} tokens | functions with at least 0.2 |\n"
    )
    text += "|---|---|---|--:|---|\n"
    for line in lines:
        ours = line["provider"] == sampler_of("cpu")
        parts = ", ".join(f"{name} {n:.1f}" for name, n in line["functions"].items() if n >= 0.2)
        text += f"| {line['input']} | {line['case']} | {line['provider']} | {line['total']:.1f} "
        text += f"| {parts if ours else ''} |\n"
    return text


def main(argv: Sequence[str]) -> int:
    """Print the report, and write it to files on request."""
    parser = argparse.ArgumentParser(description="Instructions of the CPU kernel, by function.")
    parser.add_argument("--json", type=Path, help="write the results here, and a table beside it")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.count:
        count()
        return 0
    lines = run()
    command = command_line("cpu_cost", argv)
    text = f"`{command}`, V = {VOCAB_SIZE:,}, one row, float32\n\n{table(lines)}"
    print(text)
    report = {"command": command, "environment": environment(argv), "lines": lines}
    write_result(options.json, report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
