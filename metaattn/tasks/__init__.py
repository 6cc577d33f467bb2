"""Families of tasks: episodes over any labelled data, glyphs, sinusoids and Omniglot."""

try:
    from .episodes import Batch, Episode, Episodes, split_classes, stack
    from .glyphs import glyphs
    from .omniglot import omniglot
    from .sinusoid import Sinusoids
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] not in ("matplotlib", "PIL", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f'metaattn.tasks needs {error.name}, of the extra "train": pip install "metaattn[train]"', name=error.name
    ) from error

__all__ = ["Batch", "Episode", "Episodes", "Sinusoids", "glyphs", "omniglot", "split_classes", "stack"]
