"""Families of tasks: episodes over any labelled data, glyphs, sinusoids and Omniglot."""

from .episodes import Batch, Episode, Episodes, split_classes, stack
from .glyphs import glyphs
from .omniglot import omniglot
from .sinusoid import Sinusoids

__all__ = ["Batch", "Episode", "Episodes", "Sinusoids", "glyphs", "omniglot", "split_classes", "stack"]
