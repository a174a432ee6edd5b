"""The tables of the parameters in the documentation, made from :data:`llm_sampling.fields.FIELDS`.

``python docs/tables.py`` writes each between its markers, and tests/release/test_contract.py fails
where a file holds another table than this makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llm_sampling.fields import FIELDS, Field

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- parameters: begin -->\n", "<!-- parameters: end -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n"


def of_readme() -> str:
    """What each parameter means, in the order of the fields."""
    rows = [(f"`{f.name}`", f.range, f.off_text, f.meaning) for f in FIELDS.values()]
    return table(("name", "range", "off", "meaning"), rows)


def of_semantics() -> str:
    """The steps of each parameter, in the order of the steps."""

    def last_step(field: Field) -> tuple[int, str]:
        number, letter = re.fullmatch(r"(\d+)(\w?)", field.step.split(", ")[-1]).groups()
        return int(number), letter

    return table(
        ("name", "range", "off", "step"),
        [
            (f"`{f.name}`", f.range, f.off_text, f.step)
            for f in sorted(FIELDS.values(), key=last_step)
        ],
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "README.md": of_readme,
    "docs/semantics.md": of_semantics,
}


def with_table(text: str, made: str) -> str:
    """``text`` with this table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text must hold {BEGIN.strip()!r} and {END!r}")
    return f"{before}{begin}\n{made}\n{end}{after}"


if __name__ == "__main__":
    for name, make in TABLES.items():
        path = ROOT / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), make()), encoding="utf-8")
