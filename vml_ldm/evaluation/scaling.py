"""How the cost of a solve grows with levels, inner steps, pixels and batch: ``vml-ldm benchmark --cost``.

One of the four changes at a time, the others stay at `BASE`. The measurement is noise that no image agrees with, so
that no level ends early. Each solve is run several times and the shortest counts.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator
from tqdm import tqdm

from vml_ldm.evaluation.table import draw_table
from vml_ldm.operators import Downsample
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline

BASE = {"levels": 4, "inner_steps": 4, "side": 1, "batch": 1}  # a side of 1 is the model's own
AXES = {
    "levels": (2, 4, 8, 16),
    "inner_steps": (1, 2, 4, 8, 16),
    "side": (0.5, 0.75, 1, 1.5, 2),
    "batch": (1, 2, 4, 8),
}
TIMES = 3
_FACTOR = 4  # of the measurement's resolution
_UNITS = {"levels": "levels", "inner_steps": "inner steps", "side": "pixels", "batch": "images"}


@dataclass(frozen=True)
class Point:
    """One solve.

    Attributes:
        axis: which of `BASE` was changed.
        value: what the cost is drawn against: levels, inner steps, pixels or images.
        seconds: the shortest of several runs.
        outside: share of that outside the networks, in [0, 1].
        calls: of networks, forward and backward.
    """

    axis: str
    value: int
    seconds: float
    outside: float
    calls: int


class Line(NamedTuple):
    """``seconds = start + slope * value`` by least squares, and the share of the variance that it explains."""

    start: float
    slope: float
    r2: float


def measure(pipe: VMLRestorePipeline) -> list[Point]:
    """Run every solve, with a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    _solve(pipe, **BASE)  # first calls are slower
    jobs = [(axis, value) for axis, values in AXES.items() for value in values]
    return [_point(pipe, axis, value) for axis, value in tqdm(jobs, unit="solve")]


def _point(pipe: VMLRestorePipeline, axis: str, value: float) -> Point:
    asked = BASE | {axis: value}
    reports = [_solve(pipe, **asked) for _ in range(TIMES)]
    best = min(reports, key=lambda report: report.seconds["total"])
    shown = _side(pipe, value) ** 2 if axis == "side" else int(value)
    return Point(axis, shown, best.seconds["total"], best.overhead, sum(best.calls.values()))


def _side(pipe: VMLRestorePipeline, share: float) -> int:
    """A share of the model's own side, in pixels."""
    return int(share * pipe.unet.config.sample_size) * pipe.vae_scale_factor


def _solve(pipe: VMLRestorePipeline, *, levels: int, inner_steps: int, side: float, batch: int):
    pixels = _side(pipe, side)
    y = torch.rand(batch, 3, pixels // _FACTOR, pixels // _FACTOR, generator=Generator().manual_seed(0))
    out = pipe(
        y=y,
        operator=Downsample(_FACTOR),
        height=pixels,
        width=pixels,
        num_inference_steps=levels * (inner_steps + 1),
        inner_steps=inner_steps,
        correct_steps=0,  # they would take levels' part of the budget
        generator=Generator().manual_seed(0),
        output_type="pt",
        return_report=True,
    )
    return out.report


def fit(points: Sequence[Point]) -> Line:
    """The straight line through points of one axis."""
    x = torch.tensor([[1.0, point.value] for point in points], dtype=torch.float64)
    seconds = torch.tensor([point.seconds for point in points], dtype=torch.float64)
    start, slope = torch.linalg.lstsq(x, seconds[:, None]).solution.flatten().tolist()
    rest = (seconds - start - slope * x[:, 1]).square().sum() / (seconds - seconds.mean()).square().sum()
    return Line(start, slope, 1 - rest.item())


def table(points: Sequence[Point]) -> str:
    """Every point and each axis's line (Markdown)."""
    head = ["changed", "to", "seconds", "network calls", "outside the networks"]
    lines = [[_UNITS[p.axis], f"{p.value}", f"{p.seconds:.2f}", f"{p.calls}", f"{p.outside:.1%}"] for p in points]
    base = f"{BASE['levels']} levels, {BASE['inner_steps']} inner steps, one image of the model's size"
    fits = [
        f"- {_UNITS[axis]}: {line.start:.2f} s + {line.slope:.3g} s for each, R^2 = {line.r2:.4f}"
        for axis, line in _lines(points).items()
    ]
    return "\n".join([*draw_table(head, lines, numbers=4), "", f"All else as in {base}.", "", *fits])


def _lines(points: Sequence[Point]) -> dict[str, Line]:
    return {axis: fit(of) for axis in AXES if len(of := [p for p in points if p.axis == axis]) > 1}


def draw(points: Sequence[Point]):
    """Seconds against each of the four, with their lines: a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    lines = _lines(points)
    figure = Figure(figsize=(3 * len(lines), 3), layout="constrained")
    for panel, (axis, line) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        values, seconds = zip(*((p.value, p.seconds) for p in points if p.axis == axis), strict=True)
        panel.plot((0, max(values)), (line.start, line.start + line.slope * max(values)), color="0.7")
        panel.plot(values, seconds, "o")
        panel.set(xlabel=_UNITS[axis], ylabel="seconds", title=f"R² = {line.r2:.4f}", xlim=(0, None), ylim=(0, None))
    return figure


def write(points: Sequence[Point], folder: Path) -> str:
    """``cost.csv``, ``cost.md`` and, with matplotlib, ``cost.png``; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cost.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Point)])
        rows.writeheader()
        rows.writerows(map(asdict, points))
    text = table(points)
    (folder / "cost.md").write_text(text + "\n", encoding="utf-8")
    try:
        draw(points).savefig(folder / "cost.png", dpi=120)
    except ModuleNotFoundError:
        print('No plot: pip install "vml-ldm[eval]" adds matplotlib.')
    return text
