"""Pixels at the edges: what users hand in, made into float32 images and masks in [0, 1], and the way back.

`ranges` states the one rule for what values mean; `pictures` has files and PIL images, `holes` what is known and what
is not. Here a mask is 1 where a pixel is known. Hosts that paint white what is to be repainted are converted where they
call.
"""

from .holes import composite, fill_holes, seamless
from .masks import MaskEdit, check_margins, edit_mask, widen
from .pictures import (
    Depth,
    file_depth,
    from_pil,
    load_image,
    mask_of,
    read_image,
    read_pixels,
    save_image,
    to_pil,
    upright_mask,
    upright_rgb,
    upright_size,
)
from .ranges import Values, is_deep, read_deep, read_numbers, settle_range

__all__ = [
    "Depth",
    "MaskEdit",
    "Values",
    "check_margins",
    "composite",
    "edit_mask",
    "file_depth",
    "fill_holes",
    "from_pil",
    "is_deep",
    "load_image",
    "mask_of",
    "read_deep",
    "read_image",
    "read_numbers",
    "read_pixels",
    "save_image",
    "seamless",
    "settle_range",
    "to_pil",
    "upright_mask",
    "upright_rgb",
    "upright_size",
    "widen",
]
