"""The C interface of the CPU kernel, called without the checks that Python makes first."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import unchecked
from torch import Tensor

from llm_sampling import BatchParams, SamplingParams, TokenHistory, reference
from llm_sampling.backends import base, c_abi, cpu
from llm_sampling.backends.base import SampleCall
from llm_sampling.history import UPDATE_KINDS, HistoryUpdate, UpdateKind, apply_update
from llm_sampling.params import KERNEL_TENSORS, RULE_TENSORS
from llm_sampling.results import (
    KeptForm,
    KeptSet,
    SampleOutput,
    TokenLogprobs,
    Wanted,
    tensors_of,
)

ROOT = Path(__file__).parents[2]
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]

BAD_STRUCT, BAD_SIZE, BAD_OPTION, NULL_POINTER = 1, 2, 3, 4
BAD_STRIDE, MISALIGNED, BAD_PARAMETER, OVERLAP = 5, 6, 7, 9

needs_kernel = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable())
)


#: Every result besides tokens, status and filtered logits, as a path within the struct.
RESULTS = (
    *(f"{kind}.{name}" for kind in ("processed", "raw") for name in TokenLogprobs._fields),
    *(f"kept.{name}" for name in KeptSet._fields),
)


@pytest.fixture
def call() -> SampleCall:
    """A call that asks for every result, and that has padding among its ids."""
    batch = BatchParams.from_list(
        [
            SamplingParams(
                top_k=3,
                repetition_penalty=1.1,
                repetition_penalty_scope="output",
                logit_bias={1: 0.5},
                seed=5,
                dry_multiplier=0.8,
                dry_allowed_length=1,
                dry_breakers=[[3], [1, 2]],
                bad_words=[[2, 39]],
            )
        ]
        * 2,
        positions=[0, 7],
    )
    return SampleCall(
        logits=torch.arange(80.0).reshape(2, 40),
        batch=batch,
        history=TokenHistory.from_ids([[1], [2]], [[3], []], 40, max_length=8),
        allowed_mask=torch.full((2, 2), -1, dtype=torch.int32),
        wanted=Wanted(
            ("raw", "processed"),
            4,
            torch.tensor([[39, -1, 5], [40, 1, 39]], dtype=torch.int32),
            "ids",
            5,
        ),
        advance=True,
    )


def with_every_form(call: SampleCall, run: Callable[[SampleCall], SampleOutput]) -> SampleOutput:
    """What a function gives for a call, with the kept set in all of its forms at once."""
    wanted = call.wanted
    output = run(call)
    if wanted.kept is None or output.kept is None:
        return output
    kept = output.kept
    for form in get_args(KeptForm):
        other = run(dataclasses.replace(call, wanted=dataclasses.replace(wanted, kept=form))).kept
        kept = kept._replace(**{k: v for k, v in other._asdict().items() if v is not None})
    return output._replace(kept=kept)


def without_rules(call: SampleCall) -> SampleCall:
    batch = dataclasses.replace(call.batch, **dict.fromkeys(RULE_TENSORS))
    return dataclasses.replace(call, batch=batch)


def judged(call: SampleCall) -> SampleOutput:
    """The reference's results; the call's state stays as it is."""
    history = None if call.history is None else call.history.clone()
    return with_every_form(dataclasses.replace(call, history=history), reference.sample)


def filled(call: SampleCall) -> tuple[c_abi.SampleArgs, SampleOutput]:
    """The struct of a call, and its results, which hold what the kernel never writes."""
    struct = c_abi.make_args(call)
    output = with_every_form(call, base.make_results)
    for tensor in tensors_of(output):
        tensor.fill_(-7)
    c_abi.set_results(struct, output)
    return struct, output


def owner(root: Any, path: str) -> tuple[Any, str]:
    """The part of a struct or of an output that has the last name of a path."""
    *parts, name = path.split(".")
    for part in parts:
        root = getattr(root, part)
    return root, name


def value_at(root: Any, path: str) -> Any:
    return getattr(*owner(root, path))


def put(struct: ctypes.Structure, path: str, value: object) -> None:
    setattr(*owner(struct, path), value)


def named_results(output: SampleOutput) -> Iterator[tuple[str, Tensor]]:
    """The results of RESULTS, with their paths, and the tokens."""
    yield "tokens", output.tokens
    for path in RESULTS:
        part, name = path.split(".")
        tensor = getattr(getattr(output, part), name, None)
        if tensor is not None:
            yield path, tensor


def is_same(path: str, own: Tensor, expected: Tensor) -> bool:
    """Whether a result is the expected one: logprobs are close, all others equal."""
    expected = expected.view(own.shape)
    if "logprobs" in path:
        return torch.allclose(own, expected, rtol=0, atol=1e-5, equal_nan=True)
    return torch.equal(unchecked.bits(own), unchecked.bits(expected))


def assert_same_results(expected: SampleOutput, output: SampleOutput) -> None:
    assert output.status.tolist() == expected.status.tolist()
    got = dict(named_results(output))
    for path, tensor in named_results(expected):
        assert is_same(path, got[path], tensor), path


def memory(call: SampleCall, output: SampleOutput, *others: Tensor) -> list[list[int]]:
    """The bytes of every tensor of a call, which compare equal also where a float is NaN."""
    tensors = [x for x in (getattr(call.batch, name) for name in KERNEL_TENSORS) if x is not None]
    tensors += [call.logits, call.allowed_mask, *tensors_of(output), *others]
    tensors += history_tensors(call.history)
    tensors += [call.wanted.token_ids] if call.wanted.token_ids is not None else []
    tensors += [x for x in (call.record, call.extra_output) if x is not None]
    return bytes_of(tensors)


def history_tensors(history: TokenHistory) -> list[Tensor]:
    text = [] if history.text is None else [x for x in history.text if x is not None]
    return [*(getattr(history, name) for name in ("seen", "counts", "lengths", "slots")), *text]


def bytes_of(tensors: list[Tensor]) -> list[list[int]]:
    return [tensor.view(torch.uint8).flatten().tolist() for tensor in tensors]


def run(struct: c_abi.SampleArgs) -> int:
    return int(cpu.LIBRARY.load().llm_sampling_cpu(struct))


def setting(**fields: object) -> Callable[[c_abi.SampleArgs], None]:
    def change(struct: c_abi.SampleArgs) -> None:
        for name, value in fields.items():
            put(struct, name, value)

    return change


def shifting(name: str, by: int) -> Callable[[c_abi.SampleArgs], None]:
    return lambda struct: put(struct, name, value_at(struct, name) + by)


#: Nothing that a call returns besides its tokens.
NO_RESULTS = dict.fromkeys(RESULTS)


POINTERS = (
    *(
        name
        for name in KERNEL_TENSORS
        if name not in ("logit_bias_offsets", "repetition_penalty_scope", "sequence_offsets")
        and name != "dry_multiplier"  # without it a call has no rules
    ),
    "logits",
    "counts",
    "lengths",
    "slots",
    "status",
    "token_ids",
    # The ids of a list and their logprobs go together.
    *(f"{kind}.{name}" for kind in ("processed", "raw") for name in ("top_ids", "top_logprobs")),
)
#: The sizes of results, each with numbers that are out of its range.
BAD_SIZES = {
    "num_top_logprobs": (-1, 1025, -(2**31), 2**31 - 1),
    "kept.max_ids": (-1, 1025, -(2**63), 2**31, 2**63 - 1),
    "num_token_ids": (-1, -(2**63), 2**58, 2**63 - 1),
}
#: Rows of which the inputs are one and the same, so that only the results are too many.
ONE_ROW = {"logits_stride": 0, "allowed_mask_stride": 0, "token_ids_stride": 0}

BAD_STRUCTS = {
    "smaller": (setting(struct_size=8), BAD_STRUCT),
    "larger": (setting(struct_size=4096), BAD_STRUCT),
    "version 0": (setting(version=0), BAD_STRUCT),
    "version 1": (setting(version=1), BAD_STRUCT),
    "version 2": (setting(version=2), BAD_STRUCT),
    "version 4": (setting(version=4), BAD_STRUCT),
    **{
        f"no {name} and what follows": (
            setting(struct_size=getattr(c_abi.SampleArgs, name).offset),
            BAD_STRUCT,
        )
        for name in ("processed", "raw", "kept", "token_ids", "num_token_ids")
    },
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
    "advance": (setting(advance=3), BAD_OPTION),
    "position_of": (setting(position_of=3), BAD_OPTION),
    "positions of slots without slots": (setting(position_of=1), BAD_OPTION),
    "positions in texts without slots": (setting(position_of=2), BAD_OPTION),
    "counts of biases without slots": (setting(logit_bias_counts=8), BAD_OPTION),
    "counts of sequences without slots": (setting(sequence_counts=8), BAD_OPTION),
    "rules without a history": (setting(seen=None), NULL_POINTER),
    "negative size of sequences": (setting(sequences_size=-1), BAD_SIZE),
    "a slice that begins before the vocabulary": (
        setting(first_id=-1, whole_vocab_size=99),
        BAD_SIZE,
    ),
    "a slice without a vocabulary": (setting(first_id=1), BAD_SIZE),
    "a negative vocabulary": (setting(whole_vocab_size=-1), BAD_SIZE),
    "a slice that is wider than its vocabulary": (setting(whole_vocab_size=1), BAD_SIZE),
    "a slice that ends behind its vocabulary": (
        setting(first_id=2**62, whole_vocab_size=2**20),
        BAD_SIZE,
    ),
    "a vocabulary that is too large": (setting(whole_vocab_size=2**20 + 1), BAD_SIZE),
    "fewer elements than the offsets say": (setting(sequences_size=21), BAD_SIZE),
    "more elements than there are addresses": (setting(sequences_size=2**62), BAD_SIZE),
    **{
        f"{name} {value}": (setting(**{name: value}), BAD_SIZE)
        for name, values in BAD_SIZES.items()
        for value in values
    },
    "longer lists than there are addresses": (
        setting(rows=2**50, num_top_logprobs=1024, **ONE_ROW),
        BAD_SIZE,
    ),
    "more kept ids than there are addresses": (
        setting(rows=2**50, **{"kept.max_ids": 1024}, **ONE_ROW),
        BAD_SIZE,
    ),
    "more ids than there are addresses": (
        setting(rows=2**50, num_token_ids=2**10, **ONE_ROW),
        BAD_SIZE,
    ),
    "a longer mask than there are addresses": (
        setting(rows=2**45, vocab_size=2**20, **ONE_ROW),
        BAD_SIZE,
    ),
    "nothing to do": (setting(tokens=None, advance=0, **NO_RESULTS), NULL_POINTER),
    "advance without tokens": (setting(tokens=None), NULL_POINTER),
    **{f"no {name}": (setting(**{name: None}), NULL_POINTER) for name in POINTERS},
    "logits stride": (setting(logits_stride=-40), BAD_STRIDE),
    "mask stride": (setting(allowed_mask_stride=-2), BAD_STRIDE),
    "stride of ids": (setting(token_ids_stride=-3), BAD_STRIDE),
    "seen stride": (setting(seen_stride=1), BAD_STRIDE),
    "counts stride": (setting(counts_stride=39), BAD_STRIDE),
    **{
        f"past all addresses: {name}": (setting(**{name: 2**61}), BAD_STRIDE)
        for name in (
            *("logits_stride", "allowed_mask_stride", "seen_stride", "counts_stride"),
            "token_ids_stride",
        )
    },
    "more slots than there are addresses": (setting(num_slots=2**60), BAD_STRIDE),
    **{
        f"misaligned {name}": (shifting(name, 1), MISALIGNED)
        for name in (
            *(*KERNEL_TENSORS, "logits", "seen", "allowed_mask", "tokens", "status"),
            *("token_ids", *RESULTS),
        )
    },
    **{
        f"{name} that is aligned to 4 bytes": (shifting(name, 4), MISALIGNED)
        for name in ("kept.total", "kept.masses", "kept.id_masses")
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
        sequence_counts=torch.tensor([11, 11], dtype=torch.int32),
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
    # Such a caller does not know the scope of the repetition penalty either.
    call = without_rules(call)
    batch = dataclasses.replace(
        call.batch, repetition_penalty_scope=torch.zeros_like(call.batch.repetition_penalty_scope)
    )
    expected = judged(dataclasses.replace(call, batch=batch))
    struct, output = filled(call)
    struct.struct_size = c_abi.SampleArgs.param_slots.offset
    for name in SLOT_POINTERS:
        setattr(struct, name, 8)
    assert run(struct) == 0
    assert_same_results(expected, output)


def assert_refused(call: SampleCall, code: int) -> None:
    """Assert that a call gives this code and changes nothing."""
    struct, output = filled(call)
    before = memory(call, output)
    assert run(struct) == code
    assert memory(call, output) == before


BAD_PARAMETERS = {
    "temperature": (-1.0, float("inf"), float("nan")),
    "top_p": (-0.5, 1.5, float("nan")),
    "min_p_cut": (-1.0, float("nan")),
    "repetition_penalty": (0.0, -1.0, float("inf"), float("nan")),
    "frequency_penalty": (2.5, float("inf"), float("nan")),
    "presence_penalty": (-2.5, float("-inf"), float("nan")),
    "min_tokens_to_keep": (0, -1),
    "repetition_penalty_scope": (-1, 2, 3, 2**31 - 1, -(2**31)),
    "dry_multiplier": (-1.0, 101.0, float("inf"), float("nan")),
    "dry_base": (0.5, 101.0, float("nan")),
    "dry_allowed_length": (0, -1, -(2**31)),
    "dry_penalty_last_n": (-2, -(2**31)),
    "no_repeat_ngram_size": (-1, -(2**31)),
    "no_repeat_ngram_window": (-1, -(2**31)),
    "min_tokens": (-1, -(2**31)),
}

#: What no record has, by places in the ``sequences`` of the first row, which has 11 elements.
BAD_SEQUENCES = {
    "no kind": {0: -1},
    "a kind that there is not": {0: 4},
    "no ids": {1: 0},
    "fewer than no ids": {1: -(2**31)},
    "one id more than there are": {8: 3},
    "more ids than there are": {1: 2**31 - 1},
    "half of a record at the end": {1: 8},
}


@needs_kernel
@pytest.mark.parametrize("changes", BAD_SEQUENCES.values(), ids=BAD_SEQUENCES)
def test_bad_sequences_give_their_code(call: SampleCall, changes: dict[int, int]) -> None:
    assert call.batch.sequences[:11].tolist() == [0, 1, 3, 1, 2, 1, 2, 2, 2, 2, 39]
    for place, value in changes.items():
        call.batch.sequences[place] = value
    assert_refused(call, BAD_PARAMETER)


@needs_kernel
@pytest.mark.parametrize("offsets", [[-1, 11, 22], [0, 23, 22], [5, 3, 22], [0, 11, 2**40]])
def test_bad_offsets_of_sequences_give_their_code(call: SampleCall, offsets: list[int]) -> None:
    call.batch.sequence_offsets.copy_(torch.tensor(offsets))
    assert_refused(call, BAD_SIZE)


@needs_kernel
def test_rules_without_a_text_see_no_ids(call: SampleCall) -> None:
    """Only the length of the output is known."""
    call.batch.min_tokens[:] = 2
    call.batch.sequences[11:] = torch.tensor([3, 9, 31, 32, 33, 34, 35, 36, 37, 38, 39])
    history = dataclasses.replace(call, history=TokenHistory.from_ids([[1], [2]], [[3], []], 40))
    expected = judged(history)
    struct, output = filled(history)
    assert run(struct) == 0
    assert_same_results(expected, output)
    assert output.tokens[1] == 30


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
    assert_refused(call, BAD_PARAMETER)


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


# ---- Results -------------------------------------------------------------------------------------

#: What a row without a token holds, where it is neither -1 nor NaN.
ZERO = {"kept.counts", "kept.total", "kept.masses", "kept.id_masses", "kept.mask"}


def assert_nothing(output: SampleOutput, rows: list[int]) -> None:
    """All results of these rows, and of no others, are those of a row without a token."""
    for path, tensor in named_results(output):
        for row, values in enumerate(tensor.reshape(len(output.status), -1)):
            if values.is_floating_point():
                nothing = bool(values.isnan().all())
            else:
                nothing = bool((values == (0 if path in ZERO else -1)).all())
            assert nothing or row not in rows, (path, row)
            if path in ("tokens", "kept.total", "kept.first_id"):
                assert not nothing or row in rows, (path, row)


@needs_kernel
def test_every_result_at_once(call: SampleCall) -> None:
    expected = judged(call)
    struct, output = filled(call)
    assert run(struct) == 0
    assert_same_results(expected, output)
    assert_nothing(output, [])


@needs_kernel
@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}, {}], ids=str)
def test_each_result_alone(filters: dict[str, float]) -> None:
    """It needs no other one but the tokens; what is NULL is not written."""
    rows, vocab_size = 2, 700
    batch = BatchParams.from_list(
        [SamplingParams(temperature=t, seed=5, **filters) for t in (1.0, 50.0)], positions=[0, 7]
    )
    wanted = Wanted(
        ("raw", "processed"),
        4,
        torch.tensor([[39, -1, 5]], dtype=torch.int32),
        "ids",
        1024,
    )
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    call = SampleCall(logits, batch, None, None, num_samples=3, wanted=wanted)
    expected = dict(named_results(judged(call)))
    struct, output = filled(call)
    assert run(struct) == 0
    every = dict(named_results(output))
    assert [*every] == ["tokens", *RESULTS]
    for path in RESULTS:
        kind = path.split(".")[0]
        pair = [f"{kind}.top_ids", f"{kind}.top_logprobs"]
        together = pair if path in pair else [path]
        struct, output = filled(call)
        setting(**{name: None for name in RESULTS if name not in together})(struct)
        assert run(struct) == 0
        for name, tensor in named_results(output):
            if name in ("tokens", *together):
                assert torch.equal(unchecked.bits(tensor), unchecked.bits(every[name])), name
                assert is_same(name, tensor, expected[name]), name
            else:
                assert (tensor == -7).all(), (path, name)


@needs_kernel
@pytest.mark.parametrize("path", [None, *RESULTS])
def test_results_need_tokens(call: SampleCall, path: str | None) -> None:
    """Filtered logits do not."""
    struct, output = filled(call)
    filtered = torch.full((2, 40), 7.0)
    struct.filtered, struct.filtered_stride = filtered.data_ptr(), 40
    own = None if path is None else value_at(struct, path)
    setting(tokens=None, status=None, advance=0, **NO_RESULTS)(struct)
    if path is None:
        assert run(struct) == 0
        return
    put(struct, path, own)
    before = memory(call, output, filtered)
    assert run(struct) == NULL_POINTER
    assert memory(call, output, filtered) == before


@needs_kernel
def test_sizes_of_0(call: SampleCall) -> None:
    """A list of no ids needs no memory, and what is there is not written."""
    struct, output = filled(call)
    struct.num_top_logprobs = struct.num_token_ids = struct.kept.max_ids = 0
    struct.token_ids = None
    expected = judged(call)
    assert run(struct) == 0
    assert output.tokens.tolist() == expected.tokens.flatten().tolist()
    lists = {"top_ids", "top_logprobs", "id_logprobs", "id_ranks", "id_masses", "ids"}
    for path, tensor in named_results(output):
        assert (tensor == -7).all() == (path.split(".")[-1] in lists), path


@needs_kernel
def test_the_longest_lists(call: SampleCall) -> None:
    """They are longer than the vocabulary, so the rest is padding."""
    longest = dataclasses.replace(call.wanted, top_logprobs=1024, max_kept_ids=1024)
    call = dataclasses.replace(call, wanted=longest)
    expected = judged(call)
    struct, output = filled(call)
    assert run(struct) == 0
    assert_same_results(expected, output)
    assert output.raw.top_ids[:, 39].min() >= 0
    assert (output.raw.top_ids[:, 40:] == -1).all()
    assert output.kept.ids.shape == (2, 1024)


HOSTILE_IDS = [-(2**31), 2**31 - 1, 40, -1, 0, 39, 39, 41]


@needs_kernel
def test_ids_outside_of_the_vocabulary_are_padding(call: SampleCall) -> None:
    ids = torch.tensor([HOSTILE_IDS, HOSTILE_IDS[::-1]], dtype=torch.int32)
    call = dataclasses.replace(call, wanted=dataclasses.replace(call.wanted, token_ids=ids))
    expected = judged(call)
    struct, output = filled(call)
    assert run(struct) == 0
    assert_same_results(expected, output)
    is_padding = (ids < 0) | (ids >= 40)
    for of_kind in (output.raw, output.processed):
        assert torch.equal(of_kind.id_logprobs.isnan(), is_padding)
        assert (of_kind.id_ranks[is_padding] == -1).all()
    assert (output.kept.id_masses[is_padding] == 0).all()
    assert (output.raw.id_ranks[~is_padding] > 0).all()


@needs_kernel
@pytest.mark.parametrize("stride", [0, 1, 3, 4])
def test_rows_of_ids_may_overlap(call: SampleCall, stride: int) -> None:
    """With a stride of 0 all rows have the same ids; nothing behind the last row's is read."""
    memory_of_ids = torch.tensor([39, 38, 37, 36, 35, 34, 33], dtype=torch.int32)
    ids = torch.stack([memory_of_ids[row * stride : row * stride + 3] for row in range(2)])
    own = dataclasses.replace(call.wanted, token_ids=ids.contiguous())
    call = dataclasses.replace(call, wanted=own)
    expected = judged(call)
    struct, output = filled(call)
    struct.token_ids, struct.token_ids_stride = memory_of_ids.data_ptr(), stride
    assert run(struct) == 0
    assert_same_results(expected, output)

    # Behind the last row's ids there may be a result.
    room = torch.full((16,), -9, dtype=torch.int32)
    room[: stride + 3] = memory_of_ids[: stride + 3]
    struct.token_ids = room.data_ptr()
    struct.status = room.data_ptr() + 4 * (stride + 3)
    call.batch.position.copy_(torch.tensor([0, 7]))
    assert run(struct) == 0
    struct.status -= 4
    assert run(struct) == OVERLAP


@needs_kernel
def test_a_row_without_a_token(slots_call: SampleCall) -> None:
    """Padding, a slot that does not exist, and no candidate."""
    slots = dataclasses.replace(
        slots_call.param_slots, of_rows=torch.tensor([-1, 2, 0, 1], dtype=torch.int32)
    )
    logits = torch.arange(160.0).reshape(4, 40)
    logits[2] = -torch.inf
    call = dataclasses.replace(
        slots_call,
        logits=logits,
        history=slots_call.history.with_slots(torch.tensor([0, 1, 0, 1], dtype=torch.int32)),
        allowed_mask=None,
        param_slots=slots,
        batch=dataclasses.replace(slots_call.batch, position=torch.arange(4)),
        wanted=dataclasses.replace(
            slots_call.wanted, token_ids=torch.tensor([HOSTILE_IDS], dtype=torch.int32)
        ),
        advance=False,
    )
    expected = judged(call)
    struct, output = filled(call)
    assert run(struct) == 0
    assert_same_results(expected, output)
    assert_nothing(output, [0, 1, 2])
    assert output.status.tolist() == [0, *[base.STATUS_NO_CANDIDATE] * 2, 0]


# ---- Memory that is written overlaps nothing else ------------------------------------------------

WRITTEN = ("tokens", "status", "filtered", "position", "seen", "counts", "lengths")
READ = (
    *("logits", "allowed_mask", "slots", "token_ids"),
    *(name for name in KERNEL_TENSORS if name != "position"),
)


Filled = tuple[c_abi.SampleArgs, SampleOutput, Tensor]


@pytest.fixture
def struct_and_output(call: SampleCall) -> Filled:
    """A valid struct that has every result, the results, and the filtered logits."""
    struct, output = filled(call)
    filtered = torch.full((2, 40), 7.0)
    struct.filtered, struct.filtered_stride = filtered.data_ptr(), 40
    return struct, output, filtered


@needs_kernel
@pytest.mark.parametrize("other", [*WRITTEN, *READ])
@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_written_overlaps_nothing_else(
    call: SampleCall, struct_and_output: Filled, written: str, other: str
) -> None:
    struct, output, filtered = struct_and_output
    if other != written:
        setattr(struct, written, getattr(struct, other))
    before = memory(call, output, filtered)
    assert run(struct) == (OVERLAP if other != written else 0)
    assert (memory(call, output, filtered) == before) == (other != written)


@needs_kernel
@pytest.mark.parametrize("written", RESULTS)
def test_a_result_overlaps_nothing_else(
    call: SampleCall, struct_and_output: Filled, written: str
) -> None:
    """Neither another result nor what is read or advanced."""
    struct, output, filtered = struct_and_output
    before = memory(call, output, filtered)
    own = value_at(struct, written)
    for other in (*WRITTEN, *READ, *RESULTS):
        if other == written:
            continue
        put(struct, written, value_at(struct, other))
        assert run(struct) == OVERLAP, other
    assert memory(call, output, filtered) == before
    put(struct, written, own)
    assert run(struct) == 0


@needs_kernel
@pytest.mark.parametrize(
    ("path", "other"),
    [
        (path, other)
        for path in RESULTS
        for other in ("logits", "tokens", "token_ids", "kept.mask")
        if path != other
    ],
)
def test_the_first_and_the_last_byte_of_a_result_count(
    call: SampleCall, path: str, other: str
) -> None:
    """A result may end where other memory begins, and begin where that ends."""
    struct, output = filled(call)
    struct.advance = 0
    inputs = {"logits": call.logits, "token_ids": call.wanted.token_ids}
    there = inputs[other] if other in inputs else value_at(output, other)
    result = value_at(output, path)
    size, there_size = (tensor.numel() * tensor.itemsize for tensor in (result, there))
    room = torch.zeros(100, dtype=torch.int64)
    begin = room.data_ptr() + 160
    end = begin + there_size
    room.view(torch.uint8)[160 : 160 + there_size] = there.flatten().view(torch.uint8)
    put(struct, other, begin)
    for place, code in (
        (begin - size, 0),
        (begin - size + result.itemsize, OVERLAP),
        (end - result.itemsize, OVERLAP),
        (end, 0),
    ):
        put(struct, path, place)
        before = room.clone()
        assert run(struct) == code, place - begin
        assert torch.equal(room, before) == (code != 0)


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
    call: SampleCall, struct_and_output: Filled, written: str, shift: int, code: int
) -> None:
    """The logits take 320 bytes; a result before or behind them may touch them."""
    struct, *_outputs = struct_and_output
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
    call: SampleCall, struct_and_output: Filled, stride: int, shift: int, code: int
) -> None:
    struct, _output, own = struct_and_output
    assert run(struct) == 0
    expected = own.clone()
    call.batch.position.copy_(torch.tensor([0, 7]))
    before_the_step = TokenHistory.from_ids([[1], [2]], [[3], []], 40, max_length=8)
    call.history.seen.copy_(before_the_step.seen)
    call.history.counts.copy_(before_the_step.counts)
    call.history.text.lengths.copy_(before_the_step.text.lengths)

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
def test_a_single_row_has_any_stride(call: SampleCall, struct_and_output: Filled) -> None:
    """No second row begins there, so the stride is not multiplied either."""
    struct, output, own = struct_and_output
    struct.rows = 1
    struct.logits_stride = struct.allowed_mask_stride = struct.filtered_stride = 2**63 - 1
    struct.token_ids_stride = 2**63 - 1
    assert run(struct) == 0
    assert output.raw.id_logprobs[0].isnan().tolist() == [False, True, False]
    filtered = own.clone()
    call.batch.position[0] = 0
    before_the_step = TokenHistory.from_ids([[1]], [[3]], 40)
    call.history.seen[:1].copy_(before_the_step.seen)
    call.history.counts[:1].copy_(before_the_step.counts)
    struct.logits_stride = struct.allowed_mask_stride = struct.filtered_stride = 40
    assert run(struct) == 0
    assert torch.equal(filtered[0], own[0])


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
    before = memory(call, output)
    assert run(struct) == OVERLAP
    assert memory(call, output) == before
    struct.advance = 0
    assert run(struct) == 0
    history.slots.copy_(torch.tensor([2, 0, 1]))  # in any order
    struct.advance = 1
    assert run(struct) == 0
    assert batch.position.tolist() == [1, 2, 3]


# ---- Texts, windows, records, and ids for one call -----------------------------------------------


@pytest.fixture
def text_call(call: SampleCall) -> SampleCall:
    """The same call with all that a history can have."""
    return dataclasses.replace(
        call,
        history=TokenHistory.from_ids(
            [[1], [2]], [[3], []], 40, max_length=5, penalty_last_n=[2, -1]
        ),
        record=torch.tensor([True, True]),
        extra_output=torch.tensor([[4, -1, 40], [5, 6, 5]], dtype=torch.int32),
    )


TEXT_POINTERS = ("text", "text_lengths", "text_prompt_lengths", "windows")
BAD_TEXTS = {
    "no history": (setting(seen=None), NULL_POINTER),
    "no text, but windows": (setting(text=None), NULL_POINTER),
    "no lengths": (setting(text_lengths=None), NULL_POINTER),
    "no lengths of prompts": (setting(text_prompt_lengths=None), NULL_POINTER),
    "no ids for one call": (setting(extra_output=None), NULL_POINTER),
    "ids for one call without a history": (setting(seen=None, text=None), NULL_POINTER),
    **{
        f"{size} ids in a text": (setting(max_text_length=size), BAD_SIZE)
        for size in (0, -1, -(2**63), 2**60, 2**63 - 1)
    },
    **{
        f"{size} ids for one call": (setting(num_extra_output=size), BAD_SIZE)
        for size in (-1, 65, -(2**63), 2**63 - 1)
    },
    **{
        f"{size} bytes of workspace": (setting(workspace_bytes=size), BAD_SIZE)
        for size in (-1, -(2**63), 2**63 - 1)
    },
    "a misaligned workspace": (setting(workspace=12), MISALIGNED),
    "more ids for one call than there are addresses": (
        setting(rows=2**56, num_extra_output=64, logits_stride=0, allowed_mask_stride=0),
        BAD_SIZE,
    ),
    **{
        f"misaligned {name}": (shifting(name, 2), MISALIGNED)
        for name in (*TEXT_POINTERS, "extra_output", "repetition_penalty_scope")
    },
    "lengths of texts that are aligned to 4 bytes": (shifting("text_lengths", 4), MISALIGNED),
}


@needs_kernel
@pytest.mark.parametrize(("change", "code"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_struct_with_a_text_gives_its_code(
    text_call: SampleCall, change: Callable[[c_abi.SampleArgs], None], code: int
) -> None:
    struct, output = filled(text_call)
    change(struct)
    before = memory(text_call, output)
    assert run(struct) == code
    assert memory(text_call, output) == before
    struct, _ = filled(text_call)
    assert run(struct) == 0


@needs_kernel
@pytest.mark.parametrize(
    ("written", "other"),
    [
        *((name, other) for name in WRITTEN for other in (*TEXT_POINTERS, "record")),
        *((name, "extra_output") for name in WRITTEN),
        *((name, other) for name in ("text", "text_lengths") for other in (*WRITTEN, *READ)),
        *((name, other) for name in ("text", "text_lengths") for other in TEXT_POINTERS[2:]),
        *((name, other) for name in ("text", "text_lengths") for other in ("record",)),
        *((name, "extra_output") for name in ("text", "text_lengths")),
        ("text", "text_lengths"),
    ],
)
def test_texts_overlap_nothing_that_is_written(
    text_call: SampleCall, written: str, other: str
) -> None:
    struct, output = filled(text_call)
    filtered = torch.full((2, 40), 7.0)
    struct.filtered, struct.filtered_stride = filtered.data_ptr(), 40
    setattr(struct, written, getattr(struct, other))
    before = memory(text_call, output)
    assert run(struct) == OVERLAP
    assert memory(text_call, output) == before


@needs_kernel
@pytest.mark.parametrize(
    ("name", "shift", "code"),
    [
        ("text", -8, OVERLAP),  # its last ids are the text lengths
        ("text", -40, 0),  # ends where they begin
        ("text", -36, OVERLAP),
        ("text", 12, OVERLAP),
        ("text", 16, 0),
        ("extra_output", -24, 0),
        ("extra_output", -20, OVERLAP),
        ("extra_output", 12, OVERLAP),
        ("extra_output", 16, 0),
        ("windows", -8, 0),
        ("windows", -4, OVERLAP),
        ("windows", 16, 0),
        ("record", -2, 0),
        ("record", -1, OVERLAP),
        ("record", 15, OVERLAP),
        ("record", 16, 0),
        ("text_prompt_lengths", -16, 0),
        ("text_prompt_lengths", -8, OVERLAP),
        ("text_prompt_lengths", 8, OVERLAP),
    ],
)
def test_the_last_byte_of_a_text_counts(
    text_call: SampleCall, name: str, shift: int, code: int
) -> None:
    """The lengths of two texts take 16 bytes; other memory before or behind them may touch them."""
    room = torch.zeros(64, dtype=torch.int64)
    struct, _output = filled(text_call)
    struct.text_lengths = room[20:].data_ptr()
    room[20] = room[21] = 1
    setattr(struct, name, struct.text_lengths + shift)
    assert run(struct) == code
    assert room[20:22].tolist() == ([1, 1] if code or name == "record" else [2, 2])


@needs_kernel
def test_a_call_that_does_not_advance_may_share_what_it_reads(text_call: SampleCall) -> None:
    """The record of rows is not even looked at."""
    struct, _output = filled(text_call)
    struct.advance = 0
    struct.text_lengths = struct.text_prompt_lengths
    struct.record = 1
    assert run(struct) == 0


@needs_kernel
@pytest.mark.parametrize("end", [*TEXT_POINTERS, "record", "extra_output", "num_extra_output"])
def test_a_caller_that_does_not_know_a_field(text_call: SampleCall, end: str) -> None:
    """What lies behind the struct of a caller that was compiled earlier is not read."""
    struct, output = filled(text_call)
    names = [name for name, _ in c_abi.SampleArgs._fields_]
    struct.struct_size = getattr(c_abi.SampleArgs, end).offset
    for name in names[names.index(end) :]:
        setattr(struct, name, 8)
    known = "text_prompt_lengths" if end in ("text_lengths", "windows") else end
    wanted = {
        "text": 0,  # nothing of the history's text
        "max_text_length": BAD_SIZE,
        "text_lengths": NULL_POINTER,
        "text_prompt_lengths": NULL_POINTER,
        "windows": 0,
        "record": 0,
        "extra_output": 0,
        "num_extra_output": 0,
    }
    assert known in wanted
    assert run(struct) == wanted[end]
    if wanted[end] == 0:
        assert output.status.tolist() == [0, 0]
        assert text_call.history.lengths.tolist() == [2, 1]


@needs_kernel
@pytest.mark.parametrize(("first", "wanted"), [(-8, 0), (-7, OVERLAP), (0, OVERLAP), (15, 0)])
def test_a_workspace_is_written(text_call: SampleCall, first: int, wanted: int) -> None:
    """So it must not overlap anything; ``first`` is where it begins, in int64 from the tokens."""
    struct, output = filled(text_call)
    memory = torch.zeros(64, dtype=torch.int64)
    rows = output.tokens.numel()
    struct.tokens = memory[16:].data_ptr()
    struct.workspace = memory[16 + first :].data_ptr()
    struct.workspace_bytes = 8 * 8
    assert rows <= 15
    assert run(struct) == wanted


@needs_kernel
def test_a_caller_that_knows_no_text_has_none(call: SampleCall) -> None:
    batch = dataclasses.replace(without_rules(call).batch, any_output_scope=False)
    call = dataclasses.replace(call, batch=batch)
    others = dataclasses.replace(
        call,
        history=call.history.clone(),
        batch=dataclasses.replace(batch, repetition_penalty_scope=batch.top_k * 0),
    )
    expected = reference.sample(others)
    struct, output = filled(call)
    struct.struct_size = c_abi.SampleArgs.text.offset
    for name in (*TEXT_POINTERS, "max_text_length", "record", "extra_output", "num_extra_output"):
        setattr(struct, name, 8)
    struct.repetition_penalty_scope = 8
    assert run(struct) == 0
    assert output.tokens.tolist() == expected.tokens.flatten().tolist()


@needs_kernel
def test_a_size_without_what_it_is_the_size_of(call: SampleCall) -> None:
    """Without a text its length does not matter; ids for one call may be none."""
    struct, output = filled(call)
    struct.text = None
    struct.max_text_length = 2**63 - 1
    struct.extra_output = call.history.slots.data_ptr()
    struct.text_lengths = struct.text_prompt_lengths = output.tokens.data_ptr()
    assert run(struct) == 0
    assert output.status.tolist() == [0, 0]


@needs_kernel
def test_a_full_text_draws_nothing_unless_its_row_is_not_recorded(text_call: SampleCall) -> None:
    text = text_call.history.text
    text.lengths.copy_(torch.tensor([5, 5]))
    text_call.record[1] = False
    struct, output = filled(text_call)
    filtered = torch.full((2, 40), 7.0)
    struct.filtered, struct.filtered_stride = filtered.data_ptr(), 40
    before = bytes_of(history_tensors(text_call.history))
    assert run(struct) == 0
    assert output.status.tolist() == [base.STATUS_TEXT_FULL, 0]
    assert output.tokens[0] == -1
    assert output.tokens[1] >= 0
    assert_nothing(output, [0])
    assert not output.raw.logprobs[1].isnan()
    assert filtered[0].isneginf().all()
    assert bytes_of(history_tensors(text_call.history)) == before
    assert text_call.batch.position.tolist() == [0, 7]


@needs_kernel
@pytest.mark.parametrize("seed", range(6))
def test_hostile_histories_of_a_call(seed: int) -> None:
    unchecked.assert_hostile_texts_do_no_harm(cpu, 450, seed)


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_hostile_updates(seed: int) -> None:
    unchecked.assert_hostile_updates_do_no_harm(cpu, 450, seed)


# ---- Changes of histories by ids that were not drawn ---------------------------------------------


def update_of(kind: UpdateKind, history: TokenHistory) -> HistoryUpdate:
    """A valid update of two slots, in which every pointer is set."""
    has_ids = kind != "rollback"
    return HistoryUpdate(
        kind,
        history,
        torch.tensor([2, 0], dtype=torch.int32),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([[7, 8, 9], [3, -1, 5]]) if has_ids else None,
        torch.tensor([0, 1], dtype=torch.int32) if kind == "fill" else None,
        torch.tensor([10, 20]),
    )


def history_of_updates() -> TokenHistory:
    return TokenHistory.from_ids(
        [[1], [2], []], [[3], [], [4, 5]], 40, max_length=5, penalty_last_n=[2, -1, 1]
    )


@pytest.fixture(params=UPDATE_KINDS)
def update(request: pytest.FixtureRequest) -> HistoryUpdate:
    return update_of(request.param, history_of_updates())


@pytest.fixture
def fill() -> HistoryUpdate:
    return update_of("fill", history_of_updates())


def update_memory(update: HistoryUpdate) -> list[list[int]]:
    columns = (update.slots, update.numbers, update.ids, update.prompt_lengths, update.position)
    return bytes_of([*history_tensors(update.history), *(x for x in columns if x is not None)])


def run_update(struct: c_abi.HistoryUpdateArgs) -> int:
    return int(cpu.LIBRARY.load().llm_sampling_cpu_update(struct))


def refuses_update(update: HistoryUpdate, code: int, **fields: object) -> None:
    """A struct with other fields gives a code and changes nothing; without them it is valid."""
    struct = c_abi.make_update_args(update)
    for name, value in fields.items():
        setattr(struct, name, value)
    before = update_memory(update)
    assert run_update(struct) == code
    assert update_memory(update) == before
    assert run_update(c_abi.make_update_args(update)) == 0
    assert update_memory(update) != before


@needs_kernel
def test_no_struct() -> None:
    assert cpu.LIBRARY.load().llm_sampling_cpu(None) == BAD_STRUCT
    assert cpu.LIBRARY.load().llm_sampling_cpu_update(None) == BAD_STRUCT


BAD_UPDATES: dict[str, tuple[dict[str, object], int]] = {
    **{
        f"{size} bytes": ({"struct_size": size}, BAD_STRUCT)
        for size in (0, 8, ctypes.sizeof(c_abi.HistoryUpdateArgs) - 8, 4096, 2**32 - 1)
    },
    **{f"version {n}": ({"version": n}, BAD_STRUCT) for n in (0, 1, 2, 4)},
    "negative rows": ({"rows": -1}, BAD_SIZE),
    "more rows than there are addresses": ({"rows": 2**62}, BAD_SIZE),
    "the most rows": ({"rows": 2**63 - 1}, BAD_SIZE),
    "no vocabulary": ({"vocab_size": 0}, BAD_SIZE),
    "huge vocabulary": ({"vocab_size": 2**20 + 1}, BAD_SIZE),
    "no slots": ({"num_slots": 0}, BAD_SIZE),
    "negative slots": ({"num_slots": -(2**63)}, BAD_SIZE),
    "more slots than there are addresses": ({"num_slots": 2**60}, BAD_STRIDE),
    **{f"kind {kind}": ({"kind": kind}, BAD_OPTION) for kind in (-1, 3, -(2**31))},
    **{f"position_of {n}": ({"position_of": n}, BAD_OPTION) for n in (-1, 2, 3)},
    **{f"reserved {n}": ({"reserved": n}, BAD_OPTION) for n in (-1, 1)},
    **{
        f"no {name}": ({name: None}, NULL_POINTER)
        for name in ("slots", "numbers", "seen", "counts", "lengths")
    },
    "no text, but windows": ({"text": None}, NULL_POINTER),
    "no lengths of texts": ({"text_lengths": None}, NULL_POINTER),
    "no lengths of prompts": ({"text_prompt_lengths": None}, NULL_POINTER),
    **{
        f"{size} ids in a text": ({"max_text_length": size}, BAD_SIZE)
        for size in (0, -1, 2**60, 2**63 - 1)
    },
    "seen stride": ({"seen_stride": 1}, BAD_STRIDE),
    "counts stride": ({"counts_stride": 39}, BAD_STRIDE),
    "negative seen stride": ({"seen_stride": -2}, BAD_STRIDE),
    **{
        f"past all addresses: {name}": ({name: 2**61}, BAD_STRIDE)
        for name in ("seen_stride", "counts_stride")
    },
}


@needs_kernel
@pytest.mark.parametrize(("fields", "code"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_a_bad_update_gives_its_code_and_changes_nothing(
    update: HistoryUpdate, fields: dict[str, object], code: int
) -> None:
    refuses_update(update, code, **fields)


BAD_IDS: dict[str, tuple[dict[str, object], int]] = {
    "no ids": ({"ids": None}, NULL_POINTER),
    "negative number of ids": ({"max_ids": -1}, BAD_SIZE),
    "negative stride": ({"ids_stride": -3}, BAD_STRIDE),
    "more ids than there are addresses": ({"max_ids": 2**62}, BAD_STRIDE),
    "a stride past all addresses": ({"ids_stride": 2**61}, BAD_STRIDE),
    **{f"{n} bytes for an id": ({"id_bytes": n}, BAD_OPTION) for n in (0, 1, 2, 16, -4, -8)},
}


@needs_kernel
@pytest.mark.parametrize(("fields", "code"), BAD_IDS.values(), ids=BAD_IDS.keys())
@pytest.mark.parametrize("kind", ["append", "fill"])
def test_an_update_with_bad_ids(kind: UpdateKind, fields: dict[str, object], code: int) -> None:
    refuses_update(update_of(kind, history_of_updates()), code, **fields)


@needs_kernel
def test_a_rollback_reads_no_ids() -> None:
    update = update_of("rollback", history_of_updates())
    struct = c_abi.make_update_args(update)
    struct.ids, struct.max_ids, struct.ids_stride, struct.id_bytes = 1, -5, -(2**63), 3
    struct.prompt_lengths = update.history.lengths.data_ptr()
    assert run_update(struct) == 0
    assert update.history.lengths.tolist() == [0, 0, 1]
    refuses_update(update_of("rollback", history_of_updates()), NULL_POINTER, text=None)


UPDATE_WRITTEN = (
    *("position", "seen", "counts", "lengths"),
    *("text", "text_lengths", "text_prompt_lengths"),
)
UPDATE_READ = ("windows", "slots", "numbers", "prompt_lengths", "ids")


@needs_kernel
@pytest.mark.parametrize("name", [*UPDATE_WRITTEN, *UPDATE_READ])
def test_misaligned_memory_of_an_update(fill: HistoryUpdate, name: str) -> None:
    at = getattr(c_abi.make_update_args(fill), name)
    refuses_update(fill, MISALIGNED, **{name: at + 2})


@needs_kernel
@pytest.mark.parametrize("id_bytes", [4, 8])
def test_ids_are_aligned_to_their_own_size(fill: HistoryUpdate, id_bytes: int) -> None:
    struct = c_abi.make_update_args(fill)
    struct.id_bytes, struct.max_ids, struct.ids_stride = id_bytes, 2, 2
    struct.ids += 4
    assert run_update(struct) == (0 if id_bytes == 4 else MISALIGNED)


@needs_kernel
@pytest.mark.parametrize("other", [*UPDATE_WRITTEN, *UPDATE_READ])
@pytest.mark.parametrize("written", UPDATE_WRITTEN)
def test_what_an_update_writes_overlaps_nothing_else(
    fill: HistoryUpdate, written: str, other: str
) -> None:
    if other == written:
        assert run_update(c_abi.make_update_args(fill)) == 0
        return
    at = getattr(c_abi.make_update_args(fill), other)
    refuses_update(fill, OVERLAP, **{written: at})


@needs_kernel
def test_what_an_update_only_reads_may_overlap(fill: HistoryUpdate) -> None:
    """So may the rows of its ids, and prompt lengths that only a fill reads."""
    struct = c_abi.make_update_args(fill)
    struct.prompt_lengths = struct.numbers
    struct.ids_stride = 0
    assert run_update(struct) == 0
    assert fill.history.text.lengths.tolist() == [2, 1, 1]
    assert fill.history.text.ids[0, :2].tolist() == [7, 8]
    struct.kind = UPDATE_KINDS["append"]
    struct.prompt_lengths = struct.lengths
    assert run_update(struct) == 0


@needs_kernel
@pytest.mark.parametrize(
    ("slots", "code"),
    [
        ([1, 1], OVERLAP),
        ([2, 0, 2], OVERLAP),
        ([0, -1, 1, 0], OVERLAP),
        ([-1, -1], 0),
        ([3, 3, 1], 0),  # there is no slot 3
        ([-(2**31), 2, -(2**31)], 0),
        ([2**31 - 1, 2**31 - 1, 0, 2], 0),
    ],
)
@pytest.mark.parametrize("kind", UPDATE_KINDS)
def test_slots_of_an_update_that_are_named_twice(
    kind: UpdateKind, slots: list[int], code: int
) -> None:
    rows = len(slots)
    history = history_of_updates()
    changes = {"ids": torch.full((rows, 1), 6)} if kind != "rollback" else {}
    update = HistoryUpdate(
        kind,
        history,
        torch.tensor(slots, dtype=torch.int32),
        torch.ones(rows, dtype=torch.int32),
        **changes,
        position=torch.zeros(rows, dtype=torch.int64),
    )
    before = update_memory(update)
    assert run_update(c_abi.make_update_args(update)) == code
    has_changed = code == 0 and any(0 <= slot < 3 for slot in slots)
    # slot 1 has no output that could be taken away
    assert (update_memory(update) != before) == (
        has_changed and not (kind == "rollback" and slots == [3, 3, 1])
    )


@needs_kernel
def test_an_update_of_no_rows(fill: HistoryUpdate) -> None:
    """Its pointers do not matter, but its sizes and options do."""
    before = update_memory(fill)
    struct = c_abi.make_update_args(fill)
    struct.rows = 0
    struct.slots = struct.seen = struct.ids = struct.numbers = 1
    assert run_update(struct) == 0
    assert update_memory(fill) == before
    struct.kind = 3
    assert run_update(struct) == BAD_OPTION


@needs_kernel
def test_an_update_without_a_text_or_a_position() -> None:
    """What is NULL is not read, and a length of texts that are not there does not matter."""
    history = TokenHistory.from_ids([[1], [2], []], None, 40)
    update = dataclasses.replace(update_of("fill", history), position=None)
    struct = c_abi.make_update_args(update)
    struct.max_text_length = 2**63 - 1
    struct.text_lengths = struct.text_prompt_lengths = 1
    assert run_update(struct) == MISALIGNED
    struct.text_lengths = struct.text_prompt_lengths = None
    assert run_update(struct) == 0
    assert history.counts.nonzero().tolist() == [[2, 7]]
    assert history.lengths.tolist() == [0, 0, 1]


@needs_kernel
@pytest.mark.parametrize("kind", ["append", "rollback"])
def test_positions_and_lengths_wrap_around(kind: UpdateKind) -> None:
    """As in torch, after the largest integer comes the smallest, and the other way round."""
    history = history_of_updates()
    update = update_of(kind, history)
    start = 2**63 - 1 if kind == "append" else -(2**63)
    history.lengths.fill_(start)
    update.position.fill_(start)
    judged = dataclasses.replace(update, history=history.clone(), position=update.position.clone())
    assert run_update(c_abi.make_update_args(update)) == 0
    apply_update(judged)
    assert torch.equal(history.lengths, judged.history.lengths)
    assert torch.equal(update.position, judged.position)
    assert (update.position < 0).all() == (kind == "append")


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
    ids = torch.tensor([[-1, 0, 7, 50_256]], dtype=torch.int32)
    wanted = Wanted(("processed", "raw"), 20, ids, "ids", 1024)
    call = SampleCall(rows, batch, None, None, num_samples=8, wanted=wanted)
    expected = with_every_form(call, cpu.sample)
    struct, output = filled(call)
    assert own(ctypes.byref(struct)) == 0
    for tensor, other in zip(tensors_of(output), tensors_of(expected), strict=True):
        assert torch.equal(unchecked.bits(tensor), unchecked.bits(other.view(tensor.shape)))
