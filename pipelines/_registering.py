"""Make diffusers' own loaders find the pipelines of this package."""

from __future__ import annotations

import diffusers
from diffusers.pipelines import auto_pipeline as automatic

from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
from vml_ldm.pipelines.vml_inpaint_controlnet import VMLControlNetInpaintPipeline
from vml_ldm.pipelines.vml_inpaint_sd3 import VMLInpaintSD3Pipeline
from vml_ldm.pipelines.vml_inpaint_xl import VMLInpaintXLPipeline
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline
from vml_ldm.pipelines.vml_restore_sd3 import VMLRestoreSD3Pipeline
from vml_ldm.pipelines.vml_restore_xl import VMLRestoreXLPipeline

_INPAINTING = {  # by diffusers' name of the family
    "stable-diffusion": VMLInpaintPipeline,
    "stable-diffusion-controlnet": VMLControlNetInpaintPipeline,
    "stable-diffusion-xl": VMLInpaintXLPipeline,
    "stable-diffusion-3": VMLInpaintSD3Pipeline,
}
PIPELINES = (*_INPAINTING.values(), VMLRestorePipeline, VMLRestoreXLPipeline, VMLRestoreSD3Pipeline)


def register() -> None:
    """Let diffusers load checkpoints that these pipelines saved. Calling it again changes nothing.

    `DiffusionPipeline.from_pretrained` finds every pipeline of this package by the name that `save_pretrained` wrote.
    `AutoPipelineForInpainting` finds the inpainting ones, of a folder or of a pipeline, and `AutoPipelineForText2Image`
    and `AutoPipelineForImage2Image` find the stock pipeline of the same family. What diffusers loads for checkpoints
    that others saved stays as it is.
    """
    for pipeline in PIPELINES:
        setattr(diffusers, pipeline.__name__, pipeline)
    for family, pipeline in _INPAINTING.items():
        name = f"{family}-vml"
        for stock in (automatic.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, automatic.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
            stock[name] = stock[family]
        automatic.AUTO_INPAINT_PIPELINES_MAPPING[name] = pipeline
