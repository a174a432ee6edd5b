"""What the sanitizers watch: a few rows of each kind of launch, by one backend.

``python -m benchmarks.on_gpu.launches BACKEND [--dry-run]``. All tensors are made on the CPU and
copied, so that the kernels of this package are nearly all that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.on_gpu.logits import make_logits
from benchmarks.on_gpu.parity import INPUTS, MIXED
from benchmarks.on_gpu.setting import DRY, GPU
from llm_sampling import RequestTable, SamplingParams, sample

KINDS = (*MIXED, SamplingParams(dry_multiplier=2, dry_allowed_length=1, bad_words=[[2, 3], [9]]))


def main(argv: Sequence[str]) -> int:
    """Draw and record, by the backend and by that of the CPU; 1 where they differ."""
    backend, *more = argv
    setting = DRY if more == ["--dry-run"] else GPU
    differing = 0
    for shape, dtype in setting.launches:
        logits = make_logits(*shape, dtype, "cpu", INPUTS)
        # rows of all kinds, in turn: few rows keep the launch's kind
        for first in range(0, len(KINDS), shape.rows):
            rows = [KINDS[(first + row) % len(KINDS)] for row in range(shape.rows)]
            answers = []
            for name, device in ((backend, setting.device), ("auto", "cpu")):
                table = RequestTable(
                    shape.rows,
                    vocab_size=shape.vocab_size,
                    history=True,
                    max_length=8,
                    backend=name,
                    device=device,
                )
                for slot, params in enumerate(rows):
                    table.set(slot, replace(params, seed=slot), prompt_ids=[1, 2, 2, slot])
                slots = torch.arange(shape.rows, dtype=torch.int32).to(device)
                x = logits.to(device)
                for _ in range(2):
                    output = sample(x, table, slots, record=True, backend=name, check=False)
                    answers.append(torch.stack([output.tokens.cpu(), output.status.cpu()]))
            same = torch.equal(torch.stack(answers[:2]), torch.stack(answers[2:]))
            differing += not same
            print(f"{backend}, {shape}, {dtype}: {'equal' if same else 'DIFFERS'}", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
