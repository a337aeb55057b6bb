"""Operators that see each pixel alone: colour, tone and exposure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import LinearOperator, Operator, check_rho, expect


class Grayscale(LinearOperator):
    """One channel of three, which colourisation inverts: ``y = w . x``, (B, 1, H, W).

    Args:
        weights: of red, green and blue. The default is luma (ITU-R BT.601); (1/3, 1/3, 1/3) is the mean that DDRM
            (arXiv:2201.11793) and its successors use.

    pinv is exact, ``w y / |w|^2``, and tinted; `start` is grey.

    Raises:
        ValueError: not three finite weights, or all of them zero.
    """

    closed_form = True

    def __init__(self, weights: Sequence[float] = (0.299, 0.587, 0.114)):
        values = torch.as_tensor(weights, dtype=torch.float64)
        if values.shape != (3,) or not torch.isfinite(values).all() or not values.any():
            raise ValueError(f"weights are {weights}; expected three finite numbers, for red, green and blue.")
        self.weights = values.reshape(1, 3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W)."""
        expect(image, "image", ("B", 3, "H", "W"), "Pass three channels, red, green and blue.")
        return (image * self.weights.to(image)).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 3, H, W): ``w y``."""
        expect(y, "y", ("B", 1, "H", "W"), "Pass what this operator returned.")
        return y * self.weights.to(y)

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y = w y / |w|^2``, exact."""
        return self.adjoint(y) / self._norm(y)

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``(b - w (w . b) / (|w|^2 + rho)) / rho``. Arguments as in `LinearOperator.solve`."""
        rho, norm = check_rho(rho, b), self._norm(b)
        seen = self.normal(b) / norm
        return seen / (norm + rho) + (b - seen) / rho

    def start(self, y: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1]: ``y / sum(w)`` in every channel, which also agrees with y."""
        expect(y, "y", ("B", 1, "H", "W"), "Pass what this operator returned.")
        total = self.weights.sum()
        return (y / total.to(y)).expand(-1, 3, -1, -1).clamp(0, 1) if total != 0 else super().start(y)

    def _norm(self, like: Tensor) -> Tensor:
        return self.weights.square().sum().to(like)


class HDR(Operator):
    """Contrast beyond the sensor's range, clipped: ``y = clip(p + s (x - p), 0, 1)``.

    With s = 2 and p = 1/2 this is the task "HDR" of RED-diff (arXiv:2305.04391) and later work, which for images in
    [-1, 1] reads ``clip(2 x, -1, 1)``: both ends are lost. p = 0 is overexposure, ``clip(2 x, 0, 1)``.

    Args:
        scale: s, > 0.
        pivot: p in [0, 1], the value that stays.

    The gradient is zero where y is clipped. `start` undoes the scaling.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, scale: float = 2.0, pivot: float = 0.5):
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}; expected > 0, for example 2.")
        if not 0 <= pivot <= 1:
            raise ValueError(f"pivot is {pivot}; expected a number in [0, 1], the value that stays.")
        self.scale, self.pivot = float(scale), float(pivot)

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) in [0, 1]."""
        expect(image, "image", ("B", "C", "H", "W"), "Add the axes that are missing.")
        return (self.pivot + self.scale * (image - self.pivot)).clamp(0, 1)

    def start(self, y: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: ``p + (y - p) / s``, which agrees with y; clipped values stay at their bounds."""
        return (self.pivot + (y - self.pivot) / self.scale).clamp(0, 1)


class Gamma(Operator):
    """A tone curve: ``y = x^gamma`` for x >= toe, and the straight line from (0, 0) to that point below.

    The line keeps the slope finite and gives values below 0, which decoders return, an image and a gradient. With the
    default toe every 8-bit value is mapped as by the power alone.

    Args:
        gamma: exponent, > 0; about 2.2 takes pixel values to light, 1 / 2.2 brightens.
        toe: where the line ends, in (0, 1).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, gamma: float, *, toe: float = 1 / 255):
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma is {gamma}; expected > 0, for example 2.2.")
        if not 0 < toe < 1:
            raise ValueError(f"toe is {toe}; expected a number between 0 and 1, for example 1/255.")
        self.gamma, self.toe = float(gamma), float(toe)

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        expect(image, "image", ("B", "C", "H", "W"), "Add the axes that are missing.")
        return _bend(image, self.gamma, self.toe)

    def start(self, y: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: the inverse curve, exact for y in [0, 1]."""
        return _bend(y, 1 / self.gamma, self.toe**self.gamma).clamp(0, 1)


def _bend(x: Tensor, power: float, toe: float) -> Tensor:
    """``x^power`` above the toe, straight through the origin below; finite derivatives everywhere."""
    return torch.where(x < toe, x * toe ** (power - 1), x.clamp(min=toe) ** power)
