"""The self-test refuses broken kernels: the CUDA kernels in the emulation.

Three kinds of faults: a wrong threshold, a block that is lost, and fused multiply-adds.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from llm_sampling.backends import first_use
from llm_sampling.backends.base import Size

sys.path.append(str(Path(__file__).parent / "cuda_emulation"))
import backend as emulation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

CPU = torch.device("cpu")
CLUSTER = emulation.Launch(4, copied=True)
SPLIT = emulation.Launch(4, copied=True, is_split=True)
SIZES = [Size(24, 1000, torch.float32), Size(1, 5003, torch.bfloat16)]


@pytest.fixture(autouse=True)
def results(monkeypatch):
    monkeypatch.setattr(first_use, "_results", {})


def difference_of(library, launch):
    """What the self-test finds in the emulated kernels, for one kind of launch."""
    backend = emulation.EmulatedBackend(library, launch)
    backend.known_sizes = lambda device: SIZES
    result = first_use.run("emulated", backend, CPU)
    assert result.difference is not None or result.rows == 2 * (24 + 8)
    return result.difference


@pytest.mark.parametrize("launch", [CLUSTER, SPLIT], ids=["cluster", "split"])
def test_right_kernels_pass(build_once, launch):
    (library,) = build_once("cuda_emulated", emulation.build).iterdir()
    assert difference_of(library, launch) is None


@pytest.mark.parametrize(
    ("launch", "text", "wrong"),
    [
        (CLUSTER, "target = filters.max_kept;", "target = filters.max_kept + 1;"),
        (CLUSTER, "(step == kTopP) threshold = code;", "(step == kTopP) threshold = code + 1;"),
        (
            CLUSTER,
            "int left = row_.vecs() - first_vec_;",
            "int left = part() == 2 ? 0 : part_vecs_;",
        ),
        (SPLIT, "= lists.parts * lists.listed / 2;", "= 3 * lists.listed / 2;"),
        (SPLIT, "  if (lane < lists.parts) {", "  if (lane < lists.parts && lane > 0) {"),
    ],
    ids=["top-k threshold", "top-p threshold", "lost block", "lost list", "lost maximum"],
)
def test_broken_kernels_are_refused(tmp_path, launch, text, wrong):
    library = emulation.build(tmp_path, emulation.BRIEF, (text, wrong))
    assert "it gave" in difference_of(library, launch)


@pytest.mark.skipif("fma" not in Path("/proc/cpuinfo").read_text(), reason="no fused multiply-add")
def test_fused_multiply_adds_are_refused(tmp_path):
    library = emulation.build(tmp_path, ("-O2", "-mfma", "-ffp-contract=fast"))
    assert "it gave token" in difference_of(library, CLUSTER)
