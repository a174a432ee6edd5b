"""Tests of a mask callback in the loops: what it is told, and forced tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampling import InvalidLogitsError, MaskRow, MaskStep, Sampler, SamplingParams
from llm_sampling.generation import generate, stream

V = 97
END = 3
PARAMS = [SamplingParams(seed=1, top_p=0.95), SamplingParams(seed=2, frequency_penalty=0.8)]


def words(ids: list[int]) -> Tensor:
    """Return logits that depend on all ids of a row and on nothing else."""
    seed = hash(tuple(ids)) % 2**31
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


class Model:
    """A callable model that keeps the widths of what it is given."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(self, input_ids: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        self.widths.append(input_ids.shape[1])
        cache = input_ids if cache is None else torch.cat([cache, input_ids], dim=1)
        return torch.stack([words(row) for row in cache.tolist()]), cache


class Callback:
    """Forces tokens where a row's output has some lengths; keeps what it is told."""

    def __init__(self, forced: dict[tuple[int, int], list[int]] | None = None) -> None:
        self.forced = {} if forced is None else forced
        self.rows: list[tuple[MaskRow, ...]] = []
        self.outputs: dict[int, list[int]] = {}
        self.ended: list[int] = []

    def __call__(self, step: MaskStep) -> None:
        self.rows.append(step.rows)
        self.ended += step.ended
        for place, row in enumerate(step.rows):
            output = self.outputs.setdefault(row.id, [])
            assert len(output) >= row.start
            output[row.start :] = row.tokens
            step.forced[place].extend(self.forced.get((row.id, len(output)), []))


def texts(callback: Any, model: Any = None, **options: Any) -> Any:
    options = {"vocab_size": V, "max_new_tokens": 12, "eos_token_ids": [END]} | options
    model = Model() if model is None else model
    return generate(model, [[10, 11], [12, 13]], PARAMS, allowed_mask=callback, **options)


def test_it_is_told_all_tokens(backend: str) -> None:
    callback = Callback()
    done = texts(callback, n=2, backend=backend)
    assert done == texts(None, n=2, backend=backend)
    for row, one in enumerate(done):
        assert callback.outputs[row] == one.token_ids[:-1]  # the last step has none after it
    assert [row.prompt for row in callback.rows[0]] == [0, 0, 1, 1]
    assert all(row.ends == (END,) for row in callback.rows[0])


def test_it_is_told_the_output_that_a_text_goes_on_from() -> None:
    callback = Callback()
    done = texts(callback, output_ids=[[20, 21], [22, 23]])
    assert [row.tokens for row in callback.rows[0]] == [(20, 21), (22, 23)]
    assert callback.outputs[0] == [20, 21, *done[0].token_ids[:-1]]
    assert callback.outputs[1] == [22, 23, *done[1].token_ids[:-1]]
    assert [row.start for row in callback.rows[1]] == [2, 2]


@pytest.mark.parametrize("check", [False, True])
def test_rows_that_fail_are_not_asked_for(check: bool) -> None:
    def model(input_ids: Tensor, step: int | None) -> tuple[Tensor, int]:
        step = 0 if step is None else step
        logits = torch.stack([words([step]), words([step, 1])])
        if step == 2:
            logits[0] = torch.nan
        return logits, step + 1

    callback = Callback()
    if check:
        with pytest.raises(InvalidLogitsError, match="row 0"):
            texts(callback, model, check=True)
        return
    done = texts(callback, model, eos_token_ids=[])
    assert done[0].finish_reason == "error"
    assert [len(rows) for rows in callback.rows[:5]] == [2, 2, 2, 1, 1]
    assert callback.ended == [0]
    assert len(done[1].token_ids) == 12


# ---- forced tokens -------------------------------------------------------------------------------

#: Row 0 has forced tokens at the beginning and later, row 1 at the beginning alone.
FORCED = {(0, 0): [30, 31, 32, 33], (1, 0): [40, 41, 42], (0, 7): [34, 35]}


def test_forced_tokens_are_what_the_model_gets(backend: str) -> None:
    """All rows jump together; their texts are those without jumps, as the "raw" logprobs need."""
    model, whole = Model(), Model()
    done = texts(Callback(FORCED), model, eos_token_ids=[], backend=backend)
    slow = texts(Callback(FORCED), whole, eos_token_ids=[], backend=backend, logprobs="raw")
    assert [one.token_ids for one in done] == [one.token_ids for one in slow]
    assert done[0].token_ids[:4] == [30, 31, 32, 33]
    assert done[0].token_ids[7:9] == [34, 35]
    assert done[1].token_ids[:3] == [40, 41, 42]
    assert model.widths == [2, 3, *[1] * 8]  # row 1 has two more after the first one
    assert whole.widths == [2, *[1] * 11]


def test_forced_tokens_have_lists(backend: str) -> None:
    """A token that alone may be drawn has the rank 1, with or without a draw."""
    options: dict[str, Any] = {"eos_token_ids": [], "backend": backend, "logprobs": "processed"}
    model = Model()
    done = texts(Callback(FORCED), model, **options, top_logprobs=[2, 0])
    assert model.widths[:2] == [2, 3]
    assert done[0].ranks is not None
    assert done[0].ranks[:4] == [1] * 4
    assert done[0].top_logprobs is not None
    assert done[0].top_logprobs[:4] == [{30: 0.0}, {31: 0.0}, {32: 0.0}, {33: 0.0}]
    assert done[1].top_logprobs == [{}] * 12
    masked = texts(Callback({(0, 0): [30], (1, 0): [40]}), **options, top_logprobs=2)
    assert masked[0].top_logprobs is not None
    assert masked[0].top_logprobs[0] == {30: 0.0}


def test_the_others_draw_what_they_draw_without(backend: str) -> None:
    forced = {(0, 0): [30, 31, 32, 33], (0, 6): [34]}
    done = texts(Callback(forced), eos_token_ids=[], backend=backend)
    free = texts(None, eos_token_ids=[], backend=backend)
    assert done[0].token_ids[:4] == [30, 31, 32, 33]
    assert done[0].token_ids[6] == 34
    assert done[1] == free[1]


def test_a_row_that_ends_in_a_jump_ends_alone() -> None:
    callback = Callback({(0, 0): [30, END, 31, 32], (1, 0): [40, 41, 42, 43]})
    model = Model()
    done = texts(callback, model)
    assert done[0].token_ids == [30, END]
    assert done[1].token_ids[:4] == [40, 41, 42, 43]
    assert model.widths[:3] == [2, 4, 1]
    assert callback.ended == [0]
    assert [row.id for row in callback.rows[1]] == [1]


def test_no_jump_goes_past_the_largest_number_of_tokens() -> None:
    model = Model()
    done = texts(Callback({(0, 0): [30] * 9, (1, 0): [40] * 9}), model, max_new_tokens=[3, 5])
    assert [one.token_ids for one in done] == [[30] * 3, [40] * 5]
    assert [one.finish_reason for one in done] == ["length"] * 2
    assert model.widths == [2]  # nothing is drawn after the forced tokens


def test_an_end_token_is_not_forced_too_early() -> None:
    """Until there are min_new_tokens, a row that must end has no token."""
    model = Model()
    forced = {(0, 0): [30, 31, END], (1, 0): [40, 41, 42]}
    done = texts(Callback(forced), model, min_new_tokens=4)
    assert done[0].finish_reason == "error"
    assert done[0].token_ids == [30, 31]
    assert done[1].token_ids[:3] == [40, 41, 42]
    assert model.widths[:4] == [2, 1, 1, 1]


def test_jumps_of_a_model_with_padded_prompts(tiny_llama: Any) -> None:
    """The attention mask and the position ids are as long as what the model gets."""
    model = tiny_llama(V)
    greedy = [replace(one, temperature=0) for one in PARAMS]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_ids": []}
    prompts = [[10, 11, 12, 13, 14], [15, 16]]
    forced = {(0, 2): [30, 31, 32], (1, 2): [40, 41, 42, 43]}
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    done = generate(model, prompts, greedy, allowed_mask=Callback(forced), **options)
    assert lengths == [5, 1, 1, 3, 1, 1, 1, 1]
    hook.remove()
    for prompt, params, one, own in zip(prompts, greedy, done, (0, 1), strict=True):
        alone = {(0, 2): forced[own, 2]}
        (expected,) = generate(
            model, [prompt], params, allowed_mask=Callback(alone), logprobs="raw", **options
        )
        assert one.token_ids == expected.token_ids


def test_stream_jumps_too(tiny_llama: Any) -> None:
    model = tiny_llama(V)
    sampler = Sampler(PARAMS[:1], vocab_size=V)
    callback = Callback({(0, 1): [30, 31, 32]})
    steps = stream(
        model, torch.tensor([[10, 11]]), sampler, max_new_tokens=8, allowed_mask=callback
    )
    tokens = [step.tokens[0] for step in steps]
    assert tokens[1:4] == [30, 31, 32]
    assert len(tokens) == 8
    assert callback.outputs[0] == tokens[:-1]
    assert sampler.positions.tolist() == [8]


def test_a_history_that_grows_in_fused_generate(tiny_llama: Any) -> None:
    """It moves to another Sampler, whose callback goes on as if nothing had happened."""
    from llm_sampling.integrations.huggingface import fused_generate

    model = tiny_llama(V, max_position_embeddings=400, eos_token_id=None)
    params = [replace(one, penalty_last_n=20, frequency_penalty=0.5) for one in PARAMS]
    callback = Callback({(0, 250): [30 + place for place in range(20)]})
    sequences = model.generate(
        torch.tensor([[10, 11], [12, 13]]),
        attention_mask=torch.ones(2, 2, dtype=torch.int64),
        custom_generate=fused_generate,
        params=params,
        allowed_mask=callback,
        max_new_tokens=300,
    )
    outputs = sequences[:, 2:].tolist()
    assert [callback.outputs[row] for row in (0, 1)] == [output[:-1] for output in outputs]
    assert outputs[0][250:270] == list(range(30, 50))
    assert sum(row.is_new for rows in callback.rows for row in rows) == 2
