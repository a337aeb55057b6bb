"""Quality against what it costs, and the residual against the level, of the benchmark's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from vml_ldm.evaluation.rows import read_levels
from vml_ldm.evaluation.table import Group, all_have, difference, has_field, mean

_COLUMNS = 4
_PANEL = (3.2, 2.6)  # inches
_LABEL = (1.8, 0.22)  # of a name in the legend
_COSTS = {"seconds": "seconds for an image", "network_calls": "network calls"}


def draw_levels(groups: Sequence[Group]):
    """Residual against a level's noise, means over the images, a panel for each task: a matplotlib `Figure`.

    The star is the answer's own, where corrections have followed the levels; dashed is what is expected of the truth
    after the VAE's round trip.

    Args:
        groups: labels (task, sigma_y, number of images), in the table's order; every task's largest noise is drawn.
    """
    return _draw_panels(groups, _draw_curves)


def _draw_curves(panel, group: Group, colors: dict[str, str]) -> None:
    first = next(iter(group.rows.values()))
    panel.axhline(mean(first, "expected"), color="0.5", linestyle="--", linewidth=1, zorder=0)
    for method, rows in group.rows.items():
        if not all_have(rows, "levels"):
            continue
        levels = list(zip(*(read_levels(row.levels) for row in rows), strict=False))
        noise = [level[0][0] for level in levels]
        residual = [sum(value for _, value in level) / len(level) for level in levels]
        panel.plot(noise, residual, color=colors[method], marker=".", label=method)
        end = 0.7 * noise[-1], mean(rows, "residual")
        panel.plot([noise[-1], end[0]], [residual[-1], end[1]], color=colors[method], linestyle=":")
        panel.plot(*end, color=colors[method], marker="*", markersize=9)
    task, sigma_y, _ = group.labels
    panel.set(title=f"{task}, sigma_y = {sigma_y}", xlabel="sigma / alpha", ylabel="rms of y - A(image)")
    panel.set(xscale="log", yscale="log")
    panel.invert_xaxis()


def draw_quality(groups: Sequence[Group], cost: str):
    """PSNR against a field of the rows, a panel for each task, of its largest noise: a matplotlib `Figure`.

    Bars are 95 % intervals of the mean paired difference to the first method, whose PSNR is a grey line: a bar that
    crosses it is level. Without eight images there are none. Methods that cost nothing are lines across the panel.

    Args:
        groups: labels (task, sigma_y, number of images), in the table's order.
        cost: "seconds" or "network_calls".
    """
    return _draw_panels(groups, lambda panel, group, colors: _draw_points(panel, group, cost, colors))


def _draw_panels(groups: Sequence[Group], draw: Callable):
    """A panel for each task, of its largest noise, with one legend for all."""
    from matplotlib.figure import Figure

    last = [list(of)[-1] for _, of in groupby(groups, key=lambda group: group.labels[0])]
    width = min(_COLUMNS, len(last))
    height = -(-len(last) // width)
    colors = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(m for group in last for m in group.rows))}
    per_line = max(1, min(6, int(_PANEL[0] * width / _LABEL[0])))
    lines = -(-len(colors) // per_line)
    size = (_PANEL[0] * width, _PANEL[1] * height + 0.2 + _LABEL[1] * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(height, width, squeeze=False).flat)
    for panel, group in zip(panels, last, strict=False):
        draw(panel, group, colors)
    for panel in panels[len(last) :]:
        panel.set_visible(False)
    legends = (panel.get_legend_handles_labels() for panel in panels)
    handles = {label: handle for of in legends for handle, label in zip(*of, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=per_line, frameon=False)
    return figure


def _draw_points(panel, group: Group, cost: str, colors: dict[str, str]) -> None:
    first = next(iter(group.rows))
    panel.axhline(mean(group.rows[first], "psnr"), color="0.8", zorder=0)
    for method, rows in group.rows.items():
        spent, psnr = mean(rows, cost), mean(rows, "psnr")
        if spent < 0.1:  # no network has run
            panel.axhline(psnr, color=colors[method], linestyle=":", label=method)
        else:
            apart = None if method == first else difference(rows, group.rows[first], "psnr")
            bar = apart and [[apart.mean - apart.low], [apart.high - apart.mean]]
            panel.errorbar(spent, psnr, bar, color=colors[method], marker="o", capsize=2, label=method)
    task, sigma_y, _ = group.labels
    panel.set(title=f"{task}, sigma_y = {sigma_y}", xlabel=_COSTS[cost], ylabel="PSNR (dB)")
    panel.set_xlim(0, 1.08 * max(mean(rows, cost) for rows in group.rows.values()) or 1)


def draw_all(groups: Sequence[Group]) -> dict[str, object]:
    """Figures by the name of their file: of the costs that every row has (none for fewer than two images), and of the
    residual by level where the first method has told it."""
    enough = bool(groups) and all(len(rows) > 1 for group in groups for rows in group.rows.values())
    figures = {f"quality-{cost}": draw_quality(groups, cost) for cost in _COSTS if enough and has_field(groups, cost)}
    told = [g for g in groups if all_have(next(iter(g.rows.values())), "levels")]
    return figures | ({"residual-levels": draw_levels(told)} if told else {})
