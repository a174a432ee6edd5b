"""The part of the benchmark that runs transformers: ``python -m benchmarks.engines.batching``.

transformers' own sampler has temperature, top-k and top-p for each request, and no penalties, min-p
or seeds. So it does less there; a greedy request is one with top-k 1.
"""

from __future__ import annotations

from typing import Any

from benchmarks.engines import watch


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate all requests together, some rounds; see :func:`benchmarks.engines.watch.measure`."""
    import torch
    import transformers
    from transformers.generation.continuous_batching import continuous_api as api

    from llm_sampling import SamplingParams
    from llm_sampling.integrations.continuous_batching import fused_continuous_batching

    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    )
    model = model.to(job["device"]).eval()
    requests = job["requests"]
    # the processors of transformers' own sampler are made where the config has these three
    of_processors = {} if job["is_ours"] else {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    config = transformers.GenerationConfig(do_sample=True, eos_token_id=-1, **of_processors)
    batching = transformers.ContinuousBatchingConfig(
        per_request_processors=True,
        use_cuda_graph=False,  # a replayed graph calls no function that could be watched
        num_blocks=64,
        max_batch_tokens=2048,
        max_requests_per_batch=len(requests),
    )
    if job["is_ours"]:
        fused_continuous_batching()
        options = [{"params": SamplingParams(**request["params"])} for request in requests]
    else:
        vocab_size = model.config.vocab_size
        options = [own_options(request["params"], vocab_size) for request in requests]

    def generate(tokens: int) -> list[list[int]]:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            names = [
                manager.add_request(request["ids"], max_new_tokens=tokens, **of_request)
                for request, of_request in zip(requests, options, strict=True)
            ]
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                output = manager.get_result(timeout=600)
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.is_finished():
                    done[output.request_id] = output.generated_tokens
        return [done[name] for name in names]

    runner, processors = api.ModelRunner, api.ContinuousBatchingLogitsProcessorList
    if job["is_ours"]:
        manager_class: Any = api.ContinuousBatchingManager
        runner, processors = manager_class.runner, manager_class.processors
    meters = watch.Meters(
        step=[(runner, "compute_batch"), (processors, "prepare_tensor_args")],
        draw=(runner, "_sample"),
        follow=[(processors, "__call__"), (processors, "prepare_tensor_args")],
    )
    found = watch.measure(generate, meters, tokens=job["tokens"], rounds=job["rounds"])
    if not job["is_ours"]:
        watch.leave_penalised_out(found, requests)
    return found | {"sampler": runner.__module__, "version": transformers.__version__}


def own_options(params: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """What transformers' own sampler takes of a request's parameters."""
    is_greedy = params["temperature"] == 0
    return {
        "temperature": 1.0 if is_greedy else float(params["temperature"]),
        "top_k": 1 if is_greedy else params.get("top_k", vocab_size),
        "top_p": params.get("top_p", 1.0),
    }


if __name__ == "__main__":
    watch.answer(run)
