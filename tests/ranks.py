"""Processes that form a group of ranks on this machine and run a test's functions in parallel.

A group is started once for all tests of a module, because importing torch takes longer than the
tests do.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: How many seconds to wait for the answer of a rank.
PATIENCE = 300


class Ranks:
    """A process group of ``size`` processes, one for each rank.

    Args:
        size: the number of ranks.
        timeout: how many seconds a collective operation of the group may take.
        backend: the backend of torch.distributed. With "nccl", rank i uses GPU i.
    """

    def __init__(self, size: int, timeout: float = 60, backend: str = "gloo") -> None:
        # The fork server imports torch, which takes seconds, once for all ranks. It does not use
        # it, because torch's threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, size, store, timeout, backend), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``function(rank, *args)`` of every rank, or :class:`Raised` or :class:`Ended`.

        The function must be defined at the top level of a module, so that it can be pickled.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        return [self._answer(rank) for rank in range(self.size)]

    def _answer(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        if not pipe.poll(PATIENCE):
            raise TimeoutError(f"rank {rank} of {self.size} does not answer")
        try:
            return pipe.recv()
        except EOFError:
            return Ended()

    def close(self) -> None:
        """Stop the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Ended:
    """The answer of a rank whose process has ended."""


class Raised:
    """The answer of a rank on which the function raised."""

    def __init__(self, error: BaseException) -> None:
        self.type = type(error).__name__
        self.message = str(error)
        self.traceback = traceback.format_exc()

    def __repr__(self) -> str:
        return self.traceback


def _serve(
    pipe: Connection, rank: int, size: int, store: str, timeout: float, backend: str
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(rank, *args)
        except BaseException as error:
            answer = Raised(error)
        pipe.send(answer)
