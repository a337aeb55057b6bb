"""Inverse problems with latent diffusion models by variational mode-seeking.

The public names are loaded when they are first used, so that ``import vml_ldm`` itself loads neither torch
nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vml_ldm.adapters.deepinv import VMLReconstructor
    from vml_ldm.assets import bundled_model
    from vml_ldm.images.masks import edit_mask
    from vml_ldm.objective import vml_bracket, vml_gradient, vml_loss, vml_trace_gradient
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
        LinearCustom,
        Mask,
        Measurement,
        MotionBlur,
        NonlinearBlur,
        PhaseRetrieval,
        Subsample,
        from_physics,
    )
    from vml_ldm.optimize import InnerStep
    from vml_ldm.pipelines._registering import register
    from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
    from vml_ldm.pipelines.vml_inpaint_controlnet import VMLControlNetInpaintPipeline
    from vml_ldm.pipelines.vml_inpaint_sd3 import VMLInpaintSD3Pipeline
    from vml_ldm.pipelines.vml_inpaint_xl import VMLInpaintXLPipeline
    from vml_ldm.pipelines.vml_restore import VMLRestorePipeline
    from vml_ldm.pipelines.vml_restore_sd3 import VMLRestoreSD3Pipeline
    from vml_ldm.pipelines.vml_restore_xl import VMLRestoreXLPipeline
    from vml_ldm.pixels import CallablePrior, karras_scales
    from vml_ldm.proximal import Proximal
    from vml_ldm.red import RedDiff, red_diff
    from vml_ldm.solve import Levels, Solution, vml_map
    from vml_ldm.spread import over_seeds

__version__ = "0.1.0"

__all__ = [
    "HDR",
    "JPEG",
    "Blur",
    "CallablePrior",
    "Compose",
    "CompressedSensing",
    "Crop",
    "Custom",
    "Downsample",
    "FourierLines",
    "Gamma",
    "GaussianBlur",
    "Grayscale",
    "InnerStep",
    "Levels",
    "LinearCustom",
    "Mask",
    "Measurement",
    "MotionBlur",
    "NonlinearBlur",
    "PhaseRetrieval",
    "Proximal",
    "RedDiff",
    "Solution",
    "Subsample",
    "VMLControlNetInpaintPipeline",
    "VMLInpaintPipeline",
    "VMLInpaintSD3Pipeline",
    "VMLInpaintXLPipeline",
    "VMLReconstructor",
    "VMLRestorePipeline",
    "VMLRestoreSD3Pipeline",
    "VMLRestoreXLPipeline",
    "__version__",
    "bundled_model",
    "edit_mask",
    "from_physics",
    "karras_scales",
    "over_seeds",
    "red_diff",
    "register",
    "vml_bracket",
    "vml_gradient",
    "vml_loss",
    "vml_map",
    "vml_trace_gradient",
]

_NAMES = {
    "adapters.deepinv": ["VMLReconstructor"],
    "assets": ["bundled_model"],
    "images.masks": ["edit_mask"],
    "objective": ["vml_bracket", "vml_gradient", "vml_loss", "vml_trace_gradient"],
    "operators": [
        *("Blur", "Compose", "CompressedSensing", "Crop", "Custom", "Downsample", "FourierLines", "Gamma"),
        *("GaussianBlur", "Grayscale", "HDR", "JPEG", "LinearCustom", "Mask", "Measurement", "MotionBlur"),
        *("NonlinearBlur", "PhaseRetrieval", "Subsample", "from_physics"),
    ],
    "optimize": ["InnerStep"],
    "pipelines._registering": ["register"],
    "pipelines.vml_inpaint": ["VMLInpaintPipeline"],
    "pipelines.vml_inpaint_controlnet": ["VMLControlNetInpaintPipeline"],
    "pipelines.vml_inpaint_sd3": ["VMLInpaintSD3Pipeline"],
    "pipelines.vml_inpaint_xl": ["VMLInpaintXLPipeline"],
    "pipelines.vml_restore": ["VMLRestorePipeline"],
    "pipelines.vml_restore_sd3": ["VMLRestoreSD3Pipeline"],
    "pipelines.vml_restore_xl": ["VMLRestoreXLPipeline"],
    "pixels": ["CallablePrior", "karras_scales"],
    "proximal": ["Proximal"],
    "red": ["RedDiff", "red_diff"],
    "solve": ["Levels", "Solution", "vml_map"],
    "spread": ["over_seeds"],
}
_HOMES = {name: f"vml_ldm.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vml_ldm' has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
