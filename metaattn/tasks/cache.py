"""Cache of arrays on disk, and files that are written completely or not at all.

Used by the task families that decode or render images. :mod:`metaattn.cli` and the experiments use :func:`directory`
and :func:`replacing`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind; leftovers of a kill stay there
    fcntl = None  # type: ignore[assignment]

Arrays = dict[str, np.ndarray]


def directory() -> Path:
    """Return the cache directory: ``$METAATTN_CACHE``, or else ``metaattn`` in the user's cache directory."""
    if path := os.environ.get("METAATTN_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaattn"


def _digest(arrays: Arrays) -> str:
    h = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        h.update(f"{name} {a.dtype} {a.shape}".encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def _read(path: Path) -> Arrays:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = {k: file[k] for k in file.files if k != "sha256"}
        if str(file["sha256"]) != _digest(arrays):
            raise ValueError("its checksum does not match")
    return arrays


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, which replaces ``path`` when the block ends.

    A process that is killed leaves the old file or the new one, never a part of it. What it leaves of its temporary
    file is removed by the next call for the same path.

    Args:
        path: The file to replace; its directory must exist.
    """
    remove_leftovers(path)
    file, name = _temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner can read
            if fcntl is None:
                file.close()  # Windows cannot replace by an open file; elsewhere closing it would end its lock
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that :func:`replacing` left beside a path because its process was killed.

    A process that still writes holds a lock on its temporary file, which ends with the process.
    """
    if fcntl is None:
        return
    prefix = f".{path.name}."
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(prefix) and len(name) == len(prefix) + 8:  # mkstemp adds eight characters
                with suppress(OSError), open(path.parent / name, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path.parent / name)


def _temporary(path: Path) -> tuple[IO[bytes], str]:
    """Open a temporary file beside a path, locked so that :func:`remove_leftovers` keeps it."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        file = os.fdopen(handle, "wb")
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return file, name
        file.close()  # another process removed it before it was locked


def cached(name: str, key: str, build: Callable[[], Arrays], *, where: Path | None = None) -> Arrays:
    """Return the arrays of ``build()``, from a file if they were built before with the same key.

    A file that cannot be read is reported in a warning and built again. A directory that cannot be written costs a
    warning, and the time to build again in the next run.

    Args:
        name: Start of the file's name.
        key: A description of everything that the arrays depend on.
        build: Function that makes the arrays, by name.
        where: The cache directory; ``None`` for :func:`directory`.

    Returns:
        The arrays, by name.
    """
    path = (where or directory()) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if path.is_file():
        try:
            return _read(path)
        except Exception as error:  # NumPy and zipfile raise more than a dozen classes for damaged files
            warnings.warn(f"building {path} again: it cannot be read ({error})", stacklevel=2)
    arrays = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, sha256=np.array(_digest(arrays)), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); the next run will build it again", stacklevel=2)
    return arrays
