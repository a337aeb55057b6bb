"""diffusers' own inpainting, which ours stands in for, as a method of the comparison of restoration."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import Generator, Tensor, nn

from vml_ldm.evaluation.problems import Problem
from vml_ldm.measuring import settle

_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_GREY = 0.5  # of pixels that are missing, as the stock pipeline itself blanks them


class Meter:
    """Images that went through networks, by name, and the seconds that these spent on them."""

    def __init__(self) -> None:
        self.images, self.seconds, self._started = Counter(), 0.0, 0.0

    def calls(self, batch: int) -> dict[str, int]:
        """Passes of a batch: one of twice its images (guidance) is two, one of a single image its share."""
        return {name: round(count / batch) for name, count in self.images.items()}

    @contextmanager
    def watch(self, **networks: nn.Module) -> Iterator[Meter]:
        """Count forward passes while it lasts."""
        handles = []
        for name, network in networks.items():
            handles.append(network.register_forward_pre_hook(self._begin))
            handles.append(network.register_forward_hook(lambda _, args, out, name=name: self._end(name, args[0])))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, network: nn.Module, args: tuple) -> None:
        self._started = time.perf_counter()

    def _end(self, name: str, given: Tensor) -> None:
        if given.is_cuda:
            torch.cuda.synchronize(given.device)
        self.seconds += time.perf_counter() - self._started
        self.images[name] += len(given)


def stock_of(pipe) -> StableDiffusionInpaintPipeline:
    """diffusers' pipeline of another one's networks, silent."""
    parts = {name: getattr(pipe, name) for name in _PARTS}
    stock = StableDiffusionInpaintPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def networks_of(pipe) -> dict[str, nn.Module]:
    """What a `Meter` watches, by the names of a report's calls."""
    return {"denoise": pipe.unet, "encode": pipe.vae.encoder, "decode": pipe.vae.decoder}


def inpaint(problem: Problem, pipe, arguments: dict) -> tuple[Tensor, Tensor, Meter]:
    """What diffusers' `StableDiffusionInpaintPipeline` makes of a masked y with a pipeline's own networks.

    Args:
        pipe: a Stable Diffusion pipeline.
        arguments: of the call, beside image, mask, size, prompts and generators.

    Returns:
        Images (B, 3, H, W) on the CPU, as they were decoded and after the last step in pixels that every other solver
        has (`settle`); what it cost.
    """
    known = problem.operator.mask.expand(len(problem.y), -1, -1, -1)
    stock = stock_of(pipe)
    with Meter().watch(**networks_of(stock)) as meter:
        raw = stock(
            problem.prompts,
            image=(known * problem.y + (1 - known) * _GREY).clamp(0, 1),
            mask_image=1 - known,
            height=problem.y.shape[2],
            width=problem.y.shape[3],
            generator=[Generator().manual_seed(seed) for seed in problem.seeds],
            output_type="pt",
            **arguments,
        ).images
    raw = raw.float().cpu()
    std = torch.full((len(raw),), problem.sigma_y)
    return raw, settle(raw, problem.measurement, std), meter
