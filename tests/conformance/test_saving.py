"""Saving, loading, converting: folders, variants, precisions, single files, other pipelines' parts."""

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
