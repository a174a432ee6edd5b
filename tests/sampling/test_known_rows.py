"""The known rows of the self-test: are their answers the reference's, and do they show faults?"""

import itertools
import json

import make_known_rows as maker
import pytest
import torch

from llm_sampling.backends import BACKENDS, known_rows
from llm_sampling.backends.known_rows import KINDS, TOKENS, KnownRows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
ALL = list(range(known_rows.count()))
TORCH = BACKENDS["torch"].load()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("vocab_size", [TOKENS, 97, 1000, 32000])
def test_the_answers_are_those_of_the_reference(vocab_size, kind):
    dtype = DTYPES[(vocab_size + KINDS.index(kind)) % 3]
    known = KnownRows(kind, vocab_size, dtype, CPU)
    assert known.difference(TORCH.sample(known.call(ALL)), ALL) is None
    assert known.filtered_difference(TORCH.filter_logits(known.call(ALL)), ALL) is None


def test_the_file_is_what_its_maker_writes():
    path = maker.PATH
    assert path.read_text("utf-8") == maker.text_of(maker.make())


def test_what_matters_is_spread_over_the_vocabulary():
    for vocab_size in (TOKENS, 97, 1000, 128256, 2**20):
        ids = known_rows.places(vocab_size).tolist()
        assert ids == sorted(set(ids))
        assert ids[-1] < vocab_size
        parts = {token * 32 // vocab_size for token in ids}
        assert parts == set(range(32)), "every part of a row has some"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_the_same_logits(dtype):
    row = known_rows.row_of_logits(5000, dtype)
    assert torch.equal(row.float(), known_rows.row_of_logits(5000, torch.float32))


def test_a_kept_set_of_another_length_shows():
    """Of the rows with a filter, most have another token then, whatever their kind."""
    for kind, more in itertools.product(KINDS, (-1, 1)):
        shown = asked = 0
        for row in ALL:
            made = maker.Row(KnownRows(kind, TOKENS, torch.float32, CPU).call([row]))
            length = made.length + more
            if maker.has_filter(made.call) and not made.call.batch.all_greedy and length > 0:
                seed = made.call.batch.seed
                asked += 1
                shown += bool(made.tokens(length, seed) != made.tokens(made.length, seed))
        assert shown >= 0.6 * asked >= 9, kind


def test_fused_multiply_adds_show():
    data = json.loads(maker.PATH.read_text("utf-8"))
    by_top_p = [row for row in ALL if 13 <= row <= 20]
    assert all("top_p" in data["rows"][row] for row in by_top_p)
    for row in by_top_p:
        params = data["rows"][row]
        assert maker.fused_length(row, params) != maker.make_row(row, maker.PLAIN, params).length


def test_a_wrong_answer_is_named():
    known = KnownRows(KINDS[0], 1000, torch.float32, CPU)
    output = TORCH.sample(known.call(ALL))
    right = output.tokens[5].item()
    output.tokens[5] = 17
    assert known.difference(output, ALL) == (
        f"it gave token 17 for known row 5 (plain, vocab_size 1000), expected {right}"
    )
    output.tokens[5] = right
    output.status[23] = 2
    assert known.difference(output, ALL) == (
        "it gave status 2 for known row 23 (plain, vocab_size 1000), expected 0"
    )
    filtered = TORCH.filter_logits(known.call(ALL))
    filtered[9] = 0.0
    assert known.filtered_difference(filtered, ALL) == (
        "it kept 1000 tokens of known row 9 (plain, vocab_size 1000), expected 7"
    )
