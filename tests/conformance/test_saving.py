"""Saving, loading, converting: folders, variants, precisions, single files, other pipelines' parts."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from subjects import same

NETWORKS = ("unet", "vae", "text_encoder")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def test_save_load(subject, pipe, tmp_path):
    """a saved pipeline loads as the same class and gives the same images"""
    pipe.save_pretrained(tmp_path)
    loaded = subject.load(tmp_path)
    assert type(loaded) is subject.cls and same(subject.images(loaded), subject.images(pipe))


def test_optional_components(subject, parts, tmp_path):
    """optional components may be left out, and stay out when saved and loaded"""
    left_out = {name: value for name, value in parts.items() if name != "image_encoder"}
    pipe = subject.make({**left_out, "safety_checker": None, "feature_extractor": None})
    pipe.save_pretrained(tmp_path)
    loaded = subject.load(tmp_path)
    assert set(subject.cls._optional_components) == set(OPTIONAL)
    assert all(getattr(loaded, name) is None for name in OPTIONAL)
    assert same(subject.images(loaded), subject.images(pipe))


def test_components(subject, pipe):
    """its components make the pipeline again, and its signature names all of them"""
    again = subject.make(pipe.components)
    assert same(subject.images(again), subject.images(pipe))


def test_float16(subject, pipe, tmp_path):
    """float16 weights are saved and loaded as float16"""
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = subject.load(tmp_path, dtype=torch.float16)
    for name in NETWORKS:
        assert getattr(loaded, name).dtype == torch.float16
        theirs, ours = getattr(loaded, name).state_dict(), getattr(pipe, name).state_dict()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(subject, pipe, dtype):
    """half precision networks give finite images near those of float32"""
    images = subject.images(pipe)
    pipe.to(dtype)
    assert all(getattr(pipe, name).dtype == dtype for name in NETWORKS) and pipe.dtype == dtype
    assert same(subject.images(pipe), images, 0.1)


def test_devices(subject, pipe):
    """to() moves every network"""
    pipe.to("meta")
    assert {p.device.type for name in NETWORKS for p in getattr(pipe, name).parameters()} == {"meta"}
    assert pipe.device.type == "meta"


def test_variants(subject, pipe, tmp_path):
    """a variant is saved under its name and loaded by it"""
    pipe.save_pretrained(tmp_path, variant="fp16")
    for name, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        assert [path.name for path in (tmp_path / name).glob("*.safetensors")] == [f"{file}.fp16.safetensors"]
    assert same(subject.images(subject.load(tmp_path, variant="fp16")), subject.images(pipe))
    with pytest.raises(OSError, match="no file named"):
        subject.load(tmp_path)


def test_from_pipe(subject, parts, pipe):
    """from_pipe makes it of a text-to-image pipeline and back, with the same weights"""
    text = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made = subject.quiet(subject.cls.from_pipe(text))
    assert type(made) is subject.cls and made.unet is text.unet
    assert same(subject.images(made), subject.images(pipe))
    back = StableDiffusionPipeline.from_pipe(made)
    assert back.components.keys() == text.components.keys() and back.unet is text.unet
    assert all(back.config[name] == text.config[name] for name in text.config if not name.startswith("_"))


def test_single_file(subject, parts, pipe, tmp_path):
    """from_single_file reads a network's weights from one file"""
    pipe.save_pretrained(tmp_path / "folder")
    save_file(parts["vae"].state_dict(), tmp_path / "vae.safetensors")
    given = {name: value for name, value in parts.items() if name != "vae"}
    options = {"config": str(tmp_path / "folder"), "local_files_only": True}
    loaded = subject.quiet(subject.cls.from_single_file(str(tmp_path / "vae.safetensors"), **given, **options))
    assert type(loaded) is subject.cls and loaded.vae is not parts["vae"]
    assert same(subject.images(loaded), subject.images(pipe))


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {  # of the tiny one: two blocks, the second with attention, one layer each
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)


def in_one_file(pipe) -> dict:
    """The weights of UNet, VAE and text encoder under the names of the original Stable Diffusion 1.x code."""
    state = {}
    for name, value in pipe.unet.state_dict().items():
        part = max((part for part in _UNET if name.startswith(f"{part}.")), key=len)
        rest = name.removeprefix(f"{part}.")
        layer, _, kind = rest.rpartition(".")
        own = f"{_RESNET[layer]}.{kind}" if "resnets" in part else rest
        state[f"model.diffusion_model.{_UNET[part]}.{own}"] = value
    for name, value in pipe.vae.state_dict().items():
        is_attention, own = "attentions" in name, name
        for theirs, original in _VAE:
            own = re.sub(theirs, original, own)
        convolved = is_attention and value.ndim == 2  # attention's projections are convolutions there
        state[f"first_stage_model.{own}"] = value[..., None, None] if convolved else value
    words = {f"cond_stage_model.transformer.text_model.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
    return {name: value.contiguous() for name, value in {**state, **words}.items()}


def test_one_file_of_all(subject, parts, pipe, tmp_path):
    """from_single_file reads all networks of an original checkpoint from one file"""
    pipe.save_pretrained(tmp_path / "folder")
    for name in NETWORKS:
        for weights in (tmp_path / "folder" / name).glob("*.safetensors"):
            weights.unlink()
    save_file(in_one_file(pipe), tmp_path / "all.safetensors")
    options = {"config": str(tmp_path / "folder"), "local_files_only": True, "safety_checker": None}
    loaded = subject.quiet(subject.cls.from_single_file(str(tmp_path / "all.safetensors"), **options))
    assert type(loaded) is subject.cls and same(subject.images(loaded), subject.images(pipe))
