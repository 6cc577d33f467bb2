"""PyTorch's own fused attention for F and B, where it returns the lse; our kernels for T and S.

cuDNN's. It knows neither forward mode nor second derivatives, and no cotangent of the lse: these go to
:mod:`metaattn.backends.triton`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from . import triton
from .base import Gradients, Operands, Pair, Problem, Rows, Values, in_turn

name = "vendor"
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 128
aten = torch.ops.aten

forward_jvp = triton.forward_jvp
forward_with_jvp = triton.forward_with_jvp
backward_jvp = triton.backward_jvp


def refuses(problem: Problem, x: Operands) -> str | None:
    """Serves plain and causal attention of CUDA tensors of 16 bits."""
    instead = "; ask for backend='triton' or 'auto'"
    d, dv = x.query.shape[-1], x.value.shape[-1]
    if not x.query.is_cuda:
        return f"backend='vendor' needs a CUDA device; the tensors are on {x.query.device}{instead}"
    if torch.cuda.get_device_capability(x.query.device) < (8, 0):
        return f"backend='vendor' needs a GPU of compute capability 8.0 or above{instead}"
    if x.query.dtype not in DTYPES:
        return f"backend='vendor' serves float16 and bfloat16; got {x.query.dtype}{instead}"
    if x.bias is not None or x.mask is not None or x.seeds is not None:
        return f"backend='vendor' serves no attn_mask and no dropout here{instead}"
    if problem.left is not None or problem.right not in (None, 0):
        return f"backend='vendor' serves no window{instead}"
    if d != dv or d % 8 or d > LARGEST_HEAD:
        return f"backend='vendor' serves one head size, a multiple of 8 up to {LARGEST_HEAD}; got {d} and {dv}{instead}"
    if x.query.shape[-2] != x.key.shape[-2]:
        return f"backend='vendor' serves one length of query and key{instead}"
    if x.query.numel() == 0:
        return f"backend='vendor' serves no empty tensors{instead}"
    return None


def forward(problem: Problem, x: Operands) -> Values:
    """F."""
    query, key, value = (_four(t) for t in x[:3])
    causal = problem.right == 0
    with torch.cuda.device(query.device):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=problem.scale
        )
    return Values(out.reshape(x.query.shape), lse.reshape(x.query.shape[:-1]))


def backward(problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
    """B; by our kernels if the lse has a cotangent."""
    if cotangent.lse is not None or cotangent.out is None:
        return triton.backward(problem, x, values, cotangent, bias_grad=bias_grad)
    query, key, value, out, w = (_four(t) for t in (*x[:3], values.out, cotangent.out))
    lse, rows = values.lse.reshape(query.shape[:3]), query.shape[-2]
    causal = problem.right == 0
    with torch.cuda.device(query.device):
        unused = torch.zeros((), dtype=torch.int64, device=query.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            w, query, key, value, out, lse.unsqueeze(-1), unused, unused, None, None, None, rows, rows, 0.0, causal,
            scale=problem.scale,
        )  # fmt: skip
    query_bar, key_bar, value_bar = (g.reshape(t.shape) for g, t in zip(grads, x[:3], strict=True))
    return Gradients(query_bar, key_bar, value_bar, None)


_in_turn = in_turn(sys.modules[__name__])


def backward_with_jvp(problem: Problem, x: Operands, *rest: Any, bias_grad: bool, **options: Any) -> Pair:
    """B and S at once where our kernels are one for both."""
    both = triton.backward_with_jvp if triton.fuses(x, bias_grad) else _in_turn
    return both(problem, x, *rest, bias_grad=bias_grad, **options)


def _four(t: Tensor) -> Tensor:
    """``[*B, H, N, ·]`` as ``[B, H, N, ·]`` with dense rows."""
    t = t.reshape(-1, *t.shape[-3:])
    return t if t.stride(-1) == 1 else t.contiguous()
