"""The model that a command runs, the backend that draws its tokens, and the number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_sampling import SamplingParams, backends, checks, generation
from llm_sampling.generation import models
from llm_sampling.generation.config import check_config
from llm_sampling.generation.token_sequences import DRY_BREAKERS
from llm_sampling.tools.cli import console

if TYPE_CHECKING:
    from rich.console import Console

CPU = torch.device("cpu")
#: The most threads. OpenMP ends the process where the system gives it fewer than it asks for.
MOST_THREADS = 1024


@dataclass(frozen=True)
class Running:
    """The options of every command that runs a model, checked without loading the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    model_path: Path | None
    backend: str
    threads: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise checks.refusal("threads", f"an integer in 1 .. {MOST_THREADS}", self.threads)
        if self.model_path is not None:
            models.check_path(self.model_path)
        try:
            backends.resolve(self.backend, CPU)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    @property
    def backend_name(self) -> str:
        """The name of the backend, which is the chosen one if ``backend`` is "auto"."""
        return backends.choose(self.backend, CPU).name

    def load(self, messages: Console, *, takes_stop_strings: bool = False) -> models.LanguageModel:
        """Set the number of threads and load the model.

        Args:
            messages: where progress is shown.
            takes_stop_strings: whether the command ends texts at those of the generation config.

        Raises:
            ModelError: the model cannot be loaded, or its generation config asks for what no
                command does.
        """
        path = self.model_path or models.default_model_path()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with console.progress(messages, f"Loading {console.printable(path.name)}") as report:
            language_model = models.load(path, report)
        try:
            config = language_model.model.generation_config
            check_config(config, takes_stop_strings=takes_stop_strings)
        except ValueError as error:
            raise models.ModelError(f"model {str(path)!r} cannot be used: {error}") from error
        return language_model


@dataclass(frozen=True)
class Words:
    """Rules that the command line gives as texts, which are token ids once the model is there.

    Attributes:
        bad_words_text: texts that are never written.
        dry_breakers_text: texts that no repeated sequence goes across.
        dry_breakers_default: whether llama.cpp's breakers are breakers too.

    Raises:
        ValueError: a text is empty.
    """

    bad_words_text: Sequence[str]
    dry_breakers_text: Sequence[str]
    dry_breakers_default: bool

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("bad_words_text", "dry_breakers_text"):
            checks.strings(name, getattr(self, name))

    def added(self, params: SamplingParams, language_model: models.LanguageModel) -> SamplingParams:
        """The parameters with the token sequences of the texts too.

        Raises:
            ModelError: the tokenizer cannot write one of the texts.
        """
        tokenizer = language_model.tokenizer
        words = list(params.bad_words or ())
        try:
            words += generation.bad_words_from(tokenizer, self.bad_words_text)
        except ValueError as error:
            name = language_model.name
            raise models.ModelError(f"bad_words_text does not suit {name}: {error}") from error
        written: list[tuple[int, ...]] = []
        for string in self.dry_breakers_text:  # each alone, so that one without tokens is seen
            found = generation.dry_breakers_from(tokenizer, [string])
            if not found:
                rule = f"a text that tokens of {language_model.name} write"
                raise models.ModelError(str(checks.refusal("dry_breakers_text", rule, string)))
            written += found
        if self.dry_breakers_default:
            written += generation.dry_breakers_from(tokenizer, DRY_BREAKERS)
        # a tokenizer may have tokens that the model never writes
        size = language_model.vocab_size
        breakers = [*(params.dry_breakers or ()), *(ids for ids in written if max(ids) < size)]
        return replace(
            params,
            bad_words=tuple(dict.fromkeys(words)) or None,
            dry_breakers=tuple(dict.fromkeys(breakers)) or None,
        )


def check_fit(
    language_model: models.LanguageModel,
    prompt_tokens: int,
    max_new_tokens: int,
    params: SamplingParams,
    stop_ids: Sequence[int] = (),
) -> None:
    """Check what can only be checked with the model.

    Raises:
        ModelError: the texts do not fit the context, or a biased token or one of ``stop_ids`` is
            not in the vocabulary.
    """
    context = language_model.context_length
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise models.ModelError(
            f"max_new_tokens must leave the prompt's {prompt_tokens} tokens room in the model's "
            f"context of {context}, got {max_new_tokens}"
        )
    named: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias or (),
        "dry_breakers": itertools.chain(*(params.dry_breakers or ())),
        "bad_words": itertools.chain(*(params.bad_words or ())),
        "stop_token_ids": params.stop_token_ids or (),
        "stop_id": stop_ids,
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < language_model.vocab_size:
                raise models.ModelError(
                    f"{name} must name tokens in 0 .. {language_model.vocab_size - 1}, got {token}"
                )
