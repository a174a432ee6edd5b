"""Step 2: the known rows that the package brings along, answered by every backend of the device."""

from __future__ import annotations

from benchmarks.on_gpu.results import Results
from benchmarks.on_gpu.setting import Deadline, Setting
from llm_sampling import backends


def run(setting: Setting, results: Results, deadline: Deadline) -> None:
    """Write a line for each backend, and whether any answer is wrong."""
    lines = [line._asdict() for line in backends.self_test(setting.device)]
    ran = [line for line in lines if line["skipped"] is None]
    wrong = [line for line in ran if line["difference"] is not None]
    verdict = "DIFFERS" if wrong else "equal" if ran else "nothing ran"
    results.put(backends=lines, verdict=verdict)
