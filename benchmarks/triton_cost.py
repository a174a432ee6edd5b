"""What the Triton kernel costs, read from its machine code: ``python -m benchmarks.triton_cost``.

The kernel is compiled ahead of time for every kind of call and several architectures. Triton's JIT
gets the very arguments that the wrapper launches with, so types, alignment and options are those of
a launch. Nothing runs on a device: all numbers are predicted, not measured. Triton 3.9 or newer is
needed, whose line information says where a function was inlined.

The loops over the row have the names in LOOPS; "mass 2" is the mass of the kept set, and where rows
may be split, "gather" is that of a part and "gather 2" that of a row which is not. An iteration
is all instructions from a loop's label to its last jump back, both sides of an ``if`` included; of
the loops in a lower bound, only "gather" has an ``if``. Instructions per logit are those of a
thread: a warp issues them for 32 logits at once. Those of "gather" are per token of the columns
that are read again.

The lower bound of a call's time is the largest of three times:

* bytes: ``rows * V * size * reads of memory / bandwidth``
* issue: ``n * V / 32 * (sum over the loops of reads * instructions per logit) / (4 * clock)``
* latency: ``n * V * size * (sum over the reads of latency) / in_flight``,
  ``in_flight = min(n, programs) * (num_stages - 1) * tile * size``

``n = ceil(rows / multiprocessors)`` rows are on the busiest multiprocessor, which runs as many
programs at once as its registers, threads and shared memory hold. Where rows are split, n is the
number of parts on it, and V in the last two formulas is the number of tokens of the largest part.
The bandwidth is that of the data sheet, and latencies were measured where nothing else ran;
``benchmarks/gpu_model.py`` has these numbers and their sources.

Reads of the row: greedy 1; unfiltered 2; top-p 2, with a nucleus that fits the candidates; top-k 1,
and the columns that are read again, at most k * 1.125 + 16 of those of a tile. For top-p, the
NUCLEUS * 1.125 + 16 columns are read from copies: they cost instructions, but no read of the row.
With top-k, lists of the kept set take no read; the raw list of 20 tokens and the rank of the drawn
one take 2, and at most 20 * 1.125 + 16 columns.

The first read of a row comes from memory, and so do later ones unless the L2 cache holds all rows
that run at a time; otherwise they have the latency of that cache and need no bandwidth of memory.
Launch, barriers, reductions, shared memory's latency, the filters of the candidates and the draw
are not in it.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import gpu_model, sass
from benchmarks.cost_report import BY_ROWS, DTYPES, ROWS, VOCAB_SIZES, join_rows, publish, table
from benchmarks.gpu_model import A100, H100, RTX_4090, Device
from benchmarks.sass import Code, Instruction, count_spills, run_tool
from benchmarks.timing import progress
from llm_sampling import SamplingParams, TokenHistory
from llm_sampling.backends import triton as wrapper
from llm_sampling.backends import triton_kernel, triton_rules
from llm_sampling.backends.base import make_results
from llm_sampling.calls import make_call

SOURCE = Path(triton_kernel.__file__)
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
#: AMD's other families, for which the kernels are compiled in one dtype and nothing is judged.
OTHERS = {
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
#: What a program may have of a multiprocessor's shared memory.
SHARED_KIB = dict(gpu_model.SHARED_KIB)
SHARED_KIB["gfx942"] = 64
KINDS = (
    "greedy",
    "unfiltered",
    "filtered",
    "filtered + history + advance",
    "greedy + history + advance",
    "unfiltered + history + advance",
    "filtered + history + text + window + record + advance",
    "filtered + history + text + window + scope + extra output",
    "filtered + history + text + rules + advance",
    "filtered + mask",
    "filtered + bias",
    "filtered + history + mask + bias + advance + raw logprobs",
    "filtered + processed logprobs",
    "filtered + raw logprobs",
    "filter-only",
    "filter-only + history + mask + bias",
    "greedy + split",
    "filtered + split",
    "filtered + history + advance + split",
    "filtered + history + text + window + scope + extra output + split",
    "filtered + history + text + rules + advance + split",
    "filtered + mask + split",
)
#: Calls that ask for more, which are shown in one dtype.
MORE_KINDS = (
    "filtered + processed logprobs + lists",
    "filtered + raw logprobs + lists",
    "filtered + kept ids",
    "filtered + kept mask",
)
#: What the floor is worked out for: cases and their kinds, sizes, and rows.
CASES = {"greedy": "greedy", "unfiltered": "unfiltered"}
CASES |= {"top-k 50": "filtered", "top-p 0.9": "filtered"}
#: The same for calls that ask for more, on the last device and in the last dtype of FLOORS alone,
#: and one vocabulary size.
TOP = 20
MORE_CASES = {
    f"top-k 50, {name}": kind
    for name, kind in zip(
        (f"top {TOP} processed", f"top {TOP} raw", "kept ids", "kept mask"), MORE_KINDS, strict=True
    )
}
#: Where, and for which dtypes.
FLOORS = ((A100, ("bfloat16",)), (RTX_4090, ("bfloat16",)), (H100, ("float32", "bfloat16")))
#: Of these, the cases whose rows are split where rows are few.
SPLIT_CASES = ("greedy", "top-k 50")

# Compiling


class Variant(NamedTuple):
    """A kind of call, and the shape that its launch is chosen for."""

    kind: str
    dtype: str
    vocab_size: int = 128256
    rows: int = 1
    stride: int | None = None  # from row to row, where that is not vocab_size
    processors: int = 132


def compile_launch(arch: str, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """What Triton compiles for ``arch`` where a kernel is launched with these arguments."""
    device = SimpleNamespace(get_current_device=lambda: arch, get_current_stream=lambda _: 0)
    device.get_current_target = lambda: (TARGETS | OTHERS)[arch]
    triton.runtime.driver.set_active(device)
    try:
        return kernel.run(*args, grid=(1,), warmup=True, **kwargs)
    finally:
        triton.runtime.driver.set_active(None)


def compile_variant(variant: Variant, arch: str) -> tuple[Any, wrapper.Launch]:
    """The kernel that the wrapper launches for such a call, and how."""
    kind, dtype, size, rows, stride, processors = variant
    parts = kind.split(" + ")
    params = SamplingParams(
        temperature=0.0 if kind.startswith("greedy") else 0.7,
        top_p=0.9 if kind.startswith("filter") else 1.0,
        repetition_penalty=1.1 if "history" in kind else 1.0,
        repetition_penalty_scope="output" if "scope" in kind else "all",
        penalty_last_n=64 if "window" in kind else -1,
        logit_bias={0: 1.0} if "bias" in kind else None,
        no_repeat_ngram_size=3 if "rules" in parts else 0,
        seed=0,
    )
    words = -(-size // 32)
    few = min(rows, 2)  # how many rows is in the launch alone, but for a single one
    history = None
    if "history" in kind:
        history = TokenHistory.from_ids(
            [[0]] * few,
            vocab_size=size,
            max_length=4096 if "text" in kind else None,
            penalty_last_n=64 if "window" in kind else None,
        )
    call = make_call(
        torch.zeros(few, stride or size, dtype=getattr(torch, dtype))[:, :size],
        params,
        history=history,
        allowed_mask=torch.zeros(few, words, dtype=torch.int32) if "mask" in parts else None,
        logprobs=[mode for mode in ("processed", "raw") if f"{mode} logprobs" in parts] or None,
        top_logprobs=TOP if "lists" in parts else None,
        logprob_token_ids=[0] * 5 if "named ids" in parts else None,
        kept=next((form for form in wrapper.KEPT_FORMS if f"kept {form}" in parts), None),
        check=False,
    )
    call = replace(
        call,
        advance="advance" in kind,
        record=torch.ones(few, dtype=torch.bool) if "record" in kind else None,
        extra_output=torch.zeros(few, 8, dtype=torch.int32) if "extra output" in kind else None,
    )
    extras = wrapper._has_extras(call, filter_only="filter-only" in kind)
    splits = "split" in kind
    launch = wrapper.choose_launch(
        size, rows, call.logits.dtype, extras=extras, splits=splits, processors=processors
    )
    if splits != (launch.parts > 1):
        raise ValueError(f"{variant}: {launch}")
    output, filtered = make_results(call), None
    if "filter-only" in kind:
        output, filtered = None, torch.zeros(few, size, dtype=torch.float32)
    with (
        mock.patch.object(triton_kernel, "sample_kernel") as kernel,
        mock.patch.object(triton_rules, "list_kernel"),
    ):
        config = wrapper._config(call, launch, filter_only=output is None)
        wrapper._start(call, launch, config, wrapper._memory(call, launch), output, filtered)
    args, kwargs = kernel.__getitem__.return_value.call_args
    return compile_launch(arch, triton_kernel.sample_kernel, *args, **kwargs), launch


# The loops over the row, in the kernel's file and in the machine code

#: Name: the statement, a call that none below has, and which field of Launch is its tokens.
LOOPS = {
    "maxima": ("for", "_processed_and_flags", "tile"),
    "kept": ("for", "_packed_words", "candidates"),
    "ranks": ("for", "_processed_codes", "candidates"),
    "search": ("for", "_packed_counts", "candidates"),
    "gather": ("while", "_append", "candidates"),
    "collect": ("for", "_append", "candidates"),
    "draw": ("while", "_mass", "candidates"),
    "mass": ("for", "_mass", "tile"),
    "raw": ("for", "tl.exp", "tile"),
    "write": ("for", "tl.div_rn", "tile"),
}


class Lines(NamedTuple):
    """Lines of the kernel's file: of the loops over the row, of loads of logits, of ``_mass``."""

    loops: dict[range, str]
    loads: set[int]
    mass: range


@functools.cache
def source() -> Lines:
    """The lines by which the machine code is read."""
    text = SOURCE.read_text(encoding="utf-8")
    loops, loads, mass = {}, set(), range(0)
    # a statement, its name and its body, also where it is in the body of another
    for match in re.finditer(r"^(?=( *)(for|while|def) .*\n((?:\1 .*\n|\n)+))", text, re.MULTILINE):
        _, word, body = match.groups()
        first = text.count("\n", 0, match.start()) + 1
        lines = range(first, first + 1 + body.count("\n"))
        if text.startswith("def _mass(", match.start()):
            mass = lines
        reads = "_processed" in body or "_loaded(" in body
        if word != "def" and reads and not re.search(r"^ *(for|while) ", body, re.MULTILINE):
            of_word = [(name, call) for name, (w, call, _) in LOOPS.items() if w == word]
            loops[lines] = next(
                (name for name, call in of_word if f"{call}(" in body), f"line {first}"
            )
    for match in re.finditer(r"tl\.load\(row\.logits", text):
        first = text.count("\n", 0, match.start()) + 1
        loads |= set(range(first, first + 4))  # the compiler may give it the next statement's line
    return Lines(loops, loads, mass)


@functools.cache
def row_loop(lines: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """The loop over the row that has these lines, and the lines of the calls that led there."""
    for depth, line in enumerate(lines):
        for body, name in source().loops.items():
            if line in body:
                return name, lines[depth + 1 :]
    return None


@dataclass(frozen=True)
class Loop:
    """A loop over the row, for a thread and an iteration."""

    tokens: int
    instructions: int
    logit_bytes: int
    narrowest_load: int
    spills: int
    fused: int  # multiply-adds of steps 9 and 10


def disassemble(cubin: bytes) -> Code:
    """The kernel's instructions and loops."""
    (code,) = sass.disassemble(cubin, lambda path: path.name == SOURCE.name).values()
    return code


def lines_of(instruction: Instruction) -> tuple[int, ...]:
    """Its lines of the kernel's file."""
    return tuple(line for _, line in instruction.lines)


def count_fused(code: Iterable[Instruction]) -> int:
    """How many instructions of ``_mass``, or of nobody knows what, multiply and add at once."""
    fused = [lines_of(i) for i in code if i.name in ("FFMA", "FFMA2")]
    return sum(not lines or lines[0] in source().mass for lines in fused)


def count_fma(ptx: str) -> int:
    """How many fma.rn.f32 a PTX text has."""
    return len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx))


def find_loops(
    code: list[Instruction], bodies: list[range], launch: wrapper.Launch, itemsize: int
) -> dict[str, Loop]:
    """The loops over the row."""
    found: dict[Any, tuple[list[Instruction], list[int]]] = {}
    for body in sorted(bodies, key=len, reverse=True):  # of two around each other, the inner one
        inside = [code[i] for i in body]
        where = Counter(row_loop(lines_of(i)) for i in inside).most_common(1)[0][0]
        own = [i for i in inside if row_loop(lines_of(i)) == where]
        loads = [i.loaded for i in own if i.loaded and i.lines and lines_of(i)[0] in source().loads]
        if where is not None and loads:
            found[where] = inside, loads
    if not found:
        raise ValueError("the machine code does not say which of it is a loop over the row")
    loops: dict[str, Loop] = {}
    for where in sorted(found):
        (inside, loads), name = found[where], where[0]
        tokens = getattr(launch, LOOPS[name][2]) // (32 * launch.num_warps)
        if sum(loads) != tokens * itemsize:
            raise ValueError(f"{name}: {tokens} tokens of {itemsize} bytes, but loads of {loads}")
        counts = count_spills(inside), count_fused(inside)
        loop = Loop(tokens, len(inside), sum(loads), min(loads), *counts)
        before = sum(other.split()[0] == name for other in loops)
        loops[f"{name} {before + 1}" if before else name] = loop
    return loops


# What a variant costs, and what it must not


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs; spills of AMD's are vector and scalar registers."""

    launch: wrapper.Launch
    registers: int
    spills: int
    scalar_spills: int
    shared: int
    instructions: int
    ptx_fma: int
    ptx_ftz: int
    loops: dict[str, Loop]

    def programs(self, device: Device) -> int:
        """How many a device's multiprocessor holds."""
        warps = self.launch.num_warps
        registers = -(-self.registers * 32 // 256) * 256 * warps  # a warp is given 256 at a time
        shared = device.shared_per_processor // (self.shared + 1024)
        # A multiprocessor holds half as many blocks as warps.
        return min(65536 // registers, device.warps // warps, device.warps // 2, shared)


def measure(variant: Variant, arch: str) -> Cost:
    """Compile a kind of call and read its cost."""
    compiled, launch = compile_variant(variant, arch)
    shared = compiled.metadata.shared
    if (TARGETS | OTHERS)[arch].backend == "hip":
        text = compiled.asm["amdgcn"]
        fields = dict(re.findall(r"^ +\.([vs]gpr\w+): +(\d+)$", text, re.MULTILINE))
        counts = [int(fields[f"{kind}_count"]) for kind in ("vgpr", "vgpr_spill", "sgpr_spill")]
        body = text[: text.index(".Lfunc_end0:")]
        instructions = len(re.findall(r"^\t[a-z]\w+", body, re.MULTILINE))
        return Cost(launch, *counts, shared, instructions, 0, 0, {})
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    code, bodies, _ = disassemble(cubin)
    usage = run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return Cost(
        launch=launch,
        registers=int(re.findall(r"\bREG:(\d+)", usage)[0]),
        spills=count_spills(code),
        scalar_spills=0,
        shared=shared,
        instructions=len(code),
        ptx_fma=count_fma(ptx),
        ptx_ftz=len(re.findall(r"\.ftz\b", ptx)),
        loops=find_loops(code, bodies, launch, DTYPES[variant.dtype]),
    )


def measure_all(jobs: Sequence[tuple[Variant, str]]) -> list[Cost]:
    """The costs of these, with two compilers at a time."""
    costs = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for number, cost in enumerate(pool.map(measure, *zip(*jobs, strict=True))):
            progress(f"{number + 1} of {len(jobs)}: {jobs[number]}")
            costs.append(cost)
    return costs


def broken_rules(variant: Variant, arch: str, cost: Cost) -> list[str]:
    """What is not as it must be, in words."""
    broken = []
    has_logprobs = "logprobs" in variant.kind
    if arch == "sm_90" and cost.spills:
        broken.append(f"{cost.spills} loads and stores of spilled registers")
    if cost.shared > SHARED_KIB[arch] * 1024:
        broken.append(f"{cost.shared} bytes of shared memory, more than {SHARED_KIB[arch]} KiB")
    if cost.ptx_fma and not has_logprobs and "history" not in variant.kind:
        broken.append(f"{cost.ptx_fma} fma.rn.f32 in the PTX")
    if cost.ptx_ftz and not has_logprobs:
        broken.append(f"{cost.ptx_ftz} instructions of the PTX flush denormals")
    for name, loop in cost.loops.items():
        if loop.fused:
            broken.append(f"{name}: {loop.fused} fused multiply-adds in steps 9 and 10")
        # gather reads single tokens; a loop over few tokens may have fewer bytes for a thread
        by_candidates = LOOPS[name.split()[0]][2] == "candidates"
        wanted = min(16, loop.logit_bytes) if by_candidates else 16
        if not name.startswith("gather") and loop.narrowest_load < wanted:
            broken.append(f"{name}: logits are loaded {loop.narrowest_load} bytes at a time")
    return [f"{variant.kind}, {variant.dtype}, {arch}: {reason}" for reason in broken]


def variant_of_case(case: str, dtype: str, vocab_size: int, rows: int, device: Device) -> Variant:
    """What the wrapper launches for such a case."""
    kind, processors = (CASES | MORE_CASES)[case], device.processors
    launch = wrapper.choose_launch(
        vocab_size,
        rows,
        getattr(torch, dtype),
        extras=" + " in kind,
        splits=kind != "unfiltered" and "raw" not in kind,
        processors=processors,
    )
    kind += " + split" * (launch.parts > 1)
    return Variant(kind, dtype, vocab_size, rows, processors=processors)


def floor(case: str, variant: Variant, device: Device, cost: Cost) -> dict[str, Any]:
    """The least time of a call, by the formula at the top of this file."""
    launch, loops, itemsize = cost.launch, cost.loops, DTYPES[variant.dtype]
    params, _, more = case.partition(", ")
    parts = launch.parts if params in SPLIT_CASES else 1
    tiles = -(-variant.vocab_size // launch.tile)
    of_program = min(-(-tiles // parts) * launch.tile, variant.vocab_size)
    again = {"top-k 50": 50, "top-p 0.9": launch.nucleus}
    reads = {"maxima": 1.0}
    if params in ("unfiltered", "top-p 0.9"):
        reads["mass"] = 1.0
    if "raw" in more:
        reads |= {"raw": 1.0, "ranks": 1.0}
    of_row = sum(reads.values())
    if params in again:
        # the second loop is that of a row which is not split, in a kernel that can split rows
        gather = "gather 2" if launch.parts > parts else "gather"
        reads[gather] = (again[params] * 1.125 + 16) / launch.tile
    if params == "top-k 50":
        of_row += reads["gather"]
    if "raw" in more:
        reads["gather 2"] = (TOP * 1.125 + 16) / launch.tile
        of_row += reads["gather 2"]
    programs = cost.programs(device)
    busiest = -(-variant.rows * parts // device.processors)
    at_once = min(variant.rows, max(1, programs * device.processors // parts))
    row_bytes = variant.vocab_size * itemsize
    of_memory = 1.0 if at_once * row_bytes <= device.l2_mib * 2**20 else of_row
    waits = of_memory * device.memory_cycles + (of_row - of_memory) * device.l2_cycles
    in_flight = min(busiest, programs) * (launch.num_stages - 1) * launch.tile * itemsize
    instructions = sum(
        n * loops[name].instructions / loops[name].tokens for name, n in reads.items()
    )
    microseconds = {
        "bytes": variant.rows * row_bytes * of_memory / device.bytes_per_us,
        "issue": busiest * of_program / 32 * instructions / (4 * device.megahertz),
        "latency": busiest * of_program * itemsize * waits / in_flight / device.megahertz,
    }
    limit = max(microseconds, key=lambda name: microseconds[name])
    found = {"device": device.name, "case": case, **variant._asdict()}
    found |= {"reads": of_row, "programs": programs}
    rounded = {name: round(value, 2) for name, value in microseconds.items()}
    return {**found, "limit": limit, "microseconds": rounded}


# The report


def tables(
    costs: Sequence[tuple[Variant, str, Cost]], floors: Sequence[dict[str, Any]]
) -> list[str]:
    """What the kernels need, their instructions, and lower bounds of their times."""
    needs: list[Any] = []
    others: list[Any] = []
    instructions: list[Any] = []
    bounds: dict[str, list[Any]] = {}
    seen = {name for _, _, cost in costs for name in cost.loops}
    first = "maxima", "mass", "gather"
    names = [
        name
        for loop in [*first, *(name for name in LOOPS if name not in first)]
        for name in sorted(name for name in seen if name.split()[0] == loop)
    ]
    for variant, arch, cost in costs:
        key = variant.kind, variant.dtype
        is_amd = arch.startswith("gfx")
        spills = f"{cost.spills} + {cost.scalar_spills}" if is_amd else cost.spills
        need = f"{cost.registers} / {spills} / {cost.shared:,} / {cost.instructions:,}"
        (needs if arch in TARGETS else others).append((key, [need]))
        if arch == "sm_90":
            per_logit = {n: f"{x.instructions / x.tokens:.1f}" for n, x in cost.loops.items()}
            sizes = {f"{loop.logit_bytes / loop.tokens:g}" for loop in cost.loops.values()}
            instructions.append((key, [*(per_logit.get(n, "") for n in names), " ".join(sizes)]))
    for line in floors:
        key = f"{line['vocab_size']:,}", line["case"], line["dtype"], f"{line['reads']:.3g}"
        cell = f"{line['microseconds'][line['limit']]:.1f} {line['limit']}"
        bounds.setdefault(line["device"], []).append((key, [cell]))
    a = "Registers / spills (gfx942: vector + scalar) / shared bytes / instructions"
    c = "The same for more of AMD's families, in bfloat16"
    b = "Instructions per logit on sm_90, and bytes of logits per logit"
    return [
        table(a, ["call", "dtype", *TARGETS], join_rows(needs)),
        table(c, ["call", "dtype", *OTHERS], join_rows(others)),
        table(b, ["call", "dtype", *names, "bytes"], join_rows(instructions)),
        *(
            table(
                f"Lower bounds in µs on {name}, and which of the three times it is",
                ["V", "case", "dtype", "reads", *BY_ROWS],
                join_rows(cells),
            )
            for name, cells in bounds.items()
        ),
    ]


def main(argv: Sequence[str]) -> int:
    """Print and write the report; or, with ``--check``, what is broken, and exit with 1 then."""
    parser = argparse.ArgumentParser(description="What the Triton kernel costs, predicted.")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a rule is broken")
    parser.add_argument("--quick", action="store_true", help="little of it; writes nothing")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    dtypes, kinds, sizes = DTYPES, KINDS, VOCAB_SIZES
    if options.quick:
        dtypes, kinds, sizes = ("bfloat16",), KINDS[:4], (128256,)
    jobs = [
        (Variant(kind, dtype), arch)
        for dtype in dtypes
        # float16 differs from bfloat16 in how a logit is widened alone
        for kind in (kinds[:4] if dtype == "float16" else kinds)
        for arch in TARGETS
    ]
    jobs += [(Variant(kind, "bfloat16"), arch) for kind in kinds[:6] for arch in OTHERS]
    if not options.quick:
        jobs += [(Variant(kind, "bfloat16"), arch) for kind in MORE_KINDS for arch in TARGETS]
    costs = [(*job, cost) for job, cost in zip(jobs, measure_all(jobs), strict=True)]
    judged = [cost for cost in costs if cost[1] in TARGETS]
    broken = [reason for cost in judged for reason in broken_rules(*cost)]
    if options.check:
        print("\n".join(broken) or "no rule is broken")
        return int(bool(broken))

    cases = [
        (case, variant_of_case(case, dtype, size, rows, device), device)
        for device, of_device in FLOORS
        for size in sizes
        for case in CASES
        for dtype in of_device
        for rows in ROWS
    ]
    if not options.quick:
        device, (*_, dtype) = FLOORS[-1]
        cases += [
            (case, variant_of_case(case, dtype, 128256, rows, device), device)
            for case in MORE_CASES
            for rows in ROWS
        ]
    found = measure_all([(variant, device.arch) for _, variant, device in cases])
    floors = [floor(*case, cost) for case, cost in zip(cases, found, strict=True)]
    lines = [{**variant._asdict(), "arch": arch, **asdict(cost)} for variant, arch, cost in costs]
    publish(
        "Triton",
        argv,
        ("triton", triton.__version__),
        [SOURCE],
        __doc__ or "",
        tables(costs, floors),
        {"costs": lines, "floors": floors},
        broken,
        to_files=not options.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
