"""Is the reference right?

First it is compared with literals: known answers, worked rows, and the test cases of other samplers
(Hugging Face's logits processors, abbreviated HF, llama.cpp, mlx-lm, Aphrodite). Where this
package's rules differ on purpose, its own rule is asserted and a comment says so. Then every
backend is compared on small random rows with an oracle in Python integers, which is written from
docs/semantics.md and not from the reference. Marks such as T5 number the borrowed test cases.
"""

import math
import random
import struct
from itertools import combinations
from typing import NamedTuple

import pytest
import torch

from llm_sampling import BatchParams, SamplingParams, TokenHistory, filter_logits, sample
from llm_sampling.calls import make_call
from llm_sampling.reference import depth, kept_set, mass, philox, processed_logits, scaled

INF = math.inf
LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127
LOGITS = [1.0, 2.5, -0.5, 2.5, 0.0, -3.0]
RAMP = [float(i - 5) for i in range(10)]
R10 = [RAMP, [100 * x for x in RAMP]]
TENTHS = [0.1, 0.2, 0.3, 0.4]


def _logs(probabilities):
    return [math.log(p) if p > 0 else -INF for p in probabilities]


def _filtered(row, **params):
    logits = torch.tensor([row], dtype=torch.float32)
    return filter_logits(logits, SamplingParams(**params), backend="torch")[0]


def _kept(row, **params):
    """Return the ids of the kept set, ascending."""
    return (_filtered(row, **params) > -INF).nonzero().flatten().tolist()


def _order(row, **params):
    """Return the ids of the kept set in order: larger logit first, equal logits by id."""
    filtered = _filtered(row, **params)
    order = torch.sort(filtered, descending=True, stable=True).indices
    return order[: int((filtered > -INF).sum())].tolist()


def _penalized(row, prompt, output, **params):
    """Return the row after steps 1 to 6."""
    logits = torch.tensor([row], dtype=torch.float32)
    history = TokenHistory.from_ids([prompt], [output], len(row))
    x, nan = processed_logits(make_call(logits, SamplingParams(**params), history=history))
    assert not nan
    return x[0].tolist()


def _probabilities(row, prompt=(), output=(), **params):
    """Return the probability of every token, from the integer masses."""
    logits = torch.tensor([row], dtype=torch.float32)
    history = TokenHistory.from_ids([list(prompt)], [list(output)], len(row))
    call = make_call(logits, SamplingParams(**params), history=history)
    x, _ = processed_logits(call)
    keep, w = kept_set(x, call.batch)
    shares = torch.where(keep, w, 0)[0].double()
    return (shares / shares.sum()).tolist()


def _close(expected, tolerance=1e-6):
    return pytest.approx(expected, abs=tolerance)


# Known answers


@pytest.mark.parametrize(
    ("d", "w"),
    [
        (0.0, 4398046511104),
        (0.5, 3109888720896),
        (1.0, 2199023255552),
        (1.5, 1554944360448),
        (10.25, 3611622400),
        (41.75, 1),
        (42.0, 1),
        (60.0, 0),
        (INF, 0),
    ],
)
def test_mass_known_answers(d, w):
    assert mass(torch.tensor([d])).tolist() == [w]


def test_mass_halves_with_every_octave():
    """One octave deeper halves the mass, by a shift; from 43 octaves on the mass is 0."""
    fractions = torch.arange(0, 1, 2.0**-7)
    for e in range(43):
        assert torch.equal(mass(fractions + e), mass(fractions) >> e)
    assert mass(torch.tensor([43.0, 44.5, 62.0, 63.0, 64.0, 1e30])).tolist() == [0] * 6


def test_mass_error_over_every_fraction():
    """For all 2^24 fractions f the mass is within 2.4e-7 of 2^(42 - f), and in 2^41 .. 2^42."""
    for start in range(0, 2**24, 2**21):
        f = torch.arange(start, start + 2**21, dtype=torch.int64).float() / 2**24
        w = mass(f)
        m = w >> 18
        assert torch.equal(m << 18, w)
        assert (m.double() / 2**24 * torch.exp2(f.double()) - 1).abs().max() <= 2.4e-7
        assert w.min() >= 2**41
        assert w.max() <= 2**42
        # rounding may make a deeper token's mass larger, but by at most one unit of M
        assert m.diff().max() <= 1


# (key, counter words, output words)
PHILOX = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    # Random123's kat_vectors
    (
        2**64 - 1,
        (2**32 - 1,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), PHILOX, ids=["zero", "pi", "ones"])
def test_philox_known_answers(key, counter, words):
    seed = torch.tensor([_signed(key)])
    position = torch.tensor([_signed(counter[0] | counter[1] << 32)])
    got = philox(seed, position, draw=counter[2], stream=counter[3])
    assert tuple(int(word) for word in got) == words


def test_philox_of_many_rows():
    """Many rows agree with the oracle, with bits set in every word of key and counter."""
    rng = random.Random(1)
    seeds = [rng.getrandbits(64) for _ in range(64)]
    positions = [rng.getrandbits(64) for _ in range(64)]
    got = philox(
        torch.tensor([_signed(seed) for seed in seeds]),
        torch.tensor([_signed(position) for position in positions]),
        draw=5,
        stream=2**32 - 1,
    )
    expected = [
        _philox(seed, (position & M32, position >> 32, 5, 2**32 - 1))
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert [list(words) for words in zip(*(word.tolist() for word in got), strict=True)] == expected


def test_scaled_is_the_integer_product():
    """``scaled`` is (R * s) >> 64 in Python integers, for pairs of edge and of random values."""
    edges = [
        0,
        1,
        2,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ]
    rng = random.Random(2)
    pairs = [(r, s) for r in edges for s in edges if s < 2**63]
    pairs += [
        (rng.getrandbits(64) >> rng.randrange(64), rng.getrandbits(63) >> rng.randrange(63))
        for _ in range(4096)
    ]
    got = scaled(
        torch.tensor([r & M32 for r, _ in pairs]),
        torch.tensor([r >> 32 for r, _ in pairs]),
        torch.tensor([s for _, s in pairs]),
    )
    assert got.tolist() == [(r * s) >> 64 for r, s in pairs]


# Worked rows: (parameters, kept ids in order, tokens of draws 0 .. 7)

WORKED = [
    ({"seed": 0}, [1, 3, 0, 4, 2, 5], [3, 3, 3, 0, 3, 3, 3, 3]),
    ({"temperature": 0.7, "top_k": 3, "seed": 0}, [1, 3, 0], [3, 3, 3, 1, 3, 3, 3, 3]),
    ({"top_p": 0.8, "seed": 1234, "position": 5}, [1, 3], [1, 1, 1, 1, 3, 1, 3, 3]),
    ({"min_p": 0.1, "seed": 2**63 + 11}, [1, 3, 0], [1, 3, 1, 3, 1, 3, 3, 1]),
    ({"temperature": 0}, [1], [1] * 8),
    ({"top_k": 1}, [1], [1] * 8),
    (
        {
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.25,
            "prompt": [1, 5],
            "output": [3, 3, 0],
            "seed": 9,
            "position": 0,
        },
        [1, 3, 0, 4, 2, 5],
        [1, 1, 4, 1, 1, 1, 1, 1],
    ),
]


@pytest.mark.parametrize(
    ("case", "kept", "tokens"),
    WORKED,
    ids=["unfiltered", "top-k", "top-p", "min-p", "greedy", "top-1", "penalties"],
)
def test_worked_rows(backend, case, kept, tokens):
    case = dict(case)
    history = TokenHistory.from_ids([case.pop("prompt", [])], [case.pop("output", [])], 6)
    position = case.pop("position", 0)
    logits, params = torch.tensor([LOGITS]), SamplingParams(**case)
    output = sample(
        logits,
        params,
        history=history,
        positions=[position],
        num_samples=8,
        backend=backend,
    )
    assert output.tokens.tolist() == [tokens]
    assert output.status.tolist() == [0]
    filtered = filter_logits(logits, params, history=history, backend=backend)[0]
    order = torch.sort(filtered, descending=True, stable=True).indices
    assert order[: int((filtered > -INF).sum())].tolist() == kept


# HF's tests of its logits processors


def test_hf_repetition_penalty():  # T1
    row0, row1 = [0.1] * 10, [0.1] * 10
    row0[0], row1[5] = -0.1, 0.4
    expected0, expected1 = [0.1] * 10, [0.1] * 10
    expected0[0], expected0[1] = -0.2, 0.05
    expected1[0], expected1[5] = 0.05, 0.2
    assert _penalized(row0, [0, 1], [], repetition_penalty=2) == _close(expected0)
    assert _penalized(row1, [5, 0], [], repetition_penalty=2) == _close(expected1)
    # tokens of the output are penalised like tokens of the prompt
    assert _penalized(row0, [1], [0], repetition_penalty=2) == _close(expected0)


def test_hf_repetition_penalty_ignoring_the_prompt():  # T2, T3
    """HF's prompt_ignore_length has no counterpart: leave those tokens out of the history."""
    row0 = [-0.1] + [0.1] * 9
    assert _penalized(row0, [], [], repetition_penalty=2) == _close(row0)
    once = [-0.2, 0.05] + [0.1] * 8
    assert _penalized(row0, [], [0, 1], repetition_penalty=2) == _close(once)
    # T3: each token is penalised once, however often it occurs
    assert _penalized(row0, [0, 1, 0, 1], [0, 1], repetition_penalty=2) == _close(once)


def test_hf_repetition_penalty_of_zero_and_infinity():  # T4
    assert _penalized([0.0, -INF, 1.0], [0, 1], [], repetition_penalty=2) == [0.0, -INF, 1.0]
    assert _penalized([0.0, -INF, 1.0], [0, 1], [], repetition_penalty=0.5) == [0.0, -INF, 1.0]


def test_hf_top_k():  # T5
    ramp = [float(i) for i in range(10)]
    assert _kept(ramp, top_k=3) == [7, 8, 9]
    assert _kept([x + 10 if i < 5 else x for i, x in enumerate(ramp)], top_k=3) == [2, 3, 4]


def test_hf_top_k_min_tokens_to_keep():  # T6
    # HF keeps all five tokens of a uniform row, since all tie; this package keeps exactly three
    assert _kept([0.0] * 5, top_k=1, min_tokens_to_keep=3) == [0, 1, 2]
    assert _kept([0.0, 1.0, 2.0, 3.0, 4.0], top_k=1, min_tokens_to_keep=3) == [2, 3, 4]


def test_hf_top_k_ties():  # T7
    # HF keeps every token that ties with the k-th, here all five; this package keeps exactly k
    assert _kept([1.0] * 5, top_k=2) == [0, 1]
    assert _kept([1.0, 3.0, 1.0, 3.0, 1.0], top_k=3) == [0, 1, 3]


def test_hf_top_p():  # T8
    assert _kept(_logs([0.3, 0.1, 0.1, 0.5]), top_p=0.8) == [0, 3]
    assert _kept(_logs([0.15, 0.3, 0.3, 0.25]), top_p=0.8) == [1, 2, 3]


def test_hf_top_p_min_tokens_to_keep():  # T9
    assert [len(_kept(row, top_p=0.9, min_tokens_to_keep=2)) for row in R10] == [3, 2]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, [3]),  # HF's 0 is refused here
        (0.3, [3]),
        (0.4, [3]),
        (0.69, [2, 3]),
        (0.7, [2, 3]),
        (0.71, [1, 2, 3]),
        (0.8, [1, 2, 3]),
        (0.9, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1, [0, 1, 2, 3]),
    ],
)
def test_hf_top_p_sweep(top_p, kept):  # T10
    assert _kept(_logs(TENTHS), top_p=top_p) == kept


def test_hf_min_p():  # T11
    assert _kept(_logs([0.9, 0.0274, 0.047, 0.0274]), min_p=0.05) == [0, 2]
    assert _kept(_logs([0.15, 0.3, 0.3, 0.25]), min_p=0.05) == [0, 1, 2, 3]
    assert _kept(_logs([0.97, 0.01, 0.01, 0.01]), min_p=0.05) == [0]


def test_hf_min_p_min_tokens_to_keep():  # T12
    assert [len(_kept(row, min_p=0.9, min_tokens_to_keep=2)) for row in R10] == [2, 2]


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [
        (0, [0, 1, 2, 3]),
        (0.24, [0, 1, 2, 3]),
        (0.26, [1, 2, 3]),
        (0.49, [1, 2, 3]),
        (0.5, [1, 2, 3]),  # 0.2 is not below 0.5 * 0.4; HF keeps two, because its softmax rounds
        (0.51, [2, 3]),
        (0.74, [2, 3]),
        (0.76, [3]),
        (1.0, [3]),
    ],
)
def test_hf_min_p_sweep(min_p, kept):  # T13
    assert _kept(_logs(TENTHS), min_p=min_p) == kept


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 2.0},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 1.05},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"min_tokens_to_keep": 0},
    ],
    ids=str,
)
def test_hf_refusals(params):  # T28
    ((name, value),) = params.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
        SamplingParams(**params)


def test_hf_refusals_that_are_accepted_here():  # T28
    assert _kept(LOGITS, temperature=0.0) == [1]
    assert _kept(LOGITS, top_k=-1) == [0, 1, 2, 3, 4, 5]
    assert _kept(LOGITS, temperature=2, repetition_penalty=1, top_p=1) == [0, 1, 2, 3, 4, 5]


# llama.cpp's test of its samplers: probabilities to 1e-5


def test_llama_cpp_temperature():  # T29
    assert _probabilities(_logs(TENTHS)) == _close(TENTHS)
    assert _probabilities(_logs(TENTHS), temperature=0) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 0, 0, 1]),
        (3, [0, 0.22222, 0.33333, 0.44444]),
        (4, TENTHS),
        (0, TENTHS),
    ],
)
def test_llama_cpp_top_k(top_k, expected):  # T30
    assert _probabilities(_logs(TENTHS), top_k=top_k) == _close(expected, 1e-5)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [0, 0, 0, 1]),  # llama.cpp's 0 is refused here
        (0.7, [0, 0, 0.428571, 0.571429]),
        (0.8, [0, 0.22222, 0.33333, 0.44444]),
        (1.0, TENTHS),
    ],
)
def test_llama_cpp_top_p(top_p, expected):  # T31
    assert _probabilities(_logs(TENTHS), top_p=top_p) == _close(expected, 1e-5)


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (0.0, TENTHS),
        (0.24, TENTHS),
        (0.26, [0, 0.222222, 0.333333, 0.444444]),
        (0.49, [0, 0.222222, 0.333333, 0.444444]),
        (0.51, [0, 0, 0.428571, 0.571429]),
        (0.74, [0, 0, 0.428571, 0.571429]),
        (0.76, [0, 0, 0, 1]),
        (1.0, [0, 0, 0, 1]),  # llama.cpp also accepts 1.05, which is refused here
    ],
)
def test_llama_cpp_min_p(min_p, expected):  # T32
    assert _probabilities(_logs(TENTHS), min_p=min_p) == _close(expected, 1e-5)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([0], [0, 0.25, 0.25, 0.25, 0.25]),  # T35
        ([0, 1, 2], [0, 0, 0, 0.5, 0.5]),  # T36
        ([0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5]),
    ],
    ids=["one", "three", "distinct"],
)
def test_llama_cpp_repetition_penalty(last, expected):
    row = _logs([0.2] * 5)
    assert _probabilities(row, output=last, repetition_penalty=50) == _close(expected, 1e-5)
    assert _probabilities(row, prompt=last, repetition_penalty=50) == _close(expected, 1e-5)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),  # T37
        ([0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),  # T38
        ([0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),  # T39
    ],
    ids=["one", "three", "counted"],
)
def test_llama_cpp_frequency_and_presence_penalty(last, expected):
    """llama.cpp's penalties of 5 are beyond [-2, 2]; 2 at a temperature of 2 / 5 is the same."""
    got = _probabilities(
        _logs([0.2] * 5), output=last, frequency_penalty=2, presence_penalty=2, temperature=0.4
    )
    assert got == _close(expected)
    # llama.cpp counts its whole window with the prompt; this package counts the output only
    as_prompt = _probabilities(
        _logs([0.2] * 5), prompt=last, frequency_penalty=2, presence_penalty=2, temperature=0.4
    )
    assert as_prompt == _close([0.2] * 5)


# Tests of other samplers


def test_mlx_lm_penalties_in_order():  # T57
    got = _penalized(
        [1.0, 0.5, 0.0, -0.5],
        [],
        [0, 0, 0, 1, 1],
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    assert got == _close([-0.5833, -0.6667, 0.0, -0.5], 5e-5)


@pytest.mark.parametrize("field", ["top_a", "nsigma", "top_n_sigma"])
def test_aphrodite_parameters_are_not_ours(field):  # T58
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: 0.5})


def test_aphrodite_thresholds_as_min_p():  # T58
    # top_a .5 on [2, 1, 0, -2] drops p < .5 * max^2, with max = .657: as a min_p of .328 does
    assert _kept([2.0, 1.0, 0.0, -2.0], min_p=0.328) == [0, 1]
    # nsigma .1 on [10, 9, 0, -1] drops logits .1 sigma = .502 below the best: a min_p of e^-.502
    assert _kept([10.0, 9.0, 0.0, -1.0], min_p=0.605) == [0]


def test_temperature():  # T59
    row = _logs([0.4, 0.3, 0.2, 0.1])
    assert _probabilities(row, temperature=0.5) == _close([0.533333, 0.3, 0.133333, 0.033333])
    assert _probabilities(row, temperature=2) == _close([0.325401, 0.281805, 0.230093, 0.1627])


def test_the_order_of_the_filters():  # T60
    row = _logs([0.4, 0.3, 0.2, 0.1])
    # top-p comes before min-p, as in HF; vLLM applies min-p first and keeps {0, 1}
    assert _kept(row, top_p=0.75, min_p=0.3) == [0, 1, 2]
    assert _probabilities(row, top_p=0.75, min_p=0.3) == _close([0.444444, 0.333333, 0.222222, 0])
    # top-p measures what top-k left; SGLang measures the full distribution and keeps {0, 1}
    assert _kept(row, top_k=2, top_p=0.55) == [0]
    assert _kept(row, top_p=0.55) == [0, 1]
    # temperature comes before min-p; llama.cpp applies it last and keeps {0, 1, 2}
    assert _kept(row, temperature=0.5, min_p=0.3) == [0, 1]
    assert _probabilities(row, temperature=0.5, min_p=0.3) == _close([0.64, 0.36, 0, 0])
    # temperature comes before top-p; after it, it would keep {0, 1}
    assert _kept([3.0, 2.0, 1.0], top_p=0.8, temperature=0.5) == [0]
    assert _kept([3.0, 2.0, 1.0], top_p=0.8) == [0, 1]


def test_repetition_before_frequency_and_presence():  # T61
    got = _penalized(
        [1.0, 0.5, 0.0, -0.5],
        [],
        [0, 0, 1, 3, 3, 3],
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    # SGLang's overlap mode subtracts before it scales, which gives [0, -.375, 0, -2.625]
    assert got == _close([-0.333333, -0.416667, 0.0, -2.0])


# Single steps on rows typed by hand


def test_top_p_reaches_its_own_decimals():
    """Since 2^-20 is subtracted from p, .5 + .3 reaches .8 however the logarithms were rounded."""
    assert _kept(_logs([0.5, 0.3, 0.2]), top_p=0.8) == [0, 1]
    assert _kept(_logs([0.5, 0.3, 0.2]), top_p=0.8001) == [0, 1, 2]
    assert _kept([0.0] * 10, top_p=0.3) == [0, 1, 2]
    assert _kept([0.0] * 10, top_p=0.31) == [0, 1, 2, 3]


def test_top_p_of_a_full_row():
    """The sum of 2^20 masses of 2^42 fits into 63 bits, and so does the target."""
    row = torch.zeros(1, 2**20)
    for top_p, kept in ((0.75, 3 * 2**18), (2.0**-10, 2**10)):
        filtered = filter_logits(row, SamplingParams(top_p=top_p), backend="torch")
        # the 2^-20 that is subtracted from top_p is the share of one token
        assert (filtered[0] > -INF).nonzero().flatten().tolist() == list(range(kept - 1))


def test_bias_and_mask_come_before_the_penalties():
    row = [1.0, 1.0, 1.0, -1.0]
    params = {"logit_bias": {0: 2.0, 3: 4.0, 7: 9.0}, "repetition_penalty": 2.0}
    assert _penalized(row, [0, 3], [], **params) == [1.5, 1.0, 1.0, 1.5]
    mask = torch.tensor([[0b1010]], dtype=torch.int32)
    logits = torch.tensor([[math.nan, 1.0, INF, -1.0]])
    call = make_call(
        logits, SamplingParams(logit_bias={0: 2.0, 1: 1.0}), history=None, allowed_mask=mask
    )
    x, nan = processed_logits(call)
    # NaN and +inf of masked tokens are replaced by -inf and not reported
    assert x.tolist() == [[-INF, 2.0, -INF, -1.0]]
    assert nan.tolist() == [False]


def test_the_canonical_row():
    logits = torch.tensor([[-0.0, 0.0, math.nan, INF, -INF, 1e-45]])
    x, nan = processed_logits(make_call(logits, SamplingParams(), history=None))
    assert nan.tolist() == [True]
    assert x.tolist() == [[0.0, 0.0, -INF, INF, -INF, struct.unpack("f", b"\1\0\0\0")[0]]]
    assert [math.copysign(1, value) for value in x[0, :2].tolist()] == [1, 1]


def test_depth_of_infinities():
    x = torch.tensor([[INF, INF, 3.0, -INF], [2.0, 1.0, 2.0, -INF], [-INF, -INF, -INF, -INF]])
    d = depth(x, torch.tensor([1.0, 0.5, 1.0]))
    log2_e = float.fromhex("0x1.715476p+0")
    assert d.tolist() == [[0, 0, INF, INF], [0, 2 * log2_e, 0, INF], [0, 0, 0, 0]]


def test_positive_infinity_takes_the_mass():
    assert _kept([0.0, INF, 5.0, INF], min_p=0.5) == [1, 3]
    assert _probabilities([0.0, INF, 5.0, INF]) == [0, 0.5, 0, 0.5]
    assert _kept([0.0, INF, 5.0, INF]) == [0, 1, 2, 3]
    assert _kept([0.0, INF, 5.0, INF], temperature=0) == [1]


def test_greedy_takes_the_smallest_id_and_ignores_the_filters():
    assert _order([1.0, 3.0, 3.0], temperature=0) == [1]
    assert _kept([1.0, 3.0, 3.0], temperature=0, min_tokens_to_keep=3, top_k=2, top_p=0.1) == [1]
    assert _filtered([1.0, 3.0, 3.0], temperature=0).tolist() == [-INF, 3.0, -INF]
    # -0.0 and 0.0 are the same logit
    assert _kept([-0.0, 0.0], temperature=0) == [0]
    assert _kept([-1.0, -0.0, 0.0], top_k=1) == [1]


def test_filter_logits_divides_by_the_temperature():
    assert _filtered(LOGITS, temperature=0.5, top_k=3).tolist() == [2.0, 5.0, -INF, 5.0, -INF, -INF]
    third = struct.unpack("f", struct.pack("f", 2.5 / 3))[0]
    assert _filtered(LOGITS, temperature=3, top_k=1).tolist() == [-INF, third] + [-INF] * 4


def test_logprobs():
    row = torch.tensor([_logs([0.4, 0.3, 0.2, 0.1])])
    params = SamplingParams(top_k=2, temperature=0.5, seed=1, logit_bias={3: -100})
    for kind, answers in (
        ("processed", [math.log(0.64), math.log(0.36)]),
        ("raw", [math.log(0.4), math.log(0.3)]),
    ):
        output = sample(row, params, num_samples=16, logprobs=kind, backend="torch")
        assert output.logprobs is not None
        assert set(output.tokens[0].tolist()) == {0, 1}
        expected = [answers[token] for token in output.tokens[0].tolist()]
        assert output.logprobs[0].tolist() == pytest.approx(expected, abs=1e-6)
    greedy = sample(row, SamplingParams(temperature=0), logprobs="processed", backend="torch")
    assert greedy.logprobs is not None
    assert greedy.logprobs.tolist() == [0.0]


# The oracle: docs/semantics.md in Python integers and floats, one row at a time

M32 = 2**32 - 1
LOG2_E = float.fromhex("0x1.715476p+0")
POLYNOMIAL = [
    float.fromhex(c)
    for c in (
        "0x1.000000p+0",
        "-0x1.62e3b2p-1",
        "0x1.ebe206p-3",
        "-0x1.c4eb2cp-5",
        "0x1.2d4322p-7",
        "-0x1.eca6f0p-11",
    )
]


def _signed(bits):
    return bits - 2**64 if bits >= 2**63 else bits


def _fl(value):
    """Round to float32. For + - * / of float32 values in float64 this equals a single rounding."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(INF, value)


def _divide(a, b):
    if b == 0:
        return INF if a > 0 else -INF
    return _fl(a / b)


def _philox(key, counter):
    k0, k1 = key & M32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & M32, first >> 32 ^ c3 ^ k1, first & M32
        k0, k1 = k0 + 0x9E3779B9 & M32, k1 + 0xBB67AE85 & M32
    return [c0, c1, c2, c3]


def _mass(d):
    d = min(d, 63.0)
    e = math.floor(d)
    f = d - e
    p = POLYNOMIAL[5]
    for c in POLYNOMIAL[4::-1]:
        p = _fl(_fl(p * f) + c)
    return (math.floor(p * 2**24) << 18) >> e


class Answer(NamedTuple):
    kept: list[int]  # in order
    tokens: list[int]
    status: int
    filtered: list[float]


def oracle(row, params, prompt=(), output=(), allowed=None, position=0, draws=4):
    vocab_size = len(row)
    x = list(row)
    for token, bias in (params.logit_bias or {}).items():
        if token < vocab_size:
            x[token] = -INF if bias == -INF else _fl(x[token] + _fl(bias))
    if allowed is not None:
        x = [value if i in allowed else -INF for i, value in enumerate(x)]
    r = _fl(params.repetition_penalty)
    a, b = _fl(params.frequency_penalty), _fl(params.presence_penalty)
    for token in {*prompt, *output}:
        if 0 <= token < vocab_size:
            x[token] = _divide(x[token], r) if x[token] > 0 else _fl(x[token] * r)
    for token in set(output):
        if 0 <= token < vocab_size:
            x[token] = _fl(x[token] - _fl(a * _fl(list(output).count(token))))
            x[token] = _fl(x[token] - b)
    status = 0
    for i, value in enumerate(x):
        if math.isnan(value):
            x[i], status = -INF, status | 1
        elif value == 0:
            x[i] = 0.0
    order = [i for i in sorted(range(vocab_size), key=lambda i: (-x[i], i)) if x[i] > -INF]
    if not order:
        return Answer([], [-1] * draws, status | 2, [-INF] * vocab_size)
    m = x[order[0]]
    if m == INF:
        status |= 4
    t = _fl(params.temperature)
    if t == 0:
        greedy = _filtered_row(x, m, 1.0, order[:1])
        return Answer(order[:1], order[:1] * draws, status, greedy)

    s = _divide(LOG2_E, t)
    d = [0.0 if value == m else _fl(_fl(m - value) * s) for value in x]
    w = [_mass(value) for value in d]
    at_least = params.min_tokens_to_keep
    kept = order
    if params.top_k > 0:
        kept = kept[: max(params.top_k, at_least)]
    p = _fl(params.top_p)
    if p < 1:
        share = max(0, math.floor(p * 2**31) - 2**11)
        product = sum(w[i] for i in kept) * share
        target = max(1, -(-product // 2**31))
        prefix, total = 0, 0
        while total < target:
            total += w[kept[prefix]]
            prefix += 1
        kept = kept[: max(prefix, at_least)]
    min_p = _fl(params.min_p)
    if min_p > 0:
        cut = _fl(2.0**-18 - math.log2(min_p))
        kept = kept[: max(sum(d[i] <= cut for i in kept), at_least)]

    total = sum(w[i] for i in kept)
    tokens = []
    for draw in range(draws):
        words = _philox(params.seed % 2**64, (position & M32, position >> 32, draw, 0))
        random_number = (words[0] | words[1] << 32) * total >> 64
        for token in sorted(kept):
            random_number -= w[token]
            if random_number < 0:
                tokens.append(token)
                break
    return Answer(kept, tokens, status, _filtered_row(x, m, t, kept))


def _filtered_row(x, m, t, kept):
    """Return the filtered logits of a row with the maximum ``m``, divided by ``t``."""
    is_shifted = math.isinf(_divide(m, t))
    filtered = [-INF] * len(x)
    for i in kept:
        below = 0.0 if x[i] == m else _fl(x[i] - m)
        filtered[i] = max(_divide(below if is_shifted else x[i], t), -LARGEST_FLOAT)
    return filtered


def test_the_oracle_gives_the_worked_rows():
    for case, kept, tokens in WORKED:
        case = {"seed": 0, **case}
        prompt, output = case.pop("prompt", []), case.pop("output", [])
        position = case.pop("position", 0)
        params = SamplingParams(**case)
        got = oracle(LOGITS, params, prompt, output, position=position, draws=8)
        assert (got.kept, got.tokens, got.status) == (kept, tokens, 0)
    for d, w in ((0.0, 2**42), (0.5, 3109888720896), (10.25, 3611622400), (41.75, 1), (60.0, 0)):
        assert _mass(d) == w
    for key, counter, words in PHILOX:
        assert tuple(_philox(key, counter)) == words


STEPS = {
    "bias": lambda rng, v: {
        "logit_bias": {
            rng.randrange(v + 2): rng.choice([-100, -0.3, 0.7, 100, -INF]) for _ in range(3)
        }
    },
    "repetition": lambda rng, v: {
        "repetition_penalty": rng.choice([0.5, 0.9, 1.1, 1.3, 3.0, 1e-45])
    },
    "frequency": lambda rng, v: {"frequency_penalty": rng.choice([-2, -0.3, 0.1, 0.5, 2])},
    "presence": lambda rng, v: {"presence_penalty": rng.choice([-1.5, -0.1, 0.25, 1.0, 2])},
    "temperature": lambda rng, v: {
        "temperature": rng.choice([0, 1e-45, 1e-30, 0.1, 0.5, 0.7, 1.3, 5.0, 1e30])
    },
    "top_k": lambda rng, v: {"top_k": rng.choice([1, 2, 3, v - 1, v, v + 1, 2**33]) or 1},
    "top_p": lambda rng, v: {
        "top_p": rng.choice([1e-300, 1e-6, 2.0**-20, 0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1 - 2.0**-24])
    },
    "min_p": lambda rng, v: {"min_p": rng.choice([1e-300, 1e-45, 1e-3, 0.1, 0.25, 0.5, 0.9, 1])},
    "min_tokens_to_keep": lambda rng, v: {"min_tokens_to_keep": rng.choice([1, 2, 3, v, v + 3])},
    "mask": lambda rng, v: {},
}

VALUES = {
    "spread": lambda rng: _fl(rng.gauss(0, 3)),
    "ties": lambda rng: rng.randrange(-2, 3) / 2,
    "halves": lambda rng: math.log(2) * rng.randrange(0, 4),
    "holes": lambda rng: rng.choice([-INF, -INF, _fl(rng.gauss(0, 2))]),
    "hostile": lambda rng: rng.choice(
        [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 65504.0, 1.0, -1.0, INF, -INF, math.nan]
    ),
}


def _check_against_oracle(backend, steps, seed, shape, rows=24):
    rng = random.Random(f"{steps}{seed}{shape}")
    vocab_size = rng.choice([1, 2, 3, 5, 8, 13, 33])
    cases = []
    for _ in range(rows):
        params = {"seed": rng.getrandbits(64)}
        for step in steps:
            params |= STEPS[step](rng, vocab_size)
        ids = range(-1, vocab_size + 1)
        cases.append(
            (
                [_fl(VALUES[shape](rng)) for _ in range(vocab_size)],
                SamplingParams(**params),
                rng.choices(ids, k=rng.randrange(6)),
                rng.choices(ids, k=rng.randrange(6)),
                {i for i in range(vocab_size) if rng.random() < 0.7} if "mask" in steps else None,
                rng.choice([0, 1, 7, 2**32, 2**40 + 5, 2**63, 2**64 - 1]),
            )
        )
    logits = torch.tensor([case[0] for case in cases], dtype=torch.float32)
    batch = BatchParams.from_list(
        [case[1] for case in cases], positions=[case[5] for case in cases]
    )
    history = TokenHistory.from_ids([c[2] for c in cases], [c[3] for c in cases], vocab_size)
    mask = None
    if "mask" in steps:
        words = torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int64)
        for row, case in enumerate(cases):
            for token in case[4]:
                words[row, token // 32] |= 1 << token % 32
        mask = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    output = sample(
        logits,
        batch,
        history=history,
        allowed_mask=mask,
        num_samples=4,
        backend=backend,
        check=False,
    )
    filtered = filter_logits(logits, batch, history=history, allowed_mask=mask, backend=backend)
    for row, case in enumerate(cases):
        expected = oracle(*case)
        assert output.tokens[row].tolist() == expected.tokens, case
        assert output.status[row].item() == expected.status, case
        assert filtered[row].tolist() == expected.filtered, case


@pytest.mark.parametrize("shape", list(VALUES))
@pytest.mark.parametrize(
    "step", [(), *((step,) for step in STEPS)], ids=lambda s: "+".join(s) or "none"
)
def test_each_step_alone(backend, step, shape):
    _check_against_oracle(backend, step, 0, shape)


@pytest.mark.parametrize("pair", list(combinations(STEPS, 2)), ids="+".join)
def test_each_pair_of_steps(backend, pair):
    for shape in VALUES:
        _check_against_oracle(backend, pair, 1, shape, rows=8)


@pytest.mark.parametrize("shape", list(VALUES))
def test_all_steps_together(backend, shape):
    for seed in range(8):
        _check_against_oracle(backend, tuple(STEPS), seed, shape)


# Rows of known mass: with T = fl32(log2 e) the scale is 1, so a logit of -e has mass 2^(42 - e)


def _row_of_mass(first, total, vocab_size=64):
    """Return a row of mass ``total`` whose best ``first`` tokens have mass 2^42 each."""
    rest = total - first * 2**42
    assert 0 <= rest < 2**42
    tail = [-float(e) for e in range(1, 43) if rest >> (42 - e) & 1]
    row = [0.0] * first + tail
    return row + [-INF] * (vocab_size - len(row))


def test_rows_of_mass():
    for total in (2**42, 2**42 + 1, 2**43 - 1, 2**42 + 0b1011):
        logits = torch.tensor([_row_of_mass(1, total)])
        call = make_call(logits, SamplingParams(temperature=LOG2_E), history=None)
        _, w = kept_set(logits, call.batch)
        assert w.sum() == total


def test_top_p_target_to_the_last_unit(backend):
    """One unit of mass, of about 2^42, decides whether the best tokens reach the target.

    ``first`` tokens of total mass C reach it while Z * P <= C * 2^31. The rows have the largest
    such Z and its neighbours.
    """
    rng = random.Random(3)
    cases = []
    for _ in range(200):
        first = rng.randrange(1, 5)
        p = _fl(rng.uniform((first + 0.01) / (first + 1), 0.999))
        share = math.floor(p * 2**31) - 2**11
        largest = first * 2**73 // share
        for total in (largest - 1, largest, largest + 1, largest + 2):
            expected = first if total <= largest else first + 1
            cases.append((_row_of_mass(first, total), p, expected))
    # here P = p * 2^31 - 2^11 = 2^30, so the target is exactly half of the mass
    cases += [(_row_of_mass(1, 2**43 - 1), 0.5 + 2.0**-20, 1)]
    cases += [([0.0] * 4 + [-INF] * 60, 0.5 + 2.0**-20, 2)]
    params = [SamplingParams(temperature=LOG2_E, top_p=p, seed=1) for _, p, _ in cases]
    logits = torch.tensor([row for row, _, _ in cases])
    filtered = filter_logits(logits, params, backend=backend)
    assert (filtered > -INF).sum(-1).tolist() == [expected for _, _, expected in cases]
    for (row, _, expected), one in zip(cases, params, strict=True):
        assert oracle(row, one).kept == list(range(expected))


def _exponents(total):
    """Return depths whose masses add up to ``total``: 2^42 as often as it fits, then each bit."""
    rest = total % 2**42
    return [0] * (total // 2**42) + [e for e in range(1, 43) if rest >> (42 - e) & 1]


def test_draw_to_the_last_unit(backend):
    """If the tokens up to one have exactly mass r, the next token that has mass is drawn."""
    rows, seeds, expected = [], [], []
    total = 2**44
    for seed in range(100):
        words = _philox(seed, (0, 0, 0, 0))
        r = (words[0] | words[1] << 32) * total >> 64
        for prefix in (r, r + 1):
            before, after = _exponents(prefix), _exponents(total - prefix)
            assert before
            assert after
            # tokens of mass 0 on both sides of the boundary are kept but never drawn
            depths = [50, *before, 60, 50, *after, 55]
            rows.append([-float(depth) for depth in depths] + [-INF] * (100 - len(depths)))
            seeds.append(SamplingParams(temperature=LOG2_E, seed=seed))
            expected.append(len(before) + 3 if prefix == r else len(before))
    tokens = sample(torch.tensor(rows), seeds, backend=backend).tokens
    assert tokens.tolist() == expected


def test_min_p_cut_to_the_last_bit(backend):
    """A token whose depth equals the cut is kept; one at the next float32 beyond is not."""
    for min_p in (0.9, 0.5, 0.3, 0.25, 0.1, 0.05, 1e-3, 1e-6):
        cut = torch.tensor(2.0**-18 - math.log2(_fl(min_p)), dtype=torch.float64).float()
        beyond = torch.nextafter(cut, torch.tensor(INF))
        logits = torch.stack([-beyond, -cut, torch.tensor(0.0), -cut, -beyond]).unsqueeze(0)
        params = SamplingParams(temperature=LOG2_E, min_p=min_p)
        filtered = filter_logits(logits, params, backend=backend)
        assert (filtered > -INF).tolist() == [[False, True, True, True, False]]
