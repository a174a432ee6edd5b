"""The server of transformers with continuous batching, from the body of a request to its text.

Its handlers are driven without the web server: each body goes through the method that makes a
generation config of it, and through the manager that the handlers call.
"""

import asyncio
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from toy_tokenizers import byte_tokenizer

from llm_sampling import SamplingParams
from llm_sampling.integrations import transformers_serve
from llm_sampling.integrations.engine import find

transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
UTILS = "transformers.cli.serving.utils"


def has(module):
    """Return whether there is a module; its parents are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_server = pytest.mark.skipif(
    not has(UTILS), reason="the server of this transformers has no continuous batching"
)

TOKENIZER = byte_tokenizer()
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def model(tiny_llama):
    model = tiny_llama(len(TOKENIZER))
    model.generation_config = transformers.GenerationConfig(do_sample=True, eos_token_id=-1)
    return model


@pytest.fixture
def restored(monkeypatch):
    """Put the names back that a test replaces."""
    api = "transformers.generation.continuous_batching.continuous_api"
    manager = "ContinuousBatchingManager"
    monkeypatch.setattr(f"{api}.{manager}", find(f"{api}:{manager}"))
    monkeypatch.setattr(f"{api}.gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(f"{UTILS}.CBGenerateManager", find(f"{UTILS}:CBGenerateManager"))
    method = "BaseHandler._build_generation_config"
    monkeypatch.setattr(f"{UTILS}.{method}", find(f"{UTILS}:{method}"))


def serve(model, *groups, stream=False):
    """Return the tokens of requests, given as bodies; those of a group are served together."""
    utils = find(UTILS)
    config = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    manager = utils.CBGenerateManager(config)
    state = SimpleNamespace(_compile=False)
    handler = SimpleNamespace(generation_state=state)

    async def ask(name, body):
        build = utils.BaseHandler._build_generation_config
        config = build(handler, body, model.generation_config, use_cb=True)
        config.max_new_tokens = 12
        if "logit_bias" in body:  # as the handler of chats does
            config.sequence_bias = {(int(k),): v for k, v in body["logit_bias"].items()}
        manager.init_cb(model, config)
        inputs = {"input_ids": PROMPT}
        if not stream:
            _, _, tokens = await manager.generate_non_streaming(
                model, TOKENIZER, inputs, config, name
            )
            return tokens
        queue, streamer = manager.generate_streaming(model, TOKENIZER, inputs, config, name)
        text = ""
        while (piece := await queue.get()) is not None:
            text += piece
        assert streamer.total_tokens == 12
        return text

    async def ask_all():
        answers = []
        for number, group in enumerate(groups):
            requests = [ask(f"{number}-{index}", body) for index, body in enumerate(group)]
            answers.append(await asyncio.gather(*requests))
        return answers

    try:
        return asyncio.run(ask_all())
    finally:
        manager.stop()


SEEDED = {"temperature": 1.0, "seed": 1}
OTHERS = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.3, "seed": 1}]


@needs_server
def test_a_seed_and_a_temperature_are_those_of_the_request(model, restored):
    """transformers' own server keeps neither; the tokens are those of any other loop."""
    ((first,), (_, again, greedy, cold)) = serve(model, [SEEDED], [OTHERS[0], SEEDED, *OTHERS[1:]])
    assert first != again
    assert greedy != serve(model, [OTHERS[1]])[0][0]
    transformers_serve.replace_names()
    ((first,), (_, again, greedy, cold)) = serve(model, [SEEDED], [OTHERS[0], SEEDED, *OTHERS[1:]])
    assert first == again
    assert first != cold
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    assert greedy == model.generate(ids, **options)[0, len(PROMPT) :].tolist()
    fused = find("llm_sampling.integrations.huggingface:fused_generate")
    options["custom_generate"] = fused
    for tokens, params in ((first, SamplingParams(seed=1)), (cold, SamplingParams(0.3, seed=1))):
        expected = model.generate(ids, params=params, **options)[0, len(PROMPT) :]
        assert tokens == expected.tolist()


@needs_server
def test_streams_get_the_same(model, restored):
    transformers_serve.replace_names()
    ((streamed, _),) = serve(model, [SEEDED, OTHERS[0]], stream=True)
    ((tokens,),) = serve(model, [SEEDED])
    # the bytes of a character that is not complete are not streamed
    text = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert text.startswith(streamed)
    assert text[len(streamed) :].strip("\ufffd") == ""
    assert len(streamed) > 3


@needs_server
def test_biases_and_seeds_of_every_kind(model, restored):
    """The biases of one request are not the next one's."""
    transformers_serve.replace_names()
    biased = SEEDED | {"logit_bias": {"70": 100.0}, "seed": -5}
    ((first,), (second,), (large,)) = serve(
        model, [biased], [SEEDED | {"seed": -5}], [SEEDED | {"seed": 2**64 - 5}]
    )
    assert first == [70] * 12
    assert second == large != first


@needs_server
def test_what_cannot_be_honoured_is_an_error_of_the_request(model, restored, monkeypatch):
    class RefusedError(Exception):
        """Stands in for fastapi's HTTPException, which answers the request with a status."""

        def __init__(self, status_code, detail):
            super().__init__(f"{status_code}: {detail}")

    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=RefusedError))
    transformers_serve.replace_names()
    body = {"generation_config": '{"typical_p": 0.5, "do_sample": true}'}
    with pytest.raises(RefusedError, match="400: typical_p of the generation config"):
        serve(model, [SEEDED], [body])


@needs_server
def test_the_command_is_transformers_serve(restored, monkeypatch):
    seen = []
    monkeypatch.setattr("transformers.cli.transformers.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["transformers_serve.py", "MODEL", "--continuous-batching"])
    transformers_serve.main()
    assert seen == [["transformers", "serve", "MODEL", "--continuous-batching"]]
    assert find(f"{UTILS}:CBGenerateManager").__name__ == "PerRequest"


@needs_server
@pytest.mark.parametrize("place", transformers_serve.RELIANCE.places)
def test_a_place_with_other_names_is_found(place, restored, monkeypatch):
    module, _, names = place.partition(":")
    owner, _, name = names.rpartition(".")
    monkeypatch.setattr(find(f"{module}:{owner}"), name, lambda: None)
    with pytest.raises(RuntimeError, match=f"transformers serve keeps its own sampler: .*{name}"):
        transformers_serve.replace_names()


def test_a_transformers_without_this_server_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, UTILS, None)
    with pytest.raises(RuntimeError, match="transformers serve keeps its own sampler: "):
        transformers_serve.replace_names()
