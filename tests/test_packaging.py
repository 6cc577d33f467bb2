"""The wheel and the source distribution, and what works without the extra ``train``."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import metaattn
from experiments.errors import TRAIN_EXTRA

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info", "outputs", "multirun", "build", "dist", "site")
)
# Python in which the packages of the extra "train" are not installed, whatever this environment has.
WITHOUT_EXTRA = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(TRAIN_EXTRA)}))  # None: such a module cannot be imported
"""


def _run(*arguments, cwd=ROOT, path=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def _build(source, kind, out):
    """Build as ``python -m build --no-isolation`` does: the backend's hook in the folder of the sources."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = _run("-c", code, cwd=source, path="")
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder of an unpacked source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "clone", ignore=NOT_COPIED)
    with tarfile.open(_build(folder / "clone", "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir() and path.name != "clone")
    return source, _build(source, "wheel", folder)


@pytest.mark.slow
def test_the_wheel_has_the_package_only(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {"metaattn", f"metaattn-{metaattn.__version__}.dist-info"}
    for file in ("py.typed", "backends/auto.json", "backends/triton/block_sizes.json"):
        assert f"metaattn/{file}" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "metaattn").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert sorted(required) == ["numpy", "torch", "tqdm", "triton"]
    assert 'Requires-Dist: hydra-core>=1.3; extra == "train"' in metadata


@pytest.mark.slow
def test_an_installed_wheel_works(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    version = _run("-m", "metaattn", "--version", cwd=elsewhere, path=tmp_path / "site")
    assert version.stdout == f"metaattn {metaattn.__version__}\n"
    code = """
import metaattn, torch
from metaattn.cli import _environment
x = torch.randn(1, 1, 4, 8)
assert metaattn.sdpa(x, x, x).shape == x.shape
print(metaattn.__file__, _environment.extras()["test"])
"""
    done = _run("-c", code, cwd=elsewhere, path=tmp_path / "site")
    assert done.stdout.startswith(str(tmp_path / "site")), done.stderr
    assert "['metaattn[train]', 'pytest', 'pytest-xdist']" in done.stdout


@pytest.mark.slow
def test_the_source_distribution_tests_itself(distributions):
    source, _ = distributions
    for name in (
        "tests/helpers.py",
        "conf/config.yaml",
        "train_maml.py",
        "requirements.txt",
        "docs/index.md",
        "LICENSE",
    ):
        assert (source / name).is_file()
    assert not list(source.rglob("*.pyc"))
    copied = lambda folder: {p.relative_to(folder) for p in (folder / "tests").rglob("*.py")}
    assert copied(source) == copied(ROOT)
    done = _run(
        *(
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/cli/test_derivatives.py",
            "tests/experiments/training",
        ),
        *("-k", "test_derivative or test_every_experiment_is_a_config"),
        cwd=source,
        path="",
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^1\d passed", done.stdout, re.MULTILINE), done.stdout


def test_versions_agree():
    assert PROJECT["version"] == metaattn.__version__
    assert f"\nversion: {metaattn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_requirement_is_pinned():
    """``pip install -r requirements.txt`` installs the extras ``train`` and ``test`` too."""
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    ranges = [*PROJECT["dependencies"], *extras["train"], *extras["test"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in ranges} - {"metaattn"}
    assert names <= pinned
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in extras["train"]} == set(TRAIN_EXTRA.values())


def test_the_operator_and_the_commands_need_no_extra():
    code = f"""{WITHOUT_EXTRA}
import metaattn, metaattn.cli, torch
x = torch.randn(1, 1, 4, 8)
assert metaattn.sdpa(x, x, x).shape == x.shape
assert metaattn.cli.main(["bench", "--device", "cpu", "--shape", "1,1,8,8"]) == 0
assert metaattn.cli.main(["doctor", "--device", "cpu", "--backend", "reference"]) == 0
"""
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "correct" in done.stdout


def test_tasks_name_their_extra(tmp_path):
    code = f"""{WITHOUT_EXTRA}
import os
os.environ["METAATTN_CACHE"] = {str(tmp_path)!r}  # empty: what is there already needs no extra
from metaattn.tasks import Sinusoids, glyphs, stack
assert stack(Sinusoids(shot=2, queries=3), 0, 2).support[0].shape[0] == 2
try:
    glyphs("train", way=5, shot=1, queries=1)
except ImportError as error:
    print(error)
"""
    assert _run("-c", code).stdout.startswith(
        "metaattn.tasks.glyphs needs matplotlib and pillow, which the extra 'train'"
    )


@pytest.mark.parametrize("program", ["train_maml", "experiments.second_order"])
def test_programs_name_their_extra_in_one_line(program):
    done = _run("-c", f"{WITHOUT_EXTRA}\nimport runpy\nrunpy.run_module({program!r}, run_name='__main__')")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected hydra-core, matplotlib, pillow, tensorboard to be installed; missing: ")
    assert line.endswith('pip install -r requirements.txt -e ".[train]"')
