"""Does a RequestTable give each row what its request gets alone, whatever came before?"""

from __future__ import annotations

import functools
import math
import random
import re
import weakref
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from cases import (
    DTYPES,
    EVERY_BACKEND,
    SMALL_VOCABS,
    Batch,
    build,
    covering_cases,
    device_of,
    every_case,
    make_history,
)
from histories import assert_same_state
from no_waiting import nothing_waits
from param_slots import OUTSIDE, PADDING, append, assert_by_slot, by_slot, for_rows
from parity import bits, build_all

from llm_sampling import (
    BatchParams,
    InvalidLogitsError,
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    filter_logits,
    sample,
)
from llm_sampling.backends import cpu
from llm_sampling.backends.base import STATUS_NO_CANDIDATE, BackendModule, PositionOf
from llm_sampling.backends.c_abi import SampleArgs

every_backend = pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)

V = 37
PENALISED = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, top_k=9, seed=1)
PLAIN = SamplingParams(top_p=0.8, seed=2)

#: A slot with a request and a free one of the fixture ``table``.
SLOTS = torch.tensor([0, 1], dtype=torch.int32)


def filled(batch: Batch, seed: int) -> tuple[RequestTable, list[int]]:
    """Return a table that holds the cases of a batch, and their slots.

    The slots are in random order, others have other cases, and every slot held another one before.
    """
    rng = random.Random(seed)
    rows = len(batch.cases)
    pasts = [make_history(case.history, batch.vocab_size, case.seed) for case in batch.cases]
    has_window = any(params.has_window for params in batch.params)
    longest = max(len(prompt) + len(output) for prompt, output in pasts)
    table = RequestTable(
        rows + 3,
        vocab_size=batch.vocab_size,
        history=True,
        max_length=longest + 1 if has_window else None,
        device=batch.logits.device,
    )
    slots = rng.sample(range(rows + 3), rows)
    in_slots = dict(zip(slots, range(rows), strict=True))
    for turn in range(2):
        for slot in rng.sample(range(rows + 3), rows + 3):
            case = in_slots.get(slot) if turn == 1 else None
            case = rng.randrange(rows) if case is None else case
            prompt, output = pasts[case]
            table.set(
                slot,
                batch.params[case],
                prompt_ids=prompt,
                output_ids=output,
                position=batch.positions[case],
            )
    return table, slots


def assert_like_rows(batch: Batch, backend: str, seed: int) -> None:
    """Check a call of all cases, some twice, with rows of padding and slots that do not exist."""
    table, slots = filled(batch, seed)
    rng = random.Random(seed)
    rows = len(slots)
    chosen = [*range(rows), *rng.sample(range(rows), rows // 4), PADDING, PADDING, OUTSIDE]
    rng.shuffle(chosen)
    without_case = {PADDING: -1, OUTSIDE: table.capacity}
    named = [slots[case] if case >= 0 else without_case[case] for case in chosen]
    cases = torch.tensor(chosen)
    logits = batch.logits[cases.clamp(min=0)].clone()
    logits[cases < 0] = math.nan
    mask = None if batch.allowed_mask is None else batch.allowed_mask[cases.clamp(min=0)]

    params = BatchParams.from_list(batch.params, positions=batch.positions, device=logits.device)
    given: dict[str, Any] = {"history": batch.history, "allowed_mask": batch.allowed_mask}
    wanted = sample(batch.logits, params, backend="torch", check=False, **given)
    kept = filter_logits(batch.logits, params, backend="torch", **given)

    tokens = for_rows(cases, wanted.tokens, -1, -1)
    status = for_rows(cases, wanted.status, 0, STATUS_NO_CANDIDATE)
    filtered = filter_logits(logits, table, named, allowed_mask=mask, backend=backend)
    assert torch.equal(bits(filtered), bits(for_rows(cases, kept, -math.inf, -math.inf)))

    history = table.history
    assert history is not None
    judged, position, recorded = history.clone().to("cpu"), table.positions, []
    got = sample(logits, table, named, allowed_mask=mask, record=True, backend=backend, check=False)
    assert torch.equal(got.tokens, tokens)
    assert torch.equal(got.status, status)
    for slot, token in zip(named, tokens.tolist(), strict=True):
        if token >= 0 and named.count(slot) == 1:
            recorded.append((slot, token))
            position[slot] += 1
    append(judged, recorded)
    assert_same_state(history, judged)
    assert torch.equal(table.positions, position)


@every_backend
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
def test_every_case_in_a_table(backend: str, vocab_size: int) -> None:
    dtype = DTYPES[SMALL_VOCABS.index(vocab_size) % 3]
    groups = every_case(vocab_size, 2)
    for seed, batch in enumerate(build_all(groups, vocab_size, dtype, device_of(backend))):
        assert_like_rows(batch, backend, seed)


@every_backend
@pytest.mark.parametrize("vocab_size", [33, 1000], ids="V{}".format)
def test_covering_cases_in_a_table(backend: str, vocab_size: int) -> None:
    groups = covering_cases(vocab_size, vocab_size)
    batches = build_all(groups, vocab_size, torch.float32, device_of(backend))
    for seed, batch in enumerate(batches):
        assert_like_rows(batch, backend, seed)


# ---- what a backend is called with ---------------------------------------------------------------

positions = pytest.mark.parametrize("position_of", get_args(PositionOf))


def module_of(name: str) -> BackendModule:
    return backends.resolve(name, torch.device(device_of(name)))


@every_backend
@pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
def test_every_case_by_slot(backend: str, vocab_size: int) -> None:
    turn = SMALL_VOCABS.index(vocab_size)
    position_of = get_args(PositionOf)[turn % 3]
    dtype = DTYPES[turn // 3 % 3]
    batches = build_all(every_case(vocab_size, 2), vocab_size, dtype, device_of(backend))
    assert_by_slot(batches, module_of(backend), position_of)


@every_backend
@positions
@pytest.mark.parametrize("vocab_size", [33, 1000, 32000], ids="V{}".format)
def test_covering_cases_by_slot(backend: str, vocab_size: int, position_of: PositionOf) -> None:
    groups = covering_cases(vocab_size, vocab_size, rows=0 if vocab_size <= 1000 else 8)
    batches = build_all(groups, vocab_size, torch.float32, device_of(backend))
    assert_by_slot(batches, module_of(backend), position_of)


@every_backend
def test_check_by_slot(backend: str) -> None:
    """With ``check`` a slot that does not exist is an error, and padding is none."""
    batch = build(covering_cases(33, 1)[1][:9], 33, device=device_of(backend))
    batch.logits = batch.logits.nan_to_num(0.0, 1.0, 0.0)
    batch.params = [replace(row, logit_bias=None) for row in batch.params]
    made = by_slot(batch, "slot", 3)
    call = replace(made.call, check=True, advance=True)
    assert call.batch.position is not None
    before = call.batch.position.clone()
    with pytest.raises(InvalidLogitsError, match="no candidate left") as error:
        module_of(backend).sample(call)
    assert error.value.rows == (made.cases == OUTSIDE).nonzero()[:, 0].tolist()
    assert torch.equal(call.batch.position, before)


# ---- a loop in which requests come and go --------------------------------------------------------


def test_requests_that_come_and_go(backend: str) -> None:
    """Each request draws what it draws alone; its rows move, and its slot has had others."""
    rng = random.Random(5)
    table = RequestTable(4, vocab_size=V, history=True)
    generator = torch.Generator().manual_seed(1)
    running: dict[int, tuple[SamplingParams, TokenHistory, int]] = {}
    drawn = 0
    for step in range(60):
        for slot in range(4):
            if slot in running and rng.random() < 0.1:
                table.clear(slot)
                del running[slot]
            elif slot not in running and rng.random() < 0.5:
                params = replace(rng.choice([PENALISED, PLAIN]), seed=step)
                prompt = [rng.randrange(V) for _ in range(rng.randrange(5))]
                table.set(slot, params, prompt_ids=prompt)
                running[slot] = params, TokenHistory.from_ids([prompt], None, V), 0
        rows = rng.sample([*running], len(running))
        logits = torch.randn(len(rows), V, generator=generator) * 2
        slots = rows if step % 3 == 0 else torch.tensor(rows, dtype=torch.int32)
        got = sample(logits, table, slots, record=True, backend=backend).tokens
        for row, slot in enumerate(rows):
            params, history, position = running[slot]
            alone = sample(
                logits[row : row + 1],
                params,
                history=history,
                positions=[position],
                backend="torch",
            )
            assert got[row] == alone.tokens[0]
            history.append(alone.tokens)
            running[slot] = params, history, position + 1
            drawn += 1
    assert drawn > 60


def test_a_prepared_call_is_like_the_first_one(backend: str) -> None:
    """Calls of several kinds take turns, with masks, and with other numbers of rows."""
    table, plain = (RequestTable(5, vocab_size=V, history=True) for _ in range(2))
    rng, generator = random.Random(9), torch.Generator().manual_seed(9)
    for step in range(40):
        if step % 4 == 0:
            slot, params = rng.randrange(5), replace(rng.choice([PENALISED, PLAIN]), seed=step)
            for each in (table, plain):
                each.set(slot, params, prompt_ids=[step % V, 1])
        named = [slot for slot in range(5) if table.params(slot) is not None] + [-1]
        slots = torch.tensor(rng.choices(named, k=rng.randrange(4)), dtype=torch.int32)
        logits = torch.randn(len(slots), V, generator=generator)
        options: dict[str, Any] = {"logprobs": rng.choice([None, "raw"]), "backend": backend}
        if step % 3 == 0:
            options["allowed_mask"] = torch.rand(len(slots), V, generator=generator) < 0.7
        else:
            options["record"] = True
        plain._steps.clear()
        got = [sample(logits, each, slots, **options) for each in (table, plain)]
        for name in ("tokens", "status"):
            assert torch.equal(getattr(got[0], name), getattr(got[1], name))
        assert torch.equal(table.positions, plain.positions)
    assert len(table._steps) > 1


#: Of each kind of parameters that chooses another kernel.
NEW_KINDS = {
    "a penalty": SamplingParams(temperature=0, presence_penalty=2.0),
    "a bias": SamplingParams(temperature=0, logit_bias={0: -9.0}),
    "a temperature": SamplingParams(temperature=9.0, seed=1),
    "a filter": SamplingParams(temperature=9.0, top_k=2, seed=3),
    "a scope": replace(PENALISED, temperature=0, repetition_penalty_scope="output"),
}


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_prepared_call_follows_the_requests(backend: str, kind: str) -> None:
    """A request comes whose parameters the calls before did not need."""
    table = RequestTable(2, vocab_size=V, history=True)
    table.set(0, SamplingParams(temperature=0))
    slots = torch.zeros(1, dtype=torch.int32)
    logits = torch.linspace(0, 1, V).flip(0)[None] * 3
    sample(logits, table, slots, backend=backend)
    wanted = RequestTable(2, vocab_size=V, history=True)
    for each in (table, wanted):
        each.set(0, NEW_KINDS[kind], prompt_ids=[0], output_ids=[1, 0, 2])
    for number in range(3):
        place = torch.tensor([number])
        got = [sample(logits, each, slots, backend=backend).tokens for each in (table, wanted)]
        assert torch.equal(*got)
        assert len(table._steps) == 1
        for each in (table, wanted):
            each.append(place, slots=[0])


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
@pytest.mark.parametrize("kind", ["a penalty", "a bias", "a scope"])
def test_a_step_that_is_kept_too_long_is_seen(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    right = RequestTable._changes_of_flags
    monkeypatch.setattr(
        RequestTable,
        "_changes_of_flags",
        lambda *given: [change for change in right(*given) if change[1] != "_steps"],
    )
    with pytest.raises(AssertionError):
        test_a_prepared_call_follows_the_requests("cpu", kind)


@pytest.mark.parametrize("way", ["table", "sampler"])
def test_the_logits_of_a_step_can_be_freed(backend: str, way: str) -> None:
    if way == "table":
        table = RequestTable(1, vocab_size=V)
        table.set(0, PLAIN)
        draw = functools.partial(sample, params=table, slots=[0], backend=backend)
    else:
        draw = Sampler(PLAIN, vocab_size=V, backend=backend)  # type: ignore[assignment]
    for _ in range(2):
        logits = torch.zeros(1, V)
        draw(logits)
        memory = weakref.ref(logits)
        del logits
        assert memory() is None


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="the CPU kernel is not built")
def test_a_call_within_a_call_that_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such calls may run at the same time, in threads; each gets its own tokens."""
    table = RequestTable(3, vocab_size=V)
    for slot in range(3):
        table.set(slot, replace(PLAIN, seed=slot))
    inputs = [
        (torch.randn(len(slots), V), torch.tensor(slots, dtype=torch.int32))
        for slots in ([0, 1, 2], [1])
    ]
    wanted = [sample(x, table, slots, backend="torch").tokens for x, slots in inputs]
    run = cpu.LIBRARY.run
    inner: list[Any] = []

    def run_after_another(args: SampleArgs) -> None:
        if len(inner) == 1:
            inner.append(None)
            inner[1] = sample(inputs[1][0], table, inputs[1][1], backend="cpu").tokens
        run(args)

    monkeypatch.setattr(cpu.LIBRARY, "run", run_after_another)
    sample(inputs[0][0], table, inputs[0][1], backend="cpu")
    inner.append(None)
    outer = sample(inputs[0][0], table, inputs[0][1], backend="cpu").tokens
    assert torch.equal(outer, wanted[0])
    assert torch.equal(inner[1], wanted[1])


def test_a_table_keeps_few_prepared_steps() -> None:
    table = RequestTable(1, vocab_size=V)
    table.set(0, PLAIN)
    for num_samples in range(1, 40):
        sample(torch.zeros(1, V), table, [0], num_samples=num_samples)
    assert len(table._steps) == 8


def test_memory_that_moves_between_requests() -> None:
    """The histories may be put into shared memory after a step and a fill were prepared."""
    tables = [RequestTable(2, vocab_size=V, history=True) for _ in range(2)]
    for turn in range(3):
        for table, moves in zip(tables, (True, False), strict=True):
            table.set(turn % 2, PENALISED, prompt_ids=[1, turn])
            slots = torch.tensor([turn % 2], dtype=torch.int32)
            sample(torch.zeros(1, V), table, slots, record=True)
            history = table.history
            assert history is not None
            if moves:
                for tensor in (history.seen, history.counts, history.lengths):
                    tensor.share_memory_()
    first, second = (table.history for table in tables)
    assert first is not None
    assert second is not None
    assert_same_state(first, second)


def test_positions_of_each_kind(backend: str) -> None:
    """Positions of rows, places in the text, and the table's own positions."""
    table = RequestTable(2, vocab_size=V)
    table.set(0, PLAIN, prompt_length=5, position=3)
    table.set(1, PLAIN, prompt_ids=[1, 2], position=0)
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(3)).expand(3, V)
    expected = sample(logits, PLAIN, positions=[3, 7, 0], backend="torch").tokens

    def draw(**given: Any) -> torch.Tensor:
        return sample(logits, table, [0, 0, 1], backend=backend, **given).tokens

    assert torch.equal(draw(positions=[3, 7, 0]), expected)
    assert torch.equal(draw(text_positions=[7, 11, 1]), expected)
    assert torch.equal(draw(text_positions=torch.tensor([7, 11, 1])), expected)
    own = draw(record=True)
    assert own.tolist() == [expected[0], expected[0], expected[2]]
    assert table.positions.tolist() == [3, 1]  # two rows have had slot 0
    given = torch.tensor([3, 7, 0])
    draw(positions=given, record=True)
    assert given.tolist() == [3, 7, 0]
    assert table.positions.tolist() == [3, 1]


def test_seeds_of_unseeded_requests() -> None:
    """They come from torch's default generator, and can be read."""
    table = RequestTable(2, vocab_size=V)
    seeds = []
    for _ in range(2):
        torch.manual_seed(7)
        table.set(0, SamplingParams())
        table.set(1, SamplingParams())
        seeds.append([table.params(slot).seed for slot in (0, 1)])  # type: ignore[union-attr]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2
    logits = torch.zeros(1, V)
    drawn = sample(logits, table, [1])
    assert torch.equal(drawn.tokens, sample(logits, SamplingParams(seed=seeds[0][1])).tokens)


def test_addresses_stay() -> None:
    table = RequestTable(3, vocab_size=V, history=True)

    def addresses() -> list[int]:
        slots = torch.zeros(1, dtype=torch.int32)
        batch, by_slot = table.batch_of(slots, None, "slot")
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        history = table.history
        assert history is not None
        tensors += [by_slot.bias_counts, history.seen, history.counts, history.lengths]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    table.set(1, replace(PENALISED, logit_bias={3: 1.0}), prompt_ids=[1, 2])
    table.set(2, SamplingParams(temperature=0))
    table.clear(1)
    assert addresses() == before


def test_a_long_bias_is_followed_by_a_short_one(backend: str) -> None:
    table = RequestTable(2, vocab_size=V, max_logit_bias=3)
    table.set(1, SamplingParams(temperature=0, logit_bias={1: 9.0, 2: 8.0, 3: 7.0}))
    logits = torch.zeros(1, V)
    assert sample(logits, table, [1], backend=backend).tokens.tolist() == [1]
    table.set(1, SamplingParams(temperature=0, logit_bias={5: 1.0}))
    assert sample(logits, table, [1], backend=backend).tokens.tolist() == [5]
    table.set(1, SamplingParams(temperature=0))
    assert sample(logits, table, [1], backend=backend).tokens.tolist() == [0]


def test_an_error_records_nothing(backend: str) -> None:
    table = RequestTable(2, vocab_size=V, history=True)
    table.set(0, PENALISED, prompt_ids=[1])
    table.set(1, PLAIN)
    logits = torch.zeros(2, V)
    logits[1, 3] = math.nan
    with pytest.raises(InvalidLogitsError, match="NaN in logits in row 1"):
        sample(logits, table, [0, 1], record=True, backend=backend)
    history = table.history
    assert history is not None
    assert table.positions.tolist() == history.lengths.tolist() == [0, 0]


# ---- what waits for the device ------------------------------------------------------------------


def serve(table: RequestTable, rng: random.Random, logits: torch.Tensor) -> None:
    """Make a step of an engine: requests change, and every method of the table is called."""
    new, other = rng.sample(range(8), 2)
    table.set(new, replace(PENALISED, penalty_last_n=rng.choice([-1, 3])), prompt_ids=[1, 2])
    table.set(other, replace(PLAIN, logit_bias={3: 1.0}))
    table.fill([other], torch.tensor([[4, 5, 6]]), [3], torch.tensor([2]))
    table.set_params(other, replace(PENALISED, penalty_last_n=2))
    table.append(torch.tensor([[7, 8], [9, -1]]), torch.tensor([1, 2]), slots=[new, -1])
    table.rollback([new], [1])
    table.clear(7)
    slots = torch.tensor([new, other, other, -1], dtype=torch.int32)
    sample(logits, table, slots, record=torch.tensor([True] * 4), check=False)
    sample(logits, table, [new, other, -1, -1], record=True, check=False, logprobs="raw")
    options: dict[str, Any] = {"extra_output_ids": torch.tensor([[1, 2]] * 4), "check": False}
    sample(logits, table, slots, text_positions=torch.tensor([1, 2, 3, 4]), **options)
    filter_logits(logits, table, slots, extra_output_ids=[[1], [], [2, 3], []])


@pytest.mark.parametrize("waiting", [None, "item", "tolist", "cpu", "__bool__", "nonzero"])
def test_nothing_waits_for_a_device(waiting: str | None) -> None:
    table = RequestTable(8, vocab_size=V, history=True, max_length=50)
    rng, logits = random.Random(4), torch.randn(4, V)
    with nothing_waits():
        for _ in range(100 if waiting is None else 1):
            serve(table, rng, logits)
        if waiting is not None:
            with pytest.raises(AssertionError, match="waits for the device"):
                getattr(logits[0, 0], waiting)()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def table() -> RequestTable:
    made = RequestTable(2, vocab_size=V, max_logit_bias=1)
    made.set(0, PLAIN)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity must be an integer >= 1, got 0"),
        ({"capacity": True}, "capacity must be an integer >= 1, got True"),
        ({"vocab_size": 2**20 + 1}, "vocab_size must be in 1 .. 2^20, got 1048577"),
        ({"max_logit_bias": -1}, "max_logit_bias must be an integer >= 0, got -1"),
        ({"history": 1}, "history must be True or False, got 1"),
    ],
)
def test_a_table_that_there_cannot_be(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"capacity": 2, "vocab_size": V}
    with pytest.raises(ValueError, match=re.escape(message)):
        RequestTable(**{**good, **arguments})


@pytest.mark.parametrize(
    ("slot", "params", "more", "message"),
    [
        (2, PLAIN, {}, "slot must be an integer in 0 .. 1, got 2"),
        (-1, PLAIN, {}, "slot must be an integer in 0 .. 1, got -1"),
        (0, {"top_k": 3}, {}, "params must be a SamplingParams, got {'top_k': 3}"),
        (0, PENALISED, {}, "make the RequestTable with history=True"),
        (
            0,
            SamplingParams(logit_bias={1: 1.0, 2: 1.0}),
            {},
            "logit_bias and bad_words of a single id must have at most max_logit_bias = 1 tokens, "
            "got 2",
        ),
        (0, PLAIN, {"prompt_ids": [1.5]}, "prompt_ids must hold one sequence of integer ids"),
        (0, PLAIN, {"output_ids": "ab"}, "output_ids must hold one sequence of integer ids"),
        (0, PLAIN, {"prompt_length": -1}, "prompt_length must be an integer >= 0, got -1"),
        (
            0,
            PLAIN,
            {"position": 2**64},
            "position must be in [-2^63, 2^64), got 18446744073709551616",
        ),
    ],
)
def test_a_request_that_is_refused_changes_nothing(
    table: RequestTable, slot: int, params: Any, more: dict[str, Any], message: str
) -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    before = sample(logits, table, [0]).tokens
    with pytest.raises(ValueError, match=re.escape(message)):
        table.set(slot, params, **more)
    assert table.params(0) == PLAIN
    assert torch.equal(sample(logits, table, [0]).tokens, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "slots must be given where params is a RequestTable: integers, got None"),
        ({"slots": 0}, "slots must be given where params is a RequestTable: integers, got 0"),
        ({"slots": [0, 0]}, "slots must have shape (1,), one for each row, got (2,)"),
        ({"slots": [0.0]}, "slots must be integers, got 0.0"),
        ({"slots": torch.tensor([0.0])}, "slots must be int32 or int64, got torch.float32"),
        ({"slots": [1]}, "slots must name slots with a request, got 1 in row 0"),
        (
            {"slots": [0], "positions": [1], "text_positions": [1]},
            "positions and text_positions must not both be given",
        ),
        ({"slots": [0], "text_positions": [1, 2]}, "text_positions must be of shape (1,)"),
        (
            {"slots": [0], "record": 1},
            "record must be True or False, or bools (1,), one for each row, got 1",
        ),
        (
            {"slots": [0], "record": True, "num_samples": 2},
            "num_samples must be 1 where record is True, got 2",
        ),
        (
            {"slots": [0], "history": TokenHistory.from_ids([[]], None, V)},
            "history must be None, since a RequestTable keeps the histories",
        ),
        ({"slots": SLOTS[:1].to("meta")}, "slots must be on the device cpu, got meta"),
        ({"slots": SLOTS[:1, None]}, "slots must have shape (1,), one for each row, got (1, 1)"),
        ({"slots": SLOTS}, "slots must have shape (1,), one for each row, got (2,)"),
        ({"slots": SLOTS[1:]}, "slots must name slots with a request, got 1 in row 0"),
        ({"slots": SLOTS[:1], "num_samples": True}, "num_samples must be an integer >= 1"),
        ({"slots": SLOTS[:1], "num_samples": 1.0}, "num_samples must be an integer >= 1"),
        ({"slots": SLOTS[:1], "check": 1}, "check must be True, False or None, got 1"),
        ({"slots": SLOTS[:1], "logprobs": ["raw", "raw"]}, "logprobs must be None"),
        ({"slots": SLOTS[:1], "backend": "best"}, "backend must be one of"),
    ],
)
def test_a_call_that_is_refused(table: RequestTable, given: dict[str, Any], message: str) -> None:
    for is_prepared in (False, True):
        if is_prepared:
            sample(torch.zeros(1, V), table, slots=torch.zeros(1, dtype=torch.int32))
        with pytest.raises(ValueError, match=re.escape(message)):
            sample(torch.zeros(1, V), table, **given)


def test_logits_of_another_width_are_refused(table: RequestTable) -> None:
    message = f"logits must have the RequestTable's vocab_size {V}, got {V + 1}"
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, V + 1), table, [0])
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(1, V + 1), table, [0])


def test_a_traced_call_is_refused(table: RequestTable) -> None:
    with pytest.raises(ValueError, match="outside of tracers and transforms"):
        torch.func.vmap(lambda x: sample(x, table, [0]).tokens)(torch.zeros(2, 1, V))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": [0]}, "slots can be given where params is a RequestTable, got [0]"),
        ({"text_positions": [0]}, "text_positions can be given where params is a RequestTable"),
        ({"record": True}, "record can be given where params is a RequestTable, got True"),
    ],
)
def test_what_belongs_to_a_table_needs_one(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(torch.zeros(1, V), PLAIN, **given)


def test_a_call_that_comes_while_the_table_is_changed(table: RequestTable) -> None:
    table.turns[0].is_taken = True
    for change in (
        lambda: table.set(0, PLAIN),
        lambda: table.clear(0),
        lambda: sample(torch.zeros(1, V), table, [0], record=True),
    ):
        with pytest.raises(RuntimeError, match="this RequestTable is being changed"):
            change()
    table.turns[0].is_taken = False
    table.clear(0)
    assert table.params(0) is None
