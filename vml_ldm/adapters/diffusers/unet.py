"""What every prior on a diffusers UNet shares: its time, its prediction, its precision; and what latent ones add."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from ...objective import PullBack
from .precision import Guard
from .schedule import check_prediction


class UNetPrior:
    """A UNet and its training noise as ``E[z0 | x_t]``; a subclass adds encoder and decoder. Use it in `with`.

    The state is float32; the networks run in their own precision, and every cast between the two is in these classes.

    Args:
        unet: predicts epsilon, v or the sample from a variance-preserving state and its training time step.
        scheduler: gives `alphas_cumprod` and the prediction type.

    Raises:
        ValueError: another prediction type, or a UNet whose time is not the training time step.
    """

    def __init__(self, *, unet: nn.Module, scheduler):
        check_prediction(scheduler)
        _check_time(unet)
        self.unet, self.scheduler = unet, scheduler
        self.prediction_type = scheduler.config.prediction_type
        abar = scheduler.alphas_cumprod.double().cpu()
        self._angles = torch.atan2((1 - abar).sqrt(), abar.sqrt()).numpy()
        self._guard = Guard()

    @property
    def retries(self) -> Counter:
        """How often a network was run once more in float32, by network."""
        return self._guard.retries

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return self._guard.run("the UNet", self.unet, lambda: self._denoise(x_t, alpha, sigma))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``."""
        return self._guard.pullback("the UNet", self.unet, lambda x: self._denoise(x, alpha, sigma), x_t)

    def timestep(self, alpha: float, sigma: float) -> float:
        """The training time step at which ``sigma / alpha`` was seen, between whole steps by interpolation."""
        t = float(np.interp(math.atan2(sigma, alpha), self._angles, np.arange(len(self._angles))))
        return round(t) if abs(t - round(t)) < 1e-3 else t

    def __enter__(self):
        """Freeze the weights, so that graphs keep what the latent's gradient needs and no more."""
        self._guard.freeze(*self._networks())
        return self

    def __exit__(self, *error) -> None:
        """Leave the networks as they came: their gradients' flags, and their precision if it was lifted."""
        self._guard.restore()

    def _networks(self) -> tuple[nn.Module, ...]:
        return (self.unet,)

    def _denoise(self, x_t: Tensor, alpha: float, sigma: float, *condition) -> Tensor:
        scale = math.hypot(alpha, sigma)
        x, a, s = x_t / scale, alpha / scale, sigma / scale  # variance preserving: a^2 + s^2 = 1
        out = self._predict(x, self.timestep(alpha, sigma), *condition)
        if self.prediction_type == "epsilon":
            return (x - s * out) / a
        return a * x - s * out if self.prediction_type == "v_prediction" else out

    def _predict(self, x: Tensor, t: float) -> Tensor:
        """The output of an unconditional UNet, float32, without the variance that some predict beside the mean."""
        placed = self._guard.place(self.unet, x)
        out = self.unet(placed, torch.as_tensor(t, device=placed.device), return_dict=False)
        return out[0][:, : x.shape[1]].to(x)


class LatentPrior(UNetPrior):
    """A `UNetPrior` whose z0 is an autoencoder's latent. A subclass gives `_encode` and `_decode`.

    Args:
        vae: the autoencoder, with `scaling_factor` in its configuration.
    """

    def __init__(self, *, unet: nn.Module, vae: nn.Module, scheduler):
        super().__init__(unet=unet, scheduler=scheduler)
        self.vae = vae

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled and shifted as the UNet expects it, float32."""
        return self._guard.run("the VAE encoder", self.vae, lambda: self._encode(image))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._guard.run("the VAE decoder", self.vae, lambda: self._decode(z))

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._guard.pullback("the VAE decoder", self.vae, self._decode, z)

    def _networks(self) -> tuple[nn.Module, ...]:
        return self.unet, self.vae


def _check_time(unet: nn.Module) -> None:
    kind = getattr(unet.config, "time_embedding_type", "positional")
    if kind != "positional":
        raise ValueError(
            f"the UNet's time_embedding_type is {kind!r}; expected 'positional', of the training time step. "
            "Wrap the network in a function denoise(x, sigma) and use vml_ldm.CallablePrior."
        )
