"""Classifier-free guidance as the solvers take it: a push of the next state, held to what the state leaves open."""

from __future__ import annotations

import math

from torch import Tensor

REACH = 0.1  # chosen on the validation images


def pushed(z0_hat: Tensor, push: Tensor, alpha: float, sigma: float) -> Tensor:
    """``z0_hat + p`` with p the push (B, c, h, w), shortened image by image to what x_t leaves open.

    Latents have unit variance, so at noise sigma / alpha a Gaussian would leave z0 the standard deviation
    ``s = sigma / hypot(alpha, sigma)``; rms(p) is held to `REACH` s.

    Args:
        push: ``(w - 1) (D(x_t; prompt) - D(x_t; negative))`` of classifier-free guidance at scale w.
    """
    reach = REACH * sigma / math.hypot(alpha, sigma)
    rms = push.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return z0_hat + push * (reach / rms.clamp(min=reach))
