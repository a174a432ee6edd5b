"""What the CUDA kernel costs, read from its machine code: ``python benchmarks/cuda_cost.py``.

It compiles csrc/cuda/sample.cu by nvcc for every architecture that setup.py builds. Nothing runs on a
device: all numbers are predicted, not measured.

A pass is the loop over the groups of eight tokens that a thread has. Its instructions are those whose
line information says that the pass's function called the loop; per logit they are an eighth. Left out
are the sides that a plain row does not take: groups that reach beyond the row, bias, mask, history.
Those of the history are counted apart: what each group takes to look at its bits, and what a seen token
takes. A warp's instruction is issued once for 32 threads.

A call on an H100 (132 multiprocessors, 3.35 TB/s, 1.755 GHz, 4 instructions a cycle) takes at least

* bytes: all logits once, and the bits of the history, at 3.35 TB/s;
* issue: the instructions of all passes, on the busiest multiprocessor.

What it should take is ``chain``: the time of one row's cluster from its first read to its end, times how
many rows follow each other, ``ceil(rows / clusters at a time)``. Nothing is taken off for what two
rows on one multiprocessor hide of each other. The chain counts, with these assumptions:

* reads of global memory, of which each needs the one before it: 0.7 us;
* the copy: a block gets 70 GB/s, or its share of 3.35 TB/s where the whole chip reads;
* passes: a round is issued by all warps of the multiprocessor in turn, but takes a warp at least 2.5
  cycles an instruction and 60 for shared memory;
* barriers: 40 cycles of a block, 350 of a cluster, with what is written into other blocks before it;
* reductions, running sums and searches in a list: 35 cycles for each step of shuffles or of shared memory;
* the list: 60 tokens for top-k 50, 300 for top-p; sorted by as many steps for each of its tokens.

A launch itself, about 2 us before the first instruction runs, is not in it: no kernel has less.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sass
from timing import ROOT, progress

RESULTS = ROOT / "benchmarks" / "results"
CSRC = ROOT / "csrc"
SOURCE = CSRC / "cuda" / "sample.cu"
#: What a block may have of a multiprocessor's shared memory, in KiB.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120": 99}
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_100a": 148, "sm_120": 188}
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo"]
VOCAB_SIZES = (32000, 128256, 262144)
ROWS = (1, 8, 64, 256)

# Compiling


class Kernel(NamedTuple):
    """An instance of the kernel's template."""

    dtype: str
    copied: bool


def compile_cubin(arch: str) -> bytes:
    """The machine code of all kernels, with line information."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-cubin", "-o", str(cubin), str(SOURCE)]
        subprocess.run(command, check=True)
        return cubin.read_bytes()


def library_cubins(library: Path) -> dict[str, bytes]:
    """The machine code in a library, by architecture."""
    tool = sass.find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on the path nor in Triton's package")
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", "all", str(library.resolve())]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        found = {}
        for path in Path(folder).iterdir():
            found[re.findall(r"sm_\d+a?", path.name)[-1]] = path.read_bytes()
        return found


def kernel_of(name: str) -> Kernel:
    """What a mangled name says."""
    dtype, copied = re.search(r"sample_kernelILi(\d)ELb(\d)E", name).groups()  # type: ignore[union-attr]
    return Kernel(list(DTYPES)[int(dtype)], copied == "1")


class Usage(NamedTuple):
    """What cuobjdump says of a kernel."""

    registers: int
    stack: int


def usages(cubin: bytes) -> dict[Kernel, Usage]:
    """The registers and the stack of each kernel."""
    text = sass.run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.findall(r"Function (\S*sample_kernel\S*):\s*REG:(\d+) STACK:(\d+)", text)
    return {kernel_of(name): Usage(int(reg), int(stack)) for name, reg, stack in found}


class Launch(NamedTuple):
    """What csrc/cuda/launch.h chooses."""

    blocks: int
    copied: bool
    groups: int
    shared: int
    threads: int


@functools.cache
def _launch_library() -> ctypes.CDLL:
    """launch.h needs no CUDA."""
    code = f"""
#include "{CSRC}/cuda/launch.h"
extern "C" void choose(const int* of, int* to) {{
  const auto launch = llm_sampling::choose_launch(of[0], of[1], of[2], {{of[3], of[4], of[5]}});
  to[0] = launch.blocks, to[1] = launch.copied, to[2] = launch.groups, to[3] = launch.shared_bytes;
  to[4] = llm_sampling::kThreads;
}}"""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "launch.so")
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True)
        return ctypes.CDLL(str(library))


def choose_launch(rows: int, vocab_size: int, itemsize: int, arch: str) -> Launch:
    """The launch on a device of this architecture."""
    number = int(re.findall(r"\d+", arch)[0])
    of = rows, vocab_size, itemsize, number, PROCESSORS[arch], SHARED_KIB[arch] * 1024
    to = (ctypes.c_int * 5)()
    _launch_library().choose((ctypes.c_int * 6)(*of), to)
    blocks, copied, groups, shared, threads = to
    return Launch(blocks, bool(copied), groups, shared, threads)


# The passes, in the source and in the machine code

#: A function of sample.cu, and the statement in it that is the loop.
PASSES = {
    "copy": ("copy_logits", "for (int local"),
    "maxima": ("find_maxima", "over_groups("),
    "list": ("list", "over_groups("),
    "search": ("search", "over_groups("),
    "weigh": ("weigh", "over_groups("),
    "raw": ("find_raw_sum", "for (int round"),
    "filtered": ("write_filtered", "over_groups("),
}
#: Statements that not every row comes to: a file, the line and perhaps the next, and whether the line
#: itself is one of them.
SIDES = {
    "edge": (("row.h", "  if (is_whole) return;\n"), ("sample.cu", "  } else {\n        copy_edge(")),
    "bias": (("row.h", "  if (row.bias_count > 0) {\n"),),
    "mask": (("row.h", "  if (row.allowed.words != nullptr) {\n"),),
    "history": (("row.h", "  if (row.seen.words != nullptr) {\n"),),
    "seen": (("row.h", "      const int next = __ffs("),),
    "all": (("sample.cu", "      if (all) {\n"),),
    "kept": (("sample.cu", "      } else {\n#pragma unroll\n        for (int i = 0; i < kGroup; ++i) sum +="),),
}


class Place(NamedTuple):
    """Lines of a file."""

    file: str
    lines: range

    def has(self, chain: Iterable[tuple[str, int]]) -> bool:
        """Whether one of these is here."""
        return any(file == self.file and line in self.lines for file, line in chain)


class Source(NamedTuple):
    """Where the source has what the machine code is asked about."""

    passes: dict[str, Place]
    sides: dict[str, list[Place]]
    mass: Place


def block_at(text: str, start: int) -> range:
    """The lines from there to the first one that closes what the line is in, or opens."""
    first = text.count("\n", 0, start) + 1
    lines = text.split("\n")
    line = lines[first - 1]
    indent = len(line) - len(line.lstrip())
    closing = (" " * indent + "}",) if line.endswith("{") else (" " * (indent - 2) + "}",)
    for number, other in enumerate(lines[first:], first + 1):
        if other.startswith(closing):
            return range(first, number + 1)
    raise ValueError(f"line {first} has no end")


@functools.cache
def source() -> Source:
    """The lines by which the machine code is read."""
    texts = {name: (CSRC / "cuda" / name).read_text() for name in ("sample.cu", "row.h")}
    kernel = texts["sample.cu"]
    passes = {}
    for name, (function, statement) in PASSES.items():
        start = kernel.index(statement, re.search(rf" {function}\(.*\{{$", kernel, re.M).start())  # type: ignore[union-attr]
        passes[name] = Place("sample.cu", block_at(kernel, start))
    sides = {
        kind: [Place(file, block_at(texts[file], texts[file].index(text))) for file, text in places]
        for kind, places in SIDES.items()
    }
    semantics = (CSRC / "semantics.h").read_text()
    mass = Place("semantics.h", block_at(semantics, semantics.index("int64_t whole_mass(")))
    return Source(passes, sides, mass)


def side_of(chain: Sequence[tuple[str, int]]) -> str:
    """The innermost of the sides that an instruction is in, or "plain"."""
    for link in chain:
        found = {
            kind: len(place.lines)
            for kind, places in source().sides.items()
            for place in places
            if place.has([link])
        }
        if found:
            return min(found, key=lambda kind: found[kind])
    return "plain"


def pass_of(chain: Sequence[tuple[str, int]]) -> str | None:
    """The pass that an instruction is part of."""
    return next((name for name, place in source().passes.items() if place.has(chain)), None)


# What a kernel costs, and what it must not


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs; instructions by pass and side, for a group of eight tokens."""

    registers: int
    spills: int
    instructions: int
    widest_load: int  # bytes, from global memory
    wide_copies: int
    fused: int  # multiply-adds with a constant of the mass, or constants that are elsewhere
    passes: dict[str, dict[str, int]]


def mass_constants() -> list[str]:
    """The polynomial's coefficients, as nvdisasm writes them."""
    semantics = (CSRC / "semantics.h").read_text()
    polynomial = semantics[semantics.index("float polynomial(") :]
    found = re.findall(r"-?0x1\.[0-9a-f]{6}p[+-]\d+", polynomial[: polynomial.index("return p;")])
    return [f"{float.fromhex(text):.20g}" for text in found]


def count_fused(code: Iterable[sass.Instruction]) -> int:
    """How many instructions of the mass are not the addition or the multiplication that they are.

    The coefficients are in no other code: an addition or a multiplication has each of them as it is.
    """
    constants = [f"{float(text):.10e}" for text in mass_constants()[:-1]]  # the last is 1
    wrong = 0
    for instruction in code:
        numbers = re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", instruction.operands)
        if any(f"{float(number):.10e}" in constants for number in numbers):
            wrong += instruction.name not in ("FADD", "FMUL")
    return wrong


def measure(cubin: bytes) -> dict[Kernel, Cost]:
    """The cost of each kernel."""
    found = usages(cubin)
    costs = {}
    names = {CSRC / "cuda" / "sample.cu", CSRC / "cuda" / "row.h", CSRC / "semantics.h"}
    for name, (code, _) in sass.disassemble(cubin, lambda path: path in names).items():
        passes: dict[str, Counter[str]] = {}
        for instruction in code:
            where = pass_of(instruction.lines)
            if where is not None:
                passes.setdefault(where, Counter())[side_of(instruction.lines)] += 1
        kernel = kernel_of(name)
        costs[kernel] = Cost(
            registers=found[kernel].registers,
            spills=sass.count_spills(code),
            instructions=len(code),
            widest_load=max((i.loaded for i in code), default=0),
            wide_copies=sum(i.name == "LDGSTS" and i.bytes == 16 for i in code),
            fused=count_fused(code),
            passes={name: dict(sides) for name, sides in passes.items()},
        )
    return costs


def broken_rules(kernel: Kernel, arch: str, cost: Cost) -> list[str]:
    """What is not as it must be, in words."""
    broken = []
    if cost.spills:
        broken.append(f"{cost.spills} loads and stores of spilled registers")
    if cost.registers > 128:
        broken.append(f"{cost.registers} registers: a multiprocessor has not enough for two blocks")
    if cost.fused:
        broken.append(f"{cost.fused} instructions of the mass are no addition or multiplication")
    if cost.widest_load != 16:
        broken.append(f"logits are loaded {cost.widest_load} bytes at a time")
    if kernel.copied and cost.wide_copies < DTYPES[kernel.dtype] // 2:
        broken.append(f"{cost.wide_copies} copies of 16 bytes to shared memory")
    for vocab_size in (1000, *VOCAB_SIZES, 2**20):
        for rows in ROWS:
            shared = choose_launch(rows, vocab_size, DTYPES[kernel.dtype], arch).shared
            if shared > SHARED_KIB[arch] * 1024:
                broken.append(f"{shared} bytes of shared memory, more than {SHARED_KIB[arch]} KiB")
    return [f"{kernel.dtype}{', copied' * kernel.copied}, {arch}: {reason}" for reason in broken]
