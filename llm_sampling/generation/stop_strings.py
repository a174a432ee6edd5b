"""Where a text ends: stop strings in text that comes piece by piece. It knows no tokens.

pieces of one row's text -> StopStrings.feed -> what may be shown, and whether it was the end
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches the text of one row for stop strings, and lets out what is before them.

    A stop string is found wherever it lies: across pieces, or in the middle of one, whose rest is
    then no part of the text. Of two that overlap, the one that is complete first counts, of two
    that are complete at once the longer one, and the search goes on behind it. What could still
    become the stop string that ends the text is held back until that is known; nothing else is.

    Args:
        stop: the strings, none of them empty; a single one may be given as it is.
        stop_limit: the text ends at this occurrence, of any of them: with ``"."`` 1 ends it after
            one sentence, 2 after two.
        include: whether the last stop string is part of the text.

    Raises:
        ValueError: an argument is out of its range.

    Attributes:
        found: the stop string that ended the text, or None.

    Example:
        >>> watched = StopStrings("END")
        >>> watched.feed("one E"), watched.feed("ND two")
        ('one ', '')
        >>> watched.found
        'END'
    """

    def __init__(
        self, stop: str | Sequence[str], *, stop_limit: int = 1, include: bool = False
    ) -> None:
        strings = [stop] if isinstance(stop, str) else stop
        if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
            raise ValueError(f"stop must be a string or a sequence of strings, got {stop!r}")
        if not all(strings):
            raise ValueError(f"stop must have no empty string, got {stop!r}")
        if isinstance(stop_limit, bool) or not isinstance(stop_limit, int) or stop_limit < 1:
            raise ValueError(f"stop_limit must be an integer >= 1, got {stop_limit!r}")
        if not isinstance(include, bool):
            raise ValueError(f"include must be True or False, got {include!r}")
        # of those that are complete at once, the first is taken: the longest
        self._strings = sorted(set(strings), key=lambda string: (-len(string), string))
        self._left = stop_limit
        self._include = include
        self._text = ""  # the end of the text: what is not out, and what a match may begin in
        self._out = 0  # so much of it is out
        self._behind = 0  # the last occurrence ends there
        self.found: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._strings)

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """The text that ``piece`` lets out; none after the end.

        Args:
            piece: the next piece of the text.
            may_stop: whether what becomes complete in this piece counts.
        """
        if self.found is not None:
            return ""
        first = len(self._text) + 1
        self._text += piece
        if may_stop:
            for end in range(first, len(self._text) + 1):
                string = self._complete_at(end)
                if string is None:
                    continue
                self._behind = end
                self._left -= 1
                if self._left == 0:
                    self.found = string
                    shown = self._text[self._out : end if self._include else end - len(string)]
                    self._text = ""
                    return shown
        return self._let_out(len(self._text) - self._held())

    def finish(self) -> str:
        """What is still held back, at the end of a text that no stop string ended."""
        return self._let_out(len(self._text))

    def _complete_at(self, end: int) -> str | None:
        for string in self._strings:
            start = end - len(string)
            if start >= self._behind and self._text.startswith(string, start):
                return string
        return None

    def _held(self) -> int:
        """How much of the text's end could still begin the stop string that ends it."""
        if self._left > 1 or self._include:
            return 0
        longest = 0
        for string in self._strings:
            most = min(len(string) - 1, len(self._text) - self._behind)
            for length in range(most, longest, -1):
                if self._text.endswith(string[:length]):
                    longest = length
                    break
        return longest

    def _let_out(self, end: int) -> str:
        shown = self._text[self._out : end]
        # a match begins at most this far back
        longest = len(self._strings[0]) if self._strings else 0
        kept = max(0, min(end, len(self._text) - longest + 1))
        self._text = self._text[kept:]
        self._out = end - kept
        self._behind = max(0, self._behind - kept)
        return shown
