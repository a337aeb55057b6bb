"""Parts of a pipeline on different devices, as far as one device can show: the second one here is `meta`.

A network on `meta` computes shapes only, and nothing comes back from it. So what goes in is looked at by the network's
own hooks, and that its output is fetched shows in the error that `meta` raises for it.
"""

import pytest
import tiny
import torch
from accelerate import dispatch_model
from test_diffusers_adapter import noise, prior

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.adapters.diffusers import LDMPrior, PixelPrior
from vml_ldm.operators import Downsample

FETCHED = pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor")


def watch(network: torch.nn.Module) -> list[str]:
    """The device of every tensor that reaches a layer with weights of its own."""
    seen = []
    for layer in network.modules():
        if list(layer.parameters(recurse=False)):
            layer.register_forward_pre_hook(
                lambda _, inputs: seen.extend(x.device.type for x in inputs if isinstance(x, torch.Tensor))
            )
    return seen


@pytest.mark.parametrize("call", ["denoise", "denoise_pullback", "guided", "push"])
def test_the_unet_s_inputs_go_to_its_device_and_its_estimate_comes_back(call):
    where = prior(guidance_scale=3.0)
    where.unet.to("meta")
    for told in (where.condition, where.negative):
        told["added_cond_kwargs"] = {"image_embeds": [noise(2, 4)]}
    seen, x = watch(where.unet), noise(2, 4, 8, 8)
    with FETCHED:
        getattr(where, call)(*([x, x] if call == "push" else [x]), 0.6, 0.8)
    assert set(seen) == {"meta"} and len(seen) > 30


@pytest.mark.parametrize("call", ["decode", "decode_pullback", "encode"])
def test_the_vae_s_inputs_go_to_its_device_and_its_image_comes_back(call):
    where = prior()
    where.vae.to("meta")
    seen = watch(where.vae)
    with FETCHED:
        getattr(where, call)(noise(2, 3, 64, 64) if call == "encode" else noise(2, 4, 8, 8))
    assert set(seen) == {"meta"} and len(seen) > 10


@pytest.mark.parametrize("call", ["denoise", "decode", "encode"])
def test_unconditional_models_too(call):
    parts = {"unet": tiny.unet2d().to("meta"), "vqvae": tiny.vqvae().to("meta"), "scheduler": tiny.scheduler()}
    image, scales = noise(2, 3, 16, 16), (0.6, 0.8)[: 2 * (call == "denoise")]
    with FETCHED:
        getattr(LDMPrior(**parts), call)(image, *scales)
    if call == "denoise":
        with FETCHED:
            PixelPrior(unet=parts["unet"], scheduler=parts["scheduler"]).denoise(image, *scales)


def test_a_network_that_accelerate_placed_fetches_its_inputs_itself():
    """Its parameters may lie anywhere between calls, so they do not say where it runs."""
    plain, placed = prior(), prior()
    placed.vae = dispatch_model(placed.vae, {"": "cpu"}, force_hooks=True)
    placed.unet = dispatch_model(placed.unet, {"": "cpu"}, force_hooks=True)
    z = noise(2, 4, 8, 8)
    for call, given in (("decode", (z,)), ("denoise", (z, 0.6, 0.8)), ("encode", (noise(2, 3, 64, 64),))):
        assert torch.equal(getattr(plain, call)(*given), getattr(placed, call)(*given))
    placed.vae.to("meta")
    placed.vae._hf_hook.execution_device = "cpu"
    assert placed._guard.place(placed.vae, z).device.type == "cpu"


@pytest.mark.parametrize("kind", [VMLRestorePipeline, VMLInpaintPipeline])
def test_a_balanced_device_map_gives_the_same_image(kind, tmp_path):
    model = tiny.save(tmp_path)
    if kind is VMLRestorePipeline:
        problem = {"y": noise(1, 3, 16, 16).sigmoid(), "operator": Downsample(4), "height": 64, "width": 64}
    else:
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., :32] = 1
        problem = {"image": noise(1, 3, 64, 64).sigmoid(), "mask_image": mask, "prompt": ""}
    images = []
    for options in ({}, {"device_map": "balanced"}):
        pipe = kind.from_pretrained(model, safety_checker=None, **options)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        out = pipe(**problem, generator=generator, num_inference_steps=4, preset="fast", output_type="pt")
        images.append(out.images)
    assert torch.allclose(*images, atol=1e-4)
