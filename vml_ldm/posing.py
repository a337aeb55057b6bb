"""Image files as problems that a pipeline solves, one or many at once: read, posed at a size it solves, taken back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vml_ldm.damage import damage, parameters
from vml_ldm.fitting import OVERSIZE, Fit, Window
from vml_ldm.images import (
    Depth,
    MaskEdit,
    check_margins,
    file_depth,
    mask_of,
    read_image,
    read_pixels,
    upright_size,
    widen,
)
from vml_ldm.operators.jpeg import quality_of


@dataclass(frozen=True)
class Posed:
    """Problems of one size as a pipeline's call.

    Attributes:
        text: one line that says what is done to the size.
        arguments: of the call: height, width, and what was measured.
        take_back: the pipeline's images (B, 3, height, width) -> results (B, 3, H, W), both in [0, 1].
    """

    text: str
    arguments: dict
    take_back: Callable[[Tensor], Tensor]


class Restore:
    """What ``vml-ldm restore`` does: an image whose damage by a task gives the file.

    Args:
        task: names in `vml_ldm.damage.TASKS`, joined by "+" in the order in which the picture met them.
        noise: standard deviation of the measurement's noise, in [0, 1].
        oversize: what is done to a picture whose result is too large for the model, see `Window.choose`.
        parameters: of the task.

    Raises:
        ValueError: an unknown task, or a parameter that its operator refuses.
        TypeError: a parameter that the task does not have.
    """

    kind = "restore"  # of task, see `vml_ldm.families`

    def __init__(self, task: str, noise: float = 0.0, *, oversize: str = "refuse", **parameters):
        if oversize not in OVERSIZE:
            raise ValueError(f"oversize is {oversize!r}; expected one of {', '.join(OVERSIZE)}.")
        self.task, self.noise, self.oversize, self.parameters = task, noise, oversize, parameters
        self.damage = damage(task, **parameters)

    def settings(self) -> dict:
        """All that the task depends on beside the files, as plain values; a tensor by its digest."""
        values = {name: p.default for name, p in parameters(self.task).items()} | self.parameters
        plain = {name: _digest(v.numpy().tobytes()) if isinstance(v, Tensor) else v for name, v in values.items()}
        return {"task": self.task, "noise": self.noise, "oversize": self.oversize, **plain}

    def files(self, path: Path) -> tuple[Path, ...]:
        """The files that one image's problem is read from."""
        return (path,)

    def read(self, path: Path) -> tuple[Tensor, ...]:
        """y (1, C, h, w) in [0, 1]. Raises ValueError for a file that is no image, or values that are not."""
        return (read_pixels(path, self.damage.channels),)

    def depth(self, path: Path) -> Depth:
        """What the result of an image file is written at: its own, but in colour where the damage took the colours."""
        depth = file_depth(path)
        return depth._replace(grey=depth.grey and self.damage.channels == 3)

    def pose(self, y: Tensor, *, native: int, stride: int) -> Posed:
        """y (B, C, h, w) at a size that the model solves; `native` and `stride` as in `model_sizes`."""
        window = Window.choose(
            tuple(y.shape[2:]),
            native,
            stride,
            grow=self.damage.image_size,
            scales=self.damage.scales,
            oversize=self.oversize,
        )
        height, width = window.canvas
        arguments = {
            "height": height,
            "width": width,
            "y": window.bring(y),
            "operator": window.see(self.damage.make(window.scale, window.image)),
            "sigma_y": self.noise * min(1.0, window.scale),  # pixels that are averaged lose noise
        }
        return Posed(window.text(), arguments, window.take_back)

    def simulate(self, clean: Tensor, seed: int, *, native: int, stride: int) -> Tensor:
        """y of a clean picture (B, 3, H, W) in [0, 1]: the damage at a size that the model solves, and its noise."""
        window = Window.choose(tuple(clean.shape[2:]), native, stride, oversize="resize")
        size = tuple(self._whole(length, axis, stride) for axis, length in enumerate(window.scaled))
        y = self.damage.make(1.0, size)(window.bring(clean)[..., : size[0], : size[1]])
        return y + self.noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))

    def _whole(self, length: int, axis: int, stride: int) -> int:
        """The longest side, up to a length, of an image that this damage measures wholly; of the stride if it can be.

        Raises:
            ValueError: there is none that leaves anything of the picture.
        """
        seen = [self.damage.image_size((n, n))[axis] for n in range(1, length + 1)]
        fits = [n for n in seen if n <= length]
        if not fits:
            raise ValueError(
                f"{self.task} leaves nothing of {length} pixels; expected a larger picture, or less of it."
            )
        return max([n for n in fits if n % stride == 0] or fits)


class Inpaint:
    """What ``vml-ldm inpaint`` does: the white part of a mask is repainted.

    Args:
        mask: a file, the mask of every image; or a folder with a mask of the same name (before the ending) for each.
            None: nothing of the image is repainted, only its margins.
        shorter: side to solve at, in pixels; None is the model's choice, see `Fit.choose`.
        edit: what is done to masks first.
        margins: pixels that are painted around the image: left, top, right, bottom.

    Raises:
        ValueError: neither a mask nor margins; margins that are none.
    """

    kind = "inpaint"  # of task, see `vml_ldm.families`

    def __init__(
        self,
        mask: str | Path | None,
        shorter: int | None = None,
        *,
        edit: MaskEdit = MaskEdit(),  # noqa: B008 - frozen
        margins: Sequence[int] = (0, 0, 0, 0),
    ):
        if mask is None and not any(margins):
            raise ValueError("there is neither a mask nor a margin; expected one of them, or nothing is to be painted.")
        self.mask, self.shorter = None if mask is None else Path(mask), shorter
        self.edit, self.margins = edit, check_margins(margins)

    def settings(self) -> dict:
        """All that the task depends on beside the files, as plain values."""
        changed = {name: value for name, value in vars(self.edit).items() if value != getattr(MaskEdit(), name)}
        margins = {"margins": list(self.margins)} if any(self.margins) else {}
        return {"task": "inpaint", "size": self.shorter, **changed, **margins}

    def files(self, path: Path) -> tuple[Path, ...]:
        """The image's file and its mask's, if any. Raises ValueError unless there is one mask."""
        if self.mask is None:
            return (path,)
        if not self.mask.is_dir():
            return path, self.mask
        found = sorted(mask for mask in self.mask.iterdir() if mask.stem == path.stem and mask.is_file())
        if len(found) != 1:
            names = f" ({', '.join(mask.name for mask in found)})" if found else ""
            raise ValueError(f"{path.name} has {len(found)} masks in {self.mask}{names}; expected one of its name.")
        return path, found[0]

    def read(self, path: Path) -> tuple[Tensor, ...]:
        """Image (1, 3, H, W) and what of it is known (1, 1, H, W), 1 = known.

        Raises:
            ValueError: a file that is no image, no mask, or a mask of another size; values that are no image's where
                they are known.
        """
        size, painted = upright_size(read_image(path)), None
        for mask_path in self.files(path)[1:]:
            painted = mask_of(read_image(mask_path), str(mask_path))
            found = tuple(painted.shape[2:])
            if size != found:
                raise ValueError(
                    f"{mask_path} has {found[1]} x {found[0]} pixels and {path} {size[1]} x {size[0]}; expected the "
                    "same. Resize the mask."
                )
        painted = torch.zeros(1, 1, *size) if painted is None else self.edit.apply(painted)
        image, painted = widen(read_pixels(path, known=1 - painted), painted, self.margins)
        return image, 1 - painted

    def depth(self, path: Path) -> Depth:
        """What the result of an image file is written at: its own."""
        return file_depth(path)

    def pose(self, image: Tensor, known: Tensor, *, native: int, stride: int) -> Posed:
        """Images (B, 3, H, W) with what is known (B, 1, H, W) at a size that the model solves."""
        return pose_hole(image, known, native=native, stride=stride, shorter=self.shorter)


def pose_hole(image: Tensor, known: Tensor, *, native: int, stride: int, shorter: int | None = None) -> Posed:
    """Images (B, 3, H, W) with what is known (B, 1, H, W) for the inpaint pipeline; sizes as of `Fit.choose`."""
    fit = Fit.choose(tuple(image.shape[2:]), native, stride, shorter)
    canvas, seen = fit.bring(image, known)
    size = {"height": canvas.shape[2], "width": canvas.shape[3]}
    arguments = {**size, "image": canvas, "mask_image": 1 - seen, "strength": 1.0}  # nothing of the hole is a start
    return Posed(fit.text(), arguments, lambda painted: fit.take_back(painted, image, known))


def model_sizes(pipe) -> dict[str, int]:
    """Of a model, in pixels: `native`, the side of its images, and `stride`, of which its sides are multiples."""
    config, scale = denoiser(pipe).config, pipe.vae_scale_factor
    return {"native": config.sample_size * scale, "stride": (getattr(config, "patch_size", None) or 1) * scale}


def denoiser(pipe):
    """A pipeline's network that denoises: its UNet, or the transformer of flow models."""
    return getattr(pipe, "unet", None) or pipe.transformer


def jpeg_quality(picture) -> tuple[int, bool] | None:
    """The quality that a PIL image's file was saved with, and whether that is exact; None of a file that is no JPEG."""
    tables = getattr(picture, "quantization", None)
    return quality_of(tables[0]) if tables and 0 in tables else None


def digest(paths: tuple[Path, ...]) -> str:
    """What the files hold, as 16 characters. Raises ValueError for one that cannot be read."""
    try:
        return _digest(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
