"""Any image, or any picture-shaped measurement, to a size that a model can solve, and the result back.

Masks here are 1 = known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.images import seamless
from vml_ldm.operators import Compose, Crop, Operator

Size = tuple[int, int]  # (height, width)
OVERSIZE = ("refuse", "resize", "crop", "fit", "whole")  # what is done to what is too large, see `Window.choose`
_NEAR = 1.5  # up to so many times the model's own size an image is solved as it is
_GRID = 16  # a measurement is cropped at multiples of it, which are corners of JPEG's blocks too


@dataclass(frozen=True)
class Fit:
    """Three sizes (height, width) in pixels: of the image, scaled for the model, padded to the VAE's stride."""

    size: tuple[int, int]
    scaled: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def choose(cls, size: tuple[int, int], native: int, stride: int, shorter: int | None = None) -> Fit:
        """Scale so that the shorter side is ``shorter``, then pad below and to the right to the stride.

        Args:
            size: (height, width) of the image.
            native: side of the images that the model was trained on.
            stride: pixels for each latent, of the VAE.
            shorter: None is native, except that an image of native to 1.5 native is left at its size.
        """
        side = min(size)
        keep = shorter is None and native <= side <= _NEAR * native
        target = side if keep else (shorter or native)
        height, width = (round(length * target / side) for length in size)
        padded = math.ceil(height / stride) * stride, math.ceil(width / stride) * stride
        return cls(size, (height, width), padded)

    def text(self) -> str:
        """One line that says what is done to the size."""
        if self.size == self.padded:
            return f"size       {_by(self.size)}, solved as it is"
        steps = [] if self.scaled == self.size else [f"scaled to {_by(self.scaled)}"]
        steps += [] if self.padded == self.scaled else [f"padded to {_by(self.padded)} and cropped again"]
        return f"size       {_by(self.size)}, {', '.join(steps)} for the solver; the result is {_by(self.size)}"

    def bring(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The image and mask as the solver gets them.

        A scaled pixel is the average of the *known* pixels that it covers, and its mask is the share of them:
        nothing of what is to be repainted enters. Padding is unknown.

        Args:
            image: (B, 3, H, W) in [0, 1].
            mask: (B, 1, H, W) in [0, 1], 1 = known.
        """
        if self.scaled != self.size:
            share = self._scale(mask)
            image = torch.where(share > 0, self._scale(image * mask) / share.clamp(min=1e-6), 0.5)
            image, mask = image.clamp(0, 1), share.clamp(0, 1)
        below, right = (padded - scaled for padded, scaled in zip(self.padded, self.scaled, strict=True))
        return F.pad(image, (0, right, 0, below), mode="replicate"), F.pad(mask, (0, right, 0, below))

    def _scale(self, x: Tensor) -> Tensor:
        if self.scaled[0] < self.size[0]:
            return F.interpolate(x, self.scaled, mode="area")
        return F.interpolate(x, self.scaled, mode="bilinear")

    def take_back(self, painted: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """The solver's image at the first size, with the known pixels of the first image in it, unchanged.

        Args:
            painted: (B, 3, h, w) of the padded size.
            image, mask: as given to `bring`.
        """
        painted = painted[..., : self.scaled[0], : self.scaled[1]]
        if self.scaled != self.size:
            painted = F.interpolate(painted, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return seamless(image, painted, mask)


@dataclass(frozen=True)
class Window:
    """Which part of a measurement is solved, and at which size. Sizes are (height, width) in pixels.

    Attributes:
        found: of the measurement.
        scaled: of it after scaling, by `scale`.
        used: of the middle of that.
        image: of the image that it measures.
        canvas: of the image that the model makes; its lower and right rim, beyond `image`, is not measured.
        result: of what is handed back, if it is not `image`.
    """

    found: Size
    scaled: Size
    used: Size
    image: Size
    canvas: Size
    scale: float = 1.0
    result: Size | None = None

    @classmethod
    def choose(
        cls,
        found: Size,
        native: int,
        stride: int,
        *,
        grow: Callable[[Size, float], Size] = lambda size, scale: size,
        scales: bool = True,
        oversize: str = "refuse",
    ) -> Window:
        """The measurement as it is, if the image's shorter side is native to 1.5 native.

        One of a smaller image is scaled up, and the result scaled back; one that is tied to its pixels is left as it
        is. What is done to one of a larger image, by `oversize`:

            "refuse"    it is refused
            "resize"    scaled down until the image is native; the result is as large as that
            "crop"      its middle is used, up to an image of 1.5 native each way
            "fit"       "resize", or "crop" where it is tied to its pixels
            "whole"     nothing: it is solved at its size

        Args:
            found: of the measurement.
            native: side of the images that the model was trained on.
            stride: pixels, of which the canvas's sides are multiples.
            grow: size of a measurement, how much it was scaled -> size of the image.
            scales: False: tied to its pixels.

        Raises:
            ValueError: an image that is larger, with "refuse", or with "resize" where it is tied; another `oversize`.
        """
        if oversize not in OVERSIZE:
            raise ValueError(f"oversize is {oversize!r}; expected one of {', '.join(OVERSIZE)}.")
        oversize = ("resize" if scales else "crop") if oversize == "fit" else oversize
        image, most = grow(found, 1.0), int(_NEAR * native)
        scale, used, result = 1.0, found, None
        if min(image) > most and (oversize == "refuse" or (oversize == "resize" and not scales)):
            raise ValueError(_too_large(found, image, native, most, scales))
        if min(image) > most and oversize == "resize":
            scale = native / min(image)
        elif min(image) < native and scales:
            scale, result = native / min(image), image
        scaled = tuple(max(1, round(scale * length)) for length in found)
        used = (
            tuple(_longest(grow, scaled, axis, most) for axis in (0, 1))
            if oversize == "crop" and scale == 1
            else scaled
        )
        image = grow(used, scale)
        return cls(found, scaled, used, image, tuple(math.ceil(n / stride) * stride for n in image), scale, result)

    def text(self) -> str:
        """One line that says what is done to the size."""
        steps = [] if self.scaled == self.found else [f"scaled to {_by(self.scaled)}"]
        steps += [] if self.used == self.scaled else [f"of which the middle {_by(self.used)} is used"]
        steps += [f"solved at {_by(self.canvas)}" + ("" if self.canvas == self.image else " and cropped")]
        return f"size       {_by(self.found)}, {', '.join(steps)}; the result is {_by(self.result or self.image)}"

    def bring(self, y: Tensor) -> Tensor:
        """Measurements (B, C, h, w) in [0, 1] as the solver gets it."""
        if self.scaled != self.found:
            y = F.interpolate(y, self.scaled, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((whole - part) // 2 // _GRID * _GRID for whole, part in zip(self.scaled, self.used, strict=True))
        return y[..., top : top + self.used[0], left : left + self.used[1]]

    def see(self, operator: Operator) -> Operator:
        """The operator on the whole canvas, of one on images of the measured size."""
        return operator if self.canvas == self.image else Compose(Crop(self.canvas, 0, 0, *self.image), operator)

    def take_back(self, canvas: Tensor) -> Tensor:
        """The measured part of the solver's image, at the size of the result."""
        image = canvas[..., : self.image[0], : self.image[1]]
        if self.result in (None, self.image):
            return image
        return F.interpolate(image, self.result, mode="bicubic", antialias=True).clamp(0, 1)


def _longest(grow: Callable[[Size, float], Size], scaled: Size, axis: int, most: int) -> int:
    """The length of a measurement along an axis whose image has at most so many pixels, at least 1."""
    lengths = range(scaled[axis], 0, -1)
    return next((n for n in lengths if grow((n, n), 1.0)[axis] <= most), 1)


def _too_large(found: Size, image: Size, native: int, most: int, scales: bool) -> str:
    same = "" if found == image else f", whose result would have {_by(image)}"
    shrink = "resize (--resize) to shrink it first, " if scales else ""
    tied = "" if scales else " (It is tied to its pixels, and cannot be shrunk.)"
    return (
        f"the picture has {_by(found)} pixels{same}; expected a result whose shorter side is at most {most}, as the "
        f"model was trained on {native} x {native}. Choose {shrink}crop (--crop) to use its middle, or whole (--whole) "
        f"to solve it all the same.{tied}"
    )


def _by(size: tuple[int, int]) -> str:
    """Width x height, as people name an image's size."""
    return f"{size[1]} x {size[0]}"
