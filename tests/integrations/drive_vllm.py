"""Runs vLLM's engine in this process, for test_vllm_engine.py: `drive_vllm.py JOB RESULT`.

Both are files of ``torch.save``. JOB has ``engine``, the arguments of ``vllm.LLM``, and ``calls``,
each a list of requests that are generated together: a prompt's ids, and the arguments of
``vllm.SamplingParams``. RESULT has the outputs of each call, the inputs and outputs of each step of
the sampler, the number of preempted requests, the sampler's module, whether the scheduling was
asynchronous, and how often it waited for tokens.
"""

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main(job, result):
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    from llm_sampling.integrations.vllm.v1 import Requests

    job = torch.load(job, weights_only=False)
    if job["engine"].get("async_scheduling"):
        keep_async_scheduling()
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    scheduler = core.scheduler
    steps, preempted = [], []
    forward, preempt = runner.sampler.forward, scheduler._preempt_request
    poison = job.get("poison")  # [step, row]

    def logged(logits, sampling_metadata, *args, **options):
        if poison is not None and len(steps) == poison[0]:
            logits[poison[1]] = float("nan")
        batch, given = runner.input_batch, logits.clone()
        outputs = [list(output) for output in batch.req_output_token_ids]
        drawn = forward(logits, sampling_metadata, *args, **options)
        steps.append(
            {
                "requests": list(batch.req_ids),
                "prompts": [runner.requests[name].prompt_token_ids for name in batch.req_ids],
                "outputs": outputs,
                "seeds": {
                    row: generator.initial_seed() for row, generator in batch.generators.items()
                },
                "ours": [
                    [request.params.seed for request in processor._rows]
                    for processor in batch.logitsprocs.argmax_invariant
                    if isinstance(processor, Requests)
                ],
                "logits": given,
                "tokens": drawn.sampled_token_ids.flatten().tolist(),
            }
        )
        return drawn

    def counted(request, *args, **options):
        preempted.append(request.request_id)
        return preempt(request, *args, **options)

    runner.sampler.forward, scheduler._preempt_request = logged, counted
    waits = count_waits(runner)
    calls = []
    for requests in job["calls"]:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests]
        params = [SamplingParams(**params) for _, params in requests]
        first = len(steps)
        outputs = [done.outputs[0] for done in llm.generate(prompts, params, use_tqdm=False)]
        calls.append(
            {
                "tokens": [list(output.token_ids) for output in outputs],
                "texts": [output.text for output in outputs],
                "logprobs": [logprobs_of(output) for output in outputs],
                "steps": steps[first:],
            }
        )
    sampler = type(runner.sampler)
    done = {"calls": calls, "preempted": len(preempted), "sampler": sampler.__module__}
    done |= {"is_async": runner.use_async_scheduling, "waits": waits}
    torch.save(done, result)


def count_waits(runner):
    """A list that gets an entry whenever the runner waits for the tokens of the step before."""
    waits = []
    update = runner.input_batch.update_async_output_token_ids

    def counted():
        batch = runner.input_batch
        if batch.sampled_token_ids_cpu is not None and batch.sampling_metadata.output_token_ids:
            waits.append(len(batch.req_ids))
        return update()

    runner.input_batch.update_async_output_token_ids = counted
    return waits


def keep_async_scheduling():
    """vLLM turns it off on a CPU, as the last thing that it does with the config there."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)


def logprobs_of(output):
    """For each token a list of (id, logprob, rank)."""
    if output.logprobs is None:
        return None
    return [[(i, x.logprob, x.rank) for i, x in place.items()] for place in output.logprobs]


if __name__ == "__main__":
    main(*sys.argv[1:])
