"""Which backend would serve a call, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import PRIMITIVES, choose
from ._checks import Window, prepare


class Explanation(NamedTuple):
    """For each primitive, the backend that serves it and why; printed as a table."""

    forward: tuple[str, str]
    backward: tuple[str, str]
    forward_jvp: tuple[str, str]
    forward_with_jvp: tuple[str, str]
    backward_jvp: tuple[str, str]
    backward_with_jvp: tuple[str, str]

    def __str__(self) -> str:
        width = max(len(backend) for backend, _ in self)
        return "\n".join(f"{n:<18}{b:<{width + 2}}{w}" for n, (b, w) in zip(self._fields, self, strict=True))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend would serve each primitive of :func:`sdpa` with these arguments, and why. Computes nothing.

    The primitives: the value (``forward``), its gradient (``backward``), its directional derivative alone
    (``forward_jvp``) and with the value (``forward_with_jvp``), and the derivative of the gradient, alone
    (``backward_jvp``) and with the gradient (``backward_with_jvp``).
    Third and higher derivatives are by ``blockwise`` for every backend.

    Args:
        query: As for :func:`sdpa`, as are all others.
        key: Likewise.
        value: Likewise.
        attn_mask: Likewise.
        dropout_p: Likewise; no random numbers are used up.
        is_causal: Likewise.
        scale: Likewise.
        enable_gqa: Likewise.
        window: Likewise.
        backend: Likewise; for one other than ``"auto"`` all it says is that this was asked for.

    Returns:
        For each primitive the name of a backend and the reason; printed, a table.

    Raises:
        TypeError: As :func:`sdpa`.
        ValueError: As :func:`sdpa`.
        NotImplementedError: As :func:`sdpa`.

    Example:
        >>> import torch, metaattn
        >>> q = torch.randn(1, 2, 64, 16)
        >>> print(metaattn.explain(q, q, q))
        forward           blockwise  tensors on cpu: tiles in plain PyTorch
        backward          blockwise  tensors on cpu: tiles in plain PyTorch
        forward_jvp       blockwise  tensors on cpu: tiles in plain PyTorch
        forward_with_jvp  blockwise  tensors on cpu: tiles in plain PyTorch
        backward_jvp      blockwise  tensors on cpu: tiles in plain PyTorch
        backward_with_jvp blockwise  backward, then backward_jvp: no kernel for both here
    """
    with torch.random.fork_rng(enabled=dropout_p > 0.0):
        p = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, backend)
    if p.call.backend != "auto":
        return Explanation(*((p.call.backend, "asked for"),) * len(PRIMITIVES))
    choices = (choose(primitive, p.call.problem, p.x) for primitive in PRIMITIVES)
    return Explanation(*((c.backend.name, c.why) for c in choices))
