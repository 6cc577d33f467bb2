"""Draw the packages and the way of a call, of a compiled meta-step and of a training run through them.

    python scripts/draw_architecture.py [--out docs/figures/architecture.svg]

tests/test_architecture.py compares the layers with the directions that imports may take, and the ways with what runs.
The file's name decides the format. An SVG has its letters as outlines and is the same, byte for byte, each time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

mpl.use("Agg")
from matplotlib import pyplot as plt

mpl.rcParams.update({"svg.hashsalt": "architecture", "svg.fonttype": "path"})

INK, GREY, PAPER = "#1f2430", "#6b7280", "#ffffff"

# The packages, lowest first, with a few words for each and a colour.
LAYERS: list[tuple[str, str, str]] = [
    ("metaattn.backends", "primitives on plain tensors", "#eef4ff"),
    ("metaattn.autodiff", "what torch.func lacks", "#eef4ff"),
    ("metaattn.ops", "the public operator", "#eef4ff"),
    ("metaattn.compile", "a piecewise compiler", "#fff4e6"),
    ("metaattn.nn", "modules", "#eefaf0"),
    ("metaattn.meta", "meta-learning", "#eefaf0"),
    ("metaattn.tasks", "episodes", "#eefaf0"),
    ("metaattn.integrations", "other libraries", "#f3f4f6"),
    ("metaattn.cli", "doctor and bench", "#f3f4f6"),
    ("experiments", "training and studies", "#f3f4f6"),
]

# Title, colour and stops of each way, from its entrance down: package, modules that it passes there.
WAYS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "metaattn.sdpa(query, …)",
        "#3949ab",
        [
            ("metaattn.ops", "sdpa, _checks, _rules"),
            ("metaattn.autodiff", "_custom_function"),
            ("metaattn.backends", "auto, blockwise"),
        ],
    ),
    (
        "a compiled meta-step",
        "#d9730d",
        [
            ("metaattn.meta", "gradients, _compiled_step"),
            ("metaattn.compile", "recorder, passes, inductor"),
            ("metaattn.ops", "_rules, operators"),
            ("metaattn.autodiff", "_custom_function"),
            ("metaattn.backends", "auto, triton"),
        ],
    ),
    (
        "python train_maml.py",
        "#2e7d32",
        [
            ("experiments", "main, setup, loop"),
            ("metaattn.tasks", "episodes, glyphs"),
            ("metaattn.meta", "algorithms, gradients"),
            ("metaattn.nn", "transformer, attention"),
            ("metaattn.ops", "_checks, _rules"),
            ("metaattn.autodiff", "_custom_function"),
            ("metaattn.backends", "auto, blockwise"),
        ],
    ),
]
STEP, HEIGHT, LEFT, RIGHT = 1.0, 0.78, 3.7, 13.6
LANES = [4.15, 7.3, 10.6]


def layers(axis: Axes) -> dict[str, float]:
    """Draw a band for each package; return their heights."""
    heights = {}
    for i, (name, what, colour) in enumerate(LAYERS):
        y = heights[name] = i * STEP
        shape = "round,pad=0,rounding_size=0.12"
        band = FancyBboxPatch(
            (0, y - HEIGHT / 2), RIGHT, HEIGHT, boxstyle=shape, fc=colour, ec="#c7cbd4", lw=1.0, zorder=1
        )
        axis.add_patch(band)
        axis.text(0.2, y + 0.13, name, color=INK, fontsize=13, weight="bold", va="center", zorder=4)
        axis.text(0.2, y - 0.19, what, color=GREY, fontsize=10.5, va="center", zorder=4)
    return heights


def way(axis: Axes, heights: dict[str, float], x: float, title: str, colour: str, stops: list[tuple[str, str]]) -> None:
    """Draw one way: an arrow down, with a dot and the names of modules at each stop."""
    top, bottom = heights[stops[0][0]] + 0.62, heights[stops[-1][0]]
    axis.text(
        x - 0.1,
        top + 0.2,
        title,
        color=colour,
        fontsize=11.5,
        weight="bold",
        va="center",
        zorder=6,
        bbox={"fc": PAPER, "ec": "none", "pad": 1.5, "alpha": 0.9},
    )
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 16, "shrinkA": 0, "shrinkB": 5}
    axis.add_patch(FancyArrowPatch((x, top), (x, bottom), color=colour, lw=2.2, zorder=2, **style))
    for package, modules in stops:
        y = heights[package]
        axis.plot([x], [y], "o", color=colour, ms=8, zorder=5)
        axis.text(x + 0.22, y, modules, color=INK, fontsize=10.5, va="center", zorder=4)


def draw(path: Path) -> None:
    """Write the picture."""
    figure, axis = plt.subplots(figsize=(12.4, 9.2), facecolor=PAPER)
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(-0.2, RIGHT + 0.2), ylim=(-0.65, len(LAYERS) * STEP + 0.25))
    axis.axis("off")
    heights = layers(axis)
    for x, (title, colour, stops) in zip(LANES, WAYS, strict=True):
        way(axis, heights, x, title, colour, stops)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Draw."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/figures/architecture.svg"))
    draw(p.parse_args().out)


if __name__ == "__main__":
    main()
