"""The threads that the CPU kernel uses: torch's, or its own, also in a child process after fork."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm_sampling
from llm_sampling.backends import cpu

pytestmark = [
    pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc/self/task"),
]

START = """
import os
import torch
from llm_sampling import SamplingParams, sample

torch.set_num_threads(3)
logits = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))


def draw(logits=logits, **params):
    params = SamplingParams(**params or {"top_p": 0.9}, seed=1)
    return sample(logits, params, backend="cpu").tokens.tolist()


def threads():
    return len(os.listdir("/proc/self/task"))


def use_openmp():
    torch.randn(64, 50_000).softmax(-1)


def in_child(work):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, repr(work()).encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    return eval(os.read(read, 1000))

"""


def run(program: str) -> None:
    """Run START, then the program, in a process; TimeoutExpired if it hangs."""
    path = str(Path(llm_sampling.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_torch_s_threads_are_used():
    """The kernel starts no thread beside torch's, and ends none of them."""
    run(
        """
use_openmp()
before = threads()
assert before >= 3
for rows in 1, 2, 16:
    draw(logits.repeat(rows, 1))
    assert threads() == before
use_openmp()
assert threads() == before
"""
    )


def test_small_work_is_done_alone():
    """Fewer than 32,768 tokens use one thread.

    It is seen in a child process, where the kernel starts threads of its own.
    """
    run(
        """
def started(logits):
    before = threads()
    draw(logits)
    return threads() - before

assert in_child(lambda: started(logits[:, :32_767])) == 0
assert in_child(lambda: started(logits[:, :32_768])) == 2
assert in_child(lambda: started(logits[:, :4095].repeat(8, 1))) == 0
assert in_child(lambda: started(logits[:, :4096].repeat(8, 1))) == 2
"""
    )


def test_a_child_after_use():
    """A child can sample, where OpenMP would wait for ever; so can a child of a child."""
    run(
        """
use_openmp()
mine = draw()
assert in_child(draw) == mine
assert in_child(lambda: [draw(), in_child(draw)]) == [mine, mine]
assert draw() == mine
"""
    )


def test_a_child_that_is_the_first_to_sample():
    """The library is loaded after the fork, so its own fork handler has not run."""
    run(
        """
use_openmp()
theirs = in_child(draw)
assert draw() == theirs
"""
    )


def test_workers_that_flush_subnormals():
    """Workers inherit a mode that flushes subnormals; the kernel does not compute in it."""
    run(
        """
if torch.set_flush_denormal(True):
    use_openmp()
    for token in range(0, 100_000, 9_999):
        logits = torch.zeros(1, 100_000)
        logits.view(torch.int32)[0, token] = 1  # the smallest positive float
        assert draw(logits, temperature=0) == [token]
"""
    )
