"""Operations to compare samplers with: reading, normalising and copying a row."""

from __future__ import annotations

import torch

from benchmarks.oracle import WrongAnswerError
from benchmarks.providers import Contender, Task


def version(option: str, device: str) -> str:
    """Torch's version."""
    return f"torch {torch.__version__}"


def build(option: str, task: Task) -> Contender:
    """``option`` is one of amax, softmax, copy."""
    buffers = task.inputs.buffers
    target = torch.empty_like(buffers[0])
    calls = {
        "amax": lambda buffer: buffers[buffer].amax(-1),
        "softmax": lambda buffer: torch.softmax(buffers[buffer], -1),
        "copy": lambda buffer: target.copy_(buffers[buffer]),
    }
    expected = {
        "amax": lambda x: x.amax(-1),
        "softmax": lambda x: torch.softmax(x, -1),
        "copy": lambda x: x,
    }

    def check() -> None:
        for buffer, logits in enumerate(buffers):
            found, wanted = calls[option](buffer).double(), expected[option](logits.double())
            if not torch.allclose(found, wanted, rtol=1e-2 if logits.element_size() == 2 else 1e-4):
                raise WrongAnswerError(f"not the {option} in float64")

    return Contender(calls[option], check=check)
