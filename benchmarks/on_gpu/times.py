"""Step 6: what a launch takes on the device, beside other operations on the same logits.

Three times, each of launches in a row, in a CUDA graph and without Python:

* cold: each launch reads another buffer, and all buffers together are twice the L2 cache;
* hot: each launch reads the same buffer, which is in the L2 cache if it fits there;
* after a product: a matrix product before each launch, with the buffers of "cold". Their time less
  that of the products alone. The kernel's instructions are no longer in the caches, as after a
  model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import CASES, EVERYTHING, Case
from benchmarks.inputs import make_inputs
from benchmarks.on_gpu.device import CLOCKS, nvidia_smi
from benchmarks.on_gpu.logits import make_logits
from benchmarks.on_gpu.results import Results, label
from benchmarks.on_gpu.setting import Deadline, Setting, Shape
from benchmarks.providers import PROVIDERS, Task, sampler_of
from llm_sampling import SamplingParams

DTYPE = torch.bfloat16
#: The kinds of rows by the names that cuda_cost.py has for them.
KINDS: Mapping[str, Case] = {
    "greedy": CASES["greedy"],
    "no filter": Case("no filter", (SamplingParams(),)),
    "top-k 50": CASES["top-k-50"],
    "top-p 0.9": CASES["top-p-0.9"],
    "top-k 50 + top-p 0.9": CASES["top-k-50-top-p-0.9"],
    "all parameters": Case("all parameters", (EVERYTHING,), history_length=4096),
}
#: A sampler of torch's operations, and one that may be compiled when it is first called, which
#: takes long and so comes last.
PLAIN, LAST = ("plain-torch", "top-k 50"), ("flashinfer", "top-k 50 + top-p 0.9")
#: Launches what is timed, on the buffer with this index.
Launch = Callable[[int], object]


def _one_element(buffers: list[Tensor]) -> Launch:
    number = torch.zeros(1, device=buffers[0].device)
    return lambda index: number.add_(1)


def _copy(buffers: list[Tensor]) -> Launch:
    target = torch.empty_like(buffers[0])
    return lambda index: target.copy_(buffers[index])


#: Operations of torch to compare with.
LIMITS: Mapping[str, Callable[[list[Tensor]], Launch]] = {
    "one element + 1": _one_element,
    "copy": _copy,
    "amax": lambda buffers: lambda index: buffers[index].amax(-1),
    "softmax to float32": lambda buffers: (
        lambda index: torch.softmax(buffers[index], -1, dtype=torch.float32)
    ),
}


class Timed(NamedTuple):
    """What is timed: an operation, or a sampler on a kind of rows."""

    shape: Shape
    who: str
    kind: str = ""


def planned(setting: Setting, backends: list[str]) -> list[Timed]:
    """Everything, what matters most first."""
    lines: list[Timed] = []
    for shapes in setting.timed:
        for place, backend in enumerate(backends):
            for shape in shapes:
                if place == 0:
                    lines += [*(Timed(shape, who) for who in LIMITS), Timed(shape, *PLAIN)]
                lines += [Timed(shape, backend, kind) for kind in KINDS]
    return lines + [Timed(shape, *LAST) for shapes in setting.timed for shape in shapes]


class Buffers:
    """The logits of one shape, so many that together they are in no cache.

    Args:
        setting: the device.
        shape: of each buffer.
    """

    def __init__(self, setting: Setting, shape: Shape) -> None:
        rows, vocab_size = shape
        number = max(2, -(-setting.cold_bytes // (rows * vocab_size * DTYPE.itemsize)))
        logits = make_logits(number * rows, vocab_size, DTYPE, setting.device)
        self.each = list(logits.view(number, rows, vocab_size).unbind())
        self.shape = shape
        #: How many launches a graph has: all buffers once, or several times where they are few.
        self.launches = number * -(-20 // number)
        left = torch.randn(setting.matrix, setting.matrix, device=setting.device).to(DTYPE)
        self.product = lambda: left @ left
        self.product_us = setting.timer.time(lambda index: self.product(), self.launches).median

    def build(self, setting: Setting, timed: Timed) -> Launch:
        """Make an operation or a sampler ready.

        Raises:
            AbsentError: it is not installed.
        """
        if timed.who in LIMITS:
            return LIMITS[timed.who](self.each)
        own = timed.who in setting.backends
        provider = PROVIDERS[sampler_of(timed.who) if own else timed.who]
        provider.version(setting.device)
        case = KINDS[timed.kind]
        return provider.build(Task(case, make_inputs("model", self.each, case))).call

    def time(self, setting: Setting, launch: Launch) -> dict[str, Any]:
        """The three times, in microseconds per launch."""
        number = len(self.each)
        timer, launches = setting.timer, self.launches
        cold = timer.time(lambda index: launch(index % number), launches)
        hot = timer.time(lambda index: launch(0), launches)

        def both(index: int) -> None:
            self.product()
            launch(index % number)

        after = timer.time(both, launches).median - self.product_us
        times = {"cold": cold.to_json(), "hot": hot.to_json()}
        return times | {"after_product_us": round(after, 3)}


def _bandwidth(setting: Setting) -> float:
    """Bytes that a large copy moves in a microsecond, read and written."""
    size = 8 * setting.cold_bytes if setting.device == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * size / setting.timer.time(lambda index: target.copy_(source), 3).median


def run(setting: Setting, results: Results, deadline: Deadline) -> None:
    """Write a line for each time as soon as it is there.

    Args:
        setting: the shapes and the timer.
        results: gets ``bytes_per_us``, ``clocks`` before and after, ``plan``, ``lines``, in which
            what could not be timed has a reason, and ``verdict``.
        deadline: nothing is begun near it; what is in the plan and has no line was not reached.
    """
    absent = setting.absent()
    backends = [name for name in setting.backends if name not in absent]
    plan = planned(setting, backends)
    results.put(
        device=setting.device_name,
        dtype="bfloat16",
        absent=absent,
        plan=[label(timed.who, *timed.shape, timed.kind) for timed in plan],
        lines=[],
    )
    if not backends:
        results.put(verdict="nothing ran")
        return
    results.put(bytes_per_us=round(_bandwidth(setting)), clocks=[nvidia_smi(CLOCKS)])
    buffers: Buffers | None = None
    for timed in plan:
        if deadline.is_near():
            break
        if buffers is None or buffers.shape != timed.shape:
            buffers = None  # its memory is needed
            buffers = Buffers(setting, timed.shape)
        line = {**timed.shape._asdict(), "who": timed.who, "kind": timed.kind}
        line |= {"buffers": len(buffers.each), "launches": buffers.launches}
        try:
            line |= buffers.time(setting, buffers.build(setting, timed))
        except Exception as error:  # such as a package that is absent; others are still timed
            line["reason"] = " ".join(str(error).split())[:300] or type(error).__name__
        results.add("lines", line)
        if "reason" in line:
            setting.check_device()
    results.put(clocks=[*results.record["clocks"], nvidia_smi(CLOCKS)])
    done = len(results.record["lines"])
    results.put(verdict=f"{done} of {len(plan)} timed")
