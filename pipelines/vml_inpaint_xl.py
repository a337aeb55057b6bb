"""VMLInpaintXLPipeline: the call of diffusers' StableDiffusionXLInpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionXLInpaintPipeline
from torch import Tensor

from vml_ldm.pipelines._inpainting import InpaintingMixin
from vml_ldm.pipelines._solving import VMLPipelineOutput
from vml_ldm.pipelines._xl import XLMixin
from vml_ldm.proximal import Proximal


class VMLInpaintXLPipeline(InpaintingMixin, XLMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion XL checkpoint: base, refiner, few-step or inpainting.

    Loading, components and every argument are those of `StableDiffusionXLInpaintPipeline`; white is repainted. See
    `SolvingMixin` for `gradient_vae`. A float16 VAE with `force_upcast` runs in float32, with its gradient.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image=None,
        mask_image=None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
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
        use_gradient_vae: bool | str | None = None,
        memory: str | int = "auto",
        close_up: bool = True,
        paste: bool = True,
        proximal: bool | Proximal | None = None,
        return_report: bool = False,
        **kwargs,
    ) -> VMLPipelineOutput | tuple:
        """Repaint the white part of `mask_image`.

        The arguments up to `callback_on_step_end_tensor_inputs` are those of `StableDiffusionXLInpaintPipeline`, the
        others those of `VMLInpaintPipeline`, whose differences from stock hold here too. Beside those, when the solver
        is on:

        - `strength=1.0` starts from noise alone, and what is painted over has no say in the result. Below 1 the start
          is `image` itself, noised to the first level. The stock default 0.9999 keeps every level and so starts from
          `image` at the most noise, where traces of what is painted over are left; `start` has no effect then.
        - `denoising_start` and `denoising_end` are refused: a base and a refiner do not share a solve.
        - `guidance_rescale` acts as in stock, on the noise that the guided estimate leaves (`guidance.rescaled`).
        - A watermark (stock has one if the package invisible-watermark is installed) is laid over the whole image, the
          known pixels too. Load with `add_watermarker=False` to keep them bit-identical.

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

    def _time_ids(self, a: SimpleNamespace, projection: int) -> tuple[Tensor, Tensor]:
        original, target = (size or (a.height, a.width) for size in (a.original_size, a.target_size))
        return self._get_add_time_ids(
            original,
            a.crops_coords_top_left,
            target,
            a.aesthetic_score,
            a.negative_aesthetic_score,
            a.negative_original_size or original,
            a.negative_crops_coords_top_left,
            a.negative_target_size or target,
            dtype=torch.float32,
            text_encoder_projection_dim=projection,
        )
