"""Families of Stable Diffusion checkpoints, told apart by a folder's `model_index.json`, and their pipelines here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

INDEX = "model_index.json"
FAMILIES = {  # by diffusers' names: the public name of the pipeline for each kind of task
    "stable-diffusion": {"inpaint": "VMLInpaintPipeline", "restore": "VMLRestorePipeline"},
    "stable-diffusion-xl": {"inpaint": "VMLInpaintXLPipeline", "restore": "VMLRestoreXLPipeline"},
    "stable-diffusion-3": {"inpaint": "VMLInpaintSD3Pipeline", "restore": "VMLRestoreSD3Pipeline"},
}
ONE = ("stable-diffusion",)  # what the page, the demo and the benchmark serve
VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
_CALLED = {
    "stable-diffusion": "Stable Diffusion 1.x and 2.x",
    "stable-diffusion-xl": "Stable Diffusion XL",
    "stable-diffusion-3": "Stable Diffusion 3 and 3.5",
}


def pipeline_of(folder: str | Path, kind: str, families: Iterable[str] = tuple(FAMILIES)) -> str:
    """The public name of the pipeline that solves a kind of task, "inpaint" or "restore", with a checkpoint.

    Args:
        families: that are served.

    Raises:
        ValueError: a folder that has no index, or a family that has no such pipeline; before any weights are read.
    """
    family, name = _family(Path(folder))
    serving = {other for other in families if kind in FAMILIES[other]}
    if family not in serving:
        served = ", ".join(called for other, called in _CALLED.items() if other in serving)
        raise ValueError(f"{folder} is a checkpoint of {name}; to {kind} here, expected one of {served}.")
    return FAMILIES[family][kind]


def _family(folder: Path) -> tuple[str | None, str]:
    """The family, None for one that is not ours, and the name of the pipeline that saved the folder."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: part[1] for name, part in index.items() if isinstance(part, list)}
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder / INDEX} cannot be read ({error}); expected a Stable Diffusion checkpoint in diffusers' layout."
        ) from error
    name = index.get("_class_name", "no pipeline that it names")
    if parts.get("vae") not in VAES:
        return None, name
    if parts.get("transformer") == "SD3Transformer2DModel":
        return "stable-diffusion-3", name
    if parts.get("unet") != "UNet2DConditionModel" or parts.get("controlnet"):
        return None, name
    if parts.get("text_encoder_2"):
        return "stable-diffusion-xl", name
    return ("stable-diffusion" if parts.get("text_encoder") == "CLIPTextModel" else None), name
