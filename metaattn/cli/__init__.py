"""The command line ``metaattn``: ``doctor`` checks the operator on this machine, ``bench`` measures its speed."""

from ._main import main

__all__ = ["main"]
