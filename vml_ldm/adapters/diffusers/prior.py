"""A Stable Diffusion 1.x or 2.x checkpoint as a `Prior`.

The state is float32; the networks run in their own precision, and every cast between the two is here. Values are
checked where they arise: a half-precision network that gives NaN or infinity is run once more in float32.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...objective import PullBack, pullback

_HALF = (torch.float16, torch.bfloat16)


class NonFiniteError(FloatingPointError):
    """A network gave NaN or infinity, in float32 too."""


class StableDiffusionPrior:
    """UNet, VAE and prompt as ``E[z0 | x_t]``, encoder and decoder. Guidance and prompt live inside. Use it in `with`.

    With guidance (classifier-free, scale w > 1) the estimate is ``D(x_t; "") + w (D(x_t; prompt) - D(x_t; ""))``. That
    is no posterior mean, so the loss is then no exact KL: a practical extension.

    Args:
        unet: `UNet2DConditionModel` with 4 input channels, or 9 (then `unet_channels` is appended).
        vae: `AutoencoderKL`.
        scheduler: gives `alphas_cumprod` and the prediction type (epsilon, v_prediction, sample).
        prompt_embeds: (B, n, d), or (2B, n, d) with guidance: negative first, as the pipelines concatenate them.
        guidance_scale: w; None for no guidance.
        unet_channels: (B or 2B, 5, h, w), mask and masked latents of an inpainting checkpoint.
        unet_arguments: further keyword arguments of the UNet's call.

    Attributes:
        retries: how often a network was run once more in float32.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: nn.Module,
        scheduler,
        prompt_embeds: Tensor,
        guidance_scale: float | None = None,
        unet_channels: Tensor | None = None,
        unet_arguments: dict | None = None,
    ):
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self.prompt_embeds, self.guidance_scale = prompt_embeds, guidance_scale
        self.unet_channels, self.unet_arguments = unet_channels, unet_arguments or {}
        self.prediction_type = scheduler.config.prediction_type
        abar = scheduler.alphas_cumprod.double().cpu()
        self._angles = torch.atan2((1 - abar).sqrt(), abar.sqrt()).numpy()
        self._upcast: dict[nn.Module, torch.dtype] = {}
        self.retries = Counter()

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return self._guarded("the UNet", self.unet, lambda: self._denoise(x_t, alpha, sigma))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled and shifted as the UNet expects it, float32."""
        return self._guarded("the VAE encoder", self.vae, lambda: self._encode(image))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._guarded("the VAE decoder", self.vae, lambda: self._decode(z))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``."""
        return self._pullback("the UNet", self.unet, lambda x: self._denoise(x, alpha, sigma), x_t)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._pullback("the VAE decoder", self.vae, self._decode, z)

    def timestep(self, alpha: float, sigma: float) -> float:
        """The training time step at which ``sigma / alpha`` was seen, between whole steps by interpolation."""
        t = float(np.interp(math.atan2(sigma, alpha), self._angles, np.arange(len(self._angles))))
        return round(t) if abs(t - round(t)) < 1e-3 else t

    def __enter__(self) -> StableDiffusionPrior:
        """Freeze the weights, so that graphs keep what the latent's gradient needs and no more."""
        parameters = [*self.unet.parameters(), *self.vae.parameters()]
        self._thawed = [p for p in parameters if p.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *error) -> None:
        """Leave the networks as they came: their gradients' flags, and their precision if it was lifted."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        for network, dtype in self._upcast.items():
            network.to(dtype)
        self._upcast.clear()

    def _denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        scale = math.hypot(alpha, sigma)
        x, a, s = x_t / scale, alpha / scale, sigma / scale  # variance preserving: a^2 + s^2 = 1
        out = self._predict(x, self.timestep(alpha, sigma))
        if self.prediction_type == "epsilon":
            return (x - s * out) / a
        return a * x - s * out if self.prediction_type == "v_prediction" else out

    def _predict(self, x: Tensor, t: float) -> Tensor:
        """The UNet's output after guidance, float32."""
        inputs = x if self.guidance_scale is None else torch.cat([x, x])
        if self.unet_channels is not None:
            inputs = torch.cat([inputs, self.unet_channels.to(inputs)], dim=1)
        dtype = self._dtype(self.unet)
        out = self.unet(
            inputs.to(dtype),
            torch.as_tensor(t, device=x.device),
            encoder_hidden_states=self.prompt_embeds.to(dtype),
            return_dict=False,
            **self.unet_arguments,
        )[0].to(x.dtype)
        if self.guidance_scale is None:
            return out
        unconditional, conditional = out.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _encode(self, image: Tensor) -> Tensor:
        moments = self.vae.encode((2 * image - 1).to(self._dtype(self.vae)))
        return (moments.latent_dist.mode().to(image.dtype) - self._shift) * self.vae.config.scaling_factor

    def _decode(self, z: Tensor) -> Tensor:
        latent = z / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(latent.to(self._dtype(self.vae)), return_dict=False)[0].to(z.dtype) / 2 + 0.5

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def _dtype(self, network: nn.Module) -> torch.dtype:
        return torch.float32 if network in self._upcast else network.dtype

    def _guarded(self, name: str, network: nn.Module, run: Callable[[], Tensor]) -> Tensor:
        """run(), once more in float32 if it is not finite."""
        value = run()
        if _finite(value):
            return value
        self._lift(name, network)
        value = run()
        if not _finite(value):
            raise NonFiniteError(_message(name))
        return value

    def _pullback(self, name: str, network: nn.Module, function: Callable, x: Tensor) -> tuple[Tensor, PullBack]:
        """`pullback` with checked values; in half precision the cotangent is scaled to unit size, image by image."""
        value, pull = pullback(function, x)
        if not _finite(value):
            self._lift(name, network)
            value, pull = pullback(function, x)
            if not _finite(value):
                raise NonFiniteError(_message(name))

        def checked(cotangent: Tensor) -> Tensor:
            scale = cotangent.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(cotangent.dtype).tiny)
            result = pull(cotangent / scale) * scale
            if _finite(result):
                return result
            self._lift(f"the backward pass of {name}", network)
            result = pullback(function, x)[1](cotangent / scale) * scale
            if not _finite(result):
                raise NonFiniteError(_message(f"the backward pass of {name}"))
            return result

        return value, checked

    def _lift(self, name: str, network: nn.Module) -> None:
        """Move a half-precision network to float32 for the rest of the call, with a warning; otherwise raise."""
        if self._dtype(network) not in _HALF:
            raise NonFiniteError(_message(name))
        warnings.warn(f"{name} gave non-finite values in {network.dtype}; it goes on in float32.", stacklevel=2)
        self._upcast[network] = network.dtype
        self.retries[name] += 1
        network.to(torch.float32)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _message(name: str) -> str:
    return (
        f"{name} gave NaN or infinity in float32; expected finite values. Check the weights, the image and the prompt "
        "embeddings, or take a smaller guidance_scale."
    )
