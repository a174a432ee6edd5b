"""What makes a search resumable: its storage, the lock on it, and the trials that were interrupted.

Every trial has an index of its own, which a rerun of it keeps. Its random numbers follow from the
seed and the index, so a search that was interrupted tries the same values as one that was not.
optuna is imported when a search begins.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_sampling.tools.files import check_writable
from llm_sampling.tools.tuning.space import CheckedSpace

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

#: Keys in a trial's user_attrs, which storages hold: its index, which a rerun shares; and a mark
#: that it was interrupted, by an exception or because its process died.
INDEX, INTERRUPTED = "index", "broken_off"


@contextlib.contextmanager
def locked(storage: str | None) -> Iterator[None]:
    """Hold a lock on a file beside an SQLite storage. It is released even if the process is killed.

    Raises:
        RuntimeError: another process holds the lock.
    """
    path = sqlite_file(storage)
    if path is None:
        yield
        return
    import fcntl

    # Not "w": where the name is a symbolic link, that would empty its target.
    with Path(f"{path}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"storage {storage!r} is in use by another process") from None
        yield


def sqlite_file(storage: str | None) -> Path | None:
    """The file that the URL of an SQLite storage names; None for any other storage."""
    prefix = "sqlite:///"
    if storage is None or not storage.startswith(prefix):
        return None
    name = storage.removeprefix(prefix).partition("?")[0].removeprefix("file:")
    return None if name in ("", ":memory:") else Path(name)


def check_storage(storage: str) -> None:
    """Check that a storage can be opened and written. A new SQLite file is made, without a study.

    Raises:
        ValueError: the URL is of no database that is known, or its file is none that can be used.
        ModuleNotFoundError: the database's driver is not installed.
        RuntimeError: another process uses the storage, its server does not answer, or it was
            written by another version of Optuna.
    """
    import optuna
    from sqlalchemy import exc

    file = sqlite_file(storage)
    # os.path, unlike Path, has no error for a name that is too long; the next check has.
    if file is not None and os.path.exists(file) and not os.path.isfile(file):
        raise ValueError(f"storage must be a file, got {storage!r}")
    refused = f"storage {storage!r} cannot be used"
    try:
        if file is not None:
            check_writable(file)
        with locked(storage):
            opened = optuna.storages.RDBStorage(storage)
            with opened.engine.connect() as connection:  # changes no row, but needs the right to
                connection.exec_driver_sql("UPDATE studies SET study_name = '' WHERE 1 = 0")
            opened.engine.dispose()
    except OSError as error:
        raise ValueError(f"{refused}: {error.strerror}") from error
    except ImportError as error:
        raise ModuleNotFoundError(f"{refused}: its database's driver is not installed") from error
    except (exc.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{refused}: {error}") from error
    except exc.SQLAlchemyError as error:
        reason = getattr(error, "orig", None) or error
        raise (RuntimeError if file is None else ValueError)(f"{refused}: {reason}") from error


def match_search(
    study: optuna.Study,
    space: CheckedSpace,
    method: str,
    directions: Sequence[str],
    seed: int | None,
) -> int:
    """Note in a new study what it searches for; in a stored one, compare it with what is noted.

    Returns:
        The study's seed.

    Raises:
        ValueError: the stored study is of another search.
    """
    known = study.user_attrs
    if seed is None:
        seed = known.get("seed", secrets.randbits(32))
    asked = {
        "space": {name: repr(values) for name, values in space.items()},
        "method": method,
        "directions": list(directions),
        "seed": seed,
    }
    for name, value in asked.items():
        if known.get(name, value) != value:
            raise ValueError(
                f"storage must hold a study of the same {name} under the name "
                f"{study.study_name!r}, got {value!r} for {known[name]!r}; "
                "another study_name begins anew"
            )
    for name, value in asked.items():
        study.set_user_attr(name, value)
    return seed


def requeue_interrupted(study: optuna.Study) -> None:
    """Requeue interrupted trials, with unchanged values, ahead of new ones."""
    import optuna

    state = optuna.trial.TrialState
    trials = study.get_trials()
    latest = {trial.user_attrs.get(INDEX): trial.number for trial in trials}
    for trial in trials:
        if trial.state != state.RUNNING and INTERRUPTED not in trial.user_attrs:
            continue
        if trial.state == state.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        index = trial.user_attrs.get(INDEX)
        if index is not None and latest[index] == trial.number:
            study.add_trial(
                optuna.trial.create_trial(
                    state=state.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={INDEX: index},
                    system_attrs=trial.system_attrs,  # GridSampler keeps the grid point here
                )
            )
        # Last: if this function is interrupted before, the trial is still RUNNING and found again.
        if trial.state == state.RUNNING:
            study.tell(trial.number, state=state.FAIL)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials, without those that were interrupted."""
    return [
        trial
        for trial in study.get_trials()
        if trial.state.is_finished() and INTERRUPTED not in trial.user_attrs
    ]


def sampler_by_index(
    make: Callable[[int], optuna.samplers.BaseSampler],
) -> optuna.samplers.BaseSampler:
    """A sampler that uses a new ``make(index)`` for each trial.

    So no trial's values depend on whether the process was restarted before it. Optuna's samplers
    keep a random generator, whose state is lost when the process ends, and they know a trial by
    its number, which a rerun does not keep.
    """
    import optuna

    class SamplerByIndex(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._of_trial: dict[int, optuna.samplers.BaseSampler] = {}
            self._lock = threading.Lock()

        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            with self._lock:
                index = trial.user_attrs.get(INDEX)
                if index is None:
                    others = study.get_trials(deepcopy=False)
                    index = 1 + max(other.user_attrs.get(INDEX, -1) for other in others)
                    study._storage.set_trial_user_attr(trial._trial_id, INDEX, index)
                sampler = self._of_trial[trial.number] = make(index)
            # Without interruptions a trial's number would be its index, so show that instead.
            numbered_by_index = copy.copy(trial)
            numbered_by_index.number = index
            sampler.before_trial(study, numbered_by_index)

        def infer_relative_search_space(
            self, study: optuna.Study, trial: FrozenTrial
        ) -> dict[str, BaseDistribution]:
            return self._of_trial[trial.number].infer_relative_search_space(study, trial)

        def sample_relative(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            search_space: dict[str, BaseDistribution],
        ) -> dict[str, Any]:
            return self._of_trial[trial.number].sample_relative(study, trial, search_space)

        def sample_independent(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            param_name: str,
            param_distribution: BaseDistribution,
        ) -> Any:
            return self._of_trial[trial.number].sample_independent(
                study, trial, param_name, param_distribution
            )

        def after_trial(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            state: optuna.trial.TrialState,
            values: Sequence[float] | None,
        ) -> None:
            with self._lock:
                sampler = self._of_trial.pop(trial.number)
            sampler.after_trial(study, trial, state, values)

    return SamplerByIndex()
