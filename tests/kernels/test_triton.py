"""The Triton backend without a GPU: how it launches, and all its parity tests in the interpreter.

Triton interprets all kernels of a process or none, so the interpreted tests run in processes of
their own. test_triton_compile.py compiles the kernel and checks the machine code.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED, LARGE_VOCABS, SMALL_VOCABS

from llm_sampling import SamplingParams, TokenHistory, sample
from llm_sampling.backends import BACKENDS, base
from llm_sampling.backends import triton as triton_backend
from llm_sampling.backends.triton import Launch, choose_launch
from llm_sampling.calls import make_call
from llm_sampling.fields import SCOPES
from llm_sampling.history import UPDATE_KINDS

TESTS = Path(__file__).parents[1]
NUCLEUS = SamplingParams(top_p=0.9)
PENALTY = SamplingParams(repetition_penalty=1.1)
F32, BF16 = torch.float32, torch.bfloat16


# The launch


@pytest.mark.parametrize("vocab_size", [*SMALL_VOCABS, *LARGE_VOCABS, 128, 129, 4096, 2**20])
@pytest.mark.parametrize("rows", [1, 132, 133, 4096])
@pytest.mark.parametrize("dtype", [F32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_every_launch_is_one_that_the_kernel_can_run(vocab_size, rows, dtype, extras):
    launch = choose_launch(vocab_size, rows, dtype, extras=extras)
    tiles = -(-vocab_size // launch.tile)
    threads = 32 * launch.num_warps
    for size in (launch.tile, launch.candidates, launch.num_warps):
        assert size & (size - 1) == 0
    assert launch.tile >= threads  # at least a token for each thread
    assert launch.tile % 32 == 0  # a tile is a whole number of words of a bitmask
    assert launch.candidates <= 2**20  # counts have 21 bits
    assert tiles <= 2**20 // 2048  # the tile's number stays below the flags beside it
    assert 64 * launch.num_warps <= 1024  # AMD's wavefronts in a workgroup
    assert launch.nucleus <= launch.candidates
    assert launch.workspace(vocab_size) == (
        launch.tile + 2 * launch.candidates + launch.max_stored() * tiles
    )
    # tiles that are being loaded fit half of the smallest shared memory
    assert (launch.num_stages - 1) * launch.tile * dtype.itemsize <= 65536


def test_branches_of_the_launch():
    """Large and small vocabularies, rows with extras, few and many rows, 2 and 4 bytes."""
    one = choose_launch(128256, 1, F32)
    assert one == Launch(tile=4096, candidates=2048, nucleus=512, num_warps=16, num_stages=3)
    assert choose_launch(128256, 132, F32) == one
    assert choose_launch(128256, 133, F32).num_stages == 3
    assert choose_launch(128256, 133, F32, processors=200) == one
    assert choose_launch(128256, 133, BF16).num_stages == 3
    extras = choose_launch(128256, 1, F32, extras=True)
    assert (extras.tile, extras.num_warps) == (2048, 8)
    small = choose_launch(1000, 1, F32)
    assert (small.tile, small.num_warps, small.num_stages) == (1024, 4, 2)
    tiny = choose_launch(1, 1, F32)
    assert (tiny.tile, tiny.num_warps, tiny.num_stages) == (128, 1, 2)
    assert choose_launch(2049, 1, F32).tile == 4096
    assert choose_launch(2048, 1, F32).tile == 2048


@pytest.mark.parametrize(
    ("vocab_size", "rows", "options", "parts"),
    [
        (128256, 1, {}, 16),
        (128256, 8, {}, 16),
        (128256, 9, {}, 8),
        (128256, 33, {}, 4),
        (128256, 34, {}, 1),
        (128256, 64, {}, 1),
        (128256, 64, {"processors": 256}, 4),
        (128256, 1, {"processors": 3}, 1),
        (128256, 1, {"splits": False}, 1),
        (128256, 0, {}, 16),
        (32000, 1, {}, 1),
        (32000, 1, {"extras": True}, 8),
        (61440, 1, {}, 1),
        (61441, 1, {}, 8),
        (2**20, 1, {}, 16),
        (2**20, 1, {"extras": True}, 16),
    ],
)
def test_parts_of_a_launch(vocab_size, rows, options, parts):
    """4 programs or more for each row, of 2 tiles or more, where there are processors for them."""
    launch = choose_launch(vocab_size, rows, BF16, **{"splits": True, **options})
    assert launch.parts == parts
    assert launch == replace(
        choose_launch(vocab_size, rows, BF16, **options | {"splits": False}), parts=parts
    )
    assert launch.parts * (launch.most_wanted() * 9 // 8 + 16) <= launch.candidates


@pytest.mark.parametrize(
    "options",
    [
        {"history": TokenHistory.from_ids([[0]], vocab_size=40), "params": PENALTY},
        {"allowed_mask": torch.full((1, 2), -1, dtype=torch.int32)},
        {"logprobs": "raw"},
        {"logprobs": ("raw", "processed")},
        {"logprobs": "processed", "top_logprobs": 1},
        {"logprobs": "processed", "logprob_token_ids": [3]},
        {"kept": "mask"},
        {"params": SamplingParams(logit_bias={3: 1.0})},
        {"filter_only": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_extras_that_need_a_launch_with_fewer_threads(options):
    """Each of these alone is an extra; processed logprobs are none."""

    def has_extras(params=NUCLEUS, history=None, filter_only=False, **more):
        call = make_call(torch.zeros(1, 40), params, history=history, **more)
        return triton_backend._has_extras(call, filter_only=filter_only)

    assert has_extras(**options)
    assert not has_extras(logprobs="processed")


def test_kernel_numbers_kept_sets_and_status_as_the_wrapper_does():
    kernel = pytest.importorskip("llm_sampling.backends.triton_kernel", exc_type=ImportError)
    for name in ("mask", "ids", "ends"):
        number = getattr(kernel, f"KEPT_{name.upper()}").value
        assert number == triton_backend.KEPT_FORMS[name]
    assert kernel._NAN_SEEN.value == base.STATUS_NAN
    assert kernel._NO_CANDIDATE.value == base.STATUS_NO_CANDIDATE
    assert kernel._POS_INF_SEEN.value == base.STATUS_POS_INF
    assert kernel._TEXT_FULL.value == base.STATUS_TEXT_FULL
    assert kernel.OUTPUT_SCOPE.value == SCOPES["output"]


def test_kernel_numbers_updates_as_the_table_does():
    kernel = pytest.importorskip("llm_sampling.backends.triton_history", exc_type=ImportError)
    numbers = {kind: getattr(kernel, kind.upper()).value for kind in UPDATE_KINDS}
    assert numbers == UPDATE_KINDS


@pytest.mark.skipif(bool(INTERPRETED), reason="the interpreter runs on the CPU")
def test_it_says_why_it_does_not_run_here():
    logits = torch.zeros(1, 8)
    reason = BACKENDS["triton"].why_unavailable()
    wrong_device = "it runs on cuda tensors, and the logits are on cpu"
    message = f"backend 'triton' is unavailable: {reason or wrong_device}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        sample(logits, SamplingParams(), backend="triton")
    if not torch.cuda.is_available():
        assert reason is not None
        assert "there is no CUDA device" in reason or "triton does not import" in reason


#: A module triton that cannot be used -> the reason that is given, or its beginning.
BROKEN = {
    "raise ImportError('no triton here')": "triton does not import: no triton here",
    "raise ImportError": "triton does not import: ImportError",
    "raise AttributeError('half of it')": "triton does not import: AttributeError: half of it",
    "raise OSError('libcuda.so.1')": "triton does not import: OSError: libcuda.so.1",
    "raise RuntimeError": "triton does not import: RuntimeError",
    "raise SystemExit('no GPU')": "triton does not import: SystemExit: no GPU",
    "class Odd(BaseException): pass\nraise Odd(7)": "triton does not import: Odd: 7",
    "1 +": "triton does not import: SyntaxError: ",
    "": "triton does not import: AttributeError: module 'triton' has no attribute '__version__'",
    "__version__ = None": "triton does not import: TypeError: ",
    "__version__ = '3.2.0'": "triton 3.2.0 is older than 3.4",
    "__version__ = '2.9.0+git1'": "triton 2.9.0+git1 is older than 3.4",
    "__version__ = '3.4.0'": "triton does not import: No module named 'triton.language'",
    "__version__ = '10.0'": "triton does not import: No module named 'triton.language'",
}


#: Prints how a process goes on whose module triton is that of a folder, for each folder.
GOES_ON = """
import os, sys
import torch
from llm_sampling import SamplingParams, backend_info, sample

def show():
    rows = {row.name: row for row in backend_info()}
    for name in ("auto", "torch"):
        sample(torch.zeros(1, 8), SamplingParams(seed=1), backend=name)
    try:
        sample(torch.zeros(1, 8), SamplingParams(seed=1), backend="triton")
    except RuntimeError as error:
        print(error)
    print(*rows)
    print(rows["triton"].available, rows["triton"].device_types)
    print(rows["triton"].reason)

for folder in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    try:
        sys.path.insert(0, folder)
        show()
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        sys.stdout.flush()
        os._exit(0)
if not sys.argv[1:]:
    show()
"""


def with_triton(folder, sources, *, fresh=False):
    """Return the lines that GOES_ON prints for each source of a module triton.

    A process forks for each, after it has imported the package; a fresh one has the only source on
    its path from the beginning, where torch may find it too.
    """
    folders = [str(folder / str(place)) for place in range(len(sources))]
    for path, source in zip(folders, sources, strict=True):
        Path(path, "triton").mkdir(parents=True)
        Path(path, "triton", "__init__.py").write_text(source + "\n")
    paths = [*(folders if fresh else ()), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", GOES_ON, *(() if fresh else folders)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def check_lines(source, lines):
    refusal, names, about, reason = lines
    assert reason.startswith(BROKEN[source])
    assert reason == BROKEN[source] or BROKEN[source].endswith(": ")
    assert refusal == f"backend 'triton' is unavailable: {reason}"
    assert names.split() == list(BACKENDS)
    assert about == "False ('cuda',)"


def test_a_triton_that_does_not_load_is_listed_with_the_reason(tmp_path):
    """It breaks nothing else: the other backends draw, and "auto" does not take it."""
    lines = with_triton(tmp_path, BROKEN)
    assert len(lines) == 4 * len(BROKEN)
    for place, source in enumerate(BROKEN):
        check_lines(source, lines[4 * place : 4 * place + 4])


@pytest.mark.parametrize("source", ["raise ImportError", "raise AttributeError('half of it')"])
def test_the_package_imports_beside_it(source, tmp_path):
    """torch imports triton too, where its compiler is loaded: the package does not load that."""
    check_lines(source, with_triton(tmp_path, [source], fresh=True))


def test_a_triton_without_its_knobs_is_listed(tmp_path):
    """As Triton 3.2 was, whatever version such a module claims to be of."""
    (real,) = pytest.importorskip("triton").__path__
    file = real + "/__init__.py"
    program = f"exec(compile(open({file!r}).read(), {file!r}, 'exec'))"
    reason = with_triton(tmp_path, [f"__path__ = [{real!r}]\n{program}\ndel knobs"])[-1]
    assert reason.startswith("triton does not import: AttributeError: ")
    assert "knobs" in reason


def test_ctrl_c_while_triton_is_imported_is_no_reason(tmp_path):
    assert with_triton(tmp_path, ["raise KeyboardInterrupt"]) == ["interrupted"]


# The interpreter


def version_of(module):
    """Return the first two numbers of a module's version."""
    return tuple(map(int, module.__version__.split(".")[:2]))


#: What runs in the interpreter: -k's expression by file, and how many cases must pass at least in
#: the default run and in that of -m sweep.
INTERPRETED_FILES = {
    "sampling/test_edges.py": ("triton", 120, 30),
    "sampling/test_histories.py": ("triton", 5, 16),
    "sampling/test_parity.py": (
        "triton and (test_covering_cases or raw_logprobs or more_than_there_are)",
        2,
        4,
    ),
    "sampling/test_results.py": ("triton", 15, 100),
    "sampling/test_rules.py": ("triton", 5, 30),
    "sampling/test_table.py": ("triton", 4, 5),
    "sampling/test_vectors.py": ("triton", 30, 300),
    "sampling/test_vectors_family.py": ("triton", 10, 150),
    "kernels/test_triton_interpreted.py": ("triton", 140, 10),
    "kernels/test_triton_known_rows.py": ("triton", 4, 15),
    "kernels/test_triton_results.py": ("triton", 20, 30),
    "kernels/test_triton_rules.py": ("triton", 20, 200),
    "kernels/test_triton_split.py": ("triton", 15, 70),
}


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.parametrize(
    "markers",
    [
        pytest.param((), id="default"),
        pytest.param(("-m", "sweep"), id="sweep", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize("name", INTERPRETED_FILES)
def test_everything_in_the_interpreter(name, markers):
    """Tokens, status and filtered logits equal the reference's, to the bit."""
    triton = pytest.importorskip("triton")
    if name != "sampling/test_vectors.py" and version_of(triton) < (3, 9):
        pytest.skip(
            f"the interpreter of triton {triton.__version__} may round tl.fma twice and give NaN "
            "for the maximum of NaN and a number, which its compiled code does not; 3.9's does as "
            "compiled code does"
        )
    expression, *least = INTERPRETED_FILES[name]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"),
            *(str(TESTS / name), "-k", expression, *markers),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parent,
        env=os.environ
        | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least[bool(markers)]


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("tl.minimum(tl.maximum(slot, 0), num_slots - 1)", "slot", "hostile"),
        ("start = tl.minimum(tl.maximum(start, 0), bias_size)", "start += 0", "hostile"),
        ("end = tl.minimum(tl.maximum(end, start), bias_size)", "end += 0", "hostile"),
        ("        params = tl.where(exists, params, 0)\n", "", "hostile"),
        (
            "tl.where((temperature >= 0.0) & (temperature < _INF), temperature, 1.0)",
            "temperature",
            "bad_temperature",
        ),
        (" & (bracket.high > bracket.low + 1):", ":", "that_change"),
        (" & (first < last):", ":", "that_change"),
        ("tl.where(is_drawn, ids, -1)", "tl.where(is_drawn, ids, 0)", "that_change"),
        ("            if smallest < 0:", "            if smallest < -1:", "that_change"),
        ("produced = (token >= 0)", "produced = (token >= -1)", "that_change"),
        (
            "tl.minimum(tl.maximum(tl.load(text.lengths), 0), text.max_length)",
            "tl.load(text.lengths)",
            "hostile",
        ),
        ("left = tl.where((left >= 0) & (left < vocab_size), left, -1)", "left += 0", "hostile"),
        (
            "is_id = (ids >= 0) & (ids < vocab_size)\n    count",
            "is_id = ids > -9\n    count",
            "hostile",
        ),
        ("if (slot >= 0) & (slot < num_slots):", "if slot >= -1:", "hostile_updates"),
        ("number = tl.minimum(tl.maximum(number, 0), most)", "number += 0", "hostile_updates"),
        ("is_id & (place < text.max_length)", "is_id & (place < 99)", "hostile_updates"),
    ],
    ids=[
        *("slots", "first bias", "last bias", "slots of parameters", "temperature"),
        *("threshold", "tile", "token", "status", "advance"),
        *("length of a text", "leaving id", "extra id"),
        *("slots of an update", "number of an update", "room of a text"),
    ],
)
def test_what_is_not_limited_is_seen(tmp_path, text, wrong, expression):
    """Without one of its limits, the kernel does not stand hostile values or changing logits."""
    pytest.importorskip("triton")
    printed = fail_with_a_wrong_kernel(tmp_path, text, wrong, "test_triton_interpreted", expression)
    words = "AssertionError|Segmentation fault|OverflowError|out of range for type int32"
    assert re.search(words, printed), printed


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("inside = part < CONFIG.parts\n", "inside = part < CONFIG.parts - 1\n", "extremes"),
        ("bound = tl.max(tl.load(header + 3), axis=0)", "bound = _LOWEST_KEY", "more_candidates"),
        ("held = tl.where(width > CAPACITY, width, 0)", "held = tl.zeros_like(width)", "more_cand"),
        ("use_division = ((flags & _DIVISION_BIT) != 0).to(tl.int32)\n", "pass\n", "division"),
        ("tl.max(flags & _NAN_BIT, axis=0) | tl", "tl", "extremes"),
        ("tl.where(keys == top, tl.load(header + 1), _LAST_ID)", "tl.load(header + 1)", "extremes"),
        ("        tl.store(counter, 0)", "        pass", "both_kinds"),
        (
            "            _arrive(counters + index, CONFIG)\n        if",
            "            pass\n        if",
            "alike",
        ),
        ("is_last = before == CONFIG.parts - 1", "is_last = before == 0", "both_kinds"),
        ("(has_depth_cut & (has_p == 0))", "has_depth_cut", "both_kinds"),
        ("(wanted <= CONFIG.most_wanted)", "(wanted > 0)", "both_kinds"),
        (
            "first_best = tl.minimum(tl.maximum(first_best, 0), vocab_size - 1)\n    flags",
            "flags",
            "header and token",
        ),
        ("held = tl.where(width > CAPACITY, width, 0)", "held = width * 0", "header and count"),
    ],
    ids=[
        *("last list", "no bound", "too many", "division", "NaN", "first token", "reset"),
        *("count of whole rows", "first instead of last"),
        *("top-p with min-p", "too large a k", "limit of the token", "limit of a count"),
    ],
)
def test_a_wrong_split_is_seen(tmp_path, text, wrong, expression):
    """A part is lost, or anything else that one program must know of another one."""
    pytest.importorskip("triton")
    printed = fail_with_a_wrong_kernel(tmp_path, text, wrong, "test_triton_split", expression)
    assert re.search("AssertionError|Segmentation fault", printed), printed


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("other_codes[None, :] > codes[:, None]", "other_x[None, :] > x[:, None]", "within_ties"),
        (
            "ranks = tl.where(is_in, ranks, -1)",
            "ranks = tl.where(is_in, ranks + 1, -1)",
            "ids_that",
        ),
        ("bit << tl.arange(0, 32)[None, :]", "bit << (31 - tl.arange(0, 32))[None, :]", "a_table"),
        ("tl.int32) << (ids & 31)\n", "tl.int32) << (31 - (ids & 31))\n", "a_table"),
        (
            "Row(\n                    row.logits, row.tail, row.vocab_size, row.num_tiles"
            ", (), (), (), (), ()\n                )",
            "row",
            "a_table and raw",
        ),
        ("best = tl.where(is_split, -_INF, best)", "pass", "do_not_fit"),
        ("raw_best, raw_max + 0.0", "raw_best, raw_max", "zeros"),
        ("best = tl.maximum(best, x + 0.0)", "best = tl.maximum(best, x)", "zeros"),
        ("            _clear_draws(output, num_samples)", "            pass", "leaves_nothing"),
        (
            "        if smallest < 0:\n            token",
            "        if smallest < -1:\n            token",
            "nothing",
        ),
        ("exists = (ids >= 0) & (ids < row.vocab_size)", "exists = ids == ids", "ids_that"),
        ("exists = (ids >= 0) & (ids < row.vocab_size)", "exists = ids >= 0", "ids_that"),
        ("tl.where(count <= more.num_kept, count, 0)", "count", "small_tiles and ids"),
        ("tl.maximum(threshold, order.threshold)", "threshold", "within_ties"),
    ],
    ids=[
        *("order of ties", "rank", "order of bits", "order of a candidate's bits"),
        *("processed for raw", "maxima of a part", "largest of -0.0", "maxima of -0.0"),
        *("draws that are left", "lists that are left", "an id below", "an id above"),
        *("too many kept ids", "beyond the kept set"),
    ],
)
def test_wrong_results_are_seen(tmp_path, text, wrong, expression):
    """A list, a rank or a mask that is not the reference's."""
    pytest.importorskip("triton")
    printed = fail_with_a_wrong_kernel(tmp_path, text, wrong, "test_triton_results", expression)
    assert re.search("AssertionError|Segmentation fault", printed), printed


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("goes_on & (ids == last)", "goes_on & (ids <= last)", "random_texts"),
        ("tl.minimum(tl.minimum(length, place - dry.begin), dry.room)", "length", "corner"),
        ("(tl.minimum(length, place - ngrams.begin) >=", "(length >=", "random_texts"),
        ("allowed + _MAX_EXCESS", "allowed + 256", "long_matches"),
        ("tl.minimum(amounts * dry.base, _MAX_AMOUNT)", "amounts * dry.base", "long_matches"),
        (
            "is_lowered & (_are_breakers(ids, is_lowered, records, dry.alone) == 0)",
            "is_lowered",
            "random_texts",
        ),
        (
            "        room = tl.min(tl.where(inside & is_end, following, room)",
            "        room = tl.min(tl.where(inside & is_end, following + 1, room)",
            "random_texts",
        ),
        (
            "number <= text.size - begin - following",
            "number <= text.size - following",
            "corner",
        ),
        (
            "        tl.store(out.bits + word, tl.zeros([SPAN], tl.int32), mask=word < words)",
            "        pass",
            "random_texts",
        ),
        (
            "        tl.store(out.amounts + rank, tl.zeros([SPAN], tl.int32), mask=rank < total)",
            "        pass",
            "random_texts",
        ),
        ("        total += tl.sum(listed, axis=0)", "        pass", "long_rows"),
        ("min_tokens - added", "min_tokens", "random_texts"),
        ("        done += SPAN", "        done += number", "long_rows"),
        ("tl.atomic_max(out.amounts", "tl.atomic_xchg(out.amounts", "random_texts"),
        (
            "        exists = (index >= 0) & (index < num_params)",
            "        exists = index < num_params",
            "random_texts or hostile",
        ),
        ("    slot = tl.minimum(tl.maximum(slot, 0), num_slots - 1)", "    slot += 0", "hostile"),
        (
            "tl.minimum(tl.maximum(tl.load(kept_ids[1] + slot), 0), max_length)",
            "tl.load(kept_ids[1] + slot)",
            "hostile",
        ),
        (
            "tl.minimum(tl.maximum(number, 0), records.size - at - 2)",
            "tl.minimum(tl.maximum(number, 0), records.size - at)",
            "hostile",
        ),
        (
            "        begin = tl.minimum(tl.maximum(begin, 0), sequences_size)\n",
            "",
            "hostile and 1000",
        ),
        (
            "tl.minimum(tl.maximum(end, begin), sequences_size) - begin",
            "tl.maximum(end, begin) - begin",
            "hostile",
        ),
        ("tl.minimum(size, most)", "size", "hostile"),
        ("is_id = (ids >= 0) & (ids < vocab_size)", "is_id = ids >= 0", "random_texts"),
        (
            " & (ids.to(tl.uint32, bitcast=True) < out.size.to(tl.uint32, bitcast=True))",
            "",
            "hostile",
        ),
        ("    ids -= out.first_id\n", "", "slices"),
        (
            "    is_listed = wanted & (((bits >> bit) & 1) != 0)",
            "    is_listed = wanted",
            "changes",
        ),
    ],
    ids=[
        *("matches", "window of DRY", "window of n-grams", "excess", "most", "breaker ids"),
        *("room", "breaker across the window", "bits that are left", "amounts that are left"),
        *("sum of words", "extra ids of the output", "long word", "largest amount"),
        *("slots of parameters", "slots", "length of a text", "length of a record"),
        *("first record", "last record", "room of the list", "padding", "id that is listed"),
        *("first id of a slice", "id without a bit"),
    ],
)
def test_wrong_lists_are_seen(tmp_path, text, wrong, expression):
    """A list that is not the specification's, or values that are not limited."""
    pytest.importorskip("triton")
    printed = fail_with_a_wrong_kernel(
        tmp_path, text, wrong, "test_triton_rules", expression, ("triton_rules.py",)
    )
    assert re.search("AssertionError|Segmentation fault|OverflowError", printed), printed


@pytest.mark.skipif(bool(INTERPRETED), reason="this process is one of those that the test starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("tl.where(amount == _INF, -_INF, x - amount)", "x - amount", "split_rows"),
        ("tl.where(amount == _INF, -_INF, x - amount)", "-_INF + 0 * amount", "split_rows"),
        ("place += ones(word & ((1 << (ids & 31)) - 1))", "place += ones(word)", "split_rows"),
        ("    place = tl.minimum(tl.maximum(place, 0), capacity - 1)\n", "", "overwrites"),
        ("words = index * ((vocab_size + 31) // 32)", "words = index * 0", "split_rows"),
        ("amounts + index * capacity, capacity)", "amounts, capacity)", "split_rows"),
        ("mask=end < vocab_size, other=lowered.counts)", "mask=end < vocab_size)", "tiles"),
        ("            number = _listed_from(", "            _listed_from(", "tiles"),
        ("        lowered = _list_of_row(", "        _list_of_row(", "split_rows"),
    ],
    ids=[
        *("ban", "amount", "rank", "limit of a place", "bits of the row", "amounts of the row"),
        *("last tile", "tiles without a listed token", "no list"),
    ],
)
def test_wrong_uses_of_lists_are_seen(tmp_path, text, wrong, expression):
    """Step 5a with another list, another amount, or none."""
    pytest.importorskip("triton")
    printed = fail_with_a_wrong_kernel(tmp_path, text, wrong, "test_triton_rules", expression)
    assert re.search("AssertionError|Segmentation fault", printed), printed


def fail_with_a_wrong_kernel(
    folder, text, wrong, file, expression, sources=("triton_kernel.py", "triton_history.py")
):
    """Change a text that some sources have once; return what the tests that fail print."""
    for name in ("benchmarks", "llm_sampling", "tests"):
        shutil.copytree(TESTS.parent / name, folder / name)
    shutil.copy(TESTS.parent / "pyproject.toml", folder)
    found = 0
    for name in sources:
        source = folder / "llm_sampling/backends" / name
        kernel = source.read_text()
        found += kernel.count(text)
        source.write_text(kernel.replace(text, wrong))
    assert found == 1
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"),
            *(f"tests/kernels/{file}.py", "-k", expression, "-m", ""),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)},
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout
