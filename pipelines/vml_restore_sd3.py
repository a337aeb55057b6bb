"""VMLRestoreSD3Pipeline: an image from any measurement of it, by VML-MAP or RED-diff on a Stable Diffusion 3 model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from vml_ldm.pipelines._restoring import RestoringMixin
from vml_ldm.pipelines._sd3 import SD3Mixin
from vml_ldm.pipelines._solving import VMLPipelineOutput
from vml_ldm.proximal import Proximal
from vml_ldm.red import RedDiff
from vml_ldm.solve import Solution


class VMLRestoreSD3Pipeline(RestoringMixin, SD3Mixin, StableDiffusion3Pipeline):
    """Restoration of any measurement ``y = A(x0) + n`` with any Stable Diffusion 3 or 3.5 checkpoint.

    Loading and components are those of `StableDiffusion3Pipeline`. See `SolvingMixin` for `gradient_vae`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
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

        The arguments up to `mu` are named as those of `StableDiffusion3Pipeline`, with the differences that
        `VMLRestorePipeline` has from its stock pipeline. Skip-layer guidance, which is no estimate of the image, is
        left out.

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
