"""The command ``python -m experiments.long_context``, see :mod:`experiments.studies.long_context`."""

from . import _moved
from .studies.long_context import main

__getattr__ = _moved.attributes(__name__, "experiments.studies.long_context")

if __name__ == "__main__":
    main()
