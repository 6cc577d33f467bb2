"""Real text that every machine has, the sources of Python's standard library, as bytes; and a model of it."""

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
    """The standard library's modules as bytes; of ten files, by their names, one each is for validation and test.

    Raises:
        UserError: A Python that does not have its library as files.
    """
    where = Path(sysconfig.get_path("stdlib"))
    files = sorted(where.glob("*.py"))
    if len(files) < 100:
        raise UserError(f"{where} has {len(files)} modules of Python's standard library; use a Python that has it all")
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for i, file in enumerate(files):
        parts[{0: "validation", 1: "test"}.get(i % 10, "train")].append(file.read_bytes())
    return {split: torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for split, part in parts.items()}


def windows(text: Tensor, count: int, length: int, g: torch.Generator) -> Tensor:
    """Pieces of the text, each with the byte after it, ``[count, length + 1]``."""
    start = torch.randint(len(text) - length, (count, 1), generator=g)
    return text[start + torch.arange(length + 1)].long()


def byte_model(seed: int, *, backend: Backend, **changes: Any) -> metaattn.Transformer:
    """A causal Transformer that predicts the next byte, drawn from a seed; ``changes`` of its config."""
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
