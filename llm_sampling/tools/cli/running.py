"""The model that a command runs, the backend that draws its tokens, and the number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_sampling import SamplingParams, backends, checks
from llm_sampling.generation import models
from llm_sampling.generation.config import check_config
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
