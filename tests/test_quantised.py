"""Weights of eight bits: levels without gradients run on networks that hold anything, if only they compute.

Skipped without torchao, which is no part of the extra "dev": version 0.18 warns at every start of diffusers on a CPU.
"""

import pytest
import torch

from vml_ldm import VMLInpaintPipeline, bundled_model
from vml_ldm.assets import example_images
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.evaluation.tasks import box_mask
from vml_ldm.images import from_pil, load_image

COUNT = 16
torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def pipes() -> list[VMLInpaintPipeline]:
    """The bundled checkpoint in float32, and with the weights of its linear layers in eight bits."""
    found = [VMLInpaintPipeline.from_pretrained(bundled_model()) for _ in range(2)]
    for pipe in found:
        pipe.set_progress_bar_config(disable=True)
    for network in (found[1].unet, found[1].text_encoder, found[1].vae):
        torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    return found


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_eight_bits_cost_less_than_half_a_decibel(pipes, scale):
    """In the mean over 16 held-out pictures, each with a box to paint."""
    paths, prompts = zip(*example_images("held_out")[:COUNT], strict=True)
    truths = torch.cat([from_pil(load_image(path).resize((128, 128))) for path in paths])
    known = box_mask(128, 128).reshape(1, 1, 128, 128)
    call = {"image": truths, "mask_image": 1 - known, "preset": "fast", "guidance_scale": scale, "output_type": "pt"}
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(COUNT)]  # noqa: E731
    images = [pipe(list(prompts), generator=generators(), **call).images for pipe in pipes]
    exact, eight = (psnr(found, truths, (1 - known).expand(COUNT, -1, -1, -1)).mean().item() for found in images)
    print(f"guidance {scale}: {exact:.2f} dB in float32, {eight:.2f} dB with weights of eight bits")
    assert abs(exact - eight) < 0.5
    assert (images[0] - images[1]).abs().max() > 0  # it is another network
