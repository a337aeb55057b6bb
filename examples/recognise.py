"""How many names a checkpoint draws so that they are recognised.

    python examples/recognise.py                      # the bundled checkpoint
    python examples/recognise.py --model FOLDER

96 of the names that it was trained on (`random.Random(7)`) are drawn by stock text-to-image, guidance 5, 50 steps, the
place in the list as seed. A name counts if the picture that it belongs to is among the 20 nearest of all training
pictures, by `vml_ldm.evaluation.gallery`. It prints every name with its rank, and the count.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from vml_ldm.assets import bundled_model
from vml_ldm.evaluation.gallery import Gallery, fetch

COUNT, SEED, WORST_RANK, GUIDANCE, BATCH = 96, 7, 20, 5.0, 16


def recognised(pipe: StableDiffusionPipeline, gallery: Gallery) -> list[tuple[str, int]]:
    """The names, each with the rank of the picture it belongs to."""
    first = {prompt: name for name, prompt in reversed(list(zip(gallery.names, gallery.prompts, strict=True)))}
    prompts, found = random.Random(SEED).sample(sorted(first), COUNT), []
    for start in range(0, COUNT, BATCH):
        batch = prompts[start : start + BATCH]
        drawings = pipe(
            batch,
            guidance_scale=GUIDANCE,
            num_inference_steps=50,
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(batch))],
            output_type="pt",
        ).images
        found += zip(batch, gallery.ranks(drawings, [first[prompt] for prompt in batch]), strict=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a checkpoint (default: the bundled one)")
    parser.add_argument("--data", type=Path, help="folder of the training pictures (default: downloaded)")
    parser.add_argument("--cache", type=Path, default=Path("runs/gallery"), help="folder for pictures and features")
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(options.model or bundled_model(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    found = recognised(pipe, Gallery(options.data or fetch(options.cache), size, options.cache))
    for prompt, rank in found:
        print(f"{rank:5d}  {prompt}")
    print(f"{sum(rank <= WORST_RANK for _, rank in found)} of {COUNT} names recognised")


if __name__ == "__main__":
    main()
