"""Stop strings in a text that comes piece by piece. Nothing here knows of tokens.

pieces of one row's text -> StopStrings.feed -> the text that may be shown; StopStrings.found
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_sampling.checks import integer_at_least, true_or_false


class StopStrings:
    """Searches the text of one row for stop strings, and returns the text before them.

    A stop string is found wherever it lies: across pieces, or in the middle of one, whose rest is
    then dropped. Of two stop strings that overlap the one that ends first counts, of two that end
    at the same character the longer one, and the search goes on after it. Text that may still turn
    out to begin the stop string that ends the text is held back until that is known, and no other.

    Args:
        stop: the strings, none of them empty; a single one may be given as it is.
        stop_limit: the text ends at this occurrence, counted over all strings: with ``"."``, 1 ends
            it after one sentence and 2 after two.
        include: whether the stop string that ends the text is part of it.

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
        # The longest first: of several that end at one character, _ending_at takes the first.
        self._strings = sorted(set(strings), key=lambda string: (-len(string), string))
        self._occurrences_left = integer_at_least("stop_limit", stop_limit, 1)
        self._include = true_or_false("include", include)
        # The last characters of the text: those not yet returned, and before them those in which
        # an occurrence may begin.
        self._text = ""
        self._returned = 0  # how many characters of _text have been returned
        self._last_end = 0  # where in _text the last occurrence ends: no other may begin before
        self.found: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._strings)

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """The text that is certain now that ``piece`` has come; empty after the end.

        Args:
            piece: the next piece of the text.
            may_stop: whether an occurrence that ends in this piece counts.
        """
        if self.found is not None:
            return ""
        first = len(self._text) + 1
        self._text += piece
        if may_stop:
            for end in range(first, len(self._text) + 1):
                string = self._ending_at(end)
                if string is None:
                    continue
                self._last_end = end
                self._occurrences_left -= 1
                if self._occurrences_left == 0:
                    self.found = string
                    stop = end if self._include else end - len(string)
                    shown = self._text[self._returned : stop]
                    self._text = ""
                    return shown
        return self._return_up_to(len(self._text) - self._length_held_back())

    def finish(self) -> str:
        """The text that is still held back, for a text that no stop string ended."""
        return self._return_up_to(len(self._text))

    def _ending_at(self, end: int) -> str | None:
        """The stop string that counts among those that end at this place of the text."""
        for string in self._strings:
            start = end - len(string)
            if start >= self._last_end and self._text.startswith(string, start):
                return string
        return None

    def _length_held_back(self) -> int:
        """How many of the last characters may begin the stop string that ends the text."""
        if self._occurrences_left > 1 or self._include:
            return 0
        longest = 0
        for string in self._strings:
            most = min(len(string) - 1, len(self._text) - self._last_end)
            for length in range(most, longest, -1):
                if self._text.endswith(string[:length]):
                    longest = length
                    break
        return longest

    def _return_up_to(self, end: int) -> str:
        """The text up to ``end``, less what has been returned; forgets what is needed no more."""
        shown = self._text[self._returned : end]
        # An occurrence that ends later begins in the last ``longest - 1`` characters.
        longest = len(self._strings[0]) if self._strings else 0
        forgotten = max(0, min(end, len(self._text) - longest + 1))
        self._text = self._text[forgotten:]
        self._returned = end - forgotten
        self._last_end = max(0, self._last_end - forgotten)
        return shown
