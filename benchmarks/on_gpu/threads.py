"""Step 4: two host threads, each with a shape and a stream of its own, draw thousands of tokens.

What is of the process and not of the call, such as a kernel's attributes, would change between
them. Every token is compared with that of the same loop run alone.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.logits import make_logits
from benchmarks.on_gpu.parity import INPUTS, MIXED
from benchmarks.on_gpu.results import Results, label, verdict_of
from benchmarks.on_gpu.setting import Deadline, Setting, Shape
from llm_sampling import Sampler, TokenHistory

MakeSampler = Callable[..., Sampler]


class Loop:
    """A decode loop on one shape.

    Args:
        setting: the device and the number of steps.
        backend: which one draws.
        shape: of the logits, which are the same in every step.
        make: takes the arguments of :class:`llm_sampling.Sampler`.
    """

    def __init__(self, setting: Setting, backend: str, shape: Shape, make: MakeSampler) -> None:
        self.device = setting.device
        self.logits = make_logits(*shape, torch.bfloat16, setting.device, INPUTS)
        history = TokenHistory.empty(shape.rows, shape.vocab_size, device=setting.device)
        params = [replace(MIXED[row % len(MIXED)], seed=row) for row in range(shape.rows)]
        self.sampler = make(
            params, vocab_size=shape.vocab_size, history=history, backend=backend, check=False
        )
        size = (2, setting.thread_steps, shape.rows)
        self.found = torch.full(size, -2, dtype=torch.int64, device=setting.device)
        self.error = ""

    def run(self, start: threading.Barrier | None = None) -> None:
        """Draw on a stream of its own; an error is kept."""
        try:
            stream = torch.cuda.Stream() if self.device == "cuda" else None
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            if start is not None:
                start.wait(30)
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for step in range(self.found.shape[1]):
                    output = self.sampler(self.logits)
                    self.found[0, step].copy_(output.tokens)
                    self.found[1, step].copy_(output.status)
            if stream is not None:
                stream.synchronize()
        except Exception:  # a thread's error would be lost
            self.error = traceback.format_exc()

    def tokens_and_status(self) -> Tensor:
        """On the CPU, ``(2, steps, rows)``."""
        return self.found.cpu()


def run(
    setting: Setting, results: Results, deadline: Deadline, make: MakeSampler = Sampler
) -> None:
    """Write a line for each backend and thread.

    Args:
        setting: the shapes and the number of steps.
        results: gets ``plan``, ``lines``, ``running`` and ``verdict``.
        deadline: no backend is begun near it.
        make: takes the arguments of :class:`llm_sampling.Sampler`.
    """
    absent = setting.absent()
    backends = [name for name in setting.backends if name not in absent]
    plan = [label(backend, *shape) for backend in backends for shape in setting.threads]
    results.put(absent=absent, steps=setting.thread_steps, plan=plan, lines=[])
    for backend in backends:
        if deadline.is_near():
            break
        for line in _lines(setting, results, backend, make):
            results.add("lines", line)
    results.put(verdict=verdict_of(results.record["lines"], len(plan)))


def _lines(
    setting: Setting, results: Results, backend: str, make: MakeSampler
) -> list[dict[str, Any]]:
    def loops() -> list[Loop]:
        return [Loop(setting, backend, shape, make) for shape in setting.threads]

    results.put(running=f"{backend}, one thread after the other")
    alone, together = loops(), loops()
    for loop in alone:
        loop.run()
    results.put(running=f"{backend}, two threads at once")
    start = threading.Barrier(len(together))
    threads = [threading.Thread(target=loop.run, args=(start,)) for loop in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = []
    for shape, first, second in zip(setting.threads, alone, together, strict=True):
        line: dict[str, Any] = {"backend": backend, **shape._asdict(), "compared": 0, "differ": 0}
        line["error"] = first.error or second.error
        if not line["error"]:
            wanted, found = first.tokens_and_status(), second.tokens_and_status()
            line["compared"] = wanted.numel()
            line["differ"] = int((wanted != found).sum())
            if line["differ"]:
                line["first"] = (wanted != found).nonzero()[0].tolist()
        lines.append(line)
    return lines
