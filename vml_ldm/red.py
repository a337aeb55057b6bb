"""RED-diff: a variational fit of one point to the measurement, with the denoiser as its regulariser.

Mardani, Song, Kautz and Vahdat (arXiv:2305.04391) approximate the posterior by N(mu, s^2 I), s -> 0. Notation as in
`solve`; n1, n2 ~ N(0, I) are drawn at every step:

    x0 = mu + s n1,    x_t = alpha x0 + sigma n2,    e_hat = (x_t - alpha z0_hat) / sigma
    L  = obs_weight |y - A(x0)|^2 / (2 n_y)  +  lambda w(sigma / alpha) <stop_grad(e_hat - n2), x0> / n

and an off-the-shelf optimiser takes one step on L in mu at each level. No gradient runs through the denoiser.

In latent space mu is a latent and ``A o Dec`` takes the place of A. The loss has means, and the convention here is:
n_y counts the values that were *measured* (`Measurement.count`: a mask's missing pixels do not count), n the entries of
one z; each image has its own means, and L is summed over the images. lambda therefore weighs the whole measurement
against the whole prior, whatever the image's size, and a measured value pulls harder where fewer were measured (by
n / n_y). sigma_y does not enter L: lambda stands for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from .metering import Metered
from .objective import DataTerm, Prior, data_term
from .operators import Measurement, column, is_whole
from .solve import Generators, Level, Schedule, Solution, check_batch, conclude, noise_like, record

# w of snr_inv = sigma / alpha
WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda snr_inv: snr_inv,
    "sqrt": math.sqrt,
    "square": lambda snr_inv: snr_inv**2,
    "log": math.log1p,
    "truncated_linear": lambda snr_inv: min(snr_inv, 1.0),
    "power_2_3": lambda snr_inv: snr_inv ** (2 / 3),
    "constant": lambda snr_inv: 1.0,
}
ORDERS = ("descending", "ascending", "random")
ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))


@dataclass(frozen=True)
class RedDiff:
    """The settings of `red_diff` as one value, for whoever passes them on; it says what each is. Same defaults.

    Raises:
        ValueError: a setting outside its range.
    """

    lambda_: float = 0.25
    weighting: str = "linear"
    order: str | Sequence[int] = "descending"
    obs_weight: float = 4.0
    s: float = 0.0
    lr: float = 0.1
    optimizer: Callable[..., Optimizer] = ADAM

    @classmethod
    def for_latents(cls, **settings) -> RedDiff:
        """Our defaults behind a VAE: lambda = 1/16, else the authors'. Settings by name replace them.

        Of lambda in 1/64, 1/16, 1/4, 1 and lr in 0.1, 0.5 it has the best mean PSNR over the benchmark's eleven tasks
        (four validation images, noise 0.01); tasks that see all of the image want less prior, large holes want more.
        """
        return cls(**{"lambda_": 1 / 16} | settings)

    def __post_init__(self):
        check_red_choices(self.weighting, lambda_=self.lambda_, obs_weight=self.obs_weight, s=self.s, lr=self.lr)
        check_order(self.order)


def red_diff(
    mu: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    lambda_: float = 0.25,
    weighting: str = "linear",
    order: str | Sequence[int] = "descending",
    obs_weight: float = 4.0,
    s: float = 0.0,
    lr: float = 0.1,
    optimizer: Callable[..., Optimizer] = ADAM,
    generator: Generators = None,
) -> Solution:
    """RED-diff, in pixels or latents; the module's text has the loss. One step at each level of the order.

    The defaults are the authors', with a schedule of 50 levels (of 1000); their tasks used lr 0.1 to 0.5 and lambda
    0.25 to 1. A step costs one denoiser pass, one decoder pass and its pull-back. A prior's `guide` is not used.

    Args:
        mu: (B, c, h, w), where to start: the pseudo-inverse of y, encoded.
        prior: the diffusion model.
        measurement: y and its operator; its sigma_y is not used.
        schedule: the noise levels; its steps are not used.
        lambda_: >= 0, weight of the prior.
        weighting: a name of `WEIGHTINGS`.
        order: of the levels' noise: "descending", "ascending", "random" (one shuffle, the same in every call, so that
            a batch is what its images are alone), or indices into the schedule, which may repeat.
        obs_weight: >= 0, weight of the measurement. The authors' is 1 with images and y in [-1, 1], where a residual is
            twice as large as here: 4.
        s: >= 0, standard deviation of x0 about mu.
        lr: > 0, the optimiser's step, in units of z.
        optimizer: called as ``optimizer([mu], lr=lr)``, for example `torch.optim.SGD`. One that couples the entries of
            mu (LBFGS) couples the images of a batch.
        generator: one, or one for each image.

    Raises:
        ValueError: an argument outside its range, or a level with alpha = 0 (sigma / alpha is infinite there), before
            any network runs.
    """
    started = time.perf_counter()
    prior = Metered(prior)
    trace = []
    for level in red_diff_levels(
        mu,
        prior=prior,
        measurement=measurement,
        schedule=schedule,
        lambda_=lambda_,
        weighting=weighting,
        order=order,
        obs_weight=obs_weight,
        s=s,
        lr=lr,
        optimizer=optimizer,
        generator=generator,
    ):
        trace.append(record(level))
    return conclude(level.x_next, trace, prior, measurement, started, solver="red-diff")


def red_diff_levels(
    mu: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    lambda_: float = 0.25,
    weighting: str = "linear",
    order: str | Sequence[int] = "descending",
    obs_weight: float = 4.0,
    s: float = 0.0,
    lr: float = 0.1,
    optimizer: Callable[..., Optimizer] = ADAM,
    generator: Generators = None,
) -> Iterator[Level]:
    """RED-diff level by level, for whoever shows progress, interrupts or edits mu. Arguments as `red_diff`.

    A level's `z0_hat` and `x_next` are mu after its step; residual, nll and image are of x0 before it, its `drawn`.
    """
    check_red_choices(weighting, lambda_=lambda_, obs_weight=obs_weight, s=s, lr=lr)
    visits = visits_of(order, schedule)
    check_batch("mu", mu, measurement)
    loss = _Loss(prior, measurement, WEIGHTINGS[weighting], lambda_, obs_weight)
    mu = mu.detach().clone().requires_grad_()
    return _levels(mu, visits, schedule, loss, s, optimizer([mu], lr=lr), generator)


def check_red_choices(weighting: str, *, lambda_: float, obs_weight: float, s: float, lr: float) -> None:
    """Raise ValueError for a choice that the solver does not know."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; expected one of {', '.join(map(repr, WEIGHTINGS))}.")
    for name, value in {"lambda_": lambda_, "obs_weight": obs_weight, "s": s}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; expected a number >= 0.")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a number > 0. The authors take 0.1 to 0.5.")


def check_order(order: str | Sequence[int]) -> None:
    """Raise ValueError for what is no order of levels, whatever the schedule."""
    indices = None if isinstance(order, str) else [getattr(i, "item", lambda i=i: i)() for i in order]
    if not (order in ORDERS if indices is None else indices and all(map(is_whole, indices))):
        raise ValueError(
            f"order is {order!r}; expected one of {ORDERS}, or one index of a level at least, whole numbers >= 0."
        )


def visits_of(order: str | Sequence[int], schedule: Schedule) -> list[int]:
    """The levels' indices in the order of the steps; the schedule itself runs from the noisiest.

    Raises:
        ValueError: an unknown order, an index outside the schedule, or a level of pure noise or of none.
    """
    check_order(order)
    count = len(schedule)
    if not isinstance(order, str):
        visits = list(order)
    elif order == "random":
        visits = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    else:
        visits = list(range(count)) if order == "descending" else list(reversed(range(count)))
    if not all(i < count for i in visits):
        raise ValueError(f"order is {order}; expected indices of levels, each from 0 to {count - 1}.")
    for alpha, sigma in map(schedule.scales, visits):
        if alpha <= 0 or sigma <= 0:
            raise ValueError(
                f"a level has alpha = {alpha} and sigma = {sigma}; expected both > 0. "
                "Leave levels of pure noise, or of none, out of the order."
            )
    return visits


@dataclass(frozen=True)
class _Loss:
    """L of the module's text, its gradient in mu, and the measurement as seen from x0."""

    prior: Prior
    measurement: Measurement
    weigh: Callable[[float], float]
    lambda_: float
    obs_weight: float

    @torch.no_grad()
    def __call__(self, x0: Tensor, n2: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, DataTerm]:
        z0_hat = self.prior.denoise(alpha * x0 + sigma * n2, alpha, sigma)
        difference = alpha / sigma * (x0 - z0_hat)  # e_hat - n2, with x_t put in
        data = data_term(x0, prior=self.prior, measurement=self.measurement)
        w = self.lambda_ * self.weigh(sigma / alpha) / x0[0].numel()
        v = self.obs_weight * self.measurement.sigma_y**2 / self.measurement.count().clamp(min=1)  # (B,), nll to mean
        gradient = column(v, x0) * data.gradient + w * difference
        return (v * data.nll).sum() + w * (difference * x0).sum(), gradient, data


def _levels(mu, visits, schedule, loss, s, optimizer, generator) -> Iterator[Level]:
    for i in visits:
        alpha, sigma = schedule.scales(i)
        x0, data = _step(mu, optimizer, loss, s, alpha, sigma, generator)
        after = mu.detach().clone()
        residual, steps = loss.measurement.rms(data.residual), torch.ones(len(mu), dtype=torch.long, device=mu.device)
        level = Level(i, alpha, sigma, after, after, residual, data.nll, steps, data.image, x0)
        yield level
        mu.data.copy_(level.x_next)


def _step(mu, optimizer, loss, s, alpha, sigma, generator) -> tuple[Tensor, DataTerm]:
    """One step of the optimiser on mu, in place: the x0 that was drawn, and the measurement as seen from it.

    An optimiser that asks again sees the same noise.
    """
    n1 = noise_like(mu, generator) if s > 0 else 0.0
    n2 = noise_like(mu, generator)
    seen = []

    def closure() -> Tensor:
        x0 = mu.detach() + s * n1
        value, mu.grad, data = loss(x0, n2, alpha, sigma)
        seen[:] = [x0.clone(), data]
        return value

    optimizer.step(closure)
    return tuple(seen)
