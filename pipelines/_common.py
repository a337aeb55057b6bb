"""What the pipelines share of their arguments: the batch, pixels in, choices."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vml_ldm.images import from_pil, upright_mask, upright_rgb


def upright(images, convert):
    """PIL images (one, or a list) through `convert`; arrays of bytes as floats in [0, 1]; anything else as it is."""
    if isinstance(images, (list, tuple)):
        return [upright(image, convert) for image in images]
    if isinstance(images, Image.Image):
        return convert(images)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        return images.float() / 255
    return images


def to_pixels(images, processor, name: str = "image", **size) -> Tensor:
    """What a caller hands in as images -> (B, 3, H, W) float32 in [0, 1].

    PIL images are turned by their EXIF orientation and laid on white; one channel is repeated to three; tensors in
    [-1, 1] (as the stock pipelines still take them) are shifted to [0, 1].

    Args:
        images: PIL, array (B, H, W, C) or tensor (B, C, H, W), one or a list.
        processor: a `VaeImageProcessor` that does not normalise.
        size: height, width, crops_coords, resize_mode of its `preprocess`.

    Raises:
        ValueError: no image, or channels that are neither 1 nor 3.
    """
    if images is None:
        raise ValueError(f"`{name}` is None; expected a PIL image, an array or a tensor.")
    pixels = processor.preprocess(upright(images, upright_rgb), **size).float()
    if pixels.min() < 0:
        pixels = pixels / 2 + 0.5
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"`{name}` has {pixels.shape[1]} channels; expected 1 or 3. Convert it to RGB.")
    return pixels.expand(-1, 3, -1, -1)


def to_known(masks, processor, **size) -> Tensor:
    """What a caller hands in as masks, white = repaint -> (B, 1, H, W) float32, 1 = known, soft values kept."""
    if masks is None:
        raise ValueError("`mask_image` is None; expected a PIL image, an array or a tensor: white is repainted.")
    painted = processor.preprocess(upright(masks, upright_mask), **size).float()
    if painted.shape[1] != 1:
        raise ValueError(f"`mask_image` has {painted.shape[1]} channels; expected 1. Convert it to greyscale.")
    return 1 - painted.clamp(0, 1)


def to_y(y) -> Tensor:
    """What a caller hands in as y -> (B, ...), float32 or complex64; values are never shifted or clamped.

    A tensor is y as its operator gives it, batch first. PIL images become (1, 1, H, W) if they are greyscale, otherwise
    (1, 3, H, W), upright and on white. Arrays are image-shaped, (H, W), (H, W, C) or (B, H, W, C); bytes are divided by
    255. A list is joined along the batch.

    Raises:
        TypeError: something else.
        ValueError: an empty list, or parts of different shapes; an array that is not image-shaped; values that are not
            finite.
    """
    if isinstance(y, (list, tuple)):
        return _join([to_y(part) for part in y])
    if isinstance(y, Image.Image):
        grey = y.mode in ("1", "L", "LA")
        y = from_pil(y)[:, : 1 if grey else 3]
    if isinstance(y, np.ndarray):
        y = _to_channels_first(y)
    if not isinstance(y, Tensor) or y.ndim == 0:
        what = type(y).__name__
        raise TypeError(f"`y` is {what}; expected a tensor (B, ...), a PIL image, an array, or a list of them.")
    if not y.isfinite().all():
        raise ValueError("`y` has values that are not finite; expected finite ones. Leave them out by the operator.")
    if y.is_floating_point() or y.is_complex():  # any other type is refused by Measurement
        y = y.to(torch.complex64 if y.is_complex() else torch.float32)
    return y


def _to_channels_first(array: np.ndarray) -> Tensor:
    """An image-shaped array as (B, C, H, W)."""
    images = array[None, :, :, None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"`y` is an array of shape {array.shape}; expected (H, W), (H, W, C) or (B, H, W, C), C = 1 or 3. "
            "Pass anything else as a tensor, shaped as the operator gives it."
        )
    pixels = torch.tensor(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return pixels.float() / 255 if array.dtype == np.uint8 else pixels


def _join(parts: list[Tensor]) -> Tensor:
    """Parts (B_i, ...) as one batch."""
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"`y` is a list of parts of shapes {shapes} after the batch; expected one shape.")
    return torch.cat(parts)


def each(items: Tensor, count: int, copies: int, name: str) -> Tensor:
    """One item for all, or one for each of `count` prompts, each `copies` times in a row.

    Raises:
        ValueError: another number of items.
    """
    if len(items) not in (1, count):
        raise ValueError(f"{len(items)} of `{name}` came for {count} prompts; expected 1 or {count}.")
    return items.expand(count, *items.shape[1:]).repeat_interleave(copies, dim=0)


def check_one_of(name: str, value, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a choice that is none of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def count_prompts(a: SimpleNamespace, items: int) -> int:
    """How many prompts there are, after one prompt is repeated for `items` images."""
    prompts = 1 if isinstance(a.prompt, str) else len(a.prompt if a.prompt is not None else a.prompt_embeds)
    if prompts > 1:
        return prompts
    for name in [name for name in vars(a) if "prompt" in name.split("_")]:  # of every text encoder, and their negatives
        value = getattr(a, name)
        if isinstance(value, Tensor) and len(value) == 1:
            setattr(a, name, value.expand(items, *value.shape[1:]))
        elif isinstance(value, (str, list)) and items > 1:
            setattr(a, name, ([value] if isinstance(value, str) else value) * items)
    return items


def check_generators(generator, batch: int) -> None:
    """Raise ValueError unless there is one generator, or one for each image."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators came for {batch} images; expected one, or one for each.")
