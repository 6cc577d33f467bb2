"""Explain which backend a call of the operator would use, and why."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import PRIMITIVES, choose, select
from ._checks import Window, prepare


class Explanation(NamedTuple):
    """For each primitive, a pair: the name of the backend that runs it, and the reason. Prints as a table.

    The former names of two fields, ``tangent`` (now ``forward_jvp``) and ``second`` (now ``backward_jvp``), are
    deprecated and will be removed in the next release.

    Attributes:
        forward: The value.
        backward: Its gradient.
        forward_jvp: Its directional derivative, without the value.
        forward_with_jvp: Its directional derivative, together with the value.
        backward_jvp: The directional derivative of the gradient, as in a Hessian-vector product.
        backward_with_jvp: The gradient together with its directional derivative.
    """

    forward: tuple[str, str]
    backward: tuple[str, str]
    forward_jvp: tuple[str, str]
    forward_with_jvp: tuple[str, str]
    backward_jvp: tuple[str, str]
    backward_with_jvp: tuple[str, str]

    @property
    def tangent(self) -> tuple[str, str]:
        """Deprecated name of ``forward_jvp``."""
        return self._renamed("tangent", "forward_jvp")

    @property
    def second(self) -> tuple[str, str]:
        """Deprecated name of ``backward_jvp``."""
        return self._renamed("second", "backward_jvp")

    def _renamed(self, old: str, new: str) -> tuple[str, str]:
        warnings.warn(f"Explanation.{old} is now called {new}; use that name", DeprecationWarning, stacklevel=3)
        value: tuple[str, str] = getattr(self, new)
        return value

    def __str__(self) -> str:
        names = max(map(len, self._fields)) + 2
        backends = max(len(backend) for backend, _ in self) + 2
        return "\n".join(f"{n:<{names}}{b:<{backends}}{why}" for n, (b, why) in zip(self._fields, self, strict=True))


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
    """Explain which backend would run each primitive of :func:`sdpa` for these arguments, without computing anything.

    In forward mode over reverse mode (``jvp`` of ``grad``) one kernel computes the gradient together with its
    directional derivative, if the backend of ``backward_jvp`` has such a kernel. Third and higher derivatives are
    computed by ``blockwise``, whatever the backend.

    Args:
        query: ``[..., Hq, Nq, D]``, as for :func:`sdpa`.
        key: ``[..., Hkv, Nk, D]``, as for :func:`sdpa`.
        value: ``[..., Hkv, Nk, Dv]``, as for :func:`sdpa`.
        attn_mask: Broadcastable to ``[..., Hq, Nq, Nk]``, as for :func:`sdpa`.
        dropout_p: As for :func:`sdpa`. The state of the random number generator does not change.
        is_causal: As for :func:`sdpa`.
        scale: As for :func:`sdpa`.
        enable_gqa: As for :func:`sdpa`.
        window: As for :func:`sdpa`.
        backend: As for :func:`sdpa`. With any other than ``"auto"`` the reason is that it was asked for, unless there
            is one key: ``"reference"`` computes such a call for every backend.

    Returns:
        The backend and the reason for each primitive.

    Raises:
        TypeError: As :func:`sdpa`.
        ValueError: As :func:`sdpa`.
        NotImplementedError: As :func:`sdpa`.

    Example:
        >>> import torch, metaattn
        >>> q = torch.randn(1, 2, 64, 16)
        >>> print(metaattn.explain(q, q, q))
        forward            blockwise  tensors on cpu: tiles in plain PyTorch
        backward           blockwise  tensors on cpu: tiles in plain PyTorch
        forward_jvp        blockwise  tensors on cpu: tiles in plain PyTorch
        forward_with_jvp   blockwise  tensors on cpu: tiles in plain PyTorch
        backward_jvp       blockwise  tensors on cpu: tiles in plain PyTorch
        backward_with_jvp  blockwise  backward, then backward_jvp: no kernel for both here
    """
    with torch.random.fork_rng(enabled=dropout_p > 0.0):
        p = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, backend)
    if p.x.key.shape[-2] == 1:
        name = select(p.call.backend, p.call.problem, p.x).name
        return Explanation(
            *((name, "one key: its softmax is constant, with derivatives of exactly zero"),) * len(PRIMITIVES)
        )
    if p.call.backend != "auto":
        return Explanation(*((p.call.backend, "asked for"),) * len(PRIMITIVES))
    choices = (choose(primitive, p.call.problem, p.x) for primitive in PRIMITIVES)
    return Explanation(*((c.backend.name, c.why) for c in choices))
