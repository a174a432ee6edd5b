"""Time and launches of an engine's functions, taken in the process that runs the engine."""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: An object or class and the name of one of its functions.
Place = tuple[Any, str]


class Clock:
    """Seconds spent in functions of an object, and how often they were called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def watch(self, owner: Any, name: str) -> None:
        """Time ``owner.name`` from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        setattr(owner, name, timed)

    def take(self) -> tuple[float, int]:
        """The seconds and calls so far; counting begins again."""
        shown = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return shown


class Launches(TorchDispatchMode):
    """Counts what would be a launch on a GPU: on a GPU the kernels themselves, by the profiler.

    Elsewhere each operator of torch is one that computes something (views and empty tensors are
    none), and so is each call of a Triton kernel and of this package's compiled kernels.

    Attributes:
        count: of all watched functions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._is_inside = False

    def watch(self, owner: Any, name: str) -> None:
        """Count the launches of ``owner.name`` from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            if self._is_inside:
                return function(*args, **options)
            self._is_inside = True
            try:
                with self._counting():
                    return function(*args, **options)
            finally:
                self._is_inside = False

        setattr(owner, name, counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, unless it computes nothing."""
        self.count += not func.is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        if torch.cuda.is_available():
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiler:
                yield
                torch.cuda.synchronize()
            kind = torch.autograd.DeviceType.CUDA
            self.count += sum(event.device_type == kind for event in profiler.events())
            return
        with self, self._other_kernels():
            yield

    @contextmanager
    def _other_kernels(self) -> Iterator[None]:
        """Count the kernels that are no operators of torch, if their modules are loaded."""
        places = (
            ("triton.runtime.interpreter", "GridExecutor", "__call__"),
            ("llm_sampling.backends.native", "Library", "run"),
            ("llm_sampling.backends.native", "Library", "update"),
        )
        originals = []
        for module, owner_name, name in places:
            owner = getattr(sys.modules.get(module), owner_name, None)
            if owner is not None:
                originals.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self._one_more(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)

    def _one_more(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = self.count
            try:
                return function(*args, **options)
            finally:
                self.count = before + 1  # what an interpreter does inside is no launch

        return call


class Meters:
    """What the functions of an engine cost, in the process that runs them.

    Args:
        step: functions that together are a step of the engine's runner.
        draw: the function of the sampler that is called once a step.
        follow: other functions that are the sampler's: what follows requests that come and go,
            and what is drawn.
    """

    def __init__(self, step: Sequence[Place], draw: Place, follow: Sequence[Place] = ()) -> None:
        self._sampler = [draw, *follow]
        self._step, self._draw, self._follow = Clock(), Clock(), Clock()
        self._launches = Launches()
        for place in step:
            self._step.watch(*place)
        self._draw.watch(*draw)
        for place in follow:
            self._follow.watch(*place)

    def read(self) -> dict[str, float]:
        """All so far: steps, their seconds, the sampler's seconds among these, its launches."""
        return {
            "steps": self._draw.calls,
            "step_seconds": self._step.seconds,
            "sampler_seconds": self._draw.seconds + self._follow.seconds,
            "launches": self._launches.count,
        }

    def count_launches(self) -> None:
        """Count launches from now on, which makes times useless."""
        for place in self._sampler:
            self._launches.watch(*place)


def measure(
    generate: Callable[[int], list[list[int]]],
    meters: Any,
    *,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Generate some rounds, timed, and one more in which launches are counted.

    Args:
        generate: all requests, so many tokens each; returns their tokens.
        meters: a :class:`Meters`, or what answers as one.
        tokens: of each request.
        rounds: that are timed.

    Returns:
        ``tokens`` of the first round, ``rounds``, and ``launches`` of the sampler a step.
    """
    generate(min(tokens, 4))
    lines, first = [], None
    for _ in range(rounds):
        before = meters.read()
        start = time.perf_counter()
        made = generate(tokens)
        seconds = time.perf_counter() - start
        first = made if first is None else first
        spent = {name: value - before[name] for name, value in meters.read().items()}
        lines.append({"seconds": seconds, "generated": sum(map(len, made))} | spent)
    meters.count_launches()
    before = meters.read()
    generate(tokens)
    after = meters.read()
    return {
        "tokens": first,
        "rounds": lines,
        "launches": (after["launches"] - before["launches"]) / (after["steps"] - before["steps"]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def leave_penalised_out(found: dict[str, Any], requests: Sequence[dict[str, Any]]) -> None:
    """Replace the tokens of requests with a penalty by None, so that they are not compared.

    For engines whose own sampler gives such a request other tokens than it should.
    """
    penalties = {"repetition_penalty", "frequency_penalty", "presence_penalty"}
    for place, request in enumerate(requests):
        if penalties & set(request["params"]):
            found["tokens"][place] = None


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The medians over the rounds of :func:`measure`, which the report shows."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, rounds))

    return {
        "tokens_per_s": round(median(lambda r: r["generated"] / r["seconds"]), 1),
        "step_ms": round(median(lambda r: r["step_seconds"] / r["steps"] * 1e3), 2),
        "sampler_ms": round(median(lambda r: r["sampler_seconds"] / r["steps"] * 1e3), 3),
        "share": round(median(lambda r: r["sampler_seconds"] / r["step_seconds"]), 4),
    }


def answer(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the job of the file that the command line names first; the second gets its result."""
    job_file, result_file = map(Path, sys.argv[1:])
    result = run(json.loads(job_file.read_text(encoding="utf-8")))
    result_file.write_text(json.dumps(result), encoding="utf-8")
