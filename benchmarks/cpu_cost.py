"""Counts the instructions of the CPU kernel, by function, with Valgrind's callgrind.

``python -m benchmarks.cpu_cost --json FILE`` writes FILE, and beside it a table with the suffix
``.md``. It needs ``valgrind`` (3.19 is known to work) and a C++ compiler, and takes five minutes. A
build gives the same counts on every run; another compiler, or other flags of Python's own build,
give others.

Valgrind does not support AVX-512, so these are the AVX2 loops with 8 floats a vector, and counts
are given per 8 tokens of the row. Rows with masks are counted for SSE4.2 too, with the kernel built
for each of the two alone. What the results of a call cost is counted with the logarithms of the C
library. A count is not a time, but it bounds the time from below: a core
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.inputs import make_buffers, make_inputs
from benchmarks.providers import AMAX, PROVIDERS, SOFTMAX, Task, sampler_of
from benchmarks.timing import ROOT, command_line, environment, write_result
from llm_sampling import Sampler
from llm_sampling.backends import cpu
from llm_sampling.masks import pack_mask

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
KERNEL = "libllm_sampling_cpu.so"
OBJECTS = {KERNEL, "libtorch_cpu.so", "libsleef.so"}
LOGARITHMS = "libm.so.6"

#: The cases and dtypes that are counted with masks; the rows are those of the input "model".
MASKED_CASES = (
    "greedy",
    "top-k-50",
    "top-p-0.9",
    "top-k-50-top-p-0.9",
    "temperature-0.8",
    "min-p-0.05",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The instruction sets of the kernel's clones that Valgrind can run, without AVX-512.
INSTRUCTION_SETS = ("x86-64-v3", "x86-64-v2")
#: The masks, and how many times the instructions of the same call without one each may take.
MASK_GOALS: Mapping[str, float] = dict.fromkeys(
    (
        "half",
        "all",
        "1",
        "5",
        "100",
        "2,000",
        "alternating words",
        "alternating tokens",
        "all but 100",
        "last tile",
        "lower half",
        "lowest 100",
        "all but the best",
        "all but the best 50",
        "all but the best 2,000",
        "all but the best 20,000",
    ),
    2.0,
) | {"half": 1.2}
#: The case in which a mask that bans the best tokens leaves a row whose kept set is much larger.
#: Its masked rows are counted once more without a mask, with -inf in place of what is banned.
EXPLAINED = "min-p-0.05"
#: What calls return besides tokens -> the options of the Sampler.
RESULTS: Mapping[str, dict[str, Any]] = {
    "tokens": {},
    "processed": {"logprobs": "processed"},
    "raw": {"logprobs": "raw"},
    "top 20 processed": {"logprobs": "processed", "top_logprobs": 20},
    "top 20 raw": {"logprobs": "raw", "top_logprobs": 20},
    "kept ids": {"kept": "ids"},
    "kept mask": {"kept": "mask"},
    "kept ends": {"kept": "ends"},
}
RESULT_CASES = ("top-k-50", "top-p-0.9", "temperature-0.8")
#: Result -> what it is compared with, and how much more it may take, as a part of the instructions
#: of a call for tokens; these are goals for the first of RESULT_CASES.
RESULT_GOALS: Mapping[str, tuple[str, float]] = {
    "top 20 processed": ("tokens", 0.10),
    "top 20 raw": ("raw", 0.10),
    "kept ids": ("tokens", 0.05),
}
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


def make_mask(name: str, logits: Tensor) -> Tensor:
    """Return which tokens a mask of MASK_GOALS allows in a row of logits, as bool."""
    size = len(logits)
    ids = torch.arange(size)
    rank = logits.argsort(descending=True).argsort()  # 0 for the best token

    def some(number: int) -> Tensor:
        chosen = torch.zeros(size, dtype=torch.bool)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(number))
        chosen[order[:number]] = True
        return chosen

    kind, _, number = name.rpartition(" ")
    count = int(number.replace(",", "")) if number[0].isdigit() else 1
    if name == "half":
        return some(size // 2)
    if kind == "":
        return ids >= 0 if name == "all" else some(count)
    if kind == "alternating":
        return ids // {"words": 32, "tokens": 1}[number] % 2 == 1
    if kind == "all but":
        return ~some(count)
    if name == "last tile":
        return ids // 512 == (size - 1) // 512
    if name == "lower half":
        return rank >= size // 2
    if kind == "lowest":
        return rank >= size - count
    assert kind in ("all but the", "all but the best"), name
    return rank >= count


def masked_parts(
    calls: int | None = CALLS,
) -> Iterator[tuple[dict[str, str], Callable[[int], object], int]]:
    """Yield such parts for every case of MASKED_CASES with each mask, and with none.

    Where it explains the cost there is a third one: no mask, and -inf in place of what is banned.
    ``calls`` is the number of buffers; None for all that are timed.
    """
    rows = [buffer[0] for buffer in make_buffers("model", 1, VOCAB_SIZE)[:calls]]
    allowed = {mask: [make_mask(mask, row) for row in rows] for mask in MASK_GOALS}
    words = {mask: [pack_mask(made, VOCAB_SIZE) for made in allowed[mask]] for mask in MASK_GOALS}
    infinite = {
        mask: [
            row.masked_fill(~made, -torch.inf)
            for row, made in zip(rows, allowed[mask], strict=True)
        ]
        for mask in MASK_GOALS
    }
    none = [None] * len(rows)
    for dtype in DTYPES:
        for case in MASKED_CASES:
            names = {"dtype": dtype, "case": case, "mask": "", "how": "none"}
            yield names, _call(case, dtype, rows, none), len(rows)
            for mask in MASK_GOALS:
                names = {"dtype": dtype, "case": case, "mask": mask, "how": "mask"}
                yield names, _call(case, dtype, rows, words[mask]), len(rows)
                if case == EXPLAINED:
                    call = _call(case, dtype, infinite[mask], none)
                    yield names | {"how": "-inf"}, call, len(rows)


def _call(
    case: str, dtype: str, rows: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> Callable[[int], object]:
    sampler = Sampler(CASES[case].row_params(1), vocab_size=VOCAB_SIZE, backend="cpu")
    logits = [row.to(DTYPES[dtype])[None] for row in rows]
    return lambda i: sampler(logits[i], allowed_mask=masks[i])


def result_parts(
    calls: int | None = CALLS,
) -> Iterator[tuple[dict[str, str], Callable[[int], object], int]]:
    """Yield such parts for every case of RESULT_CASES with each of RESULTS."""
    for name in INPUTS:
        buffers = make_buffers(name, 1, VOCAB_SIZE)[:calls]
        for case in RESULT_CASES:
            for result, options in RESULTS.items():
                sampler = Sampler(
                    CASES[case].row_params(1), vocab_size=VOCAB_SIZE, backend="cpu", **options
                )
                names = {"input": name, "case": case, "result": result}
                yield names, lambda i, call=sampler, of=buffers: call(of[i]), len(buffers)


#: What is counted -> its parts.
PARTS = {"whole": parts, "masked": masked_parts, "results": result_parts}


def count(what: str, library: Path | None) -> None:
    """Make the calls of every part between two marks. This runs under callgrind.

    Args:
        what: one of PARTS.
        library: the kernel, if it is not the package's own.
    """
    torch.set_num_threads(1)
    if library is not None:
        cpu.LIBRARY.path = library
    for names, call, buffers in PARTS[what]():
        for buffer in range(buffers):  # a first call may prepare something
            call(buffer)
        mark()
        for buffer in range(buffers):
            call(buffer)
        mark()
        print(json.dumps(names | {"calls": buffers}), flush=True)


def functions(profile: str, objects: Collection[str] = OBJECTS) -> Counter[str]:
    """Return the instructions of each function of libraries, from the text of a callgrind file."""
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
            if not inclusive and Path(place["ob"]).name in objects:
                found[_short(place["fn"])] += int(line.split()[-1])
            inclusive = False
    return found


def _short(name: str) -> str:
    """Return a function's name without namespaces, classes, arguments and clones."""
    name = re.sub(r"\(anonymous namespace\)::|\[clone [^]]*\]", "", name)
    while name != (name := re.sub(r"<[^<>]*>", "", name)):  # innermost first
        pass
    return name.split("(")[0].rpartition("::")[2].strip()


def run(what: str, *options: str, objects: Collection[str] = OBJECTS) -> list[dict[str, Any]]:
    """Return every part with its instructions per LANES tokens.

    ``what`` is one of PARTS, and ``options`` are for count().
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise SystemExit("cpu_cost needs valgrind: apt install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        done = subprocess.run(
            [
                *(valgrind, "--tool=callgrind", f"--callgrind-out-file={profile}"),
                *(f"--dump-before={MARK}", sys.executable, "-m", "benchmarks.cpu_cost"),
                *("--count", what, *options),
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
            counts = {name: per * ir for name, ir in functions(text, objects).most_common()}
            line["total"] = round(sum(counts.values()), 2)
            line["functions"] = {name: round(n, 2) for name, n in counts.items() if n >= 0.05}
    return lines


def build_for(instruction_set: str, folder: Path) -> Path:
    """Build the kernel for one instruction set alone, by the flags of setup.py."""
    clones = "'-DLLM_SAMPLING_CLONES=__attribute__((noinline))'"
    flags = {"CFLAGS": f"-march={instruction_set} {clones}", "LLM_SAMPLING_CUDA": "0"}
    subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *(f"--build-lib={folder}", f"--build-temp={folder}"),
        ],
        cwd=ROOT,
        env=os.environ | flags,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder / "llm_sampling/lib" / KERNEL


def run_masked(instruction_set: str) -> list[dict[str, Any]]:
    """Count the masked cases with the kernel built for an instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        library = build_for(instruction_set, Path(folder))
        found = run("masked", f"--library={library}", objects={KERNEL})
    return [{"instruction_set": instruction_set} | line for line in compare_masks(found)]


def compare_masks(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every masked case with the ratio of its total to that without a mask."""
    lines: list[dict[str, Any]] = []
    total = {(line["dtype"], line["case"], line["mask"], line["how"]): line for line in found}
    for dtype, case, mask, how in total:
        if how != "mask":
            continue
        unmasked = total[dtype, case, "", "none"]["total"]
        masked = total[dtype, case, mask, "mask"]["total"]
        line = {"dtype": dtype, "case": case, "mask": mask}
        line |= {"unmasked": unmasked, "masked": masked, "limit": MASK_GOALS[mask]}
        line["ratio"] = round(masked / unmasked, 3)
        if case == EXPLAINED:
            infinite = total[dtype, case, mask, "-inf"]["total"]
            line["ratio_of_infinite"] = round(infinite / unmasked, 3)
        lines.append(line)
    return lines


def compare_results(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every result's total, and what it takes more as a part of that of tokens alone."""
    total = {(line["input"], line["case"], line["result"]): line["total"] for line in found}
    lines = []
    for (name, case, result), taken in total.items():
        base, _ = RESULT_GOALS.get(result, ("tokens", 0.0))
        more = (taken - total[name, case, base]) / total[name, case, "tokens"]
        line = {"input": name, "case": case, "result": result, "total": taken}
        lines.append(line | {"more": round(more, 4)})
    return lines


def results_table(
    lines: Sequence[dict[str, Any]], of: str = "instructions", unit: str = f"per {LANES} tokens"
) -> str:
    """Return the table of the results in Markdown, with a column for each result.

    ``of`` says what was counted or measured, and ``unit`` is the unit of its totals.
    """
    text = (
        f"What calls return besides tokens, in percent of the {of} of the call for tokens. "
        "The goal for the instructions of top-k-50 is at most 10 % for the top 20 processed "
        "logprobs, 10 % for the top 20 raw ones over the raw logprob of the token, and 5 % for the "
        "kept ids.\n\n"
    )
    shown = [result for result in RESULTS if result != "tokens"]
    heads = [f"{result}, over raw" if result == "top 20 raw" else result for result in shown]
    text += f"| input | case | {unit} | {' | '.join(heads)} |\n"
    text += f"|---|---|--:|{'--:|' * len(shown)}\n"
    for first in range(0, len(lines), len(RESULTS)):
        row = {line["result"]: line for line in lines[first : first + len(RESULTS)]}
        line = row["tokens"]
        cells = " | ".join(f"{row[result]['more']:+.1%}" for result in shown)
        text += f"| {line['input']} | {line['case']} | {line['total']:.1f} | {cells} |\n"
    return text


def masked_table(
    lines: Sequence[dict[str, Any]], of: str = "instructions", unit: str = f"per {LANES} tokens"
) -> str:
    """Return the table of the masks in Markdown, with a column for each mask.

    ``of`` and ``unit`` are those of results_table().
    """
    text = (
        f"Rows of `model` with an `allowed_mask`: how many times the {of} of the same call "
        "without one. The goal for instructions is at most 1.2 for `half`, a random half of the "
        "tokens, and at most 2 for every other mask. What is above that is bold, with what the "
        "call takes without a mask where the banned logits are -inf.\n\n"
    )
    names = [name for name in ("instruction_set", "dtype", "case") if name in lines[0]]
    heads = [name.replace("_", " ") for name in names]
    text += f"| {' | '.join((*heads, unit, *MASK_GOALS))} |\n"
    text += f"|{'---|' * len(names)}--:|{'--:|' * len(MASK_GOALS)}\n"
    for first in range(0, len(lines), len(MASK_GOALS)):
        row = lines[first : first + len(MASK_GOALS)]
        line = row[0]
        text += f"| {' | '.join(line[name] for name in names)} "
        text += f"| {line['unmasked']:.1f} | {' | '.join(map(_ratio, row))} |\n"
    return text


def _ratio(line: dict[str, Any]) -> str:
    if line["ratio"] <= line["limit"]:
        return f"{line['ratio']:.2f}"
    more = f" ({line['ratio_of_infinite']:.2f})" if "ratio_of_infinite" in line else ""
    return f"**{line['ratio']:.2f}**{more}"


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
    parser.add_argument("--count", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.count:
        count(options.count, options.library)
        return 0
    with ThreadPoolExecutor() as pool:  # the load of a machine changes no count
        whole = pool.submit(run, "whole")
        of_results = pool.submit(run, "results", objects={*OBJECTS, LOGARITHMS})
        masked = [line for found in pool.map(run_masked, INSTRUCTION_SETS) for line in found]
        lines, results = whole.result(), compare_results(of_results.result())
    command = command_line("cpu_cost", argv)
    text = f"`{command}`, V = {VOCAB_SIZE:,}, one row, float32\n\n{table(lines)}"
    text += f"\n{results_table(results)}\n{masked_table(masked)}"
    print(text)
    report = {"command": command, "environment": environment(argv)}
    found = {"lines": lines, "results": results, "masks": masked}
    write_result(options.json, report | found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
