"""SGLang by its source, without its requirements: has it all that the plug-in relies on?

`pytest -m sglang`, after `python -m benchmarks.environments sglang-0.5`.
"""

import importlib
import re
import sys

import pytest
import vllm_source

from benchmarks.environments import FOLDER
from llm_sampling.integrations.sglang import RELIANCE, TESTED

pytestmark = pytest.mark.sglang

ROOT = FOLDER / "sglang-0.5"


@pytest.fixture
def source(monkeypatch):
    """The modules that the plug-in looks at, of the source."""
    if not ROOT.exists():
        pytest.fail("needs SGLang's source: python -m benchmarks.environments sglang-0.5")
    for name in {place.partition(":")[0] for place in RELIANCE.places}:
        monkeypatch.setitem(sys.modules, name, vllm_source.SourceModule(ROOT, name))
    return monkeypatch


def test_it_is_the_version_that_is_meant():
    (metadata,) = ROOT.glob("sglang-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert re.findall(r"^Version: (.*)$", text, re.MULTILINE) == [TESTED]


def test_it_has_all_that_is_relied_on(source):
    assert RELIANCE.difference() is None


@pytest.mark.parametrize("place", RELIANCE.places)
def test_what_it_has_not_is_named(source, place):
    """Each name that is looked for is, in fact, looked for."""
    module, _, names = place.partition(":")
    first = names.partition(".")[0]
    source.setattr(importlib.import_module(module), first, None, raising=False)
    assert RELIANCE.difference() is not None
