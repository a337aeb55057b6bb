"""VMLRestoreXLPipeline: an image from any measurement of it, by latent VML-MAP or RED-diff on an SDXL model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from vml_ldm.pipelines._restoring import RestoringMixin
from vml_ldm.pipelines._solving import VMLPipelineOutput
from vml_ldm.pipelines._xl import XLMixin
from vml_ldm.proximal import Proximal
from vml_ldm.red import RedDiff
from vml_ldm.solve import Solution


class VMLRestoreXLPipeline(RestoringMixin, XLMixin, StableDiffusionXLPipeline):
    """Restoration of any measurement ``y = A(x0) + n`` with any Stable Diffusion XL text-to-image checkpoint.

    Loading and components are those of `StableDiffusionXLPipeline`. See `SolvingMixin` for `gradient_vae`.
    A float16 VAE with `force_upcast` runs in float32, with its gradient.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        *,
        y,
        operator: Callable[[Tensor], Tensor],
        sigma_y: float | list[float] | Tensor | None = None,
        solver: str | Callable[..., Solution] = "vml",
        start: str | None = None,
        preset: str = "balanced",
        jacobian: str | None = None,
        inner_steps: int | None = None,
        correct_steps: int | None = None,
        renoise: float | None = None,
        use_gradient_vae: bool | str | None = None,
        memory: str | int = "auto",
        pixel_step: bool = True,
        red: RedDiff | None = None,
        proximal: bool | Proximal | None = None,
        return_report: bool = False,
    ) -> VMLPipelineOutput | tuple:
        """Find an image that the operator maps to y.

        The arguments up to `callback_on_step_end_tensor_inputs` are named as those of `StableDiffusionXLPipeline`, with
        the differences that `VMLRestorePipeline` has from its stock pipeline. A watermark, if the pipeline has one, is
        laid over the result.

        Args:
            y: what was observed, batch first: a tensor (B, ...) as the operator gives it, real or complex; or images.
            operator: image (B, 3, height, width) float32 in [0, 1] -> y, differentiable.
            sigma_y: standard deviation of the noise in y, >= 0, in units of y; None is 0.
            solver, start, preset, jacobian, inner_steps, correct_steps, renoise, use_gradient_vae, memory, pixel_step,
                red, proximal, return_report: as for `VMLRestorePipeline`.

        Returns:
            `VMLPipelineOutput` (`images`, `report`), or with `return_dict=False` the tuple (images,), and the report
            behind it if asked for.

        Raises:
            ValueError, TypeError: an argument that is not as described, or an operator that does not map images of
                this size to y's shape, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        return self._restore(locals())

    def _time_ids(self, a: SimpleNamespace, projection: int) -> tuple[Tensor, Tensor]:
        def ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
            return self._get_add_time_ids(original, crop, target, torch.float32, projection)

        size = (a.height, a.width)
        own = ids(a.original_size or size, a.crops_coords_top_left, a.target_size or size)
        if a.negative_original_size is None or a.negative_target_size is None:
            return own, own
        return own, ids(a.negative_original_size, a.negative_crops_coords_top_left, a.negative_target_size)
