"""Engines with their own samplers and with the kernel: speed, the sampler's share, its launches.

``python -m benchmarks.engines`` prints a markdown report; ``--json`` writes it to a file. Engines
need environments of their own, which the pages under docs/engines make; continuous batching needs
this one. Engines whose environment is not there are left out, with the reason.

All requests are generated together, some rounds, and once more while the sampler's launches are
counted. A step is what the engine's model runner does for a token of each request. The sampler's
part is the draw, and what follows requests that come and go and tokens that were drawn. Greedy
texts must be the same with both samplers, where the engine's own honours what they ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import watch
from benchmarks.environments import python_of
from benchmarks.inputs import AbsentError
from benchmarks.timing import ROOT, command_line, environment, progress, write_result
from benchmarks.vllm_engine import convert, make_requests
from llm_sampling.generation import models

OWN, OURS = "its own", "llm_sampling"


@dataclass(frozen=True)
class Engine:
    """An engine that is measured.

    Attributes:
        title: its row of the table.
        worker: the module of ``benchmarks.engines`` that runs it.
        environment: the name of its environment; None for this one.
        switch: the environment variable that turns the plug-in on; None where the job does.
        options: more of the job.
        is_timed_on_cpu: whether its times on a CPU say anything.
    """

    title: str
    worker: str
    environment: str | None = None
    switch: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    is_timed_on_cpu: bool = True


VLLM = {"worker": "vllm", "environment": "vllm", "switch": "LLM_SAMPLING_VLLM"}
ENGINES = {
    "vllm-v1": Engine("vLLM, V1", **VLLM, options={"runner": "V1", "is_async": False}),
    "vllm-v1-async": Engine(
        "vLLM, V1, asynchronous", **VLLM, options={"runner": "V1", "is_async": True}
    ),
    "vllm-v2": Engine(
        "vLLM, V2", **VLLM, options={"runner": "V2", "is_async": True}, is_timed_on_cpu=False
    ),
    "sglang": Engine("SGLang", "sglang", "sglang", "LLM_SAMPLING_SGLANG"),
    "continuous-batching": Engine("transformers, continuous batching", "batching"),
}


def run(engine: Engine, job: dict[str, Any], sampler: str) -> dict[str, Any]:
    """Run a job in a process of the engine's environment; returns its result.

    Raises:
        AbsentError: the environment has not been made.
        RuntimeError: the engine ended with an error.
    """
    python = sys.executable if engine.environment is None else str(python_of(engine.environment))
    is_ours = sampler == OURS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = job | engine.options | {"is_ours": is_ours, "folder": name}
        (folder / "job").write_text(json.dumps(job), encoding="utf-8")
        settings = {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
        if engine.switch is not None:
            settings[engine.switch] = str(int(is_ours))
        done = subprocess.run(
            [
                python,
                "-m",
                f"benchmarks.engines.{engine.worker}",
                folder / "job",
                folder / "result",
            ],
            cwd=ROOT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{engine.title}, {sampler}: {done.stderr[-4000:]}")
        result: dict[str, Any] = json.loads((folder / "result").read_text(encoding="utf-8"))
        return result


def line_of(
    name: str, results: dict[str, dict[str, Any]], requests: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the report shows of an engine.

    Args:
        name: of the engine.
        results: of :func:`run`, by sampler.
        requests: of the job.
    """
    own, ours = results[OWN], results[OURS]
    greedy = [
        i
        for i, request in enumerate(requests)
        if request["params"]["temperature"] == 0 and own["tokens"][i] is not None
    ]
    return {
        "engine": name,
        "version": ours["version"],
        "torch": ours["torch"],
        "greedy": len(greedy),
        "greedy_changed": sum(own["tokens"][i] != ours["tokens"][i] for i in greedy),
        "samplers": {
            sampler: {"module": of["sampler"], "launches": round(of["launches"], 1)}
            | watch.medians(of["rounds"])
            for sampler, of in results.items()
        },
    }


def report(record: dict[str, Any]) -> str:
    """The markdown of a results file."""
    machine = record["environment"]
    text = f"`{record['command']}`, {machine['cpu']}, {record['threads']} threads, "
    text += f"{machine['date']}\n\n"
    text += f"{record['requests']} requests, {record['tokens']} tokens each, {record['dtype']}; "
    text += f"medians of {record['rounds']} rounds\n\n"
    text += "| engine | sampler | tokens/s | step, ms | sampler, ms | share | launches a step |\n"
    text += "|---|---|--:|--:|--:|--:|--:|\n"
    for line in record["lines"]:
        title = f"{ENGINES[line['engine']].title} ({line['version']})"
        for sampler, of in line["samplers"].items():
            text += f"| {title} | {sampler} | "
            if record["device"] == "cpu" and not ENGINES[line["engine"]].is_timed_on_cpu:
                text += "| | | "
            else:
                text += f"{of['tokens_per_s']:,.1f} | {of['step_ms']:.1f} "
                text += f"| {of['sampler_ms']:.2f} | {of['share']:.1%} "
            text += f"| {of['launches']:.1f} |\n"
    for name, reason in record["absent"].items():
        text += f"\n{ENGINES[name].title}: absent, {reason}\n"
    return text


def is_right(record: dict[str, Any]) -> bool:
    """Whether the kernel drew where it was to, and greedy texts are the same with both samplers."""
    return all(
        line["greedy_changed"] == 0
        and line["samplers"][OURS]["module"].startswith("llm_sampling.")
        and not line["samplers"][OWN]["module"].startswith("llm_sampling.")
        for line in record["lines"]
    )


def main(argv: Sequence[str]) -> int:
    """Print the report; 1 if it is not :func:`is_right`."""
    parser = argparse.ArgumentParser(description="Engines with their samplers and with ours.")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--model", type=Path, help="a folder, instead of the default model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    record = environment(argv)
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    lines, absent = [], {}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or convert(Path(folder))
        tokenizer = models.load(model, progress).tokenizer
        requests = [
            {"ids": tokenizer(request["prompt"]).input_ids, "params": request["params"]}
            for request in make_requests(options.requests)
        ]
        job = {"model": str(model), "requests": requests, "dtype": dtype}
        job |= {name: getattr(options, name) for name in ("device", "threads", "tokens", "rounds")}
        for name in options.engines:
            engine, results = ENGINES[name], {}
            is_timed = options.device != "cpu" or engine.is_timed_on_cpu
            try:
                for sampler in (OWN, OURS):
                    progress(f"{name}, {sampler}")
                    rounds = options.rounds if is_timed else 1
                    results[sampler] = run(engine, job | {"rounds": rounds}, sampler)
            except AbsentError as error:
                absent[name] = str(error)
                continue
            lines.append(line_of(name, results, requests))
    whole = {
        "command": command_line("engines", argv),
        "environment": record,
        **{name: getattr(options, name) for name in ("device", "threads", "requests", "tokens")},
        "rounds": options.rounds,
        "dtype": dtype,
        "lines": lines,
        "absent": absent,
    }
    print(report(whole))
    write_result(options.json, whole)
    return 0 if is_right(whole) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
