"""Who paints what a prompt asks for into a hole: stock inpainting, ours by preset, other solvers, any function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from vml_ldm.evaluation import tuning
from vml_ldm.evaluation.peers import Peer
from vml_ldm.evaluation.stock import Meter, networks_of, stock_of
from vml_ldm.operators import Mask
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline

PRESETS = ("balanced", "fast", "best")
PEERS = ("red-diff", "flow-dps", "latino", "ding", "guess-guide")
_GUIDANCE = 7.5  # of peers, as the inpainting pipelines have
_EVALUATIONS = {"ding": 2}  # of the denoiser at a level, for peers that take more than one
_STEPS = 50  # the pipelines' default
_TUNED_ON = ("box", 0.01)  # the task whose settings peers take
_AT = "@"  # between a method's name and its guidance scale


class Work(NamedTuple):
    """A batch to paint: prompts, images (B, 3, H, W) in [0, 1], known pixels (B, 1, H, W), 1 = known, and seeds."""

    prompts: Sequence[str]
    image: Tensor
    known: Tensor
    seeds: Sequence[int]

    @property
    def size(self) -> dict[str, int]:
        return {"height": self.image.shape[2], "width": self.image.shape[3]}

    def generators(self) -> list[Generator]:
        return [Generator().manual_seed(seed) for seed in self.seeds]


class Painted(NamedTuple):
    """Decoded images before any paste, (B, 3, H, W) on the CPU, and network calls for one image."""

    image: Tensor
    calls: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Painter:
    """A method: its name and what it passes to its pipeline beyond the common arguments."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    modules: ClassVar[tuple[str, ...]] = ()  # source files that alone have a say in what it paints; none: all have

    def settings(self, place) -> dict:
        """What a row depends on; the same in every place."""
        return dict(self.arguments)

    def paint(self, pipe, work: Work, common: dict) -> Painted:
        """What our pipeline paints."""
        out = pipe(
            list(work.prompts),
            image=work.image,
            mask_image=1 - work.known,
            generator=work.generators(),
            output_type="pt",
            paste=False,
            return_report=True,
            **work.size,
            **common | dict(self.arguments),
        )
        return Painted(out.images.float().cpu(), out.report.calls)


@dataclass(frozen=True)
class StockPainter(Painter):
    """diffusers' `StableDiffusionInpaintPipeline` with the same networks."""

    modules = ("comparison", "gallery", "images", "metrics", "painters", "prompts", "prompts_tasks", "stock", "tasks")

    def paint(self, pipe, work: Work, common: dict) -> Painted:
        stock = stock_of(pipe)
        with Meter().watch(**networks_of(stock)) as meter:
            images = stock(
                list(work.prompts),
                image=work.image,
                mask_image=1 - work.known,
                generator=work.generators(),
                output_type="pt",
                **work.size,
                **common | dict(self.arguments),
            ).images
        return Painted(images.float().cpu(), meter.calls(len(images)))


@dataclass(frozen=True)
class PeerPainter(Painter):
    """A solver of `VMLRestorePipeline` on ``y = m * x``, without its last step in pixels.

    Args:
        evaluations: of the denoiser at a level; so many times fewer levels stand for the steps that were asked for.
    """

    evaluations: int = 1

    def paint(self, pipe, work: Work, common: dict) -> Painted:
        restore = VMLRestorePipeline(**pipe.components, requires_safety_checker=False)
        restore.set_progress_bar_config(disable=True)
        steps = common.get("num_inference_steps", _STEPS)
        with Meter().watch(denoise=restore.unet) as meter:
            out = restore(
                list(work.prompts),
                y=work.known * work.image,
                operator=Mask(work.known),
                generator=work.generators(),
                output_type="pt",
                pixel_step=False,
                return_report=True,
                **work.size,
                **common | dict(self.arguments) | {"num_inference_steps": max(1, steps // self.evaluations)},
            )
        return Painted(out.images.float().cpu(), out.report.calls | meter.calls(len(out.images)))


@dataclass(frozen=True)
class Trial(Painter):
    """Any function as a method.

    Args:
        function: ``(prompt, image, mask, seed) -> image``; an image is (3, H, W) in [0, 1], the mask (1, H, W),
            **1 = repaint**; what comes back is the decoded image before any paste. With `batched`, lists of prompts and
            seeds and tensors with a batch dimension in front. What it depends on goes into the name or `arguments`:
            rows that stand already under the same ones are not made again.
    """

    function: Callable = None
    batched: bool = False

    def paint(self, pipe, work: Work, common: dict) -> Painted:
        with Meter().watch(**networks_of(pipe)) as meter:
            if self.batched:
                images = self.function(list(work.prompts), work.image, 1 - work.known, list(work.seeds))
            else:
                items = zip(work.prompts, work.image, 1 - work.known, work.seeds, strict=True)
                images = torch.stack([self.function(*item) for item in items])
        return Painted(images.detach().float().cpu(), meter.calls(len(images)))


def named_painter(name: str) -> Painter:
    """A method by its name: ``stock``, a preset or a peer, then perhaps ``@`` and a guidance scale: ``fast@3``.

    Raises:
        ValueError: no such method.
    """
    base, _, scale = name.partition(_AT)
    try:
        guidance = {"guidance_scale": float(scale)} if scale else {}
    except ValueError:
        base = ""
    if base == "stock":
        return StockPainter(name, guidance)
    if base in PRESETS:
        return Painter(name, {"preset": base, **guidance})
    if base in PEERS:
        arguments = {"guidance_scale": _GUIDANCE, **guidance, "solver": _solver_of(base)}
        return PeerPainter(name, arguments, _EVALUATIONS.get(base, 1))
    raise ValueError(
        f"no method is called {name!r}; expected one of {', '.join(('stock', *PRESETS, *PEERS))}, perhaps with @ and a "
        "guidance scale, such as stock@3."
    )


def _solver_of(method: str) -> Peer:
    """A method of `tuning.GRIDS` with the settings that were best for a hole."""
    return Peer(method.replace("-", "_"), tuning.tuned(method, *_TUNED_ON))
