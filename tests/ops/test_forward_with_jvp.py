"""In forward mode, one call of a backend computes the values together with their tangents."""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

import metaattn
from metaattn.backends import PRIMITIVES
from metaattn.backends.reference import backend as reference
from tests.helpers import assert_close, dense

X = tuple(torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
T = tuple(torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))


def attention(*x):
    return metaattn.sdpa(*x, backend="reference")


def loss(*x):
    return attention(*x).square().sum()


@pytest.fixture
def calls(monkeypatch):
    """The primitives that ran, in order, without those that other primitives call."""
    names, running = [], []

    def recorded(name, primitive):
        def call(*args, **kwargs):
            if not running:
                names.append(name)
            running.append(name)
            result = primitive(*args, **kwargs)
            running.pop()
            return result

        return call

    for name in PRIMITIVES:
        monkeypatch.setattr(reference, name, recorded(name, getattr(reference, name)))
    return names


@pytest.mark.parametrize(
    ("nesting", "expected"),
    [
        (lambda: jvp(attention, X, T), ["forward_with_jvp"]),
        (lambda: jvp(grad(loss, (0, 1, 2)), X, T), ["forward_with_jvp", "backward_with_jvp"]),
        (lambda: jvp(lambda *x: vjp(attention, *x)[1](X[0]), X, T), ["forward_with_jvp", "backward_with_jvp"]),
        (
            lambda: vmap(lambda *t: jvp(grad(loss, (0, 1, 2)), X, t))(*(t[None] for t in T)),
            ["forward_with_jvp", "backward_with_jvp"],
        ),
        (lambda: grad(loss)(*X), ["forward", "backward"]),
    ],
    ids=["jvp", "jvp_grad", "jvp_vjp", "vmap_jvp_grad", "grad"],
)
def test_one_call(calls, nesting, expected):
    nesting()
    assert calls == expected


def _value_and_tangent(f, how):
    """A scalar function of a gradient and its tangent; the cotangent of out and lse depends on x."""

    def pullback(*x):
        (out, lse), pull = vjp(f, *x)
        return pull((out.sin() * x[0], lse.cos()))

    def both(*x):
        g, g_t = jvp(pullback if how == "vjp" else grad(lambda *x: f(*x)[0].sin().sum(), (0, 1, 2)), x, T)
        return sum((a * b.cos()).sum() for a, b in zip(g, g_t, strict=True))

    return both


@pytest.mark.parametrize("how", ["vjp", "grad"])
@pytest.mark.parametrize(
    "outer",
    [
        lambda f: grad(f, (0, 1, 2))(*X),
        lambda f: jvp(f, X, T)[1],
        lambda f: vmap(lambda x: grad(f)(x, *X[1:]))(torch.stack([X[0], X[1]])),
    ],
    ids=["grad", "jvp", "vmap_grad"],
)
def test_derivatives_of_what_is_computed_at_once(outer, how):
    """Derivatives of the gradients and of their tangents, which one call returns."""
    ours, oracle = (lambda *x: metaattn.sdpa(*x, backend="reference", return_lse=True)), dense
    assert_close(outer(_value_and_tangent(ours, how)), outer(_value_and_tangent(oracle, how)))


def test_gradients_of_a_gradient_and_its_tangent():
    """Gradients in all arguments, including the tangent of the cotangent, on which only one of the two depends."""
    arguments = (*X, *T, X[0].cos(), T[0].cos())

    def total(f):
        def both(*a):
            pull = lambda *x: vjp(f, *x[:3])[1](x[3])
            results = jvp(pull, (*a[:3], a[6]), (*a[3:6], a[7]))
            return sum(t.sin().sum() for t in (*results[0], *results[1]))

        return both

    got, want = (grad(total(f), tuple(range(8)))(*arguments) for f in (attention, lambda *x: dense(*x)[0]))
    assert_close(got, want)
