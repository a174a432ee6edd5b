"""Random rows with rules that look at the history."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample

MAX_LENGTH = 80
ROWS = 12


def alphabet(vocab_size: int) -> list[int]:
    """The few ids that the histories have, so that sequences come again."""
    few = min(5, vocab_size)
    return [i * vocab_size // few for i in range(few)]


def rules(rng: random.Random, vocab_size: int) -> dict[str, Any]:
    """Return parameters of the rules, each of which is off in some rows."""

    def ids(least: int, most: int) -> list[int]:
        return rng.choices(alphabet(vocab_size), k=rng.randint(least, most))

    chosen: dict[str, Any] = {}
    if rng.random() < 0.6:
        chosen |= {
            "dry_multiplier": rng.choice((0.5, 2.0, 100.0)),
            "dry_base": rng.choice((1.0, 1.75, 3.0)),
            "dry_allowed_length": rng.choice((1, 2, 5)),
            "dry_penalty_last_n": rng.choice((-1, 0, 7, 1000)),
            "dry_breakers": [ids(1, 3) for _ in range(rng.randint(0, 2))],
        }
    if rng.random() < 0.5:
        chosen["no_repeat_ngram_size"] = rng.choice((1, 2, 4))
        chosen["no_repeat_ngram_window"] = rng.choice((0, 9))
    if rng.random() < 0.4:
        chosen["bad_words"] = [ids(1, 2), ids(2, 3), [vocab_size + 3]]
    if rng.random() < 0.4:
        chosen["min_tokens"] = rng.choice((1, 1000))
        chosen["stop_token_ids"] = [*ids(1, 3), rng.randrange(vocab_size)]
    return chosen


def others(rng: random.Random, vocab_size: int) -> dict[str, Any]:
    """Return the other parameters of a row."""
    chosen: dict[str, Any] = {"seed": rng.randrange(2**64)}
    if rng.random() < 0.5:
        chosen |= {
            "repetition_penalty": rng.choice((1.0, 1.2, 0.8)),
            "frequency_penalty": rng.choice((0.0, 0.3)),
            "presence_penalty": rng.choice((0.0, 0.5, -0.5)),
            "penalty_last_n": rng.choice((-1, 2)),  # 2: the rules list ids that are not in it
        }
    chosen |= rng.choice(({}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0}))
    if rng.random() < 0.3:
        chosen["logit_bias"] = {rng.randrange(vocab_size): rng.choice((3.0, -math.inf))}
    return chosen


def rules_in_turn(vocab_size: int) -> list[dict[str, Any]]:
    """Rules that act on short histories, for the rows of the parity table; the last are none."""
    ids = [0, vocab_size // 2, vocab_size - 1]
    return [
        {"dry_multiplier": 1.5, "dry_allowed_length": 1},
        {"no_repeat_ngram_size": 1},
        {"min_tokens": 5, "stop_token_ids": ids, "bad_words": [[id_, 1] for id_ in ids]},
        {"dry_multiplier": 0.5, "dry_allowed_length": 1, "no_repeat_ngram_size": 2},
        {},
    ]


class Rows:
    """Random rows of one vocabulary, whose histories repeat themselves."""

    def __init__(self, seed: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu") -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        few = alphabet(vocab_size)
        self.vocab_size = vocab_size
        self.params = [
            SamplingParams(**rules(rng, vocab_size), **others(rng, vocab_size)) for _ in range(ROWS)
        ]
        self.prompts = [rng.choices(few, k=rng.randint(0, 20)) for _ in range(ROWS)]
        self.outputs = [rng.choices(few, k=rng.randint(0, 40)) for _ in range(ROWS)]
        logits = torch.randn(ROWS, vocab_size, generator=generator) * 2
        logits[:, few] += 4  # what is listed matters
        logits[rng.randrange(ROWS), few] = rng.choice((math.nan, math.inf, -math.inf))
        self.logits = logits.to(device, dtype)
        self.mask = (torch.rand(ROWS, vocab_size, generator=generator) < 0.7).to(device)
        self.extra = [rng.choices([-1, *few], k=rng.randint(0, 4)) for _ in range(ROWS)]

    def history(self) -> TokenHistory:
        return TokenHistory.from_ids(
            self.prompts,
            self.outputs,
            self.vocab_size,
            max_length=MAX_LENGTH,
            device=self.logits.device,
            penalty_last_n=[row.penalty_last_n for row in self.params],
        )


def assert_same(one: Any, other: Any) -> None:
    """Assert that two outputs have the same tokens, status, ranks and kept sets."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.status, other.status)
    for kind in ("processed", "raw"):
        assert torch.equal(getattr(one, kind).ranks, getattr(other, kind).ranks)
        assert torch.equal(getattr(one, kind).top_ids, getattr(other, kind).top_ids)
    assert torch.equal(one.kept.mask, other.kept.mask)
    assert torch.equal(one.kept.total, other.kept.total)


def results(rows: Rows, backend: str, logits: Tensor, **given: Any) -> Any:
    """Everything that a call of these rows returns."""
    return sample(
        logits,
        rows.params,
        history=rows.history(),
        num_samples=3,
        logprobs=("processed", "raw"),
        top_logprobs=5,
        kept="mask",
        check=False,
        backend=backend,
        **given,
    )


#: What else a call of the rows is given.
GIVEN = ((), ("mask",), ("extra",), ("mask", "extra"))


def assert_as_the_reference(rows: Rows, backend: str, given: Sequence[str]) -> None:
    """Assert that a backend's results are those of the reference."""
    options: dict[str, Any] = {"allowed_mask": rows.mask} if "mask" in given else {}
    if "extra" in given:
        options["extra_output_ids"] = rows.extra
    assert_same(*(results(rows, name, rows.logits, **options) for name in (backend, "torch")))
    filtered = [
        filter_logits(rows.logits, rows.params, history=rows.history(), backend=name, **options)
        for name in (backend, "torch")
    ]
    assert torch.equal(*filtered)
