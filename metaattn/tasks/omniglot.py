"""Omniglot, read from a folder in the layout of torchvision."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._extra import required
from .cache import Arrays, cached
from .episodes import Episodes, split_classes

SIZE = 28
LARGEST = 4096  # pixels of a side; a file of some bytes can hold an image that fills the memory
PARTS = ("images_background", "images_evaluation")
SPLITS = {"train": 1100 / 1623, "validation": 100 / 1623, "test": 423 / 1623}
SPLIT_SEED = 0

_EXPECTED = (
    "Expected the files <root>/omniglot-py/images_background/<alphabet>/<character>/*.png, and the same for "
    "images_evaluation. With torchvision installed, call torchvision.datasets.Omniglot(root, background=background, "
    "download=True) for background=True and for background=False"
)


def _folders(root: Path) -> list[Path]:
    """Return the folders of characters, sorted."""
    base = root / "omniglot-py" if (root / "omniglot-py").is_dir() else root
    found = [c for part in PARTS for c in sorted((base / part).glob("*/*")) if c.is_dir()]
    if not found:
        raise FileNotFoundError(f"no Omniglot in {root}. {_EXPECTED}")
    return found


def _read(path: Path) -> np.ndarray:
    """Read a drawing as ``[28, 28]`` uint8, with bright ink."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata of files that can be read
            with Image.open(path, formats=["PNG"]) as image:
                if max(image.size) > LARGEST:
                    raise ValueError(f"{image.width} x {image.height} pixels, where Omniglot has 105 x 105")
                small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
    except Exception as error:  # Pillow raises many classes for damaged files, SyntaxError among them
        raise _unreadable(path, error) from error
    return 255 - np.asarray(small)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a readable image ({error}); delete the folder and download Omniglot again")


def _identity(path: Path) -> str:
    """Return what changes with a drawing's file: name, size and time.

    Raises:
        ValueError: It is no ordinary file, for example a link to itself.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def load(root: Path, cache: Path | None = None) -> Arrays:
    """Return all drawings, read once and then from the cache.

    Args:
        root: The folder that holds ``omniglot-py``.
        cache: The cache directory.

    Returns:
        ``images`` ``[samples, 28, 28]`` uint8 and ``labels`` ``[samples]``.

    Raises:
        FileNotFoundError: ``root`` does not hold Omniglot.
        ValueError: An image cannot be read; the message names it.
        ImportError: Pillow is not installed, and the images are not in the cache.
    """
    files = [(label, f) for label, folder in enumerate(_folders(root)) for f in sorted(folder.glob("*.png"))]
    if not files:
        raise FileNotFoundError(f"no drawings in {root}. {_EXPECTED}")

    def build() -> Arrays:
        required("omniglot", "PIL")
        images = [_read(f) for _, f in tqdm(files, desc="reading Omniglot", leave=False)]
        return {"images": np.stack(images), "labels": np.array([label for label, _ in files])}

    key = f"1 {root.resolve()} " + " ".join(_identity(f) for _, f in files)
    return cached("omniglot", key, build, where=cache)


def _turn(images: Tensor, labels: Tensor, classes: list[int], total: int) -> tuple[Tensor, Tensor, list[int]]:
    """Add each class rotated by 90, 180 and 270 degrees as three more classes."""
    turned = torch.cat([images.rot90(k, (-2, -1)) for k in range(4)])
    return turned, torch.cat([labels + k * total for k in range(4)]), [c + k * total for k in range(4) for c in classes]


def omniglot(
    split: Literal["train", "validation", "test"],
    root: str | Path,
    *,
    way: int,
    shot: int,
    queries: int,
    seed: int = 0,
    length: int = 2**31,
    rotations: bool = True,
    cache: Path | None = None,
) -> Episodes:
    """Episodes of hand-drawn characters: images ``[samples, 28, 28]`` with values in ``[0, 1]`` and bright ink.

    Args:
        split: ``"train"`` (1100 of the 1623 characters), ``"validation"`` (100) or ``"test"`` (423). The split is
            random, and the same for all seeds.
        root: The folder that holds ``omniglot-py``, as torchvision makes it.
        way: Number of characters in an episode.
        shot: Number of drawings of each character in the support set; ``shot + queries`` is at most 20.
        queries: Number of drawings of each character in the query set.
        seed: Seed of the sequence of episodes.
        length: Number of episodes.
        rotations: In ``"train"``, add each character rotated by 90, 180 and 270 degrees as further classes.
        cache: Directory of the decoded images; ``None`` for ``$METAATTN_CACHE`` or the user's cache directory.

    Returns:
        The episodes. Those of one index: support inputs ``[way * shot, 28, 28]``, query inputs ``[way * queries, 28,
        28]``, and a target for each; see :class:`Episodes`.

    Raises:
        FileNotFoundError: ``root`` does not hold Omniglot; the message says how to get it.
        ValueError: The split is unknown; an image cannot be read, and the message names it.
        ImportError: Pillow is not installed, and the images are not in the cache.

    Source:
        Lake et al. 2015; the protocol: Vinyals et al. 2016 (arXiv 1606.04080), Santoro et al. 2016.

    Example:
        >>> from metaattn.tasks import omniglot
        >>> episodes = omniglot("test", "data", way=5, shot=1, queries=5)  # doctest: +SKIP
        >>> episodes[0].query.inputs.shape  # doctest: +SKIP
        torch.Size([25, 28, 28])
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}; got {split!r}")
    arrays = load(Path(root), cache)
    images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    total = int(labels.max()) + 1
    parts = dict(zip(SPLITS, split_classes(range(total), list(SPLITS.values()), seed=SPLIT_SEED), strict=True))
    classes = parts[split]
    if rotations and split == "train":
        images, labels, classes = _turn(images, labels, classes, total)
    return Episodes(
        images.float() / 255,
        labels,
        way=way,
        shot=shot,
        queries=queries,
        classes=classes,
        seed=seed,
        length=length,
    )
