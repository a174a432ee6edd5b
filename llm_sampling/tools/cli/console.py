"""What every command does with the terminal: text, messages, progress, Ctrl-C and exit codes.

Only generated text and tables go to stdout, everything else goes to stderr. What stdout does not
take ends the command; what stderr does not take is dropped. rich and tqdm are imported when they
are needed.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import re
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from llm_sampling.tools import files

if TYPE_CHECKING:
    from rich.console import Console

#: What the extra ``cli`` installs.
EXTRA_PACKAGES = ("rich", "transformers", "gguf", "accelerate")
#: What the extra ``tune`` installs besides.
TUNE_PACKAGES = ("optuna", "matplotlib")

EXIT_FAILED, EXIT_BAD_VALUE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141


class CommandError(Exception):
    """Ends the command with its message as one line on stderr.

    Attributes:
        exit_code: the command's exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.exit_code)  # by default only the message is pickled


def complain(message: str) -> None:
    """Write the message to stderr as one line."""
    tell(f"llm-sampling: {printable(' '.join(message.split()))}\n")


def require(extra: str, packages: Sequence[str]) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        CommandError: one is missing; the message says how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"the command needs the extra {extra!r} ({', '.join(missing)} not found): "
            f"pip install 'llm-sampling[{extra}]'",
            EXIT_FAILED,
        )


@contextmanager
def writing_files(exit_code: int) -> Iterator[None]:
    """Turn an OSError in this block into a CommandError that names the file."""
    try:
        yield
    except OSError as error:
        message = f"{error.filename} cannot be written: {error.strerror}"
        raise CommandError(message, exit_code) from error


def check_writable(*paths: Path | None) -> None:
    """Check, before slow work, that the files can be written at its end.

    Raises:
        CommandError: one cannot.
    """
    with writing_files(EXIT_BAD_VALUE):
        for path in paths:
            if path is not None:
                files.check_writable(path)


# ---- the standard streams ----

#: What a terminal would obey instead of showing it: control characters except newline and tab, and
#: those that turn the direction of the text around them. Surrogates are no characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
#: The most characters that are read from stdin at once, so that an endless input ends.
MOST_INPUT = 2**26


def hold_closed_descriptors() -> None:
    """Let the null device take the place of each of stdin, stdout and stderr that is closed.

    Otherwise the next file that is opened, such as a database, takes it, and other libraries'
    messages go there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one


def printable(text: str) -> str:
    """The text with backslash escapes for what a terminal would obey instead of showing it."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def text_of(raw: str, encoding: str) -> str:
    """The text of bytes that were decoded with surrogateescape: else, of the same bytes in UTF-8.

    So UTF-8 is read where the locale has ASCII alone.

    Raises:
        UnicodeError: they are not UTF-8 either.
    """
    if _SURROGATE.search(raw) is None:
        return raw
    return raw.encode(encoding, "surrogateescape").decode()


def check_stdout() -> None:
    """Check, before slow work, that there is a stdout.

    Raises:
        CommandError: it is closed.
    """
    if sys.stdout is None:
        raise CommandError("stdout cannot be written: it is closed", EXIT_FAILED)


def check_stdin() -> None:
    """Check, before slow work, that there is a stdin.

    Raises:
        CommandError: it is closed.
    """
    if sys.stdin is None:
        raise CommandError("stdin cannot be read: it is closed", EXIT_FAILED)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether the stream is a terminal; it may be None, as a closed one is."""
    return stream is not None and stream.isatty()


def write(text: str, stream: IO[str] | None = None) -> None:
    """Write the text to stdout at once; what its encoding does not have gets backslash escapes.

    Args:
        text: the text.
        stream: stdout, where ``sys.stdout`` may be another one.

    Raises:
        CommandError: it cannot be written.
        BrokenPipeError: the reader has gone.
    """
    check_stdout()
    stream = stream or sys.stdout
    try:
        stream.write(_encodable(text, stream))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from error


def write_model_text(text: str) -> None:
    """Write a model's text to stdout by :func:`write`; to a terminal made :func:`printable`."""
    write(printable(text) if is_terminal(sys.stdout) else text)


def write_json(value: object) -> None:
    """Write a line of JSON to stdout, in ASCII where its encoding or a terminal asks for it."""
    check_stdout()
    line = json.dumps(value, ensure_ascii=False)
    is_obeyed = is_terminal(sys.stdout) and _UNPRINTABLE.search(line) is not None
    if is_obeyed or _encodable(line, sys.stdout) != line:
        line = json.dumps(value).replace("\x7f", "\\u007f")
    write(f"{line}\n")


def tell(text: str, stream: IO[str] | None = None) -> None:
    """Write the text to stderr, or drop it if stderr is closed or cannot be written.

    Args:
        text: the text.
        stream: stderr, where ``sys.stderr`` may be another one.
    """
    stream = stream or sys.stderr
    if stream is None:
        return
    try:
        stream.write(_encodable(text, stream))
        stream.flush()
    except OSError:
        _discard(stream)


def read(whole: bool) -> str:
    """Read all of stdin, or its next line; the line is empty at the end of the input.

    Raises:
        CommandError: stdin is closed, cannot be read, is no text, or does not end.
    """
    check_stdin()
    stream, encoding = sys.stdin, "utf-8"
    if isinstance(stream, io.TextIOWrapper):
        # A byte that is no text is refused below, when the line that has it is read.
        if stream.errors != "surrogateescape":  # which cannot be set again after the first line
            stream.reconfigure(errors="surrogateescape")
        encoding = stream.encoding
    most = MOST_INPUT + 1
    try:
        if not whole and is_terminal(stream):
            _wait_for_line(stream)
        raw = stream.read(most) if whole else stream.readline(most)
    except OSError as error:
        message = f"stdin cannot be read: {error.strerror or error}"
        raise CommandError(message, EXIT_FAILED) from error
    except UnicodeError as error:  # some encodings cannot keep invalid bytes as surrogates
        message = f"stdin must be valid {encoding.upper()}: {error}"
        raise CommandError(message, EXIT_BAD_VALUE) from error
    if len(raw) == most:
        what = "stdin" if whole else "a line of stdin"
        raise CommandError(
            f"{what} must have at most {MOST_INPUT} characters, got more", EXIT_BAD_VALUE
        )
    try:
        return text_of(raw, encoding)
    except UnicodeError as error:
        found = _SURROGATE.search(raw)
        assert found is not None
        near = raw[max(0, found.start() - 20) : found.end()]
        raise CommandError(f"stdin must be valid UTF-8, got {near!r}", EXIT_BAD_VALUE) from error


def _wait_for_line(stream: IO[str]) -> None:
    """Wait until the terminal has a line to read, or raise KeyboardInterrupt for a Ctrl-C.

    Python misses a Ctrl-C that comes right before its read, until the line ends. Signals also write
    to the wakeup descriptor, so that this wait ends for one that came before it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Without line editing in the terminal, a line may have been read with the one before it.
    if not is_main or not termios.tcgetattr(stream)[3] & termios.ICANON:
        return
    awake, wakes = os.pipe()
    os.set_blocking(wakes, False)
    before = signal.set_wakeup_fd(wakes)
    try:
        while stream.fileno() not in select.select([stream.fileno(), awake], [], [])[0]:
            os.read(awake, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(awake)
        os.close(wakes)


class _Stream:
    """A standard stream for rich's consoles, which writes by :func:`write` or :func:`tell`.

    It keeps the stream: rich replaces ``sys.stdout`` and ``sys.stderr`` during a live display.
    """

    def __init__(self, stream: IO[str], write: Callable[[str, IO[str]], None]) -> None:
        self._stream, self._write = stream, write

    def write(self, text: str) -> None:
        self._write(text, self._stream)

    def flush(self) -> None:
        """Do nothing: each write has been flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def messages() -> Console:
    """A console on stderr."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Stream(sys.stderr, tell)), highlight=False)


def output() -> Console:
    """A console on stdout, which raises what :func:`write` raises."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(file=cast("IO[str]", _Stream(sys.stdout, write)), highlight=False)


def _encodable(text: str, stream: IO[str]) -> str:
    """The text, with backslash escapes if the stream's encoding does not have all of it."""
    encoding = getattr(stream, "encoding", None)
    if encoding is None:  # a stream of str
        return text
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _unwritable(error: OSError) -> CommandError:
    """The error for a stdout that cannot be written."""
    _discard(sys.stdout)
    return CommandError(f"stdout cannot be written: {error.strerror or error}", EXIT_FAILED)


def _discard(stream: IO[str]) -> None:
    """Let the null device take what the stream still holds.

    Python flushes it once more at exit, which must not fail again.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it has none
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def closed_pipe() -> int:
    """The exit code for a stdout whose reader has gone."""
    _discard(sys.stdout)
    return EXIT_CLOSED_PIPE


def flushed(code: int) -> int:
    """The exit code of a command that ends with ``code``, when what others wrote is flushed too."""
    tell("")
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return closed_pipe()
    except OSError as error:
        complain(str(_unwritable(error)))
        return code or EXIT_FAILED
    return code


def interrupted() -> int:
    """The exit code after Ctrl-C; on a terminal, show the cursor again and begin a new line."""
    if is_terminal(sys.stderr):
        tell("\x1b[?25h\n")
    return EXIT_INTERRUPTED


def end_without_a_word() -> None:
    """Let Ctrl-C end the process at once while Python shuts down, where it would print a traceback.

    A process that ignores Ctrl-C, as in the background of a shell, goes on to ignore it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _delayed_interrupts() -> Iterator[None]:
    """Delay a Ctrl-C in this block until its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts only the main thread
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def shown(display: Any) -> Iterator[None]:
    """Start one of rich's live displays, and stop it at the end.

    Interrupts are delayed, because a display that is half started or half stopped leaves the
    cursor hidden.
    """
    try:
        with _delayed_interrupts():
            display.start()
        yield
    finally:
        with _delayed_interrupts():
            display.stop()


@contextmanager
def progress(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Give a function that shows a stage: in a status line on a terminal, else on a line each."""
    import tqdm  # type: ignore[import-untyped]

    # The model loader's progress bars would break the status line, and transformers has no switch
    # for all of them.
    original = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        if not console.is_terminal:
            yield lambda stage: console.print(f"{title}: {stage}", markup=False, soft_wrap=True)
            return
        status = console.status(title)
        with shown(status):
            yield lambda stage: status.update(f"{title}: {stage}")
    finally:
        tqdm.tqdm.__init__ = original
