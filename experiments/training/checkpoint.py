"""Read and write checkpoints.

A checkpoint file is written completely or not at all, is loaded without running code from it, and holds enough to
continue a run bit for bit.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metaattn.tasks.cache import replacing

from ..errors import CheckpointError, UserError
from ._digest import ContentError, digest_of

FORMAT, VERSION = "metaattn.checkpoint", 1
DIGEST = "/metaattn_digest"  # the part of the file that has the digest of its content
MOST_PICKLED = 2**24  # bytes besides tensors, which are read slowly: a checkpoint has some kilobytes


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
    """Set every random number generator to a state that :func:`rng_state` returned.

    Raises:
        CheckpointError: It is something else.
    """
    try:
        torch.set_rng_state(state["torch"])
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))  # noqa: NPY002
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))
    except Exception as error:  # each library checks its state, with classes of its own
        raise CheckpointError(
            f"its states of the random number generators cannot be restored ({_reason(error)})"
        ) from error


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint with a digest of its content.

    A kill at any instant, or a full disk, leaves either the old file or the new one, complete.

    Raises:
        ContentError: The content has something besides plain values and tensors.
        OSError: The file cannot be written.
    """
    content = tree_map_only(Tensor, _plain, {"format": FORMAT, "version": VERSION, **content, "digest": "sha256"})
    with io.BytesIO() as buffer:  # written to a file by PyTorch, a full disk would be an error without its name
        torch.save(content, buffer)
        with zipfile.ZipFile(buffer, "a") as file:  # torch.load does not read this part
            file.writestr(zipfile.ZipInfo(file.namelist()[0].split("/")[0] + DIGEST), digest_of(content))
        with replacing(path) as out:
            out.write(buffer.getbuffer())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the new name survives a crash of the machine
    finally:
        os.close(directory)


def _plain(t: Tensor) -> Tensor:
    """Return a tensor on the CPU with a storage of its size: of a view, PyTorch would save the whole storage."""
    t = t.detach().cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def find(path: str | Path, name: str = "latest.pt") -> Path:
    """Return the path of a checkpoint.

    Args:
        path: A checkpoint, or the directory of a run.
        name: Which checkpoint of the directory.

    Raises:
        UserError: There is no such checkpoint.
    """
    path = Path(path)
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"no checkpoint at {str(path)[:200]!r} ({error})") from error
    if is_directory:
        if not (path / name).is_file():
            if (path / "latest.pt").is_file():
                raise UserError(
                    f"{path} has no {name}: the run has not validated yet, or the file was not copied; evaluate the "
                    f"last state with checkpoint={path / 'latest.pt'}, or continue with resume={path}"
                )
            raise UserError(f"{path} contains no {name}: it is not the directory of a run that saved a checkpoint")
        return path / name
    if not is_file:
        raise UserError(f"no checkpoint at {path}")
    return path


def _check_container(path: Path, opened: IO[bytes]) -> tuple[int, str]:
    """Check that an open file is a complete zip file with correct checksums.

    PyTorch writes a zip file without compression, whose table of contents comes last: a file that starts like one but
    has no table of contents is truncated. Compressed parts could expand to more than the memory.

    Returns:
        The size of the file in bytes, and the digest that it has, or ``""``.

    Raises:
        UserError: The file is something else, truncated or damaged.
    """
    start, size = opened.read(4), os.fstat(opened.fileno()).st_size
    if start != b"PK\x03\x04" and start != b"":
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    try:
        if not zipfile.is_zipfile(opened):
            raise _damaged(path, "is truncated: it was not written or copied completely")
        with zipfile.ZipFile(opened) as file:
            parts = file.infolist()
            if any(p.compress_type != zipfile.ZIP_STORED or p.flag_bits & 1 for p in parts):
                raise UserError(f"{path} is damaged or not a checkpoint of train_maml.py: it has compressed parts")
            if sum(p.file_size for p in parts) > size:
                raise _damaged(path, "is damaged: its parts would be larger than the file")
            pickled = sum(p.file_size for p in parts if p.filename.endswith("data.pkl"))
            if pickled > MOST_PICKLED:
                raise UserError(f"{path} is not a checkpoint of train_maml.py: it has {pickled} bytes besides tensors")
            damaged = file.testzip()  # torch.load does not verify the checksums
            saved = [p for p in parts if p.filename.endswith(DIGEST) and p.file_size == 64]
            digest = file.read(saved[0]).decode() if len(saved) == 1 and damaged is None else ""
    except UserError:
        raise
    except Exception as error:  # zipfile raises many classes for damaged files
        raise _damaged(path, f"is damaged and cannot be read ({_reason(error)})") from error
    if damaged is not None:
        raise _damaged(path, f"is damaged: the checksum of its part {damaged} is wrong")
    return size, digest


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _damaged(path: Path, problem: str) -> UserError:
    """Return the error for a damaged file; it names ``best.pt`` as an alternative if that file exists."""
    best = path.with_name("best.pt")
    alternative = f"; {best}, of an earlier step, may be intact" if path != best and best.is_file() else ""
    return UserError(f"{path} {problem}{alternative}")


def _read(path: Path, file: IO[bytes]) -> tuple[Any, int, str]:
    """Return the content of an open file, its size in bytes and its digest; see :func:`_check_container`."""
    try:
        size, expected = _check_container(path, file)
        file.seek(0)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of foreign files
            return torch.load(file, map_location="cpu", weights_only=True), size, expected
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of train_maml.py: it contains more than tensors and plain values"
        ) from error
    except Exception as error:  # PyTorch raises many classes for damaged files
        raise _damaged(path, f"is damaged and cannot be read ({_reason(error)})") from error


def load(path: Path, **entries: type) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. A run may replace the file meanwhile: it is opened once, and read as it was.

    Args:
        path: The file.
        **entries: Names and types of the entries that it must have.

    Returns:
        The entries by name.

    Raises:
        UserError: The file is truncated, damaged or not a checkpoint of this program, or an entry is missing or has
            another type.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    with file:
        content, size, expected = _read(path, file)
    found = content.get("format") if type(content) is dict else None
    if type(found) is not str or found != FORMAT:
        raise UserError(f"{path} is not a checkpoint of train_maml.py")
    version = content.get("version")
    if type(version) is not int:
        raise _damaged(path, f"is damaged: its format version is of type {type(version).__name__}")
    if version != VERSION:
        raise UserError(f"{path} has format version {version}; this program reads version {VERSION}")
    _check_digest(path, content, size, expected)
    for name, kind in entries.items():
        if type(content.get(name)) is not kind:
            got = type(content[name]).__name__ if name in content else "nothing"
            raise UserError(f"{path} is incomplete: its entry {name!r} should be of type {kind.__name__}; got {got}")
    return content


def _check_digest(path: Path, content: dict[str, Any], size: int, expected: str) -> None:
    """Compare the content with the digest that was saved with it.

    The zip file's checksums do not cover its table of contents: one wrong bit there can exchange tensors. Content
    that says nothing of a digest is of an earlier version of the program, or was saved by PyTorch itself.
    """
    if not expected and "digest" in content:
        raise _damaged(path, "is damaged: it has lost the digest of its content")
    try:
        found = digest_of(content, limit=16 * size)  # a key that occurs often is saved once
    except ContentError as error:
        raise _damaged(path, f"is damaged or not a checkpoint of train_maml.py: {error}") from error
    except Exception as error:
        raise _damaged(path, f"is damaged and cannot be read ({_reason(error)})") from error
    if expected and found != expected:
        raise _damaged(path, "is damaged: its content does not have the digest that was saved with it")
    content.pop("digest", None)
