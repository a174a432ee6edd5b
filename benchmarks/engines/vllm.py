"""The part of the benchmark that runs in vLLM's environment: ``python -m benchmarks.engines.vllm``.

V1 is timed. V2 runs its Triton kernels in Triton's interpreter where there is no GPU, so that its
times say nothing there; its launches do.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.engines import watch


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate all requests together, some rounds; see :func:`benchmarks.engines.watch.measure`."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(job["runner"] == "V2"))
    if job["runner"] == "V2" and job["device"] == "cpu":
        interpret_triton()
    import vllm

    if job["is_async"] and job["device"] == "cpu":
        keep_async_scheduling()
    if job["runner"] == "V2" and job["device"] == "cpu":
        import vllm.v1.sample.ops.topk_topp_sampler as filters
        import vllm.v1.worker.cpu.shm

        filters.HAS_TRITON = False  # this kernel of vLLM's does not run in the interpreter
    llm = vllm.LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=512,
        max_num_seqs=len(job["requests"]),
        enforce_eager=job["device"] == "cpu",
        enable_prefix_caching=False,
        enable_chunked_prefill=False,  # V1's CPU runner ends there with a seeded request
        async_scheduling=job["is_async"],
        seed=0,
        generation_config="vllm",  # a model's own defaults are for servers alone
    )
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    prompts = [vllm.TokensPrompt(prompt_token_ids=request["ids"]) for request in job["requests"]]

    def generate(tokens: int) -> list[list[int]]:
        params = [
            vllm.SamplingParams(
                **request["params"], ignore_eos=True, max_tokens=tokens, detokenize=False
            )
            for request in job["requests"]
        ]
        done = llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    if job["runner"] == "V1":
        draw = runner.sampler, "forward"
        batch = runner.input_batch
        follow = [(batch, "refresh_metadata"), (batch, "update_async_output_token_ids")]
    else:
        draw = type(runner.sampler), "__call__"
        import vllm.v1.worker.gpu.model_runner as module

        follow = [(runner.sampler, "add_request"), (runner.sampler, "apply_staged_writes")]
        follow += [(module, "post_update")]
    step = [(runner, "execute_model"), (runner, "sample_tokens")]
    meters = watch.Meters(step, draw, follow)
    found = watch.measure(generate, meters, tokens=job["tokens"], rounds=job["rounds"])
    return found | {"sampler": type(runner.sampler).__module__, "version": vllm.__version__}


def interpret_triton() -> None:
    """Have Triton's interpreter run vLLM's kernels, which takes a backend that says it is there."""
    os.environ["TRITON_INTERPRET"] = "1"
    import types

    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def keep_async_scheduling() -> None:
    """Keep it on a CPU, where vLLM turns it off as the last thing that it does with the config."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)


if __name__ == "__main__":
    watch.answer(run)
