"""A page for each task of the benchmark: what happened to the picture, how to undo it, pictures and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vml_ldm.evaluation.benchmark_table import draw_benchmark_lines
from vml_ldm.evaluation.table import Group


class Task(NamedTuple):
    """A page's words.

    Attributes:
        title: what is undone.
        text: what happened to the picture.
        operator: the operator in Python, with the names of `vml_ldm.operators`.
        source: what the command line undoes it in; "" where it cannot.
    """

    title: str
    text: str
    operator: str
    source: str


_RESTORE = "vml-ldm restore {source} --task {task} -o result.png"
_SIMULATE = "vml-ldm restore photo.png --task {task} --simulate -o result.png    # damages photo.png first"
_HOLE, _MASKED = "Mask(known)  # 1 = known", "photo.png mask.png"
_INPAINT = "vml-ldm inpaint {source} -o result.png    # white is repainted"

TASKS = {
    "sr4": Task(
        "Four times the resolution",
        "Both sides were made a quarter as long, by antialiased bicubic interpolation.",
        'Downsample(4, "bicubic")',
        "small.png",
    ),
    "sr8": Task(
        "Eight times the resolution",
        "Both sides were made an eighth as long, by antialiased bicubic interpolation.",
        'Downsample(8, "bicubic")',
        "small.png",
    ),
    "deblur": Task(
        "Out of focus",
        "A Gaussian blur of 3 pixels (standard deviation).",
        "GaussianBlur(3)",
        "blurred.png",
    ),
    "motion": Task(
        "Shaken",
        "Blur along a path of 15 pixels, drawn from a seed, another one for each image.",
        "MotionBlur(15, 0.5, seed=0)",
        "shaken.png",
    ),
    "box": Task("A hole", "A box in the middle is missing.", _HOLE, _MASKED),
    "half": Task("Half of it", "The right half is missing.", _HOLE, _MASKED),
    "random": Task("Scattered pixels", "80 % of the pixels are missing, drawn from a seed.", _HOLE, _MASKED),
    "jpeg": Task("JPEG", "Compressed at quality 10.", "JPEG(10)", "small-file.jpg"),
    "colorize": Task(
        "Colours",
        "Only the lightness is left.",
        "Grayscale()",
        "grey.png",
    ),
    "hdr": Task(
        "Clipped light",
        "The contrast was doubled about mid-grey: shadows and lights are lost.",
        "HDR(2)",
        "clipped.png",
    ),
    "phase": Task(
        "Phase retrieval",
        "Only magnitudes of the Fourier transform are left, oversampled by two. An image and its turn by 180 degrees "
        "have the same; the nearer one counts.",
        "PhaseRetrieval()",
        "",
    ),
}


def commands(task: str) -> list[str]:
    """How the command line undoes a task; none where it cannot."""
    source = TASKS[task].source
    forms = (_INPAINT,) if source == _MASKED else (_RESTORE, _SIMULATE) if source else ()
    return [form.format(source=source, task=task) for form in forms]


def write_index(tasks: Sequence[str]) -> str:
    """What the pages are (Markdown)."""
    lines = [f"- [{TASKS[task].title}]({task}.md) (`{task}`): {TASKS[task].text}" for task in tasks]
    return "\n".join(["# The tasks", "", *lines, ""])


def write(task: str, groups: Sequence[Group], strip: str) -> str:
    """A task's page (Markdown).

    Args:
        groups: the task's, one for each noise.
        strip: file of its pictures, beside the page.
    """
    words = TASKS[task]
    name = words.operator.partition("(")[0]
    shell = ["```sh", *found, "```", ""] if (found := commands(task)) else []
    return "\n".join(
        [
            f"# {words.title} (`{task}`)",
            "",
            words.text,
            "",
            f"![Truth, what was measured, RED-diff and VML, of a few images]({strip})",
            "",
            *shell,
            "```python",
            f"from vml_ldm import VMLRestorePipeline, {name}",
            "",
            "pipe = VMLRestorePipeline.from_pretrained(folder, safety_checker=None)",
            f"operator = {words.operator}",
            'image = pipe("what it shows", y=y, operator=operator, sigma_y=0.01).images[0]',
            "```",
            "",
            f"What `vml-ldm benchmark --tasks {task}` measured with the bundled checkpoint on held-out images (the "
            "whole table, `table.md`, explains the lines):",
            "",
            *draw_benchmark_lines(groups),
            "",
        ]
    )
