"""Where prompts are painted: canvases, holes, and what a result is compared to.

    fill        a canvas (white, a colour, or many small emoji that were kept from training), a box to fill
    replace     a picture that was kept from training, a box in its middle to repaint with something else
    complete    the picture that the prompt names, of which a quarter is known

The rank is that of the picture asked for among all training pictures, for a part of the result: where an object of the
hole's size stands on a plain canvas, what surrounds it as pictures are surrounded (of the largest hole all of the
image); on other canvases the hole alone; of a picture to complete all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.assets import example_images
from vml_ldm.evaluation.comparison import Case
from vml_ldm.evaluation.gallery import WHITE, Colour, Gallery, load_picture
from vml_ldm.evaluation.tasks import box_mask

LARGE, MIDDLE, SMALL = 108 / 128, 84 / 128, 64 / 128  # sides of holes as shares of the image's
COLOURS = {"white": WHITE, "blue": (150, 195, 235)}
_SMALL_EMOJI = 4  # in a row of a canvas of emoji
_QUARTERS = 4


class Place(NamedTuple):
    """A task, what it is done on, and the side of the hole as a share of the image's."""

    task: str = "fill"
    canvas: str = "white"
    hole: float = LARGE

    def __str__(self) -> str:
        return f"{self.task}-{self.canvas}-{round(128 * self.hole)}" if self.task == "fill" else self.task

    @property
    def colour(self) -> Colour:
        """What all training pictures are put on to be compared."""
        return COLOURS.get(self.canvas, WHITE)


PLACES = (
    Place(),
    Place(hole=MIDDLE),
    Place(hole=SMALL),
    Place(canvas="blue"),
    Place(canvas="emoji", hole=MIDDLE),
    Place("replace", "picture", SMALL),
    Place("complete", "itself", 1.0),
)


class Posed(NamedTuple):
    """A batch of a place.

    Attributes:
        image: (B, 3, H, W) in [0, 1], what a method is given.
        known: (B, 1, H, W), 1 = known.
        around: (B, 3, H, W), whose jumps at the hole's border are those to keep.
        target: (B, 3, H, W), what was asked for where it belongs, by which sharpness is judged.
        seen: (B, 3, H, W) -> (B, 3, h, w), the part of a result that is ranked.
        has_truth: `target` is the truth.
    """

    image: Tensor
    known: Tensor
    around: Tensor
    target: Tensor
    seen: Callable[[Tensor], Tensor]
    has_truth: bool = False


def pose(place: Place, cases: Sequence[Case], gallery: Gallery) -> Posed:
    """A batch at a place; canvases and quarters go by the case's seed."""
    if place.task == "complete":
        return _pose_quarters(cases)
    size = gallery.size
    plain = place.canvas in COLOURS
    canvas = torch.stack([draw_canvas(place.canvas, case.seed, size) for case in cases])
    known = box_mask(size, size, place.hole).expand(len(cases), -1, -1, -1)
    side = min(size, round(size * place.hole / LARGE)) if plain else round(size * place.hole)
    asked = torch.stack([gallery.picture(case.name, place.colour) for case in cases])
    target = torch.where(known > 0, canvas, put_middle(canvas, asked, side))
    return Posed(canvas, known, canvas, target, lambda image: middle(image, side))


def _pose_quarters(cases: Sequence[Case]) -> Posed:
    truth = torch.stack([case.truth for case in cases])
    known = torch.cat([quarter_mask(truth.shape[2], case.seed % _QUARTERS) for case in cases])
    image = known * truth + (1 - known) * 0.5  # grey: how the stock pipeline blanks what is missing
    return Posed(image, known, truth, truth, lambda result: result, has_truth=True)


def quarter_mask(size: int, quarter: int) -> Tensor:
    """(1, 1, size, size): one quarter is known; 0 to 3, in reading order."""
    mask, half = torch.zeros(1, 1, size, size), size // 2
    top, left = (quarter // 2) * half, (quarter % 2) * half
    mask[..., top : top + half, left : left + half] = 1
    return mask


def middle(image: Tensor, side: int) -> Tensor:
    """The middle of images (B, 3, H, H), side x side pixels."""
    start = (image.shape[2] - side) // 2
    return image[..., start : start + side, start : start + side]


def put_middle(canvas: Tensor, picture: Tensor, side: int) -> Tensor:
    """Canvases (B, 3, H, H) with pictures in their middles, resized to side x side pixels."""
    drawn, start = canvas.clone(), (canvas.shape[2] - side) // 2
    resized = F.interpolate(picture, (side, side), mode="bilinear", antialias=True)
    drawn[..., start : start + side, start : start + side] = resized
    return drawn


@lru_cache(maxsize=256)
def draw_canvas(name: str, seed: int, size: int) -> Tensor:
    """(3, size, size) in [0, 1]: a colour by its name, "emoji" (4 x 4 small ones) or "picture", kept from training.

    Raises:
        ValueError: no canvas has that name.
    """
    if name in COLOURS:
        return (torch.tensor(COLOURS[name]).float() / 255).reshape(3, 1, 1).expand(-1, size, size)
    listed = [path for path, _ in example_images("held_out")]
    if name == "picture":
        return load_picture(listed[seed % len(listed)], size)
    if name == "emoji":
        places = range(seed, seed + _SMALL_EMOJI**2)
        small = [load_picture(listed[place % len(listed)], size // _SMALL_EMOJI) for place in places]
        rows = [torch.cat(small[start::_SMALL_EMOJI], dim=2) for start in range(_SMALL_EMOJI)]
        return torch.cat(rows, dim=1)
    raise ValueError(f"canvas is {name!r}; expected {', '.join(COLOURS)}, emoji or picture.")
