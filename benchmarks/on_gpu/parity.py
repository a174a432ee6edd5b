"""Step 3: the tokens and status of the GPU kernels, and those of the reference on the same device.

Rows of mixed inputs and mixed parameters. Equal means equal: no token may differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import EVERYTHING, Case
from benchmarks.inputs import make_inputs
from benchmarks.on_gpu.logits import make_logits
from benchmarks.on_gpu.results import Results, label, verdict_of
from benchmarks.on_gpu.setting import Deadline, Setting, Shape
from llm_sampling import RequestTable, SamplingParams, TokenHistory, sample
from llm_sampling.results import SampleOutput

#: The rows take these in turn; seven and the four inputs below meet in all ways.
MIXED = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=50),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=1000, top_p=0.99, min_p=0.001),
    EVERYTHING,
)
INPUTS = ("model", "flat", "model", "ties")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HISTORY_LENGTH = 128

Draw = Callable[..., SampleOutput]
#: Shape, dtype and form.
Key = tuple[Shape, str, str]


@dataclass(frozen=True)
class Batch:
    """The tensors of a comparison.

    Attributes:
        logits: ``(rows, vocab_size)``.
        prompt_ids, output_ids: int64 ``(rows, length)``.
        allowed_mask: a bitmask of about half of the tokens.
    """

    logits: Tensor
    prompt_ids: Tensor
    output_ids: Tensor
    allowed_mask: Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str) -> Batch:
        """The batch of a shape; always the same."""
        logits = make_logits(*shape, dtype, device, INPUTS)
        inputs = make_inputs("mixed", [logits], Case("history", MIXED, HISTORY_LENGTH))
        generator = torch.Generator().manual_seed(shape.vocab_size)
        size = (shape.rows, -(-shape.vocab_size // 32))
        words = torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int64)
        mask = words.to(torch.int32).to(device)
        return cls(logits, inputs.prompt_ids, inputs.output_ids, mask)

    def on_cpu(self) -> Batch:
        """The same on the CPU."""
        return Batch(*(tensor.cpu() for tensor in vars(self).values()))

    def params(self, **more: Any) -> list[SamplingParams]:
        """A SamplingParams for each row; those without penalties, unless ``more`` has them."""
        off = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        rows = len(self.logits)
        return [replace(MIXED[r % len(MIXED)], seed=r, **(off | more)) for r in range(rows)]

    def penalised(self) -> list[SamplingParams]:
        """The same with all three penalties."""
        return self.params(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.25)


def _plain(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    return [draw(batch.logits, batch.params(), backend=backend, check=False)]


def _draws(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    return [draw(batch.logits, batch.params(), num_samples=8, backend=backend, check=False)]


def _history(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    history = TokenHistory.from_ids(
        batch.prompt_ids,
        batch.output_ids,
        batch.logits.shape[1],
        device=batch.logits.device,
    )
    options = {"history": history, "backend": backend, "check": False}
    return [draw(batch.logits, batch.penalised(), **options)]


def _mask_and_bias(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    params = batch.params(logit_bias={0: -torch.inf, 7: 4.0, batch.logits.shape[1] - 1: 5.5})
    options = {"allowed_mask": batch.allowed_mask, "backend": backend, "check": False}
    return [draw(batch.logits, params, **options)]


def _table_slots(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    """Two tokens of each request; the second follows the first, which the kernel has recorded."""
    rows, vocab_size = batch.logits.shape
    device = batch.logits.device
    table = RequestTable(
        rows + 1, vocab_size=vocab_size, history=True, backend=backend, device=device
    )
    prompts, outputs = batch.prompt_ids.tolist(), batch.output_ids.tolist()
    slots = [rows - row for row in range(rows)]
    for row, params in enumerate(batch.penalised()):
        table.set(slots[row], params, prompt_ids=prompts[row], output_ids=outputs[row])
    options = {"record": True, "backend": backend, "check": False}
    return [draw(batch.logits, table, slots, **options) for _ in range(2)]


def _rules(batch: Batch, backend: str, draw: Draw) -> list[SampleOutput]:
    """Texts that repeat themselves, of rows whose next token DRY lowers or n-grams ban."""
    history = TokenHistory.from_ids(
        batch.output_ids,
        batch.output_ids,
        batch.logits.shape[1],
        max_length=2 * batch.output_ids.shape[1],
        device=batch.logits.device,
    )
    rules: tuple[dict[str, Any], ...] = (
        {"dry_multiplier": 1.5, "dry_breakers": [[1]], "min_tokens": 9999, "stop_token_ids": [7]},
        {"no_repeat_ngram_size": 1},
    )
    params = [replace(row, **rules[i % 2]) for i, row in enumerate(batch.params())]
    return [draw(batch.logits, params, history=history, backend=backend, check=False)]


FORMS: Mapping[str, Callable[[Batch, str, Draw], list[SampleOutput]]] = {
    "plain": _plain,
    "8 draws": _draws,
    "history": _history,
    "mask and bias": _mask_and_bias,
    "table slots": _table_slots,
    "rules": _rules,
}


class Answer(NamedTuple):
    """On the CPU: int64 tokens ``(rows, draws)`` and int32 status ``(rows, calls)``."""

    tokens: Tensor
    status: Tensor

    @classmethod
    def of(cls, outputs: list[SampleOutput]) -> Answer:
        """All calls' in one."""
        rows = len(outputs[0].status)
        tokens = torch.cat([output.tokens.view(rows, -1).cpu() for output in outputs], 1)
        return cls(tokens, torch.stack([output.status.cpu() for output in outputs], 1))


def _difference(wanted: Answer, found: Answer, batch: Batch, form: str) -> dict[str, Any]:
    """The first row that differs, with what the kernel of the CPU says of it."""
    differs = (wanted.tokens != found.tokens).any(1) | (wanted.status != found.status).any(1)
    row = int(differs.nonzero()[0])
    third = Answer.of(FORMS[form](batch.on_cpu(), "auto", sample))

    def of_row(answer: Answer) -> dict[str, list[int]]:
        return {"tokens": answer.tokens[row].tolist(), "status": answer.status[row].tolist()}

    return {
        "row": row,
        "row of MIXED": row % len(MIXED),
        "reference": of_row(wanted),
        "found": of_row(found),
        "kernel of the CPU": of_row(third),
    }


def run(setting: Setting, results: Results, deadline: Deadline, draw: Draw = sample) -> None:
    """Write a line for each comparison.

    Args:
        setting: the shapes.
        results: gets ``plan``, ``comparisons`` and ``verdict``.
        deadline: nothing is begun near it, and no backend may take all of the time.
        draw: takes the arguments of :func:`llm_sampling.sample`.
    """
    absent = setting.absent()
    backends = [name for name in setting.backends if name not in absent]
    keys = list(itertools.product(setting.parity, DTYPES, FORMS))
    plan = [label(backend, *shape, *what) for backend in backends for shape, *what in keys]
    results.put(absent=absent, plan=plan, comparisons=[])
    answers: dict[Key, Answer] = {}
    for place, backend in enumerate(backends):
        until = deadline.part(len(backends) - place)
        for line in _lines(setting, backend, keys, answers, until, draw):
            results.add("comparisons", line)
            if line["differ"]:
                results.put(verdict="DIFFERS")  # in case that this step is killed
    results.put(verdict=verdict_of(results.record["comparisons"], len(plan)))


def _lines(
    setting: Setting,
    backend: str,
    keys: Sequence[Key],
    answers: dict[Key, Answer],
    deadline: Deadline,
    draw: Draw,
) -> Iterator[dict[str, Any]]:
    """Compare a backend with the reference, whose answers are kept for the next one."""
    made: tuple[Shape, str] | None = None
    is_shown = False
    for key in keys:
        if deadline.is_near():
            break
        shape, dtype, form = key
        if made != (shape, dtype):
            batch = Batch.make(shape, DTYPES[dtype], setting.device)
            made = shape, dtype
        line = {"backend": backend, **shape._asdict(), "dtype": dtype, "form": form}
        line |= {"compared": 0, "differ": 0, "error": None}
        try:
            if key not in answers:
                answers[key] = Answer.of(FORMS[form](batch, "torch", draw))
            wanted, found = answers[key], Answer.of(FORMS[form](batch, backend, draw))
        except Exception as error:  # any, since the other comparisons are still made
            line["error"] = f"{type(error).__name__}: {error}"
        else:
            line["compared"] = sum(tensor.numel() for tensor in wanted)
            line["differ"] = sum(int((a != b).sum()) for a, b in zip(wanted, found, strict=True))
            if line["differ"] and not is_shown:  # one is enough: the CPU takes long for many rows
                line["example"] = _difference(wanted, found, batch, form)
                is_shown = True
        yield line
        if line["error"]:
            setting.check_device()
