"""``vml-ldm prompts``: stock inpainting and ours, by what a prompt asks for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vml_ldm.families import ONE

from .files import UsageError, named, one_line, open_checkpoint, open_pipeline, open_rows, peak_memory, quiet, refusing

_SHORT = {"images": 8, "seeds": 1}


def run(options: argparse.Namespace) -> int:
    """Run the comparison and print its table."""
    quiet()
    from vml_ldm.evaluation import prompts

    rows = open_rows(options.output, kind=prompts.PromptRow)
    with refusing():
        chosen = _chosen(options)
    plan = prompts.Plan(
        model=open_checkpoint(options.model), steps=options.steps, seed=options.seed, batch=options.batch, **chosen
    )
    pipe = open_pipeline(options, "inpaint", families=ONE)
    try:
        with refusing():
            table = prompts.run(plan, pipe, rows, _gallery(options, pipe), solve=not options.table)
    except KeyboardInterrupt:
        print(f"\nThe rows so far are kept in {options.output}; the same command goes on from there.", file=sys.stderr)
        raise
    print(f"\n{table}\n{peak_memory()}\nTable, rows, sheets and pictures are in {options.output}.")
    return 0


def _gallery(options: argparse.Namespace, pipe):
    from vml_ldm.evaluation.gallery import Gallery, fetch

    output: Path = options.output
    cache = options.cache or output.with_name(f"{output.name}-gallery")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    try:
        return Gallery(options.data or fetch(cache), size, cache)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(one_line(error)) from error


def _chosen(options: argparse.Namespace) -> dict:
    """Prompts, seeds, methods and places; what was not asked for is left to the plan.

    Raises:
        ValueError: an unknown method.
    """
    from vml_ldm.evaluation.painters import named_painter
    from vml_ldm.evaluation.prompts_tasks import PLACES

    chosen = {**_SHORT, "places": PLACES[:1]} if options.short else {}
    asked = {"images": options.images, "seeds": options.seeds}
    if options.methods:
        asked["methods"] = tuple(map(named_painter, options.methods.split(",")))
    known = {str(place): place for place in PLACES}
    if wanted := named(options.places, tuple(known), "place"):
        asked["places"] = tuple(map(known.get, wanted))
    return chosen | {name: value for name, value in asked.items() if value is not None}
