"""Any image, or any picture-shaped measurement, to a size that a model can solve, and the result back.

Masks here are 1 = known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.images import seamless
from vml_ldm.operators import Compose, Crop, Operator

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
        image: of the image that it measures, a factor larger than `used`.
        canvas: of the image that the model makes; its lower and right rim, beyond `image`, is not measured.
    """

    found: tuple[int, int]
    scaled: tuple[int, int]
    used: tuple[int, int]
    image: tuple[int, int]
    canvas: tuple[int, int]
    scale: float = 1.0

    @classmethod
    def choose(
        cls, found: tuple[int, int], native: int, stride: int, *, factor: int = 1, scales: bool = True
    ) -> Window:
        """Scale so that the image's shorter side is native, unless it is native to 1.5 native already.

        A measurement that is tied to its pixels is not scaled; the middle of it is used, up to 1.5 native each way.

        Args:
            found: of the measurement.
            native: side of the images that the model was trained on.
            stride: pixels for each latent, of the VAE.
            factor: sides of the image over those of the measurement.
            scales: False: tied to its pixels.
        """
        side = factor * min(found)
        keep = not scales or native <= side <= _NEAR * native
        scale = 1.0 if keep else native / side
        scaled = tuple(max(1, round(scale * length)) for length in found)
        most = max(scaled) if scales else int(_NEAR * native)
        used = tuple(min(length, most) for length in scaled)
        image = tuple(factor * length for length in used)
        return cls(found, scaled, used, image, tuple(math.ceil(n / stride) * stride for n in image), scale)

    def text(self) -> str:
        """One line that says what is done to the size."""
        steps = [] if self.scaled == self.found else [f"scaled to {_by(self.scaled)}"]
        steps += [] if self.used == self.scaled else [f"of which the middle {_by(self.used)} is used"]
        steps += [f"solved at {_by(self.canvas)}" + ("" if self.canvas == self.image else " and cropped")]
        return f"size       {_by(self.found)}, {', '.join(steps)}; the result is {_by(self.image)}"

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
        """The measured part of the solver's image."""
        return canvas[..., : self.image[0], : self.image[1]]


def _by(size: tuple[int, int]) -> str:
    """Width x height, as people name an image's size."""
    return f"{size[1]} x {size[0]}"
