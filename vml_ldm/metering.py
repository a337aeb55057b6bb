"""Network calls of a solve: counted, timed, and stopped between two of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from .objective import Prior, T, Whole, checked, decode_linear, decode_pullback, denoise_pullback, guided


class Stopped(Exception):
    """A solve was stopped before its next network call."""


def device_event(device: torch.device):
    """A mark in a CUDA device's queue, recorded; None for devices whose calls end before they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Clock:
    """Seconds by name. A CUDA device is timed by marks in its own queue, so that nobody waits for it between calls.

    Args:
        mark: gives the mark of a device, with ``elapsed_time(other)`` in milliseconds and ``synchronize()``, or None.
    """

    def __init__(self, mark: Callable = device_event):
        self._mark, self._seconds, self._marks = mark, Counter(), []

    @contextmanager
    def running(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what is inside, which works on the device."""
        first, started = self._mark(device), time.perf_counter()
        yield
        if first is None:
            self._seconds[name] += time.perf_counter() - started
        else:
            self._marks.append((name, first, self._mark(device)))

    @property
    def seconds(self) -> Counter:
        """So far. Waits for the device, once."""
        if self._marks:
            self._marks[-1][2].synchronize()
        for name, first, last in self._marks:
            self._seconds[name] += first.elapsed_time(last) / 1000
        self._marks.clear()
        return self._seconds


class Passes:
    """A bar of the denoiser's passes. A level that ends with fewer than it might have taken is whole all the same.

    Args:
        bar: with ``update(count)``, as tqdm has it.
        by_level: how many passes each level takes at the most.
    """

    def __init__(self, bar, by_level: Sequence[int]):
        self._bar, self._ends, self._made = bar, accumulate(by_level), 0
        self._end = next(self._ends)

    def called(self, name: str) -> None:
        """A network call has ended."""
        if name == "denoise" and self._made < self._end:
            self._advance(1)

    def ended(self) -> None:
        """A level has ended."""
        self._advance(self._end - self._made)
        self._end = next(self._ends, self._end)

    def _advance(self, count: int) -> None:
        self._made += count
        self._bar.update(count)


class Metered:
    """A prior that counts its network calls, times them, and can be stopped. Pull-backs count as "..._vjp".

    Args:
        prior: the prior.
        decoder: what its decoder's calls count as.
        clock: how calls are timed.

    Attributes:
        calls: how often each was called.
        stopped: asked before every call; True ends it with `Stopped`. None: never.
        told: told the name of every call that has ended. None: nobody.
    """

    def __init__(self, prior: Prior, decoder: str = "decode", clock: Clock | None = None):
        self.prior, self.decoder, self.calls, self._clock = prior, decoder, Counter(), clock or Clock()
        self.stopped: Callable[[], bool] | None = None
        self.told: Callable[[str], None] | None = None
        self.pixel_scale = getattr(prior, "pixel_scale", None)

    @property
    def push(self) -> Callable | None:
        """The prior's, as it is now: guidance may change between levels."""
        push = getattr(self.prior, "push", None)
        return push and (lambda *state: self._timed("denoise", push, *state))

    @property
    def seconds(self) -> Counter:
        """By kind of call, see `Clock.seconds`."""
        return self._clock.seconds

    @property
    def select(self) -> Callable[[Tensor, int], Metered] | None:
        """The prior's, on the same counts."""
        select = getattr(self.prior, "select", None)
        return select and (lambda rows, batch: self._counting(select(rows, batch), self.decoder))

    def checked(self, work: Callable[[], T]) -> T:
        """The prior's. Calls of work that is done again count again."""
        return checked(self.prior, work)

    def drafting(self, prior: Prior) -> Metered:
        """Another prior on the same counts, its decoder's as "draft"; it stops with this one."""
        return self._counting(prior, "draft")

    def _counting(self, prior: Prior, decoder: str) -> Metered:
        other = Metered(prior, decoder, clock=self._clock)
        other.calls, other.stopped = self.calls, lambda: self.stopped is not None and self.stopped()
        other.told = lambda name: self.told is not None and self.told(name)
        return other

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        return self._timed("denoise", self.prior.denoise, x_t, alpha, sigma)

    def guided(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """Counts as two calls where the prior is guided: the prompt's and the negative prompt's."""
        self.calls["denoise"] += self.push is not None
        return self._timed("denoise", guided, self.prior, x_t, alpha, sigma)

    def encode(self, image: Tensor) -> Tensor:
        return self._timed("encode", self.prior.encode, image)

    def decode(self, z: Tensor) -> Tensor:
        return self._timed(self.decoder, self.prior.decode, z)

    @property
    def decode_whole(self) -> Callable[[Tensor], Whole] | None:
        """The prior's; a part counts as a call of the decoder."""
        draw = getattr(self.prior, "decode_whole", None)
        return draw and (lambda z: self._parts_too(self._timed(self.decoder, draw, z)))

    def _parts_too(self, whole: Whole) -> Whole:
        def pullback(*part):
            image, pull = self._timed(self.decoder, whole.part_pullback, *part)
            return image, lambda cotangent: self._timed(f"{self.decoder}_vjp", pull, cotangent)

        return Whole(whole.image, lambda *part: self._timed(self.decoder, whole.part, *part), pullback)

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float):
        z0_hat, pull = self._timed("denoise", denoise_pullback, self.prior, x_t, alpha, sigma)
        return z0_hat, lambda b: self._timed("denoise_vjp", pull, b)

    def decode_pullback(self, z: Tensor):
        image, pull = self._timed(self.decoder, decode_pullback, self.prior, z)
        return image, lambda cotangent: self._timed(f"{self.decoder}_vjp", pull, cotangent)

    def decode_linear(self, z: Tensor):
        image, push, pull = self._timed(self.decoder, decode_linear, self.prior, z)
        timed = lambda name, product: lambda v: self._timed(name, product, v)  # noqa: E731
        return image, timed(f"{self.decoder}_jvp", push), timed(f"{self.decoder}_vjp", pull)

    def _timed(self, name: str, function: Callable, *args):
        if self.stopped is not None and self.stopped():
            raise Stopped(name)
        with self._clock.running(name, next(x.device for x in args if isinstance(x, Tensor))):
            result = function(*args)
        self.calls[name] += 1
        if self.told is not None:
            self.told(name)
        return result
