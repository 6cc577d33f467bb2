"""The dtypes that the kernels are checked, tuned and compiled in: each with PyTorch's precision of float32 products."""

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
    """How the kernels compute products of that dtype, in this process from now on."""
    dtype, precision = DTYPES[name]
    torch.set_float32_matmul_precision(precision)
    return block_sizes.arithmetic(dtype)


def in_float64(part: Any) -> Any:
    """A named tuple with its tensors in float64."""
    return part._replace(**{name: t.double() for name, t in part._asdict().items() if isinstance(t, torch.Tensor)})
