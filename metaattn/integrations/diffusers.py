"""The models of `diffusers <https://github.com/huggingface/diffusers>`_ with every derivative, of any order and mode.

Consistency models and MeanFlow take the derivative of a network along its sample and its time, and train through it.
The attention of a diffusion model has no such derivative, and its layer norm has one whose gradient is silently wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..ops import checkpoint as checkpointed
from .torch_norms import replace_norms
from .torch_sdpa import replace_sdpa


@contextlib.contextmanager
def differentiable(model: nn.Module, *, backend: str | None = None) -> Iterator[None]:
    """In this block and this thread, every derivative of a model of diffusers.

    :class:`metaattn.replace_sdpa` and :func:`metaattn.integrations.torch_norms.replace_norms`, after a look at the
    model: its calls of PyTorch's attention, by diffusers' backend ``native`` or by a processor of its own, go to
    :func:`metaattn.sdpa`, and its norms are written out. A backward pass may come after the block.

    Args:
        model: Whose settings are checked first.
        backend: As in :func:`metaattn.sdpa`.

    Raises:
        ImportError: diffusers is not there.
        ValueError: The model's attention does not go through PyTorch's, or its activation checkpointing has no
            ``torch.func`` transforms; no backend has this name.

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
            "diffusers is needed; in a clone of the repository: "
            'pip install -r requirements.txt -c requirements-integrations.txt -e ".[diffusers]"'
        ) from error
    _check(model)
    with attention_backend("native"), replace_sdpa(backend=backend), replace_norms():
        yield


def checkpoint(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a module whose derivatives keep its arguments alone, for diffusers' ``enable_gradient_checkpointing``.

    PyTorch's activation checkpointing, which diffusers takes if given none, raises under :mod:`torch.func`; this one
    has every derivative.

    Args:
        module: A block of a model.
        *args: Its arguments.
        **kwargs: Likewise.

    Raises:
        ValueError: As :func:`metaattn.meta.checkpoint`.

    Example:
        >>> import diffusers
        >>> from metaattn.integrations.diffusers import checkpoint
        >>> model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1)
        >>> model.enable_gradient_checkpointing(checkpoint)
    """
    return checkpointed(module)(*args, **kwargs)


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        chosen = getattr(processor, "_attention_backend", None)
        if chosen is not None and getattr(chosen, "value", chosen) != "native":
            raise ValueError(
                f"attention must run by diffusers' backend 'native'; {name} has {getattr(chosen, 'value', chosen)!r}; "
                "call model.reset_attention_backend()"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError(
                f"attention must run on one device; {name} is set up for context parallelism, which calls PyTorch's "
                "kernels directly; leave out model.enable_parallelism()"
            )
        if getattr(module, "gradient_checkpointing", False) and module._gradient_checkpointing_func is not checkpoint:
            raise ValueError(
                f"{name or 'the model'} has activation checkpointing that raises under torch.func; "
                "call model.enable_gradient_checkpointing(metaattn.integrations.diffusers.checkpoint)"
            )
