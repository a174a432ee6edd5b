"""Tests of StopStrings: where a text ends, however it is split, and which text is held back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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


def test_it_keeps_no_more_than_a_stop_string_of_text():
    watched = StopStrings("x" * 5, stop_limit=3)
    for _ in range(1000):
        watched.feed("some text ")
    assert len(watched._text) < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop": ""}, "stop must have no empty string, got ''"),
        ({"stop": ["a", ""]}, r"stop must have no empty string, got \['a', ''\]"),
        ({"stop": None}, "stop must be a string or a sequence of strings, got None"),
        ({"stop": ["a", 1]}, r"stop must be a string or a sequence of strings, got \['a', 1\]"),
        ({"stop": "a", "stop_limit": 0}, "stop_limit must be an integer >= 1, got 0"),
        ({"stop": "a", "stop_limit": True}, "stop_limit must be an integer >= 1, got True"),
        ({"stop": "a", "stop_limit": 1.0}, r"stop_limit must be an integer >= 1, got 1\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StopStrings(**arguments)
