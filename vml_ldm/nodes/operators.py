"""Operators: how the picture at hand came about. A VML_OPERATOR is a `vml_ldm.damage.Damage`."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..damage import Damage, blurred, chained, compressed, discoloured, masked, shaken, shrunk
from .layout import ordinary_tensors, to_known

OPERATOR = io.Custom("VML_OPERATOR")
CATEGORY = "VML/operators"
_MOST = 0xFFFFFFFF


class _OperatorNode(io.ComfyNode):
    """A node with one output, an operator. A subclass gives its name, inputs and `make`."""

    name, about = "", ""

    @classmethod
    def inputs(cls) -> list:
        return []

    @classmethod
    def make(cls, **given) -> Damage:
        raise NotImplementedError

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name=f"VML Operator {cls.name}",
            category=CATEGORY,
            description=cls.about,
            inputs=cls.inputs(),
            outputs=[
                OPERATOR.Output(
                    display_name="operator", tooltip="For VML Restore, VML Sampler or VML Operator Compose."
                )
            ],
        )

    @classmethod
    @ordinary_tensors()
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(cls.make(**given))


class VMLOperatorMask(_OperatorNode):
    name, about = "Mask", "Some pixels are missing: where the mask is 1."

    @classmethod
    def inputs(cls) -> list:
        return [io.Mask.Input("mask", tooltip="1 = missing, as for inpainting. Of the picture's width and height.")]

    @classmethod
    def make(cls, mask: Tensor) -> Damage:
        return masked(to_known(mask))


class VMLOperatorDownsample(_OperatorNode):
    name, about = "Downsample", "The picture was made smaller. The result is larger by the factor."

    @classmethod
    def inputs(cls) -> list:
        return [
            io.Int.Input("factor", default=4, min=1, max=32, tooltip="Sides of the result over those of the picture."),
            io.Combo.Input("mode", options=["bicubic", "average"], tooltip="How it was shrunk."),
        ]

    @classmethod
    def make(cls, factor: int, mode: str) -> Damage:
        return shrunk(factor, mode=mode)


class VMLOperatorBlur(_OperatorNode):
    name, about = "Blur", "The picture is out of focus: a Gaussian blur."

    @classmethod
    def inputs(cls) -> list:
        tooltip = "Standard deviation in pixels."
        return [io.Float.Input("std", default=3.0, min=0.1, max=64.0, step=0.1, tooltip=tooltip)]

    @classmethod
    def make(cls, std: float) -> Damage:
        return blurred(std=std)


class VMLOperatorMotionBlur(_OperatorNode):
    name, about = "Motion Blur", "The camera moved along a path, which is drawn from a seed."

    @classmethod
    def inputs(cls) -> list:
        return [
            io.Float.Input("length", default=15.0, min=1.0, max=128.0, step=0.5, tooltip="Of the path, in pixels."),
            io.Float.Input("intensity", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="0: straight. 1: shaken."),
            io.Int.Input("kernel_seed", default=0, min=0, max=_MOST, tooltip="Which path."),
        ]

    @classmethod
    def make(cls, length: float, intensity: float, kernel_seed: int) -> Damage:
        return shaken(length=length, intensity=intensity, kernel_seed=kernel_seed)


class VMLOperatorJPEG(_OperatorNode):
    name, about = "JPEG", "The picture was compressed."

    @classmethod
    def inputs(cls) -> list:
        return [io.Int.Input("quality", default=10, min=1, max=100, tooltip="As the program called it that did it.")]

    @classmethod
    def make(cls, quality: int) -> Damage:
        return compressed(quality=quality)


class VMLOperatorGrayscale(_OperatorNode):
    name, about = "Grayscale", "The picture has no colours: its luma is what is known."

    @classmethod
    def make(cls) -> Damage:
        return discoloured()


class VMLOperatorCompose(_OperatorNode):
    name, about = "Compose", "Two damages, in the order in which the picture met them."

    @classmethod
    def inputs(cls) -> list:
        return [
            OPERATOR.Input("first", tooltip="What happened first."),
            OPERATOR.Input("then", tooltip="What happened to the result. JPEG does not come after Grayscale."),
        ]

    @classmethod
    def make(cls, first: Damage, then: Damage) -> Damage:
        return chained(first, then)
