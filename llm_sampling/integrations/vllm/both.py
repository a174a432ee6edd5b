"""What V1 and V2 share: what is accepted and refused, the mapping of parameters, the log."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling.fields import FIELDS
from llm_sampling.history import MAX_VOCAB_SIZE
from llm_sampling.integrations.engine import Reliance, fresh_seed
from llm_sampling.params import SamplingParams

#: A child of vLLM's logger, so that vLLM's handlers print it.
LOG = logging.getLogger("vllm.llm_sampling")
#: The releases of vLLM that the plug-in is tested with.
TESTED = ("0.32", "0.33")

#: What both runners read of vLLM's configuration and of a request.
FIELDS_OF_BOTH = {
    "vllm.config:VllmConfig": "model_config scheduler_config speculative_config kv_transfer_config",
    "vllm.config:SchedulerConfig": "max_num_seqs async_scheduling",
    "vllm.sampling_params:SamplingParams": (
        "temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty seed"
    ),
}

#: vLLM treats a temperature below this as greedy.
_GREEDY_BELOW = 1e-5
#: vLLM's repetition penalty is a float64 and the kernel's a float32: the range of positive float32.
_LEAST_PENALTY, _LARGEST_PENALTY = 2.0**-149, torch.finfo(torch.float32).max
#: What no request of vLLM can ask for, so that :func:`params_of` leaves it off.
_NOT_VLLMS = {f.name for f in FIELDS.values() if f.kind == "scope"}

#: Values of :class:`~llm_sampling.SamplingParams` that turn penalties, or filters, off.
NO_PENALTY = {f.name: f.off for f in FIELDS.values() if f.kind == "penalty"}
NO_FILTER = {f.name: f.off for f in FIELDS.values() if f.kind in ("rank", "mass", "depth")}


def params_of(theirs: Any, seed: int | None = None) -> SamplingParams:
    """A request's parameters as :class:`~llm_sampling.SamplingParams`, with a seed.

    What changes logits before the penalties, such as ``logit_bias``, is left to vLLM.

    Args:
        theirs: a ``vllm.SamplingParams``.
        seed: for a request that has none. Default: a fresh one from torch's default generator,
            which vLLM seeds with the engine's ``seed``.
    """
    greedy = theirs.temperature < _GREEDY_BELOW
    if theirs.seed is not None:
        seed = theirs.seed
    elif seed is None:
        seed = 0 if greedy else fresh_seed()
    return SamplingParams(
        temperature=0.0 if greedy else float(theirs.temperature),
        top_k=int(theirs.top_k),
        top_p=float(theirs.top_p),
        min_p=float(theirs.min_p),
        repetition_penalty=min(max(theirs.repetition_penalty, _LEAST_PENALTY), _LARGEST_PENALTY),
        frequency_penalty=float(theirs.frequency_penalty),
        presence_penalty=float(theirs.presence_penalty),
        seed=int(seed) % 2**64,  # vLLM takes negative ones
    )


def not_greedy(params: SamplingParams) -> SamplingParams:
    """A greedy row at temperature 1, for "processed" logprobs: vLLM shows all of such a row."""
    return replace(params, temperature=params.temperature or 1.0)


class Warnings:
    """Warnings in vLLM's log, each of them once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, what: str) -> None:
        """Log a warning, unless it has been logged."""
        if what not in self._given:
            self._given.add(what)
            LOG.warning("llm_sampling: %s", what)

    def look_for_unread(self, theirs: Any) -> None:
        """Warn if a request asks in ``extra_args`` for what :func:`params_of` does not read."""
        unread = _NOT_VLLMS & set(getattr(theirs, "extra_args", None) or ())
        if unread:
            self.warn(
                f"extra_args of a request has {', '.join(sorted(unread))}, which this plug-in "
                "does not read: penalties are vLLM's, of all of the prompt and the output"
            )

    def token_for_each(self, tokens: Tensor) -> Tensor:
        """``tokens`` with 0 where a row has none, since a -1 would end vLLM's engine."""
        # Elsewhere than on the CPU this check would wait for the device.
        if tokens.device.type == "cpu" and bool((tokens < 0).any()):
            self.warn("logits left a request no token (all of them NaN or -inf): it gets token 0")
        return tokens.clamp(min=0)


def is_accepted(reliance: Reliance, runner: str) -> bool:
    """Whether this vLLM has all that is relied on; if not, one warning says what is different.

    Args:
        reliance: what is relied on.
        runner: "V1" or "V2"; a process may import both, and runs one.
    """
    reason = reliance.difference()
    if reason is not None:
        refuse(f"{runner} runner: {reason}")
        return False
    version = str(getattr(sys.modules.get("vllm"), "__version__", "of no version"))
    if not version.startswith(tuple(f"{release}." for release in TESTED)):
        LOG.info(
            "llm_sampling: this vLLM is %s and has all that the plug-in relies on; it was tested "
            "with %s",
            version,
            " and ".join(TESTED),
        )
    return True


def refuse(reason: str) -> None:
    """Warn that vLLM's own sampler draws."""
    LOG.warning("llm_sampling: vLLM keeps its own sampler: %s", reason)


def why_not_here(vllm_config: Any) -> str | None:
    """Why the kernel cannot draw for an engine of this config; None if it can."""
    if vllm_config.scheduler_config.async_scheduling and vllm_config.kv_transfer_config is not None:
        return (
            "kv_transfer_config: blocks that cannot be loaded take back tokens that the host does "
            "not know; async_scheduling=False (--no-async-scheduling) turns that off"
        )
    vocab_size = vllm_config.model_config.get_vocab_size()
    if vocab_size > MAX_VOCAB_SIZE:
        return f"vocab_size: it must be in 1 .. 2^20, got {vocab_size}"
    return None
