"""Runs vLLM's engine in this process, for test_vllm_engine.py: `drive_vllm.py JOB RESULT`.

Both are files of ``torch.save``. JOB has ``engine``, the arguments of ``vllm.LLM``, ``runner``, 1
or 2, and ``calls``, each a list of requests that are generated together: a prompt's ids, and the
arguments of ``vllm.SamplingParams``. RESULT has the outputs of each call, the inputs and outputs of
each step of the sampler, the number of preempted requests, the sampler's module, whether the
scheduling was asynchronous, and how often V1 waited for tokens. With V2, JOB may have ``drafts``, a
list of ids for each request, of which its drafts are made; then RESULT has ``verified``, what the
sampler made of the rows of drafts.
"""

import os
import sys
from pathlib import Path

# last, so that the package is the installed one
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.engines.vllm import interpret_triton, keep_async_scheduling

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main(job, result):
    import torch

    job = torch.load(job, weights_only=False)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(job["runner"] - 1)
    if job["runner"] == 2:
        interpret_triton()
    from vllm import LLM, SamplingParams, TokensPrompt

    if job["engine"].get("async_scheduling"):
        keep_async_scheduling()
    if job["runner"] == 2:
        import vllm.v1.sample.ops.topk_topp_sampler as filters
        import vllm.v1.worker.cpu.shm  # noqa: F401  it has to come before V2's modules

        filters.HAS_TRITON = False  # this kernel of vLLM's does not run in the interpreter
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    scheduler = core.scheduler
    preempted = []
    preempt = scheduler._preempt_request

    def counted(request, *args, **options):
        preempted.append(request.request_id)
        return preempt(request, *args, **options)

    scheduler._preempt_request = counted
    steps = (logged_v1 if job["runner"] == 1 else logged_v2)(runner, job.get("poison"))
    waits = count_waits(runner) if job["runner"] == 1 else None
    verified = draft(runner, job["drafts"]) if job.get("drafts") else None
    calls = []
    for requests in job["calls"]:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests]
        params = [SamplingParams(**with_choices(params)) for _, params in requests]
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
    done |= {"is_async": scheduler.scheduler_config.async_scheduling, "waits": waits}
    done["verified"] = verified
    torch.save(done, result)


def with_choices(params):
    """The arguments of SamplingParams; "choice" stands for a structured output."""
    from vllm.sampling_params import StructuredOutputsParams

    params = dict(params)
    if "choice" in params:
        params["structured_outputs"] = StructuredOutputsParams(choice=params.pop("choice"))
    return params


def logged_v1(runner, poison):
    """A list that gets the inputs and outputs of each step of V1's sampler.

    Args:
        runner: the model runner.
        poison: None, or a step and a row whose logits become NaN.
    """
    from llm_sampling.integrations.vllm.v1 import Requests

    steps, forward = [], runner.sampler.forward

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

    runner.sampler.forward = logged
    return steps


def logged_v2(runner, poison):
    """As :func:`logged_v1`, of V2's sampler; with the position that the place of a row gives."""
    steps, sample = [], runner.sampler.sample

    def logged(logits, slots, idx_mapping, slots_np, pos, *args, **options):
        if poison is not None and len(steps) == poison[0]:
            logits[poison[1]] = float("nan")
        given, state = logits.clone(), runner.req_states
        tokens, shown = sample(logits, slots, idx_mapping, slots_np, pos, *args, **options)
        ids = [state.all_token_ids.gpu[i, : state.total_len.gpu[i]].tolist() for i in slots_np]
        prompts = [int(state.prompt_len.np[i]) for i in slots_np]
        seeds = [int(runner.sampler.sampling_states.seeds.np[i]) for i in slots_np]
        is_given = runner.sampler.sampling_states.seeds_set
        steps.append(
            {
                "requests": [state.index_to_req_id[i] for i in slots_np],
                "prompts": [row[:n] for row, n in zip(ids, prompts, strict=True)],
                "outputs": [row[n:] for row, n in zip(ids, prompts, strict=True)],
                "positions": [
                    place + 1 - n for place, n in zip(pos.tolist(), prompts, strict=True)
                ],
                "seeds": {row: seeds[row] for row, i in enumerate(slots_np) if is_given[i]},
                "ours": [[seed % 2**64 for seed in seeds]],
                "logits": given,
                "tokens": tokens.tolist(),
            }
        )
        return tokens, shown

    runner.sampler.sample = logged
    return steps


def draft(runner, texts):
    """Have V2 verify drafts from these texts; return a list that gets the rows of each draft.

    vLLM's own n-gram speculator has a kernel that does not run in the interpreter.

    Args:
        runner: the model runner.
        texts: by the number of the request, the ids of its output. Every third draft is wrong from
            its second token on.
    """
    import torch

    state, verified, calls = runner.req_states, [], []

    def propose(input_batch, *args, num_speculative_tokens=None, dummy_run=False, **options):
        length = runner.speculator.num_speculative_steps
        drafts = torch.zeros(input_batch.num_reqs, length, dtype=torch.int64)
        for row, slot in enumerate(() if dummy_run else input_batch.idx_mapping_np):
            calls.append(row)
            number = int(state.index_to_req_id[slot].partition("-")[0])
            done = int(state.total_len.gpu[slot] - state.prompt_len.np[slot])
            given = texts[number][done : done + length] if done > 0 else []
            if len(calls) % 3 == 0:
                given = given[:1] + [(token + 1) % 250 for token in given[1:]]
            drafts[row, : len(given)] = torch.tensor(given, dtype=torch.int64)
        return drafts

    apply = runner.sampler.apply_sampling_params

    def logged(logits, slots, idx_mapping, slots_np, pos, input_ids, local_pos, *args, **options):
        given = logits.clone()
        shown = apply(
            logits, slots, idx_mapping, slots_np, pos, input_ids, local_pos, *args, **options
        )
        for row, slot in enumerate(slots.tolist()):
            prompt, length = int(state.prompt_len.np[slot]), int(state.total_len.gpu[slot])
            ids = state.all_token_ids.gpu[slot, :length].tolist()
            before = int(local_pos[row])
            verified.append(
                {
                    "request": state.index_to_req_id[slot],
                    "prompt": ids[:prompt],
                    "output": ids[prompt:],
                    "draft": input_ids[row - before + 1 : row + 1].tolist(),
                    "logits": given[row],
                    "processed": shown[row].clone(),
                }
            )
        return shown

    runner.speculator.propose = propose
    runner.sampler.apply_sampling_params = logged
    return verified


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


def logprobs_of(output):
    """For each token a list of (id, logprob, rank)."""
    if output.logprobs is None:
        return None
    return [[(i, x.logprob, x.rank) for i, x in place.items()] for place in output.logprobs]


if __name__ == "__main__":
    main(*sys.argv[1:])
