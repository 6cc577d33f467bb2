"""Messages between :mod:`.precompile` and the processes of :mod:`.precompile_worker`.

A request is a header and a pickled :class:`Request`; the answer is the number of the request, once it is done.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..autodiff import TensorSpec

HEADER = struct.Struct("<qq")  # the number of a request, and the length of what follows
ANSWER = struct.Struct("<q")  # the number of a request


class Settings(NamedTuple):
    """Global settings of PyTorch that compiled code depends on. Most of them are part of Inductor's keys."""

    dtype: torch.dtype
    precision: str
    matmul_precision: str
    deterministic: bool
    threads: int

    @classmethod
    def current(cls) -> Settings:
        """Return the settings of this process."""
        return cls(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        )

    def apply(self) -> None:
        """Make them the settings of this process."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        # After the line above: the two differ where a precision was set and then set back.
        torch.backends.cuda.matmul.fp32_precision = self.matmul_precision
        torch.use_deterministic_algorithms(self.deterministic)
        torch.set_num_threads(self.threads)


class Request(NamedTuple):
    """One piece to compile."""

    module: bytes
    specs: Sequence[TensorSpec]
    options: Mapping[str, Any]
    settings: Settings
