"""What of an image is known, where a mask is 1, and what is not: pasting, and filling holes smoothly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CARRY, _CARRY_FLOOR = 1.0, 0.02  # pixels, and the weight of doing nothing; chosen on the validation images


def composite(known: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """``m known + (1 - m) image``: bit-equal to known where m = 1, and to image where m = 0.

    Args:
        known, image: (B, 3, H, W).
        mask: (B, 1, H, W) in [0, 1], 1 = known.
    """
    mixed = mask * known + (1 - mask) * image
    return torch.where(mask == 1, known, torch.where(mask == 0, image, mixed))


def seamless(known: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`composite` without a seam: what the image misses of the known pixels is carried a pixel or two into the hole.

    ``image + G * (m r) / (G * m + 0.02)``, ``r = known - image``, G a Gaussian of one pixel (a normalised convolution):
    beside known pixels the decoder's own error is taken off, farther in nothing changes.

    Args:
        known, image: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W) in [0, 1], 1 = known. Known pixels come back bit-equal.
    """
    near = _blur(mask * (known - image)) / (_blur(mask) + _CARRY_FLOOR)
    return composite(known, (image + near).clamp(0, 1), mask)


def _blur(x: Tensor) -> Tensor:
    """(B, C, H, W) -> the same: a Gaussian of `_CARRY` pixels, zero outside the image."""
    place = torch.arange(-4, 5, dtype=x.dtype, device=x.device)
    kernel = torch.softmax(-place.square() / (2 * _CARRY**2), 0).expand(x.shape[1], 1, 1, -1)
    rows = F.conv2d(x, kernel, padding=(0, 4), groups=x.shape[1])
    return F.conv2d(rows, kernel.mT, padding=(4, 0), groups=x.shape[1])


def fill_holes(image: Tensor, mask: Tensor) -> Tensor:
    """A smooth guess of the missing pixels, by push-pull: averages of what is known, from ever coarser grids.

    Known pixels (m = 1) stay; nothing known at all gives mid-grey.

    Args:
        image: (B, C, H, W).
        mask: (B, 1, H, W) in [0, 1], 1 = known; the weight of a pixel in the averages.
    """
    height, width = image.shape[-2:]
    if height == width == 1:
        return torch.where(mask > 0, image, 0.5)
    pad = (0, width % 2, 0, height % 2)
    weight = F.avg_pool2d(F.pad(mask, pad), 2)
    pooled = F.avg_pool2d(F.pad(image * mask, pad), 2) / weight.clamp(min=1e-8)
    coarse = fill_holes(pooled, (4 * weight).clamp(max=1))
    guess = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return mask * image + (1 - mask) * guess
