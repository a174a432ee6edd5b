"""Rows that are split over programs of the Triton kernel: the same tokens, whatever the parts are.

Needs Triton's interpreter; test_triton.py starts a process that has it. It runs programs one after
another, so that these tests say nothing about the order of memory; test_triton_compile.py does.
"""

import functools
from dataclasses import replace

import pytest
import torch
import triton.language as tl
import unchecked
from cases import DTYPES, LAYOUTS, Case, build, covering_cases
from histories import KINDS, assert_drawings, assert_same_state
from param_slots import assert_by_slot
from parity import assert_parity, build_all

from llm_sampling import RequestTable, Sampler, SamplingParams, TokenHistory, sample
from llm_sampling.backends import triton as backend
from llm_sampling.backends import triton_kernel as kernel
from llm_sampling.results import NOTHING

pytestmark = pytest.mark.usefixtures("triton_alone")


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


class Split:
    """Rows are split from now on into so many parts, with tiles of 128 tokens.

    Attributes:
        rows: the rows whose parts were merged, one after another.
        searches: how many searches there were.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch, self.rows, self.searches = monkeypatch, [], 0
        run, merged_maxima, search = backend._run, kernel._merged_maxima, kernel._search

        def run_and_check(call, launch, memory, *rest):
            run(call, launch, memory, *rest)
            counters = memory.counters
            assert (counters is None) == (launch.parts == 1)
            assert counters is None or not counters.any(), "the next launch needs zeros"

        def merge(*args):
            self.rows.append(row_of_program())
            return merged_maxima(*args)

        def count(*args):
            self.searches += 1
            return search(*args)

        monkeypatch.setattr(backend, "_run", run_and_check)
        monkeypatch.setattr(kernel, "_merged_maxima", merge)
        monkeypatch.setattr(kernel, "_search", count)

    def __call__(self, parts, candidates=256):
        def choose_launch(*args, splits, **options):
            return backend.Launch(
                tile=128,
                candidates=candidates,
                nucleus=16,
                num_warps=1,
                num_stages=2,
                parts=parts if splits else 1,
            )

        self.monkeypatch.setattr(backend, "choose_launch", choose_launch)


def row_of_program():
    """Return the row of the program that the interpreter runs now."""
    return int(tl.program_id(0).handle.data.item())


@pytest.fixture
def split(monkeypatch):
    return Split(monkeypatch)


def assert_same_draws(x, params, num_samples=4, **options):
    """Check tokens, status and logprobs of the rows."""
    options |= {"num_samples": num_samples, "logprobs": "processed", "check": False}
    wanted, got = (sample(x, params, backend=name, **options) for name in ("torch", "triton"))
    assert torch.equal(got.tokens, wanted.tokens), (got.tokens, wanted.tokens)
    assert torch.equal(got.status, wanted.status), (got.status, wanted.status)
    torch.testing.assert_close(got.logprobs, wanted.logprobs, rtol=0, atol=1e-5, equal_nan=True)
    return got


# Which rows


def test_rows_of_both_kinds_in_one_launch(split):
    """601 tokens; with 4 parts and 256 candidates, filters may need 42 tokens of a part."""
    split(parts=4)
    rows = [
        (True, {"temperature": 0}),
        (True, {"temperature": 0, "top_p": 0.5}),
        (False, {}),
        (True, {"top_k": 1}),
        (True, {"top_k": 5, "top_p": 0.9}),
        (True, {"top_k": 5, "min_p": 0.1, "temperature": 2.0}),
        (True, {"top_k": 9, "top_p": 0.8, "min_p": 0.01, "min_tokens_to_keep": 3}),
        (True, {"min_p": 0.1}),
        (True, {"min_p": 0.9, "min_tokens_to_keep": 20}),
        (False, {"min_p": 0.9, "min_tokens_to_keep": 43}),
        (False, {"top_p": 0.9}),
        (False, {"top_p": 0.9, "min_p": 0.1}),
        (True, {"top_k": 42}),
        (False, {"top_k": 43}),
        (False, {"top_k": 5, "min_tokens_to_keep": 43}),
        (False, {"top_k": 600}),
        (False, {"top_k": 601}),
        (True, {"top_k": 700, "min_p": 0.1}),  # such a k keeps all
    ]
    x = torch.randn(len(rows), 601, generator=torch.Generator().manual_seed(1)) * 3
    params = [SamplingParams(**of_row, seed=seed) for seed, (_, of_row) in enumerate(rows)]
    for times in range(1, 3):
        assert_same_draws(x, params)
        assert split.rows == [row for row, (is_split, _) in enumerate(rows) if is_split] * times
    assert split.searches > 0, "rows whose candidates do not fit are searched by one program"


@pytest.mark.parametrize(
    ("params", "is_split"), [({"temperature": 0}, True), ({}, False)], ids=["greedy", "unfiltered"]
)
def test_batches_without_filters(split, params, is_split):
    split(parts=4)
    x = torch.randn(3, 601, generator=torch.Generator().manual_seed(1))
    x[0, 100], x[0, 500], x[1, 300:] = 9.0, 9.0, torch.nan
    assert_same_draws(x, [SamplingParams(**params, seed=seed) for seed in range(3)])
    assert split.rows == ([0, 1, 2] if is_split else [])


def test_calls_that_are_not_split(split):
    """Raw logprobs and filtered logits take a pass over the row that one program does."""
    split(parts=4)
    x = torch.randn(1, 601, generator=torch.Generator().manual_seed(1))
    sample(x, SamplingParams(top_k=5, seed=1), logprobs="raw", backend="triton")
    assert split.rows == []


# Every kind of row


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float16, "aligned rows"),
        (torch.bfloat16, "padded rows"),
    ],
    ids=str,
)
def test_parity(split, parts, dtype, layout):
    """Every row, mix, history and mask; 601 tokens are 5 tiles, fewer than 16 parts."""
    split(parts)
    groups = [group[parts % 3 :: 3] for group in covering_cases(601, seed=parts)]
    batches = list(build_all(groups, 601, dtype, "cpu"))
    for batch in batches:
        batch.logits = LAYOUTS[layout](batch.logits)
    assert_parity(batches, "triton")
    assert split.rows


@pytest.mark.parametrize("mix", ["greedy", "k 2", "all keep 100", "min-p 0.05", "T k p min-p"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parity_of_hard_rows(split, parts, mix):
    """Ties across parts, a part of many equal logits, NaN and infinities, few candidates."""
    split(parts, candidates=1024)
    names = ["all equal", "plateau", "octaves", "deep tail", "huge"]
    batch = build([Case(name, mix, seed=i) for i, name in enumerate(names)], 450, torch.float32)
    assert_parity([batch], "triton")
    assert len(split.rows) >= len(names)


def test_ties_and_extremes(split):
    """The row's first tokens in every part, in one, at the ends of parts, and too few of them."""
    split(parts=4)
    x = torch.randn(9, 601, generator=torch.Generator().manual_seed(5)).clamp(max=3)
    x[0, ::50] = 5.0
    x[1, 128:140] = 5.0
    x[2, [0, 127, 128, 255, 256, 511, 512, 600]] = 5.0
    x[3, 7:] = -torch.inf
    x[4, [130, 400]] = torch.inf
    x[5, ::2] = torch.nan
    x[6] = -torch.inf
    x[7] = torch.nan
    x[8, [5, 599]] = 4.0
    kinds = [{"top_k": 6}, {"top_k": 8, "top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0}]
    params = [SamplingParams(**kind, seed=seed) for kind in kinds for seed in range(9)]
    got = assert_same_draws(x.repeat(len(kinds), 1), params)
    assert set(got.status.tolist()) == {0, 1, 2, 3, 4}
    assert split.rows == list(range(36))


def test_a_part_with_more_candidates_than_fit(split):
    """It matters only where one of them is among the row's first tokens."""
    split(parts=2, candidates=128)
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(5))
    x[0, 512:] = -4.0  # a list of 512 tokens, none of which is needed
    params = SamplingParams(top_k=9, top_p=0.9, seed=3)
    assert_same_draws(x, params)
    assert_same_draws(x, SamplingParams(min_p=0.2, seed=3))
    assert split.rows == [0, 0]
    assert split.searches == 0
    x[0, 512:] = 4.0
    assert_same_draws(x, params)
    assert split.searches == 1


def test_the_division_that_one_part_needs_is_used_for_the_whole_row(split):
    """A search divides a logit of the first part, where 2.2e38 / 0.5 is +inf, after the last part.

    Two corrections of a product would make it NaN. The last part has more of +inf than fit.
    """
    split(parts=2, candidates=128)
    x = torch.zeros(1, 1024)
    x[0, 5] = 2.2e38
    x[0, 512:] = torch.inf
    history = TokenHistory.from_ids([[5]], vocab_size=1024)
    params = SamplingParams(top_k=2, repetition_penalty=0.5, seed=1)
    got = assert_same_draws(x, params, num_samples=16, history=history)
    assert set(got.tokens.flatten().tolist()) == {5, 512}
    assert split.rows == [0]
    assert split.searches == 1


# Steps


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_steps_of_a_sampler(split, kind):
    """Prepared calls that record: every row's tokens and state, and counters that are 0 again."""
    split(parts=4)
    generator = torch.Generator().manual_seed(2)
    each = [{"temperature": 0}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 400}]
    params = [
        SamplingParams(**filters, frequency_penalty=0.3, presence_penalty=0.2, seed=seed)
        for seed, filters in enumerate(each)
    ]
    samplers = [
        Sampler(
            params,
            vocab_size=601,
            history=TokenHistory.from_ids([[3, 500]] * len(each), vocab_size=601),
            backend=name,
        )
        for name in ("torch", "triton")
    ]
    for step in range(4):
        x = torch.randn(len(each), 601, generator=generator) * 2
        mask = torch.randint(-(2**31), 2**31, (len(each), 19), generator=generator).int()
        given = mask if kind == "masked" and step % 2 else None
        wanted, got = (one(x, allowed_mask=given) for one in samplers)
        assert torch.equal(got.tokens, wanted.tokens)
        assert torch.equal(got.status, wanted.status)
        assert_same_state(samplers[1].history, samplers[0].history)
        assert torch.equal(samplers[1].positions, samplers[0].positions)
    assert split.rows == [0, 1, 3] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", [0, 2, 3, 5])
def test_calls_that_record(split, kind, turn):
    """Texts, windows, full texts, slots, rows that are not recorded, ids for one call."""
    split(parts=2)
    assert_drawings(backend, kind, 300, seed=turn, device="cpu", turns=[turn])
    assert split.rows


@pytest.mark.parametrize("position_of", ["row", "slot", "text"])
def test_parameters_of_slots(split, position_of):
    """With rows of padding, rows of slots that do not exist, and slots of several rows."""
    split(parts=4)
    turn = ["row", "slot", "text"].index(position_of)
    groups = [group[turn::8] for group in covering_cases(450, seed=7)]
    assert_by_slot(build_all(groups, 450, torch.float32, "cpu"), backend, position_of)
    assert split.rows


def test_requests_of_a_table(split):
    """A table's parameters change between steps, and so do the rows that are split."""
    split(parts=4)
    table = RequestTable(4, vocab_size=601, history=True)
    x = torch.randn(3, 601, generator=torch.Generator().manual_seed(2))
    for kind in ({"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}):
        params = [SamplingParams(**kind, seed=seed) for seed in range(2)]
        for slot in range(2):
            table.set(slot, params[slot])
        got = sample(x, table, [1, -1, 0], backend="triton")
        wanted = sample(x[[2, 0]], params, backend="torch")
        assert got.tokens.tolist() == [wanted.tokens[1], -1, wanted.tokens[0]]
    assert set(split.rows) == {0, 1, 2}


# Values that nothing has checked, logits that change


@pytest.fixture
def most_steps(monkeypatch):
    """Ends a program with an error once it seems to be in a loop without an end."""
    steps = []

    def count(function):
        def counted(*args):
            steps.append(1)
            assert len(steps) < 5000, "a loop does not end"
            return function(*args)

        return counted

    def start(*args, row=kernel._row):
        steps.clear()
        return row(*args)

    for name in ("_narrowed", "_loaded", "_append"):
        monkeypatch.setattr(kernel, name, count(getattr(kernel, name)))
    monkeypatch.setattr(kernel, "_row", start)


@pytest.fixture
def guard(monkeypatch):
    """A function that puts the memory that the wrapper allocates into guards."""
    make_results = backend.make_results

    def guard(guards):
        def guarded(*args, make):
            made = make(*args)
            return None if made is None else guards.put(made)

        monkeypatch.setattr(
            backend, "make_results", lambda call: guards.put_results(make_results(call))
        )
        for name in ("_workspace", "_counters"):
            make = functools.partial(guarded, make=getattr(backend, name))
            monkeypatch.setattr(backend, name, make)

    return guard


@pytest.mark.parametrize("seed", range(6))
def test_hostile_values(split, most_steps, guard, seed):
    split(parts=4)
    unchecked.assert_hostile_values_do_no_harm(
        backend, 450, rows=8, seed=seed, dtype=DTYPES[seed % 3], guard=guard
    )


@pytest.mark.parametrize("value", [unchecked.LEAST, -1, 0, 257, 10**6, unchecked.MOST])
@pytest.mark.parametrize("what", ["key", "first token", "flags", "bound", "count"])
def test_whatever_is_in_a_header(split, most_steps, guard, monkeypatch, what, value):
    """Nothing outside of the memory is read or written, and every token is one of the row.

    The places of 4 lists are as many as the candidates 4 times, which are appended at once.
    """
    split(parts=4)
    hand_over, append, merge = kernel._hand_over, kernel._append, kernel._merged_lists
    appended = []

    def count(*args):
        appended.append(1)
        return append(*args)

    def merge_and_count(*args):
        appended.clear()
        merged = merge(*args)
        assert len(appended) <= 4, "places that no list has"
        return merged

    place = ["key", "first token", "flags", "bound", "count"].index(what)

    def wrong(*args):
        hand_over(*args)
        *_, workspace, config = args
        tl.store(workspace + (config.header + place), value)

    monkeypatch.setattr(kernel, "_hand_over", wrong)
    monkeypatch.setattr(kernel, "_append", count)
    monkeypatch.setattr(kernel, "_merged_lists", merge_and_count)
    call, _ = unchecked.changing_call(450, (1,), torch.float32)
    call = replace(call, wanted=NOTHING)
    guards = unchecked.Guards(torch.nan)
    guard(guards)
    workspace = backend._workspace
    monkeypatch.setattr(backend, "_workspace", lambda *args: workspace(*args).zero_())
    output = backend.sample(call)
    assert split.rows
    guards.assert_whole()
    assert ((output.tokens >= -1) & (output.tokens < 450)).all()
    unchecked.assert_advanced(call, output)


def test_programs_that_do_not_decide_alike(split, guard, monkeypatch):
    """As where parameters are overwritten meanwhile: all are counted, so the next step is right."""
    split(parts=4)
    params = [SamplingParams(top_k=5, seed=seed) for seed in range(8)]
    x = torch.randn(8, 601, generator=torch.Generator().manual_seed(2))
    guards = unchecked.Guards(torch.nan)
    guard(guards)
    sampler = Sampler(params, vocab_size=601, backend="triton", check=False)
    decide = kernel._may_be_split

    def decide_otherwise(is_greedy, *args):
        row, part = row_of_program(), int(tl.program_id(1).handle.data.item())
        return tl.full((), 0, tl.int1) if part in (row % 4, row // 2) else decide(is_greedy, *args)

    monkeypatch.setattr(kernel, "_may_be_split", decide_otherwise)
    sampler(x)
    guards.assert_whole()
    monkeypatch.setattr(kernel, "_may_be_split", decide)
    split.rows.clear()
    positions = sampler.positions.clone()
    wanted = sample(x, params, positions=positions, backend="torch")
    assert torch.equal(sampler(x).tokens, wanted.tokens)
    assert split.rows == list(range(8))


@pytest.mark.parametrize("change", unchecked.CHANGES)
@pytest.mark.parametrize("at", [2, 3, 4])
def test_logits_that_change(split, most_steps, guard, monkeypatch, change, at):
    """At that load of each program; the first two are pass 1 of a part."""
    split(parts=2)
    loads = []
    loaded, start = kernel._loaded, kernel._row

    def start_counting(*args):
        loads.clear()
        return start(*args)

    def load(*args):
        x = loaded(*args)
        loads.append(1)
        if len(loads) >= at:
            old = torch.from_numpy(x.handle.data)
            new = unchecked.CHANGES[change](old) if len(old) else old
            x.handle.data = torch.where(old == -torch.inf, old, new).numpy()
        return x

    monkeypatch.setattr(kernel, "_row", start_counting)
    monkeypatch.setattr(kernel, "_loaded", load)
    call, _ = unchecked.changing_call(450, (1,), torch.float32)
    call = replace(call, wanted=NOTHING)
    guards = unchecked.Guards(torch.nan)
    guard(guards)
    output = backend.sample(call)
    assert split.rows
    guards.assert_whole()
    unchecked.assert_defined(output, 450)
    unchecked.assert_advanced(call, output)
