"""The command ``llm-sampling``: generate, chat, explain, tune and info.

    words -> options -> the command's request (checked) -> the command's run -> exit code

Exit codes: 0 done; 1 something is missing or failed; 2 a bad value, which one line names; 130
interrupted; 141 the reader of stdout has gone.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code."""
    # Read when transformers is imported. Models are local files in any case; this makes sure.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        console.require("cli", EXTRA_PACKAGES)
        options = parse(sys.argv[1:] if argv is None else argv)
        if options is None:
            return 0
        try:
            request = options.make_request(options)
        except ValueError as error:
            raise console.CommandError(str(error), console.EXIT_BAD_VALUE) from error
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


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The options of a command line; None if it asked for help, which has been printed.

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
            return command.parse_args(options_first(command, words[1:]))
        return parser.parse_args(words)
    except SystemExit:  # argparse's way to end after --help
        sys.stdout.flush()
        return None
