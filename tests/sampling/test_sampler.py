"""Does a Sampler equal a loop over sample(), whatever happens to its rows between steps?"""

import random
import re

import pytest
import torch

from llm_sampling import InvalidLogitsError, Sampler, SamplingParams, TokenHistory, sample
from llm_sampling.backends import BACKENDS
from llm_sampling.results import tensors_of

INF = float("inf")
V = 37

PARAMS = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.9, seed=3, frequency_penalty=0.4),
    SamplingParams(min_p=0.05, presence_penalty=0.7, repetition_penalty=1.2, seed=2**64 - 4),
    SamplingParams(top_p=0.7, logit_bias={3: 2.5, 90: 9.0}, seed=1),
]
PLAIN = [SamplingParams(seed=1), SamplingParams(top_k=5, seed=2), SamplingParams(temperature=0)]
PROMPTS = [[1, 2], [3, 36, 3], [], [0, 5, -1, 5], [7]]
OUTPUTS = [[4, 4], [], [6], [8, 8, 8, 99], []]


def _logits(seed, rows=5, steps=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, rows, V, generator=generator) * 2


def _history(prompts=PROMPTS, outputs=OUTPUTS):
    return TokenHistory.from_ids(prompts, outputs, V)


def _state(history):
    """Return the state of each row of a history, whichever slot holds it."""
    slots = history.slots.long()
    return (
        history.seen[slots].tolist(),
        history.counts[slots].tolist(),
        history.lengths[slots].tolist(),
    )


def _loop(params, steps, history, position, backend, **options):
    """Sample, append and advance in a loop, which a Sampler must equal."""
    tokens = []
    for logits in steps:
        output = sample(
            logits, params, history=history, positions=position, backend=backend, **options
        )
        tokens.append(output.tokens.tolist())
        if history is not None:
            history.append(output.tokens)
        position = position + (output.tokens >= 0)
    return tokens, position


@pytest.mark.parametrize("logprobs", [None, "processed", "raw"])
def test_it_is_the_plain_loop(backend, logprobs):
    steps = _logits(0)
    looped, sampled = _history(), _history()
    start = torch.tensor([2, 0, 1, 3, 0])
    expected, position = _loop(PARAMS, steps, looped, start, backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=sampled, backend=backend, logprobs=logprobs)
    assert torch.equal(sampler.positions, start)
    got = [sampler(logits) for logits in steps]
    assert [output.tokens.tolist() for output in got] == expected
    assert torch.equal(sampler.positions, position)
    assert sampler.history is sampled
    assert _state(sampled) == _state(looped)
    assert len({tuple(tokens) for tokens in expected}) == len(steps)
    for output, logits in zip(got, steps, strict=True):
        assert output.tokens.dtype == torch.int64
        assert output.status.tolist() == [0] * 5
        if logprobs is None:
            assert output.logprobs is None
        elif logprobs == "raw":
            raw = logits.log_softmax(-1).gather(1, output.tokens.unsqueeze(1)).squeeze(1)
            assert torch.allclose(output.logprobs, raw, atol=1e-5, rtol=0)
        else:
            assert output.logprobs[1] == 0
            assert (output.logprobs <= 0).all()


def test_processed_logprobs_are_those_of_sample(backend):
    history, position = _history(), torch.tensor([2, 0, 1, 3, 0])
    sampler = Sampler(
        PARAMS, vocab_size=V, history=_history(), backend=backend, logprobs="processed"
    )
    for logits in _logits(1):
        expected = sample(
            logits,
            PARAMS,
            history=history,
            positions=position,
            logprobs="processed",
            backend=backend,
        )
        history.append(expected.tokens)
        position = position + 1
        torch.testing.assert_close(sampler(logits).logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_without_a_history(backend):
    steps = _logits(2, rows=3)
    expected, position = _loop(PLAIN, steps, None, torch.zeros(3, dtype=torch.int64), backend)
    sampler = Sampler(PLAIN, vocab_size=V, backend=backend)
    assert [sampler(logits).tokens.tolist() for logits in steps] == expected
    assert sampler.history is None
    assert sampler.positions.tolist() == position.tolist() == [12, 12, 12]


def test_a_history_of_its_own(backend):
    steps = _logits(3)
    empty = _history([[]] * 5, None)
    expected, _ = _loop(PARAMS, steps, empty, torch.zeros(5, dtype=torch.int64), backend)
    sampler = Sampler(PARAMS, vocab_size=V, backend=backend)
    assert [sampler(logits).tokens.tolist() for logits in steps] == expected
    assert sampler.history is not None
    assert _state(sampler.history) == _state(empty)


def test_one_params_is_one_row(backend):
    sampler = Sampler(PLAIN[0], vocab_size=V, backend=backend)
    assert (sampler.rows, sampler.params) == (1, (PLAIN[0],))
    assert sampler(torch.zeros(1, V)).tokens.shape == (1,)


def test_a_mask_holds_for_its_step(backend):
    steps = _logits(4, steps=6)
    generator = torch.Generator().manual_seed(4)
    masks = torch.randint(-(2**31), 2**31, (6, 5, 2), generator=generator).to(torch.int32)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    history, position = _history(), torch.tensor([2, 0, 1, 3, 0])
    differs = False
    for step, (logits, mask) in enumerate(zip(steps, masks, strict=True)):
        allowed = mask if step % 2 else None
        options = {"history": history, "positions": position, "backend": backend}
        expected = sample(logits, PARAMS, allowed_mask=allowed, **options)
        differs |= step % 2 and not torch.equal(
            expected.tokens, sample(logits, PARAMS, **options).tokens
        )
        history.append(expected.tokens)
        position = position + 1
        assert sampler(logits, allowed_mask=allowed).tokens.tolist() == expected.tokens.tolist()
    assert differs


@pytest.mark.parametrize("num_samples", [2, 5])
def test_several_draws(backend, num_samples):
    steps = _logits(5, rows=3)
    sampler = Sampler(PLAIN, vocab_size=V, num_samples=num_samples, logprobs="raw", backend=backend)
    for position, logits in enumerate(steps):
        expected = sample(
            logits,
            PLAIN,
            positions=[position] * 3,
            num_samples=num_samples,
            logprobs="raw",
            backend=backend,
        )
        output = sampler(logits)
        assert output.tokens.shape == (3, num_samples)
        assert output.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(output.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert sampler.positions.tolist() == [12, 12, 12]


def test_several_draws_with_a_history_for_the_positions(backend):
    """With several draws the positions advance, but the history does not, as no penalty is on."""
    history = _history(PROMPTS[:3], OUTPUTS[:3])
    before = _state(history)
    sampler = Sampler(PLAIN, vocab_size=V, history=history, num_samples=2, backend=backend)
    expected = sample(torch.zeros(3, V), PLAIN, positions=[2, 0, 1], num_samples=2, backend=backend)
    assert sampler(torch.zeros(3, V)).tokens.tolist() == expected.tokens.tolist()
    assert sampler.positions.tolist() == [3, 1, 2]
    assert _state(history) == before


# Layouts and dtypes


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x * 2], -1)[..., 0],
        lambda x: torch.nn.functional.pad(x, (3, 4))[:, 3:-4],
        lambda x: torch.cat([x, -x])[: len(x)].flip(0).flip(0),
    ],
    ids=["transposed", "every-second", "sliced", "flipped"],
)
def test_any_layout(backend, view):
    steps = _logits(6)
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    for step, logits in enumerate(steps):
        # every second step is contiguous, so that the layouts alternate
        assert sampler(view(logits) if step % 2 else logits).tokens.tolist() == expected[step]


def test_a_new_dtype_at_any_step(backend):
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32] * 3
    steps = [logits.to(d) for logits, d in zip(_logits(7, steps=15), dtypes, strict=True)]
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    assert [sampler(logits).tokens.tolist() for logits in steps] == expected


def test_a_stable_buffer_that_is_overwritten(backend):
    """Logits may use the same memory at each step; earlier results must not change with it."""
    steps = _logits(8)
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    buffer, results = torch.empty(5, V), []
    for logits in steps:
        results.append(sampler(buffer.copy_(logits)))
    assert [output.tokens.tolist() for output in results] == expected


def test_logits_with_a_gradient(backend):
    steps = _logits(9, steps=3).requires_grad_()
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend, logprobs="raw")
    for logits in steps:
        output = sampler(logits)
        assert not output.logprobs.requires_grad


def test_logits_are_not_modified(backend):
    steps = _logits(10)
    copy = steps.clone()
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    for logits in steps:
        sampler(logits)
    assert torch.equal(steps, copy)


# Bad rows


def test_a_row_without_candidates_does_not_advance(backend):
    steps = _logits(11)
    dead = {3: [1, 2], 4: [2], 7: [0, 1, 2, 3, 4]}
    for step, rows in dead.items():
        steps[step, rows] = -INF
    expected, position = _loop(
        PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend, check=False
    )
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend, check=False)
    for step, logits in enumerate(steps):
        output = sampler(logits)
        assert output.tokens.tolist() == expected[step]
        got = {row for row, token in enumerate(expected[step]) if token == -1}
        assert got == set(dead.get(step, []))
        assert output.status.tolist() == [2 if row in got else 0 for row in range(5)]
    assert sampler.positions.tolist() == position.tolist() == [13, 10, 10, 14, 11]


@pytest.mark.parametrize(
    ("value", "keep_from", "message"),
    [
        (float("nan"), 1, "NaN in logits in row 2"),
        (INF, 1, "+inf in logits in row 2"),
        (-INF, V, "no candidate left (every logit is -inf or masked) in row 2"),
        (
            float("nan"),
            V,
            "NaN in logits in row 2; no candidate left (every logit is -inf or masked) in row 2",
        ),
    ],
    ids=["nan", "inf", "empty", "all-nan"],
)
def test_an_error_advances_nothing(backend, value, keep_from, message):
    steps = _logits(12)
    expected, position = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    history = _history()
    sampler = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    for step, logits in enumerate(steps):
        bad = logits.clone()
        bad[2, :keep_from] = value
        before, positions = _state(history), sampler.positions
        with pytest.raises(InvalidLogitsError, match=f"^{re.escape(message)}$") as error:
            sampler(bad)
        assert error.value.rows == [2]
        assert _state(history) == before
        assert torch.equal(sampler.positions, positions)
        assert sampler(logits).tokens.tolist() == expected[step]
    assert torch.equal(sampler.positions, position)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("logprobs", [None, "raw"])
def test_the_results_of_two_steps_are_independent(backend, logprobs, rows):
    """Tokens that a graph has saved stay as they are when another step's are changed in place."""
    sampler = Sampler(PLAIN[:rows], vocab_size=V, logprobs=logprobs, backend=backend)
    embedding = torch.nn.Embedding(V, 4)
    outputs = [sampler(logits) for logits in _logits(13, rows, steps=70)]
    loss = sum(embedding(output.tokens).sum() for output in outputs[::2])
    for output in outputs[1::2]:
        for result in tensors_of(output):
            result.zero_()
    loss.backward()
    counts = torch.zeros(V).index_add_(
        0, torch.cat([output.tokens for output in outputs[::2]]), torch.ones(35 * rows)
    )
    assert torch.equal(embedding.weight.grad, counts[:, None].expand(V, 4))


def test_check_can_be_off(backend):
    sampler = Sampler(PLAIN, vocab_size=V, backend=backend, check=False)
    logits = torch.zeros(3, V)
    logits[0, 5], logits[1, 7], logits[2] = float("nan"), INF, -INF
    output = sampler(logits)
    assert output.status.tolist() == [1, 4, 2]
    assert output.tokens[1:].tolist() == [7, -1]
    assert sampler.positions.tolist() == [1, 1, 0]


# Continuous batching


class _Request:
    """A request with its parameters, its ids and a row of logits for each of its steps."""

    def __init__(self, number):
        rng = random.Random(number)
        self.params = rng.choice(
            [
                SamplingParams(seed=number),
                SamplingParams(seed=7, top_k=8, temperature=0.9, frequency_penalty=0.5),
                SamplingParams(seed=7, top_p=0.8, repetition_penalty=1.4),
                SamplingParams(temperature=0, presence_penalty=1.5),
                SamplingParams(seed=2**64 - 1 - number, min_p=0.05, logit_bias={number % V: 1.5}),
            ]
        )
        self.prompt = rng.choices(range(-1, V), k=rng.randrange(6))
        self.output = rng.choices(range(-1, V + 2), k=rng.randrange(4))
        self.logits = _logits(number, rows=1, steps=40)[:, 0]
        self.tokens = []

    def next_logits(self):
        return self.logits[len(self.tokens)]

    def alone(self, backend):
        """Return the tokens that the request gets in a batch of its own."""
        history = TokenHistory.from_ids([self.prompt], [self.output], V)
        position = sum(0 <= token < V for token in self.output)
        tokens = []
        for logits in self.logits[: len(self.tokens)]:
            output = sample(
                logits.unsqueeze(0),
                self.params,
                history=history,
                positions=[position],
                backend=backend,
            )
            tokens.append(output.tokens.item())
            history.append(output.tokens)
            position += 1
        return tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("given", [True, False], ids=["with-history", "without"])
def test_rows_come_go_and_move(backend, seed, given):
    """Requests are added, removed and moved at random; each gets the tokens that it gets alone."""
    rng = random.Random(seed)
    everyone = [_Request(100 * seed + i) for i in range(4)]
    active = list(everyone)
    history = None
    if given:
        history = TokenHistory.from_ids([r.prompt for r in active], [r.output for r in active], V)
    else:
        for request in active:
            request.prompt, request.output = [], []
    sampler = Sampler([r.params for r in active], vocab_size=V, history=history, backend=backend)
    for _ in range(30):
        for action in rng.choices(["add", "remove", "reorder", "nothing"], [3, 2, 2, 4], k=2):
            if action == "add":
                request = _Request(1000 + 100 * seed + len(everyone))
                everyone.append(request)
                active.append(request)
                row = sampler.add(
                    request.params, prompt_ids=request.prompt, output_ids=request.output
                )
                assert row == len(active) - 1
            elif action == "remove" and active:
                gone = rng.sample(range(len(active)), k=rng.randrange(1, min(3, len(active) + 1)))
                sampler.remove(gone)
                active = [r for row, r in enumerate(active) if row not in gone]
            elif action == "reorder":
                rows = rng.sample(range(len(active)), k=len(active))
                sampler.reorder(rows)
                active = [active[row] for row in rows]
        assert sampler.rows == len(active)
        assert sampler.params == tuple(r.params for r in active)
        logits = torch.stack([r.next_logits() for r in active]) if active else torch.zeros(0, V)
        tokens = sampler(logits).tokens.tolist()
        assert len(tokens) == len(active)
        for request, token in zip(active, tokens, strict=True):
            request.tokens.append(token)
    assert len(everyone) > 8
    for request in everyone:
        assert request.tokens == request.alone(backend)
    assert any(len(request.tokens) > 10 for request in everyone)


def test_positions_of_added_rows(backend):
    """An added row's position is its number of valid output ids, with or without a history."""
    sampler = Sampler(PLAIN[:1], vocab_size=V, backend=backend)
    sampler(torch.zeros(1, V))
    sampler.add(PLAIN[1], output_ids=[1, 2, -1, V, 3])
    assert sampler.positions.tolist() == [1, 3]
    assert sampler.history is None
    sampler.add(PARAMS[3], prompt_ids=[1], output_ids=torch.tensor([4]))
    assert sampler.positions.tolist() == [1, 3, 1]
    assert sampler.history is not None
    assert sampler.history.rows == 3
    sampler.remove([1])
    assert sampler.positions.tolist() == [1, 1]
    sampler(torch.zeros(2, V))
    assert sampler.positions.tolist() == [2, 2]


def test_removing_every_row(backend):
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    sampler.remove(range(5))
    assert sampler.rows == 0
    assert sampler(torch.zeros(0, V)).tokens.shape == (0,)
    assert sampler.add(PARAMS[2], prompt_ids=PROMPTS[2], output_ids=OUTPUTS[2]) == 0
    steps = _logits(13)[:, 2:3]
    expected, _ = _loop(
        PARAMS[2], steps, _history(PROMPTS[2:3], OUTPUTS[2:3]), torch.tensor([1]), backend
    )
    assert [sampler(logits).tokens.tolist() for logits in steps] == expected


def test_no_rows_at_first(backend):
    sampler = Sampler([], vocab_size=V, backend=backend)
    assert sampler(torch.zeros(0, V)).tokens.tolist() == []
    assert sampler.add(PLAIN[0]) == 0
    expected = sample(torch.zeros(1, V), PLAIN[0], backend=backend)
    assert sampler(torch.zeros(1, V)).tokens.tolist() == expected.tokens.tolist()


def test_reorder_takes_any_iterable(backend):
    steps = _logits(14)
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    order = [4, 2, 0, 1, 3]
    sampler.reorder(row for row in order)
    assert sampler.rows == 5
    got = [sampler(logits[order]).tokens.tolist() for logits in steps]
    assert got == [[tokens[row] for row in order] for tokens in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.remove([5]), "rows must be integers in 0 .. 4, got 5"),
        (lambda s: s.remove([-1]), "rows must be integers in 0 .. 4, got -1"),
        (lambda s: s.remove([1, 1]), "rows must name each row at most once, got [1, 1]"),
        (lambda s: s.reorder([0, 5]), "rows must be integers in 0 .. 4, got 5"),
        (lambda s: s.reorder([0, 0]), "rows must name each row at most once, got [0, 0]"),
        (lambda s: s.reorder([True]), "rows must be integers in 0 .. 4, got True"),
        (lambda s: s.add({"top_k": 1}), "params must be a SamplingParams, got {'top_k': 1}"),
        (lambda s: s.add(PARAMS[2], prompt_ids=["x"]), "prompt_ids must hold one sequence"),
        (lambda s: s.add(PARAMS[2], output_ids=[0.5]), "output_ids must hold one sequence"),
    ],
    ids=[
        "remove-5",
        "remove-negative",
        "remove-twice",
        "reorder-5",
        "reorder-twice",
        "reorder-bool",
        "add-dict",
        "add-prompt",
        "add-output",
    ],
)
def test_a_refused_change_changes_nothing(backend, change, message):
    steps = _logits(15, steps=3)
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    for step, logits in enumerate(steps):
        with pytest.raises(ValueError, match=re.escape(message)):
            change(sampler)
        assert sampler.rows == 5
        assert sampler(logits).tokens.tolist() == expected[step]


@pytest.mark.parametrize("penalty", [None, 1.2], ids=["plain", "penalty"])
@pytest.mark.parametrize("ids", ["prompt_ids", "output_ids"])
def test_bad_ids_of_an_added_row(backend, ids, penalty):
    """Bad ids are refused alike with or without a penalty, and leave the Sampler unchanged."""
    steps = _logits(16, rows=3, steps=3)
    expected, _ = _loop(PLAIN, steps, None, torch.zeros(3, dtype=torch.int64), backend)
    sampler = Sampler(PLAIN, vocab_size=V, backend=backend)
    for step, logits in enumerate(steps):
        with pytest.raises(ValueError, match=f"^{ids} must hold one sequence of integer ids"):
            sampler.add(SamplingParams(repetition_penalty=penalty), **{ids: [0.5]})
        assert sampler.history is None
        assert sampler(logits).tokens.tolist() == expected[step]


# The user may change the history that the Sampler uses


def _shared(backend, steps=3):
    """Return a Sampler that has run for some steps, and its history."""
    history = _history()
    sampler = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    for logits in _logits(17, steps=steps):
        sampler(logits)
    return sampler, history


def _expect(sampler, history, logits, backend):
    """Return the tokens of sample() for the current state of the history."""
    return sample(
        logits,
        sampler.params,
        history=history,
        positions=sampler.positions,
        backend=backend,
    ).tokens.tolist()


def test_appending_to_the_shared_history(backend):
    sampler, history = _shared(backend)
    for step, logits in enumerate(_logits(18, steps=6)):
        history.append(torch.tensor([step, 36 - step, 5, -1, step]))
        expected = _expect(sampler, history, logits, backend)
        assert sampler(logits).tokens.tolist() == expected


@pytest.mark.parametrize("in_place", [False, True])
def test_reordering_the_shared_history(backend, in_place):
    """The rows are the Sampler's: in another order each would get the past of another."""
    sampler, history = _shared(backend)
    slots = history.slots.clone()

    def reorder(rows):
        if in_place:
            history.slots.copy_(history.slots[rows])
        else:
            history.select(rows)

    for logits in _logits(19, steps=6):
        reorder([4, 3, 0, 1, 2])
        before, positions = _state(history), sampler.positions
        message = (
            "history must have the Sampler's rows in their order, but its slots were changed from "
            f"{slots.tolist()} to {history.slots.tolist()}"
        )
        for call in (
            lambda logits=logits: sampler(logits),
            lambda: sampler.add(PLAIN[0]),
            lambda: sampler.remove([1]),
            lambda: sampler.reorder([1, 0, 2, 3, 4]),
        ):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                call()
        assert _state(history) == before
        assert torch.equal(sampler.positions, positions)
        reorder([2, 3, 4, 1, 0])  # the order that it was
        assert torch.equal(history.slots, slots)
        expected = _expect(sampler, history, logits, backend)
        assert sampler(logits).tokens.tolist() == expected


def test_two_samplers_that_share_a_history(backend):
    """One of them reorders the rows; the other one refuses to mistake each for another."""
    first, history = _shared(backend)
    second = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    logits = _logits(19, steps=4)
    for step in logits[:2]:  # their tokens go into the same rows
        for sampler in (first, second):
            expected = _expect(sampler, history, step, backend)
            assert sampler(step).tokens.tolist() == expected
    first.reorder([1, 0, 2, 3, 4])
    before = _state(history)
    with pytest.raises(ValueError, match="history must have the Sampler's rows in their order"):
        second(logits[2])
    assert _state(history) == before
    first(logits[2])
    first.reorder([1, 0, 2, 3, 4])
    second(logits[3])


def test_another_request_in_a_shared_slot(backend):
    """A slot that was freed and filled again keeps its number and holds another request."""
    first, history = _shared(backend)
    second = Sampler(PARAMS, vocab_size=V, history=history, backend=backend)
    slots = history.slots.tolist()
    first.remove([4])
    first.add(PARAMS[4], prompt_ids=[9])
    assert history.slots.tolist() == slots
    before = _state(history)
    message = "history must have the Sampler's rows, but its row 4 is another request"
    for call in (
        lambda: second(torch.zeros(5, V)),
        lambda: second.reorder([1, 0, 2, 3, 4]),
        lambda: second.add(PARAMS[0]),
        lambda: second.state_dict(),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call()
    assert _state(history) == before
    expected = _expect(first, history, torch.zeros(5, V), backend)
    assert first(torch.zeros(5, V)).tokens.tolist() == expected


def test_a_shared_history_that_grew_and_shrank(backend):
    """After add() and select() the history has its rows again, but in other memory."""
    sampler, history = _shared(backend)
    for logits in _logits(20, steps=6):
        history.add([1, 2], [3])
        history.select(range(5))
        expected = _expect(sampler, history, logits, backend)
        lengths = history.lengths[history.slots.long()] + 1
        assert sampler(logits).tokens.tolist() == expected
        assert torch.equal(history.lengths[history.slots.long()], lengths)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda h: h.add([1], [2]), 6),
        (lambda h: h.select([0, 1]), 2),
        (lambda h: h.select([]), 0),
        (lambda h: h.select([3]), 1),
    ],
    ids=["added", "removed", "emptied", "one-left"],
)
def test_a_shared_history_of_another_length(backend, change, rows):
    sampler, history = _shared(backend)
    change(history)
    before, positions = _state(history), sampler.positions
    message = f"history must have one row per row of logits (5), got {rows}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sampler(_logits(21)[0])
    assert _state(history) == before
    assert torch.equal(sampler.positions, positions)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.add(PLAIN[0], prompt_ids=[1]),
        lambda s: s.remove([0]),
        lambda s: s.reorder([1, 0]),
    ],
    ids=["add", "remove", "reorder"],
)
def test_changing_rows_after_the_shared_history_changed(backend, change):
    """If the shared history has another number of rows, a change of the Sampler's rows raises."""
    sampler, history = _shared(backend)
    history.select([0, 1])
    before = _state(history)
    with pytest.raises(ValueError, match=r"^history must have one row per row of logits"):
        change(sampler)
    assert _state(history) == before
    assert sampler.rows == 5


def test_positions_are_a_copy(backend):
    sampler = Sampler(PLAIN, vocab_size=V, backend=backend)
    sampler.positions.fill_(50)
    assert sampler.positions.tolist() == [0, 0, 0]
    first = sampler.positions
    sampler(torch.zeros(3, V))
    assert first.tolist() == [0, 0, 0]


def test_results_of_earlier_steps_stay(backend):
    sampler = Sampler(PLAIN, vocab_size=V, backend=backend, logprobs="raw")
    steps = _logits(22, rows=3)
    outputs = [sampler(logits) for logits in steps]
    kept = [[tensor.clone() for tensor in tensors_of(output)] for output in outputs]
    for logits in steps:
        sampler(logits)
    for output, copies in zip(outputs, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(output), copies, strict=True))


# Rows without a seed


def test_manual_seed_governs_unseeded_rows(backend):
    params = [SamplingParams(), SamplingParams(seed=5), SamplingParams()]

    def stream(manual_seed):
        torch.manual_seed(manual_seed)
        sampler = Sampler(params, vocab_size=V, backend=backend)
        sampler.add(SamplingParams())
        return torch.stack([sampler(torch.zeros(4, V)).tokens for _ in range(16)]).T.tolist()

    first, second = stream(1), stream(2)
    assert first == stream(1)
    assert first[1] == second[1]
    different = [first[0], first[2], first[3], second[0], second[2], second[3], first[1]]
    assert len({tuple(tokens) for tokens in different}) == 7


def test_a_step_leaves_the_generator_alone(backend):
    sampler = Sampler([SamplingParams()] * 2, vocab_size=V, backend=backend)
    before = torch.get_rng_state()
    for logits in _logits(23, rows=2):
        sampler(logits)
    sampler.reorder([1, 0])
    sampler(torch.zeros(2, V))
    assert torch.equal(torch.get_rng_state(), before)


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be in 1 .. 2^20, got 0"),
        ({"vocab_size": 2**20 + 1}, "vocab_size must be in 1 .. 2^20, got 1048577"),
        ({"vocab_size": 5.0}, "vocab_size must be an integer, got 5.0"),
        ({"vocab_size": True}, "vocab_size must be an integer, got True"),
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"num_samples": True}, "num_samples must be an integer >= 1, got True"),
        (
            {"logprobs": "x"},
            'logprobs must be None, "processed", "raw", or both of them in a sequence, got \'x\'',
        ),
        (
            {"backend": "x"},
            f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got 'x'",
        ),
        ({"check": 1}, "check must be True, False or None, got 1"),
        ({"params": [PLAIN[0], None]}, "params[1] must be a SamplingParams, got None"),
        ({"params": None}, "params must be a SamplingParams or a sequence of them, got NoneType"),
        ({"params": 3}, "params must be a SamplingParams or a sequence of them, got int"),
        ({"history": [[1]]}, "history must be a TokenHistory, got list"),
        (
            {"history": TokenHistory.from_ids([[]], None, V)},
            "history must have one row per row of logits (3), got 1",
        ),
        (
            {"history": TokenHistory.from_ids([[]] * 3, None, V + 1)},
            f"history must have the logits' vocab_size {V}, got {V + 1}",
        ),
        (
            {"history": TokenHistory.from_ids([[]] * 3, None, V, device="meta"), "device": "cpu"},
            "history must be on the logits' device cpu, got meta",
        ),
        (
            {"params": PARAMS, "num_samples": 2},
            "num_samples must be 1 where a penalty or a rule is on that looks at the history, "
            "which follows one token per row, got 2",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Sampler(**{"params": PLAIN, "vocab_size": V, **options})


def test_a_penalty_cannot_join_several_draws(backend):
    sampler = Sampler(PLAIN, vocab_size=V, num_samples=2, backend=backend)
    with pytest.raises(ValueError, match="num_samples must be 1 where a penalty or a rule is on"):
        sampler.add(PARAMS[3])
    assert sampler.rows == 3
    assert sampler(torch.zeros(3, V)).tokens.shape == (3, 2)


BAD_LOGITS = [
    (torch.zeros(4, V), f"logits must have shape (rows, vocab_size) = (5, {V}), got (4, {V})"),
    (torch.zeros(1, V), f"logits must have shape (rows, vocab_size) = (5, {V}), got (1, {V})"),
    (torch.zeros(5, V - 1), f"logits must have shape (rows, vocab_size) = (5, {V}), got (5, 36)"),
    (torch.zeros(5, V, 1), f"logits must have shape (rows, vocab_size), got (5, {V}, 1)"),
    (torch.zeros(V), f"logits must have shape (rows, vocab_size), got ({V},)"),
    (
        torch.zeros(5, V, dtype=torch.float64),
        "logits must be float32, float16 or bfloat16, got torch.float64",
    ),
    (torch.zeros(5, V, device="meta"), "logits must be on cpu, got meta"),
    (torch.zeros(5, V).to_sparse(), "logits must be a dense tensor, got layout torch.sparse_coo"),
    ([[0.0] * V] * 5, "logits must be a torch.Tensor, got list"),
    (None, "logits must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize(
    ("logits", "message"), BAD_LOGITS, ids=[message[-30:] for _, message in BAD_LOGITS]
)
def test_bad_logits_at_any_step(backend, logits, message):
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    steps = _logits(24, steps=3)
    expected, _ = _loop(PARAMS, steps, _history(), torch.tensor([2, 0, 1, 3, 0]), backend)
    for step, good in enumerate(steps):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            sampler(logits)
        assert sampler(good).tokens.tolist() == expected[step]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.int64), ", got torch.int64 of shape (5, 2)"),
        (torch.zeros(5, 1, dtype=torch.int32), " = 2 columns, got 1: "),
        (torch.zeros(5, V - 1, dtype=torch.bool), " = 37 columns, got 36: "),
        (torch.zeros(5, 2, dtype=torch.int32, device="meta"), "logits' device cpu, got meta"),
        ([[0, 0]] * 4, "one element for each row of the logits (5), got 4"),
    ],
    ids=["int64", "narrow", "narrow bool", "device", "rows"],
)
def test_bad_mask_at_any_step(backend, mask, message):
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), backend=backend)
    for logits in _logits(25, steps=3):
        with pytest.raises(ValueError, match=f"^allowed_mask .*{re.escape(message)}"):
            sampler(logits, allowed_mask=mask)
        sampler(logits)
    assert sampler.positions.tolist() == [5, 3, 4, 6, 3]


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=str)
def test_every_name_of_the_device(backend, device):
    sampler = Sampler(PARAMS, vocab_size=V, history=_history(), device=device, backend=backend)
    assert sampler.device == torch.device("cpu")
    assert sampler(torch.zeros(5, V)).tokens.shape == (5,)
