"""Arithmetic of Taylor series against nested forward mode."""

import math

import pytest
import torch
from torch.func import jvp

from metaattn.backends import taylor
from tests.helpers import assert_close

ORDERS = [0, 1, 2, 3, 4]


def _random_series(n, shape=(3, 3)):
    """Every coefficient, not only those of single tangents."""
    return {s: 0.5 * torch.randn(shape, dtype=torch.float64) for s in range(1 << n)}


def _polynomial(x, n):
    """Return the function of n scalars whose mixed derivative at 0 along all of them is the last coefficient."""

    def term(s, t, e):
        return math.prod((e[i] for i in range(n) if s >> i & 1), start=t)

    def value(*e):
        return sum(term(s, t, e) for s, t in x.items())

    return value


def _mixed(f, n):
    """Return the mixed derivative of f, a function of n scalars, once along each of them, at zero."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    args = [zero] * n

    def along(f, i):
        return lambda *e: jvp(lambda t: f(*e[:i], t, *e[i + 1 :]), (e[i],), (one,))[1]

    for i in range(n):
        f = along(f, i)
    return f(*args)


@pytest.mark.parametrize("n", ORDERS[1:])
def test_functions(n):
    full = (1 << n) - 1
    a, x = _random_series(n), _random_series(n)
    small = {s: t for s, t in x.items() if s}
    fa, fx, fs = (_polynomial(t, n) for t in (a, x, small))
    cases = [
        (taylor.coefficient(torch.matmul, a, x, full), lambda *e: fa(*e) @ fx(*e)),
        (taylor.product(torch.mul, a, x, full)[full], lambda *e: fa(*e) * fx(*e)),
        (taylor.exp_({s: t.clone() for s, t in x.items()}, full)[full], lambda *e: torch.exp(fx(*e))),
        (taylor.log_of_one_plus(small, full)[full], lambda *e: torch.log(1 + fs(*e))),
        (taylor.divide_by_one_plus(a, small, full)[full], lambda *e: fa(*e) / (1 + fs(*e))),
    ]
    for got, f in cases:
        assert_close(got, _mixed(f, n))


def test_subtract_is_in_place_and_fills_what_is_absent():
    a, b = {0: torch.ones(2)}, {0: torch.ones(2), 1: torch.ones(2)}
    first = a[0]
    out = taylor.subtract_(a, b)
    assert out is a
    assert torch.equal(first, torch.zeros(2))
    assert torch.equal(a[1], -torch.ones(2))


@pytest.mark.parametrize("n", ORDERS)
def test_absent_coefficients_are_zeros(n):
    """Leaving a coefficient out gives what a zero gives."""
    full = (1 << n) - 1
    x = _random_series(n)
    sparse = {s: t for s, t in x.items() if s.bit_count() <= 1}
    filled = {s: x[s] if s in sparse else torch.zeros(3, 3, dtype=torch.float64) for s in x}
    for f in (
        lambda x: taylor.exp_({s: t.clone() for s, t in x.items()}, full),
        lambda x: taylor.product(torch.matmul, x, x, full),
        lambda x: taylor.divide_by_one_plus(x, {s: t for s, t in x.items() if s}, full),
    ):
        got, want = f(sparse), f(filled)
        for s in want:
            assert_close(got.get(s, torch.zeros(3, 3)), want[s])


def test_subsets():
    assert list(taylor.subsets(0b101)) == [0, 0b001, 0b100, 0b101]
