"""Tests of ``python -m benchmarks.on_gpu``, without a GPU: its dry run, and what it does with a
step that hangs or crashes, with a wrong token, and where time is short."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.on_gpu import (
    device,
    limited,
    parity,
    predicted,
    sanitizers,
    self_test,
    threads,
    times,
)
from benchmarks.on_gpu.limited import AT_ITS_LIMIT, BY_ITSELF, GRACE_S, run_limited
from benchmarks.on_gpu.report import failed, markdown
from benchmarks.on_gpu.results import Results
from benchmarks.on_gpu.setting import DRY, GPU, Deadline, Shape
from benchmarks.on_gpu.steps import BUDGET_S, STEPS, Step, run_steps, share
from benchmarks.on_gpu.timer import GraphTimer
from llm_sampling import Sampler, backends, reference, sample
from llm_sampling.calls import make_call

ROOT = Path(__file__).resolve().parents[2]
FAR = Deadline(1.0, lambda: -1e9)
#: Fewer shapes than the dry run has.
SMALL = replace(DRY, parity=(Shape(9, 600),), timed=((Shape(1, 32000),),))


def record_of(**results):
    """What a run records whose steps ended by themselves with these results."""
    steps = [
        {
            "name": name,
            "limit_s": 9,
            "seconds": 1,
            "ended": BY_ITSELF,
            "reason": "",
            "result": found,
        }
        for name, found in results.items()
    ]
    return {"argv": [], "date": "today", "dry_run": False, "budget_s": 480, "steps": steps}


def run_here(step, setting=SMALL, path=None, deadline=FAR, **more):
    """Run a step in this process; return its result after a way through JSON."""
    results = Results(path)
    step.run(setting, results, deadline, **more)
    return json.loads(json.dumps(results.record))


def step_of(name, code):
    return Step(name, 50, (sys.executable, "-c", code))


def is_running(pid):
    """Return whether a process is there and no zombie, for which nobody has waited yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- The command ---------------------------------------------------------------------------------


def test_the_dry_run(tmp_path):
    names = [step.name for step in STEPS]
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {f"{name}{suffix}" for name in names for suffix in (".json", ".out", ".err")}
    made |= {f"sanitizers-cpu-{t}{suffix}" for t in sanitizers.TOOLS for suffix in (".out", ".err")}
    assert {path.name for path in tmp_path.iterdir()} == made | {"on-gpu.json", "on-gpu.md"}
    record = json.loads((tmp_path / "on-gpu.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in record["steps"]] == names
    for step in record["steps"]:
        found = json.loads((tmp_path / f"{step['name']}.json").read_text(encoding="utf-8"))
        assert (step["ended"], step["result"]) == (BY_ITSELF, found)
    verdicts = {step["name"]: step["result"]["verdict"] for step in record["steps"]}
    assert verdicts == {
        "device": "cpu",
        "self_test": "equal",
        "parity": "equal",
        "threads": "equal",
        "sanitizers": "no sanitizer was asked for",
        "times": "24 of 24 timed",
        "predicted": "6 compared",
    }
    text = (tmp_path / "on-gpu.md").read_text(encoding="utf-8")
    assert done.stdout == text + "\n"
    assert text.startswith("# A dry run without a GPU: no number here was measured\n")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == names[1:]
    assert "| cpu | float32 | 1,000 | 2 | 42 | 0 | 0 |" in text
    assert "missing" not in text


@pytest.mark.parametrize("arguments", [["--budget", "0"], ["--budget", "nan"], ["--steps", "no"]])
def test_arguments_that_are_refused(tmp_path, arguments):
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--out", tmp_path, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_the_command_imports_no_torch():
    """It must end its steps even where torch cannot be imported or hangs."""
    code = "import sys, benchmarks.on_gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- Steps that fail -----------------------------------------------------------------------------


def test_steps_that_hang_and_crash_do_not_stop_the_others(tmp_path):
    steps = [
        Step("hangs", 0.5, ("sh", "-c", "sleep 600 & echo $!; wait")),
        step_of("crashes", "import os; print('so far', flush=True); os.kill(os.getpid(), 11)"),
        step_of("fails", "raise ValueError('this is why')"),
        step_of(
            "works",
            f"import json; json.dump({{'verdict': 'equal'}}, open(r'{tmp_path}/works.json', 'w'))",
        ),
    ]
    (tmp_path / "fails.json").write_text('{"verdict": "of an earlier run"}', encoding="utf-8")
    record = run_steps(steps, tmp_path, [])
    found = {step["name"]: step for step in record["steps"]}
    assert {name: step["ended"] for name, step in found.items()} == {
        "hangs": AT_ITS_LIMIT,
        "crashes": "signal SIGSEGV",
        "fails": "exit code 1",
        "works": BY_ITSELF,
    }
    assert found["fails"]["reason"] == "ValueError: this is why"
    assert found["fails"]["result"] is None
    assert (tmp_path / "crashes.out").read_text() == "so far\n"
    assert not is_running(int((tmp_path / "hangs.out").read_text()))
    text = (tmp_path / "on-gpu.md").read_text(encoding="utf-8")
    assert "| fails | **unfinished** | exit code 1: ValueError: this is why |" in text
    assert "| works | equal | by itself |" in text
    assert failed(record)


def test_a_report_that_fails_stops_no_step(tmp_path):
    code = f"open(r'{tmp_path}/parity.json', 'w').write('{{\"comparisons\": 1}}')"
    record = run_steps([step_of("parity", code), step_of("next", "")], tmp_path, [])
    assert [step["ended"] for step in record["steps"]] == [BY_ITSELF] * 2
    assert "TypeError" in (tmp_path / "on-gpu.md").read_text(encoding="utf-8")


def test_a_step_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(limited, "GRACE_S", 0.1)
    files = tmp_path / "out", tmp_path / "err"
    ended = run_limited(["sh", "-c", "trap '' TERM; echo $$; sleep 600"], 0.5, *files)
    assert ended.how == AT_ITS_LIMIT
    assert not is_running(int(files[0].read_text()))


def test_sigterm_ends_what_was_started(tmp_path):
    """As where a step that waits for a sanitizer is told to end."""
    code = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.on_gpu.limited import end_on_sigterm, run_limited\n"
        "end_on_sigterm()\n"
        "inner = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        f"files = Path(r'{tmp_path}/out'), Path(r'{tmp_path}/err')\n"
        "run_limited([sys.executable, '-c', inner], 600, *files)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    out = tmp_path / "out"
    while process.poll() is None and not (out.exists() and out.read_text().endswith("\n")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert not is_running(int(out.read_text()))


def test_a_killed_step_leaves_its_rows(tmp_path):
    code = (
        "import os\n"
        "from dataclasses import replace; from pathlib import Path\n"
        "from benchmarks.on_gpu import times\n"
        "from benchmarks.on_gpu.results import Results\n"
        "from benchmarks.on_gpu.setting import DRY, Deadline\n"
        "from benchmarks.on_gpu.timer import FakeTimer\n"
        "class Killed(FakeTimer):\n"
        "    def time(self, work, launches):\n"
        "        timing = super().time(work, launches)\n"
        "        if timing.median > 21: os.kill(os.getpid(), 9)\n"
        "        return timing\n"
        f"results = Results(Path(r'{tmp_path}/times.json'))\n"
        "times.run(replace(DRY, timer=Killed()), results, Deadline(float('inf')))"
    )
    record = run_steps([step_of("times", code)], tmp_path, [])
    (step,) = record["steps"]
    assert step["ended"] == "signal SIGKILL"
    lines = step["result"]["lines"]
    # a time of the copy and of the products, then three of each line
    assert [line["who"] for line in lines] == [*times.LIMITS, "plain-torch", "cpu"]
    text = markdown(record)
    assert "| times | **unfinished** | signal SIGKILL |" in text
    assert "* 6 of 24 were reached" in text
    assert "cpu 1 x 32,000 (5)" in text


# ---- The budget ----------------------------------------------------------------------------------


def test_the_limits_fit_into_the_budget():
    left = BUDGET_S
    for place, step in enumerate(STEPS):
        limit = share(step, STEPS[place + 1 :], left)
        assert 0.9 * step.limit_s <= limit <= 2 * step.limit_s
        left -= limit + GRACE_S  # each hangs and ignores SIGTERM
    assert left >= 0


def test_later_steps_get_less_where_time_is_short():
    steps = [Step(name, 100) for name in "abc"]
    assert share(steps[0], steps[1:], 300) == 98
    assert share(steps[1], steps[2:], 100) == 48
    assert share(steps[2], [], 20) == 18
    assert share(steps[2], [], 900) == 200


def test_no_step_begins_after_the_budget(tmp_path):
    clock = itertools.chain([0.0, 0.0, 477.0], itertools.repeat(481.0))
    steps = [step_of(name, "print(1)") for name in "abc"]
    record = run_steps(steps, tmp_path, [], clock=lambda: next(clock))
    ended = [(step["ended"], step["reason"]) for step in record["steps"]]
    late = "not started", "no time was left"
    assert ended == [(BY_ITSELF, ""), late, late]
    assert not (tmp_path / "c.out").exists()
    assert "| c | **unfinished** | not started: no time was left | 0 | 0 |" in markdown(record)


# ---- What the steps find -------------------------------------------------------------------------


def wrong_draw(change):
    """Return a sample() whose backend "cpu" answers with what `change` makes of its output."""

    def draw(logits, *args, backend, **more):
        output = sample(logits, *args, backend=backend, **more)
        return change(output) if backend == "cpu" and len(logits) > 1 else output

    return draw


def change_token(output):
    tokens = output.tokens.clone()
    tokens.view(len(tokens), -1)[5, 0] += 1
    return output._replace(tokens=tokens)


def change_status(output):
    return output._replace(status=output.status + torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 0]))


def raise_an_error(output):
    raise RuntimeError("the kernel failed")


def test_parity_counts_every_comparison():
    found = run_here(parity)
    assert found["verdict"] == "equal"
    assert len(found["comparisons"]) == len(found["plan"]) == 3 * len(parity.FORMS)
    # tokens and status: nine rows, eight draws in one form, two calls in another
    assert sum(line["compared"] for line in found["comparisons"]) == 3 * 9 * (4 * 2 + 9 + 4)


def test_every_row_of_the_comparison_of_rules_has_a_list():
    """A kernel without lists would draw other tokens; some of them are bans, others are not."""
    found = []

    def look(logits, params, *, history, backend, check):
        call = make_call(logits, params, history=history, check=check)
        found.extend(reference.penalty_lists(call))
        return sample(logits, params, history=history, backend=backend, check=check)

    parity.FORMS["rules"](parity.Batch.make(Shape(9, 1000), torch.float32, "cpu"), "cpu", look)
    assert len(found) == 9
    assert all(found)
    amounts = {amount for of_row in found for amount in of_row.values()}
    assert torch.inf in amounts
    assert len(amounts) > 1


@pytest.mark.parametrize(("change", "differ"), [(change_token, 1), (change_status, 1)])
def test_a_wrong_answer_makes_the_verdict_differs(change, differ):
    found = run_here(parity, draw=wrong_draw(change))
    assert found["verdict"] == "DIFFERS"
    assert all(line["differ"] >= differ for line in found["comparisons"])
    assert ["example" in line for line in found["comparisons"]] == [True] + [False] * 17
    example = found["comparisons"][0]["example"]
    assert example["row"] == 5
    assert example["found"] != example["reference"] == example["kernel of the CPU"]
    record = record_of(parity=found)
    assert failed(record)
    text = markdown(record)
    assert "| parity | **DIFFERS** |" in text
    assert "The first difference:\n\n* backend: cpu\n" in text


def test_an_error_is_in_the_verdict():
    found = run_here(parity, draw=wrong_draw(raise_an_error))
    assert found["verdict"] == "ERRORS"
    assert len(found["comparisons"]) == len(found["plan"])  # the others are still compared
    assert "* error: RuntimeError: the kernel failed" in markdown(record_of(parity=found))


@pytest.mark.parametrize("step", [parity, times])
def test_a_step_stops_near_its_deadline_and_says_what_is_missing(step):
    clock = itertools.count()
    end = 3.5 + 3 + (step is parity)  # the margin is 3 s, and parity asks the time once more
    deadline = Deadline(end, lambda: float(next(clock)))
    found = run_here(step, deadline=deadline)
    text = markdown(record_of(**{step.__name__.rpartition(".")[2]: found}))
    assert f"* 4 of {len(found['plan'])} were reached\n* missing: " in text


@pytest.mark.parametrize("step", [parity, threads])
def test_no_time_at_all_is_no_success(step):
    found = run_here(step, deadline=Deadline(0.0, lambda: 1.0))
    assert found["verdict"] == "nothing ran"


def test_threads_compare_with_the_loop_alone():
    found = run_here(threads)
    assert found["verdict"] == "equal"
    assert [line["compared"] for line in found["lines"]] == [2 * 10 * 1, 2 * 10 * 5]


def test_a_thread_that_draws_another_token_is_seen():
    class Wrong(Sampler):
        def __call__(self, logits):
            output = super().__call__(logits)
            is_main = threading.current_thread() is threading.main_thread()
            return output if is_main or len(logits) == 1 else change_last(output)

    def change_last(output):
        return output._replace(tokens=output.tokens + torch.tensor([0, 0, 0, 0, 1]))

    found = run_here(threads, make=Wrong)
    assert found["verdict"] == "DIFFERS"
    assert [line["differ"] for line in found["lines"]] == [0, 10]
    assert found["lines"][1]["first"] == [0, 0, 4]


def test_an_error_in_a_thread_is_shown():
    class Failing(Sampler):
        def __call__(self, logits):
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("invalid argument")
            return super().__call__(logits)

    found = run_here(threads, make=Failing)
    assert found["verdict"] == "ERRORS"
    assert "| cpu | 1 x 513 | 0 | 0 | RuntimeError: invalid argument |" in markdown(
        record_of(threads=found)
    )


SelfTest = namedtuple("SelfTest", "backend device shapes rows difference skipped")


@pytest.mark.parametrize(
    ("lines", "verdict", "is_bad"),
    [
        ([("cpu", 3, 40, None, None), ("cuda", 0, 0, None, "no device")], "equal", False),
        ([("cpu", 3, 40, "row 7: 1 is not 2", None)], "DIFFERS", True),
        ([("cuda", 0, 0, None, "no device")], "nothing ran", True),
    ],
)
def test_the_self_test(monkeypatch, lines, verdict, is_bad):
    answers = [SelfTest(line[0], "cpu", *line[1:]) for line in lines]
    monkeypatch.setattr(backends, "self_test", lambda device: answers)
    found = run_here(self_test)
    assert found["verdict"] == verdict
    assert failed(record_of(self_test=found)) is is_bad
    assert f"| {answers[0].backend} | " in markdown(record_of(self_test=found))


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.nvidia_smi(device.CLOCKS) == "nvidia-smi is not on the path"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980 MHz, 3201 MHz, 95.10 W, 36'\n")
    program.chmod(0o755)
    (gpu,) = device.nvidia_smi(device.CLOCKS)
    assert gpu == dict(zip(device.CLOCKS, ("1980 MHz", "3201 MHz", "95.10 W", "36"), strict=True))
    program.write_text("#!/bin/sh\necho 'no devices  were found'; exit 6\n")
    assert device.nvidia_smi(device.CLOCKS) == "no devices were found"


def test_the_time_of_a_graph(monkeypatch):
    """With stand-ins for torch's classes: 2 untimed replays, then 20 of 40 us each."""
    replays, works = [], []
    stand_ins = {
        "Stream": lambda: MagicMock(),
        "current_stream": lambda: MagicMock(),
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        "Event": lambda enable_timing: MagicMock(elapsed_time=lambda last: 0.04),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    timing = GraphTimer(budget_s=600).time(works.append, 5)
    assert works == [0, 1, 2, 0, 1, 2, 3, 4]
    assert len(replays) == 2 + 20
    assert (timing.median, timing.samples, timing.calls_per_sample) == (pytest.approx(8), 20, 5)
    assert GraphTimer(budget_s=-1).time(works.append, 5).samples == 3


CLEAN = (
    "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 "
    "warnings)\n"
)


@pytest.mark.parametrize(
    ("output", "is_clean"),
    [
        (CLEAN, True),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", True),
        ("========= ERROR SUMMARY: 12 errors\n", False),
        (CLEAN.replace("0 hazards", "1 hazard").replace("0 warnings", "1 warning"), False),
        ("========= COMPUTE-SANITIZER\n", False),
        ("", False),
    ],
)
def test_summaries_of_sanitizers(output, is_clean):
    assert sanitizers.is_clean(sanitizers.summary_of(output)) is is_clean


#: Stands for compute-sanitizer; the launches themselves are not run.
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >&2
[ $2 = memcheck ] && echo "========= ERROR SUMMARY: 2 errors" && exit 86
echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
"""


def test_sanitizers_that_report(tmp_path):
    program = tmp_path / "sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    deadline = Deadline(time.monotonic() + 100)
    setting = replace(DRY, sanitizer=str(program))
    found = run_here(sanitizers, setting, tmp_path / "sanitizers.json", deadline)
    assert found["verdict"] == "ERRORS"
    assert [line["clean"] for line in found["lines"]] == [True, False]
    called = (tmp_path / "sanitizers-cpu-racecheck.err").read_text()
    assert called.startswith(f"1 --tool racecheck --error-exitcode 86 {sys.executable} -m ")
    text = markdown(record_of(sanitizers=found))
    assert "| cpu | memcheck | exit code 86" in text
    assert "| ERROR SUMMARY: 2 errors |" in text


def test_a_sanitizer_that_takes_too_long_has_found_nothing(tmp_path):
    program = tmp_path / "sanitizer"
    program.write_text("#!/bin/sh\nsleep 600")
    program.chmod(0o755)
    deadline = Deadline(time.monotonic() + 2 * GRACE_S + 0.2)
    setting = replace(DRY, sanitizer=str(program))
    found = run_here(sanitizers, setting, tmp_path / "sanitizers.json", deadline)
    assert found["verdict"] == "unfinished"
    assert failed(record_of(sanitizers=found))


def test_no_sanitizer_is_said(tmp_path):
    setting = replace(DRY, sanitizer="a-program-that-is-not-there")
    found = run_here(sanitizers, setting, tmp_path / "sanitizers.json")
    assert found["verdict"] == "not installed"
    assert not failed(record_of(sanitizers=found))


def test_every_launch_of_the_sanitizers_is_another_kind():
    """By the rules of csrc/cuda/launch.cuh on an H100, as cuda_cost.py follows them."""
    from benchmarks.cuda_cost import choose_launch

    launches = [
        choose_launch(shape.rows, shape.vocab_size, dtype.itemsize, "sm_90")
        for shape, dtype in GPU.launches
    ]
    kinds = [(launch.blocks, launch.copied) for launch in launches]
    assert kinds == [(1, True), (2, True), (4, True), (8, True), (8, False)]


def test_a_device_without_predictions_is_said(tmp_path):
    path = tmp_path / "times.json"
    Results(path).put(device="NVIDIA L40S", dtype="bfloat16", lines=[])
    setting = replace(DRY, predicted_for="")
    found = run_here(predicted, setting, tmp_path / "predicted.json")
    assert found["verdict"] == "cuda-cost.json has no prediction for NVIDIA L40S"


def test_what_was_measured_is_divided_by_what_was_predicted(tmp_path):
    times_of = [
        {"who": "cuda", "kind": kind, "vocab_size": 128256, "rows": 64, "cold": {"median": 20.0}}
        for kind in times.KINDS
    ]
    record = {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "lines": times_of}
    Results(tmp_path / "times.json").put(**record)
    setting = replace(DRY, predicted="cuda", predicted_for="")
    found = run_here(predicted, setting, tmp_path / "predicted.json")
    assert [line["kind"] for line in found["lines"]] == list(times.KINDS)
    least, most = found["lines"][0]["predicted_us"]
    text = markdown(record_of(predicted=found))
    assert least < most
    ratios = f"{20 / most:.2f}-{20 / least:.2f}"
    assert f"| greedy | 128,256 | 64 | 20.00 | {least:.2f}-{most:.2f} | {ratios} |" in text


def test_a_time_that_fails_has_its_reason():
    class Failing(type(DRY.timer)):
        def time(self, work, launches):
            if launches > 3 and len(calls) == 2:
                calls.append(1)
                raise RuntimeError("operation not permitted when stream is capturing")
            calls.append(1)
            return super().time(work, launches)

    calls = []
    found = run_here(times, replace(SMALL, timer=Failing()))
    assert found["lines"][0]["reason"] == "operation not permitted when stream is capturing"
    assert all("cold" in line for line in found["lines"][1:-1])
    assert "it does not run on cpu" in found["lines"][-1]["reason"]  # FlashInfer
