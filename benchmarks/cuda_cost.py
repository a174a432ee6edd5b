"""What the CUDA kernel costs, read from its machine code: ``python -m benchmarks.cuda_cost``.

nvcc compiles csrc/cuda/sample.cu for every architecture that setup.py builds. Nothing runs on a
device: all numbers are predicted, not measured.

A pass is a loop over a thread's vecs, of eight tokens each. The instructions of a pass are those
whose line information leads back to that loop; the table divides them by eight, for one logit.
What only some rows execute is counted apart, as a side of the pass: vecs that reach beyond the row,
bias, mask, history. Code that the compiler has duplicated counts twice. A warp issues each
instruction once for its 32 threads. The code that a case executes is all but the functions, passes
and sides that it does not need, and the detours of diverged warps.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import gpu_model, sass
from benchmarks.cost_report import BY_ROWS, DTYPES, ROWS, VOCAB_SIZES, join_rows, publish, table
from benchmarks.gpu_model import (
    B200,
    CASES,
    DEVICES,
    H100,
    LINES_AHEAD,
    LOWER,
    PROCESSORS,
    SHARED_KIB,
    AloneChain,
    Call,
    Case,
    Chain,
    Cost,
    Device,
    Launch,
    Mix,
    SplitChain,
    Touched,
)
from benchmarks.timing import ROOT

CSRC = ROOT / "csrc"
SOURCE = CSRC / "cuda" / "sample.cu"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo"]

# Compiling


class Kernel(NamedTuple):
    """An instance of a kernel.

    It has a dtype, and parts of rows that are copied or not; is for rows that are split or not, and
    then for plain calls alone or not; and returns lists, ranks and kept sets or not.
    """

    dtype: str
    copied: bool
    is_split: bool = False
    is_plain: bool = False
    has_more: bool = False

    def __str__(self) -> str:
        """For a table."""
        kind = ", split" if self.is_split else ", copied" if self.copied else ""
        calls = ", plain" if self.is_plain else ", lists" if self.has_more else ""
        return f"{self.dtype}{kind}{calls}"


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


#: The mangled names of the kernels.
KERNELS = r"(sample|split)_kernelILi(\d)ELb(\d)ELb(\d)E"


def kernel_of(name: str) -> Kernel:
    """The kernel that has this mangled name."""
    kind, number, flag, more = re.search(KERNELS, name).groups()  # type: ignore[union-attr]
    dtype = list(DTYPES)[int(number)]
    if kind == "sample":
        return Kernel(dtype, copied=flag == "1", has_more=more == "1")
    return Kernel(dtype, True, is_split=True, is_plain=flag == "1", has_more=more == "1")


class Usage(NamedTuple):
    """Registers of a thread, and bytes of its stack."""

    registers: int
    stack: int


def usages(cubin: bytes) -> dict[Kernel, Usage]:
    """What cuobjdump reports for each kernel."""
    text = sass.run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.findall(r"Function (\S*_kernelILi\S*):\s*REG:(\d+) STACK:(\d+)", text)
    return {kernel_of(name): Usage(int(reg), int(stack)) for name, reg, stack in found}


@functools.cache
def _launch_library() -> ctypes.CDLL:
    """launch.cuh as a library: it needs no CUDA."""
    code = f"""
#include "{CSRC}/cuda/launch.cuh"
extern "C" void choose(const int* of, int* to) {{
  const llm_sampling::Device device{{of[3], of[4], of[5]}};
  const auto launch = llm_sampling::choose_launch(of[0], of[1], of[2], of[6] != 0, device);
  to[0] = launch.blocks, to[1] = launch.copied, to[2] = launch.vecs, to[3] = launch.shared_bytes;
  to[4] = llm_sampling::kThreads, to[5] = launch.is_split;
}}"""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "launch.so")
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True)
        return ctypes.CDLL(str(library))


def choose_launch(
    rows: int, vocab_size: int, itemsize: int, arch: str, *, has_workspace: bool = True
) -> Launch:
    """The launch on the largest device of this architecture."""
    most_blocks = 8 if int(re.findall(r"\d+", arch)[0]) >= 90 else 1
    device = PROCESSORS[arch], SHARED_KIB[arch] * 1024, most_blocks
    to = (ctypes.c_int * 6)()
    of = (ctypes.c_int * 7)(rows, vocab_size, itemsize, *device, has_workspace)
    _launch_library().choose(of, to)
    blocks, copied, vecs, shared, threads, is_split = to
    joined: Literal["cluster", "last block"] = "last block" if is_split else "cluster"
    return Launch(blocks, bool(copied), vecs, shared, threads, joined)


# The passes, in the source and in the machine code

#: For each pass: a method of RowSampler, the statement in it that is or calls the loop, and an
#: instruction that one iteration has once. If the loop is unrolled or duplicated there are more of
#: them, which tells how many iterations the code has. An instruction belongs to the first of these
#: passes whose loop it is in.
PASSES = {
    "copy": ("copy_logits", "for (int local", "LDGSTS"),
    "bits": (
        "copy_bits",
        "for (int i = thread; i < words; i += kThreads) {\n        copy.marked[i] = row_.seen",
        "POPC",
    ),
    "places": (
        "copy_bits",
        "for (int i = thread; i < words; i += kThreads) {\n      copy.places",
        "",
    ),
    "other maxima": ("find_maxima", "any_nan |= find_tile_maxima<false>", ""),
    "maxima": ("find_tile_maxima", "for (int round", "REDUX"),
    "score": ("score", "for (int i = static_cast<int>(threadIdx.x); i < count", ""),
    "first": ("find_first", "over_tiles(", ""),
    "collect": ("over_codes", "over_tiles(", ""),
    "lists": ("gather", "for (int i = 2 *", "LDS"),
    "compare": ("compare_all", "for (int i = part", "LDS"),
    "search": ("search", "over_tiles(", ""),
    "weigh": ("weigh", "over_vecs(", ""),
    "raw": ("find_raw_sum", "for (int round", ""),
    "filtered": ("write_filtered", "over_vecs(", ""),
}
#: The statement by which a block of a split row samples it alone.
ALONE = "alone.run(std::bool_constant<kMore>());"
#: The statements that write lists: of the kept set, and of the raw logits.
LISTS = {
    "processed lists": "  if (wants_processed(args_)) {",
    "raw lists": "    if (wants_raw(args_)) {",
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
    "listed": [
        ("copy.cuh", "  if (row_.has_list) {\n    const Bits own"),
        ("copy.cuh", "  const RowList list = row_list("),
        ("overrides.cuh", "  if (row_.seen.words == nullptr) return false;"),
    ],
    "hit": [
        ("candidates.cuh", "    if (wanted == 0 || load_relaxed("),
        ("candidates.cuh", "  const unsigned place = atomicAdd(&shared_.appended"),
    ],
    "logprob": [
        ("draw.cuh", "  if (args_.processed.logprobs != nullptr) {\n    const float share"),
        ("draw.cuh", "  if (args_.raw.logprobs != nullptr) {\n    const float x"),
    ],
    "one token": [("draw.cuh", "  if (is_empty || is_greedy) {\n")],
    "all": [("passes.cuh", "    if (all) {\n")],
    "kept": [
        (
            "passes.cuh",
            "    } else {\n#pragma unroll\n      for (int i = 0; i < kVec; ++i) sum +=",
        )
    ],
}


class Place(NamedTuple):
    """A range of lines of a file."""

    file: str
    lines: range

    def has(self, chain: Iterable[tuple[str, int]]) -> bool:
        """Whether one of these lines is in it."""
        return any(file == self.file and line in self.lines for file, line in chain)


class Source(NamedTuple):
    """Where RowSampler's functions, the loops of the passes and their sides are in the source."""

    functions: dict[str, list[Place]]
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
    """The places by which instructions are assigned to functions, passes and sides."""
    texts = {path.name: path.read_text() for path in sources()}
    functions: dict[str, list[Place]] = {}
    for file, text in texts.items():
        for definition in re.finditer(r"RowSampler<kDtype, kLayout, kMore>::(\w+)\(", text):
            first = text.count("\n", 0, definition.start()) + 1
            last = text.count("\n", 0, text.index("\n}", definition.start())) + 2
            functions.setdefault(definition[1], []).append(Place(file, range(first, last + 1)))
    passes = {}
    for name, (function, statement, _) in PASSES.items():
        ((file, start),) = (
            (file, text.index(statement, definition.start()))
            for file, text in texts.items()
            for definition in re.finditer(
                rf"RowSampler<kDtype, kLayout, kMore>::{function}\(", text
            )
        )
        passes[name] = Place(file, block_at(texts[file], start))
    sides = {
        kind: [Place(file, block_at(texts[file], texts[file].index(text))) for file, text in places]
        for kind, places in SIDES.items()
    }
    # What a block of a split row executes that must sample the row alone.
    start = texts[SOURCE.name].index(ALONE)
    line = texts[SOURCE.name].count("\n", 0, start) + 1
    functions["alone"] = [Place(SOURCE.name, range(line, line + 1))]
    results = texts["results.cuh"]
    for name, statement in LISTS.items():
        functions[name] = [Place("results.cuh", block_at(results, results.index(statement)))]
    return Source(functions, passes, sides)


@functools.cache
def side_of(chain: tuple[tuple[str, int], ...]) -> str:
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


@functools.cache
def pass_of(chain: tuple[tuple[str, int], ...]) -> str | None:
    """The pass that an instruction belongs to."""
    return next((name for name, place in source().passes.items() if place.has(chain)), None)


@functools.cache
def functions_of(chain: tuple[tuple[str, int], ...]) -> frozenset[str]:
    """The functions of RowSampler that an instruction belongs to."""
    found = source().functions.items()
    return frozenset(name for name, places in found if any(place.has(chain) for place in places))


def left_out(case: Case, *, copied: bool) -> set[str]:
    """The functions of RowSampler, passes and sides that a case does not execute."""
    names = {"detour", "edge", "bias", "mask", "listed", "alone", "logprob", "find_parameters"}
    names.add("maxima" if case.history and not copied else "other maxima")
    names |= {"write_nothing", "write_filtered", "find_raw_sum", "raw_logit", "copy_edge"}
    names |= {"find_sharing_row", "find_leaving_id", "advance", "record"}
    names |= {"list_overrides", "override_counts", "times_of", "is_seen"}
    names |= {"survey", "narrow", "count_reaching", "list_raw", "write_no_more"}
    names |= {"write_mask"} if case.kept != "mask" else set()
    names |= {"raw lists"} if not case.is_raw else {"processed lists"}
    names |= {"write_more"} if not case.has_more else set()
    if case.is_raw:
        names -= {"find_raw_sum", "raw_logit"}
    draws_candidates = bool(case.candidates) and not case.searches
    return names.union(
        {"find_kept", "find_listed", "gather"} if case.is_greedy else {"find_first", "one token"},
        {"find_thresholds"} if not case.candidates else (),
        {"weigh"} if not case.weighs and not case.searches else (),
        {"all"} if not case.weighs else (),
        {"search", "kept"} if not case.searches else (),
        {"code_at_depth", "key_at_depth"} if not case.has_depth_cut else (),
        {"draw_from_candidates"} if not draws_candidates else (),
        {"draw_from_tiles"} if draws_candidates or case.is_greedy else (),
        {"copy_bits", "score", "history", "seen", "unscored"} if not case.history else (),
    )


def touch(code: Sequence[set[str]], case: Case, *, copied: bool) -> Touched:
    """The code that a case executes; ``code`` has the functions, pass and side of instructions.

    A gap that is shorter than what is read ahead counts as executed.
    """
    names = left_out(case, copied=copied)
    lines = sorted({place // 8 for place, parts in enumerate(code) if not parts & names})
    if not lines:
        return Touched(0, 0)
    gaps = [b - a - 1 for a, b in itertools.pairwise(lines)]
    bridged = sum(gap for gap in gaps if gap <= LINES_AHEAD)
    return Touched(len(lines) + bridged, 1 + sum(gap > LINES_AHEAD for gap in gaps))


# What a kernel costs, and what it must not cost


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


def lines_of(code: Iterable[sass.Instruction]) -> Iterator[tuple[tuple[str, int], ...]]:
    """The lines of each instruction, up to the kernel.

    Where they do not lead to the kernel, nothing says from which call they are: the instruction is
    assigned to what the one before it belongs to.
    """
    lines: tuple[tuple[str, int], ...] = ()
    for instruction in code:
        if instruction.lines and instruction.lines[-1][0] == SOURCE.name:
            lines = instruction.lines
        yield lines


def measure(cubin: bytes, arch: str) -> dict[Kernel, Cost]:
    """The cost of each kernel, for this architecture."""
    found = usages(cubin)
    costs = {}
    files = {path.name for path in sources()}
    for name, (code, _, detours) in sass.disassemble(cubin, lambda p: p.name in files).items():
        kernel = kernel_of(name)
        skipped = {place for detour in detours for place in detour}
        passes: dict[str, dict[str, Counter[str]]] = {}
        loads: dict[str, Counter[int]] = {}
        parts: list[set[str]] = []
        for place, (instruction, lines) in enumerate(zip(code, lines_of(code), strict=True)):
            where, side, functions = pass_of(lines), side_of(lines), functions_of(lines)
            parts.append({where or "", side, *functions})
            if {"find_listed", "narrow"} <= functions:
                parts[-1].add("search")  # the part's list is what was guessed
                where = None
            if "write_more" in functions:
                where = None  # its passes are other copies of those that come before it
            # Only the code that samples a row alone weighs; what a mass takes is read there.
            is_alone = kernel.is_split and "alone" in parts[-1]
            if place in skipped:
                parts[-1].add("detour")
            elif where is not None and (where == "weigh" or not is_alone):
                passes.setdefault(where, {}).setdefault(side, Counter())[instruction.name] += 1
                if side == "plain" and instruction.loaded and not is_alone:
                    loads.setdefault(where, Counter())[instruction.loaded] += 1
        if kernel.is_split and len(code) < 64:
            continue  # empty, as there are clusters
        costs[kernel] = Cost(
            registers=found[kernel].registers,
            spills=sass.count_spills(code),
            instructions=len(code),
            fused=count_fused(code),
            loads={name: dict(sizes) for name, sizes in loads.items()},
            passes={
                name: {
                    side: Mix.of(names, arch).times(1 / copies_of(kernel, name, sides))
                    for side, names in sides.items()
                }
                for name, sides in passes.items()
            },
            touched={case.name: touch(parts, case, copied=kernel.copied) for case in CASES},
        )
    return costs


def copies_of(kernel: Kernel, name: str, sides: dict[str, Counter[str]]) -> float:
    """How many iterations the code of a loop has; 1 where it is not unrolled."""
    once = PASSES[name][2]
    if not once:
        return 1
    of_one = {"copy": DTYPES[kernel.dtype] // 2, "compare": 2, "lists": 2}.get(name, 1)
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
        # A load of a vec at the row's end may have the line number of the wide loads, in each copy
        # of them.
        narrow = sum(loads.values())
        if (wide > 0) != (name == "copy" or not kernel.copied) or narrow > max(wide, 1):
            broken.append(
                f"{name}: logits are loaded {sorted(loads)} bytes at a time, {wide} times 16"
            )
    for vocab_size in (1000, *VOCAB_SIZES, 2**20):
        for rows in ROWS:
            shared = choose_launch(rows, vocab_size, DTYPES[kernel.dtype], arch).shared
            if shared > SHARED_KIB[arch] * 1024:
                broken.append(f"{shared} bytes of shared memory, more than {SHARED_KIB[arch]} KiB")
    return [f"{kernel}, {arch}: {reason}" for reason in broken]


# How long a call takes


def predict(
    case: Case,
    dtype: str,
    rows: int,
    vocab_size: int,
    device: Device,
    costs: Mapping[Kernel, Cost],
) -> dict[str, Any]:
    """The range of a call's time, by the assumptions of benchmarks/gpu_model.py.

    Args:
        case: what its parameters are.
        dtype: of the logits.
        rows: how many.
        vocab_size: tokens of a row.
        device: where it runs.
        costs: of the kernels for that device's architecture.
    """
    itemsize = DTYPES[dtype]
    launch = choose_launch(rows, vocab_size, itemsize, device.arch)
    is_split = launch.joined == "last block"
    chain_of: type[Chain] = Chain
    if is_split and case.is_raw:
        launch = choose_launch(rows, vocab_size, itemsize, device.arch, has_workspace=False)
        is_split = False
    elif is_split and (case.weighs or case.searches):
        chain_of = type("AfterParts", (AloneChain,), {"parts": launch.blocks})
        launch = choose_launch(rows, vocab_size, itemsize, device.arch, has_workspace=False)
        is_split = False
    elif is_split:
        chain_of = SplitChain
    is_plain = is_split and case.history == 0 and not case.has_more
    cost = costs[Kernel(dtype, launch.copied, is_split, is_plain, case.has_more)]
    call = Call(case, cost, launch, device, LOWER, rows, vocab_size, itemsize)
    return {"dtype": dtype, **gpu_model.predict(call, chain_of)}


# The report


class Measured(NamedTuple):
    """A published time of another project's kernel, for logits of float32."""

    kernel: str
    url: str
    device: str
    rows: int
    vocab_size: int
    microseconds: str


#: Kernels that select the largest k of each row and, but for the last, draw nothing. SGLang's are
#: timed in a CUDA graph with the L2 cache flushed; no page says that the code was cold.
MEASURED = (
    *(
        Measured("SGLang, top-k v2", "https://github.com/sgl-project/sglang/pull/33237", *of)
        for of in (
            ("B200", 4, 65536, "11.0 to 11.3"),
            ("B200", 8, 65536, "11.0 to 11.4"),
            ("B200", 16, 65536, "16.7"),
        )
    ),
    *(
        Measured("TokenSpeed, top-k", "https://github.com/lightseekorg/tokenspeed/pull/1366", *of)
        for of in (
            ("B200", 1, 65536, "8.9"),
            ("B200", 8, 65536, "9.1"),
            ("B200", 1, 131072, "9.9"),
        )
    ),
    *(
        Measured("FlashInfer, gvr_2", "https://github.com/flashinfer-ai/flashinfer/pull/5312", *of)
        for of in (
            ("B300", 1, 65536, "6.1"),
            ("B300", 16, 65536, "7.1"),
            ("B300", 64, 65536, "7.9"),
        )
    ),
    Measured(
        "FlashInfer, top-k sampling",
        "https://github.com/flashinfer-ai/flashinfer/pull/2945",
        *("B200", 1, 128512, "170.0"),
    ),
)


def compare(costs: Mapping[Kernel, Cost]) -> list[dict[str, Any]]:
    """The published times, with what is predicted for top-k 50 of the same logits on a B200."""
    (case,) = (case for case in CASES if case.name == "top-k 50")
    return [
        {**line._asdict(), "predicted": predict(case, "float32", *line[3:5], B200, costs)}
        for line in MEASURED
    ]


def tables(
    costs: dict[str, dict[Kernel, Cost]],
    predictions: Sequence[dict[str, Any]],
    compared: Sequence[dict[str, Any]],
) -> list[str]:
    """The tables of the report: times, what kernels need, instructions, launches."""
    kernels = sorted(costs["sm_90"])
    needs = []
    for kernel in sorted(costs["sm_80"]):
        found = [costs[arch].get(kernel) for arch in costs]
        cells = [f"{c.registers} / {c.spills} / {c.instructions:,}" if c else "" for c in found]
        needs.append([str(kernel), *cells])
    per_logit = []
    for kernel in kernels:
        for name, sides in costs["sm_90"][kernel].passes.items():
            if name not in ("compare", "bits", "places", "score"):
                cells = [f"{sides[s].all / 8:.1f}" if s in sides else "" for s in ("plain", *SIDES)]
                per_logit.append([str(kernel), name, *cells])
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
                    reads += ", split" if launch.joined == "last block" else ""
                    cells.append(f"{launch.blocks} x {launch.shared / 1024:.0f} KiB, {reads}")
                launches.append([f"{vocab_size:,}", dtype, arch, *cells])
    times = [
        table(
            f"µs on {device.name}, and in parentheses what it takes at least",
            ["V", "case", "dtype", *BY_ROWS],
            join_rows(
                ((f"{line['vocab_size']:,}", line["case"], line["dtype"]), [cell_of(line)])
                for line in predictions
                if line["device"] == device.name
            ),
        )
        for device in DEVICES
    ]
    beside = [
        [
            f"[{line['kernel']}]({line['url']})",
            f"{line['device']}, {line['rows']} x {line['vocab_size']:,}",
            line["microseconds"],
            cell_of(line["predicted"]),
        ]
        for line in compared
    ]
    z = "Kernels that others have measured, and top-k 50 of the same logits on a B200, in µs"
    devices = [
        [
            device.name,
            device.arch,
            f"{device.processors} in {len(device.gpcs)}",
            f"{device.megahertz:,}",
            f"{device.bytes_per_us / 1e6:g}",
            f"{device.l2_mib:g}",
            f"{device.l2_cycles} / {device.memory_cycles}",
        ]
        for device in DEVICES
    ]
    of_device = ["multiprocessors in GPCs", "MHz", "TB/s", "L2, MiB", "cycles of L2 / memory"]
    a = "Registers / spills / instructions"
    b = "Instructions per logit on sm_90, by pass and side"
    c = "Code that a case executes on sm_90, in KiB, and in how many runs of addresses"
    d = "Blocks of a row, shared memory of each, and how often a logit is read from global memory"
    cold = []
    for case in CASES:
        found = [costs["sm_90"][kernel].touched[case.name] for kernel in kernels]
        cold.append([case.name, "", *(f"{t.lines / 8:.0f} in {t.runs}" for t in found)])
    header = [str(kernel) for kernel in kernels]
    return [
        table("Devices", ["device", "for", *of_device], devices, origin=""),
        *times,
        table(z, ["kernel", "of float32", "measured", "predicted"], beside, origin=""),
        table(a, ["kernel", *costs], needs),
        table(b, ["kernel", "pass", "plain", *SIDES], per_logit),
        table(c, ["case", "", *header], cold),
        table(d, ["V", "dtype", "for", *BY_ROWS], launches),
    ]


def cell_of(line: dict[str, Any]) -> str:
    """A prediction as the tables show it."""
    us = line["microseconds"]
    lower, upper = us["predicted"]
    return f"{lower:.1f} to {upper:.1f} ({max(us['bytes'], us['issue']):.1f})"


def sources() -> list[Path]:
    """The files that the kernel is made of."""
    names = ("history.h", "rows.h", "semantics.h", "sequence_rules.h")
    return sorted([*(CSRC / "cuda").iterdir(), *(CSRC / name for name in names)])


def main(argv: Sequence[str]) -> int:
    """Print and write the report; with ``--check``, print the broken rules and return 1 if any."""
    parser = argparse.ArgumentParser(description="What the CUDA kernel costs, predicted.")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a rule is broken")
    options = parser.parse_args(argv)
    with ThreadPoolExecutor(2) as pool:
        cubins = dict(zip(PROCESSORS, pool.map(compile_cubin, PROCESSORS), strict=True))
    costs = {arch: measure(cubin, arch) for arch, cubin in cubins.items()}
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
        predict(case, dtype, rows, vocab_size, device, costs[device.arch])
        for device in DEVICES
        for vocab_size in VOCAB_SIZES
        for case in CASES
        for dtype in (("float32", "bfloat16") if device is H100 else ("bfloat16",))
        for rows in ROWS
    ]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    lines = [
        {"arch": arch, **kernel._asdict(), **asdict(cost)}
        for arch, of_arch in costs.items()
        for kernel, cost in of_arch.items()
    ]
    compared = compare(costs["sm_100"])
    results = {"costs": lines, "predictions": predictions, "compared": compared}
    nvcc = "nvcc", re.findall(r"release ([\d.]+)", version.stdout)[0]
    report = tables(costs, predictions, compared)
    method = (
        f"{__doc__}\n## How a time is predicted\n{(gpu_model.__doc__ or '').partition(chr(10))[2]}"
    )
    publish("CUDA", argv, nvcc, sources(), method, report, results, broken)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
