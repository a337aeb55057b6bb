"""Inverse problems with latent diffusion models by variational mode-seeking.

The public names are loaded when they are first used, so that ``import vml_ldm`` itself loads neither torch
nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vml_ldm.assets import bundled_model
    from vml_ldm.objective import vml_bracket, vml_gradient
    from vml_ldm.operators import (
        HDR,
        JPEG,
        Blur,
        Compose,
        CompressedSensing,
        Crop,
        Custom,
        Downsample,
        FourierLines,
        Gamma,
        GaussianBlur,
        Grayscale,
        Mask,
        Measurement,
        MotionBlur,
        NonlinearBlur,
        PhaseRetrieval,
        Subsample,
        from_physics,
    )
    from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
    from vml_ldm.solve import Solution, vml_map

__version__ = "0.1.0"

__all__ = [
    "HDR",
    "JPEG",
    "Blur",
    "Compose",
    "CompressedSensing",
    "Crop",
    "Custom",
    "Downsample",
    "FourierLines",
    "Gamma",
    "GaussianBlur",
    "Grayscale",
    "Mask",
    "Measurement",
    "MotionBlur",
    "NonlinearBlur",
    "PhaseRetrieval",
    "Solution",
    "Subsample",
    "VMLInpaintPipeline",
    "__version__",
    "bundled_model",
    "from_physics",
    "vml_bracket",
    "vml_gradient",
    "vml_map",
]

_HOMES = {
    "Blur": "vml_ldm.operators",
    "Compose": "vml_ldm.operators",
    "CompressedSensing": "vml_ldm.operators",
    "Crop": "vml_ldm.operators",
    "Custom": "vml_ldm.operators",
    "Downsample": "vml_ldm.operators",
    "FourierLines": "vml_ldm.operators",
    "Gamma": "vml_ldm.operators",
    "GaussianBlur": "vml_ldm.operators",
    "Grayscale": "vml_ldm.operators",
    "HDR": "vml_ldm.operators",
    "JPEG": "vml_ldm.operators",
    "Mask": "vml_ldm.operators",
    "Measurement": "vml_ldm.operators",
    "MotionBlur": "vml_ldm.operators",
    "NonlinearBlur": "vml_ldm.operators",
    "PhaseRetrieval": "vml_ldm.operators",
    "Solution": "vml_ldm.solve",
    "Subsample": "vml_ldm.operators",
    "VMLInpaintPipeline": "vml_ldm.pipelines.vml_inpaint",
    "bundled_model": "vml_ldm.assets",
    "from_physics": "vml_ldm.operators",
    "vml_bracket": "vml_ldm.objective",
    "vml_gradient": "vml_ldm.objective",
    "vml_map": "vml_ldm.solve",
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
