"""Are parameters checked with the documented messages, and packed into the right tensors?"""

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from llm_sampling import BatchParams, SamplingParams, sample
from llm_sampling.fields import OFF_VALUES
from llm_sampling.params import LogitBias

NAN, INF = float("nan"), float("inf")

TEMPERATURE = "temperature must be finite and >= 0 in float32"
TOP_K = "top_k must be an integer >= -1"
TOP_P = "top_p must be in (0, 1]"
MIN_P = "min_p must be in [0, 1]"
REPETITION = "repetition_penalty must be finite and > 0 in float32"
FREQUENCY = "frequency_penalty must be in [-2, 2]"
PRESENCE = "presence_penalty must be in [-2, 2]"
KEEP = "min_tokens_to_keep must be an integer >= 1"
SEED = "seed must be an integer in [0, 2^64), or None for a new one each time"
BIAS = "logit_bias must be a mapping of token id to bias"
BIAS_ID = "logit_bias must be a mapping whose token ids are integers in [0, 2^31)"
BIAS_ONCE = "logit_bias must be a mapping that names each token id once"
BIAS_VALUE = "logit_bias[7] must be in [-100, 100], or -inf to ban the token"

NOT_NUMBERS = [NAN, INF, -INF, True, False, "1", b"1", [1.0], (1.0,), {}, 1j, object]
NOT_INTEGERS = [NAN, INF, 1.0, 2.5, True, False, "1", [1], np.float32(2), np.bool_(True)]

REFUSED = [
    *[("temperature", value, TEMPERATURE) for value in NOT_NUMBERS],
    ("temperature", -1, TEMPERATURE),
    ("temperature", -1e-30, TEMPERATURE),
    ("temperature", 1e39, TEMPERATURE),
    ("temperature", 10**400, TEMPERATURE),
    ("temperature", Fraction(10**400, 3), TEMPERATURE),
    ("temperature", np.float32("nan"), TEMPERATURE),
    ("temperature", np.bool_(True), TEMPERATURE),
    *[("top_k", value, TOP_K) for value in NOT_INTEGERS],
    ("top_k", -2, TOP_K),
    ("top_k", -(2**70), TOP_K),
    *[("top_p", value, TOP_P) for value in NOT_NUMBERS],
    ("top_p", 0, TOP_P),
    ("top_p", 0.0, TOP_P),
    ("top_p", -0.0, TOP_P),
    ("top_p", -0.1, TOP_P),
    ("top_p", 1.1, TOP_P),
    ("top_p", 1.0000000000000002, TOP_P),
    ("top_p", 2, TOP_P),
    ("top_p", 10**400, TOP_P),
    *[("min_p", value, MIN_P) for value in NOT_NUMBERS],
    ("min_p", -1e-300, MIN_P),
    ("min_p", 1.05, MIN_P),
    ("min_p", -(10**400), MIN_P),
    *[("repetition_penalty", value, REPETITION) for value in NOT_NUMBERS],
    ("repetition_penalty", 0, REPETITION),
    ("repetition_penalty", 0.0, REPETITION),
    ("repetition_penalty", -1.0, REPETITION),
    ("repetition_penalty", 1e-60, REPETITION),
    ("repetition_penalty", 1e39, REPETITION),
    ("repetition_penalty", 10**400, REPETITION),
    *[("frequency_penalty", value, FREQUENCY) for value in NOT_NUMBERS],
    ("frequency_penalty", 2.0000001, FREQUENCY),
    ("frequency_penalty", -3, FREQUENCY),
    ("frequency_penalty", 10**400, FREQUENCY),
    *[("presence_penalty", value, PRESENCE) for value in NOT_NUMBERS],
    ("presence_penalty", -2.0000001, PRESENCE),
    ("presence_penalty", 3, PRESENCE),
    *[("min_tokens_to_keep", value, KEEP) for value in NOT_INTEGERS],
    ("min_tokens_to_keep", 0, KEEP),
    ("min_tokens_to_keep", -1, KEEP),
    *[("seed", value, SEED) for value in NOT_INTEGERS],
    ("seed", 2**64, SEED),
    ("seed", -1, SEED),
    ("seed", np.int64(-5), SEED),
    ("logit_bias", [(1, 2.0)], BIAS),
    ("logit_bias", {1, 2}, BIAS),
    ("logit_bias", "1", BIAS),
    ("logit_bias", 1.0, BIAS),
]

REFUSED_BIAS = [
    ({-1: 1.0}, BIAS_ID, "-1"),
    ({2**31: 1.0}, BIAS_ID, "2147483648"),
    ({"x": 1.0}, BIAS_ID, "'x'"),
    ({"-3": 1.0}, BIAS_ID, "'-3'"),
    ({"3.0": 1.0}, BIAS_ID, "'3.0'"),
    ({" 3": 1.0}, BIAS_ID, "' 3'"),
    ({"٣": 1.0}, BIAS_ID, "'٣'"),
    ({str(2**31): 1.0}, BIAS_ID, "'2147483648'"),
    ({"": 1.0}, BIAS_ID, "''"),
    ({"5": 1.0, 5: 2.0}, BIAS_ONCE, "{'5': 1.0, 5: 2.0}"),
    ({"5": 1.0, "05": 1.0}, BIAS_ONCE, "{'5': 1.0, '05': 1.0}"),
    ({3.0: 1.0}, BIAS_ID, "3.0"),
    ({True: 1.0}, BIAS_ID, "True"),
    ({None: 1.0}, BIAS_ID, "None"),
    ({7: 100.5}, BIAS_VALUE, "100.5"),
    ({7: -101}, BIAS_VALUE, "-101"),
    ({0: 1.0, 7: NAN}, BIAS_VALUE, "nan"),
    ({7: INF}, BIAS_VALUE, "inf"),
    ({7: -1000}, BIAS_VALUE, "-1000"),
    ({7: False}, BIAS_VALUE, "False"),
    ({7: "-inf"}, BIAS_VALUE, "'-inf'"),
    ({7: True}, BIAS_VALUE, "True"),
    ({7: None}, BIAS_VALUE, "None"),
    ({7: "1"}, BIAS_VALUE, "'1'"),
]

# (field, accepted value, stored value)
ACCEPTED = [
    ("temperature", 0, 0.0),
    ("temperature", 2, 2.0),
    ("temperature", 1e-60, 1e-60),
    ("temperature", 3.4e38, 3.4e38),
    ("temperature", np.float32(0.5), 0.5),
    ("temperature", np.float64(0.7), 0.7),
    ("temperature", np.int64(3), 3.0),
    ("temperature", Fraction(1, 2), 0.5),
    ("top_k", -1, 0),
    ("top_k", 0, 0),
    ("top_k", 1, 1),
    ("top_k", 2**40, 2**40),
    ("top_k", np.int32(7), 7),
    ("top_k", np.uint8(7), 7),
    ("top_p", 1, 1.0),
    ("top_p", 1e-300, 1e-300),
    ("top_p", np.float32(0.25), 0.25),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("min_p", 1e-300, 1e-300),
    ("repetition_penalty", 2, 2.0),
    ("repetition_penalty", 1e-38, 1e-38),
    ("repetition_penalty", 1e-45, 1e-45),
    ("repetition_penalty", 3.4e38, 3.4e38),
    ("frequency_penalty", -2, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("presence_penalty", -2.0, -2.0),
    ("presence_penalty", 2.0, 2.0),
    ("min_tokens_to_keep", 1, 1),
    ("min_tokens_to_keep", 2**40, 2**40),
    ("seed", 0, 0),
    ("seed", 2**63, 2**63),
    ("seed", 2**64 - 1, 2**64 - 1),
    ("seed", np.uint64(2**64 - 1), 2**64 - 1),
    ("logit_bias", {}, LogitBias()),
    ("logit_bias", {0: 100, 2**31 - 1: -100}, LogitBias({0: 100.0, 2**31 - 1: -100.0})),
    ("logit_bias", {np.int64(5): np.float32(0.5)}, LogitBias({5: 0.5})),
    ("logit_bias", {"12": 1, "007": 2, 3: 4}, LogitBias({12: 1.0, 7: 2.0, 3: 4.0})),
    ("logit_bias", {5: -INF, 6: np.float32(-INF)}, LogitBias({5: -INF, 6: -INF})),
]


def _ids(rows):
    return [f"{row[0]}={str(row[1])[:24]}" for row in rows]


@pytest.mark.parametrize(("field", "value", "rule"), REFUSED, ids=_ids(REFUSED))
def test_refused(field, value, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{rule}, got {value!r}')}$"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("bias", "rule", "shown"), REFUSED_BIAS, ids=_ids(REFUSED_BIAS))
def test_refused_bias(bias, rule, shown):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{rule}, got {shown}')}$"):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize(("field", "value", "held"), ACCEPTED, ids=_ids(ACCEPTED))
def test_accepted(field, value, held):
    stored = getattr(SamplingParams(**{field: value}), field)
    assert stored == held
    assert type(stored) is type(held)


@pytest.mark.parametrize("field", list(OFF_VALUES))
def test_none_is_off(field):
    assert getattr(SamplingParams(**{field: None}), field) == OFF_VALUES[field]
    assert SamplingParams(**{field: None}) == SamplingParams()


def test_the_table_of_off_values_is_the_defaults():
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    assert defaults == dict(OFF_VALUES)
    assert defaults == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "min_tokens_to_keep": 1,
        "logit_bias": None,
        "seed": None,
        "repetition_penalty_scope": "all",
        "penalty_last_n": -1,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "dry_breakers": None,
        "no_repeat_ngram_size": 0,
        "no_repeat_ngram_window": 0,
        "bad_words": None,
        "min_tokens": 0,
        "stop_token_ids": None,
    }
    with pytest.raises(TypeError):
        OFF_VALUES["top_k"] = 50  # type: ignore[index]


@pytest.mark.parametrize(
    ("params", "needs"),
    [
        (SamplingParams(), False),
        (SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1), False),
        (SamplingParams(logit_bias={1: 2.0}), False),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(repetition_penalty=0.9), True),
        (SamplingParams(frequency_penalty=-0.5), True),
        (SamplingParams(presence_penalty=0.5), True),
    ],
    ids=["default", "filters", "bias", "repetition", "repetition<1", "frequency", "presence"],
)
def test_needs_history(params, needs):
    assert params.needs_history is needs


def test_unknown_field():
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]


EVERYTHING = SamplingParams(
    *(0.7, 40, 0.9, 0.05, 1.1, 0.2, -0.1, 2, {3: 1.5}, 2**64 - 1, "output", 64),
    *(0.8, 1.5, 3, 512, [[7], [1, 2]], 4, 256, [[5], [6, 8]], 12, [9]),
)


@pytest.mark.parametrize("field", list(OFF_VALUES))
def test_frozen(field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(EVERYTHING, field, None)


def test_copies_are_equal():
    for copied in (
        pickle.loads(pickle.dumps(EVERYTHING)),
        copy.copy(EVERYTHING),
        copy.deepcopy(EVERYTHING),
        dataclasses.replace(EVERYTHING),
        SamplingParams(**dataclasses.asdict(EVERYTHING)),
    ):
        assert copied == EVERYTHING
        assert hash(copied) == hash(EVERYTHING)
    assert dataclasses.asdict(EVERYTHING)["logit_bias"] == {3: 1.5}
    assert len({EVERYTHING, SamplingParams(), SamplingParams(top_k=-1)}) == 2


def test_a_pickle_holds_nothing_that_is_derived():
    """Another version of the package, which reads it, may derive something else."""
    state = EVERYTHING.__reduce_ex__(4)[2]
    assert list(state) == list(OFF_VALUES)
    assert pickle.loads(pickle.dumps(EVERYTHING)).packed == EVERYTHING.packed


@pytest.mark.parametrize("field", list(OFF_VALUES))
def test_equality_sees_every_field(field):
    assert dataclasses.replace(EVERYTHING, **{field: OFF_VALUES[field]}) != EVERYTHING


def test_replace_checks_again():
    assert dataclasses.replace(EVERYTHING, top_k=None).top_k == 0
    with pytest.raises(ValueError, match=re.escape(TOP_P)):
        dataclasses.replace(EVERYTHING, top_p=1.5)


def test_a_bias_is_the_users_no_more():
    mine = {1: 2.0}
    params = SamplingParams(logit_bias=mine)
    mine[1] = 1000.0
    mine[-1] = 1.0
    assert params.logit_bias == {1: 2.0}


CHANGES = {
    "set": lambda bias: bias.__setitem__(1, 5.0),
    "delete": lambda bias: bias.__delitem__(1),
    "update": lambda bias: bias.update({2: 1.0}),
    "or": lambda bias: bias.__ior__({2: 1.0}),
    "pop": lambda bias: bias.pop(1),
    "popitem": lambda bias: bias.popitem(),
    "clear": lambda bias: bias.clear(),
    "setdefault": lambda bias: bias.setdefault(2, 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bias_cannot_be_changed(name):
    """A SamplingParams is frozen as a whole: it may be a key, and a Sampler may have packed it."""
    params = SamplingParams(logit_bias={1: 2.0})
    with pytest.raises(TypeError, match="logit_bias cannot be changed"):
        CHANGES[name](params.logit_bias)
    assert params.logit_bias == {1: 2.0}
    assert params == SamplingParams(logit_bias={1: 2.0})


def test_every_way_to_change_a_dict_is_closed():
    """A new version of Python may add a method that changes a dict."""
    known = {"__class__", "__init__", "__setattr__", "__delattr__", "__setstate__"}
    for name in set(dir(dict)) - known:
        bias = LogitBias({1: 2.0, 2: 3.0})
        for arguments in ((), (1,), ({5: 1.0},), (5, 1.0)):
            with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
                getattr(bias, name)(*arguments)
        assert dict(bias) == {1: 2.0, 2: 3.0}, name


def test_parameters_survive_json():
    """JSON has strings as keys, and Python's json module has -Infinity."""
    for params in (
        SamplingParams(),
        EVERYTHING,
        SamplingParams(logit_bias={0: -INF, 12: 1.5, 2**31 - 1: -100.0}, seed=2**64 - 1),
    ):
        text = json.dumps(dataclasses.asdict(params))
        assert SamplingParams(**json.loads(text)) == params


def test_a_bias_is_packed_in_the_order_of_ids():
    params = SamplingParams(logit_bias={9: 1.0, "2": 2.0, 5: -INF})
    batch = BatchParams.from_list([params])
    assert batch.logit_bias_ids.tolist() == [2, 5, 9]
    assert batch.logit_bias_values.tolist() == [2.0, -INF, 1.0]
    assert hash(params) == hash(SamplingParams(logit_bias={2: 2.0, 5: -INF, 9: 1.0}))


# BatchParams

#: Step 13's depth for a min_p of 0.05 in float32.
CUT_OF_5_PERCENT = 2.0**-18 - math.log2(np.float32(0.05))

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0, seed=5),
    EVERYTHING,
    SamplingParams(
        top_k=2**40, min_tokens_to_keep=2**40, logit_bias={9: -1, 0: 0.1}, seed=2**64 - 1
    ),
]


def test_from_list():
    batch = BatchParams.from_list(MIXED)
    assert batch.rows == 4
    assert batch.device == torch.device("cpu")
    assert batch.needs_history is True
    assert batch.position is None

    def floats(values):
        return np.array(values, dtype=np.float32).tolist()

    expected = {
        "temperature": (torch.float32, floats([1, 0, 0.7, 1])),
        "top_p": (torch.float32, floats([1, 1, 0.9, 1])),
        "min_p_cut": (torch.float32, floats([INF, INF, CUT_OF_5_PERCENT, INF])),
        "repetition_penalty": (torch.float32, floats([1, 1, 1.1, 1])),
        "frequency_penalty": (torch.float32, floats([0, 0, 0.2, 0])),
        "presence_penalty": (torch.float32, floats([0, 0, -0.1, 0])),
        "top_k": (torch.int32, [0, 0, 40, 2**31 - 1]),
        "min_tokens_to_keep": (torch.int32, [1, 1, 2, 2**31 - 1]),
        "logit_bias_offsets": (torch.int64, [0, 0, 0, 2, 4]),
        # the ids of a row are in ascending order; a bad word of a single id is a ban
        "logit_bias_ids": (torch.int32, [3, 5, 0, 9]),
        "logit_bias_values": (torch.float32, floats([1.5, -INF, 0.1, -1])),
        "dry_multiplier": (torch.float32, floats([0, 0, 0.8, 0])),
        "dry_base": (torch.float32, floats([1.75, 1.75, 1.5, 1.75])),
        "dry_allowed_length": (torch.int32, [2, 2, 3, 2]),
        "no_repeat_ngram_size": (torch.int32, [0, 0, 4, 0]),
        "min_tokens": (torch.int32, [0, 0, 12, 0]),
        "sequence_offsets": (torch.int64, [0, 0, 0, 14, 14]),
        # a kind, the number of ids, and the ids
        "sequences": (torch.int32, [0, 1, 7, 1, 2, 1, 2, 2, 2, 6, 8, 3, 1, 9]),
        "unseeded": (torch.bool, [True, False, False, False]),
    }
    for name, (dtype, values) in expected.items():
        tensor = getattr(batch, name)
        assert tensor.dtype == dtype, name
        assert tensor.tolist() == values, name
        assert tensor.is_contiguous(), name
    assert batch.seed.dtype == torch.int64
    assert batch.seed.tolist()[1:] == [5, -1, -1]


@pytest.mark.parametrize(
    ("min_p", "cut"),
    [
        (0.0, INF),
        (1e-300, INF),  # min_p is 0 in float32, so it is off
        (1.0, 2.0**-18),
        (0.5, 1 + 2.0**-18),
        (0.25, 2 + 2.0**-18),
        (2.0**-149, 149.0),
    ],
)
def test_min_p_cut(min_p, cut):
    batch = BatchParams.from_list([SamplingParams(min_p=min_p)])
    assert batch.min_p_cut.dtype == torch.float32
    assert batch.min_p_cut.tolist() == [np.float32(cut)]


@pytest.mark.parametrize(
    ("seed", "bits"),
    [
        (0, 0),
        (5, 5),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (2**63 + 11, -(2**63) + 11),
    ],
)
def test_a_seed_is_its_64_bits(seed, bits):
    batch = BatchParams.from_list([SamplingParams(seed=seed)])
    assert batch.seed.tolist() == [bits]
    assert batch.unseeded is None


def test_no_rows():
    batch = BatchParams.from_list([], positions=[])
    assert batch.rows == 0
    assert batch.needs_history is False
    assert batch.logit_bias_offsets.tolist() == [0]
    assert batch.position is not None
    assert batch.position.shape == (0,)


@pytest.mark.parametrize("value", [None, {"top_k": 1}, 1.0, "a", SamplingParams])
def test_from_list_refuses_other_elements(value):
    message = f"params[1] must be a SamplingParams, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BatchParams.from_list([SamplingParams(), value])


def test_to_another_device():
    batch = BatchParams.from_list(MIXED, positions=[0, 1, 2, 3])
    moved = batch.to("meta")
    assert moved.device == torch.device("meta")
    for field in dataclasses.fields(BatchParams):
        mine, theirs = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(mine, torch.Tensor):
            assert theirs.device.type == "meta", field.name
            assert (theirs.shape, theirs.dtype) == (mine.shape, mine.dtype), field.name
        else:
            assert theirs == mine, field.name
    assert BatchParams.from_list(MIXED, device="meta").seed.device.type == "meta"


def test_moved_without_optional_tensors():
    batch = BatchParams.from_list([SamplingParams(seed=1)]).to("cpu")
    assert batch.unseeded is None
    assert batch.position is None


def test_batch_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BatchParams.from_list(MIXED).seed = torch.zeros(4)  # type: ignore[misc]


# Rows without a seed


def test_manual_seed_governs_unseeded_rows():
    batch = BatchParams.from_list([SamplingParams(seed=3), SamplingParams(), SamplingParams()])

    def seeds(manual_seed):
        torch.manual_seed(manual_seed)
        first, second = batch.seeded(), batch.seeded()
        assert first.unseeded is None
        return first.seed.tolist(), second.seed.tolist()

    first, second = seeds(11)
    assert (first, second) == seeds(11)
    assert first != seeds(12)[0]
    assert first[0] == second[0] == 3
    assert len({*first[1:], *second[1:]}) == 4
    assert batch.seed.tolist()[0] == 3
    assert batch.unseeded is not None


def test_fresh_seeds_have_64_random_bits():
    torch.manual_seed(0)
    batch = BatchParams.from_list([SamplingParams()] * 4096).seeded()
    shifts = torch.arange(64)
    ones = ((batch.seed.unsqueeze(1) >> shifts) & 1).double().mean(0)
    assert len(set(batch.seed.tolist())) == 4096
    # the mean of 4096 fair bits is within 5 standard deviations of a half
    assert ((ones - 0.5).abs() < 5 * 0.5 / 4096**0.5).all()
    highest = ((batch.seed >> 62) & 3).bincount(minlength=4).double() / 4096
    assert ((highest - 0.25).abs() < 5 * (0.25 * 0.75 / 4096) ** 0.5).all()


def test_seeded_rows_leave_the_generator_alone():
    batch = BatchParams.from_list([SamplingParams(seed=3)])
    before = torch.get_rng_state()
    assert batch.seeded() is batch
    sample(torch.zeros(1, 5), batch, backend="torch")
    assert torch.equal(torch.get_rng_state(), before)


def test_manual_seed_governs_samples():
    logits = torch.zeros(8, 100_000)

    def tokens():
        return sample(logits, SamplingParams(), backend="torch").tokens.tolist()

    torch.manual_seed(1)
    first, second = tokens(), tokens()
    torch.manual_seed(1)
    assert (first, second) == (tokens(), tokens())
    assert len({*first, *second}) == 16


# Positions


@pytest.mark.parametrize(
    ("positions", "held"),
    [
        ([0, 7, 2**40], [0, 7, 2**40]),
        ((1, 2, 3), [1, 2, 3]),
        (range(3), [0, 1, 2]),
        ([2**63 - 1, 2**63, 2**64 - 1], [2**63 - 1, -(2**63), -1]),
        (np.array([4, 5, 6]), [4, 5, 6]),
        ([np.int32(4), np.uint64(2**64 - 1), 6], [4, -1, 6]),
        (torch.tensor([4, 5, 6]), [4, 5, 6]),
        (torch.tensor([4, 5, 6], dtype=torch.int32), [4, 5, 6]),
        (torch.tensor([4, 5, 250], dtype=torch.uint8), [4, 5, 250]),
        (torch.tensor([-1, 0, 1]), [-1, 0, 1]),
        (torch.arange(6)[::2], [0, 2, 4]),
    ],
    ids=[
        "list",
        "tuple",
        "range",
        "bits",
        "numpy",
        "scalars",
        "int64",
        "int32",
        "uint8",
        "tensor-bits",
        "strided",
    ],
)
def test_positions(positions, held):
    batch = BatchParams.from_list([SamplingParams()] * 3, positions=positions)
    assert batch.position is not None
    assert batch.position.dtype == torch.int64
    assert batch.position.is_contiguous()
    assert batch.position.tolist() == held


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1], "positions must be of shape (3,), got (2,)"),
        ([0, 1, 2, 3], "positions must be of shape (3,), got (4,)"),
        ([], "positions must be of shape (3,), got (0,)"),
        ([0, 1, 2**64], "positions must be in [-2^63, 2^64), got 18446744073709551616"),
        ([0, -(2**63) - 1, 0], "positions must be in [-2^63, 2^64), got -9223372036854775809"),
        ([0, 1.0, 2], "positions must be integers, got 1.0"),
        ([0, True, 2], "positions must be integers, got True"),
        ([0, None, 2], "positions must be integers, got None"),
        ("012", "positions must be integers, got '0'"),
        (torch.zeros(3), "positions must be integers, got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), "positions must be integers, got torch.bool"),
        (torch.zeros(3, dtype=torch.complex64), "positions must be integers, got torch.complex64"),
        (
            torch.zeros(3, dtype=torch.complex128),
            "positions must be integers, got torch.complex128",
        ),
        (torch.zeros(3, 1, dtype=torch.int64), "positions must be of shape (3,), got (3, 1)"),
        (torch.tensor(5), "positions must be of shape (3,), got ()"),
        (
            torch.zeros(3, dtype=torch.int64, device="meta"),
            "positions must be on the logits' device cpu, got meta",
        ),
        (5, "positions must be integers, one per row, got 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:20],
)
def test_positions_refused(positions, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchParams.from_list([SamplingParams()] * 3, positions=positions)


def test_positions_are_taken_modulo_2_64():
    """A list, a tensor and numpy integers follow one rule, which includes -1."""
    for positions in (
        [-1, 2**64 - 1, -(2**63)],
        torch.tensor([-1, -1, -(2**63)]),
        np.array([-1, -1, -(2**63)]),
        torch.tensor([-1, -1, -(2**63)]).tolist(),
    ):
        batch = BatchParams.from_list([SamplingParams(seed=1)] * 3, positions=positions)
        assert batch.position.tolist() == [-1, -1, -(2**63)]
        assert batch.position.dtype == torch.int64


def test_what_top_k_keeps_at_most():
    """``kept_at_most`` is limited to 2^31 - 1, as top_k is, and 0 if a row has no top-k."""

    def kept(*rows):
        return BatchParams.from_list([SamplingParams(**row) for row in rows]).checked().kept_at_most

    assert kept({"top_k": 5}, {"temperature": 0}, {"top_k": 2, "min_tokens_to_keep": 7}) == 7
    assert kept({"top_k": 5}, {}) == 0
    assert kept({"temperature": 0, "min_tokens_to_keep": 3}) == 1
    assert kept({"top_k": 10**12}) == kept({"top_k": 1, "min_tokens_to_keep": 2**40}) == 2**31 - 1
    assert kept() == 0


@pytest.mark.parametrize(
    ("params", "change"),
    [
        ({"top_k": 5}, {"kept_at_most": 4}),
        ({}, {"kept_at_most": 4}),
        ({"top_k": 5}, {"any_top_k": False}),
        ({"temperature": 0}, {"any_top_k": False}),
        ({"top_p": 0.9}, {"any_top_p": False}),
        ({"min_p": 0.1, "min_tokens_to_keep": 2}, {"any_floor": False}),
    ],
    ids=str,
)
def test_what_the_host_reads_of_a_batch_must_be_true(params, change):
    batch = BatchParams.from_list([SamplingParams(**params)])
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} must be "):
        dataclasses.replace(batch, **change).checked()
