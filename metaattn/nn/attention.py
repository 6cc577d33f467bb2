"""Attention modules: the Transformer's own, and one in place of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_backend, sdpa

Rotation = tuple[Tensor, Tensor]


def rotation(length: int, head_dim: int, base: float, like: Tensor) -> Rotation:
    """Cosines and sines of rotary position embedding for positions ``0 … length - 1``, each ``[length, head_dim/2]``.

    Angles are computed in float32 (float64 for a float64 model): bfloat16 cannot tell positions above 256 apart.

    Source:
        Su et al. 2021 (arXiv 2104.09864), eq. 34, with dimension i paired to i + head_dim/2.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    powers = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    angles = torch.arange(length, device=like.device, dtype=dtype)[:, None] * base**-powers
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate each pair of dimensions of ``x`` ``[…, length, head_dim]`` by its position's angle."""
    cos, sin = by
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class SelfAttention(nn.Module):
    """Self-attention of a Transformer block: grouped-query, rotary, causal or windowed as asked.

    Args:
        dim: Size of the tokens.
        heads: Number of query heads.
        kv_heads: Number of key and value heads, a divisor of ``heads``.
        causal: Whether a token sees only itself and those before it.
        window: How far a token sees, as in :func:`metaattn.sdpa`.
        dropout: Probability with which an attention weight is dropped in training.
        bias: Whether the linear layers have biases.
        backend: As in :func:`metaattn.sdpa`.
        attention: What computes it, called as :func:`metaattn.sdpa`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        dropout: float,
        bias: bool,
        backend: str | None,
        attention: Callable[..., Tensor] = sdpa,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.causal, self.window, self.dropout, self.backend = causal, window, dropout, backend
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, by: Rotation | None = None) -> Tensor:
        """Attend among the tokens ``[…, N, dim]``, rotated ``by`` their positions."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), -3)
        if by is not None:
            query, key = rotate(query, by), rotate(key, by)
        out = self.attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            enable_gqa=self.kv_heads != self.heads,
            window=self.window,
            backend=self.backend,
        )
        return self.out(out.transpose(-3, -2).flatten(-2))


class MultiheadAttention(nn.MultiheadAttention):
    r"""In place of :class:`torch.nn.MultiheadAttention`, and differentiable to any order in any mode.

    Arguments, parameters and ``state_dict`` are those of PyTorch's module, of which this is a subclass:
    weights load across, both ways. Two things differ. The weights that ``need_weights=True`` returns are
    those before dropout. And ``forward`` computes them in a second, dense pass: leave it False for memory
    linear in length.

    Args:
        *args: As for :class:`torch.nn.MultiheadAttention`.
        backend: As in :func:`metaattn.sdpa`.
        **kwargs: As for :class:`torch.nn.MultiheadAttention`.

    Raises:
        ValueError: No backend has this name.

    Example:
        >>> import torch, metaattn
        >>> theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> ours = metaattn.MultiheadAttention(16, 4, batch_first=True)
        >>> _ = ours.load_state_dict(theirs.state_dict())
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(ours(x, x, x)[0], theirs(x, x, x)[0], atol=1e-6)
        True
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        if backend is not None:
            check_backend(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as :meth:`torch.nn.MultiheadAttention.forward` does.

        Args:
            query: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; or ``[L, E]``.
            key: ``[N, S, kdim]``, ``[S, N, kdim]`` or ``[S, kdim]``.
            value: ``[N, S, vdim]``, ``[S, N, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[N, S]`` or ``[S]``. Boolean: True is left out. Otherwise added to the scores.
            need_weights: Whether to return the attention weights too (dense).
            attn_mask: ``[L, S]`` or ``[N * heads, L, S]``. Boolean: True is left out. Otherwise added.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal: Says that ``attn_mask`` is the causal mask, which must be given all the same.

        Returns:
            The output, in the query's layout, and the weights, ``[N, L, S]`` or ``[N, heads, L, S]``, or ``None``.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``; nested tensors; inputs or masks of a wrong shape.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal, and needs it; got attn_mask=None")
        if any(t.is_nested for t in (query, key, value)):
            raise ValueError("nested tensors are not served; pad them and pass key_padding_mask")
        self._check_shapes(query, key, value)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(key_padding_mask, attn_mask, q, k)
        p = self.dropout if self.training else 0.0
        out, lse = sdpa(q, k, v, mask, p, return_lse=True, backend=self.backend)
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        weights = self._weights(q, k, mask, lse, average_attn_weights) if need_weights else None
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        shapes = f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"query, key and value must have 2 dimensions each, or 3 with a batch; got {shapes}")
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), x in zip(sizes.items(), (query, key, value), strict=True):
            if x.shape[-1] != size:
                raise ValueError(f"{name} must have the size {size} in its last dimension; got {list(x.shape)}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            layout = "[N, length, size]" if self.batch_first else "[length, N, size]"
            raise ValueError(
                f"key and value must have one length, and all three one batch size, of {layout}; got {shapes}"
            )

    def _project(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value with heads, ``[N, heads, ·, E/heads]``, and the extra keys if there are any."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((t, b.expand(t.shape[0], 1, -1)), 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def _mask(self, padding: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one of :func:`metaattn.sdpa`: boolean (True takes part) if both are, else additive."""
        n, heads, length, keys = q.shape[0], self.num_heads, q.shape[2], k.shape[2]
        extra = (self.bias_k is not None) + self.add_zero_attn
        if padding is not None:
            if padding.shape != (n, keys - extra):
                raise ValueError(f"key_padding_mask must be {[n, keys - extra]}; got {list(padding.shape)}")
            padding = padding[:, None, None, :]
        if attn_mask is not None:
            shapes = ((length, keys - extra), (n * heads, length, keys - extra))
            if attn_mask.shape not in shapes:
                raise ValueError(
                    f"attn_mask must be {list(shapes[0])} or {list(shapes[1])}; got {list(attn_mask.shape)}"
                )
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (n, heads))
        masks = [m for m in (padding, attn_mask) if m is not None]
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~F.pad(hidden, (0, extra), value=False)
        # Attention over keys that nothing hides takes the extra ones too.
        additive = [_additive(m, q.dtype) for m in masks]
        return F.pad(sum(additive[1:], additive[0]), (0, extra))

    @staticmethod
    def _weights(q: Tensor, k: Tensor, mask: Tensor | None, lse: Tensor, average: bool) -> Tensor:
        """The attention weights, ``exp(scores - lse)``; zeros in a row without keys."""
        scores = (q.to(lse.dtype) @ k.to(lse.dtype).mT) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + (_additive(~mask, lse.dtype) if mask.dtype == torch.bool else mask)
        lse = lse.unsqueeze(-1)
        weights = torch.exp(scores - lse.masked_fill(torch.isinf(lse), 0.0))
        return (weights.mean(1) if average else weights).to(q.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores; of a boolean one, True is left out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
