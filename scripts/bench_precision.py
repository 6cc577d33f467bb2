"""Relative error of second-order meta-gradients against float64, by precision, over seeds.

    python scripts/bench_precision.py [--device cuda] [--seeds 6] [--inner-steps 1 3 5] [--learning-rates 0.2 0.05]

The model is a Transformer of 2 layers of width 32 on 4 glyph tasks, as in ``python -m experiments.second_order``.
Prints the table of ``docs/guides/mixed_precision.md``: median and largest error. On a GPU also tf32: float32 with
rounded products.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch
from tqdm import tqdm

from experiments.studies.second_order import Settings, check
from experiments.training.config import Precision


def main() -> None:
    """Measure and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--seeds", type=int, default=6)
    p.add_argument("--inner-steps", type=int, nargs="+", default=[1, 3, 5])
    p.add_argument("--learning-rates", type=float, nargs="+", default=[0.2, 0.05])
    a = p.parse_args()
    kinds = [Precision.float32, Precision.tf32, Precision.bfloat16, Precision.autocast]
    if torch.device(a.device).type != "cuda":
        kinds.remove(Precision.tf32)

    errors: dict[tuple[float, int, Precision], list[float]] = {}
    runs = list(itertools.product(a.learning_rates, kinds, range(a.seeds)))
    for rate, kind, seed in tqdm(runs, desc="runs", disable=None):
        settings = Settings(precision=kind, device=a.device, inner_steps=a.inner_steps, learning_rate=rate, seed=seed)
        for row in check(settings):
            errors.setdefault((rate, row["inner_steps"], kind), []).append(row["dense"])
    print(f"| inner learning rate, steps | {' | '.join(f'`{kind.value}`' for kind in kinds)} |")
    print("|---" * (1 + len(kinds)) + "|")
    for rate, steps in itertools.product(a.learning_rates, a.inner_steps):
        cells = [errors[rate, steps, kind] for kind in kinds]
        print(f"| {rate}, {steps} | {' | '.join(f'{statistics.median(c):.2g}, {max(c):.2g}' for c in cells)} |")


if __name__ == "__main__":
    main()
