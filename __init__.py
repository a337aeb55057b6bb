"""ComfyUI's door: a clone of this repository in ``custom_nodes``. All that it needs is imported when ComfyUI asks."""

WEB_DIRECTORY = "./vml_ldm/nodes/web"


async def comfy_entrypoint():
    """The nodes of `vml_ldm.nodes`; an installed vml_ldm goes before this clone's."""
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    if find_spec("vml_ldm") is None:
        sys.path.append(str(Path(__file__).parent))
    from vml_ldm.nodes import comfy_entrypoint as enter

    return await enter()
