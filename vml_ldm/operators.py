"""What the camera did: measurement operators, and a measurement with its noise.

An operator is any callable that maps images (B, 3, H, W) with values in [0, 1] to a measurement and that torch can
differentiate. It knows nothing of latents, schedulers or prompts. A `Measurement` binds an operator to what was
observed, ``y = A(x0) + n`` with ``n ~ N(0, sigma_y^2 I)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


class Mask:
    """Known pixels of an image: ``A(x) = m * x``, linear and its own adjoint.

    Args:
        mask: (B, 1, H, W) or (1, 1, H, W), values in [0, 1]. 1 = known, 0 = missing. A value between them scales
            the pixel and therefore weighs its squared residual by m^2.

    Raises:
        ValueError: another shape, or a value outside [0, 1].
    """

    linear = True

    def __init__(self, mask: Tensor):
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected (B, 1, H, W). Pass one channel, 1 = known.")
        if not ((mask >= 0) & (mask <= 1)).all():
            low, high = mask.min().item(), mask.max().item()
            raise ValueError(f"mask has values from {low:.3g} to {high:.3g}; expected [0, 1]. Scale it, 1 = known.")
        self.mask = mask

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self._weighed(image, "image")

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): ``A^T y = m * y``."""
        return self._weighed(y, "y")

    def count(self, y: Tensor) -> Tensor:
        """(B,): how many values were measured, ``C sum m^2``: E|m * e|^2 for an error e of unit variance."""
        squares = self.mask.square().sum(dim=(1, 2, 3)) * y.shape[1]
        return squares.expand(len(y)).to(y)

    def _weighed(self, x: Tensor, name: str) -> Tensor:
        mask = self.mask
        if x.ndim != 4 or x.shape[2:] != mask.shape[2:] or len(mask) not in (1, len(x)):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and the mask {tuple(mask.shape)}; expected {name} (B, C, H, W) and "
                "a mask (B, 1, H, W) or (1, 1, H, W). Resize one of them."
            )
        return x * mask.to(x)


class Measurement:
    """``y = A(x0) + n``, ``n ~ N(0, sigma_y^2 I)``: an operator, what was observed, and the noise.

    Args:
        operator: image (B, 3, H, W) in [0, 1] -> y, differentiable.
        y: what was observed; its first axis is the batch.
        sigma_y: the noise's standard deviation in units of y, > 0; a number or (B,). For a noiseless measurement
            through a VAE pass the VAE's own error: no sample can agree better than the decoder can draw.

    Raises:
        ValueError: sigma_y is not positive and finite, or is neither a number nor (B,).
    """

    def __init__(self, operator: Operator, y: Tensor, sigma_y: float | Tensor):
        sigma = torch.as_tensor(sigma_y, dtype=y.real.dtype, device=y.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) not in (1, len(y))):
            raise ValueError(
                f"sigma_y has shape {tuple(sigma.shape)}; expected a number or ({len(y)},), one value for each y."
            )
        if not (torch.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError(
                f"sigma_y is {sigma_y}; expected > 0, in units of y. "
                "For a noiseless y pass the model's own error, for example 0.02."
            )
        self.operator, self.y = operator, y
        self.sigma_y = sigma.expand(len(y))

    def residual(self, image: Tensor) -> Tensor:
        """``y - A(image)``, the shape of y.

        Raises:
            ValueError: ``A(image)`` has another shape than y.
        """
        seen = self.operator(image)
        if seen.shape != self.y.shape:
            raise ValueError(
                f"the operator maps an image {tuple(image.shape)} to {tuple(seen.shape)}, y has shape "
                f"{tuple(self.y.shape)}; expected the same. Make y with this operator from images of this size."
            )
        return self.y - seen

    def nll(self, image: Tensor) -> Tensor:
        """(B,): ``|y - A(image)|^2 / (2 sigma_y^2)``, the negative log-likelihood up to a constant."""
        return squares(self.residual(image)) / (2 * self.sigma_y**2)

    def count(self) -> Tensor:
        """(B,): how many values were measured, so that ``E|n|^2 = count * sigma_y^2``."""
        if hasattr(self.operator, "count"):
            return self.operator.count(self.y)
        return torch.full((len(self.y),), math.prod(self.y.shape[1:]), dtype=self.y.dtype, device=self.y.device)

    def rms(self, residual: Tensor) -> Tensor:
        """(B,): root mean square of a residual over the values that were measured, in units of y."""
        return (squares(residual) / self.count().clamp(min=1)).sqrt()


def squares(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): each item's sum of squares (of absolute values, for a complex x)."""
    return torch.view_as_real(x).square().flatten(1).sum(1) if x.is_complex() else x.square().flatten(1).sum(1)
