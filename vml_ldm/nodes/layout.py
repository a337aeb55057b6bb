"""ComfyUI's IMAGE and MASK, and the sizes that a model takes.

IMAGE is (B, H, W, C) in [0, 1]; MASK is (B, H, W) or (H, W) with 1 = repaint, the opposite of what the core takes.
What comes in is converted within `ordinary_tensors`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..damage import Damage, without_unknown
from ..fitting import Fit, Window
from ..images import read_numbers, settle_range
from ..measuring import NEAR
from ..operators import Compose, Grayscale, Mask, Measurement, Operator, own
from ..operators.rows import Rows


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Out of the inference mode in which ComfyUI runs nodes: what is made here, autograd may save. Also a decorator."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def to_pixels(image: Tensor, known: Tensor | None = None) -> Tensor:
    """IMAGE -> (B, 3, H, W) float32 in [0, 1]; a fourth channel is left out.

    Args:
        known: (M, 1, H, W), where what is 0 has no say (see `vml_ldm.images.ranges`); None: all counts.

    Raises:
        ValueError: another shape, or values that the rule refuses.
    """
    check_image(image)
    values = read_numbers(own(image[..., :3]).movedim(3, 1), "image")
    if known is not None and (known.shape[2:] != values.pixels.shape[2:] or len(known) != len(image)):
        known = known.amax(0, keepdim=True) if known.shape[2:] == values.pixels.shape[2:] else None
    (pixels,) = settle_range([values], [known], "image")
    return pixels.expand(-1, 3, -1, -1)


def check_image(image: Tensor) -> Tensor:
    """IMAGE as it is. Raises ValueError for another shape."""
    if image.ndim != 4 or image.shape[3] not in (1, 3, 4):
        raise ValueError(f"the image has shape {tuple(image.shape)}; expected IMAGE, (B, H, W, 3).")
    return image


def to_image(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> IMAGE."""
    return pixels.movedim(1, 3).float().cpu().contiguous()


def to_known(mask: Tensor) -> Tensor:
    """MASK, 1 = repaint -> (B, 1, H, W), 1 = known.

    Raises:
        ValueError: another shape, or values that the rule in `vml_ldm.images.ranges` refuses.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected MASK, (B, H, W).")
    values = read_numbers(own(mask).reshape(-1, 1, *mask.shape[-2:]), "mask", mask=True)
    (painted,) = settle_range([values], [None], "mask", mask=True)
    return 1 - painted


def pair(pixels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Images and masks, as many of the one as of the other.

    Raises:
        ValueError: sizes or numbers that do not fit.
    """
    if pixels.shape[2:] != known.shape[2:]:
        raise ValueError(
            f"the image has {_by(pixels)} pixels and the mask {_by(known)}; expected the same. Resize the mask. (Load "
            "Image gives a mask of 64 x 64 for a picture without transparency: paint one in the Mask Editor.)"
        )
    count = max(len(pixels), len(known))
    if {len(pixels), len(known)} - {1, count}:
        raise ValueError(f"{len(pixels)} images came with {len(known)} masks; expected as many, or one of either.")
    return pixels.expand(count, -1, -1, -1), known.expand(count, -1, -1, -1)


def padded(size: tuple[int, int], stride: int) -> Fit:
    """An image of any size at a size that the VAE takes: padded below and to the right, which is not known."""
    return Fit(size, size, _whole(size, stride))


class Seen:
    """A picture as the measurement y of an operator.

    Args:
        image: IMAGE.
        damage: what VML_OPERATOR holds.
        stride: pixels for each latent.

    Attributes:
        y: (B, C, h, w).
        operator: of canvases.
        canvas: (height, width) of the image that the model makes.

    Raises:
        ValueError: a picture that the operator does not fit.
    """

    def __init__(self, image: Tensor, damage: Damage, stride: int):
        size = tuple(check_image(image).shape[1:3])
        full = damage.image_size(size)
        window = Window(size, size, size, full, _whole(full, stride))
        operator = damage.make(1.0, full)
        _check_masks(operator, torch.zeros(len(image), 3, *full))
        told = Measurement(operator, torch.ones(len(image), damage.channels, *size), 1.0).told()
        pixels = to_pixels(image, told[:, :1].float())
        y = pixels if damage.channels == 3 else Grayscale()(pixels)
        self.operator: Operator = window.see(operator)
        self.y, self.canvas, self._window = without_unknown(operator, y), window.canvas, window
        Measurement(self.operator, self.y, 1.0).check(self.canvas)

    def part(self, rows: list[int]) -> Seen:
        """Of some images of the batch, by their places, which rise; of all of them it is this one."""
        if len(rows) == len(self.y):
            return self
        part = copy.copy(self)
        part.y, part.operator = self.y[rows], Rows(self.operator, torch.tensor(rows), len(self.y))
        return part

    def guess(self, y: Tensor, noise_std: Tensor) -> Tensor:
        """(B, 3, height, width) in [0, 1]: a canvas that agrees with y up to its noise (B,), on y's device."""
        return Measurement(self.operator, y, 1.0).guess(self.canvas, noise=noise_std, tolerance=NEAR)

    def colours(self, stride: int) -> Tensor:
        """(N, B, h, w): of how many colours y tells in each latent of the canvas, see `Measurement.seen`."""
        return Measurement(self.operator, self.y, 1.0).seen(self.canvas, stride)

    def take_back(self, canvas: Tensor) -> Tensor:
        """The measured part of the solver's image."""
        return self._window.take_back(canvas)

    def text(self) -> str:
        """One line about the sizes."""
        return self._window.text()


def _check_masks(operator: Operator, picture: Tensor) -> Tensor:
    """What the operator makes of a picture; raise ValueError for a mask of another size than what it masks."""
    if isinstance(operator, Compose):
        for part in operator.operators:
            picture = _check_masks(part, picture)
        return picture
    if isinstance(operator, Mask) and operator.mask.shape[2:] != picture.shape[2:]:
        raise ValueError(
            f"the mask of VML Operator Mask has {_by(operator.mask)} pixels and the picture that it masks "
            f"{_by(picture)}; expected the same. Resize the mask."
        )
    return operator(picture)


def _whole(size: tuple[int, int], stride: int) -> tuple[int, int]:
    height, width = (math.ceil(length / stride) * stride for length in size)
    return height, width


def _by(pixels: Tensor) -> str:
    return f"{pixels.shape[3]} x {pixels.shape[2]}"
