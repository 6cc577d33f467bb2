"""Glyphs: the rendered characters, their split into classes, their episodes, and the extra they need (_extra)."""

import sys
import unicodedata

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font

from metaattn.tasks import glyphs, stack
from metaattn.tasks.glyphs import FONTS, jitter
from tests.helpers import assert_close

module = sys.modules["metaattn.tasks.glyphs"]  # metaattn.tasks.glyphs is the function


@pytest.fixture(scope="module")
def rendered():
    return module.build()


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
    """At least twelve typefaces contain each character in their character map, so that none is a fallback box."""
    holds = [set(FT2Font(f"{mpl.get_data_path()}/fonts/ttf/{name}.ttf").get_charmap()) for name in FONTS]
    assert all(sum(code in h for h in holds) >= 12 for code in rendered["characters"].tolist())


def test_rendering_is_deterministic(rendered):
    again = module.build()
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


@pytest.mark.parametrize("name", ["matplotlib", "PIL"])
def test_without_the_extra(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"tasks.glyphs needs matplotlib and pillow, .*pip install \"metaattn\[train\]\""
    ):
        glyphs("test", way=5, shot=1, queries=5, cache=tmp_path)
