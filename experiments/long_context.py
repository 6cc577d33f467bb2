"""The command ``python -m experiments.long_context``, see :mod:`experiments.studies.long_context`."""

from ._moved import attributes_of
from .errors import require_train_extra

__getattr__ = attributes_of("experiments.studies.long_context", __name__)

if __name__ == "__main__":
    require_train_extra()
    from .studies.long_context import main

    main()
