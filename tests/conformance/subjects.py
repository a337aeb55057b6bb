"""The three pipelines that are held to the same facts, and the small problem that they are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from vml_ldm import VMLInpaintPipeline

SIZE = 32


@dataclass(frozen=True)
class Subject:
    """A pipeline class with the arguments that choose its solver."""

    name: str
    cls: type
    own: dict

    def make(self, parts: dict, **options):
        pipe = self.cls(**parts, requires_safety_checker=False, **options)
        return self.quiet(pipe)

    def load(self, folder, **options):
        return self.quiet(self.cls.from_pretrained(folder, **options))

    @staticmethod
    def quiet(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, **arguments):
        """The whole output for a fixed small problem; arguments replace its own."""
        given = {
            "prompt": "a hat",
            "image": picture(),
            "mask_image": mask(),
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "np",
        }
        return pipe(**{**given, **self.own, **arguments})

    def images(self, pipe, **arguments):
        return self.call(pipe, **arguments).images


SUBJECTS = (
    Subject("stock", StableDiffusionInpaintPipeline, {}),
    Subject("none", VMLInpaintPipeline, {"solver": "none"}),
    Subject("vml", VMLInpaintPipeline, {"inner_steps": 1, "start": "measurement"}),
)


def picture(seed: int = 0) -> Image.Image:
    rows = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((SIZE, SIZE))


def mask() -> Image.Image:
    """The right half is painted."""
    painted = np.zeros((SIZE, SIZE), dtype=np.uint8)
    painted[:, SIZE // 2 :] = 255
    return Image.fromarray(painted)


def same(a, b, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool(np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance)
