"""Omniglot, from a small folder in torchvision's layout."""

import sys

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
