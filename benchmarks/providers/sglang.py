"""SGLang's functions, in the order that its Sampler calls them on a GPU.

Temperature and softmax in torch; then, unfiltered, an exponential race; with min-p, top-k and
top-p renormalised by sgl_kernel and FlashInfer's min-p; else FlashInfer's joint top-k and top-p. It
scales the logits that it is given in place, so each buffer is restored before a call, outside of
the clock.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import AbsentError
from benchmarks.providers import Contender, Task
from benchmarks.providers.grouped import RowTensors, add_penalties

DISTRIBUTIONS = ("sglang-kernel", "flashinfer-python")


def version(option: str, device: str) -> str:
    """The kernels' and FlashInfer's versions."""
    import flashinfer.sampling  # type: ignore[import-not-found]  # noqa: F401
    import sgl_kernel  # type: ignore[import-not-found]  # noqa: F401

    found = [f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS]
    return ", ".join(found)


def build(option: str, task: Task) -> Contender:
    """The functions that fit the parameters."""
    from flashinfer.sampling import min_p_sampling_from_probs, top_k_top_p_sampling_from_probs
    from sgl_kernel import top_k_renorm_prob, top_p_renorm_prob

    case, inputs = task.case, task.inputs
    if case.num_samples > 1:
        raise AbsentError("it draws one token a row")
    rows = RowTensors(task)
    originals = inputs.buffers
    buffers = [logits.to(torch.float32, copy=True) for logits in originals]  # its own first step
    temperature = torch.ones(1, 1, device=inputs.device)
    if rows.temperature is not None:
        temperature = rows.temperature

    def restore(buffer: int) -> None:
        buffers[buffer].copy_(originals[buffer])

    def probabilities(buffer: int) -> Tensor:
        x = buffers[buffer]
        x = add_penalties(x, inputs.prompt_ids, inputs.output_ids, case.params[0])
        x.div_(temperature)
        x[:] = torch.softmax(x, -1)
        return x

    def draw_from(buffer: int) -> Tensor:
        if rows.all_greedy:
            return buffers[buffer].argmax(-1)
        probs = probabilities(buffer)
        if not (rows.has_top_k or rows.has_top_p or rows.has_min_p):
            noise = torch.empty_like(probs).exponential_(1.0)
            noise.clamp_min_(torch.finfo(torch.float32).tiny)
            return (probs / noise).argmax(-1)
        if rows.has_min_p:
            probs = top_k_renorm_prob(probs, rows.top_k)
            probs = top_p_renorm_prob(probs, rows.top_p)
            return min_p_sampling_from_probs(probs, rows.min_p)
        return top_k_top_p_sampling_from_probs(
            probs.contiguous(), rows.top_k, rows.top_p, filter_apply_order="joint"
        )

    def call(buffer: int) -> Any:
        logprobs = torch.log_softmax(buffers[buffer], -1) if case.logprobs else None
        tokens = draw_from(buffer).view(inputs.rows, 1)
        return tokens, None if logprobs is None else logprobs.gather(1, tokens.long())

    def draw(buffer: int) -> Tensor:
        restore(buffer)
        tokens: Tensor = call(buffer)[0]
        return tokens.long()

    def distribution(buffer: int) -> Tensor:
        restore(buffer)
        if rows.all_greedy:
            best = buffers[buffer].argmax(-1, keepdim=True)
            return torch.zeros_like(buffers[buffer]).scatter(1, best, 1.0)
        probs = probabilities(buffer).clone()
        of_k = top_k_renorm_prob(probs, rows.top_k)
        of_p = top_p_renorm_prob(of_k if rows.has_min_p else probs, rows.top_p)
        probs = probs * ((of_k > 0) & (of_p > 0))
        least = rows.min_p.unsqueeze(1) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
        return probs / probs.sum(-1, keepdim=True)

    return Contender(call, draw, distribution, rows.note, restore)
