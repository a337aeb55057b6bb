"""Images of a batch whose problems want different settings are solved group by group, each as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vml_ldm.report import Report, join_reports

Solved = tuple[Any, list[bool] | None, Report]  # images in the output type, safety flags, the report

_PER_IMAGE = ("latents", "generator")


def can_be_split(a: SimpleNamespace) -> bool:
    """Whether a call's arguments say what belongs to which image; pictures of an IP-Adapter or a ControlNet do not."""
    pictures = (a.ip_adapter_image, a.ip_adapter_image_embeds, getattr(a, "control_image", None))
    return all(given is None for given in pictures)


def rows_of(a: SimpleNamespace, rows: list[int], **own) -> SimpleNamespace:
    """The call for some images of its batch, one for each prompt.

    Args:
        a: the call, whose prompts are as many as its images over `num_images_per_prompt`.
        rows: places in the batch.
        own: arguments that take the place of the call's.
    """
    part = SimpleNamespace(**vars(a))
    prompts = [row // a.num_images_per_prompt for row in rows]
    for name, value in vars(a).items():
        if "prompt" in name.split("_") and not isinstance(value, str):
            setattr(part, name, _picked(value, prompts))
        elif name in _PER_IMAGE:
            setattr(part, name, _picked(value, rows))
    vars(part).update(own, num_images_per_prompt=1)
    return part


def _picked(value, places: list[int]):
    """Rows of what is one for each; what is one for all, or none, as it is."""
    if isinstance(value, Tensor) and len(value) > 1:
        return value[places]
    if isinstance(value, list) and len(value) > 1:
        return [value[place] for place in places]
    return value


def solve_by_group(
    parts: list[SimpleNamespace], groups: list[list[int]], solve: Callable[[SimpleNamespace], Solved], pipe
) -> Solved:
    """The groups' results in the batch's order. Once the pipe is interrupted, later groups take no step."""
    found: list[Solved] = []
    for part in parts:
        part.interrupted = bool(found) and pipe.interrupt
        found.append(solve(part))
    order = [place for group in groups for place in group]
    images, flags, reports = zip(*found, strict=True)
    flagged = None if flags[0] is None else _in_order([flag for some in flags for flag in some], order)
    return _in_order(_joined(images), order), flagged, join_reports(reports, groups)


def _joined(images: Sequence):
    if isinstance(images[0], Tensor):
        return torch.cat(images)
    return np.concatenate(images) if isinstance(images[0], np.ndarray) else [one for some in images for one in some]


def _in_order(items, order: list[int]):
    """Items that belong at the places `order`, by place."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return [items[i] for i in back] if isinstance(items, list) else items[back]
