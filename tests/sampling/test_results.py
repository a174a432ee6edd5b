"""What a call returns besides tokens: logprobs with lists and ranks, and the kept set.

Ids, ranks, masks, counts and masses of every backend equal the reference's; logprobs have a
tolerance of 1e-5.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import vectors
from cases import (
    DTYPES,
    LARGE_VOCABS,
    OTHER_BACKENDS,
    SMALL_VOCABS,
    covering_cases,
    device_of,
)
from parity import build_all
from results import REQUESTS, WITH_IDS, differences, drawn, ids_for, is_same, named_tensors
from torch import Tensor

from llm_sampling import (
    InvalidLogitsError,
    RequestTable,
    Sampler,
    SamplingParams,
    TokenHistory,
    filter_logits,
    pack_mask,
    sample,
    score,
    unpack_mask,
)
from llm_sampling.results import SampleOutput

other_backends = pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
all_vocabs = pytest.mark.parametrize("vocab_size", SMALL_VOCABS + LARGE_VOCABS, ids="V{}".format)


@other_backends
@dtypes
@all_vocabs
@pytest.mark.parametrize("request_name", REQUESTS)
def test_covering_cases(
    backend: str, dtype: torch.dtype, vocab_size: int, request_name: str
) -> None:
    """Every row, mix, history and mask of the parity table, with every form of every result."""
    options = REQUESTS[request_name]
    number = [*REQUESTS].index(request_name)
    turn = DTYPES.index(dtype)
    groups = covering_cases(vocab_size, vocab_size + turn + number)
    if vocab_size > 10_000:
        groups = [group[turn + number :: 3 * len(REQUESTS)] for group in groups]
    for batch in build_all([g for g in groups if g], vocab_size, dtype, device_of(backend)):
        if request_name in WITH_IDS:
            options = {**options, "logprob_token_ids": ids_for(batch)}
        num_samples = 3 if number % 2 else 1
        expected, actual = (
            drawn(batch, name, num_samples=num_samples, **options) for name in ("torch", backend)
        )
        found = differences(expected, actual)
        rows = sorted({row for rows in found.values() for row in rows})
        assert not found, (found, [batch.describe(row) for row in rows[:3]])


# ---- answers that are known ----------------------------------------------------------------------

FAMILY = vectors.load_family()
ROW = torch.tensor([[1.0, 2.5, -0.5, 2.5, 0.0, -3.0]])


def check_kept_set(
    logits: Tensor, params: SamplingParams, expected: dict[str, Any], **options: Any
) -> None:
    """Compare the three forms of the kept set with a number of ids, the first and the last ones."""
    forms = {form: sample(logits, params, kept=form, **options) for form in ("mask", "ids", "ends")}
    for output in forms.values():
        assert output.kept.counts.tolist() == [expected["kept"]]
    ids = [token for token in forms["ids"].kept.ids[0].tolist() if token >= 0]
    bits = unpack_mask(forms["mask"].kept.mask, logits.shape[1])[0].nonzero().flatten().tolist()
    assert len(bits) == expected["kept"]
    if expected["kept"] <= forms["ids"].kept.ids.shape[1]:
        assert ids[:8] == expected["first_kept"]
        assert sorted(ids) == bits
    else:
        assert ids == []
    ends = forms["ends"].kept
    assert ends.first_id.tolist() == (expected["first_kept"][:1] or [-1])
    if "last_kept" in expected:
        assert ends.last_id.tolist() == (expected["last_kept"] or [-1])


@pytest.mark.parametrize("row", FAMILY, ids=str)
def test_kept_sets_where_the_order_of_ids_matters(backend: str, row: dict[str, Any]) -> None:
    """The answers of an independent program, in tests/sampling/vectors_family.json."""
    logits, params, history = vectors.logits_and_history(row)
    options = {"history": history, "positions": [row["position"]]}
    check_kept_set(logits, params, row, **options, backend=backend, check=False)


@pytest.mark.parametrize("vector", vectors.load()[::4], ids=lambda vector: vector.name)
def test_kept_sets_of_other_rows(backend: str, vector: vectors.Vector) -> None:
    """The same of tests/sampling/vectors.json, with the masses: they give the logprobs."""
    options = {"history": vector.history(), "positions": [vector.position]}
    options |= {"backend": backend, "check": False}
    check_kept_set(vector.logits, vector.params, vector._asdict(), **options)
    kept = sample(vector.logits, vector.params, kept="ends", num_samples=4, **options).kept
    for mass, logprob in zip(kept.masses[0].double(), vector.logprobs, strict=True):
        if logprob is None:
            assert (int(mass), int(kept.total)) == (0, 0)
        else:
            got = float(mass.log() - kept.total[0].double().log())
            assert got == pytest.approx(logprob, abs=1e-6)


def test_the_worked_rows_of_the_semantics(backend: str) -> None:
    params = SamplingParams(temperature=0.7, top_k=3, seed=0)
    output = sample(ROW, params, logprobs="raw", top_logprobs=4, kept="ids", backend=backend)
    assert output.tokens.tolist() == [3]
    assert output.raw.ranks.tolist() == [2]
    assert output.raw.top_ids.tolist() == [[1, 3, 0, 4]]
    assert output.kept.ids[0, :4].tolist() == [1, 3, 0, -1]
    assert output.kept.masses.tolist() == [2**42]
    greedy = sample(
        ROW, SamplingParams(temperature=0), logprobs="processed", kept="ends", backend=backend
    )
    assert greedy.tokens.tolist() == greedy.kept.first_id.tolist() == [1]
    assert greedy.kept.total.tolist() == greedy.kept.masses.tolist() == [2**42]
    assert greedy.processed.logprobs.tolist() == [0.0]


def test_a_row_without_a_token_has_nothing(backend: str) -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 3] = 1.0
    for options in REQUESTS.values():
        output = sample(logits, SamplingParams(seed=0), backend=backend, check=False, **options)
        for name, tensor in named_tensors(output):
            if name == "status":
                continue
            last = name.rpartition(".")[2]
            nothing = 0 if last in ("counts", "total", "masses", "mask") else -1
            wrong = ~tensor[0].isnan() if tensor.is_floating_point() else tensor[0] != nothing
            assert not wrong.any(), name


def test_a_kept_set_filters_as_filter_logits_does(backend: str) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(top_k=200, top_p=0.9, min_p=0.01, seed=1)
    kept = sample(logits, params, kept="mask", backend=backend).kept
    filtered = filter_logits(logits, params, backend=backend)
    assert torch.equal(unpack_mask(kept.mask, 1000), filtered > -torch.inf)
    again = sample(logits, SamplingParams(seed=1), allowed_mask=kept.mask, kept="mask")
    assert torch.equal(again.kept.mask, kept.mask)


# ---- what vLLM and SGLang test -------------------------------------------------------------------
# https://github.com/vllm-project/vllm/tree/main/tests/v1/sample, tests/v1/worker/gpu; and
# https://github.com/sgl-project/sglang/tree/main/test


def test_vllm_batched_count(backend: str) -> None:
    """tests/v1/sample/test_batched_count_greater_than.py: the ranks of 2 and 5 are 2."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scored = score(logits, [1, 1], SamplingParams(), logprobs="raw", backend=backend)
    assert scored.ranks.tolist() == [2, 2]


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("vocab_size", [1, 100, 8191, 8192, 8193, 16385, 50272])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["normal", "ties", "neginf"])
def test_vllm_ranks_kernel(
    backend: str, batch: int, vocab_size: int, dtype: torch.dtype, mode: str
) -> None:
    """tests/v1/sample/test_ranks_kernel.py, on rows of a wider buffer.

    vLLM's rank is the number of logits that are not smaller; without the ties that come after the
    token in the order, it is the rank here.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(batch, vocab_size + 37, generator=generator)
    logits = (wide.round() if mode == "ties" else wide).to(dtype)[:, :vocab_size]
    if mode == "neginf":
        is_out = torch.rand(batch, vocab_size, generator=generator) < 0.5
        is_out[:, 0] = False
        logits[is_out] = -torch.inf
    is_finite = logits.float().isfinite().float()
    tokens = torch.multinomial(is_finite, 1, generator=generator).squeeze(1)
    value = logits.gather(1, tokens[:, None])
    ties_after = (logits == value) & (torch.arange(vocab_size) > tokens[:, None])
    expected = (logits >= value).sum(1) - ties_after.sum(1)
    scored = score(logits, tokens, SamplingParams(), logprobs="raw", backend=backend)
    assert torch.equal(scored.ranks.long(), expected)


@pytest.mark.parametrize("num_logprobs", [0, 1, 3])
def test_vllm_top_logprobs(backend: str, num_logprobs: int) -> None:
    """tests/v1/sample/test_sampler_logprobs.py: as the log-softmax of all, then the best ones."""
    logits = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(32, (4,), generator=torch.Generator().manual_seed(1))
    scored = score(
        logits, tokens, SamplingParams(), logprobs="raw", top_logprobs=num_logprobs, backend=backend
    )
    best = logits.log_softmax(-1).topk(num_logprobs)
    assert torch.equal(scored.raw.top_ids.long(), best.indices)
    torch.testing.assert_close(scored.raw.top_logprobs, best.values, rtol=0, atol=1e-5)
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(scored.logprobs, expected, rtol=0, atol=1e-5)
    assert torch.equal(scored.ranks, (logits >= logits.gather(1, tokens[:, None])).sum(1).int())


def test_vllm_sampling_mask(backend: str) -> None:
    """tests/v1/worker/gpu: the mask is the set of finite logits, whatever its size."""
    vocab_size, sizes = 20_001, [0, 1, 7, 511, 512, 513, 2053, 20_001, 40, 3]
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((len(sizes), vocab_size), -torch.inf)
    for row, size in enumerate(sizes):
        kept = torch.randperm(vocab_size, generator=generator)[:size]
        logits[row, kept] = torch.randn(size, generator=generator)
    output = sample(logits, SamplingParams(seed=0), kept="mask", backend=backend, check=False)
    assert output.kept.counts.tolist() == sizes
    assert torch.equal(unpack_mask(output.kept.mask, vocab_size), logits > -torch.inf)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sglang_original_logprobs(backend: str, temperature: float) -> None:
    """The original logprobs of the best 50 and of the first 10 ids, and those at a temperature."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2)) * 4
    output = sample(
        logits,
        SamplingParams(temperature=temperature, seed=0),
        logprobs=("raw", "processed"),
        top_logprobs=50,
        logprob_token_ids=range(10),
        backend=backend,
    )
    for found, scale in ((output.raw, 1.0), (output.processed, temperature)):
        expected = (logits / scale).log_softmax(-1)
        best = expected.topk(50)
        assert torch.equal(found.top_ids.long(), best.indices)
        torch.testing.assert_close(found.top_logprobs, best.values, rtol=0, atol=1e-5)
        # Below 2^-20 the rounding of a mass to an integer is seen in its logarithm.
        shown = expected[:, :10].clamp(min=-14)
        torch.testing.assert_close(found.id_logprobs.clamp(min=-14), shown, rtol=0, atol=1e-5)


# ---- score ---------------------------------------------------------------------------------------


def test_score_says_what_the_draw_said(backend: str) -> None:
    """The logprobs, ranks and masses of the tokens that a call has drawn, with its history."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(3)) * 2
    history = TokenHistory.from_ids([[1, 2]] * 6, [[3, 3]] * 6, 500)
    params = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=4
    )
    shared: dict[str, Any] = {
        "history": history,
        "logprobs": ("processed", "raw"),
        "kept": "mask",
        "backend": backend,
    }
    output = sample(logits, params, top_logprobs=5, **shared)
    scored = score(logits, output.tokens, params, top_logprobs=5, **shared)
    assert not differences(output.processed, scored.processed)
    assert not differences(output.raw, scored.raw)
    assert not differences(output.kept, scored.kept)
    assert torch.equal(scored.ranks, output.processed.ranks)


def test_score_of_several_tokens_of_a_row(backend: str) -> None:
    scored = score(ROW, [[3, 5, 6, -1]], SamplingParams(top_k=3), kept="ends", backend=backend)
    assert scored.ranks.tolist() == [[2, -1, -1, -1]]
    assert scored.logprobs[0].tolist()[1] == -torch.inf
    assert scored.logprobs[0, 2:].isnan().all()
    assert scored.kept.masses.tolist() == [[2**42, 0, 0, 0]]


# ---- other ways to call --------------------------------------------------------------------------


def test_a_sampler_returns_them_in_every_step(backend: str) -> None:
    """Rows come and go; each step equals ``sample`` with the same positions."""
    steps = torch.randn(6, 3, 200, generator=torch.Generator().manual_seed(5))
    params = [SamplingParams(top_k=10 + row, seed=row) for row in range(3)]
    options: dict[str, Any] = {
        "logprobs": ("processed", "raw"),
        "top_logprobs": 3,
        "logprob_token_ids": [7, 500],
        "kept": "ids",
        "max_kept_ids": 12,
    }
    sampler = Sampler(params[:2], vocab_size=200, backend=backend, **options)

    def check(step: int, rows: list[int], positions: list[int]) -> None:
        logits = steps[step, : len(rows)]
        chosen = [params[row] for row in rows]
        expected = sample(logits, chosen, positions=positions, backend="torch", **options)
        assert not differences(expected, sampler(logits))

    check(0, [0, 1], [0, 0])
    check(1, [0, 1], [1, 1])
    sampler.add(params[2])
    check(2, [0, 1, 2], [2, 2, 0])
    sampler.remove([0])
    check(3, [1, 2], [3, 1])
    sampler = pickle.loads(pickle.dumps(copy.deepcopy(sampler)))
    check(4, [1, 2], [4, 2])
    sampler = Sampler.from_state_dict(sampler.state_dict(), backend=backend)
    check(5, [1, 2], [5, 3])


def test_a_table_returns_them(backend: str) -> None:
    """Rows share slots, and a row of padding has nothing; prepared steps have the same results."""
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(6))
    table = RequestTable(4, vocab_size=200, backend=backend)
    params = [SamplingParams(top_k=5, seed=slot) for slot in range(4)]
    for slot in range(4):
        table.set(slot, params[slot])
    slots = torch.tensor([2, 0, -1, 0, 3], dtype=torch.int32)
    options: dict[str, Any] = {"logprobs": "processed", "top_logprobs": 6, "kept": "mask"}
    for _ in range(3):
        output = sample(logits, table, slots, backend=backend, **options)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected = sample(logits[row : row + 1], params[slot], backend="torch", **options)
                found = dict(named_tensors(output))
                for name, tensor in named_tensors(expected):
                    assert is_same(name, tensor[0], found[name][row]).all(), name
        assert output.tokens[2] == -1
        assert output.kept.mask[2].eq(0).all()
        assert output.processed.top_ids[2].eq(-1).all()


def test_other_ids_of_the_same_list_object() -> None:
    """A table's prepared step is not used for a list that was changed meanwhile."""
    table = RequestTable(1, vocab_size=6)
    table.set(0, SamplingParams(seed=0))
    slots, ids = torch.tensor([0], dtype=torch.int32), [0, 1]
    for token in (0, 4):
        ids[0] = token
        output = sample(ROW, table, slots, logprobs="raw", logprob_token_ids=ids)
        assert output.raw.id_logprobs[0, 0] == pytest.approx(
            float(ROW.log_softmax(-1)[0, token]), abs=1e-5
        )


def test_a_compiled_call_returns_them() -> None:
    options: dict[str, Any] = {
        "logprobs": ("raw", "processed"),
        "top_logprobs": 2,
        "logprob_token_ids": [0, 9],
        "kept": "ends",
        "num_samples": 2,
    }
    params = SamplingParams(top_k=3, seed=0)

    def call(logits: Tensor) -> SampleOutput:
        return sample(logits, params, check=False, **options)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert not differences(call(ROW), compiled(ROW))


# ---- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"logprobs": "normalised"}, 'logprobs must be None, "processed", "raw"'),
    "no kind": ({"logprobs": ()}, "logprobs must be"),
    "a kind twice": ({"logprobs": ("raw", "raw")}, "logprobs must be"),
    "a number of logprobs": ({"logprobs": 5}, "logprobs must be"),
    "a list without a kind": ({"top_logprobs": 5}, "top_logprobs needs logprobs"),
    "ids without a kind": ({"logprob_token_ids": [1]}, "logprob_token_ids needs logprobs"),
    "a negative number": ({"logprobs": "raw", "top_logprobs": -1}, "top_logprobs must be"),
    "a long list": ({"logprobs": "raw", "top_logprobs": 1025}, "at most 1024"),
    "a bool": ({"logprobs": "raw", "top_logprobs": True}, "top_logprobs must be"),
    "a float": ({"logprobs": "raw", "top_logprobs": 2.0}, "top_logprobs must be"),
    "another form": ({"kept": "set"}, "kept must be"),
    "True": ({"kept": True}, "kept must be"),
    "ids of another form": ({"kept": "mask", "max_kept_ids": 5}, 'max_kept_ids needs kept="ids"'),
    "no ids": ({"kept": "ids", "max_kept_ids": 0}, "max_kept_ids must be"),
    "many ids": ({"kept": "ids", "max_kept_ids": 1025}, "at most 1024"),
    "ids as text": ({"logprobs": "raw", "logprob_token_ids": "12"}, "logprob_token_ids must be"),
    "ids that are floats": ({"logprobs": "raw", "logprob_token_ids": [1.5]}, "logprob_token_ids"),
    "a tensor of floats": (
        {"logprobs": "raw", "logprob_token_ids": torch.tensor([1.5])},
        "logprob_token_ids must be",
    ),
    "ids for other rows": (
        {"logprobs": "raw", "logprob_token_ids": [[1], [2]]},
        "for each of the 1 rows",
    ),
    "three dimensions": (
        {"logprobs": "raw", "logprob_token_ids": torch.zeros(1, 1, 1).int()},
        "for each of the 1 rows",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        sample(ROW, SamplingParams(seed=0), **options)
    if "logprob_token_ids" not in options:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            Sampler([SamplingParams(seed=0)], vocab_size=6, **options)


def test_what_score_refuses() -> None:
    params = SamplingParams()
    for tokens in ([1, 2], [[1], [2]], 1, "1", [1.5], torch.tensor([[[1]]]), [None]):
        with pytest.raises(ValueError, match="tokens"):
            score(ROW, tokens, params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logprobs must be"):
        score(ROW, [1], params, logprobs=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidLogitsError, match="NaN"):
        score(ROW * torch.nan, [1], params)


def test_what_unpack_mask_refuses() -> None:
    with pytest.raises(ValueError, match="mask must be int32"):
        unpack_mask(torch.zeros(1, 2), 40)
    with pytest.raises(ValueError, match="words >= 2"):
        unpack_mask(torch.zeros(1, 1, dtype=torch.int32), 40)
    with pytest.raises(ValueError, match="mask must be int32"):
        unpack_mask(torch.zeros(2, dtype=torch.int32), 40)
    allowed = torch.rand(3, 45) < 0.5
    assert torch.equal(unpack_mask(pack_mask(allowed, 45), 45), allowed)
