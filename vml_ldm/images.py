"""Pixels at the edges: what users hand in, made into float32 images and masks in [0, 1], and the way back.

Here a mask is 1 where a pixel is known. Hosts that paint white what is to be repainted are converted where they call.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

_CARRY, _CARRY_FLOOR = 1.0, 0.02  # pixels, and the weight of doing nothing; chosen on the validation images


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
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read ({' '.join(str(error).split())}).") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, transparency laid on white, one channel repeated to three."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright_mask(mask: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, as one 8-bit channel; transparency counts as black."""
    mask = ImageOps.exif_transpose(mask)
    if mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return mask.convert("L")


def composite(known: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """``m known + (1 - m) image``: bit-equal to known where m = 1, and to image where m = 0.

    Args:
        known, image: (B, 3, H, W).
        mask: (B, 1, H, W) in [0, 1], 1 = known.
    """
    mixed = mask * known + (1 - mask) * image
    return torch.where(mask == 1, known, torch.where(mask == 0, image, mixed))


def seamless(known: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`composite` without a seam: what the image misses of the known pixels is carried a pixel or two into the hole.

    ``image + G * (m r) / (G * m + 0.02)``, ``r = known - image``, G a Gaussian of one pixel (a normalised convolution):
    beside known pixels the decoder's own error is taken off, farther in nothing changes.

    Args:
        known, image: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W) in [0, 1], 1 = known. Known pixels come back bit-equal.
    """
    near = _blur(mask * (known - image)) / (_blur(mask) + _CARRY_FLOOR)
    return composite(known, (image + near).clamp(0, 1), mask)


def _blur(x: Tensor) -> Tensor:
    """(B, C, H, W) -> the same: a Gaussian of `_CARRY` pixels, zero outside the image."""
    place = torch.arange(-4, 5, dtype=x.dtype, device=x.device)
    kernel = torch.softmax(-place.square() / (2 * _CARRY**2), 0).expand(x.shape[1], 1, 1, -1)
    rows = F.conv2d(x, kernel, padding=(0, 4), groups=x.shape[1])
    return F.conv2d(rows, kernel.mT, padding=(4, 0), groups=x.shape[1])


def fill_holes(image: Tensor, mask: Tensor) -> Tensor:
    """A smooth guess of the missing pixels, by push-pull: averages of what is known, from ever coarser grids.

    Known pixels (m = 1) stay; nothing known at all gives mid-grey.

    Args:
        image: (B, C, H, W).
        mask: (B, 1, H, W) in [0, 1], 1 = known; the weight of a pixel in the averages.
    """
    height, width = image.shape[-2:]
    if height == width == 1:
        return torch.where(mask > 0, image, 0.5)
    pad = (0, width % 2, 0, height % 2)
    weight = F.avg_pool2d(F.pad(mask, pad), 2)
    pooled = F.avg_pool2d(F.pad(image * mask, pad), 2) / weight.clamp(min=1e-8)
    coarse = fill_holes(pooled, (4 * weight).clamp(max=1))
    guess = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return mask * image + (1 - mask) * guess


def to_pil(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL images; k / 255 comes back as k."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(pixels) for pixels in array]


def from_pil(image: Image.Image, channels: int = 3) -> Tensor:
    """A PIL image -> (1, channels, H, W) float32 in [0, 1], upright, on white; one channel is the lightness."""
    upright = upright_rgb(image)
    pixels = upright if channels == 3 else upright.convert("L")
    array = np.asarray(pixels, dtype=np.float32).reshape(upright.height, upright.width, channels) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None]
