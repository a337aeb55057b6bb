"""diffusers as a host: its models as a `Prior`, its schedulers as a `Schedule`."""

from .precision import NonFiniteError
from .prior import StableDiffusionPrior
from .schedule import SchedulerLevels, check_count, check_scheduler, scheduler_levels
from .unconditional import LDMPrior, PixelPrior

__all__ = [
    "LDMPrior",
    "NonFiniteError",
    "PixelPrior",
    "SchedulerLevels",
    "StableDiffusionPrior",
    "check_count",
    "check_scheduler",
    "scheduler_levels",
]
