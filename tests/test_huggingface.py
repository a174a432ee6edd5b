"""The processors inside transformers' own ``generate``."""

from dataclasses import replace

import pytest
import torch

from llm_sampling import InvalidLogitsError, SamplingParams
from llm_sampling.generation import generate, seeded

transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
from llm_sampling.integrations.huggingface import FusedLogitsProcessor, FusedLogitsWarper  # noqa: E402

V = 97
PROMPTS = torch.tensor([[5, 17, 17, 80, 3], [9, 2, 64, 31, 31]])
RAGGED = [[5, 17, 80], [9], [4, 4, 64, 31, 31, 2]]
PADDED = torch.tensor([[0] * (6 - len(row)) + row for row in RAGGED])
MASK = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in RAGGED])
#: So that nothing of Hugging Face's own follows.
NEUTRAL = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "eos_token_id": None}

EACH = [
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.4, seed=3),
    SamplingParams(temperature=0),
    SamplingParams(
        top_k=9, min_p=0.02, frequency_penalty=0.6, presence_penalty=0.4, seed=2**64 - 1
    ),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


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
    """Id 0 in the middle of a prompt is no padding."""
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
    """The control of the two tests above: id 0 would be penalised."""
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
    """``generate`` gives ids of width 0 first."""
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
    # what was returned, and goes on: it looks like the next step
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
    """A filter that leaves one token makes the draw certain."""
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
    # each token once, however often it is there
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
    # transformers keeps all that are equal to the k-th; here they are exactly k, by their ids
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
    """transformers' InfNanRemove changes them; here NaN cannot be drawn and +inf is the largest."""
    with pytest.raises(InvalidLogitsError):
        FusedLogitsProcessor(SamplingParams())(
            torch.tensor([[0]]), torch.tensor([[0.0, 0.7, 0.8, torch.nan]])
        )
    out = FusedLogitsWarper(SamplingParams())(
        torch.tensor([[0], [0]]),
        torch.tensor([[0.0, 0.7, 0.8, torch.nan], [0.1, torch.inf, 0.3, -torch.inf]]),
    )
    assert torch.equal(out[0], torch.tensor([0.0, 0.7, 0.8, -torch.inf]))
    assert out[1, 1] == torch.inf


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
