"""Tests of the benchmark suite.

They cover its oracle, which must refuse broken samplers, the samplers that it compares, its command
line, its reports, and the benchmarks of threads, of instructions and of vLLM's engine.
"""

import itertools
import json
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    additions,
    cpu_cost,
    environments,
    gpu_model,
    plots,
    repetition,
    report,
    rules,
    serving,
    threads,
    timing,
    vllm_engine,
    vllm_worker,
)
from benchmarks.cases import CASES, COMPARED, RUNS, Case, Run
from benchmarks.engines import __main__ as engines
from benchmarks.engines import watch
from benchmarks.goals import GOALS, KERNEL, OURS, SAMPLER, judge
from benchmarks.inputs import MAKERS, AbsentError, assert_model_like, make_buffers, make_inputs
from benchmarks.oracle import READINGS, Oracle, Reading, WrongAnswerError, check_uniform
from benchmarks.providers import HUGGING_FACE, LLAMA_CPP, PROVIDERS, VLLM, Contender, Task
from benchmarks.suite import Result, check, open_suite
from benchmarks.timing import Protocol, Timing, measure, runner
from benchmarks.worker import Worker
from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.tools.tuning.objectives import ngrams_of, repeated

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 600
FAST = Protocol(rounds=1, per_turn=2, warm_up=1)


def case_of(**params):
    return Case("a case", (SamplingParams(**params),))


def inputs_of(name, case, rows=3, vocab_size=VOCAB_SIZE, number=4):
    return make_inputs(name, make_buffers(name, rows, vocab_size)[:number], case)


def oracle_of(inputs, case):
    return Oracle(inputs, case.row_params(inputs.rows), {})


def history_of(inputs, case):
    if not any(row.needs_history for row in case.params):
        return None
    return TokenHistory.from_ids(inputs.prompt_ids, inputs.output_ids, inputs.vocab_size)


def kept_by(reading, oracle):
    """Return for each buffer a mask, by token id, of what a reading of the parameters keeps."""
    return [
        torch.zeros_like(kept).scatter(1, oracle.order(buffer).ids, kept)
        for buffer in range(len(oracle.inputs.buffers))
        for kept in [oracle.kept(buffer, reading)]
    ]


# ---- The oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("case", COMPARED)
def test_the_oracle_agrees_with_the_reference(name, case):
    case = CASES[case]
    inputs = inputs_of(name, case)
    oracle = oracle_of(inputs, case)
    history = history_of(inputs, case)
    kept = [
        filter_logits(x, oracle.params, history=history, backend="torch") > -torch.inf
        for x in inputs.buffers
    ]
    assert oracle.explain(kept) in ("", "cut off by <= 1e-06")


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: "+".join(reading.words) or "ours")
def test_each_reading_is_found(reading):
    generator = torch.Generator().manual_seed(0)
    found = set()
    for k, p, min_p in itertools.product((3, 6, 9, 14), range(50, 100, 5), (0.05, 0.1, 0.2, 0.3)):
        x = (6 * torch.rand(16, 24, generator=generator)).round() / 4  # many ties
        case = case_of(top_k=k, top_p=p / 100, min_p=min_p)
        oracle = oracle_of(make_inputs("by hand", [x], case), case)
        found.add(oracle.explain(kept_by(reading, oracle)))
    # It is enough that some of the rows distinguish this reading from all simpler ones.
    assert "; ".join(reading.words) in found


def test_an_answer_that_no_reading_explains_is_wrong():
    case = case_of(top_k=50, top_p=0.9)
    inputs = inputs_of("normal2", case)
    oracle = oracle_of(inputs, case)
    kept = kept_by(Reading(), oracle)
    kept[1][2, oracle.order(1).ids[2, 60]] = True
    with pytest.raises(WrongAnswerError, match="keeps 1 tokens more or less"):
        oracle.explain(kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 49},
        {"top_k": 51},
        {"top_p": 0.92},
        {"top_p": 0.88},
        {"temperature": 0.9},
        {"repetition_penalty": 1.0},
        {"frequency_penalty": 0.0},
        {"presence_penalty": 0.0},
        {"min_p": 0.0},
    ],
    ids=str,
)
def test_a_parameter_that_is_not_honoured_is_seen(wrong):
    case = Case(
        "a case",
        (
            SamplingParams(
                repetition_penalty=1.3,
                frequency_penalty=0.5,
                presence_penalty=0.4,
                temperature=0.8,
                top_k=50,
                top_p=0.9,
                min_p=0.1,
            ),
        ),
        history_length=64,
    )
    inputs = inputs_of("normal2", case, rows=8)
    oracle, history = oracle_of(inputs, case), history_of(inputs, case)

    def answer(params):
        filtered = [filter_logits(x, params, history=history) for x in inputs.buffers]
        oracle.explain([x > -torch.inf for x in filtered])
        for buffer, x in enumerate(filtered):
            oracle.check_distribution(buffer, torch.softmax(x, -1))

    answer(oracle.params)
    with pytest.raises(WrongAnswerError):
        answer([replace(row, **wrong) for row in oracle.params])


BROKEN_DRAWS = {
    "always the best": lambda p: p.argmax(-1, keepdim=True),
    "never the best": lambda p: p.scatter(1, p.argmax(-1, keepdim=True), 0).multinomial(1),
    "uniform": lambda p: (p > 0).float().multinomial(1),
    "a temperature of 2": lambda p: p.sqrt().multinomial(1),
}


@pytest.mark.parametrize("broken", BROKEN_DRAWS)
def test_draws_that_are_not_so_distributed_are_seen(broken):
    case = case_of(top_k=50)
    inputs = inputs_of("normal5", case)
    oracle = oracle_of(inputs, case)

    def distribution(buffer):
        return torch.softmax(filter_logits(inputs.buffers[buffer], oracle.params), -1)

    def contender(draw):
        return Contender(lambda buffer: None, lambda b: draw(distribution(b)), distribution)

    torch.manual_seed(0)
    assert check(contender(lambda p: p.multinomial(1)), inputs, oracle) == ""
    with pytest.raises(WrongAnswerError, match="chi-squared"):
        check(contender(BROKEN_DRAWS[broken]), inputs, oracle)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, "outside"])
def test_a_token_that_is_not_kept_is_seen(token):
    case = case_of(top_k=2)
    inputs = inputs_of("normal2", case)
    oracle = oracle_of(inputs, case)
    kept = kept_by(Reading(), oracle)[0]
    tokens = torch.full((3, 1), token) if token != "outside" else oracle.order(0).ids[:, 5:6]
    with pytest.raises(WrongAnswerError, match="outside"):
        oracle.places(0, tokens, kept, torch.zeros(3, 1, dtype=torch.float64))


def test_places_of_a_right_sampler_are_uniform():
    check_uniform(torch.rand(4096, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(WrongAnswerError):
        check_uniform(0.9 * torch.rand(4096, generator=torch.Generator().manual_seed(0)))


# ---- Providers -----------------------------------------------------------------------------------

HERE = [
    name
    for name, provider in PROVIDERS.items()
    if "cpu" in provider.devices and not provider.environment and provider.option != "compiled"
]


def build(name, task):
    try:
        PROVIDERS[name].version("cpu")
        return PROVIDERS[name].build(task)
    except AbsentError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("name", HERE)
def test_providers_compute_what_they_are_asked_for(name, case):
    if PROVIDERS[name].module == "huggingface":
        pytest.importorskip("transformers", reason="needs the extra 'cli'")
    torch.manual_seed(0)
    for kind in ("model", "ties", "masked"):
        inputs = inputs_of(kind, CASES[case], rows=5)
        contender = build(name, Task(CASES[case], inputs))
        note = check(contender, inputs, oracle_of(inputs, CASES[case]))
        contender.call(0)
        if kind == "model":
            assert "elsewhere" not in note
        for reading in ("joint", "min-p before", "drops"):
            assert reading not in note


def test_the_compiled_one_too():
    case = CASES["top-k-50-top-p-0.9"]
    inputs = inputs_of("model", case)
    contender = build("plain-torch, compiled", Task(case, inputs))
    assert check(contender, inputs, oracle_of(inputs, case)) == ""


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("name", [VLLM, LLAMA_CPP])
def test_peers_with_an_environment_of_their_own(name, case, request):
    worker = peer(name)
    for kind in ("model", "ties"):
        inputs = inputs_of(kind, CASES[case], rows=5)
        if (name, case) == (VLLM, "draws-8"):
            with pytest.raises(AbsentError, match="it draws one token a row"):
                worker.build(Task(CASES[case], inputs), "wall")
            return
        contender, run = worker.build(Task(CASES[case], inputs), "wall")
        note = check(contender, inputs, oracle_of(inputs, CASES[case]))
        if case != "mixed-rows":  # its few rows with min-p may not show the order of the filters
            assert ("min-p before top-p" in note) == (name == VLLM and "everything" in case)
        assert run([0, 1, 2]) > 0


_PEERS = {}


def peer(name):
    """Return the worker of a provider, started once; skip if its environment does not exist."""
    if name not in _PEERS:
        try:
            python = environments.python_of(PROVIDERS[name].environment)
        except AbsentError as error:
            pytest.skip(str(error))
        _PEERS[name] = Worker(PROVIDERS[name], python, "cpu")
    return _PEERS[name]


@pytest.fixture(scope="module", autouse=True)
def close_peers():
    yield
    for worker in _PEERS.values():
        worker.close()


def stand_ins():
    """Return modules with FlashInfer's and SGLang's functions, written in torch as documented."""

    def top_k_renorm(probs, top_k):
        k = torch.as_tensor(top_k).expand(len(probs)).long().unsqueeze(1)
        least = probs.sort(-1, descending=True).values.gather(1, k - 1)
        probs = probs.masked_fill(probs < least, 0)  # keeps all ties at the threshold
        return probs / probs.sum(-1, keepdim=True)

    def top_p_renorm(probs, top_p):
        p, ids = probs.sort(dim=-1, descending=True, stable=True)
        limit = torch.as_tensor(top_p).expand(len(probs)).unsqueeze(1)
        p = p.masked_fill((p.cumsum(-1) - p >= limit) & (limit < 1), 0)
        p = torch.zeros_like(probs).scatter(1, ids, p)
        return p / p.sum(-1, keepdim=True)

    def draw(probs, indices=None):
        probs = probs if indices is None else probs[indices.long()]
        return probs.multinomial(1).squeeze(1).int()

    def top_k_top_p(probs, top_k, top_p, indices=None, filter_apply_order="top_k_first", **_):
        of_k = top_k_renorm(probs, top_k)
        joint = filter_apply_order == "joint"
        of_p = top_p_renorm(probs if joint else of_k, top_p)
        return draw(probs * ((of_k > 0) & (of_p > 0)), indices)

    def min_p_sampling(probs, min_p, indices=None):
        least = torch.as_tensor(min_p).expand(len(probs)).unsqueeze(1) * probs.amax(-1, True)
        return draw(probs.masked_fill(probs < least, 0), indices)

    sampling = types.ModuleType("flashinfer.sampling")
    sampling.top_k_renorm_probs = top_k_renorm
    sampling.top_p_renorm_probs = top_p_renorm
    sampling.min_p_sampling_from_probs = min_p_sampling
    sampling.top_k_top_p_sampling_from_probs = top_k_top_p
    sampling.top_p_sampling_from_probs = lambda probs, top_p, indices=None: draw(
        top_p_renorm(probs, top_p), indices
    )
    sampling.sampling_from_logits = lambda x, indices=None: draw(torch.softmax(x, -1), indices)
    sampling.top_k_top_p_sampling_from_logits = lambda x, *rest, **more: top_k_top_p(
        torch.softmax(x, -1), *rest, **more
    )
    cake = types.ModuleType("flashinfer.cake_sampling")
    cake.top_k_top_p_sampling_from_probs = lambda probs, k, p, top_k_max: top_k_top_p(probs, k, p)
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.sampling, flashinfer.cake_sampling = sampling, cake
    sgl_kernel = types.ModuleType("sgl_kernel")
    sgl_kernel.top_k_renorm_prob, sgl_kernel.top_p_renorm_prob = top_k_renorm, top_p_renorm
    return {
        "flashinfer": flashinfer,
        "flashinfer.sampling": sampling,
        "flashinfer.cake_sampling": cake,
        "sgl_kernel": sgl_kernel,
    }


#: provider -> the cases that it cannot run, because of their parameters: it needs top-k or top-p,
#: has no min-p, or takes only one set of parameters or one draw.
CANNOT = {
    "flashinfer, scalars": ("mixed-rows",),
    "flashinfer, joint": [
        name
        for name in COMPARED
        if name not in ("top-k-50-top-p-0.9", "full-chain", "logprobs", "draws-8")
    ],
    "flashinfer, cake": [
        name
        for name in COMPARED
        if not name.startswith(("top-k", "greedy", "full-chain", "logprobs"))
    ],
    "sglang": ("draws-8",),
}


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize(
    "name", [name for name, provider in PROVIDERS.items() if provider.devices == ("cuda",)]
)
def test_peers_of_a_gpu_with_functions_that_stand_in_for_theirs(name, case, monkeypatch):
    if PROVIDERS[name].module == "ours":
        pytest.skip("tests/kernels/test_gpu.py has ours")
    for module, stand_in in stand_ins().items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    torch.manual_seed(0)
    inputs = inputs_of("model", CASES[case], rows=5)
    if case in CANNOT.get(name, ()):
        with pytest.raises(AbsentError):
            PROVIDERS[name].build(Task(CASES[case], inputs))
        return
    contender = PROVIDERS[name].build(Task(CASES[case], inputs))
    note = check(contender, inputs, oracle_of(inputs, CASES[case]))
    both = any(row.top_k > 0 and row.top_p < 1 for row in CASES[case].params)
    has_min_p = any(row.min_p > 0 for row in CASES[case].params)
    is_joint = "joint" in name or (name == "sglang" and not has_min_p)
    assert ("joint top-p" in note) == (is_joint and both)


def test_a_provider_that_cannot_run_says_why():
    with pytest.raises(AbsentError, match="does not run on cuda"):
        PROVIDERS[LLAMA_CPP].version("cuda")
    with pytest.raises(AbsentError, match="flashinfer"):
        replace(PROVIDERS["flashinfer"], devices=("cpu",)).version("cpu")
    with pytest.raises(AbsentError, match=r"python -m benchmarks\.environments vllm"):
        environments.python_of("vllm", Path("/nowhere"))


def test_requirements_are_installed_before_what_is_installed_without_them(monkeypatch):
    commands = []
    monkeypatch.setattr(
        environments.subprocess, "run", lambda command, check: commands.append(command[1:])
    )
    environments.make("sglang", "cpu")
    packages = [command[3:] for command in commands[1:]]
    assert [command[:3] for command in commands[1:]] == [["-m", "pip", "install"]] * 3
    assert packages[0] == [environments.TORCH]
    assert "transformers==5.19.0" in packages[1]
    assert packages[2] == ["--no-deps", "sglang==0.5.23"]


def test_of_a_peer_that_is_read_only_the_source_is_unpacked(tmp_path, monkeypatch):
    def download(command, check):
        folder = Path(command[command.index("--dest") + 1])
        assert command[-1] == environments.SOURCES["vllm-0.33"]
        with zipfile.ZipFile(folder / "vllm-0.33.0.whl", "w") as wheel:
            for name in ("vllm/a.py", "vllm/_C.so", "vllm-0.33.0.dist-info/METADATA"):
                wheel.writestr(name, name)

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments.subprocess, "run", download)
    (tmp_path / "vllm-0.33").mkdir()
    (tmp_path / "vllm-0.33" / "old.py").touch()
    assert environments.main(["vllm-0.33"]) == 0
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"vllm-0.33/vllm/a.py", "vllm-0.33/vllm-0.33.0.dist-info/METADATA"}


# ---- Workers -------------------------------------------------------------------------------------


@pytest.fixture
def worker():
    made = Worker(PROVIDERS["plain-torch"], Path(sys.executable), "cpu")
    yield made
    made.close()


def test_a_worker_answers_like_the_provider(worker):
    assert worker.version == f"torch {torch.__version__}"
    for case in ("mixed-rows", "everything-1k", "draws-8"):
        inputs = inputs_of("model", CASES[case], rows=4)
        contender, run = worker.build(Task(CASES[case], inputs), "wall")
        assert check(contender, inputs, oracle_of(inputs, CASES[case])) == (
            "a call for each set of parameters" if case == "mixed-rows" else ""
        )
        assert 0 < run([0]) < 60e9


def test_a_worker_that_cannot_start_is_absent(tmp_path):
    with pytest.raises(AbsentError, match="does not start"):
        Worker(PROVIDERS["plain-torch"], tmp_path / "python", "cpu")
    with pytest.raises(AbsentError, match="No module named 'llama_cpp'"):
        Worker(PROVIDERS[LLAMA_CPP], Path(sys.executable), "cpu").close()


def test_a_worker_that_dies_is_absent(worker):
    worker._process.kill()
    inputs = inputs_of("model", CASES["greedy"])
    for _ in range(2):
        with pytest.raises(AbsentError, match="its process ended with -9"):
            worker.build(Task(CASES["greedy"], inputs), "wall")


def test_an_error_in_a_worker_is_its_reason(worker):
    inputs = inputs_of("model", CASES["greedy"])
    worker.build(Task(CASES["greedy"], inputs), "wall")
    with pytest.raises(AbsentError, match="IndexError"):
        worker._ask("draw", buffer=99)
    worker._ask("draw", buffer=0)


# ---- Inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [1, 3, 5])
def test_noise_is_not_like_a_model(deviation):
    noise = deviation * torch.randn(2, 32000, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        assert_model_like(noise)


def test_what_the_inputs_are():
    inputs = {name: make_buffers(name, 2, 4000)[0] for name in MAKERS}
    assert inputs["ties"].unique().numel() < 400
    assert 0.98 < inputs["masked"].isinf().float().mean() < 1
    assert (inputs["ascending"].diff(dim=-1) >= 0).all()
    assert (inputs["one-hot"].softmax(-1).amax(-1) > 0.999).all()
    assert len({id(buffer) for buffer in make_buffers("flat", 2, 4000)}) >= 4
    assert all(
        buffer.dtype == torch.bfloat16 for buffer in make_buffers("flat", 2, 400, torch.bfloat16)
    )


@pytest.mark.model
def test_real_logits(smollm):
    buffers = make_buffers("smollm2", 8, None)
    assert len(buffers) >= 4
    assert buffers[0].shape == (8, 49152)
    assert buffers[0].isfinite().all()
    assert not torch.equal(buffers[0], buffers[1])
    with pytest.raises(AbsentError, match="too few for 400 rows"):
        make_buffers("smollm2", 400, None)


# ---- Timing --------------------------------------------------------------------------------------


def test_everyone_goes_through_the_same_buffers_in_turns():
    asked = {"slow": [], "fast": []}
    turns = []

    def run(name, nanoseconds):
        def times(order):
            asked[name] += order
            turns.append(name)
            return nanoseconds * len(order)

        return times

    protocol = Protocol(rounds=4, per_turn=2, warm_up=1, budget_s=0.01, least=3)
    runs = {"slow": run("slow", 5_000_000), "fast": run("fast", 100_000)}
    found = measure(runs, 3, protocol)
    assert found["slow"].samples == 3
    assert found["fast"].samples == 8
    assert found["slow"].median == 5000
    assert found["fast"].median == 100
    for order in asked.values():
        assert order == [index % 3 for index in range(len(order))]
    assert turns.index("fast") < len(turns) - turns[::-1].index("slow")


def test_restoring_is_not_timed():
    restored = []

    def restore(buffer):
        restored.append(buffer)
        timing.perf_counter_ns()

    now = iter(range(0, 10**9, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "perf_counter_ns", lambda: next(now))
        run = runner(Contender(lambda buffer: None, restore=restore))
        assert run([0, 1, 2]) == 30
    assert restored == [0, 1, 2]


def test_a_contender_has_the_threads_that_it_asks_for():
    before = torch.get_num_threads()
    seen = []
    runner(Contender(lambda buffer: seen.append(torch.get_num_threads()), threads=3))([0])
    assert seen == [3]
    assert torch.get_num_threads() == before


# ---- The command ---------------------------------------------------------------------------------


def run_command(*arguments):
    before = torch.get_num_threads()
    try:
        return command.main(arguments)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run the command on few inputs; return the path of its files and what it printed."""
    stem = tmp_path_factory.mktemp("results") / "small"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--inputs", "model", "--vocab", "300"),
            *("--rows", "8", "--cases", *COMPARED, "--out", str(stem)),
            *("--providers", "cpu:Sampler", "plain-torch", "amax", VLLM),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return stem, done.stdout


def test_the_command_writes_what_it_prints(results):
    stem, printed = results
    record = json.loads(stem.with_suffix(".json").read_text())
    assert report.markdown(record) == stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".md").read_text() in printed
    lines = {(line["case"], line["provider"]): line for line in record["results"]}
    assert {case for case, _ in lines} == set(COMPARED)
    assert all(line["timing"]["median"] > 0 for line in record["results"] if not line["absent"])
    assert record["environment"]["threads"] == 1
    assert len(record["environment"]["commit"]) == 40
    assert VLLM in record["absent"] or VLLM in record["versions"]
    assert "| top-k-50-top-p-0.9 |" in printed


def test_the_pictures(results, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
    stem, _ = results
    record = json.loads(stem.with_suffix(".json").read_text())
    swept = next(line for line in record["results"] if line["timing"] is not None)
    for rows in (1, 2):  # the picture of a sweep needs two numbers of rows
        more = {"vocab_size": 128256, "rows": rows, "case": "full-chain", "inputs": "model"}
        record["results"].append(swept | more)
    files = plots.draw(record, tmp_path / "drawn")
    names = {file.name for file in files}
    kinds = ("sweeps", "speedups", "limits")
    assert names == {f"drawn-{name}.{kind}" for name in kinds for kind in plots.FORMATS}
    assert all(file.stat().st_size > 5000 for file in files)
    again = plots.draw(record, tmp_path / "again")
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_wrong_answer_of_ours_fails_the_command(monkeypatch, capsys):
    from benchmarks.providers import ours

    def wrong(option, task):
        contender = build_ours(option, task)
        return replace(contender, draw=lambda buffer: contender.draw(buffer) * 0)

    build_ours = ours.build
    monkeypatch.setattr(ours, "build", wrong)
    arguments = ["--inputs", "model", "--vocab", "300", "--cases", "top-k-50"]
    assert run_command(*arguments, "--providers", "cpu:Sampler") == 1
    assert "**WRONG**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--threads", "0"], "must be an integer >= 1, got 0"),
        (["--vocab", "255"], "--vocab must be at least 256, got 255"),
        (["--vocab", "x"], "invalid _positive value"),
        (["--providers", "nobody"], "invalid choice: 'nobody'"),
        (["--cases", "nothing"], "invalid choice: 'nothing'"),
        (["--runs", "all"], "invalid choice: 'all'"),
        (["--runs", "real", "--rows", "1"], "--runs and --quick choose"),
        (["--quick", "--cases", "greedy"], "--runs and --quick choose"),
        (["--quick", "--runs", "real"], "it goes without --runs"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_complete_run_alone_writes_to_results():
    assert command.parse([]).out == command.RESULTS / "cpu"
    assert command.parse(["--device", "cuda"]).out == command.RESULTS / "cuda"
    assert command.parse(["--device", "cuda"]).dtype == "bfloat16"
    for arguments in (["--quick"], ["--rows", "1"], ["--runs", "k"], ["--providers", "amax"]):
        assert command.parse(arguments).out is None


def test_every_run_names_what_there_is():
    for run in RUNS.values():
        assert set(run.cases) <= set(CASES)
        assert set(run.inputs) <= set(MAKERS) | {"smollm2", "gemma3"}
    speaks_of = {case for goal in GOALS for case, _ in (goal.numerator, goal.denominator)}
    assert speaks_of <= set(RUNS["goals"].cases)


def test_nothing_is_timed_twice():
    with open_suite(["amax"], "cpu", torch.float32, FAST) as suite:
        run = Run(("flat",), (300,), (1,), ("greedy", "top-k-50"))
        assert len(list(suite.run(run))) == 2
        assert len(list(suite.run(replace(run, rows=(1, 2))))) == 2


def test_the_readme_shows_what_is_committed():
    record = json.loads((command.RESULTS / "cpu.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.readme(record) in readme
    assert report.markdown(record) == (command.RESULTS / "cpu.md").read_text(encoding="utf-8")
    assert record["environment"]["date"][:10] in readme
    assert not any(line["wrong"] for line in record["results"] if line["provider"] == OURS)


# ---- Threads and instructions --------------------------------------------------------------------


def test_the_threads_of_a_row(tmp_path, capsys):
    path = tmp_path / "threads.json"
    assert threads.main(["--threads", "2", "--calls", "1", "--json", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["environment"]["threads"] == 2
    assert all(line["alone_us"] > 0 and line["together_us"] > 0 for line in record["lines"])
    seen = {(line["case"], line["provider"], line["after"]) for line in record["lines"]}
    pairs = [(case, provider) for case, shown in threads.SHOWN.items() for provider in shown]
    assert seen == {(*pair, after) for pair in pairs for after in ("a model", "itself", "a pause")}
    assert threads.table(record["lines"], 2) in capsys.readouterr().out


def test_requests_that_come_and_go(tmp_path, capsys, monkeypatch):
    for name, value in (("VOCAB_SIZE", 50), ("REQUESTS", 6), ("CHANGES", 2), ("PROMPT", 3)):
        monkeypatch.setattr(serving, name, value)
    before = torch.get_num_threads()
    serving.main(["--steps", "2", "--json", str(tmp_path / "serving.json")])
    torch.set_num_threads(before)
    record = json.loads((tmp_path / "serving.json").read_text())
    assert record["command"].startswith("python -m benchmarks.serving --steps 2")
    assert [line["by"] for line in record["lines"]] == ["RequestTable", "Sampler"]
    shown = capsys.readouterr().out
    assert all(f"| {line['by']} | {line['python_us']} |" in shown for line in record["lines"])


def test_a_call_is_timed_alone_and_after_what_is_said():
    seen = []
    before = torch.get_num_threads()
    try:
        threads.measure(
            lambda buffer: seen.append(("call", buffer, torch.get_num_threads())),
            lambda buffer: seen.append(("before", buffer, torch.get_num_threads())),
            buffers=2,
            threads=3,
            calls=2,
        )
    finally:
        torch.set_num_threads(before)
    turns = itertools.product((0, 1), (1, 3), ("before", "call"))
    assert seen == [(what, buffer, count) for buffer, count, what in turns]


def test_the_share_of_repeated_ngrams():
    assert repeated(ngrams_of([1, 2, 3, 4, 5], 4)) == 0
    assert repeated(ngrams_of([1, 2, 3, 4, 1, 2, 3, 4], 4)) == pytest.approx(1 / 5)
    assert repeated(ngrams_of([7] * 11, 4)) == 7 / 8
    assert repeated(ngrams_of([7] * 3, 4)) == 0


def test_repetition_needs_a_text_that_can_repeat(capsys):
    with pytest.raises(SystemExit):
        repetition.main(["--max-new-tokens", "3"])
    assert "--max-new-tokens must be an integer >= 4, got 3" in capsys.readouterr().err


def test_the_texts_of_rules_have_their_length_and_repeat_themselves():
    sentences = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    for length in (1, 1024):
        of_kind = rules.texts(sentences, length)
        assert {len(ids) for ids in of_kind.values()} == {length}
        assert of_kind == rules.texts(sentences, length)
    assert all(repeated(ngrams_of(ids, 3)) > 0.5 for ids in of_kind.values())


def test_a_row_with_rules_is_drawn_from_its_own_list():
    """The calls that are timed differ by the list alone, and it acts."""
    logits = torch.zeros(1, 8)
    logits[0, 3] = 9.0
    plain, ruled = (
        rules.draws(logits, [3, 5, 3, 5], rule)(0).tokens.tolist()
        for rule in ({}, {"no_repeat_ngram_size": 2, "temperature": 0})
    )
    assert (plain, ruled) == ([3], [0])


def test_a_timing_of_additions_needs_a_turn(capsys):
    with pytest.raises(SystemExit) as stopped:
        additions.main(["--rounds", "0"])
    assert stopped.value.code == 2
    assert "got 0" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--threads", "1"], ["--threads", "2", "--calls", "0"]])
def test_a_comparison_of_threads_needs_some(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        threads.main(arguments)
    assert stopped.value.code == 2
    assert f"got {arguments[-1]}" in capsys.readouterr().err


# The profile has two functions of the CPU library, one a clone that calls the other, a function of
# torch, and memcpy, which belongs to neither.
PROFILE = """\
version: 1
creator: callgrind
positions: line
events: Ir
ob=(1) /somewhere/libllm_sampling_cpu.so
fl=(1) passes.h
fn=(1) llm_sampling::(anonymous namespace)::scan_mass(Row const&, long) [clone .arch_x86_64_v3]
10 100
+2 20
cfn=(2) llm_sampling::(anonymous namespace)::Buffer<int>::at_least(long)
calls=3 40
12 6000
* 7

fn=(2)
40 5
cob=(2) /somewhere/libc.so.6
cfn=(3) memcpy
calls=1 0
41 900

ob=(2)
fn=(3)
0 900

ob=(3) /elsewhere/libtorch_cpu.so
fn=(4) void at::native::max_kernel<Vec<float>, 4>(at::TensorIterator&)
-3 40
totals: 1072
"""


def test_instructions_are_counted_where_they_are():
    found = cpu_cost.functions(PROFILE)
    assert found == {"scan_mass": 127, "at_least": 5, "max_kernel": 40}


def test_what_is_counted_exists():
    for provider, cases in cpu_cost.SHOWN.items():
        assert provider in PROVIDERS
        assert set(cases) <= set(CASES)


def test_masks_that_are_counted():
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    masks = {name: cpu_cost.make_mask(name, logits) for name in cpu_cost.MASK_GOALS}
    allowed = {name: int(mask.sum()) for name, mask in masks.items()}
    assert allowed == {
        **{"half": 1000, "all": 2000},
        **{"1": 1, "5": 5, "100": 100, "2,000": 2000, "all but 100": 1900},
        **{"alternating words": 992, "alternating tokens": 1000, "last tile": 2000 - 3 * 512},
        **{"lower half": 1000, "lowest 100": 100, "all but the best": 1999},
        **{"all but the best 50": 1950, "all but the best 2,000": 0, "all but the best 20,000": 0},
    }
    best = logits.topk(50).indices
    assert not masks["all but the best 50"][best].any()
    assert not masks["all but the best"][best[0]]
    assert masks["lowest 100"][logits.argmin()]
    assert set(cpu_cost.MASKED_CASES) <= set(CASES)


def test_results_cost_what_they_may():
    """The goals for lists of logprobs and kept ids, which cpu_cost.py counts."""
    results = json.loads((ROOT / "benchmarks/results/cpu-cost.json").read_text("utf-8"))
    lines = results["results"]
    wanted = itertools.product(cpu_cost.INPUTS, cpu_cost.RESULT_CASES, cpu_cost.RESULTS)
    assert [(line["input"], line["case"], line["result"]) for line in lines] == list(wanted)
    found = {(line["input"], line["case"], line["result"]): line for line in lines}
    for name in cpu_cost.INPUTS:
        plain = found[name, "top-k-50", "tokens"]["total"]
        for result, (base, most) in cpu_cost.RESULT_GOALS.items():
            line = found[name, "top-k-50", result]
            more = (line["total"] - found[name, "top-k-50", base]["total"]) / plain
            assert line["more"] == pytest.approx(more, abs=1e-3)
            assert 0 < more <= most, line
    table = (ROOT / "benchmarks/results/cpu-cost.md").read_text("utf-8")
    assert f"\n{cpu_cost.results_table(lines)}\n" in table


def test_masks_cost_what_they_may():
    """The goals that cpu_cost.py counts; what misses them is named here, and nothing else does.

    Where a mask bans the likeliest tokens, min-p keeps thousands of the others. The row that the
    mask leaves then takes many times the instructions of the whole row, without a mask too.
    """
    results = json.loads((ROOT / "benchmarks/results/cpu-cost.json").read_text("utf-8"))
    lines = results["masks"]
    wanted = itertools.product(
        *(cpu_cost.INSTRUCTION_SETS, cpu_cost.DTYPES, cpu_cost.MASKED_CASES, cpu_cost.MASK_GOALS)
    )
    names = ("instruction_set", "dtype", "case", "mask")
    assert [tuple(line[name] for name in names) for line in lines] == list(wanted)
    assert all(line["limit"] == cpu_cost.MASK_GOALS[line["mask"]] for line in lines)
    missed = [line for line in lines if line["ratio"] > line["limit"]]
    assert {(line["case"], line["mask"]) for line in missed} == MISSED
    assert all(line["ratio"] < 1.25 * line["ratio_of_infinite"] for line in missed)
    table = (ROOT / "benchmarks/results/cpu-cost.md").read_text("utf-8")
    assert table.endswith(f"\n{cpu_cost.masked_table(lines)}")


MISSED = {
    ("min-p-0.05", "lower half"),
    ("min-p-0.05", "all but the best 50"),
    ("min-p-0.05", "all but the best 2,000"),
    ("min-p-0.05", "all but the best 20,000"),
}


def test_what_results_and_masks_add_to_a_call(tmp_path, capsys, monkeypatch):
    for name in ("VOCAB_SIZE", "INPUTS", "RESULT_CASES", "MASKED_CASES", "DTYPES"):
        few = {"VOCAB_SIZE": 21000, "DTYPES": {"float32": torch.float32}}
        monkeypatch.setattr(cpu_cost, name, few.get(name) or getattr(cpu_cost, name)[-1:])
    before = torch.get_num_threads()
    path = tmp_path / "additions.json"
    additions.main(["--rounds", "1", "--json", str(path)])
    torch.set_num_threads(before)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m benchmarks.additions --rounds 1")
    assert record["environment"]["threads"] == 1
    assert [line["result"] for line in record["results"]] == list(cpu_cost.RESULTS)
    assert [line["mask"] for line in record["masks"]] == list(cpu_cost.MASK_GOALS)
    assert all(line["total"] > 0 for line in record["results"])
    assert all(line["unmasked"] > 0 and line["masked"] > 0 for line in record["masks"])
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text + "\n" == capsys.readouterr().out
    assert "in percent of the time of the call for tokens" in text


def test_what_is_added_is_compared_with_calls_of_the_same_case():
    """A base that is slow in one case must not be compared with the results of another."""
    parts = [
        ({"input": name, "case": case, "result": result}, 1.0 + len(result) + 100 * (case == "b"))
        for name in ("x", "y")
        for case in ("a", "b")
        for result in ("tokens", "raw", "top 20 raw")
    ]
    lines = cpu_cost.compare_results(names | {"total": total} for names, total in parts)
    more = {(line["case"], line["result"]): line["more"] for line in lines}
    assert more["a", "raw"] == pytest.approx(-3 / 7, abs=1e-3)
    assert more["a", "top 20 raw"] == pytest.approx(7 / 7, abs=1e-3)  # over raw, of tokens
    assert more["b", "top 20 raw"] == pytest.approx(7 / 107, abs=1e-3)


def test_counting_instructions_needs_valgrind(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs valgrind"):
        cpu_cost.main([])


# ---- vLLM's engine -------------------------------------------------------------------------------


def test_the_requests_are_mixed():
    requests = vllm_engine.make_requests(64)
    assert [r["kind"] for r in requests[:8]] == list(vllm_engine.KINDS)
    assert len({r["prompt"] for r in requests}) > 48
    seeds = [r["params"]["seed"] for r in requests if "seed" in r["params"]]
    assert len(set(seeds)) == len(seeds) == 40
    greedy = [r for r in requests if r["params"]["temperature"] == 0]
    assert len(greedy) == 16
    assert not any("seed" in r["params"] for r in greedy)


def vllm_results(requests):
    """Return results as if every request had got its own number as its text, in every run."""
    tokens = [[number] for number in range(len(requests))]
    alone = {str(i): tokens[i] for i, request in enumerate(requests) if "seed" in request["params"]}
    rounds = [
        {
            "seconds": seconds,
            "steps": 10,
            "step_seconds": 0.5,
            "forward_seconds": 0.04,
            "refresh_seconds": 0.01,
            "preempted": 3,
        }
        for seconds in (1.0, 2.0, 4.0)
    ]
    one = {"together": tokens, "alone": alone, "rounds": rounds}
    one["same_every_round"] = [True] * len(requests)
    return {
        sampler: {run: dict(one) for run in ("engine", "preempted", "server")}
        for sampler in vllm_engine.SAMPLERS
    }


@pytest.mark.parametrize(
    ("run", "field", "number", "seen"),
    [
        ("engine", "together", 0, ("greedy", "engine")),
        ("preempted", "together", 1, ("greedy", "preempted")),
        ("server", "together", 0, ("greedy", "server")),
        ("preempted", "together", 2, ("seeds", "llm_sampling", "after preemption")),
        ("engine", "alone", "3", ("seeds", "llm_sampling", "alone")),
        ("server", "alone", "4", ("seeds", "llm_sampling", "served, alone")),
        ("engine", "same_every_round", 5, ("seeds", "llm_sampling", "in every round")),
        ("preempted", "together", 7, None),  # request 7 has no seed
    ],
)
def test_a_token_that_differs_is_counted(run, field, number, seen):
    requests = vllm_engine.make_requests(8)
    results = vllm_results(requests)
    assert vllm_engine.is_right(vllm_engine.compare(requests, results))
    of = results["llm_sampling"][run]
    of[field] = of[field].copy()
    of[field][number] = "another"
    checks = vllm_engine.compare(requests, results)
    assert vllm_engine.is_right(checks) == (seen is None)
    if seen is not None:
        for name in seen:
            checks = checks[name]
        assert checks["changed"] == 1


def test_what_vllm_s_own_sampler_does_with_seeds_fails_nothing():
    requests = vllm_engine.make_requests(8)
    results = vllm_results(requests)
    results["vllm"]["preempted"]["together"] = [[-1]] * 2 + [["another"]] * 6
    results["llm_sampling"]["preempted"]["together"] = [[-1]] * 2 + [[i] for i in range(2, 8)]
    checks = vllm_engine.compare(requests, results)
    assert checks["seeds"]["vllm"]["after preemption"] == {"changed": 5, "of": 5}
    assert vllm_engine.is_right(checks)


def test_the_report_of_vllm_s_engine():
    requests = vllm_engine.make_requests(16)
    results = vllm_results(requests)
    lines = vllm_engine.measure(results, 16, 10)
    assert lines[0] == {
        "sampler": "vllm",
        "rounds": 3,
        "step_ms": 50.0,
        "forward_ms": 4.0,
        "refresh_ms": 1.0,
        "share": 0.1,
        "tokens_per_s": 80.0,
        "served_tokens_per_s": 80.0,
    }
    text = vllm_engine.report(
        {
            "command": "a command",
            "environment": {"cpu": "a CPU", "date": "a day"},
            **{"threads": 2, "vllm": "0.32.0", "torch": "2.13.0", "requests": 16, "tokens": 10},
            "preempted": {"vllm": 3, "llm_sampling": 4},
            "checks": vllm_engine.compare(requests, results),
            "lines": lines,
        }
    )
    assert "| llm_sampling | 80.0 | 80.0 | 50.0 | 4.00 | 1.00 | 10.0% |" in text
    assert "| after preemption | 0 of 10 | 0 of 10 |" in text
    assert "| server | 0 of 4 |" in text


def test_openai_s_client_gets_what_is_not_openai_s_beside_it():
    params = {"temperature": 0.8, "top_k": 50, "repetition_penalty": 1.1, "seed": 3}
    assert vllm_worker.openai_options(params, 7) == {
        "temperature": 0.8,
        "seed": 3,
        "max_tokens": 7,
        "extra_body": {"top_k": 50, "repetition_penalty": 1.1, "ignore_eos": True},
    }


def test_a_clock_counts_calls_and_their_time():
    ticks = itertools.count()
    owner = types.SimpleNamespace(work=lambda x, y: x + y + next(ticks))
    clock = watch.Clock()
    clock.watch(owner, "work")
    assert [owner.work(1, y=2), owner.work(1, 2)] == [3, 4]
    seconds, calls = clock.take()
    assert seconds > 0
    assert calls == 2
    assert clock.take() == (0.0, 0)


def test_launches_are_what_computes_something():
    params = SamplingParams(top_k=3, seed=1)
    logits = torch.randn(2, 50)

    def inner():
        return logits * 2

    def work():
        owner.inner()
        torch.empty(3)
        (logits + 1).view(-1)[3:].unsqueeze(0)
        return sample(logits, params)

    owner = types.SimpleNamespace(work=work, inner=inner)
    alone = types.SimpleNamespace(draw=lambda: sample(logits, params))
    one, launches = watch.Launches(), watch.Launches()
    one.watch(alone, "draw")
    assert torch.equal(alone.draw().tokens, sample(logits, params).tokens)
    assert one.count >= 1
    launches.watch(owner, "work")
    launches.watch(owner, "inner")  # inside of the other it is counted once
    owner.work()
    assert launches.count == one.count + 2
    owner.inner()
    assert launches.count == one.count + 3
    before = launches.count
    sample(logits, params)
    assert launches.count == before, "nothing is counted outside"


class Runner:
    """An engine's runner whose step draws a token for each request."""

    def __init__(self):
        self.sampler = types.SimpleNamespace(draw=self._draw)
        self.steps = 0

    def _draw(self):
        return torch.ones(3).tolist()

    def follow(self):
        return None

    def step(self):
        self.steps += 1
        self.follow()
        return self.sampler.draw()

    def generate(self, tokens):
        made = [self.step() for _ in range(tokens)]
        return [list(row) for row in zip(*made, strict=True)]


def test_what_is_measured_of_an_engine():
    runner = Runner()
    meters = watch.Meters([(runner, "step")], (runner.sampler, "draw"), [(runner, "follow")])
    found = watch.measure(runner.generate, meters, tokens=6, rounds=2)
    assert runner.steps == 4 + 2 * 6 + 6
    assert found["tokens"] == [[1.0] * 6] * 3
    assert [line["steps"] for line in found["rounds"]] == [6, 6]
    assert [line["generated"] for line in found["rounds"]] == [18, 18]
    assert found["launches"] == 1.0
    for line in found["rounds"]:
        assert 0 < line["sampler_seconds"] < line["step_seconds"] < line["seconds"]
    shown = watch.medians(
        [
            {"seconds": s, "steps": 4, "step_seconds": 2.0, "sampler_seconds": 0.5, "generated": 8}
            for s in (1.0, 2.0, 4.0)
        ]
    )
    assert shown == {"tokens_per_s": 4.0, "step_ms": 500.0, "sampler_ms": 125.0, "share": 0.25}


def engine_results():
    rounds = [
        {"seconds": 2.0, "steps": 4, "step_seconds": 1.0, "sampler_seconds": 0.5, "generated": 8}
    ]
    common = {"version": "1.2", "torch": "2.13.0", "rounds": rounds}
    return {
        engines.OWN: common | {"sampler": "theirs", "launches": 30.0, "tokens": [[1], [2]]},
        engines.OURS: common | {"sampler": "llm_sampling.x", "launches": 4.0, "tokens": [[1], [3]]},
    }


def test_the_report_of_engines():
    requests = [{"ids": [1], "params": {"temperature": t}} for t in (0.0, 1.0)]
    line = engines.line_of("vllm-v1", engine_results(), requests)
    assert (line["greedy"], line["greedy_changed"]) == (1, 0), "drawn requests may differ"
    both = [{"ids": [1], "params": {"temperature": 0.0}}] * 2
    wrong = engines.line_of("vllm-v1", engine_results(), both)
    assert wrong["greedy_changed"] == 1
    record = {
        "command": "python -m benchmarks.engines",
        "environment": {"cpu": "a CPU", "date": "today"},
        **{"threads": 2, "requests": 2, "tokens": 1, "rounds": 1},
        **{"dtype": "float32", "device": "cpu"},
        "lines": [line, line | {"engine": "vllm-v2"}],
        "absent": {"vllm-v1-async": "no environment"},
    }
    text = engines.report(record)
    assert "| vLLM, V1 (1.2) | its own | 4.0 | 250.0 | 125.00 | 50.0% | 30.0 |" in text
    assert "| vLLM, V2 (1.2) | llm_sampling | | | | | 4.0 |" in text, "no times on a CPU"
    assert "vLLM, V1, asynchronous: absent, no environment" in text
    assert engines.is_right(record)
    assert not engines.is_right(record | {"lines": [wrong]})
    results = engine_results()
    results[engines.OURS]["sampler"] = "theirs"
    absent = engines.line_of("vllm-v1", results, requests)
    assert not engines.is_right(record | {"lines": [absent]}), "the plug-in was not there"


def test_tokens_that_an_engine_gets_wrong_are_not_compared():
    kinds = [{"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.1}]
    requests = [{"ids": [1], "params": params} for params in kinds]
    results = engine_results()
    watch.leave_penalised_out(results[engines.OWN], requests)
    assert results[engines.OWN]["tokens"] == [[1], None]
    line = engines.line_of("sglang", results, requests)
    assert (line["greedy"], line["greedy_changed"]) == (1, 0)


def test_an_engine_whose_environment_is_not_there_is_named(monkeypatch):
    def absent(name):
        raise AbsentError(f"python -m benchmarks.environments {name} makes its environment")

    monkeypatch.setattr(engines, "python_of", absent)
    with pytest.raises(AbsentError, match="environments vllm makes"):
        engines.run(engines.ENGINES["vllm-v1"], {"threads": 1}, engines.OURS)


def test_docs_show_what_was_measured_in_engines():
    """docs/engines.md shows the committed results of all engines, whose greedy texts agree."""
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks/results/engines.json").read_text(encoding="utf-8"))
    text = (root / "docs/engines.md").read_text(encoding="utf-8")
    assert record["command"] in text
    assert engines.report(record).split("\n\n", 1)[1].strip() in text
    assert engines.is_right(record)
    assert [line["engine"] for line in record["lines"]] == list(engines.ENGINES)


def test_docs_show_what_was_measured_in_vllm_s_engine():
    """docs/engines/vllm.md shows the committed results, in which every promised check passed."""
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks/results/vllm-cpu.json").read_text(encoding="utf-8"))
    text = (root / "docs/engines/vllm.md").read_text(encoding="utf-8")
    assert record["command"] in text
    assert vllm_engine.report(record).split("\n\n", 1)[1].strip() in text
    assert vllm_engine.is_right(record["checks"])
    assert all(record["preempted"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--requests", "7"], "--requests must be an integer >= 8"), ([], "makes its environment")],
)
def test_vllm_s_engine_is_refused_before_anything_slow(arguments, message, monkeypatch, capsys):
    def absent(name):
        raise AbsentError(f"python -m benchmarks.environments {name} makes its environment")

    monkeypatch.setattr(vllm_engine, "python_of", absent)
    with pytest.raises(SystemExit) as stopped:
        vllm_engine.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- Goals and numbers ---------------------------------------------------------------------------


def line(case, provider, time, inputs="model", rows=8, vocab_size=128256):
    timing = None if time is None else Timing(time, time, time, 5, 1)
    return Result(inputs, vocab_size, rows, case, provider, 4, timing)


def test_goals_are_judged_on_both_sides():
    results = [
        line("full-chain", OURS, 10),
        line("full-chain", HUGGING_FACE, 1001),
        line("full-chain", LLAMA_CPP, 149),
        line("full-chain", VLLM, None),
        line("top-k-50", OURS, 15),
        line("top-k-50", "amax", 10),
        line("top-p-0.9", OURS, 11, inputs="flat"),
        line("top-p-0.9", "softmax", 10, inputs="flat"),
        line("top-k-50", OURS, 99, vocab_size=1000),
        line("top-k-50", "amax", 1, vocab_size=1000),
    ]
    calls = {SAMPLER: Timing(6.2, 6, 7, 3, 1), KERNEL: Timing(1.1, 1, 2, 3, 1)}
    verdicts = {(v["goal"], v["on"].split(",")[0]): v["met"] for v in judge(results, calls)}
    assert verdicts == {
        ("full-chain: huggingface ÷ ours", "model"): True,
        ("full-chain: llama.cpp ÷ ours", "model"): False,
        ("top-k-50: ours ÷ amax", "model"): True,
        ("top-p-0.9: ours ÷ softmax", "flat"): False,
        ("Python around a prepared call, µs", "V = 32"): False,
    }


# The devices of the predicted times


def test_devices_have_the_multiprocessors_of_their_gpcs():
    assert len({device.name for device in gpu_model.DEVICES}) == 5
    for device in gpu_model.DEVICES:
        assert sum(device.gpcs) == device.processors
        assert device.l2_cycles < device.memory_cycles
        assert device.shared_per_processor == (device.shared_kib + 1) * 1024


def test_a_cluster_lies_within_a_gpc():
    """15 clusters of 8 were seen on an H100, where 132 multiprocessors would hold 16."""
    assert gpu_model.H100.resident(8, 1) == 15
    assert gpu_model.H100.resident(8, 2) == 31
    assert gpu_model.H100.resident(4, 2) == 66
    assert gpu_model.H100.resident(1, 2) == 264
    # Blocks that are no cluster may be anywhere.
    assert gpu_model.H100.resident(8, 1, clustered=False) == 16
    assert gpu_model.A100.resident(32, 2, clustered=False) == 6
