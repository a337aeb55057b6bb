"""The nodes that solve: convert, solve, convert."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..adapters.comfyui import (
    SCHEDULERS,
    Sampling,
    check_match,
    levels_of,
    make_sampler,
    run,
    sigmas_of,
    with_masked_image,
)
from ..damage import Damage
from ..measuring import Measured, check_std, measure, measure_known, settle, tell
from ..optimize import JACOBIANS
from ..presets import PRESETS, STARTS, Settings, pick_levels, settings
from ..report import Report
from ..solve import Metered, Solution, conclude, noise_like, record, vml_levels
from .layout import Seen, ordinary_tensors, padded, pair, to_image, to_known, to_pixels
from .operators import CATEGORY as OPERATORS
from .operators import OPERATOR

CATEGORY = OPERATORS.split("/")[0]
_MOST = 0xFFFFFFFFFFFFFFFF


@dataclass
class Task:
    """A measurement to be solved.

    Attributes:
        pose: what the VAE makes of it, from the metered prior, the noise (B,) and the device.
        batch, size: how many images, and their (height, width) in pixels.
        sigma_y: as the user named it.
        chosen, preset: the budget's settings, and their name.
        start: one of `STARTS`; None takes the state that ComfyUI gives.
        pixel_step: the image takes a last step in pixels (`vml_ldm.measuring.settle`).
    """

    pose: Callable[[Metered, Tensor, torch.device], Measured]
    batch: int
    size: tuple[int, int]
    sigma_y: float
    chosen: Settings
    preset: str
    start: str | None
    pixel_step: bool = False

    def solve(self, sampling: Sampling, generator: torch.Generator) -> tuple[Solution, Report]:
        """VML-MAP, level by level."""
        started, prior = time.perf_counter(), sampling.prior
        metered = Metered(prior)
        noise_std = check_std(self.sigma_y, self.batch, prior.device)
        measured = self.pose(metered, noise_std, prior.device)
        levels, trace = sampling.levels(self.chosen.renoise), []
        for level in vml_levels(
            self._first(sampling, measured.latent, levels.scales(0), generator),
            prior=metered,
            measurement=measured.measurement,
            schedule=levels,
            inner_steps=self.chosen.inner_steps,
            last_steps=self.chosen.last_steps,
            jacobian=self.chosen.jacobian,
            stop_at=self.chosen.stop_at,
            generator=generator,
            draft=None if sampling.draft is None else metered.drafting(sampling.draft),
        ):
            trace.append(record(level))
            sampling.tell(level)
        solution = conclude(level.x_next, trace, metered, measured.measurement, started)
        if self.pixel_step:
            solution.image = settle(solution.image, measured.measurement, noise_std)
        about = {"levels": len(levels), "inner_steps": self.chosen.inner_steps, "jacobian": self.chosen.jacobian}
        return solution, tell(solution, measured, noise_std, prior.retries, preset=self.preset, **about)

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

    def plan(self, chosen: Settings, steps: int, picks: bool = False) -> tuple[Tensor, Settings]:
        """The noise of the levels that the budget pays, and the settings with the inner steps at each.

        Args:
            picks: the levels are picked among those of `steps` (`vml_ldm.presets.pick_levels`).
        """
        count, inner_steps = chosen.split(steps)
        chosen = replace(chosen, inner_steps=inner_steps)
        if self.sigmas is not None:
            return self.sigmas, chosen
        if not (picks and inner_steps > 0):
            return sigmas_of(self.model, self.scheduler, count), chosen
        sigmas = sigmas_of(self.model, self.scheduler, max(steps, count))
        levels = levels_of(self.model.get_model_object("model_sampling"), sigmas)
        return sigmas[[*pick_levels(levels.noise, count), -1]], chosen

    def solve(self, task: Task, sigmas: Tensor, seed: int) -> tuple[Solution, Report, dict]:
        """The solution, its report, and LATENT."""
        found = []

        def work(sampling: Sampling) -> Tensor:
            found.append(task.solve(sampling, torch.Generator().manual_seed(seed)))
            return found[0][0].latent

        samples = run(
            work, model=self.model, vae=self.vae, gradient_vae=self.gradient_vae, positive=self.positive,
            negative=self.negative, cfg=self.cfg, sigmas=sigmas, batch=task.batch, size=task.size, seed=seed,
        )  # fmt: skip
        return *found[0], {"samples": samples}


class _SolvingNode(io.ComfyNode):
    """An all-in-one node. A subclass gives its name, its own inputs and `solve`."""

    name, about = "", ""

    @classmethod
    def inputs(cls) -> list:
        raise NotImplementedError

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.name,
            category=CATEGORY,
            description=cls.about,
            inputs=[
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                *cls.inputs(),
                io.Int.Input("seed", default=0, min=0, max=_MOST, control_after_generate=True),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="The budget, in model evaluations."),
                io.Float.Input("cfg", default=7.5, min=1.0, max=100.0, step=0.1, tooltip="1: no guidance."),
                _noise(),
                io.Combo.Input("preset", options=list(PRESETS), default="balanced", tooltip="0.5, 1 or 2 times steps."),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default="ddim_uniform"),
                io.Combo.Input("start", options=list(STARTS), default="noise"),
                io.Sigmas.Input("sigmas", optional=True, tooltip="The levels themselves, in place of the scheduler's."),
                _small(),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="report"),
            ],
        )


class VMLInpaint(_SolvingNode):
    name = "VML Inpaint"
    about = "Repaints where the mask is 1. The known pixels come back unchanged."

    @classmethod
    def inputs(cls) -> list:
        return [io.Image.Input("image"), io.Mask.Input("mask", tooltip="1 = repaint. Of the image's size.")]

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, image, mask, seed, steps, cfg, sigma_y, preset, scheduler, start, model, vae, positive, negative,
        sigmas=None, gradient_vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_match(model, vae, gradient_vae)
        pixels, known = pair(to_pixels(image), to_known(mask))
        fit = padded(tuple(pixels.shape[2:]), vae.spacial_compression_decode())
        canvas, seen = fit.bring(pixels, known)
        positive, negative = with_masked_image(model, vae, (positive, negative), canvas, seen)
        chosen = settings(preset)
        if not seen.any():
            chosen = replace(chosen, inner_steps=0, fixed=True)  # nothing was measured: the budget goes to levels
        networks = Networks(model, vae, positive, negative, cfg, scheduler, sigmas, gradient_vae)
        noise, chosen = networks.plan(chosen, steps)

        def pose(prior: Metered, noise_std: Tensor, device: torch.device) -> Measured:
            return measure_known(canvas.to(device), seen.to(device), noise_std, prior)

        task = Task(pose, len(canvas), fit.padded, sigma_y, chosen, preset, start)
        solution, report, latent = networks.solve(task, noise, seed)
        painted = fit.take_back(solution.image.cpu(), pixels, known)
        return io.NodeOutput(to_image(painted), latent, report.text())


class VMLRestore(_SolvingNode):
    name = "VML Restore"
    about = "Finds a picture that the operator turns into the one at hand."

    @classmethod
    def inputs(cls) -> list:
        return [io.Image.Input("image", tooltip="The picture at hand."), OPERATOR.Input("operator")]

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, image, operator, seed, steps, cfg, sigma_y, preset, scheduler, start, model, vae, positive, negative,
        sigmas=None, gradient_vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_match(model, vae, gradient_vae)
        seen = Seen(image, operator, vae.spacial_compression_decode())
        networks = Networks(model, vae, positive, negative, cfg, scheduler, sigmas, gradient_vae)
        noise, chosen = networks.plan(settings(preset), steps, picks=True)
        task = Task(_posed(seen), len(seen.y), seen.canvas, sigma_y, chosen, preset, start, pixel_step=True)
        solution, report, latent = networks.solve(task, noise, seed)
        return io.NodeOutput(to_image(seen.take_back(solution.image)), latent, report.text())


class VMLSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        preset = PRESETS["balanced"]
        return io.Schema(
            node_id=cls.__name__,
            display_name="VML Sampler",
            category=CATEGORY,
            description="A SAMPLER for SamplerCustomAdvanced that agrees with the picture at hand at every level.",
            inputs=[
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="The picture at hand."),
                OPERATOR.Input("operator"),
                _noise(),
                io.Int.Input("inner_steps", default=preset.inner_steps, min=0, max=100, tooltip="At each level."),
                io.Combo.Input("jacobian", options=list(JACOBIANS), default=preset.jacobian),
                io.Float.Input("renoise", default=preset.renoise, min=0.0, max=1.0, step=0.01, tooltip="1: fresh."),
                _small(),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, vae, image: Tensor, operator: Damage, sigma_y: float, inner_steps: int, jacobian: str, renoise: float,
        gradient_vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        seen = Seen(image, operator, vae.spacial_compression_decode())
        chosen = settings("balanced", inner_steps=inner_steps, jacobian=jacobian, renoise=renoise)
        task = Task(_posed(seen), len(seen.y), seen.canvas, sigma_y, chosen, "balanced", None)

        def work(sampling: Sampling) -> Tensor:
            check_match(sampling.patcher, vae, gradient_vae)
            _check_latent(sampling.x, seen, vae.spacial_compression_decode())
            seed = (sampling.seed + 1) & _MOST  # the noise of the start is the seed's own
            generator = torch.Generator().manual_seed(seed)
            return task.solve(sampling, generator)[0].latent

        return io.NodeOutput(make_sampler(work, vae, gradient_vae))


def _noise():
    tooltip = "Standard deviation of the noise in the picture at hand, whose values are 0 to 1."
    return io.Float.Input("sigma_y", default=0.0, min=0.0, max=1.0, step=0.001, round=False, tooltip=tooltip)


def _small():
    tooltip = "A VAE of the same latents with a small decoder (TAESD), for all levels but the last. Faster."
    return io.Vae.Input("gradient_vae", optional=True, tooltip=tooltip)


def _posed(seen: Seen) -> Callable[[Metered, Tensor, torch.device], Measured]:
    def pose(prior: Metered, noise_std: Tensor, device: torch.device) -> Measured:
        y = seen.y.to(device)
        return measure(seen.operator, y, noise_std, seen.guess(y, noise_std), prior)

    return pose


def _check_latent(x: Tensor, seen: Seen, stride: int) -> None:
    expected = (len(seen.y), seen.canvas[0] // stride, seen.canvas[1] // stride)
    if (len(x), *x.shape[2:]) != expected:
        raise ValueError(
            f"the LATENT has {len(x)} images of {stride * x.shape[3]} x {stride * x.shape[2]} pixels; expected "
            f"{expected[0]} of {seen.canvas[1]} x {seen.canvas[0]}, those that the operator measures. Make the empty "
            "latent of this size."
        )
