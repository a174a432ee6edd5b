"""Does a TokenHistory agree with plain lists of ids after every way to build and change it?"""

import copy
import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_sampling import RequestTable, SamplingParams, TokenHistory, sample
from llm_sampling.history import Text


def _unpacked(history):
    """Read each row's set of seen ids, output counts and output length from the tensors."""
    rows = []
    for slot in history.slots.tolist():
        words = history.seen[slot].tolist()
        seen = {
            32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1
        }
        counts = {i: n for i, n in enumerate(history.counts[slot].tolist()) if n}
        rows.append((seen, counts, history.lengths[slot].item()))
    return rows


def _expected(prompts, outputs, vocab_size):
    """Compute what :func:`_unpacked` must return from lists of ids."""
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        valid = [token for token in output if 0 <= token < vocab_size]
        seen = {token for token in prompt if 0 <= token < vocab_size} | set(valid)
        rows.append((seen, {token: valid.count(token) for token in set(valid)}, len(valid)))
    return rows


def _same(history, other):
    assert history.vocab_size == other.vocab_size
    assert history.rows == other.rows
    assert _unpacked(history) == _unpacked(other)


# Building


def test_the_tensors():
    history = TokenHistory.from_ids([[1, 31, 32, 5, 5], [63, 64]], [[0, 0, 31, 0], []], 65)
    assert (history.rows, history.vocab_size) == (2, 65)
    assert history.device == torch.device("cpu")
    for name, dtype, shape in (
        ("seen", torch.int32, (2, 3)),
        ("counts", torch.int32, (2, 65)),
        ("lengths", torch.int64, (2,)),
        ("slots", torch.int32, (2,)),
    ):
        tensor = getattr(history, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
        assert tensor.is_contiguous(), name
    assert history.seen.tolist() == [[0b100011 - 2**31, 1, 0], [0, -(2**31), 1]]
    assert history.counts.nonzero().tolist() == [[0, 0], [0, 31]]
    assert history.counts[0, [0, 31]].tolist() == [3, 1]
    assert history.lengths.tolist() == [4, 0]
    assert history.slots.tolist() == [0, 1]


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 32, 33, 64, 1000])
def test_from_ragged_lists_with_pads(vocab_size):
    rng = random.Random(vocab_size)
    ids = [-(2**40), -2, -1, *range(vocab_size), vocab_size, vocab_size + 31, 2**31, 2**40]
    prompts = [rng.choices(ids, k=rng.randrange(40)) for _ in range(9)]
    outputs = [rng.choices(ids, k=rng.randrange(40)) for _ in range(9)]
    history = TokenHistory.from_ids(prompts, outputs, vocab_size)
    assert _unpacked(history) == _expected(prompts, outputs, vocab_size)
    assert any(seen for seen, _, _ in _unpacked(history))


LISTS = [[3, 1, -1], [2, 2, 70]]


@pytest.mark.parametrize(
    "ids",
    [
        LISTS,
        tuple(map(tuple, LISTS)),
        torch.tensor(LISTS),
        torch.tensor(LISTS, dtype=torch.int32),
        torch.tensor([*zip(*LISTS, strict=True)]).T,
        [torch.tensor(row) for row in LISTS],
        np.array(LISTS),
        np.array(LISTS, dtype=np.int16),
        [np.array(row) for row in LISTS],
        [LISTS[0], torch.tensor(LISTS[1])],
        [[np.int64(token) for token in row] for row in LISTS],
        [[torch.tensor(token) for token in row] for row in LISTS],
    ],
    ids=[
        "lists",
        "tuples",
        "int64",
        "int32",
        "transposed",
        "tensors",
        "numpy",
        "int16",
        "arrays",
        "mixed",
        "numpy-scalars",
        "tensor-scalars",
    ],
)
def test_every_form_of_ids(ids):
    expected = _expected(LISTS, LISTS, 70)
    assert _unpacked(TokenHistory.from_ids(ids, ids, 70)) == expected


def test_unsigned_ids():
    ids = [np.array([250, 3], dtype=np.uint8), np.array([2**64 - 1, 3], dtype=np.uint64)]
    assert _unpacked(TokenHistory.from_ids(ids, None, 100)) == [({3}, {}, 0)] * 2


@pytest.mark.parametrize(
    "empty",
    [[], (), torch.zeros(0), torch.zeros(0, dtype=torch.int64), np.zeros(0), np.zeros(0, np.int32)],
    ids=["list", "tuple", "float-tensor", "tensor", "float-array", "array"],
)
def test_empty_rows(empty):
    history = TokenHistory.from_ids([empty, [1]], [empty, empty], 4)
    assert _unpacked(history) == [(set(), {}, 0), ({1}, {}, 0)]


def test_no_rows():
    for prompt, output in (([], []), ([], None), (torch.zeros(0, 5, dtype=torch.int64), [])):
        history = TokenHistory.from_ids(prompt, output, 40)
        assert history.rows == 0
        assert history.seen.shape == (0, 2)
        history.append(torch.zeros(0, dtype=torch.int64))
        history.select([])
        assert history.add([1], [2]) == 0
        assert _unpacked(history) == [({1, 2}, {2: 1}, 1)]


def test_no_output():
    history = TokenHistory.from_ids([[1], [2]], None, 4)
    assert _unpacked(history) == [({1}, {}, 0), ({2}, {}, 0)]


def test_the_widest_vocabulary():
    history = TokenHistory.from_ids([[2**20 - 1, 2**20]], [[2**20 - 1]], 2**20)
    assert _unpacked(history) == [({2**20 - 1}, {2**20 - 1: 1}, 1)]


def test_a_long_history():
    """An output as long as a 32k context, in which every token occurs many times."""
    rng = random.Random(0)
    output = [rng.randrange(-1, 50) for _ in range(32_768)]
    history = TokenHistory.from_ids([[]], [output], 50)
    assert _unpacked(history) == _expected([[]], [output], 50)


INT = "prompt_ids must hold one sequence of integer ids per row"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([[1]], None), "vocab_size must be an integer, got None"),
        (([[1]], None, 4.0), "vocab_size must be an integer, got 4.0"),
        (([[1]], None, True), "vocab_size must be an integer, got True"),
        (([[1]], None, 0), "vocab_size must be in 1 .. 2^20, got 0"),
        (([[1]], None, -5), "vocab_size must be in 1 .. 2^20, got -5"),
        (([[1]], None, 2**20 + 1), "vocab_size must be in 1 .. 2^20, got 1048577"),
        (
            ([[1]], [], 4),
            "output_ids must have one sequence per row of prompt_ids (1), got 0",
        ),
        (
            ([[1]], [[1], [2]], 4),
            "output_ids must have one sequence per row of prompt_ids (1), got 2",
        ),
        (([[1.0]], None, 4), f"{INT}, got float64 of shape (1,)"),
        (([[True]], None, 4), f"{INT}, got bool of shape (1,)"),
        (([["1"]], None, 4), f"{INT}, got <U1 of shape (1,)"),
        (([[None]], None, 4), f"{INT}, got object of shape (1,)"),
        (([[2**64]], None, 4), f"{INT}, got object of shape (1,)"),
        (([1, 2], None, 4), f"{INT}, got int64 of shape ()"),
        (([[[1, 2]]], None, 4), f"{INT}, got int64 of shape (1, 2)"),
        (([[1], [[1], [2, 3]]], None, 4), f"{INT}, got [[1], [2, 3]]"),
        ((torch.zeros(1, 2).bfloat16(), None, 4), f"{INT}, got tensor([0., 0.]"),
        ((["ab"], None, 4), f"{INT}, got <U2 of shape ()"),
        ((torch.tensor([1, 2]), None, 4), f"{INT}, got int64 of shape ()"),
        ((torch.zeros(1, 2), None, 4), f"{INT}, got float32 of shape (2,)"),
        (
            ([[1]], [[0.5]], 4),
            "output_ids must hold one sequence of integer ids per row, got float64 of shape (1,)",
        ),
        ((None, None, 4), "prompt_ids must have one sequence of ids per row, got None"),
        ((5, None, 4), "prompt_ids must have one sequence of ids per row, got 5"),
        (
            (torch.tensor(5), None, 4),
            "prompt_ids must have one sequence of ids per row, got tensor(5)",
        ),
        (([[1]], 5, 4), "output_ids must have one sequence of ids per row, got 5"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_from_ids_refuses(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenHistory.from_ids(*args)


# Appending


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("vocab_size", [1, 32, 33, 100])
def test_append_is_building_anew(vocab_size, dtype):
    rng = random.Random(vocab_size)
    ids = [-1, *range(vocab_size), vocab_size, 2**31 - 1]
    prompts = [rng.choices(ids, k=3) for _ in range(5)]
    outputs = [[] for _ in range(5)]
    history = TokenHistory.from_ids(prompts, None, vocab_size)
    for _ in range(40):
        tokens = rng.choices(ids, k=5)
        history.append(torch.tensor(tokens, dtype=dtype))
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)
        assert _unpacked(history) == _expected(prompts, outputs, vocab_size)
    assert len({length for _, _, length in _unpacked(history)}) > 1 or vocab_size == 100


def test_append_ignores_ids_outside():
    history = TokenHistory.from_ids([[0]] * 5, [[1]] * 5, 33)
    before = history.clone()
    history.append(torch.tensor([-1, 33, 64, 2**62, -(2**62)]))
    _same(history, before)
    for name in ("seen", "counts", "lengths", "slots"):
        assert torch.equal(getattr(history, name), getattr(before, name)), name


def test_append_follows_the_slots():
    history = TokenHistory.from_ids([[0], [1], [2]], None, 8)
    history.select([2, 0])
    history.append(torch.tensor([5, 6]))
    assert _unpacked(history) == [({2, 5}, {5: 1}, 1), ({0, 6}, {6: 1}, 1)]
    # the free slot, which had belonged to row 1, was not touched
    assert history.counts[1].sum() == 0


def test_append_takes_strided_tokens():
    history = TokenHistory.from_ids([[], []], None, 8)
    history.append(torch.tensor([[3, 9], [4, 9]])[:, 0])
    assert _unpacked(history) == [({3}, {3: 1}, 1), ({4}, {4: 1}, 1)]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1]), "tokens must have shape (2,), one per row, got (1,)"),
        (torch.tensor([1, 2, 3]), "tokens must have shape (2,), one per row, got (3,)"),
        (torch.tensor([[1], [2]]), "tokens must have shape (2,), one per row, got (2, 1)"),
        (torch.tensor(1), "tokens must have shape (2,), one per row, got ()"),
        (torch.tensor([1.0, 2.0]), "tokens must be int64 or int32, got torch.float32"),
        (torch.tensor([True, False]), "tokens must be int64 or int32, got torch.bool"),
        (torch.tensor([1, 2], dtype=torch.int16), "tokens must be int64 or int32, got torch.int16"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "tokens must be on cpu, got meta"),
        ([1, 2], "tokens must be a torch.Tensor, got list"),
        (None, "tokens must be a torch.Tensor, got NoneType"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_append_refuses_and_changes_nothing(tokens, message):
    history = TokenHistory.from_ids([[1], [2]], [[3], []], 8)
    before = history.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        history.append(tokens)
    _same(history, before)


# Adding, selecting


def test_add_uses_free_slots_and_grows():
    history = TokenHistory.from_ids([[0], [1], [2]], [[3], [], []], 40)
    history.select([2, 0])
    assert history.add([35], [36, 36, -1]) == 2
    assert history.slots.tolist() == [2, 0, 1]
    assert history.seen.shape[0] == 3
    expected = [({2}, {}, 0), ({0, 3}, {3: 1}, 1), ({35, 36}, {36: 2}, 2)]
    assert _unpacked(history) == expected
    assert history.add([7]) == 3
    expected.append(({7}, {}, 0))
    assert _unpacked(history) == expected
    assert history.seen.shape[0] > 3
    for name in ("counts", "lengths"):
        assert getattr(history, name).shape[0] == history.seen.shape[0], name
    for name, dtype in (
        ("seen", torch.int32),
        ("counts", torch.int32),
        ("lengths", torch.int64),
        ("slots", torch.int32),
    ):
        assert getattr(history, name).dtype == dtype, name


def test_growth_is_seldom():
    history = TokenHistory.from_ids([], [], 8)
    capacities = []
    for _ in range(100):
        history.add([1])
        capacities.append(history.seen.shape[0])
    assert len(set(capacities)) <= 8
    assert history.slots.tolist() == list(range(100))


def test_a_reused_slot_is_clean():
    history = TokenHistory.from_ids([range(8)], [list(range(8)) * 3], 8)
    history.select([])
    assert history.add([], []) == 0
    assert history.seen.shape[0] == 1
    assert _unpacked(history) == [(set(), {}, 0)]


def test_select():
    history = TokenHistory.from_ids([[0], [1], [2], [3]], [[], [4], [4, 4], []], 8)
    rows = _unpacked(history)
    history.select([3, 1, 0, 2])
    assert _unpacked(history) == [rows[3], rows[1], rows[0], rows[2]]
    history.select((1, 2))
    assert _unpacked(history) == [rows[1], rows[0]]
    history.select(range(2))
    assert _unpacked(history) == [rows[1], rows[0]]
    assert history.rows == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([2], "rows must be integers in 0 .. 1, got 2"),
        ([-1], "rows must be integers in 0 .. 1, got -1"),
        ([0, 0], "rows must name each row at most once, got [0, 0]"),
        ([True], "rows must be integers in 0 .. 1, got True"),
        ([0.0], "rows must be integers in 0 .. 1, got 0.0"),
        (["0"], "rows must be integers in 0 .. 1, got '0'"),
        ([None], "rows must be integers in 0 .. 1, got None"),
    ],
    ids=str,
)
def test_select_refuses_and_changes_nothing(rows, message):
    history = TokenHistory.from_ids([[1], [2]], [[3], []], 8)
    before = history.clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        history.select(rows)
    _same(history, before)


@pytest.mark.parametrize(
    ("args", "name"), [(([0.5],), "prompt_ids"), (([1], ["a"]), "output_ids"), ((1,), "prompt_ids")]
)
def test_add_refuses_and_changes_nothing(args, name):
    history = TokenHistory.from_ids([[1], [2]], [[3], []], 8)
    before = history.clone()
    with pytest.raises(ValueError, match=f"^{name} must hold one sequence of integer ids per row"):
        history.add(*args)
    _same(history, before)
    assert history.seen.shape == before.seen.shape


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_changes(seed):
    """append, add and select in random order agree with plain lists."""
    rng = random.Random(seed)
    vocab_size = rng.choice([1, 33, 70])
    ids = [-1, *range(vocab_size), vocab_size]
    prompts, outputs = [[0], []], [[], [0, 0]]
    history = TokenHistory.from_ids(prompts, outputs, vocab_size)
    for _ in range(60):
        action = rng.choice(["append", "append", "append", "add", "select"])
        if action == "append":
            tokens = rng.choices(ids, k=len(outputs))
            history.append(torch.tensor(tokens, dtype=torch.int64))
            outputs = [[*row, token] for row, token in zip(outputs, tokens, strict=True)]
        elif action == "add":
            prompts.append(rng.choices(ids, k=rng.randrange(5)))
            outputs.append(rng.choices(ids, k=rng.randrange(5)))
            assert history.add(prompts[-1], torch.tensor(outputs[-1])) == len(prompts) - 1
        else:
            rows = rng.sample(range(len(prompts)), k=rng.randrange(len(prompts) + 1))
            history.select(rows)
            prompts, outputs = [prompts[r] for r in rows], [outputs[r] for r in rows]
        assert history.rows == len(prompts)
        assert len(set(history.slots.tolist())) == history.rows
        assert _unpacked(history) == _expected(prompts, outputs, vocab_size)


def test_rows_among_others():
    """A row without a history shares another's slot, which changes nothing without a penalty."""
    history = TokenHistory.from_ids([[1], [2], [3]], [[4], [5, 5], []], 40)
    history.select([2, 0])
    among = history.among([None, 1, None, 0, None])
    assert (among.rows, among.vocab_size, among.device) == (5, 40, history.device)
    rows = _unpacked(among)
    assert [rows[1], rows[3]] == [_unpacked(history)[1], _unpacked(history)[0]]
    params = [SamplingParams(temperature=0, presence_penalty=2.0 * (i in (1, 3))) for i in range(5)]
    logits = torch.zeros(5, 40)
    logits[:, 4] = 1.0
    for backend in ("cpu", "torch"):
        tokens = sample(logits, params, history=among, backend=backend).tokens
        assert tokens.tolist() == [4, 0, 4, 4, 4]


def test_rows_among_others_follow_what_is_appended():
    history = TokenHistory.from_ids([[1], [2]], None, 40)
    among = history.among([1, None])
    history.append(torch.tensor([7, 8]))
    assert _unpacked(among)[0] == ({2, 8}, {8: 1}, 1)


def test_no_rows_among_none():
    assert TokenHistory.from_ids([], None, 40).among([]).rows == 0


@pytest.mark.parametrize("rows", [[2], [-1], [0, None, 0], [True], ["0"]])
def test_rows_among_others_refuses(rows):
    with pytest.raises(ValueError, match="rows must"):
        TokenHistory.from_ids([[1], [2]], None, 40).among(rows)


# Copies


@pytest.mark.parametrize("start", [0, 1, 31, 32, 45, 64, 100, 149])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 50, 150])
def test_a_part_of_the_vocabulary(start, width):
    """A part has every bit and count of its own ids, and none of the ids beside it."""
    width = min(width, 150 - start)
    rng = random.Random(start + width)
    prompts, outputs = ([rng.choices(range(150), k=90) for _ in range(3)] for _ in range(2))
    whole = TokenHistory.from_ids(prompts, outputs, 150)
    whole.select([2, 0])
    before = whole.clone()
    ids = [[[t - start for t in row] for row in (rows[2], rows[0])] for rows in (prompts, outputs)]
    expected = [(seen, counts, 90) for seen, counts, _ in _expected(*ids, width)]
    part = whole.part(start, width)
    assert _unpacked(part) == expected
    assert part.seen.shape == (3, -(-width // 32))
    for name in ("seen", "counts", "lengths", "slots"):
        assert torch.equal(getattr(whole, name), getattr(before, name))


def test_a_clone_is_independent():
    history = TokenHistory.from_ids([[1], [2]], [[3], []], 8)
    before = _unpacked(history)
    clone = history.clone()
    clone.append(torch.tensor([5, 6]))
    clone.select([1])
    assert _unpacked(history) == before
    history.append(torch.tensor([0, 0]))
    assert _unpacked(clone) == [({2, 6}, {6: 1}, 1)]


def test_to():
    history = TokenHistory.from_ids([[1], [2]], [[3], []], 8)
    assert history.to("cpu") is history
    assert history.to("cpu:0") is history
    moved = history.to("meta")
    assert moved.device == torch.device("meta")
    assert (moved.rows, moved.vocab_size) == (2, 8)
    assert {t.device.type for t in (moved.seen, moved.counts, moved.lengths, moved.slots)} == {
        "meta"
    }


# Memory that belongs to the caller


class Memory:
    """Tensors of somebody else, each a view of a larger one that is otherwise full of 77."""

    def __init__(self):
        self.held = []

    def zeros(self, *shape, dtype, gap=0):
        """Return rows of zeros, with ``gap`` elements before and after each."""
        size = (shape[0] + 2, *(width + 2 * gap for width in shape[1:]))
        whole = torch.full(size, 77, dtype=torch.int32 if dtype == torch.uint32 else dtype)
        inside = whole[1:-1]
        if gap:
            inside = inside[:, gap:-gap]
        inside.zero_()
        self.held.append((whole, inside))
        return inside.view(dtype)

    def assert_nothing_else_is_written(self):
        for whole, inside in self.held:
            around = whole.clone()
            view = around.as_strided(inside.shape, inside.stride(), inside.storage_offset())
            view.fill_(77)
            assert (around == 77).all()


def _with_caller_s_memory(memory, vocab_size, *, words, has_lengths, max_length, slots=(2, 0)):
    capacity = 3
    text = None
    if max_length is not None:
        text = Text(
            memory.zeros(capacity, max_length, dtype=torch.int32),
            memory.zeros(capacity, dtype=torch.int64),
            memory.zeros(capacity, dtype=torch.int64),
            memory.zeros(capacity, dtype=torch.int32).fill_(-1),
        )
    lengths = memory.zeros(capacity, dtype=torch.int64) if has_lengths else None
    return TokenHistory(
        memory.zeros(capacity, -(-vocab_size // 32), dtype=words, gap=3),
        memory.zeros(capacity, vocab_size, dtype=words, gap=5),
        lengths,
        torch.tensor(slots, dtype=torch.int32),
        vocab_size,
        text,
    )


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("has_lengths", [True, False])
@pytest.mark.parametrize("words", [torch.int32, torch.uint32], ids=str)
def test_memory_of_the_caller_is_changed_in_place(words, has_lengths, max_length):
    memory = Memory()
    history = _with_caller_s_memory(
        memory, 70, words=words, has_lengths=has_lengths, max_length=max_length
    )
    own = TokenHistory.empty(3, 70, max_length=max_length, penalty_last_n=max_length and [-1] * 3)
    own.select([2, 0])
    both = (history, own)
    addresses = [history.seen.data_ptr(), history.counts.data_ptr(), history.lengths.data_ptr()]
    for each in both:
        each.append(torch.tensor([69, 31]))
        each.extend(1, [5, 5, -1, 32])
        each.append(torch.tensor([-1, 69]))
        assert each.add([1, 2], [3]) == 2
        if max_length is not None:
            each.rollback(1, 2)
    _same(history, own)
    memory.assert_nothing_else_is_written()
    assert addresses == [x.data_ptr() for x in (history.seen, history.counts, history.lengths)]
    insides = [inside for _, inside in memory.held]
    for tensor in (own.seen, own.counts, *(own.text or ())):
        assert any(x.shape == tensor.shape and torch.equal(x, tensor) for x in insides)
    for each in both:
        each.select([2, 1])
        each.append(torch.tensor([7, 8]))
    _same(history, own)
    memory.assert_nothing_else_is_written()


@pytest.mark.parametrize("max_length", [None, 4])
def test_no_row_is_added_to_memory_of_the_caller_that_is_full(max_length):
    memory = Memory()
    history = _with_caller_s_memory(
        memory, 40, words=torch.int32, has_lengths=True, max_length=max_length, slots=(1, 2, 0)
    )
    history.append(torch.tensor([1, 2, 3]))
    before = copy.deepcopy(history)
    message = (
        "there must be a free slot for one more row, since these tensors belong to the caller, got "
        "3 rows in 3 slots"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        history.add([1], [2])
    _same(history, before)
    history.select([0, 2])
    assert history.add([9]) == 2  # the slot that became free
    assert history.slots.tolist() == [1, 0, 2]
    assert _unpacked(history)[2] == ({9}, {}, 0)
    memory.assert_nothing_else_is_written()


def test_a_copy_of_memory_of_the_caller_is_its_own():
    """A clone owns its tensors, so that it can grow."""
    memory = Memory()
    history = _with_caller_s_memory(
        memory, 40, words=torch.uint32, has_lengths=False, max_length=4, slots=(0, 1, 2)
    )
    clone = history.clone()
    assert clone.add([1], [2]) == 3
    clone.append(torch.tensor([4, 4, 4, 4]))
    assert _unpacked(history) == [(set(), {}, 0)] * 3
    memory.assert_nothing_else_is_written()


@pytest.mark.parametrize("max_length", [None, 20])
def test_a_table_on_an_engine_s_tensors(backend, max_length):
    """It draws what a table with tensors of its own draws, and writes into the engine's."""
    vocab_size = 70
    memory = Memory()
    engines = _with_caller_s_memory(
        memory, vocab_size, words=torch.int32, has_lengths=False, max_length=max_length
    )
    tables = (
        RequestTable(3, vocab_size=vocab_size, history=engines, backend=backend),
        RequestTable(
            3, vocab_size=vocab_size, history=True, max_length=max_length, backend=backend
        ),
    )
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(
        temperature=2, frequency_penalty=0.9, repetition_penalty=1.5, presence_penalty=1, seed=4
    )
    drawn = {table: [] for table in tables}
    for step in range(4):
        logits = torch.randn(3, vocab_size, generator=generator)
        for table in tables:
            if step % 2 == 0:
                table.set(step % 3, params, prompt_ids=[1, 33, 69], output_ids=[2, 2])
            table.set(1, params, prompt_ids=[5])
            drawn[table].append(sample(logits[:2], table, slots=[0, 1], backend=backend).tokens)
            if max_length is not None:
                table.rollback([0], [1])
    first, second = drawn.values()
    assert all(map(torch.equal, first, second))
    _same(tables[0].history, tables[1].history)
    assert engines.counts.data_ptr() == tables[0].history.counts.data_ptr()
    assert int(engines.counts.sum()) > 0
    memory.assert_nothing_else_is_written()


def test_a_request_without_ids_leaves_an_engine_s_history_as_it_is(backend):
    """The engine has written the request's ids; a table's own slot is emptied instead."""
    vocab_size = 40
    params = SamplingParams(temperature=0, presence_penalty=2, seed=1)
    logits = torch.zeros(1, vocab_size)
    found = {}
    for is_engine_s in (True, False):
        filled = TokenHistory.from_ids([[], []], [[0, 1], [2]], vocab_size)
        engines = TokenHistory(filled.seen, filled.counts, None, filled.slots, vocab_size)
        history = engines if is_engine_s else filled
        table = RequestTable(2, vocab_size=vocab_size, history=history, backend=backend)
        table.set(0, params, position=2)
        table.set(1, params, prompt_ids=[])
        found[is_engine_s] = [
            int(sample(logits, table, [slot], backend=backend).tokens) for slot in (0, 1)
        ]
        table.set(0, replace(params, presence_penalty=0))
        if is_engine_s:
            table.set_params(0, params)
        else:
            with pytest.raises(ValueError, match="the history was not kept"):
                table.set_params(0, params)
        assert table.positions.tolist() == [0, 0]
    assert found == {True: [2, 0], False: [0, 0]}


@pytest.mark.parametrize(
    "again",
    [lambda history: pickle.loads(pickle.dumps(history)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
@pytest.mark.parametrize("is_caller_s", [True, False])
def test_a_history_with_a_text_can_be_copied(again, is_caller_s):
    """The copy is independent, has the ids in order, and can grow if the original can."""
    if is_caller_s:
        history = _with_caller_s_memory(
            Memory(), 40, words=torch.int32, has_lengths=True, max_length=8, slots=(2, 0, 1)
        )
        history.append(torch.tensor([1, 2, 3]))
    else:
        history = TokenHistory.from_ids(
            [[1], [2], [3]], [[4], [], [7, 7]], 40, max_length=8, penalty_last_n=[2, -1, 1]
        )
    history.select([2, 0, 1])
    copied = again(history)
    _same(copied, history)
    assert all(map(torch.equal, copied.text, history.text))
    before = history.clone()
    copied.extend(1, [9, 9])
    copied.rollback(0, 1)
    assert not torch.equal(copied.text.lengths, history.text.lengths)
    _same(history, before)
    assert all(map(torch.equal, history.text, before.text))
    history.extend(1, [9, 9])
    history.rollback(0, 1)
    _same(copied, history)
    assert all(map(torch.equal, copied.text, history.text))
    if is_caller_s:
        with pytest.raises(ValueError, match="there must be a free slot"):
            copied.add([1])
    else:
        assert copied.add([1], penalty_last_n=3) == 3


@pytest.mark.parametrize("number", [2, np.int64(2)], ids=["int", "numpy"])
def test_a_rollback_by_any_integer(number):
    history = TokenHistory.from_ids([[1]], [[2, 3, 4]], 40, max_length=8)
    history.rollback(0, number)
    assert _unpacked(history) == _unpacked(TokenHistory.from_ids([[1]], [[2]], 40))
