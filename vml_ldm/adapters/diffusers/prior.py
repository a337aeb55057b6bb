"""A Stable Diffusion 1.x or 2.x checkpoint as a `Prior`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .precision import move
from .unet import LatentPrior

GUIDANCE_REACH = 0.1  # chosen on the validation images


class StableDiffusionPrior(LatentPrior):
    """UNet, VAE and prompt as ``E[z0 | x_t]``, encoder and decoder. Use it in `with`.

    The estimate is conditioned on the prompt alone, so that it is a posterior mean, as the loss needs. Guidance (a
    scale w > 1) is no posterior mean; it enters where the next state is made, see `guide`.

    Args:
        unet: `UNet2DConditionModel` with 4 input channels, or 9 (then `inpainting` is appended).
        vae: `AutoencoderKL`.
        scheduler: gives `alphas_cumprod` and the prediction type (epsilon, v_prediction, sample).
        condition: keyword arguments of the UNet's call for the prompt: encoder_hidden_states (B, n, d), and others.
        negative: the same for the negative prompt; None for no guidance.
        guidance_scale: w of classifier-free guidance; used when `negative` is given.
        inpainting: (B, 5, h, w), mask and masked latents of a 9-channel checkpoint.

    Attributes:
        guide: None without guidance.
        retries: how often a network was run once more in float32, by network.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: nn.Module,
        scheduler,
        condition: dict,
        negative: dict | None = None,
        guidance_scale: float = 1.0,
        inpainting: Tensor | None = None,
    ):
        super().__init__(unet=unet, vae=vae, scheduler=scheduler)
        self.condition, self.negative, self.guidance_scale = condition, negative, guidance_scale
        self.inpainting = inpainting
        self.guide = None if negative is None else self._guide

    def _guide(self, x_t: Tensor, z0_hat: Tensor, alpha: float, sigma: float) -> Tensor:
        """``z0_hat + p``, ``p = (w - 1) (z0_hat - D(x_t; negative))``, with rms(p) held to what x_t leaves open.

        Latents have unit variance, so at noise sigma / alpha a Gaussian would leave z0 the standard deviation
        ``s = sigma / hypot(alpha, sigma)``; the push is shortened, image by image, to an rms of `GUIDANCE_REACH` s.
        """
        run = lambda: self._denoise(x_t, alpha, sigma, self.negative)  # noqa: E731
        push = (self.guidance_scale - 1) * (z0_hat - self._guard.run("the UNet", self.unet, run))
        reach = GUIDANCE_REACH * sigma / math.hypot(alpha, sigma)
        rms = push.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return z0_hat + push * (reach / rms.clamp(min=reach))

    def _predict(self, x: Tensor, t: float, condition: dict | None = None) -> Tensor:
        """The UNet's output for a condition (None: the prompt), float32."""
        condition = self.condition if condition is None else condition
        inputs = x if self.inpainting is None else torch.cat([x, self.inpainting.to(x)], dim=1)
        placed = self._guard.place(self.unet, inputs)
        text = condition["encoder_hidden_states"].to(placed)
        condition = move({**condition, "encoder_hidden_states": text}, placed.device)
        out = self.unet(placed, torch.as_tensor(t, device=placed.device), return_dict=False, **condition)
        return out[0].to(x)

    def _encode(self, image: Tensor) -> Tensor:
        moments = self.vae.encode(self._guard.place(self.vae, 2 * image - 1))
        return (moments.latent_dist.mode().to(image) - self._shift) * self.vae.config.scaling_factor

    def _decode(self, z: Tensor) -> Tensor:
        latent = z / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(self._guard.place(self.vae, latent), return_dict=False)[0].to(z) / 2 + 0.5

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0
