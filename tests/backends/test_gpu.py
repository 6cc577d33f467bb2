"""The exactness suite on a GPU: every nesting, on the fused backends, in the dtypes that they support."""

import pytest
import torch

import metaattn
from metaattn.cli._derivatives import derivative
from metaattn.cli._metrics import relative_error
from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import FIRST, LARGE, NOT_EMPTY, SECOND, THIRD, eager_double, grad_grad, vmap_grad_grad

pytestmark = pytest.mark.gpu

EVERY_DTYPE = ("causal", "gqa_uneven", "mask", "bias", "window_causal", "value_size")
# These take the sine of a sum over all gradients. In 16 bits the error of the sum is as large as the sum.
NOT_ROUNDED = [grad_grad, eager_double, vmap_grad_grad]

CALLS = [
    pytest.param(backend, dtype, nesting, case, id=f"{backend}-{str(dtype)[6:]}-{nesting.__name__}-{name}")
    for backend in ("triton", "auto")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for nesting in FIRST + SECOND + THIRD
    for name, case in CASES.items()
    # The oracle draws dropout on the CPU; test_triton compares dropout of the primitives.
    if "dropout_p" not in case.options
    if not (nesting in NOT_EMPTY and name == "empty")
    if not (nesting in LARGE + THIRD and name not in EVERY_DTYPE[:2])
    if not (dtype != torch.float32 and nesting in NOT_ROUNDED + THIRD)
    if name in EVERY_DTYPE or (dtype == torch.float32 and backend == "triton")
    if not (backend == "auto" and name != "causal")
]


@pytest.mark.parametrize(("backend", "dtype", "nesting", "case"), CALLS)
def test_nesting(backend, dtype, nesting, case):
    x = tuple(t.to(dtype) for t in case.inputs())
    ts = [tuple(t.to(dtype) for t in case.like(seed)) for seed in (10, 11, 12)]
    want = as_vector(nesting(case.oracle(), tuple(t.double() for t in x), [tuple(t.double() for t in u) for u in ts]))
    got = nesting(case.attention(backend), tuple(t.cuda() for t in x), [tuple(t.cuda() for t in u) for u in ts])
    # The error of the formula itself in this dtype. The dense formula overflows in 16 bits.
    formula = case.oracle() if dtype == torch.float32 else case.attention("reference")
    factor = 4.0 * max(1.0, error(as_vector(nesting(formula, x, ts)), want) / TOLERANCE[dtype])
    assert_close(as_vector(got).cpu(), want, dtype, factor)


@pytest.mark.parametrize("backend", ["vendor", "auto", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(backend, causal):
    """cuDNN and our kernels agree: value, gradient and Hessian product."""
    shapes = [(2, 8, 320, 64), (2, 2, 320, 64), (2, 2, 320, 64)]
    x, t = ([torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes] for _ in range(2))

    def gradient(backend):
        def loss(*x):
            return metaattn.sdpa(*x, is_causal=causal, enable_gqa=True, backend=backend).float().sin().sum()

        return torch.func.grad_and_value(loss, (0, 1, 2))

    got = torch.func.jvp(gradient(backend), tuple(x), tuple(t))
    want = torch.func.jvp(gradient("reference"), tuple(a.double() for a in x), tuple(a.double() for a in t))
    assert_close(as_vector(got[1][0]), as_vector(want[1][0]), torch.bfloat16, factor=4)
    assert_close(as_vector(got[0][0]), as_vector(want[0][0]), torch.bfloat16, factor=4)


# Arithmetic of the products: dtype, precision of float32, and the largest relative error of a result.
ARITHMETIC = {
    "float16": (torch.float16, "highest", 2e-3),
    "bfloat16": (torch.bfloat16, "highest", 1e-2),
    "tf32": (torch.float32, "high", 2e-3),
    "float32": (torch.float32, "highest", 4e-6),
}
# Options of a call in addition to query, key and value. The kernels are compiled separately for each.
KINDS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (300, 40)},
    "mask": {},
    "bias": {},
    "dropout": {"dropout_p": 0.2, "is_causal": True},
}
TABLE = ("full", "causal", "window")


@pytest.mark.parametrize(
    ("head_size", "kind"),
    # A mask, a bias and dropout use the same block sizes; at head size 256 their kernels take minutes to compile.
    [(size, kind) for size in (16, 32, 64, 128, 256) for kind in KINDS if size in (64, 128) or kind in TABLE],
)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_all_block_sizes(arithmetic, head_size, kind, precision):
    """Every row of the table of block sizes, at a length that all blocks divide and at one that none divides.

    If a kernel needs too many registers, ptxas may compute a wrong address, depending on the block sizes and on what
    divides the lengths (docs/benchmarks).
    """
    dtype, name, bound = ARITHMETIC[arithmetic]
    precision(name)
    for length in (1024, 777):
        errors = _errors(dtype, (1, 2, length, head_size), kind)
        # Not max(errors.values()) < bound: max() may ignore a NaN.
        assert all(error < bound for error in errors.values()), (length, errors)


@pytest.mark.parametrize("kind", ["full", "causal", "bias"])
@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("sizes", [(256, 16), (16, 256), (160, 32), (24, 80), (256, 128), (64, 128)], ids=str)
def test_two_head_sizes(sizes, arithmetic, kind, precision):
    """Blocks of two sizes, at one block of keys and at lengths that no block divides."""
    dtype, name, bound = ARITHMETIC[arithmetic]
    precision(name)
    for length in (64, 777):
        errors = _errors(dtype, (1, 2, length, sizes[0]), kind, sizes[1])
        assert all(error < bound for error in errors.values()), (length, errors)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wrong, precision):
    """Rounding to tf32 is a separate instruction. It must not turn a value that is not finite into a finite one."""
    precision("high")
    q, k, v, w = torch.randn(4, 1, 1, 128, 64, device="cuda").unbind()
    v[..., 100, 3] = wrong
    out, pullback = torch.func.vjp(lambda *x: metaattn.sdpa(*x, is_causal=True, backend="triton"), q, k, v)
    assert out[..., :3].isfinite().all()
    assert out[..., 4:].isfinite().all()
    assert not out[..., 100:, 3].isfinite().any()
    assert not pullback(w)[0][..., 101:, :].isfinite().any()


def _errors(dtype, shape, kind, value_size=None):
    """Return the relative errors of the kernels in all rules, against float64."""
    g = torch.Generator("cuda").manual_seed(0)
    length = shape[-2]
    value_shape = (*shape[:-1], value_size or shape[-1])

    def tensors():
        for size in (shape, shape, value_shape):
            yield torch.randn(size, device="cuda", generator=g).to(dtype)
        if kind == "bias":
            yield torch.randn(shape[1], length, length, device="cuda", generator=g).to(dtype)

    x, t = list(tensors()), list(tensors())
    w = torch.randn(value_shape, device="cuda", generator=g).to(dtype)
    mask = torch.rand(length, length, device="cuda", generator=g) < 0.5 if kind == "mask" else None

    def results(rule, backend, x, t, w):
        def attention(query, key, value, bias=mask):
            return metaattn.sdpa(query, key, value, bias, **KINDS[kind], backend=backend)

        torch.manual_seed(0)  # for dropout
        return derivative(rule, attention, x, t, w)()

    wide = [[a.double() for a in x], [a.double() for a in t], w.double()]
    rules = ("fwd", "bwd", "jvp", "hvp", "dbl")
    return {r: relative_error(results(r, "triton", x, t, w), results(r, "blockwise", *wide)) for r in rules}
