"""The pipelines' door for images and masks: PIL images, arrays and tensors, one or a list, by one rule for values.

The rule is that of `vml_ldm.images.ranges`; sizes and crops are as diffusers' `VaeImageProcessor` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers.image_processor import PIL_INTERPOLATION, VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from vml_ldm.images import (
    Values,
    from_pil,
    is_deep,
    mask_of,
    read_deep,
    read_numbers,
    settle_range,
    to_pil,
    upright_mask,
    upright_rgb,
)
from vml_ldm.operators import own


class _Part(NamedTuple):
    """One item of what came: numbers (B, C, H, W), and the upright PIL image that they are of, if they are."""

    values: Values
    picture: Image.Image | None = None


def read_frame(image, mask, processor: VaeImageProcessor, **size) -> tuple[Tensor, Tensor]:
    """What a caller hands in as images and masks -> pixels (B, 3, H, W) in [0, 1] and what is known (M, 1, H, W).

    PIL images are turned by their EXIF orientation, laid on white (masks on black); one channel is repeated to three.
    What the masks paint wholly has no say in what the other values mean.

    Args:
        image, mask: PIL, arrays (B, H, W, C) or tensors (B, C, H, W), one or a list; white is repainted.
        processor: one that does not normalise.
        size: height, width, crops_coords, resize_mode of its `preprocess`.

    Raises:
        TypeError: something else.
        ValueError: none at all, shapes or channels of no image, or values that the rule refuses.
    """
    masks, images = _parts(mask, "mask_image"), _parts(image, "image")
    painted = settle_range([part.values for part in masks], [None] * len(masks), "mask_image", mask=True)
    pixels = settle_range([part.values for part in images], _known(images, painted), "image")
    resized = [_sized(*found, processor, size) for found in zip(images, pixels, strict=True)]
    white = [_sized(*found, processor, size) for found in zip(masks, painted, strict=True)]
    known = 1 - _joined([part[:, :1] for part in white]).clamp(0, 1)  # a crop of a mask comes back with three channels
    return _joined([part.expand(-1, 3, -1, -1) for part in resized]), known


def crop_pair(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """An image and its mask as upright 8-bit PIL images, RGB and L; what the mask paints wholly has no say.

    Raises:
        ValueError: two sizes, or values that the rule refuses.
    """
    white = upright_mask(mask)
    upright = ImageOps.exif_transpose(image)
    if upright.size != white.size:
        raise ValueError(
            f"`padding_mask_crop` came with an image of {upright.size} and a mask of {white.size} pixels; expected the "
            "same size. Resize one of them."
        )
    if is_deep(image):
        return to_pil(from_pil(image, known=1 - mask_of(mask, "mask_image"), name="image"))[0], white
    return upright_rgb(image), white


def _parts(given, name: str) -> list[_Part]:
    """The items of an argument, a list or not."""
    if given is None:
        white = ": white is repainted" if name == "mask_image" else ""
        raise ValueError(f"`{name}` is None; expected a PIL image, an array or a tensor{white}.")
    items = given if isinstance(given, (list, tuple)) else [given]
    if not items:
        raise ValueError(f"`{name}` is an empty list; expected an image at least.")
    return [_part(item, name) for item in items]


def _part(item, name: str) -> _Part:
    mask = name == "mask_image"
    if isinstance(item, Image.Image):
        upright = ImageOps.exif_transpose(item)
        if is_deep(upright):
            return _Part(read_deep(upright, clear=0.0 if mask else 1.0), upright)
        upright = upright_mask(upright) if mask else upright_rgb(upright)
        return _Part(Values(mask_of(upright) if mask else from_pil(upright), "unit"), upright)
    if not isinstance(item, (np.ndarray, Tensor)):
        raise TypeError(
            f"`{name}` is, or has in it, {type(item).__name__}; expected a PIL image, an array or a tensor, one or a "
            "list of them."
        )
    values = read_numbers(own(item), name, mask)
    find = _channels_first if isinstance(item, np.ndarray) else _with_channels
    return _Part(values._replace(pixels=find(values.pixels, name)))


def _channels_first(pixels: Tensor, name: str) -> Tensor:
    """What an array holds, (H, W), (H, W, C) or (B, H, W, C), and of masks (B, H, W), as (B, C, H, W)."""
    if pixels.ndim == 3 and name == "mask_image" and pixels.shape[2] not in (1, 3, 4):
        return pixels[:, None]
    images = pixels[None, :, :, None] if pixels.ndim == 2 else pixels[None] if pixels.ndim == 3 else pixels
    if images.ndim != 4:
        raise ValueError(
            f"`{name}` is an array of shape {tuple(pixels.shape)}; expected (H, W), (H, W, C) or (B, H, W, C)."
        )
    return _check_channels(images.movedim(3, 1), name, pixels, "last in an array")


def _with_channels(pixels: Tensor, name: str) -> Tensor:
    """What a tensor holds, (H, W), (C, H, W) or (B, C, H, W), and of masks (B, H, W), as (B, C, H, W)."""
    if pixels.ndim == 3 and name == "mask_image":
        return pixels[:, None]
    images = pixels[None, None] if pixels.ndim == 2 else pixels[None] if pixels.ndim == 3 else pixels
    if images.ndim != 4:
        raise ValueError(
            f"`{name}` is a tensor of shape {tuple(pixels.shape)}; expected (H, W), (C, H, W) or (B, C, H, W)."
        )
    return _check_channels(images, name, pixels, "first in a tensor, after the batch")


def _check_channels(images: Tensor, name: str, came: Tensor, where: str) -> Tensor:
    """Images (B, C, H, W) of so many channels as an image, or a mask, may have."""
    mask = name == "mask_image"
    if images.shape[1] not in ((1,) if mask else (1, 3)):
        expected, convert = ("1", "greyscale") if mask else ("1 or 3", "RGB")
        raise ValueError(
            f"`{name}` has {images.shape[1]} channels, by its shape {tuple(came.shape)}; expected {expected}, {where}. "
            f"Convert it to {convert}."
        )
    return images


def _known(images: list[_Part], painted: list[Tensor]) -> list[Tensor | None]:
    """For each part of the images, what is known of it in some image that is made of it, (B or 1, 1, H, W)."""
    holes = [hole for part in painted for hole in part.split(1)]
    counts = [len(part.values.pixels) for part in images]
    if sum(counts) not in (1, len(holes)) and len(holes) > 1:
        return [None] * len(images)  # refused later, by their numbers
    found, at = [], 0
    for part, count in zip(images, counts, strict=True):
        own_holes = holes if len(holes) == 1 or sum(counts) == 1 else holes[at : at + count]
        size = part.values.pixels.shape[2:]
        known = torch.cat([_nearest(1 - hole, size).to(part.values.pixels.device) for hole in own_holes])
        found.append(known.amax(0, keepdim=True) if count == 1 else known)
        at += count
    return found


def _nearest(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return x if x.shape[2:] == size else interpolate(x, size, mode="nearest-exact")


def _sized(part: _Part, pixels: Tensor, processor: VaeImageProcessor, size: dict) -> Tensor:
    """A part at the size to solve: PIL images as Pillow resizes them, others by their nearest pixels."""
    if part.picture is None:
        return processor.preprocess(pixels, **size)
    if not is_deep(part.picture):
        return processor.preprocess(part.picture, **size)
    picture = Image.fromarray(pixels[0, 0].cpu().numpy())
    height, width = processor.get_default_height_width(picture, size["height"], size["width"])
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL_INTERPOLATION[processor.config.resample])
    return torch.from_numpy(np.array(picture))[None, None].clamp(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts])
