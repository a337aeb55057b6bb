"""Any image to a size that a model can solve, and the result back. Masks here are 1 = known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.images import seamless

_NEAR = 1.5  # up to so many times the model's own size an image is solved as it is


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
            image: (1, 3, H, W) in [0, 1].
            mask: (1, 1, H, W) in [0, 1], 1 = known.
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
            painted: (1, 3, h, w) of the padded size.
            image, mask: as given to `bring`.
        """
        painted = painted[..., : self.scaled[0], : self.scaled[1]]
        if self.scaled != self.size:
            painted = F.interpolate(painted, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return seamless(image, painted, mask)


def _by(size: tuple[int, int]) -> str:
    """Width x height, as people name an image's size."""
    return f"{size[1]} x {size[0]}"
