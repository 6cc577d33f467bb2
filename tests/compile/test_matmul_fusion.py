"""Products of a recorded graph that are fused, and that it stays the same function."""

import pytest
import torch

import metaattn
from metaattn.compile.passes import matmul_fusion
from metaattn.compile.piecewise import PiecewiseFunction, as_recorded
from metaattn.compile.recorder import Recording
from tests.helpers import assert_close


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    """Fuse as if our kernel supported all products, as it does on GPUs."""
    monkeypatch.setattr(matmul_fusion, "supported", lambda like: True)


def run(function, *tensors):
    """Check that the passes leave a function the same; return what is requested of each product, or ``bmm``."""
    recording = Recording(function, tensors)
    graph = matmul_fusion.fuse_matmuls(recording.graph)
    graph.lint()
    got = PiecewiseFunction(recording, as_recorded, {})(*tensors, *recording.captured)
    assert_close(got, function(*tensors), torch.float64)
    calls = [n for n in graph.nodes if n.target in (matmul_fusion.FUSED_MATMULS, torch.ops.aten.bmm.default)]
    return [n.args[3] if n.target is matmul_fusion.FUSED_MATMULS else "bmm" for n in calls]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


A, A_T, B, B_T = randn(2, 3, 4), randn(2, 3, 4), randn(2, 4, 5), randn(2, 4, 5)


def test_a_product_and_its_tangent():
    assert run(lambda a, a_t, b, b_t: (a @ b, a_t @ b + a @ b_t), A, A_T, B, B_T) == [[3]]
    assert run(lambda a, a_t, b, b_t: (a @ b, a @ b_t + a_t @ b), A, A_T, B, B_T) == [[3]]


def test_a_tangent_without_its_value():
    assert run(lambda a, a_t, b, b_t: (a @ b_t + a_t @ b,), A, A_T, B, B_T) == [[2]]


def test_a_sum_of_products_with_a_common_factor():
    assert run(lambda a, b, b_t: (a @ b + a @ b_t,), A, B, B_T) == [[2]]
    assert run(lambda a, b: (a @ b + a @ b,), A, B) == ["bmm"]  # one, added to itself


def test_of_jvp():
    def f(a, a_t, b, b_t):
        return torch.func.jvp(lambda a, b: (a @ b).sin(), (a, b), (a_t, b_t))

    assert run(f, A, A_T, B, B_T) == [[3]]


def test_gradients_of_a_linear_layer():
    def f(x, w, y):
        return torch.func.vjp(torch.func.vmap(torch.nn.functional.linear), x, w)[1](y)

    assert run(f, randn(2, 3, 4), randn(2, 5, 4), randn(2, 3, 5)) == [[1, 1]]


def test_transposes_are_given_as_what_they_are_of():
    graph = matmul_fusion.fuse_matmuls(Recording(lambda x, y: (x.mT @ y, x @ x.mT), (A, A_T)).graph)
    (call,) = (n for n in graph.nodes if n.target is matmul_fusion.FUSED_MATMULS)
    tensors, indices, transposed, _ = call.args
    assert [t.op for t in tensors] == ["placeholder", "placeholder"]
    assert indices == [0, 1, 0, 0]
    assert transposed == [True, False, False, True]


def test_dependent_products_are_no_pair():
    assert run(lambda a, b: ((a @ b) @ b.mT,), A, B) == ["bmm", "bmm"]


def test_what_is_between_is_kept_in_order():
    """The second product does not depend on the first, but an operation between them does."""
    assert run(lambda a, b: ((a @ b).sin(), a.cos() @ b), A, B) == [[1, 1]]


def test_a_tangent_that_needs_the_value():
    assert run(lambda a, b, b_t: (a @ b, (a @ b).sum() * a @ b + a @ b_t), A, B, B_T) == ["bmm", [2]]


def test_products_with_other_inner_sizes_are_no_tangent():
    a, b, c, d = A, B, randn(2, 3, 7), randn(2, 7, 5)
    assert run(lambda a, b, c, d: (a @ b + c @ d,), a, b, c, d) == [[1, 1]]


def test_a_term_that_is_used_elsewhere_stays():
    assert run(lambda a, a_t, b, b_t: (a_t @ b, a_t @ b + a @ b_t), A, A_T, B, B_T) == [[1, 1]]


def test_a_scaled_sum_is_none():
    assert run(lambda a, a_t, b, b_t: (torch.add(a_t @ b, a @ b_t, alpha=2),), A, A_T, B, B_T) == [[1, 1]]


def test_a_sum_of_two_layers():
    """An RNN adds two products: their sum is no tangent, but each of them has one."""

    def f(a, b, a_t, b_t):
        return torch.func.jvp(lambda a, b: a @ b + a.sin() @ b.cos(), (a, b), (a_t, b_t))

    assert run(f, A, B, A_T, B_T) == [[3, 3]]


def test_of_jvp_of_jvp():
    def once(a, b):
        return torch.func.jvp(lambda a, b: (a @ b).sin(), (a, b), (a.sin(), b.cos()))

    def twice(a, b):
        (value, tangent), (_, second) = torch.func.jvp(once, (a, b), (a.cos(), b.sin()))
        return value, tangent, second

    assert run(twice, A, B) == [[3, 3], [3]]


def test_two_tangents_of_one_value():
    def f(a, a_t, b, b_t):
        return a @ b, a_t @ b + a @ b_t, a.sin() @ b + a @ b.cos()

    assert run(f, A, A_T, B, B_T) == [[3, 2]]


def test_a_sum_whose_term_has_a_tangent():
    def f(a, a_t, b, b_t):
        c, d = a.sin(), b.sin()
        return a @ b + c @ d, a_t @ b + a @ b_t

    assert run(f, A, A_T, B, B_T) == [[2, 2]]


def test_a_tangent_that_takes_the_value_as_a_factor():
    square = randn(2, 4, 4)
    assert run(lambda a, b, c: (a @ b, (a @ b) @ b + a @ c), A, square, square.sin()) == ["bmm", [2]]


def test_dtypes_are_not_mixed():
    def f(a, b):
        wide, narrow = a @ b, a.float() @ b.float()
        return wide + narrow, a.float().cos() @ b.float()

    assert run(f, A, B) == ["bmm", [1, 1]]


def test_products_that_our_kernel_does_not_support_stay(monkeypatch):
    monkeypatch.setattr(matmul_fusion, "supported", lambda like: False)
    assert run(lambda a, a_t, b, b_t: (a @ b, a_t @ b + a @ b_t), A, A_T, B, B_T) == ["bmm"] * 3


def test_large_products_stay_apart(monkeypatch):
    monkeypatch.setattr(matmul_fusion, "SMALL", 2 * 3 * 4 * 5 - 1)
    assert run(lambda a, a_t, b: (a @ b, a_t @ b), A, A_T, B) == ["bmm", "bmm"]
    monkeypatch.setattr(matmul_fusion, "SMALL", 2 * 3 * 4 * 5)
    assert run(lambda a, a_t, b: (a @ b, a_t @ b), A, A_T, B) == [[1, 1]]


def test_no_pair_spans_an_attention_operator():
    def f(a, b):
        return a @ b, metaattn.sdpa(a, a, a, backend="reference"), a.cos() @ b

    assert run(f, A, B) == ["bmm", "bmm"]


@pytest.mark.parametrize("functional", [True, False])
def test_changes_in_place_are_left_as_they_are(functional):
    """A graph with changes in place runs as it was recorded."""

    def f(a, a_t, b, b_t):
        out = a @ b
        if not functional:
            view = out[:, 0]
            out.mul_(2)
            return out + view.sum(), a_t @ b + a @ b_t
        return out, a_t @ b + a @ b_t

    recording = Recording(f, (A, A_T, B, B_T))
    assert recording.functional == functional
    assert_close(PiecewiseFunction(recording, as_recorded, {})(A, A_T, B, B_T), f(A, A_T, B, B_T), torch.float64)
