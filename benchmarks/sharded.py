"""``sample_sharded`` compared with gathering the logits, on gloo processes of this machine.

``python -m benchmarks.sharded`` prints a markdown report; ``--json`` writes it to a file.

Each rank has one thread and a slice of each row. "gather" all-gathers the slices, and every rank
samples from whole rows, as engines do. In both, all ranks end with the tokens. A call's time is
that of its slowest rank, from a barrier on. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.inputs import make_buffers
from benchmarks.timing import command_line, environment, progress, write_result
from llm_sampling import BatchParams, SamplingParams, sample, sample_sharded

VOCAB_SIZE = 128256
CASES = {
    "greedy": SamplingParams(temperature=0),
    "top-k 50, top-p 0.9": SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=1),
    "unfiltered": SamplingParams(seed=1),
    "top-p 0.9": SamplingParams(top_p=0.9, seed=1),
    "top-k 1000, top-p 0.9": SamplingParams(top_k=1000, top_p=0.9, seed=1),
}


def slice_of(rank: int, size: int) -> tuple[int, int]:
    """The first id of a rank's slice and of the next one's."""
    return VOCAB_SIZE * rank // size, VOCAB_SIZE * (rank + 1) // size


def gather(local: Tensor, size: int) -> Tensor:
    """The whole rows, from slices of one width."""
    parts = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(parts, local)
    return torch.cat(parts, -1)


def measure(call: Callable[[int], Tensor], calls: int) -> list[float]:
    """Microseconds of each call of the slowest rank."""
    taken = torch.empty(calls, dtype=torch.float64)
    for turn in range(calls):
        dist.barrier()
        start = time.perf_counter_ns()
        call(turn)
        taken[turn] = (time.perf_counter_ns() - start) / 1000
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    slowest: list[float] = taken.tolist()
    return slowest


def work(rank: int, size: int, store: str, rows: Sequence[int], calls: int, out: str) -> None:
    """Run one rank; the first one writes the lines of the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    start, stop = slice_of(rank, size)
    lines = []
    for count in rows:
        buffers = [whole.to(torch.bfloat16) for whole in make_buffers("model", count, VOCAB_SIZE)]
        slices = [whole[:, start:stop].contiguous() for whole in buffers]
        for case, params in CASES.items():
            batch = BatchParams.from_list([params] * count)

            def sharded(turn: int, slices: Any = slices, batch: Any = batch) -> Tensor:
                local = slices[turn % len(slices)]
                return sample_sharded(local, batch, vocab_start=start, check=False).tokens

            def gathered(turn: int, slices: Any = slices, batch: Any = batch) -> Tensor:
                local = slices[turn % len(slices)]
                return sample(gather(local, size), batch, check=False).tokens

            for turn, whole in enumerate(buffers):
                right = sample(whole, batch).tokens
                if not torch.equal(sharded(turn), right) or not torch.equal(gathered(turn), right):
                    raise AssertionError(f"wrong tokens: {case}, {count} rows, {size} ranks")
            times: dict[str, list[float]] = {"sharded": [], "gather": []}
            for _ in range(4):
                times["sharded"] += measure(sharded, -(-calls // 4))
                times["gather"] += measure(gathered, -(-calls // 4))
            medians = {f"{who}_us": round(statistics.median(t), 1) for who, t in times.items()}
            lines.append({"ranks": size, "rows": count, "case": case, **medians})
            if rank == 0:
                progress(f"{size} ranks, {count} rows, {case}: {medians}")
    if rank == 0:
        Path(out).write_text(json.dumps(lines), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(sizes: Sequence[int], rows: Sequence[int], calls: int) -> list[dict[str, Any]]:
    """Every line of the table."""
    lines = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "lines")
            arguments = (size, str(Path(folder) / "store"), rows, calls, out)
            torch.multiprocessing.spawn(work, arguments, nprocs=size)
            lines += json.loads(Path(out).read_text(encoding="utf-8"))
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The report's table."""
    text = "| ranks | rows | case | sharded, µs | gather, µs | ratio |\n|--:|--:|---|--:|--:|--:|\n"
    for line in lines:
        ours, theirs = line["sharded_us"], line["gather_us"]
        text += f"| {line['ranks']} | {line['rows']} | {line['case']} "
        text += f"| {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |\n"
    return text


def main(argv: Sequence[str]) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description="sample_sharded beside gathering the logits.")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--calls", type=int, default=20, help="of each kind")
    options = parser.parse_args(argv)
    for name in ("ranks", "rows"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} must be integers >= 1, got {getattr(options, name)}")
    if any(VOCAB_SIZE % size for size in options.ranks):
        parser.error(f"--ranks must divide {VOCAB_SIZE}, since gathering needs slices of one width")
    if options.calls < 1:
        parser.error(f"--calls must be an integer >= 1, got {options.calls}")
    record = environment(argv)
    lines = run(options.ranks, options.rows, options.calls)
    command = command_line("sharded", argv)
    print(f"`{command}`, {record['cpu']}, {record['cores']} cores, {record['date']}, ", end="")
    print(f"V = {VOCAB_SIZE:,}, bfloat16, gloo, a thread a rank\n")
    print(table(lines))
    record |= {"threads": 1}
    write_result(options.json, {"command": command, "environment": record, "lines": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
