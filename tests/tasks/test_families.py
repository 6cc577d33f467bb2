"""Glyphs, sinusoids and Omniglot, and the cache under them."""

import math
import sys
import unicodedata

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image

from metaattn.tasks import Sinusoids, cache, glyphs, omniglot, stack
from metaattn.tasks.glyphs import FONTS, jitter
from tests.helpers import assert_close

glyphs_module = sys.modules["metaattn.tasks.glyphs"]  # the name in the package is the function


@pytest.fixture(scope="module")
def rendered():
    return glyphs_module.build()


def test_glyphs_are_many(rendered):
    images = rendered["images"]
    assert images.shape[0] >= 2000
    assert images.shape[1:] == (12, 28, 28)
    assert images.dtype == np.uint8
    scripts = {unicodedata.name(chr(c), "?").split()[0] for c in rendered["characters"]}
    assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"} <= scripts


def test_no_glyph_is_blank_or_a_duplicate(rendered):
    images = rendered["images"]
    assert images.reshape(-1, 28 * 28).max(-1).min() > 0
    owner = {}
    for i, samples in enumerate(images):
        for image in samples:
            assert owner.setdefault(image.tobytes(), i) == i, "two characters look the same"
    assert len(set(rendered["characters"].tolist())) == len(images)


def test_faces_hold_their_glyphs(rendered):
    """At least twelve faces have each character in their own character map: no fallback boxes."""
    holds = [set(FT2Font(f"{mpl.get_data_path()}/fonts/ttf/{name}.ttf").get_charmap()) for name in FONTS]
    assert all(sum(code in h for h in holds) >= 12 for code in rendered["characters"].tolist())


def test_rendering_is_deterministic(rendered):
    again = glyphs_module.build()
    assert all(np.array_equal(again[k], rendered[k]) for k in rendered)


def test_glyph_splits_share_no_character(tmp_path):
    parts = [set(glyphs(s, way=5, shot=1, queries=5, cache=tmp_path).classes) for s in ("train", "validation", "test")]
    assert all(not a & b for i, a in enumerate(parts) for b in parts[:i])
    assert sum(map(len, parts)) >= 2000


def test_glyph_episodes(tmp_path):
    e = stack(glyphs("test", way=5, shot=1, queries=5, cache=tmp_path), 0, 3)
    assert e.support.inputs.shape == (3, 5, 28, 28)
    assert e.query.inputs.shape == (3, 25, 28, 28)
    assert 0 <= e.query.inputs.min() < e.query.inputs.max() <= 1 + 1e-6
    plain = glyphs("test", way=5, shot=1, queries=5, augment=False, cache=tmp_path)[0]
    assert not torch.equal(plain.query.inputs, e.query.inputs[0])


def test_glyph_errors(tmp_path):
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test'; got 'dev'"):
        glyphs("dev", way=5, shot=1, queries=5, cache=tmp_path)
    with pytest.raises(ValueError, match="6 shots and 7 queries need 13 samples"):
        glyphs("test", way=5, shot=6, queries=7, cache=tmp_path)


def test_jitter_moves_and_keeps():
    x = torch.zeros(200, 28, 28)
    x[:, 12:16, 12:16] = 1
    y = jitter(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    ink = y.sum((1, 2))
    assert (ink > 0.4 * 16).all()  # scaled, not lost
    grid = torch.arange(28.0)
    centre = (y.sum(1) * grid).sum(1) / ink
    assert centre.std() > 1.0
    assert (centre - 13.5).abs().max() < 6
    assert_close(jitter(x, torch.Generator().manual_seed(0)), y)


def test_glyphs_do_not_follow_the_default_dtype(tmp_path):
    episodes = glyphs("test", way=5, shot=1, queries=2, cache=tmp_path)
    want = episodes[3]
    torch.set_default_dtype(torch.float64)
    try:
        got = episodes[3]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.query.inputs.dtype == torch.float32
    assert torch.equal(got.query.inputs, want.query.inputs)
    assert jitter(want.query.inputs.double(), torch.Generator()).dtype == torch.float64


def test_cache_is_read_again_and_survives_corruption(tmp_path):
    calls, data = [], np.random.default_rng(0).integers(0, 256, 5000, np.uint8)

    def build():
        calls.append(1)
        return {"a": data}

    def check(key="key"):
        assert np.array_equal(cache.cached("x", key, build, where=tmp_path)["a"], data)
        return len(calls)

    assert (check(), check()) == (1, 1)
    assert check("other key") == 2
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        for broken in (whole[: len(whole) // 2], b"", b"not a zip file", bytes(flipped)):
            path.write_bytes(broken)
            with pytest.warns(UserWarning, match=rf"building .*{path.name} again: it cannot be read"):
                _ = check("key"), check("other key")
            before = len(calls)
            assert check() == check("other key") == before
    assert not list(tmp_path.glob("*.tmp"))


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("METAATTN_CACHE", str(tmp_path))
    assert cache.directory() == tmp_path
    monkeypatch.delenv("METAATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache.directory()) == "/somewhere/metaattn"


def test_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.warns(UserWarning, match="could not be written"):
        assert cache.cached("x", "k", lambda: {"a": np.ones(1)}, where=blocked)["a"] == 1


def test_sinusoids():
    episodes = Sinusoids(shot=5, queries=10, seed=1)
    e = stack(episodes, 0, 200)
    assert e.support.inputs.shape == (200, 5, 1)
    assert e.query.targets.shape == (200, 10, 1)
    assert e.query.inputs.min() >= -5
    assert e.query.inputs.max() <= 5
    assert e.query.inputs.max() > 4.9
    assert_close(episodes[3], Sinusoids(shot=5, queries=10, seed=1)[3])
    for i in range(20):  # one sinusoid for support and query: fit on one, exact on the other
        (x, y), (u, v) = (tuple(t.double() for t in part) for part in episodes[i])
        fit = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], 1), y).solution
        assert torch.allclose(torch.cat([u.sin(), u.cos()], 1) @ fit, v, atol=1e-4)
        amplitude, phase = fit.norm(), math.atan2(fit[1], fit[0])
        assert 0.1 <= amplitude <= 5
        assert -1e-3 <= phase <= math.pi + 1e-3


def test_sinusoid_errors():
    with pytest.raises(ValueError, match="shot must be at least 1"):
        Sinusoids(shot=0, queries=1)
    with pytest.raises(IndexError, match="indices 0 to 1; got 2"):
        Sinusoids(shot=1, queries=1, length=2)[2]


@pytest.fixture
def tiny_omniglot(tmp_path):
    """Two alphabets of 10 characters in each half, 20 drawings: a dark stroke whose place tells the class."""
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
    # The folder itself may be named as well.
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
