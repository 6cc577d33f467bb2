"""Layers of Transformers' models whose derivatives PyTorch has wrong or refuses, replaced in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..autodiff import in_transform
from ..nn.norm import LayerNorm
from ..ops import checkpoint

MISSING = (
    "Transformers 5 is needed; in a clone of the repository: "
    'pip install -r requirements.txt -c requirements-integrations.txt -e ".[transformers]"'
)


def replace_layer_norms(model: nn.Module) -> nn.Module:
    """Give every ``torch.nn.LayerNorm`` of a model the rule written out, in place; parameters and names stay.

    For models with layer norms (BERT, ViT, GPT-2, …; Llama's kind have RMS norms of their own) wherever a derivative
    is more than a Hessian product of one input: PyTorch's ``layer_norm`` is silently wrong in meta-gradients under
    :func:`torch.func.vmap`, in ``grad`` of ``jvp``, ``jvp`` of ``jvp`` and at third order.

    Returns:
        The model itself.

    Example:
        >>> import torch
        >>> from metaattn.integrations.transformers import replace_layer_norms
        >>> type(replace_layer_norms(torch.nn.Sequential(torch.nn.LayerNorm(4)))[0]).__module__
        'metaattn.nn.norm'
    """
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
    return model


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """Let the derivatives of every layer compute its activations anew, in place; parameters and names stay.

    In place of ``model.gradient_checkpointing_enable()``, which :mod:`torch.func` refuses: by
    :func:`metaattn.meta.checkpoint`, under every transform and to every order. Masks lose their windows on the way, so
    that sliding-window layers visit all blocks.

    Returns:
        The model itself.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: No layer of the model is one of Transformers' ``GradientCheckpointingLayer``. When the model is
            called: it fills a cache while a derivative can be asked for, which would be filled twice.

    Example:
        >>> from metaattn.integrations.transformers import checkpoint_layers
        >>> from transformers import AutoModel, LlamaConfig
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = checkpoint_layers(AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes)))
    """
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError as error:
        raise ImportError(MISSING) from error

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer of the kind that Transformers can checkpoint; wrap its layers in "
            "metaattn.meta.checkpoint by hand"
        )
    kinds = {kind: _checkpointed(kind) for kind in map(type, layers) if not hasattr(kind, "checkpointed")}
    for layer in layers:
        layer.__class__ = kinds.get(type(layer), type(layer))
    return model


class _Forward(nn.Module):
    """A layer with another forward: a module, so that ``checkpoint`` sees the layer's parameters."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.apply_to = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply_to(self.layer, *args, **kwargs)


def _checkpointed(kind: Any) -> type:
    """A class of layers whose forward is checkpointed: unlike a forward set on a layer, it is right in its copies."""
    from transformers import Cache

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (torch.is_grad_enabled() or in_transform()) and any(isinstance(a, Cache) for a in (*args, *kwargs.values())):
            raise ValueError(
                f"{kind.__name__} is checkpointed and would fill its cache again in each derivative; pass "
                "use_cache=False, or call the model under torch.no_grad()"
            )
        return checkpoint(_Forward(self, kind.forward))(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "checkpointed": True, "__doc__": kind.__doc__})
