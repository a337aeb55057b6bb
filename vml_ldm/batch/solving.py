"""Batches of image files by one pipeline and one task: results to be written, and a record for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import diffusers
import torch
from torch import Tensor

import vml_ldm
from vml_ldm.images import Depth, save_image
from vml_ldm.manifest import Write
from vml_ldm.posing import Inpaint, Restore, digest, model_sizes

_OF_ONE_IMAGE = (ValueError, RuntimeError, FloatingPointError)  # what an image may raise without ending the run


def image_seed(seed: int, name: str) -> int:
    """The seed of an image's generator, from the run's seed and the file's name: 53 bits, exact in any JSON."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()[:8], "big") >> 11


def output(name: str) -> str:
    """The name of an image's result."""
    return f"{Path(name).stem}.png"


def source(task: Restore | Inpaint, path: Path) -> str | None:
    """What the files of an image hold, as a digest; None where they cannot be read."""
    try:
        return digest(task.files(path))
    except ValueError:
        return None


@dataclass(frozen=True)
class Solver:
    """Solves batches of files by one pipeline and one task."""

    pipe: Callable
    task: Restore | Inpaint
    folder: Path
    prompt: str
    seed: int
    settings: dict
    arguments: dict

    def solve(self, names: list[str]) -> tuple[list[dict], list[Write]]:
        """A record for each name, and for each that has an output in it what writes the file."""
        problems: dict[str, tuple[Tensor, ...]] = {}
        done: dict[str, tuple[dict, Write | None]] = {}
        for name in names:
            try:
                problems[name] = self.task.read(self.folder / name)
            except ValueError as error:
                done[name] = _failure(name, error)
        for group in _by_shape(problems):
            done |= self._solve(group)
        records = [done[name][0] for name in names]
        return records, [write for _, write in (done[name] for name in names) if write is not None]

    def _solve(self, group: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[dict, Write | None]]:
        """Images of one size, at once; if that fails one by one, so that a bad image fails alone."""
        try:
            return self._call(group)
        except _OF_ONE_IMAGE as error:
            if len(group) == 1:
                return {name: _failure(name, error) for name in group}
        done = {}
        for name, problem in group.items():
            done |= self._solve({name: problem})
        return done

    def _call(self, group: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[dict, Write]]:
        names = list(group)
        seeds = [image_seed(self.seed, name) for name in names]
        posed = self.task.pose(*map(torch.cat, zip(*group.values(), strict=True)), **model_sizes(self.pipe))
        out = self.pipe(
            prompt=self.prompt,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            return_report=True,
            **{**posed.arguments, **self.arguments},
        )
        images, report = posed.take_back(out.images.float().cpu()).split(1), out.report
        flagged = out.nsfw_content_detected or [False] * len(names)
        shared = {
            "settings": self.settings,
            "batch": names,
            "seconds": report.seconds["total"] / len(names),
            "calls": report.calls,
            "retries": report.retries,
            "memory": {**report.memory, "free": self.pipe.free_memory},
            "versions": self._versions,
        }
        done = {}
        for i, (name, image) in enumerate(zip(names, images, strict=True)):
            own = {"file": name, "output": output(name), "source": source(self.task, self.folder / name)}
            figures = {key: getattr(report, key)[i] for key in ("residual", "vae_error", "effective_sigma_y")}
            write = partial(_write, image=image, depth=self.task.depth(self.folder / name))
            done[name] = {**own, "seed": seeds[i], **figures, "flagged": bool(flagged[i]), **shared}, write
        return done

    @cached_property
    def _versions(self) -> dict:
        device = self.pipe.device
        return {
            **{"vml_ldm": vml_ldm.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        }


def _write(file: BinaryIO, image: Tensor, depth: Depth) -> None:
    save_image(image, file, depth, "PNG")


def _failure(name: str, error: Exception) -> tuple[dict, None]:
    return {"file": name, "error": " ".join(str(error).split()) or type(error).__name__}, None


def _by_shape(problems: dict[str, tuple[Tensor, ...]]) -> list[dict[str, tuple[Tensor, ...]]]:
    """Problems whose tensors have the same shapes, together, in order."""
    groups: dict[tuple, dict] = {}
    for name, tensors in problems.items():
        groups.setdefault(tuple(tensor.shape for tensor in tensors), {})[name] = tensors
    return list(groups.values())
