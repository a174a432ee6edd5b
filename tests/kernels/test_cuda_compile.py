"""The CUDA kernel compiles for every architecture and keeps the rules of benchmarks/cuda_cost.py.

No GPU is needed. Every rule has a negative control, a kernel that must break it.
"""

import hashlib
import json
import math
import pickle
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cost_report, cuda_cost, gpu_model, sass
from llm_sampling.backends import cuda

sys.path.append(str(Path(__file__).parent / "cuda_emulation"))
import backend as emulation

Kernel = cuda_cost.Kernel

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.skipif(sass.find_tool("nvdisasm") is None, reason="there is no nvdisasm"),
]
KERNELS = {
    Kernel(dtype, copied, has_more=has_more)
    for dtype in cuda_cost.DTYPES
    for copied in (True, False)
    for has_more in (True, False)
}
#: Those that devices without clusters have too.
SPLIT = {
    Kernel(dtype, True, True, *calls)
    for dtype in cuda_cost.DTYPES
    for calls in ((True, False), (False, False), (False, True))
}
#: The passes over a copy of the history.
OF_HISTORY = {"bits", "places", "score"}


@pytest.fixture(scope="module")
def measured(cuda_code, build_once):
    """A function that returns the costs on an architecture, which are measured once in a run."""

    def measure_in(folder, arch):
        costs = cuda_cost.measure(cuda_code(arch)[0], arch)
        (folder / "costs.pickle").write_bytes(pickle.dumps(costs))

    def measured(arch):
        folder = build_once(f"cuda_costs_{arch}", lambda folder: measure_in(folder, arch))
        return pickle.loads((folder / "costs.pickle").read_bytes())

    return measured


@pytest.fixture(scope="module")
def costs(measured):
    """The costs on sm_90, with line information, so that passes are known."""
    return measured("sm_90")


@pytest.fixture(scope="module")
def older_costs(measured):
    """The same on sm_80, which has the kernels for split rows too."""
    return measured("sm_80")


def all_broken(costs, arch="sm_90"):
    return "\n".join(
        r for kernel in costs for r in cuda_cost.broken_rules(kernel, arch, costs[kernel])
    )


def test_no_rule_is_broken_on_sm_90(costs):
    assert set(costs) == KERNELS
    assert all_broken(costs) == ""
    # The rules judge only the passes that were found, so all must be.
    for kernel, cost in costs.items():
        expected = set(cuda_cost.PASSES) - {"lists"}
        assert set(cost.passes) == expected - (set() if kernel.copied else {"copy", *OF_HISTORY})
        assert {name for name in cost.passes if "plain" not in cost.passes[name]} == set()


def test_no_rule_is_broken_on_sm_80(older_costs):
    assert set(older_costs) == KERNELS | SPLIT
    assert all_broken(older_costs, "sm_80") == ""
    for kernel in SPLIT:
        expected = set(cuda_cost.PASSES) - {"search", "raw", "filtered"}
        left_out = {"other maxima", *OF_HISTORY} if kernel.is_plain else set()
        assert set(older_costs[kernel].passes) == expected - left_out


@pytest.mark.parametrize("arch", cuda_cost.PROCESSORS)
def test_no_rule_is_broken_in_the_library(arch):
    """The library as built, without line information: rules about passes do not apply."""
    if cuda.LIBRARY.why_unavailable() is not None:
        pytest.skip(f"there is no library: {cuda.LIBRARY.why_unavailable()}")
    found = cuda_cost.measure(cuda_cost.library_cubins(cuda.LIBRARY.path)[arch], arch)
    has_clusters = int(arch.removeprefix("sm_")) >= 90
    assert set(found) == (KERNELS if has_clusters else KERNELS | SPLIT)
    assert all_broken(found, arch) == ""
    assert all(cost.instructions > 1000 for cost in found.values())


@pytest.mark.parametrize("arch", cuda_cost.PROCESSORS)
def test_the_maker_of_lists_spills_no_registers(arch, tmp_path):
    """Three of its blocks, of 256 threads, fit the 65,536 registers of a multiprocessor."""
    source, cubin = cuda_cost.CSRC / "cuda/rules.cu", tmp_path / "rules.cubin"
    command = ["nvcc", *cuda_cost.FLAGS, f"-arch={arch}", "-cubin", "-o", cubin, source]
    subprocess.run(command, check=True)
    usage = sass.run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin.read_bytes())
    ((registers, stack),) = re.findall(r"\bREG:(\d+) STACK:(\d+)", usage)
    assert int(registers) <= 80
    assert stack == "0"


def test_every_instruction_of_the_mass_is_judged():
    constants = cuda_cost.mass_constants()
    assert len(constants) == 6
    code = [
        sass.Instruction("FADD", [], f"R1, R2, {constants[1]}", ()),
        sass.Instruction("FFMA", [], f"R1, R2, R3, {constants[1]}", ()),
        sass.Instruction("FFMA", [], "R1, R2, R3, 1", ()),
    ]
    assert cuda_cost.count_fused(code) == 1


def test_lines_that_do_not_lead_to_the_kernel_are_those_before():
    chains = [(), (("row.cuh", 1), ("sample.cu", 2)), (("cluster.cuh", 3),), (("sample.cu", 4),)]
    code = [sass.Instruction("FADD", [], "", chain) for chain in chains]
    assert list(cuda_cost.lines_of(code)) == [(), chains[1], chains[1], chains[3]]


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
    """A function that compiles the kernel for sm_90 with a text replaced, or with other flags."""

    def compile_with(name=None, text="", wrong="", flags=cuda_cost.FLAGS, is_float32_alone=False):
        csrc = tmp_path / "csrc"
        shutil.copytree(cuda_cost.CSRC, csrc)
        if name is not None:
            source = (csrc / "cuda" / name).read_text()
            assert source.count(text) == 1
            (csrc / "cuda" / name).write_text(source.replace(text, wrong))
        if is_float32_alone:
            emulation.leave_float32_alone(csrc)
        return cuda_cost.compile_cubin("sm_90", flags, csrc)

    return compile_with


def test_multiply_adds_are_seen(compile_with):
    flags = [flag for flag in cuda_cost.FLAGS if flag != "-fmad=false"]
    cubin = compile_with(flags=flags, is_float32_alone=True)
    assert "instructions of the mass are no addition" in all_broken(
        cuda_cost.measure(cubin, "sm_90")
    )


@pytest.mark.slow
def test_spills_are_seen(compile_with):
    bounds = "__launch_bounds__(kThreads, %d)"
    found = cuda_cost.measure(compile_with("sample.cu", bounds % 2, bounds % 4), "sm_90")
    assert "spilled registers" in all_broken(found)


@pytest.mark.slow
def test_scalar_loads_are_seen(compile_with):
    cubin = compile_with("row.cuh", "} else if (row.is_whole(vec)) {", "} else if (false) {")
    broken = all_broken(cuda_cost.measure(cubin, "sm_90"))
    for dtype in cuda_cost.DTYPES:
        for name in cuda_cost.LOGIT_PASSES:
            if name != "copy":
                assert f"{dtype}, sm_90: {name}: logits are loaded" in broken


def test_too_much_shared_memory_is_seen(costs, monkeypatch):
    monkeypatch.setitem(cuda_cost.SHARED_KIB, "sm_80", 24)
    assert "more than 24 KiB" in all_broken(costs, "sm_80")


def test_too_many_registers_are_seen(costs):
    kernel = Kernel("bfloat16", True)
    cost = replace(costs[kernel], registers=129)
    assert "not enough for two blocks" in "\n".join(cuda_cost.broken_rules(kernel, "sm_90", cost))


# The prediction


def predict(case, dtype, rows, vocab_size, costs, device=gpu_model.H100):
    """The prediction for a case with this name."""
    (of_name,) = (each for each in gpu_model.CASES if each.name == case)
    return cuda_cost.predict(of_name, dtype, rows, vocab_size, device, costs)


def call_of(case, rows, costs, assumptions=gpu_model.LOWER, **changes):
    """A call with 128,256 logits of bfloat16 on an H100."""
    (of_name,) = (each for each in gpu_model.CASES if each.name == case)
    launch = cuda_cost.choose_launch(rows, 128256, 2, "sm_90")._replace(**changes)
    cost = costs[Kernel("bfloat16", launch.copied)]
    device = gpu_model.H100
    return gpu_model.Call(of_name, cost, launch, device, assumptions, rows, 128256, 2)


def test_the_lower_bounds_follow_their_formula(costs):
    found = predict("greedy", "float32", 256, 32000, costs)
    passes = costs[Kernel("float32", True)].passes
    assert (found["case"], found["blocks"], found["copied"]) == ("greedy", 2, True)
    rounds = math.ceil(2016 / 256)  # of a block with 2,016 vecs
    each = passes["copy"]["plain"].cycles + passes["maxima"]["plain"].cycles
    chunks = rounds * 8 * 2
    first = passes["first"]["plain"].cycles * (rounds / chunks + 1)
    issued = 4 * 2 * (rounds * each + first)  # 4 blocks, each 2 warps per scheduler
    assert found["microseconds"]["issue"] == pytest.approx(issued / 1755, abs=0.006)
    assert found["microseconds"]["bytes"] == pytest.approx(256 * 32000 * 4 / 3.35e6, abs=0.006)


@pytest.mark.parametrize("device", gpu_model.DEVICES, ids=lambda device: device.name)
def test_ranges_are_ordered(costs, older_costs, device):
    """By the machine code of sm_90 or sm_80: the ends are in the same order for any code."""
    costs = costs if int(device.arch.removeprefix("sm_")) >= 90 else older_costs
    for case in gpu_model.CASES:
        for rows in cost_report.ROWS:
            us = predict(case.name, "bfloat16", rows, 128256, costs, device)["microseconds"]
            lower, upper = us.pop("predicted")
            assert max(us.pop("bytes"), us.pop("issue")) < lower < upper
            # Passes of two rows meet less often where other parts take longer.
            assert all(low <= high for name, (low, high) in us.items() if name != "passes")
            assert sum(low for low, _ in us.values()) == pytest.approx(lower, abs=0.05)
            assert us["code"][0] == 0 < us["code"][1]


@pytest.mark.parametrize(
    ("case", "together"), [("greedy", 8.8), ("top-k 50", 12.0), ("top-p 0.9", 23.4)]
)
def test_resident_rows_copy_together(costs, monkeypatch, case, together):
    """With twice the bandwidth, as if half of the rows copied first, it would be 2.4 µs less."""
    monkeypatch.setattr(gpu_model, "WIDE", 1)
    call = call_of(case, 64, costs, replace(gpu_model.LOWER, read_us=0.7))
    fast = replace(call, device=call.device._replace(bytes_per_us=2 * call.device.bytes_per_us))
    us, in_halves = gpu_model.predict_end(call), gpu_model.predict_end(fast)
    bytes_us = 64 * 128256 * 2 / 3.35e6
    assert us["reads"] == pytest.approx(0.7 + bytes_us, abs=0.01)
    assert us["reads"] - in_halves["reads"] == pytest.approx(bytes_us / 2, abs=0.01)
    assert us["predicted"] - in_halves["predicted"] == pytest.approx(2.4, abs=0.3)
    assert us["predicted"] == pytest.approx(together, abs=0.6)


def test_a_wide_shuffle_takes_two_steps(costs, monkeypatch):
    wide = gpu_model.predict_end(call_of("greedy", 1, costs))
    monkeypatch.setattr(gpu_model, "WIDE", 1)
    narrow = gpu_model.predict_end(call_of("greedy", 1, costs))
    # the reduction of the first token, of 5 + 3 + 3 shuffles
    assert wide["steps"] - narrow["steps"] == pytest.approx(11 * 35 / 1755)
    assert {name for name in wide if wide[name] != narrow[name]} == {"steps", "predicted"}


def test_the_upper_end_has_less_bandwidth_and_cold_code(costs):
    lower, upper = (
        gpu_model.predict_end(call_of("greedy", 64, costs, end))
        for end in (gpu_model.LOWER, gpu_model.UPPER)
    )
    bytes_us = 64 * 128256 * 2 / 3.35e6
    assert lower["reads"] == pytest.approx(700 / 1755 + bytes_us)
    assert upper["reads"] == pytest.approx(0.7 + bytes_us / 0.9)
    lines, runs = costs[Kernel("bfloat16", True)].touched["greedy"]
    assert upper["code"] == pytest.approx((lines / 16 + runs) * 291 / 1755)
    # The code is cold for the first of several waves of rows.
    later = gpu_model.predict_end(call_of("greedy", 256, costs, gpu_model.UPPER))
    assert later["code"] == upper["code"]
    assert later["reads"] > 3 * upper["reads"]


def test_the_code_that_a_case_touches(costs):
    for kernel, cost in costs.items():
        sizes = {name: touched.lines / 8 for name, touched in cost.touched.items()}
        assert min(sizes.values()) >= 16
        assert max(sizes.values()) < cost.instructions * 16 / 1024
        assert sizes["greedy"] < sizes["top-k 50"] < sizes["top-p 0.9"] < sizes["top-p 0.9, flat"]
        assert sizes["top-k 50"] < sizes["all parameters"]
        assert 1 < max(touched.runs for touched in cost.touched.values()) < 60, kernel


def test_gaps_of_the_code_are_read_or_jumped_over():
    used, unused = {"plain"}, {"bias"}
    case = gpu_model.CASES[0]
    code = [used] * 9 + [unused] * 8 * 15 + [used] * 8 + [unused] * 8 * 20 + [used]
    # two lines, 15 of a gap, the line that ends with it and the next; then a jump to the last one
    assert cuda_cost.touch(code, case, copied=True) == (2 + 14 + 2 + 1, 2)
    assert cuda_cost.touch([unused], case, copied=True) == (0, 0)


def test_functions_that_a_case_leaves_out_exist():
    names = set(cuda_cost.source().functions) | set(cuda_cost.PASSES) | set(cuda_cost.SIDES)
    for case in gpu_model.CASES:
        for copied in (False, True):
            assert cuda_cost.left_out(case, copied=copied) - {"detour"} <= names


def test_a_row_that_is_not_copied_is_read_in_each_pass(costs):
    call = call_of("no filter", 108, costs, blocks=1, copied=False, shared=22 * 1024)
    call = replace(call, device=gpu_model.A100, cost=costs[Kernel("bfloat16", False)])
    assert (call.at_once, call.per_processor) == (108, 1)
    of_round = 256 * 8 * 2
    of_memory = of_round * 108 / (2.039e6 / 1410)  # cycles in which each block gets a round
    chain = gpu_model.Chain(call)
    assert chain.load(is_first=True) == (210, pytest.approx(of_memory))
    assert chain.load() == (210, of_round / 40)
    small = gpu_model.Chain(replace(call, device=gpu_model.A100._replace(l2_mib=16)))
    assert small.load() == chain.load(is_first=True)
    few = gpu_model.Chain(replace(call, rows=1))
    assert few.load(is_first=True) == (210, 550 / 4)
    found = predict("greedy", "bfloat16", 108, 128256, costs, gpu_model.A100)
    assert found["microseconds"]["passes"][0] > 108 * 128256 * 2 / 2.039e6


def test_blocks_that_are_no_cluster(costs):
    """The last block takes over: nothing waits, and no GPC limits how many run."""

    class LastBlock(gpu_model.Chain):
        def run(self):
            self.fetch_code()
            self.copy()
            self.hand_over(384 * 8)

    call = call_of("top-k 50", 1, costs, blocks=32, joined="last block")
    us = gpu_model.predict(call, LastBlock)["microseconds"]
    lists = 32 * 384 * 8 / 40 / 1755
    assert us["hand-over"] == [
        pytest.approx(3 * 291 / 1755 + lists, abs=0.006),
        pytest.approx(3 * 700 / 1755 + lists, abs=0.006),
    ]
    assert us["barriers"] == [pytest.approx(3 * 40 / 1755, abs=0.006)] * 2
    part = 128256 * 2 / 32
    assert us["reads"][0] == pytest.approx((700 + part / 40) / 1755, abs=0.006)
    assert replace(call, rows=4).at_once == 4
    assert replace(call, rows=5).at_once == 8
    with pytest.raises(ValueError, match="do not wait"):
        gpu_model.predict(call)


def test_instructions_of_half_the_rate_count_twice():
    names = cuda_cost.Counter({"FMUL": 10, "FSETP": 3, "IMAD": 4})
    assert gpu_model.Mix.of(names, "sm_90") == (17, 3, 4)
    assert gpu_model.Mix.of(names, "sm_90").cycles == 17
    assert gpu_model.Mix.of(names, "sm_80") == (17, 3, 14)
    assert gpu_model.Mix.of(names, "sm_80").cycles == 28
    few = cuda_cost.Counter({"FMUL": 1, "FSETP": 3})
    assert gpu_model.Mix.of(few, "sm_90").cycles == 6


def test_the_lane_that_has_most():
    generator = random.Random(0)

    def sample(expected):
        """A Poisson number, by Knuth's product of uniform numbers."""
        count, product = -1, 1.0
        while product > math.exp(-expected):
            product *= generator.random()
            count += 1
        return count

    assert gpu_model.most_seen(0.0) == 0
    for expected in (0.25, 1.0):
        most = [max(sample(expected) for _ in range(32)) for _ in range(2000)]
        assert gpu_model.most_seen(expected) == pytest.approx(sum(most) / 2000, abs=0.1)


def test_what_is_committed_is_of_this_kernel_and_reaches_its_goals():
    report = json.loads((cost_report.RESULTS / "cuda-cost.json").read_text())
    sources = b"".join(path.read_bytes() for path in cuda_cost.sources())
    assert report["kernel"] == hashlib.sha256(sources).hexdigest(), "run benchmarks.cuda_cost"
    assert report["broken"] == []
    predicted = {
        (line["device"], line["case"], line["rows"]): line["microseconds"]["predicted"]
        for line in report["predictions"]
        if (line["vocab_size"], line["dtype"]) == (128256, "bfloat16")
    }
    for device, case, rows, lowest, highest in (
        ("H100 SXM", "all parameters", 256, 53, 65),
        ("H100 SXM", "top-k 50 + top-p 0.9", 1, 6, 14),
        ("RTX 4090", "top-k 50 + top-p 0.9", 1, 5, 8.5),
        ("RTX 4090", "top-k 50 + top-p 0.9", 64, 21, 28),
        ("A100 SXM 80 GB", "top-k 50 + top-p 0.9", 1, 8, 12),
        ("A100 SXM 80 GB", "all parameters", 1, 9, 17),
        ("A100 SXM 80 GB", "top-k 50 + top-p 0.9", 64, 17, 25),
    ):
        lower, upper = predicted[device, case, rows]
        assert lower <= lowest
        assert upper <= highest


def test_what_is_committed_has_every_device_and_what_others_measured():
    report = json.loads((cost_report.RESULTS / "cuda-cost.json").read_text())
    found = {line["device"] for line in report["predictions"]}
    assert found == {device.name for device in gpu_model.DEVICES}
    assert len(report["compared"]) == len(cuda_cost.MEASURED)
    # The text of the page says how many times the lower end each of them takes.
    ratios, above = {}, []
    for line in report["compared"]:
        lower, upper = line["predicted"]["microseconds"]["predicted"]
        first, _, last = line["microseconds"].partition(" to ")
        last = float(last or first)
        kernel = line["kernel"]
        if kernel == "FlashInfer, top-k sampling":
            assert 9 * upper < last < 11 * upper
        else:
            above.append(round(last / upper, 1))
        ratios.setdefault(kernel, []).append(round(float(first) / lower, 1))
    assert {kernel: (min(of), max(of)) for kernel, of in ratios.items() if len(of) > 1} == {
        "SGLang, top-k v2": (2.0, 3.1),
        "TokenSpeed, top-k": (1.6, 1.7),
        "FlashInfer, gvr_2": (1.0, 1.3),
    }
    assert max(above) == 1.1


# The devices that the library has code for


#: Devices from 8.0 on. 8.7 (Orin) and 11.0 (Thor) are Tegra.
CAPABILITIES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
TEGRA = [(8, 7), (11, 0)]


def runs_on(capability, images, ptx):
    """NVIDIA's rules of compatibility, as the CUDA C++ Programming Guide has them.

    Machine code runs on devices of the same major version and the same or a later minor one; from
    or to a Tegra, on that device alone. Code for an architecture with a letter at its end runs on
    that one alone. PTX is compiled for every device of the same or a later version.
    """
    major, minor = capability
    for image in images:
        own = divmod(int(image.rstrip("af")), 10)
        is_exact = image[-1] in "af" or capability in TEGRA or own in TEGRA
        if own == capability or (not is_exact and own[0] == major and own[1] <= minor):
            return True
    return any(divmod(int(each), 10) <= capability for each in ptx if each[-1] not in "af")


def code_in(library, option):
    """The architectures that cuobjdump lists, without the sm_ before them."""
    tool = sass.find_tool("cuobjdump")
    done = subprocess.run([tool, option, library], capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"sm_(\d+[af]?)\.(?:cubin|ptx)", done.stdout)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_library_has_code_for_every_device(capability):
    if cuda.LIBRARY.why_unavailable() is not None:
        pytest.skip(f"there is no library: {cuda.LIBRARY.why_unavailable()}")
    images = code_in(cuda.LIBRARY.path, "--list-elf")
    ptx = code_in(cuda.LIBRARY.path, "--list-ptx")
    assert "80" in ptx, "launch.cu takes every device from 8.0 on for usable"
    assert runs_on(capability, images, ptx)


def test_the_rules_of_compatibility():
    assert not runs_on((10, 3), ["90a", "100a"], ["120"])
    assert not runs_on((11, 0), ["100", "120"], ["120"])
    assert not runs_on((8, 0), ["86"], [])
    assert not runs_on((8, 7), ["80", "86"], [])
    assert runs_on((8, 7), ["87"], [])
    assert runs_on((8, 7), ["86"], ["80"])
    assert runs_on((8, 9), ["80"], [])
    assert runs_on((11, 0), ["100"], ["90"])
    assert not runs_on((9, 0), [], ["100"])
