"""The operator inside other libraries: a module for each, which imports its library when it is used."""

__all__: list[str] = []
