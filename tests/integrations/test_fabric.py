"""Fabric's loop around a meta-step against plain PyTorch, on one process and on two."""

import pytest
import torch

from tests.helpers import assert_close, python_blocks
from tests.integrations import loops

pytest.importorskip("lightning_fabric")
PAGE = loops.ROOT / "docs" / "integrations" / "fabric.md"


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_page(tmp_path, monkeypatch):
    """The blocks of the page run as printed: the loop, a checkpoint, and Fabric's backward with the same gradient."""
    monkeypatch.chdir(tmp_path)
    loop, checkpoint, backward = python_blocks(PAGE)
    session = {}
    exec(loop, session)
    history, params = loops.plain()
    assert_close(torch.tensor(session["history"]), history)
    assert_close(session["meta"]["params"], params)
    state = session["optimizer"].state_dict()["state"]
    exec(checkpoint, session)
    assert_close(session["meta"]["params"], params)
    assert_close(session["optimizer"].state_dict()["state"], state)
    exec(backward, session)
    tasks, learner, meta = (session[k] for k in ("tasks", "learner", "meta"))
    gradient = learner.value_and_grad(meta, tasks.support, tasks.query)[1]
    assert_close({k: p.grad for k, p in meta["params"].items()}, gradient["params"])


@pytest.mark.slow
def test_two_processes(tmp_path):
    history, _ = loops.plain()
    for got in loops.by_torchrun(PAGE, 2, tmp_path):
        assert_close(got, history)
