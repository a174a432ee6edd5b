"""vLLM V1's Sampler, called as its model runner calls it; it needs an environment of its own.

On the CPU its filters are the PyTorch ones and its draw is a C++ kernel; on a GPU its filters are
a Triton kernel, or FlashInfer's where that is installed. It changes the logits that it is given, so
each buffer is restored before a call, outside of the clock: what it reads was just written, as
after a model's last layer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import AbsentError
from benchmarks.providers import Contender, Task


def version(option: str, device: str) -> str:
    """The versions of vLLM and torch."""
    import vllm

    return f"vllm {vllm.__version__}, torch {torch.__version__}"


def build(option: str, task: Task) -> Contender:
    """A Sampler and the batch's SamplingMetadata."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.sample.sampler import Sampler

    case, inputs = task.case, task.inputs
    if case.num_samples > 1:
        raise AbsentError("it draws one token a row")
    sampler, metadata = Sampler(), _metadata(task)
    originals = inputs.buffers
    buffers = [logits.clone() for logits in originals]

    def restore(buffer: int) -> None:
        buffers[buffer].copy_(originals[buffer])

    def call(buffer: int) -> Any:
        return sampler(buffers[buffer], metadata)

    def draw(buffer: int) -> Tensor:
        restore(buffer)
        tokens: Tensor = call(buffer).sampled_token_ids
        return tokens.long()

    def distribution(buffer: int) -> Tensor:
        restore(buffer)
        x = sampler.apply_logits_processors(buffers[buffer].float(), metadata, False)
        best = x.argmax(-1, keepdim=True)
        if not metadata.all_greedy:
            x = sampler.apply_temperature(x, metadata.temperature, metadata.all_random)
            for processor in metadata.logitsprocs.argmax_invariant:
                x = processor.apply(x)
            x = apply_top_k_top_p(x, metadata.top_k, metadata.top_p)
        greedy = torch.tensor([row.temperature == 0 for row in task.params], device=x.device)
        only = torch.full_like(x, -torch.inf).scatter(1, best, 0.0)
        return torch.softmax(torch.where(greedy.unsqueeze(1), only, x), -1)

    return Contender(call, draw, distribution, restore=restore)


def _metadata(task: Task) -> Any:
    """The metadata that vLLM's input batch makes: tensors only where a row needs them."""
    from vllm import SamplingParams as VllmParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.sample.metadata import SamplingMetadata

    params, inputs = task.params, task.inputs
    rows, vocab_size, device = inputs.rows, inputs.vocab_size, inputs.device

    def tensor(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(row, name) for row in params], dtype=dtype, device=device)

    greedy = [row.temperature == 0 for row in params]
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    min_p = MinPLogitsProcessor(config, device, False)
    added = [(row, VllmParams(min_p=own.min_p), None, []) for row, own in enumerate(params)]
    min_p.update_state(BatchUpdate(batch_size=rows, removed=[], added=added, moved=[]))
    top_k = tensor("top_k", torch.int32)
    top_k = torch.where(top_k <= 0, vocab_size, top_k).clamp(max=vocab_size)
    penalised = any(row.needs_history for row in params)
    return SamplingMetadata(
        temperature=None if all(greedy) else tensor("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=tensor("top_p") if any(row.top_p < 1 for row in params) else None,
        top_k=top_k if any(row.top_k > 0 for row in params) else None,
        generators={},
        max_num_logprobs=0 if task.case.logprobs else None,
        no_penalties=not penalised,
        prompt_token_ids=inputs.prompt_ids if penalised else None,
        frequency_penalties=tensor("frequency_penalty"),
        presence_penalties=tensor("presence_penalty"),
        repetition_penalties=tensor("repetition_penalty"),
        output_token_ids=inputs.output_ids.tolist() if penalised else [],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([min_p]),
    )
