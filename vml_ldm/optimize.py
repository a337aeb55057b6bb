"""How x_t moves inside one noise level: the descent direction, its length, and when to stop.

Directions and lengths are in variance-exploding (VE) units, ``x_t / alpha``, where they compare with z0_hat:
``x_t += alpha * eta * v``. Everything is per image: a batch moves as its images would move alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objective import Prior, bracket, data_term, denoise_pullback
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
    batch = len(x_t)
    residual, nll = x_t.new_full((batch,), torch.nan), x_t.new_full((batch,), torch.nan)
    taken = torch.zeros(batch, dtype=torch.long, device=x_t.device)
    last = None
    for _ in range(steps if alpha > 0 else 0):
        z0_hat, pull = _estimate(prior, x_t, alpha, sigma, jacobian)
        data = data_term(z0_hat, prior=prior, measurement=measurement)
        residual, nll = measurement.rms(data.residual), data.nll
        moving = residual > stop_at * measurement.sigma_y
        if not moving.any():
            return Descent(x_t, z0_hat, residual, nll, taken)
        b = bracket(x_t, z0_hat, data.gradient, alpha=alpha, sigma=sigma)
        v = -alpha * pull(b)
        d, gain = _conjugate(v, last), _gain(data, last)
        if FLAGS.get("log"):
            FLAGS["log"].append((sigma / alpha, gain.tolist() if torch.is_tensor(gain) else gain, residual.tolist()))
        eta, h_d = step_length(
            d, v, z0_hat, data, gain, prior=prior, measurement=measurement, noise=sigma / alpha, jacobian=jacobian
        )
        x_t = x_t + alpha * _column(eta * moving, d) * d
        taken += moving
        last = _Last(v, d, data.residual, _column(eta, h_d) * h_d, gain)
    return Descent(x_t, prior.denoise(x_t, alpha, sigma), residual, nll, taken)


FLAGS = {"cg": True, "secant": True}


class _Last(NamedTuple):
    v: Tensor
    d: Tensor
    residual: Tensor
    predicted: Tensor
    gain: Tensor


def _conjugate(v, last):
    if last is None or not FLAGS["cg"]:
        return v
    beta = (squares(v) - (v * last.v).flatten(1).sum(1)) / squares(last.v).clamp(min=1e-30)
    d = v + _column(beta.clamp(0, FLAGS.get("bmax", 5)), v) * last.d
    uphill = (v * d).flatten(1).sum(1) <= 0
    return torch.where(_column(uphill, v), v, d)


def _gain(data, last):
    if last is None or not FLAGS["secant"]:
        return FLAGS.get("gain0", 1.0) * data.nll.new_ones(len(data.nll))
    change = last.residual - data.residual
    gain = (change * last.predicted).flatten(1).sum(1) / squares(last.predicted).clamp(min=1e-30)
    return gain.clamp(*FLAGS.get("clip", (0.2, 20.0)))


def step_length(d, v, z0_hat, data, gain, *, prior, measurement, noise, jacobian):
    length = squares(d)
    h = _PROBE * (d[0].numel() / length.clamp(min=torch.finfo(d.dtype).tiny)).sqrt()
    ahead = measurement.residual(prior.decode(z0_hat + _column(h, d) * d))
    h_d = (data.residual - ahead) / _column(h, ahead)
    data_curvature = squares(h_d) * gain**2 / measurement.sigma_y**2
    prior_curvature = (0.25 if jacobian == "exact" else 1.0) * length / noise**2
    slope = (v * d).flatten(1).sum(1) * (1 if jacobian == "exact" else gain)
    return slope / (data_curvature + prior_curvature).clamp(min=torch.finfo(d.dtype).tiny), h_d


def _estimate(prior: Prior, x_t: Tensor, alpha: float, sigma: float, jacobian: str):
    """z0_hat and the pull-back of the bracket: the denoiser's, or none."""
    if jacobian == "exact":
        return denoise_pullback(prior, x_t, alpha, sigma)
    return prior.denoise(x_t, alpha, sigma), lambda b: b / alpha


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
