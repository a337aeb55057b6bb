"""A task of the nodes, and the networks that it is solved with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..adapters.comfyui import Sampling, levels_of, run, sigmas_of
from ..measuring import Measured, check_std, measure, settle, settling, tell
from ..metering import Metered
from ..operators import Measurement
from ..presets import Settings, count_sampled, pick_levels, spread_levels
from ..proximal import Settle
from ..report import Report
from ..solve import Solution, conclude, noise_like, record, vml_levels
from .layout import Seen

_IMAGE_SHARE = 0.1  # of the first state's variance, which noise alone may miss


@dataclass
class Task:
    """A measurement to be solved.

    Attributes:
        pose: what the VAE makes of it, from the metered prior, the noise (B,) and the device.
        batch, size: how many images, and their (height, width) in pixels.
        sigma_y: as the user named it.
        chosen, preset: the budget's settings, and their name.
        start: one of `RESTORE_STARTS`; None takes the state that ComfyUI gives.
        pixel_step: the image takes a last step in pixels (`vml_ldm.measuring.settle`).
        correct_steps: corrections of the last estimate (`vml_ldm.proximal.correct`).
        end: the step in pixels of proximal levels, from an image and the noise (B,); None: the operator's own.
        gradients: whether a network is asked for one (`Settings.takes_gradients`).
    """

    pose: Callable[[Metered, Tensor, torch.device], Measured]
    batch: int
    size: tuple[int, int]
    sigma_y: float
    chosen: Settings
    preset: str
    start: str | None
    pixel_step: bool = False
    correct_steps: int = 0
    end: Callable[[Tensor, Tensor], Tensor] | None = None
    gradients: bool = True

    def solve(self, sampling: Sampling, generator: torch.Generator) -> tuple[Solution, Report]:
        """VML-MAP, level by level."""
        started, prior = time.perf_counter(), sampling.prior
        metered = Metered(prior)
        noise_std = check_std(self.sigma_y, self.batch, prior.device)
        measured = self.pose(metered, noise_std, prior.device)
        levels, trace = sampling.levels(self.chosen.renoise), []
        for level in vml_levels(
            self._first(sampling, measured.latent, levels.scales(0), generator),
            prior=measured.view(metered),
            measurement=measured.measurement,
            schedule=levels,
            inner_steps=self.chosen.inner_steps,
            last_steps=self.chosen.last_steps,
            jacobian=self.chosen.jacobian,
            stop_at=self.chosen.stop_at,
            generator=generator,
            draft=None if sampling.draft is None else measured.view(metered.drafting(sampling.draft)),
            correct_steps=self.correct_steps,
            settle=self._settle(measured.measurement, noise_std),
            proximal=self.chosen.proximal,
        ):
            trace.append(record(level))
            sampling.tell(level)
        solution = conclude(level.x_next, trace, metered, measured.measurement, started)
        if self.pixel_step:
            solution.image = settle(solution.image, measured.measurement, noise_std)
        about = {"levels": len(levels), "inner_steps": self.chosen.inner_steps, "jacobian": self.chosen.jacobian}
        about |= {"last_steps": self.chosen.last_steps, "preset": self.preset}
        about |= {"correct_steps": self.correct_steps}
        return solution, tell(solution, measured, noise_std, prior.retries, **about)

    def _settle(self, measurement: Measurement, noise_std: Tensor) -> Settle | None:
        """The step in pixels of proximal levels and corrections."""
        if self.end is not None:
            return partial(self.end, noise_std=noise_std)
        return settling(measurement, noise_std)

    def _first(self, sampling: Sampling, z: Tensor, scales: tuple[float, float], generator) -> Tensor:
        """x_T (B, c, h, w): noise of the first level's size, or the latent z noised to that level."""
        if self.start is None:
            return sampling.x
        (alpha, sigma), noise = scales, noise_like(z, generator)
        return (alpha**2 + sigma**2) ** 0.5 * noise if self.start == "noise" else alpha * z + sigma * noise


@dataclass
class Networks:
    """What the all-in-one nodes are given of a model, by the names of their inputs."""

    model: object
    vae: object
    positive: list
    negative: list
    cfg: float
    scheduler: str
    sigmas: Tensor | None
    gradient_vae: object | None

    def plan(self, chosen: Settings, steps: int, start: str, picks: bool = False) -> tuple[Tensor, Settings]:
        """The noise of the levels that the budget pays, and the settings with the inner steps at each.

        SIGMAS are the levels, and share the budget.

        Args:
            start: one of `RESTORE_STARTS`.
            picks: the levels are picked among those of `steps` (`vml_ldm.presets.pick_levels`).

        Raises:
            ValueError: SIGMAS that are no levels, or that begin where noise alone is no state.
        """
        if self.sigmas is not None:
            alpha, sigma = levels_of(self.model.get_model_object("model_sampling"), self.sigmas).scales(0)
            share = alpha**2 / (alpha**2 + sigma**2)
            if start == "noise" and share > _IMAGE_SHARE:
                raise ValueError(
                    f"start is 'noise', and the SIGMAS begin at {sigma:.4g}, where {share:.0%} of the state is "
                    f"picture; expected at most {_IMAGE_SHARE:.0%}. Take start 'measurement', or denoise 1 and more "
                    "steps in the scheduler."
                )
            return self.sigmas, replace(chosen, inner_steps=chosen.inner_steps_of(len(self.sigmas) - 1, steps))
        count, inner_steps = chosen.split(steps)
        chosen = replace(chosen, inner_steps=inner_steps)
        if chosen.proximal is not None and not picks:
            sigmas = sigmas_of(self.model, self.scheduler, steps)
            levels = levels_of(self.model.get_model_object("model_sampling"), sigmas)
            return sigmas[[*spread_levels(levels.noise, count), -1]], chosen
        if not (picks and inner_steps > 0):
            return sigmas_of(self.model, self.scheduler, count), chosen
        sigmas = sigmas_of(self.model, self.scheduler, count_sampled(steps, count, start))
        levels = levels_of(self.model.get_model_object("model_sampling"), sigmas)
        return sigmas[[*pick_levels(levels.noise, count, start), -1]], chosen

    def solve(self, task: Task, sigmas: Tensor, seed: int) -> tuple[Solution, Report, dict]:
        """The solution, its report, and LATENT."""
        found = []

        def work(sampling: Sampling) -> Tensor:
            found.append(task.solve(sampling, torch.Generator().manual_seed(seed)))
            return found[0][0].latent

        samples = run(
            work, model=self.model, vae=self.vae, gradient_vae=self.gradient_vae, positive=self.positive,
            negative=self.negative, cfg=self.cfg, sigmas=sigmas, batch=task.batch, size=task.size, seed=seed,
            gradients=task.gradients,
        )  # fmt: skip
        return *found[0], {"samples": samples}


def posed(seen: Seen) -> Callable[[Metered, Tensor, torch.device], Measured]:
    """How a task is posed of which an operator has seen a picture."""

    def pose(prior: Metered, noise_std: Tensor, device: torch.device) -> Measured:
        y = seen.y.to(device)
        return measure(seen.operator, y, noise_std, seen.guess(y, noise_std), prior)

    return pose
