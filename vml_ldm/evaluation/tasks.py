"""The masks that inpainting is tried on, drawn at any size.

Every mask is a float32 tensor (1, 1, H, W) of zeros and ones, **1 = known**, 0 = missing. Where chance
decides, it comes from the ``torch.Generator`` that is passed: the same seed draws the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

MASKS = ("half", "box", "random", "scribble", "text")


def draw_mask(name: str, height: int, width: int, generator: Generator) -> Tensor:
    """Draw the mask of that name, one of ``MASKS``, as a tensor (1, 1, height, width), 1 = known.

    Raises:
        ValueError: no mask has that name.
    """
    if name == "half":
        return half_mask(height, width)
    if name == "box":
        return box_mask(height, width)
    if name == "random":
        return random_mask(height, width, generator)
    if name == "scribble":
        return scribble_mask(height, width, generator)
    if name == "text":
        return text_mask(height, width)
    raise ValueError(f"mask is {name!r}; expected one of {', '.join(MASKS)}.")


def half_mask(height: int, width: int) -> Tensor:
    """The right half is missing (of an odd width, the larger part)."""
    mask = torch.ones(1, 1, height, width)
    mask[..., width // 2 :] = 0
    return mask


def box_mask(height: int, width: int, share: float = 48 / 128) -> Tensor:
    """A box in the centre is missing; its sides are that share of the image's, rounded."""
    box_height, box_width = round(share * height), round(share * width)
    top, left = (height - box_height) // 2, (width - box_width) // 2
    mask = torch.ones(1, 1, height, width)
    mask[..., top : top + box_height, left : left + box_width] = 0
    return mask


def random_mask(height: int, width: int, generator: Generator, missing: float = 0.8) -> Tensor:
    """Single pixels are missing, chosen at random: exactly that share of them, rounded."""
    order = torch.randperm(height * width, generator=generator)
    mask = torch.ones(height * width)
    mask[order[: round(missing * height * width)]] = 0
    return mask.reshape(1, 1, height, width)


def scribble_mask(height: int, width: int, generator: Generator, strokes: int = 3) -> Tensor:
    """Thick free-hand strokes are missing: random walks that turn slowly."""
    thickness = max(2, round(0.08 * min(height, width)))
    canvas, pen = _blank(height, width)
    for _ in range(strokes):
        points = _walk(height, width, generator)
        pen.line(points, fill=0, width=thickness, joint="curve")
        for x, y in points:
            pen.circle((x, y), thickness / 2, fill=0)
    return _to_tensor(canvas)


def text_mask(height: int, width: int, word: str = "VML") -> Tensor:
    """A word in bold letters is missing, as large as the image allows, in its centre."""
    canvas, pen = _blank(height, width)
    size = _largest_font(pen, word, 0.94 * width, 0.94 * height)
    font, bold = ImageFont.load_default(size), _boldness(size)
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font, stroke_width=bold)
    corner = ((width - right - left) / 2, (height - bottom - top) / 2)
    pen.text(corner, word, fill=0, font=font, stroke_width=bold, stroke_fill=0)
    return _to_tensor(canvas)


def _blank(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("L", (width, height), 255)
    return canvas, ImageDraw.Draw(canvas)


def _to_tensor(canvas: Image.Image) -> Tensor:
    """A drawing, dark = missing, as a mask of zeros and ones (1, 1, H, W)."""
    return torch.from_numpy(np.array(canvas) > 127).float()[None, None]


def _walk(height: int, width: int, generator: Generator, points: int = 24) -> list[tuple[float, float]]:
    """Points (x, y) of one stroke, 6 % of the shorter side apart; it turns back at the outer tenth."""
    x, y, angle = torch.rand(3, generator=generator).tolist()
    x, y, angle = (0.1 + 0.8 * x) * width, (0.1 + 0.8 * y) * height, 2 * math.pi * angle
    step = 0.06 * min(height, width)
    walk = [(x, y)]
    for turn in (1.2 * torch.rand(points - 1, generator=generator) - 0.6).tolist():
        angle += turn
        if not (0.1 * width < x < 0.9 * width and 0.1 * height < y < 0.9 * height):
            angle = math.atan2(height / 2 - y, width / 2 - x) + turn
        x, y = x + step * math.cos(angle), y + step * math.sin(angle)
        walk.append((x, y))
    return walk


def _boldness(size: int) -> int:
    """Stroke width in pixels that makes the default font bold at a size."""
    return round(size / 16)


def _largest_font(pen: ImageDraw.ImageDraw, word: str, width: float, height: float) -> int:
    """The largest font size at which the word fits into width x height pixels (at least 6)."""

    def fits(size: int) -> bool:
        font = ImageFont.load_default(size)
        left, top, right, bottom = pen.textbbox((0, 0), word, font=font, stroke_width=_boldness(size))
        return right - left <= width and bottom - top <= height

    low, high = 6, max(7, math.ceil(2 * height))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def stack_masks(name: str, height: int, width: int, seeds: Sequence[int]) -> Tensor:
    """Draw one mask for each seed: (B, 1, height, width), 1 = known."""
    return torch.cat([draw_mask(name, height, width, Generator().manual_seed(seed)) for seed in seeds])
