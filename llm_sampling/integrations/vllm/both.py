"""What V1 and V2 share: what is accepted and refused, the mapping of parameters, the log."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llm_sampling.fields import FIELDS
from llm_sampling.history import MAX_VOCAB_SIZE
from llm_sampling.integrations.engine import LARGEST, LEAST, EngineLog, Warnings, fresh_seed
from llm_sampling.params import SamplingParams

LOG = EngineLog("vLLM", "vllm", ("0.32", "0.33"))

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
#: What vLLM has no parameter for, so that a request asks for it in ``extra_args``. V1 reads it all.
READ_BY_V1 = {f.name for f in FIELDS.values() if f.kind in ("scope", "rule", "sequences")}
READ_BY_V1 -= {"bad_words", "min_tokens", "stop_token_ids"}  # which vLLM itself sees to
#: What V2 reads of it, whose tables do not have the ids in order.
READ_BY_V2 = {"repetition_penalty_scope"}


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
        temperature=0.0 if greedy else min(float(theirs.temperature), LARGEST),
        top_k=int(theirs.top_k),
        top_p=float(theirs.top_p),
        min_p=float(theirs.min_p),
        repetition_penalty=min(max(theirs.repetition_penalty, LEAST), LARGEST),
        frequency_penalty=float(theirs.frequency_penalty),
        presence_penalty=float(theirs.presence_penalty),
        seed=int(seed) % 2**64,  # vLLM takes negative ones
    )


def not_greedy(params: SamplingParams) -> SamplingParams:
    """A greedy row at temperature 1, for "processed" logprobs: vLLM shows all of such a row."""
    return replace(params, temperature=params.temperature or 1.0)


def with_extra(
    params: SamplingParams, theirs: Any, read: Collection[str], warnings: Warnings
) -> SamplingParams:
    """The parameters with what the request asks for in ``extra_args``.

    A warning says what is left out: what the runner does not read, or all if a value is wrong.

    Args:
        params: as :func:`params_of` gives them.
        theirs: a ``vllm.SamplingParams``. Its ``dry_breakers`` may be a flat list of ids too, each
            of them a breaker, since an HTTP request can hold no other.
        read: the names that the runner reads.
        warnings: where it goes.
    """
    given = getattr(theirs, "extra_args", None) or {}
    extra = {name: given[name] for name in sorted(READ_BY_V1 & set(given))}
    if unread := [name for name in extra if name not in read]:
        warnings.warn(
            f"extra_args of a request has {', '.join(unread)}, which this runner does not read"
        )
    extra = {name: value for name, value in extra.items() if name in read}
    breakers = extra.get("dry_breakers")
    if isinstance(breakers, (list, tuple)):
        alone = [one if isinstance(one, (list, tuple)) else [one] for one in breakers]
        extra["dry_breakers"] = alone
    try:
        return replace(params, **extra) if extra else params
    except ValueError as error:  # it would end the engine here
        # without the place and the value, so that there are not as many warnings as requests
        rule = re.sub(r"\[\d+\]", "", str(error).partition(", got ")[0])
        warnings.warn(f"{', '.join(extra)} of extra_args are left out: {rule}")
        return params


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
