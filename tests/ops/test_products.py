"""Which products of a recorded graph are joined, and that it stays the same function."""

import pytest
import torch

import metaattn
from metaattn.ops import _products
from metaattn.ops._record import Recording
from metaattn.ops._segments import Lowered, as_recorded
from tests.helpers import assert_close


def run(function, *tensors):
    """What the products of a function became, after it was found to be the same."""
    recording = Recording(function, tensors)
    graph = _products.joined(recording.graph)
    graph.lint()
    got = Lowered(recording, as_recorded, {})(*tensors, *recording.found)
    assert_close(got, function(*tensors), torch.float64)
    calls = [n for n in graph.nodes if n.target in (_products.PRODUCTS, torch.ops.aten.bmm.default)]
    return [n.args[3] if n.target is _products.PRODUCTS else "bmm" for n in calls]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


A, A_T, B, B_T = randn(2, 3, 4), randn(2, 3, 4), randn(2, 4, 5), randn(2, 4, 5)


def test_a_product_and_its_tangent():
    assert run(lambda a, a_t, b, b_t: (a @ b, a_t @ b + a @ b_t), A, A_T, B, B_T) == [[3]]
    assert run(lambda a, a_t, b, b_t: (a @ b, a @ b_t + a_t @ b), A, A_T, B, B_T) == [[3]]


def test_a_tangent_alone():
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
    graph = _products.joined(Recording(lambda x, y: (x.mT @ y, x @ x.mT), (A, A_T)).graph)
    (call,) = (n for n in graph.nodes if n.target is _products.PRODUCTS)
    tensors, places, turned, _ = call.args
    assert [t.op for t in tensors] == ["placeholder", "placeholder"]
    assert places == [0, 1, 0, 0]
    assert turned == [True, False, False, True]


def test_what_needs_the_other_is_no_pair():
    assert run(lambda a, b: ((a @ b) @ b.mT,), A, B) == ["bmm", "bmm"]


def test_what_is_between_is_kept_in_order():
    """The second product does not need the first, but what is between does."""
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


def test_large_products_stay_apart(monkeypatch):
    monkeypatch.setattr(_products, "SMALL", 2 * 3 * 4 * 5 - 1)
    assert run(lambda a, a_t, b: (a @ b, a_t @ b), A, A_T, B) == ["bmm", "bmm"]
    monkeypatch.setattr(_products, "SMALL", 2 * 3 * 4 * 5)
    assert run(lambda a, a_t, b: (a @ b, a_t @ b), A, A_T, B) == [[1, 1]]


def test_a_leaf_is_between_no_pair():
    def f(a, b):
        return a @ b, metaattn.sdpa(a, a, a, backend="reference"), a.cos() @ b

    assert run(f, A, B) == ["bmm", "bmm"]


@pytest.mark.parametrize("joins", [True, False])
def test_changes_in_place_are_left_as_they_are(joins):
    """A graph with them is run as it was recorded."""

    def f(a, a_t, b, b_t):
        out = a @ b
        if not joins:
            view = out[:, 0]
            out.mul_(2)
            return out + view.sum(), a_t @ b + a @ b_t
        return out, a_t @ b + a @ b_t

    recording = Recording(f, (A, A_T, B, B_T))
    assert recording.functional == joins
    assert_close(Lowered(recording, as_recorded, {})(A, A_T, B, B_T), f(A, A_T, B, B_T), torch.float64)
