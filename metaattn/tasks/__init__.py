"""Families of tasks for meta-learning: few-shot episodes from any labelled data, and three ready-made families.

Entry points: :class:`Episodes`, from a tensor, an array or a dataset; :func:`glyphs` and :func:`omniglot` (images) and
:class:`Sinusoids` (regression); :func:`stack`, which makes a batch of tasks for a
:class:`metaattn.meta.Learner`. An episode is a pure function of the seed and its index, so that it is the same in any
order, process and data-loader worker.

Imports nothing else of :mod:`metaattn`. :func:`glyphs` and :func:`omniglot` import matplotlib and Pillow when they are
called; the extra ``train`` installs both.
"""

from .episodes import Batch, Episode, Episodes, split_classes, stack
from .glyphs import glyphs
from .omniglot import omniglot
from .sinusoid import Sinusoids

__all__ = ["Batch", "Episode", "Episodes", "Sinusoids", "glyphs", "omniglot", "split_classes", "stack"]
