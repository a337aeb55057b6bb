"""VMLInpaintSD3Pipeline: the call of diffusers' StableDiffusion3InpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusion3InpaintPipeline
from torch import Tensor

from vml_ldm.adapters.diffusers import GuidedPrior
from vml_ldm.pipelines._inpainting import InpaintingMixin
from vml_ldm.pipelines._sd3 import SD3Mixin
from vml_ldm.pipelines._solving import VMLPipelineOutput
from vml_ldm.proximal import Proximal


class VMLInpaintSD3Pipeline(InpaintingMixin, SD3Mixin, StableDiffusion3InpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion 3 or 3.5 checkpoint.

    Loading, components and every argument are those of `StableDiffusion3InpaintPipeline`; white is repainted. See
    `SolvingMixin` for `gradient_vae`.
    """

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

    def _masked_latents(self, a: SimpleNamespace, masked: Tensor, prior: GuidedPrior) -> Tensor:
        given, config = a.masked_image_latents, self.vae.config
        if given is not None and given.shape[1] == config.latent_channels:  # stock takes them unscaled
            a.masked_image_latents = (given - (config.shift_factor or 0.0)) * config.scaling_factor
        return super()._masked_latents(a, masked, prior)
