"""The variational mode-seeking loss (VML) at one noise level, and nothing else.

Gutha, Vinuesa and Azizpour (arXiv:2512.10524) define ``VML(x_t) = KL(p(z0 | x_t) || p(z0 | y))``, to be minimised over
x_t. Without its two covariance traces (their simplified loss, VML_S) its gradient needs one vector-Jacobian product
of the denoiser and never the density p_t:

    grad VML_S(x_t) = J^T b,    J = d z0_hat / d x_t,    z0_hat = D(x_t) = E[z0 | x_t]
    b = d nll(Dec(z0_hat)) / d z0_hat  +  alpha (x_t - alpha z0_hat) / sigma^2

The paper states the loss for linear operators and alpha = 1; the form for any alpha follows from ``x_t / alpha``, and
through a decoder the transpose of ``A o Dec`` becomes its pull-back, zeroth order in the covariance (our extension).
J is symmetric and positive semi-definite for an exact denoiser, so b alone also descends: the Jacobian-free form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .operators import Measurement

PullBack = Callable[[Tensor], Tensor]


class Prior(Protocol):
    """A pre-trained diffusion model, as the solvers see it. Any object with these three methods is one.

    Two optional methods replace autograd where a model can do better (memory, precision):
    ``denoise_pullback(x_t, alpha, sigma) -> (z0_hat, pull)`` and ``decode_pullback(z) -> (image, pull)``, where
    ``pull(cotangent)`` multiplies by the transposed Jacobian and is called at most once. A third,
    ``guide(x_t, z0_hat, alpha, sigma) -> z0_hat``, may move the estimate from which the next state is made (None: no).
    """

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``z0_hat = E[z0 | x_t]`` for ``x_t = alpha z0 + sigma e``; (B, c, h, w) -> (B, c, h, w)."""

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent (B, c, h, w)."""

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, c, h, w) -> image (B, 3, H, W), about [0, 1] and not clamped."""


class DataTerm(NamedTuple):
    """The measurement seen from a clean latent z: the decoded image, its residual, the nll and its gradient in z."""

    image: Tensor
    residual: Tensor
    nll: Tensor
    gradient: Tensor


def data_term(z: Tensor, *, prior: Prior, measurement: Measurement) -> DataTerm:
    """``nll(Dec(z))`` and its gradient in two passes: the operator's, then the decoder's pull-back of it.

    Args:
        z: (B, c, h, w), a clean latent.
    """
    image, pull = decode_pullback(prior, z)
    with torch.enable_grad():
        pixels = image.detach().requires_grad_()
        residual = measurement.residual(pixels)
        (cotangent,) = torch.autograd.grad(residual, pixels, _normalised(residual, measurement))
    residual = residual.detach()
    nll = 0.5 * _normalised(residual, measurement).mul(residual.conj()).real.flatten(1).sum(1)
    return DataTerm(image, residual, nll, pull(cotangent))


def bracket(x_t: Tensor, z0_hat: Tensor, data_gradient: Tensor, *, alpha: float, sigma: float) -> Tensor:
    """``b = d nll / d z0_hat + alpha (x_t - alpha z0_hat) / sigma^2``, the shape of z0_hat."""
    return data_gradient + alpha * (x_t - alpha * z0_hat) / sigma**2


def vml_bracket(
    x_t: Tensor, z0_hat: Tensor, *, prior: Prior, measurement: Measurement, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """The Jacobian-free direction: b of the module's equation, with no backward pass through the denoiser.

    Args:
        x_t: (B, c, h, w), the noisy state ``alpha z0 + sigma e``.
        z0_hat: (B, c, h, w), the prior's clean estimate at x_t.
        alpha, sigma: the level's scales; sigma > 0.

    Returns:
        b (B, c, h, w), in which ``x_t -= alpha eta b`` is a step of length eta in variance-exploding units; nll (B,).
    """
    data = data_term(z0_hat.detach(), prior=prior, measurement=measurement)
    return bracket(x_t, z0_hat, data.gradient, alpha=alpha, sigma=sigma).detach(), data.nll


def vml_gradient(
    x_t: Tensor, *, prior: Prior, measurement: Measurement, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """The gradient of VML_S: ``J^T b`` of the module's equation, one VJP of the denoiser and one of the decoder.

    Args:
        x_t: (B, c, h, w), the noisy state ``alpha z0 + sigma e``.
        alpha, sigma: the level's scales; sigma > 0.

    Returns:
        J^T b (B, c, h, w), in which ``x_t -= alpha^2 eta g`` is a step of length eta in variance-exploding units;
        nll (B,).
    """
    z0_hat, pull = denoise_pullback(prior, x_t, alpha, sigma)
    b, nll = vml_bracket(x_t, z0_hat, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma)
    return pull(b), nll


def denoise_pullback(prior: Prior, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
    """``z0_hat = D(x_t)`` and the map ``b -> J^T b``: the prior's own, or autograd's."""
    if hasattr(prior, "denoise_pullback"):
        return prior.denoise_pullback(x_t, alpha, sigma)
    return pullback(lambda x: prior.denoise(x, alpha, sigma), x_t)


def decode_pullback(prior: Prior, z: Tensor) -> tuple[Tensor, PullBack]:
    """``Dec(z)`` and the map ``c -> J_Dec^T c``: the prior's own, or autograd's."""
    if hasattr(prior, "decode_pullback"):
        return prior.decode_pullback(z)
    return pullback(prior.decode, z)


def pullback(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, PullBack]:
    """``function(x)``, detached, and its vector-Jacobian product at x. The graph lives until the first pull."""
    with torch.enable_grad():
        source = x.detach().requires_grad_()
        value = function(source)

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(value, source, cotangent)[0]

    return value.detach(), pull


def _normalised(residual: Tensor, measurement: Measurement) -> Tensor:
    """``residual / sigma_y^2`` per image: the derivative of the nll in the residual."""
    variance = measurement.sigma_y.square()
    return residual.detach() / variance.reshape(-1, *[1] * (residual.ndim - 1))
