"""Errors of the operator: raised before any work, they say what was expected, what was received and what to do."""

import math

import pytest
import torch

import metaattn
from metaattn.ops import operators


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


X = _x(2, 4, 5, 8)
KV2, KV3 = _x(2, 2, 5, 8), _x(2, 3, 5, 8)

ERRORS = {
    "rank": ({"query": _x(8)}, ValueError, r"query must have at least 2 dimensions.*got shape \[8\]"),
    "not_a_tensor": ({"key": [1.0]}, TypeError, "key must be a tensor, got list"),
    "head_size": ({"query": _x(2, 4, 5, 7)}, ValueError, "one head size.*got 7 and 8"),
    "no_head_size": ({"query": _x(2, 4, 5, 0), "key": _x(2, 4, 5, 0)}, ValueError, "head sizes must be at least 1"),
    "no_value_size": ({"value": _x(2, 4, 5, 0)}, ValueError, "head sizes must be at least 1"),
    "lengths": ({"value": _x(2, 4, 6, 8)}, ValueError, "key and value must have one length; got 5 and 6"),
    "heads": ({"key": KV3, "value": KV3}, ValueError, "one number of heads; got 4, 3 and 3$"),
    "heads_gqa_hint": ({"key": KV2, "value": KV2}, ValueError, "got 4, 2 and 2; .* pass enable_gqa=True"),
    "gqa_heads": (
        {"key": KV3, "value": KV3, "enable_gqa": True},
        ValueError,
        "must divide those of query; got query 4, key 3",
    ),
    "gqa_two_dims": (
        {"query": _x(5, 8), "key": _x(5, 8), "value": _x(5, 8), "enable_gqa": True},
        ValueError,
        "enable_gqa needs inputs with a head dimension",
    ),
    "batch": ({"query": _x(3, 4, 5, 8)}, ValueError, r"batch dimensions .* must broadcast; got \[3\], \[2\], \[2\]"),
    "dtype_mix": ({"key": X.double()}, TypeError, "one dtype; got query torch.float32, key torch.float64"),
    "integers": (
        {"query": X.long(), "key": X.long(), "value": X.long()},
        TypeError,
        "query must be float16.*got torch.int64",
    ),
    "complex": ({"query": X.cfloat()}, TypeError, "query must be float16.*got torch.complex64: convert it"),
    "device_mix": ({"value": X.to("meta")}, ValueError, "one device; got query on cpu, value on meta"),
    "mask_shape": ({"attn_mask": _x(3, 5)}, ValueError, r"broadcast to the scores, \[2, 4, 5, 5\]; got \[3, 5\]"),
    "mask_batch": ({"attn_mask": _x(3, 1, 5, 5)}, ValueError, r"broadcast to the scores.*got \[3, 1, 5, 5\]"),
    "mask_rank": ({"attn_mask": _x(1, 2, 4, 5, 5)}, ValueError, "broadcast to the scores"),
    "mask_dtype": ({"attn_mask": _x(5, 5).double()}, TypeError, "attn_mask must be bool, float32.*got torch.float64"),
    "mask_integer": ({"attn_mask": _x(5, 5).int()}, TypeError, "attn_mask must be bool.*got torch.int32"),
    "mask_type": ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a tensor, got list"),
    "mask_device": ({"attn_mask": _x(5, 5, device="meta")}, ValueError, "on the query's device, cpu; got meta"),
    "mask_and_causal": (
        {"attn_mask": _x(5, 5), "is_causal": True},
        ValueError,
        r"exclude each other.*window=\(None, 0\)",
    ),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1; got 1.0"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1; got -0.1"),
    "dropout_nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be at least 0"),
    "scale_tensor": ({"scale": torch.ones(())}, TypeError, "scale must be a finite number.*multiply the query"),
    "scale_text": ({"scale": "0.3"}, TypeError, "scale must be a finite number, got '0.3'"),
    "scale_huge": ({"scale": 10**400}, TypeError, "scale must be a finite number, got '1000000"),
    "scale_negative_infinity": ({"scale": -math.inf}, TypeError, "scale must be a finite number, got '-inf'"),
    "dropout_none": ({"dropout_p": None}, TypeError, "dropout_p must be a number; got None"),
    "dropout_tensor": ({"dropout_p": torch.tensor(0.5)}, TypeError, r"dropout_p must be a number; got tensor\(0"),
    "dropout_text": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number; got '0.1'"),
    "causal_none": ({"is_causal": None}, TypeError, "is_causal must be True or False; got None"),
    "causal_tensor": ({"is_causal": torch.tensor(True)}, TypeError, r"is_causal must be True or False; got tensor\("),
    "causal_one": ({"is_causal": 1}, TypeError, "is_causal must be True or False; got 1"),
    "gqa_text": ({"enable_gqa": "yes"}, TypeError, "enable_gqa must be True or False; got 'yes'"),
    "sparse_mask": (
        {"attn_mask": _x(5, 5).to_sparse()},
        TypeError,
        "attn_mask must be a dense tensor",
    ),
    "sparse": ({"key": X.to_sparse()}, TypeError, "key must be a dense tensor; got torch.sparse_coo"),
    "nested": (
        {"query": torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)},
        TypeError,
        "query must be a dense tensor; got",
    ),
    "vendor": ({"backend": "vendor"}, NotImplementedError, "needs a CUDA device; the tensors are on cpu.*blockwise"),
    "scale_nan": ({"scale": math.nan}, TypeError, "scale must be a finite number"),
    "window_shape": ({"window": 3}, TypeError, r"window must be a pair \(left, right\).*got 3"),
    "window_negative": ({"window": (-1, 0)}, ValueError, r"integer of at least 0, or None.*got \(-1, 0\)"),
    "window_float": ({"window": (1.5, None)}, ValueError, "integer of at least 0, or None"),
    "backend": ({"backend": "flash"}, ValueError, "backend must be one of 'auto', 'reference', .*got 'flash'"),
    "triton": ({"backend": "triton"}, NotImplementedError, "needs a CUDA device; the tensors are on cpu.*blockwise"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name, monkeypatch):
    arguments, error, message = ERRORS[name]
    monkeypatch.setattr(operators, "forward", None)  # no work may have begun
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"query": X, "key": X, "value": X, **arguments}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        metaattn.sdpa(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("window", [(2**63, None), (None, 2**63), (10**30, 2**70)])
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_windows_of_any_size(backend, window):
    x = torch.randn(1, 2, 4, 3)
    assert torch.equal(metaattn.sdpa(x, x, x, window=window, backend=backend), metaattn.sdpa(x, x, x, backend=backend))


def test_an_error_is_the_same_under_transforms():
    with pytest.raises(ValueError, match="one head size"):
        torch.func.vmap(lambda q: metaattn.sdpa(q, X[0], X[0]))(_x(3, 4, 5, 7))
    with pytest.raises(ValueError, match="one head size"):
        torch.func.jvp(lambda q: metaattn.sdpa(q, X, X), (_x(2, 4, 5, 7),), (_x(2, 4, 5, 7),))


def test_jit_trace_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace is not supported; use torch.compile or make_fx"):
        torch.jit.trace(lambda q: metaattn.sdpa(q, X, X), (X,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' interpreter is for machines without a GPU")
def test_batched_gradients_of_third_order():
    """The vmap of ``is_grads_batched`` has no rule for an operator that takes a list."""
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(metaattn.sdpa(x, x, x).sin().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"up to second order; take further derivatives by torch\.func"):
        torch.autograd.grad(h, x, torch.eye(6, dtype=torch.float64).view(6, *x.shape), is_grads_batched=True)


def test_an_unknown_transform():
    x = torch.randn(1, 1, 3, 2)
    with pytest.raises(NotImplementedError, match=r"no rule for the transform Functionalize of torch\.func"):
        torch.func.functionalize(lambda x: metaattn.sdpa(x, x, x))(x)


def test_an_interpreter_that_fails_with_this_numpy(monkeypatch):
    primitives = pytest.importorskip("metaattn.backends.triton.interface", exc_type=ImportError)
    monkeypatch.setattr(primitives, "INTERPRETER_FAILS", True)
    monkeypatch.setattr(operators, "forward", None)
    with pytest.raises(NotImplementedError, match=r"needs a numpy below 2\.4, or Triton 3\.7; got .*blockwise"):
        metaattn.sdpa(*[X.float()] * 3, backend="triton")
