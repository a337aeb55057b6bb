"""``vml-ldm batch``: a folder of image files, in one process or in as many as a launcher started."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .files import UsageError, asked, open_checkpoint, open_pipeline, quiet, refusing
from .inpaint import inpainting
from .restore import flag, given_parameters, restoration

if TYPE_CHECKING:
    from vml_ldm.posing import Inpaint, Restore

EXIT_FAILED = 1
INPAINT = "inpaint"
_OF_INPAINT = ("mask", "size", "grow", "feather", "fill", "cutoff", "outpaint")
_OF_RESTORE = ("noise", "solver", "start")
_NOT_GIVEN = (None, 0, (0, 0, 0, 0))
_A_MASK = "expected a mask's file, or a folder of one for each image"


def run(options: argparse.Namespace) -> int:
    """Solve every image of a folder; return 1 if some could not be solved."""
    task = _task(options)
    open_checkpoint(options.model)
    quiet()
    from vml_ldm.batch import image_names, process, solve_folder

    with refusing():
        image_names(options.folder, options.output)
    state = process()
    pipe = open_pipeline(options, task.kind, state.device)
    try:
        with refusing():
            outcome = solve_folder(
                pipe,
                task,
                options.folder,
                options.output,
                prompt=options.prompt,
                seed=options.seed,
                batch_size=options.batch,
                force=options.force,
                **asked(options),
            )
    except KeyboardInterrupt:
        if state.is_main_process:
            print(f"\nFinished images are in {options.output}; the same command goes on from there.", file=sys.stderr)
        raise
    if state.is_main_process:
        solved = len(outcome.names) - outcome.kept - len(outcome.failed)
        print(f"{solved} images solved, {outcome.kept} finished before, {len(outcome.failed)} failed; {options.output}")
        for name, why in outcome.failed.items():
            print(f"vml-ldm batch: {name}: {why}", file=sys.stderr)
    state.destroy_process_group()
    return EXIT_FAILED if outcome.failed and state.is_main_process else 0


def _task(options: argparse.Namespace) -> Restore | Inpaint:
    """The task, after options that belong to another one were refused."""
    restores = options.task != INPAINT
    given = [name for name in (_OF_INPAINT if restores else _OF_RESTORE) if getattr(options, name) not in _NOT_GIVEN]
    if not restores:
        given += given_parameters(options)
    if given:
        raise UsageError(f"{flag(given[0])} came with --task {options.task}, which does not take it; leave it out.")
    if not restores and options.oversize != "refuse":
        raise UsageError(f"--{options.oversize} came with --task {INPAINT}, which solves any size; leave it out.")
    if restores:
        if "jpeg" in options.task.split("+") and options.quality is None:
            raise UsageError(f"--task {options.task} came without --quality; expected that of all images, 1 to 100.")
        return restoration(options)
    if options.mask is None and not any(options.outpaint):
        raise UsageError(f"--task {INPAINT} came without --mask; {_A_MASK}, or --outpaint.")
    if options.mask is not None and not options.mask.exists():
        raise UsageError(f"--task {INPAINT} came with --mask {options.mask}, which does not exist; {_A_MASK}.")
    return inpainting(options)
