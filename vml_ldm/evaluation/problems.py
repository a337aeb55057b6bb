"""The problems that restoration is compared on: a task's operator, drawn for given seeds, and what it shows of images.

    sr4, sr8          a quarter, an eighth of the sides, antialiased bicubic
    deblur            Gaussian blur, standard deviation 3 pixels
    motion            motion blur, a path of 15 pixels drawn from the image's seed
    box, half         a box in the centre, the right half missing
    random            80 % of the pixels missing, drawn from the image's seed
    jpeg              quality 10
    colorize          luma alone
    hdr               contrast doubled about mid-grey, clipped
    phase             magnitudes of the Fourier transform, oversampled by 2

Where ``vml-ldm restore`` has a task of that name, this is the same with its defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vml_ldm import damage
from vml_ldm.evaluation.comparison import Case, stack_truth
from vml_ldm.evaluation.tasks import stack_masks
from vml_ldm.operators import Blur, Mask, Measurement, Operator, PhaseRetrieval

MASKED = ("box", "half", "random")
LINEAR = ("sr4", "sr8", "deblur", "motion", *MASKED, "colorize")
TASKS = ("sr4", "sr8", "deblur", "motion", *MASKED, "jpeg", "colorize", "hdr", "phase")
NOISES = (0.0, 0.01, 0.05)
_NOISE_STREAM = 1_000_003  # added to an image's seed: the solvers begin with numbers drawn from the seed itself


def make_operator(task: str, size: int, seeds: Sequence[int]) -> Operator:
    """The operator of a task for images (B, 3, size, size), one for each seed.

    Raises:
        ValueError: no task of that name.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}.")
    if task in MASKED:
        return Mask(stack_masks(task, size, size, seeds))
    if task == "phase":
        return PhaseRetrieval()
    if task == "motion":
        return Blur(torch.cat([damage.shaken(kernel_seed=seed).make(1.0).kernel for seed in seeds]))
    return damage.TASKS[task]().make(1.0)


@dataclass(frozen=True)
class Problem:
    """A batch of images as one task shows them.

    Attributes:
        operator, y: A, and ``A(truth) + n``, ``n ~ N(0, sigma_y^2 I)`` drawn from each image's seed alone, the same up
            to its size in every task that has y of one shape.
        round_trip: (B, 3, H, W), Dec(Enc(truth)), not clamped. It knows the truth: only the ceiling may look.
        vae_error: (B,), e, rms of ``A(truth) - A(round_trip)``.
    """

    task: str
    sigma_y: float
    operator: Operator
    y: Tensor
    prompts: list[str]
    seeds: list[int]
    round_trip: Tensor
    vae_error: Tensor

    @property
    def expected(self) -> Tensor:
        """(B,): ``sqrt(sigma_y^2 + e^2)``, the residual of the truth after the VAE's round trip, in the mean."""
        return (self.sigma_y**2 + self.vae_error**2).sqrt()

    @property
    def measurement(self) -> Measurement:
        """y with its operator, of unit sigma_y."""
        return Measurement(self.operator, self.y, 1.0)

    def residual(self, image: Tensor) -> Tensor:
        """(B,): rms of ``y - A(image)`` over what was measured."""
        return self.measurement.rms(self.measurement.residual(image))


def pose(task: str, sigma_y: float, cases: Sequence[Case], round_trip: Tensor) -> Problem:
    """A task's problem of some images, all of one size; `round_trip` is what the VAE makes of them."""
    truth, seeds = stack_truth(cases), [case.seed for case in cases]
    operator = make_operator(task, truth.shape[-1], seeds)
    clean = operator(truth)
    noise = [torch.randn(clean.shape[1:], generator=Generator().manual_seed(_NOISE_STREAM + seed)) for seed in seeds]
    exact = Measurement(operator, clean, 1.0)
    return Problem(
        task,
        sigma_y,
        operator,
        clean + sigma_y * torch.stack(noise) * _is_seen(operator),
        [case.prompt for case in cases],
        seeds,
        round_trip,
        exact.rms(exact.residual(round_trip)),
    )


def _is_seen(operator: Operator) -> Tensor | float:
    """1 where y is measured: a mask's missing pixels have no noise either."""
    return operator.mask if isinstance(operator, Mask) else 1.0


def turn_if_nearer(image: Tensor, truth: Tensor) -> Tensor:
    """Each image (B, 3, H, W), or its turn by 180 degrees if nearer: phase retrieval cannot tell them apart."""
    turned = image.flip(2, 3)
    worse, better = ((x - truth).square().mean((1, 2, 3), keepdim=True) for x in (image, turned))
    return torch.where(better < worse, turned, image)
