"""What a text must conform to: the options ``--json-schema`` and ``--regex``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_sampling.generation import models
from llm_sampling.integrations import grammar
from llm_sampling.tools.cli import console


@dataclass(frozen=True)
class Constraint:
    """A JSON schema or a regular expression, checked without loading the model.

    Attributes:
        json_schema: the schema as JSON, or None.
        regex: the regular expression, or None.
        engine: which engine makes the masks.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        ValueError: there is not one of the two, or the engine refuses it.
    """

    json_schema: str | None
    regex: str | None
    engine: grammar.EngineName

    def __post_init__(self) -> None:
        """Check the values."""
        grammar.check(self.engine, json_schema=self.json_schema, regex=self.regex)

    def masks(self, language_model: models.LanguageModel) -> grammar.GrammarMasks:
        """The callback of a loop.

        Raises:
            ModelError: the model's tokenizer does not suit the engine.
        """
        make = {"xgrammar": grammar.xgrammar, "llguidance": grammar.llguidance}[self.engine]
        try:
            return make(language_model.tokenizer, json_schema=self.json_schema, regex=self.regex)
        except ValueError as error:
            raise models.ModelError(f"{language_model.name} has no grammars: {error}") from error


def read_schema(path: Path) -> str:
    """The text of a file with a JSON schema.

    Raises:
        ValueError: it cannot be read, is not a file, is too large, or is not UTF-8.
    """
    name = f"json_schema {str(path)!r}"
    try:
        if path.exists() and not path.is_file():  # to read a FIFO would wait for its writer
            raise ValueError(f"{name} is not a file")
        with path.open("rb") as file:
            content = file.read(console.MOST_INPUT + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > console.MOST_INPUT:
        raise ValueError(f"{name} must have at most {console.MOST_INPUT} bytes, got more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be valid UTF-8: {error.reason}") from error
