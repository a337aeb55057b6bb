"""Several seeds of one problem: what they agree on, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Pixel by pixel over several seeds, each of one image's shape.

    Attributes:
        mean: the mean.
        std: the standard deviation, with n - 1 in its denominator.
    """

    mean: Tensor
    std: Tensor


def over_seeds(solve_once: Callable[[torch.Generator], Tensor], seeds: Sequence[int]) -> Spread:
    """Solve once for each seed. Where the standard deviation is large, the answer comes from the prior and not from y.

    It is the spread of the solver's answers. A solver that seeks modes answers more alike than the posterior's samples,
    so it is no credible interval.

    Args:
        solve_once: a generator -> images (B, 3, H, W); it draws its start and its noise from that generator.
        seeds: two or more, all different.

    Raises:
        ValueError: fewer than two seeds, or one twice.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; expected two or more, all different: one image has no spread.")
    images = torch.stack([solve_once(torch.Generator().manual_seed(seed)) for seed in seeds])
    return Spread(images.mean(0), images.std(0))
