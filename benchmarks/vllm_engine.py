"""64 requests in vLLM's engine on the CPU, by its own sampler and by the kernel.

``python -m benchmarks.vllm_engine`` prints a markdown report; ``--json`` writes it to a file. It
needs an environment with vLLM and this package, which docs/engines/vllm.md makes.

Every run is in a process of its own, and the two samplers take turns. All requests are generated
together, by ``LLM.generate`` and through the OpenAI server with the openai client, then each seeded
one alone; and once more with a cache so small that requests are preempted. Texts and tokens are
compared as well as times: greedy texts must be the same with both samplers, and with the kernel the
tokens of every seeded request must be the same in every run. For vLLM's own sampler it is counted
how many seeded requests change.

A step is what the model runner does for a token of each request. The sampler's share is the time in
``Sampler.forward`` and in ``InputBatch.refresh_metadata``, where each sampler follows added and
removed requests, over that of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environments import python_of
from benchmarks.inputs import AbsentError
from benchmarks.timing import ROOT, command_line, environment, progress, write_result
from llm_sampling.generation import models

TEXT = Path(__file__).with_name("text.txt")
SAMPLERS = {"vllm": "0", "llm_sampling": "1"}

#: vLLM's parameters for each kind of request; there are equally many of each. Requests have a seed
#: each unless they are greedy or of the last kind.
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition 1.1": {"temperature": 0.0, "repetition_penalty": 1.1},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 50, min-p 0.05": {"temperature": 1.0, "top_k": 50, "min_p": 0.05},
    "repetition 1.1, T 0.8, top-k 50, top-p 0.9": {
        "repetition_penalty": 1.1,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
    },
    "frequency 0.5, presence 0.3, top-p 0.95": {
        "temperature": 1.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
        "top_p": 0.95,
    },
    "top-p 0.9, no seed": {"temperature": 1.0, "top_p": 0.9},
}
UNSEEDED = "top-p 0.9, no seed"
#: float32, so that the logits depend less on the batch, since only the sampler is compared. Chunked
#: prefill is off: vLLM's runner would ask a seeded request's generator for an offset, which a CPU's
#: generator does not have.
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "block_size": 32,
    "seed": 0,
    "generation_config": "vllm",  # a model's own defaults are for servers alone
}


def make_requests(count: int) -> list[dict[str, Any]]:
    """``count`` prompts and parameters, the kinds in turn."""
    words = TEXT.read_text(encoding="utf-8").split()
    kinds = list(KINDS)
    requests = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        params = dict(KINDS[kind])
        if params["temperature"] > 0 and kind != UNSEEDED:
            params["seed"] = number
        start = number * 7 % (len(words) - 40)
        prompt = " ".join(words[start : start + 8 + number % 24])
        requests.append({"kind": kind, "prompt": prompt, "params": params})
    return requests


def convert(folder: Path) -> Path:
    """The default model as a folder that vLLM can read: its GGUF's weights in a fresh model."""
    found = models.load(models.default_model_path(), progress)
    options = found.model.config.to_dict()
    options.pop("quantization_config", None)
    fresh = type(found.model)(type(found.model.config)(**options)).to(found.model.dtype)
    fresh.load_state_dict(found.model.state_dict())
    fresh.generation_config = found.model.generation_config
    fresh.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    return folder


def run(python: Path, job: dict[str, Any], sampler: str, threads: int) -> dict[str, Any]:
    """Run a job in a process of vLLM's environment; returns its result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = job | {"log": str(folder / "server.log")}
        (folder / "job").write_text(json.dumps(job), encoding="utf-8")
        settings = {
            "LLM_SAMPLING_VLLM": SAMPLERS[sampler],
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [str(python), "-m", "benchmarks.vllm_worker", folder / "job", folder / "result"],
            cwd=ROOT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            log = Path(job["log"])
            served = log.read_text(encoding="utf-8")[-4000:] if log.exists() else ""
            raise RuntimeError(f"{job['what']}, {sampler}: {done.stderr[-4000:]}{served}")
        result: dict[str, Any] = json.loads((folder / "result").read_text(encoding="utf-8"))
        return result


def share_changed(pairs: Sequence[tuple[object, object]]) -> dict[str, int]:
    """How many of the pairs differ, of how many."""
    return {"changed": sum(one != other for one, other in pairs), "of": len(pairs)}


def compare(
    requests: Sequence[dict[str, Any]], results: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """What the texts and tokens of all runs say.

    Args:
        requests: of :func:`make_requests`.
        results: by sampler, then by run: "engine", "preempted" and "server".

    Returns:
        ``greedy``: by run, how many greedy requests differ between the samplers. ``seeds``: by
        sampler, how many seeded requests differ from their tokens in the full batch.
    """
    greedy = [i for i, request in enumerate(requests) if request["params"]["temperature"] == 0]
    seeded = [i for i, request in enumerate(requests) if "seed" in request["params"]]
    own, ours = results["vllm"], results["llm_sampling"]
    seeds = {}
    for sampler, of in results.items():
        batch = of["engine"]["together"]
        seeds[sampler] = {
            "alone": share_changed([(of["engine"]["alone"][str(i)], batch[i]) for i in seeded]),
            "after preemption": share_changed(
                [(of["preempted"]["together"][i], batch[i]) for i in seeded]
            ),
            "in every round": share_changed(
                [(of["engine"]["same_every_round"][i], True) for i in seeded]
            ),
            "served, alone": share_changed(
                [(of["server"]["alone"][str(i)], of["server"]["together"][i]) for i in seeded]
            ),
        }
    return {
        "greedy": {
            name: share_changed(
                [(own[name]["together"][i], ours[name]["together"][i]) for i in greedy]
            )
            for name in own
        },
        "seeds": seeds,
    }


def is_right(checks: dict[str, Any]) -> bool:
    """Whether nothing changed that must not."""
    promised = [*checks["greedy"].values(), *checks["seeds"]["llm_sampling"].values()]
    return all(line["changed"] == 0 for line in promised)


def measure(
    results: dict[str, dict[str, dict[str, Any]]], count: int, tokens: int
) -> list[dict[str, Any]]:
    """A line for each sampler; medians over the rounds."""
    lines = []
    for sampler, of in results.items():
        rounds = of["engine"]["rounds"]

        def median(values: Sequence[float], digits: int) -> float:
            return round(statistics.median(values), digits)

        drawing = [r["forward_seconds"] + r["refresh_seconds"] for r in rounds]
        lines.append(
            {
                "sampler": sampler,
                "rounds": len(rounds),
                "step_ms": median([r["step_seconds"] / r["steps"] * 1e3 for r in rounds], 2),
                "forward_ms": median([r["forward_seconds"] / r["steps"] * 1e3 for r in rounds], 3),
                "refresh_ms": median([r["refresh_seconds"] / r["steps"] * 1e3 for r in rounds], 3),
                "share": median(
                    [d / r["step_seconds"] for d, r in zip(drawing, rounds, strict=True)], 4
                ),
                "tokens_per_s": median([count * tokens / r["seconds"] for r in rounds], 1),
                "served_tokens_per_s": median(
                    [count * tokens / r["seconds"] for r in of["server"]["rounds"]], 1
                ),
            }
        )
    return lines


def report(record: dict[str, Any]) -> str:
    """The markdown of a results file."""
    machine, checks = record["environment"], record["checks"]
    text = f"`{record['command']}`, {machine['cpu']}, {record['threads']} threads, "
    text += f"vLLM {record['vllm']}, torch {record['torch']}, {machine['date']}\n\n"
    text += f"{record['requests']} requests, {record['tokens']} tokens each\n\n"
    text += (
        "| sampler | tokens/s | served, tokens/s | step, ms | forward, ms | follow, ms | share |\n"
    )
    text += "|---|--:|--:|--:|--:|--:|--:|\n"
    for line in record["lines"]:
        text += f"| {line['sampler']} | {line['tokens_per_s']:,.1f} "
        text += f"| {line['served_tokens_per_s']:,.1f} | {line['step_ms']:.1f} "
        text += f"| {line['forward_ms']:.2f} | {line['refresh_ms']:.2f} | {line['share']:.1%} |\n"
    text += "\n| seeded requests whose tokens changed | " + " | ".join(checks["seeds"]) + " |\n"
    text += "|---" + "|--:" * len(checks["seeds"]) + "|\n"
    for when in checks["seeds"]["vllm"]:
        cells = [f"{of[when]['changed']} of {of[when]['of']}" for of in checks["seeds"].values()]
        text += f"| {when} | " + " | ".join(cells) + " |\n"
    text += "\n| greedy requests that differ between the samplers | |\n|---|--:|\n"
    for name, line in checks["greedy"].items():
        text += f"| {name} | {line['changed']} of {line['of']} |\n"
    counts = ", ".join(f"{of} {number}" for of, number in record["preempted"].items())
    return text + f"\nPreempted in the run for it: {counts}.\n"


def main(argv: Sequence[str]) -> int:
    """Print the report; 1 if a text or a token is not what it must be."""
    parser = argparse.ArgumentParser(description="vLLM's engine with its sampler and with ours.")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--python", type=Path, help="of the environment that has vLLM")
    parser.add_argument("--model", type=Path, help="a folder, instead of the default model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=96, help="of the cache that is too small")
    options = parser.parse_args(argv)
    if options.requests < len(KINDS):
        parser.error(f"--requests must be an integer >= {len(KINDS)}, got {options.requests}")
    try:
        python = options.python or python_of("vllm")
    except AbsentError as error:
        parser.error(str(error))
    record = environment(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or convert(Path(folder))
        requests = make_requests(options.requests)
        seeded = [i for i, request in enumerate(requests) if "seed" in request["params"]]
        arguments = ENGINE | {"model": str(model), "max_num_seqs": options.requests}
        job = {"engine": arguments, "requests": requests, "tokens": options.tokens}
        job |= {"rounds": options.rounds, "alone": seeded}
        small = arguments | {"num_gpu_blocks_override": options.blocks}
        jobs = {
            "engine": job | {"what": "engine"},
            "preempted": job | {"what": "engine", "engine": small, "rounds": 1, "alone": []},
            "server": job | {"what": "server"},
        }
        results: dict[str, dict[str, dict[str, Any]]] = {sampler: {} for sampler in SAMPLERS}
        for name, one in jobs.items():
            for sampler in SAMPLERS:
                progress(f"{name}, {sampler}")
                results[sampler][name] = run(python, one, sampler, options.threads)
    first = results["llm_sampling"]["engine"]
    checks = compare(requests, results)
    whole = {
        "command": command_line("vllm_engine", argv),
        "environment": record,
        "threads": first["threads"],
        "vllm": first["vllm"],
        "torch": first["torch"],
        "engine": ENGINE,
        "requests": options.requests,
        "tokens": options.tokens,
        "samplers": {name: of["engine"]["sampler"] for name, of in results.items()},
        "preempted": {
            name: of["preempted"]["rounds"][0]["preempted"] for name, of in results.items()
        },
        "checks": checks,
        "lines": measure(results, options.requests, options.tokens),
    }
    print(report(whole))
    write_result(options.json, whole)
    return 0 if is_right(checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
