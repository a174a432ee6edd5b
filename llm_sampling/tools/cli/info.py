"""``llm-sampling info``: the versions, the backends and the default model."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import torch

import llm_sampling
from llm_sampling import backends
from llm_sampling.generation import models
from llm_sampling.tools.cli import console

if TYPE_CHECKING:
    from llm_sampling.tools.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """Add the command, which has no options."""
    text = "Show the versions, the backends that run here and the default model."
    parser = commands.add_parser("info", help=text, description=text)
    parser.set_defaults(make_request=lambda options: None, run=lambda request: run())


def run() -> int:
    """Print the tables; the exit code."""
    from rich.table import Table

    output = console.output()
    versions = Table(box=None, show_header=False)
    versions.add_row("llm_sampling", llm_sampling.__version__)
    versions.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", *console.EXTRA_PACKAGES):
        versions.add_row(name, importlib.metadata.version(name))
    versions.add_row("CPU threads", str(torch.get_num_threads()))
    output.print(versions)

    table = Table("backend", "device", "available", "reason", box=None, title_justify="left")
    for backend in backends.backend_info():
        devices = "any" if backend.device_types is None else ", ".join(backend.device_types)
        table.add_row(
            backend.name, devices, "yes" if backend.available else "no", backend.reason or ""
        )
    output.print()
    output.print(table)

    found = Table("self-test on", "backend", "sizes", "known rows", "", box=None)
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        for test in backends.self_test(device):
            if test.skipped is None:
                verdict = "all are right" if test.difference is None else test.difference
                found.add_row(device, test.backend, str(test.shapes), str(test.rows), verdict)
    output.print()
    output.print(found)

    try:
        model = str(models.default_model_path())
    except models.ModelError as error:
        model = str(error)
    output.print(f"\ndefault model: {model}", markup=False, soft_wrap=True)
    return 0
