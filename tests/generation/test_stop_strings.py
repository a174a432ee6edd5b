"""Tests of StopStrings: where a text ends, however it is split, what is held back, and the cost."""

import gc
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_sampling.generation import stop_strings
from llm_sampling.generation.stop_strings import StopStrings

# Few letters, so that strings repeat and overlap.
texts = st.text(alphabet="ab.", max_size=24)
stops = st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), min_size=1, max_size=3)


def whole(text, stop, limit=1, include=False):
    """Return the expected text and stop string by applying the rule to the whole text."""
    behind, left = 0, limit
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s) and end - len(s) >= behind]
        if not complete:
            continue
        longest = max(complete, key=len)
        behind, left = end, left - 1
        if left == 0:
            return text[: end if include else end - len(longest)], longest
    return text, None


def fed(pieces, stop, limit=1, include=False):
    watched = StopStrings(stop, stop_limit=limit, include=include)
    shown = [watched.feed(piece) for piece in pieces]
    return [*shown, watched.finish()], watched.found


def split(text, cuts):
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(
    text=texts,
    stop=stops,
    cuts=st.lists(st.integers(0, 30), max_size=8),
    limit=st.integers(1, 3),
    include=st.booleans(),
)
@example(text="aab", stop=["aab", "ab"], cuts=[1, 2], limit=1, include=False)
@example(text="aaaa", stop=["aa"], cuts=[], limit=2, include=False)
@example(text="a.b.", stop=["."], cuts=[2], limit=2, include=True)
def test_any_split_gives_what_the_whole_text_gives(text, stop, cuts, limit, include):
    shown, found = fed(split(text, cuts), stop, limit, include)
    assert ("".join(shown), found) == whole(text, stop, limit, include)


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_only_what_may_become_a_stop_string_is_held(text, stop, cuts):
    """The text held back after each piece is its longest suffix that begins a stop string."""
    watched = StopStrings(stop)
    so_far = out = ""
    for piece in split(text, cuts):
        so_far += piece
        out += watched.feed(piece)
        if watched.found is not None:
            return
        beginnings = {s[:n] for s in stop for n in range(1, len(s))}
        held = max((len(b) for b in beginnings if so_far.endswith(b)), default=0)
        assert out == so_far[: len(so_far) - held]


@pytest.mark.parametrize(
    ("pieces", "stop", "limit", "expected"),
    [
        (["st", "opera"], "stop", 1, ""),
        (["a st", "opper"], "stop", 1, "a "),
        (["One. Two", ". Three."], ".", 1, "One"),
        (["One. Two", ". Three."], ".", 2, "One. Two"),
        (["One. Two", ". Three"], ".", 3, "One. Two. Three"),
        (["대화 ", "끝", " 다음"], "끝", 1, "대화 "),
        (["abc 끝", "!"], "끝!", 1, "abc "),
        (["e", "n", "d"], "e nd", 1, "end"),
        (["a\n", "\nUser:"], ["\n\nUser:", "\n\nAssistant:"], 1, "a"),
        (["abab", "c"], ["ababd", "babc"], 1, "a"),
        (["no stop"], [], 1, "no stop"),
    ],
)
def test_examples(pieces, stop, limit, expected):
    shown, _ = fed(pieces, stop, limit)
    assert "".join(shown) == expected


def test_the_earliest_that_is_complete_counts():
    assert fed(["xabc"], ["abc", "b"]) == (["xa", ""], "b")
    # Both stop strings are complete at the same character, so the longer one counts.
    assert fed(["xabc"], ["xabc", "c"])[1] == "xabc"


def test_what_is_complete_before_it_may_stop_does_not_count():
    watched = StopStrings(".", stop_limit=1)
    assert watched.feed("a.", may_stop=False) == "a."
    assert watched.feed("b") == "b"
    assert watched.feed(".c") == ""
    assert watched.found == "."


def test_a_string_may_begin_before_it_may_stop():
    watched = StopStrings("END")
    assert watched.feed("xE", may_stop=False) == "x"
    assert watched.feed("ND") == ""
    assert watched.found == "END"


def test_nothing_comes_after_the_end():
    watched = StopStrings("b")
    assert watched.feed("ab") == "a"
    assert watched.feed("more") == ""
    assert watched.finish() == ""


def test_it_keeps_no_text():
    watched = StopStrings("some text and more", include=True)
    for _ in range(1000):
        watched.feed("some text ")
        watched.feed("unshown", is_shown=False)
    assert not any(isinstance(value, str) for value in vars(watched).values())
    assert not watched._unshown


# The rule, as a search from the start at each character


class Plain:
    """StopStrings without its automaton: it looks at all strings at each character."""

    def __init__(self, stop, limit, include):
        self.stop, self.left, self.include = stop, limit, include
        self.text, self.shown, self.returned, self.behind = "", [], 0, 0
        self.found = None

    def feed(self, piece, may_stop, is_shown):
        for character in piece:
            if self.found is not None:
                break
            self.text += character
            self.shown.append(is_shown)
            if may_stop:
                self.count()
        return self.upto(len(self.text) - self.held())

    def count(self):
        end = len(self.text)
        complete = [s for s in self.stop if self.text.endswith(s) and end - len(s) >= self.behind]
        if complete:
            self.behind, self.left = end, self.left - 1
            if self.left == 0:
                self.found = max(complete, key=len)
                begin = end - len(self.found)
                self.shown[begin:] = [self.include] * len(self.found)

    def held(self):
        if self.found is not None or self.left > 1:
            return 0
        since = self.text[self.behind :]
        beginnings = [s[:n] for s in self.stop for n in range(1, len(s)) if since.endswith(s[:n])]
        longest = max(map(len, beginnings), default=0)
        if not self.include:
            return longest
        shown = self.shown[len(self.text) - longest :]
        return longest - shown.index(False) if False in shown else 0

    def upto(self, end):
        begin, self.returned = self.returned, max(self.returned, end)
        return "".join(self.text[i] for i in range(begin, end) if self.shown[i])

    def finish(self):
        return self.upto(len(self.text))


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.text(alphabet="ab.", max_size=6), st.booleans(), st.booleans()), max_size=8
    ),
    stop=st.lists(st.text(alphabet="ab.", min_size=1, max_size=6), max_size=4),
    limit=st.integers(1, 3),
    include=st.booleans(),
)
@example(pieces=[("a", True, True), ("b", True, False)], stop=["ab"], limit=1, include=True)
@example(
    pieces=[("a", True, True), (".", True, False), ("b", True, True), ("a", True, True)],
    stop=["a.bb"],
    limit=1,
    include=True,
)
@example(
    pieces=[("ab", False, True), ("ab", True, True)], stop=["ab", "aba"], limit=1, include=False
)
@example(pieces=[("a.", True, False), ("b", True, True)], stop=[".b"], limit=1, include=True)
def test_each_feed_returns_what_the_plain_search_returns(pieces, stop, limit, include):
    """Pieces come with whether a stop string may end in them and whether they are shown."""
    watched = StopStrings(stop, stop_limit=limit, include=include)
    plain = Plain(stop, limit, include)
    for piece, may_stop, is_shown in pieces:
        returned = watched.feed(piece, may_stop=may_stop, is_shown=is_shown)
        assert returned == plain.feed(piece, may_stop, is_shown)
        assert watched.found == plain.found
    assert watched.finish() == plain.finish()
    assert watched.finish() == ""


# The cost, counted in calls: each look at a character, and each comparison of strings, is a call


class Calls:
    """The calls that stop_strings.py makes, of Python's own functions too, while it is entered.

    A call of a method of a string counts as many times as the string has characters, all of which
    it may read.
    """

    def __enter__(self):
        self.count = 0
        self.before = sys.getprofile()
        sys.setprofile(self.seen)
        return self

    def seen(self, frame, event, argument):
        if event in ("call", "c_call") and frame.f_code.co_filename == stop_strings.__file__:
            of = getattr(argument, "__self__", None)
            self.count += 1 + (len(of) if isinstance(of, str) else 0)

    def __exit__(self, *error):
        sys.setprofile(self.before)


def suffixes(size):
    """Return strings of this total length, each of which is a suffix of the next one."""
    strings, left = [], size
    while left > 0:
        strings.append("a" * min(len(strings) + 1, left) + "b")
        left -= len(strings[-1])
    return strings


HARD = {
    "one long one": lambda n: (["a" * n + "b"], "a" * (2 * n)),
    "one that never begins": lambda n: (["b" + "a" * n], "a" * n),
    "one that begins again and again": lambda n: (["ab" * (n // 2) + "c"], "ab" * (n // 2) + "aab"),
    "suffixes of each other": lambda n: (suffixes(n), "a" * n),
    "suffixes that occur": lambda n: (suffixes(n), ("a" * 200 + "b") * (n // 200)),
}


@pytest.mark.parametrize("split_at", [1, 10**9], ids=["characters", "one piece"])
@pytest.mark.parametrize("size", [2**10, 2**13, 2**16])
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
def test_the_cost_is_linear(hard, size, split_at):
    stop, text = hard(size)
    pieces = [text[i : i + split_at] for i in range(0, len(text), split_at)]
    with Calls() as calls:
        for strings, limit in ((stop, 10**9), ([string + "!" for string in stop], 1)):
            watched = StopStrings(strings, stop_limit=limit)
            for piece in pieces:
                watched.feed(piece)
            watched.finish()
    assert calls.count <= 40 * (len(text) + sum(map(len, stop)))


def test_what_is_returned_is_the_text_however_much_is_held():
    watched = StopStrings("a" * 1000 + "b", include=False)
    shown = [watched.feed("a") for _ in range(3000)]
    assert [len(piece) for piece in shown] == [0] * 1000 + [1] * 2000
    assert watched.finish() == "a" * 1000


def test_rows_with_the_same_strings_share_what_is_built():
    stop = [f"{i} " + "a" * 2000 for i in range(10)]
    with Calls() as one:
        kept = StopStrings(stop)
    with Calls() as others:
        rows = [StopStrings(reversed_, stop_limit=2) for reversed_ in [stop[::-1], set(stop)] * 128]
    assert others.count < one.count
    # They share no state.
    assert rows[0].feed(stop[0]) == stop[0]
    assert rows[2].feed(stop[0]) == stop[0]
    assert kept.feed(stop[0]) == ""
    assert (rows[0].found, rows[2].found, kept.found) == (None, None, stop[0])
    # What is built goes with the last row.
    del rows, kept
    gc.collect()
    assert frozenset(stop) not in stop_strings._AUTOMATA


# Arguments


@pytest.mark.parametrize(
    "stop", [("a.", "."), {"a.", "."}, frozenset(["a.", "."]), {"a.": 1, ".": 2}.keys()]
)
def test_any_collection_in_any_order(stop):
    assert fed(["xa.b"], stop) == (["x", ""], "a.")
    assert fed(["xa.b"], np.array(list(stop))) == (["x", ""], "a.")


def test_none_is_no_strings():
    assert not StopStrings(None).is_on
    assert fed(["ab"], None) == (["ab", ""], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop": ""}, "stop must have no empty string, got ''"),
        ({"stop": ["a", ""]}, r"stop must have no empty string, got \['a', ''\]"),
        ({"stop": b"a"}, "stop must be a string or a collection of strings, got b'a'"),
        ({"stop": bytearray(b"a")}, "stop must be a string or a collection of strings"),
        ({"stop": [b"a"]}, r"stop must be a string or a collection of strings, got \[b'a'\]"),
        ({"stop": {"a", None}}, "stop must be a string or a collection of strings"),
        ({"stop": ["a", 1]}, r"stop must be a string or a collection of strings, got \['a', 1\]"),
        ({"stop": 1}, "stop must be a string or a collection of strings, got 1"),
        ({"stop": iter("ab")}, "stop must be a string or a collection of strings, got <"),
        ({"stop": np.array("a")}, "stop must be a string or a collection of strings, got array"),
        ({"stop": "a", "stop_limit": 0}, "stop_limit must be an integer >= 1, got 0"),
        ({"stop": "a", "stop_limit": True}, "stop_limit must be an integer >= 1, got True"),
        ({"stop": "a", "stop_limit": 1.0}, r"stop_limit must be an integer >= 1, got 1\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StopStrings(**arguments)
