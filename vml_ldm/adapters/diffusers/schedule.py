"""The noise levels of a diffusers scheduler.

Only the levels come from the scheduler. The way from one to the next is `Levels`' own: multistep and
predictor-corrector schedulers restore states that they stored, and would silently discard what the inner steps did.

They are read off what a scheduler does, not off its name. Its UNet sees ``c x_t = a z0 + b e`` with a^2 + b^2 = 1 and
``c = scale_model_input(1)``, and ``b / a`` is its `sigmas` at that place, or that of `alphas_cumprod` at the time step
where it has none. So ``alpha = a / c``, ``sigma = b / c``: variance exploding (alpha = 1) where c = a, variance
preserving where c = 1. Stages of second-order and Runge-Kutta methods are no levels and are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ...solve import Levels

_HINT = "For example: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config). Or, to inpaint, solver='none'."


class SchedulerLevels(Levels):
    """The levels of a scheduler.

    Attributes:
        timesteps: (L,), the scheduler's own time steps at them, as callbacks see them.
    """

    def __init__(self, scales, timesteps: Tensor, renoise: float = 1.0):
        super().__init__(scales, renoise)
        self.timesteps = timesteps

    def last(self, count: int) -> SchedulerLevels:
        """The `count` least noisy levels, 1 <= count <= L."""
        return self.at(range(len(self) - count, len(self)))

    def at(self, places: Sequence[int]) -> SchedulerLevels:
        """The levels at these places, rising."""
        return SchedulerLevels([self.scales(i) for i in places], self.timesteps[list(places)], self.renoise)


def check_scheduler(scheduler) -> None:
    """Raise before any work if the levels of this scheduler cannot be read.

    Raises:
        ValueError: a scheduler of flow matching, one without the training noise `alphas_cumprod`, or a prediction type
            that is not known.
    """
    name = type(scheduler).__name__
    flow = (
        f"the scheduler is {name}, of flow matching, whose states are (1 - sigma) z0 + sigma e; expected one of a "
        f"Stable Diffusion 1.x or 2.x UNet. {_HINT}"
    )
    if not hasattr(scheduler, "scale_model_input"):
        raise ValueError(flow)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(
            f"the scheduler is {name}, which has no alphas_cumprod; expected one with the noise that a Stable "
            f"Diffusion UNet was trained on, by which its time steps are found. {_HINT}"
        )
    check_prediction(scheduler)
    if getattr(scheduler.config, "use_flow_sigmas", False):
        raise ValueError(flow)


def check_prediction(scheduler) -> None:
    """Raise ValueError for a prediction type from which no clean estimate is made here."""
    prediction = getattr(scheduler.config, "prediction_type", None)
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"the scheduler predicts {prediction!r}; expected 'epsilon', 'v_prediction' or 'sample'.")


def check_count(scheduler, count: int) -> None:
    """Raise ValueError where `set_timesteps` would fail on so few levels: Runge-Kutta stages need four."""
    if not getattr(scheduler.config, "skip_prk_steps", True) and count < 4:
        raise ValueError(
            f"{type(scheduler).__name__} has skip_prk_steps=False and is asked for {count} levels; expected 4 at "
            "least. Raise num_inference_steps, or make the scheduler with skip_prk_steps=True."
        )


def scheduler_levels(scheduler, timesteps: Tensor, renoise: float = 1.0) -> SchedulerLevels:
    """The levels at `timesteps`, in the scheduler's own scaling of its state.

    Args:
        scheduler: after `set_timesteps`.
        timesteps: the scheduler's, or a tail of them.
        renoise: see `Levels`.

    Raises:
        ValueError: a scheduler that is not served (`check_scheduler`), whose levels do not fall, or whose first level
            has no signal (alpha = 0) while the UNet predicts the noise.
    """
    check_scheduler(scheduler)
    places = torch.arange(len(scheduler.timesteps) - len(timesteps), len(scheduler.timesteps))
    places = places[_is_level(scheduler)[places]]
    scales = _scales(scheduler, places)
    noise = scales[:, 1] / scales[:, 0]
    last_of_equals = torch.cat([noise[:-1] != noise[1:], torch.ones(1, dtype=torch.bool)])
    places, scales = places[last_of_equals], scales[last_of_equals]
    if (scales[:, 0] == 0).any() and scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            f"{type(scheduler).__name__} begins at a level without signal (alpha = 0) and predicts 'epsilon', which "
            "says nothing there; expected 'v_prediction' or 'sample' with zero terminal SNR. Check the scheduler's "
            "prediction_type and rescale_betas_zero_snr."
        )
    return SchedulerLevels(scales.tolist(), scheduler.timesteps[places.to(scheduler.timesteps.device)], renoise)


def _is_level(scheduler) -> Tensor:
    """Which of the scheduler's time steps are levels, not the two midpoints within a Runge-Kutta step's four stages."""
    place = torch.arange(len(scheduler.timesteps))
    midpoint = (place % 4 == 1) | (place % 4 == 2)
    return ~(midpoint & (place < len(getattr(scheduler, "prk_timesteps", ()))))


def _scales(scheduler, places: Tensor) -> Tensor:
    """(alpha, sigma) at these places of the scheduler's time steps, (L, 2) float64."""
    if getattr(scheduler, "sigmas", None) is None:
        abar = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.cpu().long()[places]]
        return torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1)
    sigma = scheduler.sigmas.double().cpu()[places]
    a = 1 / (sigma**2 + 1).sqrt()
    one = torch.ones(1)
    scaled = copy.copy(scheduler).scale_model_input(one, scheduler.timesteps[0])  # a copy: it counts its calls
    alpha = a if torch.equal(scaled, one) else torch.ones_like(a)
    return torch.stack([alpha, alpha * sigma], dim=1)
