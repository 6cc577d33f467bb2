"""The command ``python -m experiments.second_order``, which runs :mod:`experiments.studies.second_order`."""

from .studies.second_order import main

if __name__ == "__main__":
    main()
