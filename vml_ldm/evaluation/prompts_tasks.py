"""Where prompts are painted: canvases and holes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vml_ldm.evaluation.comparison import Case
from vml_ldm.evaluation.gallery import Gallery
from vml_ldm.evaluation.tasks import box_mask

BORDER = 10 / 128  # of the largest hole, as a share of the side: what stays known around it


class Place(NamedTuple):
    """A task, what it is done on, and the side of the hole as a share of the image's."""

    task: str = "fill"
    canvas: str = "white"
    hole: float = 1 - 2 * BORDER

    def __str__(self) -> str:
        return f"{self.task}-{self.canvas}-{round(128 * self.hole)}"


class Posed(NamedTuple):
    """A batch of a place.

    Attributes:
        image: (B, 3, H, W) in [0, 1], what the method is given, hole included.
        known: (B, 1, H, W), 1 = known.
        asked: (B, 3, H, W), the pictures that the prompts name.
    """

    image: Tensor
    known: Tensor
    asked: Tensor


def pose(place: Place, cases: list[Case], gallery: Gallery) -> Posed:
    """A batch at a place."""
    size, asked = gallery.size, torch.stack([case.truth for case in cases])
    known = box_mask(size, size, place.hole).expand(len(cases), -1, -1, -1)
    return Posed(torch.ones_like(asked), known, asked)
