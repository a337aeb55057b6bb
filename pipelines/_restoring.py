"""What the restoring pipelines share: y and its operator, the two solvers, their settings and starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vml_ldm.adapters.diffusers import SchedulerLevels, parse_memory
from vml_ldm.measuring import (
    NEAR,
    Measured,
    check_std,
    groups_of,
    leaves_most_open,
    measure,
    pick_start,
    settle,
    settling,
    tell,
)
from vml_ldm.metering import Metered
from vml_ldm.objective import Prior
from vml_ldm.operators import Measurement, own
from vml_ldm.operators.rows import Rows
from vml_ldm.pipelines._common import (
    check_generators,
    check_numbers,
    check_one_of,
    checked,
    count_prompts,
    each,
    to_y,
)
from vml_ldm.pipelines._grouping import can_be_split, rows_of, solve_by_group
from vml_ldm.pipelines._solving import VMLPipelineOutput, is_explicit, start_noise
from vml_ldm.presets import EXPLICIT, RESTORE_STARTS, STARTS, Settings, count_sampled, pick_levels, settings
from vml_ldm.red import RedDiff, red_diff_levels, visits_of
from vml_ldm.report import Report
from vml_ldm.solve import Level, Levels, Solution, conclude

SOLVERS = ("vml", "red-diff")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class RestoringMixin:
    """Any measurement on a text-to-image pipeline, solved. Mixed in before the family's solving mixin."""

    def _restore(self, given: dict) -> VMLPipelineOutput | tuple:
        """A call's result, from its arguments by name."""
        a = SimpleNamespace(**{name: own(value) for name, value in given.items() if name != "self"})
        with torch.inference_mode(False), torch.no_grad():
            images, flagged, report = self._solve(a, self._choose(a))
        return self._give_back(images, flagged, report if a.return_report else None, a.return_dict)

    def _solve(self, a: SimpleNamespace, chosen: Settings) -> tuple[Any, list[bool] | None, Report]:
        """Images in the output type, safety flags, and the report."""
        started = time.perf_counter()
        self._check(a, (self.vae.config.latent_channels,))
        observed, noise_std = self._observe(a)
        if a.solver == "vml":
            colours = observed.seen((a.height, a.width), self.vae_scale_factor)
            groups = groups_of([(a.start or pick_start(own), leaves_most_open(own)) for own in colours.split(1, dim=1)])
            if parts := self._split(a, observed, noise_std, groups):
                return solve_by_group(parts, groups, partial(self._solve, chosen=chosen), self)
            a.start = a.start or pick_start(colours)
            chosen = replace(chosen, start=a.start, mostly_open=leaves_most_open(colours))
        levels, chosen = self._levels(a, chosen)
        guess = observed.guess((a.height, a.width), noise=noise_std, tolerance=NEAR)
        tensors = self._embed(a)
        dtype = tensors["prompt_embeds"].dtype
        prior = self._prior(a, tensors, len(guess))
        chosen, fitted = self._fit(a, prior, chosen, a.operator, guess)
        with prior:
            metered = Metered(prior)
            measured = measure(a.operator, observed.y, noise_std, guess, metered)
            if callable(a.solver):
                solution = _run(a, self._start(a, levels, measured.latent), prior, measured.measurement, levels)
            else:
                solving = self._begin(a, measured, noise_std, levels, chosen, metered)
                passes = self._passes(levels, chosen) if a.solver == "vml" else [1] * self.num_timesteps
                way = (solving, passes, levels.timesteps, tensors)
                latent, trace, image = self._follow(a, *way, metered, measured.latent)
                solution = conclude(latent, trace, metered, measured.measurement, started, image=image)
        about = {"inner_steps": chosen.inner_steps, "jacobian": chosen.jacobian, "preset": a.preset}
        about |= {"levels": self.num_timesteps, "solver": _name(a.solver), "last_steps": chosen.last_steps}
        about |= {"correct_steps": chosen.corrections(a.num_inference_steps), "interrupted": self.interrupt}
        about |= {"memory": fitted.as_run(prior.steps).to_dict()}
        report = tell(solution, measured, noise_std, prior.retries, **about)
        if a.output_type == "latent":
            return solution.latent, None, report
        image = settle(solution.image, measured.measurement, noise_std) if a.pixel_step else solution.image
        return *self._hand_out(image, a.output_type, dtype), report

    def _split(
        self, a: SimpleNamespace, observed: Measurement, noise_std: Tensor, groups: list[list[int]]
    ) -> list[SimpleNamespace]:
        """The call for each group of images; none where all are one, or where it cannot be told what is whose."""
        if len(groups) == 1 or not can_be_split(a):
            return []
        y = observed.y
        places = [torch.tensor(rows, device=y.device) for rows in groups]
        return [
            rows_of(a, rows, y=y[rows], sigma_y=noise_std[rows], operator=Rows(a.operator, at, len(y)))
            for rows, at in zip(groups, places, strict=True)
        ]

    def _choose(self, a: SimpleNamespace) -> Settings:
        """The settings of a call; its choices are checked, and those left open are made."""
        if not callable(a.solver):
            check_one_of("solver", a.solver, SOLVERS)
        check_one_of("output_type", a.output_type, OUTPUT_TYPES)
        parse_memory(a.memory)
        if a.start is None and a.solver != "vml":
            a.start = "measurement" if a.solver == "red-diff" else "noise"
        check_one_of("start", a.start, (*(RESTORE_STARTS if a.solver == "vml" else STARTS), None))
        check_numbers(a)
        a.prompt = "" if a.prompt is None and a.prompt_embeds is None else a.prompt
        given = {name: getattr(a, name) for name in (*EXPLICIT, "correct_steps")}
        if a.red is not None and a.solver != "red-diff":
            raise ValueError(f"`red` came with solver={_name(a.solver)!r}; expected solver='red-diff', or no `red`.")
        if a.solver == "vml":
            return settings(a.preset, guided=a.guidance_scale > 1, drafts=self._has_draft(a), **given)
        renoise = given.pop("renoise") if callable(a.solver) else None
        for name, value in given.items():
            if value is not None:
                where = "its settings are in `red`" if a.solver == "red-diff" else "bind its settings to the function"
                raise ValueError(f"{name} is {value!r} with solver={_name(a.solver)!r}, which has none; {where}.")
        if callable(a.solver):
            return settings(a.preset, inner_steps=0, jacobian="free", renoise=renoise)  # a level for each evaluation
        if a.latents is not None and a.start == "measurement":
            raise ValueError(
                "`latents` came with start='measurement' and solver='red-diff', which does not noise it; "
                "expected start='noise', or no `latents`."
            )
        a.red = RedDiff() if a.red is None else a.red
        if not isinstance(a.red, RedDiff):
            raise TypeError(f"`red` is {type(a.red).__name__}; expected a vml_ldm.RedDiff.")
        return settings(a.preset, inner_steps=0, jacobian="free")  # one denoiser evaluation at each level

    def _observe(self, a: SimpleNamespace) -> tuple[Measurement, Tensor]:
        """y for every image of the batch with its operator, checked; and the noise, (B,)."""
        if not callable(a.operator):
            raise TypeError(
                f"`operator` is {type(a.operator).__name__}; expected a callable image -> y, such as those of "
                "vml_ldm.operators."
            )
        y = to_y(a.y)
        y = each(y, count_prompts(a, len(y)), a.num_images_per_prompt, "y").to(self._execution_device)
        check_generators(a.generator, len(y))
        latent = (self.vae.config.latent_channels, a.height // self.vae_scale_factor, a.width // self.vae_scale_factor)
        if a.latents is not None and a.latents.shape != (len(y), *latent):
            raise ValueError(f"`latents` has shape {tuple(a.latents.shape)}; expected {(len(y), *latent)}.")
        observed = Measurement(a.operator, y, 1.0)
        observed.check((a.height, a.width))
        noise_std = check_std(a.sigma_y, len(y), y.device)
        return checked(observed, (a.height, a.width), noise_std), noise_std

    def _levels(self, a: SimpleNamespace, chosen: Settings) -> tuple[SchedulerLevels, Settings]:
        """The levels, and the settings with the inner steps at each."""
        steps = a.num_inference_steps
        count, inner_steps = chosen.split(steps)
        explicit = is_explicit(a)
        picks = a.solver == "vml" and inner_steps > 0 and not explicit
        levels = self._plan(a, count_sampled(steps, count, a.start) if picks else count, chosen.renoise)
        if picks:
            levels = levels.at(pick_levels(levels.noise, count, a.start))
        elif explicit:
            inner_steps = chosen.inner_steps_of(len(levels), steps)
        if a.solver == "red-diff":
            self._num_timesteps, inner_steps = len(visits_of(a.red.order, levels)), 1  # of its optimiser
        else:
            self._num_timesteps = len(levels)
        return levels, replace(chosen, inner_steps=inner_steps)

    def _begin(
        self,
        a: SimpleNamespace,
        measured: Measured,
        noise_std: Tensor,
        levels: Levels,
        chosen: Settings,
        prior: Metered,
    ) -> Iterator[Level]:
        """The solver, about to start."""
        if a.solver == "vml":
            x_T = self._start(a, levels, measured.latent)
            step_in_pixels = settling(measured.measurement, noise_std)
            return self._vml(a, x_T, prior, measured.measurement, levels, chosen, settle=step_in_pixels)
        mu = measured.latent if a.start == "measurement" else start_noise(a, measured.latent)
        shared = {"prior": prior, "measurement": measured.measurement, "schedule": levels, "generator": a.generator}
        return red_diff_levels(mu, **shared, **vars(a.red))

    def _start(self, a: SimpleNamespace, levels: Levels, z: Tensor) -> Tensor:
        """x_T (B, c, h, w) float32: noise, or the latent z noised to the first level."""
        if a.start == "noise":
            return self._noise(a, z)
        alpha, sigma = levels.scales(0)
        return alpha * z + sigma * start_noise(a, z)


def _run(a: SimpleNamespace, x_T: Tensor, prior: Prior, measurement: Measurement, levels: Levels) -> Solution:
    """What the caller's own solver finds."""
    solution = a.solver(x_T, prior=prior, measurement=measurement, schedule=levels, generator=a.generator)
    if not isinstance(solution, Solution):
        raise TypeError(f"`solver` returned {type(solution).__name__}; expected a vml_ldm.Solution, see `conclude`.")
    return solution


def _name(solver: str | Callable) -> str:
    return solver if isinstance(solver, str) else getattr(solver, "__name__", repr(solver))
