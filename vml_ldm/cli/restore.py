"""``vml-ldm restore``: one image file that was damaged in a known way."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING

from .files import UsageError, check_exists, check_output, load, one_line, open_checkpoint, read_image, solve

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vml_ldm.damage import Damage

_PARAMETERS = ("mode", "std", "length", "intensity", "kernel_seed", "kernel", "quality", "contrast")


def run(options: argparse.Namespace) -> int:
    """Restore one image file."""
    outputs = [options.output] + [_beside(options.output)] * options.simulate
    for path in outputs:
        check_output(path, options.force)
    check_exists(options.image)
    picture, damage = read_image(options.image), _damage(options)
    pipe = load(open_checkpoint(options.model), "VMLRestorePipeline")
    from vml_ldm.fitting import Window
    from vml_ldm.images import to_pil

    sizes = {"native": pipe.unet.config.sample_size * pipe.vae_scale_factor, "stride": pipe.vae_scale_factor}
    if options.simulate:
        picture = _damaged(picture, damage, options, sizes)
    y = _to_tensor(picture, damage)
    window = Window.choose(tuple(y.shape[2:]), **sizes, factor=damage.factor, scales=damage.scales)
    print(window.text())
    image, report = solve(
        pipe,
        options,
        size=window.canvas,
        y=window.bring(y),
        operator=window.see(damage.make(window.scale)),
        sigma_y=options.noise * min(1.0, window.scale),  # pixels that are averaged lose noise
        solver=options.solver,
    )
    for path, result in zip(outputs, [*to_pil(window.take_back(image)), picture], strict=False):
        result.save(path)
    print(report.text())
    print(f"wrote {' and '.join(map(str, outputs))}")
    return 0


def _beside(output: Path) -> Path:
    """Where the measurement of a simulation goes."""
    return output.with_name(f"{output.stem}-measured.png")


def _damage(options: argparse.Namespace) -> Damage:
    """The task with its parameters, those that were given."""
    from vml_ldm.damage import TASKS

    make = TASKS[options.task]
    given = {name: getattr(options, name) for name in _PARAMETERS if getattr(options, name) is not None}
    known = {name: p for name, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if foreign := [name for name in given if name not in known]:
        raise UsageError(f"{_flag(foreign[0])} came with --task {options.task}; expected {_named(known)}.")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in given]:
        raise UsageError(f"--task {options.task} came without {_flag(missing[0])}; expected it.")
    if "kernel" in given:
        given["kernel"] = _read_kernel(given["kernel"])
    try:
        return make(**given)
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _read_kernel(path: Path) -> Tensor:
    """A picture as a kernel (h, w)."""
    from vml_ldm.images import from_pil

    check_exists(path)
    kernel = from_pil(read_image(path))[0].mean(0)
    if not kernel.any():
        raise UsageError(f"{path} is all black; expected a picture of a kernel, bright where the light went.")
    return kernel


def _damaged(picture: Image.Image, damage: Damage, options: argparse.Namespace, sizes: dict) -> Image.Image:
    """A clean picture, brought to a size that the model solves, after the damage and its noise: 8 bits, as a file."""
    from torch import Generator, randn

    from vml_ldm.fitting import Window
    from vml_ldm.images import from_pil, to_pil

    clean = from_pil(picture)
    window = Window.choose(tuple(clean.shape[2:]), **sizes)
    unit = math.lcm(sizes["stride"], damage.factor)
    height, width = (length // unit * unit for length in window.scaled)
    print(f"simulated  from {picture.width} x {picture.height}, brought to {width} x {height} first")
    y = damage.make(1.0)(window.bring(clean)[..., :height, :width])
    y = y + options.noise * randn(y.shape, generator=Generator().manual_seed(options.seed))
    (measured,) = to_pil(y.expand(-1, 3, -1, -1))
    return measured if damage.channels == 3 else measured.convert("L")


def _to_tensor(picture: Image.Image, damage: Damage) -> Tensor:
    """A picture as the damage's y, (1, C, h, w) in [0, 1]; colours that the damage takes away are left out."""
    from vml_ldm.images import from_pil, upright_rgb

    upright = upright_rgb(picture)
    return from_pil(upright) if damage.channels == 3 else from_pil(upright.convert("L"))[:, :1]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _named(parameters: dict) -> str:
    return f"only {', '.join(map(_flag, parameters))}" if parameters else "none of the damage's options"
