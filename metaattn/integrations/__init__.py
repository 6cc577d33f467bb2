"""Other libraries on metaattn, one module per library: their models get every derivative without a change.

Entry points: :func:`metaattn.replace_sdpa` (``torch_sdpa``, any PyTorch model), ``torch_norms.replace_norms`` (any
PyTorch model), ``transformers.register`` and ``diffusers.differentiable``. A module imports its library only when it is
used, so that importing this package needs PyTorch only. PyTorch's functions are replaced by a mode that sees the calls
of a thread (:class:`torch.overrides.TorchFunctionMode`), other libraries through their own extension points.

May import every package below: :mod:`metaattn.ops`, :mod:`metaattn.autodiff`, :mod:`metaattn.nn`, :mod:`metaattn.meta`
and :mod:`metaattn.tasks`.
"""

from .torch_sdpa import replace_sdpa

__all__ = ["replace_sdpa"]
