"""Latent solvers of other papers that no package has, small, on the same `Prior`, `Measurement` and levels as ours.

Each is the paper's update in the notation of `vml_ldm.solve`; where a paper leaves something to its code or to a task,
it is an argument, and the arguments are looked for on validation images, see `vml_ldm.evaluation.tuning`.

    latent_dps      DPS (Chung et al., arXiv:2209.14687) with the decoder in the operator
    psld            PSLD (Rout et al., arXiv:2307.00619): DPS and a gluing term, for linear operators
    resample        ReSample (Song et al., arXiv:2307.08123): hard data consistency, then stochastic resampling
    flow_dps        decoder-only gradient steps, after FlowDPS (Kim et al., arXiv:2503.08136)
    latent_daps     LatentDAPS (Zhang et al., arXiv:2407.01521): Langevin steps about the estimate, then new noise
    latino          LATINO (Spagnoletti et al., arXiv:2503.12615): decode, proximal step in pixels, encode
    ding            DInG (Moufad et al., arXiv:2512.18365): Gaussian transitions on latent cells, for masks; `ding.py`
    guess_guide     Guess & Guide (Shtanchaev et al., arXiv:2603.07860): fits in pixels; `guess_guide.py`
    red_diff        our RED-diff, with guidance

A prior's guidance by a prompt is in every estimate that is not differentiated (latent_dps and psld have none).
An effective sigma_y, as `vml_ldm.measuring.measure` gives it, stands for sigma_y wherever a method asks for one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vml_ldm import red
from vml_ldm.evaluation.ding import ding
from vml_ldm.evaluation.guess_guide import guess_guide
from vml_ldm.evaluation.walking import Guiding, agree, guided, noised, preserving, walk
from vml_ldm.metering import Metered
from vml_ldm.objective import Prior, data_term, denoise_pullback
from vml_ldm.operators import Measurement, column, conjugate_gradients, is_linear, normal_of, squares
from vml_ldm.solve import Generators, Schedule, Solution, noise_like


def latent_dps(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    zeta: float = 1.0,
    generator: Generators = None,
) -> Solution:
    """DPS: ``x_next = step(x_t, z0_hat) - zeta grad_{x_t} |y - A(Dec(z0_hat))|``.

    Args:
        zeta: length of the step.
    """
    prior = Metered(prior)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat, pull = denoise_pullback(prior, x_t, alpha, sigma)
        gradient = _gradient_of_norm(z0_hat, prior, measurement)
        return schedule.step(i, x_t, z0_hat, generator) - zeta * pull(gradient)

    return walk(x_T, step, prior, measurement, schedule)


def psld(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    omega: float = 1.0,
    gamma: float = 0.1,
    generator: Generators = None,
) -> Solution:
    """PSLD: DPS of length omega, and gamma times the gradient of ``|z0_hat - Enc(x0 + A^+ (y - A x0))|``, x0 decoded.

    Raises:
        TypeError: the operator is not linear.
    """
    if not is_linear(measurement.operator):
        raise TypeError(f"psld came with {measurement.operator!r}; expected a linear operator with a pseudo-inverse.")
    prior = Metered(prior)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat, pull = denoise_pullback(prior, x_t, alpha, sigma)
        with torch.enable_grad():
            z = z0_hat.detach().requires_grad_()
            image = prior.decode(z)
            residual = measurement.residual(image)
            glued = prior.encode(image + measurement.operator.pinv(residual))
            value = omega * _norm(residual) + gamma * _norm(z - glued)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return schedule.step(i, x_t, z0_hat, generator) - pull(gradient)

    return walk(x_T, step, prior, measurement, schedule)


def resample(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    every: int = 5,
    steps: int = 20,
    lr: float = 0.05,
    gamma: float = 40.0,
    generator: Generators = None,
) -> Solution:
    """ReSample: at every `every`-th level and the last, z0_y minimises ``|y - A(Dec(z))|`` from z0_hat; the state is

        x_next ~ N((s2 alpha' z0_y + sigma'^2 x') / (s2 + sigma'^2), s2 sigma'^2 / (s2 + sigma'^2) I),
        s2 = gamma (sigma'^2 / alpha^2) (1 - alpha^2 / alpha'^2),

    with x' the unconditional step and alpha', sigma' those of the next level; the paper states it for variance
    preserving levels (alpha^2 + sigma^2 = 1), to which others are brought.

    Args:
        every: levels between two optimisations.
        steps, lr: of Adam in z, at most; an image rests once its residual is at the noise.
        gamma: weight of the unconditional step.
    """
    prior = Metered(prior)
    count = len(schedule)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat = guided(prior, x_t, alpha, sigma)
        x_next = schedule.step(i, x_t, z0_hat, generator)
        if (count - 1 - i) % every:
            return x_next
        z0_y = agree(z0_hat, prior, measurement, steps, lr)
        alpha_next, sigma_next = schedule.scales(i + 1)
        if sigma_next == 0:
            return alpha_next * z0_y
        (a, _), (a_next, s_next) = preserving(alpha, sigma), preserving(alpha_next, sigma_next)
        s2 = gamma * s_next**2 / a**2 * (1 - (a / a_next) ** 2)
        scale = alpha_next / a_next  # from variance preserving to the schedule's own
        mean = (s2 * a_next * z0_y + s_next**2 * x_next / scale) / (s2 + s_next**2)
        spread = (s2 * s_next**2 / (s2 + s_next**2)) ** 0.5
        return scale * (mean + spread * noise_like(x_t, generator))

    return walk(x_T, step, prior, measurement, schedule)


def flow_dps(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    steps: int = 3,
    length: float = 1.0,
    generator: Generators = None,
) -> Solution:
    """Decoder-only: at each level `steps` steps down ``|y - A(Dec(z))|`` from z0_hat, with no VJP of the denoiser.

    With the level's time ``t = sigma / (alpha + sigma)``, which is the paper's sigma for flow matching, the next state
    is made of ``z0 = (1 - t) z0_hat + t z0_y`` and of the noise ``sqrt(t') e_hat + sqrt(1 - t') e``, t' the next time:
    early levels follow y and keep their noise, late ones follow the prior and take fresh noise.

    Args:
        length: of a step, in units of z.
    """
    prior = Metered(prior)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat = guided(prior, x_t, alpha, sigma)
        e_hat = (x_t - alpha * z0_hat) / sigma
        z0_y, t = z0_hat, sigma / (alpha + sigma)
        for _ in range(steps):
            z0_y = z0_y - length * _gradient_of_norm(z0_y, prior, measurement)
        z0 = (1 - t) * z0_hat + t * z0_y
        alpha_next, sigma_next = schedule.scales(i + 1)
        if sigma_next == 0:
            return alpha_next * z0
        t_next = sigma_next / (alpha_next + sigma_next)
        e = t_next**0.5 * e_hat + (1 - t_next) ** 0.5 * noise_like(x_t, generator)
        return alpha_next * z0 + sigma_next * e

    return walk(x_T, step, prior, measurement, schedule)


def latent_daps(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    steps: int = 10,
    lr: float = 0.1,
    generator: Generators = None,
) -> Solution:
    """LatentDAPS: Langevin steps on ``alpha^2 |z - z0_hat|^2 / (2 sigma^2) + nll(Dec(z))`` from z0_hat, then new noise.

    (The paper finds z0_hat by a few steps of the probability flow; here it is the denoiser's, one call.)

    Args:
        steps: Langevin steps at each level.
        lr: their length eta, ``z <- z - eta grad + sqrt(2 eta) e``, as a multiple of the smaller of the level's
            variance and that of the likelihood, sigma_y^2.
    """
    prior = Metered(prior)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat = guided(prior, x_t, alpha, sigma)
        z, variance = z0_hat, (sigma / alpha) ** 2
        eta = column(lr * measurement.sigma_y.square().clamp(max=variance), z)
        for _ in range(steps):
            data = data_term(z, prior=prior, measurement=measurement)
            z = z - eta * (data.gradient + (z - z0_hat) / variance) + (2 * eta).sqrt() * noise_like(z, generator)
        return noised(z, schedule.scales(i + 1), generator)

    return walk(x_T, step, prior, measurement, schedule)


def latino(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    delta: float = 1.0,
    generator: Generators = None,
) -> Solution:
    """LATINO: decode to x0, take ``argmin |y - A x|^2 / sigma_y^2 + |x - x0|^2 / d``, encode it, add new noise.

    The proximal step is in closed form where the operator has `solve`, else by conjugate gradients on its adjoint;
    ``d = delta sigma^2 / (alpha^2 + sigma^2)`` falls with the level's noise (the papers' tables give d by task).

    Raises:
        TypeError: the operator is not linear.
    """
    if not is_linear(measurement.operator):
        raise TypeError(f"latino came with {measurement.operator!r}; expected a linear operator.")
    prior = Metered(prior)

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        image = prior.decode(guided(prior, x_t, alpha, sigma))
        z = prior.encode(_proximal(image, measurement, delta * sigma**2 / (alpha**2 + sigma**2)))
        return noised(z, schedule.scales(i + 1), generator)

    return walk(x_T, step, prior, measurement, schedule)


def red_diff(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    generator: Generators = None,
    **settings: float,
) -> Solution:
    """Our `vml_ldm.red.red_diff` from the operator's start, with the guided estimate; its settings by name."""
    with torch.no_grad():
        mu = prior.encode(measurement.start()).to(x_T)
    given = {"prior": Guiding(prior), "measurement": measurement, "schedule": schedule, "generator": generator}
    return red.red_diff(mu, **given, **settings)


PEERS = {
    f.__name__: f for f in (latent_dps, psld, resample, flow_dps, latent_daps, latino, ding, guess_guide, red_diff)
}
ONLY_LINEAR = ("psld", "latino")
ONLY_MASKS = ("ding",)


@dataclass(frozen=True)
class Peer:
    """One of `PEERS` with its settings, to be passed to `VMLRestorePipeline` as its `solver`.

    Attributes:
        settings: (name, value) of the function's arguments.
    """

    name: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, x_T: Tensor, **given) -> Solution:
        return PEERS[self.name](x_T, **given, **dict(self.settings))


def _gradient_of_norm(z: Tensor, prior: Prior, measurement: Measurement) -> Tensor:
    """``grad_z |y - A(Dec(z))|``, image by image."""
    data = data_term(z, prior=prior, measurement=measurement)
    return column(measurement.sigma_y.square() / _norm(data.residual), z) * data.gradient


def _norm(x: Tensor) -> Tensor:
    """(B,): the length of each item, above 0."""
    return squares(x).clamp(min=1e-20).sqrt()


def _proximal(image: Tensor, measurement: Measurement, variance: float) -> Tensor:
    """``x + (A^T A + rho I)^-1 A^T (y - A x)``, ``rho = sigma_y^2 / variance``, clamped to [0, 1]."""
    operator, rho = measurement.operator, measurement.sigma_y.square() / variance
    b = operator.adjoint(measurement.residual(image))
    if hasattr(operator, "solve"):
        change = operator.solve(b, rho)
    else:
        normal = normal_of(operator)
        change = conjugate_gradients(lambda v: normal(v) + column(rho, v) * v, b, iterations=50)
    return (image + change).clamp(0, 1)
