"""``vml-ldm inpaint``: one image file and its mask."""

from __future__ import annotations

import argparse

from .files import check_exists, check_output, lossy_note, open_pipeline, refusing, solve


def run(options: argparse.Namespace) -> int:
    """Inpaint one image file."""
    check_output(options.output, options.force)
    check_exists(options.image)
    if options.mask is not None:
        check_exists(options.mask)
    from vml_ldm.images import save_image
    from vml_ldm.posing import model_sizes

    task = inpainting(options)
    with refusing():
        problem = task.read(options.image)
    pipe = open_pipeline(options, task.kind)
    posed = task.pose(*problem, **model_sizes(pipe))
    print(posed.text)
    painted, report = solve(pipe, options, **posed.arguments)
    depth = task.depth(options.image)
    bits = save_image(posed.take_back(painted), options.output, depth)
    print(report.text())
    print(f"wrote {options.output}{lossy_note(options.output)}{depth.note(bits)}")
    return 0


def inpainting(options: argparse.Namespace):
    """The task of an image, or of every image of a folder, as `vml_ldm.posing.Inpaint`."""
    from vml_ldm.images import MaskEdit
    from vml_ldm.posing import Inpaint

    with refusing():
        edit = MaskEdit(options.cutoff, options.fill, options.grow, options.feather)
        return Inpaint(options.mask, options.size, edit=edit, margins=options.outpaint)
