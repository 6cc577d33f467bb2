"""The command ``python -m experiments.curvature``, which runs :mod:`experiments.studies.curvature`."""

from .studies.curvature import main

if __name__ == "__main__":
    main()
