"""The C interface of the CPU kernel, called without the checks that Python makes first."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_sampling import BatchParams, SamplingParams, TokenHistory, reference
from llm_sampling.backends import base, c_abi, cpu
from llm_sampling.backends.base import SampleCall
from llm_sampling.params import KERNEL_TENSORS

ROOT = Path(__file__).parents[2]
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]

BAD_STRUCT, BAD_SIZE, BAD_OPTION, NULL_POINTER = 1, 2, 3, 4
BAD_STRIDE, MISALIGNED, BAD_PARAMETER, OVERLAP = 5, 6, 7, 9

needs_kernel = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable())
)


@pytest.fixture
def call() -> SampleCall:
    batch = BatchParams.from_list(
        [SamplingParams(top_k=3, repetition_penalty=1.1, logit_bias={1: 0.5}, seed=5)] * 2,
        positions=[0, 7],
    )
    return SampleCall(
        logits=torch.arange(80.0).reshape(2, 40),
        batch=batch,
        history=TokenHistory.from_ids([[1], [2]], [[3], []], 40),
        allowed_mask=torch.full((2, 2), -1, dtype=torch.int32),
        logprobs="raw",
        advance=True,
    )


def filled(call: SampleCall) -> tuple[c_abi.SampleArgs, object]:
    struct = c_abi.make_args(call)
    output = base.make_results(call)
    output.tokens.fill_(-7)
    c_abi.set_results(struct, output)
    return struct, output


def memory(call: SampleCall, output: object) -> list[list[int]]:
    """The bytes of every tensor of a call, which compare equal also where a float is NaN."""
    tensors = [getattr(call.batch, name) for name in KERNEL_TENSORS]
    tensors += [call.logits, call.allowed_mask, *output]
    tensors += [getattr(call.history, name) for name in ("seen", "counts", "lengths", "slots")]
    return [tensor.view(torch.uint8).flatten().tolist() for tensor in tensors]


def run(struct: c_abi.SampleArgs) -> int:
    return int(cpu.LIBRARY.load().llm_sampling_cpu(struct))


def setting(**fields: object) -> Callable[[c_abi.SampleArgs], None]:
    def change(struct: c_abi.SampleArgs) -> None:
        for name, value in fields.items():
            setattr(struct, name, value)

    return change


def shifting(name: str, by: int) -> Callable[[c_abi.SampleArgs], None]:
    return lambda struct: setattr(struct, name, getattr(struct, name) + by)


POINTERS = (
    *(name for name in KERNEL_TENSORS if name != "logit_bias_offsets"),
    "logits",
    "counts",
    "lengths",
    "slots",
    "status",
    "logprobs",
)

BAD_STRUCTS = {
    "smaller": (setting(struct_size=8), BAD_STRUCT),
    "larger": (setting(struct_size=4096), BAD_STRUCT),
    "version 0": (setting(version=0), BAD_STRUCT),
    "version 1": (setting(version=1), BAD_STRUCT),
    "version 3": (setting(version=3), BAD_STRUCT),
    "negative rows": (setting(rows=-1), BAD_SIZE),
    "more rows than there are addresses": (setting(rows=2**61), BAD_SIZE),
    "more offsets than there are addresses": (setting(rows=2**60 - 1, logits_stride=0), BAD_SIZE),
    "more samples than there are addresses": (setting(rows=2**32, num_samples=2**30), BAD_SIZE),
    "no vocabulary": (setting(vocab_size=0), BAD_SIZE),
    "huge vocabulary": (setting(vocab_size=2**20 + 1), BAD_SIZE),
    "the largest vocabulary": (setting(vocab_size=2**63 - 1), BAD_SIZE),
    "no samples": (setting(num_samples=0), BAD_SIZE),
    "no threads": (setting(num_threads=0), BAD_SIZE),
    "no slots": (setting(num_slots=0), BAD_SIZE),
    "fewer slots than are used": (setting(num_slots=1), BAD_SIZE),
    "negative bias size": (setting(logit_bias_size=-1), BAD_SIZE),
    "fewer biases than the offsets say": (setting(logit_bias_size=1), BAD_SIZE),
    "more biases than there are addresses": (setting(logit_bias_size=2**62), BAD_SIZE),
    "dtype": (setting(dtype=3), BAD_OPTION),
    "negative dtype": (setting(dtype=-1), BAD_OPTION),
    "logprobs": (setting(logprobs_mode=3), BAD_OPTION),
    "advance": (setting(advance=3), BAD_OPTION),
    "position_of": (setting(position_of=3), BAD_OPTION),
    "positions of slots without slots": (setting(position_of=1), BAD_OPTION),
    "positions in texts without slots": (setting(position_of=2), BAD_OPTION),
    "counts of biases without slots": (setting(logit_bias_counts=8), BAD_OPTION),
    "nothing to do": (setting(tokens=None, advance=0, logprobs_mode=0), NULL_POINTER),
    "advance without tokens": (setting(tokens=None), NULL_POINTER),
    **{f"no {name}": (setting(**{name: None}), NULL_POINTER) for name in POINTERS},
    "logits stride": (setting(logits_stride=-40), BAD_STRIDE),
    "mask stride": (setting(allowed_mask_stride=-2), BAD_STRIDE),
    "seen stride": (setting(seen_stride=1), BAD_STRIDE),
    "counts stride": (setting(counts_stride=39), BAD_STRIDE),
    **{
        f"past all addresses: {name}": (setting(**{name: 2**61}), BAD_STRIDE)
        for name in ("logits_stride", "allowed_mask_stride", "seen_stride", "counts_stride")
    },
    "more slots than there are addresses": (setting(num_slots=2**60), BAD_STRIDE),
    **{
        f"misaligned {name}": (shifting(name, 1), MISALIGNED)
        for name in (*KERNEL_TENSORS, "logits", "seen", "allowed_mask", "tokens", "status")
    },
}


@needs_kernel
@pytest.mark.parametrize(("change", "code"), BAD_STRUCTS.values(), ids=BAD_STRUCTS.keys())
def test_a_bad_struct_gives_its_code_and_changes_nothing(
    call: SampleCall, change: Callable[[c_abi.SampleArgs], None], code: int
) -> None:
    struct, output = filled(call)
    change(struct)
    before = memory(call, output)
    assert run(struct) == code
    assert memory(call, output) == before
    struct, _ = filled(call)
    assert run(struct) == 0  # without the change the struct is valid


@pytest.fixture
def slots_call(call: SampleCall) -> SampleCall:
    """The same call with its parameters in slots, and positions that are places in texts."""
    slots = base.ParamSlots(
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
        "text",
        torch.tensor([1, 1]),
    )
    return dataclasses.replace(call, param_slots=slots)


SLOT_POINTERS = ("param_slots", "logit_bias_counts", "prompt_lengths")
BAD_SLOTS = {
    "position_of": (setting(position_of=-1), BAD_OPTION),
    "no slots": (setting(num_param_slots=0), BAD_SIZE),
    "more slots than an int32 counts": (setting(num_param_slots=2**31), BAD_SIZE),
    "fewer biases than there are counted": (setting(logit_bias_size=1), BAD_SIZE),
    "no prompt_lengths": (setting(prompt_lengths=None), NULL_POINTER),
    **{f"misaligned {name}": (shifting(name, 1), MISALIGNED) for name in SLOT_POINTERS},
}


@needs_kernel
@pytest.mark.parametrize(("change", "code"), BAD_SLOTS.values(), ids=BAD_SLOTS.keys())
def test_a_bad_struct_with_slots_gives_its_code(
    slots_call: SampleCall, change: Callable[[c_abi.SampleArgs], None], code: int
) -> None:
    struct, output = filled(slots_call)
    change(struct)
    before = memory(slots_call, output)
    assert run(struct) == code
    assert memory(slots_call, output) == before
    struct, _ = filled(slots_call)
    assert run(struct) == 0


@needs_kernel
@pytest.mark.parametrize("other", SLOT_POINTERS)
def test_what_is_written_does_not_overlap_what_belongs_to_slots(
    slots_call: SampleCall, other: str
) -> None:
    struct, output = filled(slots_call)
    struct.tokens = getattr(struct, other)
    before = memory(slots_call, output)
    assert run(struct) == OVERLAP
    assert memory(slots_call, output) == before


@needs_kernel
def test_parameters_of_slots_that_no_row_names_are_not_checked(slots_call: SampleCall) -> None:
    """A row of padding has no parameters, no history, and no slot in it."""
    assert slots_call.param_slots is not None
    slots_call.param_slots.of_rows.copy_(torch.tensor([1, -1]))
    slots_call.history.slots.copy_(torch.tensor([1, -1]))
    slots_call.batch.temperature[0] = float("nan")
    struct, output = filled(slots_call)
    assert run(struct) == 0
    assert output.tokens[1] == -1
    assert output.status.tolist() == [0, 0]


@needs_kernel
def test_a_caller_of_the_first_version_has_no_slots(call: SampleCall) -> None:
    """What lies behind the struct of a caller that was compiled earlier is not read."""
    expected = reference.sample(dataclasses.replace(call, history=call.history.clone()))
    struct, output = filled(call)
    struct.struct_size = c_abi.SampleArgs.param_slots.offset
    for name in SLOT_POINTERS:
        setattr(struct, name, 8)
    assert run(struct) == 0
    assert output.tokens.tolist() == expected.tokens.flatten().tolist()


BAD_PARAMETERS = {
    "temperature": (-1.0, float("inf"), float("nan")),
    "top_p": (-0.5, 1.5, float("nan")),
    "min_p_cut": (-1.0, float("nan")),
    "repetition_penalty": (0.0, -1.0, float("inf"), float("nan")),
    "frequency_penalty": (2.5, float("inf"), float("nan")),
    "presence_penalty": (-2.5, float("-inf"), float("nan")),
    "min_tokens_to_keep": (0, -1),
}


@needs_kernel
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_PARAMETERS.items() for value in values],
)
def test_a_bad_parameter_in_any_row_gives_its_code(
    call: SampleCall, name: str, value: float
) -> None:
    getattr(call.batch, name)[1] = value
    assert run(filled(call)[0]) == BAD_PARAMETER


@needs_kernel
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -101.0, 100.00001, -3e38])
def test_a_bias_that_is_out_of_range_gives_its_code(
    call: SampleCall, row: int, value: float
) -> None:
    call.batch.logit_bias_values[row] = value
    struct, output = filled(call)
    before = memory(call, output)
    assert run(struct) == BAD_PARAMETER
    assert memory(call, output) == before


@needs_kernel
@pytest.mark.parametrize("value", [100.0, -100.0, float("-inf")])
def test_a_bias_at_the_end_of_its_range_is_accepted(call: SampleCall, value: float) -> None:
    """Minus infinity bans a token, here one whose logit is NaN, so that the row is valid."""
    call.batch.logit_bias_values[:] = value
    call.logits[:, 1] = float("nan") if value == float("-inf") else 0.0
    expected = reference.sample(dataclasses.replace(call, history=call.history.clone()))
    struct, output = filled(call)
    assert run(struct) == 0
    assert output.status.tolist() == expected.status.tolist() == [0, 0]
    assert output.tokens.tolist() == expected.tokens.flatten().tolist()


@needs_kernel
def test_biases_beyond_those_of_all_rows_are_not_read(call: SampleCall) -> None:
    """Entries before the first offset and after the last one are no row's."""
    batch = call.batch
    batch.logit_bias_values[0] = float("nan")
    batch.logit_bias_offsets.copy_(torch.tensor([1, 1, 2]))
    struct, output = filled(call)
    assert run(struct) == 0
    assert output.status.tolist() == [0, 0]


# ---- Memory that is written overlaps nothing else ------------------------------------------------

WRITTEN = ("tokens", "logprobs", "status", "filtered", "position", "seen", "counts", "lengths")
READ = ("logits", "allowed_mask", "slots", *(name for name in KERNEL_TENSORS if name != "position"))


@pytest.fixture
def struct_and_output(call: SampleCall) -> tuple[c_abi.SampleArgs, list[object]]:
    """A valid struct that has every result, and all that must not change when it is refused."""
    struct, output = filled(call)
    filtered = torch.full((2, 40), 7.0)
    struct.filtered, struct.filtered_stride = filtered.data_ptr(), 40
    return struct, [*output, filtered]


@needs_kernel
@pytest.mark.parametrize("other", [*WRITTEN, *READ])
@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_written_overlaps_nothing_else(
    call: SampleCall,
    struct_and_output: tuple[c_abi.SampleArgs, list[object]],
    written: str,
    other: str,
) -> None:
    struct, output = struct_and_output
    if other != written:
        setattr(struct, written, getattr(struct, other))
    before = memory(call, output)
    assert run(struct) == (OVERLAP if other != written else 0)
    assert (memory(call, output) == before) == (other != written)


@needs_kernel
@pytest.mark.parametrize(
    ("written", "shift", "code"),
    [
        ("tokens", -16, 0),  # ends where the logits begin
        ("tokens", -8, OVERLAP),
        ("tokens", 320, 0),  # begins where the logits end
        ("tokens", 312, OVERLAP),
        ("status", -8, 0),
        ("status", -4, OVERLAP),
        ("status", 316, OVERLAP),
        ("filtered", -320, 0),
        ("filtered", -316, OVERLAP),
        ("filtered", 316, OVERLAP),
        ("filtered", 320, 0),
    ],
)
def test_the_first_and_the_last_byte_count(
    call: SampleCall,
    struct_and_output: tuple[c_abi.SampleArgs, list[object]],
    written: str,
    shift: int,
    code: int,
) -> None:
    """The logits take 320 bytes; a result before or behind them may touch them."""
    struct, _ = struct_and_output
    room = torch.full((240,), 9.0)
    logits = room[80:160].view(2, 40)
    logits.copy_(call.logits)
    struct.logits = logits.data_ptr()
    setattr(struct, written, logits.data_ptr() + shift)
    before = room.clone()
    assert run(struct) == code
    assert torch.equal(logits, call.logits)
    assert torch.equal(room, before) == (code != 0)


@needs_kernel
@pytest.mark.parametrize(
    ("stride", "shift", "code"),
    [
        (80, 40, 0),  # the rows of both alternate
        (90, 45, 0),
        (90, 50, 0),
        (80, 39, OVERLAP),  # begins with the last logit of a row
        (80, 41, OVERLAP),  # ends with the first logit of the next row
        (90, 51, OVERLAP),
        (80, 119, OVERLAP),  # behind the last row but one
        (80, 120, 0),
    ],
)
def test_rows_between_each_other_s_rows(
    call: SampleCall,
    struct_and_output: tuple[c_abi.SampleArgs, list[object]],
    stride: int,
    shift: int,
    code: int,
) -> None:
    struct, output = struct_and_output
    assert run(struct) == 0
    expected = output[-1].clone()
    call.batch.position.copy_(torch.tensor([0, 7]))
    before_the_step = TokenHistory.from_ids([[1], [2]], [[3], []], 40)
    call.history.seen.copy_(before_the_step.seen)
    call.history.counts.copy_(before_the_step.counts)

    room = torch.zeros(300)
    logits = room.as_strided((2, 40), (stride, 1))
    filtered = room.as_strided((2, 40), (stride, 1), shift)
    logits.copy_(call.logits)
    struct.logits, struct.filtered = logits.data_ptr(), filtered.data_ptr()
    struct.logits_stride = struct.filtered_stride = stride
    before = room.clone()
    assert run(struct) == code
    assert torch.equal(logits, call.logits)
    if code == 0:
        assert torch.equal(filtered, expected)
    else:
        assert torch.equal(room, before)


@needs_kernel
@pytest.mark.parametrize(
    ("begin", "code"),
    [(160, 0), (164, 0), (156, OVERLAP), (168, 0), (172, OVERLAP), (316, OVERLAP), (336, 0)],
)
def test_one_row_between_the_rows_of_another(call: SampleCall, begin: int, code: int) -> None:
    """Both statuses, 8 bytes, in the gap of 16 bytes between two rows of logits, or not."""
    struct, _output = filled(call)  # which must live on
    room = torch.zeros(100)
    logits = room.as_strided((2, 40), (44, 1))
    logits.copy_(call.logits)
    struct.logits, struct.logits_stride = logits.data_ptr(), 44
    struct.status = room.data_ptr() + begin
    assert run(struct) == code
    assert torch.equal(logits, call.logits)


@needs_kernel
def test_rows_of_another_stride_are_not_told_apart(call: SampleCall) -> None:
    """They are refused if their addresses interleave, whether or not they share a byte."""
    struct, _output = filled(call)  # which must live on
    room = torch.zeros(400)
    struct.logits, struct.logits_stride = room.data_ptr(), 160
    struct.filtered, struct.filtered_stride = room.data_ptr() + 4 * 40, 161
    assert run(struct) == OVERLAP
    struct.filtered_stride = 160
    assert run(struct) == 0


@needs_kernel
def test_a_single_row_has_any_stride(
    call: SampleCall, struct_and_output: tuple[c_abi.SampleArgs, list[object]]
) -> None:
    """No second row begins there, so the stride is not multiplied either."""
    struct, output = struct_and_output
    struct.rows = 1
    struct.logits_stride = struct.allowed_mask_stride = struct.filtered_stride = 2**63 - 1
    assert run(struct) == 0
    filtered = output[-1].clone()
    call.batch.position[0] = 0
    before_the_step = TokenHistory.from_ids([[1]], [[3]], 40)
    call.history.seen[:1].copy_(before_the_step.seen)
    call.history.counts[:1].copy_(before_the_step.counts)
    struct.logits_stride = struct.allowed_mask_stride = struct.filtered_stride = 40
    assert run(struct) == 0
    assert torch.equal(filtered[0], output[-1][0])


@needs_kernel
def test_what_is_only_read_may_overlap(call: SampleCall) -> None:
    struct, _output = filled(call)  # which must live on
    struct.frequency_penalty = struct.presence_penalty
    struct.top_p = struct.temperature
    struct.logits_stride = 0
    struct.allowed_mask_stride = 0
    assert run(struct) == 0
    struct.counts = struct.logits
    assert run(struct) == OVERLAP
    struct.advance = 0
    assert run(struct) == 0


@needs_kernel
@pytest.mark.parametrize("slots", [[0, 0, 1], [2, 1, 2], [1, 0, 0]])
def test_rows_that_advance_share_no_slot(slots: list[int]) -> None:
    params = SamplingParams(presence_penalty=1, seed=5)
    batch = BatchParams.from_list([params] * 3, positions=[0, 1, 2])
    history = TokenHistory.from_ids([[1], [2], [3]], [[3], [], [1]], 40)
    history.slots.copy_(torch.tensor(slots))
    logits = torch.arange(120.0).reshape(3, 40)
    call = SampleCall(logits, batch, history, torch.full((3, 2), -1).int(), advance=True)
    struct, output = filled(call)
    before = memory(call, output[::2])  # there are no logprobs
    assert run(struct) == OVERLAP
    assert memory(call, output[::2]) == before
    struct.advance = 0
    assert run(struct) == 0
    history.slots.copy_(torch.tensor([2, 0, 1]))  # in any order
    struct.advance = 1
    assert run(struct) == 0
    assert batch.position.tolist() == [1, 2, 3]


@needs_kernel
def test_no_struct() -> None:
    assert cpu.LIBRARY.load().llm_sampling_cpu(None) == BAD_STRUCT


@needs_kernel
@pytest.mark.parametrize("offsets", [[-1, 0, 1], [0, 2, 1]])
def test_bias_offsets_must_ascend_from_zero(call: SampleCall, offsets: list[int]) -> None:
    call.batch.logit_bias_offsets.copy_(torch.tensor(offsets))
    assert run(filled(call)[0]) == BAD_SIZE


@needs_kernel
@pytest.mark.parametrize("slots", [[0, 2], [-1, 0]])
def test_slots_must_exist(call: SampleCall, slots: list[int]) -> None:
    call.history.slots.copy_(torch.tensor(slots))
    assert run(filled(call)[0]) == BAD_SIZE


@needs_kernel
def test_counters_wrap_around() -> None:
    """After the largest position, count and length comes the smallest integer, as in torch."""
    batch = BatchParams.from_list(
        [SamplingParams(presence_penalty=1, seed=5)], positions=[2**63 - 1]
    )
    history = TokenHistory.from_ids([[]], [[0]], 1)
    history.counts[0, 0], history.lengths[0] = 2**31 - 1, 2**63 - 1
    call = SampleCall(torch.zeros(1, 1), batch, history, None, advance=True)
    struct, output = filled(call)
    assert run(struct) == 0
    assert output.tokens.tolist() == [0]
    assert batch.position.tolist() == [-(2**63)]
    assert history.counts.tolist() == [[-(2**31)]]
    assert history.lengths.tolist() == [-(2**63)]


@needs_kernel
def test_more_threads_than_a_process_can_have() -> None:
    """The kernel does not start them, because OpenMP would end the process."""
    params = [SamplingParams(top_p=0.9, seed=seed) for seed in range(2)]
    batch = BatchParams.from_list(params, positions=[0, 0])
    logits = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    call = SampleCall(logits, batch, None, None)
    struct, output = filled(call)
    struct.num_threads = 2**31 - 1
    assert run(struct) == 0
    assert output.tokens.tolist() == reference.sample(call).tokens.flatten().tolist()


@needs_kernel
def test_every_code_has_a_text() -> None:
    texts = [cpu.LIBRARY.load().llm_sampling_error(code).decode() for code in range(10)]
    assert len(set(texts)) == 10
    assert "unknown code" not in texts
    assert cpu.LIBRARY.load().llm_sampling_error(99) == b"unknown code"


@needs_kernel
def test_flushing_subnormals_does_not_reach_the_kernel() -> None:
    """The kernel does not compute in the caller's floating-point mode, and does not change it."""
    logits = torch.tensor([[0.0, 1e-40, 3e-40, 2e-40]])
    batch = BatchParams.from_list([SamplingParams(temperature=0, seed=1)], positions=[0])
    call = SampleCall(logits, batch, None, None)
    assert reference.sample(call).tokens.item() == 2
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        tokens = cpu.sample(call).tokens
        assert float(torch.tensor(1e-40) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert tokens.item() == 2


def compiler() -> str:
    found = shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_the_arithmetic_in_cpp(tmp_path: Path) -> None:
    """csrc/semantics.h: the mass of every depth, every float16, and known answers."""
    program = tmp_path / "semantics_test"
    source = ROOT / "tests/kernels/cpp/semantics_test.cpp"
    subprocess.run(
        [compiler(), "-std=c++17", "-O2", *EXACT, "-Wall", "-Wextra", "-o", program, source],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"


@needs_kernel
def test_the_oldest_instruction_set_gives_the_same_tokens(tmp_path: Path) -> None:
    """The kernel compiled for SSE2 only; test_golden.py compares newer instruction sets."""
    library = tmp_path / "kernel.so"
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", *EXACT]
    source = ROOT / "csrc/cpu/sample.cpp"
    clones = "-DLLM_SAMPLING_CLONES=__attribute__((noinline))"
    subprocess.run(
        [compiler(), *flags, "-march=x86-64", clones, "-o", library, source],
        check=True,
    )
    own = ctypes.CDLL(str(library)).llm_sampling_cpu
    generator = torch.Generator().manual_seed(1)
    rows = (
        torch.randn(12, 50_257, generator=generator)
        * torch.tensor([1.0, 3.0, 9.0, 0.01] * 3)[:, None]
    )
    params = [
        SamplingParams(seed=1),
        SamplingParams(top_p=0.9, seed=2),
        SamplingParams(top_k=50, seed=3),
    ]
    batch = BatchParams.from_list([p for p in params for _ in range(4)], positions=range(12))
    call = SampleCall(rows, batch, None, None, num_samples=8, logprobs="processed")
    expected = cpu.sample(call)
    struct, output = filled(call)
    assert own(ctypes.byref(struct)) == 0
    assert torch.equal(output.tokens, expected.tokens)
    assert torch.equal(output.status, expected.status)
