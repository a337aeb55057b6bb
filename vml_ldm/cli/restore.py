"""``vml-ldm restore``: one image file that was damaged in a known way."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .files import (
    UsageError,
    check_exists,
    check_output,
    open_checkpoint,
    open_pipeline,
    refusing,
    solve,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vml_ldm.posing import Restore


def run(options: argparse.Namespace) -> int:
    """Restore one image file."""
    outputs = [options.output] + [_beside(options.output)] * options.simulate
    for path in outputs:
        check_output(path, options.force)
    check_exists(options.image)
    open_checkpoint(options.model)
    from vml_ldm.images import Depth, from_pil, read_image, save_image
    from vml_ldm.posing import model_sizes

    with refusing():
        picture = read_image(options.image)
    if not options.simulate:
        _tell_quality(options, picture)
    task = restoration(options)
    pipe = open_pipeline(options, task.kind)
    with refusing():
        if options.simulate:
            measured = _damaged(options.image, task, options.seed, model_sizes(pipe))
            y, depth = from_pil(measured, task.damage.channels), Depth()
        else:
            (y,), depth = task.read(options.image), task.depth(options.image)
        posed = task.pose(y, **model_sizes(pipe))
    print(posed.text)
    image, report = solve(pipe, options, **posed.arguments)
    bits = save_image(posed.take_back(image), options.output, depth)
    if options.simulate:
        measured.save(outputs[1])
    print(report.text())
    print(f"wrote {' and '.join(map(str, outputs))}{depth.note(bits)}")
    return 0


def _beside(output: Path) -> Path:
    """Where the measurement of a simulation goes."""
    return output.with_name(f"{output.stem}-measured.png")


def given_parameters(options: argparse.Namespace) -> dict:
    """The damage's parameters that were given."""
    from vml_ldm.damage import PARAMETERS

    return {name: getattr(options, name) for name in PARAMETERS if getattr(options, name) is not None}


def restoration(options: argparse.Namespace) -> Restore:
    """The task with its noise and parameters, those that were given; refuses what no picture could be solved with."""
    from vml_ldm.damage import parameters
    from vml_ldm.posing import Restore

    if (options.solver, options.start) == ("red-diff", "outline"):
        raise UsageError("--start outline came with --solver red-diff; expected --start noise or measurement.")
    given, known = given_parameters(options), parameters(options.task)
    if foreign := [name for name in given if name not in known]:
        raise UsageError(f"{flag(foreign[0])} came with --task {options.task}; expected {_named(known)}.")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in given]:
        raise UsageError(f"--task {options.task} came without {flag(missing[0])}; expected it.")
    if "kernel" in given:
        given["kernel"] = _read_kernel(given["kernel"])
    with refusing():
        return Restore(options.task, options.noise, oversize=options.oversize, **given)


def _tell_quality(options: argparse.Namespace, picture: Image.Image) -> None:
    """Take the quality of a picture that JPEG damaged last from its file, where none was named, and say so."""
    from vml_ldm.damage import parameters, split
    from vml_ldm.posing import jpeg_quality

    if split(options.task)[-1] != "jpeg" or options.quality is not None:
        return
    found = jpeg_quality(picture)
    if found is None:
        assumed = parameters("jpeg")["quality"].default
        print(f"quality    {assumed}, assumed: {options.image} is no JPEG file now; --quality names another")
        return
    options.quality, exact = found
    print(f"quality    {options.quality}, {'' if exact else 'about, '}by the steps in {options.image}")


def _read_kernel(path: Path) -> Tensor:
    """A picture as a kernel (h, w)."""
    from vml_ldm.images import from_pil, read_image

    check_exists(path)
    with refusing():
        kernel = from_pil(read_image(path))[0].mean(0)
    if not kernel.any():
        raise UsageError(f"{path} is all black; expected a picture of a kernel, bright where the light went.")
    return kernel


def _damaged(path: Path, task: Restore, seed: int, sizes: dict) -> Image.Image:
    """A clean picture, brought to a size that the model solves, after the damage and its noise: 8 bits, as a file."""
    from vml_ldm.images import read_pixels, to_pil

    clean = read_pixels(path)
    y = task.simulate(clean, seed, **sizes)
    height, width = task.damage.image_size(tuple(y.shape[2:]))
    print(f"simulated  from {clean.shape[3]} x {clean.shape[2]}, brought to {width} x {height} first")
    (measured,) = to_pil(y.expand(-1, 3, -1, -1))
    return measured if task.damage.channels == 3 else measured.convert("L")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _named(parameters: dict) -> str:
    return f"only {', '.join(map(flag, parameters))}" if parameters else "none of the damage's options"
