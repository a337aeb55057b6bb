"""What values mean: the one rule by which pictures, masks and measurements become float32 in [0, 1].

| what comes                                         | what it becomes                                              |
|----------------------------------------------------|--------------------------------------------------------------|
| bool; PIL mode 1                                   | 0 and 1                                                      |
| uint8; PIL modes L, LA, P, PA, RGB, RGBA, CMYK, ... | divided by 255                                               |
| uint16; PIL modes I;16, I;16B, I;16L, I;16N        | divided by 65535                                             |
| PIL mode I                                         | whole numbers from 0 to 65535 are 16 bits; others are refused |
| other whole numbers                                | refused: their type does not say what white is               |
| floats, PIL mode F                                 | as they are, within 0.05 of [0, 1], and clamped to it        |
| floats from -1 to 1, some below -0.25              | taken as [-1, 1], with a warning; a mask is refused          |
| other floats                                       | refused                                                      |
| a mask of whole numbers of which the largest is 1  | 0 and 1, whatever its type                                   |

The values of all images of one argument are looked at together. What a mask paints wholly has no say: it may be NaN,
infinite or anything else, and becomes grey where it is not finite, otherwise the nearest value in [0, 1]. A value that
is not finite and is known is refused. A measurement y has its operator's units and noise, so floats in it are neither
clamped nor shifted; they are refused where the operator cannot give such values (`check_scale`).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SLACK = 0.05  # that floats may be off [0, 1], as any bicubic resize makes some
_SIGNED = -0.25  # a least value of no more is that of [-1, 1]; between the two either may be meant
_DEEPEST = 65535
_WHITE = {"bool": 1, "uint8": 255, "uint16": _DEEPEST}  # by type
_DEEP = ("I", "F")  # PIL's modes of more than 8 bits begin so
_GREY = 0.5


class Values(NamedTuple):
    """Numbers, and what is known of their range.

    Attributes:
        pixels: float32.
        kind: "unit": in [0, 1]; "sixteen": whole numbers that should be 16 bits; "float": to be looked at.
    """

    pixels: Tensor
    kind: str


def is_deep(image: Image.Image) -> bool:
    """Whether a PIL image has one channel of more than 8 bits."""
    return image.mode.startswith(_DEEP)


def read_deep(image: Image.Image, clear: float) -> Values:
    """A PIL image of more than 8 bits, (1, 1, H, W).

    Args:
        clear: the value, in [0, 1], of what its file says is transparent.
    """
    array = np.asarray(image)
    key = image.info.get("transparency")
    if image.mode == "F":
        return Values(torch.from_numpy(array.astype(np.float32))[None, None], "float")
    if isinstance(key, int):
        array = np.where(array == key, round(clear * _DEEPEST), array.astype(np.int64))
    pixels = torch.from_numpy(array.astype(np.float32))[None, None]
    return Values(pixels, "sixteen") if image.mode == "I" else Values(pixels / _DEEPEST, "unit")


def read_numbers(numbers: np.ndarray | Tensor, name: str, mask: bool = False) -> Values:
    """An array or a tensor of any shape.

    Raises:
        TypeError: complex numbers, text or objects.
        ValueError: no numbers at all; whole numbers whose type does not say what white is.
    """
    kind = str(numbers.dtype).removeprefix("torch.")
    if isinstance(numbers, np.ndarray):
        numbers = _to_tensor(numbers, name)
    if numbers.is_complex():
        raise TypeError(f"`{name}` has complex numbers ({kind}); expected real ones.")
    if numbers.numel() == 0:
        raise ValueError(f"`{name}` has shape {tuple(numbers.shape)}, of no values; expected pixels.")
    pixels = numbers.detach().to(torch.float32)
    if numbers.is_floating_point():
        return Values(pixels, "float")
    if kind != "bool" and mask and pixels.min() >= 0 and pixels.max() <= 1:
        return Values(pixels, "unit")
    if kind in _WHITE:
        return Values(pixels / _WHITE[kind], "unit")
    raise ValueError(
        f"`{name}` is of type {kind}, with values from {pixels.min():.6g} to {pixels.max():.6g}; expected a type that "
        "says what white is: uint8, uint16, or floats in [0, 1]. Convert it to one of them."
    )


def _to_tensor(array: np.ndarray, name: str) -> Tensor:
    """Arrays in any order of bytes and of memory."""
    if array.dtype.kind not in "buifc":
        raise TypeError(f"`{name}` is an array of {array.dtype}; expected numbers.")
    wanted = {"f": np.float32, "c": np.complex64, "b": np.bool_}.get(array.dtype.kind, array.dtype.newbyteorder("="))
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(array.astype(wanted)))


def settle_range(parts: list[Values], known: list[Tensor | None], name: str, mask: bool = False) -> list[Tensor]:
    """Parts of one argument as float32 in [0, 1], by the rule at the top.

    Args:
        parts: (B, C, H, W) each.
        known: for each part what of it counts, (B or 1, 1, H, W), where it is > 0; None: all.
        mask: they are masks, which nobody has in [-1, 1].

    Raises:
        ValueError: values that are not finite, or of another range, where they count.
    """
    counts = [
        torch.ones_like(part.pixels, dtype=torch.bool) if told is None else (told > 0).expand_as(part.pixels)
        for part, told in zip(parts, known, strict=True)
    ]
    _check_finite([part.pixels for part in parts], counts, name)
    scales = {"unit": (1.0, 0.0)}
    for kind, find in (("sixteen", _check_sixteen), ("float", _find_range)):
        seen = [part.pixels[count] for part, count in zip(parts, counts, strict=True) if part.kind == kind]
        values = torch.cat(seen) if seen else torch.empty(0)
        scales[kind] = find(values.min().item(), values.max().item(), name, mask) if len(values) else (1.0, 0.0)
    return [_mapped(part.pixels, *scales[part.kind]) for part in parts]


def _mapped(pixels: Tensor, white: float, shift: float) -> Tensor:
    """``(pixels + shift) / white`` in [0, 1]; grey where that is not finite."""
    moved = pixels if (white, shift) == (1.0, 0.0) else (pixels + shift) / white
    return torch.where(moved.isfinite(), moved.clamp(0, 1), _GREY)


def _check_finite(parts: list[Tensor], counts: list[Tensor], name: str) -> None:
    """Raise ValueError for the first image with a value that counts and is not finite."""
    index = 0
    for pixels, count in zip(parts, counts, strict=True):
        for wrong in ~pixels.isfinite() & count:
            if wrong.any():
                raise ValueError(
                    f"`{name}`, image {index}: {int(wrong.sum())} of {wrong.numel()} values are NaN or infinite "
                    "(counted from 0, and without what is painted); expected finite ones. Paint them over, or fill "
                    "them in."
                )
            index += 1


def _check_sixteen(low: float, high: float, name: str, mask: bool) -> tuple[float, float]:
    """(white, shift) of whole numbers in PIL's mode I."""
    if low < 0 or high > _DEEPEST:
        raise ValueError(
            f"`{name}` is of PIL's mode I, with values from {low:.6g} to {high:.6g}; expected 16 bits, 0 to "
            f"{_DEEPEST}. Scale it, and convert it to mode F, in [0, 1]."
        )
    if mask and high == 1:
        return 1.0, 0.0
    if 0 < high <= 255:
        warnings.warn(
            f"`{name}` is of PIL's mode I, and its largest value is {high:.0f}: taken as 16 bits, so nearly black. "
            "Convert 8 bits to mode L.",
            stacklevel=3,
        )
    return float(_DEEPEST), 0.0


def _find_range(low: float, high: float, name: str, mask: bool) -> tuple[float, float]:
    """(white, shift) of floats from low to high."""
    if low >= -_SLACK and high <= 1 + _SLACK:
        return 1.0, 0.0
    if -1 - _SLACK <= low <= _SIGNED and high <= 1 + _SLACK and not mask:
        warnings.warn(
            f"`{name}` has values from {low:.4g} to {high:.4g}, and is taken as [-1, 1]. Pass {name} / 2 + 0.5 to say "
            "so, or clamp it to [0, 1].",
            stacklevel=3,
        )
        return 2.0, 1.0
    raise ValueError(
        f"`{name}` has values from {low:.6g} to {high:.6g}; expected floats in [0, 1]. {_advice(low, high)}"
    )


def _advice(low: float, high: float) -> str:
    """What to do about floats that are not in [0, 1]."""
    if low >= -1 - _SLACK and high <= 1 + _SLACK:
        return "Clamp them, if a resize made them; halve them and add 0.5, if they are in [-1, 1]."
    if low >= -_SLACK:
        for white, bits in ((255, 8), (_DEEPEST, 16)):
            if high <= white * (1 + _SLACK):
                return f"Divide them by {white}, if they were {bits} bits, or pass uint{bits}."
    return "Scale them to it."
