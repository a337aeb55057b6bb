"""The command line: ``vml-ldm demo`` and ``vml-ldm inpaint``. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import vml_ldm

if TYPE_CHECKING:
    from PIL import Image

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
PRESETS = ("fast", "balanced", "best")


class UsageError(Exception):
    """Something the user can put right; shown as one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 the user's error, 130 interrupted)."""
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
        prog="vml-ldm", description="Inpainting with latent diffusion models by variational mode-seeking."
    )
    parser.add_argument("--version", action="version", version=f"vml-ldm {vml_ldm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inpaint(commands.add_parser("inpaint", help="repaint the white part of a mask in an image"))
    _add_demo(commands.add_parser("demo", help="compare with stock inpainting on images kept from training"))
    return parser


def _add_inpaint(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Repaint the white part of MASK in IMAGE. Pixels where the mask is black come back unchanged. "
        "An image larger or smaller than what the model was trained on is solved at the model's size."
    )
    parser.add_argument("image", metavar="IMAGE", type=Path)
    parser.add_argument("mask", metavar="MASK", type=Path, help="as large as IMAGE; white is repainted")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="file to write (PNG)")
    parser.add_argument("--prompt", default="", help="what to paint (default: nothing in particular)")
    _add_shared(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, help="speed against quality (default: the pipeline's)")
    parser.add_argument(
        "--size", type=_positive, metavar="PIXELS", help="shorter side to solve at (default: the model's)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.set_defaults(run=inpaint)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Inpaint images that the bundled checkpoint was not trained on, with stock diffusers inpainting and "
        "with ours: a sheet of pictures and a table. A run that was interrupted goes on where it was."
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("vml-ldm-demo"))
    parser.add_argument("--full", action="store_true", help="32 images, four methods: the README's table")
    parser.add_argument("--images", type=_positive, metavar="N", help="default: 4, with --full 32")
    parser.add_argument("--masks", metavar="NAMES", help="comma-separated; default: all five")
    parser.add_argument("--split", choices=("held-out", "validation"), default="held-out")
    _add_shared(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    parser.add_argument("--batch", type=_positive, default=4, metavar="N", help="images at a time")
    parser.set_defaults(run=demo)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        help="folder of a Stable Diffusion 1.x or 2.x checkpoint (default: the bundled one)",
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: the pipeline's (50)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="default: the pipeline's (7.5)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


# demo


def demo(options: argparse.Namespace) -> int:
    """Run the comparison and print its table."""
    from vml_ldm.evaluation.rows import RowFile

    try:
        rows = RowFile(options.output)
    except FileExistsError as error:
        raise UsageError(_one_line(error)) from error
    model = _checkpoint(options.model)
    masks, count, split = _chosen(options)
    pipe = _load(model)
    from vml_ldm.evaluation.demo import FULL_METHODS, SHORT_METHODS, Plan, run

    plan = Plan(
        model=model,
        methods=FULL_METHODS if options.full else SHORT_METHODS,
        masks=masks,
        images=count,
        split=split,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        batch=options.batch,
    )
    try:
        table = run(plan, pipe, rows)
    except KeyboardInterrupt:
        print(f"\nThe rows so far are kept in {options.output}; the same command goes on from there.", file=sys.stderr)
        raise
    print(f"\n{table}\n{_peak_memory()}\nTable, rows and pictures are in {options.output}.")
    return 0


def _chosen(options: argparse.Namespace) -> tuple[tuple[str, ...], int, str]:
    """Masks, number of images and split of a comparison, checked."""
    from vml_ldm.assets import example_images
    from vml_ldm.evaluation.tasks import MASKS

    masks = tuple(options.masks.split(",")) if options.masks else MASKS
    if unknown := [mask for mask in masks if mask not in MASKS]:
        raise UsageError(f"no mask is called {unknown[0]!r}; expected some of {','.join(MASKS)}.")
    split = options.split.replace("-", "_")
    count, most = options.images or (32 if options.full else 4), len(example_images(split))
    if count > most:
        raise UsageError(f"{count} images came with --images; expected at most {most}, which the package holds.")
    return masks, count, split


def _peak_memory() -> str:
    """The most memory this process has held, as a sentence; empty where the system does not tell."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"Peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB."


# inpaint


def inpaint(options: argparse.Namespace) -> int:
    """Inpaint one image file."""
    _check_output(options.output, options.force)
    _check_exists(options.image)
    _check_exists(options.mask)
    image, known = _open_pair(options.image, options.mask)
    pipe = _load(_checkpoint(options.model))
    from vml_ldm.fitting import Fit
    from vml_ldm.images import to_pil

    stride = pipe.vae_scale_factor
    fit = Fit.choose(tuple(image.shape[2:]), pipe.unet.config.sample_size * stride, stride, options.size)
    print(fit.text())
    painted, report = _solve(pipe, *fit.bring(image, known), options)
    (result,) = to_pil(fit.take_back(painted, image, known))
    result.save(options.output)
    print(report.text())
    print(f"wrote {options.output}{_lossy_note(options.output)}")
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
        raise UsageError(_one_line(error)) from error
    return out.images.float().cpu(), out.report


def _open_pair(image_path: Path, mask_path: Path):
    """The image (1, 3, H, W) and what of it is known (1, 1, H, W), from files; a mask's white is repainted."""
    from vml_ldm.images import from_pil, upright_mask, upright_rgb

    image, mask = upright_rgb(_read_image(image_path)), upright_mask(_read_image(mask_path))
    if image.size != mask.size:
        raise UsageError(
            f"{mask_path} has {mask.width} x {mask.height} pixels and {image_path} {image.width} x {image.height}; "
            "expected the same. Resize the mask."
        )
    return from_pil(image), 1 - from_pil(mask)[:, :1]


def _read_image(path: Path) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is no image that can be read ({_one_line(error)}).") from error
    return image


def _check_exists(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; expected an image file.")


def _check_output(path: Path, force: bool) -> None:
    """Refuse, before any work, a file that cannot be written or is not to be overwritten."""
    from PIL import Image

    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
        raise UsageError(f"{path} {what}; expected a file to write in a folder that exists.")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"{path} ends in {path.suffix!r}; expected an image format, such as .png.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists. Pass --force to overwrite it, or another name.")


def _lossy_note(path: Path) -> str:
    if path.suffix.lower() in (".png", ".tif", ".tiff", ".bmp"):
        return ""
    return f" ({path.suffix} may lose detail; save as .png to keep the known pixels exactly)"


# both


def _checkpoint(folder: Path | None) -> str:
    """The folder of a checkpoint, the bundled one for None."""
    if folder is None:
        try:
            return vml_ldm.bundled_model()
        except FileNotFoundError as error:
            raise UsageError(_one_line(error)) from error
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {what}; expected a Stable Diffusion checkpoint in diffusers' layout.")
    return str(folder)


def _load(model: str):
    """The pipeline of a checkpoint, on the GPU if there is one."""
    _quiet()
    import torch

    from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline

    try:
        pipe = VMLInpaintPipeline.from_pretrained(model, safety_checker=None, local_files_only=True)
    except Exception as error:  # loaders of four libraries, each with its own errors
        raise UsageError(f"{model} does not load as a Stable Diffusion checkpoint ({_one_line(error)}).") from error
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _quiet() -> None:
    """Keep the libraries' advice and loading bars off the terminal; their errors still show."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
