"""What ships in the box: the small checkpoint, and pictures that it was not trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..adapters.comfyui.bundled import check_installed, encode_prompts, load_model, load_vaes
from ..assets import example_images
from ..images import from_pil, read_image

CATEGORY = "VML"
_SIZE = 128  # of the bundled checkpoint's images


class VMLLoadBundled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name="VML Load Bundled",
            category=CATEGORY,
            description="The small checkpoint that ships with vml-ldm: emoji of 128 x 128 pixels. Needs no download.",
            inputs=[
                io.String.Input("prompt", default="", multiline=True, tooltip="A few words, such as owl."),
                io.String.Input("negative_prompt", default="", multiline=True, tooltip="What it should not be."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Its UNet."),
                io.Vae.Output(display_name="vae", tooltip="Its VAE."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt."),
                io.Vae.Output(display_name="gradient_vae", tooltip="A small decoder, for all levels but the last."),
            ],
        )

    @classmethod
    def execute(cls, prompt: str, negative_prompt: str) -> io.NodeOutput:
        check_installed()
        vae, small = load_vaes()
        return io.NodeOutput(load_model(), vae, *encode_prompts(prompt, negative_prompt), small)


class VMLLoadExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name="VML Load Example",
            category=CATEGORY,
            description="A picture that the bundled checkpoint was not trained on, and a mask over its middle.",
            inputs=[
                io.Combo.Input("picture", options=list(_pictures()), tooltip="By its name, which is its prompt."),
                io.Float.Input(
                    "hole",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Side of the mask's square over the picture's.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip=f"{_SIZE} x {_SIZE} pixels."),
                io.Mask.Output(display_name="mask", tooltip="1, repaint, in a square in the middle."),
                io.String.Output(display_name="prompt", tooltip="The picture's name."),
            ],
        )

    @classmethod
    def execute(cls, picture: str, hole: float) -> io.NodeOutput:
        path = _pictures()[picture]
        pixels = F.interpolate(from_pil(read_image(path)), (_SIZE, _SIZE), mode="area")
        first = round(_SIZE * (1 - hole) / 2)
        mask = torch.zeros(1, _SIZE, _SIZE)
        mask[:, first : _SIZE - first, first : _SIZE - first] = 1
        return io.NodeOutput(pixels.movedim(1, 3).contiguous(), mask, picture)


def _pictures() -> dict:
    """Files by their prompts."""
    return {prompt: path for path, prompt in example_images("held_out")}
