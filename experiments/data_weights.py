"""The command ``python -m experiments.data_weights``, see :mod:`experiments.studies.data_weights`."""

from . import _moved
from .studies.data_weights import main

__getattr__ = _moved.attributes(__name__, "experiments.studies.data_weights")

if __name__ == "__main__":
    main()
