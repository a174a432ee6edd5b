"""Tests of ``generate`` and ``generate_stream``.

They cover the ends of texts, stop strings, streaming, and batches of prompts of unequal length.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stop_strings import whole
from toy_tokenizers import byte_tokenizer, merged_byte_tokenizer, transformers

from llm_sampling import InvalidLogitsError, SamplingParams, TokenHistory, sample
from llm_sampling.generation import Completion, generate, generate_stream, seeded

BYTES = byte_tokenizer()
V = 256

MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(top_k=20, top_p=0.9, seed=2**63),
    SamplingParams(repetition_penalty=1.3, temperature=0.7, seed=4),
    SamplingParams(frequency_penalty=0.7, presence_penalty=-0.3, seed=5),
    SamplingParams(min_p=0.2, logit_bias={5: 4.0}, seed=6),
    SamplingParams(top_p=0.5, seed=7),
    SamplingParams(temperature=1.5, top_k=3, seed=8),
]


def words(row_ids, vocab_size=V):
    """Return logits that depend on all token ids of the row and on nothing else."""
    seed = hash(tuple(row_ids)) % 2**31
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def model(input_ids, cache):
    cache = input_ids if cache is None else torch.cat([cache, input_ids], dim=1)
    return torch.stack([words(row) for row in cache.tolist()]), cache


END = BYTES("~")["input_ids"][0]


def script(*texts):
    """Return a model that generates these texts, one per row, byte by byte, and then END.

    It ignores the tokens that are drawn.
    """
    rows = [BYTES(text)["input_ids"] for text in texts]

    def says(input_ids, cache):
        step = 0 if cache is None else cache
        logits = torch.full((len(rows), V), -torch.inf)
        for row, ids in enumerate(rows):
            logits[row, ids[step] if step < len(ids) else END] = 0.0
        return logits, step + 1

    return says


def said(text, **options):
    options = {"max_new_tokens": 64, "tokenizer": BYTES, "vocab_size": V} | options
    (done,) = generate(script(text), [[1]], SamplingParams(seed=0), **options)
    return done


def test_tokens_are_those_of_sample_step_by_step():
    prompts = [[5, 6, 7], [9, 9, 1]]
    params = [MIXED[3], MIXED[4]]
    got = generate(model, prompts, params, vocab_size=V, max_new_tokens=12, logprobs="processed")
    for prompt, row_params, done in zip(prompts, params, got, strict=True):
        output, logprobs = [], []
        for position in range(12):
            drawn = sample(
                words(prompt + output)[None],
                row_params,
                history=TokenHistory.from_ids([prompt], [output], V),
                positions=[position],
                logprobs="processed",
            )
            output.append(drawn.tokens.item())
            logprobs.append(drawn.logprobs.item())
        assert done == Completion(None, output, logprobs, "length", None)


@pytest.mark.parametrize("kind", ["processed", "raw"])
def test_lists_and_ranks_are_those_of_sample_step_by_step(kind):
    params = replace(MIXED[4], top_k=7)
    options = {"logprobs": kind, "top_logprobs": 9}
    (done,) = generate(model, [[5, 6]], params, vocab_size=V, max_new_tokens=10, **options)
    for position, token in enumerate(done.token_ids):
        drawn = sample(
            words([5, 6, *done.token_ids[:position]])[None],
            params,
            history=TokenHistory.from_ids([[5, 6]], [done.token_ids[:position]], V),
            positions=[position],
            **options,
        )
        found = getattr(drawn, kind)
        assert done.ranks[position] == found.ranks.item()
        length = 7 if kind == "processed" else 9
        assert list(done.top_logprobs[position]) == found.top_ids[0, :length].tolist()
        assert list(done.top_logprobs[position].values()) == found.top_logprobs[0, :length].tolist()
        if done.ranks[position] <= length:
            assert done.top_logprobs[position][token] == pytest.approx(done.logprobs[position])
    assert len(set(done.ranks)) > 2


def test_penalties_of_the_last_ids_are_those_of_a_history_that_ends_there():
    prompts = [[5, 6, 7, 8], [9, 9, 1, 1]]
    params = [
        SamplingParams(repetition_penalty=3.0, presence_penalty=1.0, penalty_last_n=2, seed=4),
        SamplingParams(repetition_penalty=9.0, repetition_penalty_scope="output", seed=4),
    ]
    got = generate(model, prompts, params, vocab_size=V, max_new_tokens=12)
    for prompt, row, done in zip(prompts, params, got, strict=True):
        output = []
        for position in range(12):
            begin = 0
            if row.penalty_last_n >= 0:
                begin = len(prompt) + len(output) - row.penalty_last_n
            of_output = output[max(0, begin - len(prompt)) :]
            drawn = sample(
                words(prompt + output)[None],
                replace(row, penalty_last_n=-1),
                history=TokenHistory.from_ids([prompt[begin:]], [of_output], V),
                positions=[position],
            )
            output.append(drawn.tokens.item())
        assert done.token_ids == output


def test_rows_of_a_batch_of_eight_are_what_they_are_alone():
    prompts = [[row, 3, row + 1] for row in range(8)]
    options = {"vocab_size": V, "max_new_tokens": 20, "tokenizer": BYTES, "stop": "a"}
    together = generate(model, prompts, MIXED, **options)
    alone = [
        generate(model, [prompt], row, **options)[0]
        for prompt, row in zip(prompts, MIXED, strict=True)
    ]
    assert together == alone
    assert len({len(done.token_ids) for done in alone}) > 1  # they end at different steps


def test_the_sequences_of_a_request_have_seeds_of_their_own():
    """The first has the request's; the others have those that the semantics give for them."""
    params = SamplingParams(seed=7)
    assert [seeded(params, i).seed for i in range(3)] == [
        7,
        4597645836194191308,
        16856219258217205299,
    ]
    assert seeded(SamplingParams(seed=2**64 - 1), 3).seed == 229335022661938251
    got = generate(model, [[1, 2], [3, 4]], params, n=3, vocab_size=V, max_new_tokens=8)
    for row, prompt in enumerate(([1, 2], [3, 4])):
        for i in range(3):
            own = seeded(params, i)
            (alone,) = generate(model, [prompt], own, vocab_size=V, max_new_tokens=8)
            assert got[3 * row + i] == alone


def test_no_sequence_has_the_seed_of_the_next_request():
    params = [SamplingParams(seed=seed) for seed in (1, 2)]
    got = generate(model, [[1, 2], [1, 2]], params, n=2, vocab_size=V, max_new_tokens=8)
    assert len({tuple(row.token_ids) for row in got}) == 4


def test_unseeded_sequences_have_seeds_of_their_own():
    params = SamplingParams()
    assert seeded(params, 1) is params


def test_a_row_ends_alone():
    got = generate(
        script("abc", "abcdef"),
        [[1]] * 2,
        SamplingParams(),
        vocab_size=V,
        eos_token_ids=[END],
        max_new_tokens=5,
        tokenizer=BYTES,
    )
    assert [done.text for done in got] == ["abc", "abcde"]
    assert [done.finish_reason for done in got] == ["stop", "length"]
    assert [len(done.token_ids) for done in got] == [4, 5]


def test_end_tokens_and_their_reasons():
    assert said("ab", eos_token_ids=[END]).stop_reason is None
    done = said("ab", stop_token_ids=[END])
    assert (done.finish_reason, done.stop_reason, done.text) == ("stop", END, "ab")
    # A token of both lists counts as an eos token.
    assert said("ab", eos_token_ids=[END], stop_token_ids=[END]).stop_reason is None
    done = said("ab", eos_token_ids=[END], ignore_eos=True, max_new_tokens=4)
    assert (done.finish_reason, done.token_ids[-2:]) == ("length", [END, END])
    done = said("ab", eos_token_ids=[END], stop_token_ids=[END], ignore_eos=True)
    assert done.stop_reason == END


def test_stop_strings():
    text = "One. Two. Three."
    assert said(text, stop=".").text == "One"
    assert said(text, stop=".", stop_limit=2).text == "One. Two"
    done = said(text, stop=[".", "wo"], stop_limit=2, include_stop_str_in_output=True)
    assert (done.text, done.finish_reason, done.stop_reason) == ("One. Two", "stop", "wo")
    assert len(done.token_ids) == len("One. Two")
    assert said("작업 완료 다음", stop="완료").text == "작업 "


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab.끝", min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab.끝", min_size=1, max_size=3), min_size=1, max_size=2),
    limit=st.integers(1, 2),
    include=st.booleans(),
)
def test_the_stream_joins_to_the_text_that_the_rule_gives(text, stop, limit, include):
    """The alphabet has a character that takes three tokens of the byte tokenizer."""
    chunks = list(
        generate_stream(
            script(text),
            [[1]],
            SamplingParams(),
            tokenizer=BYTES,
            vocab_size=V,
            eos_token_ids=[END],
            max_new_tokens=64,
            stop=stop,
            stop_limit=limit,
            include_stop_str_in_output=include,
        )
    )
    expected, found = whole(text, stop, limit, include)
    assert "".join(chunk.text for chunk in chunks) == expected
    assert chunks[-1].stop_reason == found
    assert {chunk.finish_reason for chunk in chunks[:-1]} <= {None}


CHAT = merged_byte_tokenizer(["one two", "끝 stop"])
IM_END = CHAT.convert_tokens_to_ids("<|im_end|>")


def spoken(text, prompt="x", **options):
    """Generate the tokens of ``text``, special tokens included."""
    ids = CHAT(text)["input_ids"]

    def says(input_ids, cache):
        step = 0 if cache is None else cache
        logits = torch.full((1, len(CHAT)), -torch.inf)
        logits[0, ids[step]] = 0.0
        return logits, step + 1

    options = {"tokenizer": CHAT, "vocab_size": len(CHAT), "max_new_tokens": len(ids)} | options
    (done,) = generate(says, [CHAT(prompt)["input_ids"]], SamplingParams(), **options)
    return done


@pytest.mark.parametrize(
    "ends",
    [
        {"eos_token_ids": [IM_END]},
        {"stop_token_ids": [IM_END]},
        {"eos_token_ids": [IM_END], "ignore_eos": True},
        {},
    ],
    ids=["eos", "stop token", "ignored eos", "no end"],
)
def test_a_stop_string_that_is_a_special_token(ends):
    text = "one two<|im_end|>"
    for stop, shown in (("<|im_end|>", "one two"), ("two<|im_end|>", "one ")):
        done = spoken(text, stop=stop, **ends)
        assert (done.text, done.finish_reason, done.stop_reason) == (shown, "stop", stop)
        done = spoken(text, stop={stop}, include_stop_str_in_output=True, **ends)
        assert (done.text, done.finish_reason, done.stop_reason) == (text, "stop", stop)
    done = spoken(text, stop="<|im_start|>", include_stop_str_in_output=True, **ends)
    assert done.text == "one two"
    assert done.stop_reason == (IM_END if "stop_token_ids" in ends else None)
    done = spoken("a" + text, stop="<|im_end|>", min_new_tokens=1, **ends)
    assert (done.text, done.stop_reason) == ("aone two", "<|im_end|>")


def test_what_is_held_back_comes_before_an_end_token():
    """Half a character and half a stop string are text when the row ends."""
    options = {"eos_token_ids": [IM_END], "stop": ["two<|im_start|>", "b"]}
    assert spoken("one two<|im_end|>", **options).text == "one two"
    ids = [CHAT("é")["input_ids"][0], IM_END]
    says = iter(ids)

    def half(input_ids, cache):
        logits = torch.full((1, len(CHAT)), -torch.inf)
        logits[0, next(says)] = 0.0
        return logits, 1

    (done,) = generate(
        half, [[1]], SamplingParams(), tokenizer=CHAT, vocab_size=len(CHAT), **options
    )
    assert done.text == CHAT.decode(done.token_ids, skip_special_tokens=True) == "\ufffd"


def test_a_prompt_that_ends_inside_a_character():
    ids = BYTES("🙂!")["input_ids"]
    says = iter(ids[2:])

    def rest(input_ids, cache):
        logits = torch.full((1, V), -torch.inf)
        logits[0, next(says)] = 0.0
        return logits, 1

    options = {"tokenizer": BYTES, "vocab_size": V, "max_new_tokens": 3}
    (done,) = generate(rest, [ids[:2]], SamplingParams(), **options)
    assert done.text == "🙂!"


def test_none_is_no_stop_string():
    assert said("ab", stop=None, eos_token_ids=[END]).text == "ab"


def test_the_prompt_s_text_is_not_searched():
    """A stop string that begins in the prompt and ends in the output does not count."""
    prompt = BYTES("x EN")["input_ids"]
    (done,) = generate(
        script("D more END"),
        [prompt],
        SamplingParams(),
        tokenizer=BYTES,
        vocab_size=V,
        stop="END",
        max_new_tokens=32,
    )
    assert done.text == "D more "


def test_min_new_tokens_delays_every_end():
    options = {"vocab_size": V, "tokenizer": BYTES, "max_new_tokens": 40}
    likes_to_end = SamplingParams(logit_bias={0: 100.0}, seed=1)
    for ends in ({"eos_token_ids": [0]}, {"stop_token_ids": [0]}):
        (done,) = generate(model, [[1]], likes_to_end, min_new_tokens=7, **ends, **options)
        assert len(done.token_ids) == 8
        assert 0 not in done.token_ids[:7]
        assert done.token_ids[7] == 0
    assert said("a.b.c.", stop=".", min_new_tokens=2).text == "a.b"
    assert said("a.b.c.", stop=".", min_new_tokens=1).text == "a"
    assert said("a.b.c.", stop=".", min_new_tokens=2, stop_limit=2).text == "a.b.c"


def test_no_step_runs_before_it_is_asked_for():
    calls = []

    def counted(input_ids, cache):
        calls.append(tuple(input_ids.shape))
        return script("ab", "b")(input_ids, cache)

    stream = generate_stream(
        counted,
        [[1, 2], [3, 4]],
        SamplingParams(),
        vocab_size=V,
        eos_token_ids=[END],
        max_new_tokens=50,
    )
    assert calls == []
    next(stream)
    assert calls == [(2, 2)]
    list(stream)
    assert calls == [(2, 2), (2, 1), (2, 1)]


def test_each_prompt_has_its_own_options():
    """A prompt in a batch gives what it gives alone with the same options."""
    prompts = [[1, 2], [3, 4], [5, 6]]
    each = {
        "max_new_tokens": [4, 9, 20],
        "min_new_tokens": [0, 3, 10],
        "stop": [None, ["a", "b"], "c"],
        "stop_token_ids": [None, [20, 30], {40}],
        "logprobs": ["raw", None, "processed"],
        "top_logprobs": [3, None, 0],
    }
    params = [replace(row, top_k=30) for row in MIXED[:3]]
    shared = {"vocab_size": V, "tokenizer": BYTES, "eos_token_ids": range(60, 90)}
    together = generate(model, prompts, params, n=2, **each, **shared)
    for row in range(3):
        own = {name: values[row] for name, values in each.items()}
        own["stop_token_ids"] = own["stop_token_ids"] or ()
        alone = generate(model, [prompts[row]], params[row], n=2, **own, **shared)
        for got, want in zip(together[2 * row : 2 * row + 2], alone, strict=True):
            assert got == want
    assert {len(row.token_ids) for row in together} > {4}
    assert together[2].logprobs is together[2].ranks is together[2].top_logprobs is None
    assert [len(best) for best in together[0].top_logprobs] == [3] * len(together[0].token_ids)
    assert together[4].top_logprobs == [{}] * len(together[4].ranks)
    each["top_logprobs"] = None
    for row, kind in ((0, "raw"), (4, "processed")):
        want = generate(model, prompts, params, n=2, **(each | {"logprobs": kind}), **shared)
        assert together[row].logprobs == want[row].logprobs
        assert want[row].ranks is want[row].top_logprobs is None
    assert together[0].logprobs != pytest.approx(together[4].logprobs[:4], abs=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": [3]}, "max_new_tokens must have one for each of 2 prompts, got 1"),
        ({"max_new_tokens": [3, 0]}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": [3, None]}, "max_new_tokens must be an integer >= 1, got None"),
        ({"max_new_tokens": torch.tensor([3.0, 4.0])}, "must be an integer >= 1, got 3.0"),
        (
            {"max_new_tokens": [9, 3], "min_new_tokens": 4},
            "min_new_tokens must be at most 3, which is max_new_tokens, got 4",
        ),
        ({"stop": [["a"], ["b"], ["c"]]}, "stop must have one for each of 2 prompts, got 3"),
        ({"stop": [["a"], [1]]}, "stop must be .*strings, got .*1"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids must have one for each of 2 prompts, got 1"),
        ({"stop_token_ids": [[1], ["a"]]}, "stop_token_ids must be integers, got 'a'"),
        ({"stop_token_ids": [[1], [V]]}, f"end tokens must be in 0 .. {V - 1}, got {V}"),
        ({"logprobs": ["raw"]}, "logprobs must have one for each of 2 prompts, got 1"),
        ({"logprobs": ["raw", "x"]}, 'logprobs must be None, "processed" or "raw", got \'x\''),
        ({"top_logprobs": 3}, 'top_logprobs needs logprobs, "processed" or "raw", got None'),
        ({"logprobs": ["raw", None], "top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": "raw", "top_logprobs": [3]}, "top_logprobs must have one for each of 2"),
        ({"logprobs": "raw", "top_logprobs": -1}, "top_logprobs must be an integer >= 0, got -1"),
        ({"logprobs": "raw", "top_logprobs": [1, 1025]}, "top_logprobs must be at most 1024"),
        ({"position": [1]}, "position must have one for each of 2 prompts, got 1"),
        ({"position": "1"}, "position must be integers, got '1'"),
        ({"position": 2**64}, "position must be in"),
        ({"output_ids": [[1]]}, "output_ids must have one for each of 2 prompts, got 1"),
        ({"output_ids": [1, 2]}, "output_ids must be a collection of token ids, got 1"),
        ({"output_ids": "ab"}, "output_ids must be a list of token ids for each prompt, got 'ab'"),
        ({"output_ids": [[], [V]]}, f"output_ids must hold ids in 0 .. {V - 1}, got {V}"),
        ({"check": 1}, "check must be True or False, got 1"),
    ],
)
def test_an_option_of_each_prompt_that_cannot_be_honoured(options, message):
    shared = {"vocab_size": V, "tokenizer": BYTES}
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [2]], SamplingParams(seed=1), **shared, **options)


@pytest.mark.parametrize("row", MIXED, ids=range(len(MIXED)))
def test_five_tokens_and_five_more_are_ten(row):
    """Of every kind of parameters, with penalties for the output or the last ids too."""
    kinds = [row, replace(row, repetition_penalty=2.0, repetition_penalty_scope="output")]
    kinds.append(replace(row, presence_penalty=1.0, repetition_penalty=1.5, penalty_last_n=6))
    for params in kinds:
        prompts = [[1, 2, 2], [9]]
        options = {"vocab_size": V, "tokenizer": BYTES}
        for prompt in prompts:
            (ten,) = generate(model, [prompt], params, max_new_tokens=10, **options)
            (five,) = generate(model, [prompt], params, max_new_tokens=5, **options)
            (more,) = generate(
                model, [prompt], params, max_new_tokens=5, output_ids=[five.token_ids], **options
            )
            assert five.token_ids + more.token_ids == ten.token_ids


def test_a_position_is_enough_where_no_penalty_is_for_the_output():
    """The prompt then has the tokens so far."""
    options = {"vocab_size": V}
    for params in (MIXED[0], MIXED[2], MIXED[3]):
        (ten,) = generate(model, [[1, 2]], params, max_new_tokens=10, **options)
        so_far = [[1, 2, *ten.token_ids[:5]]]
        (more,) = generate(model, so_far, params, max_new_tokens=5, position=5, **options)
        assert more.token_ids == ten.token_ids[5:]
        (other,) = generate(model, so_far, params, max_new_tokens=5, **options)
        assert other.token_ids != more.token_ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(repetition_penalty=1.5, repetition_penalty_scope="output"),
    ],
)
def test_a_position_asks_for_the_output_where_a_penalty_is_for_it(params):
    both = [SamplingParams(repetition_penalty=1.5), params]
    with pytest.raises(ValueError, match=r"output_ids must be given beside position .* prompt 1"):
        generate(model, [[1], [2]], both, vocab_size=V, position=[3, 3])
    generate(model, [[1], [2]], both, vocab_size=V, position=[3, 0], max_new_tokens=1)


def with_nan_in(row, step):
    """The model of this file, but with NaN in the logits of one row from some step on."""
    calls = []

    def spoilt(input_ids, cache):
        logits, cache = model(input_ids, cache)
        calls.append(len(calls) + 1)
        if len(calls) >= step:
            logits = logits.clone()
            logits[row, 5] = torch.nan
        return logits, cache

    return spoilt


def test_the_fault_of_a_row_ends_that_row_alone():
    options = {"vocab_size": V, "max_new_tokens": 8, "tokenizer": BYTES, "logprobs": "raw"}
    options["top_logprobs"] = 2
    prompts = [[1, 2], [3, 4], [5, 6]]
    good = generate(model, prompts, MIXED[:3], **options)
    done = generate(with_nan_in(1, 4), prompts, MIXED[:3], **options)
    assert [done[0], done[2]] == [good[0], good[2]]
    assert done[1].token_ids == good[1].token_ids[:3]
    assert done[1].logprobs == good[1].logprobs[:3]
    assert done[1].ranks == good[1].ranks[:3]
    assert done[1].top_logprobs == good[1].top_logprobs[:3]
    assert good[1].text.startswith(done[1].text)
    assert (done[1].finish_reason, done[1].stop_reason) == ("error", "NaN in logits")
    with pytest.raises(InvalidLogitsError, match="NaN in logits in row 1"):
        generate(with_nan_in(1, 4), prompts, MIXED[:3], check=True, **options)


@pytest.mark.parametrize("check", [True, False])
def test_a_row_that_has_ended_is_not_looked_at(check):
    options = {"vocab_size": V, "max_new_tokens": [3, 8, 8], "check": check}
    prompts = [[1, 2], [3, 4], [5, 6]]
    good = generate(model, prompts, MIXED[:3], **options)
    assert generate(with_nan_in(0, 4), prompts, MIXED[:3], **options) == good
    assert [len(row.token_ids) for row in good] == [3, 8, 8]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "NaN in logits; no candidate left (every logit is -inf or masked)"),
        (-torch.inf, "no candidate left (every logit is -inf or masked)"),
        (torch.inf, "+inf in logits"),
    ],
)
def test_a_row_that_fails_at_once(value, reason):
    def empty(input_ids, cache):
        return torch.full((1, V), value)

    (done,) = generate(empty, [[1]], SamplingParams(), vocab_size=V, logprobs="raw")
    assert (done.token_ids, done.logprobs, done.text) == ([], [], None)
    assert (done.finish_reason, done.stop_reason) == ("error", reason)
    (chunk,) = generate_stream(empty, [[1]], SamplingParams(), vocab_size=V)
    assert (chunk.token, chunk.logprob, chunk.rank, chunk.top_logprobs) == (-1, None, None, None)
    lists = {"logprobs": "processed", "top_logprobs": 2}
    (chunk,) = generate_stream(empty, [[1]], SamplingParams(), vocab_size=V, **lists)
    assert (chunk.token, chunk.rank, chunk.top_logprobs) == (-1, -1, {})


STOPS = ["<|im_end|>", "stop", "e nd"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|im_start|><|im_end|>", "<|im_end|>"),
        ("<|im_start|><|im_end|<|im_end|>", "<|im_end|>"),
        (">><|im_start|>>stop", "stop"),
        ("stop", "stop"),
        ("e nd", "e nd"),
        ("<|im_start|><|im_end|", None),
        ("<|im_start|><|im_end|<|im_end|", None),
        ("end", None),
        ("en d", None),
        ("eNd", None),
        ("<|im_end|", None),
        ("|im_end|>", None),
        ("s", None),
        # The text after a stop string is never generated.
        ("<|im_end|><|im_start|>", "<|im_end|>"),
        ("<|im_end|<>stop<|im_end|", "stop"),
    ],
)
def test_the_strings_of_transformers_tests(text, found):
    done = said(text, stop=STOPS, eos_token_ids=[END])
    assert done.stop_reason == found
    assert done.text == (text if found is None else text[: text.index(found)])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["last", "stop"], "la"),  # the stop string "stst" spans two tokens
        (["topper", "s", "topper"], "topper"),  # "stop" spans two and ends within the last
        (["s", "t", "o", "p"], ""),
        (["a stopper"], "a "),
        (["sto", "sto", "p"], "sto"),
    ],
)
def test_strings_and_tokens_that_overlap(texts, expected):
    """The tokenizer's tokens are ``texts``, and the model generates them in order."""

    class Tokens:
        def decode(self, ids, **options):
            return "".join(texts[i - 1] for i in ids if i > 0)

    def says(input_ids, cache):
        logits = torch.full((1, len(texts) + 1), -torch.inf)
        logits[0, cache if cache is not None else 1] = 0.0
        return logits, (cache or 1) + 1

    stop = "stst" if texts[0] == "last" else "stop"
    (done,) = generate(
        says,
        [[0]],
        SamplingParams(),
        tokenizer=Tokens(),
        vocab_size=len(texts) + 1,
        max_new_tokens=len(texts),
        stop=stop,
    )
    assert (done.text, done.stop_reason) == (expected, stop)


@pytest.mark.parametrize(("text", "ends"), [("a", True), ("baa", True), ("bcd", False)])
def test_a_string_of_one_letter(text, ends):
    assert (said(text, stop="a", eos_token_ids=[END]).stop_reason == "a") is ends


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("대화 끝", "끝", "대화 "),
        ("작업 완료", "완료", "작업 "),
        ("대화 끝 다음", "끝", "대화 "),
        ("abc 끝!", "끝!", "abc "),
    ],
)
def test_strings_in_characters_of_several_tokens(text, stop, shown):
    done = said(text, stop=stop, eos_token_ids=[END])
    assert (done.text, done.stop_reason) == (shown, stop)


def test_ids_that_the_tokenizer_does_not_know_are_no_text():
    """A model may have more logits than its tokenizer has tokens."""
    wide = len(BYTES) + 1024

    def says(input_ids, cache):
        logits = torch.full((1, wide), -torch.inf)
        logits[0, wide - 1 if cache is None else BYTES("x")["input_ids"][0]] = 0.0
        return logits, 1

    (done,) = generate(
        says, [[1]], SamplingParams(), tokenizer=BYTES, vocab_size=wide, max_new_tokens=3, stop="y"
    )
    assert (done.text, done.finish_reason) == ("xx", "length")


# Hugging Face models


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama(V, eos_token_id=0)


def test_greedy_ragged_rows_are_those_of_hugging_face(llama):
    prompts = [[5, 17, 80], [9], [4, 4, 64, 31, 31, 2]]
    padded = torch.tensor([[0] * (6 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in prompts])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = llama.generate(padded, attention_mask=mask, **options)[:, 6:].tolist()
    greedy = SamplingParams(temperature=0)
    forms = [
        prompts,
        [torch.tensor(row) for row in prompts],
        {"input_ids": padded, "attention_mask": mask},
        transformers.BatchEncoding({"input_ids": padded, "attention_mask": mask}),
    ]
    for form in forms:
        got = generate(llama, form, greedy, max_new_tokens=16, ignore_eos=True)
        assert [done.token_ids for done in got] == want


def test_a_padded_row_is_penalised_for_its_own_prompt_only(llama):
    """Padding has the id 0, which is also an ordinary token that penalties must not count here."""
    params = SamplingParams(repetition_penalty=1.8, frequency_penalty=0.5, temperature=0)
    options = {"max_new_tokens": 12, "ignore_eos": True}
    alone = generate(llama, [[9]], params, **options)
    together = generate(llama, [[9], [4, 4, 64, 31, 31, 2]], params, **options)
    assert together[0].token_ids == alone[0].token_ids


def test_the_model_s_own_end_tokens_are_taken(llama):
    likes_to_end = SamplingParams(logit_bias={0: 100.0})
    (done,) = generate(llama, [[9]], likes_to_end, max_new_tokens=5)
    assert (done.token_ids, done.finish_reason, done.stop_reason) == ([0], "stop", None)


def test_texts_need_a_tokenizer_and_give_text(llama):
    got = generate(llama, ["ab", "c"], SamplingParams(seed=1), tokenizer=BYTES, max_new_tokens=6)
    ids = [BYTES(text)["input_ids"] for text in ("ab", "c")]
    same = generate(llama, ids, SamplingParams(seed=1), tokenizer=BYTES, max_new_tokens=6)
    assert got == same
    one = generate(llama, "ab", SamplingParams(seed=1), tokenizer=BYTES, max_new_tokens=6)
    assert len(one) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer >= 0, got -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must be at most 8"),
        ({"stop": ""}, "stop must have no empty string"),
        ({"stop": "a", "tokenizer": None}, "tokenizer must be given for stop"),
        ({"stop_limit": 0}, "stop_limit must be an integer >= 1, got 0"),
        ({"prompts": ["a"], "tokenizer": None}, "tokenizer must be given for prompts that are"),
        ({"prompts": []}, "prompts must have at least one prompt"),
        ({"prompts": [[1], []]}, "prompt 1 has none"),
        ({"prompts": torch.tensor([1, 2])}, r"shape \(rows, length\), got \(2,\)"),
        ({"prompts": [[1], [1, 2]]}, r"of one length for a callable, got \[1, 2\]"),
        ({"params": [SamplingParams()] * 2}, "one for each of 1 prompts, got 2"),
        ({"vocab_size": None}, "vocab_size must be given where the model has no config"),
        ({"stop_token_ids": [V]}, "end tokens must be in 0 .. 255, got 256"),
        ({"eos_token_ids": [-1]}, "end tokens must be in 0 .. 255, got -1"),
        ({"backend": "none"}, "none"),
        (
            {"prompts": {"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}},
            "attention_mask must pad on the left",
        ),
        (
            {"prompts": {"input_ids": [[1, 2]], "attention_mask": [[1]]}},
            "attention_mask must have the shape of input_ids",
        ),
        ({"model": lambda ids, cache: None}, "model must return logits of shape"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {
        "model": model,
        "prompts": [[1]],
        "params": SamplingParams(),
        "tokenizer": BYTES,
        "vocab_size": V,
    } | arguments
    with pytest.raises(ValueError, match=message):
        generate(**arguments)


def test_generate_takes_what_generate_stream_takes():
    signature = inspect.signature(generate_stream)
    documented = generate_stream.__doc__
    for name in signature.parameters:
        assert f"        {name}: " in documented
