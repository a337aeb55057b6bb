"""What the pipelines share around a solver: checks, prompt, prior, start, progress and callbacks, report, output.

A call's arguments travel as a namespace `a`, under their names in the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from vml_ldm.adapters.diffusers import (
    SchedulerLevels,
    StableDiffusionPrior,
    check_count,
    check_scheduler,
    scheduler_levels,
)
from vml_ldm.images import to_pil
from vml_ldm.operators import Measurement
from vml_ldm.pipelines._common import Settings
from vml_ldm.report import Report
from vml_ldm.solve import Level, Levels, Metered, Solution, noise_like, record, vml_levels

_VAE_SHARE = 0.5  # of the VAE's round-trip error, in the sigma_y that the solver takes
_LEAST_SIGMA_Y = 1e-3  # a VAE that draws y exactly (nothing known, say) still needs a positive sigma_y


@dataclass
class VMLPipelineOutput(StableDiffusionPipelineOutput):
    """The stock output, and `report` (None unless `return_report=True`)."""

    report: Report | None = None


class Measured(NamedTuple):
    """What the VAE makes of a measurement.

    Attributes:
        measurement: with the sigma_y that the solver takes.
        vae_error: (B,), the VAE's round-trip error as the operator sees it, in units of y.
        latent: (B, c, h, w), of the image that went through the VAE.
    """

    measurement: Measurement
    vae_error: Tensor
    latent: Tensor


class SolvingMixin:
    """The steps of a solve on the components and methods of the Stable Diffusion pipeline that it is mixed into."""

    def _check(self, a: SimpleNamespace, channels: tuple[int, ...]) -> None:
        """Refuse what cannot work before any network runs, and fill in the defaults that depend on the model.

        Args:
            channels: of the UNets that the pipeline can use.
        """
        if isinstance(a.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            a.callback_on_step_end_tensor_inputs = a.callback_on_step_end.tensor_inputs
        a.height = a.height or self.unet.config.sample_size * self.vae_scale_factor
        a.width = a.width or self.unet.config.sample_size * self.vae_scale_factor
        a.num_images_per_prompt = a.num_images_per_prompt or 1
        a.callback, a.callback_steps = getattr(a, "callback", None), getattr(a, "callback_steps", None)
        self.check_inputs(**{name: getattr(a, name) for name in inspect.signature(self.check_inputs).parameters})
        check_scheduler(self.scheduler)
        if self.unet.config.in_channels not in channels:
            raise ValueError(
                f"the UNet takes {self.unet.config.in_channels} channels; expected "
                f"{channels[0]}{''.join(f', or {n} (inpainting)' for n in channels[1:])}."
            )
        self._guidance_scale, self._clip_skip = a.guidance_scale, a.clip_skip
        self._cross_attention_kwargs, self._interrupt = a.cross_attention_kwargs, False

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As the stock pipeline's, with `clip_skip` also where transformers has no level `text_model` any more."""
        with _text_model_reachable(getattr(self, "text_encoder", None)):
            return super().encode_prompt(*args, **kwargs)

    def _plan(self, a: SimpleNamespace, count: int, renoise: float) -> SchedulerLevels:
        """`count` levels of the scheduler's, or those at the caller's `timesteps` or `sigmas`."""
        if a.timesteps is None and a.sigmas is None:
            check_count(self.scheduler, count)
        retrieve_timesteps(self.scheduler, count, self._execution_device, a.timesteps, a.sigmas)
        return scheduler_levels(self.scheduler, self.scheduler.timesteps, renoise)

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
        set_prompt(prior, prompt_embeds)
        return prior

    def _vml(
        self,
        a: SimpleNamespace,
        x_T: Tensor,
        prior: Metered,
        measurement: Measurement,
        levels: Levels,
        chosen: Settings,
    ) -> Iterator[Level]:
        """VML-MAP, level by level."""
        return vml_levels(
            x_T,
            prior=prior,
            measurement=measurement,
            schedule=levels,
            inner_steps=chosen.inner_steps,
            jacobian=chosen.jacobian,
            stop_at=chosen.stop_at,
            generator=a.generator,
        )

    def _follow(
        self, a: SimpleNamespace, solving: Iterator[Level], count: int, timesteps: Tensor, tensors: dict, prior: Metered
    ) -> tuple[Tensor, list[dict]]:
        """The solver's last latent and its trace, with a progress bar, callbacks and interruption.

        An interrupted solve gives its last clean estimate.

        Args:
            solving: the levels as they end.
            count: how many there are.
            tensors: what callbacks may read and change beside the latents.
        """
        trace = []
        with self.progress_bar(total=count) as bar:
            for step, level in enumerate(solving):
                trace.append(record(level))
                t = timesteps[level.index]
                if a.callback_on_step_end is not None:
                    self._call_back(a, step, t, level, tensors, prior.prior)
                bar.update()
                if a.callback is not None and step % (a.callback_steps or 1) == 0:
                    a.callback(step, t, level.x_next)
                if self.interrupt:
                    return level.z0_hat, trace
        return level.x_next, trace

    def _call_back(self, a: SimpleNamespace, step: int, t: Tensor, level: Level, tensors: dict, prior) -> None:
        """Hand the tensors that were asked for to the user's callback, and take back what it changed."""
        given = {"latents": level.x_next, **tensors}
        wanted = {name: given[name] for name in a.callback_on_step_end_tensor_inputs}
        changed = a.callback_on_step_end(self, step, t, wanted) or {}
        level.x_next = changed.get("latents", level.x_next)
        tensors.update({name: changed[name] for name in tensors if name in changed})
        self._condition(prior, tensors)

    def _condition(self, prior: StableDiffusionPrior, tensors: dict) -> None:
        """Give the prior what callbacks may have changed."""
        set_prompt(prior, tensors["prompt_embeds"])

    def _hand_out(self, image: Tensor, output_type: str, dtype: torch.dtype) -> tuple:
        """Images (B, 3, H, W) in [0, 1] after the safety check, in the output type; and its flags."""
        _, flagged = self.run_safety_checker(2 * image - 1, image.device, dtype)
        if flagged is not None:  # flagged images come back black, as stock returns them; the others stay as they are
            image = image * (1 - torch.as_tensor(flagged).to(image).reshape(-1, 1, 1, 1))
        if output_type == "pt":
            return image, flagged
        if output_type == "np":
            return image.cpu().permute(0, 2, 3, 1).numpy(), flagged
        return to_pil(image), flagged

    def _give_back(self, images, flagged, report: Report | None, return_dict: bool) -> VMLPipelineOutput | tuple:
        """The call's result, with a report if there is one, after the networks' hooks are done."""
        self.maybe_free_model_hooks()
        if return_dict:
            return VMLPipelineOutput(images=images, nsfw_content_detected=flagged, report=report)
        return (images, flagged) if report is None else (images, flagged, report)


@contextmanager
def _text_model_reachable(text_encoder: nn.Module | None) -> Iterator[None]:
    """diffusers finds the final layer norm below `text_model`; newer text encoders are that model themselves."""
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        yield
        return
    object.__setattr__(text_encoder, "text_model", text_encoder)  # past nn.Module, which would make it a child
    try:
        yield
    finally:
        object.__delattr__(text_encoder, "text_model")


def set_prompt(prior: StableDiffusionPrior, prompt_embeds: Tensor) -> None:
    """Prompt embeddings as the stock pipeline concatenates them: under guidance the negative ones first."""
    if prior.negative is None:
        prior.condition["encoder_hidden_states"] = prompt_embeds
    else:
        prior.negative["encoder_hidden_states"], prior.condition["encoder_hidden_states"] = prompt_embeds.chunk(2)


def measure(operator, y: Tensor, noise_std: Tensor, image: Tensor, seen: Tensor, prior: Metered) -> Measured:
    """A measurement as the solver takes it, from the VAE's round trip of an image that agrees with y.

    The decoder cannot draw y exactly, so the solver takes ``sqrt(sigma_y^2 + (vae_error / 2)^2)`` for its sigma_y,
    ``vae_error = rms(seen - A(Dec(Enc(image))))``: a latent that was searched for comes closer than one that was
    encoded (half was found on the validation images, for inpainting).

    Args:
        operator: A.
        noise_std: (B,), sigma_y as the caller named it.
        image: (B, 3, H, W) in [0, 1].
        seen: what the round trip should give back, shaped like y: y, or A(image) where the image is not free of noise
            or does not quite agree with y. (A noisy image overstates the error: a VAE does not reproduce noise.)
    """
    latent = prior.encode(image)
    before = Measurement(operator, seen, 1.0)
    vae_error = before.rms(before.residual(prior.decode(latent)))
    effective = (noise_std**2 + (_VAE_SHARE * vae_error) ** 2).sqrt().clamp(min=_LEAST_SIGMA_Y)
    return Measured(Measurement(operator, y, effective), vae_error, latent)


def start_noise(a: SimpleNamespace, like: Tensor) -> Tensor:
    """N(0, I) of a latent's shape, or the caller's `latents`.

    Raises:
        ValueError: `latents` of another shape.
    """
    if a.latents is None:
        return noise_like(like, a.generator)
    if a.latents.shape != like.shape:
        raise ValueError(f"`latents` has shape {tuple(a.latents.shape)}; expected {tuple(like.shape)}.")
    return a.latents.to(like)


def tell(
    solution: Solution,
    measured: Measured,
    noise_std: Tensor,
    prior: StableDiffusionPrior,
    chosen: Settings,
    *,
    levels: int,
    preset: str,
    solver: str = "vml",
) -> Report:
    """The report of a solve."""
    return Report(
        sigma_y=noise_std.tolist(),
        vae_error=measured.vae_error.tolist(),
        effective_sigma_y=measured.measurement.sigma_y.tolist(),
        residual=solution.residual.tolist(),
        levels=levels,
        inner_steps=chosen.inner_steps,
        jacobian=chosen.jacobian,
        preset=preset,
        solver=solver,
        trace=solution.trace,
        retries=dict(prior.retries),
        calls=dict(solution.calls),
        seconds=dict(solution.seconds),
    )
