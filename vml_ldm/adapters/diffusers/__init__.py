"""diffusers as a host: its models as a `Prior`, its schedulers as a `Schedule`."""

from .precision import NonFiniteError
from .prior import StableDiffusionPrior
from .schedule import SCHEDULERS, check_scheduler, scheduler_levels
from .unconditional import LDMPrior, PixelPrior

__all__ = [
    "SCHEDULERS",
    "LDMPrior",
    "NonFiniteError",
    "PixelPrior",
    "StableDiffusionPrior",
    "check_scheduler",
    "scheduler_levels",
]
