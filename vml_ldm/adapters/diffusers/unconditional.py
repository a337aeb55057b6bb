"""diffusers' unconditional models as a `Prior`: of pixels (`DDPMPipeline`, `DDIMPipeline`) or latents (`LDMPipeline`).

Both take what the pipeline holds; `scheduler_levels` gives the noise levels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...pixels import PixelSpace
from .network import Autoencoded
from .unet import UNetPrior


class PixelPrior(PixelSpace, UNetPrior):
    """A `UNet2DModel` of images: z0 is the image itself, in the model's [-1, 1]. Use it in `with`.

    Encoder and decoder map between [0, 1] and [-1, 1] and run no network. The clean estimate is not clipped, whatever
    the scheduler's `clip_sample` says: a clipped one is no posterior mean and has no gradient where it was clipped.

    Args:
        unet: `UNet2DModel` on images in [-1, 1]; a variance that it predicts beside the mean is left out.
        scheduler: gives `alphas_cumprod` and the prediction type (epsilon, v_prediction, sample).
    """


class LDMPrior(Autoencoded, UNetPrior):
    """The parts of a diffusers `LDMPipeline`: a `UNet2DModel` on the latents of a `VQModel`. Use it in `with`.

    The latent is the one before quantisation, ``z = scaling_factor * Enc(2 x - 1)``, and the decoder takes it as it
    is: quantising has no gradient, and what the UNet was trained on is not quantised.

    Args:
        unet: `UNet2DModel` on latents.
        vqvae: `VQModel`; its configuration holds `scaling_factor`.
        scheduler: gives `alphas_cumprod` and the prediction type (epsilon, v_prediction, sample).
    """

    def __init__(self, *, unet: nn.Module, vqvae: nn.Module, scheduler):
        super().__init__(unet=unet, scheduler=scheduler)
        self.vae = vqvae

    def _encode(self, image: Tensor, vae: nn.Module) -> Tensor:
        latent = vae.encode(self._guard.place(vae, 2 * image - 1), return_dict=False)[0]
        return latent.to(image) * vae.config.scaling_factor

    def _decode(self, z: Tensor, vae: nn.Module) -> Tensor:
        latent = self._guard.place(vae, z / vae.config.scaling_factor)
        return vae.decode(latent, force_not_quantize=True, return_dict=False)[0].to(z) / 2 + 0.5
