"""What the pipelines share of their arguments: the batch, what was measured, numbers, choices."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vml_ldm.images import from_pil, is_deep, read_deep, read_numbers, settle_range
from vml_ldm.operators import Measurement, own, uncast

_FAR = 8.0  # times what the operator gives of pictures, is no value of y
_NOISY = 6.0  # standard deviations of noise, that no value of y is off
_SIGNED = (-1.05, -0.5, 1.05)  # the least value of a y in [-1, 1] is between the first two, and all are below the last


def to_y(y) -> Tensor:
    """What a caller hands in as y -> (B, ...), float32 or complex64; floats are never shifted or clamped.

    A tensor is y as its operator gives it, batch first. PIL images become (1, 1, H, W) if they have one channel,
    otherwise (1, 3, H, W), upright and on white. Arrays are image-shaped, (H, W), (H, W, C) or (B, H, W, C). Whole
    numbers are brought to [0, 1] by the rule in `vml_ldm.images.ranges`. A list is joined along the batch.

    Raises:
        TypeError: something else.
        ValueError: an empty list, or parts of different shapes; an array that is not image-shaped; whole numbers whose
            type does not say what white is.
    """
    if isinstance(y, (list, tuple)):
        return _join([to_y(part) for part in y])
    if isinstance(y, Image.Image):
        return _to_picture(y)
    if not isinstance(y, (Tensor, np.ndarray)) or y.ndim == 0:
        what = type(y).__name__
        raise TypeError(f"`y` is {what}; expected a tensor (B, ...), a PIL image, an array, or a list of them.")
    if isinstance(y, np.ndarray):
        return _to_channels_first(y)
    return y.to(torch.complex64) if y.is_complex() else read_numbers(own(y), "y").pixels


def _to_picture(image: Image.Image) -> Tensor:
    """(1, 1 or 3, H, W) of a PIL image; floats as they are."""
    if not is_deep(image):
        return from_pil(image)[:, : 1 if image.mode in ("1", "L", "LA") else 3]
    values = read_deep(ImageOps.exif_transpose(image), clear=1.0)
    return values.pixels if values.kind == "float" else settle_range([values], [None], "y")[0]


def _to_channels_first(array: np.ndarray) -> Tensor:
    """An image-shaped array as (B, C, H, W)."""
    images = array[None, :, :, None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"`y` is an array of shape {array.shape}; expected (H, W), (H, W, C) or (B, H, W, C), C = 1 or 3. "
            "Pass anything else as a tensor, shaped as the operator gives it."
        )
    return read_numbers(images, "y").pixels.movedim(3, 1)


def _join(parts: list[Tensor]) -> Tensor:
    """Parts (B_i, ...) as one batch."""
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"`y` is a list of parts of shapes {shapes} after the batch; expected one shape.")
    return torch.cat(parts)


def checked(observed: Measurement, size: tuple[int, int], noise_std: Tensor) -> Measurement:
    """A measurement whose values its operator may have given; where that tells nothing, they are zero.

    Args:
        observed: y and its operator, which fit images of this size.
        size: (height, width) in pixels.
        noise_std: (B,), sigma_y as the caller named it.

    Raises:
        ValueError: values that are not finite where something was measured, or that are far beyond what the operator
            gives of pictures in [0, 1], as 0 to 255 or [-1, 1] is.
    """
    operator, y = observed.operator, observed.y
    told = observed.told()
    for index, wrong in enumerate(~y.isfinite() & told):
        if wrong.any():
            raise ValueError(
                f"`y` has values that are not finite: {int(wrong.sum())} of {wrong.numel()} in image {index}, counted "
                "from 0; expected finite ones. Leave them out by the operator, as Mask does."
            )
    y = torch.where(told, y, 0)
    _check_scale(operator, y, told, size, noise_std.max().item())
    return Measurement(operator, y, 1.0)


def _check_scale(operator, y: Tensor, told: Tensor, size: tuple[int, int], sigma_y: float) -> None:
    """Raise ValueError for a y in other units than the operator's, of which three pictures tell."""
    black = torch.zeros(len(y), 3, *size, dtype=y.real.dtype, device=y.device)
    speckles = torch.rand(black.shape, generator=torch.Generator().manual_seed(0)).round().to(black)
    with torch.no_grad(), uncast(y):
        dark, bright, mixed = (torch.where(told, operator(image), 0) for image in (black, black + 1, speckles))
    largest = max(seen.abs().max().item() for seen in (dark, bright, mixed))
    if y.abs().max() > _FAR * largest + 10 * sigma_y and largest > 0:
        raise ValueError(
            f"`y` has values of up to {y.abs().max():.4g} in size, and the operator gives {largest:.4g} at most of "
            "pictures in [0, 1]; expected y in the operator's units. Divide 8-bit values by 255, or pass them as uint8."
        )
    keeps = not y.is_complex() and (dark.abs() < 0.01).all() and (torch.where(told, bright - 1, 0).abs() < 0.01).all()
    low, high = (0.0, 0.0) if y.is_complex() else (y.min().item(), y.max().item())
    noise = _NOISY * sigma_y
    least, most, top = _SIGNED
    if keeps and least - noise <= low < most - noise and high <= top + noise:
        raise ValueError(
            f"`y` has values from {low:.4g} to {high:.4g}, as if in [-1, 1], and the operator maps black to 0 and "
            "white to 1; expected [0, 1]. Pass y / 2 + 0.5, or name the noise by sigma_y if it is noise."
        )


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


def check_numbers(a: SimpleNamespace) -> None:
    """Refuse numbers of a call that no model could take, those that are there.

    Raises:
        ValueError: a count that is no whole number or below its least, or a scale that is no finite number.
    """
    for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("padding_mask_crop", 0)):
        value = getattr(a, name, None)
        if value is not None and not (is_whole(value) and value >= least):
            raise ValueError(f"{name} is {value!r}; expected a whole number >= {least}.")
    for name in ("guidance_scale", "strength"):
        value = getattr(a, name, None)
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}; expected a finite number.")


def is_whole(value) -> bool:
    """Whether it is a whole number, of Python or numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
