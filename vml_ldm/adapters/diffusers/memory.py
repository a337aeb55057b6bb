"""How much memory a solve may take, and by which plan it stays within that.

A plan says how graphs are kept. Each is slower than the one before, and takes less:

    one graph                denoiser's and decoder's graphs side by side
    checkpointed             gradient checkpointing: the denoiser's own, and the VAE decoder's layer by layer
    one graph at a time      the denoiser runs again, with a graph, when its pull-back is due
    checkpointed twice       the VAE decoder's blocks as well as their layers: it runs a third time
    two passes               the decoder too: it draws without a graph, the operator gives the image's cotangent, and
                             the decoder runs again with a graph to pull it back
    image by image           one image of the batch after the other in the VAE
    tiles                    the VAE's own tiles, then tiles a half and a quarter as wide: one tile's graph at a time
    Jacobian-free            no graph of the denoiser

All up to "image by image" give the same gradient. Tiles give the gradient of the tiled decoder, which draws the image
too, as diffusers' own tiling would. Jacobian-free steps are another direction (`vml_ldm.objective`).

Levels that draw with a small decoder have a plan of their own: what the VAE's decoder needs is paid for only where it
draws. A small decoder is never checkpointed.

A GPU says when its memory runs out, and a call that fails so is made again by the next plan (`StepDown`): nothing has
to be foretold there. A process on a CPU is killed instead; there, and for a budget in bytes, plans are predicted.

What attention takes: PyTorch's fused kernels (SDPA, the default) and xformers' make no matrix of all pairs of pixels,
neither in a pass nor for its graph, so xformers saves nothing over SDPA. Attention slicing goes back to that matrix, a
slice at a time: over unfused attention it saves in passes without a graph, over SDPA nothing; a graph keeps every
slice, so that slicing takes more than SDPA. All three are honoured, and predictions count what is set.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...objective import PullBack, T
from ...report import in_units

logger = logging.getLogger(__name__)
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
        checkpointed: 0, 1 for denoiser and VAE with gradient checkpointing, or 2 for the VAE's decoder at two depths.
        denoiser_again, decoder_again: the network has no graph until its pull-back is due, and runs again for it.
        by_image: the VAE takes the batch image by image.
        tiles: None, or the VAE works in tiles so many times smaller than its own.
        free: the steps are Jacobian-free.
    """

    checkpointed: int = 0
    denoiser_again: bool = False
    decoder_again: bool = False
    by_image: bool = False
    tiles: int | None = None
    free: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether images and steps are those of one graph, but for rounding."""
        return self.tiles is None and not self.free

    def __str__(self) -> str:
        graphs = "two passes" if self.decoder_again else "one graph at a time" if self.denoiser_again else "one graph"
        tiles = {None: "", 1: "tiles", 2: "half tiles", 4: "quarter tiles"}[self.tiles]
        again = ("", "checkpointed", "checkpointed twice")[self.checkpointed]
        words = [graphs, again, "image by image" * self.by_image, tiles]
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


class Fitted(NamedTuple):
    """What was chosen for levels that draw with the VAE, and for those with a small decoder; None: there are none."""

    full: Chosen
    draft: Chosen | None

    @classmethod
    def of(cls, full: Chosen, draft: Chosen | None) -> Fitted:
        """Steps are Jacobian-free at all levels where they are at some."""
        if any(chosen.plan.free for chosen in (full, draft or full)):
            full, draft = (c and c._replace(plan=replace(c.plan, free=True)) for c in (full, draft))
        return cls(full, draft)

    def as_run(self, steps: StepDown) -> Fitted:
        """With the plans that came in place of these when memory ran out."""
        return Fitted(*(chosen and chosen._replace(plan=steps.plan(chosen.plan)) for chosen in self))

    @property
    def is_exact(self) -> bool:
        return all(chosen.plan.is_exact for chosen in filter(None, self))

    @property
    def is_over(self) -> bool:
        """Whether a plan takes more than its budget, as the last that "auto" has may."""
        known = [c for c in filter(None, self) if c.predicted is not None and c.budget is not None]
        return any(chosen.predicted > chosen.budget for chosen in known)

    def to_dict(self) -> dict:
        """As `Report.memory` has it."""
        told = {"plan": str(self.full.plan), "predicted": self.full.predicted, "budget": self.full.budget}
        if self.draft is None:
            return told
        return {**told, "draft_plan": str(self.draft.plan), "draft_predicted": self.draft.predicted}


class StepDown:
    """Runs calls by a plan, and by the next slower one when memory runs out, from then on.

    Args:
        ladder: from `plans`. Its Jacobian-free plan is left out, which would change the steps on the way. Empty, or
            without the plan of a call: what runs out of memory raises.
    """

    def __init__(self, ladder: Iterable[Plan] = ()):
        ladder = [plan for plan in ladder if not plan.free]
        self._next, self._steps = dict(pairwise(ladder)), bool(ladder)
        self._left: set[Plan | str] = set()

    def plan(self, plan: Plan) -> Plan:
        """What has come in a plan's place."""
        while plan in self._left:
            plan = self._next[plan]
        return plan

    def run(self, plan: Plan, use: Callable[[Plan], T]) -> T:
        """``use(plan)``, or with a slower plan."""
        while True:
            plan = self.plan(plan)
            try:
                return use(plan)
            except RuntimeError as error:
                if plan not in self._next or not is_out_of_memory(error):
                    raise
            self._left.add(plan)  # outside of the handler, whose traceback holds what the call had allocated
            slower = self.plan(plan)
            level = logging.INFO if slower.is_exact else logging.WARNING
            logger.log(level, "memory ran out with the plan %s; the solve goes on with %s", plan, slower)
            free_cached()

    def pullback(self, plan: Plan, use: Callable[[Plan], tuple[Tensor, PullBack]]) -> tuple[Tensor, PullBack]:
        """As `run`, of a value and its pull-back; where that runs out of memory both are made again."""
        value, pull = self.run(plan, use)
        held = {self.plan(plan): pull}  # by the plan that it was made by; one at most

        def pull_by(plan: Plan, cotangent: Tensor) -> Tensor:
            if plan not in held:
                held.clear()
                held[plan] = use(plan)[1]
            return held[plan](cotangent)

        return value, lambda cotangent: self.run(plan, partial(pull_by, cotangent=cotangent))

    def either(self, what: str, fast: Callable[[], T], slow: Callable[[], T]) -> T:
        """``fast()``, or, from then on, ``slow()`` when memory runs out; `what` says in the log what was fast."""
        if what not in self._left:
            try:
                return fast()
            except RuntimeError as error:
                if not self._steps or not is_out_of_memory(error):
                    raise
            self._left.add(what)
            logger.info("memory ran out with %s; the solve goes on without", what)
            free_cached()
        return slow()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, for which not every device has a class of its own."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "DefaultCPUAllocator" in told


def free_cached() -> None:
    """Hand what is free, but kept for later tensors, back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    batch: int,
    latent: tuple[int, int],
    tile: int | None,
    *,
    denoiser: bool,
    decoder: bool,
    may_free: bool,
    small: bool = False,
) -> Iterator[Plan]:
    """The plans that make a difference, from the fastest.

    Args:
        batch: images.
        latent: (h, w).
        tile: edge of the VAE's own tiles, in latents; None: it has none.
        denoiser, decoder: steps go back through it.
        may_free: through the denoiser they need not.
        small: the decoder is a small one, which is not checkpointed.
    """
    plan = Plan()
    yield plan
    if denoiser or (decoder and not small):
        yield (plan := replace(plan, checkpointed=1))
    if denoiser:
        yield (plan := replace(plan, denoiser_again=True))
    if decoder and not small:
        yield (plan := replace(plan, checkpointed=2))
    if decoder:
        yield (plan := replace(plan, decoder_again=True))
    if batch > 1:
        yield (plan := replace(plan, by_image=True))
    for divisor in _DIVISORS:
        smaller = tile is not None and tile // divisor < max(latent)
        if smaller and (divisor == 1 or tile // divisor >= _LEAST_TILE):
            yield (plan := replace(plan, checkpointed=min(1, plan.checkpointed), tiles=divisor))
    if denoiser and may_free:
        yield replace(plan, free=True)


def predict(denoiser: Footprint, networks: Iterable[Footprint], operator: int) -> int:
    """The most bytes that an inner step holds at a time.

    The denoiser's graph stays while the decoder draws, the operator gives the image's cotangent and the decoder pulls
    it back; then the denoiser pulls that back.

    Args:
        denoiser: its footprint under a plan.
        networks: of the decoder, and of what else runs in its place.
        operator: held by its graph.
    """
    data = max(max(network.peak, network.held + operator) for network in networks)
    return max(denoiser.peak, denoiser.held + data)


def choose(
    memory: str | int,
    ladder: Iterable[Plan],
    need: Callable[[Plan], int | None],
    free: int | None,
    latents: int = 0,
    taken: int = 0,
) -> Chosen:
    """The first plan that fits.

    "fast" takes the first one. "low" takes what needs least with exact steps and the VAE's own tiles or none. "auto"
    takes the first that fits a share of the free memory, or the last if none does; where that is plenty for so many
    latents, or not known, nothing is predicted (a prediction takes seconds, once for each size).

    Args:
        memory: from `parse_memory`.
        ladder: from `plans`, the fastest first.
        need: predicts a plan's peak; None where that is not possible.
        free: bytes, what "auto" may take a share of; None if unknown, which takes the first.
        latents: how many pixels the latents of the batch have; 0 if unknown.
        taken: bytes that are taken at other levels anyway, so that "low" has nothing to save below them.

    Raises:
        ValueError: no plan fits a budget in bytes, or what fits cannot be predicted.
    """
    ladder = list(ladder)
    if memory == "fast":
        return Chosen(ladder[0], need(ladder[0]), None)
    if memory == "auto" and free is None:
        return Chosen(ladder[0], None, None)
    if memory == "low":
        return _least([plan for plan in ladder if not plan.free and plan.tiles in (None, 1)], need, taken)
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


def _least(ladder: list[Plan], need: Callable[[Plan], int | None], taken: int) -> Chosen:
    """The fastest plan that takes no more to speak of than the least, or than what is taken; the last if unknown."""
    seen: list[Chosen] = []
    for plan in reversed(ladder):  # what is faster still is not predicted, which takes seconds
        peak = need(plan)
        if peak is None:
            return Chosen(ladder[-1], None, None)
        seen.append(Chosen(plan, peak, None))
        bound = max((1 + _SAME) * min(chosen.predicted for chosen in seen), taken)
        if peak > bound:
            break
    return next(chosen for chosen in reversed(seen) if chosen.predicted <= bound)


def _unpredicted(memory: str | int, plan: Plan) -> Chosen:
    if memory == "auto":
        return Chosen(plan, None, None)
    raise ValueError(
        f"memory is {in_units(memory)}, but what these networks take cannot be predicted from their configurations; "
        "expected 'fast' or 'low'."
    )


def free_bytes(device: torch.device) -> int | None:
    """What a process on a CPU can still allocate; None where it is not known, or a device says when it runs out."""
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
