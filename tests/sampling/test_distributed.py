"""sample_sharded: every rank of a group returns the tokens of ``sample``, for any slices."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import (
    DTYPES,
    ON_THE_CPU,
    SMALL_VOCABS,
    Batch,
    Case,
    build,
    covering_cases,
    every_case,
    filter_mixes,
)
from no_waiting import nothing_waits
from ranks import Ended, Raised, Ranks
from ruled_rows import Rows
from torch import Tensor

from benchmarks import sharded as benchmark
from llm_sampling import (
    BatchParams,
    Sampler,
    SamplingParams,
    TokenHistory,
    distributed,
    sample,
    sample_sharded,
)

SIZES = (1, 2, 3, 4, 8)
LOGPROB_TOLERANCE = 1e-5  # the same tolerance as between backends
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=SIZES, ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Yield a group of each size in turn."""
    group = Ranks(request.param)
    yield group
    group.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()


def even(vocab_size: int, size: int) -> list[int]:
    """Return the bounds of slices of equal width, as torch.chunk cuts; the last may be shorter."""
    width = -(-vocab_size // size)
    return [min(rank * width, vocab_size) for rank in range(size + 1)]


def uneven(vocab_size: int, size: int, seed: int) -> list[int]:
    """Return the bounds of slices of random widths, some of which may be empty."""
    rng = random.Random(seed)
    return [0, *sorted(rng.randrange(vocab_size + 1) for _ in range(size - 1)), vocab_size]


# ------------------------------------------------------------------------ functions that ranks run


def draw(rank: int, batch: Batch, ends: Sequence[int], options: dict[str, Any]) -> Any:
    """Call ``sample_sharded`` with this rank's slice of a batch; return the results as lists."""
    output = sample_sharded(
        batch.logits[:, ends[rank] : ends[rank + 1]],
        BatchParams.from_list(batch.params, positions=batch.positions),
        vocab_start=ends[rank],
        history=batch.history,
        allowed_mask=batch.allowed_mask,
        **options,
    )
    return [None if part is None else part.tolist() for part in output[:3]]


def draw_all(
    rank: int,
    groups: Sequence[Sequence[Case]],
    vocab_size: int,
    dtype: torch.dtype,
    ends: Sequence[int],
    options: dict[str, Any],
) -> Any:
    return [draw(rank, build(cases, vocab_size, dtype), ends, options) for cases in groups]


def assert_same(
    ranks: Ranks,
    groups: Sequence[Sequence[Case]],
    vocab_size: int,
    dtype: torch.dtype,
    ends: Sequence[int],
    **options: Any,
) -> None:
    """Assert that every rank returns the tokens, status and logprobs of ``sample``."""
    differing, every = differences(ranks, groups, vocab_size, dtype, ends, **options)
    assert every, "nothing was compared"
    if differing:
        pytest.fail(
            f"{len(differing)} of {every} rows differ on {ranks.size} ranks, slices end at {ends}, "
            f"{options}:\n" + "\n".join(differing[:5]),
            pytrace=False,
        )


def differences(
    ranks: Ranks,
    groups: Sequence[Sequence[Case]],
    vocab_size: int,
    dtype: torch.dtype,
    ends: Sequence[int],
    **options: Any,
) -> tuple[list[str], int]:
    """Return a description of each row that differs on a rank, and how many rows were compared."""
    options = {"check": False, **options}
    answers = ranks(draw_all, groups, vocab_size, dtype, ends, options)
    differing, every = [], 0
    for index, cases in enumerate(groups):
        batch = build(cases, vocab_size, dtype)
        expected = sample(
            batch.logits,
            batch.params,
            history=batch.history,
            allowed_mask=batch.allowed_mask,
            positions=batch.positions,
            **options,
        )
        every += len(cases)
        for rank, answer in enumerate(answers):
            assert isinstance(answer, list), answer
            tokens, logprobs, status = (
                None if part is None else torch.tensor(part) for part in answer[index]
            )
            wrong = (tokens != expected.tokens).view(len(cases), -1).any(-1)
            wrong |= status != expected.status
            if expected.logprobs is not None:
                close = torch.isclose(
                    logprobs, expected.logprobs, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True
                )
                wrong |= ~close.view(len(cases), -1).all(-1)
            for row in wrong.nonzero().flatten().tolist():
                differing.append(
                    f"{batch.describe(row)}\n  rank {rank}: {tokens[row].tolist()} "
                    f"status {status[row]}; unsharded: {expected.tokens[row].tolist()} "
                    f"status {expected.status[row]}"
                )
    return differing, every


def with_few_candidates(groups: Sequence[Sequence[Case]], vocab_size: int) -> list[list[Case]]:
    """Return only the cases for the candidate algorithm.

    ``sample_sharded`` uses it only if all rows of the batch allow it, and else the threshold.
    """

    def has_candidates(case: Case) -> bool:
        batch = BatchParams.from_list([case.params(vocab_size)])
        return 0 < batch.kept_at_most <= distributed.MOST_CANDIDATES

    wanted = [list(filter(has_candidates, group)) for group in groups]
    return [cases for cases in wanted if cases]


# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("slices", ["even", "uneven"])
def test_every_row_with_every_mix(ranks: Ranks, slices: str) -> None:
    """All cases of the table. Each group size has its own vocabulary size, dtype and options."""
    turn = SIZES.index(ranks.size) + 3 * (slices == "uneven")
    vocab_size = (33, 513, 31, 512, 511, 7, 33, 513)[turn]
    ends = (
        uneven(vocab_size, ranks.size, turn) if slices == "uneven" else even(vocab_size, ranks.size)
    )
    groups = every_case(vocab_size, histories_each=2)
    options = {"logprobs": (None, "processed", "raw")[turn % 3], "num_samples": 1 + turn % 2}
    dtype = DTYPES[turn % len(DTYPES)]
    assert_same(ranks, groups, vocab_size, dtype, ends, **options)
    assert_same(ranks, with_few_candidates(groups, vocab_size), vocab_size, dtype, ends, **options)


@pytest.mark.parametrize("vocab_size", SMALL_VOCABS, ids="V{}".format)
def test_every_vocabulary(ranks: Ranks, vocab_size: int) -> None:
    """Vocabularies of all small sizes, some of them with fewer ids than there are ranks."""
    seed = ranks.size + vocab_size
    ends = (even(vocab_size, ranks.size), uneven(vocab_size, ranks.size, vocab_size))[seed % 2]
    dtype = DTYPES[seed % len(DTYPES)]
    groups = covering_cases(vocab_size, seed)
    for cases in (groups, with_few_candidates(groups, vocab_size)):
        assert_same(ranks, cases, vocab_size, dtype, ends, num_samples=4, logprobs="processed")


@pytest.mark.parametrize("vocab_size", [32000, 128256], ids="V{}".format)
def test_large_vocabularies(ranks: Ranks, vocab_size: int) -> None:
    ends = uneven(vocab_size, ranks.size, 1)
    groups = covering_cases(vocab_size, 5, rows=3)
    for cases in (groups, with_few_candidates(groups, vocab_size)):
        assert_same(ranks, cases, vocab_size, torch.float32, ends, logprobs="raw")


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_every_backend(three: Ranks, backend: str) -> None:
    groups = covering_cases(513, 11)
    ends = uneven(513, 3, 2)
    for cases in (groups, with_few_candidates(groups, 513)):
        assert_same(three, cases, 513, torch.float32, ends, backend=backend, logprobs="processed")


def windowed(vocab_size: int) -> tuple[list[SamplingParams], TokenHistory, list[Tensor]]:
    """Return parameters with windows and scopes, their history, and the logits of five steps."""
    strong: dict[str, Any] = {"repetition_penalty": 2.5, "frequency_penalty": 0.5}
    params = [
        SamplingParams(**strong, penalty_last_n=3, seed=1),
        SamplingParams(**strong, penalty_last_n=0, top_k=9, seed=2),
        SamplingParams(**strong, repetition_penalty_scope="output", top_p=0.8, seed=3),
        SamplingParams(
            **strong, penalty_last_n=2, repetition_penalty_scope="output", temperature=0
        ),
    ]
    history = TokenHistory.from_ids(
        [[1, 5, 7], [2, 2], [vocab_size - 1, 4], []],
        [[5, 6], [3], [], [0, 9, 9]],
        vocab_size,
        max_length=12,
        penalty_last_n=[row.penalty_last_n for row in params],
    )
    steps = [logits_of(step, 4, vocab_size) for step in range(5)]
    for logits in steps:
        logits[:, :10] += 6  # most candidates are in the histories
    return params, history, steps


def draw_windowed(rank: int, vocab_size: int, ends: Sequence[int], few: bool) -> list[list[int]]:
    params, history, steps = windowed(vocab_size)
    if few:  # all rows keep few tokens, so that the ranks exchange candidates
        params = [replace(row, top_k=9) for row in params]
    drawn = []
    for logits in steps:
        local = logits[:, ends[rank] : ends[rank + 1]]
        tokens = sample_sharded(local, params, vocab_start=ends[rank], history=history).tokens
        history.append(tokens)
        drawn.append(tokens.tolist())
    return drawn


@pytest.mark.parametrize("few", [False, True])
def test_windows_and_scopes_of_penalties(three: Ranks, few: bool) -> None:
    vocab_size = 40
    params, history, steps = windowed(vocab_size)
    if few:
        params = [replace(row, top_k=9) for row in params]

    def drawn(params: list[SamplingParams], history: TokenHistory) -> list[list[int]]:
        tokens = []
        for logits in steps:
            tokens.append(sample(logits, params, history=history).tokens)
            history.append(tokens[-1])
        return [step.tolist() for step in tokens]

    expected = drawn(params, history)
    assert three(draw_windowed, vocab_size, [0, 3, 17, vocab_size], few) == [expected] * 3
    off = [replace(row, penalty_last_n=-1, repetition_penalty_scope="all") for row in params]
    whole = [[1, 5, 7], [2, 2], [39, 4], []], [[5, 6], [3], [], [0, 9, 9]]
    without = drawn(off, TokenHistory.from_ids(*whole, vocab_size))
    for row in range(4):
        assert [step[row] for step in expected] != [step[row] for step in without]


def draw_ruled(rank: int, rows: Rows, ends: Sequence[int], few: bool, backend: str) -> Any:
    """Two steps of rows with rules; return tokens, status and logprobs as lists."""
    params = [replace(row, top_k=9) for row in rows.params] if few else rows.params
    history, drawn = rows.history(), []
    for logits in (rows.logits, rows.logits.flip(0)):
        output = sample_sharded(
            logits[:, ends[rank] : ends[rank + 1]],
            params,
            vocab_start=ends[rank],
            history=history,
            check=False,
            logprobs="processed",
            backend=backend,
        )
        history.append(output.tokens.clamp(min=0))
        drawn.append([part.tolist() for part in output[:3]])
    return drawn


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_rules_that_look_at_the_history(three: Ranks, seed: int, few: bool, backend: str) -> None:
    """Each rank's list has those of its ids that the list of the whole row has."""
    vocab_size = (5, 7, 40, 600)[seed % 4]  # the histories have the first 5 ids
    rows = Rows(seed, vocab_size, torch.float32)
    params = [replace(row, top_k=9) for row in rows.params] if few else rows.params
    expected, history = [], rows.history()
    for logits in (rows.logits, rows.logits.flip(0)):
        output = sample(logits, params, history=history, check=False, logprobs="processed")
        history.append(output.tokens.clamp(min=0))
        expected.append(output)
    for ends in ([0, 2, 3, vocab_size], [0, 4, 4, vocab_size]):
        for drawn in three(draw_ruled, rows, ends, few, backend):
            for (tokens, logprobs, status), output in zip(drawn, expected, strict=True):
                assert tokens == output.tokens.tolist()
                assert status == output.status.tolist()
                close = {"rtol": 0, "atol": LOGPROB_TOLERANCE, "equal_nan": True}
                torch.testing.assert_close(torch.tensor(logprobs), output.logprobs, **close)


def whole_text_of(rank: int, rows: Rows, ends: Sequence[int]) -> Any:
    """Broken: the text has ids of the whole vocabulary, and the kernel knows nothing of it."""
    before, distributed.VocabSlice = distributed.VocabSlice, lambda *_: None
    try:
        return draw_ruled(rank, rows, ends, False, "cpu")
    finally:
        distributed.VocabSlice = before


def test_rules_that_take_the_ids_of_a_text_for_places_of_a_slice_are_seen(three: Ranks) -> None:
    rows, ends = Rows(2, 40, torch.float32), [0, 2, 3, 40]
    assert three(whole_text_of, rows, ends) != three(draw_ruled, rows, ends, False, "cpu")


def each_mix_alone(vocab_size: int) -> list[list[Case]]:
    """Return one batch per mix of filters, so that unneeded threshold searches are skipped."""
    rows = ("normal x3", "plateau", "octaves", "two values", "deep tail", "random bits")
    return [
        [Case(row, mix, seed=seed) for seed, row in enumerate(rows)]
        for mix in filter_mixes(vocab_size)
    ]


def test_every_mix_alone(three: Ranks) -> None:
    assert_same(three, each_mix_alone(1000), 1000, torch.float32, uneven(1000, 3, 3))


def with_digits(rank: int, digits: tuple[int, ...], *args: Any) -> Any:
    distributed.DIGITS, before = digits, distributed.DIGITS
    try:
        return draw_all(rank, *args)
    finally:
        distributed.DIGITS = before


@pytest.mark.parametrize("digits", [(8, 8, 8, 8), (11, 11, 10), (1,) * 32, (3, 13, 16)], ids=str)
def test_digits_of_any_width_give_the_same_tokens(three: Ranks, digits: tuple[int, ...]) -> None:
    args = (each_mix_alone(100), 100, torch.float32, uneven(100, 3, 4), {"check": False})
    assert three(with_digits, digits, *args) == three(draw_all, *args)


def greater_ties(rank: int, *args: Any) -> Any:
    """Broken: every rank keeps one tie too many."""
    before = torch.minimum
    torch.minimum = lambda a, b: before(a + 1, b) if a.dim() == 2 else before(a, b)
    try:
        return draw_all(rank, *args)
    finally:
        torch.minimum = before


def fewer_bits(rank: int, *args: Any) -> Any:
    """Broken: the radix search stops before the last bit of the key."""
    return with_digits(rank, (7, 7, 6, 6, 5), *args)


def local_best(rank: int, *args: Any) -> Any:
    """Broken: each rank measures depths from the best token of its own slice."""
    before = distributed._Ranks.max
    distributed._Ranks.max = lambda ranks, tensor: tensor
    try:
        return draw_all(rank, *args)
    finally:
        distributed._Ranks.max = before


@pytest.mark.parametrize("broken", [greater_ties, fewer_bits, local_best])
def test_broken_sharding_is_detected(three: Ranks, broken: Any) -> None:
    class Broken:
        size = 3

        def __call__(self, function: Any, *args: Any) -> Any:
            assert function is draw_all
            return three(broken, *args)

    ends = even(1000, 3)
    assert differences(three, each_mix_alone(1000), 1000, torch.float32, ends)[0] == []
    assert differences(Broken(), each_mix_alone(1000), 1000, torch.float32, ends)[0]


# ------------------------------------------------------------- decode loops, seeds, DTensor, groups


CHAIN = SamplingParams(
    repetition_penalty=1.3, frequency_penalty=0.2, temperature=0.9, top_p=0.9, seed=5
)
STREAMS = (
    CHAIN,
    SamplingParams(top_k=5, presence_penalty=0.4, seed=6),
    SamplingParams(temperature=0),
    SamplingParams(min_p=0.05, min_tokens_to_keep=2, seed=7),
)


def logits_of(step: int, rows: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, vocab_size, generator=generator) * 3


def stream(rank: int, steps: int, vocab_size: int, ends: Sequence[int]) -> list[list[int]]:
    """Run a decode loop with parameters that are packed once; every rank updates its history."""
    params = BatchParams.from_list(STREAMS)
    history = TokenHistory.from_ids([[1, 2], [3], [], [4]], None, vocab_size)
    tokens = []
    for step in range(steps):
        logits = logits_of(step, len(STREAMS), vocab_size)[:, ends[rank] : ends[rank + 1]]
        output = sample_sharded(logits, params, vocab_start=ends[rank], history=history)
        history.append(output.tokens)
        tokens.append(output.tokens.tolist())
    return tokens


def test_a_loop_gives_the_streams_of_a_sampler(three: Ranks) -> None:
    steps, vocab_size = 20, 300
    history = TokenHistory.from_ids([[1, 2], [3], [], [4]], None, vocab_size)
    sampler = Sampler(STREAMS, vocab_size=vocab_size, history=history)
    expected = [
        sampler(logits_of(step, len(STREAMS), vocab_size)).tokens.tolist() for step in range(steps)
    ]
    assert three(stream, steps, vocab_size, uneven(vocab_size, 3, 5)) == [expected] * 3


def unseeded(rank: int, params: SamplingParams, ends: Sequence[int]) -> list[list[int]]:
    """Return the tokens of two calls, with a different generator state on each rank."""
    torch.manual_seed(100 + rank)
    logits = logits_of(0, 40, 64)[:, ends[rank] : ends[rank + 1]]
    rows = [params, SamplingParams(top_k=50, seed=1)] * 20
    return [sample_sharded(logits, rows, vocab_start=ends[rank]).tokens.tolist() for _ in range(2)]


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_k=50)], ids=["threshold", "candidates"]
)
def test_rows_without_a_seed_get_the_first_rank_s(three: Ranks, params: SamplingParams) -> None:
    rows = [params, SamplingParams(top_k=50, seed=1)] * 20
    torch.manual_seed(100)
    expected = [sample(logits_of(0, 40, 64), rows).tokens.tolist() for _ in range(2)]
    assert expected[0][::2] != expected[1][::2]
    assert three(unseeded, params, uneven(64, 3, 6)) == [expected] * 3


def from_dtensor(rank: int, vocab_size: int, rows: list[SamplingParams], two: bool) -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shape = (2, 2) if two else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape)
    placements = [Replicate(), Shard(1)] if two else [Shard(1)]
    logits = distribute_tensor(logits_of(1, len(rows), vocab_size), mesh, placements)
    return sample_sharded(logits, rows).tokens.tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 100, 101], ids="V{}".format)
@pytest.mark.parametrize("two", [False, True], ids=["one dimension", "two dimensions"])
def test_a_dtensor(four: Ranks, vocab_size: int, two: bool) -> None:
    rows = [SamplingParams(temperature=1.3, top_p=0.95, seed=seed) for seed in range(30)]
    expected = sample(logits_of(1, 30, vocab_size), rows).tokens.tolist()
    assert four(from_dtensor, vocab_size, rows, two) == [expected] * 4


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    group = Ranks(4)
    yield group
    group.close()


def in_a_subgroup(rank: int, ends: Sequence[int]) -> Any:
    """Sample in a group of ranks 1 and 3 only; ranks 0 and 2 call too and must be refused."""
    group = dist.new_group([1, 3])
    place = {1: 0, 3: 1}.get(rank, 0)
    logits = logits_of(2, 4, 90)[:, ends[place] : ends[place + 1]]
    return sample_sharded(
        logits, STREAMS_ALONE, group=group, vocab_start=ends[place]
    ).tokens.tolist()


STREAMS_ALONE = [SamplingParams(top_p=0.8, seed=seed) for seed in range(4)]


def test_a_group_of_some_ranks(four: Ranks) -> None:
    first, second, third, fourth = four(in_a_subgroup, [0, 50, 90])
    expected = sample(logits_of(2, 4, 90), STREAMS_ALONE).tokens.tolist()
    assert second == fourth == expected
    for outside in (first, third):
        assert (outside.type, outside.message) == (
            "ValueError",
            "group must be one that this process is a member of",
        )


def with_a_gradient(rank: int) -> Any:
    logits = logits_of(0, 2, 10).requires_grad_()
    output = sample_sharded(logits[:, 5 * rank : 5 * rank + 5], CHAIN_ALONE, vocab_start=5 * rank)
    no_rows = sample_sharded(torch.zeros(0, 5), [], vocab_start=5 * rank)
    return output.tokens.tolist(), [list(part.shape) for part in no_rows if part is not None]


CHAIN_ALONE = SamplingParams(top_p=0.9, seed=1)


# ----------------------------------------------------------------------- messages between the ranks


class Counted:
    """Record the collectives that are called: the name with the operator, and the bytes sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def __enter__(self) -> Counted:
        self._before = {name: getattr(dist, name) for name in dir(dist) if name in COLLECTIVES}
        for name, function in self._before.items():
            setattr(dist, name, self._counting(name, function))
        self._gather, distributed._all_gather = (
            distributed._all_gather,
            self._counting("all_gather", distributed._all_gather),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)
        distributed._all_gather = self._gather

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            operator = f" {args[1]}" if name == "all_reduce" else ""
            self.sent.append((name + operator, tensor.numel() * tensor.element_size()))
            return function(*args, **options)

        return counting


#: Every function of torch.distributed that communicates.
COLLECTIVES = {
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_gather_single", "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend"),
    *("monitored_barrier", "recv", "recv_object_list", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "send_object_list"),
}


def counted(rank: int, params: SamplingParams, rows: int, options: dict[str, Any]) -> Any:
    with Counted() as count:
        width = 400
        logits = logits_of(0, rows, 3 * width)[:, rank * width : (rank + 1) * width]
        sample_sharded(logits, params, vocab_start=rank * width, **options)
    return count.sent


def traffic() -> dict[str, tuple[str, str]]:
    """Read the table of docs/scale.md: for each call the formulas of messages and bytes per row."""
    rows = re.findall(
        r"^\| `(SamplingParams\(.*?\))` \| ([^|]+) \| ([^|]+) \|",
        (ROOT / "docs/scale.md").read_text(),
        re.MULTILINE,
    )
    return {call: (messages, size) for call, messages, size in rows if "µs" not in messages}


@pytest.mark.parametrize("call", traffic())
@pytest.mark.parametrize("rows", [1, 5])
def test_messages_and_bytes_are_those_of_the_docs(three: Ranks, call: str, rows: int) -> None:
    messages, size = traffic()[call]
    params = eval(call, {"SamplingParams": SamplingParams, "k": 40})
    sent = three(counted, params, rows, {"check": False})
    assert [len(one) for one in sent] == [eval(messages)] * 3
    assert [sum(count for _, count in one) for one in sent] == [rows * eval(size, {"k": 40})] * 3
    assert eval(size, {"k": distributed.MOST_CANDIDATES}) <= 8 * 1024


def test_docs_count_both_algorithms() -> None:
    """The table in docs/scale.md covers both algorithms, with and without each search."""
    calls = [eval(call, {"SamplingParams": SamplingParams, "k": 40}) for call in traffic()]
    assert len(calls) >= 6
    batches = [BatchParams.from_list([params]) for params in calls]
    assert {0 < b.kept_at_most <= distributed.MOST_CANDIDATES for b in batches} == {True, False}
    for flag in ("any_top_k", "any_top_p", "any_floor"):
        assert {
            getattr(b, flag) for b in batches if b.kept_at_most == 0 or b.kept_at_most > 256
        } == {
            True,
            False,
        }, flag


@pytest.mark.parametrize(
    ("params", "options", "more"),
    [
        (SamplingParams(top_k=40, seed=1), {"logprobs": "processed"}, 0),
        (SamplingParams(top_k=40, seed=1), {"logprobs": "raw"}, 8 * 42),
        (SamplingParams(top_k=40), {}, 8),
        (SamplingParams(top_p=0.9, seed=1), {"logprobs": "processed"}, 8),
        (SamplingParams(top_p=0.9, seed=1), {"logprobs": "raw"}, 8 + 16),
        (SamplingParams(top_p=0.9), {}, 8),
        (SamplingParams(top_p=0.9, seed=1), {"num_samples": 3}, 16),
        (SamplingParams(top_k=40, seed=1), {"num_samples": 3}, 0),
    ],
    ids=str,
)
def test_bytes_of_what_else_may_be_asked_for(
    three: Ranks, params: SamplingParams, options: dict[str, Any], more: int
) -> None:
    plain = SamplingParams(top_k=params.top_k, top_p=params.top_p, seed=1)
    before = sum(size for _, size in three(counted, plain, 5, {"check": False})[0])
    for sent in three(counted, params, 5, {"check": False, **options}):
        assert sum(size for _, size in sent) == before + 5 * more


def test_check_costs_one_more_message(three: Ranks) -> None:
    plain = three(counted, CHAIN_ALONE, 5, {"check": False})[0]
    for sent in three(counted, CHAIN_ALONE, 5, {"check": True}):
        assert sent == [("all_gather", 8 * len(distributed._HEADER)), *plain]


def test_only_collectives_that_nccl_has(three: Ranks) -> None:
    """The only collectives are all-gather and all-reduce with SUM or MAX, which NCCL has."""
    everything = SamplingParams(top_p=0.9, top_k=300, min_p=0.1, min_tokens_to_keep=2)
    for params in (everything, SamplingParams(top_k=40)):
        for sent in three(counted, params, 2, {"logprobs": "raw", "num_samples": 2}):
            assert {name for name, _ in sent} <= {
                "all_gather",
                f"all_reduce {dist.ReduceOp.SUM}",
                f"all_reduce {dist.ReduceOp.MAX}",
            }


def without_waiting(rank: int, options: dict[str, Any], waiting: str | None) -> Any:
    mask = torch.full((4, 10), -1, dtype=torch.int32)
    history = TokenHistory.from_ids([[1], [2], [3], [4]], None, 300)
    params = BatchParams.from_list(options.pop("rows")).checked()  # this check reads CPU values
    logits = logits_of(0, 4, 300)[:, 100 * rank : 100 * rank + 100]
    options |= {"history": history, "allowed_mask": mask, "vocab_start": 100 * rank}
    options |= {"num_samples": 2, "check": False, "backend": "cpu"}
    with nothing_waits():
        output = sample_sharded(logits, params, **options)
        if waiting:
            getattr(output.tokens[0, 0], waiting)()
    return output.tokens.tolist()


@pytest.mark.parametrize("logprobs", [None, "processed", "raw"])
@pytest.mark.parametrize(
    "rows", [STREAMS, [SamplingParams(top_k=9)] * 4], ids=["threshold", "candidates"]
)
def test_nothing_waits_for_a_device(three: Ranks, rows: Any, logprobs: Any) -> None:
    answers = three(without_waiting, {"rows": rows, "logprobs": logprobs}, None)
    assert answers == [answers[0]] * 3
    assert len(answers[0]) == 4, answers


@pytest.mark.parametrize("waiting", ["item", "tolist", "cpu", "__bool__", "nonzero"])
def test_waiting_is_detected(three: Ranks, waiting: str) -> None:
    for answer in three(without_waiting, {"rows": STREAMS}, waiting):
        assert "waits for the device" in answer.message


def test_a_gradient_and_no_rows(two: Ranks) -> None:
    tokens = sample(logits_of(0, 2, 10), CHAIN_ALONE).tokens.tolist()
    assert two(with_a_gradient) == [(tokens, [[0], [0]])] * 2


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


def call(rank: int, by_rank: Sequence[dict[str, Any]]) -> Any:
    """Call with this rank's changed arguments, then with valid ones; return error and tokens."""
    good = {"rows": 2, "width": 5, "params": CHAIN_ALONE, "vocab_start": 5 * rank, "dtype": None}

    def once(changes: dict[str, Any]) -> Any:
        options = good | changes
        logits = torch.zeros(options.pop("rows"), options.pop("width"), dtype=options.pop("dtype"))
        return sample_sharded(options.pop("logits", logits), options.pop("params"), **options)

    try:
        once(by_rank[rank])
        told = None
    except Exception as error:
        told = Raised(error)
    return told, once({}).tokens.tolist()


def history_of(vocab_size: int) -> TokenHistory:
    return TokenHistory.from_ids([[], []], None, vocab_size)


def mask_of(vocab_size: int) -> Tensor:
    return torch.full((2, -(-vocab_size // 32)), -1, dtype=torch.int32)


PENALTY = SamplingParams(repetition_penalty=1.2, seed=1)


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        (
            [{"rows": 3}, {}],
            "the rows of local_logits must be the same on every rank, got [3, 2] by rank",
        ),
        (
            [{"num_samples": 2}, {}],
            "num_samples must be the same on every rank, got [2, 1] by rank",
        ),
        (
            [{}, {"logprobs": "raw"}],
            "logprobs (by number) must be the same on every rank, got [-1, 1] by rank",
        ),
        (
            [{}, {"params": SamplingParams(top_k=3, seed=1)}],
            "what params turn on (as bits) must be the same on every rank, got [2, 49] by rank",
        ),
        (
            [{}, {"vocab_start": 6}],
            "the slices must follow each other from id 0 on, got vocab_start [0, 6] and "
            "columns [5, 5] by rank",
        ),
        (
            [{}, {"vocab_start": 4}],
            "the slices must follow each other from id 0 on, got vocab_start [0, 4] and "
            "columns [5, 5] by rank",
        ),
        (
            [{"vocab_start": 5}, {"vocab_start": 0}],
            "the slices must follow each other from id 0 on, got vocab_start [5, 0] and "
            "columns [5, 5] by rank",
        ),
        (
            [{"width": 6}, {}],
            "the slices must follow each other from id 0 on, got vocab_start [0, 5] and "
            "columns [6, 5] by rank",
        ),
        (
            [{"width": 0}, {"width": 0, "vocab_start": 0}],
            "the slices must make up a vocab_size in 1 .. 2^20, got 0",
        ),
        (
            [{"width": 2**19 + 1}, {"width": 2**19, "vocab_start": 2**19 + 1}],
            "the slices must make up a vocab_size in 1 .. 2^20, got 1048577",
        ),
        (
            [
                {"params": PENALTY, "history": history_of(10)},
                {"params": PENALTY, "history": history_of(5)},
            ],
            "history must have the vocab_size of all slices, 10, or be None everywhere, got "
            "[10, 5] by rank",
        ),
        (
            [{"history": history_of(10)}, {}],
            "history must have the vocab_size of all slices, 10, or be None everywhere, got "
            "[10, -1] by rank",
        ),
        (
            [{"allowed_mask": mask_of(10)}, {"allowed_mask": mask_of(64)}],
            "allowed_mask must have a bit for each id of all slices, 1, or be None everywhere, got "
            "[1, 2] by rank",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_ranks_that_disagree_all_raise(two: Ranks, by_rank: Any, message: str) -> None:
    expected = sample(torch.zeros(2, 10), CHAIN_ALONE).tokens.tolist()
    for told, tokens in two(call, by_rank):
        assert (told.type, told.message) == ("ValueError", message)
        assert tokens == expected, "the group works afterwards"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.9, seed=2),
        SamplingParams(top_p=0.90001, seed=1),
        SamplingParams(top_p=0.9, seed=1, temperature=0.9),
        SamplingParams(top_p=0.9, seed=1, logit_bias={3: 1}),
        SamplingParams(top_p=0.9, seed=1, min_p=0.1),
    ],
    ids=str,
)
def test_ranks_with_other_parameters_all_raise(two: Ranks, params: SamplingParams) -> None:
    for told, _ in two(call, [{}, {"params": params}]):
        assert told.type == "ValueError"
        assert "params and positions (by checksum) must be the same on every rank" in told.message


@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ([[1, 2], [3]], [[4, 5], [7]]),
        ([[1, 2], [3]], [[4, 4], [6]]),
        ([[1, 3], [3]], [[4, 4], [7]]),
        ([[1], [3]], [[4, 4], [7]]),
        ([[3], [1, 2]], [[7], [4, 4]]),
    ],
    ids=["another token", "another row", "another prompt", "a token less", "rows swapped"],
)
def test_ranks_with_other_histories_all_raise(
    two: Ranks, prompt: list[list[int]], output: list[list[int]]
) -> None:
    """Each rank penalises its own slice: they would return the same wrong token."""
    options = {"params": PENALTY, "positions": [2, 1]}
    same = {**options, "history": TokenHistory.from_ids([[1, 2], [3]], [[4, 4], [7]], 10)}
    other = {**options, "history": TokenHistory.from_ids(prompt, output, 10)}
    for told, _ in two(call, [same, other]):
        assert told.type == "ValueError"
        message = "the tokens in history (by checksum) must be the same on every rank"
        assert message in told.message
    slots = TokenHistory.from_ids([[9], [1, 2], [9], [3]], [[9], [4, 4], [9], [7]], 10)
    slots.select([1, 3])  # the same rows, in other slots
    told, good = two(call, [same, {**options, "history": slots}])[1]
    assert told is None
    assert good is not None


@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ([[2, 1], [3]], [[4, 4], [7]]),
        ([[1, 2], []], [[4, 4], [3, 7]]),
        ([[1, 2, 4], [3]], [[4], [7]]),
    ],
    ids=["another order", "another prompt", "another output"],
)
def test_ranks_with_other_texts_all_raise(
    two: Ranks, prompt: list[list[int]], output: list[list[int]]
) -> None:
    """They have the same tokens, which is all that penalties look at, in another order."""
    params = SamplingParams(dry_multiplier=1, min_tokens=3, stop_token_ids=[1], seed=1)

    def options(prompt: list[list[int]], output: list[list[int]]) -> dict[str, Any]:
        history = TokenHistory.from_ids(prompt, output, 10, max_length=9)
        history.counts.zero_()
        return {"params": params, "positions": [2, 1], "history": history}

    same = options([[1, 2], [3]], [[4, 4], [7]])
    for told, _ in two(call, [same, options(prompt, output)]):
        assert told.type == "ValueError"
        message = "the tokens in history (by checksum) must be the same on every rank"
        assert message in told.message


def test_ranks_with_other_masks_all_raise(two: Ranks) -> None:
    masks = [torch.tensor([[1023], [1023]], dtype=torch.int32) for _ in range(2)]
    masks[1][1] = 1022
    for told, _ in two(call, [{"allowed_mask": mask} for mask in masks]):
        assert told.type == "ValueError"
        assert "allowed_mask (by checksum) must be the same on every rank" in told.message


def test_ranks_at_other_positions_all_raise(two: Ranks) -> None:
    for told, _ in two(call, [{"positions": [0, 1]}, {"positions": [0, 2]}]):
        assert "params and positions (by checksum) must be the same on every rank" in told.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dtype": torch.float64},
            "logits must be float32, float16 or bfloat16, got torch.float64",
        ),
        ({"logits": [[1.0]]}, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(5)}, "logits must have shape (rows, vocab_size), got (5,)"),
        ({"vocab_start": None}, "vocab_start must be an integer >= 0, got None"),
        ({"vocab_start": -1}, "vocab_start must be an integer >= 0, got -1"),
        ({"vocab_start": True}, "vocab_start must be an integer >= 0, got True"),
        ({"vocab_start": 5.0}, "vocab_start must be an integer >= 0, got 5.0"),
        ({"params": [CHAIN_ALONE]}, "params must have one entry per row of logits (2), got 1"),
        ({"params": PENALTY}, "history must be given where repetition_penalty"),
        ({"params": PENALTY, "history": [[1]]}, "history must be a TokenHistory, got list"),
        (
            {"params": replace(PENALTY, penalty_last_n=3), "history": history_of(10)},
            "history must have windows where penalty_last_n is on",
        ),
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"logprobs": "all"}, 'logprobs must be None, "processed", "raw", or both'),
        ({"positions": [1]}, "positions must be of shape (2,), got (1,)"),
        ({"backend": "gpu"}, "backend must be one of"),
        (
            {"logits": torch.zeros(2, 5).to_sparse()},
            "logits must be a dense tensor, got layout torch.sparse_coo",
        ),
        ({"params": SamplingParams(dry_multiplier=1)}, "history must be given where"),
        (
            {"params": SamplingParams(dry_multiplier=1, seed=1), "history": history_of(10)},
            "history must keep the ids in order where dry_multiplier, no_repeat_ngram_size or",
        ),
        ({"check": "yes"}, "check must be True, False or None, got 'yes'"),
        ({"allowed_mask": torch.zeros(2, 1)}, "allowed_mask must be an int32 tensor (a bitmask)"),
        ({"allowed_mask": torch.tensor(True)}, "allowed_mask must be an int32 tensor (a bitmask)"),
        ({"allowed_mask": [[1], None]}, "allowed_mask must be a tensor, got list: pack_mask makes"),
        (
            {"allowed_mask": torch.ones(3, 1, dtype=torch.int32)},
            "allowed_mask must have one row for each row of the logits (2), or one for all, got 3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_one_rank_refuses_the_others_learn(two: Ranks, changes: Any, message: str) -> None:
    """The other ranks raise at once, without waiting for the group's timeout."""
    (told, tokens), (refused, same_tokens) = two(call, [{}, changes])
    assert refused.type == "ValueError"
    assert message in refused.message
    assert (told.type, told.message) == (
        "RuntimeError",
        "sample_sharded refused the arguments of rank 1 of the group, where it raised the reason",
    )
    assert tokens == same_tokens == sample(torch.zeros(2, 10), CHAIN_ALONE).tokens.tolist()


def invalid(rank: int, value: float, params: SamplingParams) -> Any:
    logits = torch.zeros(3, 5)
    if rank == 1:
        logits[2, 4] = value
    sample_sharded(logits, params, vocab_start=5 * rank)


@pytest.mark.parametrize(
    "params", [CHAIN_ALONE, SamplingParams(top_k=3)], ids=["threshold", "candidates"]
)
def test_a_bad_row_in_one_slice_raises_everywhere(two: Ranks, params: SamplingParams) -> None:
    for value, message in (
        (float("nan"), "NaN in logits in row 2"),
        (float("inf"), "+inf in logits in row 2"),
    ):
        for told in two(invalid, value, params):
            assert (told.type, told.message) == ("InvalidLogitsError", message)


def dtensor_refusals(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    logits = torch.zeros(4, 10)
    sharded_right = distribute_tensor(logits, mesh, [Shard(1)])
    told = []
    for tensor, options in (
        (distribute_tensor(logits, mesh, [Shard(0)]), {}),
        (distribute_tensor(logits, mesh, [Replicate()]), {}),
        (sharded_right, {"vocab_start": 5 * rank}),
        (sharded_right, {"group": dist.group.WORLD}),
        (distribute_tensor(torch.zeros(4, 10, 2), mesh, [Shard(1)]), {}),
        (
            DTensor.from_local(
                torch.zeros(4, 6 - 2 * rank), mesh, [Shard(1)], shape=(4, 10), stride=(10, 1)
            ),
            {},
        ),
    ):
        try:
            sample_sharded(tensor, CHAIN_ALONE, **options)
        except ValueError as error:
            told.append(str(error))
    return told


def test_other_dtensors_are_refused(two: Ranks) -> None:
    for told in two(dtensor_refusals):
        assert isinstance(told, list), told
        for message, start in zip(
            told,
            (
                "a DTensor must be sharded in dimension 1",
                "a DTensor must be sharded in dimension 1",
                "group and vocab_start must be left out with a DTensor",
                "group and vocab_start must be left out with a DTensor",
                "logits must have shape (rows, vocab_size), got (4, 10, 2)",
                "a DTensor must be cut into slices of 5, and this rank has ",
            ),
            strict=True,
        ):
            assert message.startswith(start)


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed\.init_process_group first"):
        sample_sharded(torch.zeros(1, 4), CHAIN_ALONE, vocab_start=0)


def end_or_sample(rank: int, when: str) -> Any:
    """End the process of rank 1 before or during the call; return the other ranks' error."""
    if rank == 1:
        if when == "before":
            import os

            os._exit(1)
        import os

        distributed._Ranks.sum = lambda ranks, tensor: os._exit(1)
    start = time.monotonic()
    try:
        sample_sharded(torch.zeros(2, 5), CHAIN_ALONE, vocab_start=5 * rank)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return None


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_rank_that_dies_is_an_error_of_the_others(when: str) -> None:
    group = Ranks(3, timeout=10)
    try:
        first, second, third = group(end_or_sample, when)
    finally:
        group.close()
    assert isinstance(second, Ended)
    for rank, (message, seconds) in ((0, first), (2, third)):
        assert message.startswith(
            f"sample_sharded on rank {rank} of 3: a message failed, as it does where a rank has "
            "ended or does not come within the group's timeout: "
        )
        assert seconds < 20


def sleep_or_sample(rank: int) -> Any:
    if rank == 1:
        time.sleep(6)
    return end_or_sample(0, "never") if rank != 1 else None


def test_a_rank_that_does_not_come_is_an_error_of_the_others() -> None:
    group = Ranks(2, timeout=2)
    try:
        (message, seconds), _ = group(sleep_or_sample)
    finally:
        group.close()
    assert "does not come within the group's timeout: " in message
    assert 1 < seconds < 6


def other_shape_unchecked(rank: int) -> Any:
    try:
        sample_sharded(torch.zeros(2 + 3 * rank, 5), CHAIN_ALONE, vocab_start=5 * rank, check=False)
    except RuntimeError as error:
        return str(error)
    return None


def test_another_shape_unchecked_is_no_hang() -> None:
    """Without ``check`` no shapes are compared; gloo ends a process or raises, and never hangs."""
    group = Ranks(2, timeout=5)
    start = time.monotonic()
    try:
        answers = group(other_shape_unchecked)
    finally:
        group.close()
    assert time.monotonic() - start < 30
    for answer in answers:
        assert isinstance(answer, Ended) or "a message failed" in answer


def test_latencies_on_paper_are_those_of_the_formula() -> None:
    """docs/scale.md's estimated latencies follow from 20 us per message and 450 GB/s.

    They are those of 8 ranks that share 128,256 bfloat16 logits per row.
    """
    text = (ROOT / "docs/scale.md").read_text()
    counted = {re.sub("top_k=k", "top_k=50", call): how for call, how in traffic().items()}
    table = re.findall(
        r"^\| (`SamplingParams\(.*\)`|gathering the logits) \| ([\d.]+) µs \| ([\d.]+) µs "
        r"\| ([\d.]+) µs \|$",
        text,
        re.MULTILINE,
    )
    assert len(table) == 4
    for what, *times in table:
        if what.startswith("`"):
            messages, size = (eval(part, {"k": 50}) for part in counted[what.strip("`")])
            gathered = 16 if messages > 1 else size
            received = 7 * gathered + 2 * 7 / 8 * (size - gathered)
        else:
            messages, received = 1, 7 / 8 * 2 * 128256
        for rows, told in zip((1, 64, 256), times, strict=True):
            assert f"{messages * 20 + rows * received / 450e3:.1f}" == told, (what, rows)


# ----------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_checks_and_times_both(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "distributed.json"
    arguments = ["--ranks", "2", "--rows", "1", "3", "--calls", "4", "--json", str(out)]
    assert benchmark.main(arguments) == 0
    record = json.loads(out.read_text())
    assert record["command"] == "python -m benchmarks.sharded " + " ".join(arguments)
    assert record["environment"]["threads"] == 1
    lines = record["lines"]
    assert [(line["ranks"], line["rows"], line["case"]) for line in lines] == [
        (2, rows, case) for rows in (1, 3) for case in benchmark.CASES
    ]
    assert all(line["sharded_us"] > 0 < line["gather_us"] for line in lines)
    shown = capsys.readouterr().out
    assert shown.count("| 2 | ") == len(lines)
    assert benchmark.table(lines) in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks must be integers >= 1, got [0]"),
        (["--ranks", "2", "5"], "--ranks must divide 128256"),
        (["--rows", "0"], "--rows must be integers >= 1, got [0]"),
        (["--calls", "0"], "--calls must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_the_benchmark_says_what_it_cannot_take(
    arguments: list[str], message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_docs_show_what_the_benchmark_measured() -> None:
    """The table in docs/scale.md has the numbers of the committed results."""
    record = json.loads((ROOT / "benchmarks/results/sharded.json").read_text())
    text = (ROOT / "docs/scale.md").read_text()
    assert (
        record["command"] == "python -m benchmarks.sharded --json benchmarks/results/sharded.json"
    )
    assert record["command"] in text
    assert benchmark.table(record["lines"]) in text
