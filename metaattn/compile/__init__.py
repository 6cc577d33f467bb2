"""Piecewise compiler for meta-steps: record, fuse, split at attention, compile by Inductor, capture as a CUDA graph."""

from .capture import Captured, capture

__all__ = ["Captured", "capture"]
