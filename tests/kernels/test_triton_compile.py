"""The Triton kernel compiles ahead of time for several GPUs, and its machine code keeps the rules.

The rules are those of benchmarks/triton_cost.py; for each, a kernel that breaks it must be refused.
"""

import importlib
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_model
from benchmarks.sass import run_tool
from llm_sampling.backends import triton as wrapper
from llm_sampling.backends.base import VocabSlice
from llm_sampling.history import UPDATE_KINDS, HistoryUpdate, TokenHistory

try:
    import triton
except ImportError as error:
    pytest.skip(f"triton does not import: {error}", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)
triton_cost = importlib.import_module("benchmarks.triton_cost")
triton_history = importlib.import_module("llm_sampling.backends.triton_history")
triton_rules = importlib.import_module("llm_sampling.backends.triton_rules")
Variant = triton_cost.Variant
measure = triton_cost.measure
broken_rules = triton_cost.broken_rules

needs_lines = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason=f"triton {triton.__version__} does not say where it inlined what; 3.9 does",
)

FILTERED_LOOPS = {"maxima", "mass", "mass 2", "gather", "search", "collect", "draw"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if number < 4 else [pytest.mark.slow])
        for number, kind in enumerate(triton_cost.KINDS)
    ],
)
def test_every_kind_of_call_compiles(kind, arch):
    """Any version of Triton will do; the other tests here need the line information of 3.9."""
    compiled, _ = triton_cost.compile_variant(Variant(kind, "bfloat16"), arch)
    assert compiled.metadata.shared <= triton_cost.SHARED_KIB[arch] * 1024
    code, _, _ = triton_cost.disassemble(compiled.asm["cubin"])
    assert 16 in {instruction.loaded for instruction in code}
    if "history" not in kind and "logprobs" not in kind:
        assert triton_cost.count_fma(compiled.asm["ptx"]) == 0


#: Calls with every form of every result, a kind or a history beside them.
RESULTS = (
    *triton_cost.MORE_KINDS,
    "filtered + kept ends + split",
    "filtered + processed logprobs + lists + named ids + kept ids + split",
    "greedy + processed logprobs + raw logprobs + lists + kept ends",
    "unfiltered + processed logprobs + lists + named ids + kept mask",
    "filtered + history + mask + bias + advance + processed logprobs + raw logprobs + lists"
    " + named ids + kept ends",
)


@needs_lines
@pytest.mark.parametrize("arch", triton_cost.TARGETS)
@pytest.mark.parametrize("kind", RESULTS)
def test_every_result_compiles(kind, arch):
    """Registers are spilled in none of the loops over the row, and at all in none of MORE_KINDS."""
    variant = Variant(kind, "bfloat16")
    cost = measure(variant, arch)
    broken = broken_rules(variant, arch, cost)
    if kind not in triton_cost.MORE_KINDS:
        broken = [reason for reason in broken if "spilled registers" not in reason]
    assert broken == []
    assert not any(loop.spills for loop in cost.loops.values())
    if arch != "gfx942":
        assert "maxima" in cost.loops


#: Parts of kinds: every field of a history that a call may have.
HISTORIES = (
    "text + record + advance",
    "text + window + advance",
    "extra output",
    "text + window + scope + extra output + record + advance",
)


@pytest.mark.parametrize("arch", triton_cost.TARGETS)
@pytest.mark.parametrize("history", HISTORIES)
def test_every_history_compiles(history, arch):
    compiled, _ = triton_cost.compile_variant(
        Variant(f"greedy + history + {history}", "bfloat16"), arch
    )
    assert compiled.metadata.shared <= triton_cost.SHARED_KIB[arch] * 1024


#: Kinds with lists of step 5a, and with all else that steps 2 to 5 may need.
WITH_RULES = (
    "greedy + history + text + rules + advance",
    "unfiltered + history + text + rules + advance",
    "filtered + history + text + rules + advance + split",
    "filtered + history + text + window + scope + extra output + rules + split",
    "filter-only + history + text + rules + mask + bias",
)


@needs_lines
@pytest.mark.parametrize("arch", triton_cost.TARGETS)
@pytest.mark.parametrize("kind", WITH_RULES)
def test_every_call_with_rules_compiles(kind, arch):
    """Registers are spilled in none of the loops over the row, and at all in none on sm_90."""
    variant = Variant(kind, "bfloat16")
    cost = measure(variant, arch)
    assert broken_rules(variant, arch, cost) == []
    assert not any(loop.spills for loop in cost.loops.values())


@pytest.mark.parametrize("arch", triton_cost.TARGETS)
@pytest.mark.parametrize("kind", UPDATE_KINDS)
def test_every_update_compiles(kind, arch, monkeypatch):
    """With ids of both sizes, with and without a text, windows, a prompt and positions."""
    launched = []
    monkeypatch.setattr(triton_history, "update_kernel", LaunchedKernel(launched))
    column = torch.zeros(2, dtype=torch.int32)
    for name in ("", "text", "text + window"):
        history = TokenHistory.from_ids(
            [[0], [0]],
            vocab_size=50257,
            max_length=4096 if name else None,
            penalty_last_n=64 if "window" in name else None,
        )
        if kind == "rollback":
            if history.text is None:
                continue
            update = HistoryUpdate(kind, history, column, column)
        elif name == "":
            ids = torch.zeros(2, 40, dtype=torch.int32)
            update = HistoryUpdate(kind, history, column, column, ids)
        else:
            position = torch.zeros(2, dtype=torch.int64)
            ids = torch.zeros(2, 40, dtype=torch.int64)
            of_prompt = column if kind == "fill" else None
            update = HistoryUpdate(kind, history, column, column, ids, of_prompt, position, "slot")
        wrapper.update_history(update)
    monkeypatch.undo()
    assert len(launched) == (2 if kind == "rollback" else 3)
    for args, kwargs in launched:
        compiled = triton_cost.compile_launch(arch, triton_history.update_kernel, *args, **kwargs)
        assert compiled.metadata.shared <= 8192


def launched_makers(monkeypatch, numbers=(50257, 4096, 40)):
    """What makers of lists are launched with: with all that a call may have, and with the least.

    The numbers are vocab_size, ids of a slot, and ids of token sequences.
    """
    launched = []
    monkeypatch.setattr(triton_rules, "list_kernel", LaunchedKernel(launched))
    vocab_size, max_length, size = numbers
    column, lengths = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    rules = triton_rules.RuleColumns(*[torch.zeros(2)] * 2, *[column] * 5)
    ids = torch.zeros(2, max_length, dtype=torch.int32)
    sequences = torch.zeros(size, dtype=torch.int32)
    whole = VocabSlice(0, vocab_size)
    memory = triton_rules.empty_lists(2, vocab_size, min(vocab_size, 9999), column.device)
    triton_rules.make_lists(
        rules,
        column,
        lengths,
        memory,
        size=vocab_size,
        vocab_slice=whole,
        sequences=triton_rules.RuleSequences(lengths, sequences, column),
        param_slots=column,
        kept_ids=triton_rules.KeptIds(ids, lengths),
        extra_output=torch.zeros(2, 8, dtype=torch.int32),
    )
    triton_rules.make_lists(rules, column, lengths, memory, size=vocab_size, vocab_slice=whole)
    monkeypatch.undo()
    return launched


@pytest.mark.parametrize("arch", triton_cost.TARGETS)
def test_every_maker_of_lists_compiles(arch, monkeypatch):
    for args, kwargs in launched_makers(monkeypatch):
        compiled = triton_cost.compile_launch(arch, triton_rules.list_kernel, *args, **kwargs)
        assert compiled.metadata.shared <= 1024


@needs_lines
@pytest.mark.parametrize("arch", triton_cost.TARGETS)
def test_no_maker_of_lists_spills_vector_registers(arch, monkeypatch):
    """Three programs of 8 warps fit the 65,536 registers of a multiprocessor."""
    args, kwargs = launched_makers(monkeypatch)[0]
    compiled = triton_cost.compile_launch(arch, triton_rules.list_kernel, *args, **kwargs)
    if arch == "gfx942":
        spilled = re.findall(
            r"^ +\.vgpr_spill_count: +(\d+)$", compiled.asm["amdgcn"], re.MULTILINE
        )
    else:
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
        spilled = re.findall(r"\bSTACK:(\d+)", usage)
        assert int(re.search(r"\bREG:(\d+)", usage)[1]) <= 80
    assert spilled == ["0"]


def test_one_maker_of_lists_is_for_all_sizes(monkeypatch):
    """Vocabularies, texts and sequences of other sizes need no other kernel."""
    found = set()
    for numbers in ((50257, 4096, 40), (128256, 1, 1), (1, 16, 17), (2**20, 131072, 160)):
        args, kwargs = launched_makers(monkeypatch, numbers)[0]
        compiled = triton_cost.compile_launch("sm_90", triton_rules.list_kernel, *args, **kwargs)
        found.add(compiled.hash)
    assert len(found) == 1


class LaunchedKernel:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        assert grid == (2,)
        return lambda *args, **kwargs: self.launched.append((args, kwargs))


@needs_lines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "loops"),
    [
        ("greedy", {"maxima"}),
        ("unfiltered", {"maxima", "mass", "draw"}),
        ("filtered", FILTERED_LOOPS),
        ("filtered + history + advance", FILTERED_LOOPS),
    ],
)
def test_no_rule_is_broken_on_sm_90(kind, loops, dtype):
    variant = Variant(kind, dtype)
    cost = measure(variant, "sm_90")
    assert broken_rules(variant, "sm_90", cost) == []
    # the rules apply only to loops that were found
    assert set(cost.loops) == loops


@needs_lines
@pytest.mark.parametrize("arch", triton_cost.OTHERS)
@pytest.mark.parametrize("kind", ["greedy", "filtered", "filtered + history + advance"])
def test_amds_other_families_compile(kind, arch):
    """What they need is shown in benchmarks/results/triton-cost.md; nothing of it is judged."""
    cost = triton_cost.measure(triton_cost.Variant(kind, "bfloat16"), arch)
    assert cost.instructions > 300
    assert cost.registers > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "sm_120", "gfx942"])
def test_no_rule_is_broken_elsewhere(arch):
    variant = Variant("filtered", "bfloat16")
    cost = measure(variant, arch)
    assert broken_rules(variant, arch, cost) == []
    assert set(cost.loops) == (set() if arch == "gfx942" else FILTERED_LOOPS)
    assert cost.registers > 0
    assert cost.instructions > 1000


@needs_lines
@pytest.mark.parametrize("arch", triton_cost.TARGETS)
@pytest.mark.parametrize("kind", ["greedy + split", "filtered + split"])
def test_no_rule_is_broken_where_rows_are_split(kind, arch):
    variant = Variant(kind, "bfloat16")
    cost = measure(variant, arch)
    assert broken_rules(variant, arch, cost) == []
    loops = {"maxima"} if kind.startswith("greedy") else FILTERED_LOOPS | {"gather 2"}
    assert set(cost.loops) == (set() if arch == "gfx942" else loops)


# What the programs of a split row hand over


def instructions_of(ptx):
    """Return the instructions and labels of a PTX text, one to a line."""
    lines = (line.split("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines())
    return [line for line in lines if line and not line.startswith(".")]


def find(lines, pattern):
    """Return the places of the lines in which a pattern is found."""
    return [place for place, line in enumerate(lines) if re.search(pattern, line)]


def assert_handed_over(lines, parts):
    """Check stores, a barrier of all threads, the addition, a barrier, loads: in this order.

    One thread adds, with acquire and release at the scope of the GPU. By the PTX memory model, what
    barriers order for this thread is ordered for all of the program.
    """
    assert find(lines, r"\bred\.|\bld\.global\.nc") == []
    added = find(lines, r"\batom\.")
    assert added, "no program is counted"
    for place in added:
        assert re.match(r"@%p\d+ atom\.global\.gpu\.acq_rel\.add\.u32 ", lines[place])
    place = added[-1]  # rows that are not split are counted before
    memory, jump = r"\b(ld|st)\.global", r"\bbra\b|^\$L__BB"
    barriers = find(lines[:place], r"^bar\.sync\s+0;")
    stored = find(lines[:place], r"\bst\.global")
    # the words of the header are the last that is stored before; the list's loop ends before them
    header = lines[stored[-5] : barriers[-1]]
    assert len(find(header, memory)) == 5
    assert find(header, jump) == []
    # whatever was stored comes before a barrier that is on every path to the addition
    assert find(lines[barriers[-1] : place], f"{memory}|{jump}") == []
    # the thread that adds tells the others what was there before
    told = find(lines[place:], r"\bst\.shared")[0] + place
    waited = find(lines[told:], r"^bar\.sync\s+0;")[0] + told
    decided = find(lines[waited:], rf"\bsetp\.(eq|ne)\.b32\s.*\s{parts - 1};")[0] + waited
    after = find(lines[place + 1 :], memory)[0] + place + 1
    assert place < told < waited < decided < after


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["greedy + split", "filtered + split"])
def test_a_part_is_released_before_it_is_counted_and_acquired_after(kind, arch):
    compiled, launch = triton_cost.compile_variant(Variant(kind, "bfloat16"), arch)
    lines = instructions_of(compiled.asm["ptx"])
    assert_handed_over(lines, launch.parts)
    assert len(find(lines, r"\batom\.")) == (1 if kind.startswith("greedy") else 2)

    # what the check is for is refused
    place = find(lines, r"\batom\.")[-1]
    store = find(lines[:place], r"\bst\.global")[-1]
    before, after = lines[:place], lines[place + 1 :]
    relaxed = lines[place].replace("acq_rel", "relaxed")
    load = "ld.global.b32 { %r1 }, [ %rd1 + 0 ];"
    for wrong in (
        [*before, relaxed, *after],
        [*before, lines[place].replace("gpu", "cta"), *after],
        [*before, load, lines[place], *after],
        [*before, lines[place], load, *after],
        [*lines[:store], *lines[store + 1 : place], lines[place], lines[store], *after],
        [line for line in before if "bar.sync" not in line] + lines[place:],
        lines[: place + 1] + [line for line in after if "bar.sync" not in line],
    ):
        with pytest.raises((AssertionError, IndexError)):
            assert_handed_over(wrong, launch.parts)


@needs_lines
@pytest.mark.parametrize(("rows", "stride"), [(1, None), (2, 50304)])
@pytest.mark.parametrize("kind", ["unfiltered", "filtered"])
def test_an_odd_vocabulary_in_aligned_rows_is_loaded_16_bytes_at_a_time(kind, rows, stride):
    variant = Variant(kind, "float32", vocab_size=50257, rows=rows, stride=stride)
    cost = measure(variant, "sm_90")
    assert {loop.narrowest_load for name, loop in cost.loops.items() if name != "gather"} == {16}
    assert not any(loop.spills for loop in cost.loops.values())


@needs_lines
@pytest.mark.slow
def test_no_rule_is_broken_by_any_kind_of_call():
    jobs = [
        (Variant(kind, dtype), arch)
        for kind in triton_cost.KINDS
        for dtype in triton_cost.DTYPES
        for arch in triton_cost.TARGETS
    ]
    costs = triton_cost.measure_all(jobs)
    broken = [
        reason for job, cost in zip(jobs, costs, strict=True) for reason in broken_rules(*job, cost)
    ]
    assert broken == []


# Kernels that break a rule


@pytest.fixture
def measure_with(monkeypatch):
    """``measure``, with other options of the compiler than the wrapper's."""
    compile_launch = triton_cost.compile_launch

    def measure_with(variant, **options):
        def compile_otherwise(*args, **kwargs):
            return compile_launch(*args, **{**kwargs, **options})

        monkeypatch.setattr(triton_cost, "compile_launch", compile_otherwise)
        return measure(variant, "sm_90")

    return measure_with


@needs_lines
def test_multiply_adds_are_seen(measure_with):
    variant = Variant("unfiltered", "bfloat16")
    cost = measure_with(variant, enable_fp_fusion=True)
    assert cost.loops["mass"].fused > 0
    broken = "\n".join(broken_rules(variant, "sm_90", cost))
    assert "fma.rn.f32 in the PTX" in broken
    assert "mass: " in broken
    assert "draw: " in broken


@needs_lines
def test_multiply_adds_that_the_kernel_asks_for_are_not_refused():
    variant = Variant("greedy + history", "bfloat16")
    cost = measure(variant, "sm_90")
    assert cost.ptx_fma > 0
    assert broken_rules(variant, "sm_90", cost) == []


@needs_lines
def test_spills_are_seen(measure_with):
    variant = Variant("unfiltered", "bfloat16")
    cost = measure_with(variant, maxnreg=24)
    assert cost.registers <= 24
    assert cost.loops["mass"].spills > 0
    assert "spilled registers" in "\n".join(broken_rules(variant, "sm_90", cost))


@needs_lines
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_scalar_loads_are_seen(dtype, width):
    # no row but the first begins at a multiple of 16 bytes
    variant = Variant("unfiltered", dtype, vocab_size=50257, rows=2)
    broken = "\n".join(broken_rules(variant, "sm_90", measure(variant, "sm_90")))
    assert f"maxima: logits are loaded {width} bytes at a time" in broken
    assert f"mass: logits are loaded {width} bytes at a time" in broken
    assert f"draw: logits are loaded {width} bytes at a time" in broken


@needs_lines
def test_flushed_denormals_are_seen():
    variant = Variant("greedy + raw logprobs", "bfloat16")
    cost = measure(variant, "sm_90")
    assert cost.ptx_ftz > 0
    assert broken_rules(variant, "sm_90", cost) == []
    assert "flush denormals" in "\n".join(
        broken_rules(Variant("greedy", "bfloat16"), "sm_90", cost)
    )


@needs_lines
def test_too_much_shared_memory_is_seen():
    variant = Variant("greedy", "bfloat16")
    cost = replace(measure(variant, "sm_120"), shared=100 * 1024)
    assert "shared memory" in "\n".join(broken_rules(variant, "sm_120", cost))
    assert broken_rules(variant, "sm_80", cost) == []


@triton.jit
def _two_arguments(first, second):
    pass


def test_an_argument_that_the_wrapper_does_not_pass_is_an_error():
    with pytest.raises(TypeError, match="second"):
        triton_cost.compile_launch("sm_90", _two_arguments, 1)


@needs_lines
def test_the_floor_of_split_rows_follows_its_formula():
    """16 parts of a row: the largest has 2 tiles, and every row is on processors of its own."""
    device = gpu_model.H100
    variant = triton_cost.variant_of_case("top-k 50", "bfloat16", 128256, 8, device)
    assert variant == Variant("filtered + split", "bfloat16", rows=8)
    cost = measure(variant, "sm_90")
    reads = 1 + 72.25 / 4096
    loops = cost.loops
    issued = (
        loops["maxima"].instructions / loops["maxima"].tokens
        + (reads - 1) * loops["gather"].instructions / loops["gather"].tokens
    )
    expected = {
        # the L2 cache has the rows when columns of them are read again
        "bytes": 8 * 128256 * 2 / 3.35e6,
        "issue": 8192 / 32 * issued / (4 * 1755),
        "latency": (700 + (reads - 1) * 291) / 1755,
    }
    found = triton_cost.floor("top-k 50", variant, device, cost)
    assert found["microseconds"] == pytest.approx(expected, abs=0.006)
    whole = triton_cost.floor("top-p 0.9", variant, device, cost)
    assert whole["microseconds"]["issue"] > 16 * found["microseconds"]["issue"]
    for case, rows in (("top-k 50", 64), ("unfiltered", 1)):
        other = triton_cost.variant_of_case(case, "bfloat16", 128256, rows, device)
        assert "split" not in other.kind


@needs_lines
def test_the_floor_follows_its_formula():
    variant = Variant("greedy", "float32", rows=256)
    cost = measure(variant, "sm_90")
    found = triton_cost.floor("greedy", variant, gpu_model.H100, cost)
    loop, launch = cost.loops["maxima"], cost.launch
    issued = 2 * 128256 / 32 * loop.instructions / loop.tokens  # two rows on one of 132
    in_flight = 2 * (launch.num_stages - 1) * launch.tile  # two programs fit
    expected = {
        "bytes": 256 * 128256 * 4 / 3.35e12,
        "issue": issued / 4 / 1.755e9,
        "latency": 2 * 128256 / in_flight * 700 / 1.755e9,
    }
    assert found["programs"] == 2
    assert found["microseconds"] == pytest.approx(
        {name: seconds * 1e6 for name, seconds in expected.items()}, abs=0.006
    )
    assert found["microseconds"][found["limit"]] == max(found["microseconds"].values())


@needs_lines
def test_a_floor_is_that_of_its_device():
    variant = Variant("unfiltered", "bfloat16", rows=256)
    cost = measure(variant, "sm_89")
    assert broken_rules(variant, "sm_89", cost) == []
    found = triton_cost.floor("unfiltered", variant, gpu_model.RTX_4090, cost)
    assert found["device"] == "RTX 4090"
    assert found["programs"] <= 48 // cost.launch.num_warps
    assert found["reads"] == 2
    # The L2 cache holds all rows that run at a time, so that only the first read needs bandwidth.
    row_bytes = 128256 * 2
    assert found["microseconds"]["bytes"] == pytest.approx(256 * row_bytes / 1.008e6, abs=0.006)
    small = gpu_model.RTX_4090._replace(l2_mib=16)
    without = triton_cost.floor("unfiltered", variant, small, cost)["microseconds"]
    assert without["bytes"] == pytest.approx(2 * 256 * row_bytes / 1.008e6, abs=0.006)
    both = found["microseconds"]["latency"] / without["latency"]
    assert both == pytest.approx((636 + 296) / (2 * 636), abs=0.001)
