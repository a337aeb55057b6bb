"""Nodes for ComfyUI. A clone of the repository in ``custom_nodes`` works; so does, after an installation, a file there:

    from vml_ldm.nodes import WEB_DIRECTORY, comfy_entrypoint

Without ComfyUI this package imports, its modules do not.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

WEB_DIRECTORY = str(Path(__file__).parent / "web")  # docs/<node>.md is a node's help

NODES = {  # a node's id, which is its class's name, and its module
    "VMLInpaint": "solving",
    "VMLRestore": "solving",
    "VMLSampler": "solving",
    "VMLLoadBundled": "bundled",
    "VMLLoadExample": "bundled",
    "VMLOperatorMask": "operators",
    "VMLOperatorDownsample": "operators",
    "VMLOperatorBlur": "operators",
    "VMLOperatorMotionBlur": "operators",
    "VMLOperatorJPEG": "operators",
    "VMLOperatorGrayscale": "operators",
    "VMLOperatorCompose": "operators",
}


async def comfy_entrypoint():
    """What ComfyUI calls for the nodes."""
    from comfy_api.latest import ComfyExtension

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [getattr(import_module(f"{__name__}.{module}"), name) for name, module in NODES.items()]

    return Extension()
