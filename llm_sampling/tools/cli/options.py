"""Command-line options: the parser, and the groups of options that several commands share.

Each group is a parent parser, for argparse's ``parents=``, with a function that turns its parsed
options into what the commands use.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from llm_sampling import SamplingParams, backends, checks
from llm_sampling.fields import FIELDS
from llm_sampling.generation import models
from llm_sampling.integrations import grammar
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.constraint import Constraint, read_schema
from llm_sampling.tools.cli.running import Running, Words

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

Request = TypeVar("Request")

#: The most texts of one prompt: they are rows of one batch, and more would exhaust the memory.
MOST_TEXTS = 65536


def text(word: str) -> str:
    """A word of the command line that is text, and not a path.

    Raises:
        ArgumentTypeError: its bytes are neither text in the locale's encoding nor UTF-8.
    """
    try:
        return console.text_of(word, sys.getfilesystemencoding())
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"must be valid UTF-8, got {word!r}") from None


#: Arguments of ``add_argument`` for an integer, for any number, and for a pair ``--x``, ``--no-x``.
INTEGER: dict[str, Any] = {"type": int, "metavar": "INT"}
NUMBER: dict[str, Any] = {"type": float, "metavar": "FLOAT"}
FLAG: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except those that mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises a CommandError where argparse would print the usage and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise console.CommandError(message, console.EXIT_BAD_VALUE)

    def print_help(self, file: object = None) -> None:
        """Write the help to stdout; argparse would take stderr for a stdout that is closed."""
        console.write(self.format_help())


def options_first(parser: Parser, words: Sequence[str]) -> list[str]:
    """A command's words, the options before the positional arguments, values joined by ``=``.

    argparse by itself reads only the first of several runs of positional arguments, and takes a
    value such as ``-1e-5`` or ``---`` for an option.
    """
    with_value = {
        flag for action in parser._actions if action.nargs is None for flag in action.option_strings
    }
    options: list[str] = []
    positional: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            positional += [word, *rest]
        elif word.startswith("-") and word != "-":
            if word in with_value:
                word = "=".join([word, *itertools.islice(rest, 1)])
            name, _, value = word.partition("=")
            if value == "--":  # argparse drops it, in some versions of Python
                parser.error(f"argument {name}: invalid value: '--'")
            options.append(word)
        else:
            positional.append(word)
    return options + positional


def request_of(kind: Callable[..., Request], options: argparse.Namespace, **more: Any) -> Request:
    """A request, a dataclass: its fields are ``more``, and the options of the same names.

    Raises:
        ValueError: a value is out of its range.
    """
    names = {field.name for field in fields(kind)} - more.keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names}, **more)


def check_texts(name: str, count: int) -> None:
    """A ValueError if the number of texts is not in 1 .. MOST_TEXTS."""
    checks.integer_at_least(name, count, 1)
    if count > MOST_TEXTS:
        raise checks.refusal(name, f"at most {MOST_TEXTS}", count)


def sampling_options() -> Parser:
    """The fields of SamplingParams."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("how a token is drawn")
    for name, field in FIELDS.items():
        kind = INTEGER if field.is_integer else NUMBER
        if field.choices:
            kind = {"choices": field.choices}
        elif field.kind == "bias":
            kind = {"action": "append", "metavar": "ID=BIAS"}
        elif field.kind == "sequences":
            kind = {"action": "append", "metavar": "ID,ID"}
        off = [] if field.kind in ("bias", "sequences") else field.off
        group.add_argument(f"--{name.replace('_', '-')}", **kind, default=off, help=field.help)
    return parser


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The parameters that :func:`sampling_options` has read.

    Raises:
        ValueError: a value is out of its range.
    """
    values = {name: getattr(options, name) for name in FIELDS}
    values["logit_bias"] = _parse_logit_bias(options.logit_bias)
    for name in ("dry_breakers", "bad_words"):
        values[name] = [_parse_ids(name, entry) for entry in values[name]]
    stop_ids = [_parse_ids("stop_token_ids", entry) for entry in options.stop_token_ids]
    values["stop_token_ids"] = [token for ids in stop_ids for token in ids]
    # Named here, since for SamplingParams "left out" is None; elsewhere -1 is a new one each time.
    if options.seed is not None and not 0 <= options.seed < 2**64:
        raise ValueError(
            "seed must be an integer in [0, 2^64), or left out for a new one each time, "
            f"got {options.seed}"
        )
    if options.seed is None:
        # Not left to torch's default generator, which begins with the same seed in every process.
        values["seed"] = secrets.randbits(32)
    return SamplingParams(**values)


def _parse_ids(name: str, entry: str) -> list[int]:
    """``"5,7"`` as token ids.

    Raises:
        ValueError: an entry has another form.
    """
    try:
        return [int(token) for token in entry.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be ID,ID, got {entry!r}") from None


def _parse_logit_bias(entries: Sequence[str]) -> dict[int, float] | None:
    """``["5=1.5", ...]`` as a mapping.

    Raises:
        ValueError: an entry has another form, or a token occurs twice.
    """
    biases: dict[int, float] = {}
    for entry in entries:
        token, separator, bias = entry.partition("=")
        try:
            if not separator:
                raise ValueError
            token_id, value = int(token), float(bias)
        except ValueError:
            raise ValueError(f"logit_bias must be ID=BIAS, got {entry!r}") from None
        if token_id in biases:
            raise ValueError(f"logit_bias must name a token once, got token {token_id} again")
        biases[token_id] = value
    return biases or None


def word_options() -> Parser:
    """Rules of SamplingParams as texts, for commands with a tokenizer."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("the same as texts of the model's tokenizer")
    for name, help_ in (
        ("bad-words", "Never write this text, with or without a space before it; repeatable."),
        ("dry-breakers", "No repeated sequence goes across this text; repeatable."),
    ):
        group.add_argument(
            f"--{name}-text", action="append", type=text, default=[], metavar="TEXT", help=help_
        )
    group.add_argument(
        "--dry-breakers-default",
        **FLAG,
        help="No repeated sequence goes across a new line, a colon, a quotation mark or an "
        "asterisk, as in llama.cpp.",
    )
    return parser


def words(options: argparse.Namespace) -> Words:
    """What :func:`word_options` has read.

    Raises:
        ValueError: a text is empty.
    """
    return request_of(Words, options)


def length_options() -> Parser:
    """Where a text ends."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("where a text ends")
    add = group.add_argument
    add("--max-new-tokens", **INTEGER, default=128, help="Stop after this many tokens.")
    add(
        "--min-new-tokens",
        **INTEGER,
        default=0,
        help="No end token and no stop string counts in this many tokens.",
    )
    add(
        "--stop",
        action="append",
        type=text,
        default=[],
        metavar="TEXT",
        help="End before this text; repeatable.",
    )
    add(
        "--stop-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="End at the token of this id, as at the model's end token; repeatable.",
    )
    add(
        "--stop-limit",
        **INTEGER,
        default=1,
        help="End at this occurrence of a stop text: 2 with '.' is two sentences.",
    )
    add("--include-stop", **FLAG, help="Write the stop text too.")
    add("--ignore-eos", **FLAG, help="Go on after the model's end token.")
    return parser


def constraint_options() -> Parser:
    """What a text must conform to."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("what a text must conform to (needs the extra 'grammar')")
    group.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="Write JSON that conforms to the JSON schema in this file.",
    )
    group.add_argument(
        "--regex", type=text, metavar="REGEX", help="Write a text that matches this, as a whole."
    )
    group.add_argument(
        "--grammar-engine",
        choices=grammar.ENGINES,
        help=f"What makes the masks. Default: {grammar.ENGINES[0]}.",
    )
    return parser


def constraint(options: argparse.Namespace) -> Constraint | None:
    """What :func:`constraint_options` has read; None if there is none.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        ValueError: a value cannot be honoured.
    """
    path, regex, engine = options.json_schema, options.regex, options.grammar_engine
    if path is None and regex is None:
        if engine is not None:
            raise ValueError(f"grammar_engine needs json_schema or regex, got {engine!r} alone")
        return None
    if path is not None and regex is not None:
        raise ValueError("json_schema and regex must not be given together")
    if options.ignore_eos:
        raise ValueError(
            "ignore_eos must not be given beside json_schema or regex: after such a text there is "
            "nothing but its end token"
        )
    schema = None if path is None else read_schema(path)
    return Constraint(schema, regex, grammar.ENGINES[0] if engine is None else engine)


def running_options() -> Parser:
    """The model, the backend and the threads."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("what runs")
    group.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="A local Hugging Face directory or GGUF file. "
        f"Default: SmolLM2-135M-Instruct, from the package {models.DEFAULT_MODEL_PACKAGE}.",
    )
    names = ", ".join(("auto", *backends.BACKENDS))
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help=f"What draws the tokens: {names}."
    )
    group.add_argument("--threads", **INTEGER, help="CPU threads. Default: torch's.")
    return parser


def running(options: argparse.Namespace) -> Running:
    """What :func:`running_options` has read.

    Raises:
        ValueError: a value is out of its range.
    """
    return Running(options.model, options.backend, options.threads)
