"""Fluent Emoji 3D as a training set: download, names, and a split by base emoji.

An image is named by its code points (``1f9d1-1f3fb-200d-1f680.webp``). The *bases* of an image are its code points
without skin tones, joiners, variation selectors and gender signs. Bases that look alike (clock faces, coloured hearts,
cat faces, ...) form a *family*, and a family lies on one side of the split. An image is trained on only when none of
its bases is held out, for figures or for validation.
"""

from __future__ import annotations

import random
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import torch
from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SEED = 2026
N_HELD_OUT, N_VALIDATION = 170, 110

# Code points that vary an emoji: joiner, selectors, keycap, gender signs, skin tones, hair.
_MODIFIERS = {0x200D, 0xFE0E, 0xFE0F, 0x20E3, 0x2640, 0x2642, *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)}
_FLAG_LETTERS = set(range(0x1F1E6, 0x1F200))


def _span(*ranges: str) -> set[int]:
    """The code points of ``"1f550-1f567"``-style inclusive ranges and single numbers."""
    points: set[int] = set()
    for item in ranges:
        first, _, last = item.partition("-")
        points.update(range(int(first, 16), int(last or first, 16) + 1))
    return points


# Near-copies by design. Everything in a family is drawn on the same base shape or is another colour of it.
FAMILIES: dict[str, set[int]] = {
    "clock faces": _span("1f550-1f567"),
    "watches": _span("231a", "23f0", "23f1"),
    "hourglasses": _span("231b", "23f3"),
    "moons": _span("1f311-1f31d"),
    "globes": _span("1f30d-1f30f"),
    "hearts": _span("2764", "2763", "1f493-1f49d", "1f49f", "1f5a4", "1f90d", "1f90e", "1f9e1", "1fa75-1fa77", "2665"),
    "circles": _span("26aa", "26ab", "1f534", "1f535", "1f7e0-1f7e4", "1f518", "2b55"),
    "squares": _span("25aa", "25ab", "25fb-25fe", "2b1b", "2b1c", "1f7e5-1f7eb", "1f532", "1f533"),
    "diamonds": _span("1f536-1f539", "1f4a0"),
    "triangles": _span("1f53a", "1f53b"),
    "flags": _span("1f3f3", "1f3f4", "1f3c1", "1f6a9", "1f38c", "26f3", "26a7", "1f308", "2620"),
    "books": _span("1f4d2-1f4d5", "1f4d7-1f4da"),
    "letter buttons": _span("1f170", "1f171", "1f17e", "1f17f", "1f18e", "1f191-1f19a", "24c2"),
    "Japanese buttons": _span("1f201", "1f202", "1f21a", "1f22f", "1f232-1f23a", "1f250", "1f251", "3297", "3299"),
    "arrow buttons": _span("2194-2199", "21a9", "21aa", "27a1", "2934", "2935", "2b05-2b07", "1f500-1f504",
                           "1f53c", "1f53d", "23e9-23ef", "25b6", "25c0", "23cf", "23f8-23fa", "1f3a6", "1f505", "1f506"),
    "word arrows": _span("1f519-1f51d"),
    "keycaps": _span("0023", "002a", "0030-0039", "1f51f", "1f520-1f524"),
    "zodiac": _span("2648-2653", "26ce"),
    "sign buttons": _span("1f6b9-1f6be", "1f6c2-1f6c5", "267f", "1f6d7", "1f6dc", "1f4f3", "1f4f4", "1f4f6", "1f6b0"),
    "symbol buttons": _span("26ce", "262a", "262e", "262f", "2626", "2638", "271d", "2721", "1f549", "1f54e", "1f6d0",
                            "1f52f", "269b", "2733", "2734", "2747", "274e", "267e", "1faaf", "2622", "2623"),
    "prohibited": _span("1f6ab", "1f6ad", "1f6af", "1f6b1", "1f6b3", "1f6b7", "1f4f5", "1f51e", "26d4"),
    "punctuation": _span("2753-2755", "2757", "203c", "2049"),
    "arithmetic": _span("2795-2797", "2716", "1f7f0", "274c"),
    "check marks": _span("2705", "2714", "2611"),
    "loops": _span("27b0", "27bf", "3030"),
    "legal marks": _span("00a9", "00ae", "2122"),
    "card suits": _span("2660", "2663", "2666"),
    "smiles": _span("1f600-1f607", "1f609", "1f60a", "1f60c", "1f60f", "1f642", "1f643", "263a", "1f972", "1f929",
                    "1f60d", "1f60e", "1f970", "1f61a", "1f617-1f619", "1f923", "1f917"),
    "tongues": _span("1f60b", "1f61b-1f61d", "1f92a", "1f924"),
    "plain faces": _span("1f610-1f612", "1f636", "1f644", "1f928", "1f62c", "1fae4", "1fae5", "1f611", "1f615", "1f641",
                         "2639", "1f61e", "1f61f", "1f614", "1f613", "1f625", "1f622", "1f62d", "1f626", "1f627",
                         "1f62e", "1f62f", "1f632", "1f633", "1f628", "1f630", "1f97a", "1f979", "1f62a", "1f634"),
    "weary faces": _span("1f616", "1f623", "1f629", "1f62b", "1f971"),
    "angry faces": _span("1f620", "1f621", "1f92c", "1f624"),
    "horned faces": _span("1f608", "1f47f"),
    "sick faces": _span("1f912", "1f915", "1f637", "1f922", "1f92e", "1f927"),
    "hand on face": _span("1f914", "1f92b", "1f92d", "1fae2", "1fae3", "1fae1"),
    "dizzy faces": _span("1f635", "1f974", "1fae8", "1f92f"),
    "nerds": _span("1f913", "1f9d0", "1f978"),
    "cat faces": _span("1f638-1f640", "1f431"),
    "monkeys": _span("1f648-1f64a", "1f435"),
    "cats and dogs": _span("1f408", "1f415", "1f9ae", "1f429"),
    "chicks": _span("1f423-1f425"),
    "camels": _span("1f42a", "1f42b"),
    "cattle": _span("1f402-1f404", "1f9ac"),
    "sheep": _span("1f40f-1f411"),
    "whales": _span("1f40b", "1f433"),
    "mice": _span("1f400", "1f401"),
    "cows": _span("1f42e", "1f437", "1f43d"),
    "tiger and leopard": _span("1f405", "1f406"),
    "fish": _span("1f41f", "1f420"),
    "plain people": _span("1f466-1f469", "1f471", "1f474-1f476", "1f9d1-1f9d4", "1f481", "1f486", "1f487", "1f645-1f647",
                          "1f64b", "1f64d", "1f64e", "1f926", "1f937", "1f9cf", "1f472", "1f473", "1f9d5", "1f9cd",
                          "1f46a-1f46d", "1f48f", "1f491"),  # the pairs and families also exist as joined sequences
    "crowned people": _span("1f478", "1f934", "1fac5"),
    "wedding people": _span("1f470", "1f935"),
    "expecting people": _span("1f930", "1f931", "1fac3", "1fac4"),
    "caped people": _span("1f9b8", "1f9b9"),
    "dancers": _span("1f483", "1f57a"),
    "walkers": _span("1f6b6", "1f3c3", "1f9ce"),
    "cyclists": _span("1f6b4", "1f6b5"),
    "Christmas people": _span("1f385", "1f936"),
    "swimmers": _span("1f3ca", "1f93d"),
    "busts": _span("1f464", "1f465", "1fac2"),
    "hands": _span("1f446-1f450", "1f44a-1f44f", "1f590", "1f595", "1f596", "1f64c", "1f64f", "1f90c", "1f90f",
                   "1f918-1f91f", "1f932", "1f933", "261d", "270a-270d", "1faf0-1faf8", "1f485", "1f4aa"),
    "ears": _span("1f442", "1f9bb"),
    "limbs": _span("1f9b5", "1f9b6", "1f9be", "1f9bf"),
    "medals": _span("1f947-1f949", "1f3c5"),
    "musical notes": _span("1f3b5", "1f3b6"),
    "apples": _span("1f34e", "1f34f"),
    "citrus": _span("1f34a", "1f34b"),
    "green leaves": _span("2618", "1f340"),
    "blossoms": _span("1f338", "1f33a", "1f33c", "1f4ae", "1f3f5"),
    "roses": _span("1f339", "1f940"),
    "flower": _span("1f337", "1f490"),
    "beers": _span("1f37a", "1f37b"),
    "clinking": _span("1f942", "1f943"),
    "bowls": _span("1f35a", "1f35b", "1f35c", "1f372", "1f957", "1f963"),
    "rice crackers": _span("1f358", "1f359"),
    "ice creams": _span("1f366", "1f368"),
    "shortcakes": _span("1f370", "1f382"),
    "flatbreads": _span("1f32e", "1f32f", "1f959", "1fad3"),
    "plates": _span("1f374", "1f37d"),
    "breads": _span("1f35e", "1f956"),
    "clouds": _span("2601", "26c5", "26c8", "1f324-1f32a", "2600"),
    "sunsets": _span("1f301", "1f303-1f307", "1f309", "1f30c", "1f386", "1f387", "1f391", "1f3d9"),
    "stars": _span("2b50", "1f31f", "1f320", "2728", "1f4ab", "2604"),
    "umbrellas": _span("2602", "2614", "1f302", "26f1", "1f3d6", "1f3dd"),
    "snowmen": _span("2603", "26c4"),
    "mountains": _span("26f0", "1f3d4", "1f5fb"),
    "houses": _span("1f3e0", "1f3e1", "1f3d8", "1f3da"),
    "blocks": _span("1f3e2-1f3e6", "1f3e8-1f3ec"),
    "castles": _span("1f3ef", "1f3f0"),
    "cars": _span("1f695-1f699", "1f693", "1f694", "1f6fb"),
    "buses": _span("1f68c-1f68e", "1f690"),
    "lorries": _span("1f69a", "1f69b", "1f691", "1f692"),
    "trains": _span("1f682-1f688", "1f68a", "1f68b", "1f69d-1f69f", "1f689"),
    "cable cars": _span("1f6a0", "1f6a1"),
    "traffic lights": _span("1f6a5", "1f6a6"),
    "wheelchairs": _span("1f9bc", "1f9bd"),
    "ships": _span("1f6a2", "1f6f3", "26f4", "1f6a4", "1f6e5"),
    "aeroplanes": _span("2708", "1f6e9", "1f6eb", "1f6ec"),
    "mailboxes": _span("1f4ea-1f4ed"),
    "envelopes": _span("2709", "1f4e7-1f4e9", "1f48c", "1f9e7"),
    "trays": _span("1f4e4", "1f4e5"),
    "banknotes": _span("1f4b4-1f4b8"),
    "charts": _span("1f4c8-1f4ca", "1f4b9"),
    "calendars": _span("1f4c5", "1f4c6", "1f5d3", "1f5d2"),
    "folders": _span("1f4c1", "1f4c2", "1f5c2"),
    "pages": _span("1f4c3", "1f4c4", "1f4d1", "1f4dd", "1f4cb", "1f9fe"),
    "discs": _span("1f4bd", "1f4bf", "1f4c0"),
    "pins": _span("1f4cc", "1f4cd"),
    "paper clips": _span("1f4ce", "1f587"),
    "rulers": _span("1f4cf", "1f4d0"),
    "phones": _span("1f4f1", "1f4f2"),
    "telephones": _span("260e", "1f4de"),
    "cameras": _span("1f4f7", "1f4f8"),
    "film cameras": _span("1f3a5", "1f4f9", "1f4fd"),
    "speakers": _span("1f507-1f50a"),
    "magnifiers": _span("1f50d", "1f50e"),
    "locks": _span("1f50f", "1f510", "1f512", "1f513"),
    "keys": _span("1f511", "1f5dd"),
    "bells": _span("1f514", "1f515", "1f6ce"),
    "batteries": _span("1f50b", "1faab"),
    "hammers": _span("1f528", "1f6e0", "2692", "26cf", "1fa93"),
    "swords": _span("2694", "1f5e1", "1f52a"),
    "pens": _span("1f58a", "1f58b", "2712", "270f", "1f58d", "1f58c"),
    "bubbles": _span("1f4ac", "1f4ad", "1f5e8", "1f5ef"),
    "footwear": _span("1f45e", "1f45f", "1f97e", "1f97f"),
    "spectacles": _span("1f453", "1f576"),
    "purses": _span("1f45b-1f45d"),
    "monsters": _span("1f479", "1f47a"),
    "droplets": _span("1f4a6", "1f4a7", "1fa78"),
    "skulls": _span("1f480", "2620"),
    "coffins": _span("26b0", "26b1"),
    "tickets": _span("1f39f", "1f3ab"),
    "balls": _span("26be", "1f94e"),
    "dragons": _span("1f409", "1f432"),
    "horses": _span("1f40e", "1f434"),
    "rabbits": _span("1f407", "1f430"),
    "bears": _span("1f43b", "1f43c", "1f428"),
    "tigers": _span("1f42f", "1f981"),
    "foxes": _span("1f43a", "1f98a"),
    "birds": _span("1f426", "1f54a", "1fabf", "1f986"),
    "nests": _span("1fab9", "1faba"),
    "eyes": _span("1f440", "1f441"),
    "mouths": _span("1f444", "1fae6"),
    "silverware": _span("1f944", "1f962"),
    "prayer": _span("1f4ff", "1f9ff"),
    "space": _span("1f6f0", "1f4e1"),
    "saws": _span("1fa9a", "1fa9b"),
    "receptacles": _span("1f961", "1f9c3"),
    "nuts": _span("1f52d", "1f52c"),
}


@dataclass(frozen=True)
class Item:
    """One image of the set: its file, its prompt and the base code points it is made of."""

    path: Path
    prompt: str
    bases: frozenset[int]

    @property
    def single(self) -> bool:
        """Whether the file shows one code point without any modifier but the emoji selector."""
        return len(_points(self.path.stem) - {0xFE0F}) == 1


def _points(stem: str) -> set[int]:
    return {int(part, 16) for part in stem.replace("_", "-").split("-")}


def _bases(stem: str) -> frozenset[int]:
    """Base code points of a file; a flag made of letters counts as the white flag's family."""
    points = _points(stem) - {p for p in _points(stem) if 0xE0000 <= p <= 0xE007F}
    if points & _FLAG_LETTERS:
        return frozenset({0x1F3F3})
    return frozenset(points - _MODIFIERS) or frozenset(points)


def prompt_of(stem: str) -> str:
    """The emoji's English name in lower case, as words: ``"woman astronaut with light skin tone"``."""
    text = "".join(chr(int(part, 16)) for part in stem.replace("_", "-").split("-"))
    for candidate in (text, text + "\ufe0f", text.replace("\ufe0f", ""), text + "\U000e007f"):
        if candidate in emoji.EMOJI_DATA:
            name = emoji.EMOJI_DATA[candidate]["en"]
            break
    else:
        raise KeyError(f"no name for {stem}")
    name = name.strip(":").replace("_", " ").replace("’", "'").lower()
    tones = [t for t in ("medium-light", "medium-dark", "light", "medium", "dark") if name.endswith(f" {t} skin tone")]
    if tones:
        name = name[: -len(f" {tones[0]} skin tone")].rstrip() + f" with {tones[0]} skin tone"
    for mark in ("-", ":", "(", ")", ",", "!"):
        name = name.replace(mark, " ")
    return " ".join(name.split())


def fetch(cache: Path) -> Path:
    """Download the package with ``npm pack`` into ``cache`` (once) and return the folder of images."""
    folder = cache / "package" / "assets"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=cache, check=True)
        with tarfile.open(next(cache.glob("*.tgz"))) as archive:
            archive.extractall(cache, filter="data")
    return folder


def load_items(folder: Path) -> list[Item]:
    """Every named image of the folder, sorted by file name, each file once."""
    items, seen = [], set()
    for path in sorted(folder.glob("*.webp")):
        key = "-".join(part.lstrip("0") for part in path.stem.split("-") if part != "fe0f")
        if key in seen:  # a few emoji are in the package twice, under two spellings
            continue
        seen.add(key)
        items.append(Item(path, prompt_of(path.stem), _bases(path.stem)))
    if not items:
        raise FileNotFoundError(f"no .webp images in {folder}")
    return items


def _clusters(items: list[Item]) -> list[list[Item]]:
    """Single emoji grouped into families; an emoji in no family is its own group."""
    leader: dict[int, int] = {}

    def find(point: int) -> int:
        while leader.setdefault(point, point) != point:
            point = leader[point]
        return point

    for family in FAMILIES.values():
        for point in family:
            leader[find(point)] = find(min(family))
    groups: dict[int, list[Item]] = {}
    for item in items:
        if item.single:
            groups.setdefault(find(min(item.bases)), []).append(item)
    return [groups[key] for key in sorted(groups)]


def split(items: list[Item]) -> tuple[list[Item], list[Item], list[Item]]:
    """Train, held-out and validation items. Families above 16 emoji stay in the training set."""
    groups = [g for g in _clusters(items) if len(g) <= 16]
    random.Random(SEED).shuffle(groups)
    chosen: list[list[Item]] = []
    for count in (N_HELD_OUT, N_VALIDATION):
        side: list[Item] = []
        while len(side) < count:
            side += groups.pop()
        chosen.append(sorted(side, key=lambda item: item.path.name))
    held_out, validation = chosen
    banned = family_bases(held_out + validation)
    return [item for item in items if not item.bases & banned], held_out, validation


def family_bases(items: list[Item]) -> set[int]:
    """All base code points of the items and of the families they belong to."""
    bases = set().union(*(item.bases for item in items))
    return bases.union(*(family for family in FAMILIES.values() if family & bases))


def sample(items: list[Item], count: int) -> list[Item]:
    """A reproducible choice of ``count`` square items, in file order: the images that ship with the package."""
    square = [item for item in items if Image.open(item.path).size == (256, 256)]
    return sorted(random.Random(SEED).sample(square, count), key=lambda item: item.path.name)


def sampling_weights(items: list[Item]) -> list[float]:
    """One over the root of the number of variants, so that skin tones and flags do not crowd out the rest."""
    counts = Counter(item.bases for item in items)
    return [counts[item.bases] ** -0.5 for item in items]


def write_list(path: Path, items: list[Item]) -> None:
    """One line an emoji: file name, tab, prompt."""
    path.write_text("".join(f"{item.path.name}\t{item.prompt}\n" for item in items), encoding="utf-8")


def load_image(path: Path) -> Image.Image:
    """The emoji on white, 256 x 256 (the four taller ones are centre-cropped)."""
    image = Image.open(path).convert("RGBA")
    top = (image.height - 256) // 2
    image = image.crop((0, top, 256, top + 256))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def load_originals(items: list[Item]) -> torch.Tensor:
    """All images at 256 x 256, uint8, (N, 3, 256, 256)."""
    return torch.stack([torch.from_numpy(np.array(load_image(i.path))).permute(2, 0, 1) for i in items])


def untouched(items: list[Item], size: int = 128) -> torch.Tensor:
    """The images as they are evaluated: Lanczos to ``size``, (N, 3, size, size) in [-1, 1]."""
    images = [load_image(i.path).resize((size, size), Image.Resampling.LANCZOS) for i in items]
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float() / 127.5 - 1
