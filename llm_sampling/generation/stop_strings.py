"""Stop strings in a text that comes piece by piece. Nothing here knows of tokens.

pieces of one row's text -> StopStrings.feed -> the text that may be returned; StopStrings.found
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from weakref import WeakValueDictionary

from llm_sampling import checks


class StopStrings:
    """Searches the text of one row for stop strings, and returns the text before them.

    A stop string is found wherever it lies: across pieces, or in the middle of one, whose rest is
    then dropped. Of two stop strings that overlap the one that ends first counts, of two that end
    at the same character the longer one, and the search goes on after it. Text that may still turn
    out to begin the stop string that ends the text is held back until that is known, and no other.

    The cost is linear in the length of the text and in the total length of the stop strings.
    Objects with the same strings share what is built from them.

    Args:
        stop: the strings, none of them empty, in any order; a single one may be given as it is.
            None is no strings.
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
        self, stop: str | Collection[str] | None, *, stop_limit: int = 1, include: bool = False
    ) -> None:
        self._automaton = _automaton_of(_checked(stop))
        self._occurrences_left = checks.integer_at_least("stop_limit", stop_limit, 1)
        self._include = checks.true_or_false("include", include)
        # The longest suffix of the text since the last occurrence that begins a stop string.
        self._node = _ROOT
        # How many characters have come. The last ``_held`` have not been returned; they are the
        # end of what the open node of ``_node`` spells, so they need no buffer.
        self._length = 0
        self._held = 0
        # Where in the text the unshown pieces lie that may still matter: (begin, end), in order.
        self._unshown: deque[tuple[int, int]] = deque()
        self.found: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._automaton.strings)

    def feed(self, piece: str, *, may_stop: bool = True, is_shown: bool = True) -> str:
        """The text that is certain now that ``piece`` has come; empty after the end.

        Args:
            piece: the next piece of the text.
            may_stop: whether an occurrence that ends in this piece counts.
            is_shown: whether the piece is returned. Otherwise it is only searched, and returned
                only as a part of the stop string that ended the text, if ``include``.
        """
        if self.found is not None:
            return ""
        if not self.is_on:
            return piece if is_shown else ""
        before, held, node = self._length, self._held, self._node
        self._length += len(piece)
        if not is_shown and piece:
            self._unshown.append((before, self._length))
        end = self._search(piece, before, may_stop)
        if self.found is None:
            self._held = self._length_held_back()
            return self._text(piece, before, held, node, self._length - self._held)
        self._held = 0
        stop = end - len(self.found)
        shown = self._text(piece, before, held, node, stop)
        if self._include:
            # Its beginning may have been returned already.
            shown += self.found[max(0, before - held - stop) :]
        return shown

    def finish(self) -> str:
        """The text that is still held back, for a text that no stop string ended."""
        held, self._held = self._held, 0
        return self._text("", self._length, held, self._node, self._length)

    def _search(self, piece: str, before: int, may_stop: bool) -> int:
        """Follow the piece; where in the text the search ended, which is after ``found``."""
        automaton = self._automaton
        for place, character in enumerate(piece, before + 1):
            self._node = automaton.step(self._node, character)
            string = automaton.ending[self._node]
            if string is not None and may_stop:
                # No other occurrence may begin before the end of this one.
                self._node = _ROOT
                self._occurrences_left -= 1
                if self._occurrences_left == 0:
                    self.found = string
                    return place
        return self._length

    def _length_held_back(self) -> int:
        """How many of the last characters may belong to the stop string that ends the text."""
        if self._occurrences_left > 1:
            return 0
        held = self._automaton.depth[self._automaton.open[self._node]]
        if not self._include:
            return held
        # Text that is returned either way need not wait for the rest of the stop string. What is
        # returned only as a part of it must, with all that follows.
        begin = self._length - held
        unshown = next((first for first, last in self._unshown if last > begin), self._length)
        return self._length - max(begin, unshown)

    def _text(self, piece: str, before: int, held: int, node: int, end: int) -> str:
        """What is shown of the text up to ``end`` and was held back or is of ``piece``.

        Args:
            piece: the last piece.
            before: the length of the text before it.
            held: how many characters before it had not been returned.
            node: the node before it.
            end: not after the end of the piece.
        """
        shown = []
        place = before - held
        while place < end:
            # The next of the unshown, of which several may follow each other.
            left_out = self._unshown[0] if self._unshown else (end, end)
            until = max(place, min(left_out[0], end))
            if place < before:
                last = min(until, before)
                shown.append(self._automaton.spelt(node, before - place, before - last))
            shown.append(piece[max(0, place - before) : max(0, until - before)])
            place = max(until, left_out[1])
            if self._unshown and left_out[1] <= end:
                self._unshown.popleft()
        return "".join(shown)


_ROOT = 0


class _Automaton:
    """The strings as a trie, in which each node knows its longest suffix (Aho and Corasick, 1975).

    A node stands for the string that leads to it, a beginning of one or more of the strings.

    Attributes:
        strings: all of them.
        depth: of each node, the length of what it stands for.
        ending: of each node, the longest of the strings that what it stands for ends with, or None.
        open: of each node, the node of the longest string that it ends with, itself included, which
            may go on to one of the strings: the root if there is none.
    """

    def __init__(self, strings: frozenset[str]) -> None:
        self.strings = strings
        self.depth = [0]
        self.ending: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        self._through = [""]  # one of the strings that begin with what the node stands for
        for string in strings:
            self._add(string)
        self._suffix = [_ROOT] * len(self.depth)
        self.open = [_ROOT] * len(self.depth)
        self._link()

    def step(self, node: int, character: str) -> int:
        """The node of the longest suffix of ``node`` and ``character`` that has one."""
        while True:
            following = self._next[node].get(character)
            if following is not None:
                return following
            if node == _ROOT:
                return _ROOT
            node = self._suffix[node]

    def spelt(self, node: int, first: int, last: int) -> str:
        """What the open node of ``node`` stands for: from ``first`` to ``last`` before its end."""
        node = self.open[node]
        depth = self.depth[node]
        return self._through[node][depth - first : depth - last]

    def _add(self, string: str) -> None:
        node = _ROOT
        for depth, character in enumerate(string, 1):
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self.depth)
                self.depth.append(depth)
                self.ending.append(None)
                self._next.append({})
                self._through.append(string)
            node = following
        self.ending[node] = string

    def _link(self) -> None:
        """Fill in what depends on shorter nodes, from the shortest to the longest."""
        nodes = deque([_ROOT])
        while nodes:
            node = nodes.popleft()
            for character, child in self._next[node].items():
                if node != _ROOT:
                    self._suffix[child] = self.step(self._suffix[node], character)
                nodes.append(child)
            suffix = self._suffix[node]
            self.open[node] = node if self._next[node] else self.open[suffix]
            if self.ending[node] is None:
                self.ending[node] = self.ending[suffix]


#: The automata in use, so that rows with the same stop strings share one.
_AUTOMATA: WeakValueDictionary[frozenset[str], _Automaton] = WeakValueDictionary()


def _automaton_of(strings: frozenset[str]) -> _Automaton:
    automaton = _AUTOMATA.get(strings)
    if automaton is None:
        automaton = _AUTOMATA[strings] = _Automaton(strings)
    return automaton


def _checked(stop: object) -> frozenset[str]:
    """The set of the stop strings; a ValueError if ``stop`` is something else."""
    if stop is None:
        return frozenset()
    return frozenset(checks.strings("stop", stop, may_be_one=True))
