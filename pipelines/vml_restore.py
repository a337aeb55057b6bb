"""VMLRestorePipeline: an image from any measurement of it, by latent VML-MAP or RED-diff on a text-to-image model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from vml_ldm.pipelines._restoring import RestoringMixin
from vml_ldm.pipelines._solving import SolvingMixin, VMLPipelineOutput
from vml_ldm.proximal import Proximal
from vml_ldm.red import RedDiff
from vml_ldm.solve import Solution


class VMLRestorePipeline(RestoringMixin, SolvingMixin, StableDiffusionPipeline):
    """Restoration of any measurement ``y = A(x0) + n`` with any Stable Diffusion 1.x or 2.x text-to-image checkpoint.

    The decoder is part of the operator. Loading and components are those of `StableDiffusionPipeline`. See
    `SolvingMixin` for `gradient_vae`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
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

        The arguments up to `callback_on_step_end_tensor_inputs` are named as those of `StableDiffusionPipeline`, with
        these differences:

        - `prompt` may be left out: nothing in particular. One prompt serves several y; `num_images_per_prompt` makes so
          many images of each y.
        - `height` and `width` are those of the image, not of y.
        - `num_inference_steps` is the budget of denoiser evaluations, and of corrections by the decoder, which cost
          about as much. VML makes K inner steps and one estimate for the next state at each level, and corrects the
          last estimate: there are ``(budget - corrections) // (K + 1)`` levels, and unless `inner_steps` is given, a
          short budget lowers K before it goes below four of them. RED-diff makes one evaluation at each level.
          `num_timesteps` and callbacks count levels, the progress bar the denoiser's passes. Explicit `timesteps` or
          `sigmas` are the levels and share the budget: K is lowered to what it pays, but not below 1.
        - `guidance_scale` is 1, none: y says the rest. A larger one means what it means in stock: the prior is guided,
          and the solver seeks its mode under y. RED-diff takes none.
        - `latents` is the noise of the start; for RED-diff with start="noise", the start.

        Args:
            y: what was observed, batch first: a tensor (B, ...) as the operator gives it, real or complex; or, for an
                image-shaped y, PIL images (greyscale ones have one channel) or arrays (B, H, W, C), bytes or floats.
            operator: image (B, 3, height, width) float32 in [0, 1] -> y, differentiable: one of `vml_ldm.operators`, or
                any callable.
            sigma_y: standard deviation of the noise in y, >= 0, in units of y; a number or one for each image. None is
                0. VML adds the VAE's own error as the operator sees it, see `report.vae_error`.
            solver: "vml", "red-diff" (`vml_ldm.red_diff`), or a function of your own, called as
                ``solver(x_T, prior=..., measurement=..., schedule=..., generator=...)`` with the start (B, c, h, w), a
                `Prior`, a `Measurement` of the decoded image and a `Schedule` of `num_inference_steps` levels; it
                returns a `vml_ldm.Solution` (`vml_ldm.solve.conclude` makes one). Callbacks and progress are its own.
            start: "noise", or "measurement": an image that agrees with y (`Measurement.guess`: the operator's own
                ``start``, or least squares in pixels), encoded, and for VML noised to the first level, which is the
                noisiest of at most 1. VML alone: "outline", the same noised to one of at most 3. None: "measurement";
                for VML "noise" where the operator may see nothing of some latent of an image of the batch (a hole,
                clipped light), and "outline" where of some not all its colours (a grey picture, which "noise" would
                paint more vividly), see `Measurement.seen`.
            preset: "fast", "balanced" or "best": half, one and two times the budget. Where y leaves half or more of a
                picture or of its colours open, VML takes more levels of half as many inner steps.
            jacobian, inner_steps, renoise, use_gradient_vae: of VML, as for `VMLInpaintPipeline`. None: the preset's.
            correct_steps: of VML, steps that bring the last estimate nearer to y without the denoiser
                (`vml_ldm.proximal.correct`), >= 0; 0 is the plain algorithm. None: a third of the budget, or a sixth
                (at most 8) where the start is not "measurement".
            memory: as for `VMLInpaintPipeline`.
            pixel_step: after the last level, put into the image what the decoder could not draw of y, as far as y's
                noise lets: see `vml_ldm.measuring.settle`. For linear operators; others' images are the decoder's.
            proximal: True or a `vml_ldm.Proximal`: levels of VML end with a proximal step, in pixels for linear
                operators, by the decoder for others. None and False: they do not.
            red: settings of RED-diff; None: the authors'. The indices of an order in it are those of the levels.
            return_report: also return a `vml_ldm.report.Report`.

        Returns:
            `VMLPipelineOutput` (`images`, `nsfw_content_detected`, `report`), or with `return_dict=False` the tuple
            (images, nsfw_content_detected), and the report behind them if asked for. `report.residual` is that of the
            decoder's image, before the step in pixels.

        Raises:
            ValueError, TypeError: an argument that is not as described, or an operator that does not map images of
                this size to y's shape, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        return self._restore(locals())
