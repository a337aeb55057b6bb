"""Inverse problems with latent diffusion models by variational mode-seeking.

The public names are loaded when they are first used, so that ``import vml_ldm`` itself loads neither torch
nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vml_ldm.assets import bundled_model
    from vml_ldm.objective import vml_bracket, vml_gradient, vml_loss, vml_trace_gradient
    from vml_ldm.operators import Mask, Measurement
    from vml_ldm.optimize import InnerStep
    from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
    from vml_ldm.solve import Solution, vml_map
    from vml_ldm.spread import over_seeds

__version__ = "0.1.0"

__all__ = [
    "InnerStep",
    "Mask",
    "Measurement",
    "Solution",
    "VMLInpaintPipeline",
    "__version__",
    "bundled_model",
    "over_seeds",
    "vml_bracket",
    "vml_gradient",
    "vml_loss",
    "vml_map",
    "vml_trace_gradient",
]

_HOMES = {
    "InnerStep": "vml_ldm.optimize",
    "Mask": "vml_ldm.operators",
    "Measurement": "vml_ldm.operators",
    "Solution": "vml_ldm.solve",
    "VMLInpaintPipeline": "vml_ldm.pipelines.vml_inpaint",
    "bundled_model": "vml_ldm.assets",
    "over_seeds": "vml_ldm.spread",
    "vml_bracket": "vml_ldm.objective",
    "vml_gradient": "vml_ldm.objective",
    "vml_loss": "vml_ldm.objective",
    "vml_map": "vml_ldm.solve",
    "vml_trace_gradient": "vml_ldm.objective",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vml_ldm' has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
