"""Tests of what setup.py builds, with fake compilers that only log how they were called."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$1" in --list-gpu-code) echo "{codes}" | tr ' ' '\\n'; exit 0;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
exit {status}
"""
ALL_CODES = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"


class Build:
    """A folder with a copy of the files that setup.py needs, and with fake compilers."""

    def __init__(self, folder):
        self.folder = folder / "source"
        self.tools = folder / "tools"
        self.log = folder / "log"
        self.lib = folder / "built" / "llm_sampling" / "lib"
        shutil.copytree(ROOT / "csrc", self.folder / "csrc")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "llm_sampling"):
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "lib", "data")
                shutil.copytree(source, self.folder / name, ignore=ignored)
            else:
                shutil.copy(source, self.folder / name)
        self.cxx = self.tool("c++")

    def tool(self, name, status=0, codes=ALL_CODES):
        path = self.tools / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPILER.format(log=self.log, status=status, codes=codes))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "LLM_"))}
        kept.update(CC=str(self.cxx), CXX=str(self.cxx), LDSHARED=str(self.cxx), **environment)
        kept["PATH"] = f"{self.tools}:/usr/bin:/bin"
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "../built"]
        return subprocess.run(
            command, cwd=self.folder, env=kept, capture_output=True, text=True, timeout=120
        )

    def nvcc_calls(self):
        calls = self.log.read_text().splitlines()
        return [call for call in calls if "/nvcc " in call and "--list-gpu-code" not in call]

    def reason(self, name="cuda"):
        return (self.lib / f"libllm_sampling_{name}.failure.txt").read_text()


@pytest.fixture
def build(tmp_path):
    return Build(tmp_path)


def test_both_libraries_are_built_where_there_is_nvcc(build):
    build.tool("nvcc")
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in build.lib.iterdir()) == [
        "libllm_sampling_cpu.so",
        "libllm_sampling_cuda.so",
    ]
    (call,) = build.nvcc_calls()
    for arch in ("80", "86", "89", "90", "100", "120"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in call
    for arch in ("80", "90"):
        assert f"-gencode=arch=compute_{arch},code=compute_{arch}" in call
    assert "-fmad=false" in call
    assert "-cudart static" in call


def test_an_older_nvcc_builds_what_it_knows(build):
    build.tool("nvcc", codes="sm_70 sm_80 sm_86 sm_90")
    assert build.run().returncode == 0
    (call,) = build.nvcc_calls()
    assert "code=sm_90" in call
    assert "compute_90,code=compute_90" in call
    assert "sm_89" not in call
    assert "sm_120" not in call


def test_cuda_home_comes_before_the_path(build, tmp_path):
    build.tool("nvcc", status=1)
    build.tools = tmp_path / "home" / "bin"
    right = build.tool("nvcc")
    build.tools = tmp_path / "tools"
    done = build.run(CUDA_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    (call,) = build.nvcc_calls()
    assert call.startswith(str(right))


@pytest.mark.parametrize(
    ("codes", "status", "environment", "reason"),
    [
        (None, 0, {"CUDA_HOME": "/nowhere"}, "nvcc was not found"),
        (ALL_CODES, 0, {"LLM_SAMPLING_CUDA": "0"}, "LLM_SAMPLING_CUDA was 0"),
        (ALL_CODES, 1, {}, "nvcc"),
        ("sm_50 sm_75", 0, {}, "does not know the architecture 80"),
    ],
)
def test_without_the_cuda_library_the_reason_is_kept(build, codes, status, environment, reason):
    if codes is not None:
        build.tool("nvcc", status, codes)
    done = build.run(**environment)
    assert done.returncode == 0, done.stderr
    assert reason in build.reason()
    assert reason in done.stderr
    assert (build.lib / "libllm_sampling_cpu.so").exists()
    assert not (build.lib / "libllm_sampling_cuda.so").exists()


@pytest.mark.parametrize(
    ("status", "environment", "words"),
    [
        (1, {}, "nvcc"),
        (0, {"CUDA_HOME": "/nowhere"}, "nvcc was not found"),
    ],
)
def test_what_is_insisted_on_fails_the_build(build, status, environment, words):
    build.tool("nvcc", status)
    done = build.run(LLM_SAMPLING_CUDA="1", **environment)
    assert done.returncode != 0
    assert words in done.stderr


def test_a_wish_that_is_none_fails_the_build(build):
    done = build.run(LLM_SAMPLING_CUDA="yes")
    assert done.returncode != 0
    assert "LLM_SAMPLING_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


def test_a_cpu_library_that_cannot_be_built_leaves_its_reason(build):
    build.cxx = build.tool("c++", status=1)
    build.tool("nvcc")
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert str(build.cxx) in build.reason("cpu")
    assert not (build.lib / "libllm_sampling_cpu.so").exists()
    assert (build.lib / "libllm_sampling_cuda.so").exists()
