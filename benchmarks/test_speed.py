"""The CPU kernel by pytest-benchmark, to compare commits on one machine.

``pytest benchmarks --benchmark-only --benchmark-save=NAME`` at one commit, and at another
``pytest benchmarks --benchmark-only --benchmark-compare``. One thread, V = 128,256.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, COMPARED
from benchmarks.inputs import Inputs, make_buffers, make_inputs
from benchmarks.providers import PROVIDERS, Task, sampler_of

VOCAB_SIZE = 128256


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Time does not depend on how many cores are idle."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _buffers(name: str, rows: int) -> list[torch.Tensor]:
    return make_buffers(name, rows, VOCAB_SIZE)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["model", "flat"])
@pytest.mark.parametrize("case", COMPARED)
def test_sampler(benchmark: Any, name: str, rows: int, case: str) -> None:
    """A step of a decode loop."""
    inputs: Inputs = make_inputs(name, _buffers(name, rows), CASES[case])
    contender = PROVIDERS[sampler_of("cpu")].build(Task(CASES[case], inputs))
    steps = itertools.count()
    number = len(inputs.buffers)
    benchmark.group = f"{name}, {rows} rows"
    benchmark(lambda: contender.call(next(steps) % number))
