"""Tables of the benchmark of prompts: means, and differences to stock with intervals by a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Generator, Tensor

from vml_ldm.evaluation.metrics import Interval
from vml_ldm.evaluation.table import FEWEST, draw_table

STOCK = "stock"
_RESAMPLES = 10_000


def prompts_table(groups: Mapping[str, Mapping[str, Sequence]]) -> str:
    """Rows as Markdown, two tables: means, and differences to stock's better guidance (by mean reciprocal rank).

    Args:
        groups: place -> method -> rows, the same prompts and seeds in the same order for all methods of a place.
    """
    if not groups:
        return "No prompt has been painted by every method yet."
    head = ["place", "method", "images", *(name for name, _, _ in _FIGURES)]
    lines = [
        [place, method, str(len(rows)), *(_show(figure(rows), digits) for _, figure, digits in _FIGURES)]
        for place, methods in groups.items()
        for method, rows in methods.items()
    ]
    changes = _changes(groups)
    return "\n".join([*draw_table(head, lines, len(_FIGURES) + 1), *(["", *changes] if changes else [])])


def better_stock(methods: Mapping[str, Sequence]) -> str | None:
    """The stock method with the highest mean reciprocal rank; None without any."""
    stock = [name for name in methods if name.partition("@")[0] == STOCK]
    return max(stock, key=lambda name: _mean(methods[name], "reciprocal")) if stock else None


def paired_bootstrap(rows: Sequence, base: Sequence, field: str, resamples: int = _RESAMPLES) -> Interval:
    """Mean of rows - base with its 95 % interval: percentiles over prompts drawn again, each with all its seeds.

    Args:
        rows, base: the same prompts and seeds in the same order, one value of `field` each.
    """
    by_prompt: dict[str, list[float]] = {}
    for ours, theirs in zip(rows, base, strict=True):
        if (ours.image, ours.seed) != (theirs.image, theirs.seed):
            raise ValueError(f"{ours.image} with seed {ours.seed} came beside {theirs.image} with {theirs.seed}.")
        by_prompt.setdefault(ours.image, []).append(getattr(ours, field) - getattr(theirs, field))
    sums = torch.tensor([[sum(values), len(values)] for values in by_prompt.values()], dtype=torch.float64)
    drawn = torch.randint(len(sums), (resamples, len(sums)), generator=Generator().manual_seed(0))
    total, count = sums[drawn].sum(1).unbind(1)
    low, high = (total / count).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval((sums[:, 0].sum() / sums[:, 1].sum()).item(), low, high, len(sums))


def _changes(groups: Mapping[str, Mapping[str, Sequence]]) -> list[str]:
    lines = []
    for place, methods in groups.items():
        base = better_stock(methods)
        if base is None or len(methods[base]) < FEWEST:
            continue
        for method in (name for name in methods if name != base):
            shown = [_difference(methods[method], methods[base], *paired) for paired in _PAIRED]
            lines.append([place, method, base, *shown])
    names = {field: name for name, field in _NAMES.items()}
    head = ["place", "method", "less", *(names[field] for field, _ in _PAIRED)]
    return draw_table(head, lines, len(_PAIRED)) if lines else []


def _difference(rows: Sequence, base: Sequence, field: str, digits: int) -> str:
    change = paired_bootstrap(rows, base, field)
    return f"{change.mean:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"


def _values(rows: Sequence, field: str) -> Tensor:
    found = [getattr(row, field) for row in rows]
    return torch.tensor([value for value in found if value is not None], dtype=torch.float64)


def _mean(rows: Sequence, field: str) -> float:
    """Over the rows that have a value."""
    return _values(rows, field).mean().item()


def _of(field: str) -> Callable[[Sequence], float]:
    return lambda rows: _mean(rows, field)


def _show(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


_NAMES = {
    "rank 1 ↑": "first",
    "rank ≤ 10 ↑": "ten",
    "reciprocal rank ↑": "reciprocal",
    "known, before paste (dB) ↑": "psnr_known",
    "edge error ↓": "edge_error",
}
_FIGURES = (
    ("rank 1 ↑", _of("first"), 2),
    ("rank ≤ 10 ↑", _of("ten"), 2),
    ("reciprocal rank ↑", _of("reciprocal"), 3),
    ("median rank ↓", lambda rows: median(row.rank for row in rows), 1),
    ("known, before paste (dB) ↑", _of("psnr_known"), 2),
    ("edge error ↓", _of("edge_error"), 4),
    ("sharpness", lambda rows: median(row.sharpness for row in rows), 2),
    ("spread", _of("spread"), 3),
    ("PSNR unknown (dB) ↑", _of("psnr_unknown"), 2),
    ("distance ↓", _of("perceptual"), 3),
    ("seconds", _of("seconds"), 2),
    ("denoiser", _of("denoise"), 0),
    ("calls", _of("calls"), 0),
)
_PAIRED = (("first", 3), ("ten", 3), ("reciprocal", 3), ("psnr_known", 2), ("edge_error", 4))
