"""``llm-sampling chat``: talk with a language model, line by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_sampling import SamplingParams, generation
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.generate import Request, Tally, print_text, stream, write_texts
from llm_sampling.tools.cli.options import (
    constraint,
    constraint_options,
    length_options,
    request_of,
    running,
    running_options,
    sampling_options,
    sampling_params,
    text,
    word_options,
    words,
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
        parents=[
            sampling_options(),
            word_options(),
            length_options(),
            constraint_options(),
            running_options(),
        ],
    )
    parser.add_argument(
        "--system",
        type=text,
        metavar="TEXT",
        help="What the model is told before the first line, as the template's system message.",
    )
    parser.set_defaults(make_request=make_request, run=run)


@dataclass(frozen=True)
class ChatRequest(Request):
    """The options of ``chat``, checked without loading the model.

    Attributes:
        system: the system message, or None for what the template has without one.
    """

    system: str | None


def make_request(options: argparse.Namespace) -> ChatRequest:
    """The command's options, checked."""
    return request_of(
        ChatRequest,
        options,
        prompts=(),
        from_stdin=None,
        chat=True,
        n=1,
        as_json=False,
        params=sampling_params(options),
        constraint=constraint(options),
        words=words(options),
        on=running(options),
    )


def run(request: ChatRequest) -> int:
    """Answer each line of stdin; the exit code."""
    messages = console.messages()
    console.check_stdin()
    language_model = request.on.load(messages, takes_stop_strings=True)
    request = replace(request, params=request.words.added(request.params, language_model))
    said: list[dict[str, str]] = []
    if request.system is not None:
        said.append({"role": "system", "content": request.system})

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
            if tally.errors:
                return
            said.append({"role": "assistant", "content": "".join(answer)})

    # What does not suit the model is refused before the first line is read.
    ids = language_model.encode_chat([*said, {"role": "user", "content": "?"}])
    params, stop_ids = request.params, request.stop_id
    check_fit(language_model, len(ids), request.max_new_tokens, params, stop_ids=stop_ids)
    return write_texts(write, request, language_model, messages)


def _lines(messages: Console) -> Iterator[str]:
    """The lines of stdin that are not blank; on a terminal, with a prompt for each."""
    while True:
        line, asks = "", console.is_terminal(sys.stdin)
        try:
            if asks:
                messages.print("> ", end="", style="bold")
            line = console.read(whole=False)
        finally:
            if asks and not line:  # Ctrl-C or Ctrl-D leaves the cursor behind the prompt
                messages.print()
        if not line:
            return
        if line.strip():
            yield line.strip()
