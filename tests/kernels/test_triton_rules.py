"""The maker of the lists of step 5a in Triton, against the specification, in the interpreter.

Needs Triton's interpreter; test_triton.py starts a process that has it.
"""

import random

import pytest
import sequence_lists
import torch
import unchecked
from sequence_lists import Lists

from llm_sampling.backends import triton_rules
from llm_sampling.sequence_rules import SequenceRules

pytestmark = pytest.mark.usefixtures("triton_alone")


@pytest.fixture(params=["triton"])
def triton_alone(request):
    """Puts "triton" into the name of every test here, so that -k triton selects them."""
    return request.param


def make(call, lists):
    guards = unchecked.Guards(0)
    rows, most = len(call.slots), triton_rules.MAX_EXTRA_OUTPUT
    scratch = guards.put(torch.full((rows, most), sequence_lists.INT32_MAX, dtype=torch.int32))
    into = triton_rules.PenaltyLists(*lists, scratch)
    made = triton_rules.make_lists(
        triton_rules.RuleColumns(**call.rules),
        call.slots,
        call.lengths,
        vocab_size=call.vocab_size,
        sequences=triton_rules.RuleSequences(
            call.sequence_offsets, call.sequences, call.sequence_counts
        ),
        param_slots=call.param_slots,
        kept_ids=None if call.text is None else triton_rules.KeptIds(call.text, call.text_lengths),
        extra_output=call.extra_output,
        lists=into,
    )
    assert made is into
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


def test_memory_that_is_allocated():
    call, lists = sequence_lists.random_call(33, 4, 2)
    made = triton_rules.make_lists(
        triton_rules.RuleColumns(**call.rules),
        call.slots,
        call.lengths,
        vocab_size=33,
        sequences=triton_rules.RuleSequences(call.sequence_offsets, call.sequences),
        kept_ids=triton_rules.KeptIds(call.text, call.text_lengths),
        extra_output=call.extra_output,
    )
    sequence_lists.assert_consistent(Lists(*made[:5]), 33)
    assert made.counts.tolist() == [len(of_row) for of_row in lists]
    assert made.ids.shape == (4, 33)


def test_no_rows_and_no_sequences():
    call, _ = sequence_lists.random_call(33, 1, 0)
    case = (SequenceRules(no_repeat_ngram_size=1), [4, 5], [], 0, 33)
    call, lists = sequence_lists.call_of([case], random.Random(0))
    assert call.sequences.numel() == 0
    sequence_lists.assert_lists(make, call, lists)
    rules = triton_rules.RuleColumns(**call.rules)
    none = triton_rules.make_lists(rules, call.slots[:0], call.lengths, vocab_size=33)
    assert [tensor.shape[0] for tensor in none] == [0] * 6


def test_more_ids_than_have_places_are_refused():
    call, _ = sequence_lists.random_call(33, 1, 0)
    text = torch.empty(1, dtype=torch.int32).expand(1, 2**30 + 1)
    with pytest.raises(ValueError, match="a slot must keep at most 1073741824 ids, got 1073741825"):
        triton_rules.make_lists(
            triton_rules.RuleColumns(**call.rules),
            call.slots,
            call.lengths,
            vocab_size=33,
            kept_ids=triton_rules.KeptIds(text, call.text_lengths),
        )


# Values that nothing has checked, memory that changes


@pytest.mark.parametrize("vocab_size", [7, 33, 1000])
@pytest.mark.parametrize("seed", range(30))
def test_hostile_values(vocab_size, seed):
    sequence_lists.assert_hostile_values_do_no_harm(make, vocab_size, seed)


#: Functions of the kernel that read what a call points to, or stand between its steps, and how
#: often a call makes at least one of them.
READERS = {"_ids_at": 30, "_record": 9, "_put": 2, "_count": 5, "_dry": 5}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(1, 7))
def test_memory_that_changes(monkeypatch, reader, seed):
    """All that a call reads becomes something else at one of the times that it reads some."""
    chance, guards = random.Random(seed), unchecked.Guards(0)
    if seed % 2:
        call, _ = sequence_lists.random_call(33, 5, seed)
        tensors = {id(tensor): guards.put(tensor) for tensor in call.tensors()}
        call = sequence_lists.mapped(call, lambda tensor: tensors[id(tensor)])
    else:
        call = sequence_lists.hostile_call(guards, 1000, seed)
    lists = Lists(*map(guards.put, sequence_lists.memory_for(call)))
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
