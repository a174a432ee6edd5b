"""Test that the page of `explain.page` keeps exactly the tokens that the kernels keep.

Headless Chromium opens the page. A script that is appended to it sets the inputs as a user would,
and writes the results into the document, which the test reads from Chromium's output.
"""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EXACT_HALF, INF, OCTAVE_TEMPERATURE, threads
from torch import Tensor

from llm_sampling import BatchParams, SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.tools.explain import STAGES, cut_label, explain, page, visible

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
CLOSE = 1e-6

Setting = dict[str, Any]

# ---- a browser -----------------------------------------------------------------------------------


def run_in_browser(source: str, script: str, folder: Path, link: str = "") -> Any:
    """Return the result of ``script``, the body of a function that is run at the page's end.

    The result is passed as JSON.
    """
    if CHROMIUM is None:
        reason = "there is no chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    assert source.count("</body>") == 1
    wrapped = f"""<pre id="answer"></pre><script>
      let answer;
      try {{ answer = (() => {{ {script} }})(); }} catch (error) {{ answer = String(error.stack); }}
      document.getElementById("answer").textContent = JSON.stringify(answer);
    </script></body>"""
    path = folder / "page.html"
    path.write_text(source.replace("</body>", wrapped), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", path.as_uri() + link],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    answer = json.loads(html.unescape(found[1]))
    assert not isinstance(answer, str), answer
    return answer


#: The number of tokens whose probabilities are compared after each step; after the last step all
#: kept tokens are compared.
SOME = 100

#: JavaScript that sets the inputs to each of SETTINGS and returns the kept tokens in order, with
#: their probabilities.
MOVE = """
  return SETTINGS.map((setting) => {
    for (const [name, value] of Object.entries(setting)) {
      const field = document.getElementById(name);
      if (field.value === value) continue;
      field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    const stages = Object.fromEntries(Object.entries(shown.left).map(([stage, left]) => {
      const length = stage === "min_p" ? left : Math.min(left, SOME);
      return [stage, Array.from({ length }, (_, rank) => probability(shown, stage, rank))];
    }));
    const most = Math.max(shown.left.min_p, SOME);
    const order = [...shown.order.subarray(0, most)];
    const cuts = order.slice(0, SOME).map((_, rank) => cutBy(shown, rank)?.name ?? null);
    const raw = order.slice(0, SOME).map((_, rank) => probability(shown, "raw", rank));
    const lowered = {};
    for (const [token, [[amount]]] of shown.lowered) lowered[token] = amount;
    return { left: shown.left, order, stages, cuts, raw, lowered };
  });
"""


def moved(source: str, settings: Sequence[Setting], folder: Path) -> list[dict[str, Any]]:
    texts = [
        {name: value if isinstance(value, str) else repr(value) for name, value in setting.items()}
        for setting in settings
    ]
    script = MOVE.replace("SETTINGS", json.dumps(texts)).replace("SOME", str(SOME))
    answers = run_in_browser(source, script, folder)
    assert len(answers) == len(settings)
    return answers


# ---- rows and settings ---------------------------------------------------------------------------

#: The tokens 3 and 5 are banned.
BIAS = {3: -INF, 5: -INF, 70: 1.3, 700: -2.7, 5000: 9.0}


def ties() -> Tensor:
    """Return 3,000 multiples of 1/8, so that most tokens have ties; a few are -inf.

    The banned tokens are at +inf and NaN: the ban makes them harmless, so no row is refused.
    """
    generator = torch.Generator().manual_seed(1)
    row = (torch.randn(3000, generator=generator) * 24).round() / 8
    row[torch.randperm(3000, generator=generator)[:20]] = -INF
    row[7] = -0.0
    row[3], row[5] = INF, math.nan
    return row


def plateau() -> Tensor:
    """Return 64 equal logits: all masses but those of two banned tokens are at their maximum."""
    return torch.zeros(64)


def real_sized() -> Tensor:
    """Return logits like a model's: a few dominant tokens, a long tail that falls with the rank."""
    generator = torch.Generator().manual_seed(2)
    rank = torch.arange(1, 49153, dtype=torch.float32)
    row = 14.0 - 1.6 * rank.log() + 0.7 * torch.randn(49152, generator=generator)
    return row[torch.randperm(49152, generator=generator)]


def history_of(row: Tensor, penalty_last_n: int = -1) -> TokenHistory:
    best = torch.topk(row, 12).indices.tolist()
    return TokenHistory.from_ids(
        [best[4:]],
        [[best[0]] * 3 + best[2:6] + [-1]],
        len(row),
        max_length=15,
        penalty_last_n=penalty_last_n,
    )


OFF: Setting = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_tokens_to_keep": 1,
    "repetition_penalty_scope": "all",
    "penalty_last_n": -1,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "no_repeat_ngram_size": 0,
    "no_repeat_ngram_window": 0,
    "min_tokens": 0,
}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.4}
FEW: tuple[Setting, ...] = (
    OFF,
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 37, "min_p": 0.02, **PENALTIES},
    {"temperature": 0.0, "top_k": 5, **PENALTIES},
    {"temperature": 1e-40, "top_p": 0.3},
    {"top_p": 0.999, **PENALTIES},
    {"temperature": 3.0, "min_p": 0.1},
    {"top_p": 0.9, "repetition_penalty_scope": "output", **PENALTIES},
    {"top_p": 0.9, "penalty_last_n": 9, **PENALTIES},
)
EDGES: tuple[Setting, ...] = (
    {"temperature": OCTAVE_TEMPERATURE, "top_p": EXACT_HALF},
    {"temperature": OCTAVE_TEMPERATURE, "min_p": 0.5},
    {"top_p": 5e-324},
    {"top_p": 1 - 1e-12, "min_p": 1e-50},  # in float32 this min_p is 0, which means off
    {"temperature": 1e-50},  # in float32 this is 0, which means greedy
    {"temperature": 3e38, "top_p": 0.5},
    {"top_k": 2**31, "top_p": 0.5, "min_tokens_to_keep": 1500},
    {"top_k": 3, "min_p": 1.0, "min_tokens_to_keep": 7},
    {"repetition_penalty": 1e-3, "top_k": -1, "top_p": 0.1},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0, "min_p": 1e-9},
    {"penalty_last_n": 0, "top_k": 12, **PENALTIES},
    {"penalty_last_n": 6, "repetition_penalty_scope": "output", "top_k": 12, **PENALTIES},
    {"penalty_last_n": 100, "top_k": 12, **PENALTIES},
)


def random_settings(count: int) -> list[Setting]:
    rng = random.Random(0)
    return [
        {
            "temperature": rng.choice((1.0, 0.8, rng.uniform(0.1, 3))),
            "top_k": rng.choice((0, rng.randrange(1, 3200), rng.randrange(1, 60))),
            "top_p": rng.choice((1.0, rng.uniform(0.01, 1), rng.uniform(0.9, 1))),
            "min_p": rng.choice((0.0, rng.random() ** 4)),
            "repetition_penalty": rng.choice((1.0, rng.uniform(0.5, 2))),
            "frequency_penalty": rng.choice((0.0, rng.uniform(-2, 2))),
            "presence_penalty": rng.choice((0.0, rng.uniform(-2, 2))),
            "min_tokens_to_keep": rng.choice((1, rng.randrange(1, 9))),
            "repetition_penalty_scope": rng.choice(("all", "output")),
            "penalty_last_n": rng.choice((-1, rng.randrange(17))),
        }
        for _ in range(count)
    ]


#: The window begins with an id of the prompt that the output does not have.
WINDOW = {"penalty_last_n": 9, **PENALTIES}

ROWS = {"ties": ties, "plateau": plateau, "real-sized": real_sized}
SETTINGS = {
    "ties": [*FEW, *EDGES, *random_settings(30)],
    "plateau": [*FEW, *EDGES, *random_settings(10)],
    "real-sized": [*FEW, *random_settings(2)],
}


def page_of(row: Tensor) -> str:
    params = SamplingParams(min_p=0.02, logit_bias=BIAS)
    return page(row, [f"token {i}" for i in range(len(row))], params, history_of(row))


def differences(
    row: Tensor,
    setting: Setting,
    answer: dict[str, Any],
    history: TokenHistory | None = None,
    **fixed: Any,
) -> set[str]:
    """Return the names of what differs between the page and the kernels or ``explain``."""
    params = SamplingParams(**setting, logit_bias=BIAS, seed=3, **fixed)
    history = history_of(row, params.penalty_last_n) if history is None else history
    found = set()
    ids = answer["order"][: answer["left"]["min_p"]]
    kept = torch.zeros(len(row), dtype=torch.bool)
    kept[ids] = True
    if not torch.equal(kept, filter_logits(row[None], params, history=history)[0] > -INF):
        found.add("kept")

    p = torch.zeros(len(row), dtype=torch.float64)
    p[ids] = torch.tensor(answer["stages"]["min_p"], dtype=torch.float64)
    drawn = sample(row[None], params, history=history, num_samples=200, logprobs="processed")
    assert drawn.logprobs is not None
    far = (p[drawn.tokens[0]] - drawn.logprobs[0].double().exp()).abs() > CLOSE
    if bool(far.any()):
        found.add("probabilities")

    explanation = explain(row, params, history=history)
    listed = {token: max(one.amount for one in of) for token, of in explanation.reasons.items()}
    amounts = {int(token): INF if x is None else x for token, x in answer["lowered"].items()}
    if amounts != listed:
        found.add("what the rules lower")
    for stage in STAGES[1:]:
        if answer["left"][stage] != int(explanation.kept_after[stage].sum()):
            found.add(f"length after {stage}")
        ids = explanation.order[: len(answer["stages"][stage])]
        if answer["order"][: len(ids)] != ids.tolist():
            found.add(f"order after {stage}")
        if answer["stages"][stage] != explanation.probabilities[stage][ids].tolist():
            found.add(f"bits after {stage}")
    ids = explanation.order[:SOME]
    cuts = [explanation.cut_by[token] for token in ids]
    if answer["cuts"] != [None if cut is None else cut_label(cut) for cut in cuts]:
        found.add("what cut it")
    if answer["raw"] != pytest.approx(explanation.probabilities["raw"][ids].tolist(), rel=1e-12):
        found.add("the model's own")
    return found


# ---- rows with rules that look at the history ----------------------------------------------------

#: Two outputs, of few ids and of one. The breakers overlap, and some end at the same place.
TEXTS = ([2, 5, 0, 1, 2, 5, 1, 0, 2, 4, 0, 1, 2, 5, 1, 0, 2], [3] * 300)
BREAKERS = [[4], [1, 0, 2, 4], [2, 4, 0], [0]]
BAD_WORDS = [[6], [0, 2, 7], [9, 2, 8], [3, 9]]
RULED: tuple[Setting, ...] = (
    {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"dry_multiplier": 0.8, "dry_base": 1.1, "top_p": 0.9, **PENALTIES},
    {"dry_multiplier": 100.0, "dry_base": 100.0, "dry_allowed_length": 3},
    {"dry_multiplier": 1e-3, "dry_base": 1.01, "dry_allowed_length": 20},
    {"dry_multiplier": 1e-50, "dry_allowed_length": 1},  # in float32 this is 0, which means off
    {"dry_multiplier": 2.0, "dry_allowed_length": 299},
    {"dry_multiplier": 2.0, "dry_penalty_last_n": 0, "dry_allowed_length": 1},
    {"dry_multiplier": 2.0, "dry_penalty_last_n": 1000, "dry_allowed_length": 1},
    *({"dry_multiplier": 0.7, "dry_penalty_last_n": n, "dry_allowed_length": 1} for n in range(18)),
    *({"no_repeat_ngram_size": n, "dry_multiplier": 1.0, "temperature": 2.0} for n in range(1, 6)),
    *({"no_repeat_ngram_size": 2, "no_repeat_ngram_window": n} for n in range(1, 19)),
    {"no_repeat_ngram_size": 1, "no_repeat_ngram_window": 3},
    {"min_tokens": 1, "top_k": 9},
    {"min_tokens": 10**6, "top_k": 9, "dry_multiplier": 0.5},
)


def ruled_row() -> Tensor:
    return torch.tensor([0.5 * (i % 7) for i in range(24)])


@pytest.mark.parametrize("text", TEXTS, ids=["few", "one"])
@pytest.mark.parametrize("breakers", [None, BREAKERS], ids=["", "breakers"])
def test_the_page_lists_what_the_rules_lower(
    text: list[int], breakers: list[list[int]] | None, tmp_path: Path
) -> None:
    row = ruled_row()
    fixed: Setting = {
        "dry_breakers": breakers,
        "bad_words": BAD_WORDS,
        "stop_token_ids": [11, 99, 11],
    }
    history = TokenHistory.from_ids([text[:2]], [text[2:]], len(row), max_length=400)
    texts = [f"token {i}" for i in range(len(row))]
    source = page(row, texts, SamplingParams(logit_bias=BIAS, **fixed), history)
    settings = [OFF | setting for setting in RULED]
    lowered = 0
    for setting, answer in zip(settings, moved(source, settings, tmp_path), strict=True):
        assert differences(row, setting, answer, history, **fixed) == set(), setting
        lowered += len(answer["lowered"]) > 2  # beside the bad words
    assert lowered > 5


def test_the_page_says_what_the_rules_lower(tmp_path: Path) -> None:
    history = TokenHistory.from_ids([[1, 3]], [[0, 1, 3]], 6, max_length=9)
    params = SamplingParams(
        dry_multiplier=0.8,
        dry_allowed_length=1,
        bad_words=[[5], [1, 3, 2]],
        stop_token_ids=[0],
        logit_bias={4: -INF},
    )
    source = page(torch.zeros(6), list("abcdef"), params, history)
    script = """
      const byId = (id) => document.getElementById(id);
      const type = (name, text) => {
        byId(name).value = text;
        byId(name).dispatchEvent(new Event("input", { bubbles: true }));
      };
      const state = () => [byId("list-note").textContent,
        Object.fromEntries([...byId("rows").rows].map((row) =>
          [row.cells[1].textContent, row.cells[row.cells.length - 1].textContent])),
        [...byId("picture").querySelectorAll("text")].map((text) => text.textContent)];
      const first = state();
      type("no_repeat_ngram_size", "3");
      type("min_tokens", "4");
      return [byId("rules").open, byId("bias-note").textContent, first, state()];
    """
    is_open, bias, (note, outcomes, bars), (later, *_) = run_in_browser(source, script, tmp_path)
    assert (is_open, bias) == (True, "Logit bias: e banned")
    start = "Lowered by rules that look at the history: "
    assert note == start + "a -1.4 by DRY (2 tokens); c banned by bad word; f banned by bad word"
    assert outcomes == {
        **{"0": "kept, -1.4 by DRY (2 tokens)", "1": "kept", "3": "kept", "4": "cut by -inf"},
        **dict.fromkeys("25", "cut by -inf, banned by bad word"),
    }
    assert bars.count("banned") == 2
    assert sum(bar.endswith(" lowered") for bar in bars) == 1
    assert later.startswith(
        start + "a banned by n-gram, banned by min tokens, -1.4 by DRY (2 tokens); c "
    )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("place - begin, room)", "room)"),
        ("fl(amount * base)", "amount * base"),
        ("following + length <= n - begin", "following <= n - begin"),
        ("if (alone.includes(id)) continue;", ""),
        (">= size - 1)", ">= size)"),
    ],
)
def test_a_page_whose_rules_are_wrong_is_seen(right: str, wrong: str, tmp_path: Path) -> None:
    row, text = ruled_row(), TEXTS[0]
    history = TokenHistory.from_ids([text[:2]], [text[2:]], len(row), max_length=400)
    texts = [f"token {i}" for i in range(len(row))]
    source = page(row, texts, SamplingParams(logit_bias=BIAS, dry_breakers=BREAKERS), history)
    assert source.count(right) == 1
    settings = [OFF | setting for setting in RULED]
    answers = moved(source.replace(right, wrong), settings, tmp_path)
    assert any(
        differences(row, setting, answer, history, dry_breakers=BREAKERS)
        for setting, answer in zip(settings, answers, strict=True)
    )


@pytest.mark.parametrize("name", ROWS)
def test_the_page_keeps_what_sample_keeps(name: str, tmp_path: Path) -> None:
    row = ROWS[name]()
    settings = [OFF | setting for setting in SETTINGS[name]]
    answers = moved(page_of(row), settings, tmp_path)
    with threads(1):  # the rows are short, and threads would wait for each other on a busy machine
        for setting, answer in zip(settings, answers, strict=True):
            assert differences(row, setting, answer) == set(), setting


@pytest.mark.parametrize(
    ("right", "wrong", "setting", "seen"),
    [
        ('"-0x1.62e3b2p-1"', '"-0x1.62e8b2p-1"', {"temperature": 1.3}, "probabilities"),
        ("Math.max(settings.top_k, atLeast)", "settings.top_k + 1", {"top_k": 4}, "kept"),
        (" - 2 ** 11)", ")", {"top_p": EXACT_HALF}, "kept"),
        ("ids.length - lastN", "ids.length - lastN + 1", WINDOW, "probabilities"),
        ("ofOutput ? ", "!ofOutput ? ", WINDOW, "probabilities"),
    ],
)
def test_a_page_that_is_wrong_is_seen(
    right: str, wrong: str, setting: Setting, seen: str, tmp_path: Path
) -> None:
    row = plateau() if seen == "kept" else ties()
    source = page_of(row)
    assert source.count(right) == 1
    (answer,) = moved(source.replace(right, wrong), [OFF | setting], tmp_path)
    assert seen in differences(row, OFF | setting, answer)


# ---- the page beside its numbers -----------------------------------------------------------------

HOSTILE = ["</script><script>document.title = 'x'</script>", "<img src=x>", " \u2028\ud800", ""]

#: Values that SamplingParams refuses, and that the page must refuse with the same message.
BAD = {
    "temperature": ["-1", "1e39"],
    "top_k": ["-2", "1.5"],
    "top_p": ["0", "1.1"],
    "min_p": ["-0.1", "2"],
    "repetition_penalty": ["0", "1e-60", "1e40"],
    "frequency_penalty": ["-2.1", "3"],
    "presence_penalty": ["-2.1", "3"],
    "min_tokens_to_keep": ["0", "1.5"],
    "penalty_last_n": ["-2", "1.5"],
    "dry_multiplier": ["-0.1", "100.5"],
    "dry_base": ["0.9", "101"],
    "dry_allowed_length": ["0", "1.5"],
    "dry_penalty_last_n": ["-2", "1.5"],
    "no_repeat_ngram_size": ["-1", "1.5"],
    "no_repeat_ngram_window": ["-1", "1.5"],
    "min_tokens": ["-1", "1.5"],
}

USE = """
  const byId = (id) => document.getElementById(id);
  const type = (name, text) => {
    byId(name).value = text;
    byId(name).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const names = Object.keys(FIELDS);
  const state = () => Object.fromEntries(names.map((name) => [name, byId(name).value]));
  const told = (name) => byId(`${name}-rule`).textContent;
  const answer = { linked: state(), link: byId("link-error").textContent, told: told("top_p") };
  byId("reset").click();
  answer.reset = state();
  const textOf = (element) => element.textContent;
  answer.cells = [...byId("rows").rows].map((row) => [...row.cells].map(textOf));
  answer.summary = byId("summary").textContent;
  answer.bars = [...byId("picture").querySelectorAll("text")].map(textOf);
  answer.strays = document.querySelectorAll("img, main script").length;
  answer.title = document.title;
  answer.refused = {};
  for (const [name, values] of Object.entries(BAD)) {
    const good = byId(name).value;
    answer.refused[name] = [...values, "", "one", "0x1", "Infinity", "1,5"].map((text) => {
      const before = shown;
      type(name, text);
      const isRed = byId(name).getAttribute("aria-invalid") === "true";
      const isStale = byId("results").classList.contains("stale") && !byId("stale").hidden;
      return [told(name), isRed && isStale && shown === before];
    });
    type(name, good);
    answer.refused[name].push([told(name), byId("results").classList.contains("stale")]);
  }
  byId("top_k-slider").value = 2;
  byId("top_k-slider").dispatchEvent(new Event("input", { bubbles: true }));
  answer.slid = [byId("top_k").value, shown.left.top_k];
  byId("top_k-slider").dispatchEvent(new Event("change", { bubbles: true }));
  answer.hash = location.hash;
  byId("off").click();
  answer.off = state();
  answer.labels = [...document.querySelectorAll("input, select")].every(
    (input) => input.labels.length || input.getAttribute("aria-label"));
  answer.cuts = Array.from({ length: 1000 }, (_, i) => minPCut((i + 1) / 1000));
  return answer;
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a page shows after it was opened by a link and all its inputs were used."""
    source = page(
        torch.tensor([1.0, 3.0, 2.0, -INF]),
        HOSTILE,
        SamplingParams(temperature=0.7, top_k=2, logit_bias={0: 0.5}),
        prompt=HOSTILE[0],
    )
    link = "#temperature=0.5&top_p=7&colour=red"
    script = USE.replace("BAD", json.dumps(BAD))
    answer = run_in_browser(source, script, tmp_path_factory.mktemp("used"), link)
    assert isinstance(answer, dict)
    return answer


def test_a_link_is_a_setting(used: dict[str, Any]) -> None:
    at_first = {name: str(value).removesuffix(".0") for name, value in OFF.items()}
    at_first |= {"temperature": "0.7", "top_k": "2"}
    assert used["linked"] == at_first | {"temperature": "0.5", "top_p": "7"}
    assert used["link"] == "the link names what is no parameter: colour"
    assert used["told"] == "top_p must be in (0, 1], got 7"
    assert used["reset"] == at_first
    for name, value in at_first.items():
        assert f"{name}={value}" in re.split("[#&]", used["hash"])
    assert used["off"] == at_first | {"temperature": "1", "top_k": "0"}


def test_a_slider_moves_its_field(used: dict[str, Any]) -> None:
    assert used["slid"] == ["2", 2]
    assert used["labels"]


def test_the_table_and_the_picture_show_it(used: dict[str, Any]) -> None:
    explanation = explain(
        torch.tensor([1.0, 3.0, 2.0, -INF]),
        SamplingParams(temperature=0.7, top_k=2, logit_bias={0: 0.5}),
    )
    lines = used["cells"]
    assert [line[1] for line in lines] == ["1", "2", "0", "3"]
    assert [line[-1] for line in lines] == ["kept", "kept", "cut by top-k", "cut by -inf"]
    assert lines[2][2:4] == ["1.000", "1.500"]
    for line in lines[:3]:
        for stage, cell in zip(STAGES, line[4:10], strict=True):
            p = explanation.probabilities[stage][int(line[1])].item()
            assert (
                cell == ""
                if p == 0
                else float(cell.removesuffix(" %")) == pytest.approx(100 * p, rel=0.005)
            )
    assert used["summary"].startswith("2 tokens of 4 kept, the best is “<img␣src=x>” with ")
    assert {"<img␣src=x>", "cut by top-k", "cut by -inf"} <= set(used["bars"])


def test_no_text_is_markup(used: dict[str, Any]) -> None:
    assert used["strays"] == 0
    assert used["title"] == "What each step does to the next token"
    shown = {line[1]: line[0] for line in used["cells"]}
    assert [shown[str(i)] for i in range(4)] == [*map(visible, HOSTILE[:3]), "token 3"]


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_told_in_the_words_of_sampling_params(
    name: str, used: dict[str, Any]
) -> None:
    *refused, (told, is_stale) = used["refused"][name]
    assert (told, is_stale) == ("", False)
    assert len(refused) == len(BAD[name]) + 5
    for (message, is_shown), text in zip(refused, BAD[name], strict=False):
        value = float(text) if "." in text or "e" in text else int(text)
        with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
            SamplingParams(**{name: value})
        rule = str(caught.value).rpartition(", got ")[0]
        assert message == f"{rule}, got {text}"
        assert is_shown
    assert all(is_shown for _, is_shown in refused)


@pytest.mark.parametrize(
    ("name", "off"),
    [("penalty_last_n", "-1"), ("dry_multiplier", "0"), ("no_repeat_ngram_size", "0")],
)
def test_some_settings_need_the_ids_in_order(name: str, off: str, tmp_path: Path) -> None:
    history = TokenHistory.from_ids([[1]], [[0]], 4)
    params = SamplingParams(repetition_penalty=2, stop_token_ids=[2])
    source = page(torch.zeros(4), ["a"] * 4, params, history)
    script = """
      const type = (name, text) => {
        const field = document.getElementById(name);
        field.value = text;
        field.dispatchEvent(new Event("input", { bubbles: true }));
        return document.getElementById(`${name}-rule`).textContent;
      };
      const told = [type(NAME, "3"), type(NAME, OFF), type("min_tokens", "2")];
      return [...told, [...shown.lowered.keys()]];
    """
    script = script.replace("NAME", json.dumps(name)).replace("OFF", json.dumps(off))
    told = f"{name} must be {off}, since this page does not have the ids in order, got 3"
    assert run_in_browser(source, script, tmp_path) == [told, "", "", [2]]


def test_cuts_of_min_p_are_the_hosts(used: dict[str, Any]) -> None:
    """The browser's logarithm gives the same limit as BatchParams at every slider position."""
    params = [SamplingParams(min_p=(i + 1) / 1000) for i in range(1000)]
    assert used["cuts"] == BatchParams.from_list(params).min_p_cut.tolist()
    assert math.isclose(used["cuts"][499], 1 + 2**-18)
