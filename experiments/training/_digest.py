"""Digest of a checkpoint's content: of the values and tensors themselves, whatever file they are read from.

The walk also checks that the content is what a checkpoint may hold, in time and memory proportional to its file.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from torch import Tensor

DEPTH = 32  # levels of nested lists and dicts; those of the trainer have eight
DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint32,  # of NumPy's generator
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


class ContentError(ValueError):
    """Content that a checkpoint cannot hold; the message says which and where."""


def digest_of(content: dict[str, Any], limit: int | None = None) -> str:
    """Return the SHA-256 digest of nested dicts, lists and tuples of plain values and tensors.

    Args:
        content: The content. Types count: ``1``, ``1.0`` and ``True`` differ. Strides of tensors do not.
        limit: The most bytes that values and tensors may have, where a part counts each time that it is met. A few
            bytes of a file can describe more than any memory holds.

    Raises:
        ContentError: A value has another type, a tensor is not dense and contiguous on the CPU, or the content is
            nested too deeply, refers to itself or exceeds the limit.
    """
    walk = _Walk(limit)
    walk.add(content, ())
    return walk.hash.hexdigest()


class _Walk:
    def __init__(self, limit: int | None) -> None:
        self.hash, self.left = hashlib.sha256(), limit

    def add(self, x: Any, at: tuple[str, ...]) -> None:
        if len(at) > DEPTH:
            raise ContentError(f"{_path(at[:4])} is nested more than {DEPTH} deep, or contains itself")
        kind = type(x)
        if kind is dict:
            self._update(f"dict {len(x)}")
            for k, v in x.items():
                if type(k) not in (str, int):
                    raise ContentError(f"{_path(at)} has a key of type {type(k).__name__}")
                self.add(k, at)
                self.add(v, (*at, str(k)[:40]))
        elif kind in (list, tuple):
            self._update(f"{kind.__name__} {len(x)}")
            for i, v in enumerate(x):
                self.add(v, (*at, str(i)))
        elif isinstance(x, Tensor):
            self._tensor(x, at)
        elif kind is float:
            self._update(b"float " + struct.pack("<d", x))
        elif kind is int:
            self._update(f"int {x:x}")
        elif kind is str:
            self._update(f"str {len(x)} {x}")
        elif x is None or kind is bool:
            self._update(repr(x))
        else:
            raise ContentError(f"{_path(at)} is of type {kind.__name__}, not a plain value or a tensor")

    def _tensor(self, t: Tensor, at: tuple[str, ...]) -> None:
        if type(t) is not Tensor or t.layout is not torch.strided or t.dtype not in DTYPES or t.device.type != "cpu":
            kind = f"{type(t).__name__} ({t.dtype}, {t.layout}, on {t.device})"
            raise ContentError(f"{_path(at)} is not an ordinary tensor but a {kind}")
        if not t.is_contiguous() or t.is_neg():
            raise ContentError(f"{_path(at)} is a view of another tensor")
        size = t.numel() * t.element_size()
        self._spend(size)
        self._update(f"tensor {t.dtype} {list(t.shape)}")
        if size:
            self.hash.update(t.detach().reshape(-1).view(torch.uint8).numpy().data)

    def _update(self, data: str | bytes) -> None:
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        self._spend(len(raw) + 1)
        self.hash.update(raw + b"\0")

    def _spend(self, size: int) -> None:
        if self.left is not None:
            self.left -= size
            if self.left < 0:
                raise ContentError("its parts contain each other, or one many times: together they exceed the file")


def _path(at: tuple[str, ...]) -> str:
    return f"its entry {'.'.join(at)!r}" if at else "its content"
