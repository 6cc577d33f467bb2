"""PyTorch's own attention as a backend: which calls it supports, and what it leaves to our kernels.

Values are compared on a GPU, in test_gpu. Here its kernels run on fake tensors.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metaattn.backends.base import BackwardJvpInputs, Operands, Problem, Rows, Tangent, Values

vendor = pytest.importorskip("metaattn.backends.vendor", exc_type=ImportError)
TritonBackend = vendor.TritonBackend


@pytest.mark.parametrize(
    ("change", "problem", "reason"),
    [
        ({}, Problem(1.0), None),
        ({}, Problem(1.0, None, 0), None),
        ({}, Problem(1.0, 3, 0), "supports no window"),
        ({"dtype": torch.float32}, Problem(1.0), "supports float16 and bfloat16; got torch.float32"),
        ({"size": 40}, Problem(1.0), None),
        ({"size": 20}, Problem(1.0), "multiples of 8 up to 128; got 20 and 20"),
        ({"size": 256}, Problem(1.0), "multiples of 8 up to 128; got 256 and 256"),
        ({"keys": 5}, Problem(1.0), "supports only equal lengths of query and key; got 4 and 5"),
        ({"rows": 0, "keys": 0}, Problem(1.0), "supports no empty tensors"),
        ({"mask": True}, Problem(1.0), "supports no attn_mask and no dropout"),
        ({"capability": (7, 5)}, Problem(1.0), "needs a GPU of compute capability 8.0 or newer; got 7.5"),
    ],
)
def test_supported_calls(gpu, change, problem, reason):
    x = gpu(change.get("size", 64), change.get("dtype", torch.float16), change.get("capability", (9, 0)), 227)
    x = x._replace(query=x.query.new_empty(1, 1, change.get("rows", 4), x.query.shape[-1]))
    if "keys" in change:
        key = x.key.new_empty(1, 1, change["keys"], x.key.shape[-1])
        x = x._replace(key=key, value=key)
    if "mask" in change:
        x = x._replace(mask=x.query.new_empty(1, 1, 4, 4, dtype=torch.bool))
    got = vendor.backend.unsupported_reason(problem, x)
    if reason is None:
        assert got is None
    else:
        assert reason in got
        assert got.endswith("; ask for backend='triton' or 'auto'")


def test_a_call_on_the_cpu_is_not_supported():
    x = Operands(*torch.zeros(3, 1, 1, 4, 8))
    assert "needs a CUDA device; the tensors are on cpu" in vendor.backend.unsupported_reason(Problem(1.0), x)


@pytest.fixture
def fake(monkeypatch):
    """Operands and a cotangent on a GPU that need not exist."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with FakeTensorMode():
        x = [torch.empty(2, 3, 5, 16, 64, dtype=torch.float16, device="cuda:0") for _ in range(4)]
        yield Operands(*x[:3]), x[3]


def test_values_and_gradients_have_the_shapes_of_the_operands(fake):
    x, w = fake
    values = vendor.backend.forward(Problem(1.0, None, 0), x)
    assert values.out.shape == x.query.shape
    assert values.lse.shape == x.query.shape[:-1]
    gradients = vendor.backend.backward(Problem(1.0, None, 0), x, values, Rows(w), bias_grad=False)
    assert [g.shape for g in gradients[:3]] == [t.shape for t in x[:3]]
    assert gradients.bias is None


def test_our_kernels_take_what_it_does_not_have(monkeypatch):
    x, w = Operands(*torch.zeros(3, 1, 1, 4, 8)), torch.zeros(1, 1, 4, 8)
    called = []
    for name in ("backward", "forward_jvp", "backward_jvp", "forward_with_jvp"):
        monkeypatch.setattr(TritonBackend, name, lambda *_, name=name, **__: called.append(name))
    backend, problem, values = vendor.backend, Problem(1.0), Values(w, w[..., 0])
    backend.backward(problem, x, values, Rows(w, w[..., 0]), bias_grad=False)
    backend.forward_jvp(problem, x, values, Tangent(w))
    backend.forward_with_jvp(problem, x, Tangent(w))
    backend.backward_jvp(problem, x, BackwardJvpInputs(values, values, Rows(w), Tangent(w)))
    assert called == ["backward", "forward_jvp", "forward_with_jvp", "backward_jvp"]


def test_without_a_fused_kernel_b_is_its_own(monkeypatch):
    x, w = Operands(*torch.zeros(3, 1, 1, 4, 8)), torch.zeros(1, 1, 4, 8)
    called = []
    monkeypatch.setattr(TritonBackend, "fuses_backward_with_jvp", lambda *_, **__: False)
    monkeypatch.setattr(TritonBackend, "backward_jvp", lambda *_: called.append("triton backward_jvp"))
    monkeypatch.setattr(type(vendor.backend), "backward", lambda *_, **__: called.append("vendor backward"))
    values = Values(w, w[..., 0])
    vendor.backend.backward_with_jvp(Problem(1.0), x, BackwardJvpInputs(values, values, Rows(w), Tangent(w)))
    assert called == ["vendor backward", "triton backward_jvp"]
