"""The variational mode-seeking loss (VML) at one noise level, and nothing else.

Gutha, Vinuesa and Azizpour (arXiv:2512.10524) define ``VML(x_t) = KL(p(z0 | x_t) || p(z0 | y))``, to be minimised over
x_t. Without its two covariance traces (their simplified loss, VML_S) its gradient needs one vector-Jacobian product
of the denoiser and never the density p_t:

    grad VML_S(x_t) = J^T b,    J = d z0_hat / d x_t,    z0_hat = D(x_t) = E[z0 | x_t]
    b = d nll(Dec(z0_hat)) / d z0_hat  +  alpha (x_t - alpha z0_hat) / sigma^2

The paper states the loss for linear operators and alpha = 1; the form for any alpha follows from ``x_t / alpha``, and
through a decoder the transpose of ``A o Dec`` becomes its pull-back, zeroth order in the covariance (our extension).
J is symmetric and positive semi-definite for an exact denoiser, so b alone also descends: the Jacobian-free form.

The whole loss adds the two traces that VML_S drops. With ``E[z0 | x_t] = D`` differentiated under the integral,
``J = alpha Cov / sigma^2``, so the posterior's covariance is ``Cov[z0 | x_t] = sigma^2 J / alpha`` (ours for any alpha;
the paper's for alpha = 1), and

    VML - VML_S = Tr(H Cov H^T) / (2 sigma_y^2) - alpha^2 Tr Cov / (2 sigma^2)
                = (sigma^2 Tr(H J H^T) / (alpha sigma_y^2) - alpha Tr J) / 2

with H the operator, or the derivative of ``A o Dec`` at z0_hat where that is not linear (see `vml_trace_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .operators import Measurement, column, dot, is_whole, squares, uncast

PullBack = Callable[[Tensor], Tensor]
PushForward = Callable[[Tensor], Tensor]
T = TypeVar("T")


class NonFiniteError(FloatingPointError):
    """A network gave NaN or infinity, and nothing that its prior could do has mended that."""


class Prior(Protocol):
    """A pre-trained diffusion model, as the solvers see it. Any object with these three methods is one.

    Two optional methods replace autograd where a model can do better (memory, precision):
    ``denoise_pullback(x_t, alpha, sigma) -> (z0_hat, pull)`` and ``decode_pullback(z) -> (image, pull)``, where
    ``pull(cotangent)`` multiplies by the transposed Jacobian and is called at most once. A third,
    ``decode_linear(z) -> (image, push, pull)``, gives the Jacobian and its transpose for any number of calls.

    What else a prior may have: guidance by a prompt, whose denoiser is ``guided(x_t, alpha, sigma)`` and whose
    ``push(x_t, z0_hat, alpha, sigma)`` is what it adds to the estimate z0_hat = denoise(x_t) (None: it is not guided).
    ``movable(change) -> change`` leaves of a change of x_t what the prior does not know to be
    none (None: all). ``pixel_scale``, a number s, says that z are pixels, ``decode(z) = s z + constant`` (None:
    they are not), and lets an operator's closed-form ``solve`` stand in for iterations.
    ``log_prob(x_t, alpha, sigma) -> (B,)`` is the log-density of x_t, which few priors know; only `vml_loss` asks.
    ``select(rows, batch) -> Prior`` is the prior of some images of a batch of so many, by their places (n,), which
    rise: with their prompts, for as long as a level lasts. Images at rest then leave the batch (None: they do not).
    ``checked(work) -> work()`` is asked for a level's work, which it may do more than once: networks of half precision,
    whose overflow is mended in float32, are then looked at once at its end and not after each call.
    ``decode_whole(z) -> Whole`` is for a decoder that draws a part of a latent differently from that part in the whole,
    as norms and attention over all of the image do (None: it draws parts as they are).
    """

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``z0_hat = E[z0 | x_t]`` for ``x_t = alpha z0 + sigma e``; (B, c, h, w) -> (B, c, h, w)."""

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent (B, c, h, w)."""

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, c, h, w) -> image (B, 3, H, W), about [0, 1] and not clamped."""


class Whole(NamedTuple):
    """An image as a decoder draws it, and parts of it as the decoder draws them there.

    Attributes:
        image: (B, 3, H, W), ``Dec(z)``.
        part: (z, images, window) -> the image of a part z (n, c, window) of the latents of n images of the batch, by
            their places in it, in the precision of z; window: rows and columns of the latent.
        part_pullback: the same -> the part's image, and its decoder's vector-Jacobian product. What the whole has to do
            with it is constant.
    """

    image: Tensor
    part: Callable[[Tensor, list[int], tuple[slice, slice]], Tensor]
    part_pullback: Callable[[Tensor, list[int], tuple[slice, slice]], tuple[Tensor, PullBack]]


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
    with torch.enable_grad(), uncast(image):
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


def vml_trace_gradient(
    x_t: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    alpha: float,
    sigma: float,
    probes: int | str = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the two covariance traces, to be added to `vml_gradient` for the gradient of the whole VML.

    Each trace is Tr(M J M^T), with M = H or the identity, and is estimated without forming a matrix (Hutchinson): the
    mean of ``<a, J a>``, ``a = M^T w``, over probes w whose entries are independent signs. The gradient goes back
    through both products, so prior and operator must be twice differentiable. A probe costs a forward pass of the
    denoiser, a backward pass, and a backward pass through that; a data probe the same of the decoder.

    The paper states the traces for linear operators. For any other, H is the derivative of ``F = A o Dec`` at z0_hat
    (our extension). With ``r = y - F(z0_hat)``, ``E|y - F(z0)|^2 = |r|^2 + Tr(H Cov H^T) - <r, Tr(F'' Cov)>`` up to
    higher moments of z0. The term with F'' is left out, as Gauss-Newton leaves it out: it is small where r is.

    Args:
        x_t: (B, c, h, w), the noisy state ``alpha z0 + sigma e``.
        alpha, sigma: the level's scales, both > 0.
        probes: how many for each trace, >= 1; "all" takes every unit vector in turn and is exact (small problems).
        generator: draws the probes' signs.

    Returns:
        The gradient (B, c, h, w), and the traces themselves, VML - VML_S, (B,).

    Raises:
        ValueError: alpha is 0 (x_t says nothing of z0 there, J = 0), or probes is no such number.
    """
    if alpha <= 0 or sigma <= 0:
        raise ValueError(f"alpha is {alpha} and sigma {sigma}; expected both > 0. Skip this level's traces.")
    if probes != "all" and not is_whole(probes, 1):
        raise ValueError(f"probes is {probes!r}; expected a whole number >= 1, or 'all' for the exact trace.")

    def trace(view: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        draws = [_quadratic(w, view, x_t, prior, alpha, sigma) for w in _probes(like, probes, generator)]
        share = 1 if probes == "all" else 1 / probes
        return share * sum(gradient for _, gradient in draws), share * sum(value for value, _ in draws)

    seen, itself = lambda z: _real(measurement.operator(prior.decode(z))), lambda z: z
    (data_gradient, data), (prior_gradient, own) = trace(seen, _real(measurement.y)), trace(itself, x_t)
    weight = sigma**2 / (alpha * measurement.sigma_y**2)
    gradient = (column(weight, x_t) * data_gradient - alpha * prior_gradient) / 2
    return gradient, (weight * data - alpha * own) / 2


@torch.no_grad()
def vml_loss(
    x_t: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    alpha: float,
    sigma: float,
    probes: int | str = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B,): the VML itself, up to a constant of y. Only for a prior that knows its density.

    ``-log p_t(x_t) - |x_t - alpha z0_hat|^2 / (2 sigma^2) - (d / 2) log(2 pi sigma^2) + nll(Dec(z0_hat)) + traces``,
    the paper's Proposition 2 with the constants in sigma kept, so that levels compare: for a linear operator it is
    ``KL(p(z0 | x_t) || p(z0 | y)) - log p(y) - (m / 2) log(2 pi sigma_y^2)`` at every level, m the size of y. For any
    other operator it is an approximation, as far as the data term's trace is one.

    Args:
        x_t, alpha, sigma, generator: as for `vml_trace_gradient`.
        prior: with ``log_prob(x_t, alpha, sigma) -> (B,)``.
        probes: as for `vml_trace_gradient`; 0 drops the traces and gives VML_S.

    Raises:
        TypeError: the prior has no log_prob.
        ValueError: as `vml_trace_gradient`.
    """
    if not hasattr(prior, "log_prob"):
        raise TypeError(
            f"the prior is a {type(prior).__name__} without log_prob(x_t, alpha, sigma); expected one, since the value "
            "contains log p_t(x_t). A network does not know it: use the gradients, vml_gradient + vml_trace_gradient."
        )
    where = {"prior": prior, "measurement": measurement, "alpha": alpha, "sigma": sigma}
    traces = 0.0 if probes == 0 else vml_trace_gradient(x_t, **where, probes=probes, generator=generator)[1]
    z0_hat = prior.denoise(x_t, alpha, sigma)
    log_noise = squares(x_t - alpha * z0_hat) / (-2 * sigma**2) - x_t[0].numel() / 2 * math.log(2 * math.pi * sigma**2)
    return measurement.nll(prior.decode(z0_hat)) - prior.log_prob(x_t, alpha, sigma) + log_noise + traces


def guided(prior: Prior, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """``D_w(x_t)``, the prior's estimate with its guidance; `denoise` where it has none."""
    return getattr(prior, "guided", prior.denoise)(x_t, alpha, sigma)


def checked(prior: Prior, work: Callable[[], T]) -> T:
    """``work()``, a level's: once more where a network of the prior overflowed in it, if the prior sees to that."""
    return getattr(prior, "checked", lambda work: work())(work)


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


def decode_linear(prior: Prior, z: Tensor) -> tuple[Tensor, PushForward, PullBack]:
    """``Dec(z)``, ``v -> J_Dec v`` and ``c -> J_Dec^T c``: the prior's own, or autograd's."""
    if hasattr(prior, "decode_linear"):
        return prior.decode_linear(z)
    return linearise(prior.decode, z)


def pullback(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, PullBack]:
    """``function(x)``, detached, and its vector-Jacobian product at x. The graph lives until the first pull."""
    with torch.enable_grad():
        source = x.detach().requires_grad_()
        value = function(source)

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(value, source, cotangent)[0]

    return value.detach(), pull


def at_unit_size(pull: PullBack) -> PullBack:
    """The pull-back, which is linear, with its cotangent (B, c, h, w) at unit size image by image: in half precision
    it neither under- nor overflows."""

    def scaled(cotangent: Tensor) -> Tensor:
        size = cotangent.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(cotangent.dtype).tiny)
        return pull(cotangent / size) * size

    return scaled


def linearise(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, PushForward, PullBack]:
    """``function(x)``, its Jacobian and the transpose of it at x, for any number of products.

    The transposed product is linear in its cotangent, so a backward pass through it is the Jacobian's product. (Forward
    mode lacks the derivative of fused attention, and that of group norms of non-contiguous values.) The graph of both
    lives as long as the two maps.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        source = x.detach().requires_grad_()
        value = function(source)
        cotangent = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, source, cotangent, create_graph=True)

    def push(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, cotangent, v, retain_graph=True)[0]

    def pull(c: Tensor) -> Tensor:
        return torch.autograd.grad(value, source, c, retain_graph=True)[0]

    return value.detach(), push, pull


def _quadratic(
    w: Tensor, view: Callable[[Tensor], Tensor], x_t: Tensor, prior: Prior, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """``<a, J a>`` image by image, (B,), and its gradient in x_t; ``a = M^T w``, M the derivative of view at z0_hat."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        x = x_t.detach().requires_grad_()
        z0_hat = prior.denoise(x, alpha, sigma)
        (a,) = torch.autograd.grad(view(z0_hat), z0_hat, w, create_graph=True)
        (ja,) = torch.autograd.grad(z0_hat, x, a, create_graph=True)
        value = dot(a, ja)
        if not value.requires_grad:  # neither M nor J depends on x_t
            return value, torch.zeros_like(x_t)
        (gradient,) = torch.autograd.grad(value.sum(), x, materialize_grads=True)
    return value.detach(), gradient


def _probes(like: Tensor, probes: int | str, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Tensors of like's shape: random signs, or each unit vector of one item's space, the same for every item."""
    if probes != "all":
        device = like.device if generator is None else generator.device
        for _ in range(probes):
            signs = torch.randint(0, 2, like.shape, generator=generator, device=device)
            yield (2 * signs - 1).to(like)
        return
    for i in range(like[0].numel()):
        unit = torch.zeros_like(like)
        unit.flatten(1)[:, i] = 1
        yield unit


def _real(y: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, (..., 2); a real one as it is."""
    return torch.view_as_real(y) if y.is_complex() else y


def _normalised(residual: Tensor, measurement: Measurement) -> Tensor:
    """``residual / sigma_y^2`` per image: the derivative of the nll in the residual."""
    return residual.detach() / column(measurement.sigma_y.square(), residual)
