"""The Triton backend without a GPU: how it launches, and all its parity tests in the interpreter.

Triton interprets all kernels of a process or none, so the interpreted tests run in processes of
their own. test_triton_compile.py compiles the kernel and checks the machine code.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED, LARGE_VOCABS, SMALL_VOCABS

from llm_sampling import SamplingParams, TokenHistory, sample
from llm_sampling.backends import BACKENDS, base
from llm_sampling.backends import triton as triton_backend
from llm_sampling.backends.triton import Launch, choose_launch
from llm_sampling.calls import make_call

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
    "options",
    [
        {"history": TokenHistory.from_ids([[0]], vocab_size=40), "params": PENALTY},
        {"allowed_mask": torch.full((1, 2), -1, dtype=torch.int32)},
        {"logprobs": "raw"},
        {"params": SamplingParams(logit_bias={3: 1.0})},
        {"filter_only": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_extras_that_need_a_launch_with_fewer_threads(options):
    """Each of these alone is an extra; processed logprobs are none."""

    def has_extras(params=NUCLEUS, history=None, filter_only=False, **more):
        call = make_call(torch.zeros(1, 40), params, history=history, **more)
        return triton_backend._has_extras(call, filter_only=filter_only)

    assert has_extras(**options)
    assert not has_extras(logprobs="processed")


def test_kernel_numbers_logprobs_and_status_as_the_table_does():
    kernel = pytest.importorskip("llm_sampling.backends.triton_kernel", exc_type=ImportError)
    assert kernel.PROCESSED.value == base.LOGPROBS_MODES["processed"]
    assert kernel.RAW.value == base.LOGPROBS_MODES["raw"]
    assert kernel._NAN_SEEN.value == base.STATUS_NAN
    assert kernel._NO_CANDIDATE.value == base.STATUS_NO_CANDIDATE
    assert kernel._POS_INF_SEEN.value == base.STATUS_POS_INF


@pytest.mark.skipif(bool(INTERPRETED), reason="the interpreter runs on the CPU")
def test_it_says_why_it_does_not_run_here():
    logits = torch.zeros(1, 8)
    message = "backend 'triton' is unavailable: it runs on cuda tensors, and the logits are on cpu"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        sample(logits, SamplingParams(), backend="triton")
    if not torch.cuda.is_available():
        reason = BACKENDS["triton"].why_unavailable()
        assert reason is not None
        assert "there is no CUDA device" in reason or "triton does not import" in reason


def test_without_triton_the_reason_is_remembered(tmp_path):
    """A process in which importing triton fails: the package works, and says what is missing."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n")
    code = (
        "from llm_sampling import backend_info\n"
        "row = {row.name: row for row in backend_info()}['triton']\n"
        "print(row.available, row.reason)"
    )
    paths = [str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.stdout.strip() == "False triton does not import: no triton here", done.stderr


# The interpreter

#: What runs in the interpreter: -k's expression by file, and how many cases must pass at least in
#: the default run and in that of -m sweep.
INTERPRETED_FILES = {
    "sampling/test_edges.py": ("triton", 120, 30),
    "sampling/test_parity.py": (
        "triton and (test_covering_cases or raw_logprobs or more_than_there_are)",
        2,
        4,
    ),
    "sampling/test_vectors.py": ("triton", 30, 300),
    "kernels/test_triton_interpreted.py": ("triton", 140, 10),
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
    pytest.importorskip("triton")
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
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        ("tl.minimum(tl.maximum(slot, 0), num_slots - 1)", "slot", "hostile"),
        ("start = tl.minimum(tl.maximum(start, 0), bias_size)", "start += 0", "hostile"),
        ("end = tl.minimum(tl.maximum(end, start), bias_size)", "end += 0", "hostile"),
        ("(temperature >= 0.0) & (temperature < _INF)", "temperature == temperature", "hostile"),
        (" > 1) & (bracket.high - bracket.low > 1):", " > 1):", "that_change"),
        (" & (first < last):", ":", "that_change"),
        ("tl.where(is_drawn, ids, -1)", "tl.where(is_drawn, ids, 0)", "that_change"),
        ("            if smallest < 0:", "            if smallest < -1:", "that_change"),
        ("produced = (token >= 0)", "produced = (token >= -1)", "that_change"),
    ],
    ids=[
        *("slots", "first bias", "last bias", "temperature"),
        *("threshold", "tile", "token", "status", "advance"),
    ],
)
def test_what_is_not_limited_is_seen(tmp_path, text, wrong, expression):
    """Without one of its limits, the kernel does not stand hostile values or changing logits."""
    pytest.importorskip("triton")
    for name in ("llm_sampling", "tests"):
        shutil.copytree(TESTS.parent / name, tmp_path / name)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    source = tmp_path / "llm_sampling/backends/triton_kernel.py"
    kernel = source.read_text()
    assert kernel.count(text) == 1
    source.write_text(kernel.replace(text, wrong))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"),
            *("tests/kernels/test_triton_interpreted.py", "-k", expression, "-m", "not slow"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode != 0
    assert re.search("AssertionError|Segmentation fault|OverflowError", done.stdout), done.stdout
