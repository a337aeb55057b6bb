"""How diffusers finds the pipelines: as a file of one's own, and by name after `register`."""

import inspect
import logging
import shutil

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines import auto_pipeline
from PIL import Image

from vml_ldm import (
    Downsample,
    VMLInpaintPipeline,
    VMLInpaintSD3Pipeline,
    VMLInpaintXLPipeline,
    VMLRestorePipeline,
    VMLRestoreXLPipeline,
    bundled_model,
    register,
)

MAPPINGS = [name for name in vars(auto_pipeline) if name.startswith("AUTO_") and name.endswith("_MAPPING")]
FAMILIES = {
    "stable-diffusion": VMLInpaintPipeline,
    "stable-diffusion-xl": VMLInpaintXLPipeline,
    "stable-diffusion-3": VMLInpaintSD3Pipeline,
}
QUICK = {"height": 64, "width": 64, "num_inference_steps": 4, "inner_steps": 1, "output_type": "np"}


@pytest.fixture
def unregistered(monkeypatch):
    """diffusers as it is before `register`, and after the test too."""
    for name in MAPPINGS:
        mapping = getattr(auto_pipeline, name)
        for family in FAMILIES:
            monkeypatch.setitem(mapping, f"{family}-vml", None)
            monkeypatch.delitem(mapping, f"{family}-vml")
    for cls in (*FAMILIES.values(), VMLRestorePipeline, VMLRestoreXLPipeline):
        monkeypatch.setattr(diffusers, cls.__name__, None, raising=False)
        monkeypatch.delattr(diffusers, cls.__name__)


@pytest.fixture(scope="module")
def parts():
    return tiny.components()


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """A checkpoint saved by each class."""
    root = tmp_path_factory.mktemp("checkpoints")
    for cls in (StableDiffusionPipeline, VMLInpaintPipeline, VMLRestorePipeline):
        cls(**parts, requires_safety_checker=False).save_pretrained(root / cls.__name__)
    return root


def load(loader, folder, **options):
    pipe = loader.from_pretrained(folder, safety_checker=None, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solve(pipe):
    generator = torch.Generator().manual_seed(0)
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        mask = Image.fromarray(np.tri(64, dtype=np.uint8) * 255)
        return pipe("a hat", Image.new("RGB", (64, 64), "teal"), mask, generator=generator, **QUICK).images
    y = torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)
    return pipe("a hat", y=y, operator=Downsample(4), generator=generator, **QUICK).images


@pytest.mark.parametrize("cls", [VMLInpaintPipeline, VMLRestorePipeline])
def test_each_file_is_a_custom_pipeline_that_solves(folders, unregistered, cls):
    custom = {"custom_pipeline": inspect.getfile(cls), "trust_remote_code": True}
    pipe = load(DiffusionPipeline, folders / "StableDiffusionPipeline", **custom)
    assert type(pipe).__name__ == cls.__name__ and type(pipe) is not cls
    assert np.array_equal(solve(pipe), solve(load(cls, folders / "StableDiffusionPipeline")))


@pytest.mark.parametrize("cls", [VMLInpaintPipeline, VMLRestorePipeline])
def test_a_registered_pipeline_is_found_by_the_name_it_saved(folders, unregistered, cls):
    with pytest.raises(AttributeError, match=cls.__name__):
        load(DiffusionPipeline, folders / cls.__name__)
    register()
    pipe = load(DiffusionPipeline, folders / cls.__name__)
    assert type(pipe) is cls and np.array_equal(solve(pipe), solve(load(cls, folders / cls.__name__)))


def test_the_automatic_loaders_know_a_registered_pipeline(folders, unregistered):
    with pytest.raises(ValueError, match="VMLInpaintPipeline"):
        load(AutoPipelineForInpainting, folders / "VMLInpaintPipeline")
    register()
    pipe = load(AutoPipelineForInpainting, folders / "VMLInpaintPipeline")
    assert type(pipe) is VMLInpaintPipeline
    assert type(AutoPipelineForInpainting.from_pipe(pipe)) is VMLInpaintPipeline
    assert type(AutoPipelineForText2Image.from_pipe(pipe)) is StableDiffusionPipeline
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is StableDiffusionImg2ImgPipeline


def routes(folder):
    """Every way to a pipeline of a folder."""
    custom = {"custom_pipeline": inspect.getfile(VMLInpaintPipeline), "trust_remote_code": True}
    stock, ours = load(StableDiffusionInpaintPipeline, folder), load(VMLInpaintPipeline, folder)
    yield ours
    yield load(DiffusionPipeline, folder, **custom)
    yield VMLInpaintPipeline.from_pipe(stock)
    yield VMLInpaintPipeline.from_pipe(VMLRestorePipeline.from_pipe(ours))
    ours.save_pretrained(saved := f"{folder}-saved")
    yield load(VMLInpaintPipeline, saved)
    register()
    yield load(DiffusionPipeline, saved)
    yield load(AutoPipelineForInpainting, saved)
    yield AutoPipelineForInpainting.from_pipe(load(DiffusionPipeline, saved))


def test_every_route_to_the_bundled_checkpoint_gives_one_image(unregistered, tmp_path):
    """Its small decoder too, which diffusers' loaders do not know."""
    shutil.copytree(bundled_model(), tmp_path / "model")
    pipes = list(routes(tmp_path / "model"))
    first, *others = map(solve, pipes)
    assert all(pipe.gradient_vae is not None for pipe in pipes)
    assert all(np.array_equal(first, other) for other in others)
    pipes[0].gradient_vae = None
    assert not np.array_equal(solve(pipes[0]), first)


def test_the_bundled_checkpoint_loads_without_a_warning(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        VMLInpaintPipeline.from_pretrained(bundled_model(), safety_checker=None)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_every_family_is_registered(unregistered):
    register()
    for family, cls in FAMILIES.items():
        assert auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[f"{family}-vml"] is cls
        assert getattr(diffusers, cls.__name__) is cls
    assert diffusers.VMLRestoreXLPipeline is VMLRestoreXLPipeline


def test_registering_leaves_other_checkpoints_alone_and_twice_is_once(folders, unregistered):
    register()
    once = {name: dict(getattr(auto_pipeline, name)) for name in MAPPINGS}
    register()
    assert {name: dict(getattr(auto_pipeline, name)) for name in MAPPINGS} == once
    stock = folders / "StableDiffusionPipeline"
    assert type(load(AutoPipelineForInpainting, stock)) is StableDiffusionInpaintPipeline
    assert type(load(AutoPipelineForText2Image, stock)) is StableDiffusionPipeline
    assert type(load(DiffusionPipeline, stock)) is StableDiffusionPipeline
