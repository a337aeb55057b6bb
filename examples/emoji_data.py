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


def _families(table: str) -> list[set[int]]:
    """The families of a table with one ``name: ranges`` entry in a line (and indented lines that go on)."""
    entries = table.replace("\n    ", " ").strip().splitlines()
    return [_span(*entry.partition(":")[2].split()) for entry in entries]


# Emoji drawn on the same shape, or other colours of it. Pairs of people are also made of joined single people.
FAMILIES = _families("""
clock faces: 1f550-1f567
watches: 231a 23f0 23f1
hourglasses: 231b 23f3
moons: 1f311-1f31d
globes: 1f30d-1f30f
hearts: 2764 2763 1f493-1f49d 1f49f 1f5a4 1f90d 1f90e 1f9e1 1fa75-1fa77 2665
circles: 26aa 26ab 1f534 1f535 1f7e0-1f7e4 1f518 2b55
squares: 25aa 25ab 25fb-25fe 2b1b 2b1c 1f7e5-1f7eb 1f532 1f533
diamonds: 1f536-1f539 1f4a0
triangles: 1f53a 1f53b
flags: 1f3f3 1f3f4 1f3c1 1f6a9 1f38c 26f3 26a7 1f308 2620
books: 1f4d2-1f4d5 1f4d7-1f4da
letter buttons: 1f170 1f171 1f17e 1f17f 1f18e 1f191-1f19a 24c2
Japanese buttons: 1f201 1f202 1f21a 1f22f 1f232-1f23a 1f250 1f251 3297 3299
arrow buttons: 2194-2199 21a9 21aa 27a1 2934 2935 2b05-2b07 1f500-1f504 1f53c 1f53d 23e9-23ef 25b6 25c0 23cf 23f8-23fa
    1f3a6 1f505 1f506
word arrows: 1f519-1f51d
keycaps: 0023 002a 0030-0039 1f51f 1f520-1f524
zodiac: 2648-2653 26ce
sign buttons: 1f6b9-1f6be 1f6c2-1f6c5 267f 1f6d7 1f6dc 1f4f3 1f4f4 1f4f6 1f6b0
symbol buttons: 26ce 262a 262e 262f 2626 2638 271d 2721 1f549 1f54e 1f6d0 1f52f 269b 2733 2734 2747 274e 267e 1faaf
    2622 2623
prohibited: 1f6ab 1f6ad 1f6af 1f6b1 1f6b3 1f6b7 1f4f5 1f51e 26d4
punctuation: 2753-2755 2757 203c 2049
arithmetic: 2795-2797 2716 1f7f0 274c
check marks: 2705 2714 2611
loops: 27b0 27bf 3030
legal marks: 00a9 00ae 2122
card suits: 2660 2663 2666
smiles: 1f600-1f607 1f609 1f60a 1f60c 1f60f 1f642 1f643 263a 1f972 1f929 1f60d 1f60e 1f970 1f61a 1f617-1f619 1f923
    1f917
tongues: 1f60b 1f61b-1f61d 1f92a 1f924
plain faces: 1f610-1f612 1f636 1f644 1f928 1f62c 1fae4 1fae5 1f611 1f615 1f641 2639 1f61e 1f61f 1f614 1f613 1f625
    1f622 1f62d 1f626 1f627 1f62e 1f62f 1f632 1f633 1f628 1f630 1f97a 1f979 1f62a 1f634
weary faces: 1f616 1f623 1f629 1f62b 1f971
angry faces: 1f620 1f621 1f92c 1f624
horned faces: 1f608 1f47f
sick faces: 1f912 1f915 1f637 1f922 1f92e 1f927
hand on face: 1f914 1f92b 1f92d 1fae2 1fae3 1fae1
dizzy faces: 1f635 1f974 1fae8 1f92f
nerds: 1f913 1f9d0 1f978
cat faces: 1f638-1f640 1f431
monkeys: 1f648-1f64a 1f435
cats and dogs: 1f408 1f415 1f9ae 1f429
chicks: 1f423-1f425
camels: 1f42a 1f42b
cattle: 1f402-1f404 1f9ac
sheep: 1f40f-1f411
whales: 1f40b 1f433
mice: 1f400 1f401
cow and pig faces: 1f42e 1f437 1f43d
tiger and leopard: 1f405 1f406
fish: 1f41f 1f420
people: 1f466-1f469 1f471 1f474-1f476 1f9d1-1f9d4 1f481 1f486 1f487 1f645-1f647 1f64b 1f64d 1f64e 1f926 1f937 1f9cf
    1f472 1f473 1f9d5 1f9cd 1f46a-1f46d 1f48f 1f491
crowned people: 1f478 1f934 1fac5
wedding people: 1f470 1f935
expecting people: 1f930 1f931 1fac3 1fac4
caped people: 1f9b8 1f9b9
dancers: 1f483 1f57a
walkers: 1f6b6 1f3c3 1f9ce
cyclists: 1f6b4 1f6b5
Christmas people: 1f385 1f936
swimmers: 1f3ca 1f93d
busts: 1f464 1f465 1fac2
hands: 1f446-1f450 1f44a-1f44f 1f590 1f595 1f596 1f64c 1f64f 1f90c 1f90f 1f918-1f91f 1f932 1f933 261d 270a-270d
    1faf0-1faf8 1f485 1f4aa
ears: 1f442 1f9bb
limbs: 1f9b5 1f9b6 1f9be 1f9bf
medals: 1f947-1f949 1f3c5
musical notes: 1f3b5 1f3b6
apples: 1f34e 1f34f
citrus: 1f34a 1f34b
green leaves: 2618 1f340
blossoms: 1f338 1f33a 1f33c 1f4ae 1f3f5
roses: 1f339 1f940
tulip and bouquet: 1f337 1f490
beers: 1f37a 1f37b
clinking: 1f942 1f943
bowls: 1f35a 1f35b 1f35c 1f372 1f957 1f963
rice crackers: 1f358 1f359
ice creams: 1f366 1f368
shortcakes: 1f370 1f382
flatbreads: 1f32e 1f32f 1f959 1fad3
plates: 1f374 1f37d
breads: 1f35e 1f956
clouds: 2601 26c5 26c8 1f324-1f32a 2600
sunsets: 1f301 1f303-1f307 1f309 1f30c 1f386 1f387 1f391 1f3d9
stars: 2b50 1f31f 1f320 2728 1f4ab 2604
umbrellas: 2602 2614 1f302 26f1 1f3d6 1f3dd
snowmen: 2603 26c4
mountains: 26f0 1f3d4 1f5fb
houses: 1f3e0 1f3e1 1f3d8 1f3da
blocks: 1f3e2-1f3e6 1f3e8-1f3ec
castles: 1f3ef 1f3f0
cars: 1f695-1f699 1f693 1f694 1f6fb
buses: 1f68c-1f68e 1f690
lorries: 1f69a 1f69b 1f691 1f692
trains: 1f682-1f688 1f68a 1f68b 1f69d-1f69f 1f689
cable cars: 1f6a0 1f6a1
traffic lights: 1f6a5 1f6a6
wheelchairs: 1f9bc 1f9bd
ships: 1f6a2 1f6f3 26f4 1f6a4 1f6e5
aeroplanes: 2708 1f6e9 1f6eb 1f6ec
mailboxes: 1f4ea-1f4ed
envelopes: 2709 1f4e7-1f4e9 1f48c 1f9e7
trays: 1f4e4 1f4e5
banknotes: 1f4b4-1f4b8
charts: 1f4c8-1f4ca 1f4b9
calendars: 1f4c5 1f4c6 1f5d3 1f5d2
folders: 1f4c1 1f4c2 1f5c2
pages: 1f4c3 1f4c4 1f4d1 1f4dd 1f4cb 1f9fe
discs: 1f4bd 1f4bf 1f4c0
pins: 1f4cc 1f4cd
paper clips: 1f4ce 1f587
rulers: 1f4cf 1f4d0
phones: 1f4f1 1f4f2
telephones: 260e 1f4de
cameras: 1f4f7 1f4f8
film cameras: 1f3a5 1f4f9 1f4fd
speakers: 1f507-1f50a
magnifiers: 1f50d 1f50e
locks: 1f50f 1f510 1f512 1f513
keys: 1f511 1f5dd
bells: 1f514 1f515 1f6ce
batteries: 1f50b 1faab
hammers: 1f528 1f6e0 2692 26cf 1fa93
swords: 2694 1f5e1 1f52a
pens: 1f58a 1f58b 2712 270f 1f58d 1f58c
bubbles: 1f4ac 1f4ad 1f5e8 1f5ef
footwear: 1f45e 1f45f 1f97e 1f97f
spectacles: 1f453 1f576
purses: 1f45b-1f45d
monsters: 1f479 1f47a
droplets: 1f4a6 1f4a7 1fa78
skulls: 1f480 2620
coffins: 26b0 26b1
tickets: 1f39f 1f3ab
balls: 26be 1f94e
dragons: 1f409 1f432
horses: 1f40e 1f434
rabbits: 1f407 1f430
bears: 1f43b 1f43c 1f428
tiger and lion: 1f42f 1f981
foxes: 1f43a 1f98a
birds: 1f426 1f54a 1fabf 1f986
nests: 1fab9 1faba
eyes: 1f440 1f441
mouths: 1f444 1fae6
cutlery: 1f944 1f962
beads: 1f4ff 1f9ff
dishes: 1f6f0 1f4e1
saws and screwdrivers: 1fa9a 1fa9b
drink and food boxes: 1f961 1f9c3
optics: 1f52d 1f52c
""")


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

    for family in FAMILIES:
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
    return bases.union(*(family for family in FAMILIES if family & bases))


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
