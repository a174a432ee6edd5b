"""The command ``llm-sampling``: ``generate`` streams a model's text, ``info`` says what runs here.

    options -> Request (checked) -> models.load -> generation.stream -> TextDecoder -> stdout

The text alone goes to stdout, everything else to stderr. Exit codes: 0 done; 1 something is missing
or failed; 2 a bad value, named in one line; 130 interrupted; 141 the text's reader has gone.
"""

# No `from __future__ import annotations`: typer evaluates the annotations, which name locals here.

import functools
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

import llm_sampling
from llm_sampling import (
    InvalidLogitsError,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    generation,
    models,
)
from llm_sampling.params import OFF_VALUES

if TYPE_CHECKING:
    import typer
    from rich.console import Console

#: What the extra ``cli`` installs.
EXTRA_PACKAGES = ("typer", "rich", "transformers", "gguf", "accelerate")

EXIT_FAILED, EXIT_BAD_VALUE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What ``generate`` was asked for, checked as far as it can be without the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompt: str
    params: SamplingParams
    model_path: Path | None
    chat: bool
    max_new_tokens: int
    backend: str
    threads: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {self.max_new_tokens}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be an integer >= 1, got {self.threads}")
        if self.model_path is not None:
            models.check_path(self.model_path)
        try:
            backends.resolve(self.backend, CPU)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code."""
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        _complain(
            f"the command needs the extra 'cli' ({', '.join(missing)} not found): "
            "pip install 'llm-sampling[cli]'"
        )
        return EXIT_FAILED
    # Read when transformers is imported: a second lock on the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import typer

        # Click's UsageError or typer's own, by version: the base of every complaint about options.
        usage_error: type[Exception] = typer.BadParameter.__bases__[0]
        try:
            code = _build_app()(args=argv, prog_name="llm-sampling", standalone_mode=False)
        except usage_error as error:
            _complain(error.format_message())  # type: ignore[attr-defined]
            return EXIT_BAD_VALUE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return int(code or 0)


def _complain(message: str) -> None:
    sys.stderr.write(f"llm-sampling: {' '.join(message.split())}\n")


def _build_app() -> "typer.Typer":
    """The commands and their options; a function, since typer may be missing."""
    import typer
    from typer import Argument, Option

    app = typer.Typer(
        help="Exact sampling of language-model logits.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    backend_names = ", ".join(("auto", *backends.BACKENDS))

    @app.command()
    def generate(
        prompt: Annotated[str, Argument(metavar="PROMPT", help="The text to continue.")],
        model: Annotated[
            Path | None,
            Option(
                metavar="PATH",
                help="A local Hugging Face directory or GGUF file. "
                f"Default: SmolLM2-135M-Instruct, from the package {models.DEFAULT_MODEL_PACKAGE}.",
            ),
        ] = None,
        chat: Annotated[
            bool, Option("--chat/--no-chat", help="Put PROMPT into the model's chat template.")
        ] = False,
        max_new_tokens: Annotated[int, Option(help="Stop after this many tokens.")] = 128,
        temperature: Annotated[
            float, Option(help="Divide the logits by this; 0 takes the best token.")
        ] = OFF_VALUES["temperature"],
        top_k: Annotated[
            int, Option(help="Keep this many of the best tokens; 0 is off.")
        ] = OFF_VALUES["top_k"],
        top_p: Annotated[
            float, Option(help="Keep the best tokens that hold this share of the mass; 1 is off.")
        ] = OFF_VALUES["top_p"],
        min_p: Annotated[
            float, Option(help="Keep tokens at least this likely, relative to the best; 0 is off.")
        ] = OFF_VALUES["min_p"],
        repetition_penalty: Annotated[
            float, Option(help="Scale down the tokens of prompt and text; 1 is off.")
        ] = OFF_VALUES["repetition_penalty"],
        frequency_penalty: Annotated[
            float, Option(help="Subtract this for each time the text has the token; 0 is off.")
        ] = OFF_VALUES["frequency_penalty"],
        presence_penalty: Annotated[
            float, Option(help="Subtract this once if the text has the token; 0 is off.")
        ] = OFF_VALUES["presence_penalty"],
        min_tokens_to_keep: Annotated[
            int, Option(help="No filter leaves fewer tokens than this.")
        ] = OFF_VALUES["min_tokens_to_keep"],
        logit_bias: Annotated[
            list[str] | None,
            Option(metavar="ID=BIAS", help="Add BIAS to the logit of token ID; repeatable."),
        ] = None,
        seed: Annotated[
            int | None,
            Option(help="The same seed gives the same text. Default: a new one each time."),
        ] = None,
        backend: Annotated[str, Option(help=f"What draws the tokens: {backend_names}.")] = "auto",
        threads: Annotated[
            int | None, Option(help="CPU threads. Default: torch's.", show_default=False)
        ] = None,
    ) -> int:
        """Continue PROMPT with a language model, token by token, on the CPU."""
        try:
            request = Request(
                prompt=prompt,
                params=SamplingParams(
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    frequency_penalty=frequency_penalty,
                    presence_penalty=presence_penalty,
                    min_tokens_to_keep=min_tokens_to_keep,
                    logit_bias=_parse_logit_bias(logit_bias or []),
                    # Not None: torch's own seed is a constant, so every run would give one text.
                    seed=secrets.randbits(32) if seed is None else seed,
                ),
                model_path=model,
                chat=chat,
                max_new_tokens=max_new_tokens,
                backend=backend,
                threads=threads,
            )
        except ValueError as error:
            _complain(str(error))
            return EXIT_BAD_VALUE
        try:
            return _generate(request)
        except models.ModelError as error:
            _complain(str(error))
            return EXIT_FAILED if isinstance(error, models.NotInstalledError) else EXIT_BAD_VALUE
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    @app.command()
    def info() -> None:
        """Show the versions, the backends that run here and the default model."""
        _info()

    return app


def _parse_logit_bias(entries: Sequence[str]) -> dict[int, float] | None:
    """``["5=1.5", ...]`` as a mapping; a ValueError names the entry that is none."""
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


def _generate(request: Request) -> int:
    from rich.console import Console
    from rich.text import Text

    path = request.model_path or models.default_model_path()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    messages = Console(stderr=True, highlight=False)
    with _progress(messages, f"Loading {path.name}") as report:
        language_model = models.load(path, report)
    prompt_ids = language_model.encode(request.prompt, chat=request.chat)
    _check_fit(request, len(prompt_ids), language_model)
    vocab_size = language_model.vocab_size
    sampler = Sampler(
        request.params,
        vocab_size=vocab_size,
        history=TokenHistory.from_ids([prompt_ids], None, vocab_size),
        backend=request.backend,
    )
    steps = generation.stream(
        language_model.model,
        torch.tensor([prompt_ids]),
        sampler,
        max_new_tokens=request.max_new_tokens,
        eos_token_ids=language_model.eos_token_ids,
    )
    decoder = generation.TextDecoder(language_model.tokenizer, prompt_ids)
    # On a terminal the text reads on from its prompt; the prompt is no part of the output.
    if messages.is_terminal and sys.stdout.isatty() and not request.chat:
        messages.print(Text(request.prompt, style="dim"), end="", soft_wrap=True)

    code, tally = 0, Tally()
    start = time.perf_counter()
    try:
        _print_text(_pieces(steps, decoder, tally))
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except InvalidLogitsError as error:
        _complain(f"{language_model.name} cannot go on: {error}")
        code = EXIT_FAILED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    seconds = time.perf_counter() - start
    messages.print(
        f"{tally.tokens} token{'' if tally.tokens == 1 else 's'} in {seconds:.2f} s: "
        f"{tally.tokens / seconds:.1f} tokens/s, {tally.sampler_seconds / seconds:.1%} of the time "
        f"spent sampling (backend {_backend_name(request.backend)}, seed {request.params.seed})",
        soft_wrap=True,
    )
    return code


@contextmanager
def _progress(messages: "Console", title: str) -> Iterator[Callable[[str], None]]:
    """Show the stages of a wait: a status line on a terminal, plain lines elsewhere."""
    import tqdm  # type: ignore[import-untyped]

    # The loader's own bars would tear the status line, and transformers can switch off only some.
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    if messages.is_terminal:
        with messages.status(title) as status:
            yield lambda stage: status.update(f"{title}: {stage}")
    else:
        yield lambda stage: messages.print(f"{title}: {stage}", markup=False, soft_wrap=True)


def _check_fit(request: Request, prompt_tokens: int, language_model: models.LanguageModel) -> None:
    """A ModelError if the model cannot do what was asked for."""
    context = language_model.context_length
    if context is not None and prompt_tokens + request.max_new_tokens > context:
        raise models.ModelError(
            f"max_new_tokens must leave the prompt's {prompt_tokens} tokens room in the model's "
            f"context of {context}, got {request.max_new_tokens}"
        )
    for token in request.params.logit_bias or ():
        if token >= language_model.vocab_size:
            raise models.ModelError(
                f"logit_bias must name tokens in 0 .. {language_model.vocab_size - 1}, got {token}"
            )


@dataclass
class Tally:
    """What the end line tells."""

    tokens: int = 0
    sampler_seconds: float = 0.0


def _pieces(
    steps: Iterator[generation.Step], decoder: generation.TextDecoder, tally: Tally
) -> Iterator[str]:
    """The text of row 0, up to its end token."""
    for step in steps:
        tally.tokens += 1
        tally.sampler_seconds += step.sampler_seconds
        if not step.ended[0]:
            yield decoder.decode(step.tokens[0])
    yield decoder.finish()


def _print_text(pieces: Iterator[str]) -> None:
    """Write the text to stdout as it comes, and end its last line, also if it is cut off."""
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


def _backend_name(name: str) -> str:
    """What ``name``, which may be "auto", stands for here."""
    module = backends.resolve(name, CPU)
    return next(row.name for row in backends.BACKENDS.values() if row.load() is module)


def _info() -> None:
    from rich.console import Console
    from rich.table import Table

    output = Console(highlight=False)
    versions = Table(box=None, show_header=False)
    versions.add_row("llm_sampling", llm_sampling.__version__)
    versions.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", *EXTRA_PACKAGES):
        versions.add_row(name, importlib.metadata.version(name))
    versions.add_row("CPU threads", str(torch.get_num_threads()))
    output.print(versions)

    table = Table("backend", "device", "available", "reason", box=None, title_justify="left")
    for backend in backends.backend_info():
        devices = "any" if backend.device_types is None else ", ".join(backend.device_types)
        table.add_row(
            backend.name, devices, "yes" if backend.available else "no", backend.reason or ""
        )
    output.print()
    output.print(table)

    try:
        model = str(models.default_model_path())
    except models.ModelError as error:
        model = str(error)
    output.print(f"\ndefault model: {model}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
