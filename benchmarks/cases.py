"""What is timed: the parameters, the logits and the history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llm_sampling import SamplingParams

#: Buffers of one shape hold at least this much together, which is more than an L2 cache.
ALL_BUFFERS_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        name: what ``--cases`` calls it.
        params: of every row; each row has a seed of its own.
        history_length: tokens in prompt and output together, where a penalty needs them.
        num_samples: draws per row.
        inputs: the inputs that it is timed on; None for all.
    """

    name: str
    params: SamplingParams
    history_length: int = 0
    num_samples: int = 1
    inputs: tuple[str, ...] | None = None

    def row_params(self, rows: int) -> list[SamplingParams]:
        """One SamplingParams per row."""
        return [replace(self.params, seed=row) for row in range(rows)]


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("greedy", SamplingParams(temperature=0)),
        Case("plain", SamplingParams()),
        Case("top-k-50", SamplingParams(top_k=50)),
        Case("top-k-1024", SamplingParams(top_k=1024)),
        Case("top-p-0.9", SamplingParams(top_p=0.9), inputs=("normal3", "model")),
        Case("top-p-0.9-flat", SamplingParams(top_p=0.9), inputs=("normal1",)),
        Case("min-p-0.05", SamplingParams(min_p=0.05)),
        Case("top-k-50-top-p-0.9", SamplingParams(top_k=50, top_p=0.9)),
        Case(
            "full-chain",
            SamplingParams(repetition_penalty=1.1, temperature=0.8, top_k=50, top_p=0.9),
            history_length=4096,
        ),
        Case(
            "everything",
            SamplingParams(
                repetition_penalty=1.1,
                frequency_penalty=0.5,
                presence_penalty=0.25,
                temperature=0.8,
                top_k=50,
                top_p=0.9,
                min_p=0.05,
            ),
            history_length=4096,
            num_samples=8,
        ),
    )
}


def _model_like(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A few dominant tokens and a long tail, as a language model gives.

    A head of tokens follows a noisy power law and holds 97 % of the probability; the tail is
    normal with deviation 3, about that of SmolLM2's logits.
    """
    tail = 3 * torch.randn(rows, vocab_size, dtype=torch.float64, generator=generator)
    tail = tail.log_softmax(-1) + math.log(0.03)
    size = head_size(vocab_size)
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    noise = torch.randn(rows, size, dtype=torch.float64, generator=generator)
    head = 0.5 * noise - 1.6 * rank.log()
    head = head.log_softmax(-1) + math.log(0.97)
    ids = torch.rand(rows, vocab_size, generator=generator).topk(size).indices
    logits = tail.scatter(1, ids, head)
    logits = (logits - logits.mean(-1, keepdim=True)).float()
    assert_model_like(logits)
    return logits


def head_size(vocab_size: int) -> int:
    """How many tokens stand out in a model-like row."""
    return max(8, min(1024, vocab_size // 32))


def assert_model_like(logits: Tensor) -> None:
    """Few dominant tokens, long tail: what normal noise of any width is not."""
    p = logits.double().softmax(-1).sort(-1, descending=True).values
    nucleus = (p.cumsum(-1) < 0.9).sum(-1) + 1
    beyond = 1 - p[:, : head_size(logits.shape[1])].sum(-1)
    assert (p[:, 0] > 0.05).all(), f"no dominant token: {p[:, 0].min():.3f}"
    assert (p[:, 0] < 0.98).all(), f"nothing but one token: {p[:, 0].max():.3f}"
    assert (nucleus <= max(64, logits.shape[1] // 64)).all(), f"wide nucleus: {nucleus.max()}"
    assert (beyond > 1e-3).all(), f"no tail: {beyond.min():.2e}"


def _normal(deviation: float) -> Callable[[int, int, torch.Generator], Tensor]:
    def make(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
        return deviation * torch.randn(rows, vocab_size, generator=generator)

    return make


#: Name to a function that makes float32 logits. "normal1" is flat: its nucleus of 0.9 holds three
#: fifths of the vocabulary.
INPUTS: Mapping[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "normal1": _normal(1),
    "normal3": _normal(3),
    "model": _model_like,
}


@dataclass(frozen=True)
class Inputs:
    """The tensors that one case is timed on.

    Attributes:
        name: a key of ``INPUTS``.
        buffers: float32 logits ``(rows, vocab_size)`` each, all different.
        prompt_ids, output_ids: int64 ``(rows, length)``; of length 0 where the case has no history.
    """

    name: str
    buffers: list[Tensor] = field(repr=False)
    prompt_ids: Tensor = field(repr=False)
    output_ids: Tensor = field(repr=False)

    @property
    def rows(self) -> int:
        """Rows of each buffer."""
        return self.buffers[0].shape[0]

    @property
    def vocab_size(self) -> int:
        """Columns of each buffer."""
        return self.buffers[0].shape[1]


def make_buffers(name: str, rows: int, vocab_size: int) -> list[Tensor]:
    """Between 4 and 64 different inputs of one kind, together larger than an L2 cache."""
    generator = torch.Generator().manual_seed(rows * 2**20 + vocab_size)
    number = max(4, min(64, -(-ALL_BUFFERS_BYTES // (4 * rows * vocab_size))))
    return [INPUTS[name](rows, vocab_size, generator) for _ in range(number)]


def make_inputs(name: str, buffers: list[Tensor], case: Case) -> Inputs:
    """The inputs of a case on given logits.

    A history is three quarters prompt and one quarter output. Its ids are uniform, so that nearly
    all are distinct, which costs the most; the best tokens of every buffer are among the output, so
    that the penalties change what is drawn.
    """
    rows, vocab_size = buffers[0].shape
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (rows, case.history_length), generator=generator)
    prompt, output = ids.tensor_split([case.history_length * 3 // 4], dim=1)
    if case.history_length:
        best = torch.cat([logits.topk(min(4, vocab_size)).indices for logits in buffers], dim=1)
        output[:, : best.shape[1]] = best[:, : output.shape[1]]
    return Inputs(name, buffers, prompt.contiguous(), output.contiguous())
