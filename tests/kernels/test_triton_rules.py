"""Lists of step 5a in Triton: their maker, and the kernel that reads them, in the interpreter.

Needs Triton's interpreter; test_triton.py starts a process that has it.
"""

import math
import random
from dataclasses import replace

import pytest
import sequence_lists
import torch
import triton.language as tl
import unchecked
from cases import DTYPES, Batch, Case
from param_slots import assert_by_slot
from ruled_rows import Rows

from llm_sampling import (
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    sample,
)
from llm_sampling.backends import triton as backend
from llm_sampling.backends import triton_kernel as kernel
from llm_sampling.backends import triton_rules
from llm_sampling.backends.base import MAX_EXTRA_OUTPUT, VocabSlice
from llm_sampling.calls import make_call
from llm_sampling.results import Wanted
from llm_sampling.sequence_rules import SequenceRules

pytestmark = pytest.mark.usefixtures("triton_alone")


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


def make(call, lists, vocab_slice=None):
    """Make the lists of a call whose logits may be a slice of the vocabulary."""
    guards = unchecked.Guards(0)
    rows, most = len(call.slots), MAX_EXTRA_OUTPUT
    scratch = guards.put(torch.full((rows, most), sequence_lists.INT32_MAX, dtype=torch.int32))
    triton_rules.make_lists(
        triton_rules.RuleColumns(**call.rules),
        call.slots,
        call.lengths,
        triton_rules.PenaltyLists(*lists, scratch),
        size=call.vocab_size,
        vocab_slice=vocab_slice or VocabSlice(0, call.vocab_size),
        sequences=triton_rules.RuleSequences(
            call.sequence_offsets, call.sequences, call.sequence_counts
        ),
        param_slots=call.param_slots,
        kept_ids=None if call.text is None else triton_rules.KeptIds(call.text, call.text_lengths),
        extra_output=call.extra_output,
    )
    guards.assert_whole()


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("vocab_size", [7, 33, 1000])
def test_random_texts(vocab_size, seed):
    """Rows of different slots, which have rules of their own or share those of a table's slots."""
    sequence_lists.assert_lists(make, *sequence_lists.random_call(vocab_size, 12, seed))


@pytest.mark.parametrize("seed", range(4))
def test_rows_without_a_text(seed):
    sequence_lists.assert_lists(make, *sequence_lists.without_text(33, 8, seed))


def test_corner_rows():
    cases = sequence_lists.corner_rows()
    sequence_lists.assert_lists(make, *sequence_lists.call_of(cases, random.Random(0)))


@pytest.mark.parametrize("case", range(15))
def test_long_matches(case):
    cases = sequence_lists.long_matches()[case : case + 1]
    call, lists = sequence_lists.call_of(cases, random.Random(0), max_length=900)
    sequence_lists.assert_lists(make, call, lists)


@pytest.mark.parametrize("case", range(8))
def test_long_rows(case):
    cases = sequence_lists.long_rows()[case : case + 1]
    assert sequence_lists.expected(cases[0])
    call, lists = sequence_lists.call_of(cases, random.Random(0), max_length=2200)
    sequence_lists.assert_lists(make, call, lists)


def test_no_rows_and_no_sequences():
    case = (SequenceRules(no_repeat_ngram_size=1), [4, 5], [], 0, 33)
    call, lists = sequence_lists.call_of([case], random.Random(0))
    assert call.sequences.numel() == 0
    sequence_lists.assert_lists(make, call, lists)
    call = replace(call, slots=call.slots[:0])
    sequence_lists.assert_lists(make, call, [])


@pytest.mark.parametrize(("capacity", "room"), [(1, 16), (16, 16), (17, 32), (50257, 50272)])
def test_memory_for_lists(capacity, room):
    """Kernels that read lists are the same for all capacities: there is room for 16 more."""
    lists = triton_rules.empty_lists(3, 50257, capacity, torch.device("cpu"))
    shapes = {name: tuple(tensor.shape) for name, tensor in lists._asdict().items()}
    assert shapes == {
        "bits": (3, 1571),
        "before": (3, 1571),
        "counts": (3,),
        "amounts": (3, room),
        "scratch": (3, MAX_EXTRA_OUTPUT),
    }


def test_more_ids_than_have_places_are_refused():
    call, _ = sequence_lists.random_call(33, 1, 0)
    text = torch.empty(1, dtype=torch.int32).expand(1, 2**30 + 1)
    with pytest.raises(ValueError, match="a slot must keep at most 1073741824 ids, got 1073741825"):
        triton_rules.make_lists(
            triton_rules.RuleColumns(**call.rules),
            call.slots,
            call.lengths,
            triton_rules.empty_lists(1, 33, 33, torch.device("cpu")),
            size=33,
            vocab_slice=VocabSlice(0, 33),
            kept_ids=triton_rules.KeptIds(text, call.text_lengths),
        )


@pytest.mark.parametrize("seed", range(12))
def test_slices_of_a_vocabulary(seed):
    """Lists of slices, which begin anywhere, are together the list of the whole vocabulary."""
    sequence_lists.assert_slices(make, seed)


# Values that nothing has checked, memory that changes


@pytest.mark.parametrize("vocab_size", [7, 33, 1000])
@pytest.mark.parametrize("seed", range(30))
def test_hostile_values(vocab_size, seed):
    sequence_lists.assert_hostile_values_do_no_harm(make, vocab_size, seed)


def test_hostile_length_of_a_record():
    """A record that claims to have more ids than there are ends with the sequences."""
    case = (SequenceRules(min_tokens=3, stop_token_ids=[1, 2]), [], [], 0, 33)
    call, lists = sequence_lists.call_of([case], random.Random(0))
    sequences = call.sequences.clone()
    assert sequences.tolist() == [3, 2, 1, 2]
    sequences[1] = sequence_lists.INT32_MAX
    guarded = unchecked.Guards(5).put(sequences)  # what follows would be ids too
    sequence_lists.assert_lists(make, replace(call, sequences=guarded), lists)


#: Functions of the kernel that read what a call points to, or stand between its steps, and how
#: often a call makes at least one of them.
READERS = {"_ids_at": 30, "_record": 9, "_put": 2, "_count": 5, "_dry": 5}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(1, 7))
def test_memory_that_changes(monkeypatch, reader, seed):
    """All that a call reads becomes something else at one of the times that it reads some."""
    chance, guards = random.Random(seed), unchecked.Guards(0)
    call, lists = sequence_lists.changing_call(guards, seed, 5, is_hostile=seed % 2 == 0)
    read, steps = getattr(triton_rules, reader), []
    at = chance.randint(1, READERS[reader])

    def change(*args, **kwargs):
        steps.append(1)
        assert len(steps) < 5000, "a loop does not end"
        if len(steps) % at == 0:
            sequence_lists.overwrite(call, chance)
        return read(*args, **kwargs)

    monkeypatch.setattr(triton_rules, reader, change)
    make(call, lists)
    assert len(steps) >= at
    guards.assert_whole()
    sequence_lists.assert_nothing_behind(lists)


# The kernel that reads the lists


@pytest.fixture
def split(monkeypatch):
    """Tiles of 128 tokens and rows of 4 parts from now on; the rows whose parts were merged."""
    rows, merged = [], kernel._merged_maxima

    def choose_launch(*args, splits, **options):
        return backend.Launch(
            tile=128,
            candidates=256,
            nucleus=16,
            num_warps=1,
            num_stages=2,
            parts=4 if splits else 1,
        )

    def merge(*args):
        rows.append(int(tl.program_id(0).handle.data.item()))
        return merged(*args)

    monkeypatch.setattr(backend, "choose_launch", choose_launch)
    monkeypatch.setattr(kernel, "_merged_maxima", merge)
    return rows


@pytest.fixture
def lowered(monkeypatch):
    """From now on, the row and the first token of each tile for which a list is looked at."""
    found, lower = [], kernel._lowered

    def look(x, lowered, first, *rest):
        row = int(tl.program_id(0).handle.data.item())
        found.append((row, first if isinstance(first, int) else int(first.handle.data.item())))
        return lower(x, lowered, first, *rest)

    monkeypatch.setattr(kernel, "_lowered", look)
    return found


@pytest.mark.parametrize("seed", range(9))
def test_split_rows(split, seed):
    """Parts, small tiles, searches and draws by tile; with a mask, and with ids for one call."""
    rows = Rows(seed, 601, DTYPES[seed % 3])
    options = {"allowed_mask": rows.mask} if seed % 2 else {"extra_output_ids": rows.extra}
    wanted, got = (
        sample(
            rows.logits,
            rows.params,
            history=rows.history(),
            num_samples=3,
            logprobs="processed",
            top_logprobs=5,
            kept="mask",
            check=False,
            backend=name,
            **options,
        )
        for name in ("torch", "triton")
    )
    for name in ("tokens", "status"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.processed.top_ids, wanted.processed.top_ids)
    assert torch.equal(got.kept.mask, wanted.kept.mask)
    assert 0 < len(split) < len(rows.params), "some rows are split"


@pytest.mark.parametrize("position_of", ["row", "slot", "text"])
def test_split_rows_of_slots(split, position_of):
    rows = Rows(7, 450, torch.float32)
    batch = Batch(
        cases=[Case("normal", "plain", "none", 7)] * len(rows.params),
        vocab_size=450,
        dtype=torch.float32,
        logits=rows.logits,
        params=rows.params,
        positions=[3] * len(rows.params),
        history=rows.history(),
        allowed_mask=None,
    )
    assert_by_slot([batch], backend, position_of)
    assert split


def test_only_tiles_with_listed_tokens_look_at_a_list(split, lowered):
    """Rows without a list have no part in it, and penalties that are off do not matter."""
    stop = {"min_tokens": 3, "stop_token_ids": [200, 600]}
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, **stop),
        SamplingParams(temperature=0, presence_penalty=0.5),
        SamplingParams(temperature=0, presence_penalty=0.5, **stop),
        SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[200, 600]),
    ]
    x = torch.zeros(5, 601)
    x[:, 200], x[:, 600], x[:, 300] = 3.0, torch.inf, 1.0
    history = TokenHistory.from_ids([[]] * 5, [[1, 2]] * 5, 601)
    got = sample(x, params, history=history, backend="triton", check=False)
    assert got.tokens.tolist() == [600, 300, 600, 300, 600]
    assert got.status.tolist() == [4, 0, 4, 0, 4]
    assert sorted(lowered) == [(1, 128), (1, 512), (3, 128), (3, 512)]


def test_prepared_steps_keep_the_memory_of_their_lists(monkeypatch):
    """No step allocates lists, and each makes them anew from the text that has grown."""
    made, launched = [], []
    lists, start = backend._lists, backend._make_lists
    monkeypatch.setattr(backend, "_lists", lambda call: made.append(lists(call)) or made[-1])

    def make_and_note(call, into):
        launched.append(into)
        start(call, into)

    monkeypatch.setattr(backend, "_make_lists", make_and_note)
    params = [
        SamplingParams(seed=1, no_repeat_ngram_size=1),
        SamplingParams(seed=2),
        SamplingParams(seed=3, dry_multiplier=9, dry_allowed_length=1, dry_breakers=[[2]]),
        SamplingParams(seed=4, bad_words=[[1, 2]], min_tokens=2, stop_token_ids=[3]),
    ]
    one, other = (
        Sampler(params, vocab_size=9, max_length=12, backend=name) for name in ("triton", "torch")
    )
    generator = torch.Generator().manual_seed(4)
    for step in range(6):
        x = torch.randn(4, 9, generator=generator)
        mask = torch.full((4, 1), -2, dtype=torch.int32) if step % 2 else None
        got, wanted = (sampler(x, allowed_mask=mask) for sampler in (one, other))
        assert torch.equal(got.tokens, wanted.tokens)
    assert len(set(one.history.text.ids[0, :6].tolist())) == 6
    assert len(made) == 2, "one for steps with a mask, one for those without"
    assert [into is made[step % 2] for step, into in enumerate(launched)] == [True] * 6


def test_steps_of_a_table_with_other_rows_and_slots():
    """Rows come and go between prepared steps; some have no rule, and some are padding."""
    tables = [
        RequestTable(4, vocab_size=40, history=True, max_length=9, backend=name)
        for name in ("triton", "torch")
    ]
    kinds = [{"no_repeat_ngram_size": 1}, {}, {"dry_multiplier": 9, "dry_allowed_length": 1}]
    kinds += [{"bad_words": [[7, 3]], "min_tokens": 3, "stop_token_ids": [5]}]
    for table in tables:
        for slot, kind in enumerate(kinds):
            params = SamplingParams(seed=slot, **kind)
            table.set(slot, params, prompt_ids=[7, 3, 7] if slot else [])
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    x[:, [3, 5, 7]] += 4
    for slots in ([0, 1, 2, 3], [3, -1, 0], [2, 3, 1, 0, -1], [3], [1, 0]):
        of_rows = torch.tensor(slots, dtype=torch.int32)
        one, other = (
            sample(x[: len(slots)], table, of_rows, record=True, backend=name)
            for table, name in zip(tables, ("triton", "torch"), strict=True)
        )
        assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("extra", [None, [[3, 50], [2, -1], [-1, 60]]])
def test_logits_of_a_slice(extra):
    """A call whose logits are a slice of a vocabulary gives that slice of the processed logits."""
    x = torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(dry_multiplier=2, dry_allowed_length=1, dry_breakers=[[9]]),
        SamplingParams(no_repeat_ngram_size=2, bad_words=[[2, 40], [2, 60]]),
        SamplingParams(min_tokens=3, stop_token_ids=[31, 33]),
    ]
    texts = [[50, 3, 50, 9, 3, 50, 7, 3], [1, 45, 40, 45, 2], [5]]
    history = TokenHistory.from_ids(texts, None, 60, max_length=9)
    call = make_call(x, params, history=history, check=False, extra_output_ids=extra)
    whole = filter_logits(x, params, history=history, extra_output_ids=extra, backend="torch")
    assert (whole != x).any(-1).all()
    for first, end in ((0, 60), (0, 33), (33, 60), (32, 51), (50, 51)):
        part = replace(call, logits=x[:, first:end].contiguous(), vocab_slice=VocabSlice(first, 60))
        assert torch.equal(backend.filter_logits(part), whole[:, first:end])


@pytest.mark.parametrize("seed", range(8))
def test_lists_that_somebody_overwrites(monkeypatch, split, seed):
    """Whatever they hold when they are read, tokens are of the row, and nothing around matters."""
    seen, lists = [], backend._lists
    for fill in (math.nan, 0.0):
        guards, chance = unchecked.Guards(fill), random.Random(seed)

        def guarded(call, guards=guards):
            return triton_rules.PenaltyLists(*map(guards.put, lists(call)))

        def overwrite(call, into, chance=chance):
            numbers = (unchecked.LEAST, -1, 0, 1, 5, 40, 1000, 2**20, unchecked.MOST)
            for tensor in (into.bits, into.before, into.counts):
                flat = [chance.choice(numbers) for _ in range(tensor.numel())]
                tensor.copy_(torch.tensor(flat).view(tensor.shape))
            amounts = (0.0, 1.5, math.inf, math.nan, -math.inf, -1.0, 3e38)
            flat = [chance.choice(amounts) for _ in range(into.amounts.numel())]
            into.amounts.copy_(torch.tensor(flat).view(into.amounts.shape))

        monkeypatch.setattr(backend, "_lists", guarded)
        monkeypatch.setattr(backend, "_make_lists", overwrite)
        rows = Rows(seed, 450, torch.float32)
        call = make_call(rows.logits, rows.params, history=rows.history(), check=False)
        call = replace(call, logits=guards.put(call.logits), wanted=Wanted(("processed",)))
        output = backend.sample(call)
        unchecked.assert_defined(output, 450)
        filtered = backend.filter_logits(unchecked.to_filter(call))
        assert not filtered.isnan().any()
        guards.assert_whole()
        seen.append((output.tokens, output.status, unchecked.bits(filtered)))
    assert all(map(torch.equal, *seen))
