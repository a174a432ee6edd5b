"""Step 7: the measured times beside those that cuda_cost.py predicts from the machine code."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.on_gpu.results import Results, read_json
from benchmarks.on_gpu.setting import Deadline, Setting

PREDICTED = Path(__file__).resolve().parents[1] / "results" / "cuda-cost.json"

#: Kind, dtype, vocabulary size and rows.
Key = tuple[str, str, int, int]


def predictions(path: Path, device: str) -> dict[Key, tuple[float, float]] | None:
    """The least and the most microseconds that a results file predicts for a device.

    Args:
        path: a results file of cuda_cost.py.
        device: what it calls itself, such as "NVIDIA H100 80GB HBM3".

    Returns:
        None where the file has nothing for this device.
    """
    words = re.split(r"\W+", device)
    found = {
        (line["case"], line["dtype"], line["vocab_size"], line["rows"]): (
            line["microseconds"]["predicted"][0],
            line["microseconds"]["predicted"][1],
        )
        for line in (read_json(path) or {"predictions": []})["predictions"]
        if model_of(line["device"]) in words
    }
    return found or None


def model_of(name: str) -> str:
    """The word of a device's name that tells it from others: "A100" of "A100 SXM 80 GB"."""
    return next(word for word in name.split() if any(letter.isdigit() for letter in word))


def run(setting: Setting, results: Results, deadline: Deadline, path: Path = PREDICTED) -> None:
    """Write a line for each measured time of the predicted backend that has a prediction.

    Args:
        setting: the backend and the device.
        results: gets ``lines`` and ``verdict``; the step ``times`` has its file beside this one's.
        deadline: not used; this takes no time.
        path: the results file of cuda_cost.py.
    """
    assert results.path is not None
    times = read_json(results.path.with_name("times.json"))
    if times is None:
        results.put(verdict="nothing was timed")
        return
    device = setting.predicted_for or times["device"]
    found = predictions(path, device)
    results.put(file=path.name, device=device, lines=[])
    if found is None:
        results.put(verdict=f"{path.name} has no prediction for {device}")
        return
    for line in times["lines"]:
        key = line["kind"], times["dtype"], line["vocab_size"], line["rows"]
        if line["who"] != setting.predicted or "cold" not in line or key not in found:
            continue
        measured, (least, most) = line["cold"]["median"], found[key]
        names = {name: line[name] for name in ("kind", "vocab_size", "rows")}
        results.add("lines", names | {"measured_us": measured, "predicted_us": [least, most]})
    results.put(verdict=f"{len(results.record['lines'])} compared")
