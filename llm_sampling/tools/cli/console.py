"""What every command does with the terminal: text, messages, progress, Ctrl-C and exit codes.

Only generated text and tables go to stdout, everything else goes to stderr. rich and tqdm are
imported when they are needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
    sys.stderr.write(f"llm-sampling: {' '.join(message.split())}\n")


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
def writing_files() -> Iterator[None]:
    """Turn an OSError in this block into a CommandError that names the file."""
    try:
        yield
    except OSError as error:
        message = f"{error.filename} cannot be written: {error.strerror}"
        raise CommandError(message, EXIT_BAD_VALUE) from error


def messages() -> Console:
    """A console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def output() -> Console:
    """A console on stdout, which raises BrokenPipeError if the reader has gone."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(highlight=False)


def closed_pipe() -> int:
    """The exit code for a closed stdout."""
    # Python flushes stdout once more at exit, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CLOSED_PIPE


def interrupted() -> int:
    """The exit code after Ctrl-C; on a terminal, show the cursor again and begin a new line."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")
        sys.stderr.flush()
    return EXIT_INTERRUPTED


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
