"""Checkpoints: whole or not there, readable without running code, and enough to go on bit for bit."""

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
    """Seed every generator of random numbers that :func:`rng_state` covers."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - whoever uses it
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator of random numbers: PyTorch's, on each device, NumPy's and Python's."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - whoever uses it
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "python": (version, list(internal), gauss_next),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Bring every generator to a state that :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any instant leaves the old one or the new one, whole."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name too survives a crash of the machine
    finally:
        os.close(directory)


def find(path: str | Path, name: str = "latest.pt") -> Path:
    """The checkpoint at ``path``: itself, or ``name`` in a run's directory."""
    path = Path(path)
    if path.is_dir():
        if not (path / name).is_file():
            if (path / "latest.pt").is_file():
                raise UserError(
                    f"{path} has no {name}: no validation has been done, or it was not copied; evaluate its last state "
                    f"with checkpoint={path / 'latest.pt'}, or go on with resume={path}"
                )
            raise UserError(f"{path} holds no {name}: it is not the directory of a run that saved a checkpoint")
        return path / name
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    return path


def _check_container(path: Path) -> None:
    """A checkpoint is a zip file, whose table of contents comes last: tell what is none from what is cut short."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04" and start != b"":
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "is truncated: it was not written to its end, or not copied whole")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, f"cannot be read, it is damaged ({error})") from error
    if damaged is not None:
        raise _damaged(path, f"is damaged: the checksum of {damaged} in it is wrong")


def _damaged(path: Path, how: str) -> UserError:
    """What is wrong with a file, and what else there is to go on with."""
    best = path.with_name("best.pt")
    instead = f"; {best}, of an earlier step, may be whole" if path != best and best.is_file() else ""
    return UserError(f"{path} {how}{instead}")


def load(path: Path, **entries: type) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: The file.
        **entries: What it must have, and of which type.

    Raises:
        UserError: A file that is truncated, damaged, no checkpoint, not ours or without an entry, by name.
    """
    _check_container(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of train_maml.py: it holds more than tensors and values"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read, it is damaged ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has format version {content.get('version')}; this program reads version {VERSION}")
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            got = type(content[name]).__name__ if name in content else "nothing"
            raise UserError(f"{path} is not whole: its entry {name!r} should be of type {kind.__name__}; got {got}")
    return content
