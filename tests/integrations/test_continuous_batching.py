"""The kernel inside transformers' continuous batching, driven on the CPU with a small random model.

Every draw is logged: the logits that the model runner showed, the request of each row, and the
place of the row in its text, both as transformers' own records have them. ``replay`` computes each
token anew by :func:`llm_sampling.sample`, from the logits of its row and from its request alone.
"""

import importlib.util
import random
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from no_waiting import nothing_waits
from torch.utils._python_dispatch import TorchDispatchMode

from llm_sampling import RequestTable, SamplingParams, TokenHistory, sample
from llm_sampling.generation import seeded
from llm_sampling.integrations import continuous_batching
from llm_sampling.integrations.continuous_batching import Requests, fused_continuous_batching
from llm_sampling.integrations.engine import Warnings, find

transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
PACKAGE = "transformers.generation.continuous_batching"
HAS_RUNNER = importlib.util.find_spec(f"{PACKAGE}.model_runner") is not None
needs_runner = pytest.mark.skipif(
    not HAS_RUNNER, reason="this transformers has no model runner for continuous batching"
)

V = 97
if HAS_RUNNER:
    #: The field with the number of ids in a page of memory, which was renamed in 5.17.
    CONFIG = set(transformers.ContinuousBatchingConfig.__dataclass_fields__)
    PAGE_SIZE = "page_size" if "page_size" in CONFIG else "block_size"
#: Nothing ends early, and nothing is filtered where a request does not ask for it.
NEUTRAL = {"do_sample": True, "eos_token_id": -1, "max_new_tokens": 20}

#: Prompts and parameters: greedy, seeded, each filter, each penalty, a bias, all together.
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.6),
    SamplingParams(temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, seed=2**64 - 1),
    SamplingParams(top_k=5, seed=3),
    SamplingParams(top_p=0.8, seed=4),
    SamplingParams(min_p=0.1, seed=5),
    SamplingParams(top_k=20, top_p=0.9, min_p=0.01, temperature=1.3, seed=6),
    SamplingParams(repetition_penalty=1.4, seed=7),
    SamplingParams(repetition_penalty=1.4, repetition_penalty_scope="output", seed=8),
    SamplingParams(frequency_penalty=1.2, seed=9),
    SamplingParams(presence_penalty=2.0, seed=10),
    SamplingParams(logit_bias={3: 5.0, 4: -100.0}, seed=11),
    SamplingParams(top_k=30, min_tokens_to_keep=3, top_p=0.3, seed=12),
    SamplingParams(
        temperature=0.9, top_k=40, repetition_penalty=1.2, presence_penalty=0.3, seed=13
    ),
    SamplingParams(temperature=1.5),
    SamplingParams(temperature=0, logit_bias={7: 100.0}, frequency_penalty=2.0),
]
PROMPTS = [
    [(7 * row + 11 * place) % V for place in range(1 + 5 * row % 23)] for row in range(len(PARAMS))
]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(V)


@pytest.fixture(autouse=True)
def its_log_is_captured():
    """The handlers of transformers' log are its own."""
    transformers.logging.enable_propagation()
    yield
    transformers.logging.disable_propagation()


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """Each manager collects garbage twice when it stops, which takes longer than its tokens."""
    if HAS_RUNNER:
        monkeypatch.setattr(f"{PACKAGE}.continuous_api.gc", SimpleNamespace(collect=lambda: 0))


@dataclass
class Run:
    """What the requests of a manager got, and all that the sampler was shown for it.

    Attributes:
        outputs: transformers' ``GenerationOutput`` by request.
        params: of each request, with its seed.
        rows: (request, place of the logits in its text, logits, token) in the order of the draws.
        preempted: how many requests were moved to the host's memory, and how many were reset.
        batches: of each draw the number of rows, and of those with a request.
    """

    outputs: dict = field(default_factory=dict)
    params: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    preempted: Counter = field(default_factory=Counter)
    batches: list = field(default_factory=list)

    def tokens(self, request):
        """Return the tokens of a request, or of all requests of a list in order."""
        output = self.outputs[request]
        assert output.error is None, output.error
        return output.generated_tokens

    def all_tokens(self):
        return {name: self.tokens(name) for name in sorted(self.outputs)}


def cb_config(**options):
    """Return a small config, whose memory holds all requests unless ``num_blocks`` is smaller."""
    options = {PAGE_SIZE: 16, "num_blocks": 128, "max_batch_tokens": 64} | options
    return transformers.ContinuousBatchingConfig(**options)


def run(
    model,
    requests,
    config=None,
    generation=None,
    *,
    together=True,
    poison=None,
    change=None,
    is_logged=True,
    **options,
):
    """Generate for ``requests``, each a prompt and the arguments of ``add_request``.

    Args:
        config: the ContinuousBatchingConfig.
        generation: the fields of the GenerationConfig.
        together: whether all requests are in the queue before the first batch.
        poison: (draw, row) whose logits are NaN.
        change: is called with a MonkeyPatch first.
        is_logged: whether the draws are logged, for :func:`replay`. A graph cannot be.
        options: for ``fused_continuous_batching``.
    """
    done = Run()
    generation = transformers.GenerationConfig(**NEUTRAL | (generation or {}))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.enter_context(fused_continuous_batching(**options))
        if is_logged:
            log_draws(patch, done, poison)
        if change is not None:
            change(patch)
        manager = model.init_continuous_batching(generation, config or cb_config())
        add_all(manager, requests, done, together)
    return done


def run_theirs(model, requests, config=None, generation=None):
    """Generate by transformers' own sampler; ``requests`` are as for :func:`run`."""
    done = Run()
    generation = transformers.GenerationConfig(**NEUTRAL | (generation or {}))
    manager = model.init_continuous_batching(generation, config or cb_config())
    add_all(manager, requests, done, True)
    return done


def add_all(manager, requests, done, together):
    """Add the requests to a manager, run it, and fill ``done``."""
    if not together:
        manager.start()
    names = [manager.add_request(prompt, **options) for prompt, options in requests]
    if together:
        manager.start()
    try:
        expected = len(names) * manager.num_return_sequences
        while len(done.outputs) < expected:
            output = manager.get_result(timeout=60)
            if output is None:
                raise LoopHasEndedError(error_of(manager))
            if output.is_finished():
                done.outputs[output.request_id] = output
    finally:
        manager.stop(block=True)
        manager.destroy()
    if error_of(manager) is not None:
        raise LoopHasEndedError(error_of(manager))


def error_of(manager):
    """The error in which the manager's thread has ended."""
    status = manager.background_thread_status
    return status.fatal_error if hasattr(status, "fatal_error") else manager.fatal_error


class LoopHasEndedError(Exception):
    """The manager's thread has ended in an error."""


def log_draws(patch, done, poison):
    """Write what transformers shows the sampler into ``done``."""
    batches = []
    prepare = find(f"{PACKAGE}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors")
    wait = find(f"{PACKAGE}.scheduler:Scheduler.add_waiting_request")
    draw = Requests.draw

    def prepared(self, requests_in_batch, *args, **options):
        prepare(self, requests_in_batch, *args, **options)
        new = [one.state for one in requests_in_batch if one.has_new_token]
        batches.append([(state.request_id, state.position_offset - 1) for state in new])
        for state in new:
            if asked := state.logit_processor_kwargs.get(continuous_batching._OURS):
                done.params[state.request_id] = asked.of(state.request_id)

    def drawn(self, logits, numbers, *, logprobs):
        (batch,) = batches
        batches.clear()
        if poison is not None and len(done.batches) == poison[0]:
            logits[poison[1]] = torch.nan
        given = logits.clone()
        tokens, of_tokens = draw(self, logits, numbers, logprobs=logprobs)
        assert torch.equal(logits.nan_to_num(), given.nan_to_num()), "the logits were modified"
        done.batches.append((len(logits), len(batch)))
        assert len(tokens) == len(logits) >= len(batch)
        assert not tokens[len(batch) :].any(), "a row of padding has a token"
        for (name, place), row, token in zip(batch, given, tokens.tolist(), strict=False):
            if not name.startswith("__warmup"):
                done.rows.append((name, place, row.cpu(), token))
        return tokens, of_tokens

    def waits(self, state):
        wait(self, state)
        if state.is_cpu_offloaded:
            done.preempted["moved"] += 1
        elif state._true_initial_tokens:
            done.preempted["reset"] += 1

    patch.setattr(f"{PACKAGE}.input_outputs.ContinuousBatchingIOs.prepare_batch_tensors", prepared)
    patch.setattr(f"{PACKAGE}.scheduler.Scheduler.add_waiting_request", waits)
    patch.setattr(Requests, "draw", drawn)


def replay(done):
    """The rows whose token is not the one that ``sample`` gives for the row's request alone.

    The token that a request keeps for a place is the last one that was drawn for it.
    """
    wrong, kept = [], {}
    for name, place, logits, token in done.rows:
        output = done.outputs[name]
        prompt = output.prompt_ids
        position = place + 1 - len(prompt)
        before = output.generated_tokens[:position]
        kept[name, position] = token
        params, history = done.params[name], None
        if params.needs_history:
            long = len(prompt) + len(before) + 1
            history = TokenHistory.from_ids(
                [prompt],
                [before],
                vocab_size=V,
                max_length=long if params.has_window else None,
                penalty_last_n=params.penalty_last_n if params.has_window else None,
            )
        drawn = sample(logits[None], params, history=history, positions=[position], check=False)
        if token != max(0, int(drawn.tokens)):
            wrong.append((name, position))
    for name, output in done.outputs.items():
        for position, token in enumerate(output.generated_tokens):
            if kept[name, position] != token:
                wrong.append((name, position))
    return wrong


MIXED = [(prompt, {"params": params}) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@needs_runner
def test_every_token_is_the_one_of_its_request_alone(model):
    done = run(model, MIXED)
    assert len(done.outputs) == len(MIXED) >= 16
    assert {len(output.generated_tokens) for output in done.outputs.values()} == {20}
    assert replay(done) == []
    assert not done.preempted


def asynchronous(patch):
    """Let asynchronous batching run on the CPU, where nothing is asynchronous but its order.

    A batch is then prepared before transformers' host records know the tokens of the one before,
    as on a GPU. Its streams and events wait for nothing.
    """

    class Stream:
        def record_event(self, event):
            pass

        def wait_event(self, event):
            pass

        def synchronize(self):
            pass

    class Event(Stream):
        def __init__(self, device, enable_timing=False):
            pass

    ios = f"{PACKAGE}.input_outputs"
    patch.setattr(f"{ios}.ContinuousBatchingAsyncIOs._supported_device_types", ("cpu",))
    patch.setattr(torch, "Event", Event)
    patch.setattr(f"{ios}.create_device_stream", lambda device: Stream())


def without_pinned_memory(patch):
    """Let transformers move requests to the host's memory where there is no accelerator."""
    empty = torch.empty
    patch.setattr(torch, "empty", lambda *size, pin_memory=False, **kw: empty(*size, **kw))


#: In older releases asynchronous batches and graphs call CUDA's own functions.
needs_other_devices = pytest.mark.skipif(
    HAS_RUNNER and not hasattr(find(f"{PACKAGE}.input_outputs"), "create_device_stream"),
    reason="asynchronous batches and graphs of this transformers need CUDA",
)
ASYNC = pytest.mark.parametrize(
    "is_async",
    [
        pytest.param(False, id="sync"),
        pytest.param(True, id="async", marks=needs_other_devices),
    ],
)


def run_either(is_async, model, requests, generation=None, *, change=None, cb=None, **options):
    """``run`` with asynchronous batching or without it."""

    def prepare(patch):
        if is_async:
            asynchronous(patch)
        if change is not None:
            change(patch)

    config = cb_config(use_async_batching=is_async, **(cb or {}))
    return run(model, requests, config, generation, change=prepare, **options)


@needs_runner
@ASYNC
@pytest.mark.parametrize("offload", [0.0, 0.001], ids=["reset", "moved"])
def test_requests_that_lose_their_memory_go_on_where_they_stopped(model, is_async, offload):
    cb = {"num_blocks": 12, "cpu_offload_space": offload, "max_batch_tokens": 48, "seed": 1}
    done = run_either(is_async, model, MIXED, cb=cb, change=without_pinned_memory)
    assert done.preempted["moved" if offload else "reset"] > 4
    assert replay(done) == []
    assert done.all_tokens() == run(model, MIXED, cb_config(seed=1)).all_tokens()


GRAPHS = {"use_cuda_graph": True, "q_padding_interval_size": 16, "kv_padding_interval_size": 512}


def as_graphs(patch, replays):
    """Let transformers capture and replay on the CPU.

    A graph is then the call that was captured with the tensors that it had: it sees what is
    written to them later, and nothing else of the batches that come later.
    """

    class Graph:
        def __init__(self, runner, forward, args):
            self.captured = runner, forward, args, runner._numbers

        def replay(self):
            runner, forward, args, numbers = self.captured
            runner._numbers = numbers
            forward(*args)
            replays.append(len(numbers[0]))

        def reset(self):
            pass

    def capture(self, forward, stream, *args):
        forward(*args)
        self.inputs_and_outputs.set_graph(Graph(self, forward, args))

    has_graphs = f"{PACKAGE}.initialization.get_accelerator_graph_name"
    patch.setattr(has_graphs, lambda: "CUDAGraph")
    patch.setattr(f"{PACKAGE}.model_runner.get_memory_pools", lambda: (None, None))
    patch.setattr(f"{PACKAGE}.model_runner.ModelRunner._capture_graph", capture)


@needs_runner
@needs_other_devices
@ASYNC
def test_a_graph_sees_the_requests_that_come_later(model, is_async):
    replays = []

    def change(patch):
        as_graphs(patch, replays)

    done = run_either(is_async, model, MIXED, cb=GRAPHS, change=change)
    assert replay(done) == []
    assert len(replays) > 10
    assert any(rows > requests for rows, requests in done.batches)


@needs_runner
def test_greedy_requests_get_the_tokens_of_transformers_own_sampler(model):
    greedy = [(prompt, {"params": SamplingParams(temperature=0)}) for prompt in PROMPTS]
    theirs = run_theirs(
        model, [(prompt, {}) for prompt in PROMPTS], generation={"do_sample": False}
    )
    assert run(model, greedy).all_tokens() == theirs.all_tokens()
    by_config = run(model, [(prompt, {}) for prompt in PROMPTS], generation={"do_sample": False})
    assert by_config.all_tokens() == theirs.all_tokens()


@needs_runner
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 13])
def test_no_batch_changes_a_token(model, most):
    """In batches of every size, whoever else is in them, with prompts in chunks or whole."""
    seeds = [one for one in MIXED if one[1]["params"].seed is not None]
    greedy = [one for one in MIXED if not one[1]["params"].temperature]
    requests = seeds + greedy
    done = run(model, requests, cb_config(max_requests_per_batch=most, max_batch_tokens=16))
    assert max(rows for rows, _ in done.batches) <= most
    assert replay(done) == []
    together = run(model, requests)
    assert done.all_tokens() == together.all_tokens()


@needs_runner
def test_a_request_alone_gets_its_tokens(model):
    together = run(model, MIXED)
    for index in (1, 5, 9, 13):
        assert run(model, [MIXED[index]]).tokens("req_0") == together.tokens(f"req_{index}")


@needs_runner
def test_requests_that_come_while_others_run(model):
    done = run(model, MIXED, together=False)
    assert replay(done) == []


@needs_runner
@needs_other_devices
def test_asynchronous_batches_change_no_token(model):
    """A request that was added without a seed has one from then on."""
    config = {"seed": 5}
    results = [run_either(is_async, model, MIXED, cb=config) for is_async in (False, True)]
    assert results[0].all_tokens() == results[1].all_tokens()
    # each has drawn one token too many, before transformers knew that it had ended
    assert len(results[1].rows) > len(results[0].rows) == 20 * len(MIXED)


@needs_runner
def test_a_slot_of_a_request_that_was_cancelled_is_used_again(model, monkeypatch):
    """transformers tells nobody: the slot is taken when there is no other.

    The manager is started when transformers' own one has been put back.
    """
    done = Run()
    with fused_continuous_batching():
        log_draws(monkeypatch, done, None)
        config = transformers.GenerationConfig(**NEUTRAL)
        manager = model.init_continuous_batching(config, cb_config(max_requests_per_batch=2))
    endless = manager.add_request(PROMPTS[9], max_new_tokens=1500, streaming=True, params=PARAMS[9])
    manager.start()
    assert manager.get_result(timeout=60).request_id == endless
    manager.cancel_request(endless)
    for index in (15, 12, 10):
        manager.add_request(PROMPTS[index], params=PARAMS[index])
    while len(done.outputs) < 3:
        output = manager.get_result(timeout=60)
        if output.request_id != endless:
            done.outputs[output.request_id] = output
    manager.stop()
    done.rows = [row for row in done.rows if row[0] != endless]
    assert replay(done) == []


# ---- several sequences of a prompt ----


@needs_runner
@ASYNC
@pytest.mark.parametrize("blocks", [128, 10], ids=["forked", "some as new requests"])
def test_sequences_of_a_prompt_have_seeds_of_their_own(model, is_async, blocks):
    of_each = [PARAMS[5], PARAMS[15], SamplingParams(temperature=0), PARAMS[3]]
    requests = [(PROMPTS[i], {"params": params}) for i, params in enumerate(of_each, 1)]
    several = {"num_return_sequences": 4}
    cb = {"num_blocks": blocks, "use_cuda_graph": is_async}  # without padding a batch may be empty
    change = (lambda patch: as_graphs(patch, [])) if is_async else None
    done = run_either(is_async, model, requests, several, cb=cb, change=change)
    assert len(done.outputs) == 16
    assert replay(done) == []
    apart = [
        (prompt, {"params": seeded(options["params"], index)})
        for prompt, options in requests
        for index in range(4)
    ]
    tokens = run(model, apart).all_tokens()
    for request in range(4):
        names = [f"req_{request}", *(f"req_{request}__child#{i}" for i in range(3))]
        expected = [tokens[f"req_{4 * request + index}"] for index in range(4)]
        assert [done.tokens(name) for name in names] == expected


@needs_runner
@needs_other_devices
def test_an_empty_batch_ends_transformers_own_manager(model, monkeypatch):
    """Why the asynchronous cases above have padding."""
    asynchronous(monkeypatch)
    with pytest.raises(LoopHasEndedError, match="cannot reshape tensor of 0 elements"):
        run_theirs(
            model,
            [(PROMPTS[4], {})],
            cb_config(use_async_batching=True),
            {"num_return_sequences": 2},
        )


@needs_runner
def test_a_hash_in_the_name_of_a_request_is_no_sequence(model):
    names = ["a#1", "a__child#0", "a"]
    requests = [(PROMPTS[3], {"params": PARAMS[3], "request_id": name}) for name in names]
    done = run(model, requests)
    assert done.tokens("a#1") == done.tokens("a__child#0") == done.tokens("a")


@needs_runner
def test_a_slot_is_taken_from_a_request_that_waits(model):
    """More requests than slots are active: children that were forked wait for room in a batch."""
    requests = [(PROMPTS[i], {"params": PARAMS[i]}) for i in (9, 15, 12)]
    cb = {"max_requests_per_batch": 3, "max_batch_tokens": 16}
    for scheduler in ("fifo", "prefill_first"):
        config = cb_config(scheduler_type=scheduler, **cb)
        done = run(model, requests, config, {"num_return_sequences": 3})
        assert replay(done) == []


class NothingOfTheHost(TorchDispatchMode):
    """Raise where a tensor is made of the host's data, which a graph would copy in each replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "lift_fresh":
            raise AssertionError("data of the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("penalties", [False, True])
def test_a_draw_reads_nothing_of_the_host_and_waits_for_nothing(monkeypatch, logprobs, penalties):
    """What a CUDA graph must not capture. The look at bad rows is for the CPU alone."""
    monkeypatch.setattr(Warnings, "token_for_each", lambda self, tokens, slots: tokens.clamp(min=0))
    requests = Requests(V, "cpu", capacity=4, penalties=penalties)
    numbers = torch.tensor([[0, 1, -1], [3, 4, 0], [0, -1, -1]], dtype=torch.int32)
    for slot in (0, 1):
        requests._table.set(slot, PARAMS[15] if penalties else PARAMS[8])
    logits = torch.randn(3, V)
    with nothing_waits(), NothingOfTheHost():
        tokens, of_tokens = requests.draw(logits, numbers, logprobs=logprobs)
        with pytest.raises(AssertionError, match="data of the host"):
            torch.tensor([1])
    assert tokens[2] == 0
    assert (of_tokens is not None) is logprobs


@needs_runner
@pytest.mark.gpu
def test_graphs_and_asynchronous_batches_of_a_gpu_change_no_token(tiny_llama):
    model, config = tiny_llama(V).cuda(), {"seed": 1, "return_logprobs": True}
    eager = cb_config(use_cuda_graph=False, use_async_batching=False, **config)
    done = run(model, MIXED, eager)
    assert replay(done) == []
    for is_async in (False, True):
        captured = cb_config(use_async_batching=is_async, **config, **GRAPHS)
        tokens = run(model, MIXED, captured, is_logged=False).all_tokens()
        assert tokens == done.all_tokens()


# ---- bugs that are planted ----


def shifted_positions(patch):
    follow = Requests.follow

    def shifted(self, states):
        return [(slot, place + 1, to) for slot, place, to in follow(self, states)]

    patch.setattr(Requests, "follow", shifted)


def swapped_slots(patch):
    follow = Requests.follow

    def swapped(self, states):
        numbers = follow(self, states)
        slots = [slot for slot, _, _ in numbers]
        return [(s, p, to) for s, (_, p, to) in zip(slots[::-1], numbers, strict=True)]

    patch.setattr(Requests, "follow", swapped)


def history_of_another_slot(patch):
    follow = Requests.follow

    def swapped(self, states):
        numbers = follow(self, states)
        to = [slot for _, _, slot in numbers]
        return [(s, p, t) for (s, p, _), t in zip(numbers, to[::-1], strict=True)]

    patch.setattr(Requests, "follow", swapped)


def recorded_padding(patch):
    """Rows of padding keep the numbers of the last batch that was so large."""
    prepare = continuous_batching._prepared

    def stale(numbers, storage):
        storage[:, : len(numbers)] = prepare(numbers, storage)[:, : len(numbers)]
        return storage

    patch.setattr(continuous_batching, "_prepared", stale)


def stale_parameters(patch):
    """A slot that is used again keeps the parameters that it had."""
    write = RequestTable.set

    def written_once(self, slot, params, **options):
        write(self, slot, vars(self).setdefault("first", {}).setdefault(slot, params), **options)

    patch.setattr(RequestTable, "set", written_once)


def kept_histories(patch):
    """The history of a request whose drawn token was thrown away keeps that token."""
    fill = Requests._fill

    def filled_once(self, request, length):
        if request.recorded < 0:
            fill(self, request, length)

    patch.setattr(Requests, "_fill", filled_once)


PRESSED = {"num_blocks": 12, "max_batch_tokens": 48, "cpu_offload_space": 0.001}


@needs_runner
@pytest.mark.parametrize(
    ("bug", "is_async", "cb"),
    [
        (shifted_positions, False, {}),
        (swapped_slots, False, {}),
        (history_of_another_slot, False, {}),
        pytest.param(recorded_padding, False, GRAPHS, marks=needs_other_devices),
        (stale_parameters, False, {"max_requests_per_batch": 3}),
        pytest.param(kept_histories, True, PRESSED, marks=needs_other_devices),
    ],
)
def test_a_bug_is_seen(model, bug, is_async, cb):
    """A token differs, or the kernel refuses what it is called with, which ends the loop."""

    def is_wrong(bug):
        def change(patch):
            without_pinned_memory(patch)
            if cb is GRAPHS:
                as_graphs(patch, [])
            bug(patch)

        try:
            return replay(run_either(is_async, model, MIXED, cb=cb, change=change)) != []
        except LoopHasEndedError:
            return True

    assert is_wrong(bug)
    assert not is_wrong(lambda patch: None)


# ---- what transformers' own sampler does not keep ----


@needs_runner
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
def test_transformers_drops_the_repetition_penalty(model):
    """Its greedy tokens are the same with the penalty and without; ``generate``'s are not."""
    penalty = {"do_sample": False, "repetition_penalty": 1.6}
    requests = [(PROMPTS[4], {}), (PROMPTS[9], {})]
    plain = run_theirs(model, requests, generation={"do_sample": False}).all_tokens()
    assert run_theirs(model, requests, generation=penalty).all_tokens() == plain
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=20, pad_token_id=0, eos_token_id=None, **penalty
        )[0, len(prompt) :].tolist()
        for prompt, _ in requests
    ]
    assert [*run(model, requests, generation=penalty).all_tokens().values()] == expected
    assert expected != [*plain.values()]


@needs_runner
def test_transformers_has_one_sampling_for_all(model):
    """It refuses the parameters of a request, or, where they are turned on, a seed."""
    for options, per_request in (({"temperature": 0.1}, False), ({"seed": 1}, True)):
        config = cb_config(per_request_processors=per_request)
        requests = [(PROMPTS[4], options), (PROMPTS[9], {})]
        theirs = run_theirs(model, requests, config, {"temperature": 0.8})
        assert "Unknown logit_processor_kwargs" in theirs.outputs["req_0"].error
        ours = run(model, requests, config, {"temperature": 0.8})
        assert replay(ours) == []
        name, value = options.popitem()
        assert getattr(ours.params["req_0"], name) == value
        assert ours.params["req_1"].temperature == 0.8


@needs_runner
def test_a_batch_changes_what_transformers_draws(model):
    """With one seed for the manager, a request's tokens depend on the other requests."""
    config = cb_config(seed=1)
    requests = [(PROMPTS[4], {}), (PROMPTS[9], {}), (PROMPTS[14], {})]
    alone = run_theirs(model, requests[:1], config).tokens("req_0")
    assert run_theirs(model, requests[:1], config).tokens("req_0") == alone
    assert run_theirs(model, requests, config).tokens("req_0") != alone
    alone = run(model, requests[:1], config).tokens("req_0")
    assert run(model, requests, config).tokens("req_0") == alone


# ---- logprobs, logits without a token, other processors ----


@needs_runner
@pytest.mark.parametrize("do_sample", [True, False])
def test_logprobs_are_those_of_transformers(model, do_sample):
    """Of the distribution that the token was drawn from; where it is greedy, of the logits."""
    generation = {"do_sample": do_sample, "temperature": 0.6, "top_k": 7}
    requests = [(prompt, {}) for prompt in PROMPTS]
    config = cb_config(return_logprobs=True)
    ours = run(model, requests, config, generation)
    shown = {(name, place): row for name, place, row, _ in ours.rows}
    for name, output in ours.outputs.items():
        assert len(output.logprobs) == len(output.generated_tokens) == 20
        for index, (token, logprob) in enumerate(
            zip(output.generated_tokens, output.logprobs, strict=True)
        ):
            row = shown[name, len(output.prompt_ids) + index - 1]
            if do_sample:
                row = row / 0.6
                row = row.masked_fill(row < row.topk(7).values[-1], -torch.inf)
            assert logprob == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-5)
    if not do_sample:
        theirs = run_theirs(model, requests, config, generation)
        for name, output in theirs.outputs.items():
            assert ours.tokens(name) == output.generated_tokens
            assert ours.outputs[name].logprobs == pytest.approx(output.logprobs, abs=1e-5)


@needs_runner
def test_logits_that_leave_no_token_give_token_0_and_a_warning(model, caplog):
    done = run(model, MIXED, poison=(3, 1))
    assert replay(done) == []
    name, _, _, token = next(row for row in done.rows if row[2].isnan().all())
    assert token == 0
    assert done.outputs[name].error is None
    said = [record for record in caplog.records if "left a request no token" in record.message]
    assert len(said) == 1


@needs_runner
def test_logits_that_leave_no_token_end_transformers_own_manager(model, monkeypatch):
    runner = find(f"{PACKAGE}.model_runner:ModelRunner")
    own = runner._sample
    monkeypatch.setattr(
        runner, "_sample", lambda self, scores, ids: own(self, scores * torch.nan, ids)
    )
    with pytest.raises(LoopHasEndedError, match="probability tensor contains"):
        run_theirs(model, [(PROMPTS[4], {})])


class Doubling(transformers.LogitsProcessor):
    """A processor of somebody else, which transformers keeps."""

    supports_continuous_batching = True

    def __call__(self, input_ids, scores):
        return scores * 2


@needs_runner
def test_processors_of_others_come_before_the_draw(model, monkeypatch):
    plain = run(model, MIXED)
    made = transformers.LogitsProcessorList([Doubling()])
    own = model._get_logits_processor
    monkeypatch.setattr(model, "_get_logits_processor", lambda config: own(config) + made)
    done = run(model, MIXED)
    assert replay(done) == []
    first = next(row for name, _, row, _ in done.rows if name == "req_4")
    before = next(row for name, _, row, _ in plain.rows if name == "req_4")
    assert torch.allclose(first, before * 2, atol=1e-4)


if HAS_RUNNER:
    WithNumbers = find(f"{PACKAGE}.cb_logits_processors:ContinuousBatchingLogitsProcessor")
else:
    WithNumbers = object


class Biased(WithNumbers):
    """A processor of somebody else, with a number for each request."""

    supported_kwargs: ClassVar = {"bias_of_7": int}
    ignored_kwargs = ()

    def __init__(self, processor):
        pass

    def fill_defaults(self, int32_tensor):
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token):
        asked = [one.state.logit_processor_kwargs for one in requests_with_new_token]
        return torch.tensor([one.get("bias_of_7", 0) for one in asked], dtype=torch.int32)

    def __call__(self, scores, tensor_arg):
        scores = scores.clone()
        scores[:, 7] += tensor_arg[: len(scores)]
        return scores


@needs_runner
def test_numbers_of_a_request_reach_the_processor_of_somebody_else(model, monkeypatch):
    """transformers makes it of another processor, if these are turned on."""
    own, made = model._get_logits_processor, transformers.LogitsProcessorList([Doubling()])
    monkeypatch.setattr(model, "_get_logits_processor", lambda config: own(config) + made)
    known = find(f"{PACKAGE}.cb_logits_processors:CLASSIC_TO_CB_PROCESSORS_MAP")
    monkeypatch.setitem(known, Doubling, Biased)
    requests = [(PROMPTS[4], {"bias_of_7": 1000, "temperature": 0.5}), (PROMPTS[9], {})]
    done = run(model, requests, cb_config(per_request_processors=True))
    assert done.tokens("req_0") == [7] * 20
    assert set(done.tokens("req_1")) != {7}
    assert replay(done) == []


# ---- parameters of a request ----


@needs_runner
def test_a_list_of_parameters_for_generate_batch(model):
    """One for each prompt, in their order, although transformers sorts the prompts."""
    with fused_continuous_batching(PARAMS):
        outputs = model.generate_batch(
            PROMPTS,
            generation_config=transformers.GenerationConfig(**NEUTRAL),
            continuous_batching_config=cb_config(),
        )
    assert [output.prompt_ids for output in outputs.values()] == PROMPTS
    found = [output.generated_tokens for output in outputs.values()]
    expected = run(model, MIXED).all_tokens()
    for index, params in enumerate(PARAMS):
        if params.seed is not None or not params.temperature:
            assert found[index] == expected[f"req_{index}"]


@needs_runner
def test_the_parameters_of_the_config(model):
    """All that ``params`` replace; a config with ``do_sample`` off is greedy."""
    fields = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    fields |= {"repetition_penalty": 1.3}
    done = run(model, [(PROMPTS[4], {"seed": 3})], generation=fields)
    assert done.params["req_0"] == SamplingParams(**fields, seed=3)
    fields["do_sample"] = False
    done = run(model, [(PROMPTS[4], {"seed": 3})], generation=fields)
    assert done.params["req_0"] == SamplingParams(temperature=0, repetition_penalty=1.3, seed=3)
    assert replay(done) == []


@needs_runner
def test_every_way_to_give_parameters(model):
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, max_new_tokens=3, eos_token_id=5
    )
    ways = [
        {"params": SamplingParams(temperature=0.7, top_k=9, seed=1)},
        {"temperature": 0.7, "top_k": 9, "seed": 1},
        {"generation_config": config, "seed": 1},
        {"generation_config": config, "max_new_tokens": 7, "eos_token_id": -1, "seed": 1},
    ]
    done = run(model, [(PROMPTS[4], way) for way in ways], generation={"top_k": None})
    assert set(done.params.values()) == {ways[0]["params"]}
    first = done.tokens("req_0")
    assert done.tokens("req_1") == first
    assert done.tokens("req_2") == first[:3]
    assert done.tokens("req_3") == first[:7]


@needs_runner
def test_parameters_that_all_requests_have_by_default(model):
    params = SamplingParams(top_k=4, seed=9)
    done = run(model, [(PROMPTS[4], {}), (PROMPTS[5], {"top_p": 0.5})], params=params)
    assert done.params == {"req_0": params, "req_1": SamplingParams(top_k=4, top_p=0.5, seed=9)}


@needs_runner
def test_requests_without_a_seed(model):
    """They get one each, from the config's seed or from torch's default generator."""
    requests = [(PROMPTS[4], {})] * 2

    def seeds(seed):
        params = run(model, requests, cb_config(seed=seed)).params
        return [params[f"req_{index}"].seed for index in range(2)]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 4
    torch.manual_seed(0)
    first = seeds(None)
    assert len({*first, *seeds(None)}) == 4
    torch.manual_seed(0)
    assert seeds(None) == first


@needs_runner
@ASYNC
def test_a_window_of_penalties(model, is_async):
    """An asynchronous batch draws one token more than there is room for, and loses it."""
    params = [replace(params, penalty_last_n=6) for params in PARAMS if params.needs_history]
    requests = [(PROMPTS[i], {"params": one}) for i, one in enumerate(params)]
    longest = max(len(prompt) for prompt, _ in requests) + 20
    assert replay(run_either(is_async, model, requests, max_length=longest)) == []


@needs_runner
def test_without_histories(model):
    requests = [one for one in MIXED if not one[1]["params"].needs_history]
    done = run(model, requests, penalties=False)
    assert replay(done) == []
    names = range(len(requests))
    with_them = run(model, requests)
    assert [done.tokens(f"req_{i}") for i in names if requests[i][1]["params"].seed] == [
        with_them.tokens(f"req_{i}") for i in names if requests[i][1]["params"].seed
    ]


@needs_runner
def test_a_manager_that_is_kept_for_the_next_session(model):
    """Its table, its slots and its warm-up serve both."""
    options = {
        "generation_config": transformers.GenerationConfig(**NEUTRAL),
        "continuous_batching_config": cb_config(max_requests_per_batch=4),
        "persistent_manager": True,
    }
    with fused_continuous_batching(SamplingParams(repetition_penalty=1.4, seed=7)):
        try:
            first = model.generate_batch(PROMPTS[:6], **options)
            second = model.generate_batch(PROMPTS[3:9], **options)
        finally:
            model.destroy_cached_continuous_batching_manager()
    for one, other in zip([*first.values()][3:], [*second.values()][:3], strict=True):
        assert one.generated_tokens == other.generated_tokens


@needs_runner
def test_the_manager_is_put_back(model):
    api = find(f"{PACKAGE}.continuous_api")
    before = api.ContinuousBatchingManager
    with fused_continuous_batching() as outer:
        replaced = api.ContinuousBatchingManager
        assert issubclass(replaced, before)
        with fused_continuous_batching(SamplingParams(seed=1)):
            inner = api.ContinuousBatchingManager
            assert issubclass(inner, before)
            assert not issubclass(inner, replaced)
            done = Run()
            config = transformers.GenerationConfig(**NEUTRAL)
            add_all(model.init_continuous_batching(config, cb_config()), MIXED[:1], done, True)
            assert len(done.tokens("req_0")) == 20
        assert api.ContinuousBatchingManager is replaced
        outer.close()
        assert api.ContinuousBatchingManager is before
    assert api.ContinuousBatchingManager is before


@needs_runner
def test_it_says_what_draws(model, caplog):
    with caplog.at_level("INFO", logger="transformers.llm_sampling"):
        run(model, MIXED[:1])
    assert "llm_sampling draws, by its backend 'cpu'" in [r.message for r in caplog.records]


@needs_runner
def test_a_named_backend_draws(model, caplog):
    with caplog.at_level("INFO", logger="transformers.llm_sampling"):
        done = run(model, MIXED, backend="torch")
    assert "llm_sampling draws, by its backend 'torch'" in [r.message for r in caplog.records]
    assert replay(done) == []


@needs_runner
def test_under_inference_mode(model):
    with torch.inference_mode():
        done = run(model, MIXED)
    assert replay(done) == []


@needs_runner
def test_a_compiled_model(model):
    """transformers compiles the step as a whole, but for the draw."""
    compiled = transformers.CompileConfig(backend="eager", fullgraph=False, dynamic=True)
    done = run(model, MIXED, cb_config(varlen_compile_config=compiled))
    assert replay(done) == []
    assert any(rows > requests for rows, requests in done.batches)


# ---- what is refused ----


@needs_runner
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tempreature": 1.0}, "a request has no parameter tempreature; there are params, "),
        ({"temperature": -1.0}, "temperature must be"),
        ({"params": PARAMS[3], "top_k": 3}, "params must not be given beside top_k"),
        (
            {"params": PARAMS[3], "generation_config": transformers.GenerationConfig(), "seed": 1},
            "params must not be given beside generation_config, seed",
        ),
        ({"params": 3}, "params must be one SamplingParams, got 3"),
        ({"params": PARAMS[:1]}, "params must be one SamplingParams, got "),
        (
            {"generation_config": transformers.GenerationConfig(do_sample=True, typical_p=0.5)},
            "typical_p of the generation config cannot be honoured, got 0.5",
        ),
        (
            {"generation_config": transformers.GenerationConfig(suppress_tokens=[3])},
            "suppress_tokens of a request's generation_config must be that of the manager's",
        ),
        (
            {
                "generation_config": transformers.GenerationConfig(
                    do_sample=True, num_return_sequences=2
                )
            },
            "num_return_sequences of a request's generation_config must be that of the manager's",
        ),
        (
            {"generation_config": transformers.GenerationConfig(stop_strings=["a"])},
            "stop_strings of the generation config cannot be honoured",
        ),
        ({"penalty_last_n": 3, "repetition_penalty": 2.0}, "params must have no penalty_last_n"),
    ],
)
def test_a_request_that_cannot_be_honoured(model, options, message):
    with fused_continuous_batching():
        config = transformers.GenerationConfig(**NEUTRAL)
        manager = model.init_continuous_batching(config, cb_config())
    with pytest.raises(ValueError, match=message):
        manager.add_request(PROMPTS[3], **options)
    assert manager.input_queue.empty()


@needs_runner
def test_arguments_of_the_switch_count_for_requests(model):
    config = transformers.GenerationConfig(**NEUTRAL)
    with fused_continuous_batching(penalties=False):
        manager = model.init_continuous_batching(config, cb_config())
    with pytest.raises(ValueError, match=r"params must have no penalty where .* penalties=False"):
        manager.add_request(PROMPTS[3], repetition_penalty=1.2)
    with fused_continuous_batching(max_length=30):
        manager = model.init_continuous_batching(config, cb_config())
    with pytest.raises(ValueError, match="at most max_length = 30 ids together, got 16 and 20"):
        manager.add_request(PROMPTS[3])
    with fused_continuous_batching(PARAMS[:2]):
        manager = model.init_continuous_batching(config, cb_config())
    with pytest.raises(ValueError, match="params must have one for each of 3 prompts, got 2"):
        manager.add_requests(PROMPTS[:3])
    with pytest.raises(ValueError, match="params must be given with a request"):
        manager.add_request(PROMPTS[3])


@needs_runner
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 2}, "num_beams of the generation config cannot be honoured, got 2"),
        ({"typical_p": 0.5}, "typical_p of the generation config cannot be honoured"),
        ({"temperature": -2.0}, "temperature must be"),
    ],
)
def test_a_config_that_cannot_be_honoured(model, fields, message):
    config = transformers.GenerationConfig(**NEUTRAL | {"do_sample": True})
    for name, value in fields.items():
        setattr(config, name, value)
    with fused_continuous_batching(), pytest.raises(ValueError, match=message):
        model.init_continuous_batching(config, cb_config())


@pytest.mark.parametrize(
    ("device_type", "backend"), [("xpu", "triton"), ("xpu", "torch"), ("cuda", "torch")]
)
def test_graphs_that_would_keep_the_first_requests_are_refused(device_type, backend):
    for good in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda", "triton")):
        continuous_batching._refuse_graphs(*good)
    with pytest.raises(ValueError, match=f"got the backend '{backend}' on '{device_type}'"):
        continuous_batching._refuse_graphs(device_type, backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": 3}, "params must be a SamplingParams or a sequence of them, got 3"),
        ({"backend": "gpu"}, "backend must be"),
        ({"penalties": 1}, "penalties must be True or False"),
        ({"max_length": 0}, "max_length must be"),
        ({"max_length": 9, "penalties": False}, "max_length must be None where penalties is False"),
    ],
)
def test_arguments_out_of_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        fused_continuous_batching(**options)


# ---- another transformers ----

RELIANCE = continuous_batching.RELIANCE


def test_a_transformers_without_a_model_runner_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.model_runner", None)
    with pytest.raises(RuntimeError, match="llm_sampling: transformers keeps its own sampler: "):
        fused_continuous_batching()


@needs_runner
def test_this_transformers_has_all_that_is_relied_on():
    assert RELIANCE.difference() is None


@needs_runner
@pytest.mark.parametrize("place", RELIANCE.places)
def test_a_place_that_is_missing_is_found(place, monkeypatch):
    module, _, names = place.partition(":")
    owner, _, name = names.rpartition(".")
    monkeypatch.delattr(find(f"{module}:{owner}"), name)
    difference = RELIANCE.difference()
    assert difference is not None
    assert name in difference or name == "__init__"  # every class has one
    with pytest.raises(RuntimeError) as caught:
        fused_continuous_batching()
    assert str(caught.value) == f"llm_sampling: transformers keeps its own sampler: {difference}"


@needs_runner
@pytest.mark.parametrize("place", RELIANCE.places)
def test_a_place_with_other_names_is_found(place, monkeypatch):
    """A function or record that has no parameter and looks up nothing."""
    module, _, names = place.partition(":")
    owner, _, name = names.rpartition(".")
    monkeypatch.setattr(find(f"{module}:{owner}"), name, lambda: None)
    assert place.rpartition(":")[2] in (RELIANCE.difference() or "")


# ---- any manager ----


@needs_runner
@needs_other_devices
@pytest.mark.parametrize("case", range(24))
def test_any_manager(model, case):
    """Random sizes of everything, several sequences, requests in the way of each other."""
    chance = random.Random(case)
    is_async = chance.random() < 0.5
    several = chance.choice([1, 1, 2, 3])
    has_graphs = chance.random() < 0.5 or (is_async and several > 1)
    cb = {
        "num_blocks": chance.randint(9, 30),
        "max_batch_tokens": chance.choice([16, 24, 48, 64]),
        "max_requests_per_batch": chance.choice([2, 3, 7, 16]),
        "scheduler_type": chance.choice(["fifo", "prefill_first"]),
        "cpu_offload_space": chance.choice([0.0, 0.001]),
        "allow_block_sharing": chance.random() < 0.5,
        "return_logprobs": chance.random() < 0.3,
        "seed": case,
    } | (GRAPHS if has_graphs else {})
    requests = [
        (chance.choice(PROMPTS[1:]), {"params": chance.choice(PARAMS)})
        for _ in range(chance.randint(3, 20))
    ]
    for index, (prompt, options) in enumerate(requests):
        if chance.random() < 0.3:
            requests[index] = prompt, options | {"max_new_tokens": chance.randint(1, 30)}

    def change(patch):
        without_pinned_memory(patch)
        if has_graphs:
            as_graphs(patch, [])

    done = run_either(
        is_async, model, requests, {"num_return_sequences": several}, cb=cb, change=change
    )
    assert len(done.outputs) == len(requests) * several
    assert replay(done) == []
