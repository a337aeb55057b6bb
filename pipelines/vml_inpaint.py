"""VMLInpaintPipeline: the call of diffusers' StableDiffusionInpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import PIL.Image
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from vml_ldm.adapters.diffusers import SchedulerLevels, StableDiffusionPrior
from vml_ldm.images import fill_holes, seamless, upright_mask, upright_rgb
from vml_ldm.operators import Mask
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
    to_known,
    to_pixels,
)
from vml_ldm.pipelines._solving import Measured, SolvingMixin, VMLPipelineOutput, measure, start_noise, tell
from vml_ldm.solve import Levels, Metered, Solution, conclude

SOLVERS = ("vml", "none")
_STOCK_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(StableDiffusionInpaintPipeline.__call__).parameters.items()
    if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
]


class _Frame(NamedTuple):
    """What is solved for: pixels (B, 3, H, W) in [0, 1], known (B, 1, H, W), and how to lay it over the original."""

    pixels: Tensor
    known: Tensor
    overlay: Callable[[list[PIL.Image.Image]], list[PIL.Image.Image]] | None


class VMLInpaintPipeline(SolvingMixin, StableDiffusionInpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion 1.x or 2.x checkpoint.

    The known pixels are a measurement ``y = m * x0`` at full resolution, and the decoder is part of the operator: at
    each noise level the latent descends the variational mode-seeking loss (`vml_ldm.objective`), then moves to the
    next level. Loading, components and every argument are those of `StableDiffusionInpaintPipeline`; white is
    repainted. 9-channel inpainting checkpoints are fed mask and masked latents as in the stock pipeline. Every
    scheduler for Stable Diffusion gives its noise levels (`vml_ldm.adapters.diffusers.scheduler_levels`); one of flow
    matching, or without training noise, is refused.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        mask_image=None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        *,
        solver: str = "vml",
        sigma_y: float | list[float] | Tensor | None = None,
        jacobian: str | None = None,
        preset: str = "balanced",
        inner_steps: int | None = None,
        renoise: float | None = None,
        start: str = "noise",
        paste: bool = True,
        return_report: bool = False,
        **kwargs,
    ) -> VMLPipelineOutput | tuple:
        """Repaint the white part of `mask_image`.

        The arguments up to `callback_on_step_end_tensor_inputs` are those of `StableDiffusionInpaintPipeline`, with
        these differences when the solver is on:

        - `mask_image` keeps soft values: a pixel painted p in [0, 1] is measured as ``(1 - p) x0``, so its squared
          residual weighs (1 - p)^2, and the paste mixes ``(1 - p) original + p result``. Stock binarises.
        - `image` and `mask_image` may be one, or one for each prompt; one prompt serves several images.
        - `num_inference_steps` is the budget of denoiser evaluations. K inner steps and one estimate for the next state
          make K + 1 evaluations a level, so there are ``budget // (K + 1)`` levels (a short budget lowers K before it
          goes below four levels, unless `inner_steps` is given); `num_timesteps`, the progress bar and callbacks count
          levels. Explicit `timesteps` or `sigmas` are the levels.
        - The estimate is conditioned on the prompt alone; guidance moves the state handed to the next level, by no
          more than a tenth of that level's noise (see `StableDiffusionPrior.guide`).
        - `eta` has no effect: `renoise` says how the next state is made.

        Args:
            solver: "vml", or "none" for the stock pipeline, bit for bit.
            sigma_y: standard deviation of the noise on the known pixels, >= 0, in units of [0, 1] images; a number or
                one for each image. None is 0, for a clean image that is edited. The solver adds the VAE's own error.
            jacobian: "exact" pulls the gradient back through the UNet; "free" saves that backward pass. None: the
                preset's.
            preset: "fast", "balanced" or "best": half, one and two times the budget (see `_common.PRESETS`).
            inner_steps: K, inner steps a level, >= 0. None: the preset's.
            renoise: in [0, 1], share of fresh noise in the next state; 0 is deterministic. None: the preset's.
            start: "noise", or "measurement": the known pixels with their holes filled smoothly, encoded and noised to
                the first level. At strength < 1 the start is `image`, as it is in the stock pipeline.
            paste: put the known pixels back: where the mask is black the result is bit-identical to `image` (at
                height x width), and beside it the decoder's own error is taken off, so that no seam shows (see
                `vml_ldm.images.seamless`). False returns the solver's own image.
            return_report: also return a `vml_ldm.report.Report`.

        Returns:
            `VMLPipelineOutput` (`images`, `nsfw_content_detected`, `report`), or with `return_dict=False` the tuple
            (images, nsfw_content_detected), and the report behind them if asked for.

        Raises:
            ValueError, TypeError: an argument that is not as described, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        given = locals()
        stock = {name: own(given[name]) for name in _STOCK_ARGUMENTS} | kwargs
        check_one_of("solver", solver, SOLVERS)
        check_one_of("start", start, STARTS)
        if solver == "none":
            if return_report:
                raise ValueError("return_report=True came with solver='none'; expected solver='vml'. Stock has none.")
            return super().__call__(**stock)
        unknown = set(kwargs) - {"callback", "callback_steps"}
        if unknown:
            raise TypeError(f"__call__() got unexpected arguments: {', '.join(sorted(unknown))}.")
        chosen = settings(preset, jacobian=jacobian, inner_steps=inner_steps, renoise=renoise)
        with torch.inference_mode(False), torch.no_grad():
            images, flagged, report = self._solve(SimpleNamespace(**stock, start=start), chosen, preset, sigma_y, paste)
        return self._give_back(images, flagged, report if return_report else None, return_dict)

    def _solve(self, a: SimpleNamespace, chosen: Settings, preset: str, sigma_y, paste: bool):
        """Images in the output type, safety flags, and the report."""
        started, channels = time.perf_counter(), self.vae.config.latent_channels
        self._check(a, (channels, 2 * channels + 1))
        frame, batch = self._frame(a)
        if not frame.known.any():
            chosen = replace(chosen, inner_steps=0, fixed=True)  # nothing was measured: the budget goes to levels
        levels, inner_steps = self._levels(a, chosen)
        chosen = replace(chosen, inner_steps=inner_steps)
        noise_std = check_std(sigma_y, batch, self._execution_device)
        prompt_embeds, negative_prompt_embeds = self._embed(a)
        with self._prior(a, prompt_embeds, batch) as prior:
            metered = Metered(prior)
            measured = _measure(frame, noise_std, metered)
            x_T = self._start(a, levels, frame, measured.latent, metered)
            tensors = self._callback_tensors(a, frame, prior, prompt_embeds, negative_prompt_embeds)
            solving = self._vml(a, x_T, metered, measured.measurement, levels, chosen)
            latent, trace = self._follow(a, solving, len(levels), levels.timesteps, tensors, metered)
            solution = conclude(latent, trace, metered, measured.measurement, started)
        report = tell(solution, measured, noise_std, prior, chosen, levels=len(levels), preset=preset)
        return *self._finish(a, frame, solution, paste, prompt_embeds.dtype), report

    def _frame(self, a: SimpleNamespace) -> tuple[_Frame, int]:
        """Pixels and mask for every image of the batch, and the batch's size; one prompt serves several images."""
        size = {"height": a.height, "width": a.width}
        overlay = None
        if a.padding_mask_crop is not None:
            size |= {"resize_mode": "fill", "crops_coords": self._crop(a)}
            overlay = self._overlay(a, size["crops_coords"])
        pixels = to_pixels(self._decoded(a.image), self._processor(), **size)
        known = to_known(a.mask_image, self._processor(do_convert_grayscale=True), **size)
        if pixels.shape[2:] != known.shape[2:]:
            raise ValueError(
                f"`image` has {tuple(pixels.shape[2:])} pixels and `mask_image` {tuple(known.shape[2:])}; "
                "expected the same. Resize one of them."
            )
        prompts = count_prompts(a, max(len(pixels), len(known)))
        pixels = each(pixels, prompts, a.num_images_per_prompt, "image").to(self._execution_device)
        known = each(known, prompts, a.num_images_per_prompt, "mask_image").to(self._execution_device)
        batch = len(pixels)
        check_generators(a.generator, batch)
        return _Frame(pixels, known, overlay), batch

    def _processor(self, **options) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False, **options)

    def _decoded(self, image):
        """Image latents, which stock takes too, as pixels; anything else as it is."""
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == self.vae.config.latent_channels:
            latents = image.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor
            return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        return image

    def _crop(self, a: SimpleNamespace) -> tuple[int, int, int, int] | None:
        """The part of the image that `padding_mask_crop` solves for; None (all of it) when nothing is painted."""
        a.image, a.mask_image = upright_rgb(a.image), upright_mask(a.mask_image)
        if a.image.size != a.mask_image.size:
            raise ValueError(
                f"`padding_mask_crop` came with an image of {a.image.size} and a mask of {a.mask_image.size} pixels; "
                "expected the same size. Resize one of them."
            )
        if a.mask_image.getbbox() is None:
            return None
        return self.mask_processor.get_crop_region(a.mask_image, a.width, a.height, pad=a.padding_mask_crop)

    def _overlay(self, a: SimpleNamespace, crop):
        return lambda images: [self.image_processor.apply_overlay(a.mask_image, a.image, i, crop) for i in images]

    def _levels(self, a: SimpleNamespace, chosen: Settings) -> tuple[SchedulerLevels, int]:
        """The levels, and the inner steps at each.

        At strength s < 1 the levels span the lower s of the scheduler's noise, and s of the budget pays for them.
        """
        count, inner_steps = chosen.split(a.num_inference_steps * a.strength)
        if a.timesteps is None and a.sigmas is None and int(a.num_inference_steps * a.strength) < 1:
            raise ValueError(
                f"strength {a.strength} of {a.num_inference_steps} steps leaves none; expected one at least. "
                "Raise strength or num_inference_steps."
            )
        levels = self._plan(a, math.ceil(count / a.strength) if a.strength > 0 else 1, chosen.renoise)
        self._num_timesteps = int(len(levels) * a.strength)
        if self._num_timesteps < 1:
            raise ValueError(f"strength {a.strength} leaves none of the levels; expected one at least. Raise strength.")
        return levels.last(self._num_timesteps), inner_steps

    def _start(self, a: SimpleNamespace, levels: Levels, frame: _Frame, z_y: Tensor, prior: Metered) -> Tensor:
        """x_T (B, c, h, w) float32: noise, or the image's or the measurement's latents noised to the first level."""
        noise = start_noise(a, z_y)
        if a.strength == 1.0 and a.start == "noise":
            return noise * float(self.scheduler.init_noise_sigma)
        alpha, sigma = levels.scales(0)
        return alpha * (z_y if a.strength == 1.0 else prior.encode(frame.pixels)) + sigma * noise

    def _callback_tensors(
        self, a: SimpleNamespace, frame: _Frame, prior, prompt_embeds, negative_prompt_embeds
    ) -> dict:
        """What callbacks may read and change beside the latents; mask and masked latents also feed a 9-channel UNet."""
        tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        inpainting = self.unet.config.in_channels != self.vae.config.latent_channels
        asked = {"mask", "masked_image_latents"} & set(a.callback_on_step_end_tensor_inputs)
        if inpainting or (a.callback_on_step_end is not None and asked):
            painted = (frame.known < 0.5).to(frame.known)
            masked = (
                (2 * frame.pixels - 1) * (1 - painted) if a.masked_image_latents is None else a.masked_image_latents
            )
            tensors["mask"], tensors["masked_image_latents"] = self.prepare_mask_latents(
                painted,
                masked,
                len(painted),
                a.height,
                a.width,
                prompt_embeds.dtype,
                self._execution_device,
                a.generator,
                self.do_classifier_free_guidance,
            )
        if inpainting:
            _set_inpainting(prior, tensors)
        return tensors

    def _condition(self, prior: StableDiffusionPrior, tensors: dict) -> None:
        super()._condition(prior, tensors)
        if prior.inpainting is not None:
            _set_inpainting(prior, tensors)

    def _finish(self, a: SimpleNamespace, frame: _Frame, solution: Solution, paste: bool, dtype: torch.dtype):
        """Paste, safety check, output type: (images, flags)."""
        if a.output_type == "latent":
            return solution.latent, None
        image = seamless(frame.pixels, solution.image, frame.known) if paste else solution.image
        images, flagged = self._hand_out(image, a.output_type, dtype)
        laid_over = frame.overlay is not None and a.output_type not in ("pt", "np")
        return (frame.overlay(images) if laid_over else images), flagged


def _set_inpainting(prior: StableDiffusionPrior, tensors: dict) -> None:
    """Mask and masked latents for a 9-channel UNet; the stock pipeline holds them twice under guidance."""
    channels = torch.cat([tensors["mask"], tensors["masked_image_latents"]], dim=1)
    prior.inpainting = channels if prior.negative is None else channels.chunk(2)[1]


def _measure(frame: _Frame, noise_std: Tensor, prior: Metered) -> Measured:
    """The known pixels as a measurement, see `measure`; the holes are filled smoothly before the VAE sees them."""
    operator = Mask(frame.known)
    y = operator(frame.pixels)
    return measure(operator, y, noise_std, fill_holes(frame.pixels, frame.known), y, prior)
