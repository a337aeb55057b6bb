"""Contact sheets of the benchmark of prompts: what was asked for, what was given, and what each method painted."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vml_ldm.evaluation.comparison import Case
from vml_ldm.evaluation.prompts_tasks import Place
from vml_ldm.evaluation.sheet import draw_sheet
from vml_ldm.images import load_image, to_pil

_MOST, _PER_BAND, _LETTERS = 24, 8, 17


def draw_sheets(trial) -> list[str]:
    """Write ``sheet-PLACE.png`` of every place of a `Prompts` into its folder; the names of what was written.

    A sheet has the first prompts whose pictures every method has left there, with their first seed.
    """
    written = []
    for place in trial.plan.places:
        cases = [case for case in trial.cases[: trial.plan.images] if _is_drawn(trial, place, case)][:_MOST]
        if cases:
            written.append(f"sheet-{place}.png")
            names = [case.prompt[:_LETTERS] for case in cases]
            draw_sheet(_rows(trial, place, cases), names, _PER_BAND).save(trial.rows.folder / written[-1])
    return written


def _is_drawn(trial, place: Place, case: Case) -> bool:
    return all(trial.result_file(method, place, case).is_file() for method in trial.plan.methods)


def _rows(trial, place: Place, cases: Sequence[Case]) -> list[tuple[str, list[Image.Image]]]:
    posed = trial.pose(place, cases)
    given = to_pil(posed.known * posed.image + (1 - posed.known) * 0.5)
    rows = [("asked for", to_pil(posed.target)), ("known", given)]
    for method in trial.plan.methods:
        rows.append((method.name, [load_image(trial.result_file(method, place, case)) for case in cases]))
    return rows
