"""The command ``python -m experiments.second_order``, see :mod:`experiments.studies.second_order`."""

from . import _moved
from .studies.second_order import main

__getattr__ = _moved.attributes(__name__, "experiments.studies.second_order")

if __name__ == "__main__":
    main()
