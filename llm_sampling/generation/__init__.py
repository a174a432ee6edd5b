"""Generation loops on a causal language model, and their tokens as text while they come.

    prompts -> model -> logits -> Sampler -> Step -> RowText -> Chunk

:func:`generate` and :func:`generate_stream` do all of it, :func:`stream` goes up to the Step.
They work with any Hugging Face causal LM, or any callable, and import neither transformers nor a
tokenizer. :mod:`llm_sampling.generation.models` loads local models and needs the extra ``cli``.
"""

from llm_sampling.generation.loop import (
    Chunk,
    Completion,
    Step,
    completions,
    generate,
    generate_stream,
    stream,
)
from llm_sampling.generation.rows import seeded
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.generation.text import TextDecoder
from llm_sampling.generation.token_sequences import bad_words_from, dry_breakers_from

__all__ = [
    "Chunk",
    "Completion",
    "Step",
    "StopStrings",
    "TextDecoder",
    "bad_words_from",
    "completions",
    "dry_breakers_from",
    "generate",
    "generate_stream",
    "seeded",
    "stream",
]
