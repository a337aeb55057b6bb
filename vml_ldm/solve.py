"""The algorithms. Here: VML-MAP, which minimises the variational mode-seeking loss along a reverse diffusion.

Notation (the papers' letters; shapes are (B, c, h, w) unless said)

    z0, x0      clean latent, and its image x0 = Dec(z0), (B, 3, H, W) in [0, 1]
    x_t         state at noise level t, x_t = alpha z0 + sigma e, e ~ N(0, I)
    alpha       signal scale of a level (1 in variance-exploding form)
    sigma       noise scale of a level
    z0_hat      the denoiser's clean estimate D(x_t) = E[z0 | x_t]
    J           d z0_hat / d x_t
    y, A        measurement y = A(x0) + n and its operator
    sigma_y     standard deviation of n, in units of y, (B,)
    b           the bracket of the objective, d nll / d z0_hat + alpha (x_t - alpha z0_hat) / sigma^2
    v, eta      descent direction and step length, in units of x_t / alpha
    H, N        derivative of A o Dec at z0_hat; the preconditioner H^T H / sigma_y^2 + alpha^2 / sigma^2 I
    K           inner steps at a level
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .metering import Metered
from .objective import Prior, checked
from .operators import Measurement, is_whole
from .optimize import JACOBIANS, InnerStep, descend
from .proximal import Proximal, Settle, correct, proximal_step
from .report import Report

Generators = torch.Generator | Sequence[torch.Generator] | None


class Schedule(Protocol):
    """The noise levels, from the noisiest, and the way from one to the next."""

    def __len__(self) -> int: ...

    def scales(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) of level i; (1, 0) for i = len."""

    def step(self, i: int, x_t: Tensor, z0_hat: Tensor, generator: Generators = None) -> Tensor:
        """The state at level i + 1, from the state at level i and its clean estimate."""


class Levels:
    """A `Schedule` from its scales: the next state is the clean estimate with noise of the next level.

    ``x_next = alpha' z0_hat + sigma' (sqrt(1 - renoise^2) e_hat + renoise e)`` with fresh noise e and
    ``e_hat = (x_t - alpha z0_hat) / sigma``. renoise = 1 forgets e_hat (MAP-GA, arXiv:2407.20784); 0 is DDIM.

    Args:
        scales: (alpha, sigma) for each level, sigma > 0 and sigma / alpha falling.
        renoise: in [0, 1].

    Raises:
        ValueError: no level, a level that is not noisier than the next, or renoise outside [0, 1].
    """

    def __init__(self, scales: Sequence[tuple[float, float]], renoise: float = 1.0):
        check_renoise(renoise)
        if not scales or not all(0 <= alpha < math.inf and 0 < sigma < math.inf for alpha, sigma in scales):
            raise ValueError(f"scales are {scales}; expected at least one (alpha >= 0, sigma > 0), all finite.")
        if any(a * s_next >= a_next * s for (a, s), (a_next, s_next) in pairwise(scales)):
            raise ValueError(f"scales are {scales}; expected sigma / alpha to fall. Order them from the noisiest.")
        self._scales, self.renoise = [*map(tuple, scales), (1.0, 0.0)], renoise

    def __len__(self) -> int:
        return len(self._scales) - 1

    @property
    def noise(self) -> list[float]:
        """``sigma / alpha`` of each level; infinite where alpha is 0."""
        return [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in self._scales[:-1]]

    def scales(self, i: int) -> tuple[float, float]:
        return self._scales[i]

    def step(self, i: int, x_t: Tensor, z0_hat: Tensor, generator: Generators = None) -> Tensor:
        (alpha, sigma), (alpha_next, sigma_next) = self.scales(i), self.scales(i + 1)
        if sigma_next == 0:
            return alpha_next * z0_hat
        e = (1 - self.renoise**2) ** 0.5 * (x_t - alpha * z0_hat) / sigma
        if self.renoise > 0:
            e = e + self.renoise * noise_like(x_t, generator)
        return alpha_next * z0_hat + sigma_next * e


@dataclass
class Level:
    """One level as it ended. `x_next` may be replaced by whoever iterates; the next level starts from it.

    Attributes:
        index, alpha, sigma: which level.
        z0_hat: (B, c, h, w), the clean estimate after the inner steps.
        x_next: (B, c, h, w), the state handed to the next level.
        residual: (B,), rms of y - A(Dec(drawn)), in units of y; NaN where nothing was drawn.
        nll: (B,), the negative log-likelihood there.
        steps: (B,), inner steps that each image took.
        image: (B, 3, H, W), Dec(drawn), for a preview; None where nothing was drawn.
        drawn: (B, c, h, w), the clean estimate that the level drew last. What its last step made of it, z0_hat, is
            drawn by the next level, or at the end.
    """

    index: int
    alpha: float
    sigma: float
    z0_hat: Tensor
    x_next: Tensor
    residual: Tensor
    nll: Tensor
    steps: Tensor
    image: Tensor | None = None
    drawn: Tensor | None = None


@dataclass
class Solution:
    """What a solver found.

    Attributes:
        image: (B, 3, H, W), clamped to [0, 1].
        latent: (B, c, h, w), the last clean estimate.
        residual: (B,), rms of y - A(image before the clamp), in units of y.
        trace: a dict for each level: alpha, sigma, and residual, nll, steps as lists over the batch; None where a level
            drew nothing.
        calls: how often each network ran: "denoise", "denoise_vjp", "decode", "decode_vjp", "encode"; with a
            preconditioner "decode_jvp"; with a draft "draft", "draft_vjp", for its decoder.
        seconds: the time spent in each of them, and "total".
        sigma_y: the measurement's, for each image.
        solver: "vml" or "red-diff".
    """

    image: Tensor
    latent: Tensor
    residual: Tensor
    trace: list[dict]
    calls: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    sigma_y: list[float] = field(default_factory=list)
    solver: str = "vml"

    def report(self, **known) -> Report:
        """The figures for people, as text, dict and plot; steps and Jacobian as the trace and the calls have them.

        Args:
            known: fields of `Report` that the solution does not know, or not as well: the VAE's own error, which counts
                as 0 otherwise, the preset.
        """
        steps = [max(level["steps"]) for level in self.trace] or [0]
        found = {
            "sigma_y": self.sigma_y,
            "vae_error": [0.0] * len(self.sigma_y),
            "effective_sigma_y": self.sigma_y,
            "residual": self.residual.tolist(),
            "levels": len(self.trace),
            "inner_steps": max(steps[:-1] or steps),
            "last_steps": steps[-1],
            "jacobian": "exact" if self.calls["denoise_vjp"] else "free",
            "solver": self.solver,
            "trace": self.trace,
            "calls": dict(self.calls),
            "seconds": dict(self.seconds),
        }
        return Report(**found | known)


def vml_map(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    inner_steps: int = 5,
    last_steps: int | None = None,
    jacobian: str = "exact",
    stop_at: float = 1.0,
    generator: Generators = None,
    step: InnerStep = InnerStep(),  # noqa: B008 - frozen
    stop_prior_at: float = 0.0,
    draft: Prior | None = None,
    draft_last: bool = False,
    correct_steps: int = 0,
    settle: Settle | None = None,
    proximal: Proximal | None = None,
) -> Solution:
    """VML-MAP: at every noise level, gradient steps on VML_S, then the next state (see `vml_levels`).

    Args:
        x_T: (B, c, h, w), the start at the schedule's first level: ``alpha z + sigma e``, or noise.
        prior: the diffusion model.
        measurement: y, its operator and noise; the operator sees images.
        schedule: the noise levels.
        inner_steps: K >= 0, steps at a level at the most. 0 samples from the prior.
        last_steps: K at the last level, whose estimate is the answer. None: as at the others.
        jacobian: "exact" or "free" (no backward pass through the denoiser).
        stop_at: an image rests within a level while rms(residual) <= stop_at * sigma_y.
        generator: one, or one for each image (then a batch is what its images are alone).
        step: the rule of the inner steps and their preconditioner.
        stop_prior_at: levels with ``sigma / alpha`` below it are left out, and the last clean estimate above them is
            the answer: a prior can be unreliable at the lowest noise. 0 keeps every level.
        draft: the same prior with a cheaper decoder of the same latents; it takes the prior's place at all levels but
            the last, whose answer stands. What those levels report of the residual is then the draft's.
        draft_last: the draft serves the last level too, and the prior's own decoder draws the answer alone.
        correct_steps: after the last level, steps that bring its estimate nearer to y without the denoiser, see
            `vml_ldm.proximal.correct`. 0 is the plain algorithm.
        settle: a step in pixels that they begin with, images (B, 3, H, W) in [0, 1] -> images nearer to y.
        proximal: every level ends with a proximal step, through pixels where there is `settle`, and levels of little
            noise consist of it alone, see `vml_ldm.proximal.Proximal`. None is the plain algorithm. The corrections
            then take no step in pixels of their own, and the draft's gradients.

    Raises:
        ValueError: an argument outside its range, before any network runs.
    """
    started = time.perf_counter()
    prior = Metered(prior)
    trace = []
    for level in vml_levels(
        x_T,
        prior=prior,
        measurement=measurement,
        schedule=schedule,
        inner_steps=inner_steps,
        last_steps=last_steps,
        jacobian=jacobian,
        stop_at=stop_at,
        generator=generator,
        step=step,
        stop_prior_at=stop_prior_at,
        draft=None if draft is None else prior.drafting(draft),
        draft_last=draft_last,
        correct_steps=correct_steps,
        settle=settle,
        proximal=proximal,
    ):
        trace.append(record(level))
    return conclude(level.x_next, trace, prior, measurement, started)


@torch.no_grad()
def conclude(
    latent: Tensor,
    trace: list[dict],
    prior: Metered,
    measurement: Measurement,
    started: float,
    solver: str = "vml",
    image: Tensor | None = None,
) -> Solution:
    """Decode the last clean estimate, unless its image is there, and measure what that leaves of y."""
    image = prior.decode(latent) if image is None else image
    residual = measurement.rms(measurement.residual(image))
    seconds = prior.seconds  # of a GPU when it is done
    seconds["total"] = time.perf_counter() - started
    noise = measurement.sigma_y.expand(len(image)).tolist()
    return Solution(image.clamp(0, 1), latent, residual, trace, prior.calls, seconds, noise, solver)


def vml_levels(
    x_T: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    schedule: Schedule,
    inner_steps: int = 5,
    last_steps: int | None = None,
    jacobian: str = "exact",
    stop_at: float = 1.0,
    generator: Generators = None,
    step: InnerStep = InnerStep(),  # noqa: B008 - frozen
    stop_prior_at: float = 0.0,
    draft: Prior | None = None,
    draft_last: bool = False,
    correct_steps: int = 0,
    settle: Settle | None = None,
    proximal: Proximal | None = None,
) -> Iterator[Level]:
    """VML-MAP level by level, for whoever shows progress, interrupts or edits the state. Arguments as `vml_map`."""
    last_steps = inner_steps if last_steps is None else last_steps
    for steps in (inner_steps, last_steps):
        check_choices(steps, jacobian, stop_at)
    check_corrections(correct_steps)
    check_batch("x_T", x_T, measurement)
    before = levels_above(stop_prior_at, schedule) - 1
    early = prior if draft is None else draft
    levels = [(early, inner_steps)] * before + [(early if draft_last else prior, last_steps)]
    end = partial(_end, full=prior, draft=draft, measurement=measurement, stop_at=stop_at, settle=settle)
    end = partial(end, proximal=proximal, correct_steps=correct_steps)
    return _levels(x_T, levels, measurement, schedule, jacobian, stop_at, generator, step, proximal, end)


def _levels(x_t, levels, measurement, schedule, jacobian, stop_at, generator, step, proximal, end):
    count = len(levels)

    def level(x_t, prior, alpha, sigma, inner_steps, last):
        inner = descend(  # K times: x_t <- x_t - eta grad VML_S(x_t)
            x_t, prior=prior, measurement=measurement, alpha=alpha, sigma=sigma,
            steps=inner_steps, jacobian=jacobian, stop_at=stop_at, step=step,
        )  # fmt: skip
        return end(inner, prior, alpha, sigma, last=last)

    for i, (prior, inner_steps) in enumerate(levels):
        alpha, sigma = schedule.scales(i)
        alone = proximal is not None and proximal.is_alone(alpha, sigma)
        work = partial(level, x_t, prior, alpha, sigma, 0 if alone else inner_steps, i + 1 == count)
        with torch.no_grad():
            inner = checked(prior, work)
            z0 = inner.z0_hat  # D(x_t), or what a proximal step made of it
            stopped = i + 1 == count < len(schedule)
            x_next = z0 if stopped else schedule.step(i, inner.x_t, z0, generator)  # noised to the next level
        drawn = inner._asdict() | {"x_next": x_next}
        del drawn["x_t"]
        ended = Level(i, alpha, sigma, **drawn)
        yield ended
        x_t = ended.x_next


def _end(inner, prior, alpha, sigma, last, *, full, draft, measurement, stop_at, settle, proximal, correct_steps):
    """A level's estimate after its proximal step and, at the last level, its corrections."""
    at = {"measurement": measurement, "stop_at": stop_at}
    if proximal is not None:
        at |= {"draft": draft}
        inner = proximal_step(inner, prior=prior, **at, alpha=alpha, sigma=sigma, how=proximal, settle=settle)
        at, settle = at | {"refresh": proximal.refresh}, None
    if last and correct_steps and alpha > 0:
        inner = correct(inner, prior=full, **at, noise=sigma / alpha, steps=correct_steps, settle=settle)
    return inner


def passes_of(
    schedule: Schedule, inner_steps: int, last_steps: int, guided: bool, proximal: Proximal | None = None
) -> list[int]:
    """How many passes of the denoiser each level takes at the most, for a progress bar: one of both prompts at once for
    a level without inner steps; one for each step, one for guidance's push and one for the estimate at the others."""
    steps = [inner_steps] * (len(schedule) - 1) + [last_steps]
    alone = [proximal is not None and proximal.is_alone(*schedule.scales(i)) for i in range(len(schedule))]
    return [1 if by_itself or k == 0 else k + 1 + guided for by_itself, k in zip(alone, steps, strict=True)]


def levels_above(noise: float, schedule: Schedule) -> int:
    """How many levels have ``sigma / alpha >= noise``; raise ValueError if none has."""
    scales = [schedule.scales(i) for i in range(len(schedule))]
    count = sum(sigma >= noise * alpha for alpha, sigma in scales)
    if count == 0:
        (alpha, sigma), *_ = scales
        raise ValueError(f"stop_prior_at is {noise}; expected at most {sigma / alpha:.4g}, the first level's noise.")
    return count


def check_choices(inner_steps: int, jacobian: str, stop_at: float = 1.0) -> None:
    """Raise ValueError for a choice that the solver does not know."""
    if jacobian not in JACOBIANS:
        raise ValueError(f"jacobian is {jacobian!r}; expected one of {JACOBIANS}.")
    if not is_whole(inner_steps):
        raise ValueError(f"inner_steps is {inner_steps!r}; expected a whole number >= 0.")
    if not stop_at >= 0:
        raise ValueError(f"stop_at is {stop_at}; expected a number >= 0, in units of sigma_y: 0 never rests.")


def check_corrections(steps: int) -> None:
    """Raise ValueError for what is no number of corrections."""
    if not is_whole(steps):
        raise ValueError(f"correct_steps is {steps!r}; expected a whole number >= 0, 0 for none.")


def check_batch(name: str, x: Tensor, measurement: Measurement) -> None:
    """Raise ValueError for a state of another number of images than y."""
    if len(x) != len(measurement.y):
        raise ValueError(
            f"{name} has {len(x)} images and y {len(measurement.y)}; expected the same. Repeat one of them."
        )


def check_renoise(renoise: float) -> None:
    """Raise ValueError for a share of fresh noise outside [0, 1]."""
    if not 0 <= renoise <= 1:
        raise ValueError(f"renoise is {renoise}; expected a number in [0, 1]: 1 = fresh noise, 0 = deterministic.")


def record(level: Level) -> dict:
    """A level's figures as plain numbers; None where nothing was drawn, so that the trace is JSON."""
    figures = [level.residual, level.nll, level.steps.to(level.residual)]
    residual, nll, steps = torch.stack(figures).tolist()  # the level's one wait for the device
    plain = lambda values: [x if math.isfinite(x) else None for x in values]  # noqa: E731
    return {
        "alpha": level.alpha,
        "sigma": level.sigma,
        "residual": plain(residual),
        "nll": plain(nll),
        "steps": [int(k) for k in steps],
    }


def start_from(image: Tensor, *, prior: Prior, schedule: Schedule, generator: Generators = None) -> Tensor:
    """x_T from an image, for example a pseudo-inverse of y: its mean latent with the first level's noise.

    Args:
        image: (B, 3, H, W) in [0, 1].
    """
    (alpha, sigma), z = schedule.scales(0), prior.encode(image)
    return alpha * z + sigma * noise_like(z, generator)


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """N(0, I) of x's shape, dtype and device, drawn where the generator lives: one generator, or one an image."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators came for {len(x)} images; expected one for each.")
    return torch.cat([noise_like(x[i : i + 1], g) for i, g in enumerate(generator)])
