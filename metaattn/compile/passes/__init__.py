"""Rewritings of recorded graphs."""

__all__: list[str] = []
