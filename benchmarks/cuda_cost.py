"""What the CUDA kernel costs, read from its machine code: ``python -m benchmarks.cuda_cost``.

nvcc compiles csrc/cuda/sample.cu for every architecture that setup.py builds. Nothing runs on a
device: all numbers are predicted, not measured.

A pass is a loop over a thread's vecs, of eight tokens each. The instructions of a pass are those
whose line information leads back to that loop; the table divides them by eight, for one logit.
What only some rows execute is counted apart, as a side of the pass: vecs that reach beyond the row,
bias, mask, history. Code that the compiler has duplicated counts twice. A warp issues each
instruction once for its 32 threads.

A call on an H100 (132 multiprocessors of 4 schedulers, 3.35 TB/s, 1.755 GHz) takes at least the
time of either of these:

* bytes: all logits once, and the bits of the history, at 3.35 TB/s;
* issue: the instructions of all passes on the busiest multiprocessor. A scheduler issues one
  instruction per cycle, but a comparison, selection, integer addition, shift or logic operation
  only every second cycle, and an integer multiplication likewise.

The predicted time is that of one row's cluster, from its first read to its end, times the number of
clusters that run one after another, ``ceil(rows / clusters at a time)``. Two rows on the same
multiprocessors overlap: one is copied while the other is searched. The prediction assumes

* 0.7 us for a read of global memory that depends on the read before it: one such read before the
  copy, and beside the copy three more until the counts of the history have arrived;
* 70 GB/s for the copy of a block, or the block's share of 3.35 TB/s;
* for a round of a pass, as many cycles as its warps need to issue it, but at least 2.5 per
  instruction and 60 for shared memory; two rounds of the maxima overlap. The passes of another row
  on the same multiprocessor are met for the share of time that they take, and both then issue in
  turn;
* 40 cycles for a barrier of a block, 350 for a barrier of a cluster with what it waits for, and 200
  for a read of another block's shared memory;
* 35 cycles for each step of a chain of dependent operations: a shuffle, a vote, a read of shared
  memory;
* 60 candidates where top-k is 50, and 80 where top-p is 0.9 and they have its mass; on a flat row,
  5 passes of the search and then 300 candidates, as counted in the emulation;
* a history of 4,096 tokens, spread uniformly over the vocabulary.

The launch itself, about 2 us before the first instruction runs, is not included: every kernel has
it. "All parameters" are the three penalties, temperature, top-k 50, top-p 0.9 and min-p.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import math
import operator
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import sass
from benchmarks.cost_report import BY_ROWS, DTYPES, ROWS, VOCAB_SIZES, join_rows, publish, table
from benchmarks.timing import ROOT

CSRC = ROOT / "csrc"
SOURCE = CSRC / "cuda" / "sample.cu"
#: The most shared memory that a block may have, in KiB.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120": 99}
#: The multiprocessors of the largest device of each architecture.
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_100a": 148, "sm_120": 188}
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo"]

# Compiling


class Kernel(NamedTuple):
    """An instance of the kernel's template: its dtype, and whether parts are copied."""

    dtype: str
    copied: bool


def compile_cubin(arch: str, flags: Sequence[str] = FLAGS, csrc: Path = CSRC) -> bytes:
    """The machine code of all kernels, with line information."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        command = ["nvcc", *flags, f"-arch={arch}", "-cubin", "-o", str(cubin)]
        command.append(str(csrc / SOURCE.relative_to(CSRC)))
        subprocess.run(command, check=True)
        return cubin.read_bytes()


def library_cubins(library: Path) -> dict[str, bytes]:
    """The machine code of the kernels in a library, by architecture."""
    tool = sass.find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on the path nor in Triton's package")
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", "all", str(library.resolve())]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        found: dict[str, bytes] = {}
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_size):
            # Each architecture has several cubins; the kernels are in the largest one.
            found[re.findall(r"sm_\d+a?", path.name)[-1]] = path.read_bytes()
        return found


def kernel_of(name: str) -> Kernel:
    """The kernel that has this mangled name."""
    dtype, copied = re.search(r"sample_kernelILi(\d)ELb(\d)E", name).groups()  # type: ignore[union-attr]
    return Kernel(list(DTYPES)[int(dtype)], copied == "1")


class Usage(NamedTuple):
    """Registers of a thread, and bytes of its stack."""

    registers: int
    stack: int


def usages(cubin: bytes) -> dict[Kernel, Usage]:
    """What cuobjdump reports for each kernel."""
    text = sass.run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.findall(r"Function (\S*sample_kernel\S*):\s*REG:(\d+) STACK:(\d+)", text)
    return {kernel_of(name): Usage(int(reg), int(stack)) for name, reg, stack in found}


class Launch(NamedTuple):
    """What csrc/cuda/launch.cuh chooses, and the threads of a block."""

    blocks: int
    copied: bool
    vecs: int  # of a block's part
    shared: int  # bytes of a block
    threads: int


@functools.cache
def _launch_library() -> ctypes.CDLL:
    """launch.cuh as a library: it needs no CUDA."""
    code = f"""
#include "{CSRC}/cuda/launch.cuh"
extern "C" void choose(const int* of, int* to) {{
  const auto launch = llm_sampling::choose_launch(of[0], of[1], of[2], {{of[3], of[4], of[5]}});
  to[0] = launch.blocks, to[1] = launch.copied, to[2] = launch.vecs, to[3] = launch.shared_bytes;
  to[4] = llm_sampling::kThreads;
}}"""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "launch.so")
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True)
        return ctypes.CDLL(str(library))


def choose_launch(rows: int, vocab_size: int, itemsize: int, arch: str) -> Launch:
    """The launch on the largest device of this architecture."""
    number = int(re.findall(r"\d+", arch)[0])
    of = rows, vocab_size, itemsize, number, PROCESSORS[arch], SHARED_KIB[arch] * 1024
    to = (ctypes.c_int * 5)()
    _launch_library().choose((ctypes.c_int * 6)(*of), to)
    blocks, copied, vecs, shared, threads = to
    return Launch(blocks, bool(copied), vecs, shared, threads)


# The passes, in the source and in the machine code

#: For each pass: a method of RowSampler, the statement in it that is or calls the loop, and an
#: instruction that one iteration has once. If the loop is unrolled or duplicated there are more of
#: them, which tells how many iterations the code has.
PASSES = {
    "copy": ("copy_logits", "for (int local", "LDGSTS"),
    "bits": (
        "copy_bits",
        "for (int i = thread; i < words; i += kThreads) {\n      copy.seen",
        "POPC",
    ),
    "places": (
        "copy_bits",
        "for (int i = thread; i < words; i += kThreads) {\n      copy.places",
        "",
    ),
    "maxima": ("find_maxima", "any_nan |= find_tile_maxima<true>", "REDUX"),
    "other maxima": ("find_maxima", "any_nan |= find_tile_maxima<false>", ""),
    "score": ("score", "for (int i = static_cast<int>(threadIdx.x); i < count", ""),
    "first": ("find_first", "over_tiles(", ""),
    "collect": ("collect", "over_tiles(", ""),
    "compare": ("compare_all", "for (int i = part", "LDS"),
    "search": ("search", "over_tiles(", ""),
    "weigh": ("weigh", "over_vecs(", ""),
    "raw": ("find_raw_sum", "for (int round", ""),
    "filtered": ("write_filtered", "over_vecs(", ""),
}
#: The passes that load vecs of logits.
LOGIT_PASSES = ("copy", "maxima", "first", "collect", "search", "weigh", "filtered")
#: What only some rows execute: a file, and a text in it. The text begins with a line that opens a
#: block, which is meant as a whole, or with a line from which on the rest of a block is meant.
SIDES = {
    "edge": [("row.cuh", "    const int first = row.first_id(vec);\n#pragma")],
    "bias": [("row.cuh", "  const int32_t* ids = args.logit_bias_ids")],
    "mask": [("copy.cuh", "  if (row_.allowed.words != nullptr) {\n    const unsigned allowed")],
    "history": [("copy.cuh", "  const uint32_t here = kCopied")],
    "seen": [
        ("copy.cuh", "    const int next = __ffs("),
        ("copy.cuh", "        if (place >= kMaxScores) continue;"),
    ],
    "unscored": [("copy.cuh", "      for (int i = 0; i < kVec; ++i) value = i == next")],
    "hit": [("candidates.cuh", "    // Once there are too many")],
    "all": [("passes.cuh", "    if (all) {\n")],
    "kept": [
        (
            "passes.cuh",
            "    } else {\n#pragma unroll\n      for (int i = 0; i < kVec; ++i) sum +=",
        )
    ],
}
#: Instructions that a scheduler issues every second cycle only: those of the integer units, which
#: have 16 lanes, and those of the multipliers.
HALF_RATE = (
    {"FSETP", "FMNMX", "FSEL", "SEL", "ISETP", "IADD3", "VIADD", "VIMNMX"}
    | {"LOP3", "PLOP3", "SHF", "PRMT", "LEA", "BREV", "I2FP"},
    {"IMAD"},
)


class Place(NamedTuple):
    """A range of lines of a file."""

    file: str
    lines: range

    def has(self, chain: Iterable[tuple[str, int]]) -> bool:
        """Whether one of these lines is in it."""
        return any(file == self.file and line in self.lines for file, line in chain)


class Source(NamedTuple):
    """Where the loops of the passes and their sides are in the source."""

    passes: dict[str, Place]
    sides: dict[str, list[Place]]


def block_at(text: str, start: int) -> range:
    """The lines of the block that the line at ``start`` opens, or the rest of the one it is in."""
    first = text.count("\n", 0, start) + 1
    lines = text.split("\n")
    line = lines[first - 1]
    indent = len(line) - len(line.lstrip())
    closing = " " * indent + {"{": "}", "(": ")"}.get(line[-1], "")
    if line[-1] not in "{(":
        closing = " " * (indent - 2) + "}"
    for number, other in enumerate(lines[first:], first + 1):
        if other.startswith(closing):
            return range(first, number + 1)
    raise ValueError(f"line {first} has no end")


@functools.cache
def source() -> Source:
    """The places by which instructions are assigned to passes and sides."""
    texts = {path.name: path.read_text() for path in sources()}
    passes = {}
    for name, (function, statement, _) in PASSES.items():
        ((file, start),) = (
            (file, text.index(statement, definition.start()))
            for file, text in texts.items()
            for definition in re.finditer(rf"RowSampler<kDtype, kCopied>::{function}\(", text)
        )
        passes[name] = Place(file, block_at(texts[file], start))
    sides = {
        kind: [Place(file, block_at(texts[file], texts[file].index(text))) for file, text in places]
        for kind, places in SIDES.items()
    }
    return Source(passes, sides)


def side_of(chain: Sequence[tuple[str, int]]) -> str:
    """The innermost of the sides that an instruction belongs to, or "plain"."""
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
    """The pass that an instruction belongs to."""
    return next((name for name, place in source().passes.items() if place.has(chain)), None)


# What a kernel costs, and what it must not cost


class Mix(NamedTuple):
    """How many instructions a thread executes, on average."""

    all: float
    logic: float  # those of the first kind of HALF_RATE
    multiply: float  # those of the second

    @classmethod
    def of(cls, names: Counter[str]) -> Mix:
        """The mix of instructions with these names."""
        return cls(names.total(), *(sum(names[name] for name in kind) for kind in HALF_RATE))

    def __add__(self, other: tuple[float, ...]) -> Mix:  # type: ignore[override]
        """The sum of both."""
        return Mix(*map(operator.add, self, other))

    def times(self, factor: float) -> Mix:
        """The mix repeated so often."""
        return Mix(*(value * factor for value in self))

    @property
    def cycles(self) -> float:
        """The cycles that a scheduler needs to issue it for a warp."""
        return max(self.all, 2 * self.logic, 2 * self.multiply)


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs."""

    registers: int
    spills: int
    instructions: int
    fused: int  # instructions with a constant of the mass that are no addition or multiplication
    loads: dict[str, dict[int, int]]  # number of loads from global memory, by pass and bytes
    passes: dict[str, dict[str, Mix]]  # instructions for one vec, by pass and side


def mass_constants() -> list[str]:
    """The polynomial's coefficients, as nvdisasm writes them."""
    semantics = (CSRC / "semantics.h").read_text()
    polynomial = semantics[semantics.index("float polynomial(") :]
    found = re.findall(r"-?0x1\.[0-9a-f]{6}p[+-]\d+", polynomial[: polynomial.index("return p;")])
    return [f"{float.fromhex(text):.20g}" for text in found]


def count_fused(code: Iterable[sass.Instruction]) -> int:
    """How many instructions of the mass are neither an addition nor a multiplication.

    An instruction belongs to the mass if a coefficient of its polynomial is an operand; no other
    code has these constants.
    """
    # The last coefficient is 1, which other code has too.
    constants = [f"{float(text):.10e}" for text in mass_constants()[:-1]]
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
    files = {path.name for path in sources()}
    for name, (code, _, detours) in sass.disassemble(cubin, lambda p: p.name in files).items():
        left_out = {place for detour in detours for place in detour}
        passes: dict[str, dict[str, Counter[str]]] = {}
        loads: dict[str, Counter[int]] = {}
        for place, instruction in enumerate(code):
            where = pass_of(instruction.lines)
            if where is not None and place not in left_out:
                side = side_of(instruction.lines)
                passes.setdefault(where, {}).setdefault(side, Counter())[instruction.name] += 1
                if side == "plain" and instruction.loaded:
                    loads.setdefault(where, Counter())[instruction.loaded] += 1
        kernel = kernel_of(name)
        costs[kernel] = Cost(
            registers=found[kernel].registers,
            spills=sass.count_spills(code),
            instructions=len(code),
            fused=count_fused(code),
            loads={name: dict(sizes) for name, sizes in loads.items()},
            passes={
                name: {
                    side: Mix.of(names).times(1 / copies_of(kernel, name, sides))
                    for side, names in sides.items()
                }
                for name, sides in passes.items()
            },
        )
    return costs


def copies_of(kernel: Kernel, name: str, sides: dict[str, Counter[str]]) -> float:
    """How many iterations the code of a loop has; 1 where it is not unrolled."""
    once = PASSES[name][2]
    if not once:
        return 1
    of_one = {"copy": DTYPES[kernel.dtype] // 2, "compare": 2}.get(name, 1)
    found = sum(names[name] for names in sides.values() for name in names if name.endswith(once))
    return found / of_one


def broken_rules(kernel: Kernel, arch: str, cost: Cost) -> list[str]:
    """The rules that a kernel breaks, in words."""
    broken = []
    if cost.spills:
        broken.append(f"{cost.spills} loads and stores of spilled registers")
    if cost.registers > 128:
        broken.append(f"{cost.registers} registers: a multiprocessor has not enough for two blocks")
    if cost.fused:
        broken.append(f"{cost.fused} instructions of the mass are no addition or multiplication")
    for name in LOGIT_PASSES:
        if name not in cost.passes:
            continue
        loads = dict(cost.loads.get(name, {}))
        wide = loads.pop(16, 0)
        # A load of a vec at the row's end may have the line number of the wide loads.
        if (wide > 0) != (name == "copy" or not kernel.copied) or sum(loads.values()) > 1:
            broken.append(
                f"{name}: logits are loaded {sorted(loads)} bytes at a time, {wide} times 16"
            )
    for vocab_size in (1000, *VOCAB_SIZES, 2**20):
        for rows in ROWS:
            shared = choose_launch(rows, vocab_size, DTYPES[kernel.dtype], arch).shared
            if shared > SHARED_KIB[arch] * 1024:
                broken.append(f"{shared} bytes of shared memory, more than {SHARED_KIB[arch]} KiB")
    return [f"{kernel.dtype}{', copied' * kernel.copied}, {arch}: {reason}" for reason in broken]


# How long a call takes


@dataclass(frozen=True)
class Case:
    """What the parameters of all rows make the kernel do."""

    name: str
    is_greedy: bool = False
    candidates: tuple[int, ...] = ()  # how many, each time they are collected
    weighs: bool = False  # whether the mass of the whole row is needed
    searches: int = 0  # passes of the search
    history: int = 0  # seen tokens
    has_depth_cut: bool = False


CASES = (
    Case("greedy", is_greedy=True),
    Case("no filter", weighs=True),
    Case("top-k 50", candidates=(60,)),
    Case("top-p 0.9", candidates=(80,), weighs=True),
    Case("top-p 0.9, flat", candidates=(300,), weighs=True, searches=5),
    Case("top-k 50 + top-p 0.9", candidates=(60,)),
    Case("all parameters", candidates=(60,), history=4096, has_depth_cut=True),
)

PROCESSORS_H100 = PROCESSORS["sm_90a"]
CYCLES_PER_US = 1755
BYTES_PER_US = 3.35e6
BLOCK_BYTES_PER_US = 70e3
READ_US = 0.7
BARRIER, CLUSTER_BARRIER, REMOTE, STEP = 40, 350, 200, 35
SLOWEST = 2.5  # cycles per instruction of a warp that runs alone
SHARED_MEMORY = 60  # cycles


def most_seen(expected: float) -> float:
    """The expected maximum over the 32 lanes of a warp of a Poisson number with this mean."""
    at_most, term, found = 0.0, math.exp(-expected), 0.0
    for n in range(33):
        at_most += term
        found += 1 - min(at_most, 1.0) ** 32
        term *= expected / (n + 1)
    return found


class Chain:
    """The cycles of one row's cluster, by what they are for.

    Methods with the name of one of RowSampler or Cluster follow it, step by step.
    """

    def __init__(self, case: Case, cost: Cost, launch: Launch, vocab_size: int):
        self.case = case
        self.cost = cost
        self.launch = launch
        self.rounds = math.ceil(launch.vecs / launch.threads)
        self.warps = launch.threads // 32
        self.per_scheduler = self.warps / 4
        self.share_seen = case.history / vocab_size
        self.cycles: Counter[str] = Counter()
        self.issued = 0.0  # cycles in which a scheduler issues for the warps of one block
        self.hindered = 0.0  # further cycles of the passes if another block has its passes then

    def steps(self, count: float) -> None:
        self.cycles["steps"] += STEP * count

    def barrier(self) -> None:
        self.cycles["barriers"] += BARRIER

    def sync(self) -> None:
        self.cycles["barriers"] += CLUSTER_BARRIER if self.launch.blocks > 1 else BARRIER

    def read_remote(self, count: int) -> None:
        if self.launch.blocks > 1:
            self.cycles["barriers"] += REMOTE * count

    def code(self, instructions: float) -> None:
        """Instructions that a warp issues once, with nothing to overlap them."""
        self.cycles["steps"] += SLOWEST * instructions

    def mix(self, name: str, *sides: str) -> Mix:
        """The instructions of a round of a pass in this case."""
        found = self.cost.passes[name]
        mix = sum((found[side] for side in sides), found["plain"])
        if self.case.history and "history" in found:
            mix += found["history"] + found["seen"].times(most_seen(8 * self.share_seen))
        return mix

    def loop(self, mix: Mix, rounds: float, steps: int = 0, overlapping: int = 1) -> None:
        """So many rounds of all warps of a block, of which so many overlap."""
        slowest = (SLOWEST * mix.all + SHARED_MEMORY + STEP * steps) / overlapping
        alone = max(self.per_scheduler * mix.cycles, slowest)
        self.cycles["passes"] += rounds * alone
        self.hindered += rounds * (max(2 * self.per_scheduler * mix.cycles, slowest) - alone)
        self.issued += rounds * self.per_scheduler * mix.cycles

    def over_vecs(self, name: str, *sides: str, steps: int = 0) -> None:
        self.loop(self.mix(name, *sides), self.rounds, steps)

    def over_tiles(self, name: str, tokens: int) -> None:
        """The tiles that have one of so many tokens; the slowest warp has one more than average."""
        tiles = self.rounds * self.warps * self.launch.blocks
        share = 1 - (1 - 1 / tiles) ** tokens
        self.loop(self.mix(name), min(self.rounds, self.rounds * share + 1))
        self.steps(self.rounds)

    def copy(self, copy_us: float) -> None:
        """The logits, and beside them the history, whose reads depend on each other."""
        instructions = self.cost.passes["copy"]["plain"]
        self.issued += self.rounds * self.per_scheduler * instructions.cycles
        cycles = (READ_US + copy_us * self.launch.copied) * CYCLES_PER_US
        if self.case.history:
            beside = Chain(self.case, self.cost, self.launch, 1)
            beside.share_seen = self.share_seen
            beside.copy_bits()
            self.issued += beside.issued
            cycles = max(cycles, beside.cycles.total() + 3 * READ_US * CYCLES_PER_US)
        self.cycles["reads"] += cycles
        self.barrier()

    def copy_bits(self) -> None:
        words = math.ceil(self.launch.vecs / 4 / self.launch.threads)
        passes = self.cost.passes
        self.loop(passes["bits"]["plain"], words)
        self.barrier()
        self.steps(5 + 2)
        placed = passes["places"]["seen"].times(most_seen(32 * self.share_seen))
        self.loop(passes["places"]["plain"] + placed, words)

    def score(self) -> None:
        self.barrier()
        seen = self.case.history / self.launch.blocks
        self.loop(self.cost.passes["score"]["plain"], math.ceil(seen / self.launch.threads))

    def combine(self) -> None:
        self.steps(5 + 1)
        self.barrier()
        self.steps(1 + 3 + 1)
        self.sync()
        self.steps(1 + 3)

    def scan(self) -> None:
        self.steps(5 + 1)
        self.barrier()
        self.steps(1 + 5 + 1)
        self.barrier()

    def sum(self) -> None:
        self.steps(1)
        self.sync()
        self.steps(1 + 3)

    def process_any(self) -> None:
        self.read_remote(1)
        self.cycles["passes"] += SLOWEST * self.mix("first").all + SHARED_MEMORY

    def mass(self) -> None:
        self.code(self.cost.passes["weigh"]["all"].all / 8)

    def compare_all(self, count: int) -> None:
        """Four lanes share a candidate; an iteration compares it with four others in each lane."""
        four = SHARED_MEMORY + SLOWEST * 4 * self.cost.passes["compare"]["plain"].all
        rounds = math.ceil(count / (self.launch.threads // 4))
        self.cycles["candidates"] += rounds * (math.ceil(count / 16) * four + 2 * STEP)

    def search_sorted(self, times: int) -> None:
        """So many calls of count_leading_by_warp: two iterations of a read and a vote."""
        self.steps(4 * times)

    def sum_tiles(self) -> None:
        self.barrier()
        self.steps(2 * math.ceil(self.rounds * self.warps / self.launch.threads))
        self.scan()
        self.barrier()
        self.sum()

    def collect(self, count: int) -> None:
        self.barrier()
        self.steps(3)
        self.over_tiles("collect", count)
        of_warp = math.ceil(count / self.launch.blocks / self.warps)
        self.code(of_warp * self.cost.passes["collect"]["hit"].all)
        self.steps(of_warp)
        self.barrier()
        self.sum()
        self.mass()
        self.read_remote(1)
        self.sync()
        self.compare_all(count)
        self.barrier()

    def guess_range(self) -> None:
        self.barrier()
        self.steps(2)
        self.sync()
        self.read_remote(math.ceil(self.launch.blocks / 4))
        self.scan()
        self.barrier()
        self.barrier()

    def search(self) -> None:
        self.barrier()
        self.process_any()
        self.process_any()
        self.mass()
        self.barrier()
        self.compare_all(256)
        self.barrier()
        self.search_sorted(4)
        self.steps(1)
        self.sync()
        for _ in range(self.case.searches):
            self.over_vecs("search")
            self.combine()
            self.steps(6)

    def find_kept(self) -> None:
        case = self.case
        if case.weighs:
            self.barrier()
            self.over_vecs("weigh", "all", steps=5)
            self.sum_tiles()
        for count in case.candidates:
            if case.searches:
                self.search()
            else:
                self.guess_range()
            self.collect(count)
            self.search_sorted(2)
        if case.has_depth_cut:
            self.search_sorted(1)
            self.mass()  # an upper bound of what a depth takes
        if case.searches:
            self.barrier()
            self.over_vecs("weigh", "kept", steps=5)
            self.sum_tiles()

    def draw(self) -> None:
        case = self.case
        if case.is_greedy:
            return
        if case.candidates and not case.searches:
            self.search_sorted(1)
            self.barrier()
            self.compare_all(case.candidates[0])
            self.barrier()
            self.steps(math.ceil(case.candidates[0] / 32) * 2 + 2)
        else:
            self.steps(2 * math.log2(self.rounds * self.warps))
            self.process_any()
            self.code(self.cost.passes["weigh"]["all"].all)
            self.steps(5 + 2)

    def run(self, copy_us: float) -> None:
        self.copy(copy_us)
        if self.case.history:
            self.score()
        self.loop(self.cost.passes["maxima"]["plain"], self.rounds, overlapping=2)
        self.combine()
        if self.case.is_greedy:
            self.over_tiles("first", 1)
            self.combine()
        else:
            self.find_kept()
        self.draw()


def predict(
    case: Case, dtype: str, rows: int, vocab_size: int, costs: dict[Kernel, Cost]
) -> dict[str, Any]:
    """The times of a call on an H100, by the assumptions at the top of this file."""
    itemsize = DTYPES[dtype]
    launch = choose_launch(rows, vocab_size, itemsize, "sm_90a")
    cost = costs[Kernel(dtype, launch.copied)]
    reserved = launch.shared + 1024
    per_processor = min(2, SHARED_KIB["sm_90a"] * 1024 // reserved if reserved else 2)
    at_once = max(1, PROCESSORS_H100 * per_processor // launch.blocks)
    if rows * launch.blocks <= PROCESSORS_H100:
        per_processor = 1
    follow = math.ceil(rows / at_once)
    row_bytes = vocab_size * itemsize + (vocab_size / 8 if case.history else 0)
    copied_at_once = min(rows, at_once / per_processor)
    together = copied_at_once * row_bytes / BYTES_PER_US
    copy = max(row_bytes / launch.blocks / BLOCK_BYTES_PER_US, together)
    chain = Chain(case, cost, launch, vocab_size)
    chain.run(copy)
    if per_processor == 2:
        # The other row's passes are met for the share of time that passes take: a fixed point.
        alone = passes = chain.cycles["passes"]
        rest = chain.cycles.total() - alone
        for _ in range(20):
            passes = alone + passes / (rest + passes) * chain.hindered
        chain.cycles["passes"] = passes
    parts = {name: follow * cycles / CYCLES_PER_US for name, cycles in chain.cycles.items()}
    blocks_of_busiest = math.ceil(rows * launch.blocks / PROCESSORS_H100)
    microseconds = {
        "bytes": rows * row_bytes / BYTES_PER_US,
        "issue": blocks_of_busiest * chain.issued / CYCLES_PER_US,
        "predicted": sum(parts.values()),
        **parts,
    }
    return {
        "case": case.name,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "rows": rows,
        "blocks": launch.blocks,
        "copied": launch.copied,
        "clusters_at_once": at_once,
        "microseconds": {name: round(value, 2) for name, value in microseconds.items()},
    }


# The report


def tables(
    costs: dict[str, dict[Kernel, Cost]], predictions: Sequence[dict[str, Any]]
) -> list[str]:
    """The tables of the report: what kernels need, instructions, launches, times."""
    kernels = sorted(costs["sm_90a"])
    needs = []
    for kernel in kernels:
        found = [costs[arch][kernel] for arch in costs]
        cells = [f"{cost.registers} / {cost.spills} / {cost.instructions:,}" for cost in found]
        needs.append([kernel.dtype, "yes" if kernel.copied else "no", *cells])
    per_logit = []
    for kernel in kernels:
        for name, sides in costs["sm_90a"][kernel].passes.items():
            if name not in ("compare", "bits", "places", "score"):
                cells = [f"{sides[s].all / 8:.1f}" if s in sides else "" for s in ("plain", *SIDES)]
                per_logit.append([f"{kernel.dtype}{', copied' * kernel.copied}", name, *cells])
    launches = []
    for vocab_size in VOCAB_SIZES:
        for dtype, itemsize in DTYPES.items():
            if dtype == "float16":
                continue  # the same as bfloat16
            for arch in costs:
                cells = []
                for rows in ROWS:
                    launch = choose_launch(rows, vocab_size, itemsize, arch)
                    reads = "once" if launch.copied else "every pass"
                    cells.append(f"{launch.blocks} x {launch.shared / 1024:.0f} KiB, {reads}")
                launches.append([f"{vocab_size:,}", dtype, arch, *cells])
    times = []
    for line in predictions:
        us = line["microseconds"]
        key = f"{line['vocab_size']:,}", line["case"], line["dtype"]
        times.append((key, [f"{us['predicted']:.1f} ({max(us['bytes'], us['issue']):.1f})"]))
    a = "Registers / spills / instructions"
    b = "Instructions per logit on sm_90a, by pass and side"
    c = "Blocks of a row, shared memory of each, and how often a logit is read from global memory"
    d = "µs on an H100, and in parentheses the larger of bytes and issue, which it takes at least"
    return [
        table(a, ["dtype", "copied", *costs], needs),
        table(b, ["kernel", "pass", "plain", *SIDES], per_logit),
        table(c, ["V", "dtype", "for", *BY_ROWS], launches),
        table(d, ["V", "case", "dtype", *BY_ROWS], join_rows(times)),
    ]


def sources() -> list[Path]:
    """The files that the kernel is made of."""
    return sorted(
        [*(CSRC / "cuda").iterdir(), CSRC / "history.h", CSRC / "rows.h", CSRC / "semantics.h"]
    )


def main(argv: Sequence[str]) -> int:
    """Print and write the report; with ``--check``, print the broken rules and return 1 if any."""
    parser = argparse.ArgumentParser(description="What the CUDA kernel costs, predicted.")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a rule is broken")
    options = parser.parse_args(argv)
    with ThreadPoolExecutor(2) as pool:
        cubins = dict(zip(PROCESSORS, pool.map(compile_cubin, PROCESSORS), strict=True))
    costs = {arch: measure(cubin) for arch, cubin in cubins.items()}
    broken = [
        reason
        for arch, of_arch in costs.items()
        for kernel, cost in of_arch.items()
        for reason in broken_rules(kernel, arch, cost)
    ]
    if options.check:
        print("\n".join(broken) or "no rule is broken")
        return int(bool(broken))
    predictions = [
        predict(case, dtype, rows, vocab_size, costs["sm_90a"])
        for vocab_size in VOCAB_SIZES
        for case in CASES
        for dtype in ("float32", "bfloat16")
        for rows in ROWS
    ]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    lines = [
        {"arch": arch, **kernel._asdict(), **asdict(cost)}
        for arch, of_arch in costs.items()
        for kernel, cost in of_arch.items()
    ]
    results = {"costs": lines, "predictions": predictions}
    nvcc = "nvcc", re.findall(r"release ([\d.]+)", version.stdout)[0]
    report = tables(costs, predictions)
    publish("CUDA", argv, nvcc, sources(), __doc__ or "", report, results, broken)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
