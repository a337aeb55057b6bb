"""What every prior on a diffusers UNet shares: its time and its prediction."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .network import NetworkPrior
from .schedule import check_prediction


class UNetPrior(NetworkPrior):
    """A UNet and its training noise as ``E[z0 | x_t]``; a subclass adds encoder and decoder. Use it in `with`.

    Args:
        unet: predicts epsilon, v or the sample from a variance-preserving state and its training time step.
        scheduler: gives `alphas_cumprod` and the prediction type.

    Raises:
        ValueError: another prediction type, or a UNet whose time is not the training time step.
    """

    def __init__(self, *, unet: nn.Module, scheduler):
        check_prediction(scheduler)
        _check_time(unet)
        super().__init__(unet, "the UNet")
        self.unet, self.scheduler = unet, scheduler
        self.prediction_type = scheduler.config.prediction_type
        abar = scheduler.alphas_cumprod.double().cpu()
        self._angles = torch.atan2((1 - abar).sqrt(), abar.sqrt()).numpy()

    def timestep(self, alpha: float, sigma: float) -> float:
        """The training time step at which ``sigma / alpha`` was seen, between whole steps by interpolation."""
        t = float(np.interp(math.atan2(sigma, alpha), self._angles, np.arange(len(self._angles))))
        return round(t) if abs(t - round(t)) < 1e-3 else t

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


def _check_time(unet: nn.Module) -> None:
    kind = getattr(unet.config, "time_embedding_type", "positional")
    if kind != "positional":
        raise ValueError(
            f"the UNet's time_embedding_type is {kind!r}; expected 'positional', of the training time step. "
            "Wrap the network in a function denoise(x, sigma) and use vml_ldm.CallablePrior."
        )
