"""Check every provider, then time those that passed: the results of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from time import perf_counter
from typing import Any

import torch

from benchmarks.cases import CASES, REAL, Case
from benchmarks.cases import Run as Workload
from benchmarks.environments import python_of
from benchmarks.inputs import AbsentError, Inputs, make_buffers, make_inputs
from benchmarks.oracle import Oracle, Order, WrongAnswerError, check_uniform
from benchmarks.providers import PROVIDERS, Contender, Task
from benchmarks.timing import Protocol, Run, Timing, measure, progress, runner
from benchmarks.worker import Worker

#: How many tokens test a provider's distribution before it is timed on a case: DRAWS, or as many as
#: it draws in DRAW_S seconds, but at least LEAST_DRAWS.
DRAWS, DRAW_S, LEAST_DRAWS = 256, 1.0, 64


@dataclass(frozen=True)
class Result:
    """A provider's time on a case, or why there is none.

    Attributes:
        host: on a GPU, the time until the call returns; None on a CPU.
        note: how its answer differs from ours, and which stages were added to it.
        absent: why it was not timed; "" if it was.
        wrong: its answer is wrong, and ``absent`` says how.
    """

    inputs: str
    vocab_size: int
    rows: int
    case: str
    provider: str
    buffers: int
    timing: Timing | None
    host: Timing | None = None
    note: str = ""
    absent: str = ""
    wrong: bool = False

    @property
    def where(self) -> tuple[str, int, int]:
        """Inputs, vocabulary size and rows: the subject of a table."""
        return self.inputs, self.vocab_size, self.rows

    def to_json(self) -> dict[str, Any]:
        """The fields, with the timings'."""
        timings = {
            name: None if timing is None else timing.to_json()
            for name, timing in (("timing", self.timing), ("host", self.host))
        }
        return asdict(self) | timings

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        """What ``to_json`` made."""
        timings = {
            name: None if record[name] is None else Timing(**record[name])
            for name in ("timing", "host")
        }
        return cls(**({field.name: record[field.name] for field in fields(cls)} | timings))


class Suite:
    """The available providers on one device, and their results.

    Args:
        providers: their names.
        device: "cpu" or "cuda".
        dtype: of the logits.
        protocol: how many samples.
    """

    def __init__(
        self, providers: Sequence[str], device: str, dtype: torch.dtype, protocol: Protocol
    ) -> None:
        self.device, self.dtype, self.protocol = device, dtype, protocol
        self.versions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        self._done: set[tuple[object, ...]] = set()
        for name in providers:
            provider = PROVIDERS[name]
            try:
                if provider.environment and device in provider.devices:
                    python = python_of(provider.environment)
                    self._workers[name] = Worker(provider, python, device)
                    self.versions[name] = self._workers[name].version
                else:
                    self.versions[name] = provider.version(device)
            except AbsentError as error:
                self.absent[name] = str(error)

    def close(self) -> None:
        """End the providers' processes."""
        for worker in self._workers.values():
            worker.close()

    def run(self, workload: Workload) -> Iterator[Result]:
        """Every case of a workload on every input and shape that was not timed before."""
        providers = [
            name for name in self.versions if workload.variants or not PROVIDERS[name].is_variant
        ]
        for name in workload.inputs:
            for vocab_size in (None,) if name in REAL else workload.vocab_sizes:
                for rows in workload.rows:
                    wanted = [
                        case
                        for case in workload.cases
                        if (name, vocab_size, rows, case) not in self._done
                    ]
                    self._done.update((name, vocab_size, rows, case) for case in wanted)
                    if wanted:
                        yield from self._run_cases(name, vocab_size, rows, wanted, providers)

    def _run_cases(
        self,
        name: str,
        vocab_size: int | None,
        rows: int,
        cases: Sequence[str],
        providers: Sequence[str],
    ) -> Iterator[Result]:
        try:
            buffers = make_buffers(name, rows, vocab_size, self.dtype, self.device)
        except AbsentError as error:
            self.absent[f"logits {name!r}, {rows} rows"] = str(error)
            return
        orders: dict[int, Order] = {}
        for case in cases:
            inputs = make_inputs(name, buffers, CASES[case])
            progress(f"{name}, V = {inputs.vocab_size:,}, {rows} rows, {case}")
            yield from self._run_case(CASES[case], inputs, orders, providers)

    def _run_case(
        self,
        case: Case,
        inputs: Inputs,
        orders: dict[int, Order],
        providers: Sequence[str],
    ) -> list[Result]:
        task = Task(case, inputs)
        oracle = Oracle(inputs, task.params, orders)
        runs: dict[str, Run] = {}
        host_runs: dict[str, Run] = {}
        notes: dict[str, str] = {}
        reasons: dict[str, tuple[str, bool]] = {}
        clocks = ("wall",) if self.device == "cpu" else ("events", "host")
        for name in providers:
            try:
                contender, both = self._build(name, task, clocks)
                notes[name] = check(contender, inputs, oracle)
            except AbsentError as error:
                reasons[name] = str(error), False
            except WrongAnswerError as error:
                reasons[name] = str(error), True
                progress(f"WRONG: {name}, {case.name}, {inputs.name}: {error}")
            else:
                runs[name] = both[0]
                host_runs |= {name: both[1]} if len(both) > 1 else {}
        number = len(inputs.buffers)
        timings = measure(runs, number, self.protocol) if runs else {}
        host = measure(host_runs, number, self.protocol) if host_runs else {}
        return [
            Result(
                inputs=inputs.name,
                vocab_size=inputs.vocab_size,
                rows=inputs.rows,
                case=case.name,
                provider=name,
                buffers=number,
                timing=timings.get(name),
                host=host.get(name),
                note=notes.get(name, ""),
                absent=reasons.get(name, ("", False))[0],
                wrong=reasons.get(name, ("", False))[1],
            )
            for name in providers
        ]

    def _build(self, name: str, task: Task, clocks: Sequence[str]) -> tuple[Contender, list[Run]]:
        worker = self._workers.get(name)
        if worker is None:
            contender = PROVIDERS[name].build(task)
            return contender, [runner(contender, clock) for clock in clocks]
        built = [worker.build(task, clock) for clock in clocks]
        return built[0][0], [run for _, run in built]


def check(contender: Contender, inputs: Inputs, oracle: Oracle) -> str:
    """Compare a provider with the oracle on every buffer; returns how it differs, in words.

    Raises:
        WrongAnswerError: it is not what it should be.
    """
    if contender.check is not None:
        contender.check()
    if contender.draw is None or contender.distribution is None:
        return contender.note
    kept = []
    for buffer in range(len(inputs.buffers)):
        probabilities = contender.distribution(buffer)
        kept.append(probabilities.cpu() > 0)
        oracle.check_distribution(buffer, probabilities)
    difference = oracle.explain(kept)
    generator = torch.Generator().manual_seed(20261125)  # no provider's own
    places: list[torch.Tensor] = []
    started = perf_counter()
    while (drawn := sum(found.numel() for found in places)) < DRAWS:
        if drawn >= LEAST_DRAWS and perf_counter() - started > DRAW_S:
            break
        for buffer in range(len(inputs.buffers)):
            tokens = contender.draw(buffer)
            noise = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
            places.append(oracle.places(buffer, tokens, kept[buffer], noise))
    check_uniform(torch.cat([found.flatten() for found in places]))
    return "; ".join(note for note in (difference, contender.note) if note)


@contextlib.contextmanager
def open_suite(
    providers: Sequence[str], device: str, dtype: torch.dtype, protocol: Protocol
) -> Iterator[Suite]:
    """A Suite whose processes end with the block."""
    suite = Suite(providers, device, dtype, protocol)
    try:
        yield suite
    finally:
        suite.close()
