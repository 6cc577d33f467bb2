"""The command ``python -m experiments.boundary``, see :mod:`experiments.studies.boundary`."""

from ._moved import attributes_of
from .errors import require_train_extra

__getattr__ = attributes_of("experiments.studies.boundary", __name__)

if __name__ == "__main__":
    require_train_extra()
    from .studies.boundary import main

    main()
