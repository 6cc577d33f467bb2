"""The command ``python -m experiments.second_order``, see :mod:`experiments.studies.second_order`."""

from ._moved import attributes_of
from .errors import require_train_extra

__getattr__ = attributes_of("experiments.studies.second_order", __name__)

if __name__ == "__main__":
    require_train_extra()
    from .studies.second_order import main

    main()
