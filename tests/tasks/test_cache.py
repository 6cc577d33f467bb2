"""Cache of arrays: read again, robust against corruption, and optional."""

import numpy as np
import pytest

from metaattn.tasks import cache


def test_it_is_read_again_and_survives_corruption(tmp_path):
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


def test_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("METAATTN_CACHE", str(tmp_path))
    assert cache.directory() == tmp_path
    monkeypatch.delenv("METAATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache.directory()) == "/somewhere/metaattn"


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.warns(UserWarning, match="could not be written"):
        assert cache.cached("x", "k", lambda: {"a": np.ones(1)}, where=blocked)["a"] == 1
