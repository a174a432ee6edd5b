"""Tests of ``llm-sampling explain``: its table, its texts, and the files that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_sampling
from llm_sampling import SamplingParams, TokenHistory, generation
from llm_sampling.generation import models
from llm_sampling.tools import cli, explain

for package in cli.EXTRA_PACKAGES:
    pytest.importorskip(package, reason="needs the extra 'cli'")

Run = Callable[..., tuple[int, str, str]]
OPTIONS = ["--temperature", "0.7", "--top-k", "9", "--top-p", "0.8", "--seed", "3"]
PARAMS = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, seed=3)


@pytest.fixture
def run(model_path: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Run:
    """Return a function that runs ``explain`` on the tiny model in an empty folder.

    The function returns exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")

    def run(prompt: str, *options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["explain", prompt, "--model", str(model_path), *options])
        return code, *capsys.readouterr()

    return run


def test_the_table_is_that_of_the_models_row(run: Run, model_path: Path) -> None:
    code, out, _ = run("Once", *OPTIONS, "--top", "12")
    assert code == 0
    lm = models.load(model_path, lambda stage: None)
    ids = lm.encode("Once")
    logits, _ = explain.record(lm, ids)
    with torch.no_grad():
        torch.testing.assert_close(logits, lm.model(torch.tensor([ids])).logits[0, -1])
    explained = explain.explain(logits, PARAMS)
    head, *lines = out.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        *("token", "id", "logit", "model", "temperature 0.7", "top-k 9", "top-p 0.8", "cut by")
    ]
    rows = explain.rows(explained, 12)
    assert len(rows) == 12
    for line, row in zip(lines, rows, strict=False):
        shares = [f"{row.probabilities[s]:.2%}" for s in ("raw", "temperature", "top_k", "top_p")]
        cut = [] if row.kept else [(row.cut_by or "").replace("_", "-")]
        text = explain.visible(lm.tokenizer.decode([row.token]))
        assert line.split() == [text, str(row.token), f"{row.logit:.2f}", *shares, *cut]
    assert {row.cut_by for row in rows} == {None, "top_k", "top_p"}
    kept = int(explained.kept.sum())
    assert lines[12] == f"{kept} of {lm.vocab_size} tokens are kept"


def test_decoding_types_are_compared(run: Run, model_path: Path) -> None:
    _, out, _ = run("Once", *OPTIONS, "--n", "3", "--max-new-tokens", "5")
    shown: dict[str, list[str]] = {}
    for line in out.splitlines():
        if re.fullmatch(r"[a-z_]+:", line):
            shown[line[:-1]] = []
        elif line.startswith('  "'):
            shown[list(shown)[-1]].append(json.loads(line))
    assert {name: len(texts) for name, texts in shown.items()} == {
        **{"greedy": 1, "temperature": 3, "top_k": 3, "top_p": 3, "all": 3}
    }
    lm = models.load(model_path, lambda stage: None)
    options: Any = {"tokenizer": lm.tokenizer, "max_new_tokens": 5}
    expected = generation.generate(lm.model, "Once", PARAMS, n=3, **options)
    assert shown["all"] == [text.text for text in expected]
    (greedy,) = generation.generate(lm.model, "Once", SamplingParams(temperature=0), **options)
    assert shown["greedy"] == [greedy.text]


def test_penalties_count_what_was_written(run: Run, model_path: Path) -> None:
    penalties = ["--repetition-penalty", "1.3", "--frequency-penalty", "0.5", "--top", "300"]
    code, out, _ = run("Once", "--output", "aab", *penalties)
    assert code == 0
    lm = models.load(model_path, lambda stage: None)
    prompt, written = lm.encode("Once"), lm.encode("aab")
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5)
    logits, history = explain.record(lm, prompt, written)
    whole, _ = explain.record(lm, [*prompt, *written])
    assert torch.equal(logits, whole)
    assert history.counts[0, written].tolist() == [2, 2, 1]
    assert history.counts[0, prompt].sum() == 0
    explained = explain.explain(logits, params, history=history)
    for row in explain.rows(explained, 300):
        p = f"{row.probabilities['penalties']:.2%}"
        assert re.search(rf" {row.token} +{row.logit:.2f} +[\d.]+% +{p}( |$)", out, re.M)
    with pytest.raises(ValueError, match=r"^output_ids must "):
        explain.record(lm, prompt, [10**6])


def test_scope_and_window_of_the_penalties(run: Run, model_path: Path) -> None:
    options = ["--repetition-penalty", "3", "--repetition-penalty-scope", "output"]
    code, out, _ = run("Once", "--output", "aab", *options, "--penalty-last-n", "2", "--top", "300")
    assert code == 0
    lm = models.load(model_path, lambda stage: None)
    logits, _ = explain.record(lm, lm.encode("Once"), lm.encode("aab"))
    params = SamplingParams(repetition_penalty=3)
    ab = TokenHistory.from_ids([lm.encode("ab")], None, len(logits))
    explained = explain.explain(logits, params, history=ab)
    for row in explain.rows(explained, 300):
        p = f"{row.probabilities['penalties']:.2%}"
        assert re.search(rf" {row.token} +{row.logit:.2f} +[\d.]+% +{p}( |$)", out, re.M)


def test_what_the_rules_lower_is_listed_with_the_reasons(run: Run, model_path: Path) -> None:
    lm = models.load(model_path, lambda stage: None)
    a, b, c = lm.encode("abc")
    rules = ["--dry-multiplier", "0.8", "--no-repeat-ngram-size", "2", "--bad-words", f"{b},{a}"]
    code, out, _ = run("abcab", "--output", "ab", *rules, "--top", "300", "--max-new-tokens", "2")
    assert code == 0
    head, *_ = out.splitlines()
    assert head.rstrip().endswith("cut by  lowered by")
    said = out.partition("\nlowered by rules that look at the history: 2\n")[2].partition("\n\n")[0]
    assert sorted(said.splitlines()) == [
        f'  a ({a}) -0.8 by DRY, dry_allowed_length 2: it followed the last 2 tokens, "ab", '
        "at place 5",
        f'  a ({a}) banned by bad_words: it completes "ba", [{b}, {a}]',
        f'  a ({a}) banned by no_repeat_ngram_size 2: it followed "b" at place 5',
        f'  c ({c}) -0.8 by DRY, dry_allowed_length 2: it followed the last 2 tokens, "ab", '
        "at place 2",
        f'  c ({c}) banned by no_repeat_ngram_size 2: it followed "b" at place 2',
    ]
    for token in (a, c):
        assert re.search(rf" {token} .*-inf +banned by n-gram.*-0.8 by DRY", out)
    _, out, _ = run("abcab", "--output", "ab", *rules, "--top", "1", "--max-new-tokens", "2")
    assert re.search(r"history: 2\n(  .*\n){2,3}  and 1 more\n", out)
    _, out, _ = run("abc", *rules, "--max-new-tokens", "2")
    assert "lowered" not in out


def test_the_rules_of_the_generation_config_are_listed(
    run: Run, model_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_path, tmp_path / "with_rules")
    config = tmp_path / "with_rules/generation_config.json"
    fields = json.loads(config.read_text()) | {"no_repeat_ngram_size": 2, "min_length": 6}
    config.write_text(json.dumps(fields))
    lm = models.load(model_path, lambda stage: None)
    b, (end,) = *lm.encode("b"), lm.eos_token_ids
    options = ["--max-new-tokens", "2", "--model", "with_rules"]
    code, out, _ = run("aba", "--output", "a", *options)
    assert code == 0
    assert "lowered by rules that look at the history: 3\n" in out
    assert f'b ({b}) banned by no_repeat_ngram_size 2: it followed "a" at place 1\n' in out
    assert f"({end}) banned by min_tokens 3: the output has 1\n" in out


def test_a_picture_and_a_page(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.SVG"):
        code, *_ = run("Once", *OPTIONS, "--picture", name, "--html", f"{name}.html")
        assert code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "b.SVG").read_text()
    assert "Once" in (tmp_path / "a.png.html").read_text()


REFUSED = {
    "rule": (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
    "top": (["--top", "0"], "top must be an integer >= 1, got 0"),
    "n": (["--n", "0"], "n must be an integer >= 1, got 0"),
    "length": (["--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, got 0"),
    "picture": (["--picture", "a.jpg"], "picture must end in .png or .svg, got 'a.jpg'"),
    "model": (["--model", "nowhere"], "model 'nowhere' cannot be read"),
    "backend": (["--backend", "best"], "backend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_before_the_model_is_loaded(
    name: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    options, message = REFUSED[name]
    assert cli.main(["explain", "x", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llm-sampling: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("option", ["--picture", "--html"])
def test_a_file_that_cannot_be_written(option: str, run: Run) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = run("Once", option, "nowhere/a.png")
    assert code == 2
    assert "nowhere/a.png cannot be written: No such file or directory" in err


def test_a_prompt_that_is_too_long(run: Run) -> None:
    code, _, err = run("x" * 20, "--max-new-tokens", "99990")
    assert code == 2
    assert "max_new_tokens must leave the prompt's 20 tokens room" in err


def test_a_missing_matplotlib_is_named(run: Run, monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, out, err = run("Once", "--picture", "a.png")
    assert (code, out) == (1, "")
    assert "needs the extra 'tune' (matplotlib not found)" in err


@pytest.mark.parametrize("command", [["explain", "x"], ["info"]], ids=["explain", "info"])
def test_a_reader_that_has_gone(command: list[str], model_path: Path) -> None:
    of_model = [] if command == ["info"] else ["--model", str(model_path)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llm_sampling.tools.cli", *command, *of_model],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(llm_sampling.__file__).parent.parent)},
        check=False,
    )
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
