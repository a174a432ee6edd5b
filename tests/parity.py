"""The comparison of a backend with the reference, which many tests share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from cases import Batch, Case, build, threads
from torch import Tensor

from llm_sampling import BatchParams, SamplingParams, filter_logits, sample
from llm_sampling.results import Kind

LOGPROB_TOLERANCE = 1e-5
NUM_SAMPLES = 8
#: The largest number of logits in a batch; it bounds the memory that the reference takes.
MAX_ELEMENTS = 2**22


@dataclass
class Result:
    """The outputs of one backend for a batch, on the CPU."""

    tokens: Tensor
    first_token: Tensor
    status: Tensor
    filtered: Tensor
    logprobs: dict[Kind, Tensor]


def run(batch: Batch, backend: str, logprobs: Sequence[Kind]) -> Result:
    """Return all outputs that are compared.

    The reference gets one thread and a backend two: the many small torch operations of the
    reference would spend their time on waiting for a second thread where all cores are busy.
    """
    with threads(1 if backend == "torch" else 2):
        return _run(batch, backend, logprobs)


def _run(batch: Batch, backend: str, logprobs: Sequence[Kind]) -> Result:
    params = BatchParams.from_list(
        batch.params, positions=batch.positions, device=batch.logits.device
    )

    def draw(num_samples: int, kind: Kind | None) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens, logprobs, status, *_ = sample(
            batch.logits,
            params,
            history=batch.history,
            allowed_mask=batch.allowed_mask,
            num_samples=num_samples,
            logprobs=kind,
            backend=backend,
            check=False,
        )
        return tokens, logprobs, status

    drawn = {kind: draw(NUM_SAMPLES, kind) for kind in logprobs}
    tokens, _, status = next(iter(drawn.values())) if drawn else draw(NUM_SAMPLES, None)
    for other_tokens, _, other_status in drawn.values():
        assert torch.equal(other_tokens, tokens), "the kind of logprob changes the tokens"
        assert torch.equal(other_status, status), "the kind of logprob changes the status"
    # The reference's first of several draws is its single draw by definition, so that no second
    # pass over the row is needed.
    first = tokens[:, 0] if backend == "torch" else draw(1, None)[0]
    filtered = filter_logits(
        batch.logits,
        params,
        history=batch.history,
        allowed_mask=batch.allowed_mask,
        backend=backend,
    )
    return Result(
        tokens.cpu(),
        first.cpu(),
        status.cpu(),
        filtered.cpu(),
        {kind: output[1].cpu() for kind, output in drawn.items()},  # type: ignore[union-attr]
    )


def differing_rows(expected: Result, actual: Result) -> dict[str, Tensor]:
    """Return for each compared output a bool tensor ``(rows,)``: the rows in which it differs."""
    bits = (expected.filtered.view(torch.int32), actual.filtered.view(torch.int32))
    kept = (expected.filtered > -torch.inf, actual.filtered > -torch.inf)
    differing = {
        "tokens": (expected.tokens != actual.tokens).any(-1),
        "first token": expected.first_token != actual.first_token,
        "status": expected.status != actual.status,
        "kept set": (kept[0] != kept[1]).any(-1),
        "filtered logits": (bits[0] != bits[1]).any(-1),
    }
    for kind, wanted in expected.logprobs.items():
        got = actual.logprobs[kind]
        close = torch.isclose(wanted, got, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True)
        differing[f"{kind} logprobs"] = ~close.all(-1)
    return differing


def assert_same(
    batch: Batch, backend: str, expected: Result, actual: Result, note: str = ""
) -> None:
    """Fail the test with a description of the rows that differ, if any does."""
    for wanted, got in (
        (expected.tokens, actual.tokens),
        (expected.status, actual.status),
        (expected.filtered, actual.filtered),
    ):
        assert (wanted.shape, wanted.dtype) == (got.shape, got.dtype)
    differing = differing_rows(expected, actual)
    counts = {what: int(rows.sum()) for what, rows in differing.items() if rows.any()}
    if not counts:
        return
    lines = [
        f"{backend} differs from the reference at V={batch.vocab_size} {batch.dtype} {note}",
        f"rows that differ, of {len(batch.cases)}: {counts}",
    ]
    bad = torch.stack(list(differing.values())).any(0).nonzero().flatten().tolist()
    for row in bad[:5]:
        wrong = [what for what, rows in differing.items() if rows[row]]
        lines += [f"{batch.describe(row)}", f"  differs in: {', '.join(wrong)}"]
        for name, result in (("reference", expected), (backend, actual)):
            lines.append(
                f"  {name}: tokens={result.tokens[row].tolist()} first={result.first_token[row]} "
                f"status={result.status[row]} kept={int((result.filtered[row] > -torch.inf).sum())}"
                + "".join(f" {kind}={lp[row].tolist()}" for kind, lp in result.logprobs.items())
            )
    pytest.fail("\n".join(lines), pytrace=False)


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a float tensor as integers, so that NaN equals itself."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def build_all(
    groups: Sequence[Sequence[Case]], vocab_size: int, dtype: torch.dtype, device: str
) -> Iterator[Batch]:
    """Yield the batches of all groups, each with at most ``MAX_ELEMENTS`` logits."""
    rows = max(1, MAX_ELEMENTS // vocab_size)
    for group in groups:
        for start in range(0, len(group), rows):
            yield build(group[start : start + rows], vocab_size, dtype, device)


def assert_parity(
    batches: Iterable[Batch],
    backend: str,
    logprobs: Sequence[Kind] = ("processed",),
) -> None:
    """Compare the backend with the reference, and check that it does not modify its inputs."""
    for batch in batches:
        before = batch.logits.clone()
        state = None if batch.history is None else batch.history.clone()
        actual = run(batch, backend, logprobs)
        assert torch.equal(bits(batch.logits), bits(before)), "the logits were modified"
        if batch.history is not None and state is not None:
            for name in ("seen", "counts", "lengths", "slots"):
                same = torch.equal(getattr(batch.history, name), getattr(state, name))
                assert same, f"history.{name} was modified"
        assert_same(batch, backend, run(batch, "torch", logprobs), actual)


def assert_more_than_there_are(backend: str, device: str = "cpu") -> None:
    """Check top-k where k is at least the number of finite logits, followed by top-p.

    Such a k keeps all finite logits, and top-p takes its share of the mass of all of them.
    """
    logits = torch.randn(4, 5003, generator=torch.Generator().manual_seed(1))
    logits[:, ::2] = -torch.inf
    candidates = 5003 // 2
    params = [
        SamplingParams(top_k=candidates + more, top_p=0.9, seed=seed)
        for seed, more in enumerate((0, 1, 500, 2000))
    ]
    logits = logits.to(device)
    expected, actual = (filter_logits(logits, params, backend=b) for b in ("torch", backend))
    assert torch.equal(actual, expected)
    expected, actual = (
        sample(logits, params, num_samples=NUM_SAMPLES, backend=b, check=False).tokens
        for b in ("torch", backend)
    )
    assert torch.equal(actual, expected)
