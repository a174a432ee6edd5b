"""A vLLM that has no CPU build, by its source: has it all that the plug-in relies on?

`pytest -m vllm`, after `python -m benchmarks.environments vllm-0.33`.
"""

import importlib
import re
import sys

import pytest
import vllm_source

from benchmarks.environments import FOLDER
from llm_sampling.integrations.vllm import v1, v2
from llm_sampling.integrations.vllm.both import TESTED

pytestmark = pytest.mark.vllm

ROOT = FOLDER / "vllm-0.33"
RUNNERS = {"v1": v1.RELIANCE, "v2": v2.RELIANCE}
PLACES = [(name, place) for name, one in RUNNERS.items() for place in one.places]


@pytest.fixture
def source(monkeypatch):
    """The modules that the plug-in looks at, of the source."""
    if not ROOT.exists():
        pytest.fail("needs vLLM's source: python -m benchmarks.environments vllm-0.33")
    names = {place.partition(":")[0] for _, place in PLACES}
    for name in names:
        monkeypatch.setitem(sys.modules, name, vllm_source.SourceModule(ROOT, name))
    return monkeypatch


def test_it_is_the_version_that_is_meant():
    (metadata,) = ROOT.glob("vllm-*.dist-info/METADATA")
    (version,) = re.findall(r"^Version: (.*)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    assert version.startswith("0.33.")
    assert "0.33" in TESTED


@pytest.mark.parametrize("name", RUNNERS)
def test_it_has_all_that_is_relied_on(source, name):
    assert RUNNERS[name].difference() is None


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_what_it_has_not_is_named(source, name, place):
    """Each name that is looked for is, in fact, looked for."""
    module, _, names = place.partition(":")
    first = names.partition(".")[0]
    source.setattr(importlib.import_module(module), first, None, raising=False)
    assert RUNNERS[name].difference() is not None
