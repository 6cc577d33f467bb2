"""Parsers of the options' values. An invalid value is an error before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device(text: str) -> torch.device:
    """Parse a device that exists on this machine."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}")
    count = torch.cuda.device_count()
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < count):
        raise argparse.ArgumentTypeError(f"{text} does not exist: PyTorch sees {count} GPUs; give another, or cpu")
    return found


def dtype(text: str) -> torch.dtype:
    """Parse a dtype that the operator supports."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}; got {text!r}")
    return DTYPES[text]


def count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, int, int, int]:
    """Parse a shape: batch, heads, tokens and head size."""
    try:
        b, h, n, d = (int(part) for part in text.split(","))
    except ValueError:
        b = h = n = d = 0
    if min(b, h, n, d) < 1:
        raise argparse.ArgumentTypeError(
            f"expected batch,heads,tokens,head_size, four positive integers such as 1,8,1024,64; got {text!r}"
        )
    return b, h, n, d


def new_file(text: str) -> Path:
    """Parse the path of a file to write, in a directory that exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise argparse.ArgumentTypeError(f"cannot write {text}: {reason}")
    return path
