"""Hypothesis strategies for rows of logits and for parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from llm_sampling import SamplingParams, TokenHistory

SPECIAL = (
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan),
    *(2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, -3.4028234663852886e38),
    *(1 + 2.0**-23, 1 - 2.0**-24, 65504.0, 65520.0, 6e-8),
)
# The steps have the numbers of docs/semantics.md.
EXACT_HALF = 0.5 + 2.0**-20  # with this top_p, the share in step 12 is exactly one half
OCTAVES = float.fromhex("0x1.715476p+0")  # with this temperature, the factor in step 9 is 1


logits = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(-40, 40).map(lambda i: i / 8),
    st.floats(-30, 30, width=32),
    st.floats(width=32),
)


@st.composite
def values(draw: st.DrawFn, vocab_size: int) -> tuple[float, ...]:
    """Draw a row of logits of one of three kinds.

    A short row may have an independent value for each token. Any row may repeat at most six
    values, or have normally distributed values with a few others at random places.
    """
    if vocab_size <= 12 and draw(st.booleans()):
        return tuple(draw(st.lists(logits, min_size=vocab_size, max_size=vocab_size)))
    if draw(st.booleans()):
        palette = draw(st.lists(logits, min_size=1, max_size=6))
        rng = random.Random(draw(st.integers(0, 2**16)))
        return tuple(rng.choices(palette, k=vocab_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from((1e-38, 0.01, 1.0, 3.0, 10.0)))
    row = (torch.randn(vocab_size, generator=generator) * scale).tolist()
    for token in draw(st.lists(st.integers(0, vocab_size - 1), max_size=4)):
        row[token] = draw(logits)
    return tuple(row)


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    """Draw parameters in which each field is off, at a boundary, or anywhere in its range.

    Their history must have their windows, as :func:`history_of` makes it.
    """

    def maybe(*choices: st.SearchStrategy[float]) -> float | None:
        return draw(st.one_of(st.none(), *choices))

    bias = None
    if draw(st.integers(0, 3)) == 0:
        ids = st.integers(0, vocab_size + 2)
        values = st.one_of(st.floats(-100, 100, width=32), st.just(-math.inf))
        bias = draw(st.dictionaries(ids, values, max_size=6))
    return SamplingParams(
        temperature=maybe(
            st.sampled_from((0.0, OCTAVES, 0.7, 2.0**-149, 3e38)), st.floats(0.05, 5.0)
        ),
        top_k=maybe(st.sampled_from((1, 2, vocab_size)), st.integers(0, vocab_size + 2)),
        top_p=maybe(
            st.sampled_from((5e-324, 1e-6, EXACT_HALF, 0.5, 0.9, 1.0)),
            st.floats(0, 1, exclude_min=True),
        ),
        min_p=maybe(st.sampled_from((1e-9, 0.25, 0.5, 1.0)), st.floats(0, 1)),
        repetition_penalty=maybe(st.sampled_from((1.1, 2.0, 2.0**-149, 3e38)), st.floats(0.2, 5.0)),
        frequency_penalty=maybe(st.sampled_from((0.5, -0.5, 2.0, -2.0)), st.floats(-2, 2)),
        presence_penalty=maybe(st.sampled_from((0.5, -0.5, 2.0, -2.0)), st.floats(-2, 2)),
        min_tokens_to_keep=maybe(st.integers(1, 5), st.integers(1, vocab_size + 2)),
        logit_bias=bias,
        seed=draw(st.integers(0, 2**64 - 1)),
        repetition_penalty_scope=draw(st.sampled_from((None, "all", "output"))),
        penalty_last_n=maybe(st.integers(0, 8), st.just(2**31)),
    )


def history_of(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> TokenHistory:
    """Return the history of rows with the windows of their parameters."""
    longest = max(len(x) + len(y) for x, y in zip(prompts, outputs, strict=True))
    return TokenHistory.from_ids(
        prompts,
        outputs,
        vocab_size,
        max_length=max(1, longest),
        penalty_last_n=[row.penalty_last_n for row in params],
        device=device,
    )
