"""The file of a step: valid JSON after every entry, so that a killed step leaves what it had."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a file at once: a reader finds the old content or the new, whenever it looks."""
    beside = path.with_name(f"{path.name}.new")
    text = json.dumps(record, indent=1, ensure_ascii=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def label(who: str, rows: int, vocab_size: int, *what: str) -> str:
    """A line of a step's plan: who does what on logits ``(rows, vocab_size)``."""
    return f"{who} {rows} x {vocab_size:,}: {', '.join(what)}"


def verdict_of(lines: Sequence[Mapping[str, Any]], planned: int) -> str:
    """What comparisons say together.

    Args:
        lines: each with ``differ``, a count, and ``error``, a text or None.
        planned: how many there should be.
    """
    if any(line["differ"] for line in lines):
        return "DIFFERS"
    if any(line["error"] for line in lines):
        return "ERRORS"
    if not lines:
        return "nothing ran"
    return "equal" if len(lines) == planned else "equal as far as it went"


class Results:
    """What a step has found so far. Every change is written.

    Args:
        path: of the file; None keeps the entries in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.record: dict[str, Any] = {}

    def put(self, **entries: Any) -> None:
        """Set entries, such as ``verdict``."""
        self.record.update(entries)
        self._write()

    def add(self, name: str, line: Mapping[str, Any]) -> None:
        """Append to the list of this name."""
        self.record.setdefault(name, []).append(line)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.record)
