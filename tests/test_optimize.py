"""Inner steps: the preconditioner against dense matrices, its fixed points and speed, and the step rules (float64)."""

from functools import partial

import pytest
import torch
from gaussian import GaussianPrior, Linear, random_problem
from test_objective import SCALES

from vml_ldm.objective import NonFiniteError, linearise, vml_bracket, vml_gradient
from vml_ldm.operators import Custom, Measurement
from vml_ldm.optimize import Descent, InnerStep, descend, precondition, secant_length
from vml_ldm.proximal import correct

DOUBLE = {"dtype": torch.float64}
NEWTON = InnerStep(precondition="gauss-newton", cg_steps=6)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def affine(function, d):
    """(matrix, offset) of an affine map of (1, 1, 1, d)."""
    at = lambda x: function(x.reshape(1, 1, 1, d)).flatten()  # noqa: E731
    offset = at(torch.zeros(d, **DOUBLE))
    return torch.stack([at(unit) - offset for unit in torch.eye(d, **DOUBLE)], dim=1), offset


class Bent:
    """A nonlinear operator."""

    def __init__(self, h):
        self.h = h

    def __call__(self, image):
        return torch.sin(image @ self.h.T)


class Solving(Linear):
    """A linear operator with its own ``(A^T A + rho I)^-1``."""

    closed_form, solved = True, 0

    def solve(self, b, rho):
        self.solved += 1
        matrix = self.h.T @ self.h + rho.reshape(-1, 1, 1, 1, 1) * torch.eye(self.h.shape[1]).to(b)
        return torch.linalg.solve(matrix, b[..., None])[..., 0]


def pixels(scale):
    prior, *_ = random_problem()
    prior.decode, prior.pixel_scale = (lambda z: scale * z + 0.5), scale
    return prior


def bent_decoder():
    prior, *_ = random_problem()
    prior.decode = lambda z: torch.tanh(z) + 0.1 * z.flip(-1) ** 2
    return prior


def test_linearise_gives_the_jacobian_and_its_transpose_of_complex_values_too():
    """``push(v) = J v`` against a finite difference, ``pull(c) = Re J^H c`` against the inner product, twice each."""
    function = lambda x: torch.fft.rfft(torch.sin(x))  # noqa: E731
    x = draw(2, 1, 1, 6)
    value, push, pull = linearise(function, x)
    assert torch.equal(value, function(x))
    for seed in (1, 2):
        v, c = draw(2, 1, 1, 6, seed=seed), torch.complex(draw(2, 1, 1, 4, seed=seed), draw(2, 1, 1, 4, seed=seed + 9))
        assert torch.allclose(push(v), (function(x + 1e-6 * v) - function(x - 1e-6 * v)) / 2e-6, atol=1e-8)
        assert torch.allclose((pull(c) * v).sum(), (c.conj() * push(v)).sum().real)


@pytest.mark.parametrize("operator", [Linear, Bent, Solving])
@pytest.mark.parametrize("prior", [pixels(0.5), bent_decoder()], ids=["pixels", "bent decoder"])
def test_the_preconditioner_is_the_dense_inverse(prior, operator):
    """N^-1 b with N built entry by entry from the Jacobian of A o Dec; each image has its own sigma_y."""
    _, h, y = random_problem()
    z, b, sigma_y, noise = draw(2, 1, 1, 6), draw(2, 1, 1, 6, seed=1), torch.tensor([0.1, 0.4], **DOUBLE), 0.7
    measurement = Measurement(operator(h), y.expand(2, -1, -1, -1), sigma_y)
    u = precondition(b, z, prior=prior, measurement=measurement, noise=noise, cg_steps=6)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x: operator(h)(prior.decode(x)).flatten(), z[i].flatten())
        n = jacobian.T @ jacobian / sigma_y[i] ** 2 + torch.eye(6, **DOUBLE) / noise**2
        assert torch.allclose(u[i].flatten(), torch.linalg.solve(n, b[i].flatten()), rtol=1e-7, atol=1e-10)
    if operator is Solving:  # the closed form is for pixels alone
        assert measurement.operator.solved == hasattr(prior, "pixel_scale")


@pytest.mark.parametrize("wrap", [lambda custom: custom, lambda custom: lambda x: custom(x) + x.sum()])
def test_a_preconditioner_needs_an_operator_with_two_derivatives(wrap):
    _, h, y = random_problem()
    squared = wrap(Custom(lambda x: Linear(h)(x) ** 2, lambda x, c: Linear(h).adjoint(2 * Linear(h)(x) * c)))
    measurement, z = Measurement(squared, y, 0.1), draw(1, 1, 1, 6)
    with pytest.raises(TypeError, match=r"can be differentiated once.*; expected .*precondition='none'"):
        precondition(z, z, prior=pixels(0.5), measurement=measurement, noise=0.7, cg_steps=2)


@pytest.mark.parametrize("cg_steps", [1, 3])
def test_a_short_solve_is_as_long_as_it_should_be(cg_steps):
    """<u, N u> = <u, b> > 0 after any number of conjugate-gradient steps, so that length 1 is the minimiser along u."""
    prior, (_, h, y) = bent_decoder(), random_problem()
    z, b = draw(1, 1, 1, 6), draw(1, 1, 1, 6, seed=1)
    u = precondition(b, z, prior=prior, measurement=Measurement(Bent(h), y, 0.1), noise=0.7, cg_steps=cg_steps)
    jacobian = torch.autograd.functional.jacobian(lambda x: Bent(h)(prior.decode(x)).flatten(), z.flatten())
    n = jacobian.T @ jacobian / 0.1**2 + torch.eye(6, **DOUBLE) / 0.7**2
    along = u.flatten() @ b.flatten()
    assert along > 0 and torch.allclose(u.flatten() @ n @ u.flatten(), along)


@pytest.mark.parametrize("cg_steps", [1, 6])
@pytest.mark.parametrize("jacobian", ["exact", "free"])
@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_the_preconditioned_step_rests_where_plain_descent_does(alpha, sigma, jacobian, cg_steps):
    """At the root of VML_S's gradient, which denoises to the MAP, and not elsewhere."""
    prior, h, y = random_problem()
    at = {"prior": prior, "measurement": Measurement(Linear(h), y, 0.1), "alpha": alpha, "sigma": sigma}
    matrix, offset = affine(lambda x: vml_gradient(x, **at)[0], 6)
    root = torch.linalg.solve(matrix, -offset).reshape(1, 1, 1, 6)
    for step in (InnerStep(), InnerStep(precondition="gauss-newton", cg_steps=cg_steps)):
        move = lambda x, step=step: descend(x, **at, steps=1, stop_at=0, jacobian=jacobian, step=step).x_t - x  # noqa: E731
        assert move(root).norm() < 1e-6 * move(root + root.norm() * draw(1, 1, 1, 6)).norm()


def safe_length(h, sigma_y, alpha, sigma, jacobian):
    """The fixed length that InnerStep's text calls safe."""
    data, own = torch.linalg.matrix_norm(h, 2).item() ** 2 / sigma_y**2, alpha**2 / sigma**2
    return 1 / (data + own / 4) if jacobian == "exact" else 1 / max(data, own)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("jacobian", ["exact", "free"])
@pytest.mark.parametrize("alpha, sigma", SCALES)
def test_the_documented_lengths_are_stable_for_a_gaussian(alpha, sigma, jacobian, seed):
    """1 if preconditioned, otherwise `safe_length`: the error's matrix has its eigenvalues in the disc on [0, 1]."""
    prior, h, y = random_problem(seed)
    for sigma_y in (0.01, 0.3, 10.0):
        at = {"prior": prior, "measurement": Measurement(Linear(h), y, sigma_y), "alpha": alpha, "sigma": sigma}
        fixed = InnerStep(rule=safe_length(h, sigma_y, alpha, sigma, jacobian))
        for step in (NEWTON, fixed):
            move = partial(descend, **at, steps=1, stop_at=0, jacobian=jacobian, step=step)
            matrix, _ = affine(lambda x, move=move: move(x).x_t, 6)
            assert (torch.linalg.eigvals(matrix) - 0.5).abs().max() < 0.5 + 1e-6


def ill_conditioned(d=32):
    """N(0, I) seen through singular values from 1 to 0.001, with noise 0.0003: (prior, h, y, MAP)."""
    left, right = (torch.linalg.qr(draw(d, d, seed=seed))[0] for seed in (0, 1))
    h = left @ torch.diag(torch.logspace(0, -3, d, **DOUBLE)) @ right.T
    prior = GaussianPrior(torch.zeros(d, **DOUBLE), torch.eye(d, **DOUBLE))
    prior.pixel_scale = 1.0
    y = (draw(d, seed=2) @ h.T + 3e-4 * draw(d, seed=3)).reshape(1, 1, 1, d)
    return prior, h, y, prior.measured(h, y, 3e-4)[0]


@pytest.mark.parametrize("jacobian", ["exact", "free"])
def test_an_ill_conditioned_operator_stalls_plain_descent_and_not_the_preconditioned(jacobian):
    """Plain descent is still 40 % away after 200 steps; preconditioned, 20 steps reach the MAP."""
    prior, h, y, goal = ill_conditioned()

    def error(operator, steps, step):
        at = {"prior": prior, "measurement": Measurement(operator, y, 3e-4), "alpha": 1.0, "sigma": 0.5}
        x_t = draw(1, 1, 1, 32, seed=4)
        z0_hat = descend(x_t, **at, steps=steps, jacobian=jacobian, stop_at=0, step=step).z0_hat
        return ((z0_hat - goal).norm() / goal.norm()).item()

    assert error(Linear(h), 200, InnerStep()) > 0.4
    assert error(Linear(h), 20, InnerStep(precondition="gauss-newton", cg_steps=64)) < 1e-6
    assert error(Solving(h), 20, InnerStep(precondition="gauss-newton")) < 1e-6


def problem(batch=1):
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y + torch.arange(batch, **DOUBLE).reshape(-1, 1, 1, 1), 0.1)
    return {"prior": prior, "measurement": measurement, "alpha": 0.8, "sigma": 0.6}, draw(batch, 1, 1, 6)


def test_a_fixed_step_is_the_equation():
    """``x_t -= alpha^2 eta g``, or without the pull-back ``x_t -= alpha eta b``; SGD makes the same step."""
    at, x_t = problem()
    g, _ = vml_gradient(x_t, **at)
    b, _ = vml_bracket(x_t, at["prior"].denoise(x_t, 0.8, 0.6), **at)
    eta = 0.003
    for rule in (eta, partial(torch.optim.SGD, lr=eta)):
        one = partial(descend, x_t, **at, steps=1, stop_at=0, step=InnerStep(rule=rule))
        assert torch.allclose(one().x_t, x_t - 0.8**2 * eta * g)
        assert torch.allclose(one(jacobian="free").x_t, x_t - 0.8 * eta * b)


def test_an_optimiser_keeps_its_state_through_a_level():
    """Adam in units of x_t / alpha: lr in the gradient's sign at first, and then what torch makes of both gradients."""
    at, x_t = problem()
    adam = partial(torch.optim.Adam, lr=0.1)
    x = (x_t / 0.8).requires_grad_()
    optimizer = adam([x])
    for steps in (1, 2):
        g, _ = vml_gradient(0.8 * x.detach(), **at)
        x.grad = 0.8 * g
        optimizer.step()
        found = descend(x_t, **at, steps=steps, stop_at=0, step=InnerStep(rule=adam)).x_t
        assert torch.allclose(found, 0.8 * x)
        if steps == 1:
            assert torch.allclose(found, x_t - 0.8 * 0.1 * g.sign())


def test_at_pure_noise_no_step_is_taken():
    at, x_t = problem()
    prior = at["prior"]
    found = descend(x_t, **{**at, "alpha": 0.0, "sigma": 1.0}, steps=3, step=NEWTON)
    assert torch.equal(found.x_t, x_t) and torch.equal(found.z0_hat, prior.denoise(x_t, 0.0, 1.0))


@pytest.mark.parametrize("step", [NEWTON, InnerStep(rule=partial(torch.optim.Adam, lr=0.1))], ids=["newton", "adam"])
def test_a_batch_is_what_its_images_are_alone(step):
    """Also where one image comes to rest before the others: an optimiser's momentum does not carry it on."""
    at, x_t = problem(3)
    together = descend(x_t, **at, steps=40, stop_at=3.0, step=step)
    assert len(set(together.steps.tolist())) > 1
    for i in range(3):
        measurement = Measurement(at["measurement"].operator, at["measurement"].y[i : i + 1], 0.1)
        alone = descend(x_t[i : i + 1], **{**at, "measurement": measurement}, steps=40, stop_at=3.0, step=step)
        assert alone.steps == together.steps[i]
        assert torch.allclose(alone.x_t, together.x_t[i : i + 1], atol=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "adam"},
        {"rule": 0.0},
        {"rule": True},
        {"rule": float("inf")},
        {"rule": float("nan")},
        {"rule": True},
        {"precondition": "svd"},
        {"cg_steps": 0},
        {"cg_steps": True},
    ],
)
def test_bad_steps_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        InnerStep(**wrong)


def test_a_residual_that_is_not_finite_is_no_rest():
    prior, h, y = random_problem()
    prior.decode = lambda z: z * float("nan")
    measurement = Measurement(Linear(h), y, 0.1)
    with pytest.raises(NonFiniteError, match=r"residual .*nan.*expected finite"):
        descend(draw(1, 1, 1, 6), prior=prior, measurement=measurement, alpha=1.0, sigma=1.0, steps=1)


def test_a_trial_tells_the_minimiser_along_a_direction():
    """For a quadratic loss: no slope is left along d, and v there is the one that is found."""
    root = draw(5, 5)
    matrix, goal = root @ root.T + 0.1 * torch.eye(5, **DOUBLE), draw(5, seed=1)
    v_at = lambda x: matrix @ (goal - x)  # noqa: E731
    x, d = draw(3, 5, seed=2), draw(3, 5, seed=3)
    v = torch.stack([v_at(one) for one in x])
    d = d * (v * d).sum(1, keepdim=True).sign()
    best = (v * d).sum(1) / torch.einsum("bi,ij,bj->b", d, matrix, d)
    trial = best * torch.tensor([0.5, 1.0, 4.0], **DOUBLE)
    images = lambda rows: rows.reshape(3, 1, 1, 5)  # noqa: E731
    v_trial = torch.stack([v_at(one) for one in x + trial[:, None] * d])
    eta, v_end, believed = secant_length(images(v), images(v_trial), images(d), trial)
    assert torch.allclose(eta, best)
    assert believed.tolist() == [True, True, False]  # the last went four times as far as it should have
    assert torch.allclose(v_end.reshape(3, 5), torch.stack([v_at(one) for one in x + best[:, None] * d]))
    assert (v_end.reshape(3, 5) * d).sum(1).abs().max() < 1e-9


def test_a_step_goes_no_further_than_its_trial_unless_that_is_believed():
    """v hardly falls, rises, falls steeply: the first two end at the trial, where v is known, the last goes back."""
    v, d, trial = torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1), torch.full((3,), 2.0)
    v_trial = torch.tensor([0.99, 2.0, -99.0]).reshape(3, 1, 1, 1)
    eta, v_end, believed = secant_length(v, v_trial, d, trial)
    assert eta.tolist() == pytest.approx([2.0, 2.0, 0.4]) and not believed.any()
    assert torch.equal(v_end[:2], v_trial[:2]) and v_end[2].item() == pytest.approx(-19.0)


def test_a_step_does_not_rely_on_a_gradient_that_outgrows_those_it_is_made_of():
    """The minimiser is at 2.5 times the trial. Across d v grows: foretold there 1 + 2.5 times as long, or hardly."""
    v, d = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    images = lambda rows: torch.stack(rows).reshape(2, 1, 1, 2)  # noqa: E731
    v_trial = images([torch.tensor([0.6, 3.0]), torch.tensor([0.6, 0.1])])
    eta, v_end, believed = secant_length(images([v, v]), v_trial, images([d, d]), torch.ones(2))
    assert believed.tolist() == [False, True] and eta.tolist() == pytest.approx([1.0, 2.5])
    assert torch.equal(v_end[0], v_trial[0]) and v_end[1].flatten().tolist() == pytest.approx([0.0, 0.25], abs=1e-6)


def test_no_trial_is_further_than_the_level_s_noise():
    rule = InnerStep("secant").begin("exact", noise=0.5)
    v, long = torch.ones(1, 1, 2, 2), lambda d, v: torch.tensor([7.0])
    d, eta = rule(torch.zeros_like(v), v, long, torch.ones(1, dtype=torch.bool))
    assert (eta * d).square().mean().sqrt() == 0.5
    rule(
        torch.zeros_like(v), 2 * v, long, torch.ones(1, dtype=torch.bool)
    )  # v rises: the next trial's length is `long` again
    assert (rule.eta * rule.d).square().mean().sqrt() == pytest.approx(0.5)


class Counting:
    """A prior that counts its decodes."""

    def __init__(self, prior):
        self.prior, self.decodes = prior, 0

    def denoise(self, *state):
        return self.prior.denoise(*state)

    def decode(self, z):
        self.decodes += 1
        return self.prior.decode(z)


@pytest.mark.parametrize("seed", range(12))
def test_secant_steps_approach_the_map_no_slower_than_analytic_ones_and_with_fewer_decodes(seed):
    """6 unknowns, 20 steps; and faster than by the safe fixed length."""
    prior, h, y = random_problem(seed)
    counting, measurement = Counting(prior), Measurement(Linear(h), y, 0.1)
    expected, _ = prior.measured(h, y, 0.1)
    start = draw(1, 1, 1, 6, seed=seed)

    def solve(rule):
        counting.decodes = 0
        at = {"prior": counting, "measurement": measurement, "alpha": 0.8, "sigma": 0.6}
        end = descend(start, steps=20, stop_at=0, step=InnerStep(rule), **at)
        return (end.z0_hat - expected).norm().item(), counting.decodes

    safe = 1 / (torch.linalg.matrix_norm(h, 2).item() ** 2 / 0.1**2 + 0.8**2 / (4 * 0.6**2))
    (distance, decodes), (analytic, two_each), (fixed, _) = solve("secant"), solve("analytic"), solve(safe)
    assert distance <= analytic * (1 + 1e-9) < fixed
    assert 20 + 1 <= decodes <= two_each == 2 * 20
    assert decodes < two_each or distance == pytest.approx(analytic)  # no trial believed: the same steps


def test_a_secant_step_is_bounded_where_its_trial_was_not_as_it_should_be():
    """Of two images one had a trial as it should be; along the other's the gradient rose."""
    rule = InnerStep("secant").begin("exact", noise=9.0)
    v, asked = torch.ones(2, 1, 1, 1, **DOUBLE), []

    def length(d, v):
        asked.append(d)
        return torch.full((2,), 0.5, **DOUBLE)

    d, eta = rule(torch.zeros_like(v), v, length, torch.ones(2, dtype=torch.bool))
    assert torch.equal(d, v) and eta.tolist() == [0.5, 0.5]
    v_trial = torch.tensor([0.5, 1.5], **DOUBLE).reshape(2, 1, 1, 1)
    move, one = rule(d * 0.5, v_trial, length, torch.ones(2, dtype=torch.bool))
    assert one.tolist() == [1, 1] and len(asked) == 2
    ends = [1.0, 0.5]  # twice the trial, where v is 0; at the trial
    beta = 1.5 * (1.5 - 1)  # of Polak and Ribiere, for the second; the first has v = 0 and goes nowhere
    assert torch.allclose(asked[1].flatten(), torch.tensor([0.0, 1.5 + beta], **DOUBLE))
    trials = [0.0, 0.5 * (1.5 + beta)]  # as far as `length` says
    assert move.flatten().tolist() == pytest.approx(
        [end - 0.5 + trial for end, trial in zip(ends, trials, strict=True)]
    )


def corrected(at, x_t, **options):
    inner = descend(x_t, **at, steps=0)
    return inner, correct(inner, prior=at["prior"], measurement=at["measurement"], noise=0.75, **options)


def test_a_correction_ends_where_the_decoder_meets_y_and_the_estimate():
    """At the minimiser of ``|y - H z|^2 / (2 sigma_y^2) + |z - z0_hat|^2 / (2 s^2)``, s half of the level's noise."""
    at, x_t = problem(3)
    inner, found = corrected(at, x_t, steps=60, stop_at=0)
    h, y = at["measurement"].operator.h, at["measurement"].y
    data, near = h.T @ h / 0.1**2, torch.eye(h.shape[1], **DOUBLE) / (0.75 / 2) ** 2
    expected = torch.linalg.solve(data + near, (y @ h / 0.1**2 + inner.z0_hat @ near)[..., None])[..., 0]
    assert torch.allclose(found.z0_hat, expected, atol=1e-6) and torch.equal(found.x_t, inner.x_t)
    assert not torch.allclose(inner.z0_hat, expected, atol=0.1)


def test_a_correction_moves_nothing_that_y_does_not_tell():
    prior, _, y = random_problem()
    h = torch.eye(6, **DOUBLE)[:2]
    at = {"prior": prior, "measurement": Measurement(Linear(h), y[..., :2], 0.1), "alpha": 0.8, "sigma": 0.6}
    inner, found = corrected(at, draw(1, 1, 1, 6), steps=10, stop_at=0)
    moved = (found.z0_hat - inner.z0_hat).abs().flatten()
    assert moved[:2].min() > 0.01 and moved[2:].max() < 1e-12


def test_a_correction_leaves_an_image_of_which_the_operator_sees_nothing():
    """In float32, where the length of a step of nothing must not overflow: all light of the first is clipped."""
    prior, _, _ = random_problem()
    prior.decode = lambda z: z
    z = torch.tensor([[2.0] * 6, [0.4] * 6])[:, None, None]
    measurement = Measurement(lambda x: (2 * x - 0.5).clamp(0, 1), torch.full_like(z, 0.5), 0.01)
    inner = Descent(z, z, *(torch.zeros(2) for _ in range(3)))
    found = correct(inner, prior=prior, measurement=measurement, noise=1.0, steps=3)
    assert torch.equal(found.z0_hat[0], z[0]) and torch.allclose(found.z0_hat[1], torch.tensor(0.5), atol=0.01)


def test_a_correction_begins_half_way_to_the_latent_of_the_image_after_its_step_in_pixels():
    at, x_t = problem(3)
    prior = at["prior"]
    prior.decode = lambda z: (z + 0.5) / 2
    prior.encode = lambda image: 2 * image.round(decimals=2) - 0.5  # to a coarser set, as of a VAE
    brighter = lambda image: image + 0.1  # noqa: E731
    inner, none = corrected(at, x_t, steps=0, settle=brighter)
    _, once = corrected(at, x_t, steps=1, settle=brighter)
    expected = (inner.z0_hat + prior.encode(prior.decode(inner.z0_hat).clamp(0, 1) + 0.1)) / 2
    assert torch.equal(none.z0_hat, inner.z0_hat) and torch.equal(once.z0_hat, expected)
    _, more = corrected(at, x_t, steps=5, settle=brighter, stop_at=0)
    from_there = correct(once, prior=prior, measurement=at["measurement"], noise=0.75, steps=4, stop_at=0)
    assert torch.equal(more.z0_hat, from_there.z0_hat) and not torch.equal(more.z0_hat, once.z0_hat)


def test_a_corrected_batch_is_what_its_images_are_alone():
    """Also where one is at the noise before the others: it rests."""
    at, x_t = problem(3)
    _, together = corrected(at, x_t, steps=8, stop_at=2.0)
    assert (together.residual <= 0.2).any() and not (together.residual <= 0.2).all()
    for i in range(3):
        alone = Measurement(at["measurement"].operator, at["measurement"].y[i : i + 1], 0.1)
        _, found = corrected({**at, "measurement": alone}, x_t[i : i + 1], steps=8, stop_at=2.0)
        assert torch.allclose(found.z0_hat, together.z0_hat[i : i + 1], atol=1e-10)


def test_an_image_at_rest_asks_for_no_decode():
    """Problems with operators of other sizes come to rest one by one; each counts its decodes as it would alone."""
    prior, h, y = random_problem()
    clear = y.clone()
    at = {"alpha": 0.8, "sigma": 0.6, "steps": 8, "stop_at": 1.0}
    x_t = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drawn = []

    class Counting(GaussianPrior):
        def decode(self, z):
            drawn.append(len(z))
            return z

    def decodes(rows, sigma_y) -> int:
        drawn.clear()
        measurement = Measurement(Linear(h), clear.expand(len(rows), -1, -1, -1), torch.tensor(sigma_y))
        descend(x_t[rows], prior=Counting(prior.mean, prior.cov), measurement=measurement, **at)
        return len(drawn)

    resting, moving = decodes([0], [100.0]), decodes([1], [1e-3])
    assert resting == 1 and decodes([0, 1], [100.0, 1e-3]) == moving


class OfEach(GaussianPrior):
    """A mean for each image, (B, 1, 1, d), as each has its prompt; it notes how many images each network saw."""

    def __init__(self, mean, cov, seen=None):
        super().__init__(mean, cov)
        self.seen = {"denoise": [], "decode": []} if seen is None else seen

    def jacobian(self, alpha, sigma):
        marginal = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.cov)).to(self.cov)
        return alpha * self.cov @ torch.linalg.inv(marginal)

    def denoise(self, x_t, alpha, sigma):
        self.seen["denoise"].append(len(x_t))
        return super().denoise(x_t, alpha, sigma)

    def decode(self, z):
        self.seen["decode"].append(len(z))
        return z + 0.05 * z**2

    def select(self, rows, batch):
        assert len(self.mean) == batch
        return OfEach(self.mean[rows], self.cov, self.seen)


def each_its_own():
    """(prior, measurement, x_t) of four images, each with a prior's mean, a mask, a y and a noise of its own."""
    prior, h, _ = random_problem()
    h, mean, mask = draw(3, 6) / 2, draw(4, 1, 1, 6, seed=1), (draw(4, 1, 1, 6, seed=2) > -0.5).double()
    operator = lambda image: (mask * image) @ h.T  # noqa: E731 - a function holds its masks where nobody sees them
    sigma_y = torch.tensor([9.0, 0.02, 0.6, 0.9], **DOUBLE)
    return OfEach(mean, prior.cov), Measurement(operator, draw(4, 1, 1, 3, seed=3), sigma_y), draw(4, 1, 1, 6, seed=4)


def alone(prior, measurement, x_t):
    """The images of a batch, each as a problem of its own."""
    for row in torch.arange(4).split(1):
        yield OfEach(prior.mean[row], prior.cov), measurement.select(row), x_t[row]


@pytest.mark.parametrize("jacobian", ["exact", "free"])
@pytest.mark.parametrize("step", [InnerStep(), InnerStep("analytic"), InnerStep(1e-4), NEWTON], ids=str)
def test_no_network_is_called_for_images_at_rest(step, jacobian):
    """Each call is for as many images as are not at rest, and each image is what it is alone."""
    prior, measurement, x_t = each_its_own()
    at = {"alpha": 0.8, "sigma": 0.6, "steps": 12, "step": step, "jacobian": jacobian}
    together = descend(x_t, prior=prior, measurement=measurement, **at)
    found = [descend(x, prior=p, measurement=m, **at) for p, m, x in alone(prior, measurement, x_t)]
    for field, values in zip(together, zip(*found, strict=True), strict=True):
        assert torch.allclose(field, torch.cat(values), atol=1e-9)
    steps = together.steps.tolist()
    assert len(set(steps)) > 1 and steps[0] == 0
    drawn = prior.seen["denoise"]
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[:12] == [sum(taken >= k for taken in steps) for k in range(12)][: len(drawn)]
    assert max(prior.seen["decode"][-2:]) < 4


def test_a_prior_that_cannot_tell_images_apart_keeps_them_all():
    prior, measurement, x_t = each_its_own()
    at = {"measurement": measurement, "alpha": 0.8, "sigma": 0.6, "steps": 12}
    apart = descend(x_t, prior=prior, **at)
    prior.seen["denoise"].clear()
    prior.select = None
    together = descend(x_t, prior=prior, **at)
    assert set(prior.seen["denoise"]) == {4} and torch.equal(apart.steps, together.steps)
    assert torch.allclose(apart.x_t, together.x_t, atol=1e-9)


@pytest.mark.parametrize("tells", [True, False], ids=["images leave", "images stay"])
@pytest.mark.parametrize("drafts", [True, False], ids=["draft", "no draft"])
def test_no_decoder_is_called_for_corrected_images_at_rest(drafts, tells):
    """With a draft too, whose image of an image at rest another's correction would draw anew."""

    class Rough(OfEach):
        def decode(self, z):
            return 0.9 * super().decode(z)

        def select(self, rows, batch):
            return Rough(self.mean[rows], self.cov, self.seen)

    def corrected(prior, measurement, x_t):
        draft = Rough(prior.mean, prior.cov, {"denoise": [], "decode": []}) if drafts else None
        if not tells:
            prior.select = None
        inner = descend(x_t, prior=prior, measurement=measurement, alpha=0.8, sigma=0.6, steps=0)
        how = {"noise": 0.75, "steps": 8, "draft": draft, "refresh": 3}
        return correct(inner, prior=prior, measurement=measurement, **how), draft or prior

    prior, measurement, x_t = each_its_own()
    together, drawing = corrected(prior, measurement, x_t)
    found = [corrected(*problem)[0] for problem in alone(prior, measurement, x_t)]
    for field, values in zip(together, zip(*found, strict=True), strict=True):
        assert torch.allclose(field, torch.cat(values), atol=1e-9)
    assert len(set(together.steps.tolist())) > 1
    assert (min(drawing.seen["decode"]) < 4) == tells
