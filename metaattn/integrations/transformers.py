"""Hugging Face Transformers on :func:`metaattn.sdpa`: ``attn_implementation="metaattn"``.

Two functions are registered under that name, because Transformers takes a model's attention apart in two. The *mask
function* says once per forward pass who sees whom (padding, causality, windows, chunks, packed sequences, a cache); an
implementation without one gets no mask at all, silently. The *attention function* then computes each layer's attention.

Masks are boolean, ``[batch, 1, queries, keys]``, made by Transformers' own ``sdpa_mask``; plain causal and plain
bidirectional attention need none. A sliding window is a mask as well, which models may slice, copy or ignore like any
other, and on the diagonal (queries and keys of the same tokens, as in training) it carries its limits with it: the
attention function hands those to the operator, which skips the blocks outside. With a cache only the mask is used,
whose rows Transformers aligns to the tokens already seen; the operator's own window is aligned to the top left.
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
_WINDOW = "_metaattn_window"  # where a mask carries its own; a copy or a slice has none, and is only a mask

# What changes the weights of attention and is not served, by the keyword under which a model passes it.
_UNSERVED = {
    "softcap": "caps its scores (softcap), which fused attention cannot do",
    "head_mask": "masks whole heads (head_mask)",
    "indices": "attends to chosen keys only (indices)",
    "block_indices": "attends to chosen blocks of keys only (block_indices)",
    "sinks": "has a sink for each query (sinks)",
    "cache": "reads a paged cache (continuous batching)",
}


class _Window(NamedTuple):
    """What a mask knows of itself: it shows no key outside ``limits``, and if ``whole`` every key inside."""

    limits: tuple[int, int]
    whole: bool


def register() -> None:
    """Make ``attn_implementation="metaattn"`` known to Transformers, for every model that uses its attention interface.

    Call it once, before the model is made; a second call changes nothing. A model that exists already takes it by
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
    """One layer's attention, as Transformers calls it.

    Args:
        module: The layer: its ``training``, and its ``is_causal`` where the call says nothing (True by default).
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``; fewer heads than the query's are grouped, not repeated.
        value: ``[batch, kv_heads, keys, value_dim]``.
        attention_mask: Broadcastable to ``[batch, heads, queries, keys]``, boolean (True takes part) or additive.
            Without one a causal layer sees ``keys <= queries``, from the top left; a single query sees all.
        dropout: Probability with which a weight is dropped, in training only.
        scaling: Factor on the scores; ``1/sqrt(head_dim)`` by default.
        is_causal: In place of the module's.
        position_bias: Added to the scores (T5), differentiable; as broadcastable as the mask.
        s_aux: ``[heads]``, attention sinks: the score of a key without a value (GPT-OSS), differentiable.
        **kwargs: What else the model says. What would change the weights is refused.

    Returns:
        ``[batch, queries, heads, value_dim]``, and ``None`` in place of the weights.

    Raises:
        NotImplementedError: A part of attention that is not served: its name and what to do.
        TypeError: As :func:`metaattn.sdpa`.
        ValueError: As :func:`metaattn.sdpa`; ``output_attentions=True``.

    Source:
        Sinks: Xiao et al. 2024 (arXiv 2309.17453); as one more key, ``o exp(lse) / (exp(lse) + exp(s_aux))``.
    """
    _check(module, query, key, attention_mask, scaling, kwargs)
    window: tuple[int | None, int | None] | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[-2] > 1:
            window = (None, 0)
    elif (known := getattr(attention_mask, _WINDOW, None)) is not None:
        window = known.limits
        attention_mask = None if known.whole else attention_mask
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
    """The mask of a forward pass, as Transformers asks for it: ``sdpa_mask``'s, and a window that says so.

    Args:
        kv_length: Number of keys.
        q_length: Number of queries; by ``cache_position`` in the first releases of version 5.
        kv_offset: Position of the first key.
        attention_mask: ``[batch, positions]``, boolean: False is padding.
        local_size: Size of a window or of a chunk.
        allow_is_causal_skip: Whether plain causal attention may go without a mask.
        allow_is_bidirectional_skip: Whether attention to all keys may.
        config: The model's.
        **kwargs: The rest of what ``sdpa_mask`` takes.

    Returns:
        ``[batch, 1, queries, keys]``, boolean: True takes part; or ``None``, where the layer's ``is_causal`` says all.

    Raises:
        NotImplementedError: The model computes its attention by itself, where this mask would be taken for another.
    """
    from transformers.masking_utils import sdpa_mask

    if config is not None:
        _check_model(type(config))
    causal, bidirectional = allow_is_causal_skip, allow_is_bidirectional_skip
    mapped = attention_mask is not None and any(batched for _, batched in wrapper_levels(attention_mask))
    if mapped:
        # To go without a mask, one must look at its values, which differ from task to task.
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    lengths = {"kv_length": kv_length, "kv_offset": kv_offset}
    if q_length is not None:
        lengths["q_length"] = q_length
    else:
        q_length = kwargs["cache_position"].shape[0]
    made = sdpa_mask(
        **lengths,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        config=config,
        **kwargs,
    )
    # A mask that may not be left out has more in it than the pattern and the padding: a cache, images, packing.
    if made is None or local_size is None or not (causal or bidirectional) or not _is_window(config, local_size):
        return made
    if kv_offset == 0 and kv_length == q_length:
        limits = (local_size - 1, 0) if causal else (local_size, local_size)
        setattr(made, _WINDOW, _Window(limits, not mapped and _shows_all(attention_mask, kv_length)))
    return made


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise for what a model asks of its attention beyond what is served; see :func:`attention`."""
    name = type(module).__name__
    if kwargs.get("output_attentions") or _collects_weights():
        raise ValueError(
            f"attn_implementation={NAME!r} has no attention weights to return, but output_attentions=True asks for "
            "them; drop it, or load the model with attn_implementation='eager'"
        )
    for word, what in _UNSERVED.items():
        if kwargs.get(word) is not None:
            raise NotImplementedError(f"{name} {what}; load the model with attn_implementation='eager'")
    if scaling is None and (
        getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True)
    ):
        # GPT-2 before it passed `scaling`.
        raise NotImplementedError(
            f"{name} scales its scores by a rule that it tells eager attention only; load the model with "
            "attn_implementation='eager', or take a newer Transformers"
        )
    packing = kwargs.get("cu_seq_lens_q")
    if packing is not None and len(packing) > 2 and attention_mask is None:
        raise NotImplementedError(
            f"{name} got sequences packed by cu_seq_lens_q, which only flash attention reads; pass position_ids that "
            "start at 0 with each sequence, and neither attention_mask nor a cache"
        )
    scores = (*query.shape[:-1], key.shape[-2])
    for word, thing in kwargs.items():
        if _may_be_scores(thing, scores):
            raise NotImplementedError(
                f"{name} passes {word}, of shape {list(thing.shape)}, to its attention, which may be a part of the "
                "scores that is not known here; load the model with attn_implementation='eager'"
            )


def _collects_weights() -> bool:
    """Whether the model at work gathers attention weights by hooks, for which its layers do not ask."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in collector.get() or ())


def _may_be_scores(thing: Any, scores: tuple[int, ...]) -> bool:
    """Whether an argument could be meant for the scores ``[batch, heads, queries, keys]``, or one for each head."""
    if not isinstance(thing, Tensor) or not thing.is_floating_point():
        return False
    if thing.dim() == 1:
        return len(thing) == scores[1]
    return thing.dim() == 4 and all(a in (1, b) for a, b in zip(thing.shape, scores, strict=True))


def _with_bias(attention_mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask of a mask and a bias of positions."""
    if bias is None or attention_mask is None:
        return attention_mask if bias is None else bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, float("-inf"))
    return bias + attention_mask


def _check_model(config: type) -> None:
    """Raise for a model whose file has attention of its own and does not know of Transformers' interface."""
    path = config.__module__.replace("configuration_", "modeling_")
    file = vars(sys.modules[path]) if path in sys.modules else {}
    own = [n for n, c in file.items() if isinstance(c, type) and issubclass(c, nn.Module) and "Attention" in n]
    if own and "ALL_ATTENTION_FUNCTIONS" not in file:
        raise NotImplementedError(
            f"the model of {config.__name__} computes its attention by itself ({', '.join(sorted(own))}), not by "
            "Transformers' attention interface; load it with attn_implementation='eager'"
        )


def _is_window(config: Any, local_size: int) -> bool:
    """Whether a local mask is a sliding window; of a chunk (Llama 4) nothing else tells it."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return local_size == window != chunk


def _shows_all(attention_mask: Tensor | None, kv_length: int) -> bool:
    """Whether no key is padding; False where that cannot be read."""
    from transformers.utils.import_utils import is_tracing

    if attention_mask is None:
        return True
    if is_tracing(attention_mask) or attention_mask.shape[-1] < kv_length:
        return False
    return bool(attention_mask.all())
