"""Rows of a Sampler that change between two steps; Samplers that are copied and restored."""

import copy
import io
import pickle
import re
from dataclasses import replace

import pytest
import torch
from cases import ON_THE_CPU

from llm_sampling import InvalidLogitsError, Sampler, SamplingParams, TokenHistory, sample
from llm_sampling.growing_table import GrowingTable
from llm_sampling.history import STATE_TENSORS

V = 37
PARAMS = [
    SamplingParams(top_k=9, seed=1),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.4, seed=2**64 - 4),
    SamplingParams(presence_penalty=0.7, logit_bias={3: 2.5, 5: -float("inf"), 90: 9.0}),
]
PROMPTS = [[1, 2], [3, 36, 3], [], [0, 5, -1, 5]]
OUTPUTS = [[4, 4], [], [6], [8, 8, 8, 99]]
POSITIONS = [2, 0, 1, 3]


def logits_of(seed, steps, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, rows, V, generator=generator) * 2


def make(backend, outputs=OUTPUTS, **options):
    history = TokenHistory.from_ids(PROMPTS, outputs, V)
    return Sampler(PARAMS, vocab_size=V, history=history, backend=backend, **options)


def tokens_of(sampler, steps):
    return [sampler(logits).tokens.tolist() for logits in steps]


def seeded(sampler):
    """Return each row's parameters, with the seed that the row draws with."""
    return [replace(p, seed=s) for p, s in zip(sampler.params, sampler.seeds, strict=True)]


def state_of(sampler):
    """Return what decides the tokens of the next steps, as plain numbers."""
    history = sampler.history
    slots = [] if history is None else history.slots.long()
    tensors = [] if history is None else [history.seen, history.counts, history.lengths]
    return (
        sampler.params,
        sampler.seeds,
        sampler.positions.tolist(),
        [tensor[slots].tolist() for tensor in tensors],
    )


# Seeds that can be read


def test_the_seeds_of_rows(backend):
    sampler = make(backend)
    assert sampler.seeds[0] == 1
    assert sampler.seeds[2] == 2**64 - 4
    assert all(0 <= seed < 2**64 for seed in sampler.seeds)
    assert sampler.seeds[1] != sampler.seeds[3]
    logits = logits_of(1, 1)[0]
    expected = sample(logits, seeded(sampler), history=sampler.history, backend=backend)
    assert sampler(logits).tokens.tolist() == expected.tokens.tolist()


# Tokens that were not drawn


@pytest.mark.parametrize(
    "as_given", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]
)
def test_tokens_that_were_not_drawn(backend, as_given):
    """The row goes on like one that was added with these tokens in its output."""
    came = {0: [7], 2: [6, 36, 6, 0, 99, -1, 6], 3: []}
    sampler = make(backend)
    drawn = tokens_of(sampler, logits_of(2, 3))
    for row, tokens in came.items():
        sampler.extend(row, as_given(tokens))
    outputs = [
        [*OUTPUTS[row], *(tokens[row] for tokens in drawn), *came.get(row, [])] for row in range(4)
    ]
    other = make(backend, outputs)
    for row, seed in enumerate(sampler.seeds):
        other.set_params(row, replace(PARAMS[row], seed=seed))
        sampler.set_params(row, replace(PARAMS[row], seed=seed))
    assert state_of(sampler) == state_of(other)
    steps = logits_of(3, 6)
    assert tokens_of(sampler, steps) == tokens_of(other, steps)


def test_tokens_that_were_not_drawn_move_the_position_without_a_history(backend):
    params = [SamplingParams(seed=1), SamplingParams(top_k=5, seed=2)]
    sampler = Sampler(params, vocab_size=V, backend=backend)
    sampler.extend(1, [3, 3, V, 4])
    assert sampler.history is None
    assert sampler.positions.tolist() == [0, 3]


def test_several_draws_move_positions_alone(backend):
    """As a step with several draws does: the history follows none of them."""
    history = TokenHistory.from_ids([[]], None, V)
    sampler = Sampler(
        SamplingParams(seed=1), vocab_size=V, history=history, num_samples=2, backend=backend
    )
    sampler.extend(0, [3, 3])
    assert sampler.positions.tolist() == [2]
    assert history.lengths.tolist() == [0]


def test_a_history_is_extended():
    history = TokenHistory.from_ids(PROMPTS, OUTPUTS, V)
    history.select([3, 0])
    history.extend(0, torch.tensor([31, 32, 31, -7]))
    history.extend(1, [])
    expected = TokenHistory.from_ids(
        [PROMPTS[3], PROMPTS[0]], [[*OUTPUTS[3], 31, 32, 31], OUTPUTS[0]], V
    )
    slots = history.slots.long()
    for name in ("seen", "counts", "lengths"):
        assert torch.equal(getattr(history, name)[slots], getattr(expected, name))


# Tokens that are taken away, and penalties for the last tokens

WINDOWED = [replace(p, penalty_last_n=n) for p, n in zip(PARAMS, (-1, 2, 0, 3), strict=True)]


def with_text(backend, params=PARAMS, **options):
    windows = [p.penalty_last_n for p in params]
    history = TokenHistory.from_ids(PROMPTS, OUTPUTS, V, max_length=20, penalty_last_n=windows)
    return Sampler(params, vocab_size=V, history=history, backend=backend, **options)


@pytest.mark.parametrize("params", [PARAMS, WINDOWED], ids=["all", "windows"])
def test_a_row_that_goes_back_draws_the_same_tokens_again(backend, params):
    sampler = with_text(backend, [replace(p, seed=row) for row, p in enumerate(params)])
    start, steps = state_of(sampler), logits_of(2, 6)
    first = tokens_of(sampler, steps)
    assert len({tuple(tokens) for tokens in first}) > 1
    for row, number in enumerate((6, 6, 6, 6)):
        sampler.rollback(row, number)
    assert state_of(sampler) == start
    assert tokens_of(sampler, steps) == first
    sampler.rollback(2, 0)
    sampler.rollback(2, 3)
    sampler.extend(2, [tokens[2] for tokens in first[3:]])
    assert sampler.positions.tolist() == [position + 6 for position in POSITIONS]


def test_a_row_without_a_history_goes_back(backend):
    params = SamplingParams(top_k=9, seed=1)
    sampler = Sampler([params], vocab_size=V, backend=backend)
    steps = logits_of(3, 4, rows=1)
    first = tokens_of(sampler, steps)
    sampler.rollback(0, 3)
    assert sampler.positions.tolist() == [1]
    assert tokens_of(sampler, steps[1:]) == first[1:]
    with pytest.raises(ValueError, match="num_tokens must be at most 4, the position, got 5"):
        sampler.rollback(0, 5)


def test_what_cannot_be_taken_away(backend):
    sampler = make(backend)
    with pytest.raises(ValueError, match="rollback needs the ids in order: make the history with"):
        sampler.rollback(0, 1)
    sampler = with_text(backend)
    with pytest.raises(ValueError, match=r"num_tokens must be at most 2, the length of the row's"):
        sampler.rollback(0, 3)
    with pytest.raises(ValueError, match="num_tokens must be an integer >= 0, got -1"):
        sampler.rollback(0, -1)
    with pytest.raises(ValueError, match=r"row must be an integer in 0 \.\. 3, got 4"):
        sampler.rollback(4, 1)
    assert sampler.positions.tolist() == POSITIONS


def test_a_window_that_changes(backend):
    """A row whose window changes draws what a row draws that always had that window."""
    sampler = with_text(backend, WINDOWED)
    seeds = sampler.seeds
    for row, params in enumerate(PARAMS):
        sampler.set_params(row, replace(params, seed=seeds[row]))
    other = with_text(backend, [replace(p, seed=s) for p, s in zip(PARAMS, seeds, strict=True)])
    steps = logits_of(4, 5)
    assert tokens_of(sampler, steps) == tokens_of(other, steps)
    for row, params in enumerate(WINDOWED):
        sampler.set_params(row, params)
    other = Sampler.from_state_dict(sampler.state_dict(), backend=backend)
    ids = [sampler.history.text.ids[slot].tolist() for slot in sampler.history.slots]
    of_prompts = sampler.history.text.prompt_lengths.tolist()
    lengths = sampler.history.text.lengths.tolist()
    built = TokenHistory.from_ids(
        [row[:prompt] for row, prompt in zip(ids, of_prompts, strict=True)],
        [row[p:n] for row, p, n in zip(ids, of_prompts, lengths, strict=True)],
        V,
        max_length=20,
        penalty_last_n=[p.penalty_last_n for p in WINDOWED],
    )
    assert torch.equal(built.seen, sampler.history.seen)
    assert torch.equal(built.counts, sampler.history.counts)
    assert tokens_of(sampler, steps) == tokens_of(other, steps)


def test_a_row_without_room(backend):
    """It draws nothing, and with a check the step raises and nothing advances."""
    params = [SamplingParams(repetition_penalty=1.2, seed=row) for row in range(2)]
    sampler = Sampler(params, vocab_size=V, max_length=3, backend=backend, check=False)
    sampler.extend(1, [1, 2])
    steps = logits_of(5, 2, rows=2)
    assert sampler(steps[0]).status.tolist() == [0, 0]
    output = sampler(steps[1])
    assert output.status.tolist() == [0, 8]
    assert output.tokens[1] == -1
    assert sampler.positions.tolist() == [2, 3]
    checking = Sampler.from_state_dict({**sampler.state_dict(), "check": True}, backend=backend)
    with pytest.raises(InvalidLogitsError, match="no room for another id in the text") as error:
        checking(steps[0])
    assert error.value.rows == [1]
    assert checking.positions.tolist() == [2, 3]
    with pytest.raises(ValueError, match="tokens must be at most 0 ids, for which there is room"):
        sampler.extend(1, [4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": WINDOWED}, "max_length must be given where penalty_last_n is"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        (
            {"history": TokenHistory.from_ids(PROMPTS, None, V), "max_length": 9},
            "max_length must be None where history is given, got 9",
        ),
        (
            {"history": TokenHistory.from_ids(PROMPTS, None, V), "params": WINDOWED},
            "history must have windows where penalty_last_n is on",
        ),
        (
            {
                "history": TokenHistory.from_ids(
                    PROMPTS, None, V, max_length=9, penalty_last_n=[-1, 2, 0, 4]
                ),
                "params": WINDOWED,
            },
            "history must have the penalty_last_n of the parameters, 3 in row 3, got one of 4",
        ),
    ],
)
def test_a_text_that_there_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(**{"params": PARAMS, "vocab_size": V, **options})


# Positions and parameters


@pytest.mark.parametrize("position", [0, 5, 2**63, 2**64 - 1, -1])
def test_a_position_that_is_set(backend, position):
    sampler = make(backend)
    tokens_of(sampler, logits_of(4, 2))
    sampler.set_position(2, position)
    before = sampler.positions
    assert int(before[2]) % 2**64 == position % 2**64
    logits = logits_of(5, 1)[0]
    expected = sample(
        logits, seeded(sampler), history=sampler.history, positions=before, backend=backend
    )
    assert sampler(logits).tokens.tolist() == expected.tokens.tolist()
    assert int(sampler.positions[2]) % 2**64 == (position + 1) % 2**64


def test_parameters_that_change(backend):
    """A row keeps its seed unless the new parameters have one."""
    sampler = make(backend)
    seeds = list(sampler.seeds)
    changes = [
        (0, SamplingParams(temperature=0.3, seed=8)),
        (0, SamplingParams(temperature=2.0, repetition_penalty=1.5)),
        (3, SamplingParams(top_k=2)),
        (1, SamplingParams(temperature=1.5, logit_bias={7: 5.0})),
    ]
    for (row, params), logits in zip(changes, logits_of(6, len(changes)), strict=True):
        sampler.set_params(row, params)
        seeds[row] = seeds[row] if params.seed is None else params.seed
        assert sampler.params[row] == params
        assert sampler.seeds == tuple(seeds)
        positions = sampler.positions
        expected = sample(
            logits, seeded(sampler), history=sampler.history, positions=positions, backend=backend
        )
        assert sampler(logits).tokens.tolist() == expected.tokens.tolist()
    assert sampler.positions.tolist() == [position + len(changes) for position in POSITIONS]


PENALTY = SamplingParams(presence_penalty=0.5)
NOT_KEPT = (
    "params must have no penalty, and no rule that needs it, where the row's history was not kept "
    "(row 0)"
)


def test_a_penalty_is_refused_where_the_history_was_not_kept(backend):
    sampler = Sampler([SamplingParams(seed=1)], vocab_size=V, backend=backend)
    with pytest.raises(ValueError, match=re.escape(NOT_KEPT)):
        sampler.set_params(0, PENALTY)
    sampler.add(PENALTY, output_ids=[3])  # from here on there is a history
    with pytest.raises(ValueError, match=re.escape(NOT_KEPT)):
        sampler.set_params(0, PENALTY)
    sampler.set_params(0, SamplingParams(top_k=3))
    sampler.set_params(1, SamplingParams(top_k=3))
    sampler.set_params(1, PENALTY)
    sampler.reorder([1, 0])
    sampler.set_params(0, SamplingParams(repetition_penalty=2.0))
    sampler.remove([0])
    with pytest.raises(ValueError, match=re.escape(NOT_KEPT)):
        sampler.set_params(0, PENALTY)
    sampler.remove([0])
    sampler.add(SamplingParams(), prompt_ids=[4])
    sampler.set_params(0, PENALTY)
    assert sampler.history.seen[sampler.history.slots[0], 0] == 1 << 4


def test_a_penalty_is_refused_beside_several_draws(backend):
    sampler = Sampler(
        [SamplingParams()],
        vocab_size=V,
        history=TokenHistory.from_ids([[]], None, V),
        num_samples=2,
        backend=backend,
    )
    with pytest.raises(ValueError, match="num_samples must be 1 where a penalty or a rule is on"):
        sampler.set_params(0, PENALTY)


REFUSED = {
    "params of no row": (
        lambda s: s.set_params(4, PENALTY),
        "row must be an integer in 0 .. 3, got 4",
    ),
    "params of a bool": (
        lambda s: s.set_params(True, PENALTY),
        "row must be an integer in 0 .. 3, got True",
    ),
    "a dict": (lambda s: s.set_params(0, {}), "params must be a SamplingParams, got {}"),
    "tokens of no row": (lambda s: s.extend(-1, [1]), "row must be an integer in 0 .. 3, got -1"),
    "half a token": (
        lambda s: s.extend(0, [0.5]),
        "tokens must hold one sequence of integer ids per row, got float64 of shape (1,)",
    ),
    "rows of tokens": (
        lambda s: s.extend(0, [[1]]),
        "tokens must hold one sequence of integer ids per row, got int64 of shape (1, 1)",
    ),
    "a position of no row": (
        lambda s: s.set_position(1.0, 1),
        "row must be an integer in 0 .. 3, got 1.0",
    ),
    "a large position": (
        lambda s: s.set_position(0, 2**64),
        f"position must be in [-2^63, 2^64), got {2**64}",
    ),
    "a position that is a bool": (
        lambda s: s.set_position(0, True),
        "position must be integers, got True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_change_changes_nothing(backend, name):
    change, message = REFUSED[name]
    sampler = make(backend)
    before = state_of(sampler)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        change(sampler)
    assert state_of(sampler) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.extend(0, [1]),
        lambda s: s.set_params(0, SamplingParams()),
        lambda s: s.state_dict(),
    ],
    ids=["extend", "set_params", "state_dict"],
)
def test_rows_that_somebody_else_has_moved_are_refused(backend, change):
    sampler = make(backend)
    sampler.history.select([1, 0, 2, 3])
    with pytest.raises(ValueError, match="history must have the Sampler's rows in their order"):
        change(sampler)


@pytest.mark.parametrize("way", ["made with", "added", "changed"])
def test_a_row_that_needs_several_new_things(backend, way):
    """Of its bias, its penalty and its scope none was needed before."""
    params = SamplingParams(
        temperature=0,
        repetition_penalty=1000.0,
        repetition_penalty_scope="output",
        logit_bias={1: 60.0, 2: 50.0},
    )
    plain = SamplingParams(temperature=0)
    history = TokenHistory.from_ids([[1]], None, V)
    first = params if way == "made with" else plain
    sampler = Sampler(first, vocab_size=V, history=history, backend=backend)
    if way == "added":
        sampler.add(params, prompt_ids=[1])
    elif way == "changed":
        sampler(torch.zeros(1, V))
        sampler.set_params(0, params)
    logits = torch.zeros(sampler.rows, V)
    assert [int(sampler(logits).tokens[-1]) for _ in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("params", [SamplingParams(), PARAMS[1]], ids=["no history", "a history"])
def test_slots_of_calls_that_were_interrupted_are_used_again(monkeypatch, params):
    sampler = Sampler([params], vocab_size=V)
    sampler.add(params)
    capacity = sampler._table.capacity

    def interrupt(*given):
        raise KeyboardInterrupt

    for _ in range(3 * capacity):
        with monkeypatch.context() as patch:
            patch.setattr(GrowingTable, "leave", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sampler.remove([0])
            patch.setattr(Sampler, "_arrange", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sampler.add(params)
        assert sampler.rows == 1
        sampler.add(params)
    assert sampler._table.capacity == capacity


# Copies


def through_a_file(sampler, backend):
    """Save with torch.save; restore on the given backend from tensors and plain values alone."""
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    return Sampler.from_state_dict(torch.load(file, weights_only=True), backend=backend)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda sampler: pickle.loads(pickle.dumps(sampler)),
    **{
        f"on {backend}": lambda sampler, backend=backend: through_a_file(sampler, backend)
        for backend in ON_THE_CPU
    },
}


@pytest.mark.parametrize("options", [{}, {"logprobs": "raw", "check": False}], ids=["", "options"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_with_the_same_tokens(backend, way, options):
    sampler = make(backend, **options)
    tokens_of(sampler, logits_of(7, 3))
    sampler.add(SamplingParams(min_p=0.1), prompt_ids=[5])
    sampler.remove([1])
    generator = torch.get_rng_state()
    other = COPIES[way](sampler)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state_of(other) == state_of(sampler)
    steps = logits_of(8, 4)
    outputs = [sampler(logits) for logits in steps]
    for output, logits in zip(outputs, steps, strict=True):
        again = other(logits)
        assert again.tokens.tolist() == output.tokens.tolist()
        if "logprobs" in options:
            torch.testing.assert_close(again.logprobs, output.logprobs, atol=1e-5, rtol=0)
    assert state_of(other) == state_of(sampler)
    assert other.check == sampler.check


def test_a_copy_is_independent(backend):
    sampler = make(backend)
    others = [make_copy(sampler) for make_copy in COPIES.values()]
    saved = sampler.state_dict()
    before = state_of(sampler)
    tokens_of(sampler, logits_of(9, 3))
    assert state_of(sampler) != before
    others.append(Sampler.from_state_dict(saved))
    tokens_of(others[-1], logits_of(9, 1))
    others.append(Sampler.from_state_dict(saved))  # the step above has not changed the state
    del others[-2]
    assert [state_of(other) for other in others] == [before] * len(others)


@pytest.mark.parametrize(
    "params",
    [[], [SamplingParams()], [SamplingParams(), SamplingParams(seed=3)]],
    ids=["no rows", "one", "two"],
)
def test_a_copy_without_a_history(backend, params):
    sampler = Sampler(params, vocab_size=V, num_samples=3, backend=backend)
    steps = logits_of(10, 3, len(params))
    for make_copy in COPIES.values():
        other = make_copy(sampler)
        assert other.history is None
        assert tokens_of(other, steps) == tokens_of(make_copy(sampler), steps)
    with pytest.raises(ValueError, match="num_samples must be 1 where a penalty or a rule is on"):
        other.add(PENALTY)


def test_what_was_not_kept_is_not_kept_in_a_copy(backend):
    sampler = Sampler([SamplingParams(seed=1)], vocab_size=V, backend=backend)
    sampler.add(PENALTY)
    for make_copy in COPIES.values():
        other = make_copy(sampler)
        other.set_params(1, SamplingParams(frequency_penalty=1.0))
        with pytest.raises(ValueError, match=re.escape(NOT_KEPT)):
            other.set_params(0, PENALTY)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


BAD_STATES = {
    "no mapping": (lambda state: [1], "state must be a mapping with check, history"),
    "no seeds": (without("seed"), "state must be a mapping with check, history"),
    "a seed too few": (
        lambda state: {**state, "seed": state["seed"][1:]},
        "seed must be torch.int64 of shape (4,), got torch.int64 of shape (3,)",
    ),
    "positions of another type": (
        lambda state: {**state, "position": state["position"].float()},
        "position must be torch.int64 of shape (4,), got torch.float32 of shape (4,)",
    ),
    "a row too few": (
        lambda state: {**state, "is_kept": state["is_kept"][1:]},
        "is_kept must be of 4 rows, got [True, True, True]",
    ),
    "numbers for bools": (
        lambda state: {**state, "is_kept": [1, 1, 1, 1]},
        "is_kept must be True or False, got 1",
    ),
    "a slot twice": (
        lambda state: {
            **state,
            "history": {**state["history"], "slots": torch.zeros(4, dtype=torch.int32)},
        },
        "slots must name each slot at most once",
    ),
    "no history": (
        lambda state: {**state, "history": None, "params": [{"top_p": 2.0}] * 4},
        "top_p must be",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_no_sampler_had(name):
    change, message = BAD_STATES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Sampler.from_state_dict(change(make("torch").state_dict()))


def test_the_restored_history_has_its_own_memory():
    sampler = make("torch")
    state = sampler.state_dict()
    other = Sampler.from_state_dict(state)
    for name in STATE_TENSORS:
        addresses = {
            getattr(sampler.history, name).data_ptr(),
            state["history"][name].data_ptr(),
            getattr(other.history, name).data_ptr(),
        }
        assert len(addresses) == 3
