"""Do all forms of an allowed_mask mean the same, and is a form that means nothing refused?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampling import Sampler, SamplingParams, filter_logits, pack_mask, sample

ROWS = 3
PARAMS = SamplingParams(seed=4)


def bits_of(mask: Tensor, vocab_size: int) -> list[list[bool]]:
    """Return a bitmask as lists of bools, by Python's integers."""
    rows = [[word & 0xFFFFFFFF for word in row] for row in mask.tolist()]
    return [[bool(row[t >> 5] >> (t & 31) & 1) for t in range(vocab_size)] for row in rows]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.sampled_from((1, 7, 31, 32, 33, 64, 70)))
def test_all_forms_are_the_same_bits(data: st.DataObject, vocab_size: int) -> None:
    row = st.lists(st.booleans(), min_size=vocab_size, max_size=vocab_size)
    allowed: list[list[bool]] = data.draw(st.lists(row, min_size=ROWS, max_size=ROWS))
    surplus = data.draw(st.integers(0, 70))
    ids = [[t for t, is_allowed in enumerate(bits) if is_allowed] for bits in allowed]
    wide = [bits + [data.draw(st.booleans())] * surplus for bits in allowed]
    beyond = [[*tokens, vocab_size + 3, vocab_size] for tokens in ids]
    packed = pack_mask(torch.tensor(allowed), vocab_size)
    assert packed.dtype == torch.int32
    assert packed.shape == (ROWS, -(-vocab_size // 32))
    assert bits_of(packed, vocab_size) == allowed
    free = [None if all(bits) else tokens for bits, tokens in zip(allowed, ids, strict=True)]
    forms: list[Any] = [
        np.array(allowed),
        np.asfortranarray(np.array(allowed)),
        torch.tensor(allowed).t().contiguous().t(),
        torch.tensor(wide),
        np.array(wide),
        packed,
        packed.numpy(),
        torch.cat([packed, torch.full((ROWS, 2), -1, dtype=torch.int32)], 1),
        ids,
        tuple(map(set, ids)),
        [np.array(tokens, dtype=np.int64).tolist()[::-1] for tokens in ids],
        beyond,
        free,
    ]
    logits = torch.zeros(ROWS, vocab_size)
    for form in forms:
        assert bits_of(pack_mask(form, vocab_size), vocab_size) == allowed
        kept = filter_logits(logits, PARAMS, allowed_mask=form, backend="torch") == 0
        assert kept.tolist() == allowed


def test_one_row_for_all(backend: str) -> None:
    logits = torch.randn(ROWS, 70, generator=torch.Generator().manual_seed(1))
    one = torch.rand(70, generator=torch.Generator().manual_seed(2)) < 0.3
    expected = sample(logits, PARAMS, allowed_mask=one.expand(ROWS, -1), backend=backend).tokens
    packed = pack_mask(one, 70)
    assert packed.shape == (1, 3)
    sampler = Sampler([PARAMS] * ROWS, vocab_size=70, backend=backend)
    for step, form in enumerate((one, one[None], one.numpy(), packed, packed[0], packed.numpy())):
        got = sample(logits, PARAMS, allowed_mask=form, backend=backend).tokens
        assert torch.equal(got, expected)
        at_step = sample(
            logits, PARAMS, allowed_mask=packed, positions=[step] * ROWS, backend=backend
        )
        assert torch.equal(sampler(logits, allowed_mask=form).tokens, at_step.tokens)


#: One mask of 3 rows and 70 tokens in each form.
FORMS = {
    "ids": [[1, 5, 5, 31, 32, 69, 90], None, {64}],
    "bool": torch.rand(ROWS, 70, generator=torch.Generator().manual_seed(3)) < 0.3,
}
FORMS["numpy"] = FORMS["bool"].numpy()
FORMS["bitmask"] = pack_mask(FORMS["bool"], 70)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_every_form_is_traced(form: str) -> None:
    logits = torch.randn(ROWS, 70, generator=torch.Generator().manual_seed(1))

    def draw(x: Tensor) -> Tensor:
        return sample(x, PARAMS, allowed_mask=FORMS[form]).tokens

    expected = draw(logits)
    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits), expected)
    traced = torch.jit.trace(draw, logits, check_trace=False)
    assert torch.equal(traced(logits), expected)


def test_a_list_needs_an_element_for_each_row(backend: str) -> None:
    message = "allowed_mask must have one element for each row of the logits (4), got 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample(torch.zeros(4, 70), PARAMS, allowed_mask=[[1]], backend=backend)


def test_a_free_row_and_one_that_allows_nothing(backend: str) -> None:
    logits = torch.zeros(3, 40)
    kept = filter_logits(logits, PARAMS, allowed_mask=[None, [], [39, 0]], backend=backend) == 0
    assert kept.sum(-1).tolist() == [40, 0, 2]
    status = sample(logits, PARAMS, allowed_mask=[None, [], [39]], check=False, backend=backend)
    assert status.status.tolist() == [0, 2, 0]
    assert status.tokens.tolist()[1:] == [-1, 39]


def test_a_ban_is_a_ban(backend: str) -> None:
    """A finite bias leaves a token some probability: at a high temperature most of it."""
    logits = torch.zeros(1, 1000)
    hot = SamplingParams(temperature=20, seed=1, logit_bias=dict.fromkeys(range(1, 1000), -100.0))
    draws = sample(logits, hot, num_samples=1000, backend=backend).tokens
    assert (draws != 0).float().mean() > 0.8
    banned = SamplingParams(
        temperature=20, seed=1, logit_bias=dict.fromkeys(range(1, 1000), -torch.inf)
    )
    assert not sample(logits, banned, num_samples=1000, backend=backend).tokens.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_a_ban_hides_what_the_logit_is(backend: str, value: float) -> None:
    """As the mask does: a NaN under it is not reported, and a +inf takes no mass."""
    logits = torch.zeros(1, 70)
    logits[0, 5] = value
    banned = SamplingParams(seed=1, logit_bias={5: -torch.inf, 6: 1.0})
    output = sample(logits, banned, num_samples=50, check=True, backend=backend)
    assert output.status.tolist() == [0]
    assert not (output.tokens == 5).any()
    masked = sample(
        logits,
        SamplingParams(seed=1, logit_bias={6: 1.0}),
        allowed_mask=[[t for t in range(70) if t != 5]],
        num_samples=50,
        backend=backend,
    )
    assert torch.equal(output.tokens, masked.tokens)


REFUSED: list[tuple[object, str]] = [
    (torch.ones(2, 40), "got torch.float32 of shape (2, 40)"),
    (torch.ones(2, 40, dtype=torch.uint8), "got torch.uint8 of shape (2, 40)"),
    (torch.tensor([[1, 2]]), "got torch.int64 of shape (1, 2)"),
    (np.array([[1, 2]]), "got an array of int64"),
    ({1, 2}, "got set"),
    (iter([[1]]), "got list_iterator"),
    ("abc", "got str"),
    (None, "got NoneType"),
    ([1, 2], "allowed[0] must be a collection of token ids, got 1"),
    ([[1], "ab"], "allowed[1] must be a collection of token ids, got 'ab'"),
    ([[-1]], "allowed[0] must be token ids >= 0, or None, got -1"),
    ([[1.0]], "allowed[0] must be integers, got 1.0"),
    (
        torch.ones(2, 39, dtype=torch.bool),
        "allowed must have at least vocab_size = 40 columns, got 39",
    ),
    (torch.ones(2, 1, dtype=torch.int32), "ceil(vocab_size / 32) = 2 columns, got 1"),
    (
        torch.ones(2, 40, dtype=torch.int32),
        "allowed must be bool where it has a column for each token",
    ),
]


@pytest.mark.parametrize(("allowed", "message"), REFUSED, ids=[m[-40:] for _, m in REFUSED])
def test_what_is_no_mask(allowed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_mask(allowed, 40)


@pytest.mark.parametrize("vocab_size", [0, -1, 2**20 + 1, 1.5, None, True])
def test_no_vocabulary(vocab_size: Any) -> None:
    with pytest.raises(ValueError, match=r"^vocab_size must be"):
        pack_mask([[1]], vocab_size)
