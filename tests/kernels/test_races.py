"""Calls the CPU kernel while another thread overwrites the memory that the kernel reads.

No caller should do that. A race may change a token, but the kernel must not leave its memory, run
for ever or return a token that the row does not have: AddressSanitizer and UBSan watch it in
cpp/races_test.cpp, and a program that does not end is a failure. ThreadSanitizer then shows that
the race on the logits is the only one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS = ["-std=c++17", "-O1", "-g", *EXACT, "-pthread", "-DLLM_SAMPLING_CLONES="]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# AddressSanitizer then also sees what lies between the size of a vector and its capacity.
MEMORY += ["-D_GLIBCXX_SANITIZE_VECTOR"]
#: The race that ThreadSanitizer must not report, by the functions that write and read the logits.
#: load_tile, with or without the mask, is the only reader where logits are bfloat16. float32 logits
#: are read in place, in functions that also use memory of the kernel's own, whose races must not be
#: hidden.
SUPPRESSED = "race:overwrite_logits\nrace:load_tile\n"
#: The exit status of a process in which ThreadSanitizer has found a race.
RACE_FOUND = 66
SECONDS, MANY_SECONDS = 3, 60
#: Parameters, sizes, dtypes and threads of the program; of those ThreadSanitizer, which is slow,
#: runs every 7th, which has no common factor with the numbers of each.
COMBINATIONS, ONE_IN = 22 * 4 * 2 * 2, 7

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

Run = subprocess.CompletedProcess[str]


def build(folder: Path, *options: str, sources: Path = ROOT / "csrc") -> Path:
    assert GXX is not None
    program = folder / "races"
    files = [ROOT / "tests/kernels/cpp/races_test.cpp", sources / "cpu/sample.cpp"]
    subprocess.run([GXX, *FLAGS, *options, "-o", program, *files, "-ldl"], check=True)
    return program


def run(
    program: Path, mode: str, seconds: float, seed: int = 1, one_in: int = 1, tsan: str = ""
) -> Run:
    """Run the program; TimeoutExpired if it does not end."""

    def start(*command: str | Path) -> Run:
        return subprocess.run(
            [*command, program, mode, str(seconds), str(seed), str(one_in)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300 + 20 * seconds,
            env={"TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE_FOUND} {tsan}"},
        )

    done = start()
    # An old sanitizer does not work with the address randomisation of a new Linux.
    if "unexpected memory mapping" in done.stderr:
        done = start("/usr/bin/env", "setarch", "-R")
    return done


def assert_all_is_well(done: Run, calls: int = COMBINATIONS) -> None:
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert int(re.fullmatch(r"(\d+) calls\n", done.stdout)[1]) >= calls
    assert done.stderr == ""


@pytest.fixture(scope="module")
def with_address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("races"), *MEMORY)


@pytest.fixture(scope="module")
def with_thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A function that runs the program under ThreadSanitizer, with or without the suppression."""
    folder = tmp_path_factory.mktemp("races_tsan")
    program = build(folder, "-fsanitize=thread")
    (folder / "suppressions").write_text(SUPPRESSED)

    def start(seconds: float, *, suppressed: bool = True, program: Path = program) -> Run:
        options = f"print_suppressions=0 suppressions={folder / 'suppressions'}"
        tsan = options if suppressed else ""
        return run(program, "few", seconds, one_in=ONE_IN, tsan=tsan)

    return start


@pytest.mark.parametrize("mode", ["logits", "all", "results"])
def test_memory_that_changes_during_a_call(with_address_sanitizer: Path, mode: str) -> None:
    """The mode all also overwrites mask, history, texts, biases, slots, parameters and ids.

    The mode results overwrites tokens and status while they are written.
    """
    assert_all_is_well(run(with_address_sanitizer, mode, SECONDS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("mode", ["logits", "all", "results"])
def test_memory_that_changes_during_many_calls(
    with_address_sanitizer: Path, mode: str, seed: int
) -> None:
    assert_all_is_well(run(with_address_sanitizer, mode, MANY_SECONDS, seed))


def test_the_race_on_the_logits_is_the_only_one(with_thread_sanitizer: Callable[..., Run]) -> None:
    assert_all_is_well(with_thread_sanitizer(SECONDS), COMBINATIONS // ONE_IN // 2)


def test_the_race_on_the_logits_is_there(with_thread_sanitizer: Callable[..., Run]) -> None:
    """A negative control of the test above: without the suppression the race is reported."""
    done = with_thread_sanitizer(SECONDS, suppressed=False)
    assert done.returncode == RACE_FOUND, done.stdout
    assert "overwrite_logits" in done.stderr


@pytest.mark.slow
def test_another_race_is_reported(
    with_thread_sanitizer: Callable[..., Run], tmp_path: Path
) -> None:
    """A negative control: the suppression does not hide scratch memory that threads share."""
    right = "static thread_local Workspace workspace;"
    sources = broken(tmp_path, "cpu/sample.cpp", right, "static Workspace workspace;")
    program = build(tmp_path, "-fsanitize=thread", sources=sources)
    done = with_thread_sanitizer(MANY_SECONDS, program=program)
    assert done.returncode == RACE_FOUND, done.stdout
    assert "data race" in done.stderr


def broken(folder: Path, file: str, *changes: str) -> Path:
    """Return a copy of csrc with a file in which each right place became the wrong one after it."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / file).read_text()
    for right, wrong in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (sources / file).write_text(text)
    return sources


#: Guards that are taken away: the mode that finds it, a file of csrc, the guard, what replaces it;
#: then other places of that file in the same way.
GUARDS = {
    "a target that the candidates have": (
        "logits",
        "cpu/sample.cpp",
        "target = std::min(target, weigh_candidates());",
        "weigh_candidates();",
    ),
    "a target without mass": (
        "logits",
        "cpu/sample.cpp",
        "  if (target < 1) return {UINT32_MAX, 0};\n",
        "",
    ),
    "no candidates": ("logits", "cpu/sample.cpp", "  if (mass_ == 0) return;\n", ""),
    "a kept set without mass": (
        "logits",
        "cpu/sample.cpp",
        "    if (mass_ == 0) keep_nothing();\n",
        "",
    ),
    "the end of a tile": (
        "logits",
        "cpu/sample.cpp",
        "tile_w[kTile] = 0x1p62f;",
        "tile_w[kTile] = 0.0f;",
    ),
    "a tile with less mass": (
        "logits",
        "cpu/sample.cpp",
        "      if (j == kTile) return draw_nothing();\n",
        "",
    ),
    "a depth that is negative": (
        "all",
        "cpu/passes.h",
        "at_most > 0.0f ? at_most : 0.0f",
        "at_most",
    ),
    "a slot in range": (
        "all",
        "rows.h",
        "limited(read_once(args.slots[row]), 0, args.num_slots - 1)",
        "args.slots[row]",
    ),
    "a slot of parameters in range": (
        "all",
        "rows.h",
        "slot >= kPadding && slot < args.num_param_slots ? slot : kNoSuchSlot",
        "slot",
    ),
    "the end of the biases in range": (
        "all",
        "rows.h",
        "limited(limited(end, entries.begin, size) - entries.begin, 0, INT32_MAX)",
        "end - entries.begin",
    ),
    "bias offsets in range": (
        "all",
        "rows.h",
        "limited(read_once(args.logit_bias_offsets[index]), 0, size)",
        "args.logit_bias_offsets[index]",
    ),
    "the length of a text in range": (
        "all",
        "history.h",
        "limited(read_once(*history.text_length), 0, history.max_text_length)",
        "*history.text_length",
    ),
    "a text that has become full": (
        "all",
        "cpu/history.h",
        "    if (length == history.max_text_length) return;",
        "    if (length < 0) return;",
    ),
    "an id of a text in range": (
        "all",
        "history.h",
        "id >= 0 && id < history.vocab_size ? id : -1",
        "id",
    ),
    "a record that ends in its row": (
        "all",
        "sequence_rules.h",
        "limited(read_once(at[1]), 0, end - at - 2)",
        "read_once(at[1])",
    ),
    "an id for one call in range": (
        "all",
        "cpu/history.h",
        "if (id >= 0 && id < history.vocab_size) next[valid++] = id;",
        "next[valid++] = id;",
    ),
    "a token of which the rank is looked for": (
        "results",
        "cpu/sample.cpp",
        "  if (id < 0 || id >= row_.vocab_size) return false;\n",
        "",
    ),
    "a first token that is no longer there": (
        "logits",
        "cpu/sample.cpp",
        "const bool is_found = first < size;",
        "const bool is_found = true;",
    ),
    "a window that is read once": (
        "all",
        "history.h",
        "  int64_t window;  ",
        "  const int32_t* place;\n  int64_t window;  ",
        "history.window = read_once(args.windows[slot]);",
        "history.window = read_once(*(history.place = args.windows + slot));",
        "  const bool is_all = history.window < 0 || history.window > length;\n"
        "  return {is_all ? 0 : length - history.window, length};",
        "  int64_t window = history.window;\n"
        "  const bool is_later = history.place != nullptr && length > text_length(history);\n"
        "  if (is_later) window = read_once(*history.place);\n"
        "  return {window < 0 || window > length ? 0 : length - window, length};",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_missing_is_found(tmp_path: Path, guard: str) -> None:
    """Negative controls: a copy of the kernel without one of its guards."""
    mode, *change = GUARDS[guard]
    program = build(tmp_path, *MEMORY, sources=broken(tmp_path, *change))
    done = run(program, mode, MANY_SECONDS)
    assert done.returncode == 1
    assert re.search("AddressSanitizer|runtime error|FAILED: ", done.stdout + done.stderr)
