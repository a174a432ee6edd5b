"""Does each entry point refuse invalid arguments with the exact message, and change nothing?

Each table has rows of a call and its message, which names the argument, the rule and the value.
Parameters are tested in test_params.py, the arguments of sample and filter_logits in test_edges.py,
those of a Sampler in test_sampler.py, of the command in test_cli.py, and of the processors in
test_huggingface.py. This file tests all other arguments, and what all refusals have in common.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import OTHER_BACKENDS

from llm_sampling import BatchParams, Sampler, SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.backends import BACKENDS
from llm_sampling.generation import generate_stream, stream
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.history import Text

V = 40
PLAIN = SamplingParams(seed=1)
NAMES = ", ".join(map(repr, ("auto", *BACKENDS)))


def named(cases: list[tuple[Any, str]]) -> Any:
    """Parametrize a test by (call, message), with the message as the test's id."""
    return pytest.mark.parametrize(
        ("call", "message"), cases, ids=[re.sub(r"[^\w.]+", "-", m)[:70] for _, m in cases]
    )


def refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# ---- Histories -----------------------------------------------------------------------------------


def parts(**changed: Any) -> dict[str, Any]:
    """Return the arguments of a TokenHistory of two rows, with changes."""
    good = {
        "seen": torch.zeros(2, 2, dtype=torch.int32),
        "counts": torch.zeros(2, V, dtype=torch.int32),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "slots": torch.tensor([1, 0], dtype=torch.int32),
        "vocab_size": V,
    }
    return good | changed


HISTORIES = [
    ({"vocab_size": 0}, "vocab_size must be in 1 .. 2^20, got 0"),
    ({"vocab_size": 40.0}, "vocab_size must be an integer, got 40.0"),
    ({"seen": [[0, 0]] * 2}, "seen must be a torch.Tensor, got list"),
    ({"seen": torch.zeros(2, 2)}, "seen must be torch.int32, got torch.float32"),
    (
        {"seen": torch.zeros(2, 1, dtype=torch.int32)},
        "seen must have shape (capacity, ceil(vocab_size / 32)) = (any, 2), got (2, 1)",
    ),
    (
        {"seen": torch.zeros(2, dtype=torch.int32)},
        "seen must have shape (capacity, ceil(vocab_size / 32)) = (any, 2), got (2,)",
    ),
    ({"counts": torch.zeros(2, V).long()}, "counts must be torch.int32, got torch.int64"),
    (
        {"counts": torch.zeros(3, V, dtype=torch.int32)},
        "counts must have shape (capacity, vocab_size) = (2, 40), got (3, 40)",
    ),
    (
        {"counts": torch.zeros(1, V, dtype=torch.int32).expand(2, V)},
        "counts must be contiguous, or have contiguous rows, got strides (0, 1)",
    ),
    (
        {"counts": torch.zeros(V, 2, dtype=torch.int32).T},
        "counts must be contiguous, or have contiguous rows, got strides (1, 2)",
    ),
    (
        {"counts": torch.zeros(3 * V, dtype=torch.int32).as_strided((2, V), (V - 1, 1))},
        f"counts must be contiguous, or have contiguous rows, got strides ({V - 1}, 1)",
    ),
    (
        {"seen": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]},
        "seen must be contiguous, or have contiguous rows, got strides (4, 2)",
    ),
    (
        {"seen": torch.zeros(2, 4, dtype=torch.uint32)[:, ::2]},
        "seen must be contiguous, or have contiguous rows, got strides (4, 2)",
    ),
    ({"seen": torch.zeros(2, 2, dtype=torch.uint64)}, "seen must be torch.int32, got torch.uint64"),
    ({"counts": torch.zeros(2, V).short()}, "counts must be torch.int32, got torch.int16"),
    (
        {"seen": torch.tensor(0, dtype=torch.int32), "lengths": None},
        "seen must have shape (capacity, ceil(vocab_size / 32)) = (any, 2), got ()",
    ),
    ({"seen": None, "lengths": None}, "seen must be a torch.Tensor, got NoneType"),
    ({"counts": None}, "counts must be a torch.Tensor, got NoneType"),
    (
        {"counts": torch.zeros(2, V, dtype=torch.int32, device="meta"), "lengths": None},
        "counts must be on cpu, as seen is, got meta",
    ),
    (
        {"lengths": torch.zeros(2, dtype=torch.int32)},
        "lengths must be torch.int64, got torch.int32",
    ),
    (
        {"lengths": torch.zeros(4, dtype=torch.int64)[::2]},
        "lengths must be contiguous, or have contiguous rows, got strides (2,)",
    ),
    (
        {"lengths": torch.zeros(1, dtype=torch.int64)},
        "lengths must have shape (capacity,) = (2,), got (1,)",
    ),
    (
        {"lengths": torch.zeros(2, dtype=torch.int64, device="meta")},
        "lengths must be on cpu, as seen is, got meta",
    ),
    (
        {"slots": torch.zeros(1, 1, dtype=torch.int32)},
        "slots must have shape (rows,), got (1, 1)",
    ),
    ({"slots": torch.tensor([0])}, "slots must be torch.int32, got torch.int64"),
    ({"slots": torch.tensor([0, 2]).int()}, "slots must be in 0 .. 1, got [0, 2]"),
    ({"slots": torch.tensor([-1, 0]).int()}, "slots must be in 0 .. 1, got [-1, 0]"),
    ({"slots": torch.tensor([1, 1]).int()}, "slots must name each slot at most once, got [1, 1]"),
]


def text_of(**changed: Any) -> Text:
    """Return the text of a history of two rows, with changes."""
    good = {
        "ids": torch.zeros(2, 6, dtype=torch.int32),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "prompt_lengths": torch.zeros(2, dtype=torch.int64),
        "windows": torch.full((2,), -1, dtype=torch.int32),
    }
    return Text(**good | changed)


TEXTS: list[tuple[Any, str]] = [
    (torch.zeros(2, 6, dtype=torch.int32), "text must be a Text or None, got tensor("),
    (tuple(text_of()), "text must be a Text or None, got (tensor("),
    (text_of(ids=[[0]]), "text.ids must be a torch.Tensor, got list"),
    (
        text_of(ids=torch.zeros(2, 6, dtype=torch.int64)),
        "text.ids must be torch.int32, got torch.int64",
    ),
    (
        text_of(ids=torch.zeros(2, 6, dtype=torch.uint32)),
        "text.ids must be torch.int32, got torch.uint32",
    ),
    (
        text_of(ids=torch.zeros(3, 6, dtype=torch.int32)),
        "text.ids must have shape (capacity, max_length) = (2, any), got (3, 6)",
    ),
    (
        text_of(ids=torch.zeros(2, dtype=torch.int32)),
        "text.ids must have shape (capacity, max_length) = (2, any), got (2,)",
    ),
    (
        text_of(ids=torch.zeros(2, 0, dtype=torch.int32)),
        "text.ids must be contiguous and not empty, got (2, 0)",
    ),
    (
        text_of(ids=torch.zeros(2, 9, dtype=torch.int32)[:, :6]),
        "text.ids must be contiguous and not empty, got (2, 6)",
    ),
    (
        text_of(lengths=torch.zeros(2, dtype=torch.int32)),
        "text.lengths must be torch.int64, got torch.int32",
    ),
    (
        text_of(lengths=torch.zeros(1, dtype=torch.int64)),
        "text.lengths must have shape (capacity,) = (2,), got (1,)",
    ),
    (text_of(lengths=None), "text.lengths must be a torch.Tensor, got NoneType"),
    (
        text_of(prompt_lengths=torch.zeros(2, dtype=torch.int64, device="meta")),
        "text.prompt_lengths must be on cpu, as seen is, got meta",
    ),
    (
        text_of(prompt_lengths=torch.zeros(4, dtype=torch.int64)[::2]),
        "text.prompt_lengths must be contiguous, or have contiguous rows, got strides (2,)",
    ),
    (
        text_of(windows=torch.zeros(2, dtype=torch.int64)),
        "text.windows must be torch.int32, got torch.int64",
    ),
    (
        text_of(windows=torch.zeros(2, 1, dtype=torch.int32)),
        "text.windows must have shape (capacity,) = (2,), got (2, 1)",
    ),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=[m[:60] for _, m in TEXTS])
def test_a_text_made_by_hand(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TokenHistory(**parts(text=text))


@pytest.mark.parametrize(("changed", "message"), HISTORIES, ids=[m[:50] for _, m in HISTORIES])
def test_a_history_made_by_hand(changed: dict[str, Any], message: str) -> None:
    refuses(lambda: TokenHistory(**parts(**changed)), message)


def test_a_good_history_made_by_hand(backend: str) -> None:
    history = TokenHistory(**parts())
    params = SamplingParams(presence_penalty=1, seed=3)
    wanted = TokenHistory.from_ids([[], []], None, V)
    drawn = [
        sample(torch.zeros(2, V), params, history=h, backend=backend).tokens.tolist()
        for h in (history, wanted)
    ]
    assert drawn[0] == drawn[1]


# ---- Packed parameters ---------------------------------------------------------------------------

PACKED = BatchParams.from_list([SamplingParams(logit_bias={3: 1.0}, seed=1)] * 2)

BATCHES = [
    ({"temperature": torch.ones(1)}, "top_k must have shape (1,), got (2,)"),
    ({"top_k": torch.zeros(3, dtype=torch.int32)}, "top_k must have shape (2,), got (3,)"),
    ({"top_k": torch.zeros(2)}, "top_k must be torch.int32, got torch.float32"),
    ({"top_p": torch.ones(2).double()}, "top_p must be torch.float32, got torch.float64"),
    ({"top_p": [1.0, 1.0]}, "top_p must be a torch.Tensor, got list"),
    ({"min_p_cut": torch.zeros(1).expand(2)}, "min_p_cut must be contiguous, got strides (0,)"),
    (
        {"top_p": torch._efficientzerotensor((2,))},
        "top_p must be a plain torch.Tensor, got Tensor",
    ),
    (
        {"temperature": torch.ones(2, requires_grad=True)},
        "temperature must be a plain torch.Tensor, got Tensor",
    ),
    (
        {"top_p": torch.ones(2).to_sparse()},
        "top_p must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed must be torch.int64, got torch.int32"),
    (
        {"seed": torch.zeros(2, dtype=torch.int64, device="meta")},
        "seed must be on cpu, as temperature is, got meta",
    ),
    ({"position": torch.zeros(2)}, "position must be torch.int64, got torch.float32"),
    ({"unseeded": torch.zeros(3, dtype=torch.bool)}, "unseeded must have shape (2,), got (3,)"),
    (
        {"logit_bias_offsets": torch.zeros(2, dtype=torch.int64)},
        "logit_bias_offsets must have shape (3,), got (2,)",
    ),
    (
        {"logit_bias_values": torch.zeros(1)},
        "logit_bias_values must have shape (2,), got (1,)",
    ),
]


BATCHES += [
    (
        {"temperature": torch.tensor([1.0, torch.nan])},
        "temperature[1] must be finite and >= 0 in float32, got nan",
    ),
    ({"top_k": torch.tensor([-2, 0]).int()}, "top_k[0] must be an integer >= -1, got -2"),
    ({"top_p": torch.tensor([1.0, 1.5])}, "top_p[1] must be in (0, 1], got 1.5"),
    (
        {"min_p_cut": torch.tensor([-0.5, 0])},
        "min_p_cut[0] must be 2^-18 - log2(min_p), or inf where min-p is off, got -0.5",
    ),
    (
        {"min_p_cut": torch.tensor([torch.inf, torch.nan])},
        "min_p_cut[1] must be 2^-18 - log2(min_p), or inf where min-p is off, got nan",
    ),
    *[
        (
            {"logit_bias_values": torch.tensor([1.0, value])},
            f"logit_bias_values[1] must be in [-100, 100], or -inf to ban the token, got {value}",
        )
        for value in (math.nan, math.inf, -1000.0, 100.5)
    ],
    *[
        (
            {
                "logit_bias_offsets": torch.tensor([0, 2, 2]),
                "logit_bias_ids": torch.tensor(ids, dtype=torch.int32),
            },
            f"logit_bias_ids must be strictly ascending within each row, got {ids}",
        )
        for ids in ([3, 3], [4, 3])
    ],
    (
        {"repetition_penalty": torch.tensor([1.0, 0.0])},
        "repetition_penalty[1] must be finite and > 0 in float32, got 0.0",
    ),
    (
        {"frequency_penalty": torch.tensor([torch.inf, 0])},
        "frequency_penalty[0] must be in [-2, 2], got inf",
    ),
    (
        {"presence_penalty": torch.tensor([0, -2.5])},
        "presence_penalty[1] must be in [-2, 2], got -2.5",
    ),
    (
        {"min_tokens_to_keep": torch.tensor([1, 0]).int()},
        "min_tokens_to_keep[1] must be an integer >= 1, got 0",
    ),
    (
        {"min_p_cut": torch.tensor([torch.inf, 0.5])},
        "any_filter must be True where a row has a filter, got False",
    ),
    (
        {"presence_penalty": torch.ones(2)},
        "needs_history must be True where a row has a penalty or a rule, got False",
    ),
    ({"all_greedy": True}, "all_greedy must be False where a row has a temperature, got True"),
    (
        {"top_k": torch.tensor([0, 5]).int()},
        "any_filter must be True where a row has a filter, got False",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BATCHES, ids=[m[:50] for _, m in BATCHES])
def test_a_batch_made_by_hand(changed: dict[str, Any], message: str) -> None:
    """A changed batch is refused when it is used, because kernels do not check it."""
    batch = replace(PACKED, **changed)
    refuses(lambda: sample(torch.zeros(2, V), batch), message)
    refuses(lambda: filter_logits(torch.zeros(2, V), batch), message)


@pytest.mark.parametrize("entries", [-1, 3, 2**40])
def test_bias_entries_that_there_are_not(entries: int) -> None:
    """Offsets that do not match the entries are refused: kernels would read outside the array."""
    offsets = torch.tensor([0, 1, entries])
    batch = replace(PACKED, logit_bias_offsets=offsets)
    message = f"logit_bias_offsets must be ascending from 0 to 2, got {offsets.tolist()}"
    refuses(lambda: sample(torch.zeros(2, V), batch), message)


# ---- Generation ----------------------------------------------------------------------------------


def model(input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return torch.zeros(input_ids.shape[0], V)


def generating(**changed: Any) -> Any:
    """Return a call of generate_stream with valid arguments and the given changes."""
    options = {"model": model, "prompts": [[1, 2]], "params": PLAIN, "vocab_size": V} | changed
    return lambda: generate_stream(**options)


IDS = "prompts must be texts, or sequences of integer token ids"
GENERATED = [
    (generating(model=None), "model must be a callable, got NoneType"),
    (generating(prompts=None), f"{IDS}, got None"),
    (generating(prompts=5), f"{IDS}, got 5"),
    (generating(prompts=[1, 2]), f"{IDS}, got [1, 2]"),
    (generating(prompts=[[1.5]]), f"{IDS}, got [[1.5]]"),
    (generating(prompts=[[True]]), f"{IDS}, got [[True]]"),
    (generating(prompts=[["a"]]), f"{IDS}, got [['a']]"),
    (generating(prompts=["a", [1]]), f"{IDS}, got ['a', [1]]"),
    (generating(prompts=[]), "prompts must have at least one prompt, got none"),
    (generating(prompts=[[]]), "prompts must have at least one token each, prompt 0 has none"),
    (generating(prompts=[[1], []]), "prompts must have at least one token each, prompt 1 has none"),
    (generating(prompts=[[1, V]]), f"prompts must hold ids in 0 .. {V - 1}, got {V}"),
    (generating(prompts=[[-1]]), f"prompts must hold ids in 0 .. {V - 1}, got -1"),
    (generating(prompts=torch.zeros(3).long()), "prompts must have shape (rows, length), got (3,)"),
    (generating(prompts=torch.zeros(1, 2)), "prompts must hold integers, got torch.float32"),
    (generating(prompts={"ids": [[1]]}), "prompts must have input_ids, got a mapping of ['ids']"),
    (
        generating(prompts={"input_ids": [[1, 2]], "attention_mask": [[1]]}),
        "attention_mask must have the shape of input_ids (1, 2), got (1, 1)",
    ),
    (
        generating(prompts={"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}),
        "attention_mask must pad on the left, and it masks something else",
    ),
    (generating(prompts="a"), "tokenizer must be given for prompts that are texts"),
    (
        generating(prompts=[[1], [1, 2]]),
        "prompts must be of one length for a callable, got [1, 2]",
    ),
    (
        generating(params=None),
        "params must be a SamplingParams or a sequence of them, got None",
    ),
    (
        generating(params=["x"]),
        "params must be a SamplingParams or a sequence of them, got ['x']",
    ),
    (generating(params=[PLAIN] * 2), "params must have one for each of 1 prompts, got 2"),
    (generating(vocab_size=None), "vocab_size must be given where the model has no config"),
    (generating(vocab_size=0), "vocab_size must be in 1 .. 2^20, got 0"),
    (generating(vocab_size="x"), "vocab_size must be an integer, got 'x'"),
    (generating(n=0), "n must be an integer >= 1, got 0"),
    (generating(n=1.0), "n must be an integer >= 1, got 1.0"),
    (generating(max_new_tokens=0), "max_new_tokens must be an integer >= 1, got 0"),
    (generating(min_new_tokens=-1), "min_new_tokens must be an integer >= 0, got -1"),
    (
        generating(min_new_tokens=9, max_new_tokens=8),
        "min_new_tokens must be at most 8, which is max_new_tokens, got 9",
    ),
    (generating(stop=5), "stop must be a string or a collection of strings, got 5"),
    (generating(stop=[1]), "stop must be a string or a collection of strings, got [1]"),
    (generating(stop=[""]), "stop must have no empty string, got ['']"),
    (generating(stop="."), "tokenizer must be given for stop"),
    (generating(stop_limit=0), "stop_limit must be an integer >= 1, got 0"),
    (
        generating(include_stop_str_in_output=1),
        "include_stop_str_in_output must be True or False, got 1",
    ),
    (generating(ignore_eos="yes"), "ignore_eos must be True or False, got 'yes'"),
    (generating(stop_token_ids=5), "stop_token_ids must be a collection of token ids, got 5"),
    (generating(stop_token_ids=[0.5]), "stop_token_ids must be integers, got 0.5"),
    (generating(stop_token_ids=[True]), "stop_token_ids must be integers, got True"),
    (generating(stop_token_ids=[V]), f"end tokens must be in 0 .. {V - 1}, got {V}"),
    (generating(eos_token_ids=5), "eos_token_ids must be a collection of token ids, got 5"),
    (generating(eos_token_ids=["</s>"]), "eos_token_ids must be integers, got '</s>'"),
    (generating(eos_token_ids=[-1]), f"end tokens must be in 0 .. {V - 1}, got -1"),
    (generating(logprobs="all"), 'logprobs must be None, "processed" or "raw", got \'all\''),
    (generating(backend="x"), f"backend must be one of {NAMES}, got 'x'"),
]


@named(GENERATED)
def test_generation(call: Any, message: str) -> None:
    """The call itself refuses, before the first token is requested."""
    refuses(call, message)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            torch.zeros(1, V - 1),
            f"logits must have shape (rows, vocab_size) = (1, {V}), got (1, 39)",
        ),
        (torch.zeros(2, V), f"logits must have shape (rows, vocab_size) = (1, {V}), got (2, {V})"),
        (
            torch.zeros(1, V).double(),
            "logits must be float32, float16 or bfloat16, got torch.float64",
        ),
        (
            None,
            "model must return logits of shape (rows, vocab_size) or (rows, length, vocab_size), "
            "or a tuple of them and a cache, got None",
        ),
    ],
    ids=["narrow", "rows", "dtype", "None"],
)
def test_what_a_model_returns(made: Any, message: str) -> None:
    steps = generating(model=lambda input_ids, cache: made)()
    refuses(lambda: next(steps), message)


def streaming(**changed: Any) -> Any:
    options = {
        "model": torch.nn.Identity(),
        "input_ids": torch.tensor([[1, 2]]),
        "sampler": Sampler(PLAIN, vocab_size=V),
        "max_new_tokens": 1,
    } | changed
    return lambda: stream(**options)


STREAMED = [
    (streaming(input_ids=[[1]]), "input_ids must be a torch.Tensor, got list"),
    (
        streaming(input_ids=torch.tensor([1])),
        "input_ids must have shape (rows, length) with length >= 1, got (1,)",
    ),
    (streaming(input_ids=torch.ones(1, 2)), "input_ids must hold integers, got torch.float32"),
    (streaming(sampler=PLAIN), "sampler must be a Sampler, got SamplingParams"),
    (streaming(max_new_tokens=0), "max_new_tokens must be an integer >= 1, got 0"),
    (streaming(eos_token_ids=2), "eos_token_ids must be a collection of token ids, got 2"),
    (streaming(eos_token_ids=["2"]), "eos_token_ids must be integers, got '2'"),
]


@named(STREAMED)
def test_stream(call: Any, message: str) -> None:
    refuses(call, message)


@named(
    [
        (lambda: StopStrings(b"a"), "stop must be a string or a collection of strings, got b'a'"),
        (
            lambda: StopStrings(["a", None]),
            "stop must be a string or a collection of strings, got ['a', None]",
        ),
        (lambda: StopStrings(""), "stop must have no empty string, got ''"),
        (lambda: StopStrings("a", stop_limit=0), "stop_limit must be an integer >= 1, got 0"),
        (lambda: StopStrings("a", stop_limit=True), "stop_limit must be an integer >= 1, got True"),
        (lambda: StopStrings("a", include=1), "include must be True or False, got 1"),
    ]
)
def test_stop_strings(call: Any, message: str) -> None:
    refuses(call, message)


# ---- What every refusal has in common ------------------------------------------------------------


def refusals(logits: torch.Tensor, backend: str) -> list[tuple[type, str]]:
    """Return the type and message of a backend's error for each of several invalid calls."""
    sampler = Sampler([PLAIN] * 3, vocab_size=V, backend=backend)
    said = []
    for call in (
        lambda: sample(logits, PLAIN, backend=backend),
        lambda: sampler(logits),
        lambda: sampler(logits[:2]),
        lambda: sampler.remove([3]),
        lambda: sample(logits, SamplingParams(presence_penalty=1), backend=backend),
        lambda: filter_logits(logits.double(), PLAIN, backend=backend),
        lambda: sample(logits, PLAIN, allowed_mask=torch.zeros(3, 2), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"must|logits") as raised:
            call()
        said.append((raised.type, str(raised.value)))
    return said


@pytest.mark.parametrize("backend", OTHER_BACKENDS, indirect=True)
def test_every_backend_uses_the_same_words(backend: str) -> None:
    """Bad logits, missing rows and missing histories give the same message on every backend."""
    logits = torch.zeros(3, V)
    logits[1] = -torch.inf
    logits[2, 5] = torch.nan
    assert refusals(logits, "torch") == refusals(logits, backend)


def test_a_refusal_leaves_what_was_given(backend: str) -> None:
    """A refused call leaves logits, mask, history, packed parameters and positions unchanged."""
    params = [SamplingParams(repetition_penalty=1.5, seed=1)] * 2
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = torch.nan
    history = TokenHistory.from_ids([[1], [2]], [[3], [3, 4]], V)
    batch = BatchParams.from_list(params, positions=[4, 5])
    mask = torch.full((2, 2), -1, dtype=torch.int32)
    given = [logits, mask, history.seen, history.counts, history.lengths, history.slots]
    given += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in given]
    sampler = Sampler(params, vocab_size=V, history=history, backend=backend)
    for call in (
        lambda: sampler(logits, allowed_mask=mask),
        lambda: sample(logits, batch, history=history, allowed_mask=mask, backend=backend),
        lambda: sample(logits[:1], batch, history=history, backend=backend),
        lambda: sample(logits, batch, history=history, allowed_mask=mask[:1], backend=backend),
        lambda: sampler.reorder([1, 1]),
        lambda: sampler.add(params[0], prompt_ids=[[1]]),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match=r"logits|params|mask|rows|prompt_ids"):
            call()
        for tensor, copy in zip(given, before, strict=True):
            assert torch.equal(tensor.view(-1).nan_to_num(7), copy.view(-1).nan_to_num(7))
    assert sampler.positions.tolist() == [1, 2]
