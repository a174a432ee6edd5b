"""The plug-in for vLLM's V2 runner without vLLM: what it draws and records by slot.

tests/integrations/test_vllm_engine.py has the real engine.
"""

import importlib
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from no_waiting import nothing_waits
from vllm_texts import Theirs, V, alone, logits_of, random_params

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.integrations.engine import Warnings
from llm_sampling.integrations.vllm import register, v2
from llm_sampling.integrations.vllm.both import not_greedy, params_of
from llm_sampling.integrations.vllm.v2 import RUNNER, Requests

SLOTS, LENGTH = 12, 200

# ---- the requests, by slot ----


def tensors(slots=SLOTS):
    """vLLM's ``prompt_bin_mask`` and ``output_bin_counts``."""
    words = -(-V // 32)
    return (torch.zeros(slots, n, dtype=torch.int32) for n in (words, V))


def make(kind=Requests, **options):
    seen, counts = tensors()
    return kind(seen, counts, **options)


class Texts:
    """Requests that come, go, wait and come back, in vLLM's slots; rows are in another order.

    In each step some of them are drawn. A row whose prompt is not complete, or whose request has
    gone before its token is recorded, is discarded.
    """

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.in_slots = {}
        self.waiting = []
        self.number = 0

    def new(self):
        self.number += 1
        prompt = [self.rng.randrange(V) for _ in range(1 + self.rng.randrange(9))]
        theirs = random_params(self.rng)
        return SimpleNamespace(name=self.number, theirs=theirs, prompt=prompt, tokens=[])

    def change(self, requests):
        """Some requests leave and some come, into slots that others have left, too."""
        rng = self.rng
        for slot in [slot for slot in self.in_slots if rng.random() < 0.2]:
            request = self.in_slots.pop(slot)
            if rng.random() < 0.6:
                self.waiting.append(request)
        free = [slot for slot in range(SLOTS) if slot not in self.in_slots]
        for slot in rng.sample(free, rng.randrange(len(free) + 1)):
            back = self.waiting and rng.random() < 0.7
            request = self.waiting.pop(rng.randrange(len(self.waiting))) if back else self.new()
            self.in_slots[slot] = request
            requests.enter(slot, request.theirs, 77, len(request.tokens))
        requests.stay(self.in_slots)
        ids = torch.zeros(SLOTS, LENGTH, dtype=torch.int32)
        lengths, prompt_lengths = [0] * SLOTS, [0] * SLOTS
        for slot, request in self.in_slots.items():
            text = request.prompt + request.tokens
            ids[slot, : len(text)] = torch.tensor(text)
            lengths[slot], prompt_lengths[slot] = len(text), len(request.prompt)
        requests.fill(ids, lengths, prompt_lengths)

    def rows(self):
        """The slots of a step, in any order."""
        slots = [slot for slot in self.in_slots if self.rng.random() < 0.8]
        self.rng.shuffle(slots)
        return slots

    def take(self, requests, slots, tokens):
        """Record most of the tokens; some are discarded, some requests accept others of a draft."""
        rng = self.rng
        drawn = torch.full((len(slots), 3), -1, dtype=torch.int64)
        counts, recorded = [], []
        for row, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            chance = rng.random()
            count = 1 if chance < 0.7 else rng.choice([0, 2, 3])
            drawn[row, :] = torch.tensor([token, rng.randrange(V), rng.randrange(V)])
            counts.append(count)
            is_gone = chance > 0.95
            recorded.append(-1 if is_gone else slot)
            if not is_gone:
                self.in_slots[slot].tokens += drawn[row, :count].tolist()
        requests.record(
            drawn,
            torch.tensor(counts, dtype=torch.int32),
            torch.tensor(recorded, dtype=torch.int32),
        )


def follow(requests, seed, steps=40, dtype=torch.float32):
    """The first (step, request) whose token differs from the one that it gets alone, or None."""
    texts = Texts(seed)
    for step in range(steps):
        texts.change(requests)
        slots = texts.rows()
        if not slots:
            continue
        rows = [texts.in_slots[slot] for slot in slots]
        logits = torch.stack([logits_of(request, dtype) for request in rows])
        tokens = requests.draw(logits, torch.tensor(slots)).tolist()
        for request, token in zip(rows, tokens, strict=True):
            if token != alone(request, params_of(request.theirs, 77), dtype):
                return step, request.name
        texts.take(requests, slots, tokens)
    assert texts.number > 10, "too few requests for a comparison"
    return None


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_draws_as_if_alone(seed, backend):
    assert follow(make(backend=backend), seed) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_of_every_dtype(dtype):
    assert follow(make(), 1, dtype=dtype) is None


class CountsOneTooMany(Requests):
    """Takes the position for one more than it is."""

    def enter(self, slot, theirs, seed, position):
        super().enter(slot, theirs, seed, position + 1)


class RecordsInOtherSlots(Requests):
    """Sets the bit, and the count, of the wrong slot."""

    def record(self, tokens, counts, slots):
        super().record(tokens, counts, (slots + 1) % self.capacity)


class RecordsDiscardedRows(Requests):
    """Takes the token of a prompt that is not complete for the request's."""

    def record(self, tokens, counts, slots):
        super().record(tokens, counts.clamp(min=1), slots)


class RecordsOneToken(Requests):
    """Drops the accepted tokens of a draft."""

    def record(self, tokens, counts, slots):
        super().record(tokens, counts.clamp(max=1), slots)


class KeepsParameters(Requests):
    """Leaves the parameters of the request before in a slot that is used again."""

    def _set(self, slot, params, position=0):
        used = vars(self).setdefault("used", {})
        if params.seed != 0 or params.temperature:
            params = used.setdefault(slot, params)
        super()._set(slot, params, position)


class KeepsHistories(Requests):
    """Does not fill the history of a request that comes."""

    def fill(self, ids, lengths, prompt_lengths):
        self._unfilled.clear()


class ForgetsOutputs(Requests):
    """Fills the history of a request that comes back with its prompt alone."""

    def fill(self, ids, lengths, prompt_lengths):
        super().fill(ids, prompt_lengths, prompt_lengths)


class ForgetsBits(Requests):
    """Counts what was drawn, as vLLM does, without setting its bit."""

    def record(self, tokens, counts, slots):
        before = self._history.seen.clone()
        super().record(tokens, counts, slots)
        self._history.seen.copy_(before)


class FreesNothing(Requests):
    """Keeps the requests that have left: right, and slow."""

    def stay(self, slots):
        pass


@pytest.mark.parametrize(
    "broken",
    [
        CountsOneTooMany,
        RecordsInOtherSlots,
        RecordsDiscardedRows,
        RecordsOneToken,
        KeepsParameters,
        KeepsHistories,
        ForgetsOutputs,
        ForgetsBits,
    ],
)
def test_the_comparison_detects(broken):
    """Each broken class draws a wrong token within a few sequences."""
    assert any(follow(make(broken), seed) is not None for seed in range(4))


def test_a_slot_that_is_free_asks_for_nothing():
    """Otherwise a request that has left keeps the kernel at the work that only it needed."""
    for kind in (Requests, FreesNothing):
        requests = make(kind)
        requests.enter(3, Theirs(presence_penalty=1.0, top_p=0.9, seed=1), 0, 0)
        requests.stay([3])
        assert requests._drawn.batch.needs_history
        requests.stay([])
        assert requests._drawn.batch.needs_history == (kind is FreesNothing)
        assert requests._drawn.batch.any_filter == (kind is FreesNothing)


def test_a_call_stays_prepared_while_requests_come_and_go(monkeypatch):
    requests = make()
    kind = Theirs(seed=3, top_p=0.9, presence_penalty=0.5)

    def fill():
        requests.fill(torch.ones(SLOTS, LENGTH, dtype=torch.int32), [4] * SLOTS, [4] * SLOTS)

    requests.enter(0, kind, 0, 0)
    fill()
    requests.draw(torch.randn(1, V), torch.tensor([0]))

    def refuse(*args, **options):
        raise AssertionError("prepared")

    monkeypatch.setattr(type(requests._drawn), "run", refuse)
    for slot in range(1, 6):
        requests.enter(slot, kind, 0, 0)
    fill()
    tokens = requests.draw(torch.randn(6, V), torch.arange(6))
    requests.record(tokens[:, None], torch.ones(6, dtype=torch.int32), torch.arange(6))
    requests.stay([0])
    requests.draw(torch.randn(1, V), torch.tensor([0]))


@pytest.mark.parametrize("has_processors", [False, True])
def test_a_step_waits_for_nothing(has_processors, monkeypatch):
    """What comes, is drawn, shown and recorded is read by the device alone.

    The look for rows without a token is for the CPU alone.
    """
    look = lambda self, tokens, slots=None: tokens.clamp(min=0)  # noqa: E731
    monkeypatch.setattr(Warnings, "token_for_each", look)
    requests = make(has_processors=has_processors)
    ids = torch.ones(SLOTS, LENGTH, dtype=torch.int32)
    slots, logits = torch.tensor([3, 1]), torch.randn(2, V)
    counts, drafts = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([[5, -1], [5, 6]])
    with nothing_waits():
        for slot in (1, 3):
            theirs = Theirs(seed=slot, top_p=0.9, presence_penalty=0.5)
            requests.enter(slot, theirs, 0, 0)
        requests.stay({1: "a", 3: "b"})
        requests.fill(ids, [4] * SLOTS, [3] * SLOTS)
        shown = requests.penalised(logits, slots) if has_processors else logits
        tokens = requests.draw(shown, slots)
        requests.processed(shown, slots, drafts)
        requests.record(tokens[:, None], counts, slots)
        with pytest.raises(AssertionError, match="waits for the device"):
            int(tokens[0])
    assert requests._drawn.positions.tolist()[:4] == [0, 1, 0, 2]


def test_what_v2_does_not_read_is_told_once(caplog):
    requests = make()
    theirs = Theirs(repetition_penalty=3.0, seed=1)
    theirs.extra_args = {
        **{"dry_multiplier": 1.0, "penalty_last_n": 3, "repetition_penalty_scope": "output"},
        "other": 1,
    }
    for slot in range(2):
        requests.enter(slot, theirs, 0, 0)
    wanted = replace(params_of(theirs), repetition_penalty_scope="output")
    assert requests._drawn.params(1) == wanted
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(
        "extra_args of a request has dry_multiplier, penalty_last_n, which this runner does not "
        "read"
    )


def test_slots_without_a_request_can_be_drawn():
    """As in vLLM's trial runs, before any request has come."""
    logits = torch.randn(SLOTS, V)
    tokens = make().draw(logits, torch.arange(SLOTS))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_without_a_candidate_gets_token_0_and_a_warning(value, caplog):
    requests = make()
    for slot in range(3):
        requests.enter(slot, Theirs(seed=slot), 0, 0)
    logits = torch.randn(3, V)
    want = requests.draw(logits, torch.arange(3)).tolist()
    assert caplog.records == []
    logits[1] = value
    for _ in range(2):
        assert requests.draw(logits, torch.arange(3)).tolist() == [want[0], 0, want[2]]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# ---- the runner ----


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def config_of(vocab_size=V, speculative=0, is_async=False, transfer=None, watermark=None):
    drafts = SimpleNamespace(num_speculative_tokens=speculative) if speculative else None
    return SimpleNamespace(
        speculative_config=drafts,
        kv_transfer_config=transfer,
        watermark_config=watermark,
        scheduler_config=SimpleNamespace(async_scheduling=is_async, max_num_seqs=SLOTS),
        model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size, max_model_len=99),
    )


ROWS = [
    Theirs(temperature=0.0),
    Theirs(seed=1, top_p=0.9, min_p=0.02),
    Theirs(seed=2, temperature=0.6, repetition_penalty=1.5, frequency_penalty=0.5),
    Theirs(temperature=0.0, presence_penalty=1.5),
    Theirs(top_k=30),
]
PROMPTS, OUTPUTS = [[1], [2, 3], [4, 5, 6], [7], [9]], [[8], [9, 9], [], [10, 11, 10], []]
#: The slots of the rows; vLLM's stand-in gives slot 4, whose request has no seed, the seed 1004.
IN_SLOTS = [6, 2, 9, 0, 4]
PARAMS = [params_of(theirs, 1004) for theirs in ROWS]


@pytest.fixture
def make_runner(vllm_package):
    """A function that makes a runner of the stand-in package with five requests in its slots."""

    def make(*changes, requests=True, **options):
        vllm_package(*changes)
        register()
        runner = importlib.import_module(RUNNER).GPUModelRunner(SLOTS, LENGTH)
        runner.load_model(options.pop("config", config_of()), **options)
        if requests:
            rows = zip(IN_SLOTS, "abcde", ROWS, PROMPTS, OUTPUTS, strict=True)
            runner.add_requests(list(rows))
        return runner

    return make


def batch():
    """A batch of all five requests, in order."""
    lengths = [len(prompt) + len(output) for prompt, output in zip(PROMPTS, OUTPUTS, strict=True)]
    zeros = torch.zeros(5, dtype=torch.int64)
    pos = torch.tensor(lengths) - 1
    return SimpleNamespace(
        slots=torch.tensor(IN_SLOTS), pos=pos, input_ids=zeros, local_pos=zeros.to(torch.int32)
    )


def history(more=()):
    outputs = [[*output, *extra] for output, extra in zip(OUTPUTS, more or [()] * 5, strict=True)]
    return TokenHistory.from_ids(PROMPTS, outputs, V)


def tokens_of(logits, params=PARAMS):
    return sample(logits, params, history=history()).tokens.tolist()


def test_it_replaces_three_names(make_runner, caplog):
    runner = make_runner(requests=False)
    module = importlib.import_module(RUNNER)
    assert type(runner.sampler).__name__ == "FusedSampler"
    source = importlib.import_module("vllm.v1.worker.gpu.sample.sampler")
    assert isinstance(runner.sampler, source.Sampler)
    assert module.post_update.__name__ == "update"
    assert module.create_watermarker.__name__ == "create"
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_gets_the_logits_as_they_are(make_runner, dtype, monkeypatch):
    runner = make_runner()
    logits = (torch.randn(5, V) * 3).to(dtype)
    before, seen = logits.clone(), []
    draw = Requests.draw
    monkeypatch.setattr(Requests, "draw", lambda self, x, s: seen.append(x) or draw(self, x, s))
    tokens, shown = runner.sample(logits, batch())
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == tokens_of(before)
    assert seen[0] is shown is logits
    assert torch.equal(logits, before)


def test_what_is_recorded_is_counted_once(make_runner):
    """By the plug-in, and by vLLM's own function where the plug-in does not draw."""
    runner = make_runner()
    counts = runner.sampler.penalties_state.output_bin_counts
    tokens = torch.tensor([[11], [12], [13], [14], [15]])
    slots = torch.tensor([6, -1, 9, 0, 4], dtype=torch.int32)
    before = counts.clone()
    runner.postprocess_sampled(slots, tokens, torch.tensor([1, 1, 0, 1, 1], dtype=torch.int32))
    grown = (counts - before).nonzero().tolist()
    assert grown == [[0, 14], [4, 15], [6, 11]]
    assert runner.req_states.total_len.np[IN_SLOTS].tolist() == [3, 4, 3, 5, 2]
    for slot, prompt, output in ((0, PROMPTS[3], [*OUTPUTS[3], 14]), (6, PROMPTS[0], [8, 11])):
        if slot == 0:  # the request of slot 6 has no penalty, and so no history of its prompt
            want = TokenHistory.from_ids([prompt], [output], V)
            assert torch.equal(runner.sampler.penalties_state.prompt_bin_mask[slot], want.seen[0])
            assert torch.equal(counts[slot], want.counts[0])
    logits = torch.randn(5, V)
    more = [[11], [], [], [14], [15]]
    want = sample(logits, PARAMS, history=history(more)).tokens.tolist()
    assert runner.sample(logits, batch())[0].tolist() == want

    module = importlib.import_module(RUNNER)
    others = torch.zeros_like(counts)
    length = runner.req_states.total_len.gpu
    ids = runner.req_states.all_token_ids.gpu
    one = torch.ones(1, dtype=torch.int32)
    arguments = (slots[:1], None, None, others, tokens[:1], one, None, None, ids, length)
    module.post_update(*arguments)
    assert others.nonzero().tolist() == [[6, 11]]


def test_what_changes_logits_before_the_penalties(make_runner):
    """vLLM's own code does it; each change alone and all at once."""
    runner = make_runner()
    bias, _, words = runner.sampler.logits_processors
    budget = runner.sampler.thinking_budget_state
    logits = torch.randn(5, V) * 3
    logits[2, 3] = 40.0  # a bad word
    free = tokens_of(logits)
    changes = {
        "bias": (bias.use_logit_bias, lambda x: x[0].__setitem__(5, x[0, 5] + 40.0)),
        "words": (
            words.num_bad_words.np,
            lambda x: x[2].__setitem__(slice(50), -torch.inf),
        ),
        "budget": (
            budget.use_thinking_budget,
            lambda x: (x[4].fill_(-torch.inf), x[4].__setitem__(7, 1e9)),
        ),
    }
    places = {"bias": 0, "words": 2, "budget": 4}
    for names in [*([name] for name in changes), list(changes)]:
        changed = logits.clone()
        for name, (state, change) in changes.items():
            state[IN_SLOTS[places[name]]] = name in names
            if name in names:
                change(changed)
        before = logits.clone()
        tokens, shown = runner.sample(logits, batch())
        assert tokens.tolist() == tokens_of(changed) != free, names
        assert torch.equal(logits, before), "raw logprobs are of the logits that came"
        assert shown.dtype == torch.float32


class Halves:
    """A processor between the penalties and the temperature: masks logits far below the best."""

    def apply(self, logits, ctx):
        limit = logits.amax(-1, keepdim=True) - 1.0
        return logits.masked_fill_(logits < limit, -torch.inf)


class Turns:
    """A processor that makes the worst token the best one, after the penalties."""

    def apply(self, logits, ctx):
        return logits.neg_()


def test_processors_after_the_penalties(make_runner):
    logits = torch.randn(5, V) * 3
    tokens, _ = make_runner(custom=[Turns()]).sample(logits.clone(), batch())
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    penalised = filter_logits(logits, [replace(row, **off) for row in PARAMS], history=history())
    none = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    rest = [replace(row, **none) for row in PARAMS]
    positions = [len(output) for output in OUTPUTS]
    want = sample(-penalised, rest, positions=positions).tokens.tolist()
    assert tokens.tolist() == want != tokens_of(logits)


@pytest.mark.parametrize("custom", [(), (Halves(),)], ids=["", "custom"])
@pytest.mark.parametrize(
    ("mode", "mask", "asked", "is_shown"),
    [
        ("raw_logprobs", False, True, False),
        ("processed_logprobs", False, True, True),
        ("processed_logits", False, True, True),
        ("processed_logits", False, False, False),
        ("raw_logprobs", True, False, True),
    ],
)
def test_what_is_shown(make_runner, mode, mask, asked, is_shown, custom):
    options = {"logprobs_mode": mode, "return_sampling_mask": mask}
    runner = make_runner(custom=custom, **options)
    logits = torch.randn(5, V) * 3
    given = batch()
    tokens, shown = runner.sampler(logits, given, asked)
    if not is_shown:
        assert custom or shown is logits
        return
    want = filter_logits(logits, [not_greedy(row) for row in PARAMS], history=history())
    if custom:
        assert ((shown > -torch.inf) & (want == -torch.inf)).sum() == 0
    else:
        assert torch.equal(shown, want)
        assert torch.isfinite(want[0]).all(), "a greedy row is whole"
    for row, token in enumerate(tokens.tolist()):
        assert shown[row, token] > -torch.inf


def test_rows_of_drafts(make_runner):
    """Each is processed with the draft's tokens before it, and with no others."""
    runner = make_runner(config=config_of(speculative=3))
    rows = [0, 2, 2, 2, 3, 3, 3, 3]
    before = [0, 0, 1, 2, 0, 1, 2, 3]
    ids = torch.tensor([8, 6, 20, 21, 10, 30, 30, -1], dtype=torch.int32)
    drafts = [[], [], [20], [20, 21], [], [30], [30, 30], [30, 30]]
    slots = torch.tensor([IN_SLOTS[row] for row in rows])
    local_pos = torch.tensor(before, dtype=torch.int32)
    logits = torch.randn(8, V) * 3

    def shown(skip=False):
        return runner.sampler.apply_sampling_params(
            logits, slots, slots, slots.numpy(), None, ids, local_pos, None, skip
        )

    history = TokenHistory.from_ids(
        [PROMPTS[row] for row in rows],
        [[*OUTPUTS[row], *draft] for row, draft in zip(rows, drafts, strict=True)],
        V,
    )
    params = [not_greedy(PARAMS[row]) for row in rows]
    want = filter_logits(logits, params, history=history)
    assert torch.equal(shown(), want)
    others = TokenHistory.from_ids(
        [PROMPTS[row] for row in rows], [OUTPUTS[row] for row in rows], V
    )
    assert not torch.equal(want, filter_logits(logits, params, history=others))
    assert torch.equal(shown(skip=True), -logits), "vLLM's own, without top-k and top-p"
    runner.sampler.needs_logits_processing[:] = False
    assert shown() is logits


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative": 65}, "num_speculative_tokens: it must be at most 64, got 65"),
        ({"is_async": True, "transfer": object()}, "kv_transfer_config"),
        ({"vocab_size": 2**20 + 1}, "vocab_size: it must be in 1 .. 2^20, got 1048577"),
    ],
)
def test_an_engine_that_cannot_be_served_keeps_its_sampler(options, named, make_runner, caplog):
    runner = make_runner(requests=False, config=config_of(**options))
    assert type(runner.sampler).__name__ == "Sampler"
    (message,) = warnings_of(caplog)
    assert message.startswith("llm_sampling: vLLM keeps its own sampler: ")
    assert named in message
    assert runner.sample(torch.randn(5, V), batch())[0].tolist() == [5] * 5, "vLLM's own draw"


def test_a_watermark_is_vllm_s_own(make_runner, caplog):
    make_runner(requests=False, config=config_of(watermark=object()))
    (message,) = warnings_of(caplog)
    assert "vLLM keeps its own sampler: watermark_config" in message


CHANGES = {
    "a sampler that takes other rows": (
        ("v1.worker.gpu.sample.sampler", "pos, input_ids,", "input_ids, pos,"),
        "Sampler.sample takes (self logits expanded_idx_mapping idx_mapping idx_mapping_np input_",
    ),
    "tokens that are recorded elsewhere": (
        ("v1.worker.gpu.model_runner", "        post_update(", "        print("),
        "postprocess_sampled does not look up post_update",
    ),
    "histories under another name": (
        ("v1.worker.gpu.sample.penalties", "prompt_bin_mask", "prompt_bits"),
        "prompt_bin_mask",
    ),
    "bad words under another name": (
        ("v1.worker.gpu.sample.bad_words", "num_bad_words", "words"),
        "num_bad_words",
    ),
    "a class that is gone": (
        ("v1.worker.gpu.spec_decode.rejection_sampler", "class Rej", "class Acc"),
        "RejectionSampler",
    ),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_a_vllm_that_is_different_keeps_its_sampler(change, named, vllm_package, caplog):
    vllm_package(change)
    register()
    runner = importlib.import_module(RUNNER)
    assert runner.Sampler.__name__ == "Sampler"
    assert runner.post_update.__name__ == "post_update"
    (message,) = warnings_of(caplog)
    assert message.startswith("llm_sampling: vLLM keeps its own sampler: V2 runner: ")
    assert named in message


def test_what_is_relied_on_is_what_the_stand_in_has(vllm_package):
    """So that each change above is the only one."""
    vllm_package()
    assert v2.RELIANCE.difference() is None


def test_parameters_keep_vllm_s_seed():
    assert params_of(Theirs(), -3) == SamplingParams(seed=2**64 - 3)
    assert params_of(Theirs(seed=9), -3) == SamplingParams(seed=9)
