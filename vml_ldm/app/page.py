"""The page behind ``vml-ldm app``: paint a hole or choose a damage, watch the solve, compare, read, download."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from vml_ldm.app.solving import Frame, Solver
from vml_ldm.assets import example_images
from vml_ldm.damage import PARAMETERS, TASKS, parameters
from vml_ldm.fitting import Fit
from vml_ldm.images import MaskEdit, from_pil, load_image, to_pil, upright_rgb, upright_size, widen
from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
from vml_ldm.posing import Posed, Restore, pose_hole
from vml_ldm.presets import PRESETS

TITLE = "vml-ldm"
_PAINT = "#d6006c"  # seen on pictures of most colours
_CURVES = {"residual": "#0d9488", "expected of the truth": "#94a3b8"}
_MISSING = "There is no picture. Upload one, or pick an example."
_AUTO = "the task's"
_LEVELS = {_AUTO: None, "proximal": True, "inner steps": False}  # and what the pipelines call it
_SHOWN = 6  # what handlers give, see `_results`
_EXAMPLES = 6
_SIDE = 420  # pixels, of the pictures on the page
_FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none from the network
THEME = gr.themes.Soft(primary_hue="teal", **_FONTS)


def build(pipe: VMLInpaintPipeline) -> gr.Blocks:
    """The page, on a checkpoint (Stable Diffusion 1.x or 2.x). Launch it with `theme=THEME`."""
    solver = Solver(pipe)
    with gr.Blocks(title=TITLE, delete_cache=(3600, 24 * 3600), analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nInpainting and restoration by variational mode-seeking. Nothing leaves this machine.")
        with gr.Row():
            with gr.Column():
                settings, guidance = _settings()
                with gr.Tab("Inpaint"):
                    paint = _inpaint_tab()
                with gr.Tab("Restore"):
                    mend = _restore_tab()
            stop, shown = _results()
        one = {"concurrency_limit": 1, "concurrency_id": "solver", "outputs": shown}
        for name, tab, solving in (("inpaint", paint, _inpainting), ("restore", mend, _restoring)):
            asked = [*tab.inputs, *settings.values(), guidance[name]]
            tab.button.click(_telling(solving(solver)), asked, api_name=name, show_progress_on=shown[1], **one)
        stop.click(solver.stop, queue=False, api_name=False)
        for tab, sizing in ((paint, _size_to_inpaint), (mend, _size_to_restore)):
            tab.gallery.select(tab.pick, None, [tab.inputs[0], settings["prompt"]], api_name=False)
            asked = {"fn": partial(sizing, solver.sizes), "inputs": tab.inputs, "outputs": tab.size, "api_name": False}
            gr.on([page.load, *(each.change for each in tab.inputs)], show_progress="hidden", queue=False, **asked)
    return page


class Tab(NamedTuple):
    """What a tab is asked by.

    Attributes:
        inputs: the components that its button reads, before the shared settings; the picture first.
        size: a line about what is done to the picture's size.
        gallery: examples, and what picking one puts into picture and prompt.
    """

    inputs: list
    size: gr.Markdown
    button: gr.Button
    gallery: gr.Gallery
    pick: Callable


def _settings() -> tuple[dict[str, gr.components.Component], dict[str, gr.Slider]]:
    """The shared settings, as handlers take them; and the guidance of each tab, which they take last."""
    first = _pictures()[:1]
    asked = first[0][1] if first else ""
    prompt = gr.Textbox(asked, label="Prompt", placeholder="what to paint; may stay empty", lines=1)
    with gr.Accordion("Settings", open=False):
        preset = gr.Radio(list(PRESETS), value="balanced", label="Preset", info="speed against quality")
        steps = gr.Slider(8, 200, 50, step=1, label="Steps", info="inpainting: some are solved; restoring: a budget")
        levels = gr.Radio(list(_LEVELS), value=_AUTO, label="Levels", info="proximal ones need no gradients")
        scale = partial(gr.Slider, 1, 15, step=0.5, info="1 = off")
        guidance = {
            "inpaint": scale(7.5, label="Guidance, inpainting"),
            "restore": scale(1.0, label="Guidance, restoring"),
        }
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    return {"prompt": prompt, "preset": preset, "steps": steps, "levels": levels, "seed": seed}, guidance


def _results() -> tuple[gr.Button, list]:
    """A button that ends a solve; and status, live picture, comparison, file, curve, report, as handlers give them."""
    with gr.Column():
        with gr.Row():
            status = gr.Markdown("Ready. Inpaint, or take another picture first.", elem_id="status")
            stop = gr.Button("Stop", size="sm", scale=0, min_width=90, elem_id="stop")
        live = gr.Image(label="So far", height=_SIDE, interactive=False, buttons=[], elem_id="live")
        compare = gr.ImageSlider(
            label="Before / after", format="png", visible=False, max_height=2 * _SIDE, elem_id="compare"
        )
        file = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
        curve = gr.LinePlot(
            x="level",
            y="rms",
            color="what",
            color_map=_CURVES,
            title="Residual on what was measured",
            height=220,
            elem_id="curve",
        )
        report = gr.Code(
            label="Report",
            language=None,
            wrap_lines=True,
            interactive=False,
            buttons=["copy"],
            show_line_numbers=False,
            elem_id="report",
        )
    return stop, [status, live, compare, file, curve, report]


def _inpaint_tab() -> Tab:
    brush = gr.Brush(colors=[_PAINT], default_color=_PAINT, color_mode="fixed", default_size=24)
    gr.Markdown("Paint over what is to be repainted.")
    first = _painted_example()
    canvas = {} if first is None else {"canvas_size": first["background"].size}  # its layers lie askew on any other
    editor = gr.ImageEditor(
        first,
        **canvas,
        label="Picture",
        show_label=False,
        type="pil",
        format="png",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=brush,
        height=_SIDE,
        elem_id="editor",
    )
    with gr.Accordion("Mask and margins", open=False, elem_id="mask-tools"):
        with gr.Row():
            grow = gr.Slider(-32, 64, 0, step=1, label="Grow", info="pixels; below 0 shrinks")
            feather = gr.Slider(0, 64, 0, step=1, label="Feather", info="pixels over which it fades")
        fill = gr.Checkbox(False, label="Fill", info="what the paint encloses is repainted too")
        gr.Markdown("Paint beyond the picture, so many pixels:")
        with gr.Row():
            sides = ("Left", "Top", "Right", "Bottom")
            margins = [gr.Number(0, precision=0, minimum=0, maximum=1024, label=side, min_width=70) for side in sides]
    size = gr.Markdown(elem_id="size-inpaint")
    button = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
    pictures, gallery = _gallery()

    def pick(event: gr.SelectData):
        picture, prompt = pictures[event.index]
        return {"background": picture, "layers": [], "composite": None}, prompt

    return Tab([editor, grow, feather, fill, *margins], size, button, gallery, pick)


def _restore_tab() -> Tab:
    examples = _pictures()
    picture = gr.Image(
        examples[0][0] if examples else None,
        label="Picture",
        type="pil",
        image_mode=None,
        format="png",
        sources=("upload", "clipboard"),
        height=_SIDE,
        elem_id="measured",
    )
    simulate = gr.Checkbox(True, label="The picture is clean: damage it first", elem_id="simulate")
    task = gr.Dropdown(list(TASKS), value="sr4", label="Damage", elem_id="task")
    noise = gr.Slider(0, 0.2, 0.0, step=0.01, label="Noise", info="standard deviation, of pixels in [0, 1]")
    widgets = _widgets(task.value)
    task.change(
        lambda name: [gr.update(visible=key in parameters(name)) for key in widgets],
        task,
        list(widgets.values()),
        api_name=False,
    )
    size = gr.Markdown(elem_id="size-restore")
    button = gr.Button("Restore", variant="primary", elem_id="restore")
    pictures, gallery = _gallery()

    def pick(event: gr.SelectData):
        return pictures[event.index]

    return Tab([picture, simulate, task, noise, *widgets.values()], size, button, gallery, pick)


def _widgets(task: str) -> dict[str, gr.components.Component]:
    """Parameters of every damage, in the order of `PARAMETERS`, of which those of the task are seen."""
    sees = lambda name: {"visible": name in parameters(task), "elem_id": f"parameter-{name}"}  # noqa: E731
    return {
        "mode": gr.Radio(["bicubic", "average"], value="bicubic", label="Shrunk by", **sees("mode")),
        "std": gr.Slider(0.5, 8, 3, step=0.5, label="Width of the blur (pixels)", **sees("std")),
        "length": gr.Slider(3, 31, 15, step=1, label="Length of the path (pixels)", **sees("length")),
        "intensity": gr.Slider(0, 1, 0.5, step=0.1, label="Straight 0 - shaking 1", **sees("intensity")),
        "kernel_seed": gr.Number(0, precision=0, label="Seed of the path", **sees("kernel_seed")),
        "kernel": gr.Image(
            label="Kernel, bright where the light went", type="pil", image_mode=None, height=160, **sees("kernel")
        ),
        "quality": gr.Slider(1, 95, 10, step=1, label="JPEG quality", **sees("quality")),
        "contrast": gr.Slider(1, 4, 2, step=0.1, label="Contrast", **sees("contrast")),
        "margin": gr.Slider(0, 256, 16, step=1, label="Pixels around the picture", **sees("margin")),
        "gamma": gr.Slider(0.2, 5, 2.2, step=0.1, label="Gamma", **sees("gamma")),
        "rows": gr.Slider(1, 8, 2, step=1, label="Every so many-th row", **sees("rows")),
        "columns": gr.Slider(1, 8, 1, step=1, label="Every so many-th column", **sees("columns")),
    }


def _pictures() -> list[tuple[Image.Image, str]]:
    """Some of the held-out pictures with their prompts; none where the package is without them."""
    with suppress(FileNotFoundError):
        return [(load_image(path), prompt) for path, prompt in example_images("held_out")[:_EXAMPLES]]
    return []


def _painted_example() -> dict | None:
    """The first of them as the editor's value, with a stroke over it."""
    for picture, _ in _pictures()[:1]:
        layer, (width, height) = Image.new("RGBA", picture.size), picture.size
        box = (round(0.3 * width), round(0.35 * height), round(0.6 * width), round(0.65 * height))
        ImageDraw.Draw(layer).ellipse(box, fill=_PAINT)
        return {
            "background": picture,
            "layers": [layer],
            "composite": Image.alpha_composite(picture.convert("RGBA"), layer),
        }
    return None


def _gallery() -> tuple[list[tuple[Image.Image, str]], gr.Gallery]:
    """Some of the held-out pictures with their prompts, and a gallery of them."""
    pictures = _pictures()
    gallery = gr.Gallery(
        [picture for picture, _ in pictures],
        show_label=False,
        columns=_EXAMPLES,
        height=100,
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_classes="examples",
    )
    return pictures, gallery


def _inpainting(solver: Solver) -> Callable:
    def inpaint(editor, grow, feather, fill, left, top, right, bottom, *wishes):
        """Repaint what is painted over, and margins; pixels elsewhere come back unchanged."""
        margins = tuple(map(int, (left, top, right, bottom)))
        picture, hole = _read_editor(editor, needs_paint=not any(margins))
        painted = MaskEdit(fill=fill, grow=int(grow), feather=int(feather)).apply(from_pil(hole, 1))
        image, painted = widen(from_pil(picture), painted, margins)
        known = 1 - painted
        posed = pose_hole(image, known, **solver.sizes)
        before = image * known + (1 - known) / 2
        yield from _shown(solver, solver.inpaint, posed, before, _asked(*wishes))

    return inpaint


def _restoring(solver: Solver) -> Callable:
    def restore(picture, simulate, task, noise, *values):
        """Undo a known damage, which is done first where the picture is clean."""
        parameters, wishes = values[: len(PARAMETERS)], values[len(PARAMETERS) :]
        if picture is None:
            raise ValueError(_MISSING)
        damaged = _damage(task, noise, dict(zip(PARAMETERS, parameters, strict=True)))
        y = from_pil(picture, 3 if simulate else damaged.damage.channels)
        y = damaged.simulate(y, _asked(*wishes)["seed"], **solver.sizes) if simulate else y
        posed = damaged.pose(y, **solver.sizes)
        yield from _shown(solver, solver.restore, posed, y, _asked(*wishes))

    return restore


def _size_to_inpaint(sizes: dict, editor: dict | None, grow, feather, fill, left, top, right, bottom) -> str:
    """What will be done to the size of the editor's picture with its margins, said before anything is."""
    picture = (editor or {}).get("background")
    if picture is None:
        return ""
    size = picture.height + int(top) + int(bottom), picture.width + int(left) + int(right)
    return _told(Fit.choose(size, **sizes).text())


def _size_to_restore(sizes: dict, picture: Image.Image | None, simulate: bool, task: str, noise: float, *values) -> str:
    """What will be done to the size of the picture, or why nothing can be."""
    if picture is None:
        return ""
    try:
        damaged = _damage(task, noise, dict(zip(PARAMETERS, values, strict=True)))
        y = torch.zeros(1, 3 if simulate else damaged.damage.channels, *upright_size(picture))
        if not simulate:
            return _told(damaged.pose(y, **sizes).text)
        clean, y = y, damaged.simulate(y, 0, **sizes)
        height, width = damaged.damage.image_size(tuple(y.shape[2:]))
        return f"Size: {clean.shape[3]} x {clean.shape[2]}, brought to {width} x {height} before it is damaged."
    except ValueError as error:
        return f"Cannot be solved: {' '.join(str(error).split())}"


def _told(text: str) -> str:
    """A line about sizes as the page has it."""
    return f"Size: {text.removeprefix('size').strip()}."


def _read_editor(editor: dict | None, needs_paint: bool = True) -> tuple[Image.Image, Image.Image]:
    """Picture (RGB) and what is painted over it (L, white is repainted)."""
    picture = (editor or {}).get("background")
    if picture is None:
        raise ValueError(_MISSING)
    hole = Image.new("L", picture.size)
    for layer in editor["layers"]:
        hole = ImageChops.lighter(hole, layer.getchannel("A"))
    hole = hole.point(lambda alpha: 255 * (alpha > 127))
    if needs_paint and hole.getextrema()[1] == 0:
        raise ValueError("Nothing is painted over. Paint over what is to be repainted.")
    return upright_rgb(picture), hole


def _damage(task: str, noise: float, values: dict) -> Restore:
    """The damage with those of the page's parameters that it has."""
    values = {name: value for name, value in values.items() if name in parameters(task)}
    if "kernel" in values:
        if values["kernel"] is None:
            raise ValueError("there is no kernel; upload a picture of it, bright where the light went.")
        values["kernel"] = from_pil(values["kernel"])[0].mean(0)
    return Restore(task, noise, oversize="fit", **values)


def _asked(prompt: str, preset: str, steps: int, levels: str, seed: int, guidance: float) -> dict:
    """The settings as the pipelines' arguments."""
    return {
        "prompt": prompt,
        "preset": preset,
        "num_inference_steps": int(steps),
        "proximal": _LEVELS[levels],
        "guidance_scale": guidance,
        "seed": int(seed),
    }


def _shown(solver: Solver, pipe, posed: Posed, before: Tensor, asked: dict) -> Iterator[tuple]:
    """What the page shows, level by level and at the end, in the order of `_results`."""
    hidden, frames = gr.update(visible=False), solver.frames(pipe, **posed.arguments, **asked)
    yield "Starting ...", gr.update(value=None, visible=True), hidden, hidden, None, ""
    for frame in frames:
        curve = _curve(frame)
        if frame.report is None:
            status = f"Level {len(frame.residuals)} of {frame.count}"
            yield status, _enlarged(posed.take_back(frame.image)), hidden, hidden, curve, ""
    (after,) = to_pil(posed.take_back(frame.image))
    (measured,) = to_pil(F.interpolate(before.expand(-1, 3, -1, -1), after.size[::-1], mode="nearest-exact"))
    ended = "Done" if len(frame.residuals) == frame.count else f"Stopped after level {len(frame.residuals)}"
    yield (
        f"{ended}: {posed.text.removeprefix('size').strip()}, {frame.report.seconds['total']:.1f} s",
        hidden,
        gr.update(value=(measured, after), visible=True),
        gr.update(value=_saved(after), visible=True),
        curve,
        frame.report.text(),
    )


def _curve(frame: Frame) -> pd.DataFrame:
    """Residual by level, before its last step; at the end the answer's, and what is expected of the truth after the
    VAE's round trip."""
    answer = frame.report.residual if frame.report else []
    levels = [str(level + 1) for level in range(len(frame.residuals))] + ["end"] * len(answer)
    expected = frame.report.expected[0] if frame.report else math.nan
    values = zip(_CURVES, ([*frame.residuals, *answer], [expected] * len(levels)), strict=True)
    return pd.concat([pd.DataFrame({"level": levels, "rms": rms, "what": what}) for what, rms in values])


def _enlarged(image: Tensor) -> Image.Image:
    """A picture at least as large as it is shown."""
    (picture,) = to_pil(image)
    scale = max(1.0, _SIDE / max(picture.size))
    return picture.resize([round(scale * length) for length in picture.size])


def _saved(image: Image.Image) -> str:
    """A file of the picture, to be downloaded."""
    path = Path(tempfile.mkdtemp(prefix="vml-ldm-")) / "vml-ldm.png"
    image.save(path)
    return str(path)


def _telling(handler: Callable) -> Callable:
    """A handler whose ValueError, the user's to put right, is a warning; what the page showed stays."""

    @wraps(handler)
    def told(*given):
        status = gr.skip()
        try:
            for shown in handler(*given):
                status = "Not solved, see the warning."
                yield shown
        except ValueError as error:
            gr.Warning(" ".join(str(error).split()), duration=None)
            yield (status, *[gr.skip()] * (_SHOWN - 1))

    return told
