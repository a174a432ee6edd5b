"""The fuzzer's corpus, run by AddressSanitizer and UBSan; tests/fuzz.sh makes more of it.

tests/cpp/fuzz_cpu.cpp holds every result of the CPU kernel against the steps done one by one. Here
it runs the inputs that the fuzzer kept, and three broken kernels show that it would say so.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORPUS = sorted((ROOT / "tests" / "cpp" / "corpus").iterdir())
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def replay(
    root: Path, out: Path, inputs: list[Path], *options: str
) -> subprocess.CompletedProcess[str]:
    """Builds the harness of a checkout, and runs it on the inputs."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("there is no g++")
    source = root / "tests" / "cpp" / "fuzz_cpu.cpp"
    build = [found, *FLAGS, "-DREPLAY", *options, str(source), "-ldl", "-o", str(out)]
    subprocess.run(build, check=True)
    return subprocess.run([out, *inputs], capture_output=True, text=True)


@pytest.mark.slow
def test_the_corpus(tmp_path: Path) -> None:
    """CI's minute of tests/fuzz.sh begins with it, under the same sanitizers."""
    done = replay(ROOT, tmp_path / "replay", CORPUS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{len(CORPUS)} inputs\n"
    assert len(CORPUS) > 100


BROKEN = {
    "a tie too few": ("tile.h", "(j <= last_equal)", "(j < last_equal)", "FAILED: "),
    "past the end of a list": (
        "sample.cpp",
        "ws_.candidate_id.at_least(row_.vocab_size)",
        "ws_.candidate_id.at_least(row_.vocab_size - 1)",
        "AddressSanitizer",
    ),
    "a count that overflows": (
        "sample.cpp",
        "count_up(args.position[row])",
        "++args.position[row]",
        "signed integer overflow",
    ),
}


@pytest.mark.parametrize(
    ("file", "good", "bad", "said"),
    [
        pytest.param(*how, id=name, marks=() if name == "a tie too few" else pytest.mark.slow)
        for name, how in BROKEN.items()
    ],
)
def test_a_broken_kernel_is_found(
    tmp_path: Path, file: str, good: str, bad: str, said: str
) -> None:
    """By the corpus, without any luck."""
    for folder in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("corpus"))
    path = tmp_path / "csrc" / "cpu" / file
    text = path.read_text()
    assert text.count(good) == 1
    path.write_text(text.replace(good, bad))
    done = replay(tmp_path, tmp_path / "replay", CORPUS, "-DLLM_SAMPLING_CLONES=")
    assert done.returncode != 0
    assert said in done.stderr
