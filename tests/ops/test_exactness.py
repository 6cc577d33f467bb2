"""Every nesting of derivatives of every kind of call on every backend against the dense formula in float64.

Backends that do not serve float64 are held in float32 to some roundings of that.
"""

import functools

import pytest
import torch

from tests.conftest import BACKENDS, FUSED
from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import FIRST, LARGE, NOT_EMPTY, NOT_RANDOM, SECOND, THIRD, linearize_grad

pytestmark = pytest.mark.usefixtures("small_tiles")


# The interpreter is slow: one case of each kind, and at second order those that take another way through the rules.
# What the primitives do in all others is in test_triton, and on a GPU every nesting has every case (test_gpu).
SECOND_OF_FUSED = ("causal", "gqa_uneven", "bias", "window_causal", "everything", "one", "empty")
FIRST_OF_FUSED = (*SECOND_OF_FUSED, "mask", "bias_hides", "value_size", "five_dims", "strided")
# Beyond second order every backend is blockwise, which has all cases; these show that it is so.
THIRD_OF_FUSED = ("gqa_uneven", "bias")

LARGE_OF_FUSED = ("one",)
# All columns of a matrix at second order: every case has them one by one in the other nestings.
WHOLE = [n for n in LARGE if n in SECOND] + [linearize_grad]
WHOLE_CASES = ("causal", "gqa_uneven", "mask", "bias_full", "dropout", "everything", "strided", "one", "empty")


def of_fused(nesting):
    """The cases of a nesting in the interpreter."""
    if nesting in LARGE:
        return LARGE_OF_FUSED
    return FIRST_OF_FUSED if nesting in FIRST else THIRD_OF_FUSED if nesting in THIRD else SECOND_OF_FUSED


CALLS = [
    pytest.param(backend, nesting, name, id=f"{backend}-{nesting.__name__}-{name}")
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    for backend in BACKENDS + FUSED
    if not (nesting in NOT_RANDOM and "dropout_p" in case.options)
    if not (nesting in NOT_EMPTY and name == "empty")
    if not (backend in FUSED and name not in of_fused(nesting))
    if not (nesting in WHOLE and name not in WHOLE_CASES)
]


def inputs(case, dtype):
    """A case's inputs, and three tangents of them."""
    x = tuple(t.to(dtype) for t in case.inputs())
    return x, [tuple(t.to(dtype) for t in case.like(seed)) for seed in (10, 11, 12)]


@functools.lru_cache(maxsize=4)
def wanted(nesting, name, dtype):
    """What the dense formula gives in float64 for numbers of a dtype; once for the backends, which come in turn."""
    x, ts = inputs(CASES[name], dtype)
    return nesting(CASES[name].oracle(), tuple(t.double() for t in x), [tuple(t.double() for t in u) for u in ts])


@pytest.mark.parametrize(("backend", "nesting", "name"), CALLS)
def test_nesting(backend, nesting, name):
    case, dtype = CASES[name], torch.float32 if backend in FUSED else torch.float64
    x, ts = inputs(case, dtype)
    got, want = nesting(case.attention(backend), x, ts), wanted(nesting, name, dtype)
    if dtype == torch.float64:
        assert_close(got, want)
    else:
        # Where terms cancel the dense formula itself loses digits in float32; then no more than four times as many.
        own = error(as_vector(nesting(case.oracle(), x, ts)), as_vector(want))
        assert_close(as_vector(got), as_vector(want), dtype, max(4.0, 4.0 * own / TOLERANCE[dtype]))
