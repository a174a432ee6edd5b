"""What every test shares: the ``backend`` fixture, and memory that cannot pass for a result."""

import pytest
import torch

from llm_sampling.backends import BACKENDS


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """The name of each backend in turn, skipped with the reason where it cannot run on the CPU."""
    reason = BACKENDS[request.param].why_unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every allocation without a value holds NaN or the largest integer, also those made in C++.

    torch does so where deterministic algorithms are asked for; nothing else of that mode matters.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
