"""The two processors and the whole loop inside transformers' ``generate``."""

from dataclasses import replace

import pytest
import torch
from toy_tokenizers import byte_tokenizer, transformers

from llm_sampling import InvalidLogitsError, Sampler, SamplingParams
from llm_sampling.generation import generate, seeded
from llm_sampling.generation.config import AS_PROCESSORS, NOT_SUPPORTED, REPLACED
from llm_sampling.integrations import huggingface

BYTES = byte_tokenizer()
FusedLogitsProcessor = huggingface.FusedLogitsProcessor
FusedLogitsWarper = huggingface.FusedLogitsWarper
fused_generate = huggingface.fused_generate
params_from_generation_config = huggingface.params_from_generation_config

V = 97
PROMPTS = torch.tensor([[5, 17, 17, 80, 3], [9, 2, 64, 31, 31]])
RAGGED = [[5, 17, 80], [9], [4, 4, 64, 31, 31, 2]]
PADDED = torch.tensor([[0] * (6 - len(row)) + row for row in RAGGED])
MASK = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in RAGGED])
#: Options that turn off transformers' own filters.
NEUTRAL = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "eos_token_id": None}

EACH = [
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.4, seed=3),
    SamplingParams(temperature=0),
    SamplingParams(
        top_k=9, min_p=0.02, frequency_penalty=0.6, presence_penalty=0.4, seed=2**64 - 1
    ),
]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(V)


def ours(model, prompts, params, max_new_tokens=12):
    done = generate(
        model, prompts, params, vocab_size=V, max_new_tokens=max_new_tokens, ignore_eos=True
    )
    return [row.token_ids for row in done]


@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_takes_the_tokens_of_our_loop(model, do_sample):
    processor = FusedLogitsProcessor(EACH, attention_mask=MASK)
    out = model.generate(
        PADDED,
        attention_mask=MASK,
        logits_processor=[processor],
        do_sample=do_sample,
        max_new_tokens=12,
        **NEUTRAL,
    )
    assert out[:, 6:].tolist() == ours(model, RAGGED, EACH)


def test_warpers_that_follow_change_nothing(model):
    options = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": True} | NEUTRAL
    options |= {"top_k": 3, "top_p": 0.4, "temperature": 3.0, "min_p": 0.5}
    processor = FusedLogitsProcessor(EACH, attention_mask=MASK)
    out = model.generate(PADDED, logits_processor=[processor], **options)
    assert out[:, 6:].tolist() == ours(model, RAGGED, EACH)


def test_a_pad_token_tells_where_padding_is(model):
    """Id 0 in the middle of a prompt is a token, not padding."""
    prompts = [[5, 0, 80, 7], [9]]
    padded = torch.tensor([[5, 0, 80, 7], [0, 0, 0, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    params = SamplingParams(repetition_penalty=5.0, temperature=0)
    out = model.generate(
        padded,
        attention_mask=mask,
        logits_processor=[FusedLogitsProcessor(params, pad_token_id=0)],
        do_sample=False,
        max_new_tokens=12,
        **NEUTRAL,
    )
    assert out[:, 4:].tolist() == ours(model, prompts, params)


def test_padding_matters_where_it_is_not_told():
    """The control of the two tests above: without mask and pad token, id 0 is penalised."""
    scores = torch.zeros(1, V)
    scores[0, 0] = 1.0
    params = SamplingParams(repetition_penalty=2.0)
    ids = torch.tensor([[0, 0, 9]])
    told = FusedLogitsWarper(params, pad_token_id=0)(ids, scores)
    assert told[0, 0] == 1.0
    assert FusedLogitsWarper(params)(ids, scores)[0, 0] == 0.5


def test_num_return_sequences_have_a_seed_each(model):
    params = [EACH[0], EACH[2]]
    processor = FusedLogitsProcessor(params)
    out = model.generate(
        PROMPTS,
        logits_processor=[processor],
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=8,
        **NEUTRAL,
    )
    rows = [seeded(row, i) for row in params for i in range(3)]
    prompts = PROMPTS.repeat_interleave(3, dim=0)
    assert out[:, 5:].tolist() == ours(model, prompts, rows, 8)
    assert len({tuple(row) for row in out.tolist()}) == 6


def test_finished_rows_are_padded_and_disturb_nobody(model):
    first = ours(model, PROMPTS, EACH[:2], 12)
    end = first[0][4]
    out = model.generate(
        PROMPTS,
        logits_processor=[FusedLogitsProcessor(EACH[:2])],
        do_sample=True,
        max_new_tokens=12,
        **(NEUTRAL | {"eos_token_id": end}),
    )
    place = first[0].index(end) + 1
    assert out[0, 5:].tolist() == first[0][:place] + [0] * (out.shape[1] - 5 - place)
    kept = out[1, 5:].tolist()
    assert kept == first[1][: len(kept)] or end in first[1]


def test_embeddings_as_prompts(model):
    """The first ids that ``generate`` gives have width 0."""
    embeddings = model.get_input_embeddings()(PROMPTS)
    params = [replace(row, repetition_penalty=1.0) for row in EACH[:2]]
    out = model.generate(
        inputs_embeds=embeddings,
        logits_processor=[FusedLogitsProcessor(params)],
        do_sample=True,
        max_new_tokens=12,
        **NEUTRAL,
    )
    assert out.tolist() == ours(model, PROMPTS, params)


def test_one_object_serves_one_generate_after_the_other(model):
    processor = FusedLogitsProcessor(EACH[:2])
    options = {"logits_processor": [processor], "do_sample": True} | NEUTRAL
    for prompts, steps in ((PROMPTS, 6), (PROMPTS, 1), (PROMPTS[:, :3], 9), (PROMPTS + 1, 4)):
        out = model.generate(prompts, max_new_tokens=steps, **options)
        assert out[:, prompts.shape[1] :].tolist() == ours(model, prompts, EACH[:2], steps)
    # A call on the last result looks like a next step, hence the reset.
    processor.reset()
    again = model.generate(out, max_new_tokens=4, **options)
    assert again[:, out.shape[1] :].tolist() == ours(model, out, EACH[:2], 4)


def test_scores_are_not_modified(model):
    out = model.generate(
        PROMPTS,
        logits_processor=[FusedLogitsProcessor(EACH[:2], logprobs="processed")],
        do_sample=True,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **NEUTRAL,
    )
    plain = model(PROMPTS).logits[:, -1].float()
    torch.testing.assert_close(out.logits[0], plain)
    for step, scores in enumerate(out.scores):
        assert (scores == 0).sum(1).tolist() == [1, 1]
        assert torch.isinf(scores).sum(1).tolist() == [V - 1, V - 1]
        assert torch.equal(scores.argmax(1), out.sequences[:, 5 + step])


@pytest.mark.parametrize("kind", ["processed", "raw"])
def test_logprobs_of_the_drawn_tokens(model, kind):
    processor = FusedLogitsProcessor(EACH[:2], logprobs=kind)
    assert processor.logprobs is None
    options = {"logits_processor": [processor], "do_sample": True, "max_new_tokens": 6} | NEUTRAL
    model.generate(PROMPTS, **options)
    want = generate(
        model, PROMPTS, EACH[:2], vocab_size=V, max_new_tokens=6, ignore_eos=True, logprobs=kind
    )
    assert processor.logprobs.tolist() == [row.logprobs for row in want]
    model.generate(PROMPTS, **options)
    assert processor.logprobs.shape == (2, 6)


def test_the_warper_filters_and_generate_draws(model):
    """With filters that leave one token the draw is certain."""
    params = [replace(row, top_k=1) for row in EACH[:2]]
    out = model.generate(
        PROMPTS,
        logits_processor=[FusedLogitsWarper(params)],
        do_sample=True,
        max_new_tokens=10,
        **NEUTRAL,
    )
    assert out[:, 5:].tolist() == ours(model, PROMPTS, params, 10)


@pytest.mark.parametrize("make", [FusedLogitsProcessor, FusedLogitsWarper])
def test_beams_and_assistants_are_refused(model, make):
    options = {"logits_processor": [make(SamplingParams())], "max_new_tokens": 4} | NEUTRAL
    with pytest.raises(ValueError, match=r"no assistant_model.* in _beam_search"):
        model.generate(PROMPTS, num_beams=2, **options)
    with pytest.raises(ValueError, match="transformers called it in _assisted_decoding"):
        model.generate(PROMPTS[:1], assistant_model=model, do_sample=True, **options)
    with pytest.raises(ValueError, match="transformers called it in _assisted_decoding"):
        model.generate(PROMPTS[:1], prompt_lookup_num_tokens=2, do_sample=True, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": []}, "params must have at least one, got none"),
        ({"params": [1]}, r"params must be a SamplingParams or a sequence of them, got \[1\]"),
        ({"params": None}, "params must be a SamplingParams or a sequence of them, got None"),
        ({"attention_mask": [[1]]}, "attention_mask must have shape"),
        ({"attention_mask": torch.ones(3)}, "attention_mask must have shape"),
        (
            {"attention_mask": torch.ones(1, 3), "pad_token_id": 0},
            "pad_token_id must not be given beside an attention_mask",
        ),
        ({"pad_token_id": "x"}, "pad_token_id must be an integer, got 'x'"),
        ({"pad_token_id": True}, "pad_token_id must be an integer, got True"),
        ({"backend": "x"}, "backend must be one of 'auto', .*, got 'x'"),
    ],
)
@pytest.mark.parametrize("make", [FusedLogitsProcessor, FusedLogitsWarper])
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**({"params": SamplingParams()} | arguments))


@pytest.mark.parametrize("make", [FusedLogitsProcessor, FusedLogitsWarper])
def test_rows_that_do_not_fit(make):
    with pytest.raises(ValueError, match="one for each prompt, got 2 for 3 rows"):
        make(EACH[:2])(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, V))
    penalised = SamplingParams(repetition_penalty=2.0)
    with pytest.raises(ValueError, match=r"shape of the prompts, got \(2, 4\) where they are"):
        make(penalised, attention_mask=MASK[:2, :4])(PADDED[:2], torch.zeros(2, V))


def test_a_row_without_a_candidate_is_an_error_on_the_cpu():
    processor = FusedLogitsProcessor(SamplingParams())
    with pytest.raises(InvalidLogitsError, match="no candidate left"):
        processor(torch.tensor([[1]]), torch.full((1, V), -torch.inf))


# The cases of transformers' own tests of its processors


def filtered(probabilities, params, ids=None):
    scores = torch.log(torch.tensor(probabilities))
    ids = torch.zeros(len(probabilities), 1, dtype=torch.int64) if ids is None else ids
    return torch.exp(FusedLogitsWarper(params)(ids, scores))


def kept(scores):
    return [torch.nonzero(row > -torch.inf).flatten().tolist() for row in scores]


def test_repetition_penalty():
    scores = torch.full((2, 10), 0.1)
    scores[0, 0], scores[1, 5] = -0.1, 0.4
    before = scores.clone()
    ids = torch.tensor([[0, 1], [5, 0]])
    out = FusedLogitsWarper(SamplingParams(repetition_penalty=2.0))(ids, scores)
    expected = before.clone()
    expected[0, 0], expected[0, 1], expected[1, 0], expected[1, 5] = -0.2, 0.05, 0.05, 0.2
    assert torch.equal(out, expected)
    assert torch.equal(scores, before)
    # Each token is penalised once, however often it occurs.
    again = FusedLogitsWarper(SamplingParams(repetition_penalty=2.0))(ids.repeat(1, 2), scores)
    assert torch.equal(again, expected)


def test_repetition_penalty_without_the_prompt():
    scores = torch.full((2, 10), 0.1)
    mask = torch.zeros(2, 2)
    warper = FusedLogitsWarper(SamplingParams(repetition_penalty=2.0), attention_mask=mask)
    assert torch.equal(warper(torch.tensor([[0, 1], [5, 0]]), scores), scores)


def test_repetition_penalty_of_zero_and_infinity():
    scores = torch.tensor([[0.0, -torch.inf, 1.0]])
    out = FusedLogitsWarper(SamplingParams(repetition_penalty=2.0))(torch.tensor([[0, 1]]), scores)
    assert out.tolist() == [[0.0, -torch.inf, 1.0]]


def test_top_k():
    ramp = torch.arange(10.0).repeat(2, 1)
    ramp[1, :5] += 10
    ids = torch.zeros(2, 1, dtype=torch.int64)
    assert kept(FusedLogitsWarper(SamplingParams(top_k=3))(ids, ramp)) == [[7, 8, 9], [2, 3, 4]]
    floor = SamplingParams(top_k=1, min_tokens_to_keep=3)
    scores = torch.stack([torch.zeros(5), torch.arange(5.0)])
    assert kept(FusedLogitsWarper(floor)(ids, scores)) == [[0, 1, 2], [2, 3, 4]]
    # transformers keeps all that equal the k-th; here exactly k are kept, the smallest ids.
    assert kept(FusedLogitsWarper(SamplingParams(top_k=2))(ids, torch.zeros(2, 5))) == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("top_p", "keep"),
    [(0.3, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)],
)
def test_top_p(top_p, keep):
    out = filtered([[0.1, 0.2, 0.3, 0.4]], SamplingParams(top_p=top_p))
    assert (out > 0).sum().item() == keep


def test_top_p_keeps_the_crossing_token():
    out = filtered([[0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]], SamplingParams(top_p=0.79))
    expected = torch.tensor([[0.3, 0.0, 0.0, 0.5], [0.0, 0.3, 0.3, 0.25]])
    torch.testing.assert_close(out, expected)
    ramp = torch.arange(10.0) - 5
    floor = SamplingParams(top_p=0.9, min_tokens_to_keep=2)
    out = FusedLogitsWarper(floor)(
        torch.zeros(2, 1, dtype=torch.int64), torch.stack([ramp, ramp * 100])
    )
    assert [len(row) for row in kept(out)] == [3, 2]


@pytest.mark.parametrize(
    ("min_p", "keep"),
    [(0.0, 4), (0.24, 4), (0.26, 3), (0.49, 3), (0.51, 2), (0.74, 2), (0.76, 1), (1.0, 1)],
)
def test_min_p(min_p, keep):
    out = filtered([[0.1, 0.2, 0.3, 0.4]], SamplingParams(min_p=min_p))
    assert (out > 0).sum().item() == keep


def test_min_p_and_its_floor():
    rows = [[0.9, 0.0274, 0.047, 0.0274], [0.15, 0.3, 0.3, 0.25], [0.97, 0.01, 0.01, 0.01]]
    out = filtered(rows, SamplingParams(min_p=0.05))
    assert [torch.nonzero(row).flatten().tolist() for row in out] == [[0, 2], [0, 1, 2, 3], [0]]
    ramp = torch.arange(10.0) - 5
    floor = SamplingParams(min_p=0.9, min_tokens_to_keep=2)
    out = FusedLogitsWarper(floor)(
        torch.zeros(2, 1, dtype=torch.int64), torch.stack([ramp, ramp * 100])
    )
    assert [len(row) for row in kept(out)] == [2, 2]


def test_nan_is_no_candidate_and_infinity_wins():
    """transformers replaces both; here a NaN cannot be drawn and +inf is the largest."""
    with pytest.raises(InvalidLogitsError):
        FusedLogitsProcessor(SamplingParams())(
            torch.tensor([[0]]), torch.tensor([[0.0, 0.7, 0.8, torch.nan]])
        )
    out = FusedLogitsWarper(SamplingParams())(
        torch.tensor([[0], [0]]),
        torch.tensor([[0.0, 0.7, 0.8, torch.nan], [0.1, torch.inf, 0.3, -torch.inf]]),
    )
    assert torch.equal(out[0], torch.tensor([0.0, 0.7, 0.8, -torch.inf]))
    # a row with +inf is shifted by it, so that a softmax is not NaN
    assert out[1].softmax(-1).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 1.05),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("min_tokens_to_keep", 0),
    ],
)
def test_errors_name_the_parameter_and_the_value(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        SamplingParams(**{name: value})


# The whole loop


def fused(model, prompts, params, **options):
    options = NEUTRAL | {"max_new_tokens": 12} | options
    return model.generate(prompts, custom_generate=fused_generate, params=params, **options)


def test_the_three_ways_give_the_same_tokens(model):
    """Padded rows of unequal length, each with its own parameters."""
    expected = ours(model, RAGGED, EACH)
    out = fused(model, PADDED, EACH, attention_mask=MASK)
    assert out[:, 6:].tolist() == expected
    processor = FusedLogitsProcessor(EACH, attention_mask=MASK)
    out = model.generate(
        PADDED,
        attention_mask=MASK,
        logits_processor=[processor],
        do_sample=True,
        max_new_tokens=12,
        **NEUTRAL,
    )
    assert out[:, 6:].tolist() == expected


#: The parameters above with penalties that are strong, and for the output or for the last ids.
WINDOWS = [
    replace(EACH[0], repetition_penalty=2.0, penalty_last_n=3),
    SamplingParams(temperature=0, repetition_penalty=2.0, repetition_penalty_scope="output"),
    replace(EACH[2], presence_penalty=2.0, penalty_last_n=5),
]


def test_scope_and_window_are_honoured_in_every_way(model, monkeypatch):
    """The room for new tokens, which is for 3 at first, is made larger on the way."""
    expected = ours(model, RAGGED, WINDOWS)
    assert expected != ours(model, RAGGED, [replace(row, penalty_last_n=-1) for row in WINDOWS])
    monkeypatch.setattr(huggingface, "_FIRST_ROOM", 3)
    out = fused(model, PADDED, WINDOWS, attention_mask=MASK)
    assert out[:, 6:].tolist() == expected
    processor = FusedLogitsProcessor(WINDOWS, attention_mask=MASK)
    options = {"attention_mask": MASK, "do_sample": True, "max_new_tokens": 12} | NEUTRAL
    out = model.generate(PADDED, logits_processor=[processor], **options)
    assert out[:, 6:].tolist() == expected
    greedy = [replace(row, temperature=0) for row in WINDOWS]
    warper = FusedLogitsWarper(greedy, attention_mask=MASK)
    out = model.generate(PADDED, logits_processor=[warper], **options)
    assert out[:, 6:].tolist() == ours(model, RAGGED, greedy)


@pytest.mark.parametrize("do_sample", [True, False])
def test_params_stand_for_the_config_s(model, do_sample):
    config = {"temperature": 3.0, "top_k": 2, "top_p": 0.3, "repetition_penalty": 7.0}
    out = fused(model, PROMPTS, EACH[:2], do_sample=do_sample, **config)
    assert out[:, 5:].tolist() == ours(model, PROMPTS, EACH[:2])


def test_without_params_the_config_is_followed(model):
    options = {"max_new_tokens": 12} | NEUTRAL
    greedy = model.generate(PROMPTS, do_sample=False, repetition_penalty=1.3, **options)
    ours_greedy = fused(model, PROMPTS, None, do_sample=False, repetition_penalty=1.3)
    assert torch.equal(ours_greedy, greedy)
    torch.manual_seed(5)
    sampled = fused(model, PROMPTS, None, do_sample=True, top_k=1)
    assert torch.equal(sampled, model.generate(PROMPTS, do_sample=False, **options))
    for top_k, params in ((None, SamplingParams()), (3, SamplingParams(top_k=3))):
        torch.manual_seed(5)
        sampled = fused(model, PROMPTS, None, do_sample=True, top_k=top_k)
        torch.manual_seed(5)
        assert torch.equal(sampled, fused(model, PROMPTS, [params] * 2))


def test_a_row_does_not_depend_on_its_batch(model):
    together = fused(model, PADDED, EACH, attention_mask=MASK)[:, 6:].tolist()
    for row, params in enumerate(EACH):
        alone = fused(model, torch.tensor([RAGGED[row]]), params)
        assert alone[0, len(RAGGED[row]) :].tolist() == together[row]


def test_fused_num_return_sequences(model):
    params = [EACH[0], EACH[2]]
    out = fused(model, PROMPTS, params, num_return_sequences=3, do_sample=True)
    rows = [seeded(row, i) for row in params for i in range(3)]
    assert out[:, 5:].tolist() == ours(model, PROMPTS.repeat_interleave(3, dim=0), rows)


def test_fused_embeddings_as_prompts(model):
    embeddings = model.get_input_embeddings()(PROMPTS)
    params = [replace(row, repetition_penalty=1.0) for row in EACH[:2]]
    out = model.generate(
        inputs_embeds=embeddings,
        custom_generate=fused_generate,
        params=params,
        max_new_tokens=12,
        **NEUTRAL,
    )
    assert out.tolist() == ours(model, PROMPTS, params)


def test_fused_end_tokens_and_padding(model):
    first = ours(model, PROMPTS, EACH[:2])
    end = first[0][4]
    options = {"eos_token_id": end, "do_sample": True}
    out = fused(model, PROMPTS, EACH[:2], **options)
    theirs = model.generate(
        PROMPTS,
        logits_processor=[FusedLogitsProcessor(EACH[:2])],
        max_new_tokens=12,
        **(NEUTRAL | options),
    )
    assert torch.equal(out, theirs)
    assert (out[0] == 0).any()


def test_what_is_returned_in_a_dict(model):
    want = generate(
        model,
        PROMPTS,
        EACH[:2],
        vocab_size=V,
        max_new_tokens=12,
        ignore_eos=True,
        logprobs="processed",
    )
    options = {"return_dict_in_generate": True, "output_logits": True, "logprobs": "processed"}
    out = fused(model, PROMPTS, EACH[:2], **options)
    assert out.sequences[:, 5:].tolist() == [row.token_ids for row in want]
    assert out.logprobs.tolist() == [row.logprobs for row in want]
    assert len(out.logits) == 12
    assert out.logits[0].shape == (2, V)
    end = want[0].token_ids[3]
    ended = fused(model, PROMPTS, EACH[:2], eos_token_id=end, **options)
    assert ended.logprobs[0, :4].tolist() == want[0].logprobs[:4]
    assert ended.logprobs[0, 4:].isnan().all()


class Recorder(transformers.generation.BaseStreamer):
    def __init__(self):
        self.put_ids, self.has_ended = [], False

    def put(self, value):
        self.put_ids.append(value.tolist())

    def end(self):
        self.has_ended = True


def test_the_streamer_that_generate_was_given_gets_the_tokens(model):
    streamer = Recorder()
    out = fused(model, PROMPTS[:1], EACH[0], streamer=streamer)
    assert streamer.has_ended
    assert streamer.put_ids[0] == PROMPTS[:1].tolist()
    assert [ids[0] for ids in streamer.put_ids[1:]] == out[0, 5:].tolist()


def test_a_loop_around_ours_keeps_the_streamer(model):
    def around(model, input_ids, params=None, **options):
        return fused_generate(model, input_ids, params=params, **options)

    streamer = Recorder()
    options = NEUTRAL | {"max_new_tokens": 3, "streamer": streamer}
    model.generate(PROMPTS[:1], custom_generate=around, params=EACH[0], **options)
    assert len(streamer.put_ids) == 4
    assert streamer.has_ended


class Spoil(transformers.LogitsProcessor):
    """Gives a row NaN, or another value everywhere, from some length on."""

    def __init__(self, row, length, value=torch.nan):
        self.row, self.length, self.value = row, length, value

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores = scores.clone()
            scores[self.row] = self.value
        return scores


@pytest.mark.parametrize("eos", [None, 95])
def test_the_fault_of_a_row_ends_that_row_alone(model, eos):
    options = {"eos_token_id": eos, "return_dict_in_generate": True, "logprobs": "processed"}
    good = fused(model, PROMPTS, EACH[:2], **options)
    spoilt = {"logits_processor": [Spoil(0, 8)], **options}
    out = fused(model, PROMPTS, EACH[:2], **spoilt)
    assert torch.equal(out.sequences[1], good.sequences[1])
    assert torch.equal(out.sequences[0, :8], good.sequences[0, :8])
    assert out.sequences[0, 8:].tolist() == [0] * 9
    assert torch.equal(out.logprobs[0, :3], good.logprobs[0, :3])
    assert out.logprobs[0, 3:].isnan().all()
    assert good.finish_reasons == ("length", "length")
    assert out.finish_reasons == ("error", "length")
    reason = "NaN in logits; no candidate left (every logit is -inf or masked)"
    assert out.stop_reasons == (reason, None)
    with pytest.raises(InvalidLogitsError, match="NaN in logits in row 0"):
        fused(model, PROMPTS, EACH[:2], check=True, **spoilt)
    with pytest.warns(RuntimeWarning, match="rows have ended in an error: row 0: NaN in logits"):
        ids = fused(model, PROMPTS, EACH[:2], logits_processor=[Spoil(0, 8)], eos_token_id=eos)
    assert torch.equal(ids, out.sequences)


def test_a_row_without_a_token_ends_the_loop(model):
    streamer = Recorder()
    nothing = {"logits_processor": [Spoil(0, 0, -torch.inf)], "streamer": streamer}
    with pytest.warns(RuntimeWarning, match="row 0: no candidate left"):
        out = fused(model, PROMPTS[:1], EACH[0], **nothing)
    assert out.tolist() == [[*PROMPTS[0].tolist(), 0]]
    assert len(streamer.put_ids) == 2
    assert streamer.has_ended


@pytest.mark.parametrize("check", [True, False])
def test_rows_that_have_ended_are_not_looked_at(model, check):
    end = ours(model, PROMPTS, EACH[:2])[0][2]
    options = {"eos_token_id": end, "return_dict_in_generate": True, "check": check}
    good = fused(model, PROMPTS, EACH[:2], **options)
    out = fused(model, PROMPTS, EACH[:2], logits_processor=[Spoil(0, 8)], **options)
    assert torch.equal(out.sequences, good.sequences)
    assert out.finish_reasons == ("stop", good.finish_reasons[1])
    processor = FusedLogitsProcessor(EACH[:2])
    theirs = NEUTRAL | {"eos_token_id": end, "max_new_tokens": 12}
    ids = model.generate(PROMPTS, logits_processor=[Spoil(0, 8), processor], **theirs)
    assert torch.equal(ids, good.sequences)
    with pytest.raises(InvalidLogitsError, match="NaN in logits in row 1"):
        model.generate(PROMPTS, logits_processor=[Spoil(1, 7), processor], **theirs)


def test_a_text_streamer_writes_the_text(model, capsys):
    params = SamplingParams(temperature=0)
    prompt = torch.tensor([[40, 41]])
    out = fused(model, prompt, params, streamer=transformers.TextStreamer(BYTES, skip_prompt=True))
    assert capsys.readouterr().out == BYTES.decode(out[0, 2:]) + "\n"


def test_stopping_criteria_are_asked(model):
    class AtNine(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    criteria = transformers.StoppingCriteriaList([AtNine()])
    out = fused(model, PROMPTS, EACH[:2], stopping_criteria=criteria)
    assert out.shape == (2, 9)


def test_fused_stop_strings(model):
    """The row ends with the token that completes the string, and the other row goes on."""
    expected = ours(model, PROMPTS, EACH[:2], 24)
    text = BYTES.decode(expected[0])
    stop = text[3:6]
    out = fused(
        model, PROMPTS, EACH[:2], max_new_tokens=24, stop=stop, stop_tokenizer=BYTES, stop_limit=1
    )
    place = text.find(stop) + len(stop)
    assert out[0, 5:].tolist() == expected[0][:place] + [0] * (24 - place)
    assert out[1, 5:].tolist() == expected[1]


def test_other_processors_are_called(model):
    options = {"do_sample": True, "suppress_tokens": list(range(40)), "min_new_tokens": 3}
    out = fused(model, PROMPTS, EACH[:2], **options)
    assert (out[:, 5:] >= 40).all()
    seen = []

    class Own(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids.shape[1], scores.dtype))
            scores = scores.clone()
            scores[:, 7] += 1000
            return scores

    half = model.to(torch.bfloat16)
    try:
        out = fused(half, PROMPTS, SamplingParams(seed=1), logits_processor=[Own()])
    finally:
        model.to(torch.float32)
    assert (out[:, 5:] == 7).all()
    assert seen == [(5 + step, torch.float32) for step in range(12)]


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [31, 5], [80]]},
        {"suppress_tokens": list(range(30))},
        {"begin_suppress_tokens": list(range(60))},
        {"min_new_tokens": 6, "eos_token_id": list(range(0, 97, 2))},
        {"min_length": 9, "eos_token_id": list(range(0, 97, 2))},
        {"forced_eos_token_id": 3, "eos_token_id": 3},
        {"sequence_bias": [[[5], 4.0], [[7, 31], -9.0]]},
        {"remove_invalid_values": True},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.4},
        {"guidance_scale": 1.5},
    ],
    ids=lambda options: "+".join(options),
)
def test_greedy_rows_are_those_of_hugging_face_whatever_else_is_asked(model, options):
    """transformers' processors are called as in its own loop."""
    greedy = NEUTRAL | {"max_new_tokens": 12, "do_sample": False} | options
    want = model.generate(PROMPTS, **greedy)
    got = model.generate(PROMPTS, custom_generate=fused_generate, **greedy)
    assert torch.equal(got, want)
    penalty = options.get("repetition_penalty", 1.0)
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    assert torch.equal(fused(model, PROMPTS, params, **options), want)


def test_logits_go_to_the_kernel_as_they_are(model, monkeypatch):
    """They are not converted: the kernel reads the bfloat16 of a bfloat16 model."""
    dtypes = []
    call = Sampler.__call__

    def watched(self, logits, **options):
        dtypes.append(logits.dtype)
        return call(self, logits, **options)

    monkeypatch.setattr(Sampler, "__call__", watched)
    half = model.to(torch.bfloat16)
    try:
        fused(half, PROMPTS, SamplingParams(seed=1))
    finally:
        model.to(torch.float32)
    assert set(dtypes) == {torch.bfloat16}


def test_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=V,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 8, "eos_token_id": None}
    want = t5.generate(PADDED, attention_mask=MASK, do_sample=False, **options)
    greedy = SamplingParams(temperature=0)
    out = t5.generate(
        PADDED, attention_mask=MASK, custom_generate=fused_generate, params=greedy, **options
    )
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams of the generation config cannot be honoured, got 2"),
        ({"typical_p": 0.5, "do_sample": True}, "typical_p of the generation config"),
        ({"epsilon_cutoff": 0.1, "do_sample": True}, "epsilon_cutoff of the generation config"),
        ({"renormalize_logits": True}, "renormalize_logits of the generation config"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores of the"),
        ({"output_attentions": True}, "output_attentions of the generation config"),
        ({"synced_gpus": True}, "synced_gpus cannot be honoured"),
        ({"logprobs": "raw"}, "logprobs needs return_dict_in_generate=True"),
        ({"stop": "a"}, "stop_tokenizer must be given for stop"),
        ({"stop": ""}, "stop must have no empty string"),
        (
            {"logits_processor": [transformers.TemperatureLogitsWarper(2.0)]},
            "must not have a TemperatureLogitsWarper beside params: set temperature there",
        ),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens of the generation config"),
    ],
)
def test_what_cannot_be_honoured_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        fused(model, PROMPTS[:1], SamplingParams(), **options)


def test_an_assistant_is_refused(model):
    with pytest.raises(ValueError, match="assistant_model cannot be honoured"):
        fused(model, PROMPTS[:1], SamplingParams(), assistant_model=model)


# The three ways


def test_each_prompt_has_the_seed_as_given(model):
    """Prompts with one SamplingParams do not depend on their places."""
    params = SamplingParams(temperature=1.5, seed=7)
    alone = [ours(model, [row], params)[0] for row in RAGGED]
    assert ours(model, RAGGED, params) == alone
    options = {"attention_mask": MASK}
    assert fused(model, PADDED, params, **options)[:, 6:].tolist() == alone
    for given in (params, [params] * 3):
        processor = FusedLogitsProcessor(given)
        out = model.generate(
            PADDED, logits_processor=[processor], max_new_tokens=12, **NEUTRAL, **options
        )
        assert out[:, 6:].tolist() == alone
    turned = fused(model, PADDED.flip(0), params, attention_mask=MASK.flip(0))
    assert turned[:, 6:].tolist() == alone[::-1]


def test_sequences_of_one_params_for_all_prompts(model):
    params = SamplingParams(temperature=1.5, seed=7)
    options = NEUTRAL | {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 8}
    want = [ours(model, [row], seeded(params, i), 8)[0] for row in RAGGED for i in range(2)]
    options["attention_mask"] = MASK
    out = model.generate(PADDED, custom_generate=fused_generate, params=params, **options)
    assert out[:, 6:].tolist() == want
    processor = FusedLogitsProcessor(params)
    out = model.generate(PADDED, logits_processor=[processor], **options)
    assert out[:, 6:].tolist() == want


def test_parameters_for_each_row(model):
    rows = [SamplingParams(seed=seed) for seed in (5, 6, 5, 9)]
    options = NEUTRAL | {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 8}
    want = ours(model, PROMPTS.repeat_interleave(2, dim=0), rows, 8)
    out = model.generate(PROMPTS, custom_generate=fused_generate, params=rows, **options)
    assert out[:, 5:].tolist() == want
    out = model.generate(PROMPTS, logits_processor=[FusedLogitsProcessor(rows)], **options)
    assert out[:, 5:].tolist() == want
    with pytest.raises(ValueError, match="got 3 for 4 rows of 2 prompts"):
        model.generate(PROMPTS, custom_generate=fused_generate, params=rows[:3], **options)


def test_padding_is_known_inside_of_generate(model):
    """Without an argument about it, by the mask or by the pad token that ``generate`` has."""
    for options in ({"attention_mask": MASK}, {}):
        penalised = [replace(row, repetition_penalty=5.0) for row in EACH]
        want = ours(model, RAGGED, penalised)
        processor = FusedLogitsProcessor(penalised)
        out = model.generate(
            PADDED, logits_processor=[processor], max_new_tokens=12, **NEUTRAL, **options
        )
        assert out[:, 6:].tolist() == want
        assert fused(model, PADDED, penalised, **options)[:, 6:].tolist() == want


def test_a_next_generate_is_not_taken_for_a_next_step(model):
    """Its prompts are what the last call returned, as where texts go on."""
    processor = FusedLogitsProcessor(EACH[:2])
    options = {"logits_processor": [processor], "max_new_tokens": 4} | NEUTRAL
    out = model.generate(PROMPTS, **options)
    again = model.generate(out, **options)
    assert again[:, out.shape[1] :].tolist() == ours(model, out, EACH[:2], 4)


@pytest.mark.parametrize("row", range(3))
def test_five_tokens_and_five_more_are_ten(model, row):
    params = [
        EACH[row],
        replace(EACH[row], repetition_penalty=2.0, repetition_penalty_scope="output"),
    ]
    ten = ours(model, PROMPTS, params, 10)
    so_far = torch.cat([PROMPTS, torch.tensor(ten)[:, :5]], dim=1)
    outputs = [tokens[:5] for tokens in ten]
    options = NEUTRAL | {"max_new_tokens": 5}
    more = model.generate(
        so_far, custom_generate=fused_generate, params=params, output_ids=outputs, **options
    )
    assert more[:, 5:].tolist() == ten
    processor = FusedLogitsProcessor(params, output_ids=outputs)
    more = model.generate(so_far, logits_processor=[processor], **options)
    assert more[:, 5:].tolist() == ten
    with pytest.raises(ValueError, match="output_ids must be given beside position"):
        fused(model, so_far, params, position=5)
    with pytest.raises(ValueError, match=r"output_ids must be the last ids .* row 1 ends in"):
        fused(model, so_far, params, output_ids=[outputs[0], [1, 2]])


def test_a_position_is_enough_without_penalties_for_the_output(model):
    params = SamplingParams(temperature=2.0, seed=3, repetition_penalty=1.4)
    ten = ours(model, PROMPTS, params, 10)
    so_far = torch.cat([PROMPTS, torch.tensor(ten)[:, :5]], dim=1)
    assert fused(model, so_far, params, position=5, max_new_tokens=5)[:, 5:].tolist() == ten
    processor = FusedLogitsProcessor(params, position=[5, 5])
    more = model.generate(so_far, logits_processor=[processor], max_new_tokens=5, **NEUTRAL)
    assert more[:, 5:].tolist() == ten


def test_each_prompt_has_its_own_options(model):
    each = {
        "max_tokens": [4, 12, 9],
        "min_tokens": [0, 5, 9],
        "stop": [None, "a", ["b", "c"]],
        "stop_token_ids": [[20, 30], None, [40]],
        "logprobs": ["raw", None, "processed"],
    }
    eos = list(range(60, 97))
    params = [replace(row, top_k=20) for row in EACH]
    out = fused(
        model,
        PADDED,
        params,
        attention_mask=MASK,
        eos_token_id=eos,
        stop_tokenizer=BYTES,
        return_dict_in_generate=True,
        **each,
    )
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    want = generate(
        model,
        RAGGED,
        params,
        eos_token_ids=eos,
        tokenizer=BYTES,
        **{names.get(name, name): values for name, values in each.items()},
    )
    for row, done in enumerate(want):
        length = len(done.token_ids)
        steps = out.sequences.shape[1] - 6
        assert out.sequences[row, 6:].tolist() == done.token_ids + [0] * (steps - length)
        assert (out.finish_reasons[row], out.stop_reasons[row]) == (
            done.finish_reason,
            done.stop_reason,
        )
        if done.logprobs is None:
            assert out.logprobs[row].isnan().all()
        else:
            assert out.logprobs[row, :length].tolist() == pytest.approx(done.logprobs, abs=1e-5)
            assert out.logprobs[row, length:].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": [3]}, "max_tokens must have one for each of 2 prompts, got 1"),
        ({"max_tokens": [3, 13]}, "max_tokens must be at most 12, the max_new_tokens of generate"),
        ({"min_tokens": 13}, "min_tokens must be at most max_tokens and the max_new_tokens of"),
        ({"min_tokens": [2, 4], "max_tokens": 3}, "min_tokens must be at most .*, got 4"),
        ({"stop": ["a", None]}, "stop_tokenizer must be given for stop"),
        ({"stop_token_ids": "a"}, "stop_token_ids must be a collection of token ids, got 'a'"),
        ({"check": None}, "check must be True or False, got None"),
    ],
)
def test_options_of_each_prompt_that_cannot_be_honoured(model, options, message):
    with pytest.raises(ValueError, match=message):
        fused(model, PROMPTS, EACH[:2], **options)


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_raw_logprobs_are_of_the_model(model, kind):
    """Whatever other processors do; they change those of the distribution that is drawn from."""
    options = {"suppress_tokens": list(range(60)), "return_dict_in_generate": True}
    out = fused(model, PROMPTS, EACH[:2], logprobs=kind, output_logits=True, **options)
    for step, logits in enumerate(out.logits):
        tokens = out.sequences[:, 5 + step]
        raw = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        is_raw = torch.isclose(out.logprobs[:, step], raw, atol=1e-5)
        assert is_raw.tolist() == ([True] * 2 if kind == "raw" else [False] * 2)


class Bias(transformers.LogitsProcessor):
    """Adds to the logit of a token."""

    def __init__(self, token, bias):
        self.token, self.bias = token, bias

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += self.bias
        return scores


WATERMARK = transformers.WatermarkingConfig(greenlist_ratio=0.25, bias=2.5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (FusedLogitsProcessor, {"repetition_penalty": 1.05}, "repetition_penalty of the .*=1.0"),
        (FusedLogitsProcessor, {"watermarking_config": WATERMARK}, "watermarking_config of the"),
        (FusedLogitsProcessor, {"do_sample": True, "typical_p": 0.5}, "typical_p of the"),
        (FusedLogitsProcessor, {"do_sample": True, "eta_cutoff": 0.1}, "eta_cutoff of the"),
        (FusedLogitsProcessor, {"renormalize_logits": True}, "renormalize_logits of the"),
        (FusedLogitsWarper, {"repetition_penalty": 1.05}, "repetition_penalty of the .*=1.0"),
        (FusedLogitsWarper, {"do_sample": True, "temperature": 0.05}, "temperature of the .*=1.0"),
        (FusedLogitsWarper, {"do_sample": True, "top_k": 50}, "top_k of the .*=0"),
        (FusedLogitsWarper, {"do_sample": True, "top_p": 0.9}, "top_p of the .*=1.0"),
        (FusedLogitsWarper, {"do_sample": True, "min_p": 0.1}, "min_p of the .*=0.0"),
    ],
)
def test_what_the_config_would_apply_too_is_named(model, make, options, message):
    given = NEUTRAL | {"max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, logits_processor=[make(SamplingParams(seed=1))], **given)


def test_what_the_config_has_of_the_filters_changes_nothing(model, monkeypatch):
    """The parameters stand for it, in the three ways, also as the model's own default."""
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.05, top_k=3, top_p=0.3, min_p=0.2, pad_token_id=0
    )
    monkeypatch.setattr(model, "generation_config", config)
    options = {"attention_mask": MASK, "max_new_tokens": 12}
    want = ours(model, RAGGED, EACH)
    out = model.generate(PADDED, custom_generate=fused_generate, params=EACH, **options)
    assert out[:, 6:].tolist() == want
    processor = FusedLogitsProcessor(EACH)
    out = model.generate(PADDED, logits_processor=[processor], **options)
    assert out[:, 6:].tolist() == want


def test_processors_of_the_user_run_before_ours(model):
    """One that wants a single token is honoured; after ours it could not be."""
    processor = FusedLogitsProcessor(SamplingParams(seed=1))
    options = {"max_new_tokens": 3} | NEUTRAL
    out = model.generate(PROMPTS, logits_processor=[Bias(7, 1000.0), processor], **options)
    assert (out[:, 5:] == 7).all()
    with pytest.raises(ValueError, match="must have no Bias after FusedLogitsProcessor"):
        model.generate(PROMPTS, logits_processor=[processor, Bias(7, 1000.0)], **options)


def test_processors_around_the_warper_keep_their_meaning(model):
    params = SamplingParams(top_k=5)
    options = NEUTRAL | {"max_new_tokens": 6, "do_sample": True}
    for order in (
        [Bias(7, 1000.0), FusedLogitsWarper(params)],
        [FusedLogitsWarper(replace(params, top_k=0)), Bias(7, 1000.0)],
    ):
        assert (model.generate(PROMPTS, logits_processor=order, **options)[:, 5:] == 7).all()


def test_raw_logprobs_of_a_processor_need_the_logits_of_the_model(model):
    processor = FusedLogitsProcessor(EACH[:2], logprobs=["processed", "raw"])
    options = NEUTRAL | {"max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"logprobs must not be \"raw\" where another .* \(Bias\)"):
        model.generate(PROMPTS, logits_processor=[Bias(7, 1.0), processor], **options)
    model.generate(PROMPTS, logits_processor=[processor], **options)
    raw, processed = (
        ours_logprobs(model, kind)[row] for row, kind in ((1, "raw"), (0, "processed"))
    )
    assert processor.logprobs[1].tolist() == pytest.approx(raw, abs=1e-5)
    assert processor.logprobs[0].tolist() == pytest.approx(processed, abs=1e-5)


def ours_logprobs(model, kind):
    done = generate(model, PROMPTS, EACH[:2], max_new_tokens=3, ignore_eos=True, logprobs=kind)
    return [row.logprobs for row in done]


@pytest.mark.parametrize("make", [FusedLogitsProcessor, FusedLogitsWarper, None])
@pytest.mark.parametrize(
    "theirs",
    [
        transformers.TemperatureLogitsWarper(2.0),
        transformers.TopKLogitsWarper(2),
        transformers.TopPLogitsWarper(0.5),
        transformers.MinPLogitsWarper(0.5),
        transformers.RepetitionPenaltyLogitsProcessor(1.5),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_processor_that_the_params_replace_is_refused(model, make, theirs):
    """Also where the config has the same one, for which ``generate`` takes the user's."""
    field, off = REPLACED[type(theirs).__name__]
    params = SamplingParams(seed=1)
    given = {"logits_processor": [theirs], "custom_generate": fused_generate, "params": params}
    if make is not None:
        given = {"logits_processor": [theirs, make(params)]}
    match = f"must not have a {type(theirs).__name__} beside params: set {field} there"
    for value in (off, 0.7 if field != "top_k" else 3):
        options = NEUTRAL | {"max_new_tokens": 3, "do_sample": True, field: value}
        with pytest.raises(ValueError, match=match):
            model.generate(PROMPTS, **given, **options)


@pytest.mark.parametrize("first", [FusedLogitsProcessor, FusedLogitsWarper])
@pytest.mark.parametrize("second", [FusedLogitsProcessor, FusedLogitsWarper, None])
def test_two_of_ours_are_refused(model, first, second):
    params = SamplingParams(seed=1)
    given = {"custom_generate": fused_generate, "params": params}
    order = [first(params)]
    if second is not None:
        given = {}
        order.append(second(params))
    options = NEUTRAL | {"max_new_tokens": 3, "logits_processor": order}
    with pytest.raises(ValueError, match="beside params that are applied already"):
        model.generate(PROMPTS, **given, **options)


def test_the_warper_takes_no_ids_where_it_needs_none():
    scores = torch.randn(2, V)
    params = [SamplingParams(top_k=3), SamplingParams(temperature=0.5, logit_bias={4: 3.0})]
    ids = torch.zeros(2, 1, dtype=torch.int64)
    got = FusedLogitsWarper(params)(None, scores)
    assert torch.equal(got, FusedLogitsWarper(params)(ids, scores))
    with pytest.raises(ValueError, match="input_ids must be given where params look at"):
        FusedLogitsWarper(EACH[:2])(None, scores)
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \(rows, length\), got None"):
        FusedLogitsProcessor(params)(None, scores)


@pytest.mark.parametrize("make", [FusedLogitsProcessor, FusedLogitsWarper])
def test_ids_and_scores_of_other_rows(make):
    with pytest.raises(ValueError, match=r"scores must have shape .* with 3 rows, got \(2, 97\)"):
        make(SamplingParams())(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, V))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suppress_tokens", [1, 2]),
        ("forced_eos_token_id", 3),
        ("typical_p", 0.5),
        ("stop_strings", ["a"]),
    ],
)
def test_our_loop_names_what_it_does_not_take_from_the_config(model, monkeypatch, field, value):
    config = transformers.GenerationConfig(do_sample=True, **{field: value})
    monkeypatch.setattr(model, "generation_config", config)
    with pytest.raises(ValueError, match=f"{field} of the generation config cannot be honoured"):
        ours(model, PROMPTS, EACH[:2])
    if field == "stop_strings":
        generate(model, PROMPTS, EACH[:2], tokenizer=BYTES, stop=(), max_new_tokens=1)


#: End tokens that the tiny model draws often.
ENDS = [3, *range(40, 97)]


@pytest.mark.parametrize(
    ("fields", "acts"),
    [
        ({"no_repeat_ngram_size": 2}, True),
        ({"bad_words_ids": [[11], [74, 49], [3]]}, True),
        ({"min_new_tokens": 8, "eos_token_id": ENDS}, True),
        ({"min_length": 11, "eos_token_id": ENDS}, True),
        ({"min_length": 20, "min_new_tokens": 3, "eos_token_id": ENDS}, True),
        ({"min_length": 11, "min_new_tokens": 0, "eos_token_id": ENDS}, False),
        ({"min_length": 2, "eos_token_id": ENDS}, False),
        ({"min_new_tokens": 8}, False),
        ({"no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None}, False),
        ({"no_repeat_ngram_size": 1, "bad_words_ids": [[4], [6]], "min_new_tokens": 99}, True),
    ],
)
def test_our_loop_bans_what_generate_bans_for_a_config(model, monkeypatch, fields, acts):
    """The tokens are those of ``generate``, up to the end of a text, for prompts of 5 and 6 ids."""
    prompts = [PROMPTS[0].tolist(), PROMPTS[1].tolist(), RAGGED[2]]
    greedy = SamplingParams(temperature=0)
    ends = fields.get("eos_token_id")
    plain = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
    asked = transformers.GenerationConfig(pad_token_id=0, **fields)

    def done(config):
        monkeypatch.setattr(model, "generation_config", config)
        rows = generate(model, prompts, greedy, max_new_tokens=12)
        assert {row.stop_reason for row in rows} == {None}
        return [row.token_ids for row in rows]

    got = done(asked)
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        assert tokens == wanted[0, len(prompt) :].tolist()
    assert (got != done(plain)) == acts


def test_params_and_arguments_override_the_rules_of_a_config(model, monkeypatch):
    prompt = RAGGED[2]
    ends = {"eos_token_id": ENDS, "pad_token_id": 0}
    all_rules = transformers.GenerationConfig(
        no_repeat_ngram_size=1, bad_words_ids=[[31]], min_new_tokens=9, **ends
    )

    def drawn(config, params, **options):
        monkeypatch.setattr(model, "generation_config", config)
        (done,) = generate(model, [prompt], params, max_new_tokens=12, **options)
        return done.token_ids

    own = SamplingParams(
        temperature=0,
        no_repeat_ngram_size=4,
        no_repeat_ngram_window=5,
        bad_words=[[2, 31]],
        min_tokens=2,
        stop_token_ids=[ENDS[0]],
    )
    plain = transformers.GenerationConfig(**ends)
    assert drawn(all_rules, own) == drawn(plain, own)
    # each rule by itself
    sizes = transformers.GenerationConfig(no_repeat_ngram_size=1, **ends)
    wanted = drawn(
        sizes, SamplingParams(temperature=0, bad_words=[[31]], min_tokens=9, stop_token_ids=ENDS)
    )
    others = SamplingParams(temperature=0, bad_words=[[31]])
    assert drawn(all_rules, others)[:9] == wanted[:9]
    # the argument of the loop, after which stop strings do not count either
    least = transformers.GenerationConfig(min_new_tokens=9, **ends)
    greedy = SamplingParams(temperature=0)
    assert drawn(least, greedy, min_new_tokens=2) == drawn(plain, greedy, min_new_tokens=2)
    assert len(drawn(least, greedy)) >= 9
    # without end tokens there is nothing to ban
    assert drawn(least, greedy, ignore_eos=True) == drawn(plain, greedy, ignore_eos=True)
    assert drawn(least, greedy, eos_token_ids=()) == drawn(plain, greedy, eos_token_ids=())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0, got -1"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size must be an integer >= 0, got 'x'"),
        ({"bad_words_ids": 5}, "bad_words must be"),
        ({"bad_words_ids": [5]}, r"bad_words\[0\] must be"),
        ({"bad_words_ids": [[-5]]}, r"bad_words\[0\] must be"),
        ({"min_new_tokens": -2, "eos_token_id": 3}, "min_tokens must be an integer >= 0, got -2"),
    ],
)
def test_rules_of_a_config_that_are_out_of_range(model, monkeypatch, fields, message):
    config = transformers.GenerationConfig()
    vars(config).update(fields)
    monkeypatch.setattr(model, "generation_config", config)
    with pytest.raises(ValueError, match=f"the generation config cannot be honoured: {message}"):
        ours(model, PROMPTS, EACH[:2])


@pytest.mark.parametrize("value", ["x", -1, 1.5, [3]])
def test_a_least_length_of_a_config_that_is_none(model, monkeypatch, value):
    config = transformers.GenerationConfig()
    config.min_length = value
    monkeypatch.setattr(model, "generation_config", config)
    with pytest.raises(ValueError, match=r"min_length of the generation config must be an integer"):
        ours(model, PROMPTS, EACH[:2])


def test_the_end_tokens_are_those_of_the_generation_config(model, monkeypatch):
    """Where it says that there is none, the model's own config does not say it again."""
    monkeypatch.setattr(model.config, "eos_token_id", ours(model, PROMPTS, EACH[:2])[0][2])
    config = transformers.GenerationConfig(eos_token_id=None)
    monkeypatch.setattr(model, "generation_config", config)
    done = generate(model, PROMPTS, EACH[:2], max_new_tokens=6)
    assert [len(row.token_ids) for row in done] == [6, 6]


# Parameters from a config


def config(**fields):
    return transformers.GenerationConfig(**fields)


def test_params_from_a_config():
    full = config(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05
    )
    assert params_from_generation_config(full, seed=4) == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05, seed=4
    )
    assert params_from_generation_config(config()) == SamplingParams(temperature=0)
    # end tokens alone are no parameter of sampling
    assert params_from_generation_config(config(eos_token_id=3)) == SamplingParams(temperature=0)
    assert params_from_generation_config(config(do_sample=True)) == SamplingParams(top_k=50)
    # without do_sample there are no filters
    assert params_from_generation_config(config(temperature=0.6, top_p=0.5)) == SamplingParams(
        temperature=0
    )


def test_rules_from_a_config(model):
    """Our loop with these parameters bans what generate bans with the config itself."""
    asked = config(
        no_repeat_ngram_size=2,
        bad_words_ids=[[31], [5, 7], [3]],
        min_new_tokens=8,
        max_new_tokens=24,
        eos_token_id=[3, *range(40, 97)],
        pad_token_id=0,
    )
    params = params_from_generation_config(asked)
    assert params == SamplingParams(
        temperature=0,
        no_repeat_ngram_size=2,
        bad_words=[[31], [5, 7]],  # no end token is one
        min_tokens=8,
        stop_token_ids=[3, *range(40, 97)],
    )
    ids = torch.as_tensor(PROMPTS[0])[None]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
    done = generate(
        model, PROMPTS[:1], params, max_new_tokens=24, eos_token_ids=[3, *range(40, 97)]
    )
    got, texts = [*done[0].token_ids], wanted[0, ids.shape[1] :].tolist()
    assert len(got) >= 8
    assert got == texts[: len(got)]
    assert done[0].finish_reason == "length" or texts[len(got) :] in ([], [done[0].stop_reason])


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 3e-4},
        {"eta_cutoff": 3e-4},
        {"suppress_tokens": [1]},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6},
        {"encoder_repetition_penalty": 1.2},
        {"exponential_decay_length_penalty": (5, 1.1)},
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"forced_eos_token_id": 3},
        {"min_length": 4},
        {"sequence_bias": [[[1], 2.0]]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_that_cannot_be_honoured_is_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} of the generation config cannot be honoured"):
        params_from_generation_config(config(do_sample=True, **fields))


def test_a_value_out_of_its_range_is_named():
    with pytest.raises(ValueError, match="top_p"):
        params_from_generation_config(config(do_sample=True, top_p=1.5))


NOT_ABOUT_SAMPLING = """
max_length max_new_tokens max_time early_stopping stop_strings length_penalty num_return_sequences
num_beam_groups diversity_penalty low_memory use_cache cache_implementation cache_config
return_legacy_cache return_dict_in_generate output_attentions output_hidden_states output_scores
output_logits pad_token_id bos_token_id eos_token_id decoder_start_token_id prefill_chunk_size
compile_config disable_compile is_assistant token_healing num_assistant_tokens
num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size
assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight max_cache_len
transformers_version generation_kwargs continuous_batching_config mtp_layer_indices do_sample
"""


def test_every_field_of_a_config_is_known():
    """Fails where a newer transformers adds fields, which may change the draw."""
    fields = {name for name in vars(config()) if not name.startswith("_")}
    known = set(NOT_ABOUT_SAMPLING.split()) | set(AS_PROCESSORS) | set(NOT_SUPPORTED)
    known |= {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    assert fields - known == set()


# A real model


REAL_PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Q: Why is the sky blue?\nA:",
]


@pytest.mark.model
def test_the_three_ways_on_a_real_model_with_padding(smollm):
    tokenizer, real = smollm.tokenizer, smollm.model
    inputs = tokenizer(REAL_PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    assert not inputs["attention_mask"].bool().all()
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=1),
        SamplingParams(temperature=0),
        SamplingParams(top_k=40, min_p=0.05, frequency_penalty=0.3, seed=3),
        SamplingParams(temperature=1.2, presence_penalty=0.5, top_p=0.8, seed=4),
    ]
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    mask = inputs["attention_mask"]
    fused_ids = real.generate(**inputs, custom_generate=fused_generate, params=params, **options)
    processor = FusedLogitsProcessor(params, attention_mask=mask)
    processed = real.generate(
        **inputs,
        logits_processor=[processor],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        **options,
    )
    ours_ids = generate(
        real, dict(inputs), params, tokenizer=tokenizer, max_new_tokens=24, ignore_eos=True
    )
    assert torch.equal(processed, fused_ids)
    assert fused_ids[:, length:].tolist() == [done.token_ids for done in ours_ids]
    greedy = real.generate(**inputs, do_sample=False, **options)
    assert torch.equal(greedy[1], fused_ids[1])


@pytest.mark.model
def test_stop_strings_on_a_real_model(smollm):
    text = "Tom has a dog. "
    options = {"tokenizer": smollm.tokenizer, "stop": ".", "max_new_tokens": 60}
    params = SamplingParams(temperature=0)
    (one,) = generate(smollm.model, text, params, **options)
    (two,) = generate(smollm.model, text, params, stop_limit=2, **options)
    assert (one.finish_reason, one.stop_reason) == ("stop", ".")
    assert "." not in one.text
    assert two.text.startswith(one.text + ".")
    assert two.text.count(".") == 1
