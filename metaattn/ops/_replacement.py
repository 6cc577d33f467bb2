"""Functions of PyTorch's that run as others in a block: what the integrations are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

# They run what a model does (of what is computed again), and PyTorch takes a mode off for their time.
_RUN_MODELS = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class Replacement(TorchFunctionMode):
    """In its block and thread, functions of PyTorch's run as others, in backward passes too.

    What :func:`metaattn.meta.checkpoint` computes again is computed as at first, in a block or not.

    Args:
        by: What each function is replaced by, which takes its arguments.
    """

    def __init__(self, by: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.by = by

    @property
    def key(self) -> Hashable:
        """Equal for two that do the same."""
        return type(self), tuple(self.by.items())

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RUN_MODELS and not torch.compiler.is_compiling():
            with self:
                return torch._C._skip_one_hop_torch_function(func, types, args, kwargs or {})
        return self.by.get(func, func)(*args, **(kwargs or {}))


def replacements() -> list[Replacement]:
    """Those at work, the outermost first."""
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Replacement)]
