"""The command ``python -m experiments.boundary``, which runs :mod:`experiments.studies.boundary`."""

from .studies.boundary import main

if __name__ == "__main__":
    main()
