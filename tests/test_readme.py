"""The README's examples run as printed, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_python_examples(tmp_path, monkeypatch):
    """One after the other, in one session, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 6
    session = {}
    for block in blocks:
        exec(block, session)
    assert session["tangent"].shape == session["out"].shape == session["q"].shape
    assert [p.shape for p in session["product"]] == [session["q"].shape] * 3
    assert session["per_task"].shape == session["queries"].shape
    assert session["losses"].shape == (16,)
    assert all(g.isfinite().all() for g in session["meta_gradient"]["params"].values())


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
