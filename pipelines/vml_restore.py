"""VMLRestorePipeline: an image from any measurement of it, by latent VML-MAP or RED-diff on a text-to-image model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from vml_ldm.adapters.diffusers import SchedulerLevels
from vml_ldm.operators import Measurement
from vml_ldm.pipelines._common import (
    STARTS,
    Settings,
    check_generators,
    check_one_of,
    check_std,
    count_prompts,
    each,
    own,
    settings,
    to_y,
)
from vml_ldm.pipelines._solving import Measured, SolvingMixin, VMLPipelineOutput, measure, start_noise, tell
from vml_ldm.red import RedDiff, red_diff_levels, visits_of
from vml_ldm.report import Report
from vml_ldm.solve import Level, Levels, Metered, conclude

SOLVERS = ("vml", "red-diff")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VMLRestorePipeline(SolvingMixin, StableDiffusionPipeline):
    """Restoration of any measurement ``y = A(x0) + n`` with any Stable Diffusion 1.x or 2.x text-to-image checkpoint.

    The decoder is part of the operator. Loading and components are those of `StableDiffusionPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        *,
        y,
        operator: Callable[[Tensor], Tensor],
        sigma_y: float | list[float] | Tensor | None = None,
        solver: str = "vml",
        start: str | None = None,
        preset: str = "balanced",
        jacobian: str | None = None,
        inner_steps: int | None = None,
        renoise: float | None = None,
        red: RedDiff | None = None,
        return_report: bool = False,
    ) -> VMLPipelineOutput | tuple:
        """Find an image that the operator maps to y.

        The arguments up to `callback_on_step_end_tensor_inputs` are named as those of `StableDiffusionPipeline`, with
        these differences:

        - `prompt` may be left out: nothing in particular. One prompt serves several y; `num_images_per_prompt` makes so
          many images of each y.
        - `height` and `width` are those of the image, not of y.
        - `num_inference_steps` is the budget of denoiser evaluations. VML makes K inner steps and one estimate for the
          next state at each level, so there are ``budget // (K + 1)`` levels (a short budget lowers K before it goes
          below four levels, unless `inner_steps` is given). RED-diff makes one evaluation at each level.
          `num_timesteps`, the progress bar and callbacks count levels. Explicit `timesteps` or `sigmas` are the levels.
        - The estimate is conditioned on the prompt alone; guidance moves the state handed to the next level, by no
          more than a tenth of that level's noise. RED-diff takes no guidance.
        - `latents` is the noise of the start; for RED-diff with start="noise", the start.

        Args:
            y: what was observed, batch first: a tensor (B, ...) as the operator gives it, real or complex; or, for an
                image-shaped y, PIL images (greyscale ones have one channel) or arrays (B, H, W, C), bytes or floats.
            operator: image (B, 3, height, width) float32 in [0, 1] -> y, differentiable: one of `vml_ldm.operators`, or
                any callable.
            sigma_y: standard deviation of the noise in y, >= 0, in units of y; a number or one for each image. None is
                0. VML adds the VAE's own error as the operator sees it, see `report.vae_error`.
            solver: "vml", or "red-diff" (`vml_ldm.red_diff`).
            start: "noise", or "measurement": an image that agrees with y (`Measurement.guess`: the operator's own
                ``start``, or least squares in pixels), encoded, and for VML noised to the first level. None: "noise"
                for VML, "measurement" for RED-diff.
            preset: "fast", "balanced" or "best": half, one and two times the budget.
            jacobian, inner_steps, renoise: of VML, as for `VMLInpaintPipeline`. None: the preset's.
            red: settings of RED-diff; None: the authors'. The indices of an order in it are those of the levels.
            return_report: also return a `vml_ldm.report.Report`.

        Returns:
            `VMLPipelineOutput` (`images`, `nsfw_content_detected`, `report`), or with `return_dict=False` the tuple
            (images, nsfw_content_detected), and the report behind them if asked for. Nothing of y is pasted into the
            images.

        Raises:
            ValueError, TypeError: an argument that is not as described, or an operator that does not map images of
                this size to y's shape, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        a = SimpleNamespace(**{name: own(value) for name, value in locals().items() if name != "self"})
        with torch.inference_mode(False), torch.no_grad():
            images, flagged, report = self._solve(a, _choose(a))
        return self._give_back(images, flagged, report if return_report else None, return_dict)

    def _solve(self, a: SimpleNamespace, chosen: Settings) -> tuple[Any, list[bool] | None, Report]:
        """Images in the output type, safety flags, and the report."""
        started = time.perf_counter()
        self._check(a, (self.vae.config.latent_channels,))
        observed, noise_std = self._observe(a)
        levels, chosen = self._levels(a, chosen)
        guess = observed.guess((a.height, a.width))
        prompt_embeds, negative_prompt_embeds = self._embed(a)
        tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        with self._prior(a, prompt_embeds, len(guess)) as prior:
            metered = Metered(prior)
            measured = measure(a.operator, observed.y, noise_std, guess, a.operator(guess), metered)
            solving = self._begin(a, measured, levels, chosen, metered)
            latent, trace = self._follow(a, solving, self.num_timesteps, levels.timesteps, tensors, metered)
            solution = conclude(latent, trace, metered, measured.measurement, started)
        about = {"levels": self.num_timesteps, "preset": a.preset, "solver": a.solver}
        report = tell(solution, measured, noise_std, prior, chosen, **about)
        if a.output_type == "latent":
            return solution.latent, None, report
        return *self._hand_out(solution.image, a.output_type, prompt_embeds.dtype), report

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
        return observed, check_std(a.sigma_y, len(y), y.device)

    def _levels(self, a: SimpleNamespace, chosen: Settings) -> tuple[SchedulerLevels, Settings]:
        """The levels, and the settings with the inner steps at each."""
        steps = a.num_inference_steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps is {steps!r}; expected a whole number >= 1.")
        count, inner_steps = chosen.split(steps)
        levels = self._plan(a, count, chosen.renoise)
        if a.solver == "red-diff":
            self._num_timesteps, inner_steps = len(visits_of(a.red.order, levels)), 1  # of its optimiser
        else:
            self._num_timesteps = len(levels)
        return levels, replace(chosen, inner_steps=inner_steps)

    def _begin(
        self, a: SimpleNamespace, measured: Measured, levels: Levels, chosen: Settings, prior: Metered
    ) -> Iterator[Level]:
        """The solver, about to start."""
        if a.solver == "vml":
            x_T = self._start(a, levels, measured.latent)
            return self._vml(a, x_T, prior, measured.measurement, levels, chosen)
        mu = measured.latent if a.start == "measurement" else start_noise(a, measured.latent)
        shared = {"prior": prior, "measurement": measured.measurement, "schedule": levels, "generator": a.generator}
        return red_diff_levels(mu, **shared, **vars(a.red))

    def _start(self, a: SimpleNamespace, levels: Levels, z: Tensor) -> Tensor:
        """x_T (B, c, h, w) float32: noise, or the latent z noised to the first level."""
        noise = start_noise(a, z)
        if a.start == "noise":
            return noise * float(self.scheduler.init_noise_sigma)
        alpha, sigma = levels.scales(0)
        return alpha * z + sigma * noise


def _choose(a: SimpleNamespace) -> Settings:
    """The settings of a call; its choices are checked, and those left open are made."""
    check_one_of("solver", a.solver, SOLVERS)
    check_one_of("output_type", a.output_type, OUTPUT_TYPES)
    a.start = a.start or ("noise" if a.solver == "vml" else "measurement")
    check_one_of("start", a.start, STARTS)
    a.prompt = "" if a.prompt is None and a.prompt_embeds is None else a.prompt
    given = {name: getattr(a, name) for name in ("jacobian", "inner_steps", "renoise")}
    if a.solver == "vml":
        if a.red is not None:
            raise ValueError("`red` came with solver='vml'; expected solver='red-diff', or no `red`.")
        return settings(a.preset, **given)
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r} with solver='red-diff', which has none; its settings are in `red`.")
    if a.latents is not None and a.start == "measurement":
        raise ValueError(
            "`latents` came with start='measurement' and solver='red-diff', which does not noise it; "
            "expected start='noise', or no `latents`."
        )
    a.red = RedDiff() if a.red is None else a.red
    if not isinstance(a.red, RedDiff):
        raise TypeError(f"`red` is {type(a.red).__name__}; expected a vml_ldm.RedDiff.")
    return settings(a.preset, inner_steps=0, jacobian="free")  # one denoiser evaluation at each level
