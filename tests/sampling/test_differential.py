"""Does differential.py find a backend that is wrong in rare cases, and reduce the case it found?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import differential
import pytest
import torch
from cases import OTHER_BACKENDS
from torch import Tensor

from llm_sampling import SampleOutput, backends, reference
from llm_sampling.backends.base import SampleCall
from llm_sampling.params import BatchParams

TESTS = Path(__file__).parent
RIGHT, RIGHT_KEPT_SET = backends.BACKENDS["torch"].load(), reference.kept_set

Kept = tuple[Tensor, Tensor]


def no_crossing_token(x: Tensor, batch: BatchParams) -> Kept:
    """Broken: top-p drops the token that reaches its target, if top-k is on and V is above 40."""
    keep, w = RIGHT_KEPT_SET(x, batch)
    wrong = (
        (batch.top_k > 0) & (batch.top_p < 1) & (batch.min_p_cut == torch.inf) & (keep.sum(-1) > 1)
    )
    wrong &= (batch.min_tokens_to_keep == 1) & (x.shape[1] > 40)
    order = x.sort(dim=-1, descending=True, stable=True).indices
    crossing = order.gather(-1, (keep.sum(-1, keepdim=True) - 1).clamp(min=0))
    return keep.scatter(-1, crossing, keep.gather(-1, crossing) & ~wrong.unsqueeze(-1)), w


def larger_id_first(x: Tensor, batch: BatchParams) -> Kept:
    """Broken: among equal logits the larger token id comes first."""
    keep, w = RIGHT_KEPT_SET(x.flip(-1), batch)
    return keep.flip(-1), w.flip(-1)


class Broken:
    """A stand-in for a backend module: the reference with one chosen fault."""

    DEVICE_TYPES = frozenset({"cpu"})

    def __init__(
        self,
        kept_set: Callable[[Tensor, BatchParams], Kept] = RIGHT_KEPT_SET,
        wrong_logprobs: float = 0.0,
        row_stride: bool = True,
    ) -> None:
        self.kept_set = kept_set
        self.wrong_logprobs = wrong_logprobs
        self.row_stride = row_stride

    def why_unavailable(self) -> str | None:
        return None

    def sample(self, call: SampleCall) -> SampleOutput:
        with mock.patch.object(reference, "kept_set", self.kept_set):
            output = RIGHT.sample(self._read(call))
        if output.logprobs is None:
            return output
        return output._replace(logprobs=output.logprobs + self.wrong_logprobs)

    def filter_logits(self, call: SampleCall) -> Tensor:
        with mock.patch.object(reference, "kept_set", self.kept_set):
            return RIGHT.filter_logits(self._read(call))

    def _read(self, call: SampleCall) -> SampleCall:
        if self.row_stride:
            return call
        return replace(
            call, logits=call.logits.as_strided(call.logits.shape, (call.logits.shape[1], 1))
        )


BROKEN = {
    "no crossing token": Broken(no_crossing_token),
    "larger id first": Broken(larger_id_first),
    "logprobs 2e-5 off": Broken(wrong_logprobs=2e-5),
    "logprobs 2e-6 off": Broken(wrong_logprobs=2e-6),
    "no row stride": Broken(row_stride=False),
}


def install(patch: pytest.MonkeyPatch, broken: str) -> None:
    """Add the broken backend of this name to the table of backends, as "broken"."""
    row = backends.Backend("broken", "broken_backend")
    patch.setitem(sys.modules, row.module, BROKEN[broken])  # type: ignore[arg-type]
    patch.setattr(backends, "BACKENDS", {**backends.BACKENDS, row.name: row})


def search(broken: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Search with one of the broken backends; return the exit code and all but the first line."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, broken)
        code = differential.main(["--rows", "3000", "--seed", "4", "--backends", "broken"])
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert " rows, broken against torch, " in first
    return code, rest


def execute(program: str, broken: str) -> list[str]:
    """Run a program in a process where the broken backend is installed; return what it prints."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pytest, test_differential\n"
            f"test_differential.install(pytest.MonkeyPatch(), {broken!r})\n{program}\n"
            "print(logits.shape[1])",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, *TESTS.parents[:2])))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("broken", "vocab_size", "parameters"),
    [
        ("no crossing token", 41, r"top_k=\d+, top_p=[\d.]+, seed=0"),
        ("larger id first", 2, r"(temperature=0\.0|(top_k|top_p|min_p)=[\d.]+), seed=0"),
        ("logprobs 2e-5 off", 1, "seed=0"),
    ],
)
def test_a_broken_backend_is_found_and_shown(
    capsys: pytest.CaptureFixture[str], broken: str, vocab_size: int, parameters: str
) -> None:
    code, program = search(broken, capsys)
    assert code == 1
    assert re.search(rf"SamplingParams\({parameters}\)", program), program
    right, wrong, size = execute(program, broken)
    assert size == str(vocab_size)
    assert right.removeprefix("torch ") != wrong.removeprefix("broken ")


def test_a_difference_in_company_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A row that differs only within its batch is not reduced; the output names the batch."""
    code, shown = search("no row stride", capsys)
    assert code == 1
    found = re.fullmatch(
        r"# broken differs in row (\d+) of random_rows\((\d+), (\d+)\), and not alone\n", shown
    )
    assert found is not None, shown
    row, seed, batch = map(int, found.groups())
    rows = differential.random_rows(seed, batch)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "no row stride")
        assert differential.first_difference(rows, ["broken"], 1) == ("broken", row)
        assert differential.first_difference(rows.row(row), ["broken"], 1) is None


def test_logprobs_may_differ_a_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert search("logprobs 2e-6 off", capsys) == (0, "no difference\n")


@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
def test_a_search_that_finds_nothing(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert differential.main(["--rows", "6000", "--seed", "1", "--backends", backend]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"6,\d\d\d rows, {backend} against torch, \d+\.\d minutes", first)
    assert second == "no difference"
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("seed", range(8))
def test_every_launch_of_the_cuda_kernel(seed: int) -> None:
    """Takes minutes in the emulation: ``pytest -m slow tests/sampling/test_differential.py``."""
    assert differential.main(["--rows", "3000", "--seed", str(seed), "--emulated"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows must be an integer >= 1, got 0"),
        (["--rows", "-5"], "--rows must be an integer >= 1, got -5"),
        (["--rows", "1e6"], "argument --rows: invalid int value: '1e6'"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--backends", "torch"], "argument --backends: invalid choice: 'torch'"),
        (["--backends"], "argument --backends: expected at least one argument"),
        (["--row", "5", "6"], "unrecognized arguments: 6"),
    ],
)
def test_refused_options(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        differential.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"torch": backends.BACKENDS["torch"]})
    with pytest.raises(SystemExit) as error:
        differential.main([])
    assert error.value.code == 2
    assert "no backend but the reference runs on this machine's CPU" in capsys.readouterr().err


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "differential.py"), "--rows", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("error: --rows must be an integer >= 1, got 0\n")
