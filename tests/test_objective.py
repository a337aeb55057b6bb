"""The objective against closed forms (float64): a Gaussian prior, a mixture, and the laws of its minimisers."""

from itertools import pairwise

import pytest
import torch
from gaussian import Linear, MixturePrior, random_problem

from vml_ldm.objective import vml_bracket, vml_gradient
from vml_ldm.operators import Measurement
from vml_ldm.optimize import descend

SCALES = [(1.0, 0.05), (1.0, 2.0), (0.8, 0.6), (0.2, 0.98), (0.05, 0.9)]


def kl(p, q):
    """KL(N(m_p, C_p) || N(m_q, C_q)), one value for each row of m_p."""
    (m_p, c_p), (m_q, c_q) = p, q
    inverse, delta = torch.linalg.inv(c_q), (m_q - m_p).flatten(1)
    quadratic = ((delta @ inverse) * delta).sum(1)
    return 0.5 * (torch.trace(inverse @ c_p) + quadratic - len(c_p) + torch.logdet(c_q) - torch.logdet(c_p))


@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_gradient_is_that_of_the_closed_form_kl(alpha, sigma):
    """For a Gaussian prior the traces are constant, so VML_S has the KL's own gradient."""
    prior, h, y = random_problem(sigma_y=0.1)
    measurement = Measurement(Linear(h), y.expand(3, -1, -1, -1), 0.1)
    x_t = torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    divergence = kl(prior.posterior(x_t, alpha, sigma), prior.measured(h, y, 0.1))
    (expected,) = torch.autograd.grad(divergence.sum(), x_t)
    gradient, _ = vml_gradient(x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.7), (0.8, 0.6)])
def test_gradient_is_the_finite_difference_of_the_simplified_loss_for_a_mixture(alpha, sigma):
    double = {"dtype": torch.float64}
    weights, stds = torch.tensor([0.3, 0.7], **double), torch.tensor([0.6, 0.4], **double)
    prior = MixturePrior(weights, torch.tensor([[1.0, -1, 0], [-1, 0.5, 1]], **double), stds)
    h = torch.tensor([[1.0, 0.5, -0.3], [0.0, 1.0, 0.2]], **double)
    measurement = Measurement(Linear(h), torch.tensor([[[[0.4, -0.2]]]], **double), 0.3)

    def loss(x_t):
        z0_hat = prior.denoise(x_t, alpha, sigma)
        x = x_t / alpha
        distance = (z0_hat - x).square().sum() * alpha**2 / (2 * sigma**2)
        return -prior.log_prob(x_t, alpha, sigma).sum() - distance + measurement.nll(z0_hat).sum()

    x_t = torch.tensor([[[[0.3, -0.1, 0.5]]]], **double)
    gradient, _ = vml_gradient(x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma)
    steps = 1e-5 * torch.eye(3, **double).reshape(3, 1, 1, 1, 3)
    differences = torch.stack([(loss(x_t + e) - loss(x_t - e)) / 2e-5 for e in steps])
    assert torch.allclose(gradient.flatten(), differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha, sigma", SCALES)
@pytest.mark.parametrize("direction", [vml_gradient, "bracket"])
def test_at_any_level_the_minimiser_denoises_to_the_map(alpha, sigma, direction):
    """D(x*) = MAP: x* is found by solving the linear equation gradient(x) = 0."""
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y, 0.1)

    def field(x_t):
        if direction == "bracket":
            z0_hat = prior.denoise(x_t, alpha, sigma)
            return vml_bracket(x_t, z0_hat, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma)[0]
        return vml_gradient(x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma)[0]

    origin = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    offset = field(origin).flatten()
    units = torch.eye(6, dtype=torch.float64).reshape(6, 1, 1, 1, 6)
    matrix = torch.stack([field(unit).flatten() - offset for unit in units], dim=1)
    minimiser = torch.linalg.solve(matrix, -offset).reshape(origin.shape)
    expected, _ = prior.measured(h, y, 0.1)
    assert (prior.denoise(minimiser, alpha, sigma) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("jacobian", ["exact", "free"])
@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_inner_steps_descend(jacobian, alpha, sigma):
    """Every step of either form lowers the closed-form KL, by the analytic length alone."""
    prior, h, y = random_problem()
    measurement, goal = Measurement(Linear(h), y, 0.1), prior.measured(h, y, 0.1)
    x_t = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = [kl(prior.posterior(x_t, alpha, sigma), goal).item()]
    for _ in range(10):
        x_t = descend(
            x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma, steps=1, jacobian=jacobian, stop_at=0
        ).x_t
        values.append(kl(prior.posterior(x_t, alpha, sigma), goal).item())
    assert all(after < before for before, after in pairwise(values))


def test_the_bracket_descends_where_the_jacobian_is_positive():
    """<gradient, bracket> > 0 away from the minimiser: b^T J b for a positive definite J."""
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y.expand(8, -1, -1, -1), 0.1)
    x_t = torch.randn(8, 1, 1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = {"prior": prior, "measurement": measurement, "alpha": 0.8, "sigma": 0.6}
    gradient, nll = vml_gradient(x_t, **at)
    b, same_nll = vml_bracket(x_t, prior.denoise(x_t, 0.8, 0.6), **at)
    assert torch.equal(nll, same_nll) and nll.shape == (8,)
    assert ((gradient * b).flatten(1).sum(1) > 0).all()
