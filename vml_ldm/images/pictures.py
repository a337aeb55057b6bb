"""Files and PIL images: to float32 in [0, 1] by the rule in `ranges`, and back at the depth that they had."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import png
from .ranges import is_deep, read_deep, settle_range

_PLAIN = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}  # modes that convert to few others
_LUMA = (0.299, 0.587, 0.114)
_DEEP_FORMATS = ("PNG", "TIFF")  # of which Pillow writes 16 bits of grey


class Depth(NamedTuple):
    """How deep a picture is.

    Attributes:
        bits: of a channel, 8 or 16, that are read.
        grey: it has one channel.
        found: bits of a channel in the file; Pillow reads 8 of 16 in colour, where `png` cannot help.
    """

    bits: int = 8
    grey: bool = False
    found: int = 8

    def note(self, written: int) -> str:
        """What was lost of 16 bits, read or written, in brackets; empty where nothing was."""
        if self.found > self.bits:
            return f" (of the picture's {self.found} bits a channel {self.bits} were read; a plain PNG keeps them)"
        return f" (of {self.bits} bits a channel {written} were written; a .png keeps them)" * (written < self.bits)


BYTES = Depth()


def load_image(path) -> Image.Image:
    """An image file as upright RGB (see `upright_rgb`), fully read.

    Raises:
        FileNotFoundError, PIL.UnidentifiedImageError: no such file, or no image.
    """
    with Image.open(path) as image:
        return upright_rgb(image)


def read_image(path) -> Image.Image:
    """An image file as it is, fully read. Raises ValueError for anything else."""
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image)  # read, too
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read ({' '.join(str(error).split())}).") from error


def file_depth(path) -> Depth:
    """What `read_pixels` takes of an image file. Raises ValueError for anything else."""
    image = read_image(path)
    if is_deep(image):
        return Depth(16, True, 16)
    with Image.open(path) as header:
        found = 16 if any(";16" in str(tile) for tile in header.tile) else 8
    return Depth(16 if _low(path, image) else 8, image.mode in ("1", "L", "LA"), found)


def read_pixels(path, channels: int = 3, known: Tensor | None = None) -> Tensor:
    """An image file as `from_pil` takes it, (1, channels, H, W); PNG files of 16 bits in colour at their depth.

    Raises:
        ValueError: no image, or values that the rule in `ranges` refuses.
    """
    image = read_image(path)
    pixels, low = from_pil(image, channels, known, str(path)), _low(path, image)
    if low is None:
        return pixels
    high = _channels(image).astype(np.float32)
    array = torch.from_numpy((256 * high + _channels(low)) / 65535).permute(2, 0, 1)[None]
    colours, opaque = (array[:, :-1], array[:, -1:]) if array.shape[1] in (2, 4) else (array, 1.0)
    deep = (colours * opaque + (1 - opaque)).expand(-1, 3, -1, -1)
    return deep if channels == 3 else luma(deep)


def _channels(image: Image.Image) -> np.ndarray:
    """(H, W, C) bytes, upright."""
    array = np.asarray(ImageOps.exif_transpose(image))
    return array.reshape(*array.shape[:2], -1)


def _low(path, image: Image.Image) -> Image.Image | None:
    """The 8 low bits of a PNG file of 16, of which Pillow read the others; None of any other file."""
    if image.format != "PNG" or is_deep(image) or "transparency" in image.info:
        return None
    low = png.low_bytes(Path(path).read_bytes())
    return None if low is None else Image.open(io.BytesIO(low))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after its EXIF orientation."""
    width, height = ImageOps.exif_transpose(image).size
    return height, width


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, transparency laid on white, one channel repeated to three; 8 bits."""
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        return to_pil(from_pil(image))[0]
    return _laid_on(image, "white").convert("RGB")


def upright_mask(mask: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, as one 8-bit channel; transparency counts as black."""
    mask = ImageOps.exif_transpose(mask)
    if is_deep(mask):
        return to_pil(mask_of(mask))[0].convert("L")
    mask = _laid_on(mask, "black").convert("L")
    return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask


def mask_of(mask: Image.Image, name: str = "the mask") -> Tensor:
    """A PIL image as a mask, (1, 1, H, W) float32 in [0, 1], upright; transparency counts as black."""
    if not is_deep(mask):
        array = np.asarray(upright_mask(mask), dtype=np.float32) / 255
        return torch.from_numpy(array)[None, None]
    values = read_deep(ImageOps.exif_transpose(mask), 0.0)
    return settle_range([values], [None], name, mask=True)[0]


def _laid_on(image: Image.Image, ground: str) -> Image.Image:
    """What is transparent in the colour of the ground."""
    image = image.convert(_PLAIN[image.mode]) if image.mode in _PLAIN else image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def from_pil(image: Image.Image, channels: int = 3, known: Tensor | None = None, name: str = "the picture") -> Tensor:
    """A PIL image -> (1, channels, H, W) float32 in [0, 1], upright, on white; one channel is the lightness.

    Args:
        known: (1, 1, H, W), of the upright image, where what is 0 has no say (see `ranges`); None: all of it counts.
        name: what the image is called in errors.

    Raises:
        ValueError: values that the rule in `ranges` refuses.
    """
    if is_deep(image):
        values = read_deep(ImageOps.exif_transpose(image), 1.0)
        return settle_range([values], [known], name)[0].expand(-1, channels, -1, -1)
    upright = upright_rgb(image)
    pixels = upright if channels == 3 else upright.convert("L")
    array = np.asarray(pixels, dtype=np.float32).reshape(upright.height, upright.width, channels) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def to_pil(image: Tensor) -> list[Image.Image]:
    """(B, 3 or 1, H, W) in [0, 1] -> PIL images, RGB; k / 255 comes back as k."""
    image = image.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    array = (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(pixels) for pixels in array]


def luma(image: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), the lightness of JPEG's and of PIL's conversion."""
    return (image * image.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def save_image(image: Tensor, file: Path | BinaryIO, depth: Depth = BYTES, format: str | None = None) -> int:
    """Write (1, 3, H, W) in [0, 1] at a depth, as far as the format has it; return the bits of a channel.

    16 bits are written as PNG, and in grey as TIFF; k / 65535 then comes back as k. Other formats have 8, in colour.

    Args:
        depth: of 16 bits grey, the lightness is written.
        format: PIL's name of it; None: as the file's name ends.
    """
    format = format or Image.registered_extensions()[Path(file).suffix.lower()]
    if depth.bits == 8 or format not in _DEEP_FORMATS[: 1 + depth.grey]:
        to_pil(image)[0].save(file, format=format)
        return 8
    image = luma(image) if depth.grey else image
    array = (image[0].detach().float().cpu().clamp(0, 1) * 65535).round().permute(1, 2, 0).numpy().astype(np.uint16)
    if depth.grey:
        Image.fromarray(array[..., 0]).save(file, format=format)
    elif hasattr(file, "write"):
        file.write(png.encode_rgb16(array))
    else:
        Path(file).write_bytes(png.encode_rgb16(array))
    return 16
