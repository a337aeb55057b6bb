"""Stable Diffusion with a ControlNet as a `Prior`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .precision import cast
from .prior import StableDiffusionPrior

COND, SIDE = "controlnet_cond", "controlnet_side"  # in a condition: control images, and how much each row listens


class Control(NamedTuple):
    """How a ControlNet acts.

    Attributes:
        network: `ControlNetModel`, or a `MultiControlNetModel` of several.
        scale: of its residuals; of several a list.
        guess_mode: its residuals grow with the depth of the block.
        start, end: a list for each network, shares of the way from noise to image between which it acts.
    """

    network: nn.Module
    scale: float | list[float]
    guess_mode: bool
    start: list[float]
    end: list[float]

    def at(self, place: float) -> float | list[float]:
        """The scale at a share of the way from noise (0) to image (1)."""
        acts = [start <= place and (place < end or end >= 1) for start, end in zip(self.start, self.end, strict=True)]
        if isinstance(self.scale, list):
            return [scale * act for scale, act in zip(self.scale, acts, strict=True)]
        return self.scale * acts[0]


class ControlledPrior(StableDiffusionPrior):
    """A `StableDiffusionPrior` whose UNet is given a ControlNet's residuals.

    Its conditions also hold ``controlnet_cond``, control images (B, 3, H, W) in [0, 1], or a list of them, and
    ``controlnet_side`` (B,): 1 where a row listens to the ControlNet, 0 where not.

    Args:
        control: the ControlNet, and how it acts.
        others: of a `StableDiffusionPrior`.
    """

    def __init__(self, *, control: Control, **others):
        super().__init__(**others)
        self.control, self.controlnet = control, control.network

    def _networks(self) -> tuple[nn.Module, ...]:
        return *super()._networks(), *nets_of(self.controlnet)

    def _predict(self, x: Tensor, t: float, condition: dict | None = None) -> Tensor:
        """The UNet's output for a condition (None: the prompt), float32."""
        given = self.condition if condition is None else condition
        own = {name: value for name, value in given.items() if name not in (COND, SIDE)}
        return super()._predict(x, t, own | self._residuals(x, t, given) if COND in given else own)

    def _residuals(self, x: Tensor, t: float, condition: dict) -> dict:
        """What the ControlNet adds to the UNet's blocks, as the UNet's call takes it."""
        placed = self._guard.place(nets_of(self.controlnet)[0], x)
        words, images = (cast(condition[name], placed) for name in ("encoder_hidden_states", COND))
        scale = self.control.at(1 - (t + 1) / len(self.scheduler.alphas_cumprod))
        down, middle = self.controlnet(
            placed, torch.as_tensor(t, device=placed.device), encoder_hidden_states=words, controlnet_cond=images,
            conditioning_scale=scale, guess_mode=self.control.guess_mode, return_dict=False,
        )  # fmt: skip
        side = condition[SIDE].reshape(-1, 1, 1, 1).to(middle)
        return {
            "down_block_additional_residuals": [residual * side for residual in down],
            "mid_block_additional_residual": middle * side,
        }


def nets_of(controlnet: nn.Module) -> list[nn.Module]:
    """The ControlNets of one or of several, compiled or not."""
    network = getattr(controlnet, "_orig_mod", controlnet)
    return list(getattr(network, "nets", [network]))
