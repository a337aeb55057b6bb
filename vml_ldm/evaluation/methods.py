"""Who answers a problem in the comparison of restoration: VML, other solvers, and naive answers without a prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vml_ldm.evaluation import peers, stock, tuning
from vml_ldm.evaluation.problems import LINEAR, MASKED, TASKS, Problem
from vml_ldm.images import to_pil
from vml_ldm.operators import Downsample, Mask
from vml_ldm.presets import THROUGHOUT
from vml_ldm.red import RedDiff

_TELEA_RADIUS = 3  # pixels
_AZULA = "azula-"  # methods of azula's, by its names


class Answer(NamedTuple):
    """Images (B, 3, H, W) in [0, 1] on the CPU; (B,) rms of y - A(image), before the clamp; network calls, the seconds
    that were spent in them, and the solver's levels as a report's trace has them."""

    image: Tensor
    residual: Tensor
    calls: Mapping[str, int] = MappingProxyType({})
    in_networks: float = 0.0
    trace: Sequence[Mapping] = ()


@dataclass(frozen=True)
class Solver:
    """A solver of `VMLRestorePipeline`, by what it is passed for a task and a sigma_y.

    Attributes:
        alone: it takes one image at a time.
        module: what it needs installed.
    """

    name: str
    arguments: Callable[[str, float], dict]
    tasks: tuple[str, ...] = field(default=TASKS, repr=False)
    alone: bool = field(default=False, repr=False)
    module: str | None = None

    def settings(self, place: tuple[str, float]) -> dict:
        """What a row depends on."""
        return self.arguments(*place)

    def answer(self, problem: Problem, pipe, common: dict) -> Answer:
        """The pipeline's images for y."""
        out = pipe(
            problem.prompts,
            height=problem.round_trip.shape[2],
            width=problem.round_trip.shape[3],
            generator=[Generator().manual_seed(seed) for seed in problem.seeds],
            output_type="pt",
            y=problem.y,
            operator=problem.operator,
            sigma_y=problem.sigma_y,
            return_report=True,
            **common | self.arguments(problem.task, problem.sigma_y),
        )
        residual = torch.tensor(out.report.residual)
        report = out.report
        return Answer(out.images.float().cpu(), residual, report.calls, report.in_networks, report.trace)


@dataclass(frozen=True)
class Stock(Solver):
    """diffusers' `StableDiffusionInpaintPipeline`, by what it is passed; it takes problems with a mask."""

    def answer(self, problem: Problem, pipe, common: dict) -> Answer:
        """Its images, with our last step in pixels."""
        passed = common | self.arguments(problem.task, problem.sigma_y)
        raw, image, meter = stock.inpaint(problem, pipe, passed)
        return Answer(image, problem.residual(raw), meter.calls(len(raw)), meter.seconds)


@dataclass(frozen=True)
class Naive:
    """An answer (B, 3, H, W) that takes no diffusion model; `module` is what it needs installed."""

    name: str
    draw: Callable[[Problem], Tensor]
    tasks: tuple[str, ...] = field(default=TASKS, repr=False)
    module: str | None = None

    def settings(self, place: tuple[str, float]) -> dict:
        """What a row depends on: nothing but the source."""
        return {}

    def answer(self, problem: Problem, pipe, common: dict) -> Answer:
        image = self.draw(problem)
        return Answer(image.clamp(0, 1), problem.residual(image))


def draw_start(problem: Problem) -> Tensor:
    """The operator's start: the pseudo-inverse of a linear one, nearest to mid-grey; otherwise see its docstring."""
    return problem.measurement.start()


def draw_measured(problem: Problem) -> Tensor:
    """What was measured, to be looked at: y where it is a picture, enlarged; otherwise, and under a mask, the start."""
    y, size = problem.y, problem.round_trip.shape[2:]
    is_picture = y.ndim == 4 and y.shape[1] in (1, 3) and y.shape[2] <= size[0] and not y.is_complex()
    if isinstance(problem.operator, Mask) or not is_picture:
        return draw_start(problem)
    return F.interpolate(y.expand(-1, 3, -1, -1), size, mode="nearest-exact")


def draw_smooth(problem: Problem) -> Tensor:
    """The smoothest image that agrees with y up to its noise, see `Measurement.guess`."""
    return problem.measurement.guess(problem.round_trip.shape[2:], noise=problem.sigma_y)


def upsample(problem: Problem) -> Tensor:
    """Bicubic interpolation of a smaller y.

    Raises:
        TypeError: another operator than `Downsample`.
    """
    if not isinstance(problem.operator, Downsample):
        raise TypeError(f"bicubic came with {problem.operator!r}; expected Downsample. Leave the task out.")
    return F.interpolate(problem.y, scale_factor=problem.operator.factor, mode="bicubic").clamp(0, 1)


def inpaint_telea(problem: Problem) -> Tensor:
    """OpenCV's fast-marching inpainting (Telea, 2004), on 8 bits and a radius of 3 pixels; known pixels as in y.

    Raises:
        TypeError: another operator than `Mask`.
        ModuleNotFoundError: OpenCV is not installed.
    """
    import cv2
    import numpy as np

    if not isinstance(problem.operator, Mask):
        raise TypeError(f"telea came with {problem.operator!r}; expected Mask. Leave the task out.")
    known = problem.operator.mask.expand(len(problem.y), -1, -1, -1)
    holes = (known[:, 0] == 0).to(torch.uint8).numpy()
    painted = [
        cv2.inpaint(np.asarray(image), hole, _TELEA_RADIUS, cv2.INPAINT_TELEA)
        for image, hole in zip(to_pil(problem.y), holes, strict=True)
    ]
    filled = torch.from_numpy(np.stack(painted)).permute(0, 3, 1, 2).float() / 255
    return torch.where(known > 0, problem.y, filled).clamp(0, 1)


def _pass(**arguments) -> Callable[[str, float], dict]:
    """The same arguments for every task and noise."""
    return lambda task, sigma_y: arguments


def at_steps(method: Solver, steps: Callable[[str], int]) -> Solver:
    """A solver with another number of steps, by task."""
    arguments = lambda task, sigma_y: method.arguments(task, sigma_y) | {"num_inference_steps": steps(task)}  # noqa: E731
    return replace(method, arguments=arguments)


def _pass_point(method: str, point: tuning.Point) -> dict:
    """What the pipeline is passed for a method of `tuning.GRIDS` with these settings."""
    if method == "stock":
        return dict(point)
    if method == "red-diff":
        return {"solver": "red-diff", "red": RedDiff(**dict(point))}
    if not method.startswith(_AZULA):
        return {"solver": peers.Peer(method.replace("-", "_"), point)}
    from vml_ldm.evaluation.azula_peers import AzulaPeer

    return {"solver": AzulaPeer(method.removeprefix(_AZULA), point)}


def _solver(name: str, method: str, settings: Callable[[str, float], tuning.Point]) -> Solver:
    """A method of `tuning.GRIDS`, by a name of its own, with the settings for a task and a noise."""
    azula = method.startswith(_AZULA)
    tasks = LINEAR if method in (*peers.ONLY_LINEAR, "azula-pigdm") else TASKS
    tasks = MASKED if method in peers.ONLY_MASKS else tasks
    arguments = lambda task, sigma_y: _pass_point(method, settings(task, sigma_y))  # noqa: E731
    if method == "stock":
        return Stock(name, arguments, MASKED)
    return Solver(name, arguments, tasks, alone=azula, module="azula" if azula else None)


def tuned_solver(method: str, name: str | None = None) -> Solver:
    """A method of `tuning.GRIDS` with the best settings known for each task."""
    return _solver(name or method, method, lambda task, sigma_y: tuning.tuned(method, task, sigma_y))


def grid(method: str) -> tuple[Solver, ...]:
    """A method at every point of its grid, the first point first."""
    return tuple(_solver(tuning.name_of(p), method, lambda task, sigma_y, p=p: p) for p in tuning.points(method))


EXACT = Solver("vml", _pass(jacobian="exact"))  # the pipeline's defaults
FREE = Solver("vml-free", _pass(jacobian="free"))
RED = Solver("red-diff", _pass(solver="red-diff", red=RedDiff(), pixel_step=False))  # its authors' settings
RED_TUNED = tuned_solver("red-diff", "red-diff-tuned")  # and with our last step in pixels
START = Naive("start", draw_start)
SMOOTH = Naive("smooth", draw_smooth, LINEAR)
BICUBIC = Naive("bicubic", upsample, ("sr4", "sr8"))
TELEA = Naive("telea", inpaint_telea, MASKED, module="cv2")
CEILING = Naive("vae-round-trip", lambda problem: problem.round_trip)
METHODS = (EXACT, FREE, RED, RED_TUNED, START, SMOOTH, BICUBIC, TELEA, CEILING)
BUDGETS = (  # by denoiser evaluations, 25 to 100; "vml" itself has 50
    Solver("vml-fast", _pass(jacobian="exact", preset="fast")),
    Solver("vml-32", _pass(jacobian="exact", num_inference_steps=32)),
    Solver("vml-40", _pass(jacobian="exact", num_inference_steps=40)),
    Solver("vml-66", _pass(jacobian="exact", preset="best", num_inference_steps=33)),
    Solver("vml-82", _pass(jacobian="exact", preset="best", num_inference_steps=41)),
    Solver("vml-best", _pass(jacobian="exact", preset="best")),
)
VARIANTS = (  # run where they are named
    *BUDGETS,
    Solver("vml-noise", _pass(jacobian="exact", start="noise")),
    Solver("vml-outline", _pass(jacobian="exact", start="outline")),
    Solver("vml-full-decoder", _pass(jacobian="exact", use_gradient_vae=False)),
    Solver("vml-small-decoder", _pass(jacobian="exact", use_gradient_vae=THROUGHOUT)),
    Solver("vml-small-decoder-free", _pass(jacobian="free", use_gradient_vae=THROUGHOUT)),
)
PEERS = tuple(tuned_solver(method) for method in tuning.GRIDS if method != "red-diff")


def is_installed(method: Solver | Naive) -> bool:
    """Whether the method has what it needs."""
    return method.module is None or find_spec(method.module) is not None
