"""vLLM: the kernel in place of the samplers of its model runners.

    LLM_SAMPLING_VLLM=1 vllm serve MODEL

vLLM calls :func:`register`, by the entry point ``vllm.general_plugins``, in each of its processes.
When a process imports a model runner, V1 or V2, names of that module are replaced, for which vLLM
has no plug-in point. If this vLLM differs from what the plug-in relies on, nothing is replaced, and
one warning names the difference.

Importing this package does not import vLLM. docs/engines/vllm.md says what remains vLLM's own, what
is refused, and what differs from vLLM's sampler.
"""

from __future__ import annotations

from llm_sampling.integrations.engine import is_awaited, when_imported
from llm_sampling.integrations.vllm import v1, v2
from llm_sampling.integrations.vllm.both import LOG

__all__ = ["LOG", "SWITCH", "register", "v1", "v2"]

SWITCH = "LLM_SAMPLING_VLLM"


def register() -> None:
    """Have vLLM's model runners draw by the kernel, if ``LLM_SAMPLING_VLLM`` is 1.

    It does not import vLLM. A second call has no effect.
    """
    if LOG.is_on(SWITCH) and not is_awaited(v1.RUNNER):
        when_imported({v1.RUNNER: v1.replace_names, v2.RUNNER: v2.replace_names})
