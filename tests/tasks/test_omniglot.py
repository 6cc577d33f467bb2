"""Omniglot, from a small folder in torchvision's layout."""

import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from metaattn.tasks import omniglot
from tests.helpers import assert_close


@pytest.fixture
def tiny_omniglot(tmp_path):
    """Two alphabets of 10 characters in each half, with 20 drawings each: a dark stroke at a place for each class."""
    rng, n = np.random.default_rng(0), 0
    for part in ("images_background", "images_evaluation"):
        for alphabet in ("Aleph", "Beth"):
            for c in range(10):
                folder = tmp_path / "omniglot-py" / part / alphabet / f"character{c + 1:02d}"
                folder.mkdir(parents=True)
                for k in range(20):
                    a = np.full((105, 105), 255, np.uint8)
                    a[10 + 2 * n : 14 + 2 * n, 20 + rng.integers(20) : 80] = 0
                    Image.fromarray(a).convert("1").save(folder / f"{n:04d}_{k + 1:02d}.png")
                n += 1
    return tmp_path


def test_omniglot(tiny_omniglot, tmp_path):
    options = {"way": 2, "shot": 1, "queries": 5, "cache": tmp_path / "cache"}
    parts = {s: omniglot(s, tiny_omniglot, rotations=False, **options) for s in ("train", "validation", "test")}
    assert sum(len(e.classes) for e in parts.values()) == 40
    x = parts["test"][0].query.inputs
    assert x.shape == (10, 28, 28)
    assert 0 < x.mean() < 0.2  # ink bright on dark
    turned = omniglot("train", tiny_omniglot, **options)
    assert len(turned.classes) == 4 * len(parts["train"].classes)
    # The root may also be the folder omniglot-py itself.
    assert_close(omniglot("test", tiny_omniglot / "omniglot-py", **options)[0], parts["test"][0])


def test_omniglot_errors(tiny_omniglot, tmp_path):
    options = {"way": 2, "shot": 1, "queries": 5, "cache": tmp_path / "cache"}
    with pytest.raises(FileNotFoundError, match=r"no Omniglot in .*nowhere.*torchvision.datasets.Omniglot\(root"):
        omniglot("train", tmp_path / "nowhere", **options)
    with pytest.raises(ValueError, match="split must be one of"):
        omniglot("dev", tiny_omniglot, **options)
    broken = next((tiny_omniglot / "omniglot-py").rglob("*.png"))
    broken.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"{broken.name} is not a readable image"):
        omniglot("train", tiny_omniglot, **options)


def test_without_the_extra(tiny_omniglot, tmp_path, monkeypatch):
    """Pillow decodes the images; once they are in the cache, it is not needed."""
    options = {"way": 2, "shot": 1, "queries": 5}
    want = omniglot("test", tiny_omniglot, cache=tmp_path / "cache", **options)[0]
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"tasks.omniglot needs pillow, .*pip install -e \"\.\[train\]\""):
        omniglot("test", tiny_omniglot, cache=tmp_path / "empty", **options)
    assert_close(omniglot("test", tiny_omniglot, cache=tmp_path / "cache", **options)[0], want)


def _png(width, height, data=b""):
    """A PNG file of a size, whose pixels are ``data``."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _broken_header(whole):
    """The length of the first part is wrong, which Pillow reports as a SyntaxError."""
    return whole[:8] + struct.pack(">I", 5) + whole[12:]


DAMAGED = {
    "huge": lambda path: path.write_bytes(_png(60_000, 60_000)),
    "large": lambda path: path.write_bytes(_png(9_000, 9_000)),
    "no pixels": lambda path: path.write_bytes(_png(105, 105)),
    "empty": lambda path: path.write_bytes(_png(0, 0)),
    "header": lambda path: path.write_bytes(_broken_header(path.read_bytes())),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another format": lambda path: Image.new("L", (105, 105)).save(path, format="GIF"),
    "loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_drawing_is_named(tiny_omniglot, tmp_path, how):
    path = sorted((tiny_omniglot / "omniglot-py").rglob("*.png"))[7]
    DAMAGED[how](path)
    with pytest.raises(ValueError, match=rf"{path.name} is not a readable image \(.*; delete the folder") as error:
        omniglot("train", tiny_omniglot, way=2, shot=1, queries=5, cache=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_folders_without_drawings(tmp_path):
    (tmp_path / "omniglot-py" / "images_background" / "Aleph" / "character01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no drawings in .*torchvision"):
        omniglot("train", tmp_path, way=2, shot=1, queries=5, cache=tmp_path / "cache")
