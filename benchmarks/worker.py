"""A provider in an environment of its own: a process that answers each line with a line.

The parent sends a line of JSON and gets one back; tensors are passed as files in a shared folder.
The process times itself as timing.py does, on copies of the same buffers, whenever the parent asks,
so that it takes turns with the other providers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.inputs import AbsentError, Inputs
from benchmarks.providers import PROVIDERS, Contender, Provider, Task
from benchmarks.timing import Run, runner

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

# ---- The parent's side ---------------------------------------------------------------------------


class Worker:
    """A provider's process.

    Args:
        provider: which.
        python: the interpreter of its environment.
        device: "cpu" or "cuda".

    Raises:
        AbsentError: the process does not start, or the provider cannot run in it.
    """

    def __init__(self, provider: Provider, python: Path, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="llm-sampling-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
        )
        threads = torch.get_num_threads()
        try:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.worker", provider.name, device, self._folder.name],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise AbsentError(f"its process does not start: {error}") from error
        self._buffers: list[Tensor] | None = None
        self.version = str(self._ask("version", threads=threads))

    def _ask(self, question: str, **details: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([question, details]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise AbsentError(f"its process ended with {self._process.wait()}")
        absent, answer = json.loads(line)
        if absent is not None:
            raise AbsentError(absent)
        return answer

    def build(self, task: Task, clock: str) -> tuple[Contender, Run]:
        """A Contender for the checks, and the run that times it.

        Raises:
            AbsentError: the provider cannot do this task.
        """
        buffers = task.inputs.buffers
        if self._buffers is not buffers:
            for index, logits in enumerate(buffers):
                self._save(f"logits{index}", logits.float())  # numpy has no bfloat16
            self._ask("load", number=len(buffers), dtype=str(buffers[0].dtype))
            self._buffers = buffers
        self._save("prompt_ids", task.inputs.prompt_ids)
        self._save("output_ids", task.inputs.output_ids)
        note = self._ask("build", case=task.case.name, inputs=task.inputs.name)

        def draw(buffer: int) -> Tensor:
            return torch.tensor(self._ask("draw", buffer=buffer))

        def distribution(buffer: int) -> Tensor:
            self._ask("distribution", buffer=buffer)
            return torch.from_numpy(np.load(Path(self._folder.name, "distribution.npy")))

        def run(order: Sequence[int]) -> int:
            return int(self._ask("run", order=list(order), clock=clock))

        return Contender(draw, draw, distribution, note), run

    def _save(self, name: str, tensor: Tensor) -> None:
        np.save(Path(self._folder.name, f"{name}.npy"), tensor.cpu().numpy())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


# ---- The process ---------------------------------------------------------------------------------


class Answers:
    """A method for every question; an AbsentError is sent back as the answer."""

    def __init__(self, provider: Provider, device: str, folder: Path) -> None:
        self.provider, self.device, self.folder = provider, device, folder
        self.buffers: list[Tensor] = []
        self.contender: Contender | None = None

    def version(self, threads: int) -> str:
        found = self.provider.version(self.device)
        torch.set_num_threads(threads)  # a provider may change it when it is imported
        return found

    def load(self, number: int, dtype: str) -> None:
        names = [f"logits{index}" for index in range(number)]
        self.buffers = [self._tensor(name).to(DTYPES[dtype]) for name in names]

    def build(self, case: str, inputs: str) -> str:
        ids = self._tensor("prompt_ids"), self._tensor("output_ids")
        task = Task(CASES[case], Inputs(inputs, self.buffers, *ids))
        self.contender = self.provider.build(task)
        return self.contender.note

    def draw(self, buffer: int) -> Any:
        assert self.contender is not None
        assert self.contender.draw is not None
        return self.contender.draw(buffer).tolist()

    def distribution(self, buffer: int) -> None:
        assert self.contender is not None
        assert self.contender.distribution is not None
        found = self.contender.distribution(buffer).cpu().numpy()
        np.save(self.folder / "distribution.npy", found)

    def run(self, order: list[int], clock: str) -> int:
        assert self.contender is not None
        return runner(self.contender, clock)(order)

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy")).to(self.device)


def main(name: str, device: str, folder: str) -> None:
    """Answer until the parent closes the pipe."""
    answers = Answers(PROVIDERS[name], device, Path(folder))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a provider prints must not be taken for an answer
    for line in sys.stdin:
        question, details = json.loads(line)
        answer: Callable[..., Any] = getattr(answers, question)
        try:
            reply = [None, answer(**details)]
        except Exception as error:  # any error of a peer is the reason why it is not timed
            traceback.print_exc()
            is_own = isinstance(error, AbsentError)
            reply = [str(error) if is_own else f"{type(error).__name__}: {error}", None]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
