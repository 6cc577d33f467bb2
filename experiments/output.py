"""Write results as JSON and figures: what training and the studies share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils._pytree import tree_map

from metaattn.tasks.cache import replacing

mpl.use("Agg")
from matplotlib import pyplot as plt

BLUE, RED, GREEN, GREY = "#1f77b4", "#d62728", "#2ca02c", "#7f7f7f"


def write_json(path: Path, content: Any) -> None:
    """Write JSON, completely or not at all. Infinities and NaN, which JSON does not have, become ``null``."""
    with replacing(path) as file:
        file.write(json.dumps(tree_map(_finite_or_none, content), indent=2, allow_nan=False).encode())


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, completely or not at all, and close it."""
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])
    plt.close(figure)


def legend_below(axis: Axes, columns: int = 2) -> None:
    """Draw the legend below the axis, where it covers no data."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=columns, frameon=False, fontsize=8)


def integer_ticks(axis: Axes) -> None:
    """Put the ticks of the x-axis at integers: it counts steps."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
