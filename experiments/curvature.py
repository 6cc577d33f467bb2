"""The command ``python -m experiments.curvature``, see :mod:`experiments.studies.curvature`."""

from . import _moved
from .studies.curvature import main

__getattr__ = _moved.attributes(__name__, "experiments.studies.curvature")

if __name__ == "__main__":
    main()
