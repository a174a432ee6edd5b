"""Where the steps run, on which shapes, and until when: on a GPU, or as a dry run without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.on_gpu.timer import FakeTimer, GraphTimer, Timer
from llm_sampling.backends import BACKENDS


class Shape(NamedTuple):
    """Of logits."""

    rows: int
    vocab_size: int


def _shapes(rows: tuple[int, ...], vocab_sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(number, size) for size in vocab_sizes for number in rows)


@dataclass(frozen=True)
class Setting:
    """Where the steps run and on what.

    Attributes:
        device: "cuda" or "cpu".
        backends: those that are compared with the reference, and timed.
        parity: shapes, what matters most first, since time may run out.
        timed: the same in stages: all backends do a stage before any does the next.
        threads: the shapes of the two threads.
        thread_steps: how many tokens each thread draws for each of its rows.
        timer: of the step ``times``.
        matrix: rows and columns of the matrices that are multiplied before a launch.
        sanitizer: the program that watches the launches; "" runs them without one.
        launches: the shapes that make a launch of each kind, with the dtype of the logits.
        predicted: the backend whose predicted times are compared with the measured ones.
        predicted_for: the device whose predictions are taken; "" for the device that is there.
    """

    device: str
    backends: tuple[str, ...]
    parity: tuple[Shape, ...]
    timed: tuple[tuple[Shape, ...], ...]
    threads: tuple[Shape, Shape]
    thread_steps: int
    timer: Timer
    matrix: int
    sanitizer: str
    launches: tuple[tuple[Shape, torch.dtype], ...]
    predicted: str
    predicted_for: str = ""

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name() if self.device == "cuda" else self.device

    @property
    def cold_bytes(self) -> int:
        """Buffers that hold so much together are in no cache of the device: twice its L2 cache."""
        if self.device != "cuda":
            return 1
        return 2 * int(torch.cuda.get_device_properties().L2_cache_size)

    def check_device(self) -> None:
        """Raise where an earlier error has ended the device's context: nothing more can run."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def absent(self) -> dict[str, str]:
        """The backends that cannot run here, with the reasons."""
        device = torch.device(self.device)
        reasons = {name: BACKENDS[name].why_unavailable(device) for name in self.backends}
        return {name: reason for name, reason in reasons.items() if reason is not None}


_SIZES = (128256, 32000, 262144)
_FEW = _shapes((1, 64), (128256,))

GPU = Setting(
    device="cuda",
    backends=("cuda", "triton"),
    parity=_shapes((1, 64, 8, 140), (*_SIZES, 513)),
    timed=(_FEW, tuple(s for s in _shapes((1, 64, 8, 256), _SIZES) if s not in _FEW)),
    threads=(Shape(1, 128256), Shape(64, 32000)),
    thread_steps=5000,
    timer=GraphTimer(),
    matrix=2048,
    sanitizer="compute-sanitizer",
    launches=(
        (Shape(2, 513), torch.float32),  # one block
        (Shape(2, 10000), torch.bfloat16),  # on sm_90 and later 2 blocks, then 4, then 8
        (Shape(2, 20000), torch.float16),
        (Shape(2, 128256), torch.bfloat16),
        (Shape(1, 2**19), torch.float32),  # too large for copies in shared memory
    ),
    predicted="cuda",
)

#: Every step's code, on shapes that take no time.
DRY = Setting(
    device="cpu",
    backends=("cpu",),
    parity=(Shape(1, 513), Shape(9, 600), Shape(2, 1000)),
    timed=((Shape(1, 32000),), (Shape(3, 1000),)),
    threads=(Shape(1, 513), Shape(5, 600)),
    thread_steps=10,
    timer=FakeTimer(),
    matrix=8,
    sanitizer="",
    launches=((Shape(2, 513), torch.float32), (Shape(1, 1000), torch.bfloat16)),
    predicted="cpu",
    predicted_for="H100",
)


@dataclass(frozen=True)
class Deadline:
    """When a step has to be done.

    Attributes:
        at: by ``clock``, in seconds.
        clock: which one.
    """

    at: float
    clock: Callable[[], float] = time.monotonic

    def part(self, parts: int) -> Deadline:
        """The end of the first of so many equal parts of the time that is left."""
        now = self.clock()
        return Deadline(now + (self.at - now) / parts, self.clock)

    def is_near(self, margin_s: float = 3.0) -> bool:
        """Whether nothing more should be begun."""
        return self.at - self.clock() < margin_s
