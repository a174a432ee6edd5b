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


SPECIAL = ["<|im_start|>", "<|im_end|>"]


def _hugging_face(core, **names):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def merged_byte_tokenizer(texts):
    """Return a tokenizer of bytes that are merged, within characters and across their borders."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _hugging_face(core, eos_token="<end>")


def piece_tokenizer(decoder):
    """Return a tokenizer of words and bytes as SentencePiece makes them.

    Args:
        decoder: "strip" drops a leading space of what it decodes, as Llama 2's does, "keep" keeps
            it, as Gemma's does, and "metaspace" is the one of T5, with bytes.
    """
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = "abcdefghijklmnopqrstuvwxyz.,'\N{REPLACEMENT CHARACTER}é끝"
    for piece in [*WORDS, *letters, *("▁" + letter for letter in letters), "▁▁"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", letter) for letter in letters] + [("▁", "▁")]
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = {
        "strip": decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)]),
        "keep": decoders.Sequence(spaces),
        "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    }[decoder]
    return _hugging_face(core, eos_token="<end>")


def word_piece_tokenizer(texts):
    """Return a tokenizer as BERT's: ``##`` continues a word, and the decoder cleans up spaces."""
    characters = sorted(set("".join(texts)) - set(" \t\n"))
    vocab = {"[UNK]": 0}
    for piece in [*characters, *("##" + character for character in characters), "n't", "'s", "do"]:
        vocab.setdefault(piece, len(vocab))
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
    return _hugging_face(core, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def word_end_tokenizer(texts):
    """Return a tokenizer as CLIP's: ``</w>`` ends a word, and is a space before another word."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.decoder = tokenizers.decoders.BPEDecoder(suffix="</w>")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        end_of_word_suffix="</w>",
        special_tokens=["<unk>"],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _hugging_face(core, unk_token="<unk>")
