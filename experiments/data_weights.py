"""The command ``python -m experiments.data_weights``, which runs :mod:`experiments.studies.data_weights`."""

from .studies.data_weights import main

if __name__ == "__main__":
    main()
