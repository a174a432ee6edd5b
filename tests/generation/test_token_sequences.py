"""Tests of the token sequences of strings: DRY's breakers and bad words."""

import random

import numpy as np
import pytest
from toy_tokenizers import (
    SPECIAL,
    byte_tokenizer,
    merged_byte_tokenizer,
    piece_tokenizer,
    tokenizers,
    transformers,
    word_piece_tokenizer,
    word_tokenizer,
)

from llm_sampling.generation import bad_words_from, dry_breakers_from

CORPUS = [
    'plain text: "more" of it.\n\n* one\n* two',
    "User: who?\nUser: you!\n",
    "é ê 끝, 🙂🙃 日本",
]
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "merged bytes": merged_byte_tokenizer(CORPUS * 3),
    "pieces without a leading space": piece_tokenizer("strip"),
    "pieces": piece_tokenizer("keep"),
    "metaspace": piece_tokenizer("metaspace"),
}
BYTES, MERGED, PIECES = (TOKENIZERS[name] for name in ("bytes", "merged bytes", "pieces"))
WORDS = word_tokenizer()
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def ids_of_bytes(text):
    """Return the ids of a text by BYTES."""
    return tuple(BYTES(text, add_special_tokens=False)["input_ids"])


def names(tokenizer, sequences):
    return [tokenizer.convert_ids_to_tokens(list(sequence)) for sequence in sequences]


def added(tokenizer, sequence):
    """Return the text that tokens add to one that ends with a full stop."""
    before = tokenizer("a.", add_special_tokens=False)["input_ids"]
    options = {"clean_up_tokenization_spaces": False}
    start, whole = (tokenizer.decode(ids, **options) for ids in (before, [*before, *sequence]))
    assert whole.startswith(start)
    return whole[len(start) :]


# ---- DRY's breakers


def test_a_string_of_several_bytes_is_a_sequence_of_them():
    for string in ("ab", "é", "日本", "User:", "<<"):
        ids = ids_of_bytes(string)
        assert len(ids) == len(string.encode())
        assert dry_breakers_from(BYTES, [string]) == (ids,)


def test_a_token_that_contains_the_string_is_a_breaker_alone():
    assert dry_breakers_from(BYTES, [":", ":"]) == (ids_of_bytes(":"),)
    found = names(WORDS, dry_breakers_from(WORDS, ["h", "n"]))
    kinds = ["<0x68>", "<0x6E>", "▁and", "▁then", "th", "▁don", "<end>"]
    assert found == [[name] for name in kinds]


def test_the_rest_follows_a_token_that_ends_with_a_beginning():
    assert names(WORDS, dry_breakers_from(WORDS, ["nds"])) == [
        ["<0x6E>", "<0x64>", "s"],
        ["▁and", "s"],
        ["▁then", "<0x64>", "s"],
        ["▁don", "<0x64>", "s"],
    ]


def test_a_token_may_end_with_several_beginnings():
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={"a": 0, "b": 1, "aa": 2, "ba": 3}, merges=[("a", "a"), ("b", "a")]
        )
    )
    core.decoder = tokenizers.decoders.Fuse()
    # of "aab": "a" + "ab", "aa" + "b" and again "aa" + "ab"
    found = dry_breakers_from(core, ["aab"])
    assert found == ((0, 0, 1), (2, 0, 1), (2, 1), (3, 0, 1))


@every_tokenizer
def test_the_default_strings_are_llama_cpp_s(tokenizer):
    found = dry_breakers_from(tokenizer)
    assert found == dry_breakers_from(tokenizer, ["\n", ":", '"', "*"])
    assert {added(tokenizer, one) for one in found} >= {"\n", ":", '"', "*"}
    for token in tokenizer.get_vocab().values():
        has = any(mark in added(tokenizer, [token]) for mark in '\n:"*')
        assert ((token,) in found) == has
    assert all(len(one) == 1 for one in found)


@every_tokenizer
def test_every_sequence_writes_its_string(tokenizer):
    draw = random.Random(0)
    number = 0
    for _ in range(40):
        text = draw.choice(CORPUS)
        start = draw.randrange(len(text) - 1)
        string = text[start : start + draw.randint(1, 6)]
        found = dry_breakers_from(tokenizer, [string])
        assert all(string in added(tokenizer, sequence) for sequence in found), string
        number += len(found)
    assert number > 40


def test_a_text_of_single_bytes_completes_a_breaker_at_each_place():
    text = "aab aaab: é日é\n\n:"
    ids = ids_of_bytes(text)
    for string in ("aab", "aa", "é", "é日", "\n:", "\n\n", " "):
        (breaker,) = dry_breakers_from(BYTES, [string])
        places = [i for i in range(len(text)) if text.startswith(string, i)]
        found = [i for i in range(len(ids)) if ids[i : i + len(breaker)] == breaker]
        assert found == [len(text[:place].encode()) for place in places] != []


def test_a_rest_in_the_middle_of_a_character():
    """Tokens that end after one, two or three bytes of a character of four."""
    smile = "🙂".encode()
    found = dry_breakers_from(MERGED, ["🙂b"])
    spelt = [bytes(MERGED_BYTES[token] for token in "".join(one)) for one in names(MERGED, found)]
    assert all(text.endswith(smile + b"b") for text in spelt)
    assert len(found) > 1
    heads = {names(MERGED, [one[:1]])[0][0] for one in found}
    assert "ð" in heads  # the first byte alone
    for one in dry_breakers_from(PIECES, ["日"]):
        assert names(PIECES, [one]) == [["<0xE6>", "<0x97>", "<0xA5>"]]


#: letter of byte-level BPE -> byte, of the tokenizer's own encoding of every byte of UTF-8
MERGED_BYTES = {
    BYTES.convert_ids_to_tokens([token])[0]: byte
    for text in [
        *map(chr, range(0x800)),
        "ࠀ",
        "က",
        "일",
        *map(chr, range(0x1000, 0x10FFFF, 0x1000)),
    ]
    if not 0xD800 <= ord(text) < 0xE000
    for token, byte in zip(ids_of_bytes(text), text.encode(), strict=True)
}


def test_nothing_of_a_tokenizer_that_cannot_write_a_string():
    letters = word_piece_tokenizer(["abc do"])
    assert dry_breakers_from(letters, ["\n", "日", "a\nb"]) == ()
    assert names(letters, dry_breakers_from(letters, ["bc"])) == [["b", "##c"], ["##b", "##c"]]


def test_special_tokens_have_the_text_that_they_are_spelt_with():
    special = MERGED.convert_tokens_to_ids(SPECIAL[0])
    found = dry_breakers_from(MERGED, [SPECIAL[0]])
    assert found[0] == (special,)
    spelt = {"".join(one) for one in names(MERGED, found[1:])}  # tokens of text may write it too
    assert spelt == {SPECIAL[0]}
    assert dry_breakers_from(MERGED, ["|im_st"])[0] == (special,)
    # at the end of a string it is that token
    last = names(MERGED, dry_breakers_from(MERGED, ["b" + SPECIAL[0]]))
    assert all(one[-1] == SPECIAL[0] for one in last)
    assert (special,) not in dry_breakers_from(MERGED)


def test_no_more_than_20_tokens_follow_the_first():
    string = "0123456789" * 1000
    ids = ids_of_bytes(string)
    assert dry_breakers_from(BYTES, [string]) == (ids[:21],)
    assert dry_breakers_from(BYTES, [string[:21]]) == (ids[:21],)
    assert dry_breakers_from(BYTES, [string[:20]]) == (ids[:20],)


def test_single_tokens_come_first_and_nothing_twice():
    strings = ["\nUser", "e", "\n", "use", "User:", "e", "\n\n", "日"]
    found = dry_breakers_from(MERGED, strings)
    alone = [one for one in found if len(one) == 1]
    assert list(found) == [*sorted(alone), *sorted(set(found) - set(alone))]
    assert len(set(found)) == len(found) > len(alone) > 1
    assert dry_breakers_from(MERGED, set(strings)) == found
    assert dry_breakers_from(MERGED, np.array(strings[::-1])) == found
    assert all(type(token) is int for one in found for token in one)


# ---- words


@every_tokenizer
def test_a_word_comes_with_and_without_a_space(tokenizer):
    for word in ("then", "plain", "é", "日", "don't", "🙂"):
        found = bad_words_from(tokenizer, [word])
        assert {added(tokenizer, one) for one in found} <= {word, " " + word}
        assert word in {added(tokenizer, one) for one in found}
        # what is written within a text ends with one of them
        for text in ("a." + word, "a " + word):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert any(tuple(ids[-len(one) :]) == one for one in found), text
        assert bad_words_from(tokenizer, [" " + word, word, "  " + word]) == found


def test_forms_of_pieces():
    assert names(PIECES, bad_words_from(PIECES, ["s"])) == [["s"], ["▁s"]]
    assert names(PIECES, bad_words_from(PIECES, ["as"])) == [["a", "s"], ["▁a", "s"]]
    # a space that is a token of its own makes the second form one that ends with the first
    assert names(BYTES, bad_words_from(BYTES, ["as"])) == [["a", "s"]]


def test_a_sequence_that_ends_with_another_bans_nothing_more():
    assert bad_words_from(BYTES, ["s", "as", "sa"]) == (ids_of_bytes("s"), ids_of_bytes("sa"))


def test_words_of_spaces_and_lines():
    assert bad_words_from(BYTES, ["\n", "  "]) == (ids_of_bytes("\n"), ids_of_bytes("  "))
    assert names(PIECES, bad_words_from(PIECES, ["\n"])) == [["<0x0A>"]]


def test_a_special_token_is_a_word():
    special = MERGED.convert_tokens_to_ids(SPECIAL[1])
    assert bad_words_from(MERGED, SPECIAL[1:]) == ((special,),)


def test_no_words_and_no_strings():
    assert dry_breakers_from(BYTES, []) == bad_words_from(BYTES, ()) == ()


# ---- tokenizers of every kind


@every_tokenizer
def test_a_tokenizer_of_tokenizers(tokenizer):
    core = tokenizer.backend_tokenizer
    strings = ["\nUser:", "e", "日", "d then"]
    assert dry_breakers_from(core, strings) == dry_breakers_from(tokenizer, strings)
    assert bad_words_from(core, ["then", "日"]) == bad_words_from(tokenizer, ["then", "日"])


def test_padding_is_no_text():
    core = byte_tokenizer().backend_tokenizer
    core.enable_padding(length=40, pad_id=7)
    assert bad_words_from(core, ["then"]) == (ids_of_bytes("then"),)
    assert dry_breakers_from(core, ["then"]) == (ids_of_bytes("then"),)


def test_a_tokenizer_that_truncates_is_refused():
    core = byte_tokenizer().backend_tokenizer
    core.enable_truncation(3)
    assert dry_breakers_from(core) == dry_breakers_from(BYTES)
    for call in (
        lambda: bad_words_from(core, ["then"]),
        lambda: dry_breakers_from(core, ["thens"]),
    ):
        with pytest.raises(ValueError, match="tokenizer must be one that does not truncate '"):
            call()
    # transformers' own tokenizers are asked not to
    held = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    assert bad_words_from(held, ["then"]) == (ids_of_bytes("then"),)


def test_a_slow_tokenizer():
    slow = transformers.ByT5Tokenizer()
    assert not hasattr(slow, "backend_tokenizer")
    found = dry_breakers_from(slow, ["ab", ":", "<pad"])
    ids = [tuple(slow(text, add_special_tokens=False)["input_ids"]) for text in (":", "<pad", "ab")]
    assert found == ((slow.pad_token_id,), ids[0], ids[1], ids[2])
    assert bad_words_from(slow, ["ab"]) == (ids[2],)


@pytest.mark.model
def test_a_real_tokenizer(smollm):
    tokenizer = smollm.tokenizer
    found = dry_breakers_from(tokenizer)
    texts = {token: tokenizer.decode([token]) for token in tokenizer.get_vocab().values()}
    assert found == tuple(
        (token,) for token, text in sorted(texts.items()) if any(mark in text for mark in '\n:"*')
    )
    assert len(found) > 300
    words = names(tokenizer, bad_words_from(tokenizer, ["colour", "🙂", "<|im_end|>", "\n"]))
    assert words == [
        ["<|im_end|>"],
        ["Ċ"],
        ["ĠĊ"],
        ["Ġcolour"],
        ["colour"],
        ["ĠðŁĻĤ"],
        ["ðŁ", "ĻĤ"],
    ]
    lines = names(tokenizer, dry_breakers_from(tokenizer, ["\nUser:"]))
    assert {tuple(one[1:]) for one in lines} == {("User", ":")}
    assert ["ĊĉĊ", "User", ":"] in lines
    for one in dry_breakers_from(tokenizer, ["\n\nUser:", "。", "🙂!", "###"]):
        text = tokenizer.decode(list(one))
        assert any(string in text for string in ("\n\nUser:", "。", "🙂!", "###")), one


# ---- what is refused

WRONG = [
    ("\n", "a collection of strings, got '\\n'"),
    (b"a", "a collection of strings, got b'a'"),
    (None, "a collection of strings, got None"),
    (5, "a collection of strings, got 5"),
    (iter("ab"), "a collection of strings, got <str"),
    ([b"a"], "a collection of strings, got [b'a']"),
    (["a", None], "a collection of strings, got ['a', None]"),
    ([["a"]], "a collection of strings, got [['a']]"),
    (np.array("a"), "a collection of strings, got array('a'"),
    ([""], "no empty string, got ['']"),
    (["a", ""], "no empty string, got ['a', '']"),
    (["a", "\ud800"], "strings of valid Unicode, got '\\ud800'"),
]


@pytest.mark.parametrize(("value", "message"), WRONG)
def test_wrong_strings(value, message):
    verb = "have" if message.startswith("no") else "be"
    for call, name in ((dry_breakers_from, "strings"), (bad_words_from, "words")):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call(BYTES, value)
        assert str(caught.value).startswith(f"{name} must {verb} {message}")


@pytest.mark.parametrize("tokenizer", [None, "gpt2", 5, object(), {"a": 1}, transformers])
def test_wrong_tokenizers(tokenizer):
    for call in (dry_breakers_from, bad_words_from):
        with pytest.raises(
            ValueError, match="tokenizer must be a tokenizer of transformers or tokenizers, got"
        ):
            call(tokenizer, ["a"])


def test_a_word_that_the_tokenizer_cannot_write_is_refused():
    """vLLM would ban the unknown token."""
    letters = word_piece_tokenizer(["abc do"])
    for word in ("日", "a日", "\n"):
        with pytest.raises(ValueError, match="words must be strings that the tokenizer has tokens"):
            bad_words_from(letters, ["ab", word])
