"""Logits through which a call comes within another call, as from a signal handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Intruder(Tensor):
    """Logits that make a call of their own when a Sampler asks for their layout."""

    intrude: Callable[[], object]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.layout:
            args[0].intrude()
        return super().__torch_function__(func, types, args, kwargs or {})


def intruding(logits: Tensor, intrude: Callable[[], object]) -> Intruder:
    """Return a copy of the logits that makes this call when a Sampler looks at them."""
    copy: Intruder = logits.clone().as_subclass(Intruder)  # type: ignore[no-untyped-call]
    copy.intrude = intrude
    return copy
