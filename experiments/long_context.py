"""The command ``python -m experiments.long_context``, which runs :mod:`experiments.studies.long_context`."""

from .studies.long_context import main

if __name__ == "__main__":
    main()
