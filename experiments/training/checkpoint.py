"""Read and write checkpoints.

A checkpoint file is written completely or not at all, is loaded without running code from it, and holds enough to
continue a run bit for bit.
"""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaattn.tasks.cache import replacing

from ..errors import UserError

FORMAT, VERSION = "metaattn.checkpoint", 1


def seed_everything(seed: int) -> None:
    """Seed every random number generator that :func:`rng_state` covers."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may use the global generator
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of the random number generators of PyTorch (each device), NumPy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - as above
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "python": (version, list(internal), gauss_next),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every random number generator to a state that :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any instant leaves either the old file or the new one, complete."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the new name survives a crash of the machine
    finally:
        os.close(directory)


def find(path: str | Path, name: str = "latest.pt") -> Path:
    """Return the path of a checkpoint.

    Args:
        path: A checkpoint, or the directory of a run.
        name: Which checkpoint of the directory.

    Raises:
        UserError: There is no such checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / name).is_file():
            if (path / "latest.pt").is_file():
                raise UserError(
                    f"{path} has no {name}: the run has not validated yet, or the file was not copied; evaluate the "
                    f"last state with checkpoint={path / 'latest.pt'}, or continue with resume={path}"
                )
            raise UserError(f"{path} contains no {name}: it is not the directory of a run that saved a checkpoint")
        return path / name
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    return path


def _check_container(path: Path) -> None:
    """Check that the file is a complete zip file with correct checksums.

    PyTorch writes a zip file, whose table of contents comes last: a file that starts like one but has no table of
    contents is truncated.

    Raises:
        UserError: The file is something else, truncated or damaged.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04" and start != b"":
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "is truncated: it was not written or copied completely")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not verify the checksums
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, f"is damaged and cannot be read ({error})") from error
    if damaged is not None:
        raise _damaged(path, f"is damaged: the checksum of its part {damaged} is wrong")


def _damaged(path: Path, problem: str) -> UserError:
    """Return the error for a damaged file; it names ``best.pt`` as an alternative if that file exists."""
    best = path.with_name("best.pt")
    alternative = f"; {best}, of an earlier step, may be intact" if path != best and best.is_file() else ""
    return UserError(f"{path} {problem}{alternative}")


def load(path: Path, **entries: type) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: The file.
        **entries: Names and types of the entries that it must have.

    Returns:
        The entries by name.

    Raises:
        UserError: The file is truncated, damaged or not a checkpoint of this program, or an entry is missing or has
            another type.
    """
    _check_container(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of train_maml.py: it contains more than tensors and plain values"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _damaged(path, f"is damaged and cannot be read ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has format version {content.get('version')}; this program reads version {VERSION}")
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            got = type(content[name]).__name__ if name in content else "nothing"
            raise UserError(f"{path} is incomplete: its entry {name!r} should be of type {kind.__name__}; got {got}")
    return content
