"""Characters of many scripts in many faces: few-shot classification with nothing to download.

The fonts are those that matplotlib ships. Each class is one character, each sample one face of it.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import PIL
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .cache import Arrays, cached
from .episodes import Episodes, split_classes

SIZE = 28  # pixels, as in MNIST and the usual Omniglot
FACES = 12  # samples of each class
POINTS = 22
FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
]
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
SPLIT_SEED = 0  # the split of the classes is part of the data: one for all runs


def _path(font: str) -> Path:
    return Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def _draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """The character in white on black, its ink centred; ``[28, 28]``, uint8."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (SIZE, SIZE), 0)
    at = ((SIZE - (right - left)) / 2 - left, (SIZE - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(at, character, fill=255, font=font)
    return np.asarray(image)


def _samples(character: str, fonts: dict[str, ImageFont.FreeTypeFont]) -> np.ndarray | None:
    """The character in twelve faces, those that differ first; ``None`` if there are not as many."""
    images = [_draw(character, font) for font in fonts.values()]
    images = [image for image in images if image.any()]
    if len(images) < FACES:
        return None
    fresh: dict[bytes, np.ndarray] = {}
    again = []
    for image in images:
        if image.tobytes() in fresh:
            again.append(image)
        fresh.setdefault(image.tobytes(), image)
    return np.stack([*fresh.values(), *again][:FACES])


def build() -> Arrays:
    """Render all classes: ``images`` ``[classes, 12, 28, 28]`` uint8 and ``characters`` ``[classes]`` (code points).

    A face counts only if it holds the glyph (no fallback box); blanks are left out; of characters that look
    the same in any face (Latin A, Greek Α, Cyrillic А) the first stays.
    """
    holds = {name: set(FT2Font(str(_path(name))).get_charmap()) for name in FONTS}
    fonts = {name: ImageFont.truetype(_path(name), POINTS, layout_engine=ImageFont.Layout.BASIC) for name in FONTS}
    count = Counter(code for codes in holds.values() for code in codes)
    codes = [c for c in sorted(count) if count[c] >= FACES and unicodedata.category(chr(c))[0] in "LNPS"]
    images, characters = [], []
    looks: set[bytes] = set()
    for code in tqdm(codes, desc="rendering glyphs", leave=False):
        samples = _samples(chr(code), {name: font for name, font in fonts.items() if code in holds[name]})
        if samples is None or any(image.tobytes() in looks for image in samples):
            continue
        looks.update(image.tobytes() for image in samples)
        images.append(samples)
        characters.append(code)
    return {"images": np.stack(images), "characters": np.array(characters, dtype=np.int32)}


def load(cache: Path | None = None) -> Arrays:
    """What :func:`build` gives, built once and then read from the cache; checked for its size."""
    key = f"1 {mpl.__version__} {PIL.__version__} {features.version('freetype2')} {FONTS} {SIZE} {FACES} {POINTS}"
    return cached("glyphs", key, build, where=cache)


def jitter(images: Tensor, g: torch.Generator) -> Tensor:
    """A random affine map of each image ``[n, 28, 28]``.

    Rotation by up to 25 degrees, scale 0.75 to 1.25, shear up to 0.3 and shift up to an eighth of the image.
    """
    n = len(images)
    # Of the images' dtype, and drawn in one: neither follows torch.set_default_dtype.
    u = (2 * torch.rand(5, n, generator=g, dtype=torch.float32) - 1).to(images.dtype)
    angle, scale, shear, shift = u[0] * math.radians(25), 1 + 0.25 * u[1], 0.3 * u[2], 0.25 * u[3:]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = (torch.stack([cos, shear - sin, shift[0]], -1), torch.stack([sin, cos, shift[1]], -1))
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


def glyphs(
    split: Literal["train", "validation", "test"],
    *,
    way: int,
    shot: int,
    queries: int,
    seed: int = 0,
    length: int = 2**31,
    augment: bool = True,
    cache: Path | None = None,
) -> Episodes:
    """Episodes of characters, ``[samples, 28, 28]`` in ``[0, 1]``.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``: disjoint characters, the same for all seeds.
        way: Characters in an episode.
        shot: Faces of each in the support set; ``shot + queries`` is at most 12.
        queries: Faces of each in the query set.
        seed: Which sequence of episodes.
        length: How many there are.
        augment: Whether each sample is moved by an affine map of its own (:func:`jitter`).
        cache: Where the rendered images are kept; by default ``$METAATTN_CACHE`` or the user's cache directory.

    Raises:
        ValueError: An unknown split; more samples than faces.

    Example:
        >>> from metaattn.tasks import glyphs
        >>> glyphs("test", way=5, shot=1, queries=5)[0].query.inputs.shape
        torch.Size([25, 28, 28])
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}; got {split!r}")
    images = torch.from_numpy(load(cache)["images"])
    n = len(images)
    parts = dict(zip(SPLITS, split_classes(range(n), list(SPLITS.values()), seed=SPLIT_SEED), strict=True))
    return Episodes(
        images.flatten(0, 1).float() / 255,
        torch.arange(n).repeat_interleave(FACES),
        way=way,
        shot=shot,
        queries=queries,
        classes=parts[split],
        seed=seed,
        length=length,
        augment=jitter if augment else None,
    )
