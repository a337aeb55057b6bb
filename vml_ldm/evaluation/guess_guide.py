"""A solver like Guess & Guide (Shtanchaev et al., arXiv:2603.07860): fits in pixels, no VJP of any network.

Two phases. The guess, at one level t*: denoise, decode, fit the image to y in pixels, encode, noise to t* again,
several times. The guidance, from t* down: the prior's own steps, and at some levels the same fit and fresh noise. The
fit goes down ``|y - A(x)|^2`` in the image x, through the operator alone.

What the paper leaves to its code and tables (t*, counts, the optimiser, the first state, which levels are guided) is an
argument or ours: the first state is the encoded start of the operator, noised to t*; the fit is Adam; levels are guided
evenly, the last one among them; the guess takes the evaluations of the levels above t* that are not walked, so that
there is one for each level, as other solvers have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vml_ldm.evaluation.walking import agree, guided, noised, walk
from vml_ldm.metering import Metered
from vml_ldm.objective import Prior
from vml_ldm.operators import Measurement
from vml_ldm.solve import Generators, Schedule, Solution


class _Pixels:
    """Images as their own latents."""

    @staticmethod
    def decode(z: Tensor) -> Tensor:
        return z


def guess_guide(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    start: float = 0.4,
    every: int = 2,
    steps: int = 20,
    lr: float = 0.05,
    generator: Generators = None,
) -> Solution:
    """Guess & Guide, about. Guidance by a prompt is in every estimate.

    Args:
        start: in [0, 1), the share of the levels above t*, whose evaluations the guess takes (at least one).
        every: levels from one guided level to the next.
        steps, lr: of Adam in pixels, at most; an image rests once its residual is at the noise.
    """
    prior, count = Metered(prior), len(schedule)
    first = min(round(start * count), count - 1)

    def fitted(z0_hat: Tensor) -> Tensor:
        return prior.encode(agree(prior.decode(z0_hat), _Pixels, measurement, steps, lr).clamp(0, 1))

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat = guided(prior, x_t, alpha, sigma)
        if (count - 1 - i) % every:
            return schedule.step(i, x_t, z0_hat, generator)
        return noised(fitted(z0_hat), schedule.scales(i + 1), generator)

    with torch.no_grad():
        scales = schedule.scales(first)
        x_t = noised(prior.encode(_begin(measurement, x_T, prior)), scales, generator)
        for _ in range(first):
            x_t = noised(fitted(guided(prior, x_t, *scales)), scales, generator)
    return walk(x_t, step, prior, measurement, schedule, first)


def _begin(measurement: Measurement, x_T: Tensor, prior: Prior) -> Tensor:
    """The operator's start (B, 3, H, W); where it has none, what the prior draws of noise."""
    try:
        return measurement.start()
    except TypeError:
        return prior.decode(0 * x_T)
