"""deepinv as a host: a pipeline as its reconstructor. deepinv itself is not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..operators import Compose, Grayscale, Operator, from_physics


class VMLReconstructor(nn.Module):
    """A restoring pipeline called as deepinv calls its reconstructors: ``model(y, physics) -> x``.

    What deepinv evaluates, benchmarks and plots can then be this package's solver. The physics' operator becomes A,
    its noise model's standard deviation sigma_y. Each image has a generator, begun anew at each call.

    Args:
        pipe: a `VMLRestorePipeline` or another family's.
        prompt: what the images show.
        seed: of the first image's generator; the next have the next.
        options: more of the pipeline's arguments, such as `preset` or `num_inference_steps`.

    Example:
        >>> model = VMLReconstructor(pipe, num_inference_steps=20)  # doctest: +SKIP
        >>> x = model(physics(truth), physics)  # doctest: +SKIP
    """

    def __init__(self, pipe, prompt: str = "", seed: int = 0, **options):
        super().__init__()
        self.pipe, self.prompt, self.seed, self.options = pipe, prompt, seed, options

    def forward(self, y: Tensor, physics: Any, **options) -> Tensor:
        """The reconstruction (B, 1 or 3, H, W) in [0, 1] of what the physics measured.

        Args:
            y: (B, ...), as ``physics(x)`` gives it for images in [0, 1].
            physics: deepinv's, or an object with ``A`` and, if it is linear, ``A_adjoint``. It says how large images
                are by ``img_size`` (C, H, W); else its adjoint does.
            options: in place of those of the constructor; ``sigma_y`` where the noise model has no ``sigma``.

        Raises:
            TypeError: a y that is no tensor, such as the list of tensors of pan-sharpening; a physics whose image size
                is not to be found.
            ValueError: images of other than one or three channels, a noise without a standard deviation, or what the
                pipeline refuses.
        """
        if not isinstance(y, Tensor):
            raise TypeError(f"y is {type(y).__name__}; expected a tensor (B, ...). Of several measurements take one.")
        channels, height, width = _image_size(y, physics)
        operator = _of_channels(from_physics(physics), channels)
        given = {"sigma_y": _sigma_of(physics, y), **self.options, **options}
        if given["sigma_y"] is None:
            noise = type(getattr(physics, "noise_model", None)).__name__
            raise ValueError(f"{noise} has no standard deviation `sigma`; pass sigma_y=..., in units of y.")
        generator = [torch.Generator().manual_seed(self.seed + i) for i in range(len(y))]
        asked = {"height": height, "width": width, "generator": generator, "output_type": "pt"}
        images = self.pipe(self.prompt, y=y, operator=operator, **asked, **given).images
        return images if channels == 3 else images.mean(1, keepdim=True)


def _image_size(y: Tensor, physics: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that a physics measures."""
    size = getattr(physics, "img_size", None)
    if size is None and callable(getattr(physics, "A_adjoint", None)):
        size = physics.A_adjoint(y).shape[1:]
    if size is None or len(size) != 3:
        raise TypeError(f"{type(physics).__name__} does not tell how large its images are; give it img_size=(C, H, W).")
    if size[0] not in (1, 3):
        raise ValueError(f"{type(physics).__name__} is of images of {size[0]} channels; expected 1 or 3.")
    return tuple(map(int, size))


def _of_channels(operator: Operator, channels: int) -> Operator:
    """The operator on colour images: of grey ones it sees the light of a colour image."""
    return operator if channels == 3 else Compose(Grayscale(), operator)


def _sigma_of(physics: Any, y: Tensor) -> Tensor | float | None:
    """Of the noise model: a number, or one for each image; None where it has none. Without a noise model 0."""
    noise = getattr(physics, "noise_model", None)
    if noise is None or type(noise).__name__ == "ZeroNoise":
        return 0.0
    sigma = getattr(noise, "sigma", None) if type(noise).__name__ == "GaussianNoise" else None
    return None if sigma is None else torch.as_tensor(sigma, dtype=torch.float32).flatten().expand(len(y))
