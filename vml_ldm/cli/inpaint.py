"""``vml-ldm inpaint``: one image file and its mask."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import UsageError, check_exists, check_output, load, lossy_note, one_line, open_checkpoint, read_image


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
    painted, report = _solve(pipe, *fit.bring(image, known), options)
    (result,) = to_pil(fit.take_back(painted, image, known))
    result.save(options.output)
    print(report.text())
    print(f"wrote {options.output}{lossy_note(options.output)}")
    return 0


def _solve(pipe, image, known, options: argparse.Namespace):
    """The pipeline's result (1, 3, H, W) on the CPU for an image and a mask (1 = known), and its report."""
    from torch import Generator

    asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "preset": options.preset}
    try:
        out = pipe(
            prompt=options.prompt,
            image=image,
            mask_image=1 - known,
            height=image.shape[2],
            width=image.shape[3],
            generator=Generator().manual_seed(options.seed),
            output_type="pt",
            return_report=True,
            **{name: value for name, value in asked.items() if value is not None},
        )
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return out.images.float().cpu(), out.report


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
