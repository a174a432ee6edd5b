"""Files that are written at the end of long work: tried before it, and replaced as a whole.

A new file is written beside the old one and takes its place when it is complete, so a write that
fails leaves the old one as it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: Path) -> None:
    """Check that :func:`replacing` can write ``path``, which stays as it is.

    Raises:
        OSError: it cannot; ``filename`` is ``path``.
    """
    with _named(path):
        if path.is_file() or path.is_dir():
            # Without O_TRUNC, so nothing changes. A folder cannot be opened so.
            os.close(os.open(path, os.O_WRONLY))
        elif path.exists():  # a device or a FIFO: to open it may block, or wake its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "Permission denied", str(path))
            return
        else:
            _try_new_file(Path(os.path.realpath(path)))
        if not path.is_symlink():
            _try_new_file(_beside(path))


def check_folder(folder: Path, names: Iterator[str]) -> None:
    """Make the folder if it is not there, and check that files of these names can be written in it.

    Raises:
        OSError: they cannot; ``filename`` is the folder or the file.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _try_new_file(_beside(folder / "file"))
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(None, "Is a directory", str(path))


@contextlib.contextmanager
def replacing(path: Path, *, links: bool = False) -> Iterator[Path]:
    """Give the path to write to instead of ``path``; at the end of the block it takes its place.

    It is a new file in the same folder with the same suffix, and gets the mode of the old one. A
    device or a FIFO is given as it is.

    Args:
        path: the file.
        links: whether a symbolic link is replaced too. By default what it points to is written,
            directly.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    with _named(path):
        is_link = path.is_symlink()
        is_special = path.exists() and not path.is_file()
        if not links if is_link else is_special:
            yield path
            return
        new = _beside(path)
        try:
            new.open("xb").close()
            if path.is_file() and not is_link:
                new.chmod(path.stat().st_mode & 0o777)
            yield new
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """The path of a new file in the folder of ``path``; it is short even where the name is not."""
    return path.with_name(f".{secrets.token_hex(8)}{path.suffix[-5:]}")


def _try_new_file(path: Path) -> None:
    path.open("xb").close()
    path.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError in this block name ``path``, whatever file it was that failed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
