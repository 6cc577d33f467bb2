"""The public operator: scaled dot-product attention, differentiable to any order in any mode.

:func:`sdpa` checks its arguments (``_checks``), applies a custom function with the derivative rules (``_rules``), which
runs an operator of :mod:`torch.library` (``operators``), which runs a backend. The other functions give derivatives
explicitly, in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from ..backends.base import Rows, Tangent, Values, accumulator
from . import _rules as rules
from ._checks import Prepared, Window, prepare, reduce_gradient, shape_tangent
from ._tensor_kinds import as_tensor
from .operators import autocasts


@overload
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: Window | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: Window | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def sdpa(
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
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute scaled dot-product attention, ``softmax(scale * query key^T + attn_mask) value``.

    This replaces :func:`torch.nn.functional.scaled_dot_product_attention` (the first eight parameters mean the same) by
    a function that can be differentiated to any order: in reverse and forward mode, nested in any way, under every
    :mod:`torch.func` transform, by double backward, and by :mod:`torch.autograd.forward_ad`.

    Args:
        query: ``[..., Hq, Nq, D]``, float16, bfloat16, float32 or float64, of two dimensions or more.
        key: ``[..., Hkv, Nk, D]``. Leading dimensions broadcast against those of the query.
        value: ``[..., Hkv, Nk, Dv]``.
        attn_mask: Broadcastable to ``[..., Hq, Nq, Nk]``. A boolean mask is True where a key takes part in a row. Any
            other mask is added to the scores, and is differentiable. A causal bias of :mod:`torch.nn.attention.bias`
            for ``(Nq, Nk)`` makes no mask: it limits the keys that a row sees, as ``is_causal`` and ``window`` do,
            aligned to the top left (``causal_upper_left``) or to the bottom right (``causal_lower_right``).
        dropout_p: Probability with which an attention weight is dropped, in ``[0, 1)``; the others are divided by
            ``1 - dropout_p``. It applies whenever it is positive. One call drops the same weights in its output and in
            all its derivatives. Random numbers come from PyTorch's default generator; under :func:`torch.func.vmap`,
            its ``randomness`` decides whether they differ between entries.
        is_causal: Row ``i`` sees keys ``j <= i``, aligned to the top left if ``Nq != Nk``. Excludes ``attn_mask``.
        scale: Factor of the scores; ``1/sqrt(D)`` by default.
        enable_gqa: Grouped-query attention: ``Hkv`` may be a divisor of ``Hq``, and query head ``h`` uses key head
            ``h // (Hq // Hkv)``.
        window: ``(left, right)``: row ``i`` sees keys ``i - left <= j <= i + right``; ``None`` is no limit. It can be
            combined with ``is_causal`` and with ``attn_mask``.
        return_lse: Also return the log-sum-exp of the scores of each row, which is differentiable like the output.
        backend: ``"reference"``, ``"blockwise"``, ``"triton"``, ``"vendor"`` or ``"auto"``; by default that of the
            :class:`metaattn.use_backend` block around the call, or ``"auto"``. A backend that is named either supports
            the call or raises an error: there is no fallback.

    Returns:
        The output, ``[..., Hq, Nq, Dv]``, in the dtype of the inputs; with ``return_lse`` a pair of it and the
        log-sum-exp, ``[..., Hq, Nq]``, in float32 (float64 for float64 inputs). A row whose keys are all masked has
        output 0, log-sum-exp ``-inf``, and zero derivatives of every order.

    Raises:
        TypeError: A dtype or a type is not supported.
        ValueError: Shapes, devices or values do not fit together, or no backend has this name.
        NotImplementedError: The named backend does not support this call, or it runs under :func:`torch.jit.trace`.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), eq. 1. The rules: ``docs/mathematics.md``.

    Example:
        >>> import torch, metaattn
        >>> q, k, v = (torch.randn(2, 4, 16, 8, dtype=torch.float64) for _ in range(3))
        >>> loss = lambda q: metaattn.sdpa(q, k, v, is_causal=True).square().sum()
        >>> torch.func.jvp(torch.func.grad(loss), (q,), (q,))[1].shape  # a Hessian-vector product
        torch.Size([2, 4, 16, 8])
    """
    p = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, backend)
    out, lse = rules.forward(p.call, p.x)
    out = _reshaped(out, p.out_shape)
    return (out, _reshaped(lse, p.out_shape[:-1])) if return_lse else out


def _reshaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return t if t.shape == shape else t.reshape(shape)


class Gradients(NamedTuple):
    """Gradients of the primals, or tangents of these gradients, each of the shape and dtype of its primal.

    Attributes:
        query: ``[..., Hq, Nq, D]``.
        key: ``[..., Hkv, Nk, D]``.
        value: ``[..., Hkv, Nk, Dv]``.
        attn_mask: Of the shape of the mask; ``None`` if that is boolean or absent.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None


class Jvp(NamedTuple):
    """Attention and its directional derivative, as :func:`sdpa_jvp` returns them.

    Attributes:
        out: Output, ``[..., Hq, Nq, Dv]``.
        lse: Log-sum-exp of the scores of each row, ``[..., Hq, Nq]``.
        out_tangent: Tangent of ``out``, of its shape and dtype.
        lse_tangent: Tangent of ``lse``, of its shape and dtype.
    """

    out: Tensor
    lse: Tensor
    out_tangent: Tensor
    lse_tangent: Tensor


class Vjp(NamedTuple):
    """Attention and its gradients, as :func:`sdpa_vjp` returns them.

    Attributes:
        out: Output, ``[..., Hq, Nq, Dv]``.
        lse: Log-sum-exp of the scores of each row, ``[..., Hq, Nq]``.
        gradients: Gradients of the primals.
    """

    out: Tensor
    lse: Tensor
    gradients: Gradients


class Hvp(NamedTuple):
    """Attention, its directional derivative and a Hessian-vector product, as :func:`sdpa_hvp` returns them.

    Attributes:
        out: Output, ``[..., Hq, Nq, Dv]``.
        lse: Log-sum-exp of the scores of each row, ``[..., Hq, Nq]``.
        out_tangent: Tangent of ``out``, of its shape and dtype.
        lse_tangent: Tangent of ``lse``, of its shape and dtype.
        product: The Hessian-vector product, in parts of the shapes of the primals.
    """

    out: Tensor
    lse: Tensor
    out_tangent: Tensor
    lse_tangent: Tensor
    product: Gradients


Primals = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor | None]
Cotangent = Tensor | Sequence[Tensor | None]


def sdpa_jvp(primals: Primals, tangents: Sequence[Tensor | None], **options: Any) -> Jvp:
    """Compute attention and its directional derivative (Jacobian-vector product, pushforward) in one call.

    A JVP maps a tangent of the inputs to a tangent of the output. It is not a VJP, which maps a cotangent of the output
    to gradients of the inputs. The two are adjoint: ``<w, jvp(t)> == <vjp(w), t>``.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``: ``[..., Hq, Nq, D]``,
            ``[..., Hkv, Nk, D]``, ``[..., Hkv, Nk, Dv]`` and a mask broadcastable to ``[..., Hq, Nq, Nk]``, as for
            :func:`sdpa`.
        tangents: One for each primal, of its shape and dtype; ``None`` stands for zero.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out`` ``[..., Hq, Nq, Dv]``, ``lse`` ``[..., Hq, Nq]`` and their tangents; all are differentiable.

    Raises:
        TypeError: As :func:`sdpa`; or the primals are one tensor, a tangent is not a tensor or not of the dtype of its
            primal, or an option is unknown.
        ValueError: As :func:`sdpa`; or the number of tangents differs from that of primals, a tangent is not of the
            shape of its primal or belongs to a mask that is boolean or absent, or all tangents are ``None``.
        NotImplementedError: As :func:`sdpa`.

    Source:
        The formulas: ``docs/mathematics.md``, primitive T.

    Example:
        >>> import torch, metaattn
        >>> q, k, v, t = (torch.randn(2, 4, 16, 8) for _ in range(4))
        >>> metaattn.sdpa_jvp((q, k, v), (t, None, None)).out_tangent.shape
        torch.Size([2, 4, 16, 8])
    """
    p, tangent = _prepare_tangents(primals, tangents, options)
    values, rows = rules.forward_with_jvp(p.call, p.x, tangent)
    return Jvp(*_rows(p, values), *_rows(p, rows))


def sdpa_vjp(primals: Primals, cotangent: Cotangent, **options: Any) -> Vjp:
    """Compute attention and the gradients of ``<cotangent, output>`` (vector-Jacobian product, pullback) in one call.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``, as for :func:`sdpa_jvp`.
        cotangent: A cotangent of the output, ``[..., Hq, Nq, Dv]``; or a pair of that and a cotangent of the
            log-sum-exp, ``[..., Hq, Nq]``, either of which may be ``None`` (zero). Each has the dtype of the output or
            of the log-sum-exp.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out`` ``[..., Hq, Nq, Dv]``, ``lse`` ``[..., Hq, Nq]`` and the gradients of the primals, of their shapes; all
        are differentiable.

    Raises:
        TypeError: As :func:`sdpa`; or the primals are one tensor, a cotangent is neither a tensor nor a pair or has
            another dtype than the output or the log-sum-exp, or an option is unknown.
        ValueError: As :func:`sdpa`; or a cotangent has another shape than the output or the log-sum-exp, or both are
            ``None``.
        NotImplementedError: As :func:`sdpa`.

    Source:
        The formulas: ``docs/mathematics.md``, primitive B.

    Example:
        >>> import torch, metaattn
        >>> q, k, v, w = (torch.randn(2, 4, 16, 8) for _ in range(4))
        >>> metaattn.sdpa_vjp((q, k, v), w).gradients.key.shape
        torch.Size([2, 4, 16, 8])
    """
    p = _prepare(primals, options)
    w = _prepare_cotangent(p, cotangent)
    values = rules.forward(p.call, p.x)
    grads = rules.backward(p.call, p.x, values, w, bias_grad=p.x.bias is not None)
    return Vjp(*_rows(p, values), _gradients(primals, grads))


def sdpa_hvp(primals: Primals, tangents: Sequence[Tensor | None], cotangent: Cotangent, **options: Any) -> Hvp:
    """Compute the Hessian of ``<cotangent, output>`` with respect to the primals, times ``tangents``, in one call.

    That is the directional derivative along ``tangents`` of the gradients that :func:`sdpa_vjp` returns, at a fixed
    cotangent.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``, as for :func:`sdpa_jvp`.
        tangents: One for each primal, of its shape and dtype; ``None`` stands for zero.
        cotangent: As for :func:`sdpa_vjp`.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out`` ``[..., Hq, Nq, Dv]``, ``lse`` ``[..., Hq, Nq]``, their tangents (a by-product) and the Hessian-vector
        product, in parts of the shapes of the primals; all are differentiable.

    Raises:
        TypeError: As :func:`sdpa_jvp` and :func:`sdpa_vjp`.
        ValueError: As :func:`sdpa_jvp` and :func:`sdpa_vjp`.
        NotImplementedError: As :func:`sdpa`.

    Source:
        Pearlmutter 1994, Fast exact multiplication by the Hessian; the formulas: ``docs/mathematics.md``, primitive S.

    Example:
        >>> import torch, metaattn
        >>> q, k, v, t, w = (torch.randn(2, 4, 16, 8) for _ in range(5))
        >>> metaattn.sdpa_hvp((q, k, v), (t, t, t), w).product.query.shape
        torch.Size([2, 4, 16, 8])
    """
    p, tangent = _prepare_tangents(primals, tangents, options)
    w = _prepare_cotangent(p, cotangent)
    values, rows = rules.forward_with_jvp(p.call, p.x, tangent)
    product = rules.backward(p.call, p.x, values, w, [tangent], values_tangent=rows, bias_grad=p.x.bias is not None)
    return Hvp(*_rows(p, values), *_rows(p, rows), _gradients(primals, product))


_DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "window": None,
    "backend": None,
}


def _prepare(primals: Primals, options: dict[str, Any]) -> Prepared:
    expected = "primals must be (query, key, value) or (query, key, value, attn_mask)"
    if isinstance(primals, Tensor):  # one of batch size 3 is not three of them
        raise TypeError(f"{expected}; got one tensor")
    if not isinstance(primals, Sequence):
        raise TypeError(f"{expected}; got {type(primals).__name__}")
    if len(primals) not in (3, 4):
        raise ValueError(f"{expected}; got {len(primals)}")
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"unexpected options {sorted(unknown)}; expected some of {sorted(_DEFAULTS)}")
    attn_mask = primals[3] if len(primals) == 4 else None
    return prepare(*primals[:3], attn_mask, **(_DEFAULTS | options))


def _prepare_tangents(
    primals: Primals, tangents: Sequence[Tensor | None], options: dict[str, Any]
) -> tuple[Prepared, Tangent]:
    p = _prepare(primals, options)
    if isinstance(tangents, Tensor) or not isinstance(tangents, Sequence):
        raise TypeError(f"tangents must be a sequence of tensors or None; got {type(tangents).__name__}")
    if len(tangents) != len(primals):
        raise ValueError(f"expected one tangent for each of the {len(primals)} primals; got {len(tangents)}")
    names = ("query", "key", "value", "attn_mask")
    targets = (p.x.query, p.x.key, p.x.value, p.x.bias)
    tangent = Tangent(
        *(shape_tangent(n, t, d, x) for n, t, d, x in zip(names, primals, tangents, targets, strict=False))
    )
    if tangent.is_zero:
        raise ValueError("all tangents are None; give at least one")
    return p, tangent


def _prepare_cotangent(p: Prepared, cotangent: Any) -> Rows:
    out, lse = cotangent if isinstance(cotangent, tuple | list) and len(cotangent) == 2 else (cotangent, None)
    dtype = p.x.query.dtype
    for name, w, shape, kind in (("out", out, p.out_shape, dtype), ("lse", lse, p.out_shape[:-1], accumulator(dtype))):
        if w is None:
            continue
        if not isinstance(w, Tensor):
            raise TypeError(f"a cotangent must be a tensor or a pair (of out, of lse); got {type(w).__name__}")
        as_tensor(f"the cotangent of {name}", w)
        if tuple(w.shape) != shape:
            raise ValueError(f"the cotangent of {name} must have its shape, {list(shape)}; got {list(w.shape)}")
        if w.dtype != kind and not autocasts(w.device.type):  # under autocast it may be in the dtype of the inputs
            raise TypeError(f"the cotangent of {name} must have its dtype, {kind}; got {w.dtype}: convert it")
    if out is None and lse is None:
        raise ValueError("both cotangents are None; give at least one")
    rows = p.x.query.shape[:-1]
    return Rows(
        None if out is None else out.to(dtype).reshape(*rows, p.out_shape[-1]),
        None if lse is None else lse.to(accumulator(dtype)).reshape(rows),
    )


def _rows(p: Prepared, rows: Rows | Values) -> tuple[Tensor, Tensor]:
    assert rows.out is not None
    assert rows.lse is not None
    return _reshaped(rows.out, p.out_shape), _reshaped(rows.lse, p.out_shape[:-1])


def _gradients(primals: Primals, grads: Tangent) -> Gradients:
    parts = (*primals, None)[:4]
    return Gradients(*(None if g is None else reduce_gradient(g, t) for g, t in zip(grads, parts, strict=True)))  # type: ignore
