"""PyTorch's own fused attention for F and B; our kernels for T and S.

Of PyTorch's fused kernels cuDNN's is used, because it returns the lse. It has neither forward mode nor second
derivatives, and takes no cotangent of the lse; :mod:`metaattn.backends.triton` computes these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Gradients, Operands, Problem, Rows, Values
from .triton import TritonBackend

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 128
aten = torch.ops.aten


class VendorBackend(TritonBackend):
    """cuDNN's F and B, and the other primitives of :class:`~metaattn.backends.triton.TritonBackend`."""

    name = "vendor"

    def unsupported_reason(self, problem: Problem, x: Operands) -> str | None:
        """Return a reason for all but plain and causal attention of 16-bit CUDA tensors."""
        instead = "; ask for backend='triton' or 'auto'"
        d, dv = x.query.shape[-1], x.value.shape[-1]
        if not x.query.is_cuda:
            return f"backend='vendor' needs a CUDA device; the tensors are on {x.query.device}{instead}"
        capability = torch.cuda.get_device_capability(x.query.device)
        if capability < (8, 0):
            return (
                "backend='vendor' needs a GPU of compute capability 8.0 or newer; got {}.{}".format(*capability)
                + instead
            )
        if x.query.dtype not in DTYPES:
            return f"backend='vendor' supports float16 and bfloat16; got {x.query.dtype}{instead}"
        if x.bias is not None or x.mask is not None or x.seeds is not None:
            return f"backend='vendor' supports no attn_mask and no dropout{instead}"
        if problem.left is not None or problem.right not in (None, 0):
            return f"backend='vendor' supports no window{instead}"
        if d != dv or d % 8 or d > MAX_HEAD_SIZE:
            return (
                f"backend='vendor' supports equal head sizes of query, key and value that are multiples of 8 up to "
                f"{MAX_HEAD_SIZE}; got {d} and {dv}{instead}"
            )
        if x.query.shape[-2] != x.key.shape[-2]:
            lengths = f"{x.query.shape[-2]} and {x.key.shape[-2]}"
            return f"backend='vendor' supports only equal lengths of query and key; got {lengths}{instead}"
        if x.query.numel() == 0:
            return f"backend='vendor' supports no empty tensors{instead}"
        return None

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        query, key, value = (_with_one_batch_dimension(t) for t in x[:3])
        causal = problem.right == 0
        with torch.cuda.device(query.device):
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, causal, False, scale=problem.scale
            )
        return Values(out.reshape(x.query.shape), lse.reshape(x.query.shape[:-1]))

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B; with our kernels if the lse has a cotangent."""
        if cotangent.lse is not None or cotangent.out is None:
            return super().backward(problem, x, values, cotangent, bias_grad=bias_grad)
        query, key, value, out, w = (_with_one_batch_dimension(t) for t in (*x[:3], values.out, cotangent.out))
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


backend = VendorBackend()


def _with_one_batch_dimension(t: Tensor) -> Tensor:
    """Return ``[*B, H, N, ·]`` as ``[B, H, N, ·]`` with dense rows."""
    t = t.reshape(-1, *t.shape[-3:])
    return t if t.stride(-1) == 1 else t.contiguous()
