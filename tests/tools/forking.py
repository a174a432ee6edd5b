"""A process that has imported what the command ``llm-sampling`` needs, and forks to run it.

Importing takes seconds, a fork milliseconds. The child gets the file descriptors that were asked
for, makes Python's standard streams of them as a new interpreter does, runs the command, and
flushes them as Python does at its end. As a program, this file is that process: it answers lines of
JSON on stdin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

#: A standard stream that is closed, one whose reader has gone, and one that cannot be written.
CLOSED, GONE, READ_ONLY = "closed", "gone", "read only"

#: The seconds after which a child is ended. None takes more than two.
LONGEST = 100


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code (minus the signal that ended it), and what it wrote."""

    code: int
    out: bytes
    err: bytes


class ForkingProcess:
    """A handle by which a test runs commands in the process that forks.

    Args:
        environment: its environment variables, which its children inherit.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(
        self,
        argv: list[bytes],
        folder: Path,
        *,
        stdin: str = os.devnull,
        stdout: str | None = None,
        stderr: str | None = None,
        encoding: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> Done:
        """Run the command in a child.

        Args:
            argv: its words.
            folder: its working directory.
            stdin: a path, or CLOSED.
            stdout: a path, CLOSED, GONE, READ_ONLY, or None for a file whose content is returned.
            stderr: as stdout.
            encoding: that of stdout, as PYTHONIOENCODING would give it.
            environment: more environment variables.
        """
        files = {1: folder / ".stdout", 2: folder / ".stderr"}
        streams = [stdin, stdout or str(files[1]), stderr or str(files[2])]
        for file in files.values():
            file.write_bytes(b"")
        request = {
            "argv": [word.decode("latin-1") for word in argv],
            "folder": str(folder),
            "streams": streams,
            "encoding": encoding,
            "environment": environment or {},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Done(code, files[1].read_bytes(), files[2].read_bytes())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _open_streams(names: list[str]) -> None:
    """Make the file descriptors 0, 1 and 2."""
    for number, name in enumerate(names):
        if name == CLOSED:
            with contextlib.suppress(OSError):
                os.close(number)
            continue
        if name == GONE:
            reader, opened = os.pipe()
            os.close(reader)
        elif name == READ_ONLY:
            opened = os.open(os.devnull, os.O_RDONLY)
        else:
            opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _stream(number: int, like: io.TextIOWrapper, encoding: str | None) -> io.TextIOWrapper | None:
    """The stream that Python makes of a descriptor at its start; None if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    buffered: Any = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        buffered,
        encoding=encoding or like.encoding,
        errors="strict" if encoding else like.errors,
        line_buffering=number == 2 or os.isatty(number),
    )


def _end(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process, as Python does: with a flush that may fail.

    Python would also free all that was imported, which takes longer than the command.
    """
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception as error:
            code = 120
            with contextlib.suppress(Exception):
                sys.stderr.write(f"Exception ignored in: {stream} {error!r}\n")
                sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    """Fork for each request, and answer with the child's exit code."""
    likes: list[Any] = [sys.stdin, sys.stdout, sys.stderr]
    requests = open(os.dup(0), "rb")  # noqa: SIM115
    answers = open(os.dup(1), "wb", buffering=0)  # noqa: SIM115

    # What the children use; the commands import it when they need it.
    import gguf  # noqa: F401
    import rich.console
    import rich.live
    import rich.table  # noqa: F401
    import transformers
    import transformers.models.llama.modeling_llama

    from llm_sampling.tools import cli

    with contextlib.suppress(ModuleNotFoundError):
        import optuna.storages
        import optuna.visualization.matplotlib  # noqa: F401
        import sqlalchemy.dialects.sqlite  # noqa: F401
    with contextlib.suppress(ModuleNotFoundError):
        import llguidance.hf  # noqa: F401
        import xgrammar  # noqa: F401
    transformers.AutoTokenizer  # noqa: B018 - it is imported when it is named
    transformers.AutoModelForCausalLM  # noqa: B018

    for line in requests:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            requests.close()
            answers.close()
            signal.alarm(LONGEST)  # a command that waits for something is ended by a signal
            os.chdir(request["folder"])
            os.environ.update(request["environment"])
            _open_streams(request["streams"])
            sys.stdin, sys.stdout, sys.stderr = (
                _stream(number, like, request["encoding"] if number == 1 else None)
                for number, like in enumerate(likes)
            )
            sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
            sys.argv = [
                "llm-sampling",
                *(os.fsdecode(w.encode("latin-1")) for w in request["argv"]),
            ]
            _end(cli.main)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(b"%d\n" % status)
    os._exit(0)


if __name__ == "__main__":
    _serve()
