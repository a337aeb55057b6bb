"""DInG (Moufad et al., arXiv:2512.18365): inpainting by Gaussian transitions on latent cells, without any VJP.

From level t to the next one, s, the prior's own transition is DDIM's of some variance:

    x_s ~ N(m, v I),    m = alpha_s z0_hat + sqrt(sigma_s^2 - v) e_hat,    e_hat = (x_t - alpha_t z0_hat) / sigma_t

The paper asks the denoiser for the noise of an independent proxy z_s, drawn from the same transition, in place of that
of x_s itself. A known cell of the encoded picture, z_y, then looks like ``alpha_s z_y + sigma_s e(z_s)`` with deviation
alpha_s sigma_y, which is Gaussian in x_s: the product of both is drawn from in closed form. Two denoiser passes a step;
the encoder runs once, the decoder once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.evaluation.walking import guided, walk
from vml_ldm.images import fill_holes
from vml_ldm.metering import Metered
from vml_ldm.objective import Prior
from vml_ldm.operators import Mask, Measurement, column
from vml_ldm.solve import Generators, Schedule, Solution, noise_like


def ding(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    power: float = 2.0,
    cells: float = 0.95,
    generator: Generators = None,
) -> Solution:
    """DInG, for masks. Guidance by a prompt is in both of its passes.

    The picture that is encoded has its missing pixels filled smoothly. The measurement's sigma_y stands for the
    deviation of a known cell.

    Args:
        power: of the transition's variance ``v = sigma_s^2 (1 - a_s)^power``, ``a_s = alpha_s / (alpha_s + sigma_s)``,
            the paper's alpha for flow matching; at most the ancestral transition's. The authors' code has 2 and 1.
        cells: a cell is known if more than this share of its pixels is.

    Raises:
        TypeError: another operator than `Mask`.
    """
    if not isinstance(measurement.operator, Mask):
        raise TypeError(f"ding came with {measurement.operator!r}; expected Mask: it needs cells that y shows.")
    prior = Metered(prior)
    with torch.no_grad():
        z_y, known = _encode_known(prior, measurement, x_T, cells)
    last = len(schedule) - 1

    def step(i: int, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        z0_hat = guided(prior, x_t, alpha, sigma)
        a_s, s_s = schedule.scales(i + 1)
        if i == last or s_s == 0:
            return a_s * z0_hat
        variance = transition_variance((alpha, sigma), (a_s, s_s), power)
        mean = a_s * z0_hat + (s_s**2 - variance) ** 0.5 * (x_t - alpha * z0_hat) / sigma
        proxy = mean + variance**0.5 * noise_like(x_t, generator)
        e = (proxy - a_s * guided(prior, proxy, a_s, s_s)) / s_s
        of_y = a_s**2 * column(measurement.sigma_y.square(), x_t).to(x_t)
        gain = known * variance / (variance + of_y)  # of the known cells over the prior's transition
        x_s = mean + gain * (a_s * z_y + s_s * e - mean)
        return x_s + ((1 - gain) * variance).sqrt() * noise_like(x_t, generator)

    return walk(x_T, step, prior, measurement, schedule)


def transition_variance(now: tuple[float, float], after: tuple[float, float], power: float) -> float:
    """Variance of the prior's transition between two levels' scales, see `ding`."""
    (alpha, sigma), (a_s, s_s) = now, after
    ancestral = s_s**2 * (1 - (alpha * s_s / (a_s * sigma)) ** 2)
    return max(min(s_s**2 * (1 - a_s / (a_s + s_s)) ** power, ancestral), 0.0)


def _encode_known(prior: Prior, measurement: Measurement, x_T: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The encoded picture (B, c, h, w), and its known cells (B or 1, 1, h, w), 1 = known."""
    mask = measurement.operator.mask
    picture = fill_holes(measurement.operator.pinv(measurement.y), (mask > 0).to(measurement.y))
    seen = F.adaptive_avg_pool2d(mask.to(x_T), x_T.shape[2:])
    return prior.encode(picture).to(x_T), (seen > share).to(x_T)
