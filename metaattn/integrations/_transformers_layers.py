"""Replacement, in place, of layers of Transformers' models whose derivatives are wrong or missing in PyTorch.

:mod:`metaattn.integrations.transformers` exports the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..autodiff import in_transform
from ..nn.norm import LayerNorm
from ..ops import checkpoint

MISSING = (
    "metaattn.integrations.transformers needs Transformers 5 or newer; in a clone of the repository: "
    'pip install -r requirements.txt -c requirements-integrations.txt -e ".[transformers]"'
)


def replace_layer_norms(model: nn.Module) -> nn.Module:
    """Turn every ``torch.nn.LayerNorm`` of a model into :class:`metaattn.nn.LayerNorm`, in place.

    Parameters and their names do not change. Use it for models with layer norms (BERT, ViT, GPT-2, …; models like Llama
    have their own RMS norms) wherever a derivative goes beyond a Hessian-vector product with respect to one input.
    There PyTorch's ``layer_norm`` is silently wrong: in meta-gradients under :func:`torch.func.vmap`, in ``grad`` of
    ``jvp``, in ``jvp`` of ``jvp`` and at third order.

    Args:
        model: Any module.

    Returns:
        The same model.

    Source:
        Ba, Kiros and Hinton 2016 (arXiv 1607.06450), eq. 4. The faults: PyTorch's issues 196699, 196700 and 198017.

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
    """Apply :func:`metaattn.meta.checkpoint` to every layer of a model, in place.

    Derivatives then compute a layer's activations again instead of storing them, under every transform and to every
    order. Use it instead of ``model.gradient_checkpointing_enable()``, which raises under :mod:`torch.func`. Parameters
    and their names do not change. Masks lose the attribute with their windows, so that sliding-window layers visit all
    blocks.

    Args:
        model: A model of Transformers.

    Returns:
        The same model.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: The model has no layer of the class ``GradientCheckpointingLayer`` of Transformers. When the model
            is
            called: it fills a cache while derivatives are recorded, which would be filled again by each derivative.

    Source:
        Chen et al. 2016 (arXiv 1604.06174), section 3.

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
            f"the model must have layers of the class GradientCheckpointingLayer; got {type(model).__name__} without "
            "any. Wrap its layers in metaattn.meta.checkpoint instead"
        )
    kinds = {kind: _checkpointed(kind) for kind in map(type, layers) if not hasattr(kind, "checkpointed")}
    for layer in layers:
        layer.__class__ = kinds.get(type(layer), type(layer))
    return model


class _Forward(nn.Module):
    """Module with a layer and another forward for it, so that ``checkpoint`` finds the layer's parameters."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.apply_to = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply_to(self.layer, *args, **kwargs)


def _checkpointed(kind: Any) -> type:
    """Return a subclass of a layer's class with a checkpointed forward.

    A forward that is assigned to a layer would still refer to that layer in copies of it; a class does not.
    """
    from transformers import Cache

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (torch.is_grad_enabled() or in_transform()) and any(isinstance(a, Cache) for a in (*args, *kwargs.values())):
            raise ValueError(
                f"{kind.__name__} is checkpointed and would fill its cache again in each derivative; pass "
                "use_cache=False, or call the model under torch.no_grad()"
            )
        return checkpoint(_Forward(self, kind.forward))(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "checkpointed": True, "__doc__": kind.__doc__})
