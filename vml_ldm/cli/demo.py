"""``vml-ldm demo``: stock inpainting and ours on images kept from training."""

from __future__ import annotations

import argparse
import sys

from vml_ldm.families import ONE

from .files import check_count, named, open_checkpoint, open_pipeline, open_rows, peak_memory


def run(options: argparse.Namespace) -> int:
    """Run the comparison and print its table."""
    rows = open_rows(options.output)
    model = open_checkpoint(options.model)
    masks, count, split = _chosen(options)
    pipe = open_pipeline(options, "inpaint", families=ONE)
    from vml_ldm.evaluation import demo

    plan = demo.Plan(
        model=model,
        methods=demo.FULL_METHODS if options.full else demo.SHORT_METHODS,
        masks=masks,
        images=count,
        split=split,
        steps=options.steps,
        guidance=demo.GUIDANCE if options.guidance is None else options.guidance,
        seed=options.seed,
        batch=options.batch,
    )
    try:
        table = demo.run(plan, pipe, rows)
    except KeyboardInterrupt:
        print(f"\nThe rows so far are kept in {options.output}; the same command goes on from there.", file=sys.stderr)
        raise
    print(f"\n{table}\n{peak_memory()}\nTable, rows and pictures are in {options.output}.")
    return 0


def _chosen(options: argparse.Namespace) -> tuple[tuple[str, ...], int, str]:
    """Masks, number of images and split of a comparison, checked."""
    from vml_ldm.evaluation.tasks import MASKS

    masks = named(options.masks, MASKS, "mask") or MASKS
    split, count = options.split.replace("-", "_"), options.images or (32 if options.full else 4)
    check_count(count, split)
    return masks, count, split
