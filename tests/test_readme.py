"""The README's examples run as printed, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest

from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = python_blocks(ROOT / "README.md")
OTHER = re.compile(r"^(?:import|from) (transformers|diffusers|curvlinops|learn2learn)\b", re.MULTILINE)


def test_python_examples(tmp_path, monkeypatch):
    """One after the other, in one session, as a reader would type them."""
    assert len(BLOCKS) >= 6
    session = {}
    for block in BLOCKS:
        if not OTHER.search(block):
            exec(block, session)
    assert session["tangent"].shape == session["out"].shape == session["q"].shape
    assert [p.shape for p in session["product"]] == [session["q"].shape] * 3
    assert session["per_task"].shape == session["queries"].shape
    assert session["losses"].shape == (16,)
    assert all(g.isfinite().all() for g in session["meta_gradient"]["params"].values())


@pytest.mark.parametrize("library", ["transformers", "diffusers", "curvlinops", "learn2learn"])
def test_examples_with_other_libraries(library):
    """Each after the first block, which imports torch, and no other."""
    (block,) = (b for b in BLOCKS if (found := OTHER.search(b)) and found[1] == library)
    pytest.importorskip(library)
    session = {}
    exec(BLOCKS[0], session)
    exec(block, session)
    results = {
        "transformers": lambda s: list(s["weight_product"].values()),
        "diffusers": lambda s: [s["du"]],
        "curvlinops": lambda s: [s["columns"]],
        "learn2learn": lambda s: [p.grad for p in s["meta_learner"].parameters()],
    }[library](session)
    assert all(t.isfinite().all() for t in results)
    assert any(t.abs().max() > 0 for t in results)


def test_set_up_is_two_commands():
    commands = re.findall(r"^(pip install .*)$", TEXT, re.MULTILINE)
    assert commands == [
        "pip install -r requirements.txt -e . && python train_maml.py",
        'pip install -r requirements.txt -e ".[test]" && pytest -n auto',
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links(link):
    assert (ROOT / link).exists()


def test_train_maml_lines_name_what_there_is():
    """Every group and option in the README's command lines is one of ``conf/``."""
    for line in re.findall(r"^python train_maml.py (.*?)(?: +#.*)?$", TEXT, re.MULTILINE):
        for group, options in re.findall(r"\b(task|algorithm|experiment|model)=([\w,]+)", line):
            for option in options.split(","):
                assert (ROOT / "conf" / group / f"{option}.yaml").exists(), line
