"""Training and studies behind the commands: ``train_maml.py`` and ``python -m experiments.NAME``."""

from . import _moved

_moved.install()
