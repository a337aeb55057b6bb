"""RED-diff's settings for each task and noise, and the grid that they are looked for on (validation images only).

``vml-ldm benchmark --tune`` tries every pair of the grid; what it finds best by mean PSNR belongs into `TUNED`. A
setting's fingerprint does not depend on this file: rows stay what they were when an entry is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from vml_ldm.evaluation.table import Group, has_perceptual, mean
from vml_ldm.red import RedDiff

LAMBDAS = (0.0625, 0.25, 1.0, 4.0)
LRS = (0.05, 0.1, 0.2, 0.5)
AUTHORS = RedDiff()
# the authors' first, which others are compared to
GRID = (AUTHORS, *(r for r in (RedDiff(lambda_=a, lr=b) for a, b in product(LAMBDAS, LRS)) if r != AUTHORS))

# (task, sigma_y) -> the best of the grid; what is not listed has the authors' settings
TUNED: dict[tuple[str, float], RedDiff] = {}


def tuned(task: str, sigma_y: float) -> RedDiff:
    """The settings found for a task at the noise nearest to sigma_y; the authors' if none were looked for."""
    noises = [noise for name, noise in TUNED if name == task]
    return TUNED[task, min(noises, key=lambda noise: abs(noise - sigma_y))] if noises else AUTHORS


def name_of(red: RedDiff) -> str:
    """A grid point's name in rows and tables."""
    return f"lambda {red.lambda_:g} lr {red.lr:g}"


def best_settings(groups: Sequence[Group]) -> str:
    """The best of the grid by mean PSNR for each task and noise, as Python's lines of `TUNED`, with what it gains.

    Args:
        groups: labels (task, sigma_y), rows by `name_of`.
    """
    return "\n".join(["Best by mean PSNR, as entries of TUNED (vml_ldm/evaluation/tuning.py):", *map(_entry, groups)])


def _entry(group: Group) -> str:
    task, sigma_y = group.labels[:2]
    points = {name_of(red): red for red in GRID}
    names = [name for name in group.rows if name in points]
    best = max(names, key=lambda name: mean(group.rows[name], "psnr"))
    red, rows = points[best], group.rows[best]
    figures = f"{mean(rows, 'psnr'):.2f} dB"
    if (authors := name_of(AUTHORS)) in group.rows:
        figures += f", authors' {mean(group.rows[authors], 'psnr'):.2f} dB"
    if has_perceptual([group]):
        nearest = min(names, key=lambda name: mean(group.rows[name], "perceptual"))
        figures += f"; by distance: {nearest}"
    edge = red.lambda_ in (LAMBDAS[0], LAMBDAS[-1]) or red.lr in (LRS[0], LRS[-1])
    note = "; at the grid's edge" if edge else ""
    return f'    ("{task}", {float(sigma_y)}): RedDiff(lambda_={red.lambda_}, lr={red.lr}),  # {figures}{note}'
