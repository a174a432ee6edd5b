"""Strings as sequences of token ids, for the rules that look at the sequence of a row.

strings -> dry_breakers_from -> dry_breakers of SamplingParams
words -> bad_words_from -> bad_words of SamplingParams

A token stands for the bytes that it adds in the middle of a text. So a token that begins or ends
within a character is matched like any other, and a space that a tokenizer drops at the start of a
text is not lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from llm_sampling import checks
from llm_sampling.generation.text import REPLACEMENT_CHARACTER, byte_of

TokenSequences = tuple[tuple[int, ...], ...]

#: llama.cpp's breakers: https://github.com/ggml-org/llama.cpp/blob/master/common/common.h
DRY_BREAKERS = ("\n", ":", '"', "*")
#: Of what follows the first token of a breaker so many tokens count, as in llama.cpp.
_LONGEST_REST = 20
#: Texts before which no tokenizer is known to put a space, or to merge all of them with what comes.
_BEFORE = ("", "\n", ".", "a")
#: The tokenizers that can be given.
_TOKENIZERS = "a tokenizer of transformers or tokenizers"


def dry_breakers_from(tokenizer: Any, strings: Collection[str] = DRY_BREAKERS) -> TokenSequences:
    r"""The token sequences that write a string, as the breakers of DRY.

    A token whose text contains one of the strings is a breaker. A token whose text ends with a
    beginning of a string is the first of a sequence: the tokens of the rest follow, as the
    tokenizer divides it, and no more than 20 of them. A special token has the text that it is
    spelt with. A string that no tokens of the tokenizer write has no breaker.

    These are the sequences of llama.cpp's ``get_overlapping_token_sequences``
    (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-sampler.cpp) with these
    differences. Strings are not cut to 40 bytes. A rest is divided as it is within a text, where
    llama.cpp lets a SentencePiece tokenizer put a space before it. A rest that begins within a
    character begins with the longest tokens of its bytes, where llama.cpp reads U+FFFD. A special
    token that is spelt in a rest is that token, where llama.cpp divides its spelling.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow, or a ``tokenizers.Tokenizer``.
        strings: none of them empty; the default is llama.cpp's.

    Returns:
        The breakers without duplicates: single tokens by id, then longer sequences in order.

    Raises:
        ValueError: an argument is not as above, or a string is not valid Unicode.

    Example:
        >>> breakers = dry_breakers_from(tokenizer, ["\n", "User:"])
        >>> SamplingParams(dry_multiplier=0.8, dry_breakers=breakers)
    """
    sought = [string.encode() for string in _checked("strings", strings)]
    vocabulary = _Vocabulary(tokenizer)
    texts = vocabulary.texts()
    longest = max(map(len, texts.values()), default=0)
    found: set[tuple[int, ...]] = set()
    for string in sought:
        beginnings: dict[int, list[bytes]] = {}  # by their last byte, which few tokens end with
        for length in range(1, min(len(string), longest + 1)):
            beginnings.setdefault(string[length - 1], []).append(string[:length])
        rests: dict[bytes, list[int] | None] = {}
        for token, text in texts.items():
            if string in text:
                found.add((token,))
                continue
            for beginning in beginnings.get(text[-1], ()) if text else ():
                if text.endswith(beginning):
                    if beginning not in rests:
                        rests[beginning] = vocabulary.tokens_of(string[len(beginning) :])
                    rest = rests[beginning]
                    if rest is not None:
                        found.add((token, *rest[:_LONGEST_REST]))
    return _in_order(found)


def bad_words_from(tokenizer: Any, words: Collection[str]) -> TokenSequences:
    """The token sequences that write a word, with and without a space before it.

    A word is divided as the tokenizer divides it within a text; spaces at its start are left out. A
    model may also write a word in tokens that the tokenizer would not choose, which are not banned.

    These are the sequences of vLLM's ``SamplingParams.update_from_tokenizer``
    (https://github.com/vllm-project/vllm/blob/main/vllm/sampling_params.py) with these differences.
    vLLM takes the form with a space only if it has as many tokens as the one without and another
    first one; here each form counts. vLLM divides a word as a text of its own, so a SentencePiece
    tokenizer puts a space before it, and the form without one is missing. vLLM leaves out all
    whitespace at the start of a word, and here a line break may be a word. A word that the
    tokenizer cannot write is an error, where vLLM bans the unknown token.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow, or a ``tokenizers.Tokenizer``.
        words: none of them empty.

    Returns:
        The sequences without duplicates, and without those that end with another: single tokens by
        id, then longer sequences in order.

    Raises:
        ValueError: an argument is not as above, a word is not valid Unicode, or the tokenizer has
            no tokens that write it.

    Example:
        >>> SamplingParams(bad_words=bad_words_from(tokenizer, ["colour", "honour"]))
    """
    checked = _checked("words", words)
    vocabulary = _Vocabulary(tokenizer)
    found: set[tuple[int, ...]] = set()
    for word in checked:
        bare = word.lstrip(" ") or word
        forms = [vocabulary.tokens_of(text.encode()) for text in (bare, " " + bare)]
        if not any(forms):
            raise checks.refusal("words", "strings that the tokenizer has tokens for", word)
        found.update(tuple(form) for form in forms if form)
    return _in_order(
        one for one in found if not any(one[start:] in found for start in range(1, len(one)))
    )


def _checked(name: str, value: object) -> list[str]:
    checked = checks.strings(name, value)
    for string in checked:
        try:
            string.encode()
        except UnicodeEncodeError:
            raise checks.refusal(name, "strings of valid Unicode", string) from None
    return checked


def _in_order(found: Iterable[tuple[int, ...]]) -> TokenSequences:
    return tuple(sorted(found, key=lambda one: (len(one) > 1, one)))


class _Vocabulary:
    """The tokens of a tokenizer as bytes, and bytes as its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # What decodes: the tokenizer inside a fast one of transformers is much faster than that.
        self._decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._is_fast = all(
            hasattr(self._decoder, name) for name in ("decode_batch", "id_to_token")
        )
        slow = ("convert_ids_to_tokens", "get_vocab", "decode")
        is_slow = callable(tokenizer) and all(hasattr(tokenizer, name) for name in slow)
        if not (self._is_fast or is_slow):
            raise checks.refusal("tokenizer", _TOKENIZERS, tokenizer)
        self._texts: dict[int, bytes] = {}
        self._has_all = False

    def texts(self) -> dict[int, bytes]:
        """The bytes of all tokens, by id."""
        if not self._has_all:
            self._learn(sorted(set(self._decoder.get_vocab().values())))
            self._has_all = True
        return self._texts

    def tokens_of(self, text: bytes) -> list[int] | None:
        """The tokens that add valid UTF-8, less its first bytes, to a text; None if none do."""
        end = 0
        while end < len(text) and text[end] & 0xC0 == 0x80:  # in the middle of a character
            end += 1
        first, rest = self._of_bytes(text[:end]), self._within_a_text(text[end:])
        return None if first is None or rest is None else [*first, *rest]

    def _of_bytes(self, text: bytes) -> list[int] | None:
        """The tokens of some bytes, each the longest that there is; None if there are none."""
        found: list[int] = []
        if text:
            ids = {has: token for token, has in reversed(self.texts().items())}
            while text:
                ends = [end for end in range(len(text), 0, -1) if text[:end] in ids]
                if not ends:
                    return None
                found.append(ids[text[: ends[0]]])
                text = text[ends[0] :]
        return found

    def _within_a_text(self, text: bytes) -> list[int] | None:
        """The tokens of a text as it is divided behind another; None if they do not write it."""
        for before in _BEFORE:
            start, whole = self._encode(before), self._encode(before + text.decode())
            ids = whole[len(start) :]
            if whole[: len(start)] == start and b"".join(self._learn(ids)) == text:
                return ids
        return None

    def _encode(self, text: str) -> list[int]:
        if callable(self._tokenizer):  # one of transformers
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if encoding.overflowing:
            raise checks.refusal(
                "tokenizer", f"one that does not truncate {text!r}", self._tokenizer
            )
        marks = zip(encoding.ids, encoding.attention_mask, strict=True)
        return [token for token, is_text in marks if is_text]  # the others are padding

    def _learn(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of some tokens."""
        new = [token for token in ids if token not in self._texts]
        # A tokenizer may drop a space at the start of what it decodes, so each comes twice.
        alone, twice = (self._decode([[token] * times for token in new]) for times in (1, 2))
        for token, first, both in zip(new, alone, twice, strict=True):
            self._texts[token] = _bytes_of(self._name(token), first, both[len(first) :])
        return [self._texts[token] for token in ids]

    def _name(self, token: int) -> str:
        name = self._decoder.id_to_token if self._is_fast else self._decoder.convert_ids_to_tokens
        return str(name(token))

    def _decode(self, many: Sequence[list[int]]) -> list[str]:
        if self._is_fast:
            texts: list[str] = self._decoder.decode_batch(many, skip_special_tokens=False)
            return texts
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self._decoder.decode(ids, **options) for ids in many]


def _bytes_of(name: str, alone: str, text: str) -> bytes:
    """The bytes of a token.

    Args:
        name: of the token in the vocabulary.
        alone: what it decodes to.
        text: what it adds to that when it comes once more.
    """
    byte = byte_of(name, alone)
    if byte is not None:
        return bytes([byte])
    if REPLACEMENT_CHARACTER in alone and all(letter in _BYTE_OF_LETTER for letter in name):
        spelt = bytes(_BYTE_OF_LETTER[letter] for letter in name)
        if spelt.decode(errors="replace") == alone:
            return spelt
    return text.encode()


def _byte_of_letter() -> dict[str, int]:
    """The letters for bytes in byte-level BPE, those of GPT-2.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py has them.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_of_letter()
