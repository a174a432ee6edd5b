"""The CPU kernel's goals: ratios of medians of one run, at V = 128,256 unless stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.providers import (
    AMAX,
    HUGGING_FACE,
    LLAMA_CPP,
    SOFTMAX,
    TWO_THREADS,
    VLLM,
    Contender,
    sampler_of,
)
from benchmarks.suite import Result
from benchmarks.timing import Protocol, Timing, measure, runner
from llm_sampling import BatchParams, Sampler, SamplingParams, sample
from llm_sampling.backends import cpu
from llm_sampling.backends.base import make_results
from llm_sampling.backends.c_abi import make_args, set_results
from llm_sampling.calls import make_call

OURS = sampler_of("cpu")

#: On so short a row the kernel has little to do, and a call's time is that of Python around it.
CALL_VOCAB_SIZE = 32
SAMPLER, KERNEL = "Sampler", "the kernel alone, through ctypes"
CALL_GOAL_US = 5.0


@dataclass(frozen=True)
class Goal:
    """A ratio of two times that is to stay on one side of a limit.

    Attributes:
        what: in words.
        numerator, denominator: a case and a provider each.
        limit: of the ratio.
        at_most: whether the limit is an upper one.
        inputs, rows: what the goal applies to.
    """

    what: str
    numerator: tuple[str, str]
    denominator: tuple[str, str]
    limit: float
    at_most: bool = True
    inputs: tuple[str, ...] = ("model", "smollm2", "gemma3")
    rows: tuple[int, ...] = (8,)


def _speed_up(case: str, peer: str, limit: float) -> Goal:
    return Goal(f"{case}: {peer} ÷ ours", (case, peer), (case, OURS), limit, at_most=False)


def _limit(case: str, line: str, limit: float, *more: str) -> Goal:
    inputs = ("model", "smollm2", "gemma3", *more)
    return Goal(f"{case}: ours ÷ {line}", (case, OURS), (case, line), limit, inputs=inputs)


def _growth(case: str, base: str, limit: float, *more: str) -> Goal:
    inputs = ("model", "smollm2", "gemma3", *more)
    return Goal(f"ours: {case} ÷ {base}", (case, OURS), (base, OURS), limit, inputs=inputs)


GOALS = (
    _speed_up("full-chain", HUGGING_FACE, 100),
    _speed_up("full-chain", VLLM, 100),
    _speed_up("full-chain", LLAMA_CPP, 15),
    _speed_up("top-p-0.9", HUGGING_FACE, 200),
    _speed_up("top-p-0.9", LLAMA_CPP, 100),
    _limit("top-k-50", AMAX, 1.5, "flat"),
    _limit("top-p-0.9", SOFTMAX, 1.0, "flat"),
    _limit("temperature-0.8", SOFTMAX, 0.8, "flat"),
    _growth("top-k-1024", "top-k-20", 1.2, "flat"),
    _growth("top-p-0.99", "top-p-0.5", 1.2, "flat"),
    _growth("history-32768", "history-1024", 1.1),
    *(
        Goal(
            f"{case}, one row: 2 threads ÷ 1",
            (case, TWO_THREADS),
            (case, OURS),
            1.0,
            inputs=("model", "flat"),
            rows=(1,),
        )
        for case in ("top-k-50", "top-p-0.9", "full-chain")
    ),
)


def judge(results: Sequence[Result], calls: dict[str, Timing]) -> list[dict[str, Any]]:
    """Compare the results with every goal that applies to them."""
    medians = {
        (*result.where, result.case, result.provider): result.timing.median
        for result in results
        if result.timing is not None
    }
    lines = []
    for goal in GOALS:
        for where in sorted({result.where for result in results}):
            inputs, vocab_size, rows = where
            synthetic = inputs in ("model", "flat")
            if inputs not in goal.inputs or rows not in goal.rows:
                continue
            if synthetic and vocab_size != 128256:
                continue
            top = medians.get((*where, *goal.numerator))
            bottom = medians.get((*where, *goal.denominator))
            if top is not None and bottom is not None:
                on = f"{inputs}, V = {vocab_size:,}, {rows} row{'s' * (rows != 1)}"
                lines.append(_verdict(goal.what, on, top / bottom, goal.limit, goal.at_most))
    if calls:
        on = f"V = {CALL_VOCAB_SIZE}, 1 row"
        python = calls[SAMPLER].median - calls[KERNEL].median
        lines.append(_verdict("Python around a prepared call, µs", on, python, CALL_GOAL_US, True))
    return lines


def _verdict(what: str, on: str, value: float, limit: float, at_most: bool) -> dict[str, Any]:
    return {
        "goal": what,
        "on": on,
        "value": round(value, 3),
        "limit": limit,
        "at_most": at_most,
        "met": value <= limit if at_most else value >= limit,
    }


def time_calls(protocol: Protocol) -> dict[str, Timing]:
    """Time calls on the CPU in which the kernel has almost nothing to do."""
    logits = torch.randn(1, CALL_VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=0)
    batch = BatchParams.from_list([params], positions=[0])
    sampler = Sampler([params], vocab_size=CALL_VOCAB_SIZE)
    call = make_call(logits, batch, history=None)
    args, output = make_args(call), make_results(call)
    set_results(args, output)
    calls = {
        SAMPLER: lambda _: sampler(logits),
        KERNEL: lambda _: cpu.LIBRARY.run(args),
        "sample, BatchParams": lambda _: sample(logits, batch),
        "sample, SamplingParams": lambda _: sample(logits, params),
    }

    return measure({name: runner(Contender(call)) for name, call in calls.items()}, 1, protocol)
