"""Three ways to a text of a Hugging Face model give the same tokens, whatever the set-up.

``generation.generate``, ``fused_generate`` and ``FusedLogitsProcessor`` get the same prompts,
parameters, seeds and model config, in a batch of any order and padding; and each prompt alone.
``FusedLogitsWarper`` is compared where a draw is certain. The model's logits are rounded, so that
its arithmetic gives a row the same logits in every batch.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toy_tokenizers import transformers

from llm_sampling import SamplingParams
from llm_sampling.generation import generate, rows
from llm_sampling.integrations import generate_call, huggingface
from llm_sampling.integrations.huggingface import (
    FusedLogitsProcessor,
    FusedLogitsWarper,
    fused_generate,
)

V = 61
PAD = 0


class Rounded(transformers.LlamaForCausalLM):
    """Logits of float64 arithmetic on a grid that its rounding errors do not reach."""

    @functools.wraps(transformers.LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = ((output.logits * 1024).round() / 1024).float()
        return output


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.7,
        attn_implementation="eager",
    )
    return Rounded(config).double().eval()


@dataclass(frozen=True)
class SetUp:
    """A batch of prompts, and what surrounds it.

    Attributes:
        prompts: the ids of each, those of its output so far included.
        params: one for all prompts, or one for each.
        outputs: how many of the last ids of each prompt are output.
        n: sequences of each prompt.
        padding: columns of padding beside what unequal lengths need.
        order: the batch's prompts, in another order.
        config: fields of the model's generation config.
        banned: tokens that other processors ban.
        eos: end tokens.
        most: how many new tokens there may be.
        least: how many there are before an end token.
    """

    prompts: list[list[int]]
    params: SamplingParams | list[SamplingParams]
    outputs: list[int]
    n: int
    padding: int
    order: list[int]
    config: dict[str, object]
    banned: list[int]
    eos: list[int]
    most: int
    least: int

    def params_of(self, place):
        return self.params if isinstance(self.params, SamplingParams) else self.params[place]

    def of(self, places):
        """The same set-up with these prompts alone, or in this order."""
        params = self.params
        if not isinstance(params, SamplingParams):
            params = [params[place] for place in places]
        return replace(
            self,
            prompts=[self.prompts[place] for place in places],
            params=params,
            outputs=[self.outputs[place] for place in places],
        )

    @property
    def output_ids(self):
        pairs = zip(self.prompts, self.outputs, strict=True)
        return [prompt[len(prompt) - count :] for prompt, count in pairs]

    def with_params(self, change):
        """The same set-up with other parameters."""
        if isinstance(self.params, SamplingParams):
            return replace(self, params=change(self.params))
        return replace(self, params=[change(params) for params in self.params])


def params():
    """Parameters of every kind, whose seeds often coincide."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 0.5, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 3, 20]),
        top_p=st.sampled_from([1.0, 1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.8, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.9]),
        presence_penalty=st.sampled_from([0.0, 0.0, -0.7]),
        repetition_penalty_scope=st.sampled_from(["all", "output"]),
        penalty_last_n=st.sampled_from([-1, -1, 3]),
        logit_bias=st.sampled_from([None, None, {5: 3.0, 7: -2.0}]),
        seed=st.sampled_from([0, 7, 8, 9, 2**63, 2**64 - 1]),
    )


@st.composite
def set_ups(draw):
    prompts = draw(
        st.lists(st.lists(st.integers(1, V - 1), min_size=1, max_size=6), min_size=1, max_size=3)
    )
    count = len(prompts)
    each = st.lists(params(), min_size=count, max_size=count)
    most = draw(st.integers(1, 4))
    sampled = {
        "temperature": draw(st.sampled_from([1.0, 0.3])),
        "top_k": draw(st.sampled_from([50, 0, 2])),
        "top_p": draw(st.sampled_from([1.0, 0.5])),
        "min_p": draw(st.sampled_from([None, 0.3])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.0, 1.3])),
    }
    return SetUp(
        prompts=prompts,
        params=draw(params() | each),
        outputs=[draw(st.integers(0, len(prompt) - 1)) for prompt in prompts],
        n=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        order=draw(st.permutations(range(count))),
        config=draw(st.sampled_from([{}, sampled])),
        banned=draw(st.sampled_from([[], [], [3, 11, 12]])),
        eos=draw(st.sampled_from([[], list(range(30, 45))])),
        most=most,
        least=draw(st.integers(0, most)),
    )


def banning(params, banned):
    """Parameters that ban tokens as processors of ``generate`` do."""
    if not banned:
        return params
    bias = dict(params.logit_bias or {}) | dict.fromkeys(banned, -torch.inf)
    return replace(params, logit_bias=bias)


def by_our_loop(model, set_up):
    set_up = set_up.with_params(lambda one: banning(one, set_up.banned))
    prompts = [
        prompt[: len(prompt) - count]
        for prompt, count in zip(set_up.prompts, set_up.outputs, strict=True)
    ]
    done = generate(
        model,
        prompts,
        set_up.params,
        n=set_up.n,
        max_new_tokens=set_up.most,
        min_new_tokens=set_up.least,
        eos_token_ids=set_up.eos,
        output_ids=set_up.output_ids,
    )
    return [row.token_ids for row in done]


def by_transformers(model, set_up, **more):
    """The new tokens of each row of ``model.generate``, without what pads rows that have ended."""
    length = max(map(len, set_up.prompts)) + set_up.padding
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in set_up.prompts])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in set_up.prompts])
    options = {
        "attention_mask": mask,
        "max_new_tokens": set_up.most,
        "pad_token_id": PAD,
        "eos_token_id": set_up.eos or None,
        "do_sample": True,
        "num_return_sequences": set_up.n,
        "suppress_tokens": set_up.banned or None,
        # without end tokens generate ignores it, with a warning
        "min_new_tokens": set_up.least if set_up.eos else None,
    }
    out = model.generate(ids, **(options | more))
    return [until_the_end(row, set_up.eos) for row in out[:, length:].tolist()]


def until_the_end(tokens, eos):
    for place, token in enumerate(tokens):
        if token in eos:
            return tokens[: place + 1]
    return tokens


def by_fused_generate(model, set_up):
    given = {"params": set_up.params, "output_ids": set_up.output_ids}
    return by_transformers(model, set_up, custom_generate=fused_generate, **given)


def by_the_processor(model, set_up):
    processor = FusedLogitsProcessor(set_up.params, output_ids=set_up.output_ids)
    return by_transformers(model, set_up, logits_processor=[processor])


def by_the_warper(model, set_up):
    """With the filters of the config turned off, since they would be applied too."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    warper = FusedLogitsWarper(set_up.params, output_ids=set_up.output_ids)
    return by_transformers(model, set_up, logits_processor=[warper], **off)


def of_prompt(found, place, n):
    return found[place * n : (place + 1) * n]


def check(model, set_up):
    config = {"do_sample": True, **set_up.config} if set_up.config else {}
    model.generation_config = transformers.GenerationConfig(**config)
    want = by_our_loop(model, set_up)
    assert by_fused_generate(model, set_up) == want
    if set_up.config.get("repetition_penalty", 1.0) == 1.0:
        assert by_the_processor(model, set_up) == want
    else:
        with pytest.raises(ValueError, match="repetition_penalty of the generation config"):
            by_the_processor(model, set_up)
        model.generation_config.repetition_penalty = 1.0
    turned = set_up.of(set_up.order)
    ways = [by_our_loop, by_fused_generate, by_the_processor]
    way = ways[len(set_up.prompts[0]) % 3]
    found = way(model, turned)
    for row, place in enumerate(set_up.order):
        assert of_prompt(found, row, set_up.n) == of_prompt(want, place, set_up.n)
        assert way(model, set_up.of([place])) == of_prompt(want, place, set_up.n)
    certain = set_up.with_params(lambda one: replace(one, top_k=1, temperature=1.0))
    assert by_the_warper(model, certain) == by_our_loop(model, certain)


def run(model, examples, phases):
    """Check so many set-ups, the same ones in every run."""
    options = {"max_examples": examples, "deadline": None, "derandomize": True, "database": None}
    settings(phases=phases, **options)(given(set_ups())(lambda set_up: check(model, set_up)))()


@pytest.mark.parametrize("examples", [20, 100, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_three_ways_agree(model, examples):
    run(model, examples, [Phase.generate, Phase.shrink])


def seeds_one_after_the_other(monkeypatch):
    def of_sequences(params, n):
        places = enumerate(one for one in params for _ in range(n))
        return [replace(one, seed=(one.seed + place) % 2**64) for place, one in places]

    monkeypatch.setattr(huggingface, "params_of_sequences", of_sequences)


def padding_counts_as_a_token(monkeypatch):
    monkeypatch.setattr(generate_call, "prompt_mask", lambda model, model_kwargs: None)


def texts_begin_at_position_0(monkeypatch):
    right = rows.starts_of_prompts

    def starts(params, position, output_ids):
        positions, outputs = right(params, position, output_ids)
        return [0] * len(positions), outputs

    monkeypatch.setattr(huggingface, "starts_of_prompts", starts)


def the_output_counts_as_prompt(monkeypatch):
    right = rows.new_sampler

    def new_sampler(params, ids, positions, **options):
        return right(params, lambda: (ids()[0], None), positions, **options)

    monkeypatch.setattr(huggingface, "new_sampler", new_sampler)


def other_processors_are_dropped(monkeypatch):
    monkeypatch.setattr(huggingface, "_other_processors", lambda processors, call: processors[:0])


def the_config_s_filters_are_kept(monkeypatch):
    monkeypatch.setattr(huggingface, "_other_processors", lambda processors, call: processors)


@pytest.mark.parametrize(
    "wrong",
    [
        seeds_one_after_the_other,
        padding_counts_as_a_token,
        texts_begin_at_position_0,
        the_output_counts_as_prompt,
        other_processors_are_dropped,
        the_config_s_filters_are_kept,
    ],
)
def test_a_wrong_way_is_seen(model, wrong, monkeypatch):
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        run(model, 100, [Phase.generate])
