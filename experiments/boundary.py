"""The command ``python -m experiments.boundary``, see :mod:`experiments.studies.boundary`."""

from . import _moved
from .studies.boundary import main

__getattr__ = _moved.attributes(__name__, "experiments.studies.boundary")

if __name__ == "__main__":
    main()
