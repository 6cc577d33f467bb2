"""Models of `diffusers <https://github.com/huggingface/diffusers>`_ with derivatives of any order and mode.

Consistency models and MeanFlow take the derivative of a network along its sample and its time (a jvp), and train
through it. PyTorch's attention has no such derivative, and the gradient of that of its layer norm is silently wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..ops import checkpoint as checkpoint_function
from .torch_norms import replace_norms
from .torch_sdpa import replace_sdpa


@contextlib.contextmanager
def differentiable(model: nn.Module, *, backend: str | None = None) -> Iterator[None]:
    """Give a model of diffusers every derivative, in this block and this thread.

    The block checks the settings of the model, and combines :class:`metaattn.replace_sdpa` and
    :func:`metaattn.integrations.torch_norms.replace_norms`: PyTorch's attention, called through diffusers' backend
    ``native`` or by a model's own processor, runs as :func:`metaattn.sdpa`, and norms as their formulas. A backward
    pass may come after the block.

    Args:
        model: A model of diffusers; its settings are checked and not changed.
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.

    Returns:
        A context manager.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: The model does not use PyTorch's attention; its activation checkpointing does not work under
            :mod:`torch.func`; there is no backend with this name.

    Source:
        Song et al. 2023 (arXiv 2303.01469), section 5: consistency training; Geng et al. 2025 (arXiv 2505.13447),
        algorithm 1: MeanFlow.

    Example:
        >>> import torch, diffusers
        >>> from metaattn.integrations.diffusers import differentiable
        >>> model = diffusers.DiTTransformer2DModel(
        ...     num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=1, sample_size=4
        ... )
        >>> x, t, label = torch.randn(3, 2, 4, 4), torch.rand(3), torch.zeros(3, dtype=torch.long)
        >>> network = lambda x, t: model(x, timestep=t, class_labels=label).sample
        >>> with differentiable(model):
        ...     u, du = torch.func.jvp(network, (x, t), (x, torch.ones(3)))
        >>> u.shape == du.shape == x.shape
        True
    """
    try:
        from diffusers import attention_backend
    except ImportError as error:
        raise ImportError(
            "metaattn.integrations.diffusers needs diffusers; in a clone of the repository: "
            'pip install -r requirements.txt -c requirements-integrations.txt -e ".[diffusers]"'
        ) from error
    _check(model)
    with attention_backend("native"), replace_sdpa(backend=backend), replace_norms():
        yield


def checkpoint(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module such that derivatives store its arguments only, for diffusers' ``enable_gradient_checkpointing``.

    PyTorch's activation checkpointing, which diffusers uses by default, raises under :mod:`torch.func`; this function
    has every derivative.

    Args:
        module: A block of a model.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        The module's result.

    Raises:
        ValueError: As :func:`metaattn.meta.checkpoint`.

    Source:
        Chen et al. 2016 (arXiv 1604.06174), section 3.

    Example:
        >>> import diffusers
        >>> from metaattn.integrations.diffusers import checkpoint
        >>> model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1)
        >>> model.enable_gradient_checkpointing(checkpoint)
    """
    return checkpoint_function(module)(*args, **kwargs)


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        chosen = getattr(processor, "_attention_backend", None)
        if chosen is not None and getattr(chosen, "value", chosen) != "native":
            raise ValueError(
                f"attention must use diffusers' backend 'native'; {name} has {getattr(chosen, 'value', chosen)!r}; "
                "call model.reset_attention_backend()"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError(
                f"attention must run on one device; {name} is set up for context parallelism, which calls PyTorch's "
                "kernels directly; do not call model.enable_parallelism()"
            )
        if getattr(module, "gradient_checkpointing", False) and module._gradient_checkpointing_func is not checkpoint:
            raise ValueError(
                f"activation checkpointing must work under torch.func; that of {name or 'the model'} does not; "
                "call model.enable_gradient_checkpointing(metaattn.integrations.diffusers.checkpoint)"
            )
