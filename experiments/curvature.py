"""The command ``python -m experiments.curvature``, see :mod:`experiments.studies.curvature`."""

from ._moved import attributes_of
from .errors import require_train_extra

__getattr__ = attributes_of("experiments.studies.curvature", __name__)

if __name__ == "__main__":
    require_train_extra()
    from .studies.curvature import main

    main()
