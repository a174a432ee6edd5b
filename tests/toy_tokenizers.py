"""Tokenizers small enough to be built where they are used.

A test module that imports this one is skipped where transformers is not installed.
"""

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra 'cli'")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'cli'")


def byte_tokenizer():
    """Return a tokenizer whose tokens are single bytes; a non-ASCII character takes several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


WORDS = ["▁", "▁and", "▁then", "s", ".", "▁,", "th", "▁don", "'t"]


def word_tokenizer():
    """Return a tokenizer that decodes as Llama 2's does.

    A space belongs to the token that follows it, a leading space of the text is dropped, and
    characters that are in no token are spelt as byte tokens.
    """
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True)
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
