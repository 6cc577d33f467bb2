"""Every nesting of derivatives of every kind of call on every backend, in float64, against the dense formula."""

import pytest

from tests.helpers import assert_close
from tests.ops.cases import CASES
from tests.ops.nestings import FIRST, NOT_EMPTY, NOT_RANDOM, SECOND, THIRD

pytestmark = pytest.mark.usefixtures("small_tiles")


PAIRS = [
    pytest.param(nesting, case, id=f"{nesting.__name__}-{name}")
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    if not (nesting in NOT_RANDOM and "dropout_p" in case.options)
    if not (nesting in NOT_EMPTY and name == "empty")
]


@pytest.mark.parametrize(("nesting", "case"), PAIRS)
def test_nesting(nesting, case, backend):
    x, ts = case.inputs(), [case.like(seed) for seed in (10, 11, 12)]
    assert_close(nesting(case.attention(backend), x, ts), nesting(case.oracle(), x, ts))
