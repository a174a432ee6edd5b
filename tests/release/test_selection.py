"""Tests of selection.py: each entry names a test, and CI runs what the default run skips."""

import re
from pathlib import Path

import pytest
import selection

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PATHS = sorted(TESTS.rglob("test_*.py"))
TABLES = (
    selection.SOME,
    selection.SOME_INTERPRETED,
    selection.LONG,
    selection.LONG_INTERPRETED,
    selection.SWEPT,
    selection.SWEPT_INTERPRETED,
)


@pytest.mark.parametrize("name", sorted(name for table in TABLES for name in table))
def test_every_row_names_a_test(name):
    file, function = name.partition("[")[0].split("::")
    (path,) = [path for path in PATHS if path.name == file]  # file names are unique
    assert f"\ndef {function}(" in path.read_text(encoding="utf-8")


def test_what_the_default_run_leaves_ci_runs():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left = re.search(r"^addopts = .*-m '(.*)'", settings, re.MULTILINE)[1]
    assert left == " and ".join(
        f"not {m}" for m in ("sweep", "slow", "large", "gpu", "vllm", "sglang", "llama_cpp")
    )
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert "python -m pytest -m sweep --durations=25" in commands
