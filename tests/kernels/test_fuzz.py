"""Replays the fuzzer's corpus with AddressSanitizer and UBSan; fuzz.sh makes more inputs.

cpp/fuzz_cpu.cpp compares every result of the CPU kernel with the steps done one by one, and every
history with its ids. Here it runs the inputs that the fuzzer kept. Kernels that are broken on
purpose must be found.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORPUS = sorted((ROOT / "tests" / "kernels" / "cpp" / "corpus").iterdir())
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# AddressSanitizer then also sees what lies between the size of a vector and its capacity.
FLAGS += ["-D_GLIBCXX_SANITIZE_VECTOR"]


def replay(
    root: Path, program: Path, inputs: list[Path], *options: str
) -> subprocess.CompletedProcess[str]:
    """Build the fuzz test of a checkout, and run it on the inputs."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("there is no g++")
    source = root / "tests" / "kernels" / "cpp" / "fuzz_cpu.cpp"
    build = [found, *FLAGS, "-DREPLAY", *options, str(source), "-ldl", "-o", str(program)]
    subprocess.run(build, check=True)
    return subprocess.run([program, *inputs], capture_output=True, text=True)


@pytest.mark.slow
def test_the_corpus(tmp_path: Path) -> None:
    """fuzz.sh, which CI runs, begins with the same inputs under the same sanitizers."""
    done = replay(ROOT, tmp_path / "replay", CORPUS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{len(CORPUS)} inputs\n"
    assert len(CORPUS) > 100


#: Bugs: a file of csrc/cpu, the right code, the wrong code, and what the program then prints.
BROKEN = {
    "a tie too few": ("tile.h", "(j <= last_equal)", "(j < last_equal)", "FAILED: "),
    "past the end of the candidates": (
        "sample.cpp",
        "ws_.candidate_id.at_least(row_.vocab_size)",
        "ws_.candidate_id.at_least(row_.vocab_size - 1)",
        "AddressSanitizer",
    ),
    "a count that overflows": (
        "sample.cpp",
        "add_to(*position_place(args, row, index), 1);",
        "++*position_place(args, row, index);",
        "signed integer overflow",
    ),
    "a text's length that is not limited": (
        "../history.h",
        "limited(read_once(*history.text_length), 0, history.max_text_length)",
        "read_once(*history.text_length)",
        "signed integer overflow",
    ),
    "an id of a text that is not limited": (
        "../history.h",
        "id >= 0 && id < history.vocab_size ? id : -1",
        "id",
        "AddressSanitizer",
    ),
    "a full text that is not looked for": (
        "sample.cpp",
        "if (is_text_full(args, row))",
        "if (false)",
        "FAILED: ",
    ),
    "an id that leaves the window but not its last place": (
        "history.h",
        "if (!is_new && !any_left)",
        "if (!is_new)",
        "FAILED: the state after",
    ),
    "ids for one call that move no window": (
        "history.h",
        "window_of(history, length + valid)",
        "window_of(history, length)",
        "FAILED: ",
    ),
    "matches that begin before the window": (
        "sequence_rules.h",
        "std::min<int64_t>(matches[i], of_ngrams - i) >= ngram - 1",
        "matches[i] >= ngram - 1",
        "FAILED: ",
    ),
    "matches that go across a breaker": (
        "sequence_rules.h",
        "std::min({int64_t{matches[i]}, size - i, most})",
        "std::min({int64_t{matches[i]}, size - i, allowed + kMaxExcess})",
        "FAILED: ",
    ),
    "a rank that is off by one": (
        "sample.cpp",
        "int32_t before = 1;",
        "int32_t before = 0;",
        "FAILED: rank",
    ),
    "a list whose equal logits are in no order": (
        "sample.cpp",
        "std::greater<uint64_t>()",
        "[](uint64_t a, uint64_t b) { return a >> 32 > b >> 32; }",
        "FAILED: ",
    ),
    "a list of tokens that are not kept": (
        "sample.cpp",
        "size += threshold_.keeps(candidates_.x[i], id);",
        "++size;",
        "FAILED: an id of the list",
    ),
    "logprobs of raw logits at the row's temperature": (
        "sample.cpp",
        "  row.scale = depth_scale(1.0f);\n",
        "",
        "FAILED: logprob",
    ),
    "a bit of the mask past the vocabulary": (
        "passes.h",
        "kept[j] = is_kept(threshold, tile * kTile, y[j], j);",
        "kept[j] = tile * kTile + j >= row.vocab_size || "
        "is_kept(threshold, tile * kTile, y[j], j);",
        "FAILED: the mask",
    ),
    "kept ids of which there are too many": (
        "sample.cpp",
        "count <= out.max_ids ? list_first(count) : 0",
        "true ? list_first(std::min(count, out.max_ids)) : 0",
        "FAILED: a kept id",
    ),
    "the ends of the kept set in each other's place": (
        "results.h",
        "      advanced(kept.first_id, row),\n      advanced(kept.first_logit, row),\n"
        "      advanced(kept.last_id, row),\n      advanced(kept.last_logit, row),\n",
        "      advanced(kept.last_id, row),\n      advanced(kept.last_logit, row),\n"
        "      advanced(kept.first_id, row),\n      advanced(kept.first_logit, row),\n",
        "FAILED: the ",
    ),
    "the logit of an end that is asked for without its id": (
        "results.h",
        "kept.first_id != nullptr || kept.first_logit != nullptr ||",
        "kept.first_id != nullptr ||",
        "FAILED: the first kept logit",
    ),
    "an update of a slot that does not exist": (
        "history.h",
        "if (slot >= 0 && slot < update.num_slots)",
        "if (slot >= 0 && slot <= update.num_slots)",
        "AddressSanitizer",
    ),
}


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        pytest.param(*bug, id=name, marks=() if name == "a tie too few" else pytest.mark.slow)
        for name, bug in BROKEN.items()
    ],
)
def test_a_broken_kernel_is_found(
    tmp_path: Path, file: str, right: str, wrong: str, message: str
) -> None:
    """The corpus alone finds it, without new inputs."""
    for folder in ("csrc", "tests/kernels/cpp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("corpus"))
    path = tmp_path / "csrc" / "cpu" / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    done = replay(tmp_path, tmp_path / "replay", CORPUS, "-DLLM_SAMPLING_CLONES=")
    assert done.returncode != 0
    assert message in done.stderr
