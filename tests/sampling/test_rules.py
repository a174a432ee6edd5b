"""Are rows with rules that look at the history those of the reference, in every kind of call?

The rules are those of step 5a: DRY, n-grams, bad words and a least number of tokens. What the list
of a row is, tests/sampling/test_sequence_rules.py and the answers of vectors_family.json say.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EVERY_BACKEND,
    OTHER_BACKENDS,
    Batch,
    Case,
    build,
    covering_cases,
    device_of,
)
from param_slots import assert_by_slot
from parity import assert_parity
from ruled_rows import (
    GIVEN,
    MAX_LENGTH,
    ROWS,
    Rows,
    alphabet,
    assert_as_the_reference,
    rules_in_turn,
)
from torch import Tensor

from llm_sampling import (
    BatchParams,
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    filter_logits,
    sample,
)
from llm_sampling.backends.base import PositionOf, SampleCall
from llm_sampling.fields import FIELDS

#: The parameters of the rules.
RULES = [field.name for field in FIELDS.values() if field.kind in ("rule", "sequences")]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 600, 5003])
@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
def test_rows_are_those_of_the_reference(
    backend: str, vocab_size: int, given: tuple[str, ...], seed: int
) -> None:
    rows = Rows(seed, vocab_size, DTYPES[seed % 3], device_of(backend))
    assert_as_the_reference(rows, backend, given)


@pytest.mark.parametrize("vocab_size", [1, 33, 513])
@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
def test_the_parity_table_with_lists(backend: str, vocab_size: int) -> None:
    """Every row, mix, history and mask of the table, with rules in four of five rows."""
    turn = rules_in_turn(vocab_size)
    batches = [
        build(cases, vocab_size, DTYPES[i % 3], device_of(backend), rules=turn)
        for i, cases in enumerate(covering_cases(vocab_size, vocab_size))
    ]
    assert_parity(batches, backend, ("processed", "raw"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("position_of", ["row", "slot", "text"])
@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
def test_parameters_of_slots(backend: str, position_of: PositionOf, seed: int) -> None:
    """Rows may name slots twice, or slots that do not exist, and sequences have gaps between."""
    device = device_of(backend)
    rows = Rows(seed, 600, DTYPES[seed], device)
    batch = Batch(
        cases=[Case("normal", "plain", "none", seed)] * ROWS,
        vocab_size=600,
        dtype=DTYPES[seed],
        logits=rows.logits,
        params=rows.params,
        positions=list(range(ROWS)),
        history=rows.history(),
        allowed_mask=rows.mask,
    )
    assert_by_slot([batch], backends.resolve(backend, torch.device(device)), position_of)


def test_the_rows_have_every_kind_of_list() -> None:
    """The rows above have lists that lower, that ban, and that are empty, and matter."""
    changed = bans = empty = 0
    for seed in range(40):
        rows = Rows(seed, 600, torch.float32)
        plain = [SamplingParams(seed=1) for _ in rows.params]
        without = results_of_filter(rows, plain)
        only = [
            SamplingParams(**{name: getattr(row, name) for name in RULES}) for row in rows.params
        ]
        listed = results_of_filter(rows, only)
        differ = (listed != without) & ~(listed.isnan() & without.isnan())
        changed += int((differ & (listed > -math.inf)).any(-1).sum())
        bans += int((differ & (listed == -math.inf)).any(-1).sum())
        empty += int((~differ).all(-1).sum())
    assert min(changed, bans, empty) > 40


def results_of_filter(rows: Rows, params: list[SamplingParams]) -> Tensor:
    return filter_logits(rows.logits.nan_to_num(), params, history=rows.history())


@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_a_decode_loop_is_the_same_in_every_form(backend: str, seed: int) -> None:
    """A Sampler, a table and calls with histories, while the texts grow, draw the same tokens."""
    device = device_of(backend)
    rows = Rows(seed, 50, torch.float32, device)
    sampler = Sampler(
        rows.params, vocab_size=50, history=rows.history(), backend=backend, check=False
    )
    table = RequestTable(
        ROWS + 2,
        vocab_size=50,
        history=True,
        max_length=MAX_LENGTH,
        backend=backend,
        device=device,
    )
    slots = [(3 * row + 1) % (ROWS + 2) for row in range(ROWS)]
    assert len(set(slots)) == ROWS
    for slot, params, prompt, output in zip(
        slots, rows.params, rows.prompts, rows.outputs, strict=True
    ):
        table.set(slot, params, prompt_ids=prompt, output_ids=output)
    history = rows.history()
    generator = torch.Generator().manual_seed(seed)
    for turn in range(12):
        logits = (torch.randn(ROWS, 50, generator=generator) * 2).to(device)
        logits[:, alphabet(50)] += 4
        if turn == 5:  # one request is replaced
            table.set(slots[2], SamplingParams(seed=4, dry_multiplier=3, dry_breakers=[[1], [2]]))
            rows.params[2] = SamplingParams(seed=4, dry_multiplier=3, dry_breakers=[[1], [2]])
            sampler.set_params(2, rows.params[2])
            table.fill(
                [slots[2]], history.text.ids[2:3], history.text.lengths[2:3], [len(rows.prompts[2])]
            )
        if turn == 8:
            table = RequestTable.from_state_dict(table.state_dict(), backend=backend)
            sampler = Sampler.from_state_dict(sampler.state_dict(), backend=backend)
        drawn = sample(logits, rows.params, history=history, backend=backend, check=False)
        assert torch.equal(sampler(logits).tokens, drawn.tokens)
        by_slot = sample(logits, table, slots, record=True, backend=backend, check=False)
        assert torch.equal(by_slot.tokens, drawn.tokens)
        history.append(drawn.tokens)


@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
def test_rows_of_a_sampler_come_and_go(backend: str) -> None:
    """Rows with token sequences of other lengths move, and each goes on as it would alone."""
    generator = torch.Generator().manual_seed(3)
    device = device_of(backend)
    steps = (torch.randn(9, 1, 40, generator=generator) * 3).to(device)
    options: dict[str, Any] = {"vocab_size": 40, "max_length": 30}
    options |= {"backend": backend, "device": device}
    requests = [
        SamplingParams(seed=row, no_repeat_ngram_size=2, bad_words=[[row, row + 1]] * row)
        for row in range(5)
    ]
    alone = []
    for params in requests:
        sampler = Sampler(params, **options)
        alone.append([int(sampler(logits).tokens) for logits in steps])
    sampler = Sampler(requests[:2], **options)
    here, got = [0, 1], {row: [] for row in range(5)}
    for turn in range(30):
        for row in [row for row in here if len(got[row]) == 9]:
            sampler.remove([here.index(row)])
            here.remove(row)
        if turn % 3 == 1 and turn // 3 + 2 < 5:
            row = turn // 3 + 2
            sampler.add(requests[row])
            here.append(row)
        if turn == 4:
            sampler.reorder(range(len(here))[::-1])
            here.reverse()
        if not here:
            break
        logits = torch.cat([steps[len(got[row])] for row in here])
        for row, token in zip(here, sampler(logits).tokens.tolist(), strict=True):
            got[row].append(token)
    assert [got[row] for row in range(5)] == alone


def test_a_bad_word_of_one_id_needs_no_history() -> None:
    """It is a ban, like a bias of -inf, beside the biases of the row."""
    params = SamplingParams(bad_words=[[3], [1]], logit_bias={1: 5.0, 2: 1.5})
    assert not params.needs_history
    batch = BatchParams.from_list([params])
    assert not batch.has_rules
    assert batch.logit_bias_ids.tolist() == [1, 2, 3]
    assert batch.logit_bias_values.tolist() == [-math.inf, 1.5, -math.inf]
    logits = torch.tensor([[0.0, math.nan, 0.0, math.inf]])
    for backend in ("cpu", "torch"):
        filtered = filter_logits(logits, params, backend=backend)
        assert filtered.tolist() == [[0.0, -math.inf, 1.5, -math.inf]]


def test_a_rule_that_asks_for_no_order_needs_no_text() -> None:
    """``min_tokens`` asks how long the output is."""
    params = SamplingParams(min_tokens=3, stop_token_ids=[0], temperature=0)
    sampler = Sampler(params, vocab_size=2)
    logits = torch.tensor([[1.0, 0.0]])
    assert [int(sampler(logits).tokens) for _ in range(5)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "given",
    [
        {"dry_multiplier": 1},
        {"no_repeat_ngram_size": 2},
        {"bad_words": [[1, 2]]},
        {"min_tokens": 2, "stop_token_ids": [1]},
    ],
    ids=lambda given: next(iter(given)),
)
def test_without_a_history_a_rule_is_refused(given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    logits = torch.zeros(1, 5)
    for call in (sample, filter_logits):
        with pytest.raises(ValueError, match=r"history must be given where .*min_tokens is on"):
            call(logits, params)
    with pytest.raises(ValueError, match="make the RequestTable with history=True"):
        RequestTable(1, vocab_size=5).set(0, params)
    if "min_tokens" in given:
        return
    history = TokenHistory.from_ids([[1]], None, 5)
    for call in (sample, filter_logits):
        with pytest.raises(ValueError, match=r"must keep the ids in order where .*max_length"):
            call(logits, params, history=history)
    with pytest.raises(ValueError, match="make the RequestTable with max_length"):
        RequestTable(1, vocab_size=5, history=True).set(0, params)
    with pytest.raises(ValueError, match="keep the ids in order"):
        Sampler(params, vocab_size=5)
    sampler = Sampler(SamplingParams(frequency_penalty=1), vocab_size=5)
    for change in (lambda: sampler.add(params), lambda: sampler.set_params(0, params)):
        with pytest.raises(ValueError, match="give the Sampler a max_length"):
            change()


def test_room_for_a_list() -> None:
    """Each listed token is in the text, in this call's extra ids, or in the row's sequences."""

    def capacity(batch: BatchParams, vocab_size: int = 5000, **given: Any) -> int:
        history = TokenHistory.from_ids([[1]], None, vocab_size, max_length=100)
        call = SampleCall(torch.zeros(1, vocab_size), batch, history, None)
        return replace(call, **given).list_capacity

    stop = SamplingParams(seed=1, min_tokens=2, stop_token_ids=[1, 2, 3])
    batch = BatchParams.from_list([stop])
    assert len(stop.sequences) == 5
    assert capacity(batch) == 100 + 64 + 5
    assert capacity(batch, vocab_size=150) == 150
    assert capacity(batch, history=TokenHistory.from_ids([[1]], None, 5000)) == 64 + 5
    assert capacity(batch, history=None) == 0
    assert capacity(BatchParams.from_list([SamplingParams(seed=1)])) == 0

    table = RequestTable(3, vocab_size=5000, history=True, max_length=100, max_sequence_ids=7)
    table.set(1, stop)
    slots = torch.tensor([1], dtype=torch.int32)
    batch, param_slots = table.batch_of(slots, None, "slot")
    assert capacity(batch, param_slots=param_slots) == 100 + 64 + 7
    sampler = Sampler([stop, SamplingParams()], vocab_size=5000, max_length=100)
    batch, param_slots = sampler._table.batch_of(slots, None, "slot")
    assert capacity(batch, param_slots=param_slots) == 100 + 64 + 5


def test_more_sequences_than_a_table_has_room_for_are_refused() -> None:
    table = RequestTable(1, vocab_size=9, history=True, max_length=4, max_sequence_ids=8)
    fits = SamplingParams(dry_multiplier=1, dry_breakers=[[1], [2], [3, 4]], seed=1)
    assert len(fits.sequences) == 8
    table.set(0, fits)
    more = SamplingParams(dry_multiplier=1, dry_breakers=[[1], [2], [3, 4], [5]])
    with pytest.raises(ValueError, match=r"at most max_sequence_ids = 8 ids, .* got 9"):
        table.set(0, more)
    assert table.params(0) == fits


def test_breakers_of_a_dry_that_is_off_are_not_kept() -> None:
    """A multiplier that is 0 in float32 is off, and a table need not have room for its breakers."""
    params = SamplingParams(dry_multiplier=1e-60, dry_breakers=[[1], [2, 3]], seed=1)
    assert not params.needs_history
    assert list(params.sequences) == []
    table = RequestTable(2, vocab_size=9)
    table.set(1, params)
    assert table.params(1) == params


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bad_words", "abc", "bad_words must be a sequence of token sequences"),
        ("bad_words", ["abc"], "bad_words[0] must be token ids in [0, 2^31), got 'abc'"),
        ("bad_words", [1], "bad_words[0] must be token ids in [0, 2^31), got 1"),
        ("bad_words", [[1], []], "bad_words[1] must be token ids, one at least, got []"),
        ("dry_breakers", [[1, -1]], "dry_breakers[0] must be token ids in [0, 2^31), got -1"),
        ("dry_breakers", [[2**31]], "dry_breakers[0] must be token ids in [0, 2^31)"),
        ("dry_breakers", [[True]], "dry_breakers[0] must be token ids in [0, 2^31), got True"),
        ("dry_breakers", {1: 2}, "dry_breakers must be a sequence of token sequences"),
        ("stop_token_ids", [[1]], "stop_token_ids must be a sequence of token ids in [0, 2^31)"),
        ("stop_token_ids", 5, "stop_token_ids must be a sequence of token ids in [0, 2^31), got 5"),
        ("stop_token_ids", "5", "stop_token_ids must be a sequence of token ids"),
        ("dry_multiplier", 101, "dry_multiplier must be in [0, 100], got 101"),
        ("dry_base", 0.5, "dry_base must be in [1, 100], got 0.5"),
        ("dry_allowed_length", 0, "dry_allowed_length must be an integer >= 1, got 0"),
        ("dry_penalty_last_n", -2, "dry_penalty_last_n must be an integer >= -1, got -2"),
        ("no_repeat_ngram_size", -1, "no_repeat_ngram_size must be an integer >= 0, got -1"),
        ("no_repeat_ngram_window", 1.5, "no_repeat_ngram_window must be an integer >= 0"),
        ("min_tokens", -1, "min_tokens must be an integer >= 0, got -1"),
    ],
)
def test_what_no_rule_can_be_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SamplingParams(**{name: value})


def by_hand(**changes: Any) -> BatchParams:
    """Return a batch with a rule, parts of which are replaced by what nobody would pack."""
    params = SamplingParams(dry_multiplier=1, dry_breakers=[[1], [2, 3]])
    batch = BatchParams.from_list([params])
    given = {name: getattr(batch, name) for name in BatchParams.__dataclass_fields__}
    return BatchParams(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_base": None}, "must be given together or not at all"),
        ({"sequences": None}, "must be given together or not at all"),
        ({"dry_base": torch.tensor([0.5])}, r"dry_base\[0\] must be in \[1, 100\]"),
        ({"min_tokens": torch.tensor([-1]).int()}, r"min_tokens\[0\] must be an integer >= 0"),
        ({"min_tokens": torch.tensor([1])}, "min_tokens must be torch.int32"),
        ({"sequence_offsets": torch.tensor([0, 5])}, "sequence_offsets must be ascending from 0"),
        ({"sequences": torch.tensor([0, 9, 1, 1, 2, 2, 3]).int()}, "sequences must be records"),
        ({"sequences": torch.tensor([4, 1, 1, 1, 2, 2, 3]).int()}, "sequences must be records"),
        ({"sequences": torch.tensor([0, 1, 1, 1, 0, 2, 3]).int()}, "sequences must be records"),
        ({"sequences": torch.tensor([0, 1, -1, 1, 2, 2, 3]).int()}, "sequences must be records"),
        ({"sequences": torch.tensor([0, 5, 1, 3, 2, 2, 3]).int()}, "strictly ascending"),
        ({"any_ordered_rule": False}, "any_ordered_rule must be True where a row has a rule"),
        (
            {"needs_history": False},
            "needs_history must be True where a row has a penalty or a rule",
        ),
    ],
)
def test_a_batch_made_by_hand_is_looked_at(changes: dict[str, Any], message: str) -> None:
    history = TokenHistory.from_ids([[1]], None, 5, max_length=3)
    sample(torch.zeros(1, 5), by_hand(), history=history)
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 5), by_hand(**changes), history=history)


def test_rules_in_a_graph() -> None:
    """A compiled call takes the tensors of the rules, and those of the text."""
    params = [
        SamplingParams(seed=1, dry_multiplier=2, dry_allowed_length=1, dry_breakers=[[3]]),
        SamplingParams(seed=2, bad_words=[[1, 2]], min_tokens=9, stop_token_ids=[0]),
        SamplingParams(seed=3),
    ]
    history = TokenHistory.from_ids([[0, 1, 2], [2, 1], []], [[1], [], [4]], 6, max_length=8)
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))

    def of_batch(x: Tensor, batch: BatchParams, history: TokenHistory) -> Tensor:
        return filter_logits(x, batch, history=history)

    def of_params(x: Tensor, history: TokenHistory) -> Tensor:
        return filter_logits(x, params, history=history)

    wanted = of_params(logits, history)
    assert (wanted == -math.inf).any(-1).tolist() == [False, True, False]
    batch = BatchParams.from_list(params)
    compiled = torch.compile(of_batch, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, batch, history), wanted)
    compiled = torch.compile(of_params, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, history), wanted)
