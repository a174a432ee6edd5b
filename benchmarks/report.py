"""The markdown report of a results file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from benchmarks.inputs import MAKERS
from benchmarks.providers import (
    AMAX,
    HUGGING_FACE,
    LLAMA_CPP,
    PLAIN_TORCH,
    PROVIDERS,
    SOFTMAX,
    VLLM,
)
from benchmarks.suite import Result
from benchmarks.timing import Timing


def markdown(record: dict[str, Any]) -> str:
    """The report of a results file's content."""
    results = [Result.from_json(line) for line in record["results"]]
    parts = [_header(record), _goals(record["goals"])]
    parts += [_calls(record["calls"])] if record["calls"] else []
    for where in dict.fromkeys(result.where for result in results):
        parts.append(_table([result for result in results if result.where == where]))
    return "\n".join(part for part in parts if part)


def _header(record: dict[str, Any]) -> str:
    machine = record["environment"]
    protocol = record["protocol"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    lines = [
        "# Sampler benchmark",
        "",
        f"* `{shlex.join(['python', '-m', 'benchmarks', *machine['argv']])}`, {machine['date']}",
        f"* {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} of "
        f"them used; load {machine['load_average'][0]} at the start; caches: {caches}",
        f"* Python {machine['python']}, torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}), commit {machine['commit']}"
        f"{' with changes' if machine['modified'] else ''}",
        f"* {record['dtype']} logits; medians in µs per call of up to "
        f"{protocol['rounds'] * protocol['per_turn']} samples, fewer where they would take more "
        f"than {protocol['budget_s']:g} s, at least {protocol['least']}",
    ]
    if record["quick"]:
        lines.append("* quick: too few samples to quote")
    lines += [f"* {name}: {version}" for name, version in record["versions"].items()]
    lines += [f"* absent: {name}: {reason}" for name, reason in record["absent"].items()]
    return "\n".join(lines) + "\n"


def _goals(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return ""
    text = "## Goals\n\n| goal | on | measured | limit | |\n|---|---|--:|--:|---|\n"
    for line in lines:
        verdict = "met" if line["met"] else "**missed**"
        sign = "≤" if line["at_most"] else "≥"
        text += f"| {line['goal']} | {line['on']} | {line['value']:.3g} | {sign} {line['limit']:g} "
        text += f"| {verdict} |\n"
    return text


def _calls(calls: dict[str, dict[str, Any]]) -> str:
    text = "## The call itself: one row of 32 tokens, kernel included\n\n"
    text += "| call | µs (p10-p90) |\n|---|--:|\n"
    for name, record in calls.items():
        timing = Timing(**record)
        text += f"| {name} | {timing.median:.2f} ({timing.p10:.2f}-{timing.p90:.2f}) |\n"
    return text


#: What the project's README shows of a complete run: inputs, rows, case.
SHOWN = (
    ("smollm2", 8, "top-p-0.9"),
    ("smollm2", 8, "full-chain"),
    ("model", 8, "top-k-50"),
    ("model", 8, "top-p-0.9"),
    ("model", 8, "full-chain"),
    ("flat", 8, "top-p-0.9"),
    ("gemma3", 8, "top-p-0.9"),
    ("gemma3", 8, "everything-32k"),
    ("gemma3", 64, "full-chain"),
)
BESIDE = (HUGGING_FACE, VLLM, LLAMA_CPP, PLAIN_TORCH, SOFTMAX, AMAX)


def readme(record: dict[str, Any]) -> str:
    """The table of the project's README, from a complete run on the CPU."""
    results = [Result.from_json(line) for line in record["results"]]
    base = ours(results)
    text = "| logits, rows | case | ours | " + " | ".join(BESIDE) + " |\n"
    text += "|---|---" + "|--:" * (1 + len(BESIDE)) + "|\n"
    for inputs, rows, case in SHOWN:
        found = {
            result.provider: result
            for result in results
            if (result.inputs, result.rows, result.case) == (inputs, rows, case)
            and (inputs not in MAKERS or result.vocab_size == 128256)
        }
        first = found[base]
        line = [_cell(found.get(name), first, None) for name in (base, *BESIDE)]
        text += f"| {inputs}, V = {first.vocab_size:,}, {rows} | {case} | " + " | ".join(line)
        text += " |\n"
    return text


def ours(results: Sequence[Result]) -> str:
    """The first of our backends that was timed: all others are compared with it."""
    names = dict.fromkeys(result.provider for result in results)
    return next((name for name in names if PROVIDERS[name].module == "ours"), "")


def _table(results: Sequence[Result]) -> str:
    """One shape and input: a line for each case, a column for each provider."""
    first = results[0]
    base = ours(results)
    names = list(dict.fromkeys(result.provider for result in results))
    cells = {(result.case, result.provider): result for result in results}
    notes: dict[str, str] = {}
    text = f"## {first.inputs}, V = {first.vocab_size:,}, {first.rows} "
    text += f"row{'s' * (first.rows != 1)}, {first.buffers} buffers\n\n"
    text += "| case | " + " | ".join(names) + " |\n|---" + "|--:" * len(names) + "|\n"
    for case in dict.fromkeys(result.case for result in results):
        own = cells.get((case, base))
        line = [_cell(cells.get((case, name)), own, notes) for name in names]
        text += f"| {case} | " + " | ".join(line) + " |\n"
    text += f"\nIn brackets: how many times the time of {base}." if base else ""
    for note, letter in notes.items():
        text += f"\n* {letter}: {note}"
    return text + "\n"


def _cell(result: Result | None, own: Result | None, notes: dict[str, str] | None) -> str:
    if result is None:
        return ""
    note = result.absent if result.timing is None else result.note
    mark = ""
    if note and notes is not None:
        mark = f" *{notes.setdefault(note, _letter(len(notes)))}*"
    if result.timing is None:
        return ("**WRONG**" if result.wrong else "-") + mark
    time = result.timing.median
    text = f"{time:,.0f}" if time >= 100 else f"{time:.3g}"
    if own is not None and own.timing is not None and own.provider != result.provider:
        text += f" ({ratio(time / own.timing.median)})"
    if result.host is not None:
        text += f", call {result.host.median:.3g}"
    return text + mark


def ratio(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:,.0f}x" if value >= 10 else f"{value:.2g}x"


def _letter(number: int) -> str:
    """From a to z, then aa to az, and so on."""
    first = "" if number < 26 else chr(ord("a") + number // 26 - 1)
    return first + chr(ord("a") + number % 26)
