"""How a picture became the measurement at hand; `TASKS` names what ``vml-ldm restore`` undoes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod

from torch import Tensor

from .operators import HDR, JPEG, Blur, Compose, Downsample, GaussianBlur, Grayscale, Mask, MotionBlur, Operator


@dataclass(frozen=True)
class Damage:
    """An operator whose y is a picture.

    Args:
        make: scale -> the operator of the same damage on pictures that were made so many times larger.
        factor: sides of the image over those of y.
        channels: of y, 1 or 3.
        scales: y may be scaled before it is solved. False: the damage is tied to the pixels where it was done.
        colours: it is done to pictures of three channels only.

    Raises:
        ValueError: a parameter that the operator refuses.
    """

    make: Callable[[float], Operator]
    factor: int = 1
    channels: int = 3
    scales: bool = True
    colours: bool = False

    def __post_init__(self):
        self.make(1.0)


def shrunk(factor: int, *, mode: str = "bicubic") -> Damage:
    """Lower resolution, by "bicubic" (as most programs shrink) or "average"."""
    return Damage(lambda scale: Downsample(factor, mode), factor=factor)


def blurred(*, std: float = 3.0) -> Damage:
    """A Gaussian blur of so many pixels."""
    return Damage(lambda scale: GaussianBlur(std * scale))


def shaken(*, length: float = 15.0, intensity: float = 0.5, kernel_seed: int = 0) -> Damage:
    """Motion blur along a path drawn from a seed."""
    return Damage(lambda scale: MotionBlur(length, intensity, seed=kernel_seed), scales=False)


def convolved(*, kernel: Tensor) -> Damage:
    """Blur by a kernel (h, w), which is brought to sum one."""
    return Damage(lambda scale: Blur(kernel / kernel.sum()), scales=False)


def compressed(*, quality: int = 10) -> Damage:
    """JPEG compression."""
    return Damage(lambda scale: JPEG(quality), scales=False, colours=True)


def discoloured() -> Damage:
    """No colours."""
    return Damage(lambda scale: Grayscale(), channels=1, colours=True)


def clipped(*, contrast: float = 2.0) -> Damage:
    """Contrast beyond the range, about mid-grey: shadows and lights are lost."""
    return Damage(lambda scale: HDR(contrast))


def masked(known: Tensor) -> Damage:
    """Pixels left out. Args: known (B or 1, 1, H, W), 1 = known."""
    return Damage(lambda scale: Mask(known), scales=False)


def chained(*damages: Damage) -> Damage:
    """One after another, in the order in which the picture met them.

    Raises:
        ValueError: one that takes colours comes after they are lost.
    """
    for before, after in pairwise(damages):
        if before.channels == 1 and after.colours:
            raise ValueError(
                "a damage to a picture's three channels (JPEG, Grayscale) comes after its colours were lost; expected "
                "colours. Lose them last: JPEG, then Grayscale, is nearly the same."
            )
    return Damage(
        lambda scale: Compose(*(damage.make(scale) for damage in damages)),
        factor=prod(damage.factor for damage in damages),
        channels=min(damage.channels for damage in damages),
        scales=all(damage.scales for damage in damages),
        colours=any(damage.colours for damage in damages),
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
}


def parameters(task: str) -> dict[str, inspect.Parameter]:
    """What a task can be asked for, by name."""
    every = inspect.signature(TASKS[task]).parameters
    return {name: p for name, p in every.items() if p.kind is p.KEYWORD_ONLY}
