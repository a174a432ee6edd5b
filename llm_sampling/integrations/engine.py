"""What the plug-ins for engines share: a look at the engine, its log, and its first import.

A plug-in replaces names of an engine's module right after the module's first import, if the engine
has all that the plug-in relies on. Nothing here imports an engine before the engine does.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends.base import BackendModule
from llm_sampling.fields import FIELDS
from llm_sampling.params import fresh_seeds
from llm_sampling.tensors import to_device

Actions = Mapping[str, Callable[[ModuleType], None]]

#: Values of :class:`~llm_sampling.SamplingParams` that turn rules that look at the history,
#: penalties and these, or filters, off.
NO_RULE = {f.name: f.off for f in FIELDS.values() if f.kind == "rule"}
NO_PENALTY = {f.name: f.off for f in FIELDS.values() if f.kind == "penalty"} | NO_RULE
NO_FILTER = {f.name: f.off for f in FIELDS.values() if f.kind in ("rank", "mass", "depth")}
#: The range of positive float32, for numbers of engines that are float64 there.
LEAST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max


def find(place: str) -> Any:
    """The object at ``module:attribute.of.attribute``; the module is imported.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, names = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name)
    return found


@dataclass(frozen=True)
class Reliance:
    """What a plug-in relies on in an engine, by ``module:attribute.of.attribute``.

    Attributes:
        signatures: functions that are called or overridden, with their parameters in order; a "*"
            at the end stands for any that follow.
        fields: records and functions, with those of their fields or parameters that are used.
        lookups: functions that are relied on to call something or to read an attribute, with the
            names of these. Patch releases and vendors' builds have the same version, a signature
            does not show what a body does, and to run one takes an engine. So the names that the
            compiled function refers to are compared; a search of its source would also find them
            in comments, and where it calls nothing.
    """

    signatures: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    lookups: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> list[str]:
        """All that is looked at."""
        return [*self.signatures, *self.fields, *self.lookups]

    def difference(self) -> str | None:
        """How the engine differs from this; None if it does not. Imports the modules."""
        try:
            for place, names in self.signatures.items():
                found, wanted = [*inspect.signature(find(place)).parameters], names.split()
                if wanted[-1:] == ["*"]:
                    found = [*found[: len(wanted) - 1], "*"]
                if found != wanted:
                    return f"{place} takes ({' '.join(found)}), and not ({names})"
            for place, names in self.fields.items():
                fields = inspect.signature(find(place)).parameters
                if missing := [name for name in names.split() if name not in fields]:
                    return f"{place} has no {', '.join(missing)}"
            for place, names in self.lookups.items():
                known = inspect.unwrap(find(place)).__code__.co_names
                if missing := [name for name in names.split() if name not in known]:
                    return f"{place} does not look up {', '.join(missing)}"
        except Exception as error:  # whatever is wrong, the engine must start
            return str(error) or type(error).__name__
        return None


class EngineLog:
    """What a plug-in says in its engine's log.

    Args:
        engine: the engine's name.
        package: that the engine is imported from; its handlers print what the plug-in logs.
        tested: the releases that the plug-in is tested with, such as "0.32".
    """

    def __init__(self, engine: str, package: str, tested: Sequence[str]) -> None:
        self.engine = engine
        self.tested = tested
        self._package = package
        self._log = logging.getLogger(f"{package}.llm_sampling")

    def refuse(self, reason: str) -> None:
        """Warn that the engine's own sampler draws."""
        self._log.warning("llm_sampling: %s keeps its own sampler: %s", self.engine, reason)

    def warn(self, what: str) -> None:
        """Warn of something else."""
        self._log.warning("llm_sampling: %s", what)

    def draws(self, backend: str) -> None:
        """Say that the kernel draws."""
        self._log.info("llm_sampling draws, by its backend %r", backend)

    def is_on(self, switch: str) -> bool:
        """Whether an environment variable is 1; any value but 0, 1 and "" is warned of."""
        value = os.environ.get(switch, "0")
        if value not in ("", "0", "1"):
            self._log.warning("llm_sampling is off: %s must be 0 or 1, got %r", switch, value)
        return value == "1"

    def accepts(self, reliance: Reliance, part: str = "") -> bool:
        """Whether the engine has all that is relied on; if not, a warning says what differs.

        Args:
            reliance: what is relied on.
            part: what comes before the reason, where an engine has several samplers.
        """
        reason = reliance.difference()
        if reason is not None:
            self.refuse(part + reason)
            return False
        found = str(getattr(sys.modules.get(self._package), "__version__", "of no version"))
        if not f"{found}.".startswith(tuple(f"{release}." for release in self.tested)):
            self._log.info(
                "llm_sampling: this %s is %s and has all that the plug-in relies on; it was tested "
                "with %s",
                self.engine,
                found,
                " and ".join(self.tested),
            )
        return True


class Warnings:
    """Warnings in an engine's log, each of them once.

    Args:
        log: the engine's.
    """

    def __init__(self, log: EngineLog) -> None:
        self._log = log
        self._given: set[str] = set()

    def warn(self, what: str) -> None:
        """Log a warning, unless it has been logged."""
        if what not in self._given:
            self._given.add(what)
            self._log.warn(what)

    def refuse(self, reason: str) -> None:
        """Warn that the engine's own sampler draws, unless it has been logged."""
        if reason not in self._given:
            self._given.add(reason)
            self._log.refuse(reason)

    def token_for_each(self, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        """``tokens`` with 0 where a row has none: engines have no row without a token.

        Args:
            tokens: int64 ``(rows,)``, of :func:`llm_sampling.sample`.
            slots: of the rows; a row whose slot is -1 is no request's, and not warned of.
        """
        # Elsewhere than on the CPU this check would wait for the device.
        if tokens.device.type == "cpu":
            has_none = tokens < 0 if slots is None else (tokens < 0) & (slots >= 0)
            if bool(has_none.any()):
                self.warn(
                    "logits left a request no token (all of them NaN or -inf): it gets token 0"
                )
        return tokens.clamp(min=0)


def when_imported(actions: Actions) -> None:
    """Call each action with its module, right after the module's first import.

    A module that has been imported already is acted on at once. To import the modules here would be
    too early: engines change torch and parts of their own before they import them, and their other
    processes never do.

    Args:
        actions: by the names of the modules.
    """
    waiting = _WhenImported(actions)
    sys.meta_path.insert(0, waiting)
    for name in actions:
        if name in sys.modules:
            waiting.actions.pop(name)(sys.modules[name])


def is_awaited(module: str) -> bool:
    """Whether :func:`when_imported` was called for a module, and it was not imported since."""
    waiting = (finder for finder in sys.meta_path if isinstance(finder, _WhenImported))
    return any(module in finder.names for finder in waiting)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls an action with a module right after the module's first import."""

    def __init__(self, actions: Actions) -> None:
        self.names = frozenset(actions)
        self.actions = dict(actions)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with the action added; None for other modules."""
        if fullname not in self.actions:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)  # if it raises, the next attempt to import it comes here again
                self.actions.pop(fullname)(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def backend_name(backend: BackendModule) -> str:
    """The name of a backend in :data:`llm_sampling.backends.BACKENDS`."""
    modules = {known.module: name for name, known in backends.BACKENDS.items()}
    return modules[vars(backend)["__name__"]]


def fresh_seed() -> int:
    """A seed for a request that has none, from torch's default generator, which engines seed."""
    return int(fresh_seeds(1)) % 2**64


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers as a tensor ``(len(values),)`` on a device, without waiting for the device."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)
