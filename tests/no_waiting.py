"""A guard against operations that would wait for a device, where everything is on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _NoWaiting(TorchDispatchMode):
    """Raise for operations that wait for a device: reads of values, and data-dependent shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        if name in ("index", "index_put", "index_put_"):
            waits = any(part is not None and part.dtype == torch.bool for part in args[1])
        if waits or name == "repeat_interleave":
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _refuse(*_: Any) -> Any:
    raise AssertionError("a copy to the host waits for the device")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Make whatever would wait for a device raise an AssertionError."""
    with _NoWaiting(), pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, _refuse)
        yield
