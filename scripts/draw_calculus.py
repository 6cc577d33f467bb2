"""Draw the calculus of the four primitives: which primitives the derivatives of each consist of.

    python scripts/draw_calculus.py [--out docs/figures/calculus.svg]

The arrows are the table of section 3 of docs/mathematics.md for D0, G0, D1, G1 = F, B, T, S. The file's name decides
the format. An SVG has its letters as outlines and is the same, byte for byte, each time.
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

mpl.rcParams.update({"svg.hashsalt": "calculus", "svg.fonttype": "path", "mathtext.fontset": "cm"})

Point = tuple[float, float]
Line = tuple[float, tuple[float, ...] | None]
Arrow = tuple[Point, Point, float, str, Point]

WIDTH, HEIGHT = 3.0, 1.3
SOLID: Line = (0, None)
DASHED: Line = (0, (4, 2))
INK, GREY, PAPER = "#1f2430", "#6b7280", "#ffffff"
REVERSE, FORWARD = "#3949ab", "#d9730d"
VALUES, GRADIENTS, HIGHER = "#eef4ff", "#fff4e6", "#f3f4f6"

# Symbol, name in code, results, centre, colour.
NODES = [
    ("F", "forward", r"$o,\ \ell$", (2.0, 6.2), VALUES),
    ("B", "backward", r"$\bar q,\ \bar k,\ \bar v,\ \bar b$", (8.6, 6.2), GRADIENTS),
    ("T", "forward_jvp", r"$\dot o,\ \dot\ell$", (2.0, 3.2), VALUES),
    ("S", "backward_jvp", r"$\dot{\bar q},\ \dot{\bar k},\ \dot{\bar v},\ \dot{\bar b}$", (8.6, 3.2), GRADIENTS),
]
# Start, end, bend, label and its position; reverse mode, then forward mode.
REVERSE_ARROWS: list[Arrow] = [
    ((3.5, 6.2), (7.1, 6.2), 0.0, r"by $x$", (5.3, 6.42)),
    ((3.5, 3.2), (7.1, 3.2), 0.0, r"by $x$", (5.3, 2.92)),
    ((3.2, 3.85), (7.1, 5.9), -0.12, "by the tangent", (4.12, 5.3)),
    ((7.4, 5.55), (3.5, 3.5), -0.12, "by the cotangent", (6.62, 4.12)),
    ((8.3, 5.55), (8.3, 3.85), 0.0, r"by $x$", (7.92, 4.72)),
    ((8.3, 2.55), (8.3, 1.35), 0.0, "", (0, 0)),
]
FORWARD_ARROWS: list[Arrow] = [
    ((2.0, 5.55), (2.0, 3.85), 0.0, r"along $\dot x$", (1.42, 4.72)),
    ((8.9, 5.55), (8.9, 3.85), 0.0, r"along $\dot x$", (9.5, 4.72)),
    ((2.0, 2.55), (2.0, 1.35), 0.0, "", (0, 0)),
    ((8.9, 2.55), (8.9, 1.35), 0.0, "", (0, 0)),
]


def box(axis: Axes, centre: Point, width: float, height: float, colour: str) -> None:
    """Draw a rounded box."""
    x, y = centre[0] - width / 2, centre[1] - height / 2
    shape = "round,pad=0,rounding_size=0.18"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=colour, ec=INK, lw=1.3, zorder=3))


def text(axis: Axes, at: Point, content: str, color: str = INK, **style: Any) -> None:
    """Write text centred on a point."""
    axis.text(*at, content, color=color, ha="center", va="center", zorder=4, **style)


def connect(axis: Axes, arrows: list[Arrow], colour: str, line: Line) -> None:
    """Draw the arrows of one mode, with their labels."""
    for start, end, bend, label, (x, y) in arrows:
        style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 17, "connectionstyle": f"arc3,rad={bend}"}
        axis.add_patch(FancyArrowPatch(start, end, lw=1.9, ls=line, color=colour, shrinkA=2, shrinkB=2, **style))
        if label:
            text(axis, (x, y), label, fontsize=11, color=colour)


def draw(path: Path) -> None:
    """Write the picture."""
    figure, axis = plt.subplots(figsize=(9.6, 6.6), facecolor=PAPER)
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(-0.6, 11.2), ylim=(-0.75, 7.9))
    axis.axis("off")
    for name, what, gives, (x, y), colour in NODES:
        box(axis, (x, y), WIDTH, HEIGHT, colour)
        text(axis, (x - 1.05, y), name, fontsize=30, weight="bold")
        text(axis, (x + 0.38, y + 0.27), what, fontsize=12, color=GREY)
        text(axis, (x + 0.38, y - 0.24), gives, fontsize=17)
    box(axis, (5.3, 0.7), 9.6, HEIGHT, HIGHER)
    higher = r"$D_2,\ G_2,\ D_3,\ \ldots$   formulas, computed in tiles: no separate kernels"
    text(axis, (5.3, 0.93), "third order and above", fontsize=14, weight="bold")
    text(axis, (5.3, 0.42), higher, fontsize=12.5)
    for x, title in ((2.0, "values and their tangents"), (8.6, "gradients and their tangents")):
        text(axis, (x, 7.35), title, fontsize=13, color=GREY)
    connect(axis, REVERSE_ARROWS, REVERSE, SOLID)
    connect(axis, FORWARD_ARROWS, FORWARD, DASHED)
    labelled = "what a rule of reverse mode (vjp) calls", "what a rule of forward mode (jvp) calls"
    connect(axis, [((0.3, -0.38), (1.2, -0.38), 0.0, "", (0, 0))], REVERSE, SOLID)
    connect(axis, [((5.9, -0.38), (6.8, -0.38), 0.0, "", (0, 0))], FORWARD, DASHED)
    for x, label in zip((3.2, 8.8), labelled, strict=True):
        text(axis, (x, -0.38), label, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Draw."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/figures/calculus.svg"))
    draw(p.parse_args().out)


if __name__ == "__main__":
    main()
