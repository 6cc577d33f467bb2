"""Checkpoints: written completely or not at all, and checked when they are read."""

import os
import random
import signal
import subprocess
import sys
import time
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
