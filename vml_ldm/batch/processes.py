"""The processes of a run: what each is, and what all of them must have alike so that none of them changes a file."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from vml_ldm.adapters.diffusers import free_bytes
from vml_ldm.batch.settings import networks

T = TypeVar("T")
_ALIGNMENT = 64  # bytes


def process() -> PartialState:
    """This process among those that were launched together: `device`, `process_index`, `is_main_process`."""
    return PartialState(cpu=not torch.cuda.is_available())


def agree(state: PartialState, make: Callable[[], T]) -> T:
    """What the main process makes, in every process; its ValueError or OSError is raised in all of them."""
    box: list = [None]
    if state.is_main_process:
        try:
            box = [make()]
        except (ValueError, OSError) as refusal:
            box = [refusal]
    if state.num_processes > 1:
        broadcast_object_list(box)
    if isinstance(box[0], (ValueError, OSError)):
        raise box[0]
    return box[0]


def least_free(state: PartialState, device: torch.device) -> int | None:
    """Bytes that every process may count on: of what is free on a device, the share of one that runs on it.

    The same in all processes, once each has loaded its networks; None where a device does not say.
    """
    where = (platform.node(), str(device))
    if state.num_processes == 1:
        return free_bytes(device)
    state.wait_for_everyone()
    found = gather_object([(where, free_bytes(device))])
    places = [place for place, _ in found]
    shares = [None if free is None else free // places.count(place) for place, free in found]
    return None if None in shares else min(shares)


def align(pipe) -> None:
    """Move weights on the CPU to where the allocator aligns them.

    A file that was mapped into memory begins anywhere, elsewhere in one process than in the next, and the order in
    which products of matrices are summed depends on it.
    """
    for part in networks(pipe).values():
        for tensor in chain(part.parameters(), part.buffers()) if isinstance(part, nn.Module) else ():
            if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
                tensor.data = tensor.data.clone()


@contextmanager
def as_agreed(pipe, free: int | None) -> Iterator[None]:
    """With the free memory that the processes agreed on, and without the pipeline's own progress bar."""
    bar, before = getattr(pipe, "_progress_bar_config", {}), pipe.free_memory
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    pipe.free_memory = free
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)
        pipe.free_memory = before
