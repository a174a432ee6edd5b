"""The plug-in for SGLang without SGLang: what it replaces and refuses, and what its requests draw.

tests/integrations/test_sglang_engine.py has the real engine.
"""

import gc
import importlib
import logging
import random
import sys
from types import SimpleNamespace

import fake_sglang
import pytest
import torch

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.integrations import sglang as plugin
from llm_sampling.integrations.sglang import BACKEND, REFUSED, RELIANCE, SWITCH, Requests, params_of

V = 101


def their_params():
    """The stand-in package's SamplingParams: the fields that are read, with SGLang's defaults."""
    namespace = {"__name__": __name__}
    exec(fake_sglang.SOURCES["srt.sampling.sampling_params"], namespace)
    return namespace["SamplingParams"]


Theirs = their_params()


def random_params(rng):
    """Parameters of every kind: greedy or not, with and without penalties and filters."""
    return Theirs(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=rng.choice([-1, 1, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
        presence_penalty=rng.choice([0.0, 0.0, -0.3]),
        sampling_seed=rng.choice([0, 7, 2**63 - 1, -3, rng.getrandbits(40)]),
    )


# ---- parameters ----


def test_parameters_keep_their_meaning():
    theirs = Theirs(0.5, 0.9, 40, 0.1, 0.3, -0.2, 1.2, sampling_seed=9)
    assert params_of(theirs) == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        repetition_penalty_scope="output",
        frequency_penalty=0.3,
        presence_penalty=-0.2,
        seed=9,
    )
    off = SamplingParams(repetition_penalty_scope="output", seed=2**64 - 1)
    assert params_of(Theirs(sampling_seed=-1)) == off


@pytest.mark.parametrize(
    ("theirs", "is_greedy"),
    [
        (Theirs(temperature=0.0, sampling_seed=1), True),
        (Theirs(temperature=0.7, top_k=1, sampling_seed=1), True),
        (Theirs(temperature=2e-6, sampling_seed=1), False),
        (Theirs(top_k=2, sampling_seed=1), False),
    ],
)
def test_what_sglang_takes_for_greedy(theirs, is_greedy):
    assert (params_of(theirs).temperature == 0) == is_greedy


@pytest.mark.parametrize(
    "theirs",
    [
        Theirs(repetition_penalty=1e-300),
        Theirs(repetition_penalty=2.0, frequency_penalty=-2.0, presence_penalty=2.0),
        Theirs(top_p=5e-324),
        Theirs(top_k=2**29, min_p=1.0),
        Theirs(temperature=1e300),
    ],
)
def test_what_sglang_accepts_is_accepted(theirs):
    """A ValueError in the middle of a step would end the scheduler."""
    assert sample(torch.randn(1, V), params_of(theirs), history=TokenHistory.empty(1, V))


def test_fresh_seeds_are_torch_s_and_a_request_s_own():
    torch.manual_seed(5)
    first = [params_of(Theirs()).seed for _ in range(3)]
    torch.manual_seed(5)
    params_of(Theirs(temperature=0))  # draws none
    params_of(Theirs(sampling_seed=3))
    assert [params_of(Theirs()).seed for _ in range(3)] == first
    assert len(set(first)) == 3


# ---- the stand-in package ----


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that writes the stand-in package, with changes; its imports are undone after."""
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if is_sglang(name)}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(SWITCH, "1")
    yield lambda *changes: fake_sglang.write(tmp_path, *changes)
    for name in filter(is_sglang, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(real)


def is_sglang(name):
    return name.partition(".")[0] == "sglang"


def theirs(name):
    return importlib.import_module(f"sglang.srt.{name}")


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def started(backend=None):
    """The runner of a process in which SGLang has loaded its plug-ins and made its sampler."""
    register_and_apply()
    if backend is not None:
        theirs("runtime_context").get_context().leaves["sampling_backend"] = backend
    runner = theirs("model_executor.model_runner").ModelRunner()
    for name in ("managers.scheduler", "managers.schedule_batch", "mem_cache.memory_pool"):
        theirs(name)
    runner.initialize()
    return runner


def register_and_apply():
    theirs("plugins.hook_registry")
    plugin.register()
    theirs("plugins.hook_registry").HookRegistry.apply_hooks()


# ---- the requests of a batch ----


class Engine:
    """A scheduler of few requests, that come, wait, are chunked, retracted and merged at random.

    It works as SGLang's does: a batch of prompts runs alone or with the running requests, and joins
    them; a request keeps a row of the pool while it runs, which the next one gets at once. With
    the overlap scheduler what a step drew is known after the next one has been launched: so a
    request that has ended is drawn once more, and a retracted one loses a token. Logits depend on
    the name of the request and on its number of tokens alone.
    """

    def __init__(self, seed, overlap=True, change=lambda info, rng: None):
        self.rng = random.Random(seed)
        self.overlap, self.change = overlap, change
        self.runner = started()
        self.pool = theirs("mem_cache.memory_pool").ReqToTokenPool(8)
        self.free = list(range(8, 0, -1))
        self.running, self.joining, self.chunked = None, None, None
        self.waiting, self.unknown = [], []
        self.number = self.retracted = self.chunks = 0
        self.scheduler = theirs("managers.scheduler").Scheduler()

    def new(self):
        self.number += 1
        prompt = [self.rng.randrange(V) for _ in range(self.rng.randrange(1, 9))]
        request = theirs("managers.schedule_batch").Req(
            self.number, prompt, random_params(self.rng)
        )
        request.drawn = {}  # by position, of this stay and before
        request.last = self.rng.randrange(2, 12)
        request.stay = 0
        request.has_ended = False
        return request

    def batch_of_prompts(self):
        """Requests whose prompts are computed, and the last place of each."""
        rng = self.rng
        while len(self.waiting) < 3 and rng.random() < 0.6:
            self.waiting.append(self.new())
        chosen = [] if self.chunked is None else [self.chunked]
        while self.waiting and self.free and rng.random() < 0.8:
            request = self.waiting.pop(rng.randrange(len(self.waiting)))
            request.kv.req_pool_idx = self.free.pop()
            request.stay += 1
            chosen.append(request)
        if not chosen:
            return None, []
        module = theirs("managers.schedule_batch")
        batch = module.ScheduleBatch(chosen, self.pool, V)
        batch.prepare_for_extend()
        places = [len(r.origin_input_ids) + len(r.output_ids) - 1 for r in chosen]
        self.chunked = None
        if places[-1] > 0 and rng.random() < 0.3:
            self.chunked, places[-1] = chosen[-1], rng.randrange(places[-1])
            self.chunks += 1
        return batch, places

    def retract(self):
        index = self.rng.randrange(len(self.running.reqs))
        request = self.running.reqs[index]
        self.keep([i for i in range(len(self.running.reqs)) if i != index])
        request.stay += 1
        self.free.append(request.kv.req_pool_idx)
        self.waiting.append(request)
        self.retracted += 1

    def keep(self, indices):
        self.running.filter_batch(indices)

    def step(self):
        """The first wrong (request, position) of a step, or None."""
        if self.running is not None:
            ended = {id(r) for r in self.running.reqs if r.has_ended}
            rows = range(len(self.running.reqs))
            self.keep([i for i in rows if id(self.running.reqs[i]) not in ended])
        if self.joining is not None:
            batch, self.joining = self.joining, None
            rows = range(len(batch.reqs))
            batch.filter_batch(
                [
                    i
                    for i in rows
                    if not batch.reqs[i].has_ended and batch.reqs[i] is not self.chunked
                ]
            )
            if self.running is None or not self.running.reqs:
                self.running = batch
            else:
                self.running.merge_batch(batch)
        if self.running is not None and self.running.reqs and self.rng.random() < 0.15:
            self.retract()
        batch, places = self.batch_of_prompts() if self.rng.random() < 0.5 else (None, [])
        if batch is not None:
            if self.running is not None and self.running.reqs and self.rng.random() < 0.3:
                places += [self.next_place(r) for r in self.running.reqs]
                batch.merge_batch(self.running)
                self.running = None
            self.joining = batch
        elif self.running is not None and self.running.reqs:
            batch, places = self.running, [self.next_place(r) for r in self.running.reqs]
        if batch is None:
            self.know_all_but(0)
            return None
        return self.forward(batch, places)

    def next_place(self, request):
        """The place of the last token, which the host may not know yet."""
        return len(request.origin_input_ids) + request.length - 1

    def forward(self, batch, places):
        positions = [
            p + 1 - len(r.origin_input_ids) for r, p in zip(batch.reqs, places, strict=True)
        ]
        rows = [
            logits_of(r.rid, position) for r, position in zip(batch.reqs, positions, strict=True)
        ]
        with self.scheduler._forward_isolation(batch):
            info = batch.sampling_info
            self.change(info, self.rng)
            forward = SimpleNamespace(
                sampling_info=info,
                return_logprob=False,
                is_decode=True,
                positions=torch.tensor(places),
            )
            output = SimpleNamespace(next_token_logits=torch.stack(rows))
            tokens = self.runner.sample(output, forward).tolist()
        wrong = None
        for request, position, token in zip(batch.reqs, positions, tokens, strict=True):
            if position < 0 or request is self.chunked:
                continue
            request.drawn[position] = token
            if wrong is None and token != alone(request, position):
                wrong = request.rid, position
            request.length = position + 1
            self.unknown.append((request, request.stay, token))
        self.know_all_but(len(batch.reqs) if self.overlap else 0)
        return wrong

    def know_all_but(self, last):
        """The host learns what was drawn, but for the last rows."""
        while len(self.unknown) > last:
            request, stay, token = self.unknown.pop(0)
            if stay != request.stay or request.has_ended:
                continue
            request.output_ids.append(token)
            if len(request.output_ids) >= request.last:
                request.has_ended = True
                self.free.append(request.kv.req_pool_idx)


def logits_of(name, position):
    generator = torch.Generator().manual_seed(name * 10_000 + position + 1)
    return torch.randn(V, generator=generator) * 2


def alone(request, position):
    """The request's token at a position by ``sample``, without other requests."""
    output = [request.drawn[i] for i in range(position)]
    history = TokenHistory.from_ids([request.origin_input_ids], [output], V)
    logits = logits_of(request.rid, position).unsqueeze(0)
    params = params_of(request.sampling_params)
    return int(sample(logits, params, history=history, positions=[position]).tokens)


def follow(seed, steps=80, **options):
    """The first (request, position) whose token differs from the one that it gets alone."""
    engine = Engine(seed, **options)
    for _ in range(steps):
        wrong = engine.step()
        if wrong is not None:
            return wrong
    assert min(engine.number // 10, engine.retracted, engine.chunks) > 0, "too little happened"
    return None


@pytest.fixture
def installed(fake):
    fake()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_draws_as_if_alone(seed, overlap, installed):
    assert follow(seed, overlap=overlap) is None


def neutral_bias(info, rng):
    """Sometimes a bias, which changes nothing, but has the penalties applied before the draw."""
    if rng.random() < 0.5:
        info.logit_bias = torch.zeros(1, V)


@pytest.mark.parametrize("seed", range(4))
def test_penalties_that_are_applied_before_a_bias_are_the_same(seed, installed):
    assert follow(seed, change=neutral_bias) is None


class CountsOneTooMany(Requests):
    def draw(self, rows, logits, places, *, are_penalised):
        return super().draw(rows, logits, places + 1, are_penalised=are_penalised)


class RecordsInOtherSlots(Requests):
    def record(self, rows, tokens):
        table = self._follow(rows)
        if self._needs_history:
            table.append(tokens, slots=(self._slots + 1) % self._capacity)


class ForgetsOutputs(Requests):
    """Does not add what it draws to the histories."""

    def record(self, rows, tokens):
        pass


class ForgetsRetractedOutputs(Requests):
    """Begins a request anew that comes back."""

    def _enter(self, table, request):
        request.output = ()
        super()._enter(table, request)


class KeepsParameters(Requests):
    """Leaves the request before in a slot that is used again."""

    def _enter(self, table, request):
        if request.slot not in self._in_slot:
            super()._enter(table, request)


class KeepsSlots(Requests):
    """Goes on with the slots of the first batch as long as its size does not change."""

    def _follow(self, rows):
        kept = self._slots, self._prompt_lengths
        table = super()._follow(rows)
        if len(kept[0]) == len(rows):
            self._slots, self._prompt_lengths = kept
        return table


class ChunksAreRequests(Requests):
    """Takes a chunk of a prompt for the request itself, so that its draw is recorded."""

    def of_batch(self, batch, vocab_size):
        made = super().of_batch(batch, vocab_size)
        known = vars(self).setdefault("known", {})
        return [
            known.setdefault((theirs.rid, theirs.stay), ours)
            for theirs, ours in zip(batch.reqs, made, strict=True)
        ]


@pytest.mark.parametrize(
    "broken",
    [
        CountsOneTooMany,
        RecordsInOtherSlots,
        ForgetsOutputs,
        ForgetsRetractedOutputs,
        KeepsParameters,
        KeepsSlots,
        ChunksAreRequests,
    ],
)
def test_the_comparison_detects(broken, fake, monkeypatch):
    """Each broken class draws a wrong token, or raises, within a few sequences."""
    monkeypatch.setattr(plugin, "Requests", broken)
    for seed in range(4):
        for name in filter(is_sglang, list(sys.modules)):
            del sys.modules[name]
        fake()
        try:
            if follow(seed) is not None:
                return
        except (KeyError, ValueError):  # a slot without a request
            return
    pytest.fail(f"{broken.__name__} was not detected")


@pytest.mark.parametrize("lost", ["adjusted_filter_batch", "adjusted_merge_batch"])
def test_the_comparison_detects_rows_of_others(lost, installed, monkeypatch):
    """A batch that does not follow SGLang's changes has too many or too few rows, or others'."""
    followed = plugin.followed

    def deaf(batch_info, requests):
        ours = followed(batch_info, requests)
        setattr(ours, lost, getattr(batch_info, lost))
        return ours

    monkeypatch.setattr(plugin, "followed", deaf)
    with pytest.raises((RuntimeError, AssertionError)):
        assert follow(0) is None


def batch_of(*params, slots=None, vocab_size=V, outputs=None):
    """A batch of the stand-in package whose prompts are [1, 2]."""
    module = theirs("managers.schedule_batch")
    requests = [module.Req(str(i), [1, 2], one) for i, one in enumerate(params)]
    for i, request in enumerate(requests):
        request.kv.req_pool_idx = i + 1 if slots is None else slots[i]
        request.output_ids = [] if outputs is None else outputs[i]
    pool = theirs("mem_cache.memory_pool").ReqToTokenPool(8)
    batch = module.ScheduleBatch(requests, pool, vocab_size)
    batch.prepare_for_extend()
    return batch


def draw(runner, batch, logits, place=1, **fields):
    """The tokens of a step, and the sampler's output."""
    info = batch.sampling_info.copy_for_forward()
    for name in [name for name in fields if hasattr(info, name)]:
        setattr(info, name, fields.pop(name))
    output = SimpleNamespace(next_token_logits=logits)
    forward = SimpleNamespace(
        sampling_info=info,
        is_decode=True,
        positions=torch.full((len(logits),), place),
        **{"return_logprob": False} | fields,
    )
    return runner.sample(output, forward).tolist(), output


def test_without_penalties_there_is_no_history(installed):
    runner = started()
    plain, penalised = Theirs(sampling_seed=1), Theirs(sampling_seed=2, presence_penalty=1.0)
    first = batch_of(plain, plain)
    draw(runner, first, torch.randn(2, V))
    requests = type(first.sampling_info).followed_by
    assert requests._table.history is None
    draw(runner, batch_of(penalised, slots=[3]), torch.randn(1, V))
    assert requests._table.history.counts.shape == (9, V)
    logits = torch.randn(2, V)
    want = sample(logits, params_of(plain), positions=[1, 1]).tokens.tolist()
    assert draw(runner, first, logits, place=2)[0] == want, "requests that were there stay"


def test_a_request_without_a_seed_keeps_the_one_that_it_got(installed):
    started()
    batch = batch_of(Theirs(), Theirs())
    seeds = [request.params.seed for request in batch.sampling_info.requests]
    state = torch.get_rng_state()
    batch.prepare_for_extend()  # as after a retraction
    assert [request.params.seed for request in batch.sampling_info.requests] == seeds
    assert seeds[0] != seeds[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_slots_of_requests_that_are_gone_are_cleared(installed):
    runner = started()
    batch = batch_of(Theirs(sampling_seed=1, presence_penalty=1.0), Theirs(sampling_seed=2))
    draw(runner, batch, torch.randn(2, V))
    requests = type(batch.sampling_info).followed_by
    assert requests._table.batch.needs_history
    batch.filter_batch([1])
    gc.collect()
    draw(runner, batch, torch.randn(1, V), place=2)
    assert requests._table.params(1) is None
    assert not requests._table.batch.needs_history


def test_two_requests_in_one_slot_are_refused(installed):
    runner = started()
    one, other = batch_of(Theirs(sampling_seed=1)), batch_of(Theirs(sampling_seed=2))
    draw(runner, one, torch.randn(1, V))
    draw(runner, other, torch.randn(1, V))
    with pytest.raises(RuntimeError, match="two requests that run have the slot 1"):
        draw(runner, one, torch.randn(1, V), place=2)


@pytest.mark.parametrize("shape", [(1, V), (3, V), (2, V - 1)])
def test_logits_of_other_requests_are_not_drawn_from(shape, installed, caplog):
    runner = started()
    batch = batch_of(Theirs(sampling_seed=1), Theirs(sampling_seed=2))
    for _ in range(2):
        assert draw(runner, batch, torch.zeros(shape))[0] == [5] * shape[0]
    (message,) = warnings_of(caplog)
    assert str(shape) in message
    batch = batch_of(Theirs(sampling_seed=1), Theirs(presence_penalty=0.5))
    with pytest.raises(RuntimeError, match="penalties cannot be applied"):
        draw(runner, batch, torch.zeros(shape))


def test_rows_of_no_request_are_sglang_s(installed, caplog):
    """Such as those of a warm-up."""
    runner = started()
    info = theirs("sampling.sampling_batch_info").SamplingBatchInfo(torch.ones(2, 1), False)
    batch = SimpleNamespace(sampling_info=info)
    assert draw(runner, batch, torch.zeros(2, V))[0] == [5, 5]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_without_a_candidate_gets_token_0_and_a_warning(value, installed, caplog):
    runner = started()
    logits = torch.randn(3, V)
    batch = batch_of(*(Theirs(sampling_seed=i) for i in range(3)))
    want, _ = draw(runner, batch, logits.clone())
    assert warnings_of(caplog) == []
    logits[1] = value
    for _ in range(2):
        assert draw(runner, batch, logits.clone())[0] == [want[0], 0, want[2]]
    assert len(warnings_of(caplog)) == 1


# ---- the sampler ----

ROWS = [
    Theirs(temperature=0.0),
    Theirs(sampling_seed=1, top_p=0.9, min_p=0.02),
    Theirs(sampling_seed=2, temperature=0.6, repetition_penalty=1.5, frequency_penalty=0.5),
    Theirs(temperature=0.0, presence_penalty=1.5),
]
OUTPUTS = [[8], [9], [11], [10]]


def want_of(logits, *, penalised=True, **off):
    """What is drawn from logits for ROWS after OUTPUTS, by ``sample``."""
    off |= {} if penalised else dict.fromkeys(("frequency_penalty", "presence_penalty"), 0.0)
    off |= {} if penalised else {"repetition_penalty": 1.0}
    params = [params_of(Theirs(**{**vars(row), **off})) for row in ROWS]
    return sample(logits, params, history=history(), positions=[1] * 4).tokens.tolist()


def history():
    return TokenHistory.from_ids([[1, 2]] * 4, OUTPUTS, V)


def penalised(logits):
    params = [
        SamplingParams(
            repetition_penalty=row.repetition_penalty,
            repetition_penalty_scope="output",
            frequency_penalty=row.frequency_penalty,
            presence_penalty=row.presence_penalty,
            seed=0,
        )
        for row in ROWS
    ]
    return filter_logits(logits, params, history=history())


def test_the_kernel_gets_the_logits_as_they_are(installed):
    runner = started()
    logits = torch.randn(4, V) * 3
    before = logits.clone()
    tokens, _ = draw(runner, batch_of(*ROWS, outputs=OUTPUTS), logits, place=2)
    assert tokens == want_of(before)
    assert torch.equal(logits, before)
    assert [tensor.tolist() for tensor in runner.sampler.synced] == [tokens]


def test_biases_masks_and_processors_come_after_the_penalties(installed):
    runner = started()
    bias = torch.zeros(4, V)
    bias[2, :50], bias[3, 10] = 3.0, 2.0
    mask = torch.rand(4, V) < 0.3
    for fields, change in (
        ({"logit_bias": bias}, lambda x: x + bias),
        ({"has_custom_logit_processor": True}, lambda x: x * 0.5),
        ({"grammar_mask": mask}, lambda x: x.masked_fill(mask, -torch.inf)),
        (
            {"logit_bias": bias, "has_custom_logit_processor": True, "grammar_mask": mask},
            lambda x: (x.masked_fill(mask, -torch.inf) + bias) * 0.5,
        ),
    ):
        for _ in range(5):
            logits = torch.randn(4, V) * 3
            want = want_of(change(penalised(logits)), penalised=False)
            batch = batch_of(*ROWS, outputs=OUTPUTS)
            assert draw(runner, batch, logits, place=2, **fields)[0] == want


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_logprobs_are_of_what_sglang_computes_them_from(greedy, original, biased, installed):
    module = theirs("layers.sampler")
    module.SGLANG_RETURN_ORIGINAL_LOGPROB = original
    runner = started()
    rows = [0, 3] if greedy else range(4)
    logits = torch.randn(4, V)
    scored = penalised(logits) + (1.0 if biased else 0.0)
    fields = {"logit_bias": torch.ones(len(rows), V)} if biased else {}
    batch = batch_of(*(ROWS[i] for i in rows), outputs=[OUTPUTS[i] for i in rows])
    tokens, output = draw(runner, batch, logits[list(rows)], place=2, return_logprob=True, **fields)
    if not (greedy or original):
        scored = scored / torch.tensor([[row.temperature] for row in ROWS])
    want = scored[list(rows)].log_softmax(-1)
    assert torch.allclose(output.logprobs, want, atol=1e-6)
    assert output.tokens.tolist() == tokens


def test_sampling_masks_have_what_could_be_drawn(installed):
    runner = started()
    logits = torch.randn(4, V) * 3
    asked = torch.tensor([1, 3])
    kept = [
        filter_logits(logits[i : i + 1], params_of(ROWS[i]), history=h)[0].softmax(-1)
        for i, h in ((i, TokenHistory.from_ids([[1, 2]], [OUTPUTS[i]], V)) for i in (1, 3))
    ]
    for fields in ({}, {"logit_bias": torch.zeros(4, V)}):
        batch = batch_of(*ROWS, outputs=OUTPUTS)
        tokens, output = draw(
            runner, batch, logits.clone(), 2, sampling_mask_batch_indices=asked, **fields
        )
        mask = output.sampling_mask_output
        assert mask.batch_rows is asked
        assert torch.equal(mask.weights, torch.stack(kept))
        assert all(mask.weights[i, tokens[row]] > 0 for i, row in enumerate((1, 3)))


# ---- registration ----


def is_replaced():
    info = theirs("sampling.sampling_batch_info").SamplingBatchInfo.__name__
    penalties = theirs("sampling.penaltylib").BatchedPenalizerOrchestrator.__name__
    return (info, penalties) == ("FollowedBatchInfo", "PenaltiesElsewhere")


def is_sglang_s_own(runner):
    info = theirs("sampling.sampling_batch_info").SamplingBatchInfo.__name__
    penalties = theirs("sampling.penaltylib").BatchedPenalizerOrchestrator.__name__
    kept = ("SamplingBatchInfo", "BatchedPenalizerOrchestrator")
    return (info, penalties) == kept and type(runner.sampler).__name__ == "Sampler"


def test_the_flag_chooses_it(fake, monkeypatch, caplog):
    monkeypatch.delenv(SWITCH)
    caplog.set_level(logging.INFO)
    fake()
    runner = started(backend=BACKEND)
    assert type(runner.sampler).__name__ == "FusedSampler"
    assert is_replaced()
    assert theirs("runtime_context").get_context().config_leaf("sampling_backend") == "pytorch"
    assert [r.getMessage() for r in caplog.records] == ["llm_sampling draws, by its backend 'cpu'"]


def test_the_switch_chooses_it(fake, caplog):
    fake()
    assert type(started().sampler).__name__ == "FusedSampler"
    assert is_replaced()
    assert warnings_of(caplog) == []


def test_penalties_are_left_to_it(installed):
    started()
    made = batch_of(Theirs(presence_penalty=1.0)).sampling_info.penalizer_orchestrator.penalizers
    assert [kind.__name__ for kind in made] == ["BatchedMinNewTokensPenalizer"]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_is_off_unless_asked_for(value, fake, monkeypatch, caplog):
    fake()
    monkeypatch.delenv(SWITCH)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert is_sglang_s_own(started())
    assert warnings_of(caplog) == []


def test_another_value_is_refused(fake, monkeypatch, caplog):
    fake()
    monkeypatch.setenv(SWITCH, "yes")
    assert is_sglang_s_own(started())
    (message,) = warnings_of(caplog)
    assert message == "llm_sampling is off: LLM_SAMPLING_SGLANG must be 0 or 1, got 'yes'"


def test_called_twice_it_registers_once(fake):
    fake()
    register_and_apply()
    once = theirs("layers.sampler").create_sampler
    register_and_apply()
    assert theirs("layers.sampler").create_sampler is once


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name, installed, caplog):
    theirs("runtime_context").get_context().leaves[name] = "on"
    runner = started()
    assert is_sglang_s_own(runner)
    (message,) = warnings_of(caplog)
    assert message.startswith(f"llm_sampling: SGLang keeps its own sampler: {name}: ")
    batch = batch_of(Theirs(presence_penalty=1.0))
    assert len(batch.sampling_info.penalizer_orchestrator.penalizers) == 2
    assert draw(runner, batch, torch.randn(1, V))[0] == [5]


def test_a_refused_flag_leaves_a_sampler_that_draws(installed, caplog):
    context = theirs("runtime_context").get_context()
    context.leaves["speculative_algorithm"] = "NGRAM"
    assert is_sglang_s_own(started(backend=BACKEND))
    assert context.config_leaf("sampling_backend") == "pytorch"


def test_a_second_model_of_a_process_is_refused(installed, caplog):
    started()
    assert type(theirs("layers.sampler").create_sampler()).__name__ == "Sampler"
    (message,) = warnings_of(caplog)
    assert message == "llm_sampling: SGLang keeps its own sampler: a second model in one process"


def test_too_large_a_vocabulary_is_sglang_s(installed, caplog):
    runner = started()
    for _ in range(2):
        batch = batch_of(Theirs(presence_penalty=1.0), vocab_size=2**20 + 1)
        assert len(batch.sampling_info.penalizer_orchestrator.penalizers) == 2
        other = batch_of(Theirs(), vocab_size=2**20 + 1)
        batch.merge_batch(other)
        batch.filter_batch([0])
        assert draw(runner, batch, torch.zeros(1, 2**20 + 1))[0] == [5]
    (message,) = warnings_of(caplog)
    assert message.endswith("sampler: vocab_size: it must be in 1 .. 2^20, got 1048577")


def test_a_version_that_was_not_tested_is_told(fake, caplog):
    caplog.set_level(logging.INFO)
    fake(("__init__", "0.5.23", "0.6.0"))
    assert type(started().sampler).__name__ == "FusedSampler"
    assert "this SGLang is 0.6.0 and has all that" in caplog.records[0].getMessage()


def test_a_hook_that_sglang_does_not_apply_is_an_error(installed, monkeypatch):
    """SGLang logs what failed and goes on; with half of the hooks, penalties would be lost."""
    register_and_apply()
    registry = theirs("plugins.hook_registry").HookRegistry
    monkeypatch.setattr(registry, "apply_hooks", classmethod(lambda cls: None))
    with pytest.raises(RuntimeError, match=r"did not replace .*SamplingBatchInfo"):
        started()


CHANGES = {
    "a class that is gone": (
        ("srt.layers.sampler", "_SamplingMaskCapture", "_MaskCapture"),
        "_SamplingMaskCapture",
    ),
    "a parameter more": (
        (
            "srt.layers.sampler",
            "def _preprocess_logits(self, logits,",
            "def _preprocess_logits(self, x,",
        ),
        "Sampler._preprocess_logits takes (self x sampling_info)",
    ),
    "a parameter of sampling that is gone": (
        ("srt.sampling.sampling_params", "sampling_seed: int", "seed: int"),
        "SamplingParams has no sampling_seed",
    ),
    "a field that is gone": (
        ("srt.sampling.sampling_batch_info", "logit_bias", "bias"),
        "SamplingBatchInfo has no logit_bias",
    ),
    "changes that are told to nobody": (
        ("srt.sampling.sampling_batch_info", "self.adjusted_filter_batch(", "print("),
        "SamplingBatchInfo.filter_batch does not look up adjusted_filter_batch",
    ),
    "a batch that is not copied": (
        ("srt.managers.scheduler", "kept.copy_for_forward()", "kept"),
        "Scheduler._forward_isolation does not look up copy_for_forward",
    ),
    "logits that are changed elsewhere": (
        ("srt.model_executor.model_runner", "apply_logits_bias", "change"),
        "ModelRunner._preprocess_logits does not look up apply_logits_bias",
    ),
    "rows of a pool under another name": (
        ("srt.managers.schedule_batch", "req_pool_idx", "pool_index"),
        "ReqKvInfo has no req_pool_idx",
    ),
    "outputs under another name": (
        ("srt.managers.schedule_batch", "output_ids", "tokens"),
        "Req.__init__ does not look up output_ids",
    ),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_a_sglang_that_is_different_keeps_its_sampler(change, named, fake, caplog):
    fake(change)
    assert is_sglang_s_own(started())
    (message,) = warnings_of(caplog)
    assert message.startswith("llm_sampling: SGLang keeps its own sampler: ")
    assert named in message


@pytest.mark.parametrize("place", RELIANCE.places)
def test_what_is_relied_on_is_looked_for(place, installed, monkeypatch):
    """Each name that is looked for is, in fact, looked for."""
    assert RELIANCE.difference() is None
    module, _, names = place.partition(":")
    monkeypatch.setattr(importlib.import_module(module), names.partition(".")[0], None)
    assert RELIANCE.difference() is not None


def test_a_sglang_without_plug_ins_keeps_its_sampler(fake, caplog):
    fake(("srt.layers.sampler", "def register_sampler_backend", "def register_backend"))
    plugin.register()
    (message,) = warnings_of(caplog)
    assert message.startswith("llm_sampling: SGLang keeps its own sampler: ")
    assert "register_sampler_backend" in message
