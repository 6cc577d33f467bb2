"""Every nesting of derivatives of every kind of call on every backend against the dense formula in float64.

Backends that do not serve float64 are held in float32 to some roundings of that.
"""

import pytest
import torch

from tests.conftest import BACKENDS, FUSED
from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import FIRST, LARGE, NOT_EMPTY, NOT_RANDOM, SECOND, THIRD

pytestmark = pytest.mark.usefixtures("small_tiles")


# The interpreter is slow: one case of each kind. What the primitives do in all others is in test_triton, and on a GPU
# every nesting has every case (test_gpu).
OF_FUSED = (
    "causal",
    "gqa_uneven",
    "mask",
    "bias",
    "bias_hides",
    "window_causal",
    "value_size",
    "everything",
    "five_dims",
    "strided",
    "one",
    "empty",
)
# Beyond second order every backend is blockwise, which has all cases; these show that it is so.
THIRD_OF_FUSED = ("causal", "gqa_uneven", "bias")

LARGE_OF_FUSED = ("one",)

CALLS = [
    pytest.param(backend, nesting, case, id=f"{backend}-{nesting.__name__}-{name}")
    for backend in BACKENDS + FUSED
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    if not (nesting in NOT_RANDOM and "dropout_p" in case.options)
    if not (nesting in NOT_EMPTY and name == "empty")
    if not (backend in FUSED and name not in OF_FUSED)
    if not (backend in FUSED and nesting in THIRD and name not in THIRD_OF_FUSED)
    if not (backend in FUSED and nesting in LARGE and name not in LARGE_OF_FUSED)
]


@pytest.mark.parametrize(("backend", "nesting", "case"), CALLS)
def test_nesting(backend, nesting, case):
    dtype = torch.float32 if backend in FUSED else torch.float64
    # The same numbers for the oracle, which works in float64.
    x = tuple(t.to(dtype) for t in case.inputs())
    ts = [tuple(t.to(dtype) for t in case.like(seed)) for seed in (10, 11, 12)]
    wide, wide_ts = tuple(t.double() for t in x), [tuple(t.double() for t in u) for u in ts]
    got, want = nesting(case.attention(backend), x, ts), nesting(case.oracle(), wide, wide_ts)
    if dtype == torch.float64:
        assert_close(got, want)
    else:
        # Where terms cancel the dense formula itself loses digits in float32; then no more than four times as many.
        own = error(as_vector(nesting(case.oracle(), x, ts)), as_vector(want))
        assert_close(as_vector(got), as_vector(want), dtype, max(4.0, 4.0 * own / TOLERANCE[dtype]))
