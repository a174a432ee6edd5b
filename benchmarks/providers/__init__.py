"""The providers that are timed, in one table. Their files say what a call is and what it lacks.

A provider is built for one case on its inputs and gives a Contender. For one that needs an
environment of its own, worker.py does so in a process there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import AbsentError, Inputs
from llm_sampling import SamplingParams
from llm_sampling.backends import BACKENDS


@dataclass(frozen=True)
class Task:
    """One case on its inputs.

    Attributes:
        case: the parameters.
        inputs: the tensors.
    """

    case: Case
    inputs: Inputs

    @property
    def params(self) -> list[SamplingParams]:
        """The parameters of every row."""
        return self.case.row_params(self.inputs.rows)

    def groups(self) -> list[tuple[SamplingParams, Tensor | None]]:
        """Parameters and the rows that have them, for providers that take one set per call.

        The rows are None where all rows have the same parameters.
        """
        number = len(self.case.params)
        if min(number, self.inputs.rows) == 1:
            return [(self.case.params[0], None)]
        device = self.inputs.device
        return [
            (params, torch.arange(first, self.inputs.rows, number, device=device))
            for first, params in enumerate(self.case.params)
            if first < self.inputs.rows
        ]


@dataclass(frozen=True)
class Contender:
    """A provider made ready for one case on its inputs.

    Attributes:
        call: what is timed: draws from the buffer with this index.
        draw: new tokens from the buffer with this index, int64 ``(rows, draws)``, always with the
            history as it was given; None for a limit, which draws none.
        distribution: the probabilities that it draws from, by the provider's own stages:
            ``(rows, vocab_size)``, 0 where a token is not kept; rows sum to 1.
        note: which stages were added to the provider's own, or are missing.
        restore: restores a buffer for a provider that changes its input; not timed.
        check: a further check, which raises WrongAnswerError.
        threads: the threads that it is timed on; None for as many as the run has.
    """

    call: Callable[[int], object]
    draw: Callable[[int], Tensor] | None = None
    distribution: Callable[[int], Tensor] | None = None
    note: str = ""
    restore: Callable[[int], None] | None = None
    check: Callable[[], None] | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes:
        name: what ``--providers`` calls it.
        module: the module of this package that has its ``build`` and ``version``.
        devices: where it can run.
        environment: a name of environments.py, or "" for the environment of the run.
        option: passed to ``build`` besides the task.
        is_limit: whether it is not a sampler but an operation to compare with.
        is_variant: whether it is a variant of a peer that is timed already.
        by_default: whether it is timed where no providers are named.
    """

    name: str
    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    environment: str = ""
    option: str = ""
    is_limit: bool = False
    is_variant: bool = False
    by_default: bool = True

    def version(self, device: str) -> str:
        """Its version, as tables show it.

        Raises:
            AbsentError: it cannot run here; the message says why.
        """
        if device not in self.devices:
            raise AbsentError(f"it does not run on {device}")
        module = importlib.import_module(f"benchmarks.providers.{self.module}")
        try:
            version: str = module.version(self.option, device)
        except AbsentError:
            raise
        except Exception as error:  # an optional package may fail in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise AbsentError(reason) from error
        return version

    def build(self, task: Task) -> Contender:
        """Make it ready for a task.

        Raises:
            AbsentError: it cannot do this task.
        """
        module = importlib.import_module(f"benchmarks.providers.{self.module}")
        contender: Contender = module.build(self.option, task)
        return contender


def sampler_of(backend: str) -> str:
    """The name of a backend's prepared Sampler."""
    return f"{backend}:Sampler"


HUGGING_FACE, VLLM, LLAMA_CPP = "huggingface", "vllm", "llama.cpp"
PLAIN_TORCH, COMPILED = "plain-torch", "plain-torch, compiled"
AMAX, SOFTMAX, COPY = "amax", "softmax", "copy"
TWO_THREADS = "cpu:Sampler, 2 threads"


def _table() -> dict[str, Provider]:
    table = []
    for backend in BACKENDS.values():
        devices = tuple(sorted(backend.device_types or {"cpu", "cuda"}))
        chosen = backend.name != "torch"  # the reference is not meant to be fast
        table.append(
            Provider(
                sampler_of(backend.name), "ours", devices, option=backend.name, by_default=chosen
            )
        )
    table += [
        Provider(TWO_THREADS, "ours", ("cpu",), option="cpu/2", by_default=False),
        Provider(HUGGING_FACE, "huggingface"),
        Provider(PLAIN_TORCH, "plain_torch"),
        Provider(COMPILED, "plain_torch", option="compiled", is_variant=True),
        Provider("exponential-race", "plain_torch", option="race", is_variant=True),
        Provider(VLLM, "vllm", ("cpu", "cuda"), "vllm"),
        Provider(LLAMA_CPP, "llama_cpp", ("cpu",), "llama-cpp"),
        Provider("flashinfer", "flashinfer", ("cuda",)),
        Provider("flashinfer, scalars", "flashinfer", ("cuda",), option="scalar"),
        Provider("flashinfer, joint", "flashinfer", ("cuda",), option="joint"),
        Provider("flashinfer, cake", "flashinfer", ("cuda",), option="cake"),
        Provider("sglang", "sglang", ("cuda",)),
        Provider(AMAX, "limits", option="amax", is_limit=True),
        Provider(SOFTMAX, "limits", option="softmax", is_limit=True),
        Provider(COPY, "limits", option="copy", is_limit=True),
    ]
    return {provider.name: provider for provider in table}


PROVIDERS: Mapping[str, Provider] = MappingProxyType(_table())
