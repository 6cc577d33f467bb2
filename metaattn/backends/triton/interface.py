"""The backend ``triton``: operands to the kernels' form, launches, and results back in the operands' form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ..base import (
    Backend,
    BackwardJvpInputs,
    Gradients,
    Operands,
    Problem,
    Rows,
    Tangent,
    Values,
    empty_packed_qkv,
    tokens_first,
)
from . import flash_bwd, flash_bwd_bias, flash_fwd
from .block_sizes import MIN_CAPABILITY, Tile, arithmetic, fit, has_block_sizes, least_columns, single_key_block
from .launch import constexpr_arguments, launch_kernel, tile_for
from .layout import (
    BatchLayout,
    BiasSplit,
    align,
    align_rows,
    align_tangent,
    row_offsets_fit,
)
from .tile_ops import INTERPRETED, MAX_FEW_KEYS

# The interpreter passes the bound of a loop as an array of one element, which numpy 2.4 does not convert to a number.
INTERPRETER_FAILS = (
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_SIZE = 256
# In float32, S of head sizes above the first needs as many bytes of shared memory as the second.
MAX_SMALL_FLOAT32_HEAD_SIZE, LARGE_FLOAT32_SHARED_BYTES = 128, 112 * 1024


class TritonBackend(Backend):
    """Fused kernels for all six primitives."""

    name = "triton"

    def unsupported_reason(self, problem: Problem, x: Operands) -> str | None:
        """Return a reason for all but CUDA tensors of 16 and 32 bits with head sizes up to 256."""
        device = x.query.device
        if device.type != "cuda" and not (INTERPRETED.value and device.type == "cpu"):
            return (
                f"backend='triton' needs a CUDA device; the tensors are on {device}. Move them to a GPU, or ask for "
                "backend='blockwise' or 'auto'"
            )
        if device.type == "cpu" and INTERPRETER_FAILS:
            return (
                f"backend='triton' on a CPU needs a numpy below 2.4, or Triton 3.7; got numpy {np.__version__} and "
                f"Triton {triton.__version__}, whose interpreter fails with it. Install one, or ask for "
                "backend='blockwise'"
            )
        if device.type == "cpu" and x.query.dtype == torch.bfloat16:
            return (
                "backend='triton' on a CPU does not support bfloat16: Triton's interpreter computes wrong products of "
                "it. Convert the tensors, or ask for backend='blockwise'"
            )
        if x.query.dtype not in DTYPES:
            return (
                f"backend='triton' supports float16, bfloat16 and float32; got {x.query.dtype}. Convert the tensors, "
                "or ask for backend='blockwise' or 'auto'"
            )
        if max(x.query.shape[-1], x.value.shape[-1]) > MAX_HEAD_SIZE:
            return (
                f"backend='triton' supports head sizes up to {MAX_HEAD_SIZE}; got {x.query.shape[-1]} for query and "
                f"key and {x.value.shape[-1]} for value. Ask for backend='blockwise' or 'auto'"
            )
        return _unsupported_by_device(x) if device.type == "cuda" else None

    def fuses_backward_with_jvp(self, x: Operands, bias_grad: bool) -> bool:
        """Return whether B and S are one kernel: if its results fit into registers, and no bias has a gradient."""
        head_size = max(x.query.shape[-1], x.value.shape[-1])
        return not bias_grad and has_block_sizes("backward_with_jvp_keys", x.query, head_size)

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        layout = BatchLayout(align(x, least_columns(x)))
        values = _empty_values(layout)
        _launch_forward("forward", problem, layout, values, Tangent(), None)
        return _without_padding(values, x)

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T."""
        columns = least_columns(x)
        tangent, rows = align_tangent(tangent, columns), align_rows(values, columns)
        layout = BatchLayout(align(x, columns), tangent[:3], (tangent.bias,), (rows.out,))
        values_t = _empty_values(layout)
        _launch_forward("forward_jvp", problem, layout, rows, tangent, values_t)
        return _without_padding(values_t, x)

    def forward_with_jvp(self, problem: Problem, x: Operands, tangent: Tangent) -> tuple[Values, Values]:
        """Compute F and T in one kernel."""
        columns = least_columns(x)
        tangent = align_tangent(tangent, columns)
        layout = BatchLayout(align(x, columns), tangent[:3], (tangent.bias,))
        values, values_t = _empty_values(layout), _empty_values(layout)
        _launch_forward("forward_with_jvp", problem, layout, values, tangent, values_t)
        return _without_padding(values, x), _without_padding(values_t, x)

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B."""
        inputs = BackwardJvpInputs(values, Rows(), cotangent, Tangent(), bias_grad=bias_grad)
        return _launch_backward("backward", problem, x, inputs)[0]

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S."""
        return _launch_backward("backward_jvp", problem, x, inputs)[0]

    def backward_with_jvp(
        self, problem: Problem, x: Operands, inputs: BackwardJvpInputs
    ) -> tuple[Gradients, Gradients]:
        """Compute B and S in one kernel, if there is one: S computes all that B needs except three products."""
        if not self.fuses_backward_with_jvp(x, inputs.bias_grad):
            return super().backward_with_jvp(problem, x, inputs)
        gradients_t, gradients = _launch_backward("backward_with_jvp", problem, x, inputs)
        return gradients, gradients_t


backend = TritonBackend()


def _unsupported_by_device(x: Operands) -> str | None:
    """Return what this GPU is too old or too small for."""
    device, head_size = x.query.device, max(x.query.shape[-1], x.value.shape[-1])
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            "backend='triton' needs a GPU of compute capability {}.{} or newer; got {}.{}. Ask for "
            "backend='blockwise' or 'auto'"
        ).format(*MIN_CAPABILITY, *capability)
    large = head_size > MAX_SMALL_FLOAT32_HEAD_SIZE and arithmetic(x.query.dtype) == "float32"
    if large and shared_bytes(device) < LARGE_FLOAT32_SHARED_BYTES:
        return (
            f"backend='triton' supports float32 with head sizes above {MAX_SMALL_FLOAT32_HEAD_SIZE} on GPUs with "
            f"{LARGE_FLOAT32_SHARED_BYTES // 1024} KiB of shared memory for a block; got head size {head_size} on one "
            f"with {shared_bytes(device) // 1024}. Call torch.set_float32_matmul_precision('high'), or ask for "
            "backend='blockwise' or 'auto'"
        )
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the largest shared memory that a block can request, in bytes."""
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"]


def _empty_values(layout: BatchLayout) -> Values:
    """Return empty tensors for out and lse, or for their tangents."""
    query = layout.x.query
    out = query.new_empty(*query.shape[:-1], layout.x.value.shape[-1])
    if tokens_first(query) and not layout.copies:
        out = out.view(*out.shape[:-3], out.shape[-2], out.shape[-3], out.shape[-1]).transpose(-2, -3)
    return Values(out, query.new_empty(query.shape[:-1], dtype=torch.float32))


def _without_padding(values: Values, x: Operands) -> Values:
    """Return values without the columns that alignment added."""
    return Values(_first_columns(values.out, x.value.shape[-1]), values.lse)


def _first_columns(t: Tensor, size: int) -> Tensor:
    """Return the first columns, copied: PyTorch expects a result and its tangent to have the same strides."""
    return t if t.shape[-1] == size else t[..., :size].clone()


def _launch_forward(
    primitive: str,
    problem: Problem,
    layout: BatchLayout,
    values: Rows | Values,
    tangent: Tangent,
    values_t: Values | None,
) -> None:
    """Launch the kernel of ``forward``, ``forward_jvp`` or ``forward_with_jvp``.

    Args:
        primitive: Its name.
        problem: The static part of the call.
        layout: The aligned operands.
        values: Results of F: read by ``forward_jvp``, written by the others.
        tangent: The aligned tangents.
        values_t: Where the tangents of the results are written.
    """
    assert values.lse is not None
    arguments = (
        layout.inputs(layout.x),
        layout.inputs(tangent),
        layout.kernel_problem(problem),
        layout.view(values.out) if primitive == "forward_jvp" else layout.output_view(values.out),
        values.lse.contiguous(),
        layout.output_view(values_t.out if values_t else None),
        values_t.lse if values_t else None,
    )
    options = {
        **constexpr_arguments(problem, layout.x),
        "FORWARD": primitive != "forward_jvp",
        "JVP": primitive != "forward",
        # A row of exactly 64 keys loses too little of mu to pay for the extra pass, and such rows are frequent.
        "FEW_KEYS": primitive != "forward" and _rows_may_see_few_keys(problem, layout, MAX_FEW_KEYS.value - 1),
        "COMPENSATE": layout.compensate,
        "RENORMALIZE": layout.renormalize,
    }
    launch_kernel(
        flash_fwd.attention_forward,
        primitive,
        tile_for(primitive, layout, problem),
        layout,
        _row_programs(layout),
        arguments,
        options,
    )


def _rows_may_see_few_keys(problem: Problem, layout: BatchLayout, max_keys: int) -> bool:
    """Return whether some row may see at most ``max_keys`` keys, so that kernels must limit its rounding errors."""
    return problem.banded or layout.keys <= max_keys


def _row_programs(layout: BatchLayout) -> Callable[[Tile], int]:
    """Return the number of programs if each has one block of rows."""
    return lambda t: triton.cdiv(layout.rows, t.rows) * layout.total_heads


def _launch_backward(primitive: str, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> list[Gradients]:
    """Launch the kernels of ``backward``, ``backward_jvp`` or ``backward_with_jvp``.

    Returns:
        The gradients of the primitive; for ``backward_with_jvp`` those of S, then those of B.
    """
    sizes, columns, bias_grad = [t.shape[-1] for t in x[:3]], least_columns(x), inputs.bias_grad
    x, tangent = align(x, columns), align_tangent(inputs.tangent, columns)
    by_row = (inputs.values, inputs.values_tangent, inputs.cotangent, inputs.cotangent_tangent)
    rows, values_t, w, w_t = (align_rows(r, columns) for r in by_row)
    layout = BatchLayout(x, (*tangent[:3], w.out, w_t.out), (tangent.bias,), (rows.out, values_t.out))
    both = primitive == "backward_with_jvp"
    results = [_empty_gradients(problem, layout, sizes) for _ in range(1 + both)]
    # For query, key and value: the view that a kernel writes; and for B and S at once, a tensor with the same strides
    # for B.
    query, key, value = (
        (layout.output_view(written), others[0] if both else None) for written, *others in zip(*results, strict=True)
    )
    kernel_problem = layout.kernel_problem(problem)
    row_inputs = layout.row_inputs(rows, values_t, w, w_t)
    arguments = (layout.inputs(x), layout.inputs(tangent), kernel_problem, row_inputs)
    options = {
        **constexpr_arguments(problem, x),
        "JVP": primitive != "backward",
        "COMPENSATE": layout.compensate,
        "RENORMALIZE": layout.renormalize,
    }

    t = tile_for(f"{primitive}_keys", layout, problem)

    def launch_keys(t: Tile, single_block: bool) -> bool:
        return launch_kernel(
            flash_bwd.attention_backward_keys,
            f"{primitive}_keys",
            t,
            layout,
            lambda t: triton.cdiv(layout.keys, t.keys) * (layout.total_heads // kernel_problem.GROUP),
            (*arguments, *query, *key, *value),
            {**options, "SINGLE_KEY_BLOCK": single_block},
            fixed_keys=single_block,
        )

    single_block = 0 < layout.keys <= t.keys and not bias_grad
    if not (single_block and launch_keys(single_key_block(primitive, t, x.query, max(sizes), layout.rows), True)):
        launch_kernel(
            flash_bwd.attention_backward_rows,
            f"{primitive}_rows",
            tile_for(f"{primitive}_rows", layout, problem),
            layout,
            _row_programs(layout),
            (*arguments, *query),
            {**options, "FEW_KEYS": _rows_may_see_few_keys(problem, layout, MAX_FEW_KEYS.value)},
        )
        launch_keys(t, False)
    bias = _bias_gradient(layout, t, arguments, options) if bias_grad else None
    unpadded = ([_first_columns(g, n) for g, n in zip(grads, sizes, strict=True)] for grads in results)
    return [Gradients(query_bar, key_bar, value_bar, bias) for query_bar, key_bar, value_bar in unpadded]


def _empty_gradients(problem: Problem, layout: BatchLayout, sizes: list[int]) -> list[Tensor]:
    """Return empty tensors for the gradients of query, key and value.

    Args:
        problem: Whether the gradients are to be packed.
        layout: The aligned operands.
        sizes: Head sizes before alignment.
    """
    qkv = layout.x[:3]
    same_size = len({t.shape[-2:] for t in qkv}) == 1 and [t.shape[-1] for t in qkv] == sizes
    if problem.pack_qkv_gradients and same_size and not layout.copies:
        packed = empty_packed_qkv(qkv)
        if row_offsets_fit(packed[0]):
            return packed
    return [t.new_empty(t.shape) for t in qkv]


def _bias_gradient(layout: BatchLayout, t: Tile, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return the gradient of the bias: partial sums over what it is broadcast to, then their sum.

    The deltas in ``arguments`` must have been computed.
    """
    bias = layout.x.bias
    assert bias is not None

    def programs(t: Tile, split: BiasSplit) -> int:
        rows = triton.cdiv(layout.rows, t.rows) if split.row is not None else 1
        return split.BIAS_HEADS * rows * (triton.cdiv(layout.keys, t.keys) if split.col is not None else 1)

    # Enough programs to fill a GPU; the partial sums take no more memory than a few biases.
    unsplit = programs(t, layout.bias_split(bias, splits=1)[0])
    split, shape = layout.bias_split(bias, splits=max(1, min(64, 1024 // max(1, unsplit))))
    if not unsplit * split.SPLITS:
        return torch.zeros_like(bias)
    sums = bias.new_empty(split.SPLITS, *shape, dtype=torch.float32)
    launch_kernel(
        flash_bwd_bias.attention_backward_bias,
        "bias_rows",
        fit("bias_rows", t, arithmetic(layout.x.query.dtype)),
        layout,
        lambda t: programs(t, split) * split.SPLITS,
        (*arguments, sums, split),
        {name: value for name, value in options.items() if name != "COMPENSATE"},  # it rounds no factors
        has_segments=False,
    )
    total = sums.sum(0) if len(sums) > 1 else sums[0]
    if layout.copies:
        total = total.view(*layout.sizes, *total.shape[-3:]).sum_to_size(bias.shape)
    return total.view(bias.shape).to(bias.dtype)
