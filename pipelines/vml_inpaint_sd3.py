"""VMLInpaintSD3Pipeline: the call of diffusers' StableDiffusion3InpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusion3InpaintPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import (
    calculate_shift,
    retrieve_timesteps,
)
from torch import Tensor

from vml_ldm.adapters.diffusers import FlowPrior, GuidedPrior, SchedulerLevels, check_flow_scheduler, flow_levels
from vml_ldm.pipelines._inpainting import InpaintingMixin
from vml_ldm.pipelines._solving import SolvingMixin, VMLPipelineOutput, sides
from vml_ldm.proximal import Proximal

_POOLED = "pooled_prompt_embeds"


class VMLInpaintSD3Pipeline(InpaintingMixin, SolvingMixin, StableDiffusion3InpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion 3 or 3.5 checkpoint.

    Loading, components and every argument are those of `StableDiffusion3InpaintPipeline`; white is repainted. See
    `SolvingMixin` for `gradient_vae`.
    """

    _denoiser_name, _prior_class = "transformer", FlowPrior
    _check_scheduler = staticmethod(check_flow_scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        image=None,
        mask_image=None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        max_sequence_length: int = 256,
        mu: float | None = None,
        *,
        solver: str = "vml",
        sigma_y: float | list[float] | Tensor | None = None,
        jacobian: str | None = None,
        preset: str = "balanced",
        inner_steps: int | None = None,
        renoise: float | None = None,
        start: str = "noise",
        use_gradient_vae: bool | str | None = None,
        memory: str | int = "auto",
        close_up: bool = True,
        paste: bool = True,
        proximal: bool | Proximal | None = None,
        return_report: bool = False,
    ) -> VMLPipelineOutput | tuple:
        """Repaint the white part of `mask_image`.

        The arguments up to `mu` are those of `StableDiffusion3InpaintPipeline`, the others those of
        `VMLInpaintPipeline`, whose differences from stock hold here too. Beside those, when the solver is on:

        - `strength=1.0` starts from noise alone, and what is painted over has no say in the result. Below 1 the start
          is `image` itself, noised to the first level, as with the stock default 0.6.
        - Where sigma is 1, the first level at `strength=1.0`, the state says nothing of the image: that level takes one
          estimate and no inner steps, and nothing of start="measurement" is left in it.
        - The VAE's shift is added before decoding, as it is taken off after encoding; stock inpainting leaves it out.

        Args:
            solver: "vml", or "none" for the stock pipeline, bit for bit.
            sigma_y: standard deviation of the noise on the known pixels, >= 0, in units of [0, 1] images; None is 0.
            jacobian, preset, inner_steps, renoise, start, use_gradient_vae, memory, paste, proximal, return_report: as
                for `VMLInpaintPipeline`.

        Returns:
            `VMLPipelineOutput` (`images`, `report`), or with `return_dict=False` the tuple (images,), and the report
            behind it if asked for.

        Raises:
            ValueError, TypeError: an argument that is not as described, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        return self._inpaint(super().__call__, locals())

    def _remember(self, a: SimpleNamespace) -> None:
        self._joint_attention_kwargs = a.joint_attention_kwargs

    def _plan(self, a: SimpleNamespace, count: int, renoise: float) -> SchedulerLevels:
        options, config = {} if a.mu is None else {"mu": a.mu}, self.scheduler.config
        if a.mu is None and config.use_dynamic_shifting:
            stride = self.vae_scale_factor * self.patch_size
            limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            options["mu"] = calculate_shift((a.height // stride) * (a.width // stride), *limits)
        retrieve_timesteps(self.scheduler, count, self._execution_device, sigmas=a.sigmas, **options)
        return flow_levels(self.scheduler, self.scheduler.timesteps, renoise)

    def _embed(self, a: SimpleNamespace) -> dict[str, Tensor | None]:
        positive, negative, pooled, negative_pooled = self._encode_prompt(a)
        return {
            "prompt_embeds": self._rows(negative, positive),
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
            _POOLED: self._rows(negative_pooled, pooled),
        }

    def _conditions(self, a: SimpleNamespace, batch: int) -> list[dict]:
        conditions = [
            {"joint_attention_kwargs": dict(a.joint_attention_kwargs or {})}
            for _ in range(1 + self.do_classifier_free_guidance)
        ]
        asked = a.ip_adapter_image is not None and self.is_ip_adapter_active
        if asked or a.ip_adapter_image_embeds is not None:
            embeds = self._ip_adapter_embeds(a, batch)
            for condition, own in zip(conditions, embeds.chunk(len(conditions)), strict=True):
                condition["joint_attention_kwargs"]["ip_adapter_image_embeds"] = own
        return conditions

    def _condition(self, prior: GuidedPrior, tensors: dict) -> None:
        super()._condition(prior, tensors)
        for condition, rows in sides(prior, tensors[_POOLED]):
            condition["pooled_projections"] = rows

    def _masked_latents(self, a: SimpleNamespace, masked: Tensor, prior: GuidedPrior) -> Tensor:
        given, config = a.masked_image_latents, self.vae.config
        if given is not None and given.shape[1] == config.latent_channels:  # stock takes them unscaled
            a.masked_image_latents = (given - (config.shift_factor or 0.0)) * config.scaling_factor
        return super()._masked_latents(a, masked, prior)

    def _screen(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
        return image, None
