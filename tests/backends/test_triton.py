"""The primitives of the kernels against the reference in float64, over many small blocks.

Without a GPU they run in Triton's interpreter, in float32. ``scripts/check_attention.py`` checks all dtypes on a GPU.
"""

from dataclasses import replace

import pytest
import torch

from metaattn.backends.base import BackwardJvpInputs, Operands, Problem, Rows, Tangent, pack_qkv
from metaattn.backends.reference import backend as reference
from tests.conftest import NO_KERNELS
from tests.helpers import TOLERANCE, as_vector, assert_close

triton = pytest.importorskip("metaattn.backends.triton", exc_type=ImportError).backend
from metaattn.backends.triton import block_sizes, launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and NO_KERNELS is not None, reason=NO_KERNELS or "")

# Lengths, head sizes, and what else of the contract is used. One batch where batches are not the point: two take twice
# as long in the interpreter.
CALLS = {
    "even": {"heads": 2, "rows": 32, "keys": 48},
    "ragged": {"rows": 37, "keys": 51, "size": 12, "value_size": 20},
    "one_block_of_keys": {"rows": 37, "keys": 9},
    "causal": {"batch": (1,), "rows": 50, "keys": 35, "right": 0},
    "causal_wide": {"batch": (1,), "rows": 35, "keys": 50, "right": 0},
    "window": {"batch": (1,), "rows": 70, "keys": 60, "left": 20, "right": 3},
    "window_left": {"batch": (1,), "rows": 40, "keys": 70, "left": 5},
    "window_narrow": {"batch": (1,), "rows": 40, "keys": 40, "left": 0, "right": 0},
    "rows_without_keys": {"batch": (1,), "rows": 60, "keys": 20, "left": 5},
    "gqa": {"batch": (1,), "rows": 20, "keys": 40, "heads": 4, "right": 0},
    "bias": {"heads": 2, "rows": 20, "keys": 40, "bias": (2, 2, 20, 40)},
    "bias_shared": {"batch": (2, 3), "rows": 20, "keys": 14, "bias": (1, 3, 1, 20, 14)},
    "bias_keys": {"batch": (1,), "rows": 40, "keys": 36, "bias": (1, 1, 1, 36)},
    "bias_rows": {"batch": (1,), "heads": 2, "rows": 40, "keys": 36, "bias": (1, 2, 36 + 4, 1), "scale": -0.3},
    "bias_heads": {"heads": 2, "rows": 9, "keys": 14, "bias": (1, 2, 1, 1)},
    "mask": {"rows": 40, "keys": 40, "mask": (2, 1, 40, 40)},
    "mask_keys": {"rows": 40, "keys": 36, "mask": (2, 1, 1, 36), "right": 0},
    "mask_one_block": {"rows": 20, "keys": 16, "mask": (1, 2, 20, 16), "heads": 2},
    "dropout": {"rows": 20, "keys": 40, "dropout": 0.3},
    "query_tangent": {"batch": (1,), "rows": 20, "keys": 40, "tangents": (1, 0, 0, 0)},
    "key_tangent": {"batch": (1,), "rows": 20, "keys": 40, "tangents": (0, 1, 0, 0), "moving": False},
    "value_tangent": {"rows": 20, "keys": 9, "tangents": (0, 0, 1, 0), "moving": False},
    "bias_tangent": {
        "heads": 2,
        "rows": 20,
        "keys": 40,
        "bias": (2, 2, 20, 40),
        "tangents": (0, 0, 0, 1),
        "moving": False,
    },
    "lse_alone": {"batch": (1,), "rows": 20, "keys": 40, "out": False},
    "three_batches": {"batch": (2, 2, 2), "rows": 9, "keys": 10, "bias": (2, 1, 2, 1, 9, 10)},
    "expanded": {"heads": 2, "rows": 20, "keys": 40, "expanded": True},
    "transposed": {"heads": 2, "rows": 20, "keys": 40, "transposed": True},
    "few_rows": {"rows": 3, "keys": 50, "left": 20},
    "few_rows_one_block": {"rows": 2, "keys": 9, "heads": 2, "mask": (2, 1, 2, 9)},
    "few_rows_bias": {"rows": 2, "keys": 40, "bias": (2, 1, 2, 40)},
    "few_rows_gqa": {"batch": (1,), "rows": 3, "keys": 40, "heads": 4, "right": 30},
    "few_rows_dropout": {"rows": 2, "keys": 40, "dropout": 0.3},
    "few_rows_lse_alone": {"rows": 2, "keys": 9, "out": False},
    "few_rows_without_keys": {"rows": 9, "keys": 20, "left": -15},
    "one": {"rows": 1, "keys": 1, "size": 1, "value_size": 1},
    "no_batch": {"batch": (0,), "rows": 3, "keys": 4},
    "no_keys": {"rows": 3, "keys": 0},
    "no_rows": {"rows": 0, "keys": 3},
}


def _tensor(*shape, expanded=False, transposed=False):
    if transposed:
        *batch, h, n, d = shape
        return torch.randn(*batch, n, h, d, device=DEVICE).transpose(-2, -3)
    if expanded:
        return torch.randn(1, *shape[1:], device=DEVICE).expand(shape)
    return torch.randn(shape, device=DEVICE)


def _wide(tensors):
    return type(tensors)(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))


def _call(
    rows,
    keys,
    batch=(2,),
    heads=1,
    size=8,
    value_size=8,
    bias=None,
    mask=None,
    dropout=0.0,
    tangents=(1, 1, 1, 1),
    moving=True,
    out=True,
    scale=None,
    left=None,
    right=None,
    **layout,
):
    """Problem, operands, tangent, cotangent and its tangent."""
    kv_heads = 2 if heads == 4 else heads
    x = Operands(
        _tensor(*batch, heads, rows, size, **layout),
        _tensor(*batch, kv_heads, keys, size, **layout),
        _tensor(*batch, kv_heads, keys, value_size, **layout),
        None if bias is None else _tensor(*bias),
        None if mask is None else torch.rand(mask, device=DEVICE) < 0.7,
        torch.randint(2**62, (*batch, heads, 1, 1), device=DEVICE) if dropout else None,
    )
    t = Tangent(*(torch.randn_like(a) if a is not None and on else None for a, on in zip(x, tangents, strict=False)))

    def cotangent():
        return Rows(_tensor(*batch, heads, rows, value_size), _tensor(*batch, heads, rows))

    w = cotangent() if out else Rows(None, cotangent().lse)
    return Problem(scale or size**-0.5, left, right, dropout), x, t, w, cotangent() if moving else Rows()


@pytest.fixture(params=[(16, 16, True), (32, 16, False)], ids=str)
def blocks(request, monkeypatch):
    """Blocks so small that every problem has several."""
    rows, keys, split = request.param
    monkeypatch.setattr(launch, "tile", lambda *_, **__: block_sizes.Tile(rows, keys, 4, 1, split, not split))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("blocks")
def test_primitives(name):
    problem, x, t, w, w_t = _call(**CALLS[name])
    bias_grad = x.bias is not None
    wide = {"x": _wide(x), "t": _wide(t), "w": _wide(w), "w_t": _wide(w_t)}

    def close(got, want):
        assert_close(got, want, torch.float32)

    values, exact = triton.forward(problem, x), reference.forward(problem, wide["x"])
    close(values, exact)
    values_t = triton.forward_jvp(problem, x, values, t)
    exact_t = reference.forward_jvp(problem, wide["x"], exact, wide["t"])
    close(values_t, exact_t)
    close(triton.forward_with_jvp(problem, x, t), (exact, exact_t))
    first = reference.backward(problem, wide["x"], exact, wide["w"], bias_grad=bias_grad)
    close(triton.backward(problem, x, values, w, bias_grad=bias_grad), first)
    exact_inputs = BackwardJvpInputs(exact, exact_t, wide["w"], wide["t"], wide["w_t"], bias_grad)
    second = reference.backward_jvp(problem, wide["x"], exact_inputs)
    inputs = BackwardJvpInputs(values, values_t, w, t, w_t, bias_grad)
    close(triton.backward_jvp(problem, x, inputs), second)
    assert triton.fuses_backward_with_jvp(x, bias_grad) == (not bias_grad)
    close(triton.backward_with_jvp(problem, x, inputs), (first, second))


def _shifted(name):
    """Return problem and operands whose rows of scores share a number of some thousands, or the end of the range."""
    problem, x, *rest = _call(
        batch=(1,), rows=20, keys=44, bias=None if name in ("products", "saturated") else (1, 1, 20, 44)
    )
    if name == "products":  # of query and key, in one more column
        hundred = torch.full((1, 1, 44, 1), 100.0, device=DEVICE)
        x = x._replace(query=torch.cat([x.query, hundred[:, :, :20]], -1), key=torch.cat([x.key, hundred], -1))
        t = rest[0]._replace(query=torch.randn_like(x.query), key=torch.randn_like(x.key))
        rest[0] = t
    elif name == "saturated":
        x = x._replace(query=40 * x.query)
    elif name == "bias":
        x = x._replace(bias=x.bias + 5000.0)
    else:
        x = x._replace(bias=torch.full_like(x.bias, torch.finfo(x.bias.dtype).min))
    return problem, x, *rest


@pytest.mark.parametrize("keys", ["blocks", "one_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bias", "products", "saturated", "finfo.min"])
def test_scores_with_a_shared_shift(name, dtype, keys, monkeypatch):
    """Where exp(s - lse) would lose digits, the kernels are as exact as the formulas in the same dtype."""
    rows, columns = (16, 16) if keys == "blocks" else (16, 64)
    monkeypatch.setattr(launch, "tile", lambda *_, **__: block_sizes.Tile(rows, columns, 4, 1, True, False))
    problem, x, t, w, w_t = _shifted(name)
    low = [type(a)(*(None if p is None else p.to(dtype) for p in a)) for a in (x, t)]
    low += [Rows(a.out.to(dtype), a.lse) for a in (w, w_t)]
    if name == "finfo.min":
        low[0] = low[0]._replace(bias=torch.full_like(low[0].bias, torch.finfo(dtype).min))

    def results(backend, x, t, w, w_t):
        values = backend.forward(problem, x)
        values_t = backend.forward_jvp(problem, x, values, t)
        inputs = BackwardJvpInputs(values, values_t, w, t, w_t, x.bias is not None)
        yield from (values, values_t, backend.forward_with_jvp(problem, x, t))
        yield backend.backward(problem, x, values, w, bias_grad=x.bias is not None)
        yield backend.backward_jvp(problem, x, inputs)

    want = results(reference, *map(_wide, low))
    for got, peer, exact in zip(results(triton, *low), results(reference, *low), want, strict=True):
        exact = as_vector(exact)
        ours, formula = ((as_vector(a) - exact).norm() / exact.norm() for a in (got, peer))
        assert ours <= 3 * formula + TOLERANCE[dtype], f"{ours:.1e}, and the formula {formula:.1e}"


PACKED = {
    "even": {"heads": 2, "rows": 32, "keys": 32, "size": 16, "value_size": 16},
    "one_block_of_keys": {"heads": 2, "rows": 13, "keys": 13, "size": 16, "value_size": 16},
    "causal_gqa": {"batch": (1,), "heads": 4, "rows": 37, "keys": 37, "size": 16, "value_size": 16, "right": 0},
    "transposed": {"batch": (1,), "heads": 2, "rows": 33, "keys": 33, "size": 16, "value_size": 16, "transposed": True},
    "two_batches": {"batch": (2, 3), "rows": 20, "keys": 20, "size": 16, "value_size": 16, "expanded": True},
}


@pytest.mark.parametrize("name", [*PACKED, "even_float16"])
@pytest.mark.usefixtures("blocks")
def test_packed_gradients(name):
    """They are bitwise the same, and written as one tensor."""
    problem, x, t, w, w_t = _call(**PACKED[name.removesuffix("_float16")])
    if name.endswith("float16"):
        x, t, w, w_t = (type(a)(*(None if p is None else p.half() for p in a)) for a in (x, t, w, w_t))
    values = triton.forward(problem, x)
    values_t = triton.forward_jvp(problem, x, values, t)

    def gradients(problem):
        inputs = BackwardJvpInputs(values, values_t, w, t, w_t)
        first = triton.backward(problem, x, values, w, bias_grad=False)
        return [first, triton.backward_jvp(problem, x, inputs), *triton.backward_with_jvp(problem, x, inputs)]

    for got, want in zip(gradients(replace(problem, pack_qkv_gradients=True)), gradients(problem), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
        packed = pack_qkv(got[:3])
        assert packed.data_ptr() == got.query.data_ptr()
        assert torch.equal(packed, pack_qkv(want[:3]))


@pytest.mark.parametrize("name", ["ragged", "gqa", "bias", "three_batches"])
@pytest.mark.usefixtures("blocks")
def test_gradients_that_are_not_packed(name):
    """Padded, of two lengths, with batches that do not merge: they are the same as without the request."""
    problem, x, _, w, _ = _call(**CALLS[name])
    values = triton.forward(problem, x)
    got, want = (
        triton.backward(p, x, values, w, bias_grad=False) for p in (replace(problem, pack_qkv_gradients=True), problem)
    )
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("call", ["window", "causal", "few_rows", "few_rows_one_block"])
@pytest.mark.usefixtures("blocks")
def test_rounding(call):
    """Errors of float16 results are little larger than the rounding of the results themselves.

    For rows that see few keys, delta and mu are not computed from rounded values; with few rows no intermediate value
    is rounded without compensation.
    """
    call, max_ratio = {
        "window": ({"rows": 20, "keys": 20, "left": 3, "right": 0}, 2.0),
        "causal": ({"rows": 20, "keys": 20, "right": 0}, 2.0),
        "few_rows": ({"rows": 2, "keys": 150}, 1.2),
        "few_rows_one_block": ({"rows": 2, "keys": 15}, 1.2),
    }[call]
    problem, x, t, w, _ = _call(size=16, value_size=16, moving=False, **call)
    x, t, w = (type(a)(*(None if p is None else p.half() for p in a)) for a in (x, t, w))
    wide = [_wide(a) for a in (x, t, w)]
    values = triton.forward(problem, x)
    values_t = triton.forward_jvp(problem, x, values, t)
    exact = reference.forward(problem, wide[0])
    exact_t = reference.forward_jvp(problem, wide[0], exact, wide[1])
    got = (
        values_t.out,
        *triton.backward(problem, x, values, w, bias_grad=False)[:3],
        *triton.backward_jvp(problem, x, BackwardJvpInputs(values, values_t, w, t))[:3],
    )
    want = (
        exact_t.out,
        *reference.backward(problem, wide[0], exact, wide[2], bias_grad=False)[:3],
        *reference.backward_jvp(problem, wide[0], BackwardJvpInputs(exact, exact_t, wide[2], wide[1]))[:3],
    )
    for a, b in zip(got, want, strict=True):
        lost, rounding = (a.double() - b).norm(), (b.half().double() - b).norm()
        assert lost < max_ratio * rounding, (lost, rounding)


def test_unsupported_calls():
    problem = Problem(1.0)

    def operands(size, dtype=torch.float32, device=DEVICE):
        return Operands(*(torch.zeros(1, 1, 4, size, dtype=dtype, device=device),) * 3)

    assert triton.unsupported_reason(problem, operands(256)) is None
    assert "head sizes up to 256; got 257" in triton.unsupported_reason(problem, operands(257))
    assert "supports float16, bfloat16 and float32; got torch.float64" in triton.unsupported_reason(
        problem, operands(8, torch.float64)
    )
    if DEVICE == "cpu":
        assert "on a CPU does not support bfloat16" in triton.unsupported_reason(problem, operands(8, torch.bfloat16))
    assert "needs a CUDA device; the tensors are on meta" in triton.unsupported_reason(
        problem, operands(8, device="meta")
    )


def test_a_gpu_that_is_too_old(gpu):
    assert "needs a GPU of compute capability 8.0 or newer; got 7.5" in triton.unsupported_reason(
        Problem(1.0), gpu(64, torch.float16, (7, 5), 64)
    )


def test_large_heads_in_float32_need_shared_memory(gpu):
    problem, small = Problem(1.0), ((8, 9), 99)
    reason = triton.unsupported_reason(problem, gpu(200, torch.float32, *small))
    assert "head sizes above 128 on GPUs with 112 KiB" in reason
    assert "got head size 200 on one with 99" in reason
    assert triton.unsupported_reason(problem, gpu(128, torch.float32, *small)) is None
    assert triton.unsupported_reason(problem, gpu(200, torch.bfloat16, *small)) is None
    assert triton.unsupported_reason(problem, gpu(200, torch.float32, (8, 0), 163)) is None


def test_the_remedy_for_large_heads_works(gpu, precision):
    precision("high")
    assert triton.unsupported_reason(Problem(1.0), gpu(200, torch.float32, (8, 9), 99)) is None
