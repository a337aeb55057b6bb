"""What the commands share: files in and out, checkpoints, memory, and errors that the user can put right."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import vml_ldm

if TYPE_CHECKING:
    from PIL import Image


class UsageError(Exception):
    """Something the user can put right; shown as one line."""


def read_image(path: Path) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is no image that can be read ({one_line(error)}).") from error
    return image


def check_exists(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; expected an image file.")


def check_output(path: Path, force: bool) -> None:
    """Refuse, before any work, a file that cannot be written or is not to be overwritten."""
    from PIL import Image

    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
        raise UsageError(f"{path} {what}; expected a file to write in a folder that exists.")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"{path} ends in {path.suffix!r}; expected an image format, such as .png.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists. Pass --force to overwrite it, or another name.")


def lossy_note(path: Path) -> str:
    if path.suffix.lower() in (".png", ".tif", ".tiff", ".bmp"):
        return ""
    return f" ({path.suffix} may lose detail; save as .png to keep the known pixels exactly)"


def open_rows(folder: Path, **layout):
    """A comparison's `RowFile`; `layout` is its kind of row and its part."""
    from vml_ldm.evaluation.rows import RowFile

    try:
        return RowFile(folder, **layout)
    except FileExistsError as error:
        raise UsageError(one_line(error)) from error


def open_checkpoint(folder: Path | None) -> str:
    """The folder of a checkpoint, the bundled one for None."""
    if folder is None:
        try:
            return vml_ldm.bundled_model()
        except FileNotFoundError as error:
            raise UsageError(one_line(error)) from error
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {what}; expected a Stable Diffusion checkpoint in diffusers' layout.")
    return str(folder)


def load(model: str, pipeline: str):
    """A pipeline of ours, by its public name, of a checkpoint; on the GPU if there is one."""
    quiet()
    import torch

    kind = getattr(vml_ldm, pipeline)
    try:
        pipe = kind.from_pretrained(model, safety_checker=None, local_files_only=True)
    except Exception as error:  # loaders of four libraries, each with its own errors
        raise UsageError(f"{model} does not load as a Stable Diffusion checkpoint ({one_line(error)}).") from error
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def solve(pipe, options: argparse.Namespace, *, size: tuple[int, int], **problem):
    """The pipeline's image (1, 3, *size) on the CPU and its report; `problem` goes to the call as it is, without None.

    Options that were not given are left to the pipeline.
    """
    from torch import Generator

    asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "preset": options.preset}
    try:
        out = pipe(
            prompt=options.prompt,
            height=size[0],
            width=size[1],
            generator=Generator().manual_seed(options.seed),
            output_type="pt",
            return_report=True,
            **{name: value for name, value in {**asked, **problem}.items() if value is not None},
        )
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return out.images.float().cpu(), out.report


def named(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...] | None:
    """Comma-separated names, each a known one; None for none."""
    names = tuple(text.split(",")) if text else None
    if unknown := [name for name in names or () if name not in known]:
        raise UsageError(f"no {what} is called {unknown[0]!r}; expected some of {','.join(known)}.")
    return names


def check_count(count: int, split: str) -> None:
    """Refuse more images than the package holds of a split."""
    from vml_ldm.assets import example_images

    if count > (most := len(example_images(split))):
        raise UsageError(f"{count} images came with --images; expected at most {most}, which the package holds.")


def quiet() -> None:
    """Keep the libraries' advice and loading bars off the terminal; their errors still show."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def peak_memory() -> str:
    """The most memory this process has held, as a sentence; empty where the system does not tell."""
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"Peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB."
