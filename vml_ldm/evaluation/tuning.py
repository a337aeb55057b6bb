"""Settings of the methods that ours is compared to, for each task and noise, and the grids they are looked for on.

``vml-ldm benchmark --tune METHOD`` tries every point of a method's grid on validation images; what it finds best by
mean PSNR belongs into `TUNED`. A setting's fingerprint does not depend on this file: rows stay what they were when an
entry is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from vml_ldm.evaluation.table import Group, has_perceptual, mean

Point = tuple[tuple[str, float], ...]  # (name, value) of a method's settings

# method -> settings -> values to try; the first of each are the authors', or ours where theirs do not carry over
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "red-diff": {"lambda_": (0.25, 0.00390625, 0.015625, 0.0625, 1.0), "lr": (0.1, 0.5)},
    "stock": {"guidance_scale": (7.5, 3.0, 1.0)},
    "latent-dps": {"zeta": (1.0, 0.3, 3.0, 10.0)},
    "psld": {"omega": (1.0, 0.3, 3.0, 10.0, 0.1), "gamma": (0.1, 0.01)},
    "resample": {"every": (5, 2, 10, 1), "lr": (0.05, 0.02, 0.1, 0.01)},
    "flow-dps": {"length": (1.0, 0.3, 3.0, 10.0, 30.0, 100.0), "steps": (3, 1)},
    "latent-daps": {"lr": (0.1, 0.03, 0.3, 1.0, 3.0), "steps": (10, 5)},
    "latino": {"delta": (0.1, 0.01, 0.03, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)},
    "ding": {"power": (2.0, 1.0), "cells": (0.95, 0.5)},
    "guess-guide": {"start": (0.4, 0.2, 0.6), "every": (2, 1, 5), "lr": (0.05, 0.02)},
    "azula-dps": {"zeta": (1.0, 0.3, 3.0, 10.0, 0.1)},
    "azula-pigdm": {"eta": (1.0, 0.0)},
    "azula-mmps": {"iterations": (1, 3, 5, 8)},
    "azula-tmpd": {"eta": (1.0, 0.0)},
    "azula-diffpir": {"lmbda": (10.0, 1.0, 0.1), "iterations": (3, 5)},
}

# (method, task, sigma_y) -> the best of the grid; what is not listed has the grid's first point
TUNED: dict[tuple[str, str, float], Point] = {
    ("red-diff", "sr4", 0.01): (("lambda_", 0.015625), ("lr", 0.1)),
    ("red-diff", "sr8", 0.01): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "deblur", 0.01): (("lambda_", 0.00390625), ("lr", 0.1)),
    ("red-diff", "motion", 0.01): (("lambda_", 0.015625), ("lr", 0.1)),
    ("red-diff", "box", 0.01): (("lambda_", 1.0), ("lr", 0.1)),
    ("red-diff", "half", 0.01): (("lambda_", 0.015625), ("lr", 0.5)),
    ("red-diff", "random", 0.01): (("lambda_", 0.015625), ("lr", 0.1)),
    ("red-diff", "jpeg", 0.01): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "colorize", 0.01): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "hdr", 0.01): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "phase", 0.01): (("lambda_", 0.00390625), ("lr", 0.1)),
    ("red-diff", "sr4", 0.05): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "sr8", 0.05): (("lambda_", 0.25), ("lr", 0.1)),
    ("red-diff", "deblur", 0.05): (("lambda_", 0.00390625), ("lr", 0.1)),
    ("red-diff", "motion", 0.05): (("lambda_", 0.00390625), ("lr", 0.1)),
    ("red-diff", "box", 0.05): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "half", 0.05): (("lambda_", 0.015625), ("lr", 0.1)),
    ("red-diff", "random", 0.05): (("lambda_", 0.015625), ("lr", 0.1)),
    ("red-diff", "jpeg", 0.05): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "colorize", 0.05): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "hdr", 0.05): (("lambda_", 0.0625), ("lr", 0.1)),
    ("red-diff", "phase", 0.05): (("lambda_", 0.00390625), ("lr", 0.1)),
    ("stock", "box", 0.01): (("guidance_scale", 1.0),),
    ("stock", "half", 0.01): (("guidance_scale", 1.0),),
    ("stock", "random", 0.01): (("guidance_scale", 1.0),),
    ("latino", "sr4", 0.01): (("delta", 100.0),),
    ("latino", "sr8", 0.01): (("delta", 100.0),),
    ("latino", "deblur", 0.01): (("delta", 100.0),),
    ("latino", "motion", 0.01): (("delta", 30.0),),
    ("latino", "box", 0.01): (("delta", 0.01),),
    ("latino", "half", 0.01): (("delta", 1.0),),
    ("latino", "random", 0.01): (("delta", 100.0),),
    ("latino", "colorize", 0.01): (("delta", 3.0),),
    ("flow-dps", "sr4", 0.01): (("length", 30.0), ("steps", 1)),
    ("flow-dps", "sr8", 0.01): (("length", 100.0), ("steps", 1)),
    ("flow-dps", "deblur", 0.01): (("length", 10.0), ("steps", 1)),
    ("flow-dps", "motion", 0.01): (("length", 10.0), ("steps", 1)),
    ("flow-dps", "box", 0.01): (("length", 10.0), ("steps", 1)),
    ("flow-dps", "half", 0.01): (("length", 10.0), ("steps", 1)),
    ("flow-dps", "random", 0.01): (("length", 10.0), ("steps", 1)),
    ("flow-dps", "colorize", 0.01): (("length", 30.0), ("steps", 1)),
    ("azula-diffpir", "sr4", 0.01): (("lmbda", 10.0), ("iterations", 3)),
    ("azula-diffpir", "sr8", 0.01): (("lmbda", 1.0), ("iterations", 3)),
    ("azula-diffpir", "deblur", 0.01): (("lmbda", 10.0), ("iterations", 3)),
    ("azula-diffpir", "motion", 0.01): (("lmbda", 10.0), ("iterations", 3)),
    ("azula-diffpir", "box", 0.01): (("lmbda", 0.1), ("iterations", 5)),
    ("azula-diffpir", "half", 0.01): (("lmbda", 0.1), ("iterations", 3)),
    ("azula-diffpir", "random", 0.01): (("lmbda", 1.0), ("iterations", 3)),
    ("azula-diffpir", "colorize", 0.01): (("lmbda", 10.0), ("iterations", 3)),
    ("latent-dps", "sr4", 0.01): (("zeta", 10.0),),
    ("latent-dps", "deblur", 0.01): (("zeta", 3.0),),
    ("latent-dps", "box", 0.01): (("zeta", 1.0),),
    ("latent-dps", "random", 0.01): (("zeta", 3.0),),
    ("latent-dps", "sr8", 0.01): (("zeta", 10.0),),
    ("latent-dps", "motion", 0.01): (("zeta", 1.0),),
    ("latent-dps", "half", 0.01): (("zeta", 3.0),),
    ("latent-dps", "colorize", 0.01): (("zeta", 10.0),),
    ("psld", "sr4", 0.01): (("omega", 10.0), ("gamma", 0.01)),
    ("psld", "sr8", 0.01): (("omega", 10.0), ("gamma", 0.1)),
    ("psld", "deblur", 0.01): (("omega", 3.0), ("gamma", 0.1)),
    ("psld", "motion", 0.01): (("omega", 1.0), ("gamma", 0.1)),
    ("psld", "box", 0.01): (("omega", 0.3), ("gamma", 0.1)),
    ("psld", "half", 0.01): (("omega", 1.0), ("gamma", 0.1)),
    ("psld", "random", 0.01): (("omega", 3.0), ("gamma", 0.1)),
    ("psld", "colorize", 0.01): (("omega", 0.1), ("gamma", 0.01)),
    ("resample", "sr4", 0.01): (("every", 2), ("lr", 0.05)),
    ("resample", "deblur", 0.01): (("every", 2), ("lr", 0.05)),
    ("resample", "box", 0.01): (("every", 2), ("lr", 0.01)),
    ("resample", "random", 0.01): (("every", 2), ("lr", 0.1)),
    ("resample", "half", 0.01): (("every", 2), ("lr", 0.02)),
    ("resample", "colorize", 0.01): (("every", 5), ("lr", 0.1)),
    ("resample", "sr8", 0.01): (("every", 2), ("lr", 0.05)),
    ("resample", "motion", 0.01): (("every", 1), ("lr", 0.05)),
    ("latent-daps", "sr4", 0.01): (("lr", 1.0), ("steps", 10)),
    ("latent-daps", "deblur", 0.01): (("lr", 0.1), ("steps", 10)),
    ("latent-daps", "box", 0.01): (("lr", 0.3), ("steps", 5)),
    ("latent-daps", "random", 0.01): (("lr", 0.1), ("steps", 10)),
    ("latent-daps", "half", 0.01): (("lr", 0.3), ("steps", 5)),
    ("latent-daps", "colorize", 0.01): (("lr", 0.03), ("steps", 5)),
    ("latent-daps", "sr8", 0.01): (("lr", 3.0), ("steps", 5)),
    ("latent-daps", "motion", 0.01): (("lr", 0.1), ("steps", 10)),
    ("azula-dps", "sr4", 0.01): (("zeta", 3.0),),
    ("azula-dps", "deblur", 0.01): (("zeta", 3.0),),
    ("azula-dps", "box", 0.01): (("zeta", 0.3),),
    ("azula-dps", "random", 0.01): (("zeta", 1.0),),
    ("azula-dps", "sr8", 0.01): (("zeta", 10.0),),
    ("azula-dps", "motion", 0.01): (("zeta", 1.0),),
    ("azula-dps", "half", 0.01): (("zeta", 1.0),),
    ("azula-dps", "colorize", 0.01): (("zeta", 1.0),),
    ("azula-pigdm", "sr4", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "deblur", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "box", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "random", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "sr8", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "motion", 0.01): (("eta", 0.0),),
    ("azula-pigdm", "half", 0.01): (("eta", 1.0),),
    ("azula-pigdm", "colorize", 0.01): (("eta", 0.0),),
    ("azula-mmps", "sr4", 0.01): (("iterations", 5),),
    ("azula-mmps", "deblur", 0.01): (("iterations", 5),),
    ("azula-mmps", "box", 0.01): (("iterations", 3),),
    ("azula-mmps", "random", 0.01): (("iterations", 5),),
    ("azula-mmps", "sr8", 0.01): (("iterations", 3),),
    ("azula-mmps", "motion", 0.01): (("iterations", 3),),
    ("azula-mmps", "half", 0.01): (("iterations", 8),),
    ("azula-mmps", "colorize", 0.01): (("iterations", 3),),
    ("azula-tmpd", "sr4", 0.01): (("eta", 0.0),),
    ("azula-tmpd", "deblur", 0.01): (("eta", 0.0),),
    ("azula-tmpd", "box", 0.01): (("eta", 1.0),),
    ("azula-tmpd", "random", 0.01): (("eta", 1.0),),
    ("azula-tmpd", "sr8", 0.01): (("eta", 0.0),),
    ("azula-tmpd", "motion", 0.01): (("eta", 0.0),),
    ("azula-tmpd", "half", 0.01): (("eta", 0.0),),
    ("azula-tmpd", "colorize", 0.01): (("eta", 0.0),),
}


def points(method: str) -> list[Point]:
    """A method's grid, its first point first."""
    axes = GRIDS[method]
    return [tuple(zip(axes, values, strict=True)) for values in product(*axes.values())]


def tuned(method: str, task: str, sigma_y: float) -> Point:
    """The settings found for a task at the noise nearest to sigma_y; the grid's first if none were looked for."""
    noises = [noise for name, place, noise in TUNED if (name, place) == (method, task)]
    if not noises:
        return points(method)[0]
    return TUNED[method, task, min(noises, key=lambda noise: abs(noise - sigma_y))]


def name_of(point: Point) -> str:
    """A grid point's name in rows and tables."""
    return " ".join(f"{name.rstrip('_')} {value:g}" for name, value in point)


def best_settings(method: str, groups: Sequence[Group]) -> str:
    """The best of a grid by mean PSNR for each task and noise, as Python's lines of `TUNED`, with what it gains.

    Args:
        groups: labels (task, sigma_y), rows by `name_of`.
    """
    head = "Best by mean PSNR, as entries of TUNED (vml_ldm/evaluation/tuning.py):"
    return "\n".join([head, *(_entry(method, group) for group in groups)])


def _entry(method: str, group: Group) -> str:
    task, sigma_y = group.labels[:2]
    grid = {name_of(point): point for point in points(method)}
    first, names = next(iter(grid)), [name for name in group.rows if name in grid]
    best = max(names, key=lambda name: mean(group.rows[name], "psnr"))
    figures = f"{mean(group.rows[best], 'psnr'):.2f} dB"
    if first in group.rows:
        figures += f", first {mean(group.rows[first], 'psnr'):.2f} dB"
    if has_perceptual([group]):
        nearest = min(names, key=lambda name: mean(group.rows[name], "perceptual"))
        figures += f"; by distance: {nearest}"
    note = "; at the grid's edge" if _at_edge(method, grid[best]) else ""
    return f'    ("{method}", "{task}", {float(sigma_y)}): {grid[best]!r},  # {figures}{note}'


def _at_edge(method: str, point: Point) -> bool:
    """Whether a value is the least or the most of more than two that were tried."""
    return any(len(GRIDS[method][n]) > 2 and v in (min(GRIDS[method][n]), max(GRIDS[method][n])) for n, v in point)
