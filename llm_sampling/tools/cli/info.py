"""``llm-sampling info``: the versions, the backends, the default model; or the engines."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING

import torch

import llm_sampling
from llm_sampling import backends
from llm_sampling.generation import models
from llm_sampling.tools.cli import console

if TYPE_CHECKING:
    from llm_sampling.tools.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """Add the command."""
    text = "Show the versions, the backends that run here and the default model."
    parser = commands.add_parser("info", help=text, description=text)
    parser.add_argument(
        "--engines",
        action="store_true",
        help="show instead the engines that have a plug-in, and whether it would be used; those "
        "that are installed are imported",
    )
    parser.set_defaults(make_request=lambda options: options.engines, run=run)


def run(shows_engines: bool) -> int:
    """Print the tables; the exit code."""
    return show_engines() if shows_engines else show_backends()


def show_engines() -> int:
    """Print a line for each engine, without a package of the extra; the exit code."""
    from llm_sampling.integrations.engines import ENGINES, engine_info

    lines = [("engine", "installed", "draws by the kernel")]
    for engine in ENGINES:
        found = engine_info(engine)
        lines.append((found.name, found.version or "no", found.use or f"no: {found.reason}"))
    name, version = (max(len(line[place]) for line in lines) for place in (0, 1))
    for line in lines:
        sys.stdout.write(f"{line[0]:{name}}  {line[1]:{version}}  {line[2]}\n")
    return 0


def show_backends() -> int:
    """Print the tables of the versions and backends; the exit code."""
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
