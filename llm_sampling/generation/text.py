"""The text of one row's tokens, piece by piece, as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"

#: The kinds of tokens beside byte tokens: text, special, and not in the tokenizer's vocabulary.
_ORDINARY, _SPECIAL, _UNKNOWN = -1, -2, -3
_LEFT_OUT = (_SPECIAL, _UNKNOWN)
#: The name of a token that stands for a byte in tokenizers with ByteFallback.
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
#: How many of the last tokens are decoded together: up to ``_WINDOW``, of which the last
#: ``_CONTEXT`` go on. A character has at most 4 bytes, so an incomplete one has at most 3 tokens.
_WINDOW = 8
_CONTEXT = 4


def byte_of(name: str, text: str) -> int | None:
    """The byte that a token stands for in a tokenizer with ByteFallback; None for other tokens.

    Args:
        name: of the token.
        text: what the tokenizer decodes the token alone to.
    """
    match = _BYTE_TOKEN.fullmatch(name)
    return None if match is None or text == name else int(match[1], 16)


class TextDecoder:
    """Turns one row's tokens into text, piece by piece, as they come.

    The text of the prompt and the pieces, joined, are what the tokenizer decodes prompt and tokens
    to, without special tokens and without its clean-up of spaces, wherever the prompt ends. The
    text of the prompt is what it decodes to, less a last character that is incomplete there (U+FFFD
    in its decoding) and that the tokens complete: that character is in the pieces.

    A character is held back while it may be incomplete, and nothing else is. U+FFFD stands for
    bytes that turn out to be no character, and in :meth:`finish` for an incomplete character at the
    end, as in the tokenizer's own decoding. In one case the two differ: a run of byte tokens
    (``<0xE2>``) that is not valid UTF-8 decodes to nothing but U+FFFD, and here the whole
    characters in it are kept, because they may have been returned already.

    The cost of a token does not depend on how many came before it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the tokens that the text continues; their own text is not returned.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._kinds: dict[int, int] = {}  # of the tokens that came
        # The last tokens, without special ones. A tokenizer may drop a space at the start of what
        # it decodes, so no token is decoded alone.
        self._window: list[int] = []
        self._length: int | None = None  # that of the window's text; None if it is not known
        # Whether the last character of the window's text is held back: it may be incomplete.
        self._is_held = False
        # The byte tokens at the end that are not a whole character yet.
        self._bytes = b""
        # What is held back of the prompt, which is returned only if it becomes a character.
        self._is_held_of_prompt = False
        self._bytes_of_prompt = 0

        ordinary = (token for token in reversed(prompt_ids) if self._kind(token) not in _LEFT_OUT)
        for token in reversed(list(islice(ordinary, _WINDOW))):
            self.decode(token)
        self._is_held_of_prompt = self._is_held
        self._bytes_of_prompt = len(self._bytes)

    def decode(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty; a special token has none."""
        kind = self._kind(token)
        if kind in _LEFT_OUT:
            return ""
        if kind != _ORDINARY:
            return self._decode_byte(token, kind)
        piece = self._end_of_bytes()
        length = len(self._text(self._window)) if self._length is None else self._length
        self._window.append(token)
        text = self._text(self._window)
        begin = length - self._is_held
        end = max(begin, len(text) - text.endswith(REPLACEMENT_CHARACTER))
        if end > begin and self._is_held_of_prompt:
            begin += text[begin] == REPLACEMENT_CHARACTER
            self._is_held_of_prompt = False
        self._length, self._is_held = len(text), end < len(text)
        self._keep_window_short()
        return piece + text[begin:end]

    def special_text(self, token: int) -> str:
        """How ``token`` is spelt here if it is a special token; empty for any other token."""
        if self._kind(token) != _SPECIAL:
            return ""
        spelt = self._text([*self._window, token], skip_special_tokens=False)
        return spelt[len(self._text(self._window)) :]

    def finish(self) -> str:
        """The text held back at the end, in which U+FFFD stands for an incomplete character."""
        return self._end_of_held() + self._end_of_bytes()

    def _decode_byte(self, token: int, byte: int) -> str:
        """The text that a byte token completes."""
        piece = self._end_of_held()
        self._window.append(token)
        self._bytes += bytes([byte])
        while self._bytes:
            try:
                text = self._bytes.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                piece += self._invalid(error.end)
                continue
            # At the start of a text the tokenizer may drop a space.
            piece += self._text(self._window) if len(self._window) == 1 else text
            self._bytes, self._bytes_of_prompt = b"", 0
        self._length = None
        self._keep_window_short()
        return piece

    def _invalid(self, count: int) -> str:
        """So many of the first bytes as text, less those of the prompt."""
        of_prompt = min(count, self._bytes_of_prompt)
        self._bytes_of_prompt -= of_prompt
        self._bytes = self._bytes[count:]
        return REPLACEMENT_CHARACTER * (count - of_prompt)

    def _end_of_bytes(self) -> str:
        """The text of bytes that no byte follows."""
        return self._invalid(len(self._bytes))

    def _end_of_held(self) -> str:
        """The text of a character held back that no token completes."""
        is_returned = self._is_held and not self._is_held_of_prompt
        self._is_held = self._is_held_of_prompt = False
        return REPLACEMENT_CHARACTER if is_returned else ""

    def _keep_window_short(self) -> None:
        if len(self._window) > _WINDOW:
            del self._window[:-_CONTEXT]
            self._length = None

    def _kind(self, token: int) -> int:
        """The byte of a byte token; for any other token one of the constants above."""
        kind = self._kinds.get(token)
        if kind is None:
            kind = self._kinds[token] = self._new_kind(token)
        return kind

    def _new_kind(self, token: int) -> int:
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        name = "" if convert is None else convert(token)
        if name is None:
            return _UNKNOWN
        text = self._text([token])
        if text == "" and self._text([token], skip_special_tokens=False) != "":
            return _SPECIAL
        byte = byte_of(name, text)
        return _ORDINARY if byte is None else byte

    def _text(self, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
        # The clean-up would change spaces that have been returned already.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text
