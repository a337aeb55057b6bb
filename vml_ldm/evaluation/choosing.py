"""The rule by which the benchmark of prompts chooses its prompts, fixed before any solver is looked at.

The names of all training pictures are shuffled (`SEED`). Stock text-to-image with the checkpoint draws one after
another, guidance 5, 50 steps, the name's place in the shuffle as its seed; those whose drawing ranks at most
`WORST_RANK` for its own picture among all training pictures (see `vml_ldm.evaluation.gallery`) are taken. So what a
prompt asks for is something that the checkpoint knows, and no inpainting has a say.

    python -m vml_ldm.evaluation.choosing --count 48 --data FOLDER > vml_ldm/assets/prompts.txt
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline

from vml_ldm.assets import bundled_model
from vml_ldm.evaluation.gallery import Gallery, fetch

SEED, WORST_RANK, GUIDANCE, STEPS = 2026, 20, 5.0, 50
BATCH = 8


class Drawn(NamedTuple):
    """A training picture's file and name, its place in the shuffle and its rank among all for its drawing."""

    name: str
    prompt: str
    place: int
    rank: int


def shuffled(count: int) -> list[int]:
    """Places of `count` names in the order in which they are tried."""
    order = list(range(count))
    random.Random(SEED).shuffle(order)
    return order


def draw_all(pipe: StableDiffusionPipeline, gallery: Gallery) -> Iterator[Drawn]:
    """Every training picture's name drawn, in the order of the shuffle."""
    order = shuffled(len(gallery.names))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        drawings = pipe(
            [gallery.prompts[i] for i in batch],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(batch))],
            output_type="pt",
        ).images
        found = gallery.ranks(drawings, [gallery.names[i] for i in batch])
        for n, (i, rank) in enumerate(zip(batch, found, strict=True)):
            yield Drawn(gallery.names[i], gallery.prompts[i], start + n, rank)


def write_head(command: str, tried: int, taken: int) -> str:
    """Comment lines that say how a list was made."""
    return (
        f"# {taken} training pictures that stock text-to-image draws with rank <= {WORST_RANK} for their own name,\n"
        f"# of {tried} tried in a shuffle's order (seed {SEED}); guidance {GUIDANCE:g}, {STEPS} steps, seed = place.\n"
        f"# {command}\n# file, name, place in the shuffle, rank\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the list to the standard output."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=48, help="prompts to choose")
    parser.add_argument("--data", type=Path, help="folder of the training pictures (default: downloaded)")
    parser.add_argument("--model", help="folder of a checkpoint (default: the bundled one)")
    parser.add_argument("--cache", type=Path, default=Path("runs/gallery"), help="folder for pictures and features")
    options = parser.parse_args(arguments)
    pipe = StableDiffusionPipeline.from_pretrained(options.model or bundled_model(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    gallery, taken = Gallery(options.data or fetch(options.cache), size, options.cache), []
    for drawn in draw_all(pipe, gallery):
        print(f"{len(taken)} {drawn}", file=sys.stderr, flush=True)
        taken += [drawn] if drawn.rank <= WORST_RANK else []
        if len(taken) == options.count:
            break
    command = f"python -m vml_ldm.evaluation.choosing --count {options.count}"
    print(write_head(command, drawn.place + 1, len(taken)), end="")
    for name, prompt, place, rank in taken:
        print(f"{name}\t{prompt}\t{place}\t{rank}")


if __name__ == "__main__":
    main()
