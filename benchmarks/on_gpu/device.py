"""Step 1: what the machine is. First what nvidia-smi says, then torch, then llm-sampling info."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.results import Results
from benchmarks.on_gpu.setting import Deadline, Setting
from benchmarks.timing import environment

#: What nvidia-smi is asked; ``nvidia-smi --help-query-gpu`` explains each.
FIELDS = (
    *("name", "driver_version", "memory.total", "pstate", "compute_mode", "mig.mode.current"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"),
)
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def nvidia_smi(fields: Sequence[str]) -> list[dict[str, str]] | str:
    """The fields of every GPU, or why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not on the path"
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return " ".join((done.stdout + done.stderr).split())
    lines = done.stdout.splitlines()
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in lines]


def _mps() -> str:
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    return f"{folder} {'has' if (folder / 'control').exists() else 'has no'} control pipe"


def _properties(device: str) -> dict[str, Any]:
    """All that torch says of the device; on AMD's GPUs there is nothing else."""
    if device != "cuda":
        return {"name": device}
    found = torch.cuda.get_device_properties()
    values = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
    return {name: v for name, v in values.items() if isinstance(v, str | int | float)}


def _triton_version() -> str | None:
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def run(setting: Setting, results: Results, deadline: Deadline) -> None:
    """Write ``nvidia_smi``, ``mps``, ``environment``, ``properties`` and ``info``."""
    results.put(nvidia_smi=nvidia_smi(FIELDS), mps=_mps())
    versions = {"hip": torch.version.hip, "triton": _triton_version()}
    results.put(environment=environment([]) | versions)
    results.put(properties=_properties(setting.device))
    info = [sys.executable, "-m", "llm_sampling.tools.cli", "info"]
    done = subprocess.run(info, capture_output=True, text=True)
    results.put(info=(done.stdout + done.stderr).splitlines(), verdict=setting.device_name)
