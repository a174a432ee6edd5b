"""Many threads, forked processes, a million steps: is anything shared or kept that must not be?"""

from __future__ import annotations

import ctypes
import gc
import http.client
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import make_row, threads
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import llm_sampling
from llm_sampling import Sampler, SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.backends import cpu
from llm_sampling.generation import generate_stream

pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason="the CPU kernel is not built"
)

#: Above the 32,768 tokens from which on a second thread is used.
VOCAB_SIZE = 33_000
PARAMS = (
    SamplingParams(temperature=0.8, top_k=50, repetition_penalty=1.2, seed=1),
    SamplingParams(top_p=0.9, presence_penalty=0.5, seed=2),
    SamplingParams(min_p=0.05, frequency_penalty=0.3, seed=3),
)
#: Where a process finds the package and, for this file as a program, the modules of the tests.
PATHS_OF_MODULES = (Path(llm_sampling.__file__).parents[1], Path(__file__).parents[1])
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS_OF_MODULES))}

Tokens = list[list[int]]


def make_logits(rows: int) -> Tensor:
    return torch.stack([make_row("normal x3", VOCAB_SIZE, seed=row) for row in range(rows)])


def decode(
    number: int,
    logits: Tensor,
    steps: int = 30,
    history: TokenHistory | None = None,
    count: int = 1,
) -> Tokens:
    """The tokens of a decode loop of some rows, on so many threads; the number says which."""
    params = [
        SamplingParams(**{**vars(row), "seed": row.seed + 10 * number})
        for row in PARAMS[: len(logits)]
    ]
    sampler = Sampler(params, vocab_size=VOCAB_SIZE, history=history)
    with threads(count):
        return [sampler(logits).tokens.tolist() for _ in range(steps)]


# ---- threads -------------------------------------------------------------------------------------


def test_sixteen_threads_with_their_own_samplers() -> None:
    """Each gives what it gives alone, though they share the library, its threads and the logits."""
    rows = [make_logits(1 + number % 3) for number in range(3)]
    alone = [decode(number, rows[number % 3]) for number in range(16)]
    found: list[Tokens | None] = [None] * 16
    start = threading.Barrier(16)

    def work(number: int) -> None:
        start.wait()
        found[number] = decode(number, rows[number % 3], count=1 + number % 4)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    with threads(torch.get_num_threads()):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert found == alone


def test_a_history_that_is_shared_is_seen() -> None:
    """The control: where loops share as much as one history, the tokens tell."""
    logits = make_logits(3)
    alone = [decode(number, logits) for number in range(4)]
    history = TokenHistory.from_ids([[]] * 3, None, VOCAB_SIZE)
    shared = [decode(number, logits, history=history) for number in range(4)]
    assert shared[0] == alone[0]
    assert all(mine != theirs for mine, theirs in zip(shared[1:], alone[1:], strict=True))


def another_thread_runs(function: Callable[..., int], calls: int) -> Iterator[bool]:
    """For each call of the kernel, made by this function, whether Python ran meanwhile.

    Threads take no turns, since the interval is too long for that: another one runs only where this
    one lets the interpreter go, and that is looked at right before and right after the call.
    """
    ticks = 0
    done = False
    found: list[bool] = []

    def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += 1
            time.sleep(1e-4)  # lets the interpreter go, to whoever waits

    def watched(*args: object) -> int:
        before = ticks
        code = function(*args)
        found.append(ticks != before)
        return code

    logits = make_logits(3).repeat(4, 1)
    interval = sys.getswitchinterval()
    patch = pytest.MonkeyPatch()
    other = threading.Thread(target=tick)
    try:
        sys.setswitchinterval(1000)
        patch.setattr(cpu.LIBRARY, "_function", watched)
        other.start()
        for _ in range(calls):
            sample(logits, SamplingParams(top_p=0.9, seed=1), num_samples=50)
            yield found.pop()
    finally:
        done = True
        other.join()
        patch.undo()
        sys.setswitchinterval(interval)


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no such lock"
)
def test_other_threads_run_while_the_kernel_does() -> None:
    """The kernel is called without the interpreter's lock; the control calls it with the lock."""
    function = cpu.LIBRARY.load().llm_sampling_cpu
    held = ctypes.PyDLL(str(cpu.LIBRARY.path)).llm_sampling_cpu
    held.argtypes, held.restype = function.argtypes, function.restype
    # as many calls as a busy machine needs to give the other thread a core
    assert any(another_thread_runs(function, 5000))
    assert not any(another_thread_runs(held, 200))


# ---- processes -----------------------------------------------------------------------------------


class Drawn(Dataset[Tensor]):
    """A data set whose items are drawn by the kernel, in a worker, on threads of the kernel's own.

    Nothing else there may use threads: in a child after fork torch waits for ever for its own.
    """

    def __init__(self) -> None:
        self.logits = make_logits(2)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> Tensor:
        return torch.tensor(decode(number, self.logits, steps=3, count=3))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loader_whose_workers_sample(method: str) -> None:
    """Items are those of the parent, which has used torch's threads before."""
    drawn = Drawn()
    expected = torch.stack([drawn[number] for number in range(12)])
    context = multiprocessing.get_context(method)
    loader = DataLoader(drawn, 4, num_workers=2, multiprocessing_context=context, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_fork_in_the_middle_of_a_call() -> None:
    """Another thread is in the kernel, and has its threads, while the process forks."""
    program = """
import os, signal, threading, torch
from llm_sampling import SamplingParams, sample

torch.set_num_threads(3)
logits = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))

def draw():
    return sample(logits, SamplingParams(top_p=0.9, seed=1)).tokens.tolist()

mine = draw()
ends = threading.Event()
calls = 0

def work():
    global calls
    torch.set_num_threads(3)
    while not ends.is_set():
        assert draw() == mine
        calls += 1

other = threading.Thread(target=work)
other.start()
for _ in range(30):
    before = calls
    if (child := os.fork()) == 0:
        signal.alarm(60)  # ends it where it waits for ever
        os._exit(0 if draw() == mine else 1)
    assert os.waitpid(child, 0)[1] == 0
    while calls == before:
        pass
ends.set()
other.join()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


APPLICATION = """
import json, os, torch
from llm_sampling import SamplingParams, sample

torch.set_num_threads(3)
logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))

def draw():
    return sample(logits, SamplingParams(top_p=0.9, seed=5), num_samples=5).tokens.tolist()

torch.randn(64, 50_000).softmax(-1)  # OpenMP has its threads
parent, expected = os.getpid(), draw()

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    answer = {"forked": os.getpid() != parent, "same": draw() == expected}
    return [json.dumps(answer).encode()]
"""


def test_gunicorn_with_a_preloaded_application(tmp_path: Path) -> None:
    """Its workers are forked from a process that has used the kernel on all of its threads."""
    pytest.importorskip("gunicorn", reason="needs the extra 'dev'")
    (tmp_path / "application.py").write_text(APPLICATION)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
    # the system chooses the port, and the log tells which it is
    command += ["--bind", "127.0.0.1:0", "--timeout", "60", "application:application"]

    def get(port: int) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read()
        finally:
            connection.close()

    with log.open("wb") as file:
        server = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=ENVIRONMENT,
        )
    try:
        deadline = time.monotonic() + 120
        while (listens := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with ThreadPoolExecutor(4) as pool:
            answers = set(pool.map(get, [int(listens[1])] * 40))
        assert answers == {b'{"forked": true, "same": true}'}, log.read_text()
        server.terminate()
        assert server.wait(timeout=60) == 0, log.read_text()
    finally:
        # the workers too, whatever state they are in
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---- memory --------------------------------------------------------------------------------------

Work = Callable[[], object]


def make_sampler() -> Work:
    """A decode loop with histories, logprobs and a mask."""
    sampler = Sampler(PARAMS, vocab_size=64, logprobs="processed")
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.full((3, 2), -1, dtype=torch.int32)
    return lambda: sampler(logits, allowed_mask=mask)


def make_sampler_on_threads() -> Work:
    """A row that is split over three threads."""
    torch.set_num_threads(3)
    sampler = Sampler(PARAMS[1], vocab_size=VOCAB_SIZE)
    logits = make_logits(1)
    return lambda: sampler(logits)


def make_samples() -> Work:
    """Calls with a history that is built anew for each."""
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        history = TokenHistory.from_ids([[1, 2], [3]], [[4], [5, 5]], 100)
        sample(logits, PARAMS[:2], history=history, logprobs="raw")

    return call


def make_filters() -> Work:
    """Filtered logits without a draw."""
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    return lambda: filter_logits(logits, SamplingParams(top_p=0.9))


def make_refusals() -> Work:
    """Logits without a token, which raise."""
    logits = torch.full((2, 100), -torch.inf)

    def call() -> None:
        try:
            sample(logits, SamplingParams(seed=0))
        except llm_sampling.InvalidLogitsError:
            return
        raise AssertionError("it did not raise")

    return call


def make_server() -> Work:
    """Rows that come and go, in slots that are used again."""
    sampler = Sampler(PARAMS, vocab_size=100)
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))

    def serve() -> None:
        sampler.add(PARAMS[0], prompt_ids=(1, 2, 3))
        sampler(logits)
        sampler.remove([1])

    return serve


def make_generation() -> Work:
    """A token of generate_stream; there is a new text every hundred tokens."""
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def texts() -> Iterator[object]:
        while True:
            yield from generate_stream(
                lambda ids, cache: logits, [[1]], PARAMS[0], vocab_size=64, max_new_tokens=100
            )

    stream = texts()
    return lambda: next(stream)


def make_threads() -> Work:
    """Threads that come, sample and go: the kernel's memory is a thread's, and goes with it."""
    logits = make_logits(1)[:, :20_000]

    def call() -> None:
        worker = threading.Thread(target=sample, args=(logits, SamplingParams(top_p=0.9, seed=1)))
        worker.start()
        worker.join()

    return call


def make_keeper() -> Work:
    """The control: 8 bytes are kept at each call, the reference to an object."""
    kept: list[object] = []
    return lambda: kept.append(None)


def make_sampler_that_keeps() -> Work:
    """The control: a decode loop that keeps an object at each step."""
    step = make_sampler()
    kept: list[object] = []

    def call() -> None:
        step()
        kept.append([])

    return call


PATHS: dict[str, Callable[[], Work]] = {
    "sampler": make_sampler,
    "samples": make_samples,
    "filters": make_filters,
    "refusals": make_refusals,
    "server": make_server,
    "generation": make_generation,
    "threads": make_threads,
    "sampler on threads": make_sampler_on_threads,
}
CONTROLS: dict[str, Callable[[], Work]] = {
    "keeper": make_keeper,
    "sampler that keeps": make_sampler_that_keeps,
}


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
            *("fordblks", "keepcost"),
        )
    ]


@dataclass(frozen=True)
class Memory:
    """What a process has.

    Attributes:
        pages: bytes of it in memory, also those that are free for the next allocation.
        blocks: allocations of Python's that are in use.
        size: bytes of malloc's that are in use.
    """

    pages: int
    blocks: int
    size: int

    @staticmethod
    def now() -> Memory:
        gc.collect()
        malloc = ctypes.CDLL(None).mallinfo2
        malloc.restype = MallInfo
        info = malloc()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Memory(
            pages * os.sysconf("SC_PAGE_SIZE"),
            sys.getallocatedblocks(),
            info.uordblks + info.hblkhd,
        )


def grow(name: str, times: int) -> dict[str, int]:
    """By how much this process grows over so many calls, after an eighth of them."""
    work = (PATHS | CONTROLS)[name]()
    for _ in range(times // 8):
        work()
    before = Memory.now()
    for _ in itertools.repeat(None, times):
        work()
    after = Memory.now()
    return {what: size - vars(before)[what] for what, size in vars(after).items()}


def main(times: int, *names: str) -> None:
    pr_set_thp_disable = 41
    ctypes.CDLL(None).prctl(pr_set_thp_disable, 1, 0, 0, 0)  # pages count as they are used
    print(json.dumps({name: grow(name, times) for name in names}))  # noqa: T201


def growth(times: int, *names: str) -> dict[str, dict[str, int]]:
    """The same in a process of its own, which does one after the other."""
    done = subprocess.run(
        [sys.executable, __file__, str(times), *names],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2") or not Path("/proc/self/statm").exists(),
    reason="needs glibc 2.33 or newer, and /proc/self/statm",
)
FEW, MANY = 2048, 1_000_000


def keeps_something(grown: dict[str, int]) -> bool:
    """Whether an object or 8 bytes were kept at each of a few calls."""
    return grown["blocks"] > FEW // 8 or grown["size"] > 4 * FEW


@needs_glibc
def test_nothing_is_kept() -> None:
    """Not an allocation; each path is done in a process that has done those before it."""
    found = growth(FEW, *PATHS)
    assert {name: grown for name, grown in found.items() if keeps_something(grown)} == {}


@needs_glibc
def test_what_is_kept_is_seen() -> None:
    found = growth(FEW, *CONTROLS)
    assert {name: grown for name, grown in found.items() if not keeps_something(grown)} == {}
    assert growth(MANY, "keeper")["keeper"]["pages"] > 2**20


@needs_glibc
@pytest.mark.parametrize(
    "name", ["sampler", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PATHS][1:])]
)
def test_a_million_calls_take_no_more_memory(name: str) -> None:
    """A million steps of a decode loop; the rest by `pytest tests/release/test_load.py -m slow`."""
    assert growth(MANY, name)[name]["pages"] <= 2**20


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
