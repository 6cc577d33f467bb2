"""Cache of arrays: read again, robust against corruption, and optional."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

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


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_is_built_again(tmp_path, seed):
    data, draw = np.random.default_rng(0).integers(0, 256, 300, np.uint8), random.Random(seed)
    build = lambda: {"a": data, "b": data.astype(np.float32)}
    cache.cached("x", "key", build, where=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3, 50])):
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as warned:  # none for a bit that no one reads
            warnings.simplefilter("always")
            arrays = cache.cached("x", "key", build, where=tmp_path)
        assert np.array_equal(arrays["a"], data)
        assert np.array_equal(arrays["b"], data)
        assert all("again: it cannot be read" in str(w.message) for w in warned)


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop"])
def test_what_is_no_file_is_replaced(tmp_path, kind):
    build = lambda: {"a": np.ones(3)}
    cache.cached("x", "key", build, where=tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    {"folder": Path.mkdir, "fifo": os.mkfifo, "loop": lambda p: p.symlink_to(p)}[kind](path)
    if kind == "folder":
        with pytest.warns(UserWarning, match="could not be written"):
            cache.cached("x", "key", build, where=tmp_path)
    else:
        assert cache.cached("x", "key", build, where=tmp_path)["a"].sum() == 3
        assert path.is_file()


WRITER = """
import os, signal, sys
from pathlib import Path
from metaattn.tasks.cache import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_kill_are_removed_and_those_of_a_writer_stay(tmp_path):
    path = tmp_path / "a.bin"
    arguments = [sys.executable, "-c", WRITER, str(path)]
    options = {"cwd": Path(__file__).parents[2], "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, **options) as alive, subprocess.Popen(arguments, **options) as dead:
        assert alive.stdout.readline() == dead.stdout.readline() == b"written\n"
        dead.kill()
        dead.wait()
        assert len(list(tmp_path.iterdir())) == 2
        with cache.replacing(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
        assert len(list(tmp_path.iterdir())) == 2  # the file, and that of the writer that is alive
        alive.communicate()
    assert alive.returncode == 0
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


def test_files_with_similar_names_stay(tmp_path):
    kept = [tmp_path / name for name in (".a.bin.backup", ".a.bin.abcdefghi", "a.bin.abcdefgh", ".b.bin.abcdefgh")]
    for file in kept:
        file.touch()
    with cache.replacing(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "a.bin"}


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    make, made = cache.tempfile.mkstemp, []

    def removed(**options):
        handle, name = make(**options)
        made.append(name)
        if len(made) == 1:
            os.unlink(name)
        return handle, name

    monkeypatch.setattr(cache.tempfile, "mkstemp", removed)
    with cache.replacing(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert len(made) == 2
    assert (tmp_path / "a.bin").read_bytes() == b"x"
