"""VMLInpaintPipeline: the call of diffusers' StableDiffusionInpaintPipeline, solved by latent VML-MAP."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import Tensor

from vml_ldm.pipelines._inpainting import InpaintingMixin
from vml_ldm.pipelines._solving import SolvingMixin, VMLPipelineOutput
from vml_ldm.proximal import Proximal


class VMLInpaintPipeline(InpaintingMixin, SolvingMixin, StableDiffusionInpaintPipeline):
    """Inpainting by latent VML-MAP with any Stable Diffusion 1.x or 2.x checkpoint.

    The known pixels are a measurement ``y = m * x0`` at full resolution, and the decoder is part of the operator: at
    each noise level the latent descends the variational mode-seeking loss (`vml_ldm.objective`), then moves to the
    next level. Loading, components and every argument are those of `StableDiffusionInpaintPipeline`; white is
    repainted. 9-channel inpainting checkpoints are fed mask and masked latents as in the stock pipeline. Every
    scheduler for Stable Diffusion gives its noise levels (`vml_ldm.adapters.diffusers.scheduler_levels`); one of flow
    matching, or without training noise, is refused. See `SolvingMixin` for `gradient_vae`.
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
        use_gradient_vae: bool | str | None = None,
        memory: str | int = "auto",
        close_up: bool = True,
        paste: bool = True,
        proximal: bool | Proximal | None = None,
        return_report: bool = False,
        **kwargs,
    ) -> VMLPipelineOutput | tuple:
        """Repaint the white part of `mask_image`.

        The arguments up to `callback_on_step_end_tensor_inputs` are those of `StableDiffusionInpaintPipeline`, with
        these differences when the solver is on:

        - `mask_image` keeps soft values: a pixel painted p in [0, 1] is measured as ``(1 - p) x0``, so its squared
          residual weighs (1 - p)^2, and the paste mixes ``(1 - p) original + p result``. Stock binarises.
        - `image` and `mask_image` may be one, or one for each prompt; one prompt serves several images.
        - `num_inference_steps` are the scheduler's levels, of which the preset solves some: of 50, "fast" eight,
          "balanced" twelve (eight where nothing is guided), "best" sixteen, and four at least. `num_timesteps` and
          callbacks count those, the progress bar the denoiser's passes, one for both prompts together. Explicit
          `timesteps` or `sigmas` are the levels themselves. Without proximal levels the steps are a budget of denoiser
          evaluations: a level of K inner steps takes K + 1, and unless `inner_steps` is given, the last one 2 K steps
          and a short budget a lower K.
        - `guidance_scale` means what it means in stock, at every value: the prior is guided, and the solver seeks its
          mode under the known pixels (see `vml_ldm.guidance`). Guided levels take no steps through the denoiser.
        - Where a callback changes `mask`, its blocks of pixels are measured and pasted, or painted, from there on.
        - `eta` has no effect, of which a warning tells: `renoise` says how the next state is made.

        Args:
            solver: "vml", or "none" for the stock pipeline, bit for bit; a warning names what it does not look at.
            sigma_y: standard deviation of the noise on the known pixels, >= 0, in units of [0, 1] images; a number or
                one for each image. None is 0, for a clean image that is edited. The solver adds the VAE's own error.
            jacobian: of inner steps. "exact" pulls the gradient back through the UNet; "free" saves that backward pass.
                None: the preset's.
            preset: "fast", "balanced" or "best" (see `vml_ldm.presets`). Guided, and with "fast", no network is asked
                for a gradient. Where nothing is guided, the others' levels of much noise take a step through the
                denoiser, and they end with corrections by the decoder; both need `gradient_vae`.
            inner_steps: K, inner steps a level, >= 0. None: the preset's.
            renoise: in [0, 1], share of fresh noise in the next state; 0 is deterministic. None: the preset's.
            start: "noise", or "measurement": the known pixels with their holes filled smoothly, encoded and noised to
                the first level. At strength < 1 the start is `image`, as it is in the stock pipeline.
            use_gradient_vae: draw with `gradient_vae`, a small decoder of the same latents (an `AutoencoderTiny`; the
                bundled checkpoint has one), at all levels but the last. None: if there is one. "throughout": at the
                last level too, so that the VAE itself only draws the answer: much cheaper, and as true to the known
                pixels as the small decoder is.
            memory: how graphs are kept. "fast": all at once. "low": as little as keeps steps exact; what is larger
                than the VAE's own tile is drawn in such tiles, as after `vae.enable_tiling()`. "auto": the fastest
                way, and, when a GPU's memory runs out, the next one from there on, down to smaller tiles; on a CPU,
                where a process would be killed, the fastest whose predicted peak fits what is free. Or a budget in
                bytes above the networks' weights, a number or "4GiB": the fastest way whose predicted peak fits it.
                What is predicted may come to Jacobian-free steps (if `jacobian` is None). The log says what was
                chosen, and warns where it changes the picture. Levels that draw with `gradient_vae` and those that draw
                with the VAE each get a way of their own. `report.memory` says which; see
                `vml_ldm.adapters.diffusers.memory`, also for what attention slicing and xformers save.
            close_up: where at most half of the picture lies around the hole (32 pixels that are solved for and 32 more
                that are drawn with them, at a stride of 8), draw that part alone at each step, and take the latent
                elsewhere from the encoder (see `vml_ldm.closeup`): the decoder costs as much less. Elsewhere the
                solver's own image is `image`. False draws all, as is done where a callback may change `mask`.
                `report.drawn` says how much was drawn.
            paste: put the known pixels back: where the mask is black the result is bit-identical to `image` (at
                height x width), and beside it the decoder's own error is taken off, so that no seam shows (see
                `vml_ldm.images.seamless`). False returns the solver's own image.
            proximal: levels end by putting the known pixels into the estimate's image (`vml_ldm.proximal`). None: yes,
                unless `inner_steps` or `jacobian` is given, which ask for the plain algorithm. False: the plain
                algorithm, K inner steps at each level. A `Proximal`: which levels consist of it alone, and how.
            return_report: also return a `vml_ldm.report.Report`.

        Returns:
            `VMLPipelineOutput` (`images`, `nsfw_content_detected`, `report`), or with `return_dict=False` the tuple
            (images, nsfw_content_detected), and the report behind them if asked for.

        Raises:
            ValueError, TypeError: an argument that is not as described, before any network runs.
            NonFiniteError: a network gives NaN or infinity in float32 too.
        """
        return self._inpaint(super().__call__, locals())
