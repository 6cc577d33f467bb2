"""Bytes of real text that every machine has, the source code of Python's standard library, and a model of them."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metaattn

from ..errors import UserError
from ..training.config import Backend

SPLITS = ("train", "validation", "test")


def corpus() -> dict[str, Tensor]:
    """Return the modules of the standard library, by split, as uint8 tensors.

    Of every ten files in alphabetical order, one is for validation and one for test.

    Raises:
        UserError: This Python does not have its library as files.
    """
    where = Path(sysconfig.get_path("stdlib"))
    files = sorted(where.glob("*.py"))
    if len(files) < 100:
        raise UserError(
            f"expected the modules of Python's standard library in {where}; found {len(files)}. Use a Python with the "
            "complete library"
        )
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for i, file in enumerate(files):
        parts[{0: "validation", 1: "test"}.get(i % 10, "train")].append(file.read_bytes())
    return {split: torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for split, part in parts.items()}


def windows(text: Tensor, count: int, length: int, g: torch.Generator) -> Tensor:
    """Draw random pieces of a text.

    Args:
        text: The bytes, ``[n]``.
        count: The number of pieces.
        length: The length of a piece, in bytes.
        g: The generator that draws their positions.

    Returns:
        The pieces, each with the byte that follows it, ``[count, length + 1]``.
    """
    start = torch.randint(len(text) - length, (count, 1), generator=g)
    return text[start + torch.arange(length + 1)].long()


def byte_model(seed: int, *, backend: Backend, **changes: Any) -> metaattn.Transformer:
    """Return a causal Transformer that predicts the next byte, initialized from a seed.

    Args:
        seed: The seed of the initial weights.
        backend: The attention backend.
        **changes: Further fields of :class:`metaattn.TransformerConfig`.
    """
    torch.manual_seed(seed)
    return metaattn.Transformer(
        input="token",
        vocab_size=256,
        output="per_token",
        out_features=256,
        causal=True,
        backend=backend.value,
        **changes,
    )
