"""The command ``llm-sampling``: generate, chat, explain, tune and info.

    words -> options -> the command's request (checked) -> the command's run -> exit code

Exit codes: 0 done; 1 something is missing or failed; 2 a bad value; 130 interrupted; 141 the reader
of stdout has gone. One line on stderr says what is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llm_sampling.generation import models
from llm_sampling.tools.cli import chat, console, explain, generate, info, tune
from llm_sampling.tools.cli.console import EXTRA_PACKAGES, TUNE_PACKAGES
from llm_sampling.tools.cli.options import Parser, options_first

__all__ = ["EXTRA_PACKAGES", "TUNE_PACKAGES", "main"]


#: Set to anything, this environment variable gives the traceback of an error that has no message of
#: its own.
TRACEBACK = "LLM_SAMPLING_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code."""
    try:
        console.hold_closed_descriptors()
        return console.flushed(_run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # another one, after that which ended the command
        return console.interrupted()
    finally:
        if argv is None:  # the process ends here
            console.end_without_a_word()


def _run(words: Sequence[str]) -> int:
    """Run a command line; what it raises becomes one line on stderr and an exit code."""
    # Read when transformers is imported. Models are local files in any case; this makes sure.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        options = parse(words)
        if options is None:
            return 0
        if not getattr(options, "engines", False):  # an engine's environment may lack the extra
            console.require("cli", EXTRA_PACKAGES)
        try:
            request = options.make_request(options)
        except ValueError as error:
            raise console.CommandError(str(error), console.EXIT_BAD_VALUE) from error
        console.check_stdout()
        return int(options.run(request))
    except console.CommandError as error:
        console.complain(str(error))
        return error.exit_code
    except (ModuleNotFoundError, models.NotInstalledError) as error:
        console.complain(str(error))
        return console.EXIT_FAILED
    except models.ModelError as error:
        console.complain(str(error))
        return console.EXIT_BAD_VALUE
    except BrokenPipeError:
        return console.closed_pipe()
    except KeyboardInterrupt:
        return console.interrupted()
    except MemoryError as error:
        console.complain(f"there is not enough memory{f': {error}' if str(error) else ''}")
        return console.EXIT_FAILED
    except Exception as error:  # what no message was written for: other libraries raise anything
        if TRACEBACK in os.environ:
            raise
        console.complain(f"{type(error).__name__}: {error} ({TRACEBACK}=1 shows where)")
        return console.EXIT_FAILED


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The options of a command line; None if it asked for help, which has been printed.

    Besides its options, ``literal`` is the number of words after ``--``.

    Raises:
        CommandError: the command line is not understood.
    """
    parser = Parser(prog="llm-sampling", description="Exact sampling of language-model logits.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (generate, chat, explain, tune, info):
        module.add_parser(commands)
    try:
        if words and words[0] in commands.choices:
            command = commands.choices[words[0]]
            options = command.parse_args(options_first(command, words[1:]))
            options.literal = len(words) - words.index("--") - 1 if "--" in words else 0
            return options
        return parser.parse_args(words)
    except SystemExit:  # argparse's way to end after --help
        return None
