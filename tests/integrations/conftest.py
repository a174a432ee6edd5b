"""A small model for engines, and stand-ins for engines that are not installed."""

import sys

import fake_vllm
import pytest
import torch

from llm_sampling.integrations.vllm import SWITCH


@pytest.fixture(autouse=True)
def seeded_logits():
    """The same random logits in every run: tests compare tokens that must differ, too."""
    torch.manual_seed(0)


@pytest.fixture
def vllm_package(tmp_path, monkeypatch):
    """A function that writes a stand-in for vLLM, with changes; its imports are undone after."""
    meta_path = list(sys.meta_path)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if is_vllm(name)}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(SWITCH, "1")
    yield lambda *changes: fake_vllm.write(tmp_path, *changes)
    sys.meta_path[:] = meta_path
    for name in filter(is_vllm, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(real)


def is_vllm(name):
    return name.partition(".")[0] == "vllm"


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory):
    """A folder with a random Llama over bytes, of a size that every engine's attention supports."""
    import transformers
    from toy_tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
