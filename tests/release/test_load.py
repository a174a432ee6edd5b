"""Tests with many threads, forked processes and a million calls.

They show that threads and processes do not disturb each other, and that no memory leaks.
"""

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
from dataclasses import dataclass, replace
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

#: Larger than the 32,768 tokens from which the kernel uses a second thread for a row.
VOCAB_SIZE = 33_000
PARAMS = (
    SamplingParams(temperature=0.8, top_k=50, repetition_penalty=1.2, seed=1),
    SamplingParams(top_p=0.9, presence_penalty=0.5, seed=2),
    SamplingParams(min_p=0.05, frequency_penalty=0.3, seed=3),
)
#: Where a new process finds the package and, if it runs this file, the modules of the tests.
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
    """Return the tokens of a decode loop on ``count`` threads; ``number`` selects the seeds."""
    params = [replace(row, seed=row.seed + 10 * number) for row in PARAMS[: len(logits)]]
    sampler = Sampler(params, vocab_size=VOCAB_SIZE, history=history)
    with threads(count):
        return [sampler(logits).tokens.tolist() for _ in range(steps)]


# ---- threads -------------------------------------------------------------------------------------


def test_sixteen_threads_with_their_own_samplers() -> None:
    """Each thread draws what it draws alone.

    The threads share the library, the library's threads, and the logits.
    """
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
    """The negative control: loops that share a history draw other tokens than alone."""
    logits = make_logits(3)
    alone = [decode(number, logits) for number in range(4)]
    history = TokenHistory.from_ids([[]] * 3, None, VOCAB_SIZE)
    shared = [decode(number, logits, history=history) for number in range(4)]
    assert shared[0] == alone[0]
    assert all(mine != theirs for mine, theirs in zip(shared[1:], alone[1:], strict=True))


def another_thread_runs(function: Callable[..., int], calls: int) -> Iterator[bool]:
    """Yield for each call of the kernel whether another Python thread ran during it.

    The switch interval is so long that the interpreter never switches threads by itself. So the
    other thread runs only while this one has released the interpreter's lock. It counts, and the
    counter is compared right before and right after the kernel's call.
    """
    ticks = 0
    done = False
    found: list[bool] = []

    def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += 1
            time.sleep(1e-4)  # releases the interpreter's lock

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
    """The kernel is called without the interpreter's lock.

    The negative control calls it with the lock held, and no other thread may run.
    """
    function = cpu.LIBRARY.load().llm_sampling_cpu
    held = ctypes.PyDLL(str(cpu.LIBRARY.path)).llm_sampling_cpu
    held.argtypes, held.restype = function.argtypes, function.restype
    # On a busy machine it may take many calls until the other thread gets a core.
    assert any(another_thread_runs(function, 5000))
    assert not any(another_thread_runs(held, 200))


# ---- processes -----------------------------------------------------------------------------------


class Drawn(Dataset[Tensor]):
    """A data set whose items the kernel draws in a worker process, on its own threads.

    Nothing else in a worker may use threads: in a forked child, torch waits for ever for threads
    that only the parent has.
    """

    def __init__(self) -> None:
        self.logits = make_logits(2)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> Tensor:
        return torch.tensor(decode(number, self.logits, steps=3, count=3))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loader_whose_workers_sample(method: str) -> None:
    """Workers draw the same items as their parent, which used torch's threads before the fork."""
    drawn = Drawn()
    expected = torch.stack([drawn[number] for number in range(12)])
    context = multiprocessing.get_context(method)
    loader = DataLoader(drawn, 4, num_workers=2, multiprocessing_context=context, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_fork_in_the_middle_of_a_call() -> None:
    """A forked child can sample although another thread was in the kernel during the fork."""
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
    """gunicorn forks its workers from a process that has used the kernel's threads."""
    pytest.importorskip("gunicorn", reason="needs the extra 'dev'")
    (tmp_path / "application.py").write_text(APPLICATION)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
    # The system chooses a free port, and the log names it.
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
        # Kill the whole process group, so that no worker outlives the test.
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---- memory --------------------------------------------------------------------------------------

Work = Callable[[], object]
#: How many calls are watched for a leak.
FEW, MANY = 2048, 1_000_000


def make_sampler() -> Work:
    """Return a step of a decode loop with histories, logprobs and a mask."""
    sampler = Sampler(PARAMS, vocab_size=64, logprobs="processed")
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.full((3, 2), -1, dtype=torch.int32)
    return lambda: sampler(logits, allowed_mask=mask)


def make_sampler_on_threads() -> Work:
    """Return a step of a decode loop whose row is split over three threads."""
    torch.set_num_threads(3)
    sampler = Sampler(PARAMS[1], vocab_size=VOCAB_SIZE)
    logits = make_logits(1)
    return lambda: sampler(logits)


def make_samples() -> Work:
    """Return a call of ``sample`` that builds a new history."""
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        history = TokenHistory.from_ids([[1, 2], [3]], [[4], [5, 5]], 100)
        sample(logits, PARAMS[:2], history=history, logprobs="raw")

    return call


def make_filters() -> Work:
    """Return a call of ``filter_logits``, which draws no token."""
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    return lambda: filter_logits(logits, SamplingParams(top_p=0.9))


def make_refusals() -> Work:
    """Return a call that raises, because no token of the logits can be drawn."""
    logits = torch.full((2, 100), -torch.inf)

    def call() -> None:
        try:
            sample(logits, SamplingParams(seed=0))
        except llm_sampling.InvalidLogitsError:
            return
        raise AssertionError("it did not raise")

    return call


def make_server() -> Work:
    """Return a step in which a row is added and another removed, so that slots are reused."""
    sampler = Sampler(PARAMS, vocab_size=100)
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))

    def serve() -> None:
        sampler.add(PARAMS[0], prompt_ids=(1, 2, 3))
        sampler(logits)
        sampler.remove([1])

    return serve


def make_generation() -> Work:
    """Return a call that generates one token; a new text begins every hundred tokens."""
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def texts() -> Iterator[object]:
        while True:
            yield from generate_stream(
                lambda ids, cache: logits, [[1]], PARAMS[0], vocab_size=64, max_new_tokens=100
            )

    stream = texts()
    return lambda: next(stream)


def make_threads() -> Work:
    """Return a call that samples in a new thread.

    The kernel's working memory belongs to the thread and must be freed when the thread ends.
    """
    logits = make_logits(1)[:, :20_000]

    def call() -> None:
        worker = threading.Thread(target=sample, args=(logits, SamplingParams(top_p=0.9, seed=1)))
        worker.start()
        worker.join()
        # A thread frees its working memory after join() has returned.
        while Path(f"/proc/self/task/{worker.native_id}").exists():
            time.sleep(0)

    return call


def make_keeper() -> Work:
    """Return the call of a negative control: it leaks 8 bytes, a reference to an object."""
    kept: list[object] = []
    return lambda: kept.append(None)


def make_sampler_that_keeps() -> Work:
    """Return the call of a negative control: a step of a decode loop that leaks an object."""
    step = make_sampler()
    kept: list[object] = []

    def call() -> None:
        step()
        kept.append([])

    return call


def make_filler() -> Work:
    """Return a call that keeps an object each of the first 2 * FEW times, as a cache that fills."""
    kept: list[object] = []

    def call() -> None:
        if len(kept) < 2 * FEW:
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
FILLERS: dict[str, Callable[[], Work]] = {"filler": make_filler}


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
    """The memory of a process.

    Attributes:
        pages: the resident bytes, including memory that is free for the next allocation.
        blocks: the number of memory blocks that Python's allocator has in use.
        size: the bytes that malloc has in use.
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


def keeps_something(grown: dict[str, int], times: int) -> bool:
    """Return whether ``times`` calls leaked about one object or 8 bytes each.

    The limits are an eighth of that many objects and half of that many bytes.
    """
    return grown["blocks"] > times // 8 or grown["size"] > 4 * times


def grow(name: str, times: int) -> dict[str, int]:
    """Return by how much this process grows over ``times`` calls, after warm-up calls.

    What leaks grows however often the calls are repeated. Tensors alone, with nothing of ours, take
    up to a few hundred blocks more over the first thousands of calls, and then no more: where
    something seems to be kept, the calls are repeated, at most three times.
    """
    work = (PATHS | CONTROLS | FILLERS)[name]()
    for _ in range(times // 8):
        work()
    for _ in range(4):
        before = Memory.now()
        for _ in itertools.repeat(None, times):
            work()
        after = Memory.now()
        grown = {what: size - vars(before)[what] for what, size in vars(after).items()}
        if not keeps_something(grown, times):
            break
    return grown


def main(times: int, *names: str) -> None:
    pr_set_thp_disable = 41
    # Without huge pages, resident memory grows in steps of 4 KiB rather than of 2 MiB.
    ctypes.CDLL(None).prctl(pr_set_thp_disable, 1, 0, 0, 0)
    print(json.dumps({name: grow(name, times) for name in names}))  # noqa: T201


def growth(times: int, *names: str) -> dict[str, dict[str, int]]:
    """Return what ``grow`` measures for each name, one after the other, in a new process."""
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


@needs_glibc
def test_nothing_is_kept() -> None:
    """No path through the package leaks an allocation; one process runs them one by one."""
    found = growth(FEW, *PATHS)
    assert {name: grown for name, grown in found.items() if keeps_something(grown, FEW)} == {}


@needs_glibc
def test_what_is_kept_is_seen() -> None:
    found = growth(FEW, *CONTROLS)
    assert {name: grown for name, grown in found.items() if not keeps_something(grown, FEW)} == {}
    assert growth(MANY, "keeper")["keeper"]["pages"] > 2**20


@needs_glibc
def test_what_fills_and_then_stays_is_not_called_a_leak() -> None:
    assert not keeps_something(growth(FEW, *FILLERS)["filler"], FEW)


@needs_glibc
@pytest.mark.parametrize(
    "name", ["sampler", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PATHS][1:])]
)
def test_a_million_calls_take_no_more_memory(name: str) -> None:
    """The process's memory grows by at most 1 MiB over a million calls.

    By default only the decode loop is tested; `pytest tests/release/test_load.py -m slow` tests
    the other paths.
    """
    assert growth(MANY, name)[name]["pages"] <= 2**20


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
