"""Attention modules: a replacement of :class:`torch.nn.MultiheadAttention`, and the Transformer's self-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_backend, sdpa

Rotation = tuple[Tensor, Tensor]


def rotation(length: int, head_dim: int, base: float, like: Tensor) -> Rotation:
    """Return the cosines and sines of rotary position embedding for positions ``0 … length - 1``.

    Angles are computed in float32 (float64 for a float64 model), because bfloat16 cannot represent all positions above
    256.

    Args:
        length: Number of positions.
        head_dim: Size of a head, even.
        base: Base of the frequencies.
        like: A tensor of the dtype and device that the result shall have.

    Returns:
        Cosines and sines, ``[length, head_dim/2]`` each.

    Source:
        Su et al. 2021 (arXiv 2104.09864), eq. 34, with dimension i paired to i + head_dim/2.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    powers = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    angles = torch.arange(length, device=like.device, dtype=dtype)[:, None] * base**-powers
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair of dimensions ``(i, i + head_dim/2)`` of ``x`` ``[..., length, head_dim]`` by its angle."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class SelfAttention(nn.Module):
    """Self-attention of a Transformer block, with grouped queries, rotary positions, a causal mask or a window.

    Args:
        dim: Size of a token.
        heads: Number of query heads, a divisor of ``dim``.
        kv_heads: Number of key and value heads, a divisor of ``heads``.
        causal: Let a token see only itself and the tokens before it.
        window: Number of tokens to the left and right that a token sees, as in :func:`metaattn.sdpa`.
        dropout: Probability of dropping an attention weight in training.
        bias: Give the linear layers biases.
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.
        attention: Function that computes attention, called like :func:`metaattn.sdpa`.
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

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return the attention among tokens.

        Args:
            x: Tokens, ``[..., length, dim]``.
            rotation: Cosines and sines of the positions, :func:`rotation`; ``None`` for no rotation.

        Returns:
            ``[..., length, dim]``.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), -3)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
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
    """Multi-head attention that is differentiable to any order in any mode.

    It takes the place of :class:`torch.nn.MultiheadAttention`, of which it is a subclass. Arguments, parameters and
    ``state_dict`` are the same, so that weights load in both directions. It differs from PyTorch's module in two ways:

    1. The attention weights that ``need_weights=True`` returns are those before dropout.
    2. They are computed in a second, dense pass. Call with ``need_weights=False`` for memory linear in the length.

    Args:
        embed_dim: Size of a query token and of an output token; a multiple of ``num_heads``.
        num_heads: Number of heads.
        dropout: Probability of dropping an attention weight in training.
        bias: Give the input and output projections biases.
        add_bias_kv: Append a learned key and value to every sequence.
        add_zero_attn: Append a zero key and value to every sequence.
        kdim: Size of a key token; ``embed_dim`` by default.
        vdim: Size of a value token; ``embed_dim`` by default.
        batch_first: Batches are ``[batch, length, size]``, otherwise ``[length, batch, size]``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.

    Raises:
        ValueError: There is no backend with this name.
        AssertionError: ``embed_dim`` is not a multiple of ``num_heads`` (from PyTorch).

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.

    Example:
        >>> import torch, metaattn
        >>> theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> ours = metaattn.MultiheadAttention(16, 4, batch_first=True)
        >>> _ = ours.load_state_dict(theirs.state_dict())
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(ours(x, x, x)[0], theirs(x, x, x)[0], atol=1e-6)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        if backend is not None:
            check_backend(backend)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
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
        """Return the attention of the queries to the keys, like :meth:`torch.nn.MultiheadAttention.forward`.

        ``N`` is the batch size, ``L`` the number of queries, ``S`` the number of keys.

        Args:
            query: ``[N, L, embed_dim]`` with ``batch_first``, otherwise ``[L, N, embed_dim]``; or ``[L, embed_dim]``.
            key: ``[N, S, kdim]`` with ``batch_first``, otherwise ``[S, N, kdim]``; or ``[S, kdim]``.
            value: ``[N, S, vdim]`` with ``batch_first``, otherwise ``[S, N, vdim]``; or ``[S, vdim]``.
            key_padding_mask: ``[N, S]`` or ``[S]``. Boolean: True hides the key. Otherwise added to the scores.
            need_weights: Return the attention weights too, which are dense.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``. Boolean: True hides the key from the query. Otherwise
                added to the scores.
            average_attn_weights: Average the returned weights over the heads.
            is_causal: A statement that ``attn_mask`` is the causal mask, which must be passed nevertheless.

        Returns:
            The output, of the query's shape, and the weights or ``None``. The weights are ``[N, L, S]``, or
            ``[N, num_heads, L, S]`` with ``average_attn_weights=False``; without the first dimension if the query has
            none.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``; nested tensors; inputs or masks of a wrong shape.

        Example:
            >>> import torch, metaattn
            >>> attention = metaattn.MultiheadAttention(16, 4, batch_first=True)
            >>> query, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
            >>> padding = torch.arange(7) >= torch.tensor([[7], [4]])  # the second sequence has four keys
            >>> out, weights = attention(query, memory, memory, key_padding_mask=padding, average_attn_weights=False)
            >>> out.shape, weights.shape
            (torch.Size([2, 5, 16]), torch.Size([2, 4, 5, 7]))
        """
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True states that attn_mask is the causal mask, which must be passed too; got attn_mask=None"
            )
        if any(t.is_nested for t in (query, key, value)):
            raise ValueError(
                "query, key and value must be dense tensors; got a nested one. Pad it and pass key_padding_mask"
            )
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
            raise ValueError(
                f"query, key and value must each have 2 dimensions, or 3 for a batch of sequences; got {shapes}"
            )
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), x in zip(sizes.items(), (query, key, value), strict=True):
            if x.shape[-1] != size:
                raise ValueError(f"{name} must have size {size} in its last dimension; got {list(x.shape)}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            layout = "[N, length, size]" if self.batch_first else "[length, N, size]"
            raise ValueError(
                f"key and value must have the same length, and all three the same batch size, as {layout}; got {shapes}"
            )

    def _project(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value by head, ``[N, heads, length, embed_dim/heads]``, with the extra keys if any."""
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
        """Combine both masks into one for :func:`metaattn.sdpa`.

        It is boolean (True takes part) if both masks are boolean, otherwise additive.
        """
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
        # The extra keys are never hidden: their entries of the additive mask are zero.
        additive = [_additive(m, q.dtype) for m in masks]
        return F.pad(sum(additive[1:], additive[0]), (0, extra))

    @staticmethod
    def _weights(q: Tensor, k: Tensor, mask: Tensor | None, lse: Tensor, average: bool) -> Tensor:
        """Return the attention weights, ``exp(scores - lse)``; a row that sees no key is zero."""
        scores = (q.to(lse.dtype) @ k.to(lse.dtype).mT) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + (_additive(~mask, lse.dtype) if mask.dtype == torch.bool else mask)
        lse = lse.unsqueeze(-1)
        weights = torch.exp(scores - lse.masked_fill(torch.isinf(lse), 0.0))
        return (weights.mean(1) if average else weights).to(q.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to the scores; True in a boolean mask hides a key."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
