"""``llm-sampling chat``: talk with a language model, line by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_sampling import SamplingParams, generation
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.generate import Request, Tally, print_text, stream, write_texts
from llm_sampling.tools.cli.options import (
    length_options,
    request_of,
    running,
    running_options,
    sampling_options,
    sampling_params,
)
from llm_sampling.tools.cli.running import check_fit

if TYPE_CHECKING:
    from rich.console import Console

    from llm_sampling.tools.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "chat",
        help="Talk with a language model.",
        description="Talk with a language model: it answers each line of the input, and knows "
        "those before.",
        parents=[sampling_options(), length_options(), running_options()],
    )
    parser.set_defaults(make_request=make_request, run=run)


def make_request(options: argparse.Namespace) -> Request:
    """The command's options, checked."""
    shared = {"params": sampling_params(options), "on": running(options)}
    return request_of(Request, options, prompts=(), chat=True, n=1, as_json=False, **shared)


def run(request: Request) -> int:
    """Answer each line of stdin; the exit code."""
    messages = console.messages()
    language_model = request.on.load(messages)
    said: list[dict[str, str]] = []

    def write(tally: Tally) -> None:
        for turn, line in enumerate(_lines(messages)):
            said.append({"role": "user", "content": line})
            ids = language_model.encode_chat(said)
            check_fit(language_model, len(ids), request.max_new_tokens, request.params)
            params = generation.seeded(request.params, turn)
            answer: list[str] = []

            def pieces(
                params: SamplingParams = params, ids: list[int] = ids, answer: list[str] = answer
            ) -> Iterator[str]:
                for chunk in tally.count(stream(request, language_model, [ids], params)):
                    answer.append(chunk.text or "")
                    yield answer[-1]

            print_text(pieces())
            said.append({"role": "assistant", "content": "".join(answer)})

    # A model without a chat template is refused before the first line is read.
    language_model.encode_chat([{"role": "user", "content": "?"}])
    return write_texts(write, request, language_model, messages)


def _lines(messages: Console) -> Iterator[str]:
    """The lines of stdin that are not blank; on a terminal, with a prompt for each."""
    while True:
        line, asks = "", sys.stdin.isatty()
        try:
            if asks:
                messages.print("> ", end="", style="bold")
            line = sys.stdin.readline()
        finally:
            if asks and not line:  # Ctrl-C or Ctrl-D leaves the cursor behind the prompt
                messages.print()
        if not line:
            return
        if line.strip():
            yield line.strip()
