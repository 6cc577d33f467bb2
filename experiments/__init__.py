"""Training and studies behind the commands: ``train_maml.py`` and ``python -m experiments.NAME``."""

import os

from . import _moved

# PyTorch's threads would wait for each other by spinning: on a machine with a busy core a step then takes many times as
# long. OpenMP reads this when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_moved.install()
