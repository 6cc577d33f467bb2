"""The backend that ``auto`` chooses for each primitive, and the reasons that it gives."""

import pytest
import torch

from metaattn.backends import PRIMITIVES, auto
from metaattn.backends.base import Operands, Problem
from tests.conftest import NO_KERNELS

needs_kernels = pytest.mark.skipif(NO_KERNELS is not None and not torch.cuda.is_available(), reason=NO_KERNELS or "")


def test_blockwise_on_a_cpu():
    x = Operands(*torch.randn(3, 1, 2, 4, 8))
    choices = {primitive: auto.choose(primitive, Problem(1.0), x) for primitive in PRIMITIVES}
    assert {choice.backend.name for choice in choices.values()} == {"blockwise"}
    both = choices.pop("backward_with_jvp")
    assert both.why == "backward, then backward_jvp: no kernel for both here"
    assert {choice.why for choice in choices.values()} == {"tensors on cpu: tiles in plain PyTorch"}


@needs_kernels
@pytest.mark.parametrize(
    ("size", "why"),
    [(64, "one fused kernel for both"), (256, "backward, then backward_jvp: no kernel for both here")],
)
def test_backward_with_jvp_is_one_kernel_if_it_fits_into_registers(gpu, size, why):
    choice = auto.choose("backward_with_jvp", Problem(1.0), gpu(size, torch.float16, (9, 0), 227))
    assert (choice.backend.name, choice.why) == ("triton", why)


@needs_kernels
def test_on_a_gpu_that_was_never_measured(gpu):
    choice = auto.choose("forward", Problem(1.0), gpu(64, torch.float16, (8, 0), 163))
    assert choice.backend.name == "triton"
    assert choice.why == "our kernel; PyTorch's own is not measured on compute capability 8.0"
    measured = auto.choose("forward", Problem(1.0), gpu(64, torch.float16, (9, 0), 227))
    assert "times as fast as" in measured.why


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "right", "name"),
    [(64, None, "triton"), (100, None, "triton"), (180, None, "vendor"), (400, None, "triton"), (197, 0, "triton")],
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_goes_by_the_nearest_length_that_was_measured(gpu, monkeypatch, tokens, right, name, kv_heads):
    column = {"full": {"64": 0.5, "197": 1.2, "512": 0.9}, "causal": {"64": 0.5}}
    monkeypatch.setattr(auto, "_table", lambda: {"9.0": {"backward": {"64": column}}})
    x = gpu(40, torch.float16, (9, 0), 227)
    query, key = (x.query.new_empty(1, heads, tokens, 40) for heads in (2, kv_heads))
    choice = auto.choose("backward", Problem(1.0, None, right), Operands(query, key, key))
    assert choice.backend.name == name
    if name == "vendor":
        assert choice.why == "PyTorch's own is measured 1.20 times as fast as ours at 197 tokens"
    unmeasured = auto.choose("forward", Problem(1.0, None, right), Operands(query, key, key))
    assert unmeasured.why == "our kernel; PyTorch's own is not measured at head size 40"


@needs_kernels
def test_where_one_band_was_not_measured(gpu, monkeypatch):
    monkeypatch.setattr(auto, "_table", lambda: {"9.0": {"forward": {"64": {"full": {"64": 2.0}}}}})
    x = gpu(64, torch.float16, (9, 0), 227)
    assert auto.choose("forward", Problem(1.0), x).backend.name == "vendor"
    assert auto.choose("forward", Problem(1.0, None, 0), x).backend.name == "triton"


@needs_kernels
def test_on_a_gpu_that_is_too_old(gpu):
    choice = auto.choose("backward_jvp", Problem(1.0), gpu(64, torch.float16, (7, 5), 64))
    assert choice.backend.name == "blockwise"
    assert "needs a GPU of compute capability 8.0" in choice.why
