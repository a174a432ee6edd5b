"""Tests of ``stream``, the loop over model and sampler."""

import time
from types import SimpleNamespace

import pytest
import torch

from llm_sampling import InvalidLogitsError, SampleOutput, Sampler, SamplingParams, TokenHistory
from llm_sampling.generation import stream
from llm_sampling.sample import sample

VOCAB_SIZE = 97
PROMPTS = torch.tensor([[5, 17, 17, 80, 3], [9, 2, 64, 31, 31]])


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(VOCAB_SIZE)


class Recorder(torch.nn.Module):
    """Forwards calls to a model and records the shapes of inputs and logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.lengths, self.logits = [], []

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        self.lengths.append(input_ids.shape[1])
        output = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        self.logits.append(tuple(output.logits.shape))
        return output


class Script(Sampler):
    """A sampler that returns given tokens, one list per step."""

    num_samples = 1
    rows = 0
    allowed_mask = None

    def __init__(self, steps, seconds=0.0):
        self.steps = iter(steps)
        self.rows = len(steps[0])
        self.seconds = seconds

    def __call__(self, logits):
        time.sleep(self.seconds)
        tokens = torch.tensor(next(self.steps))
        status = torch.where(tokens < 0, 2, 0).to(torch.int32)
        return SampleOutput(tokens, None, status)


def generated(model, prompts, params, max_new_tokens, **options):
    """Return the tokens that ``stream`` generates for each row."""
    history = TokenHistory.from_ids(prompts, None, VOCAB_SIZE)
    sampler = Sampler(params, vocab_size=VOCAB_SIZE, history=history)
    steps = stream(model, prompts, sampler, max_new_tokens=max_new_tokens, **options)
    return [list(row) for row in zip(*(step.tokens for step in steps), strict=True)]


def test_greedy_rows_are_those_of_hugging_face(model):
    want = model.generate(PROMPTS, max_new_tokens=24, do_sample=False, eos_token_id=None)
    got = generated(model, PROMPTS, [SamplingParams(temperature=0)] * 2, 24)
    assert got == want[:, PROMPTS.shape[1] :].tolist()
    assert len(set(got[0])) > 5  # the model does not just repeat itself


def test_sampled_rows_are_those_of_a_loop_without_a_cache(model):
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=11),
        SamplingParams(top_k=20, frequency_penalty=0.5, presence_penalty=0.3, seed=2**63),
    ]
    want = []
    for row, row_params in enumerate(params):
        ids, output = PROMPTS[row].tolist(), []
        for position in range(20):
            with torch.inference_mode():
                logits = model(torch.tensor([ids + output]), use_cache=False).logits[:, -1]
            history = TokenHistory.from_ids([ids], [output], VOCAB_SIZE)
            drawn = sample(logits, row_params, history=history, positions=[position])
            output.append(drawn.tokens.item())
        want.append(output)
    assert generated(model, PROMPTS, params, 20) == want


def test_the_prompt_goes_in_once_and_one_row_of_logits_comes_out(model):
    recorder = Recorder(model)
    generated(recorder, PROMPTS, [SamplingParams(seed=0)] * 2, 4)
    assert recorder.lengths == [PROMPTS.shape[1], 1, 1, 1]
    assert recorder.logits == [(2, 1, VOCAB_SIZE)] * 4


def test_a_model_without_logits_to_keep_gives_the_same(model):
    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    params = [SamplingParams(seed=4), SamplingParams(seed=5)]
    assert generated(Older(), PROMPTS, params, 6) == generated(model, PROMPTS, params, 6)


def test_each_row_ends_at_its_own_end_token(model):
    script = Script([[4, 5], [96, 6], [7, 8], [9, 95], [1, 1]])
    steps = list(stream(model, PROMPTS, script, max_new_tokens=10, eos_token_ids={95, 96}))
    assert [step.tokens for step in steps] == [[4, 5], [96, 6], [-1, 8], [-1, 95]]
    assert [step.ended for step in steps] == [
        [False, False],
        [True, False],
        [True, False],
        [True, True],
    ]


def test_max_new_tokens_ends_the_loop(model):
    steps = list(stream(model, PROMPTS, Script([[4, 5]] * 9), max_new_tokens=3))
    assert [step.tokens for step in steps] == [[4, 5]] * 3
    assert steps[-1].ended == [False, False]


def test_time_is_charged_to_where_it_was_spent(model):
    class Slow(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            time.sleep(0.06)
            return SimpleNamespace(logits=torch.zeros(2, 1, VOCAB_SIZE), past_key_values=())

    for step in stream(Slow(), PROMPTS, Script([[4, 5]] * 2, seconds=0.02), max_new_tokens=2):
        assert step.model_seconds >= 0.06
        assert 0.02 <= step.sampler_seconds < 0.06


def test_a_row_without_a_token_ends_where_the_sampler_does_not_check(model):
    script = Script([[4, 5], [4, -1], [6, 7]])
    steps = list(stream(model, PROMPTS, script, max_new_tokens=3))
    assert [step.tokens for step in steps] == [[4, 5], [4, -1], [6, -1]]
    assert [step.ended for step in steps] == [[False, False], [False, True], [False, True]]


class Spoilt(torch.nn.Module):
    """Logits of which those of one row are NaN from some step on."""

    def __init__(self, row, step):
        super().__init__()
        self.row, self.step, self.calls = row, step, 0

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        self.calls += 1
        logits = torch.zeros(2, 1, VOCAB_SIZE)
        logits[0, 0, 7] = logits[1, 0, 7 if self.calls < 2 else 8] = 9
        if self.calls >= self.step:
            logits[self.row] = torch.nan
        return SimpleNamespace(logits=logits, past_key_values=())


def test_rows_that_have_ended_are_not_looked_at():
    """Row 1 has drawn its end token before its logits become NaN; row 0 goes on."""

    def steps(spoilt, check):
        greedy = [SamplingParams(temperature=0)] * 2
        sampler = Sampler(greedy, vocab_size=VOCAB_SIZE, check=check)
        return list(stream(spoilt, PROMPTS, sampler, max_new_tokens=5, eos_token_ids={8}))

    for check in (True, False):
        got = [step.tokens for step in steps(Spoilt(1, 3), check)]
        assert got == [[7, 7], [7, 8], [7, -1], [7, -1], [7, -1]]
    with pytest.raises(InvalidLogitsError, match="NaN in logits in row 0"):
        steps(Spoilt(0, 3), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must have shape .* got \(2,\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"got \(2, 0\)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer >= 1, got True"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens must be an integer >= 1, got 2\.0"),
        ({"rows": 3}, r"sampler must have one row per row of input_ids \(2\), got 3"),
        ({"num_samples": 2}, "sampler must have num_samples 1, got 2"),
    ],
)
def test_a_bad_argument_is_refused_before_the_first_step(model, change, message):
    sampler = Sampler(
        [SamplingParams()] * change.pop("rows", 2),
        vocab_size=VOCAB_SIZE,
        num_samples=change.pop("num_samples", 1),
    )
    arguments = {"input_ids": PROMPTS, "max_new_tokens": 1} | change
    with pytest.raises(ValueError, match=message):
        stream(model, sampler=sampler, **arguments)


def test_a_model_without_a_cache_is_refused():
    class NoCache(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return SimpleNamespace(logits=torch.zeros(2, 1, VOCAB_SIZE), past_key_values=None)

    with pytest.raises(ValueError, match="model must return a KV cache, NoCache returned none"):
        next(stream(NoCache(), PROMPTS, Script([[4, 5]]), max_new_tokens=1))
