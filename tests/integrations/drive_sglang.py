"""Runs SGLang's engine, for test_sglang_engine.py: `drive_sglang.py JOB RESULT`.

Both are files of ``torch.save``. JOB has ``engine``, the arguments of ``sglang.Engine``, and
``calls``, each a list of requests that are generated together: a prompt's ids, the sampling
parameters, and other arguments of ``GenerateReqInput``. RESULT has the outputs of each call, and
what the sampler was shown and gave in each step, and for every other rank the tokens of each step.

SGLang samples in a process of its own for each rank. There :func:`record` is a plug-in of SGLang's,
which appends each step to the rank's file in the folder that the environment variable LOG_OF_STEPS
names.
"""

import os
import pickle
import sys
from pathlib import Path

#: Environment variables: a folder; "STEP ROW" that gets NaN; the flag ``--sampling-backend`` that
#: counts on a CPU too; whether a name is missing on which the plug-in relies.
LOG_OF_STEPS, POISON, KEEP_FLAG, REFUSE = "LOG_OF_STEPS", "POISON", "KEEP_FLAG", "REFUSE"

DEFAULTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "max_running_requests": 32,
    "context_length": 512,
    "dtype": "float32",
    "random_seed": 0,
    "log_level": "info",
}


def main(job, result):
    import sglang
    import torch
    from sglang.srt.managers.io_struct import GenerateReqInput

    job = torch.load(job, weights_only=False)
    engine = sglang.Engine(**DEFAULTS | job["engine"])
    calls = []
    try:
        for number, requests in enumerate(job["calls"]):
            more = {}
            for name in {name for *_, extra in requests for name in extra}:
                values = [extra.get(name, NOTHING[name]) for *_, extra in requests]
                more[name] = values
            if "custom_logit_processor" in more:
                more["custom_logit_processor"] = [
                    None if name is None else processors()[name].to_str()
                    for name in more["custom_logit_processor"]
                ]
            asked = GenerateReqInput(
                input_ids=[prompt for prompt, *_ in requests],
                sampling_params=[dict(params) for _, params, _ in requests],
                rid=[f"{number}-{i}" for i in range(len(requests))],
                **more,
            )
            generated = engine.tokenizer_manager.generate_request(asked, None)
            outputs = engine.loop.run_until_complete(generated.__anext__())
            calls.append(
                {
                    "tokens": [output["output_ids"] for output in outputs],
                    "about": [output["meta_info"] for output in outputs],
                }
            )
    finally:
        engine.shutdown()
    first, *others = (all_of(file) for file in sorted(Path(os.environ[LOG_OF_STEPS]).iterdir()))
    done = {"calls": calls, "sampler": first[0], "steps": first[1:]}
    done["others"] = [[step["tokens"] for step in steps[1:]] for steps in others]
    torch.save(done, result)


#: What a request has that does not give an argument of ``GenerateReqInput``.
NOTHING = {
    "return_logprob": False,
    "top_logprobs_num": 0,
    "custom_logit_processor": None,
    "return_sampling_mask": False,
}


def all_of(path):
    found = []
    with open(path, "rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def processors():
    """Custom logit processors, by name."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    class Halves(CustomLogitProcessor):
        """Halves the logits, which is no multiple of what a penalty does to some of them."""

        def __call__(self, logits, custom_param_list=None):
            return logits * 0.5

    return {"halves": Halves}


# ---- in the process of the scheduler ----


def record():
    """Called by SGLang in each of its processes, by an entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang.srt.model_executor.model_runner.ModelRunner.initialize"
    worker = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
    steps = Steps()
    HookRegistry.register(runner, steps.watch, HookType.AFTER)
    HookRegistry.register(worker, steps.begin, HookType.BEFORE)
    if os.environ.get(KEEP_FLAG):
        cpu = "sglang.srt.arg_groups.platform_hook.handle_cpu_backends"
        HookRegistry.register(cpu, keep_flag, HookType.AFTER)
    if os.environ.get(REFUSE):
        from sglang.srt.layers import sampler

        del sampler._SamplingMaskCapture


def keep_flag(result, server_args):
    """SGLang takes its backend "pytorch" on a CPU; have it take the one that the flag names."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "test", sampling_backend=os.environ[KEEP_FLAG])


def tables_of(info):
    """The names of the tables of SGLang's penalties, of the overlap scheduler and without it."""
    penalties = ("acc_additive_penalties", "acc_scaling_penalties")
    found = [name for name in penalties if getattr(info, name) is not None]
    makers = info.penalizer_orchestrator and info.penalizer_orchestrator.penalizers.values()
    return found + [type(maker).__name__ for maker in makers or () if maker.is_prepared()]


class Steps:
    """Writes what each step of the sampler was shown and gave."""

    def begin(self, worker, batch=None, *args, **options):
        self.names = [request.rid for request in (batch.reqs if batch is not None else ())]

    def watch(self, result, runner, *args, **options):
        from sglang.srt.runtime_context import get_parallel

        from llm_sampling.integrations.sglang import Requests

        path = Path(os.environ[LOG_OF_STEPS]) / str(get_parallel().tp_rank)
        self.file = open(path, "ab")  # noqa: SIM115 (as long as the process)
        self.write(f"{type(runner.sampler).__module__}")
        self.count, self.drawn = 0, None
        poison = [int(x) for x in os.environ.get(POISON, "-1 0").split()]
        sample, draw = runner.sample, Requests.draw

        def sampled(logits_output, forward_batch):
            if self.count == poison[0]:
                logits_output.next_token_logits[poison[1]] = float("nan")
            raw, self.drawn = logits_output.next_token_logits.clone(), None
            tokens = sample(logits_output, forward_batch)
            is_decode = forward_batch.forward_mode.is_decode()
            places = forward_batch.positions if is_decode else forward_batch.seq_lens - 1
            info = forward_batch.sampling_info
            self.write(
                {
                    "requests": self.names,
                    "places": places.tolist(),
                    "raw": raw,
                    "drawn": self.drawn,
                    "seeds": [r.params.seed for r in getattr(info, "requests", None) or ()],
                    "tokens": tokens.tolist(),
                    "tables": tables_of(info),
                }
            )
            self.count += 1
            return tokens

        def logged(requests, rows, logits, places, *, are_penalised):
            self.drawn = {"logits": logits.clone(), "are_penalised": are_penalised}
            return draw(requests, rows, logits, places, are_penalised=are_penalised)

        runner.sample, Requests.draw = sampled, logged

    def write(self, step):
        pickle.dump(step, self.file)
        self.file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
