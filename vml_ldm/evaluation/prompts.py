"""The comparison behind ``vml-ldm prompts``: does a method paint what the prompt asks for, and keep what is known?

``python -m vml_ldm.evaluation.prompts`` is the same command. Prompts are names of training pictures that stock
text-to-image draws recognisably (`vml_ldm.evaluation.choosing`). Figures are of the pasted image, stock's too (one
function pastes all, `vml_ldm.images.seamless`), but that of the known pixels, which is of the decoded image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vml_ldm.assets import drawn_list
from vml_ldm.evaluation import comparison, metrics
from vml_ldm.evaluation.comparison import MOST_PSNR, WARM_UP_STEPS, Case
from vml_ldm.evaluation.cost import measured
from vml_ldm.evaluation.gallery import Gallery
from vml_ldm.evaluation.painters import Painted, Painter, Work, named_painter
from vml_ldm.evaluation.prompts_sheet import draw_sheets
from vml_ldm.evaluation.prompts_table import prompts_table
from vml_ldm.evaluation.prompts_tasks import PLACES, Place, Posed, pose
from vml_ldm.evaluation.rows import RowFile
from vml_ldm.images import from_pil, load_image, seamless

METHODS = tuple(map(named_painter, ("stock@7.5", "stock@3", "balanced", "fast", "best")))
_ROUND = 1000  # from a prompt's seed to its next one: more than there are prompts
_FINE = 2.0  # pixels: standard deviation of the Gaussian above whose scales detail is not fine


@dataclass(frozen=True)
class PromptRow:
    """One method at one place with one prompt and one seed.

    The first five fields say what was run; `image` is the file of the picture that the prompt names. Then: the rank of
    that picture among all training pictures for the result (`Gallery.ranks`), PSNR of the known pixels before the paste
    (dB), error at the hole's border after it (`metrics.edge_error`, jumps against those of the canvas, or of the
    truth), energy of the fine scales in the hole over that of the picture asked for, distance to the result of the
    first seed (None for the first), seconds for one image, calls of the denoiser, and of all networks, forward and
    backward, for one image; where there is a truth, PSNR in the hole (dB) and EfficientNet-Lite0 distance.
    """

    image: str
    place: str
    method: str
    seed: int
    fingerprint: str
    rank: int
    psnr_known: float
    edge_error: float
    sharpness: float
    spread: float | None
    seconds: float
    denoise: int
    calls: int
    psnr_unknown: float | None = None
    perceptual: float | None = None

    @property
    def first(self) -> float:
        return float(self.rank == 1)

    @property
    def ten(self) -> float:
        return float(self.rank <= 10)

    @property
    def reciprocal(self) -> float:
        return 1 / self.rank


@dataclass(frozen=True)
class Plan(comparison.Plan):
    """What to compare: methods at places, with so many prompts (`images`), each with so many seeds."""

    images: int = 48
    methods: tuple[Painter, ...] = METHODS
    places: tuple[Place, ...] = PLACES
    seeds: int = 2


def run(plan: Plan, pipe, rows: RowFile[PromptRow], gallery: Gallery, solve: bool = True) -> str:
    """Run the comparison, write its files into the rows' folder and return the table (Markdown).

    The folder gets ``rows.csv`` (appended batch by batch; what stands there already is not run again unless something
    that could change it has changed), ``results/`` (the pasted images), and ``table.md`` and ``sheet-PLACE.png`` of
    what there is, also when it is interrupted.

    Args:
        solve: False only makes table and sheets of the rows that are there, also of rows that other versions of the
            package made: for each place and method the version that was recorded last.
    """
    pipe.set_progress_bar_config(disable=True)
    trial = Prompts(plan, pipe, rows, gallery, solve)
    rows.start()
    try:
        if solve:
            trial.measure_all()
    finally:
        table = trial.table()
        (rows.folder / "table.md").write_text(table + "\n", encoding="utf-8")
        draw_sheets(trial)
    return table


class Prompts(comparison.Comparison):
    """One plan on one pipeline: measures what the row file lacks, then tabulates.

    Args:
        solve: False takes the rows as they were recorded, by whichever version of the package.
    """

    def __init__(self, plan: Plan, pipe, rows: RowFile[PromptRow], gallery: Gallery, solve: bool = True) -> None:
        self.gallery, self._stamps = gallery, {}
        super().__init__(plan, pipe, rows)
        made = [] if solve else rows.by_key.values()
        self._recorded = {(row.place, row.method): row.fingerprint for row in made}

    def load_cases(self) -> list[Case]:
        """The first prompts of the list, all with their first seed, then all with their second."""
        listed = drawn_list()
        if not 1 <= self.plan.images <= len(listed):
            raise ValueError(f"{self.plan.images} prompts asked for; expected 1 to {len(listed)}, which the list has.")
        first = [
            Case(name, prompt, self.plan.seed + place, self.gallery.picture(name))
            for place, (name, prompt) in enumerate(listed[: self.plan.images])
        ]
        return [replace(case, seed=case.seed + _ROUND * i) for i in range(self.plan.seeds) for case in first]

    def jobs(self) -> list[tuple[Place, Painter]]:
        return [(place, method) for place in self.plan.places for method in self.plan.methods]

    def key(self, method: Painter, place: Place, case: Case) -> tuple:
        return Path(case.name).stem, str(place), method.name, case.seed, self.fingerprint(method, place)

    def fingerprint(self, method: Painter, place: Place) -> str:
        return self._recorded.get((str(place), method.name)) or super().fingerprint(method, place)

    def stamp_of(self, method: Painter) -> str:
        """As `stamp`; of a method that does not use our solver only the sources that it goes through have a say."""
        if not method.modules:
            return self.stamp
        if method.modules not in self._stamps:
            self._stamps[method.modules] = comparison.stamp(self.plan, self.pipe, method.modules)
        return self._stamps[method.modules]

    def warm_up(self) -> None:
        for method in self.plan.methods:
            self._paint(method, self.cases[:1], self.pose(self.plan.places[0], self.cases[:1]), WARM_UP_STEPS)

    def pose(self, place: Place, cases: Sequence[Case]) -> Posed:
        return pose(place, cases, self.gallery)

    def measure(self, method: Painter, place: Place, cases: Sequence[Case]) -> list[PromptRow]:
        """Run one method on one batch; save the pasted images and return the rows."""
        posed = self.pose(place, cases)
        painted, cost = measured(lambda: self._paint(method, cases, posed), self.pipe.device)
        pasted = seamless(posed.image, painted.image, posed.known)
        self.save_pictures(method, place, cases, pasted)
        figures = zip(
            self.gallery.ranks(posed.seen(pasted), [case.name for case in cases], place.colour),
            metrics.psnr(painted.image, posed.image, posed.known).clamp(max=MOST_PSNR).tolist(),
            metrics.edge_error(pasted, posed.around, posed.known).tolist(),
            sharpness(pasted, posed.target, 1 - posed.known).tolist(),
            self._spreads(method, place, cases, pasted),
            strict=True,
        )
        spent = cost.seconds / len(cases), painted.calls.get("denoise", 0), sum(painted.calls.values())
        return [
            PromptRow(*self.key(method, place, case), *values, *spent, *of_truth)
            for case, values, of_truth in zip(cases, figures, self._of_truth(posed, pasted), strict=True)
        ]

    def _of_truth(self, posed: Posed, pasted: Tensor) -> list[tuple[float, float] | tuple[()]]:
        """PSNR in the hole and distance of each result; nothing where there is no truth."""
        if not posed.has_truth:
            return [()] * len(pasted)
        psnr = metrics.psnr(pasted, posed.target, 1 - posed.known).clamp(max=MOST_PSNR)
        return list(zip(psnr.tolist(), self.distance(pasted, posed.target).tolist(), strict=True))

    def _paint(self, method: Painter, cases: Sequence[Case], posed: Posed, steps: int | None = None) -> Painted:
        short = {} if steps is None else {"num_inference_steps": steps}
        work = Work([c.prompt for c in cases], posed.image, posed.known, [c.seed for c in cases])
        return method.paint(self.pipe, work, self.plan.common_arguments() | short)

    def _spreads(self, method: Painter, place: Place, cases: Sequence[Case], pasted: Tensor) -> list[float | None]:
        """How far each result is from that of the same prompt's first seed; None for that, or without its picture."""
        firsts = [replace(case, seed=self.plan.seed + (case.seed - self.plan.seed) % _ROUND) for case in cases]
        files = [self.result_file(method, place, first) for first in firsts]
        return [
            self.distance(image[None], from_pil(load_image(file))).item() if case != first and file.is_file() else None
            for image, case, first, file in zip(pasted, cases, firsts, files, strict=True)
        ]

    def table(self) -> str:
        """The table of every prompt that all methods have painted at a place (Markdown)."""
        groups = {}
        for place in self.plan.places:
            methods = self.plan.methods
            if cases := [c for c in self.cases if all(self.is_done(m, place, c) for m in methods)]:
                groups[str(place)] = {m.name: self.rows_of(m, place, cases) for m in methods}
        head = (
            f"{self.plan.images} prompts, {self.plan.seeds} seeds, {self.plan.steps or 50} steps, "
            f"{self.size} x {self.size} pixels, batches of up to {self.plan.batch}, {self.pipe.device.type} in "
            f"{str(self.pipe.unet.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads."
        )
        return f"{head}\n\n{prompts_table(groups)}"


def sharpness(image: Tensor, asked: Tensor, hole: Tensor) -> Tensor:
    """Energy of the fine scales in the hole over that of the picture asked for: (B,), 1 for as sharp a picture.

    The fine scales are what a Gaussian of 2 pixels takes away; the energy is the sum of their squares over the hole.

    Args:
        image, asked: (B, 3, H, W) in [0, 1].
        hole: (B, 1, H, W), 1 = counted.
    """
    energy, of_asked = (((x - _blurred(x)).square() * hole).sum((1, 2, 3)) for x in (image.double(), asked.double()))
    return energy / of_asked.clamp(min=1e-12)


def _blurred(image: Tensor) -> Tensor:
    """By a Gaussian of 2 pixels; the border is repeated."""
    reach = round(3 * _FINE)
    place = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.softmax(-place.square() / (2 * _FINE**2), 0).expand(image.shape[1], 1, 1, -1)
    padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=image.shape[1])
    return F.conv2d(rows, kernel.mT, groups=image.shape[1])


if __name__ == "__main__":
    import sys

    from vml_ldm.cli import main

    sys.exit(main(["prompts", *sys.argv[1:]]))
