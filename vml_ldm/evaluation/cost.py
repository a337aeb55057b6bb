"""What a call costs: seconds, and the most memory that it held beyond what was held before."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
_RESET_PEAK = "5"  # proc(5): sets the peak resident size to the present one
_MIB = 2**20


class Cost(NamedTuple):
    """Seconds, and MiB (None where the system does not tell)."""

    seconds: float
    memory: float | None


def measured(function: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """The function's result and what it cost: memory of the GPU, or of the process where the networks run on a CPU."""
    held = _begin(device)
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    peak = _peak(device)
    return result, Cost(seconds, None if held is None or peak is None else max(0.0, peak - held))


def _begin(device: torch.device) -> float | None:
    """Forget earlier peaks; MiB that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / _MIB
    _return_freed()
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _return_freed() -> None:
    """Hand memory that is free, but kept by the C library (glibc), back to the system: the next call would take it up
    without the process growing."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return _status("VmHWM")


def _status(name: str) -> float | None:
    """An entry of the process's status, which is in KiB, in MiB."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
