"""Does every backend give the answers of an independent program where the order of ids matters?

tests/sampling/vectors_family.json holds them: rows with a window of the penalties, or with rules
that look at the history, which keeps its ids in order; four draws each. The logprob is that of the
first draw.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from vectors import load_family, logits_and_history

from llm_sampling import (
    RequestTable,
    Sampler,
    filter_logits,
    sample,
)

ROWS = load_family()
NAMES = [f"{i}-{row['kind']}-{row['shape']}-V{row['vocab_size']}" for i, row in enumerate(ROWS)]


def test_the_file_is_whole() -> None:
    kinds = Counter(row["kind"] for row in ROWS)
    each = ("penalty_window", "dry", "no_repeat_ngram", "bad_words", "min_tokens")
    assert kinds == {**dict.fromkeys(each, 20), "mixed": 1}
    windows = [row for row in ROWS if row["kind"] == "penalty_window"]
    assert {row["params"]["penalty_last_n"] for row in windows} == {0, 1, 5, 12}
    assert {row["status"] for row in ROWS} == {0, 2}
    assert any(len(row["prompt"]) > 12 and row["output"] for row in windows)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_case(backend: str, row: dict[str, Any]) -> None:
    logits, params, history = logits_and_history(row)
    output = sample(
        logits,
        params,
        history=history,
        positions=[row["position"]],
        num_samples=4,
        logprobs="processed",
        backend=backend,
        check=False,
    )
    assert output.tokens[0].tolist() == row["tokens"]
    assert output.status.tolist() == [row["status"]]
    assert output.logprobs is not None
    first = output.logprobs[0, 0].item()
    assert first == pytest.approx(
        float("nan") if row["logprob"] is None else row["logprob"], abs=1e-5, nan_ok=True
    )
    filtered = filter_logits(logits, params, history=history, backend=backend)[0]
    order = torch.sort(filtered, descending=True, stable=True).indices[: row["kept"]].tolist()
    assert int((filtered > -torch.inf).sum()) == row["kept"]
    assert (order[:8], order[-1:]) == (row["first_kept"], row["last_kept"])


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_the_same_after_other_ids_were_taken_away(backend: str, row: dict[str, Any]) -> None:
    """A Sampler that took back three tokens, and a table whose slot was filled, go on alike."""
    logits, params, history = logits_and_history(row, room=4)
    sampler = Sampler(params, vocab_size=row["vocab_size"], history=history, backend=backend)
    sampler.check = False
    sampler.extend(0, [0, 1, 0])
    sampler.rollback(0, 3)
    sampler.set_position(0, row["position"])
    assert sampler(logits).tokens.tolist() == row["tokens"][:1]

    ids = [*row["prompt"], *row["output"]]
    table = RequestTable(
        2, vocab_size=row["vocab_size"], history=True, max_length=len(ids), backend=backend
    )
    table.set(1, params)
    given = torch.tensor([ids], dtype=torch.int64)
    table.fill([1], given, [len(ids)], [len(row["prompt"])])
    drawn = sample(logits, table, [1], positions=[row["position"]], backend=backend, check=False)
    assert drawn.tokens.tolist() == row["tokens"][:1]
    assert drawn.status.tolist() == [row["status"]]
