"""What the benchmark shows of its rows, in the folder that they lie in.

    sheet-TASK.png        every method, up to eight images at every noise
    tasks/TASK.md, .png   a page with a strip: truth, what was measured, RED-diff and ours, of four images; README.md
    gallery.png           every task, an image each: what was measured, ours, the truth
    quality-*.png         PSNR against seconds, and against network calls where the rows have them
    residual-levels.png   residual against the levels' noise, where the first method's rows have them

Rows that came without their pictures (kept in a repository, say) make no sheet, strip or gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from PIL import Image

from vml_ldm.evaluation import pages
from vml_ldm.evaluation.comparison import Case, stack_truth
from vml_ldm.evaluation.methods import draw_measured
from vml_ldm.evaluation.plots import draw_all
from vml_ldm.evaluation.problems import TASKS
from vml_ldm.evaluation.sheet import draw_sheet
from vml_ldm.evaluation.table import Group
from vml_ldm.images import load_image, to_pil

_ON_SHEET, _ON_STRIP = 8, 4  # images
_SHOWN = ("red-diff", "red-diff-tuned")  # on strips, beside the first method

Rows = list[tuple[str, list[Image.Image]]]


def draw_pictures(benchmark) -> None:
    """Write every picture that the benchmark's rows and results allow."""
    drawn, groups = {task: _drawn(benchmark, task) for task in benchmark.plan.tasks}, benchmark.groups()
    for task, cases in drawn.items():
        if cases:
            _draw_sheet(benchmark, task, cases[:_ON_SHEET])
            _draw_page(benchmark, task, cases[:_ON_STRIP], [group for group in groups if group.labels[0] == task])
        else:
            print(f"No sheet of {task}: {benchmark.rows.folder} has no image with the pictures of every method.")
    folder = benchmark.rows.folder / "tasks"
    if paged := [task for task in TASKS if (folder / f"{task}.md").is_file()]:
        (folder / "README.md").write_text(pages.write_index(paged), encoding="utf-8")
    if all(drawn.values()):
        _draw_gallery(benchmark, drawn)
    if find_spec("matplotlib") is not None:
        for name, figure in draw_all(groups).items():
            figure.savefig(benchmark.rows.folder / f"{name}.png", dpi=110)


def _places(benchmark, task: str) -> list:
    return [place for place in benchmark.places() if place.task == task]


def _drawn(benchmark, task: str) -> list[Case]:
    """Images with every method's picture at every noise."""
    jobs = [(method, place) for place in _places(benchmark, task) for method in benchmark.methods_at(place)]
    files = lambda case: (benchmark.result_file(*job, case) for job in jobs)  # noqa: E731
    return [case for case in benchmark.cases if all(file.is_file() for file in files(case))]


def _draw_sheet(benchmark, task: str, cases: Sequence[Case]) -> None:
    places = _places(benchmark, task)
    bands = [_rows(benchmark, place, cases, benchmark.methods_at(place)) for place in places]
    rows = [(name, [image for band in bands for image in band[i][1]]) for i, (name, _) in enumerate(bands[0])]
    columns = [f"sigma_y = {place.sigma_y:g}" for place in places for _ in cases]
    draw_sheet(rows, columns, per_band=len(cases)).save(benchmark.rows.folder / f"sheet-{task}.png")


def _draw_page(benchmark, task: str, cases: Sequence[Case], groups: Sequence[Group]) -> None:
    place, folder = _middle(benchmark, task), benchmark.rows.folder / "tasks"
    first, *others = benchmark.methods_at(place)
    rows = _rows(benchmark, place, cases, [*(m for m in others if m.name in _SHOWN), first])
    folder.mkdir(exist_ok=True)
    draw_sheet(rows, [f"{task}, sigma_y = {place.sigma_y:g}"] * len(cases)).save(folder / f"{task}.png")
    (folder / f"{task}.md").write_text(pages.write(task, groups, f"{task}.png"), encoding="utf-8")


def _draw_gallery(benchmark, drawn: dict[str, list[Case]]) -> None:
    """Another image for each task."""
    columns, rows = [], {}
    for i, (task, cases) in enumerate(drawn.items()):
        place = _middle(benchmark, task)
        found = _rows(benchmark, place, [cases[i % len(cases)]], benchmark.methods_at(place)[:1])
        for name, (image,) in [*found[1:], found[0]]:
            rows.setdefault(name, []).append(image)
        columns.append(task)
    draw_sheet(list(rows.items()), columns, per_band=len(columns)).save(benchmark.rows.folder / "gallery.png")


def _middle(benchmark, task: str):
    """The task at the middle one of the noises."""
    places = _places(benchmark, task)
    return places[len(places) // 2]


def _rows(benchmark, place, cases: Sequence[Case], methods: Sequence) -> Rows:
    """Truth, what was measured, and the methods' results, of each image."""
    problem = benchmark.pose(place, cases)
    rows = [("truth", to_pil(stack_truth(cases))), ("measured", to_pil(draw_measured(problem)))]
    for method in methods:
        rows.append((method.name, [load_image(benchmark.result_file(method, place, case)) for case in cases]))
    return rows
