"""Does every backend change histories as torch does, and use them as the reference does?"""

from __future__ import annotations

import pytest
import torch
from cases import EVERY_BACKEND, INTERPRETED, device_of
from histories import KINDS, TURNS, assert_drawings, assert_updates

from llm_sampling import backends
from llm_sampling.backends.base import BackendModule

every_backend = pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
kinds = pytest.mark.parametrize("kind", KINDS)
vocab_sizes = pytest.mark.parametrize("vocab_size", [1, 33, 1000], ids="V{}".format)


def module_of(name: str) -> BackendModule:
    return backends.resolve(name, torch.device(device_of(name)))


def seeds(backend: str, most: int) -> range:
    """Return several seeds, but one for Triton's interpreter, which is slow."""
    return range(1 if backend in INTERPRETED else most)


@every_backend
@kinds
@vocab_sizes
def test_updates(backend: str, kind: str, vocab_size: int) -> None:
    for seed in seeds(backend, 4):
        assert_updates(module_of(backend), kind, vocab_size, seed, device_of(backend))


@every_backend
@kinds
@vocab_sizes
@pytest.mark.parametrize("turn", range(TURNS))
def test_drawings(backend: str, kind: str, vocab_size: int, turn: int) -> None:
    for seed in seeds(backend, 3):
        assert_drawings(module_of(backend), kind, vocab_size, seed, device_of(backend), [turn])
