"""The plug-in in SGLang's own engine, on the CPU: `pytest -m sglang`, where SGLang is installed.

Each engine runs in processes of its own (drive_sglang.py beside this), on a small random model.
Every row of every step is replayed: its token must be that of ``sample`` for the logits that the
model gave, with the request's parameters, output and seed, and without other requests.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.integrations.sglang import SWITCH

pytestmark = pytest.mark.sglang

HERE = Path(__file__).parent
STUBS = HERE / "sglang_stubs"
PLUGIN = "llm_sampling.integrations.sglang"
OWN = "sglang.srt.layers.sampler"


@pytest.fixture(scope="module")
def model(request):
    """A folder with a small random model."""
    if importlib.util.find_spec("sglang") is None:
        pytest.fail("needs SGLang, docs/engines/sglang.md says how to install it")
    return request.getfixturevalue("saved_llama")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder that makes drive_sglang.record a plug-in of SGLang's."""
    folder = tmp_path_factory.mktemp("plugins") / "recorder-0.dist-info"
    folder.mkdir()
    about = "Metadata-Version: 2.1\nName: recorder\nVersion: 0\n"
    (folder / "METADATA").write_text(about, encoding="utf-8")
    entry = "[sglang.srt.plugins]\nrecorder = drive_sglang:record\n"
    (folder / "entry_points.txt").write_text(entry, encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def drive(model, plugins, tmp_path_factory):
    """A function that runs an engine and returns its results and its log."""

    def run(calls, *, on=True, environment=(), **engine):
        folder = tmp_path_factory.mktemp("run")
        (folder / "steps").mkdir()
        torch.save({"engine": {"model_path": str(model)} | engine, "calls": calls}, folder / "job")
        done = subprocess.run(
            [sys.executable, str(HERE / "drive_sglang.py"), folder / "job", folder / "result"],
            env=os.environ
            | {SWITCH: "1" if on else "0", "LOG_OF_STEPS": str(folder / "steps")}
            | {"PYTHONPATH": os.pathsep.join(map(str, (STUBS, HERE, plugins)))}
            | {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
            | dict(environment),
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


def prompt_of(number, length):
    return [(number * 37 + i * 11) % 250 for i in range(length)]


#: Penalties of one kind each: SGLang applies both kinds in another order.
GREEDY = [
    {},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"frequency_penalty": 0.8},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5, "presence_penalty": -0.25},
    {"min_new_tokens": 20, "stop_token_ids": list(range(0, 256, 2))},
    {"logit_bias": {"65": 5.0, "66": -100.0, "67": 4.5}},
    {"logit_bias": {"65": 5.0, "66": 2.0, "67": 4.5}, "repetition_penalty": 1.5},
    {"regex": "[a-e0-9]{60}", "frequency_penalty": 0.5},
    {"min_new_tokens": 5, "stop_token_ids": list(range(128)), "presence_penalty": 1.0},
]
DRAWN = [
    {"sampling_seed": 1},
    {"sampling_seed": 2, "temperature": 0.7, "top_p": 0.9},
    {"sampling_seed": 3, "top_k": 9, "min_p": 0.05},
    {"sampling_seed": 4, "repetition_penalty": 1.3, "temperature": 1.2},
    {"sampling_seed": 2**63 - 1, "frequency_penalty": 0.9, "top_k": 40, "top_p": 0.8},
    {"sampling_seed": 0, "presence_penalty": -0.7, "top_p": 0.95},
    {"sampling_seed": -5, "top_p": 0.7, "repetition_penalty": 1.1, "frequency_penalty": -0.3},
    {"sampling_seed": 6, "top_k": 5, "logit_bias": {"70": 3.0}, "presence_penalty": 0.6},
    {"sampling_seed": 7, "regex": "[a-z]{60}", "repetition_penalty": 1.2},
    {"top_p": 0.9},
]
#: Parameters by which SGLang's own code changes logits.
CHANGED = {"logit_bias", "regex", "min_new_tokens"}


def requests_of(kinds, *, tokens, lengths=(3, 17, 40, 9), extra=None, **options):
    return [
        [
            prompt_of(number, lengths[number % len(lengths)]),
            {"max_new_tokens": tokens, "ignore_eos": True} | options | kind,
            dict(extra or {}),
        ]
        for number, kind in enumerate(kinds)
    ]


def greedy(tokens=40, **options):
    return requests_of(GREEDY, tokens=tokens, temperature=0.0, **options)


def drawn(tokens=40, **options):
    return requests_of(DRAWN, tokens=tokens, **options)


def params_of(asked, seed):
    """What a request asks for; ``seed`` is for one that has none."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    names += ("frequency_penalty", "presence_penalty")
    return SamplingParams(
        **{name: asked[name] for name in names if name in asked},
        repetition_penalty_scope="output",
        seed=asked.get("sampling_seed", seed) % 2**64,
    )


PENALTIES_OFF = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


def replay(result, calls):
    """Compare each row of each step with ``sample``; return how many rows were compared.

    A token that was drawn for a chunk of a prompt, or for a request that had ended or had been
    retracted by the time the host knew, is thrown away by SGLang.
    """
    rows, last = 0, {}
    for step in result["steps"]:
        for row, name in enumerate(step["requests"]):
            number, i = map(int, name.split("-"))
            prompt, asked, extra = calls[number][i]
            place, final = (
                step["places"][row] + 1 - len(prompt),
                result["calls"][number]["tokens"][i],
            )
            if not 0 <= place <= len(final):
                continue
            if "sampling_seed" in asked:
                assert step["seeds"][row] == asked["sampling_seed"] % 2**64
            logits, asks = step["raw"][row : row + 1], dict(asked)
            if CHANGED & {*asked} or "custom_logit_processor" in extra:
                logits = step["drawn"]["logits"][row : row + 1]
                asks |= PENALTIES_OFF if step["drawn"]["are_penalised"] else {}
            params = params_of(asks, step["seeds"][row])
            history = TokenHistory.from_ids([prompt], [final[:place]], logits.shape[1])
            want = sample(logits, params, history=history, positions=[place]).tokens
            assert step["tokens"][row] == int(want), (name, asked, place)
            last[name, place] = int(want)
            rows += 1
    for number, call in enumerate(result["calls"]):
        for i, tokens in enumerate(call["tokens"]):
            assert tokens == [last[f"{number}-{i}", place] for place in range(len(tokens))]
    return rows


def ending():
    """Requests of which each gets one token more than the one before: batches of every size."""
    known = [request for request in greedy() + drawn() if "stop_token_ids" not in request[1]]
    return [
        [prompt, params | {"max_new_tokens": 3 + number}, extra]
        for number, (prompt, params, extra) in enumerate(known)
    ]


def arrangements():
    """All together, the greedy ones, all in reverse order, each drawn one alone, and `ending`."""
    together = greedy() + drawn()
    return [together, greedy(), together[::-1], *([request] for request in drawn()), ending()]


SEEDED = [i for i, kind in enumerate(DRAWN) if "sampling_seed" in kind]
NO_OVERLAP = {"disable_overlap_schedule": True}


@pytest.fixture(scope="module")
def fused(drive):
    return drive(arrangements())


@pytest.fixture(scope="module")
def own(drive):
    """The results of SGLang's own sampler, whose penalties are right without the overlap."""
    return drive([greedy(), greedy() + drawn()], on=False, **NO_OVERLAP)


def test_the_entry_point_is_installed():
    (found,) = entry_points(group="sglang.srt.plugins", name="llm_sampling")
    assert found.value == f"{PLUGIN}:register"


def test_the_plug_in_is_what_makes_the_difference(own, fused):
    assert own["sampler"] == OWN
    assert fused["sampler"] == PLUGIN
    assert fused["log"].count("llm_sampling draws, by its backend 'cpu'") == 1
    assert "keeps its own sampler" not in fused["log"]


def test_every_row_of_every_step_is_drawn_as_if_alone(fused):
    assert replay(fused, arrangements()) > 1500
    sizes = {len(step["requests"]) for step in fused["steps"]}
    assert sizes >= {*range(1, len(ending()) + 1), len(GREEDY) + len(DRAWN)}
    assert {step["drawn"]["are_penalised"] for step in fused["steps"]} == {False, True}


def test_greedy_requests_get_sglang_s_tokens(own, fused):
    assert fused["calls"][1]["tokens"] == own["calls"][0]["tokens"]
    assert fused["calls"][0]["tokens"][: len(GREEDY)] == own["calls"][1]["tokens"][: len(GREEDY)]


def test_seeded_requests_get_the_same_tokens_in_any_batch(fused):
    together = fused["calls"][0]["tokens"][len(GREEDY) :]
    in_reverse = fused["calls"][2]["tokens"][::-1][len(GREEDY) :]
    for i in SEEDED:
        assert together[i] == in_reverse[i] == fused["calls"][3 + i]["tokens"][0]
        assert len(together[i]) == 40


@pytest.fixture(scope="module")
def plain(drive):
    return drive(arrangements(), **NO_OVERLAP)


def tables_of(result, names):
    """Tables of SGLang's penalties, by requests whose batches have some."""
    return {
        name: {
            table
            for step in result["steps"]
            if step["requests"] == [name]
            for table in step["tables"]
        }
        for name in names
    }


def test_no_table_of_penalties_is_made(drive, fused, plain):
    """But for minimum lengths, which are SGLang's."""
    penalised = {f"{3 + i}-0" for i in (3, 4, 5, 6)}
    for result in (fused, plain):
        assert tables_of(result, penalised) == {name: set() for name in penalised}
        found = {table for step in result["steps"] for table in step["tables"]}
        assert found in ({"acc_additive_penalties"}, {"BatchedMinNewTokensPenalizer"})
    calls = [[request] for request in drawn(3)[3:5]]
    for options, found in (
        ({}, [{"acc_additive_penalties", "acc_scaling_penalties"}, {"acc_additive_penalties"}]),
        (NO_OVERLAP, [{"BatchedRepetitionPenalizer"}, {"BatchedFrequencyPenalizer"}]),
    ):
        own = tables_of(drive(calls, on=False, **options), ["0-0", "1-0"])
        assert [*own.values()] == found


def test_without_the_overlap_scheduler(fused, plain):
    assert replay(plain, arrangements()) > 1500
    for one, other in zip(plain["calls"], fused["calls"], strict=True):
        assert one["tokens"] == other["tokens"]


# ---- what SGLang's own sampler does not keep ----


def test_penalties_do_not_lag(drive, own, fused):
    """With the overlap scheduler SGLang's penalties see a token one step late."""
    overlapped = drive([greedy()], on=False)
    differ = [
        kind
        for kind, one, other in zip(
            GREEDY, overlapped["calls"][0]["tokens"], own["calls"][0]["tokens"], strict=True
        )
        if one != other
    ]
    assert {"repetition_penalty": 0.8} in differ
    assert {"frequency_penalty": 0.8} in differ
    assert {} not in differ
    assert fused["calls"][1]["tokens"] == own["calls"][0]["tokens"]
    assert lagging(overlapped, by_one=True) == lagging(own, by_one=False) == 6 * 40


def lagging(result, *, by_one):
    """How many tokens of the first six requests are those of penalties that lag, or do not.

    Penalties that lag see the last token of the prompt in the place of the last token.
    """
    found = 0
    for step in result["steps"]:
        for row, name in enumerate(step["requests"]):
            number, i = map(int, name.split("-"))
            if number or i >= 6:
                continue
            prompt, asked, _ = greedy()[i]
            tokens = result["calls"][0]["tokens"][i]
            place = step["places"][row] + 1 - len(prompt)
            if place == len(tokens):  # drawn before the host knew that the request had ended
                continue
            output = [prompt[-1], *tokens][:place] if by_one else tokens[:place]
            logits = step["raw"][row : row + 1]
            history = TokenHistory.from_ids([prompt], [output], logits.shape[1])
            want = sample(logits, params_of(asked, 0), history=history).tokens
            found += tokens[place] == int(want)
    return found


def test_seeds_count(drive):
    """Two requests that differ in nothing; SGLang's own sampler ignores their seeds."""
    twice = requests_of([{"sampling_seed": 5}], tokens=20) * 2
    ours, theirs = (drive([twice, twice], on=on) for on in (True, False))
    first, *others = (tokens for call in ours["calls"] for tokens in call["tokens"])
    assert others == [first] * 3
    first, *others = (tokens for call in theirs["calls"] for tokens in call["tokens"])
    assert others != [first] * 3


def test_texts_of_one_request_share_its_seed(drive):
    calls = [
        [[prompt_of(1, 9), {"n": 2, "max_new_tokens": 20, "ignore_eos": True} | seed, {}]]
        for seed in ({"sampling_seed": 5}, {})
    ]
    seeded, unseeded = (call["tokens"] for call in drive(calls)["calls"])
    assert seeded[0] == seeded[1]
    assert unseeded[0] != unseeded[1]


# ---- engines of other kinds ----


#: The KV cache has room for so few tokens that requests are retracted and computed again. SGLang
#: reserves all that a request with ``ignore_eos`` may produce.
CROWDED = {"max_total_tokens": 900, "schedule_conservativeness": 0.05}


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_after_retraction(drive, overlap):
    together = greedy(120, ignore_eos=False) + drawn(120, ignore_eos=False)
    calls = [together, *([request] for request in drawn(120, ignore_eos=False))]
    options = CROWDED if overlap else CROWDED | NO_OVERLAP
    result = drive(calls, **options)
    assert sum(about["num_retractions"] for about in result["calls"][0]["about"]) >= 3
    assert replay(result, calls) > 1000
    for i in SEEDED:
        assert result["calls"][0]["tokens"][len(GREEDY) :][i] == result["calls"][1 + i]["tokens"][0]


def test_penalties_outlive_a_retraction(drive):
    """SGLang's own forget what a request had produced before it was retracted."""
    kinds = [{}, *GREEDY[1:5] * 2] * 3
    calls = [requests_of(kinds, tokens=120, temperature=0.0, ignore_eos=False)]
    changed = []
    for on in (True, False):
        crowded = drive(calls, on=on, **CROWDED, **NO_OVERLAP)["calls"][0]
        roomy = drive(calls, on=on, **NO_OVERLAP)["calls"][0]
        retracted = {i for i, about in enumerate(crowded["about"]) if about["num_retractions"]}
        assert len(retracted & {i for i, kind in enumerate(kinds) if kind}) >= 2
        differ = {i for i in range(len(kinds)) if crowded["tokens"][i] != roomy["tokens"][i]}
        assert differ <= {i for i in retracted if kinds[i]}
        changed.append(len(differ))
    assert changed[0] == 0 < changed[1]


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_prompts_in_chunks(drive, mixed):
    """SGLang throws away what is drawn for all chunks but the last; it must have no effect."""
    calls = [requests_of(DRAWN, tokens=30, lengths=(90, 5, 130, 61))]
    calls += [[request] for request in calls[0]]
    result = drive(calls, chunked_prefill_size=32, enable_mixed_chunk=mixed)
    thrown_away = sum(
        place + 1 < len(calls[0][int(name.partition("-")[2])][0])
        for step in result["steps"]
        for name, place in zip(step["requests"], step["places"], strict=True)
        if name.startswith("0-")
    )
    assert thrown_away >= 5
    assert replay(result, calls) > 500
    for i in SEEDED:
        assert result["calls"][0]["tokens"][i] == result["calls"][1 + i]["tokens"][0]


def test_bfloat16_and_a_cache_of_prefixes(drive):
    calls = [greedy(20) + drawn(20)] * 2
    result = drive(calls, dtype="bfloat16", disable_radix_cache=False)
    assert any(about["cached_tokens"] for about in result["calls"][1]["about"])
    assert replay(result, calls) > 400


def test_tensor_parallelism(drive):
    """Each rank draws, and all of them the same tokens, requests without a seed included."""
    calls = [greedy(20) + drawn(20)]
    result = drive(calls, tp_size=2, environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    assert replay(result, calls) > 300
    (other,) = result["others"]
    assert other == [step["tokens"] for step in result["steps"]]


def test_a_row_of_nan(drive):
    """The engine goes on, and the other requests get the same tokens."""
    calls = [requests_of(DRAWN[:6], tokens=20)]
    clean, poisoned = drive(calls), drive(calls, environment={"POISON": "7 2"})
    row = int(poisoned["steps"][7]["requests"][2].partition("-")[2])
    place = poisoned["steps"][7]["places"][2] + 1 - len(calls[0][row][0])
    assert poisoned["calls"][0]["tokens"][row][place] == 0
    for i, (one, other) in enumerate(
        zip(clean["calls"][0]["tokens"], poisoned["calls"][0]["tokens"], strict=True)
    ):
        assert (one == other) == (i != row)
        assert len(other) == 20
    assert poisoned["log"].count("left a request no token") == 1
    assert "left a request no token" not in clean["log"]


LOGPROBS = {"return_logprob": True, "top_logprobs_num": 3}


def test_logprobs(drive):
    """Of greedy requests they are SGLang's; of drawn ones, of all tokens at the temperature."""
    calls = [
        requests_of(GREEDY[:6], tokens=12, temperature=0.0, extra=LOGPROBS),
        requests_of(DRAWN[:7], tokens=12, extra=LOGPROBS),
    ]
    ours, theirs = (drive(calls, on=on, **NO_OVERLAP) for on in (True, False))
    assert replay(ours, calls) > 100
    compared = 0
    for one, other in zip(ours["calls"][0]["about"], theirs["calls"][0]["about"], strict=True):
        for name in ("output_token_logprobs", "output_top_logprobs"):
            found, want = (torch.tensor(numbers_of(about[name])) for about in (one, other))
            assert torch.allclose(found, want, atol=1e-5)
            compared += found.numel()
    assert compared > 400
    for step in ours["steps"]:
        for row, name in enumerate(step["requests"]):
            number, i = map(int, name.split("-"))
            prompt, asked, _ = calls[number][i]
            tokens = ours["calls"][number]["tokens"][i]
            place = step["places"][row] + 1 - len(prompt)
            if number == 0 or not 0 <= place < len(tokens):
                continue
            history = TokenHistory.from_ids([prompt], [tokens[:place]], step["raw"].shape[1])
            params = params_of(asked | {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, 0)
            kept = filter_logits(step["raw"][row : row + 1], params, history=history)
            want, about = kept.log_softmax(-1)[0], ours["calls"][number]["about"][i]
            shown = [about["output_token_logprobs"][place], *about["output_top_logprobs"][place]]
            assert shown[0][1] == tokens[place]
            for logprob, token, _ in shown:
                assert logprob == pytest.approx(want[token].item(), abs=1e-5)


def numbers_of(logprobs):
    """(logprob, token, text), or a list of these, for each place -> numbers."""
    places = [place if isinstance(place, list) else [place] for place in logprobs]
    return [[(logprob, token) for logprob, token, *_ in place] for place in places]


def test_custom_logit_processors(drive):
    """They come after the penalties, as in SGLang."""
    options = {"enable_custom_logit_processor": True}
    halved = {"custom_logit_processor": "halves"}
    calls = [
        greedy(25)[:9] + drawn(25)[:8] + requests_of(DRAWN[:7], tokens=25, extra=halved),
        requests_of(GREEDY[:9], tokens=25, temperature=0.0, extra=halved),
        *([request] for request in drawn(25)[:8]),
        *([request] for request in requests_of(DRAWN[:7], tokens=25, extra=halved)),
    ]
    fused = drive(calls, **options)
    own = drive(calls[1:2], on=False, **options, **NO_OVERLAP)
    assert fused["sampler"] == PLUGIN
    assert fused["calls"][1]["tokens"] == own["calls"][0]["tokens"]
    assert replay(fused, calls) > 900
    together = fused["calls"][0]["tokens"][9:]
    alone = [call["tokens"][0] for call in fused["calls"][2:]]
    assert together == alone
    assert together[:7] != together[8:]


def test_sampling_masks(drive):
    """They have the tokens that could be drawn, with the logprobs of these."""
    asked = {"return_sampling_mask": True}
    kinds = [kind | {"top_k": 12, "max_new_tokens": 10} for kind in DRAWN[:7]]
    calls = [
        requests_of(kinds, tokens=10, extra=asked) + drawn(10)[:5],
        requests_of([{"temperature": 0.0, "presence_penalty": 0.5}], tokens=10, extra=asked),
    ]
    result = drive(calls)
    assert replay(result, calls) > 100
    about = result["calls"][0]["about"][:7]
    masks = [place for of in about for place in of["output_token_sampling_mask"]]
    assert len(masks) == 70
    for of, tokens in zip(about, result["calls"][0]["tokens"][:7], strict=True):
        for mask, token in zip(of["output_token_sampling_mask"], tokens, strict=True):
            assert token in mask
            assert len(mask) <= 12
    greedy_masks = result["calls"][1]["about"][0]["output_token_sampling_mask"]
    assert greedy_masks == [[token] for token in result["calls"][1]["tokens"][0]]


# ---- the flag, and what is refused ----


def test_the_flag_is_accepted(plugins):
    """Where the plug-in is not loaded, SGLang refuses it."""
    program = """
import argparse, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(parser.parse_args(sys.argv[1:]).sampling_backend)
"""
    arguments = ["--model-path", "no-model", "--sampling-backend", "llm_sampling"]
    for chosen, code in (("llm_sampling", 0), ("another", 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | {"PYTHONPATH": str(STUBS), "SGLANG_PLUGINS": chosen},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr[-2000:]
        assert (done.stdout.strip() == "llm_sampling") == (code == 0)


def test_the_flag_chooses_the_kernel(drive):
    """On a CPU SGLang overrules the flag, so here it is told again."""
    calls = [greedy(20) + drawn(20)]
    kept = {"KEEP_FLAG": "llm_sampling"}
    result = drive(calls, on=False, environment=kept)
    assert result["sampler"] == PLUGIN
    assert replay(result, calls) > 300


def test_what_is_refused_is_sglang_s_own(drive):
    calls = [requests_of([{}, {"presence_penalty": 1.0}], tokens=10, temperature=0.0)]
    result = drive(calls, environment={"REFUSE": "1"})
    reason = "llm_sampling: SGLang keeps its own sampler: module 'sglang.srt.layers.sampler' has no"
    assert result["log"].count(reason) == 1
    assert result["sampler"] == OWN
    plain = drive(calls, on=False)
    assert result["calls"][0]["tokens"] == plain["calls"][0]["tokens"]


def test_what_is_refused_under_the_flag_is_drawn_all_the_same(drive):
    """SGLang's own sampler knows no backend of that name."""
    calls = [requests_of([{}, {"top_p": 0.9, "top_k": 20}], tokens=10)]
    kept = {"KEEP_FLAG": "llm_sampling", "REFUSE": "1"}
    result = drive(calls, on=False, environment=kept)
    assert result["sampler"] == OWN
    assert result["log"].count("SGLang keeps its own sampler: ") == 1
    assert [len(tokens) for tokens in result["calls"][0]["tokens"]] == [10, 10]
