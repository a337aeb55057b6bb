"""How x_t moves inside one noise level: the descent direction, its length, and when to stop.

Directions and lengths are in variance-exploding (VE) units, ``x_t / alpha``, where they compare with z0_hat:
``x_t += alpha * eta * d``. Everything is per image: a batch moves as its images would move alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objective import DataTerm, Prior, PullBack, bracket, data_term, denoise_pullback
from .operators import Measurement, squares

JACOBIANS = ("exact", "free")
_PROBE = 0.05  # rms change of the latent over which the decoder's directional derivative is taken


class Descent(NamedTuple):
    """What the inner steps of one level did.

    Attributes:
        x_t: (B, c, h, w), the state after them.
        z0_hat: (B, c, h, w), the clean estimate there.
        residual: (B,), rms of y - A(Dec(z0_hat)) over the measured values at the last evaluation, in units of y.
        nll: (B,), the negative log-likelihood there.
        steps: (B,), how many steps each image took.
    """

    x_t: Tensor
    z0_hat: Tensor
    residual: Tensor
    nll: Tensor
    steps: Tensor


def descend(
    x_t: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    alpha: float,
    sigma: float,
    steps: int,
    jacobian: str = "exact",
    stop_at: float = 1.0,
) -> Descent:
    """Up to `steps` steps down VML_S at one level; an image rests once its residual is at the noise.

    Args:
        x_t: (B, c, h, w), ``alpha z0 + sigma e``.
        alpha, sigma: the level's scales. At alpha = 0 the state says nothing of z0 and no step is taken.
        steps: how many, >= 0.
        jacobian: "exact" pulls the bracket back through the denoiser (the gradient); "free" follows it as it is.
        stop_at: an image rests while ``rms(residual) <= stop_at * sigma_y``; 0 never rests.
    """
    residual, nll = (x_t.new_full((len(x_t),), torch.nan) for _ in range(2))
    taken = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
    v_last = d_last = None
    for _ in range(steps if alpha > 0 else 0):
        z0_hat, pull = _estimate(prior, x_t, alpha, sigma, jacobian)
        data = data_term(z0_hat, prior=prior, measurement=measurement)
        residual, nll = measurement.rms(data.residual), data.nll
        moving = residual > stop_at * measurement.sigma_y
        if not moving.any():
            return Descent(x_t, z0_hat, residual, nll, taken)
        b = bracket(x_t, z0_hat, data.gradient, alpha=alpha, sigma=sigma)
        v = -alpha * pull(b)
        d = v if d_last is None else conjugate(v, v_last, d_last)
        eta = step_length(
            d, v, z0_hat, data, prior=prior, measurement=measurement, noise=sigma / alpha, jacobian=jacobian
        )
        x_t = x_t + alpha * _column(eta * moving, d) * d
        taken += moving
        v_last, d_last = v, d
    return Descent(x_t, prior.denoise(x_t, alpha, sigma), residual, nll, taken)


def conjugate(v: Tensor, v_last: Tensor, d_last: Tensor) -> Tensor:
    """The next direction of non-linear conjugate gradients (Polak-Ribiere, restarted where it turns uphill).

    ``d = v + beta d_last``, ``beta = max(0, <v, v - v_last> / |v_last|^2)`` image by image: between the steps of one
    level the loss is smooth, and conjugate directions cost no further network call.
    """
    beta = _dot(v, v - v_last) / squares(v_last).clamp(min=torch.finfo(v.dtype).tiny)
    d = v + _column(beta.clamp(min=0), v) * d_last
    return torch.where(_column(_dot(v, d) > 0, v), d, v)


def step_length(
    d: Tensor,
    v: Tensor,
    z0_hat: Tensor,
    data: DataTerm,
    *,
    prior: Prior,
    measurement: Measurement,
    noise: float,
    jacobian: str,
) -> Tensor:
    """(B,): the minimiser along d of the loss's quadratic model, with one forward pass of the decoder.

    ``eta = <v, d> / (|H d|^2 / sigma_y^2 + c |d|^2 / noise^2)``, H the derivative of ``A o Dec`` at z0_hat (a finite
    difference). The change of z0_hat is taken to be the step itself, an upper bound where 0 <= J <= I. Then
    ``J (I - J) <= 1/4`` bounds the prior's curvature in the exact form (c = 1/4), ``I - J <= 1`` in the free (c = 1).

    Args:
        d: (B, c, h, w), the direction, VE units.
        v: minus the gradient, or minus the bracket, VE units.
        noise: ``sigma / alpha``, the level's noise in VE units.
    """
    tiny = torch.finfo(d.dtype).tiny
    length = squares(d)
    h = _PROBE * (d[0].numel() / length.clamp(min=tiny)).sqrt()
    ahead = measurement.residual(prior.decode(z0_hat + _column(h, d) * d))
    data_curvature = squares(data.residual - ahead) / (h * measurement.sigma_y) ** 2
    prior_curvature = (0.25 if jacobian == "exact" else 1.0) * length / noise**2
    return _dot(v, d) / (data_curvature + prior_curvature).clamp(min=tiny)


def _estimate(prior: Prior, x_t: Tensor, alpha: float, sigma: float, jacobian: str) -> tuple[Tensor, PullBack]:
    """z0_hat and the map of the bracket to the direction's units: J^T, or none of it."""
    if jacobian == "exact":
        return denoise_pullback(prior, x_t, alpha, sigma)
    return prior.denoise(x_t, alpha, sigma), lambda b: b / alpha


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, ...), (B, ...) -> (B,): inner products, image by image."""
    return (a * b).flatten(1).sum(1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
