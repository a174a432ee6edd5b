"""The CUDA kernel compiles for every architecture and keeps the rules of benchmarks/cuda_cost.py.

No GPU is needed. Every rule has a negative control, a kernel that must break it.
"""

import hashlib
import json
import math
import random
import shutil
from dataclasses import replace

import pytest

from benchmarks import cost_report, cuda_cost, sass
from llm_sampling.backends import cuda

Kernel = cuda_cost.Kernel

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.skipif(sass.find_tool("nvdisasm") is None, reason="there is no nvdisasm"),
]
KERNELS = {Kernel(dtype, copied) for dtype in cuda_cost.DTYPES for copied in (True, False)}


@pytest.fixture(scope="module")
def costs():
    """The costs on sm_90a, with line information, so that passes are known."""
    return cuda_cost.measure(cuda_cost.compile_cubin("sm_90a"))


def all_broken(costs, arch="sm_90a"):
    return "\n".join(
        r for kernel in costs for r in cuda_cost.broken_rules(kernel, arch, costs[kernel])
    )


def test_no_rule_is_broken_on_sm_90(costs):
    assert set(costs) == KERNELS
    assert all_broken(costs) == ""
    # The rules judge only the passes that were found, so all must be.
    for kernel, cost in costs.items():
        only_copied = {"copy", "bits", "places", "score"}
        expected = set(cuda_cost.PASSES) - (set() if kernel.copied else only_copied)
        assert set(cost.passes) == expected
        assert {name for name in cost.passes if "plain" not in cost.passes[name]} == set()


@pytest.mark.parametrize("arch", cuda_cost.PROCESSORS)
def test_no_rule_is_broken_in_the_library(arch):
    """The library as built, without line information: rules about passes do not apply."""
    if cuda.LIBRARY.why_unavailable() is not None:
        pytest.skip(f"there is no library: {cuda.LIBRARY.why_unavailable()}")
    found = cuda_cost.measure(cuda_cost.library_cubins(cuda.LIBRARY.path)[arch])
    assert set(found) == KERNELS
    assert all_broken(found, arch) == ""
    assert all(cost.instructions > 1000 for cost in found.values())


def test_every_instruction_of_the_mass_is_judged():
    constants = cuda_cost.mass_constants()
    assert len(constants) == 6
    code = [
        sass.Instruction("FADD", [], f"R1, R2, {constants[1]}", ()),
        sass.Instruction("FFMA", [], f"R1, R2, R3, {constants[1]}", ()),
        sass.Instruction("FFMA", [], "R1, R2, R3, 1", ()),
    ]
    assert cuda_cost.count_fused(code) == 1


def test_a_detour_is_read():
    text = """
	.text.some:
.L_x_0:
        /*0000*/                   BRA.DIV UR4, `(.L_x_2) ;
        /*0010*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
.L_x_1:
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   WARPSYNC.COLLECTIVE R3, `(.L_x_3) ;
        /*0050*/                   SHFL.BFLY P6, R1, R2, R4, R5 ;
        /*0060*/                   BRA `(.L_x_1) ;
"""
    code = sass.read_function(text, lambda path: True)
    assert [i.name for i in code.instructions][:3] == ["BRA", "SHFL", "BRA"]
    assert code.detours == [range(4, 7)]
    assert range(0, 3) in code.loops


# Negative controls


@pytest.fixture
def compile_with(tmp_path):
    """A function that compiles the kernel for sm_90a with a text replaced, or with other flags."""

    def compile_with(name=None, text="", wrong="", flags=cuda_cost.FLAGS):
        csrc = tmp_path / "csrc"
        shutil.copytree(cuda_cost.CSRC, csrc)
        if name is not None:
            source = (csrc / "cuda" / name).read_text()
            assert source.count(text) == 1
            (csrc / "cuda" / name).write_text(source.replace(text, wrong))
        return cuda_cost.compile_cubin("sm_90a", flags, csrc)

    return compile_with


def test_multiply_adds_are_seen(compile_with):
    flags = [flag for flag in cuda_cost.FLAGS if flag != "-fmad=false"]
    assert "instructions of the mass are no addition" in all_broken(
        cuda_cost.measure(compile_with(flags=flags))
    )


@pytest.mark.slow
def test_spills_are_seen(compile_with):
    bounds = "__launch_bounds__(kThreads, %d)"
    found = cuda_cost.measure(compile_with("sample.cu", bounds % 2, bounds % 4))
    assert "spilled registers" in all_broken(found)


@pytest.mark.slow
def test_scalar_loads_are_seen(compile_with):
    cubin = compile_with("row.cuh", "} else if (row.is_whole(vec)) {", "} else if (false) {")
    broken = all_broken(cuda_cost.measure(cubin))
    for dtype in cuda_cost.DTYPES:
        for name in cuda_cost.LOGIT_PASSES:
            if name != "copy":
                assert f"{dtype}, sm_90a: {name}: logits are loaded" in broken


def test_too_much_shared_memory_is_seen(costs, monkeypatch):
    monkeypatch.setitem(cuda_cost.SHARED_KIB, "sm_80", 24)
    assert "more than 24 KiB" in all_broken(costs, "sm_80")


def test_too_many_registers_are_seen(costs):
    kernel = Kernel("bfloat16", True)
    cost = replace(costs[kernel], registers=129)
    assert "not enough for two blocks" in "\n".join(cuda_cost.broken_rules(kernel, "sm_90a", cost))


# The prediction


def test_the_lower_bounds_follow_their_formula(costs):
    found = cuda_cost.predict(cuda_cost.CASES[0], "float32", 256, 32000, costs)
    passes = costs[Kernel("float32", True)].passes
    assert (found["case"], found["blocks"], found["copied"]) == ("greedy", 2, True)
    rounds = math.ceil(2016 / 256)  # of a block with 2,016 vecs
    each = passes["copy"]["plain"].cycles + passes["maxima"]["plain"].cycles
    chunks = rounds * 8 * 2
    first = passes["first"]["plain"].cycles * (rounds / chunks + 1)
    issued = 4 * 2 * (rounds * each + first)  # 4 blocks, each 2 warps per scheduler
    assert found["microseconds"]["issue"] == pytest.approx(issued / 1755, abs=0.006)
    assert found["microseconds"]["bytes"] == pytest.approx(256 * 32000 * 4 / 3.35e6, abs=0.006)


def test_instructions_of_half_the_rate_count_twice():
    names = cuda_cost.Counter({"FMUL": 10, "FSETP": 3, "IMAD": 4})
    assert cuda_cost.Mix.of(names) == (17, 3, 4)
    assert cuda_cost.Mix.of(names).cycles == 17
    assert cuda_cost.Mix.of(cuda_cost.Counter({"FMUL": 1, "FSETP": 3})).cycles == 6


def test_the_lane_that_has_most():
    generator = random.Random(0)

    def sample(expected):
        """A Poisson number, by Knuth's product of uniform numbers."""
        count, product = -1, 1.0
        while product > math.exp(-expected):
            product *= generator.random()
            count += 1
        return count

    assert cuda_cost.most_seen(0.0) == 0
    for expected in (0.25, 1.0):
        most = [max(sample(expected) for _ in range(32)) for _ in range(2000)]
        assert cuda_cost.most_seen(expected) == pytest.approx(sum(most) / 2000, abs=0.1)


def test_what_is_committed_is_of_this_kernel_and_reaches_its_goals():
    report = json.loads((cost_report.RESULTS / "cuda-cost.json").read_text())
    sources = b"".join(path.read_bytes() for path in cuda_cost.sources())
    assert report["kernel"] == hashlib.sha256(sources).hexdigest(), "run benchmarks.cuda_cost"
    assert report["broken"] == []
    predicted = {
        (line["case"], line["rows"]): line["microseconds"]["predicted"]
        for line in report["predictions"]
        if line["vocab_size"] == 128256 and line["dtype"] == "bfloat16"
    }
    assert predicted["all parameters", 256] <= 45
    assert predicted["top-k 50 + top-p 0.9", 1] <= 10
