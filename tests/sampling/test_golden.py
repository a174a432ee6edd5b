"""Are the tokens still those that were recorded when the semantics were fixed?

golden/README.md defines how the 1,000 cases are made from integers, and golden/tokens.json holds
their recorded answers. Every backend must give these answers, and so must the CPU kernel when it is
built for each instruction set by each compiler, on torch's threads and on its own threads, and when
it is built for ARM's aarch64 and runs in QEMU.
``python tests/sampling/test_golden.py`` records the answers.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import EVERY_BACKEND, INF, NAN, device_of, threads
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory, reference, sample
from llm_sampling.backends import base, c_abi
from llm_sampling.backends.base import SampleCall
from llm_sampling.calls import make_call
from llm_sampling.results import KeptForm, SampleOutput, Wanted

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/sampling/golden"
RECORDED = GOLDEN / "tokens.json"
CASES = 1000
DRAWS = 4

# The values from which each random word of a case chooses, in the order of the README's table.
VOCAB_SIZES = (1, 2, 2, 7, 7, 33, 33, 64, 64, 127, 512, 512, 513, 513)
VOCAB_SIZES += (1000, 1000, 1000, 1000, 1000, 1000, 1025, 1025, 1025, 2049, 2049)
VOCAB_SIZES += (4097, 4097, 5003, 5003, 5003, 32768, 50257)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ("plain", "plain", "plain", "plain", "ties", "ties", "peaks", "peaks", "seen", "seen")
SHAPES += ("tenths", "tenths", "tenths", "tenths", "tenths", "edge")
SCALES = (2.0**-24, 2.0**-8, 2.0**-8, 2.0**-8, 2.0**-7, 2.0**-7, 2.0**-149, 2.0**115)
SPECIALS = ("none",) * 18 + ("nan", "inf", "few", "no candidate", "all nan", "mixed")
TEMPERATURES = (
    1.0,
    1.0,
    1.0,
    1.0,
    0.5,
    0.7,
    0.7,
    0.7,
    1.5,
    1.5,
    2.0,
    2.0,
    0.0,
    100.0,
    0.001,
    1e-40,
)
TOP_KS = (0, 0, 0, 0, 0, 0, 0, 1, 2, 20, 20, 50, 50, 50, 1024, 1048576)
TOP_PS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.5, 0.9, 0.9, 0.95, 0.95, 0.99, 0.999999, 1e-6)
MIN_PS = (0.0, 0.0, 0.0, 0.0, 0.02, 0.02, 0.1, 1.0)
REPETITIONS = (1.0, 1.0, 1.0, 1.1, 1.1, 1.3, 0.8, 1e30)
FREQUENCIES = (0.0, 0.0, 0.1, 0.3, 0.7, -0.3, 0.25, 2.0)
PRESENCES = (0.0, 0.0, 0.0, 0.1, 0.25, 1.0, 2.0, -0.5)
AT_LEAST = (1, 1, 1, 1, 1, 1, 3, 100)
BIASES = (0, 0, 0, 1, 8)
EXTREMES = (0, 2**32 - 1, 2**63, 2**64 - 1)
#: The distance of two logits in units of 2^-10, and the top_p in units of 2^-24 at which the last
#: bit of a mass decides whether both are kept. These and the "tenths" detect fused multiply-adds.
EDGES = ((496, 10381429), (757, 11355398), (1275, 13026744), (185, 9144330))
EDGES += ((1301, 13100164), (554, 10604033), (472, 10288418), (1252, 12960930))

Words = npt.NDArray[np.uint64]
#: For each case the status, followed by the draws.
Answers = list[list[int]]


def words(case: int, stream: int, count: int) -> Words:
    """Return the first words of a stream of a case, made by SplitMix64.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(case << 32 | stream << 24) + np.uint64(0x9E3779B97F4A7C15) * np.arange(
            1, count + 1, dtype=np.uint64
        )
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def chosen(word: int, values: tuple[Any, ...]) -> Any:
    return values[word % len(values)]


@dataclass(frozen=True)
class Golden:
    """One case, which is one row of a batch."""

    case: int
    shape: str
    special: str
    logits: Tensor  # (1, vocab_size)
    params: SamplingParams
    prompt: list[int]
    output: list[int]
    allowed_mask: Tensor | None  # int32 (1, words)
    position: int

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def __str__(self) -> str:
        return f"case {self.case} ({self.shape}, {self.special}, V={self.vocab_size}, {self.dtype})"


def units(case: int, v: int, shape: str, seen: list[int]) -> npt.NDArray[np.int64]:
    """Return the unscaled logits: integers, about normal with a standard deviation of 590."""
    z = words(case, 1, v)
    parts = [(z >> np.uint64(n) & np.uint64(0xFFFF)).astype(np.int64) for n in (0, 16, 32, 48)]
    x: npt.NDArray[np.int64] = (sum(parts) - 131070) >> 6
    if shape == "ties":
        x = x >> 8 << 8
    elif shape == "peaks":
        x[words(case, 2, v) % np.uint64(v) < 8] += 4096
    elif shape == "seen":
        x[sorted({i for i in seen if i < v})] += 2048
    elif shape == "tenths":
        x &= 15
    return x


def make_edge(case: int, v: int, word: int, seed: int, position: int) -> Golden:
    """Make a case in which two neighbouring tokens have mass and top-p cuts at the second."""
    gap, top_p = chosen(word, EDGES)
    x = torch.full((1, v), -64.0)
    place = int(words(case, 2, 1)[0]) % v
    x[0, (place + 1) % v] = -gap * 2.0**-10
    x[0, place] = 0.0
    params = SamplingParams(top_p=top_p * 2.0**-24, seed=seed)
    return Golden(case, "edge", "none", x, params, [], [], None, position)


def add_special(x: npt.NDArray[np.float32], special: str, u: npt.NDArray[np.int64]) -> None:
    """Write NaN and infinities into ``x``, at places that ``u``, integers below 64, chooses."""
    if special == "nan":
        x[u == 0] = NAN
    elif special == "inf":
        x[u == 0] = INF
    elif special == "few":
        x[u >= 3] = -INF
    elif special == "no candidate":
        x[:] = -INF
    elif special == "all nan":
        x[:] = NAN
    elif special == "mixed":
        x[u >= 32] = -INF
        x[u == 0] = NAN
        x[u == 1] = INF


def make(case: int) -> Golden:
    """Make a case by the rules of tests/sampling/golden/README.md."""
    w = words(case, 0, 21).tolist()
    v = chosen(w[0], VOCAB_SIZES)
    shape, special = chosen(w[2], SHAPES), chosen(w[4], SPECIALS)
    seed = EXTREMES[w[14] % 8] if w[14] % 8 < 4 else w[15]
    position = EXTREMES[w[16] % 8] if w[16] % 8 < 4 else w[17] >> 48
    if shape == "edge":
        return make_edge(case, v, w[3], seed, position)
    prompt, output = (
        [i % 32 * v // 31 for i in words(case, stream, w[word] % 64).tolist()]
        for stream, word in ((5, 19), (6, 20))
    )
    scale = float(np.float32(0.1)) if shape == "tenths" else chosen(w[3], SCALES)
    x = (units(case, v, shape, prompt + output) * scale).astype(np.float32)
    add_special(x, special, (words(case, 3, v) % np.uint64(64)).astype(np.int64))
    bias = {
        i % (2 * v): ((i >> 32) % 401 - 200) / 8
        for i in words(case, 4, chosen(w[13], BIASES)).tolist()
    }
    params = SamplingParams(
        temperature=chosen(w[5], TEMPERATURES),
        top_k=chosen(w[6], TOP_KS),
        top_p=chosen(w[7], TOP_PS),
        min_p=chosen(w[8], MIN_PS),
        repetition_penalty=chosen(w[9], REPETITIONS),
        frequency_penalty=chosen(w[10], FREQUENCIES),
        presence_penalty=chosen(w[11], PRESENCES),
        min_tokens_to_keep=chosen(w[12], AT_LEAST),
        logit_bias=bias or None,
        seed=seed,
    )
    mask = None
    if w[18] % 5 == 0:
        low = (words(case, 7, -(-v // 32)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        mask = torch.from_numpy(low.view(np.int32))[None]
    return Golden(
        case=case,
        shape=shape,
        special=special,
        logits=torch.from_numpy(x)[None].to(chosen(w[1], DTYPES)),
        params=params,
        prompt=prompt,
        output=output,
        allowed_mask=mask,
        position=position,
    )


@dataclass(frozen=True)
class Question:
    """The rows and the number of draws of one call."""

    rows: list[Golden]
    num_samples: int

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments of ``sample`` without the backend."""
        v = self.rows[0].vocab_size
        everything = torch.full((1, -(-v // 32)), -1, dtype=torch.int32)
        masks = [everything if g.allowed_mask is None else g.allowed_mask for g in self.rows]
        has_mask = any(g.allowed_mask is not None for g in self.rows)
        return {
            "logits": torch.cat([g.logits for g in self.rows]).to(device),
            "params": [g.params for g in self.rows],
            "history": TokenHistory.from_ids(
                [g.prompt for g in self.rows], [g.output for g in self.rows], v, device=device
            ),
            "allowed_mask": torch.cat(masks).to(device) if has_mask else None,
            "positions": [g.position for g in self.rows],
            "num_samples": self.num_samples,
            "check": False,
        }


def questions(golden: list[Golden]) -> Iterator[Question]:
    """Yield each case alone with four draws, then batches of equal size and dtype with one draw."""
    yield from (Question([g], DRAWS) for g in golden)

    def key(g: Golden) -> tuple[int, str]:
        return g.vocab_size, str(g.dtype)

    for _, group in groupby(sorted(golden, key=key), key):
        yield Question(list(group), 1)


T = TypeVar("T")


def answers(asked: Sequence[tuple[Question, T]], draw: Callable[[T], SampleOutput]) -> Answers:
    """Return for each case its status and draws alone, then its status and draw in a batch."""
    found: list[list[int]] = [[] for _ in range(CASES)]
    for question, call in asked:
        output = draw(call)
        tokens = output.tokens.reshape(-1, question.num_samples).tolist()
        for g, status, drawn in zip(question.rows, output.status.tolist(), tokens, strict=True):
            found[g.case] += [status, *drawn]
    return found


def answers_of(backend: str, golden: list[Golden]) -> Answers:
    """Return the answers that a backend gives through ``sample``."""
    device = device_of(backend)
    asked = [(question, question.arguments(device)) for question in questions(golden)]
    return answers(asked, lambda arguments: sample(**arguments, backend=backend))


def differences(golden: list[Golden], found: Answers, recorded: Answers) -> list[str]:
    """Return a description of each case whose answers differ from the recorded ones."""
    assert len(found) == len(recorded) == len(golden)
    return [
        f"{g}: recorded {old}, alone {new[: DRAWS + 1]}, among others {new[DRAWS + 1 :]}"
        for g, new, old in zip(golden, found, recorded, strict=True)
        if new != old + old[:2]
    ]


def read(path: Path) -> Answers:
    recorded: Answers = json.loads(path.read_text(encoding="utf-8"))
    return recorded


def record(path: Path, found: Answers, *, change: bool) -> str:
    """Write the answers, one line per case, and return a message.

    Raises:
        SystemExit: the file has other answers and ``change`` is False.
    """
    if path.exists() and not change:
        before = read(path)
        changed = [case for case, answer in enumerate(found) if before[case : case + 1] != [answer]]
        if changed or len(before) != len(found):
            raise SystemExit(
                f"{len(changed)} of {len(found)} cases, {changed[:5]} first, have other tokens "
                f"than {path} has. That breaks what users rely on. If it is meant, it is an entry "
                'under "Numerics" in CHANGELOG.md, and --change writes the file'
            )
        return f"{path} is as it was\n"
    path.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", encoding="utf-8")
    return f"{path} has the tokens of {len(found)} cases\n"


# ---- The tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> list[Golden]:
    return [make(case) for case in range(CASES)]


@pytest.fixture(scope="module")
def recorded() -> Answers:
    return read(RECORDED)


@pytest.fixture(scope="module")
def calls(golden: list[Golden]) -> list[tuple[Question, SampleCall]]:
    """Return the calls for a library that is called directly, without the package."""
    return [(question, make_call(**question.arguments())) for question in questions(golden)]


@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
def test_every_backend_gives_them(backend: str, golden: list[Golden], recorded: Answers) -> None:
    with threads(1):  # the reference gains little from more
        found = answers_of(backend, golden)
    assert differences(golden, found, recorded) == []


def flags_of_setup() -> list[str]:
    """Return the compiler's options for the CPU kernel in setup.py."""
    script = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assignments = [
        statement
        for statement in script.body
        if isinstance(statement, ast.Assign | ast.AugAssign)
        and re.match(r"(EXACT|FLAGS) ", ast.unparse(statement))
    ]
    found: dict[str, list[str]] = {}
    exec(compile(ast.Module(assignments, []), "setup.py", "exec"), found)
    assert "-ffp-contract=off" in found["FLAGS"]
    return found["FLAGS"]


FLAGS = flags_of_setup()
COMPILERS = {"g++": ("g++",), "clang++": ("clang++", "clang++-14")}
#: The CPU features that each level adds to the levels before it, by their names in /proc/cpuinfo.
ARCHITECTURES = {
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    "x86-64-v3": {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def program_of(names: Sequence[str]) -> str:
    """Return the path of the first program that there is; without one skip, and fail in CI."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {' or '.join(names)}")
    return found


def what_is_missing(architecture: str) -> list[str]:
    """Return the CPU features that this machine lacks for an architecture level."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["x86-64"]
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert found is not None
    names = list(ARCHITECTURES)
    needed = set().union(*map(ARCHITECTURES.get, names[: names.index(architecture) + 1]))
    return sorted(needed - set(found[1].split()))


def build(compiler: str, architecture: str, library: Path) -> None:
    """Build the CPU kernel for one instruction set only, without run-time dispatch."""
    alone = "-DLLM_SAMPLING_CLONES=__attribute__((noinline))"
    source = ROOT / "csrc/cpu/sample.cpp"
    # FLAGS hide symbols, which gives each library of a process its own thread pool
    options = ["-fPIC", "-shared", *FLAGS, f"-march={architecture}", alone]
    compile_with([compiler, *options, "-o", library, source, "-ldl"])


def compile_with(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def library_of(build_once: Callable[..., Path]) -> Callable[[str, str], Path]:
    """Return a function that builds the library for a compiler and an instruction set, once."""

    def library_of(name: str, architecture: str) -> Path:
        def build_in(folder: Path) -> None:
            build(program_of(COMPILERS[name]), architecture, folder / "library.so")

        return build_once(f"golden-{name}-{architecture}", build_in) / "library.so"

    return library_of


def count_threads() -> int:
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("whose", ["torch's threads", "own threads"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_build_gives_them(
    compiler: str,
    architecture: str,
    whose: str,
    library_of: Callable[[str, str], Path],
    calls: list[tuple[Question, SampleCall]],
    golden: list[Golden],
    recorded: Answers,
    tmp_path: Path,
) -> None:
    """Every build gives the recorded answers, on torch's OpenMP threads and on its own pool."""
    program_of(COMPILERS[compiler])
    if missing := what_is_missing(architecture):
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    # loading the same file twice would give the same library, with the same thread pool
    copy = shutil.copy(library_of(compiler, architecture), tmp_path)
    library = ctypes.CDLL(str(copy))
    if whose == "own threads":
        library.llm_sampling_cpu_forked()

    def draw(call: SampleCall) -> SampleOutput:
        struct, output = c_abi.make_args(call), base.make_results(call)
        c_abi.set_results(struct, output)
        struct.num_threads = 2
        assert library.llm_sampling_cpu(ctypes.byref(struct)) == 0
        return output

    with threads(2):
        torch.randn(64, 50_000).softmax(-1)  # start torch's threads before counting
        before = count_threads()
        found = answers(calls, draw)
        assert count_threads() - before == (1 if whose == "own threads" else 0)
    assert differences(golden, found, recorded) == []


#: The machines for which golden_runner.cpp is built: the names that the compiler may have, and
#: those of the emulator that runs the program.
MACHINES = {
    "this machine": (("g++",), ()),
    "aarch64": (("aarch64-linux-gnu-g++",), ("qemu-aarch64", "qemu-aarch64-static")),
}


def pointers(
    struct: ctypes.Structure, prefix: str = ""
) -> Iterator[tuple[ctypes.Structure, str, str]]:
    """Yield each pointer that is not NULL: its struct, its name there, and the path to it."""
    for name, kind in struct._fields_:  # type: ignore[misc]
        if issubclass(kind, ctypes.Structure):
            yield from pointers(getattr(struct, name), f"{name}.")
        elif kind is ctypes.c_void_p and getattr(struct, name):
            yield struct, name, prefix + name


def results_by_path(output: SampleOutput, filtered: Tensor) -> dict[str, Tensor]:
    """Return the results that there are by their paths in the struct, in its order."""
    found = {"tokens": output.tokens, "status": output.status, "filtered": filtered}
    for part in ("processed", "raw", "kept"):
        values = getattr(output, part)
        named = {} if values is None else values._asdict()
        found |= {f"{part}.{name}": x for name, x in named.items() if x is not None}
    return found


def packed(call: SampleCall, struct: c_abi.SampleArgs, results: dict[str, Tensor]) -> bytes:
    """Return a call in the form that golden_runner.cpp reads: sizes for pointers, then arrays."""
    history = {} if call.history is None else vars(call.history)
    tensors = {"logits": call.logits, "allowed_mask": call.allowed_mask, **vars(call.batch)}
    tensors["token_ids"] = call.wanted.token_ids
    arrays = []
    for own, name, path in pointers(struct):
        tensor = results[path] if path in results else {**tensors, **history}[path]
        assert tensor.is_contiguous()
        setattr(own, name, tensor.numel() * tensor.itemsize or None)
        if path not in results:
            arrays.append(tensor.view(torch.uint8).numpy().tobytes())
    return b"".join([bytes(struct), *arrays])


class Runner:
    """The program golden_runner.cpp, built for a machine, and the kernel in it."""

    def __init__(self, machine: str, folder: Path, *, without: str | None = None) -> None:
        compiler, *emulator = map(program_of, filter(None, MACHINES[machine]))
        program = folder / "golden_runner"
        self.command = [*emulator, program]
        sources = (ROOT / "tests/kernels/cpp/golden_runner.cpp", ROOT / "csrc/cpu/sample.cpp")
        options = [flag for flag in FLAGS if flag != without]
        assert len(options) == len(FLAGS) - (without is not None)
        compile_with([compiler, *options, "-static", "-o", program, *sources, "-ldl"])

    def __call__(self, calls: Sequence[SampleCall]) -> list[dict[str, Tensor]]:
        """Return the results of each call by their paths; one process runs them all."""
        asked, expected = [], []
        for call in calls:
            struct, output = c_abi.make_args(call), base.make_results(call)
            filtered = torch.empty(call.logits.shape)
            c_abi.set_results(struct, output)
            struct.filtered, struct.filtered_stride = filtered.data_ptr(), filtered.shape[1]
            struct.num_threads = 2
            results = results_by_path(output, filtered)
            asked.append(packed(call, struct, results))
            expected.append(results)
        done = subprocess.run(
            self.command, input=b"".join(asked), capture_output=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()
        answer = io.BytesIO(done.stdout)
        for results in expected:
            assert int.from_bytes(answer.read(4), sys.byteorder) == 0
            for tensor in results.values():
                read = answer.readinto(tensor.view(torch.uint8).numpy())
                assert read == tensor.numel() * tensor.itemsize
        assert not answer.read()
        return expected


Asked = list[tuple[Question, SampleCall, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def asked(calls: list[tuple[Question, SampleCall]]) -> Asked:
    """Return the calls with all that a call can return, and the results of the reference.

    A third of the calls has each form of the kept set.
    """
    forms = get_args(KeptForm)
    found = []
    with threads(1):
        for number, (question, call) in enumerate(calls):
            v = call.logits.shape[1]
            ids = torch.tensor([[-1, 0, v // 2, v - 1, v]], dtype=torch.int32)
            form = forms[number % len(forms)]
            wanted = Wanted(("processed", "raw"), 20, ids, form, 64 if form == "ids" else 0)
            call = replace(call, wanted=wanted)
            expected = results_by_path(reference.sample(call), reference.filter_logits(call))
            found.append((question, call, expected))
    return found


def is_same(path: str, own: Tensor, expected: Tensor) -> bool:
    """Return whether a result is the reference's: logprobs are close, all others equal."""
    expected = expected.view(own.shape)
    if "logprobs" in path:
        return torch.allclose(own, expected, rtol=0, atol=1e-5, equal_nan=True)
    return torch.equal(own.view(torch.uint8), expected.view(torch.uint8))


def differences_on(run: Runner, asked: Asked, golden: list[Golden], recorded: Answers) -> list[str]:
    """Return a description of each case whose answers or other results differ in a program."""
    found = run([call for _, call, _ in asked])
    results = iter(found)

    def draw(call: SampleCall) -> SampleOutput:
        own = next(results)
        return SampleOutput(own["tokens"], None, own["status"])

    other = differences(golden, answers([(q, call) for q, call, _ in asked], draw), recorded)
    for (question, _, expected), own in zip(asked, found, strict=True):
        assert list(own) == list(expected)
        for path, tensor in own.items():
            if not is_same(path, tensor, expected[path]):
                other.append(f"{path} of {', '.join(map(str, question.rows))}")
    return other


@pytest.mark.parametrize("machine", MACHINES)
def test_a_program_for_every_machine_gives_them(
    machine: str, asked: Asked, golden: list[Golden], recorded: Answers, tmp_path: Path
) -> None:
    """So does the kernel without Python, on this machine and on an emulated ARM processor.

    All other results are the reference's.
    """
    assert differences_on(Runner(machine, tmp_path), asked, golden, recorded) == []


def test_fused_multiply_adds_of_arm_are_reported(
    asked: Asked, golden: list[Golden], recorded: Answers, tmp_path: Path
) -> None:
    """Every aarch64 has them, and without the option of setup.py the compiler uses them."""
    run = Runner("aarch64", tmp_path, without="-ffp-contract=off")
    wrong = differences_on(run, asked, golden, recorded)
    assert any("recorded" in line for line in wrong)
    for path in ("filtered", "kept.total", "kept.id_masses"):
        assert any(line.startswith(path) for line in wrong), path


@pytest.mark.parametrize("case", [0, 1, 500, CASES - 1])
@pytest.mark.parametrize("place", range(DRAWS + 1))
def test_one_changed_answer_is_reported(
    case: int, place: int, golden: list[Golden], recorded: Answers
) -> None:
    """A changed status or token, in the file or in the answers, is reported for that case only."""
    found = [answer + answer[:2] for answer in recorded]
    assert differences(golden, found, recorded) == []
    other = [list(answer) for answer in recorded]
    other[case][place] += 1
    (line,) = differences(golden, found, other)
    assert line.startswith(f"case {case} (")
    found[case][place] += 1
    (line,) = differences(golden, found, recorded)
    assert line.startswith(f"case {case} (")


def test_another_token_among_others_is_reported(golden: list[Golden], recorded: Answers) -> None:
    """A case that is right alone but wrong in a batch is reported."""
    found = [answer + answer[:2] for answer in recorded]
    found[7][-1] += 1
    (line,) = differences(golden, found, recorded)
    assert line.startswith("case 7 (")


def test_recording_changes_nothing_unless_told(tmp_path: Path, recorded: Answers) -> None:
    path = tmp_path / "tokens.json"
    record(path, recorded, change=False)
    assert path.read_bytes() == RECORDED.read_bytes()
    assert "as it was" in record(path, recorded, change=False)
    other = [*recorded[:-1], [0, 1, 1, 1, 1]]
    for found in (other, recorded[:-1], [*recorded, [0, 0, 0, 0, 0]]):
        with pytest.raises(SystemExit, match="Numerics"):
            record(path, found, change=False)
        assert path.read_bytes() == RECORDED.read_bytes()
    record(path, other, change=True)
    assert read(path) == other


def test_the_words_are_splitmix64() -> None:
    """The words equal SplitMix64's published outputs, and an implementation in Python integers."""
    assert words(0, 0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    def word(case: int, stream: int, i: int) -> int:
        z = (case * 2**32 + stream * 2**24 + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert words(999, 7, 9).tolist() == [word(999, 7, i) for i in range(1, 10)]


def number(text: str) -> float:
    """Parse a number as the README writes it, such as "0.5" or "2^-10"."""
    base, _, exponent = text.partition("^")
    return float(base) ** int(exponent or 1)


def test_the_readme_has_these_tables() -> None:
    names = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    more = (SPECIALS, TEMPERATURES, TOP_KS, TOP_PS, MIN_PS, REPETITIONS)
    more += (FREQUENCIES, PRESENCES, AT_LEAST)
    tables = (VOCAB_SIZES, names, SHAPES, SCALES, *more, BIASES)
    lines = (GOLDEN / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "| w" in line]
    found = {cell[1]: tuple(cell[3].split(", ")) for cell in cells if cell[1] != "word"}
    for place, values in enumerate(tables, 1):
        listed = found[f"w{place}"]
        assert (listed if isinstance(values[0], str) else tuple(map(number, listed))) == values
    assert found["w15"] == found["w17"] == ("0", "2^32 - 1", "2^63", "2^64 - 1")
    assert len(found) == 21


def test_the_readme_has_this_example() -> None:
    """The README spells out one case, for implementations in other languages."""
    g = make(605)
    expected = [4.6640625, -1.484375, 2.6640625, 1.3671875, -4.390625, 5.21875, -3.265625]
    assert g.logits.tolist() == [expected]
    assert g.dtype == torch.float32
    assert g.params == SamplingParams(
        temperature=2,
        top_k=50,
        min_p=0.02,
        frequency_penalty=0.25,
        min_tokens_to_keep=100,
        logit_bias={7: -20.75},
        seed=2**32 - 1,
    )
    assert (len(g.prompt), g.prompt[:4]) == (22, [5, 5, 3, 1])
    assert (len(g.output), g.output[:4]) == (12, [0, 0, 6, 0])
    assert g.allowed_mask is None
    assert g.position == 0


def test_they_reach_everything(golden: list[Golden], recorded: Answers) -> None:
    """The cases use every value of every table and every status, and draw different tokens."""
    for name, values in (
        ("temperature", TEMPERATURES),
        ("top_k", TOP_KS),
        ("top_p", TOP_PS + tuple(top_p * 2.0**-24 for _, top_p in EDGES)),
        ("min_p", MIN_PS),
        ("repetition_penalty", REPETITIONS),
        ("frequency_penalty", FREQUENCIES),
        ("presence_penalty", PRESENCES),
        ("min_tokens_to_keep", AT_LEAST),
    ):
        assert {getattr(g.params, name) for g in golden} == set(values)
    assert {(g.vocab_size, g.dtype) for g in golden} == {
        (v, d) for v in VOCAB_SIZES for d in DTYPES
    }
    assert {(g.shape, g.special) for g in golden} >= {(s, "none") for s in SHAPES}
    assert {g.special for g in golden} == set(SPECIALS)
    assert {len(g.params.logit_bias or ()) for g in golden} >= {0, 1, 8}
    for extreme in EXTREMES:
        assert {extreme} <= {g.params.seed for g in golden} & {g.position for g in golden}
    assert {len(g.prompt) for g in golden} == {len(g.output) for g in golden} == set(range(64))
    assert any(g.allowed_mask is not None for g in golden)
    assert {answer[0] for answer in recorded} == {0, 1, 2, 3, 4, 5}
    assert len(recorded) == CASES
    assert sum(len(set(answer[1:])) > 1 for answer in recorded) > CASES / 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the reference's answers.")
    parser.add_argument("--change", action="store_true", help="overwrite other tokens")
    change = parser.parse_args().change
    found = answers_of("torch", [make(case) for case in range(CASES)])
    sys.stdout.write(record(RECORDED, [answer[: DRAWS + 1] for answer in found], change=change))


if __name__ == "__main__":
    main()
