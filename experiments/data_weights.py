"""The command ``python -m experiments.data_weights``, see :mod:`experiments.studies.data_weights`."""

from ._moved import attributes_of
from .errors import require_train_extra

__getattr__ = attributes_of("experiments.studies.data_weights", __name__)

if __name__ == "__main__":
    require_train_extra()
    from .studies.data_weights import main

    main()
