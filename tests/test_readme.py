"""The README's examples run as printed, its commands are those that CI runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = python_blocks(ROOT / "README.md")


def test_python_examples():
    """Run the blocks one after the other in one session, as a reader would type them."""
    assert len(BLOCKS) >= 6
    session = {}
    for block in BLOCKS:
        exec(block, session)
    assert session["tangent"].shape == session["out"].shape == session["q"].shape
    assert [p.shape for p in session["product"]] == [session["q"].shape] * 3
    assert session["per_task"].shape == session["queries"].shape
    assert session["dy"].shape == session["y"].shape == session["x"].shape
    assert session["losses"].shape == (16,)
    assert all(g.isfinite().all() for g in session["meta_gradient"]["params"].values())


def test_set_up_is_two_commands():
    commands = re.findall(r"^(pip install .*)$", TEXT, re.MULTILINE)
    assert commands == [
        'pip install -r requirements.txt -e ".[train]" && python train_maml.py',
        'pip install -r requirements.txt -e ".[test]" && pytest -n auto',
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links(link):
    assert (ROOT / link).exists()


def test_length():
    """Half of what it was: what does not fit belongs in the documentation."""
    assert len(TEXT.splitlines()) <= 150
