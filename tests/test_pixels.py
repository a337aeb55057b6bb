"""Pixel diffusion without a host: a closed-form denoiser as a callable, the map of ranges, Karras' levels."""

import math
from itertools import pairwise

import pytest
import torch
from gaussian import GaussianPrior, Linear, random_problem

from vml_ldm import CallablePrior, Levels, Measurement, karras_scales, red_diff, vml_map
from vml_ldm.solve import noise_like

RANGES = [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)]


def problem(low, high):
    """A Gaussian of images, given to the solver as a denoiser in the model's units; y; and the MAP in those units."""
    images, h, y = random_problem()
    width = high - low
    model = GaussianPrior(low + width * images.mean, width**2 * images.cov)
    prior = CallablePrior(lambda x, sigma: model.denoise(x, 1.0, sigma), low, high)
    goal, _ = images.measured(h, y, 0.1)
    return prior, Measurement(Linear(h), y, 0.1), low + width * goal, low + width * images.mean


@pytest.mark.parametrize("low, high", RANGES)
@pytest.mark.parametrize("jacobian", ["exact", "free"])
def test_vml_map_reaches_the_map_of_a_gaussian(low, high, jacobian):
    """In any range of the model: within 1 % of |MAP - mean|."""
    prior, measurement, goal, mean = problem(low, high)
    scales = karras_scales(20, 10 * (high - low), 0.05 * (high - low))
    generator = torch.Generator().manual_seed(0)
    x_T = scales[0][1] * noise_like(mean.reshape(1, 1, 1, -1), generator)
    solution = vml_map(
        x_T,
        prior=prior,
        measurement=measurement,
        schedule=Levels(scales, renoise=0.0),
        inner_steps=20,
        jacobian=jacobian,
        stop_at=0,
        generator=generator,
    )
    assert (solution.latent - goal).norm() < 0.01 * (goal - mean).norm()


def test_red_diff_is_the_same_in_any_range():
    """The data term is in units of images; the prior's, the noise and the step are in the model's and scale along."""
    images = []
    for low, high in RANGES:
        prior, measurement, _, mean = problem(low, high)
        width = high - low
        solution = red_diff(
            mean.reshape(1, 1, 1, -1),
            prior=prior,
            measurement=measurement,
            schedule=Levels([(1.0, sigma * width) for _, sigma in karras_scales(20, 10, 0.05)]),
            weighting="constant",
            lambda_=0.25 / width,
            lr=0.05 * width,
            generator=torch.Generator().manual_seed(0),
        )
        images.append(prior.decode(solution.latent))
        assert solution.residual < measurement.rms(measurement.residual(prior.decode(mean.reshape(1, 1, 1, -1))))
    assert torch.allclose(images[0], images[1], atol=1e-6) and torch.allclose(images[0], images[2], atol=1e-6)


@pytest.mark.parametrize("low, high", RANGES)
def test_the_decoder_is_the_identity_between_the_ranges(low, high):
    prior, image = CallablePrior(lambda x, sigma: x, low, high), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(prior.decode(prior.encode(image)), image)
    ends = prior.encode(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).flatten()
    assert ends.tolist() == [low, high]


def test_any_scaling_of_the_state_reaches_the_callable_variance_exploding():
    prior = CallablePrior(lambda x, sigma: x / (1 + sigma**2))
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(prior.denoise(0.8 * x, 0.8, 0.6), x / (1 + 0.75**2))
    with pytest.raises(ValueError, match=r"alpha is 0.0; expected > 0"):
        prior.denoise(x, 0.0, 1.0)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_a_range_without_width_is_refused(low, high):
    with pytest.raises(ValueError, match="expected low < high"):
        CallablePrior(lambda x, sigma: x, low, high)


def test_karras_levels_are_evenly_spaced_in_the_root():
    scales = karras_scales(9, 80.0, 0.002)
    roots = [sigma ** (1 / 7) for _, sigma in scales]
    steps = [after - before for before, after in pairwise(roots)]
    assert all(alpha == 1 for alpha, _ in scales) and len(Levels(scales)) == 9
    assert math.isclose(scales[0][1], 80.0) and math.isclose(scales[-1][1], 0.002)
    assert all(math.isclose(step, steps[0]) for step in steps) and steps[0] < 0
    assert math.isclose(karras_scales(1, 80.0, 0.002)[0][1], 80.0)


def test_a_large_rho_is_a_geometric_spacing():
    sigmas = [sigma for _, sigma in karras_scales(3, 100.0, 0.01, rho=1e6)]
    assert math.isclose(sigmas[1], 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("arguments", [(0, 80.0, 0.002), (5, 1.0, 1.0), (5, 1.0, 0.0), (5, 80.0, 0.002, 0.0)])
def test_levels_that_do_not_fall_are_refused(arguments):
    with pytest.raises(ValueError, match="expected count >= 1"):
        karras_scales(*arguments)
