"""The table of backends. It is the only place that chooses one; everything else iterates it."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from llm_sampling.backends import first_use
from llm_sampling.backends.base import BackendModule, SampleCall, Size, Step, described
from llm_sampling.backends.first_use import SelfTest
from llm_sampling.history import HistoryUpdate
from llm_sampling.results import SampleOutput

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)  # by identity: what one row has loaded is not another's
class Backend:
    """One row of the table."""

    name: str
    module: str
    is_tested: bool = False  # whether it answers known rows before it is first used on a device
    is_tested_later: bool = False  # whether each of its kernels does so before its first use

    @functools.cached_property
    def _module(self) -> BackendModule | str:
        """The module, or why there is none: one that fails must not take the others with it."""
        try:
            return cast(BackendModule, importlib.import_module(self.module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as SystemExit: what it imports may raise anything
            return f"{self.module} does not import: {described(error)}"

    def load(self) -> BackendModule:
        """Import the backend's module, once; nothing heavy is imported before this.

        Raises:
            RuntimeError: it does not import; the message says why.
        """
        module = self._module
        if isinstance(module, str):
            raise RuntimeError(f"backend {self.name!r} is unavailable: {module}")
        return module

    @property
    def device_types(self) -> frozenset[str] | None:
        """The types of device that it runs on; None for all of torch's."""
        return frozenset() if isinstance(self._module, str) else self._module.DEVICE_TYPES

    def why_unavailable(self, device: torch.device | None = None) -> str | None:
        """None if the backend can run (on ``device``), else the reason."""
        if isinstance(self._module, str):
            return self._module
        try:
            reason = self._module.why_unavailable()
        except Exception as error:
            return described(error)
        types = self.device_types
        if reason is None and device is not None and types is not None and device.type not in types:
            return (
                f"it runs on {' or '.join(sorted(types))} tensors, and the logits are on {device}"
            )
        if reason is None and device is not None:
            return first_use.failure(self.name, first_use.with_index(device))
        return reason

    def why_not(self, device: torch.device) -> str | None:
        """None if the backend is to be used on ``device``, else the reason; tests it at first."""
        reason = self.why_unavailable(device)
        if reason is None and self.is_tested:
            return first_use.why_not(self.name, self.load(), first_use.with_index(device))
        return reason


#: In the order in which ``"auto"`` prefers them.
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend("cpu", "llm_sampling.backends.cpu"),
            Backend("cuda", "llm_sampling.backends.cuda", is_tested=True),
            Backend("triton", "llm_sampling.backends.triton", is_tested_later=True),
            Backend("torch", "llm_sampling.backends.torch"),
        )
    }
)


def check_name(name: str) -> None:
    """A ValueError if it is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}, got {name!r}")


def choose(name: str, device: torch.device) -> Backend:
    """The row of the backend called ``name``, for tensors on ``device``; only ``"auto"`` chooses.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if name == "auto":
        for backend in BACKENDS.values():
            reason = backend.why_not(device)
            if reason is None:
                return backend
            if first_use.failure(backend.name, first_use.with_index(device)) is not None:
                _warn(backend.name, str(device), reason)
        raise RuntimeError(f"no backend runs on {device}")
    check_name(name)
    reason = BACKENDS[name].why_not(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
    return BACKENDS[name]


@functools.cache  # once for each
def _warn(name: str, device: str, reason: str) -> None:
    warnings.warn(f"backend {name!r} is not used on {device}: {reason}", RuntimeWarning, 2)


def resolve(name: str, device: torch.device) -> BackendModule:
    """The module of :func:`choose`'s backend, which raises as that does."""
    backend = choose(name, device)
    if name == "auto" and backend.is_tested_later:
        return _UntilItFails(device)
    return backend.load()


class _UntilItFails:
    """What "auto" chooses on a device, as long as no kernel fails its test before its first use.

    A kernel is tested before it changes anything, so that the next backend can take over. Its
    methods are those of :class:`BackendModule`.
    """

    DEVICE_TYPES: frozenset[str] | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def _module(self) -> BackendModule:
        return choose("auto", self._device).load()

    def _do(self, act: Callable[[BackendModule], _Result]) -> _Result:
        while True:  # each turn has a backend less
            try:
                return act(self._module())
            except first_use.SelfTestError:
                continue

    def why_unavailable(self) -> str | None:
        return None

    def sample(self, call: SampleCall) -> SampleOutput:
        return self._do(lambda module: module.sample(call))

    def filter_logits(self, call: SampleCall) -> Tensor:
        return self._do(lambda module: module.filter_logits(call))

    def update_history(self, update: HistoryUpdate) -> None:
        self._module().update_history(update)

    def prepare_update(self, update: HistoryUpdate) -> Callable[[], None]:
        return self._module().prepare_update(update)

    def known_sizes(self, device: torch.device) -> Sequence[Size]:
        return self._module().known_sizes(device)

    def prepare(self, call: SampleCall) -> Step:
        step, of_rows = self._module().prepare(call), None

        def again(
            logits: Tensor, allowed_mask: Tensor | None, slots: Tensor | None = None
        ) -> SampleOutput:
            nonlocal step, of_rows
            of_rows = of_rows if slots is None else slots
            while True:
                try:
                    return step(logits, allowed_mask, slots)
                except first_use.SelfTestError:
                    step, slots = self._module().prepare(call), of_rows

        return again


class BackendInfo(NamedTuple):
    """A row of :func:`backend_info`.

    Attributes:
        name: of the backend.
        available: whether it runs here, on some device.
        reason: why not; None if it does.
        device_types: the types of device that it runs on; None for all of torch's.
        tests: what its self-tests in this process have found, by device; empty: not tested.
    """

    name: str
    available: bool
    reason: str | None
    device_types: tuple[str, ...] | None
    tests: tuple[SelfTest, ...] = ()


def backend_info() -> list[BackendInfo]:
    """Every backend, whether it works here, and why not if it does not."""
    infos = []
    for backend in BACKENDS.values():
        reason = backend.why_unavailable()
        types = None if backend.device_types is None else tuple(sorted(backend.device_types))
        found = first_use.results(backend.name)
        infos.append(BackendInfo(backend.name, reason is None, reason, types, found))
    return infos


def self_test(device: torch.device | str = "cpu") -> list[SelfTest]:
    """Let every backend answer rows whose tokens are known, on one device.

    Args:
        device: where.

    Returns:
        A :class:`SelfTest` for each backend: how many sizes of calls and rows it has answered, the
        first difference or None, and why it was skipped or None. A backend with a difference is
        not used on that device any more in this process.

    Raises:
        torch.OutOfMemoryError: the device has no room for the rows.

    Example:
        >>> assert all(test.difference is None for test in self_test("cpu"))
    """
    device = first_use.with_index(device)
    found = []
    for backend in BACKENDS.values():
        reason = backend.why_unavailable(device)
        if reason is not None and first_use.failure(backend.name, device) is None:
            found.append(SelfTest(backend.name, str(device), skipped=reason))
        else:
            found.append(first_use.run(backend.name, backend.load(), device))
    return found
