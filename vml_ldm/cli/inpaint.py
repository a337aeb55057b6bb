"""``vml-ldm inpaint``: one image file and its mask."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import UsageError, check_exists, check_output, load, lossy_note, open_checkpoint, read_image, solve


def run(options: argparse.Namespace) -> int:
    """Inpaint one image file."""
    check_output(options.output, options.force)
    check_exists(options.image)
    check_exists(options.mask)
    image, known = _open_pair(options.image, options.mask)
    pipe = load(open_checkpoint(options.model), "VMLInpaintPipeline")
    from vml_ldm.fitting import Fit
    from vml_ldm.images import to_pil

    stride = pipe.vae_scale_factor
    fit = Fit.choose(tuple(image.shape[2:]), pipe.unet.config.sample_size * stride, stride, options.size)
    print(fit.text())
    canvas, seen = fit.bring(image, known)
    painted, report = solve(pipe, options, size=tuple(canvas.shape[2:]), image=canvas, mask_image=1 - seen)
    (result,) = to_pil(fit.take_back(painted, image, known))
    result.save(options.output)
    print(report.text())
    print(f"wrote {options.output}{lossy_note(options.output)}")
    return 0


def _open_pair(image_path: Path, mask_path: Path):
    """The image (1, 3, H, W) and what of it is known (1, 1, H, W), from files; a mask's white is repainted."""
    from vml_ldm.images import from_pil, upright_mask, upright_rgb

    image, mask = upright_rgb(read_image(image_path)), upright_mask(read_image(mask_path))
    if image.size != mask.size:
        raise UsageError(
            f"{mask_path} has {mask.width} x {mask.height} pixels and {image_path} {image.width} x {image.height}; "
            "expected the same. Resize the mask."
        )
    return from_pil(image), 1 - from_pil(mask)[:, :1]
