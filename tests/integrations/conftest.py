"""Stand-ins for engines that are not installed."""

import sys

import fake_vllm
import pytest

from llm_sampling.integrations.vllm import SWITCH


@pytest.fixture
def vllm_package(tmp_path, monkeypatch):
    """A function that writes a stand-in for vLLM, with changes; its imports are undone after."""
    meta_path = list(sys.meta_path)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if is_vllm(name)}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(SWITCH, "1")
    yield lambda *changes: fake_vllm.write(tmp_path, *changes)
    sys.meta_path[:] = meta_path
    for name in filter(is_vllm, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(real)


def is_vllm(name):
    return name.partition(".")[0] == "vllm"
