"""Tests of the emulation: correct kernels give the right numbers, and wrong ones are caught.

tests/kernels/cuda_emulation/cuda_emulation.h says what the emulation detects and what it does not.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cuda_emulation"
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
BUILDS = {
    "plain": ["-O2"],
    "ucontext": ["-O2", "-DCUDA_EMULATION_UCONTEXT"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
SEEDS = (0, 1, 2)

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """A function that runs kernels in a new process and returns it, with the last one's output."""
    folder = tmp_path_factory.mktemp("cuda_emulation")
    programs = {}

    def run(build, kernel, seed):
        if build not in programs:
            program = folder / build
            source = ["-x", "c++", str(FOLDER / "kernels.cu"), "-o", str(program)]
            subprocess.run([GXX, *FLAGS, *BUILDS[build], *source], check=True)
            programs[build] = program
        command = [str(programs[build]), *kernel.split(), str(seed)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


def _signed(value):
    return (value + 2**63) % 2**64 - 2**63


def _warp_collectives():
    """What warp_collectives computes, one thread after another, for two blocks of 64 threads."""
    out = []
    for thread in range(64):
        first, lane = thread - thread % 32, thread % 32
        values = [(first + i) * 7 % 13 for i in range(32)]
        value = values[lane]
        folded = [
            sum(values[: lane + 1]),
            values[5],
            values[lane // 8 * 8 + 1],
            values[lane + 3] if lane + 3 < 32 else value,
            values[lane + 3] if lane % 16 + 3 < 16 else value,
            values[lane ^ 9] << 33,
            sum(1 << i for i, v in enumerate(values) if v % 3 == 0),
            (12 in values) * 2 + 1,
            sum(1 << i for i, v in enumerate(values) if v == value),
            sum(values),
            max(values),
            min(values) + 3,
            sum(1 << v for v in set(values)),
        ]
        if lane % 2 == 0:
            folded.append(sum(range(0, 32, 2)))
        result = 0
        for number in folded:
            result = result * 31 + number
        out.append(_signed(result))
    return out * 2


def _pipeline():
    numbers = [i * i % 97 for i in range(4 * 64 * 5)]
    return [
        sum(
            numbers[256 * tile + (4 * t + 20 + i) % 256] * (tile + 1)
            for tile in range(5)
            for i in range(4)
        )
        for t in range(64)
    ]


RIGHT = {
    "tree_sum": [1023 * 512] * 3,
    "warp_collectives": _warp_collectives(),
    "counts": [2016, 63, 9, 127, 1, 77, 22 * 4 + 2],
    "part_of_a_warp": [820, 62, 9, 127, 1, 77, 14 * 4 + 2],
    "ring": [
        1000 * (block // 4 * 4 + (block + 1) % 4) + 63 - t for block in range(8) for t in range(64)
    ],
    "pipeline": _pipeline(),
}
RIGHT["trapped ring"] = RIGHT["ring"]  # a failed launch, then a correct one


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("build", BUILDS)
def test_right_kernels(emulated, build, kernel, seed):
    done = emulated(build, kernel, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [int(word) for word in done.stdout.split()]
    expected = RIGHT[kernel]
    assert printed[: len(expected)] == expected
    assert not any(printed[len(expected) :])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("forgotten_copy", "exits with copies that it has not waited for"),
        ("divergent_barrier", "__syncthreads"),
        ("missing_lane", "deadlock: thread "),
        ("disagreeing_lanes", "while other lanes of its mask are at another collective"),
        ("lane_outside_its_mask", "__ballot_sync by a lane that is not in its mask"),
        ("trapped", "thread 9 of block (0, 0, 0): __trap"),
        ("half_a_cluster", "the grid is not a whole number of clusters"),
        ("early_look", "of a block that need not have started"),
    ],
)
@pytest.mark.parametrize("build", BUILDS)
def test_wrong_kernels_fail(emulated, build, kernel, reason, seed):
    done = emulated(build, kernel, seed)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("failed: ")
    assert reason in done.stdout


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "right"),
    [("missing_barrier", {64}), ("missing_wait", set(range(97))), ("uninitialised", {0})],
)
@pytest.mark.parametrize("build", BUILDS)
def test_what_is_not_waited_for_is_not_there(emulated, build, kernel, right, seed):
    """Each result is right or a large number, which is what uninitialised memory holds."""
    done = emulated(build, kernel, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not {int(word) for word in done.stdout.split()} - {0} <= right


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("past_the_end", "heap-buffer-overflow"),
        ("early_exit", "use-after-poison"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_wrong_accesses(emulated, kernel, report, seed):
    done = emulated("sanitized", kernel, seed)
    assert done.returncode != 0
    assert report in done.stderr


def test_a_seed_is_an_order(emulated):
    """A seed gives the same order of threads each time; other seeds give other orders."""
    runs = [emulated("plain", "missing_barrier", seed).stdout for seed in (0, 1, 2, 3, 4, 1)]
    assert runs[1] == runs[5]
    assert len(set(runs)) > 2


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_the_kernels_are_cuda(tmp_path):
    """The emulated functions have CUDA's names and arguments."""
    command = [NVCC, "-std=c++17", "-arch=sm_90", "-cubin", str(FOLDER / "kernels.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "kernels.cubin")], check=True)
