"""Requests as plain lists of ids: the model that stateful tests compare histories with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llm_sampling import SamplingParams, TokenHistory

#: These runs are the same every time; the slow tests generate others.
some_runs = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
other_runs = settings(some_runs, max_examples=10_000, derandomize=False)

#: Ids at the ends of mask words and of vocabularies; some are padding.
some_ids = st.sampled_from((-2, -1, 0, 1, 30, 31, 32, 33, 63, 64, 69, 70, 75))
ids = st.lists(some_ids, max_size=6)
vocab_sizes = st.sampled_from((70, 33, 32, 31, 1))

windows = st.sampled_from((-1, -1, 0, 1, 3, 8))
#: No text, one that is often full, one that seldom is.
lengths = st.sampled_from((None, None, 13, 40))

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from((1.0, 0.7, 2.0, 0.0)),
    top_k=st.sampled_from((0, 5, 20, 1)),
    top_p=st.sampled_from((1.0, 0.8)),
    min_p=st.sampled_from((0.0, 0.2)),
    repetition_penalty=st.sampled_from((1.0, 1.0, 1.4)),
    frequency_penalty=st.sampled_from((0.0, 0.0, 0.6, -0.4)),
    presence_penalty=st.sampled_from((0.0, 0.0, 0.5)),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 75), st.sampled_from((-3.0, 4.0))),
    seed=st.none() | st.integers(0, 5) | st.sampled_from((2**63, 2**64 - 1)),
    repetition_penalty_scope=st.sampled_from(("all", "all", "output")),
    penalty_last_n=windows,
)


def as_int64(value: int) -> int:
    """Return a counter as the int64 that holds its low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


@dataclass
class Request:
    """The model of one row: its parameters and its whole past."""

    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    #: How many tokens came before ``output``; only their number is known.
    before: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    position: int = 0
    #: Whether the Sampler has a history that holds the row's whole past.
    is_kept: bool = True
    #: How many of the last ids the penalties are for; negative: all.
    window: int = -1


def inside(tokens: list[int], vocab_size: int) -> list[int]:
    """Return the tokens that are not padding."""
    return [i for i in tokens if 0 <= i < vocab_size]


def room_of(request: Request, vocab_size: int, max_length: int | None) -> int:
    """Return for how many ids there is room in a row's text."""
    held = len(inside(request.prompt, vocab_size)) + len(inside(request.output, vocab_size))
    return 10**6 if max_length is None else max_length - held


def roll_back(request: Request, number: int, vocab_size: int) -> None:
    """Take the last ids of an output away."""
    output = inside(request.output, vocab_size)
    request.output = output[: len(output) - number]


def assert_history(history: TokenHistory, requests: list[Request]) -> None:
    """Assert that every row's bits, counts, length and text are those of its ids."""
    v = history.vocab_size
    assert history.rows == len(requests)
    slots = history.slots.tolist()
    assert len(set(slots)) == len(slots)
    for slot, request in zip(slots, requests, strict=True):
        prompt, output = inside(request.prompt, v), inside(request.output, v)
        places = [*enumerate([*prompt, *output])]
        if request.window >= 0:
            places = places[max(0, len(places) - request.window) :]
        seen = {token for _, token in places}
        words = [sum(1 << (i & 31) for i in seen if i >> 5 == word) for word in range(-(-v // 32))]
        assert [word & 0xFFFFFFFF for word in history.seen[slot].tolist()] == words
        counts = Counter(token for place, token in places if place >= len(prompt))
        assert history.counts[slot].tolist() == [counts[i] for i in range(v)]
        assert int(history.lengths[slot]) == as_int64(request.before + len(output))
        if history.text is not None:
            length = int(history.text.lengths[slot])
            assert history.text.ids[slot, :length].tolist() == [*prompt, *output]
            assert int(history.text.prompt_lengths[slot]) == len(prompt)
