"""Does ThreadSanitizer find a race in the CPU kernel, with threads of its own and with OpenMP's?

tests/cpp/threads_test.cpp says who calls what. The sanitizer's runtime is not up yet when functions
with several versions are resolved, so the kernel is compiled for one instruction set.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GXX = shutil.which("g++")
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", *EXACT, "-pthread", "-Wall", "-Wextra"]
#: What the sanitizer ends a process with.
RACE_FOUND = 66

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

#: Bugs of the kernel's own threads: a file of csrc/cpu, what is there, what is there instead.
PLANTED = {
    "memory that all threads share": (
        "sample.cpp",
        "static thread_local Workspace workspace;",
        "static Workspace workspace;",
    ),
    "results that are read before they are known to be there": (
        "thread_pool.h",
        "job.working.fetch_sub(1, std::memory_order_release);",
        "job.working.fetch_sub(1, std::memory_order_relaxed);",
    ),
    "a place that is taken without the lock": (
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
    """A function: the callers, compiled with these options, with the kernel or another one."""
    folder = tmp_path_factory.mktemp("thread_sanitizer")
    own = kernel(folder)

    def build(*options: str, linked_with: Path = own) -> Path:
        callers = ROOT / "tests/cpp/threads_test.cpp"
        # a library that is loaded finds GOMP_parallel in a program that exports its functions
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
    if "unexpected memory mapping" in done.stderr:  # an old runtime under a new kernel
        done = start("/usr/bin/env", "setarch", "-R", program)
    return done


@pytest.mark.parametrize("options", [(), ("-DOPENMP",)], ids=["own threads", "OpenMP's"])
def test_the_kernel_has_no_race(program: Callable[..., Path], options: tuple[str, ...]) -> None:
    """Six callers at once, on up to five threads each; every result is that of a call alone."""
    done = run(program(*options))
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr[:4000]


def test_callers_that_share_their_rows_are_found(program: Callable[..., Path]) -> None:
    """A negative control: what each of them must not do is seen."""
    done = run(program("-DRACE"))
    assert done.returncode == RACE_FOUND
    assert "data race" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_race_is_found(program: Callable[..., Path], tmp_path: Path, bug: str) -> None:
    """Negative controls in a copy of the kernel."""
    name, old, new = PLANTED[bug]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc/cpu" / name
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    done = run(program(linked_with=kernel(tmp_path, tmp_path / "csrc")))
    assert done.returncode == RACE_FOUND, done.stdout
    assert "data race" in done.stderr
