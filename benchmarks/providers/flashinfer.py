"""FlashInfer's sampling functions on logits, with a tensor for each parameter as servers call them.

``option`` is "" for its rejection samplers, "scalar" for the same with numbers where all rows have
the same parameters, which opens a faster path, "joint" for top-k and top-p at once, "cake" for
``flashinfer.cake_sampling``, which needs a top-k. What they lack is plain torch: penalties, the
temperature, the softmax where they take probabilities, logprobs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import AbsentError
from benchmarks.providers import Contender, Task
from benchmarks.providers.grouped import RowTensors, add_penalties


def version(option: str, device: str) -> str:
    """FlashInfer's version."""
    import flashinfer  # type: ignore[import-not-found]

    if option == "cake":
        import flashinfer.cake_sampling
    return f"flashinfer {flashinfer.__version__}"


def build(option: str, task: Task) -> Contender:
    """The functions that fit the parameters."""
    from flashinfer import sampling

    case, inputs = task.case, task.inputs
    rows = RowTensors(task)
    if option == "scalar" and len(case.params) > 1:
        raise AbsentError("the rows have different parameters")
    if option == "cake" and not (rows.has_top_k and not rows.has_min_p):
        raise AbsentError("it takes top-k with or without top-p")
    if option == "joint" and not (rows.has_top_k and rows.has_top_p and not rows.has_min_p):
        raise AbsentError("it is for top-k with top-p")
    scalar = option == "scalar"
    k: Any = int(rows.top_k[0]) if scalar else rows.top_k
    p: Any = case.params[0].top_p if scalar else rows.top_p
    min_p: Any = case.params[0].min_p if scalar else rows.min_p
    largest_k = int(rows.top_k.max())
    repeated = None
    if case.num_samples > 1:
        index = torch.arange(inputs.rows, device=inputs.device, dtype=torch.int32)
        repeated = index.repeat_interleave(case.num_samples)
        if option == "cake":
            raise AbsentError("it draws one token a row")

    def draw_from(x: Tensor) -> Tensor:
        if rows.all_greedy:
            return x.argmax(-1)
        if option == "cake":
            from flashinfer import cake_sampling

            return cake_sampling.top_k_top_p_sampling_from_probs(
                torch.softmax(x, -1), k, p, top_k_max=largest_k
            )
        if rows.has_min_p:
            probs = torch.softmax(x, -1)
            if rows.has_top_k:
                probs = sampling.top_k_renorm_probs(probs, k)
            if rows.has_top_p:
                probs = sampling.top_p_renorm_probs(probs, p)
            return sampling.min_p_sampling_from_probs(probs, min_p, repeated)
        if rows.has_top_k:
            order = "joint" if option == "joint" else "top_k_first"
            return sampling.top_k_top_p_sampling_from_logits(
                x, k, p, repeated, filter_apply_order=order
            )
        if rows.has_top_p:
            return sampling.top_p_sampling_from_probs(torch.softmax(x, -1), p, repeated)
        return sampling.sampling_from_logits(x, repeated)

    def processed(buffer: int) -> Tensor:
        x = inputs.buffers[buffer].float()
        x = add_penalties(x, inputs.prompt_ids, inputs.output_ids, case.params[0])
        return x if rows.temperature is None else x / rows.temperature

    def call(buffer: int) -> Any:
        tokens = draw_from(processed(buffer)).view(inputs.rows, -1)
        if not case.logprobs:
            return tokens, None
        logprobs = torch.log_softmax(inputs.buffers[buffer].float(), -1)
        return tokens, logprobs.gather(1, tokens.long())

    def distribution(buffer: int) -> Tensor:
        x = processed(buffer)
        probs = torch.softmax(x, -1)
        if rows.all_greedy:
            return torch.zeros_like(x).scatter(1, x.argmax(-1, keepdim=True), 1.0)
        kept = torch.ones_like(x, dtype=torch.bool)
        left = probs
        if rows.has_top_k:
            left = sampling.top_k_renorm_probs(probs, k)
            kept &= left > 0
        if rows.has_top_p:
            kept &= sampling.top_p_renorm_probs(probs if option == "joint" else left, p) > 0
        probs = probs * kept
        if rows.has_min_p:
            least = rows.min_p.unsqueeze(1) * probs.amax(-1, keepdim=True)
            probs = probs.masked_fill(probs < least, 0.0)
        return probs / probs.sum(-1, keepdim=True)

    return Contender(call, lambda buffer: call(buffer)[0].long(), distribution, rows.note)
