"""Where other libraries meet ours. Each module imports its library when it is used, not before."""

from .torch_sdpa import replace_sdpa

__all__ = ["replace_sdpa"]
