"""The maker of the lists of step 5a in CUDA, against the specification, in the emulation.

Each call runs the threads in another order.
"""

import ctypes
import functools
import itertools
import random
import shutil
import sys
from pathlib import Path

import pytest
import sequence_lists
import torch
import unchecked
from sequence_lists import Lists

from llm_sampling.backends import c_abi

sys.path.append(str(Path(__file__).parent / "cuda_emulation"))
import backend as emulation

SANITIZED = emulation.SANITIZED

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
not_inside = pytest.mark.skipif(SANITIZED is not None, reason="this process is one that it starts")

SEEDS = itertools.count()


@pytest.fixture(scope="module")
def make(build_once):
    if SANITIZED:
        return maker(Path(SANITIZED))
    build = functools.partial(emulation.build, name="lists.cpp")
    (built,) = build_once("cuda_lists_emulated", build).iterdir()
    return maker(built)


def maker(library):
    """A maker of sequence_lists.py, which takes memory that changes as well."""
    run = ctypes.CDLL(str(library)).llm_sampling_cuda_lists_emulated
    run.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    run.restype = ctypes.c_char_p
    return functools.partial(make_lists, run)


def make_lists(run, call, lists, swapping=None, vocab_slice=(0, 0)):
    args, _kept = args_of(call, lists)
    args.first_id, args.whole_vocab_size = vocab_slice
    seed = next(SEEDS)
    failure = run(ctypes.byref(args), seed, swapping and ctypes.byref(swapping)).decode()
    assert failure == "", f"seed {seed}: {failure}"


def args_of(call, lists):
    """The struct of a call, and tensors that it points to and that making lists does not need."""
    rows, vocab_size = len(call.slots), call.vocab_size
    entries = rows if call.param_slots is None else len(call.rules["min_tokens"])
    num_slots = len(call.lengths)
    names = ("temperature", "top_p", "min_p_cut", "repetition_penalty", "frequency_penalty")
    unused = {
        "logits": torch.zeros(1, vocab_size),
        "filtered": torch.zeros(rows, vocab_size),
        **{name: torch.ones(entries) for name in (*names, "presence_penalty")},
        "top_k": torch.zeros(entries, dtype=torch.int32),
        "min_tokens_to_keep": torch.ones(entries, dtype=torch.int32),
        "seen": torch.zeros(num_slots, -(-vocab_size // 32), dtype=torch.int32),
        "counts": torch.zeros(num_slots, vocab_size, dtype=torch.int32),
        "text_prompt_lengths": torch.zeros(num_slots, dtype=torch.int64),
    }
    others = ("slots", "lengths", "text", "text_lengths", "param_slots", "extra_output")
    others += ("sequence_offsets", "sequence_counts", "sequences")
    pointers = {**unused, **call.rules, **{name: getattr(call, name) for name in others}}
    pointers |= {f"list_{name}": tensor for name, tensor in zip(Lists._fields, lists, strict=True)}
    if call.text is None:
        del pointers["text_prompt_lengths"]
    args = c_abi.SampleArgs(
        struct_size=ctypes.sizeof(c_abi.SampleArgs),
        version=c_abi.ABI_VERSION,
        rows=rows,
        vocab_size=vocab_size,
        num_samples=1,
        num_threads=1,
        filtered_stride=vocab_size,
        seen_stride=-(-vocab_size // 32),
        counts_stride=vocab_size,
        num_slots=num_slots,
        max_text_length=0 if call.text is None else call.text.shape[1],
        num_extra_output=0 if call.extra_output is None else call.extra_output.shape[1],
        num_param_slots=0 if call.param_slots is None else entries,
        sequences_size=call.sequences.numel(),
        list_capacity=call.capacity(),
        **{name: tensor.data_ptr() for name, tensor in pointers.items() if tensor is not None},
    )
    return args, unused


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.parametrize("vocab_size", [1, 7, 33, 1000])
def test_random_texts(make, vocab_size, seed):
    """Rows of different slots, which have rules of their own or share those of a table's slots."""
    sequence_lists.assert_lists(make, *sequence_lists.random_call(vocab_size, 50, seed))


@pytest.mark.parametrize("seed", range(4))
def test_rows_without_a_text(make, seed):
    sequence_lists.assert_lists(make, *sequence_lists.without_text(33, 50, seed))


@pytest.mark.parametrize("seed", range(12))
def test_slices_of_a_vocabulary(make, seed):
    sequence_lists.assert_slices(make, seed)


def test_corner_rows(make):
    cases = sequence_lists.corner_rows()
    sequence_lists.assert_lists(make, *sequence_lists.call_of(cases, random.Random(0)))


def test_long_matches(make):
    cases = sequence_lists.long_matches()
    call, lists = sequence_lists.call_of(cases, random.Random(0), max_length=900)
    sequence_lists.assert_lists(make, call, lists)


def test_long_rows(make):
    cases = sequence_lists.long_rows()
    call, lists = sequence_lists.call_of(cases, random.Random(0), max_length=2200)
    assert all(lists)
    sequence_lists.assert_lists(make, call, lists)


@pytest.mark.parametrize("case", range(4))
def test_rows_that_shared_memory_does_not_hold(make, case):
    """More than 8,192 ids of a text, and more than 1,024 numbers of records."""
    cases = sequence_lists.huge_rows()[case : case + 1]
    call, lists = sequence_lists.call_of(cases, random.Random(0), max_length=9300)
    assert all(lists)
    sequence_lists.assert_lists(make, call, lists)


# Values that nothing has checked, memory that changes


@pytest.mark.parametrize("vocab_size", [7, 33, 1000])
@pytest.mark.parametrize("seed", range(60))
def test_hostile_values(make, vocab_size, seed):
    sequence_lists.assert_hostile_values_do_no_harm(make, vocab_size, seed)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(12))
def test_memory_that_changes(make, seed, every):
    """All that a call reads becomes something else at some barriers."""
    chance, guards = random.Random(seed), unchecked.Guards(0)
    call, lists = sequence_lists.changing_call(guards, seed, 12, is_hostile=seed % 3 == 0)
    other = sequence_lists.mapped(call, torch.clone)
    sequence_lists.overwrite(other, chance)
    pairs = list(zip(call.tensors(), other.tensors(), strict=True))
    addresses = ctypes.c_void_p * len(pairs)
    columns = (
        addresses(*(this.data_ptr() for this, _ in pairs)),
        addresses(*(that.data_ptr() for _, that in pairs)),
        (ctypes.c_int64 * len(pairs))(*(this.nbytes for this, _ in pairs)),
    )
    swapping = emulation.Swapping(*map(ctypes.addressof, columns), len(pairs), every)
    make(call, lists, swapping)
    guards.assert_whole()
    sequence_lists.assert_nothing_behind(lists)


# What is refused


def test_what_a_call_lacks(make):
    """Without memory or room nothing is made."""
    call, _ = sequence_lists.random_call(33, 2, 0)
    lists = sequence_lists.memory_for(call)
    run = make.args[0]

    def failure_with(**changes):
        args, _kept = args_of(call, lists)
        for name, value in changes.items():
            setattr(args, name, value)
        return run(ctypes.byref(args), 0, None).decode()

    assert failure_with() == ""
    for name in Lists._fields:
        assert failure_with(**{f"list_{name}": None}) == "a pointer that is needed is NULL"
    for capacity in (-1, 32):
        assert "list_capacity" in failure_with(list_capacity=capacity)
    assert failure_with(list_capacity=33, max_text_length=1) == ""
    for name in Lists._fields:
        address = getattr(args_of(call, lists)[0], f"list_{name}")
        assert failure_with(**{f"list_{name}": address + 2}).endswith("not aligned to its type")
        assert "overlaps" in failure_with(**{f"list_{name}": call.slots.data_ptr()})


# With sanitizers, and with planted bugs


run_sanitized = functools.partial(emulation.run_sanitized, __file__, name="lists.cpp")


@not_inside
@pytest.mark.parametrize("markers", [(), pytest.param(("-m", "not slow"), marks=pytest.mark.slow)])
def test_with_sanitizers(tmp_path, markers):
    """The default run's tests of this file, and all of them."""
    done = run_sanitized(tmp_path, "not sanitizers", markers=markers)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            "id_at(place + 1 + length) == id_at(length)",
            "id_at(place + 1 + length) <= id_at(length)",
        ),
        ("smaller(smaller(length, of_dry_ - 1 - place), room_)", "smaller(length, room_)"),
        ("smaller(length, of_ngrams_ - 1 - place) >= others_", "length >= others_"),
        ("allowed_ + kMaxExcess", "allowed_ + 256"),
        ("next < kMaxAmount ? next : kMaxAmount", "next"),
        (" && !is_breaker(id)", ""),
        ("room_ = first + shared_.first_end;", "room_ = first + shared_.first_end + 1;"),
        ("count <= of_dry_ - place", "count <= size_ - place"),
        ("bits_[i] = 0;", "(void)i;"),
        ("amounts_[i] = 0.0f;", "(void)i;"),
        ("      total = shared_.total;\n", ""),
        ("rules_.min_tokens - added", "rules_.min_tokens"),
        ("atomicMax(reinterpret_cast", "atomicExch(reinterpret_cast"),
        ("words++ % kThreads == threadIdx.x", "words++ == threadIdx.x"),
        ("place = cluster_.scan(is_id ? 1 : 0) - 1", "place = cluster_.scan(1) - 1"),
        ("window <= 0 ? size_", "window < 0 ? size_"),
        ("if (index >= 0) shared_.rules", "shared_.rules"),
        ("history_.vocab_size = slice_.vocab_size;", ""),
        ("const bool is_id = slice_.is_id(id);", "const bool is_id = slice_.place_of(id) >= 0;"),
        ("const int64_t place = id - first_id;", "const int64_t place = id;"),
        ("    put(false);\n    __syncthreads();\n", "    put(false);\n"),
        ("      __syncthreads();\n      total = ", "      total = "),
    ],
    ids=[
        *("matches", "window of DRY", "window of n-grams", "excess", "most", "breaker ids", "room"),
        *("breaker across the window", "bits that are left", "amounts that are left"),
        *("sum of words", "extra ids of the output", "largest amount", "many words", "padding"),
        *("window of all", "row of padding", "text of a slice", "extra ids of a slice"),
        *("places of a slice", "set bits", "ranks"),
    ],
)
def test_wrong_lists_are_seen(tmp_path, text, wrong):
    make = maker(emulation.build(tmp_path, emulation.BRIEF, (text, wrong), name="lists.cpp"))

    def compare():
        test_corner_rows(make)
        test_long_matches(make)
        test_long_rows(make)
        test_rows_that_shared_memory_does_not_hold(make, 3)
        for vocab_size in (33, 1000):
            for seed in range(20):
                test_random_texts(make, vocab_size, seed)
        for seed in range(12):
            test_slices_of_a_vocabulary(make, seed)

    with pytest.raises((AssertionError, RuntimeError)):
        compare()


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        (
            "limited(read_once(args.slots[row]), 0, args.num_slots - 1)",
            "args.slots[row]",
            "hostile",
        ),
        (
            "limited(read_once(*history.text_length), 0, history.max_text_length)",
            "*history.text_length",
            "hostile",
        ),
        ("limited(read_once(at[1]), 0, end - at - 2)", "at[1]", "hostile"),
        ("sequences.end - sequences.begin > room", "false", "hostile"),
        ("    if (place < 0) return;\n", "", "hostile"),
        ("slot >= kPadding && slot < args.num_param_slots ? slot : kNoSuchSlot", "slot", "hostile"),
        ("limited(read_once(offsets[index]), 0, size)", "offsets[index]", "hostile"),
        ("(bits & bit) == 0 || rank < 0 || rank >= args_.list_capacity", "rank < 0", "changes"),
    ],
    ids=[
        *("slots", "length of a text", "length of a record", "room of the list"),
        *("listed id", "slots of parameters", "first record", "id without a bit"),
    ],
)
def test_what_is_not_limited_is_seen(tmp_path, text, wrong, expression):
    """Without one of its limits, the kernel does not stand hostile values or changing memory."""
    markers = ("-x", "-m", "not slow")
    done = run_sanitized(tmp_path, expression, (text, wrong), markers)
    assert done.returncode != 0
    words = ("AddressSanitizer", "runtime error", "AssertionError")
    assert any(word in done.stdout + done.stderr for word in words), done.stdout[-4000:]
