"""Diffusion of pixels: the identity as decoder, any `denoise(x, sigma)` as a `Prior`, and noise levels for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class PixelSpace:
    """Encoder and decoder of a model of images: the identity, up to the map from [0, 1] to the model's range.

    The state, its noise and z0_hat are in the model's units; images, y and sigma_y keep theirs. A model of [-1, 1]
    therefore sees a sigma_y of 0.05 as 0.1: the pull-back of `decode`, 1 / (high - low), accounts for it.

    Attributes:
        low, high: the model's values of black and white.
    """

    low, high = -1.0, 1.0

    @property
    def pixel_scale(self) -> float:
        """s of ``decode(z) = s z + constant``, see `vml_ldm.objective.Prior`."""
        return 1 / (self.high - self.low)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, c, H, W) in [0, 1] -> z0 (B, c, H, W) in [low, high]."""
        return self.low + (self.high - self.low) * image

    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, H, W) -> image (B, c, H, W), about [0, 1] and not clamped."""
        return (z - self.low) / (self.high - self.low)


class CallablePrior(PixelSpace):
    """Any denoiser of images as a `Prior`.

    Args:
        denoise: ``denoise(x, sigma) -> E[z0 | x]`` for ``x = z0 + sigma e``, the variance-exploding form, with x
            (B, c, H, W) and the number sigma in the model's units. Differentiable, unless a solver is Jacobian-free.
        low, high: the model's values of black and white.

    Raises:
        ValueError: low >= high; a level with alpha = 0, which the variance-exploding form lacks.
    """

    def __init__(self, denoise: Callable[[Tensor, float], Tensor], low: float = -1.0, high: float = 1.0):
        if not low < high:
            raise ValueError(f"the model's range is [{low}, {high}]; expected low < high, for example [-1, 1].")
        self._function, self.low, self.high = denoise, low, high

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, H, W), for ``x_t = alpha z0 + sigma e``: ``denoise(x_t / alpha, sigma / alpha)``."""
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}; expected > 0. Leave the levels of pure noise out of the schedule.")
        return self._function(x_t / alpha, sigma / alpha)


def karras_scales(count: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[tuple[float, float]]:
    """(alpha, sigma) of `count` levels for `Levels`: alpha = 1, sigma ever denser towards sigma_min.

    ``sigma_i = (sigma_max^(1/rho) + i / (count - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, i from 0
    (Karras et al., arXiv:2206.00364, eq. 5). One level is at sigma_max.

    Raises:
        ValueError: count < 1, or not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    if count < 1 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise ValueError(
            f"count is {count}, sigma_max {sigma_max}, sigma_min {sigma_min}, rho {rho}; "
            "expected count >= 1, 0 < sigma_min < sigma_max and rho > 0."
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(1.0, (first + i / max(count - 1, 1) * (last - first)) ** rho) for i in range(count)]
