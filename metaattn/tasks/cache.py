"""Files written whole or not at all, and arrays kept between runs in them."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

Arrays = dict[str, np.ndarray]


def directory() -> Path:
    """Where caches are: ``$METAATTN_CACHE``, else ``metaattn`` in the user's cache directory."""
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
    """A file to write that takes the place of ``path`` when the block ends: a kill leaves the old or the new, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's files are the owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cached(name: str, key: str, build: Callable[[], Arrays], *, where: Path | None = None) -> Arrays:
    """What ``build`` gives, read from a file if it was built before with this key.

    A file that cannot be read is named in a warning and built again. A directory that cannot be written
    costs only the time to build again.

    Args:
        name: The file's, before its key.
        key: All that the arrays depend on.
        build: Makes the arrays.
        where: The directory; :func:`directory` by default.
    """
    path = (where or directory()) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(f"building {path} again: it cannot be read ({error})", stacklevel=2)
    arrays = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, sha256=np.array(_digest(arrays)), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); the next run will build it again", stacklevel=2)
    return arrays
