"""Runs the CPU kernel under ThreadSanitizer, with threads of its own and with OpenMP's.

The calls are those of cpp/threads_test.cpp. The kernel is compiled for one instruction set,
because the loader resolves functions with several versions before the sanitizer's runtime works.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", *EXACT, "-pthread", "-Wall", "-Wextra"]
#: The exit status of a process in which the sanitizer has found a race.
RACE_FOUND = 66

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

#: Bugs of the kernel's own threads: a file of csrc/cpu, the right code, the wrong code.
PLANTED = {
    "scratch memory that all threads share": (
        "sample.cpp",
        "static thread_local Workspace workspace;",
        "static Workspace workspace;",
    ),
    "results that are read without synchronisation": (
        "thread_pool.h",
        "job.working.fetch_sub(1, std::memory_order_release);",
        "job.working.fetch_sub(1, std::memory_order_relaxed);",
    ),
    "a place in a job that is taken without the lock": (
        "thread_pool.h",
        "--job.places;\n      job.working.fetch_add(1, std::memory_order_relaxed);\n"
        "      lock.unlock();",
        "job.working.fetch_add(1, std::memory_order_relaxed);\n"
        "      lock.unlock();\n      --job.places;",
    ),
}


def compiled(output: Path, *arguments: str | Path) -> Path:
    assert GXX is not None
    subprocess.run([GXX, *FLAGS, "-o", output, *arguments], check=True)
    return output


def kernel(folder: Path, sources: Path = ROOT / "csrc") -> Path:
    source = sources / "cpu/sample.cpp"
    return compiled(folder / "kernel.o", "-DLLM_SAMPLING_CLONES=", "-c", source)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that builds cpp/threads_test.cpp with options, linked with a kernel."""
    folder = tmp_path_factory.mktemp("thread_sanitizer")
    own = kernel(folder)

    def build(*options: str, linked_with: Path = own) -> Path:
        callers = ROOT / "tests/kernels/cpp/threads_test.cpp"
        # -rdynamic exports GOMP_parallel, so that the kernel's dlsym finds it.
        link = ["-rdynamic", linked_with, "-ldl"]
        return compiled(folder / "".join(["program", *options]), *options, callers, *link)

    return build


def run(program: Path) -> subprocess.CompletedProcess[str]:
    def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE_FOUND}"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, env=environment
        )

    done = start(program)
    # An old sanitizer does not work with the address randomisation of a new Linux.
    if "unexpected memory mapping" in done.stderr:
        done = start("/usr/bin/env", "setarch", "-R", program)
    return done


@pytest.mark.parametrize("options", [(), ("-DOPENMP",)], ids=["own threads", "OpenMP's"])
def test_the_kernel_has_no_race(program: Callable[..., Path], options: tuple[str, ...]) -> None:
    """Six callers at once, on up to five threads each, get the results of a call alone."""
    done = run(program(*options))
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr[:4000]


def test_callers_that_share_their_rows_are_found(program: Callable[..., Path]) -> None:
    """A negative control: callers must not share rows and state."""
    done = run(program("-DRACE"))
    assert done.returncode == RACE_FOUND
    assert "data race" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_race_is_found(program: Callable[..., Path], tmp_path: Path, bug: str) -> None:
    """Negative controls: a bug in a copy of the kernel."""
    name, right, wrong = PLANTED[bug]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc/cpu" / name
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    done = run(program(linked_with=kernel(tmp_path, tmp_path / "csrc")))
    assert done.returncode == RACE_FOUND, done.stdout
    assert "data race" in done.stderr
