"""Flow matching: transformers that predict a velocity, and the noise levels of their scheduler.

The state is ``x = (1 - s) z0 + s e``, s from 1 to 0, and the network predicts the velocity ``dx/ds = e - z0``
(Esser et al., arXiv:2403.03206). So ``alpha = 1 - s``, ``sigma = s`` and ``z0_hat = x - s velocity``. At s = 1 the
state says nothing of z0: a solver takes the estimate there as it is, without inner steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import NetworkPrior
from .prior import GuidedPrior
from .schedule import SchedulerLevels

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


def check_flow_scheduler(scheduler) -> None:
    """Raise before any work if the levels of this scheduler cannot be read.

    Raises:
        ValueError: a scheduler that is not served, or one whose noise rises.
    """
    name = type(scheduler).__name__
    if name not in FLOW_SCHEDULERS:
        raise ValueError(
            f"the scheduler is {name}; expected one of {', '.join(FLOW_SCHEDULERS)}, as for any flow matching "
            "checkpoint. Or, to inpaint, pass solver='none'."
        )
    if scheduler.config.invert_sigmas:
        raise ValueError("the scheduler has invert_sigmas=True; expected noise that falls from 1 to 0.")


def flow_levels(scheduler, timesteps: Tensor, renoise: float = 1.0) -> SchedulerLevels:
    """The levels at `timesteps` (L,), ``alpha = 1 - sigma``.

    Args:
        scheduler: after `set_timesteps`.
        timesteps: the scheduler's, or a tail of them (`strength` < 1).
        renoise: see `Levels`.
    """
    check_flow_scheduler(scheduler)
    tail = len(scheduler.timesteps) - len(timesteps)
    sigmas = scheduler.sigmas.double().cpu()[tail : tail + len(timesteps)].clamp(max=1)
    return SchedulerLevels([(1 - sigma, sigma) for sigma in sigmas.tolist()], timesteps, renoise)


class FlowPrior(GuidedPrior, NetworkPrior):
    """Transformer, VAE and prompt of a flow matching checkpoint as ``E[z0 | x_t]``. Use it in `with`.

    Args:
        transformer: predicts the velocity, for example `SD3Transformer2DModel`.
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        scheduler: gives `num_train_timesteps`, the time step at which sigma is 1.
        condition: keyword arguments of the transformer's call for the prompt: encoder_hidden_states (B, n, d),
            pooled_projections (B, p), and others.
        negative: the same for the negative prompt; None for no guidance.
        guidance_scale: w of classifier-free guidance; used when `negative` is given.
        guidance_rescale: phi of `vml_ldm.guidance.rescaled`, in [0, 1].
        inpainting: (B, 1 + c, h, w), mask and masked latents of an inpainting checkpoint.

    Attributes:
        retries: how often a network was run once more in float32, by network.
    """

    def __init__(
        self,
        *,
        transformer: nn.Module,
        vae: nn.Module,
        scheduler,
        condition: dict,
        negative: dict | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        inpainting: Tensor | None = None,
    ):
        super().__init__(transformer, "the transformer")
        self.transformer, self._steps = transformer, scheduler.config.num_train_timesteps
        self._hold(vae, condition, negative, guidance_scale, guidance_rescale, inpainting)

    def _denoise(self, x_t: Tensor, alpha: float, sigma: float, condition: dict | None = None) -> Tensor:
        x, s = x_t / (alpha + sigma), sigma / (alpha + sigma)  # on the straight line: a + s = 1
        inputs, condition = self._inputs(x, condition)
        t = torch.full((len(x),), s * self._steps, device=inputs.device)
        velocity = self.transformer(hidden_states=inputs, timestep=t, return_dict=False, **condition)[0]
        return x - s * velocity.to(x)
