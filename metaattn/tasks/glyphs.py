"""Rendered characters of many scripts and typefaces: few-shot classification without a download.

The fonts are those that matplotlib contains. A class is one character, a sample is that character in one typeface.
matplotlib and Pillow are imported only when glyphs are requested, so that :mod:`metaattn.tasks` works without them.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ._extra import required
from .cache import Arrays, cached
from .episodes import Episodes, split_classes

if TYPE_CHECKING:
    from PIL import ImageFont

SIZE = 28  # pixels, as in MNIST and the usual Omniglot
FACES = 12  # samples of each class
POINTS = 22  # size of the font
FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
]
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
SPLIT_SEED = 0  # the split of the classes is part of the data, and the same in all runs


def _path(font: str) -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def _draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Draw a character in white on black with centred ink, as ``[28, 28]`` uint8."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (SIZE, SIZE), 0)
    at = ((SIZE - (right - left)) / 2 - left, (SIZE - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(at, character, fill=255, font=font)
    return np.asarray(image)


def _samples(character: str, fonts: dict[str, ImageFont.FreeTypeFont]) -> np.ndarray | None:
    """Draw a character in twelve typefaces, distinct images first; ``None`` if it has fewer."""
    images = [_draw(character, font) for font in fonts.values()]
    images = [image for image in images if image.any()]
    if len(images) < FACES:
        return None
    distinct: dict[bytes, np.ndarray] = {}
    repeated = []
    for image in images:
        if image.tobytes() in distinct:
            repeated.append(image)
        distinct.setdefault(image.tobytes(), image)
    return np.stack([*distinct.values(), *repeated][:FACES])


def build() -> Arrays:
    """Render all classes.

    A typeface counts only if it contains the glyph (not a fallback box), and blank images are left out. Of characters
    that look the same in any typeface (Latin A, Greek Α, Cyrillic А), only the first is used.

    Returns:
        ``images`` ``[classes, 12, 28, 28]`` uint8 and ``characters`` ``[classes]`` (code points).
    """
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

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
    """Return the result of :func:`build`, built once and then read from the cache.

    Raises:
        ImportError: matplotlib or Pillow is not installed.
    """
    required("glyphs", "matplotlib", "PIL")  # the key of the cache has their versions
    import matplotlib as mpl
    import PIL
    from PIL import features

    key = f"1 {mpl.__version__} {PIL.__version__} {features.version('freetype2')} {FONTS} {SIZE} {FACES} {POINTS}"
    return cached("glyphs", key, build, where=cache)


def jitter(images: Tensor, g: torch.Generator) -> Tensor:
    """Apply a random affine map to each image.

    It rotates by up to 25 degrees, scales by 0.75 to 1.25, shears by up to 0.3 and shifts by up to an eighth of the
    image.

    Args:
        images: ``[samples, height, width]``.
        g: Generator of the random numbers.

    Returns:
        The shape and dtype of ``images``.
    """
    n = len(images)
    # Drawn in float32 and cast to the images' dtype, so that torch.set_default_dtype has no influence.
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
    """Episodes of rendered characters: images ``[samples, 28, 28]`` with values in ``[0, 1]`` and bright ink.

    The characters come from the fonts in matplotlib: more than 2000 classes with 12 typefaces each.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``: disjoint characters, the same for all seeds.
        way: Number of characters in an episode.
        shot: Number of typefaces of each character in the support set; ``shot + queries`` is at most 12.
        queries: Number of typefaces of each character in the query set.
        seed: Seed of the sequence of episodes.
        length: Number of episodes.
        augment: Move each sample by a random affine map: rotation, scale, shear and shift.
        cache: Directory of the rendered images; ``None`` for ``$METAATTN_CACHE`` or the user's cache directory.

    Returns:
        The episodes. Those of one index: support inputs ``[way * shot, 28, 28]``, query inputs ``[way * queries, 28,
        28]``, and a target for each; see :class:`Episodes`.

    Raises:
        ValueError: The split is unknown; there are more samples than typefaces.
        ImportError: matplotlib or Pillow is not installed.

    Source:
        The protocol of N-way K-shot episodes: Vinyals et al. 2016 (arXiv 1606.04080), section 4.

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
