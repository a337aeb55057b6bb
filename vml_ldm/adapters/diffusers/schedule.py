"""The noise levels of a diffusers scheduler.

Only the levels come from the scheduler. The way from one to the next is `Levels`' own: multistep and
predictor-corrector schedulers restore states that they stored, and would silently discard what the inner steps did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...solve import Levels

# State = alpha z0 + sigma e, in the scaling that the scheduler's own pipeline keeps its latents in.
_VARIANCE_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_VARIANCE_PRESERVING_BY_SIGMAS = ("DPMSolverMultistepScheduler",)
_VARIANCE_PRESERVING_BY_TIMESTEPS = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")
SCHEDULERS = _VARIANCE_PRESERVING_BY_TIMESTEPS + _VARIANCE_EXPLODING + _VARIANCE_PRESERVING_BY_SIGMAS


def check_scheduler(scheduler) -> None:
    """Raise before any work if the levels of this scheduler cannot be read.

    Raises:
        ValueError: a scheduler that is not served yet, or a prediction type that is not known.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise ValueError(
            f"the scheduler is {name}; expected one of {', '.join(SCHEDULERS)}. For example: "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config). Or, to inpaint, pass solver='none'."
        )
    check_prediction(scheduler)


def check_prediction(scheduler) -> None:
    """Raise ValueError for a prediction type from which no clean estimate is made here."""
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"the scheduler predicts {prediction!r}; expected 'epsilon', 'v_prediction' or 'sample'.")


def scheduler_levels(scheduler, timesteps: Tensor, renoise: float = 1.0) -> Levels:
    """The levels at `timesteps` (L,), in the scheduler's own scaling of its state.

    Args:
        scheduler: after `set_timesteps`.
        timesteps: the scheduler's, or a tail of them (`strength` < 1).
        renoise: see `Levels`.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    if name in _VARIANCE_PRESERVING_BY_TIMESTEPS:
        abar = scheduler.alphas_cumprod.double()[timesteps.long().cpu()]
        scales = torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1)
    else:
        tail = len(scheduler.timesteps) - len(timesteps)
        sigma = scheduler.sigmas.double().cpu()[tail : tail + len(timesteps)]
        alpha = torch.ones_like(sigma)
        if name in _VARIANCE_PRESERVING_BY_SIGMAS:
            alpha = 1 / (sigma**2 + 1).sqrt()
        scales = torch.stack([alpha, alpha * sigma], dim=1)
    return Levels(scales.tolist(), renoise)
