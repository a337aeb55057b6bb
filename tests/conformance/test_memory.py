"""What saves memory or time leaves the images as they are: slicing, tiling, fused projections, offloading, casting."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from subjects import SIZE, SUBJECTS, mask, picture, same


def checkpoint(pipe):
    for network in (pipe.unet, pipe.vae):
        network.enable_gradient_checkpointing()


def test_attention_slicing(subject, pipe):
    """attention slicing changes no image"""
    images = subject.images(pipe)
    for size in ("auto", 1, "max"):
        pipe.enable_attention_slicing(size)
        assert same(subject.images(pipe), images, 1e-3)
    pipe.disable_attention_slicing()
    assert same(subject.images(pipe), images)


def test_vae_slicing(subject, pipe):
    """VAE slicing changes no image of a batch"""
    batch = {"prompt": ["a hat"] * 2, "image": [picture(0), picture(1)], "mask_image": [mask()] * 2}
    images = subject.images(pipe, **batch)
    pipe.vae.enable_slicing()
    assert same(subject.images(pipe, **batch), images, 1e-3)


def test_vae_tiling(subject, pipe):
    """VAE tiling gives whole images, also at sizes that are no multiple of a tile"""
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    pipe.vae.enable_tiling()
    decoded = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0].shape[-1]))
    images = subject.images(pipe, width=56)
    handle.remove()
    assert images.shape == (1, SIZE, 56, 3) and np.isfinite(images).all() and max(decoded) == 4


def test_freeu(subject, pipe):
    """FreeU changes the images, and they are back without it"""
    images = subject.images(pipe)
    pipe.enable_freeu(s1=0.1, s2=0.1, b1=2.0, b2=2.0)
    assert not same(subject.images(pipe), images)
    pipe.disable_freeu()
    assert same(subject.images(pipe), images)


def test_fused_projections(subject, pipe):
    """fused QKV projections change no image, and come apart again"""
    images = subject.images(pipe)
    pipe.fuse_qkv_projections()
    assert pipe.fusing_unet and pipe.fusing_vae and same(subject.images(pipe), images, 1e-3)
    pipe.unfuse_qkv_projections()
    assert same(subject.images(pipe), images)


def test_layerwise_casting(subject, pipe):
    """layerwise casting changes no image whose weights fit the storage, with checkpointing too"""
    networks = (pipe.unet, pipe.vae)
    for network in networks:
        network.to(torch.bfloat16).to(torch.float32)
    images = subject.images(pipe)
    for network in networks:
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert same(subject.images(pipe), images)
    checkpoint(pipe)
    assert same(subject.images(pipe), images)
    assert {p.dtype for p in pipe.unet.mid_block.resnets[0].conv1.parameters()} == {torch.bfloat16}


def test_model_offload(subject, pipe):
    """model offloading changes no image, twice"""
    images = subject.images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert same(subject.images(pipe), images) and same(subject.images(pipe), images)
    assert {p.requires_grad for p in pipe.unet.parameters()} == {True}


def test_sequential_offload(subject, pipe):
    """sequential offloading changes no image and leaves the weights away, with checkpointing too"""
    images = subject.images(pipe)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):  # what enable_sequential_cpu_offload does on a GPU
        cpu_offload(network, torch.device("cpu"), offload_buffers=True)
    for _ in range(2):
        assert same(subject.images(pipe), images)
        assert {p.device.type for p in [*pipe.unet.parameters(), *pipe.vae.parameters()]} == {"meta"}
        checkpoint(pipe)
    assert {p.requires_grad for p in pipe.unet.parameters()} == {True}


def test_group_offload(subject, pipe, tmp_path):
    """group offloading to a disk changes no image, leaf by leaf, with checkpointing too"""
    images = subject.images(pipe)
    pipe.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert same(subject.images(pipe), images)
    checkpoint(pipe)
    assert same(subject.images(pipe), images)


def test_group_offload_by_block(subject, pipe, tmp_path):
    """group offloading to a disk changes no image, block by block, with checkpointing too"""
    images = subject.images(pipe)
    path = {"offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1, **path)
    assert same(subject.images(pipe), images)
    checkpoint(pipe)
    assert same(subject.images(pipe), images)


def test_checkpointing(subject, pipe):
    """gradient checkpointing changes no image"""
    images = subject.images(pipe)
    checkpoint(pipe)
    assert same(subject.images(pipe), images)


def hook(pipe, way, folder):
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "sequential":
        for network in (pipe.unet, pipe.vae):
            cpu_offload(network, torch.device("cpu"), offload_buffers=True)
    elif way == "casting":
        for network in (pipe.unet, pipe.vae):
            network.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float16)
    else:
        blocks = {"num_blocks_per_group": 1} if way == "block_level" else {}
        pipe.enable_group_offload("cpu", offload_type=way, offload_to_disk_path=str(folder), **blocks)


@pytest.mark.parametrize(
    "way, memory",
    [*((way, "low") for way in ("model", "sequential", "leaf_level", "block_level", "casting")), ("casting", "fast")],
)
def test_overflow_under_hooks(parts, way, memory, tmp_path):
    """The solver on: networks that overflow in float16 go on in float32 under every hook, as without one."""
    vml, given = SUBJECTS[2], {"memory": memory, "return_report": True}
    with torch.no_grad():  # what these give is beyond float16; the next norm takes it off again
        parts["vae"].decoder.conv_in.weight.mul_(2e5)
        parts["unet"].conv_in.weight.mul_(2e5)
    torch.nn.Module.to(parts["vae"], torch.float16)
    torch.nn.Module.to(parts["unet"], torch.float16)
    hooked, pipe = vml.make(copy.deepcopy(parts)), vml.make(parts)
    hook(hooked, way, tmp_path)
    with pytest.warns(UserWarning, match="goes on in float32"):
        expected, found = vml.call(pipe, **given), vml.call(hooked, **given)
    assert found.report.retries == expected.report.retries and {"the UNet", "the VAE decoder"} <= set(
        found.report.retries
    )
    assert same(found.images, expected.images, 1e-3)
    for ours, theirs in ((hooked.unet, pipe.unet), (hooked.vae, pipe.vae)):
        kept = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            assert p.dtype == torch.float16 and p.requires_grad and (p.is_meta or p.shape == kept[name].shape)
    assert same(vml.images(hooked, memory=memory), found.images, 1e-3)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("way", ["model", "sequential", "group"])
@pytest.mark.gpu
def test_offloading_from_a_gpu(subject, pipe, way, checkpointed):
    """offloading from a GPU changes no image, with gradient checkpointing too"""
    images = subject.images(pipe.to("cuda"))
    pipe.to("cpu")
    if checkpointed:
        checkpoint(pipe)
    if way == "group":
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{way}_cpu_offload")()
    assert same(subject.images(pipe), images, 1e-3)
