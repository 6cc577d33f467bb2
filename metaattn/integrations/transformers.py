"""Hugging Face Transformers on :func:`metaattn.sdpa`: ``attn_implementation="metaattn"``.

Two functions are registered under that name, because Transformers splits attention into two steps. The *mask function*
runs once per forward pass and determines which keys a query sees (padding, causality, windows, chunks, packed
sequences, a cache). An implementation without a mask function silently gets no mask at all. The *attention function*
then computes the attention of each layer.

Masks are boolean, ``[batch, 1, queries, keys]``, and made by ``sdpa_mask`` of Transformers; plain causal and plain
bidirectional attention need none. A sliding window is a mask too, which models may slice, copy or ignore like any
other. Where queries and keys are the same tokens, as in training, the mask also carries the limits of its window as an
attribute. The attention function passes those to the operator, which skips the blocks outside. With a cache, only the
mask is used: Transformers aligns its rows to the tokens already seen, but the operator's window starts at the top left.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autodiff import wrapper_levels
from ..ops import sdpa
from ._transformers_layers import MISSING, checkpoint_layers, replace_layer_norms

__all__ = ["attention", "checkpoint_layers", "mask", "register", "replace_layer_norms"]

NAME = "metaattn"
_WINDOW = "_metaattn_window"  # attribute of a mask with its window; a copy or a slice of the mask does not have it

# Unsupported parts of attention that change its weights, by the keyword under which a model passes them.
_UNSUPPORTED = {
    "softcap": "caps its scores (softcap), which fused attention cannot do",
    "head_mask": "masks whole heads (head_mask)",
    "indices": "attends to selected keys only (indices)",
    "block_indices": "attends to selected blocks of keys only (block_indices)",
    "sinks": "has a sink for each query (sinks)",
    "cache": "reads a paged cache (continuous batching)",
}


class _Window(NamedTuple):
    """Window of a mask: keys outside ``limits`` are hidden and, if ``exact``, all keys inside are visible.

    It holds for the mask as it was made, at the version of its contents, for as many queries and keys.
    """

    limits: tuple[int, int]
    exact: bool
    version: int

    @classmethod
    def of(cls, mask: Tensor, queries: int, keys: int) -> _Window | None:
        """Return the window of a mask; ``None`` if it has none, or was changed, or has another size."""
        window: _Window | None = getattr(mask, _WINDOW, None)
        if window is None or window.version != mask._version or mask.shape[-2:] != (queries, keys):
            return None
        return window


def register() -> None:
    """Register ``attn_implementation="metaattn"`` for every model that uses the attention interface of Transformers.

    Call it once, before a model is made; a second call changes nothing. An existing model switches by
    ``model.set_attn_implementation("metaattn")``. The backend is that of :class:`metaattn.use_backend`.

    Raises:
        ImportError: Transformers is not installed, or older than version 5.

    Source:
        Transformers' ``AttentionInterface`` and ``AttentionMaskInterface`` (huggingface.co/docs/transformers).

    Example:
        >>> import torch
        >>> from metaattn.integrations.transformers import register
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> register()
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> config = LlamaConfig(vocab_size=32, **sizes)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="metaattn")
        >>> model(torch.arange(6)[None]).logits.shape
        torch.Size([1, 6, 32])
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
    except ImportError as error:
        raise ImportError(MISSING) from error
    if int(__version__.split(".")[0]) < 5:
        raise ImportError(f"{MISSING} (found {__version__})")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer: the attention function that Transformers calls.

    Args:
        module: The layer. Its ``training`` is used, and its ``is_causal`` if the argument is ``None`` (True if it has
            none).
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``; fewer heads than those of the query are grouped, not repeated.
        value: ``[batch, kv_heads, keys, value_dim]``.
        attention_mask: Broadcastable to ``[batch, heads, queries, keys]``, boolean (True takes part) or additive.
            Without a mask, query ``i`` of a causal layer sees the keys ``j <= i``; a single query sees all keys.
        dropout: Probability of dropping an attention weight, in training only.
        scaling: Factor on the scores; ``1/sqrt(head_dim)`` by default.
        is_causal: Replaces that of the module.
        position_bias: Added to the scores (T5), broadcastable like the mask; differentiable.
        s_aux: Attention sinks ``[heads]``: the score of a key without a value (GPT-OSS); differentiable.
        **kwargs: Further arguments of the model. Those that would change the attention weights are rejected.

    Returns:
        The output, ``[batch, queries, heads, value_dim]``, and ``None`` in place of the weights.

    Raises:
        NotImplementedError: The layer uses an unsupported part of attention; the message says which, and what to do.
        TypeError: As :func:`metaattn.sdpa`.
        ValueError: As :func:`metaattn.sdpa`; ``output_attentions=True``.

    Source:
        Sinks: Xiao et al. 2024 (arXiv 2309.17453); as one more key, ``o exp(lse) / (exp(lse) + exp(s_aux))``.

    Example:
        >>> import torch
        >>> from metaattn.integrations.transformers import attention
        >>> query, key, value = torch.randn(2, 8, 5, 16), torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)
        >>> out, weights = attention(torch.nn.Module(), query, key, value, attention_mask=None)
        >>> out.shape, weights
        (torch.Size([2, 5, 8, 16]), None)
    """
    _check(module, query, key, attention_mask, scaling, kwargs)
    window: tuple[int | None, int | None] | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[-2] > 1:
            window = (None, 0)
    elif (carried := _Window.of(attention_mask, query.shape[-2], key.shape[-2])) is not None:
        window = carried.limits
        attention_mask = None if carried.exact else attention_mask
    bias = _with_bias(attention_mask, position_bias)
    out, lse = sdpa(
        query,
        key,
        value,
        bias,
        dropout if module.training else 0.0,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window=window,
        return_lse=True,
    )
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def mask(
    *,
    kv_length: int,
    q_length: int | None = None,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make the mask of a forward pass: the mask function that Transformers calls.

    It is the result of ``sdpa_mask`` of Transformers. A sliding window also carries its limits as an attribute.

    Args:
        kv_length: Number of keys.
        q_length: Number of queries. The first releases of version 5 pass ``cache_position`` instead.
        kv_offset: Position of the first key.
        attention_mask: Padding mask ``[batch, positions]``, boolean: False is padding.
        local_size: Size of a sliding window or of a chunk; ``None`` for neither.
        allow_is_causal_skip: Return ``None`` for plain causal attention.
        allow_is_bidirectional_skip: Return ``None`` for attention to all keys.
        config: The model's config.
        **kwargs: Further arguments of ``sdpa_mask``.

    Returns:
        ``[batch, 1, queries, keys]``, boolean: True takes part; or ``None`` if the layer's ``is_causal`` is enough.

    Raises:
        NotImplementedError: The model computes its attention itself, where this mask would have another meaning.

    Example:
        >>> from metaattn.integrations.transformers import mask
        >>> from transformers import MistralConfig
        >>> options = dict(batch_size=1, mask_function=lambda batch, head, query, key: key <= query)
        >>> mask(q_length=4, kv_length=4, config=MistralConfig(), **options) is None  # causal
        True
    """
    from transformers.masking_utils import sdpa_mask

    if config is not None:
        _check_model(type(config))
    causal, bidirectional = allow_is_causal_skip, allow_is_bidirectional_skip
    under_vmap = attention_mask is not None and any(batched for _, batched in wrapper_levels(attention_mask))
    if under_vmap:
        # Leaving the mask out would depend on its values, which may differ from task to task.
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    lengths = {"kv_length": kv_length, "kv_offset": kv_offset}
    if q_length is not None:
        lengths["q_length"] = q_length
    else:
        q_length = kwargs["cache_position"].shape[0]
    result = sdpa_mask(
        **lengths,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        config=config,
        **kwargs,
    )
    # A mask that must not be left out contains more than pattern and padding: a cache, images or packed sequences.
    if result is None or local_size is None or not (causal or bidirectional) or not _is_window(config, local_size):
        return result
    # In inference mode nothing counts the changes of a tensor: there the mask is only a mask.
    if kv_offset == 0 and kv_length == q_length and not result.is_inference():
        limits = (local_size - 1, 0) if causal else (local_size, local_size)
        exact = not under_vmap and _shows_all(attention_mask, kv_length)
        setattr(result, _WINDOW, _Window(limits, exact, result._version))
    return result


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Reject unsupported parts of attention; see :func:`attention`."""
    name = type(module).__name__
    if kwargs.get("output_attentions") or _collects_weights():
        raise ValueError(
            f"attn_implementation={NAME!r} computes no attention weights, but output_attentions=True requests them; "
            "drop it, or load the model with attn_implementation='eager'"
        )
    for keyword, description in _UNSUPPORTED.items():
        if kwargs.get(keyword) is not None:
            raise NotImplementedError(f"{name} {description}; load the model with attn_implementation='eager'")
    if scaling is None and (
        getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True)
    ):
        # GPT-2 before it passed `scaling`.
        raise NotImplementedError(
            f"{name} scales its scores by a rule that it passes to eager attention only; load the model with "
            "attn_implementation='eager', or install a newer Transformers"
        )
    packing = kwargs.get("cu_seq_lens_q")
    if packing is not None and len(packing) > 2 and attention_mask is None:
        raise NotImplementedError(
            f"{name} got sequences packed by cu_seq_lens_q, which only flash attention reads; pass position_ids that "
            "start at 0 for each sequence, without attention_mask and cache"
        )
    scores = (*query.shape[:-1], key.shape[-2])
    for keyword, value in kwargs.items():
        if _may_be_scores(value, scores):
            raise NotImplementedError(
                f"{name} passes {keyword}, of shape {list(value.shape)}, to its attention, which may be an unsupported "
                "part of the scores; load the model with attn_implementation='eager'"
            )


def _collects_weights() -> bool:
    """Return whether the running model collects attention weights by hooks, without passing that to its layers."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in collector.get() or ())


def _may_be_scores(value: Any, scores: tuple[int, ...]) -> bool:
    """Return whether an argument has the shape of scores ``[batch, heads, queries, keys]``, or a number per head."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.dim() == 1:
        return len(value) == scores[1]
    return value.dim() == 4 and all(a in (1, b) for a, b in zip(value.shape, scores, strict=True))


def _with_bias(attention_mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Combine a mask and a position bias into one mask."""
    if bias is None or attention_mask is None:
        return attention_mask if bias is None else bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, float("-inf"))
    return bias + attention_mask


def _check_model(config: type) -> None:
    """Reject a model whose file defines attention without Transformers' attention interface."""
    path = config.__module__.replace("configuration_", "modeling_")
    file = vars(sys.modules[path]) if path in sys.modules else {}
    own = [n for n, c in file.items() if isinstance(c, type) and issubclass(c, nn.Module) and "Attention" in n]
    if own and "ALL_ATTENTION_FUNCTIONS" not in file:
        raise NotImplementedError(
            f"the model of {config.__name__} computes its attention itself ({', '.join(sorted(own))}), not by "
            "Transformers' attention interface; load it with attn_implementation='eager'"
        )


def _is_window(config: Any, local_size: int) -> bool:
    """Return whether a local mask is a sliding window; only the config distinguishes it from a chunk (Llama 4)."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return local_size == window != chunk


def _shows_all(attention_mask: Tensor | None, kv_length: int) -> bool:
    """Return whether no key is padding; False where the values cannot be read."""
    from transformers.utils.import_utils import is_tracing

    if attention_mask is None:
        return True
    if is_tracing(attention_mask) or attention_mask.shape[-1] < kv_length:
        return False
    return bool(attention_mask.all())
