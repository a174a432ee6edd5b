"""Tests of the grammars of xgrammar and llguidance as masks of a Sampler and of the loops.

The tokenizer has a token for each byte, and the model's logits are random, so that a text conforms
to its grammar because of the masks alone.
"""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampling import MaskStep, Sampler, SamplingParams
from llm_sampling.generation import generate, generate_stream, stream
from llm_sampling.integrations import grammar

for package in ("xgrammar", "llguidance", "jsonschema"):
    pytest.importorskip(package, reason="needs the extra 'grammar' and jsonschema")

import jsonschema  # noqa: E402
from toy_tokenizers import SPECIAL, byte_tokenizer, merged_byte_tokenizer  # noqa: E402

BYTES = byte_tokenizer()
END = BYTES.eos_token_id
V = len(BYTES)
ENGINES = {"xgrammar": grammar.xgrammar, "llguidance": grammar.llguidance}

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bc", None, 7]},
        "code": {"type": "string", "pattern": "^[a-f]{2,4}$"},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["id", "kind", "code", "flags"],
    "additionalProperties": False,
}
REGEX = r"(yes|no), [0-9]{2,3}(-[a-f]{1,4})?"
GRAMMARS = {
    "xgrammar": 'root ::= "<" item{1,3} ">"\nitem ::= [a-c] | "(" item ")" | "!"',
    "llguidance": 'start: "<" item{1,3} ">"\nitem: /[a-c]/ | "[" item "]" | "!"',
}
GRAMMAR_TEXT = re.compile(r"<[a-c()\[\]!]+>")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Return the name of each engine in turn."""
    return str(request.param)


def make(engine: str, tokenizer: Any = BYTES, **options: Any) -> grammar.GrammarMasks:
    return ENGINES[engine](tokenizer, **options)


def words(ids: list[int], vocab_size: int) -> Tensor:
    """Return logits that depend on all ids of a row and on nothing else."""
    seed = hash(tuple(ids)) % 2**31
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


class Model:
    """A callable model of a vocabulary size, which counts its calls."""

    def __init__(self, vocab_size: int = V) -> None:
        self.vocab_size, self.calls = vocab_size, 0

    def __call__(self, input_ids: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        cache = input_ids if cache is None else torch.cat([cache, input_ids], dim=1)
        return torch.stack([words(row, self.vocab_size) for row in cache.tolist()]), cache


def params(rows: int) -> list[SamplingParams]:
    return [SamplingParams(seed=seed) for seed in range(rows)]


def texts(masks: Any, rows: int = 3, model: Model | None = None, **options: Any) -> list[Any]:
    """Return the completions of prompts of one length with these masks."""
    model = Model() if model is None else model
    options = {"max_new_tokens": 200, "eos_token_ids": [END], "tokenizer": BYTES} | options
    prompts = [[65 + row, 66] for row in range(rows)]
    return generate(
        model,
        prompts,
        params(rows),
        vocab_size=model.vocab_size,
        allowed_mask=masks,
        **options,
    )


def assert_conforms(kind: str, text: str) -> None:
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
        assert json.dumps(json.loads(text)) == text  # in one line, with spaces as there
    elif kind == "regex":
        assert re.fullmatch(REGEX, text)
    else:
        assert GRAMMAR_TEXT.fullmatch(text)


def source(kind: str, engine: str) -> Any:
    return {"json_schema": SCHEMA, "regex": REGEX, "grammar": GRAMMARS[engine]}[kind]


@pytest.mark.parametrize("jump_forward", [False, True])
@pytest.mark.parametrize("kind", ["json_schema", "regex", "grammar"])
def test_every_text_conforms(engine: str, kind: str, jump_forward: bool, backend: str) -> None:
    masks = make(engine, **{kind: source(kind, engine)}, jump_forward=jump_forward)
    done = texts(masks, 4, n=2, backend=backend)
    assert len({one.text for one in done}) > 1
    for one in done:
        assert one.finish_reason == "stop"
        assert one.token_ids[-1] == END
        assert END not in one.token_ids[:-1]
        assert_conforms(kind, one.text)


def test_a_schema_as_json_is_the_same(engine: str) -> None:
    one = texts(make(engine, json_schema=SCHEMA))
    assert texts(make(engine, json_schema=json.dumps(SCHEMA, indent=1))) == one


def test_any_whitespace(engine: str) -> None:
    done = texts(make(engine, json_schema=SCHEMA, any_whitespace=True), 8, max_new_tokens=400)
    ended = [one.text for one in done if one.finish_reason == "stop"]
    assert any(json.dumps(json.loads(text)) != text for text in ended)


@pytest.mark.parametrize("jump_forward", [False, True])
def test_free_rows_draw_what_they_draw_alone(engine: str, jump_forward: bool, backend: str) -> None:
    masks = make(engine, regex=[REGEX, None, r"x{30}", None], jump_forward=jump_forward)
    done = texts(masks, 4, n=2, max_new_tokens=20, backend=backend)
    free = texts(None, 4, n=2, max_new_tokens=20, backend=backend)
    assert done[2:4] == free[2:4]
    assert done[6:] == free[6:]
    assert [one.text for one in done[4:6]] == ["x" * 20] * 2
    for one in done[:2]:
        assert re.fullmatch(REGEX, one.text)
    nobody = make(engine, regex=[None] * 4, jump_forward=jump_forward)
    assert texts(nobody, 4, n=2, max_new_tokens=20, backend=backend) == free


def test_tokens_are_the_same_on_every_backend(engine: str) -> None:
    done = [texts(make(engine, json_schema=SCHEMA), backend=name, n=2) for name in ("cpu", "torch")]
    assert done[0] == done[1]


@pytest.mark.parametrize("vocab_size", [V + 1, 288, 289, 1000])
def test_padded_vocabularies(engine: str, vocab_size: int, backend: str) -> None:
    """What the tokenizer does not have is never drawn, and the tokens are the same otherwise."""
    done = texts(make(engine, regex=REGEX), model=Model(vocab_size), backend=backend)
    for one in done:
        assert one.finish_reason == "stop"
        assert re.fullmatch(REGEX, one.text)


def test_a_vocabulary_narrower_than_the_tokenizer_s(engine: str, backend: str) -> None:
    """The end token is beyond it; another one ends the texts."""
    newline = BYTES("\n")["input_ids"][0]
    masks = make(engine, regex=REGEX)
    done = texts(masks, model=Model(END), eos_token_ids=[newline], backend=backend)
    for one in done:
        assert one.token_ids[-1] == newline
        assert re.fullmatch(REGEX, one.text)


@pytest.mark.parametrize("jump_forward", [False, True])
def test_ends_of_the_loop_end_the_texts(engine: str, jump_forward: bool) -> None:
    """Even one that the grammar would allow inside of the text."""
    comma = BYTES(",")["input_ids"][0]
    masks = make(engine, regex=r"[a-c,]{5,9}", jump_forward=jump_forward)
    done = texts(masks, 8, stop_token_ids=[comma])
    assert {one.stop_reason for one in done} == {comma, None}
    for one in done:
        assert re.fullmatch(r"[a-c]{5,9}", one.text)


def test_end_tokens_that_are_given(engine: str) -> None:
    masks = make(engine, regex=r"ab", end_token_ids=[3])
    (done,) = texts(masks, 1, max_new_tokens=5)
    assert done.token_ids == [*BYTES("ab")["input_ids"], 3, 3, 3]  # the loop does not end there


def test_special_tokens_are_not_drawn(engine: str) -> None:
    """Their spelling is text to an engine, but not to the tokenizer."""
    tokenizer = merged_byte_tokenizer(["<|im_start|> and <|im_end|>"] * 3)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    masks = make(engine, tokenizer, regex=r"(<\|im_start\|>|<\|im_end\|>){8}")
    (done,) = texts(
        masks,
        1,
        model=Model(len(tokenizer)),
        tokenizer=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id],
    )
    assert special.isdisjoint(done.token_ids)
    assert re.fullmatch(r"(<\|im_(start|end)\|>){8}", done.text)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_a_text_goes_on_where_it_was_left(engine: str, number: int) -> None:
    masks = make(engine, json_schema=SCHEMA)
    whole = texts(masks, 1)[0].token_ids
    rest = generate(
        Model(),
        [[65, 66]],
        params(1),
        vocab_size=V,
        eos_token_ids=[END],
        output_ids=[whole[:number]],
        allowed_mask=masks,
    )
    assert rest[0].token_ids == whole[number:]


def test_one_object_serves_one_loop_after_the_other(engine: str) -> None:
    masks = make(engine, json_schema=SCHEMA)
    one = texts(masks)
    list(zip(range(3), stream_of(masks), strict=False))  # a loop that is left in the middle
    assert texts(masks) == one


def stream_of(masks: Any) -> Any:
    return generate_stream(Model(), [[1, 2]], params(1), vocab_size=V, allowed_mask=masks)


def test_the_smallest_number_of_tokens_is_kept(engine: str) -> None:
    done = texts(make(engine, regex=r"[a-c]*"), 4, min_new_tokens=12, max_new_tokens=300)
    assert all(len(one.token_ids) > 12 for one in done if one.finish_reason == "stop")
    assert all(re.fullmatch(r"[a-c]*", one.text) for one in done)


def test_a_grammar_that_ends_too_early_leaves_no_token(engine: str) -> None:
    (done,) = texts(make(engine, regex="ab"), 1, min_new_tokens=5)
    assert done.text == "ab"
    assert done.finish_reason == "error"


# ---- jumping forward -----------------------------------------------------------------------------


def test_a_text_that_is_certain_takes_one_call_of_the_model(engine: str) -> None:
    model = Model()
    masks = make(engine, regex=r"abcdefghij[0-9]", jump_forward=True)
    (done,) = texts(masks, 1, model)
    assert re.fullmatch(r"abcdefghij[0-9]", done.text)
    assert model.calls == 3  # the prompt, what is forced, and the end after the digit
    assert len(done.token_ids) == 12


def test_rows_jump_as_far_as_all_of_them_can(engine: str) -> None:
    model = Model()
    masks = make(engine, regex=["abcdef[0-9]", "xyz[0-9]{4}"], jump_forward=True)
    done = texts(masks, 2, model)
    assert re.fullmatch("abcdef[0-9]", done[0].text)
    assert re.fullmatch("xyz[0-9]{4}", done[1].text)
    # the row with fewer forced tokens has two after the first step, which save two calls of eight
    assert model.calls == 6


def test_forced_tokens_have_chunks_and_logprobs(engine: str) -> None:
    masks = make(engine, regex=r"abcdef[0-9]", jump_forward=True)
    model = Model()
    (done,) = texts(masks, 1, model, logprobs="processed")
    assert done.logprobs[:6] == [0.0] * 6
    assert done.logprobs[6] < 0
    assert model.calls == 3
    model = Model()
    (raw,) = texts(masks, 1, model, logprobs="raw")
    assert raw.token_ids == done.token_ids
    assert all(logprob < 0 for logprob in raw.logprobs)
    assert model.calls == 8  # each token's logits are needed


def test_a_jump_ends_at_the_largest_number_of_tokens(engine: str) -> None:
    masks = make(engine, regex=["abcdefghij", "abcdefghij"], jump_forward=True)
    done = texts(masks, 2, max_new_tokens=[3, 6])
    assert [one.text for one in done] == ["abc", "abcdef"]
    assert [one.finish_reason for one in done] == ["length"] * 2


def test_a_jump_ends_at_a_stop_string(engine: str) -> None:
    masks = make(engine, regex=r"ab\.cd[0-9]", jump_forward=True)
    done = texts(masks, 2, stop=[".", None])
    assert done[0].text == "ab"
    assert done[0].stop_reason == "."
    assert re.fullmatch(r"ab\.cd[0-9]", done[1].text)


# ---- in a Sampler --------------------------------------------------------------------------------


def run(sampler: Sampler, ids: list[list[int]], steps: int) -> None:
    """Draw some steps; each row's tokens are added to its list."""
    for _ in range(steps):
        logits = torch.stack([words(row, V) for row in ids])
        for row, token in zip(ids, sampler(logits).tokens.tolist(), strict=True):
            row.append(token)


def test_requests_join_and_leave(engine: str, backend: str) -> None:
    """A row's tokens do not depend on the others, wherever it stands."""
    masks = make(engine, regex=["[a-f]{20}", None, "[0-9]{20}"])
    sampler = Sampler(params(3), vocab_size=V, allowed_mask=masks, backend=backend)
    ids: list[list[int]] = [[], [], []]
    run(sampler, ids, 4)
    sampler.reorder([2, 0])
    ids = [ids[2], ids[0]]
    run(sampler, ids, 4)
    masks.append("[x-z]{20}")
    sampler.add(SamplingParams(seed=7), output_ids=BYTES("xyz")["input_ids"])
    ids.append(BYTES("xyz")["input_ids"])
    run(sampler, ids, 4)
    decoded = [BYTES.decode(row) for row in ids]
    for expected, text in zip(("[0-9]{12}", "[a-f]{12}", "xyz[x-z]{4}"), decoded, strict=True):
        assert re.fullmatch(expected, text)
    alone = make(engine, regex="[a-f]{20}")
    one: list[list[int]] = [[]]
    run(Sampler(params(1), vocab_size=V, allowed_mask=alone, backend=backend), one, 12)
    assert ids[1] == one[0]


def test_after_its_end_a_row_has_end_tokens_alone(engine: str, backend: str) -> None:
    masks = make(engine, regex="ab")
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=masks, backend=backend)
    ids: list[list[int]] = [[]]
    run(sampler, ids, 5)
    assert ids == [[*BYTES("ab")["input_ids"], END, END, END]]


def test_tokens_that_are_taken_away(engine: str, backend: str) -> None:
    """The draws that follow are those that followed the first time."""
    masks = make(engine, regex="[a-f]{6}")
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=masks, backend=backend)
    ids: list[list[int]] = [[]]
    run(sampler, ids, 8)
    first = list(ids[0])
    assert first[-2:] == [END, END]
    for number in (1, 2, 3, 5, 8):
        sampler.rollback(0, number)
        del ids[0][-number:]
        run(sampler, ids, number)
        assert ids[0] == first


def test_tokens_that_are_appended(engine: str) -> None:
    masks = make(engine, regex="[a-f]{3}[0-9]{3}")
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=masks)
    sampler.extend(0, BYTES("abc")["input_ids"])
    ids = [BYTES("abc")["input_ids"]]
    run(sampler, ids, 3)
    assert re.fullmatch("abc[0-9]{3}", BYTES.decode(ids[0]))


def test_a_token_that_does_not_conform(engine: str) -> None:
    """It raises, also the next time, and changes nothing; without the token the row goes on."""
    masks = make(engine, regex="[a-f]{6}")
    sampler = Sampler(params(2), vocab_size=V, allowed_mask=masks)
    ids: list[list[int]] = [[], []]
    run(sampler, ids, 2)
    sampler.extend(1, BYTES("x")["input_ids"])
    token = BYTES("x")["input_ids"][0]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^row 1 has got token {token}, which its grammar"):
            sampler(torch.zeros(2, V))
    sampler.rollback(1, 1)
    run(sampler, ids, 5)
    for row in ids:
        assert re.fullmatch("[a-f]{6}", BYTES.decode(row[:6]))
        assert row[6] == END


def test_a_restored_sampler_needs_the_same_object(engine: str) -> None:
    masks = make(engine, regex="[a-f]{6}")
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=masks)
    ids: list[list[int]] = [[]]
    run(sampler, ids, 3)
    state = sampler.state_dict()
    other = Sampler.from_state_dict(state, allowed_mask=make(engine, regex="[a-f]{6}"))
    with pytest.raises(ValueError, match=r"^row 0 must have been asked for from its beginning on"):
        other(torch.zeros(1, V))
    run(Sampler.from_state_dict(state, allowed_mask=masks), ids, 4)
    assert re.fullmatch("[a-f]{6}", BYTES.decode(ids[0][:6]))


# ---- in the other loops --------------------------------------------------------------------------


def test_stream(engine: str, tiny_llama: Any) -> None:
    model = tiny_llama(V)
    sampler = Sampler(params(2), vocab_size=V)
    masks = make(engine, regex=["[a-f]{3,5}", "[0-9]{2}"])
    steps = list(
        stream(
            model,
            torch.tensor([[1, 2], [3, 4]]),
            sampler,
            max_new_tokens=20,
            eos_token_ids=[END],
            allowed_mask=masks,
        )
    )
    assert steps[-1].ended == [True, True]
    rows = [[step.tokens[row] for step in steps if step.tokens[row] >= 0] for row in (0, 1)]
    assert re.fullmatch("[a-f]{3,5}", BYTES.decode(rows[0][:-1]))
    assert re.fullmatch("[0-9]{2}", BYTES.decode(rows[1][:-1]))
    with pytest.raises(ValueError, match=r"^allowed_mask must be None where the sampler has"):
        stream(model, torch.tensor([[1], [2]]), sampler, max_new_tokens=1, allowed_mask=masks)


@pytest.mark.parametrize("jump_forward", [False, True])
def test_fused_generate_gives_what_generate_gives(
    engine: str, jump_forward: bool, tiny_llama: Any
) -> None:
    from llm_sampling.integrations.huggingface import fused_generate

    model = tiny_llama(V, eos_token_id=END, pad_token_id=END)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    masks = make(engine, regex=["(ab|cd){2,3}-end", None], jump_forward=jump_forward)
    # jumps give the model several tokens at once, which it may round in another way
    logprobs = "raw" if jump_forward else None
    expected = generate(
        model, ids, params(2), n=2, max_new_tokens=15, allowed_mask=masks, logprobs=logprobs
    )
    got = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=fused_generate,
        params=params(2),
        allowed_mask=masks,
        max_new_tokens=15,
        num_return_sequences=2,
        do_sample=True,
        return_dict_in_generate=True,
    )
    for row, one, reason in zip(got.sequences.tolist(), expected, got.finish_reasons, strict=True):
        assert row[3 : 3 + len(one.token_ids)] == one.token_ids
        assert reason == one.finish_reason
    for one in expected[:2]:
        assert re.fullmatch("(ab|cd){2,3}-end", BYTES.decode(one.token_ids[:-1]))


def test_fused_generate_refuses_what_is_no_callback(tiny_llama: Any) -> None:
    from llm_sampling.integrations.huggingface import fused_generate

    with pytest.raises(ValueError, match=r"^allowed_mask must be None or a callback"):
        tiny_llama(V).generate(
            torch.tensor([[1, 2]]),
            custom_generate=fused_generate,
            params=params(1),
            allowed_mask=[[1]],
            max_new_tokens=2,
        )


def test_rows_that_have_ended_are_not_asked_for() -> None:
    """Each loop tells the callback which rows have ended, and with which tokens they do."""
    asked: list[list[int]] = []
    ended: list[int] = []

    def callback(step: MaskStep) -> Tensor:
        asked.append([row.id for row in step.rows])
        ended.extend(step.ended)
        assert step.prompts == 2
        for place, row in enumerate(step.rows):
            assert row.prompt == row.id // 2
            assert row.ends == (END,)
            allowed = END if len(asked) > row.id else 70
            step.bitmask[place] = 0
            step.bitmask[place, allowed >> 5] = 1 << (allowed & 31)
        return step.bitmask

    done = texts(callback, 2, n=2)
    assert [len(one.token_ids) for one in done] == [1, 2, 3, 4]
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    assert ended == [0, 1, 2]


# ---- what is refused -----------------------------------------------------------------------------

#: options -> the beginning of the message
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "one of json_schema, regex and grammar must be given, got none"),
    "two": (
        {"json_schema": {}, "regex": "a"},
        "one of json_schema, regex and grammar must be given, got json_schema, regex",
    ),
    "no prompt": ({"regex": []}, "regex must be one for all prompts, or one for each, got []"),
    "a number": ({"regex": 5}, "regex must be a text, or a list of a text or None"),
    "bytes": ({"grammar": b"x"}, "grammar must be a text, or a list of a text or None"),
    "no JSON": ({"json_schema": "{"}, "json_schema must be a JSON schema (a dict, or its JSON)"),
    "no schema": ({"json_schema": "[]"}, "json_schema must be a JSON schema (a dict, or its"),
    "a bool": ({"json_schema": [True]}, "json_schema must be a JSON schema (a dict, or its"),
    "a set": ({"json_schema": {"enum": {1}}}, "json_schema must be a JSON schema (a dict, or"),
    "a flag": ({"regex": "a", "jump_forward": 1}, "jump_forward must be True or False, got 1"),
    "spaces": ({"regex": "a", "any_whitespace": None}, "any_whitespace must be True or False"),
    "ends": ({"regex": "a", "end_token_ids": "x"}, "end_token_ids must be a collection of token"),
    "a negative end": (
        {"regex": "a", "end_token_ids": [-1]},
        "end_token_ids must be an integer >= 0, got -1",
    ),
    "an open group": ({"regex": "("}, "regex must be one that ENGINE can compile: "),
    "a wrong range": ({"regex": [None, "[z-a]"]}, "regex must be one that ENGINE can compile: "),
    "lookahead": ({"regex": "(?=a)b"}, "regex must be one that ENGINE can compile: "),
    "a type": ({"json_schema": {"type": "x"}}, "json_schema must be one that ENGINE can compile: "),
    "properties": (
        {"json_schema": {"type": "object", "properties": 5}},
        "json_schema must be one that ENGINE can compile: properties must be an object",
    ),
    "a pattern": (
        {"json_schema": {"type": "string", "pattern": "("}},
        "json_schema must be one that ENGINE can compile: ",
    ),
    "a rule": ({"grammar": "x"}, "grammar must be one that ENGINE can compile: "),
    "no grammar": ({"grammar": ""}, "grammar must be one that ENGINE can compile: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured(engine: str, name: str) -> None:
    options, message = REFUSED[name]
    pattern = f"^{re.escape(message.replace('ENGINE', engine))}"
    with pytest.raises(ValueError, match=pattern) as error:
        make(engine, **options)
    assert "/cpp/" not in str(error.value)
    kinds = {name: value for name, value in options.items() if name in grammar.KINDS}
    if not any(isinstance(value, list) for value in kinds.values()) and kinds == options:
        with pytest.raises(ValueError, match=pattern):
            grammar.check(engine, **options)


def test_what_is_checked_without_a_tokenizer(engine: str) -> None:
    grammar.check(engine, json_schema=SCHEMA)
    grammar.check(engine, regex=REGEX)
    grammar.check(engine, grammar=GRAMMARS[engine])
    with pytest.raises(ValueError, match=r"^engine must be 'xgrammar' or 'llguidance', got 'outl"):
        grammar.check("outlines", regex="a")  # type: ignore[arg-type]


def test_a_tokenizer_that_is_none(engine: str) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer must be a fast tokenizer of transformers"):
        make(engine, object(), regex="a")


def test_a_list_has_one_for_each_prompt(engine: str) -> None:
    for number in (1, 3):
        masks = make(engine, regex=["a"] * number)
        message = f"regex must have one for each of 2 prompts, got {number}"
        with pytest.raises(ValueError, match=f"^{message}$"):
            texts(masks, 2)
    sampler = Sampler(params(2), vocab_size=V, allowed_mask=make(engine, regex=["a"]))
    with pytest.raises(ValueError, match=r"^regex must have one for each prompt, and there is"):
        sampler(torch.zeros(2, V))
    with pytest.raises(ValueError, match=r"^append needs a grammar for each prompt"):
        make(engine, regex="a").append("b")
    with pytest.raises(ValueError, match=r"^regex must be one that"):
        make(engine, regex=["a"]).append("(")


def test_an_engine_that_is_not_installed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == engine:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    message = (
        f"grammars need the extra 'grammar' ({engine} not found): "
        "pip install 'llm-sampling[grammar]'"
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        grammar.check(engine, regex="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [[[1]], torch.ones(1, V, dtype=torch.bool), "x"], ids=repr)
def test_the_loops_refuse_what_is_no_callback(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^allowed_mask must be None or a callback"):
        texts(wrong)


def test_a_callback_that_raises_ends_the_loop() -> None:
    def callback(step: MaskStep) -> None:
        if not step.rows[0].is_new:
            raise LookupError("nothing to say")

    with pytest.raises(LookupError, match="nothing to say"):
        texts(callback)


def test_a_copy_stands_where_it_stood(engine: str) -> None:
    masks = make(engine, regex="[a-f]{4}[0-9]{4}")
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=masks)
    ids: list[list[int]] = [[]]
    run(sampler, ids, 3)
    other, others = copy.deepcopy(sampler), copy.deepcopy(ids)
    run(sampler, ids, 6)
    run(other, others, 6)
    assert ids == others
    assert other.allowed_mask is not masks
    with pytest.raises(TypeError, match=r"^a GrammarMasks cannot be pickled"):
        pickle.dumps(sampler)


def test_a_tokenizer_without_an_end(engine: str) -> None:
    tokenizer = copy.deepcopy(BYTES)
    tokenizer.eos_token = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = make(engine, tokenizer, regex="[!-~]{4}")
    with pytest.raises(ValueError, match=r"^end_token_ids must be given where neither"):
        Sampler(params(1), vocab_size=V, allowed_mask=masks)(torch.zeros(1, V))
    for one in texts(masks, 2, eos_token_ids=[3]):
        assert one.token_ids[4:] == [3]
        assert re.fullmatch("[!-~]{4}", BYTES.decode(one.token_ids[:4]))


@pytest.mark.parametrize("token", [V, 299])
def test_an_appended_token_that_the_tokenizer_does_not_have(engine: str, token: int) -> None:
    masks = make(engine, regex="[!-~]*")
    sampler = Sampler(params(1), vocab_size=300, allowed_mask=masks)
    sampler.extend(0, [token])
    with pytest.raises(ValueError, match=f"^row 0 has got token {token}, which its grammar"):
        sampler(torch.zeros(1, 300))
    sampler.rollback(0, 1)
    assert 33 <= BYTES.decode(sampler(torch.zeros(1, 300)).tokens.tolist()).encode()[0] <= 126


def test_an_end_token_inside_of_a_text_is_refused(engine: str) -> None:
    sampler = Sampler(params(1), vocab_size=V, allowed_mask=make(engine, regex="abc"))
    sampler.extend(0, [*BYTES("ab")["input_ids"], END])
    with pytest.raises(ValueError, match=f"^row 0 has got token {END}, which its grammar"):
        sampler(torch.zeros(1, V))
