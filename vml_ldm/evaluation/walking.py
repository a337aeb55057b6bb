"""What the solvers of other papers share: a walk over the levels, guidance, noise, a search for agreement with y."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from vml_ldm.metering import Metered
from vml_ldm.objective import Prior, data_term
from vml_ldm.operators import Measurement, column
from vml_ldm.solve import Generators, Schedule, Solution, conclude, noise_like

Step = Callable[[int, Tensor, float, float], Tensor]  # (level, x_t, alpha, sigma) -> x at the next level


@torch.no_grad()
def walk(
    x_t: Tensor, step: Step, prior: Metered, measurement: Measurement, schedule: Schedule, first: int = 0
) -> Solution:
    """Every level's step in turn, from the first one that is walked; the last state is the latent."""
    started = time.perf_counter()
    for i in range(first, len(schedule)):
        x_t = step(i, x_t, *schedule.scales(i))
    return conclude(x_t, [], prior, measurement, started)


def guided(prior: Prior, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """z0_hat with the prior's guidance by a prompt, ``D_w = D_n + w (D_c - D_n)``, where it has any."""
    return getattr(prior, "guided", prior.denoise)(x_t, alpha, sigma)


class Guiding:
    """A prior whose estimate is the guided one, for solvers that know of no guidance."""

    def __init__(self, prior: Prior):
        self._prior = prior

    def __getattr__(self, name: str):
        return getattr(self._prior, name)

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        return guided(self._prior, x_t, alpha, sigma)


def noised(z: Tensor, scales: tuple[float, float], generator: Generators) -> Tensor:
    """A clean latent at a level, with fresh noise where the level has any."""
    alpha, sigma = scales
    return alpha * z + sigma * noise_like(z, generator) if sigma else alpha * z


def preserving(alpha: float, sigma: float) -> tuple[float, float]:
    """A level's scales with alpha^2 + sigma^2 = 1."""
    size = (alpha**2 + sigma**2) ** 0.5
    return alpha / size, sigma / size


def agree(z: Tensor, prior: Prior, measurement: Measurement, steps: int, lr: float) -> Tensor:
    """z after Adam on half the squared residual; an image rests once its residual is at the noise."""
    z = z.clone()
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        data = data_term(z, prior=prior, measurement=measurement)
        moving = measurement.rms(data.residual) > measurement.sigma_y
        if not moving.any():
            break
        before, z.grad = z.clone(), data.gradient
        optimizer.step()
        z.copy_(torch.where(column(moving, z), z, before))
    return z
