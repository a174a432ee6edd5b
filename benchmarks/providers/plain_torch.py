"""A sampler written in torch: topk or sort, softmax of what is left, and a draw.

``option`` is "" for multinomial, "race" for an exponential race (an argmax of probabilities over
exponential noise, which vLLM's PyTorch path and others use), "compiled" for the former under
``torch.compile``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import Contender, Task
from benchmarks.providers.grouped import add_penalties, in_place, of_rows
from llm_sampling import SamplingParams

Step = Callable[[Tensor, Tensor, Tensor, Sequence["Tensor | None"]], Any]


def version(option: str, device: str) -> str:
    """Torch's version."""
    return f"torch {torch.__version__}"


def build(option: str, task: Task) -> Contender:
    """A Contender of one of the three."""
    case, inputs = task.case, task.inputs
    groups = task.groups()
    rows = [index for _, index in groups]
    step = _compiled(case) if option == "compiled" else _make_step(case, option)

    def call(buffer: int) -> Any:
        return step(inputs.buffers[buffer], inputs.prompt_ids, inputs.output_ids, rows)

    def distribution(buffer: int) -> Tensor:
        parts = []
        for params, index in groups:
            tensors = (inputs.buffers[buffer], inputs.prompt_ids, inputs.output_ids)
            p, ids = _probabilities(*of_rows(tensors, index), params)
            p = p / p.sum(-1, keepdim=True)
            if ids is not None:
                p = p.new_zeros(len(p), inputs.vocab_size).scatter(1, ids, p)
            parts.append(p)
        return in_place(parts, rows)

    note = "a call for each set of parameters" if len(groups) > 1 else ""
    return Contender(call, lambda buffer: call(buffer)[0], distribution, note)


def _probabilities(
    x: Tensor, prompt_ids: Tensor, output_ids: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities, and their token ids; None if they are in id order."""
    x = add_penalties(x.float(), prompt_ids, output_ids, params)
    if params.temperature == 0:
        return torch.ones_like(x[:, :1]), x.argmax(-1, keepdim=True)
    ids = None
    if params.top_k > 0:
        x, ids = x.topk(min(params.top_k, x.shape[1]))
    elif params.top_p < 1:
        x, ids = x.sort(descending=True)
    if params.temperature != 1:
        x = x / params.temperature
    p = torch.softmax(x, -1)
    if params.top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= params.top_p, 0)
    if params.min_p > 0:
        p = p.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), 0)
    return p, ids


def _make_step(case: Case, option: str) -> Step:
    def step(x: Tensor, prompt: Tensor, output: Tensor, rows: Sequence[Tensor | None]) -> Any:
        drawn = []
        for params, index in zip(case.params, rows, strict=False):  # there may be fewer rows
            p, ids = _probabilities(*of_rows((x, prompt, output), index), params)
            if option == "race":
                p = p.unsqueeze(1).repeat(1, case.num_samples, 1)
                tokens = (p / torch.empty_like(p).exponential_()).argmax(-1)
            else:
                tokens = torch.multinomial(p, case.num_samples, replacement=case.num_samples > 1)
            drawn.append(tokens if ids is None else ids.gather(1, tokens))
        tokens = in_place(drawn, rows)
        if not case.logprobs:
            return tokens, None
        return tokens, torch.log_softmax(x.float(), -1).gather(1, tokens)

    return step


@functools.cache
def _compiled(case: Case) -> Step:
    """Compiled once for each case and for all shapes, since it takes many seconds."""
    step: Step = torch.compile(_make_step(case, "compiled"), dynamic=True)
    return step
