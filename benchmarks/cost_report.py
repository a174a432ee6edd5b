"""The report of a GPU kernel's predicted cost, for cuda_cost.py and triton_cost.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, command_line, write_result

RESULTS = ROOT / "benchmarks" / "results"
#: Bytes of a logit.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
VOCAB_SIZES = (32000, 128256, 262144)
ROWS = (1, 8, 64, 256)
#: The headings of columns for these numbers of rows.
BY_ROWS = [f"{rows} row{'s' * (rows > 1)}" for rows in ROWS]


def join_rows(cells: Iterable[tuple[tuple[str, ...], Sequence[str]]]) -> list[list[str]]:
    """Rows of a table from (first cells, further cells); equal first cells make one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for first, further in cells:
        rows.setdefault(first, list(first)).extend(further)
    return list(rows.values())


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    origin: str = " (predicted, not measured)",
) -> str:
    """A markdown table; all columns but the first two are aligned right."""
    lines = [f"## {caption}{origin}\n", f"| {' | '.join(header)} |"]
    lines.append("|---" * 2 + "|--:" * (len(header) - 2) + "|")
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def publish(
    kernel: str,
    argv: Sequence[str],
    compiler: tuple[str, str],
    sources: Sequence[Path],
    method: str,
    tables: Iterable[str],
    results: Mapping[str, Any],
    broken: Sequence[str],
    *,
    to_files: bool = True,
) -> None:
    """Print the report, and write it and the results to results/{cuda,triton}-cost.{md,json}.

    Args:
        kernel: "CUDA" or "Triton".
        argv: the command's arguments.
        compiler: its name and version.
        sources: the kernel's files.
        method: the module's docstring, whose first line is left out.
        tables: from :func:`table`.
        results: what the JSON holds besides.
        broken: the rules that the machine code breaks, in words.
        to_files: whether anything is written.
    """
    module = f"{kernel.lower()}_cost"
    record = {
        "what": "predicted from the machine code, not measured",
        compiler[0]: compiler[1],
        "kernel": hash_files(sources),
        "command": command_line(module, argv),
    }
    text = f"# The {kernel} kernel's cost: predicted from its machine code, not measured\n\n"
    text += f"* `{record['command']}`, {' '.join(compiler)}\n"
    text += f"* SHA-256 of {', '.join(path.name for path in sources)}: {record['kernel']}\n"
    text += method.partition("\n")[2] + "\n" + "\n\n".join(tables)
    text += "\n\n## Broken rules\n\n" + "\n".join(f"* {line}" for line in broken or ["none"])
    print(text)
    if to_files:
        path = RESULTS / f"{module.replace('_', '-')}.json"
        write_result(path, {**record, **results, "broken": broken}, text + "\n")
