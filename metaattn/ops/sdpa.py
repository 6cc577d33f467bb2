"""The operator: scaled dot-product attention, differentiable to any order in any mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from ..backends.base import Rows, Tangent, Values, accumulator
from . import _rules as rules
from ._checks import Prepared, Window, adjoint, prepare, same_form
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
    r"""Scaled dot-product attention, ``softmax(scale * query key^T + attn_mask) value``.

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention` (the first eight parameters
    mean what they mean there) that can be differentiated to any order: in reverse and forward mode,
    nested in any way, under every :mod:`torch.func` transform, by double backward and by
    :mod:`torch.autograd.forward_ad`.

    Args:
        query: ``[..., Hq, Nq, D]``, float16, bfloat16, float32 or float64. Two dimensions or more.
        key: ``[..., Hkv, Nk, D]``. Leading dimensions broadcast against the query's.
        value: ``[..., Hkv, Nk, Dv]``.
        attn_mask: Broadcastable to ``[..., Hq, Nq, Nk]``. Boolean: True takes part. Otherwise added to
            the scores, and differentiable.
        dropout_p: Probability with which an attention weight is dropped, in ``[0, 1)``; the others are
            divided by ``1 - dropout_p``. One call drops the same weights in its output and in all its
            derivatives. Applied whenever it is positive. Random numbers come from PyTorch's default
            generator; under :func:`torch.func.vmap` its ``randomness`` says whether they differ.
        is_causal: Row ``i`` sees keys ``j <= i``, aligned to the top left where ``Nq != Nk``. Excludes
            ``attn_mask``.
        scale: Factor on the scores; ``1/sqrt(D)`` by default.
        enable_gqa: Grouped-query attention: ``Hkv`` may be a divisor of ``Hq``, and query head ``h``
            uses key head ``h // (Hq // Hkv)``.
        window: ``(left, right)``: row ``i`` sees keys ``i - left <= j <= i + right``; ``None`` is no
            limit. Combines with ``is_causal`` and with ``attn_mask``.
        return_lse: Also return the log-sum-exp of each row, differentiable like the output.
        backend: ``"reference"``, ``"blockwise"``, ``"triton"``, ``"vendor"`` or ``"auto"``; by default that of
            :class:`metaattn.use_backend`, else ``"auto"``. One that is asked for serves the call or raises.

    Returns:
        ``[..., Hq, Nq, Dv]`` in the inputs' dtype; with ``return_lse`` also ``[..., Hq, Nq]``, in float32
        (float64 for float64 inputs). A row whose keys are all masked gives output 0, lse ``-inf`` and
        zero derivatives of every order.

    Raises:
        TypeError: A dtype or a type that is not served.
        ValueError: Shapes, devices or values that do not go together; an unknown backend.
        NotImplementedError: The backend asked for cannot serve this call; a call under :func:`torch.jit.trace`.

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
    """Gradients of the primals, or their tangents: each in its primal's shape; ``attn_mask`` if that is additive."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None


class Jvp(NamedTuple):
    """What :func:`sdpa_jvp` returns."""

    out: Tensor
    lse: Tensor
    out_tangent: Tensor
    lse_tangent: Tensor


class Vjp(NamedTuple):
    """What :func:`sdpa_vjp` returns."""

    out: Tensor
    lse: Tensor
    gradients: Gradients


class Hvp(NamedTuple):
    """What :func:`sdpa_hvp` returns."""

    out: Tensor
    lse: Tensor
    out_tangent: Tensor
    lse_tangent: Tensor
    product: Gradients


Primals = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor | None]
Cotangent = Tensor | Sequence[Tensor | None]


def sdpa_jvp(primals: Primals, tangents: Sequence[Tensor | None], **options: Any) -> Jvp:
    """Attention and its directional derivative (Jacobian-vector product, pushforward) in one call.

    A JVP maps a tangent of the inputs to a tangent of the output; it is not a VJP, which maps a cotangent
    of the output to gradients of the inputs. They are adjoint: ``<w, jvp(t)> == <vjp(w), t>``.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``, as for :func:`sdpa`.
        tangents: One for each primal, of its shape and dtype; ``None`` is zero.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out``, ``lse`` and their tangents; all differentiable.

    Raises:
        TypeError: As :func:`sdpa`; primals in one tensor; a tangent that is no tensor, or of another dtype than its
            primal; an option that is none of the above.
        ValueError: As :func:`sdpa`; not as many tangents as primals; a tangent of another shape than its primal, or
            of a mask that is boolean or absent; no tangent at all.
        NotImplementedError: As :func:`sdpa`.

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
    """Attention and the gradients of ``<cotangent, output>`` (vector-Jacobian product, pullback) in one call.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``, as for :func:`sdpa`.
        cotangent: Of the output, ``[..., Hq, Nq, Dv]``; or a pair of it and one of the lse,
            ``[..., Hq, Nq]``, either of which may be ``None`` (zero). Each in the dtype of what it is of.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out``, ``lse`` and the gradients of the primals; all differentiable.

    Raises:
        TypeError: As :func:`sdpa`; primals in one tensor; a cotangent that is neither a tensor nor a pair, or of
            another dtype than the output or the lse; an option that is none of the above.
        ValueError: As :func:`sdpa`; a cotangent of another shape than the output or the lse; no cotangent at all.
        NotImplementedError: As :func:`sdpa`.

    Example:
        >>> import torch, metaattn
        >>> q, k, v, w = (torch.randn(2, 4, 16, 8) for _ in range(4))
        >>> metaattn.sdpa_vjp((q, k, v), w).gradients.key.shape
        torch.Size([2, 4, 16, 8])
    """
    p = _prepare(primals, options)
    w = _prepare_cotangent(p, cotangent)
    values = rules.forward(p.call, p.x)
    grads = rules.gradient(p.call, p.x, values, w, bias_grad=p.x.bias is not None)
    return Vjp(*_rows(p, values), _gradients(primals, grads))


def sdpa_hvp(primals: Primals, tangents: Sequence[Tensor | None], cotangent: Cotangent, **options: Any) -> Hvp:
    """The Hessian of ``<cotangent, output>`` with respect to the primals, times ``tangents``.

    That is the derivative of the gradients that :func:`sdpa_vjp` gives along ``tangents``, at a fixed cotangent.

    Args:
        primals: ``(query, key, value)`` or ``(query, key, value, attn_mask)``, as for :func:`sdpa`.
        tangents: One for each primal, of its shape and dtype; ``None`` is zero.
        cotangent: As for :func:`sdpa_vjp`.
        **options: ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``window``, ``backend`` of :func:`sdpa`.

    Returns:
        ``out``, ``lse``, their tangents (a by-product) and the Hessian-vector product; all differentiable.

    Raises:
        TypeError: As :func:`sdpa_jvp` and :func:`sdpa_vjp`.
        ValueError: Likewise.
        NotImplementedError: Likewise.

    Source:
        Pearlmutter 1994, Fast exact multiplication by the Hessian; the formulas: ``docs/mathematics.md``.

    Example:
        >>> import torch, metaattn
        >>> q, k, v, t, w = (torch.randn(2, 4, 16, 8) for _ in range(5))
        >>> metaattn.sdpa_hvp((q, k, v), (t, t, t), w).product.query.shape
        torch.Size([2, 4, 16, 8])
    """
    p, tangent = _prepare_tangents(primals, tangents, options)
    w = _prepare_cotangent(p, cotangent)
    values, rows = rules.forward_with_jvp(p.call, p.x, tangent)
    product = rules.gradient(p.call, p.x, values, w, [tangent], values_tangent=rows, bias_grad=p.x.bias is not None)
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
    if len(tangents) != len(primals):
        raise ValueError(f"expected one tangent for each of the {len(primals)} primals; got {len(tangents)}")
    names = ("query", "key", "value", "attn_mask")
    targets = (p.x.query, p.x.key, p.x.value, p.x.bias)
    tangent = Tangent(*(same_form(n, t, d, x) for n, t, d, x in zip(names, primals, tangents, targets, strict=False)))
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
    return Gradients(*(None if g is None else adjoint(g, t) for g, t in zip(grads, parts, strict=True)))  # type: ignore
