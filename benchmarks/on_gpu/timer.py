"""How the step ``times`` times: launches in a CUDA graph, between two events; a stand-in for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.timing import Timing, summary


class Timer(Protocol):
    """Times work that is launched many times, each time with another index."""

    def time(self, work: Callable[[int], object], launches: int) -> Timing:
        """Microseconds per launch of ``work(0)``, ..., ``work(launches - 1)``."""
        ...


class GraphTimer:
    """Launches are captured in a CUDA graph, so that neither Python nor a launch is in the time.

    Args:
        replays: how many are timed at most.
        budget_s: no replay begins after so many seconds of them, but three are timed.
    """

    def __init__(self, replays: int = 20, budget_s: float = 0.1) -> None:
        self.replays, self.budget_s = replays, budget_s

    def time(self, work: Callable[[int], object], launches: int) -> Timing:
        """Capture the launches, replay them twice untimed, then time replays by events."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and allocates what is kept between launches
            for index in range(min(launches, 3)):
                work(index)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(launches):
                work(index)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        taken: list[float] = []
        started = time.monotonic()
        while len(taken) < self.replays:
            if len(taken) >= 3 and time.monotonic() - started > self.budget_s:
                break
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) * 1000 / launches)
        return summary(taken, launches)


class FakeTimer:
    """Does the work once and answers with a number that no clock gave: 1 us, then 2, and so on."""

    def __init__(self) -> None:
        self.turns = itertools.count(1)

    def time(self, work: Callable[[int], object], launches: int) -> Timing:
        """The work is done; the time is made up."""
        for index in range(launches):
            work(index)
        return summary([float(next(self.turns))] * 2, launches)
