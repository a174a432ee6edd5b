"""The command ``llm-sampling``: a model's text, a talk with it, and what runs here.

    options -> Request (checked) -> models.load -> generation.generate_stream -> stdout

The text alone goes to stdout, everything else to stderr. Exit codes: 0 done; 1 something is missing
or failed; 2 a bad value, named in one line; 130 interrupted; 141 the text's reader has gone.
"""

# No `from __future__ import annotations`: typer evaluates the annotations, which name locals here.

import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import llm_sampling
from llm_sampling import InvalidLogitsError, SamplingParams, backends, generation, models
from llm_sampling.params import OFF_VALUES
from llm_sampling.stopping import StopStrings

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

    prompts: tuple[str, ...]
    params: SamplingParams
    model_path: Path | None
    chat: bool
    n: int
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    stop_limit: int
    include_stop: bool
    ignore_eos: bool
    as_json: bool
    backend: str
    threads: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.n < 1:
            raise ValueError(f"n must be an integer >= 1, got {self.n}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in 0 .. max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        StopStrings(self.stop, stop_limit=self.stop_limit)
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
        except typer.Abort:  # what typer 0.12 makes of Ctrl-C while it reads the options
            return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    return int(code or 0)


def _interrupted() -> int:
    """The exit code; a terminal gets back its cursor and the start of a line."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")
        sys.stderr.flush()
    return EXIT_INTERRUPTED


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C in this block counts at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread is interrupted
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


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

    def shared(
        model: Annotated[
            Path | None,
            Option(
                metavar="PATH",
                help="A local Hugging Face directory or GGUF file. "
                f"Default: SmolLM2-135M-Instruct, from the package {models.DEFAULT_MODEL_PACKAGE}.",
            ),
        ] = None,
        max_new_tokens: Annotated[int, Option(help="Stop after this many tokens.")] = 128,
        min_new_tokens: Annotated[
            int, Option(help="No end token and no stop string counts in this many tokens.")
        ] = 0,
        stop: Annotated[
            list[str] | None,
            Option(metavar="TEXT", help="End before this text; repeatable."),
        ] = None,
        stop_limit: Annotated[
            int, Option(help="End at this occurrence of a stop text: 2 with '.' is two sentences.")
        ] = 1,
        include_stop: Annotated[
            bool, Option("--include-stop/--no-include-stop", help="Write the stop text too.")
        ] = False,
        ignore_eos: Annotated[
            bool, Option("--ignore-eos/--no-ignore-eos", help="Go on after the model's end token.")
        ] = False,
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
    ) -> dict[str, Any]:
        """What these options of every command come to in a Request."""
        return {
            "params": SamplingParams(
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
            "model_path": model,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "stop": tuple(stop or ()),
            "stop_limit": stop_limit,
            "include_stop": include_stop,
            "ignore_eos": ignore_eos,
            "backend": backend,
            "threads": threads,
        }

    def command(run: Callable[[Request], int]) -> Callable[[Callable[..., Request]], None]:
        """Make a command of a function that gives the Request that it runs."""

        def add(make: Callable[..., Request]) -> None:
            parameters = dict(inspect.signature(shared).parameters)
            own = [
                p for p in inspect.signature(make).parameters.values() if p.kind != p.VAR_KEYWORD
            ]

            def called(**values: Any) -> int:
                try:
                    try:
                        of_all = shared(**{name: values.pop(name) for name in parameters})
                        request = make(**values, **of_all)
                    except ValueError as error:
                        _complain(str(error))
                        return EXIT_BAD_VALUE
                    return run(request)
                except models.ModelError as error:
                    _complain(str(error))
                    is_absent = isinstance(error, models.NotInstalledError)
                    return EXIT_FAILED if is_absent else EXIT_BAD_VALUE
                except KeyboardInterrupt:
                    return _interrupted()

            # what typer makes options of
            all_parameters = [*own, *parameters.values()]
            called.__signature__ = inspect.Signature(all_parameters)  # type: ignore[attr-defined]
            called.__annotations__ = {p.name: p.annotation for p in all_parameters}
            app.command(make.__name__, help=make.__doc__)(called)

        return add

    @command(lambda request: _generate(request))
    def generate(
        prompts: Annotated[
            list[str], Argument(metavar="PROMPT...", help="The text to continue, or several.")
        ],
        chat: Annotated[
            bool, Option("--chat/--no-chat", help="Put PROMPT into the model's chat template.")
        ] = False,
        n: Annotated[
            int, Option("--n", help="So many texts for each PROMPT, from seed, seed + 1, ...")
        ] = 1,
        as_json: Annotated[
            bool, Option("--json/--no-json", help="Write a line of JSON for each text.")
        ] = False,
        **of_all: Any,
    ) -> Request:
        """Continue each PROMPT with a language model, token by token, on the CPU."""
        return Request(prompts=tuple(prompts), chat=chat, n=n, as_json=as_json, **of_all)

    @command(lambda request: _chat(request))
    def chat(**of_all: Any) -> Request:
        """Talk with a language model: it answers each line of the input, and knows those before."""
        return Request(prompts=(), chat=True, n=1, as_json=False, **of_all)

    @app.command()
    def info() -> int:
        """Show the versions, the backends that run here and the default model."""
        try:
            _info()
        except KeyboardInterrupt:
            return _interrupted()
        return 0

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
    from rich.text import Text

    messages = _messages()
    language_model = _load(request, messages)
    prompts = [language_model.encode(text, chat=request.chat) for text in request.prompts]
    _check_fit(request, max(map(len, prompts)), language_model)
    is_one = len(prompts) * request.n == 1 and not request.as_json
    # On a terminal the text reads on from its prompt; the prompt is no part of the output.
    if is_one and messages.is_terminal and sys.stdout.isatty() and not request.chat:
        messages.print(Text(request.prompts[0], style="dim"), end="", soft_wrap=True)

    def write(tally: Tally) -> None:
        counted = tally.count(_stream(request, language_model, prompts, request.params))
        if is_one:
            _print_text(chunk.text or "" for chunk in counted)
        else:
            _print_texts(request, generation.completions(counted))

    return _write(write, request, language_model, messages)


def _chat(request: Request) -> int:
    messages = _messages()
    language_model = _load(request, messages)
    said: list[dict[str, str]] = []

    def write(tally: Tally) -> None:
        for turn, line in enumerate(_lines(messages)):
            said.append({"role": "user", "content": line})
            ids = language_model.encode_chat(said)
            _check_fit(request, len(ids), language_model)
            params = generation.seeded(request.params, turn)
            answer: list[str] = []

            def pieces(
                params: SamplingParams = params, ids: list[int] = ids, answer: list[str] = answer
            ) -> Iterator[str]:
                for chunk in tally.count(_stream(request, language_model, [ids], params)):
                    answer.append(chunk.text or "")
                    yield answer[-1]

            _print_text(pieces())
            said.append({"role": "assistant", "content": "".join(answer)})

    language_model.encode_chat([{"role": "user", "content": "?"}])  # refused here or never
    return _write(write, request, language_model, messages)


def _lines(messages: "Console") -> Iterator[str]:
    """The lines of stdin that say something; a terminal is asked for each."""
    while True:
        line, asks = "", sys.stdin.isatty()
        try:
            if asks:
                messages.print("> ", end="", style="bold")
            line = sys.stdin.readline()
        finally:
            if asks and not line:  # Ctrl-C or Ctrl-D
                messages.print()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _messages() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _load(request: Request, messages: "Console") -> models.LanguageModel:
    path = request.model_path or models.default_model_path()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with _progress(messages, f"Loading {path.name}") as report:
        return models.load(path, report)


def _stream(
    request: Request,
    language_model: models.LanguageModel,
    prompts: list[list[int]],
    params: SamplingParams,
) -> Iterator[generation.Chunk]:
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
        backend=request.backend,
    )


def _write(
    write: Callable[["Tally"], None],
    request: Request,
    language_model: models.LanguageModel,
    messages: "Console",
) -> int:
    """Write texts, then the end line; the exit code."""
    code, tally = 0, Tally()
    start = time.perf_counter()
    try:
        write(tally)
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
        status = messages.status(title)
        try:
            # half of a start would leave the cursor hidden
            with _interrupts_wait():
                status.start()
            yield lambda stage: status.update(f"{title}: {stage}")
        finally:
            with _interrupts_wait():
                status.stop()
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

    def count(self, chunks: Iterator[generation.Chunk]) -> Iterator[generation.Chunk]:
        """Count them as they go by; a step's time is that of all its rows."""
        step = 0
        for chunk in chunks:
            self.tokens += 1
            if chunk.step != step:
                step = chunk.step
                self.sampler_seconds += chunk.sampler_seconds
            yield chunk


def _print_texts(request: Request, completions: Sequence[generation.Completion]) -> None:
    """Write several texts, when all are done: a line of JSON each, or an empty line between two."""
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
            _print_text([json.dumps(line, ensure_ascii=False)])
        else:
            if number > 0:
                sys.stdout.write("\n")
            _print_text([done.text or ""])


def _print_text(pieces: Iterable[str]) -> None:
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
