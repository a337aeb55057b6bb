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
GUIDANCE_REACH = 0.1  # chosen on the validation images


class NonFiniteError(FloatingPointError):
    """A network gave NaN or infinity, in float32 too."""


class StableDiffusionPrior:
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
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self.condition, self.negative, self.guidance_scale = condition, negative, guidance_scale
        self.inpainting = inpainting
        self.guide = None if negative is None else self._guide
        self.prediction_type = scheduler.config.prediction_type
        abar = scheduler.alphas_cumprod.double().cpu()
        self._angles = torch.atan2((1 - abar).sqrt(), abar.sqrt()).numpy()
        self._upcast: dict[nn.Module, torch.dtype] = {}
        self.retries = Counter()

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return self._guarded("the UNet", self.unet, lambda: self._denoise(x_t, alpha, sigma, self.condition))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled and shifted as the UNet expects it, float32."""
        return self._guarded("the VAE encoder", self.vae, lambda: self._encode(image))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._guarded("the VAE decoder", self.vae, lambda: self._decode(z))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``."""
        return self._pullback("the UNet", self.unet, lambda x: self._denoise(x, alpha, sigma, self.condition), x_t)

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

    def _guide(self, x_t: Tensor, z0_hat: Tensor, alpha: float, sigma: float) -> Tensor:
        """``z0_hat + p``, ``p = (w - 1) (z0_hat - D(x_t; negative))``, with rms(p) held to what x_t leaves open.

        Latents have unit variance, so at noise sigma / alpha a Gaussian would leave z0 the standard deviation
        ``s = sigma / hypot(alpha, sigma)``; the push is shortened, image by image, to an rms of `GUIDANCE_REACH` s.
        """
        run = lambda: self._denoise(x_t, alpha, sigma, self.negative)  # noqa: E731
        push = (self.guidance_scale - 1) * (z0_hat - self._guarded("the UNet", self.unet, run))
        reach = GUIDANCE_REACH * sigma / math.hypot(alpha, sigma)
        rms = push.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return z0_hat + push * (reach / rms.clamp(min=reach))

    def _denoise(self, x_t: Tensor, alpha: float, sigma: float, condition: dict) -> Tensor:
        scale = math.hypot(alpha, sigma)
        x, a, s = x_t / scale, alpha / scale, sigma / scale  # variance preserving: a^2 + s^2 = 1
        out = self._predict(x, self.timestep(alpha, sigma), condition)
        if self.prediction_type == "epsilon":
            return (x - s * out) / a
        return a * x - s * out if self.prediction_type == "v_prediction" else out

    def _predict(self, x: Tensor, t: float, condition: dict) -> Tensor:
        """The UNet's output, float32."""
        inputs = x if self.inpainting is None else torch.cat([x, self.inpainting.to(x)], dim=1)
        dtype = self._dtype(self.unet)
        condition = {**condition, "encoder_hidden_states": condition["encoder_hidden_states"].to(dtype)}
        out = self.unet(inputs.to(dtype), torch.as_tensor(t, device=x.device), return_dict=False, **condition)
        return out[0].to(x.dtype)

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
