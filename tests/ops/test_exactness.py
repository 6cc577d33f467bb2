"""Every nesting of derivatives of every kind of call against the dense formula in float64.

The full product of nestings, cases and backends runs with ``pytest -m exhaustive``. By default each backend runs the
part of it that can fail where no other part does:

* The derivative rules are the same code for every backend, so that all nestings of all cases run on one, ``blockwise``.
* The other backends run every case through the nestings that call each of their primitives, with absent tangents and
  absent cotangents; and one case through all nestings of first and second order.
* Beyond second order every backend is ``blockwise``: ``test_higher_orders_are_blockwise`` asserts that dispatch.

Backends without float64 are compared in float32, up to a few roundings.
"""

import functools

import pytest
import torch

from metaattn.backends import blockwise
from tests.conftest import BACKENDS, FUSED
from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import (
    FIRST,
    LARGE,
    NOT_EMPTY,
    NOT_RANDOM,
    SECOND,
    THIRD,
    grad3,
    grad_each_hvp,
    grad_vjp,
    jvp3,
    jvp_each,
    jvp_jvp_grad,
    jvp_vjp,
    linearize_,
    linearize_grad,
    value,
    vjp_lse,
    vjp_out,
    vmap_value,
)

pytestmark = pytest.mark.usefixtures("small_tiles")

# Together these call every primitive: `forward`; `backward` with either part of the cotangent absent;
# `forward_with_jvp` and `backward_with_jvp` with all tangents but one absent, and with a cotangent that moves;
# `forward_jvp` and `backward_jvp`, which only reverse over reverse calls separately.
PRIMITIVES = {
    "first": [value, vjp_out, vjp_lse, jvp_each, vmap_value],
    "second": [grad_each_hvp, jvp_vjp, grad_vjp],
}
# Kernels in Triton's interpreter are slow: these cases take every path through `interface` and `layout`. What the
# kernels compute in all other cases is in tests/backends/test_triton.py. On a GPU every nesting has every case
# (tests/backends/test_gpu.py).
KERNEL_CASES = {
    "first": (
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
    ),
    "second": ("causal", "gqa_uneven", "bias", "window_causal", "everything", "one", "empty"),
}
# The case in which the backends other than blockwise have all nestings.
ALL_NESTINGS = {"reference": "everything", "triton": "causal"}
# Matrices by columns, each of which the other nestings compute one by one: too slow in the interpreter, and at second
# order with every case.
COLUMNS = [*LARGE, linearize_, linearize_grad]
COLUMNS_OF_SECOND = [n for n in COLUMNS if n in SECOND]
COLUMN_CASES = ("causal", "gqa_uneven", "mask", "bias_full", "dropout", "everything", "strided", "one", "empty")


def by_default(backend, nesting, name):
    """Return whether a combination runs without ``-m exhaustive``."""
    order = "first" if nesting in FIRST else "second"
    if backend == "blockwise":
        return nesting not in COLUMNS_OF_SECOND or name in COLUMN_CASES
    if backend in FUSED and (nesting in COLUMNS or name not in KERNEL_CASES[order]):
        return nesting in COLUMNS and name == "one"
    if name == ALL_NESTINGS[backend]:
        return nesting not in THIRD
    return nesting in PRIMITIVES[order]


CALLS = [
    pytest.param(
        backend,
        nesting,
        name,
        id=f"{backend}-{nesting.__name__}-{name}",
        marks=[] if by_default(backend, nesting, name) else [pytest.mark.exhaustive],
    )
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    for backend in BACKENDS + FUSED
    if not (nesting in NOT_RANDOM and "dropout_p" in case.options)
    if not (nesting in NOT_EMPTY and name == "empty")
    if not (backend in FUSED and nesting in LARGE and name != "one")  # thousands of columns: minutes each
]


def inputs(case, dtype):
    """Return a case's inputs and three tangents of them."""
    x = tuple(t.to(dtype) for t in case.inputs())
    return x, [tuple(t.to(dtype) for t in case.like(seed)) for seed in (10, 11, 12)]


@functools.lru_cache(maxsize=4)
def expected(nesting, name, dtype):
    """Return what the dense formula gives in float64 for numbers of a dtype. The backends of one case share it."""
    x, ts = inputs(CASES[name], dtype)
    return nesting(CASES[name].oracle(), tuple(t.double() for t in x), [tuple(t.double() for t in u) for u in ts])


@pytest.mark.parametrize(("backend", "nesting", "name"), CALLS)
def test_nesting(backend, nesting, name):
    case, dtype = CASES[name], torch.float32 if backend in FUSED else torch.float64
    x, ts = inputs(case, dtype)
    got, want = nesting(case.attention(backend), x, ts), expected(nesting, name, dtype)
    if dtype == torch.float64:
        assert_close(got, want)
    else:
        # Where terms cancel, the dense formula itself loses digits in float32. A backend may lose four times as many.
        own = error(as_vector(nesting(case.oracle(), x, ts)), as_vector(want))
        assert_close(as_vector(got), as_vector(want), dtype, max(4.0, 4.0 * own / TOLERANCE[dtype]))


# The derivatives along several tangents that a nesting of third order takes: functions of blockwise, and how many
# tangents each gets.
HIGHER = {
    grad3: {("directional", 2), ("gradient", 2)},
    jvp3: {("directional", 2), ("directional", 3)},
    jvp_jvp_grad: {("directional", 2), ("gradient", 2)},
}


@pytest.mark.parametrize("backend", [*BACKENDS, *FUSED, "auto"])
@pytest.mark.parametrize("nesting", HIGHER)
def test_higher_orders_are_blockwise(backend, nesting, monkeypatch):
    """Beyond second order blockwise computes every backend's derivatives; test_nesting shows that they are right."""
    called = set()

    def recorded(name, function):
        def record(*args, **options):
            tangents = next(a for a in args if isinstance(a, list))
            called.add((name, len(tangents)))
            return function(*args, **options)

        return record

    for name in ("directional", "gradient"):
        monkeypatch.setattr(blockwise, name, recorded(name, getattr(blockwise, name)))
    case, dtype = CASES["gqa_uneven"], torch.float32 if backend in FUSED else torch.float64
    x, ts = inputs(case, dtype)
    got, want = nesting(case.attention(backend), x, ts), expected(nesting, "gqa_uneven", dtype)
    assert_close(as_vector(got), as_vector(want), dtype, factor=4)
    assert {(name, n) for name, n in called if n > 1} == HIGHER[nesting]
