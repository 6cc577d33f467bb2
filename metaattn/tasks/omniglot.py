"""Omniglot, read from a folder in torchvision's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .cache import Arrays, cached
from .episodes import Episodes, split_classes

SIZE = 28
PARTS = ("images_background", "images_evaluation")
SPLITS = {"train": 1100 / 1623, "validation": 100 / 1623, "test": 423 / 1623}
SPLIT_SEED = 0

_HOW = (
    "Expected <root>/omniglot-py/images_background/<alphabet>/<character>/*.png (and images_evaluation likewise). "
    "With torchvision installed, torchvision.datasets.Omniglot(root, background=background, download=True), once "
    "with background True and once False, makes it"
)


def _folders(root: Path) -> list[Path]:
    """The folders of characters, sorted."""
    base = root / "omniglot-py" if (root / "omniglot-py").is_dir() else root
    found = [c for part in PARTS for c in sorted((base / part).glob("*/*")) if c.is_dir()]
    if not found:
        raise FileNotFoundError(f"no Omniglot in {root}. {_HOW}")
    return found


def _read(path: Path) -> np.ndarray:
    """A drawing as ``[28, 28]`` uint8, ink bright."""
    try:
        with Image.open(path) as image:
            small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable image ({error}); delete the folder and get Omniglot again"
        ) from error
    return 255 - np.asarray(small)


def load(root: Path, cache: Path | None = None) -> Arrays:
    """``images`` ``[samples, 28, 28]`` uint8 and ``labels`` ``[samples]``, read once and then from the cache.

    Raises:
        FileNotFoundError: No Omniglot there.
        ValueError: An image that cannot be read, by name.
    """
    files = [(label, f) for label, folder in enumerate(_folders(root)) for f in sorted(folder.glob("*.png"))]

    def build() -> Arrays:
        images = [_read(f) for _, f in tqdm(files, desc="reading Omniglot", leave=False)]
        return {"images": np.stack(images), "labels": np.array([label for label, _ in files])}

    key = f"1 {root.resolve()} " + " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for _, f in files)
    return cached("omniglot", key, build, where=cache)


def _turn(images: Tensor, labels: Tensor, classes: list[int], total: int) -> tuple[Tensor, Tensor, list[int]]:
    """Each class turned by 90, 180 and 270 degrees as three further classes."""
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
    """Episodes of hand-drawn characters, ``[samples, 28, 28]`` in ``[0, 1]``.

    Args:
        split: ``"train"`` (1100 of the 1623 characters), ``"validation"`` (100) or ``"test"`` (423): shuffled
            by one seed for all runs.
        root: The folder that holds ``omniglot-py``, as torchvision makes it.
        way: Characters in an episode.
        shot: Drawings of each in the support set; ``shot + queries`` is at most 20.
        queries: Drawings of each in the query set.
        seed: Which sequence of episodes.
        length: How many there are.
        rotations: Whether meta-training has each character also turned by quarters, as classes of their own.
        cache: Where the decoded images are kept; by default ``$METAATTN_CACHE`` or the user's cache directory.

    Raises:
        FileNotFoundError: No Omniglot in ``root``; says how to get it.
        ValueError: An unknown split; an image that cannot be read, by name.

    Source:
        Lake et al. 2015; the protocol: Vinyals et al. 2016 (arXiv 1606.04080), Santoro et al. 2016.
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
