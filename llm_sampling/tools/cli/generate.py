"""``llm-sampling generate``: continue prompts with a language model.

options -> Request (checked) -> Running.load -> generation.generate_stream -> stdout
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_sampling import InvalidLogitsError, SamplingParams, checks, generation
from llm_sampling.generation import models
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.options import (
    FLAG,
    INTEGER,
    length_options,
    request_of,
    running,
    running_options,
    sampling_options,
    sampling_params,
)
from llm_sampling.tools.cli.running import Running, check_fit

if TYPE_CHECKING:
    from rich.console import Console

    from llm_sampling.tools.cli.options import Commands


@dataclass(frozen=True)
class Request:
    """The options of ``generate`` and of ``chat``, checked without loading the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompts: Sequence[str]
    params: SamplingParams
    chat: bool
    n: int
    max_new_tokens: int
    min_new_tokens: int
    stop: Sequence[str]
    stop_limit: int
    include_stop: bool
    ignore_eos: bool
    as_json: bool
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        checks.integer_at_least("n", self.n, 1)
        checks.integer_at_least("max_new_tokens", self.max_new_tokens, 1)
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in 0 .. max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        StopStrings(self.stop, stop_limit=self.stop_limit)


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "generate",
        help="Continue each PROMPT with a language model.",
        description="Continue each PROMPT with a language model, token by token, on the CPU.",
        parents=[sampling_options(), length_options(), running_options()],
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="The text to continue, or several.")
    add("--chat", **FLAG, help="Put PROMPT into the model's chat template.")
    add(
        "--n",
        **INTEGER,
        default=1,
        help="How many texts for each PROMPT; they use seed, seed + 1, ...",
    )
    add("--json", dest="as_json", **FLAG, help="Write a line of JSON for each text.")
    parser.set_defaults(make_request=make_request, run=run)


def make_request(options: argparse.Namespace) -> Request:
    """The command's options, checked."""
    return request_of(Request, options, params=sampling_params(options), on=running(options))


def run(request: Request) -> int:
    """Generate the texts; the exit code."""
    from rich.text import Text

    messages = console.messages()
    language_model = request.on.load(messages)
    prompts = [language_model.encode(text, chat=request.chat) for text in request.prompts]
    check_fit(language_model, max(map(len, prompts)), request.max_new_tokens, request.params)
    is_one = len(prompts) * request.n == 1 and not request.as_json
    # On a terminal the text continues its prompt, which goes to stderr: it is not output.
    if is_one and messages.is_terminal and sys.stdout.isatty() and not request.chat:
        messages.print(Text(request.prompts[0], style="dim"), end="", soft_wrap=True)

    def write(tally: Tally) -> None:
        counted = tally.count(stream(request, language_model, prompts, request.params))
        if is_one:
            print_text(chunk.text or "" for chunk in counted)
        else:
            _print_texts(request, generation.completions(counted))

    return write_texts(write, request, language_model, messages)


def stream(
    request: Request,
    language_model: models.LanguageModel,
    prompts: list[list[int]],
    params: SamplingParams,
) -> Iterator[generation.Chunk]:
    """``generation.generate_stream`` with the request's options."""
    return generation.generate_stream(
        language_model.model,
        prompts,
        params,
        tokenizer=language_model.tokenizer,
        vocab_size=language_model.vocab_size,
        n=request.n,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        stop=request.stop,
        stop_limit=request.stop_limit,
        include_stop_str_in_output=request.include_stop,
        eos_token_ids=language_model.eos_token_ids,
        ignore_eos=request.ignore_eos,
        backend=request.on.backend,
    )


@dataclass
class Tally:
    """The numbers of the end line.

    Attributes:
        tokens: how many tokens were generated.
        sampler_seconds: the time spent sampling.
    """

    tokens: int = 0
    sampler_seconds: float = 0.0

    def count(self, chunks: Iterator[generation.Chunk]) -> Iterator[generation.Chunk]:
        """Pass the chunks on and count them."""
        step = 0
        for chunk in chunks:
            self.tokens += 1
            if chunk.step != step:  # all chunks of a step tell the time of the whole step
                step = chunk.step
                self.sampler_seconds += chunk.sampler_seconds
            yield chunk


def write_texts(
    write: Callable[[Tally], None],
    request: Request,
    language_model: models.LanguageModel,
    messages: Console,
) -> int:
    """Call ``write``, then print the end line, also after Ctrl-C; the exit code."""
    code, tally = 0, Tally()
    start = time.perf_counter()
    try:
        write(tally)
    except KeyboardInterrupt:
        code = console.EXIT_INTERRUPTED
    except InvalidLogitsError as error:
        console.complain(f"{language_model.name} cannot go on: {error}")
        code = console.EXIT_FAILED
    seconds = time.perf_counter() - start
    messages.print(
        f"{tally.tokens} token{'' if tally.tokens == 1 else 's'} in {seconds:.2f} s: "
        f"{tally.tokens / seconds:.1f} tokens/s, {tally.sampler_seconds / seconds:.1%} of the time "
        f"spent sampling (backend {request.on.backend_name}, seed {request.params.seed})",
        soft_wrap=True,
    )
    return code


def _print_texts(request: Request, completions: Sequence[generation.Completion]) -> None:
    """Write several finished texts: a line of JSON for each, or with an empty line between them."""
    for number, done in enumerate(completions):
        prompt, index = divmod(number, request.n)
        if request.as_json:
            line = {
                "prompt": request.prompts[prompt],
                "index": index,
                "text": done.text,
                "finish_reason": done.finish_reason,
                "stop_reason": done.stop_reason,
                "token_ids": done.token_ids,
                "seed": generation.seeded(request.params, index).seed,
            }
            print_text([json.dumps(line, ensure_ascii=False)])
        else:
            if number > 0:
                sys.stdout.write("\n")
            print_text([done.text or ""])


def print_text(pieces: Iterable[str]) -> None:
    """Write each piece to stdout at once, and end the last line, also after an exception."""
    last = ""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            last = piece or last
    finally:
        if not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
