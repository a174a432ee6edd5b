"""How long a call of the CUDA kernel takes: devices, assumptions, and the chain of a row's steps.

DEVICES in benchmarks/gpu_model.py has the sources of the devices' numbers.

A time is a range. It is that of one row's blocks, from their first read to their end, times the
number of times that blocks run one after another, ``ceil(rows / rows at a time)``. A call takes at
least the time of either of these, the larger of which the tables have in parentheses:

* bytes: all logits once, and the bits of the history, at the bandwidth of the data sheet;
* issue: the instructions of all passes on the busiest multiprocessor. A scheduler issues one
  instruction per cycle, but a comparison, selection, integer addition, shift or logic operation
  only every second cycle, and an integer multiplication likewise; on an A100 also an addition or
  multiplication of floats ([throughput of instructions][throughput]).

The two ends of a range differ in three assumptions:

* Bandwidth: that of the data sheet at the lower end, 90 % of it at the upper one. 90 to 91 % were
  measured on an [RTX 4090][4090] and 90 % on a [GH200][gh200].
* A read of memory that depends on the one before it: the device's [measured latency][latency] at
  the lower end; 0.7 µs at the upper one, for a read under load whose address is not translated yet,
  which is an assumption.
* The code of the kernel: in the instruction caches at the lower end; in none of them at the upper
  one, as after a model's own kernels.

Cold code costs most where rows are few, and it is the least certain part of the upper end. What a
case executes is counted in the machine code, in lines of 128 bytes, together with gaps of up to 16
lines, which a prefetcher reads as well. Each line is read once for all rows, from the L2 cache.
Where addresses go on, 16 lines are on the way at a time, which is how [Huerta et al.][huerta]
explain their measurements of an Ampere GPU; where they do not, the next line takes the whole
latency of the L2 cache. Nothing else goes on meanwhile. That it is read once assumes caches like
those that [a study of an RTX 5090][icache] found: 64 KiB in a multiprocessor, and 128 KiB in what
several of them share. Code that has left the L2 cache too would take 2 to 3 times as long to
read.

For both ends:

* All blocks that are resident copy together and share the bandwidth; a block alone gets at most 40
  bytes per cycle. A copy's first bytes arrive after a read of memory, and beside the copy three
  more such reads, one after another, bring the counts of the history.
* The blocks of a cluster are in one GPC. How the multiprocessors of an H100 are spread over GPCs is
  not published; the model's GPCs hold 15 clusters of 8 with a block per multiprocessor, as [was
  seen][clusters] and as [cuBLAS launches][cublas]. Two blocks share a multiprocessor where both
  have room and rows are many.
* A row that is not copied is read from memory in the first pass, with prefetches four rounds ahead.
  Later passes find it in the L2 cache if the rows that are resident fit, otherwise they read
  memory.
* A round of a pass takes as many cycles as its warps need to issue it, but at least 2.5 per
  instruction and 60 for shared memory, or the latency of the L2 cache where there is no copy; two
  rounds of the maxima overlap. The passes of another row on the same multiprocessor are met for the
  share of time that they take, and both then issue in turn.
* 40 cycles for a barrier of a block, 350 for a barrier of a cluster with what it waits for, and 200
  for a read of another block's shared memory.
* 35 cycles for each step of a chain of dependent operations: a shuffle, a vote, a read of shared
  memory. A shuffle of 64 bits is two.
* Where there are no clusters and rows are few, a row is split over blocks that do not wait for each
  other. The last block finishes greedy rows and rows with top-k from the lists of all, which have
  64 places each where top-k is 50 and are guessed right; other rows it samples alone, and finds
  them in the L2 cache, to which the copies of all blocks have brought them.
* 60 candidates where top-k is 50, and 80 where top-p is 0.9 and they have its mass; on a flat row,
  5 passes of the search and then 300 candidates, as counted in the emulation.
* A history of 4,096 tokens, spread uniformly over the vocabulary.

The launch itself, about 2 µs before the first instruction runs, is not included: every kernel has
it. "All parameters" are the three penalties, temperature, top-k 50, top-p 0.9 and min-p.

No sampler like this one has been measured in public on these devices. The nearest are kernels that
select the largest k logits of rows of 256 and 512 KiB, in a table after the times: they select 512
tokens or more, and draw none. Beside them is what is predicted for top-k 50 of the same logits.
FlashInfer's takes 1.0 to 1.3 times the lower end, TokenSpeed's 1.6 to 1.7 times, and SGLang's 2.0
to 3.1 times, which is about the upper end; none of them is said to have cold code. A kernel that
samples one of the largest k, by another algorithm, takes about ten times the upper end.

[throughput]: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#arithmetic-instructions
[4090]: https://github.com/xytpai/nvbench
[gh200]: https://github.com/mredenti/PowerCapping/blob/main/configuration/OpenCL_benchmark.md
[latency]: https://github.com/markdewing/AI_kernels/blob/main/latency/README.md
[huerta]: https://arxiv.org/abs/2503.20481
[icache]: https://github.com/FlashGPU-Sim/FlashGPU-Sim/pull/37
[clusters]: https://github.com/accel-sim/gpu-app-collection/pull/87
[cublas]: https://github.com/NVIDIA/cutlass/issues/1921
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# Devices


class Device(NamedTuple):
    """A GPU, by the numbers that a time depends on."""

    name: str
    arch: str
    processors: int  # streaming multiprocessors
    gpcs: tuple[int, ...]  # multiprocessors of each GPC
    warps: int  # the most that a multiprocessor has at a time
    shared_kib: int  # the most shared memory that a block may have
    megahertz: int
    bytes_per_us: float  # bandwidth of memory, by the data sheet
    l2_mib: float
    l2_cycles: int  # latency of a read that the L2 cache serves
    memory_cycles: int  # latency of a read that it does not

    @property
    def shared_per_processor(self) -> int:
        """Bytes that the blocks of a multiprocessor share; each has 1 KiB reserved."""
        return (self.shared_kib + 1) * 1024

    def resident(self, blocks: int, per_processor: int, *, clustered: bool = True) -> int:
        """How many rows of so many blocks run at a time, with so many blocks per multiprocessor."""
        if not clustered or blocks == 1:
            return self.processors * per_processor // blocks
        return sum(size * per_processor // blocks for size in self.gpcs)


# Latencies: https://github.com/markdewing/AI_kernels/blob/main/latency/README.md. Warps and shared
# memory: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#compute-capabilities
# Where no source says how multiprocessors are spread over GPCs, they are spread as evenly as pairs
# can be; it matters only where there are clusters.
# https://developer.nvidia.com/blog/nvidia-hopper-architecture-in-depth/ has the GPCs and the L2
# cache, https://www.nvidia.com/en-us/data-center/h100/ the bandwidth, and
# https://chipsandcheese.com/2023/07/02/nvidias-h100-funny-l2-and-tons-of-bandwidth/ the clock,
# of a PCIe card; an SXM module may reach 1,980 MHz. For the GPCs see the top of this file.
_H100 = Device(
    name="H100 SXM",
    arch="sm_90",
    processors=132,
    gpcs=(18,) * 3 + (16,) * 4 + (14,),
    warps=64,
    shared_kib=227,
    megahertz=1755,
    bytes_per_us=3.35e6,
    l2_mib=50,
    l2_cycles=291,
    memory_cycles=700,
)
DEVICES = (
    # https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
    # has the GPCs, the clock and the L2 cache; https://www.nvidia.com/en-us/data-center/a100/ the
    # bandwidth.
    Device(
        name="A100 SXM 80 GB",
        arch="sm_80",
        processors=108,
        gpcs=(16,) * 5 + (14,) * 2,
        warps=64,
        shared_kib=163,
        megahertz=1410,
        bytes_per_us=2.039e6,
        l2_mib=40,
        l2_cycles=210,
        memory_cycles=550,
    ),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    Device(
        name="RTX 4090",
        arch="sm_89",
        processors=128,
        gpcs=(12,) * 9 + (10,) * 2,
        warps=48,
        shared_kib=99,
        megahertz=2520,
        bytes_per_us=1.008e6,
        l2_mib=72,
        l2_cycles=296,
        memory_cycles=636,
    ),
    _H100,
    # https://www.nvidia.com/en-us/data-center/h200/ has the bandwidth; the rest is the H100's.
    _H100._replace(name="H200 SXM", bytes_per_us=4.8e6),
    # https://chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut has the multiprocessors,
    # 74 on each of two dies, and a clock like the H100's, https://www.nvidia.com/en-us/data-center/hgx/
    # the bandwidth, and the page of the latencies the L2 cache.
    Device(
        name="B200",
        arch="sm_100",
        processors=148,
        gpcs=(20,) * 2 + (18,) * 6,
        warps=64,
        shared_kib=227,
        megahertz=1755,
        bytes_per_us=8.0e6,
        l2_mib=126.5,
        l2_cycles=295,
        memory_cycles=860,
    ),
)
A100, RTX_4090, H100, H200, B200 = DEVICES
#: Architectures for which no time is predicted: the multiprocessors of the largest device, and the
#: most shared memory that a block may have, in KiB.
OTHERS = {"sm_86": (84, 99), "sm_120": (188, 99)}
_CHIPS = OTHERS | {device.arch: (device.processors, device.shared_kib) for device in DEVICES}
_IN_ORDER = sorted(_CHIPS, key=lambda arch: int(arch.strip("sm_a")))
#: The same of all architectures.
PROCESSORS = {arch: _CHIPS[arch][0] for arch in _IN_ORDER}
SHARED_KIB = {arch: _CHIPS[arch][1] for arch in _IN_ORDER}
#: Instructions that a scheduler issues every second cycle only: those of the integer units, which
#: have 16 lanes, and those of the multipliers.
HALF_RATE = (
    {"FSETP", "FMNMX", "FSEL", "SEL", "ISETP", "IADD3", "VIADD", "VIMNMX"}
    | {"LOP3", "PLOP3", "SHF", "PRMT", "LEA", "BREV", "I2FP"},
    {"IMAD"},
)
#: The same on sm_80, whose multipliers have 16 lanes for floats too.
HALF_RATE_SM_80 = (HALF_RATE[0], {"IMAD", "FADD", "FMUL", "FFMA"})


# What the machine code says of a kernel


class Mix(NamedTuple):
    """How many instructions a thread executes, on average."""

    all: float
    logic: float  # those of the first kind of HALF_RATE
    multiply: float  # those of the second

    @classmethod
    def of(cls, names: Counter[str], arch: str) -> Mix:
        """The mix of instructions with these names."""
        kinds = HALF_RATE_SM_80 if arch == "sm_80" else HALF_RATE
        return cls(names.total(), *(sum(names[name] for name in kind) for kind in kinds))

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


class Touched(NamedTuple):
    """The code that a case executes: lines of 128 bytes, and in how many runs of addresses."""

    lines: int
    runs: int


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs."""

    registers: int
    spills: int
    instructions: int
    fused: int  # instructions with a constant of the mass that are no addition or multiplication
    loads: dict[str, dict[int, int]]  # number of loads from global memory, by pass and bytes
    passes: dict[str, dict[str, Mix]]  # instructions for one vec, by pass and side
    touched: dict[str, Touched]  # by case


class Launch(NamedTuple):
    """How a row is divided among blocks.

    The blocks of a row are a cluster, or, where ``joined`` is "last block", they do not wait for
    each other: each leaves what it has found in global memory, and the last one goes on alone.
    """

    blocks: int
    copied: bool
    vecs: int  # of a block's part
    shared: int  # bytes of a block
    threads: int
    joined: Literal["cluster", "last block"] = "cluster"


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
    listed: int = 0  # tokens of a list, and the ranks of the drawn ones
    is_raw: bool = False  # whether they are those of the raw logits
    kept: Literal["", "ids", "mask"] = ""

    @property
    def has_more(self) -> bool:
        """Whether a call has results beside tokens and status."""
        return bool(self.listed or self.kept)


CASES = (
    Case("greedy", is_greedy=True),
    Case("no filter", weighs=True),
    Case("top-k 50", candidates=(60,)),
    Case("top-p 0.9", candidates=(80,), weighs=True),
    Case("top-p 0.9, flat", candidates=(300,), weighs=True, searches=5),
    Case("top-k 50 + top-p 0.9", candidates=(60,)),
    Case("all parameters", candidates=(60,), history=4096, has_depth_cut=True),
    Case("top-k 50, 20 processed logprobs", candidates=(60,), listed=20),
    Case("top-k 50, 20 raw logprobs", candidates=(60,), listed=20, is_raw=True),
    Case("top-k 50, kept ids", candidates=(60,), kept="ids"),
    Case("top-k 50, kept mask", candidates=(60,), kept="mask"),
)

# How long a call takes


@dataclass(frozen=True)
class Assumptions:
    """What the two ends of a range assume otherwise."""

    bandwidth: float  # of the data sheet's
    read_us: float  # of a read of memory that depends on another, where the device is not slower
    is_cold: bool  # whether no code and no counter is in a cache


LOWER = Assumptions(bandwidth=1.0, read_us=0.0, is_cold=False)
UPPER = Assumptions(bandwidth=0.9, read_us=0.7, is_cold=True)

BLOCK_BYTES_PER_CYCLE = 40
BARRIER, CLUSTER_BARRIER, REMOTE, STEP = 40, 350, 200, 35
WIDE = 2  # shuffles of a shuffle of 64 bits
SLOWEST = 2.5  # cycles per instruction of a warp that runs alone
SHARED_MEMORY = 60  # cycles
LINES_AHEAD = 16  # lines of code that are read at a time
LISTED = 64  # places of a block's list where top-k is 50
ROUNDS_AHEAD = 4  # how far a pass prefetches a row that is not copied (passes.cuh)


def most_seen(expected: float) -> float:
    """The expected maximum over the 32 lanes of a warp of a Poisson number with this mean."""
    at_most, term, found = 0.0, math.exp(-expected), 0.0
    for n in range(33):
        at_most += term
        found += 1 - min(at_most, 1.0) ** 32
        term *= expected / (n + 1)
    return found


@dataclass(frozen=True)
class Call:
    """A call on a device: everything that the steps of a row depend on."""

    case: Case
    cost: Cost
    launch: Launch
    device: Device
    assumptions: Assumptions
    rows: int
    vocab_size: int
    itemsize: int

    @property
    def row_bytes(self) -> float:
        """The logits of a row, and the bits of its history."""
        return self.vocab_size * self.itemsize + (self.vocab_size / 8 if self.case.history else 0)

    @property
    def per_processor(self) -> int:
        """The most blocks that a multiprocessor has at a time."""
        launch, device = self.launch, self.device
        if self.rows <= device.resident(launch.blocks, 1, clustered=self.is_clustered):
            return 1
        return min(2, device.shared_per_processor // (launch.shared + 1024))

    @property
    def is_clustered(self) -> bool:
        return self.launch.joined == "cluster"

    @property
    def at_once(self) -> int:
        """How many rows run at a time."""
        resident = self.device.resident(
            self.launch.blocks, self.per_processor, clustered=self.is_clustered
        )
        return max(1, resident)

    @property
    def is_in_l2(self) -> bool:
        """Whether the rows that run at a time stay in the L2 cache."""
        return min(self.rows, self.at_once) * self.row_bytes <= self.device.l2_mib * 2**20

    @property
    def read(self) -> float:
        """Cycles of a read of memory."""
        return max(self.device.memory_cycles, self.assumptions.read_us * self.device.megahertz)

    def transfer(self, of_block: float) -> float:
        """Cycles in which all resident blocks get so many bytes each from memory."""
        blocks = min(self.rows, self.at_once) * self.launch.blocks
        bandwidth = self.device.bytes_per_us * self.assumptions.bandwidth / self.device.megahertz
        return max(of_block / BLOCK_BYTES_PER_CYCLE, of_block * blocks / bandwidth)


class Chain:
    """The cycles of one row's blocks, by what they are for.

    Methods with the name of one of RowSampler or Cluster follow it, step by step.
    """

    def __init__(self, call: Call):
        launch = call.launch
        self.call = call
        self.case = call.case
        self.launch = launch
        self.passes = call.cost.passes
        self.rounds = math.ceil(launch.vecs / launch.threads)
        self.warps = launch.threads // 32
        self.per_scheduler = self.warps / 4
        self.share_seen = call.case.history / call.vocab_size
        self.cycles: Counter[str] = Counter()
        self.issued = 0.0  # cycles in which a scheduler issues for the warps of one block
        self.hindered = 0.0  # further cycles of the passes if another block has its passes then

    def steps(self, count: float) -> None:
        self.cycles["steps"] += STEP * count

    def barrier(self) -> None:
        self.cycles["barriers"] += BARRIER

    def sync(self) -> None:
        if self.launch.blocks > 1 and not self.call.is_clustered:
            raise ValueError("blocks that are no cluster do not wait for each other")
        self.cycles["barriers"] += CLUSTER_BARRIER if self.launch.blocks > 1 else BARRIER

    def read_remote(self, count: int) -> None:
        if self.launch.blocks > 1:
            self.cycles["barriers"] += REMOTE * count

    def code(self, instructions: float) -> None:
        """Instructions that a warp issues once, with nothing to overlap them."""
        self.cycles["steps"] += SLOWEST * instructions

    def fetch_code(self) -> None:
        """The code, where the instruction caches do not have it."""
        if self.call.assumptions.is_cold:
            lines, runs = self.call.cost.touched[self.case.name]
            self.cycles["code"] += (lines / LINES_AHEAD + runs) * self.call.device.l2_cycles

    def load(self, *, is_first: bool = False) -> tuple[float, float]:
        """Cycles of a round that wait for its logits, and cycles between two rounds at least.

        Not copied, the words of the history and the counts are two more reads, one after the other;
        nothing prefetches them.
        """
        if self.launch.copied:
            return SHARED_MEMORY, 0.0
        call, device = self.call, self.call.device
        from_memory = is_first or not call.is_in_l2
        latency = float(device.l2_cycles)
        if self.case.history:
            latency += call.read if from_memory else device.l2_cycles
        of_round = self.launch.threads * 8 * call.itemsize
        if not from_memory:
            return latency, of_round / BLOCK_BYTES_PER_CYCLE
        return latency, max(call.transfer(of_round), call.read / ROUNDS_AHEAD)

    def mix(self, name: str, *sides: str) -> Mix:
        """The instructions of a round of a pass in this case."""
        found = self.passes[name]
        mix = sum((found[side] for side in sides), found["plain"])
        if self.case.history and "history" in found:
            mix += found["history"] + found["seen"].times(most_seen(8 * self.share_seen))
        return mix

    def loop(
        self,
        mix: Mix,
        rounds: float,
        steps: int = 0,
        overlapping: int = 1,
        load: tuple[float, float] = (SHARED_MEMORY, 0.0),
    ) -> None:
        """So many rounds of all warps of a block, of which so many overlap."""
        latency, least = load
        slowest = (SLOWEST * mix.all + latency + STEP * steps) / overlapping
        slowest = max(slowest, least)
        alone = max(self.per_scheduler * mix.cycles, slowest)
        self.cycles["passes"] += rounds * alone
        self.hindered += rounds * (max(2 * self.per_scheduler * mix.cycles, slowest) - alone)
        self.issued += rounds * self.per_scheduler * mix.cycles

    def over_vecs(self, name: str, *sides: str, steps: int = 0) -> None:
        self.loop(self.mix(name, *sides), self.rounds, steps, load=self.load())

    @property
    def owners(self) -> int:
        """The blocks among which the tokens are that a pass looks for."""
        return self.launch.blocks

    def over_tiles(self, name: str, tokens: int) -> None:
        """The tiles that have one of so many tokens; the slowest warp has one more than average.

        Each lane lists those of its own vec, so a tile takes as long as its busiest lane.
        """
        tiles = self.rounds * self.warps * self.owners
        share = 1 - (1 - 1 / tiles) ** tokens
        visited = min(self.rounds, self.rounds * share + 1)
        self.loop(self.mix(name), visited, load=(self.load()[0], 0.0))
        self.steps(2 * math.ceil(self.rounds / 32))  # a read and a vote for 32 rounds
        if hit := self.passes[name].get("hit"):
            times = visited * most_seen(tokens / tiles / 32) / share
            self.code(times * hit.all)
            self.steps(times)  # the place in the list

    def copy(self) -> None:
        """The logits, and beside them the history, whose reads depend on each other."""
        call = self.call
        if not self.launch.copied:
            self.cycles["reads"] += call.read
            self.barrier()
            return
        instructions = self.passes["copy"]["plain"]
        self.issued += self.rounds * self.per_scheduler * instructions.cycles
        cycles = call.read + call.transfer(call.row_bytes / self.launch.blocks)
        if self.case.history:
            beside = Chain(call)
            beside.copy_bits()
            self.issued += beside.issued
            cycles = max(cycles, beside.cycles.total() + 3 * call.read)
        self.cycles["reads"] += cycles
        self.barrier()

    def copy_bits(self) -> None:
        words = math.ceil(self.launch.vecs / 4 / self.launch.threads)
        self.loop(self.passes["bits"]["plain"], words)
        self.barrier()
        self.steps(5 * WIDE + 2)
        placed = self.passes["places"]["seen"].times(most_seen(32 * self.share_seen))
        self.loop(self.passes["places"]["plain"] + placed, words)

    def score(self) -> None:
        self.barrier()
        seen = self.case.history / self.launch.blocks
        self.loop(self.passes["score"]["plain"], math.ceil(seen / self.launch.threads))

    def find_maxima(self) -> None:
        if self.launch.copied and self.case.history:
            self.score()
        if self.launch.copied or not self.case.history:
            mix, overlapping = self.passes["maxima"]["plain"], 2
        else:
            mix, overlapping = self.mix("other maxima"), 1
        load = self.load(is_first=True)
        self.loop(mix, self.rounds, overlapping=overlapping, load=load)
        self.find_limits()

    def find_limits(self) -> None:
        self.steps(4)
        self.barrier()
        self.steps(4)
        self.sync()
        if self.call.is_clustered and self.launch.blocks > 1:
            self.steps(4)

    def combine(self) -> None:
        self.steps(5 * WIDE + 1)
        self.barrier()
        self.steps(1 + 3 * WIDE + 1)
        self.sync()
        self.steps(1 + 3 * WIDE)

    def scan(self, width: int = 1) -> None:
        self.steps(5 * width + 1)
        self.barrier()
        self.steps(1 + 5 * width + width)
        self.barrier()

    def sum(self) -> None:
        self.steps(1)
        self.sync()
        self.steps(1 + 3 * WIDE)

    def process_any(self) -> None:
        self.read_remote(1)
        self.cycles["passes"] += SLOWEST * self.mix("first").all + self.load()[0]

    def mass(self) -> None:
        self.code(self.passes["weigh"]["all"].all / 8)

    def compare_all(self, count: int) -> None:
        """Four lanes share a candidate; an iteration compares it with four others in each lane."""
        four = SHARED_MEMORY + SLOWEST * 4 * self.passes["compare"]["plain"].all
        rounds = math.ceil(count / (self.launch.threads // 4))
        self.cycles["candidates"] += rounds * (math.ceil(count / 16) * four + 2 * WIDE * STEP)

    def search_sorted(self, times: int) -> None:
        """So many calls of count_leading_by_warp: two iterations of a read and a vote."""
        self.steps(4 * times)

    def sum_tiles(self) -> None:
        self.barrier()
        self.steps(2 * math.ceil(self.rounds * self.warps / self.launch.threads))
        self.scan(WIDE)
        self.barrier()
        self.sum()

    def collect(self, count: int) -> None:
        self.barrier()
        self.over_tiles("collect", count)
        self.barrier()
        self.sum()
        self.mass()
        self.read_remote(1)
        self.sync()
        self.compare_all(count)
        self.barrier()

    def guess_range(self) -> None:
        self.barrier()
        self.steps(5)  # a division, the bins of two maxima
        self.sync()
        self.find_bin()

    def find_bin(self) -> None:
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
            self.over_vecs("weigh", "all", steps=5 * WIDE)
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
            self.over_vecs("weigh", "kept", steps=5 * WIDE)
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
            self.code(self.passes["weigh"]["all"].all)
            self.steps(5 * WIDE + 2)

    def find_raw_sum(self) -> None:
        """Two passes that read global memory, whether there is a copy or not."""
        latency, of_round = self.call.device.l2_cycles, self.launch.threads * 8 * self.call.itemsize
        for _ in range(2):
            load = float(latency), of_round / BLOCK_BYTES_PER_CYCLE
            self.loop(self.mix("raw"), self.rounds, load=load)
            self.combine()

    def write_more(self) -> None:
        """Lists, ranks and the kept set of a row whose candidates hold them."""
        case = self.case
        self.sync()
        self.combine()
        self.barrier()
        if case.kept == "mask":
            words = self.call.vocab_size / 32 / self.launch.threads / self.launch.blocks
            self.steps(math.ceil(words))
            self.sync()
            self.search_sorted(1)
        if case.kept:
            self.search_sorted(1)
            self.barrier()
        self.search_sorted(1)
        self.mass()
        self.process_any()
        self.steps(math.log2(64))  # a search among the candidates
        self.combine()
        self.sync()

    def hand_over(self, of_block: int) -> None:
        """From a block's last write of its list to the last block's having read all lists.

        The block's threads meet, and a fence waits until the L2 cache has their writes; an atomic
        operation on a counter, with its answer, follows; the block is told the answer; and the last
        block reads the lists of all, of so many bytes each, as fast as one block reads. Fence,
        atomic operation and read are each a trip to the L2 cache and back, whose latency was
        measured for every device (DEVICES); no public measurement of the sequence itself was found.
        At the upper end each trip takes as long as one to memory, as if neither the counter nor the
        lists were in the cache.
        """
        device = self.call.device
        is_cold = self.call.assumptions.is_cold
        trip = device.memory_cycles if is_cold else device.l2_cycles
        self.barrier()
        self.cycles["hand-over"] += 3 * trip
        self.barrier()
        self.steps(1)
        self.cycles["hand-over"] += self.launch.blocks * of_block / BLOCK_BYTES_PER_CYCLE

    def run(self) -> None:
        """All steps of a row, in order."""
        self.fetch_code()
        self.copy()
        self.find_maxima()
        if self.case.is_greedy:
            self.over_tiles("first", 1)
            self.combine()
        else:
            self.find_kept()
        if self.case.is_raw:
            self.find_raw_sum()
        self.draw()
        if self.case.has_more:
            self.write_more()


class SplitChain(Chain):
    """The steps of a row that the last of its blocks finishes from the lists of all (split.cuh)."""

    @property
    def owners(self) -> int:
        """Each block looks for so many tokens in its own part."""
        return 1

    def append(self, count: int) -> None:
        """The block's tokens that reach a code, in any order."""
        self.barrier()
        self.over_tiles("collect", count)
        self.barrier()

    def sync(self) -> None:
        self.barrier()

    def read_remote(self, count: int) -> None:
        """Nothing: no block looks into another one."""

    def find_bin(self) -> None:
        """The same, and what the bins before it hold, for all threads."""
        self.steps(1)
        super().find_bin()
        self.steps(1)
        self.barrier()
        self.steps(1)

    def over_lists(self, listed: int) -> None:
        """All codes of the lists in shared memory, four for each thread at a time."""
        codes = self.launch.blocks * listed
        self.loop(self.passes["lists"]["plain"], math.ceil(codes / 4 / self.launch.threads))

    def gather(self, count: int, listed: int) -> None:
        self.barrier()
        self.over_lists(listed)
        self.barrier()
        self.find_bin()
        self.barrier()
        self.over_lists(listed)
        # A warp runs the code for a listed token once for 32 codes that have any.
        of_warp = self.launch.blocks * listed / 32 / self.warps
        times = of_warp * (1 - math.exp(-count / (of_warp * self.warps)))
        # What one iteration has of it is for four codes, in the second of the two loops alone.
        self.code(times * 2 * self.passes["lists"]["hit"].all / 4)
        self.steps(times)
        self.barrier()
        self.mass()
        self.sync()
        self.compare_all(count)
        self.barrier()

    def run(self) -> None:
        case = self.case
        listed = 0 if case.is_greedy else LISTED
        self.fetch_code()
        self.copy()
        self.find_maxima()
        if case.is_greedy:
            self.over_tiles("first", 1)
            self.combine()
        else:
            self.guess_range()
            self.append(case.candidates[0])
        self.hand_over(24 + 8 * listed)  # header and list
        self.steps(6)
        if not case.is_greedy:
            self.gather(case.candidates[0], listed)
            self.search_sorted(2)
            if case.has_depth_cut:
                self.search_sorted(1)
                self.mass()
        self.draw()
        if case.has_more:
            self.write_more()


class AloneChain(Chain):
    """The steps of a row that the last block samples alone, after all have copied their parts.

    The row is in the L2 cache then. ``parts`` are the blocks of the row.
    """

    parts = 1

    def load(self, *, is_first: bool = False) -> tuple[float, float]:
        return super().load()

    def run(self) -> None:
        call = self.call
        self.cycles["reads"] += call.read + call.transfer(call.row_bytes / self.parts)
        trip = call.device.memory_cycles if call.assumptions.is_cold else call.device.l2_cycles
        self.cycles["hand-over"] += 3 * trip
        for _ in range(4):
            self.barrier()
        super().run()


def predict_end(call: Call, chain_of: type[Chain] = Chain) -> dict[str, float]:
    """The microseconds of one end of the range, by part, and the lower bounds.

    Args:
        call: with the assumptions of that end.
        chain_of: the steps of a row. A kernel whose blocks are joined otherwise than by a cluster
            derives it from :class:`Chain`, has its own ``run``, and calls ``hand_over`` where the
            last block takes over; ``Launch.joined`` then says "last block".
    """
    device = call.device
    chain = chain_of(call)
    chain.run()
    if call.per_processor == 2:
        # The other row's passes are met for the share of time that passes take: a fixed point.
        alone = passes = chain.cycles["passes"]
        rest = chain.cycles.total() - alone - chain.cycles["code"]
        for _ in range(20):
            passes = alone + passes / (rest + passes) * chain.hindered
        chain.cycles["passes"] = passes
    follow = math.ceil(call.rows / call.at_once)
    parts = {
        # The code is cold for the first rows only.
        name: (1 if name == "code" else follow) * cycles / device.megahertz
        for name, cycles in chain.cycles.items()
    }
    busiest = math.ceil(call.rows * call.launch.blocks / device.processors)
    return {
        "bytes": call.rows * call.row_bytes / device.bytes_per_us,
        "issue": busiest * chain.issued / device.megahertz,
        "predicted": sum(parts.values()),
        **parts,
    }


def predict(call: Call, chain_of: type[Chain] = Chain) -> dict[str, Any]:
    """The range of a call's time; the assumptions of ``call`` itself do not matter.

    Args:
        call: the call.
        chain_of: as for :func:`predict_end`.

    Returns:
        What the results file has of a prediction: in "microseconds", "bytes" and "issue", which the
        call takes at least, and for "predicted" and each of its parts the lower and the upper end.
    """
    ends = [predict_end(replace(call, assumptions=a), chain_of) for a in (LOWER, UPPER)]
    lower, upper = ends
    microseconds: dict[str, Any] = {name: round(lower[name], 2) for name in ("bytes", "issue")}
    for name in upper:
        if name not in microseconds:
            microseconds[name] = [round(end.get(name, 0.0), 2) for end in ends]
    return {
        "device": call.device.name,
        "case": call.case.name,
        "vocab_size": call.vocab_size,
        "rows": call.rows,
        "blocks": call.launch.blocks,
        "copied": call.launch.copied,
        "rows_at_once": call.at_once,
        "microseconds": microseconds,
    }
