"""The command line ``metaattn``: ``doctor`` checks the operator on this machine, ``bench`` times it."""

from ._main import main

__all__ = ["main"]
