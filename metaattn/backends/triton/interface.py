"""The four primitives, and F and T, B and S at once: operands to the kernels' form, launches, results back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ..base import Gradients, Operands, Pair, Problem, Rows, Tangent, Values, in_turn, room_in_one, tokens_first
from . import flash_bwd as gradients
from . import flash_bwd_bias, flash_fwd
from .block_sizes import OLDEST, Tile, all_keys, arithmetic, fit, known
from .launch import constants, run, tile_for
from .layout import Batch, Share, align, align_rows, align_tangent, block, near_rows
from .tile_ops import INTERPRETED, MANY

# Its interpreter takes a bound of a loop, an array of one element, for a number, which numpy no longer does.
UNINTERPRETABLE = (
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
LARGEST_FLOAT32_HEAD, ROOM = 128, 112 * 1024  # in float32 S of larger heads takes so many bytes of shared memory


def refuses(problem: Problem, x: Operands) -> str | None:
    """Serves CUDA tensors of 16 and 32 bits with head sizes up to 256."""
    device = x.query.device
    if device.type != "cuda" and not (INTERPRETED.value and device.type == "cpu"):
        return (
            f"backend='triton' needs a CUDA device; the tensors are on {device}. Move them to a GPU, or ask for "
            "backend='blockwise' or 'auto'"
        )
    if device.type == "cpu" and UNINTERPRETABLE:
        return (
            f"backend='triton' on a CPU needs a numpy below 2.4, or Triton 3.7; got numpy {np.__version__} and Triton "
            f"{triton.__version__}, whose interpreter fails with it. Install one, or ask for backend='blockwise'"
        )
    if device.type == "cpu" and x.query.dtype == torch.bfloat16:
        return (
            "backend='triton' on a CPU serves no bfloat16, whose products Triton's interpreter has wrong. Convert the "
            "tensors, or ask for backend='blockwise'"
        )
    if x.query.dtype not in DTYPES:
        return (
            f"backend='triton' serves float16, bfloat16 and float32; got {x.query.dtype}. Convert the tensors, or ask "
            "for backend='blockwise' or 'auto'"
        )
    if max(x.query.shape[-1], x.value.shape[-1]) > LARGEST_HEAD:
        return (
            f"backend='triton' serves head sizes up to {LARGEST_HEAD}; got {x.query.shape[-1]} for query and key and "
            f"{x.value.shape[-1]} for value. Ask for backend='blockwise' or 'auto'"
        )
    return _device_refuses(x) if device.type == "cuda" else None


def _device_refuses(x: Operands) -> str | None:
    """What this GPU has too little for."""
    device, head_size = x.query.device, max(x.query.shape[-1], x.value.shape[-1])
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return (
            "backend='triton' needs a GPU of compute capability {}.{} or newer; got {}.{}. Ask for "
            "backend='blockwise' or 'auto'"
        ).format(*OLDEST, *capability)
    if head_size > LARGEST_FLOAT32_HEAD and arithmetic(x.query.dtype) == "float32" and shared_bytes(device) < ROOM:
        return (
            f"backend='triton' serves float32 with head sizes above {LARGEST_FLOAT32_HEAD} on GPUs with "
            f"{ROOM // 1024} KiB of shared memory for a block; got head size {head_size} on one with "
            f"{shared_bytes(device) // 1024}. Call torch.set_float32_matmul_precision('high'), or ask for "
            "backend='blockwise' or 'auto'"
        )
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """The shared memory that a block can ask for."""
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"]


def forward(problem: Problem, x: Operands) -> Values:
    """F."""
    batch = Batch(align(x, _common_size(x)))
    values = _new_rows(batch)
    _launch_values("forward", problem, batch, values, Tangent(), None)
    return _sliced(values, x)


def forward_jvp(problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
    """T."""
    size = _common_size(x)
    tangent, rows = align_tangent(tangent, size), align_rows(values, size)
    batch = Batch(align(x, size), tangent[:3], (tangent.bias,), (rows.out,))
    values_t = _new_rows(batch)
    _launch_values("forward_jvp", problem, batch, rows, tangent, values_t)
    return _sliced(values_t, x)


def forward_with_jvp(problem: Problem, x: Operands, direction: Tangent) -> tuple[Values, Values]:
    """F and T in one kernel."""
    size = _common_size(x)
    direction = align_tangent(direction, size)
    batch = Batch(align(x, size), direction[:3], (direction.bias,))
    values, values_t = _new_rows(batch), _new_rows(batch)
    _launch_values("forward_with_jvp", problem, batch, values, direction, values_t)
    return _sliced(values, x), _sliced(values_t, x)


def backward(problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
    """B."""
    return _gradients("backward", problem, x, values, Rows(), cotangent, Rows(), Tangent(), bias_grad)[0]


def backward_jvp(
    problem: Problem,
    x: Operands,
    values: Values,
    values_tangent: Values,
    cotangent: Rows,
    tangent: Tangent,
    *,
    cotangent_tangent: Rows,
    bias_grad: bool,
) -> Gradients:
    """S."""
    values_t = Rows(*values_tangent)
    return _gradients("backward_jvp", problem, x, values, values_t, cotangent, cotangent_tangent, tangent, bias_grad)[0]


_in_turn = in_turn(sys.modules[__name__])


def backward_with_jvp(
    problem: Problem,
    x: Operands,
    values: Values,
    values_tangent: Values,
    cotangent: Rows,
    tangent: Tangent,
    *,
    cotangent_tangent: Rows,
    bias_grad: bool,
) -> Pair:
    """B and S at once: S computes all that B does but three products."""
    if not fuses(x, bias_grad):
        options = {"cotangent_tangent": cotangent_tangent, "bias_grad": bias_grad}
        return _in_turn(problem, x, values, values_tangent, cotangent, tangent, **options)
    rows_t = Rows(*values_tangent)
    second_grads, first_grads = _gradients(
        "backward_with_jvp", problem, x, values, rows_t, cotangent, cotangent_tangent, tangent, bias_grad
    )
    return first_grads, second_grads


def fuses(x: Operands, bias_grad: bool) -> bool:
    """Whether B and S are one kernel: where its results fit into registers, and no bias has a gradient."""
    return not bias_grad and known("backward_with_jvp_keys", x.query, max(x.query.shape[-1], x.value.shape[-1]))


def _new_rows(batch: Batch) -> Values:
    """Room for out and lse, or for their tangents."""
    query = batch.x.query
    out = query.new_empty(*query.shape[:-1], batch.x.value.shape[-1])
    if tokens_first(query) and not batch.copies:
        out = out.view(*out.shape[:-3], out.shape[-2], out.shape[-3], out.shape[-1]).transpose(-2, -3)
    return Values(out, query.new_empty(query.shape[:-1], dtype=torch.float32))


def _sliced(values: Values, x: Operands) -> Values:
    """Without the columns that alignment added."""
    return Values(_cut(values.out, x.value.shape[-1]), values.lse)


def _cut(t: Tensor, size: int) -> Tensor:
    """The first columns, in memory of their own: PyTorch expects a result and its tangent to lie alike."""
    return t if t.shape[-1] == size else t[..., :size].clone()


def _launch_values(
    primitive: str, problem: Problem, batch: Batch, values: Rows | Values, tangent: Tangent, values_t: Values | None
) -> None:
    assert values.lse is not None
    arguments = (
        batch.inputs(batch.x),
        batch.inputs(tangent),
        batch.scores(problem),
        batch.view(values.out) if primitive == "forward_jvp" else batch.room(values.out),
        values.lse.contiguous(),
        batch.room(values_t.out if values_t else None),
        values_t.lse if values_t else None,
    )
    options = {
        **constants(problem, batch.x),
        "VALUE": primitive != "forward_jvp",
        "TANGENT": primitive != "forward",
        # Of 64 keys mu loses too little for a walk of its own, which that many are often enough to pay for.
        "FEW": primitive != "forward" and _sees_few(problem, batch, MANY.value - 1),
        "EXACT": batch.exact,
    }
    run(
        flash_fwd.values,
        primitive,
        tile_for(primitive, batch, problem),
        batch,
        _row_programs(batch),
        arguments,
        options,
    )


def _common_size(x: Operands) -> int | None:
    """The columns of query and value alike, in float32; ``None`` where each may have its own.

    By parts of 16 bits and with different sizes the kernels of Triton 3.6 read past their operands on an H100.
    """
    return block(max(x.query.shape[-1], x.value.shape[-1])) if arithmetic(x.query.dtype) == "float32" else None


def _sees_few(problem: Problem, batch: Batch, most: int) -> bool:
    """Whether some row may see so few keys, at ``most``, that kernels take care of what it loses to rounding."""
    return problem.banded or batch.keys <= most


def _row_programs(batch: Batch) -> Callable[[Tile], int]:
    """How many programs have a block of rows each."""
    return lambda t: triton.cdiv(batch.rows, t.rows) * batch.lanes


def _gradients(
    primitive: str,
    problem: Problem,
    x: Operands,
    values: Values,
    values_t: Rows,
    w: Rows,
    w_t: Rows,
    tangent: Tangent,
    bias_grad: bool,
) -> list[Gradients]:
    """The gradients of a primitive; of two at once, S and then B."""
    sizes, size = [t.shape[-1] for t in x[:3]], _common_size(x)
    x, tangent = align(x, size), align_tangent(tangent, size)
    rows, values_t, w, w_t = (align_rows(parts, size) for parts in (values, values_t, w, w_t))
    batch = Batch(x, (*tangent[:3], w.out, w_t.out), (tangent.bias,), (rows.out, values_t.out))
    both = primitive == "backward_with_jvp"
    results = [_new_gradients(problem, batch, sizes) for _ in range(1 + both)]
    # What a kernel writes, and where it writes B's beside S's.
    query, key, value = (
        (batch.room(part), others[0] if both else None) for part, *others in zip(*results, strict=True)
    )
    scores = batch.scores(problem)
    arguments = (batch.inputs(x), batch.inputs(tangent), scores, batch.cotangents(rows, values_t, w, w_t))
    options = {**constants(problem, x), "SECOND": primitive != "backward", "EXACT": batch.exact}

    t = tile_for(f"{primitive}_keys", batch, problem)

    def by_key(t: Tile, alone: bool) -> bool:
        return run(
            gradients.by_key,
            f"{primitive}_keys",
            t,
            batch,
            lambda t: triton.cdiv(batch.keys, t.keys) * (batch.lanes // scores.GROUP),
            (*arguments, *query, *key, *value),
            {**options, "ALONE": alone},
            whole_rows=alone,
        )

    alone = 0 < batch.keys <= t.keys and not bias_grad
    if not (alone and by_key(all_keys(primitive, t, x.query, max(sizes), batch.rows), alone=True)):
        run(
            gradients.by_row,
            f"{primitive}_rows",
            tile_for(f"{primitive}_rows", batch, problem),
            batch,
            _row_programs(batch),
            (*arguments, *query),
            {**options, "FEW": _sees_few(problem, batch, MANY.value)},
        )
        by_key(t, alone=False)
    bias = _bias_gradient(batch, t, arguments, options) if bias_grad else None
    cut = ([_cut(g, n) for g, n in zip(grads, sizes, strict=True)] for grads in results)
    return [Gradients(query_bar, key_bar, value_bar, bias) for query_bar, key_bar, value_bar in cut]


def _new_gradients(problem: Problem, batch: Batch, sizes: list[int]) -> list[Tensor]:
    """Room for the gradients of query, key and value, whose head sizes are ``sizes`` but for what alignment added."""
    parts = batch.x[:3]
    alike = len({t.shape[-2:] for t in parts}) == 1 and [t.shape[-1] for t in parts] == sizes
    if problem.in_one and alike and not batch.copies:
        room = room_in_one(parts)
        if near_rows(room[0]):
            return room
    return [t.new_empty(t.shape) for t in parts]


def _bias_gradient(batch: Batch, t: Tile, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The gradient of the bias, after the deltas: partial sums over shares of what it serves, then their sum."""
    bias = batch.x.bias
    assert bias is not None

    def tiles(t: Tile, share: Share) -> int:
        rows = triton.cdiv(batch.rows, t.rows) if share.row is not None else 1
        return share.OWN * rows * (triton.cdiv(batch.keys, t.keys) if share.col is not None else 1)

    # Enough programs to fill a GPU, at a memory of no more than a few biases.
    own = tiles(t, batch.share(bias, splits=1)[0])
    share, shape = batch.share(bias, splits=max(1, min(64, 1024 // max(1, own))))
    if not own * share.SPLITS:
        return torch.zeros_like(bias)
    sums = bias.new_empty(share.SPLITS, *shape, dtype=torch.float32)
    run(
        flash_bwd_bias.by_bias,
        "bias_rows",
        fit("bias_rows", t),
        batch,
        lambda t: tiles(t, share) * share.SPLITS,
        (*arguments, sums, share),
        options,
        even=False,
    )
    total = sums.sum(0) if len(sums) > 1 else sums[0]
    if batch.copies:
        total = total.view(*batch.sizes, *total.shape[-3:]).sum_to_size(bias.shape)
    return total.view(bias.shape).to(bias.dtype)
