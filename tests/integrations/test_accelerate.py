"""Accelerate's loop around a meta-step against plain PyTorch, on one process and on two."""

import pytest
import torch

from tests.helpers import assert_close, python_blocks
from tests.integrations import loops

pytest.importorskip("accelerate")
PAGE = loops.ROOT / "docs" / "integrations" / "accelerate.md"


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_page(tmp_path, monkeypatch):
    """The blocks of the page run as printed: the loop, and Accelerate's own backward with the same gradient."""
    monkeypatch.chdir(tmp_path)
    loop, backward = python_blocks(PAGE)
    session = {}
    exec(loop, session)
    history, params = loops.plain()
    assert_close(torch.tensor(session["history"]), history)
    assert_close(session["meta"]["params"], params)
    session["model"].load_state_dict(session["meta"]["params"])
    assert_close(dict(session["model"].named_parameters()), params)
    session["accelerator"].save(session["meta"], "meta.pt")
    assert_close(torch.load(tmp_path / "meta.pt")["params"], params)
    exec(backward, session)
    gradient = session["learner"].value_and_grad(session["meta"], session["support"], session["query"])[1]
    assert_close({k: p.grad for k, p in session["meta"]["params"].items()}, gradient["params"])


@pytest.mark.slow
def test_two_processes(tmp_path):
    history, _ = loops.plain()
    for got in loops.by_torchrun(PAGE, 2, tmp_path):
        assert_close(got, history)
