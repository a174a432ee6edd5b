"""Tests of TextDecoder: prompt and pieces are the decoding of all tokens, wherever they are cut."""

import codecs
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_tokenizers import (
    SPECIAL,
    WORDS,
    byte_tokenizer,
    merged_byte_tokenizer,
    piece_tokenizer,
    word_end_tokenizer,
    word_piece_tokenizer,
    word_tokenizer,
)

from llm_sampling.generation import TextDecoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: As ByteFallback does it: Python's own handlers put one U+FFFD for several bytes of a character.
codecs.register_error("each byte", lambda e: (REPLACEMENT * (e.end - e.start), e.end))

#: Scripts and signs that take several bytes, several characters or several tokens.
CORPUS = {
    "plain": "plain text, and more of it. It's one, isn't it ?",
    "joined emoji": "a👩‍👩‍👧‍👦b 🏳️‍🌈🧑🏽‍🚀",
    "skin tones": "👍👍🏻👍🏿 👋🏾.",
    "flags": "🇩🇪🇰🇷🇯🇵 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "Hangul": "대화 끝, 안녕하세요.",
    "Hangul of jamo": unicodedata.normalize("NFD", "대화 한글"),
    "Latin with marks": unicodedata.normalize("NFD", "é ñ å ş ü ǖ"),
    "Devanagari": "नमस्ते क्‍ष क्‌ष",
    "Thai": "สวัสดี น้ำ ที่",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "Arabic": "\u200fمرحبا، نص عربي\u200e abc",
    "Hebrew": "\u202bשָׁלוֹם עולם\u202c (abc)",
    "Persian": "می‌خواهم",
    "astral": "𝔘𝔫𝔦 𐍈 𠀀𠀁 𝄞",
    "Chinese and Japanese": "日本語の文章。中文字符，漢字",
    "spaces": "  two  spaces and .  A space before , and ' s  ",
    "lines": "\n\ttab\tand\r\nlines\n\n",
    "replacement": f"a{REPLACEMENT}b {REPLACEMENT}{REPLACEMENT} c {REPLACEMENT}日{REPLACEMENT}",
    "special": "one<|im_end|>\n<|im_start|>끝<|im_end|><|im_end|>🙂 <|im_start|>",
}
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "merged bytes": merged_byte_tokenizer([*CORPUS.values()] * 2),
    "pieces without a leading space": piece_tokenizer("strip"),
    "pieces": piece_tokenizer("keep"),
    "metaspace": piece_tokenizer("metaspace"),
    "word pieces": word_piece_tokenizer(CORPUS.values()),
    "ends of words": word_end_tokenizer(CORPUS.values()),
}
BYTES, WORD = TOKENIZERS["bytes"], word_tokenizer()


def decoded(tokenizer, tokens, prompt=(), decoder=TextDecoder):
    """Return the pieces, and last what comes at the end."""
    row = decoder(tokenizer, prompt)
    return [*(row.decode(token) for token in tokens), row.finish()]


def decoding(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ids_of(tokenizer, text):
    """Return the ids of a text, and put a special token inside its first characters too."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids(SPECIAL[0])
    return ids if special is None else [*ids[:2], special, *ids[2:]]


def unfinished(tokenizer, ids):
    """Return how many of the last ids are byte tokens of a character that is not whole."""
    ids = [i for i in ids if i not in tokenizer.all_special_ids]
    run = []
    for name in reversed(tokenizer.convert_ids_to_tokens(ids)):
        if not (name.startswith("<0x") and tokenizer.backend_tokenizer.model.byte_fallback):
            break
        run.insert(0, int(name[3:5], 16))
    decoder = codecs.getincrementaldecoder("utf-8")("each byte")
    decoder.decode(bytes(run))
    return len(decoder.getstate()[0])


def prompt_text(tokenizer, prompt, whole):
    """Return the decoding of the prompt, less a last character that only later ids complete."""
    prompt = [i for i in prompt if i not in tokenizer.all_special_ids]
    text = decoding(tokenizer, prompt[: len(prompt) - unfinished(tokenizer, prompt)])
    if whole.startswith(text):
        return text
    assert text.endswith(REPLACEMENT)
    assert whole.startswith(text[:-1])
    return text[:-1]


def wrong_cuts(tokenizer, ids, decoder=TextDecoder):
    """Return the cuts of the ids at which prompt and pieces are not their decoding."""
    whole = decoding(tokenizer, ids)
    wrong = []
    for cut in range(len(ids) + 1):
        joined = "".join(decoded(tokenizer, ids[cut:], ids[:cut], decoder))
        if prompt_text(tokenizer, ids[:cut], whole) + joined != whole:
            wrong.append(cut)
    return wrong


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_cut(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert wrong_cuts(tokenizer, ids) == []


@pytest.mark.model
def test_every_cut_with_a_real_tokenizer(smollm):
    for text in CORPUS.values():
        ids = smollm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert wrong_cuts(smollm.tokenizer, ids) == [], text


class Alone:
    """A wrong decoder, which decodes each token alone."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer

    def decode(self, token):
        return decoding(self.tokenizer, [token])

    def finish(self):
        return ""


class Difference:
    """A wrong decoder, which returns what a longer decoding has more than a shorter one.

    What the prompt's own decoding has for an incomplete character is then missing.
    """

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.returned = decoding(tokenizer, self.ids)

    def decode(self, token):
        self.ids.append(token)
        text = decoding(self.tokenizer, self.ids)
        if len(text) <= len(self.returned) or text.endswith(REPLACEMENT):
            return ""
        piece, self.returned = text[len(self.returned) :], text
        return piece

    def finish(self):
        return decoding(self.tokenizer, self.ids)[len(self.returned) :].rstrip(REPLACEMENT)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokens_alone_are_not_the_text(tokenizer):
    text = CORPUS["Chinese and Japanese"] + " " + CORPUS["plain"]
    assert wrong_cuts(tokenizer, ids_of(tokenizer, text), Alone)


@pytest.mark.parametrize("name", ["bytes", "merged bytes", "pieces", "metaspace"])
def test_what_a_decoding_has_more_is_not_the_text(name):
    assert wrong_cuts(TOKENIZERS[name], ids_of(TOKENIZERS[name], CORPUS["astral"]), Difference)


# Characters over several tokens

#: The id of each byte's token in BYTES: printable bytes are named by themselves, others in order.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
NAME_OF_BYTE = {byte: chr(byte) for byte in PRINTABLE}
for byte in sorted({*range(256)} - {*PRINTABLE}):
    NAME_OF_BYTE[byte] = chr(256 + len(NAME_OF_BYTE) - len(PRINTABLE))
ID_OF_BYTE = {byte: BYTES.convert_tokens_to_ids(name) for byte, name in NAME_OF_BYTE.items()}


def test_a_prompt_that_ends_inside_a_character():
    smile = BYTES("🙂")["input_ids"]
    for cut in (1, 2, 3):
        prompt = BYTES("a")["input_ids"] + smile[:cut]
        assert "".join(decoded(BYTES, smile[cut:], prompt)) == "🙂"
        assert "".join(decoded(WORD, "🙂".encode()[cut:], "a🙂".encode()[: cut + 1])) == "🙂"
    # No token completes these bytes, and the prompt's own text has U+FFFD for them already.
    assert "".join(decoded(BYTES, BYTES("b")["input_ids"], smile[:3])) == "b"
    assert "".join(decoded(WORD, word_ids("s"), "🙂".encode()[:3])) == "s"
    assert "".join(decoded(BYTES, [], smile[:3])) == ""


def test_half_a_character_is_held_back_and_becomes_u_fffd_at_the_end():
    smile = BYTES("🙂")["input_ids"]
    assert len(smile) == 4
    assert decoded(BYTES, smile) == ["", "", "", "🙂", ""]
    ids = BYTES("ok")["input_ids"] + smile[:3]
    assert decoded(BYTES, ids) == ["o", "k", "", "", "", REPLACEMENT]
    assert decoding(BYTES, ids) == "ok" + REPLACEMENT


def test_the_rest_of_a_token_that_ends_inside_a_character_is_not_held_back():
    class Two:
        def decode(self, ids, **options):
            return b"".join([b"ab\xf0\x9f", b"\x99\x82"][i] for i in ids).decode(errors="replace")

    assert decoded(Two(), [0, 1, 0]) == ["ab", "🙂", "ab", REPLACEMENT]


def test_a_real_replacement_character_is_text():
    ids = BYTES(f"a{REPLACEMENT}{REPLACEMENT}b{REPLACEMENT}")["input_ids"]
    assert "".join(decoded(BYTES, ids)) == f"a{REPLACEMENT}{REPLACEMENT}b{REPLACEMENT}"
    assert decoded(WORD, REPLACEMENT.encode()) == ["", "", REPLACEMENT, ""]


def test_a_token_that_is_only_spelt_like_a_byte_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<0x41>"])
    ids = tokenizer("a<0x41>b")["input_ids"]
    assert len(ids) == 3
    assert decoded(tokenizer, ids) == ["a", "<0x41>", "b", ""]


def test_bytes_that_are_no_character_become_one_replacement_once_the_text_goes_on():
    lone, letter = BYTES("é")["input_ids"][0], BYTES("a")["input_ids"][0]
    assert decoded(BYTES, [lone, letter]) == ["", f"{REPLACEMENT}a", ""]


def test_no_bytes_hold_the_text_back():
    lone = BYTES("é")["input_ids"][0]
    assert decoded(BYTES, [lone] * 4) == ["", *[REPLACEMENT] * 4]
    assert decoded(WORD, [0xFF] * 3) == [REPLACEMENT] * 3 + [""]


@given(data=st.binary(max_size=12), cut=st.integers(0, 12))
@settings(max_examples=200, deadline=None)
@example(data=REPLACEMENT.encode(), cut=2)
@example(data=b"\xf0\x9f\x98\xe2\x82\xac", cut=2)
def test_any_bytes(data, cut):
    ids = [ID_OF_BYTE[byte] for byte in data]
    cut = min(cut, len(ids))
    whole = data.decode(errors="replace")
    prompt = data[:cut].decode(errors="replace")
    joined = "".join(decoded(BYTES, ids[cut:], ids[:cut]))
    assert prompt + joined == whole or prompt[:-1] + joined == whole
    assert "".join(decoded(BYTES, ids)) == whole
    assert wrong_cuts(BYTES, ids) == []


def spelt(tokens):
    """Return the text of WORD's tokens: U+FFFD for each byte that is no part of a character."""
    text, run = "", b""
    for token in [*tokens, None]:
        if token is not None and token < 256:
            run += bytes([token])
            continue
        text += run.decode(errors="each byte")
        run = b""
        text += "" if token is None else WORD.convert_ids_to_tokens(token).replace("▁", " ")
    return text.removeprefix(" ")


@given(
    chunks=st.lists(
        st.sampled_from(WORDS) | st.characters(codec="utf-8") | st.binary(max_size=4), max_size=12
    )
)
@settings(max_examples=200, deadline=None)
@example(chunks=[" "])
@example(chunks=["▁", b"\xf0\x9f", "▁and"])
@example(chunks=[b"\xff", "끝", b"\xea", "끝"])
def test_any_words_and_bytes(chunks):
    tokens = []
    for chunk in chunks:
        if chunk in WORDS:
            tokens += word_ids(chunk)
        else:
            tokens += chunk.encode() if isinstance(chunk, str) else chunk
    whole = spelt(tokens)
    assert "".join(decoded(WORD, tokens)) == whole
    for cut in range(len(tokens) + 1):
        joined = "".join(decoded(WORD, tokens[cut:], tokens[:cut]))
        left = unfinished(WORD, tokens[:cut])
        # The unfinished bytes are the prompt's U+FFFD, or of a character that the pieces have.
        assert whole in (spelt(tokens[:cut]) + joined, spelt(tokens[: cut - left]) + joined)


@given(chunks=st.lists(st.sampled_from(WORDS) | st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=100, deadline=None)
def test_pieces_of_words_and_characters_join_to_their_decoding(chunks):
    prompt = word_ids("▁and")
    tokens = []
    for chunk in chunks:
        tokens += word_ids(chunk) if chunk in WORDS else chunk.encode()
    assert "".join(decoded(WORD, tokens, prompt)) == WORD.decode(prompt + tokens)[len("and") :]


# Spaces and special tokens


def word_ids(*words):
    return WORD.convert_tokens_to_ids(list(words))


def test_a_leading_space_is_kept_after_a_prompt():
    assert WORD.decode(word_ids("▁then")) == "then"  # without a prompt the space is dropped
    assert decoded(WORD, word_ids("▁then", "▁and"), word_ids("▁and")) == [" then", " and", ""]


def test_spaces_are_kept_at_every_token():
    tokens = word_ids("▁and", "▁", "▁then", "s", "▁", "▁", "▁,", "▁don", "'t")
    joined = "".join(decoded(WORD, tokens, word_ids("▁and")))
    assert joined == " and  thens   , don't"


def test_bytes_that_stand_for_a_character_are_held_back():
    tokens = [*word_ids("▁and"), *"끝".encode(), *word_ids("s")]
    assert decoded(WORD, tokens, word_ids("▁then")) == [" and", "", "", "끝", "s", ""]


def test_special_tokens_give_no_text():
    a, b = BYTES("ab")["input_ids"]
    assert decoded(BYTES, [a, BYTES.eos_token_id, b]) == ["a", "", "b", ""]
    first, *rest = BYTES("끝")["input_ids"]
    assert decoded(BYTES, [first, BYTES.eos_token_id, *rest]) == ["", "", "", "끝", ""]
    first, *rest = "끝".encode()
    assert decoded(WORD, [first, WORD.eos_token_id, *rest]) == ["", "", "", "끝", ""]


@pytest.mark.parametrize(
    ("name", "spelling"),
    [("merged bytes", "<|im_end|>"), ("pieces", "<|im_end|>"), ("word pieces", " <|im_end|>")],
)
def test_the_spelling_of_a_special_token(name, spelling):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("one<|im_end|>", add_special_tokens=False)["input_ids"]
    row = TextDecoder(tokenizer, ids[:-1])
    assert row.special_text(ids[-1]) == spelling
    assert row.special_text(ids[0]) == ""
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert whole == decoding(tokenizer, ids) + spelling


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_text_comes_as_early_as_it_is_certain(text):
    """After each token, what has been returned is short of the decoding by one U+FFFD at most."""
    ids = BYTES(text)["input_ids"]
    row, joined = TextDecoder(BYTES), ""
    for count, token in enumerate(ids, 1):
        joined += row.decode(token)
        so_far = decoding(BYTES, ids[:count])
        assert joined in (so_far, so_far.removesuffix(REPLACEMENT))


# The cost


class Counting:
    """A tokenizer that counts the ids that it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def decode(self, ids, **options):
        self.ids += len(ids)
        return self.tokenizer.decode(ids, **options)

    def convert_ids_to_tokens(self, token):
        return self.tokenizer.convert_ids_to_tokens(token)


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (BYTES, "a"),
        (BYTES, "끝"),
        (BYTES, b"\xf0"),
        (BYTES, b"\x80"),
        (BYTES, REPLACEMENT),
        (BYTES, BYTES.eos_token_id),
        (BYTES, 10**6),
        (WORD, b"\xf0"),
        (WORD, "끝"),
        (WORD, b" "),
    ],
)
def test_the_cost_of_a_token_does_not_grow(tokenizer, token):
    if isinstance(token, str):
        token = token.encode()
    if isinstance(token, int):
        ids = [token]
    else:
        ids = list(token) if tokenizer is WORD else [ID_OF_BYTE[byte] for byte in token]
    ids *= 1500 // len(ids)
    for prompt, tokens in ((ids, []), (ids, ids), ([], ids)):
        counting = Counting(tokenizer)
        decoded(counting, tokens, prompt)
        assert counting.ids <= 20 * (len(tokens) + 4)


def test_a_decoding_of_all_tokens_costs_more():
    counting = Counting(BYTES)
    decoded(counting, [ID_OF_BYTE[0xF0]] * 100, (), Difference)
    assert counting.ids > 20 * 104
