"""Tests mirror the packages: every source file has a test file of its name, or a line here with those that test it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Source files without a test file of their name, and where their tests are. A folder stands for all files in it.
ELSEWHERE = {
    "experiments/errors.py": "tests/experiments/training/test_cli.py",
    "metaattn/__main__.py": "tests/cli/test_main.py",
    "metaattn/autodiff": "tests/autodiff/test_checkpoint.py tests/autodiff/test_function_mode.py",
    "metaattn/backends/blockwise.py": "tests/ops/test_exactness.py tests/ops/test_finite_differences.py",
    "metaattn/backends/masking.py": "tests/ops/test_exactness.py",
    "metaattn/backends/reference.py": "tests/ops/test_exactness.py tests/ops/test_finite_differences.py",
    "metaattn/backends/tiling.py": "tests/ops/test_exactness.py",
    "metaattn/backends/triton": "tests/backends/test_triton.py tests/backends/test_compile_kernels.py",
    "metaattn/cli": "tests/cli/test_main.py tests/cli/test_doctor.py",
    "metaattn/compile": "tests/compile/test_inductor.py tests/compile/test_precompile.py",
    "metaattn/compile/passes": "tests/compile/test_inductor.py",
    "metaattn/integrations/_transformers_layers.py": "tests/integrations/test_transformers.py",
    "metaattn/meta": "tests/meta/test_gradients.py tests/compile/test_capture.py",
    "metaattn/meta/algorithms": "tests/meta/test_algorithms.py tests/meta/test_family.py",
    "metaattn/ops": "tests/ops/test_contract.py tests/ops/test_errors.py tests/ops/test_exactness.py",
    "metaattn/tasks": "tests/tasks/test_glyphs.py tests/tasks/test_omniglot.py",
    "experiments": "tests/experiments/test_moved.py",
    "experiments/studies": "tests/experiments/studies/test_curvature.py tests/experiments/studies/test_long_context.py",
    "experiments/training": "tests/experiments/training/test_cli.py",
    "train_maml.py": "tests/experiments/training/test_cli.py",
}
SOURCES = [
    path.relative_to(ROOT)
    for path in [*ROOT.glob("metaattn/**/*.py"), *ROOT.glob("experiments/**/*.py"), ROOT / "train_maml.py"]
    if path.name != "__init__.py"
]


def files_for(source):
    """Return the test files of a source file."""
    package = source.parent.relative_to("metaattn") if source.parts[0] == "metaattn" else source.parent
    for folder in (package, *package.parents):  # tests/compile also has the tests of metaattn/compile/passes
        own = Path("tests") / folder / f"test_{source.stem.lstrip('_')}.py"
        if (ROOT / own).exists():
            return [own]
    for name in (source, source.parent):
        if name.as_posix() in ELSEWHERE:
            return [Path(test) for test in ELSEWHERE[name.as_posix()].split()]
    return []


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_source_file_has_tests(source):
    tests = files_for(source)
    assert tests, f"{source}: add tests of its name, or list in ELSEWHERE which tests use it"
    for test in tests:
        assert (ROOT / test).exists(), f"ELSEWHERE names {test} for {source}, which is not there"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_exceptions_are_needed(name):
    assert (ROOT / name).exists(), f"ELSEWHERE names {name}, which is not there"
    if (ROOT / name).is_file():
        assert not any(test.stem == f"test_{Path(name).stem.lstrip('_')}" for test in files_for(Path(name)))
