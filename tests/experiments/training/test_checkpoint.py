"""Checkpoints: written completely or not at all, and checked when they are read."""

import io
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.errors import UserError
from experiments.training import checkpoint

ROOT = Path(__file__).parents[3]
# For each line of its input it forks a process that writes checkpoints until it is killed. PyTorch is imported once.
WRITER = """
import os, sys, torch
from pathlib import Path
from experiments.training import checkpoint
for line in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        os.wait()
        print("ended", flush=True)
        continue
    for i in range(10**6):
        checkpoint.save(Path(sys.argv[1]), {"step": i, "data": torch.full((200_000,), float(i))})
"""


def test_round_trip(tmp_path):
    path = tmp_path / "a.pt"
    content = {"step": 3, "meta": {"params": {"w": torch.randn(3)}}, "rng": checkpoint.rng_state()}
    checkpoint.save(path, content)
    back = checkpoint.load(path)
    assert torch.equal(back["meta"]["params"]["w"], content["meta"]["params"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_rng_state_restores_every_generator(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"rng": checkpoint.rng_state()})
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))  # noqa: NPY002
    want = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert draw() == want


def test_a_file_that_a_run_replaces_meanwhile_is_read_as_it_was(tmp_path, monkeypatch):
    """The digest and the tensors must be of the same file."""
    path, testzip = tmp_path / "a.pt", zipfile.ZipFile.testzip
    checkpoint.save(path, {"step": 1, "data": torch.ones(1000)})

    def replaced(file):
        checkpoint.save(path, {"step": 2, "data": torch.zeros(1000)})
        return testzip(file)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", replaced)
    content = checkpoint.load(path)
    assert content["step"] == 1
    assert content["data"].all()
    assert checkpoint.load(path)["step"] == 2


def test_a_failed_write_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(AttributeError, match="pickle"):
        checkpoint.save(path, {"step": lambda: 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_readable_one(tmp_path):
    path = tmp_path / "a.pt"
    delays = np.random.default_rng(0).uniform(0, 0.05, 5)
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for delay in delays:
            path.unlink(missing_ok=True)
            process.stdin.write("write\n")
            process.stdin.flush()
            writer = int(process.stdout.readline())
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(float(delay))
            os.kill(writer, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            content = checkpoint.load(path)
            assert (content["data"] == content["step"]).all()
        process.stdin.close()
    assert process.returncode == 0


def test_a_run_without_a_validation_names_the_alternatives(tmp_path):
    checkpoint.save(tmp_path / "latest.pt", {"step": 3})
    assert checkpoint.find(tmp_path) == tmp_path / "latest.pt"
    with pytest.raises(UserError, match=r"has no best\.pt: the run has not validated.* checkpoint=\S+/latest\.pt, or"):
        checkpoint.find(tmp_path, "best.pt")


def test_a_single_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": 3, "data": torch.ones(1000)})
    raw = bytearray(path.read_bytes())
    at = raw.index(torch.ones(1).numpy().tobytes() * 8)
    raw[at + 3] ^= 0x40
    path.write_bytes(raw)
    assert torch.load(path)["data"][0] != 1, "PyTorch does not notice"
    with pytest.raises(UserError, match=r"a\.pt is damaged: the checksum of its part \S+/data/0 is wrong$"):
        checkpoint.load(path)
    checkpoint.save(tmp_path / "best.pt", {"step": 2})
    with pytest.raises(UserError, match=r"is wrong; \S+/best\.pt, of an earlier step, may be intact"):
        checkpoint.load(path)


def test_an_entry_that_is_missing_or_wrong_is_named(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": "3"})
    with pytest.raises(UserError, match="its entry 'step' should be of type int; got str"):
        checkpoint.load(path, step=int)
    with pytest.raises(UserError, match="its entry 'meta' should be of type dict; got nothing"):
        checkpoint.load(path, meta=dict)


def test_another_format_version_is_named(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="format version 99; this program reads version 1"):
        checkpoint.load(tmp_path / "a.pt")


CONTENT = {
    "step": 3,
    "meta": {"params": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0).view(2, 3) + 6}},
    "numbers": (1, True, None, 0.5, "text", [2**70]),
}


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _loads_equal_or_not(path, want):
    """Load a damaged checkpoint: it is rejected by its name in one line, or equal."""
    problem = None
    try:
        got = checkpoint.load(path)
    except UserError as error:
        problem = str(error)
    if problem is None:
        assert _same(got, want)
    else:
        assert str(path) in problem
        assert "\n" not in problem
    return problem is None


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    return tmp_path / "a.pt"


def test_every_bit_of_the_table_of_contents(saved):
    """No checksum of the zip file covers it: a bit can exchange two tensors."""
    whole, want = saved.read_bytes(), checkpoint.load(saved)
    start, accepted = whole.index(b"PK\x01\x02"), 0
    for at in range(start, len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            saved.write_bytes(flipped)
            accepted += _loads_equal_or_not(saved, want)
    assert accepted < 4 * (len(whole) - start)  # such as times and attributes of files


def test_a_part_that_is_exchanged_for_another(saved):
    """The directory bit of a part, which made PyTorch read zeros, and the names of two parts, exchanged."""
    whole, want = saved.read_bytes(), checkpoint.load(saved)
    table = whole.index(b"PK\x01\x02")
    for part in (b"/data/0", b"/data/1"):
        at = whole.index(b"archive" + part, table)
        at = whole.rindex(b"PK\x01\x02", table, at)
        flipped = bytearray(whole)
        flipped[at + 38] ^= 0x10
        saved.write_bytes(flipped)
        _loads_equal_or_not(saved, want)
    exchanged = whole[:table] + whole[table:].replace(b"/data/0", b"/data/x").replace(b"/data/1", b"/data/0")
    saved.write_bytes(exchanged.replace(b"/data/x", b"/data/1"))
    assert not _loads_equal_or_not(saved, want)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(saved, seed):
    whole, want, draw = saved.read_bytes(), checkpoint.load(saved), random.Random(seed)
    for _ in range(100):
        damaged = bytearray(whole)
        at, size = draw.randrange(len(whole)), draw.choice([1, 16, 500])
        match draw.randrange(6):
            case 0:
                damaged[at] ^= 1 << draw.randrange(8)
            case 1:
                damaged = damaged[:at]
            case 2:
                damaged[at : at + size] = bytes(len(damaged[at : at + size]))
            case 3:
                damaged[at:at] = draw.randbytes(size)
            case 4:
                del damaged[at : at + size]
            case 5:
                damaged += draw.randbytes(size)
        saved.write_bytes(damaged)
        _loads_equal_or_not(saved, want)


def _packed(change=lambda name, data: data, how=zipfile.ZIP_STORED, source=b""):
    """Write the parts of a checkpoint again, changed, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as parts, zipfile.ZipFile(out, "w", how) as packed:
        for name in parts.namelist():
            packed.writestr(name, change(name, parts.read(name)))
    return out.getvalue()


def _pickled(data):
    return lambda name, old: data if name.endswith("data.pkl") else old


def _doubled():
    """Pickle 40 lists, each of which has the one before twice: a terabyte for whoever walks through it."""
    return b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 40)) + b"."


PACKED = {
    "a bomb of tensors": (lambda name, old: bytes(2**28) if "/data/" in name else old, zipfile.ZIP_DEFLATED),
    "a bomb of values": (_pickled(b"(" * 2**28), zipfile.ZIP_DEFLATED),
    "many values": (_pickled(b"(" * 2**25), zipfile.ZIP_STORED),
    "compressed": (lambda name, old: old, zipfile.ZIP_BZIP2),
    "doubled": (_pickled(_doubled()), zipfile.ZIP_STORED),
    "a circle": (_pickled(b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s."), zipfile.ZIP_STORED),
    "code": (_pickled(b"cos\nsystem\n(S'touch executed'\ntR."), zipfile.ZIP_STORED),
    "no values": (_pickled(b""), zipfile.ZIP_STORED),
    "a short tensor": (lambda name, old: old[:4] if name.endswith("/data/0") else old, zipfile.ZIP_STORED),
    "no tensor": (lambda name, old: b"" if name.endswith("/data/0") else old, zipfile.ZIP_STORED),
    "other bytes": (lambda name, old: b"big" if name.endswith("byteorder") else old, zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_foreign_container_is_rejected(saved, name, monkeypatch):
    monkeypatch.chdir(saved.parent)
    want = checkpoint.load(saved)
    saved.write_bytes(_packed(*PACKED[name], source=saved.read_bytes()))
    assert not _loads_equal_or_not(saved, want)
    assert not (saved.parent / "executed").exists()


def test_the_same_parts_in_another_container(saved):
    want = checkpoint.load(saved)
    saved.write_bytes(_packed(source=saved.read_bytes()))
    assert _loads_equal_or_not(saved, want)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(2**40),
        torch.empty(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(4)[::2],
        {1, 2},
        b"bytes",
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_content_that_the_program_does_not_write_is_rejected(tmp_path, value):
    path = tmp_path / "a.pt"
    torch.save({"format": checkpoint.FORMAT, "version": 1, "x": value}, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a" + checkpoint.DIGEST, "0" * 64)
    with pytest.raises(UserError, match=r"a\.pt is (damaged|not a checkpoint)"):
        checkpoint.load(path)


def test_a_checkpoint_that_lost_its_digest_is_rejected(saved):
    torch.save(torch.load(saved), saved)
    with pytest.raises(UserError, match=r"a\.pt is damaged: it has lost the digest of its content"):
        checkpoint.load(saved)


def test_a_checkpoint_of_before_there_were_digests_is_read(saved):
    content = checkpoint.load(saved)
    torch.save(content, saved)
    assert _same(checkpoint.load(saved), content)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_a_version_of_another_type_is_rejected(tmp_path, value):
    checkpoint.save(tmp_path / "a.pt", {"version": value})
    with pytest.raises(UserError, match="its format version is of type"):
        checkpoint.load(tmp_path / "a.pt")


def test_views_are_saved_without_their_base(tmp_path):
    base = torch.arange(1000.0)
    checkpoint.save(tmp_path / "a.pt", {"x": base[3:5], "y": base[::100], "z": torch.ones(1).expand(3)})
    assert (tmp_path / "a.pt").stat().st_size < 3000
    content = checkpoint.load(tmp_path / "a.pt")
    assert [content[k].tolist() for k in "xyz"] == [[3, 4], base[::100].tolist(), [1, 1, 1]]


def test_a_path_that_is_none(tmp_path):
    for path in ("a\0b", "a" * 5000, tmp_path / "loop"):
        if path == tmp_path / "loop":
            path.symlink_to(path)
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.find(path)
