"""The proximal step on priors whose answer is known in closed form, and guidance as a part of the prior."""

import pytest
import torch
from gaussian import GaussianPrior, Linear, random_problem

from vml_ldm.objective import bracket, data_term
from vml_ldm.operators import Measurement
from vml_ldm.optimize import descend
from vml_ldm.proximal import Proximal, TwoFidelities, proximal_step
from vml_ldm.solve import Levels, vml_map

DOUBLE = {"dtype": torch.float64}


def measured(h, y, sigma_y: float = 0.1, batch: int = 1) -> Measurement:
    return Measurement(Linear(h), y.expand(batch, -1, -1, -1), sigma_y)


def exactly(h, y, sigma_y: float, s: float):
    """The step in pixels of a linear operator: argmin |y - h x|^2 / sigma_y^2 + |x - image|^2 / s^2 in closed form."""
    inverse = torch.linalg.inv(h.T @ h / sigma_y**2 + torch.eye(h.shape[1]).to(h) / s**2)
    return lambda image: (y @ h / sigma_y**2 + image / s**2) @ inverse


def ended(prior, x_t, measurement, alpha, sigma, **options):
    inner = descend(x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma, steps=0)
    return inner, proximal_step(inner, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma, **options)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.8), (0.8, 0.6), (0.1, 0.995)])
def test_a_proximal_step_is_the_minimiser_with_the_estimate_held(alpha, sigma):
    """By decoder steps and, where there is one, by the closed form in pixels (which sees images of [0, 1] alone)."""
    prior, h, y = random_problem()
    x_t = torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(1), **DOUBLE)
    observed = measured(h, y, batch=3)
    inner, found = ended(prior, x_t, observed, alpha, sigma, how=Proximal(steps=60), stop_at=0)
    expected = exactly(h, y, 0.1, sigma / alpha)(inner.z0_hat)
    assert torch.allclose(found.z0_hat, expected, atol=1e-6)
    e = lambda level: (level.x_t - alpha * level.z0_hat) / sigma  # noqa: E731
    assert torch.allclose(e(found), e(inner))  # the noise that the state holds stays what it is

    within = lambda image: exactly(h, y, 0.1, sigma / alpha)(image).clamp(0, 1)  # noqa: E731
    _, through = ended(prior, x_t, observed, alpha, sigma, settle=within)
    assert torch.equal(through.z0_hat, within(inner.z0_hat.clamp(0, 1)))
    assert torch.allclose(through.residual, observed.rms(observed.residual(inner.z0_hat)))


def test_at_rest_the_bracket_is_zero_and_falling_noise_leads_to_the_map():
    """Repeated at ``x_t = alpha z``: the MAP of N(m, C + s^2 I), which for s -> 0 is the prior's own."""
    prior, h, y = random_problem()
    prior, measurement, far = GaussianPrior(prior.mean, 0.05 * prior.cov), measured(h, y), []
    for s in (0.5, 0.3, 0.15):
        z = prior.mean.reshape(1, 1, 1, 6)
        for _ in range(30 if s > 0.2 else 150):
            _, found = ended(prior, z, measurement, 1.0, s, how=Proximal(steps=20), stop_at=0)
            z = found.z0_hat
        data = data_term(z, prior=prior, measurement=measurement)
        b = bracket(z, prior.denoise(z, 1.0, s), data.gradient, alpha=1.0, sigma=s)
        assert b.abs().max() < 1e-3 * data.gradient.abs().max() + 1e-6
        wide = GaussianPrior(prior.mean, prior.cov + s**2 * torch.eye(6, **DOUBLE))
        assert torch.allclose(z.flatten(), wide.measured(h, y, 0.1)[0].flatten(), atol=2e-3)
        far.append((z.flatten() - prior.measured(h, y, 0.1)[0].flatten()).norm())
    assert far[0] > far[1] > far[2]


def test_levels_end_with_it_and_those_of_little_noise_are_it_alone():
    prior, h, y = random_problem()
    settle = lambda image: image + 0.25 * (0.5 - image)  # noqa: E731
    schedule = Levels([(0.2, 0.98), (0.8, 0.6), (0.95, 0.31)], renoise=0.0)
    x_T = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(0), **DOUBLE)
    solve = lambda **options: vml_map(  # noqa: E731
        x_T, prior=prior, measurement=measured(h, y), schedule=schedule, stop_at=0, settle=settle, **options
    )
    alone = solve(inner_steps=2, proximal=Proximal())
    assert (alone.calls["denoise"], alone.calls["encode"], alone.calls["denoise_vjp"]) == (3, 3, 0)
    below = solve(inner_steps=2, proximal=Proximal(alone_below=1.0))
    assert (below.calls["denoise"], below.calls["encode"], below.calls["denoise_vjp"]) == (3 + 1 + 1, 3, 2)
    x_t = x_T
    for i in range(3):
        z0_hat, (alpha, _) = prior.denoise(x_t, *schedule.scales(i)), schedule.scales(i)
        z = settle(z0_hat.clamp(0, 1))
        x_t = schedule.step(i, x_t + alpha * (z - z0_hat), z)
    assert torch.allclose(alone.latent, z)


class Guided(GaussianPrior):
    """p(z) p(c | z)^w of Gaussians: what guidance by two conditions' denoisers is the denoiser of, as noise falls."""

    def __init__(self, conditional: GaussianPrior, negative: GaussianPrior, w: float):
        super().__init__(conditional.mean, conditional.cov)
        self.negative, self.w = negative, w
        precisions = [torch.linalg.inv(p.cov) for p in (negative, conditional)]
        mix = lambda n, c: n + w * (c - n)  # noqa: E731
        cov = torch.linalg.inv(mix(*precisions))
        pulled = [p @ mean for p, mean in zip(precisions, (negative.mean, conditional.mean), strict=True)]
        self.sharpened = GaussianPrior(cov @ mix(*pulled), cov)

    def push(self, x_t, z0_hat, alpha, sigma):
        return (self.w - 1) * (z0_hat - self.negative.denoise(x_t, alpha, sigma))

    def guided(self, x_t, alpha, sigma):
        z0_hat = self.denoise(x_t, alpha, sigma)
        return z0_hat + self.push(x_t, z0_hat, alpha, sigma)


class Noiseless(Levels):
    """The next state is the estimate itself: nothing but the mode is left of a level."""

    def step(self, i, x_t, z0_hat, generator=None):
        return self.scales(i + 1)[0] * z0_hat


def guided_problem(w: float):
    prior, h, y = random_problem(0)
    conditional = GaussianPrior(prior.mean, 0.05 * prior.cov)
    negative = GaussianPrior(prior.mean + 0.3, 0.1 * prior.cov + 0.02 * torch.eye(6, **DOUBLE))
    return Guided(conditional, negative, w), h, y


@pytest.mark.parametrize(
    ("w", "proximal"), [(1.0, Proximal(steps=12)), (3.0, Proximal(steps=12)), (7.5, Proximal(steps=12)), (3.0, None)]
)
def test_a_guided_solve_ends_at_the_guided_prior_s_mode(w, proximal):
    """The MAP of ``p(z) p(c | z)^w`` under the measurement, which for Gaussians is known, as the noise falls to 0.

    By proximal levels and by Jacobian-free steps. (Of these at w = 3: at 7.5 the derivative of D_w has eigenvalues
    below 0 at high noise, and the bracket descends no more.)
    """
    prior, h, y = guided_problem(w)
    expected, noisier = prior.sharpened.measured(h, y, 0.1)[0].flatten(), prior.measured(h, y, 0.1)[0].flatten()
    steps = {"inner_steps": 12, "jacobian": "free"} if proximal is None else {"inner_steps": 0, "proximal": proximal}
    schedule = Noiseless([(1.0, s) for s in torch.logspace(0.5, -2, 200, **DOUBLE).tolist()])
    start = torch.zeros(1, 1, 1, 6, **DOUBLE)
    found = vml_map(start, prior=prior, measurement=measured(h, y), schedule=schedule, stop_at=0, **steps)
    assert (found.latent.flatten() - expected).norm() < 0.1 * max((noisier - expected).norm(), expected.norm())
    if w > 1:
        assert (found.latent.flatten() - expected).norm() < 0.3 * (noisier - expected).norm()


def test_guidance_is_held_over_a_level_and_no_step_sees_its_derivative():
    """The steps of a level are those of the conditional prior with a constant added to its estimate."""
    prior, h, y = guided_problem(7.5)
    x_t = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(3), **DOUBLE)
    at = {"measurement": measured(h, y, batch=2), "alpha": 0.8, "sigma": 0.6, "steps": 3, "stop_at": 0}
    push = prior.push(x_t, prior.denoise(x_t, 0.8, 0.6), 0.8, 0.6)

    class Shifted(GaussianPrior):
        def denoise(self, x_t, alpha, sigma):
            return super().denoise(x_t, alpha, sigma) + push

    found, expected = (descend(x_t, prior=p, **at) for p in (prior, Shifted(prior.mean, prior.cov)))
    assert torch.allclose(found.x_t, expected.x_t) and torch.allclose(found.z0_hat, expected.z0_hat)
    unmoved = descend(x_t, prior=prior, **at | {"steps": 0})
    assert torch.allclose(unmoved.z0_hat, prior.guided(x_t, 0.8, 0.6))


class Scaled:
    """A prior whose decoder multiplies, and counts."""

    def __init__(self, factor: float):
        self.factor, self.drawn = factor, 0

    def decode(self, z):
        self.drawn += 1
        return self.factor * z + 0.1 * z**2


def test_two_fidelities_draw_as_the_full_decoder_where_it_is_drawn_anew_and_pull_back_as_the_small_one():
    full, small = Scaled(1.0), Scaled(0.8)
    both = TwoFidelities(full, small, refresh=2)
    z, c = torch.randn(1, 3, 2, 2, **DOUBLE), torch.ones(1, 3, 2, 2, **DOUBLE)
    image, pull = both.decode_pullback(z)
    assert torch.allclose(image, full.decode(z)) and torch.allclose(pull(c), 0.8 + 0.2 * z)
    moved, _ = both.decode_pullback(z + 0.1)
    assert torch.allclose(moved, small.decode(z + 0.1) + full.decode(z) - small.decode(z))
    again, _ = both.decode_pullback(z + 0.2)
    assert torch.allclose(again, full.decode(z + 0.2))


def test_corrections_of_two_fidelities_end_at_y_as_the_full_decoder_draws():
    """c is drawn anew at each gradient here, so that the point of rest is the full decoder's, whatever the draft."""
    prior, _, _ = random_problem()
    full, small = GaussianPrior(prior.mean, prior.cov), GaussianPrior(prior.mean, prior.cov)
    full.decode, small.decode = lambda z: z + 0.05 * z**2, lambda z: 0.9 * z
    measurement = Measurement(Linear(torch.eye(6, **DOUBLE)), torch.full((1, 1, 1, 6), 0.4, **DOUBLE), 0.01)
    x_t = torch.zeros(1, 1, 1, 6, **DOUBLE)
    how = {"how": Proximal(steps=40, refresh=1), "stop_at": 0, "draft": small}
    _, found = ended(full, x_t, measurement, 0.1, 1.0, **how)
    assert (full.decode(found.z0_hat) - 0.4).abs().max() < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"alone_below": -1.0},
        {"alone_below": float("nan")},
        {"steps": -1},
        {"steps": 1.5},
        {"refresh": 0},
        {"steps": True},
    ],
)
def test_what_is_no_proximal_step_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected"):
        Proximal(**wrong)


def test_a_state_without_signal_is_left_as_it_is():
    prior, h, y = random_problem()
    inner, found = ended(prior, torch.ones(1, 1, 1, 6, **DOUBLE), measured(h, y), 0.0, 1.0, settle=lambda x: x + 1)
    assert found is inner or torch.equal(found.z0_hat, inner.z0_hat)
