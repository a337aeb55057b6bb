"""The whole loss and its traces against a Monte Carlo KL, closed forms and finite differences (float64)."""

import math

import pytest
import tiny
import torch
from gaussian import Linear, mixture_problem, random_problem
from test_objective import SCALES, kl

from vml_ldm.adapters.diffusers import StableDiffusionPrior
from vml_ldm.objective import vml_gradient, vml_loss, vml_trace_gradient
from vml_ldm.operators import Measurement, squares

DOUBLE = {"dtype": torch.float64}
X_T = torch.tensor([[[[0.3, -0.1, 0.5]]]], **DOUBLE)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def differences(function, x_t, h=1e-5):
    """Central finite differences of a scalar function, in x_t's shape."""
    units = torch.eye(x_t.numel(), **DOUBLE).reshape(-1, *x_t.shape)
    return torch.stack([(function(x_t + h * e) - function(x_t - h * e)) / (2 * h) for e in units]).reshape(x_t.shape)


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.7), (0.8, 0.6), (0.5, 0.9)])
def test_the_loss_is_the_monte_carlo_kl_and_without_its_traces_it_is_not(alpha, sigma):
    """Mixture prior: KL = loss + log p(y) + (m / 2) log(2 pi sigma_y^2), within 3 standard errors."""
    prior, h, y = mixture_problem()
    measurement = Measurement(Linear(h), y, 0.3)
    posterior = prior.posterior(X_T, alpha, sigma)
    z0 = posterior.sample(400_000, seeded())
    nll = squares(y - z0 @ h.T) / (2 * 0.3**2)
    constant = prior.log_evidence(h, y, 0.3) + math.log(2 * math.pi * 0.3**2)
    draws = posterior.log_prob(z0, 1.0, 0.0) - prior.log_prob(z0, 1.0, 0.0) + nll + constant
    truth, error = draws.mean(), draws.std() / len(draws) ** 0.5
    at = {"prior": prior, "measurement": measurement, "alpha": alpha, "sigma": sigma}
    assert truth > 0
    assert (vml_loss(X_T, **at, probes="all") + constant - truth).abs() < 3 * error
    assert (vml_loss(X_T, **at, probes=0) + constant - truth).abs() > 100 * error


@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_for_a_gaussian_the_loss_is_the_closed_form_kl(alpha, sigma):
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y.expand(3, -1, -1, -1), 0.1)
    x_t = torch.randn(3, 1, 1, 6, generator=seeded(), **DOUBLE)
    marginal = h @ prior.cov @ h.T + 0.1**2 * torch.eye(4, **DOUBLE)
    evidence = torch.distributions.MultivariateNormal(h @ prior.mean, marginal).log_prob(y.flatten())
    constant = evidence + 2 * math.log(2 * math.pi * 0.1**2)
    at = {"prior": prior, "measurement": measurement, "alpha": alpha, "sigma": sigma}
    expected = kl(prior.posterior(x_t, alpha, sigma), prior.measured(h, y, 0.1))
    assert torch.allclose(vml_loss(x_t, **at, probes="all") + constant, expected, rtol=1e-9)
    gradient, _ = vml_trace_gradient(x_t, **at, probes="all")
    assert torch.equal(gradient, torch.zeros_like(x_t))  # the traces do not depend on x_t


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.7), (0.8, 0.6), (0.3, 0.95)])
def test_the_gradients_are_finite_differences_of_the_loss(alpha, sigma):
    """Mixture prior: of the traces alone, and with `vml_gradient` of the whole loss."""
    prior, h, y = mixture_problem()
    at = {"prior": prior, "measurement": Measurement(Linear(h), y, 0.3), "alpha": alpha, "sigma": sigma}
    of_traces, traces = vml_trace_gradient(X_T, **at, probes="all")
    assert torch.allclose(traces, vml_loss(X_T, **at, probes="all") - vml_loss(X_T, **at, probes=0))
    simple = differences(lambda x: vml_loss(x, **at, probes=0).squeeze(), X_T)
    whole = differences(lambda x: vml_loss(x, **at, probes="all").squeeze(), X_T)
    assert of_traces.abs().max() > 0.1
    assert torch.allclose(of_traces, whole - simple, rtol=1e-7, atol=1e-8)
    assert torch.allclose(vml_gradient(X_T, **at)[0] + of_traces, whole, rtol=1e-7, atol=1e-8)


def test_probes_are_unbiased_and_follow_their_generator():
    """The mean of 2000 draws with one probe is the exact gradient and trace within 3 standard errors."""
    prior, h, y = mixture_problem()
    x_t = X_T.expand(2000, -1, -1, -1)
    at = {"prior": prior, "alpha": 0.8, "sigma": 0.6}
    many = Measurement(Linear(h), y.expand(2000, -1, -1, -1), 0.3)
    gradients, traces = vml_trace_gradient(x_t, measurement=many, **at, generator=seeded())
    exact = vml_trace_gradient(X_T, measurement=Measurement(Linear(h), y, 0.3), **at, probes="all")
    for draws, expected in zip((gradients, traces), exact, strict=True):
        assert draws.std(0).max() > 0
        assert ((draws.mean(0) - expected[0]).abs() <= 3 * draws.std(0) / 2000**0.5).all()
    again, _ = vml_trace_gradient(x_t, measurement=many, **at, generator=seeded())
    other, _ = vml_trace_gradient(x_t, measurement=many, **at, generator=seeded(1))
    assert torch.equal(gradients, again) and not torch.equal(gradients, other)
    three, _ = vml_trace_gradient(x_t, measurement=many, **at, probes=3, generator=seeded())
    assert three.std(0).max() < 0.8 * gradients.std(0).max()


@pytest.mark.parametrize("distance", [0.0, 0.7])
def test_a_quadratic_operator_s_expected_misfit_by_monte_carlo(distance):
    """E|y - A(z0)|^2 = |r|^2 + trace + what the docstring says is left out, all moments of a Gaussian being known.

    ``A_i(z) = z^T Q_i z / 2 + h_i z``: left out are ``-<r, q>``, ``q_i = Tr(Q_i Cov)``, and with fourth moments
    ``|q|^2 / 4 + sum_i Tr((Q_i Cov)^2) / 2``.
    """
    prior, h, _ = random_problem(d=3, m=2)
    q = torch.randn(2, 3, 3, generator=seeded(1), **DOUBLE)
    q = q + q.mT
    operator = lambda z: 0.5 * torch.einsum("...j,ijk,...k->...i", z, q, z) + z @ h.T  # noqa: E731
    alpha, sigma, sigma_y = 0.9, 0.1, 0.2
    d, cov = prior.posterior(X_T, alpha, sigma)
    y = operator(d) + distance
    at = {"prior": prior, "measurement": Measurement(operator, y, sigma_y), "alpha": alpha, "sigma": sigma}
    traces = vml_trace_gradient(X_T, **at, probes="all")[1]
    trace = 2 * sigma_y**2 * (traces + alpha**2 * torch.trace(cov) / (2 * sigma**2))
    z0 = d + torch.randn(400_000, 1, 1, 3, generator=seeded(2), **DOUBLE) @ torch.linalg.cholesky(cov).T
    misfit = squares(y - operator(z0))
    truth, error = misfit.mean(), misfit.std() / len(misfit) ** 0.5
    qc = q @ cov
    bend = torch.einsum("ijj->i", qc)
    left_out = -distance * bend.sum() + bend.square().sum() / 4 + torch.einsum("ijk,ikj->", qc, qc) / 2
    residual = 2 * distance**2
    assert (residual + trace + left_out - truth).abs() < 3 * error
    assert (residual + left_out - truth).abs() > 100 * error  # the trace is seen to matter
    if distance == 0:
        assert (trace - truth).abs() < 0.05 * truth  # where the residual is small it is nearly the whole


def test_through_a_bent_decoder_the_trace_gradient_is_that_of_the_traces():
    """M depends on x_t through z0_hat, and that dependence is in the gradient; so it is for complex measurements."""
    prior, _, _ = mixture_problem()
    prior.decode = lambda z: torch.tanh(z) + 0.1 * z**2
    operator = lambda x: torch.fft.rfft(x)  # noqa: E731
    measurement = Measurement(operator, torch.zeros(1, 1, 1, 2, dtype=torch.complex128), 0.3)
    parts = Measurement(lambda x: torch.view_as_real(operator(x)), torch.zeros(1, 1, 1, 2, 2, **DOUBLE), 0.3)
    at = {"prior": prior, "alpha": 0.8, "sigma": 0.6, "probes": "all"}
    gradient, traces = vml_trace_gradient(X_T, measurement=measurement, **at)
    expected = differences(lambda x: vml_trace_gradient(x, measurement=measurement, **at)[1].squeeze(), X_T)
    assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-8)
    for value, same in zip((gradient, traces), vml_trace_gradient(X_T, measurement=parts, **at), strict=True):
        assert torch.allclose(value, same)


def test_the_trace_gradient_goes_through_diffusers_attention():
    """UNet and VAE with fused attention, which has no second derivative of its own."""
    prior = StableDiffusionPrior(
        unet=tiny.unet().double(),
        vae=tiny.vae().double(),
        scheduler=tiny.scheduler(),
        condition={"encoder_hidden_states": torch.randn(1, 5, 128, generator=seeded(), **DOUBLE)},
    )
    x_t, direction = torch.randn(2, 1, 4, 4, 4, generator=seeded(1), **DOUBLE)
    y = torch.zeros(1, 3, 32, 32, **DOUBLE)
    at = {"prior": prior, "measurement": Measurement(lambda x: x, y, 0.3), "alpha": 0.8, "sigma": 0.6}
    at_ = lambda x: vml_trace_gradient(x, **at, generator=seeded())  # noqa: E731
    with prior:
        slope = (at_(x_t)[0] * direction).sum()
        expected = (at_(x_t + 1e-4 * direction)[1] - at_(x_t - 1e-4 * direction)[1]) / 2e-4
    assert torch.allclose(slope, expected.squeeze(), rtol=1e-5)


def test_the_value_needs_a_density():
    _, h, y = mixture_problem()
    at = {"measurement": Measurement(Linear(h), y, 0.3), "alpha": 0.8, "sigma": 0.6}

    class Network:
        denoise = encode = decode = None

    with pytest.raises(TypeError, match=r"Network without log_prob\(x_t, alpha, sigma\).*vml_trace_gradient"):
        vml_loss(X_T, prior=Network(), **at)


@pytest.mark.parametrize("wrong", [{"probes": 0}, {"probes": "some"}, {"probes": 1.5}, {"alpha": 0.0}, {"sigma": 0.0}])
def test_bad_arguments_are_refused(wrong):
    prior, h, y = mixture_problem()
    at = {"prior": prior, "measurement": Measurement(Linear(h), y, 0.3), "alpha": 0.8, "sigma": 0.6, **wrong}
    with pytest.raises(ValueError, match="expected"):
        vml_trace_gradient(X_T, **at)
