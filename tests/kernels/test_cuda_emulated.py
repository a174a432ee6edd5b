"""Do the CUDA kernels equal the reference? Their device code runs in tests/kernels/cuda_emulation/.

Every kind of launch is tested: one block or a cluster, with and without a copy in shared memory.
Each call runs the threads in another order.
"""

import ctypes
import functools
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import unchecked
from cases import DTYPES, LAYOUTS, SMALL_VOCABS, Case, build, covering_cases, every_case
from histories import KINDS, assert_drawings, assert_updates, with_text
from param_slots import assert_by_slot
from parity import assert_more_than_there_are, assert_parity, assert_same, build_all, run
from ruled_rows import GIVEN, Rows, assert_as_the_reference

from llm_sampling import (
    BatchParams,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    filter_logits,
    sample,
)
from llm_sampling.backends.base import PositionOf, SampleCall

sys.path += [
    str(Path(__file__).parent / "cuda_emulation"),
    str(Path(__file__).parents[1] / "sampling"),
]
import backend as emulation
import vectors

Launch = emulation.Launch
LAUNCHES = [Launch(blocks, copied) for blocks in (1, 2, 4, 8) for copied in (True, False)]
SPLIT = [Launch(parts, copied=True, is_split=True) for parts in (3, 8)]
#: For tests of all vocabularies or layouts.
FEW = [Launch(1, True), Launch(1, False), Launch(2, True), SPLIT[0]]

SANITIZED = emulation.SANITIZED

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
launches = pytest.mark.parametrize(
    "launch",
    LAUNCHES + SPLIT,
    ids=lambda launch: f"{launch.blocks}{'s' if launch.is_split else 'c' if launch.copied else ''}",
)


not_inside = pytest.mark.skipif(SANITIZED is not None, reason="this process is one that it starts")


@pytest.fixture(scope="module")
def library(build_once):
    if SANITIZED:
        return Path(SANITIZED)
    (built,) = build_once("cuda_emulated", emulation.build).iterdir()
    return built


@pytest.fixture
def install(monkeypatch, library):
    """A function that registers a backend for a kind of launch and returns its name."""
    return lambda launch: emulation.install(monkeypatch, library, launch)


@dtypes
@pytest.mark.parametrize("launch", FEW, ids=str)
@pytest.mark.parametrize(
    "vocab_size",
    [
        pytest.param(size, marks=[] if size in (1, 33, 513) else [pytest.mark.slow])
        for size in SMALL_VOCABS
    ],
    ids="V{}".format,
)
def test_covering_cases(install, vocab_size, launch, dtype):
    seed = vocab_size + 10 * DTYPES.index(dtype) + 100 * launch.blocks + launch.copied
    groups = covering_cases(vocab_size, seed)
    name = install(launch)
    assert_parity(build_all(groups, vocab_size, dtype, "cpu"), name, ("processed", "raw"))


@pytest.mark.slow
@pytest.mark.parametrize("launch", FEW, ids=str)
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
def test_every_case(install, vocab_size, launch):
    """Every row with every mix of parameters; the dtypes of a size take turns over the launches."""
    turn = SMALL_VOCABS.index(vocab_size) + launch.blocks + launch.copied
    dtype = DTYPES[turn % 3]
    batches = build_all(every_case(vocab_size, histories_each=2), vocab_size, dtype, "cpu")
    assert_parity(batches, install(launch))


@launches
@pytest.mark.parametrize("vocab_size", [5003, 32000, 128256], ids="V{}".format)
def test_every_launch(install, vocab_size, launch):
    """Too many candidates, searches, draws by tiles; each launch has rows of other cases."""
    turn = (LAUNCHES + SPLIT).index(launch)
    dtype = DTYPES[turn % 3]
    groups = covering_cases(vocab_size, seed=vocab_size)
    step = len(LAUNCHES) * (1 if vocab_size < 100_000 else 2)
    groups = [group[turn % len(group) :: step] for group in groups]
    assert_parity(build_all(groups, vocab_size, dtype, "cpu"), install(launch))


@launches
@pytest.mark.parametrize("vocab_size", [1, 7, 600, 5003])
def test_rules_that_look_at_the_history(install, vocab_size, launch):
    """Rows with a penalty, a list, both or none; tokens that are seen, listed, both or neither."""
    turn = (LAUNCHES + SPLIT).index(launch)
    rows = Rows(vocab_size + turn, vocab_size, DTYPES[turn % 3])
    name = install(launch)
    for given in GIVEN:
        assert_as_the_reference(rows, name, given)


@pytest.mark.parametrize("launch", FEW, ids=str)
def test_answers_where_the_order_of_ids_matters(install, launch):
    """Those of an independent program, in tests/sampling/vectors_family.json."""
    name = install(launch)
    for row in vectors.load_family():
        logits, params, history = vectors.logits_and_history(row)
        options = {"history": history, "positions": [row["position"]], "check": False}
        drawn = sample(logits, params, **options, num_samples=4, backend=name)
        assert drawn.tokens[0].tolist() == row["tokens"], row
        assert drawn.status.tolist() == [row["status"]]


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(install, layout, dtype):
    """Rows at any alignment, with NaN and +inf before and after them in memory."""
    for group in covering_cases(513, seed=3, rows=6):
        batch = build(group, 513, dtype)
        expected = run(batch, "torch", ())
        batch.logits = LAYOUTS[layout](batch.logits)
        for launch in FEW:
            name = install(launch)
            assert_same(batch, name, expected, run(batch, name, ()), f"{layout} {launch}")


@pytest.mark.parametrize("position_of", ["row", "slot", "text"])
@launches
def test_parameters_of_slots(library, launch, position_of):
    """Rows of padding, rows that share a slot, and slots that do not exist are among the rows."""
    turn = (LAUNCHES + SPLIT).index(launch)
    groups = covering_cases(513, seed=turn, rows=12)
    backend = emulation.EmulatedBackend(library, launch)
    assert_by_slot(build_all(groups, 513, DTYPES[turn % 3], "cpu"), backend, position_of)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
def test_every_case_by_slot(library, vocab_size):
    """The kinds of positions, the launches and the dtypes take turns over the sizes."""
    turn = SMALL_VOCABS.index(vocab_size)
    position_of = get_args(PositionOf)[turn % 3]
    backend = emulation.EmulatedBackend(library, LAUNCHES[turn % len(LAUNCHES)])
    batches = build_all(every_case(vocab_size, 2), vocab_size, DTYPES[turn // 3 % 3], "cpu")
    assert_by_slot(batches, backend, position_of)


@launches
def test_orders_of_threads(install, launch):
    """21 orders of threads, on rows that take every path of the kernel."""
    name = install(launch)
    mixes = ("plain", "k 50", "p 0.9", "T k p min-p", "all keep 100", "k V-1")
    rows = ("normal", "all equal", "plateau")
    cases = [
        Case(row, mix, seed=i) for i, (row, mix) in enumerate(zip(rows * 2, mixes, strict=True))
    ]
    batch = build(cases, 3001, torch.float32)
    expected = run(batch, "torch", ())
    for _ in range(7):  # three seeds each
        assert_same(batch, name, expected, run(batch, name, ()), str(launch))


@launches
@pytest.mark.parametrize("seen", [2047, 2048, 2049, 4000, 9000])
def test_more_seen_tokens_than_have_scores(install, launch, seen):
    """A block keeps at most 2,048 scores; here the first block has nearly all seen tokens."""
    vocab_size = 9000
    params = [
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, seed=1, **filters)
        for filters in ({"top_p": 0.9}, {"top_k": 50, "min_p": 0.1}, {"temperature": 0.0}, {})
    ]
    rows = len(params)
    ids = list(range(seen))
    history = TokenHistory.from_ids([ids] * rows, [[*ids[::7], 8999]] * rows, vocab_size)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seen))
    logits[:, seen // 2] = 9.0
    drawn = [
        sample(logits, params, history=history, num_samples=8, backend=name, check=False)
        for name in ("torch", install(launch))
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert torch.equal(drawn[0].status, drawn[1].status)


@dtypes
@pytest.mark.parametrize("launch", FEW, ids=str)
@pytest.mark.parametrize("vocab_size", [33, 501])
def test_bits_beyond_the_vocabulary(install, vocab_size, launch, dtype):
    """The last words of bitmasks have bits that belong to no token; they must be ignored."""
    rows = 3
    params = [
        SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, seed=s) for s in (1, 2, 3)
    ]
    history = TokenHistory.from_ids([[0, vocab_size - 1]] * rows, [[5]] * rows, vocab_size)
    beyond = -1 << vocab_size % 32
    history.seen[:, -1] |= beyond
    mask = torch.full((rows, (vocab_size + 31) // 32), -1, dtype=torch.int32)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = [
        sample(
            logits,
            params,
            history=history,
            allowed_mask=mask,
            num_samples=8,
            logprobs="processed",
            backend=name,
            check=False,
        )
        for name in ("torch", install(launch))
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert torch.equal(drawn[0].status, drawn[1].status)


@launches
def test_more_than_there_are(install, launch):
    assert_more_than_there_are(install(launch))


@launches
def test_steps_advance_the_history(install, launch):
    """The drawn token is in the history before the next step."""
    rows, vocab_size = 3, 700
    params = [
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, seed=s) for s in range(rows)
    ]
    samplers = []
    for name in ("torch", install(launch)):
        history = TokenHistory.from_ids([[1, 2]] * rows, [[3]] * rows, vocab_size)
        samplers.append(
            (
                Sampler(params, vocab_size=vocab_size, history=history, backend=name, check=False),
                history,
            )
        )
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        logits = torch.randn(rows, vocab_size, generator=generator)
        logits[2] = -torch.inf
        (wanted, wanted_history), (got, got_history) = samplers
        assert torch.equal(got(logits).tokens, wanted(logits).tokens)
        assert torch.equal(got.positions, wanted.positions)
        for state in ("seen", "counts", "lengths"):
            assert torch.equal(getattr(got_history, state), getattr(wanted_history, state)), state


@launches
def test_steps_of_many_draws(install, launch):
    """Steps with num_samples > 1, which only the C interface has: the history gets draw 0."""

    def draw(name):
        params = [SamplingParams(frequency_penalty=2.0, seed=s) for s in range(4)]
        history = TokenHistory.from_ids([[1]] * 4, [[2, 3]] * 4, 40)
        logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
        batch = BatchParams.from_list(params, positions=[0] * 4)
        call = SampleCall(logits, batch, history, None, num_samples=16, advance=True)
        backend = backends.BACKENDS[name].load()
        return torch.stack([backend.sample(call).tokens for _ in range(8)])

    assert torch.equal(draw(install(launch)), draw("cpu"))


# Texts, windows, ids that count for one call, updates

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 5003], ids="V{}".format)
def test_updates(library, vocab_size, kind):
    backend = emulation.EmulatedBackend(library, LAUNCHES[0])
    for seed in range(3):
        assert_updates(backend, kind, vocab_size, seed, "cpu")


@kinds
@launches
def test_histories_of_every_kind(library, launch, kind):
    """Each launch has histories and ids of its own, over a vocabulary of another size."""
    turn = 3 * (LAUNCHES + SPLIT).index(launch) + KINDS.index(kind)
    backend = emulation.EmulatedBackend(library, launch)
    sizes = (33, 1000, 1, 5003 if launch.blocks == 1 else 33)
    assert_drawings(backend, kind, sizes[turn % 4], turn, "cpu")


def assert_an_id_is_left_behind(backend):
    """Two ids move a window of six; one of the two that leave is in it a second time."""
    vocab_size, ids = 33, [3, 8, 7, 3, 9, 10]
    history = TokenHistory.empty(1, vocab_size, max_length=9)
    windows = torch.tensor([6], dtype=torch.int32)
    history = with_text(history, history.text._replace(windows=windows))
    history.extend(0, ids)
    params = SamplingParams(repetition_penalty=1.7, frequency_penalty=0.3, seed=1)
    call = SampleCall(
        logits=torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)),
        batch=BatchParams.from_list([params], positions=[0]),
        history=history,
        allowed_mask=None,
        extra_output=torch.tensor([[11, -1, 12]], dtype=torch.int32),
    )
    wanted = backends.BACKENDS["torch"].load().filter_logits(call)
    without = backends.BACKENDS["torch"].load().filter_logits(replace(call, extra_output=None))
    assert (wanted != without).nonzero()[:, 1].tolist() == [3, 8, 11, 12]
    assert torch.equal(backend.filter_logits(call), wanted)


@launches
def test_an_id_that_leaves_the_window_is_left_behind(library, launch):
    assert_an_id_is_left_behind(emulation.EmulatedBackend(library, launch))


@launches
def test_ids_for_one_call_among_more_seen_tokens_than_have_scores(install, launch):
    """The counts of tokens without a score are looked up again, with the ids of the call."""
    vocab_size, rows = 9000, 3
    params = [SamplingParams(frequency_penalty=1.5, top_k=40, seed=s) for s in range(rows)]
    outputs = [list(range(0, 9000, 2))] * rows
    history = TokenHistory.from_ids([[1]] * rows, outputs, vocab_size)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    best = logits.topk(64).indices.to(torch.int32)
    call = SampleCall(
        logits=logits,
        batch=BatchParams.from_list(params, positions=[0] * rows),
        history=history,
        allowed_mask=None,
        num_samples=8,
        extra_output=best.contiguous(),
    )
    outputs = [backends.BACKENDS[name].load().sample(call) for name in ("torch", install(launch))]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    without = backends.BACKENDS["torch"].load().sample(replace(call, extra_output=None))
    assert not torch.equal(without.tokens, outputs[0].tokens)


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("if (!shared_.leaving_id_stays) {", "if (true) {"),
        ("any_left = __syncthreads_count(has_left) > 0;", "any_left = true;"),
        ("    penalties.repetition = -penalties.repetition;\n", ""),
        ("if (entry >= 0) shared_.listing.stays[entry] = 1;", "(void)entry;"),
        ("if (place < begin) id = -1;", "(void)place;"),
        ("history_.counts[i] = 0;\n    __syncthreads();", "history_.counts[i] = 0;"),
        ("index >= 0 && is_text_full(args_, index_)", "false"),
    ],
    ids=["leaving bit", "cleared", "scope", "stays", "extra", "filled", "full"],
)
def test_wrong_histories_are_seen(tmp_path, text, wrong):
    """Without one of its rules or barriers, a kernel gives other histories or other tokens."""
    library = emulation.build(tmp_path, emulation.BRIEF, (text, wrong), is_float32_alone=True)
    backend = emulation.EmulatedBackend(library, Launch(2, True))

    def compare():
        assert_an_id_is_left_behind(backend)
        for seed in range(4):
            for kind in KINDS:
                assert_updates(backend, kind, 1000, seed, "cpu")
            assert_drawings(backend, "windows", 33, seed, "cpu")

    with pytest.raises(AssertionError):
        compare()


# Rules that look at the history


@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.4, "presence_penalty": 0.3}])
@pytest.mark.parametrize("launch", FEW, ids=str)
def test_more_listed_tokens_than_have_scores(install, launch, penalties):
    """Of 5,003 tokens DRY lowers 3,000, more than a block keeps the scores of."""
    ids = torch.randperm(4000, generator=torch.Generator().manual_seed(2)).tolist()
    text = [token for pair in zip(ids[:3000], [4001] * 3000, strict=True) for token in pair]
    history = TokenHistory.from_ids([text, text], None, 5003, max_length=6100)
    logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(4))
    logits[:, ids[:3000]] += 2
    rows = [
        SamplingParams(dry_multiplier=1.5, dry_allowed_length=1, seed=1, **penalties),
        SamplingParams(no_repeat_ngram_size=2, top_p=0.9, seed=2, **penalties),
    ]
    drawn = [
        sample(
            logits,
            rows,
            history=history,
            num_samples=16,
            backend=name,
            logprobs="processed",
            check=False,
        )
        for name in ("torch", install(launch))
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    torch.testing.assert_close(drawn[0].logprobs, drawn[1].logprobs, rtol=0, atol=1e-5)
    assert drawn[0].tokens[1].tolist() != drawn[0].tokens[0].tolist()
    off = [replace(row, dry_multiplier=0, no_repeat_ngram_size=0) for row in rows]
    without = sample(logits, off, history=history, num_samples=16).tokens
    assert ((without != drawn[0].tokens).any(-1)).all()


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("if (!row_.has_list || is_seen(id)) x =", "x ="),
        (
            "bits |= own.word_at(first, row_.vocab_size)",
            "bits |= 0 & own.word_at(first, row_.vocab_size)",
        ),
        ("list.before[id >> 5] + __popc", "__popc"),
        ("return lowered(x, list.amounts[place]);", "return x - list.amounts[place];"),
        (
            "if (entry >= 0) return (shared_.overrides.keys",
            "if (entry < -1) return (shared_.overrides.keys",
        ),
        ("const bool has_unscored = row_.has_marks()", "const bool has_unscored = row_.seen.words"),
        ("args_.list_counts[index_] > 0", "args_.list_counts[index_] > 1"),
    ],
    ids=["not seen", "no marks", "places", "bans", "extra ids", "alone", "a single entry"],
)
def test_wrong_lists_are_seen(monkeypatch, tmp_path, text, wrong):
    """Without one of its rules, a kernel lowers other logits. (The maker: test_cuda_rules.py.)"""
    library = emulation.build(tmp_path, emulation.BRIEF, (text, wrong), is_float32_alone=True)

    def compare():
        for launch in (Launch(1, False), Launch(2, True)):
            name = emulation.install(monkeypatch, library, launch)
            for seed in range(20):
                for given in GIVEN:
                    assert_as_the_reference(Rows(seed, 600, torch.float32), name, given)

    with pytest.raises(AssertionError):
        compare()


# Bans, filtered logits that are shifted


@launches
def test_bans(install, launch):
    """A ban hides NaN and +inf, alone and beside bans and biases of the same vec."""
    vocab_size = 300
    x = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(3))
    x[:, 40], x[:, 41], x[:, 299] = torch.nan, torch.inf, 9.0
    banned = {40: -torch.inf, 41: -torch.inf}
    biases = [banned, {**banned, 42: 5.0, 299: -torch.inf}, {41: -torch.inf}, {40: 3.0}]
    params = [SamplingParams(logit_bias=bias, top_k=9, seed=1) for bias in biases]
    drawn = [
        sample(x, params, num_samples=8, backend=name, check=False)
        for name in ("torch", install(launch))
    ]
    assert drawn[1].status.tolist() == [0, 0, 1, 5]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert torch.equal(drawn[0].status, drawn[1].status)


@launches
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_filtered_logits_without_a_finite_quotient(install, launch, filters):
    x, params = unchecked.rows_without_a_finite_quotient(filters)
    wanted = filter_logits(x, params, backend="torch")
    got = filter_logits(x, params, backend=install(launch))
    assert torch.equal(unchecked.bits(got), unchecked.bits(wanted))


# Values that nothing has checked, logits that change


@launches
def test_hostile_values(library, launch):
    backend = emulation.EmulatedBackend(library, launch)
    dtype = DTYPES[(LAUNCHES + SPLIT).index(launch) % 3]
    for seed in range(4):
        unchecked.assert_hostile_values_do_no_harm(backend, 700, rows=24, seed=seed, dtype=dtype)


@launches
def test_hostile_histories(library, launch):
    backend = emulation.EmulatedBackend(library, launch)
    for seed in range(4):
        unchecked.assert_hostile_updates_do_no_harm(backend, 450, seed)


@launches
def test_a_bad_temperature_counts_as_1(library, launch):
    backend = emulation.EmulatedBackend(library, launch)
    wanted = backend.sample(unchecked.call_at((1.0,) * len(unchecked.BAD_TEMPERATURES)))
    got = backend.sample(unchecked.call_at(unchecked.BAD_TEMPERATURES))
    assert torch.equal(got.tokens, wanted.tokens)
    assert torch.equal(got.status, wanted.status)


#: At which barriers of a row the logits change: every one of the first, some of a search.
BARRIERS = (*range(1, 17), 20, 25, 30, 36, 43, 60)


@launches
@pytest.mark.parametrize("often", [False, True], ids=["once", "often"])
@pytest.mark.parametrize("change", unchecked.CHANGES)
def test_logits_that_change(library, launch, change, often):
    """The kernel ends, and a token is one of the row or -1, which the status says."""
    vocab_size = 1500
    turn = (LAUNCHES + SPLIT).index(launch) + list(unchecked.CHANGES).index(change) + often
    dtype = DTYPES[turn % 3]
    backend = emulation.EmulatedBackend(library, launch)
    call, at = unchecked.changing_call(vocab_size, BARRIERS[turn % 5 :: 5], dtype)
    original = call.logits.clone()
    others = unchecked.CHANGES[change](original)
    state = (others.clone(), torch.tensor(at, dtype=torch.int32))
    backend.overwriting = emulation.Overwriting(
        call.logits.data_ptr(), state[0].data_ptr(), state[1].data_ptr(), often
    )
    output = backend.sample(call)
    unchecked.assert_defined(output, vocab_size)
    unchecked.assert_advanced(call, output)
    assert not torch.equal(unchecked.bits(call.logits), unchecked.bits(original))
    call.logits.copy_(original)
    state[0].copy_(others)
    filtered = backend.filter_logits(unchecked.to_filter(call))
    assert not filtered.isnan().any()


# With sanitizers, and with planted bugs


run_sanitized = functools.partial(emulation.run_sanitized, __file__)

SOME = "(covering and V33 and bfloat16) or (layouts and bfloat16 and offset)"
SOME += " or V5003-1 or V5003-2 or steps or hostile or change"
MANY = "hostile or change or covering or layouts or V5003 or V32000 or orders or more or steps"
MANY += " or beyond"


@not_inside
@pytest.mark.parametrize(
    "expression", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_with_sanitizers(tmp_path, expression):
    done = run_sanitized(tmp_path, expression)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        pytest.param(
            "const int end = row_.is_whole(first_vec_ + vecs - 1) ? vecs : vecs - 1;",
            "const int end = vecs;",
            "covering and V33 and bfloat16",
            marks=pytest.mark.slow,
        ),
        (
            "return left < 32 ? bits & ((1u << left) - 1) : bits;",
            "return left < -1 ? bits & ((1u << left) - 1) : bits;",
            "bits_beyond and float32",
        ),
    ],
    ids=["logits", "counts"],
)
def test_reading_beyond_the_row_is_seen(tmp_path, text, wrong, expression):
    alone = "and float32" in expression
    done = run_sanitized(tmp_path, expression, (text, wrong), is_float32_alone=alone)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout + done.stderr


@not_inside
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wrong", "expression"),
    [
        (
            "limited(read_once(args.slots[row]), 0, args.num_slots - 1)",
            "args.slots[row]",
            "hostile_values and 1c",
        ),
        (
            "limited(read_once(args.logit_bias_offsets[index]), 0, size)",
            "args.logit_bias_offsets[index]",
            "hostile_values and 1c",
        ),
        (
            "limited(limited(end, entries.begin, size) - entries.begin, 0, INT32_MAX)",
            "end - entries.begin",
            "hostile_values and 1c",
        ),
        (
            "slot >= kPadding && slot < args.num_param_slots ? slot : kNoSuchSlot",
            "slot",
            "hostile_values and 1c",
        ),
        (
            "valid_temperature(args_.temperature[index])",
            "args_.temperature[index]",
            "bad_temperature and 1c",
        ),
        ("fmaxf(args_.top_p[index], 0.0f)", "args_.top_p[index]", "hostile_values and 1c"),
        (
            "static_cast<uint32_t>(ids[next]) - static_cast<uint32_t>(first)",
            "static_cast<uint32_t>(ids[next] - first)",
            "hostile_values and 1c",
        ),
        (
            "  if (wanted > kMaxCandidates) return false;\n  const bool by_mass",
            "  const bool by_mass",
            "hostile_values and 1c",
        ),
        (
            "fmaxf(finite_depth(x, m_, scale_), 0.0f)",
            "depth(x, m_, scale_)",
            "that_change and infinite and often and 1",
        ),
        ("  cluster_.broadcast(first);\n", "", "that_change and nothing and often and 8"),
        ("threshold_ == kNoCode || ", "", "that_change and nothing and 1"),
        (" || total == 0;", ";", "that_change and nothing and 1"),
        (
            "past != 0 ? __ffs(static_cast<int>(past)) - 1 : 0",
            "__ffs(static_cast<int>(past)) - 1",
            "that_change and nothing and 1",
        ),
        (
            "  if (token < 0) atomicOr(",
            "  if (token < -1) atomicOr(",
            "that_change and nothing and 1",
        ),
    ],
    ids=[
        *("slots", "first bias", "last bias", "slots of parameters"),
        *("temperature", "top-p", "bias ids", "wanted"),
        *("depth", "pivots", "greedy", "no mass", "tile", "status"),
    ],
)
def test_what_is_not_limited_is_seen(tmp_path, text, wrong, expression):
    """Without one of its limits, the kernel does not stand hostile values or changing logits."""
    done = run_sanitized(tmp_path, expression, (text, wrong), ("-x", "-m", "not slow"))
    assert done.returncode != 0
    words = ("AddressSanitizer", "runtime error", "AssertionError")
    assert any(word in done.stdout + done.stderr for word in words), done.stdout[-4000:]


@not_inside
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            "shared_.running[reached - 1] = mass;\n      }\n  );\n  __syncthreads();\n",
            "shared_.running[reached - 1] = mass;\n      }\n  );\n",
        ),
        ("  wait_for_copies();\n}", "  __pipeline_commit();\n}"),
        ("  __syncthreads();\n  cluster_.wait();", "  cluster_.wait();"),
        *(
            pytest.param(text, wrong, marks=pytest.mark.slow)
            for text, wrong in (
                ("    sync();\n    return gathered;\n", "    return gathered;\n"),
                ("  cluster_.sync();\n  sort(count);", "  sort(count);"),
                ("  cluster_.arrive();\n  const int vecs", "  const int vecs"),
                (
                    "  __syncthreads();\n  const int own = static_cast<int>(shared_.appended);",
                    "  const int own = static_cast<int>(shared_.appended);",
                ),
            )
        ),
    ],
    ids=["sorted", "copies", "bits", "shared", "listed", "started", "appended"],
)
def test_what_is_not_waited_for_is_seen(monkeypatch, tmp_path, text, wrong):
    """Without one barrier or wait, some order of threads gives a wrong token or a deadlock."""
    library = emulation.build(tmp_path, emulation.BRIEF, (text, wrong), is_float32_alone=True)
    cases = [Case("normal", mix, seed=i) for i, mix in enumerate(("plain", "k 50", "p 0.9"))]
    cases.append(Case("normal", "k 50", mask="half"))
    batch = build(cases, 3001, torch.float32)
    expected = run(batch, "torch", ())
    name = emulation.install(monkeypatch, library, Launch(2, True))

    def compare():
        for _ in range(7):
            assert_same(batch, name, expected, run(batch, name, ()))

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        compare()


# The launch

H100 = (132, 227 * 1024, 8)
A100 = (108, 163 * 1024, 1)
RTX_4090 = (128, 99 * 1024, 1)
B200 = (148, 227 * 1024, 8)


@pytest.fixture
def choose(library):
    """A function that returns the Launch, vecs of a part, bytes of shared memory."""

    def choose(rows, vocab_size, logit_bytes, device, has_workspace=False):
        launch = (ctypes.c_int32 * 5)()
        function = ctypes.CDLL(str(library)).llm_sampling_cuda_launch
        function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        function.argtypes += [ctypes.c_void_p, ctypes.c_void_p]
        numbers = (ctypes.c_int32 * 3)(*device)
        function(rows, vocab_size, logit_bytes, has_workspace, numbers, launch)
        return Launch(launch[0], bool(launch[1]), bool(launch[2])), launch[3], launch[4]

    return choose


@pytest.mark.parametrize(
    ("rows", "vocab_size", "logit_bytes", "device", "launch"),
    [
        # one block where the row fits; more blocks while multiprocessors would be idle
        (256, 32000, 2, H100, (1, True)),
        (1, 32000, 2, H100, (8, True)),
        (64, 32000, 2, H100, (2, True)),
        # a cluster where the row does not fit into one block
        (256, 128256, 2, H100, (4, True)),
        (256, 128256, 4, H100, (8, True)),
        # a multiprocessor has room for one row at a time only
        (256, 262144, 4, H100, (8, True)),
        (1, 128256, 4, B200, (8, True)),
        # too few vecs for a second block
        (1, 4096, 4, H100, (1, True)),
        # no copy, because the row is too large or there are no clusters
        (256, 2**20, 4, H100, (1, False)),
        (1, 2**20, 4, H100, (8, False)),
        (256, 128256, 2, A100, (1, False)),
        (256, 32000, 4, A100, (1, True)),
        (1, 32000, 4, RTX_4090, (1, False)),
        (1, 32000, 2, RTX_4090, (1, True)),
        # smaller clusters where there is no room for larger ones
        (1, 128256, 2, (132, 227 * 1024, 4), (4, True)),
        (256, 128256, 4, (132, 227 * 1024, 2), (1, False)),
    ],
)
def test_branches_of_the_launch(choose, rows, vocab_size, logit_bytes, device, launch):
    assert choose(rows, vocab_size, logit_bytes, device)[0] == (*launch, False)


@pytest.mark.parametrize("has_workspace", [False, True])
@pytest.mark.parametrize("device", [H100, A100, RTX_4090, B200], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 4096, 32000, 50257, 128256, 262144, 2**20])
@pytest.mark.parametrize("rows", [0, 1, 40, 133, 4096])
@pytest.mark.parametrize("logit_bytes", [2, 4])
def test_every_launch_can_be_started(choose, rows, vocab_size, logit_bytes, device, has_workspace):
    processors, most_shared, most_blocks = device
    launch, vecs, shared = choose(rows, vocab_size, logit_bytes, device, has_workspace)
    if launch.is_split:
        assert has_workspace
        assert launch.copied
        assert most_blocks == 1
        assert 2 <= launch.blocks <= 32
        assert rows * launch.blocks <= processors
    else:
        assert launch.blocks in ((1, 2, 4, 8) if most_blocks > 1 else (1,))
    assert shared <= most_shared
    assert vecs % 32 == 0
    assert launch.blocks * vecs * 8 >= vocab_size + 7, "a row fits wherever it begins"
    assert shared >= vecs * 8 * logit_bytes * launch.copied
