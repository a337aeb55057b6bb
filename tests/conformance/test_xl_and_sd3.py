"""SDXL and SD3: what leaves the images of stock inpainting as they are, or what they follow; and of ours, solver on."""

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusion3InpaintPipeline, StableDiffusionXLInpaintPipeline
from subjects import SIZE, Subject, mask, picture, same
from test_adapters import lora

from vml_ldm import VMLInpaintSD3Pipeline, VMLInpaintXLPipeline

FAMILIES = {
    "xl": (StableDiffusionXLInpaintPipeline, VMLInpaintXLPipeline, tiny.xl_components),
    "sd3": (StableDiffusion3InpaintPipeline, VMLInpaintSD3Pipeline, tiny.sd3_components),
}
SOLVERS = {"stock": {}, "vml": {"inner_steps": 1}}  # with the solver off ours is stock: test_families.py
ORIGINALS = {name: make() for name, (*_, make) in FAMILIES.items()}


@dataclass(frozen=True)
class Member(Subject):
    """A subject of another family than Stable Diffusion's."""

    family: str

    def make(self, parts: dict, **options):
        marked = {"add_watermarker": False} if self.family == "xl" else {}
        return self.quiet(self.cls(**parts, **marked, **options))

    def call(self, pipe, **arguments):
        return super().call(pipe, **{"strength": 1.0, **arguments})


MEMBERS = [
    Member(solver, FAMILIES[family][solver != "stock"], own, family)
    for family in FAMILIES
    for solver, own in SOLVERS.items()
]


@pytest.fixture(params=MEMBERS, ids=[f"{member.family}-{member.name}" for member in MEMBERS])
def subject(request) -> Member:
    return request.param


def copy_parts(family: str) -> dict:
    """Components that a test may change, all but the tokenizers."""
    words = {name: part for name, part in ORIGINALS[family].items() if name.startswith("tokenizer")}
    return copy.deepcopy({**ORIGINALS[family], **dict.fromkeys(words)}) | words


@pytest.fixture
def parts(subject) -> dict:
    return copy_parts(subject.family)


def networks(pipe) -> tuple:
    return getattr(pipe, "unet", None) or pipe.transformer, pipe.vae


def round_weights(pipe):
    """To what layerwise casting stores."""
    for network in networks(pipe):
        network.to(torch.bfloat16).to(torch.float32)


@cache
def unhelped(family: str, solver: str) -> np.ndarray:
    """The images without any help."""
    (member,) = [member for member in MEMBERS if (member.family, member.name) == (family, solver)]
    pipe = member.make(copy_parts(family))
    round_weights(pipe)
    return member.images(pipe)


def slice_attention(pipe, folder):
    pipe.enable_attention_slicing(1)


def fuse_projections(pipe, folder):
    for network in networks(pipe):
        network.fuse_qkv_projections()


def offload_model(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe, folder):
    for network in networks(pipe):
        cpu_offload(network, torch.device("cpu"), offload_buffers=True)


def offload_groups(pipe, folder, **options):
    for name, network in zip("ab", networks(pipe), strict=True):  # files are named by classes
        network.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(folder / name), **options)


def offload_leaves(pipe, folder):
    offload_groups(pipe, folder, offload_type="leaf_level")


def offload_blocks(pipe, folder):
    offload_groups(pipe, folder, offload_type="block_level", num_blocks_per_group=1)


def cast_layers(pipe, folder):
    for network in networks(pipe):
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


HELPS = [slice_attention, fuse_projections, offload_model, offload_layers, offload_leaves, offload_blocks, cast_layers]


@pytest.mark.parametrize("enable", HELPS, ids=lambda function: function.__name__)
def test_no_image_changes(subject, parts, enable, tmp_path):
    """what saves memory or time changes no image, with checkpointing too"""
    pipe, images = subject.make(parts), unhelped(subject.family, subject.name)
    round_weights(pipe)
    enable(pipe, tmp_path)
    assert same(subject.images(pipe), images, 1e-3)
    if subject.name == "vml":
        for network in networks(pipe):
            network.enable_gradient_checkpointing()
        assert same(subject.images(pipe), images, 1e-3)


def test_vae_slicing_and_tiling(subject, parts):
    """VAE slicing changes no image of a batch, and tiling gives whole ones"""
    pipe = subject.make(parts)
    batch = {"prompt": ["a hat"] * 2, "image": [picture(0), picture(1)], "mask_image": [mask()] * 2}
    images = subject.images(pipe, **batch)
    pipe.vae.enable_slicing()
    assert same(subject.images(pipe, **batch), images, 1e-3)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    pipe.vae.enable_tiling()
    wide = subject.images(pipe, width=64)
    assert wide.shape == (1, SIZE, 64, 3) and np.isfinite(wide).all()


def test_freeu(subject, parts):
    """FreeU changes SDXL's images, and they are back without it"""
    if subject.family != "xl":
        pytest.skip("for UNets")
    pipe = subject.make(parts)
    images = subject.images(pipe)
    pipe.enable_freeu(s1=0.1, s2=0.1, b1=2.0, b2=2.0)
    assert not same(subject.images(pipe), images)
    pipe.disable_freeu()
    assert same(subject.images(pipe), images)


def test_variants(subject, parts, tmp_path):
    """a variant is saved under its name and loaded by it"""
    pipe = subject.make(parts)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert same(subject.images(subject.load(tmp_path, variant="fp16")), subject.images(pipe))


def test_lora(subject, parts):
    """LoRA weights act, by a scale that holds under checkpointing, and are unloaded"""
    pytest.importorskip("peft")
    pipe = subject.make(parts)
    network, argument = networks(pipe)[0], {"xl": "cross_attention_kwargs", "sd3": "joint_attention_kwargs"}
    images = subject.images(pipe)
    name = {"xl": "unet", "sd3": "transformer"}[subject.family]
    weights = {key.replace("unet.", f"{name}.", 1): value for key, value in lora(network).items()}
    pipe.load_lora_weights(weights, adapter_name="style")
    scale = {argument[subject.family]: {"scale": 0.5}}
    styled, scaled = subject.images(pipe), subject.images(pipe, **scale)
    assert not same(styled, images) and not same(scaled, styled) and not same(scaled, images)
    network.enable_gradient_checkpointing()
    assert same(subject.images(pipe, **scale), scaled, 1e-3) and same(subject.images(pipe), styled, 1e-3)
    pipe.unload_lora_weights()
    assert same(subject.images(pipe), images, 1e-3)


def test_textual_inversion(subject, parts):
    """a learned word acts in SDXL's prompts"""
    if subject.family != "xl":
        pytest.skip("stock SD3 has none")
    pipe = subject.make({**parts, "tokenizer": tiny.tokenizer()})
    images = subject.images(pipe, prompt="a <thing>")
    vectors = 5 * torch.randn(2, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion(vectors, "<thing>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    assert not same(subject.images(pipe, prompt="a <thing>"), images, 1e-5)
