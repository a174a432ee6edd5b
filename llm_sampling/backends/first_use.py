"""Whether a backend's kernels give the right tokens on the device at hand.

Nobody has run the kernels on every device, driver and compiler. So a backend whose row in the table
of backends asks for it answers the rows of :mod:`~llm_sampling.backends.known_rows` when it is
first used on a device, once in a process. A wrong answer makes it unavailable on that device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llm_sampling.backends import known_rows
from llm_sampling.backends.base import BackendModule, SampleCall, Size, described
from llm_sampling.backends.known_rows import KINDS, Kind, KnownRows
from llm_sampling.results import SampleOutput
from llm_sampling.tensors import is_pretended

#: The environment variable that leaves the tests at first use out where it is "0".
VARIABLE = "LLM_SAMPLING_SELF_TEST"

#: How many known rows a call of fewer rows answers, in several launches.
_FEWEST = 8
#: How many rows a call for one kernel has at most, since each has logits of its own.
_MOST = 2


class SelfTest(NamedTuple):
    """What a backend has answered on a device.

    Attributes:
        backend: its name.
        device: as ``str(torch.device)``.
        shapes: how many sizes of calls it was asked for, each with rows of two kinds.
        rows: how many rows it has answered rightly.
        difference: the first wrong answer or failure, in words; None if there was none.
        skipped: why it was not asked; None if it was.
    """

    backend: str
    device: str
    shapes: int = 0
    rows: int = 0
    difference: str | None = None
    skipped: str | None = None


def with_index(device: torch.device | str) -> torch.device:
    """A device, with the number of the current one where it has none."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


_lock = threading.RLock()
_results: dict[tuple[str, torch.device], SelfTest] = {}


def run(name: str, module: BackendModule, device: torch.device) -> SelfTest:
    """Let a backend answer known rows on a device, and remember what came of it.

    Raises:
        torch.OutOfMemoryError: the device has no room for the rows, which tells nothing.
    """
    with _lock, torch.no_grad():
        result = SelfTest(name, str(device))
        try:
            sizes = module.known_sizes(device)
        except Exception as error:
            result = result._replace(difference=f"it failed: {described(error)}")
            sizes = ()
        for size in sizes:
            difference = None
            for kind in (KINDS[0], KINDS[-1]):
                answered, difference = _answer(module, kind, size, device)
                result = result._replace(rows=result.rows + answered)
                if difference is not None:
                    break
            result = result._replace(shapes=result.shapes + 1, difference=difference)
            if difference is not None:
                break
        _results[name, device] = result
    return result


def _answer(
    module: BackendModule, kind: Kind, size: Size, device: torch.device
) -> tuple[int, str | None]:
    """How many rows of a kind the backend answers, and what is wrong first."""
    rows = max(size.rows, _FEWEST)
    numbers = [(number * 7 + size.rows) % known_rows.count() for number in range(rows)]
    answered = 0
    try:
        known = KnownRows(kind, size.vocab_size, size.dtype, device)
        for first in range(0, rows, size.rows):
            of_call = numbers[first : first + size.rows]
            difference = known.difference(module.sample(known.call(of_call)), of_call)
            if difference is not None:
                return answered, difference
            answered += len(of_call)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return answered, f"it failed on known rows: {described(error)}"
    return answered, None


def record(name: str, device: torch.device, difference: str) -> str:
    """Make a backend unavailable on a device for a wrong answer; the reason."""
    with _lock:
        before = _results.get((name, device), SelfTest(name, str(device)))
        _results[name, device] = before._replace(difference=difference)
    return reason_for(difference)


def reason_for(difference: str) -> str:
    """Why a backend with this difference is not used."""
    return f"its self-test failed: {difference}; please report it"


def failure(name: str, device: torch.device) -> str | None:
    """Why a backend is not used on a device any more; None if no test has failed."""
    result = _results.get((name, device))
    if result is None or result.difference is None:
        return None
    return reason_for(result.difference)


def results(name: str) -> tuple[SelfTest, ...]:
    """What the tests of a backend in this process have found."""
    return tuple(result for (of, _), result in sorted(_results.items(), key=str) if of == name)


class SelfTestError(RuntimeError):
    """A backend has given a wrong answer after it was chosen, and before it drew anything."""


def check_kernel(
    name: str,
    model: SampleCall,
    run: Callable[[SampleCall], SampleOutput | Tensor],
) -> None:
    """Let a kernel that was compiled for calls like ``model`` answer known rows before it is used.

    Args:
        name: of the backend.
        model: the call for which it was compiled; it is not run.
        run: runs the same kernel for another call; for filtered logits it returns these.

    Raises:
        SelfTestError: an answer is wrong; the backend is unavailable on the device from now on.
        torch.OutOfMemoryError: the device has no room for the rows, which tells nothing.
    """
    device, batch = model.logits.device, model.batch
    kind = Kind(model.history is not None, model.allowed_mask is not None, model.has_bias)
    vocab_size = model.logits.shape[1]
    # A smaller vocabulary gets the next size of the same remainder, for which the kernel is the
    # same. There are tokens that do not matter where a list is to ban some.
    least = known_rows.TOKENS + (16 if model.has_lists else 0)
    vocab_size = vocab_size if vocab_size >= least else least + (vocab_size - least) % 16
    numbers = known_rows.rows_for(all_greedy=batch.all_greedy, any_filter=batch.any_filter)
    difference = None
    with _lock, torch.no_grad():
        known = KnownRows(kind, vocab_size, model.logits.dtype, device)
        size = min(len(model.logits), _MOST)
        for first in range(0, len(numbers), size):
            rows = (numbers + numbers)[first : first + size]
            try:
                found = run(known.call_like(model, rows))
                if isinstance(found, Tensor):
                    difference = known.filtered_difference(found, rows)
                else:
                    difference = known.difference(found, rows)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                difference = f"it failed on known rows: {described(error)}"
            if difference is not None:
                reason = record(name, device, difference)
                raise SelfTestError(f"backend {name!r} is unavailable: {reason}")
        before = _results.get((name, device), SelfTest(name, str(device)))
        shapes, answered = before.shapes + 1, before.rows + len(numbers)
        _results[name, device] = before._replace(shapes=shapes, rows=answered)


def is_wanted() -> bool:
    """Whether backends are tested at their first use.

    Raises:
        RuntimeError: the environment variable has another value than 0 or 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise RuntimeError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def is_possible(device: torch.device) -> bool:
    """Whether rows can be answered now: not while a graph is captured or operations are recorded.

    The backend is then used untested, and tested at a later use.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return not (is_pretended() or torch.cuda.is_current_stream_capturing())
    return not is_pretended()


def why_not(name: str, module: BackendModule, device: torch.device) -> str | None:
    """Test a backend where that is wanted, possible and not done; why it is not used, or None."""
    result = _results.get((name, device))
    if result is None:
        if not is_wanted() or not is_possible(device):
            return None
        with _lock:
            if (name, device) not in _results:
                try:
                    run(name, module, device)
                except torch.OutOfMemoryError:
                    return None  # the call that asked for the backend may need less
    return failure(name, device)
