"""The exactness suite on a GPU: every nesting, on the fused backends, in their dtypes."""

import pytest
import torch

from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import FIRST, LARGE, NOT_EMPTY, SECOND, THIRD

pytestmark = pytest.mark.gpu

# In every dtype; the rest in bfloat16, where the tensor cores' rules are the strictest.
EVERY_DTYPE = ("causal", "gqa_uneven", "mask", "bias", "window")

CALLS = [
    pytest.param(backend, dtype, nesting, case, id=f"{backend}-{str(dtype)[6:]}-{nesting.__name__}-{name}")
    for backend in ("triton", "auto")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    # The oracle's dropout is drawn on the CPU; test_triton compares the primitives' own.
    if "dropout_p" not in case.options
    if not (nesting in NOT_EMPTY and name == "empty")
    if not (nesting in LARGE + THIRD and name not in EVERY_DTYPE)
    if name in EVERY_DTYPE or (dtype == torch.bfloat16 and backend == "triton")
]


@pytest.mark.parametrize(("backend", "dtype", "nesting", "case"), CALLS)
def test_nesting(backend, dtype, nesting, case):
    x = tuple(t.to(dtype) for t in case.inputs())
    ts = [tuple(t.to(dtype) for t in case.like(seed)) for seed in (10, 11, 12)]
    want = nesting(case.oracle(), tuple(t.double() for t in x), [tuple(t.double() for t in u) for u in ts])
    got = nesting(case.attention(backend), tuple(t.cuda() for t in x), [tuple(t.cuda() for t in u) for u in ts])
    # The dense formula in the same dtype rounds the scores, which the kernels do not.
    own = error(as_vector(nesting(case.oracle(), x, ts)), as_vector(want))
    assert_close(as_vector(got).cpu(), as_vector(want), dtype, max(2.0, 2.0 * own / TOLERANCE[dtype]))
