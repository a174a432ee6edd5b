"""Tests of ``llm-sampling tune``: the search, its display, its report, and resuming it."""

from __future__ import annotations

import importlib.util
import io
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_sampling.generation import models
from llm_sampling.tools import cli, tuning
from llm_sampling.tools.tuning import objectives, report

for package in (*cli.EXTRA_PACKAGES, *cli.TUNE_PACKAGES):
    pytest.importorskip(package, reason="needs the extra 'tune'")

Run = Callable[..., tuple[int, str, str]]
PNG = b"\x89PNG\r\n\x1a\n"
SPACE = ["--space", "temperature=0.2:1.5", "top_p=0.5:1.0"]
SMALL = ["--trials", "4", "--texts", "2", "--max-new-tokens", "8"]


@pytest.fixture
def run(model_path: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Run:
    """Return a function that runs ``tune`` on the tiny model in an empty folder.

    The function returns exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["tune", *options, "--model", str(model_path), "--threads", "1"])
        return code, *capsys.readouterr()

    return run


def test_the_best_is_a_line_that_generate_takes(
    run: Run, model_path: Path, capsys: Any, tmp_path: Path
) -> None:
    code, out, err = run(*SPACE, *SMALL)
    assert code == 0
    match = re.fullmatch(r"--temperature (\S+) --top-p (\S+)\n", out)
    assert match is not None
    lm = models.load(model_path, lambda stage: None)
    objective = objectives.ModelObjective(lm, texts=2, max_new_tokens=8)
    space: Any = {"temperature": tuning.Range(0.2, 1.5), "top_p": tuning.Range(0.5, 1.0)}
    expected = tuning.tune(objective, space, n_trials=4, seed=0, show_progress=False)
    assert expected.best_params == {"temperature": float(match[1]), "top_p": float(match[2])}
    lines = err.splitlines()
    for number, trial in enumerate(expected.trials, 1):
        assert re.search(rf"^trial {number}: .*: distance {trial.values[0]:.4g}$", err, re.M)
    assert f"best of 4 trials: distance {expected.best_values[0]:.4g}" in lines
    argv = ["generate", "x", *out.split(), "--model", str(model_path), "--max-new-tokens", "3"]
    assert cli.main(argv) == 0
    assert "3 tokens" in capsys.readouterr().err
    assert run(*SPACE, *SMALL)[:2] == (0, out)  # the default seed is fixed
    assert {path.name for path in (tmp_path / "tuning").iterdir()} == {
        *("history.png", "importance.png", "slice.png", "report.html")
    }


def test_several_objectives_have_a_front_and_a_page_of_its_own(run: Run, tmp_path: Path) -> None:
    names = ["distance", "perplexity"]
    chosen = [part for name in names for part in ("--objective", name)]
    code, out, err = run("--method", "random", *SPACE, *SMALL, *chosen, "--out", "a/b")
    assert code == 0, err
    folder = tmp_path / "a/b"
    pictures = {path.name for path in folder.glob("*.png")}
    kinds = ("history", "importance", "slice")
    assert pictures == {"pareto.png", *(f"{kind}-{name}.png" for kind in kinds for name in names)}
    page = (folder / "report.html").read_text()
    for name in pictures:
        assert (folder / name).read_bytes().startswith(PNG)
    assert page.count("data:image/png;base64,") == len(pictures)
    # The page loads no other file: every source and link is a data URL.
    assert set(re.findall(r"""(?:src|href)=["']?(.{10})""", page)) == {"data:image"}
    assert "url(" not in page
    assert "<script" not in page
    assert page.count("<tr") == 1 + 1 + 1 + 4
    assert f"llm-sampling generate {out.strip()}" in page
    assert len(re.findall(r"class=best", page)) == 1


def test_a_grid(run: Run) -> None:
    lists = ["top_k=5,20", "temperature=0.5,1.0,1.5"]
    code, out, err = run("--method", "grid", *lists, "--texts", "1", "--max-new-tokens", "4")
    assert code == 0
    assert re.fullmatch(r"--top-k (5|20) --temperature (0\.5|1\.0|1\.5)\n", out)
    assert "best of 6 trials: " in err


def test_a_search_goes_on_from_its_storage(run: Run, monkeypatch: Any) -> None:
    calls: list[object] = []
    evaluate = objectives.ModelObjective.__call__

    def counted(self: Any, values: Any) -> Any:
        calls.append(values)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return evaluate(self, values)

    monkeypatch.setattr(objectives.ModelObjective, "__call__", counted)
    stored = ["--storage", "sqlite:///tuning.db"]
    code, out, err = run(*SPACE, *SMALL, *stored)
    assert (code, out) == (130, "")
    assert "the same command goes on from sqlite:///tuning.db" in err
    code, out, err = run(*SPACE, *SMALL, *stored)
    assert code == 0
    assert len(calls) == 4 + 1
    assert out == run(*SPACE, *SMALL)[1]
    code, out, err = run(*SPACE, *SMALL, *stored, "--seed", "5")
    assert code == 2
    assert "a study of the same seed under the name 'decoding'" in err


REFUSED = {
    "no space": ([], "space must map one name at least to its values, got {}"),
    "form": (["--space", "top_p"], "space must have entries NAME=LOW:HIGH or NAME=VALUE,..., got"),
    "rule": (["top_p=0.5:1.5"], "top_p must be in (0, 1], got 1.5"),
    "name": (["size=1:2"], "values must be of temperature, "),
    "range in a grid": (["--method", "grid", "top_k=1:5"], "top_k must be a list of values where"),
    "method": ([*SPACE, "--method", "best"], "method must be one of random, grid, bayesian, gp"),
    "objective": ([*SPACE, "--objective", "fun"], "metrics must be of distance, perplexity, "),
    "trials": ([*SPACE, "--trials", "0"], "n_trials must be an integer >= 1, got 0"),
    "texts": ([*SPACE, "--texts", "0"], "texts must be an integer >= 1, got 0"),
    "length": ([*SPACE, "--max-new-tokens", "3"], "max_new_tokens must be an integer >= 4, got 3"),
    "storage": ([*SPACE, "--storage", "x.db"], "storage must be a URL such as"),
    "timeout": ([*SPACE, "--timeout", "-1"], "timeout must be a number of seconds > 0, got -1.0"),
    "seed": ([*SPACE, "--seed", "-1"], "seed must be an integer >= 0, got -1"),
    "backend": ([*SPACE, "--backend", "best"], "backend"),
    "threads": ([*SPACE, "--threads", "0"], "threads must be an integer in 1 .. 1024, got 0"),
    "out": ([*SPACE, "--out", "file"], "out must be a directory, got 'file'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_before_the_model_is_loaded(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    Path("file").write_text("")
    options, message = REFUSED[name]
    assert cli.main(["tune", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llm-sampling: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_that_cannot_be_made(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").write_text("")
    assert cli.main(["tune", *SPACE, "--out", str(tmp_path / "file/out")]) == 2
    message = f"{tmp_path}/file/out cannot be written: Not a directory"
    assert capsys.readouterr() == ("", f"llm-sampling: {message}\n")


@pytest.mark.parametrize("package", cli.TUNE_PACKAGES)
def test_a_missing_package_is_named(package: str, capsys: Any, monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    assert cli.main(["tune", *SPACE]) == 1
    message = f"the command needs the extra 'tune' ({package} not found): "
    assert capsys.readouterr().err == (f"llm-sampling: {message}pip install 'llm-sampling[tune]'\n")


def test_on_a_terminal_it_is_a_table(run: Run, monkeypatch: Any) -> None:
    from rich.console import Console

    terminal = io.StringIO()
    monkeypatch.setattr(
        cli.console, "messages", lambda: Console(file=terminal, force_terminal=True, width=100)
    )
    code, *_ = run(*SPACE, *SMALL, "--trials", "14")
    assert code == 0
    drawn = terminal.getvalue()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn[drawn.rindex("14 of 14 trials") :])
    assert re.search(r"trial +temperature +top_p +distance", last)
    rows = re.findall(r"^ *(\d+) +[\d.]+ +[\d.]+ +[\d.]+ *$", last, re.M)
    assert rows == [str(number) for number in range(3, 15)]  # the last twelve trials
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") >= 0  # the cursor is shown again


# ---- the report ----------------------------------------------------------------------------------


def test_a_report_of_trials_that_failed_and_were_pruned(tmp_path: Path) -> None:
    """The report's table shows each trial's state; HTML in names and values is escaped."""

    def objective(values: Any) -> Any:
        yield 1.0 + values["x"]
        yield float("nan") if values["<b>"] == "<script>" else values["x"]

    space: Any = {"x": tuning.Range(0.0, 1.0), "<b>": ["<script>", "&"]}
    result = tuning.tune(objective, space, "random", n_trials=30, seed=1, show_progress=False)
    states = {trial.state.name.lower() for trial in result.trials}
    assert states == {"complete", "fail", "pruned"}
    report.write_report(result, tmp_path, ["<loss>"])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<loss>" not in page
    assert "&lt;script&gt;" in page
    assert all(f"<td>{state}</td>" in page for state in states)


def test_pictures_are_the_same_every_time_and_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    own = pyplot.figure()
    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    result = tuning.tune(
        lambda values: values["x"], {"x": tuning.Range(0.0, 1.0)}, n_trials=5, seed=1,
        show_progress=False,
    )  # fmt: skip
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        files = report.write_report(result, folder, ["loss"])
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == figures
    pyplot.close(own)


def test_one_trial_has_no_importance(tmp_path: Path) -> None:
    result = tuning.tune(lambda values: values["x"], {"x": [1.0]}, "grid", show_progress=False)
    files = report.write_report(result, tmp_path, ["loss"])
    assert [file.name for file in files] == ["history.png", "slice.png", "report.html"]
    with pytest.raises(ValueError, match=r"^metrics must have a name for each of 1 numbers, got"):
        report.write_report(result, tmp_path, ["a", "b"])
