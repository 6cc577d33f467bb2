"""The output directory of a command: new for each run, and owned by one process at a time."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from metaattn.tasks.cache import remove_leftovers, replacing

from ..errors import UserError
from . import distributed

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# The files of a run, besides the events of TensorBoard.
FILES = (
    "config.yaml",
    "latest.pt",
    "best.pt",
    "metrics.csv",
    "summary.json",
    "learning.png",
    "adaptation.png",
    "episode.png",
)
# Those that a new run must not find in its directory. A run that was killed before its first checkpoint has none.
OF_A_RUN = ("latest.pt", "best.pt", "summary.json", "metrics.csv")

_created: dict[str, str] = {}  # the new directory of this command for each requested one


def forget() -> None:
    """Forget the directories of an earlier command in this process."""
    _created.clear()


def new(wanted: str) -> str:
    """Create a directory that no other process has, and return its path.

    Where the directory exists, because another command started in the same second, a number is added to its name.
    Called again with the same argument it returns the same path, and all processes of ``torchrun`` have that of the
    first one.
    """
    if wanted not in _created:
        _created[wanted] = distributed.from_first(_create(wanted) if distributed.is_first() else wanted)
    return _created[wanted]


def _create(wanted: str) -> str:
    for path in (wanted if n == 1 else f"{wanted}_{n}" for n in count(1)):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(os.path.dirname(path)):
                break
        except OSError:
            break
        else:
            return path
    return wanted  # Hydra, which creates the output directory, reports why that is impossible


@contextmanager
def no_empty_directory(out: Path) -> Iterator[None]:
    """Remove the output directory if the block fails before it writes anything, and this command created it.

    The directory of a run that is resumed, and one that the user named, stay.
    """
    try:
        yield
    except BaseException:
        new_ones = [Path(path).absolute() for path in _created.values()]
        if out in new_ones or out.parent in new_ones:  # the parent in a sweep
            with suppress(OSError):  # it contains files, or another process has removed it
                out.rmdir()
        raise


@contextmanager
def owned(out: Path, must_not_exist: Sequence[str] = (), advice: str = "") -> Iterator[None]:
    """Own a directory during the block: no other command can write to it. Leftovers of killed commands are removed.

    Args:
        out: The directory.
        must_not_exist: Files of another run, which the block would overwrite.
        advice: What to do if one of them exists, for the error message.

    Raises:
        UserError: Another process owns the directory, it contains another run, or it cannot be written.
    """
    file, problem = None, None
    if distributed.is_first():
        try:
            file = _lock(out)
            for name in FILES:
                remove_leftovers(out / name)
            if found := [name for name in must_not_exist if _is_of_a_run(out / name)]:
                problem = f"{out} contains {found[0]} of another run; {advice}"
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot write to the output directory {out}: {error.strerror or error}"
    try:
        if problem := distributed.from_first(problem):
            raise UserError(problem)
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (out / LOCK).unlink()  # while it is locked: whoever opened it meanwhile sees that it is gone
            file.close()


def _is_of_a_run(path: Path) -> bool:
    """Return whether a file exists; one of metrics, which a run creates before its first checkpoint, must have rows."""
    if path.name == "metrics.csv" and path.is_file():
        with path.open("rb") as file:
            return file.read(10_000).count(b"\n") > 1
    return path.exists()


def _lock(out: Path) -> IO[bytes]:
    """Open and lock the lock file. The lock ends with the process, however that ends.

    Raises:
        UserError: Another process holds the lock.
        OSError: The file cannot be created.
    """
    while True:
        file = (out / LOCK).open("ab+", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace").strip() or "another process"
            file.close()
            raise UserError(
                f"{out} is in use by {owner}; wait until that ends, or give another directory with hydra.run.dir=PATH"
            ) from None
        except OSError as error:
            warnings.warn(f"a second run could write to {out}: its file system has no locks ({error})", stacklevel=3)
        if _is_current(file, out / LOCK):
            with suppress(OSError):  # a full disk: the lock holds without a text
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=file.close)  # a child that outlives this process holds no lock
            return file
        file.close()  # its owner removed it before it was locked here


def _is_current(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def set_aside(path: Path, *, keep: bool = False) -> Path:
    """Rename a damaged file, and return its new path.

    Args:
        path: The file.
        keep: Copy it instead, because it will be replaced by what can be read of it.
    """
    names = (f"{path.stem}.damaged{'' if n == 1 else f'_{n}'}{path.suffix}" for n in count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    if keep and path.is_file():
        with replacing(aside) as file, path.open("rb") as damaged:
            shutil.copyfileobj(damaged, file)
    else:
        path.rename(aside)
    return aside
