"""What the commands share: files in and out, checkpoints, memory, and errors that the user can put right."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vml_ldm
from vml_ldm.families import FAMILIES, INDEX, pipeline_of

_SLOW = "Note: this processor cannot calculate in {0}, which is many times slower here than float32. Leave --{0} out."


class UsageError(Exception):
    """Something the user can put right; shown as one line."""


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
    if not (folder / INDEX).is_file():
        what = f"has no {INDEX}" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {what}; expected a Stable Diffusion checkpoint in diffusers' layout.")
    return str(folder)


def open_pipeline(options: argparse.Namespace, kind: str, device=None, families: tuple[str, ...] = tuple(FAMILIES)):
    """The pipeline that solves a kind of task with the checkpoint that was asked for, in the precision that was.

    Args:
        families: that the command serves, see `vml_ldm.families`.
    """
    model = open_checkpoint(options.model)
    with refusing():
        name = pipeline_of(model, kind, families)
        if getattr(options, "memory", None) is not None:
            from vml_ldm.adapters.diffusers import parse_memory

            parse_memory(options.memory)
    return load(model, name, device, getattr(options, "dtype", None))


def load(model: str, pipeline: str, device=None, dtype: str | None = None):
    """A pipeline of ours, by its public name, of a checkpoint; on the GPU if there is one, or where it is asked for.

    Args:
        dtype: "float16", "bfloat16", or None: float32.
    """
    quiet()
    import torch

    from vml_ldm.posing import denoiser

    kind = getattr(vml_ldm, pipeline)
    unchecked = {"safety_checker": None} if "safety_checker" in inspect.signature(kind.__init__).parameters else {}
    precision = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype
            pipe = kind.from_pretrained(model, local_files_only=True, **precision, **unchecked)
    except Exception as error:  # loaders of four libraries, each with its own errors
        raise UsageError(f"{model} does not load as a Stable Diffusion checkpoint ({one_line(error)}).") from error
    for network in (denoiser(pipe), pipe.vae, pipe.gradient_vae):
        if network is not None:
            network.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is not None and pipe.device.type == "cpu" and not calculates_in(dtype):
        print(_SLOW.format(dtype), file=sys.stderr)
    return pipe


def calculates_in(dtype: str) -> bool:
    """Whether this processor's convolutions take "float16" or "bfloat16" as they are; True where torch does not know.

    Elsewhere torch goes through them value by value: on AVX2 a decode took 90 times float32's time.
    """
    import torch

    ask = {"float16": "_is_mkldnn_fp16_supported", "bfloat16": "_is_mkldnn_bf16_supported"}[dtype]
    return not torch.backends.mkldnn.is_available() or getattr(torch.ops.mkldnn, ask, lambda: True)()


@contextmanager
def refusing() -> Iterator[None]:
    """A ValueError inside is the user's to put right."""
    try:
        yield
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def asked(options: argparse.Namespace) -> dict:
    """The pipeline's arguments that were given; the others are left to the pipeline."""
    every = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "preset": options.preset,
        "proximal": options.proximal,
        "solver": getattr(options, "solver", None),
        "start": getattr(options, "start", None),
        "memory": options.memory,
    }
    return {name: value for name, value in every.items() if value is not None}


def solve(pipe, options: argparse.Namespace, **problem):
    """The pipeline's image (1, 3, height, width) on the CPU and its report; `problem` goes to the call as it is."""
    from torch import Generator

    with refusing():
        out = pipe(
            prompt=options.prompt,
            generator=Generator().manual_seed(options.seed),
            output_type="pt",
            return_report=True,
            **asked(options),
            **problem,
        )
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
