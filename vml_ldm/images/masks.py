"""Tools around a mask, as users paint it: white, 1, is repainted. Grow, feather, fill; and margins to paint beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Mask = TypeVar("Mask", Image.Image, Tensor)
_MOST = 512  # pixels that a mask grows or is feathered by, at most


@dataclass(frozen=True)
class MaskEdit:
    """What is done to a mask before it is used, in this order.

    Args:
        cutoff: in [0, 1): values above it become 1 and all others 0. None leaves soft values as they are.
        fill: what is enclosed by painted pixels is painted too.
        grow: pixels by which the painted part grows on all sides; it shrinks where that is below 0.
        feather: pixels beyond the painted part over which it fades, which are then partly repainted.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> mask = torch.zeros(1, 1, 9, 9)
        >>> mask[..., 4, 4] = 1
        >>> int(MaskEdit(grow=1).apply(mask).sum())
        5
    """

    cutoff: float | None = None
    fill: bool = False
    grow: int = 0
    feather: int = 0

    def __post_init__(self):
        if self.cutoff is not None and not 0 <= self.cutoff < 1:
            raise ValueError(f"cutoff is {self.cutoff!r}; expected a number in [0, 1), or None.")
        for name, least in (("grow", -_MOST), ("feather", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise ValueError(f"{name} is {value!r}; expected a whole number of pixels from {least} to {_MOST}.")

    def apply(self, painted: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1], 1 = painted -> the same, edited."""
        if self.cutoff is not None:
            painted = (painted > self.cutoff).to(painted)
        painted = _filled(painted) if self.fill else painted
        painted = _grown(painted, self.grow) if self.grow >= 0 else 1 - _grown(1 - painted, -self.grow)
        return _feathered(painted, self.feather) if self.feather else painted


def edit_mask(mask: Mask, *, cutoff: float | None = None, fill: bool = False, grow: int = 0, feather: int = 0) -> Mask:
    """A mask image, white = repaint, edited as `MaskEdit` says; a PIL image gives one of mode "L", a tensor a tensor.

    Args:
        mask: a PIL image, or (B, 1, H, W) in [0, 1].

    Raises:
        ValueError: a number outside its range, a tensor of another shape.

    Example:
        >>> edit_mask(Image.new("L", (64, 64)), grow=8, feather=4).size
        (64, 64)
    """
    edit = MaskEdit(cutoff, fill, grow, feather)
    if isinstance(mask, Tensor):
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"`mask` has shape {tuple(mask.shape)}; expected (B, 1, H, W).")
        return edit.apply(mask)
    painted = torch.from_numpy(np.array(mask.convert("L")))[None, None] / 255
    return Image.fromarray((255 * edit.apply(painted)[0, 0]).round().byte().numpy())


def widen(image: Tensor, painted: Tensor, margins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image with margins to be painted around it, for outpainting.

    Args:
        image: (B, 3, H, W) in [0, 1]; its edge pixels go on into the margins, where they have no say.
        painted: (B, 1, H, W) in [0, 1], 1 = repaint.
        margins: pixels to the left, above, to the right and below, each >= 0.

    Raises:
        ValueError: not four whole numbers >= 0.

    Example:
        >>> image, painted = widen(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), (0, 0, 4, 0))
        >>> image.shape[3], int(painted.sum())
        (12, 32)
    """
    left, top, right, bottom = check_margins(margins)
    pad = (left, right, top, bottom)
    return F.pad(image, pad, mode="replicate"), F.pad(painted, pad, value=1.0)


def check_margins(margins: Sequence[int]) -> tuple[int, int, int, int]:
    """Margins as they are. Raises ValueError for what are not four whole numbers >= 0."""
    if len(margins) != 4 or not all(isinstance(n, int) and n >= 0 for n in margins):
        raise ValueError(
            f"margins are {margins!r}; expected four whole numbers of pixels >= 0: left, top, right, bottom."
        )
    return tuple(margins)


def _grown(painted: Tensor, pixels: int) -> Tensor:
    """The greatest value within a disc, as far as that lies in the image."""
    if pixels == 0:
        return painted
    padded = F.pad(painted, (pixels,) * 4)
    found, height = torch.zeros_like(painted), painted.shape[2]
    for row in range(-pixels, pixels + 1):  # of the disc, each as wide as it is there
        width = int((pixels**2 - row**2) ** 0.5)
        inside = padded[:, :, pixels + row : pixels + row + height, pixels - width : padded.shape[3] - pixels + width]
        found = torch.maximum(found, F.max_pool2d(inside, (1, 2 * width + 1), stride=1))
    return found


def _feathered(painted: Tensor, pixels: int) -> Tensor:
    """The mask, and beside it a fall to 0 over so many pixels."""
    found = painted
    for near in range(1, pixels):
        found = torch.maximum(found, (1 - near / pixels) * _grown(painted, near))
    return found


def _filled(painted: Tensor) -> Tensor:
    """With what the image's edge does not reach but across pixels of which half or more is painted."""
    free = F.pad(painted < 0.5, (1, 1, 1, 1), value=True)
    reached = torch.zeros_like(free)
    reached[..., 0, :] = True
    while True:
        wider = _swept(free.mT, _swept(free, reached).mT).mT
        if torch.equal(wider, reached):
            break
        reached = wider
    enclosed = (free & ~reached)[..., 1:-1, 1:-1]
    return torch.where(enclosed, 1.0, painted)


def _swept(free: Tensor, reached: Tensor) -> Tensor:
    """Of each row every run of free pixels that is reached somewhere."""
    runs = (~free).cumsum(-1)  # a number for each run
    found = torch.zeros_like(runs).scatter_reduce(-1, runs, (reached & free).to(runs), "amax")
    return free & (found.gather(-1, runs) > 0)
