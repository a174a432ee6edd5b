"""The plug-in inside vLLM's own engine, on the CPU: `pytest -m vllm`, where vLLM is installed.

Each engine runs in a process of its own (drive_vllm.py beside this), on a small random model and
each of vLLM's model runners. Every row of every step is replayed: its token must be that of
``sample`` for the logits that the sampler got, with the request's parameters, prompt, output and
seed, and without other requests.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from llm_sampling import TokenHistory, filter_logits, sample
from llm_sampling.integrations.vllm import SWITCH
from llm_sampling.integrations.vllm.both import not_greedy, params_of

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent
PLUGIN = "llm_sampling.integrations.vllm"


@pytest.fixture(scope="module", params=[1, 2], ids=["V1", "V2"])
def runner(request):
    """The model runner: V1, or V2, vLLM's default where Triton is."""
    return request.param


@pytest.fixture(scope="module")
def model(request):
    """A folder with a small random model."""
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("needs vLLM, docs/engines/vllm.md says how to install it")
    return request.getfixturevalue("saved_llama")


@pytest.fixture(scope="module")
def drive_runner(model, tmp_path_factory):
    """A function that runs an engine with a runner and returns its results and its log."""

    def run(runner, calls, *, on=True, drafts=None, poison=None, **engine):
        folder = tmp_path_factory.mktemp("run")
        defaults = {"max_model_len": 512, "enforce_eager": True, "dtype": "float32", "seed": 0}
        options = {"model": str(model), "max_num_seqs": 32} | defaults | engine
        job = {"engine": options, "runner": runner, "calls": calls, "poison": poison}
        job["drafts"] = drafts
        torch.save(job, folder / "job")
        done = subprocess.run(
            [sys.executable, str(HERE / "drive_vllm.py"), folder / "job", folder / "result"],
            env=os.environ | {SWITCH: "1" if on else "0", "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        result = torch.load(folder / "result", weights_only=False)
        result["log"] = done.stdout + done.stderr
        return result

    return run


@pytest.fixture(scope="module")
def drive(drive_runner, runner):
    """``drive_runner`` with each of the runners."""
    return functools.partial(drive_runner, runner)


def prompt_of(number, length):
    return [(number * 37 + i * 11) % 250 for i in range(length)]


GREEDY = [
    {},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.8, "presence_penalty": 0.5},
    {"bad_words": ["a", "bc", "e"]},
    {"allowed_token_ids": list(range(60, 90))},
    {"min_tokens": 20, "stop_token_ids": list(range(0, 250, 2))},
    {"logit_bias": {65: 5.0, 66: -100.0, 67: 4.5}},
    {"logprobs": 3},
    {"min_tokens": 5, "stop_token_ids": list(range(120)), "presence_penalty": 1.0},
]
DRAWN = [
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_p": 0.9},
    {"seed": 3, "top_k": 9, "min_p": 0.05},
    {"seed": 4, "repetition_penalty": 1.3, "temperature": 1.2},
    {"seed": 2**63 - 1, "frequency_penalty": 0.9, "top_k": 40, "top_p": 0.8},
    {"seed": 0, "presence_penalty": -0.7, "top_p": 0.95},
    {"seed": -5, "top_p": 0.7, "repetition_penalty": 1.1, "frequency_penalty": -0.3},
    {"seed": 6, "logprobs": 2, "top_k": 5},
    {"top_p": 0.9},
]


def requests_of(kinds, *, tokens, lengths=(3, 17, 40, 9), **options):
    return [
        [
            prompt_of(number, lengths[number % len(lengths)]),
            {"max_tokens": tokens, "ignore_eos": True, "detokenize": True} | options | kind,
        ]
        for number, kind in enumerate(kinds)
    ]


def greedy(tokens=40):
    return requests_of(GREEDY, tokens=tokens, temperature=0.0)


def drawn(tokens=40):
    return requests_of(DRAWN, tokens=tokens)


def replay(result, calls, *, changed=()):
    """Compare each row of each step with ``sample``; return how many rows were compared.

    Args:
        result: of ``drive``.
        calls: what it was given; requests have the engine's names "0", "1", ... over all calls.
        changed: parameters by which vLLM changes logits; requests with one are not replayed.
    """
    from vllm import SamplingParams

    known = [params for call in calls for _, params in call]
    tokens = [tokens for call in result["calls"] for tokens in call["tokens"]]
    rows = 0
    for call in result["calls"]:
        for step in call["steps"]:
            for row, name in enumerate(step["requests"]):
                asked = known[int(name.partition("-")[0])]
                if set(asked) & set(changed):
                    continue
                given = {name: value for name, value in asked.items() if name != "choice"}
                params = params_of(SamplingParams(**given))
                params = replace(params, **given.get("extra_args", {}))
                if row in step["seeds"]:
                    assert params.seed % 2**64 == step["seeds"][row] % 2**64
                elif step["ours"]:  # drawn when the request came
                    params = replace(params, seed=step["ours"][0][row])
                logits = step["logits"][row : row + 1]
                output = step["outputs"][row]
                if -1 in output:  # the host did not know them yet
                    output = tokens[int(name.partition("-")[0])][: len(output)]
                prompt = step["prompts"][row]
                history = TokenHistory.from_ids(
                    [prompt],
                    [output],
                    logits.shape[1],
                    max_length=len(prompt) + len(output) + 1,
                    penalty_last_n=params.penalty_last_n,
                )
                want = sample(logits, params, history=history, positions=[len(output)]).tokens
                assert step["tokens"][row] == int(want), (name, asked, len(output))
                rows += 1
    return rows


CHANGED = ("bad_words", "allowed_token_ids", "min_tokens", "logit_bias")


@pytest.fixture(scope="module")
def own(drive):
    """The results of vLLM's own sampler for the greedy requests, and for all of them."""
    return drive([greedy(), greedy() + drawn()], on=False)


def ending():
    """Requests of which each gets one token more than the one before: batches of every size."""
    known = [request for request in greedy() + drawn() if "stop_token_ids" not in request[1]]
    return [
        [prompt, params | {"max_tokens": 3 + number}]
        for number, (prompt, params) in enumerate(known)
    ]


def arrangements():
    """All together, the greedy ones, all in reverse order, each drawn one alone, and `ending`."""
    together = greedy() + drawn()
    return [together, greedy(), together[::-1], *([request] for request in drawn()), ending()]


@pytest.fixture(scope="module")
def fused(drive):
    """The results of the plug-in for all arrangements."""
    return drive(arrangements())


def test_the_entry_point_is_installed():
    (found,) = entry_points(group="vllm.general_plugins", name="llm_sampling")
    assert found.value == f"{PLUGIN}:register"


def test_the_plug_in_is_what_makes_the_difference(own, fused, runner):
    theirs = {1: "vllm.v1.sample.sampler", 2: "vllm.v1.worker.gpu.sample.sampler"}
    assert own["sampler"] == theirs[runner]
    assert fused["sampler"] == f"{PLUGIN}.v{runner}"
    assert "llm_sampling draws, by its backend 'cpu'" in fused["log"]
    assert "keeps its own sampler" not in fused["log"]


def test_every_row_of_every_step_is_drawn_as_if_alone(fused):
    rows = replay(fused, arrangements(), changed=CHANGED)
    assert rows > 1000
    for call in fused["calls"]:
        for step in call["steps"]:  # V2 tells the place of each row in its text
            lengths = [len(output) for output in step["outputs"]]
            assert step.get("positions", lengths) == lengths
    sizes = {len(step["requests"]) for call in fused["calls"] for step in call["steps"]}
    assert sizes >= {*range(1, len(ending()) + 1), len(GREEDY) + len(DRAWN)}


def test_vllm_s_own_draws_would_not_pass(own):
    with pytest.raises(AssertionError):
        replay(own, [greedy(), greedy() + drawn()], changed=CHANGED)


def test_greedy_texts_are_vllm_s_own(own, fused):
    """With every parameter that changes logits before the draw."""
    assert fused["calls"][1]["tokens"] == own["calls"][0]["tokens"]
    assert fused["calls"][1]["texts"] == own["calls"][0]["texts"]
    assert fused["calls"][0]["tokens"][: len(GREEDY)] == own["calls"][1]["tokens"][: len(GREEDY)]


def test_what_changes_logits_changed_them(own):
    """Otherwise the test above would compare nothing."""
    tokens = own["calls"][0]["tokens"]
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert set(tokens[4]) <= set(range(60, 90))
    assert len(tokens[5]) >= 20
    assert 20 > len(tokens[8]) >= 5


def test_seeded_requests_are_the_same_in_every_batch(fused):
    calls = [call["tokens"] for call in fused["calls"]]
    count = len(DRAWN)
    together, reverse = calls[0][-count:], calls[2][:count][::-1]
    alone = [tokens for (tokens,) in calls[3 : 3 + count]]
    seeded = [i for i, kind in enumerate(DRAWN) if "seed" in kind]
    for i in seeded:
        assert together[i] == alone[i] == reverse[i]
    unseeded = len(DRAWN) - 1
    assert together[unseeded] != alone[unseeded], "a fresh seed in each call"


def test_raw_logprobs(own, fused):
    """Of a greedy request they are vLLM's; of a drawn one they are computed from its logits."""
    place = GREEDY.index({"logprobs": 3})
    ours, theirs = fused["calls"][1]["logprobs"][place], own["calls"][0]["logprobs"][place]
    same_logprobs(ours, theirs)
    for (token, *_), place in zip(ours, range(40), strict=True):
        assert token[0] == fused["calls"][1]["tokens"][GREEDY.index({"logprobs": 3})][place]
    call = fused["calls"][3 + 7]
    (logprobs,), (tokens,) = call["logprobs"], call["tokens"]
    for step, found, token in zip(call["steps"], logprobs, tokens, strict=True):
        raw = step["logits"][0].log_softmax(-1)
        shown = {i: (logprob, rank) for i, logprob, rank in found}
        assert {token, *raw.topk(2).indices.tolist()} == set(shown)
        for i, (logprob, rank) in shown.items():
            assert logprob == pytest.approx(raw[i].item(), abs=1e-5)
            assert rank == int((raw >= raw[i]).sum())


def same_logprobs(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert [(i, rank) for i, _, rank in one] == [(i, rank) for i, _, rank in other]
        assert [x for _, x, _ in one] == pytest.approx([x for _, x, _ in other], abs=1e-5)


# ---- asynchronous scheduling, vLLM's default on GPUs ----


def asynchronous_arrangements():
    """Bad words are looked for on the host: with them vLLM waits for the tokens of all requests."""
    together = greedy() + drawn()
    return [*arrangements(), [request for request in together if "bad_words" not in request[1]]]


@pytest.fixture(scope="module")
def asynchronous(drive):
    return drive(asynchronous_arrangements(), async_scheduling=True)


def test_asynchronous_scheduling_gives_the_same_tokens(fused, asynchronous):
    assert asynchronous["is_async"]
    assert not fused["is_async"]
    assert asynchronous["sampler"] == fused["sampler"]
    unseeded = [i for i, kind in enumerate(greedy() + drawn()) if "seed" not in kind[1]][-1]
    together = [call["calls"][0]["tokens"] for call in (fused, asynchronous)]
    for i, (one, other) in enumerate(zip(*together, strict=True)):
        assert one == other or i == unseeded
    assert asynchronous["calls"][1]["tokens"] == fused["calls"][1]["tokens"]


def test_every_asynchronous_row_is_drawn_as_if_alone(asynchronous, runner):
    outputs = [output for step in asynchronous["calls"][-1]["steps"] for output in step["outputs"]]
    if runner == 1:  # V2 keeps the tokens on the device
        assert sum(-1 in output for output in outputs) > 500
    assert replay(asynchronous, asynchronous_arrangements(), changed=CHANGED) > 1500


def test_penalties_wait_for_nothing(drive_runner):
    """V1's own sampler waits for the tokens of the step before as soon as one has a penalty."""
    kinds = [{}, {"repetition_penalty": 1.4}, {"frequency_penalty": 0.8, "presence_penalty": 0.5}]
    calls = [requests_of(kinds, tokens=20, temperature=0.0)]
    ours, theirs = (drive_runner(1, calls, on=on, async_scheduling=True) for on in (True, False))
    assert ours["calls"][0]["tokens"] == theirs["calls"][0]["tokens"]
    assert ours["waits"] == []
    assert len(theirs["waits"]) >= 19


# ---- rules of extra_args ----

RULED = [
    {"seed": 11, "extra_args": {"no_repeat_ngram_size": 1}},
    {"temperature": 0.0, "extra_args": {"dry_multiplier": 9.0, "dry_allowed_length": 1}},
    {
        "seed": 12,
        "frequency_penalty": -1.5,
        "extra_args": {"dry_multiplier": 5.0, "dry_allowed_length": 1, "dry_breakers": [[7]]},
    },
    {
        "seed": 13,
        "repetition_penalty": 1.9,
        "extra_args": {"penalty_last_n": 4, "repetition_penalty_scope": "output"},
    },
    {"seed": 14},
]


@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
def test_rules_of_extra_args_with_v1(drive_runner, is_async):
    calls = [requests_of(RULED, tokens=60)]
    result = drive_runner(1, calls, async_scheduling=is_async)
    assert replay(result, calls) == 60 * len(RULED)
    plain = [{name: x for name, x in kind.items() if name != "extra_args"} for kind in RULED]
    without = drive_runner(1, [requests_of(plain, tokens=60)], async_scheduling=is_async)
    texts = zip(result["calls"][0]["tokens"], without["calls"][0]["tokens"], strict=True)
    assert [one == other for one, other in texts] == [False] * 4 + [True]


# ---- engines of other kinds ----

both = pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])


@both
def test_after_preemption(drive, is_async):
    """The KV cache has so few blocks that requests are preempted and computed again."""
    together = greedy(120) + drawn(120)
    calls = [together, *([request] for request in drawn(120))]
    options = {"num_gpu_blocks_override": 20, "block_size": 32}
    result = drive(calls, async_scheduling=is_async, **options)
    assert result["preempted"] >= 3
    assert replay(result, calls, changed=CHANGED) > 1000
    count = len(DRAWN)
    seeded = [i for i, kind in enumerate(DRAWN) if "seed" in kind]
    for i in seeded:
        assert result["calls"][0]["tokens"][-count:][i] == result["calls"][1 + i]["tokens"][0]
        assert len(result["calls"][1 + i]["tokens"][0]) == 120


@both
def test_prompts_in_chunks(drive, is_async, runner):
    """vLLM discards the tokens drawn for all chunks but the last; they must have no effect.

    With V1 without seeds, because it then asks the generator of a seeded request for an offset,
    which a CPU generator does not have.
    """
    kinds = DRAWN
    if runner == 1:
        kinds = [{name: value for name, value in kind.items() if name != "seed"} for kind in DRAWN]
    calls = [requests_of(kinds, tokens=30, lengths=(90, 5, 130, 61))]
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 16}
    result = drive(calls, async_scheduling=is_async, **options)
    discarded = [
        (name, len(output))
        for step in result["calls"][0]["steps"]
        for name, output in zip(step["requests"], step["outputs"], strict=True)
    ]
    assert len(discarded) - len(set(discarded)) >= 5
    assert replay(result, calls) > 200


def test_bfloat16(drive):
    calls = [greedy(20) + drawn(20)]
    result = drive(calls, dtype="bfloat16")
    assert {step["logits"].dtype for step in result["calls"][0]["steps"]} == {torch.bfloat16}
    assert replay(result, calls, changed=CHANGED) > 200


def test_a_row_of_nan(drive):
    """The engine goes on, and the other requests get the same tokens."""
    calls = [requests_of(DRAWN[:6], tokens=20)]
    clean, poisoned = drive(calls), drive(calls, poison=[7, 2])
    row = int(poisoned["calls"][0]["steps"][7]["requests"][2].partition("-")[0])
    place = len(poisoned["calls"][0]["steps"][7]["outputs"][2])
    assert poisoned["calls"][0]["tokens"][row][place] == 0
    for i, (one, other) in enumerate(
        zip(clean["calls"][0]["tokens"], poisoned["calls"][0]["tokens"], strict=True)
    ):
        assert (one == other) == (i != row)
        assert len(other) == 20
    assert poisoned["log"].count("left a request no token") == 1
    assert "left a request no token" not in clean["log"]


def test_processed_logprobs(drive):
    """Of greedy rows they are vLLM's; of drawn ones the logarithms of the distribution."""
    kinds = [{}, {"repetition_penalty": 1.4}, {"presence_penalty": 0.9}]
    calls = [
        requests_of(kinds, tokens=12, temperature=0.0, logprobs=4)
        + requests_of(DRAWN[:7], tokens=12, logprobs=4)
    ]
    options = {"logprobs_mode": "processed_logprobs"}
    own, fused = drive(calls, on=False, **options), drive(calls, **options)
    assert replay(fused, calls) > 100
    ours, theirs = fused["calls"][0], own["calls"][0]
    for row in range(len(kinds)):
        assert ours["tokens"][row] == theirs["tokens"][row]
        same_logprobs(ours["logprobs"][row], theirs["logprobs"][row])
    from vllm import SamplingParams

    compared = 0
    for step in ours["steps"]:
        for row, name in enumerate(step["requests"]):
            number, place = int(name.partition("-")[0]), len(step["outputs"][row])
            if number < len(kinds) or step["tokens"][row] != ours["tokens"][number][place]:
                continue
            params = params_of(SamplingParams(**calls[0][number][1]))
            prompt, output = step["prompts"][row], step["outputs"][row]
            logits = step["logits"][row : row + 1].clone()
            history = TokenHistory.from_ids([prompt], [output], logits.shape[1])
            want = filter_logits(logits, params, history=history).log_softmax(-1)[0]
            for token, logprob, _ in ours["logprobs"][number][place]:
                assert logprob == pytest.approx(want[token].item(), abs=1e-5)
                compared += want[token].item() > -torch.inf
    assert compared > 200


CHOICES = ["yes, it is", "yes, it was", "no"]


@both
def test_structured_output(drive_runner, is_async):
    """vLLM masks the logits by the grammar before the sampler gets them.

    V2 does so at the same place, with a kernel that does not run in Triton's interpreter.
    """
    kinds = [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "presence_penalty": 0.5}, {}]
    kinds = [kind | {"choice": CHOICES, "ignore_eos": False} for kind in kinds]
    calls = [requests_of(kinds, tokens=20) + drawn(12), requests_of(kinds[:1], tokens=20)]
    result = drive_runner(1, calls, async_scheduling=is_async)
    assert replay(result, calls) > 100
    assert set(result["calls"][0]["texts"][: len(kinds)]) <= set(CHOICES)
    own = drive_runner(1, calls, on=False, async_scheduling=is_async)
    assert result["calls"][1]["texts"] == own["calls"][1]["texts"]


CUSTOM = {
    1: ["custom_vllm:Halves", "custom_vllm:NoDigits"],
    2: ["custom_vllm:HalvesV2", "custom_vllm:NoDigitsV2"],
}


def test_custom_logits_processors(drive, runner):
    """V1 applies one after the temperature and one before the penalties, V2 both between them."""
    tokens, custom = 25, CUSTOM[runner]
    together = greedy(tokens) + drawn(tokens)
    calls = [together, greedy(tokens), *([request] for request in drawn(tokens))]
    own = drive([greedy(tokens)], on=False, logits_processors=custom)
    plain = drive([greedy(tokens)], on=False)
    fused = drive(calls, logits_processors=custom)
    assert fused["sampler"].startswith(PLUGIN)
    assert fused["calls"][1]["tokens"] == own["calls"][0]["tokens"] != plain["calls"][0]["tokens"]
    count = len(DRAWN)
    seeded = [i for i, kind in enumerate(DRAWN) if "seed" in kind]
    for i in seeded:
        found = fused["calls"][0]["tokens"][-count:][i]
        assert found == fused["calls"][2 + i]["tokens"][0]
        assert not set(found) & set(range(15, 25)), "digits"


#: V1 proposes drafts on the host, and V2, which may be asynchronous, on the device.
SPECULATIVE = {
    runner: {"method": method, "num_speculative_tokens": 3}
    | {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    for runner, method in ((1, "ngram"), (2, "ngram_gpu"))
}


def test_speculative_decoding_of_v1_is_vllm_s_own(drive_runner):
    calls = [requests_of([{}, {"presence_penalty": 1.0}], tokens=10, temperature=0.0)]
    result = drive_runner(1, calls, speculative_config=SPECULATIVE[1])
    assert result["log"].count("vLLM keeps its own sampler: speculative_config") == 1
    plain = drive_runner(1, calls, on=False)
    assert result["calls"][0]["tokens"] == plain["calls"][0]["tokens"]


@both
def test_rows_of_drafts_with_v2(drive_runner, is_async):
    """vLLM's rejection sampler draws them, from logits that are processed with the draft's tokens.

    Drafts are made of the tokens without drafts. Each third is wrong from its second token on.
    """
    from vllm import SamplingParams

    # vLLM refuses these parameters with speculative decoding
    known = [r for r in greedy() + drawn() if not {"logit_bias", "min_p"} & set(r[1])]
    texts = drive_runner(2, [known])["calls"][0]["tokens"]
    result = drive_runner(
        2, [known], drafts=texts, speculative_config=SPECULATIVE[2], async_scheduling=is_async
    )
    assert result["sampler"] == f"{PLUGIN}.v2"
    for (_, asked), one, other in zip(known, texts, result["calls"][0]["tokens"], strict=True):
        assert one == other or asked.get("temperature") != 0.0
    assert replay(result, [known], changed=CHANGED) > 10, "the steps without a draft"

    compared, lengths = 0, set()
    for row in result["verified"]:
        asked = known[int(row["request"].partition("-")[0])][1]
        if not set(asked) & set(CHANGED):
            params = not_greedy(params_of(SamplingParams(**asked), 0))
            output = row["output"] + row["draft"]
            logits = row["logits"][None]
            history = TokenHistory.from_ids([row["prompt"]], [output], logits.shape[1])
            want = filter_logits(logits, params, history=history)[0]
            assert torch.equal(row["processed"], want), (asked, len(output))
            compared += params.needs_history
            lengths.add(len(row["draft"]))
    assert lengths == {0, 1, 2, 3}
    assert compared > 300
