"""Hugging Face: the LogitsProcessorList of ``generate``, softmax, multinomial; argmax if greedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import Contender, Task
from benchmarks.providers.grouped import add_count_penalties, in_place, of_rows
from llm_sampling import SamplingParams


def version(option: str, device: str) -> str:
    """Transformers' version."""
    import transformers
    from transformers.generation import logits_process  # noqa: F401

    return f"transformers {transformers.__version__}"


def build(option: str, task: Task) -> Contender:
    """Its processors in ``generate``'s order, called as ``generate`` calls them."""
    case, inputs, buffers = task.case, task.inputs, task.inputs.buffers
    input_ids: Any = torch.cat([inputs.prompt_ids, inputs.output_ids], dim=1)
    groups = task.groups()
    rows = [index for _, index in groups]
    chains = [_chain(params) for params, _ in groups]

    def scores_of(buffer: int, group: int) -> Tensor:
        params, index = groups[group]
        x, ids, output = of_rows((buffers[buffer], input_ids, inputs.output_ids), index)
        x = x.float()  # generate's own first step
        if params.repetition_penalty != 1:
            x = chains[group][0](ids, x)
        x = add_count_penalties(x, output, params)
        for processor in chains[group][1:]:
            x = processor(ids, x)
        return x

    def call(buffer: int) -> Any:
        logprobs = torch.log_softmax(buffers[buffer].float(), -1) if case.logprobs else None
        drawn = [
            _draw(scores_of(buffer, group), params, case.num_samples)
            for group, (params, _) in enumerate(groups)
        ]
        tokens = in_place(drawn, rows)
        return tokens, None if logprobs is None else logprobs.gather(1, tokens)

    def distribution(buffer: int) -> Tensor:
        parts = []
        for group, (params, _) in enumerate(groups):
            scores = scores_of(buffer, group)
            if params.temperature == 0:
                best = scores.argmax(-1, keepdim=True)
                scores = torch.full_like(scores, -torch.inf).scatter(1, best, 0.0)
            parts.append(torch.softmax(scores, -1))
        return in_place(parts, rows)

    return Contender(call, lambda buffer: call(buffer)[0], distribution, _note(task))


def _chain(params: SamplingParams) -> list[Any]:
    """Its processors; first the repetition penalty or None, after which missing ones are added."""
    from transformers.generation import logits_process as hf

    first = None
    if params.repetition_penalty != 1:
        first = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    chain = hf.LogitsProcessorList()
    if params.temperature not in (0, 1):
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    return [first, *chain]


def _draw(scores: Tensor, params: SamplingParams, num_samples: int) -> Tensor:
    if params.temperature == 0:
        return scores.argmax(-1, keepdim=True)
    probabilities = torch.softmax(scores, dim=-1)
    # generate draws one token, for which replacement makes no difference
    return torch.multinomial(probabilities, num_samples, replacement=num_samples > 1)


def _note(task: Task) -> str:
    notes = []
    if any(row.frequency_penalty or row.presence_penalty for row in task.case.params):
        notes.append("frequency and presence penalties added in plain torch")
    if len(task.case.params) > 1:
        notes.append("a call for each set of parameters")
    if task.case.logprobs:
        notes.append("logprobs added in plain torch")
    return "; ".join(notes)
