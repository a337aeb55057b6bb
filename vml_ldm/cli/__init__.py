"""The command line ``vml-ldm`` and its commands. Heavy imports wait."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import vml_ldm

from . import app, batch, benchmark, demo, inpaint, prompts, restore
from .files import UsageError

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
OVERSIZE = {
    "resize": "shrink it first",
    "crop": "use its middle",
    "whole": "solve it at its size all the same",
}
PRESETS = ("fast", "balanced", "best")
SOLVERS = ("vml", "red-diff")
STARTS = ("noise", "measurement", "outline")
TASKS = {
    "sr4": "a picture a quarter as wide and high",
    "sr8": "an eighth as wide and high",
    "deblur": "a Gaussian blur",
    "motion": "motion blur along a path drawn from a seed",
    "kernel": "blur by a kernel that you have",
    "jpeg": "JPEG compression",
    "colorize": "no colours",
    "hdr": "shadows and lights clipped",
    "crop": "surroundings cut off (outpainting)",
    "gamma": "a tone curve",
    "nonlinear": "a Gaussian blur of light, not of pixel values",
    "rows": "every other row, or column, cut out",
}
JOIN = "+"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 not all images, 2 the user's error, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"vml-ldm {options.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"\nvml-ldm {options.command}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vml-ldm",
        description="Inpainting and restoration with latent diffusion models by variational mode-seeking.",
    )
    parser.add_argument("--version", action="version", version=f"vml-ldm {vml_ldm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inpaint(commands.add_parser("inpaint", help="repaint the white part of a mask in an image"))
    _add_restore(commands.add_parser("restore", help="an image from a small, blurred, compressed, ... one"))
    _add_batch(commands.add_parser("batch", help="inpaint or restore every image of a folder"))
    _add_app(commands.add_parser("app", help="a web page for both, on this machine only"))
    _add_demo(commands.add_parser("demo", help="compare with stock inpainting on images kept from training"))
    _add_benchmark(commands.add_parser("benchmark", aliases=["bench"], help="compare restoration with other solvers"))
    _add_prompts(commands.add_parser("prompts", help="compare with stock inpainting by what a prompt asks for"))
    return parser


def _add_inpaint(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Repaint the white part of MASK in IMAGE. Pixels where the mask is black come back unchanged. "
        "An image larger or smaller than what the model was trained on is solved at the model's size."
    )
    parser.add_argument("image", metavar="IMAGE", type=Path)
    parser.add_argument(
        "mask", metavar="MASK", type=Path, nargs="?", help="as large as IMAGE; white is repainted; none with --outpaint"
    )
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="file to write (PNG)")
    _add_painting(parser)
    _add_mask_tools(parser.add_argument_group("the mask"))
    parser.set_defaults(run=inpaint.run)


def _add_mask_tools(group: argparse._ArgumentGroup) -> None:
    """What the commands that inpaint share."""
    group.add_argument("--grow", type=int, default=0, metavar="PIXELS", help="grow the white part; below 0 shrink it")
    group.add_argument("--feather", type=int, default=0, metavar="PIXELS", help="let it fade beyond its edge")
    group.add_argument("--fill", action="store_true", help="what it encloses is repainted too")
    group.add_argument(
        "--cutoff", type=float, metavar="VALUE", help="0 to 1: what is brighter is white, all else black"
    )
    group.add_argument(
        "--outpaint",
        type=_margins,
        default=(0, 0, 0, 0),
        metavar="L,T,R,B",
        help="paint so many pixels beyond the picture: left, top, right, bottom",
    )
    group.add_argument(
        "--size", type=_positive, metavar="PIXELS", help="shorter side to solve at (default: the model's)"
    )


def _margins(text: str) -> tuple[int, ...]:
    """Four whole numbers >= 0, or one for all sides."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    found = 4 * found if len(found) == 1 else found
    if len(found) != 4 or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} are no margins; expected left,top,right,bottom, such as 0,64,0,64")
    return found


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find an image whose damage by the task gives IMAGE, the measurement, which is taken as it is: sr4 makes a "
        "picture of 128 pixels one of 512. One whose result would be much larger than what the model was trained on is "
        "refused, unless --resize, --crop or --whole says what to do."
    )
    parser.add_argument("image", metavar="IMAGE", type=Path)
    _add_task(parser)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="file to write (PNG)")
    parser.add_argument(
        "--simulate", action="store_true", help="IMAGE is clean: damage it first, and write that to OUT-measured.png"
    )
    _add_painting(parser)
    _add_damage(parser)
    parser.set_defaults(run=restore.run)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Solve every image of FOLDER and write PNG files and manifest.jsonl into OUT. A run that was interrupted goes "
        "on where it was. In several processes, also on several machines that share both folders: "
        "accelerate launch --multi_gpu --num_processes N -m vml_ldm.cli batch FOLDER ... (also without a GPU)"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    _add_task(parser, {batch.INPAINT: "repaint the white part of a mask"})
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="folder of the results")
    _add_batch_size(parser)
    _add_painting(parser)
    painting = parser.add_argument_group("inpainting")
    painting.add_argument("--mask", metavar="PATH", type=Path, help="of all images; or a folder, a mask for each name")
    _add_mask_tools(painting)
    _add_damage(parser)
    parser.set_defaults(run=batch.run)


def _add_task(parser: argparse.ArgumentParser, alone: dict[str, str] | None = None) -> None:
    """Args: alone: tasks that are not joined to others."""
    alone = alone or {}
    described = "; ".join(f"{name}: {what}" for name, what in {**alone, **TASKS}.items())

    def task(text: str) -> str:
        if unknown := [name for name in text.split(JOIN) if name not in TASKS and text not in alone]:
            expected = ", ".join((*alone, *TASKS))
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no task; expected {expected}, or several as sr4+jpeg")
        return text

    parser.add_argument(
        "--task",
        type=task,
        metavar="TASK",
        required=True,
        help=f"{described}. Several, as sr4+jpeg, happened to the picture in this order",
    )


def _add_damage(parser: argparse.ArgumentParser) -> None:
    """What the commands that restore share."""
    parser.add_argument(
        "--noise", type=_not_negative, default=0.0, metavar="STD", help="of the measurement, in [0, 1] (default: 0)"
    )
    parser.add_argument("--solver", choices=SOLVERS, help="default: the pipeline's (vml)")
    parser.add_argument(
        "--start",
        choices=STARTS,
        help="noise paints a grey picture more vividly (default: by what the picture tells of the result)",
    )
    parser.set_defaults(oversize="refuse")
    large = parser.add_mutually_exclusive_group()
    for name, what in OVERSIZE.items():
        large.add_argument(f"--{name}", dest="oversize", action="store_const", const=name, help=f"too large: {what}")
    damage = parser.add_argument_group("the damage")
    damage.add_argument("--mode", choices=("bicubic", "average"), help="of sr4 and sr8 (default: bicubic)")
    damage.add_argument("--std", type=float, metavar="PIXELS", help="of deblur's and nonlinear's Gaussian (default: 3)")
    damage.add_argument("--length", type=float, metavar="PIXELS", help="of motion's path (default: 15)")
    damage.add_argument("--intensity", type=float, help="of motion, 0 (straight) to 1 (shaking) (default: 0.5)")
    damage.add_argument("--kernel-seed", type=int, metavar="SEED", help="of motion's path (default: 0)")
    damage.add_argument("--kernel", type=Path, metavar="FILE", help="a picture of kernel's kernel, black around it")
    damage.add_argument(
        "--quality", type=int, help="that jpeg was saved with, 1 to 100 (default: a JPEG file's own, or 10)"
    )
    damage.add_argument("--contrast", type=float, help="of hdr, > 0 (default: 2)")
    damage.add_argument(
        "--margin", type=_margin, metavar="PIXELS", help="that crop lost on each side, or ABOVE,RIGHT,BELOW,LEFT (16)"
    )
    damage.add_argument("--gamma", type=float, help="of gamma and nonlinear (default: 2.2)")
    damage.add_argument("--rows", type=_positive, metavar="N", help="of rows: every N-th was kept (default: 2)")
    damage.add_argument("--columns", type=_positive, metavar="N", help="of rows: every N-th was kept (default: 1)")


def _add_app(parser: argparse.ArgumentParser) -> None:
    parser.description = "Paint a hole or choose a damage, watch the solve, compare and download: a page at 127.0.0.1."
    _add_model(parser)
    parser.add_argument("--port", type=_positive, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="do not open the page")
    parser.set_defaults(run=app.run)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Inpaint images that the bundled checkpoint was not trained on, with stock diffusers inpainting and "
        "with ours: a sheet of pictures and a table. A run that was interrupted goes on where it was."
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("vml-ldm-demo"))
    parser.add_argument("--full", action="store_true", help="32 images, four methods: the table in docs/results.md")
    parser.add_argument("--images", type=_positive, metavar="N", help="default: 4, with --full 32")
    parser.add_argument("--masks", metavar="NAMES", help="comma-separated; default: all five")
    parser.add_argument("--split", choices=("held-out", "validation"), default="held-out")
    _add_shared(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    _add_batch_size(parser)
    parser.set_defaults(run=demo.run)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Restore images that the bundled checkpoint was not trained on, by VML, other solvers and naive answers, from "
        "many measurements: rows, a table and sheets of pictures. A run that was interrupted goes on where it was."
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="default: vml-ldm-benchmark, with --tune vml-ldm-tuning-METHOD"
    )
    parser.add_argument("--short", action="store_true", help="2 images, 3 tasks, one noise: minutes on a CPU")
    parser.add_argument("--images", type=_positive, metavar="N", help="default: 24, with --tune 4")
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="comma-separated; default: all eleven, sr4, sr8, deblur, motion, box, half, random, jpeg, colorize, hdr, "
        "phase",
    )
    parser.add_argument("--noise", type=benchmark.noises, metavar="STDS", help="default: 0,0.01,0.05")
    parser.add_argument(
        "--methods",
        metavar="NAMES",
        help="comma-separated, others are compared to the first; default: vml, vml-free, red-diff, red-diff-tuned, "
        "start, smooth, bicubic, telea, vae-round-trip. Also: stock (diffusers' "
        "inpainting), latent-dps, psld, resample, flow-dps, latent-daps, latino, ding, guess-guide, "
        "azula-dps, azula-pigdm, azula-mmps, "
        "azula-tmpd, azula-diffpir, and forms of vml: vml-fast, vml-32, vml-40, vml-66, vml-82, vml-best, vml-noise, "
        "vml-outline, vml-full-decoder, vml-small-decoder, vml-small-decoder-free",
    )
    parser.add_argument("--split", choices=("held-out", "validation"), help="default: held-out, with --tune validation")
    parser.add_argument(
        "--tune",
        nargs="?",
        const="red-diff",
        metavar="METHOD",
        help="look for its best settings for each task, on a grid: red-diff (if none is named), stock, or another "
        "solver of those below --methods",
    )
    parser.add_argument(
        "--points", metavar="NAMES", help='with --tune: only these of the grid, as in "zeta 1,zeta 3" (see its table)'
    )
    parser.add_argument(
        "--part", type=benchmark.part, default=(1, 1), metavar="I/N", help="only this part of the images, in DIR too"
    )
    parser.add_argument(
        "--equal", choices=("seconds", "calls"), help="every solver takes the steps that cost what the first one costs"
    )
    parser.add_argument("--table", action="store_true", help="only make table and sheets of the rows that are there")
    parser.add_argument(
        "--cost", action="store_true", help="only time one solve against levels, inner steps, pixels and batch"
    )
    _add_precision(parser)
    _add_shared(parser)
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="how often each image is tried, with another seed each time; its means count (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    _add_batch_size(parser)
    parser.set_defaults(run=benchmark.run)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Paint what a prompt asks for into a hole, with stock diffusers inpainting and with ours, and rank the picture "
        "asked for among all that the bundled checkpoint was trained on. A run that was interrupted goes on where it "
        "was."
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("vml-ldm-prompts"))
    parser.add_argument("--short", action="store_true", help="8 prompts, one seed, fill-white-108: minutes on a CPU")
    parser.add_argument("--images", type=_positive, metavar="N", help="prompts (default: 48)")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="for each prompt (default: 2)")
    parser.add_argument(
        "--methods",
        metavar="NAMES",
        help="comma-separated: stock, balanced, fast, best, red-diff, flow-dps, latino, ding, guess-guide, each "
        "perhaps with a guidance scale as in fast@3 (default: stock@7.5,stock@3,balanced,fast,best)",
    )
    parser.add_argument(
        "--places",
        metavar="NAMES",
        help="comma-separated; default: all, fill-white-108, fill-white-84, fill-white-64, fill-blue-108, "
        "fill-emoji-84 (the side of the hole, of 128), replace, complete",
    )
    parser.add_argument("--table", action="store_true", help="only make table and sheets of the rows that are there")
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, help="of the training pictures (default: npm gets them, into --cache)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="for those and their features (default: DIR-gallery beside -o)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: the pipelines' (50)")
    _add_precision(parser)
    _add_model(parser)
    _add_batch_size(parser)
    parser.set_defaults(run=prompts.run)


def _add_painting(parser: argparse.ArgumentParser) -> None:
    """What the commands that write images share."""
    parser.add_argument("--prompt", default="", help="what to paint (default: nothing in particular)")
    _add_shared(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, help="speed against quality (default: the pipeline's)")
    parser.add_argument(
        "--proximal",
        action=argparse.BooleanOptionalAction,
        help="levels end by putting in what is known, or take inner steps alone (default: the task's)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    _add_precision(parser)
    parser.add_argument(
        "--memory",
        metavar="HOW",
        help="auto, fast, low, or a budget above the weights, such as 4GiB (default: the pipeline's, auto)",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    """Of the networks."""
    group = parser.add_mutually_exclusive_group()
    for name in ("float16", "bfloat16"):
        group.add_argument(
            f"--{name}", dest="dtype", action="store_const", const=name, help="networks in half precision"
        )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        help="folder of a Stable Diffusion checkpoint in diffusers' layout (default: the bundled one)",
    )


def _add_shared(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: the pipeline's (50)")
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="default: the pipeline's (inpaint 7.5, restore 1); demo 1"
    )


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=_positive, default=4, metavar="N", help="images at a time (default: %(default)s)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _margin(text: str) -> int | list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 4) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no margin; expected pixels >= 0, one number or four")
    return values[0] if len(values) == 1 else values


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number >= 0")
    return value
