"""The benchmark's table, and in words where the first method is ahead of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vml_ldm.evaluation.metrics import Interval
from vml_ldm.evaluation.problems import LINEAR
from vml_ldm.evaluation.table import (
    FEWEST,
    NO_PERCEPTUAL,
    Column,
    Group,
    all_have,
    difference,
    draw_lines,
    draw_table,
    has_perceptual,
    mean,
)

CEILING = "vae-round-trip"
_AHEAD = "Ahead: in PSNR or in distance, by a paired 95 % interval of each image's mean over the noises."
_LEAST_GAIN = 0.2  # dB; of a method that is level, the interval is above minus this
_LEVEL = (
    "Against the best of the others by PSNR, in each task: mean paired differences to it and their 95 % intervals. "
    f"Level: that of the PSNR above -{_LEAST_GAIN} dB, that of the distance not above zero."
)
_COLUMNS = (
    Column("psnr", "PSNR (dB) ↑", 2),
    Column("ssim", "SSIM ↑", 3),
    Column("perceptual", "EfficientNet-Lite0 distance ↓", 3),
    Column("lpips", "LPIPS ↓", 3),
    Column("edge_error", "edge error ↓", 4),
    Column("residual", "residual", 4, paired=False),
    Column("ratio", "residual / expected", 2, paired=False),
    Column("seconds", "seconds", 2, paired=False),
    Column("denoiser_calls", "denoiser calls", 0, paired=False),
    Column("decoder_calls", "decoder calls", 0, paired=False),
    Column("network_calls", "all calls", 0, paired=False),
    Column("memory", "peak MiB", 0, paired=False),
    Column("percent_outside", "outside the networks (%)", 1, paired=False),
)
_NOTES = (
    "Means over the images; whole images count. Seconds are for one image. For linear operators every "
    "solver but red-diff, which is as its authors have it, ends with one step in pixels (`vml_ldm.measuring.settle`).",
    "Calls are forward and backward ones; all: with the small decoder's and, where they were recorded, the encoder's. "
    "Peak: memory of a batch above what was held before it. Outside the networks: what is neither theirs nor the "
    "encoder's of a call's time. LPIPS: version 0.1, on AlexNet. Edge error: of jumps across a mask's border. What a "
    "line's rows do not all have is left empty.",
    "Residual: rms of y - A(image), before the step in pixels. Expected: sqrt(sigma_y^2 + e^2), e the VAE's round-trip "
    "error of the truth as the operator sees it.",
    "start: the operator's pseudo-inverse, or what it begins from if it is not linear. smooth: the smoothest image "
    "that agrees with y, from which both RED-diffs begin where the operator is linear. "
    f"{CEILING}: the truth through the VAE, which no method can know; only a step in pixels can pass it.",
)


def benchmark_table(groups: Sequence[Group]) -> str:
    """Groups as Markdown: the table and its notes.

    Args:
        groups: labels (task, sigma_y, number of images); the first method is what others are compared to.
    """
    first, *_ = groups[0].rows
    lines = draw_benchmark_lines(groups)
    brackets = f"{first}'s 95 % intervals; of the others the mean paired differences to it, with theirs."
    notes = [*_NOTES, f"In brackets, from {FEWEST} images on: {brackets}"]
    if not has_perceptual(groups):
        notes.append(NO_PERCEPTUAL)
    return "\n".join([*lines, "", *notes])


def summary(groups: Sequence[Group]) -> str:
    """A line for each task, of every method: PSNR and perceptual distance, means over images and noises (Markdown)."""
    tasks = list(dict.fromkeys(group.labels[0] for group in groups))
    pooled = {task: over_noises([group for group in groups if group.labels[0] == task]).rows for task in tasks}
    methods = sorted(dict.fromkeys(method for rows in pooled.values() for method in rows), key=CEILING.__eq__)
    lines = [[task, *(_figures(rows.get(method)) for method in methods)] for task, rows in pooled.items()]
    told = "PSNR (dB), EfficientNet-Lite0 distance" if has_perceptual(groups) else "PSNR (dB)"
    head = f"Means over the images and noises: {told}."
    return "\n".join([head, "", *draw_table(["task", *methods], lines, numbers=len(methods))])


def _figures(rows: Sequence[Pooled] | None) -> str:
    if not rows:
        return ""
    told = all_have(rows, "perceptual")
    return f"{mean(rows, 'psnr'):.1f}" + (f", {mean(rows, 'perceptual'):.2f}" if told else "")


def draw_benchmark_lines(groups: Sequence[Group]) -> list[str]:
    """The table without its notes."""
    return draw_lines(("task", "sigma_y", "images"), groups, _COLUMNS, own=True)


class Pooled(NamedTuple):
    """An image's mean figures over several places."""

    psnr: float
    perceptual: float | None


def verdicts(groups: Sequence[Group]) -> str:
    """For each linear task, whom the first method is ahead of or behind, and its mean residual over the expected one.

    Ahead means in PSNR or in the perceptual distance, by a paired 95 % interval that excludes zero: of each image's
    mean over the noises, and at each noise. One can be ahead in one and behind in the other: both are said. The ceiling
    is no rival, nor is another form of the first method. Empty without a linear task.
    """
    tasks = [task for task in LINEAR if any(group.labels[0] == task for group in groups)]
    lines = [_verdict(task, [group for group in groups if group.labels[0] == task]) for task in tasks]
    return "\n".join([f"{_AHEAD}\n", *lines]) if lines else ""


def _verdict(task: str, groups: Sequence[Group]) -> str:
    first, rivals = next(iter(groups[0].rows)), _rivals(groups[0])
    whole = over_noises(groups)
    if len(whole.rows[first]) < FEWEST:
        return f"- {task}: fewer than {FEWEST} images, too few to say who is ahead."
    if not rivals:
        return f"- {task}: no other method to compare {first} with."
    level = [method for method in rivals if not is_ahead(whole, first, method)]
    parts = [f"- {task}: {first} is " + (f"not ahead of {', '.join(level)}" if level else "ahead of all others")]
    alone = lambda g, method: g.labels[1] + " (behind)" * bool(_behind(g, first, method))  # noqa: E731
    single = [
        f"{method} at sigma_y = {', '.join(noises)}"
        for method in rivals
        if method not in level and (noises := [alone(g, method) for g in groups if not is_ahead(g, first, method)])
    ]
    parts += [f"taken alone, not of {'; '.join(single)}"] if single else []
    behind = [f"{method} in {' and '.join(figures)}" for method in rivals if (figures := _behind(whole, first, method))]
    parts += [f"behind {', '.join(behind)}"] if behind else []
    ratios = ", ".join(f"{mean(group.rows[first], 'ratio'):.2f}" for group in groups)
    noises = ", ".join(group.labels[1] for group in groups)
    return f"{'; '.join(parts)}. Residual / expected {ratios} at sigma_y = {noises}."


def standing(groups: Sequence[Group]) -> str:
    """The first method against the best of the others in each linear task, for costs that are equal (Markdown).

    The best is the one of the highest mean PSNR; the ceiling and other forms of the first method are none. Level means
    that the paired 95 % interval of the PSNR's difference is above -0.2 dB, and that of the distance not above zero.
    The last line is over each image's mean over the tasks. Empty without a linear task of eight images.
    """
    told = [group for group in groups if group.labels[0] in LINEAR and _rivals(group) and _count(group) >= FEWEST]
    if not told:
        return ""
    first, *_ = told[0].rows
    head = ["task", "sigma_y", "best other", f"{first}: PSNR (dB)", "distance", "level or ahead"]
    pairs = [(group.rows[first], group.rows[_best(group)]) for group in told]
    lines = [[*group.labels[:2], _best(group), *_stand(*pair)] for group, pair in zip(told, pairs, strict=True)]
    shared = set.intersection(*({row.image for row in ours} for ours, _ in pairs))
    ours, best = ([_over([rows[side] for rows in pairs], image) for image in sorted(shared)] for side in (0, 1))
    if len(shared) >= FEWEST:
        lines.append(["mean", "", "", *_stand(ours, best)])
    return "\n".join([f"{_LEVEL}\n", *draw_table(head, lines, numbers=0)])


def _count(group: Group) -> int:
    return len(next(iter(group.rows.values())))


def _rivals(group: Group) -> list[str]:
    """Methods that are neither the ceiling nor a form of the first one."""
    first, *others = group.rows
    return [method for method in others if method != CEILING and not method.startswith(f"{first}-")]


def _best(group: Group) -> str:
    return max(_rivals(group), key=lambda method: mean(group.rows[method], "psnr"))


def _stand(ours: Sequence, best: Sequence) -> list[str]:
    """Both paired differences with their intervals, and whether ours is level or ahead."""
    psnr = difference(ours, best, "psnr")
    told = all_have((*ours, *best), "perceptual")
    distance = difference(ours, best, "perceptual") if told else None
    is_level = psnr.low > -_LEAST_GAIN and (distance is None or distance.low <= 0)
    write = lambda d, digits: f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"  # noqa: E731
    return [write(psnr, 2), write(distance, 3) if distance else "", "yes" if is_level else "no"]


def _behind(group: Group, ours: str, other: str) -> list[str]:
    """The figures in which `other` is better than `ours`, the interval without zero."""
    psnr, distance = (difference(group.rows[ours], group.rows[other], "psnr"), _distance(group, ours, other))
    return ["PSNR"] * (psnr is not None and psnr.high < 0) + ["distance"] * (distance is not None and distance.low > 0)


def _distance(group: Group, ours: str, other: str) -> Interval | None:
    """The paired difference of the perceptual distances, where every row has it."""
    return difference(group.rows[ours], group.rows[other], "perceptual") if has_perceptual([group]) else None


def over_noises(groups: Sequence[Group]) -> Group:
    """One group of a task's groups: each image's mean over the noises, of the images that all noises have."""
    shared = set.intersection(*({row.image for row in next(iter(group.rows.values()))} for group in groups))
    images = [row.image for row in next(iter(groups[0].rows.values())) if row.image in shared]
    return Group(groups[0].labels[:1], {method: _pool(method, groups, images) for method in groups[0].rows})


def _pool(method: str, groups: Sequence[Group], images: Sequence[str]) -> list[Pooled]:
    return [_over([group.rows[method] for group in groups], image) for image in images]


def _over(found: Sequence[Sequence], image: str) -> Pooled:
    """An image's means over several lists of rows."""
    rows = [row for rows in found for row in rows if row.image == image]
    told = all_have(rows, "perceptual")
    return Pooled(mean(rows, "psnr"), mean(rows, "perceptual") if told else None)


def is_ahead(group: Group, ours: str, other: str) -> bool:
    """Whether `ours` has a higher PSNR or a smaller perceptual distance than `other`, the interval without zero."""
    psnr, distance = difference(group.rows[ours], group.rows[other], "psnr"), _distance(group, ours, other)
    return (psnr is not None and psnr.low > 0) or (distance is not None and distance.high < 0)
