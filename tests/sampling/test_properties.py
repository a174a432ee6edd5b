"""Does every backend equal the reference on generated rows?

Hypothesis makes small rows of few distinct floats, so that ties and boundaries are common, with
random parameters, histories, masks and biases. Tokens, status and kept set have no tolerance.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, OTHER_BACKENDS, device_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import history_of, logits, sampling_params, values

from llm_sampling import SamplingParams, filter_logits, sample

few_hundred = settings(
    max_examples=300,
    deadline=None,
    print_blob=True,
    # the fixtures choose the backend and poison memory; neither depends on the example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Row:
    """The inputs of one row of a call, as plain values because hypothesis prints them."""

    values: tuple[float, ...]
    params: SamplingParams
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    words: tuple[int, ...]
    position: int


@st.composite
def rows_of_one_call(draw: st.DrawFn) -> tuple[int, list[Row]]:
    """Draw a vocabulary size and one to four rows."""
    vocab_size = draw(
        st.integers(1, 12) | st.sampled_from((31, 32, 33, 511, 512, 513)) | st.integers(1, 600)
    )
    ids = st.lists(st.integers(-2, vocab_size + 1), max_size=12).map(tuple)
    words = -(-vocab_size // 32)
    no_mask = st.just((2**32 - 1,) * words)
    sparse = st.lists(st.integers(0, 2**32 - 1), min_size=words, max_size=words).map(tuple)
    row = st.builds(
        Row,
        values=values(vocab_size),
        params=sampling_params(vocab_size),
        prompt=ids,
        output=ids,
        words=st.one_of(no_mask, no_mask, sparse),
        position=st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    )
    return vocab_size, draw(st.lists(row, min_size=1, max_size=4))


def assert_same_draw(
    backend: str, dtype: torch.dtype, vocab_size: int, rows: list[Row], num_samples: int
) -> None:
    """Call the reference and a backend; assert that all results are equal."""
    device = device_of(backend)
    x = torch.tensor([row.values for row in rows], dtype=torch.float32).to(device, dtype)
    params = [row.params for row in rows]
    prompts, outputs = [row.prompt for row in rows], [row.output for row in rows]
    history = history_of(params, prompts, outputs, vocab_size, device)
    mask = None
    if any(word != 2**32 - 1 for row in rows for word in row.words):
        words = torch.tensor([row.words for row in rows], dtype=torch.int64, device=device)
        mask = words.to(torch.int32)

    drawn, filtered = {}, {}
    for name in ("torch", backend):
        drawn[name] = sample(
            x,
            params,
            history=history,
            allowed_mask=mask,
            positions=[row.position for row in rows],
            num_samples=num_samples,
            logprobs="processed",
            backend=name,
            check=False,
        )
        filtered[name] = filter_logits(x, params, history=history, allowed_mask=mask, backend=name)
    wanted, got = drawn["torch"], drawn[backend]
    shown = f"reference {wanted}\n{backend} {got}"
    assert torch.equal(wanted.tokens, got.tokens), shown
    assert torch.equal(wanted.status, got.status), shown
    kept = [filtered[name] > -math.inf for name in ("torch", backend)]
    assert torch.equal(*kept), f"kept: {[k.sum(-1).tolist() for k in kept]}"
    assert torch.equal(*(filtered[name].view(torch.int32) for name in ("torch", backend)))
    torch.testing.assert_close(got.logprobs, wanted.logprobs, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
@few_hundred
@given(call=rows_of_one_call(), dtype=st.sampled_from(DTYPES), num_samples=st.sampled_from((1, 3)))
@example(
    call=(3, [Row((0.0, 0.0, 0.0), SamplingParams(top_p=5e-324, seed=0), (), (), (7,), 0)]),
    dtype=torch.float32,
    num_samples=1,
)
def test_backends_equal_the_reference(
    backend: str, call: tuple[int, list[Row]], dtype: torch.dtype, num_samples: int
) -> None:
    vocab_size, rows = call
    assert_same_draw(backend, dtype, vocab_size, rows, num_samples)


@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
@few_hundred
@given(
    palette=st.lists(logits, min_size=1, max_size=3),
    vocab_size=st.integers(500, 2600),
    places=st.integers(0, 2**16),
    params=sampling_params(600),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_across_tiles(
    backend: str,
    palette: list[float],
    vocab_size: int,
    places: int,
    params: SamplingParams,
    dtype: torch.dtype,
) -> None:
    """Rows of a few thousand tokens with at most three values: every filter cuts among ties."""
    row = tuple(random.Random(places).choices(palette, k=vocab_size))
    words = (2**32 - 1,) * -(-vocab_size // 32)
    ids = tuple(range(0, vocab_size, 7))
    one = Row(row, params, ids[:40], ids[20:60], words, places)
    assert_same_draw(backend, dtype, vocab_size, [one], num_samples=2)
