"""Tests of ``explain``: its numbers agree with `sample`; picture, page and texts show them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from cases import EXACT_HALF, INF, NAN, OCTAVE_TEMPERATURE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sequence_lists import NUMBERS, random_case
from strategies import history_of, sampling_params, values

from llm_sampling import (
    InvalidLogitsError,
    SamplingParams,
    TokenHistory,
    filter_logits,
    reference,
    sample,
)
from llm_sampling.calls import make_call
from llm_sampling.generation import generate, seeded
from llm_sampling.generation.models import LanguageModel
from llm_sampling.tools.explain import (
    CUTS,
    STAGES,
    Continuation,
    compare,
    decoding_types,
    explain,
    list_label,
    lowered,
    page,
    picture,
    reason_label,
    record,
    rows,
    token_texts,
    visible,
)

# ---- one row, by hand ----------------------------------------------------------------------------

#: Bias and penalties make these logits -1, 0, -2, -1, -inf and -3, so that at OCTAVE_TEMPERATURE
#: the masses of tokens 0 to 5 are in the ratio 4 : 8 : 2 : 4 : 0 : 1.
LOGITS = torch.tensor([-1.0, 4.0, -4.0, -1.0, -INF, -1.5])
PARAMS = SamplingParams(
    temperature=OCTAVE_TEMPERATURE,
    top_k=4,
    top_p=0.8,
    min_p=0.6,
    repetition_penalty=2,
    frequency_penalty=0.5,
    presence_penalty=1,
    logit_bias={2: 2.0, 77: 1.0},
)
HISTORY = TokenHistory.from_ids([[5]], [[1, 1]], 6)
TEXTS = ["a", " b", "\n", "$x$", "", "</svg>"]


def test_each_stage_of_a_row_by_hand() -> None:
    explanation = explain(LOGITS, PARAMS, history=HISTORY)
    assert explanation.logits.tolist() == LOGITS.tolist()
    # token 1: 4 / 2 - 2 * 0.5 - 1; token 2: -4 + 2; token 5: -1.5 * 2
    assert explanation.processed.tolist() == [-1, 0, -2, -1, -INF, -3]
    assert explanation.order.tolist() == [1, 0, 3, 2, 5, 4]
    parts = {
        "temperature": ([4, 8, 2, 4, 0, 1], 19),
        "top_k": ([4, 8, 2, 4, 0, 0], 18),
        # 8 + 4 parts are less than 0.8 * 18; with the next token's 4 they are enough.
        "top_p": ([4, 8, 0, 4, 0, 0], 16),
        # All others have less than 0.6 of the best token's probability.
        "min_p": ([0, 8, 0, 0, 0, 0], 8),
    }
    for stage, (part, whole) in parts.items():
        assert explanation.probabilities[stage].tolist() == [p / whole for p in part]
        assert explanation.kept_after[stage].tolist() == [p > 0 for p in part]
    for stage, x in (("raw", LOGITS), ("penalties", explanation.processed)):
        e = [math.exp(value) for value in x.tolist()]
        got = explanation.probabilities[stage].tolist()
        assert got == pytest.approx([value / sum(e) for value in e], abs=1e-7)
        assert explanation.kept_after[stage].tolist() == [True, True, True, True, False, True]
    assert explanation.cut_by == ("min_p", None, "top_p", "min_p", "-inf", "top_k")
    assert explanation.kept.tolist() == [False, True, False, False, False, False]
    assert tuple(explanation.probabilities) == tuple(explanation.kept_after) == STAGES


def test_greedy_keeps_the_first_of_the_order() -> None:
    """Greedy leaves one token, so that the filters after it have nothing to cut."""
    explanation = explain(
        torch.tensor([1.0, 3.0, 3.0, -INF]), SamplingParams(temperature=0, top_k=1)
    )
    assert explanation.cut_by == ("greedy", None, "greedy", "-inf")
    for stage in STAGES[2:]:
        assert explanation.probabilities[stage].tolist() == [0, 1, 0, 0]


def test_min_tokens_to_keep_holds_in_every_stage() -> None:
    params = SamplingParams(top_k=1, top_p=1e-6, min_p=1, min_tokens_to_keep=2)
    explanation = explain(torch.tensor([0.0, 2.0, 1.0, -1.0]), params)
    assert explanation.cut_by == ("top_k", None, None, "top_k")


def test_ties_are_cut_by_id() -> None:
    equal = torch.zeros(4)
    assert explain(equal, SamplingParams(top_k=3)).cut_by == (None, None, None, "top_k")
    half = explain(equal, SamplingParams(top_p=EXACT_HALF))
    assert half.cut_by == (None, None, "top_p", "top_p")


def test_banned_tokens_whose_logits_are_not_finite() -> None:
    """The model's own distribution is that of raw logprobs: +inf has the mass, a NaN has none."""
    logits = torch.tensor([0.0, 1.0, INF, math.nan])
    params = SamplingParams(logit_bias={2: -INF, 3: -INF})
    explanation = explain(logits, params)
    assert explanation.probabilities["raw"].tolist() == [0, 0, 1, 0]
    assert explanation.cut_by == (None, None, "-inf", "-inf")
    assert [row.token for row in rows(explanation, top=1)] == [1, 2]


def test_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.tensor([1.1, 2.2, 3.3], dtype=dtype)
        explanation = explain(logits, SamplingParams(top_k=2))
        assert explanation.logits.tolist() == logits.tolist()
        assert explanation.cut_by == ("top_k", None, None)


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    explain(LOGITS, PARAMS, history=HISTORY)
    page(LOGITS, TEXTS, PARAMS, HISTORY)
    assert torch.equal(torch.get_rng_state(), state)


# ---- any row -------------------------------------------------------------------------------------

FILTERS = ("top_k", "top_p", "min_p")


@settings(
    max_examples=100,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_stages_are_nested_and_end_where_sample_draws(data: st.DataObject) -> None:
    """Each stage keeps what the kernel keeps if the filters after that stage are off."""
    vocab_size = data.draw(st.integers(1, 12) | st.sampled_from((33, 513)))
    logits = torch.tensor(data.draw(values(vocab_size)))
    params = data.draw(sampling_params(vocab_size))
    ids = st.lists(st.integers(-2, vocab_size + 1), max_size=12)
    history = history_of([params], [data.draw(ids)], [data.draw(ids)], vocab_size)
    try:
        drawn = sample(logits[None], params, history=history, num_samples=8, logprobs="processed")
    except InvalidLogitsError as refusal:
        with pytest.raises(InvalidLogitsError, match=re.escape(str(refusal))):
            explain(logits, params, history=history)
        return
    explanation = explain(logits, params, history=history)

    for place, stage in enumerate(STAGES[2:]):
        off: dict[str, Any] = dict.fromkeys(FILTERS[place:])
        left = filter_logits(logits[None], dataclasses.replace(params, **off), history=history)
        assert torch.equal(explanation.kept_after[stage], left[0] > -INF), stage
    assert drawn.logprobs is not None
    p = explanation.probabilities["min_p"][drawn.tokens[0]]
    torch.testing.assert_close(p, drawn.logprobs[0].double().exp(), rtol=0, atol=1e-6)

    for before, stage in itertools.pairwise(STAGES):
        kept = explanation.kept_after[stage]
        assert not bool((kept & ~explanation.kept_after[before]).any())
        length = int(kept.sum())
        assert bool(kept[explanation.order[:length]].all()), "a prefix of the order"
        cut = explanation.kept_after[before] & ~kept
        assert [explanation.cut_by[t] for t in cut.nonzero()[:, 0]] == [CUTS[stage]] * int(
            cut.sum()
        )
    for stage in STAGES:
        p = explanation.probabilities[stage]
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        assert not bool((p[~explanation.kept_after[stage]] > 0).any())
    assert [cut is None for cut in explanation.cut_by] == explanation.kept.tolist()


# ---- the rules that look at the history ----------------------------------------------------------

#: The text 1 3 0 1 3, in which 0 followed 1 3; 5 is a bad word, and so is 1 3 2.
RULES = SamplingParams(
    dry_multiplier=0.8,
    dry_base=2,
    dry_allowed_length=1,
    no_repeat_ngram_size=3,
    bad_words=[[5], [1, 3, 2]],
    min_tokens=9,
    stop_token_ids=[0, 77],
)
TEXT = TokenHistory.from_ids([[1, 3]], [[0, 77, 1, 3]], 6, max_length=9)
RULED = explain(torch.zeros(6), RULES, history=TEXT)


def test_the_reasons_of_a_row_by_hand() -> None:
    assert RULED.text == (1, 3, 0, 1, 3)
    assert RULED.cut_by == ("-inf", None, "-inf", None, None, "-inf")
    said = {
        token: [reason_label(RULED, token, reason, TEXTS) for reason in reasons]
        for token, reasons in RULED.reasons.items()
    }
    assert said == {
        0: [
            '-1.6 by DRY, dry_allowed_length 1: it followed the last 2 tokens, "␣b$x$", at place 2',
            'banned by no_repeat_ngram_size 3: it followed "␣b$x$" at place 2',
            "banned by min_tokens 9: the output has 3",
        ],
        2: ['banned by bad_words: it completes "␣b$x$\\n", [1, 3, 2]'],
        5: ['banned by bad_words: it completes "</svg>", [5]'],
    }
    assert list_label(RULED.reasons[0]) == "banned by n-gram, banned by min tokens, -1.6 by DRY"
    assert list_label(()) == ""
    assert lowered(RULED) == [0, 2, 5]
    shown = {row.token: row.reasons for row in rows(RULED)}
    assert shown == {token: RULED.reasons.get(token, ()) for token in range(6)}


def test_a_long_sequence_is_cut_and_a_single_id_has_none() -> None:
    text = TokenHistory.from_ids([[1] * 30 + [2]], None, 6, max_length=40)
    ruled = explain(torch.zeros(6), SamplingParams(no_repeat_ngram_size=1), history=text)
    assert reason_label(ruled, 1, ruled.reasons[1][0], TEXTS) == (
        "banned by no_repeat_ngram_size 1: it came at place 29"
    )
    text = TokenHistory.from_ids([[1] * 30], None, 6, max_length=40)
    ruled = explain(torch.zeros(6), SamplingParams(dry_multiplier=1), history=text)
    assert reason_label(ruled, 1, ruled.reasons[1][0], TEXTS) == (
        f"-{1.75**27:g} by DRY, dry_allowed_length 2: it followed the last 29 tokens, "
        '"…␣b␣b␣b␣b␣b␣b␣b␣b", at place 29'
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(dry_multiplier=1e-50),  # in float32 this is 0, which means off
        SamplingParams(min_tokens=3, stop_token_ids=[0]),
        SamplingParams(stop_token_ids=[0], dry_base=3),
        SamplingParams(bad_words=[[77], [1, 77]]),
        PARAMS,
    ],
)
def test_rows_that_no_rule_lowers(params: SamplingParams) -> None:
    explanation = explain(torch.zeros(6), params, history=TEXT)
    assert (explanation.reasons, lowered(explanation)) == ({}, [])
    assert explain(torch.zeros(6), SamplingParams(bad_words=[[1]])).reasons.keys() == {1}


def test_reasons_are_those_of_the_list_that_sample_takes() -> None:
    draw = random.Random(6)
    number = 0
    for _ in range(200):
        rules, text, extra, output_length, vocab_size = random_case(draw, draw.choice((4, 600)))
        ids = [id_ for id_ in text + extra if 0 <= id_ < vocab_size]
        begin = max(len(text) - output_length, 0)
        sequences = {
            name: [[id_ for id_ in one if id_ >= 0] or [0] for one in getattr(rules, name)]
            for name in ("dry_breakers", "bad_words")
        }
        stop_ids = [id_ for id_ in rules.stop_token_ids if id_ >= 0]
        of_rules = {name: getattr(rules, name) for name in NUMBERS}
        params = SamplingParams(**of_rules, **sequences, stop_token_ids=stop_ids)
        history = TokenHistory.from_ids([ids[:begin]], [ids[begin:]], vocab_size, max_length=200)
        call = make_call(torch.zeros(1, vocab_size), params, history=history)
        (listed,) = reference.penalty_lists(call) or [{}]
        listed |= {word[0]: INF for word in sequences["bad_words"] if len(word) == 1}
        try:
            reasons = explain(torch.zeros(vocab_size), params, history=history).reasons
        except InvalidLogitsError:
            assert len(listed) == vocab_size
            continue
        assert {token: max(one.amount for one in of) for token, of in reasons.items()} == {
            token: amount for token, amount in listed.items() if token < vocab_size
        }
        number += bool(reasons)
    assert number > 50


# ---- the table -----------------------------------------------------------------------------------


def test_rows_are_the_best_of_the_model_and_after_penalties() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    history = TokenHistory.from_ids([[]], [[0]], 4)
    chosen = rows(explain(logits, SamplingParams(presence_penalty=2, top_k=1), history=history), 1)
    assert [row.token for row in chosen] == [1, 0]
    first, second = chosen
    assert (first.logit, first.processed, first.kept, first.cut_by) == (4, 4, True, None)
    assert (second.logit, second.processed, second.kept, second.cut_by) == (5, 3, False, "top_k")
    assert second.probabilities["raw"] > second.probabilities["penalties"] > 0
    assert [second.probabilities[stage] for stage in STAGES[3:]] == [0, 0, 0]


def test_kept_rows_come_first_and_top_may_be_more_than_all() -> None:
    chosen = rows(explain(LOGITS, PARAMS, history=HISTORY), top=100)
    assert [row.token for row in chosen] == [1, 0, 3, 2, 5, 4]
    assert [row.kept for row in chosen] == [True] + [False] * 5


# ---- what is refused -----------------------------------------------------------------------------

EXPLAINED = explain(LOGITS, PARAMS, history=HISTORY)
PLAIN = SamplingParams()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain([1.0], PLAIN), "logits must be a torch.Tensor, got list"),
        (
            lambda: explain(torch.zeros(2, 3), PLAIN),
            "logits must have shape (vocab_size,), got (2, 3)",
        ),
        (
            lambda: explain(torch.zeros(3, dtype=torch.float64), PLAIN),
            "logits must be float32, float16 or bfloat16, got torch.float64",
        ),
        (
            lambda: explain(torch.zeros(0), PLAIN),
            "logits must have a vocab_size in 1 .. 2^20, got 0",
        ),
        (
            lambda: explain(torch.zeros(3), [PLAIN]),
            "params must be a SamplingParams, got list",
        ),
        (
            lambda: explain(torch.zeros(3), SamplingParams(presence_penalty=1)),
            "history must be given where repetition_penalty, frequency_penalty, "
            "presence_penalty, dry_multiplier, no_repeat_ngram_size, bad_words or min_tokens is "
            "on; TokenHistory.from_ids builds one",
        ),
        (
            lambda: explain(
                torch.zeros(3), PLAIN, history=TokenHistory.from_ids([[], []], None, 3)
            ),
            "history must have one row per row of logits (1), got 2",
        ),
        (
            lambda: explain(torch.zeros(3), PLAIN, history=HISTORY),
            "history must have the logits' vocab_size 3, got 6",
        ),
        (lambda: explain(torch.tensor([NAN, 1.0]), PLAIN), "NaN in logits in row 0"),
        (lambda: explain(torch.tensor([INF, 1.0]), PLAIN), "+inf in logits in row 0"),
        (
            lambda: explain(torch.tensor([-INF]), PLAIN),
            "no candidate left (every logit is -inf or masked) in row 0",
        ),
        (lambda: rows(EXPLAINED, 0), "top must be an integer >= 1, got 0"),
        (lambda: rows(EXPLAINED, True), "top must be an integer >= 1, got True"),
        (
            lambda: picture(EXPLAINED, TEXTS, "picture.gif"),
            "path must end in .png or .svg, got 'picture.gif'",
        ),
        (
            lambda: picture(EXPLAINED, TEXTS, "picture"),
            "path must end in .png or .svg, got 'picture'",
        ),
        (
            lambda: picture(EXPLAINED, TEXTS[:5], "a.png"),
            "texts must have one for each of 6 tokens, got 5",
        ),
        (
            lambda: picture(EXPLAINED, "abcdef", "a.png"),
            "texts must be a sequence of texts, got str",
        ),
        (
            lambda: picture(EXPLAINED, [*TEXTS[:5], None], "a.png"),
            "texts[5] must be a text, got None",
        ),
        (lambda: picture(EXPLAINED, TEXTS, "a.png", 1.5), "top must be an integer >= 1, got 1.5"),
        (lambda: picture(EXPLAINED, TEXTS, "a.png", title=7), "title must be a text, got 7"),
        (
            lambda: page(LOGITS, TEXTS[:5], PLAIN),
            "texts must have one for each of 6 tokens, got 5",
        ),
        (lambda: page(LOGITS, TEXTS, PLAIN, None, 7), "prompt must be a text, got 7"),
        (
            lambda: page(LOGITS, TEXTS, None),
            "params must be a SamplingParams, got NoneType",
        ),
        (
            lambda: compare(None, [1], None),
            "params must be a SamplingParams, got NoneType",
        ),
        (lambda: compare(None, [1], PLAIN, n=0), "n must be an integer >= 1, got 0"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert str(caught.value) == message


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("a\tb\n", "a\\tb\\n"),
        ("\u2028\u200f\ud800\x00", "\\u2028\\u200f\\ud800\\x00"),
        ("日本 é", "日本␣é"),
        ("\ufffd", "\ufffd"),
        ("", ""),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


# ---- the picture ---------------------------------------------------------------------------------


def drawn_words(svg: str) -> list[str]:
    """Return the texts in a picture, which matplotlib writes as comments beside the glyphs."""
    return [words.strip() for words in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)]


def test_a_picture_says_what_each_step_cut(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    svg, png = tmp_path / "row.svg", tmp_path / "row.PNG"
    title = "It costs $1 or $2\n</svg> \ud800"
    for path in (svg, png):
        picture(EXPLAINED, TEXTS, path, title=title)
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    ElementTree.parse(svg)
    words = drawn_words(svg.read_text(encoding="utf-8"))
    for panel in ("model", "bias and penalties", "temperature 1.4427", "top-k 4", "top-p 0.8"):
        assert panel in words
    assert words.count("cut by top-k") == 1
    assert words.count("cut by top-p") == 1
    assert words.count("cut by min-p") == 2
    assert {"␣b", "\\n", "$x$", "token 4", "&lt;/svg&gt;", "100.0%", "50.0%"} <= set(words)
    assert "others" not in " ".join(words)
    assert "It costs $1 or $2\\n&lt;/svg&gt; \\ud800" in words


def test_a_picture_says_what_the_rules_lower(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture(
        explain(torch.zeros(6), dataclasses.replace(RULES, min_tokens=0), history=TEXT),
        TEXTS,
        tmp_path / "a.svg",
    )
    words = drawn_words((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert words.count("banned by bad word") == 2
    assert words.count("banned by n-gram, -1.6 by DRY") == 1
    assert not any("-inf" in word for word in words)
    only_dry = dataclasses.replace(RULES, no_repeat_ngram_size=0, bad_words=None, min_tokens=0)
    picture(explain(torch.zeros(6), only_dry, history=TEXT), TEXTS, tmp_path / "b.svg")
    words = drawn_words((tmp_path / "b.svg").read_text(encoding="utf-8"))
    assert sum(bool(re.fullmatch(r"[\d.]+%, -1.6 by DRY", word)) for word in words) == 1


def test_a_picture_is_the_same_bytes_each_time(tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    plain = explain(LOGITS, SamplingParams(top_k=2))
    for suffix in ("png", "svg"):
        made = []
        for font_size in (10, 30):
            path = tmp_path / f"{font_size}.{suffix}"
            with matplotlib.rc_context({"font.size": font_size}):  # the user's style has no effect
                picture(plain, TEXTS, path, top=1)
                assert matplotlib.rcParams["font.size"] == font_size
            made.append(path.read_bytes())
        assert made[0] == made[1]
    assert "5 others" in drawn_words(made[0].decode())


def test_what_is_off_has_no_panel(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    # In float32 this temperature is 0, which means greedy.
    greedy = explain(LOGITS, SamplingParams(temperature=1e-50, top_k=2))
    picture(greedy, TEXTS, tmp_path / "row.svg")
    words = drawn_words((tmp_path / "row.svg").read_text(encoding="utf-8"))
    assert "greedy" in words
    assert words.count("cut by greedy") == 4
    assert not any(word.startswith(("top-k", "temperature", "penalties")) for word in words)


def test_a_picture_without_matplotlib(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="a picture needs matplotlib: pip install matplotlib"):
        picture(EXPLAINED, TEXTS, tmp_path / "row.png")


# ---- the page's source ---------------------------------------------------------------------------

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "\"'`&quot;${x}",
    "\u2028\u2029\ud800\udfff",
    "{{data}}",
    "\ufffd<img src=x onerror=alert(1)>",
]


class Elements(HTMLParser):
    """A parser that collects the start tags of a page and the text of its scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.is_script = False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.is_script = tag == "script"
        if self.is_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.is_script = False

    def handle_data(self, data: str) -> None:
        if self.is_script:
            self.scripts[-1] += data


def test_no_text_becomes_markup() -> None:
    hostile = page(LOGITS, HOSTILE, PARAMS, HISTORY, prompt=HOSTILE[0])
    tame = page(LOGITS, TEXTS, PARAMS, HISTORY, prompt="x")
    assert Elements(hostile).tags == Elements(tame).tags
    data = json.loads(Elements(hostile).scripts[0])
    assert data["texts"] == [visible(text) for text in HOSTILE]
    assert data["prompt"] == HOSTILE[0]
    before, _, after = tame.partition(Elements(tame).scripts[0])
    assert hostile.startswith(before)
    assert hostile.endswith(after)
    assert not set(Elements(hostile).scripts[0]) & set("<>&\u2028\u2029")
    assert Elements(hostile).scripts[0].isascii()


def test_the_page_is_complete_in_itself() -> None:
    source = page(LOGITS, TEXTS, PARAMS, HISTORY)
    assert "://" not in source
    loads = r"\b(href|import|fetch|XMLHttpRequest|eval|innerHTML|outerHTML|write)\b|\bsrc\s*="
    assert not re.search(loads, source)
    assert set(re.findall(r"url\(.*?\)", source)) == {"url(#hatch)"}
    assert "default-src 'none'" in source
    assert {"link", "img", "iframe"}.isdisjoint(Elements(source).tags)


def test_what_the_page_is_given() -> None:
    data = json.loads(Elements(page(LOGITS, TEXTS, PARAMS, HISTORY)).scripts[0])
    assert (data["bias"], data["seen"], data["counts"]) == ([[2, 2.0]], [1, 5], [[1, 2]])
    assert data["settings"]["repetition_penalty"] == 2
    assert data["min_p_cut"] == pytest.approx(-math.log2(0.6), abs=1e-5)
    plain = json.loads(Elements(page(LOGITS, TEXTS, SamplingParams(min_p=1e-50))).scripts[0])
    assert (plain["bias"], plain["seen"], plain["counts"]) == ([], [], [])
    assert plain["min_p_cut"] is None  # in float32 this min_p is 0, which means off


def test_the_page_has_the_ids_in_order_where_they_are_kept() -> None:
    params = SamplingParams(repetition_penalty=2, penalty_last_n=2)
    history = TokenHistory.from_ids([[5, 77]], [[1, 1, 3]], 6, max_length=9, penalty_last_n=2)
    data = json.loads(Elements(page(LOGITS, TEXTS, params, history)).scripts[0])
    assert (data["ids"], data["prompt_length"]) == ([5, 1, 1, 3], 1)
    assert data["settings"]["penalty_last_n"] == 2
    assert json.loads(Elements(page(LOGITS, TEXTS, PARAMS, HISTORY)).scripts[0])["ids"] is None


def test_the_page_has_what_the_rules_find() -> None:
    params = dataclasses.replace(RULES, dry_breakers=[[0], [0, 1]], logit_bias={4: 1.0, 5: 3.0})
    data = json.loads(Elements(page(torch.zeros(6), TEXTS, params, TEXT)).scripts[0])
    assert data["rules"] == {
        "matches": [0, 0, 2, 0, 0],
        "breaks": [[1, 2], [2, 1]],
        "breaker_ids": [0],
        "bad": [2, 5],
        "stop_token_ids": [0],
        "output_length": 3,
    }
    assert data["bias"] == [[4, 1.0]]
    assert data["settings"]["dry_multiplier"] == 0.8
    plain = json.loads(Elements(page(LOGITS, TEXTS, PLAIN)).scripts[0])["rules"]
    assert plain.pop("output_length") == 0
    assert not any(plain.values())


# ---- with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_llama) -> LanguageModel:
    from toy_tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny_llama(300)  # more logits than the tokenizer has tokens
    return LanguageModel("tiny", model, tokenizer, frozenset({256}), 300, None)


def test_record_is_the_models_last_row(tiny: LanguageModel) -> None:
    ids = [5, 17, 17]
    logits, history = record(tiny, ids)
    with torch.no_grad():
        want = tiny.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, want)
    assert (logits.dtype, logits.shape, logits.requires_grad) == (torch.float32, (300,), False)
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1)
    penalised = explain(logits, params, history=history).processed != logits.double()
    assert penalised.nonzero()[:, 0].tolist() == [5, 17]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "ids must be a sequence of at least one token id, got []"),
        ("abc", "ids must be a sequence of at least one token id, got 'abc'"),
        ([300], "ids must hold integers in 0 .. 299, got 300"),
        ([1, True], "ids must hold integers in 0 .. 299, got True"),
        ([0.5], "ids must hold integers in 0 .. 299, got 0.5"),
    ],
)
def test_ids_that_are_refused(tiny: LanguageModel, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        record(tiny, ids)
    with pytest.raises(ValueError, match=re.escape(f"prompt_{message}")):
        compare(tiny, ids, PLAIN)


def test_token_texts_keep_the_space_in_front(tiny: LanguageModel) -> None:
    from toy_tokenizers import WORDS, word_tokenizer

    texts = token_texts(tiny)
    assert len(texts) == 300
    assert sorted(texts)[-1] == "\ufffd"  # a byte that is not a character
    (space,) = tiny.tokenizer(" ")["input_ids"]
    assert texts[space] == " "
    assert texts[299] == ""
    words = word_tokenizer()
    texts = token_texts(dataclasses.replace(tiny, tokenizer=words, vocab_size=len(words)))
    assert texts[256 : 256 + len(WORDS)] == [word.replace("▁", " ") for word in WORDS]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (SamplingParams(), ["greedy", "temperature"]),
        (SamplingParams(temperature=0.7, seed=3), ["greedy", "temperature"]),
        (SamplingParams(top_k=5), ["greedy", "temperature", "top_k"]),
        (
            SamplingParams(0.7, top_k=5, top_p=0.9, min_p=0.1),
            ["greedy", "temperature", "top_k", "top_p", "min_p", "all"],
        ),
        (SamplingParams(presence_penalty=1), ["greedy", "temperature", "all"]),
        (SamplingParams(temperature=0, top_k=5), ["greedy"]),
        (SamplingParams(temperature=1e-50, logit_bias={1: 1}), ["greedy", "all"]),
    ],
)
def test_decoding_types(params: SamplingParams, names: list[str]) -> None:
    types = decoding_types(params)
    assert list(types) == names
    assert types["greedy"] == SamplingParams(temperature=0)
    if "top_k" in types:
        alone = SamplingParams(temperature=params.temperature, top_k=5)
        assert types["top_k"] == alone
    assert types.get("all", params) == params


def test_compare_is_what_generate_gives(tiny: LanguageModel) -> None:
    params = SamplingParams(temperature=1.5, top_k=40, repetition_penalty=1.3, seed=4)
    got = compare(tiny, [5, 17], params, n=2, max_new_tokens=6)
    names = ["greedy", *["temperature"] * 2, *["top_k"] * 2, *["all"] * 2]
    assert [one.decoding for one in got] == names
    second = seeded(params, 1).seed
    assert [one.params.seed for one in got] == [None, 4, second, 4, second, 4, second]
    assert got == compare(tiny, [5, 17], params, n=2, max_new_tokens=6)
    (alone,) = generate(
        tiny.model, [[5, 17]], params, tokenizer=tiny.tokenizer, max_new_tokens=6, eos_token_ids=[]
    )
    assert got[5] == Continuation("all", params, alone.text)
    assert len({one.text for one in got}) > 3


def test_texts_of_a_model_without_tokens_are_not_compared(tiny: LanguageModel) -> None:
    broken = copy.deepcopy(tiny.model)
    broken.lm_head.weight.data.fill_(NAN)
    broken = dataclasses.replace(tiny, model=broken)
    with pytest.raises(InvalidLogitsError, match="NaN in logits"):
        compare(broken, [5, 17], SamplingParams(seed=4), n=2, max_new_tokens=6)


@pytest.mark.model
def test_the_default_model_explained(smollm: LanguageModel, tmp_path) -> None:
    ids = smollm.encode("The capital of France is")
    logits, history = record(smollm, ids)
    texts = token_texts(smollm)
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.99, repetition_penalty=1.1)
    explanation = explain(logits, params, history=history)
    chosen = rows(explanation)
    assert texts[chosen[0].token] == " Paris"
    assert chosen[0].kept
    left = [int(explanation.kept_after[stage].sum()) for stage in STAGES]
    assert left[:4] == [49152, 49152, 49152, 50]
    assert 1 < left[4] == left[5] < 50
    assert "".join(texts[token] for token in ids) == "The capital of France is"
    assert sum(text == "" for text in texts) == 0
    picture(explanation, texts, tmp_path / "row.svg")
    assert len(page(logits, texts, params, history)) < 2**21
