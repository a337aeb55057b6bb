"""RED-diff against the closed form of its expected gradient (float64, Gaussian priors), and its choices."""

import math

import pytest
import torch
from gaussian import Linear, random_problem

from vml_ldm import CallablePrior, Mask, Measurement
from vml_ldm.red import ADAM, WEIGHTINGS, RedDiff, red_diff, red_diff_levels
from vml_ldm.solve import Levels, noise_like

SCALES = [(1.0, 2.0), (0.8, 0.6), (0.95, 0.3)]
FORMULAS = {
    "linear": lambda r: r,
    "sqrt": lambda r: r**0.5,
    "square": lambda r: r * r,
    "log": lambda r: math.log(1 + r),
    "truncated_linear": lambda r: r if r < 1 else 1.0,
    "power_2_3": lambda r: (r * r) ** (1 / 3),
    "constant": lambda r: 1.0,
}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def start(batch=1, seed=0):
    return 2 * torch.randn(batch, 1, 1, 6, generator=seeded(seed), dtype=torch.float64)


def solve(mu, *, prior=None, y=None, scales=SCALES, **options):
    gaussian, h, own_y = random_problem()
    y = own_y.expand(len(mu), -1, -1, -1) if y is None else y
    return red_diff(
        mu,
        prior=prior or gaussian,
        measurement=Measurement(Linear(h), y, 0.1),
        schedule=Levels(scales),
        **{"generator": seeded(), **options},
    )


def gradient(mu, **options):
    """What one step of plain gradient descent took off mu."""
    return mu - solve(mu, optimizer=torch.optim.SGD, lr=1.0, **options).latent


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("snr_inv", [0.03, 0.9, 1.1, 14.6])
def test_weightings_are_their_formulas(name, snr_inv):
    assert WEIGHTINGS.keys() == FORMULAS.keys()
    assert math.isclose(WEIGHTINGS[name](snr_inv), FORMULAS[name](snr_inv), rel_tol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("alpha, sigma", SCALES)
@pytest.mark.parametrize("s", [0.0, 0.3])
def test_a_step_follows_the_paper_s_loss(weighting, alpha, sigma, s):
    """autograd's gradient of obs mean(r^2) / 2 + lambda w mean(stop_grad(e_hat - n2) x0), through a bent decoder."""
    prior, h, y = random_problem()
    prior.decode = lambda z: torch.tanh(z) + 0.1 * z
    mu = start().requires_grad_()
    generator = seeded()
    n1 = noise_like(mu.detach(), generator) if s else 0.0
    n2 = noise_like(mu.detach(), generator)
    x0 = mu + s * n1
    x_t = alpha * x0 + sigma * n2
    e_hat = (x_t - alpha * prior.denoise(x_t, alpha, sigma)) / sigma
    prior_term = ((e_hat - n2).detach() * x0).mean()
    loss = 3.0 * (y - prior.decode(x0) @ h.T).square().mean() / 2
    loss = loss + 0.7 * FORMULAS[weighting](sigma / alpha) * prior_term
    (expected,) = torch.autograd.grad(loss, mu)
    choices = {"weighting": weighting, "s": s, "obs_weight": 3.0, "lambda_": 0.7, "scales": [(alpha, sigma)]}
    assert torch.allclose(gradient(mu.detach(), prior=prior, **choices), expected, rtol=1e-9, atol=1e-12)


def stationary(obs, lambda_, weighting, alpha, sigma):
    """The root and the matrix of obs H^T (H mu - y) / n_y + lambda w alpha sigma S^-1 (mu - m) / n = 0."""
    prior, h, y = random_problem()
    marginal = alpha**2 * prior.cov + sigma**2 * torch.eye(6, dtype=torch.float64)
    data = obs * h.T @ h / len(h)
    regular = lambda_ * FORMULAS[weighting](sigma / alpha) * alpha * sigma * torch.linalg.inv(marginal) / 6
    return torch.linalg.solve(data + regular, obs * h.T @ y.flatten() / len(h) + regular @ prior.mean), data + regular


@pytest.mark.parametrize("weighting", ["linear", "square"])
@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_the_expected_gradient_vanishes_at_the_stationary_point(weighting, alpha, sigma):
    """Within 4 standard errors over 20000 draws of the noise; half a unit away it is the matrix times the distance."""
    root, matrix = stationary(2.0, 0.5, weighting, alpha, sigma)
    for offset in (0.0, 0.5):
        mu = (root + offset).expand(20_000, 1, 1, 6)
        draws = gradient(mu, lambda_=0.5, obs_weight=2.0, weighting=weighting, scales=[(alpha, sigma)])
        draws = draws.reshape(-1, 6)
        error = draws.mean(0) - matrix @ (offset * torch.ones(6, dtype=torch.float64))
        assert (error.abs() < 4 * draws.std(0) / len(draws) ** 0.5).all()
    assert (draws.mean(0).abs() > 20 * draws.std(0) / len(draws) ** 0.5).any()


def test_the_iterates_of_one_level_average_to_the_stationary_point():
    """200 steps of gradient descent from the prior's mean, 400 chains, the last 50 iterates."""
    prior, h, y = random_problem()
    root, matrix = stationary(2.0, 2.0, "linear", 0.8, 0.6)
    levels = red_diff_levels(
        prior.mean.expand(400, 1, 1, 6),
        prior=prior,
        measurement=Measurement(Linear(h), y.expand(400, -1, -1, -1), 0.1),
        schedule=Levels([(0.8, 0.6)]),
        order=[0] * 200,
        lambda_=2.0,
        obs_weight=2.0,
        lr=1 / torch.linalg.eigvalsh(matrix).max().item(),
        optimizer=torch.optim.SGD,
        generator=seeded(),
    )
    last = torch.stack([level.z0_hat.flatten(1) for level in levels])[-50:].mean(0)
    standard_error = last.std(0) / len(last) ** 0.5
    assert ((last.mean(0) - root).abs() < 4 * standard_error).all()
    assert standard_error.max() < 0.02 * (root - prior.mean).norm()


def test_the_default_optimiser_is_adam_with_its_state_kept_over_the_levels():
    """Without the prior's term, the same iterates as torch's Adam (0.9, 0.99) on half the mean square."""
    _, h, y = random_problem()
    mu = start().requires_grad_()
    adam = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99))
    for _ in SCALES:
        adam.zero_grad()
        (4 * (y - mu @ h.T).square().mean() / 2).backward()
        adam.step()
    assert torch.allclose(solve(start(), lambda_=0.0).latent, mu.detach(), rtol=1e-9)


@pytest.mark.parametrize("optimizer", [ADAM, torch.optim.SGD, torch.optim.RMSprop, torch.optim.LBFGS])
def test_any_optimiser_fits_the_measurement(optimizer):
    before = solve(start(), lambda_=0.0, lr=1e-12, optimizer=optimizer).residual
    after = solve(start(), lambda_=0.0, optimizer=optimizer, order=[0, 1, 2] * 100, lr=0.3).residual
    assert after < 0.1 * before


@pytest.mark.parametrize(
    "order, indices",
    [("descending", [0, 1, 2, 3]), ("ascending", [3, 2, 1, 0]), ([2, 2, 0], [2, 2, 0])],
)
def test_the_levels_are_visited_in_order(order, indices):
    scales = [*SCALES, (0.99, 0.1)]
    trace = solve(start(), scales=scales, order=order).trace
    assert [(level["alpha"], level["sigma"]) for level in trace] == [scales[i] for i in indices]


def test_random_order_is_one_shuffle_of_all_levels():
    scales = [(1.0, sigma) for sigma in range(50, 0, -1)]
    visited = [[level["sigma"] for level in solve(start(), scales=scales, order="random").trace] for _ in range(2)]
    assert visited[0] == visited[1] and sorted(visited[0]) == list(range(1, 51))
    assert visited[0] not in (sorted(visited[0]), sorted(visited[0], reverse=True))


def test_a_seed_gives_one_result():
    first, again, other = (solve(start(), generator=seeded(seed)).latent for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("order", ["descending", "random"])
def test_a_batch_is_what_its_images_are_alone(order):
    """Masks of different size: the means are per image. Noise is per image."""
    prior = CallablePrior(lambda x, sigma: x / (1 + sigma**2))
    draw = lambda *shape: torch.rand(shape, generator=seeded(7), dtype=torch.float64)  # noqa: E731
    mu, mask = draw(3, 3, 4, 4), (draw(3, 1, 4, 4) < torch.tensor([0.2, 0.5, 0.9]).reshape(3, 1, 1, 1)).double()
    y = mask * draw(3, 3, 4, 4)

    def run(rows, generators):
        measurement = Measurement(Mask(mask[rows]), y[rows], 0.1)
        options = {"schedule": Levels(SCALES), "order": order, "s": 0.1, "generator": generators}
        return red_diff(mu[rows], prior=prior, measurement=measurement, **options)

    together = run(slice(3), [seeded(i) for i in range(3)])
    alone = [run(slice(i, i + 1), [seeded(i)]) for i in range(3)]
    assert torch.allclose(together.latent, torch.cat([each.latent for each in alone]), rtol=1e-12)
    assert torch.allclose(together.residual, torch.cat([each.residual for each in alone]), rtol=1e-12)


def test_missing_pixels_do_not_dilute_the_measured_ones():
    """The gradient on a measured pixel is the same whether y holds the missing ones as zeros or leaves them out."""
    prior, _, _ = random_problem()
    mu, mask = start(), torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64).reshape(1, 1, 1, 6)
    kept = mask.flatten().bool()
    options = {"prior": prior, "schedule": Levels([(0.8, 0.6)]), "optimizer": torch.optim.SGD, "lr": 1.0}
    latents = [
        red_diff(mu, measurement=Measurement(operator, operator(mu + 1), 0.1), generator=seeded(), **options).latent
        for operator in (Mask(mask), lambda z: z[..., kept])
    ]
    assert torch.allclose(*latents, rtol=1e-12)


def test_calls_are_counted_and_no_graph_reaches_the_denoiser():
    prior, _, _ = random_problem()
    denoise = prior.denoise

    def without_graph(x_t, alpha, sigma):
        assert not torch.is_grad_enabled() and not x_t.requires_grad
        return denoise(x_t, alpha, sigma)

    prior.denoise = without_graph
    solution = solve(start(), prior=prior)
    assert solution.calls == {"denoise": 3, "decode": 3 + 1, "decode_vjp": 3}
    assert len(solution.trace) == 3 and not solution.latent.requires_grad


def test_a_level_can_be_edited_on_the_way():
    prior, h, y = random_problem()
    levels = red_diff_levels(
        start(), prior=prior, measurement=Measurement(Linear(h), y, 0.1), schedule=Levels(SCALES), generator=seeded()
    )
    first = next(levels)
    assert torch.equal(first.z0_hat, first.x_next) and not torch.equal(first.z0_hat, start())
    first.x_next = torch.full_like(first.x_next, 100.0)
    assert (next(levels).z0_hat - 100).abs().max() < 1


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "snr"},
        {"order": "sideways"},
        {"order": []},
        {"order": [0, 3]},
        {"order": [-1]},
        {"order": [0.5]},
        {"order": [True, False]},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lambda_": -0.25},
        {"obs_weight": math.inf},
        {"s": -1.0},
        {"scales": [(0.0, 1.0), (1.0, 0.5)]},
        {"y": torch.zeros(2, 1, 1, 4)},
    ],
    ids=str,
)
def test_bad_choices_are_refused_before_any_network_runs(options):
    class Untouched:
        def denoise(self, *state):
            raise AssertionError("the denoiser ran")

        encode = decode = denoise

    with pytest.raises(ValueError, match="expected"):
        solve(start(), prior=Untouched(), **options)


@pytest.mark.parametrize("order", ["sideways", [], [-1], [1.5], [True]], ids=str)
def test_settings_know_a_bad_order(order):
    with pytest.raises(ValueError, match=r"order is .*; expected"):
        RedDiff(order=order)


def test_our_defaults_behind_a_vae_weigh_the_prior_less_and_can_be_replaced():
    ours = RedDiff.for_latents(lr=0.5)
    assert ours == RedDiff(lambda_=1 / 16, lr=0.5) and ours.lambda_ < RedDiff().lambda_
    with pytest.raises(ValueError, match="lambda_ is -1"):
        RedDiff.for_latents(lambda_=-1)
