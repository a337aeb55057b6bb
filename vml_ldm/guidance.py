"""Classifier-free guidance as a part of the prior, and SDXL's rescaling of it."""

from __future__ import annotations

from torch import Tensor


def mixed(conditional: Tensor, negative: Tensor, scale: float) -> Tensor:
    """``D_w = D_n + w (D_c - D_n)`` (Ho and Salimans, arXiv:2207.12598), from two clean estimates (B, c, h, w).

    As the noise falls it is the denoiser of ``p(z) p(c | z)^w``, to first order at any noise: the prior that a guided
    solve seeks the mode of.

    Args:
        conditional, negative: ``D(x_t; prompt)`` and ``D(x_t; negative prompt)``.
        scale: w; 1 is no guidance.
    """
    return negative + scale * (conditional - negative)


def rescaled(guided: Tensor, conditional: Tensor, x_t: Tensor, alpha: float, phi: float) -> Tensor:
    """A guided estimate whose noise has less of the contrast that guidance adds (Lin et al., arXiv:2305.08891).

    The noise that each estimate leaves, ``x_t - alpha D``, is compared: the guided one is scaled, image by image, to
    the conditional one's standard deviation, and taken with weight phi.

    Args:
        guided, conditional: (B, c, h, w), D_w and D_c.
        phi: in [0, 1], diffusers' `guidance_rescale`; 0 leaves the estimate as it is.
    """
    if phi == 0 or alpha == 0:
        return guided
    noise, like = x_t - alpha * guided, x_t - alpha * conditional
    deviation = lambda n: n.flatten(1).std(1).reshape(-1, 1, 1, 1)  # noqa: E731
    shrunk = noise * (1 + phi * (deviation(like) / deviation(noise) - 1))
    return (x_t - shrunk) / alpha
