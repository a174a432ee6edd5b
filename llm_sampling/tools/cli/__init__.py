"""The command ``llm-sampling``: a model's text, a talk, what sampling does, and its tuning.

    options -> Request (checked) -> models.load -> generation.generate_stream -> stdout
    options -> ExplainRequest (checked) -> models.load -> explain -> table, picture, page, texts
    options -> TuneRequest (checked) -> models.load -> tuning.tune -> report, best options

The text alone goes to stdout, everything else to stderr. Exit codes: 0 done; 1 something is missing
or failed; 2 a bad value, named in one line; 130 interrupted; 141 the text's reader has gone.
"""

# No `from __future__ import annotations`: typer evaluates the annotations, which name locals here.

import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import llm_sampling
from llm_sampling import InvalidLogitsError, SamplingParams, backends, generation
from llm_sampling.fields import OFF_VALUES
from llm_sampling.generation import models
from llm_sampling.generation.stop_strings import StopStrings
from llm_sampling.tools import explain as explaining
from llm_sampling.tools import tuning
from llm_sampling.tools.tuning.objectives import METRICS, ModelObjective, check_objective
from llm_sampling.tools.tuning.report import write_report

if TYPE_CHECKING:
    import typer
    from optuna.trial import FrozenTrial
    from rich.console import Console
    from rich.table import Table

#: What the extra ``cli`` installs.
EXTRA_PACKAGES = ("typer", "rich", "transformers", "gguf", "accelerate")
#: What the extra ``tune`` installs besides.
TUNE_PACKAGES = ("optuna", "matplotlib")

EXIT_FAILED, EXIT_BAD_VALUE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Running:
    """The model, what draws its tokens, and on how many threads, checked without loading it.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    model_path: Path | None
    backend: str
    threads: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be an integer >= 1, got {self.threads}")
        if self.model_path is not None:
            models.check_path(self.model_path)
        try:
            backends.resolve(self.backend, CPU)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Request:
    """What ``generate`` was asked for, checked as far as it can be without the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompts: tuple[str, ...]
    params: SamplingParams
    chat: bool
    n: int
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    stop_limit: int
    include_stop: bool
    ignore_eos: bool
    as_json: bool
    on: Running

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


@dataclass(frozen=True)
class TuneRequest:
    """What ``tune`` was asked for, checked as far as it can be without the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    space: tuning.Space
    metrics: tuple[str, ...]
    method: Any
    n_trials: int | None
    timeout: float | None
    texts: int
    max_new_tokens: int
    seed: int
    storage: str | None
    study_name: str
    out: Path
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        tuning.check_search(
            self.space,
            self.method,
            n_trials=self.n_trials,
            seed=self.seed,
            storage=self.storage,
            study_name=self.study_name,
            timeout=self.timeout,
        )
        check_objective(self.metrics, self.space, self.texts, self.max_new_tokens)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a directory, got {str(self.out)!r}")


@dataclass(frozen=True)
class ExplainRequest:
    """What ``explain`` was asked for, checked as far as it can be without the model.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    prompt: str
    params: SamplingParams
    chat: bool
    output: str
    top: int
    picture: Path | None
    html: Path | None
    n: int
    max_new_tokens: int
    on: Running

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in (("top", 1), ("n", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {getattr(self, name)}")
        if self.picture is not None and self.picture.suffix.lower() not in explaining.PICTURES:
            raise ValueError(
                f"picture must end in {' or '.join(explaining.PICTURES)}, got {str(self.picture)!r}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code."""
    if not _has_extra("cli", EXTRA_PACKAGES):
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


def _closed_pipe() -> int:
    """The exit code; Python flushes stdout once more at exit, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CLOSED_PIPE


def _has_extra(extra: str, packages: Sequence[str]) -> bool:
    """Whether they are installed; if not, stderr says how they come."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        _complain(
            f"the command needs the extra {extra!r} ({', '.join(missing)} not found): "
            f"pip install 'llm-sampling[{extra}]'"
        )
    return not missing


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


@contextmanager
def _shown(display: Any) -> Iterator[None]:
    """Start what rich draws on a terminal, and stop it; half of either would hide the cursor."""
    try:
        with _interrupts_wait():
            display.start()
        yield
    finally:
        with _interrupts_wait():
            display.stop()


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

    def sampling(
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
    ) -> dict[str, Any]:
        """How a token is drawn."""
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
        }

    def length(
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
    ) -> dict[str, Any]:
        """Where a text ends."""
        return {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "stop": tuple(stop or ()),
            "stop_limit": stop_limit,
            "include_stop": include_stop,
            "ignore_eos": ignore_eos,
        }

    def running(
        model: Annotated[
            Path | None,
            Option(
                metavar="PATH",
                help="A local Hugging Face directory or GGUF file. "
                f"Default: SmolLM2-135M-Instruct, from the package {models.DEFAULT_MODEL_PACKAGE}.",
            ),
        ] = None,
        backend: Annotated[str, Option(help=f"What draws the tokens: {backend_names}.")] = "auto",
        threads: Annotated[
            int | None, Option(help="CPU threads. Default: torch's.", show_default=False)
        ] = None,
    ) -> dict[str, Any]:
        """What runs: every command with a model has these."""
        return {"on": Running(model, backend, threads)}

    def command(
        run: Callable[[Any], int],
        *groups: Callable[..., dict[str, Any]],
        needs: tuple[str, Sequence[str]] | None = None,
    ) -> Callable[[Callable[..., Any]], None]:
        """Make a command, with these groups of options, of a function that gives what it runs."""

        def add(make: Callable[..., Any]) -> None:
            of_group = [dict(inspect.signature(group).parameters) for group in groups]
            own = [
                p for p in inspect.signature(make).parameters.values() if p.kind != p.VAR_KEYWORD
            ]

            def called(**values: Any) -> int:
                if needs is not None and not _has_extra(*needs):
                    return EXIT_FAILED
                try:
                    try:
                        shared: dict[str, Any] = {}
                        for group, names in zip(groups, of_group, strict=True):
                            shared |= group(**{name: values.pop(name) for name in names})
                        request = make(**values, **shared)
                    except ValueError as error:
                        _complain(str(error))
                        return EXIT_BAD_VALUE
                    return run(request)
                except BrokenPipeError:
                    return _closed_pipe()
                except ModuleNotFoundError as error:
                    _complain(str(error))
                    return EXIT_FAILED
                except models.ModelError as error:
                    _complain(str(error))
                    is_absent = isinstance(error, models.NotInstalledError)
                    return EXIT_FAILED if is_absent else EXIT_BAD_VALUE
                except KeyboardInterrupt:
                    return _interrupted()

            # what typer makes options of
            parameters = [*own, *(p for names in of_group for p in names.values())]
            called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            called.__annotations__ = {p.name: p.annotation for p in parameters}
            app.command(make.__name__, help=make.__doc__)(called)

        return add

    @command(lambda request: _generate(request), sampling, length, running)
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
        **shared: Any,
    ) -> Request:
        """Continue each PROMPT with a language model, token by token, on the CPU."""
        return Request(prompts=tuple(prompts), chat=chat, n=n, as_json=as_json, **shared)

    @command(lambda request: _chat(request), sampling, length, running)
    def chat(**shared: Any) -> Request:
        """Talk with a language model: it answers each line of the input, and knows those before."""
        return Request(prompts=(), chat=True, n=1, as_json=False, **shared)

    @command(lambda request: _tune(request), running, needs=("tune", TUNE_PACKAGES))
    def tune(
        more_space: Annotated[
            list[str] | None, Argument(metavar="[NAME=VALUES]...", help="More of --space.")
        ] = None,
        space: Annotated[
            list[str] | None,
            Option(
                metavar="NAME=VALUES",
                help="What is searched: LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP or VALUE,VALUE,...",
            ),
        ] = None,
        objective: Annotated[
            list[str] | None,
            Option(
                metavar="NAME",
                help=f"What is tuned for, of {', '.join(METRICS)}; several give a Pareto front. "
                "Default: distance.",
            ),
        ] = None,
        method: Annotated[
            str, Option(help=f"How: {', '.join(tuning.METHODS)}; grid takes lists alone.")
        ] = "bayesian",
        trials: Annotated[
            int | None, Option(help="So many trials. Default: 40; of a grid all.")
        ] = None,
        timeout: Annotated[
            float | None, Option(help="Begin no trial after this many seconds.")
        ] = None,
        texts: Annotated[int, Option(help="So many texts in each trial.")] = 8,
        max_new_tokens: Annotated[int, Option(help="The length of each text, in tokens.")] = 64,
        seed: Annotated[int, Option(help="The same seed gives the same search.")] = 0,
        storage: Annotated[
            str | None,
            Option(
                metavar="URL",
                help="Keep the search there, as sqlite:///tuning.db, and go on with it.",
            ),
        ] = None,
        study_name: Annotated[str, Option(help="The search's name in the storage.")] = "decoding",
        out: Annotated[
            Path, Option(metavar="DIR", help="Where the pictures and report.html go.")
        ] = Path("tuning"),
        **shared: Any,
    ) -> TuneRequest:
        """Search for the sampling parameters that suit a language model best."""
        return TuneRequest(
            space=tuning.space_from_text([*(space or ()), *(more_space or ())]),
            metrics=tuple(objective or ("distance",)),
            method=method,
            n_trials=40 if trials is None and method != "grid" and timeout is None else trials,
            timeout=timeout,
            texts=texts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            storage=storage,
            study_name=study_name,
            out=out,
            **shared,
        )

    @command(lambda request: _explain(request), sampling, running)
    def explain(
        prompt: Annotated[str, Argument(metavar="PROMPT", help="The text before the token.")],
        chat: Annotated[
            bool, Option("--chat/--no-chat", help="Put PROMPT into the model's chat template.")
        ] = False,
        output: Annotated[
            str,
            Option(
                metavar="TEXT",
                help="What the model has written since PROMPT, which the penalties count.",
            ),
        ] = "",
        top: Annotated[int, Option(help="Show so many of the best tokens.")] = 20,
        picture: Annotated[
            Path | None, Option(metavar="PATH", help="Write a picture too: .png or .svg.")
        ] = None,
        html: Annotated[
            Path | None,
            Option(metavar="PATH", help="Write a page too, whose sliders change the parameters."),
        ] = None,
        n: Annotated[
            int, Option("--n", help="So many texts of each way to decode, beside the greedy one.")
        ] = 2,
        max_new_tokens: Annotated[int, Option(help="The length of these texts, in tokens.")] = 40,
        **shared: Any,
    ) -> ExplainRequest:
        """Show what each step does to the probabilities of the token after PROMPT."""
        return ExplainRequest(
            prompt=prompt,
            chat=chat,
            output=output,
            top=top,
            picture=picture,
            html=html,
            n=n,
            max_new_tokens=max_new_tokens,
            **shared,
        )

    @app.command()
    def info() -> int:
        """Show the versions, the backends that run here and the default model."""
        try:
            _info()
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError:
            return _closed_pipe()
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
    language_model = _load(request.on, messages)
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
    language_model = _load(request.on, messages)
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


def _output() -> "Console":
    """Standard output with tables; whoever calls it is told that its reader has gone."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(highlight=False)


def _load(on: Running, messages: "Console") -> models.LanguageModel:
    path = on.model_path or models.default_model_path()
    if on.threads is not None:
        torch.set_num_threads(on.threads)
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
        backend=request.on.backend,
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
        return _closed_pipe()
    seconds = time.perf_counter() - start
    messages.print(
        f"{tally.tokens} token{'' if tally.tokens == 1 else 's'} in {seconds:.2f} s: "
        f"{tally.tokens / seconds:.1f} tokens/s, {tally.sampler_seconds / seconds:.1%} of the time "
        f"spent sampling (backend {_backend_name(request.on.backend)}, seed {request.params.seed})",
        soft_wrap=True,
    )
    return code


@contextmanager
def _progress(messages: "Console", title: str) -> Iterator[Callable[[str], None]]:
    """Show the stages of a wait: a status line on a terminal, plain lines elsewhere."""
    import tqdm  # type: ignore[import-untyped]

    # The loader's own bars would tear the status line, and transformers can switch off only some.
    own = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(own, disable=True)
    try:
        if not messages.is_terminal:
            yield lambda stage: messages.print(f"{title}: {stage}", markup=False, soft_wrap=True)
            return
        status = messages.status(title)
        with _shown(status):
            yield lambda stage: status.update(f"{title}: {stage}")
    finally:
        tqdm.tqdm.__init__ = own


def _check_fit(
    request: "Request | ExplainRequest", prompt_tokens: int, language_model: models.LanguageModel
) -> None:
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


def _explain(request: ExplainRequest) -> int:
    if request.picture is not None and not _has_extra("tune", ["matplotlib"]):
        return EXIT_FAILED
    messages = _messages()
    language_model = _load(request.on, messages)
    ids = language_model.encode(request.prompt, chat=request.chat)
    written: list[int] = []
    if request.output:
        tokenizer = language_model.tokenizer
        written = tokenizer(request.output, add_special_tokens=False)["input_ids"]
    _check_fit(request, len(ids) + len(written), language_model)
    params = request.params
    logits, history = explaining.record(language_model, ids, written)
    texts = explaining.token_texts(language_model)
    try:
        explanation = explaining.explain(logits, params, history=history)
    except InvalidLogitsError as error:
        _complain(f"{language_model.name} cannot go on: {error}")
        return EXIT_FAILED
    text = request.prompt + request.output
    output = _output()
    output.print(_steps_table(explanation, texts, request.top))
    output.print(f"{int(explanation.kept.sum())} of {explanation.vocab_size} tokens are kept")
    try:
        if request.picture is not None:
            explaining.picture(explanation, texts, request.picture, request.top, title=text)
        if request.html is not None:
            page = explaining.page(logits, texts, params, history, text)
            request.html.write_text(page, encoding="utf-8")
    except OSError as error:
        return _not_written(error)
    continuations = explaining.compare(
        language_model,
        [*ids, *written],
        params,
        n=request.n,
        max_new_tokens=request.max_new_tokens,
        backend=request.on.backend,
    )
    for decoding, group in itertools.groupby(continuations, key=lambda one: one.decoding):
        output.print(f"\n{decoding}:", style="bold", markup=False)
        for one in group:
            quoted = json.dumps(one.text, ensure_ascii=False)
            output.print(f"  {quoted}", markup=False, soft_wrap=True)
    return 0


def _steps_table(explanation: explaining.Explanation, texts: Sequence[str], top: int) -> "Table":
    """A row for each token: its probability after each step that does something, in percent."""
    from rich.table import Table
    from rich.text import Text

    params = explanation.params
    stages = [stage for stage in explaining.STAGES if explaining.changes(stage, params)]
    table = Table(box=None)
    table.add_column("token")
    for name in ("id", "logit", *(explaining.stage_label(stage, params) for stage in stages)):
        table.add_column(name, justify="right")
    table.add_column("cut by")
    for row in explaining.rows(explanation, top):
        shares = [f"{row.probabilities[stage]:.2%}" for stage in stages]
        cut = "" if row.cut_by is None else explaining.cut_label(row.cut_by)
        table.add_row(
            Text(explaining.visible(texts[row.token])),
            *(str(row.token), f"{row.logit:.2f}", *shares, cut),
            style="" if row.kept else "dim",
        )
    return table


def _tune(request: TuneRequest) -> int:
    try:
        request.out.mkdir(parents=True, exist_ok=True)  # not refused when all is done
    except OSError as error:
        return _not_written(error)
    messages = _messages()
    language_model = _load(request.on, messages)
    try:
        objective = ModelObjective(
            language_model,
            request.metrics,
            texts=request.texts,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            backend=request.on.backend,
        )
        with _trials_shown(request, messages) as show:
            result = tuning.tune(
                objective,
                request.space,
                request.method,
                n_trials=request.n_trials,
                seed=request.seed,
                storage=request.storage,
                study_name=request.study_name,
                timeout=request.timeout,
                directions=objective.directions,
                show_progress=False,
                callback=show,
            )
    except KeyboardInterrupt:
        if request.storage is not None:
            messages.print(f"the same command goes on from {request.storage}", markup=False)
        raise
    except ValueError as error:
        _complain(str(error))
        return EXIT_BAD_VALUE
    except RuntimeError as error:
        _complain(str(error))
        return EXIT_FAILED
    best_line = _as_options(result.best_params)
    usage = f"llm-sampling generate {best_line}"
    try:
        files = write_report(result, request.out, request.metrics, usage)
    except OSError as error:
        return _not_written(error)
    found = dict(zip(request.metrics, result.best_values, strict=True))
    messages.print(f"best of {len(result.trials)} trials: {_named(found)}", markup=False)
    messages.print(f"{len(files)} files in {request.out}", markup=False, soft_wrap=True)
    sys.stdout.write(f"{best_line}\n")
    return 0


def _not_written(error: OSError) -> int:
    _complain(f"{error.filename} cannot be written: {error.strerror}")
    return EXIT_BAD_VALUE


def _as_options(values: Mapping[str, Any]) -> str:
    """Values as ``generate`` takes them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


@contextmanager
def _trials_shown(
    request: TuneRequest, messages: "Console"
) -> Iterator[Callable[["FrozenTrial"], None]]:
    """A function that shows a trial: in a table on a terminal, as a plain line elsewhere."""
    from rich.live import Live

    trials: list[FrozenTrial] = []
    if not messages.is_terminal:

        def write(trial: "FrozenTrial") -> None:
            trials.append(trial)
            values = dict(zip(request.metrics, trial.values or (), strict=False))
            line = f"trial {len(trials)}: {_named(trial.params)}: {_named(values) or 'failed'}"
            messages.print(line, markup=False, soft_wrap=True)

        yield write
        return
    live = Live(_trial_table(request, trials), console=messages, auto_refresh=False)

    def draw(trial: "FrozenTrial") -> None:
        trials.append(trial)
        live.update(_trial_table(request, trials), refresh=True)

    with _shown(live):
        live.refresh()
        yield draw


#: Of which the table on the terminal has the last.
SHOWN_TRIALS = 12


def _trial_table(request: TuneRequest, trials: Sequence["FrozenTrial"]) -> "Table":
    from rich.table import Table

    wanted = "" if request.n_trials is None else f" of {request.n_trials}"
    table = Table(title=f"{len(trials)}{wanted} trials", title_justify="left", box=None)
    for name in ("trial", *request.space, *request.metrics):
        table.add_column(name, justify="right")
    best = _best_by_metric(request, trials)
    first = max(0, len(trials) - SHOWN_TRIALS)
    for number, trial in enumerate(trials[first:], first + 1):
        values = [_short(value) for value in trial.values or ()]
        marked = [
            f"[bold green]{value}[/]" if trial is best[column] else value
            for column, value in enumerate(values)
        ]
        params = [_short(trial.params[name]) for name in request.space]
        table.add_row(str(number), *params, *(marked or ["failed"]))
    return table


def _best_by_metric(
    request: TuneRequest, trials: Sequence["FrozenTrial"]
) -> list["FrozenTrial | None"]:
    """The trial that has the best value of each metric so far."""
    done = [trial for trial in trials if trial.values]
    best: list[FrozenTrial | None] = []
    for column, name in enumerate(request.metrics):
        sign = 1 if METRICS[name].direction == "minimize" else -1
        best.append(
            min(done, key=lambda t, c=column, s=sign: s * t.values[c], default=None)  # type: ignore[misc]
        )
    return best


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _backend_name(name: str) -> str:
    """What ``name``, which may be "auto", stands for here."""
    module = backends.resolve(name, CPU)
    return next(row.name for row in backends.BACKENDS.values() if row.load() is module)


def _info() -> None:
    from rich.table import Table

    output = _output()
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
