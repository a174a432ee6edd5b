"""Lists, ranks and the kept set of the CUDA kernel, csrc/cuda/results.cuh, in the emulation."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unchecked
from cases import DTYPES, LAYOUTS, build, covering_cases
from parity import build_all
from results import REQUESTS, WITH_IDS, differences, drawn, ids_for, named_tensors

from llm_sampling import BatchParams, RequestTable, SamplingParams, TokenHistory, backends, sample
from llm_sampling.backends.base import SampleCall
from llm_sampling.results import KINDS, Wanted

sys.path.append(str(Path(__file__).parent / "cuda_emulation"))
import backend as emulation

Launch = emulation.Launch
#: One block and clusters, with and without a copy, and rows that are split.
LAUNCHES = [
    Launch(1, True),
    Launch(1, False),
    Launch(2, True),
    Launch(4, False),
    Launch(8, True),
    Launch(3, copied=True, is_split=True),
    Launch(8, copied=True, is_split=True),
]
#: All results at once.
ALL = Wanted(KINDS, 20, torch.tensor([[5, -1, 7, 2**31 - 1]], dtype=torch.int32), "ids", 50)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
launches = pytest.mark.parametrize("launch", LAUNCHES, ids=str)


@pytest.fixture(scope="module")
def library(build_once):
    (built,) = build_once("cuda_emulated", emulation.build).iterdir()
    return built


@pytest.fixture
def install(monkeypatch, library):
    """A function that registers a backend for a kind of launch and returns its name."""
    return lambda launch: emulation.install(monkeypatch, library, launch)


def assert_same(batch, name, request_name):
    """Compare one batch with the reference."""
    options = dict(REQUESTS[request_name])
    if request_name in WITH_IDS:
        options["logprob_token_ids"] = ids_for(batch)
    options["num_samples"] = 3 if [*REQUESTS].index(request_name) % 2 else 1
    found = differences(drawn(batch, "torch", **options), drawn(batch, name, **options))
    rows = sorted({row for rows in found.values() for row in rows})
    assert not found, (found, [batch.describe(row) for row in rows[:3]])


@launches
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("vocab_size", [1, 33, 513, 5003, 32000], ids="V{}".format)
def test_covering_cases(install, vocab_size, request_name, launch):
    """Every row, mix, history and mask of the parity table; launches share those of many tokens."""
    number = [*REQUESTS].index(request_name)
    turn = LAUNCHES.index(launch)
    groups = covering_cases(vocab_size, vocab_size + turn + number)
    if vocab_size > 1000:
        groups = [group[(turn + number) % len(group) :: 2 * len(LAUNCHES)] for group in groups]
    dtype = DTYPES[(turn + number) % 3]
    for batch in build_all([group for group in groups if group], vocab_size, dtype, "cpu"):
        assert_same(batch, install(launch), request_name)


@launches
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(install, layout, launch):
    """Rows at any alignment, so that the words of a mask begin anywhere in a vec."""
    name = install(launch)
    for group in covering_cases(513, seed=4, rows=6)[:3]:
        batch = build(group, 513, torch.bfloat16)
        batch.logits = LAYOUTS[layout](batch.logits)
        for request_name in ("processed", "raw", "ids"):
            assert_same(batch, name, request_name)


@launches
def test_long_lists_among_ties(install, launch):
    """A guess finds too many of them, so that the list is made of ranges, one below the other."""
    vocab_size = 4001
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, vocab_size, generator=generator)
    logits[0] = logits[0].round()
    logits[1] = 0.0
    logits[2, 100:900] = 4.0
    logits[3, 50:] = -torch.inf
    params = [SamplingParams(seed=1, temperature=1.5)] * 2
    params += [SamplingParams(top_p=0.98, seed=2), SamplingParams(top_k=700, seed=3)]
    options = {
        "logprobs": KINDS,
        "top_logprobs": 1000,
        "logprob_token_ids": [0, 3, 1500, 4000],
        "kept": "ids",
        "max_kept_ids": 1024,
        "num_samples": 5,
        "check": False,
    }
    outputs = [
        sample(logits, params, backend=name, **options) for name in ("torch", install(launch))
    ]
    assert differences(*outputs) == {}


@launches
def test_rows_that_draw_nothing(install, launch):
    """Padding, slots that do not exist, rows without a candidate, and texts without room."""
    name, vocab_size, rows = install(launch), 70, 5
    table = RequestTable(2, vocab_size=vocab_size, backend="torch")
    for slot in range(2):
        table.set(slot, SamplingParams(top_k=9, seed=slot))
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    logits[3] = -torch.inf
    slots = torch.tensor([0, -1, 5, 1, 1], dtype=torch.int32)
    for kept in ("ids", "mask", "ends"):
        outputs = [
            sample(
                logits,
                table,
                slots=slots,
                logprobs=KINDS,
                top_logprobs=80,
                logprob_token_ids=[1, 70],
                kept=kept,
                num_samples=2,
                check=False,
                backend=backend,
            )
            for backend in ("torch", name)
        ]
        assert outputs[1].tokens[1:4].eq(-1).all()
        assert differences(*outputs) == {}
    history = TokenHistory.empty(rows, vocab_size, max_length=2)
    history.extend(0, [1, 2])
    call = SampleCall(
        logits,
        BatchParams.from_list([SamplingParams(top_k=3, seed=1)] * rows, positions=[0] * rows),
        history,
        None,
        wanted=ALL,
        advance=True,
    )
    output = backends.BACKENDS[name].load().sample(call)
    assert output.tokens[0] == -1
    assert output.tokens[4] >= 0
    for of, tensor in named_tensors(output):
        if of not in ("status", "tokens"):
            assert torch.equal(unchecked.bits(tensor[0]), unchecked.bits(tensor[3])), of


def assert_in_range(output, vocab_size):
    """Ids are of the row or -1, and ranks, counts and masses are no more than there can be."""
    for name, tensor in named_tensors(output):
        if name.endswith(("ids", "_id")):
            assert ((tensor >= -1) & (tensor < vocab_size)).all(), name
        elif name.endswith("ranks"):
            assert ((tensor >= -1) & (tensor <= vocab_size)).all(), name
        elif name.endswith("counts"):
            assert ((tensor >= 0) & (tensor <= vocab_size)).all(), name
        elif name.endswith(("masses", "total")):
            assert ((tensor >= 0) & (tensor <= vocab_size << 42)).all(), name


@launches
def test_hostile_values(library, launch):
    """Whatever parameters and ids there are, nothing around the row's memory is looked at."""
    backend = emulation.EmulatedBackend(library, launch)
    dtype = DTYPES[LAUNCHES.index(launch) % 3]
    for seed in range(2):
        seen = []
        for fill in (torch.nan, 0.0):
            guards = unchecked.Guards(fill)
            call = unchecked.hostile_call(guards, 700, rows=24, seed=seed, dtype=dtype)
            ids = guards.put(torch.tensor([[3, -(2**31), 700, 2**31 - 1]], dtype=torch.int32))
            output = backend.sample(replace(call, wanted=replace(ALL, token_ids=ids)))
            unchecked.assert_defined(output, 700, call.param_slots)
            assert_in_range(output, 700)
            guards.assert_whole()
            seen.append([unchecked.bits(tensor) for _, tensor in named_tensors(output)])
        assert all(map(torch.equal, *seen))


@launches
@pytest.mark.parametrize("often", [False, True], ids=["once", "often"])
@pytest.mark.parametrize("change", unchecked.CHANGES)
def test_logits_that_change(library, launch, change, often):
    """The kernel ends, and what it writes is of the row."""
    vocab_size = 1500
    turn = LAUNCHES.index(launch) + list(unchecked.CHANGES).index(change) + often
    moments = (*range(3, 40, 3), 50, 60)[turn % 3 :: 3]
    backend = emulation.EmulatedBackend(library, launch)
    call, at = unchecked.changing_call(vocab_size, moments, DTYPES[turn % 3])
    call = replace(call, wanted=ALL)
    others = unchecked.CHANGES[change](call.logits.clone())
    moments_of = torch.tensor(at, dtype=torch.int32)
    backend.overwriting = emulation.Overwriting(
        call.logits.data_ptr(), others.data_ptr(), moments_of.data_ptr(), often
    )
    output = backend.sample(call)
    unchecked.assert_defined(output, vocab_size)
    unchecked.assert_advanced(call, output)
    assert_in_range(output, vocab_size)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            "return shared_.sorted[i] >= code; });\n      }",
            "return shared_.sorted[i] > code; });\n      }",
        ),
        ("other_id <= id)", "other_id < id)"),
        ("i < found && listed + i < wanted;", "i < found - 1 && listed + i < wanted;"),
        ("bits <<= threadIdx.x % 4 * kVec;", "bits <<= (3 - threadIdx.x % 4) * kVec;"),
        ("const uint32_t lower = bits << (first & 31);", "const uint32_t lower = bits;"),
        ("    copy_logits<1>(vecs());\n", ""),
        ("    if constexpr (kMore) write_no_more(index_);\n    return write", "    return write"),
        ("is_greedy() ? kLargestMass : is_listed", "is_greedy() ? 1 : is_listed"),
        ("high = range.low;", "(void)0;"),
    ],
    ids=[
        *("rank", "ties", "short list", "bytes of a mask", "shifted mask", "scored copy"),
        *("padding", "greedy mass", "ranges"),
    ],
)
def test_what_is_wrong_is_seen(monkeypatch, tmp_path, text, wrong):
    library = emulation.build(tmp_path, emulation.BRIEF, (text, wrong))

    def install(launch):
        return emulation.install(monkeypatch, library, launch)

    def compare():
        launch = Launch(2, copied=True)
        test_long_lists_among_ties(install, launch)
        test_rows_that_draw_nothing(install, launch)
        for request_name in ("processed", "raw", "both", "ids"):
            test_covering_cases(install, 513, request_name, launch)
        test_layouts(install, "odd offset", launch)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        compare()
