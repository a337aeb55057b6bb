"""VMLControlNetInpaintPipeline: the call of diffusers' StableDiffusionControlNetInpaintPipeline, solved by VML-MAP."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionControlNetInpaintPipeline
from torch import Tensor

from vml_ldm.adapters.diffusers import COND, SIDE, Control, ControlledPrior, nets_of
from vml_ldm.pipelines._inpainting import InpaintingMixin
from vml_ldm.pipelines._solving import SolvingMixin, VMLPipelineOutput
from vml_ldm.proximal import Proximal

_AS_IT_IS = {"crops_coords": None, "resize_mode": "default"}


class VMLControlNetInpaintPipeline(InpaintingMixin, SolvingMixin, StableDiffusionControlNetInpaintPipeline):
    """Inpainting by latent VML-MAP with a Stable Diffusion 1.x or 2.x checkpoint and one or several ControlNets.

    Loading, components and every argument are those of `StableDiffusionControlNetInpaintPipeline`; white is repainted.
    See `SolvingMixin` for `gradient_vae`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        mask_image=None,
        control_image=None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
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
        controlnet_conditioning_scale: float | list[float] = 0.5,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
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
        """Repaint the white part of `mask_image` by the control image.

        The arguments up to `callback_on_step_end_tensor_inputs` are those of the stock pipeline, the others those of
        `VMLInpaintPipeline`, whose differences from stock hold here too. Beside those, when the solver is on:

        - `control_guidance_start` and `control_guidance_end` are shares of the way from noise to image by the training
          time step of a level, since only some of the steps are solved. (Stock counts steps.)

        Args:
            control_image: as in stock; a list of as many as there are ControlNets, if several.
            solver: "vml", or "none" for the stock pipeline, bit for bit.
            sigma_y: standard deviation of the noise on the known pixels, >= 0, in units of [0, 1] images; None is 0.
            jacobian, preset, inner_steps, renoise, start, use_gradient_vae, memory, close_up, paste, proximal,
                return_report: as for `VMLInpaintPipeline`.

        Returns:
            `VMLPipelineOutput` (`images`, `nsfw_content_detected`, `report`), or with `return_dict=False` the tuple
            (images, nsfw_content_detected), and the report behind them if asked for.

        Raises:
            ValueError, TypeError: an argument that is not as described, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        return self._inpaint(super().__call__, locals())

    def _check_as_stock(self, a: SimpleNamespace) -> None:
        a.timesteps = a.sigmas = a.masked_image_latents = None  # which this stock pipeline does not take
        each = lambda value: value if isinstance(value, list) else [value] * len(nets_of(self.controlnet))  # noqa: E731
        a.control_guidance_start, a.control_guidance_end = map(each, (a.control_guidance_start, a.control_guidance_end))
        given = {name: getattr(a, name, None) for name in inspect.signature(self.check_inputs).parameters}
        self.check_inputs(**given | {"image": a.control_image})
        scale = a.controlnet_conditioning_scale
        scale = each(scale) if len(nets_of(self.controlnet)) > 1 else scale
        guess_mode = a.guess_mode or nets_of(self.controlnet)[0].config.global_pool_conditions
        self._control = Control(self.controlnet, scale, guess_mode, a.control_guidance_start, a.control_guidance_end)

    def _conditions(self, a: SimpleNamespace, batch: int) -> list[dict]:
        conditions, several = super()._conditions(a, batch), len(nets_of(self.controlnet)) > 1
        shared = {"width": a.width, "height": a.height, "batch_size": batch, **getattr(a, "cropped", _AS_IT_IS)}
        shared |= {"num_images_per_prompt": a.num_images_per_prompt, "device": self._execution_device}
        images = [
            self.prepare_control_image(image, **shared, dtype=net.dtype)
            for image, net in zip(
                a.control_image if several else [a.control_image], nets_of(self.controlnet), strict=True
            )
        ]
        for condition in conditions:
            condition[COND] = images if several else images[0]
            silent = self._control.guess_mode and condition is not conditions[-1]
            condition[SIDE] = images[0].new_full((batch,), 0.0 if silent else 1.0)
        return conditions

    @property
    def _prior_class(self) -> Callable[..., ControlledPrior]:
        return partial(ControlledPrior, control=self._control)
