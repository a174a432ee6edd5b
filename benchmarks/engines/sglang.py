"""The part of the benchmark that runs in SGLang's environment: ``benchmarks.engines.sglang``.

SGLang samples in a process of its own. There :func:`watch_scheduler` is a plug-in of SGLang, which
writes what each step has cost to a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import watch

#: The environment variable that names the folder of the files that the two processes share.
FOLDER = "BENCHMARK_OF_ENGINES"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate all requests together, some rounds; see :func:`benchmarks.engines.watch.measure`."""
    folder = Path(job["folder"])
    plugin = folder / "watch-0.dist-info"
    plugin.mkdir()
    about = "Metadata-Version: 2.1\nName: watch\nVersion: 0\n"
    (plugin / "METADATA").write_text(about, encoding="utf-8")
    entry = "[sglang.srt.plugins]\nwatch = benchmarks.engines.sglang:watch_scheduler\n"
    (plugin / "entry_points.txt").write_text(entry, encoding="utf-8")
    os.environ |= {FOLDER: str(folder), "SGLANG_USE_CPU_ENGINE": str(int(job["device"] == "cpu"))}
    root = Path(__file__).parents[2]
    paths = [str(folder), str(root)]
    if job["device"] == "cpu":  # kernels that have no build here, and are not called
        paths.insert(0, str(root / "tests" / "integrations" / "sglang_stubs"))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path[:0] = paths
    import sglang

    options: dict[str, Any] = {"device": job["device"]}
    if job["device"] == "cpu":
        options |= {"attention_backend": "torch_native", "disable_cuda_graph": True}
        options |= {"mem_fraction_static": 0.3, "max_total_tokens": 16384}
    engine = sglang.Engine(
        model_path=job["model"],
        dtype=job["dtype"],
        disable_radix_cache=True,
        max_running_requests=len(job["requests"]),
        context_length=512,
        random_seed=0,
        log_level="warning",
        **options,
    )
    prompts = [request["ids"] for request in job["requests"]]

    def generate(tokens: int) -> list[list[int]]:
        params = [options_of(request["params"], tokens) for request in job["requests"]]
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        return [output["output_ids"] for output in outputs]

    try:
        meters = RemoteMeters(folder)
        found = watch.measure(generate, meters, tokens=job["tokens"], rounds=job["rounds"])
    finally:
        engine.shutdown()
    if not job["is_ours"]:  # its penalties see a token one step late
        watch.leave_penalised_out(found, job["requests"])
    return found | {"sampler": meters.sampler, "version": sglang.__version__}


def options_of(params: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A request's parameters by SGLang's names."""
    named = {"sampling_seed" if name == "seed" else name: params[name] for name in params}
    return named | {"max_new_tokens": tokens, "ignore_eos": True}


class RemoteMeters:
    """Answers as :class:`benchmarks.engines.watch.Meters`, which are in another process.

    Args:
        folder: where that process writes what they show.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sampler = ""

    def read(self) -> dict[str, float]:
        """What the meters show once the process has written it after its last step."""
        shown, last = None, self._read()
        while shown != last:  # the scheduler may run one step more than there are tokens
            time.sleep(0.3)
            shown, last = last, self._read()
        self.sampler = last.pop("sampler")
        return last

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self._folder / "meters").read_text())
        return content

    def count_launches(self) -> None:
        """Have the process count launches."""
        (self._folder / "count").touch()


# ---- in the process of the scheduler ----


def watch_scheduler() -> None:
    """Called by SGLang in each of its processes, by an entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang.srt.model_executor.model_runner.ModelRunner.initialize"
    HookRegistry.register(runner, _watch, HookType.AFTER)


def _watch(result: Any, runner: Any, *args: Any, **options: Any) -> None:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.sampling import sampling_batch_info
    from sglang.srt.sampling.penaltylib import orchestrator

    folder = Path(os.environ[FOLDER])
    info = sampling_batch_info.SamplingBatchInfo
    penalties = orchestrator.BatchedPenalizerOrchestrator
    follow = [(info, name) for name in ("from_schedule_batch", "filter_batch", "merge_batch")]
    follow += [(info, "update_penalties"), (penalties, "cumulate_output_tokens")]
    step = "forward_batch_generation"
    meters = watch.Meters([(TpModelWorker, step)], (runner, "sample"), follow)
    is_counting = False
    run_step = getattr(TpModelWorker, step)

    def write() -> None:
        shown = meters.read() | {"sampler": type(runner.sampler).__module__}
        new = folder / "meters.new"
        new.write_text(json.dumps(shown), encoding="utf-8")
        new.replace(folder / "meters")

    def stepped(*args: Any, **options: Any) -> Any:
        nonlocal is_counting
        if not is_counting and (folder / "count").exists():
            is_counting = True
            meters.count_launches()
        done = run_step(*args, **options)
        write()
        return done

    setattr(TpModelWorker, step, stepped)
    write()


if __name__ == "__main__":
    watch.answer(run)
