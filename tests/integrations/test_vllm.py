"""The plug-in for vLLM without vLLM: what it replaces and refuses, and what its requests draw.

tests/integrations/test_vllm_engine.py has the real engine.
"""

import importlib
import logging
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from vllm_texts import MAX_LENGTH, Theirs, V, alone, logits_of, random_extra, random_params

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.integrations.engine import NO_RULE, Warnings
from llm_sampling.integrations.vllm import SWITCH, register, v1
from llm_sampling.integrations.vllm.both import LOG, READ_BY_V1, params_of, with_extra
from llm_sampling.integrations.vllm.v1 import RUNNER, Requests

# ---- parameters ----


def test_parameters_keep_their_meaning():
    theirs = Theirs(0.5, 40, 0.9, 0.1, 1.2, 0.3, -0.2, seed=9)
    assert params_of(theirs) == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.2,
        seed=9,
    )
    assert params_of(Theirs(top_k=-1, seed=1)) == SamplingParams(seed=1)


@pytest.mark.parametrize(("given", "taken"), [(0, 0.0), (9.9e-6, 0.0), (1e-5, 1e-5), (0.01, 0.01)])
def test_temperatures_that_vllm_takes_for_greedy(given, taken):
    assert params_of(Theirs(temperature=given, seed=0)).temperature == taken


@pytest.mark.parametrize(
    "theirs",
    [
        Theirs(temperature=1e300),
        Theirs(repetition_penalty=1e-300),
        Theirs(repetition_penalty=1e300),
        Theirs(top_p=True, min_p=True, frequency_penalty=False, top_k=True),
        Theirs(top_p=5e-324),
        Theirs(top_k=2**40),
    ],
)
def test_what_vllm_accepts_is_accepted(theirs):
    """A ValueError in the middle of a step would end the engine."""
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    requests.update_state(update(1, added=[(0, theirs, [1], [2])]))
    assert 0 <= int(requests.draw(torch.randn(1, V))) < V


def test_fresh_seeds_are_torch_s_and_a_request_s_own():
    torch.manual_seed(5)
    first = [params_of(Theirs()).seed for _ in range(3)]
    torch.manual_seed(5)
    params_of(Theirs(temperature=0))  # draws none
    params_of(Theirs(seed=3))
    assert [params_of(Theirs()).seed for _ in range(3)] == first
    assert len(set(first)) == 3


# ---- the requests of a batch ----

SWAP, ONE_WAY = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")


def update(size, removed=(), added=(), moved=()):
    return SimpleNamespace(batch_size=size, removed=removed, added=added, moved=moved)


class Texts:
    """Requests that come, go, wait and move, with the batch updates of vLLM's InputBatch.

    A request's logits depend only on its name and its number of tokens, so that its tokens can be
    drawn again without the batch. With asynchronous scheduling its output has -1 for each token,
    until it comes back with a new list that has them.
    """

    def __init__(self, seed, is_async=False):
        self.rng = random.Random(seed)
        self.rng_of_extra = random.Random(seed)
        self.is_async = is_async
        self.rows = []
        self.waiting = []
        self.number = 0

    def new(self):
        self.number += 1
        prompt = [self.rng.randrange(V) for _ in range(self.rng.randrange(9))]
        theirs = random_params(self.rng)
        if self.number > 4:  # the first ones meet a table without rules
            theirs.extra_args = random_extra(self.rng_of_extra)
        return SimpleNamespace(
            name=self.number,
            theirs=theirs,
            prompt=prompt or None,  # None where it has embeddings
            output=[],
            tokens=[],
        )

    def change(self):
        """Some requests leave, some come, the last ones move into empty places, and two swap."""
        rng, rows = self.rng, self.rows
        removed = sorted(i for i in range(len(rows)) if rng.random() < 0.25)
        for i in removed:
            if rng.random() < 0.6:
                self.waiting.append(rows[i])
            rows[i] = None
        added, moved = [], []
        for _ in range(rng.randrange(4)):
            back = self.waiting and rng.random() < 0.7
            request = self.waiting.pop(rng.randrange(len(self.waiting))) if back else self.new()
            request.output = list(request.tokens)
            if removed:
                rows[index := removed.pop(0)] = request
            else:
                index = len(rows)
                rows.append(request)
            added.append((index, request.theirs, request.prompt, request.output))
        while removed:
            while rows and rows[-1] is None:
                rows.pop()
            if not removed or removed[0] >= len(rows):
                break
            moved.append((len(rows) - 1, removed[0], ONE_WAY))
            rows[removed.pop(0)] = rows.pop()
        for _ in range(rng.randrange(3)):
            if len(rows) > 1:
                i, j = rng.sample(range(len(rows)), 2)
                rows[i], rows[j] = rows[j], rows[i]
                moved.append((i, j, SWAP))
        return update(len(rows), sorted(removed, reverse=True), added, moved)

    def logits(self, dtype=torch.float32):
        rows = [logits_of(request, dtype) for request in self.rows]
        return torch.stack(rows) if rows else torch.zeros(0, V, dtype=dtype)

    def take(self, tokens):
        """Append the tokens to the outputs; rarely drop the token, or several, as vLLM does."""
        for request, token in zip(self.rows, tokens, strict=True):
            chance = self.rng.random()
            if chance < 0.85:
                request.output.append(-1 if self.is_async else token)
                request.tokens.append(token)
            elif chance > 0.95 and not self.is_async:  # blocks that could not be loaded
                length = self.rng.randrange(len(request.output) + 1)
                del request.output[length:], request.tokens[length:]


def all_params_of(theirs):
    """The parameters of a request with those of its extra_args."""
    return with_extra(params_of(theirs), theirs, READ_BY_V1, Warnings(LOG))


def follow(requests, seed, steps=60, dtype=torch.float32, is_async=False):
    """The first (step, request) whose token differs from the one that it gets alone, or None."""
    texts = Texts(seed, is_async)
    for step in range(steps):
        changes = texts.rng.random() < 0.5
        requests.update_state(texts.change() if changes else None)
        tokens = requests.draw(texts.logits(dtype)).tolist()
        for request, token in zip(texts.rows, tokens, strict=True):
            if token != alone(request, all_params_of(request.theirs), dtype):
                return step, request.name
        texts.take(tokens)
    assert texts.number > 10, "too few requests for a comparison"
    return None


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_draws_as_if_alone(seed, backend, is_async):
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH, backend=backend)
    assert follow(requests, seed, is_async=is_async) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_of_every_dtype(dtype):
    assert follow(Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH), 1, dtype=dtype) is None


class DeafToMoves(Requests):
    def _follow(self, change):
        super()._follow(update(change.batch_size, change.removed, change.added))


class TakesSwapsForMoves(Requests):
    def _follow(self, change):
        moved = [(i, j, ONE_WAY) for i, j, _ in change.moved]
        super()._follow(update(change.batch_size, change.removed, change.added, moved))


class CountsSteps(Requests):
    """Uses the number of steps since the last change of the batch as the position."""

    steps = 0

    def update_state(self, change):
        super().update_state(change)
        self.steps = 0 if change is not None else self.steps + 1
        self._position.fill_(self.steps)


class CountsOneTooMany(Requests):
    """Takes the position for one more than it is."""

    def update_state(self, change):
        super().update_state(change)
        self._position += 1


class RecordsInOtherSlots(Requests):
    """Adds the tokens of a step to the histories of other requests."""

    def _record(self):
        self._table.append, append = self._append_elsewhere, self._table.append
        super()._record()
        self._table.append = append

    def _append_elsewhere(self, tokens, *, slots):
        type(self._table).append(self._table, tokens, slots=(slots + 1) % self.capacity)


class ForgetsOutputs(Requests):
    """Does not add output tokens to the history after the request came."""

    def _record(self):
        for request in self._rows:
            request.recorded = len(request.output)
        super()._record()


class ForgetsPrompts(Requests):
    def _follow(self, change):
        added = [(index, theirs, None, output) for index, theirs, _, output in change.added]
        super()._follow(update(change.batch_size, change.removed, added, change.moved))


class CountsDiscardedTokens(Requests):
    """Counts tokens that vLLM discarded as part of the output."""

    def draw(self, logits):
        tokens = super().draw(logits)
        if self._table.history is not None:
            self._table.append(tokens, slots=self._slots)
        return tokens

    def _record(self):
        for request in self._rows:
            request.recorded = len(request.output)
        super()._record()


class KeepsParameters(Requests):
    """Leaves the parameters of the request before in a slot that is used again."""

    def _set(self, request):
        if request.slot not in (used := vars(self).setdefault("used", set())):
            super()._set(request)
        used.add(request.slot)
        request.recorded = len(request.output)


class ForgetsWhatItGrewFrom(Requests):
    """Loses the histories of its requests where another one needs the ids in order."""

    def _grow(self, *, has_text):
        super()._grow(has_text=has_text)
        if self._table.history.text is not None:
            self._table.history.seen.zero_()
            self._table.history.counts.zero_()


class LeavesExtraOut(Requests):
    """Reads no extra_args."""

    def _possible(self, params):
        return replace(params, penalty_last_n=-1, repetition_penalty_scope="all", **NO_RULE)


class MixesRowsUp(Requests):
    """Takes the tokens that the host does not know from the rows that requests have now."""

    def _record(self):
        self._row_drawn = {
            request: min(row, len(self._row_drawn) - 1)
            for row, request in enumerate(self._rows)
            if request in self._row_drawn
        }
        super()._record()


@pytest.mark.parametrize(
    "broken",
    [
        DeafToMoves,
        TakesSwapsForMoves,
        CountsSteps,
        CountsOneTooMany,
        RecordsInOtherSlots,
        ForgetsOutputs,
        ForgetsPrompts,
        CountsDiscardedTokens,
        KeepsParameters,
        ForgetsWhatItGrewFrom,
        LeavesExtraOut,
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_the_comparison_detects(broken, is_async):
    """Each broken class draws a wrong token, or raises, within a few sequences."""
    for seed in range(4):
        try:
            if (
                follow(
                    broken(V, "cpu", capacity=64, max_length=MAX_LENGTH), seed, is_async=is_async
                )
                is not None
            ):
                return
        except KeyError:  # it has no request for a row
            return
    pytest.fail(f"{broken.__name__} was not detected")


def test_the_comparison_detects_tokens_of_other_rows():
    """On the host they are known; only what is on the device can be mixed up."""
    assert follow(MixesRowsUp(V, "cpu", capacity=64, max_length=MAX_LENGTH), 0) is None
    found = [
        follow(MixesRowsUp(V, "cpu", capacity=64, max_length=MAX_LENGTH), seed, is_async=True)
        for seed in range(4)
    ]
    assert found != [None] * 4


def test_tokens_that_nobody_knows_are_not_guessed():
    """A request with a penalty whose tokens were not drawn here; without one they do not matter."""
    requests = Requests(V, "cpu", capacity=4, max_length=MAX_LENGTH)
    plain, penalised = Theirs(seed=1), Theirs(seed=2, presence_penalty=1.0)
    requests.update_state(update(1, added=[(0, plain, [1], [-1])]))
    requests.draw(torch.randn(1, V))
    requests.update_state(update(2, added=[(1, penalised, [1], [5, -1])]))
    with pytest.raises(RuntimeError, match="tokens that are not known"):
        requests.draw(torch.randn(2, V))


def test_a_request_that_returns_goes_on_where_it_was():
    theirs = Theirs(seed=4, frequency_penalty=0.7, top_k=20)
    tokens = []
    request = SimpleNamespace(name=1, theirs=theirs, prompt=[3, 4], output=tokens, tokens=tokens)
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    entry = (0, theirs, request.prompt, request.output)
    drawn = []
    for step in range(12):
        if step in (0, 5, 9):
            requests.update_state(update(1, added=[entry]))
        elif step in (4, 8):
            requests.update_state(update(0, removed=[0]))
            continue
        else:
            requests.update_state(None)
        drawn += requests.draw(logits_of(request).unsqueeze(0)).tolist()
        request.output.append(drawn[-1])
    request.output.clear()
    for token in drawn:
        assert token == alone(request, params_of(theirs))
        request.output.append(token)


def test_without_penalties_there_is_no_history():
    requests = Requests(V, "cpu", capacity=5, max_length=MAX_LENGTH)
    plain, penalised = Theirs(seed=1), Theirs(seed=2, presence_penalty=1.0)
    requests.update_state(update(4, added=[(i, plain, [1], []) for i in range(4)]))
    assert requests._table.history is None
    requests.update_state(update(5, added=[(4, penalised, [1], [])]))
    assert requests._table.history.counts.shape == (5, V)
    requests.update_state(update(3, removed=[4, 3]))
    assert len(requests._by_index) == 3, "requests that have left are dropped"
    assert sorted(requests._free + [request.slot for request in requests._rows]) == [*range(5)]


def test_a_step_without_changes_packs_nothing(monkeypatch):
    requests = Requests(V, "cpu", capacity=1, max_length=MAX_LENGTH)
    output = []
    requests.update_state(update(1, added=[(0, Theirs(seed=1, presence_penalty=0.5), [1], output)]))
    output += requests.draw(torch.randn(1, V)).tolist()

    def refuse(*args, **options):
        raise AssertionError("packed")

    monkeypatch.setattr(v1.BatchParams, "from_list", refuse)
    monkeypatch.setattr(requests._backend, "prepare", refuse)
    monkeypatch.setattr(requests._table, "set", refuse)
    for _ in range(3):
        requests.update_state(None)
        output += requests.draw(torch.randn(1, V)).tolist()
    assert requests._position.tolist() == [3]


def test_a_call_stays_prepared_while_requests_come_and_go(monkeypatch):
    requests = Requests(V, "cpu", capacity=8, max_length=MAX_LENGTH)
    kinds = [Theirs(seed=i, top_p=0.9, presence_penalty=0.5) for i in range(8)]
    requests.update_state(update(2, added=[(i, kinds[i], [1], []) for i in range(2)]))
    requests.draw(torch.randn(2, V))

    def refuse(*args, **options):
        raise AssertionError("prepared")

    monkeypatch.setattr(requests._backend, "prepare", refuse)
    requests.update_state(update(5, added=[(i, kinds[i], [1], []) for i in range(2, 5)]))
    requests.draw(torch.randn(5, V))
    requests.update_state(update(1, removed=[4, 3, 2, 1]))
    requests.draw(torch.randn(1, V))


@pytest.mark.parametrize("shape", [(1, V), (3, V), (2, V - 1)])
def test_logits_of_other_requests_are_not_drawn_from(shape, caplog):
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    requests.update_state(update(2, added=[(i, Theirs(seed=i), [], []) for i in range(2)]))
    assert requests.fit(torch.zeros(2, V))
    assert not requests.fit(torch.zeros(shape))
    assert not requests.fit(torch.zeros(shape))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(shape) in caplog.text
    requests.update_state(update(2, added=[(0, Theirs(presence_penalty=1.0), [], [])]))
    with pytest.raises(RuntimeError, match="penalties cannot be applied"):
        requests.fit(torch.zeros(shape))


def test_strided_logits():
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    added = [(i, Theirs(seed=i), [], []) for i in range(3)]
    requests.update_state(update(3, added=added))
    logits = torch.randn(3, V)
    want = requests.draw(logits).tolist()
    padded = torch.randn(3, V + 20)
    padded[:, :V] = logits
    assert requests.draw(padded[:, :V]).tolist() == want
    assert requests.draw(logits.t().contiguous().t()).tolist() == want


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_without_a_candidate_gets_token_0_and_a_warning(value, caplog):
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    requests.update_state(update(3, added=[(i, Theirs(seed=i), [], []) for i in range(3)]))
    logits = torch.randn(3, V)
    want = requests.draw(logits).tolist()
    assert caplog.records == []
    logits[1] = value
    for _ in range(2):
        assert requests.draw(logits).tolist() == [want[0], 0, want[2]]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_extra_args_are_parameters_that_vllm_has_none_for():
    theirs = Theirs(seed=1, repetition_penalty=1.3)
    theirs.extra_args = {
        "dry_multiplier": 0.8,
        "dry_breakers": [5, [6, 7]],
        "no_repeat_ngram_size": 3,
        "penalty_last_n": 64,
        "repetition_penalty_scope": "output",
        **{"top_k": 3, "bad_words": [[1]], "min_tokens": 4, "stop_token_ids": [2]},  # vLLM's own
        "kv_transfer_params": {},
    }
    assert all_params_of(theirs) == SamplingParams(
        seed=1,
        repetition_penalty=1.3,
        dry_multiplier=0.8,
        dry_breakers=[[5], [6, 7]],
        no_repeat_ngram_size=3,
        penalty_last_n=64,
        repetition_penalty_scope="output",
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dry_multiplier": -1}, "dry_multiplier of extra_args are left out: dry_multiplier must "),
        ({"dry_multiplier": "x" * 10**6}, "left out: dry_multiplier must be in [0, 100]"),
        ({"dry_base": float("nan")}, "dry_base must be in [1, 100]"),
        ({"dry_multiplier": {}, "dry_base": [1]}, "dry_multiplier must be in [0, 100]"),
        ({"no_repeat_ngram_window": 10**400}, None),
        ({"dry_breakers": "ab"}, "dry_breakers must be"),
        ({"dry_breakers": [[]]}, "left out: dry_breakers must be"),
        ({"dry_breakers": [["a"], 3]}, "left out: dry_breakers must be"),
        ({"no_repeat_ngram_size": 2.5, "dry_base": 2}, "dry_base, no_repeat_ngram_size of extra"),
        ({"repetition_penalty_scope": "prompt"}, "repetition_penalty_scope must be"),
        ({"dry_penalty_last_n": 2**80, "other": 1}, None),
        (
            {"dry_multiplier": 1, "dry_breakers": [[1] * 9000]},
            "rules of extra_args are left out: dry_breakers have more than 8192 ids",
        ),
        ({"dry_multiplier": None, "dry_breakers": None}, None),
    ],
)
def test_extra_args_that_are_wrong_do_not_end_the_engine(extra, message, caplog):
    requests = Requests(V, "cpu", capacity=64, max_length=MAX_LENGTH)
    theirs = Theirs(seed=1)
    theirs.extra_args = extra
    for index in range(2):
        requests.update_state(update(index + 1, added=[(index, theirs, [1], [])]))
    logits = torch.randn(1, V).expand(2, V)
    plain = sample(logits, [params_of(theirs)] * 2).tokens
    assert requests.draw(logits).tolist() == plain.tolist()
    if message is None:
        assert caplog.records == []
    else:
        (warning,) = warnings_of(caplog)
        assert message in warning
        assert len(warning) < 200


def test_ids_are_kept_in_order_once_a_request_needs_them():
    requests = Requests(V, "cpu", capacity=3, max_length=MAX_LENGTH)
    requests.update_state(update(1, added=[(0, Theirs(seed=1), [1], [])]))
    assert requests._table.history is None
    penalised = Theirs(seed=2, presence_penalty=1.0)
    requests.update_state(update(2, added=[(1, penalised, [1, 2], [3])]))
    assert requests._table.history.text is None
    ordered = Theirs(seed=3)
    ordered.extra_args = {"no_repeat_ngram_size": 2}
    requests.update_state(update(3, added=[(2, ordered, [4], [5, 4])]))
    text = requests._table.history.text
    assert text.ids.shape == (3, MAX_LENGTH)
    slots = [request.slot for request in requests._rows]
    assert text.ids[slots[2], :3].tolist() == [4, 5, 4]
    assert requests._table.history.counts[slots[1], 3] == 1
    logits = torch.zeros(3, V)
    logits[2, 5] = 50.0
    assert requests.draw(logits).tolist()[2] != 5


# ---- registration ----


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def is_replaced(runner):
    return (
        runner.Sampler.__name__ == "FusedSampler"
        and runner.build_logitsprocs.__name__ == "build"
        and runner.InputBatch.__name__ == "PenaltiesElsewhere"
    )


def is_vllm_s_own(runner):
    return (
        runner.Sampler.__name__ == "Sampler"
        and runner.build_logitsprocs.__name__ == "build_logitsprocs"
        and runner.InputBatch.__name__ == "InputBatch"
    )


def test_it_replaces_three_names_when_the_runner_is_imported(vllm_package, caplog):
    vllm_package()
    register()
    assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"], (
        "register imports nothing of vLLM"
    )
    runner = importlib.import_module(RUNNER)
    assert is_replaced(runner)
    source = importlib.import_module("vllm.v1.sample.sampler")
    assert issubclass(runner.Sampler, source.Sampler)
    assert runner.Sampler is not source.Sampler
    processors = importlib.import_module("vllm.v1.sample.logits_processor")
    assert processors.build_logitsprocs.__name__ == "build_logitsprocs"
    assert warnings_of(caplog) == []


def test_it_replaces_in_a_runner_that_is_there(vllm_package):
    vllm_package()
    runner = importlib.import_module(RUNNER)
    register()
    assert is_replaced(runner)


def test_called_twice_it_replaces_once(vllm_package):
    vllm_package()
    register()
    register()
    runner = importlib.import_module(RUNNER)
    once = runner.Sampler
    register()
    assert runner.Sampler is once
    assert runner.Sampler.__mro__[1].__name__ == "Sampler"


def test_an_import_that_fails_is_waited_for_again(vllm_package, monkeypatch):
    vllm_package(
        ("v1.worker.gpu_model_runner", "import functools", "import functools, not_there_yet")
    )
    register()
    with pytest.raises(ImportError):
        importlib.import_module(RUNNER)
    monkeypatch.setitem(sys.modules, "not_there_yet", sys)
    assert is_replaced(importlib.import_module(RUNNER))


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_is_off_unless_asked_for(value, vllm_package, monkeypatch, caplog):
    vllm_package()
    monkeypatch.delenv(SWITCH)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
    assert is_vllm_s_own(importlib.import_module(RUNNER))
    assert warnings_of(caplog) == []


def test_another_value_is_refused(vllm_package, monkeypatch, caplog):
    vllm_package()
    monkeypatch.setenv(SWITCH, "yes")
    register()
    assert is_vllm_s_own(importlib.import_module(RUNNER))
    (message,) = warnings_of(caplog)
    assert message == "llm_sampling is off: LLM_SAMPLING_VLLM must be 0 or 1, got 'yes'"


PROCESSORS = "v1.sample.logits_processor"
CHANGES = {
    "a module that is gone": (
        (
            "v1.sample.metadata",
            fake_vllm.SOURCES["v1.sample.metadata"],
            "raise ImportError('gone')",
        ),
        "gone",
    ),
    "a class that is gone": ((PROCESSORS, "class MinTokens", "class LeastTokens"), "MinTokens"),
    "a parameter more": (
        ("v1.sample.sampler", "def sample(self, logits,", "def sample(self, logits, more,"),
        "Sampler.sample takes (self logits more sampling_metadata logprobs_mode_override)",
    ),
    "another order": (
        (PROCESSORS, "vllm_config, device, is_pin", "device, vllm_config, is_pin"),
        "build_logitsprocs takes (device vllm_config",
    ),
    "a field that is gone": (("v1.sample.metadata", "no_penalties", "penalties"), "no_penalties"),
    "a parameter of sampling that is gone": (("sampling_params", "min_p", "minp"), "min_p"),
    "an update of another form": ((PROCESSORS, "    moved: Any", "    swapped: Any"), "moved"),
    "state under another name": ((PROCESSORS, "biases", "bias_of"), "biases"),
    "a runner with a sampler of its own": (
        ("v1.worker.gpu_model_runner", "= Sampler(", "= print("),
        "GPUModelRunner.__init__ does not look up Sampler",
    ),
    "another way to the draw": (
        ("v1.sample.sampler", "self.sample(logits, sampling_metadata)", "logits, None"),
        "Sampler.forward does not look up sample",
    ),
    "updates to nobody": (("v1.worker.gpu_input_batch", "update_state", "hear"), "update_state"),
    "penalties under another name": (
        ("v1.worker.gpu_input_batch", "def no_penalties", "def penalties_are_off"),
        "no_penalties",
    ),
    "outputs that grow elsewhere": (
        ("v1.worker.gpu_model_runner", "self.use_async_scheduling", "True"),
        "_bookkeeping_sync does not look up use_async_scheduling",
    ),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_a_vllm_that_is_different_keeps_its_sampler(change, named, vllm_package, caplog):
    vllm_package(change)
    register()
    runner = importlib.import_module(RUNNER)
    assert is_vllm_s_own(runner)
    (message,) = warnings_of(caplog)
    assert message.startswith("llm_sampling: vLLM keeps its own sampler: ")
    assert named in message


def config_of(vocab_size=V, speculative=None, is_async=False, transfer=None, mode="raw_logprobs"):
    return SimpleNamespace(
        speculative_config=speculative,
        kv_transfer_config=transfer,
        scheduler_config=SimpleNamespace(async_scheduling=is_async, max_num_seqs=16),
        model_config=SimpleNamespace(
            get_vocab_size=lambda: vocab_size, logprobs_mode=mode, max_model_len=99
        ),
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative": object()}, "speculative_config"),
        ({"is_async": True, "transfer": object()}, "kv_transfer_config"),
        ({"vocab_size": 2**20 + 1}, "vocab_size: it must be in 1 .. 2^20, got 1048577"),
    ],
)
def test_an_engine_that_cannot_be_served_keeps_its_sampler(options, named, vllm_package, caplog):
    vllm_package()
    register()
    runner = importlib.import_module(RUNNER).GPUModelRunner(config_of(**options), "cpu")
    assert not any(isinstance(p, Requests) for p in runner.logitsprocs.argmax_invariant)
    (message,) = warnings_of(caplog)
    assert named in message
    runner.input_batch = SimpleNamespace(sampling_metadata=metadata_of(runner))
    drawn = runner._sample(torch.randn(2, V), None)
    assert drawn.sampled_token_ids.tolist() == [[5], [5]], "vLLM's own draw"


def test_a_pooling_model_draws_nothing(vllm_package, caplog):
    vllm_package()
    register()
    runner = importlib.import_module(RUNNER).GPUModelRunner(config_of(), "cpu", True)
    assert runner.logitsprocs.argmax_invariant == []
    assert warnings_of(caplog) == []


# ---- the sampler ----


def metadata_of(runner, **fields):
    module = importlib.import_module("vllm.v1.sample.metadata")
    return module.SamplingMetadata(logitsprocs=runner.logitsprocs, **fields)


ROWS = [
    Theirs(temperature=0.0),
    Theirs(seed=1, top_p=0.9, min_p=0.02),
    Theirs(seed=2, temperature=0.6, repetition_penalty=1.5, frequency_penalty=0.5),
    Theirs(temperature=0.0, presence_penalty=1.5),
]
PROMPTS, OUTPUTS = [[1], [2, 3], [4, 5, 6], [7]], [[8], [9, 9], [], [10, 11, 10]]
PARAMS = [params_of(theirs) for theirs in ROWS]


@pytest.fixture
def make_runner(vllm_package):
    """A function that makes a runner of the stand-in package with four requests in its batch."""
    vllm_package()
    register()

    def make(mode="raw_logprobs", custom=()):
        module = importlib.import_module(RUNNER)
        runner = module.GPUModelRunner(config_of(mode=mode), "cpu", False, custom)
        requests = next(p for p in runner.logitsprocs.argmax_invariant if isinstance(p, Requests))
        added = list(zip(range(4), ROWS, PROMPTS, OUTPUTS, strict=True))
        requests.update_state(update(4, added=added))
        return runner

    return make


def run(runner, logits, **fields):
    runner.input_batch = SimpleNamespace(sampling_metadata=metadata_of(runner, **fields))
    return runner._sample(logits, None)


def history():
    return TokenHistory.from_ids(PROMPTS, OUTPUTS, V)


def tokens_of(logits, params=PARAMS):
    return sample(logits, params, history=history()).tokens.tolist()


def drawn_by(output):
    assert output.sampled_token_ids.dtype == torch.int32
    assert output.sampled_token_ids.shape == (4, 1)
    return output.sampled_token_ids.flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_gets_the_logits_as_they_are(make_runner, dtype, monkeypatch):
    runner = make_runner()
    logits = (torch.randn(4, V) * 3).to(dtype)
    before, seen = logits.clone(), []
    draw = Requests.draw
    monkeypatch.setattr(Requests, "draw", lambda self, x: seen.append(x) or draw(self, x))
    output = run(runner, logits)
    assert drawn_by(output) == tokens_of(before)
    assert output.logprobs_tensors is None
    assert seen[0] is logits
    assert torch.equal(logits, before)


def test_what_changes_logits_before_the_penalties(make_runner):
    """vLLM's own code does it; each change alone and all at once."""
    adapter = importlib.import_module(f"vllm.{PROCESSORS}").AdapterLogitsProcessor()
    runner = make_runner(custom=[adapter])
    min_tokens, logit_bias, _ = runner.logitsprocs.non_argmax_invariant
    logits = torch.randn(4, V) * 3
    logits[3, 0] = 40.0
    free = tokens_of(logits)
    mask = torch.zeros(4, V, dtype=torch.bool)
    mask[1, free[1]] = True
    words = [free[2], 3]
    changes = {
        "allowed": lambda x: x.masked_fill_(mask, -torch.inf),
        "words": lambda x: x[2].__setitem__(words, -torch.inf),
        "min_tokens": lambda x: x[3].__setitem__(0, -torch.inf),
        "bias": lambda x: x[0].__setitem__(5, x[0, 5] + 40.0),
        "adapter": lambda x: x[0].mul_(-0.5),
    }
    for names in [*([name] for name in changes), list(changes)]:
        fields = {"allowed_token_ids_mask": mask} if "allowed" in names else {}
        fields |= {"bad_words_token_ids": {2: words}} if "words" in names else {}
        min_tokens.min_toks = {3: ()} if "min_tokens" in names else {}
        logit_bias.biases = {0: {5: 40.0}} if "bias" in names else {}
        adapter.req_info = {0: lambda row: row * -0.5} if "adapter" in names else {}
        changed = logits.clone()
        for name in names:
            changes[name](changed)
        want = tokens_of(changed)
        assert drawn_by(run(runner, logits.clone(), **fields)) == want != free, names


def test_a_thinking_budget(make_runner):
    runner = make_runner()
    state = importlib.import_module("vllm.v1.sample.thinking_budget_state")
    holder = state.ThinkingBudgetStateHolder()
    logits = torch.randn(4, V)
    free = run(runner, logits.clone(), thinking_budget_state_holder=holder)
    assert drawn_by(free) == tokens_of(logits)
    holder.tracked = True
    assert drawn_by(run(runner, logits, thinking_budget_state_holder=holder)) == [7] * 4


def test_idle_processors_cost_nothing(make_runner, monkeypatch):
    runner = make_runner()
    base = type(runner.sampler).__mro__[1]

    def refuse(*args, **options):
        raise AssertionError("vLLM's own forward")

    monkeypatch.setattr(base, "forward", refuse)
    run(runner, torch.randn(4, V))
    runner.logitsprocs.non_argmax_invariant[0].min_toks = {3: ()}
    with pytest.raises(AssertionError, match="vLLM's own forward"):
        run(runner, torch.randn(4, V))


class Halves:
    """A processor that vLLM applies after the temperature: masks logits far below the best one."""

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        limit = logits.amax(-1, keepdim=True) - 1.0
        return logits.masked_fill(logits < limit, -torch.inf)


def test_processors_after_the_temperature(make_runner):
    runner = make_runner(custom=[Halves()])
    logits = torch.randn(4, V) * 3
    scaled = [replace(row, temperature=row.temperature or 1.0) for row in PARAMS]
    scaled = [replace(row, top_k=0, top_p=1.0, min_p=0.0) for row in scaled]
    halved = Halves().apply(filter_logits(logits, scaled, history=history()))
    rest = [
        SamplingParams(
            temperature=1.0 if row.temperature else 0.0,
            top_k=row.top_k,
            top_p=row.top_p,
            min_p=row.min_p,
            seed=row.seed,
        )
        for row in PARAMS
    ]
    positions = [len(output) for output in OUTPUTS]
    want = sample(halved, rest, positions=positions).tokens.tolist()
    assert drawn_by(run(runner, logits)) == want
    assert drawn_by(run(make_runner(), logits))[0] == want[0], "greedy rows stay what they are"
    requests = runner.logitsprocs.argmax_invariant[0]
    tokens, given = requests.draw_after(logits, [Halves()])
    assert tokens.tolist() == want
    assert torch.equal(given, halved)
    _, given = requests.draw_after(logits, [])
    assert torch.equal(given, filter_logits(logits, scaled, history=history()))


@pytest.mark.parametrize("custom", [(), (Halves(),)], ids=["", "custom"])
def test_rules_come_before_processors_and_in_processed_logits(make_runner, custom):
    """The second of the two launches applies no rule again."""
    runner = make_runner("processed_logits", custom)
    requests = runner.logitsprocs.argmax_invariant[0]
    ruled = Theirs(temperature=0.7, seed=5)
    ruled.extra_args = {"dry_multiplier": 2.0, "dry_allowed_length": 1, "no_repeat_ngram_size": 3}
    requests.update_state(update(4, added=[(3, ruled, [7], [10, 11, 10])]))
    logits = torch.zeros(4, V)
    logits[:, 11] = 9.0
    rows = [*PARAMS[:3], all_params_of(ruled)]
    output = run(runner, logits.clone(), max_num_logprobs=3)
    texts = TokenHistory.from_ids(PROMPTS, OUTPUTS, V, max_length=99)
    shown = output.logprobs_tensors[3]
    assert shown[11] == pytest.approx((9.0 - 2.0) / 0.7, rel=1e-6)
    if not custom:
        want = sample(logits, rows, history=texts, positions=[1, 2, 0, 3]).tokens
        assert drawn_by(output) == want.tolist()


@pytest.mark.parametrize("custom", [(), (Halves(),)], ids=["", "custom"])
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logprobs(make_runner, mode, custom):
    logits = torch.randn(4, V) * 3
    shown = run(make_runner(f"{mode}_logits", custom), logits.clone(), max_num_logprobs=3)
    logprobs = run(make_runner(f"{mode}_logprobs", custom), logits.clone(), max_num_logprobs=3)
    torch.testing.assert_close(logprobs.logprobs_tensors, shown.logprobs_tensors.log_softmax(-1))
    if not custom:
        assert drawn_by(shown) == drawn_by(logprobs) == tokens_of(logits)
    if mode == "raw":
        assert torch.equal(shown.logprobs_tensors, logits)
        return
    whole = [replace(row, temperature=row.temperature or 1.0) for row in PARAMS]
    want = filter_logits(logits, whole, history=history())
    if custom:
        kept = Halves().apply(want)
        assert ((shown.logprobs_tensors > -torch.inf) & (kept == -torch.inf)).sum() == 0
    else:
        assert torch.equal(shown.logprobs_tensors, want)
        assert torch.isfinite(want[0]).all(), "a greedy row is whole"
    for row, token in enumerate(drawn_by(shown)):
        assert shown.logprobs_tensors[row, token] > -torch.inf


def test_a_trial_run_is_vllm_s_own(make_runner):
    runner = make_runner()
    empty = type(runner.logitsprocs)()
    metadata = replace(metadata_of(runner), logitsprocs=empty)
    drawn = runner.sampler(torch.randn(4, V), metadata)
    assert drawn_by(drawn) == [5] * 4
