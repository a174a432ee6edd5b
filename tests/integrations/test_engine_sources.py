"""Engines by their source, without their requirements: have they all that a plug-in relies on?

`pytest -m vllm`, after `python -m benchmarks.environments vllm-0.33`, of which there is no build
for CPUs; and `pytest -m sglang`, after `python -m benchmarks.environments sglang-0.5`.
"""

import importlib
import re
import sys

import pytest
from engine_source import SourceModule

from benchmarks.environments import FOLDER, SOURCES
from llm_sampling.integrations import sglang, vllm
from llm_sampling.integrations.vllm import v1, v2

#: By name: the unpacked source, the log with the releases that are tested, and what is relied on.
ENGINES = {
    "vllm-v1": ("vllm-0.33", vllm.LOG, v1.RELIANCE),
    "vllm-v2": ("vllm-0.33", vllm.LOG, v2.RELIANCE),
    "sglang": ("sglang-0.5", sglang.LOG, sglang.RELIANCE),
}


def marked(name, *values):
    mark = getattr(pytest.mark, name.partition("-")[0])
    return pytest.param(name, *values, marks=mark, id="-".join([name, *values]))


each = pytest.mark.parametrize("name", [marked(name) for name in ENGINES])
PLACES = [marked(name, place) for name, (*_, found) in ENGINES.items() for place in found.places]


@pytest.fixture
def look(monkeypatch):
    """A function that puts an engine's source in the place of its modules."""

    def put(name):
        folder, _, reliance = ENGINES[name]
        root = FOLDER / folder
        if not root.exists():
            pytest.fail(f"needs the source: python -m benchmarks.environments {folder}")
        for module in {place.partition(":")[0] for place in reliance.places}:
            monkeypatch.setitem(sys.modules, module, SourceModule(root, module))
        return reliance

    return put


@each
def test_it_is_the_version_that_is_meant(name):
    folder, log, _ = ENGINES[name]
    package, _, version = SOURCES[folder].partition("==")
    (metadata,) = (FOLDER / folder).glob(f"{package}-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert re.findall(r"^Version: (.*)$", text, re.MULTILINE) == [version]
    assert f"{version}.".startswith(f"{log.tested[-1]}.")


@each
def test_it_has_all_that_is_relied_on(name, look):
    assert look(name).difference() is None


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_what_it_has_not_is_named(name, place, look, monkeypatch):
    """Each name that is looked for is, in fact, looked for."""
    reliance = look(name)
    module, _, names = place.partition(":")
    first = names.partition(".")[0]
    monkeypatch.setattr(importlib.import_module(module), first, None, raising=False)
    assert reliance.difference() is not None
