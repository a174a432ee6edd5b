"""``llm-sampling generate``: continue prompts with a language model.

options -> Request (checked) -> Running.load -> generation.generate_stream -> stdout
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llm_sampling import SamplingParams, checks, generation
from llm_sampling.generation import models
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.tools.cli import console
from llm_sampling.tools.cli.constraint import Constraint
from llm_sampling.tools.cli.options import (
    FLAG,
    INTEGER,
    check_texts,
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
from llm_sampling.tools.cli.running import Running, Words, check_fit

if TYPE_CHECKING:
    from rich.console import Console

    from llm_sampling.tools.cli.options import Commands


@dataclass(frozen=True)
class Request:
    """The options of ``generate`` and of ``chat``, checked without loading the model.

    Attributes:
        prompts: the prompts of ``generate``.
        from_stdin: the index of the prompt whose text is on stdin, or None.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompts: Sequence[str]
    from_stdin: int | None
    params: SamplingParams
    chat: bool
    n: int
    max_new_tokens: int
    min_new_tokens: int
    stop: Sequence[str]
    stop_id: Sequence[int]
    stop_limit: int
    include_stop: bool
    ignore_eos: bool
    as_json: bool
    constraint: Constraint | None
    words: Words
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        check_texts("n", self.n)
        checks.integer_at_least("max_new_tokens", self.max_new_tokens, 1)
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in 0 .. max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        StopStrings(self.stop, stop_limit=self.stop_limit)
        for token in self.stop_id:
            checks.integer_at_least("stop_id", token, 0)


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "generate",
        help="Continue each PROMPT with a language model.",
        description="Continue each PROMPT with a language model, token by token, on the CPU.",
        parents=[
            sampling_options(),
            word_options(),
            length_options(),
            constraint_options(),
            running_options(),
        ],
    )
    add = parser.add_argument
    add(
        "prompts",
        nargs="+",
        type=text,
        metavar="PROMPT",
        help="The text to continue, or several; - reads one from stdin.",
    )
    add("--chat", **FLAG, help="Put PROMPT into the model's chat template.")
    add(
        "--n",
        **INTEGER,
        default=1,
        help="How many texts for each PROMPT; the first has the seed, the others have their own.",
    )
    add("--json", dest="as_json", **FLAG, help="Write a line of JSON for each text.")
    parser.set_defaults(make_request=make_request, run=run)


def make_request(options: argparse.Namespace) -> Request:
    """The command's options, checked."""
    read = [
        index
        for index, prompt in enumerate(options.prompts[: len(options.prompts) - options.literal])
        if prompt == "-"
    ]
    if len(read) > 1:
        raise ValueError("PROMPT may be - once, since there is one stdin; after -- it is a text")
    return request_of(
        Request,
        options,
        from_stdin=read[0] if read else None,
        params=sampling_params(options),
        constraint=constraint(options),
        words=words(options),
        on=running(options),
    )


def run(request: Request) -> int:
    """Generate the texts; the exit code."""
    from rich.text import Text

    messages = console.messages()
    if request.from_stdin is not None:
        given = list(request.prompts)
        given[request.from_stdin] = console.read(whole=True).removesuffix("\n")
        request = replace(request, prompts=given, from_stdin=None)
    language_model = request.on.load(messages, takes_stop_strings=True)
    request = replace(request, params=request.words.added(request.params, language_model))
    prompts = [language_model.encode(prompt, chat=request.chat) for prompt in request.prompts]
    longest = max(map(len, prompts))
    check_fit(
        language_model, longest, request.max_new_tokens, request.params, stop_ids=request.stop_id
    )
    is_one = len(prompts) * request.n == 1 and not request.as_json
    # On a terminal the text continues its prompt, which goes to stderr: it is not output.
    if is_one and messages.is_terminal and console.is_terminal(sys.stdout) and not request.chat:
        prompt = console.printable(request.prompts[0])
        messages.print(Text(prompt, style="dim"), end="", soft_wrap=True)

    def write(tally: Tally) -> None:
        counted = tally.count(stream(request, language_model, prompts, request.params))
        if is_one:
            print_text(chunk.text or "" for chunk in counted)
        else:
            _print_texts(request, counted)

    return write_texts(write, request, language_model, messages)


def stream(
    request: Request,
    language_model: models.LanguageModel,
    prompts: list[list[int]],
    params: SamplingParams,
) -> Iterator[generation.Chunk]:
    """``generation.generate_stream`` with the request's options.

    Without stop texts of its own a request has those of the model's generation config.
    """
    masks = None if request.constraint is None else request.constraint.masks(language_model)
    declared = getattr(language_model.model.generation_config, "stop_strings", None)
    return generation.generate_stream(
        language_model.model,
        prompts,
        params,
        tokenizer=language_model.tokenizer,
        vocab_size=language_model.vocab_size,
        n=request.n,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        stop=request.stop or declared or (),
        stop_limit=request.stop_limit,
        include_stop_str_in_output=request.include_stop,
        stop_token_ids=request.stop_id,
        eos_token_ids=language_model.eos_token_ids,
        ignore_eos=request.ignore_eos,
        backend=request.on.backend,
        allowed_mask=masks,
    )


@dataclass
class Tally:
    """The numbers of the end line.

    Attributes:
        tokens: how many tokens were generated.
        sampler_seconds: the time spent sampling.
        errors: what was wrong with the model's logits in texts that ended for it.
    """

    tokens: int = 0
    sampler_seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    def count(self, chunks: Iterator[generation.Chunk]) -> Iterator[generation.Chunk]:
        """Pass the chunks on and count them."""
        step = 0
        for chunk in chunks:
            if chunk.finish_reason == "error":
                self.errors.append(f"{chunk.stop_reason} in text {chunk.index}")
            else:
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
    if tally.errors:
        console.complain(f"{language_model.name} cannot go on: {'; '.join(tally.errors)}")
        code = code or console.EXIT_FAILED
    seconds = time.perf_counter() - start
    messages.print(
        f"{tally.tokens} token{'' if tally.tokens == 1 else 's'} in {seconds:.2f} s: "
        f"{tally.tokens / seconds:.1f} tokens/s, {tally.sampler_seconds / seconds:.1%} of the time "
        f"spent sampling (backend {request.on.backend_name}, seed {request.params.seed})",
        soft_wrap=True,
    )
    return code


def _print_texts(request: Request, chunks: Iterator[generation.Chunk]) -> None:
    """Write several texts when all are done, or as far as they are when something ends them.

    Each is a line of JSON, or there is an empty line between two.
    """
    rows: list[list[generation.Chunk]] = [[] for _ in range(len(request.prompts) * request.n)]
    try:
        for chunk in chunks:
            rows[chunk.index].append(chunk)
    finally:
        for number, row in enumerate(rows):
            prompt, index = divmod(number, request.n)
            written = "".join(chunk.text or "" for chunk in row)
            if request.as_json:
                last = row[-1] if row and row[-1].finish_reason is not None else None
                console.write_json(
                    {
                        "prompt": request.prompts[prompt],
                        "index": index,
                        "text": written,
                        # "abort" is vLLM's word for a text that was ended from outside.
                        "finish_reason": "abort" if last is None else last.finish_reason,
                        "stop_reason": None if last is None else last.stop_reason,
                        "token_ids": [chunk.token for chunk in row if chunk.token >= 0],
                        "seed": generation.seeded(request.params, index).seed,
                    }
                )
            else:
                if number > 0:
                    console.write("\n")
                print_text([written])


def print_text(pieces: Iterable[str]) -> None:
    """Write each piece to stdout at once, and end the last line, also after an exception."""
    last = ""
    try:
        for piece in pieces:
            console.write_model_text(piece)
            last = piece or last
    finally:
        if not last.endswith("\n"):
            console.write("\n")
