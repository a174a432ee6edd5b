"""llama.cpp's sampler chain, through llama-cpp-python's C functions; one thread, row by row.

A call fills the array of candidates (id, logit, p of every token) as ``llama_sampler_sample`` does,
applies the chain and accepts the token. Where both kinds of penalties are on, the chain has two
penalty samplers: the repetition penalty counts all tokens and the others only the output's, which
one sampler cannot do. The temperature comes before the filters, as here, and not last, as by
llama.cpp's default.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.providers import Contender, Task
from llm_sampling import SamplingParams

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def version(option: str, device: str) -> str:
    """llama-cpp-python's version, which ships the library."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


class Row:
    """One sequence's samplers."""

    def __init__(
        self,
        lib: Any,
        params: SamplingParams,
        prompt: list[int],
        output: list[int],
        vocab_size: int,
    ) -> None:
        self.lib, self.vocab_size = lib, vocab_size
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        both = params.frequency_penalty != 0 or params.presence_penalty != 0
        if params.repetition_penalty != 1:
            self._add_penalties(chain, (params.repetition_penalty, 0, 0), prompt + output)
        if both:
            counts = (1.0, params.frequency_penalty, params.presence_penalty)
            self._add_penalties(chain, counts, output)
        greedy = params.temperature == 0
        for sampler in (
            None
            if greedy or params.temperature == 1
            else lib.llama_sampler_init_temp(params.temperature),
            None if params.top_k <= 0 else lib.llama_sampler_init_top_k(params.top_k),
            None if params.top_p >= 1 else lib.llama_sampler_init_top_p(params.top_p, 1),
            None if params.min_p <= 0 else lib.llama_sampler_init_min_p(params.min_p, 1),
        ):
            if sampler is not None:
                lib.llama_sampler_chain_add(chain, sampler)
        self.greedy = greedy
        self.filters = chain
        self.draw = (
            lib.llama_sampler_init_greedy()
            if greedy
            else (lib.llama_sampler_init_dist(params.seed))
        )

    def _add_penalties(self, chain: Any, values: tuple[float, ...], ids: list[int]) -> None:
        sampler = self.lib.llama_sampler_init_penalties(self.vocab_size, len(ids), *values)
        for token in ids:
            self.lib.llama_sampler_accept(sampler, token)
        self.lib.llama_sampler_chain_add(chain, sampler)

    def free(self) -> None:
        """Free the samplers."""
        self.lib.llama_sampler_free(self.filters)
        self.lib.llama_sampler_free(self.draw)


class Samplers:
    """The samplers of all rows; freed with the last reference."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __del__(self) -> None:
        for row in self.rows:
            row.free()


def build(option: str, task: Task) -> Contender:
    """A chain for each row and an array of candidates that they share."""
    from llama_cpp import llama_cpp as lib

    case, inputs = task.case, task.inputs
    prompts, outputs = inputs.prompt_ids.tolist(), inputs.output_ids.tolist()

    def make() -> Samplers:
        rows = zip(task.params, prompts, outputs, strict=True)
        return Samplers([Row(lib, *row, inputs.vocab_size) for row in rows])

    buffers = [logits.float().numpy() for logits in inputs.buffers]
    blank = np.zeros(inputs.vocab_size, CANDIDATE)
    blank["id"] = np.arange(inputs.vocab_size)
    candidates = blank.copy()
    pointer = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
    array = lib.llama_token_data_array(pointer, inputs.vocab_size, -1, False)
    reference = ctypes.byref(array)

    def run(row: Row, logits: Any, num_samples: int) -> list[int]:
        np.copyto(candidates, blank)
        candidates["logit"] = logits
        array.size, array.selected, array.sorted = inputs.vocab_size, -1, False
        lib.llama_sampler_apply(row.filters, reference)
        tokens = []
        for _ in range(num_samples):
            lib.llama_sampler_apply(row.draw, reference)
            tokens.append(int(candidates["id"][array.selected]))
        return tokens

    def all_rows(samplers: Samplers, buffer: int, accept: bool) -> tuple[Tensor, Tensor | None]:
        found = []
        for row, logits in zip(samplers.rows, buffers[buffer], strict=True):
            tokens = run(row, logits, case.num_samples)
            if accept:
                lib.llama_sampler_accept(row.filters, tokens[0])
            found.append(tokens)
        drawn = torch.tensor(found)
        if not case.logprobs:
            return drawn, None
        return drawn, torch.log_softmax(inputs.buffers[buffer].float(), -1).gather(1, drawn)

    timed, fresh = make(), make()

    def distribution(buffer: int) -> Tensor:
        whole = torch.zeros(inputs.rows, inputs.vocab_size)
        for index, row in enumerate(fresh.rows):
            tokens = run(row, buffers[buffer][index], 1)
            if row.greedy:
                whole[index, tokens] = 1.0
            else:
                kept = candidates[: array.size]
                whole[index, torch.from_numpy(kept["id"].astype(np.int64))] = torch.from_numpy(
                    kept["p"].copy()
                )
        return whole

    return Contender(
        lambda buffer: all_rows(timed, buffer, True),
        lambda buffer: all_rows(fresh, buffer, False)[0],
        distribution,
        _note(task),
    )


def _note(task: Task) -> str:
    notes = []
    if any(row.frequency_penalty or row.presence_penalty for row in task.case.params):
        notes.append("two samplers for the penalties")
    if task.case.logprobs:
        notes.append("logprobs added in plain torch")
    return "; ".join(notes)
