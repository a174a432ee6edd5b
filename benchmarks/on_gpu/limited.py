"""A command with a time limit, in a session of its own, so that all that it starts ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

#: Seconds that a process has between SIGTERM and SIGKILL, and then to be gone.
GRACE_S, GONE_S = 2.0, 5.0
BY_ITSELF, AT_ITS_LIMIT = "by itself", "killed at its limit"


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        how: BY_ITSELF with exit code 0, AT_ITS_LIMIT, "exit code N", or "signal NAME".
        seconds: how long it ran.
        reason: the last line of its stderr where it did not end by itself, else "".
    """

    how: str
    seconds: float
    reason: str


def run_limited(
    command: Sequence[str],
    limit_s: float,
    stdout: Path,
    stderr: Path,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command until it ends or its time is over; then end every process of its session.

    Args:
        command: the program and its arguments; it runs in the root of the checkout.
        limit_s: seconds.
        stdout: a file for what it prints.
        stderr: another one.
        environment: added to this process's.
    """
    started = time.monotonic()
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            how = BY_ITSELF if code == 0 else _described(code)
        except subprocess.TimeoutExpired:
            how = AT_ITS_LIMIT
        finally:  # also where this process is told to end
            _end(process)
    reason = "" if how == BY_ITSELF else _last_line(stderr)
    return Ended(how, round(time.monotonic() - started, 2), reason)


def _described(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: SIGTERM, so that it can end what it started, then SIGKILL."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can hold it; go on without it
        process.wait(GONE_S)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def end_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that what this process started ends too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
