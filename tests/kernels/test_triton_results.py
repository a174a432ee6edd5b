"""What the Triton kernel returns besides tokens, where lists must be searched and rows are split.

Needs Triton's interpreter; test_triton.py starts a process that has it.
"""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
import unchecked
from cases import DTYPES, LAYOUTS, Case, build, covering_cases
from parity import build_all
from results import REQUESTS, differences, drawn, ids_for

from llm_sampling import RequestTable, SamplingParams, TokenHistory, sample
from llm_sampling.backends import torch as reference_backend
from llm_sampling.backends import triton as backend
from llm_sampling.backends import triton_kernel as kernel
from llm_sampling.calls import make_call
from llm_sampling.results import without_rows

pytestmark = pytest.mark.usefixtures("triton_alone")
MANY = torch.tensor([[5, -1, 600, 601, unchecked.LEAST, unchecked.MOST, 5, 0]])
#: Each has lists of at most 64 tokens. Those that are of the kept set alone leave rows split.
OF_KEPT_SET = {
    "mask": {"logprobs": "processed", "top_logprobs": 9, "kept": "mask"},
    "ids": {"kept": "ids", "max_kept_ids": 60, "logprobs": "processed", "top_logprobs": 0},
    "ends": {"kept": "ends", "logprobs": "processed", "logprob_token_ids": MANY[0]},
    "long": {"logprobs": "processed", "top_logprobs": 64, "logprob_token_ids": MANY[0]},
}
ALL = OF_KEPT_SET | {
    "raw": {"logprobs": "raw", "top_logprobs": 64, "kept": "mask", "logprob_token_ids": MANY[0]},
    "both": {"logprobs": ("processed", "raw"), "top_logprobs": 20, "kept": "ends"},
}


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """A function after which launches have tiles of 128 tokens, and few candidates.

    It returns a list that gets an entry for each row whose parts were merged.
    """
    merged, merge = [], kernel._merged_maxima

    def count(*args):
        merged.append(1)
        return merge(*args)

    def set_launches(candidates, parts=1):
        def choose_launch(*args, splits, **options):
            return backend.Launch(128, candidates, 16, 1, 2, parts if splits else 1)

        monkeypatch.setattr(backend, "choose_launch", choose_launch)
        monkeypatch.setattr(kernel, "_merged_maxima", count)
        return merged

    return set_launches


def assert_same_results(batch, num_samples=1, **options):
    wanted, got = (
        drawn(batch, name, num_samples=num_samples, **options) for name in ("torch", "triton")
    )
    found = differences(wanted, got)
    rows = sorted({row for rows in found.values() for row in rows})
    assert not found, (found, [batch.describe(row) for row in rows[:3]])


# Every path at small sizes


@pytest.mark.parametrize("layout", ["contiguous", "aligned rows"])
@pytest.mark.parametrize("name", ALL)
def test_small_tiles(launches, name, layout):
    """Lists, ranks and masks of rows whose candidates do not fit; searches for the lists."""
    launches(candidates=64)
    turn = [*ALL].index(name)
    dtype = DTYPES[turn % 3]
    groups = [group[turn :: 2 * len(ALL)] for group in covering_cases(601, seed=31 + turn)]
    for batch in build_all([group for group in groups if group], 601, dtype, "cpu"):
        batch.logits = LAYOUTS[layout](batch.logits)
        assert_same_results(batch, 1 + 2 * (turn % 2), **ALL[name])


@pytest.mark.parametrize("mix", ["k 1", "k V-1", "p 0.99", "greedy"])
@pytest.mark.parametrize("name", ["ids", "long", "raw", "both"])
def test_ties(launches, name, mix):
    """More equal logits than candidates, in the list of the first tokens and around its end."""
    launches(candidates=64)
    rows = ["all equal", "plateau", "octaves", "huge"]
    batch = build([Case(row, mix, seed=i) for i, row in enumerate(rows)], 450, torch.float32)
    assert_same_results(batch, **ALL[name])


def test_lists_that_end_within_ties(launches):
    """The list of the first tokens ends at every place of a group of equal logits."""
    launches(candidates=64)
    x = torch.zeros(1, 300)
    x[0, [7, 130, 131, 290]] = 2.0
    x[0, ::9] += 1.0
    for number in (1, 3, 4, 5, 64):
        options = {"logprobs": ("processed", "raw"), "top_logprobs": number, "check": False}
        for params in ({}, {"top_k": 3}, {"top_k": 45}, {"min_p": 0.3}):
            wanted, got = (
                sample(x, SamplingParams(**params, seed=1), backend=name, **options)
                for name in ("torch", "triton")
            )
            assert differences(wanted, got) == {}


def test_zeros_of_both_signs(launches):
    """-0.0 is +0.0 in every order; the largest logit is one of them."""
    launches(candidates=64)
    x = torch.full((1, 300), -1.0)
    x[0, ::7], x[0, 3::14] = -0.0, 0.0
    for number in (5, 64):
        options = {"logprobs": ("raw", "processed"), "top_logprobs": number, "kept": "ends"}
        wanted, got = (
            sample(x, SamplingParams(top_k=9, seed=1), backend=of, **options)
            for of in ("torch", "triton")
        )
        assert differences(wanted, got) == {}


# Split rows


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", OF_KEPT_SET)
def test_split_rows(launches, name, parts):
    """Lists, ranks and kept sets of candidates that several programs have found."""
    merged = launches(candidates=256, parts=parts)
    rows = ("some NaN", "plateau", "normal x3", "model-like", "all -inf")
    mixes = ("greedy", "k 2", "all keep 100", "min-p 0.05", "T k p min-p")
    turn = [*OF_KEPT_SET].index(name) + parts
    cases = [
        Case(row, mixes[(turn + i) % len(mixes)], history, seed=i)
        for i, row in enumerate(rows)
        for history in ("none", "short")
    ]
    assert_same_results(build(cases, 601, DTYPES[turn % 3]), **OF_KEPT_SET[name])
    assert merged


@pytest.mark.parametrize("name", OF_KEPT_SET)
def test_split_rows_whose_candidates_do_not_fit(launches, name):
    """The program that samples the row has the columns of its own part alone."""
    merged = launches(candidates=128, parts=2)
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(5))
    x[0, :512] = 4.0
    params = [SamplingParams(min_p=0.2, seed=3)]
    wanted, got = (sample(x, params, backend=of, **OF_KEPT_SET[name]) for of in ("torch", "triton"))
    assert differences(wanted, got) == {}
    assert merged == [1]


@pytest.mark.parametrize("name", ["raw", "both"])
def test_raw_results_are_not_split(launches, name):
    merged = launches(candidates=256, parts=4)
    x = torch.randn(1, 601, generator=torch.Generator().manual_seed(5))
    sample(x, SamplingParams(top_k=5, seed=3), backend="triton", **ALL[name])
    assert merged == []


# Rows without a token


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_table(launches, name):
    """Rows of padding, of slots that do not exist, and without a candidate have nothing."""
    launches(candidates=256, parts=4)
    table = RequestTable(4, vocab_size=601, history=True)
    for slot, kind in enumerate(({"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}, {})):
        bias = {5: 6.0, 7: -torch.inf}
        table.set(slot, SamplingParams(**kind, presence_penalty=1.0, logit_bias=bias, seed=slot))
    x = torch.randn(8, 601, generator=torch.Generator().manual_seed(2)) * 3
    x[5] = -torch.inf
    slots = [1, -1, 0, 2, 9, 0, 3, -7]
    wanted, got = (
        sample(x, table, slots, backend=of, check=False, num_samples=2, **ALL[name])
        for of in ("torch", "triton")
    )
    assert differences(wanted, got) == {}
    assert got.tokens[:, 0].ge(0).tolist() == [True, False, True, True, False, False, True, False]


@pytest.mark.parametrize("name", ALL)
def test_rows_without_room(name):
    """A row whose text is full has nothing, and the others' tokens are recorded."""
    outputs = []
    x = torch.randn(2, 601, generator=torch.Generator().manual_seed(2))
    for module in (reference_backend, backend):
        history = TokenHistory.from_ids([[1, 2], [3]], vocab_size=601, max_length=2)
        params = [SamplingParams(top_p=0.9, presence_penalty=0.5, seed=1)] * 2
        call = make_call(x, params, history=history, check=False, **ALL[name])
        outputs.append(module.sample(replace(call, advance=True)))
        assert history.lengths.tolist() == [0, 1]
    assert differences(*outputs) == {}
    assert outputs[0].status.tolist() == [8, 0]


# Values that nothing has checked, logits that change


@pytest.fixture
def change_after(monkeypatch):
    """A function after which a program's logits change from its load with this number on."""
    loads = []
    loaded, start = kernel._loaded, kernel._row

    def start_counting(*args):
        loads.clear()
        return start(*args)

    def change_after(number, change):
        def load(*args):
            x = loaded(*args)
            loads.append(1)
            assert len(loads) < 2000, "a loop does not end"
            if len(loads) >= number:
                old = torch.from_numpy(x.handle.data)
                new = change(old) if len(old) else old
                x.handle.data = torch.where(old == -torch.inf, old, new).numpy()
            return x

        monkeypatch.setattr(kernel, "_row", start_counting)
        monkeypatch.setattr(kernel, "_loaded", load)

    return change_after


@pytest.mark.parametrize("change", unchecked.CHANGES)
@pytest.mark.parametrize("name", ["mask", "long", "raw", "both"])
def test_logits_that_change(launches, change_after, name, change):
    """The kernel ends, ids are of the row, and a row that has lost its token has nothing."""
    launches(candidates=64)
    each = unchecked.paths(450)
    x = torch.randn(len(each), 450, generator=torch.Generator().manual_seed(1))
    history = TokenHistory.from_ids([[]] * len(each), vocab_size=450)
    turn = [*unchecked.CHANGES].index(change) + [*ALL].index(name)
    change_after(4 + 5 * (turn % 7), unchecked.CHANGES[change])
    options = {"history": history, "check": False, "num_samples": 2}
    got = sample(x, each, backend="triton", **options, **ALL[name])
    failed = (got.status & 2) != 0
    assert torch.equal(failed, (got.tokens < 0).any(-1))
    assert differences(without_rows(got, failed), got) == {}
    for kind in (got.processed, got.raw):
        if kind is not None and kind.top_ids is not None:
            assert ((kind.top_ids >= -1) & (kind.top_ids < 450)).all()
            assert (kind.ranks <= 450).all()


def test_a_draw_that_fails_leaves_nothing(launches, monkeypatch):
    """One of several draws gives no token: the row has no results at all."""
    launches(candidates=64)
    draws, draw = [], kernel._first_beyond

    def every_second_fails(running, r, ids, w):
        draws.append(1)
        return draw(running, r if len(draws) % 2 else r + tl.sum(w, axis=0), ids, w)

    monkeypatch.setattr(kernel, "_first_beyond", every_second_fails)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(top_k=5, seed=1), SamplingParams(temperature=0)]
    for options in ALL.values():
        got = sample(x, params, backend="triton", check=False, num_samples=2, **options)
        assert got.status.tolist() == [2, 0]
        failed = torch.tensor([True, False])
        assert differences(without_rows(got, failed), got) == {}
        assert (got.tokens[1] >= 0).all()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by row"])
def test_ids_that_no_token_has(shared):
    """They are padding, and no address is made of them."""
    x = torch.randn(3, 601, generator=torch.Generator().manual_seed(1))
    ids = MANY[0] if shared else torch.cat([MANY, MANY.flip(1), MANY + 1])
    params = [SamplingParams(top_k=50, seed=1)] * 3
    for options in (ALL["both"], {**ALL["ends"], "top_logprobs": 0}):
        options = {**options, "logprob_token_ids": ids.clamp(-(2**31), 2**31 - 1)}
        wanted, got = (sample(x, params, backend=of, **options) for of in ("torch", "triton"))
        assert differences(wanted, got) == {}


def test_two_kinds_without_lists():
    batch = build([Case("normal", "k 2", seed=1), Case("some NaN", "p 0.5", seed=2)], 300)
    assert_same_results(batch, 3, logprobs=("raw", "processed"))


def test_requests_of_the_interpreter_fit_the_candidates():
    """The longest lists there are fit a launch's candidates."""
    launch = backend.choose_launch(128256, 1, torch.float32, extras=True)
    assert max(options.get("top_logprobs", 0) for options in REQUESTS.values()) == 1024
    assert launch.candidates >= 1024
    assert ids_for(build([Case("normal", "k 2", seed=1)], 300)).shape == (1, 5)
