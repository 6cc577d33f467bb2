"""Other libraries on this one: each behind an extra, and imported on use alone."""

__all__: list[str] = []
