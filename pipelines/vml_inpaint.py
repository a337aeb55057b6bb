"""VMLInpaintPipeline: the call of diffusers' StableDiffusionInpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import PIL.Image
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import retrieve_timesteps
from torch import Tensor

from vml_ldm.adapters.diffusers import StableDiffusionPrior, check_scheduler, scheduler_levels
from vml_ldm.images import fill_holes, seamless, to_pil, upright_mask, upright_rgb
from vml_ldm.operators import Mask, Measurement
from vml_ldm.pipelines._common import Settings, each, settings, to_known, to_pixels
from vml_ldm.report import Report
from vml_ldm.solve import Levels, Metered, Solution, conclude, noise_like, record, vml_levels

SOLVERS = ("vml", "none")
STARTS = ("noise", "measurement")
_STOCK_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(StableDiffusionInpaintPipeline.__call__).parameters.items()
    if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
]
_VAE_SHARE = 0.5  # of the VAE's round-trip error, in the sigma_y that the solver takes
_LEAST_SIGMA_Y = 1e-3  # a VAE that draws y exactly (nothing known, say) still needs a positive sigma_y


class _Frame(NamedTuple):
    """What is solved for: pixels (B, 3, H, W) in [0, 1], known (B, 1, H, W), and how to lay it over the original."""

    pixels: Tensor
    known: Tensor
    overlay: Callable[[list[PIL.Image.Image]], list[PIL.Image.Image]] | None


@dataclass
class VMLPipelineOutput(StableDiffusionPipelineOutput):
    """The stock output, and `report` (None unless `return_report=True`)."""

    report: Report | None = None


class VMLInpaintPipeline(StableDiffusionInpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion 1.x or 2.x checkpoint.

    The known pixels are a measurement ``y = m * x0`` at full resolution, and the decoder is part of the operator: at
    each noise level the latent descends the variational mode-seeking loss (`vml_ldm.objective`), then moves to the
    next level. Loading, components and every argument are those of `StableDiffusionInpaintPipeline`; white is
    repainted.
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
        stock = {name: _own(given[name]) for name in _STOCK_ARGUMENTS} | kwargs
        if solver not in SOLVERS:
            raise ValueError(f"solver is {solver!r}; expected one of {', '.join(map(repr, SOLVERS))}.")
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; expected one of {', '.join(map(repr, STARTS))}.")
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
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, flagged, report) if return_report else (images, flagged)
        return VMLPipelineOutput(images=images, nsfw_content_detected=flagged, report=report if return_report else None)

    def _solve(self, a: SimpleNamespace, chosen: Settings, preset: str, sigma_y, paste: bool):
        """Images in the output type, safety flags, and the report."""
        started = time.perf_counter()
        self._check(a)
        frame, batch = self._frame(a)
        if not frame.known.any():
            chosen = replace(chosen, inner_steps=0, fixed=True)  # nothing was measured: the budget goes to levels
        timesteps, levels, inner_steps = self._levels(a, chosen)
        chosen = replace(chosen, inner_steps=inner_steps)
        noise_std = _noise_std(sigma_y, batch, self._execution_device)
        prompt_embeds, negative_prompt_embeds = self._embed(a)
        with self._prior(a, prompt_embeds, batch) as prior:
            metered = Metered(prior)
            measurement, vae_error, z_y = _measure(frame, noise_std, metered)
            x_T = self._start(a, levels, frame, z_y, metered)
            tensors = self._callback_tensors(a, frame, prior, prompt_embeds, negative_prompt_embeds)
            solution = self._descend(a, x_T, metered, measurement, levels, chosen, timesteps, tensors, started)
        report = Report(
            sigma_y=noise_std.tolist(),
            vae_error=vae_error.tolist(),
            effective_sigma_y=measurement.sigma_y.tolist(),
            residual=solution.residual.tolist(),
            levels=len(levels),
            inner_steps=chosen.inner_steps,
            jacobian=chosen.jacobian,
            preset=preset,
            trace=solution.trace,
            retries=dict(prior.retries),
            calls=dict(solution.calls),
            seconds=dict(solution.seconds),
        )
        return *self._finish(a, frame, solution, paste, prompt_embeds.dtype), report

    def _check(self, a: SimpleNamespace) -> None:
        """Refuse what cannot work before any network runs, and fill in the defaults that depend on the model."""
        if isinstance(a.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            a.callback_on_step_end_tensor_inputs = a.callback_on_step_end.tensor_inputs
        a.height = a.height or self.unet.config.sample_size * self.vae_scale_factor
        a.width = a.width or self.unet.config.sample_size * self.vae_scale_factor
        a.num_images_per_prompt = a.num_images_per_prompt or 1
        a.callback, a.callback_steps = getattr(a, "callback", None), getattr(a, "callback_steps", None)
        self.check_inputs(
            a.prompt,
            a.image,
            a.mask_image,
            a.height,
            a.width,
            a.strength,
            a.callback_steps,
            a.output_type,
            a.negative_prompt,
            a.prompt_embeds,
            a.negative_prompt_embeds,
            a.ip_adapter_image,
            a.ip_adapter_image_embeds,
            a.callback_on_step_end_tensor_inputs,
            a.padding_mask_crop,
        )
        check_scheduler(self.scheduler)
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels not in (latent, 2 * latent + 1):
            raise ValueError(
                f"the UNet takes {channels} channels; expected {latent}, or {2 * latent + 1} (inpainting)."
            )
        self._guidance_scale, self._clip_skip = a.guidance_scale, a.clip_skip
        self._cross_attention_kwargs, self._interrupt = a.cross_attention_kwargs, False

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
        prompts = 1 if isinstance(a.prompt, str) else len(a.prompt if a.prompt is not None else a.prompt_embeds)
        if prompts == 1:
            prompts = max(len(pixels), len(known))
            _repeat_prompt(a, prompts)
        pixels = each(pixels, prompts, a.num_images_per_prompt, "image").to(self._execution_device)
        known = each(known, prompts, a.num_images_per_prompt, "mask_image").to(self._execution_device)
        batch = len(pixels)
        if isinstance(a.generator, list) and len(a.generator) != batch:
            raise ValueError(f"{len(a.generator)} generators came for {batch} images; expected one, or one for each.")
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

    def _levels(self, a: SimpleNamespace, chosen: Settings) -> tuple[Tensor, Levels, int]:
        """The time steps that callbacks see, the levels, and the inner steps at each.

        At strength s < 1 the levels span the lower s of the scheduler's noise, and s of the budget pays for them.
        """
        levels, inner_steps = chosen.split(a.num_inference_steps * a.strength)
        if a.timesteps is None and a.sigmas is None and int(a.num_inference_steps * a.strength) < 1:
            raise ValueError(
                f"strength {a.strength} of {a.num_inference_steps} steps leaves none; expected one at least. "
                "Raise strength or num_inference_steps."
            )
        device = self._execution_device
        of_all = math.ceil(levels / a.strength) if a.strength > 0 else 0
        timesteps, count = retrieve_timesteps(self.scheduler, of_all, device, a.timesteps, a.sigmas)
        timesteps, count = self.get_timesteps(count, a.strength, device)
        if count < 1:
            raise ValueError(f"strength {a.strength} leaves none of the levels; expected one at least. Raise strength.")
        self._num_timesteps = count
        return timesteps, scheduler_levels(self.scheduler, timesteps, chosen.renoise), inner_steps

    def _embed(self, a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
        """Prompt embeddings, negative ones first under guidance; and the negative ones alone."""
        positive, negative = self.encode_prompt(
            a.prompt,
            self._execution_device,
            a.num_images_per_prompt,
            self.do_classifier_free_guidance,
            a.negative_prompt,
            prompt_embeds=a.prompt_embeds,
            negative_prompt_embeds=a.negative_prompt_embeds,
            lora_scale=(a.cross_attention_kwargs or {}).get("scale"),
            clip_skip=a.clip_skip,
        )
        return (torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive), negative

    def _prior(self, a: SimpleNamespace, prompt_embeds: Tensor, batch: int) -> StableDiffusionPrior:
        shared = {"cross_attention_kwargs": a.cross_attention_kwargs}
        if self.unet.config.time_cond_proj_dim is not None:
            scale = torch.tensor(self.guidance_scale - 1).repeat(batch)
            embedding = self.get_guidance_scale_embedding(scale, self.unet.config.time_cond_proj_dim)
            shared["timestep_cond"] = embedding.to(self._execution_device, self.unet.dtype)
        conditions = [dict(shared) for _ in range(1 + self.do_classifier_free_guidance)]  # negative first
        if a.ip_adapter_image is not None or a.ip_adapter_image_embeds is not None:
            embeds = self.prepare_ip_adapter_image_embeds(
                a.ip_adapter_image,
                a.ip_adapter_image_embeds,
                self._execution_device,
                batch,
                self.do_classifier_free_guidance,
            )
            for condition, *own in zip(conditions, *(e.chunk(len(conditions)) for e in embeds), strict=True):
                condition["added_cond_kwargs"] = {"image_embeds": own}
        prior = StableDiffusionPrior(
            unet=self.unet,
            vae=self.vae,
            scheduler=self.scheduler,
            condition=conditions[-1],
            negative=conditions[0] if self.do_classifier_free_guidance else None,
            guidance_scale=self.guidance_scale,
        )
        _set_prompt(prior, prompt_embeds)
        return prior

    def _start(self, a: SimpleNamespace, levels: Levels, frame: _Frame, z_y: Tensor, prior: Metered) -> Tensor:
        """x_T (B, c, h, w) float32: noise, or the image's or the measurement's latents noised to the first level."""
        if a.latents is None:
            noise = noise_like(z_y, a.generator)
        elif a.latents.shape == z_y.shape:
            noise = a.latents.to(z_y)
        else:
            raise ValueError(f"`latents` has shape {tuple(a.latents.shape)}; expected {tuple(z_y.shape)}.")
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

    def _descend(self, a, x_T, prior, measurement, levels, chosen, timesteps, tensors, started) -> Solution:
        """VML-MAP with a progress bar, callbacks and interruption (which keeps the last clean estimate)."""
        trace = []
        solving = vml_levels(
            x_T,
            prior=prior,
            measurement=measurement,
            schedule=levels,
            inner_steps=chosen.inner_steps,
            jacobian=chosen.jacobian,
            stop_at=chosen.stop_at,
            generator=a.generator,
        )
        with self.progress_bar(total=len(levels)) as bar:
            for level in solving:
                trace.append(record(level))
                if a.callback_on_step_end is not None:
                    self._call_back(a, level, timesteps, tensors, prior.prior)
                bar.update()
                if a.callback is not None and level.index % (a.callback_steps or 1) == 0:
                    a.callback(level.index, timesteps[level.index], level.x_next)
                if self.interrupt:
                    return conclude(level.z0_hat, trace, prior, measurement, started)
        return conclude(level.x_next, trace, prior, measurement, started)

    def _call_back(self, a: SimpleNamespace, level, timesteps: Tensor, tensors: dict, prior) -> None:
        """Hand the tensors that were asked for to the user's callback, and take back what it changed."""
        given = {"latents": level.x_next, **tensors}
        wanted = {name: given[name] for name in a.callback_on_step_end_tensor_inputs}
        changed = a.callback_on_step_end(self, level.index, timesteps[level.index], wanted) or {}
        level.x_next = changed.get("latents", level.x_next)
        tensors.update({name: changed[name] for name in tensors if name in changed})
        _set_prompt(prior, tensors["prompt_embeds"])
        if prior.inpainting is not None:
            _set_inpainting(prior, tensors)

    def _finish(self, a: SimpleNamespace, frame: _Frame, solution: Solution, paste: bool, dtype: torch.dtype):
        """Paste, safety check, output type: (images, flags)."""
        if a.output_type == "latent":
            return solution.latent, None
        image = seamless(frame.pixels, solution.image, frame.known) if paste else solution.image
        _, flagged = self.run_safety_checker(2 * image - 1, image.device, dtype)
        if flagged is not None:  # flagged images come back black, as stock returns them; the others stay as they are
            image = image * (1 - torch.as_tensor(flagged).to(image).reshape(-1, 1, 1, 1))
        if a.output_type == "pt":
            return image, flagged
        if a.output_type == "np":
            return image.cpu().permute(0, 2, 3, 1).numpy(), flagged
        images = to_pil(image)
        return (frame.overlay(images) if frame.overlay else images), flagged


def _set_prompt(prior: StableDiffusionPrior, prompt_embeds: Tensor) -> None:
    """Prompt embeddings as the stock pipeline concatenates them: under guidance the negative ones first."""
    if prior.negative is None:
        prior.condition["encoder_hidden_states"] = prompt_embeds
    else:
        prior.negative["encoder_hidden_states"], prior.condition["encoder_hidden_states"] = prompt_embeds.chunk(2)


def _set_inpainting(prior: StableDiffusionPrior, tensors: dict) -> None:
    """Mask and masked latents for a 9-channel UNet; the stock pipeline holds them twice under guidance."""
    channels = torch.cat([tensors["mask"], tensors["masked_image_latents"]], dim=1)
    prior.inpainting = channels if prior.negative is None else channels.chunk(2)[1]


def _measure(frame: _Frame, noise_std: Tensor, prior: Metered) -> tuple[Measurement, Tensor, Tensor]:
    """The known pixels as a measurement, the VAE's round-trip error on them, (B,), and their latent.

    The holes are filled smoothly before the image goes through the VAE. The decoder cannot draw y exactly, so the
    solver takes ``sqrt(sigma_y^2 + (vae_error / 2)^2)`` for its sigma_y: a latent that was searched for comes closer
    than one that was encoded (half was found on the validation images).
    """
    operator = Mask(frame.known)
    y = operator(frame.pixels)
    measurement = Measurement(operator, y, 1.0)
    z_y = prior.encode(fill_holes(frame.pixels, frame.known))
    vae_error = measurement.rms(measurement.residual(prior.decode(z_y)))
    effective = (noise_std**2 + (_VAE_SHARE * vae_error) ** 2).sqrt().clamp(min=_LEAST_SIGMA_Y)
    return Measurement(operator, y, effective), vae_error, z_y


def _noise_std(sigma_y, batch: int, device) -> Tensor:
    """sigma_y as (B,) float32.

    Raises:
        ValueError: negative, not finite, or neither a number nor one for each image.
    """
    std = torch.as_tensor(0.0 if sigma_y is None else sigma_y, dtype=torch.float32, device=device)
    if std.ndim > 1 or std.numel() not in (1, batch):
        raise ValueError(f"sigma_y has shape {tuple(std.shape)}; expected a number, or one for each of {batch} images.")
    if not (torch.isfinite(std) & (std >= 0)).all():
        raise ValueError(f"sigma_y is {sigma_y}; expected >= 0, in units of images in [0, 1].")
    return std.expand(batch)


def _repeat_prompt(a: SimpleNamespace, count: int) -> None:
    """One prompt for `count` images."""
    for name in ("prompt", "negative_prompt"):
        value = getattr(a, name)
        if value is not None and count > 1:
            setattr(a, name, (value if isinstance(value, list) else [value]) * count)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(a, name)
        if value is not None and len(value) == 1:
            setattr(a, name, value.expand(count, -1, -1))


def _own(value):
    """A tensor made in inference mode as one that autograd may save."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
