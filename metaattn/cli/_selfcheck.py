"""Check each derivative of each backend, in each dtype that it supports here, against a dense formula in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..backends import NAMES
from ..ops import explain, sdpa
from ._derivatives import Attention, derivative
from ._metrics import relative_error
from ._options import DTYPES

# The derivatives that are checked, and the primitives of a backend that each needs; each adds one to those before, or
# another way to backward_jvp, or mapped dimensions.
PRIMITIVES = {
    "fwd": ("forward",),
    "grad": ("forward", "backward"),
    "jvp": ("forward_with_jvp",),
    "hvp": ("forward_with_jvp", "backward_with_jvp"),
    "rof": ("forward_with_jvp", "backward_jvp"),
    "dbl": ("forward", "backward", "forward_jvp", "backward_jvp"),
    "vmap": ("forward_with_jvp", "backward_with_jvp"),
}
CHECKED = tuple(PRIMITIVES)
# Largest relative errors that pass, in the 2-norm over all results of a derivative. In the lower dtypes: about ten
# times the error of every backend on a CPU, which rounds each term once or twice. In float64: a few hundred roundings.
BOUND = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Call(NamedTuple):
    """A call to check: lengths of query and key, heads of key and value, the size of a value, and options."""

    name: str
    rows: int = 24
    keys: int = 24
    kv_heads: int = 2
    value_size: int = 16
    mask: str = ""  # "boolean", "bias"
    options: dict[str, Any] = {}  # noqa: RUF012 - never modified

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return the differentiable inputs, a tangent of each, and a cotangent of the output."""
        shapes = [
            (1, 2, self.rows, 16),
            (1, self.kv_heads, self.keys, 16),
            (1, self.kv_heads, self.keys, self.value_size),
        ]
        if self.mask == "bias":
            shapes.append((1, 2, self.rows, self.keys))
        g = torch.Generator().manual_seed(0)
        out = (1, 2, self.rows, self.value_size)
        drawn = [torch.randn(shape, generator=g).to(device, dtype) for shape in [*shapes, *shapes, out]]
        return drawn[: len(shapes)], drawn[len(shapes) : -1], drawn[-1]

    def boolean_mask(self, device: torch.device) -> Tensor | None:
        """Return the boolean mask, if the call has one; its last row masks all keys."""
        if self.mask != "boolean":
            return None
        g = torch.Generator().manual_seed(1)
        mask = torch.rand(1, 2, self.rows, self.keys, generator=g) < 0.7
        mask[..., -1, :] = False
        return mask.to(device)


CALLS = (
    Call("full"),
    Call("causal", options={"is_causal": True}),
    Call("boolean mask", rows=19, keys=27, mask="boolean"),
    Call("bias", rows=19, keys=27, value_size=8, mask="bias"),
    Call("grouped window", rows=27, keys=19, kv_heads=1, options={"window": (9, 2), "enable_gqa": True}),
)
INTERPRETED = (CALLS[1], CALLS[3])


def attention(call: Call, backend: str, device: torch.device) -> Attention:
    """Return the operator as a function of the call's differentiable inputs."""
    mask = call.boolean_mask(device)

    def f(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return sdpa(query, key, value, mask if bias is None else bias, **call.options, backend=backend)

    return f


def dense(call: Call, device: torch.device) -> Attention:
    """Return the oracle of :func:`attention`: the formula in operations that PyTorch differentiates.

    It is independent of all backends, ``reference`` included, and unlike PyTorch's own attention it returns zeros for a
    row without keys.
    """
    i, j = torch.arange(call.rows, device=device)[:, None], torch.arange(call.keys, device=device)
    left, right = call.options.get("window", (call.rows, call.keys))
    right = 0 if call.options.get("is_causal") else right
    band, mask = (j >= i - left) & (j <= i + right), call.boolean_mask(device)
    visible = band if mask is None else band & mask

    def f(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        e = torch.where(visible, torch.exp(scores if bias is None else scores + bias), 0.0)
        return e / e.sum(-1, keepdim=True).masked_fill(~visible.any(-1, keepdim=True), 1.0) @ value

    return f


class Finding(NamedTuple):
    """The error of one derivative of one call, or the message of the exception that it raised as ``problem``."""

    backend: str
    dtype: torch.dtype
    rule: str
    call: str
    error: float = math.nan
    problem: str = ""

    @property
    def wrong(self) -> bool:
        """True if it raised, or its error exceeds the dtype's bound or is NaN."""
        return not self.error <= BOUND[self.dtype]


def rejection(backend: str, dtype: torch.dtype, device: torch.device, call: Call = CALLS[0]) -> str | None:
    """Return why the backend does not support a call here, or ``None`` if it does."""
    (query, key, value, *bias), _, _ = call.tensors(dtype, device)
    try:
        explain(query, key, value, bias[0] if bias else call.boolean_mask(device), **call.options, backend=backend)
    except NotImplementedError as error:
        return str(error)
    return None


def working(device: torch.device) -> dict[str, list[torch.dtype] | str]:
    """Return for each backend the dtypes that it supports here, or why it supports none."""
    found: dict[str, list[torch.dtype] | str] = {}
    for name in NAMES:
        reasons = {dtype: rejection(name, dtype, device) for dtype in DTYPES.values()}
        supported = [dtype for dtype, reason in reasons.items() if reason is None]
        if supported and interpreted(name, device):
            supported = [torch.float32]  # the interpreter computes with NumPy, which has no bfloat16
        found[name] = supported or str(reasons[torch.bfloat16])
    return found


def interpreted(backend: str, device: torch.device) -> bool:
    """Return whether the backend's kernels, if they run on the device, run in Triton's interpreter."""
    return backend == "triton" and device.type == "cpu"


def check(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    """Yield the findings for all derivatives of all calls that the backend supports.

    In Triton's interpreter, which is slow, only those of two calls.
    """
    for call in INTERPRETED if interpreted(backend, device) else CALLS:
        if rejection(backend, dtype, device, call) is not None:
            continue
        x, t, w = call.tensors(dtype, device)
        wide = [a.double() for a in x], [a.double() for a in t], w.double()
        f, exact = attention(call, backend, device), dense(call, device)
        for rule in CHECKED:
            want = derivative(rule, exact, *wide)()
            try:
                got = derivative(rule, f, x, t, w)()
                error, problem = relative_error(tree_leaves(got), tree_leaves(want)), ""
            except Exception as raised:  # any exception is a finding
                error, problem = math.nan, f"{type(raised).__name__}: {(str(raised).strip() or '-').splitlines()[0]}"
            yield Finding(backend, dtype, rule, call.name, error, problem)
