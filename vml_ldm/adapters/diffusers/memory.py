"""How much memory a solve may take, and by which plan it stays within that.

A plan says how graphs are kept. Each is slower than the one before, and takes less:

    one graph                denoiser's and decoder's graphs side by side
    checkpointed             the networks' own gradient checkpointing
    one graph at a time      the denoiser runs again, with a graph, when its pull-back is due
    two passes               the decoder too: it draws without a graph, the operator gives the image's cotangent, and
                             the decoder runs again with a graph to pull it back
    image by image           one image of the batch after the other in the VAE
    tiles                    the VAE's own tiles, then tiles a half and a quarter as wide: one tile's graph at a time
    Jacobian-free            no graph of the denoiser

All up to "image by image" give the same gradient. Tiles give the gradient of the tiled decoder, which draws the image
too, as diffusers' own tiling would. Jacobian-free steps are another direction (`vml_ldm.objective`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

MODES = ("auto", "fast", "low")
_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate(("K", "M", "G", "T"), start=1)}
_PLENTY = 4 * 1024**2  # bytes a latent pixel: about twice what Stable Diffusion's graphs take in float32
_SHARE = 0.8  # of the free memory: kernels' workspace and fragmentation are not in the prediction
_SAME = 0.02  # difference between two peaks that is none
_LEAST_TILE = 16  # latents; smaller tiles than the VAE's own go down to this
_DIVISORS = (1, 2, 4)


@dataclass(frozen=True)
class Plan:
    """How the graphs of one solve are kept.

    Attributes:
        checkpointed: denoiser and VAE run with their own gradient checkpointing.
        denoiser_again, decoder_again: the network has no graph until its pull-back is due, and runs again for it.
        by_image: the VAE takes the batch image by image.
        tiles: None, or the VAE works in tiles so many times smaller than its own.
        free: the steps are Jacobian-free.
    """

    checkpointed: bool = False
    denoiser_again: bool = False
    decoder_again: bool = False
    by_image: bool = False
    tiles: int | None = None
    free: bool = False

    def __str__(self) -> str:
        graphs = "two passes" if self.decoder_again else "one graph at a time" if self.denoiser_again else "one graph"
        tiles = {None: "", 1: "tiles", 2: "half tiles", 4: "quarter tiles"}[self.tiles]
        words = [graphs, "checkpointed" * self.checkpointed, "image by image" * self.by_image, tiles]
        return ", ".join(filter(None, [*words, "Jacobian-free" * self.free]))


class Footprint(NamedTuple):
    """Bytes of the tensors that a network makes in one use, above its weights.

    Attributes:
        held: by its graph, between forward and backward pass; 0 without a graph.
        peak: at most.
    """

    held: int
    peak: int


class Chosen(NamedTuple):
    """A plan, its predicted peak in bytes above the weights, and the budget; None where there is none."""

    plan: Plan
    predicted: int | None
    budget: int | None

    def to_dict(self) -> dict:
        return {"plan": str(self.plan), "predicted": self.predicted, "budget": self.budget}


def parse_memory(memory: str | int) -> str | int:
    """The caller's `memory`: a mode of `MODES`, or bytes.

    Raises:
        ValueError: something else.
    """
    if isinstance(memory, str) and memory in MODES:
        return memory
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)\s*", memory)
        if found and found[2] in _UNITS:
            memory = int(float(found[1]) * _UNITS[found[2]])
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    raise ValueError(f"memory is {memory!r}; expected 'auto', 'fast', 'low', or bytes: a whole number, or '4GiB'.")


def plans(
    batch: int, latent: tuple[int, int], tile: int | None, *, denoiser: bool, decoder: bool, may_free: bool
) -> Iterator[Plan]:
    """The plans that make a difference, from the fastest.

    Args:
        batch: images.
        latent: (h, w).
        tile: edge of the VAE's own tiles, in latents; None: it has none.
        denoiser, decoder: steps go back through it.
        may_free: through the denoiser they need not.
    """
    plan = Plan()
    yield plan
    if denoiser or decoder:
        yield (plan := replace(plan, checkpointed=True))
    if denoiser:
        yield (plan := replace(plan, denoiser_again=True))
    if decoder:
        yield (plan := replace(plan, decoder_again=True))
    if batch > 1:
        yield (plan := replace(plan, by_image=True))
    for divisor in _DIVISORS:
        smaller = tile is not None and tile // divisor < max(latent)
        if smaller and (divisor == 1 or tile // divisor >= _LEAST_TILE):
            yield (plan := replace(plan, tiles=divisor))
    if denoiser and may_free:
        yield replace(plan, free=True)


def predict(denoiser: Footprint, decoders: Iterable[Footprint], operator: int) -> int:
    """The most bytes that an inner step holds at a time.

    The denoiser's graph stays while the decoder draws, the operator gives the image's cotangent and the decoder pulls
    it back; then the denoiser pulls that back.

    Args:
        denoiser, decoders: their footprints under a plan. Levels take one decoder or another.
        operator: held by its graph.
    """
    data = max(max(decoder.peak, decoder.held + operator) for decoder in decoders)
    return max(denoiser.peak, denoiser.held + data)


def choose(
    memory: str | int, ladder: Iterable[Plan], need: Callable[[Plan], int | None], free: int | None, latents: int = 0
) -> Chosen:
    """The first plan that fits.

    "fast" takes the first one. "low" takes what needs least while steps and the VAE's tiles stay what they are. "auto"
    takes the first that fits a share of the free memory, or the last if none does; where that is plenty for so many
    latents, nothing is predicted (a prediction takes seconds, once for each size).

    Args:
        memory: from `parse_memory`.
        ladder: from `plans`, the fastest first.
        need: predicts a plan's peak; None where that is not possible.
        free: bytes, what "auto" may take a share of; None if unknown, which takes the first.
        latents: how many pixels the latents of the batch have; 0 if unknown.

    Raises:
        ValueError: no plan fits a budget in bytes, or what fits cannot be predicted.
    """
    ladder = list(ladder)
    if memory == "fast" or (memory == "auto" and free is None):
        return Chosen(ladder[0], need(ladder[0]), None)
    if memory == "low":
        return _least([plan for plan in ladder if not plan.free and plan.tiles in (None, 1)], need)
    budget = int(_SHARE * free) if memory == "auto" else memory
    if memory == "auto" and 0 < _PLENTY * latents <= budget:
        return Chosen(ladder[0], None, budget)
    for plan in ladder:
        peak = need(plan)
        if peak is None:
            return _unpredicted(memory, ladder[0])
        if peak <= budget:
            return Chosen(plan, peak, budget)
    if memory == "auto":
        return Chosen(plan, peak, budget)
    needs = {plan: need(plan) for plan in ladder}
    least = min(needs, key=needs.__getitem__)
    raise ValueError(
        f"memory is {in_units(budget)}; expected at least {in_units(needs[least])} above the networks' weights "
        f"({least}). Raise it, or make the image or the batch smaller."
    )


def _least(ladder: list[Plan], need: Callable[[Plan], int | None]) -> Chosen:
    """The last plan, or the fastest of those before it that take no more to speak of."""
    *before, plan = ladder
    peak = least = need(plan)
    for faster in reversed(before if least is not None else []):
        other = need(faster)
        if other is None or other > (1 + _SAME) * least:
            break
        plan, peak = faster, other
    return Chosen(plan, peak, None)


def _unpredicted(memory: str | int, plan: Plan) -> Chosen:
    if memory == "auto":
        return Chosen(plan, None, None)
    raise ValueError(
        f"memory is {in_units(memory)}, but what these networks take cannot be predicted from their configurations; "
        "expected 'fast' or 'low'."
    )


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device, or None where it does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def in_units(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
