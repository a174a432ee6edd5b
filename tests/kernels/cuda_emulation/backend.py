"""The emulated CUDA kernels as a backend for the parity tests."""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends import c_abi, native
from llm_sampling.backends.base import SampleCall, Step
from llm_sampling.history import HistoryUpdate
from llm_sampling.results import SampleOutput

FOLDER = Path(__file__).parent
#: The library to use in a process that run_sanitized has started.
SANITIZED = os.environ.get("LLM_SAMPLING_SANITIZED_EMULATION")
#: -ffp-contract=off corresponds to nvcc's -fmad=false.
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow")
FLAGS += ("-Werror", "-Wno-unknown-pragmas")


class Launch(NamedTuple):
    """Blocks of a row, whether each copies its part, and whether they are no cluster."""

    blocks: int
    copied: bool
    is_split: bool = False


class Overwriting(ctypes.Structure):
    """The struct of emulated.cpp: what becomes of the logits while a kernel runs."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("others", ctypes.c_void_p),
        ("at", ctypes.c_void_p),
        ("often", ctypes.c_int32),
    )


class Swapping(ctypes.Structure):
    """The struct of lists.cpp: memory that changes places with other memory."""

    _fields_ = (
        ("these", ctypes.c_void_p),
        ("others", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("every", ctypes.c_int64),
    )


class EmulatedBackend:
    """Has the interface of a module of llm_sampling.backends, for one kind of launch.

    Each call runs the threads in another order. ``overwriting`` holds for the calls that follow.
    """

    DEVICE_TYPES = frozenset({"cpu"})

    def __init__(self, library: Path, launch: Launch) -> None:
        self.launch = launch
        self.overwriting: Overwriting | None = None
        self.seeds = itertools.count()
        self.workspaces: dict[int, Tensor] = {}
        self.workspace_bytes = ctypes.CDLL(str(library)).llm_sampling_cuda_workspace_bytes
        self.workspace_bytes.argtypes = [ctypes.c_int64, ctypes.c_int32]
        self.workspace_bytes.restype = ctypes.c_int64
        self.run_batch = ctypes.CDLL(str(library)).llm_sampling_cuda_emulated
        self.run_batch.argtypes = [
            ctypes.POINTER(c_abi.SampleArgs),
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_uint64,
            ctypes.POINTER(Overwriting),
        ]
        self.run_batch.restype = ctypes.c_char_p
        self.run_update = ctypes.CDLL(str(library)).llm_sampling_cuda_update_emulated
        self.run_update.argtypes = [ctypes.POINTER(c_abi.HistoryUpdateArgs), ctypes.c_uint64]
        self.run_update.restype = ctypes.c_char_p

    def why_unavailable(self) -> str | None:
        return None

    def _run(self, struct: c_abi.SampleArgs) -> None:
        if struct.rows == 0:
            return
        if self.launch.is_split:
            self._set_workspace(struct)
        lists: Sequence[Tensor] = ()
        if struct.dry_multiplier:
            lists = c_abi.list_memory(struct, torch.device("cpu"))
            for memory in lists:  # nothing in it has a meaning before the launch
                memory.view(torch.int32).fill_(-1)
            c_abi.set_lists(struct, lists)
        seed = next(self.seeds)
        failure = self.run_batch(struct, *self.launch, seed, self.overwriting).decode()
        assert failure == "", f"{self.launch}, seed {seed}: {failure}"
        for rows, workspace in self.workspaces.items():
            assert not workspace[:rows].any(), "a counter is not 0 after the launch"

    def _set_workspace(self, struct: c_abi.SampleArgs) -> None:
        """Keep what earlier launches have left in the lists, as a prepared call does."""
        size = self.workspace_bytes(struct.rows, self.launch.blocks)
        if struct.rows not in self.workspaces:
            workspace = torch.full((size // 8,), -1, dtype=torch.int64)
            workspace[: struct.rows] = 0
            self.workspaces[struct.rows] = workspace
        struct.workspace = self.workspaces[struct.rows].data_ptr()
        struct.workspace_bytes = size

    def sample(self, call: SampleCall) -> SampleOutput:
        assert not call.check, "the tests that use this look at the status themselves"
        return native.sample(call, self._run)

    def filter_logits(self, call: SampleCall) -> Tensor:
        return native.filter_logits(call, self._run)

    def prepare(self, call: SampleCall) -> Step:
        return native.prepare(call, self._run)

    def update_history(self, update: HistoryUpdate) -> None:
        if update.slots.shape[0] == 0:
            return
        seed = next(self.seeds)
        failure = self.run_update(c_abi.make_update_args(update), seed).decode()
        assert failure == "", f"seed {seed}: {failure}"

    def prepare_update(self, update: HistoryUpdate) -> Callable[[], None]:
        return functools.partial(self.update_history, update)


#: For a library that few calls use: -O2 takes four times as long to compile, and -O0 to run.
BRIEF = ("-Og",)


def leave_float32_alone(csrc: Path) -> None:
    """Take the kernels of other dtypes out of a copy of csrc, so that it compiles faster."""
    path = csrc / "cuda" / "sample.cu"
    before, others = path.read_text().split("    case LLM_SAMPLING_FLOAT16:\n")
    end = others.index("  }\n")
    assert others[:end].count("return find_kernel_of") == 2
    path.write_text(f"{before}    default:\n      return nullptr;\n{others[end:]}")


def build(
    folder: Path,
    options: Sequence[str] = ("-O2",),
    planted: Sequence[str] = (),
    is_float32_alone: bool = False,
    name: str = "emulated.cpp",
) -> Path:
    """Compile a file that has kernels.

    `planted` replaces a text of the kernels by another, and `is_float32_alone` leaves a planted
    kernel that samples for float32 only.
    """
    root = FOLDER.parents[2]
    if planted:
        text, wrong = planted
        for part in ("csrc", "tests/kernels/cuda_emulation"):
            shutil.copytree(root / part, folder / part)
        root = folder
        headers = [root / "csrc" / file for file in ("history.h", "rows.h", "sequence_rules.h")]
        files = [*(root / "csrc/cuda").iterdir(), *headers]
        sources = {path: path.read_text() for path in files}
        found = [path for path, right in sources.items() for _ in range(right.count(text))]
        assert len(found) == 1, f"the kernel has {len(found)} of {text!r}"
        found[0].write_text(sources[found[0]].replace(text, wrong))
        if is_float32_alone:
            leave_float32_alone(root / "csrc")
    library = folder / "libllm_sampling_cuda_emulated.so"
    source = ["-x", "c++", str(root / "tests/kernels/cuda_emulation" / name), "-o", str(library)]
    subprocess.run(["g++", *FLAGS, *options, *source], check=True)
    return library


def run_sanitized(
    tests: str,
    folder: Path,
    expression: str,
    planted: Sequence[str] = (),
    markers: Sequence[str] = (),
    is_float32_alone: bool = False,
    name: str = "emulated.cpp",
) -> subprocess.CompletedProcess[str]:
    """Run some tests of a file in a new process, on a library with both sanitizers."""
    options = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build(folder, BRIEF + options, planted, is_float32_alone, name)
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", tests]
    return subprocess.run(
        [*command, "-k", expression, *markers],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER.parents[2],
        env=os.environ
        | {
            "LLM_SAMPLING_SANITIZED_EMULATION": str(library),
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
    )


def install(monkeypatch: object, library: Path, launch: Launch) -> str:
    """Register the backend for one test and return its name."""
    row = backends.Backend("emulated", "cuda_emulated")
    monkeypatch.setitem(sys.modules, row.module, EmulatedBackend(library, launch))
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, row.name: row})
    return row.name
