"""A second oracle, independent of any formula: central differences of the operator's lower derivatives."""

import pytest
from torch.func import grad, jvp
from torch.utils._pytree import tree_leaves

from tests.helpers import error
from tests.ops.cases import CASES
from tests.ops.nestings import loss_of

pytestmark = pytest.mark.usefixtures("small_tiles")
STEP = 1e-3  # five points err by about STEP^4 = 1e-12 times the fifth derivative, and by rounding, 1e-16/STEP


LIMIT = 1e-8


def _difference(f, x, t):
    at = [tree_leaves(f(*(a + k * STEP * b for a, b in zip(x, t, strict=True)))) for k in (-2, -1, 1, 2)]
    return [(a - 8 * b + 8 * c - d) / (12 * STEP) for a, b, c, d in zip(*at, strict=True)]


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"empty", "bias_hides"}))
def test_each_order_against_the_one_below(name, backend):
    case = CASES[name]
    x, (s, t) = case.inputs(), [case.like(seed) for seed in (10, 11)]
    loss = loss_of(case.attention(backend))
    gradient = grad(loss, tuple(range(len(x))))

    def hvp(*x):
        return jvp(gradient, x, s)[1]

    slope = sum((g * b).sum() for g, b in zip(gradient(*x), t, strict=True))
    assert error(slope, _difference(loss, x, t)) < LIMIT
    assert error(jvp(loss, x, t)[1], _difference(loss, x, t)) < LIMIT
    assert error(jvp(gradient, x, t)[1], _difference(gradient, x, t)) < LIMIT
    assert error(jvp(hvp, x, t)[1], _difference(hvp, x, t)) < LIMIT
