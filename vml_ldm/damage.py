"""How a picture became the measurement at hand; `TASKS` names what ``vml-ldm restore`` undoes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

from torch import Tensor

from .operators import (
    HDR,
    JPEG,
    Blur,
    Compose,
    Crop,
    Downsample,
    Gamma,
    GaussianBlur,
    Grayscale,
    Mask,
    MotionBlur,
    NonlinearBlur,
    Operator,
    Subsample,
)

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Damage:
    """An operator whose y is a picture.

    Args:
        build: scale, size of the image -> the operator of the same damage on pictures that were made so many times
            larger. The size is None where the operator takes images of any.
        factors: sides of the image, down and across, over those of y.
        margins: how much larger than that the image is: above, to the right, below, to the left.
        channels: of y, 1 or 3.
        scales: y may be scaled before it is solved. False: the damage is tied to the pixels where it was done.
        colours: it takes images of three channels only.

    Raises:
        ValueError: a parameter that the operator refuses.
    """

    build: Callable[[float, Size | None], Operator]
    factors: tuple[int, int] = (1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    channels: int = 3
    scales: bool = True
    colours: bool = False

    def __post_init__(self):
        self.make(1.0, self.image_size((1, 1)))

    def make(self, scale: float = 1.0, size: Size | None = None) -> Operator:
        """The operator on images that were scaled, of this size."""
        return self.build(scale, size)

    def image_size(self, seen: Size, scale: float = 1.0) -> Size:
        """Of the image, from y's."""
        above, right, below, left = (round(scale * margin) for margin in self.margins)
        return self.factors[0] * seen[0] + above + below, self.factors[1] * seen[1] + left + right

    def seen_size(self, image: Size, scale: float = 1.0) -> Size:
        """Of y, from the image's; rounded down where the image is not whole."""
        extra = self.image_size((0, 0), scale)
        return (image[0] - extra[0]) // self.factors[0], (image[1] - extra[1]) // self.factors[1]


def shrunk(factor: int, *, mode: str = "bicubic") -> Damage:
    """Lower resolution, by "bicubic" (as most programs shrink) or "average"."""
    return Damage(lambda scale, size: Downsample(factor, mode), factors=(factor, factor))


def blurred(*, std: float = 3.0) -> Damage:
    """A Gaussian blur of so many pixels."""
    return Damage(lambda scale, size: GaussianBlur(std * scale))


def shaken(*, length: float = 15.0, intensity: float = 0.5, kernel_seed: int = 0) -> Damage:
    """Motion blur along a path drawn from a seed."""
    return Damage(lambda scale, size: MotionBlur(length, intensity, seed=kernel_seed), scales=False)


def convolved(*, kernel: Tensor) -> Damage:
    """Blur by a kernel (h, w), which is brought to sum one."""
    return Damage(lambda scale, size: Blur(kernel / kernel.sum()), scales=False)


def compressed(*, quality: int = 10) -> Damage:
    """JPEG compression."""
    return Damage(lambda scale, size: JPEG(quality), scales=False, colours=True)


def discoloured() -> Damage:
    """No colours."""
    return Damage(lambda scale, size: Grayscale(), channels=1, colours=True)


def clipped(*, contrast: float = 2.0) -> Damage:
    """Contrast beyond the range, about mid-grey: shadows and lights are lost."""
    return Damage(lambda scale, size: HDR(contrast))


def masked(known: Tensor) -> Damage:
    """Pixels left out. Args: known (B or 1, 1, H, W), 1 = known."""
    return Damage(lambda scale, size: Mask(known), scales=False)


def surrounded(*, margin: int | tuple[int, int, int, int] = 16) -> Damage:
    """What lay so many pixels around the picture was cut off: on every side, or above, right, below and left."""
    margins = (margin,) * 4 if isinstance(margin, (int, float)) else tuple(margin)
    if len(margins) != 4 or min(margins) < 0 or any(int(n) != n for n in margins):
        raise ValueError(f"margin is {margin}; expected pixels >= 0, one number or four: above, right, below, left.")

    def crop(scale: float, size: Size) -> Operator:
        above, right, below, left = (round(scale * n) for n in margins)
        return Crop(size, above, left, size[0] - above - below, size[1] - left - right)

    return Damage(crop, margins=tuple(int(n) for n in margins))


def bent(*, gamma: float = 2.2) -> Damage:
    """A tone curve, ``y = x^gamma``."""
    return Damage(lambda scale, size: Gamma(gamma))


def glowing(*, std: float = 3.0, gamma: float = 2.2) -> Damage:
    """A Gaussian blur of light, shown through a tone curve."""
    return Damage(lambda scale, size: NonlinearBlur(GaussianBlur(std * scale), gamma))


def interlaced(*, rows: int = 2, columns: int = 1) -> Damage:
    """Every so many-th row and column kept, the others cut out."""
    if min(rows, columns) < 1 or int(rows) != rows or int(columns) != columns:
        raise ValueError(f"rows and columns are {rows} and {columns}; expected whole numbers >= 1, 1 keeps all.")
    steps = int(rows), int(columns)
    return Damage(lambda scale, size: Subsample(size, *steps), factors=steps, scales=False)


def chained(*damages: Damage) -> Damage:
    """One after another, in the order in which the picture met them.

    Raises:
        ValueError: colours are needed after they were lost.
    """
    for before, after in pairwise(damages):
        if before.channels == 1 and after.colours:
            raise ValueError(
                "a damage to a picture's three channels (JPEG, Grayscale) comes after its colours were lost; expected "
                "colours. Lose them last: JPEG, then Grayscale, is nearly the same."
            )

    return reduce(_joined, damages)


def _joined(first: Damage, then: Damage) -> Damage:
    """Two damages in a row, whose sizes are ``image = f (g y + m) + n``."""

    def build(scale: float, size: Size | None) -> Operator:
        before, after = first.make(scale, size), then.make(scale, size and first.seen_size(size, scale))
        return Compose(*(before.operators if isinstance(before, Compose) else (before,)), after)

    (down, across), (above, right, below, left) = first.factors, then.margins
    resized = first.factors != (1, 1) or any(first.margins)
    grown = (down * above, across * right, down * below, across * left)
    return Damage(
        build,
        factors=(down * then.factors[0], across * then.factors[1]),
        margins=tuple(m + n for m, n in zip(grown, first.margins, strict=True)),
        channels=min(first.channels, then.channels),
        scales=first.scales and then.scales and not (any(then.margins) and resized),
        colours=first.colours or then.colours,
    )


def without_unknown(operator: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """y as the operator gives it: where its last part is a mask, what that left out is zero, whatever was handed in."""
    while isinstance(operator, Compose):
        operator = operator.operators[-1]
    return operator(y) if isinstance(operator, Mask) else y


TASKS: dict[str, Callable[..., Damage]] = {
    "sr4": partial(shrunk, 4),
    "sr8": partial(shrunk, 8),
    "deblur": blurred,
    "motion": shaken,
    "kernel": convolved,
    "jpeg": compressed,
    "colorize": discoloured,
    "hdr": clipped,
    "crop": surrounded,
    "gamma": bent,
    "nonlinear": glowing,
    "rows": interlaced,
}
JOIN = "+"  # between the names of damages that a picture met one after another


def split(task: str) -> tuple[str, ...]:
    """The names in a task. Raises ValueError for one that is none."""
    names = tuple(task.split(JOIN))
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(
            f"task is {unknown[0]!r}; expected one of {', '.join(TASKS)}, or several joined by {JOIN} in the order in "
            "which the picture met them."
        )
    return names


def parameters(task: str) -> dict[str, inspect.Parameter]:
    """What a task can be asked for, by name; one that several of its damages have is asked of all of them."""
    every = [p for name in split(task) for p in inspect.signature(TASKS[name]).parameters.values()]
    return {p.name: p for p in every if p.kind is p.KEYWORD_ONLY}


def damage(task: str, **given) -> Damage:
    """A task's damage.

    Raises:
        ValueError: an unknown task, or a parameter that its operator refuses.
        TypeError: a parameter that the task does not have.
    """
    if foreign := [name for name in given if name not in parameters(task)]:
        raise TypeError(f"{foreign[0]} is no parameter of {task}; expected {', '.join(parameters(task)) or 'none'}.")
    own = [{name: value for name, value in given.items() if name in parameters(part)} for part in split(task)]
    every = [TASKS[name](**values) for name, values in zip(split(task), own, strict=True)]
    return every[0] if len(every) == 1 else chained(*every)


PARAMETERS = tuple(dict.fromkeys(name for task in TASKS for name in parameters(task)))
