"""Tests of RowText: stop strings in the text of tokens, some of them special or the last."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_stop_strings import whole
from toy_tokenizers import merged_byte_tokenizer, transformers, word_piece_tokenizer

from llm_sampling.generation.rows import RowText
from llm_sampling.generation.stop_strings import StopStrings

TEXTS = ["one two", "끝 끝 stop", "a<|im_end|>b", "User: <|im_start|>"]
MERGED = merged_byte_tokenizer(TEXTS * 3)


def row(text, stop, prompt="", include=False, limit=1, tokenizer=MERGED, end=None):
    """Feed the tokens of ``text`` until the stop; the pieces, and the stop string."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    watched = StopStrings(stop, include=include, stop_limit=limit)
    of_row = RowText(tokenizer, prompt_ids, watched)
    pieces = []
    for token in ids:
        is_end = end is not None and token == tokenizer.convert_tokens_to_ids(end)
        pieces.append(of_row.feed(token, is_end=is_end))
        if is_end or of_row.stop_string is not None:
            break
    return "".join(pieces) + of_row.finish(), of_row.stop_string


@pytest.mark.parametrize(
    ("text", "stop", "shown", "included"),
    [
        ("one<|im_end|>two", "<|im_end|>", "one", "one<|im_end|>"),
        ("one<|im_end|>\ntwo", "<|im_end|>\n", "one", "one<|im_end|>\n"),
        ("one<|im_end|>two", "ne<|im_end|>", "o", "one<|im_end|>"),
        ("one<|im_end|>two", "e<|im_end|>t", "on", "one<|im_end|>t"),
        ("one<|im_end|><|im_start|>two", "<|im_start|>", "one", "one<|im_start|>"),
        ("o<|im_end|><|im_start|>two", "<|im_end|><|im_start|>t", "o", "o<|im_end|><|im_start|>t"),
        ("o<|im_end|><|im_end|>\n", "<|im_end|>\n", "o", "o<|im_end|>\n"),
        ("끝<|im_end|>끝", "<|im_end|>끝", "끝", "끝<|im_end|>끝"),
        ("one<|im_end|>two", "end", "one", "oneend"),
    ],
)
@pytest.mark.parametrize("prompt", ["", "<|im_end|>a "])
def test_special_tokens_in_stop_strings(text, stop, shown, included, prompt):
    assert row(text, stop, prompt) == (shown, stop)
    assert row(text, stop, prompt, include=True) == (included, stop)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("a<|im_end|>b", "ab"),
        ("a<|im_end|>b", "<|im_start|>"),
        ("a<|im_end|>b", "<|im_end|>c"),
        ("a<|im_end|>bc<|im_start|>", "a<|im_end|>c"),
        ("a<|im_end|>", "b<|im_end|>"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_separates_the_text_and_is_not_returned(text, stop, include):
    shown = text.replace("<|im_end|>", "").replace("<|im_start|>", "")
    assert row(text, stop, include=include) == (shown, None)


def test_the_limit_counts_special_tokens():
    text = "a<|im_end|>b<|im_end|>c"
    assert row(text, "<|im_end|>", limit=2) == ("ab", "<|im_end|>")
    assert row(text, "<|im_end|>", limit=2, include=True) == ("ab<|im_end|>", "<|im_end|>")
    assert row(text, "<|im_end|>", limit=3) == ("abc", None)


def test_a_stop_string_before_a_special_token_of_words():
    """The tokenizer puts a space before each word, and so before a special token."""
    tokenizer = word_piece_tokenizer(["one two"])
    assert row("one <|im_end|> two", "<|im_end|>", tokenizer=tokenizer) == ("one", "<|im_end|>")
    assert row("one <|im_end|> two", "one <|im_end|>", tokenizer=tokenizer)[1] is not None
    assert row("one <|im_end|> two", "one two", tokenizer=tokenizer) == ("one two", None)


@pytest.mark.parametrize("end", ["<|im_end|>", "s"])
def test_the_text_of_an_end_token_is_searched_and_not_returned(end):
    assert row(f"one{end}", [], end=end) == ("one", None)
    assert row(f"one{end}", "two", end=end) == ("one", None)
    assert row(f"one{end}", end, end=end) == ("one", end)
    assert row(f"one{end}", f"e{end}", end=end) == ("on", f"e{end}")
    assert row(f"one{end}", f"e{end}", include=True, end=end) == (f"one{end}", f"e{end}")
    assert row(f"one{end}", f"e{end}!", include=True, end=end) == ("one", None)


def test_an_end_token_after_half_a_character():
    first = MERGED("é")["input_ids"][0]
    (end,) = MERGED("<|im_end|>")["input_ids"]
    of_row = RowText(MERGED, [], StopStrings("\N{REPLACEMENT CHARACTER}<|im_end|>"))
    assert of_row.feed(first) == of_row.feed(end, is_end=True) == ""
    assert of_row.stop_string == "\N{REPLACEMENT CHARACTER}<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "b", "<|im_end|>", "<|im_start|>", ">"]), max_size=8),
    stop=st.lists(st.sampled_from(["a", "b", "<|im_end|>", "|>", "<|im_"]), min_size=1, max_size=3),
)
@example(parts=["a", "<|im_end|>"], stop=["<|im_end|>"])
@example(parts=["a", "<|im_end|>", "b"], stop=["a", "b"])
def test_transformers_finds_the_same(parts, stop):
    """Its ``stop_strings`` are searched at the end of the ids, after each token."""
    ids = [MERGED.convert_tokens_to_ids(part) for part in parts]
    stop_string = "".join(stop)
    peer = transformers.StopStringCriteria(MERGED, [stop_string])
    of_row = RowText(MERGED, [], StopStrings(stop_string))
    for count, token in enumerate(ids, 1):
        of_row.feed(token)
        is_done = bool(peer(torch.tensor([ids[:count]]), None))
        assert (of_row.stop_string is not None) == is_done
        if is_done:
            break


PARTS = ["a", "b", "끝", ">", "<", "<|im_end|>", "<|im_start|>"]


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=10),
    stop=st.lists(
        st.lists(st.sampled_from([*PARTS, "|>", "im"]), min_size=1, max_size=3).map("".join),
        max_size=3,
    ),
    limit=st.integers(1, 2),
    include=st.booleans(),
)
@example(parts=["a", "<|im_end|>", "b", "끝"], stop=["a<|im_end|>b끝"], limit=1, include=True)
@example(parts=["<", "<|im_end|>", "b"], stop=["<|im_end|>a", "im"], limit=1, include=True)
def test_the_rule_in_the_text_with_special_tokens(parts, stop, limit, include):
    """The stop string ends the text that has special tokens; what is before it has them not."""
    text = "".join(parts)
    before, found = whole(text, stop, limit)
    place, shown = 0, ""
    for part in parts:
        shown += "" if part.startswith("<|") else part[: max(0, len(before) - place)]
        place += len(part)
    if include and found is not None:
        shown += found
    assert row(text, stop, include=include, limit=limit) == (shown, found)
