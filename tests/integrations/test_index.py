"""The short examples of docs/integrations/index.md run as printed, where their libraries are installed."""

import re
from pathlib import Path

import pytest

from tests.helpers import python_blocks

BLOCKS = python_blocks(Path(__file__).parents[2] / "docs" / "integrations" / "index.md")
LIBRARY = re.compile(r"^(?:import|from) (transformers|diffusers|curvlinops|learn2learn)\b", re.MULTILINE)
RESULTS = {
    "transformers": lambda s: list(s["weight_product"].values()),
    "diffusers": lambda s: [s["du"]],
    "curvlinops": lambda s: [s["columns"]],
    "learn2learn": lambda s: [p.grad for p in s["meta_learner"].parameters()],
}


def _run(block):
    """Run a block after the first one, which imports torch."""
    session = {}
    exec(BLOCKS[0], session)
    exec(block, session)
    return session


@pytest.mark.parametrize("library", list(RESULTS))
def test_examples_with_other_libraries(library):
    (block,) = (b for b in BLOCKS if (found := LIBRARY.search(b)) and found[1] == library)
    pytest.importorskip(library)
    results = RESULTS[library](_run(block))
    assert all(t.isfinite().all() for t in results)
    assert any(t.abs().max() > 0 for t in results)


def test_examples_without_other_libraries():
    (block,) = (b for b in BLOCKS[1:] if not LIBRARY.search(b))
    session = _run(block)
    assert session["dy"].shape == session["y"].shape == session["x"].shape
