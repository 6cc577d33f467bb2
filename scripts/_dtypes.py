"""Dtypes in which the kernels are checked, tuned and compiled, each with PyTorch's precision of float32 products."""

from typing import Any

import torch

from metaattn.backends.triton import block_sizes

DTYPES = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}


def arithmetic(name: str) -> str:
    """Set the precision for a dtype in this process; return how the kernels compute products then."""
    dtype, precision = DTYPES[name]
    torch.set_float32_matmul_precision(precision)
    return block_sizes.arithmetic(dtype)


def in_float64(named: Any) -> Any:
    """Return a named tuple with its tensors in float64."""
    return named._replace(**{name: t.double() for name, t in named._asdict().items() if isinstance(t, torch.Tensor)})
