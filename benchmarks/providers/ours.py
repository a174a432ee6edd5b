"""Ours: a prepared Sampler in a decode loop, which records the token and advances."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.inputs import AbsentError
from benchmarks.oracle import WrongAnswerError
from benchmarks.providers import Contender, Task
from llm_sampling import (
    BatchParams,
    Sampler,
    TokenHistory,
    __version__,
    backends,
    filter_logits,
    sample,
)

#: How many rows are compared with the reference, which is slow; rows are independent.
REFERENCE_ROWS = 8


def version(option: str, device: str) -> str:
    """The package's version; AbsentError with the backend's reason where it cannot run."""
    name = option.partition("/")[0]
    reason = backends.BACKENDS[name].why_unavailable(torch.device(device))
    if reason is not None:
        raise AbsentError(reason)
    return f"llm_sampling {__version__}"


def build(option: str, task: Task) -> Contender:
    """A Contender; ``option`` is the backend, optionally with a slash and a number of threads."""
    backend, _, threads = option.partition("/")
    inputs, case = task.inputs, task.case
    if threads and inputs.rows > 1:
        raise AbsentError("it is about a row that is alone")
    if case.num_samples > 1 and any(row.needs_history for row in task.params):
        raise AbsentError("a history follows one token per row")

    def history(rows: int) -> TokenHistory | None:
        if not any(row.needs_history for row in case.params):
            return None
        return TokenHistory.from_ids(
            inputs.prompt_ids[:rows],
            inputs.output_ids[:rows],
            inputs.vocab_size,
            device=inputs.device,
        )

    def make(backend: str, rows: int) -> Sampler:
        return Sampler(
            task.params[:rows],
            vocab_size=inputs.vocab_size,
            history=history(rows),
            num_samples=case.num_samples,
            logprobs="raw" if case.logprobs else None,
            device=inputs.device,
            backend=backend,
        )

    def check() -> None:
        # a Sampler advances, so every buffer is one step of a decode loop
        rows = min(inputs.rows, REFERENCE_ROWS)
        ours, reference = make(backend, inputs.rows), make("torch", rows)
        for logits in inputs.buffers:
            drawn = ours(logits).tokens[:rows]
            expected = reference(logits[:rows]).tokens
            if not torch.equal(drawn, expected):
                raise WrongAnswerError(
                    f"{int((drawn != expected).sum())} of {drawn.numel()} tokens differ from the "
                    "reference's"
                )

    def distribution(buffer: int) -> Tensor:
        filtered = filter_logits(
            inputs.buffers[buffer], task.params, history=history(inputs.rows), backend=backend
        )
        return torch.softmax(filtered.double(), -1)

    turns = itertools.count()

    def draw(buffer: int) -> Tensor:
        # not by the Sampler, whose history grows with each token
        positions = [next(turns)] * inputs.rows
        output = sample(
            inputs.buffers[buffer],
            BatchParams.from_list(task.params, positions=positions, device=inputs.device),
            history=history(inputs.rows),
            backend=backend,
        )
        return output.tokens.unsqueeze(1)

    sampler = make(backend, inputs.rows)
    return Contender(
        lambda buffer: sampler(inputs.buffers[buffer]),
        draw,
        distribution,
        check=check,
        threads=int(threads) if threads else None,
    )
