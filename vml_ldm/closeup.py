"""A small hole in a large picture: what is drawn at each step is the part around it. (Ours.)

Known pixels far from the hole say through the encoder what they have to say: there the latent is taken to be known,
z0 = Enc(y), and noised as the rest is. Near the hole everything is as without it: the latent moves, and is measured in
pixels through the decoder, which draws these pixels and a ring around them, so that their surroundings are seen. Where
that depends on the whole picture, it is as in a whole picture drawn anew at each level (`Prior.decode_whole`). The
answer is not drawn up close: decode its latent with the prior.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import Prior, PullBack, T, Whole, checked, decode_pullback, denoise_pullback, guided
from .operators import own

_NEAR = 4  # cells of the latent around a hole that move and are measured
_RING = 4  # cells around those that are drawn with them
_MOST = 0.5  # of a latent's cells: above it, all is drawn

Window = tuple[slice, slice]  # rows and columns


class Part(NamedTuple):
    """Of a latent: the rows and columns that move, and those that are drawn."""

    moved: Window
    drawn: Window


def parts_near(known: Tensor, stride: int) -> list[Part] | None:
    """For each image the part of its latent that a hole needs; None if every image needs all of it.

    An image needs all of its latent where its part would be more than half of that, and where nothing is painted.

    Args:
        known: (B, 1, H, W) in [0, 1], 1 = known.
        stride: pixels to a cell of the latent.
    """
    size = [length // stride for length in known.shape[2:]]
    found = [_part(rows[0] < 1, size, stride) for rows in known]
    whole = (slice(0, size[0]), slice(0, size[1]))
    return None if all(part.drawn == whole for part in found) else found


def _part(painted: Tensor, size: list[int], stride: int) -> Part:
    whole = (slice(0, size[0]), slice(0, size[1]))
    if not painted.any():
        return Part(whole, whole)
    spans = [torch.nonzero(painted.any(dim)).flatten()[[0, -1]].tolist() for dim in (1, 0)]
    around = lambda cells: tuple(  # noqa: E731
        slice(max(0, first // stride - cells), min(n, last // stride + 1 + cells))
        for (first, last), n in zip(spans, size, strict=True)
    )
    drawn = around(_NEAR + _RING)
    return Part(around(_NEAR), drawn) if _cells(drawn) <= _MOST * size[0] * size[1] else Part(whole, whole)


def _cells(window: Window) -> int:
    rows, columns = _lengths(window)
    return rows * columns


def _lengths(window: Window) -> list[int]:
    return [side.stop - side.start for side in window]


def drawn_size(parts: list[Part]) -> tuple[int, int]:
    """Rows and columns that hold what is drawn of any of the latents."""
    rows, columns = zip(*(_lengths(part.drawn) for part in parts), strict=True)
    return max(rows), max(columns)


def drawn_shares(parts: list[Part] | None, size: tuple[int, int]) -> list[float]:
    """How much of each latent of `size` cells is drawn, in [0, 1]; empty where all is."""
    return [] if parts is None else [_cells(part.drawn) / (size[0] * size[1]) for part in parts]


def whole(prior: Prior) -> Prior:
    """The prior itself: all of it is drawn."""
    return prior


def near(parts: list[Part], like: Tensor, stride: int = 1) -> Tensor:
    """(B, 1, h, w), 1 where the latent moves; with a stride, of the pixels of those cells."""
    mask = torch.zeros(len(like), 1, *like.shape[2:], dtype=like.dtype, device=like.device)
    for row, part in zip(mask, parts, strict=True):
        row[0][_pixels(part.moved, stride)] = 1
    return mask


def _pixels(window: Window, stride: int) -> Window:
    rows, columns = (slice(stride * side.start, stride * side.stop) for side in window)
    return rows, columns


class _Drawn(NamedTuple):
    """Images of a batch with the same part: its cells, its pixels, and places among the images that are cut, if any."""

    images: list[int]
    cells: Window
    pixels: Window
    places: list[int]


class CloseUp:
    """A prior of which a part of each latent is known: ``D = m D(x_t) + (1 - m) z``, m = 1 in the part that moves.

    ``Dec(z0)`` is the decoder's image of the part that is drawn, laid over the picture. The measurement has to be of
    pixels that move.

    Args:
        prior: with a decoder whose image of a part is that part of its image, apart from the part's edges, or with
            `decode_whole`.
        parts: see `parts_near`.
        image: (B, 3, H, W) in [0, 1], the picture.
        latent: (B, c, h, w), its latent z.
    """

    def __init__(self, prior: Prior, parts: list[Part], image: Tensor, latent: Tensor):
        self.prior, self.image, self.latent = prior, own(image), own(latent)
        self._level, self._whole = None, None  # the noise at which the whole was drawn
        self._moved, stride = near(parts, latent), image.shape[2] // latent.shape[2]
        together: dict[tuple, list[int]] = {}  # images by the part that is drawn (a slice has no hash before 3.12)
        for i, part in enumerate(parts):
            together.setdefault(tuple((side.start, side.stop) for side in part.drawn), []).append(i)
        full = list(latent.shape[2:])
        self._cut = [i for i, part in enumerate(parts) if _lengths(part.drawn) != full]
        place = {image: place for place, image in enumerate(self._cut)}
        self._drawn = [
            _Drawn(i, parts[i[0]].drawn, _pixels(parts[i[0]].drawn, stride), [place[k] for k in i if k in place])
            for i in together.values()
        ]

    @property
    def push(self) -> Callable | None:
        """The prior's, where the latent moves."""
        push = getattr(self.prior, "push", None)
        return push and (lambda *state: self._moved * push(*state))

    @property
    def select(self) -> Callable[[Tensor, int], CloseUp] | None:
        """The prior's, with the parts of those images. What was drawn of the whole at this level serves them too."""
        select = getattr(self.prior, "select", None)
        return select and (lambda rows, batch: self._of(rows, select(rows, batch)))

    def _of(self, rows: Tensor, prior: Prior) -> CloseUp:
        part, places = copy.copy(self), {image: place for place, image in enumerate(rows.tolist())}
        part.prior, part.image, part.latent, part._moved = prior, self.image[rows], self.latent[rows], self._moved[rows]
        part._cut = [places[i] for i in self._cut if i in places]
        if self._whole is None:  # it will be drawn of these images alone
            among = {self._cut.index(i): k for k, i in enumerate(i for i in self._cut if i in places)}
        else:
            among = {place: place for place in range(len(self._cut))}
        part._drawn = []
        for d in self._drawn:
            kept = [k for k, i in enumerate(d.images) if i in places]
            if kept:
                cut = [among[d.places[k]] for k in kept] if d.places else []
                part._drawn.append(d._replace(images=[places[d.images[k]] for k in kept], places=cut))
        return part

    def checked(self, work: Callable[[], T]) -> T:
        """The prior's. What was drawn of the whole is drawn again with it."""

        def anew() -> T:
            self._level = None
            return work()

        return checked(self.prior, anew)

    @property
    def calls(self):
        """Of the prior that counts them."""
        return self.prior.calls

    @property
    def seconds(self):
        """Of the prior that counts them."""
        return self.prior.seconds

    def movable(self, change: Tensor) -> Tensor:
        """What of a change of the state is not known to be none."""
        return self._moved * change

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        self._enter(alpha, sigma)
        return self._hold(self.prior.denoise(x_t, alpha, sigma))

    def guided(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        self._enter(alpha, sigma)
        return self._hold(guided(self.prior, x_t, alpha, sigma))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        self._enter(alpha, sigma)
        z0_hat, pull = denoise_pullback(self.prior, x_t, alpha, sigma)
        return self._hold(z0_hat), lambda b: pull(self._moved * b)

    def encode(self, image: Tensor) -> Tensor:
        return self.prior.encode(image)

    def decode(self, z: Tensor) -> Tensor:
        drawn = [self._drawer(z, d).part(z[d.images][(..., *d.cells)], d.places, d.cells) for d in self._drawn]
        return self._lay(drawn)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        drawn = [self._drawer(z, d).part_pullback(z[d.images][(..., *d.cells)], d.places, d.cells) for d in self._drawn]

        def pull(cotangent: Tensor) -> Tensor:
            gradient = torch.zeros_like(z)
            for d, (_, pull_part) in zip(self._drawn, drawn, strict=True):
                gradient[(d.images, slice(None), *d.cells)] = pull_part(cotangent[d.images][(..., *d.pixels)])
            return gradient

        return self._lay([image for image, _ in drawn]), pull

    def _enter(self, alpha: float, sigma: float) -> None:
        """A level: at another one than before, the whole is drawn anew."""
        if self._level != (alpha, sigma):
            self._level, self._whole = (alpha, sigma), None

    def _drawer(self, z: Tensor, drawn: _Drawn) -> Whole:
        """How these parts are drawn at this level, at which z is the first to be drawn."""
        draw = getattr(self.prior, "decode_whole", None)
        if draw is None or not drawn.places:
            plain = self.prior
            return Whole(self.image, lambda z, *_: plain.decode(z), lambda z, *_: decode_pullback(plain, z))
        if self._whole is None:
            self._whole = draw(z[self._cut])
        return self._whole

    def _hold(self, z: Tensor) -> Tensor:
        return torch.where(self._moved > 0, z, self.latent)

    def _lay(self, drawn: list[Tensor]) -> Tensor:
        image = self.image.clone()
        for d, part in zip(self._drawn, drawn, strict=True):
            image[(d.images, slice(None), *d.pixels)] = part
        return image
