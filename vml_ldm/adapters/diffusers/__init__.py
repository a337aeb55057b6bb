"""diffusers as a host: its models as a `Prior`, its schedulers as a `Schedule`."""

from ...objective import NonFiniteError
from .control import COND, SIDE, Control, ControlledPrior, nets_of
from .flow import FLOW_SCHEDULERS, FlowPrior, check_flow_scheduler, flow_levels
from .footprint import Footprints, graph_bytes
from .memory import Chosen, Fitted, Plan, StepDown, choose, free_bytes, parse_memory, plans
from .network import draws_parts
from .prior import GuidedPrior, StableDiffusionPrior, StableDiffusionXLPrior
from .schedule import SchedulerLevels, check_count, check_scheduler, scheduler_levels
from .unconditional import LDMPrior, PixelPrior

__all__ = [
    "COND",
    "FLOW_SCHEDULERS",
    "SIDE",
    "Chosen",
    "Control",
    "ControlledPrior",
    "Fitted",
    "FlowPrior",
    "Footprints",
    "GuidedPrior",
    "LDMPrior",
    "NonFiniteError",
    "PixelPrior",
    "Plan",
    "SchedulerLevels",
    "StableDiffusionPrior",
    "StableDiffusionXLPrior",
    "StepDown",
    "check_count",
    "check_flow_scheduler",
    "check_scheduler",
    "choose",
    "draws_parts",
    "flow_levels",
    "free_bytes",
    "graph_bytes",
    "nets_of",
    "parse_memory",
    "plans",
    "scheduler_levels",
]
