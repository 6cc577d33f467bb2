"""Every rule of every backend that works here, in each dtype it serves, against the dense formula in float64."""

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

# Each asks of a backend what those before do not: F; B; T; S by the three ways to it; mapped dimensions.
CHECKED = ("fwd", "grad", "jvp", "hvp", "rof", "dbl", "vmap")
# Relative errors, in the 2-norm over all results of a rule, that pass: in the lower dtypes about ten times what every
# backend has on a CPU, where each term is rounded once or twice; float64 with room for a few hundred roundings.
BOUND = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Call(NamedTuple):
    """A call to check: lengths of query and key, heads of key and value, head sizes, and what else it uses."""

    name: str
    rows: int = 24
    keys: int = 24
    kv_heads: int = 2
    value_size: int = 16
    mask: str = ""  # "boolean", "bias"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Differentiable inputs, a tangent of each, and a cotangent."""
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

    def shown(self, device: torch.device) -> Tensor | None:
        """The boolean mask, if there is one; its last row sees nothing."""
        if self.mask != "boolean":
            return None
        g = torch.Generator().manual_seed(1)
        shown = torch.rand(1, 2, self.rows, self.keys, generator=g) < 0.7
        shown[..., -1, :] = False
        return shown.to(device)


CALLS = (
    Call("full"),
    Call("causal", options={"is_causal": True}),
    Call("boolean mask", rows=19, keys=27, mask="boolean"),
    Call("bias", rows=19, keys=27, value_size=8, mask="bias"),
    Call("grouped window", rows=27, keys=19, kv_heads=1, options={"window": (9, 2), "enable_gqa": True}),
)
INTERPRETED = (CALLS[1], CALLS[3])


def attention(call: Call, backend: str, device: torch.device) -> Attention:
    """The operator as a function of the call's differentiable inputs."""
    shown = call.shown(device)

    def f(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return sdpa(query, key, value, shown if bias is None else bias, **call.options, backend=backend)

    return f


def dense(call: Call, device: torch.device) -> Attention:
    """The same by the definition, in operations that PyTorch differentiates: the oracle."""
    i, j = torch.arange(call.rows, device=device)[:, None], torch.arange(call.keys, device=device)
    left, right = call.options.get("window", (call.rows, call.keys))
    right = 0 if call.options.get("is_causal") else right
    band, mask = (j >= i - left) & (j <= i + right), call.shown(device)
    shown = band if mask is None else band & mask

    def f(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        e = torch.where(shown, torch.exp(scores if bias is None else scores + bias), 0.0)
        return e / e.sum(-1, keepdim=True).masked_fill(~shown.any(-1, keepdim=True), 1.0) @ value

    return f


class Finding(NamedTuple):
    """One rule of one call: its error, or why there is none: ``problem`` is what was raised."""

    backend: str
    dtype: torch.dtype
    rule: str
    call: str
    error: float = math.nan
    problem: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it raised, or its error is above the dtype's bound (or NaN)."""
        return not self.error <= BOUND[self.dtype]


def refusal(backend: str, dtype: torch.dtype, device: torch.device, call: Call = CALLS[0]) -> str | None:
    """Why the backend does not serve such a call here; ``None`` if it does."""
    (query, key, value, *bias), _, _ = call.tensors(dtype, device)
    try:
        explain(query, key, value, bias[0] if bias else call.shown(device), **call.options, backend=backend)
    except NotImplementedError as error:
        return str(error)
    return None


def working(device: torch.device) -> dict[str, list[torch.dtype] | str]:
    """By backend the dtypes that it serves here, or why it serves none."""
    found: dict[str, list[torch.dtype] | str] = {}
    for name in NAMES:
        reasons = {dtype: refusal(name, dtype, device) for dtype in DTYPES.values()}
        served = [dtype for dtype, reason in reasons.items() if reason is None]
        if served and interpreted(name, device):
            served = [torch.float32]  # NumPy, which interprets, has no bfloat16
        found[name] = served or str(reasons[torch.bfloat16])
    return found


def interpreted(backend: str, device: torch.device) -> bool:
    """Whether the backend's kernels, if they run here at all, do so in Triton's interpreter."""
    return backend == "triton" and device.type == "cpu"


def check(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    """Every rule of every call that the backend serves; of two calls in Triton's interpreter, which is slow."""
    for call in INTERPRETED if interpreted(backend, device) else CALLS:
        if refusal(backend, dtype, device, call) is not None:
            continue
        x, t, w = call.tensors(dtype, device)
        wide = [a.double() for a in x], [a.double() for a in t], w.double()
        f, exact = attention(call, backend, device), dense(call, device)
        for rule in CHECKED:
            want = derivative(rule, exact, *wide)()
            try:
                got = derivative(rule, f, x, t, w)()
                error, problem = relative_error(tree_leaves(got), tree_leaves(want)), ""
            except Exception as raised:  # whatever it is, it is the finding
                error, problem = math.nan, f"{type(raised).__name__}: {(str(raised).strip() or '-').splitlines()[0]}"
            yield Finding(backend, dtype, rule, call.name, error, problem)
