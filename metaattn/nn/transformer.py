"""Transformer for meta-learning: a pure function of its parameters under :func:`torch.func.functional_call`."""

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
    """Architecture of a :class:`Transformer`.

    Args:
        input: ``"token"``: integers ``[..., length]``. ``"patch"``: images ``[..., channels, image_size, image_size]``,
            without the channel dimension if ``channels`` is ``None``. ``"continuous"``: vectors ``[..., length,
            in_features]``. ``"features"``: numbers ``[..., in_features]``, each of which becomes ``feature_tokens``
            tokens by separate weights (Gorishniy et al. 2021, arXiv 2106.11959).
        output: ``"sequence"``: the tokens, ``[..., length, dim]``. ``"per_token"``: ``[..., length, out_features]``.
            ``"pooled"``: ``[..., out_features]`` from the mean token, or from the last token if ``causal``.
        out_features: Size of an output; needed for ``"pooled"`` and ``"per_token"``.
        dim: Size of a token.
        depth: Number of blocks.
        heads: Number of query heads, a divisor of ``dim``.
        kv_heads: Number of key and value heads, a divisor of ``heads``; ``None`` for as many as ``heads``.
        mlp_ratio: Width of the hidden layer of a block, as a multiple of ``dim``.
        activation: ``"gelu"`` or ``"swiglu"`` (Shazeer 2020, arXiv 2002.05202).
        norm: ``"layer"`` or ``"rms"`` (Zhang and Sennrich 2019, arXiv 1910.07467), before each half of a block.
        norm_affine: Give the norms weights (and biases, if ``bias``).
        bias: Give linear layers, the embedding and layer norms biases.
        position: Position embedding: ``"rope"`` (rotary), ``"learned"`` or ``"none"``.
        max_length: Number of learned positions; by default the number of patches or feature tokens.
        rope_base: Base of the rotary frequencies.
        causal: Let a token see only itself and the tokens before it.
        window: Number of tokens to the left and right that a token sees, as in :func:`metaattn.sdpa`.
        dropout: Probability, in ``[0, 1)``, of dropping an element of a block's outputs in training.
        attention_dropout: Probability, in ``[0, 1)``, of dropping an attention weight in training.
        vocab_size: Size of the vocabulary; needed for ``input="token"``.
        image_size: Height and width of an image in pixels; needed for ``input="patch"``.
        patch_size: Height and width of a patch in pixels, a divisor of ``image_size``; needed for ``input="patch"``.
        channels: Number of channels of an image; ``None`` for images without that dimension.
        in_features: Size of an input; needed for ``"continuous"`` and ``"features"``.
        feature_tokens: Number of tokens for each number, for ``input="features"``.
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.
        remat: Store only the inputs of each block for derivatives and compute the rest again, as with
            :func:`metaattn.meta.checkpoint`: less memory for one more forward pass.

    Raises:
        ValueError: A value is not one of those allowed, or does not fit another one.
        TypeError: ``window`` is not a pair.

    Example:
        >>> from metaattn import TransformerConfig
        >>> TransformerConfig(input="patch", image_size=28, patch_size=7, position="learned").length
        16
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
            options = get_args(hints[name])
            expected = f"one of {', '.join(map(repr, options))}"
            _require(getattr(self, name) in options, name, getattr(self, name), expected)
        for name in ("dim", "depth", "heads", "channels", "feature_tokens", "max_length"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        fits = 0 < self.mlp_ratio < math.inf and self.hidden >= 1
        _require(
            fits,
            "mlp_ratio",
            self.mlp_ratio,
            f"positive and finite, and large enough for a hidden unit at dim={self.dim}",
        )
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
        for name, option in needed.items():
            value = getattr(self, name)
            _require(value is not None, name, value, f"given for {option}")
            _require(value >= 1, name, value, "at least 1")
        if self.image_size and self.patch_size:
            fits = self.image_size % self.patch_size == 0
            _require(fits, "patch_size", self.patch_size, f"a divisor of image_size, {self.image_size}")
        if self.backend is not None:
            check_backend(self.backend)
        check_window(self.window)
        _require(
            self.position != "learned" or self.length is not None, "max_length", None, "given for position='learned'"
        )

    @property
    def hidden(self) -> int:
        """Width of the hidden layer of a block."""
        return round(self.dim * self.mlp_ratio)

    @property
    def length(self) -> int | None:
        """Number of positions that are learned; ``None`` if the config does not determine it."""
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
    """Pre-norm Transformer on tokens, images, vectors or numbers.

    It changes nothing in place and has no control flow that depends on values. It therefore runs under
    :func:`torch.func.functional_call`, :func:`torch.func.vmap` over its parameters, forward mode and any nesting of
    them, in bfloat16, float32 and float64. The head is initialised to zero.

    Args:
        config: The architecture; by default that of ``changes``.
        attention: Function that computes attention, called like :func:`metaattn.sdpa`; for comparisons.
        **changes: Fields of :class:`TransformerConfig`, which replace those of ``config``.

    Raises:
        ValueError: As :class:`TransformerConfig`.
        TypeError: As :class:`TransformerConfig`; a change names no field.

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
        """Draw new weights: normal with standard deviation ``fan_in^-1/2``, and zero for the head.

        The last weights of a residual branch are also divided by ``sqrt(2 depth)``, because ``2 depth`` branches are
        summed.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                std = 0.1 if name == "positions" else p.shape[-1] ** -0.5
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    std /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(p, std=0.0 if name == "head.weight" else std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch of inputs.

        ``...`` are any leading dimensions, such as ``[shots]`` or ``[tasks, shots]``; they may be absent.

        Args:
            x: For ``config.input``: ``"token"``, integers ``[..., length]``; ``"patch"``, images ``[..., channels,
                image_size, image_size]``, or ``[..., image_size, image_size]`` with ``channels=None``;
                ``"continuous"``, ``[..., length, in_features]``; ``"features"``, ``[..., in_features]``.

        Returns:
            For ``config.output``: ``"sequence"``, ``[..., length, dim]``; ``"per_token"``, ``[..., length,
            out_features]``; ``"pooled"``, ``[..., out_features]``. The length is ``(image_size / patch_size)^2`` for
            images and ``in_features * feature_tokens`` for features.

        Raises:
            ValueError: The input does not have the shape or dtype of the config, or has more tokens than learned
                positions.

        Example:
            >>> import torch, metaattn
            >>> model = metaattn.Transformer(input="token", vocab_size=7, output="per_token", out_features=7)
            >>> model(torch.randint(7, (8, 12))).shape  # eight sequences of twelve tokens
            torch.Size([8, 12, 7])
            >>> params = dict(model.named_parameters())
            >>> stacked = {k: torch.stack([p, p]) for k, p in params.items()}  # two models
            >>> call = lambda params, x: torch.func.functional_call(model, params, (x,))
            >>> torch.func.vmap(call, (0, None))(stacked, torch.randint(7, (8, 12))).shape
            torch.Size([2, 8, 12, 7])
        """
        c = self.config
        h = self.embed(x)
        if h.dim() < 2:
            raise ValueError(f"input={c.input!r} needs a sequence of tokens, [..., length, size]; got {list(x.shape)}")
        length = h.shape[-2]
        if self.positions is not None:
            if length > self.positions.shape[0]:
                raise ValueError(
                    f"a sequence must have at most max_length={self.positions.shape[0]} tokens; got {length}"
                )
            h = h + self.positions[:length]
        angles = rotation(length, c.dim // c.heads, c.rope_base, h) if c.position == "rope" else None
        draws = self.training and (c.dropout > 0 or c.attention_dropout > 0)
        for block in self.blocks:
            h = (checkpoint(block, preserve_rng_state=draws) if c.remat else block)(h, angles)
        h = self.norm(h)
        if c.output == "pooled":
            h = h[..., -1, :] if c.causal else h.mean(-2)
        return self.head(h)


class _Embedding(nn.Module):
    """Embedding of inputs as tokens ``[..., length, dim]``."""

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
                raise ValueError(f"input='token' needs integers; got {x.dtype}")
            return F.embedding(x, self.weight)
        if c.input == "patch":
            return F.linear(self._patches(x), self.weight, self.bias)
        if not x.dim() or x.shape[-1] != c.in_features:
            raise ValueError(
                f"input={c.input!r} needs size in_features={c.in_features} in the last dimension; got {list(x.shape)}"
            )
        if c.input == "continuous":
            return F.linear(x, self.weight, self.bias)
        tokens = x.repeat_interleave(c.feature_tokens, -1).unsqueeze(-1) * self.weight
        return tokens if self.bias is None else tokens + self.bias

    def _patches(self, x: Tensor) -> Tensor:
        """Return the pixels of each patch, ``[..., patches, channels * patch_size^2]``."""
        c = self.config
        assert c.patch_size is not None
        shape = ([] if c.channels is None else [c.channels]) + [c.image_size] * 2
        if list(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"input='patch' needs images [..., {', '.join(map(str, shape))}]; got {list(x.shape)}")
        if c.channels is None:
            x = x.unsqueeze(-3)
        x = x.unflatten(-1, (-1, c.patch_size)).unflatten(-3, (-1, c.patch_size))  # [..., C, rows, p, columns, p]
        x = x.movedim((-4, -2), (-5, -4))  # [..., rows, columns, C, p, p]
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
    """Residual block: attention, then an MLP, each applied to normalised tokens and added to the tokens."""

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

    def forward(self, x: Tensor, angles: Rotation | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), angles))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
