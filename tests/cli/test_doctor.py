"""``metaattn doctor``: its report if all is well, and what it finds if a primitive is wrong."""

import re

import pytest
import torch

from metaattn.backends import PRIMITIVES
from metaattn.backends.blockwise import backend as blockwise
from metaattn.cli import _environment, _selfcheck, doctor, main
from metaattn.cli._derivatives import derivative
from tests.conftest import NO_KERNELS

CPU = torch.device("cpu")


def _cells(out):
    """Return the cells of the table: by backend and dtype, then by derivative."""
    header, *rows = re.findall(
        r"^  ((?:backend|reference|blockwise|triton) +(?:\w+ .*e-\d\d|dtype.*))$", out, re.MULTILINE
    )
    names = header.split()[2:]
    return {tuple(row.split()[:2]): dict(zip(names, row.split()[2:], strict=True)) for row in rows}


def _scaled(result):
    """Return a result whose first tensor is too large by half."""
    first, *others = result
    first = _scaled(first) if isinstance(first, tuple) else 1.5 * first
    return (first, *others) if type(result) is tuple else type(result)(first, *others)


@pytest.mark.skipif(NO_KERNELS is not None, reason=NO_KERNELS or "")
def test_all_is_well(monkeypatch, capsys):
    """Check every backend that works on a CPU. Triton's interpreter is slow and checks one call."""
    monkeypatch.setattr(_selfcheck, "INTERPRETED", _selfcheck.CALLS[3:4])
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    cells = _cells(out)
    plain = {(b, d) for b in ("reference", "blockwise") for d in ("float64", "float32", "float16", "bfloat16")}
    assert set(cells) == plain | {("triton", "float32")}
    for (_, dtype), row in cells.items():
        assert [*row] == [*_selfcheck.CHECKED, "bound"]
        errors = [float(row[rule]) for rule in _selfcheck.CHECKED]
        # A factor of 5 for other machines; a lost digit fails.
        assert max(errors) <= _selfcheck.BOUND[getattr(torch, dtype)] / 5
    assert "vendor      backend='vendor' needs a CUDA device" in out
    assert f"PyTorch             {torch.__version__}" in out
    assert "TRITON_INTERPRET=1" in out
    assert "All 287 results are correct" in out


def test_the_legend_names_the_primitives_that_run(monkeypatch):
    called = set()

    def record(name, primitive):
        return lambda *a, **o: (called.add(name), primitive(*a, **o))[1]

    for name in PRIMITIVES:
        monkeypatch.setattr(blockwise, name, record(name, getattr(blockwise, name)))
    x, t, w = _selfcheck.CALLS[0].tensors(torch.float64, CPU)
    for rule, primitives in _selfcheck.PRIMITIVES.items():
        called.clear()
        derivative(rule, _selfcheck.attention(_selfcheck.CALLS[0], "blockwise", CPU), x, t, w)()
        assert called >= set(primitives), rule
    assert {p for primitives in _selfcheck.PRIMITIVES.values() for p in primitives} == set(PRIMITIVES)
    assert "  dbl  double backward" in "\n".join(doctor.table([]))
    assert "primitives forward, backward, forward_jvp, backward_jvp" in "\n".join(doctor.table([]))


@pytest.fixture
def one_call(monkeypatch):
    """Check one call only: these tests are about the primitives."""
    monkeypatch.setattr(_selfcheck, "CALLS", _selfcheck.CALLS[:1])


@pytest.mark.usefixtures("one_call")
@pytest.mark.parametrize(
    ("primitive", "rule"),
    [("forward", "fwd"), ("backward", "grad"), ("forward_with_jvp", "jvp"), ("backward_jvp", "hvp")],
)
def test_a_wrong_primitive_is_named(primitive, rule, monkeypatch, capsys):
    right = getattr(blockwise, primitive)

    def wrong(*arguments, **options):
        return _scaled(right(*arguments, **options))

    monkeypatch.setattr(blockwise, primitive, wrong)
    assert main(["doctor", "--device", "cpu", "--backend", "blockwise"]) == 1
    out = capsys.readouterr().out
    assert all(row[rule].endswith("!") for row in _cells(out).values())
    assert re.search(rf"blockwise, float64: {rule} of the full call: relative error \S+, at most 1e-11 allowed", out)
    assert "pass backend='reference'" in out


@pytest.mark.usefixtures("one_call")
def test_other_derivatives_are_not_reported(monkeypatch, capsys):
    """A wrong backward_jvp does not affect the value, the gradient and the jvp."""
    right = blockwise.backward_jvp
    monkeypatch.setattr(blockwise, "backward_jvp", lambda *a, **o: _scaled(right(*a, **o)))
    assert main(["doctor", "--device", "cpu", "--backend", "blockwise"]) == 1
    for row in _cells(capsys.readouterr().out).values():
        assert {rule for rule, cell in row.items() if cell.endswith("!")} == {"hvp", "rof", "dbl", "vmap"}


@pytest.mark.usefixtures("one_call")
def test_a_primitive_that_raises(monkeypatch, capsys):
    def lost(*_, **__):
        raise RuntimeError("the device is lost\nand more")

    monkeypatch.setattr(blockwise, "backward", lost)
    assert main(["doctor", "--device", "cpu", "--backend", "blockwise"]) == 1
    out = capsys.readouterr().out
    assert "raises!" in out
    assert "RuntimeError: the device is lost\n" in out


def test_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor", "--device", "cpu", "--backend", "triton"]) == 1
    assert "Nothing to check: triton cannot run on cpu" in capsys.readouterr().out


@pytest.mark.usefixtures("one_call")
def test_the_number_of_threads_is_restored(capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        main(["doctor", "--device", "cpu", "--backend", "reference"])
        assert torch.get_num_threads() == 2
        assert ", 2 threads\n" in capsys.readouterr().out
        torch.set_num_threads(1)
        assert _environment.facts()["PyTorch"].endswith(", 1 thread")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("call", _selfcheck.CALLS, ids=lambda c: c.name)
def test_oracle(call):
    """Compare the dense formula with PyTorch's attention; a row without keys is zero."""
    (query, key, value, *bias), _, _ = call.tensors(torch.float64, CPU)
    got = _selfcheck.dense(call, CPU)(query, key, value, *bias)
    i, j = torch.arange(call.rows)[:, None], torch.arange(call.keys)
    mask = bias[0] if bias else call.boolean_mask(CPU)
    if "window" in call.options:
        left, right = call.options["window"]
        mask = (i - j <= left) & (j - i <= right)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=call.options.get("is_causal", False), enable_gqa=True
    )
    torch.testing.assert_close(got, want.nan_to_num(0.0), rtol=1e-12, atol=1e-12)


def test_extras_are_those_of_the_project():
    extras = _environment.extras()
    assert "pytest" in extras["test"]
    assert _environment.version("pytest") == pytest.__version__
    assert _environment.version("no-such-package") is None


def test_extras_of_an_installed_package(monkeypatch, tmp_path):
    """Without a source tree the extras come from the package's metadata."""
    requires = ["torch>=2.11", 'pytest>=8; extra == "test"', 'mkdocstrings[python]>=1.0; extra == "docs"']
    monkeypatch.setattr(_environment, "PACKAGE", tmp_path / "metaattn")
    monkeypatch.setattr(_environment.metadata, "requires", lambda _: requires)
    assert _environment.extras() == {"test": ["pytest"], "docs": ["mkdocstrings"]}
