"""The text of one row's tokens, piece by piece, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextDecoder:
    """Turns one row's tokens into text, piece by piece, as they come.

    A token need not be a whole character, and a tokenizer may drop a space at the start of what it
    decodes. So each piece is the difference of two decodings that begin with the same older tokens,
    and it is held back while it ends inside a character. Joined, the pieces are the decoding of
    prompt and tokens less that of the prompt, without special tokens and without an incomplete
    last character.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: the tokens that the text continues; their own text is not returned.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids)
        self._emitted_tokens = len(self._window)
        self._emitted_text = self._text(self._window)

    def decode(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty."""
        self._window.append(token)
        text = self._text(self._window)
        if len(text) <= len(self._emitted_text) or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        piece = text[len(self._emitted_text) :]
        # The next window starts with the tokens of this piece, so its length stays bounded.
        self._window = self._window[self._emitted_tokens :]
        self._emitted_tokens = len(self._window)
        self._emitted_text = self._text(self._window)
        return piece

    def finish(self) -> str:
        """The text held back at the end, without an incomplete last character; call it once."""
        held = self._text(self._window)[len(self._emitted_text) :]
        return held.rstrip(REPLACEMENT_CHARACTER)

    def _text(self, tokens: list[int]) -> str:
        # The clean-up would change spaces that have been returned already.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
