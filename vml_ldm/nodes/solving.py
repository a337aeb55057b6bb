"""The nodes that solve: convert, solve, convert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..adapters.comfyui import SCHEDULERS, Sampling, check_match, check_vaes, make_sampler, with_masked_image
from ..closeup import parts_near
from ..damage import Damage
from ..measuring import Measured, groups_of, leaves_most_open, measure_known, pick_start, put_in
from ..metering import Metered
from ..optimize import JACOBIANS
from ..presets import PRESETS, RESTORE_STARTS, STARTS, Settings, settings
from ..report import Report, join_reports
from .layout import Seen, ordinary_tensors, padded, pair, to_image, to_known, to_pixels
from .operators import CATEGORY as OPERATORS
from .operators import OPERATOR
from .tasks import Networks, Task, posed

CATEGORY = OPERATORS.split("/")[0]
_MOST = 0xFFFFFFFFFFFFFFFF

_HAND = "The picture at hand, damaged."
_OPERATOR = "What happened to the picture, from a VML Operator node."
_SEED = "Of the noise, at the start and between the levels."
_GUIDED = {preset: settings(preset, inpaints=True, guided=True) for preset in PRESETS}
_STEPS = (
    "The budget. Of an inpainting, 50 are {} levels with the preset balanced and a cfg above 1. A restoration's level "
    "takes a model evaluation for each inner step and one for the next level: 50 are {} levels of {} inner steps, some "
    "of them spent on corrections instead. The progress bar counts levels."
).format(_GUIDED["balanced"].split(50)[0], *PRESETS["balanced"].split(50))
_CFG = "Guidance, as in KSampler; 1: none."
_PRESET = (
    "fast, balanced and best: an inpainting takes {} of the steps for levels, a restoration {} times the steps.".format(
        ", ".join(f"{chosen.levels:g}" for chosen in _GUIDED.values()),
        ", ".join(f"{chosen.budget:g}" for chosen in PRESETS.values()),
    )
)
_SCHEDULER = "Where the levels lie. auto: simple for flow models (Flux, SD3), ddim_uniform for all others."
_START = "noise, or measurement: from the picture at hand, noised."
_STARTS = (
    "outline: with more noise, which leaves colours open. auto: measurement where the picture tells of every part and "
    "colour of the result, outline where only of every part, else noise."
)
_SIGMAS = (
    "The levels themselves, in place of the scheduler's; they end at 0 and share the steps. Below denoise 1, start "
    "from the measurement."
)
_PROXIMAL = "Levels end by putting in what is known; otherwise they take inner steps alone."
_INNER = "At each level at the most. A level costs one model evaluation more."
_JACOBIAN = "exact goes back through the model; free does not, and is cheaper."
_RENOISE = "Share of fresh noise in the next level's state. 1: all of it. 0: none, deterministic."
_LATENT = "Of the size that was solved: the image's, padded to what the VAE takes (below and to the right)."
_REPORT = "Sizes, agreement with the picture, levels and inner steps, calls of the networks, seconds."


class _SolvingNode(io.ComfyNode):
    """An all-in-one node. A subclass gives its name, what its image is, its own inputs and `execute`."""

    name, about, result = "", "", ""
    starts, start_tip, cfg, proximal = STARTS, _START, 7.5, True

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
                io.Model.Input("model", tooltip="From any loader, with its LoRAs and patches."),
                io.Vae.Input("vae", tooltip="The model's own."),
                io.Conditioning.Input("positive", tooltip="What it should be."),
                io.Conditioning.Input("negative", tooltip="What it should not be; not used at cfg 1."),
                *cls.inputs(),
                io.Int.Input("seed", default=0, min=0, max=_MOST, control_after_generate=True, tooltip=_SEED),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip=_STEPS),
                io.Float.Input("cfg", default=cls.cfg, min=1.0, max=100.0, step=0.1, tooltip=_CFG),
                _noise(),
                io.Combo.Input("preset", options=list(PRESETS), default="balanced", tooltip=_PRESET),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default=SCHEDULERS[0], tooltip=_SCHEDULER),
                io.Combo.Input("start", options=list(cls.starts), default=cls.starts[0], tooltip=cls.start_tip),
                io.Sigmas.Input("sigmas", optional=True, tooltip=_SIGMAS),
                _small(),
                io.Boolean.Input("proximal", default=cls.proximal, optional=True, tooltip=_PROXIMAL),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip=cls.result),
                io.Latent.Output(display_name="latent", tooltip=_LATENT),
                io.String.Output(display_name="report", tooltip=_REPORT),
            ],
        )


class VMLInpaint(_SolvingNode):
    name = "VML Inpaint"
    about = "Repaints where the mask is 1. The known pixels come back unchanged."
    result = "Of the input's size; its known pixels are the input's."

    @classmethod
    def inputs(cls) -> list:
        return [
            io.Image.Input("image", tooltip="The picture to repaint in. Any size; one or several."),
            io.Mask.Input("mask", tooltip="1 = repaint. Of the image's size; one serves several images."),
        ]

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, image, mask, seed, steps, cfg, sigma_y, preset, scheduler, start, model, vae, positive, negative,
        sigmas=None, gradient_vae=None, proximal=True,
    ) -> io.NodeOutput:  # fmt: skip
        about = {"guided": cfg != 1.0, "drafts": gradient_vae is not None, "proximal": proximal}
        chosen = settings(preset, inpaints=True, **about)
        check_match(model, vae, gradient_vae, chosen.takes_gradients(steps))
        known = to_known(mask)
        pixels, known = pair(to_pixels(image, known), known)
        fit = padded(tuple(pixels.shape[2:]), vae.spacial_compression_decode())
        canvas, seen = fit.bring(pixels, known)
        levels_alone = {"inner_steps": 0, "fixed": True, "proximal": None}  # where nothing was measured
        shared = {"cfg": cfg, "scheduler": scheduler, "sigmas": sigmas, "gradient_vae": gradient_vae}

        def solve(rows: list[int]) -> tuple[Tensor, Report, Tensor]:
            problem = canvas[rows], seen[rows]
            own = chosen if seen[rows].any() else replace(chosen, **levels_alone)
            networks = Networks(model, vae, *with_masked_image(model, vae, (positive, negative), *problem), **shared)
            noise, own = networks.plan(own, steps, start)
            task = _inpainting(*problem, vae, own, steps, sigma_y=sigma_y, preset=preset, start=start)
            solution, report, latent = networks.solve(task, noise, seed)
            return solution.image.cpu(), report, latent["samples"]

        groups = groups_of(seen.flatten(1).any(1).tolist())  # by whether anything was measured
        image, report, latent = _by_group(solve, groups)
        painted = fit.take_back(image, pixels, known)
        return io.NodeOutput(to_image(painted), latent, f"{fit.text()}\n{report.text()}")


def _by_group(solve: Callable, groups: list[list[int]]) -> tuple[Tensor, Report, dict]:
    """What `solve` finds for the places of each group, in the batch's order: images, report and LATENT."""
    images, reports, latents = zip(*map(solve, groups), strict=True)
    back = torch.tensor([place for group in groups for place in group]).argsort()
    return torch.cat(images)[back], join_reports(reports, groups), {"samples": torch.cat(latents)[back]}


def _inpainting(canvas: Tensor, seen: Tensor, vae, chosen: Settings, steps: int, **about) -> Task:
    """The task of pictures (B, 3, H, W) with known pixels (B, 1, H, W)."""
    draws = chosen.inner_steps > 0 or chosen.proximal is not None
    parts = parts_near(seen, vae.spacial_compression_decode()) if draws else None

    def pose(prior: Metered, noise_std: Tensor, device: torch.device) -> Measured:
        return measure_known(canvas.to(device), seen.to(device), noise_std, prior, parts)

    def end(image: Tensor, noise_std: Tensor) -> Tensor:
        return put_in(image, canvas.to(image), seen.to(image), noise_std)

    return Task(
        pose, len(canvas), tuple(canvas.shape[2:]), chosen=chosen, correct_steps=chosen.corrections(steps), end=end,
        gradients=chosen.takes_gradients(steps), **about,
    )  # fmt: skip


class VMLRestore(_SolvingNode):
    name = "VML Restore"
    about = "Finds a picture that the operator turns into the one at hand."
    result = "Of the input's size, times the operator's factor."
    starts, start_tip, cfg, proximal = ("auto", *RESTORE_STARTS), f"{_START} {_STARTS}", 1.0, False

    @classmethod
    def inputs(cls) -> list:
        return [
            io.Image.Input(
                "image", tooltip=f"{_HAND} It is solved at its size times the operator's factor: mind memory."
            ),
            OPERATOR.Input("operator", tooltip=_OPERATOR),
        ]

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, image, operator, seed, steps, cfg, sigma_y, preset, scheduler, start, model, vae, positive, negative,
        sigmas=None, gradient_vae=None, proximal=False,
    ) -> io.NodeOutput:  # fmt: skip
        check_match(model, vae, gradient_vae)
        stride = vae.spacial_compression_decode()
        seen = Seen(image, operator, stride)
        colours = seen.colours(stride)
        networks = Networks(model, vae, positive, negative, cfg, scheduler, sigmas, gradient_vae)
        about = {"guided": cfg != 1.0, "drafts": gradient_vae is not None, "proximal": proximal}

        def decide(colours: Tensor) -> tuple[str, bool]:
            return (pick_start(colours) if start == "auto" else start), leaves_most_open(colours)

        def solve(rows: list[int]) -> tuple[Tensor, Report, Tensor]:
            part, (begin, mostly_open) = seen.part(rows), decide(colours[:, rows])
            chosen = settings(preset, start=begin, mostly_open=mostly_open, **about)
            noise, chosen = networks.plan(chosen, steps, begin, picks=True)
            task = Task(
                posed(part), len(part.y), part.canvas, sigma_y, chosen, preset, begin, pixel_step=True,
                correct_steps=chosen.corrections(steps),
            )  # fmt: skip
            solution, report, latent = networks.solve(task, noise, seed)
            return solution.image, report, latent["samples"]

        image, report, latent = _by_group(solve, groups_of([decide(own) for own in colours.split(1, dim=1)]))
        return io.NodeOutput(to_image(seen.take_back(image)), latent, f"{seen.text()}\n{report.text()}")


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
                io.Vae.Input("vae", tooltip="The model's own."),
                io.Image.Input("image", tooltip=f"{_HAND} The LATENT has its size times the operator's factor."),
                OPERATOR.Input("operator", tooltip=f"{_OPERATOR} It takes the place of the LATENT's noise mask."),
                _noise(),
                io.Int.Input("inner_steps", default=preset.inner_steps, min=0, max=100, tooltip=_INNER),
                io.Combo.Input("jacobian", options=list(JACOBIANS), default=preset.jacobian, tooltip=_JACOBIAN),
                io.Float.Input("renoise", default=preset.renoise, min=0.0, max=1.0, step=0.01, tooltip=_RENOISE),
                _small(),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced, with sigmas that end at 0.")],
        )

    @classmethod
    @ordinary_tensors()
    def execute(
        cls, vae, image: Tensor, operator: Damage, sigma_y: float, inner_steps: int, jacobian: str, renoise: float,
        gradient_vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_vaes(vae, gradient_vae)
        seen = Seen(image, operator, vae.spacial_compression_decode())
        chosen = settings("balanced", inner_steps=inner_steps, jacobian=jacobian, renoise=renoise)
        task = Task(posed(seen), len(seen.y), seen.canvas, sigma_y, chosen, "balanced", None)

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


def _check_latent(x: Tensor, seen: Seen, stride: int) -> None:
    expected = (len(seen.y), seen.canvas[0] // stride, seen.canvas[1] // stride)
    if (len(x), *x.shape[2:]) != expected:
        raise ValueError(
            f"the LATENT has {len(x)} images of {stride * x.shape[3]} x {stride * x.shape[2]} pixels; expected "
            f"{expected[0]} of {seen.canvas[1]} x {seen.canvas[0]}, those that the operator measures. Make the empty "
            "latent of this size."
        )
