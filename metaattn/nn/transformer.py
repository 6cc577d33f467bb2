"""A Transformer for meta-learning: pure under ``functional_call``, and small enough to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_backend, check_window, checkpoint, sdpa
from .attention import Rotation, SelfAttention, rotation
from .norm import LayerNorm, RMSNorm


@dataclass(frozen=True)
class TransformerConfig:
    """What a :class:`Transformer` is.

    Args:
        input: ``"token"``: integers ``[…, N]``; ``"patch"``: images ``[…, channels, image_size, image_size]``,
            without the dimension of channels if ``channels`` is ``None``; ``"continuous"``: ``[…, N,
            in_features]``; ``"features"``: ``[…, in_features]``, each number made ``feature_tokens`` tokens
            by weights of its own (Gorishniy et al. 2021, arXiv 2106.11959).
        output: ``"sequence"``: the tokens ``[…, N, dim]``; ``"per_token"``: ``[…, N, out_features]``;
            ``"pooled"``: ``[…, out_features]`` of the mean token, or of the last if ``causal``.
        out_features: Size of the output, for ``"pooled"`` and ``"per_token"``.
        dim: Size of the tokens.
        depth: Number of blocks.
        heads: Number of query heads; divides ``dim``.
        kv_heads: Number of key and value heads; divides ``heads``; as many by default.
        mlp_ratio: Width of the hidden layer over ``dim``.
        activation: ``"gelu"`` or ``"swiglu"`` (Shazeer 2020, arXiv 2002.05202).
        norm: ``"layer"`` or ``"rms"`` (Zhang and Sennrich 2019, arXiv 1910.07467), before each part of a block.
        norm_affine: Whether norms have weights (and biases, if ``bias``).
        bias: Whether linear layers, the embedding and layer norms have biases.
        position: ``"rope"``, ``"learned"`` or ``"none"``.
        max_length: Number of learned positions; by default that of the patches or feature tokens.
        rope_base: Base of the rotary frequencies.
        causal: Whether a token sees only itself and those before it.
        window: How far a token sees, as in :func:`metaattn.sdpa`.
        dropout: Probability in training with which a unit of a block's output is dropped.
        attention_dropout: Probability in training with which an attention weight is dropped.
        vocab_size: Number of tokens, for ``input="token"``.
        image_size: Height and width of an image, for ``input="patch"``.
        patch_size: Height and width of a patch; divides ``image_size``.
        channels: Number of channels of an image; ``None`` for images without that dimension.
        in_features: Size of an input, for ``"continuous"`` and ``"features"``.
        feature_tokens: Tokens for each number, for ``input="features"``.
        backend: As in :func:`metaattn.sdpa`.
        remat: Whether derivatives keep the inputs of each block alone, see :func:`metaattn.meta.checkpoint`: less
            memory, one more pass.

    Raises:
        ValueError: A value that is none of those allowed, or that does not go with another.
        TypeError: A window that is no pair.
    """

    input: Literal["token", "patch", "continuous", "features"] = "token"
    output: Literal["sequence", "per_token", "pooled"] = "sequence"
    out_features: int | None = None
    dim: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int | None = None
    mlp_ratio: float = 2.0
    activation: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_affine: bool = True
    bias: bool = True
    position: Literal["rope", "learned", "none"] = "rope"
    max_length: int | None = None
    rope_base: float = 10000.0
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    vocab_size: int | None = None
    image_size: int | None = None
    patch_size: int | None = None
    channels: int | None = None
    in_features: int | None = None
    feature_tokens: int = 1
    backend: str | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("input", "output", "activation", "norm", "position"):
            known = get_args(hints[name])
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(map(repr, known))}")
        for name in ("dim", "depth", "heads", "channels", "feature_tokens", "max_length"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        fits = 0 < self.mlp_ratio < math.inf and self.hidden >= 1
        _require(fits, "mlp_ratio", self.mlp_ratio, f"positive and finite, and with dim={self.dim} give a hidden unit")
        _require(self.dim % self.heads == 0, "heads", self.heads, f"a divisor of dim, {self.dim}")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        _require(
            kv_heads >= 1 and self.heads % kv_heads == 0, "kv_heads", kv_heads, f"a divisor of heads, {self.heads}"
        )
        if self.position == "rope":
            size = self.dim // self.heads
            _require(size % 2 == 0, "dim / heads", size, "even for position='rope'")
        needs = {"token": ["vocab_size"], "patch": ["image_size", "patch_size"]}.get(self.input, ["in_features"])
        needed = dict.fromkeys(needs, f"input={self.input!r}")
        if self.output != "sequence":
            needed["out_features"] = f"output={self.output!r}"
        for name, by in needed.items():
            value = getattr(self, name)
            _require(value is not None, name, value, f"given for {by}")
            _require(value >= 1, name, value, "at least 1")
        if self.image_size and self.patch_size:
            fits = self.image_size % self.patch_size == 0
            _require(fits, "patch_size", self.patch_size, f"a divisor of image_size, {self.image_size}")
        if self.backend is not None:
            check_backend(self.backend)
        check_window(self.window)
        _require(self.position != "learned" or self.length is not None, "max_length", None, "given, to learn positions")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return round(self.dim * self.mlp_ratio)

    @property
    def length(self) -> int | None:
        """How many positions there are to learn, if that is known."""
        if self.max_length is not None:
            return self.max_length
        if self.input == "patch" and self.image_size and self.patch_size:
            return (self.image_size // self.patch_size) ** 2
        if self.input == "features" and self.in_features:
            return self.in_features * self.feature_tokens
        return None


def _require(condition: bool, name: str, value: object, expected: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value!r}")


class Transformer(nn.Module):
    """A stack of pre-norm blocks on tokens, images, vectors or numbers.

    Nothing in it is changed in place and nothing depends on the data: it runs under
    :func:`torch.func.functional_call`, :func:`torch.func.vmap` over its parameters, forward mode and any
    nesting of them, in bfloat16, float32 and float64. The head starts at zero.

    Args:
        config: What it is.
        attention: What computes attention, called as :func:`metaattn.sdpa`: for comparisons.
        **changes: Fields of :class:`TransformerConfig`, in place of a config or to change one.

    Raises:
        ValueError: As :class:`TransformerConfig`.
        TypeError: Likewise; a change of what is no field.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762); pre-norm: Xiong et al. 2020 (arXiv 2002.04745); images:
        Dosovitskiy et al. 2021 (arXiv 2010.11929).

    Example:
        >>> import torch, metaattn
        >>> model = metaattn.Transformer(input="patch", image_size=28, patch_size=7, output="pooled", out_features=5)
        >>> model(torch.randn(3, 28, 28)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        config: TransformerConfig | None = None,
        *,
        attention: Callable[..., Tensor] = sdpa,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.config = c = TransformerConfig(**{**(vars(config) if config else {}), **changes})
        self.embed = _Embedding(c)
        self.positions = nn.Parameter(torch.empty(c.length, c.dim)) if c.position == "learned" and c.length else None
        self.blocks = nn.ModuleList(_Block(c, attention) for _ in range(c.depth))
        self.norm = _norm(c)
        has_head = c.out_features is not None and c.output != "sequence"
        self.head = nn.Linear(c.dim, c.out_features or 0, bias=c.bias) if has_head else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: normal of variance 1/fan_in, what ends in the residual sum divided by sqrt(2 depth)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                std = 0.1 if name == "positions" else p.shape[-1] ** -0.5
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    std /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(p, std=0.0 if name == "head.weight" else std)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to inputs of the kind that ``config.input`` names; any leading dimensions.

        Raises:
            ValueError: Inputs of another shape or dtype than the config says, or longer than its positions.
        """
        c = self.config
        h = self.embed(x)
        if h.dim() < 2:
            raise ValueError(f"input={c.input!r} takes a sequence of tokens; got a tensor {list(x.shape)}")
        length = h.shape[-2]
        if self.positions is not None:
            if length > self.positions.shape[0]:
                raise ValueError(f"at most max_length={self.positions.shape[0]} tokens; got {length}")
            h = h + self.positions[:length]
        by = rotation(length, c.dim // c.heads, c.rope_base, h) if c.position == "rope" else None
        draws = self.training and (c.dropout > 0 or c.attention_dropout > 0)
        for block in self.blocks:
            h = (checkpoint(block, preserve_rng_state=draws) if c.remat else block)(h, by)
        h = self.norm(h)
        if c.output == "pooled":
            h = h[..., -1, :] if c.causal else h.mean(-2)
        return self.head(h)


class _Embedding(nn.Module):
    """From inputs to tokens ``[…, N, dim]``."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.config = c
        shape: tuple[int, ...]
        if c.input == "token":
            shape = (c.vocab_size or 0, c.dim)
        elif c.input == "patch":
            shape = (c.dim, (c.channels or 1) * (c.patch_size or 0) ** 2)
        elif c.input == "continuous":
            shape = (c.dim, c.in_features or 0)
        else:
            shape = ((c.in_features or 0) * c.feature_tokens, c.dim)
        self.weight = nn.Parameter(torch.empty(shape))
        has_bias = c.bias and c.input != "token"
        self.bias = nn.Parameter(torch.empty(shape if c.input == "features" else shape[:1])) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        if c.input == "token":
            if x.is_floating_point():
                raise ValueError(f"input='token' takes integers; got {x.dtype}")
            return F.embedding(x, self.weight)
        if c.input == "patch":
            return F.linear(self._patches(x), self.weight, self.bias)
        if not x.dim() or x.shape[-1] != c.in_features:
            raise ValueError(
                f"input={c.input!r} takes {c.in_features} features in the last dimension; got {list(x.shape)}"
            )
        if c.input == "continuous":
            return F.linear(x, self.weight, self.bias)
        tokens = x.repeat_interleave(c.feature_tokens, -1).unsqueeze(-1) * self.weight
        return tokens if self.bias is None else tokens + self.bias

    def _patches(self, x: Tensor) -> Tensor:
        """Images to rows of pixels, ``[…, patches, channels * patch_size^2]``."""
        c = self.config
        assert c.patch_size is not None
        shape = ([] if c.channels is None else [c.channels]) + [c.image_size] * 2
        if list(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"input='patch' takes images [..., {', '.join(map(str, shape))}]; got {list(x.shape)}")
        if c.channels is None:
            x = x.unsqueeze(-3)
        x = x.unflatten(-1, (-1, c.patch_size)).unflatten(-3, (-1, c.patch_size))  # […, C, rows, p, columns, p]
        x = x.movedim((-4, -2), (-5, -4))  # […, rows, columns, C, p, p]
        return x.flatten(-3).flatten(-3, -2)


def _norm(c: TransformerConfig) -> nn.Module:
    if c.norm == "layer":
        return LayerNorm(c.dim, elementwise_affine=c.norm_affine, bias=c.bias)
    return RMSNorm(c.dim, elementwise_affine=c.norm_affine)


class _Mlp(nn.Module):
    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.gated = c.activation == "swiglu"
        self.up = nn.Linear(c.dim, 2 * c.hidden if self.gated else c.hidden, bias=c.bias)
        self.down = nn.Linear(c.hidden, c.dim, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            x = gate * torch.sigmoid(gate) * x  # F.silu has no forward mode over plain reverse mode
        else:
            x = F.gelu(x)
        return self.down(x)


class _Block(nn.Module):
    """Attention and a perceptron, each on the normed tokens and added to them."""

    def __init__(self, c: TransformerConfig, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention_norm = _norm(c)
        self.attention = SelfAttention(
            c.dim,
            c.heads,
            c.kv_heads or c.heads,
            causal=c.causal,
            window=c.window,
            dropout=c.attention_dropout,
            bias=c.bias,
            backend=c.backend,
            attention=attention,
        )
        self.mlp_norm = _norm(c)
        self.mlp = _Mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, by: Rotation | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), by))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
