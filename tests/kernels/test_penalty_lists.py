"""The linear maker of lists (step 5a) against the specification, which compares every place.

A C++ program makes the lists of random texts. Its sanitizers see reads and writes outside of them.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sequence_lists import Case, corner_rows, expected, packed, random_case

from llm_sampling.sequence_rules import SequenceRules

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
VOCAB_SIZES = (1, 2, 3, 5, 40)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("lists"), ROOT / "csrc")


def build(folder: Path, sources: Path) -> Path:
    """Build the program with kernel sources from a folder."""
    if GXX is None:
        pytest.fail("there is no g++")
    shutil.copytree(sources, folder / "csrc")
    (folder / "tests/kernels/cpp").mkdir(parents=True)
    source = folder / "tests/kernels/cpp/test.cpp"
    shutil.copy(ROOT / "tests/kernels/cpp/penalty_lists_test.cpp", source)
    subprocess.run([GXX, *FLAGS, *MEMORY, "-o", folder / "program", source], check=True)
    return folder / "program"


def lists_of(
    program: Path, cases: Sequence[Case], slices: Sequence[tuple[int, int]] | None = None
) -> list[dict[int, float]]:
    """What the program makes of each case: rules, text, extra ids, output length, vocab_size.

    ``slices`` has the first id and the number of logits of each; None: all of the vocabulary.
    """
    data = bytearray()
    for i, (rules, text, extra, output_length, vocab_size) in enumerate(cases):
        sequences = packed(rules)
        sizes = len(text), len(extra), len(sequences)
        logits = (0, vocab_size) if slices is None else slices[i]
        data += struct.pack("<2i2f10i", vocab_size, output_length, *numbers(rules), *sizes, *logits)
        data += struct.pack(f"<{len(text + extra + sequences)}i", *text, *extra, *sequences)
    done = subprocess.run([program], input=bytes(data), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    found, at = [], 0
    for _ in cases:
        (size,) = struct.unpack_from("<i", done.stdout, at)
        ids = struct.unpack_from(f"<{size}i", done.stdout, at + 4)
        amounts = struct.unpack_from(f"<{size}f", done.stdout, at + 4 + 4 * size)
        at += 4 + 8 * size
        assert list(ids) == sorted(set(ids))
        found.append(dict(zip(ids, amounts, strict=True)))
    assert at == len(done.stdout)
    return found


def numbers(rules: SequenceRules) -> tuple[float, ...]:
    return (
        rules.dry_multiplier,
        rules.dry_base,
        rules.dry_allowed_length,
        rules.dry_penalty_last_n,
        rules.no_repeat_ngram_size,
        rules.no_repeat_ngram_window,
        rules.min_tokens,
    )


def assert_equal(program: Path, cases: Sequence[Case]) -> None:
    for case, found in zip(cases, lists_of(program, cases), strict=True):
        assert found == expected(case), case


@pytest.mark.parametrize("seed", range(100))
def test_random_texts(program: Path, seed: int) -> None:
    draw = random.Random(seed)
    cases = [random_case(draw, draw.choice(VOCAB_SIZES)) for _ in range(1000)]
    assert_equal(program, cases)
    assert sum(bool(expected(case)) for case in cases) > 500


@pytest.mark.parametrize("seed", range(10))
def test_slices_of_a_vocabulary(program: Path, seed: int) -> None:
    """The list of a slice has the ids of the whole list that are in it, as places of its logits."""
    draw = random.Random(seed)
    cases = [random_case(draw, draw.choice(VOCAB_SIZES)) for _ in range(500)]
    slices = []
    for *_, vocab_size in cases:
        first = draw.randrange(vocab_size)
        slices.append((first, draw.randint(1, vocab_size - first)))
    some = 0
    for case, (first, size), found in zip(
        cases, slices, lists_of(program, cases, slices), strict=True
    ):
        whole = expected(case)
        here = {id_ - first: v for id_, v in whole.items() if first <= id_ < first + size}
        assert found == here, case
        some += 0 < len(here) < len(whole)
    assert some > 50


def test_corner_rows(program: Path) -> None:
    assert_equal(program, corner_rows())


def test_long_matches(program: Path) -> None:
    """Amounts grow with the match, up to 255 tokens more than allowed and up to 2^100."""
    amounts = {}
    for base in (1.0, 1.1, 1.75):
        for more in (0, 1, 254, 255, 256, 400):
            same = list(range(1, 3 + more))
            case = (SequenceRules(0.8, base), [*same, 9000, 0, *same], [], 0, 10000)
            assert_equal(program, [case])
            ((id_, amounts[base, more]),) = expected(case).items()
            assert id_ == 9000
    assert amounts[1.0, 400] == amounts[1.0, 0] == pytest.approx(0.8)
    assert amounts[1.1, 255] == amounts[1.1, 256] == amounts[1.1, 400] > amounts[1.1, 254]
    assert amounts[1.75, 254] == amounts[1.75, 400] == 2.0**100


def test_what_one_row_lists_is_not_in_the_next(program: Path) -> None:
    banned = SequenceRules(bad_words=[[3]], dry_multiplier=1.0)
    cases: list[Case] = [
        (banned, [1, 2, 1, 2, 1], [], 0, 50),
        (SequenceRules(), [1, 2, 1, 2, 1], [], 0, 9),
        (replace(banned, bad_words=()), [4, 4, 4, 4], [], 0, 2000),
        (banned, [1, 2, 1, 2, 1], [], 0, 50),
    ]
    assert_equal(program, cases)
    assert [len(expected(case)) for case in cases] == [2, 0, 1, 2]


@pytest.mark.parametrize(
    "words", [[2], [2, 5, 1], [0, -3, 1], [-1, 2**31 - 1, 1], [1, 2], [3, 2, 1]]
)
def test_records_that_another_thread_has_overwritten(program: Path, words: list[int]) -> None:
    """Whatever they hold, nothing outside of them is read, and the ids are some of the row."""
    rules, text = SequenceRules(dry_multiplier=1.0), [1, 2, 1, 2, 1]
    sizes = len(text), 0, len(words)
    head = struct.pack("<2i2f10i", 5, 0, *numbers(rules), *sizes, 0, 5)
    data = head + struct.pack(f"<{len(text) + len(words)}i", *text, *words)
    done = subprocess.run([program], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    (size,) = struct.unpack_from("<i", done.stdout)
    assert all(0 <= id_ < 5 for id_ in struct.unpack_from(f"<{size}i", done.stdout, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("std::min<int64_t>(matches[i - begin], end - i)", "matches[i - begin]"),
        ("if (i + length >= end) {", "if (i + length > end) {"),
        ("{int64_t{matches[i]}, size - i, most}", "{int64_t{matches[i]}, most}"),
        ("matches[i], of_ngrams - i) >= ngram - 1", "matches[i], of_ngrams) >= ngram - 1"),
        ("most = std::min(most, allowed + kMaxExcess);", ""),
        (" || is_breaker(alone, last[i - 1])", ""),
        ("if (is_end) return following;", "if (is_end) return following + 1;"),
        ("rules.min_tokens - text.num_extra()", "rules.min_tokens"),
        ("own = std::max(own, level);", "own = level;"),
        ("      levels[ids_[i]] = 0;\n", ""),
        ("* rules.dry_base, kMaxAmount)", "* rules.dry_base, kInfinity)"),
        ("    if (place < 0) return;\n", ""),
        ("    std::sort(ids_, ids_ + size_);\n", ""),
    ],
)
def test_wrong_makers_are_seen(tmp_path: Path, text: str, wrong: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "wrong")
    source = tmp_path / "wrong/cpu/sequence_rules.h"
    assert source.read_text().count(text) == 1
    source.write_text(source.read_text().replace(text, wrong))
    built = build(tmp_path, tmp_path / "wrong")

    def check() -> None:
        draw = random.Random(0)
        cases = [random_case(draw, draw.choice(VOCAB_SIZES)) for _ in range(5000)]
        assert_equal(built, cases)
        test_corner_rows(built)
        test_long_matches(built)

    with pytest.raises(AssertionError):
        check()
