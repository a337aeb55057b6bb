"""The latent solvers of other papers: on a Gaussian prior, whose posterior is known, and on what each is told."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gaussian import GaussianPrior

from vml_ldm.evaluation.ding import transition_variance
from vml_ldm.evaluation.peers import (
    ding,
    flow_dps,
    guess_guide,
    latent_daps,
    latent_dps,
    latino,
    psld,
    resample,
)
from vml_ldm.metering import Metered
from vml_ldm.operators import Mask, Measurement
from vml_ldm.operators.base import OrthonormalRows
from vml_ldm.solve import Levels

D, SIGMA_Y = 6, 0.05
PEERS = {
    "latent_dps": (latent_dps, {"zeta": 0.3}),
    "psld": (psld, {"omega": 0.3, "gamma": 0.05}),
    "resample": (resample, {"every": 2, "steps": 50, "lr": 0.05}),
    "flow_dps": (flow_dps, {"steps": 3, "length": 1.5}),
    "latent_daps": (latent_daps, {"steps": 30}),
    "latino": (latino, {}),
    "ding": (ding, {}),
    "guess_guide": (guess_guide, {"steps": 30, "lr": 0.02}),
}
KNOWN = (torch.arange(D) % 2 == 0).double().reshape(1, 1, 1, D)


class Half(OrthonormalRows):
    """Every second coordinate of (B, 1, 1, D)."""

    def __call__(self, x):
        return x[..., ::2]

    def adjoint(self, y):
        return torch.stack([y, torch.zeros_like(y)], dim=-1).flatten(-2)


@pytest.fixture(scope="module")
def problem():
    """A prior, 64 measurements of images that it drew, their measurement and levels."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(D, 2, generator=generator, dtype=torch.float64)  # two directions tell nearly all
    cov = 0.04 * (factor @ factor.T + 0.02 * torch.eye(D).double())
    prior = GaussianPrior(torch.full((D,), 0.5).double(), cov)
    truth = prior.mean + torch.randn(64, 1, 1, D, generator=generator).double() @ torch.linalg.cholesky(cov).T
    y = Half()(truth) + SIGMA_Y * torch.randn(64, 1, 1, D // 2, generator=generator).double()
    sigmas = torch.linspace(4, 0.05, 25).tolist()
    levels = Levels([(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in sigmas], renoise=0.5)
    return prior, truth, Measurement(Half(), y, SIGMA_Y), levels


def solved(problem, name, count=64, **changed):
    prior, _, measurement, levels = problem
    solver, settings = PEERS[name]
    part = Measurement(Half(), measurement.y[:count], SIGMA_Y)
    if name == "ding":  # which asks for a mask: the same coordinates
        part = Measurement(Mask(KNOWN), Half().adjoint(part.y), SIGMA_Y)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    start = torch.cat([torch.randn(1, 1, 1, D, generator=g, dtype=torch.float64) for g in generators])
    given = {"prior": prior, "measurement": part, "schedule": levels, "generator": generators}
    return solver(start, **given, **{**settings, **changed})


@pytest.mark.parametrize("name", PEERS)
def test_it_finds_what_y_tells(problem, name):
    """Nearer to the truth than the prior's mean is, also where nothing was measured, and near y."""
    prior, truth, _, _ = problem
    found = solved(problem, name)
    error, blind = ((x - truth).square().mean() for x in (found.latent, prior.mean.expand_as(truth)))
    assert error < 0.6 * blind
    assert found.residual.mean() < 2 * SIGMA_Y


@pytest.mark.parametrize("name", PEERS)
def test_a_batch_is_its_images_alone(problem, name):
    torch.testing.assert_close(solved(problem, name, 3).latent[:2], solved(problem, name, 2).latent)


def test_networks_are_counted(problem):
    levels = len(problem[3])
    calls = {name: solved(problem, name, 2).calls for name in PEERS}
    assert calls.pop("ding") == {"encode": 1, "denoise": 2 * levels - 1, "decode": 1}
    assert all(found["denoise"] == levels for found in calls.values())
    assert calls["latent_dps"]["denoise_vjp"] == calls["psld"]["denoise_vjp"] == levels
    assert not any(
        "denoise_vjp" in calls[name] for name in ("resample", "flow_dps", "latent_daps", "latino", "guess_guide")
    )
    assert "decode_vjp" not in calls["guess_guide"]
    assert calls["flow_dps"]["decode_vjp"] == 3 * levels and calls["latino"]["encode"] == levels
    assert "decode_vjp" not in calls["latino"]


@pytest.mark.parametrize("name", ["psld", "latino"])
def test_what_needs_a_linear_operator_says_so(problem, name):
    prior, _, measurement, levels = problem
    with pytest.raises(TypeError, match="expected a linear operator"):
        PEERS[name][0](
            torch.zeros(1, 1, 1, D).double(),
            prior=prior,
            measurement=Measurement(torch.sin, measurement.y[:1], 0.1),
            schedule=levels,
        )


def test_the_proximal_step_needs_no_closed_form(problem):
    class Bare:
        """Linear with an adjoint, and no more."""

        linear = True
        __call__, adjoint = Half.__call__, Half.adjoint

    prior, _, measurement, levels = problem
    given = {"prior": prior, "schedule": levels, "generator": torch.Generator().manual_seed(0)}
    start = torch.randn(64, 1, 1, D, generator=torch.Generator().manual_seed(1)).double()
    closed = latino(start, measurement=measurement, **given).latent
    given["generator"].manual_seed(0)
    searched = latino(start, measurement=Measurement(Bare(), measurement.y, SIGMA_Y), **given).latent
    torch.testing.assert_close(closed, searched, atol=1e-4, rtol=0)


def test_ding_needs_a_mask(problem):
    prior, _, measurement, levels = problem
    with pytest.raises(TypeError, match="expected Mask"):
        ding(torch.zeros(64, 1, 1, D).double(), prior=prior, measurement=measurement, schedule=levels)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_dings_transitions_keep_the_level_and_are_never_wider_than_the_ancestral_one(power):
    levels = [(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in (20.0, 3.0, 1.0, 0.2, 0.05)]
    for now, after in pairwise(levels):
        (alpha, sigma), (a_s, s_s) = now, after
        variance = transition_variance(now, after, power)
        assert 0 < variance <= s_s**2 * (1 - (alpha * s_s / (a_s * sigma)) ** 2) + 1e-12
    assert transition_variance(levels[0], levels[1], 0.0) == pytest.approx(
        levels[1][1] ** 2 * (1 - (levels[0][0] * levels[1][1] / (levels[1][0] * levels[0][1])) ** 2)
    )


def test_where_nothing_is_known_ding_samples_the_prior(problem):
    """Its transitions are the prior's own: mean and covariance of a Gaussian prior come out."""
    prior, _, _, _ = problem
    sigmas = torch.linspace(3, 0, 200).exp().sub(0.999).tolist()
    levels = Levels([(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in sigmas])
    count = 3000
    blind = Measurement(Mask(torch.zeros(1, 1, 1, D).double()), torch.zeros(count, 1, 1, D).double(), SIGMA_Y)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 1, 1, D, generator=generator).double()
    found = ding(start, prior=prior, measurement=blind, schedule=levels, power=0.0, generator=generator).latent
    torch.testing.assert_close(found.mean(0).flatten(), prior.mean, atol=0.02, rtol=0)
    assert (found.flatten(1).T.cov() - prior.cov).norm() < 0.1 * prior.cov.norm()


@pytest.mark.skipif(not hasattr(Metered, "guided"), reason="a metered prior has no guided estimate here")
@pytest.mark.parametrize("name", ["resample", "flow_dps", "latent_daps", "latino", "ding", "guess_guide"])
def test_guidance_is_in_every_estimate(problem, name):
    """A prior whose guided estimate is another prior's: the answer is that prior's own."""
    prior, truth, measurement, levels = problem

    class Guided(GaussianPrior):
        guided = staticmethod(prior.denoise)

    other = Guided(prior.mean + 5, prior.cov)
    expected = solved(problem, name, 4)
    found = solved((other, truth, measurement, levels), name, 4)
    torch.testing.assert_close(found.latent, expected.latent)
