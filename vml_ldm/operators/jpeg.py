"""JPEG compression in torch: what a baseline encoder and decoder make of an image, with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Operator, expect

# Quantisation steps for quality 50, rows are vertical frequencies: ITU-T T.81, Annex K, tables K.1 and K.2.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
# Y, Cb, Cr from R, G, B: JFIF, full range.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class JPEG(Operator):
    """The image after JPEG compression: 8 x 8 cosine transform, quantisation, and back.

    Steps: Y, Cb, Cr (JFIF); chroma averaged over 2 x 2 pixels; for each block ``q round(D x D^T / q)`` with the
    standard tables, scaled by the quality as libjpeg does; chroma interpolated linearly, as libjpeg does; clipped to
    [0, 1]. Images are padded to whole blocks by repeating their last row and column. Values between the steps are not
    rounded to 8 bits.

    Args:
        quality: a whole number from 1 (worst) to 100.
        subsample: chroma at half the resolution (4:2:0, the encoders' default); False keeps it (4:4:4).

    Forward it really rounds and clips; backward both count as the identity (a straight-through gradient), so that the
    derivative is that of the colour and block transforms. `start` is y itself.

    Raises:
        ValueError: the quality is no whole number from 1 to 100; at the call, an image without three channels.
    """

    def __init__(self, quality: int, subsample: bool = True):
        if int(quality) != quality or not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}; expected a whole number from 1 to 100.")
        self.quality, self.subsample = int(quality), bool(subsample)

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W) in [0, 1]."""
        expect(image, "image", ("B", 3, "H", "W"), "Pass three channels, red, green and blue.")
        height, width = image.shape[2:]
        unit = 16 if self.subsample else 8
        whole = F.pad(255 * image, (0, -width % unit, 0, -height % unit), mode="replicate")
        to_ycbcr = torch.tensor(_YCBCR, dtype=torch.float64)
        planes = _mix(whole, to_ycbcr)
        luma, chroma = planes[:, :1] - 128, planes[:, 1:]  # both about zero
        if self.subsample:
            chroma = F.avg_pool2d(chroma, 2)
        luma, chroma = _quantise(luma, _LUMA, self.quality), _quantise(chroma, _CHROMA, self.quality)
        if self.subsample:
            chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        decoded = _mix(torch.cat([luma + 128, chroma], 1), torch.linalg.inv(to_ycbcr))
        return _straight(decoded / 255, lambda x: x.clamp(0, 1))[..., :height, :width]

    def start(self, y: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1]: the decoded image, y."""
        expect(y, "y", ("B", 3, "H", "W"), "Pass what this operator returned.")
        return y.clamp(0, 1)


def quality_of(steps: Sequence[int]) -> tuple[int, bool]:
    """The quality whose luma steps are nearest to a file's, and whether they are the same.

    Args:
        steps: 64 quantisation steps, row by row.
    """
    given = torch.tensor(steps).reshape(8, 8)
    away = [(_steps(_LUMA, quality) - given).abs().sum().item() for quality in range(1, 101)]
    least = min(away)
    return away.index(least) + 1, least == 0


def _mix(planes: Tensor, matrix: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H, W): channels mixed by a 3 x 3 matrix."""
    return torch.einsum("ij,bjhw->bihw", matrix.to(planes), planes)


def _quantise(planes: Tensor, table: tuple, quality: int) -> Tensor:
    """Planes (B, C, 8 m, 8 n), values about -128 to 127, after the rounding of their blocks' coefficients."""
    batch, channels, height, width = planes.shape
    dct, steps = _cosines().to(planes), _steps(table, quality).to(planes)
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    levels = _straight(dct @ blocks @ dct.mT / steps, torch.round)
    return (dct.mT @ (levels * steps) @ dct).transpose(3, 4).reshape(planes.shape)


def _steps(table: tuple, quality: int) -> Tensor:
    """(8, 8): the quantisation steps of a quality, whole numbers from 1 to 255, by libjpeg's rule."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * percent + 50) // 100).clamp(1, 255)


def _cosines() -> Tensor:
    """(8, 8): the orthonormal cosine transform, a frequency in each row."""
    place = torch.arange(8, dtype=torch.float64)
    waves = torch.cos(math.pi * place[:, None] * (2 * place + 1) / 16) / 2
    waves[0] /= math.sqrt(2)
    return waves


def _straight(x: Tensor, step) -> Tensor:
    """``step(x)`` forward, the identity backward."""
    return x + (step(x) - x).detach()
